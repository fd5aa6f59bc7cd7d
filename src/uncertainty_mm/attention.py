"""Label queries that read each modality (Eq. 1-2): :class:`EmotionQueryAttention`."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from uncertainty_mm._checks import (
    check_dropout,
    check_features,
    check_finite,
    check_flag,
    check_like_parameters,
    check_modality_dims,
    check_positive,
    check_positive_int,
    check_validate_args,
    checks_values,
    missing_modalities,
)
from uncertainty_mm._component import Component
from uncertainty_mm.functional import at_least_float32


class _ModalityAttention(nn.Module):
    """The projections of one modality; the label embeddings are shared and are passed in."""

    def __init__(self, in_dim: int, label_dim: int, proj_dim: int, out_dim: int) -> None:
        super().__init__()
        self.query = nn.Linear(label_dim, proj_dim)
        self.key = nn.Linear(in_dim, proj_dim)
        self.out = nn.Linear(proj_dim, out_dim)

    def forward(
        self,
        labels: Tensor,
        sequence: Tensor,
        mask: Tensor | None,
        missing: Tensor,
        scale: float,
        dropout: float,
        need_weights: bool,
    ) -> tuple[Tensor, Tensor]:
        """Vectors (B, Q, out_dim) and, if needed, weights (B, Q, S)."""
        if mask is not None:
            sequence = sequence.masked_fill(mask.unsqueeze(-1), 0)
            # A softmax over no step is 0/0, so wholly padded rows attend to zeros and are zeroed below.
            mask = mask & ~missing.unsqueeze(-1)
        key = self.key(sequence)
        alone = sequence.shape[1] == 1 and not torch.compiler.is_compiling()
        if alone and not (need_weights or dropout or torch.is_grad_enabled()):
            # Whatever is asked, a single step is the answer; with gradients the query has one, of 0.
            answer = self.out(key).expand(-1, len(labels), -1)
            return answer.masked_fill(missing[:, None, None], 0), key.new_empty(0)
        query = self.query(labels).expand(sequence.shape[0], -1, -1)
        weights = key.new_empty(0)
        # the fused CPU kernel of torch 2.6 overflows in float16
        unsafe = key.dtype is torch.float16 and key.device.type == "cpu"
        if need_weights or unsafe or sequence.shape[1] == 0:
            device = key.device.type if key.device.type != "meta" else "cpu"  # it has no autocast
            with torch.autocast(device, enabled=False):
                wide = at_least_float32(key)
                scores = scale * at_least_float32(query) @ wide.transpose(1, 2)
                if mask is not None:
                    scores = scores.masked_fill(mask.unsqueeze(1), -math.inf)
                weights = scores.softmax(-1)
                gathered = (F.dropout(weights, dropout) @ wide).to(key.dtype)
            weights = weights.masked_fill(missing[:, None, None], 0).to(key.dtype)
        else:
            gathered = F.scaled_dot_product_attention(
                query.unsqueeze(1),
                key.unsqueeze(1),
                key.unsqueeze(1),
                attn_mask=None if mask is None else ~mask[:, None, None, :],
                dropout_p=dropout,
                scale=scale,
            ).squeeze(1)
        return self.out(gathered).masked_fill(missing[:, None, None], 0), weights


class EmotionQueryAttention(Component):
    r"""Reads each modality's sequence once per label, and so gives one vector for every label and modality.

    Every label has a learned embedding, shared by the modalities, which serves as the query of an attention over the
    steps of a sequence. For the label embeddings :math:`L` and the sequence :math:`O^m` of modality :math:`m`

    .. math::
        A^m &= \operatorname{softmax}\bigl(s\, (L W_q^m) (O^m W_k^m)^\top\bigr) \qquad &\text{(Eq. 1)} \\
        Z^m &= \bigl(A^m\, O^m W_k^m\bigr) W_o^m \qquad &\text{(Eq. 2)}

    where the softmax runs over the steps that are not padding (biases are omitted). As in Eq. 2, the same projection
    of the sequence gives both keys and values.

    Source: Huang et al. 2025, arXiv 2502.13954, section 3.3.1. Eq. 1 has :math:`s = 1`; the default
    :math:`s = 1/\sqrt{\text{proj\_dim}}` keeps the scores in a range where the softmax still learns.

    Args:
        modality_dims: Feature size :math:`D_m` of every modality by name. The order of this mapping is the order of
            the modality axis of the output.
        num_labels: Number of labels :math:`Q`.
        label_dim: Size of a label embedding.
        proj_dim: Size of queries and keys.
        out_dim: Size of an output vector.
        scale: Factor of the scores; None for `proj_dim ** -0.5`. Eq. 1 as printed has 1.0.
        dropout: Probability that an attention weight is dropped in training.
        validate_args: Check values (NaN, infinity) on the CPU only (None), never (False), or always (True), which
            stalls an accelerator.

    Attributes:
        label_embedding: `nn.Embedding` of shape (Q, label_dim).
        attention: `nn.ModuleDict` with the projections `query`, `key` and `out` of every modality.

    Raises:
        ValueError: If a size is not positive, no modality is given, or a name cannot name a submodule.
        TypeError: If an argument has the wrong type.

    Example:
        >>> dims = {"text": 8, "audio": 4}
        >>> attention = EmotionQueryAttention(dims, num_labels=6, out_dim=16)
        >>> features = {"text": torch.randn(2, 10, 8), "audio": torch.randn(2, 50, 4)}
        >>> steps = torch.tensor([[30], [0]])  # the second sample has no audio at all
        >>> padding_mask = {"audio": torch.arange(50) >= steps}  # True: leave out
        >>> attention(features, padding_mask).shape
        torch.Size([2, 2, 6, 16])
        >>> attention.missing(features, padding_mask)
        tensor([[False, False],
                [False,  True]])
    """

    modality_dims: dict[str, int]
    num_labels: int
    out_dim: int
    scale: float
    dropout: float
    validate_args: bool | None

    def __init__(
        self,
        modality_dims: Mapping[str, int],
        num_labels: int,
        *,
        label_dim: int = 256,
        proj_dim: int = 256,
        out_dim: int = 128,
        scale: float | None = None,
        dropout: float = 0.0,
        validate_args: bool | None = None,
    ) -> None:
        super().__init__()
        check_modality_dims(modality_dims)
        check_positive_int("num_labels", num_labels)
        check_positive_int("label_dim", label_dim)
        check_positive_int("proj_dim", proj_dim)
        check_positive_int("out_dim", out_dim)
        if scale is not None:
            check_positive("scale", scale)
        check_dropout(dropout)
        check_validate_args(validate_args)
        self._set(
            modality_dims=dict(modality_dims),
            num_labels=num_labels,
            out_dim=out_dim,
            scale=proj_dim**-0.5 if scale is None else float(scale),
            dropout=dropout,
            validate_args=validate_args,
        )
        self.label_embedding = nn.Embedding(num_labels, label_dim)
        self.attention = nn.ModuleDict(
            {
                name: _ModalityAttention(dim, label_dim, proj_dim, out_dim)
                for name, dim in modality_dims.items()
            }
        )

    def missing(
        self, features: Mapping[str, Tensor], padding_mask: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """Which modalities are absent from `features` or wholly padded.

        Only names, shapes and masks are read, neither the values of the features nor any parameter.

        Args:
            features: As for :meth:`forward`.
            padding_mask: As for :meth:`forward`.

        Returns:
            Bool tensor (B, M), True where the modality is missing.

        Raises:
            ValueError: If shapes, devices or names disagree.
            TypeError: If features are not floating or masks not bool.
        """
        check_features(features, padding_mask, self.modality_dims)
        return missing_modalities(features, padding_mask, self.modality_dims)

    def forward(
        self,
        features: Mapping[str, Tensor],
        padding_mask: Mapping[str, Tensor] | None = None,
        *,
        need_weights: bool = False,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """Computes the vector of every label from every modality.

        Args:
            features: Sequences (B, S_m, D_m) by modality name. Lengths may differ; a modality may be absent.
            padding_mask: Bool masks (B, S_m) by modality name, True at the steps to leave out. All steps of a modality
                without a mask are used, and the mask of an absent modality is not read. Values at padded steps are
                ignored, even NaN. The `attention_mask` of Hugging Face means the opposite, so pass
                `attention_mask == 0`.
            need_weights: Also return the attention weights (before dropout); the fused kernel is then not used.

        Returns:
            Tensor (B, M, Q, out_dim), zero where a modality is missing. With `need_weights`, a pair of this tensor and
            a dictionary of weights (B, Q, S_m) by modality name, for the modalities in `features`; a row of weights
            sums to 1, or is 0 where the modality is wholly padded.

        Raises:
            ValueError: If shapes, devices or names disagree, or an unpadded feature is not finite.
            TypeError: If a dtype is wrong.
        """
        check_flag("need_weights", need_weights)
        check_features(features, padding_mask, self.modality_dims)
        missing = missing_modalities(features, padding_mask, self.modality_dims)
        # through the table's own forward pass, because its weight may be sharded elsewhere
        labels = self.label_embedding(torch.arange(self.num_labels, device=missing.device))
        outputs: list[Tensor | None] = []
        weights: dict[str, Tensor] = {}
        for index, name in enumerate(self.modality_dims):
            if name not in features:
                outputs.append(None)
                continue
            sequence = features[name]
            mask = None if padding_mask is None else padding_mask.get(name)
            check_like_parameters(f"features[{name!r}]", sequence, labels)
            if checks_values(sequence, self.validate_args):
                left_out = None if mask is None else mask.unsqueeze(-1)
                check_finite(f"features[{name!r}]", sequence, left_out)
            if mask is not None and checks_values(mask) and not mask.any():
                mask = None
            output, weights[name] = self.attention[name](
                labels,
                sequence,
                mask,
                missing[:, index],
                self.scale,
                self.dropout if self.training else 0.0,
                need_weights,
            )
            outputs.append(output)
        some = next(output for output in outputs if output is not None)
        stacked = torch.stack(
            [torch.zeros_like(some) if output is None else output for output in outputs], dim=1
        )
        return (stacked, weights) if need_weights else stacked
