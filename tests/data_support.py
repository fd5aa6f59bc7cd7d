"""Small data sets, and when two are the same."""

import torch

from uncertainty_mm.data import MultimodalDataset


def make(count=20, seed=0, **options):
    """Samples of three modalities, the first without `b`."""
    generator = torch.Generator().manual_seed(seed)
    features, padding_mask = {}, {}
    for name, steps, dim in (("a", 5, 3), ("c", 1, 4), ("b", 7, 2)):
        lengths = torch.randint(1, steps + 1, (count, 1), generator=generator)
        if name == "b":
            lengths[0] = 0
        padding_mask[name] = torch.arange(steps) >= lengths
        x = torch.randn(count, steps, dim, generator=generator)
        features[name] = x.masked_fill(padding_mask[name].unsqueeze(2), 0)
    return MultimodalDataset(
        features,
        padding_mask,
        label_names=["first", "second"],
        **{
            "labels": torch.randint(2, (count, 2), generator=generator, dtype=torch.uint8),
            "soft_labels": torch.rand(count, 2, generator=generator),
        }
        | options,
    )


def check_same(actual, expected):
    """Equal data, in the same order of modalities."""
    assert list(actual.dims.items()) == list(expected.dims.items())
    for name in expected.dims:
        assert torch.equal(actual.features[name], expected.features[name])
        assert torch.equal(actual.padding_mask[name], expected.padding_mask[name])
    assert torch.equal(actual.labels, expected.labels)
    assert actual.label_names == expected.label_names
    assert actual.ids == expected.ids
    for name in ("soft_labels", "unknown", "groups"):
        one, other = getattr(actual, name), getattr(expected, name)
        assert one is other is None or torch.equal(one, other), name
