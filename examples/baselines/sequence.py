"""Methods for a single sequence: of one modality, or of all of them, one after the other."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from uncertainty_mm.examples.baselines.base import Baseline, Sizes, Transformer, Vectors


class OneSequence(Baseline):
    """A network for one sequence.

    By default it holds the encoded steps of all modalities, one after the other, each marked with where it comes from,
    in one more layer that lets each step attend to all: a method compared with others should see what they see. With
    `modality` the rest is not even encoded, as in a paper about text or images alone.

    Args:
        modality_dims: Sizes of the features by modality.
        max_steps: Longest sequences by modality.
        label_names: Labels.
        modality: The only modality that is read; None reads all.
        options: Options of :class:`~uncertainty_mm.examples.baselines.base.Baseline`.

    Raises:
        ValueError: If there is no such modality.
    """

    def __init__(
        self,
        modality_dims: dict[str, int],
        max_steps: dict[str, int],
        label_names: list[str],
        *,
        modality: str | None = None,
        **options: Any,
    ) -> None:
        if modality is not None and modality not in modality_dims:
            raise ValueError(
                f"Expected `modality` to be one of {[*modality_dims]} or None, but got {modality!r}"
            )
        super().__init__(modality_dims, max_steps, label_names, **options)

    def build(self, sizes: Sizes) -> None:
        only = self.hparams["modality"]
        if only is not None:
            self.encoder = nn.ModuleDict({only: self.encoder[only]})
        self.modality = nn.Parameter(torch.zeros(len(self.encoder), sizes.dim))  # a mark for each
        self.transformer = Transformer(sizes.dim, sizes.heads, sizes.dropout)

    def read(self, encoded: Vectors, padding: Vectors) -> tuple[Tensor, Tensor]:
        """The sequence (B, S, D), 0 at padding, and its padding (B, S)."""
        steps = [x + mark for x, mark in zip(encoded, self.modality, strict=True)]
        mask = torch.cat([*padding], dim=1)
        return self.transformer(torch.cat(steps, dim=1), mask), mask
