"""EmotionQueryAttention (Eq. 1-2), against loops over samples, modalities and labels."""

import copy
import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck

from support import HALF, close, gradient, poisoned, record_validate_args, refuses
from uncertainty_mm import EmotionQueryAttention

DIMS = {"voice": 3, "face": 5, "text": 2}
STEPS = {"voice": 4, "face": 2, "text": 6}
BATCH, LABELS, OUT = 3, 4, 6
LENGTHS = {"voice": [4, 2, 0], "face": [2, 1, 2], "text": [6, 3, 1]}  # voice of sample 2 is missing


def build(**kwargs):
    sizes = {"label_dim": 7, "proj_dim": 8, "out_dim": OUT}
    return EmotionQueryAttention(DIMS, LABELS, **(sizes | kwargs)).double()


def random_features(dtype=torch.float64):
    return {m: torch.randn(BATCH, STEPS[m], DIMS[m], dtype=dtype) for m in DIMS}


def padding(names=DIMS):
    return {m: torch.arange(STEPS[m]) >= torch.tensor(LENGTHS[m])[:, None] for m in names}


@torch.no_grad()
def naive_attention(module, features, padding_mask=None, scale=8**-0.5):
    """Eq. 1 and 2 one (sample, modality, label) at a time; zeros where nothing is left."""
    output = torch.zeros(BATCH, len(DIMS), LABELS, OUT, dtype=torch.float64)
    weights = {
        m: torch.zeros(BATCH, LABELS, x.shape[1], dtype=torch.float64) for m, x in features.items()
    }
    for i, m in enumerate(DIMS):
        for b in range(BATCH if m in features else 0):
            steps = range(features[m].shape[1])
            kept = [s for s in steps if padding_mask is None or not padding_mask[m][b, s]]
            for q in range(LABELS if kept else 0):
                layers = module.attention[m]
                query = layers.query(module.label_embedding.weight[q])
                keys = [layers.key(features[m][b, s]) for s in kept]
                scores = [float(torch.dot(query, key)) * scale for key in keys]
                powers = [math.exp(score - max(scores)) for score in scores]
                shares = [power / sum(powers) for power in powers]
                context = sum(share * key for share, key in zip(shares, keys, strict=True))
                output[b, i, q] = layers.out(context)
                weights[m][b, q, kept] = torch.tensor(shares, dtype=torch.float64)
    return output, weights


# ------------------------------------------------------------------------------------ the equations


def test_output_is_stacked_by_sample_modality_label():
    assert build()(random_features()).shape == (BATCH, len(DIMS), LABELS, OUT)


def test_defaults_are_those_of_the_contract():
    module = EmotionQueryAttention({"voice": 3}, 5)
    assert (module.num_labels, module.out_dim) == (5, 128)
    assert module.scale == 1 / 16
    assert module.dropout == 0
    assert module.label_embedding.weight.shape == (5, 256)
    assert module.attention["voice"].key.weight.shape == (256, 3)
    assert module({"voice": torch.randn(2, 4, 3)}).shape == (2, 1, 5, 128)


def test_equals_the_loops():
    module, features = build(), random_features()
    close(module(features), naive_attention(module, features)[0])


def test_equals_the_loops_with_padding():
    module, features = build(), random_features()
    expected, _ = naive_attention(module, features, padding())
    close(module(features, padding()), expected)


def test_scale_1_is_equation_1():
    module, features = build(scale=1.0), random_features()
    close(module(features), naive_attention(module, features, scale=1.0)[0])


def test_weights_equal_the_loops():
    module, features = build(), random_features()
    _, weights = module(features, padding(), need_weights=True)
    _, expected = naive_attention(module, features, padding())
    assert list(weights) == list(DIMS)
    for m in DIMS:
        close(weights[m], expected[m])


def test_output_is_the_same_when_weights_are_asked_for():
    module, features = build(), random_features()
    output, _ = module(features, padding(), need_weights=True)
    close(output, naive_attention(module, features, padding())[0])


def test_modalities_share_one_table_of_labels():
    module, features = build(), random_features()
    for i in range(len(DIMS)):
        (grad,) = gradient(module(features)[:, i], module.label_embedding.weight)
        assert (grad != 0).any(-1).all()


def test_modalities_are_in_the_order_of_the_constructor():
    module, features = build(), random_features()
    reordered = dict(reversed(features.items()))
    close(module(reordered), naive_attention(module, features)[0])


@given(seed=st.integers(0, 2**16))
def test_order_of_steps_does_not_matter(seed):
    torch.manual_seed(seed)
    module, features, mask = build(), random_features(), padding()
    orders = {m: torch.randperm(STEPS[m]) for m in DIMS}
    shuffled = module(
        {m: features[m][:, orders[m]] for m in DIMS}, {m: mask[m][:, orders[m]] for m in DIMS}
    )
    close(shuffled, module(features, mask))


@given(seed=st.integers(0, 2**16))
def test_permutation_of_samples_permutes_the_output(seed):
    torch.manual_seed(seed)
    module, features, mask = build(), random_features(), padding()
    order = torch.randperm(BATCH)
    permuted = module(
        {m: x[order] for m, x in features.items()}, {m: p[order] for m, p in mask.items()}
    )
    close(permuted, module(features, mask)[order])


def test_equal_steps_give_the_value_of_one():
    module = build()
    features = {m: x[:, :1].expand(-1, STEPS[m], -1) for m, x in random_features().items()}
    one_step = {m: x[:, :1] for m, x in features.items()}
    close(module(features), naive_attention(module, one_step)[0])


def test_single_step_is_the_answer_with_and_without_gradients():
    """Without them nothing is asked."""
    features = {m: x[:, :1] for m, x in random_features().items()}
    masks = {"face": torch.tensor([[False], [True], [False]])}
    module = build()
    with torch.no_grad():
        close(module(features, masks), module(features, masks, need_weights=True)[0])
    close(module(features, masks).detach(), module(features, masks, need_weights=True)[0].detach())


def test_passes_gradcheck():
    module, mask = build(), padding()
    features = [x.requires_grad_() for x in random_features().values()]

    def forward(table, *features):
        arguments = (dict(zip(DIMS, features, strict=True)), mask)
        return torch.func.functional_call(module, {"label_embedding.weight": table}, arguments)

    table = module.label_embedding.weight.detach().clone().requires_grad_()
    assert gradcheck(forward, (table, *features))


# ------------------------------------------------------------------------------ padding, missing


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
@pytest.mark.parametrize("need_weights", [False, True])
def test_padded_steps_do_not_influence_the_output(value, need_weights):
    module, features, mask = build(), random_features(), padding()
    dirty = {m: poisoned(features[m], mask[m], value) for m in DIMS}
    output = module(dirty, mask, need_weights=need_weights)
    close(output[0] if need_weights else output, naive_attention(module, features, mask)[0])


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("need_weights", [False, True])
def test_padded_steps_do_not_influence_gradients(value, need_weights):
    module, features, mask = build(), random_features(), padding()
    clean = {m: poisoned(features[m], mask[m], 0.0).requires_grad_() for m in DIMS}
    dirty = {m: poisoned(features[m], mask[m], value).requires_grad_() for m in DIMS}

    def gradients(features):
        output = module(features, mask, need_weights=need_weights)
        output = output[0] if need_weights else output
        return gradient(output.square(), *features.values(), *module.parameters())

    for actual, expected in zip(gradients(dirty), gradients(clean), strict=True):
        close(actual, expected)


def test_padded_steps_get_no_gradient():
    features, mask = random_features(), padding()
    features = {m: x.requires_grad_() for m, x in features.items()}
    grads = gradient(build()(features, mask).square(), *features.values())
    for m, grad in zip(DIMS, grads, strict=True):
        assert (grad[mask[m]] == 0).all()
        assert (grad[~mask[m]] != 0).any()


def test_longer_padding_changes_nothing():
    module, features, mask = build(), random_features(), padding()
    longer = {m: torch.cat([x, torch.randn_like(x)], 1) for m, x in features.items()}
    longer_mask = {m: torch.cat([p, torch.ones_like(p)], 1) for m, p in mask.items()}
    close(module(longer, longer_mask), naive_attention(module, features, mask)[0])


def test_padding_mask_may_name_some_modalities_only():
    module, features = build(), random_features()
    full = padding() | {m: torch.zeros(BATCH, STEPS[m], dtype=torch.bool) for m in ("face", "text")}
    close(module(features, padding(["voice"])), naive_attention(module, features, full)[0])


def test_padding_mask_of_an_absent_modality_is_not_read():
    module, features, mask = build(), random_features(), padding()
    del features["voice"]
    others = {m: p for m, p in mask.items() if m != "voice"}
    close(module(features, mask), module(features, others))


@pytest.mark.parametrize("need_weights", [False, True])
def test_wholly_padded_sample_gives_zeros(need_weights):
    output = build()(random_features(), padding(), need_weights=need_weights)
    output = output[0] if need_weights else output
    assert (output[2, 0] == 0).all()
    assert (output[:2, 0] != 0).all()


@pytest.mark.parametrize("dtype", HALF)
def test_weights_have_the_dtype_of_the_features(dtype):
    _, weights = build().to(dtype)(random_features(dtype), padding(), need_weights=True)
    assert all(w.dtype == dtype for w in weights.values())


def test_weights_of_a_wholly_padded_sample_are_zero():
    _, weights = build()(random_features(), padding(), need_weights=True)
    assert (weights["voice"][2] == 0).all()


@pytest.mark.parametrize("need_weights", [False, True])
def test_gradients_are_finite_when_everything_is_padded(need_weights):
    module = build()
    features = {m: x.requires_grad_() for m, x in random_features().items()}
    mask = {m: torch.ones(BATCH, STEPS[m], dtype=torch.bool) for m in DIMS}
    output = module(features, mask, need_weights=need_weights)
    output = output[0] if need_weights else output
    assert (output == 0).all()
    grads = gradient(output, *features.values(), *module.parameters())
    assert all((grad == 0).all() for grad in grads)


def test_absent_modality_gives_zeros_and_leaves_the_others_alone():
    module, features = build(), random_features()
    del features["face"]
    output = module(features)
    close(output, naive_attention(module, features)[0])
    assert (output[:, 1] == 0).all()


def test_weights_hold_the_present_modalities_only():
    features = random_features()
    del features["face"]
    _, weights = build()(features, need_weights=True)
    assert set(weights) == {"voice", "text"}


@pytest.mark.parametrize("need_weights", [False, True])
def test_modality_without_steps_gives_zeros(need_weights):
    features = random_features() | {"face": torch.randn(BATCH, 0, DIMS["face"]).double()}
    output = build()(features, need_weights=need_weights)
    output = output[0] if need_weights else output
    assert (output[:, 1] == 0).all()
    assert (output[:, 0] != 0).any()


def test_missing_is_true_where_nothing_is_left():
    features = random_features()
    del features["face"]
    missing = build().missing(features, padding(["voice", "text"]))
    expected = [[False, True, False], [False, True, False], [True, True, False]]
    assert torch.equal(missing, torch.tensor(expected))


def test_missing_without_a_mask_is_false_for_what_is_there():
    assert torch.equal(build().missing(random_features()), torch.zeros(BATCH, 3, dtype=torch.bool))


def test_missing_is_true_without_steps():
    features = random_features() | {"text": torch.randn(BATCH, 0, DIMS["text"]).double()}
    expected = torch.tensor([[False, False, True]] * BATCH)
    assert torch.equal(build().missing(features), expected)


# ------------------------------------------------------------------------------ dropout, precision


@pytest.mark.parametrize("need_weights", [False, True])
def test_dropout_is_on_in_training_only(need_weights):
    module, features = build(dropout=0.5), random_features()

    def forward():
        output = module(features, need_weights=need_weights)
        return output[0] if need_weights else output

    assert not torch.equal(forward(), forward())
    module.eval()
    close(forward(), naive_attention(module, features)[0])


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("need_weights", [False, True])
def test_half_precision_is_near_float64(dtype, need_weights):
    module, features, mask = build().to(dtype), random_features(dtype), padding()
    output = module(features, mask, need_weights=need_weights)
    output = output[0] if need_weights else output
    assert output.dtype == dtype
    reference = copy.deepcopy(module).double()
    expected, _ = naive_attention(reference, {m: x.double() for m, x in features.items()}, mask)
    close(output, expected, dtype)


def overflowing(module, features):
    """Scaled so that scores, but nothing before them, leave the range of float16."""
    with torch.no_grad():
        module.label_embedding.weight *= 300
    features = {m: 300 * x for m, x in features.items()}
    double = copy.deepcopy(module).double()
    layers = double.attention["text"]
    keys, queries = (
        layers.key(features["text"].double()),
        layers.query(double.label_embedding.weight),
    )
    assert max(keys.abs().max(), queries.abs().max()) < 6e4 < (keys @ queries.T).abs().max()
    return {m: x.requires_grad_() for m, x in features.items()}


@pytest.mark.parametrize("need_weights", [False, True])
def test_scores_beyond_float16_are_safe_in_half_precision(need_weights):
    module = build(scale=1.0).half()
    features = overflowing(module, random_features(torch.float16))
    output = module(features, padding(), need_weights=need_weights)
    output = output[0] if need_weights else output
    assert output.isfinite().all()
    assert all(g.isfinite().all() for g in gradient(output, *features.values()))


@pytest.mark.parametrize("need_weights", [False, True])
def test_scores_beyond_float16_are_safe_under_autocast(need_weights):
    module = build(scale=1.0).float()
    features = overflowing(module, random_features(torch.float32))
    with torch.autocast("cpu", dtype=torch.float16):
        output = module(features, padding(), need_weights=need_weights)
    output = output[0] if need_weights else output
    assert output.isfinite().all()
    assert all(g.isfinite().all() for g in gradient(output, *features.values()))


# --------------------------------------------------------------------------------------- parameters


def test_missing_reads_no_value_and_no_parameter():
    module, features = build().to("meta"), random_features(torch.float32)  # of another dtype
    features["text"][:] = math.nan
    assert torch.equal(
        module.missing(features, padding()), build().missing(random_features(), padding())
    )


def test_dtype_is_that_of_the_table_of_labels_as_its_forward_pass_returns_it():
    module = build()  # as one that is sharded by itself, in mixed precision: its weight is no guide
    module.label_embedding.register_forward_hook(lambda *call: call[-1].float())
    module.attention.float()
    assert module(random_features(torch.float32)).dtype == torch.float32


# -------------------------------------------------------------------------------------- bad inputs

POSITIVE = "to be a positive integer, but got"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"modality_dims": {}}, ValueError, "to name at least one modality, but got none"),
        ({"modality_dims": ["a"]}, TypeError, "to be a mapping from names to sizes, but got list"),
        ({"modality_dims": {3: 3}}, TypeError, "to have str keys, but got 3"),
        ({"modality_dims": {"": 3}}, ValueError, "to be usable .* but got ''"),
        ({"modality_dims": {"a.b": 3}}, ValueError, "to be usable .* but got 'a.b'"),
        ({"modality_dims": {"keys": 3}}, ValueError, "to be usable .* but got 'keys'"),
        ({"modality_dims": {"a": 0}}, ValueError, f"{POSITIVE} 0"),
        ({"num_labels": 0}, ValueError, f"{POSITIVE} 0"),
        ({"num_labels": -1}, ValueError, f"{POSITIVE} -1"),
        ({"num_labels": 2.0}, TypeError, rf"{POSITIVE} 2\.0"),
        ({"num_labels": True}, TypeError, f"{POSITIVE} True"),
        ({"label_dim": 0}, ValueError, f"{POSITIVE} 0"),
        ({"proj_dim": -1}, ValueError, f"{POSITIVE} -1"),
        ({"proj_dim": 2.5}, TypeError, rf"{POSITIVE} 2\.5"),
        ({"out_dim": 0}, ValueError, f"{POSITIVE} 0"),
        ({"dropout": 1}, ValueError, r"to be a number in \[0, 1\), but got 1"),
        ({"dropout": 1.5}, ValueError, r"to be a number in \[0, 1\), but got 1\.5"),
        ({"scale": 0.0}, ValueError, "to be a number above 0, but got 0.0"),
        ({"scale": math.nan}, ValueError, "to be a number above 0, but got nan"),
        ({"scale": math.inf}, ValueError, "to be a number above 0, but got inf"),
        ({"validate_args": "yes"}, TypeError, "to be True, False or None, but got 'yes'"),
    ],
)
def test_constructor_rejects(change, error, message):
    [name] = change
    with pytest.raises(error, match=rf"^Expected (the keys of )?`{name}(\['a'\])?` {message}$"):
        EmotionQueryAttention(**({"modality_dims": {"voice": 3}, "num_labels": 4} | change))


VOICE = torch.randn(3, 4, 3)
ONLY = r"to hold only the modalities \['voice', 'face', 'text'\], but got"
SHAPE = r"to have shape \({}\), but got \({}\)"


@pytest.mark.parametrize(
    ("features", "error", "message"),
    [
        ({}, ValueError, "`features` to hold at least one modality, but got none: .*"),
        (VOICE, TypeError, "`features` to be a mapping from .* to tensors, but got Tensor"),
        ({"smell": VOICE, "b": VOICE}, ValueError, rf"`features` {ONLY} \['b', 'smell'\]"),
        ({"voice": None}, TypeError, "voice to be a tensor, but got NoneType"),
        ({"voice": VOICE[0]}, ValueError, "voice " + SHAPE.format("B, S, D=3", "4, 3")),
        ({"voice": VOICE.mT}, ValueError, "voice " + SHAPE.format("B, S, D=3", "3, 3, 4")),
        (
            {"voice": VOICE, "face": torch.ones(2, 4, 5)},
            ValueError,
            "face " + SHAPE.format("B=3, S, D=5", "2, 4, 5"),
        ),
        (
            {"voice": VOICE, "text": torch.ones(3, 4, 2, device="meta")},
            ValueError,
            "text to be on cpu, but got meta",
        ),
        ({"voice": VOICE.long()}, TypeError, "voice to have a floating .* but got torch.int64"),
        (
            {"voice": VOICE.to(torch.float8_e4m3fn)},
            TypeError,
            "voice to have a floating .* but got torch.float8_e4m3fn",
        ),
        ({"voice": VOICE.to_sparse()}, TypeError, "voice to be a dense .* got torch.sparse_coo"),
    ],
)
def test_rejects_features(features, error, message):
    message = re.sub("^(voice|face|text)", r"`features\\['\1'\\]`", message)
    module = build().float()
    refuses(module, lambda: module(features), error, message)
    refuses(module, lambda: module.missing(features), error, message)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (VOICE.double(), TypeError, "dtype of the module, torch.float32, but got torch.float64"),
        (poisoned(VOICE, (0, 0, 0)), ValueError, "finite, but got 1 NaN or infinite values"),
        (poisoned(VOICE, 0, math.inf), ValueError, "finite, but got 12 NaN or infinite values"),
    ],
)
def test_forward_rejects_dtype_and_values(wrong, error, message):
    module = build().float()
    for features in ({"voice": wrong}, {"text": torch.ones(3, 1, 2), "voice": wrong}):
        message_ = rf"`features\['voice'\]` to (be|have the) {message}"
        refuses(module, lambda features=features: module(features), error, message_)


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        ({"smell": torch.zeros(3, 4).bool()}, ValueError, rf"`padding_mask` {ONLY} \['smell'\]"),
        (torch.zeros(3, 4).bool(), TypeError, "`padding_mask` to be a mapping .* but got Tensor"),
        ({"voice": torch.zeros(3, 5).bool()}, ValueError, SHAPE.format("B=3, S=4", "3, 5")),
        ({"voice": torch.zeros(3).bool()}, ValueError, SHAPE.format("B=3, S=4", "3,")),
        (
            {"voice": torch.zeros(3, 4)},
            TypeError,
            "to have a bool .* torch.float32; True leaves out, so .*",
        ),
        (
            {"voice": torch.zeros(3, 4).int()},
            TypeError,
            "to have a bool .* torch.int32; .*attention_mask == 0.*",
        ),
        ({"voice": torch.zeros(3, 4).bool().to("meta")}, ValueError, "to be on cpu, but got meta"),
    ],
)
def test_rejects_padding_mask(mask, error, message):
    if isinstance(mask, dict) and "voice" in mask:
        message = rf"`padding_mask\['voice'\]` {message}"
    module = build().float()
    refuses(module, lambda: module({"voice": VOICE}, mask), error, message)
    refuses(module, lambda: module.missing({"voice": VOICE}, mask), error, message)


def test_rejects_need_weights_that_is_a_word():
    module, message = build(), "`need_weights` to be True or False, but got 'no'"
    refuses(module, lambda: module(random_features(), need_weights="no"), TypeError, message)


@pytest.mark.parametrize("validate_args", [None, False, True])
def test_validate_args_is_passed_on(monkeypatch, validate_args):
    passed = record_validate_args(monkeypatch)
    build(validate_args=validate_args)(random_features())
    assert passed == [validate_args] * len(DIMS)


def test_rejects_nan_in_steps_that_are_not_padded():
    features = random_features()
    features["text"][0, 5] = math.nan  # sample 0 has no padding
    with pytest.raises(ValueError, match="`features"):
        build()(features, padding())
