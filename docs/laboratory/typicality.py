"""Writes the table of what typicality detects: `python docs/laboratory/typicality.py FILE.npz ...`."""

import sys
from typing import get_args

import torch

from uncertainty_mm import Typicality
from uncertainty_mm.data import read_npz
from uncertainty_mm.data.transforms import Corruption, corrupted
from uncertainty_mm.metrics.functional import auroc

UNSEEN = ["shuffled", "swapped"]
SEEN = [kind for kind in get_args(Corruption) if kind not in UNSEEN]


def ask(method, data, name):
    """Answers for the samples that have the modality."""
    index, there = list(data.features).index(name), ~data.padding_mask[name].all(1)
    answers = [method(x.features, x.padding_mask)[:, index] for x in data.loader(512)]
    return torch.cat(answers)[there]


def tells(method, data, name, kind):
    """AUROC of clean against spoilt sequences."""
    clean, spoilt = (ask(method, x, name) for x in (data, corrupted(data, name, kind)))
    wrong = torch.arange(2 * len(clean)) >= len(clean)
    return auroc(torch.cat([clean, spoilt]), wrong).item()


print(
    "| set | modality | clean above | by the distance | lowest | by the factor | shuffled | swapped |"
)
print("|---|---|--:|--:|---|--:|--:|--:|")
for path in sys.argv[1:]:
    data = read_npz(path)
    typicality = Typicality(data["train"].dims).fit(data["train"])
    for name in typicality.modality_dims:
        above = (ask(typicality, data["validation"], name) > 1).float().mean().item()
        far, factor = (
            {kind: tells(method, data["test"], name, kind) for kind in SEEN + UNSEEN}
            for method in (typicality.distances, typicality)
        )
        mean = [sum(scores[kind] for kind in SEEN) / len(SEEN) for scores in (far, factor)]
        lowest = min(SEEN, key=far.get)
        cells = [f"{mean[0]:.2f}", f"{lowest} {far[lowest]:.2f}", f"{mean[1]:.2f}"]
        cells += [f"{far[kind]:.2f}" for kind in UNSEEN]
        print("|", " | ".join([path.split(".")[0], name, f"{above:.3f}", *cells]), "|")
