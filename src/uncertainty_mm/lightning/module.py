"""Training, calibration and evaluation of a multi-label model: :class:`MultilabelModule`."""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any, ClassVar, Literal

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import CatMetric

from uncertainty_mm._checks import check_finite
from uncertainty_mm._component import Component, states
from uncertainty_mm.calibration import (
    LogitPool,
    PlattScaling,
    best_threshold,
    expected_threshold,
)
from uncertainty_mm.data import MultimodalBatch, MultimodalDataset
from uncertainty_mm.lightning.checkpoints import UsageError, read_checkpoint
from uncertainty_mm.lightning.selection import OneStandardError, mean_by
from uncertainty_mm.metrics.functional import evaluate, predictive_entropy


class MultilabelModule(Component, L.LightningModule):
    """Training, calibration and evaluation of a multi-label model; a subclass brings the model.

    A subclass defines `forward(features, padding_mask)`, which returns an object with `logits` (B, Q), and
    `training_step`; :meth:`details` may add what explains a prediction. In every validation of a fit several
    predictions of one model (:meth:`experts`) are pooled, the logits calibrated and thresholds fitted, before their
    cross-entropy `val/nll` picks the checkpoint, the latest that is as good as the best one
    (:class:`~uncertainty_mm.lightning.OneStandardError`); `val/chosen` is the step it was picked at. All of that is
    state, saved with the model. Hyper-parameters are plain values, so a checkpoint loads without running code from it.

    Args:
        label_names: Names of the Q labels.
        lr: Peak learning rate of Adam, reached after the warm-up and followed by a cosine decay to 0.
        warmup: Share of the steps in which the learning rate rises.
        weight_decay: Decoupled weight decay.
        thresholds: One threshold for all labels (`"single"`), or one for each (`"label"`).
        soft_labels: Share of the soft labels in what the classifiers are trained towards, in [0, 1].

    Attributes:
        parts: Class attribute: what makes the parts of the model, by name; on a command line each part has its own
            options, :meth:`part` makes it.
        defaults: Class attribute: options of parts that differ from the defaults of their classes, by part.
        fixed: Class attribute: options of parts that the model itself sets, by part.
        axes: Class attribute: axes of what :meth:`details` returns, for :class:`PredictionWriter`.
        pool: The :class:`~uncertainty_mm.LogitPool` of the experts.
        calibration: The :class:`~uncertainty_mm.PlattScaling` of the pooled logits.
        threshold: Tensor (1,) or (Q,), for calibrated probabilities.
        raw_threshold: The same for probabilities that are not calibrated.
        by_modality: Whether a test also measures what is predicted from subsets of the modalities.
        results: What the latest validation or test measured: rows of the tables.
    """

    parts: ClassVar[Mapping[str, Callable[..., nn.Module]]] = {}
    defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    fixed: ClassVar[Mapping[str, Sequence[str]]] = {}
    axes: ClassVar[Mapping[str, Sequence[str]]] = {}
    threshold: Tensor
    raw_threshold: Tensor
    hparams: Any

    def __init__(
        self,
        label_names: list[str],
        *,
        lr: float = 5e-4,
        warmup: float = 0.1,
        weight_decay: float = 0.0,
        thresholds: Literal["single", "label"] = "single",
        soft_labels: float = 0.0,
    ) -> None:
        super().__init__()
        self._largest = 1.0
        self.save_hyperparameters()
        for name, value, ok, rule in (
            ("lr", lr, lr > 0, "above 0"),
            ("warmup", warmup, 0 <= warmup < 1, "in [0, 1)"),
            ("weight_decay", weight_decay, weight_decay >= 0, "at least 0"),
            ("soft_labels", soft_labels, 0 <= soft_labels <= 1, "in [0, 1]"),
        ):
            if not ok:
                raise ValueError(f"Expected `{name}` to be {rule}, but got {value}")
        self.pool = LogitPool(1, len(label_names))
        self.calibration = PlattScaling(len(label_names))
        size = 1 if thresholds == "single" else len(label_names)
        self._keep(threshold=torch.full((size,), 0.5), raw_threshold=torch.full((size,), 0.5))
        self.by_modality = True
        self.results: dict[str, Any] = {}
        self._selection = OneStandardError()
        self._seen: dict[str, CatMetric] = {}

    def part(self, name: str, options: Mapping[str, Any], *sizes: Any) -> Any:
        """A part of the model from its sizes and options; values are left to the :class:`FiniteGuard`."""
        known = inspect.signature(self.parts[name]).parameters
        defaults = {"validate_args": False, **self.defaults.get(name, {})}
        given = {key: x for key, x in defaults.items() if key in known} | dict(options)
        return self.parts[name](*sizes, **given)

    def experts(self, output: Any) -> Tensor:
        """Logits (B, E, Q) of the predictions that are pooled; a subclass with more than one replaces `pool`."""
        logits: Tensor = output.logits
        return logits.unsqueeze(1)

    def final_logits(self, output: Any) -> Tensor:
        """The final logits (B, Q), not yet calibrated."""
        logits: Tensor = self.pool(self.experts(output))
        return logits

    def details(self, output: Any) -> dict[str, Tensor]:
        """What explains a prediction, by name: (B, Q), (B, M) or (B, M, Q)."""
        return {}

    def on_fit_start(self) -> None:
        """Learns of the data how large soft labels are: shares of raters up to 1, intensities up to 3 in CMU-MOSEI."""
        if self.hparams["soft_labels"]:
            data: Any = self.trainer.datamodule  # type: ignore[attr-defined] # set by a connector
            soft_labels = data.part("train").soft_labels
            if soft_labels is None:
                raise UsageError("soft_labels: the training split has none")
            self._largest = max(1.0, float(soft_labels.nan_to_num(0).max()))  # NaN: not known

    def on_train_start(self) -> None:
        """Chooses the checkpoint anew, unless a training goes on."""
        if self.trainer.global_step == 0:
            self._selection = OneStandardError()

    def configure_optimizers(self) -> Any:
        """Adam with linear warm-up and cosine decay (appendix A.1 of the LDDU paper)."""
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
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def targets(self, batch: MultimodalBatch) -> Tensor:
        """What the classifiers are trained towards: the labels, or soft labels in [0, 1], or between the two."""
        target, share = batch.labels.float(), self.hparams["soft_labels"]
        if share and batch.soft_labels is not None:
            target = target.lerp(batch.soft_labels / self._largest, share)
        return target if batch.unknown is None else target.masked_fill(batch.unknown, 0)

    def log_losses(self, losses: Mapping[str, Tensor], batch: MultimodalBatch) -> None:
        """Logs the mean of every loss over an epoch, without batches in which one is not finite."""
        finite = torch.stack([loss.detach().isfinite() for loss in losses.values()]).all()
        weight: Any = finite * len(batch.labels)  # a tensor: nobody waits for the device
        self.log_dict(
            {f"loss/{name}": loss.detach().nan_to_num(0, 0, 0) for name, loss in losses.items()},
            on_step=False,
            on_epoch=True,
            prog_bar=True,
            batch_size=weight,
            sync_dist=True,
        )

    def validation_step(self, batch: MultimodalBatch, batch_idx: int) -> None:
        """Collects the logits of a batch."""
        output = self(batch.features, batch.padding_mask)
        unknown = torch.zeros_like(batch.labels) if batch.unknown is None else batch.unknown
        seen = {**self.observed(output), "labels": batch.labels, "unknown": unknown}
        seen["indices"] = batch.indices
        for key, value in seen.items():
            self._seen.setdefault(key, CatMetric(nan_strategy="disable"))
            self._seen[key].to(value.device).update(value.float())
        loss = masked_bce(output.logits, batch.labels.float(), batch.unknown)
        self.log("val/cls", loss, prog_bar=True, batch_size=len(output.logits), sync_dist=True)

    def observed(self, output: Any) -> dict[str, Tensor]:
        """What a validation collects for :meth:`calibrate`, each (B, ...)."""
        return {"logits": self.experts(output)}

    def calibrate(self, seen: Mapping[str, Tensor]) -> None:
        """Fits what belongs to a validation split: the pool, the calibration, the thresholds.

        Args:
            seen: What was :meth:`observed`, with `labels`, `unknown` and `indices`, of all samples.
        """
        labels, unknown = seen["labels"], seen["unknown"] > 0.5
        groups = self._groups_of(seen)
        logits = self.pool.fit(seen["logits"], labels, unknown, groups=groups)(seen["logits"])
        self.calibration.fit(logits, labels, unknown, groups=groups)
        per_label = self.hparams["thresholds"] == "label"
        probs = self.calibration(logits).sigmoid()
        self.threshold.copy_(expected_threshold(probs, unknown, per_label=per_label))
        raw = best_threshold(logits.sigmoid(), labels, unknown, per_label=per_label)
        self.raw_threshold.copy_(raw)

    def _groups_of(self, seen: Mapping[str, Tensor]) -> Tensor | None:
        """Groups of the samples of a validation (N,), if its data set, anybody's, has some."""
        data = getattr(self.trainer.val_dataloaders, "dataset", None)
        groups: Tensor | None = getattr(data, "groups", None)
        if groups is None:
            return None
        return groups.to(seen["indices"].device)[seen["indices"].long()]

    def on_validation_epoch_end(self) -> None:
        """Calibrates, during a fit; then measures."""
        seen = {key: metric.compute() for key, metric in self._seen.items()}  # of all processes
        for metric in self._seen.values():
            metric.reset()
        if self.trainer.state.fn == "fit":
            self.calibrate(seen)
        labels, unknown = seen["labels"], seen["unknown"] > 0.5
        calibrated = self.calibration(self.pool(seen["logits"]))
        row = evaluate(calibrated.sigmoid(), labels, self.threshold, unknown)
        self.results = {"validation": row}
        # It picks the checkpoint: a mean over all labels, which says more than counts of those on the right side.
        target = labels.masked_fill(unknown, 0)
        each = F.binary_cross_entropy_with_logits(calibrated.float(), target, reduction="none")
        each = each.nan_to_num(torch.inf, torch.inf)  # a prediction of NaN is not an unknown label
        losses = each.masked_fill(unknown, torch.nan).nanmean(1)
        order, groups = seen["indices"].argsort(stable=True), self._groups_of(seen)
        losses = mean_by(None if groups is None else groups[order], losses[order])
        self.log("val/nll", losses.mean() if len(losses) else 0.0, prog_bar=True)
        if self.trainer.state.fn == "fit" and not self.trainer.sanity_checking:
            chosen = self._selection.update(self.trainer.global_step, losses)
            self.log("val/chosen", float(chosen))
        self.log("val/miF1", row["miF1"] or 0.0, prog_bar=True)

    def on_test_start(self) -> None:
        """Chooses the subsets of modalities to test with: all of them, or the telling ones where they are many."""
        names = list(self.hparams["modality_dims"])
        self._subsets = dict.fromkeys(subsets(names) if self.by_modality else ())
        self._answers: list[dict[str, Tensor]] = []

    def test_step(self, batch: MultimodalBatch, batch_idx: int) -> None:
        """Predicts a batch with every subset of its modalities."""
        answer = self.predict_step(batch, batch_idx)
        for kept in self._subsets:
            padding = {
                name: mask if name in kept else torch.ones_like(mask)
                for name, mask in batch.padding_mask.items()
            }
            logits = self.final_logits(self(batch.features, padding))
            answer["subset." + "+".join(kept)] = self.calibration(logits).sigmoid()
        unknown = torch.zeros_like(answer["probs"]) if batch.unknown is None else batch.unknown
        answer |= {"labels": batch.labels, "unknown": unknown.bool()}
        self._answers.append({key: value.cpu() for key, value in answer.items()})

    def on_test_epoch_end(self) -> None:
        """Measures: calibrated, not calibrated, and by the modalities that are there."""
        answers = {
            key: torch.cat([each[key] for each in self._answers]) for key in self._answers[0]
        }
        labels, unknown = answers["labels"], answers["unknown"]
        threshold, raw_threshold = self.threshold.cpu(), self.raw_threshold.cpu()
        rows = {}
        for kept in self._subsets:
            probs = answers.pop("subset." + "+".join(kept))
            row = evaluate(probs, labels, threshold, unknown)
            row["uncertainty"] = round(float(predictive_entropy(probs).mean()), 4)
            rows[" + ".join(kept) or "none"] = row
        self.answers = answers
        self.results = {
            "test": evaluate(answers["probs"], labels, threshold, unknown),
            "uncalibrated": evaluate(answers["uncalibrated"], labels, raw_threshold, unknown),
        } | ({"modalities": rows} if rows else {})
        self.log_dict(
            {f"test/{name}": x for name, x in self.results["test"].items() if x is not None}
        )

    def predict_step(self, batch: MultimodalBatch, batch_idx: int) -> dict[str, Tensor]:
        """Probabilities, calibrated and not, and what explains them."""
        output = self(batch.features, batch.padding_mask)
        logits = self.final_logits(output)
        probs = self.calibration(logits).sigmoid()
        return {
            "probs": probs,
            "uncalibrated": logits.sigmoid(),
            "uncertainty": predictive_entropy(probs).to(probs.dtype),
            **self.details(output),
        }

    @torch.no_grad()
    def ask(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the model says of one sample.

        Args:
            features: (S_m, D_m) by modality, finite; a modality that the sample lacks is left out or has no step.

        Returns:
            `probs` and `predicted` (Q,), `uncertainty` (), and the details of the model, each without the axis B.

        Raises:
            ValueError: If a modality is not known, a shape is wrong, or a value is not finite.
        """
        dims, longest = self.hparams["modality_dims"], self.hparams["max_steps"]
        if unknown := sorted(set(features) - set(dims)):
            raise ValueError(f"Expected `features` to hold some of {list(dims)}, but got {unknown}")
        batch: dict[str, Tensor] = {}
        padding: dict[str, Tensor] = {}
        for name, dim in dims.items():
            x = torch.as_tensor(features.get(name, torch.empty(0, dim)))
            if x.dim() != 2 or x.shape[1] != dim or len(x) > longest[name]:
                raise ValueError(
                    f"Expected `features[{name!r}]` to have shape (S, {dim}) with S at most {longest[name]}, "
                    f"but got {tuple(x.shape)}"
                )
            there = len(x) > 0
            x = (x if there else torch.zeros(1, dim)).to(self.threshold)
            # in the dtype of the model, which may have less range
            check_finite(f"features[{name!r}]", x)
            batch[name] = x.unsqueeze(0)
            padding[name] = torch.full((1, len(x)), not there, device=self.threshold.device)
        training = _in_training(self)
        for part in training:
            part.training = False
        empty = MultimodalBatch(batch, padding, torch.zeros(1, 0), torch.zeros(1).long())
        answer = self.predict_step(empty, 0)
        for part in training:
            part.training = True
        answer["predicted"] = answer["probs"] > self.threshold
        return {key: value[0] for key, value in answer.items()}

    @torch.no_grad()
    def predict(self, data: MultimodalDataset, batch_size: int = 256) -> dict[str, Tensor]:
        """What :meth:`predict_step` says of all samples of a data set, on the CPU."""
        self.eval()
        answers = [self.predict_step(batch.to(self.device), 0) for batch in data.loader(batch_size)]
        return {key: torch.cat([each[key] for each in answers]).cpu() for key in answers[0]}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Saves the state of this module also where a callback saves averaged weights in its place."""
        checkpoint["state_dict"] |= states(self)
        checkpoint["selection"] = self._selection.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Goes on with the choice of the checkpoint."""
        if "selection" in checkpoint:
            self._selection.load_state_dict(checkpoint["selection"])

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> MultilabelModule:
        """The model of a checkpoint, on the CPU, ready to predict; runs no code from the file.

        Raises:
            UsageError: If the file is no checkpoint, is damaged, or is of another model or version.
        """
        content = read_checkpoint(path)
        try:  # not `load_from_checkpoint`, which calls what the hyper-parameter `_instantiator` names
            module = cls(**content["hyper_parameters"])
            module.load_state_dict(content["state_dict"])
        except Exception as error:  # whatever foreign hyper-parameters bring about
            reason = " ".join(str(error).split())
            raise UsageError(f"{path}: of another model or version ({reason})") from error
        return module.eval()


def _in_training(module: nn.Module) -> list[nn.Module]:
    """The parts, the module included, in training mode; `modules()` takes as long as a layer of the model."""
    found, parts = [], [module]
    while parts:
        part = parts.pop()
        parts += [each for each in part._modules.values() if each is not None]
        if part.training:
            found.append(part)
    return found


def masked_bce(logits: Tensor, target: Tensor, unknown: Tensor | None = None) -> Tensor:
    """Binary cross-entropy, mean over the labels that are known; 0 if none is.

    Args:
        logits: Tensor (B, Q).
        target: Tensor (B, Q) in [0, 1].
        unknown: Bool tensor (B, Q), True leaves the label out.
    """
    if unknown is not None:
        target = target.masked_fill(unknown, 0)
    loss = F.binary_cross_entropy_with_logits(logits.float(), target, reduction="none")
    return masked_mean(loss, unknown)


def masked_mean(x: Tensor, unknown: Tensor | None) -> Tensor:
    """Mean of what is known, a scalar; 0 with zero gradient if nothing is."""
    if unknown is None:
        return x.mean()
    return x.masked_fill(unknown, 0).sum() / (~unknown).sum().clamp_min(1)


def mean_over_known(x: Tensor, unknown: Tensor | None) -> Tensor:
    """Mean over the labels, the last axis, that are known; 0 where none is."""
    if unknown is None:
        return x.mean(-1)
    return x.masked_fill(unknown, 0).sum(-1) / (~unknown).sum(-1).clamp_min(1)


def subsets(names: Sequence[str]) -> list[tuple[str, ...]]:
    """All subsets of up to four modalities, from all to none; of more: all, one left out, one alone, none."""
    if len(names) <= 4:
        chosen = product((True, False), repeat=len(names))
        return [tuple(n for n, here in zip(names, each, strict=True) if here) for each in chosen]
    left_out = [tuple(other for other in names if other != name) for name in names]
    return [tuple(names), *left_out, *((name,) for name in names), ()]
