"""The model of the example by itself: what is missing or unknown has no influence, every choice is one, the losses,

the pool of predictions, and what is unlike the training data.
"""

import copy
import sys
from inspect import getsource, signature
from typing import Literal, get_args, get_origin

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map

from examples_support import QUIET, need_extras
from support import poisoned
from uncertainty_mm import DiagonalGaussian
from uncertainty_mm.data import MultimodalBatch

need_extras()
pytestmark = QUIET

SIZES = {
    "encoder": {"hidden_dim": 16, "num_heads": 2, "num_layers": 1, "dropout": 0.0},
    "attention": {"out_dim": 8},
    "decoupler": {"latent_dim": 4, "dropout": 0.0},
    "contrastive": {"queue_size": 32, "gather": False},
    "fusion": {"dropout": 0.0},
    "ordinality": {"gather": False},
    "places": {"num_reads": 3, "hidden_dim": 8, "dropout": 0.0},
}


@pytest.fixture(scope="module")
def example():
    from uncertainty_mm.examples import lddu_full

    return lddu_full


@pytest.fixture
def build(example):
    """Makes a small model of two modalities and four labels; `fusion__combine` is an option of a part."""

    def build(**options):
        torch.manual_seed(0)
        parts = copy.deepcopy(SIZES)
        for key in [key for key in options if "__" in key]:
            part, name = key.split("__")
            parts.setdefault(part, {})[name] = options.pop(key)
        dims, steps = {"a": 3, "b": 2}, {"a": 5, "b": 7}
        return example.LDDU(
            dims, steps, ["w", "x", "y", "z"], 10, dropout=0.0, **{**parts, **options}
        )

    return build


def small_batch(**changes):
    """Six samples; the last one lacks `b`."""
    generator = torch.Generator().manual_seed(1)
    features = {
        "a": torch.randn(6, 5, 3, generator=generator),
        "b": torch.randn(6, 7, 2, generator=generator),
    }
    padding = {
        name: torch.rand(x.shape[:2], generator=generator) < 0.3 for name, x in features.items()
    }
    padding["a"][:, 0] = padding["b"][:, 0] = False
    padding["b"][5] = True
    labels = torch.randint(0, 2, (6, 4), generator=generator)
    return MultimodalBatch(features, padding, labels, torch.tensor([7, 0, 3, 9, 2, 5]))._replace(
        **changes
    )


def read(model, batch):
    return model(batch.features, batch.padding_mask, batch.labels, batch.unknown)


def without(batch, *names):
    lost = {name: torch.ones_like(batch.padding_mask[name]) for name in names}
    return batch._replace(padding_mask=batch.padding_mask | lost)


# --- Modalities -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("combine", ["product", "concat"])
@pytest.mark.parametrize("size", ["apart", "within"])
def test_masked_modality_equals_a_missing_one(build, combine, size):
    """Whatever stands at padded steps, the prediction is that without the modality."""
    model = build(fusion__combine=combine, encoder__size=size).eval()
    batch = without(small_batch(), "b")
    first = model(batch.features, batch.padding_mask)
    other = {
        "a": batch.features["a"].masked_fill(batch.padding_mask["a"].unsqueeze(2), 1e4),
        "b": 100 * torch.randn(6, 7, 2),
    }
    for one, two in zip(
        tree_leaves(first), tree_leaves(model(other, batch.padding_mask)), strict=True
    ):
        assert torch.equal(one, two)
    assert first.missing.tolist() == [[False, True]] * 6
    assert torch.equal(first.latent.std[:, 1], torch.ones(6, 4, 4))
    assert torch.equal(first.latent.mean[:, 1], torch.zeros(6, 4, 4))
    assert not torch.equal(first.fused.logits[0], first.fused.logits[1])  # `a` is still read
    latent = DiagonalGaussian(*(poisoned(x, first.missing, 9.0) for x in first.latent))
    uncertainty = model.uncertainty(first.dir_logits.sigmoid(), None, None)
    assert torch.equal(model.fusion(latent, uncertainty, first.missing).logits, first.fused.logits)
    details = model.details(first)
    assert details["std_norm"][:, 1].isnan().all()
    assert torch.equal(details["std_norm"][:, 0], first.std_norm[:, 0])
    assert torch.equal(details["missing"], first.missing)


@pytest.mark.parametrize("combine", ["product", "concat"])
def test_samples_without_any_modality_get_one_answer(build, combine):
    model = build(fusion__combine=combine)
    batch = without(small_batch(), "a", "b")
    with torch.no_grad():
        output = read(model, batch)
    for leaf in tree_leaves(output):
        assert leaf.float().isfinite().all()
        assert torch.equal(leaf, leaf[:1].expand_as(leaf))
    for _ in range(2):
        losses = model.losses(read(model, batch), batch)
        losses["total"].backward()
        assert losses["ocl"] == losses["modality"] == losses["scl"] == losses["kl"] == 0
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert model.tracker.counts(batch.indices).sum() == 0  # nothing was seen, so nothing was right


# --- Options ----------------------------------------------------------------------------------------------------------


def choices(made):
    """Names of the parameters that are a choice of words, with the words."""
    names = vars(sys.modules[made.__module__])
    hints = {each.name: str(each.annotation) for each in signature(made).parameters.values()}
    types = {name: eval(hint, names) for name, hint in hints.items() if "dist." not in hint}
    return {name: get_args(hint) for name, hint in types.items() if get_origin(hint) is Literal}


def all_choices():
    from uncertainty_mm.examples.lddu_full import LDDU

    found = choices(LDDU)
    for part, made in LDDU.parts.items():
        found |= {f"{part}__{name}": words for name, words in choices(made).items()}
    del found["contrastive__reduction"]  # `sum` and `none` are for who sums or weighs anchors
    del found["typicality__covariance"]  # it acts in evaluation only
    pairs = (("SR",), ("SR", "DR"), ("DS",))
    return found | {"ordinality__pairs": pairs, "fusion__detach_std": (True, False)}


@pytest.mark.parametrize("option", all_choices())
def test_every_choice_takes_a_step_of_its_own(build, option):
    totals = []
    for choice in all_choices()[option]:
        model = build(**{option: choice})
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        batch = small_batch()
        for _ in range(3):  # samples have a history from the second step on
            losses = model.losses(read(model, batch), batch)
            optimizer.zero_grad()
            losses["total"].backward()
            assert losses["ocl"].isfinite()
            for name, parameter in model.named_parameters():
                assert parameter.grad is None or parameter.grad.isfinite().all(), (choice, name)
            optimizer.step()
        totals.append(float(losses["total"]))
    assert len(set(totals)) == len(totals) > 1, totals


def test_single_branches_are_those_of_the_fusion(build):
    """Whatever the weight of the means is called, `mean` and `std` leave one branch alone; the oracle knows labels."""
    batch = small_batch()
    for mean_weight in ("certainty", "uncertainty"):
        for gate in ("mean", "std"):
            fused = read(build(gate=gate, fusion__mean_weight=mean_weight).eval(), batch).fused
            torch.testing.assert_close(fused.logits, getattr(fused, f"{gate}_logits"))
    model = build(gate="oracle", fusion__mean_weight="uncertainty")
    output = read(model, batch)
    distance = (output.dir_logits.sigmoid() - batch.labels).abs().mean(1, keepdim=True)
    torch.testing.assert_close(output.fused.mean_weight, distance.expand(6, 4).detach())
    expected = 2 * output.dir_logits.sigmoid() * (1 - output.dir_logits.sigmoid())
    torch.testing.assert_close(read(model.eval(), batch).fused.mean_weight, expected)


# --- The pool ---------------------------------------------------------------------------------------------------------


def test_nothing_else_learns_from_the_prediction_by_place(build):
    """With and without it the other losses and their gradients are the same to the bit; its own reach it alone."""
    batch = small_batch()
    model, other = build(), build(predictions=["fused", "first"])
    shared = other.state_dict().keys() - {"pool.weight"}
    other.load_state_dict({name: model.state_dict()[name] for name in shared}, strict=False)
    for _ in range(2):  # with a history
        losses, theirs = (each.losses(read(each, batch), batch) for each in (model, other))
        assert losses.keys() - theirs.keys() == {"places"}
        assert all(
            torch.equal(losses[name], loss) for name, loss in theirs.items() if name != "total"
        )
        model.zero_grad()
        other.zero_grad()
        losses["total"].backward()
        theirs["total"].backward()
        mine = {name: x.grad for name, x in model.named_parameters()}
        for name, parameter in other.named_parameters():
            assert torch.equal(mine.pop(name), parameter.grad), name
        assert mine
        assert all(name.startswith("places.") and grad.any() for name, grad in mine.items())


def test_pool_weighs_the_predictions_by_name(build):
    batch = small_batch()
    model = build(predictions=["places", "fused"]).eval()
    output = read(model, batch)
    model.pool.weight.copy_(torch.tensor([0.25, 0.75]))
    expected = 0.25 * output.place_logits + 0.75 * output.logits
    torch.testing.assert_close(model.final_logits(output), expected)
    fitted = model.predict_step(batch, 0)
    torch.testing.assert_close(fitted["uncalibrated"], expected.sigmoid())
    for name, logits in (("fused", output.fused.logits), ("first", output.dir_logits)):
        alone = build(predictions=[name]).eval()
        alone.load_state_dict({**alone.state_dict(), **shared_state(model, alone)})
        assert alone.places is None
        assert torch.equal(alone.final_logits(read(alone, batch)), logits)


def shared_state(model, other):
    names = other.state_dict().keys() - {"pool.weight"}
    return {name: model.state_dict()[name] for name in names}


@pytest.mark.parametrize("wrong", [(), ("fused", "fused"), ("fused", "last")])
def test_predictions_are_named_each_once(build, wrong):
    with pytest.raises(ValueError, match=r"^Expected some `predictions`, each once, .*\)$"):
        build(predictions=wrong)


# --- What is unlike the training data ---------------------------------------------------------------------------------


def factors(monkeypatch, model, *columns):
    """From now on the factor of the modalities is that."""
    factor, summaries = torch.tensor(columns).expand(6, 2), model.typicality.summaries
    monkeypatch.setattr(
        model.typicality, "forward", lambda *inputs, **_: (factor, summaries(*inputs))
    )


def predictions(output):
    return output.logits, output.dir_logits, output.place_logits


def test_typicality_acts_in_evaluation_only(build, monkeypatch):
    model, batch = build(), small_batch()
    expected = read(model, batch)
    evaluated = read(model.eval(), batch)
    factors(monkeypatch, model, 3.0, 5.0)
    trained = read(model.train(), batch)
    for one, two in zip(tree_leaves(trained), tree_leaves(expected), strict=True):
        assert torch.equal(one, two)
    assert torch.equal(trained.typicality, torch.ones(6, 2))
    assert not trained.conflict.any()
    spoilt = read(model.eval(), batch)
    assert torch.equal(spoilt.typicality, torch.tensor([3.0, 5.0]).expand(6, 2))
    for one, two in zip(predictions(spoilt), predictions(evaluated), strict=True):
        assert not torch.isclose(one, two).all(1).any()
    grown = evaluated.latent.std * torch.tensor([3.0, 5.0]).sqrt().view(2, 1, 1)
    torch.testing.assert_close(spoilt.latent.std, grown)
    assert torch.equal(spoilt.conflict, evaluated.conflict)  # of what the model itself says
    assert torch.equal(spoilt.modality_logits, evaluated.modality_logits)


def test_unfitted_or_unused_typicality_changes_nothing(build, monkeypatch):
    batch = small_batch()
    model, other = build().eval(), build(use_typicality=False).eval()
    expected = read(model, batch)
    factors(monkeypatch, other, 3.0, 5.0)
    unused = read(other, batch)
    factors(monkeypatch, model, 1.0, 1.0)
    one = read(model, batch)
    for output in (unused, one):
        for left, right in zip(tree_leaves(output), tree_leaves(expected), strict=True):
            assert torch.equal(left, right)
    assert torch.equal(expected.typicality, torch.ones(6, 2))


@pytest.mark.parametrize("half", [False, True])
def test_large_factor_tends_to_the_missing_modality(build, monkeypatch, half):
    """With infinity all predictions are those without the modality, to the bit."""
    model, batch = build().eval(), small_batch()
    if half:
        model = model.bfloat16()
        batch = batch._replace(features={name: x.bfloat16() for name, x in batch.features.items()})
    torch.nn.init.normal_(model.modality_readout)
    missing = model.experts(read(model, without(batch, "b"))).unbind(1)
    distances = []
    for size in (1.0, 100.0, 1e4, torch.inf):
        factors(monkeypatch, model, 1.0, size)
        found = model.experts(read(model, batch)).unbind(1)
        distances.append([(x - y).abs().max().item() for x, y in zip(found, missing, strict=True)])
    first, second, third, last = (torch.tensor(each) for each in distances)
    assert last.tolist() == [0, 0, 0, 0]
    assert (third < 0.02).all()
    if not half:
        assert (first > second).all()
        assert (second > third).all()


def test_fourth_prediction_is_the_mean_of_the_modalities_by_their_typicality(build, monkeypatch):
    model, batch = build().eval(), small_batch()
    torch.nn.init.normal_(model.modality_readout)
    factors(monkeypatch, model, 1.0, 3.0)
    output = read(model, without(batch, "a"))
    alone = output.modality_logits[:, 1] / (1 + torch.pi * 3 / 8) ** 0.5  # its expected probability
    there = ~output.missing[:, 1]
    torch.testing.assert_close(model.experts(output)[there, 3], alone[there])
    torch.nn.init.normal_(model.modality_bias)
    nothing, bias = (
        read(model, without(batch, "a", "b")),
        (3 * model.modality_bias[0] + model.modality_bias[1]) / 4,
    )
    expected = (bias / (1 + torch.pi * 1.2 / 8) ** 0.5).expand(6, 4)
    torch.testing.assert_close(model.experts(nothing)[:, 3], expected)
    both = read(model, batch)
    mean = (3 * both.modality_logits[:, 0] + both.modality_logits[:, 1]) / 4
    there = ~both.missing.any(1)
    found = model.experts(both)[there, 3]
    torch.testing.assert_close(found, mean[there] / (1 + torch.pi * 1.2 / 8) ** 0.5)


def test_prediction_that_is_not_pooled_is_not_computed(build, monkeypatch):
    model, batch = build(predictions=["fused", "first"]).eval(), small_batch()
    monkeypatch.setattr(model.decisions, "forward", None)
    output = read(model, batch)
    expected = torch.stack([output.logits, output.dir_logits], 1)
    assert torch.equal(model.experts(output), expected)


def test_process_group_is_given_by_its_name(build, example):
    """A group can be neither copied nor saved with the arguments."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        group = dist.new_group([0])
        model = build(contrastive__process_group=group.group_name)
        assert model.contrastive.process_group == group.group_name
        message = (
            "^Expected the arguments of LDDU .* the name of a process group .*'.*ProcessGroup'"
        )
        with pytest.raises(TypeError, match=message):
            example.LDDU({"a": 3}, {"a": 5}, ["x"], 9, contrastive={"process_group": group})
    finally:
        dist.destroy_process_group()


def test_conflict_needs_two_modalities(build):
    model, batch = build().eval(), small_batch()
    conflict = model.details(read(model, batch))["conflict"]
    assert conflict.shape == (6, 4)
    assert (conflict > 0).all(1).tolist() == [True] * 5 + [False]
    assert not conflict[5].any()
    assert not read(model, without(batch, "a", "b")).conflict.any()


# --- Losses -----------------------------------------------------------------------------------------------------------


def test_soft_labels_are_what_the_classifiers_are_trained_towards(build):
    """The three cross-entropies read the targets; the contrastive and the ordinality loss keep the labels."""
    shares = torch.rand(6, 4)
    batch = small_batch(soft_labels=shares)
    results = {}
    for share in (0.0, 0.25, 1.0):
        model = build(soft_labels=share)
        output = read(model, batch)
        results[share] = model.losses(output, batch)
        target = (1 - share) * batch.labels + share * shares
        for name, logits in (("cls", output.logits), ("dir", output.dir_logits)):
            torch.testing.assert_close(
                results[share][name], F.binary_cross_entropy_with_logits(logits, target)
            )
        each = target[:, None].expand(6, 2, 4)
        entropy = F.binary_cross_entropy_with_logits(output.modality_logits, each, reduction="none")
        seen = ~output.missing.unsqueeze(2)
        torch.testing.assert_close(results[share]["modality"], (entropy * seen).mean())
    assert results[0.0]["scl"] == results[1.0]["scl"] > 0


@pytest.mark.parametrize(("rows", "samples"), [(None, 6), (48, 6), (39, 4), (8, 1), (1, 1)])
def test_contrastive_loss_is_that_of_the_first_samples(build, rows, samples):
    """Of 8 distributions each, and at least of one sample."""
    unknown = torch.zeros(6, 4).bool()
    unknown[0, 1] = True
    batch = small_batch(unknown=unknown)
    model, whole = build(scl_rows=rows), build(scl_rows=None)
    few = tree_map(lambda x: x[:samples] if isinstance(x, torch.Tensor) else x, batch)
    for _ in range(2):  # the second against the queue
        loss = model.losses(read(model, batch), batch)["scl"]
        torch.testing.assert_close(loss, whole.losses(read(whole, few), few)["scl"])
        queues = (each.contrastive.queue.classes for each in (model, whole))
        assert torch.equal(*queues)


def test_processes_exchange_no_more_rows_than_the_contrastive_loss_takes(build):
    for largest, most in ((None, None), (6, 4), (2, 2)):
        model = build(scl_rows=39, contrastive={"max_batch_size": largest})
        assert model.contrastive.max_batch_size == most


def test_a_loss_of_weight_0_is_not_computed(build):
    batch = small_batch()
    model = build(scl_weight=0.0, ocl_weight=0.0)
    losses = model.losses(read(model, batch), batch)
    assert losses.keys() == {"cls", "dir", "modality", "kl", "places", "total"}
    assert model.contrastive.queue.length == 0
    losses["total"].backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_gaussians_are_pulled_towards_the_prior(build):
    """The mean divergence, a modality that is missing having none; its gradient makes large deviations smaller."""
    batch, totals = without(small_batch(), "b"), []
    for weight in (0.0, 0.5):
        model = build(kl_weight=weight).eval()
        with torch.no_grad():
            model.decoupler.log_var_head.bias.fill_(3.0)
        output = read(model, batch)
        mean, std = output.latent.mean[:, 0], output.latent.std[:, 0]
        divergence = (mean**2 + std**2 - 1 - 2 * std.log()).sum(-1) / 2
        losses = model.losses(output, batch)
        torch.testing.assert_close(losses["kl"], divergence.mean() / 2)  # of two modalities
        totals.append(losses["total"])
    torch.testing.assert_close(totals[1], totals[0] + 0.5 * losses["kl"])
    (slope,) = torch.autograd.grad(losses["kl"], model.decoupler.log_var_head.bias)
    assert (slope[0] > 0).all()
    assert (slope[1] == 0).all()


@pytest.mark.parametrize("targets", ["both", "modality", "pooled"])
def test_modality_answers_for_its_own_errors(build, targets):
    """The ordinality loss compares each modality's standard deviations with its own predictions."""
    model, batch = build(targets=targets), small_batch()
    indices = batch.indices

    def errors(output):
        return (output.modality_logits.sigmoid() - batch.labels.unsqueeze(1)).abs().mean(2)

    output = read(model, batch)
    assert model.ordinality_loss(output, batch) == 0  # no history yet
    history = model.tracker(indices)
    assert model.tracker.counts(indices).tolist() == [[1, 1]] * 5 + [[1, 0]]
    torch.testing.assert_close(history[:5], 1 - errors(output)[:5])
    batch.padding_mask["b"][0] = True  # lost since: its history of `b` stays, and is not compared
    output = read(model, batch)
    std = torch.linalg.vector_norm(output.latent.std, dim=(2, 3))
    within, everything = 0, []
    names = ("std_norm", "distance", "correctness")
    for modality, samples in enumerate((slice(0, 6), slice(1, 5))):
        own = [score[samples, modality] for score in (std, errors(output), history)]
        within = within + model.ordinality(**dict(zip(names, own, strict=True)))
        everything.append(own)
    joined = (torch.cat(scores) for scores in zip(*everything, strict=True))
    across = model.ordinality(**dict(zip(names, joined, strict=True)))
    expected = {"modality": within, "pooled": across, "both": within + across}[targets]
    torch.testing.assert_close(model.ordinality_loss(output, batch), expected)
    assert model.tracker.counts(indices).tolist() == [[2, 1]] + [[2, 2]] * 4 + [[2, 0]]


@pytest.mark.parametrize("targets", ["sample", "modality", "both"])
@pytest.mark.parametrize("gate", ["expected", "oracle"])
def test_unknown_labels_have_no_influence(build, targets, gate):
    """Losses, gradients and state are the same whatever stands there; a sample with none known is left out."""
    unknown = torch.rand(6, 4, generator=torch.Generator().manual_seed(2)) < 0.4
    unknown[1], unknown[2] = True, False
    clean = small_batch(soft_labels=torch.rand(6, 4))
    results = []
    for value in (0.0, torch.nan, -1.0):
        spoilt = {
            name: getattr(clean, name).float().masked_fill(unknown, value)
            for name in ("labels", "soft_labels")
        }
        if not isinstance(value, float) or value == 0:
            spoilt["labels"] = spoilt["labels"].long()
        batch = clean._replace(unknown=unknown, **spoilt)
        model = build(targets=targets, gate=gate, soft_labels=0.5)
        for _ in range(2):
            model.zero_grad()
            losses = model.losses(read(model, batch), batch)
            losses["total"].backward()
        grads = {name: x.grad for name, x in model.named_parameters() if x.grad is not None}
        results.append((losses, grads, model.state_dict()))
        assert model.tracker.counts(batch.indices)[1].sum() == 0
    for name, loss in results[0][0].items():
        assert loss.isfinite(), name
    first, *others = (tree_leaves(result) for result in results)
    for other in others:
        for one, two in zip(first, other, strict=True):
            assert torch.equal(one, two)


def test_losses_are_those_without_what_is_unknown(build):
    """As if the sample with nothing known were not there, and each mean were taken over known entries."""
    unknown = torch.zeros(6, 4).bool()
    unknown[1], unknown[0, 2] = True, True
    batch = small_batch(unknown=unknown)
    rows = [0, 2, 3, 4, 5]
    fewer = tree_map(lambda x: x[rows] if isinstance(x, torch.Tensor) else x, batch)
    results = []
    for each in (batch, fewer):
        model = build(targets="modality")
        for _ in range(2):
            output = read(model, each)
            losses = model.losses(output, each)
        results.append(losses)
        known = ~each.unknown
        entropy = F.binary_cross_entropy_with_logits(
            output.logits[known], each.labels[known].float()
        )
        torch.testing.assert_close(losses["cls"], entropy)
    del results[0]["kl"], results[0]["total"]  # the divergence needs no labels
    for name, loss in results[0].items():
        torch.testing.assert_close(loss, results[1][name], msg=name)


def test_mean_over_known(example):
    x, unknown = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[False, True], [True, True]])
    assert example.mean_over_known(x, unknown).tolist() == [1, 0]
    assert example.mean_over_known(x, None).tolist() == [1.5, 3.5]


def test_foreign_modality_is_told_by_predict_step_alone(build, monkeypatch):
    """Training and export do not pay for it, and before a fit it is the prior."""
    model, batch = build().eval(), small_batch()
    answer = model.predict_step(batch, 0)
    rows = model.typicality.summaries(batch.features, batch.padding_mask)
    assert torch.equal(answer["foreign"], model.conflict(rows, answer["missing"]))
    expected = torch.full((6, 2), 0.25)
    expected[5] = 0  # nothing to compare `a` with
    torch.testing.assert_close(answer["foreign"], expected)
    monkeypatch.setattr(model.conflict, "forward", None)
    read(model, batch)
    read(model.train(), batch)


def test_sequences_are_summarised_once_a_prediction(build, monkeypatch):
    model, batch = build().eval(), small_batch()
    summarised = []
    for name, part in model.typicality.modality.items():
        plain = part.summary
        monkeypatch.setattr(
            part, "summary", lambda *x, name=name, plain=plain: summarised.append(name) or plain(*x)
        )
    model.predict_step(batch, 0)
    assert summarised == ["a", "b"]


def test_example_is_a_page_to_read(example):
    assert len(getsource(example).splitlines()) <= 420


def test_usual_conflict_is_of_samples_with_something_to_compare(example, build, monkeypatch):
    """The zeros of those with fewer than two modalities would make the others look unusual."""
    monkeypatch.setattr(example.MultilabelModule, "calibrate", lambda *_: None)
    model = build()
    model.calibrate({"conflict": torch.tensor([[2.0] * 4, [4.0] * 4, [0.0] * 4])})
    assert model.usual_conflict.tolist() == [3] * 4


@pytest.mark.parametrize(("dtype", "value"), [(torch.float32, 1e300), (torch.float16, 1e6)])
def test_ask_refuses_what_its_dtype_cannot_hold(build, dtype, value):
    model = build().to(dtype)
    name, dim = next(iter(model.hparams["modality_dims"].items()))
    with pytest.raises(ValueError, match=rf"`features\['{name}'\]` to be finite"):
        model.ask({name: torch.full((1, dim), value, dtype=torch.float64)})
