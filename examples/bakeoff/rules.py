"""What is compared first: rules that make one prediction of the Gaussians of all modalities, behind one call.

A rule is a module made from (M, Q, K); its `forward(latent, missing)` returns a `Fused`. `RULES` has them by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from uncertainty_mm import (
    BeliefFusion,
    DecisionFusion,
    DiagonalGaussian,
    GaussianFusion,
    UncertaintyGatedFusion,
)
from uncertainty_mm.beliefs import BeliefRule
from uncertainty_mm.decisions import DecisionRule
from uncertainty_mm.examples.baselines.base import mean_over_steps
from uncertainty_mm.functional import expected_distance, reduced_chi2
from uncertainty_mm.rules import Rule


class Fused(NamedTuple):
    """What a rule says of a batch; None where it does not say such a thing."""

    logits: Tensor  # (B, Q)
    modality_logits: Tensor  # (B, M, Q), of each modality alone
    uncertainty: Tensor | None = None  # (B, Q), of the fused prediction
    modality_uncertainty: Tensor | None = None  # (B, M, Q)
    conflict: Tensor | None = None  # (B, Q)
    evidence: Tensor | None = None  # (B, Q, 2); it is trained as such instead of the logits
    modality_evidence: Tensor | None = None  # (B, M, Q, 2)
    # (B, M, Q), trained towards the probability that the modality gives to the truth
    confidence_logits: Tensor | None = None


class Readout(nn.Module):
    """What each modality says by itself: linear in the means of its Gaussians, with a bias for each label."""

    def __init__(self, modalities: int, labels: int, latent_dim: int, outputs: int = 1) -> None:
        super().__init__()
        bound = latent_dim**-0.5  # as in `nn.Linear`
        weight = torch.empty(modalities, latent_dim, outputs).uniform_(-bound, bound)
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(torch.zeros(modalities, labels, outputs))

    def forward(self, mean: Tensor) -> Tensor:
        """(B, M, Q, K) -> (B, M, Q, outputs)."""
        return torch.einsum("bmqk,mko->bmqo", mean, self.weight) + self.bias

    def std(self, std: Tensor) -> Tensor:
        """Standard deviation of the outputs, for those of the latent dimensions."""
        return torch.einsum("bmqk,mko->bmqo", std.square(), self.weight.square()).sqrt()


def norm(std: Tensor) -> Tensor:
    """Size of the standard deviations over the latent dimensions, the last axis."""
    return torch.linalg.vector_norm(std.float(), dim=-1)


class OfGaussians(nn.Module):
    """One Gaussian of all by `GaussianFusion`; one classifier for all labels reads its mean."""

    def __init__(self, modalities: int, labels: int, latent_dim: int, rule: Rule) -> None:
        super().__init__()
        self.readout = Readout(modalities, labels, latent_dim)
        self.fusion = GaussianFusion(rule, modalities, validate_args=False)
        # the size of the classifiers of `UncertaintyGatedFusion`
        self.head = nn.Sequential(
            nn.Linear(latent_dim, 128), nn.ReLU(), nn.Dropout(0.1), nn.Linear(128, 1)
        )
        self.bias = nn.Parameter(torch.zeros(labels))

    def forward(self, latent: DiagonalGaussian, missing: Tensor) -> Fused:
        fused = self.fusion(latent, missing)
        return Fused(
            self.head(fused.mean).squeeze(2) + self.bias,
            self.readout(latent.mean).squeeze(3),
            norm(fused.std),
            norm(latent.std),
            reduced_chi2(latent.mean, latent.std, missing, validate_args=False),
        )


class Gated(nn.Module):
    """LDDU's own: the uncertainty of a first prediction, here what the modalities say on average, weighs two others."""

    def __init__(self, modalities: int, labels: int, latent_dim: int) -> None:
        super().__init__()
        self.readout = Readout(modalities, labels, latent_dim)
        self.fusion = UncertaintyGatedFusion(modalities, labels, latent_dim, validate_args=False)

    def forward(self, latent: DiagonalGaussian, missing: Tensor) -> Fused:
        each = self.readout(latent.mean).squeeze(3)
        first = mean_over_steps(each.detach(), missing).sigmoid()
        gate = expected_distance(first, validate_args=False)
        return Fused(
            self.fusion(latent, gate, missing).logits,
            each,
            norm(latent.product(missing, self.fusion.prior_mean).std),
            norm(latent.std),
            reduced_chi2(latent.mean, latent.std, missing, validate_args=False),
        )


class OfBeliefs(nn.Module):
    """Evidence for and against a label of every modality, fused by `BeliefFusion`."""

    def __init__(self, modalities: int, labels: int, latent_dim: int, rule: BeliefRule) -> None:
        super().__init__()
        self.readout = Readout(modalities, labels, latent_dim, 2)
        self.fusion = BeliefFusion(rule, validate_args=False)

    def forward(self, latent: DiagonalGaussian, missing: Tensor) -> Fused:
        evidence = F.softplus(self.readout(latent.mean).float())
        fused = self.fusion(evidence, missing)
        each = torch.log1p(evidence)
        return Fused(
            fused.probs.logit(1e-6),
            each[..., 0] - each[..., 1],
            fused.uncertainty,
            2 / (2 + evidence.sum(3)),
            fused.conflict,
            fused.evidence,
            evidence,
        )


class OfDecisions(nn.Module):
    """An average of what the modalities say, by `DecisionFusion`; the standard deviations are those of the readout."""

    def __init__(self, modalities: int, labels: int, latent_dim: int, rule: DecisionRule) -> None:
        super().__init__()
        self.readout = Readout(modalities, labels, latent_dim)
        self.confidence = None
        if rule == "predictive":
            self.confidence = Readout(modalities, labels, latent_dim)
        self.fusion = DecisionFusion(rule, validate_args=False)

    def forward(self, latent: DiagonalGaussian, missing: Tensor) -> Fused:
        logits = self.readout(latent.mean).squeeze(3)
        if self.fusion.rule == "precision":
            std = self.readout.std(latent.std).squeeze(3)
            fused = self.fusion(logits, std=std, missing=missing)
            precision = (fused.weights / std.square().clamp_min(1e-9)).sum(1)
            said = {"uncertainty": precision.clamp_min(1e-9).rsqrt(), "modality_uncertainty": std}
        elif self.confidence is not None:
            confidence_logits = self.confidence(latent.mean).squeeze(3)
            confidence = confidence_logits.sigmoid()
            fused = self.fusion(logits, confidence=confidence.detach(), missing=missing)
            said = {
                "uncertainty": 1 - (fused.weights * confidence).sum(1),
                "modality_uncertainty": 1 - confidence,
                "confidence_logits": confidence_logits,
            }
        else:
            fused, said = self.fusion(logits, missing=missing), {}
        if self.fusion.rule == "energy":
            energy = F.softplus(logits).sum(2, keepdim=True)
            said["modality_uncertainty"] = (1 / energy).expand_as(logits)
        return Fused(fused.logits, logits, conflict=fused.conflict, **said)


RULES: Mapping[str, Callable[[int, int, int], nn.Module]] = {
    **{name: partial(OfGaussians, rule=name) for name in get_args(Rule)},
    "gated": Gated,
    **{f"decision_{name}": partial(OfDecisions, rule=name) for name in get_args(DecisionRule)},
    **{f"belief_{name}": partial(OfBeliefs, rule=name) for name in get_args(BeliefRule)},
}
