"""One number that corrects the confidence of a classifier: :class:`TemperatureScaling`."""

from __future__ import annotations

import torch
from torch import Tensor

from uncertainty_mm._checks import check_flag, check_positive_int, check_validate_args
from uncertainty_mm._component import Component
from uncertainty_mm.calibration._data import checked_input, fitting_data, one_sided

LIMIT = 100.0  # separated labels have no finite optimum


class TemperatureScaling(Component):
    r"""Makes an overconfident classifier less confident, and an underconfident one more so.

    .. math::
        \operatorname{calibrated}(\ell)_q = \ell_q / T, \qquad T > 0

    Neither decisions at a threshold of 1/2 nor the order of the samples change. One temperature for all labels needs
    only a few samples. Before :meth:`fit` nothing is changed. The temperature is saved with the model; optimizers and
    weight averaging do not change it.

    Source: Guo et al. 2017, arXiv 1706.04599.

    Args:
        num_labels: Number of labels :math:`Q`.
        per_label: One temperature for each label instead of one for all.
        validate_args: Check values (NaN, infinity) on the CPU only (None; always in :meth:`fit`), never (False), or
            always (True), which stalls an accelerator. Unchecked, a label above 0.5 counts as present, and logits that
            are not finite are left out.

    Attributes:
        temperature: Tensor (Q,), above 0; 1 before :meth:`fit`.

    Raises:
        ValueError: If an argument is out of range.
        TypeError: If an argument has the wrong type.

    Example:
        >>> logits = torch.full((300, 1), 9.0)  # confident,
        >>> labels = torch.arange(300).unsqueeze(1) % 3 > 0  # but right two times in three
        >>> calibration = TemperatureScaling(num_labels=1).fit(logits, labels)
        >>> calibration(logits[:1]).sigmoid()
        tensor([[0.6667]])
    """

    num_labels: int
    per_label: bool
    validate_args: bool | None
    temperature: Tensor

    def __init__(
        self, num_labels: int, *, per_label: bool = False, validate_args: bool | None = None
    ) -> None:
        super().__init__()
        check_positive_int("num_labels", num_labels)
        check_flag("per_label", per_label)
        check_validate_args(validate_args)
        self._set(num_labels=num_labels, per_label=per_label, validate_args=validate_args)
        self._keep(temperature=torch.empty(num_labels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Removes the fit, so that nothing is changed."""
        self.temperature.fill_(1)

    def forward(self, logits: Tensor) -> Tensor:
        """Calibrates logits.

        Args:
            logits: Tensor (B, Q).

        Returns:
            Tensor (B, Q) in at least float32.

        Raises:
            ValueError: If the shape or the device is wrong, or `logits` is not finite.
            TypeError: If the dtype is wrong.
        """
        logits = checked_input(self, "logits", logits, self.temperature)
        return logits / self.temperature.to(logits.device)

    @torch.no_grad()
    def fit(
        self, logits: Tensor, labels: Tensor, unknown: Tensor | None = None
    ) -> TemperatureScaling:
        r"""Fits the temperature by maximum likelihood.

        .. math::
            \operatorname*{arg\,min}_{1/100 \le T \le 100} \sum_i \operatorname{BCE}(\ell_i / T, y_i)

        The sum runs over all labels, or over one label with `per_label`. It is convex in :math:`1/T`, and the root of
        its derivative is found by bisection, in float64 on the CPU. If all known labels are present, or all absent, or
        nothing is known, or all logits are 0, there is nothing to learn, and :math:`T = 1`.

        Args:
            logits: Tensor (B, Q), of a validation set.
            labels: Tensor (B, Q) of 0 and 1.
            unknown: Bool tensor (B, Q), True where a label is not known. Values there are ignored.

        Returns:
            The module itself.

        Raises:
            ValueError: If shapes or devices disagree, values are out of range, or no label is known; the temperature
                is then unchanged.
            TypeError: If a dtype is wrong.
        """
        x, y, weight = fitting_data(self, "logits", logits, labels, unknown)
        if not self.per_label:
            x, y, weight = (values.reshape(-1, 1) for values in (x, y, weight))
        # below the root, the likelihood still grows with the scale 1 / T
        low, high = (x.new_full(x.shape[1:], value) for value in (1 / LIMIT, LIMIT))
        for _ in range(60):
            middle = (low * high).sqrt()
            falls = (x * weight * ((x * middle).sigmoid() - y)).sum(0) < 0
            low, high = torch.where(falls, middle, low), torch.where(falls, high, middle)
        nothing = one_sided(y, weight) | (x == 0).all(0)
        self.temperature.copy_((low * high).rsqrt().masked_fill(nothing, 1))
        return self
