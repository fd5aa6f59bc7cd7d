"""Detects a modality that does not belong to the rest of its sample: :class:`Conflict`."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from numbers import Real
from typing import NamedTuple
from zlib import crc32

import torch
from torch import Tensor

from uncertainty_mm._checks import (
    check_finite,
    check_known_names,
    check_missing,
    check_modality_dims,
    check_number,
    check_positive_int,
    check_tensor,
    check_validate_args,
    checks_values,
)
from uncertainty_mm._component import FittedComponent
from uncertainty_mm.functional import at_least_float32
from uncertainty_mm.typicality import _FOLDS, _Moments, _shrunk, _weight, _Whitening

__all__ = ["Conflict"]

# Candidates for the least eigenvalue of the covariance, of which the fit chooses one; 1e-4 still inverts in float32.
_LEAST_EIGENVALUES = (1e-4, 0.03, 0.3)
# Directions of a modality with less than this share of its largest variance are treated as rounding, and left out.
_LEAST_VARIANCE = 1e-9
_STEEPEST = 10.0  # slope of the logits, which is about 1 for Gaussian rows


class Conflict(FittedComponent):
    r"""Computes the probability that a modality comes from another sample than the rest, which then predicts it badly.

    The modalities of a sample have something in common: a happy face comes with a happy voice. A modality from another
    sample is as typical as its own, so only a comparison with the rest can reveal it. This component describes every
    modality by a vector :math:`r_m`, and all of them by one Gaussian :math:`p`. If modality :math:`m` came from another
    sample, the density would be :math:`p(r_m)\,p(r_{-m})` instead of :math:`p(r)`, where :math:`r_{-m}` are the other
    modalities present. The logarithm of the ratio of the two, which is the most powerful test, is the negative
    pointwise mutual information of :math:`r_m` and :math:`r_{-m}`:

    .. math::
        s_m = \log p(r_m) - \log p(r_m \mid r_{-m}), \qquad
        \pi_m = \frac{\frac{\varrho}{M} e^{a s_m}}{1 - \varrho + \frac{\varrho}{M} \sum_n e^{a s_n}}

    :math:`\pi_m` is the probability that :math:`m` is the foreign modality, if a share :math:`\varrho` (`prior`) of all
    samples have one, and each of the :math:`M` modalities present is equally likely. The slope :math:`a` corrects for
    rows that are not Gaussian. It is fitted by maximum likelihood to training samples held out of the fit of the
    Gaussian, both unchanged and with one modality exchanged, so neither labels nor examples of conflicts are needed.

    The sum over the modalities is the probability that one of them is foreign, and the largest tells which. **With two
    modalities it cannot tell which**: they contradict each other, and :math:`s_1 = s_2`.

    The rows can be anything. With the predictions of each modality alone, the component tests whether these agree about
    the labels; with :meth:`Typicality.summaries <uncertainty_mm.Typicality.summaries>`, whether the sequences share
    other properties, such as the room, the person, or the length of a pause.

    For every modality, the `num_directions` directions of the largest variance are compared, so that the cost does
    not grow with the square of the number of columns. Columns that did not vary in :meth:`fit` are left out.

    Source: Neyman and Pearson 1933, doi 10.1098/rsta.1933.0009 (the ratio); Church and Hanks 1990 (pointwise mutual
    information); Chen et al. 2010, doi 10.1109/TSP.2010.2053029 (shrinkage); their use for modalities is new here.

    Args:
        modality_dims: Number :math:`P_m` of columns of every modality by name, in the order of the modality axis.
        num_directions: Largest number of principal directions of the standardised rows per modality.
        prior: Share :math:`\varrho` in (0, 1) of the samples that have a foreign modality.
        validate_args: Check values (NaN, infinity) in a forward pass on the CPU only (None), never (False), or always
            (True), which stalls an accelerator. If unchecked, NaN gives NaN.

    Attributes:
        shift: Mean (P,) of the columns of all modalities, concatenated.
        weight: One over their standard deviation, (P,); 0 for a column that did not vary.
        projection: Directions of all modalities as a block-diagonal matrix, (P, K).
        covariance: Shrunk covariance (K, K) of the projected rows.
        slope: :math:`a`. All five are saved with the model and stay float32; optimizers and weight averaging do not
            change them. They are not loaded where the modalities have other names or another order.

    Raises:
        ValueError: If an argument is out of range, or a name cannot name a submodule.
        TypeError: If an argument has the wrong type.

    Example:
        >>> topic = torch.randn(500, 4)  # what a sample is about
        >>> names = ["text", "audio", "face"]
        >>> rows = {name: topic + 0.3 * torch.randn(500, 4) for name in names}
        >>> conflict = Conflict(dict.fromkeys(names, 4)).fit(rows)
        >>> conflict(rows).sum(1).median() < 0.05
        tensor(True)
        >>> swapped = conflict(rows | {"audio": rows["audio"].roll(1, 0)})
        >>> swapped.sum(1).median() > 0.95
        tensor(True)
        >>> names[swapped.sum(0).argmax()]
        'audio'
    """

    modality_dims: dict[str, int]
    num_directions: int
    prior: float
    validate_args: bool | None
    shift: Tensor
    weight: Tensor
    projection: Tensor
    covariance: Tensor
    slope: Tensor

    def __init__(
        self,
        modality_dims: Mapping[str, int],
        *,
        num_directions: int = 16,
        prior: float = 0.5,
        validate_args: bool | None = None,
    ) -> None:
        super().__init__()
        check_modality_dims(modality_dims)
        check_positive_int("num_directions", num_directions)
        check_number("prior", prior, "in (0, 1)", isinstance(prior, Real) and 0 < prior < 1)
        check_validate_args(validate_args)
        self._set(modality_dims=dict(modality_dims), num_directions=num_directions, prior=prior)
        self._set(validate_args=validate_args)
        size, rank = sum(modality_dims.values()), sum(self._ranks())
        self._keep(
            shift=torch.empty(size),
            weight=torch.empty(size),
            projection=torch.empty(size, rank),
            covariance=torch.empty(rank, rank),
            slope=torch.empty(()),
        )
        self._keep_meaning(*(crc32(name.encode()) for name in modality_dims))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Removes the fit, so that the answer is always the prior."""
        for name in self._states:
            getattr(self, name).zero_()
        self.covariance.fill_diagonal_(1)
        self._reset_meaning()

    def _in_words(self, meaning: tuple[int, ...]) -> str:
        names = dict(zip(self._meaning, self.modality_dims, strict=True))
        return f"of the modalities {[names.get(number, 'another') for number in meaning]}"

    def _ranks(self) -> list[int]:
        """Number of directions of each modality."""
        return [min(dim, self.num_directions) for dim in self.modality_dims.values()]

    def forward(self, rows: Mapping[str, Tensor], missing: Tensor | None = None) -> Tensor:
        """Computes for every modality the probability that it is the one from another sample.

        Args:
            rows: Floating tensors (B, P_m) by modality name, as given to :meth:`fit`. A modality may be absent.
            missing: Bool tensor (B, M), True where a modality is missing. Values there are ignored.

        Returns:
            Tensor (B, M) in [0, 1] in at least float32, with a sum over the modalities of at most 1; 0 where a modality
            is missing or alone.

        Raises:
            ValueError: If shapes, devices or names disagree, or a row is not finite.
            TypeError: If a dtype is wrong.
        """
        ratios, judged = self._judged(rows, missing)
        number = judged.sum(1, keepdim=True).clamp_min(1).to(ratios)
        prior = self.prior / (1 - self.prior) / number
        logits = (ratios + prior.log()).masked_fill(~judged, -torch.inf)
        whole = logits.new_zeros(logits.shape[0], 1)
        return torch.cat([whole, logits], 1).softmax(1)[:, 1:]

    def log_ratios(self, rows: Mapping[str, Tensor], missing: Tensor | None = None) -> Tensor:
        """Computes the logarithms of the ratios, which do not saturate as the probabilities do.

        Args:
            rows: As for :meth:`forward`.
            missing: As for :meth:`forward`.

        Returns:
            Tensor (B, M) of :math:`a s_m` in at least float32: above 0 where the others make a modality less likely
            than it is by itself; 0 where it is missing or alone.

        Raises:
            ValueError: If shapes, devices or names disagree, or a row is not finite.
            TypeError: If a dtype is wrong.
        """
        return self._judged(rows, missing)[0]

    def _judged(self, rows: Mapping[str, Tensor], missing: Tensor | None) -> tuple[Tensor, Tensor]:
        """Logarithms of the ratios (B, M), and a mask (B, M) of where they are defined."""
        x, missing = self._joined(rows, missing, self.validate_args)
        if x.device != self.shift.device and not self._is_replica:
            raise ValueError(
                f"Expected `rows` to be on {self.shift.device}, where the module is, but got {x.device}"
            )
        kind = x.device.type
        with torch.autocast(kind if kind != "meta" else "cpu", enabled=False):
            gaussian = _Joint(*(getattr(self, name).to(x) for name in _Joint._fields))
            ratios = gaussian.log_ratios(gaussian.projected(x), missing, self._ranks())
            return self.slope.to(x) * ratios, _with_company(missing).expand(ratios.shape)

    def _joined(
        self, rows: Mapping[str, Tensor], missing: Tensor | None, validate_args: bool | None
    ) -> tuple[Tensor, Tensor]:
        """Rows (B, P) with 0 where missing, and the mask of what is missing, (B, M), or (M,) if equal for all."""
        check_known_names("rows", rows, self.modality_dims)
        if not rows:
            raise ValueError("Expected `rows` to hold at least one modality, but got none")
        sizes: dict[str, int] = {"M": len(self.modality_dims)}
        device: torch.device | None = None
        dtype = torch.float32
        for name, x in rows.items():
            sizes["P"] = self.modality_dims[name]
            check_tensor(f"rows[{name!r}]", x, "floating", "B P", sizes, device)
            device, dtype = x.device, torch.promote_types(dtype, x.dtype)
        some = next(iter(rows.values()))
        check_missing(missing, sizes, some.device)
        columns = []
        for index, (name, dim) in enumerate(self.modality_dims.items()):
            if name not in rows:
                columns.append(some.new_zeros(sizes["B"], dim, dtype=dtype))
                continue
            x = at_least_float32(rows[name]).to(dtype)
            gone = None if missing is None else missing[:, index : index + 1]
            if checks_values(x, validate_args):
                check_finite(f"rows[{name!r}]", x, gone)
            columns.append(x if gone is None else x.masked_fill(gone, 0))
        absent = torch.stack(
            [some.new_full((), n not in rows, dtype=torch.bool) for n in self.modality_dims]
        )
        if missing is None or (checks_values(missing) and not missing.any()):
            return torch.cat(columns, 1), absent  # one covariance, of all
        return torch.cat(columns, 1), missing | absent

    @torch.no_grad()
    def fit(self, rows: Mapping[str, Tensor], missing: Tensor | None = None) -> Conflict:
        """Fits the Gaussian of all modalities to the rows of a data set.

        All is computed on the CPU in float64, without random numbers. The covariance of two modalities is taken over
        the samples that have both, and the pair with the fewest samples sets the shrinkage. Of 1e-4, 0.03 and 0.3, the
        least eigenvalue is the one that makes held-out samples most likely. Sample i belongs to the fold i % 5, and a
        modality is exchanged with that of the sample half a fold away, because a neighbour may be the next moment of
        the same recording. Under `torch.distributed` nothing is exchanged, so give every rank all samples.

        Args:
            rows: Floating tensors (N, P_m) by modality name, on any device. Take those of the training split, or better
                of samples that the model which made the rows was not trained on.
            missing: Bool tensor (N, M), True where a modality is missing.

        Returns:
            The module itself. If fewer than two samples have two modalities, it is not fitted and answers with the
            prior; a warning says so, unless there is only one modality. Another warning is given if there are fewer
            samples than directions, because the covariance is then unreliable.

        Raises:
            ValueError: If shapes, devices or names disagree, or a row is not finite; an earlier fit is then unchanged.
            TypeError: If a dtype is wrong.
        """
        x, gone = self._joined(rows, missing, True)
        x, gone = x.cpu(), gone.cpu().expand(len(x), len(self.modality_dims))
        dims, ranks = list(self.modality_dims.values()), self._ranks()
        company = _with_company(gone).any(1)
        if company.sum() < 2:
            self.reset_parameters()
            if len(dims) > 1:
                warnings.warn(
                    f"`rows` hold {int(company.sum())} samples with two modalities, of at least 2 that are needed: "
                    "it is not fitted, and what it says is the prior",
                    stacklevel=3,  # beyond the decorator
                )
            return self
        if company.sum() < sum(ranks):
            warnings.warn(
                f"`rows` hold {int(company.sum())} samples with two modalities, fewer than the {sum(ranks)} directions "
                "that are compared: what it says is unreliable; `num_directions` can be lower",
                stacklevel=3,
            )
        fold = torch.arange(len(x), device="cpu") % _FOLDS
        modalities = [
            _Rows(part[~absent], fold[~absent], rank)
            for part, absent, rank in zip(x.split(dims, 1), gone.T, ranks, strict=True)
        ]
        tried: list[list[_Trials]] = [[] for _ in _LEAST_EIGENVALUES]
        for k in range(_FOLDS):
            inside, outside = fold == k, fold != k
            if inside.any() and company[outside].sum() >= 2:
                directions = [each.directions(k) for each in modalities]
                gaussian = _Joint.of(x[outside], gone[outside], directions)
                y = gaussian.projected(x[inside].double())
                for least, trials in zip(_LEAST_EIGENVALUES, tried, strict=True):
                    trials.append(_Trials.of(gaussian.floored(least), y, gone[inside], ranks))
        slopes = [_slope(trials) for trials in tried]
        best = max(range(len(slopes)), key=lambda index: slopes[index][1])
        gaussian = _Joint.of(x, gone, [each.directions() for each in modalities])
        gaussian = gaussian.floored(_LEAST_EIGENVALUES[best])
        for name, value in zip(self._states[:5], (*gaussian, slopes[best][0]), strict=True):
            state = getattr(self, name)
            state.copy_(value.to(state.dtype))
        return self


class _Joint(NamedTuple):
    """A Gaussian of the principal directions of all modalities."""

    shift: Tensor  # (P,)
    weight: Tensor  # (P,)
    projection: Tensor  # (P, K)
    covariance: Tensor  # (K, K)

    @staticmethod
    def of(x: Tensor, missing: Tensor, directions: list[tuple[Tensor, Tensor, Tensor]]) -> _Joint:
        """The Gaussian of rows (N, P) in float64, with shrunk covariance; True in `missing` (N, M) leaves out."""
        shift, weight, projection = zip(*directions, strict=True)
        ranks = [part.shape[1] for part in projection]
        joint = _Joint(
            torch.cat(shift),
            torch.cat(weight),
            torch.block_diag(*projection),
            torch.eye(sum(ranks), dtype=torch.float64, device="cpu"),
        )
        there = ~_by_column(missing, ranks)
        y, there = joint.projected(x.double()) * there, there.double()
        at = joint._varying()
        if len(at):
            y, there = y[:, at], there[:, at]
            counts = there.T @ there
            fewest = int(counts[counts > 0].min())
            joint.covariance[at.unsqueeze(1), at] = _shrunk(y.T @ y / counts.clamp_min(1), fewest)
        return joint

    def floored(self, least: float) -> _Joint:
        """The same Gaussian with no eigenvalue of the covariance below `least`."""
        at, covariance = self._varying(), self.covariance.clone()
        if len(at):
            block = at.unsqueeze(1), at
            values, vectors = torch.linalg.eigh(covariance[block])
            covariance[block] = (vectors * values.clamp_min(least)) @ vectors.T
        return self._replace(covariance=covariance)

    def _varying(self) -> Tensor:
        """Indices of the directions in use; the others are 0."""
        return self.projection.any(0).nonzero().squeeze(1)

    def projected(self, x: Tensor) -> Tensor:
        """Projections (N, K) of rows (N, P) on the directions."""
        return _Whitening(*self[:3]).standardized(x) @ self.projection

    def log_ratios(self, y: Tensor, missing: Tensor, ranks: list[int]) -> Tensor:
        """The s_m (N, M) of projected rows (N, K); `missing` is (N, M), or (M,) if equal for all."""
        left_out = _by_column(missing, ranks)
        y = y.masked_fill(left_out, 0)
        # A missing modality is integrated out, which leaves the covariance of the rest as it is; an independent
        # one takes its place.
        pairs = left_out.unsqueeze(-1) | left_out.unsqueeze(-2)
        nothing = torch.eye(y.shape[1], dtype=y.dtype, device=y.device)
        # torch.cholesky_inverse does this too, but not within a CUDA graph
        root = _root(torch.where(pairs, nothing, self.covariance))
        whitening = torch.linalg.solve_triangular(root, nothing.expand_as(root), upper=False)
        precision = whitening.mT @ whitening
        z = y @ precision if missing.dim() == 1 else (precision @ y.unsqueeze(2)).squeeze(2)
        columns, start = [], 0
        for rank in ranks:
            part = slice(start, start := start + rank)
            # A block of the precision of a Gaussian is the precision of that part given the rest, and z is this
            # precision times the deviation of the part from what the rest predicts.
            given, own = _root(precision[..., part, part]), _root(self.covariance[part, part])
            squares = _square(given, z[:, part]) - _square(own, y[:, part])
            columns.append(0.5 * (squares - _log_det(given) - _log_det(own)))
        return torch.stack(columns, 1).masked_fill(~_with_company(missing), 0)


def _root(covariance: Tensor) -> Tensor:
    """Lower Cholesky factor, without the check that would wait for an accelerator."""
    root: Tensor = torch.linalg.cholesky_ex(covariance).L
    return root


def _square(root: Tensor, x: Tensor) -> Tensor:
    """Squared lengths (N,) of rows (N, P) divided by one root (P, P), or each by its own (N, P, P)."""
    columns = x.mT if root.dim() == 2 else x.unsqueeze(2)
    divided: Tensor = torch.linalg.solve_triangular(root, columns, upper=False)
    return divided.square().sum(0) if root.dim() == 2 else divided.square().sum((1, 2))


def _log_det(root: Tensor) -> Tensor:
    """Logarithm of the determinant of the matrix with this Cholesky factor."""
    return root.diagonal(dim1=-2, dim2=-1).log().sum(-1).mul(2)


def _by_column(missing: Tensor, dims: list[int]) -> Tensor:
    """Expands a mask (..., M) of modalities to their columns, (..., P)."""
    parts = [missing[..., i : i + 1].expand(*missing.shape[:-1], dim) for i, dim in enumerate(dims)]
    return torch.cat(parts, -1)


def _with_company(missing: Tensor) -> Tensor:
    """Mask of the shape of `missing`, True for the modalities that are present and not alone."""
    return ~missing & ((~missing).sum(-1, keepdim=True) > 1)


# --------------------------------------------------------------------------------------------- fit


class _Rows:
    """The rows of one modality, whose principal directions are asked for with and without each fold."""

    def __init__(self, rows: Tensor, fold: Tensor, rank: int) -> None:
        self.rows, self.fold, self.rank = rows, fold, rank
        many = len(rows) > rows.shape[1]  # then the moments of the folds are all that is needed
        self.parts = [_Moments.of(rows[fold == k]) for k in range(_FOLDS)] if many else []

    def directions(self, left_out: int = _FOLDS) -> tuple[Tensor, Tensor, Tensor]:
        """Shift and weight (P,), and the `rank` principal directions (P, K), of the rows of the other folds."""
        columns: Tensor | slice = slice(None)
        if self.parts:
            moments = _Moments.all(self.parts[:left_out] + self.parts[left_out + 1 :])
            shift = moments.mean
            weight, columns, correlation = moments.correlation()
            values, vectors = torch.linalg.eigh(correlation)
        else:
            rows = self.rows[self.fold != left_out].double()
            count = max(len(rows), 1)
            shift = rows.sum(0) / count
            z = rows - shift
            std = (z.square().sum(0) / count).sqrt()
            weight = _weight(std, rows.abs().amax(0) if len(rows) else std)
            z = z * weight
            # the products of rows have the eigenvalues of those of columns, and are fewer
            values, vectors = torch.linalg.eigh(z @ z.T / count)
            vectors = z.T @ vectors / (count * values).sqrt()
        values, vectors = values[-self.rank :], vectors[:, -self.rank :]
        kept = values > _LEAST_VARIANCE * values[-1:]
        projection = shift.new_zeros(len(shift), self.rank)
        projection[columns, self.rank - len(values) :] = torch.where(kept, vectors, 0)
        return shift, weight.clamp_max(torch.finfo(torch.float32).max), projection


class _Trials(NamedTuple):
    """Samples for which the foreign modality, if any, is known."""

    ratios: Tensor  # (N, M)
    company: Tensor  # (N, M) bool
    foreign: Tensor  # (N,): 0 for none, 1 for the first modality

    @staticmethod
    def of(gaussian: _Joint, y: Tensor, missing: Tensor, ranks: list[int]) -> _Trials:
        """Projected rows (N, K), first unchanged, then with each modality exchanged in turn."""

        def judged(y: Tensor, missing: Tensor, foreign: int) -> _Trials:
            ratios = y.new_zeros(missing.shape)
            patterns, which = missing.unique(dim=0, return_inverse=True)
            for index, pattern in enumerate(patterns):
                ratios[which == index] = gaussian.log_ratios(y[which == index], pattern, ranks)
            return _Trials(ratios, _with_company(missing), which.new_full((len(y),), foreign))

        trials = [judged(y, missing, 0)]
        for index, part in enumerate(torch.arange(y.shape[1], device=y.device).split(ranks)):
            own = (~missing[:, index]).nonzero().squeeze(1)
            if len(own) > 1:
                other = y.clone()
                other[own.unsqueeze(1), part] = y[own.roll(len(own) // 2).unsqueeze(1), part]
                there = _with_company(missing)[:, index]
                trials.append(judged(other[there], missing[there], index + 1))
        return _Trials.all(trials)

    @staticmethod
    def all(parts: list[_Trials]) -> _Trials:
        return _Trials(*(torch.cat(each) for each in zip(*parts, strict=True)))


def _slope(parts: list[_Trials]) -> tuple[Tensor, float]:
    """The slope of maximum likelihood and its log-likelihood, for a prior of one half."""
    low, high = (torch.tensor(x, dtype=torch.float64, device="cpu") for x in (0.0, _STEEPEST))
    if not any(each.foreign.any() for each in parts):  # nothing to learn it from
        return low, 0.0
    ratios, company, foreign = _Trials.all(parts)
    number = company.sum(1, keepdim=True).clamp_min(1).to(ratios)
    weight = torch.where(foreign > 0, 1 / number.squeeze(1), 1)
    ratios = torch.cat([torch.zeros_like(ratios[:, :1]), ratios], 1)
    prior = torch.cat([torch.zeros_like(ratios[:, :1]), -number.log().expand_as(company)], 1)
    prior[:, 1:].masked_fill_(~company, -torch.inf)
    true = foreign.unsqueeze(1)

    def log_probs(slope: Tensor) -> Tensor:
        return (slope * ratios + prior).log_softmax(1)

    for _ in range(50):
        middle = (low + high) / 2
        # derivative of the log-likelihood, which is concave
        excess = ratios.gather(1, true) - (log_probs(middle).exp() * ratios).sum(1, keepdim=True)
        rises = weight @ excess.squeeze(1) > 0
        low, high = torch.where(rises, middle, low), torch.where(rises, high, middle)
    return low, float(weight @ log_probs(low).gather(1, true))
