"""The ablation: rows differ as they say, the first row pools without labels."""

import json

import numpy as np
import pytest
import torch

from examples_support import QUIET, TINY, need_extras, toy
from uncertainty_mm.data import MultimodalBatch

need_extras()
yaml = pytest.importorskip("yaml")
from uncertainty_mm.examples import lddu_ablation, sweep  # noqa: E402
from uncertainty_mm.lightning.cli import ModelCLI  # noqa: E402

pytestmark = QUIET


def leaves(options, prefix=""):
    """Options by their full names."""
    found = {}
    for key, value in options.items():
        nested = isinstance(value, dict)
        found |= leaves(value, f"{prefix}{key}.") if nested else {prefix + key: value}
    return found


def settings(*options):
    """All options of the model that a command line gives."""
    given = ["--config", "small", *options, "--trainer.fast_dev_run", "true"]
    return leaves(ModelCLI(sweep.LDDU, sweep.CONFIGS, given).config.as_dict())


@pytest.mark.parametrize("model", ["paper", "ours"])
def test_every_row_changes_one_thing(model):
    base = settings(*lddu_ablation.MODELS[model])
    files = sorted((sweep.CONFIGS / "ablation").glob("*.yaml"))
    assert [path.stem for path in files] == list(lddu_ablation.ARMS)
    for path in files:
        row = leaves(yaml.safe_load(path.read_text()))
        changed = [
            name for name, value in row.items() if json.dumps(base[name]) != json.dumps(value)
        ]
        equal = path.stem in ("00-full", "01-without-queries")
        equal |= model == "ours" and path.stem == "08-only-sr"
        assert len(changed) == (0 if equal else 1), (path.stem, changed)


def test_model_of_the_paper_is_that_of_the_config():
    paper, study = (
        leaves(yaml.safe_load((sweep.CONFIGS / f"{name}.yaml").read_text())["model"])
        for name in ("paper", "study/paper")
    )
    sizes = ("lr", "warmup", "queue_size", "hidden_dim", "num_layers", "_dim")
    assert study == {name: x for name, x in paper.items() if not name.endswith(sizes)}


def test_rows_are_trained_and_stand_beside_the_paper(monkeypatch, tmp_path):
    monkeypatch.setattr(sweep, "in_a_process", sweep.carry_out)
    data = toy(tmp_path / "data.npz")
    arms = ["01-without-queries", "11-without-mean-branch", "04-without-queue"]
    command = ["--data", str(data), "--arms", *arms, "--seeds", "0", "--jobs", "1"]
    sized = [option for option in TINY if "attention.label_dim" not in option]
    lddu_ablation.main([*command, "--output", str(tmp_path / "out"), "--", *sized])
    rows = json.loads((tmp_path / "out" / "runs.json").read_text())
    assert [row["arm"] for row in rows] == arms
    report = (tmp_path / "out" / "ablation.md").read_text()
    assert report == lddu_ablation.report(rows)
    lines = report.splitlines()
    assert lines[4].startswith(f"| (1) w/o label queries | 1 | {rows[0]['Acc']:.3f} | ")
    assert lines[4].endswith(" | - |")
    assert lines[6].endswith(" | 0.578 |")
    folder = tmp_path / "out" / "data"
    with np.load(folder / "11-without-mean-branch" / "0" / "predictions.npz") as file:
        assert not file["gate"].any()  # the weight of the means
    config = yaml.safe_load((folder / "04-without-queue" / "0" / "config.yaml").read_text())
    assert config["model"]["contrastive"]["queue_size"] == 0  # not that of all runs
    assert config["model"]["ordinality"]["mode"] == "raw"  # the paper's
    model = lddu_ablation.WithoutQueries.load(folder / "01-without-queries" / "0" / "best.ckpt")
    assert isinstance(model.attention, lddu_ablation.AttentionPooling)


def test_pooling_leaves_padding_and_missing_modalities_out():
    pool = lddu_ablation.AttentionPooling({"a": 16, "b": 16}, 4, label_dim=8, out_dim=8)
    features = {"a": torch.randn(6, 5, 16), "b": torch.randn(6, 7, 16)}
    mask = {name: torch.zeros(x.shape[:2]).bool() for name, x in features.items()}
    mask["a"][:, 3:], mask["b"][0] = True, True
    z = pool(features, mask)
    assert z.shape == (6, 2, 4, 8)
    assert torch.equal(pool.missing(features, mask)[0], torch.tensor([False, True]))
    # the mean of the steps, weighted by the MLP alone
    steps = features["a"][:, :3]
    weights = pool.score["a"](steps).softmax(1)
    expected = pool.answer["a"]((weights * steps).sum(1)).view(6, 4, 8)
    torch.testing.assert_close(z[:, 0], expected)
    features["a"][:, 3:] = 100
    features["b"][0] = 100
    torch.testing.assert_close(pool(features, mask), z)


def test_first_row_has_finite_gradients_where_modalities_are_missing():
    sizes = {"encoder": {"hidden_dim": 8, "num_heads": 2}, "contrastive": {"queue_size": 8}}
    model = lddu_ablation.WithoutQueries({"a": 3, "b": 2}, {"a": 5, "b": 7}, [*"wxyz"], 10, **sizes)
    features = {"a": torch.randn(6, 5, 3), "b": torch.randn(6, 7, 2)}
    mask = {name: torch.zeros(x.shape[:2]).bool() for name, x in features.items()}
    mask["b"][:3] = True
    batch = MultimodalBatch(features, mask, torch.randint(0, 2, (6, 4)), torch.arange(6))
    model.losses(model(features, mask, batch.labels), batch)["total"].backward()
    for part in (model.attention.score, model.attention.answer):
        for parameter in part.parameters():
            assert parameter.grad.isfinite().all()
    assert model.attention.score["a"][0].weight.grad.any()
