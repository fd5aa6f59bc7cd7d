"""How often each sample was predicted correctly (section 3.4.2): :class:`CorrectnessTracker`."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from uncertainty_mm._checks import (
    check_positive_int,
    check_probability,
    check_range,
    check_tensor,
    check_unknown,
    check_validate_args,
    checks_values,
)
from uncertainty_mm._component import Component
from uncertainty_mm._recomputation import (
    function_hook,
    in_first_pass,
    may_be_recomputed,
    recomputing,
)
from uncertainty_mm.distributed import world_size

# Correctness is summed in integers, in units of 2^-32. Integer sums are exact in any order, so the history is
# deterministic on every device and bit-identical on all ranks, and `.half()` does not change it.
_UNIT = 2**32


_COMPILED = (
    "A compiled function that calls a CorrectnessTracker cannot be repeated by `torch.utils.checkpoint`: "
    "call the tracker outside of the checkpointed function, or do not compile it"
)


class _Call(NamedTuple):
    """The answer of a call, and the hook of the checkpointed function around it (None if none, or a reentrant one)."""

    method: str
    indices: Tensor
    answer: Tensor
    hook: weakref.ref[Any] | None


class _Calls:
    """The calls that a backward pass may repeat, with their answers; copies start without any."""

    def __init__(self) -> None:
        self.calls: list[_Call] = []
        self.place = (-1, -1)  # the last repetition: its backward pass and the index of its call

    def __reduce__(self) -> tuple[type[_Calls], tuple[()]]:
        return _Calls, ()

    def record(self, method: str, indices: Tensor, answer: Tensor) -> None:
        if not may_be_recomputed():
            return
        again = self.place[0] != -1
        # A hook dies with its graph. A reentrant function has none, so a call after a repetition starts a new step.
        live = [c for c in self.calls if (not again if c.hook is None else c.hook() is not None)]
        self.calls = [*live[-63:], _Call(method, indices.clone(), answer.clone(), function_hook())]
        self.place = (-1, -1)

    def recall(self, method: str, indices: Tensor) -> Tensor:
        """Returns the answer of the call that is being repeated."""
        hooked = function_hook() is not None
        places = [
            place
            for place, call in enumerate(self.calls)
            if call.method == method
            and (call.hook is not None and call.hook() is not None if hooked else call.hook is None)
            and torch.equal(call.indices, indices)
        ]
        first = self.calls[places[0]] if places else None
        if first is None:
            raise RuntimeError(
                f"`{method}` of a CorrectnessTracker was called in a backward pass, with indices that no call in the "
                "checkpointed forward pass had: call the tracker outside of the checkpointed function"
            )
        calls = [self.calls[place] for place in places]
        alike = all(torch.equal(call.answer, first.answer) for call in calls)
        if not alike and (first.hook is None or any(call.hook != first.hook for call in calls)):
            raise RuntimeError(
                f"`{method}` of a CorrectnessTracker was called before and after an update of the same indices, and "
                "a backward pass cannot tell which call it repeats: call the tracker outside of the checkpointed "
                "function"
            )
        # Within a function, calls are repeated in their original order.
        backward = torch._C._current_graph_task_id()
        last = self.place[1] if self.place[0] == backward else -1
        place = next((place for place in places if place > last), places[0])
        self.place = (backward, place)
        return self.calls[place].answer.clone()


class CorrectnessTracker(Component):
    r"""Remembers for every sample of the data set the share of predictions that have been correct so far.

    :class:`SoftRankOrdinalityLoss` compares uncertainty with this share :math:`r_i`, because easy samples are learned
    early and stay learned. The history is saved with the model, but is not a buffer, so weight averaging and
    `DistributedDataParallel` do not change it. Each rank keeps its own history until :meth:`synchronize`.

    Inside a function that `torch.utils.checkpoint` repeats in the backward pass, a prediction counts once, and a
    repeated reading returns the first answer.

    Source: Huang et al. 2025, arXiv 2502.13954, section 3.4.2; forgetting events: Toneva et al. 2018, arXiv 1812.05159.

    Args:
        num_samples: Number of samples of the data set; a sample is identified by its position.
        num_labels: None keeps one history per sample, a number :math:`Q` one per sample and label.
        prior: Share in [0, 1] that is reported where no prediction has been seen yet.
        validate_args: Check values (indices in range, correctness in [0, 1]) on the CPU only (None), never (False), or
            always (True), which stalls an accelerator. If unchecked, correctness that is not finite is left out, and
            other values are clamped to [0, 1].

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

    num_samples: int
    num_labels: int | None
    prior: float
    validate_args: bool | None
    history: Tensor
    last: Tensor
    merged: Tensor

    def __init__(
        self,
        num_samples: int,
        num_labels: int | None = None,
        *,
        prior: float = 0.5,
        validate_args: bool | None = None,
    ) -> None:
        super().__init__()
        check_positive_int("num_samples", num_samples)
        if num_labels is not None:
            check_positive_int("num_labels", num_labels)
        check_probability("prior", prior)
        check_validate_args(validate_args)
        self._set(
            num_samples=num_samples,
            num_labels=num_labels,
            prior=prior,
            validate_args=validate_args,
        )
        shape = (num_samples,) if num_labels is None else (num_samples, num_labels)
        self._keep(
            # rows: correctness in units of 1 / _UNIT, predictions, forgetting events
            history=torch.empty(3, *shape, dtype=torch.int64),
            # the latest prediction: 1 correct, 0 wrong, -1 none yet
            last=torch.empty(shape, dtype=torch.int8),
        )
        # the part of `history` that all ranks share; not saved, since a loaded history is shared by all
        self.merged = torch.empty_like(self.history)
        self._calls = _Calls()
        self.reset_parameters()

    def _check_indices(self, indices: Tensor, sizes: dict[str, int]) -> None:
        check_tensor("indices", indices, "integer", "B", sizes, self.last.device)
        if checks_values(indices, self.validate_args) and indices.numel():
            low, high = (int(x) for x in indices.aminmax())  # 8 bits cannot be compared with 200
            if low < 0 or high >= self.num_samples:
                raise ValueError(
                    f"Expected `indices` to be in [0, {self.num_samples - 1}], "
                    f"but got values from {low} to {high}"
                )

    def update(
        self,
        indices: Tensor,
        correct: Tensor,
        mask: Tensor | None = None,
        unknown: Tensor | None = None,
    ) -> None:
        """Records one prediction for every entry of a batch.

        Args:
            indices: Integer tensor (B,), positions in the data set. Every occurrence of a sample counts, in the order
                of the batch.
            correct: Tensor (B,), or (B, Q) with `num_labels`: bool, or float in [0, 1] for soft correctness (for
                forgetting events, at least 0.5 counts as correct).
            mask: Bool tensor of the shape of `correct`, True to leave the entry out. Values there are ignored.
            unknown: Bool tensor (B, Q), only with `num_labels`: True where a label is not known, which is left out.

        Raises:
            ValueError: If shapes or devices disagree, or values are out of range; the history is then unchanged.
            TypeError: If a dtype is wrong.
            RuntimeError: In a repeated forward pass, if the first pass did not have these indices.
        """
        self._check_remembers()
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
        check_tensor("mask", mask, "bool", dims, sizes, indices.device)
        if unknown is not None:
            if self.num_labels is None:
                raise ValueError(
                    "Expected `unknown` only with `num_labels`, but got it without; leave samples out by `mask`"
                )
            check_unknown(unknown, dims, sizes, indices.device)
            mask = mask | unknown
        if checks_values(correct, self.validate_args):
            check_range("correct", correct, 0, 1, mask)
        if torch.compiler.is_compiling():
            indices = in_first_pass(indices, _COMPILED)
        elif recomputing():
            self._calls.recall("update", indices)
            return
        else:
            self._calls.record("update", indices, indices)
        if indices.shape[0] == 0:
            return
        correct = correct.detach().to(torch.promote_types(correct.dtype, torch.float32))
        mask = mask | ~correct.isfinite()
        # Sorting brings entries of one sample together, in the order of the batch, so the predecessor of an entry is
        # the last one before it that is not left out.
        indices, order = indices.long().sort(stable=True)
        correct, kept = correct.masked_fill(mask, 0).clamp(0, 1)[order], ~mask[order]
        now = correct >= 0.5
        place = torch.arange(indices.shape[0], device=indices.device)
        column = (-1, *[1] * (now.dim() - 1))
        start = torch.searchsorted(indices, indices).view(column)
        latest = torch.where(kept, place.view(column), -1).cummax(0).values
        before = self._state_at(now, latest.roll(1, 0).index_fill(0, place[:1], -1), start, indices)
        forgotten = kept & (before == 1) & ~now
        amount = (correct * _UNIT).round().long()
        self.history.index_add_(1, indices, torch.stack([amount, kept.long(), forgotten.long()]))
        # Every entry writes the outcome of the last one of its sample, so that duplicates agree.
        end = torch.searchsorted(indices, indices, right=True) - 1
        self.last[indices] = self._state_at(now, latest[end], start, indices)

    def _state_at(self, now: Tensor, latest: Tensor, start: Tensor, indices: Tensor) -> Tensor:
        """Outcome of the entry `latest`; where that is another sample's, the outcome known before the batch."""
        return torch.where(latest >= start, now.gather(0, latest.clamp_min(0)), self.last[indices])

    def forward(self, indices: Tensor) -> Tensor:
        """Returns the share of correct predictions so far.

        Args:
            indices: Integer tensor (B,), positions in the data set.

        Returns:
            Tensor (B,), or (B, Q) with `num_labels`, in [0, 1] and in the default dtype; `prior` where no prediction
            has been seen.

        Raises:
            ValueError: If an index is out of range.
            TypeError: If the dtype is wrong.
            RuntimeError: In a repeated forward pass, if the first pass did not have these indices.
        """
        return self._read("forward", indices, self._share)

    def _share(self, history: Tensor) -> Tensor:
        dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)  # holds _UNIT
        correct, predictions, _ = history
        share: Tensor = correct.to(dtype) / _UNIT / predictions.clamp_min(1).to(dtype)
        return share.masked_fill(predictions == 0, self.prior).to(torch.get_default_dtype())

    def counts(self, indices: Tensor) -> Tensor:
        """Number of predictions seen, as int64 with the shape and the errors of :meth:`forward`."""
        return self._read("counts", indices, lambda history: history[1])

    def forgetting_events(self, indices: Tensor) -> Tensor:
        """Number of times that a wrong prediction followed a correct one (Toneva et al. 2018); as :meth:`counts`."""
        return self._read("forgetting_events", indices, lambda history: history[2])

    def _read(self, method: str, indices: Tensor, of: Callable[[Tensor], Tensor]) -> Tensor:
        self._check_indices(indices, {})
        if torch.compiler.is_compiling():
            return of(self.history[:, in_first_pass(indices, _COMPILED).long()])
        if recomputing():
            return self._calls.recall(method, indices)
        answer = of(self.history[:, indices.long()])
        self._calls.record(method, indices, answer)
        return answer

    def reset(self) -> None:
        """Forgets everything."""
        self.history.zero_()
        self.merged.zero_()
        self.last.fill_(-1)

    def reset_parameters(self) -> None:
        """The same as :meth:`reset`, under the name that torch's own modules use."""
        self.reset()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CorrectnessTracker:
        super()._apply(fn, recurse)
        self.merged = fn(self.merged)
        return self

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        problems = len(missing_keys) + len(error_msgs)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        loaded = len(missing_keys) + len(error_msgs) == problems
        if loaded and f"{prefix}history" in state_dict:
            self.merged = self.history.clone()

    def synchronize(self, process_group: dist.ProcessGroup | None = None) -> None:
        """Merges the histories of all ranks; without `torch.distributed` there is nothing to merge.

        Every rank then has the same history. Only what was added since the last call is exchanged, so nothing is
        counted twice. Call it on all ranks, for example at the end of an epoch. If several ranks predicted a sample
        since the last call, its latest prediction counts as correct if it was correct on any of them.

        Args:
            process_group: The ranks that merge; None for all. Always pass the same group, or part of the history is
                counted twice.
        """
        if world_size() == 1:
            self.merged.copy_(self.history)
            return
        added = self.history - self.merged
        seen = added[1] > 0
        last = self.last.masked_fill(~seen, -1)
        dist.all_reduce(added, group=process_group)
        dist.all_reduce(last, op=dist.ReduceOp.MAX, group=process_group)
        self.merged += added
        self.history.copy_(self.merged)
        self.last.copy_(torch.where(last >= 0, last, self.last))
