"""One data set for every source: :class:`MultimodalDataset`."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence, Set
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from uncertainty_mm._checks import check_finite, check_labels, check_range, check_tensor


class MultimodalBatch(NamedTuple):
    """Samples of a :class:`MultimodalDataset`; a single sample lacks the axis B.

    Attributes:
        features: (B, S_m, D_m) by modality, float32, 0 where masked.
        padding_mask: Bool (B, S_m) by modality, True where a step is to be left out.
        labels: (B, Q) of 0 and 1.
        indices: (B,) int64, positions in the data set.
        soft_labels: (B, Q), float32, or None where the data set has none.
    """

    features: dict[str, Tensor]
    padding_mask: dict[str, Tensor]
    labels: Tensor
    indices: Tensor
    soft_labels: Tensor | None = None


class ModalitySummary(NamedTuple):
    """One modality in a :class:`DatasetSummary`.

    Attributes:
        steps: Steps of the longest sequence that could be held.
        dim: Size of a step.
        lengths: Smallest, median and largest number of steps that are not masked, where the modality is not missing.
        missing: Samples of which every step is masked.
        masked_steps: Masked steps of all samples.
        invalid_steps: Those that are masked because the file held NaN or infinity there.
    """

    steps: int
    dim: int
    lengths: tuple[int, float, int]
    missing: int
    masked_steps: int
    invalid_steps: int


class DatasetSummary(NamedTuple):
    """What :meth:`MultimodalDataset.summary` counts; printed, it is a table.

    Attributes:
        samples: Number of samples N.
        label_counts: Samples with the label, by name.
        label_shares: The same as a share of all samples, in [0, 1].
        unlabelled: Samples without any label.
        modalities: A :class:`ModalitySummary` by name.
    """

    samples: int
    label_counts: dict[str, int]
    label_shares: dict[str, float]
    unlabelled: int
    modalities: dict[str, ModalitySummary]

    def __str__(self) -> str:
        lines = [f"{self.samples} samples, {self.unlabelled} without a label"]
        width = max(map(len, self.label_counts))
        lines += [
            f"  {name:<{width}}  {count:>7}  {self.label_shares[name]:.3f}"
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


def _check_names(argument: str, value: Any, kind: str) -> None:
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
    """Raises unless `parts` holds data sets by the name of their split, at least one."""
    _check_names("parts", parts, "mapping")
    if not parts:
        raise ValueError("Expected `parts` to name splits, at least one, but got none")
    for name, part in parts.items():
        if not isinstance(part, MultimodalDataset):
            raise TypeError(
                f"Expected `parts[{name!r}]` to be a MultimodalDataset, but got {type(part).__name__}"
            )


def _positions(indices: Sequence[int] | Tensor) -> Tensor:
    """Rows as a tensor (n,) of int64; a mask or fractions would silently be taken for other rows."""
    try:
        rows = torch.as_tensor(indices)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"Expected `indices` to hold integers, but got {indices!r}") from error
    if rows.numel() == 0 and not isinstance(indices, Tensor):
        rows = rows.long()
    return check_tensor("indices", rows, "integer", "n", {}).long()


class MultimodalDataset(Dataset[MultimodalBatch]):
    """Multi-label samples with a sequence for every modality, held as tensors.

    A batch is taken from the tensors at once, without a loop over samples. The tensors may be memory-mapped
    (:func:`read_folder`); then only the rows of a batch are read.

    Args:
        features: (N, S_m, D_m) by modality, floating. Lengths and sizes differ between modalities.
        padding_mask: Bool (N, S_m) by modality, True where a step is to be left out; all True where a sample lacks
            the modality.
        labels: (N, Q) of 0 and 1.
        label_names: Names of the Q labels, in the order of the columns.
        soft_labels: (N, Q), floating, at least 0: what the labels were made from, such as intensities (0 to 3 in
            CMU-MOSEI) or the share of the raters who named the label.
        ids: N names of samples.
        invalid_steps: By modality, steps that are masked because their values were not finite; for the summary.
        validate_args: False leaves the values of `features` unread (they may lie on a disk).

    Raises:
        ValueError: If shapes disagree, a label is not 0 or 1, a step that is not masked is not finite, or names repeat.
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
        ids: Sequence[str] | None = None,
        invalid_steps: Mapping[str, int] | None = None,
        validate_args: bool = True,
    ) -> None:
        for argument, mapping in (("features", features), ("padding_mask", padding_mask)):
            _check_names(argument, mapping, "mapping")
        if not features or set(features) != set(padding_mask):
            raise ValueError(
                "Expected `features` and `padding_mask` to name the same modalities, at least one, "
                f"but got {sorted(features)} and {sorted(padding_mask)}"
            )
        _check_names("label_names", label_names, "sequence")
        if len(set(label_names)) != len(label_names) or not label_names:
            raise ValueError(
                f"Expected `label_names` to be different names, at least one, but got {list(label_names)}"
            )
        shape = {"Q": len(label_names)}
        device = check_tensor("labels", labels, "number", "N Q", shape).device
        check_labels("labels", labels)
        for name, x in features.items():
            sizes = {"N": shape["N"]}
            check_tensor(f"features[{name!r}]", x, "floating", "N S D", sizes, device)
            if 0 in x.shape[1:]:
                raise ValueError(
                    f"Expected `features[{name!r}]` to have steps and features, but got {tuple(x.shape)}"
                )
            mask = padding_mask[name]
            check_tensor(f"padding_mask[{name!r}]", mask, "bool", "N S", sizes, device)
            if validate_args:
                check_finite(f"features[{name!r}]", x, mask.unsqueeze(2))
        if soft_labels is not None:
            check_tensor("soft_labels", soft_labels, "floating", "N Q", shape, device)
            check_range("soft_labels", soft_labels, 0, torch.finfo(soft_labels.dtype).max)
        if ids is not None:
            _check_names("ids", ids, "sequence")
            if len(ids) != shape["N"]:
                raise ValueError(f"Expected `ids` to name {shape['N']} samples, but got {len(ids)}")
        if invalid_steps is not None:
            _check_names("invalid_steps", invalid_steps, "mapping")
            if not set(invalid_steps) <= set(features):
                raise ValueError(
                    f"Expected `invalid_steps` to name modalities of {list(features)}, "
                    f"but got {list(invalid_steps)}"
                )
        self.features = dict(features)
        self.padding_mask = {name: padding_mask[name] for name in features}
        self.labels = labels
        self.label_names = list(label_names)
        self.soft_labels = soft_labels
        self.ids = None if ids is None else list(ids)
        self.invalid_steps = {name: (invalid_steps or {}).get(name, 0) for name in features}

    def __len__(self) -> int:
        return self.labels.shape[0]

    def __getitem__(self, index: int) -> MultimodalBatch:
        """One sample, without the axis of the batch."""
        batch = self.__getitems__([range(len(self))[index]])
        return MultimodalBatch(
            {name: x[0] for name, x in batch.features.items()},
            {name: x[0] for name, x in batch.padding_mask.items()},
            batch.labels[0],
            batch.indices[0],
            None if batch.soft_labels is None else batch.soft_labels[0],
        )

    def __getitems__(self, indices: Sequence[int] | Tensor) -> MultimodalBatch:
        """A whole batch at once."""
        rows = _positions(indices)
        # A masked step is 0 whatever the tensors hold there; NaN would survive a product with a weight of 0.
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
        )

    def __repr__(self) -> str:
        sizes = {name: tuple(x.shape[1:]) for name, x in self.features.items()}
        return f"{type(self).__name__}({len(self)} samples, {sizes}, labels {self.label_names})"

    @staticmethod
    def collate(batch: Any) -> Any:
        """The batch as it is: the `collate_fn` of a `DataLoader`, because `__getitems__` has already collated."""
        return batch

    def loader(self, batch_size: int, **options: Any) -> DataLoader[MultimodalBatch]:
        """A `torch.utils.data.DataLoader` of batches.

        Args:
            batch_size: Samples in a batch.
            options: Passed to `DataLoader`: `shuffle`, `sampler`, `num_workers`, ...

        Returns:
            The loader, which yields :class:`MultimodalBatch`.
        """
        return DataLoader(self, batch_size, collate_fn=self.collate, **options)

    def only(self, modalities: Collection[str]) -> MultimodalDataset:
        """The same samples with the other modalities missing.

        Args:
            modalities: Names of the modalities to keep.

        Returns:
            A data set that shares all tensors but the masks.

        Raises:
            ValueError: If a name is not that of a modality.
            TypeError: If `modalities` is no collection.
        """
        if not isinstance(modalities, Collection):
            raise TypeError(
                f"Expected `modalities` to be a collection of names, but got {modalities!r}"
            )
        if isinstance(modalities, str) or any(name not in self.features for name in modalities):
            raise ValueError(
                f"Expected `modalities` to be among {list(self.features)}, but got {modalities!r}"
            )
        padding_mask = {
            name: mask if name in modalities else torch.ones_like(mask)
            for name, mask in self.padding_mask.items()
        }
        return MultimodalDataset(
            self.features,
            padding_mask,
            self.labels,
            self.label_names,
            soft_labels=self.soft_labels,
            ids=self.ids,
            invalid_steps=self.invalid_steps,
            validate_args=False,
        )

    def select(self, indices: Sequence[int] | Tensor) -> MultimodalDataset:
        """The samples at these positions, in this order.

        Args:
            indices: Positions in the data set; negative ones count from the end.

        Returns:
            A data set whose own positions begin with 0. How many of its masked steps were not finite is not known.

        Raises:
            IndexError: If there is no such position.
            TypeError: If `indices` are no integers; a mask is none.
        """
        rows = _positions(indices)
        return MultimodalDataset(
            {name: x[rows] for name, x in self.features.items()},
            {name: x[rows] for name, x in self.padding_mask.items()},
            self.labels[rows],
            self.label_names,
            soft_labels=None if self.soft_labels is None else self.soft_labels[rows],
            ids=None if self.ids is None else [self.ids[row] for row in rows.tolist()],
            validate_args=False,
        )

    @property
    def dims(self) -> dict[str, int]:
        """Size of a step by modality: what the layers take as `modality_dims`."""
        return {name: x.shape[2] for name, x in self.features.items()}

    @property
    def steps(self) -> dict[str, int]:
        """Number of steps by modality."""
        return {name: x.shape[1] for name, x in self.features.items()}

    def summary(self) -> DatasetSummary:
        """Counts samples, labels, lengths, missing modalities and masked steps. Reads no features."""
        present = self.labels != 0
        counts = present.sum(0).tolist()
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
                name: count / max(len(self), 1)
                for name, count in zip(self.label_names, counts, strict=True)
            },
            int((~present.any(1)).sum()),
            modalities,
        )
