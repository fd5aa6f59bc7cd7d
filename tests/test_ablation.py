"""The ablation: rows differ as they say, a failing row costs itself, the first row pools without labels."""

import json

import numpy as np
import pytest
import torch

from examples_support import QUIET, example_module, need_extras

need_extras()

pytestmark = QUIET
SMALL = (
    "--hidden-dim 16 --heads 2 --layers 1 --z-dim 8 --latent-dim 4 --queue-size 64 --batch-size 16"
)


@pytest.fixture(scope="module")
def ablation():
    with example_module("lddu_ablation") as module:
        yield module


@pytest.mark.parametrize("model", ["paper", "ours"])
def test_every_row_changes_one_thing(ablation, model):
    parse = ablation.lddu_full.parse
    base, *rows = (
        vars(parse(f"train {ablation.MODELS[model]} {arm.options}".split()))
        for arm in ablation.ARMS.values()
    )
    assert len(ablation.ARMS) == 13
    for arm, row in zip(list(ablation.ARMS)[1:], rows, strict=True):
        changed = [name for name in row if row[name] != base[name]]
        equal = arm == ablation.WITHOUT_QUERIES or (model == "ours" and "Corr(S,R)" in arm)
        assert len(changed) == (0 if equal else 1), (arm, changed)


def test_model_of_the_paper_is_that_of_the_preset(ablation):
    data = ["train", "--data", "mine.npz"]
    args = ablation.lddu_full.parse([*data, *ablation.MODELS["paper"].split()])
    preset = ablation.lddu_full.parse([*data, "--config", "mosei-aligned"])
    for name in ablation.lddu_full.MODEL_OPTIONS:
        assert getattr(args, name) == getattr(preset, name), name


def test_failing_row_costs_itself(ablation, tmp_path, capsys):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, (60, 2)).astype(np.uint8)
    np.savez(
        tmp_path / "data.npz",
        **{
            "features.a": rng.normal(size=(60, 4, 3)) + labels[:, :1, None],
            "lengths.a": rng.integers(0, 5, 60),
            "features.b": rng.normal(size=(60, 3, 2)),
            "lengths.b": rng.integers(1, 4, 60),
        },
        labels=labels,
        label_names=np.array(["x", "y"]),
        split=np.repeat([0, 1, 2], 20),
    )
    arms = ["full", ablation.WITHOUT_QUERIES, "(11) w/o mean branch", "(4) w/o queue"]
    out = tmp_path / "out"
    (out / "data").mkdir(parents=True)
    (out / "data" / "full").touch()  # where the folder of the run should be
    command = ["--data", str(tmp_path / "data.npz"), "--arms", *arms, "--seeds", "0"]
    command += ["--epochs", "1", "--options", SMALL, "--output", str(out), "--jobs", "1"]
    with pytest.raises(SystemExit, match="1 runs failed"):
        ablation.main(command)
    rows = json.loads((out / "runs.json").read_text())
    assert [row["arm"] for row in rows] == arms[1:]
    assert set(ablation.COLUMNS) <= set(rows[0])
    report = (out / "ablation.md").read_text()
    assert report == ablation.report(rows)
    assert report.splitlines()[4].startswith(f"| {arms[1]} | 1 | {rows[0]['Acc']:.3f} | ")
    assert report.splitlines()[4].endswith(" | - |")
    assert "failed" in "".join(capsys.readouterr())
    gate = np.load(out / "data" / "_11__w_o_mean_branch" / "0" / "predictions.npz")["gate"]
    assert not gate.any()  # the weight of the means
    config = (out / "data" / "_4__w_o_queue" / "0" / "config.yaml").read_text()
    assert "queue_size: 0\n" in config  # not that of --options


def test_pooling_leaves_padding_and_missing_modalities_out(ablation):
    torch.manual_seed(0)
    options = dict(hidden_dim=16, heads=2, layers=1, z_dim=8, latent_dim=4, queue_size=8)
    model = ablation.WithoutQueries({"a": 3, "b": 2}, {"a": 5, "b": 7}, 4, 10, **options).eval()
    features = {"a": torch.randn(6, 5, 16), "b": torch.randn(6, 7, 16)}
    mask = {name: torch.zeros(x.shape[:2]).bool() for name, x in features.items()}
    mask["a"][:, 3:], mask["b"][0] = True, True
    z = model.attention(features, mask)
    assert z.shape == (6, 2, 4, 8)
    assert torch.equal(model.attention.missing(features, mask)[0], torch.tensor([False, True]))
    # the mean of the steps, weighted by the MLP alone
    steps = features["a"][:, :3]
    weights = model.attention.score["a"](steps).softmax(1)
    expected = model.attention.answer["a"]((weights * steps).sum(1)).view(6, 4, 8)
    torch.testing.assert_close(z[:, 0], expected)
    features["a"][:, 3:] = 100
    features["b"][0] = 100
    torch.testing.assert_close(model.attention(features, mask), z)
    raw = {"a": torch.randn(6, 5, 3), "b": torch.randn(6, 7, 2)}
    labels = torch.randint(0, 2, (6, 4))
    model.train()
    losses = model.losses(model(raw, mask, labels), labels, torch.arange(6))
    losses["total"].backward()
    for part in (model.attention.score, model.attention.answer):
        for parameter in part.parameters():
            assert parameter.grad.isfinite().all()
    assert model.attention.score["a"][0].weight.grad.any()
