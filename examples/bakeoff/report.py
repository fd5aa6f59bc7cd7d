"""What comes of a bake-off: tables of every data set, and one figure of the differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from uncertainty_mm import plots
from uncertainty_mm.examples import sweep
from uncertainty_mm.examples.bakeoff.measures import PREDICTION, PRICE, UNCERTAINTY
from uncertainty_mm.examples.baselines.bootstrap import Interval, compare

DEFAULT = "product"  # the arm that all others are compared with, and the rule below the losses
BETTER = {"miF1": 1, "Brier": -1}  # the direction
# By data set, arm and measure: the arm minus the default one.
Intervals = Mapping[str, Mapping[str, Mapping[str, Interval]]]


def differences(rows: Sequence[sweep.Row], output: Path) -> Intervals:
    """How far every arm is from the default one, over the seeds of both."""
    seeds: dict[tuple[str, str], set[int]] = {}
    for row in rows:
        seeds.setdefault((row["data"], row["arm"]), set()).add(row["seed"])
    found: dict[str, dict[str, Mapping[str, Interval]]] = {}
    for (data, arm), own in seeds.items():
        both = sorted(own & seeds.get((data, DEFAULT), set()))
        if both and arm != DEFAULT:
            found.setdefault(data, {})[arm] = compare(output / data, arm, DEFAULT, both)
    return found


def report(rows: Sequence[sweep.Row], intervals: Intervals) -> str:
    """Markdown: for every data set a table of predictions and one of uncertainties and their price."""

    def tables(name: str, here: list[sweep.Row]) -> list[str]:
        notes = {
            f"{measure} - {DEFAULT}": {
                arm: str(found[measure]) for arm, found in intervals.get(name, {}).items()
            }
            for measure in BETTER
        }
        said = {name: cells(here, name) for name in UNCERTAINTY if any(name in row for row in here)}
        price = {name: {arm: price_of(here, arm, name) for arm in arms_of(here)} for name in PRICE}
        return [*sweep.table(here, PREDICTION, notes), "", *sweep.table(here, (), said | price)]

    return sweep.by_data(rows, tables)


def arms_of(rows: Sequence[sweep.Row]) -> list[str]:
    """The arms, in the order of the rows."""
    return list(dict.fromkeys(row["arm"] for row in rows))


def cells(rows: Sequence[sweep.Row], name: str) -> dict[str, str]:
    """Mean and standard deviation over seeds of every arm that has such a measure."""
    found: dict[str, list[float]] = {}
    for row in rows:
        if name in row:
            found.setdefault(row["arm"], []).append(row[name])
    return {arm: sweep.cell(values) for arm, values in found.items()}


def price_of(rows: Sequence[sweep.Row], arm: str, name: str) -> str:
    """A mean over seeds, to three digits or whole."""
    value = float(np.mean([row[name] for row in rows if row["arm"] == arm]))
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def figure(intervals: Intervals) -> Figure:
    """Dots with 95 % intervals: a line an arm, two panels a data set; filled where the interval excludes 0."""
    arms = list(dict.fromkeys(arm for found in intervals.values() for arm in found))
    result = Figure(
        figsize=(1.5 + 3.6 * len(intervals), 1.2 + 0.23 * len(arms)), layout="constrained"
    )
    panels = result.subplots(1, 2 * len(intervals), sharey=True, squeeze=False)[0]
    wanted = [(name, measure) for name in intervals for measure in BETTER]
    for panel, (name, measure) in zip(panels, wanted, strict=True):
        for y, arm in enumerate(arms):
            if arm in intervals[name]:
                dot(panel, y, intervals[name][arm][measure], BETTER[measure])
        panel.axvline(0, color=plots.GREY, linewidth=0.8)
        side = "right" if BETTER[measure] > 0 else "left"
        panel.set(title=name, xlabel=f"{measure} (better: {side})")
        panel.tick_params(labelsize=7)
        panel.locator_params(axis="x", nbins=4)
        panel.title.set_fontsize(8)
        panel.xaxis.label.set_fontsize(8)
    panels[0].set_yticks(range(len(arms)), arms)
    panels[0].invert_yaxis()
    result.suptitle(f"minus {DEFAULT}, 95 % interval over test samples", fontsize=9)
    return result


def dot(panel: plots.Axes, y: int, interval: Interval, better: int) -> None:
    """One interval."""
    for_it, against = better * interval.low, better * interval.high
    low, high = min(for_it, against), max(for_it, against)
    color = plots.COLORS[2] if low > 0 else plots.COLORS[1] if high < 0 else plots.COLORS[6]
    filled = color if low > 0 or high < 0 else "white"
    panel.plot([interval.low, interval.high], [y, y], color=color, linewidth=1)
    panel.plot(interval.difference, y, "o", color=color, markerfacecolor=filled, markersize=4)
