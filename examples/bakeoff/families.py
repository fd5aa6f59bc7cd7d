"""Rules of fusion behind one call, with what `identities.py` needs to know of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from uncertainty_mm import BeliefFusion, DecisionFusion, DiagonalGaussian, GaussianFusion
from uncertainty_mm.beliefs import BeliefRule
from uncertainty_mm.decisions import DecisionRule
from uncertainty_mm.functional import logistic_normal_probs
from uncertainty_mm.rules import Rule

SAMPLES, MODALITIES, LABELS, LATENT = 50, 3, 4, 5


class Fused(NamedTuple):
    """What is made of the modalities, or what one of them says by itself."""

    value: Tensor
    spread: Tensor | None = None
    evidence: Tensor | None = None
    conflict: Tensor | None = None


# What modalities say is a pair of tensors (B, M, Q, K): means and standard deviations, with K = 1 those of logits, or
# evidence for and against. `missing` is (B, M).
Said = tuple[Tensor, Tensor]
Fuse = Callable[[Said, "Tensor | None"], Fused]


class Family(NamedTuple):
    """Rules that fuse the same kind of thing, and what the identities need to know of it."""

    rules: Mapping[str, Fuse]
    draw: Callable[[], Said]
    alone: Callable[[Said], Fused]  # what each modality says by itself
    silence: Said  # what says nothing
    nothing: tuple[float, float]  # value and spread without any modality
    opposed: tuple[Said, Said]  # two that contradict each other


def pair(first: float, second: float) -> Said:
    """The same said of everything, for two that can be broadcast."""
    return torch.full((1, 1, 1, 1), first).double(), torch.full((1, 1, 1, 1), second).double()


def at(said: Said, modalities: slice | list[int]) -> Said:
    """Some of the modalities."""
    return said[0][:, modalities], said[1][:, modalities]


def fuse_gaussians(rule: Rule, said: Said, missing: Tensor | None) -> Fused:
    """By `GaussianFusion`."""
    fused = GaussianFusion(rule)(DiagonalGaussian(*said), missing)
    return Fused(fused.mean, fused.std)


def draw_gaussians() -> Said:
    """Means and standard deviations."""
    mean, log_std = torch.randn(2, SAMPLES, MODALITIES, LABELS, LATENT, dtype=torch.float64)
    return 3 * mean, log_std.exp()


def fuse_beliefs(rule: BeliefRule, said: Said, missing: Tensor | None) -> Fused:
    """By `BeliefFusion`."""
    fused = BeliefFusion(rule)(torch.cat(said, 3), missing)
    return Fused(fused.probs, fused.uncertainty, fused.evidence, fused.conflict)


def draw_evidence() -> Said:
    """Evidence for and against."""
    present, absent = 9 * torch.rand(2, SAMPLES, MODALITIES, LABELS, 1, dtype=torch.float64)
    return present, absent


def opinion(said: Said) -> Fused:
    """Expected probability and uncertainty of evidence."""
    present, absent = (side.squeeze(3) for side in said)
    total = present + absent + 2
    return Fused((present + 1) / total, 2 / total)


def fuse_decisions(rule: DecisionRule, said: Said, missing: Tensor | None) -> Fused:
    """By `DecisionFusion`; what is said with a large standard deviation has little confidence."""
    logits, std = (part.squeeze(3) for part in said)
    fused = DecisionFusion(rule)(logits, std=std, confidence=1 / (1 + std), missing=missing)
    return Fused(fused.logits, conflict=fused.conflict)


def draw_logits() -> Said:
    """Logits and standard deviations."""
    mean, std = draw_gaussians()
    return mean[..., :1], std[..., :1]


def expected(said: Said) -> Fused:
    """The logit of the probability that is expected of a logit with a standard deviation."""
    return Fused(logistic_normal_probs(*(part.squeeze(3) for part in said)).logit())


FAMILIES = (
    Family(
        {name: partial(fuse_gaussians, name) for name in get_args(Rule)},
        draw_gaussians,
        lambda said: Fused(*said),
        pair(0, torch.inf),
        (0, 1),
        (pair(3, 1), pair(-3, 1)),
    ),
    Family(
        {
            f"decision_{name}": partial(fuse_decisions, name)
            for name in get_args(DecisionRule)
            if name != "precision"
        },
        draw_logits,
        lambda said: Fused(said[0].squeeze(3)),
        pair(0, torch.inf),
        (0, 0),
        (pair(3, 1), pair(-3, 1)),
    ),
    Family(
        {"decision_precision": partial(fuse_decisions, "precision")},
        draw_logits,
        expected,
        pair(0, torch.inf),
        (0, 0),
        (pair(3, 1), pair(-3, 1)),
    ),
    Family(
        {f"belief_{name}": partial(fuse_beliefs, name) for name in get_args(BeliefRule)},
        draw_evidence,
        opinion,
        pair(0, 0),
        (0.5, 1),
        (pair(9, 0), pair(0, 9)),
    ),
)
