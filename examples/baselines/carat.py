"""Label vectors rebuilt and shuffled, in the manner of CARAT (Peng et al. 2024, arXiv 2312.10201).

    z^m_q = E_m(u^m_q),   r^m_q = R_m(mean of z^n_q over n != m),   L = L_con(z, E(r)) + |u - R(z)|^2 + |u - r|^2

u^m_q is what label q reads in modality m by attention. In the space of z a contrastive loss with a queue draws together
what has the same modality, label and answer; there each modality is rebuilt from the others. Each label takes the most
telling modality, and one classifier aggregates what they took: of the vectors u, and in training of the vectors r too.
It also sees them shuffled, each label's from any sample (its target comes along) and any modality, and so meets labels
together that the data never show together. What differs: the rows of the queue stand for the paper's prototypes, and a
softmax for its choice of the most telling modality; what is missing is rebuilt from the modalities that are there; the
weights of the losses are chosen here. A prediction comes from the vectors u alone: those that are rebuilt know less.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from uncertainty_mm import EmbeddingQueue
from uncertainty_mm.data import MultimodalBatch
from uncertainty_mm.examples.baselines.base import Baseline, Output, Sizes, Vectors, mlp
from uncertainty_mm.examples.baselines.labels import LabelQueries, ModalityAttention
from uncertainty_mm.functional import supcon_loss
from uncertainty_mm.lightning import masked_bce, masked_mean


def each(layers: nn.ModuleList, x: Tensor) -> Tensor:
    """A layer for each modality, of (B, M, ...)."""
    return torch.stack([f(y) for f, y in zip(layers, x.unbind(1), strict=True)], dim=1)


def mean_of_others(x: Tensor, missing: Tensor) -> Tensor:
    """Mean (B, M, Q, D) of the other modalities that are there, of vectors that are 0 where missing (B, M)."""
    others = (~missing).sum(1, keepdim=True) - (~missing).int()
    return (x.sum(1, keepdim=True) - x) / others.clamp_min(1)[:, :, None, None]


def shuffled(x: Tensor) -> tuple[Tensor, Tensor]:
    """Vectors (B, V, Q, D), each label's from any sample and, there, any of the V views; the samples (B, Q)."""
    batch, views, labels, _ = x.shape
    sample = torch.rand(batch, labels, device=x.device).argsort(0)
    view = torch.rand(batch, views, labels, device=x.device).argsort(1)
    x = x.gather(0, sample[:, None, :, None].expand_as(x))
    return x.gather(1, view.unsqueeze(3).expand_as(x)), sample


class Reconstruction(Baseline):
    """Label vectors of each modality, rebuilt from the others, shuffled and aggregated."""

    can_borrow = ("pooling", "typicality")
    rows = 512  # at most so many vectors of a batch, those of its first samples, are in the contrastive loss

    def build(self, sizes: Sizes) -> None:
        dim, modalities = sizes.dim, range(sizes.modalities)
        self.queries = LabelQueries(sizes.modalities, sizes)
        self.latent = nn.ModuleList(mlp(dim, dim, dim, sizes.dropout) for _ in modalities)
        self.rebuild = nn.ModuleList(mlp(dim, dim, dim, sizes.dropout) for _ in modalities)
        self.queue = EmbeddingQueue(4096, dim, validate_args=False)
        self.telling = ModalityAttention(dim)
        self.head = mlp(sizes.labels * dim, dim, sizes.labels, sizes.dropout)

    def aggregate(self, vectors: Tensor, factor: Tensor | None = None) -> Tensor:
        """Logits (B, Q) of vectors (B, M, Q, D): what all labels say together, each by its most telling modality."""
        none = torch.zeros(vectors.shape[:2], dtype=torch.bool, device=vectors.device)
        return self.head(self.telling(vectors, none, factor).flatten(1))

    def fuse(self, encoded: Vectors, padding: Vectors, factor: Tensor | None = None) -> Output:
        missing = torch.stack([mask.all(1) for mask in padding], dim=1)
        alone = (~missing).sum(1, keepdim=True) == (~missing).int()  # no other is there
        read = self.queries(encoded, padding)
        z = F.normalize(each(self.latent, read), dim=3)
        z = z.masked_fill(missing[:, :, None, None], 0)
        rebuilt = each(self.rebuild, mean_of_others(z, missing))
        z_again = F.normalize(each(self.latent, rebuilt), dim=3)
        where = [mask[:, :, None, None] for mask in (missing, alone)]
        views = torch.where(where[0], rebuilt, read), torch.where(where[1], read, rebuilt)

        def distance(x: Tensor, left_out: Tensor) -> Tensor:
            return 0.1 * masked_mean((x - read.detach()).square().mean((2, 3)), left_out)

        left_out = missing | alone
        losses = {
            "own": distance(each(self.rebuild, z), missing),
            "rebuilt": distance(rebuilt, left_out),
        }
        hidden = views, torch.stack([z, z_again]), torch.stack([missing, left_out])
        again = self.aggregate(views[1])
        return Output(self.aggregate(views[0], factor), losses, hidden, (again,))

    def auxiliary(self, output: Output, batch: MultimodalBatch) -> Mapping[str, Tensor]:
        views, latent, left_out = output.hidden
        target = self.targets(batch)
        unknown = torch.zeros_like(target) if batch.unknown is None else batch.unknown
        unknown = unknown.bool()
        again = masked_bce(output.others[0], target, unknown)
        mixed, sample = shuffled(torch.cat(views, dim=1))
        mixed = masked_bce(
            self.head(mixed.flatten(2)).mean(1), target.gather(0, sample), unknown.gather(0, sample)
        )

        modalities, labels = latent.shape[2:4]
        classes = torch.arange(modalities * labels, device=target.device).view(modalities, labels)
        classes = classes + modalities * labels * (target > 0.5).unsqueeze(1)  # (B, M, Q)
        left_out = left_out.unsqueeze(3) | unknown.unsqueeze(1)
        classes = torch.where(left_out, -1, classes)  # of the two kinds of z
        some, queue = slice(max(1, self.rows // (2 * modalities * labels))), self.queue
        rows, names = latent[:, some].flatten(0, 3), classes[:, some].flatten()
        contrast = supcon_loss(
            rows, names, bank=queue.rows, bank_classes=queue.classes, validate_args=False
        )
        if self.training:
            queue.enqueue(latent[0].flatten(0, 2), classes[0].flatten())
        weighted = {"again": 0.3 * again, "shuffled": 0.3 * mixed, "contrast": 0.1 * contrast}
        return {**output.auxiliary, **weighted}
