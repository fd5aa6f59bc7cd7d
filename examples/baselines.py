r"""Is LDDU better than what is simpler? Other methods on the same data, with the same measures.

    python examples/baselines.py --data FILE.npz FILE.npz                      # all methods, five seeds
    python examples/baselines.py --data FILE.npz --arms LDDU "late fusion" --seeds 0 1 2

All networks share the encoders, the training, the choice of the checkpoint, the calibration and the thresholds of
`lddu_full.py`; `--options` holds for all of them. The classical methods (scikit-learn) see mean and standard deviation
of every modality over its steps, are chosen, calibrated and given thresholds on the validation split too. Nothing sees
the test split before its evaluation. A finished run is not repeated (`sweep.py`).

It writes every run (`runs.json`, `runs.csv`), and in `baselines.md` mean and standard deviation over seeds as well as
how far LDDU is ahead of each method, with paired bootstrap intervals.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations, permutations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.base import ClassifierMixin, clone
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.multioutput import ClassifierChain
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from uncertainty_mm import PlattScaling
from uncertainty_mm.data import MultimodalDataset

try:
    from . import lddu_full
    from .sweep import Row, Run, add_arguments, check_arguments, slug, sweep, table
except ImportError:  # run as a script
    import lddu_full  # type: ignore[no-redef]
    from sweep import Row, Run, add_arguments, check_arguments, slug, sweep, table  # type: ignore[no-redef]

Vectors = Sequence[Tensor]  # by modality
COLUMNS = ("Acc", "P", "R", "miF1", "mAP", "Brier", "ECE")

# --- Networks --------------------------------------------------------------------------------------------------------


class Output(NamedTuple):
    """What a network says of a batch."""

    logits: Tensor  # (B, Q)
    auxiliary: Mapping[str, Tensor]  # weighted losses beside the cross-entropy

    @property
    def details(self) -> dict[str, Tensor]:
        """Nothing explains the prediction."""
        return {}


class Sizes(NamedTuple):
    """What the part of a network behind its encoders is built from."""

    modalities: int
    labels: int
    dim: int
    heads: int
    dropout: float


def mean_over_steps(x: Tensor, padding: Tensor) -> Tensor:
    """Mean of the valid steps, (B, S, D) -> (B, D); 0 where there is none."""
    padding = padding.unsqueeze(2)
    return x.masked_fill(padding, 0).sum(1) / (~padding).sum(1).clamp_min(1)


def mlp(in_dim: int, hidden_dim: int, out_dim: int, dropout: float) -> nn.Sequential:
    """One hidden layer."""
    return nn.Sequential(
        nn.Linear(in_dim, hidden_dim),
        nn.GELU(),
        nn.Dropout(dropout),
        nn.Linear(hidden_dim, out_dim),
    )


class Transformer(nn.Module):
    """A Transformer layer over vectors (B, S, D), of which some are missing; these become 0."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.layer = lddu_full.EncoderLayer(dim, heads, dropout)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        steps = lddu_full.Steps(padding)
        mask = ~padding | padding.all(dim=1, keepdim=True)
        x = self.norm(self.layer(steps.pack(x), steps, mask[:, None, None]))
        return steps.unpack(x).masked_fill(padding.unsqueeze(2), 0)


class Baseline(nn.Module):
    """What the networks share: the encoders of LDDU in front, binary cross-entropy behind.

    A network adds its layers in `build` and joins the modalities in `fuse`.
    """

    def __init__(
        self,
        modality_dims: Mapping[str, int],
        max_steps: Mapping[str, int],
        num_labels: int,
        num_train_samples: int,
        *,
        hidden_dim: int,
        layers: int,
        heads: int,
        dropout: float,
        size: str,
        **unused: Any,  # options of LDDU alone
    ) -> None:
        super().__init__()
        self.encoders = nn.ModuleDict(
            {
                name: self.encoder(dim, max_steps[name], hidden_dim, layers, heads, dropout, size)
                for name, dim in modality_dims.items()
            }
        )
        self.build(Sizes(len(modality_dims), num_labels, hidden_dim, heads, dropout))

    def encoder(self, *sizes: Any) -> nn.Module:
        """The encoder of one modality, (B, S, D_m) -> (B, S, D)."""
        return lddu_full.SequenceEncoder(*sizes)

    def build(self, sizes: Sizes) -> None:
        """Adds the layers behind the encoders."""
        raise NotImplementedError

    def fuse(self, encoded: Vectors, padding: Vectors) -> Tensor | Output:
        """Logits (B, Q) from what the encoders say, (B, S_m, D) by modality, and the padding (B, S_m)."""
        raise NotImplementedError

    def forward(
        self,
        features: Mapping[str, Tensor],
        padding: Mapping[str, Tensor],
        labels: Tensor | None = None,
    ) -> Output:
        masks = [padding[name] for name in self.encoders]
        encoded = [
            encoder(features[name], padding[name]) for name, encoder in self.encoders.items()
        ]
        fused = self.fuse(encoded, masks)
        return fused if isinstance(fused, Output) else Output(fused, {})

    def losses(
        self, output: Output, labels: Tensor, indices: Tensor, targets: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The cross-entropy, the losses of the network itself, and their sum, `total`."""
        target = (labels if targets is None else targets).float()
        entropy = F.binary_cross_entropy_with_logits(output.logits.float(), target)
        losses = {"cls": entropy, **output.auxiliary}
        return {**losses, "total": torch.stack(list(losses.values())).sum()}


class Pooling(nn.Module):
    """Mean and standard deviation of the standardised features over the valid steps, (B, S, D) -> (B, 2 D)."""

    mean: Tensor
    std: Tensor

    def __init__(self, in_dim: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(in_dim))
        self.register_buffer("std", torch.ones(in_dim))

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        x = (x - self.mean) / self.std
        mean = mean_over_steps(x, padding)
        variance = mean_over_steps((x - mean.unsqueeze(1)).square(), padding)
        # The root has no slope at 0, the variance of a single step.
        return torch.cat([mean, variance.clamp_min(1e-12).sqrt()], dim=1)


@torch.no_grad()
def pooled(encoders: nn.ModuleDict, data: MultimodalDataset) -> Tensor:
    """The pooled features of a split, (N, 2 (D_1 + ... + D_M)); 0 where a modality is missing."""
    batches = [
        torch.cat([pool(b.features[m], b.padding_mask[m]) for m, pool in encoders.items()], dim=1)
        for b in data.loader(256)
    ]
    return torch.cat(batches)


class PooledMLP(Baseline):
    """No sequences: one hidden layer on the pooled features."""

    center: Tensor
    scale: Tensor

    def encoder(self, in_dim: int, *sizes: Any) -> nn.Module:
        return Pooling(in_dim)

    def build(self, sizes: Sizes) -> None:
        size = sum(2 * len(encoder.mean) for encoder in self.encoders.values())
        self.register_buffer("center", torch.zeros(size))
        self.register_buffer("scale", torch.ones(size))
        self.head = mlp(size, 4 * sizes.dim, sizes.labels, sizes.dropout)

    def set_statistics(self, data: MultimodalDataset) -> None:
        """Standardises the pooled features too, with the statistics of the training set."""
        x = pooled(self.encoders, data)
        self.center.copy_(x.mean(0))
        self.scale.copy_(x.std(0, correction=0).clamp_min(1e-3))

    def fuse(self, encoded: Vectors, padding: Vectors) -> Tensor:
        return self.head((torch.cat([*encoded], dim=1) - self.center) / self.scale)


class EarlyFusion(Baseline):
    """The encoded steps of all modalities in one sequence, in which each can attend to all: one more layer."""

    def build(self, sizes: Sizes) -> None:
        self.modality = nn.Parameter(torch.zeros(sizes.modalities, sizes.dim))
        self.transformer = Transformer(sizes.dim, sizes.heads, sizes.dropout)
        self.head = mlp(sizes.dim, sizes.dim, sizes.labels, sizes.dropout)

    def fuse(self, encoded: Vectors, padding: Vectors) -> Tensor:
        steps = [x + mark for x, mark in zip(encoded, self.modality, strict=True)]
        mask = torch.cat([*padding], dim=1)
        return self.head(mean_over_steps(self.transformer(torch.cat(steps, dim=1), mask), mask))


class LateFusion(Baseline):
    """A classifier for each modality; the mean of the logits of those that are there."""

    def build(self, sizes: Sizes) -> None:
        self.heads = nn.ModuleList(
            mlp(sizes.dim, sizes.dim, sizes.labels, sizes.dropout) for _ in range(sizes.modalities)
        )

    def fuse(self, encoded: Vectors, padding: Vectors) -> Tensor:
        each = zip(self.heads, encoded, padding, strict=True)
        logits = [head(mean_over_steps(x, mask)) for head, x, mask in each]
        missing = torch.stack([mask.all(1) for mask in padding], dim=1)
        return mean_over_steps(torch.stack(logits, dim=1), missing)


class CrossModalLayer(nn.Module):
    """A Transformer layer in which the steps of one modality ask those of another."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.norm, self.source_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.dropout = nn.Dropout(dropout)
        self.feed_forward = lddu_full.EncoderLayer(dim, heads, dropout).feed_forward

    def forward(self, x: Tensor, source: Tensor, padding: Tensor) -> Tensor:
        """Expects x (B, S, D), and of the other modality (B, T, D) and its padding (B, T)."""
        missing = padding.all(dim=1, keepdim=True)
        source = self.source_norm(source)
        # Where there is nothing to ask, the softmax needs keys all the same; the answer is left out.
        answer, _ = self.attention(
            self.norm(x), source, source, key_padding_mask=padding & ~missing, need_weights=False
        )
        x = x + self.dropout(answer).masked_fill(missing.unsqueeze(2), 0)
        return x + self.feed_forward(x)


class CrossModal(Baseline):
    """Every modality asks every other one, in the manner of MulT (Tsai et al. 2019, arXiv 1906.00295).

    Its features come from our encoders instead of convolutions, one layer reads a modality instead of several, and the
    mean over the steps is classified instead of the last step behind more Transformer layers.
    """

    def build(self, sizes: Sizes) -> None:
        self.pairs = list(permutations(range(sizes.modalities), 2))
        self.layers = nn.ModuleList(
            CrossModalLayer(sizes.dim, sizes.heads, sizes.dropout) for _ in self.pairs
        )
        vectors = sizes.modalities + len(self.pairs)
        self.head = mlp(vectors * sizes.dim, sizes.dim, sizes.labels, sizes.dropout)

    def fuse(self, encoded: Vectors, padding: Vectors) -> Tensor:
        vectors = [mean_over_steps(x, mask) for x, mask in zip(encoded, padding, strict=True)]
        for (target, source), layer in zip(self.pairs, self.layers, strict=True):
            read = layer(encoded[target], encoded[source], padding[source])
            vectors.append(mean_over_steps(read, padding[target]))
        return self.head(torch.cat(vectors, dim=1))


def mean_of(x: Tensor, there: Tensor) -> Tensor:
    """Mean (D,) of the samples (B, D) that are there (B, 1)."""
    return (x * there).sum(0) / there.sum().clamp_min(1)


def similarity_loss(shared: Vectors, there: Vectors) -> Tensor:
    """Central moment discrepancy (Zellinger et al. 2017) of vectors in (0, 1), mean over pairs of modalities."""
    moments = []  # mean and central moments 2 to 5, (5, D)
    for x, here in zip(shared, there, strict=True):
        mean = mean_of(x, here)
        central = [mean_of((x - mean) ** order, here) for order in range(2, 6)]
        moments.append(torch.stack([mean, *central]))
    terms = [shared[0].new_zeros(())]  # of a single modality
    for i, j in combinations(range(len(shared)), 2):
        distance = torch.linalg.vector_norm(moments[i] - moments[j], dim=1).sum()
        terms.append(distance * (there[i].any() & there[j].any()))
    return torch.stack(terms).sum() / max(1, len(terms) - 1)


def difference_loss(private: Vectors, shared: Vectors, there: Vectors) -> Tensor:
    """How far the two vectors of a modality, and the private ones of two, are from orthogonal over a batch."""

    def unit(x: Tensor, here: Tensor) -> Tensor:
        return F.normalize(x - mean_of(x, here), dim=1, eps=1e-6) * here

    own = [unit(x, here) for x, here in zip(private, there, strict=True)]
    common = [unit(x, here) for x, here in zip(shared, there, strict=True)]
    pairs = [*zip(own, common, strict=True), *combinations(own, 2)]
    return torch.stack([(a.T @ b).square().mean() for a, b in pairs]).sum()


class InvariantSpecific(Baseline):
    """What modalities share apart from what each has alone, in the manner of MISA (Hazarika et al. 2020).

    arXiv 2005.03545. Each modality is projected twice, into a space of its own and into a common one. Losses make the
    common vectors of the modalities alike, the two of a modality orthogonal, and both together tell all. A Transformer
    layer joins the 2 M vectors. The losses weigh a tenth of what they do in the released code: with its weights all
    samples of a small training set became alike, which satisfies all three.
    """

    def build(self, sizes: Sizes) -> None:
        dim, modalities = sizes.dim, range(sizes.modalities)
        self.projections = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.LayerNorm(dim)) for _ in modalities
        )
        self.private = nn.ModuleList(nn.Linear(dim, dim) for _ in modalities)
        self.shared = nn.Linear(dim, dim)
        self.decoders = nn.ModuleList(nn.Linear(dim, dim) for _ in modalities)
        self.transformer = Transformer(dim, sizes.heads, sizes.dropout)
        self.head = mlp(2 * sizes.modalities * dim, dim, sizes.labels, sizes.dropout)

    def fuse(self, encoded: Vectors, padding: Vectors) -> Output:
        there = [~mask.all(1, keepdim=True) for mask in padding]

        def each(layers: nn.ModuleList, inputs: Vectors) -> list[Tensor]:
            return [f(x) * here for f, x, here in zip(layers, inputs, there, strict=True)]

        means = [mean_over_steps(x, mask) for x, mask in zip(encoded, padding, strict=True)]
        vectors = each(self.projections, means)
        private = [x.sigmoid() for x in each(self.private, vectors)]
        shared = [self.shared(x).sigmoid() for x in vectors]
        decoded = each(self.decoders, [a + b for a, b in zip(private, shared, strict=True)])
        missing = ~torch.cat([*there, *there], dim=1)
        joined = self.transformer(torch.stack([*private, *shared], dim=1), missing)
        return Output(
            self.head(joined.flatten(1)),
            {
                "similarity": 0.1 * similarity_loss(shared, there),
                "difference": 0.03 * difference_loss(private, shared, there),
                "reconstruction": 0.1 * F.mse_loss(torch.stack(decoded), torch.stack(vectors)),
            },
        )


class LitBaseline(lddu_full.LitLDDU):
    """The training of LDDU for another network."""

    def setup(self, stage: str) -> None:
        if stage == "fit" and isinstance(self.model, PooledMLP):
            self.model.set_statistics(self.trainer.datamodule.parts["train"])

    def on_train_epoch_end(self) -> None:
        """There is no history of samples."""


NETWORKS: dict[str, type[Baseline]] = {
    "MLP pooled": PooledMLP,
    "early fusion": EarlyFusion,
    "late fusion": LateFusion,
    "cross-modal (MulT)": CrossModal,
    "invariant/specific (MISA)": InvariantSpecific,
}

# --- Classical methods -----------------------------------------------------------------------------------------------

Predict = Callable[[np.ndarray], np.ndarray]  # features (N, F) -> probabilities (N, Q)


def prior(model: None, x: np.ndarray, y: np.ndarray) -> Predict:
    """How frequent each label is."""
    return lambda new: np.tile(y.mean(0), (len(new), 1))


def binary_relevance(model: ClassifierMixin, x: np.ndarray, y: np.ndarray) -> Predict:
    """Every label by itself."""
    fitted = [clone(model).fit(x, column) for column in y.T]
    return lambda new: np.column_stack([each.predict_proba(new)[:, 1] for each in fitted])


def classifier_chain(model: ClassifierMixin, x: np.ndarray, y: np.ndarray) -> Predict:
    """Every label with those before it in a random order as features (Read et al. 2011)."""
    chain = ClassifierChain(model, order="random", random_state=model.random_state)
    return chain.fit(x, y).predict_proba


def label_powerset(model: ClassifierMixin, x: np.ndarray, y: np.ndarray) -> Predict:
    """Every set of labels seen in training as a class; a label has the probability of the sets with it."""
    sets, index = np.unique(y, axis=0, return_inverse=True)
    fitted = clone(model).fit(x, index.reshape(-1))
    return lambda new: fitted.predict_proba(new) @ sets


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


CLASSICAL: dict[str, tuple[Callable[..., Predict], Callable[[int], Sequence[Any]]]] = {
    "prior": (prior, lambda seed: [None]),
    "BR logistic": (binary_relevance, logistic),
    "LP logistic": (label_powerset, logistic),
    "CC logistic": (classifier_chain, logistic),
    "BR boosted trees": (binary_relevance, boosted_trees),
}
LDDU = {"LDDU": "", "LDDU residual": "--final residual"}  # what is compared, and its options
ARMS = (*CLASSICAL, *NETWORKS, *LDDU)


def fit_classical(arm: str, args: argparse.Namespace) -> dict[str, float | None]:
    """Fits a classical method; of several models the one with the best validation miF1 counts."""
    parts = lddu_full.read_data(args.data, args.format, args.labels)
    train, validation, test = (parts[part] for part in ("train", "validation", "test"))
    encoders = nn.ModuleDict({name: Pooling(dim) for name, dim in train.dims.items()})
    lddu_full.set_statistics(encoders, train)
    scaler = StandardScaler().fit(pooled(encoders, train))
    x_train, x_validation, x_test = (
        scaler.transform(pooled(encoders, part)) for part in (train, validation, test)
    )
    y = train.labels.numpy().astype(int)
    share = y.mean(0)
    varies = (share > 0) & (share < 1)  # the others cannot be learned
    method, models = CLASSICAL[arm]
    best = -1.0
    for model in models(args.seed):
        predict = method(model, x_train, y[:, varies]) if varies.any() else None

        def logits(x: np.ndarray, predict: Predict | None = predict) -> Tensor:
            probs = np.tile(share, (len(x), 1))
            if predict:
                probs[:, varies] = predict(x)
            return torch.from_numpy(probs).clamp(1e-6, 1 - 1e-6).logit().float()

        found = logits(x_validation)
        calibration = PlattScaling(len(share)).fit(found, validation.labels)
        probs = calibration(found).sigmoid()
        threshold = lddu_full.best_threshold(probs, validation.labels, args.thresholds)
        score = lddu_full.evaluate(probs, validation.labels, threshold)["miF1"]
        print(f"{model}: validation miF1 {score}")
        if score > best:
            best, chosen = score, threshold
            found = logits(x_test)
            outputs = {"probs": calibration(found).sigmoid(), "uncalibrated": found.sigmoid()}
    lddu_full.save_arrays(args.output / "predictions.npz", chosen, test, outputs)
    return lddu_full.evaluate(outputs["probs"], test.labels, chosen)


# --- Runs and report -------------------------------------------------------------------------------------------------


def work(run: Run) -> dict[str, Any]:
    """Trains one method with one seed, and evaluates it."""
    lddu_full.quiet()
    start = time.perf_counter()
    # No early stopping: some networks need many steps before the first gain, and the checkpoint is chosen anyway.
    options = f"--accelerator cpu --epochs {run.args.epochs} --patience {run.args.epochs} "
    options += f"{run.args.options} {LDDU.get(run.arm, '')} --seed {run.seed}"
    where = ["--data", str(run.file), "--output", str(run.folder)]
    args = lddu_full.parse(["train", *options.split(), *where])
    if run.arm in CLASSICAL:
        test, size = fit_classical(run.arm, args), {}
    else:
        lit = lddu_full.LitLDDU
        if run.arm in NETWORKS:
            lit = type("Lit", (LitBaseline,), {"network": NETWORKS[run.arm]})
        results = lddu_full.train(args, lit)
        test, size = results["test"], {name: results[name] for name in ("parameters", "epochs")}
    return {**test, **size, "seconds": round(time.perf_counter() - start, 1)}


class Interval(NamedTuple):
    """A difference and where it lies in 95 % of the draws."""

    difference: float
    low: float
    high: float

    def __str__(self) -> str:
        mark = " *" if self.low > 0 or self.high < 0 else ""
        return f"{self.difference:+.4f} [{self.low:+.4f}, {self.high:+.4f}]{mark}"


def contributions(folder: Path) -> np.ndarray:
    """What every test sample adds to micro F1 and Brier score, (3, N): hits, labels predicted and present, error."""
    with np.load(folder / "predictions.npz") as file:
        probs, labels, threshold = file["probs"], file["labels"], file["threshold"]
    predicted = probs > threshold
    hits = (predicted & (labels > 0)).sum(1)
    return np.stack([hits, predicted.sum(1) + labels.sum(1), np.square(probs - labels).mean(1)])


def scores(weights: np.ndarray, terms: np.ndarray) -> np.ndarray:
    """Micro F1 and Brier score, mean over seeds, of samples counted by weights (draws, N): (2, draws)."""
    hits, sizes, errors = np.einsum("dn,skn->ksd", weights, terms, optimize=True)
    f1 = 2 * hits / np.maximum(sizes, 1)
    return np.stack([f1.mean(0), errors.mean(0) / weights.sum(1)])


def paired_bootstrap(
    ours: np.ndarray, theirs: np.ndarray, draws: int = 10_000, seed: int = 0
) -> dict[str, Interval]:
    """Difference of two methods, and its 95 % percentile interval over samples drawn with replacement.

    Both methods are evaluated on the same draws (Efron, Tibshirani 1993). The interval tells how much the test set
    decides; the models are given.

    Args:
        ours: :func:`contributions` of the same N samples by seed, (S, 3, N).
        theirs: The same of the other method.
        draws: How often N samples are drawn.
        seed: Of the draws.
    """
    samples, rng = ours.shape[2], np.random.default_rng(seed)

    def difference(weights: np.ndarray) -> np.ndarray:
        return scores(weights, ours) - scores(weights, theirs)

    drawn = []
    for start in range(0, draws, 500):  # so many fit in memory
        count = min(500, draws - start)
        places = rng.integers(samples, size=(count, samples)) + samples * np.arange(count)[:, None]
        weights = np.bincount(places.ravel(), minlength=count * samples).reshape(count, samples)
        drawn.append(difference(weights.astype(float)))
    low, high = np.percentile(np.concatenate(drawn, axis=1), (2.5, 97.5), axis=1)
    observed = difference(np.ones((1, samples)))[:, 0]
    return {
        name: Interval(*map(float, values))
        for name, *values in zip(("miF1", "Brier"), observed, low, high, strict=True)
    }


def differences(rows: Sequence[Row], folder: Path, name: str) -> list[str]:
    """Markdown, one line a method: LDDU (or a variant, `name`) minus the method, over the seeds that both have."""
    seeds: dict[str, set[int]] = {name: set()}
    for row in rows:
        seeds.setdefault(row["arm"], set()).add(row["seed"])
    lines = []
    for arm in [arm for arm in seeds if arm not in LDDU]:
        if both := sorted(seeds[arm] & seeds[name]):
            ours, theirs = (
                np.stack([contributions(folder / slug(each) / str(seed)) for seed in both])
                for each in (name, arm)
            )
            found = paired_bootstrap(ours, theirs)
            lines.append(f"| {arm} | {len(both)} | {found['miF1']} | {found['Brier']} |")
    return lines and ["| arm | seeds | miF1 | Brier |", "|---|---:|---:|---:|", *lines]


def report(rows: Sequence[Row], output: Path) -> str:
    """Markdown: the measures of all methods, and how far LDDU is ahead, for each data set."""
    lines = []
    for name in dict.fromkeys(row["data"] for row in rows):
        here = [row for row in rows if row["data"] == name]
        sizes = {
            row["arm"]: f"{row['parameters']:,}" if "parameters" in row else "" for row in here
        }
        lines += [f"{name}, test split:", "", *table(here, COLUMNS, {"parameters": sizes}), ""]
        for ours in LDDU:
            if compared := differences(here, output / name, ours):
                lines += [f"{name}, {ours} minus the other, 95 % interval, * where it excludes 0:"]
                lines += ["", *compared, ""]
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = lddu_full.Parser(description="LDDU beside simpler methods.")
    add_arguments(result, ARMS, "runs/baselines")
    result.add_argument("--epochs", type=int, default=30, help="default: %(default)s")
    return result


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    args = parser().parse_args(sys.argv[1:] if argv is None else argv)
    if not args.data:
        parser().error("--data is needed")
    with lddu_full.ending_in_one_line():
        check_arguments(parser(), args)
        rows, failed = sweep(work, args.data, args)
        text = report(rows, args.output)
        lddu_full.write_text(args.output / "baselines.md", text)
    print(text)
    if failed:
        sys.exit(f"{failed} runs failed")


if __name__ == "__main__":
    main()
