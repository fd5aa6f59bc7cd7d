r"""LDDU, the paper in one file: the model, its losses, and a command line to train, test and apply it.

    python examples/lddu_full.py                                            # train and test on built-in data
    python examples/lddu_full.py --data.path FILE                           # on your data
    python examples/lddu_full.py --data.path FILE --config paper            # options from a file
    python examples/lddu_full.py --ckpt_path RUN/last.ckpt                  # resume
    python examples/lddu_full.py test --ckpt_path RUN/best.ckpt --data.path FILE
    python examples/lddu_full.py predict --ckpt_path RUN/best.ckpt --data.path FILE --output predictions.csv

LDDU (Huang et al. 2025, arXiv 2502.13954) recognises several emotions at once from sequences of several modalities.
Every emotion asks every modality what concerns it (Eq. 1-2), and each answer becomes a Gaussian: its mean says what was
seen, its standard deviation how sure that is. Three ideas shape these Gaussians:

1. Gaussians of the same modality and emotion attract each other (Eq. 4-7): `DistributionSupConLoss`.
2. A first prediction (Eq. 3) is unsure where it stands near 1/2; that gates two final classifiers, one that reads the
   means and one that reads the standard deviations (Eq. 8-9): `UncertaintyGatedFusion`.
3. Samples that are predicted badly, now or in the past, should have the larger standard deviations (Eq. 10-15):
   `SoftRankOrdinalityLoss` with `CorrectnessTracker`.

The defaults are what was measured to work; `--config paper` has the paper's values and equations as far as they go, and
names the rest. Ours, where the paper is silent: standardised features, the size of a sequence as an input of its own,
normalisation before the sublayers, labels that scale and shift their Z, dropout, clipped gradients, early stopping,
calibration, and a prediction from every modality alone, so that its own errors can be held against its standard
deviation.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from uncertainty_mm import (
    CorrectnessTracker,
    DiagonalGaussian,
    DistributionSupConLoss,
    EmotionQueryAttention,
    FusedPrediction,
    GaussianDecoupler,
    SoftRankOrdinalityLoss,
    UncertaintyGatedFusion,
)
from uncertainty_mm.data import MultimodalBatch
from uncertainty_mm.encoder import SequenceEncoder
from uncertainty_mm.functional import expected_distance, prediction_distance
from uncertainty_mm.lightning import (
    MultilabelModule,
    masked_bce,
    masked_mean,
    run_command_line,
)

Options = Mapping[str, Any]


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


class LDDU(MultilabelModule):
    """The model of the paper, composed of the components of the library.

    Every part has its options under its own name (`fusion`, ...), with the argument names of its class. A subclass with
    other `parts` trains, saves and loads in the same way.

    Args:
        modality_dims: Feature size of every modality.
        max_steps: Steps of the longest sequence of every modality.
        label_names: Names of the labels.
        num_train_samples: Number of samples whose history is kept.
        encoder: Options of the encoder of every modality.
        attention: Options of the label queries; `out_dim` is the size of an answer Z.
        decoupler: Options of the Gaussians; `latent_dim` is their number of dimensions.
        contrastive: Options of the contrastive loss.
        fusion: Options of the gated fusion.
        ordinality: Options of the ordinality loss.
        tracker: Options of the history.
        gate: Uncertainty of Eq. 8: the distance that the first prediction expects (`"expected"`), its distance from
            the labels (`"oracle"`, Eq. 8 as printed, in training only), that of the released code, or a constant;
            `"mean"` and `"std"` leave one branch alone.
        final: Final prediction: Eq. 8 alone (`"fused"`), or its logits added to those of the first (`"residual"`).
        targets: Whose errors the standard deviations are held against: the joint prediction's (`"sample"`, the paper),
            or each modality's own, ranked among the samples (`"modality"`), among samples and modalities (`"pooled"`),
            or `"both"`.
        scl_weight: Weight beta of Eq. 16, contrastive loss (the paper: 0.8).
        ocl_weight: Weight lambda of Eq. 16, ordinality loss (the paper: 0.1).
        dir_weight: Weight gamma of Eq. 16, first prediction.
        modality_weight: Weight of the predictions from each modality alone.
        kl_weight: Weight of the divergence of the Gaussians from the prior.
        dropout: Dropout of the first classifier.
        training: Options of :class:`~uncertainty_mm.lightning.MultilabelModule`.
    """

    parts: ClassVar = {
        "encoder": SequenceEncoder,
        "attention": EmotionQueryAttention,
        "decoupler": GaussianDecoupler,
        "contrastive": DistributionSupConLoss,
        "fusion": UncertaintyGatedFusion,
        "ordinality": SoftRankOrdinalityLoss,
        "tracker": CorrectnessTracker,
    }
    defaults: ClassVar = {"contrastive": {"gather": True}, "ordinality": {"gather": True}}
    fixed: ClassVar = {"tracker": ("num_labels",)}  # follows from `targets`
    axes: ClassVar = {"std_norm": ("modality", "label"), "missing": ("modality",)}

    def __init__(
        self,
        modality_dims: dict[str, int],
        max_steps: dict[str, int],
        label_names: list[str],
        num_train_samples: int,
        *,
        encoder: Options = {},  # noqa: B006, never changed
        attention: Options = {},  # noqa: B006
        decoupler: Options = {},  # noqa: B006
        contrastive: Options = {},  # noqa: B006
        fusion: Options = {},  # noqa: B006
        ordinality: Options = {},  # noqa: B006
        tracker: Options = {},  # noqa: B006
        gate: Literal["expected", "constant", "oracle", "released", "mean", "std"] = "expected",
        final: Literal["fused", "residual"] = "fused",
        targets: Literal["both", "modality", "pooled", "sample"] = "both",
        scl_weight: float = 0.1,
        ocl_weight: float = 0.3,
        dir_weight: float = 0.1,
        modality_weight: float = 1.0,
        kl_weight: float = 3e-5,
        dropout: float = 0.1,
        **training: Any,
    ) -> None:
        super().__init__(label_names, **training)
        modalities, labels = len(modality_dims), len(label_names)
        self.gate, self.final, self.errors_of = gate, final, targets
        self.weights = {
            "cls": 1.0,
            "ocl": ocl_weight,
            "scl": scl_weight,
            "dir": dir_weight,
            "modality": modality_weight,
            "kl": kl_weight,
        }

        # Section 3.2: features of every modality -> linear, positions, Transformer layers
        self.encoder = nn.ModuleDict(
            {
                name: self.part("encoder", encoder, dim, max_steps[name])
                for name, dim in modality_dims.items()
            }
        )
        hidden_dim = next(iter(self.encoder.values())).hidden_dim
        # Eq. 1-2: every label reads every modality
        dims = dict.fromkeys(modality_dims, hidden_dim)
        self.attention = self.part("attention", attention, dims, labels)
        z_dim = self.attention.out_dim
        # Which parts of an answer matter depends on who asked. All below is shared by the labels, so the label scales
        # and shifts its Z (FiLM, Perez et al. 2018); the paper is silent here.
        self.asked_by = nn.Linear(self.attention.label_embedding.embedding_dim, 2 * z_dim)
        # Eq. 3: the first prediction, from all of Z
        self.info_classifier = nn.Sequential(
            nn.Linear(modalities * labels * z_dim, z_dim),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(z_dim, labels),
        )
        # Section 3.3.2: every answer as a Gaussian
        self.decoupler = self.part("decoupler", decoupler, modalities, z_dim)
        latent_dim = self.decoupler.latent_dim
        # What each modality says by itself
        self.modality_readout = nn.Parameter(torch.zeros(modalities, latent_dim))
        self.modality_bias = nn.Parameter(torch.zeros(modalities, labels))
        # Eq. 4-7
        self.contrastive = self.part("contrastive", contrastive, modalities, labels, latent_dim)
        # Eq. 8-9
        self.fusion = self.part("fusion", fusion, modalities, labels, latent_dim)
        # Eq. 10-15, with a history of every sample, or of every sample and modality
        history = None if targets == "sample" else modalities
        self.tracker = self.part("tracker", tracker, num_train_samples, history)
        self.ordinality = self.part("ordinality", ordinality)

    # --- The model ---------------------------------------------------------------------------------------------------

    def forward(
        self,
        features: Mapping[str, Tensor],
        padding_mask: Mapping[str, Tensor],
        labels: Tensor | None = None,
        unknown: Tensor | None = None,
    ) -> Output:
        """Predicts; the labels are read by the oracle gate alone, in training."""
        encoded = {
            name: encoder(features[name], padding_mask[name])
            for name, encoder in self.encoder.items()
        }
        missing = self.attention.missing(encoded, padding_mask)
        z = self.attention(encoded, padding_mask)  # Eq. 1-2: (B, M, Q, z_dim)
        scale, shift = self.asked_by(self.attention.label_embedding.weight).chunk(2, dim=1)
        z = ((1 + scale) * z + shift).masked_fill(missing[:, :, None, None], 0)
        dir_logits = self.info_classifier(z.flatten(1))  # Eq. 3
        latent = self.decoupler(z, missing)
        modality_logits = torch.einsum("bmqk,mk->bmq", latent.mean, self.modality_readout)
        modality_logits = modality_logits + self.modality_bias
        uncertainty = self.uncertainty(dir_logits.detach().float().sigmoid(), labels, unknown)
        fused = self.fusion(latent, uncertainty, missing)  # Eq. 8
        logits = fused.logits + dir_logits if self.final == "residual" else fused.logits
        return Output(dir_logits, latent, modality_logits, fused, logits, missing)

    def uncertainty(
        self, dir_probs: Tensor, labels: Tensor | None, unknown: Tensor | None
    ) -> Tensor:
        """The d of Eq. 8, which as printed needs the labels."""
        if self.gate == "oracle" and self.training and labels is not None:
            return mean_over_known(prediction_distance(dir_probs, labels, unknown), unknown)
        if self.gate == "released":  # that code weighs the means by the first prediction itself
            return 1 - dir_probs
        if self.gate == "constant":
            return torch.full_like(dir_probs, 0.5)
        if self.gate in ("mean", "std"):  # one branch alone
            weighs = getattr(self.fusion, "mean_weight", "certainty")  # another part may have none
            certain = (self.gate == "mean") == (weighs == "certainty")
            return torch.full_like(dir_probs, 0.0 if certain else 1.0)
        return expected_distance(dir_probs)

    def details(self, output: Output) -> dict[str, Tensor]:
        """What explains a prediction; a modality that is missing has no standard deviation."""
        return {
            "gate": output.fused.mean_weight,
            "std_norm": output.std_norm.masked_fill(output.missing.unsqueeze(2), torch.nan),
            "missing": output.missing,
        }

    # --- Losses ------------------------------------------------------------------------------------------------------

    def losses(self, output: Output, batch: MultimodalBatch) -> dict[str, Tensor]:
        """The losses of Eq. 16, of the modalities alone, of the distance to the prior, and their weighted sum."""
        target, unknown = self.targets(batch), batch.unknown
        each = target.unsqueeze(1).expand_as(output.modality_logits)
        by_modality = F.binary_cross_entropy_with_logits(
            output.modality_logits.float(), each, reduction="none"
        ).masked_fill(output.missing.unsqueeze(2), 0)
        losses = {
            "cls": masked_bce(output.logits, target, unknown),  # Eq. 9
            "dir": masked_bce(output.dir_logits, target, unknown),  # Eq. 3
            "modality": masked_mean(by_modality.mean(1), unknown),
            "scl": self.contrastive(output.latent, batch.labels, output.missing, unknown=unknown),
            "ocl": self.ordinality_loss(output, batch),
            "kl": output.latent.kl_to_standard_normal().mean(),
        }
        total = torch.stack([self.weights[name] * loss for name, loss in losses.items()]).sum()
        return {**losses, "total": total}  # Eq. 16

    def ordinality_loss(self, output: Output, batch: MultimodalBatch) -> Tensor:
        """Eq. 10-15: the standard deviations in the order of the errors; the tracker learns of the outcome.

        The paper holds the size of all standard deviations of a sample against the errors of the joint prediction. That
        does not say which modality is to blame; with the other `targets` each modality answers for its own.
        """
        labels, unknown, indices = batch.labels, batch.unknown, batch.indices
        unseen = self.tracker.counts(indices) == 0  # nothing to compare with yet
        history = self.tracker(indices)
        nothing = (
            None if unknown is None else unknown.all(1)
        )  # is known of the sample: it does not count
        if self.errors_of == "sample":
            right = ((output.logits.detach() > 0) == (labels > 0.5)).float()
            self.tracker.update(indices, mean_over_known(right, unknown), mask=nothing)
            distance = prediction_distance(output.dir_logits.float().sigmoid(), labels, unknown)
            return self.ordinality(
                std_norm=torch.linalg.vector_norm(output.std_norm.flatten(1), dim=1),  # Eq. 12
                distance=mean_over_known(distance, unknown),
                correctness=history,
                mask=unseen if nothing is None else unseen | nothing,
            )
        probs = output.modality_logits.float().sigmoid()
        of_each = None if unknown is None else unknown.unsqueeze(1).expand_as(probs)
        distance = prediction_distance(probs, labels.unsqueeze(1).expand_as(probs), of_each)
        distance = mean_over_known(distance, of_each)
        absent = output.missing if nothing is None else output.missing | nothing.unsqueeze(1)
        self.tracker.update(indices, 1 - distance.detach(), mask=absent)
        std_norm = torch.linalg.vector_norm(output.std_norm, dim=2)  # Eq. 12
        scores = {
            "std_norm": std_norm,
            "distance": distance,
            "correctness": history,
            "mask": unseen | absent,
        }
        loss = std_norm.new_zeros(())
        if self.errors_of in ("both", "modality"):  # ranks among the samples, for each modality
            for modality in range(std_norm.shape[1]):
                loss = loss + self.ordinality(
                    **{name: x[:, modality] for name, x in scores.items()}
                )
        if self.errors_of in ("both", "pooled"):  # ranks among samples and modalities
            loss = loss + self.ordinality(**{name: x.flatten() for name, x in scores.items()})
        return loss

    # --- Training ----------------------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        """Standardises the features with the statistics of the training split, which travel with the model."""
        super().on_fit_start()
        for name, each in self.trainer.datamodule.statistics().items():
            self.encoder[name].standardize(each.mean, each.std)

    def training_step(self, batch: MultimodalBatch, batch_idx: int) -> Tensor:
        """Eq. 16 of a batch."""
        output = self(batch.features, batch.padding_mask, batch.labels, batch.unknown)
        losses = self.losses(output, batch)
        self.log_losses(losses, batch)
        return losses["total"]

    def on_train_epoch_end(self) -> None:
        """Merges the histories of all processes."""
        self.tracker.synchronize()


def mean_over_known(x: Tensor, unknown: Tensor | None) -> Tensor:
    """Mean over the labels, the last axis, that are known; 0 where none is."""
    if unknown is None:
        return x.mean(-1)
    return x.masked_fill(unknown, 0).sum(-1) / (~unknown).sum(-1).clamp_min(1)


def main(model: type[LDDU] = LDDU, arguments: list[str] | None = None) -> None:
    """Runs the command line for the model, or for a subclass of it with other parts."""
    run_command_line(model, Path(__file__).with_name("configs"), arguments)


if __name__ == "__main__":
    main()
