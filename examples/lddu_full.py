r"""LDDU, the paper in one file: train, evaluate and apply it.

    python examples/lddu_full.py                                     # built-in synthetic data
    python examples/lddu_full.py --data FILE                         # your data
    python examples/lddu_full.py --data FILE --config mosei-aligned  # options from a file
    python examples/lddu_full.py --data FILE --ckpt LAST.ckpt        # resume
    python examples/lddu_full.py predict --ckpt BEST.ckpt --data FILE --output predictions.csv

LDDU (Huang et al. 2025, arXiv 2502.13954) recognises several emotions at once from sequences of several modalities.
Every emotion asks every modality what concerns it (Eq. 1-2), and each answer becomes a Gaussian: its mean says what was
seen, its standard deviation how sure that is. Three ideas shape these Gaussians:

1. Gaussians of the same modality and emotion attract each other (Eq. 4-7): `DistributionSupConLoss`.
2. A first prediction (Eq. 3) is unsure where it stands near 1/2; that gates two final classifiers, one that reads the
   means and one that reads the standard deviations (Eq. 8-9): `UncertaintyGatedFusion`.
3. Samples that are predicted badly, now or in the past, should have the larger standard deviations (Eq. 10-15):
   `SoftRankOrdinalityLoss` with `CorrectnessTracker`.

The file reads from the model over its training to the data and the command line. Where the paper names a value it is
the default, but for three: a learning rate of 2e-5 was chosen for 16,000 samples and 30 epochs and hardly moves a model
on a small set, so it is 5e-4 here; the weight 0.8 of the contrastive loss slows the classifiers down there, so it is
0.1; and the weight of the ordinality loss is 0.3, not 0.1. Where a standard deviation would not mean what the paper
says, the default is ours, and an option is the paper: Gaussians are multiplied (`--combine`), each modality answers
for its own errors (`--targets`, `--pairs`, `--modality-weight`), and standard deviations are kept from telling which
labels are present (`--std-branch`, and `--kl-weight`, a weak pull towards the prior). Ours, where the paper is silent:
standardised features, the size of a sequence as an input of its own, normalisation before the sublayers, the size of
the positions, labels that scale and shift their Z, dropout, clipped gradients, early stopping, calibration.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import logging
import math
import os
import platform
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
import torchmetrics
import yaml
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler
from torchmetrics import CatMetric
from torchmetrics.functional.classification import (
    binary_average_precision,
    binary_f1_score,
    binary_precision,
    binary_recall,
    multilabel_average_precision,
)

import uncertainty_mm
from uncertainty_mm import (
    CorrectnessTracker,
    DiagonalGaussian,
    DistributionSupConLoss,
    EmotionQueryAttention,
    FusedPrediction,
    GaussianDecoupler,
    PlattScaling,
    SoftRankOrdinalityLoss,
    UncertaintyGatedFusion,
)
from uncertainty_mm._files import check_sums, replacing
from uncertainty_mm.data import (
    SPLITS,
    MultimodalBatch,
    MultimodalDataset,
    SyntheticMMER,
    read_folder,
    read_m3ed,
    read_mmsa,
    read_npz,
    read_tailor,
)
from uncertainty_mm.functional import expected_distance, prediction_distance
from uncertainty_mm.measures import (
    calibration_error,
    predictive_entropy,
    risk_coverage,
    sample_jaccard,
    spearman,
)

# --- The model -------------------------------------------------------------------------------------------------------


class Steps:
    """Packs the steps of padded sequences (B, S, D) into one matrix (N, D), and back.

    All but attention treats every step alone and need not compute what stands at padding. To count the steps, however,
    the host would wait for an accelerator: there N is B * S, padding included, as in an exported program.
    """

    def __init__(self, padding: Tensor) -> None:
        self.shape = padding.shape
        rows = torch.arange(padding.numel(), device=padding.device)
        counted = padding.is_cpu and not torch.compiler.is_exporting()
        self.rows = rows[~padding.flatten()] if counted else rows

    def pack(self, x: Tensor) -> Tensor:
        return x.flatten(0, 1).index_select(0, self.rows)

    def unpack(self, x: Tensor) -> Tensor:
        padded = x.new_zeros(math.prod(self.shape), x.shape[1])
        return padded.index_copy_(0, self.rows, x).unflatten(0, self.shape)


class EncoderLayer(nn.Module):
    """A Transformer layer; the released code normalises last, first trains at higher learning rates."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        # Dropout after each sublayer only. Dropping attention weights would forbid the fused attention kernel.
        self.dropout = nn.Dropout(dropout)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(dim),
            nn.Linear(dim, dim),  # as narrow as the released configuration has it
            nn.GELU(),
            nn.Linear(dim, dim),
            nn.Dropout(dropout),
        )

    def forward(self, x: Tensor, steps: Steps, mask: Tensor) -> Tensor:
        """Expects x packed, (N, dim); True in the mask (B, 1, 1, S) marks steps to attend to."""
        qkv = steps.unpack(self.qkv(self.norm(x))).unflatten(2, (3, self.heads, -1))
        if x.is_cpu:  # whose backward pass of attention in half precision takes five times as long
            qkv = qkv.to(torch.promote_types(qkv.dtype, torch.float32))
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, S, dim / heads)
        with torch.autocast("cpu", enabled=False):
            attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        x = x + self.dropout(self.out(steps.pack(attended.transpose(1, 2).flatten(2))))
        return x + self.feed_forward(x)


class SequenceEncoder(nn.Module):
    """Features of one modality -> linear to the model's width, learned positions, Transformer layers (section 3.2).

    Features are standardised with the statistics of the training set, which travel with the model. With `size="apart"`
    each sequence is then divided by its own size, which enters as one more number: normalisation inside the layers
    would otherwise hide it, and with it how noisy a sequence is.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        in_dim: int,
        max_steps: int,
        hidden_dim: int,
        layers: int,
        heads: int,
        dropout: float,
        size: str,
    ) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(in_dim))
        self.register_buffer("std", torch.ones(in_dim))
        self.project = nn.Linear(in_dim, hidden_dim)
        # as large as the projected features: much smaller ones are hardly seen on small data sets
        self.positions = nn.Parameter(0.5 * torch.randn(max_steps, hidden_dim))
        self.size = (
            nn.Sequential(nn.Linear(1, hidden_dim), nn.GELU(), nn.Linear(hidden_dim, hidden_dim))
            if size == "apart"
            else None
        )
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(EncoderLayer(hidden_dim, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(hidden_dim)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        steps = Steps(padding)
        # A missing sequence attends to itself, which is harmless: nobody reads it.
        mask = ~padding | padding.all(dim=1, keepdim=True)
        sample = steps.rows // x.shape[1]
        step = steps.rows - sample * x.shape[1]  # %, which ONNX lacks for sizes that vary
        features = (steps.pack(x) - self.mean) / self.std
        embedded = F.embedding(step, self.positions)
        if self.size is not None:
            square = steps.unpack(features.square().mean(1, keepdim=True))
            valid = (~padding).unsqueeze(2)
            size = ((square * valid).sum(1) / valid.sum(1).clamp_min(1)).clamp_min(1e-6).sqrt()
            features = features / size[sample]
            embedded = embedded + self.size(size.log())[sample]
        x = self.dropout(self.project(features) + embedded)
        for layer in self.layers:
            x = layer(x, steps, mask[:, None, None])
        return steps.unpack(self.norm(x))


class Output(NamedTuple):
    """What the model says of a batch."""

    dir_logits: Tensor  # (B, Q) first prediction, y_dir of Eq. 3
    latent: DiagonalGaussian  # (B, M, Q, K)
    modality_logits: Tensor  # (B, M, Q) prediction from each modality alone
    fused: FusedPrediction  # y_fnl of Eq. 8
    logits: Tensor  # (B, Q) final prediction: that of `fused`, or its sum with the first
    missing: Tensor  # (B, M)

    @property
    def std_norm(self) -> Tensor:
        """Size of the standard deviations per modality and label, (B, M, Q)."""
        return torch.linalg.vector_norm(self.latent.std.float(), dim=-1)

    @property
    def details(self) -> dict[str, Tensor]:
        """What explains the prediction."""
        return {
            "std_norm": self.std_norm,
            "gate": self.fused.mean_weight,
            "missing": self.missing,
        }


class LDDU(nn.Module):
    """The model of the paper, composed of the components of the library."""

    def __init__(
        self,
        modality_dims: Mapping[str, int],
        max_steps: Mapping[str, int],
        num_labels: int,
        num_train_samples: int,
        *,
        hidden_dim: int = 256,
        layers: int = 3,
        heads: int = 8,
        dropout: float = 0.1,
        z_dim: int = 128,
        latent_dim: int = 64,
        queue_size: int = 8192,
        temperature: float = 0.07,
        anchors: str = "all",
        gate: str = "expected",
        mean_weight: str = "certainty",
        size: str = "apart",
        combine: str = "product",
        std_branch: str = "reads",
        ordinality: str = "rank",
        pairs: str = "SR",
        targets: str = "both",
        final: str = "fused",
        embedding: str = "joint",
        scl_weight: float = 0.1,
        ocl_weight: float = 0.3,
        dir_weight: float = 0.1,
        modality_weight: float = 1.0,
        kl_weight: float = 3e-5,
    ) -> None:
        super().__init__()
        modalities = len(modality_dims)
        self.gate = gate
        self.targets = targets
        self.residual = final == "residual"
        self.weights = {
            "cls": 1.0,
            "ocl": ocl_weight,
            "scl": scl_weight,
            "dir": dir_weight,
            "modality": modality_weight,
            "kl": kl_weight,
        }
        self.encoders = nn.ModuleDict(
            {
                name: SequenceEncoder(
                    dim, max_steps[name], hidden_dim, layers, heads, dropout, size
                )
                for name, dim in modality_dims.items()
            }
        )
        # Eq. 1-2: every label reads every modality
        self.attention = EmotionQueryAttention(
            dict.fromkeys(modality_dims, hidden_dim), num_labels, out_dim=z_dim
        )
        # Which parts of an answer matter depends on who asked. All below is shared by the labels, so the label scales
        # and shifts its Z (FiLM, Perez et al. 2018); the paper is silent here.
        self.asked_by = nn.Linear(self.attention.label_embedding.embedding_dim, 2 * z_dim)
        # Eq. 3: the first prediction, from all of Z
        self.info_classifier = nn.Sequential(
            nn.Linear(modalities * num_labels * z_dim, z_dim),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(z_dim, num_labels),
        )
        # Section 3.3.2: every answer as a Gaussian. Where precisions act, means of one length leave it to them to say
        # how much a modality has seen.
        self.decoupler = GaussianDecoupler(
            modalities,
            z_dim,
            latent_dim,
            dropout=dropout,
            normalize_mean=combine == "product",
        )
        # What each modality says by itself, so that its standard deviation can be held against its own errors
        self.modality_readout = nn.Parameter(torch.zeros(modalities, latent_dim))
        self.modality_bias = nn.Parameter(torch.zeros(modalities, num_labels))
        # Eq. 4-7
        self.contrastive = DistributionSupConLoss(
            modalities,
            num_labels,
            latent_dim,
            queue_size=queue_size,
            temperature=temperature,
            anchors=anchors,
            use_mean=embedding != "std",
            use_std=embedding != "mean",
            joint=embedding == "joint",
            gather=True,
        )
        # Eq. 8-9
        self.fusion = UncertaintyGatedFusion(
            modalities,
            num_labels,
            latent_dim,
            dropout=dropout,
            mean_weight=mean_weight,
            combine=combine,
            detach_std=std_branch == "reads",
        )
        # Eq. 10-15, with a history of every sample, or of every sample and modality
        self.tracker = CorrectnessTracker(
            num_train_samples, None if targets == "sample" else modalities
        )
        self.ordinality = SoftRankOrdinalityLoss(mode=ordinality, pairs=pairs.split("+"))

    def forward(
        self,
        features: Mapping[str, Tensor],
        padding: Mapping[str, Tensor],
        labels: Tensor | None = None,
    ) -> Output:
        """Predicts; `labels` are read by the oracle gate alone, in training."""
        encoded = {
            name: encoder(features[name], padding[name]) for name, encoder in self.encoders.items()
        }
        missing = self.attention.missing(encoded, padding)
        z = self.attention(encoded, padding)  # (B, M, Q, z_dim)
        scale, shift = self.asked_by(self.attention.label_embedding.weight).chunk(2, dim=1)
        z = ((1 + scale) * z + shift).masked_fill(missing[:, :, None, None], 0)
        dir_logits = self.info_classifier(z.flatten(1))
        latent = self.decoupler(z, missing)
        modality_logits = torch.einsum("bmqk,mk->bmq", latent.mean, self.modality_readout)
        modality_logits = modality_logits + self.modality_bias
        uncertainty = self.uncertainty(dir_logits.detach().float().sigmoid(), labels)
        fused = self.fusion(latent, uncertainty, missing)
        logits = fused.logits + dir_logits if self.residual else fused.logits
        return Output(dir_logits, latent, modality_logits, fused, logits, missing)

    def uncertainty(self, dir_probs: Tensor, labels: Tensor | None) -> Tensor:
        """The gate of Eq. 8, which as printed needs the labels; see `--gate`."""
        if self.gate == "oracle" and self.training and labels is not None:
            return prediction_distance(dir_probs, labels).mean(1)
        if self.gate == "released":  # that code weighs the means by the first prediction itself
            return 1 - dir_probs
        if self.gate == "constant":
            return torch.full_like(dir_probs, 0.5)
        if self.gate in ("mean", "std"):  # one branch alone
            certain = (self.gate == "mean") == (self.fusion.mean_weight == "certainty")
            return torch.full_like(dir_probs, 0.0 if certain else 1.0)
        return expected_distance(dir_probs)

    def losses(
        self, output: Output, labels: Tensor, indices: Tensor, targets: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The losses of Eq. 16, of the modalities alone, of the distance to the prior, and their weighted sum, `total`.

        The classifiers are trained towards `targets` (B, Q) in [0, 1] if given, such as soft labels, else the labels.
        """
        target = (labels if targets is None else targets).float()
        each = target.unsqueeze(1).expand_as(output.modality_logits)
        by_modality = F.binary_cross_entropy_with_logits(
            output.modality_logits.float(), each, reduction="none"
        ).masked_fill(output.missing.unsqueeze(2), 0)
        losses = {
            "cls": F.binary_cross_entropy_with_logits(output.logits, target),
            "dir": F.binary_cross_entropy_with_logits(output.dir_logits.float(), target),
            "modality": by_modality.mean(),
            "scl": self.contrastive(output.latent, labels, output.missing),
            "ocl": self.calibration(output, labels, indices),
            "kl": output.latent.kl_to_standard_normal().mean(),
        }
        total = torch.stack([self.weights[name] * loss for name, loss in losses.items()]).sum()
        return {**losses, "total": total}

    def calibration(self, output: Output, labels: Tensor, indices: Tensor) -> Tensor:
        """Eq. 10-15: the standard deviations in the order of the errors; the tracker learns of the outcome.

        The paper holds the size of all standard deviations of a sample against the errors of the joint prediction. That
        does not say which modality is to blame; here each modality answers for its own.
        """
        seen = self.tracker.counts(indices) > 0
        history = self.tracker(indices)
        if self.targets == "sample":
            correct = (output.logits.detach() > 0) == (labels > 0)
            self.tracker.update(indices, correct.float().mean(1))
            std_norm = torch.linalg.vector_norm(output.std_norm.flatten(1), dim=1)
            distance = prediction_distance(output.dir_logits.float().sigmoid(), labels).mean(1)
            return self.ordinality(std_norm, distance, history, mask=~seen)
        std_norm = torch.linalg.vector_norm(output.std_norm, dim=2)
        probs = output.modality_logits.float().sigmoid()
        distance = prediction_distance(probs, labels.unsqueeze(1).expand_as(probs)).mean(2)
        self.tracker.update(indices, 1 - distance.detach(), output.missing)
        left_out = ~seen | output.missing
        scores = (std_norm, distance, history, left_out)
        loss = std_norm.new_zeros(())
        if self.targets in ("both", "modality"):  # ranks among the samples, for each modality
            columns = zip(*(score.unbind(1) for score in scores), strict=True)
            loss = torch.stack([self.ordinality(*column) for column in columns]).sum()
        if self.targets in ("both", "pooled"):  # ranks among samples and modalities
            loss = loss + self.ordinality(*(score.flatten() for score in scores))
        return loss


# --- Training --------------------------------------------------------------------------------------------------------


class LitLDDU(L.LightningModule):
    """Optimiser, schedule and validation; hyper-parameters and label names go into every checkpoint."""

    threshold: Tensor
    network: Callable[..., nn.Module] = LDDU  # another one is trained by a subclass with its own
    on_nan = "stop"  # or "skip"

    def __init__(
        self,
        modality_dims: dict[str, int],
        max_steps: dict[str, int],
        label_names: list[str],
        num_train_samples: int,
        model: dict[str, Any],
        lr: float = 5e-4,
        warmup: float = 0.1,
        weight_decay: float = 0.0,
        drop_modality: float = 0.0,
        corrupt_modality: float = 0.0,
        thresholds: str = "single",
        seed: int = 0,
        soft_labels: float = 0.0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = self.network(
            modality_dims, max_steps, len(label_names), num_train_samples, **model
        )
        self.calibration = PlattScaling(len(label_names))
        self.register_buffer("threshold", torch.full((len(label_names),), 0.5))
        self.logits, self.labels = (CatMetric(nan_strategy="disable") for _ in range(2))
        self.skipped_batches = 0

    def configure_optimizers(self) -> dict[str, Any]:
        """Adam with linear warm-up and cosine decay (appendix A.1)."""
        optimizer = torch.optim.AdamW(
            self.parameters(), lr=self.hparams["lr"], weight_decay=self.hparams["weight_decay"]
        )
        steps = int(self.trainer.estimated_stepping_batches)
        warmup = max(1, int(self.hparams["warmup"] * steps))

        def factor(step: int) -> float:
            if step < warmup:
                return (step + 1) / warmup
            return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def on_train_batch_start(self, batch: MultimodalBatch, batch_idx: int) -> None:
        # Dropout depends on seed and step alone, so that a resumed run repeats the uninterrupted one.
        place = (self.hparams["seed"] * 1000 + self.global_rank) * 10**9 + self.global_step
        torch.manual_seed(place % 2**63)

    def disturbed(self, batch: MultimodalBatch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Features and padding with modalities left out and corrupted at random, so that the model knows such input."""
        count, device = batch.labels.shape[0], batch.labels.device

        def some(share: float) -> Tensor:
            return torch.rand(count, 1, device=device) < share

        features, padding = dict(batch.features), dict(batch.padding_mask)
        if share := self.hparams["drop_modality"]:
            chosen = some(share)
            padding = {name: mask | (chosen & some(0.5)) for name, mask in padding.items()}
        if share := self.hparams["corrupt_modality"]:
            for name, x in features.items():
                spread = self.model.encoders[name].std
                size = torch.rand(count, 1, 1, device=device) * 5 * some(share).unsqueeze(2)
                noise = size * spread * torch.randn_like(x)
                features[name] = x + noise.masked_fill(padding[name].unsqueeze(2), 0)
        return features, padding

    def targets(self, batch: MultimodalBatch) -> Tensor:
        """What the classifiers are trained towards: the labels, or soft labels in [0, 1], or between the two."""
        labels = batch.labels.float()
        return (
            labels
            if batch.soft_labels is None
            else labels.lerp(batch.soft_labels, self.hparams["soft_labels"])
        )

    def training_step(self, batch: MultimodalBatch, batch_idx: int) -> Tensor:
        features, padding = self.disturbed(batch)
        # What is not finite is kept from the layers, which refuse it, and from other processes, and told by the loss.
        finite = torch.stack([x.isfinite().flatten(1).all(1) for x in features.values()]).all(0)
        features = {name: x.nan_to_num(0, 0, 0) for name, x in features.items()}
        self.seen = batch.indices, finite
        try:
            output = self.model(features, padding, batch.labels)
            losses = self.model.losses(output, batch.labels, batch.indices, self.targets(batch))
        except ValueError as error:  # on a CPU the layers look at values: the model has diverged
            raise UsageError(f"{self.not_finite()}: {error}") from error
        self.seen = batch.indices, finite & output.logits.detach().isfinite().all(1)
        self.losses = {name: loss.detach() for name, loss in losses.items()}
        return losses["total"].masked_fill(~finite.all(), math.nan)

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Any,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """Steps, unless the loss or a gradient is not finite on any process: then all stop, or all skip the batch.

        The host reads the outcome, so it waits for an accelerator once a step, between backward pass and update.
        """
        assert optimizer_closure is not None
        skip, buffers = self.on_nan == "skip", list(self.model.buffers())
        before = [buffer.clone() for buffer in buffers] if skip else []
        loss = optimizer_closure()  # forward pass, losses, backward pass
        finite = loss.isfinite()
        if self.trainer.precision != "16-mixed":  # whose scaler skips gradients that overflow
            grads = [x.grad for x in self.parameters() if x.grad is not None]
            finite = finite & nn.utils.get_total_norm(grads).isfinite()
        if self.trainer.strategy.reduce_boolean_decision(bool(finite), all=True):
            optimizer.step(lambda: loss)
            for name, value in self.losses.items():
                self.log(
                    f"loss/{name}",
                    value,
                    on_epoch=True,
                    on_step=False,
                    prog_bar=True,
                    batch_size=len(self.seen[0]),
                )
        elif skip:
            for buffer, earlier in zip(buffers, before, strict=True):  # queue and history
                buffer.copy_(earlier)
            self.skipped_batches += 1
            print(f"\nskipped a batch: {self.not_finite()}", flush=True)
        else:
            raise UsageError(self.not_finite())

    def not_finite(self) -> str:
        """Names the samples that made the latest batch useless, or all of it if none stands out."""
        (indices, finite), ids = self.seen, self.trainer.datamodule.parts["train"].ids
        what = "features or predictions are not finite"
        if finite.all():
            what, finite = "loss or gradient is not finite", ~finite
            if self.trainer.world_size > 1:
                what += ", here or on another process"
        names = ", ".join(str(i if ids is None else ids[i]) for i in indices[~finite].tolist())
        return f"epoch {self.current_epoch} (the first is 0), training samples {names}: {what}"

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["skipped_batches"] = self.skipped_batches

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.skipped_batches = checkpoint.get("skipped_batches", 0)

    def on_train_epoch_end(self) -> None:
        self.model.tracker.synchronize()

    def validation_step(self, batch: MultimodalBatch, batch_idx: int) -> None:
        output = self.model(batch.features, batch.padding_mask)
        self.logits.update(output.logits)
        self.labels.update(batch.labels)
        loss = F.binary_cross_entropy_with_logits(output.logits, batch.labels.float())
        size = batch.labels.shape[0]
        self.log("val/cls", loss, prog_bar=True, batch_size=size, sync_dist=True)

    def on_validation_epoch_end(self) -> None:
        """Calibrates the logits and fits the threshold on the validation set; both go with the checkpoint."""
        logits, labels = self.logits.compute(), self.labels.compute()
        self.logits.reset()
        self.labels.reset()
        self.calibration.fit(logits, labels)
        probs = self.calibration(logits).sigmoid()
        self.threshold.copy_(best_threshold(probs, labels, self.hparams["thresholds"]))
        score = binary_f1_score((probs > self.threshold).flatten().int(), labels.flatten().int())
        self.log("val/miF1", score, prog_bar=True)

    def predict_step(self, batch: MultimodalBatch, batch_idx: int) -> dict[str, Tensor]:
        output = self.model(batch.features, batch.padding_mask)
        return {
            "probs": self.calibration(output.logits).sigmoid(),
            "uncalibrated": output.logits.sigmoid(),
            **output.details,
        }


def best_threshold(probs: Tensor, labels: Tensor, thresholds: str = "single") -> Tensor:
    """The threshold of the best micro-F1, (1,), or with `"label"` of the best F1 of every label, (Q,)."""
    grid = torch.linspace(0.01, 0.99, 99, device=probs.device)
    predicted = probs > grid[:, None, None]
    hits, sizes = (predicted & (labels > 0)).sum(1), predicted.sum(1) + labels.sum(0)
    if thresholds == "single":
        hits, sizes = hits.sum(1, keepdim=True), sizes.sum(1, keepdim=True)
    return grid[(2 * hits / sizes.clamp_min(1)).argmax(0)]


def evaluate(probs: Tensor, labels: Tensor, threshold: Tensor) -> dict[str, float | None]:
    """The field's measures (Acc: mean Jaccard index of the label sets; P, R, F1: micro), and those of uncertainty.

    `rho` is the rank correlation of the predictive entropy with the mean absolute error of a sample.
    """
    labels = labels.long()
    predicted = (probs > threshold).int()
    decisions = predicted.flatten(), labels.flatten()  # micro: every decision counts alike
    precision = (
        multilabel_average_precision(probs, labels, labels.shape[1], average="macro")
        if labels.shape[1] > 1
        else binary_average_precision(probs[:, 0], labels[:, 0])
    )
    uncertainty, error = predictive_entropy(probs), (probs - labels).abs().mean(1)
    measures = {
        "Acc": sample_jaccard(predicted.float(), labels).mean(),
        "P": binary_precision(*decisions),
        "R": binary_recall(*decisions),
        "miF1": binary_f1_score(*decisions),
        "mAP": precision,
        "Brier": (probs - labels).square().mean(),
        "ECE": calibration_error(probs, labels),
        "AURC": risk_coverage(error, uncertainty).aurc,
        "rho": spearman(uncertainty, error),
    }
    # not a number (null in JSON): the mean precision of a label that nobody has
    return {
        name: None if value.isnan() else round(float(value), 4) for name, value in measures.items()
    }


def plot(history: Sequence[Mapping[str, float]], probs: Tensor, labels: Tensor, path: Path) -> None:
    """Training curves, and how often a label is present where the model says so with probability p (test set)."""
    figure = Figure(figsize=(11, 3.8), layout="constrained")
    losses, scores, reliability = figure.subplots(1, 3)
    for axes, keys in ((losses, ("loss/cls", "loss/dir", "val/cls")), (scores, ("val/miF1",))):
        for key in keys:
            points = [(row["epoch"] + 1, row[key]) for row in history if key in row]
            if points:
                axes.plot(*zip(*points, strict=True), marker=".", label=key)
        axes.set_xlabel("epoch")
        axes.legend()
    losses.set_title("cross-entropy")
    scores.set_title("validation micro-F1")

    edges = np.linspace(0, 1, 11)
    flat_probs, flat_labels = probs.flatten().numpy(), labels.flatten().numpy()
    bins = np.digitize(flat_probs, edges[1:-1])
    counts = np.bincount(bins, minlength=10)
    filled = counts > 0
    share = np.bincount(bins, flat_labels, 10)[filled] / counts[filled]
    said = np.bincount(bins, flat_probs, 10)[filled] / counts[filled]
    reliability.plot([0, 1], [0, 1], color="grey", linewidth=1, label="calibrated")
    reliability.plot(said, share, marker="o", label="model")
    reliability.bar(
        edges[:-1],
        counts / counts.sum(),
        0.1,
        align="edge",
        alpha=0.2,
        label="share of predictions",
    )
    reliability.set(
        xlabel="predicted probability", ylabel="share present", title="reliability (test)"
    )
    reliability.legend()
    with replacing(path) as partial:
        figure.savefig(partial, dpi=120)


class CompleteCheckpoints(TorchCheckpointIO):
    """Writes beside the old checkpoint and takes its place: there is a whole one at any time.

    Lightning writes into the folder for temporary files, from where another disk can only be reached by copying.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        with replacing(path) as partial:
            partial.write_bytes(buffer.getbuffer())


class History(L.Callback):
    """Losses and validation results, one row an epoch: in metrics.csv, and in the checkpoints for who resumes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows: list[dict[str, float]] = []

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        values = {name: value.item() for name, value in trainer.callback_metrics.items()}
        self.rows.append({"epoch": trainer.current_epoch, **values})
        if trainer.is_global_zero:
            columns = ["epoch", *sorted({name for row in self.rows for name in row} - {"epoch"})]
            text = io.StringIO(newline="")
            writer = csv.DictWriter(text, columns)
            writer.writeheader()
            writer.writerows(self.rows)
            write_text(self.folder / "metrics.csv", text.getvalue())

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows = list(state_dict["rows"])


class Patience(EarlyStopping):
    """Stops a run that was stopped before and is resumed from its last checkpoint, which else would go on."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.should_stop = self.stopped_epoch > 0


class MovableCheckpoint(ModelCheckpoint):
    """Remembers the best checkpoint also where the run folder was moved."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        def here(path: str) -> str:
            return str(Path(str(self.dirpath), Path(path).name)) if path else path

        paths = ("best_model_path", "kth_best_model_path", "last_model_path")
        best = {here(path): score for path, score in state_dict["best_k_models"].items()}
        moved = {key: here(state_dict[key]) for key in paths}
        super().load_state_dict(
            state_dict | moved | {"dirpath": self.dirpath, "best_k_models": best}
        )


# --- Data ------------------------------------------------------------------------------------------------------------


class UsageError(ValueError):
    """A file or an option cannot be used; the message says why in one line."""


READERS: dict[str, Callable[..., dict[str, MultimodalDataset]]] = {
    "npz": lambda path: read_npz(path, splits=()),
    "folder": read_folder,
    "mmsa": read_mmsa,
    "tailor": read_tailor,
    "m3ed": read_m3ed,
    "m3ed-dialogue": lambda path: read_m3ed(path, level="dialogue"),
}
SUFFIXES = {".npz": "npz", ".pkl": "mmsa", ".pt": "tailor", "": "folder"}


def read_data(
    path: Path, layout: str = "auto", labels: Path | None = None, splits: Sequence[str] = SPLITS
) -> dict[str, MultimodalDataset]:
    """Reads a data set in any layout that the library knows.

    Args:
        path: The file or folder.
        layout: One of `READERS`, or `"auto"`: by the suffix of the file.
        labels: The file with the labels, where they are not in the first (`"mmsa"`).
        splits: Splits that must have samples.

    Raises:
        UsageError: If the file cannot be read or breaks its layout.
    """
    if layout == "auto":
        if path.suffix not in SUFFIXES:
            raise UsageError(f"{path}: --format must say what it is, the suffix does not")
        layout = SUFFIXES[path.suffix]
    if labels and layout != "mmsa":
        raise UsageError(f"{labels}: --labels goes with --format mmsa, got {layout}")
    try:
        parts = READERS[layout](path, **({"labels": labels} if labels else {}))
    except (ValueError, TypeError, OSError) as error:
        raise UsageError(" ".join(str(error).split())) from error
    for split in splits:
        if not len(parts.get(split, ())):
            raise UsageError(f"{path}: no sample in the {split} split")
    return parts


def synthetic(
    seed: int = 0, sizes: Sequence[int] = (3000, 500, 1000)
) -> tuple[dict[str, MultimodalDataset], dict[str, Tensor]]:
    """Six correlated emotions seen through three noisy modalities, and the best possible predictions (N, Q)."""
    world = SyntheticMMER(missing_rate=0.05)
    parts, bayes = {}, {}
    for offset, (part, size) in enumerate(zip(SPLITS, sizes, strict=True)):
        samples = world.sample(size, seed=3 * seed + offset)
        parts[part] = MultimodalDataset(
            samples.features,
            samples.padding_mask,
            samples.labels,
            ["happy", "sad", "anger", "surprise", "disgust", "fear"],
        )
        bayes[part] = world.posterior(samples).marginals.float()
    return parts, bayes


class DataModule(L.LightningDataModule):
    """Hands the splits to Lightning."""

    def __init__(self, parts: dict[str, MultimodalDataset], batch_size: int, seed: int) -> None:
        super().__init__()
        self.parts, self.batch_size, self.seed = parts, batch_size, seed

    def train_dataloader(self) -> DataLoader[MultimodalBatch]:
        """The training split, in an order that depends on seed and epoch alone, divided among the processes."""
        assert self.trainer is not None
        data, rank = self.parts["train"], self.trainer.global_rank
        sampler = DistributedSampler(data, self.trainer.world_size, rank, seed=self.seed)
        return data.loader(self.batch_size, sampler=sampler, pin_memory=torch.cuda.is_available())

    def val_dataloader(self) -> DataLoader[MultimodalBatch]:
        """The validation split, in order, divided among the processes without repeating a sample."""
        assert self.trainer is not None
        data = self.parts["validation"]
        own = range(self.trainer.global_rank, len(data), self.trainer.world_size)
        return data.loader(self.batch_size, sampler=own, pin_memory=torch.cuda.is_available())


# --- Command line ----------------------------------------------------------------------------------------------------


say = rank_zero_only(print)
PRESETS = Path(__file__).with_name("configs")


def run_folder(args: argparse.Namespace, name: str) -> Path:
    """Where the run is written; a resumed run stays in the folder of its checkpoint."""
    if args.ckpt:
        read_checkpoint(args.ckpt)
        folder = args.ckpt.parent
        if args.output and args.output.resolve() != folder.resolve():
            raise UsageError(
                f"--output {args.output}: a run resumes where its checkpoint is, {folder}"
            )
    elif args.output:
        folder = args.output
    else:
        # Further processes of the run, which start later, find the time of the first one here.
        started = time.strftime("%Y%m%d-%H%M%S")
        if args.devices > 1:
            started = os.environ.setdefault("LDDU_STARTED", started)
        folder = Path("runs") / f"{name}-{started}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{folder}: cannot write there ({error.strerror})") from error
    return folder


def presets() -> str:
    """Names of the bundled files of options."""
    return ", ".join(sorted(path.stem for path in PRESETS.glob("*.yaml")))


def options_from_file(arguments: Sequence[str]) -> list[str]:
    """Puts the options of the file after --config, or of a preset, in front of those of the command line."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config")
    found, rest = finder.parse_known_args(arguments)
    if found.config is None:
        return rest
    path = PRESETS / f"{found.config}.yaml"
    path = path if path.is_file() else Path(found.config)
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(
            f"{path}: neither a file of options nor one of {presets()} ({reason})"
        ) from error
    if not isinstance(content, dict):
        raise UsageError(f"{path}: must hold options, `name: value`, got {type(content).__name__}")
    return [f"--{str(name).replace('_', '-')}={value}" for name, value in content.items()] + rest


def save_options(args: argparse.Namespace, folder: Path) -> None:
    """Writes all options as config.yaml, for --config, and what the run stands on as environment.json."""
    left_out = ("command", "ckpt", "output", "fast_dev_run")
    options = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in vars(args).items()
        if name not in left_out and value is not None
    }
    write_text(folder / "config.yaml", yaml.safe_dump(options, sort_keys=False))
    packages = (uncertainty_mm, torch, np, L, torchmetrics)
    environment = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        **{package.__name__: package.__version__ for package in packages},
    }
    write_text(folder / "environment.json", json.dumps(environment, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a file in one piece or not at all."""
    with replacing(path) as partial:
        partial.write_text(text)


def check_options(args: argparse.Namespace) -> None:
    """Raises UsageError for values that cannot go together or make no sense."""
    for name in (*TRAINING_OPTIONS, *MODEL_OPTIONS):
        value, default = getattr(args, name), (TRAINING_OPTIONS | MODEL_OPTIONS)[name][0]
        counts = isinstance(default, int) and name not in ("seed", "queue_size")
        if name == "seed" and value >= 2**32:
            raise UsageError(f"--seed must be below 2**32, got {value}")
        if value == 0 and (counts or name in ("lr", "temperature")):
            raise UsageError(f"--{name.replace('_', '-')} must be above 0")
    if args.epochs == 0:
        raise UsageError("--epochs must be above 0")
    if args.hidden_dim % args.heads:
        raise UsageError(f"--hidden-dim {args.hidden_dim} is no multiple of --heads {args.heads}")
    if args.soft_labels > 1:
        raise UsageError(f"--soft-labels must be in [0, 1], got {args.soft_labels}")
    for name in ("dropout", "warmup", "drop_modality", "corrupt_modality"):
        if getattr(args, name) >= 1:
            raise UsageError(
                f"--{name.replace('_', '-')} must be below 1, got {getattr(args, name)}"
            )


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Reads a checkpoint without running code from it; raises UsageError if that is impossible."""
    try:
        check_sums(path)
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        content["hyper_parameters"]["label_names"], content["state_dict"].keys()
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file") from None
    except Exception as error:  # whatever a foreign or damaged file brings about
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UsageError(f"{path}: not a checkpoint of this program ({reason})") from error
    return content


def load(path: Path, lit_class: type[LitLDDU] = LitLDDU) -> LitLDDU:
    """The model of a checkpoint, on the CPU; raises UsageError if it is not of this version of the program."""
    read_checkpoint(path)
    try:
        return lit_class.load_from_checkpoint(path, map_location="cpu", weights_only=True)
    except (RuntimeError, TypeError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"{path}: of another model or version ({reason})") from error


def check_resumable(path: Path, lit: LitLDDU, epochs: int) -> None:
    """Raises UsageError unless the checkpoint is of the same training and leaves something to do.

    A run that was ended between its last epoch and metrics.json, its last file, has the evaluation left.
    """
    checkpoint = read_checkpoint(path)
    saved = checkpoint["hyper_parameters"]
    if "epoch" not in checkpoint or "optimizer_states" not in checkpoint:
        raise UsageError(f"{path}: cannot resume, it has no state of a training")
    done = checkpoint["epoch"] + 1
    if done > epochs or (done == epochs and (path.parent / "metrics.json").exists()):
        raise UsageError(f"{path}: {done} epochs are done, --epochs is {epochs}")
    for name in lit.hparams:
        if saved.get(name) != lit.hparams[name]:
            raise UsageError(
                f"{path}: cannot resume, `{name}` is {lit.hparams[name]} now and was {saved.get(name)}"
            )
    own = {name: tuple(value.shape) for name, value in lit.state_dict().items()}
    other = {name: tuple(value.shape) for name, value in checkpoint["state_dict"].items()}
    if own != other:
        name = min(name for name in {*own, *other} if own.get(name) != other.get(name))
        raise UsageError(
            f"{path}: cannot resume, of another model or version: `{name}` has shape "
            f"{own.get(name)} now and had {other.get(name)}"
        )


def set_statistics(encoders: nn.ModuleDict, data: MultimodalDataset) -> None:
    """Gives every encoder mean and standard deviation of its features over the valid steps.

    The data may lie on a disk: batches are read one by one, and their moments joined (Chan et al. 1983).
    """
    counts = dict.fromkeys(encoders, 0)
    means, squares = (
        {name: torch.zeros(dim).double() for name, dim in data.dims.items()} for _ in range(2)
    )
    for batch in data.loader(1024):
        for name in encoders:
            valid = batch.features[name][~batch.padding_mask[name]].double()
            # What is not finite here would be so in all results; training reports it (--on-nan).
            valid = valid[valid.isfinite().all(1)]
            if count := len(valid):
                mean, counts[name] = valid.mean(0), counts[name] + count
                change = mean - means[name]
                means[name] += change * (count / counts[name])
                squares[name] += (valid - mean).square().sum(0)
                squares[name] += change.square() * (count * (1 - count / counts[name]))
    for name, encoder in encoders.items():
        if counts[name]:
            encoder.mean.copy_(means[name])
            encoder.std.copy_((squares[name] / counts[name]).sqrt().clamp_min(1e-3))


def train(args: argparse.Namespace, lit_class: type[LitLDDU] = LitLDDU) -> dict[str, Any]:
    """Trains, selects the checkpoint on the validation split, and evaluates it once on the test split."""
    start = time.perf_counter()
    check_options(args)
    L.seed_everything(args.seed, workers=True, verbose=False)
    bayes: dict[str, Tensor] = {}
    if args.data:
        parts, name = read_data(args.data, args.format, args.labels), args.data.stem
    else:
        (parts, bayes), name = synthetic(args.seed), "synthetic"
    epochs = args.epochs
    if args.fast_dev_run:  # one batch of every split takes the whole way, and nothing is kept
        parts = {
            part: data.select(range(min(len(data), args.batch_size)))
            for part, data in parts.items()
        }
        bayes, epochs = {}, 1
    folder = run_folder(args, name)
    data = parts["train"]
    if args.soft_labels:
        if data.soft_labels is None:
            raise UsageError("--soft-labels: the training split has none")
        # Shares of raters stay as they are; intensities, 0 to 3 in CMU-MOSEI, become shares of the largest.
        data.soft_labels = data.soft_labels / data.soft_labels.max().clamp_min(1)
    say(f"{name}: {' + '.join(str(len(parts[part])) for part in SPLITS)} samples; for training")
    say(data.summary())
    for split, part in parts.items():
        if (part.dims, part.label_names) != (data.dims, data.label_names):
            raise UsageError(
                f"{name}: the {split} split has other modalities, sizes or labels than the training split"
            )
    lit = lit_class(
        data.dims,
        {name: max(part.steps[name] for part in parts.values()) for name in data.dims},
        data.label_names,
        len(data),
        {name: getattr(args, name) for name in MODEL_OPTIONS},
        args.lr,
        args.warmup,
        args.weight_decay,
        args.drop_modality,
        args.corrupt_modality,
        args.thresholds,
        args.seed,
        args.soft_labels,
    )
    set_statistics(lit.model.encoders, data)
    if isinstance(lit.model, LDDU):
        # With this bound several processes need not ask each other at every step how large their batches are.
        lit.model.contrastive.max_batch_size = args.batch_size
        lit.model.contrastive.bf16_products = args.precision.startswith("bf16")
    lit.on_nan = args.on_nan
    if args.ckpt:
        check_resumable(args.ckpt, lit, epochs)
    history = History(folder)
    best = MovableCheckpoint(
        folder, "best", monitor="val/miF1", mode="max", enable_version_counter=False
    )
    last = MovableCheckpoint(
        folder, "last", save_on_train_epoch_end=True, enable_version_counter=False
    )
    distributed = args.strategy == "ddp" or args.devices > 1
    if len(parts["validation"]) < args.devices:
        raise UsageError(
            f"--devices {args.devices}: the validation split has only {len(parts['validation'])} samples"
        )
    trainer = make_trainer(
        max_epochs=epochs,
        use_distributed_sampler=False,  # `DataModule` divides the samples
        accelerator=args.accelerator,
        devices=args.devices,
        # No broadcast: until an epoch ends, each process has its own part of the tracker's history.
        # Whoever waits longer than the timeout for a process that has died or hangs ends with an error.
        strategy=DDPStrategy(broadcast_buffers=False, timeout=timedelta(seconds=args.timeout))
        if distributed
        else "auto",
        plugins=[CompleteCheckpoints()],
        precision=args.precision,
        gradient_clip_val=1.0,
        logger=TensorBoardLogger(folder, name="tensorboard"),
        callbacks=[
            history,
            best,
            last,
            Patience("val/miF1", mode="max", patience=args.patience),
            TQDMProgressBar(refresh_rate=5),
        ],
        log_every_n_steps=1_000_000,  # once an epoch is enough, and never waits for the device
        num_sanity_val_steps=0,
    )
    if trainer.is_global_zero:
        save_options(args, folder)
        if not args.ckpt:  # the results of an earlier run in this folder
            (folder / "metrics.json").unlink(missing_ok=True)
    trainer.fit(
        lit, DataModule(parts, args.batch_size, args.seed), ckpt_path=args.ckpt, weights_only=True
    )
    trainer.strategy.barrier()
    if not trainer.is_global_zero:
        return {}

    lit = load(Path(best.best_model_path), lit_class)
    results: dict[str, Any] = {
        "data": name,
        "seed": args.seed,
        "epochs": trainer.current_epoch,
        "skipped_batches": trainer.lightning_module.skipped_batches,
        "parameters": sum(parameter.numel() for parameter in lit.parameters()),
        "threshold": [round(value, 2) for value in lit.threshold.tolist()],
    }
    test = parts["test"]
    for part in ("validation", "test"):
        outputs = apply(lit, parts[part], args)
        results[part] = evaluate(outputs["probs"], parts[part].labels, lit.threshold)
    results["uncalibrated"] = evaluate(outputs["uncalibrated"], test.labels, lit.threshold)
    save_arrays(folder / "predictions.npz", lit.threshold, test, outputs)
    if bayes:  # what no model can surpass
        threshold = best_threshold(bayes["validation"], parts["validation"].labels, args.thresholds)
        results["Bayes"] = evaluate(bayes["test"], test.labels, threshold)
    results["modalities"] = {}
    for present in product((True, False), repeat=len(test.dims)):
        names = [modality for modality, here in zip(test.dims, present, strict=True) if here]
        probs = apply(lit, test.only(names), args)["probs"]
        row = evaluate(probs, test.labels, lit.threshold)
        row["uncertainty"] = round(float(predictive_entropy(probs).mean()), 4)
        results["modalities"][" + ".join(names) or "none"] = row
    plot(history.rows, outputs["probs"], test.labels, folder / "training.png")
    results["seconds"] = round(time.perf_counter() - start, 1)
    # the last file: where it is, the run is complete
    write_text(folder / "metrics.json", json.dumps(results, indent=2) + "\n")
    rows = ("validation", "test", "uncalibrated", "Bayes")
    print_table({row: results[row] for row in rows if row in results})
    print(
        "\ntest split, by the modalities that are there; uncertainty is the predictive entropy in nats"
    )
    print_table(results["modalities"], ("Acc", "miF1", "mAP", "Brier", "ECE", "uncertainty"))
    print(
        f"\ncalibration and threshold {results['threshold']} from validation, {results['epochs']} epochs, "
        f"{results['seconds']:.0f} s, seed {args.seed}"
    )
    if not args.fast_dev_run:
        print(f"{folder}/: {', '.join(sorted(path.name for path in folder.iterdir()))}")
    return results


def print_table(
    rows: Mapping[str, Mapping[str, float | None]], columns: Sequence[str] = ()
) -> None:
    """One line a row, one column a measure."""
    columns = columns or list(next(iter(rows.values())))
    width = max(len(row) for row in rows)
    print(
        "\n" + " " * width + "".join(f"{column:>{max(8, len(column) + 2)}}" for column in columns)
    )
    for row, measures in rows.items():
        values = (
            f"{'-' if measures[column] is None else format(measures[column], '.3f'):>{max(8, len(column) + 2)}}"
            for column in columns
        )
        print(f"{row:>{width}}" + "".join(values))


def make_trainer(**options: Any) -> L.Trainer:
    """A Lightning trainer; options that this machine cannot satisfy end in one line."""
    try:
        return L.Trainer(enable_model_summary=False, **options)
    except (ValueError, MisconfigurationException) as error:
        raise UsageError(" ".join(str(error).split())) from error


def apply(lit: LitLDDU, data: MultimodalDataset, args: argparse.Namespace) -> dict[str, Tensor]:
    """The outputs of `predict_step` for a whole split."""
    trainer = make_trainer(
        accelerator=args.accelerator,
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    steps = trainer.predict(lit, data.loader(args.batch_size))
    assert steps is not None
    return {key: torch.cat([step[key] for step in steps]).float() for key in steps[0]}


def load_for(data: MultimodalDataset, source: Path, ckpt: Path) -> LitLDDU:
    """The model of a checkpoint; raises UsageError unless it can be applied to the data, which `source` holds."""
    lit = load(ckpt)
    for what, wanted, received in (
        ("modalities and feature sizes", lit.hparams["modality_dims"], data.dims),
        ("labels", lit.hparams["label_names"], data.label_names),
    ):
        if list(wanted) != list(received) or wanted != received:  # the order counts
            raise UsageError(
                f"{source}: {what} {received} are not those of the checkpoint, {wanted}"
            )
    for name, steps in lit.hparams["max_steps"].items():
        if data.steps[name] > steps:
            raise UsageError(
                f"{source}: modality `{name}` has {data.steps[name]} steps, the checkpoint knows {steps}"
            )
    return lit


def predict(args: argparse.Namespace) -> None:
    """Applies a checkpoint to one split and writes one row a sample (.csv) or arrays (.npz)."""
    if not args.output.parent.is_dir():
        raise UsageError(f"{args.output}: no such folder, {args.output.parent}")
    if args.output.is_dir():
        raise UsageError(f"{args.output}: is a folder, --output must be a file")
    for source in (args.data, args.ckpt):
        if args.output.resolve() == source.resolve():
            raise UsageError(f"{args.output}: --output would replace what is read")
    if args.batch_size == 0:
        raise UsageError("--batch-size must be above 0")
    data = read_data(args.data, args.format, args.labels, [args.split])[args.split]
    lit = load_for(data, args.data, args.ckpt)
    save = save_arrays if args.output.suffix == ".npz" else save_rows
    save(args.output, lit.threshold, data, apply(lit, data, args))
    print(
        f"{len(data)} samples of the {args.split} split, thresholds "
        f"{[round(value, 2) for value in lit.threshold.tolist()]}: {args.output}"
    )


def save_arrays(
    path: Path, threshold: Tensor, data: MultimodalDataset, outputs: Mapping[str, Tensor]
) -> None:
    """Writes all outputs, the labels, and what the axes mean as .npz."""
    with replacing(path) as partial:
        np.savez_compressed(
            partial,
            **{key: value.numpy() for key, value in outputs.items()},
            uncertainty=predictive_entropy(outputs["probs"]).float().numpy(),
            threshold=threshold.numpy(),
            labels=data.labels.numpy(),
            label_names=np.array(data.label_names),
            modalities=np.array(list(data.dims)),
            **({} if data.ids is None else {"ids": np.array(data.ids)}),
        )


def save_rows(
    path: Path, threshold: Tensor, data: MultimodalDataset, outputs: Mapping[str, Tensor]
) -> None:
    """Writes the outputs as .csv, one row a sample."""
    modalities, labels = list(data.dims), data.label_names
    header = ["sample", "uncertainty"]
    header += [f"prob.{label}" for label in labels]
    header += [f"predicted.{label}" for label in labels]
    header += [f"gate.{label}" for label in labels]
    header += [f"std_norm.{modality}.{label}" for modality in modalities for label in labels]
    columns = [
        predictive_entropy(outputs["probs"]).float().unsqueeze(1),
        outputs["probs"],
        (outputs["probs"] > threshold).float(),
        outputs["gate"],
        outputs["std_norm"].flatten(1),
    ]
    with replacing(path) as partial, open(partial, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        for sample, row in enumerate(torch.cat(columns, dim=1).tolist()):
            name = sample if data.ids is None else data.ids[sample]
            writer.writerow([name, *(f"{value:.6g}" for value in row)])


# Option: default and help. A tuple lists the choices, the default first.
TRAINING_OPTIONS: dict[str, tuple[Any, str]] = {
    "seed": (0, "seed of everything random"),
    "epochs": (30, "epochs at most"),
    "patience": (6, "epochs without a better validation miF1 before stopping"),
    "batch_size": (128, "samples a step"),
    "lr": (5e-4, "peak learning rate (paper: 2e-5, see above)"),
    "warmup": (0.1, "share of the steps in which the learning rate rises"),
    "drop_modality": (
        0.0,
        "share of the training samples that lose a random half of their modalities",
    ),
    "corrupt_modality": (
        0.0,
        "share of the training sequences that get noise of up to 5 times their spread",
    ),
    "soft_labels": (
        0.0,
        "share of the soft labels (of raters, intensities) in what the classifiers are trained towards",
    ),
    "thresholds": (("single", "label"), "one threshold for all labels, or one for each"),
    "weight_decay": (0.0, "decoupled weight decay (paper: Adam, none)"),
    "on_nan": (
        ("stop", "skip"),
        "what to do with a batch whose loss or gradient is not finite; its samples are named",
    ),
    "devices": (1, "number of devices"),
    "strategy": (("auto", "ddp"), "ddp, or auto: ddp for several devices"),
    "timeout": (600, "seconds a process waits for the others before it ends with an error (ddp)"),
    "precision": ("32-true", "32-true, bf16-mixed, 16-mixed, ... (see Lightning)"),
}
MODEL_OPTIONS: dict[str, tuple[Any, str]] = {
    "hidden_dim": (256, "width of the Transformer layers"),
    "layers": (3, "Transformer layers of a modality"),
    "heads": (8, "attention heads"),
    "dropout": (0.1, "dropout (not in the paper; released code: 0.1 to 0.3)"),
    "z_dim": (128, "size of an answer Z"),
    "latent_dim": (64, "latent dimensions of a Gaussian"),
    "queue_size": (8192, "Gaussians remembered for the contrastive loss"),
    "temperature": (0.07, "temperature of Eq. 6 (from the released code)"),
    "anchors": (("all", "present"), "anchors of Eq. 7"),
    "gate": (
        ("expected", "constant", "oracle", "released", "mean", "std"),
        "uncertainty of Eq. 8; mean and std leave one branch alone",
    ),
    "mean_weight": (("certainty", "uncertainty"), "what weighs the means in Eq. 8"),
    "final": (
        ("fused", "residual"),
        "final prediction: Eq. 8 alone, or its logits added to those of the first prediction",
    ),
    "size": (("apart", "within"), "size of a sequence: a separate input, or left in the features"),
    "combine": (
        ("product", "concat"),
        "how modalities meet: product of Gaussians, or as in the paper",
    ),
    "std_branch": (
        ("reads", "shapes"),
        "whether the classifier of the standard deviations only reads them, or shapes them as in the paper",
    ),
    "embedding": (
        ("joint", "both", "mean", "std"),
        "what Eq. 4 embeds: joint keeps the size of std, both is the paper",
    ),
    "ordinality": (("rank", "standardized", "raw"), "mode of Eq. 15"),
    "pairs": (("SR", "SR+DR", "DR", "DS", "SR+DR+DS"), "pairs of Eq. 15"),
    "targets": (
        ("both", "modality", "pooled", "sample"),
        "whose errors the standard deviations are held against, and among whom they are ranked",
    ),
    "ocl_weight": (0.3, "lambda of Eq. 16, ordinality loss (paper: 0.1)"),
    "scl_weight": (0.1, "beta of Eq. 16, contrastive loss (paper: 0.8, see above)"),
    "dir_weight": (0.1, "gamma of Eq. 16, first prediction"),
    "modality_weight": (1.0, "weight of the predictions from each modality alone"),
    "kl_weight": (3e-5, "weight of the divergence of the Gaussians from the prior"),
}


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong with the options; --help lists them all."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


@contextmanager
def ending_in_one_line() -> Iterator[None]:
    """Ends the program with exit code 2 and one line where an option or a file cannot be used, or a disk is full."""
    try:
        yield
    except (UsageError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


def non_negative(kind: type[int] | type[float]) -> Callable[[str], float]:
    """Converter of a command-line value, for argparse."""

    def convert(text: str) -> float:
        value = kind(text)
        if not 0 <= value < math.inf:
            raise argparse.ArgumentTypeError(f"must not be negative or infinite, got {text}")
        return value

    return convert


def add_layout(add: Callable[..., Any]) -> None:
    """The options that say how to read --data."""
    add("--format", choices=("auto", *READERS), default="auto", help="default: by the suffix")
    add("--labels", type=Path, help="file with the labels of --format mmsa (.csv or .pt)")


def parser() -> argparse.ArgumentParser:
    """The commands `train` and `predict` with their options."""
    main_parser = Parser(
        description="LDDU (Huang et al. 2025, arXiv 2502.13954). Without a command: train. "
        "The options of each command: train --help, predict --help."
    )
    commands = main_parser.add_subparsers(dest="command", required=True)

    train_parser = commands.add_parser("train", help="train and evaluate", allow_abbrev=False)
    add = train_parser.add_argument
    add("--data", type=Path, help="file or folder (default: a built-in synthetic set)")
    add_layout(add)
    add(
        "--config", help=f"options from a .yaml file, or one of {presets()} (without --data: small)"
    )
    add("--output", type=Path, help="run folder (default: runs/DATA-TIME)")
    add("--ckpt", type=Path, help="resume from this checkpoint (last.ckpt)")
    add("--accelerator", default="auto", help="auto (default), cpu, cuda, ... (see Lightning)")
    add("--fast-dev-run", action="store_true", help="try everything on one batch, keep nothing")
    for title, options in (("training", TRAINING_OPTIONS), ("model", MODEL_OPTIONS)):
        group = train_parser.add_argument_group(title)
        for name, (default, text) in options.items():
            option: dict[str, Any] = {"default": default, "help": f"{text} (default: %(default)s)"}
            if isinstance(default, tuple):
                option |= {"default": default[0], "choices": default}
            elif not isinstance(default, str):
                option |= {"type": non_negative(type(default))}
            group.add_argument(f"--{name.replace('_', '-')}", **option)

    predict_parser = commands.add_parser("predict", help="apply a checkpoint")
    add = predict_parser.add_argument
    add("--ckpt", type=Path, required=True, help="checkpoint of a training run")
    add("--data", type=Path, required=True, help="file or folder")
    add_layout(add)
    add("--output", type=Path, default=Path("predictions.csv"), help=".csv or .npz to write")
    add("--split", choices=SPLITS, default="test", help="part of the file (default: test)")
    add("--batch-size", type=non_negative(int), default=128, help="samples a step")
    add("--accelerator", default="auto", help="auto (default), cpu, cuda, ... (see Lightning)")
    return main_parser


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command (default: train), its options, and those of a file after --config."""
    arguments = list(arguments)
    if not arguments or arguments[0] not in ("train", "predict", "-h", "--help"):
        arguments.insert(0, "train")
    args = parser().parse_args(arguments[:1] + options_from_file(arguments[1:]))
    if args.command == "train" and not args.data and not any("--config" in a for a in arguments):
        # The built-in set is small, and so is its model.
        return parse([*arguments, "--config", "small"])
    return args


def quiet() -> None:
    """Lightning's advice on workers and devices is not needed here."""
    warnings.filterwarnings("ignore", module="lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    quiet()
    with ending_in_one_line():
        args = parse(sys.argv[1:] if argv is None else argv)
        if args.command == "predict":
            predict(args)
        elif args.fast_dev_run:
            if args.ckpt or args.output:
                raise UsageError("--fast-dev-run keeps nothing: it takes no --ckpt and no --output")
            with tempfile.TemporaryDirectory() as folder:
                args.output, args.devices, args.strategy = Path(folder), 1, "auto"
                train(args)
        else:
            train(args)


if __name__ == "__main__":
    main()
