"""Predicts labels from the positions of steps: :class:`PlaceClassifier`."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from uncertainty_mm._checks import (
    check_dropout,
    check_features,
    check_finite,
    check_modality_dims,
    check_positive_ints,
    check_tensor,
    check_validate_args,
    checks_values,
)
from uncertainty_mm._component import Component
from uncertainty_mm.encoder import PlaceReads

__all__ = ["PlaceClassifier"]


class PlaceClassifier(Component):
    r"""Predicts the labels from where in the sequences features occur.

    It concatenates the :class:`~uncertainty_mm.encoder.PlaceReads` of all modalities and applies one hidden layer. If
    steps have fixed positions, as in an image, it sees what label queries, which attend to content, cannot. Otherwise
    its predictions are weak, and a :class:`~uncertainty_mm.LogitPool` with other predictions gives it little weight.

    Source: none; it is new here.

    Args:
        modality_dims: Size of a step by modality.
        max_steps: Steps of the longest sequence by modality.
        num_labels: Number of labels :math:`Q`.
        num_reads: Readings of each modality.
        hidden_dim: Size of the hidden layer.
        dropout: Dropout probability after the hidden layer.
        validate_args: Check values on the CPU only (None), never (False), or always (True).

    Raises:
        ValueError: If an argument is out of range, or the names in `max_steps` and `modality_dims` differ.
        TypeError: If an argument has the wrong type.

    Example:
        >>> dims, steps = {"upper": 12, "lower": 12}, {"upper": 9, "lower": 9}
        >>> classifier = PlaceClassifier(dims, steps, num_labels=6)
        >>> features = {"upper": torch.randn(2, 9, 12), "lower": torch.randn(2, 9, 12)}
        >>> padding_mask = {"upper": torch.zeros(2, 9).bool()}  # True: leave out
        >>> classifier(features, padding_mask).shape
        torch.Size([2, 6])
    """

    modality_dims: dict[str, int]
    max_steps: dict[str, int]
    num_labels: int
    validate_args: bool | None

    def __init__(
        self,
        modality_dims: Mapping[str, int],
        max_steps: Mapping[str, int],
        num_labels: int,
        *,
        num_reads: int = 16,
        hidden_dim: int = 512,
        dropout: float = 0.1,
        validate_args: bool | None = None,
    ) -> None:
        super().__init__()
        check_modality_dims(modality_dims)
        if not isinstance(max_steps, Mapping):
            raise TypeError(
                f"Expected `max_steps` to be a mapping from names to sizes, but got {max_steps!r}"
            )
        if set(max_steps) != set(modality_dims):
            raise ValueError(
                f"Expected `max_steps` to name {list(modality_dims)}, but got {list(max_steps)}"
            )
        check_positive_ints(**{f"max_steps[{name!r}]": steps for name, steps in max_steps.items()})
        check_positive_ints(num_labels=num_labels, num_reads=num_reads, hidden_dim=hidden_dim)
        check_dropout(dropout)
        check_validate_args(validate_args)
        self._set(modality_dims=dict(modality_dims), max_steps=dict(max_steps))
        self._set(num_labels=num_labels, validate_args=validate_args)
        self.reads = nn.ModuleDict(
            {
                name: PlaceReads(dim, max_steps[name], num_reads, validate_args=False)
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
        features: Mapping[str, Tensor],
        padding_mask: Mapping[str, Tensor] | None = None,
        factor: Tensor | None = None,
    ) -> Tensor:
        """Predicts a batch.

        Args:
            features: Sequences (B, S_m, D_m) by modality, S_m at most `max_steps`. A modality may be absent.
            padding_mask: Bool tensors (B, S_m) by modality, True where a step is to be left out; without a mask all
                steps are used. Values at padded steps are ignored, even NaN.
            factor: Tensor (B, M), above 0, such as that of :class:`~uncertainty_mm.Typicality`, which divides the
                readings of each modality. 1 leaves every bit as it is; infinity equals a missing modality.

        Returns:
            Logits (B, Q).

        Raises:
            ValueError: If shapes, devices or names disagree, a sequence is too long, a step that counts is not finite,
                or a factor is not above 0.
            TypeError: If a dtype is wrong.
        """
        check_features(features, padding_mask, self.modality_dims)
        some = next(iter(features.values()))
        said = []
        for name, read in self.reads.items():
            x = features.get(name, some.new_zeros(some.shape[0], 0, self.modality_dims[name]))
            mask = None if padding_mask is None else padding_mask.get(name)
            if mask is None or name not in features:
                mask = x.new_zeros(x.shape[:2], dtype=torch.bool)
            if x.shape[1] > self.max_steps[name]:
                raise ValueError(
                    f"Expected `features[{name!r}]` to have at most {self.max_steps[name]} steps, but got {x.shape[1]}"
                )
            if checks_values(x, self.validate_args):
                check_finite(f"features[{name!r}]", x, mask.unsqueeze(2))
            said.append(read(x, mask))
        if factor is not None:
            sizes = {"B": some.shape[0], "M": len(said)}
            check_tensor("factor", factor, "floating", "B M", sizes, some.device)
            if checks_values(factor, self.validate_args) and not (factor > 0).all():
                wrong = factor[~(factor > 0)][0].item()
                raise ValueError(f"Expected `factor` to be above 0, but got {wrong}")
            said = [x / factor[:, index, None].to(x.dtype) for index, x in enumerate(said)]
        logits: Tensor = self.classify(torch.cat(said, dim=1))
        return logits
