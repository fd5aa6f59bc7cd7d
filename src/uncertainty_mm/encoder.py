"""Encoders for the sequences of one modality: :class:`SequenceEncoder` (section 3.2) and :class:`PlaceReads`."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from uncertainty_mm._checks import (
    check_choice,
    check_dropout,
    check_finite,
    check_positive_int,
    check_positive_ints,
    check_tensor,
    check_validate_args,
    checks_values,
)
from uncertainty_mm._component import Component

__all__ = ["EncoderLayer", "PackedSteps", "PlaceReads", "SequenceEncoder"]


class PackedSteps:
    """Packs the steps of padded sequences (B, S, D) into one matrix (N, D), and back.

    Everything except attention treats each step separately, and can skip padding. Counting the steps would make the
    host wait for an accelerator, however. There, as in compiled or exported programs and under the transforms of
    `torch.func`, N is B * S, padding included.

    Args:
        padding: Bool tensor (B, S), True where a step is to be left out.

    Example:
        >>> steps = PackedSteps(torch.tensor([[False, True], [False, False]]))
        >>> steps.pack(torch.arange(4.0).view(2, 2, 1)).flatten()
        tensor([0., 2., 3.])
    """

    def __init__(self, padding: Tensor) -> None:
        self.padding, self.shape = padding, padding.shape
        counted = checks_values(padding)
        self.left_out = None if counted else padding.flatten().unsqueeze(1)
        self.whole = counted and not padding.any()
        self.moves = counted and not self.whole
        if self.moves:
            self.rows = (~padding.flatten()).nonzero().squeeze(1)
            self.sample = self.rows // padding.shape[1]
            self.step = self.rows % padding.shape[1]

    def pack(self, x: Tensor) -> Tensor:
        """Packs (B, S, D) into (N, D), with 0 for padding if it is included."""
        x = x.flatten(0, 1)
        if self.moves:
            return x.index_select(0, self.rows)
        return x if self.left_out is None else x.masked_fill(self.left_out, 0)

    def of_samples(self, x: Tensor) -> Tensor:
        """(B, D) -> (N, D), the row of its sample for every step."""
        if self.moves:
            return x[self.sample]
        return x.unsqueeze(1).expand(*self.shape, -1).flatten(0, 1)

    def of_places(self, x: Tensor) -> Tensor:
        """(S or more, D) -> (N, D), the row of its place in the sequence for every step."""
        if self.moves:
            return F.embedding(self.step, x)
        # a slice would be exported for a single number of steps
        x = x.index_select(0, torch.arange(self.shape[1], device=x.device))
        return x.expand(self.shape[0], -1, -1).flatten(0, 1)

    def mean(self, x: Tensor) -> Tensor:
        """(N, D) -> (B, D), over the steps of every sample that are not padding; 0 without any."""
        x = self.unpack(x)
        if self.whole:
            return x.sum(1) / max(x.shape[1], 1)
        valid = (~self.padding).unsqueeze(2)
        return (x * valid).sum(1) / valid.sum(1).clamp_min(1)

    def unpack(self, x: Tensor) -> Tensor:
        """Unpacks (N, D) into (B, S, D), with 0 for steps that were not packed."""
        if self.moves:
            x = x.new_zeros(math.prod(self.shape), x.shape[1]).index_copy_(0, self.rows, x)
        return x.view(*self.shape, x.shape[1])


class EncoderLayer(nn.Module):
    """A Transformer layer on packed steps that normalises before its sublayers.

    Args:
        dim: Width of a step.
        num_heads: Attention heads, a divisor of `dim`.
        dropout: Dropout probability after each sublayer. Attention weights are kept, for the sake of the fused kernel.
    """

    def __init__(self, dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(dim),
            nn.Linear(dim, dim),  # as narrow as in the released configuration
            nn.GELU(),
            nn.Linear(dim, dim),
            nn.Dropout(dropout),
        )

    def forward(self, x: Tensor, steps: PackedSteps, mask: Tensor | None) -> Tensor:
        """Lets every step attend to its sequence.

        Args:
            x: Packed steps (N, dim).
            steps: What packed them.
            mask: Bool tensor (B, 1, 1, S), True at the steps to attend to, at least one a sequence; None for all.

        Returns:
            Tensor (N, dim).
        """
        qkv = self.qkv(self.norm(x))
        if steps.shape[1] == 1 and not torch.compiler.is_compiling():
            attended = qkv.chunk(3, 1)[2]  # a single step attends to itself: its value
        else:
            attended = steps.pack(self._attended(steps.unpack(qkv), mask)).to(x.dtype)
        x = x + self.dropout(self.out(attended))
        output: Tensor = x + self.feed_forward(x)
        return output

    def _attended(self, qkv: Tensor, mask: Tensor | None) -> Tensor:
        """Values (B, S, dim), each the mean of those that its step attends to."""
        if qkv.is_cpu and qkv.dtype in (torch.float16, torch.bfloat16):
            # the backward pass of attention in half precision takes five times as long there
            with torch.autocast("cpu", enabled=False):
                return self._attended(qkv.float(), mask)
        # each (B, num_heads, S, dim / num_heads)
        parts = (x.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for x in qkv.chunk(3, 2))
        query, key, value = parts
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return attended.transpose(1, 2).flatten(2)


class SequenceEncoder(Component):
    r"""Encodes each step of a sequence in the context of its other steps, and ignores padding.

    Features are standardised (:meth:`standardize`), projected to `hidden_dim`, and added to learned positions. Then
    follow `num_layers` Transformer layers, which normalise before their sublayers, and a last normalisation. With
    `size="apart"` each sequence is first divided by its root mean square :math:`r`, and :math:`\log r` is a further
    input to all of its steps. Otherwise the normalisation inside the layers would hide how large, and so how noisy, a
    sequence is.

    Source: Huang et al. 2025, arXiv 2502.13954, section 3.2 (linear layer, positions, Transformer); Vaswani et al.
    2017, arXiv 1706.03762; standardisation, the order of normalisation and the separate size are additions.

    Args:
        in_dim: Size of a step.
        max_steps: Steps of the longest sequence.
        hidden_dim: Width of the layers.
        num_layers: Number of Transformer layers.
        num_heads: Attention heads of a layer, a divisor of `hidden_dim`.
        dropout: Dropout probability.
        size: `"apart"`: the size of a sequence is a separate input; `"within"`: it stays in the features.
        validate_args: Check values on the CPU only (None), never (False), or always (True).

    Attributes:
        mean: Tensor (in_dim,) that is subtracted from the features; 0 before :meth:`standardize`. Saved with the model.
        std: Tensor (in_dim,), above 0, that divides the features; 1 before :meth:`standardize`. Saved with the model.
        positions: Parameter (max_steps, hidden_dim).

    Raises:
        ValueError: If an argument is out of range or unknown.
        TypeError: If an argument has the wrong type.

    Example:
        >>> encoder = SequenceEncoder(in_dim=12, max_steps=50, hidden_dim=64)
        >>> padding = torch.arange(50) >= torch.tensor([[30], [50]])  # True: leave out
        >>> encoder(torch.randn(2, 50, 12), padding).shape
        torch.Size([2, 50, 64])
    """

    mean: Tensor
    std: Tensor
    in_dim: int
    max_steps: int
    hidden_dim: int
    num_heads: int
    validate_args: bool | None

    def __init__(
        self,
        in_dim: int,
        max_steps: int,
        hidden_dim: int = 256,
        *,
        num_layers: int = 3,
        num_heads: int = 8,
        dropout: float = 0.1,
        size: Literal["apart", "within"] = "apart",
        validate_args: bool | None = None,
    ) -> None:
        super().__init__()
        for name, value in (
            ("in_dim", in_dim),
            ("max_steps", max_steps),
            ("hidden_dim", hidden_dim),
        ):
            check_positive_int(name, value)
        check_positive_int("num_layers", num_layers)
        check_positive_int("num_heads", num_heads)
        if hidden_dim % num_heads:
            raise ValueError(
                f"Expected `hidden_dim` to be a multiple of `num_heads` = {num_heads}, but got {hidden_dim}"
            )
        check_dropout(dropout)
        check_choice("size", size, ("apart", "within"))
        check_validate_args(validate_args)
        self._set(in_dim=in_dim, max_steps=max_steps, hidden_dim=hidden_dim)
        self._set(num_heads=num_heads, validate_args=validate_args)
        self._keep(mean=torch.zeros(in_dim), std=torch.ones(in_dim))
        self.project = nn.Linear(in_dim, hidden_dim)
        self.positions = nn.Parameter(torch.empty(max_steps, hidden_dim))
        self.size = (
            nn.Sequential(nn.Linear(1, hidden_dim), nn.GELU(), nn.Linear(hidden_dim, hidden_dim))
            if size == "apart"
            else None
        )
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(
            EncoderLayer(hidden_dim, num_heads, dropout) for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(hidden_dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Gives all parameters their initial distribution, and resets the statistics."""
        super().reset_parameters()
        # as large as the projected features, because much smaller positions have little effect on small data sets
        nn.init.normal_(self.positions, std=0.5)
        self.mean.zero_()
        self.std.fill_(1)

    def standardize(self, mean: Tensor, std: Tensor) -> None:
        """Sets the mean and standard deviation of the training data, by which features are standardised.

        Args:
            mean: Tensor (in_dim,), finite.
            std: Tensor (in_dim,), at least 0; values below 1e-3, as of constant columns, count as 1e-3.

        Raises:
            ValueError: If a shape is wrong, a value is not finite, or `std` is negative; nothing is then changed.
            TypeError: If a dtype is wrong.
        """
        sizes = {"in_dim": self.in_dim}
        for name, value in (("mean", mean), ("std", std)):
            check_tensor(name, value, "floating", "in_dim", sizes)
            check_finite(name, value)
        if (std < 0).any():
            raise ValueError(f"Expected `std` to be at least 0, but got {std.min().item()}")
        self.mean.copy_(mean)
        self.std.copy_(std.clamp_min(1e-3))

    def standardized(self, x: Tensor) -> Tensor:
        """Features (..., in_dim) minus the mean of the training data, divided by its standard deviation."""
        # `DataParallel` does not move state
        return (x - self.mean.to(x.device)) / self.std.to(x.device)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        """Encodes a batch of sequences.

        Args:
            x: Tensor (B, S, in_dim), S at most `max_steps`.
            padding: Bool tensor (B, S), True where a step is to be left out. Values there are ignored.

        Returns:
            Tensor (B, S, hidden_dim), 0 at padded steps.

        Raises:
            ValueError: If shapes or devices disagree, a sequence is too long, or a step that counts is not finite.
            TypeError: If a dtype is wrong.
        """
        _check_sequence(self, x, padding)
        steps = PackedSteps(padding)
        mask = None
        if not steps.whole:
            # A missing sequence attends to itself, which is harmless: nobody reads it.
            mask = (~padding | padding.all(dim=1, keepdim=True)).unsqueeze(1).unsqueeze(1)
        # of fewer steps where padding is skipped; elsewhere packing makes it 0, which has to come last
        features = (
            self.standardized(steps.pack(x)) if steps.moves else steps.pack(self.standardized(x))
        )
        embedded = steps.of_places(self.positions)
        if self.size is not None:
            features = features.to(torch.promote_types(features.dtype, torch.float32))
            features = features.clamp(-1e15, 1e15)  # whose squares can be added
            size = steps.mean(features.square().mean(1, keepdim=True)).clamp_min(1e-6).sqrt()
            features = features / steps.of_samples(size)
            embedded = embedded + steps.of_samples(self.size(size.log().to(x.dtype)))
        # tools that cast inputs and parameters, as sharding does, leave the statistics as they are
        x = self.dropout(self.project(features.to(x.dtype)) + embedded)
        for layer in self.layers:
            x = layer(x, steps, mask)
        encoded = steps.unpack(self.norm(x))
        return encoded if steps.left_out is None else encoded.masked_fill(padding.unsqueeze(2), 0)


def _check_sequence(module: SequenceEncoder | PlaceReads, x: Tensor, padding: Tensor) -> None:
    """Checks a batch of sequences (B, S, in_dim), S at most `max_steps`, and their padding."""
    sizes = {"in_dim": module.in_dim}
    check_tensor("x", x, "floating", "B S in_dim", sizes)
    check_tensor("padding", padding, "bool", "B S", sizes, x.device)
    if x.shape[1] > module.max_steps:
        raise ValueError(
            f"Expected `x` to have at most `max_steps` = {module.max_steps} steps, but got {x.shape[1]}"
        )
    if checks_values(x, module.validate_args):
        check_finite("x", x, padding.unsqueeze(2))


class PlaceReads(Component):
    r"""Reads a sequence by the position of its steps, which attention by content ignores.

    .. math::
        \operatorname{out}_{br} = \sum_s P_{rs}\, x_{bs}

    over the steps :math:`s` that are not padding. It suits sequences whose steps have fixed meanings, such as the
    patches of an image or times of day. Each of the :math:`R` readings has one learned weight per step, the same for
    all features; a linear layer on the flattened sequence needs `in_dim` times as many for each output.

    Source: none; it is new here.

    Args:
        in_dim: Size of a step.
        max_steps: Steps of the longest sequence.
        num_reads: Number of readings :math:`R`.
        validate_args: Check values on the CPU only (None), never (False), or always (True).

    Attributes:
        weight: Parameter (num_reads, max_steps), :math:`P`; initially normal with variance 1 / max_steps.

    Raises:
        ValueError: If an argument is out of range.
        TypeError: If an argument has the wrong type.

    Example:
        >>> reads = PlaceReads(in_dim=12, max_steps=49, num_reads=8)
        >>> padding = torch.arange(49) >= torch.tensor([[30], [49]])  # True: leave out
        >>> reads(torch.randn(2, 49, 12), padding).shape
        torch.Size([2, 96])
    """

    in_dim: int
    max_steps: int
    num_reads: int
    validate_args: bool | None

    def __init__(
        self,
        in_dim: int,
        max_steps: int,
        num_reads: int = 8,
        *,
        validate_args: bool | None = None,
    ) -> None:
        super().__init__()
        check_positive_ints(in_dim=in_dim, max_steps=max_steps, num_reads=num_reads)
        check_validate_args(validate_args)
        self._set(in_dim=in_dim, max_steps=max_steps, num_reads=num_reads)
        self._set(validate_args=validate_args)
        self.weight = nn.Parameter(torch.empty(num_reads, max_steps))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Gives the parameter its initial distribution."""
        nn.init.normal_(self.weight, std=self.max_steps**-0.5)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        """Reads a batch of sequences.

        Args:
            x: Tensor (B, S, in_dim), S at most `max_steps`.
            padding: Bool tensor (B, S), True where a step is to be left out. Values there are ignored.

        Returns:
            Tensor (B, num_reads * in_dim), the concatenated readings; 0 where all steps are padding.

        Raises:
            ValueError: If shapes or devices disagree, a sequence is too long, or a step that counts is not finite.
            TypeError: If a dtype is wrong.
        """
        _check_sequence(self, x, padding)
        x = x.masked_fill(padding.unsqueeze(2), 0)  # 0 times NaN is NaN
        steps = torch.arange(x.shape[1], device=x.device)
        # a slice would be exported for a single number of steps
        weight = self.weight.index_select(1, steps)
        return (weight.expand(x.shape[0], -1, -1) @ x).flatten(1)  # `weight @ x` copies x
