"""What the rules of fusion promise, computed: a table of rules and identities.

    python examples/bakeoff/identities.py

A cell says whether the identity holds, and in brackets the largest deviation over random input in float64, of value
(mean, logit or probability) and spread (standard deviation or uncertainty); for conflict, how much larger the spread
is, or how much conflict is said. An empty cell: the rule has no such thing, or refuses such input.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from uncertainty_mm.examples.bakeoff.families import (
    FAMILIES,
    MODALITIES,
    SAMPLES,
    Family,
    Fuse,
    Fused,
    Said,
    at,
)

TOLERANCE = 1e-9


class Cell(NamedTuple):
    """Whether an identity holds, and how far it is from it."""

    holds: bool
    deviation: float

    def __str__(self) -> str:
        return f"{'yes' if self.holds else 'no'} ({self.deviation:.1g})"


def far(found: Tensor | None, wanted: Tensor | None) -> Cell | None:
    """Whether two tensors are equal, and the largest difference; None where there is nothing to compare."""
    if found is None or wanted is None:
        return None
    deviation = float((found - wanted).abs().max())
    return Cell(deviation <= TOLERANCE, deviation)


def same(found: Fused, wanted: Fused) -> Cell:
    """Whether two results are equal, in value and spread."""
    cells = [far(found.value, wanted.value), far(found.spread, wanted.spread)]
    return max((cell for cell in cells if cell is not None), key=lambda cell: cell.deviation)


def first(family: Family, said: Said) -> Fused:
    """What the first modality says by itself."""
    alone = family.alone(at(said, [0]))
    return Fused(alone.value[:, 0], None if alone.spread is None else alone.spread[:, 0])


def copies_value(family: Family, fuse: Fuse, said: Said) -> Cell | None:
    """A modality and its copies say what it says."""
    return far(fuse(at(said, [0] * MODALITIES), None).value, first(family, said).value)


def copies_spread(family: Family, fuse: Fuse, said: Said) -> Cell | None:
    """Its copies make nothing surer."""
    return far(fuse(at(said, [0] * MODALITIES), None).spread, first(family, said).spread)


def one_alone(family: Family, fuse: Fuse, said: Said) -> Cell | None:
    """A modality alone is the result."""
    return same(fuse(at(said, [0]), None), first(family, said))


def agree_and_differ(family: Family, fuse: Fuse) -> tuple[Fused, Fused]:
    """Two that agree, and two that contradict each other, fused."""
    one, other = family.opposed
    agree, differ = (
        fuse((torch.cat([one[0], x[0]], 1), torch.cat([one[1], x[1]], 1)), None)
        for x in (one, other)
    )
    return agree, differ


def conflict_widens(family: Family, fuse: Fuse, said: Said) -> Cell | None:
    """Two that contradict each other leave more spread than two that agree."""
    agree, differ = agree_and_differ(family, fuse)
    if agree.spread is None or differ.spread is None:
        return None
    gain = float((differ.spread - agree.spread).min())
    return Cell(gain > TOLERANCE, gain)


def conflict_is_said(family: Family, fuse: Fuse, said: Said) -> Cell | None:
    """The conflict of two that agree is 0, and that of two that contradict each other is not."""
    agree, differ = agree_and_differ(family, fuse)
    if agree.conflict is None or differ.conflict is None:
        return None
    least = float(differ.conflict.min())
    return Cell(float(agree.conflict.max()) <= TOLERANCE < least, least)


def silent_is_absent(family: Family, fuse: Fuse, said: Said) -> Cell | None:
    """A modality that says nothing changes nothing."""
    silent = tuple(
        torch.cat([x[:, :-1], nothing.expand_as(x[:, -1:])], 1)
        for x, nothing in zip(said, family.silence, strict=True)
    )
    return same(fuse((silent[0], silent[1]), None), fuse(at(said, slice(-1)), None))


def masked_is_absent(family: Family, fuse: Fuse, said: Said) -> Cell | None:
    """What is masked is not there."""
    missing = torch.arange(MODALITIES).expand(SAMPLES, -1) == MODALITIES - 1
    return same(fuse(said, missing), fuse(at(said, slice(-1)), None))


def order(family: Family, fuse: Fuse, said: Said) -> Cell | None:
    """The order of modalities changes nothing."""
    return same(fuse(at(said, [2, 0, 1]), None), fuse(said, None))


def none_at_all(family: Family, fuse: Fuse, said: Said) -> Cell | None:
    """Without any modality the result is that of knowing nothing."""
    found = fuse(said, torch.ones(SAMPLES, MODALITIES, dtype=torch.bool))
    value, spread = (torch.tensor(x, dtype=torch.float64) for x in family.nothing)
    return same(found, Fused(value, spread))


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
    "conflict is said": conflict_is_said,
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


def table(found: Mapping[str, Mapping[str, Cell | None]]) -> str:
    """Markdown, of what is :func:`computed`."""
    lines = ["| rule | " + " | ".join(IDENTITIES) + " |", "|---|" + "---|" * len(IDENTITIES)]
    for name, cells in found.items():
        shown = ["" if cell is None else str(cell) for cell in cells.values()]
        lines.append(f"| {name} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(computed()))
