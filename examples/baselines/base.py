"""What the networks share: the encoders of LDDU in front, binary cross-entropy behind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from uncertainty_mm import LogitPool, Typicality
from uncertainty_mm.data import MultimodalBatch
from uncertainty_mm.encoder import EncoderLayer, PackedSteps, SequenceEncoder
from uncertainty_mm.lightning import MultilabelModule, masked_bce

Vectors = Sequence[Tensor]  # by modality


class Output(NamedTuple):
    """What a network says of a batch."""

    logits: Tensor  # (B, Q)
    auxiliary: Mapping[str, Tensor]  # weighted losses added to the cross-entropy
    hidden: Any = None  # what `Baseline.auxiliary` needs
    others: Sequence[Tensor] = ()  # further predictions (B, Q), which can be pooled


class Sizes(NamedTuple):
    """What the part of a network behind its encoders is built from."""

    modalities: int
    labels: int
    dim: int
    heads: int
    dropout: float


class Baseline(MultilabelModule):
    """A network that joins what the encoders say of the modalities.

    A subclass adds its layers in `build(sizes)`. Its `fuse(encoded, padding)` makes logits (B, Q), or an `Output`, of
    the encoded steps (B, S_m, D) and their padding (B, S_m), each a list by modality. If it weighs the modalities, it
    also takes the factor (B, M) of the variances that :class:`~uncertainty_mm.Typicality` gives in evaluation, None
    without, and divides the weights by it.

    Args:
        modality_dims: Sizes of the features by modality.
        max_steps: Longest sequences by modality.
        label_names: Labels.
        encoder: Options of the encoders.
        dropout: Dropout of the layers behind the encoders.
        borrows: What it takes over from LDDU, of `can_borrow`: a pool of its predictions, fitted on the validation data
            (`"pooling"`), and that a modality unlike the training data counts less (`"typicality"`).
        training: Options of :class:`~uncertainty_mm.lightning.MultilabelModule`.

    Attributes:
        can_borrow: Class attribute: `"pooling"` where it makes several predictions, `"typicality"` where it weighs the
            modalities.

    Raises:
        ValueError: If it cannot borrow what it is to borrow.
    """

    parts: ClassVar = {"encoder": SequenceEncoder}
    can_borrow: ClassVar[Sequence[str]] = ()

    def __init__(
        self,
        modality_dims: dict[str, int],
        max_steps: dict[str, int],
        label_names: list[str],
        *,
        encoder: Mapping[str, Any] = {},
        dropout: float = 0.1,
        borrows: Sequence[Literal["pooling", "typicality"]] = (),
        **training: Any,
    ) -> None:
        super().__init__(label_names, **training)
        if not set(borrows) <= set(self.can_borrow):
            raise ValueError(
                f"Expected `borrows` to hold some of {[*self.can_borrow]}, but got {[*borrows]}"
            )
        self.pools = "pooling" in borrows
        self.typicality = None
        if "typicality" in borrows:
            self.typicality = Typicality(modality_dims, validate_args=False)
        self.encoder = nn.ModuleDict()
        for name, dim in modality_dims.items():
            self.encoder[name] = first = self.part("encoder", encoder, dim, max_steps[name])
        heads = first.layers[0].num_heads
        sizes = Sizes(len(modality_dims), len(label_names), first.hidden_dim, heads, dropout)
        self.build(sizes)
        if self.pools:
            self.pool = LogitPool(1 + self.count_others(sizes), sizes.labels, validate_args=False)

    def count_others(self, sizes: Sizes) -> int:
        """How many further predictions it makes."""
        return 1

    def forward(self, features: Mapping[str, Tensor], padding_mask: Mapping[str, Tensor]) -> Output:
        masks = [padding_mask[name] for name in self.encoder]
        each = zip(self.encoder.items(), masks, strict=True)
        encoded = [encoder(features[name], mask) for (name, encoder), mask in each]
        typical = ()
        if self.typicality is not None and not self.training:
            typical = (self.typicality(features, padding_mask),)
        fused = self.fuse(encoded, masks, *typical)
        return fused if isinstance(fused, Output) else Output(fused, {})

    def experts(self, output: Output) -> Tensor:
        """Logits of the predictions that are pooled, (B, E, Q)."""
        others = output.others if self.pools else ()
        return torch.stack([output.logits, *others], dim=1)

    def losses(self, output: Output, batch: MultimodalBatch) -> dict[str, Tensor]:
        """The cross-entropy, the losses of the network itself, and their sum, `total`."""
        entropy = masked_bce(output.logits, self.targets(batch), batch.unknown)
        losses = {"cls": entropy, **self.auxiliary(output, batch)}
        return {**losses, "total": torch.stack(list(losses.values())).sum()}

    def auxiliary(self, output: Output, batch: MultimodalBatch) -> Mapping[str, Tensor]:
        """The losses of the network itself, weighted, where they need labels; `cls` replaces the cross-entropy."""
        return output.auxiliary

    def on_fit_start(self) -> None:
        """Standardises the features as LDDU does, and learns what is typical."""
        super().on_fit_start()
        statistics = self.trainer.datamodule.statistics()
        for name, encoder in self.encoder.items():
            encoder.standardize(statistics[name].mean, statistics[name].std)
        if self.typicality is not None:
            self.typicality.fit(self.trainer.datamodule.part("train"))

    def training_step(self, batch: MultimodalBatch, batch_idx: int) -> Tensor:
        losses = self.losses(self(batch.features, batch.padding_mask), batch)
        self.log_losses(losses, batch)
        return losses["total"]


def mean_over_steps(x: Tensor, padding: Tensor) -> Tensor:
    """Mean of the valid steps, (B, S, D) -> (B, D); 0 where there is none."""
    padding = padding.unsqueeze(2)
    return x.masked_fill(padding, 0).sum(1) / (~padding).sum(1).clamp_min(1)


def mlp(in_dim: int, hidden_dim: int, out_dim: int, dropout: float) -> nn.Sequential:
    """One hidden layer."""
    return nn.Sequential(
        nn.Linear(in_dim, hidden_dim),
        nn.GELU(),
        nn.Dropout(dropout),
        nn.Linear(hidden_dim, out_dim),
    )


class Transformer(nn.Module):
    """A Transformer layer over vectors (B, S, D), of which some are missing; these become 0."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.layer = EncoderLayer(dim, heads, dropout)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        steps = PackedSteps(padding)
        mask = ~padding | padding.all(dim=1, keepdim=True)
        x = self.norm(self.layer(steps.pack(x), steps, mask[:, None, None]))
        return steps.unpack(x).masked_fill(padding.unsqueeze(2), 0)
