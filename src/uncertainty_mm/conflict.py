"""Whether the modalities of a sample belong together, and which one does not: :class:`Conflict`."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor

from uncertainty_mm._checks import (
    check_finite,
    check_known_names,
    check_missing,
    check_modality_dims,
    check_number,
    check_tensor,
    check_validate_args,
    checks_values,
)
from uncertainty_mm._component import FittedComponent
from uncertainty_mm.functional import at_least_float32
from uncertainty_mm.typicality import _FOLDS, _shrunk, _Whitening

__all__ = ["Conflict"]

# Variances of directions in standardised rows are at least this, so that float32 can invert their covariance.
_LEAST_VARIANCE = 1e-4
_STEEPEST = 10.0  # slope of the logits, which is about 1 for Gaussian rows


class Conflict(FittedComponent):
    r"""The probability that a modality is of another sample than the rest, told by how well the rest predicts it.

    Modalities of one sample share what they speak of: a happy face comes with a happy voice, a dark room with a dark
    picture of it. A sequence of another sample is as typical as its own, so nothing that looks at one modality can see
    it. This component describes all modalities at once, each by a vector :math:`r_m` of numbers, as one Gaussian
    :math:`p`. If modality :math:`m` were of another sample, the density would be :math:`p(r_m)\,p(r_{-m})` instead of
    :math:`p(r)`, with :math:`r_{-m}` the others that are there. The logarithm of the ratio of the two, the most
    powerful test there is, is the pointwise mutual information of :math:`r_m` and :math:`r_{-m}` with its sign turned:

    .. math::
        s_m = \log p(r_m) - \log p(r_m \mid r_{-m}), \qquad
        \pi_m = \frac{\frac{\varrho}{M} e^{a s_m}}{1 - \varrho + \frac{\varrho}{M} \sum_n e^{a s_n}}

    :math:`\pi_m` is the probability that :math:`m` is the foreign one if a share :math:`\varrho` (`prior`) of all
    samples have one, any of the :math:`M` that are there as likely as the other. The slope :math:`a` makes up for rows
    that are no Gaussian: it is fitted, by maximum likelihood, to training samples that were left out when the Gaussian
    was, as they are and with one modality exchanged. No label is used, and no example of a conflict is needed.

    The sum over the modalities is the probability that anything is foreign, the largest names it. **Of two modalities
    neither can be named**: they contradict each other, :math:`s_1 = s_2`.

    What to give as rows is free: the predictions of each modality alone say whether they agree in what the labels are;
    :meth:`Typicality.summaries <uncertainty_mm.Typicality.summaries>` have what else the sequences of a sample share,
    such as the room, the person, or the length of a pause. Both together see most.

    Columns that never varied in :meth:`fit` say nothing, and are left out.

    Source: Neyman and Pearson 1933, doi 10.1098/rsta.1933.0009 (the ratio); Church and Hanks 1990 (pointwise mutual
    information); Chen et al. 2010, doi 10.1109/TSP.2010.2053029 (shrinkage); their use for modalities is ours.

    Args:
        modality_dims: Number :math:`P_m` of columns of every modality by name, in the order of the modality axis.
        prior: Share :math:`\varrho` in (0, 1) of the samples that have a foreign modality.
        validate_args: Look at values (NaN, infinity) in a forward pass: None on the CPU only (elsewhere it costs a
            wait), False never, True everywhere. Where values are not looked at, NaN gives NaN.

    Attributes:
        shift: Mean (P,) of the columns of all modalities, one after the other.
        weight: One over their standard deviation, (P,); 0 for a column that never varied.
        correlation: Shrunk correlations (P, P).
        slope: :math:`a`. All four are float32 whatever the module is cast to, and are saved with the model; no
            optimizer touches them, and no averaging of weights.

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
    prior: float
    validate_args: bool | None
    shift: Tensor
    weight: Tensor
    correlation: Tensor
    slope: Tensor

    def __init__(
        self,
        modality_dims: Mapping[str, int],
        *,
        prior: float = 0.5,
        validate_args: bool | None = None,
    ) -> None:
        super().__init__()
        check_modality_dims(modality_dims)
        check_number("prior", prior, "in (0, 1)", isinstance(prior, Real) and 0 < prior < 1)
        check_validate_args(validate_args)
        self._set(modality_dims=dict(modality_dims), prior=prior, validate_args=validate_args)
        size = sum(modality_dims.values())
        self._keep(
            shift=torch.empty(size),
            weight=torch.empty(size),
            correlation=torch.empty(size, size),
            slope=torch.empty(()),
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Forgets the fit: all that is known of a sample is then the prior."""
        for name in self._states:
            getattr(self, name).zero_()
        self.correlation.fill_diagonal_(1)

    def extra_repr(self) -> str:
        """The settings, for `repr`."""
        return f"{self.modality_dims}, prior={self.prior:g}"

    def forward(self, rows: Mapping[str, Tensor], missing: Tensor | None = None) -> Tensor:
        """The probability of every modality to be the one of another sample.

        Args:
            rows: Floating tensors (B, P_m) by modality name, as given to :meth:`fit`. A modality may be absent.
            missing: Bool tensor (B, M), True where a modality is missing. What stands there has no influence.

        Returns:
            Tensor (B, M) in [0, 1] in at least float32; the sum over the modalities is at most 1. 0 where a modality is
            missing or alone.

        Raises:
            ValueError: If shapes, devices or names disagree, or a row is not finite.
            TypeError: If a dtype is wrong.
        """
        ratios, judged = self._judged(rows, missing)
        number = judged.sum(1, keepdim=True).clamp_min(1).to(ratios)
        prior = self.prior / (1 - self.prior) / number
        logits = (ratios + prior.log()).masked_fill(~judged, -torch.inf)
        whole = logits.new_zeros(len(logits), 1)
        return torch.cat([whole, logits], 1).softmax(1)[:, 1:]

    def log_ratios(self, rows: Mapping[str, Tensor], missing: Tensor | None = None) -> Tensor:
        """The logarithms of the ratios themselves, which do not saturate.

        Args:
            rows: As for :meth:`forward`.
            missing: As for :meth:`forward`.

        Returns:
            Tensor (B, M) of :math:`a s_m` in at least float32: above 0 where a modality fits worse with the others than
            with any; 0 where it is missing or alone.

        Raises:
            ValueError: If shapes, devices or names disagree, or a row is not finite.
            TypeError: If a dtype is wrong.
        """
        return self._judged(rows, missing)[0]

    def _judged(self, rows: Mapping[str, Tensor], missing: Tensor | None) -> tuple[Tensor, Tensor]:
        """Logarithms of ratios (B, M), and where there is one, (B, M) or (1, M)."""
        x, missing = self._joined(rows, missing, self.validate_args)
        if x.device != self.shift.device and not self._is_replica:
            raise ValueError(
                f"Expected `rows` to be on {self.shift.device}, where the module is, but got {x.device}"
            )
        kind = x.device.type
        with torch.autocast(kind if kind != "meta" else "cpu", enabled=False):
            gaussian = _Joint(*(getattr(self, name).to(x) for name in self._states[:-1]))
            ratios = gaussian.log_ratios(x, missing, list(self.modality_dims.values()))
            return self.slope.to(x) * ratios, _with_company(missing).expand(ratios.shape)

    def _joined(
        self, rows: Mapping[str, Tensor], missing: Tensor | None, validate_args: bool | None
    ) -> tuple[Tensor, Tensor]:
        """Rows (B, P) with 0 where missing, and what is missing, (B, M), or (M,) where it is the same for all."""
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
        return torch.cat(columns, 1), absent if missing is None else missing | absent

    @torch.no_grad()
    def fit(self, rows: Mapping[str, Tensor], missing: Tensor | None = None) -> Conflict:
        """Describes how the modalities of a data set go together, whatever was fitted before.

        Computed on the CPU in float64. The correlation of two modalities is that of the samples which have both;
        the shrinkage is that of the pair with the fewest. Sample i belongs to the fold i % 5, and a modality is
        exchanged with that of the sample half a fold away, which is less likely to be the next moment of the same
        recording. Under `torch.distributed` nothing is exchanged: every rank has to be given all samples.

        Args:
            rows: Floating tensors (N, P_m) by modality name, on any device, of the training split, or better of samples
                that the model which made them was not trained on.
            missing: Bool tensor (N, M), True where a modality is missing.

        Returns:
            The module itself.

        Raises:
            ValueError: If shapes, devices or names disagree, a row is not finite, or no two samples have two modalities
                in common; what was fitted before is then unchanged.
            TypeError: If a dtype is wrong.
        """
        x, gone = self._joined(rows, missing, True)
        x, gone = x.double().cpu(), gone.cpu().expand(len(x), len(self.modality_dims))
        dims = list(self.modality_dims.values())
        company = _with_company(gone).any(1)
        if company.sum() < 2:
            raise ValueError(
                "Expected `rows` to hold at least two samples with two modalities, "
                f"but got {int(company.sum())}"
            )
        fold = torch.arange(len(x)) % _FOLDS
        tried = [
            each
            for k in range(_FOLDS)
            if (fold == k).any() and company[fold != k].sum() >= 2
            for each in _trials(
                _Joint.of(x[fold != k], gone[fold != k], dims), x[fold == k], gone[fold == k], dims
            )
        ]
        fitted = (*_Joint.of(x, gone, dims), _slope(tried))
        for name, value in zip(self._states, fitted, strict=True):
            state = getattr(self, name)
            state.copy_(value.to(state.dtype))
        return self


class _Joint(NamedTuple):
    """A Gaussian of rows (..., P) of all modalities."""

    shift: Tensor  # (P,)
    weight: Tensor  # (P,)
    correlation: Tensor  # (P, P)

    @staticmethod
    def of(x: Tensor, missing: Tensor, dims: list[int]) -> _Joint:
        """That of rows (N, P) with 0 where `missing` (N, M)."""
        there = (~_by_column(missing, dims)).to(x.dtype)
        count = there.sum(0).clamp_min(1)
        shift = x.sum(0) / count
        centred = (x - shift) * there
        std = (centred.square().sum(0) / count).sqrt()
        # what float32 cannot tell from rounding does not vary
        varies = std > torch.finfo(torch.float32).eps * x.abs().amax(0)
        weight = torch.where(varies, 1 / std, 0)
        correlation = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
        columns = varies.nonzero().squeeze(1)
        if len(columns):
            z, there = (centred * weight)[:, columns], there[:, columns]
            counts = there.T @ there
            fewest = int(counts[counts > 0].min())
            values, vectors = torch.linalg.eigh(_shrunk(z.T @ z / counts.clamp_min(1), fewest))
            values = values.clamp_min(_LEAST_VARIANCE)
            correlation[columns.unsqueeze(1), columns] = (vectors * values) @ vectors.T
        return _Joint(shift, weight, correlation)

    def log_ratios(self, x: Tensor, missing: Tensor, dims: list[int]) -> Tensor:
        """The s (N, M) of rows (N, P); `missing` (N, M), or (M,) where it is the same for all."""
        left_out = _by_column(missing, dims)
        z = _Whitening(*self).standardized(x).masked_fill(left_out, 0)
        # A modality that is missing is integrated out: the correlations of the rest are as they were. In its place
        # stands one that depends on nothing.
        pairs = left_out.unsqueeze(-1) | left_out.unsqueeze(-2)
        nothing = torch.eye(len(self.shift), dtype=x.dtype, device=x.device)
        precision = torch.cholesky_inverse(_root(torch.where(pairs, nothing, self.correlation)))
        y = z @ precision if missing.dim() == 1 else (precision @ z.unsqueeze(2)).squeeze(2)
        columns, start = [], 0
        for dim in dims:
            part = slice(start, start := start + dim)
            # Of a Gaussian, the precision of a part is that of the part given the rest, and y is that precision times
            # the distance of the part from what the rest predicts.
            given, own = _root(precision[..., part, part]), _root(self.correlation[part, part])
            squares = _square(given, y[:, part]) - _square(own, z[:, part])
            columns.append(0.5 * (squares - _log_det(given) - _log_det(own)))
        return torch.stack(columns, 1).masked_fill(~_with_company(missing), 0)


def _root(covariance: Tensor) -> Tensor:
    """Lower Cholesky factor, without the check for which an accelerator would wait."""
    root: Tensor = torch.linalg.cholesky_ex(covariance).L
    return root


def _square(root: Tensor, x: Tensor) -> Tensor:
    """Squared lengths (N,) of rows (N, P) after division by a root (P, P), or by one for each (N, P, P)."""
    columns = x.mT if root.dim() == 2 else x.unsqueeze(2)
    divided: Tensor = torch.linalg.solve_triangular(root, columns, upper=False)
    return divided.square().sum(0) if root.dim() == 2 else divided.square().sum((1, 2))


def _log_det(root: Tensor) -> Tensor:
    """That of the matrix of which this is the root."""
    return root.diagonal(dim1=-2, dim2=-1).log().sum(-1).mul(2)


def _by_column(missing: Tensor, dims: list[int]) -> Tensor:
    """(..., M) as (..., P)."""
    parts = [missing[..., i : i + 1].expand(*missing.shape[:-1], dim) for i, dim in enumerate(dims)]
    return torch.cat(parts, -1)


def _with_company(missing: Tensor) -> Tensor:
    """Like `missing`, True for the modalities that are there and not alone."""
    return ~missing & ((~missing).sum(-1, keepdim=True) > 1)


# --------------------------------------------------------------------------------------------- fit


class _Trial(NamedTuple):
    """Samples of which is known whether a modality is foreign, and which."""

    ratios: Tensor  # (N, M)
    company: Tensor  # (N, M) bool
    foreign: int | None


def _trials(gaussian: _Joint, x: Tensor, missing: Tensor, dims: list[int]) -> list[_Trial]:
    """Rows as they are, and with one modality after the other exchanged."""

    def judged(x: Tensor, missing: Tensor, foreign: int | None) -> _Trial:
        ratios = x.new_zeros(missing.shape)
        patterns, which = missing.unique(dim=0, return_inverse=True)
        for index, pattern in enumerate(patterns):
            ratios[which == index] = gaussian.log_ratios(x[which == index], pattern, dims)
        return _Trial(ratios, _with_company(missing), foreign)

    trials = [judged(x, missing, None)]
    for index, part in enumerate(torch.arange(x.shape[1]).split(dims)):
        own = (~missing[:, index]).nonzero().squeeze(1)
        if len(own) > 1:
            other = x.clone()
            other[own.unsqueeze(1), part] = x[own.roll(len(own) // 2).unsqueeze(1), part]
            there = _with_company(missing)[:, index]
            trials.append(judged(other[there], missing[there], index))
    return trials


def _slope(trials: list[_Trial]) -> Tensor:
    """The slope of the greatest likelihood, one sample in two having a foreign modality; 0 if there is none."""
    if all(trial.foreign is None for trial in trials):
        return torch.zeros((), dtype=torch.float64, device="cpu")
    low, high = (torch.tensor(x, dtype=torch.float64, device="cpu") for x in (0.0, _STEEPEST))

    def growth(slope: Tensor) -> Tensor:
        """Derivative of the log-likelihood, which is concave."""
        total = torch.zeros_like(slope)
        for ratios, company, foreign in trials:
            number = company.sum(1, keepdim=True).clamp_min(1)
            logits = (slope * ratios - number.log()).masked_fill(~company, -torch.inf)
            probs = torch.cat([torch.zeros_like(logits[:, :1]), logits], 1).softmax(1)[:, 1:]
            expected = (probs * ratios).sum(1)
            if foreign is None:
                total -= expected.sum()
            else:
                total += ((ratios[:, foreign] - expected) / number.squeeze(1)).sum()
        return total

    for _ in range(50):
        middle = (low + high) / 2
        rises = growth(middle) > 0
        low, high = torch.where(rises, middle, low), torch.where(rises, high, middle)
    return low
