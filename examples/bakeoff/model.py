"""The one small model in which rules and losses are compared: :class:`FusionModel`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from uncertainty_mm import DiagonalGaussian, EmotionQueryAttention, GaussianDecoupler
from uncertainty_mm.data import MultimodalBatch
from uncertainty_mm.encoder import SequenceEncoder
from uncertainty_mm.examples.bakeoff.losses import LOSSES
from uncertainty_mm.examples.bakeoff.rules import RULES, Fused
from uncertainty_mm.examples.baselines.base import Baseline, Sizes
from uncertainty_mm.functional import beta_evidence_loss
from uncertainty_mm.lightning import masked_mean


class Output(NamedTuple):
    """What the model says of a batch."""

    latent: DiagonalGaussian  # (B, M, Q, K)
    missing: Tensor  # (B, M)
    fused: Fused

    @property
    def logits(self) -> Tensor:
        """Of the fused prediction, (B, Q)."""
        return self.fused.logits


class FusionModel(Baseline):
    """LDDU up to its Gaussians; what comes then is a rule and a loss.

    The encoders, the queries of the labels, which scale and shift their answers, and the Gaussians are those of
    `lddu_full.py`. The fused prediction and that of each modality alone are trained alike, by cross-entropy; where a
    rule has evidence, by the cross-entropy that is expected under it.

    Args:
        modality_dims: Sizes of the features by modality.
        max_steps: Longest sequences by modality.
        label_names: Labels.
        num_train_samples: Number of samples, for losses with a history.
        rule: A name of `rules.RULES`.
        loss: A name of `losses.LOSSES`, or None.
        loss_weight: Of that loss; None for its own.
        attention: Options of the label queries.
        decoupler: Options of the Gaussians.
        options: Of the :class:`~uncertainty_mm.examples.baselines.base.Baseline`.
    """

    parts: ClassVar = {
        "encoder": SequenceEncoder,
        "attention": EmotionQueryAttention,
        "decoupler": GaussianDecoupler,
    }

    def __init__(
        self,
        modality_dims: dict[str, int],
        max_steps: dict[str, int],
        label_names: list[str],
        num_train_samples: int,
        *,
        rule: str = "product",
        loss: str | None = None,
        loss_weight: float | None = None,
        attention: Mapping[str, Any] = {},
        decoupler: Mapping[str, Any] = {},
        **options: Any,
    ) -> None:
        for name, value, known in (("rule", rule, RULES), ("loss", loss, {None, *LOSSES})):
            if value not in known:
                raise ValueError(f"Expected `{name}` to be one of {[*known]}, but got {value!r}")
        super().__init__(modality_dims, max_steps, label_names, **options)
        modalities, labels, dim = self.sizes.modalities, self.sizes.labels, self.sizes.dim
        self.attention = self.part(
            "attention", attention, dict.fromkeys(modality_dims, dim), labels
        )
        z_dim = self.attention.out_dim
        self.asked_by = nn.Linear(self.attention.label_embedding.embedding_dim, 2 * z_dim)
        self.decoupler = self.part("decoupler", decoupler, modalities, z_dim)
        shape = (modalities, labels, self.decoupler.latent_dim)
        self.rule = RULES[rule](*shape)
        self.loss = None if loss is None else LOSSES[loss].make(*shape, num_train_samples)
        given = loss_weight is not None or loss is None
        self.loss_weight = loss_weight if given else LOSSES[loss].weight

    def build(self, sizes: Sizes) -> None:
        self.sizes = sizes

    def forward(self, features: Mapping[str, Tensor], padding_mask: Mapping[str, Tensor]) -> Output:
        encoded = {n: part(features[n], padding_mask[n]) for n, part in self.encoder.items()}
        missing = self.attention.missing(encoded, padding_mask)
        z = self.attention(encoded, padding_mask)
        scale, shift = self.asked_by(self.attention.label_embedding.weight).chunk(2, dim=1)
        z = ((1 + scale) * z + shift).masked_fill(missing[:, :, None, None], 0)
        latent = self.decoupler(z, missing)
        seen = latent
        if self.training and getattr(self.loss, "samples_latent", False):
            seen = DiagonalGaussian(latent.rsample(), latent.std)
        return Output(latent, missing, self.rule(seen, missing))

    def details(self, output: Output) -> dict[str, Tensor]:
        """Uncertainty of the modalities (NaN where missing) and of the fused prediction, as far as a rule has them."""
        fused, absent = output.fused, output.missing.unsqueeze(2)
        each = fused.modality_uncertainty
        said = {
            "std_norm": None if each is None else each.masked_fill(absent, torch.nan),
            "fused_uncertainty": fused.uncertainty,
            "conflict": fused.conflict,
        }
        return {"missing": output.missing, **{k: x for k, x in said.items() if x is not None}}

    def losses(self, output: Output, batch: MultimodalBatch) -> dict[str, Tensor]:
        """Of the fused prediction, of the modalities alone, the loss that is compared, and their weighted sum."""
        fused, missing = output.fused, output.missing
        target = self.targets(batch)
        each = target.unsqueeze(1).expand_as(fused.modality_logits)
        whole = costs(fused.logits, fused.evidence, target)
        alone = costs(fused.modality_logits, fused.modality_evidence, each)
        alone = alone.masked_fill(missing.unsqueeze(2), 0).mean(1)
        losses = {
            "cls": masked_mean(whole, batch.unknown),
            "modality": masked_mean(alone, batch.unknown),
        }
        total = losses["cls"] + losses["modality"]
        if fused.confidence_logits is not None:
            wrong = costs(fused.confidence_logits, None, truth_given(fused.modality_logits, each))
            wrong = wrong.masked_fill(missing.unsqueeze(2), 0).mean(1)
            losses["confidence"] = masked_mean(wrong, batch.unknown)
            total = total + losses["confidence"]
        if self.loss is not None:
            losses["compared"] = self.loss(self, output, batch)
            total = total + self.loss_weight * losses["compared"]
        return {**losses, "total": total}


def costs(logits: Tensor, evidence: Tensor | None, target: Tensor) -> Tensor:
    """Cross-entropy of every label, (..., Q); where there is evidence, (..., Q, 2), the one expected under it."""
    if evidence is None:
        return F.binary_cross_entropy_with_logits(logits.float(), target, reduction="none")
    flat = beta_evidence_loss(evidence.flatten(0, -3), target.flatten(0, -2), validate_args=False)
    return flat.view_as(target)


def truth_given(logits: Tensor, target: Tensor) -> Tensor:
    """The probability that a prediction gives to the truth."""
    probs = logits.detach().float().sigmoid()
    return target * probs + (1 - target) * (1 - probs)
