"""The baselines: networks, classical methods, the bootstrap, what a sweep writes."""

import json
from itertools import permutations
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch

from examples_support import ENCODER, QUIET, TINY, need_extras
from uncertainty_mm.data import MultimodalBatch, MultimodalDataset

need_extras()
from uncertainty_mm.examples import sweep  # noqa: E402
from uncertainty_mm.examples.baselines import (  # noqa: E402
    bootstrap,
    classical,
    comparison,
    decoder,
    misa,
    ml_gcn,
    mult,
    raven,
)
from uncertainty_mm.metrics.functional import evaluate  # noqa: E402

pytestmark = QUIET
DIMS, STEPS, LABELS = {"text": 5, "audio": 3, "face": 4}, {"text": 6, "audio": 8, "face": 1}, 4
ENCODE = {"hidden_dim": 16, "num_layers": 1, "num_heads": 2}
NETWORKS = list(comparison.NETWORKS)


def network(name, dims=DIMS, **options):
    return comparison.NETWORKS[name](dims, STEPS, [*"abcd"], encoder=ENCODE, **options)


def inputs(count=7, dims=DIMS, seed=0):
    """Features, padding of random lengths, labels; some samples lack a modality, the last lacks all."""
    generator = torch.Generator().manual_seed(seed)
    features = {m: torch.randn(count, STEPS[m], d, generator=generator) for m, d in dims.items()}
    lengths = {m: torch.randint(STEPS[m] + 1, (count,), generator=generator) for m in dims}
    padding = {m: torch.arange(STEPS[m]) >= lengths[m].unsqueeze(1) for m in dims}
    for mask in padding.values():
        mask[0], mask[-1] = False, True
    labels = torch.rand(count, LABELS, generator=generator).round().long()
    return MultimodalBatch(features, padding, labels, torch.arange(count))


def loss_of(model, batch):
    return model.losses(model(batch.features, batch.padding_mask), batch)


def write_data(path, sizes=(160, 60, 80), seed=0):
    """Labels that a modality each shows, a label that is never there in training, one that always is."""
    rng = np.random.default_rng(seed)
    count = sum(sizes)
    split = np.repeat(np.arange(3), sizes)
    labels = (rng.random((count, 4)) < 0.4).astype(np.uint8)
    labels[:, 2], labels[:, 3] = (split == 2) & (rng.random(count) < 0.1), 1
    arrays = {}
    for index, (name, dim) in enumerate(DIMS.items()):
        x = rng.normal(size=(count, STEPS[name], dim))
        x[..., 0] += 2.0 * labels[:, [index % 2]]
        arrays[f"features.{name}"] = (10 + x).astype(np.float32)
        arrays[f"lengths.{name}"] = rng.integers(0 if index else 1, STEPS[name] + 1, count)
    names = np.array(["a", "b", "never", "always"])
    groups = np.arange(count) // 20
    np.savez(path, labels=labels, label_names=names, split=split, groups=groups, **arrays)


@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_padded_or_missing_does_not_count(name):
    model = network(name).eval()
    features, padding, *_ = inputs()
    expected = model(features, padding).logits
    assert expected.shape == (7, LABELS)
    assert expected.isfinite().all()
    changed = {m: x + 100 * padding[m].unsqueeze(2) for m, x in features.items()}
    torch.testing.assert_close(model(changed, padding).logits, expected)
    for i in range(7):  # alone, and cut to what is there
        longest = {m: max(1, int((~padding[m][i]).sum())) for m in DIMS}
        one = model(
            {m: x[i : i + 1, : longest[m]] for m, x in features.items()},
            {m: x[i : i + 1, : longest[m]] for m, x in padding.items()},
        )
        torch.testing.assert_close(one.logits[0], expected[i], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_modality_and_every_step_counts(name):
    model = network(name).eval()
    features = {m: x.requires_grad_() for m, x in inputs()[0].items()}
    none = {m: torch.zeros(7, STEPS[m], dtype=torch.bool) for m in DIMS}
    model(features, none).logits.square().sum().backward()
    for m, x in features.items():
        moved = x.grad.abs().sum(2)
        assert (moved > 0).all(), m


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("dims", [DIMS, {"text": 5}], ids=["three modalities", "one"])
def test_gradients_are_finite_and_reach_all_parameters(name, dims):
    model = network(name, dims)
    losses = loss_of(model, inputs(dims=dims))
    torch.testing.assert_close(
        losses["total"], sum(loss for key, loss in losses.items() if key != "total")
    )
    losses["total"].backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key


@pytest.mark.parametrize("name", NETWORKS)
def test_batches_without_a_modality_have_finite_gradients(name):
    model = network(name)
    batch = inputs(count=1)  # of one, for which moments are 0
    for missing in (["text"], list(DIMS)):
        masks = {m: mask | (m in missing) for m, mask in batch.padding_mask.items()}
        model.zero_grad()
        loss_of(model, batch._replace(padding_mask=masks))["total"].backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("name", NETWORKS)
def test_half_precision_is_near(name):
    model, batch = network(name).eval(), inputs()
    expected = loss_of(model, batch)["total"]
    with torch.autocast("cpu", torch.bfloat16):
        found = loss_of(model, batch)["total"]
    found.backward()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)


def test_late_fusion_is_the_mean_of_what_each_modality_says():
    model = network("late").eval()
    features, padding, *_ = inputs()
    logits = model(features, padding).logits
    for i in range(6):
        alone = []
        for m in DIMS:
            if not padding[m][i].all():
                others = {k: padding[k] if k == m else torch.ones_like(padding[k]) for k in DIMS}
                alone.append(model(features, others).logits[i])
        if alone:
            torch.testing.assert_close(logits[i], torch.stack(alone).mean(0))


def test_cross_modal_layers_read_the_other_modality():
    """Against the attention of PyTorch on the valid steps of one sample."""
    torch.manual_seed(0)
    layer = mult.CrossModalLayer(8, 2, 0.0).eval()
    x, source = torch.randn(1, 3, 8), torch.randn(1, 5, 8)
    padding = torch.tensor([[False, False, True, True, True]])
    found = layer(x, source, padding)
    valid = layer.source_norm(source[:, :2])
    middle = x + layer.attention(layer.norm(x), valid, valid)[0]
    torch.testing.assert_close(found, middle + layer.feed_forward(middle))
    nothing = layer(x, source, torch.ones_like(padding))
    torch.testing.assert_close(nothing, x + layer.feed_forward(x))


def test_vectors_of_missing_modalities_are_left_out():
    """MISA: the head's weights on a modality's vectors do not matter to samples that lack it."""
    model = network("misa").eval()
    features, padding, *_ = inputs()
    padding["text"] = (torch.arange(7) < 3)[:, None].expand(7, STEPS["text"])
    before = model(features, padding).logits
    torch.nn.init.normal_(model.head[0].weight[:, : ENCODE["hidden_dim"]])
    after = model(features, padding).logits
    torch.testing.assert_close(after[:3], before[:3])
    assert (after[3:] - before[3:]).abs().amax(1).min() > 1e-3


def test_similarity_loss_is_the_central_moment_discrepancy():
    torch.manual_seed(0)
    x, y = torch.rand(20, 3).double(), torch.rand(20, 3).double() ** 2
    there_x, there_y = torch.rand(20, 1) < 0.7, torch.rand(20, 1) < 0.7
    a, b = x[there_x.flatten()].numpy(), y[there_y.flatten()].numpy()
    expected = np.linalg.norm(a.mean(0) - b.mean(0))
    for k in range(2, 6):
        moments = [((c - c.mean(0)) ** k).mean(0) for c in (a, b)]
        expected += np.linalg.norm(moments[0] - moments[1])
    found = misa.similarity_loss([x, y], [there_x, there_y])
    torch.testing.assert_close(found.item(), expected)
    none = torch.zeros(20, 1, dtype=torch.bool)
    assert misa.similarity_loss([x, y], [there_x, none]) == 0


def test_difference_loss_is_the_size_of_the_products():
    """Against MISA's definition on the samples that have both: rows centred, of length 1, |A' B|^2 / D^2."""
    torch.manual_seed(0)
    there = [torch.rand(20, 1) < 0.7 for _ in range(2)]
    private, shared = torch.rand(2, 20, 3).double(), torch.rand(2, 20, 3).double()

    def unit(x, here):
        x = x - x[here.flatten()].mean(0)
        return x / x.norm(dim=1, keepdim=True)

    own = [unit(x, here) for x, here in zip(private, there, strict=True)]
    common = [unit(x, here) for x, here in zip(shared, there, strict=True)]
    expected = 0.0
    for a, b, here in (
        (own[0], common[0], there[0]),
        (own[1], common[1], there[1]),
        (own[0], own[1], there[0] & there[1]),
    ):
        rows = here.flatten()
        expected += (a[rows].T @ b[rows]).square().sum() / 9
    torch.testing.assert_close(misa.difference_loss(private, shared, there), expected)
    apart = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    turned = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [-1.0, 0.0]])
    all_there = [torch.ones(4, 1, dtype=torch.bool)]
    assert misa.difference_loss([apart], [turned], all_there) == 0  # not a line in common
    assert misa.difference_loss([turned], [turned], all_there) == 4.0


@pytest.mark.parametrize("name", ["early", "sgm", "lsan", "ml-gcn"])
def test_a_single_modality_is_read_alone(name):
    model = network(name, modality="audio").eval()
    assert list(model.encoder) == ["audio"]
    features, padding, *_ = inputs()
    expected = model(features, padding).logits
    nothing = {m: x if m == "audio" else x + 100 for m, x in features.items()}
    torch.testing.assert_close(model(nothing, padding).logits, expected, rtol=0, atol=0)
    assert list(model.hparams["modality_dims"]) == list(DIMS)  # of the data
    with pytest.raises(ValueError, match=r"`modality` to be one of .*'face'.* but got 'smell'"):
        network(name, modality="smell")


def test_the_single_modality_is_an_option(tmp_path):
    arm = comparison.ARMS["sgm"]
    file = tmp_path / "toy.npz"
    sweep.check_options(sweep.make_run(file, "sgm", arm, 0, ["--model.modality=text"], tmp_path))


def test_a_graph_has_a_vertex_for_every_subset_and_weighs_its_edges():
    """DFG: efficacies in [0, 1]; a subset of which a modality is missing has none, and no influence."""
    model = network("dfg").eval()
    assert len(model.subsets) == 7
    assert len(model.edges) == 3 * 2 + 6 + 7
    features, padding, *_ = inputs()
    padding["text"] = (torch.arange(7) < 3)[:, None].expand(7, STEPS["text"])
    there = torch.stack([~padding[m].all(1) for m in DIMS], dim=1)
    whole = model.whole(there.split(1, dim=1))
    alpha = model.efficacies([10 * torch.randn(7, 16) for _ in DIMS], whole)
    for (part, target), weight in alpha.items():
        assert ((weight >= 0) & (weight <= 1)).all()
        assert torch.equal(weight[:, 0] > 0, there[:, list(target or part)].all(1))
    before = model(features, padding).logits
    for target, vertex in zip(model.below, model.vertices, strict=True):
        if 0 in target:  # the text
            torch.nn.init.normal_(vertex[-1].weight)
    after = model(features, padding).logits
    torch.testing.assert_close(after[:3], before[:3])
    assert (after[3:6] - before[3:6]).abs().amax(1)[there[3:6, 1:].any(1)].min() > 1e-3


def test_a_graph_of_two_modalities_is_the_equation():
    model = network("dfg", {"text": 5, "audio": 3}).eval()
    a, b = torch.randn(2, 4, 1, 16)
    weights = model.efficacy(torch.cat([a, b], 2)).sigmoid().unbind(2)
    edges = dict(zip(model.edges, weights, strict=True))
    to_pair, out = ((0,), (0, 1)), [((0,), None), ((1,), None), ((0, 1), None)]
    pair = torch.cat([edges[to_pair][..., None] * a, edges[(1,), (0, 1)][..., None] * b], 2)
    vectors = [a, b, model.vertices[0](pair)]
    joined = [edges[edge][..., None] * x for edge, x in zip(out, vectors, strict=True)]
    expected = model.output(torch.cat(joined, 2)).squeeze(1)
    found = model.fuse([a, b], [torch.zeros(4, 1, dtype=torch.bool)] * 2)
    torch.testing.assert_close(found, expected)


def test_words_are_shifted_by_at_most_a_share_of_their_length():
    torch.manual_seed(0)
    words, shift = (
        torch.randn(9, 5, 8),
        torch.randn(9, 5, 8) * torch.logspace(-2, 1, 9)[:, None, None],
    )
    found = raven.bounded(shift, words, 0.5)
    longest, length = 0.5 * words.norm(dim=-1), shift.norm(dim=-1)
    torch.testing.assert_close(found.norm(dim=-1), torch.minimum(length, longest))
    torch.testing.assert_close(found * length[..., None], shift * found.norm(dim=-1)[..., None])
    zero = torch.zeros(2, 8, requires_grad=True)
    raven.bounded(zero, words[0, :2], 0.5).sum().backward()
    assert zero.grad.isfinite().all()


def test_what_is_missing_shifts_no_word():
    """RAVEN, and a sample without words is read by how it shifts the learned one."""
    model = network("raven").eval()
    features, padding, *_ = inputs()
    padding["audio"] = torch.ones_like(padding["audio"])
    before = model(features, padding).logits
    torch.nn.init.normal_(model.shifts[0].project.weight)
    torch.testing.assert_close(model(features, padding).logits, before)
    padding["text"] = torch.ones_like(padding["text"])
    logits = model(features, padding).logits
    seen = ~padding["face"].all(1)
    assert logits[seen].std(0).min() > 1e-4
    torch.testing.assert_close(logits[~seen].std(0), torch.zeros(LABELS))


def chain(seed=0, count=3):
    """A decoder of `count` labels with a state, and its log-probabilities of what follows a prefix, by itself."""
    torch.manual_seed(seed)
    first, move = (
        torch.randn(count + 1, count + 1).double(),
        torch.randn(2, count + 1, count + 1).double(),
    )

    def step(last, state):
        memory = (state[0] @ move[0] + first[last]).tanh()
        return 2 * memory @ move[1], (memory,)

    def after(prefix, start, left_out=()):
        state = (start[None],)
        for last in (count, *prefix):
            scores, state = step(torch.tensor([last]), state)
        scores[0, [*prefix, *left_out]] = -torch.inf
        return scores[0].log_softmax(0)

    return step, after, torch.randn(5, count + 1).double()


def test_a_wide_beam_counts_every_sequence_that_says_a_label():
    """SGM: against all sequences, none of which says a label twice; a narrow beam counts some."""
    step, after, start = chain()
    logits = decoder.label_logits(step, (start,), 3, width=99)
    narrow = decoder.label_logits(step, (start,), 3, width=1)
    assert (narrow <= logits + 1e-9).all()
    for sample, row in zip(start, logits, strict=True):
        found, total = torch.zeros(3).double(), 0.0
        for size in range(4):
            for said in permutations(range(3), size):
                steps = [after(said[:i], sample)[q] for i, q in enumerate((*said, 3))]
                p = torch.stack(steps).sum().exp()
                found[[*said]] += p
                total += p
        torch.testing.assert_close(total, torch.ones(()).double())
        torch.testing.assert_close(row.sigmoid(), found)


def test_sequences_are_taught_in_order_and_without_what_is_unknown():
    step, after, start = chain()
    labels = torch.tensor([[1.0, 0, 1], [0, 0, 0], [1, 1, 1], [torch.nan, 1, 0], [1, 0, 1]])
    unknown = torch.zeros(5, 3, dtype=torch.bool)
    unknown[3, 0], unknown[4] = True, True
    order = torch.tensor([2, 0, 1])
    expected = 0.0
    for sample, said, left_out in (
        (start[0], (2, 0), ()),
        (start[1], (), ()),
        (start[2], (2, 0, 1), ()),
        (start[3], (1,), (0,)),
    ):
        for i, q in enumerate((*said, 3)):
            expected -= after(said[:i], sample, left_out)[q] / 4
    found = decoder.sequence_loss(step, (start,), labels, unknown, order)
    torch.testing.assert_close(found, expected)
    nothing = decoder.sequence_loss(step, (start,), labels, torch.ones_like(unknown), order)
    assert nothing == 0


def test_frequent_labels_come_first(monkeypatch):
    model = network("sgm")
    labels = torch.tensor([[0, 1, 0, 1], [0, 1, 1, 1], [0, 0, 1, 0], [0, 0, 0, 1]])
    unknown = torch.zeros_like(labels, dtype=torch.bool)
    unknown[2:, 1] = True  # so 1 of 1
    fit_on(monkeypatch, model, labels, unknown)
    assert model.order.tolist() == [1, 3, 2, 0]


def fit_on(monkeypatch, model, labels, unknown):
    """Begins a fit on nothing but labels."""
    part = SimpleNamespace(labels=labels, unknown=unknown)
    same = SimpleNamespace(mean=torch.zeros(1), std=torch.ones(1))
    data = SimpleNamespace(part=lambda _: part, statistics=lambda: dict.fromkeys(DIMS, same))
    monkeypatch.setattr(type(model), "trainer", SimpleNamespace(datamodule=data))
    for encoder in model.encoder.values():
        monkeypatch.setattr(encoder, "standardize", lambda *_: None)
    model.on_fit_start()


def permute(model, names, order):
    """Gives the parameters `names` of labels in another order."""
    for name in names:
        parameter = model.get_parameter(name)
        parameter.data = parameter.data[order]


def test_labels_attend_by_two_views_in_any_order():
    """LSAN: weights sum to 1 over the valid steps; permuted labels have permuted logits."""
    model = network("lsan").eval()
    x, mask = torch.randn(3, 5, 16), torch.arange(5) >= torch.tensor([[5], [2], [0]])
    for weights in model.attention(x, mask):
        assert weights.shape == (3, LABELS, 5)
        torch.testing.assert_close(
            weights.sum(2), torch.tensor([[1.0], [1], [0]]).expand(3, LABELS)
        )
        assert not weights.transpose(1, 2)[mask].any()
    torch.nn.init.normal_(model.bias)
    logits = model(*inputs()[:2]).logits
    order = torch.tensor([2, 0, 3, 1])
    permute(model, ["content", "embedding", "bias"], order)
    torch.testing.assert_close(model(*inputs()[:2]).logits, logits[:, order])


def test_a_graph_of_labels_has_the_edges_of_what_comes_along(monkeypatch):
    """ML-GCN: the matrix against its definition; permuted labels have permuted logits."""
    rng = torch.Generator().manual_seed(0)
    labels = (torch.rand(60, LABELS, generator=rng) < torch.tensor([0.7, 0.5, 0.3, 0.0])).long()
    labels[:, 2] &= labels[:, 1]
    unknown = torch.rand(60, LABELS, generator=rng) < 0.2
    found = ml_gcn.reweighted(labels.masked_fill(unknown, 1), unknown)
    for i in range(LABELS):
        shares = [
            labels[(labels[:, i] == 1) & ~unknown[:, i] & ~unknown[:, j], j] for j in range(LABELS)
        ]
        near = [j for j, x in enumerate(shares) if j != i and len(x) and x.float().mean() >= 0.4]
        expected = torch.zeros(LABELS)
        expected[near] = 0.2 / max(1, len(near))
        expected[i] = 0.8 if near else 1
        torch.testing.assert_close(found[i], expected)
    assert 0 < (found > 0).sum() - LABELS < LABELS * (LABELS - 1)
    model = network("ml-gcn").eval()
    fit_on(monkeypatch, model, labels, unknown)
    torch.testing.assert_close(model.graph, found)
    torch.nn.init.normal_(model.bias)
    logits, order = model(*inputs()[:2]).logits, torch.tensor([2, 0, 3, 1])
    permute(model, ["embedding", "bias"], order)
    assert not torch.allclose(model(*inputs()[:2]).logits, logits[:, order])  # the graph is another
    model.graph.copy_(found[order][:, order])
    torch.testing.assert_close(model(*inputs()[:2]).logits, logits[:, order])


def test_pooled_are_mean_and_deviation_of_valid_steps():
    features, padding, labels, _ = inputs()[:4]
    data = MultimodalDataset(features, padding, labels, list("abcd"))
    model = network("mlp")
    for name, each in data.statistics().items():
        model.encoder[name].standardize(each.mean, each.std)
    found, rows = model.pooled(data), []
    for i in range(7):
        parts = []
        for m, d in DIMS.items():
            steps = features[m][~padding[m]]
            mean, std = steps.mean(0), steps.std(0, correction=0).clamp_min(1e-3)
            x = ((features[m][i] - mean) / std)[~padding[m][i]]
            empty = torch.zeros(2 * d)
            parts.append(torch.cat([x.mean(0), x.std(0, correction=0)]) if len(x) else empty)
        rows.append(torch.cat(parts))
    expected = torch.stack(rows)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    model.standardize(data)
    scale = expected.std(0, correction=0).clamp_min(1e-3)
    standard = (expected - expected.mean(0)) / scale
    torch.testing.assert_close(model.pooled(data), standard, rtol=1e-3, atol=1e-3)


def test_classical_methods_are_those_of_scikit_learn():
    from sklearn.linear_model import LogisticRegression
    from sklearn.multiclass import OneVsRestClassifier

    rng = np.random.default_rng(0)
    x, new = rng.normal(size=(150, 4)), rng.normal(size=(9, 4))
    y = (x[:, :3] + rng.normal(size=(150, 3)) > 0.3).astype(int)
    model = LogisticRegression(random_state=3)
    expected = OneVsRestClassifier(model).fit(x, y).predict_proba(new)
    np.testing.assert_allclose(classical.binary_relevance(model, x, y)(new), expected)

    powerset = LogisticRegression().fit(x, y @ [1, 2, 4])
    probs = powerset.predict_proba(new)
    for label in range(3):
        members = (powerset.classes_ >> label) % 2 == 1
        expected = probs[:, members].sum(1)
        found = classical.label_powerset(model, x, y)(new)[:, label]
        np.testing.assert_allclose(found, expected, atol=1e-3)

    order = np.random.RandomState(3).permutation(3)
    given, asked, chained = x, new, np.empty((9, 3))
    for label in order:
        step = LogisticRegression().fit(given, y[:, label])
        chained[:, label] = step.predict_proba(asked)[:, 1]
        given = np.column_stack([given, y[:, label]])
        asked = np.column_stack([asked, step.predict(asked)])
    np.testing.assert_allclose(classical.classifier_chain(model, x, y)(new), chained, atol=1e-6)


def test_classical_methods_leave_unknown_labels_out():
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(0)
    x = rng.normal(size=(90, 4))
    y = (x[:, :3] + rng.normal(size=(90, 3)) > 0).astype(float)
    y[:30, 0] = np.nan
    model, new = LogisticRegression(random_state=0), rng.normal(size=(9, 4))
    relevance = classical.binary_relevance(model, x, y)(new)
    known = classical.binary_relevance(model, x[30:], y[30:])(new)
    np.testing.assert_array_equal(relevance[:, 0], known[:, 0])
    assert (relevance[:, 1] != known[:, 1]).any()  # is known of all
    for method in (classical.label_powerset, classical.classifier_chain):
        np.testing.assert_array_equal(method(model, x, y)(new), method(model, x[30:], y[30:])(new))
    np.testing.assert_allclose(classical.prior(None, x, y)(new)[0], np.nanmean(y, 0))


def test_classical_model_of_the_least_cross_entropy_is_chosen(tmp_path, monkeypatch):
    write_data(tmp_path / "toy.npz")
    losses = mock.Mock(side_effect=[torch.tensor([x, x]) for x in (2.0, 1.0, 4.0, 3.0)])
    monkeypatch.setattr(classical, "losses_of", losses)
    options = ["--data.path", str(tmp_path / "toy.npz")]
    classical.fit("br-logistic", comparison.CONFIGS, options, tmp_path / "run")
    chosen = classical.Fitted.load(tmp_path / "run")
    assert {each.C for each in chosen.method.args[0]} == {0.01}
    groups = losses.call_args.args[3]
    assert len(groups.unique()) == 3  # 60 samples, which count as 3


def test_interval_of_the_brier_score_is_that_of_a_mean():
    rng = np.random.default_rng(0)
    ours, theirs = rng.gamma(1.0, 0.1, (2, 2, 4, 400))  # 2 seeds
    ours[:, 3] = theirs[:, 3] = 1  # label known of each sample
    change = (ours[:, 2] - theirs[:, 2]).mean(0)
    half = 1.959964 * change.std() / np.sqrt(400)
    found = bootstrap.paired_bootstrap(ours, theirs)["Brier"]
    assert found.difference == pytest.approx(change.mean())
    assert found.low == pytest.approx(change.mean() - half, abs=0.06 * half)
    assert found.high == pytest.approx(change.mean() + half, abs=0.06 * half)


def test_interval_of_micro_f1_is_that_of_its_linearisation():
    """Delta method: the ratio 2 h / s changes by (2 h_i - F s_i) / mean(s) with sample i."""
    rng = np.random.default_rng(1)

    def method(quality):
        labels = rng.random((600, 5)) < 0.4
        predicted = np.where(rng.random((600, 5)) < quality, labels, ~labels)
        hits, sizes = (labels & predicted).sum(1), labels.sum(1) + predicted.sum(1)
        return np.stack([hits, sizes, np.zeros(600), np.ones(600)]).astype(float)[None]

    ours, theirs = method(0.8), method(0.7)
    change, f1 = 0.0, []
    for sign, (hits, sizes, *_) in ((1, ours[0]), (-1, theirs[0])):
        f1.append(2 * hits.sum() / sizes.sum())
        change = change + sign * (2 * hits - f1[-1] * sizes) / sizes.mean()
    half = 1.959964 * change.std() / np.sqrt(600)
    found = bootstrap.paired_bootstrap(ours, theirs)["miF1"]
    assert found.difference == pytest.approx(f1[0] - f1[1])
    assert found.low == pytest.approx(f1[0] - f1[1] - half, abs=0.08 * half)
    assert found.high == pytest.approx(f1[0] - f1[1] + half, abs=0.08 * half)


def test_intervals_cover_the_truth_in_95_of_100_test_sets():
    rng = np.random.default_rng(2)
    population = rng.gamma(1.0, 0.1, (2, 1, 4, 100_000))
    population[:, 0, 3] = 1
    population[:, 0, 0] = rng.integers(0, 3, (2, 100_000))  # hits
    population[:, 0, 1] = rng.integers(3, 7, (2, 100_000))  # labels predicted and present
    hits, sizes, errors, _ = population.mean(3)[:, 0].T
    truth = {"miF1": np.diff(2 * hits / sizes)[0], "Brier": np.diff(errors)[0]}
    covered = {"miF1": 0, "Brier": 0}
    for test_set in range(400):
        theirs, ours = population[..., rng.integers(100_000, size=150)]
        found = bootstrap.paired_bootstrap(ours, theirs, draws=500, seed=test_set)
        for name, interval in found.items():
            covered[name] += interval.low <= truth[name] <= interval.high
    # 0.95 is 380; four standard deviations of a binomial count are 17, and the percentiles are a little narrow
    assert all(360 <= count <= 397 for count in covered.values()), covered


def test_equal_methods_do_not_differ():
    terms = np.random.default_rng(0).random((2, 4, 50))
    for interval in bootstrap.paired_bootstrap(terms, terms, draws=100).values():
        assert interval == (0, 0, 0)
        assert not str(interval).endswith("*")
    assert str(bootstrap.Interval(0.02, 0.01, 0.03)) == "+0.0200 [+0.0100, +0.0300] *"
    assert str(bootstrap.Interval(-0.02, -0.03, 0.01)) == "-0.0200 [-0.0300, +0.0100]"


def test_groups_are_drawn_whole():
    rng = np.random.default_rng(0)
    ours, theirs = rng.random((2, 3, 4, 60))
    single = bootstrap.paired_bootstrap(ours, theirs, draws=200)
    names = 5 * np.arange(60)  # each sample its own group
    assert bootstrap.paired_bootstrap(ours, theirs, draws=200, groups=names) == single
    for name, (difference, *bounds) in bootstrap.paired_bootstrap(
        ours, theirs, draws=200, groups=np.full(60, 7)
    ).items():  # the same draw every time
        assert difference == pytest.approx(single[name].difference, abs=1e-12)
        assert bounds == pytest.approx([difference] * 2, abs=1e-12)

    def naive(places):
        """Mean over seeds of the difference of both scores, of the samples at `places`."""
        found = np.zeros(2)
        for sign, terms in ((1, ours), (-1, theirs)):
            for hits, sizes, errors, known in terms[..., places].sum(-1):
                found += sign * np.array([2 * hits / sizes, errors / known]) / len(terms)
        return found

    groups = rng.integers(0, 9, 60)
    found = bootstrap.paired_bootstrap(ours, theirs, draws=200, groups=groups)
    names, draws = np.unique(groups), np.random.default_rng(0)
    drawn = []
    for chosen in draws.integers(len(names), size=(200, len(names))):
        rows = [np.flatnonzero(groups == names[each]) for each in chosen]
        drawn.append(naive(np.concatenate(rows)))
    bounds = np.percentile(drawn, (2.5, 97.5), axis=0).T
    for interval, (low, high), difference in zip(
        found.values(), bounds, naive(np.arange(60)), strict=True
    ):
        assert interval == pytest.approx((difference, low, high), abs=1e-9)


def test_interval_over_groups_is_wider_where_samples_of_a_group_are_alike():
    """40 users of 10 equal samples each tell as much as 40 samples, not as 400."""
    rng = np.random.default_rng(0)
    users = rng.gamma(1.0, 0.1, (2, 1, 4, 40))
    users[:, 0, 3] = 1
    ours, theirs = users.repeat(10, axis=3)
    found = bootstrap.paired_bootstrap(ours, theirs, groups=np.arange(40).repeat(10))
    expected = bootstrap.paired_bootstrap(*users)
    for name, interval in found.items():
        assert interval == pytest.approx(expected[name], abs=1e-9)


@pytest.mark.parametrize(
    ("f1", "brier", "word"),
    [
        ((-0.004, 0.002), (-0.001, 0.001), "level"),
        ((-0.006, 0.002), (-0.001, 0.001), "open"),
        ((-0.004, 0.002), (-0.001, 0.002), "open"),
        ((0.001, 0.002), (-0.001, 0.001), "ahead"),
        ((-0.004, 0.002), (-0.003, -0.001), "ahead"),
        ((0.001, 0.002), (-0.001, 0.002), "open"),
        ((0.001, 0.002), (0.0005, 0.002), "behind"),
        ((-0.009, -0.008), (-0.003, -0.001), "behind"),
        ((0.0, 0.0), (0.0, 0.0), "level"),
    ],
)
def test_verdicts(f1, brier, word):
    found = {
        name: bootstrap.Interval(sum(bounds) / 2, *bounds)
        for name, bounds in (("miF1", f1), ("Brier", brier))
    }
    assert bootstrap.verdict(found) == word


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_contributions_make_up_the_measures(tmp_path, share):
    rng = np.random.default_rng(0)
    probs, labels = rng.random((30, 4)).astype(np.float32), rng.integers(0, 2, (30, 4))
    threshold = np.array([0.3, 0.4, 0.5, 0.6], dtype=np.float32)
    arrays = {"probs": probs, "labels": labels, "threshold": threshold}
    unknown = rng.random((30, 4)) < share
    np.savez(tmp_path / "predictions.npz", **arrays, **({"unknown": unknown} if share else {}))
    terms = bootstrap.contributions(tmp_path)
    tensors = map(torch.from_numpy, (probs, labels, threshold, unknown))
    measures = evaluate(*tensors)
    f1, brier = bootstrap.scores(np.ones((1, 30)), terms[None])[:, 0]
    assert f1 == pytest.approx(measures["miF1"], abs=5e-5)
    assert brier == pytest.approx(measures["Brier"], abs=5e-5)


def compare(folder, monkeypatch, arms, *options):
    """Rows by method, and the report, of a toy problem."""
    monkeypatch.setattr(sweep, "in_a_process", sweep.carry_out)
    write_data(folder / "toy.npz")
    command = ["--data", str(folder / "toy.npz"), "--seeds", "0", "--jobs", "1", "--arms", *arms]
    comparison.main([*command, "--output", str(folder / "out"), "--", *options])
    rows = json.loads((folder / "out" / "runs.json").read_text())
    return {row["arm"]: row for row in rows}, (folder / "out" / "baselines.md").read_text()


def test_what_a_comparison_writes(tmp_path, monkeypatch):
    arms = ["prior", "misa", "lddu"]
    sizes = [option for option in TINY if option.startswith(("--data", "--trainer"))]
    monkeypatch.setitem(comparison.ARMS, "lddu", sweep.Arm(TINY))
    rows, text = compare(tmp_path, monkeypatch, arms, *ENCODER, *sizes)
    assert list(rows) == arms
    for arm, row in rows.items():
        folder = tmp_path / "out" / "toy" / arm / "0"
        with np.load(folder / "predictions.npz") as file:
            names = ("probs", "labels", "threshold")
            found = evaluate(*(torch.from_numpy(file[name]) for name in names))
        assert found == {name: row[name] for name in found}
        assert ("parameters" in row) == (arm not in classical.METHODS)
    state = torch.load(tmp_path / "out" / "toy" / "misa" / "0" / "best.ckpt", weights_only=True)
    assert abs(state["state_dict"]["encoder.text.mean"] - 10).max() < 1  # of the training set
    lines = text.split("\n")
    assert (
        lines[2] == "| arm | seeds | Acc | P | R | miF1 | mAP | Brier | ECE | parameters | time |"
    )
    row = rows["misa"]
    assert f"| misa | 1 | {row['Acc']:.3f} | " in text
    assert f" | {row['ECE']:.3f} | {row['parameters']:,} | {row['seconds']:.0f} s |\n" in text
    _, compared = text.split("lddu minus the other, 95 % interval clustered by group (4 groups), ")
    lines = [line for line in compared.split("\n") if line.startswith("| ")][1:]
    assert [line.split(" | ")[0][2:] for line in lines] == arms[:-1]
    ahead = rows["lddu"]["miF1"] - rows["prior"]["miF1"]
    assert f"| 1 | {ahead:+.4f}"[:-2] in lines[0]


def test_variants_read_one_modality_or_borrow_of_lddu():
    arms = ["late", "sgm", "amp", "prior", "lddu"]
    found = comparison.variants(arms, ["text", "face"], ["pooling", "typicality"])
    late, amp = ["late-with-pooling", "late-with-typicality"], ["amp-with-typicality"]
    assert list(found) == [*late, "sgm-of-text", "sgm-of-face", *amp]
    for name, options in (
        ("sgm-of-face", ("--model.modality", "face")),
        (*amp, ("--model.borrows", "[typicality]")),
    ):
        assert found[name] == comparison.ARMS[name.split("-")[0]]._replace(options=options)


@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_borrowed_of_lddu(name):
    can = comparison.NETWORKS[name].can_borrow
    for part in {"pooling", "typicality"} - set(can):
        with pytest.raises(ValueError, match="Expected `borrows` to hold some of"):
            network(name, borrows=[part])
    features, padding, *_ = inputs()
    torch.manual_seed(0)
    plain = network(name).eval()(features, padding).logits
    if "pooling" in can:
        torch.manual_seed(0)
        model = network(name, borrows=["pooling"]).eval()
        experts = model.experts(model(features, padding))
        torch.testing.assert_close(experts[:, 0], plain)
        assert experts.shape == (7, model.pool.num_experts, LABELS)
        assert (experts[:-1, 0] != experts[:-1, 1]).any()
    if "typicality" in can:
        torch.manual_seed(0)
        model = network(name, borrows=["typicality"]).eval()
        torch.testing.assert_close(model(features, padding).logits, plain)  # nothing is untypical
        model.typicality.forward = lambda x, mask: torch.tensor([1.0, 1e9, 1e9]).expand(7, 3)
        found = model(features, padding).logits
        only = padding | {m: torch.ones_like(padding[m]) for m in ("audio", "face")}
        if name == "late":
            expected = model(features, only).logits
            torch.testing.assert_close(found[:1], expected[:1])
        assert (found[0] != plain[0]).all()


@pytest.mark.long
def test_every_method_learns(tmp_path, monkeypatch):
    """A toy problem where a label is never there in training, one always is, and modalities are missing."""
    options = ["--config=small", "--data.batch_size=16", "--model.lr=0.01", "--model.dropout=0"]
    rows, _ = compare(tmp_path, monkeypatch, comparison.ARMS, *options, "--trainer.max_epochs=6")
    assert list(rows) == list(comparison.ARMS)
    for arm in set(rows) - {"prior"}:
        assert rows[arm]["miF1"] > rows["prior"]["miF1"] + 0.03, arm
        assert rows[arm]["Brier"] < rows["prior"]["Brier"] - 0.02, arm


def test_report_has_the_spread_and_pairs_the_seeds(tmp_path):
    rng = np.random.default_rng(0)
    labels, rows = rng.integers(0, 2, (40, 3)), []
    for arm, seed, noise in (
        ("prior", 0, 0.9),
        ("lddu", 0, 0.1),
        ("lddu", 1, 0.2),
        ("prior", 2, 0.9),
    ):
        folder = tmp_path / "toy" / arm / str(seed)
        folder.mkdir(parents=True)
        probs = (1 - noise) * labels + noise * rng.random((40, 3))
        np.savez(folder / "predictions.npz", probs=probs, labels=labels, threshold=[0.5])
        size = {"parameters": 1234} if arm == "lddu" else {}
        measures = dict.fromkeys(sweep.COLUMNS, 0.5 + 0.1 * seed) | {"seconds": 1200 + 4 * seed}
        rows.append({"data": "toy", "arm": arm, "seed": seed, **measures, **size})
    text = comparison.report(rows, tmp_path)
    assert "| lddu | 2 | 0.550 ±0.071 | " in text
    assert "±0.071 | 1,234 | 1,202 s |\n" in text
    assert "| prior | 2 | 0.600 ±0.141 | " in text
    last = text.strip().split("\n")[-1]
    assert last.startswith("| prior | 1 | +0.")  # seed 0 alone is in both
    assert last.count("*") == 2
    assert last.endswith(" | ahead |")
    assert "clustered" not in text
    for path in (tmp_path / "toy").glob("*/*/predictions.npz"):
        np.savez(path, **np.load(path), groups=np.arange(40) // 10)
    assert "interval clustered by group (4 groups), *" in comparison.report(rows, tmp_path)
    alone = comparison.report([row for row in rows if row["arm"] == "prior"], tmp_path)
    assert "lddu" not in alone
