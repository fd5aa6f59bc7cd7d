"""How often each sample was predicted correctly (section 3.4.2): :class:`CorrectnessTracker`."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from uncertainty_mm._checks import (
    check_flag,
    check_positive_int,
    check_probability,
    check_range,
    check_tensor,
    checks_values,
    load_all_or_nothing,
)
from uncertainty_mm.distributed import world_size

# Correctness is summed in integers, in units of 2^-32: integer sums are exact in any order, so that the history is
# deterministic on every device, ranks agree to the bit, and `.half()` leaves it alone.
_UNIT = 2**32


def _load(tracker: CorrectnessTracker, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
    """What is loaded is common to all ranks."""
    if load_all_or_nothing(tracker, state_dict, prefix, *rest):
        history = state_dict.get(f"{prefix}history")
        if history is not None:
            tracker.merged.copy_(history)


class CorrectnessTracker(nn.Module):
    r"""Remembers for every sample of the data set the share of correct predictions so far.

    The share :math:`r_i` is the history that :class:`SoftRankOrdinalityLoss` compares uncertainty with: easy samples
    are learned early and stay learned. All of it lives in buffers, so it is saved with the model.

    Under `DistributedDataParallel`, pass `broadcast_buffers=False` to it: otherwise every forward pass replaces the
    history of a rank by that of rank 0, and what the others saw since the last :meth:`synchronize` is lost.

    Source: Huang et al. 2025, arXiv 2502.13954, section 3.4.2; forgetting events: Toneva et al. 2018, arXiv 1812.05159.

    Args:
        num_samples: Number of samples of the data set; a sample is named by its position in it.
        num_labels: None keeps one history a sample, a number :math:`Q` one for every label of a sample.
        prior: Share reported for what has not been seen yet, in [0, 1].
        validate_args: Look at values (indices in range, correctness in [0, 1]) also on an accelerator, at the price of
            a wait for it.

    Raises:
        ValueError: If an argument is out of range.
        TypeError: If an argument has the wrong type.

    Example:
        >>> tracker = CorrectnessTracker(num_samples=4)
        >>> indices = torch.tensor([0, 2])
        >>> tracker.update(indices, torch.tensor([True, True]))
        >>> tracker.update(indices, torch.tensor([True, False]))
        >>> tracker(torch.tensor([0, 1, 2]))
        tensor([1.0000, 0.5000, 0.5000])
        >>> tracker.forgetting_events(indices)
        tensor([0, 1])
    """

    history: Tensor
    merged: Tensor
    last: Tensor

    def __init__(
        self,
        num_samples: int,
        num_labels: int | None = None,
        *,
        prior: float = 0.5,
        validate_args: bool = False,
    ) -> None:
        super().__init__()
        check_positive_int("num_samples", num_samples)
        if num_labels is not None:
            check_positive_int("num_labels", num_labels)
        check_probability("prior", prior)
        self.num_samples = num_samples
        self.num_labels = num_labels
        self.prior = prior
        check_flag("validate_args", validate_args)
        self.validate_args = validate_args
        shape = (num_samples,) if num_labels is None else (num_samples, num_labels)
        # rows: correctness in units of 1 / _UNIT, predictions, forgetting events
        self.register_buffer("history", torch.zeros(3, *shape, dtype=torch.int64))
        # the part of `history` that all ranks have in common; after loading, that is all of it
        self.register_buffer("merged", torch.zeros(3, *shape, dtype=torch.int64), persistent=False)
        # the latest prediction: 1 correct, 0 wrong, -1 none yet
        self.register_buffer("last", torch.full(shape, -1, dtype=torch.int8))
        self.register_load_state_dict_pre_hook(_load)  # type: ignore[no-untyped-call]

    def extra_repr(self) -> str:
        """The settings, for `repr`."""
        labels = "" if self.num_labels is None else f", num_labels={self.num_labels}"
        return f"num_samples={self.num_samples}{labels}, prior={self.prior}"

    def _check_indices(self, indices: Tensor, sizes: dict[str, int]) -> None:
        check_tensor("indices", indices, "integer", "B", sizes, self.last.device)
        if checks_values(indices, self.validate_args) and indices.numel():
            low, high = indices.aminmax()
            if low < 0 or high >= self.num_samples:
                raise ValueError(
                    f"Expected `indices` to be in [0, {self.num_samples - 1}], "
                    f"but got values from {low} to {high}"
                )

    def update(self, indices: Tensor, correct: Tensor, mask: Tensor | None = None) -> None:
        """Adds one prediction for every entry of a batch.

        Args:
            indices: Integer tensor (B,), positions in the data set. A sample that occurs more than once counts as
                often, in the order of the batch.
            correct: Tensor (B,), or (B, Q) with `num_labels`: bool, or float in [0, 1] for soft correctness (at least
                0.5 is correct as far as forgetting is concerned).
            mask: Bool tensor of the shape of `correct`, True leaves the entry out. What stands there has no influence.

        Raises:
            ValueError: If shapes or devices disagree, or values are out of range; the history is then unchanged.
            TypeError: If a dtype is wrong.
        """
        sizes = {} if self.num_labels is None else {"Q": self.num_labels}
        self._check_indices(indices, sizes)
        dims = "B" if self.num_labels is None else "B Q"
        if isinstance(correct, Tensor) and not (
            correct.dtype is torch.bool or correct.dtype.is_floating_point
        ):
            raise TypeError(
                f"Expected `correct` to have a bool or floating dtype, but got {correct.dtype}"
            )
        check_tensor("correct", correct, "number", dims, sizes, indices.device)
        if mask is None:
            mask = torch.zeros_like(correct, dtype=torch.bool)
        else:
            check_tensor("mask", mask, "bool", dims, sizes, indices.device)
        if checks_values(correct, self.validate_args):
            check_range("correct", correct, 0, 1, mask)
        if indices.shape[0] == 0:
            return
        # Equal samples side by side, in the order of the batch: the predecessor of an entry is its neighbour, or with a
        # mask the last entry before it that is not left out.
        indices, order = indices.long().sort(stable=True)
        correct, kept = correct.masked_fill(mask, 0)[order], ~mask[order]
        now = correct >= 0.5
        place = torch.arange(indices.shape[0], device=indices.device)
        column = (-1, *[1] * (now.dim() - 1))
        start = torch.searchsorted(indices, indices).view(column)
        latest = torch.where(kept, place.view(column), -1).cummax(0).values
        before = self._state_at(now, latest.roll(1, 0).index_fill(0, place[:1], -1), start, indices)
        forgotten = kept & (before == 1) & ~now
        exact = torch.promote_types(correct.dtype, torch.float32)
        amount = (correct.to(exact) * _UNIT).round().long()
        added = torch.stack([amount, kept.long(), forgotten.long()])
        self.history.index_add_(1, indices, added)
        # Every entry writes what the last one of its sample says, so that duplicates agree.
        end = torch.searchsorted(indices, indices, right=True) - 1
        self.last[indices] = self._state_at(now, latest[end], start, indices)

    def _state_at(self, now: Tensor, latest: Tensor, start: Tensor, indices: Tensor) -> Tensor:
        """Outcome of the entry `latest`, or what was known before the batch where that is of another sample."""
        return torch.where(latest >= start, now.gather(0, latest.clamp_min(0)), self.last[indices])

    def forward(self, indices: Tensor) -> Tensor:
        """Share of correct predictions so far.

        Args:
            indices: Integer tensor (B,), positions in the data set.

        Returns:
            Tensor (B,), or (B, Q) with `num_labels`, in [0, 1] and in the default dtype; `prior` where nothing has
            been seen.

        Raises:
            ValueError: If an index is out of range.
            TypeError: If the dtype is wrong.
        """
        self._check_indices(indices, {})
        dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)  # holds _UNIT
        correct, predictions = self.history[0, indices.long()], self.history[1, indices.long()]
        share: Tensor = correct.to(dtype) / _UNIT / predictions.clamp_min(1).to(dtype)
        return share.masked_fill(predictions == 0, self.prior).to(torch.get_default_dtype())

    def counts(self, indices: Tensor) -> Tensor:
        """Number of predictions seen, int64 of the shape of :meth:`forward`; the same errors."""
        self._check_indices(indices, {})
        return self.history[1, indices.long()]

    def forgetting_events(self, indices: Tensor) -> Tensor:
        """How often a correct prediction was followed by a wrong one (Toneva et al. 2018), int64; as :meth:`counts`."""
        self._check_indices(indices, {})
        return self.history[2, indices.long()]

    def reset(self) -> None:
        """Forgets everything."""
        self.history.zero_()
        self.merged.zero_()
        self.last.fill_(-1)

    def synchronize(self) -> None:
        """Merges the histories of all ranks; without `torch.distributed` there is nothing to merge.

        Every rank then holds the same history. Only what was added since the last call is exchanged, so nothing is
        counted twice. Call it on all ranks, for example at the end of an epoch. Where several ranks predicted a
        sample since the last call, its latest prediction counts as correct if it was on any of them.
        """
        if world_size() == 1:
            self.merged.copy_(self.history)
            return
        added = self.history - self.merged
        seen = added[1] > 0
        last = self.last.masked_fill(~seen, -1)
        dist.all_reduce(added)
        dist.all_reduce(last, op=dist.ReduceOp.MAX)
        self.merged += added
        self.history.copy_(self.merged)
        self.last.copy_(torch.where(last >= 0, last, self.last))
