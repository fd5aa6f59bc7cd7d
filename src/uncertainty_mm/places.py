"""A prediction from the steps of all modalities at their places: :class:`PlaceClassifier`."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from uncertainty_mm._checks import (
    check_dropout,
    check_modality_dims,
    check_positive_ints,
    check_tensor,
    check_validate_args,
)
from uncertainty_mm._component import Component
from uncertainty_mm.encoder import PlaceReads

__all__ = ["PlaceClassifier"]


class PlaceClassifier(Component):
    r"""Predicts the labels from where in the sequences things stand.

    :class:`~uncertainty_mm.encoder.PlaceReads` of every modality, side by side, and one hidden layer. Where steps are
    places, as in an image, it sees what label queries, which ask by content, cannot; where they are not, it is a weak
    prediction, and a :class:`~uncertainty_mm.LogitPool` beside others finds that out.

    Source: ours.

    Args:
        modality_dims: Size of a step by modality.
        max_steps: Steps of the longest sequence by modality.
        num_labels: Number of labels :math:`Q`.
        num_reads: Readings of each modality.
        hidden_dim: Size of the hidden layer.
        dropout: Dropout probability after the hidden layer.
        validate_args: Whether to look at values: None on the CPU only, False never, True everywhere.

    Raises:
        ValueError: If an argument is out of range, or the names in `max_steps` are others than in `modality_dims`.
        TypeError: If an argument has the wrong type.

    Example:
        >>> classifier = PlaceClassifier({"upper": 12, "lower": 12}, {"upper": 9, "lower": 9}, num_labels=6)
        >>> sequences = {"upper": torch.randn(2, 9, 12), "lower": torch.randn(2, 9, 12)}
        >>> padding_mask = {name: torch.zeros(2, 9).bool() for name in sequences}  # True: leave out
        >>> classifier(sequences, padding_mask).shape
        torch.Size([2, 6])
    """

    modality_dims: dict[str, int]
    num_labels: int

    def __init__(
        self,
        modality_dims: Mapping[str, int],
        max_steps: Mapping[str, int],
        num_labels: int,
        *,
        num_reads: int = 16,
        hidden_dim: int = 256,
        dropout: float = 0.1,
        validate_args: bool | None = None,
    ) -> None:
        super().__init__()
        check_modality_dims(modality_dims)
        if set(max_steps) != set(modality_dims):
            raise ValueError(
                f"Expected `max_steps` to name {list(modality_dims)}, but got {list(max_steps)}"
            )
        check_positive_ints(num_labels=num_labels, num_reads=num_reads, hidden_dim=hidden_dim)
        check_dropout(dropout)
        check_validate_args(validate_args)
        self._set(modality_dims=dict(modality_dims), num_labels=num_labels)
        self.reads = nn.ModuleDict(
            {
                name: PlaceReads(dim, max_steps[name], num_reads, validate_args=validate_args)
                for name, dim in modality_dims.items()
            }
        )
        self.classify = nn.Sequential(
            nn.Linear(num_reads * sum(modality_dims.values()), hidden_dim),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden_dim, num_labels),
        )

    def forward(
        self,
        sequences: Mapping[str, Tensor],
        padding_mask: Mapping[str, Tensor],
        factor: Tensor | None = None,
    ) -> Tensor:
        """Predicts a batch.

        Args:
            sequences: (B, S_m, D_m) by modality.
            padding_mask: Bool (B, S_m) by modality, True where a step is to be left out. What stands there has no
                influence.
            factor: (B, M), above 0, such as that of :class:`~uncertainty_mm.Typicality`: what a modality says is
                divided by it.

        Returns:
            Logits (B, Q).

        Raises:
            ValueError: If a modality is missing from the mappings, shapes or devices disagree, a sequence is too long,
                or a step that counts is not finite.
            TypeError: If a dtype is wrong.
        """
        for argument, given in (("sequences", sequences), ("padding_mask", padding_mask)):
            if absent := [name for name in self.modality_dims if name not in given]:
                raise ValueError(f"Expected `{argument}` to hold {absent}, but got {list(given)}")
        said = [read(sequences[name], padding_mask[name]) for name, read in self.reads.items()]
        if factor is not None:
            sizes = {"B": len(said[0]), "M": len(said)}
            check_tensor("factor", factor, "floating", "B M", sizes, said[0].device)
            said = [x / factor[:, index, None].to(x.dtype) for index, x in enumerate(said)]
        logits: Tensor = self.classify(torch.cat(said, dim=1))
        return logits
