r"""Classifiers that learn from those of labels that come along, in the manner of ML-GCN (Chen et al. 2019).

"Multi-Label Image Recognition with Graph Convolutional Networks", arXiv 1904.03582. A graph convolution turns
embeddings of the labels into their classifiers, along the edges of a graph of the training labels,

.. math::
    A_{ij} = [P(j \mid i) \ge \tau], \qquad
    A'_{ij} = \begin{cases} p \, A_{ij} / \sum_{k \ne i} A_{ik} & i \ne j \\ 1 - p & i = j \end{cases}, \qquad
    H^{l+1} = \mathrm{LeakyReLU}(A' H^l W^l), \quad \hat y = H^L x

so that rare co-occurrences count for nothing and frequent labels do not drown the others.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from uncertainty_mm.examples.baselines.base import Sizes, Vectors, mean_over_steps
from uncertainty_mm.examples.baselines.sequence import OneSequence


def reweighted(
    labels: Tensor, unknown: Tensor | None = None, threshold: float = 0.4, share: float = 0.2
) -> Tensor:
    """The matrix A' (Q, Q) of labels (N, Q); its rows sum to 1.

    Args:
        labels: Tensor (N, Q) of 0 and 1.
        unknown: Bool tensor (N, Q), True where a label is not known: of two labels the samples count that know both.
        threshold: tau, how often another label must come along.
        share: p, what a label takes from its neighbours; a label without any keeps all of itself.
    """
    known = torch.ones_like(labels) if unknown is None else ~unknown
    present, known = (labels * known).double(), known.double()
    often = (present.T @ known).clamp_min(1)  # of label i, where j is known
    edges = (present.T @ present / often >= threshold).double().fill_diagonal_(0)
    degree = edges.sum(1, keepdim=True)
    own = torch.where(degree > 0, 1 - share, 1.0)
    return (share * edges / degree.clamp_min(1) + torch.diag(own.flatten())).float()


class LabelGraph(OneSequence):
    """The mean of the steps, classified by what a graph convolution makes of the labels.

    It reads one sequence, of all modalities unless `modality` names one. Our encoders stand in for a ResNet, the mean
    over steps for the maximum over places, and the embeddings of the labels are learned from nothing instead of from
    their words. A bias for each label, which the paper has not, says how frequent it is where there is nothing to read.
    Before it has seen training data the graph has no edge.
    """

    graph: Tensor

    def build(self, sizes: Sizes) -> None:
        super().build(sizes)
        dim, labels = sizes.dim, sizes.labels
        self.embedding = nn.Parameter(torch.empty(labels, dim).normal_())
        self.layers = nn.ModuleList(nn.Linear(dim, dim, bias=False) for _ in range(2))
        self.dropout = nn.Dropout(sizes.dropout)
        self.bias = nn.Parameter(torch.zeros(labels))
        self._keep(graph=torch.eye(labels))

    def on_fit_start(self) -> None:
        super().on_fit_start()
        data = self.trainer.datamodule.part("train")
        self.graph.copy_(reweighted(data.labels, data.unknown))

    def classifiers(self) -> Tensor:
        """A weight vector for each label, (Q, D)."""
        first, second = self.layers
        hidden = F.leaky_relu(self.graph @ first(self.embedding), 0.2)
        return self.graph @ second(hidden)

    def fuse(self, encoded: Vectors, padding: Vectors) -> Tensor:
        x = self.dropout(mean_over_steps(*self.read(encoded, padding)))
        return x @ self.classifiers().T + self.bias
