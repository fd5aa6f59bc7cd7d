"""Value checks look at a tensor once, by a reduction, and closer only where that leaves a doubt."""

import math

import pytest
import torch

from uncertainty_mm._checks import check_finite, check_labels, check_std


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_sum_that_overflows_is_no_reason_to_refuse(dtype):
    largest = torch.full((4,), torch.finfo(dtype).max, dtype=dtype)
    check_finite("x", largest)
    with pytest.raises(ValueError, match="but got 1 NaN or infinite"):
        check_finite("x", torch.cat([largest, largest.new_tensor([-math.inf])]))


@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf])
def test_std_is_looked_at_where_it_counts(value):
    std, left_out = torch.tensor([1.0, value]), torch.tensor([False, True])
    check_std("std", std, left_out)
    if value == math.inf:
        check_std("std", std, infinite=True)
    with pytest.raises(ValueError, match="`std`"):
        check_std("std", std, ~left_out)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float32])
def test_labels_are_looked_at_where_they_are_known(dtype):
    labels, unknown = torch.tensor([0, 1, 2], dtype=dtype), torch.tensor([False, False, True])
    check_labels("labels", labels, unknown)
    check_labels("labels", labels[:2])
    check_labels("labels", labels[:0])
    with pytest.raises(ValueError, match="only 0 and 1, but got 2"):
        check_labels("labels", labels)
