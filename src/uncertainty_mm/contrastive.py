"""Distributions of one emotion attract each other (Eq. 4-7): :class:`DistributionSupConLoss`."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from uncertainty_mm._checks import (
    check_choice,
    check_flag,
    check_labels,
    check_positive,
    check_positive_int,
    check_tensor,
    checks_values,
    load_all_or_nothing,
)
from uncertainty_mm._supcon import supcon
from uncertainty_mm.distributed import (
    gather_rows,
    largest_of_ranks,
    sum_over_ranks,
    world_size,
)
from uncertainty_mm.gaussian import DiagonalGaussian, check_latent


class DistributionSupConLoss(nn.Module):
    r"""Supervised contrastive loss between the Gaussians of a batch and a queue of earlier ones.

    The class of a distribution is its modality, its label, and whether the label is present in the sample:
    :math:`mQ + q` when present, :math:`MQ + mQ + q` when absent. With the embedding :math:`e` of Eq. 4 and the
    temperature :math:`\tau`, an anchor's loss is

    .. math::
        \ell_e = -\frac{1}{|P_e|} \sum_{p \in P_e}
        \log \frac{\exp(e^\top p / \tau)}{\sum_{k \in T_e} \exp(e^\top k / \tau)}
        \qquad \text{(Eq. 5-7)}

    where :math:`T_e` are all distributions of batch and queue except :math:`e` itself and :math:`P_e` those of its
    class. The batch is compared with the queue as it was and then takes the place of the queue's oldest rows. Time
    grows with the number of anchors times the number of keys; memory does not
    (:func:`~uncertainty_mm.functional.supcon_loss`).

    Source: Huang et al. 2025, arXiv 2502.13954, section 3.3.3; queue: He et al. 2020, arXiv 1911.05722.

    Args:
        num_modalities: Number of modalities :math:`M`.
        num_labels: Number of labels :math:`Q`.
        latent_dim: Number of latent dimensions :math:`K`.
        queue_size: Number of distributions that are remembered; 0 for none.
        temperature: :math:`\tau`, above 0. The similarity :math:`e^\top k` is in [-2, 2].
        anchors: `"present"` makes the distributions of present labels anchors (the paper's :math:`B^+`), `"all"` also
            those of absent ones.
        use_mean: Include the normalised mean in the embedding.
        use_std: Include the normalised standard deviation in the embedding.
        joint: Divide mean and standard deviation by the length of both together instead of each by its own (Eq. 4);
            see :meth:`DiagonalGaussian.embedding`. The similarity is then in [-1, 1].
        reduction: `"mean"` over the anchors that have a positive, `"sum"`, or `"none"`.
        gather: Under `torch.distributed`, take keys from all ranks, with gradient. After averaging over ranks, as
            `DistributedDataParallel` does, the gradient is that of one process on the joined batch, the value of the
            loss is the same on all ranks, and so is the queue. The ranks may have batches of different sizes, none at
            all included. With `"none"` every rank has the losses of its own anchors. An argument that is refused on
            one rank leaves the others waiting.
        max_batch_size: Largest batch that any rank will ever have; a larger one is refused. Pass it with `gather`: all
            ranks then exchange as many rows, smaller batches being padded with rows that take no part. None makes the
            ranks ask each other for the largest batch at every step, for which the host waits, and which cannot be
            compiled with `fullgraph=True`.
        bf16_products: Compute the matrix products in bfloat16; see :func:`~uncertainty_mm.functional.supcon_loss`.
        validate_args: Look at values (NaN, labels other than 0 and 1) also on an accelerator, at the price of a wait.

    Attributes:
        queue: Buffer (queue_size, E), embeddings of earlier distributions.
        queue_classes: Buffer (queue_size,), int64 classes of the queue, -1 for an empty slot.
        queue_pointer: Buffer (), int64, the slot that is written next.

    Raises:
        ValueError: If an argument is out of range or unknown.
        TypeError: If an argument has the wrong type.

    Example:
        >>> loss = DistributionSupConLoss(num_modalities=3, num_labels=6, latent_dim=8, queue_size=100)
        >>> latent = DiagonalGaussian(torch.randn(4, 3, 6, 8), torch.rand(4, 3, 6, 8) + 0.1)
        >>> labels = torch.randint(0, 2, (4, 6))
        >>> loss(latent, labels).shape
        torch.Size([])
        >>> loss.queue_length  # 4 samples x 3 modalities x 6 labels
        72
    """

    queue: Tensor
    queue_classes: Tensor
    queue_pointer: Tensor

    def __init__(
        self,
        num_modalities: int,
        num_labels: int,
        latent_dim: int,
        *,
        queue_size: int = 8192,
        temperature: float = 0.07,
        anchors: str = "present",
        use_mean: bool = True,
        use_std: bool = True,
        joint: bool = False,
        reduction: str = "mean",
        gather: bool = False,
        max_batch_size: int | None = None,
        bf16_products: bool = False,
        validate_args: bool = False,
    ) -> None:
        super().__init__()
        check_positive_int("num_modalities", num_modalities)
        check_positive_int("num_labels", num_labels)
        check_positive_int("latent_dim", latent_dim)
        if queue_size != 0 or isinstance(queue_size, bool):
            check_positive_int("queue_size", queue_size)
        check_positive("temperature", temperature)
        check_choice("anchors", anchors, ("present", "all"))
        check_flag("use_mean", use_mean)
        check_flag("use_std", use_std)
        check_flag("joint", joint)
        if not (use_mean or use_std):
            raise ValueError("Expected `use_mean` or `use_std` to be True, but got False for both")
        check_choice("reduction", reduction, ("none", "mean", "sum"))
        check_flag("gather", gather)
        if max_batch_size is not None:
            check_positive_int("max_batch_size", max_batch_size)
        check_flag("bf16_products", bf16_products)
        self.num_modalities = num_modalities
        self.num_labels = num_labels
        self.latent_dim = latent_dim
        self.queue_size = queue_size
        self.temperature = temperature
        self.anchors = anchors
        self.use_mean = use_mean
        self.use_std = use_std
        self.joint = joint
        self.reduction = reduction
        self.gather = gather
        self.max_batch_size = max_batch_size
        self.bf16_products = bf16_products
        check_flag("validate_args", validate_args)
        self.validate_args = validate_args
        self.register_buffer("queue", torch.zeros(queue_size, latent_dim * (use_mean + use_std)))
        self.register_buffer("queue_classes", torch.full((queue_size,), -1))
        self.register_buffer("queue_pointer", torch.tensor(0))
        self.register_load_state_dict_pre_hook(load_all_or_nothing)  # type: ignore[no-untyped-call]

    def extra_repr(self) -> str:
        """The settings, for `repr`."""
        return (
            f"queue_size={self.queue_size}, temperature={self.temperature}, anchors={self.anchors!r}, "
            f"use_mean={self.use_mean}, use_std={self.use_std}, joint={self.joint}, "
            f"reduction={self.reduction!r}, gather={self.gather}, max_batch_size={self.max_batch_size}, "
            f"bf16_products={self.bf16_products}"
        )

    @property
    def queue_length(self) -> int:
        """Number of distributions in the queue (on an accelerator, makes the host wait)."""
        return int((self.queue_classes >= 0).sum())

    def reset_queue(self) -> None:
        """Empties the queue."""
        self.queue.zero_()
        self.queue_classes.fill_(-1)
        self.queue_pointer.zero_()

    def forward(
        self,
        latent: DiagonalGaussian,
        labels: Tensor,
        missing: Tensor | None = None,
        *,
        enqueue: bool | None = None,
    ) -> Tensor:
        """Computes the loss of a batch, then lets the batch into the queue.

        Args:
            latent: Gaussians of shape (B, M, Q, K).
            labels: Tensor (B, Q) of 0 and 1, any real dtype.
            missing: Bool tensor (B, M), True where a modality is missing: its distributions are neither anchors nor
                keys and do not enter the queue. What `latent` holds there has no influence.
            enqueue: Whether the batch enters the queue, in the order of `latent`; None means in training mode.

        Returns:
            Scalar, or (B, M, Q) for `"none"` with 0 where a distribution is no anchor or has no positive; in at least
            float32. 0 with zero gradient if there is no anchor with a positive.

        Raises:
            ValueError: If shapes or devices disagree, the batch is larger than `max_batch_size`, or values are out of
                range.
            TypeError: If a dtype is wrong.
        """
        if enqueue is not None:
            check_flag("enqueue", enqueue)
        sizes = {"M": self.num_modalities, "Q": self.num_labels, "K": self.latent_dim}
        check_latent(latent, missing, sizes, self.validate_args)
        check_tensor("labels", labels, "number", "B Q", sizes, latent.mean.device)
        if self.queue.device != labels.device:
            raise ValueError(
                f"Expected `latent` to be on {self.queue.device}, but got {labels.device}"
            )
        if self.max_batch_size is not None and labels.shape[0] > self.max_batch_size:
            raise ValueError(
                f"Expected `latent` to have at most `max_batch_size` = {self.max_batch_size} samples, "
                f"but got {labels.shape[0]}"
            )
        if checks_values(labels, self.validate_args):
            check_labels("labels", labels)
        embeddings, classes = self._distributions(latent, labels != 0, missing)
        if self.gather and world_size() > 1:
            loss, embeddings, classes = self._gathered_loss(embeddings, classes)
        else:
            loss = self._loss(embeddings, classes, self._anchors(classes), self.reduction)
        if self.training if enqueue is None else enqueue:
            self._enqueue(embeddings.detach(), classes)
        return loss.unflatten(0, latent.mean.shape[:3]) if self.reduction == "none" else loss

    def _distributions(
        self, latent: DiagonalGaussian, present: Tensor, missing: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Embedding and class (-1 if missing) of each distribution of the batch."""
        dtype = torch.promote_types(latent.mean.dtype, torch.float32)
        mean, std = latent.mean.to(dtype), latent.std.to(dtype)
        per_modality = present.unsqueeze(1)
        classes = torch.arange(self.num_modalities * self.num_labels, device=present.device)
        classes = classes.view(self.num_modalities, self.num_labels)
        classes = torch.where(per_modality, classes, classes + classes.numel())
        if missing is not None:
            left_out = missing.unsqueeze(-1)
            classes = classes.masked_fill(left_out, -1)
            mean, std = (x.masked_fill(left_out.unsqueeze(-1), 0) for x in (mean, std))
        embeddings = DiagonalGaussian(mean, std).embedding(self.use_mean, self.use_std, self.joint)
        return embeddings.flatten(0, 2), classes.flatten()

    def _anchors(self, classes: Tensor) -> Tensor:
        """Which distributions are anchors if they have a positive."""
        present = self.num_modalities * self.num_labels
        return (classes >= 0) & (classes < (present if self.anchors == "present" else 2 * present))

    def _loss(self, embeddings: Tensor, classes: Tensor, anchors: Tensor, reduction: str) -> Tensor:
        return supcon(
            embeddings,
            classes,
            anchors,
            self.queue,
            self.queue_classes,
            self.temperature,
            reduction,
            self.bf16_products,
        )

    def _gathered_loss(self, embeddings: Tensor, classes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Loss of this rank's anchors among the keys of all ranks; also returns these keys and their classes.

        Every rank contributes the same number of rows, the last of them of class -1.
        """
        per_sample = self.num_modalities * self.num_labels
        num_rows = classes.shape[0]
        largest = self.max_batch_size
        if largest is None:
            largest = largest_of_ranks(num_rows // per_sample, classes.device)
        capacity = largest * per_sample
        keys, key_classes = gather_rows(
            F.pad(embeddings, (0, 0, 0, capacity - num_rows)),
            F.pad(classes, (0, capacity - num_rows), value=-1),
        )
        # For the loss, rows of this rank come first: its anchors are among them.
        own_first = -dist.get_rank() * capacity
        batch, batch_classes = keys.roll(own_first, 0), key_classes.roll(own_first, 0)
        anchors = self._anchors(batch_classes)
        if self.reduction == "none":
            losses = self._loss(batch, batch_classes, anchors[:capacity], "none")
            return losses[:num_rows], keys, key_classes
        loss = self._loss(batch, batch_classes, anchors[:capacity], "sum")
        if self.reduction == "mean":
            loss = loss / self._count_anchors(batch_classes, anchors).clamp_min(1)
        # The value of the joined batch, with this rank's share of the gradient, which averaging will divide.
        share = loss * world_size()
        return sum_over_ranks(loss.detach()) + (share - share.detach()), keys, key_classes

    def _count_anchors(self, classes: Tensor, anchors: Tensor) -> Tensor:
        """Number of anchors that have a positive in batch or queue."""
        keys = torch.cat([classes, self.queue_classes]) + 1  # class -1 is counted apart, at 0
        counts = torch.zeros(2 * self.num_modalities * self.num_labels + 1, device=keys.device)
        counts = counts.index_add_(0, keys, torch.ones_like(keys, dtype=counts.dtype))
        return (anchors & (counts[classes + 1] > 1)).sum()

    def _enqueue(self, embeddings: Tensor, classes: Tensor) -> None:
        """Writes the rows that are not missing behind the pointer, the newest of them if the queue cannot hold all.

        All shapes are static: as many slots are written as there might be rows. Slots beyond the actual rows repeat
        the first row, in its own slot.
        """
        room = min(self.queue_size, classes.shape[0])
        if room == 0:
            return
        kept = classes >= 0
        in_order = torch.argsort((~kept).to(torch.uint8), stable=True)
        count = kept.sum()
        place = (count - 1 - torch.arange(room, device=classes.device)).clamp_min(0)
        slot = (self.queue_pointer + place) % self.queue_size
        row = in_order[place]
        some = count > 0
        self.queue[slot] = torch.where(some, embeddings[row].to(self.queue.dtype), self.queue[slot])
        self.queue_classes[slot] = torch.where(some, classes[row], self.queue_classes[slot])
        self.queue_pointer.add_(count).remainder_(self.queue_size)
