"""The data set that all readers return: :class:`MultimodalDataset`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence, Set
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, default_collate
from torch.utils.data._utils.collate import default_collate_fn_map

from uncertainty_mm._checks import (
    check_finite,
    check_labels,
    check_number,
    check_range,
    check_tensor,
    check_unknown,
    check_validate_args,
    checks_values,
)

_CHUNK = 2**22  # size of the temporaries in MultimodalDataset.statistics, in numbers


class MultimodalBatch(NamedTuple):
    """Samples of a :class:`MultimodalDataset`; a single sample has no axis B.

    `torch.utils.data.default_collate`, and so every ordinary `DataLoader`, joins samples to a batch: shorter sequences
    are padded to the longest, and fields that no sample has stay None.

    Attributes:
        features: (B, S_m, D_m) by modality, float32, 0 where masked.
        padding_mask: Bool (B, S_m) by modality, True where a step is to be left out.
        labels: (B, Q) of 0 and 1; 0 where unknown.
        indices: (B,) int64, positions in the data set.
        soft_labels: (B, Q), float32, or None where the data set has none.
        unknown: Bool (B, Q), True where a label is not known, or None where all are.
    """

    features: dict[str, Tensor]
    padding_mask: dict[str, Tensor]
    labels: Tensor
    indices: Tensor
    soft_labels: Tensor | None = None
    unknown: Tensor | None = None

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> MultimodalBatch:
        """Copies the batch to a device.

        Args:
            device: The device.
            non_blocking: Do not wait for the copy of pinned memory, as in `torch.Tensor.to`.
        """

        def moved(part: Any) -> Any:
            if isinstance(part, dict):
                return {name: moved(x) for name, x in part.items()}
            return None if part is None else part.to(device, non_blocking=non_blocking)

        return MultimodalBatch(*map(moved, self))

    def trimmed(self) -> MultimodalBatch:
        """The batch without the steps at the end that are padding in all of its sequences; at least one step stays.

        The features are views. The host waits for an accelerator that holds the batch.
        """
        features, padding_mask = {}, {}
        for name, mask in self.padding_mask.items():
            steps = (~mask).reshape(-1, mask.shape[-1]).any(0).nonzero()
            longest = int(steps[-1]) + 1 if len(steps) else 1
            features[name] = self.features[name][..., :longest, :]
            padding_mask[name] = mask[..., :longest]
        return self._replace(features=features, padding_mask=padding_mask)


class FeatureStatistics(NamedTuple):
    """Moments of the features of one modality, over the valid steps of all samples.

    Attributes:
        mean: (D_m,), float32; 0 where there is no valid step.
        std: (D_m,), float32, the root of the mean squared deviation; 1 where there is no valid step.
        count: Number of valid steps.
    """

    mean: Tensor
    std: Tensor
    count: int  # type: ignore[assignment]  # hides an unneeded method of tuples


class ModalitySummary(NamedTuple):
    """One modality in a :class:`DatasetSummary`.

    Attributes:
        steps: Number of steps S_m, masked ones included.
        dim: Size of a step.
        lengths: Smallest, median and largest number of steps that are not masked, where the modality is not missing.
        missing: Number of samples whose steps are all masked.
        masked_steps: Number of masked steps in all samples.
        invalid_steps: Number of steps that are masked because of NaN or infinity in the file.
    """

    steps: int
    dim: int
    lengths: tuple[int, float, int]
    missing: int
    masked_steps: int
    invalid_steps: int


class DatasetSummary(NamedTuple):
    """The counts of :meth:`MultimodalDataset.summary`, which print as a table.

    Attributes:
        samples: Number of samples N.
        label_counts: Number of samples with the label, by name.
        label_shares: Share in [0, 1] of samples with the label, among those where it is known, by name.
        unlabelled: Number of samples without any label, except those whose labels are all unknown.
        modalities: A :class:`ModalitySummary` by name.
        unknown: Number of samples where the label is not known, by name.
    """

    samples: int
    label_counts: dict[str, int]
    label_shares: dict[str, float]
    unlabelled: int
    modalities: dict[str, ModalitySummary]
    unknown: dict[str, int]

    def __str__(self) -> str:
        lines = [f"{self.samples} samples, {self.unlabelled} without a label"]
        width = max(map(len, self.label_counts))
        lines += [
            f"  {name:<{width}}  {count:>7}  {self.label_shares[name]:.3f}"
            + f"  ({self.unknown[name]} unknown)" * (self.unknown[name] > 0)
            for name, count in self.label_counts.items()
        ]
        for name, each in self.modalities.items():
            low, median, high = each.lengths
            lines.append(
                f"{name}: {each.steps} x {each.dim}, lengths {low} / {median:g} / {high}, "
                f"{each.missing} missing, {each.masked_steps} steps masked, "
                f"{each.invalid_steps} of them not finite"
            )
        return "\n".join(lines)


def check_names(argument: str, value: Any, kind: str) -> None:
    """Raises unless `value` is a `"mapping"` or a `"sequence"`, such as a list or an array, of names."""
    is_mapping = isinstance(value, Mapping)
    in_order = isinstance(value, Collection) and not isinstance(value, str | Set | Mapping)
    if not (is_mapping if kind == "mapping" else in_order):
        raise TypeError(
            f"Expected `{argument}` to be a {kind} of names, "
            f"but got {repr(value) if isinstance(value, str) else type(value).__name__}"
        )
    for name in value:
        if not isinstance(name, str):
            raise TypeError(
                f"Expected `{argument}` to be a {kind} of names, but got {name!r} among them"
            )


def check_parts(parts: Mapping[str, MultimodalDataset]) -> None:
    """Raises unless `parts` maps the names of splits, at least one, to data sets."""
    check_names("parts", parts, "mapping")
    if not parts:
        raise ValueError("Expected `parts` to name splits, at least one, but got none")
    for name, part in parts.items():
        if not isinstance(part, MultimodalDataset):
            raise TypeError(
                f"Expected `parts[{name!r}]` to be a MultimodalDataset, but got {type(part).__name__}"
            )


def check_targets(labels: Tensor, soft_labels: Tensor | None, unknown: Tensor | None) -> None:
    """Raises unless known labels are 0 or 1, and soft ones at least 0."""
    hint = "mark a label that is not known in `unknown` (True: leave out), or by NaN in floating labels"
    check_labels("labels", labels, unknown, hint)
    if soft_labels is not None:
        limit = torch.finfo(soft_labels.dtype).max
        check_range("soft_labels", soft_labels, 0, limit, unknown)


def _positions(indices: Sequence[int] | Tensor, device: torch.device) -> Tensor:
    """Rows as an int64 tensor (n,); raises for masks and fractions, which would silently give other rows."""
    try:
        rows = torch.as_tensor(indices, device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"Expected `indices` to hold integers, but got {indices!r}") from error
    if rows.numel() == 0 and not isinstance(indices, Tensor):
        rows = rows.long()
    return check_tensor("indices", rows, "integer", "n", {}).long()


def _known(x: Tensor | None, unknown: Tensor | None) -> Tensor | None:
    """Labels, set to 0 where unknown."""
    return x if x is None or unknown is None else x.masked_fill(unknown, 0)


class MultimodalDataset(Dataset[MultimodalBatch]):
    """Multi-label samples with a sequence for every modality, stored as tensors.

    It is a torch data set of single samples: ordinary `DataLoader`, `Subset`, `random_split` and `ConcatDataset` accept
    it, and a subclass may override `__getitem__`, for example to augment samples. The `indices` of a sample are its
    position in this data set, even within a `Subset` or a `ConcatDataset`.

    :meth:`loader` is faster than an ordinary `DataLoader`: it takes a batch from the tensors at once, without a loop
    over samples. The tensors may be memory-mapped (:func:`read_folder`); then only the rows of a batch are read.

    Args:
        features: (N, S_m, D_m) by modality, floating. Lengths and sizes differ between modalities.
        padding_mask: Bool (N, S_m) by modality, True where a step is to be left out; all True where a sample lacks
            the modality.
        labels: (N, Q) of 0 and 1; NaN in floating labels means unknown.
        label_names: Names of the Q labels, in the order of the columns.
        soft_labels: (N, Q), floating, at least 0: the source of the labels, such as intensities (0 to 3 in CMU-MOSEI)
            or the share of raters who named the label.
        unknown: Bool (N, Q), True where a label is not known; `labels` are stored as 0 there.
        ids: N names of samples.
        groups: N integers, such as the user or speaker of each sample.
        invalid_steps: Number of steps by modality that are masked because their values were not finite, for the
            summary.
        validate_args: Check the values of features and labels on the CPU only (None), never (False; they may be on a
            disk), or always (True).

    Raises:
        ValueError: If shapes disagree, a known label is not 0 or 1, a step that is not masked is not finite, or names
            repeat.
        TypeError: If an argument has the wrong type.

    Example:
        >>> data = MultimodalDataset(
        ...     {"text": torch.randn(10, 5, 8), "audio": torch.randn(10, 7, 4)},
        ...     {"text": torch.zeros(10, 5).bool(), "audio": torch.zeros(10, 7).bool()},
        ...     torch.ones(10, 2),
        ...     ["happy", "sad"],
        ... )
        >>> data.dims, data.steps
        ({'text': 8, 'audio': 4}, {'text': 5, 'audio': 7})
        >>> batch = next(iter(data.loader(batch_size=4)))
        >>> batch.features["audio"].shape, batch.indices
        (torch.Size([4, 7, 4]), tensor([0, 1, 2, 3]))
        >>> print(data.only(["text"]).summary())
        10 samples, 0 without a label
          happy       10  1.000
          sad         10  1.000
        text: 5 x 8, lengths 5 / 5 / 5, 0 missing, 0 steps masked, 0 of them not finite
        audio: 7 x 4, lengths 0 / 0 / 0, 10 missing, 70 steps masked, 0 of them not finite
    """

    def __init__(
        self,
        features: Mapping[str, Tensor],
        padding_mask: Mapping[str, Tensor],
        labels: Tensor,
        label_names: Sequence[str],
        *,
        soft_labels: Tensor | None = None,
        unknown: Tensor | None = None,
        ids: Sequence[str] | None = None,
        groups: Sequence[int] | Tensor | None = None,
        invalid_steps: Mapping[str, int] | None = None,
        validate_args: bool | None = None,
    ) -> None:
        check_validate_args(validate_args)
        for argument, mapping in (("features", features), ("padding_mask", padding_mask)):
            check_names(argument, mapping, "mapping")
        if not features or set(features) != set(padding_mask):
            raise ValueError(
                "Expected `features` and `padding_mask` to name the same modalities, at least one, "
                f"but got {sorted(features)} and {sorted(padding_mask)}"
            )
        check_names("label_names", label_names, "sequence")
        if len(set(label_names)) != len(label_names) or not len(label_names):
            raise ValueError(
                f"Expected `label_names` to be different names, at least one, but got {list(label_names)}"
            )
        shape = {"Q": len(label_names)}
        device = check_tensor("labels", labels, "number", "N Q", shape).device
        check_unknown(unknown, "N Q", shape, device)
        if soft_labels is not None:
            check_tensor("soft_labels", soft_labels, "floating", "N Q", shape, device)
        if labels.is_floating_point():
            nan = labels.isnan()
            if device.type == "meta" or nan.any():
                unknown = nan if unknown is None else unknown | nan
        look = checks_values(labels, validate_args)
        if look:
            check_targets(labels, soft_labels, unknown)
        for name, x in features.items():
            sizes = {"N": shape["N"]}
            check_tensor(f"features[{name!r}]", x, "floating", "N S D", sizes, device)
            if 0 in x.shape[1:]:
                raise ValueError(
                    f"Expected `features[{name!r}]` to have steps and features, but got {tuple(x.shape)}"
                )
            mask = padding_mask[name]
            check_tensor(f"padding_mask[{name!r}]", mask, "bool", "N S", sizes, device)
            if look:
                check_finite(f"features[{name!r}]", x, mask.unsqueeze(2))
        if ids is not None:
            check_names("ids", ids, "sequence")
            if len(ids) != shape["N"]:
                raise ValueError(f"Expected `ids` to name {shape['N']} samples, but got {len(ids)}")
        if groups is not None:
            try:
                groups = torch.as_tensor(groups, device=device)
            except (TypeError, ValueError, RuntimeError) as error:
                raise TypeError(
                    f"Expected `groups` to hold integers, but got {groups!r}"
                ) from error
            groups = check_tensor("groups", groups, "integer", "N", shape, device).long()
        if invalid_steps is not None:
            check_names("invalid_steps", invalid_steps, "mapping")
            if not set(invalid_steps) <= set(features):
                raise ValueError(
                    f"Expected `invalid_steps` to name modalities of {list(features)}, "
                    f"but got {list(invalid_steps)}"
                )
        self.features = {name: x.detach() for name, x in features.items()}
        self.padding_mask = {name: padding_mask[name] for name in features}
        self.labels = labels if unknown is None else labels.masked_fill(unknown, 0)
        self.label_names = list(label_names)
        self.soft_labels = _known(soft_labels, unknown)
        self.unknown = unknown
        self.ids = None if ids is None else list(ids)
        self.groups: Tensor | None = groups
        self.invalid_steps = {name: (invalid_steps or {}).get(name, 0) for name in features}

    def __len__(self) -> int:
        return self.labels.shape[0]

    def __getitem__(self, index: int) -> MultimodalBatch:
        """One sample, without the axis of the batch."""
        one = self._rows(torch.tensor([range(len(self))[index]], device=self.labels.device))

        def first(part: Any) -> Any:
            if isinstance(part, dict):
                return {name: x[0] for name, x in part.items()}
            return None if part is None else part[0]

        return MultimodalBatch(*map(first, one))

    def __getitems__(self, indices: Sequence[int] | Tensor) -> list[MultimodalBatch]:
        """The samples at the given positions, which a `DataLoader` collates."""
        return [self[int(index)] for index in indices]

    def batch(self, indices: Sequence[int] | Tensor) -> MultimodalBatch:
        """Returns the samples at the given positions as one batch.

        Args:
            indices: Positions in the data set; negative ones count from the end.

        Raises:
            IndexError: If a position does not exist.
            TypeError: If `indices` are not integers; a mask is not accepted.
        """
        rows = _positions(indices, self.labels.device)
        if self._overridden():
            whole: MultimodalBatch = self.collate(self.__getitems__(rows.tolist()))
            return whole
        return self._rows(torch.where(rows < 0, rows + len(self), rows))

    def _rows(self, rows: Tensor) -> MultimodalBatch:
        # Masked steps are set to 0, because NaN would survive a product with a weight of 0.
        padding_mask = {name: x[rows] for name, x in self.padding_mask.items()}
        return MultimodalBatch(
            {
                name: x[rows].float().masked_fill_(padding_mask[name].unsqueeze(2), 0)
                for name, x in self.features.items()
            },
            padding_mask,
            self.labels[rows],
            rows,
            None if self.soft_labels is None else self.soft_labels[rows].float(),
            None if self.unknown is None else self.unknown[rows],
        )

    def _overridden(self) -> bool:
        """Whether a subclass makes its own samples, which then have to be requested one by one."""
        own = type(self)
        return (own.__getitem__, own.__getitems__, own.collate) != (
            MultimodalDataset.__getitem__,
            MultimodalDataset.__getitems__,
            MultimodalDataset.collate,
        )

    def __repr__(self) -> str:
        sizes = {name: tuple(x.shape[1:]) for name, x in self.features.items()}
        return f"{type(self).__name__}({len(self)} samples, {sizes}, labels {self.label_names})"

    @staticmethod
    def collate(samples: Any) -> Any:
        """Joins samples to a batch, as the `collate_fn` of a `DataLoader` and in `default_collate`.

        Args:
            samples: Samples with the same modalities, sizes of steps and labels, such as those of a `ConcatDataset`.
                Shorter sequences are padded to the longest. The labels of samples without `unknown` are all known. A
                batch is returned unchanged; other types, as from a subclass, are left to `default_collate`.

        Raises:
            ValueError: If modalities, sizes or numbers of labels differ, or if only some samples have soft labels.
        """
        if isinstance(samples, MultimodalBatch):
            return samples
        first = samples[0]
        if not isinstance(first, MultimodalBatch):
            return default_collate(samples)
        soft = [each.soft_labels for each in samples if each.soft_labels is not None]
        if len(soft) not in (0, len(samples)):
            raise ValueError(
                f"Expected `soft_labels` in all samples of a batch or in none, "
                f"but got them in {len(soft)} of {len(samples)}"
            )

        def form(sample: MultimodalBatch) -> tuple[dict[str, int], int]:
            return {name: x.shape[1] for name, x in sample.features.items()}, len(sample.labels)

        for each in samples:
            if form(each) != form(first):
                raise ValueError(
                    "Expected all samples of a batch to have the same modalities, sizes and number of labels, "
                    f"but got {form(first)} and {form(each)}"
                )
        unknown = None
        if any(each.unknown is not None for each in samples):
            unknown = torch.stack(
                [
                    torch.zeros_like(each.labels, dtype=torch.bool)
                    if each.unknown is None
                    else each.unknown
                    for each in samples
                ]
            )
        return MultimodalBatch(
            {name: _stacked([each.features[name] for each in samples]) for name in first.features},
            {
                name: _stacked([each.padding_mask[name] for each in samples], True)
                for name in first.features
            },
            torch.stack([each.labels for each in samples]),
            torch.stack([each.indices for each in samples]),
            torch.stack(soft) if soft else None,
            unknown,
        )

    def loader(
        self, batch_size: int | None = 1, *, trim: bool = False, **options: Any
    ) -> DataLoader[MultimodalBatch]:
        """A `torch.utils.data.DataLoader` of batches.

        A batch is taken at once. If a subclass overrides `__getitem__`, or a `collate_fn` is given, samples are
        requested one by one, as by an ordinary `DataLoader`.

        Args:
            batch_size: Samples in a batch. A `batch_sampler` decides itself.
            trim: Whether a batch ends where its longest sequence does (:meth:`MultimodalBatch.trimmed`).
            options: Passed to `DataLoader`: `shuffle`, `sampler`, `batch_sampler`, `num_workers`, `drop_last`,
                `pin_memory`, ...

        Returns:
            The loader, which yields :class:`MultimodalBatch`.
        """
        whole = not self._overridden() and options.get("collate_fn") is None
        data: Dataset[MultimodalBatch] = _WholeBatches(self) if whole else self
        if options.get("batch_sampler") is not None:
            batch_size = 1  # what torch wants to see then
        collate = options.pop("collate_fn", None) or self.collate
        if trim:
            collate = partial(_collate_trimmed, collate)
        # by name: Lightning makes another loader of these arguments, with another `batch_size`
        return DataLoader(data, batch_size=batch_size, collate_fn=collate, **options)

    def _like(self, **changes: Any) -> MultimodalDataset:
        """A copy with other tensors, of the same class, so that a subclass still changes its samples."""
        other = copy.copy(self)
        vars(other).update(changes)
        return other

    def only(self, modalities: Collection[str]) -> MultimodalDataset:
        """Keeps some modalities, and makes the others missing.

        Args:
            modalities: Names of the modalities to keep.

        Returns:
            A data set that shares all tensors except the masks.

        Raises:
            ValueError: If a name is not that of a modality.
            TypeError: If `modalities` is not a collection.
        """
        if not isinstance(modalities, Collection):
            raise TypeError(
                f"Expected `modalities` to be a collection of names, but got {modalities!r}"
            )
        if isinstance(modalities, str) or any(name not in self.features for name in modalities):
            raise ValueError(
                f"Expected `modalities` to be among {list(self.features)}, but got {modalities!r}"
            )
        return self._like(
            padding_mask={
                name: mask if name in modalities else torch.ones_like(mask)
                for name, mask in self.padding_mask.items()
            }
        )

    def select(self, indices: Sequence[int] | Tensor) -> MultimodalDataset:
        """Selects the samples at the given positions, in their order.

        Args:
            indices: Positions in the data set; negative ones count from the end.

        Returns:
            A data set whose own positions start at 0. Its number of steps that were not finite is not known.

        Raises:
            IndexError: If a position does not exist.
            TypeError: If `indices` are not integers; a mask is not accepted.
        """
        rows = _positions(indices, self.labels.device)

        def chosen(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[rows]

        return self._like(
            features={name: x[rows] for name, x in self.features.items()},
            padding_mask={name: x[rows] for name, x in self.padding_mask.items()},
            labels=self.labels[rows],
            soft_labels=chosen(self.soft_labels),
            unknown=chosen(self.unknown),
            ids=None if self.ids is None else [self.ids[row] for row in rows.tolist()],
            groups=chosen(self.groups),
            invalid_steps=dict.fromkeys(self.features, 0),
        )

    def in_order(self, label_names: Sequence[str]) -> MultimodalDataset:
        """Returns the same samples with the labels in another order.

        Args:
            label_names: Names of all labels in the desired order.

        Raises:
            ValueError: If these are not the names of the labels.
        """
        names = list(label_names)
        if sorted(names) != sorted(self.label_names):
            raise ValueError(
                f"Expected `label_names` to be {self.label_names} in some order, but got {names}"
            )
        if names == self.label_names:
            return self
        columns = [self.label_names.index(name) for name in names]

        def ordered(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[:, columns]

        return self._like(
            labels=self.labels[:, columns],
            label_names=names,
            soft_labels=ordered(self.soft_labels),
            unknown=ordered(self.unknown),
        )

    def statistics(self, min_std: float = 0.0) -> dict[str, FeatureStatistics]:
        """Computes mean and standard deviation of the features of every modality, over its valid steps.

        Steps with a value that is not finite do not count. The data may be on a disk: they are read in pieces, whose
        moments are merged in float64 (Chan et al. 1983). An overridden `__getitem__` is not used.

        Args:
            min_std: The least standard deviation to return. With the default 0, that of a constant feature is 0; to
                divide by it, set a floor, such as 1e-3.

        Returns:
            :class:`FeatureStatistics` by name.

        Raises:
            ValueError: If `min_std` is below 0.
        """
        check_number("min_std", min_std, "at least 0", 0 <= min_std < float("inf"))
        return {name: self._statistics(name, min_std) for name in self.features}

    def _statistics(self, name: str, min_std: float) -> FeatureStatistics:
        features, padding_mask = self.features[name], self.padding_mask[name]
        mean = torch.zeros(features.shape[2], dtype=torch.float64, device="cpu")
        squares, total = torch.zeros_like(mean), 0
        rows = max(1, _CHUNK // features[0].numel()) if len(self) else 1
        for start in range(0, len(self), rows):
            piece = slice(start, start + rows)
            valid = features[piece].cpu()[~padding_mask[piece].cpu()].double()
            valid = valid[valid.isfinite().all(1)]
            if count := len(valid):
                own, total = valid.mean(0), total + count
                change = own - mean
                mean += change * (count / total)
                squares += (valid - own).square().sum(0)
                squares += change.square() * (count * (1 - count / total))
        std = (squares / total).sqrt() if total else torch.ones_like(mean)
        device = features.device
        return FeatureStatistics(
            mean.float().to(device), std.clamp_min(min_std).float().to(device), total
        )

    @property
    def dims(self) -> dict[str, int]:
        """Size of a step by modality, which layers take as `modality_dims`."""
        return {name: x.shape[2] for name, x in self.features.items()}

    @property
    def steps(self) -> dict[str, int]:
        """Number of steps by modality."""
        return {name: x.shape[1] for name, x in self.features.items()}

    def summary(self) -> DatasetSummary:
        """Counts samples, labels, lengths, missing modalities and masked steps, without reading features."""
        present = self.labels > 0.5
        counts = present.sum(0).tolist()
        unknown = torch.zeros_like(present) if self.unknown is None else self.unknown
        unknown_counts = unknown.sum(0).tolist()
        modalities = {}
        for name, mask in self.padding_mask.items():
            lengths = (~mask).sum(1)
            held = lengths[lengths > 0].double()
            modalities[name] = ModalitySummary(
                self.steps[name],
                self.dims[name],
                (int(held.min()), float(held.quantile(0.5)), int(held.max()))
                if len(held)
                else (0, 0.0, 0),
                int((lengths == 0).sum()),
                int(mask.sum()),
                self.invalid_steps[name],
            )
        return DatasetSummary(
            len(self),
            dict(zip(self.label_names, counts, strict=True)),
            {
                name: count / max(len(self) - not_known, 1)
                for name, count, not_known in zip(
                    self.label_names, counts, unknown_counts, strict=True
                )
            },
            int((~present.any(1) & ~unknown.all(1)).sum()),
            modalities,
            dict(zip(self.label_names, unknown_counts, strict=True)),
        )


def _stacked(rows: Sequence[Tensor], fill: float | bool = 0) -> Tensor:
    """Rows (S, ...) of different lengths as one tensor, padded at the end."""
    steps = max(len(row) for row in rows)
    return torch.stack(
        [
            row
            if len(row) == steps
            else F.pad(row, [0, 0] * (row.dim() - 1) + [0, steps - len(row)], value=fill)
            for row in rows
        ]
    )


def _collated(samples: Sequence[MultimodalBatch], **_: Any) -> Any:
    return MultimodalDataset.collate(samples)


# torch's registry for custom types; without it `default_collate` fails at fields that are None.
default_collate_fn_map[MultimodalBatch] = _collated


def _collate_trimmed(collate: Callable[[Any], MultimodalBatch], samples: Any) -> MultimodalBatch:
    return collate(samples).trimmed()


class _WholeBatches(Dataset[MultimodalBatch]):
    """The data set that `loader` passes to a `DataLoader`: like the original, but a batch is taken at once."""

    def __init__(self, data: MultimodalDataset) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> MultimodalBatch:
        return self.data[index]

    def __getitems__(self, indices: Sequence[int]) -> MultimodalBatch:
        return self.data.batch(indices)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "data":  # requested before `data` is set
            raise AttributeError(name)
        return getattr(self.data, name)
