"""What is measured of a run of the bake-off: predictions, and what its uncertainties are worth."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from torch import Tensor

from uncertainty_mm.data import MultimodalDataset
from uncertainty_mm.examples import sweep
from uncertainty_mm.examples.bakeoff.model import FusionModel
from uncertainty_mm.examples.baselines.bootstrap import sample_terms, scores
from uncertainty_mm.examples.robustness import BATCH, Version, detection, drawn, remember, unease
from uncertainty_mm.examples.uncertainty_study import Answers, error_of, std_against_noise, truth
from uncertainty_mm.lightning import mean_over_known
from uncertainty_mm.metrics.functional import risk_coverage

SPOILT = 1000  # samples that are spoilt, at most
KINDS = ("noise", "dead", "scaled")  # of corruption, at the size of reference
PREDICTION = ("miF1", "mAP", "Brier", "ECE", "Brier missing")
UNCERTAINTY = ("AURC", "AURC std", "std ~ noise", "corruption", "conflict")
PRICE = ("ms a step", "parameters")


def measure(folder: Path, file: Path) -> dict[str, float]:
    """The best checkpoint of a run on its test split: predictions, uncertainties, price.

    `AURC std` is by the uncertainty of the fused prediction, `AURC` by the entropy of the probabilities; `corruption`
    and `conflict` are means over modalities (and kinds) of AUROCs, clean against spoilt, by the uncertainty of the
    spoilt modality, and by the conflict where a modality is that of another sample. What a rule does not say is not
    measured of it.
    """
    results = json.loads((folder / "metrics.json").read_text())
    module = sweep.data_of(folder)
    model, data = FusionModel.load(folder / "best.ckpt"), module.part("test")
    row = {name: results["test"][name] for name in ("miF1", "mAP", "Brier", "ECE", "AURC")}
    row["parameters"] = results["parameters"]
    said = model.predict(data, BATCH)
    if "std_norm" in said:
        answers = Answers(model, data)
        if known := truth(file):
            row["std ~ noise"] = std_against_noise(answers, known["noise"])
        if "fused_uncertainty" in said:
            unknown = None if data.unknown is None else data.unknown[answers.there]
            total = mean_over_known(said["fused_uncertainty"][answers.there], unknown)
            row["AURC std"] = float(risk_coverage(total, error_of(answers, data)).aurc)
    some = drawn(data, SPOILT)
    remember(model, math.ceil(len(some) / BATCH))
    found: dict[str, list[float]] = {}
    for name, value in spoilt(model, some):
        found.setdefault(name, []).append(value)
    row |= {name: float(np.nanmean(values)) for name, values in found.items()}
    return row | {"ms a step": milliseconds(model, module.part("train"), module.batch_size)}


def spoilt(model: FusionModel, data: MultimodalDataset) -> Iterator[tuple[str, float]]:
    """Measures by name, with one modality after the other masked, corrupted, or of another sample."""
    clean = model.predict(data, BATCH)
    unknown = None if data.unknown is None else data.unknown.numpy()
    for index, name in enumerate(data.dims):
        masked = model.predict(Version("masked", modality=name).of(data), BATCH)["probs"].numpy()
        terms = sample_terms(masked, data.labels.numpy(), model.threshold.numpy(), unknown)
        yield "Brier missing", scores(np.ones((1, len(data))), terms[None])[1, 0]
        for kind in (*KINDS, "swapped"):
            score, measure = ("conflict",) * 2 if kind == "swapped" else ("std", "corruption")
            changed = Version(kind, modality=name).of(data)
            usual = unease(clean, index)
            if score in usual:
                now = unease(model.predict(changed, BATCH), index)
                moved = (data.features[name] != changed.features[name]).flatten(1).any(1)
                yield measure, detection(usual[score], now[score], moved)


def milliseconds(model: FusionModel, data: MultimodalDataset, batch_size: int) -> float:
    """Processor time of a training step, without the optimiser: the median of ten."""
    batch = data.batch(range(min(batch_size, len(data))))
    model.train()
    times: list[float] = []
    for _ in range(10):
        start = time.process_time()
        loss: Tensor = model.losses(model(batch.features, batch.padding_mask), batch)["total"]
        loss.backward()
        times.append(1000 * (time.process_time() - start))
    return statistics.median(times)
