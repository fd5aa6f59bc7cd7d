"""Writes predictions to a file: :class:`PredictionWriter`."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torch.utils.data import Subset

from uncertainty_mm._files import replacing
from uncertainty_mm.data import MultimodalDataset
from uncertainty_mm.lightning.checkpoints import UsageError

UNUSUAL = 3.0  # conflict, in units of that of validation, above which it is reported
FOREIGN = 0.9  # probability above which a modality is reported to be from another sample


def reasons(
    outputs: Mapping[str, Tensor], modalities: Sequence[str], label_names: Sequence[str]
) -> list[str]:
    """Explains in words, for every sample, why a model is less certain; "" if nothing is unusual.

    Args:
        outputs: Outputs of a model, of which it reads `missing` (N, M) bool, `typicality` (N, M), the factor by which
            variances grow, `foreign` (N, M), the probability to be from another sample, and `conflict` (N, Q), which is
            usually about 1; some may be absent, but not all.
        modalities: Names of the M modalities.
        label_names: Names of the Q labels.

    Example:
        >>> outputs = {
        ...     "missing": torch.tensor([[True, False]]),
        ...     "typicality": torch.tensor([[1.0, 2.5]]),
        ... }
        >>> reasons(outputs, ["audio", "face"], ["happy"])
        ['audio missing; face unlike the training data, left out mostly']
    """
    some = next(iter(outputs.values()))
    nothing = torch.zeros(len(some), len(modalities), device=some.device)
    missing, factor = outputs.get("missing", nothing).bool(), outputs.get("typicality", nothing)
    foreign = outputs.get("foreign", nothing)
    position = torch.arange(len(modalities), device=some.device)
    named = (foreign.argmax(1, keepdim=True) == position) & (foreign > FOREIGN)
    unnamed = (foreign.sum(1, keepdim=True) > FOREIGN) & ~named.any(1, keepdim=True)
    conflict = outputs.get("conflict", nothing.new_zeros(len(some), len(label_names)))
    said: list[list[str]] = [[] for _ in range(len(some))]
    for words, rows, names in (
        ("{} missing", missing, modalities),
        ("{} unlike the training data, counts less", (factor > 1) & (factor < 2), modalities),
        ("{} unlike the training data, left out mostly", factor >= 2, modalities),
        ("{} seems to be of another sample", named, modalities),
        ("{} seems to be of another sample", unnamed, ["one of the modalities"]),
        ("modalities contradict each other about {}", conflict > UNUSUAL, label_names),
    ):
        for sample, index in rows.nonzero().tolist():
            said[sample].append(words.format(names[index]))
    return ["; ".join(each) for each in said]


class PredictionWriter(BasePredictionWriter):
    """Writes the results of `predict_step` as .csv, one row per sample, or as .npz, one array per output.

    Samples come in the order of the data set, also where a loader shuffles them or takes only some.

    If the outputs include typicality, a last column explains in words why the model is less certain (:func:`reasons`).

    Args:
        path: The file to write, which is replaced in one step.
        axes: Axes of the outputs by name, from `"label"` and `"modality"`; other outputs have one column per label.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        axes: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        super().__init__("epoch")
        self.path = Path(path)
        self.axes = {"uncertainty": (), **(axes or {})}

    def write_on_epoch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        predictions: Sequence[Any],
        batch_indices: Sequence[Any],
    ) -> None:
        if trainer.world_size > 1:
            raise UsageError("predictions are written by one process: devices must be 1")
        loaders: Any = CombinedLoader(trainer.predict_dataloaders, "sequential").flattened
        if len(loaders) != 1:
            raise UsageError(f"predictions are written of one loader, but there are {len(loaders)}")
        module: Any = pl_module
        outputs = {key: torch.cat([each[key] for each in predictions]) for key in predictions[0]}
        # what was predicted, in the order of the loader, which may shuffle; unknown where Lightning could not follow it
        rows = torch.tensor(
            [row for batch in batch_indices[0] for row in batch], device="cpu"
        ).long()
        data = loaders[0].dataset
        if not len(rows):
            rows = torch.arange(len(next(iter(outputs.values()))), device="cpu")
        while isinstance(data, Subset):
            rows, data = torch.as_tensor(data.indices, device="cpu")[rows], data.dataset
        if not isinstance(data, MultimodalDataset):  # as its `loader` gives it
            data = getattr(data, "data", None)
        if not isinstance(data, MultimodalDataset):
            raise UsageError("predictions are written of a MultimodalDataset, or a subset of one")
        rows, order = rows.sort(stable=True)
        outputs = {key: x[order.to(x.device)] for key, x in outputs.items()}
        if rows.tolist() != list(range(len(data))):
            ids = data.ids or [*map(str, range(len(data)))]
            data = data.select(rows)
            data.ids = [ids[row] for row in rows.tolist()]
        self.write(outputs, data, module.threshold)

    def write(
        self, outputs: Mapping[str, Tensor], data: MultimodalDataset, threshold: Tensor
    ) -> None:
        """Writes outputs (N, ...) for the samples of `data`."""
        outputs = {key: x.detach().cpu() for key, x in outputs.items()}
        outputs = {key: x.float() if x.is_floating_point() else x for key, x in outputs.items()}
        save = self._arrays if self.path.suffix == ".npz" else self._rows
        with replacing(self.path) as partial:
            save(partial, outputs, data, threshold.cpu())

    def _arrays(
        self, path: Path, outputs: Mapping[str, Tensor], data: MultimodalDataset, threshold: Tensor
    ) -> None:
        arrays = {key: value.numpy() for key, value in outputs.items()}
        if "typicality" in outputs:
            arrays["reason"] = np.array(reasons(outputs, list(data.dims), data.label_names))
        arrays |= {
            "threshold": threshold.numpy(),
            "label_names": np.array(data.label_names),
            "modalities": np.array(list(data.dims)),
        }
        if data.unknown is None or not data.unknown.all():
            arrays["labels"] = data.labels.numpy()
        if data.unknown is not None:
            arrays["unknown"] = data.unknown.numpy()
        if data.ids is not None:
            arrays["ids"] = np.array(data.ids)
        if data.groups is not None:
            arrays["groups"] = data.groups.numpy()
        np.savez_compressed(path, **arrays)  # type: ignore[arg-type]

    def _rows(
        self, path: Path, outputs: Mapping[str, Tensor], data: MultimodalDataset, threshold: Tensor
    ) -> None:
        outputs = dict(outputs)
        probs = outputs["probs"]
        outputs = {
            "uncertainty": outputs.pop("uncertainty"),
            "prob": outputs.pop("probs"),
            "predicted": probs > threshold,
        } | outputs
        names = {"label": data.label_names, "modality": list(data.dims)}
        words = (
            reasons(outputs, names["modality"], names["label"]) if "typicality" in outputs else None
        )
        header, columns = ["sample"], []
        for key, value in outputs.items():
            axes = self.axes.get(key, ("label",))
            header += [".".join((key, *each)) for each in product(*(names[axis] for axis in axes))]
            columns.append(value.flatten(1) if value.dim() > 1 else value.unsqueeze(1))
        with open(path, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(header if words is None else [*header, "reason"])
            for sample, row in enumerate(torch.cat([x.double() for x in columns], dim=1).tolist()):
                name = sample if data.ids is None else data.ids[sample]
                numbers = ("" if math.isnan(x) else f"{x:.6g}" for x in row)
                writer.writerow([name, *numbers, *([] if words is None else [words[sample]])])
