"""Training, calibration and evaluation of a multi-label model: :class:`MultilabelModule`."""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import product
from typing import Any, ClassVar, Literal

import lightning as L
import torch
from lightning.pytorch.utilities import CombinedLoader, rank_zero_warn
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import ConcatDataset, Subset
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

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
from uncertainty_mm.lightning.selection import OneStandardError, losses_of
from uncertainty_mm.metrics.functional import evaluate, predictive_entropy


class MultilabelModule(Component, L.LightningModule):
    """Trains, calibrates and evaluates a multi-label model, which a subclass defines.

    A subclass defines `forward(features, padding_mask)`, which returns an object with `logits` (B, Q), and
    `training_step`; :meth:`details` may add explanations of a prediction. In every validation of a fit, the predictions
    of the model (:meth:`experts`) are pooled, their logits are calibrated, and thresholds are fitted. Then the
    cross-entropy `val/nll` selects the checkpoint, the latest that is as good as the best one
    (:class:`~uncertainty_mm.lightning.OneStandardError`); `val/chosen` is its step. All of this is state, saved with
    the model. Hyper-parameters are plain values, so a checkpoint loads without running code from it.

    Args:
        label_names: Names of the Q labels.
        lr: Peak learning rate of Adam, reached after the warm-up and followed by a cosine decay to 0.
        warmup: Share of the steps in which the learning rate rises.
        weight_decay: Decoupled weight decay.
        thresholds: One threshold for all labels (`"single"`), or one for each (`"label"`).
        soft_labels: Share of the soft labels in the targets of the classifiers, in [0, 1].

    Attributes:
        parts: Class attribute: the classes or functions that make the parts of the model, by name; on a command line
            each part has its own options, and :meth:`part` makes it.
        defaults: Class attribute: options of parts that differ from the defaults of their classes, by part.
        fixed: Class attribute: options of parts that the model itself sets, by part.
        axes: Class attribute: axes of the results of :meth:`details`, for :class:`PredictionWriter`.
        pool: The :class:`~uncertainty_mm.LogitPool` of the experts.
        calibration: The :class:`~uncertainty_mm.PlattScaling` of the pooled logits.
        threshold: Tensor (1,) or (Q,), for calibrated probabilities.
        raw_threshold: The same for probabilities that are not calibrated.
        by_modality: Whether a test also measures predictions from subsets of the modalities.
        results: Measures of the latest validation or test, as rows of tables.
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
        try:
            self.save_hyperparameters()
        except TypeError as error:  # from a copy
            raise TypeError(
                f"Expected the arguments of {type(self).__name__} to be values that are saved with it, such as the "
                f"name of a process group instead of the group, but got one that cannot be copied: {error}"
            ) from None
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
        self._seen: dict[str, _Kept] = {}
        self._told = False  # that groups of several data sets are not used

    def part(self, name: str, options: Mapping[str, Any], *sizes: Any) -> Any:
        """Makes a part of the model from its sizes and options; the :class:`FiniteGuard` checks values instead."""
        known = inspect.signature(self.parts[name]).parameters
        defaults = {"validate_args": False, **self.defaults.get(name, {})}
        given = {key: x for key, x in defaults.items() if key in known} | dict(options)
        return self.parts[name](*sizes, **given)

    def experts(self, output: Any) -> Tensor:
        """Logits (B, E, Q) of the predictions to pool; a subclass with more than one replaces `pool`."""
        logits: Tensor = output.logits
        return logits.unsqueeze(1)

    def final_logits(self, output: Any) -> Tensor:
        """The final logits (B, Q), not yet calibrated."""
        logits: Tensor = self.pool(self.experts(output))
        return logits

    def details(self, output: Any) -> dict[str, Tensor]:
        """Explanations of a prediction by name, each (B, Q), (B, M) or (B, M, Q)."""
        return {}

    def on_fit_start(self) -> None:
        """Finds the largest soft label of the data: shares of raters go up to 1, intensities in CMU-MOSEI up to 3."""
        if self.hparams["soft_labels"]:
            data: Any = self.trainer.datamodule  # type: ignore[attr-defined] # set by a connector
            soft_labels = data.part("train").soft_labels
            if soft_labels is None:
                raise UsageError("soft_labels: the training split has none")
            self._largest = max(1.0, float(soft_labels.nan_to_num(0).max()))  # NaN: not known

    def on_train_start(self) -> None:
        """Resets the choice of the checkpoint, unless a training is resumed."""
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
        """Targets of the classifiers: the labels, soft labels in [0, 1], or values between the two."""
        target, share = batch.labels.float(), self.hparams["soft_labels"]
        if share and batch.soft_labels is not None:
            target = target.lerp(batch.soft_labels / self._largest, share)
        return target if batch.unknown is None else target.masked_fill(batch.unknown, 0)

    def log_losses(self, losses: Mapping[str, Tensor], batch: MultimodalBatch) -> None:
        """Logs the mean of every loss over an epoch, except for batches where one is not finite."""
        finite = torch.stack([loss.detach().isfinite() for loss in losses.values()]).all()
        weight: Any = finite * len(batch.labels)  # a tensor, so that the host does not wait
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
        seen = {key: value.float() for key, value in seen.items()} | {"indices": batch.indices}
        for key, value in seen.items():
            self._seen.setdefault(key, _Kept()).to(value.device).update(value)
        loss = masked_bce(output.logits, batch.labels.float(), batch.unknown)
        self.log("val/cls", loss, prog_bar=True, batch_size=len(output.logits), sync_dist=True)

    def observed(self, output: Any) -> dict[str, Tensor]:
        """Tensors (B, ...) that a validation collects for :meth:`calibrate`."""
        return {"logits": self.experts(output)}

    def calibrate(self, seen: Mapping[str, Tensor]) -> None:
        """Fits the pool, the calibration and the thresholds to a validation split.

        Args:
            seen: The :meth:`observed` tensors of all samples, with `labels`, `unknown` and `indices`.
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
        """Groups of the samples of a validation (N,), if its data set, anybody's, has some.

        Indices are positions in one data set: of several, nobody knows which group they mean.
        """
        loaders = CombinedLoader(self.trainer.val_dataloaders, "sequential").flattened
        data = [getattr(loader, "dataset", None) for loader in loaders]
        while any(isinstance(x, (Subset, ConcatDataset)) for x in data):
            data = [part for x in data for part in _parts(x)]
        of_each = [getattr(x, "groups", None) for x in data]
        if all(groups is None for groups in of_each):
            return None
        if any(groups is not of_each[0] for groups in of_each):
            if not self._told:
                rank_zero_warn(
                    "Expected one data set in validation, whose `groups` the calibration counts as one sample each, "
                    f"but got {len(data)}: every sample counts for itself"
                )
            self._told = True
            return None
        groups = torch.as_tensor(of_each[0], device=seen["indices"].device)
        return groups[seen["indices"]]

    def on_validation_epoch_end(self) -> None:
        """Calibrates, if in a fit, and then measures."""
        seen = {key: metric.compute() for key, metric in self._seen.items()}  # of all processes
        for metric in self._seen.values():
            metric.reset()
        if self.trainer.state.fn == "fit":
            self.calibrate(seen)
        labels, unknown = seen["labels"], seen["unknown"] > 0.5
        calibrated = self.calibration(self.pool(seen["logits"]))
        row = evaluate(calibrated.sigmoid(), labels, self.threshold, unknown)
        self.results = {"validation": row}
        order, groups = seen["indices"].argsort(stable=True), self._groups_of(seen)
        groups = None if groups is None else groups[order]
        losses = losses_of(calibrated[order], labels[order], unknown[order], groups)
        self.log("val/nll", losses.mean() if len(losses) else 0.0, prog_bar=True)
        if self.trainer.state.fn == "fit" and not self.trainer.sanity_checking:
            chosen = self._selection.update(self.trainer.global_step, losses)
            self.log("val/chosen", float(chosen))
        self.log("val/miF1", row["miF1"] or 0.0, prog_bar=True)

    def on_test_start(self) -> None:
        """Chooses the subsets of modalities to test: all of them, or a selection if there are many."""
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
        """Measures with and without calibration, and for subsets of the modalities."""
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
        """Predicts probabilities, calibrated and not, with their explanations."""
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
        """Predicts one sample.

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
        empty = MultimodalBatch(batch, padding, torch.zeros(1, 0), torch.zeros(1).long())
        with _evaluating(self):
            answer = self.predict_step(empty, 0)
        answer["predicted"] = answer["probs"] > self.threshold
        return {key: value[0] for key, value in answer.items()}

    @torch.no_grad()
    def predict(self, data: MultimodalDataset, batch_size: int = 256) -> dict[str, Tensor]:
        """What :meth:`predict_step` says of all samples of a data set, on the CPU."""
        batches = data.loader(batch_size)
        with _evaluating(self):
            answers = [self.predict_step(batch.to(self.device), 0) for batch in batches]
        return {key: torch.cat([each[key] for each in answers]).cpu() for key in answers[0]}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Saves the state of this module even if a callback saves averaged weights instead of it."""
        checkpoint["state_dict"] |= states(self)
        checkpoint["selection"] = self._selection.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restores the choice of the checkpoint."""
        if "selection" in checkpoint:
            self._selection.load_state_dict(checkpoint["selection"])

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> MultilabelModule:
        """Loads the model of a checkpoint on the CPU, ready to predict, without running code from the file.

        Raises:
            UsageError: If the file is not a checkpoint, is damaged, or is from another model or version.
        """
        content = read_checkpoint(path)
        try:  # not `load_from_checkpoint`, which calls what the hyper-parameter `_instantiator` names
            module = cls(**content["hyper_parameters"])
            module.load_state_dict(content["state_dict"])
        except Exception as error:  # foreign hyper-parameters may raise anything
            reason = " ".join(str(error).split())
            raise UsageError(f"{path}: of another model or version ({reason})") from error
        return module.eval()


class _Kept(Metric):
    """All values of all batches and processes, in their own dtype: indices do not fit into a float."""

    values: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("values", [], dist_reduce_fx="cat")

    def update(self, values: Tensor) -> None:
        """Adds those of a batch."""
        if len(values):
            self.values.append(values)

    def compute(self) -> Tensor:
        """All of them, in one tensor."""
        return dim_zero_cat(self.values)


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Within it all parts are in evaluation mode; afterwards, whatever happens, each is in the mode that it was in."""
    training, parts = [], [module]  # `modules()` takes as long as a layer of the model
    while parts:
        part = parts.pop()
        parts += [each for each in part._modules.values() if each is not None]
        if part.training:
            training.append(part)
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True


def _parts(data: Any) -> Sequence[Any]:
    """The data sets that a subset is of, or that were joined; else the data set itself."""
    if isinstance(data, Subset):
        return [data.dataset]
    return data.datasets if isinstance(data, ConcatDataset) else [data]


def masked_bce(logits: Tensor, target: Tensor, unknown: Tensor | None = None) -> Tensor:
    """Mean binary cross-entropy over the known labels; 0 if none is known.

    Args:
        logits: Tensor (B, Q).
        target: Tensor (B, Q) in [0, 1].
        unknown: Bool tensor (B, Q), True to leave the label out.
    """
    if unknown is not None:
        target = target.masked_fill(unknown, 0)
    loss = F.binary_cross_entropy_with_logits(logits.float(), target, reduction="none")
    return masked_mean(loss, unknown)


def masked_mean(x: Tensor, unknown: Tensor | None) -> Tensor:
    """Mean over the known entries, a scalar; 0 with zero gradient if none is known."""
    if unknown is None:
        return x.mean()
    return x.masked_fill(unknown, 0).sum() / (~unknown).sum().clamp_min(1)


def mean_over_known(x: Tensor, unknown: Tensor | None) -> Tensor:
    """Mean over the known labels on the last axis; 0 where none is known."""
    if unknown is None:
        return x.mean(-1)
    return x.masked_fill(unknown, 0).sum(-1) / (~unknown).sum(-1).clamp_min(1)


def subsets(names: Sequence[str]) -> list[tuple[str, ...]]:
    """All subsets of up to four modalities, from all to none; of more, those of all, all but one, one, and none."""
    if len(names) <= 4:
        chosen = product((True, False), repeat=len(names))
        return [tuple(n for n, here in zip(names, each, strict=True) if here) for each in chosen]
    left_out = [tuple(other for other in names if other != name) for name in names]
    return [tuple(names), *left_out, *((name,) for name in names), ()]
