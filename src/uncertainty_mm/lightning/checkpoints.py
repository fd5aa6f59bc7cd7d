"""Checkpoints that are complete, can be moved and run no code, and the error for wrong use of a command."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from uncertainty_mm._files import check_sums, replacing


class UsageError(ValueError):
    """A file, an option or a value cannot be used; the message says why in one line."""


class Patience(EarlyStopping):
    """Early stopping that also stops a run which is resumed after it had stopped early."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.should_stop = self.stopped_epoch > 0


class MovableCheckpoint(ModelCheckpoint):
    """A `ModelCheckpoint` that finds the best checkpoint even after the run folder was moved."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        def here(path: str) -> str:
            return str(Path(str(self.dirpath), Path(path).name)) if path else path

        paths = ("best_model_path", "kth_best_model_path", "last_model_path")
        best = {here(path): score for path, score in state_dict["best_k_models"].items()}
        moved = {key: here(state_dict[key]) for key in paths}
        super().load_state_dict(
            state_dict | moved | {"dirpath": self.dirpath, "best_k_models": best}
        )


class WholeCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints that are complete at any time, and reads them without running code from them.

    A checkpoint is written to a file next to the old one, which it replaces in one step. (Lightning writes to the
    folder for temporary files, which on another disk requires copying.)
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        with replacing(path) as partial:
            partial.write_bytes(buffer.getbuffer())

    def load_checkpoint(
        self,
        path: str | os.PathLike[str],
        map_location: Any = lambda storage, _: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        return super().load_checkpoint(Path(path), map_location, weights_only=True)


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a checkpoint of a :class:`MultilabelModule` without running code from it.

    Raises:
        UsageError: If it does not exist, is damaged, or has the layout of an earlier version.
    """
    try:
        check_sums(path)
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        names, state = content["hyper_parameters"].keys(), content["state_dict"]
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file") from None
    except Exception as error:  # a foreign or damaged file may raise anything
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UsageError(f"{path}: not a checkpoint of this program ({reason})") from error
    if "label_names" not in names or "raw_threshold" not in state:
        raise UsageError(
            f"{path}: written by an earlier version, whose layout is no longer read; train again"
        )
    return content
