"""The bake-off: what the rules promise, the model under every arm, what a sweep of them writes."""

import json

import pytest
import torch

from examples_support import ENCODER, QUIET, ends_in_one_line, need_extras, toy
from uncertainty_mm.data import MultimodalBatch

need_extras()
from uncertainty_mm.examples import sweep  # noqa: E402
from uncertainty_mm.examples.bakeoff import comparison, identities, measures, report  # noqa: E402
from uncertainty_mm.examples.bakeoff.model import FusionModel  # noqa: E402
from uncertainty_mm.examples.baselines.bootstrap import Interval  # noqa: E402

pytestmark = QUIET
DIMS, STEPS = {"a": 3, "b": 2}, {"a": 5, "b": 7}
TINY = (
    *ENCODER,
    *("--model.attention.label_dim=8", "--model.attention.proj_dim=8"),
    *("--model.attention.out_dim=8", "--model.decoupler.latent_dim=4"),
    *("--data.batch_size=16", "--trainer.max_epochs=1"),
)
# SPEC: what each rule keeps; in all of them order and masks change nothing.
PROMISED = {
    "copies keep the value": {
        *("generalized_product", "mixture", "mixture_of_products", "barycenter", "norm_weighted"),
        *("decision_mean", "decision_precision", "decision_energy", "decision_predictive"),
        "belief_average",
    },
    "copies keep the spread": {
        *("generalized_product", "mixture", "barycenter", "norm_weighted", "belief_average"),
    },
    "conflict widens": {
        *("mixture", "mixture_of_products", "norm_weighted"),
        *("belief_dempster", "belief_discounted"),
    },
    "saying nothing is absent": {
        *("product", "generalized_product", "norm_weighted"),
        *("decision_precision", "belief_cumulative", "belief_dempster", "belief_discounted"),
    },
    "Dempster's product": {"belief_dempster"},
}
REFUSED = {"mixture", "mixture_of_products", "barycenter"}  # an infinite standard deviation


def model(arm):
    options = dict(zip(comparison.OPTIONS[arm][::2], comparison.OPTIONS[arm][1::2], strict=True))
    return FusionModel(
        DIMS,
        STEPS,
        [*"xyz"],
        9,
        rule=options["--model.rule"],
        loss=options.get("--model.loss"),
        encoder={"hidden_dim": 8, "num_layers": 1, "num_heads": 2},
        attention={"label_dim": 8, "proj_dim": 8, "out_dim": 8},
        decoupler={"latent_dim": 4},
    )


def batch():
    """Nine samples: the second lacks one modality, the third all; a label of the first is not known."""
    features = {name: torch.randn(9, STEPS[name], dim) for name, dim in DIMS.items()}
    padding = {name: torch.zeros(9, steps).bool() for name, steps in STEPS.items()}
    padding["a"][1:3], padding["b"][2] = True, True
    labels, unknown = torch.randint(2, (9, 3)), torch.zeros(9, 3).bool()
    unknown[0, 1] = True
    return MultimodalBatch(features, padding, labels, torch.arange(9), None, unknown)


def test_identities_are_those_promised():
    found = identities.computed()
    every = {*found}
    rest = {"one alone is the result": every - {"product"}}
    rest["conflict is said"] = {name for name in every if name.startswith(("decision", "belief"))}
    rest |= dict.fromkeys(("masked is absent", "any order", "none: the prior"), every)
    for identity, rules in (PROMISED | rest).items():
        assert {name for name in every if (c := found[name][identity]) and c.holds} == rules
    refused = {name for name in every if found[name]["saying nothing is absent"] is None}
    assert refused == REFUSED
    lines = identities.table(found).splitlines()
    assert len(lines) == 2 + len(every)
    assert {line.count("|") for line in lines} == {2 + len(identities.IDENTITIES)}


@pytest.mark.parametrize("arm", comparison.ARMS)
def test_every_arm_learns_from_what_is_there(arm):
    torch.manual_seed(0)
    network, given = model(arm), batch()
    for _ in range(2):  # the second time with a history
        losses = network.losses(network(given.features, given.padding_mask), given)
    losses["total"].backward()
    assert losses["total"].isfinite()
    assert ("compared" in losses) == (network.loss is not None)
    gradients = {k: x.grad for k, x in network.named_parameters() if x.grad is not None}
    assert all(grad.isfinite().all() for grad in gradients.values())
    assert any(key.startswith("encoder.a") and x.abs().sum() > 0 for key, x in gradients.items())
    before = losses["total"].detach()
    given.labels[0, 1] = 1 - given.labels[0, 1]  # unknown: whatever stands there
    torch.manual_seed(0)
    network, given = model(arm), batch()._replace(labels=given.labels, features=given.features)
    for _ in range(2):
        again = network.losses(network(given.features, given.padding_mask), given)["total"]
    torch.testing.assert_close(again.detach(), before)


def test_a_missing_modality_has_no_uncertainty():
    said = model("product").eval().predict_step(batch(), 0)
    expected = said["missing"].unsqueeze(2).expand_as(said["std_norm"])
    assert torch.equal(said["std_norm"].isnan(), expected)
    assert said["fused_uncertainty"].isfinite().all()


@pytest.mark.parametrize("options", [{"rule": "best"}, {"loss": "least"}])
def test_unknown_names_are_refused(options):
    (name,) = options
    with pytest.raises(ValueError, match=f"Expected `{name}` to be one of"):
        FusionModel(DIMS, STEPS, ["x"], 9, **options)


def test_differences_are_drawn_and_reported():
    found = {"miF1": Interval(0.01, 0.005, 0.02), "Brier": Interval(0.001, -0.001, 0.002)}
    intervals = {"toy": {"mixture": found}}
    rows = [
        {"data": "toy", "arm": arm, "seed": 0, "miF1": 0.5, "ms a step": 3.25, "parameters": 4321}
        for arm in ("product", "mixture")
    ]
    text = report.report(rows, intervals)
    assert f"| {found['miF1']} | {found['Brier']} |" in text
    assert "| 3.25 | 4,321 |" in text
    panels = report.figure(intervals).axes
    assert [panel.get_xlabel() for panel in panels] == [
        "miF1 (better: right)",
        "Brier (better: left)",
    ]
    assert [text.get_text() for text in panels[0].get_yticklabels()] == ["mixture"]


def test_errors_are_one_line(tmp_path, capsys):
    for arguments, message in (
        (["--arms", "best"], "invalid choice"),
        (["--data", str(tmp_path / "none.npz")], "no such file"),
        ([], "at least one of each"),
    ):
        with ends_in_one_line(capsys, message):
            comparison.main([*arguments, "--output", str(tmp_path / "out")])


@pytest.mark.long
def test_bakeoff_measures_and_reports(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "in_a_process", sweep.carry_out)
    file, out = toy(tmp_path / "toy.npz"), tmp_path / "out"
    arms = ["product", "belief_discounted", "ordinality_rank"]
    command = ["--data", str(file), "--seeds", "0", "1", "--jobs", "1", "--arms", *arms]
    comparison.main([*command, "--output", str(out), "--", *TINY])
    rows = json.loads((out / "runs.json").read_text())
    assert [(row["arm"], row["seed"]) for row in rows] == [(a, s) for s in (0, 1) for a in arms]
    expected = {*measures.PREDICTION, *measures.UNCERTAINTY, *measures.PRICE} - {"std ~ noise"}
    for row in rows:
        assert {*row} == expected | {"data", "arm", "seed", "options"}
        assert 0 < row["Brier"] < 1
        assert 0 <= row["corruption"] <= 1
    text = (out / "bakeoff.md").read_text()
    assert all(f"| {arm} | 2 |" in text for arm in arms)
    assert (out / "bakeoff.svg").read_text().startswith("<?xml")
