"""Everything that can be wrong with an argument or a file, tried on every public call of the library.

One table: a `Bad` case is a call that must raise the stated error, whose message names the argument, the rule and what
was received. Cases are grouped by component. A `Component` says what the calls are made on, what its state is and how
it is used; after a refused call the state is the same to the bit, and a use gives what it gives without that call.
The command lines have their own table, in `test_bad_commands.py`.
"""

import copy
import functools
import io
import math
import pickle
import re
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

import uncertainty_mm as umm
from support import Bad
from uncertainty_mm import DiagonalGaussian, functional, measures
from uncertainty_mm.data import (
    MultimodalDataset,
    SyntheticMMER,
    read_folder,
    read_npz,
    write_folder,
    write_npz,
)

metrics = pytest.importorskip("uncertainty_mm.metrics")
plots = pytest.importorskip("uncertainty_mm.plots")

NAN, INF = math.nan, math.inf
B, M, Q, K, D = 3, 2, 3, 4, 5


class Component(NamedTuple):
    """What a group of bad calls is made on."""

    cases: list[Bad]
    given: Callable[[Path], object] = lambda folder: None  # made anew for every case
    state: Callable[[object], object] = lambda given: None
    use: Callable[[object], object] = lambda given: None


def rejects(name, call, message, error=ValueError):
    """A case whose message has the wording of the library: `rejects(..., "`x` to be ..., but got 5")`."""
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


ANY = ".*"  # what was received, where it is long
TENSOR_LIST = "but got list"
POSITIVE = "to be a positive integer, but got"
SHAPE = r"to have shape \({}\), but got \({}\)"

# ------------------------------------------------------------------------------------------ attention

DIMS = {"text": 4, "audio": 2}


def attention(folder=None, **options):
    torch.manual_seed(0)
    return umm.EmotionQueryAttention(DIMS, Q, label_dim=5, proj_dim=6, out_dim=D, **options)


def sequences(**changes):
    return {"text": torch.ones(B, 3, 4), "audio": torch.ones(B, 2, 2)} | changes


def build_attention(**change):
    return lambda _: umm.EmotionQueryAttention(
        **({"modality_dims": DIMS, "num_labels": Q} | change)
    )


ATTENTION = [
    rejects_type(
        "dims are a list",
        build_attention(modality_dims=["text"]),
        "`modality_dims` to be a mapping from names to sizes, but got list",
    ),
    rejects(
        "no modality",
        build_attention(modality_dims={}),
        "`modality_dims` to name at least one modality, but got none",
    ),
    rejects(
        "a size of 0",
        build_attention(modality_dims={"text": 0}),
        rf"`modality_dims\['text'\]` {POSITIVE} 0",
    ),
    rejects_type(
        "a name that is a number",
        build_attention(modality_dims={3: 4}),
        "`modality_dims` to have str keys, but got 3",
    ),
    rejects(
        "a name with a dot",
        build_attention(modality_dims={"a.b": 4}),
        rf"the keys of `modality_dims` {ANY} but got 'a.b'",
    ),
    rejects(
        "negative number of labels", build_attention(num_labels=-1), f"`num_labels` {POSITIVE} -1"
    ),
    rejects_type(
        "bool number of labels", build_attention(num_labels=True), f"`num_labels` {POSITIVE} True"
    ),
    rejects_type("float size", build_attention(proj_dim=2.5), rf"`proj_dim` {POSITIVE} 2\.5"),
    rejects("scale 0", build_attention(scale=0.0), "`scale` to be a number above 0, but got 0.0"),
    rejects("scale nan", build_attention(scale=NAN), "`scale` to be a number above 0, but got nan"),
    rejects(
        "scale infinite", build_attention(scale=INF), "`scale` to be a number above 0, but got inf"
    ),
    rejects(
        "dropout 1", build_attention(dropout=1), r"`dropout` to be a number in \[0, 1\), but got 1"
    ),
    rejects_type(
        "validate_args a word",
        build_attention(validate_args="yes"),
        "`validate_args` to be True or False, but got 'yes'",
    ),
    rejects_type(
        "features a tensor",
        lambda a: a(torch.ones(B, 3, 4)),
        "`features` to be a mapping from modality names to tensors, but got Tensor",
    ),
    rejects(
        "unknown modality",
        lambda a: a(sequences(vision=torch.ones(B, 2, 2))),
        r"`features` to hold only the modalities \['text', 'audio'\], but got \['vision'\]",
    ),
    rejects(
        "no feature", lambda a: a({}), "`features` to hold at least one modality, but got none: .*"
    ),
    rejects_type(
        "feature of None",
        lambda a: a(sequences(text=None)),
        r"`features\['text'\]` to be a tensor, but got NoneType",
    ),
    rejects(
        "wrong rank",
        lambda a: a(sequences(text=torch.ones(B, 4))),
        r"`features\['text'\]` " + SHAPE.format("B, S, D=4", "3, 4"),
    ),
    rejects(
        "sizes of two modalities exchanged",
        lambda a: a({"text": torch.ones(B, 2, 2)}),
        r"`features\['text'\]` " + SHAPE.format("B, S, D=4", "3, 2, 2"),
    ),
    rejects(
        "batches differ",
        lambda a: a(sequences(audio=torch.ones(B + 1, 2, 2))),
        r"`features\['audio'\]` " + SHAPE.format("B=3, S, D=2", "4, 2, 2"),
    ),
    rejects_type(
        "integers",
        lambda a: a(sequences(text=torch.ones(B, 3, 4).long())),
        r"`features\['text'\]` to have a floating dtype \(.*\), but got torch.int64",
    ),
    rejects_type(
        "8-bit floats",
        lambda a: a(sequences(text=torch.ones(B, 3, 4).to(torch.float8_e4m3fn))),
        r"`features\['text'\]` to have a floating dtype \(.*\), but got torch.float8_e4m3fn",
    ),
    rejects_type(
        "another dtype than the module",
        lambda a: a(sequences(text=torch.ones(B, 3, 4).double())),
        r"`features\['text'\]` to have the dtype of the module, torch.float32, but got torch.float64",
    ),
    rejects_type(
        "sparse",
        lambda a: a(sequences(text=torch.ones(B, 3, 4).to_sparse())),
        r"`features\['text'\]` to be a dense tensor, but got torch.sparse_coo",
    ),
    rejects(
        "modalities on two devices",
        lambda a: a(sequences(audio=meta(B, 2, 2))),
        r"`features\['audio'\]` to be on cpu, where the module is, but got meta",
    ),
    rejects(
        "another device than the module",
        lambda a: a({"text": meta(B, 3, 4)}),
        r"`features\['text'\]` to be on cpu, where the module is, but got meta",
    ),
    rejects(
        "nan at a valid step",
        lambda a: a(sequences(text=filled((B, 3, 4), 1.0, (0, 0, 0), NAN))),
        r"`features\['text'\]` to be finite, but got 1 NaN or infinite values",
    ),
    rejects_type(
        "mask of numbers",
        lambda a: a(sequences(), {"text": torch.zeros(B, 3)}),
        r"`padding_mask\['text'\]` to have a bool dtype, but got torch.float32",
    ),
    rejects(
        "mask of another length",
        lambda a: a(sequences(), {"text": torch.zeros(B, 2).bool()}),
        r"`padding_mask\['text'\]` " + SHAPE.format("B=3, S=3", "3, 2"),
    ),
    rejects(
        "mask of an unknown modality",
        lambda a: a(sequences(), {"face": torch.zeros(B, 3).bool()}),
        r"`padding_mask` to hold only the modalities \['text', 'audio'\], but got \['face'\]",
    ),
    rejects(
        "missing: mask on another device",
        lambda a: a.missing(sequences(), {"text": meta(B, 3, dtype=torch.bool)}),
        r"`padding_mask\['text'\]` to be on cpu, but got meta",
    ),
    rejects_type(
        "need_weights a word",
        lambda a: a(sequences(), need_weights="no"),
        "`need_weights` to be True or False, but got 'no'",
    ),
]

# ----------------------------------------------------------------------------------------- Gaussians


def latent(shape=(B, M, Q, K), mean=0.5, std=0.5):
    return DiagonalGaussian(torch.full(shape, mean), torch.full(shape, std))


def with_std(value):
    return latent()._replace(std=filled((B, M, Q, K), 0.5, (0, 0, 0, 0), value))


def with_mean(value):
    return latent()._replace(mean=filled((B, M, Q, K), 0.5, (0, 0, 0, 0), value))


GAUSSIAN = [
    rejects(
        "kl: shapes differ",
        lambda g: g._replace(std=torch.ones(3)).kl_to_standard_normal(),
        "`std` " + SHAPE.format("d0=3, d1=2, d2=3, d3=4", "3,"),
    ),
    rejects(
        "kl: negative std",
        lambda _: with_std(-1.0).kl_to_standard_normal(),
        r"`std` to be in \[0, inf\], but got -1.0",
    ),
    rejects_type(
        "kl: lists",
        lambda _: DiagonalGaussian([1.0], [1.0]).kl_to_standard_normal(),
        f"`mean` to be a tensor, {TENSOR_LIST}",
    ),
    rejects(
        "kl: numbers",
        lambda _: DiagonalGaussian(torch.tensor(0.0), torch.tensor(1.0)).kl_to_standard_normal(),
        r"`mean` to have shape \(\.\.\., K\), but got \(\)",
    ),
    rejects(
        "rsample: nan", lambda _: with_mean(NAN).rsample(), "`mean` to be finite, but got 1 NaN .*"
    ),
    rejects(
        "rsample: devices",
        lambda g: g._replace(std=meta(B, M, Q, K)).rsample(),
        "`std` to be on cpu, but got meta",
    ),
    rejects_type(
        "to_distribution: integers",
        lambda g: g._replace(mean=torch.ones(B, M, Q, K).int()).to_distribution(),
        r"`mean` to have a floating dtype \(.*\), but got torch.int32",
    ),
    rejects(
        "embedding: of nothing",
        lambda g: g.embedding(False, False),
        "`use_mean` or `use_std` to be True, but got False for both",
    ),
    rejects_type(
        "embedding: a word",
        lambda g: g.embedding("no"),
        "`use_mean` to be True or False, but got 'no'",
    ),
    rejects(
        "joint embedding: shapes differ",
        lambda g: g._replace(std=torch.ones(B, M, Q, K + 1)).embedding(joint=True),
        "`std` " + SHAPE.format("d0=3, d1=2, d2=3, d3=4", "3, 2, 3, 5"),
    ),
    rejects(
        "joint embedding: nan",
        lambda _: with_std(NAN).embedding(joint=True),
        "`std` to be finite, but got 1 NaN .*",
    ),
    rejects(
        "product: rank",
        lambda _: latent((B, Q, K)).product(),
        "`mean` " + SHAPE.format("B, M, Q, K", "3, 3, 4"),
    ),
    rejects(
        "product: negative std",
        lambda _: with_std(-1.0).product(),
        r"`std` to be in \[0, inf\], but got -1.0",
    ),
    rejects_type(
        "product: missing of numbers",
        lambda g: g.product(torch.zeros(B, M)),
        "`missing` to have a bool dtype, but got torch.float32",
    ),
    rejects(
        "product: missing of another batch",
        lambda g: g.product(torch.zeros(B + 1, M).bool()),
        "`missing` " + SHAPE.format("B=3, M=2", "4, 2"),
    ),
    rejects(
        "product: prior of another size",
        lambda g: g.product(prior_mean=torch.ones(Q, K + 1)),
        r"`prior_mean` to be broadcastable to \(B, Q, K\) = \(3, 3, 4\), but got \(3, 5\)",
    ),
    rejects(
        "product: prior of too many dimensions",
        lambda g: g.product(prior_mean=torch.ones(1, B, Q, K)),
        r"`prior_mean` to be broadcastable to \(B, Q, K\) = \(3, 3, 4\), but got \(1, 3, 3, 4\)",
    ),
    rejects_type(
        "product: prior a list",
        lambda g: g.product(prior_mean=[0.0]),
        f"`prior_mean` to be a tensor, {TENSOR_LIST}",
    ),
    rejects(
        "product: prior nan",
        lambda g: g.product(prior_mean=torch.full((K,), NAN)),
        "`prior_mean` to be finite, but got 4 NaN .*",
    ),
    rejects(
        "product: prior on another device",
        lambda g: g.product(prior_mean=meta(K)),
        "`prior_mean` to be on cpu, but got meta",
    ),
]


def decoupler(folder=None):
    torch.manual_seed(0)
    return umm.GaussianDecoupler(M, D, K, hidden_dims=(6,), dropout=0)


def build_decoupler(**change):
    return lambda _: umm.GaussianDecoupler(**({"num_modalities": M, "in_dim": D} | change))


DECOUPLER = [
    rejects("no modality", build_decoupler(num_modalities=0), f"`num_modalities` {POSITIVE} 0"),
    rejects_type(
        "latent size of None", build_decoupler(latent_dim=None), f"`latent_dim` {POSITIVE} None"
    ),
    rejects_type(
        "hidden_dims a number",
        build_decoupler(hidden_dims=5),
        "`hidden_dims` to be a sequence, but got 5",
    ),
    rejects_type(
        "hidden_dims a word",
        build_decoupler(hidden_dims="12"),
        rf"`hidden_dims\[0\]` {POSITIVE} '1'",
    ),
    rejects(
        "a hidden layer of 0",
        build_decoupler(hidden_dims=(4, 0)),
        rf"`hidden_dims\[1\]` {POSITIVE} 0",
    ),
    rejects(
        "min_std 0",
        build_decoupler(min_std=0.0),
        r"`min_std` to be a number in \(0, 1\), but got 0.0",
    ),
    rejects(
        "min_std nan",
        build_decoupler(min_std=NAN),
        r"`min_std` to be a number in \(0, 1\), but got nan",
    ),
    rejects(
        "dropout negative",
        build_decoupler(dropout=-0.1),
        r"`dropout` to be a number in \[0, 1\), but got -0.1",
    ),
    rejects_type(
        "normalize_mean 1",
        build_decoupler(normalize_mean=1),
        "`normalize_mean` to be True or False, but got 1",
    ),
    rejects(
        "too few modalities",
        lambda d: d(torch.ones(B, 1, Q, D)),
        "`z` " + SHAPE.format("B, M=2, Q, in_dim=5", "3, 1, 3, 5"),
    ),
    rejects(
        "wrong rank",
        lambda d: d(torch.ones(B, Q, D)),
        "`z` " + SHAPE.format("B, M=2, Q, in_dim=5", "3, 3, 5"),
    ),
    rejects_type(
        "another dtype",
        lambda d: d(torch.ones(B, M, Q, D).half()),
        "`z` to have the dtype of the module, torch.float32, but got torch.float16",
    ),
    rejects(
        "another device",
        lambda d: d(meta(B, M, Q, D)),
        "`z` to be on cpu, where the module is, but got meta",
    ),
    rejects(
        "infinite",
        lambda d: d(filled((B, M, Q, D), 1.0, (0, 0, 0, 0), INF)),
        "`z` to be finite, but got 1 NaN or infinite values",
    ),
    rejects(
        "missing transposed",
        lambda d: d(torch.ones(B, M, Q, D), torch.zeros(M, B).bool()),
        "`missing` " + SHAPE.format("B=3, M=2", "2, 3"),
    ),
]

# ----------------------------------------------------------------------------------------- the queue


def queue_with_rows(folder=None):
    """A queue that has wrapped around."""
    torch.manual_seed(0)
    loss = umm.DistributionSupConLoss(M, Q, K, queue_size=20)
    for _ in range(2):
        loss(
            DiagonalGaussian(torch.randn(B, M, Q, K), torch.rand(B, M, Q, K)),
            torch.randint(2, (B, Q)),
        )
    return loss


LABELS = torch.tensor([[0, 1, 0], [1, 1, 0], [0, 0, 1]])


def build_supcon(**change):
    sizes = {"num_modalities": M, "num_labels": Q, "latent_dim": K}
    return lambda _: umm.DistributionSupConLoss(**(sizes | change))


def state_of_queue(**changes):
    """The state of a queue of 20 rows, changed."""
    state = {
        "queue": torch.ones(20, 2 * K),
        "queue_classes": torch.zeros(20).long(),
        "queue_pointer": torch.tensor(7),
    }
    return {name: value for name, value in (state | changes).items() if value is not None}


CONTRASTIVE = [
    rejects("no label", build_supcon(num_labels=0), f"`num_labels` {POSITIVE} 0"),
    rejects_type(
        "queue_size False", build_supcon(queue_size=False), f"`queue_size` {POSITIVE} False"
    ),
    rejects_type(
        "queue_size a fraction", build_supcon(queue_size=0.5), f"`queue_size` {POSITIVE} 0.5"
    ),
    rejects(
        "temperature negative",
        build_supcon(temperature=-1),
        "`temperature` to be a number above 0, but got -1",
    ),
    rejects(
        "temperature nan",
        build_supcon(temperature=NAN),
        "`temperature` to be a number above 0, but got nan",
    ),
    rejects(
        "anchors unknown",
        build_supcon(anchors="positive"),
        r"`anchors` to be one of \['all', 'present'\], but got 'positive'",
    ),
    rejects(
        "reduction unknown",
        build_supcon(reduction=None),
        r"`reduction` to be one of \['mean', 'none', 'sum'\], but got None",
    ),
    rejects_type("joint 0", build_supcon(joint=0), "`joint` to be True or False, but got 0"),
    rejects_type(
        "validate_args 1",
        build_supcon(validate_args=1),
        "`validate_args` to be True or False, but got 1",
    ),
    rejects_type(
        "latent a tuple",
        lambda q: q((torch.ones(B, M, Q, K),) * 2, LABELS),
        "`latent` to be a DiagonalGaussian, but got tuple",
    ),
    rejects(
        "latent of other labels",
        lambda q: q(latent((B, M, Q + 1, K)), LABELS),
        "`latent.mean` " + SHAPE.format("B, M=2, Q=3, K=4", "3, 2, 4, 4"),
    ),
    rejects(
        "nan in the mean",
        lambda q: q(with_mean(NAN), LABELS),
        "`latent.mean` to be finite, but got 1 NaN .*",
    ),
    rejects(
        "infinite std",
        lambda q: q(with_std(INF), LABELS),
        "`latent.std` to be finite, but got 1 NaN .*",
    ),
    rejects(
        "negative std",
        lambda q: q(with_std(-0.5), LABELS),
        r"`latent.std` to be in \[0, inf\], but got -0.5",
    ),
    rejects(
        "std on another device",
        lambda q: q(latent()._replace(std=meta(B, M, Q, K)), LABELS),
        "`latent.std` to be on cpu, but got meta",
    ),
    rejects(
        "all on another device",
        lambda q: q(DiagonalGaussian(meta(B, M, Q, K), meta(B, M, Q, K)), meta(B, Q)),
        "`latent` to be on cpu, but got meta",
    ),
    rejects(
        "a label of 2",
        lambda q: q(latent(), LABELS + 1),
        "`labels` to hold only 0 and 1, but got 2",
    ),
    rejects(
        "a label of -1",
        lambda q: q(latent(), LABELS - 1),
        "`labels` to hold only 0 and 1, but got -1",
    ),
    rejects(
        "a label of 0.5",
        lambda q: q(latent(), LABELS / 2),
        "`labels` to hold only 0 and 1, but got 0.5",
    ),
    rejects(
        "a label of nan",
        lambda q: q(latent(), LABELS * NAN),
        "`labels` to hold only 0 and 1, but got nan",
    ),
    rejects_type(
        "complex labels",
        lambda q: q(latent(), LABELS + 0j),
        "`labels` to have a number dtype, but got torch.complex64",
    ),
    rejects(
        "labels of another batch",
        lambda q: q(latent(), LABELS[:2]),
        "`labels` " + SHAPE.format("B=3, Q=3", "2, 3"),
    ),
    rejects(
        "class numbers for labels",
        lambda q: q(latent(), ints(0, 1, 2)),
        "`labels` " + SHAPE.format("B=3, Q=3", "3,"),
    ),
    rejects_type(
        "missing of numbers",
        lambda q: q(latent(), LABELS, torch.zeros(B, M).int()),
        "`missing` to have a bool dtype, but got torch.int32",
    ),
    rejects(
        "missing for labels",
        lambda q: q(latent(), LABELS, torch.zeros(B, Q).bool()),
        "`missing` " + SHAPE.format("B=3, M=2", "3, 3"),
    ),
    rejects_type(
        "enqueue a word",
        lambda q: q(latent(), LABELS, enqueue="no"),
        "`enqueue` to be True or False, but got 'no'",
    ),
    Bad(
        "state of a longer queue",
        lambda q: q.load_state_dict(build_supcon(queue_size=30)(None).state_dict()),
        RuntimeError,
        r"Expected `queue` to have shape \(20, 8\), but got \(30, 8\)",
    ),
    Bad(
        "state of another embedding",
        lambda q: q.load_state_dict(state_of_queue(queue=torch.ones(20, K))),
        RuntimeError,
        r"Expected `queue` to have shape \(20, 8\), but got \(20, 4\)",
    ),
    Bad(
        "state without a pointer",
        lambda q: q.load_state_dict(state_of_queue(queue_pointer=None)),
        RuntimeError,
        'Missing key.*"queue_pointer"',
    ),
    Bad(
        "state of another class",
        lambda q: q.load_state_dict(umm.PlattScaling(Q).state_dict()),
        RuntimeError,
        'Missing key.*"queue", "queue_classes", "queue_pointer"',
    ),
    Bad(
        "state that holds a list",
        lambda q: q.load_state_dict(state_of_queue(queue_classes=[0] * 20)),
        RuntimeError,
        r"Expected `queue_classes` to have shape \(20,\), but got list",
    ),
]

# -------------------------------------------------------------------------------------------- fusion


def fusion(folder=None, **options):
    torch.manual_seed(0)
    return umm.UncertaintyGatedFusion(M, Q, K, hidden_dim=6, dropout=0, **options)


def build_fusion(**change):
    sizes = {"num_modalities": M, "num_labels": Q, "latent_dim": K}
    return lambda _: umm.UncertaintyGatedFusion(**(sizes | change))


FUSION = [
    rejects("negative size", build_fusion(latent_dim=-3), f"`latent_dim` {POSITIVE} -3"),
    rejects("hidden layer of 0", build_fusion(hidden_dim=0), f"`hidden_dim` {POSITIVE} 0"),
    rejects(
        "dropout nan",
        build_fusion(dropout=NAN),
        r"`dropout` to be a number in \[0, 1\), but got nan",
    ),
    rejects(
        "mean_weight unknown",
        build_fusion(mean_weight="mean"),
        r"`mean_weight` to be one of \['certainty', 'uncertainty'\], but got 'mean'",
    ),
    rejects(
        "combine unknown",
        build_fusion(combine=["concat"]),
        r"`combine` to be one of \['concat', 'product'\], but got \['concat'\]",
    ),
    rejects(
        "uncertainty a number",
        lambda f: f(latent(), torch.tensor(0.5)),
        "`uncertainty` " + SHAPE.format("B=3, Q=3", ""),
    ),
    rejects(
        "uncertainty of another batch",
        lambda f: f(latent(), torch.zeros(4)),
        "`uncertainty` " + SHAPE.format("B=3", "4,"),
    ),
    rejects(
        "uncertainty above 1",
        lambda f: f(latent(), torch.full((B,), 1.5)),
        r"`uncertainty` to be in \[0, 1\], but got 1.5",
    ),
    rejects(
        "uncertainty negative",
        lambda f: f(latent(), torch.full((B, Q), -0.5)),
        r"`uncertainty` to be in \[0, 1\], but got -0.5",
    ),
    rejects(
        "uncertainty nan",
        lambda f: f(latent(), torch.full((B,), NAN)),
        r"`uncertainty` to be in \[0, 1\], but got nan",
    ),
    rejects_type(
        "uncertainty bool",
        lambda f: f(latent(), torch.ones(B).bool()),
        r"`uncertainty` to have a floating dtype \(.*\), but got torch.bool",
    ),
    rejects_type(
        "uncertainty a float",
        lambda f: f(latent(), 0.5),
        "`uncertainty` to be a tensor, but got float",
    ),
    rejects(
        "uncertainty on another device",
        lambda f: f(latent(), meta(B)),
        "`uncertainty` to be on cpu, but got meta",
    ),
    rejects(
        "latent of another width",
        lambda f: f(latent((B, M, Q, K + 1)), torch.zeros(B)),
        "`latent.mean` " + SHAPE.format("B, M=2, Q=3, K=4", "3, 2, 3, 5"),
    ),
    rejects_type(
        "latent in half precision",
        lambda f: f(DiagonalGaussian(*(x.half() for x in latent())), torch.zeros(B)),
        "`latent` to have the dtype of the module, torch.float32, but got torch.float16",
    ),
    rejects(
        "missing of another width",
        lambda f: f(latent(), torch.zeros(B), torch.zeros(B, M + 1).bool()),
        "`missing` " + SHAPE.format("B=3, M=2", "3, 3"),
    ),
]

# ---------------------------------------------------------------------------------------- ordinality


def ordinal(change, mask=None):
    arguments = {"std_norm": torch.ones(B), "distance": torch.ones(B), "correctness": torch.ones(B)}
    return lambda loss: loss(**(arguments | change), mask=mask)


def build_ordinality(**change):
    return lambda _: umm.SoftRankOrdinalityLoss(**change)


ORDINALITY = [
    rejects(
        "mode unknown",
        build_ordinality(mode="ranks"),
        r"`mode` to be one of \['rank', 'raw', 'standardized'\], but got 'ranks'",
    ),
    rejects_type(
        "pairs a word",
        build_ordinality(pairs="SR"),
        r"`pairs` to be a sequence such as \(.*\), but got 'SR'",
    ),
    rejects(
        "no pair", build_ordinality(pairs=()), "`pairs` to name at least one pair, but got none"
    ),
    rejects(
        "pair unknown",
        build_ordinality(pairs=("RS",)),
        r"`pairs` to be one of \['DR', 'DS', 'SR'\], but got 'RS'",
    ),
    rejects(
        "pair twice",
        build_ordinality(pairs=("SR", "SR")),
        r"`pairs` to name each pair once, but got \('SR', 'SR'\)",
    ),
    rejects(
        "temperature 0",
        build_ordinality(temperature=0),
        "`temperature` to be a number above 0, but got 0",
    ),
    rejects_type(
        "temperature a tensor",
        build_ordinality(temperature=torch.tensor(1.0)),
        r"`temperature` to be a number above 0, but got tensor\(1\.\)",
    ),
    rejects(
        "std_norm 0", ordinal({"std_norm": torch.zeros(B)}), "`std_norm` to be above 0, but got 0.0"
    ),
    rejects(
        "std_norm nan",
        ordinal({"std_norm": torch.full((B,), NAN)}),
        "`std_norm` to be finite, but got 3 NaN .*",
    ),
    rejects(
        "std_norm of a matrix",
        ordinal({"std_norm": torch.ones(B, 1)}),
        "`std_norm` " + SHAPE.format("B", "3, 1"),
    ),
    rejects(
        "distance above 1",
        ordinal({"distance": torch.full((B,), 2.0)}),
        r"`distance` to be in \[0, 1\], but got 2.0",
    ),
    rejects(
        "distance of another batch",
        ordinal({"distance": torch.ones(2)}),
        "`distance` " + SHAPE.format("B=3", "2,"),
    ),
    rejects(
        "correctness negative",
        ordinal({"correctness": -torch.ones(B)}),
        r"`correctness` to be in \[0, 1\], but got -1.0",
    ),
    rejects_type(
        "correctness bool",
        ordinal({"correctness": torch.ones(B).bool()}),
        r"`correctness` to have a floating dtype \(.*\), but got torch.bool",
    ),
    rejects(
        "correctness on another device",
        ordinal({"correctness": meta(B)}),
        "`correctness` to be on cpu, but got meta",
    ),
    rejects_type(
        "mask of numbers",
        ordinal({}, torch.zeros(B)),
        "`mask` to have a bool dtype, but got torch.float32",
    ),
    rejects(
        "mask of another batch",
        ordinal({}, torch.zeros(2).bool()),
        "`mask` " + SHAPE.format("B=3", "2,"),
    ),
]

# ------------------------------------------------------------------------------------------- tracker


def tracker_with_history(folder=None):
    tracker = umm.CorrectnessTracker(5, Q)
    tracker.update(ints(0, 1, 1), torch.tensor([[1, 0, 1], [1, 1, 0], [0, 1, 0]]).bool())
    return tracker


def update(indices=None, correct=None, mask=None):
    indices = ints(0, 4) if indices is None else indices
    correct = torch.ones(2, Q) if correct is None else correct
    return lambda tracker: tracker.update(indices, correct, mask)


TRACKER = [
    rejects("no sample", lambda _: umm.CorrectnessTracker(0), f"`num_samples` {POSITIVE} 0"),
    rejects("no label", lambda _: umm.CorrectnessTracker(5, 0), f"`num_labels` {POSITIVE} 0"),
    rejects(
        "prior above 1",
        lambda _: umm.CorrectnessTracker(5, prior=2),
        r"`prior` to be a number in \[0, 1\], but got 2",
    ),
    rejects_type(
        "prior a word",
        lambda _: umm.CorrectnessTracker(5, prior="0"),
        r"`prior` to be a number in \[0, 1\], but got '0'",
    ),
    rejects(
        "index too large",
        update(ints(0, 5)),
        r"`indices` to be in \[0, 4\], but got values from 0 to 5",
    ),
    rejects(
        "index negative",
        update(ints(-1, 0)),
        r"`indices` to be in \[0, 4\], but got values from -1 to 0",
    ),
    rejects_type(
        "a mask for indices",
        update(torch.tensor([True, False])),
        r"`indices` to have an integer dtype \(.*\), but got torch.bool",
    ),
    rejects_type(
        "indices of 16 bits without sign",
        update(ints(0, 1).to(torch.uint16)),
        r"`indices` to have an integer dtype \(.*\), but got torch.uint16",
    ),
    rejects_type(
        "fractions for indices",
        update(torch.tensor([0.0, 1.0])),
        r"`indices` to have an integer dtype \(.*\), but got torch.float32",
    ),
    rejects_type("a list for indices", update([0, 1]), f"`indices` to be a tensor, {TENSOR_LIST}"),
    rejects(
        "indices on another device",
        update(meta(2, dtype=torch.int64)),
        "`indices` to be on cpu, but got meta",
    ),
    rejects(
        "reading: index too large",
        lambda t: t(ints(9)),
        r"`indices` to be in \[0, 4\], but got values from 9 to 9",
    ),
    rejects(
        "counts: index negative",
        lambda t: t.counts(ints(-2)),
        r"`indices` to be in \[0, 4\], but got values from -2 to -2",
    ),
    rejects(
        "forgetting: wrong rank",
        lambda t: t.forgetting_events(ints([0])),
        "`indices` " + SHAPE.format("B", "1, 1"),
    ),
    rejects(
        "correct without labels",
        update(correct=torch.ones(2)),
        "`correct` " + SHAPE.format("B=2, Q=3", "2,"),
    ),
    rejects(
        "correct of another batch",
        update(correct=torch.ones(3, Q)),
        "`correct` " + SHAPE.format("B=2, Q=3", "3, 3"),
    ),
    rejects(
        "correct above 1",
        update(correct=torch.full((2, Q), 1.5)),
        r"`correct` to be in \[0, 1\], but got 1.5",
    ),
    rejects(
        "correct nan",
        update(correct=filled((2, Q), 1.0, (1, 2), NAN)),
        r"`correct` to be in \[0, 1\], but got nan",
    ),
    rejects_type(
        "correct an integer",
        update(correct=torch.ones(2, Q).long()),
        "`correct` to have a bool or floating dtype, but got torch.int64",
    ),
    rejects(
        "correct on another device",
        update(correct=meta(2, Q)),
        "`correct` to be on cpu, but got meta",
    ),
    rejects_type(
        "mask of numbers",
        update(mask=torch.zeros(2, Q)),
        "`mask` to have a bool dtype, but got torch.float32",
    ),
    rejects(
        "mask of samples",
        update(mask=torch.zeros(2).bool()),
        "`mask` " + SHAPE.format("B=2, Q=3", "2,"),
    ),
    Bad(
        "state of more samples",
        lambda t: t.load_state_dict(umm.CorrectnessTracker(6, Q).state_dict()),
        RuntimeError,
        r"Expected `history` to have shape \(3, 5, 3\), but got \(3, 6, 3\)",
    ),
    Bad(
        "state without the last predictions",
        lambda t: t.load_state_dict({"history": torch.ones(3, 5, Q, dtype=torch.int64)}),
        RuntimeError,
        'Missing key.*"last"',
    ),
]

# --------------------------------------------------------------------------------------- calibration


def calibration(folder=None):
    torch.manual_seed(0)
    return umm.PlattScaling(Q).fit(torch.randn(20, Q), torch.randint(2, (20, Q)))


CALIBRATION = [
    rejects_type(
        "labels by name",
        lambda _: umm.PlattScaling(["happy"]),
        rf"`num_labels` {POSITIVE} \['happy'\]",
    ),
    rejects_type(
        "per_label None",
        lambda _: umm.PlattScaling(Q, per_label=None),
        "`per_label` to be True or False, but got None",
    ),
    rejects_type(
        "shift 0", lambda _: umm.PlattScaling(Q, shift=0), "`shift` to be True or False, but got 0"
    ),
    rejects(
        "logits of one sample",
        lambda c: c(torch.zeros(Q)),
        "`logits` " + SHAPE.format("B, Q=3", "3,"),
    ),
    rejects(
        "logits of other labels",
        lambda c: c(torch.zeros(B, 2)),
        "`logits` " + SHAPE.format("B, Q=3", "3, 2"),
    ),
    rejects(
        "infinite logits",
        lambda c: c(torch.full((B, Q), INF)),
        "`logits` to be finite, but got 9 NaN .*",
    ),
    rejects_type(
        "integer logits",
        lambda c: c(torch.zeros(B, Q).long()),
        r"`logits` to have a floating dtype \(.*\), but got torch.int64",
    ),
    rejects(
        "logits on another device", lambda c: c(meta(B, Q)), "`logits` to be on cpu, but got meta"
    ),
    rejects(
        "fit: nan",
        lambda c: c.fit(torch.full((B, Q), NAN), LABELS),
        "`logits` to be finite, but got 9 NaN .*",
    ),
    rejects(
        "fit: no sample",
        lambda c: c.fit(torch.zeros(0, Q), torch.zeros(0, Q)),
        "`logits` to hold at least one sample, but got none",
    ),
    rejects(
        "fit: labels of another batch",
        lambda c: c.fit(torch.zeros(B, Q), LABELS[:2]),
        "`labels` " + SHAPE.format("B=3, Q=3", "2, 3"),
    ),
    rejects(
        "fit: a label of 3",
        lambda c: c.fit(torch.zeros(B, Q), LABELS * 3),
        "`labels` to hold only 0 and 1, but got 3",
    ),
    rejects(
        "fit: soft labels",
        lambda c: c.fit(torch.zeros(B, Q), LABELS * 0.5),
        "`labels` to hold only 0 and 1, but got 0.5",
    ),
    rejects(
        "fit: labels on another device",
        lambda c: c.fit(torch.zeros(B, Q), meta(B, Q)),
        "`labels` to be on cpu, but got meta",
    ),
    rejects_type(
        "fit: labels of lists",
        lambda c: c.fit(torch.zeros(B, Q), LABELS.tolist()),
        f"`labels` to be a tensor, {TENSOR_LIST}",
    ),
    Bad(
        "state of other labels",
        lambda c: c.load_state_dict({"scale": torch.full((Q,), 2.0), "shift": torch.ones(2)}),
        RuntimeError,
        r"Expected `shift` to have shape \(3,\), but got \(2,\)",
    ),
    Bad(
        "state of another class",
        lambda c: c.load_state_dict(umm.CorrectnessTracker(3).state_dict()),
        RuntimeError,
        'Missing key.*"scale", "shift"',
    ),
]

# ---------------------------------------------------------------------------------------- functional

ROWS, CLASSES = torch.eye(4), ints(0, 0, 1, 1)


def supcon(embeddings=ROWS, classes=CLASSES, **options):
    return lambda _: functional.supcon_loss(embeddings, classes, **options)


FUNCTIONAL = [
    rejects("supcon: vector", supcon(torch.ones(4)), "`embeddings` " + SHAPE.format("N, E", "4,")),
    rejects(
        "supcon: without features",
        supcon(torch.ones(4, 0)),
        r"`embeddings` to have at least one feature, but got shape \(4, 0\)",
    ),
    rejects(
        "supcon: nan",
        supcon(filled((4, 4), 1.0, (0, 0), NAN)),
        "`embeddings` to be finite, but got 1 NaN .*",
    ),
    rejects_type(
        "supcon: bool classes",
        supcon(classes=CLASSES.bool()),
        r"`classes` to have an integer dtype \(.*\), but got torch.bool",
    ),
    rejects_type(
        "supcon: classes without sign",
        supcon(classes=CLASSES.to(torch.uint32)),
        r"`classes` to have an integer dtype \(.*\), but got torch.uint32",
    ),
    rejects(
        "supcon: too few classes",
        supcon(classes=CLASSES[:3]),
        "`classes` " + SHAPE.format("N=4", "3,"),
    ),
    rejects(
        "supcon: classes elsewhere",
        supcon(classes=meta(4, dtype=torch.int64)),
        "`classes` to be on cpu, but got meta",
    ),
    rejects_type(
        "supcon: anchors by number",
        supcon(anchor_mask=ints(0, 1, 1, 1)),
        "`anchor_mask` to have a bool dtype, but got torch.int64",
    ),
    rejects(
        "supcon: bank without classes",
        supcon(bank=ROWS),
        "`bank` and `bank_classes` together, but got `bank` without `bank_classes`",
    ),
    rejects(
        "supcon: bank of another width",
        supcon(bank=torch.ones(2, 3), bank_classes=ints(0, 1)),
        "`bank` " + SHAPE.format("Q, E=4", "2, 3"),
    ),
    rejects(
        "supcon: infinite bank",
        supcon(bank=torch.full((1, 4), INF), bank_classes=ints(0)),
        "`bank` to be finite, but got 4 NaN .*",
    ),
    rejects(
        "supcon: temperature infinite",
        supcon(temperature=INF),
        "`temperature` to be a number above 0, but got inf",
    ),
    rejects(
        "supcon: reduction unknown",
        supcon(reduction="avg"),
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
        "distance: logits",
        lambda _: functional.prediction_distance(torch.full((B, Q), 2.0), LABELS),
        r"`probs` to be in \[0, 1\], but got 2.0",
    ),
    rejects(
        "distance: label -1",
        lambda _: functional.prediction_distance(torch.full((B, Q), 0.5), LABELS - 1),
        "`labels` to hold only 0 and 1, but got -1",
    ),
    rejects(
        "distance: other shape",
        lambda _: functional.prediction_distance(torch.full((B, Q), 0.5), LABELS[0]),
        "`labels` " + SHAPE.format("d0=3, d1=3", "3,"),
    ),
    rejects(
        "expected distance: nan",
        lambda _: functional.expected_distance(torch.full((2,), NAN)),
        r"`probs` to be in \[0, 1\], but got nan",
    ),
    rejects_type(
        "expected distance: sparse",
        lambda _: functional.expected_distance(torch.ones(2, 2).to_sparse()),
        "`probs` to be a dense tensor, but got torch.sparse_coo",
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

# ------------------------------------------------------------------------------ measures and metrics

PROBS = torch.full((B, Q), 0.25)
SCORES = torch.tensor([0.1, 0.5, 0.3])

MEASURES = [
    rejects(
        "calibration: logits",
        lambda _: measures.calibration_error(PROBS * 8, LABELS),
        r"`probs` to be in \[0, 1\], but got 2.0",
    ),
    rejects(
        "calibration: labels of another shape",
        lambda _: measures.calibration_error(PROBS, LABELS.T[:2]),
        "`labels` " + SHAPE.format("N=3, Q=3", "2, 3"),
    ),
    rejects(
        "calibration: labels elsewhere",
        lambda _: measures.calibration_error(PROBS, meta(B, Q)),
        "`labels` to be on cpu, but got meta",
    ),
    rejects(
        "calibration: bins 0",
        lambda _: measures.calibration_error(PROBS, LABELS, bins=0),
        f"`bins` {POSITIVE} 0",
    ),
    rejects(
        "calibration: binning unknown",
        lambda _: measures.calibration_error(PROBS, LABELS, binning="equal"),
        r"`binning` to be one of \['mass', 'width'\], but got 'equal'",
    ),
    rejects(
        "calibration: norm a number",
        lambda _: measures.calibration_error(PROBS, LABELS, norm=1),
        r"`norm` to be one of \['l1', 'l2', 'max'\], but got 1",
    ),
    rejects(
        "brier: average unknown",
        lambda _: measures.brier_decomposition(PROBS, LABELS, average="micro"),
        r"`average` to be one of \['macro', 'none'\], but got 'micro'",
    ),
    rejects_type(
        "brier: integer probabilities",
        lambda _: measures.brier_decomposition(LABELS, LABELS),
        r"`probs` to have a floating dtype \(.*\), but got torch.int64",
    ),
    rejects(
        "risk: infinite",
        lambda _: measures.risk_coverage(SCORES, SCORES / 0),
        "`uncertainty` to be finite, but got 3 NaN .*",
    ),
    rejects(
        "risk: lengths differ",
        lambda _: measures.risk_coverage(SCORES, SCORES[:2]),
        "`uncertainty` " + SHAPE.format("N=3", "2,"),
    ),
    rejects(
        "risk: devices",
        lambda _: measures.risk_coverage(SCORES, meta(3)),
        "`uncertainty` to be on cpu, but got meta",
    ),
    rejects(
        "auroc: matrix",
        lambda _: measures.auroc(PROBS, SCORES),
        "`positive` " + SHAPE.format("N", "3, 3"),
    ),
    rejects(
        "auroc: devices",
        lambda _: measures.auroc(SCORES, meta(3)),
        "`negative` to be on cpu, but got meta",
    ),
    rejects_type(
        "auroc: list",
        lambda _: measures.auroc(SCORES, [0.5]),
        f"`negative` to be a tensor, {TENSOR_LIST}",
    ),
    rejects(
        "spearman: nan",
        lambda _: measures.spearman(SCORES, SCORES * NAN),
        "`y` to be finite, but got 3 NaN .*",
    ),
    rejects_type(
        "spearman: complex",
        lambda _: measures.spearman(SCORES + 0j, SCORES),
        "`x` to have a number dtype, but got torch.complex64",
    ),
    rejects(
        "jaccard: threshold 2",
        lambda _: measures.sample_jaccard(PROBS, LABELS, threshold=2),
        r"`threshold` to be a number in \[0, 1\], but got 2",
    ),
    rejects(
        "jaccard: label 2",
        lambda _: measures.sample_jaccard(PROBS, LABELS * 2),
        "`labels` to hold only 0 and 1, but got 2",
    ),
    rejects(
        "entropy: negative",
        lambda _: measures.predictive_entropy(-PROBS),
        r"`probs` to be in \[0, 1\], but got -0.25",
    ),
    rejects(
        "entropy: vector",
        lambda _: measures.predictive_entropy(SCORES),
        "`probs` " + SHAPE.format("N, Q", "3,"),
    ),
    rejects(
        "attribution: size 0",
        lambda _: measures.modality_attribution(PROBS * 0),
        "`sizes` to be above 0, but got 0.0",
    ),
    rejects(
        "attribution: missing of another shape",
        lambda _: measures.modality_attribution(PROBS, torch.zeros(B, 2).bool()),
        "`missing` " + SHAPE.format("B=3, M=3", "3, 2"),
    ),
]


def metrics_of_a_batch(folder=None):
    """One of each, after a batch."""
    made = {
        "ece": metrics.MultilabelCalibrationError(Q, bins=4),
        "mass": metrics.MultilabelCalibrationError(Q, bins=4, binning="mass"),
        "brier": metrics.MultilabelBrierDecomposition(Q, bins=4),
        "jaccard": metrics.SampleJaccard(threshold=0.2),
        "aurc": metrics.AURC(),
        "auroc": metrics.DetectionAUROC(),
        "spearman": metrics.SpearmanCorrelation(),
    }
    for name, metric in made.items():
        metric.update(*good_batch(name))
    return made


def good_batch(name):
    return (
        (PROBS, LABELS) if name in ("ece", "mass", "brier", "jaccard") else (SCORES, ints(0, 1, 0))
    )


METRICS = [
    rejects(
        "labels by 0", lambda _: metrics.MultilabelCalibrationError(0), f"`num_labels` {POSITIVE} 0"
    ),
    rejects_type(
        "bins a fraction",
        lambda _: metrics.MultilabelBrierDecomposition(Q, bins=1.5),
        f"`bins` {POSITIVE} 1.5",
    ),
    rejects(
        "norm unknown",
        lambda _: metrics.MultilabelCalibrationError(Q, norm="l0"),
        r"`norm` to be one of \['l1', 'l2', 'max'\], but got 'l0'",
    ),
    rejects(
        "threshold nan",
        lambda _: metrics.SampleJaccard(threshold=NAN),
        r"`threshold` to be a number in \[0, 1\], but got nan",
    ),
    rejects_type(
        "excess a word",
        lambda _: metrics.AURC(excess="no"),
        "`excess` to be True or False, but got 'no'",
    ),
    *(
        case
        for name in ("ece", "mass", "brier", "jaccard")
        for case in (
            rejects(
                f"{name}: logits",
                lambda m, name=name: m[name].update(PROBS * 8, LABELS),
                r"`probs` to be in \[0, 1\], but got 2.0",
            ),
            rejects(
                f"{name}: logits by calling",
                lambda m, name=name: m[name](PROBS * 8, LABELS),
                r"`probs` to be in \[0, 1\], but got 2.0",
            ),
            rejects(
                f"{name}: label 2 by calling",
                lambda m, name=name: m[name](PROBS, LABELS * 2),
                "`labels` to hold only 0 and 1, but got 2",
            ),
        )
    ),
    rejects(
        "ece: other labels",
        lambda m: m["ece"](PROBS[:, :2], LABELS[:, :2]),
        "`probs` " + SHAPE.format("N, Q=3", "3, 2"),
    ),
    rejects(
        "aurc: nan by calling",
        lambda m: m["aurc"](SCORES, SCORES * NAN),
        "`uncertainty` to be finite, but got 3 NaN .*",
    ),
    rejects(
        "aurc: lengths differ",
        lambda m: m["aurc"].update(SCORES, SCORES[:2]),
        "`uncertainty` " + SHAPE.format("N=3", "2,"),
    ),
    rejects(
        "auroc: graded errors by calling",
        lambda m: m["auroc"](SCORES, SCORES),
        "`positive` to hold only 0 and 1, but got .*",
    ),
    rejects(
        "auroc: wrong shape by calling",
        lambda m: m["auroc"](SCORES, LABELS),
        "`positive` " + SHAPE.format("N=3", "3, 3"),
    ),
    rejects(
        "spearman: devices by calling",
        lambda m: m["spearman"](SCORES, meta(3)),
        "`y` to be on cpu, but got meta",
    ),
    rejects_type(
        "spearman: list",
        lambda m: m["spearman"].update([0.1], SCORES),
        f"`x` to be a tensor, {TENSOR_LIST}",
    ),
]

# --------------------------------------------------------------------------------------------- plots

PLOTS = [
    rejects(
        "reliability: out of range",
        lambda _: plots.reliability_diagram([[1.5]], [[1]]),
        r"`probs` to be in \[0, 1\], but got 1.5",
    ),
    rejects(
        "reliability: no sample",
        lambda _: plots.reliability_diagram(torch.zeros(0, 2), torch.zeros(0, 2)),
        r"`probs` to hold samples, but got shape \(0, 2\)",
    ),
    rejects(
        "reliability: bins 0",
        lambda _: plots.reliability_diagram([[0.5]], [[1]], bins=0),
        f"`bins` {POSITIVE} 0",
    ),
    rejects(
        "reliability: names of others",
        lambda _: plots.reliability_diagram([[0.5]], [[1]], ["a", "b"]),
        r"`label_names` to hold 1 names, but got \['a', 'b'\]",
    ),
    rejects(
        "reliability: one name as a word",
        lambda _: plots.reliability_diagram([[0.5]], [[1]], "a"),
        "`label_names` to hold 1 names, but got 'a'",
    ),
    rejects_type(
        "reliability: names a number",
        lambda _: plots.reliability_diagram([[0.5]], [[1]], 1),
        "`label_names` to hold names, but got 1",
    ),
    rejects(
        "reliability: axes missing",
        lambda _: plots.reliability_diagram([[0.5]], [[1]], ax=[]),
        r"`ax` to hold 1 Axes, but got \[\]",
    ),
    rejects_type(
        "words",
        lambda _: plots.risk_coverage(["a"], [0.5]),
        "`errors` to hold numbers, but got list",
    ),
    rejects(
        "rows of different lengths",
        lambda _: plots.attention_map([[0.5, 0.5], [1.0]]),
        r"`weights` to be an array, but got \[\[0.5, 0.5\], \[1.0\]\]",
    ),
    rejects_type(
        "complex numbers",
        lambda _: plots.attention_map(torch.ones(2, 2) + 0j),
        "`weights` to hold numbers, but got torch.complex64",
    ),
    rejects(
        "risk: no uncertainty",
        lambda _: plots.risk_coverage([0, 1], {}),
        "`uncertainty` to name at least one uncertainty, but got none",
    ),
    rejects(
        "risk: lengths differ",
        lambda _: plots.risk_coverage([0, 1], {"a": [0.5]}),
        "`uncertainty` " + SHAPE.format("N=2", "1,"),
    ),
    rejects_type(
        "risk: axes a word",
        lambda _: plots.risk_coverage([0, 1], [0.1, 0.2], ax="axes"),
        "`ax` to be an Axes, but got 'axes'",
    ),
    rejects(
        "noise: uncertainty 0",
        lambda _: plots.uncertainty_against_noise([[1.0]], [[0.0]]),
        "`std_norm` to be above 0, but got 0.0",
    ),
    rejects_type(
        "noise: missing by number",
        lambda _: plots.uncertainty_against_noise([[1.0]], [[1.0]], missing=[[0.0]]),
        "`missing` to have a bool dtype, but got torch.float64",
    ),
    rejects(
        "attribution: shares above 1",
        lambda _: plots.modality_attribution([0.0], [[2.0]]),
        r"`shares` to be in \[0, 1\], but got 2.0",
    ),
    rejects(
        "attribution: infinite level",
        lambda _: plots.modality_attribution([INF], [[1.0]]),
        "`levels` to be finite, but got 1 NaN .*",
    ),
    rejects(
        "t-SNE: two points",
        lambda _: plots.latent_tsne(torch.ones(1, 1, 2, 3)),
        "`embeddings` to show at least 3 points, but got 2",
    ),
    rejects(
        "t-SNE: perplexity 0",
        lambda _: plots.latent_tsne(torch.ones(4, 1, 1, 3), perplexity=0),
        "`perplexity` to be a number above 0, but got 0",
    ),
    rejects_type(
        "t-SNE: shown by number",
        lambda _: plots.latent_tsne(torch.ones(4, 1, 1, 3), shown=torch.ones(4, 1, 1)),
        "`shown` to have a bool dtype, but got torch.float32",
    ),
    rejects(
        "attention: no step",
        lambda _: plots.attention_map(torch.zeros(2, 0)),
        r"`weights` to hold samples, but got shape \(2, 0\)",
    ),
    rejects(
        "correlation: one label",
        lambda _: plots.label_correlation([[1], [0]], [[0.5], [0.5]]),
        r"`probs` to be at least \(2, 2\), but got \(2, 1\)",
    ),
]

# ------------------------------------------------------------------------------------------ data sets


def dataset(**change):
    torch.manual_seed(0)
    arguments = {
        "features": {"text": torch.rand(4, 3, 2), "audio": torch.rand(4, 2, 5)},
        "padding_mask": {"text": torch.zeros(4, 3).bool(), "audio": torch.ones(4, 2).bool()},
        "labels": ints([0, 1], [1, 1], [0, 0], [1, 0]),
        "label_names": ["happy", "sad"],
        "ids": list("abcd"),
        "soft_labels": torch.rand(4, 2),
    }
    return MultimodalDataset(**(arguments | change))


def build(**change):
    return lambda _: dataset(**change)


DATASET = [
    rejects_type(
        "features a list",
        build(features=[torch.rand(4, 3, 2)]),
        "`features` to be a mapping of names, but got list",
    ),
    rejects_type(
        "names that are numbers",
        build(features={1: torch.rand(4, 3, 2)}),
        "`features` to be a mapping of names, but got 1 .*",
    ),
    rejects(
        "modalities differ",
        build(padding_mask={"text": torch.zeros(4, 3).bool()}),
        r"`features` and `padding_mask` to name .*, but got \['audio', 'text'\] and \['text'\]",
    ),
    rejects(
        "no modality",
        build(features={}, padding_mask={}),
        r"`features` and `padding_mask` to name .*, but got \[\] and \[\]",
    ),
    rejects_type(
        "label_names a word",
        build(label_names="ab"),
        "`label_names` to be a sequence of names, but got 'ab'",
    ),
    rejects_type(
        "label_names a number",
        build(label_names=2),
        "`label_names` to be a sequence of names, but got int",
    ),
    rejects(
        "label twice",
        build(label_names=["sad", "sad"]),
        r"`label_names` to be different names, at least one, but got \['sad', 'sad'\]",
    ),
    rejects(
        "label 2", build(labels=torch.full((4, 2), 2)), "`labels` to hold only 0 and 1, but got 2"
    ),
    rejects(
        "labels for others",
        build(labels=torch.zeros(4, 3)),
        "`labels` " + SHAPE.format("N, Q=2", "4, 3"),
    ),
    rejects(
        "nan at a valid step",
        build(features={"text": torch.full((4, 3, 2), NAN), "audio": torch.rand(4, 2, 5)}),
        r"`features\['text'\]` to be finite, but got 24 NaN .*",
    ),
    rejects(
        "modality without steps",
        build(features={"text": torch.rand(4, 0, 2), "audio": torch.rand(4, 2, 5)}),
        r"`features\['text'\]` to have steps and features, but got \(4, 0, 2\)",
    ),
    rejects(
        "samples differ",
        build(features={"text": torch.rand(3, 3, 2), "audio": torch.rand(4, 2, 5)}),
        r"`features\['text'\]` " + SHAPE.format("N=4, S, D", "3, 3, 2"),
    ),
    rejects(
        "features elsewhere",
        build(features={"text": meta(4, 3, 2), "audio": torch.rand(4, 2, 5)}),
        r"`features\['text'\]` to be on cpu, but got meta",
    ),
    rejects_type(
        "mask of numbers",
        build(padding_mask={"text": torch.zeros(4, 3), "audio": torch.zeros(4, 2).bool()}),
        r"`padding_mask\['text'\]` to have a bool dtype, but got torch.float32",
    ),
    rejects(
        "negative soft label",
        build(soft_labels=-torch.ones(4, 2)),
        r"`soft_labels` to be in \[0, .*\], but got -1.0",
    ),
    rejects_type(
        "ids a word", build(ids="abcd"), "`ids` to be a sequence of names, but got 'abcd'"
    ),
    rejects_type(
        "ids numbers",
        build(ids=[1, 2, 3, 4]),
        "`ids` to be a sequence of names, but got 1 among them",
    ),
    rejects("too few ids", build(ids=["a"]), "`ids` to name 4 samples, but got 1"),
    rejects(
        "invalid steps of another",
        build(invalid_steps={"face": 3}),
        r"`invalid_steps` to name modalities of \['text', 'audio'\], but got \['face'\]",
    ),
    rejects(
        "only: unknown",
        lambda d: d.only(["face"]),
        r"`modalities` to be among \['text', 'audio'\], but got \['face'\]",
    ),
    rejects(
        "only: a word",
        lambda d: d.only("text"),
        r"`modalities` to be among \['text', 'audio'\], but got 'text'",
    ),
    rejects_type(
        "only: a number", lambda d: d.only(1), "`modalities` to be a collection of names, but got 1"
    ),
    rejects_type(
        "select: a mask",
        lambda d: d.select(torch.tensor([True, False, True, True])),
        r"`indices` to have an integer dtype \(.*\), but got torch.bool",
    ),
    rejects_type(
        "select: fractions",
        lambda d: d.select([0.7]),
        r"`indices` to have an integer dtype \(.*\), but got torch.float32",
    ),
    rejects("select: lists", lambda d: d.select([[0]]), "`indices` " + SHAPE.format("n", "1, 1")),
    rejects_type(
        "select: names", lambda d: d.select(["a"]), r"`indices` to hold integers, but got \['a'\]"
    ),
    Bad("select: out of range", lambda d: d.select([4]), IndexError, "index 4 is out of bounds"),
    Bad("position out of range", lambda d: d[4], IndexError, "out of range"),
    Bad(
        "loader: batches of 0",
        lambda d: d.loader(0),
        ValueError,
        "batch_size .*positive integer.* got batch_size=0",
    ),
]


def world(folder=None):
    return SyntheticMMER(2, {"text": (3, 2, 0.5), "audio": (2, 2, 0.5)})


def draw(**change):
    """Calls the posterior of changed samples."""
    return lambda w: w.posterior(w.sample(3, seed=0)._replace(**change))


SYNTHETIC = [
    rejects(
        "too many labels", lambda _: SyntheticMMER(9), "`num_labels` to be at most 8, but got 9"
    ),
    rejects_type(
        "modalities a list",
        lambda _: SyntheticMMER(modalities=["text"]),
        "`modalities` to be a mapping, but got list",
    ),
    rejects_type(
        "modality a number",
        lambda _: SyntheticMMER(modalities={"text": 5}),
        r"`modalities\['text'\]` to be a SyntheticModality, but got 5",
    ),
    rejects_type(
        "modality of four numbers",
        lambda _: SyntheticMMER(modalities={"text": (1, 2, 0.3, 4)}),
        r"`modalities\['text'\]` to be a SyntheticModality, but got \(1, 2, 0.3, 4\)",
    ),
    rejects(
        "rate above 1",
        lambda _: SyntheticMMER(modalities={"text": (3, 2, 1.5)}),
        r"`modalities\['text'\].rate` to be a number in \[0, 1\], but got 1.5",
    ),
    rejects_type(
        "noise a number",
        lambda _: SyntheticMMER(noise=1.0),
        "`noise` to be a pair of numbers, but got 1.0",
    ),
    rejects(
        "noise from large to small",
        lambda _: SyntheticMMER(noise=(2.0, 1.0)),
        "`noise` to be a number above 0, .*, but got 2.0",
    ),
    rejects(
        "prior that does not sum to 1",
        lambda _: SyntheticMMER(1, prior=torch.ones(2)),
        "`prior` to sum to 1, but got 2.0",
    ),
    rejects_type(
        "seed a word", lambda _: SyntheticMMER(seed="a"), "`seed` to be an integer, but got 'a'"
    ),
    rejects_type(
        "draw: seed a fraction",
        lambda w: w.sample(3, seed=0.5),
        "`seed` to be an integer, but got 0.5",
    ),
    rejects(
        "draw: seed too large",
        lambda w: w.sample(3, seed=2**64),
        r"`seed` to be in \[-2\*\*63, 2\*\*64\), but got 18446744073709551616",
    ),
    rejects("draw: no sample", lambda w: w.sample(0, seed=0), f"`num_samples` {POSITIVE} 0"),
    rejects(
        "draw: noise 0",
        lambda w: w.sample(3, seed=0, noise=torch.zeros(3, 2)),
        r"`noise` to be in \[.*\], but got 0.0",
    ),
    rejects(
        "draw: noise of other modalities",
        lambda w: w.sample(3, seed=0, noise=torch.ones(3, 3)),
        "`noise` " + SHAPE.format("N=3, M=2", "3, 3"),
    ),
    rejects_type(
        "posterior of a number",
        lambda w: w.posterior(3),
        "`samples` to be SyntheticSamples, but got int",
    ),
    rejects(
        "posterior: modality lacking",
        draw(features={}),
        r"`samples` to have the modalities \['text', 'audio'\], but got \[\]",
    ),
    rejects(
        "posterior: negative noise",
        draw(noise=-torch.ones(3, 2)),
        r"`samples.noise` to be in \[.*, inf\], but got -1.0",
    ),
    rejects(
        "posterior: noise of another number",
        draw(noise=torch.ones(2, 2)),
        "`samples.noise` " + SHAPE.format("N=3, M=2", "2, 2"),
    ),
    rejects(
        "posterior: samples of another world",
        lambda w: w.posterior(SyntheticMMER(3).sample(2, seed=0)),
        r"`samples` to have the modalities \['text', 'audio'\], but got .*|`samples.labels` .*",
    ),
]

# ---------------------------------------------------------------------------------------------- files


def parts(count=4):
    return {split: dataset() for split in ("train", "validation", "test")}


def folder_of_files(folder):
    """A data set in every layout; the names of these files begin with `good`."""
    for name, content in good_files().items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


@functools.cache
def good_files():
    with tempfile.TemporaryDirectory() as folder:
        return contents(write_files(Path(folder)))


def write_files(folder):
    write_npz(parts(), folder / "good.npz")
    write_folder(parts(), folder / "good")
    return folder


def contents(folder):
    return {
        path.relative_to(folder): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.relative_to(folder).parts[0].startswith("good")
    }


def read_all(folder):
    read = read_npz(folder / "good.npz"), read_folder(folder / "good")
    return [tuple(each[split][0]) for each in read for split in each]


class Evil:
    """Would run a command when it is unpickled."""

    def __reduce__(self):
        return exec, ("raise SystemExit('run')",)


def npz(**change):
    """Reads the good archive with arrays changed, or left out (None)."""

    def call(folder):
        with np.load(folder / "good.npz") as file:
            arrays = {name: file[name] for name in file.files} | {
                name.replace("__", "."): value for name, value in change.items()
            }
        kept = {name: value for name, value in arrays.items() if value is not None}
        np.savez(folder / "bad.npz", **kept)
        return read_npz(folder / "bad.npz")

    return call


def raw(name, content, read):
    """Reads a file of these bytes."""

    def call(folder):
        (folder / name).write_bytes(content)
        return read(folder / name)

    return call


def damaged(source, damage, read):
    """Reads a good file after `damage(bytearray)`."""

    def call(folder):
        content = bytearray((folder / source).read_bytes())
        changed = damage(content)
        bad = folder / f"bad{Path(source).suffix}"
        bad.write_bytes(content if changed is None else changed)
        return read(bad)

    return call


def spoilt_split(name, content):
    """Opens the good folder with one file of a split replaced, and puts it back."""

    def call(folder):
        path = folder / "good" / "test" / name
        before = path.read_bytes()
        try:
            path.unlink() if content is None else path.write_bytes(content)
            return read_folder(folder / "good")
        finally:
            path.write_bytes(before)

    return call


def compressed_garbage():
    """An archive whose compressed data cannot be inflated."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("labels.npy", bytes(1000))
    content = bytearray(buffer.getvalue())
    start = content.index(b"labels.npy") + len(b"labels.npy")
    content[start : start + 4] = b"\xff\xff\xff\xff"
    return bytes(content)


def unknown_compression(content):
    """Gives every entry of an archive another method of compression."""
    for entry in re.finditer(rb"PK\x01\x02", bytes(content)):
        content[entry.start() + 10] = 99


def names_file(name, call, message, error=ValueError):
    """A case whose message begins with the file."""
    return Bad(name, call, error, rf"bad[\w.]*: {message}|good[\w/.]*: {message}")


UNREADABLE_NPZ = "not a readable .npz file of plain arrays"

NPZ = [
    names_file(
        "truncated", damaged("good.npz", lambda b: b[: len(b) // 2], read_npz), UNREADABLE_NPZ
    ),
    names_file("empty", raw("bad.npz", b"", read_npz), UNREADABLE_NPZ),
    names_file("text", raw("bad.npz", b"nothing", read_npz), UNREADABLE_NPZ),
    names_file(
        "data that cannot be inflated",
        raw("bad.npz", compressed_garbage(), read_npz),
        UNREADABLE_NPZ,
    ),
    names_file(
        "compressed in an unknown way",
        damaged("good.npz", unknown_compression, read_npz),
        UNREADABLE_NPZ,
    ),
    names_file("a pickle in it", npz(labels=np.array([Evil()], object)), UNREADABLE_NPZ),
    names_file(
        "a folder", lambda f: (f / "bad.npz").mkdir() or read_npz(f / "bad.npz"), UNREADABLE_NPZ
    ),
    Bad("absent", lambda f: read_npz(f / "bad.npz"), FileNotFoundError, "bad.npz: no such file"),
    names_file(
        "no features",
        npz(features__text=None, features__audio=None),
        "no array `features.<modality>` among",
    ),
    names_file("no lengths", npz(lengths__text=None), "missing `lengths.text`"),
    names_file("label 2", npz(labels=np.full((12, 2), 2)), "label `happy` must be 0 or 1, got 2"),
    names_file(
        "labels of words",
        npz(labels=np.full((12, 2), "yes")),
        "label `happy` must be 0 or 1, got yes",
    ),
    names_file(
        "split 3",
        npz(split=np.full(12, 3)),
        r"`split` must hold 0 \(train\), 1 \(validation\), 2 \(test\)",
    ),
    names_file(
        "negative length",
        npz(lengths__text=np.full(12, -1)),
        r"`lengths.text` must be in \[0, 3\], got -1 to -1",
    ),
    names_file(
        "fractions of lengths",
        npz(lengths__text=np.full(12, 1.5)),
        "`lengths.text` must hold 12 integers, got float64",
    ),
    names_file(
        "empty modality",
        npz(features__text=np.zeros((12, 0, 2))),
        r"modality `text` is empty: shape \(12, 0, 2\)",
    ),
    names_file(
        "label named twice",
        npz(label_names=np.array(["sad", "sad"])),
        "`label_names` repeats a name",
    ),
    names_file(
        "no validation", npz(split=np.repeat([0, 2], 6)), "no sample in the validation split"
    ),
    rejects(
        "unknown split wanted",
        lambda f: read_npz(f / "good.npz", splits=["tset"]),
        r"`splits` to name splits of \('train', 'validation', 'test'\), but got \['tset'\]",
    ),
    rejects(
        "split wanted as a word",
        lambda f: read_npz(f / "good.npz", splits="test"),
        r"`splits` to name splits of \('train', 'validation', 'test'\), but got 'test'",
    ),
    rejects_type(
        "writing a list",
        lambda f: write_npz([dataset()], f / "good.npz"),
        "`parts` to be a mapping of names, but got list",
    ),
    rejects_type(
        "writing numbers",
        lambda f: write_npz({"train": 1}, f / "good.npz"),
        r"`parts\['train'\]` to be a MultimodalDataset, but got int",
    ),
    rejects(
        "writing another split",
        lambda f: write_npz({"dev": dataset()}, f / "good.npz"),
        r"`parts` to name splits of \('train', 'validation', 'test'\), but got \['dev'\]",
    ),
    rejects(
        "writing other labels",
        lambda f: write_npz(
            {"train": dataset(), "test": dataset(label_names=["a", "b"])}, f / "good.npz"
        ),
        "all `parts` to have the same features and labels, but got .*",
    ),
    Bad(
        "writing into no folder",
        lambda f: write_npz(parts(), f / "none" / "good.npz"),
        FileNotFoundError,
        "none",
    ),
]

FOLDER = [
    Bad("absent", lambda f: read_folder(f / "none"), FileNotFoundError, "none: no such folder"),
    Bad(
        "a file",
        lambda f: read_folder(f / "good.npz"),
        FileNotFoundError,
        "good.npz: no such folder",
    ),
    names_file(
        "empty",
        lambda f: (f / "bad").mkdir() or read_folder(f / "bad"),
        "holds no split, that is, no folder",
    ),
    names_file("labels gone", spoilt_split("labels.npy", None), "missing `labels.npy`"),
    names_file(
        "mask gone", spoilt_split("padding_mask.text.npy", None), "missing `padding_mask.text.npy`"
    ),
    names_file(
        "truncated features",
        spoilt_split("features.text.npy", b"\x93NUMPY\x01\x00v\x00{'descr'"),
        "not a readable .npy file",
    ),
    names_file(
        "header that is no Python",
        spoilt_split("labels.npy", b"\x93NUMPY\x01\x00\x08\x00((((((((" + bytes(8)),
        "not a readable .npy file",
    ),
    names_file("empty file", spoilt_split("ids.npy", b""), "not a readable .npy file"),
    names_file(
        "a pickle in it",
        spoilt_split(
            "ids.npy",
            b"\x93NUMPY\x01\x00\x36\x00{'descr': '|O', 'fortran_order': False, 'shape': ()}   \n"
            + pickle.dumps(Evil()),
        ),
        "not a readable .npy file",
    ),
    names_file(
        "not written to the end",
        lambda f: ((f / "good" / ".unfinished").touch(), read_folder(f / "good"))[1],
        "was not written to its end",
    ),
    names_file(
        "writing where files are",
        lambda f: write_folder(parts(), f / "good"),
        "the folder is not empty",
    ),
    names_file(
        "writing onto a file", lambda f: write_folder(parts(), f / "good.npz"), "not a folder"
    ),
    Bad(
        "a split that leads elsewhere",
        lambda f: write_folder({"..": dataset()}, f / "new"),
        ValueError,
        r"`\.\.` cannot be the name of a file",
    ),
    Bad(
        "a split with a slash",
        lambda f: write_folder({"a/b": dataset()}, f / "new"),
        ValueError,
        "`a/b` cannot be the name of a file",
    ),
    rejects(
        "no split",
        lambda f: write_folder({}, f / "new"),
        "`parts` to name splits, at least one, but got none",
    ),
    rejects_type(
        "writing a number",
        lambda f: write_folder({"train": 1}, f / "new"),
        r"`parts\['train'\]` to be a MultimodalDataset, but got int",
    ),
]

# ---------------------------------------------------------------------------------------- the tests


def module_state(module):
    return module.state_dict()


def metric_states(made):
    return {name: (metric.metric_state, metric.compute()) for name, metric in made.items()}


def dataset_state(data):
    return (
        data.features,
        data.padding_mask,
        data.labels,
        data.soft_labels,
        data.label_names,
        data.ids,
    )


COMPONENTS = {
    "EmotionQueryAttention": Component(
        ATTENTION, attention, module_state, lambda a: a(sequences())
    ),
    "DiagonalGaussian": Component(
        GAUSSIAN, lambda _: latent(), tuple, lambda g: g.kl_to_standard_normal()
    ),
    "GaussianDecoupler": Component(
        DECOUPLER, decoupler, module_state, lambda d: tuple(d(torch.ones(B, M, Q, D)))
    ),
    "DistributionSupConLoss": Component(
        CONTRASTIVE, queue_with_rows, module_state, lambda q: (q(latent(), LABELS), q.queue)
    ),
    "UncertaintyGatedFusion": Component(
        FUSION, fusion, module_state, lambda f: tuple(f(latent(), torch.zeros(B)))
    ),
    "SoftRankOrdinalityLoss": Component(
        ORDINALITY,
        lambda _: umm.SoftRankOrdinalityLoss(),
        module_state,
        lambda o: o(SCORES, SCORES, SCORES),
    ),
    "CorrectnessTracker": Component(
        TRACKER,
        tracker_with_history,
        lambda t: (t.state_dict(), t.merged),
        lambda t: (update()(t), t(ints(0, 1, 4))),
    ),
    "PlattScaling": Component(
        CALIBRATION, calibration, module_state, lambda c: c(torch.ones(B, Q))
    ),
    "functional": Component(
        FUNCTIONAL, state=lambda _: (ROWS, CLASSES), use=lambda _: supcon()(None)
    ),
    "measures": Component(
        MEASURES, state=lambda _: (PROBS, SCORES), use=lambda _: measures.spearman(SCORES, SCORES)
    ),
    "metrics": Component(
        METRICS,
        metrics_of_a_batch,
        metric_states,
        lambda made: [(m(*good_batch(name)), m.compute()) for name, m in made.items()],
    ),
    "plots": Component(PLOTS, use=lambda _: str(plots.attention_map([[1.0]]))),
    "MultimodalDataset": Component(
        DATASET, lambda _: dataset(), dataset_state, lambda d: tuple(d[-1])
    ),
    "SyntheticMMER": Component(
        SYNTHETIC, world, lambda w: (w.prior, w.prototypes), lambda w: tuple(w.sample(2, seed=1))
    ),
    "npz files": Component(NPZ, folder_of_files, contents, read_all),
    "folders of arrays": Component(FOLDER, folder_of_files),
}


def same(a, b):
    """Equal to the bit, tensors at any depth."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and a.equal(b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def all_cases():
    return [
        pytest.param(component, case, id=f"{component}: {case.name}")
        for component, (cases, *_) in COMPONENTS.items()
        for case in cases
    ]


@pytest.mark.parametrize(("component", "case"), all_cases())
def test_refused_and_unchanged(component, case, tmp_path):
    _, given, state, use = COMPONENTS[component]
    each, untouched = given(tmp_path / "given"), given(tmp_path / "untouched")
    before = copy.deepcopy(state(each))
    with pytest.raises(Exception, match=case.message) as caught:
        case.call(each)
    assert type(caught.value) is case.error
    assert "\n" not in str(caught.value) or case.error is RuntimeError  # those are torch's
    assert same(state(each), before)
    assert same(use(each), use(untouched))


def test_cases_have_names_of_their_own():
    for component, (cases, *_) in COMPONENTS.items():
        names = [case.name for case in cases]
        assert len(set(names)) == len(names), component


def test_every_public_call_has_cases():
    from uncertainty_mm import data

    components = {name for name in umm.__all__ if name not in ("FusedPrediction", "functional")}
    assert components <= set(COMPONENTS)
    source = Path(__file__).read_text()
    for module in (functional, measures, metrics, plots):
        for name in module.__all__:
            if not name[0].isupper() or module is metrics:
                assert re.search(rf"\b{module.__name__.split('.')[-1]}\.{name}\(", source), name
    for name in data.__all__:
        if name.startswith(("read_", "write_")):
            assert re.search(rf"\b{name}\b\(?", source), name
