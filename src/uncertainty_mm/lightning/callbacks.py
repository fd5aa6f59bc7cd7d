"""Callbacks for any `LightningModule`: repeatable dropout, a guard against NaN, the history of a run."""

from __future__ import annotations

import csv
import io
import os
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor, nn

from uncertainty_mm._component import states
from uncertainty_mm._files import replacing
from uncertainty_mm.data import MultimodalBatch
from uncertainty_mm.lightning.checkpoints import UsageError


def place(seed: int, trainer: L.Trainer) -> int:
    """A number below 2^62 that depends only on seed, process and training batch."""
    batch = trainer.fit_loop.total_batch_idx
    return ((seed * 1000 + trainer.global_rank) * 10**9 + batch) % 2**62


class DeterministicDropout(L.Callback):
    """Makes the random numbers of a training step depend only on seed, process and step.

    A resumed run is then bit-identical to an uninterrupted one. The seed is that of `seed_everything`.
    """

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        torch.manual_seed(place(int(os.environ.get("PL_GLOBAL_SEED", 0)), trainer))


class FiniteGuard(L.Callback):
    """Keeps NaN and infinity out of the weights, and names the samples that caused them.

    A training step is discarded if an unpadded feature, the loss or a gradient is NaN or infinite on any process; it
    then changes neither the weights nor the queue and the history. The host waits for an accelerator once per step to
    read the outcome. In validation, test and prediction, such features end the run.

    Args:
        on_nan: `"stop"` ends the run and names the samples, `"skip"` prints them and continues.
    """

    def __init__(self, on_nan: Literal["stop", "skip"] = "stop") -> None:
        if on_nan not in ("stop", "skip"):
            raise ValueError(f"Expected `on_nan` to be one of ['skip', 'stop'], but got {on_nan!r}")
        self.on_nan = on_nan
        self.skipped = 0
        self._batches: list[tuple[Tensor, Tensor]] = []  # indices, and which samples are finite
        self._losses: list[Tensor] = []
        self._before: list[tuple[Tensor, Tensor]] = []

    def on_train_batch_start(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        batch: MultimodalBatch,
        batch_idx: int,
    ) -> None:
        if self.on_nan == "skip" and not self._batches:
            kept = [*pl_module.buffers(), *states(pl_module).values()]
            self._before = [(tensor, tensor.clone()) for tensor in kept]
        self._batches.append((batch.indices, _finite_samples(batch)))
        for name, x in batch.features.items():  # so that layers see finite values
            batch.features[name] = x.nan_to_num(0, 0, 0)

    def on_before_backward(
        self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor
    ) -> None:
        self._losses.append(loss.detach().isfinite().all())

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        batches, self._batches = self._batches, []
        checks = [*self._losses, *(finite.all() for _, finite in batches)]
        self._losses = []
        if trainer.precision != "16-mixed":  # there the scaler skips overflowing gradients
            grads = [x.grad for x in pl_module.parameters() if x.grad is not None]
            checks.append(nn.utils.get_total_norm(grads).isfinite())
        if trainer.strategy.reduce_boolean_decision(bool(torch.stack(checks).all()), all=True):
            return
        what = self._complaint(trainer, batches)
        if self.on_nan == "stop":
            raise UsageError(what)
        for parameter in pl_module.parameters():
            parameter.grad = None  # so that optimisers skip it
        with torch.no_grad():
            for tensor, earlier in self._before:
                tensor.copy_(earlier)
        self.skipped += 1
        print(f"\nskipped a batch: {what}", flush=True)

    def _complaint(self, trainer: L.Trainer, batches: list[tuple[Tensor, Tensor]]) -> str:
        indices = torch.cat([indices for indices, _ in batches])
        finite = torch.cat([finite for _, finite in batches])
        what = "features are not finite"
        if finite.all():  # no sample is to blame
            what, finite = "loss or gradient is not finite", ~finite
            what += ", here or on another process" if trainer.world_size > 1 else ""
        assert trainer.train_dataloader is not None
        names = _names(trainer.train_dataloader.dataset, indices[~finite])
        return f"epoch {trainer.current_epoch} (the first is 0), training samples {names}: {what}"

    def _refuse_batch(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        batch: MultimodalBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Raises UsageError with the names of samples that are not finite."""
        finite = _finite_samples(batch)
        if not finite.all():
            split, loader = "validation", trainer.val_dataloaders
            if trainer.testing:
                split, loader = "test", trainer.test_dataloaders
            elif trainer.predicting:
                split, loader = "prediction", trainer.predict_dataloaders
            names = _names(getattr(loader, "dataset", None), batch.indices[~finite])
            raise UsageError(f"{split} samples {names}: features are not finite")

    on_validation_batch_start = on_test_batch_start = on_predict_batch_start = _refuse_batch

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.skipped = state_dict["skipped"]


def _finite_samples(batch: MultimodalBatch) -> Tensor:
    """Bool (B,), True where all features that are not padding are finite."""
    finite = [
        (x.isfinite().all(2) | batch.padding_mask[name]).all(1)
        for name, x in batch.features.items()
    ]
    return torch.stack(finite).all(0)


def _names(dataset: Any, indices: Tensor) -> str:
    """Names of samples, or their positions if the data set has no names."""
    ids = getattr(dataset, "ids", None)
    return ", ".join(str(i if ids is None else ids[i]) for i in indices.tolist())


class History(L.Callback):
    """Keeps the logged values, one row per epoch, in a file, and in checkpoints for resumed runs.

    Args:
        path: The .csv file to write, replaced in one step after every epoch; None for no file.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        self.path = path
        self.rows: list[dict[str, float]] = []

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        values = {name: value.item() for name, value in trainer.callback_metrics.items()}
        self.rows.append({"epoch": trainer.current_epoch, **values})
        if trainer.is_global_zero and self.path is not None:
            columns = ["epoch", *sorted({name for row in self.rows for name in row} - {"epoch"})]
            text = io.StringIO(newline="")
            writer = csv.DictWriter(text, columns)
            writer.writeheader()
            writer.writerows(self.rows)
            with replacing(self.path) as partial:
                partial.write_text(text.getvalue())

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows = list(state_dict["rows"])
