"""Each network in the manner of a paper has the property that makes it what it is."""

from copy import deepcopy
from itertools import permutations

import pytest
import torch
from torch import nn

from examples_support import QUIET, need_extras

need_extras()
from test_baselines import DIMS, NETWORKS, inputs, loss_of, network  # noqa: E402
from uncertainty_mm.examples.baselines import amp, carat, mms2s, tailor  # noqa: E402
from uncertainty_mm.examples.baselines.base import Sizes  # noqa: E402
from uncertainty_mm.examples.baselines.labels import ModalityAttention  # noqa: E402
from uncertainty_mm.lightning import masked_bce  # noqa: E402

pytestmark = QUIET


def still(name):
    """A network in training that drops nothing."""
    model = network(name)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


@pytest.mark.parametrize("name", NETWORKS)
def test_unknown_labels_have_no_influence(name):
    unknown = torch.rand(7, 4) < 0.4
    unknown[2] = True
    model, batch, found = still(name), inputs()._replace(unknown=unknown), []
    for labels in (batch.labels, batch.labels.logical_xor(unknown).long()):
        torch.manual_seed(1)
        found.append(loss_of(deepcopy(model), batch._replace(labels=labels)))
    for key, loss in found[0].items():
        torch.testing.assert_close(loss, found[1][key])


# --- MMS2S ------------------------------------------------------------------------------------------------------------


def said():
    """The network, a batch, and what the network says after each set, (B, 2^Q, Q + 1)."""
    model, batch = still("mms2s"), inputs()
    masks = [batch.padding_mask[m] for m in DIMS]
    encoders = zip(model.encoder.items(), masks, strict=True)
    encoded = [encoder(batch.features[m], mask) for (m, encoder), mask in encoders]
    return model, batch, model.decode(encoded, masks).exp()


def test_no_label_is_said_twice_and_all_is_over_when_all_are_said():
    model, _, next_ = said()
    members = model.sets.members
    assert (next_[:, :, :-1][:, members] == 0).all()
    assert (next_[:, :, :-1][:, ~members] > 0).all()
    torch.testing.assert_close(next_.sum(2), torch.ones(7, 16))
    assert (next_[:, -1, -1] == 1).all()


def test_probabilities_are_those_of_all_sequences():
    model, batch, next_ = said()
    place = {frozenset(row.nonzero()[:, 0].tolist()): i for i, row in enumerate(model.sets.members)}
    expected = torch.zeros(7, 16)
    for count in range(5):
        for sequence in permutations(range(4), count):
            prob = next_[:, place[frozenset(sequence)], -1]
            for step, label in enumerate(sequence):
                prob = prob * next_[:, place[frozenset(sequence[:step])], label]
            expected[:, place[frozenset(sequence)]] += prob
    output = model(batch.features, batch.padding_mask)
    torch.testing.assert_close(output.hidden.exp(), expected)
    torch.testing.assert_close(expected.sum(1), torch.ones(7))
    labels = (expected.unsqueeze(2) * model.sets.members).sum(1)
    torch.testing.assert_close(output.logits.sigmoid(), labels)

    unknown = torch.zeros(7, 4, dtype=torch.bool)
    unknown[0, 0], unknown[1] = True, True
    agree = ((model.sets.members == batch.labels.bool().unsqueeze(1)) | unknown.unsqueeze(1)).all(2)
    nll = -(expected * agree).sum(1).log()
    found = model.losses(output, batch._replace(unknown=unknown))
    torch.testing.assert_close(found["total"], nll.sum() / (28 - 5))
    assert nll[1].abs() < 1e-6  # nothing is known of it


def test_sets_are_ordered_by_size_and_few():
    sets = mms2s.LabelSets(3)
    assert sets.members.sum(1).tolist() == [0, 1, 1, 1, 2, 2, 2, 3]
    with pytest.raises(ValueError, match="at most 12 labels"):
        mms2s.LabelSets(13)


# --- HHMPN ------------------------------------------------------------------------------------------------------------


def test_messages_know_no_order_of_labels_or_modalities():
    model, (features, padding, *_) = still("hhmpn"), inputs()
    expected = model(features, padding).logits
    turned = deepcopy(model)
    turned.encoder = nn.ModuleDict(reversed(model.encoder.items()))
    turned.feature_to_label = model.feature_to_label[::-1]
    torch.testing.assert_close(turned(features, padding).logits, expected)
    order = torch.tensor([2, 0, 3, 1])
    for each in (turned.labels, turned.head.weight, turned.head.bias):
        each.data = each.data[order]
    torch.testing.assert_close(turned(features, padding).logits, expected[:, order])


def test_labels_reach_each_other():
    model, (features, padding, *_) = still("hhmpn"), inputs()
    before = model(features, padding).logits
    model.labels.data[0] = torch.randn(16)
    assert (model(features, padding).logits != before).all()


def test_modalities_are_weighed_where_they_are_there():
    attention, x = ModalityAttention(8), torch.randn(4, 3, 5, 8)
    missing = torch.tensor([[0, 0, 0], [0, 1, 0], [1, 1, 0], [1, 1, 1]]).bool()
    found = attention(x, missing)
    pair = x[1:2, [0, 2]]
    torch.testing.assert_close(found[1:2], attention(pair, missing[:1, :2]))
    torch.testing.assert_close(found[2], x[2, 2])
    assert (found[3] == 0).all()


# --- TAILOR -----------------------------------------------------------------------------------------------------------


def test_reversed_gradients():
    x = torch.randn(3, requires_grad=True)
    y = tailor.Reversed.apply(x)
    torch.testing.assert_close(y, x)
    (y * torch.arange(3)).sum().backward()
    torch.testing.assert_close(x.grad, -torch.arange(3.0))


def test_an_adversary_tells_modalities_from_private_parts_alone():
    """Two modalities that differ by their means; a new linear classifier is asked too, on new samples."""
    parts, shift = tailor.Refinement(Sizes(2, 4, 8, 2, 0.0)), torch.eye(2, 8)
    none, modality = torch.zeros(64, 2, dtype=torch.bool), torch.arange(2)

    def drawn(count=64):
        x = [torch.randn(count, 1, 8) + mean for mean in shift]
        return parts(x, [torch.zeros(count, 1, dtype=torch.bool)] * 2)[1:]

    @torch.no_grad()
    def told(kind):
        x, new, target = (
            drawn(1000)[kind],
            drawn(1000)[kind],
            torch.tensor([-1.0, 1.0]).repeat(1000),
        )
        line = torch.linalg.lstsq(x.flatten(0, 1), target.unsqueeze(1)).solution
        own = parts.discriminators[kind](new).argmax(2) == modality
        return ((new @ line).flatten().sign() == target).float().mean(), own.float().mean()

    before = told(0)[0]
    groups = {True: [], False: []}
    for name, parameter in parts.named_parameters():
        groups[name.startswith("discriminators")].append(parameter)
    rates = ({"params": groups[True], "lr": 3e-2}, {"params": groups[False], "lr": 3e-3})
    optimizer = torch.optim.Adam(rates)
    for _ in range(200):
        optimizer.zero_grad()
        sum(parts.losses(*drawn(), none).values()).backward()
        optimizer.step()
    new, own = told(0)
    assert own < 0.57
    assert new < before - 0.04  # the two means are further apart at first
    assert min(told(1)) > 0.98


# --- AMP --------------------------------------------------------------------------------------------------------------


def test_parameters_are_perturbed_by_a_radius_and_the_loss_grows():
    model, batch = still("amp"), inputs()
    output = model(batch.features, batch.padding_mask)
    loss = masked_bce(output.logits, batch.labels.float())
    moved = model.perturbed(loss, radius=0.05)
    own = dict(model.named_parameters())
    assert moved.keys() == own.keys()
    norm = torch.stack([(moved[name] - own[name]).norm() for name in own]).norm()
    torch.testing.assert_close(norm.item(), 0.05, rtol=1e-3, atol=0.0)
    found = model.losses(output, batch)
    assert found["perturbed"] > found["cls"]
    assert found["masked"] != found["cls"]
    assert set(model.eval().losses(output, batch)) == {"cls", "total"}


def test_what_is_read_most_is_hidden():
    """Of the first sample, half of the four steps of the second modality; a sample keeps a step."""
    weights = torch.tensor(
        [[0.1, 0.1, 0.3, 0.2, 0.2, 0.1], [0.7, 0.3, 0, 0, 0, 0], [0.0, 1.0, 0, 0, 0, 0], [0.0] * 6]
    )
    padding = torch.tensor(
        [[0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1], [1, 0, 1, 1, 1, 1], [1] * 6]
    ).bool()
    hidden = amp.most_read(weights, padding.split([2, 4], dim=1), share=0.5)
    expected = torch.zeros(4, 6, dtype=torch.bool)
    expected[0, 2:4] = expected[1, 0] = True
    assert torch.equal(torch.cat(hidden, dim=1), expected)


# --- CARAT ------------------------------------------------------------------------------------------------------------


def test_shuffled_vectors_keep_every_modality_and_sample():
    sample, view, label = torch.meshgrid(*map(torch.arange, (50, 3, 4)), indexing="ij")
    x, order = carat.shuffled(torch.stack([sample, view, label], dim=3))
    assert (x[..., 2] == label).all()
    assert (
        x[..., 0] == order.unsqueeze(1)
    ).all()  # all views of a label from one sample, whose target counts
    assert (order.sort(0).values == sample[:, 0]).all()
    assert (x[..., 1].sort(1).values == view).all()
    for each in (x[..., 0], x[..., 1]):
        assert (each != each[:, :, :1]).any(
            2
        ).float().mean() > 0.9  # labels meet that were not together


def test_a_modality_is_rebuilt_from_the_others_that_are_there():
    x, missing = torch.randn(6, 3, 4, 8), torch.rand(6, 3) < 0.4
    missing[0], missing[1] = True, torch.tensor([False, True, True])
    x = x.masked_fill(missing[:, :, None, None], 0)
    found = carat.mean_of_others(x, missing)
    for b in range(6):
        for m in range(3):
            others = [x[b, n] for n in range(3) if n != m and not missing[b, n]]
            expected = torch.stack(others).mean(0) if others else torch.zeros(4, 8)
            torch.testing.assert_close(found[b, m], expected)


def test_what_is_missing_is_replaced_by_what_is_rebuilt():
    model, (features, padding, *_) = still("carat").eval(), inputs()
    whole, rebuilt = model(features, padding).hidden[0]
    less, _ = model(features, padding | {"text": torch.ones_like(padding["text"])}).hidden[0]
    torch.testing.assert_close(less[0, 0], rebuilt[0, 0])  # of text
    assert (whole[0, 0] - rebuilt[0, 0]).abs().max() > 0.01


def test_the_queue_holds_what_is_known_and_there():
    unknown = torch.zeros(7, 4, dtype=torch.bool)
    unknown[:, 1] = True
    model, batch = still("carat"), inputs()._replace(unknown=unknown)
    loss_of(model, batch)
    there = torch.stack([~mask.all(1) for mask in batch.padding_mask.values()], dim=1)
    assert model.queue.length == there.sum() * 3
    classes = model.queue.classes[: model.queue.length]
    assert (classes % 4 != 1).all()
    first = there[0].unsqueeze(1).expand(3, 4) & ~unknown[0]
    expected = torch.arange(12).view(3, 4) + 12 * batch.labels[0]
    assert torch.equal(classes[: first.sum()], expected[first])
