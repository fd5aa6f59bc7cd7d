"""Networks that join the modalities in the plainest ways: pooled, early, late."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from uncertainty_mm._component import Component
from uncertainty_mm.data import MultimodalDataset
from uncertainty_mm.examples.baselines.base import (
    Baseline,
    Output,
    Sizes,
    Vectors,
    mean_over_steps,
    mlp,
)
from uncertainty_mm.examples.baselines.sequence import OneSequence


class EarlyFusion(OneSequence):
    """The encoded steps of all modalities in one sequence, in which each can attend to all: one more layer."""

    def build(self, sizes: Sizes) -> None:
        super().build(sizes)
        self.head = mlp(sizes.dim, sizes.dim, sizes.labels, sizes.dropout)

    def fuse(self, encoded: Vectors, padding: Vectors) -> Tensor:
        return self.head(mean_over_steps(*self.read(encoded, padding)))


class LateFusion(Baseline):
    """A classifier for each modality; the mean of the logits of those that are there."""

    can_borrow = ("pooling", "typicality")

    def build(self, sizes: Sizes) -> None:
        self.heads = nn.ModuleList(
            mlp(sizes.dim, sizes.dim, sizes.labels, sizes.dropout) for _ in range(sizes.modalities)
        )

    def count_others(self, sizes: Sizes) -> int:
        return sizes.modalities

    def fuse(self, encoded: Vectors, padding: Vectors, factor: Tensor | None = None) -> Output:
        each = zip(self.heads, encoded, padding, strict=True)
        logits = torch.stack([head(mean_over_steps(x, mask)) for head, x, mask in each], dim=1)
        there = torch.stack([~mask.all(1) for mask in padding], dim=1).to(logits)
        weights = (there if factor is None else there / factor).unsqueeze(2).to(logits)
        mean = (weights * logits).sum(1) / weights.sum(1).clamp_min(1e-6)
        alone = torch.where(there.unsqueeze(2) > 0, logits, mean.unsqueeze(1))
        return Output(mean, {}, others=alone.unbind(1))


class Pooling(Component):
    """Mean and standard deviation of the standardised features over the valid steps, (B, S, D) -> (B, 2 D)."""

    mean: Tensor
    std: Tensor

    def __init__(self, in_dim: int) -> None:
        super().__init__()
        self._keep(mean=torch.zeros(in_dim), std=torch.ones(in_dim))

    def standardize(self, mean: Tensor, std: Tensor) -> None:
        """Sets the statistics of the training data; what hardly varies counts as 1e-3."""
        self.mean.copy_(mean)
        self.std.copy_(std.clamp_min(1e-3))

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        x = (x - self.mean) / self.std
        mean = mean_over_steps(x, padding)
        variance = mean_over_steps((x - mean.unsqueeze(1)).square(), padding)
        # The root has no slope at 0, the variance of a single step.
        return torch.cat([mean, variance.clamp_min(1e-12).sqrt()], dim=1)


class PooledMLP(Baseline):
    """No sequences: one hidden layer on the pooled features. Of the options of the encoder only `hidden_dim` counts."""

    center: Tensor
    scale: Tensor

    def build(self, sizes: Sizes) -> None:
        dims = {name: encoder.in_dim for name, encoder in self.encoder.items()}
        self.encoder = nn.ModuleDict({name: Pooling(dim) for name, dim in dims.items()})
        size = 2 * sum(dims.values())
        self._keep(center=torch.zeros(size), scale=torch.ones(size))
        self.head = mlp(size, 4 * sizes.dim, sizes.labels, sizes.dropout)

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self.standardize(self.trainer.datamodule.part("train"))

    def standardize(self, data: MultimodalDataset) -> None:
        """Standardises the pooled features too, with the statistics of the training split."""
        self.center.zero_()
        self.scale.fill_(1)
        x = self.pooled(data)
        self.center.copy_(x.mean(0))
        self.scale.copy_(x.std(0, correction=0).clamp_min(1e-3))

    @torch.no_grad()
    def pooled(self, data: MultimodalDataset, batch_size: int = 256) -> Tensor:
        """The pooled features of a split, (N, 2 (D_1 + ... + D_M)), as the hidden layer reads them."""
        rows = []
        for batch in data.loader(batch_size):
            features, padding = batch.to(self.device)[:2]
            pooled = [pool(features[name], padding[name]) for name, pool in self.encoder.items()]
            rows.append(self.joined(pooled))
        return torch.cat(rows)

    def joined(self, encoded: Vectors) -> Tensor:
        """The pooled features of all modalities, standardised."""
        return (torch.cat([*encoded], dim=1) - self.center) / self.scale

    def fuse(self, encoded: Vectors, padding: Vectors) -> Tensor:
        return self.head(self.joined(encoded))
