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
names the rest. Added, where the paper is silent: standardised features, the size of a sequence as an input of its own,
normalisation before the sublayers, labels that scale and shift their Z, dropout, clipped gradients, early stopping,
calibration, a prediction from every modality alone, so that its own errors can be compared with its standard deviation,
a prediction that reads the steps at their places, a pool of the predictions, variances that grow where a sequence is
unlike the training data, and a probability that it is of another sample.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from uncertainty_mm import (
    Conflict,
    CorrectnessTracker,
    DecisionFusion,
    DiagonalGaussian,
    DistributionSupConLoss,
    EmotionQueryAttention,
    FusedPrediction,
    GaussianDecoupler,
    LogitPool,
    SoftRankOrdinalityLoss,
    Typicality,
    UncertaintyGatedFusion,
)
from uncertainty_mm.data import MultimodalBatch
from uncertainty_mm.encoder import SequenceEncoder
from uncertainty_mm.functional import expected_distance, prediction_distance, reduced_chi2
from uncertainty_mm.lightning import (
    MultilabelModule,
    masked_bce,
    masked_mean,
    mean_over_known,
    run_command_line,
)
from uncertainty_mm.places import PlaceClassifier

Options = Mapping[str, Any]
Prediction = Literal["fused", "first", "places", "modalities"]


class Output(NamedTuple):
    """What the model says of a batch."""

    dir_logits: Tensor  # (B, Q) first prediction, y_dir of Eq. 3
    place_logits: Tensor | None  # (B, Q) prediction from the steps at their places
    latent: DiagonalGaussian  # (B, M, Q, K), wider in evaluation where a modality is not typical
    modality_logits: Tensor  # (B, M, Q) prediction from each modality alone
    fused: FusedPrediction  # y_fnl of Eq. 8
    missing: Tensor  # (B, M)
    typicality: Tensor  # (B, M) factor of the variance, 1 for what is like the training data
    conflict: Tensor  # (B, Q) how far the modalities contradict each other
    summaries: dict[str, Tensor]  # (B, P_m) by modality, for `conflict`; none in training

    @property
    def logits(self) -> Tensor:
        """Logits of Eq. 8, (B, Q)."""
        return self.fused.logits

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
        places: Options of the prediction that reads the steps at their places.
        typicality: Options of the factor by which variances grow.
        conflict: Options of the probability that a modality is of another sample.
        gate: Uncertainty of Eq. 8: the distance that the first prediction expects (`"expected"`), its distance from
            the labels (`"oracle"`, Eq. 8 as printed, in training only), that of the released code, or a constant;
            `"mean"` and `"std"` leave one branch alone.
        predictions: Which predictions the pool weighs, on the validation split: Eq. 8 (`"fused"`), Eq. 3 (`"first"`),
            that by place, from which no other part learns (`"places"`), and the mean of those of the modalities alone,
            by their typicality (`"modalities"`). The paper: the first of these alone.
        targets: Whose errors the standard deviations are compared with: the joint prediction's (`"sample"`, the paper),
            or each modality's own, ranked among the samples (`"modality"`), among samples and modalities (`"pooled"`),
            or `"both"`.
        scl_weight: Weight beta of Eq. 16, contrastive loss (the paper: 0.8).
        scl_rows: At most so many distributions of a batch, those of its first samples, are in the contrastive loss,
            whose cost grows with their square; None is all.
        ocl_weight: Weight lambda of Eq. 16, ordinality loss (the paper: 0.1).
        dir_weight: Weight gamma of Eq. 16, first prediction.
        modality_weight: Weight of the predictions from each modality alone.
        kl_weight: Weight of the divergence of the Gaussians from the prior.
        dropout: Dropout of the first classifier.
        use_typicality: In evaluation, widen the Gaussians of a modality unlike the training data, and shrink the rest.
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
        "places": PlaceClassifier,
        "typicality": Typicality,
        "conflict": Conflict,
    }
    defaults: ClassVar = {"contrastive": {"gather": True}, "ordinality": {"gather": True}}
    fixed: ClassVar = {"tracker": ("num_labels",)}  # follows from `targets`
    axes: ClassVar = {
        "std_norm": ("modality", "label"),
        "missing": ("modality",),
        "typicality": ("modality",),
        "foreign": ("modality",),
    }

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
        places: Options = {},  # noqa: B006
        typicality: Options = {},  # noqa: B006
        conflict: Options = {},  # noqa: B006
        gate: Literal["expected", "constant", "oracle", "released", "mean", "std"] = "expected",
        predictions: Sequence[Prediction] = get_args(Prediction),
        targets: Literal["both", "modality", "pooled", "sample"] = "both",
        scl_weight: float = 0.1,
        scl_rows: int | None = 512,
        ocl_weight: float = 0.3,
        dir_weight: float = 0.1,
        modality_weight: float = 1.0,
        kl_weight: float = 3e-5,
        dropout: float = 0.1,
        use_typicality: bool = True,
        **training: Any,
    ) -> None:
        super().__init__(label_names, **training)
        modalities, labels = len(modality_dims), len(label_names)
        if not predictions or len({*predictions} & {*get_args(Prediction)}) < len(predictions):
            raise ValueError(f"Expected some `predictions`, each once, but got {predictions}")
        if scl_rows is not None and scl_rows < 1:
            raise ValueError(f"Expected `scl_rows` to be None or at least 1, but got {scl_rows}")
        self.gate, self.errors_of, self.predictions = gate, targets, tuple(predictions)
        self.use_typicality = use_typicality
        self.scl_samples = None if scl_rows is None else max(1, scl_rows // (modalities * labels))
        self.weights = {
            "cls": 1.0,
            "places": 1.0,  # alone with its parameters, it needs no other
            "ocl": ocl_weight,
            "scl": scl_weight,
            "dir": dir_weight,
            "modality": modality_weight,
            "kl": kl_weight,
        }
        # Section 3.2: features of every modality -> linear, positions, Transformer layers
        self.encoder = nn.ModuleDict()
        for name, dim in modality_dims.items():
            self.encoder[name] = self.part("encoder", encoder, dim, max_steps[name])
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
        # The same from the steps, encoded and plain, at their places
        sizes = ({n: hidden_dim + dim for n, dim in modality_dims.items()}, max_steps, labels)
        self.places = self.part("places", places, *sizes) if "places" in predictions else None
        self.decisions = DecisionFusion("precision", validate_args=False)
        self.pool = LogitPool(len(self.predictions), labels, validate_args=False)
        # Section 3.3.2: every answer as a Gaussian
        self.decoupler = self.part("decoupler", decoupler, modalities, z_dim)
        latent_dim = self.decoupler.latent_dim
        # What each modality says by itself
        self.modality_readout = nn.Parameter(torch.zeros(modalities, latent_dim))
        self.modality_bias = nn.Parameter(torch.zeros(modalities, labels))
        # Eq. 4-7; several processes exchange no more rows than there can be
        if self.scl_samples and (most := contrastive.get("max_batch_size")):
            contrastive = {**contrastive, "max_batch_size": min(most, self.scl_samples)}
        self.contrastive = self.part("contrastive", contrastive, modalities, labels, latent_dim)
        # Eq. 8-9
        self.fusion = self.part("fusion", fusion, modalities, labels, latent_dim)
        # Eq. 10-15, with a history of every sample, or of every sample and modality
        history = None if targets == "sample" else modalities
        self.tracker = self.part("tracker", tracker, num_train_samples, history)
        self.ordinality = self.part("ordinality", ordinality)
        self.typicality = self.part("typicality", typicality, modality_dims)
        self.conflict = self.part("conflict", conflict, self.typicality.summary_dims)
        self._keep(usual_conflict=torch.ones(labels))

    # --- The model ---------------------------------------------------------------------------------------------------

    def forward(
        self,
        features: Mapping[str, Tensor],
        padding_mask: Mapping[str, Tensor],
        labels: Tensor | None = None,
        unknown: Tensor | None = None,
    ) -> Output:
        """Predicts; the labels are read by the oracle gate alone, in training."""
        encoded = {n: part(features[n], padding_mask[n]) for n, part in self.encoder.items()}
        missing = self.attention.missing(encoded, padding_mask)
        z = self.attention(encoded, padding_mask)  # Eq. 1-2: (B, M, Q, z_dim)
        scale, shift = self.asked_by(self.attention.label_embedding.weight).chunk(2, dim=1)
        z = ((1 + scale) * z + shift).masked_fill(missing[:, :, None, None], 0)
        latent = self.decoupler(z, missing)
        each = torch.einsum("bmqk,mk->bmq", latent.mean, self.modality_readout) + self.modality_bias
        # What is unlike the training data counts less in all predictions
        factor, conflict = torch.ones_like(missing, dtype=z.dtype), torch.zeros_like(z[:, 0, :, 0])
        summaries: dict[str, Tensor] = {}
        if not self.training:
            conflict = reduced_chi2(latent.mean, latent.std, missing)
            grown, summaries = self.typicality(features, padding_mask, need_summaries=True)
            if self.use_typicality:
                factor, latent = grown, latent.inflated(grown)
        shrunk = z / factor[:, :, None, None].to(z.dtype)
        dir_logits = self.info_classifier(shrunk.flatten(1))  # Eq. 3
        place_logits = None
        if self.places is not None:  # it learns from the encoders, and they not from it
            steps = {}
            for name, x in encoded.items():
                plain = self.encoder[name].standardized(features[name]).clamp(-5, 5)
                steps[name] = torch.cat([x.detach(), plain.to(x)], dim=2)
            place_logits = self.places(steps, padding_mask, factor)
        uncertainty = self.uncertainty(dir_logits.detach().float().sigmoid(), labels, unknown)
        fused = self.fusion(latent, uncertainty, missing)  # Eq. 8
        predicted = dir_logits, place_logits, latent, each, fused
        return Output(*predicted, missing, factor, conflict, summaries)

    def experts(self, output: Output) -> Tensor:
        """Logits of the predictions that are pooled, (B, E, Q)."""
        logits = dict(fused=output.logits, first=output.dir_logits, places=output.place_logits)
        if "modalities" in self.predictions:
            each, missing = output.modality_logits, output.missing
            std = output.typicality.sqrt().unsqueeze(2).expand_as(each)
            missing = missing & ~missing.all(1, keepdim=True)  # of nothing: the biases
            logits["modalities"] = self.decisions(each, std=std, missing=missing).logits
        return torch.stack([logits[name].float() for name in self.predictions], dim=1)

    def uncertainty(self, probs: Tensor, labels: Tensor | None, unknown: Tensor | None) -> Tensor:
        """The d of Eq. 8, which as printed needs the labels."""
        if self.gate == "oracle" and self.training and labels is not None:
            return mean_over_known(prediction_distance(probs, labels, unknown), unknown)
        if self.gate == "released":  # that code weighs the means by the first prediction itself
            return 1 - probs
        if self.gate == "constant":
            return torch.full_like(probs, 0.5)
        if self.gate in ("mean", "std"):  # one branch alone
            weighs = getattr(self.fusion, "mean_weight", "certainty")  # another part may have none
            certain = (self.gate == "mean") == (weighs == "certainty")
            return torch.full_like(probs, 0.0 if certain else 1.0)
        return expected_distance(probs)

    def details(self, output: Output) -> dict[str, Tensor]:
        """What explains a prediction; `foreign` is how likely a modality is to be of another sample."""
        return {
            "gate": output.fused.mean_weight,
            "std_norm": output.std_norm.masked_fill(output.missing.unsqueeze(2), torch.nan),
            "missing": output.missing,
            "typicality": output.typicality,
            "conflict": output.conflict / self.usual_conflict,
            "foreign": self.conflict(output.summaries, output.missing),
        }

    def observed(self, output: Output) -> dict[str, Tensor]:
        """What calibration needs of a validation."""
        return {**super().observed(output), "conflict": output.conflict}

    def calibrate(self, seen: Mapping[str, Tensor]) -> None:
        """Also learns how far modalities usually contradict each other, the unit of what is written."""
        super().calibrate(seen)
        compared = (seen["conflict"] > 0).sum(0).clamp_min(1)  # 0: fewer than two modalities
        self.usual_conflict.copy_((seen["conflict"].sum(0) / compared).clamp_min(1e-6))

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
        }
        costly = {"scl": self.contrastive_loss, "ocl": self.ordinality_loss}  # not at weight 0
        losses |= {n: loss(output, batch) for n, loss in costly.items() if self.weights[n]}
        losses["kl"] = output.latent.kl_to_standard_normal().mean()
        if output.place_logits is not None:
            losses["places"] = masked_bce(output.place_logits, target, unknown)
        total = torch.stack([self.weights[name] * loss for name, loss in losses.items()]).sum()
        return {**losses, "total": total}  # Eq. 16

    def contrastive_loss(self, output: Output, batch: MultimodalBatch) -> Tensor:
        """Eq. 4-7, of the first samples of a batch, in whatever order they come."""
        some = slice(self.scl_samples)
        latent, missing = DiagonalGaussian(*(x[some] for x in output.latent)), output.missing[some]
        unknown = None if batch.unknown is None else batch.unknown[some]
        return self.contrastive(latent, batch.labels[some], missing, unknown=unknown)

    def ordinality_loss(self, output: Output, batch: MultimodalBatch) -> Tensor:
        """Eq. 10-15: the standard deviations in the order of the errors; the tracker learns of the outcome."""
        labels, unknown, indices = batch.labels, batch.unknown, batch.indices
        unseen = self.tracker.counts(indices) == 0  # nothing to compare with yet
        history = self.tracker(indices)
        nothing = None if unknown is None else unknown.all(1)  # is known: it does not count
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
        scores = {"std_norm": torch.linalg.vector_norm(output.std_norm, dim=2)}  # Eq. 12
        scores |= {"distance": distance, "correctness": history, "mask": unseen | absent}
        scores = self.ordinality.gathered(**scores)  # once, for all that follow
        views = []
        if self.errors_of in ("both", "modality"):  # ranks among the samples, for each modality
            views += [scores]
        if self.errors_of in ("both", "pooled"):  # ranks among samples and modalities
            views += [{n: x.flatten() for n, x in scores.items()}]
        return torch.stack([self.ordinality(**x, joined=True) for x in views]).sum()

    # --- Training ----------------------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        """Learns what training features are like: statistics to standardise by, what is typical, and what agrees."""
        super().on_fit_start()
        data = self.trainer.datamodule
        for name, each in data.statistics().items():
            self.encoder[name].standardize(each.mean, each.std)
        self.conflict.fit(*self.typicality.fit_and_summarize(data.part("train")))

    def training_step(self, batch: MultimodalBatch, batch_idx: int) -> Tensor:
        """Eq. 16 of a batch."""
        output = self(batch.features, batch.padding_mask, batch.labels, batch.unknown)
        losses = self.losses(output, batch)
        self.log_losses(losses, batch)
        return losses["total"]

    def on_train_epoch_end(self) -> None:
        """Merges the histories of all processes."""
        self.tracker.synchronize()


def main(model: type[LDDU] = LDDU, arguments: list[str] | None = None) -> None:
    """Runs the command line for the model, or for a subclass of it with other parts."""
    run_command_line(model, Path(__file__).with_name("configs"), arguments)


if __name__ == "__main__":
    main()
