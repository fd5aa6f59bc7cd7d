"""Provides the splits of a data set to Lightning: :class:`MultimodalDataModule`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from uncertainty_mm.data import (
    SPLITS,
    MultimodalBatch,
    MultimodalDataset,
    SyntheticMMER,
    read,
    transforms,
)
from uncertainty_mm.lightning.callbacks import place
from uncertainty_mm.lightning.checkpoints import UsageError


class MultimodalDataModule(L.LightningDataModule):
    """Provides the splits of a data set to Lightning.

    Args:
        path: File or folder in a layout of :func:`uncertainty_mm.data.read`; None makes synthetic data whose best
            possible predictions are known (:class:`~uncertainty_mm.data.SyntheticMMER`).
        format: The layout; `"auto"` uses the suffix.
        labels: File with the labels, if they are in another file (`"mmsa"`).
        label_names: Names of the labels for files that have none, such as new data to predict.
        split: The split that `predict` reads; all of a file without splits is read.
        batch_size: Number of samples per step.
        num_workers: Number of processes that load batches.
        drop_modality: Share of the training samples that lose a random half of their modalities.
        corrupt_modality: Share of the training sequences that get noise of up to 5 times their standard deviation.
        max_train_samples: Largest number of training samples, taken at even distances; None takes all.
        seed: Seed of the order of samples, of dropped and corrupted modalities, and of synthetic data.

    Attributes:
        parts: The data sets by split.
        bayes: For synthetic data, the best possible probabilities (N, Q) by split.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        format: Literal[
            "auto", "npz", "folder", "mmsa", "tailor", "m3ed", "m3ed-dialogue"
        ] = "auto",
        labels: str | os.PathLike[str] | None = None,
        label_names: list[str] | None = None,
        split: str = "test",
        batch_size: int = 128,
        num_workers: int = 0,
        drop_modality: float = 0.0,
        corrupt_modality: float = 0.0,
        max_train_samples: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(
                f"Expected `batch_size` to be a positive integer, but got {batch_size}"
            )
        if num_workers < 0:
            raise ValueError(f"Expected `num_workers` to be at least 0, but got {num_workers}")
        if max_train_samples is not None and max_train_samples < 1:
            raise ValueError(
                f"Expected `max_train_samples` to be a positive integer or None, but got {max_train_samples}"
            )
        for name, share in (
            ("drop_modality", drop_modality),
            ("corrupt_modality", corrupt_modality),
        ):
            if not 0 <= share < 1:
                raise ValueError(f"Expected `{name}` to be in [0, 1), but got {share}")
        self.split, self.batch_size, self.num_workers, self.seed = (
            split,
            batch_size,
            num_workers,
            seed,
        )
        self.drop_modality, self.corrupt_modality = drop_modality, corrupt_modality
        self.name = "synthetic" if path is None else Path(path).stem
        self.bayes: dict[str, Tensor] = {}
        self._cached_statistics: Mapping[str, Any] | None = None
        self.parts = (
            self._synthetic()
            if path is None
            else read(path, format=format, labels=labels, label_names=label_names, splits=())
        )
        first = next(iter(self.parts.values()))
        for split_name, part in self.parts.items():
            if (part.dims, part.label_names) != (first.dims, first.label_names):
                raise ValueError(
                    f"{path}: the {split_name} split has other modalities, sizes or labels than the first one"
                )
        self.modality_dims, self.label_names = first.dims, first.label_names
        self.max_steps = {m: max(part.steps[m] for part in self.parts.values()) for m in first.dims}
        count, limit = len(self.parts.get("train", ())), max_train_samples
        if limit is not None and limit < count:  # evenly, since a file may be sorted
            self.parts["train"] = self.parts["train"].select(torch.arange(limit) * count // limit)
        self.num_train_samples = max(1, len(self.parts.get("train", ())))

    def _synthetic(self, sizes: Sequence[int] = (3000, 500, 1000)) -> dict[str, MultimodalDataset]:
        """Makes data of six correlated emotions in three noisy modalities."""
        world, parts = SyntheticMMER(missing_rate=0.05), {}
        for offset, (split, size) in enumerate(zip(SPLITS, sizes, strict=True)):
            samples = world.sample(size, seed=3 * self.seed + offset)
            names = ["happy", "sad", "anger", "surprise", "disgust", "fear"]
            parts[split] = MultimodalDataset(
                samples.features, samples.padding_mask, samples.labels, names
            )
            self.bayes[split] = world.posterior(samples).marginals.float()
        return parts

    def part(self, split: str) -> MultimodalDataset:
        """The data set of a split; raises UsageError if it has no samples."""
        if not len(self.parts.get(split, ())):
            whole = "; the file has no `split`" if list(self.parts) == ["all"] else ""
            raise UsageError(f"{self.name}: no sample in the {split} split{whole}")
        return self.parts[split]

    def _in_order(self, split: str) -> DataLoader[MultimodalBatch]:
        """A loader of a split in order, divided among the processes without repeated samples."""
        data, trainer = self.part(split), self.trainer
        ranks, rank = (1, 0) if trainer is None else (trainer.world_size, trainer.global_rank)
        if len(data) < ranks:
            raise UsageError(
                f"{self.name}: {ranks} devices, but {len(data)} samples in the {split} split"
            )
        return self._loader(data, range(rank, len(data), ranks))

    def _loader(self, data: MultimodalDataset, sampler: Any) -> DataLoader[MultimodalBatch]:
        return data.loader(
            self.batch_size,
            trim=True,
            sampler=sampler,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
        )

    def train_dataloader(self) -> DataLoader[MultimodalBatch]:
        """The training split, divided among the processes, in an order that depends only on seed and epoch."""
        assert self.trainer is not None
        data, rank = self.part("train"), self.trainer.global_rank
        sampler: DistributedSampler[Any] = DistributedSampler(
            data, self.trainer.world_size, rank, seed=self.seed
        )
        return self._loader(data, sampler)

    def val_dataloader(self) -> DataLoader[MultimodalBatch]:
        """The validation split."""
        return self._in_order("validation")

    def test_dataloader(self) -> DataLoader[MultimodalBatch]:
        """The test split."""
        return self._in_order("test")

    def predict_dataloader(self) -> DataLoader[MultimodalBatch]:
        """The split `split`, or all samples of a file without splits."""
        return self._in_order("all" if "all" in self.parts else self.split)

    def transfer_batch_to_device(
        self, batch: MultimodalBatch, device: torch.device, dataloader_idx: int
    ) -> MultimodalBatch:
        """Copies the batch to the device, without waiting if its memory is pinned."""
        return batch.to(device, non_blocking=True)

    def on_after_batch_transfer(
        self, batch: MultimodalBatch, dataloader_idx: int
    ) -> MultimodalBatch:
        """Drops and corrupts modalities of training batches, in the same way when a run is resumed."""
        if self.trainer is None or not self.trainer.training:
            return batch
        generator = torch.Generator(batch.labels.device)
        # a separate generator, because with that of dropout both would drop the same samples' units and modalities
        generator.manual_seed(2**62 + place(self.seed, self.trainer))
        if self.drop_modality:
            batch = transforms.drop_modalities(batch, self.drop_modality, generator=generator)
        if self.corrupt_modality:
            spread = {name: each.std for name, each in self.statistics().items()}
            batch = transforms.noise(
                batch, self.corrupt_modality, spread=spread, generator=generator
            )
        return batch

    def statistics(self) -> Mapping[str, Any]:
        """Mean and standard deviation of the training features, computed once."""
        if self._cached_statistics is None:
            self._cached_statistics = self.part("train").statistics()
        return self._cached_statistics
