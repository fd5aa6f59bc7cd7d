"""Draws the figure of the front page: panels side by side, and below each other for narrow windows.

RUN of `python docs/laboratory/front.py RUN` is the folder of `python examples/lddu_full.py --output RUN`, with the
built-in data and seed 0. The third panel is read from the tables in docs/study, which `examples/robustness.py` writes.
"""

import re
import sys
from pathlib import Path

from matplotlib import pyplot as plt

from uncertainty_mm.data import MultimodalDataset, SyntheticMMER
from uncertainty_mm.data.transforms import corrupted
from uncertainty_mm.examples.lddu_full import LDDU
from uncertainty_mm.metrics.functional import spearman

DOCS = Path(__file__).resolve().parents[1]
SETS = {
    "crema_d_votes": "CREMA-D",
    "emotify_gems9": "Emotify",
    "wikiart_text_style": "WikiArt",
    "ferplus_3view": "FER+",
    "extrasensory_8": "ExtraSensory",
}
SIZES = (0.0, 0.75, 1.5, 3.0, 6.0)


def detection(name):
    """AUROC of spoilt input by typicality, of swapped input by conflict, of spoilt input by the learned std."""
    text = (DOCS / "study" / f"robustness_{name}.md").read_text()
    rows = {
        row[0]: row[1:]
        for line in re.findall(r"^\| (.*) \|$", text, re.MULTILINE)
        if (row := line.split(" | "))[0] in ("typicality", "foreign", "std, no typicality")
    }
    return [
        float(x)
        for x in (rows["typicality"][-2], rows["foreign"][-1], rows["std, no typicality"][-2])
    ]


def draw(left, middle, right):
    """The three panels."""
    for (name, (noise, std)), marker in zip(by_noise.items(), "os^", strict=True):
        left.plot(noise, std, marker=marker, label=name)
    left.set(title="Noisy input", xlabel="true noise", ylabel="standard deviation")
    left.legend(frameon=False)

    for (name, values), marker in zip(factors.items(), "os^", strict=True):
        middle.plot(SIZES, values, marker=marker, label=name)
    middle.set(
        title="Unlike the training data", xlabel="size of added noise", ylabel="variance times"
    )

    for y, name in enumerate(SETS):
        for x, color, marker, label in zip(
            detection(name),
            ("tab:blue", "tab:red", "0.6"),
            "oDs",
            ("spoilt, by typicality", "of another sample", "spoilt, by learned std"),
            strict=True,
        ):
            right.plot(x, -y, marker, color=color, label=label if y == 0 else None)
    right.vlines(0.5, -4.4, 0.5, color="0.8", zorder=0)
    right.set(title="Told from clean, real data", xlabel="AUROC (0.5: chance)", xlim=(0.35, 1.02))
    right.set_ylim(-4.4, 2.9)
    right.set_yticks([-y for y in range(len(SETS))], SETS.values())
    right.legend(frameon=False, loc="upper right", fontsize=8)


model = LDDU.load(Path(sys.argv[1]) / "best.ckpt")
samples = SyntheticMMER(missing_rate=0.05).sample(1000, seed=2)  # the test split of seed 0
data = MultimodalDataset(
    samples.features, samples.padding_mask, samples.labels, model.hparams["label_names"]
)
answer = model.predict(data)
by_noise, factors = {}, {}
for m, name in enumerate(samples.features):
    there = ~answer["missing"][:, m].bool()
    noise, std = samples.noise[there, m], answer["std_norm"][there, m].square().mean(1).sqrt()
    print(f"{name}: rank correlation of std and noise {float(spearman(std, noise)):.3f}")
    order = noise.argsort().chunk(8)
    by_noise[name] = [[x[rows].median().item() for rows in order] for x in (noise, std)]
    factors[name] = [
        model.predict(corrupted(data, name, "noise", size=size))["typicality"][there, m].median()
        for size in SIZES
    ]
    print(f"{name}: factor of the variance {[round(float(x), 2) for x in factors[name]]}")

plt.rcParams |= {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
for suffix, shape, size in (("", (1, 3), (8, 2.6)), ("_narrow", (3, 1), (4, 6.6))):
    figure, axes = plt.subplots(*shape, figsize=size, layout="constrained")
    draw(*axes)
    figure.savefig(DOCS / "_static" / f"front{suffix}.png", dpi=170)
