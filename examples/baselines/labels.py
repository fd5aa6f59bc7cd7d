"""Labels as vectors: they ask, weigh what the modalities answer, and are read."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from uncertainty_mm import EmotionQueryAttention
from uncertainty_mm.examples.baselines.base import Sizes, Vectors


class LabelQueries(nn.Module):
    """Every label asks each sequence (B, S_m, D) of a list, with the attention of LDDU (Eq. 1-2): (B, M, Q, D)."""

    def __init__(self, sequences: int, sizes: Sizes) -> None:
        super().__init__()
        widths = dict.fromkeys(("label_dim", "proj_dim", "out_dim"), sizes.dim)
        dims = {str(index): sizes.dim for index in range(sequences)}
        self.attention = EmotionQueryAttention(dims, sizes.labels, **widths, validate_args=False)

    def forward(self, sequences: Vectors, padding: Vectors, **options: Any) -> Any:
        names = self.attention.modality_dims
        named = (dict(zip(names, each, strict=True)) for each in (sequences, padding))
        return self.attention(*named, **options)


class ModalityAttention(nn.Module):
    """The mean (B, Q, D) of vectors (B, M, Q, D), weighed by a learned score; 0 of no modality."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.score = nn.Linear(dim, 1, bias=False)

    def weights(self, x: Tensor, missing: Tensor, factor: Tensor | None = None) -> Tensor:
        """Weights (B, M, Q, 1), which sum to 1 over the modalities that are there; they count like precisions.

        A factor (B, M) of the variances divides them.
        """
        missing = missing[:, :, None, None]
        left_out = missing & ~missing.all(1, keepdim=True)  # a softmax needs one
        score = self.score(x)
        if factor is not None:
            score = score - factor.log()[:, :, None, None].to(score)
        weights = score.masked_fill(left_out, -float("inf")).softmax(1)
        return weights.masked_fill(missing, 0)

    def forward(self, x: Tensor, missing: Tensor, factor: Tensor | None = None) -> Tensor:
        return (self.weights(x, missing, factor) * x).sum(1)


class LabelHead(nn.Linear):
    """A linear classifier for each label, of the vector of the label: (..., Q, D) -> (..., Q)."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes.dim, sizes.labels)

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.weight).sum(-1) + self.bias
