"""Dot plots of the tables in docs/study; pages draw them when they are built, from the folder docs."""

import re
from pathlib import Path

from matplotlib import pyplot as plt
from matplotlib.ticker import MaxNLocator

STUDY = Path(__file__).resolve().parents[1] / "study"
SETS = {
    "synthetic": "synthetic",
    "emotify_gems9": "Emotify",
    "crema_d_votes": "CREMA-D",
    "ferplus_3view": "FER+",
    "wikiart_text_style": "WikiArt",
    "extrasensory_8": "ExtraSensory",
}
NAMES = {
    "br-logistic": "logistic regression",
    "lp-logistic": "logistic, label sets",
    "cc-logistic": "classifier chain",
    "br-trees": "boosted trees",
    "mlp": "MLP",
    "early": "early fusion",
    "late": "late fusion",
    "mult": "cross-modal attention",
    "misa": "MISA",
    "dfg": "DFG",
    "raven": "RAVEN",
    "mms2s": "MMS2S",
    "hhmpn": "HHMPN",
    "tailor": "TAILOR",
    "amp": "AMP",
    "carat": "CARAT",
    "lddu, no typicality": "LDDU, no typicality",
}


def tables(path):
    """Tables of a page, each a list of rows by column."""
    found, head = [], None
    for line in [*path.read_text().splitlines(), ""]:
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if not line.startswith("|"):
            head = None
        elif head is None:
            head = cells
            found.append([])
        elif not set(line) <= set("|-: "):
            found[-1].append(dict(zip(head, cells, strict=True)))
    return found


def differences(tables, column, arms, title):
    """Differences with 95 % intervals: a panel a data set, a line an arm; hollow where the interval contains 0."""
    figure, axes = plt.subplots(
        1, len(tables), figsize=(9, 1 + 0.2 * len(arms)), sharey=True, layout="constrained"
    )
    for ax, (name, rows) in zip(axes, tables.items(), strict=True):
        of_arm = {row["arm"]: row[column] for row in rows}
        for y, arm in enumerate(arms):
            if arm in of_arm:
                x, low, high = map(float, re.findall(r"[+-]\d+\.\d+", of_arm[arm]))
                sure = low > 0 or high < 0
                ax.plot([low, high], [y, y], color="tab:blue", lw=1.5)
                ax.plot(x, y, "o", color="tab:blue", mfc=None if sure else "white", ms=5)
        ax.axvline(0, color="0.6", zorder=0)
        ax.set_title(SETS[name], fontsize=10)
        ax.xaxis.set_major_locator(MaxNLocator(2))
        ax.xaxis.set_major_formatter("{x:g}")
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(arms)), arms.values())
    axes[0].invert_yaxis()
    figure.supxlabel(title, fontsize=10)


def against_others(kind, title):
    """Brier score of LDDU minus that of every other method; below 0 LDDU is better."""
    pages = {name: STUDY / f"{kind}_{name}.md" for name in SETS}
    found = {name: tables(path)[-1] for name, path in pages.items() if path.exists()}
    first = {row["arm"] for row in next(iter(found.values()))}
    arms = {arm: name for arm, name in NAMES.items() if arm in first}
    differences(found, "Brier", arms, title)


def against_product():
    """Brier score of every rule and loss minus that of the product; below 0 the rule is better."""
    pages = {name: STUDY / f"bakeoff_{name}.md" for name in SETS}
    found = {name: tables(path)[0][1:] for name, path in pages.items() if path.exists()}
    arms = {row["arm"]: row["arm"] for row in next(iter(found.values()))}
    title = "Brier score minus the product's (left of 0: better); hollow: the interval contains 0"
    differences(found, "Brier - product", arms, title)


def arms_of_the_study(column="std ~ noise", title="rank correlation of std and true noise"):
    """One column of the arms on synthetic data, mean and standard deviation over seeds."""
    rows = [row for table in tables(STUDY / "synthetic.md") if column in table[0] for row in table]
    points = {row["arm"]: [float(x) for x in row[column].split(" ±")] for row in rows}
    points = dict(sorted(points.items(), key=lambda item: -item[1][0]))
    _, ax = plt.subplots(figsize=(7, 0.22 * len(points) + 0.8), layout="constrained")
    for y, (arm, (mean, spread)) in enumerate(points.items()):
        color = {"default": "tab:blue", "paper": "tab:red"}.get(arm, "0.4")
        ax.errorbar(mean, y, xerr=spread, fmt="o", color=color, ms=5)
    ax.set_yticks(range(len(points)), points, fontsize=9)
    ax.invert_yaxis()
    ax.axvline(0, color="0.8", zorder=0)
    ax.set_xlabel(title)
    ax.spines[["top", "right"]].set_visible(False)
