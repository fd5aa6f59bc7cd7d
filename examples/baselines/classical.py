"""Methods of scikit-learn, which see mean and standard deviation of every modality over its steps."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import joblib
import numpy as np
import torch
from sklearn.base import ClassifierMixin, clone
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.multioutput import ClassifierChain
from torch import Tensor

from uncertainty_mm._files import replacing
from uncertainty_mm.calibration import expected_threshold
from uncertainty_mm.data import MultimodalDataset
from uncertainty_mm.examples.baselines.networks import PooledMLP
from uncertainty_mm.lightning import PredictionWriter
from uncertainty_mm.lightning.cli import ModelCLI, quiet
from uncertainty_mm.lightning.selection import losses_of
from uncertainty_mm.metrics.functional import evaluate, predictive_entropy

FILE = "model.joblib"
# Features (N, F) -> probabilities (N, Q); made of functions of this module, so that it can be saved.
Predict = Callable[[np.ndarray], np.ndarray]

# All methods take features (N, F) and labels (N, Q), NaN where a label is not known.


def prior(model: None, x: np.ndarray, y: np.ndarray) -> Predict:
    """How frequent each label is."""
    return partial(_the_same, np.nanmean(y, 0))


def _the_same(probs: np.ndarray, new: np.ndarray) -> np.ndarray:
    return np.tile(probs, (len(new), 1))


def binary_relevance(model: ClassifierMixin, x: np.ndarray, y: np.ndarray) -> Predict:
    """Every label by itself, from the samples of which it is known."""
    known = ~np.isnan(y).T
    fitted = [
        clone(model).fit(x[here], column[here]) for column, here in zip(y.T, known, strict=True)
    ]
    return partial(_each_label, fitted)


def _each_label(fitted: Sequence[ClassifierMixin], new: np.ndarray) -> np.ndarray:
    return np.column_stack([each.predict_proba(new)[:, 1] for each in fitted])


def classifier_chain(model: ClassifierMixin, x: np.ndarray, y: np.ndarray) -> Predict:
    """Every label with those before it in a random order as features (Read et al. 2011)."""
    whole = ~np.isnan(y).any(1)
    chain = ClassifierChain(model, order="random", random_state=model.random_state)
    return chain.fit(x[whole], y[whole]).predict_proba


def label_powerset(model: ClassifierMixin, x: np.ndarray, y: np.ndarray) -> Predict:
    """Every set of labels seen in training as a class; a label has the probability of the sets with it."""
    whole = ~np.isnan(y).any(1)
    sets, index = np.unique(y[whole], axis=0, return_inverse=True)
    fitted = clone(model).fit(x[whole], index.reshape(-1))
    return partial(_members, fitted, sets)


def _members(fitted: ClassifierMixin, sets: np.ndarray, new: np.ndarray) -> np.ndarray:
    return fitted.predict_proba(new) @ sets


def logistic(seed: int) -> list[ClassifierMixin]:
    """Logistic regressions to choose from."""
    return [
        LogisticRegression(C=c, max_iter=2000, random_state=seed) for c in (0.001, 0.01, 0.1, 1.0)
    ]


def boosted_trees(seed: int) -> list[ClassifierMixin]:
    """Boosted trees to choose from."""
    return [
        HistGradientBoostingClassifier(learning_rate=rate, random_state=seed)
        for rate in (0.01, 0.03, 0.1)
    ]


METHODS: Mapping[str, tuple[Callable[..., Predict], Callable[[int], Sequence[Any]]]] = {
    "prior": (prior, lambda seed: [None]),
    "br-logistic": (binary_relevance, logistic),
    "lp-logistic": (label_powerset, logistic),
    "cc-logistic": (classifier_chain, logistic),
    "br-trees": (binary_relevance, boosted_trees),
}


def known_labels(data: MultimodalDataset) -> np.ndarray:
    """Labels (N, Q), NaN where they are not known."""
    labels = data.labels.double()
    return (
        labels.numpy()
        if data.unknown is None
        else labels.masked_fill(data.unknown, torch.nan).numpy()
    )


class Fitted(NamedTuple):
    """A method after its fit, which answers as the networks do."""

    network: PooledMLP  # pools the features and calibrates
    share: np.ndarray  # (Q,) of the training samples that have a label
    varies: np.ndarray  # (Q,) bool, the labels that can be learned; the others have their share
    method: Predict | None

    @property
    def threshold(self) -> Tensor:
        """For calibrated probabilities, (1,) or (Q,)."""
        return self.network.threshold

    def logits(self, x: Tensor) -> Tensor:
        """Of pooled features (N, F), before calibration, (N, Q)."""
        probs = np.tile(self.share, (len(x), 1))
        if self.method:
            probs[:, self.varies] = self.method(x.numpy())
        return torch.from_numpy(probs).clamp(1e-6, 1 - 1e-6).logit().float()

    def calibrate(self, x: Tensor, validation: MultimodalDataset) -> float:
        """Fits calibration and thresholds to pooled features of the validation split; returns the loss there."""
        found, known = self.logits(x), (validation.labels, validation.unknown)
        calibration, groups = self.network.calibration, validation.groups
        calibrated = calibration.fit(found, *known, groups=groups)(found)
        per_label = self.network.hparams["thresholds"] == "label"
        probs = calibrated.sigmoid()
        self.threshold.copy_(expected_threshold(probs, validation.unknown, per_label=per_label))
        return losses_of(calibrated, *known, groups).mean().item()

    def predict(self, data: MultimodalDataset, batch_size: int = 256) -> dict[str, Tensor]:
        """Probabilities, calibrated and not, and their entropy."""
        found = self.logits(self.network.pooled(data, batch_size))
        probs = self.network.calibration(found).sigmoid()
        answers = {"probs": probs, "uncalibrated": found.sigmoid()}
        return answers | {"uncertainty": predictive_entropy(probs)}

    def save(self, folder: Path) -> None:
        """Writes the method into the folder of a run."""
        with replacing(folder / FILE) as partial_file:
            joblib.dump(self, partial_file, compress=3)

    @staticmethod
    def load(folder: Path) -> Fitted:
        """What :meth:`save` wrote. Models of scikit-learn are pickles, which can run code: only read your own."""
        return joblib.load(folder / FILE)


def fit(name: str, configs: Path, options: Sequence[str], folder: Path) -> dict[str, float | None]:
    """Fits a method; of several models the one of the least calibrated cross-entropy in validation counts.

    Options are those of the network on the same features, which so reads the same data, standardises them, and has the
    calibration and the thresholds of all networks.

    Returns:
        What it reaches on the test split; its predictions are in `folder`, and so is the method itself.
    """
    quiet()
    cli = ModelCLI(PooledMLP, configs, [*options, "--trainer.fast_dev_run", "true"])
    data, network, seed = cli.datamodule, cli.model, cli.options.seed_everything
    train, validation, test = (data.part(split) for split in ("train", "validation", "test"))
    for modality, each in data.statistics().items():
        network.encoder[modality].standardize(each.mean, each.std)
    network.standardize(train)
    x, x_validation = network.pooled(train).numpy(), network.pooled(validation)
    y = known_labels(train)
    share = np.nan_to_num(np.nanmean(y, 0), nan=0.5)
    varies = (share > 0) & (share < 1)
    method, models = METHODS[name]
    best = np.inf
    for model in models(seed):
        predict = method(model, x, y[:, varies]) if varies.any() else None
        fitted = Fitted(copy.deepcopy(network), share, varies, predict)
        loss = fitted.calibrate(x_validation, validation)
        print(f"{model}: validation cross-entropy {loss:.4f}")
        if loss < best:
            best, chosen = loss, fitted
    folder.mkdir(parents=True, exist_ok=True)
    chosen.save(folder)
    answers = chosen.predict(test)
    PredictionWriter(folder / "predictions.npz").write(answers, test, chosen.threshold)
    return evaluate(answers["probs"], test.labels, chosen.threshold, test.unknown)
