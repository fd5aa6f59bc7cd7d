"""What the page on other libraries calls equal."""

import pytest
import torch
import torch.nn.functional as F

from support import close
from uncertainty_mm.functional import supcon_loss


def drawn(count=12, classes=3):
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(count, 8, generator=generator),
        torch.randint(0, classes, (count,), generator=generator),
    )


def test_supcon_of_pytorch_metric_learning():
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    embeddings, classes = drawn()
    theirs = losses.SupConLoss(temperature=0.07)(embeddings, classes)
    close(supcon_loss(F.normalize(embeddings, dim=1), classes, temperature=0.07), theirs)


def test_nt_xent_of_lightly():
    loss = pytest.importorskip("lightly.loss.ntx_ent_loss")
    (a, _), b, image = drawn(), drawn()[0].flip(0), torch.arange(12)
    rows, classes = F.normalize(torch.cat([a, b]), dim=1), torch.cat([image, image])
    theirs = loss.NTXentLoss(temperature=0.5)(a, b)
    close(supcon_loss(rows, classes, temperature=0.5), theirs)


def test_brier_score_of_torch_uncertainty():
    metrics = pytest.importorskip("torch_uncertainty.metrics.classification.brier_score")
    probs, labels = drawn(classes=2)[0][:, 0].sigmoid(), drawn(classes=2)[1]
    metric = metrics.BrierScore(num_classes=1)
    metric.update(probs, labels)
    close((probs - labels).square().mean(), metric.compute())
