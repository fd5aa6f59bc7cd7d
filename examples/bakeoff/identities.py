"""What the rules of fusion promise, computed: a table of rules and identities.

    python examples/bakeoff/identities.py

A cell says whether the identity holds, and in brackets the largest deviation over random input in float64, of value
(mean or probability) and spread (standard deviation or uncertainty); for conflict, how much larger the spread is. An
empty one: the rule has no such thing, or refuses such input.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from uncertainty_mm import BeliefFusion, DiagonalGaussian, GaussianFusion
from uncertainty_mm.beliefs import BeliefRule
from uncertainty_mm.rules import Rule

TOLERANCE = 1e-9
SAMPLES, MODALITIES, LABELS, LATENT = 50, 3, 4, 5


class Fused(NamedTuple):
    """What is made of the modalities, or what one of them says by itself."""

    value: Tensor
    spread: Tensor
    evidence: Tensor | None = None


class Cell(NamedTuple):
    """Whether an identity holds, and how far it is from it."""

    holds: bool
    deviation: float

    def __str__(self) -> str:
        return f"{'yes' if self.holds else 'no'} ({self.deviation:.1g})"


# What modalities say is a pair of tensors (B, M, Q, K): means and standard deviations, or evidence for and against with
# K = 1. `missing` is (B, M).
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


# --- Families --------------------------------------------------------------------------------------------------------


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
    return Fused(fused.probs, fused.uncertainty, fused.evidence)


def draw_evidence() -> Said:
    """Evidence for and against."""
    present, absent = 9 * torch.rand(2, SAMPLES, MODALITIES, LABELS, 1, dtype=torch.float64)
    return present, absent


def opinion(said: Said) -> Fused:
    """Expected probability and uncertainty of evidence."""
    present, absent = (side.squeeze(3) for side in said)
    total = present + absent + 2
    return Fused((present + 1) / total, 2 / total)


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
        {f"belief_{name}": partial(fuse_beliefs, name) for name in get_args(BeliefRule)},
        draw_evidence,
        opinion,
        pair(0, 0),
        (0.5, 1),
        (pair(9, 0), pair(0, 9)),
    ),
)

# --- Identities ------------------------------------------------------------------------------------------------------


def far(found: Tensor, wanted: Tensor) -> Cell:
    """Whether two tensors are equal, and the largest difference."""
    deviation = float((found - wanted).abs().max())
    return Cell(deviation <= TOLERANCE, deviation)


def same(found: Fused, wanted: Fused) -> Cell:
    """Whether two results are equal."""
    return max(far(found.value, wanted.value), far(found.spread, wanted.spread), key=lambda c: c[1])


def copies(family: Family, fuse: Fuse, said: Said) -> tuple[Fused, Fused]:
    """A modality and its copies, fused, and that modality by itself."""
    first = family.alone(at(said, [0]))
    fused = fuse(at(said, [0] * MODALITIES), None)
    return fused, Fused(first.value.squeeze(1), first.spread.squeeze(1))


def copies_value(family: Family, fuse: Fuse, said: Said) -> Cell:
    """Copies of a modality are as good as one."""
    found, wanted = copies(family, fuse, said)
    return far(found.value, wanted.value)


def copies_spread(family: Family, fuse: Fuse, said: Said) -> Cell:
    """They make nothing surer."""
    found, wanted = copies(family, fuse, said)
    return far(found.spread, wanted.spread)


def one_alone(family: Family, fuse: Fuse, said: Said) -> Cell:
    """A modality alone is the result."""
    wanted = family.alone(at(said, [0]))
    return same(fuse(at(said, [0]), None), Fused(wanted.value.squeeze(1), wanted.spread.squeeze(1)))


def conflict_widens(family: Family, fuse: Fuse, said: Said) -> Cell:
    """Two that contradict each other leave more spread than two that agree."""
    one, other = family.opposed
    agree, differ = (
        tuple(torch.cat(parts, 1) for parts in zip(one, x, strict=True)) for x in (one, other)
    )
    gain = float((fuse(differ, None).spread - fuse(agree, None).spread).min())
    return Cell(gain > TOLERANCE, gain)


def silent_is_absent(family: Family, fuse: Fuse, said: Said) -> Cell:
    """A modality that says nothing changes nothing."""
    silent = tuple(
        torch.cat([x[:, :-1], nothing.expand_as(x[:, -1:])], 1)
        for x, nothing in zip(said, family.silence, strict=True)
    )
    return same(fuse(silent, None), fuse(at(said, slice(-1)), None))


def masked_is_absent(family: Family, fuse: Fuse, said: Said) -> Cell:
    """What is masked is not there."""
    missing = torch.arange(MODALITIES).expand(SAMPLES, -1) == MODALITIES - 1
    return same(fuse(said, missing), fuse(at(said, slice(-1)), None))


def order(family: Family, fuse: Fuse, said: Said) -> Cell:
    """The order of modalities changes nothing."""
    return same(fuse(at(said, [2, 0, 1]), None), fuse(said, None))


def none_at_all(family: Family, fuse: Fuse, said: Said) -> Cell:
    """Without any modality the result is that of knowing nothing."""
    found = fuse(said, torch.ones(SAMPLES, MODALITIES, dtype=torch.bool))
    value, spread = family.nothing
    return same(
        found, Fused(torch.full_like(found.value, value), torch.full_like(found.spread, spread))
    )


def product_of_sides(family: Family, fuse: Fuse, said: Said) -> Cell | None:
    """For either side 1 + e / 2 is the product over modalities; the deviation is relative."""
    fused = fuse(said, None).evidence
    if fused is None:
        return None
    wanted = torch.cat([(1 + side / 2).prod(1) for side in said], 2)
    return far((1 + fused / 2) / wanted, torch.ones_like(wanted))


IDENTITIES = {
    "copies keep the value": copies_value,
    "copies keep the spread": copies_spread,
    "one alone is the result": one_alone,
    "conflict widens": conflict_widens,
    "saying nothing is absent": silent_is_absent,
    "masked is absent": masked_is_absent,
    "any order": order,
    "none: the prior": none_at_all,
    "Dempster's product": product_of_sides,
}


def computed(seed: int = 0) -> dict[str, dict[str, Cell | None]]:
    """All cells, by rule and identity."""
    found: dict[str, dict[str, Cell | None]] = {}
    for family in FAMILIES:
        for name, fuse in family.rules.items():
            found[name] = {}
            for identity, check in IDENTITIES.items():
                torch.manual_seed(seed)
                try:
                    found[name][identity] = check(family, fuse, family.draw())
                except ValueError:  # an infinite standard deviation, refused
                    found[name][identity] = None
    return found


def table() -> str:
    """Markdown."""
    lines = ["| rule | " + " | ".join(IDENTITIES) + " |", "|---|" + "---|" * len(IDENTITIES)]
    for name, cells in computed().items():
        shown = ["" if cell is None else str(cell) for cell in cells.values()]
        lines.append(f"| {name} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
