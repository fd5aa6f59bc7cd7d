"""Increases the variance of sequences that are unlike the training data: :class:`Typicality`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DistributedSampler

from uncertainty_mm._checks import (
    check_choice,
    check_features,
    check_finite,
    check_flag,
    check_modality_dims,
    check_number,
    check_tensor,
    check_validate_args,
    checks_values,
    missing_modalities,
    sum_is_finite,
)
from uncertainty_mm._component import UNIT, Component, FittedComponent
from uncertainty_mm.functional import at_least_float32

if TYPE_CHECKING:
    from uncertainty_mm.data import MultimodalBatch, MultimodalDataset

__all__ = ["Typicality"]

_FOLDS = 5
_COVARIANCES = ("oas", "empirical")
_CHUNK = 2**22  # numbers in a batch of a data set
_BLOCK = 256  # columns of a product that is not split further
_MANY = 4096  # rows
# Standardised values are clamped to this magnitude, so that no square overflows.
_LIMIT = 1e6
# Least standard deviation at which a column of a summary, which has no unit, counts: far above rounding.
_LEAST_SPREAD = 1e-4
# Directions with less than this share of the largest variance are treated as rounding, and left out.
_LEAST_VARIANCE = 1e-9
# Added inside the logarithms of the variances of steps, of squared sizes, and of squared differences.
_SPREAD, _SIZE, _ROUGHNESS = 1e-2, 1e-6, 1e-4


class Typicality(Component):
    r"""Measures how unlike the training data a sequence is, and by how much its variance should grow.

    A network may predict an even smaller standard deviation for unfamiliar input, so this component does not rely on
    one. For each modality it fits a Gaussian to summaries of the training sequences. A summary has :math:`2D + 3`
    numbers, computed from the standardised steps: the mean of every feature, and the logarithms of the standard
    deviation of every feature, of the size of a step, of its Mahalanobis distance, and of the difference between
    successive steps. Let :math:`d^2` be the squared Mahalanobis distance of a summary, and :math:`q` the quantile
    `level` of such distances over training sequences held out of the fit. Then

    .. math::
        r = \max(1, d^2 / q), \qquad s = 1 + \frac{r^p - 1}{p} \quad (p = 0 :\ s = 1 + \log r), \qquad
        \sigma^2 \leftarrow s \sigma^2

    so that only about a share 1 - `level` of sequences like the training data is affected, and these only slightly.
    Pass the factor :math:`s` to :meth:`~uncertainty_mm.DiagonalGaussian.inflated`.

    Unfamiliar input is not necessarily predicted wrongly, so by default the variance grows only with the logarithm of
    the distance; with `power=1` it grows in proportion.

    Columns of features or summaries that did not vary in :meth:`fit` are left out.

    Source: Lee et al. 2018, arXiv 1807.03888 (Mahalanobis distance, in the latent space of a classifier); Chen et al.
    2010, doi 10.1109/TSP.2010.2053029 (shrinkage); the summary and the factor are this library's own.

    Args:
        modality_dims: Feature size :math:`D_m` of every modality by name, in the order of the modality axis.
        level: Quantile in (0, 1) of the distances of the training data above which the variance grows.
        power: :math:`p`, at least 0.
        covariance: `"oas"`: shrunk towards a multiple of the identity, the more the fewer rows there are;
            `"empirical"`: the covariance of the rows, with a pseudo-inverse if there are too few.
        validate_args: Check values (NaN, infinity) in a forward pass on the CPU only (None), never (False), or always
            (True), which stalls an accelerator. If unchecked, a step that is not finite does not count.

    Attributes:
        modality: `nn.ModuleDict` with the fitted state of every modality. It is saved with the model and stays float32;
            optimizers and weight averaging do not change it. State of another `level` or `covariance` is not loaded.

    Raises:
        ValueError: If an argument is out of range or unknown, or a name cannot name a submodule.
        TypeError: If an argument has the wrong type.

    Example:
        >>> from uncertainty_mm.data import MultimodalDataset
        >>> _ = torch.manual_seed(0)  # one in twenty draws is unusual
        >>> data = MultimodalDataset(
        ...     {"text": torch.randn(500, 9, 4)},
        ...     {"text": torch.zeros(500, 9).bool()},
        ...     torch.ones(500, 1),
        ...     ["happy"],
        ... )
        >>> typicality = Typicality({"text": 4}).fit(data)
        >>> quiet, loud = torch.randn(1, 9, 4), 5 * torch.randn(1, 9, 4)
        >>> padding_mask = {"text": torch.zeros(1, 9).bool()}
        >>> typicality({"text": quiet}, padding_mask)
        tensor([[1.]])
        >>> bool(typicality({"text": loud}, padding_mask) > 2)
        True
    """

    modality_dims: dict[str, int]
    level: float
    power: float
    covariance: Literal["oas", "empirical"]
    validate_args: bool | None

    def __init__(
        self,
        modality_dims: Mapping[str, int],
        *,
        level: float = 0.95,
        power: float = 0.0,
        covariance: Literal["oas", "empirical"] = "oas",
        validate_args: bool | None = None,
    ) -> None:
        super().__init__()
        check_modality_dims(modality_dims)
        check_number("level", level, "in (0, 1)", isinstance(level, Real) and 0 < level < 1)
        finite = isinstance(power, Real) and 0 <= power < float("inf")
        check_number("power", power, "at least 0 and finite", finite)
        check_choice("covariance", covariance, _COVARIANCES)
        check_validate_args(validate_args)
        self._set(modality_dims=dict(modality_dims), level=level, power=power)
        self._set(covariance=covariance, validate_args=validate_args)
        meaning = round(level * UNIT), _COVARIANCES.index(covariance)
        parts = {name: _Modality(dim, meaning) for name, dim in modality_dims.items()}
        self.modality = nn.ModuleDict(parts)

    def forward(
        self,
        features: Mapping[str, Tensor],
        padding_mask: Mapping[str, Tensor] | None = None,
        *,
        need_summaries: bool = False,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """Computes the factor by which the variances of each modality should grow.

        Args:
            features: Sequences (B, S_m, D_m) by modality name, as given to :meth:`fit`. A modality may be absent.
            padding_mask: Bool masks (B, S_m) by modality name, True at the steps to leave out; without a mask all steps
                are used. Values at padded steps are ignored, even NaN.
            need_summaries: Also return the :meth:`summaries`, which are computed anyway.

        Returns:
            Tensor (B, M) in at least float32, at least 1; exactly 1 where a modality is missing or not fitted. With
            `need_summaries` a pair of it and the summaries.

        Raises:
            ValueError: If shapes, devices or names disagree, or an unpadded feature is not finite.
            TypeError: If a dtype is wrong.
        """
        check_flag("need_summaries", need_summaries)
        distances, missing, summaries = self._measured(features, padding_mask)
        parts = [part.quantile.to(distances) for part in self._parts()]
        log_ratio = (distances / torch.stack(parts)).clamp_min(1).log()
        grown = torch.expm1(self.power * log_ratio) / self.power if self.power else log_ratio
        factor = (1 + grown).masked_fill(missing, 1)
        return (factor, summaries) if need_summaries else factor

    def distances(
        self, features: Mapping[str, Tensor], padding_mask: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """Computes the squared Mahalanobis distances that the factors are made from.

        Args:
            features: As for :meth:`forward`.
            padding_mask: As for :meth:`forward`.

        Returns:
            Tensor (B, M) in at least float32, at least 0; 0 where a modality is missing or not fitted. With
            `covariance="empirical"` the mean over the fitted sequences is the number of independent dimensions of
            their summaries, at most 2D + 3.

        Raises:
            ValueError: If shapes, devices or names disagree, or an unpadded feature is not finite.
            TypeError: If a dtype is wrong.
        """
        return self._measured(features, padding_mask)[0]

    def summaries(
        self, features: Mapping[str, Tensor], padding_mask: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Computes the summaries, which :class:`~uncertainty_mm.Conflict` can compare as well.

        Args:
            features: As for :meth:`forward`.
            padding_mask: As for :meth:`forward`.

        Returns:
            Tensors (B, 2 D_m + 3) in at least float32 by modality name, for the modalities in `features`. The summary
            of a sequence without valid steps is finite, but has no meaning.

        Raises:
            ValueError: If shapes, devices or names disagree, or an unpadded feature is not finite.
            TypeError: If a dtype is wrong.
        """
        check_features(features, padding_mask, self.modality_dims)
        kind = next(iter(features.values())).device.type
        with torch.autocast(kind if kind != "meta" else "cpu", enabled=False):
            return {
                name: part.summary(name, *self._checked(name, features, padding_mask))[0]
                for name, part in zip(self.modality_dims, self._parts(), strict=True)
                if name in features
            }

    @property
    def summary_dims(self) -> dict[str, int]:
        """Number of columns of the summaries by modality name, 2 D_m + 3."""
        return {name: 2 * dim + 3 for name, dim in self.modality_dims.items()}

    @torch.no_grad()
    def summaries_of(
        self, data: MultimodalDataset | Iterable[MultimodalBatch]
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Computes the :meth:`summaries` of a whole data set batch by batch, for ``Conflict.fit``.

        Args:
            data: As for :meth:`fit`, on any device.

        Returns:
            Tensors (N, 2 D_m + 3) by modality name, and a bool tensor (N, M), True where a modality is missing or no
            step of it is finite, on the device of the module.

        Raises:
            ValueError: As :meth:`fit`.
            TypeError: As :meth:`fit`.
        """
        device = next(self._parts()).shift.device
        rows: dict[str, list[Tensor]] = {name: [] for name in self.modality_dims}
        missing = []
        # a loader draws a random number even if it does not shuffle
        with torch.random.fork_rng(devices=[]):
            for batch in _reader(data)():
                self._check_batch(batch)
                _, gone, of_batch = self._measured(*batch.to(device)[:2])
                for name, dim in self.summary_dims.items():
                    rows[name].append(of_batch.get(name, gone.new_zeros(len(gone), dim).float()))
                missing.append(gone)
        if not missing:
            raise ValueError("Expected `data` to hold at least one sample, but got none")
        return {name: torch.cat(parts) for name, parts in rows.items()}, torch.cat(missing)

    def _checked(
        self, name: str, features: Mapping[str, Tensor], padding_mask: Mapping[str, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """A sequence and its padding."""
        x = features[name]
        mask = None if padding_mask is None else padding_mask.get(name)
        if mask is None:
            mask = x.new_zeros(x.shape[:2], dtype=torch.bool)
        if checks_values(x, self.validate_args):
            check_finite(f"features[{name!r}]", x, mask.unsqueeze(2))
        return x, mask

    def _parts(self) -> Iterator[_Modality]:
        yield from self.modality.values()  # type: ignore[misc]

    def _measured(
        self, features: Mapping[str, Tensor], padding_mask: Mapping[str, Tensor] | None
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Distances (B, M), a mask (B, M) of missing modalities, and the summaries."""
        check_features(features, padding_mask, self.modality_dims)
        missing = missing_modalities(features, padding_mask, self.modality_dims)
        dtype = torch.float32
        columns: list[tuple[Tensor, Tensor]] = []
        summaries: dict[str, Tensor] = {}
        kind = missing.device.type
        with torch.autocast(kind if kind != "meta" else "cpu", enabled=False):
            for index, (name, part) in enumerate(self.modality.items()):
                if name not in features:
                    columns.append(
                        (missing.new_zeros(len(missing), dtype=dtype), missing[:, index])
                    )
                    continue
                dtype = torch.promote_types(dtype, features[name].dtype)
                distance, gone, summaries[name] = part(
                    name, *self._checked(name, features, padding_mask)
                )
                columns.append((distance, gone))
        distances, missings = zip(*columns, strict=True)
        return torch.stack([x.to(dtype) for x in distances], 1), torch.stack(missings, 1), summaries

    @torch.no_grad()
    def fit(self, data: MultimodalDataset | Iterable[MultimodalBatch]) -> Typicality:
        """Fits the Gaussians to the sequences of a data set.

        The data are read twice, batch by batch: first for the moments of the steps, then for the summaries, whose
        2D + 3 numbers per sequence are kept in memory. All is computed on the CPU, the moments in float64. A summary
        belongs to the fold `indices % 5`, and the quantile is taken over the distances of each fold to a Gaussian that
        was fitted without it.

        Missing sequences, padded steps, and steps that are not finite do not count. Under `torch.distributed` nothing
        is exchanged: give every rank all of the data, and all ranks get the same fit.

        Args:
            data: The training split, or its batches, which must be the same at the second reading, such as a `loader`
                of it. Batches may be on any device.

        Returns:
            The module itself. A modality with fewer than two sequences is not fitted: a warning says so, and its factor
            stays 1.

        Raises:
            ValueError: If there is no sample, the two readings differ, a loader serves one of several ranks, or shapes
                or names disagree; an earlier fit is then unchanged.
            TypeError: If `data` can be read only once, or does not hold batches.
        """
        self._fit(data)
        return self

    @torch.no_grad()
    def fit_and_summarize(
        self, data: MultimodalDataset | Iterable[MultimodalBatch]
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Fits, and returns the summaries on which the fit is based, for ``Conflict.fit``.

        It replaces :meth:`fit` and then :meth:`summaries_of`, which reads and summarises the data once more.

        Args:
            data: As for :meth:`fit`.

        Returns:
            As :meth:`summaries_of`, on the CPU.

        Raises:
            ValueError: As :meth:`fit`.
            TypeError: As :meth:`fit`.
        """
        return self._fit(data)

    def _fit(
        self, data: MultimodalDataset | Iterable[MultimodalBatch]
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Fits, and returns the summaries (N, 2D + 3) of all sequences and a mask (N, M) of those that are missing."""
        read = _reader(data)
        moments = {name: _Moments.none(dim) for name, dim in self.modality_dims.items()}
        count = 0
        for batch in read():
            count += self._check_batch(batch)
            for name, x, valid in _sequences(batch):
                moments[name] += _Moments.of(x[valid])
        if not count:
            raise ValueError("Expected `data` to hold at least one sample, but got none")
        steps = {name: _whitening(each, self.covariance, 0) for name, each in moments.items()}
        rows: dict[str, list[Tensor]] = {name: [] for name in self.modality_dims}
        missing, folds, again = [], [], 0
        for batch in read():
            size = self._check_batch(batch)
            again += size
            gone = {name: torch.ones(size, dtype=torch.bool, device="cpu") for name in rows}
            of_batch = {n: torch.zeros(size, k, device="cpu") for n, k in self.summary_dims.items()}
            for name, x, valid in _sequences(batch):
                of_batch[name], gone[name] = _summary(x, valid, steps[name]), ~valid.any(1)
            for name, each in of_batch.items():
                rows[name].append(each)
            missing.append(torch.stack([*gone.values()], 1))
            folds.append(batch.indices.cpu() % _FOLDS)
        if again != count:
            raise ValueError(
                f"Expected `data` to give the same samples twice, but got {count}, then {again}"
            )
        joined = {name: torch.cat(rows.pop(name)) for name in self.modality_dims}
        absent, fold = torch.cat(missing), torch.cat(folds)
        for name, part, gone_here in zip(self.modality_dims, self._parts(), absent.T, strict=True):
            part.reset_parameters()
            own_fold = fold.masked_fill(gone_here, _FOLDS)
            parts = [_Moments.of(joined[name][own_fold == k]) for k in range(_FOLDS)]
            whole = _Moments.all(parts)
            if whole.count < 2:
                warnings.warn(
                    f"`data` holds {whole.count} sequences of {name!r}, of at least 2 that are needed: "
                    "it is not fitted, and its factor stays 1",
                    stacklevel=4,  # beyond the public method and its decorator
                )
                continue
            sequence = _whitening(whole, self.covariance, _LEAST_SPREAD)
            part.set(steps[name], sequence, self._quantile(joined[name], own_fold, parts, sequence))
        return joined, absent

    def _check_batch(self, batch: object) -> int:
        """Checks a batch, and returns its number of samples."""
        from uncertainty_mm.data import MultimodalBatch  # imported only where it is needed

        if not isinstance(batch, MultimodalBatch):
            raise TypeError(
                "Expected `data` to be a MultimodalDataset, or to give batches of one, such as its "
                f"`loader`, but got {type(batch).__name__} among them"
            )
        check_features(batch.features, batch.padding_mask, self.modality_dims)
        sizes = {"B": next(iter(batch.features.values())).shape[0]}
        check_tensor("indices", batch.indices, "integer", "B", sizes)
        return sizes["B"]

    def _quantile(
        self, rows: Tensor, fold: Tensor, parts: list[_Moments], sequence: _Whitening
    ) -> Tensor:
        """Quantile of the distances of the folds; of all rows if a fold leaves too few others."""
        distances = []
        for k in range(_FOLDS):
            others = _Moments.all(parts[:k] + parts[k + 1 :])
            if others.count >= 2:
                without = _whitening(others, self.covariance, _LEAST_SPREAD)
                distances.append(without.distance(rows[fold == k]))
        if not sum(map(len, distances)):
            distances = [sequence.distance(rows[fold < _FOLDS])]
        quantile = torch.cat(distances).double().quantile(self.level)
        # with a quantile of 0 nothing can be compared, and the factor stays 1
        return torch.where(quantile > 0, quantile, torch.inf)


class _Whitening(NamedTuple):
    """Transforms rows (..., P) to unit, uncorrelated variances: shift and weight (P,), then root (P, P)."""

    shift: Tensor
    weight: Tensor  # 1 over the standard deviation, 0 for a column that never varied
    root: Tensor  # of the inverse covariance of standardised rows

    def standardized(self, x: Tensor) -> Tensor:
        """Standardised rows (..., P), finite unless they hold NaN."""
        largest = torch.finfo(torch.float32).max
        centred = (x - self.shift).clamp(-largest, largest)
        return (centred * self.weight).clamp(-_LIMIT, _LIMIT)

    def length(self, z: Tensor) -> Tensor:
        """Squared Mahalanobis distances (...) of standardised rows (..., P)."""
        return (z @ self.root.to(z.dtype).mT).square().sum(-1)

    def distance(self, x: Tensor) -> Tensor:
        """Squared Mahalanobis distances (...) of rows (..., P)."""
        return self.length(self.standardized(x))


class _Modality(FittedComponent):
    """The two Gaussians of a modality: that of its steps, and that of the summaries of its sequences."""

    step_shift: Tensor
    step_weight: Tensor
    step_root: Tensor
    shift: Tensor
    weight: Tensor
    root: Tensor
    quantile: Tensor

    def __init__(self, dim: int, meaning: tuple[int, int]) -> None:
        super().__init__()
        size = 2 * dim + 3
        self._keep(
            step_shift=torch.empty(dim),
            step_weight=torch.empty(dim),
            step_root=torch.empty(dim, dim),
            shift=torch.empty(size),
            weight=torch.empty(size),
            root=torch.empty(size, size),
            quantile=torch.empty(()),
        )
        self._keep_meaning(*meaning)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Removes the fit, so that all distances are 0."""
        for name in self._states:
            getattr(self, name).zero_()
        self.quantile.fill_(torch.inf)
        self._reset_meaning()

    def _in_words(self, meaning: tuple[int, ...]) -> str:
        level, covariance = meaning
        kind = dict(enumerate(_COVARIANCES)).get(covariance, "unknown")
        return f"of `level` {level / UNIT:g} and `covariance` {kind!r}"

    def set(self, step: _Whitening, sequence: _Whitening, quantile: Tensor) -> None:
        """Stores a fit."""
        for name, value in zip(self._states[:7], (*step, *sequence, quantile), strict=True):
            state = getattr(self, name)
            state.copy_(value.to(state.dtype))  # cast first, since not every device has float64

    def forward(self, name: str, x: Tensor, padding: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Distances (B,), a mask of the sequences without valid steps, and summaries."""
        summary, missing = self.summary(name, x, padding)
        sequence = _Whitening(*self._there(x, self._states[3:6]))
        return sequence.distance(summary).masked_fill(missing, 0), missing, summary

    def summary(self, name: str, x: Tensor, padding: Tensor) -> tuple[Tensor, Tensor]:
        """Summaries (B, 2D + 3), and a mask of the sequences without valid steps."""
        if x.device != self.shift.device and not self._is_replica:
            raise ValueError(
                f"Expected `features[{name!r}]` to be on {self.shift.device}, where the module is, "
                f"but got {x.device}"
            )
        step = _Whitening(*self._there(x, self._states[:3]))
        if x.shape[1] and checks_values(x) and not padding.any() and sum_is_finite(x):
            return _summary(x, None, step), padding[:, 0]  # no step is left out, none is missing
        valid = _valid(x, padding)
        return _summary(x, valid, step), ~valid.any(1)

    def _there(self, x: Tensor, names: tuple[str, ...]) -> list[Tensor]:
        return [getattr(self, each).to(x.device) for each in names]


def _valid(x: Tensor, padding: Tensor) -> Tensor:
    """Bool mask (B, S), True for the steps that count."""
    return ~padding & x.isfinite().all(2)


def _summary(x: Tensor, valid: Tensor | None, step: _Whitening) -> Tensor:
    """Summaries (B, 2D + 3) of sequences (B, S, D), in at least float32.

    What is not `valid` (B, S) has no part in them; with None all of at least one step has.
    """

    def kept(x: Tensor) -> Tensor:
        return x if valid is None else x.masked_fill(~valid.unsqueeze(2), 0)

    z = kept(step.standardized(kept(at_least_float32(x))))
    steps, dim = z.shape[1:]
    count: Tensor | int
    number: Tensor | int
    if valid is None:
        count, number, change = steps, max(steps - 1, 1), z.diff(dim=1)
    else:
        count = valid.sum(1, keepdim=True).clamp_min(1)
        # Rolled instead of sliced, since an exported program with slices refuses sequences of one or two steps.
        pairs = valid & valid.roll(1, 1) & (torch.arange(steps, device=z.device) > 0)
        number = pairs.sum(1, keepdim=True).clamp_min(1)
        change = (z - z.roll(1, 1)).masked_fill(~pairs.unsqueeze(2), 0)
    mean = z.sum(1) / count
    variance = kept(z - mean.unsqueeze(1)).square().sum(1) / count
    size = z.square().sum((1, 2)).unsqueeze(1) / (count * dim)
    distance = step.length(z).sum(1, keepdim=True) / (count * dim)
    roughness = change.square().sum((1, 2)).unsqueeze(1) / (number * dim)
    squares = variance + _SPREAD, size + _SIZE, distance + _SIZE, roughness + _ROUGHNESS
    return torch.cat([mean, 0.5 * torch.cat(squares, 1).log()], 1)


# --------------------------------------------------------------------------------------------- fit


@dataclass(frozen=True)
class _Moments:
    """The moments of rows (N, P) seen so far, which are merged by addition (Chan et al. 1983)."""

    count: int
    mean: Tensor  # (P,)
    scatter: Tensor  # (P, P), sum of products of deviations from the mean
    largest: Tensor  # (P,), magnitude

    @staticmethod
    def none(dim: int) -> _Moments:
        zeros = torch.zeros(dim, dtype=torch.float64, device="cpu")
        return _Moments(0, zeros, zeros.new_zeros(dim, dim), zeros)

    @staticmethod
    def of(rows: Tensor) -> _Moments:
        if len(rows) == 0:
            return _Moments.none(rows.shape[1])
        if len(rows) > _MANY:  # of which no copy in float64 is made at once
            return sum(map(_Moments.of, rows.split(_MANY)), _Moments.none(rows.shape[1]))
        rows = rows.double()
        mean = rows.mean(0)
        return _Moments(len(rows), mean, _gram(rows - mean), rows.abs().amax(0))

    @staticmethod
    def all(parts: list[_Moments]) -> _Moments:
        return sum(parts[1:], start=parts[0])

    def __add__(self, other: _Moments) -> _Moments:
        if not self.count or not other.count:
            return self if self.count else other
        count, gap = self.count + other.count, other.mean - self.mean
        share = other.count / count
        return _Moments(
            count,
            self.mean + share * gap,
            (self.scatter + other.scatter).addr_(gap, gap, alpha=self.count * share),
            torch.maximum(self.largest, other.largest),
        )

    def correlation(self, least_spread: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
        """One over the standard deviations, (P,), the columns that vary, (K,), and their correlations (K, K)."""
        products = self.scatter / max(self.count, 1)
        std = products.diagonal().sqrt()
        weight = _weight(std, self.largest, least_spread)
        columns = weight.nonzero().squeeze(1)
        if len(columns) < len(std):
            products = products[columns][:, columns]
        scale = weight[columns]
        return weight, columns, products.mul_(scale).mul_(scale.unsqueeze(1))


def _weight(std: Tensor, largest: Tensor, least_spread: float = 0.0) -> Tensor:
    """One over the standard deviation of columns (P,), 0 where rounding of the largest value in float32 might be it."""
    rounding = torch.finfo(torch.float32).eps * largest
    return torch.where(std > rounding.clamp_min(least_spread), 1 / std, 0)


def _gram(x: Tensor) -> Tensor:
    """`x.T @ x`, of which each product of two different halves of the columns is computed only once."""
    if x.shape[1] < _BLOCK:
        return x.T @ x
    left, right = x.chunk(2, 1)
    both = left.T @ right
    rows = torch.cat([_gram(left), both], 1), torch.cat([both.T, _gram(right)], 1)
    return torch.cat(rows)


def _inverse(root: Tensor) -> Tensor:
    """The inverse of a lower triangular matrix, by halves, without what is known to be 0."""
    half = len(root) // 2
    if half < _BLOCK:
        identity = torch.eye(len(root), dtype=root.dtype, device=root.device)
        inverse: Tensor = torch.linalg.solve_triangular(root, identity, upper=False)
        return inverse
    upper, lower = _inverse(root[:half, :half]), _inverse(root[half:, half:])
    inverse = torch.zeros_like(root)
    inverse[:half, :half], inverse[half:, half:] = upper, lower
    inverse[half:, :half] = -(lower @ root[half:, :half]) @ upper
    return inverse


def _whitening(moments: _Moments, covariance: str, least_spread: float) -> _Whitening:
    """The whitening for these moments, in float32, without columns and directions that do not vary."""
    weight, columns, correlation = moments.correlation(least_spread)
    root = torch.zeros_like(moments.scatter)
    if len(columns):
        if covariance == "oas":
            correlation = _shrunk(correlation, moments.count)
        root[: len(columns), columns] = _inverse_root(correlation)
    weight = weight.clamp_max(torch.finfo(torch.float32).max)
    return _Whitening(moments.mean.float(), weight.float(), root.float())


def _inverse_root(covariance: Tensor) -> Tensor:
    """A root (K, K) of the inverse of a covariance, without directions of next to no variance."""
    factor, failed = torch.linalg.cholesky_ex(covariance)
    if not failed:
        root: Tensor = _inverse(factor)
        # The traces of the inverse and of the covariance are above their largest eigenvalues: no share is too small.
        if root.square().sum() * covariance.trace() < 1 / _LEAST_VARIANCE:
            return root
    values, vectors = torch.linalg.eigh(covariance)
    inverse = values.clamp_min(torch.finfo(torch.float32).tiny).rsqrt()
    inverse = inverse.masked_fill(values <= _LEAST_VARIANCE * values[-1], 0)
    root = inverse.unsqueeze(1) * vectors.T
    return root


def _shrunk(covariance: Tensor, count: int) -> Tensor:
    """The covariance (P, P) of `count` rows, shrunk towards a multiple of the identity: OAS as in scikit-learn."""
    dim = len(covariance)
    size, square = covariance.diagonal().mean(), covariance.square().mean()
    excess = (count + 1) * (square - size.square() / dim)
    share = (square + size.square()) / excess if excess > 0 else torch.ones_like(size)
    share = share.clamp_max(1)
    shrunk = (1 - share) * covariance
    shrunk.diagonal().add_(share * size)
    return shrunk


def _sequences(batch: MultimodalBatch) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name, sequences (B, S, D) and valid steps (B, S) of every modality, on the CPU."""
    for name, x in batch.features.items():
        x = at_least_float32(x.detach().cpu())
        mask = batch.padding_mask.get(name)
        padding = x.new_zeros(x.shape[:2], dtype=torch.bool) if mask is None else mask.cpu()
        yield name, x, ~padding if sum_is_finite(x) else _valid(x, padding)


def _reader(
    data: MultimodalDataset | Iterable[MultimodalBatch],
) -> Callable[[], Iterable[MultimodalBatch]]:
    """A function that gives the batches anew at each call."""
    from uncertainty_mm.data import MultimodalDataset

    if isinstance(data, MultimodalDataset):
        size = sum(data.dims[name] * steps for name, steps in data.steps.items())
        loader = data.loader(min(max(_CHUNK // size, 1), 1024))
        return lambda: loader
    if isinstance(data, Iterator):
        raise TypeError(
            "Expected `data` to be readable twice, such as a data set, a loader or a list of batches, "
            f"but got an iterator, {type(data).__name__}, which can be read once"
        )
    if not isinstance(data, Iterable):
        raise TypeError(
            "Expected `data` to be a MultimodalDataset, or to give batches of one, such as its "
            f"`loader`, but got {type(data).__name__}"
        )
    batches = getattr(data, "batch_sampler", None)
    for sampler in (getattr(data, "sampler", None), getattr(batches, "sampler", None)):
        if isinstance(sampler, DistributedSampler) and sampler.num_replicas > 1:
            raise ValueError(
                "Expected `data` to give all samples on every rank, but got a loader with a "
                f"{type(sampler).__name__} for {sampler.num_replicas} ranks: pass the data set itself"
            )
    return lambda: data
