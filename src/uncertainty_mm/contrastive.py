"""Supervised contrastive learning between distributions (Eq. 4-7): :class:`DistributionSupConLoss`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from uncertainty_mm._checks import (
    check_choice,
    check_flag,
    check_labels,
    check_positive,
    check_positive_int,
    check_positive_ints,
    check_tensor,
    check_unknown,
    check_validate_args,
    checks_values,
)
from uncertainty_mm._component import Component
from uncertainty_mm._recomputation import recomputing
from uncertainty_mm._supcon import Reduction, supcon
from uncertainty_mm.distributed import gather_rows, group_name, rank, sum_over_ranks, world_size
from uncertainty_mm.functional import EmbeddingKind, embed
from uncertainty_mm.gaussian import DiagonalGaussian, DistanceKind, check_latent
from uncertainty_mm.queue import EmbeddingQueue

if TYPE_CHECKING:
    import torch.distributed as dist

Anchors = Literal["present", "all"]
Similarity = Literal["cosine", DistanceKind]

# What stands for a distribution in the queue, by its number in a `state_dict`.
_ROWS = {
    "joint": "similarity 'cosine' of embedding 'joint'",
    "both": "similarity 'cosine' of embedding 'both'",
    "mean": "similarity 'cosine' of embedding 'mean'",
    "std": "similarity 'cosine' of embedding 'std'",
    "gaussian": "similarity 'wasserstein' or 'sampled'",
}
# What is further away than this counts as this far, so that squared distances are numbers in float32.
_FARTHEST = 1e16


class _Queue(EmbeddingQueue):
    """A queue that says in its state what its rows are and how their classes are numbered, and loads no other."""

    def __init__(
        self, size: int, dim: int, meaning: tuple[str, int, int], validate_args: bool | None
    ) -> None:
        super().__init__(size, dim, validate_args=validate_args)
        self._keep_meaning(list(_ROWS).index(meaning[0]), *meaning[1:])
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self._reset_meaning()

    def _get_name(self) -> str:
        return EmbeddingQueue.__name__

    def _in_words(self, meaning: tuple[int, ...]) -> str:
        rows, num_modalities, num_labels = meaning
        kind = dict(enumerate(_ROWS.values())).get(rows, "unknown rows")
        return f"{kind}, `num_modalities` {num_modalities}, `num_labels` {num_labels}"


class DistributionSupConLoss(Component):
    r"""Draws Gaussians of one class together and pushes the others away, within a batch and a queue of earlier ones.

    The class of a distribution is its modality, its label, and whether the label is present in the sample:
    :math:`mQ + q` if it is present, :math:`MQ + mQ + q` if it is absent. With the embedding :math:`e` of Eq. 4 and the
    temperature :math:`\tau`, the loss of an anchor is

    .. math::
        \ell_e = -\frac{1}{|P_e|} \sum_{p \in P_e}
        \log \frac{\exp(e^\top p / \tau)}{\sum_{k \in T_e} \exp(e^\top k / \tau)}
        \qquad \text{(Eq. 5-7)}

    where :math:`T_e`, the keys, are all distributions of batch and queue except :math:`e` itself, and :math:`P_e`, the
    positives, are the keys of its class. The batch is first compared with the queue and then replaces its oldest rows.
    Time grows with the number of anchors times the number of keys, but memory does not
    (:func:`~uncertainty_mm.functional.supcon_loss`).

    What to expect: the loss starts near the logarithm of the number of keys (9 for a full default queue), rises while
    the queue fills, and cannot fall below the logarithm of the number of positives, so a loss that seems stuck at 5 or
    6 may have nearly converged. The default queue holds 8192 distributions: 97 samples with three modalities and 28
    labels, or 455 with 6 labels.

    By default the similarity of two distributions is the cosine of their embeddings. If `similarity` names a distance
    :math:`d`, then :math:`-d / 2K` replaces :math:`e^\top k`, where for Gaussians in :math:`K` dimensions

    .. math::
        d = \lVert \mu_1 - \mu_2 \rVert^2 + \begin{cases}
        \lVert \sigma_1 - \sigma_2 \rVert^2 & \text{(wasserstein)} \\
        \lVert \sigma_1 \rVert^2 + \lVert \sigma_2 \rVert^2 & \text{(sampled)}
        \end{cases}

    so that the size of every standard deviation counts. The temperature has the same meaning as for the cosine: for
    means of length :math:`\sqrt K`, as from :class:`~uncertainty_mm.GaussianDecoupler`, and equal standard deviations,
    :math:`-d / 2K` is the cosine of the means minus a constant. Terms of the anchor alone cancel in the softmax, so
    `"sampled"` depends on the standard deviations of the keys only: a key with a large one is far from every anchor.
    Means and standard deviations beyond 1e16 count as that, so that every distance is a number.

    Under gradient checkpointing the recomputation sees the queue as the forward pass saw it, and does not enqueue
    again. Where that is impossible (two forward passes before the backward pass, a compiled loss that enqueues), an
    error is raised.

    Source: Huang et al. 2025, arXiv 2502.13954, section 3.3.3; queue: He et al. 2020, arXiv 1911.05722;
    `"sampled"`: the closed-form sampled distance of Chun 2024, arXiv 2305.18171; `"wasserstein"`: Dowson and Landau
    1982, doi 10.1016/0047-259X(82)90077-X.

    Args:
        num_modalities: Number of modalities :math:`M`.
        num_labels: Number of labels :math:`Q`.
        latent_dim: Number of latent dimensions :math:`K`.
        queue_size: Number of distributions that the queue remembers; 0 for no queue.
        temperature: :math:`\tau`, above 0.
        anchors: `"all"` makes all distributions of the batch anchors, `"present"` only those of present labels (the
            paper's :math:`B^+`).
        embedding: Vector that represents a distribution, for the cosine only. `"joint"`: mean and standard deviation
            divided by their common length, so that the size of the standard deviation counts (similarity in [-1, 1]);
            `"both"`: each divided by its own length (Eq. 4, the paper; similarity in [-2, 2]); `"mean"` or `"std"`:
            one of them alone.
        similarity: `"cosine"`: the product of the embeddings; `"wasserstein"`: minus the squared 2-Wasserstein
            distance; `"sampled"`: minus the expected squared distance between one draw from each distribution.
        reduction: `"mean"` over the anchors that have a positive, `"sum"`, or `"none"`.
        gather: Under `torch.distributed`, take the keys of all ranks, with gradient. After averaging over ranks, as
            `DistributedDataParallel` does, the gradient is that of one process on the joined batch; loss and queue are
            the same on all ranks. Batches may differ in size between ranks, or be empty. With reduction `"none"` every
            rank gets the losses of its own anchors. If one rank refuses an argument, the others wait for it. Without
            `gather` every rank has its own queue, which `DistributedDataParallel` does not touch.
        process_group: With `gather`, the ranks that take part; None for all.
        max_batch_size: Size of the largest batch that any rank will have; a larger one is refused. Pass it with
            `gather`: smaller batches are then padded, so that all ranks exchange the same number of rows. With None the
            ranks agree on the largest batch at every step, which makes the host wait and cannot be compiled with
            `fullgraph=True`.
        bf16_products: Compute the matrix products in bfloat16; see :func:`~uncertainty_mm.functional.supcon_loss`.
        validate_args: Check values (NaN, labels other than 0 and 1) on the CPU only (None), never (False), or always
            (True). If unchecked, a label above 0.5 counts as present, and rows that are not finite do not enter the
            queue.

    Attributes:
        queue: The :class:`~uncertainty_mm.EmbeddingQueue` of earlier distributions. Its state also says what the rows
            are (`meaning`), so that one filled by another similarity, or for other modalities or labels, does not load.

    Raises:
        ValueError: If an argument is out of range or unknown.
        TypeError: If an argument has the wrong type.

    Example:
        >>> loss = DistributionSupConLoss(
        ...     num_modalities=3, num_labels=6, latent_dim=8, queue_size=100
        ... )
        >>> latent = DiagonalGaussian(torch.randn(4, 3, 6, 8), torch.rand(4, 3, 6, 8) + 0.1)
        >>> labels = torch.randint(0, 2, (4, 6))
        >>> loss(latent, labels).shape
        torch.Size([])
        >>> loss.queue.length  # 4 samples x 3 modalities x 6 labels
        72
    """

    num_modalities: int
    num_labels: int
    latent_dim: int
    temperature: float
    anchors: Anchors
    embedding: EmbeddingKind
    similarity: Similarity
    reduction: Reduction
    gather: bool
    process_group: str
    max_batch_size: int | None
    bf16_products: bool
    validate_args: bool | None

    def __init__(
        self,
        num_modalities: int,
        num_labels: int,
        latent_dim: int,
        *,
        queue_size: int = 8192,
        temperature: float = 0.07,
        anchors: Anchors = "all",
        embedding: EmbeddingKind = "joint",
        similarity: Similarity = "cosine",
        reduction: Reduction = "mean",
        gather: bool = False,
        process_group: dist.ProcessGroup | None = None,
        max_batch_size: int | None = None,
        bf16_products: bool = False,
        validate_args: bool | None = None,
    ) -> None:
        super().__init__()
        check_positive_ints(
            num_modalities=num_modalities, num_labels=num_labels, latent_dim=latent_dim
        )
        if queue_size != 0 or isinstance(queue_size, bool):
            check_positive_int("queue_size", queue_size)
        check_positive("temperature", temperature)
        check_choice("anchors", anchors, get_args(Anchors))
        check_choice("embedding", embedding, get_args(EmbeddingKind))
        check_choice("similarity", similarity, ("cosine", *get_args(DistanceKind)))
        if similarity != "cosine" and embedding != "joint":
            raise ValueError(
                f"Expected `embedding` to be left alone with `similarity` = {similarity!r}, which has none, "
                f"but got {embedding!r}"
            )
        check_choice("reduction", reduction, get_args(Reduction))
        check_flag("gather", gather)
        if max_batch_size is not None:
            check_positive_int("max_batch_size", max_batch_size)
        check_flag("bf16_products", bf16_products)
        check_validate_args(validate_args)
        self._set(
            num_modalities=num_modalities,
            num_labels=num_labels,
            latent_dim=latent_dim,
            temperature=temperature,
            anchors=anchors,
            embedding=embedding,
            similarity=similarity,
            reduction=reduction,
            gather=gather,
            process_group=group_name(process_group),  # a group can be neither copied nor saved
            max_batch_size=max_batch_size,
            bf16_products=bf16_products,
            validate_args=validate_args,
        )
        width = latent_dim * (2 if embedding in ("joint", "both") else 1)
        rows = embedding if similarity == "cosine" else "gaussian"
        meaning = rows, num_modalities, num_labels
        self.queue: EmbeddingQueue = _Queue(queue_size, width, meaning, validate_args)

    def forward(
        self,
        latent: DiagonalGaussian,
        labels: Tensor,
        missing: Tensor | None = None,
        *,
        unknown: Tensor | None = None,
        enqueue: bool | None = None,
    ) -> Tensor:
        """Computes the loss of a batch, then adds the batch to the queue.

        Args:
            latent: Gaussians of shape (B, M, Q, K).
            labels: Tensor (B, Q) of 0 and 1, any real dtype.
            missing: Bool tensor (B, M), True where a modality is missing: its distributions are neither anchors nor
                keys and do not enter the queue. Values of `latent` there are ignored.
            unknown: Bool tensor (B, Q), True where a label is not known; its distributions are left out in the same
                way. Values of `labels` there are ignored.
            enqueue: Whether to add the batch to the queue, in the order of `latent`; None adds it in training mode.

        Returns:
            Scalar in at least float32, 0 with zero gradient if no anchor has a positive. For `"none"` a tensor
            (B, M, Q) with 0 where a distribution is not an anchor or has no positive.

        Raises:
            ValueError: If shapes or devices disagree, the batch is larger than `max_batch_size`, or values are out of
                range.
            TypeError: If a dtype is wrong.
            RuntimeError: If gradient checkpointing repeats a forward pass, and the queue that it saw is lost.
        """
        if enqueue is not None:
            check_flag("enqueue", enqueue)
        embeddings, classes = self._distributions(latent, labels, missing, unknown)
        keys, key_classes = self._of_all_ranks(embeddings, classes)
        bank = self.queue._read(keys)
        if self._gathers():
            loss = self._gathered_loss(keys, key_classes, *bank)
        else:
            loss = self._loss(keys, key_classes, self._anchors(classes), *bank, self.reduction)
        if (self.training if enqueue is None else enqueue) and not recomputing():
            self.queue._write(keys.detach(), key_classes)
        if self.reduction != "none":
            return loss
        own: Tensor = loss[: classes.shape[0]]
        return own.view(latent.mean.shape[:3])

    def enqueue(
        self,
        latent: DiagonalGaussian,
        labels: Tensor,
        missing: Tensor | None = None,
        unknown: Tensor | None = None,
    ) -> None:
        """Adds a batch to the queue without computing a loss.

        For optimisers that compute the loss several times, such as `torch.optim.LBFGS`, and for gradient checkpointing
        with several forward passes before the backward pass: call the loss with `enqueue=False`, and this once after
        the backward pass. Arguments are as for :meth:`forward`; with `gather`, call it on all ranks.

        Raises:
            ValueError: As :meth:`forward`.
            TypeError: As :meth:`forward`.
        """
        if recomputing():
            return  # the first pass has added it
        with torch.no_grad():
            self.queue._write(
                *self._of_all_ranks(*self._distributions(latent, labels, missing, unknown))
            )

    def _distributions(
        self,
        latent: DiagonalGaussian,
        labels: Tensor,
        missing: Tensor | None,
        unknown: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Checks everything and returns the embedding and class (-1 if left out) of each distribution."""
        sizes = {"M": self.num_modalities, "Q": self.num_labels, "K": self.latent_dim}
        check_latent(latent, missing, sizes, self.validate_args)
        device = latent.mean.device
        check_tensor("labels", labels, "number", "B Q", sizes, device)
        check_unknown(unknown, "B Q", sizes, device)
        if self.queue.rows.device != device:
            raise ValueError(
                f"Expected `latent` to be on {self.queue.rows.device}, but got {device}"
            )
        if self.max_batch_size is not None and labels.shape[0] > self.max_batch_size:
            raise ValueError(
                f"Expected `latent` to have at most `max_batch_size` = {self.max_batch_size} samples, "
                f"but got {labels.shape[0]}"
            )
        if checks_values(labels, self.validate_args):
            check_labels("labels", labels, unknown)
        dtype = torch.promote_types(latent.mean.dtype, torch.float32)
        mean, std = latent.mean.to(dtype), latent.std.to(dtype)
        classes = torch.arange(self.num_modalities * self.num_labels, device=device)
        classes = classes.view(self.num_modalities, self.num_labels)
        classes = torch.where((labels > 0.5).unsqueeze(1), classes, classes + classes.numel())
        if missing is not None:
            classes = classes.masked_fill(missing.unsqueeze(2), -1)
        if unknown is not None:
            classes = classes.masked_fill(unknown.unsqueeze(1), -1)
        if missing is not None or unknown is not None:
            left_out = (classes < 0).unsqueeze(3)
            mean, std = mean.masked_fill(left_out, 0), std.masked_fill(left_out, 0)
        if self.similarity == "cosine":
            rows = embed(mean, std, self.embedding)
        else:  # the Gaussians themselves
            rows = torch.cat([mean, std], -1)
            near = rows.clamp(-_FARTHEST, _FARTHEST)
            rows = torch.where(rows.isfinite(), near, rows)  # what is not finite stays so
        return rows.flatten(0, 2), classes.flatten()

    def _with_square(self, rows: Tensor, centre: Tensor) -> Tensor:
        """The features that are multiplied, then minus half the square that turns a product into a distance."""
        rows = rows - centre  # distances stay the same, and the products keep more digits
        multiplied = rows[:, : self.latent_dim] if self.similarity == "sampled" else rows
        return torch.cat([multiplied, -0.5 * rows.square().sum(1, keepdim=True)], 1)

    def _gathers(self) -> bool:
        return self.gather and world_size(self.process_group) > 1

    def _of_all_ranks(self, embeddings: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
        """Keys of all ranks and their classes: as many per rank, of which padding has class -1 and comes last."""
        if not self._gathers():
            return embeddings, classes
        max_rows = self.max_batch_size
        if max_rows is not None:
            max_rows *= self.num_modalities * self.num_labels
        return gather_rows(embeddings, classes, max_rows=max_rows, process_group=self.process_group)

    def _anchors(self, classes: Tensor) -> Tensor:
        """Which distributions are anchors, provided that they have a positive."""
        present = self.num_modalities * self.num_labels
        return (classes >= 0) & (classes < (present if self.anchors == "present" else 2 * present))

    def _loss(
        self,
        embeddings: Tensor,
        classes: Tensor,
        anchors: Tensor,
        bank: Tensor,
        bank_classes: Tensor,
        reduction: Reduction,
    ) -> Tensor:
        temperature, is_distance = self.temperature, self.similarity != "cosine"
        if is_distance:
            centre = embeddings.detach().sum(0) / (classes >= 0).sum().clamp_min(1)
            centre[self.latent_dim :] = 0  # `"sampled"` needs the squares of uncentred ones
            bank = self._with_square(bank.to(embeddings.dtype), centre)
            embeddings = self._with_square(embeddings, centre)
            temperature *= self.latent_dim
        return supcon(
            embeddings,
            classes,
            anchors,
            bank,
            bank_classes,
            temperature,
            reduction,
            self.bf16_products,
            is_distance,
        )

    def _gathered_loss(
        self, keys: Tensor, key_classes: Tensor, bank: Tensor, bank_classes: Tensor
    ) -> Tensor:
        """Loss of this rank's anchors among the keys of all ranks."""
        ranks = world_size(self.process_group)
        capacity = keys.shape[0] // ranks
        # The loss expects its anchors first, so the rows of this rank go to the front.
        own_first = -rank(self.process_group) * capacity
        batch, classes = keys.roll(own_first, 0), key_classes.roll(own_first, 0)
        anchors = self._anchors(classes)
        own = anchors[:capacity]
        if self.reduction == "none":
            return self._loss(batch, classes, own, bank, bank_classes, "none")
        loss = self._loss(batch, classes, own, bank, bank_classes, "sum")
        if self.reduction == "mean":
            loss = loss / self._count_anchors(classes, anchors, bank_classes).clamp_min(1)
        # The value is that of the joined batch, the gradient this rank's share, times the ranks that average it.
        share = loss * ranks
        return sum_over_ranks(loss.detach(), self.process_group) + (share - share.detach())

    def _count_anchors(self, classes: Tensor, anchors: Tensor, bank_classes: Tensor) -> Tensor:
        """Number of anchors that have a positive in batch or queue."""
        keys = torch.cat([classes, bank_classes]) + 1  # class -1 is counted at index 0
        counts = torch.zeros(2 * self.num_modalities * self.num_labels + 1, device=keys.device)
        counts = counts.index_add_(0, keys, torch.ones_like(keys, dtype=counts.dtype))
        return (anchors & (counts[classes + 1] > 1)).sum()
