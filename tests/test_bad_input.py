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
from uncertainty_mm import DiagonalGaussian, functional
from uncertainty_mm.data import (
    LabelTable,
    MultimodalDataset,
    SyntheticMMER,
    read_folder,
    read_label_csv,
    read_m3ed,
    read_mmsa,
    read_npz,
    read_tailor,
    write_folder,
    write_npz,
)

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


LABELS = torch.tensor([[0, 1, 0], [1, 1, 0], [0, 0, 1]])
ANY = ".*"  # what was received, where it is long
TENSOR_LIST = "but got list"
POSITIVE = "to be a positive integer, but got"
SHAPE = r"to have shape \({}\), but got \({}\)"

# ----------------------------------------------------------------------------------------- Gaussians


def latent(shape=(B, M, Q, K), mean=0.5, std=0.5):
    return DiagonalGaussian(torch.full(shape, mean), torch.full(shape, std))


def with_std(value):
    return latent()._replace(std=filled((B, M, Q, K), 0.5, (0, 0, 0, 0), value))


def with_mean(value):
    return latent()._replace(mean=filled((B, M, Q, K), 0.5, (0, 0, 0, 0), value))


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

PROBS = torch.full((B, Q), 0.25)
SCORES = torch.tensor([0.1, 0.5, 0.3])


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
    (folder / "good.csv").write_text("id,happy,sad\na,0,1\nb,2,0\n")
    (folder / "good.pkl").write_bytes(pickle.dumps(mmsa()))
    (folder / "good_m3ed.pkl").write_bytes(pickle.dumps(m3ed()))
    torch.save(tailor(), folder / "good.pt")
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


def mmsa(**change):
    sequences = {name: np.ones((2, 3, 4)) for name in ("text", "audio", "vision")}
    part = sequences | {"id": ["v$_$0", "v$_$1"], "tgt": [[2, 4, 3], [2, 3]]} | change
    part = {key: value for key, value in part.items() if value is not None}
    return {"train": dict(part), "valid": dict(part), "test": dict(part)}


def tailor(vocabulary=None, **change):
    names = ("src-text", "src-audio", "src-visual")
    part = {name: torch.ones(2, 3, 4) for name in names} | {"tgt": [[2, 4, 3], [2, 5, 3]]} | change
    vocabulary = vocabulary or {"<s>": 2, "</s>": 3, "happy": 4, "sad": 5}
    return {"train": part, "valid": part, "test": part, "dict": {"tgt": vocabulary}}


def m3ed(**change):
    content = [{}, {}, {}, {}, {}, {}, {}, ["d0"], ["d1"], ["d2"]]
    for name in ("d0", "d1", "d2"):
        content[0][name], content[2][name] = ["u0", "u1"], [0, 6]
        for position in (3, 4, 5):
            content[position][name] = np.ones((2, 3))
    for position, value in change.items():
        content[int(position[1:])] = value
    return content


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


def pickled(content, read=lambda path: read_mmsa(path, label_names=("happy", "sad"))):
    return raw("bad.pkl", pickle.dumps(content), read)


def saved(content):
    def call(folder):
        torch.save(content, folder / "bad.pt")
        return read_tailor(folder / "bad.pt")

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


def changed_bit(content):
    """Of the first tensor of a file of `torch.save`."""
    content[content.index(torch.ones(6).numpy().tobytes())] ^= 1


def csv_of(text, label_names=("happy", "sad")):
    return raw("bad.csv", text.encode(), lambda path: read_label_csv(path, label_names))


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

NOT_PICKLE = "not a readable pickle"

PICKLES = [
    names_file("mmsa: truncated", damaged("good.pkl", lambda b: b[:-20], read_mmsa), NOT_PICKLE),
    names_file(
        "mmsa: malicious", pickled({"train": Evil()}), "refused, because it names `builtins.exec`"
    ),
    names_file("mmsa: a list", pickled([1]), "must hold a dict, got list"),
    names_file("mmsa: a split lacking", pickled({"train": {}}), "missing split `valid`"),
    names_file(
        "mmsa: no modality, keys of two types",
        pickled({key: {1: 0, "x": 0} for key in ("train", "valid", "test")}),
        "no modality in split `train`",
    ),
    names_file(
        "mmsa: one sample less",
        pickled(mmsa(audio=np.ones((1, 3, 4)))),
        "`train.audio` has 1 samples, other modalities 2",
    ),
    names_file(
        "mmsa: features of words",
        pickled(mmsa(audio=np.full((2, 3, 4), "x"))),
        "`train.audio` must hold numbers of shape",
    ),
    names_file(
        "mmsa: token unknown",
        pickled(mmsa(tgt=[[2, 99, 3], [2, 3]])),
        "`train.tgt` of sample 0 holds the token 99",
    ),
    names_file("mmsa: no emotion", pickled(mmsa(tgt=None)), "no emotions: missing `train.tgt`"),
    names_file(
        "mmsa: lengths too long",
        pickled(mmsa(audio_lengths=[9, 9])),
        r"`train.audio_lengths` must be in \[0, 3\], got 9 to 9",
    ),
    rejects(
        "mmsa: padding unknown",
        lambda f: read_mmsa(f / "good.pkl", padding="no"),
        r"`padding` to be one of \['auto', 'none', 'zeros'\], but got 'no'",
    ),
    rejects(
        "mmsa: join_by unknown",
        lambda f: read_mmsa(f / "good.pkl", join_by="name"),
        r"`join_by` to be one of \['auto', 'id', 'order'\], but got 'name'",
    ),
    rejects(
        "mmsa: table with too many ids",
        lambda f: read_mmsa(
            f / "good.pkl",
            LabelTable(torch.zeros(1, 2), ("happy", "sad"), ids=["v$_$0", "v$_$1"]),
            ("happy", "sad"),
        ),
        "`labels.ids` to name 1 samples, but got 2",
    ),
    rejects(
        "mmsa: table of label 2",
        lambda f: read_mmsa(
            f / "good.pkl", LabelTable(torch.full((2, 2), 2), ("happy", "sad")), ("happy", "sad")
        ),
        "`labels.labels` to hold only 0 and 1, but got 2",
    ),
    Bad("mmsa: absent", lambda f: read_mmsa(f / "none.pkl"), FileNotFoundError, "none.pkl"),
    names_file(
        "tailor: truncated",
        damaged("good.pt", lambda b: b[:-100], read_tailor),
        r"not a readable file of torch\.save",
    ),
    names_file(
        "tailor: a bit changed",
        damaged("good.pt", changed_bit, read_tailor),
        r"not a readable file of torch\.save \(the check sum of `.*` is wrong\)",
    ),
    names_file(
        "tailor: malicious",
        saved(tailor(tgt=[Evil(), Evil()])),
        r"refused, because it names `(builtins\.)?exec`",
    ),
    names_file("tailor: no vocabulary", saved(tailor() | {"dict": {}}), "missing `dict.tgt`"),
    names_file(
        "tailor: names of two types",
        saved(tailor({("a",): 4, "b": 4, "<s>": 2})),
        "`dict.tgt` must give every label a number",
    ),
    names_file(
        "tailor: codes of two types",
        saved(tailor({"happy": 4, "sad": None})),
        "`dict.tgt` must give every label a number",
    ),
    names_file(
        "tailor: other labels wanted",
        lambda f: read_tailor(f / "good.pt", ["happy", "bored"]),
        r"`dict.tgt` names the labels .* expected \['happy', 'bored'\]",
    ),
    names_file(
        "m3ed: truncated",
        damaged("good_m3ed.pkl", lambda b: b[: len(b) // 2], read_m3ed),
        NOT_PICKLE,
    ),
    names_file(
        "m3ed: a list of nine",
        pickled(m3ed()[:9], read_m3ed),
        "must hold a list of 10, got list of 9",
    ),
    names_file(
        "m3ed: code 7",
        pickled(m3ed(_2={name: [0, 7] for name in ("d0", "d1", "d2")}), read_m3ed),
        r"\[2\] of dialogue 'd0' must be in \[0, 6\], got 0 to 7",
    ),
    names_file(
        "m3ed: dialogue unknown", pickled(m3ed(_7=["d9"]), read_m3ed), r"\[0\] lacks dialogue 'd9'"
    ),
    names_file(
        "m3ed: dialogue without a name",
        pickled(m3ed(_7=[["d0"]]), read_m3ed),
        r"\[7\] must list the dialogues of the train split",
    ),
    rejects(
        "m3ed: level unknown",
        lambda f: read_m3ed(f / "good_m3ed.pkl", level="word"),
        r"`level` to be one of \['dialogue', 'utterance'\], but got 'word'",
    ),
    names_file("csv: empty", csv_of(""), "no row below the header"),
    names_file(
        "csv: bytes", raw("bad.csv", b"\xff\xfe\x00", read_label_csv), "not a readable .csv file"
    ),
    names_file(
        "csv: a label lacking", csv_of("id,happy\na,1\n"), r"no column for the labels \['sad'\]"
    ),
    names_file(
        "csv: intensity 4",
        csv_of("happy,sad\n4,0\n"),
        r"`happy` of row 0 must be a number in \[0, 3\], got '4'",
    ),
    names_file(
        "csv: nan",
        csv_of("happy,sad\n0,nan\n"),
        r"`sad` of row 0 must be a number in \[0, 3\], got 'nan'",
    ),
    names_file("csv: ragged", csv_of("happy,sad\n0\n"), "row 0 has 1 fields, the header 2"),
    names_file(
        "csv: split unknown",
        csv_of("happy,sad,mode\n0,0,dev2\n"),
        "`mode` of row 0 must be train, valid or test, got 'dev2'",
    ),
    names_file(
        "csv: tokens nested without end",
        csv_of("tgt\n" + "[" * 100_000 + "\n"),
        "`tgt` of row 0 must be a list of tokens",
    ),
    names_file(
        "csv: token of 5000 digits",
        csv_of("tgt\n" + '"[2, ' + "9" * 5000 + ', 3]"\n'),
        "`tgt` of row 0 must be a list of tokens",
    ),
]

# ---------------------------------------------------------------------------------------- the tests


def module_state(module):
    return module.state_dict()


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
    "MultimodalDataset": Component(
        DATASET, lambda _: dataset(), dataset_state, lambda d: tuple(d[-1])
    ),
    "SyntheticMMER": Component(
        SYNTHETIC, world, lambda w: (w.prior, w.prototypes), lambda w: tuple(w.sample(2, seed=1))
    ),
    "npz files": Component(NPZ, folder_of_files, contents, read_all),
    "folders of arrays": Component(FOLDER, folder_of_files),
    "pickles and tables": Component(PICKLES, folder_of_files, contents, read_all),
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

    beside = {"EmotionQueryAttention", "DiagonalGaussian", "GaussianDecoupler"}  # their other tests
    beside |= {"UncertaintyGatedFusion", "FusedPrediction", "functional"}
    beside |= {"DistributionSupConLoss", "EmbeddingQueue"}
    assert set(umm.__all__) - beside <= set(COMPONENTS)
    source = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    for name in functional.__all__:
        assert re.search(rf"\bfunctional\.{name}\(", source), name
    for name in data.__all__:
        if name.startswith(("read_", "write_")):
            assert re.search(rf"\b{name}\b\(?", source), name
