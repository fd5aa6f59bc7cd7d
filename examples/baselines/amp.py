"""Masking and perturbation by an adversary, in the manner of AMP (Ge et al. 2023, doi 10.1145/3543507.3583258).

    min over theta:  L(theta; x) + L(theta; x without its most read steps) + max over |e| <= rho of L(theta + e; x)

The steps that the labels of a sample read most, in the modality that they read most, are hidden, so that the others
learn to tell as well. And the parameters are moved to where the loss is larger, e = rho g / |g| with the gradient g, so
that a minimum is flat. What differs: labels read steps and weigh modalities by attention, whose weights say what is
read most; the three losses weigh the same; e is of length rho over all parameters together, as in Foret et al. (2021,
arXiv 2010.01412).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from uncertainty_mm.data import MultimodalBatch
from uncertainty_mm.examples.baselines.base import Baseline, Output, Sizes, Vectors, mlp
from uncertainty_mm.examples.baselines.labels import LabelHead, LabelQueries, ModalityAttention
from uncertainty_mm.lightning import masked_bce

SHARE = 0.3  # of the steps of the modality that is read most
RADIUS = 0.05


def most_read(weights: Tensor, padding: Vectors, share: float = SHARE) -> list[Tensor]:
    """Bool masks (B, S_m) of the steps to hide, of weights (B, S_1 + S_2 + ...); never all of a sample."""
    lengths = [mask.shape[1] for mask in padding]
    parts = weights.split(lengths, dim=1)
    modality = torch.stack([part.sum(1) for part in parts], dim=1).argmax(1)
    steps = (~torch.cat([*padding], dim=1)).sum(1)
    hidden = []
    for index, (part, mask) in enumerate(zip(parts, padding, strict=True)):
        count = (share * (~mask).sum(1)).ceil().minimum(steps - 1) * (modality == index)
        rank = part.masked_fill(mask, -1).argsort(1, descending=True).argsort(1)
        hidden.append(rank < count.unsqueeze(1))
    return hidden


class Adversarial(Baseline):
    """Labels ask steps and weigh modalities, in spite of two adversaries."""

    can_borrow = ("typicality",)

    def build(self, sizes: Sizes) -> None:
        self.queries = LabelQueries(sizes.modalities, sizes)
        self.modality = ModalityAttention(sizes.dim)
        self.hidden = mlp(sizes.dim, sizes.dim, sizes.dim, sizes.dropout)
        self.head = LabelHead(sizes)

    def fuse(self, encoded: Vectors, padding: Vectors, factor: Tensor | None = None) -> Output:
        missing = torch.stack([mask.all(1) for mask in padding], dim=1)
        read, steps = self.queries(encoded, padding, need_weights=True)
        weights = self.modality.weights(read, missing, factor)
        logits = self.head(self.hidden((weights * read).sum(1)))
        each = zip(weights.unbind(1), steps.values(), strict=True)
        return Output(logits, {}, torch.cat([of * among for of, among in each], dim=2))

    def perturbed(self, loss: Tensor, radius: float = RADIUS) -> dict[str, Tensor]:
        """The parameters, moved by `radius` in all along the gradient of a loss."""
        moved = {name: each for name, each in self.named_parameters() if each.requires_grad}
        gradients = torch.autograd.grad(
            loss, list(moved.values()), retain_graph=True, allow_unused=True, materialize_grads=True
        )
        norm = torch.stack([each.norm() for each in gradients]).norm().clamp_min(1e-12)
        each = zip(moved.items(), gradients, strict=True)
        return {name: parameter + radius / norm * gradient for (name, parameter), gradient in each}

    def auxiliary(self, output: Output, batch: MultimodalBatch) -> Mapping[str, Tensor]:
        """In training, the losses against the two adversaries."""
        if not self.training:
            return {}
        target, unknown = self.targets(batch), batch.unknown
        padding = [batch.padding_mask[name] for name in self.encoder]
        present = (target > 0.5).unsqueeze(2)
        weights = (output.hidden.detach() * (present | ~present.any(1, keepdim=True))).sum(1)
        hide = zip(self.encoder, padding, most_read(weights, padding), strict=True)
        masked = self(batch.features, {name: mask | hidden for name, mask, hidden in hide})
        moved = self.perturbed(masked_bce(output.logits, target, unknown))
        inputs = batch.features, batch.padding_mask
        shaken = torch.func.functional_call(self, moved, inputs)
        return {
            "masked": masked_bce(masked.logits, target, unknown),
            "perturbed": masked_bce(shaken.logits, target, unknown),
        }
