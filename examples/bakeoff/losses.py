"""What is compared second: losses that say what a standard deviation or a confidence should be.

A loss is a module made from (M, Q, K, number of training samples); its `forward(model, output, batch)` returns a
scalar. `LOSSES` has them by name, each with the weight that it has next to the cross-entropy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from uncertainty_mm import (
    AccuracyUncertaintyLoss,
    CorrectnessRankingLoss,
    CorrectnessTracker,
    DiagonalGaussian,
    DistributionSupConLoss,
    MonotoneConfidenceLoss,
    SoftRankOrdinalityLoss,
)
from uncertainty_mm.data import MultimodalBatch
from uncertainty_mm.functional import prediction_distance
from uncertainty_mm.lightning import mean_over_known


class Contrastive(nn.Module):
    """Gaussians of one modality and label attract each other; of the first samples of a batch, as in LDDU."""

    def __init__(
        self, modalities: int, labels: int, latent_dim: int, samples: int, **options: Any
    ) -> None:
        super().__init__()
        self.first = max(1, 512 // (modalities * labels))  # LDDU's `scl_rows`
        options = {"queue_size": 1024, "validate_args": False, **options}
        self.loss = DistributionSupConLoss(modalities, labels, latent_dim, **options)

    def forward(self, model: nn.Module, output: Any, batch: MultimodalBatch) -> Tensor:
        some = slice(self.first)
        latent = DiagonalGaussian(*(x[some] for x in output.latent))
        unknown = None if batch.unknown is None else batch.unknown[some]
        return self.loss(latent, batch.labels[some], output.missing[some], unknown=unknown)


class Ordinality(nn.Module):
    """Standard deviations in the order of the errors, each modality's with its own: LDDU's `pooled` targets."""

    def __init__(
        self, modalities: int, labels: int, latent_dim: int, samples: int, **options: Any
    ) -> None:
        super().__init__()
        self.tracker = CorrectnessTracker(samples, modalities, validate_args=False)
        self.loss = SoftRankOrdinalityLoss(validate_args=False, **options)

    def forward(self, model: nn.Module, output: Any, batch: MultimodalBatch) -> Tensor:
        unseen = self.tracker.counts(batch.indices) == 0
        correctness = self.tracker(batch.indices)
        probs, unknown = output.fused.modality_logits.float().sigmoid(), batch.unknown
        unknown = None if unknown is None else unknown.unsqueeze(1).expand_as(probs)
        labels = batch.labels.unsqueeze(1).expand_as(probs)
        distance = mean_over_known(prediction_distance(probs, labels, unknown), unknown)
        absent = output.missing if unknown is None else output.missing | unknown.all(2)
        self.tracker.update(batch.indices, 1 - distance.detach(), mask=absent)
        size = torch.linalg.vector_norm(output.latent.std.float().flatten(2), dim=2)
        return self.loss(
            std_norm=size.flatten(),
            distance=distance.flatten(),
            correctness=correctness.flatten(),
            mask=(unseen | absent).flatten(),
        )


class CorrectnessRanking(nn.Module):
    """A sample that was predicted better so far is the surer one; confidence is the expected share of right labels."""

    def __init__(self, modalities: int, labels: int, latent_dim: int, samples: int) -> None:
        super().__init__()
        self.tracker = CorrectnessTracker(samples, validate_args=False)
        self.loss = CorrectnessRankingLoss(validate_args=False)

    def forward(self, model: nn.Module, output: Any, batch: MultimodalBatch) -> Tensor:
        unseen = self.tracker.counts(batch.indices) == 0
        correctness = self.tracker(batch.indices)
        probs = output.logits.float().sigmoid()
        right = ((probs > 0.5) == (batch.labels > 0.5)).float()
        nothing = torch.zeros_like(unseen) if batch.unknown is None else batch.unknown.all(1)
        self.tracker.update(batch.indices, mean_over_known(right, batch.unknown), mask=nothing)
        confidence = mean_over_known(torch.maximum(probs, 1 - probs), batch.unknown)
        return self.loss(confidence=confidence, correctness=correctness, mask=unseen | nothing)


class AccuracyUncertainty(nn.Module):
    """Certain where right, uncertain where wrong; the uncertainty of a label is its entropy, as in the paper."""

    def __init__(self, modalities: int, labels: int, latent_dim: int, samples: int) -> None:
        super().__init__()
        self.loss = AccuracyUncertaintyLoss(validate_args=False)

    def forward(self, model: nn.Module, output: Any, batch: MultimodalBatch) -> Tensor:
        logits = output.logits.float()
        probs = logits.sigmoid()
        entropy = F.binary_cross_entropy_with_logits(logits, probs, reduction="none")
        return self.loss(
            probs=probs, uncertainty=entropy, labels=batch.labels, unknown=batch.unknown
        )


class MonotoneConfidence(nn.Module):
    """Where all modalities are right, no surer without one of them, drawn for every sample."""

    def __init__(self, modalities: int, labels: int, latent_dim: int, samples: int) -> None:
        super().__init__()
        self.loss = MonotoneConfidenceLoss(validate_args=False)

    def forward(self, model: Any, output: Any, batch: MultimodalBatch) -> Tensor:
        missing = output.missing
        drawn = torch.rand(missing.shape, device=missing.device).masked_fill(missing, -1)
        fewer = missing.scatter(1, drawn.argmax(1, keepdim=True), True)
        full, subset = output.logits, model.rule(output.latent, fewer).logits
        wrong = (full > 0) != (batch.labels > 0.5)
        nothing = wrong | missing.all(1, keepdim=True)
        if batch.unknown is not None:
            nothing = nothing | batch.unknown
        # |logit| / 2: the confidence max(p, 1 - p) is a half of tanh of it, plus a half
        full, subset = ((x.float().abs() / 2).tanh() for x in (full, subset))
        return self.loss(full=full / 2 + 0.5, subset=subset / 2 + 0.5, mask=nothing)


class Bottleneck(nn.Module):
    """In training the rule sees a sample of the Gaussians, which are kept near N(0, 1) (Alemi et al. 2017)."""

    samples_latent = True

    def __init__(self, modalities: int, labels: int, latent_dim: int, samples: int) -> None:
        super().__init__()

    def forward(self, model: nn.Module, output: Any, batch: MultimodalBatch) -> Tensor:
        return output.latent.kl_to_standard_normal().mean()


class Loss(NamedTuple):
    """A loss and its weight next to the cross-entropy: that of LDDU, else 1, less for a bottleneck; none was tuned."""

    make: Callable[[int, int, int, int], nn.Module]
    weight: float


LOSSES: Mapping[str, Loss] = {
    "contrastive": Loss(Contrastive, 0.1),
    "contrastive_wasserstein": Loss(partial(Contrastive, similarity="wasserstein"), 0.1),
    "contrastive_sampled": Loss(partial(Contrastive, similarity="sampled"), 0.1),
    "ordinality_rank": Loss(partial(Ordinality, mode="rank"), 0.3),
    "ordinality_pearson": Loss(partial(Ordinality, mode="pearson"), 0.3),
    "correctness_ranking": Loss(CorrectnessRanking, 1.0),
    "accuracy_uncertainty": Loss(AccuracyUncertainty, 1.0),
    "monotone_confidence": Loss(MonotoneConfidence, 1.0),
    "bottleneck": Loss(Bottleneck, 1e-3),
}
