"""LDDU with another fusion: modalities are averaged, each counted alike."""

import torch
from torch import nn

from uncertainty_mm import FusedPrediction
from uncertainty_mm.examples.lddu_full import LDDU, main


class MeanFusion(nn.Module):
    """One classifier, shared by the labels, reads the mean of what the modalities say.

    Args:
        num_modalities: Number of modalities.
        num_labels: Number of labels.
        latent_dim: Latent dimensions of a Gaussian.
        hidden_dim: Size of the hidden layer.
    """

    def __init__(
        self, num_modalities: int, num_labels: int, latent_dim: int, *, hidden_dim: int = 64
    ):
        super().__init__()
        self.head = nn.Sequential(
            nn.Linear(latent_dim, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, 1)
        )

    def forward(self, latent, uncertainty, missing):
        """Logits (B, Q) from the Gaussians (B, M, Q, K) that are there; no gate."""
        left_out = missing[:, :, None, None]
        count = (~left_out).sum(1).clamp_min(1)
        mean = latent.mean.masked_fill(left_out, 0).sum(1) / count
        logits = self.head(mean).squeeze(-1).float()
        return FusedPrediction(logits, logits, logits, torch.ones_like(logits))


class MeanLDDU(LDDU):
    """LDDU with this fusion in the place of its own."""

    parts = LDDU.parts | {"fusion": MeanFusion}


if __name__ == "__main__":
    main(MeanLDDU)
