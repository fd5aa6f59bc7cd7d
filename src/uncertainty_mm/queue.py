"""Embeddings of earlier batches as further keys (He et al. 2020): :class:`EmbeddingQueue`."""

from __future__ import annotations

import weakref
from collections import deque
from typing import Any, NamedTuple

import torch
from torch import Tensor

from uncertainty_mm._checks import (
    check_finite,
    check_positive_int,
    check_tensor,
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

_CHANGED = (
    "The queue may no longer be what a checkpointed forward pass saw that is now computed again, so the gradient would "
    "be wrong. Call the loss outside the checkpointed function (a compiled loss in any case), or there with "
    "`enqueue=False`, and `enqueue` after the backward pass"
)
# Two sums of rows that differ by less come from the same batch: a recomputation gives the same bits, except where the
# order of summation is random.
_SAME = 1e-3
_PASSES = 64  # forward passes that are remembered for a backward pass


class _Pass(NamedTuple):
    """A forward pass that may be repeated: the sum of the rows of its batch, and the version of the queue.

    The hook is that of the checkpointed function around it; None if there is none, or it is reentrant.
    """

    mark: Tensor
    version: int
    hook: weakref.ref[Any] | None


class _Passes:
    """What recomputations need to know. It is not state, so copies start empty.

    It holds the forward passes, the rows that the last batch has overwritten with the versions of the queue before and
    after it, and whether a pass was repeated since the last new one.
    """

    def __init__(self) -> None:
        self.seen: deque[_Pass] = deque(maxlen=_PASSES)
        self.overwritten: tuple[Tensor, Tensor, Tensor, int, int] | None = None
        self.went_back = False

    def __reduce__(self) -> tuple[type[_Passes], tuple[()]]:
        return _Passes, ()


class EmbeddingQueue(Component):
    r"""Remembers the newest embeddings of earlier batches, so that a batch is compared with more keys than its own.

    It works with any embeddings: pass its rows as the `bank` of :func:`~uncertainty_mm.functional.supcon_loss`, and add
    the batch afterwards. Normalise the embeddings first, because the similarity is a plain dot product and long rows
    make huge losses.

    Its state follows `.to()` and is in `state_dict()`, but not in `buffers()`: every rank of `DistributedDataParallel`
    keeps its own.

    Source: He et al. 2020, arXiv 1911.05722 (without its momentum encoder).

    Args:
        size: Number of rows that are remembered; 0 for none.
        dim: Number of features :math:`E` of a row.
        validate_args: Check values (NaN, infinity) on the CPU only (None), never (False), or always (True).

    Attributes:
        rows: Tensor (size, E).
        classes: Int64 tensor (size,), -1 for an empty slot.
        pointer: Int64 tensor (), the slot that is written next.

    Raises:
        ValueError: If an argument is out of range.
        TypeError: If an argument has the wrong type.

    Example:
        >>> import torch.nn.functional as F
        >>> from uncertainty_mm import functional
        >>> queue = EmbeddingQueue(size=100, dim=8)
        >>> for _ in range(3):
        ...     embeddings = F.normalize(torch.randn(16, 8, requires_grad=True), dim=1)
        ...     classes = torch.randint(5, (16,))
        ...     loss = functional.supcon_loss(
        ...         embeddings, classes, bank=queue.rows, bank_classes=queue.classes
        ...     )
        ...     loss.backward()
        ...     queue.enqueue(embeddings, classes)
        >>> queue.length
        48
    """

    size: int
    dim: int
    validate_args: bool | None
    rows: Tensor
    classes: Tensor
    pointer: Tensor

    def __init__(self, size: int, dim: int, *, validate_args: bool | None = None) -> None:
        super().__init__()
        if size != 0 or isinstance(size, bool):
            check_positive_int("size", size)
        check_positive_int("dim", dim)
        check_validate_args(validate_args)
        self._set(size=size, dim=dim, validate_args=validate_args)
        self._keep(
            rows=torch.empty(size, dim),
            classes=torch.empty(size, dtype=torch.int64),
            pointer=torch.empty((), dtype=torch.int64),
        )
        self._passes = _Passes()
        self.reset_parameters()

    @property
    def length(self) -> int:
        """Number of rows in the queue; reading it makes the host wait for an accelerator."""
        return int((self.classes >= 0).sum())

    def reset(self) -> None:
        """Empties the queue."""
        self.rows.zero_()
        self.classes.fill_(-1)
        self.pointer.zero_()
        self._passes = _Passes()

    def reset_parameters(self) -> None:
        """Empties the queue, under the name by which torch initialises modules made on the meta device."""
        self.reset()

    def enqueue(self, rows: Tensor, classes: Tensor) -> None:
        """Adds rows to the queue in their order, replacing the oldest; of more rows than it can hold, the last stay.

        Under gradient checkpointing, call it outside the checkpointed function and after the backward pass.

        Args:
            rows: Tensor (N, E), which is detached.
            classes: Integer tensor (N,). Rows with a negative class are left out; where values are not checked, so are
                rows that are not finite.

        Raises:
            ValueError: If shapes or devices disagree, or a row is not finite.
            TypeError: If a dtype is wrong.
            RuntimeError: If gradient checkpointing repeats the call.
        """
        device, sizes = self.rows.device, {"E": self.dim}
        check_tensor("rows", rows, "floating", "N E", sizes, device)
        check_tensor("classes", classes, "integer", "N", sizes, device)
        if checks_values(rows, self.validate_args):
            check_finite("rows", rows, (classes < 0).unsqueeze(1))
        classes = classes.long()
        if torch.compiler.is_compiling():
            classes = in_first_pass(classes, _CHANGED)
        elif recomputing():
            raise RuntimeError(_CHANGED)
        elif torch.is_grad_enabled():
            # Saves a tensor for the backward pass, so that a recomputation does not stop before it gets here.
            torch.zeros((), requires_grad=True).square()
        self._write(rows.detach(), classes)

    def _write(self, rows: Tensor, classes: Tensor) -> None:
        """Writes the rows that count, starting at the pointer.

        All shapes are static: as many slots are written as there might be rows, and those beyond the actual rows write
        the first row to its own slot again.
        """
        self._check_remembers()
        room = min(self.size, classes.shape[0])
        if room == 0:
            return
        rows = rows.to(self.rows.dtype)  # before the test, since a narrower dtype may overflow
        kept = (classes >= 0) & rows.isfinite().all(1)
        in_order = torch.argsort((~kept).to(torch.uint8), stable=True)
        count = kept.sum()
        place = (count - 1 - torch.arange(room, device=classes.device)).clamp_min(0)
        slot = (self.pointer + place) % self.size
        row = in_order[place]
        some = count > 0
        old_rows, old_classes, version = self.rows[slot], self.classes[slot], self._age()
        self.rows[slot] = torch.where(some, rows[row], old_rows)
        self.classes[slot] = torch.where(some, classes[row], old_classes)
        self.pointer.add_(count).remainder_(self.size)
        if not torch.compiler.is_compiling():
            self._passes.overwritten = slot, old_rows, old_classes, version, self._age()

    def _read(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        """Rows and classes for the loss of a batch; in a recomputation, those that its forward pass saw.

        A recomputation has only the batch, by which its forward pass is found. If one batch has entered the queue
        since then, that is undone; after more than one, an error is raised. None of this waits for an accelerator.
        """
        if self.size == 0:
            return self.rows, self.classes
        if torch.compiler.is_compiling():
            return self.rows, in_first_pass(self.classes, _CHANGED)
        version, again = self._age(), recomputing()
        lasting = not again and not may_be_recomputed()
        if lasting or torch._C._functorch.is_functorch_wrapped_tensor(batch):
            return self.rows, self.classes
        mark, memory = batch.detach().nan_to_num(0, 0, 0).sum(0), self._passes
        hook = function_hook()
        if not again:
            if memory.went_back:  # earlier passes are over, except those at the present version
                left = (x for x in memory.seen if x.version == version)
                memory.seen, memory.went_back = deque(left, _PASSES), False
            memory.seen.append(_Pass(mark, version, hook))
            return self.rows, self.classes
        memory.went_back = True
        before, overwritten = None, memory.overwritten
        if overwritten is not None and overwritten[-1] == version:
            before = overwritten[-2]
        # A reentrant function has no hook, neither in its first pass nor in its recomputation.
        seen = [
            x
            for x in memory.seen
            if x.mark.device == mark.device
            and (x.hook is None if hook is None else x.hook is not None and x.hook() is not None)
        ]
        undo = _is_among(mark, [x.mark for x in seen if x.version == before])
        now = _is_among(mark, [x.mark for x in seen if x.version == version])
        gone = _is_among(mark, [x.mark for x in seen if x.version not in (before, version)])
        found = (undo ^ now) & ~gone
        if found.device.type != "cpu":
            torch._assert_async(found, _CHANGED)
        elif not found:
            raise RuntimeError(_CHANGED)
        if before is None or overwritten is None:
            return self.rows, self.classes
        slot, old_rows, old_classes, _, _ = overwritten
        rows, classes = (
            self.rows.index_put((slot,), old_rows),
            self.classes.index_put((slot,), old_classes),
        )
        return torch.where(undo, rows, self.rows), torch.where(undo, classes, self.classes)

    def _age(self) -> int:
        """The version of the queue: a number that changes whenever the rows do."""
        untracked = torch.compiler.is_compiling() or self.rows.is_inference()
        return 0 if untracked else self.rows._version


def _is_among(mark: Tensor, marks: list[Tensor]) -> Tensor:
    """Whether the mark is one of the marks."""
    if not marks:
        return torch.zeros((), dtype=torch.bool, device=mark.device)
    return ((torch.stack(marks) - mark).abs().amax(1) <= _SAME).any()
