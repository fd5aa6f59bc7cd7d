"""SequenceEncoder and PlaceReads, against loops over the sequences one by one (tests/cases.py) and their parts."""

import copy

import pytest
import torch
from torch import nn

from cases import plain_encoder
from support import HALF, QUIET_EXPORT, close, poisoned, record_validate_args, refuses
from uncertainty_mm import encoder as room
from uncertainty_mm.encoder import PackedSteps, PlaceReads, SequenceEncoder

DIM, LONGEST = 3, 9
SIZES = ("apart", "within")


def build(**options):
    options = {"num_layers": 2, "num_heads": 2, "dropout": 0.0} | options
    return SequenceEncoder(DIM, LONGEST, 16, **options)


def standardized(**options):
    encoder = build(**options)
    encoder.standardize(torch.randn(DIM), torch.rand(DIM) + 0.5)
    return encoder


def draw(batch=6, steps=7, dtype=torch.float32):
    """Sequences of very different size, with padding also between the steps that are there."""
    x = torch.randn(batch, steps, DIM) * torch.logspace(-2, 2, batch)[:, None, None]
    padding = torch.rand(batch, steps) < 0.4
    padding[:, 0] = False
    return x.to(dtype), padding


def value_and_gradients(encoder, x, padding):
    encoder.zero_grad()
    encoded = encoder(x, padding)
    encoded.square().sum().backward()
    return [encoded.detach(), *(p.grad.clone() for p in encoder.parameters())]


def all_near(left, right, **tolerance):
    for x, y in zip(left, right, strict=True):
        torch.testing.assert_close(x, y, **tolerance)


@pytest.fixture(params=["packed", "padded"])
def _steps(request, monkeypatch):
    """Packed, as on a CPU, or with the padding in it, as on an accelerator and in a compiled program."""
    if request.param == "padded":
        monkeypatch.setattr(room, "checks_values", lambda *_: False)


# ------------------------------------------------------------------------------------ the equations


@pytest.mark.usefixtures("_steps")
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("lacking", [0, 1, 6])
def test_every_sequence_is_read_as_if_it_were_alone(size, lacking):
    encoder = standardized(size=size).double()
    x, padding = draw(dtype=torch.float64)
    x.requires_grad_()  # the plain equation reads nothing else where all are missing
    padding[:lacking] = True
    results = value_and_gradients(encoder, x, padding)
    encoder.zero_grad()
    expected = plain_encoder(encoder, x, padding)
    expected.square().sum().backward()
    grads = (torch.zeros_like(p) if p.grad is None else p.grad for p in encoder.parameters())
    all_near(results, [expected.detach(), *grads])


def test_size_of_a_sequence_is_taken_apart():
    """Root mean square of the valid standardised features, sequence by sequence."""
    encoder = standardized()
    encoder.layers = nn.ModuleList()
    x, padding = draw()
    encoded = encoder(x, padding)
    for sample in range(6):
        valid = ~padding[sample]
        features = (x[sample, valid] - encoder.mean) / encoder.std
        size = features.square().mean().sqrt()
        embedded = encoder.project(features / size) + encoder.positions[:7][valid]
        expected = encoder.norm(embedded + encoder.size(size.log().view(1)))
        torch.testing.assert_close(encoded[sample, valid], expected)


@pytest.mark.parametrize("size", SIZES)
def test_scale_of_the_features_is_seen(size):
    encoder, (x, padding) = build(size=size), draw()
    assert not torch.allclose(encoder(3 * x, padding), encoder(x, padding), atol=1e-3)
    x = x.zero_()  # a size of 0 has no logarithm
    assert all(r.isfinite().all() for r in value_and_gradients(encoder, x, padding))


def test_order_of_the_steps_is_seen_by_their_positions_alone():
    encoder = build()
    x, padding = draw()
    order = torch.randperm(7)
    shuffled = encoder(x[:, order], padding[:, order])
    assert not torch.allclose(shuffled, encoder(x, padding)[:, order], atol=1e-3)
    nn.init.zeros_(encoder.positions)
    shuffled = encoder(x[:, order], padding[:, order])
    torch.testing.assert_close(shuffled, encoder(x, padding)[:, order], rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------ padding


@pytest.mark.usefixtures("_steps")
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e30])
def test_padding_is_never_read(size, value):
    encoder = standardized(size=size)
    x, padding = draw()
    padding[2] = True
    x.requires_grad_()
    expected = value_and_gradients(encoder, x, padding)
    filled = poisoned(x, padding, value).requires_grad_()
    all_near(value_and_gradients(encoder, filled, padding), expected, rtol=0, atol=0)
    assert not filled.grad[padding].any()
    assert torch.equal(filled.grad, x.grad)
    assert not expected[0][padding].any()


@pytest.mark.usefixtures("_steps")
def test_steps_added_as_padding_change_nothing():
    encoder, (x, padding) = standardized(), draw()
    encoded = encoder(x, padding)
    longer = torch.cat([x, torch.randn(6, 2, DIM)], 1)
    mask = torch.cat([padding, torch.ones(6, 2).bool()], 1)
    torch.testing.assert_close(encoder(longer, mask)[:, :7], encoded, rtol=1e-4, atol=1e-5)


def test_single_step_is_read_as_beside_padding():
    """Alone, no attention is computed for it."""
    encoder, (x, _) = standardized(), draw()
    alone = torch.zeros(6, 1, dtype=torch.bool)
    beside = torch.cat([alone, ~alone], 1)
    encoded, *gradients = value_and_gradients(encoder, x[:, :2], beside)
    found = value_and_gradients(encoder, x[:, :1], alone)
    all_near(found, [encoded[:, :1], *gradients], rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("_steps")
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_missing_sequences_give_zeros_and_finite_gradients(dtype):
    encoder = build()
    encoder.standardize(
        torch.full((DIM,), 2e3), torch.ones(DIM)
    )  # 2e6 once divided by a size of 1e-3
    x, padding = draw()
    padding[1:] = True
    results = value_and_gradients(encoder.to(dtype), x.to(dtype), padding)
    assert all(r.isfinite().all() for r in results)
    assert results[0][0].any()
    assert not results[0][1:].any()


def test_packed_steps_come_back_to_their_places():
    padding = torch.tensor([[False, True, False], [True, True, False]])
    steps = PackedSteps(padding)
    x = torch.arange(6.0).view(2, 3, 1)
    assert steps.pack(x).flatten().tolist() == [0, 2, 5]
    assert steps.unpack(steps.pack(x)).flatten().tolist() == [0, 0, 2, 0, 0, 5]


# --------------------------------------------------------------------------------------- statistics


def test_standardized_features_are_as_if_they_had_been_so():
    encoder, (x, padding) = standardized(), draw()
    fresh = copy.deepcopy(encoder)
    fresh.standardize(torch.zeros(DIM), torch.ones(DIM))
    expected = fresh((x - encoder.mean) / encoder.std, padding)
    torch.testing.assert_close(encoder(x, padding), expected)


def test_columns_that_never_vary_have_a_least_spread():
    encoder = build()
    encoder.standardize(torch.zeros(DIM), torch.tensor([0.0, 1e-5, 2.0]))
    close(encoder.std, [1e-3, 1e-3, 2.0])


# --------------------------------------------------------------------------------------- precision


def test_attention_under_autocast_is_in_float32_on_a_cpu(monkeypatch):
    """In bfloat16 its backward pass takes five times as long there."""
    encoder, (x, padding) = build(), draw()
    expected = encoder(x, padding)
    seen, attention = [], room.F.scaled_dot_product_attention

    def spy(*tensors, **options):
        result = attention(*tensors, **options)
        seen.extend(tensor.dtype for tensor in (*tensors, result))
        return result

    monkeypatch.setattr(room.F, "scaled_dot_product_attention", spy)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        encoded = encoder(x, padding)
    assert seen == [torch.float32] * 8
    torch.testing.assert_close(encoded, expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_size_does_not_overflow_in_half_precision(dtype):
    encoder, (x, padding) = build(), draw()
    x = 3e4 * x / x.abs().max()  # its square is beyond float16
    encoded = encoder.to(dtype)(x.to(dtype), padding)
    close(encoded, plain_encoder(encoder.double(), x.to(dtype).double(), padding).detach(), dtype)


# --------------------------------------------------------------------------------- compile and export


@pytest.mark.long
def test_features_beyond_the_root_of_the_largest_number_are_finite():
    x = torch.full((2, 5, DIM), torch.finfo(torch.float32).max)
    encoder = build()
    encoded = encoder(x, torch.zeros(2, 5, dtype=torch.bool))
    encoded.sum().backward()
    assert encoded.isfinite().all()
    assert all(x.grad is None or x.grad.isfinite().all() for x in encoder.parameters())


@pytest.mark.parametrize("make", [standardized, lambda: PlaceReads(DIM, LONGEST)])
def test_compiles_whole_for_any_batch(make):
    encoder = make()
    torch.compiler.reset()
    compiled = torch.compile(encoder, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch, steps in ((6, 7), (4, 5), (3, LONGEST)):
            x, padding = draw(batch, steps)
            torch.testing.assert_close(compiled(x, padding), encoder(x, padding))
    torch.compiler.reset()


@pytest.mark.filterwarnings(*QUIET_EXPORT)
@pytest.mark.parametrize("make", [standardized, lambda: PlaceReads(DIM, LONGEST)])
def test_exports_for_any_batch_and_number_of_steps(make):
    encoder = make().eval()
    batch, steps = torch.export.Dim("batch"), torch.export.Dim("steps", max=LONGEST)
    shapes = ({0: batch, 1: steps}, {0: batch, 1: steps})
    program = torch.export.export(encoder, draw(), dynamic_shapes=shapes).module()
    for sizes in ((2, 5), (6, LONGEST)):
        x, padding = draw(*sizes)
        torch.testing.assert_close(program(x, padding), encoder(x, padding))


# ---------------------------------------------------------------------------------------- by place


def test_reading_picks_out_the_step_of_its_place():
    reads = PlaceReads(DIM, LONGEST, num_reads=LONGEST)
    nn.init.eye_(reads.weight)
    x, padding = draw()
    expected = torch.zeros(6, LONGEST, DIM)
    expected[:, :7] = x.masked_fill(padding.unsqueeze(2), 0)
    assert torch.equal(reads(x, padding), expected.flatten(1))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e30])
def test_reading_ignores_padding(value):
    reads, (x, padding) = PlaceReads(DIM, LONGEST), draw()
    padding[2] = True
    filled = poisoned(x, padding, value).requires_grad_()
    results = value_and_gradients(reads, filled, padding)
    all_near(results, value_and_gradients(reads, x, padding), rtol=0, atol=0)
    assert results[0].any(1).tolist() == [True, True, False, True, True, True]
    assert not filled.grad[padding].any()
    # of missing sequences alone nothing is learned
    alone = value_and_gradients(reads, filled, torch.ones_like(padding))
    assert not any(x.any() for x in alone)


def test_readings_are_as_large_as_the_steps_at_first():
    reads = PlaceReads(DIM, 500, num_reads=400)
    out = reads(torch.randn(20, 500, DIM), torch.zeros(20, 500).bool())
    assert abs(out.std() - 1) < 0.05


# ---------------------------------------------------------------------------------------- bad input

NUMBER = "a positive integer, but got {}"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"in_dim": 0}, ValueError, "`in_dim` to be " + NUMBER.format(0)),
        ({"max_steps": 2.0}, TypeError, "`max_steps` to be " + NUMBER.format(2.0)),
        ({"hidden_dim": True}, TypeError, "`hidden_dim` to be " + NUMBER.format(True)),
        ({"num_layers": 0}, ValueError, "`num_layers` to be " + NUMBER.format(0)),
        ({"num_heads": -1}, ValueError, "`num_heads` to be " + NUMBER.format(-1)),
        (
            {"num_heads": 3},
            ValueError,
            "`hidden_dim` to be a multiple of `num_heads` = 3, but got 16",
        ),
        ({"dropout": 1.0}, ValueError, r"`dropout` to be a number in \[0, 1\), but got 1.0"),
        (
            {"size": "none"},
            ValueError,
            r"`size` to be one of \['apart', 'within'\], but got 'none'",
        ),
        ({"validate_args": 1}, TypeError, "`validate_args` to be True, False or None, but got 1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_constructor_refuses(options, error, message):
    options = {"in_dim": DIM, "max_steps": LONGEST, "hidden_dim": 16, "num_heads": 2} | options
    refuses(nn.Identity(), lambda: SequenceEncoder(**options), error, message)


@pytest.mark.parametrize("name", ["in_dim", "max_steps", "num_reads"])
def test_constructor_of_reads_refuses(name):
    sizes = {"in_dim": DIM, "max_steps": LONGEST, "num_reads": 2}
    for value, error in ((0, ValueError), (2.0, TypeError)):
        message = f"`{name}` to be " + NUMBER.format(value)
        refuses(nn.Identity(), lambda v=value: PlaceReads(**sizes | {name: v}), error, message)


def test_constructor_of_reads_refuses_other_flags():
    message = "`validate_args` to be True, False or None, but got 1"
    refuses(nn.Identity(), lambda: PlaceReads(DIM, 1, validate_args=1), TypeError, message)


X, PADDING = torch.zeros(2, 4, DIM), torch.zeros(2, 4).bool()
SHAPE = r"to have shape \({}\), but got \({}\)"
FLOATING = r"to have a floating dtype \(float16 to float64\), but got torch.int64"


@pytest.mark.parametrize(
    ("x", "padding", "error", "message"),
    [
        (X[0], PADDING, ValueError, "`x` " + SHAPE.format("B, S, in_dim=3", "4, 3")),
        (X[..., :2], PADDING, ValueError, "`x` " + SHAPE.format("B, S, in_dim=3", "2, 4, 2")),
        (X, PADDING[:1], ValueError, "`padding` " + SHAPE.format("B=2, S=4", "1, 4")),
        (X, PADDING.long(), TypeError, "`padding` to have a bool dtype, but got torch.int64"),
        (X, None, TypeError, "`padding` to be a tensor, but got NoneType"),
        (X.long(), PADDING, TypeError, f"`x` {FLOATING}"),
        (X, PADDING.to("meta"), ValueError, "`padding` to be on cpu, but got meta"),
        (X + torch.nan, PADDING, ValueError, "`x` to be finite, but got 24 NaN or infinite values"),
        (
            torch.zeros(2, 10, DIM),
            torch.zeros(2, 10).bool(),
            ValueError,
            "`x` to have at most `max_steps` = 9 steps, but got 10",
        ),
    ],
    ids=str,
)
def test_forward_refuses(x, padding, error, message):
    for module in (build(), PlaceReads(DIM, LONGEST)):
        refuses(module, lambda m=module: m(x, padding), error, message)


@pytest.mark.parametrize(
    ("mean", "std", "error", "message"),
    [
        (X[0, 0, :2], X[0, 0], ValueError, "`mean` " + SHAPE.format("in_dim=3", "2,")),
        (X[0, 0], X[0], ValueError, "`std` " + SHAPE.format("in_dim=3", "4, 3")),
        (X[0, 0].long(), X[0, 0], TypeError, f"`mean` {FLOATING}"),
        (X[0, 0], 1.0, TypeError, "`std` to be a tensor, but got float"),
        (X[0, 0] + torch.inf, X[0, 0], ValueError, "`mean` to be finite, but got 3 NaN .*"),
        (X[0, 0] + 1, X[0, 0] - 1, ValueError, "`std` to be at least 0, but got -1.0"),
    ],
    ids=str,
)
def test_standardize_refuses(mean, std, error, message):
    encoder = standardized()
    refuses(encoder, lambda: encoder.standardize(mean, std), error, message)


def test_values_are_looked_at_as_told(monkeypatch):
    for make in (build, lambda **kwargs: PlaceReads(DIM, LONGEST, **kwargs)):
        passed = record_validate_args(monkeypatch)
        make(validate_args=False)(X, PADDING)
        assert False in passed
