"""Removes or corrupts modalities, at random in training, or one by one in an evaluation.

In training this teaches a model what such input looks like; in an evaluation it tests whether the model notices.
Padding and modalities that are not named are never changed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Literal, NamedTuple, get_args

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from uncertainty_mm._checks import check_choice, check_number, check_probability, check_seed
from uncertainty_mm.data.dataset import FeatureStatistics, MultimodalBatch, MultimodalDataset

__all__ = ["Corruption", "corrupt", "corrupted", "drop_modalities", "noise"]

Corruption = Literal[
    "noise", "dead", "stuck", "scaled", "offset", "clipped", "burst", "blurred", "dropped", "permuted", "shuffled",
    "swapped",
]  # fmt: skip
"""Ways in which a sensor, a file or a transmission may corrupt a modality; see :func:`corrupt`."""


def _some(batch: MultimodalBatch, share: float, generator: Generator | None) -> Tensor:
    """Random bool tensor (B, 1), True for about this share of the samples."""
    count, device = batch.labels.shape[0], batch.labels.device
    return torch.rand(count, 1, device=device, generator=generator) < share


def drop_modalities(
    batch: MultimodalBatch, share: float, generator: Generator | None = None
) -> MultimodalBatch:
    """Removes modalities at random, so that a model learns to predict without them.

    Args:
        batch: The batch, which is not changed.
        share: Probability in [0, 1] that a sample is chosen. A chosen sample loses each of its modalities with a
            probability of 1/2, and so may lose all of them.
        generator: Generator on the device of the batch; None for the default.

    Returns:
        The batch, where removed modalities are masked and set to 0.

    Raises:
        ValueError: If `share` is not in [0, 1].

    Example:
        >>> batch = MultimodalBatch(
        ...     {"text": torch.ones(4, 3, 2)},
        ...     {"text": torch.zeros(4, 3).bool()},
        ...     torch.ones(4, 1),
        ...     torch.arange(4),
        ... )
        >>> fewer = drop_modalities(batch, 1.0, torch.Generator().manual_seed(0))
        >>> fewer.padding_mask["text"].all(1)
        tensor([ True, False,  True, False])
    """
    check_probability("share", share)
    chosen = _some(batch, share, generator)
    padding_mask = {
        name: mask | (chosen & _some(batch, 0.5, generator))
        for name, mask in batch.padding_mask.items()
    }
    features = {
        name: x.masked_fill(padding_mask[name].unsqueeze(2), 0)
        for name, x in batch.features.items()
    }
    return batch._replace(features=features, padding_mask=padding_mask)


def noise(
    batch: MultimodalBatch,
    share: float,
    spread: Mapping[str, Tensor | float],
    *,
    size: float = 5.0,
    generator: Generator | None = None,
) -> MultimodalBatch:
    """Adds Gaussian noise to modalities at random, so that a model learns to handle noisy input.

    Args:
        batch: The batch, which is not changed.
        share: Probability in [0, 1] that a modality of a sample becomes noisy, independently for each.
        spread: Standard deviation (D_m,) of the features by modality, such as that of
            :meth:`~uncertainty_mm.data.MultimodalDataset.statistics`, or a number. Other modalities are not changed.
        size: The standard deviation of the noise, in units of `spread`, is uniform between 0 and `size`.
        generator: Generator on the device of the batch; None for the default.

    Returns:
        The batch with noise at valid steps.

    Raises:
        ValueError: If `share` is not in [0, 1], `size` is below 0, or `spread` names another modality.
    """
    check_probability("share", share)
    check_number("size", size, "at least 0", 0 <= size < float("inf"))
    if not set(spread) <= set(batch.features):
        raise ValueError(
            f"Expected `spread` to name modalities of {list(batch.features)}, but got {list(spread)}"
        )
    features = dict(batch.features)
    for name, each in spread.items():
        x, count = features[name], batch.labels.shape[0]
        sizes = torch.rand(count, 1, 1, device=x.device, generator=generator) * size
        sizes = sizes * _some(batch, share, generator).unsqueeze(2)
        added = sizes * each * _normal(x, generator)
        features[name] = x + added.masked_fill(batch.padding_mask[name].unsqueeze(2), 0)
    return batch._replace(features=features)


# ---------------------------------------------------------------------------- kinds of corruption


class _Input(NamedTuple):
    """The input of a kind of corruption."""

    x: Tensor  # (N, S, D), 0 where masked
    valid: Tensor  # (N, S, 1) bool
    mean: Tensor  # (D,)
    std: Tensor  # (D,)
    size: float
    generator: Generator | None


def _normal(x: Tensor, generator: Generator | None) -> Tensor:
    return torch.randn(x.shape, device=x.device, dtype=x.dtype, generator=generator)


def _uniform(x: Tensor, generator: Generator | None, *shape: int) -> Tensor:
    return torch.rand(shape, device=x.device, generator=generator)


def _in_front(valid: Tensor) -> tuple[Tensor, Tensor]:
    """Positions (N, S) of the steps, with the valid ones first and in order, and the number of valid ones (N, 1)."""
    valid = valid.squeeze(2)
    return (~valid).byte().argsort(dim=1, stable=True), valid.sum(1, keepdim=True)


def _noisy(given: _Input) -> Tensor:
    return given.x + given.size * given.std * _normal(given.x, given.generator)


def _stuck(given: _Input) -> Tensor:
    first = _in_front(given.valid)[0][:, :1, None]
    return given.x.gather(1, first.expand(-1, -1, given.x.shape[2])).expand_as(given.x)


def _clipped(given: _Input) -> Tensor:
    limit = given.std / given.size if given.size else given.std * torch.inf
    limit = limit.nan_to_num(torch.inf)  # a constant feature
    return torch.minimum(torch.maximum(given.x, given.mean - limit), given.mean + limit)


def _burst(given: _Input) -> Tensor:
    length = given.valid.squeeze(2).sum(1, keepdim=True)
    start = _uniform(given.x, given.generator, len(given.x), 1) * 0.75 * length
    rank = given.valid.squeeze(2).cumsum(1) - 1
    inside = (rank >= start.floor()) & (rank < start.floor() + (length / 4).ceil())
    return torch.where(inside.unsqueeze(2), _noisy(given), given.x)


def _blurred(given: _Input) -> Tensor:
    width = round(given.size)

    def around(x: Tensor) -> Tensor:
        return F.avg_pool1d(x.transpose(1, 2), 2 * width + 1, 1, width).transpose(1, 2)

    return around(given.x) / around(given.valid.to(given.x.dtype)).clamp_min(1e-9)


def _dropped(given: _Input) -> Tensor:
    count, steps, _ = given.x.shape
    lost = _uniform(given.x, given.generator, count, steps, 1) < given.size / (1 + given.size)
    return given.x.masked_fill(lost, 0)


def _permuted(given: _Input) -> Tensor:
    order = _uniform(given.x, given.generator, given.x.shape[2]).argsort()
    # one cycle through all features, so that none stays in place
    return given.x[..., torch.empty_like(order).scatter_(0, order, order.roll(1))]


def _shuffled(given: _Input) -> Tensor:
    order, _ = _in_front(given.valid)
    keys = _uniform(given.x, given.generator, *order.shape)
    # valid steps first, in random order
    mixed = keys.masked_fill(~given.valid.squeeze(2), 2.0).argsort(1)
    source = torch.empty_like(order).scatter_(1, order, mixed)
    return given.x.gather(1, source.unsqueeze(2).expand_as(given.x))


def _swapped(given: _Input) -> Tensor:
    order, length = _in_front(given.valid)
    there = length.squeeze(1) > 0
    own = there.nonzero().squeeze(1)
    if len(own) < 2:
        return given.x
    shift = int(torch.randint(1, len(own), (), device=given.x.device, generator=given.generator))
    other = torch.arange(len(there), device=given.x.device).masked_scatter(there, own.roll(shift))
    rank = (given.valid.squeeze(2).cumsum(1) - 1).clamp_min(0) % length[other].clamp_min(1)
    source = order[other].gather(1, rank)
    return given.x[other].gather(1, source.unsqueeze(2).expand_as(given.x))


_KINDS: dict[str, Callable[[_Input], Tensor]] = {
    "noise": _noisy,
    "dead": lambda given: torch.zeros_like(given.x),
    "stuck": _stuck,
    "scaled": lambda given: given.x * (1 + given.size),
    "offset": lambda given: given.x + given.size * given.std,
    "clipped": _clipped,
    "burst": _burst,
    "blurred": _blurred,
    "dropped": _dropped,
    "permuted": _permuted,
    "shuffled": _shuffled,
    "swapped": _swapped,
}


def _spoilt(
    x: Tensor,
    padding_mask: Tensor,
    kind: str,
    size: float,
    statistics: FeatureStatistics | None,
    generator: Generator | None,
) -> Tensor:
    """The features after one kind of corruption, in their dtype, with masked steps unchanged."""
    valid = ~padding_mask.unsqueeze(2)
    kept = x.float().masked_fill(~valid, 0)
    if statistics is None:
        count = valid.sum().clamp_min(1)
        mean = kept.sum((0, 1)) / count
        std = ((kept - mean).square() * valid).sum((0, 1)).div(count).sqrt()
    else:
        mean, std = (each.to(kept) for each in statistics[:2])
    changed = _KINDS[kind](_Input(kept, valid, mean, std, size, generator))
    return torch.where(valid, changed.to(x.dtype), x)


def _check(names: Collection[str], modality: str, kind: str, size: float) -> None:
    check_choice("modality", modality, names)
    check_choice("kind", kind, get_args(Corruption))
    check_number("size", size, "at least 0", 0 <= size < float("inf"))


def corrupt(
    batch: MultimodalBatch,
    modality: str,
    kind: Corruption = "noise",
    *,
    size: float = 3.0,
    statistics: FeatureStatistics | None = None,
    generator: Generator | None = None,
) -> MultimodalBatch:
    r"""Corrupts one modality of every sample, as a broken sensor, file or transmission would.

    Standard deviations are taken per feature. For kinds that use `size`, 0 changes nothing.

    =============  ===============================================================================================
    `kind`         Change of the valid steps
    =============  ===============================================================================================
    ``noise``      Gaussian noise of `size` standard deviations is added
    ``dead``       all become 0
    ``stuck``      all become the first step
    ``scaled``     all are multiplied by 1 + `size`
    ``offset``     `size` standard deviations are added
    ``clipped``    values are limited to 1 / `size` standard deviations on either side of the mean
    ``burst``      as ``noise``, in a quarter of the steps, which are consecutive
    ``blurred``    each becomes the mean of the steps at most `size` (rounded) away
    ``dropped``    each becomes 0 with a probability of `size` / (1 + `size`)
    ``permuted``   features are permuted, in the same way in all samples
    ``shuffled``   the order of the steps becomes random
    ``swapped``    replaced by the steps of another sample that has the modality, repeated if it has fewer
    =============  ===============================================================================================

    Args:
        batch: The batch, which is not changed.
        modality: Name of the modality.
        kind: See above.
        size: See above; at least 0.
        statistics: Mean and standard deviation of the features of this modality, from
            :meth:`~uncertainty_mm.data.MultimodalDataset.statistics`; None for those of the batch.
        generator: Generator on the device of the batch; None for the default.

    Returns:
        The batch with other features in one modality; masks and padding are the same.

    Raises:
        ValueError: If there is no such modality or kind, or `size` is below 0.

    Example:
        >>> batch = MultimodalBatch(
        ...     {"text": torch.arange(6.0).view(1, 6, 1)},
        ...     {"text": torch.arange(6).view(1, 6) > 3},
        ...     torch.ones(1, 1),
        ...     torch.arange(1),
        ... )
        >>> corrupt(batch, "text", "stuck").features["text"].flatten()
        tensor([0., 0., 0., 0., 4., 5.])
        >>> corrupt(batch, "text", "blurred", size=1).features["text"].flatten()
        tensor([0.5000, 1.0000, 2.0000, 2.5000, 4.0000, 5.0000])
    """
    _check(batch.features, modality, kind, size)
    x, mask = batch.features[modality], batch.padding_mask[modality]
    changed = _spoilt(x, mask, kind, size, statistics, generator)
    return batch._replace(features=batch.features | {modality: changed})


def corrupted(
    data: MultimodalDataset,
    modality: str,
    kind: Corruption = "noise",
    *,
    size: float = 3.0,
    seed: int = 0,
) -> MultimodalDataset:
    """Corrupts one modality of a data set, to test whether a model notices; see :func:`corrupt`.

    Args:
        data: The data set, which is not changed. The features of the modality are read into memory.
        modality: Name of the modality.
        kind: Kind of corruption, see :func:`corrupt`.
        size: Its size, see :func:`corrupt`. Standard deviations are those of `data`, at least 1e-3.
        seed: Determines everything random.

    Returns:
        A data set that shares all other tensors.

    Raises:
        ValueError: If there is no such modality or kind, or `size` is below 0.

    Example:
        >>> data = MultimodalDataset(
        ...     {"text": torch.randn(50, 9, 4)},
        ...     {"text": torch.zeros(50, 9).bool()},
        ...     torch.ones(50, 1),
        ...     ["happy"],
        ... )
        >>> corrupted(data, "text", "dead").statistics()["text"].std
        tensor([0., 0., 0., 0.])
    """
    if not isinstance(data, MultimodalDataset):
        raise TypeError(f"Expected `data` to be a MultimodalDataset, but got {type(data).__name__}")
    _check(data.features, modality, kind, size)
    check_seed(seed)
    x, mask = data.features[modality], data.padding_mask[modality]
    generator = torch.Generator(device=x.device).manual_seed(seed)
    changed = _spoilt(x, mask, kind, size, data._statistics(modality, 1e-3), generator)
    return data._like(features=data.features | {modality: changed})
