"""One small example of every public module, for the tests that run on all of them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils import _pytree as pytree

import uncertainty_mm as umm

BATCH, LABELS, LATENT = 4, 3, 5
DIMS = {"voice": 3, "face": 6}
STEPS = {"voice": 4, "face": 2}
MISSING = torch.tensor([[False, False], [True, False], [False, True], [False, False]])


def attention_inputs():
    features = {m: torch.randn(BATCH, STEPS[m], DIMS[m]) for m in DIMS}
    padding_mask = {m: torch.rand(BATCH, STEPS[m]) < 0.3 for m in DIMS}
    return features, padding_mask


def latent():
    shape = (BATCH, len(DIMS), LABELS, LATENT)
    return umm.DiagonalGaussian(torch.randn(shape), 0.1 + torch.rand(shape))


def ordinality_inputs():
    mask = torch.tensor([False, True, False, False])
    return 0.5 + torch.rand(BATCH), torch.rand(BATCH), torch.rand(BATCH), mask


def tracker_inputs():
    return torch.randint(8, (BATCH,)), torch.rand(BATCH, LABELS) < 0.5


def track(tracker, indices, correct):
    tracker.update(indices, correct)
    return tracker(indices), tracker.counts(indices), tracker.forgetting_events(indices)


@dataclass(frozen=True)
class Case:
    """How to build a module, draw inputs for it and run it; `shown` is part of its repr."""

    build: Callable[..., nn.Module]
    draw: Callable[[], tuple]
    shown: str
    run: Callable = lambda module, *inputs: module(*inputs)

    def inputs(self, step, device="cpu", dtype=torch.float32):
        """The batch of a step: the same for the same step, floating tensors being leaves."""
        torch.manual_seed(step)

        def place(x):
            x = x.to(device, dtype if x.is_floating_point() else None)
            return x.requires_grad_(x.is_floating_point())

        return pytree.tree_map(place, self.draw())

    def results(self, module, inputs):
        """Detached outputs of a run, and the gradients of their sum, if there are any."""
        outputs = pytree.tree_leaves(self.run(module, *inputs))
        live = [x.sum() for x in outputs if x.requires_grad]
        leaves = [x for x in pytree.tree_leaves(inputs) if x.requires_grad] if live else []
        leaves += list(module.parameters()) if live else []
        grads = torch.autograd.grad(sum(live), leaves, materialize_grads=True) if live else ()
        return [x.detach() for x in (*outputs, *grads)]


CASES = {
    "EmotionQueryAttention": Case(
        lambda **kwargs: umm.EmotionQueryAttention(
            DIMS, LABELS, label_dim=7, proj_dim=8, out_dim=6, **kwargs
        ),
        attention_inputs,
        r"Embedding\(3, 7\)",
    ),
    "GaussianDecoupler": Case(
        lambda **kwargs: umm.GaussianDecoupler(
            len(DIMS), 6, LATENT, hidden_dims=(9,), dropout=0.0, min_std=0.0125, **kwargs
        ),
        lambda: (torch.randn(BATCH, len(DIMS), LABELS, 6), MISSING),
        "0.0125",
    ),
    "DistributionSupConLoss": Case(
        lambda **kwargs: umm.DistributionSupConLoss(
            len(DIMS), LABELS, LATENT, queue_size=50, temperature=0.125, **kwargs
        ),
        lambda: (latent(), torch.randint(2, (BATCH, LABELS)), MISSING),
        "temperature=0.125",
    ),
    "UncertaintyGatedFusion": Case(
        lambda **kwargs: umm.UncertaintyGatedFusion(
            len(DIMS), LABELS, LATENT, hidden_dim=9, dropout=0.0, **kwargs
        ),
        lambda: (latent(), torch.rand(BATCH, LABELS), MISSING),
        "certainty",
    ),
    "SoftRankOrdinalityLoss": Case(
        lambda **kwargs: umm.SoftRankOrdinalityLoss(temperature=0.125, **kwargs),
        ordinality_inputs,
        "temperature=0.125",
    ),
    "PlattScaling": Case(
        lambda **kwargs: umm.PlattScaling(LABELS, **kwargs).fit(
            torch.randn(20, LABELS), torch.randint(2, (20, LABELS))
        ),
        lambda: (torch.randn(BATCH, LABELS),),
        "num_labels=3",
    ),
    "CorrectnessTracker": Case(
        lambda **kwargs: umm.CorrectnessTracker(8, LABELS, prior=0.125, **kwargs),
        tracker_inputs,
        "0.125",
        track,
    ),
}
