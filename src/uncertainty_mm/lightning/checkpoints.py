"""Checkpoints that are whole, movable and harmless, and the error of a command that cannot be carried out."""

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
    """Early stopping that also stops a run which had stopped before and is resumed from its last checkpoint."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.should_stop = self.stopped_epoch > 0


class MovableCheckpoint(ModelCheckpoint):
    """A `ModelCheckpoint` that remembers the best checkpoint also where the run folder was moved."""

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
    """Checkpoints that are whole at any time, and that run no code when they are loaded.

    A checkpoint is written beside the old one and takes its place in one step. (Lightning writes into the folder for
    temporary files, from where another disk can only be reached by copying.)
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
        UsageError: If there is none, it is damaged, or it has the layout of an earlier version.
    """
    try:
        check_sums(path)
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        names, state = content["hyper_parameters"].keys(), content["state_dict"]
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file") from None
    except Exception as error:  # whatever a foreign or damaged file brings about
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UsageError(f"{path}: not a checkpoint of this program ({reason})") from error
    if "label_names" not in names or "raw_threshold" not in state:
        raise UsageError(
            f"{path}: written by an earlier version, whose layout is no longer read; train again"
        )
    return content
