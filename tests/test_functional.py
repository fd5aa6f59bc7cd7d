"""functional: the mathematics, against loops written from the equations."""

import itertools
import math
import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import rankdata
from torch.autograd import gradcheck, gradgradcheck
from torch.profiler import ProfilerActivity, profile

from support import (
    HALF,
    TOLERANCE,
    Bad,
    close,
    gradient,
    poisoned,
    random_latent,
    record_validate_args,
    refused,
)
from uncertainty_mm import _rank, functional
from uncertainty_mm._supcon import supcon

# --------------------------------------------------------------------------- supcon_loss (Eq. 7)


def naive_supcon_rows(
    embeddings, classes, anchors=None, bank=(), bank_classes=(), temperature=0.07
):
    """Eq. 7 anchor by anchor and key by key: {anchor: loss}, anchors without a positive left out."""
    keys = list(embeddings) + [b for b, c in zip(bank, bank_classes, strict=True) if c != -1]
    key_classes = [int(c) for c in classes] + [int(c) for c in bank_classes if c != -1]
    losses = {}
    for i in range(len(classes)):
        if anchors is not None and not anchors[i]:
            continue
        others = [j for j in range(len(keys)) if j != i]
        positives = [j for j in others if key_classes[j] == key_classes[i]]
        if not positives:
            continue
        similarity = {j: torch.dot(embeddings[i], keys[j]) / temperature for j in others}
        log_total = torch.logsumexp(torch.stack(list(similarity.values())), 0)
        losses[i] = sum(log_total - similarity[j] for j in positives) / len(positives)
    return losses


def values(losses, n):
    """The losses as a list of n numbers, 0 where there is none."""
    return [losses[i].detach().item() if i in losses else 0.0 for i in range(n)]


def naive_supcon(*args, **kwargs):
    losses = list(naive_supcon_rows(*args, **kwargs).values())
    return sum(losses) / len(losses)


def supcon_batch(n=12, e=5, num_classes=3, dtype=torch.float64):
    embeddings = torch.randn(n, e, dtype=dtype)
    return embeddings.requires_grad_(), torch.randint(num_classes, (n,))


@pytest.mark.parametrize("temperature", [0.01, 0.07, 1.0])
def test_supcon_equals_the_double_loop(temperature):
    embeddings, classes = supcon_batch()
    loss = functional.supcon_loss(embeddings, classes, temperature=temperature)
    close(loss, naive_supcon(embeddings, classes, temperature=temperature))


def test_supcon_gradient_equals_that_of_the_double_loop():
    embeddings, classes = supcon_batch()
    (expected,) = gradient(naive_supcon(embeddings, classes), embeddings)
    close(*gradient(functional.supcon_loss(embeddings, classes), embeddings), expected)


def test_supcon_reads_the_bank_as_keys():
    embeddings, classes = supcon_batch()
    bank, bank_classes = supcon_batch(7)
    loss = functional.supcon_loss(embeddings, classes, bank=bank, bank_classes=bank_classes)
    expected = naive_supcon(embeddings, classes, bank=bank.detach(), bank_classes=bank_classes)
    close(loss, expected)
    close(*gradient(loss, embeddings), *gradient(expected, embeddings))


def test_supcon_skips_empty_slots_of_the_bank():
    embeddings, classes = supcon_batch()
    bank = torch.randn(6, 5, dtype=torch.float64)
    bank_classes = torch.tensor([0, -1, 2, -1, 1, -1])
    loss = functional.supcon_loss(embeddings, classes, bank=bank, bank_classes=bank_classes)
    close(loss, naive_supcon(embeddings, classes, bank=bank, bank_classes=bank_classes))


def test_supcon_ignores_what_an_empty_slot_holds():
    embeddings, classes = supcon_batch()
    bank = torch.full((2, 5), math.nan, dtype=torch.float64)
    empty = torch.full((2,), -1)
    loss = functional.supcon_loss(embeddings, classes, bank=bank, bank_classes=empty)
    expected = naive_supcon(embeddings, classes)
    close(loss, expected)
    close(*gradient(loss, embeddings), *gradient(expected, embeddings))


@pytest.mark.parametrize("rows", [0, 1, 4])
def test_supcon_with_an_empty_bank_equals_no_bank(rows):
    embeddings, classes = supcon_batch()
    bank = torch.randn(rows, 5, dtype=torch.float64)
    empty = torch.full((rows,), -1)
    loss = functional.supcon_loss(embeddings, classes, bank=bank, bank_classes=empty)
    close(loss, naive_supcon(embeddings, classes))


def test_supcon_finds_positives_in_the_bank_alone():
    embeddings = torch.randn(3, 4, dtype=torch.float64)
    bank = torch.randn(3, 4, dtype=torch.float64)
    classes = torch.arange(3)
    loss = functional.supcon_loss(embeddings, classes, bank=bank, bank_classes=classes)
    close(loss, naive_supcon(embeddings, classes, bank=bank, bank_classes=classes))


def test_supcon_takes_its_anchors_from_anchor_mask_and_all_rows_as_keys():
    embeddings, classes = supcon_batch()
    anchors = torch.tensor([True, False, False, True] * 3)
    rows = naive_supcon_rows(embeddings, classes, anchors)
    loss = functional.supcon_loss(embeddings, classes, anchor_mask=anchors, reduction="none")
    close(loss, values(rows, 12))
    close(
        functional.supcon_loss(embeddings, classes, anchor_mask=anchors),
        naive_supcon(embeddings, classes, anchors),
    )


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_supcon_without_anchors_is_zero_with_zero_gradient(reduction):
    embeddings, classes = supcon_batch()
    none = torch.zeros(12, dtype=torch.bool)
    loss = functional.supcon_loss(embeddings, classes, anchor_mask=none, reduction=reduction)
    loss.sum().backward()
    assert (loss == 0).all()
    assert (embeddings.grad == 0).all()


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_supcon_kernel_takes_rows_beyond_the_anchor_mask_as_keys_alone(reduction):
    embeddings, classes = supcon_batch()
    none = embeddings.new_empty(0, 5).detach(), classes.new_empty(0)
    first = torch.tensor([True, False, True, True, True])
    loss = supcon(embeddings, classes, first, *none, 0.07, reduction)
    rows = naive_supcon_rows(embeddings, classes, [*first.tolist(), *[False] * 7])
    expected = torch.stack([rows.get(i, embeddings.new_zeros(())) for i in range(5)])
    if reduction != "none":
        expected = expected.sum() / (len(rows) if reduction == "mean" else 1)
    close(loss, expected.detach())
    close(*gradient(loss, embeddings), *gradient(expected, embeddings))


def test_supcon_leaves_rows_of_a_negative_class_out():
    embeddings, classes = supcon_batch()
    out = torch.tensor([False, True, False, False] * 3)
    dirty = poisoned(embeddings, out).requires_grad_()
    loss = functional.supcon_loss(dirty, classes.masked_fill(out, -1))
    rest = embeddings.detach()[~out].requires_grad_()
    expected = naive_supcon(rest, classes[~out])
    close(loss, expected)
    (actual,) = gradient(loss, dirty)
    assert (actual[out] == 0).all()
    close(actual[~out], *gradient(expected, rest))


@pytest.mark.long
@pytest.mark.parametrize(("n", "bank_rows"), [(300, 9000), (3000, 0), (1500, 3000)])
def test_supcon_of_many_rows_equals_the_whole_matrix(n, bank_rows):
    # Large enough that no implementation in tiles gets away with one tile.
    embeddings, classes = supcon_batch(n, 4, 20, torch.float32)
    bank, bank_classes = 2 * torch.randn(bank_rows, 4), torch.randint(-1, 20, (bank_rows,))
    anchors = torch.rand(n) < 0.7
    loss = functional.supcon_loss(
        embeddings, classes, anchor_mask=anchors, bank=bank, bank_classes=bank_classes
    )
    exact = embeddings.detach().double().requires_grad_()
    scores = exact @ torch.cat([exact, bank.double()]).T / 0.07
    key_classes = torch.cat([classes, bank_classes])
    no_key = (key_classes == -1).expand_as(scores).clone().fill_diagonal_(True)
    positive = (classes[:, None] == key_classes) & ~no_key
    log_total = scores.masked_fill(no_key, -math.inf).logsumexp(1)
    rows = log_total - (scores * positive).sum(1) / positive.sum(1)
    expected = rows[anchors & positive.any(1)].mean()
    close(loss, expected.detach())
    close(*gradient(loss, embeddings), *gradient(expected, exact))


def test_supcon_gives_the_bank_no_gradient():
    embeddings, classes = supcon_batch()
    bank, bank_classes = supcon_batch(4)
    functional.supcon_loss(embeddings, classes, bank=bank, bank_classes=bank_classes).backward()
    assert bank.grad is None


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_supcon_bank_may_change_between_forward_and_backward(reduction):
    embeddings, classes = supcon_batch()
    bank, bank_classes = torch.randn(4, 5, dtype=torch.float64), torch.tensor([0, 1, 2, -1])
    rows = naive_supcon_rows(embeddings, classes, bank=bank.clone(), bank_classes=bank_classes)
    expected = sum(rows.values()) / (len(rows) if reduction == "mean" else 1)
    loss = functional.supcon_loss(
        embeddings, classes, bank=bank, bank_classes=bank_classes, reduction=reduction
    )
    bank.normal_()
    bank_classes.fill_(0)
    close(*gradient(loss, embeddings), *gradient(expected, embeddings))


def test_supcon_passes_gradcheck():
    embeddings, classes = supcon_batch(6, 3, 2)
    bank, bank_classes = torch.randn(4, 3, dtype=torch.float64), torch.tensor([0, 1, 1, -1])

    def loss(embeddings):
        return functional.supcon_loss(
            embeddings, classes, bank=bank, bank_classes=bank_classes, temperature=0.5
        )

    assert gradcheck(loss, (embeddings,))


def test_supcon_passes_gradcheck_without_reduction():
    embeddings, classes = supcon_batch(6, 3, 2)

    def loss(embeddings):
        return functional.supcon_loss(embeddings, classes, temperature=0.5, reduction="none")

    assert gradcheck(loss, (embeddings,))


def test_supcon_double_backward_raises():
    embeddings, classes = supcon_batch()
    loss = functional.supcon_loss(embeddings, classes)
    with pytest.raises(RuntimeError):  # noqa: PT012
        (first,) = torch.autograd.grad(loss, embeddings, create_graph=True)
        first.square().sum().backward()


def test_supcon_scales_the_gradient_by_the_incoming_one():
    embeddings, classes = supcon_batch()
    (expected,) = gradient(naive_supcon(embeddings, classes) * -2.5, embeddings)
    close(*gradient(functional.supcon_loss(embeddings, classes) * -2.5, embeddings), expected)


def test_supcon_leaves_self_out_of_the_maximum():
    # All similarities but those of a row with itself are 0: the loss is the log of 7 equal keys,
    # although a row's similarity with itself (1 / 0.01 = 100) would dwarf the rest in float32.
    embeddings = torch.eye(8).requires_grad_()
    loss = functional.supcon_loss(embeddings, torch.zeros(8, dtype=torch.long), temperature=0.01)
    close(loss, math.log(7))
    assert gradient(loss, embeddings)[0].isfinite().all()


def test_supcon_of_very_negative_similarities_is_exact():
    # The only key of either row has similarity -100 / 0.07; all the probability is still its own.
    embeddings = torch.tensor([[10.0], [-10.0]], dtype=torch.float64, requires_grad=True)
    loss = functional.supcon_loss(embeddings, torch.zeros(2, dtype=torch.long))
    close(loss, 0.0)
    close(*gradient(loss, embeddings), [[0.0], [0.0]])


def test_supcon_is_exact_for_large_embeddings():
    embeddings = (100 * torch.randn(10, 6, dtype=torch.float64)).float().requires_grad_()
    classes = torch.randint(2, (10,))
    reference = embeddings.detach().double().requires_grad_()
    loss = functional.supcon_loss(embeddings, classes)
    expected = naive_supcon(reference, classes)
    close(loss, expected)
    assert gradient(loss, embeddings)[0].isfinite().all()


@pytest.mark.parametrize("dtype", HALF)
def test_supcon_computes_in_float32_for_half_precision(dtype):
    embeddings = (8 * torch.randn(10, 64)).to(dtype)
    classes = torch.randint(2, (10,))
    loss = functional.supcon_loss(embeddings, classes)
    assert loss.dtype == torch.float32
    close(loss, naive_supcon(embeddings.double(), classes))


@pytest.mark.parametrize("dtype", HALF)
def test_supcon_computes_in_float32_under_autocast(dtype):
    embeddings = 8 * torch.randn(10, 64)
    classes = torch.randint(2, (10,))
    with torch.autocast("cpu", dtype=dtype):
        loss = functional.supcon_loss(embeddings, classes)
    assert loss.dtype == torch.float32
    close(loss, naive_supcon(embeddings.double(), classes))


@pytest.mark.usefixtures("native_bfloat16")
@pytest.mark.parametrize("temperature", [0.01, 0.07, 1.0])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_supcon_with_bfloat16_products_is_near(temperature, reduction, dtype):
    embeddings = F.normalize(torch.randn(40, 16), dim=1).to(dtype).requires_grad_()
    classes, bank_classes = torch.randint(4, (40,)), torch.randint(-1, 4, (3000,))
    bank = F.normalize(torch.randn(3000, 16), dim=1)
    options = {"bank": bank, "bank_classes": bank_classes, "temperature": temperature}
    loss = functional.supcon_loss(
        embeddings, classes, reduction=reduction, bf16_products=True, **options
    )
    reference = embeddings.detach().double().requires_grad_()
    exact = functional.supcon_loss(reference, classes, reduction=reduction, **options)
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    # A score, at most 1 / temperature, is rounded to 8 bits.
    torch.testing.assert_close(loss.double(), exact, rtol=0.005, atol=0.004 / temperature)
    (grad,), (expected,) = gradient(loss.sum(), embeddings), gradient(exact.sum(), reference)
    error = torch.linalg.vector_norm(grad.double() - expected)
    bound = 0.01 + 0.002 / temperature
    assert 0 < error < bound * torch.linalg.vector_norm(expected)


@pytest.mark.usefixtures("native_bfloat16")
def test_supcon_with_bfloat16_products_without_positives_or_keys():
    embeddings = torch.eye(3).requires_grad_()
    loss = functional.supcon_loss(embeddings, torch.arange(3), bf16_products=True)
    assert loss == 0
    assert (gradient(loss, embeddings)[0] == 0).all()


@pytest.mark.usefixtures("native_bfloat16")
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_supcon_with_bfloat16_products_compiles_in_one_graph(reduction):
    embeddings, classes = supcon_batch(dtype=torch.float32)

    def loss(embeddings):
        options = {"reduction": reduction, "bf16_products": True}
        return functional.supcon_loss(embeddings, classes, **options).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected = loss(embeddings)
    close(compiled(embeddings), expected)
    close(*gradient(compiled(embeddings), embeddings), *gradient(expected, embeddings))


@pytest.mark.parametrize("dtype", HALF)
def test_supcon_gradient_has_the_dtype_of_the_embeddings(dtype):
    embeddings, classes = supcon_batch(dtype=dtype)
    functional.supcon_loss(embeddings, classes).backward()
    reference = embeddings.detach().double().requires_grad_()
    assert embeddings.grad.dtype == dtype
    close(embeddings.grad, *gradient(naive_supcon(reference, classes), reference))


def test_supcon_without_reduction_gives_zero_where_there_is_no_positive():
    embeddings = torch.randn(5, 4, dtype=torch.float64)
    classes = torch.tensor([0, 0, 1, 2, 2])
    rows = naive_supcon_rows(embeddings, classes)
    loss = functional.supcon_loss(embeddings, classes, reduction="none")
    close(loss, values(rows, 5))
    assert loss[2] == 0


def test_supcon_sum_is_over_anchors_with_a_positive():
    embeddings = torch.randn(5, 4, dtype=torch.float64)
    classes = torch.tensor([0, 0, 1, 2, 2])
    loss = functional.supcon_loss(embeddings, classes, reduction="sum")
    close(loss, sum(naive_supcon_rows(embeddings, classes).values()))


def test_supcon_mean_is_over_anchors_with_a_positive():
    embeddings = torch.randn(5, 4, dtype=torch.float64)
    classes = torch.tensor([0, 0, 1, 2, 2])
    rows = naive_supcon_rows(embeddings, classes)
    assert len(rows) == 4
    close(functional.supcon_loss(embeddings, classes), sum(rows.values()) / 4)


def tight_pairs(spread):
    """16 pairs of unit rows, each far nearer to each other than to the rest."""
    rows = torch.randn(16, 64).repeat_interleave(2, 0) + spread * torch.randn(32, 64)
    return F.normalize(rows, dim=1), torch.arange(32) // 2


@pytest.mark.parametrize("spread", [0.1, 0.001])
@pytest.mark.parametrize("in_bank", [False, True])
def test_supcon_keeps_its_digits_where_it_is_next_to_nothing(spread, in_bank):
    rows, classes = tight_pairs(spread)
    bank = {}
    if in_bank:
        bank = {"bank": rows[1::2], "bank_classes": classes[1::2]}
        rows, classes = rows[::2], classes[::2]
    rows.requires_grad_()
    exact = rows.detach().double().requires_grad_()
    loss = functional.supcon_loss(rows, classes, **bank)
    keys = (bank["bank"].double(), bank["bank_classes"]) if in_bank else ((), ())
    expected = naive_supcon(exact, classes, None, *keys)
    assert expected < 1e-3
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    (actual,), (wanted,) = gradient(loss, rows), gradient(expected, exact)
    assert (actual - wanted).norm() < 1e-5 * wanted.norm()


@pytest.mark.parametrize("count", [2, 3, 5])
def test_supcon_of_one_row_far_longer_than_its_class(count):
    rows, classes = torch.randn(4 * count, 16), torch.arange(4 * count) % 4
    rows[0] *= 1e5
    rows.requires_grad_()
    exact = rows.detach().double().requires_grad_()
    losses = functional.supcon_loss(rows, classes, temperature=1e7, reduction="none")
    expected = functional.supcon_loss(exact, classes, temperature=1e7, reduction="none")
    torch.testing.assert_close(losses.double(), expected, rtol=1e-6, atol=0)
    for actual, wanted in zip(*gradient(losses, rows), *gradient(expected, exact), strict=True):
        assert (actual - wanted).norm() < 2e-6 * wanted.norm()


@pytest.mark.usefixtures("native_bfloat16")
@pytest.mark.parametrize("bf16_products", [False, True])
@pytest.mark.parametrize("count", [2, 3])
def test_supcon_is_at_least_the_logarithm_of_the_number_of_positives(bf16_products, count):
    rows = torch.randn(20, 48).repeat_interleave(count, 0) + 0.01 * torch.randn(20 * count, 48)
    rows = F.normalize(rows, dim=1).requires_grad_()
    options = {"reduction": "none", "bf16_products": bf16_products}
    losses = functional.supcon_loss(rows, torch.arange(20).repeat_interleave(count), **options)
    assert (losses >= torch.tensor(count - 1.0).log()).all()
    assert (gradient(losses, rows)[0].norm(dim=1) > 0).all()  # also where the value is at its bound


OPERATORS = {
    "forward": lambda x, c, a, b, bc: torch.library.opcheck(
        torch.ops.uncertainty_mm.supcon.default, (x, c, a, b, bc, 0.07, "mean", False, True, True)
    ),
    "forward none": lambda x, c, a, b, bc: torch.library.opcheck(
        torch.ops.uncertainty_mm.supcon.default, (x, c, a, b, bc, 0.07, "none", True, False, True)
    ),
    "backward": lambda x, c, a, b, bc: torch.library.opcheck(
        torch.ops.uncertainty_mm.supcon_backward.default,
        (x.detach(), c, a, b, bc, 0.07, False, True, torch.rand(len(c))),
    ),
    "scale": lambda x, *_: torch.library.opcheck(
        torch.ops.uncertainty_mm.supcon_scale.default,
        (x.detach(), torch.tensor(2.0), torch.float32),
    ),
}


@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, lambda x: x.t().contiguous().t()])
@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not")  # torch 2.14
def test_supcon_operators_pass_the_checks_of_torch(name, layout):
    rows = layout(torch.randn(6, 4)).requires_grad_()
    bank, anchors = torch.randn(3, 4), torch.ones(6, dtype=torch.bool)
    OPERATORS[name](rows, torch.arange(6) % 2, anchors, bank, torch.tensor([0, 1, -1]))


def test_supcon_reads_classes_as_names_only():
    embeddings, classes = supcon_batch()
    renamed = torch.tensor([7, 123456789, 3])[classes]
    close(functional.supcon_loss(embeddings, renamed), naive_supcon(embeddings, classes))


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("n", [0, 1])
def test_supcon_of_too_few_rows_is_zero_with_zero_gradient(n, reduction):
    embeddings, classes = supcon_batch(n)
    loss = functional.supcon_loss(embeddings, classes, reduction=reduction)
    loss.sum().backward()
    close(loss, [0.0] * n if reduction == "none" else 0.0)
    assert embeddings.grad.shape == (n, 5)
    assert (embeddings.grad == 0).all()


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_supcon_without_positives_is_zero_with_zero_gradient(reduction):
    embeddings = torch.randn(4, 5, requires_grad=True)
    loss = functional.supcon_loss(embeddings, torch.arange(4), reduction=reduction)
    loss.sum().backward()
    assert (loss == 0).all()
    assert (embeddings.grad == 0).all()


def matrix_products(work):
    """How many matrix products run while `work` does, inside custom operators too."""
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as recorded:
        work()
    return sum(re.match(r"aten::\w*mm_?$", event.name) is not None for event in recorded.events())


def test_supcon_does_no_gradient_work_under_no_grad():
    embeddings, classes = supcon_batch(32, 16)
    bank, bank_classes = supcon_batch(64, 16)

    def loss():
        return functional.supcon_loss(embeddings, classes, bank=bank, bank_classes=bank_classes)

    with torch.no_grad():
        assert not loss().requires_grad
        without = matrix_products(loss)
    assert 0 < without < matrix_products(lambda: loss().backward())


def test_supcon_leaves_its_inputs_alone():
    embeddings, classes = supcon_batch()
    bank, bank_classes = torch.randn(3, 5, dtype=torch.float64), torch.tensor([0, 1, -1])
    before = [t.detach().clone() for t in (embeddings, classes, bank, bank_classes)]
    functional.supcon_loss(embeddings, classes, bank=bank, bank_classes=bank_classes).backward()
    after = (embeddings, classes, bank, bank_classes)
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


@given(seed=st.integers(0, 2**16), n=st.integers(2, 9), num_classes=st.integers(1, 4))
def test_supcon_is_equivariant_to_the_order_of_rows(seed, n, num_classes):
    torch.manual_seed(seed)
    embeddings, classes = supcon_batch(n, 3, num_classes)
    order = torch.randperm(n)
    loss = functional.supcon_loss(embeddings, classes, reduction="none")
    permuted = functional.supcon_loss(embeddings[order], classes[order], reduction="none")
    close(permuted, loss[order])


@given(seed=st.integers(0, 2**16), n=st.integers(0, 9), bank_rows=st.integers(0, 6))
def test_supcon_equals_the_double_loop_for_ragged_classes(seed, n, bank_rows):
    torch.manual_seed(seed)
    embeddings, classes = supcon_batch(n, 3, 4)
    bank, bank_classes = torch.randn(bank_rows, 3).double(), torch.randint(-1, 4, (bank_rows,))
    rows = naive_supcon_rows(embeddings, classes, bank=bank, bank_classes=bank_classes)
    loss = functional.supcon_loss(
        embeddings, classes, bank=bank, bank_classes=bank_classes, reduction="none"
    )
    close(loss, values(rows, n))


@pytest.mark.parametrize(
    ("change", "error", "name"),
    [
        ({"embeddings": torch.randn(4)}, ValueError, "embeddings"),
        ({"embeddings": torch.ones(4, 3, dtype=torch.long)}, TypeError, "embeddings"),
        ({"embeddings": torch.full((4, 3), math.nan)}, ValueError, "embeddings"),
        ({"embeddings": torch.full((4, 3), math.inf)}, ValueError, "embeddings"),
        ({"classes": torch.zeros(5, dtype=torch.long)}, ValueError, "classes"),
        ({"classes": torch.zeros(4)}, TypeError, "classes"),
        ({"anchor_mask": torch.zeros(4)}, TypeError, "anchor_mask"),
        ({"anchor_mask": torch.zeros(3, dtype=torch.bool)}, ValueError, "anchor_mask"),
        ({"embeddings": poisoned(torch.eye(4, 3), 0)}, ValueError, "embeddings"),
        ({"bank": torch.randn(2, 3)}, ValueError, "bank` without `bank_classes"),
        (
            {"bank_classes": torch.zeros(2, dtype=torch.long)},
            ValueError,
            "bank_classes` without `bank",
        ),
        (
            {"bank": torch.full((2, 3), math.nan), "bank_classes": torch.tensor([-1, 0])},
            ValueError,
            "bank",
        ),
        (
            {"bank": torch.randn(2, 4), "bank_classes": torch.zeros(2, dtype=torch.long)},
            ValueError,
            "bank",
        ),
        (
            {"bank": torch.randn(2, 3), "bank_classes": torch.zeros(3, dtype=torch.long)},
            ValueError,
            "bank_classes",
        ),
        ({"bank": torch.randn(2, 3), "bank_classes": torch.zeros(2)}, TypeError, "bank_classes"),
        ({"temperature": 0.0}, ValueError, "temperature"),
        ({"temperature": -1.0}, ValueError, "temperature"),
        ({"temperature": math.nan}, ValueError, "temperature"),
        ({"reduction": "average"}, ValueError, "reduction"),
    ],
)
def test_supcon_rejects(change, error, name):
    arguments = {"embeddings": torch.randn(4, 3), "classes": torch.tensor([0, 0, 1, 1])} | change
    with pytest.raises(error, match=f"`{name}`"):
        functional.supcon_loss(**arguments)


# ------------------------------------------------------------------ distribution_embedding (Eq. 4)


def naive_embedding(mean, std):
    halves = []
    for half in (mean.tolist(), std.tolist()):
        norm = math.sqrt(sum(x * x for x in half))
        halves += [x / norm for x in half]
    return halves


def test_distribution_embedding_is_equation_4():
    mean, std = torch.randn(4, 3, dtype=torch.float64), torch.rand(4, 3, dtype=torch.float64)
    expected = [naive_embedding(m, s) for m, s in zip(mean, std, strict=True)]
    close(functional.distribution_embedding(mean, std), expected)


def test_distribution_embedding_keeps_leading_axes():
    mean, std = torch.randn(2, 3, 4, 5), torch.rand(2, 3, 4, 5)
    assert functional.distribution_embedding(mean, std).shape == (2, 3, 4, 10)


def test_distribution_embedding_passes_gradcheck():
    mean = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    std = torch.rand(3, 4, dtype=torch.float64, requires_grad=True)
    assert gradcheck(functional.distribution_embedding, (mean, std))


def test_distribution_embedding_of_zero_is_finite():
    mean = torch.zeros(2, 3, requires_grad=True)
    std = torch.ones(2, 3, requires_grad=True)
    embedding = functional.distribution_embedding(mean, std)
    close(embedding[:, :3], torch.zeros(2, 3))
    assert all(g.isfinite().all() for g in gradient(embedding, mean, std))


@pytest.mark.parametrize("dtype", HALF)
def test_distribution_embedding_does_not_overflow_in_half_precision(dtype):
    mean = torch.full((1, 64), 300.0, dtype=dtype)  # the sum of squares is 5.8e6
    embedding = functional.distribution_embedding(mean, mean)
    close(embedding, torch.full((1, 128), 0.125), dtype)


@pytest.mark.parametrize("dtype", HALF)
def test_distribution_embedding_in_half_precision_is_the_exact_one_rounded_once(dtype):
    mean, std = torch.randn(50, 7).to(dtype), torch.rand(50, 7).to(dtype)
    exact = functional.distribution_embedding(mean.double(), std.double())
    embedding = functional.distribution_embedding(mean, std)
    assert embedding.dtype == dtype
    assert torch.equal(embedding, exact.to(dtype))


def test_distribution_embedding_of_one_dimension_is_the_sign():
    mean, std = torch.tensor([[-3.0], [0.0]]), torch.tensor([[0.5], [0.0]])
    close(functional.distribution_embedding(mean, std), [[-1.0, 1.0], [0.0, 0.0]])


def test_distribution_embedding_of_no_dimension_is_empty():
    assert functional.distribution_embedding(torch.empty(2, 0), torch.empty(2, 0)).shape == (2, 0)


@pytest.mark.parametrize(
    ("change", "error", "name"),
    [
        ({"mean": torch.ones(2, 3, dtype=torch.long)}, TypeError, "mean"),
        ({"mean": torch.tensor(1.0)}, ValueError, "mean"),
        ({"mean": torch.full((2, 3), math.nan)}, ValueError, "mean"),
        ({"std": torch.rand(2, 4)}, ValueError, "std"),
        ({"std": torch.full((2, 3), math.nan)}, ValueError, "std"),
        ({"std": torch.full((2, 3), math.inf)}, ValueError, "std"),
        ({"std": torch.full((2, 3), -0.5)}, ValueError, "std"),
    ],
)
def test_distribution_embedding_rejects(change, error, name):
    with pytest.raises(error, match=f"`{name}`"):
        functional.distribution_embedding(
            **({"mean": torch.randn(2, 3), "std": torch.rand(2, 3)} | change)
        )


# ------------------------------------------------------------------------------- distances (Eq. 8)


def test_prediction_distance_is_the_absolute_error():
    probs = torch.tensor([[0.25, 1.0], [0.0, 0.5]], dtype=torch.float64)
    labels = torch.tensor([[1, 1], [1, 0]])
    close(functional.prediction_distance(probs, labels), [[0.75, 0.0], [1.0, 0.5]])


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float32])
def test_prediction_distance_takes_labels_of_any_dtype(dtype):
    probs, labels = torch.rand(3, 2, dtype=torch.float64), torch.tensor([[0, 1]] * 3)
    expected = [[p, 1 - q] for p, q in probs.tolist()]
    close(functional.prediction_distance(probs, labels.to(dtype)), expected)


def test_prediction_distance_passes_gradcheck():
    probs = (0.1 + 0.8 * torch.rand(3, 2, dtype=torch.float64)).requires_grad_()
    labels = torch.tensor([[0, 1], [1, 1], [0, 0]])
    assert gradcheck(lambda p: functional.prediction_distance(p, labels), (probs,))


@pytest.mark.parametrize("wrong", [-1.0, math.nan, 7.0])
def test_unknown_labels_have_no_distance_and_no_influence(wrong):
    probs = torch.rand(4, 5, dtype=torch.float64, requires_grad=True)
    labels, unknown = torch.randint(2, (4, 5)).double(), torch.rand(4, 5) < 0.4
    unknown[0] = True
    expected = functional.prediction_distance(probs, labels).masked_fill(unknown, 0)
    spoilt = labels.masked_fill(unknown, wrong)
    distance = functional.prediction_distance(probs, spoilt, unknown, validate_args=True)
    assert torch.equal(distance, expected)
    assert torch.equal(*gradient(distance, probs), *gradient(expected, probs))
    nowhere = poisoned(
        probs, unknown
    ).requires_grad_()  # an entry that does not count is not looked at
    again = functional.prediction_distance(nowhere, spoilt, unknown)
    assert torch.equal(again, expected)
    assert not gradient(again, nowhere)[0][unknown].any()


def test_labels_are_1_above_a_half_where_values_are_not_looked_at():
    probs = torch.full((1, 5), 0.25)
    labels = torch.tensor([[0.9, 0.1, 0.5, math.nan, -1.0]])
    distance = functional.prediction_distance(probs, labels, validate_args=False)
    assert distance.tolist() == [[0.75, 0.25, 0.25, 0.25, 0.25]]


PROBS, ABSENT = torch.full((2, 3), 0.5), torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("probs", "labels", "unknown", "error", "message"),
    [
        (PROBS.long(), ABSENT, None, TypeError, "`probs` to have a floating .* got torch.int64"),
        (3 * PROBS, ABSENT, None, ValueError, r"`probs` to be in \[0, 1\], but got 1.5"),
        (-PROBS, ABSENT, None, ValueError, r"`probs` to be in \[0, 1\], but got -0.5"),
        (PROBS * math.nan, ABSENT, None, ValueError, r"`probs` to be in \[0, 1\], but got nan"),
        (PROBS, ABSENT + 2, None, ValueError, "`labels` to hold only 0 and 1, but got 2.0"),
        (PROBS, ABSENT + 0.5, None, ValueError, "`labels` to hold only 0 and 1, but got 0.5"),
        (PROBS, ABSENT.long() - 1, None, ValueError, "`labels` to hold .* got -1; .*`unknown`.*"),
        (PROBS, ABSENT[0], None, ValueError, r"`labels` to have shape .*, but got \(3,\)"),
        (PROBS, ABSENT[:, :2], None, ValueError, r"`labels` to have shape .*, but got \(2, 2\)"),
        (PROBS, ABSENT, ABSENT, TypeError, "`unknown` to have a bool .* got torch.float32"),
        (PROBS, ABSENT, ABSENT[0] > 0, ValueError, r"`unknown` to have shape .*got \(3,\)"),
    ],
)
def test_prediction_distance_rejects(probs, labels, unknown, error, message):
    with pytest.raises(error, match=f"^Expected {message}$"):
        functional.prediction_distance(probs, labels, unknown)


def test_expected_distance_is_the_mean_distance_over_the_predicted_labels():
    probs = torch.rand(4, 3, dtype=torch.float64)
    expected = [[p * (1 - p) + (1 - p) * p for p in row] for row in probs.tolist()]
    close(functional.expected_distance(probs), expected)


def test_expected_distance_passes_gradcheck():
    probs = (0.1 + 0.8 * torch.rand(3, 2, dtype=torch.float64)).requires_grad_()
    assert gradcheck(functional.expected_distance, (probs,))


@pytest.mark.parametrize(
    ("probs", "error", "message"),
    [
        (-PROBS, ValueError, r"to be in \[0, 1\], but got -0.5"),
        (3 * PROBS, ValueError, r"to be in \[0, 1\], but got 1.5"),
        (PROBS * math.nan, ValueError, r"to be in \[0, 1\], but got nan"),
        (PROBS.int(), TypeError, "to have a floating dtype .*, but got torch.int32"),
        (PROBS.to_sparse(), TypeError, "to be a dense tensor, but got torch.sparse_coo"),
    ],
)
def test_expected_distance_rejects_what_is_no_probability(probs, error, message):
    with pytest.raises(error, match=f"^Expected `probs` {message}$"):
        functional.expected_distance(probs)


# ---------------------------------------------------------------------------------- reduced_chi2


def naive_chi2(mean, std, missing):
    """One (sample, label, dimension) at a time."""
    batch, modalities, labels, dims = mean.shape
    rows = torch.zeros(batch, labels, dtype=torch.float64)
    for b, q in itertools.product(range(batch), range(labels)):
        there = [m for m in range(modalities) if not missing[b, m]]
        for k in range(dims if len(there) > 1 else 0):
            pairs = [(mean[b, m, q, k].item(), std[b, m, q, k].item()) for m in there]
            centre = sum(x / s**2 for x, s in pairs) / sum(1 / s**2 for _, s in pairs)
            chi2 = sum((x - centre) ** 2 / s**2 for x, s in pairs)
            rows[b, q] += chi2 / (len(there) - 1) / dims
    return rows


def of_one(means, stds, dtype=torch.float64):
    """Gaussians of one sample, label and dimension, a modality each."""
    return [torch.tensor(x, dtype=dtype).view(1, -1, 1, 1).requires_grad_() for x in (means, stds)]


@given(seed=st.integers(0, 2**16))
def test_reduced_chi2_is_that_of_the_loops(seed):
    torch.manual_seed(seed)
    mean, std = random_latent(3, 4, 2, 5)
    missing = torch.rand(3, 4) < 0.4
    close(functional.reduced_chi2(mean, std, missing), naive_chi2(mean, std, missing))
    spoilt = [poisoned(x, missing) for x in (mean, std)]
    close(functional.reduced_chi2(*spoilt, missing), naive_chi2(mean, std, missing))
    unsure = std.masked_fill(missing[:, :, None, None], math.inf)
    close(functional.reduced_chi2(mean, unsure), naive_chi2(mean, std, missing))
    close(functional.reduced_chi2(mean + 1e6, std, missing), naive_chi2(mean, std, missing))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_reduced_chi2_of_known_values(dtype):
    for means, stds, expected in [
        ((3.0, -3.0), (1.0, 1.0), 18.0),
        ((0.1, 0.1, 0.1), (1e-4, 1.0, 0.3), 0.0),
        ((0.1, 0.1, 0.1), (0.0, 0.0, 0.3), 0.0),
        ((5.0, 1.0), (0.0, 2.0), 4.0),  # the sure one is right
        ((5.0, 1.0), (math.inf, 2.0), 0.0),
        ((5.0,), (1.0,), 0.0),
    ]:
        mean, std = of_one(means, stds, dtype)
        chi2 = functional.reduced_chi2(mean, std)
        assert chi2.dtype == (dtype if dtype == torch.float64 else torch.float32)
        close(chi2, [[expected]], dtype)
        assert expected > 0 or chi2.item() == 0  # exactly
        assert all(grad.isfinite().all() for grad in gradient(chi2, mean, std))


def test_reduced_chi2_of_consistent_measurements_is_1_on_average():
    std = 0.1 + torch.rand(2000, 4, 1, 8, dtype=torch.float64)
    mean, missing = 3 + std * torch.randn_like(std), torch.rand(2000, 4) < 0.3
    chi2 = functional.reduced_chi2(mean, std, missing)[(~missing).sum(1) > 1]
    assert chi2.mean().item() == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_reduced_chi2_is_finite_with_its_gradient_at_the_extremes(dtype):
    huge = torch.finfo(dtype).max / 4
    for means, stds in [
        ((1.0, -1.0), (0.0, 0.0)),
        ((1.0, -1.0), (1e-7, 1e-7)),
        ((huge, -huge), (1.0, 1.0)),
        ((1.0, -1.0), (huge, huge)),
    ]:
        leaves = of_one(means, stds, dtype)
        chi2 = functional.reduced_chi2(*leaves)
        assert chi2.isfinite().all()
        grads = gradient(chi2, *leaves)
        assert dtype == torch.float16 or all(grad.isfinite().all() for grad in grads)
    leaves = of_one((math.nan, math.nan), (math.nan, math.nan), dtype)
    chi2 = functional.reduced_chi2(*leaves, torch.tensor([[True, True]]))
    assert chi2.item() == 0
    assert not any(grad.any() for grad in gradient(chi2, *leaves))


def test_reduced_chi2_passes_gradcheck():
    latent = random_latent(3, 4, 2, 2, requires_grad=True)
    missing = torch.tensor([[False] * 4, [True, False, True, False], [True, True, True, False]])
    assert gradcheck(lambda *x: functional.reduced_chi2(*x, missing), tuple(latent))


FOUR = torch.ones(2, 3, 4, 5)


@pytest.mark.parametrize(
    ("mean", "std", "missing", "error", "message"),
    [
        (FOUR[0], FOUR, None, ValueError, r"`mean` to have shape \(B, M, Q, K\), but got .*"),
        (FOUR, FOUR[:1], None, ValueError, "`std` to have shape .*"),
        (FOUR, -FOUR, None, ValueError, r"`std` to be in \[0, inf\], but got -1.0"),
        (FOUR, FOUR * math.nan, None, ValueError, r"`std` to be in \[0, inf\], but got nan"),
        (FOUR * math.inf, FOUR, None, ValueError, "`mean` to be finite, but got 120 NaN .*"),
        (FOUR, FOUR, torch.zeros(2, 3), TypeError, "`missing` to have a bool dtype, .*"),
        (FOUR, FOUR, torch.zeros(2, 2).bool(), ValueError, "`missing` to have shape .*"),
    ],
)
def test_reduced_chi2_rejects(mean, std, missing, error, message):
    with pytest.raises(error, match=f"^Expected {message}$"):
        functional.reduced_chi2(mean, std, missing)


@pytest.mark.parametrize("name", ["prediction_distance", "expected_distance", "reduced_chi2"])
def test_validate_args_is_passed_on(monkeypatch, name):
    passed = record_validate_args(monkeypatch)
    for validate_args in (None, False, True):
        getattr(functional, name)(**ARGUMENTS[name], validate_args=validate_args)
    assert passed == [None, False, True]
    with pytest.raises(TypeError, match="`validate_args` to be True, False or None, but got 1"):
        getattr(functional, name)(**ARGUMENTS[name], validate_args=1)


# ---------------------------------------------------------------------------------------- soft_rank


def naive_soft_rank(scores, temperature=1.0):
    def laplace(x):
        return 1 - math.exp(-x / 2) / 2 if x > 0 else math.exp(x / 2) / 2

    scores = scores.tolist()
    return [
        1 + sum(laplace((a - b) / temperature) for j, b in enumerate(scores) if j != i)
        for i, a in enumerate(scores)
    ]


score_lists = st.lists(st.integers(-50, 50), min_size=1, max_size=12)


@pytest.mark.parametrize("temperature", [0.1, 1.0, 10.0])
def test_soft_rank_equals_the_double_loop(temperature):
    scores = torch.randn(9, dtype=torch.float64)
    close(functional.soft_rank(scores, temperature), naive_soft_rank(scores, temperature))


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3, 8, 21, 64])
def test_soft_rank_of_a_large_batch_equals_that_of_a_small_one(monkeypatch, count, ties):
    """Steps of doubled reach equal the matrix of pairs, with ties and masks, and in both derivatives."""
    scores = torch.randn(count, dtype=torch.float64)
    scores = (scores.mul(4).round().div(4) if ties else scores).requires_grad_()
    weights = torch.randn(count, dtype=torch.float64)
    found = []
    for limit in (0, count):
        monkeypatch.setattr(_rank, "_SMALL", limit)
        ranks = functional.soft_rank(scores, 0.4, mask=torch.arange(count) % 7 == 3)
        (slope,) = torch.autograd.grad((weights * ranks).sum(), scores, create_graph=True)
        (curve,) = torch.autograd.grad((weights * slope).sum(), scores)
        found.append((ranks, slope) if ties else (ranks, slope, curve))  # no curvature at a kink
    for steps, pairs in zip(*found, strict=True):
        close(steps, pairs.detach())


@given(scores=score_lists)
def test_soft_rank_tends_to_average_ranks(scores):
    ranks = functional.soft_rank(torch.tensor(scores, dtype=torch.float64), temperature=0.01)
    close(ranks, rankdata(scores, method="average"))


@given(scores=score_lists, temperature=st.floats(0.1, 100))
def test_soft_ranks_sum_to_that_of_ranks(scores, temperature):
    b = len(scores)
    ranks = functional.soft_rank(torch.tensor(scores, dtype=torch.float64), temperature)
    close(ranks.sum(), b * (b + 1) / 2)


@given(scores=score_lists, temperature=st.floats(0.01, 100))
def test_soft_ranks_lie_between_1_and_b(scores, temperature):
    ranks = functional.soft_rank(torch.tensor(scores, dtype=torch.float64), temperature)
    assert ranks.min() >= 1
    assert ranks.max() <= len(scores)


@given(scores=score_lists, shift=st.integers(-1000, 1000))
def test_soft_ranks_do_not_change_with_a_shift(scores, shift):
    scores = torch.tensor(scores, dtype=torch.float64)
    close(functional.soft_rank(scores + shift), naive_soft_rank(scores))


@given(scores=score_lists)
def test_soft_ranks_of_negated_scores_are_reversed(scores):
    scores = torch.tensor(scores, dtype=torch.float64)
    reverse = [len(scores) + 1 - r for r in naive_soft_rank(scores)]
    close(functional.soft_rank(-scores), reverse)


@given(scores=score_lists, seed=st.integers(0, 2**16))
def test_soft_rank_is_permutation_equivariant(scores, seed):
    torch.manual_seed(seed)
    scores = torch.tensor(scores, dtype=torch.float64)
    order = torch.randperm(len(scores))
    close(functional.soft_rank(scores[order]), functional.soft_rank(scores)[order])


def test_soft_rank_passes_gradcheck():
    scores = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert gradcheck(functional.soft_rank, (scores,))
    assert gradgradcheck(functional.soft_rank, (scores,))


def test_soft_rank_gradient_of_ties_is_that_of_the_double_loop():
    scores = torch.tensor([0.5, 0.25, 0.5, 0.5, -1.0], dtype=torch.float64, requires_grad=True)
    weights = torch.randn(5, dtype=torch.float64)
    (actual,) = gradient(weights * functional.soft_rank(scores, 0.3), scores)
    gaps = scores.detach().unsqueeze(1) - scores.detach()
    density = (-gaps.abs() / 0.6).exp() / 1.2
    close(actual, (density * (weights.unsqueeze(1) - weights)).sum(1))


@pytest.mark.parametrize("spread", [1.0, 1e3, 1e6])
def test_soft_rank_in_float32_keeps_its_digits_far_from_zero(spread):
    scores = torch.cat([spread * torch.randn(50), spread + torch.randn(50)])
    gaps = scores.double().unsqueeze(1) - scores.double()
    beats = (-gaps.abs() / 2).exp() / 2
    expected = 0.5 + torch.where(gaps < 0, beats, 1 - beats).sum(1)
    close(functional.soft_rank(scores), expected)


def test_soft_rank_remembers_no_more_than_the_batch():
    """And not the matrix of pairs, nor a number for every step of the sums."""
    kept = []
    scores = torch.randn(1000, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()), lambda x: x):
        functional.soft_rank(scores, mask=torch.arange(1000) % 3 == 0)
    assert sum(kept) <= 6 * 1000


def test_soft_rank_of_nothing_is_empty():
    assert functional.soft_rank(torch.empty(0)).shape == (0,)


def test_soft_rank_with_a_mask_equals_that_of_the_rest():
    scores = torch.randn(6, dtype=torch.float64)
    mask = torch.tensor([False, True, False, False, True, False])
    ranks = functional.soft_rank(poisoned(scores, mask), mask=mask)
    close(ranks[~mask], naive_soft_rank(scores[~mask]))
    assert (ranks[mask] == 1).all()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_soft_rank_gradient_ignores_masked_scores(value):
    mask = torch.tensor([False, True, False])
    scores = poisoned(torch.randn(3, dtype=torch.float64), mask, value).requires_grad_()
    weights = torch.tensor([1.0, 0.0, 3.0], dtype=torch.float64)
    (actual,) = gradient(weights * functional.soft_rank(scores, mask=mask), scores)
    rest = scores.detach()[~mask]
    slope = (-(rest[0] - rest[1]).abs() / 2).exp() / 4
    close(actual, [float(-2 * slope), 0.0, float(2 * slope)])


@pytest.mark.parametrize("dtype", HALF)
def test_soft_rank_of_large_half_precision_scores_is_finite(dtype):
    scores = torch.tensor([-6e4, 0.0, 6e4], dtype=dtype, requires_grad=True)
    ranks = functional.soft_rank(scores, 0.01)
    assert ranks.dtype == torch.float32
    close(ranks, [1.0, 2.0, 3.0], dtype)
    assert gradient(ranks, scores)[0].isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "error", "name"),
    [
        ({"scores": torch.randn(2, 3)}, ValueError, "scores"),
        ({"scores": torch.tensor([0.0, math.nan])}, ValueError, "scores"),
        ({"scores": torch.randn(3), "temperature": 0.0}, ValueError, "temperature"),
        ({"scores": torch.randn(3), "mask": torch.zeros(3)}, TypeError, "mask"),
        ({"scores": torch.randn(3), "mask": torch.zeros(2, dtype=torch.bool)}, ValueError, "mask"),
    ],
)
def test_soft_rank_rejects(arguments, error, name):
    with pytest.raises(error, match=f"`{name}"):
        functional.soft_rank(**arguments)


# -------------------------------------------------------------------- ordinality_divergence (Eq. 15)


def naive_divergence(a, b):
    def softmax(x):
        top = max(x)
        powers = [math.exp(v - top) for v in x]
        return [p / sum(powers) for p in powers]

    p, q = softmax(a.tolist()), softmax(b.tolist())
    forward = sum(x * math.log(x / y) for x, y in zip(p, q, strict=True))
    backward = sum(y * math.log(y / x) for x, y in zip(p, q, strict=True))
    return forward + backward


def test_ordinality_divergence_is_the_kl_both_ways():
    a, b = torch.randn(2, 7, dtype=torch.float64)
    close(functional.ordinality_divergence(a, b), naive_divergence(a, b))


def test_ordinality_divergence_is_symmetric():
    a, b = torch.randn(2, 7, dtype=torch.float64)
    close(functional.ordinality_divergence(b, a), naive_divergence(a, b))


def test_ordinality_divergence_of_equal_scores_is_zero():
    a = torch.randn(7, dtype=torch.float64)
    close(functional.ordinality_divergence(a, a + 3), 0.0)


@given(seed=st.integers(0, 2**16), n=st.integers(1, 9))
def test_ordinality_divergence_is_never_negative(seed, n):
    torch.manual_seed(seed)
    a, b = torch.randn(2, n, dtype=torch.float64)
    assert functional.ordinality_divergence(a, b) >= -1e-12


def test_ordinality_divergence_passes_gradcheck():
    a = torch.randn(5, dtype=torch.float64, requires_grad=True)
    b = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert gradcheck(functional.ordinality_divergence, (a, b))


def test_ordinality_divergence_with_a_mask_equals_that_of_the_rest():
    a, b = torch.randn(2, 6, dtype=torch.float64)
    mask = torch.tensor([False, True, False, False, True, False])
    poisoned_a, poisoned_b = poisoned(a, mask), poisoned(b, mask, math.inf)
    loss = functional.ordinality_divergence(poisoned_a, poisoned_b, mask=mask)
    close(loss, naive_divergence(a[~mask], b[~mask]))


def test_ordinality_divergence_gradient_ignores_masked_scores():
    a, b = torch.randn(2, 4, dtype=torch.float64)
    mask = torch.tensor([True, False, False, False])
    a = poisoned(a, mask).requires_grad_()
    (actual,) = gradient(functional.ordinality_divergence(a, b, mask=mask), a)
    rest = a.detach()[1:].requires_grad_()
    log_p, log_q = rest.log_softmax(0), b[1:].log_softmax(0)
    divergence = ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum()
    close(actual, [0.0, *gradient(divergence, rest)[0].tolist()])


def test_ordinality_divergence_with_everything_masked_is_zero_with_zero_gradient():
    a = torch.randn(3, requires_grad=True)
    loss = functional.ordinality_divergence(a, torch.randn(3), mask=torch.ones(3, dtype=torch.bool))
    loss.backward()
    assert loss == 0
    assert (a.grad == 0).all()


@pytest.mark.parametrize("dtype", HALF)
def test_ordinality_divergence_computes_in_float32(dtype):
    a, b = torch.randn(2, 9).to(dtype)
    loss = functional.ordinality_divergence(a, b)
    assert loss.dtype == torch.float32
    close(loss, naive_divergence(a, b))


@pytest.mark.parametrize(
    ("change", "error", "name"),
    [
        ({"a": torch.randn(2, 3)}, ValueError, "a"),
        ({"a": torch.tensor([0.0, math.nan, 1.0])}, ValueError, "a"),
        ({"b": torch.randn(4)}, ValueError, "b"),
        ({"b": torch.ones(3, dtype=torch.long)}, TypeError, "b"),
    ],
)
def test_ordinality_divergence_rejects(change, error, name):
    with pytest.raises(error, match=f"`{name}`"):
        functional.ordinality_divergence(**({"a": torch.randn(3), "b": torch.randn(3)} | change))


def test_distribution_embedding_of_zero_has_zero_gradient():
    mean = torch.zeros(3, requires_grad=True)
    functional.distribution_embedding(mean, torch.ones(3))[:3].sum().backward()
    assert mean.grad.tolist() == [0, 0, 0]


@pytest.mark.parametrize("mean", [[3.0], [0.0, -3.0, 0.0]])
def test_distribution_embedding_does_not_change_along_its_only_entry(mean):
    mean = torch.tensor(mean, requires_grad=True)
    half = functional.distribution_embedding(mean, torch.ones_like(mean))[: len(mean)]
    (half * mean.detach()).sum().backward()
    assert mean.grad.abs().max() == 0


@pytest.mark.parametrize("size", [1e-45, 1e-30, 1e-20])
def test_distribution_embedding_of_tiny_vectors_has_bounded_gradient(size):
    mean = torch.full((3,), size, requires_grad=True)
    functional.distribution_embedding(mean, torch.ones(3))[0].backward()
    assert mean.grad.abs().max() <= 1e12


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_supcon_of_a_transposed_view_compiles(reduction):
    x = torch.randn(4, 6, requires_grad=True)
    classes = torch.tensor([0, 1, 0, 1, 0, 1])

    def loss(x):
        return functional.supcon_loss(x.t(), classes, reduction=reduction).sum()

    expected = torch.autograd.grad(loss(x), x)[0]
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    close(torch.autograd.grad(compiled(x), x)[0], expected)


# ------------------------------------------------------------------------- what every function rejects

ARGUMENTS = {
    "supcon_loss": {
        "embeddings": torch.ones(2, 3),
        "classes": torch.tensor([0, 1]),
        "anchor_mask": torch.tensor([True, True]),
        "bank": torch.ones(2, 3),
        "bank_classes": torch.tensor([0, 1]),
    },
    "distribution_embedding": {"mean": torch.ones(2, 3), "std": torch.ones(2, 3)},
    "prediction_distance": {
        "probs": torch.ones(2, 3),
        "labels": torch.ones(2, 3),
        "unknown": torch.ones(2, 3).bool(),
    },
    "expected_distance": {"probs": torch.ones(2, 3)},
    "reduced_chi2": {"mean": FOUR, "std": FOUR, "missing": torch.ones(2, 3).bool()},
    "soft_rank": {"scores": torch.ones(2), "mask": torch.tensor([True, False])},
    "ordinality_divergence": {
        "a": torch.ones(2),
        "b": torch.ones(2),
        "mask": torch.tensor([True, False]),
    },
}
EVERY_ARGUMENT = [(function, name) for function, names in ARGUMENTS.items() for name in names]


@pytest.mark.parametrize(("function", "name"), EVERY_ARGUMENT)
def test_rejects_what_is_no_tensor(function, name):
    arguments = ARGUMENTS[function] | {name: [1.0, 2.0]}
    with pytest.raises(TypeError, match=f"`{name}` to be a tensor"):
        getattr(functional, function)(**arguments)


@pytest.mark.parametrize(
    ("function", "name"), [(f, n) for f, n in EVERY_ARGUMENT if n != next(iter(ARGUMENTS[f]))]
)
def test_rejects_a_tensor_on_another_device_than_the_first(function, name):
    arguments = ARGUMENTS[function] | {name: ARGUMENTS[function][name].to("meta")}
    with pytest.raises(ValueError, match=f"`{name}` to be on cpu, but got meta"):
        getattr(functional, function)(**arguments)


# --------------------------------------------------------------------------------------- bad input


def rejects(name, call, message, error=ValueError):
    return Bad(name, call, error, f"^Expected {message}$")


def rejects_type(name, call, message):
    return rejects(name, call, message, TypeError)


def ints(*values):
    return torch.tensor(values)


def filled(shape, value, place, wrong):
    x = torch.full(shape, value)
    x[place] = wrong
    return x


def meta(*shape, dtype=torch.float32):
    return torch.zeros(*shape, dtype=dtype, device="meta")


NAN, INF = math.nan, math.inf
SHAPE = r"to have shape \({}\), but got \({}\)"
ROWS, CLASSES = torch.eye(4), ints(0, 0, 1, 1)


def supcon_call(embeddings=ROWS, classes=CLASSES, **options):
    return lambda _: functional.supcon_loss(embeddings, classes, **options)


FUNCTIONAL = [
    rejects(
        "supcon: vector", supcon_call(torch.ones(4)), "`embeddings` " + SHAPE.format("N, E", "4,")
    ),
    rejects(
        "supcon: without features",
        supcon_call(torch.ones(4, 0)),
        r"`embeddings` to have at least one feature, but got shape \(4, 0\)",
    ),
    rejects(
        "supcon: nan",
        supcon_call(filled((4, 4), 1.0, (0, 0), NAN)),
        "`embeddings` to be finite, but got 1 NaN .*",
    ),
    rejects_type(
        "supcon: bool classes",
        supcon_call(classes=CLASSES.bool()),
        r"`classes` to have an integer dtype \(.*\), but got torch.bool",
    ),
    rejects_type(
        "supcon: classes without sign",
        supcon_call(classes=CLASSES.to(torch.uint32)),
        r"`classes` to have an integer dtype \(.*\), but got torch.uint32",
    ),
    rejects(
        "supcon: too few classes",
        supcon_call(classes=CLASSES[:3]),
        "`classes` " + SHAPE.format("N=4", "3,"),
    ),
    rejects(
        "supcon: classes elsewhere",
        supcon_call(classes=meta(4, dtype=torch.int64)),
        "`classes` to be on cpu, but got meta",
    ),
    rejects_type(
        "supcon: anchors by number",
        supcon_call(anchor_mask=ints(0, 1, 1, 1)),
        "`anchor_mask` to have a bool dtype, but got torch.int64",
    ),
    rejects(
        "supcon: bank without classes",
        supcon_call(bank=ROWS),
        "`bank` and `bank_classes` together, but got `bank` without `bank_classes`",
    ),
    rejects(
        "supcon: bank of another width",
        supcon_call(bank=torch.ones(2, 3), bank_classes=ints(0, 1)),
        "`bank` " + SHAPE.format("Q, E=4", "2, 3"),
    ),
    rejects(
        "supcon: infinite bank",
        supcon_call(bank=torch.full((1, 4), INF), bank_classes=ints(0)),
        "`bank` to be finite, but got 4 NaN .*",
    ),
    rejects(
        "supcon: products beyond float32",
        supcon_call(filled((4, 4), 1e20, (0, 0), 0)),
        r"the rows of .* to be so short that their products are numbers .*, but got values up to 1e\+20",
    ),
    rejects(
        "supcon: temperature infinite",
        supcon_call(temperature=INF),
        "`temperature` to be a number above 0, but got inf",
    ),
    rejects(
        "supcon: reduction unknown",
        supcon_call(reduction="avg"),
        r"`reduction` to be one of \['mean', 'none', 'sum'\], but got 'avg'",
    ),
    rejects(
        "embedding: number",
        lambda _: functional.distribution_embedding(torch.tensor(1.0), torch.tensor(1.0)),
        r"`mean` to have shape \(\.\.\., K\), but got \(\)",
    ),
    rejects(
        "embedding: negative std",
        lambda _: functional.distribution_embedding(torch.ones(2), -torch.ones(2)),
        r"`std` to be in \[0, inf\], but got -1.0",
    ),
    rejects(
        "soft rank: matrix",
        lambda _: functional.soft_rank(torch.ones(2, 2)),
        "`scores` " + SHAPE.format("B", "2, 2"),
    ),
    rejects(
        "soft rank: infinite",
        lambda _: functional.soft_rank(torch.tensor([INF, 0.0])),
        "`scores` to be finite, but got 1 NaN .*",
    ),
    rejects(
        "soft rank: temperature 0",
        lambda _: functional.soft_rank(torch.ones(2), 0.0),
        "`temperature` to be a number above 0, but got 0.0",
    ),
    rejects(
        "soft rank: mask of another batch",
        lambda _: functional.soft_rank(torch.ones(2), mask=torch.zeros(3).bool()),
        "`mask` " + SHAPE.format("B=2", "3,"),
    ),
    rejects(
        "divergence: lengths differ",
        lambda _: functional.ordinality_divergence(torch.ones(2), torch.ones(3)),
        "`b` " + SHAPE.format("B=2", "3,"),
    ),
    rejects(
        "divergence: devices",
        lambda _: functional.ordinality_divergence(torch.ones(2), meta(2)),
        "`b` to be on cpu, but got meta",
    ),
]


@pytest.mark.parametrize("case", FUNCTIONAL, ids=lambda case: case.name)
def test_bad_input_is_refused(case):
    refused(case, None)
