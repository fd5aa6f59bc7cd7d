"""
The uncertainty gate, step by step
==================================

:class:`~uncertainty_mm.UncertaintyGatedFusion` makes two predictions, one from the means of the Gaussians and one
from their standard deviations, and mixes them. The gate decides how much each counts. This page follows one sample
through it by hand, and shows why the gate is not the one the paper prints.
"""

import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt
from torch import nn

from uncertainty_mm import (
    DiagonalGaussian,
    GaussianDecoupler,
    UncertaintyGatedFusion,
)
from uncertainty_mm.functional import expected_distance, prediction_distance

torch.manual_seed(0)
torch.set_printoptions(precision=3, sci_mode=False)

# %%
# 1. A first prediction
# ---------------------
#
# Some classifier has looked at the sample and gives each of three labels a probability.

first = torch.tensor([[0.98, 0.60, 0.10]])
print("first prediction ", first)

# %%
# 2. How far off does it expect to be?
# ------------------------------------
#
# If a label is present with probability `p`, it is `1 - p` away from the truth with probability `p`, and `p` away
# with probability `1 - p`. On average that is `2 p (1 - p)`: next to nothing for a sure prediction, 1/2 at worst.

doubt = expected_distance(first)
print("expected distance", doubt)

p = torch.linspace(0, 1, 101)
fig, ax = plt.subplots(figsize=(5, 3), layout="constrained")
ax.plot(p, expected_distance(p), label="expected distance")
ax.plot(first[0], doubt[0], "o", label="the three labels")
ax.set(
    xlabel="first prediction", ylabel="distance from the label", ylim=(0, 0.6)
)
ax.legend()

# %%
# 3. Two predictions
# ------------------
#
# The sample has two modalities, and each label of each modality has a Gaussian with four dimensions, here made up.
# They are multiplied; one small network reads the mean of the product, another one its standard deviation. Neither is
# trained; this page is about what is done with their answers.

latent = DiagonalGaussian(
    3 * torch.randn(1, 2, 3, 4), 2 * torch.rand(1, 2, 3, 4)
)
fusion = UncertaintyGatedFusion(
    num_modalities=2, num_labels=3, latent_dim=4
).eval()
with torch.no_grad():
    prediction = fusion(latent, doubt)
from_means = prediction.mean_logits.sigmoid()
from_stds = prediction.std_logits.sigmoid()
print("from the means   ", from_means)
print("from the stds    ", from_stds)

# %%
# 4. The mixture
# --------------
#
# The means count with `1 - doubt`, the standard deviations with `doubt`. What the layer returns is the logit of this
# mixture, computed without leaving the logarithms, so that the cross-entropy stays exact near 0 and 1.

by_hand = (1 - doubt) * from_means + doubt * from_stds
print("weight of means  ", prediction.mean_weight)
print("mixture by hand  ", by_hand)
print("mixture of layer ", prediction.probs)
print("logits           ", prediction.logits)
# sphinx_gallery_start_ignore
torch.testing.assert_close(by_hand, prediction.probs)
assert float(doubt[0, 0]) < 0.05
assert float(doubt[0, 1]) > 0.45
# sphinx_gallery_end_ignore

# %%
# The first label was nearly certain, so its mixture is nearly the prediction from the means. The second was open, so
# both predictions count about the same.
#
# Why not the gate of the paper?
# ------------------------------
#
# Eq. 8 of the paper takes the true distance between the first prediction and the labels as the gate. That needs the
# labels. At test time there are none; and in training, with a distance for each label, gate and first prediction
# together give the answer away:

print("first prediction   ", first)
print("distance if present", prediction_distance(first, torch.ones(1, 3)))
print("distance if absent ", prediction_distance(first, torch.zeros(1, 3)))

# %%
# A model can learn to read that. To see it, here is a task on which nothing can be learned: labels drawn by coin,
# features that have nothing to do with them. The loss of a coin is ln 2 = 0.693. Both models are trained the same
# way, one with the true distance and one with the expected distance, on new samples at each step; then both are
# evaluated with the gate they were trained with, and with the one that needs no labels. Gaussians and fusion are those
# of the paper here.


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.decoupler = GaussianDecoupler(
            2, in_dim=8, latent_dim=8, dropout=0.0, normalize_mean=False
        )
        self.fusion = UncertaintyGatedFusion(
            2, 3, 8, dropout=0.0, combine="concat", detach_std=False
        )

    def forward(self, z, gate):
        return self.fusion(self.decoupler(z), gate).logits


def loss_of(model, oracle: bool) -> torch.Tensor:
    """Loss on 256 samples of pure chance; only the oracle gate sees labels."""
    z, labels = torch.randn(256, 2, 3, 8), torch.randint(0, 2, (256, 3)).float()
    first = (2 * z[:, 0, :, 0]).sigmoid()  # read off the features
    gate = (
        prediction_distance(first, labels)
        if oracle
        else expected_distance(first)
    )
    return F.binary_cross_entropy_with_logits(model(z, gate), labels)


losses = {}
for oracle in (True, False):
    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(200):
        loss = loss_of(model, oracle)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        own = float(sum(loss_of(model, oracle) for _ in range(20)) / 20)
        blind = float(sum(loss_of(model, oracle=False) for _ in range(20)) / 20)
    losses[oracle] = own, blind
    print(f"trained with the {'true' if oracle else 'expected'} distance:")
    print(f"  loss {own:.3f} with this gate, {blind:.3f} without labels")
# sphinx_gallery_start_ignore
torch.set_printoptions(profile="default")  # all pages run in one process
assert losses[True][0] < 0.4
assert losses[True][1] > 0.8
assert abs(losses[False][1] - 0.693) < 0.02
# sphinx_gallery_end_ignore

# %%
# With the labels in the gate the model predicts coins. Without them it is worse than a coin, because it still
# believes its gate. With the expected distance it learns that there is nothing to be learned. Hence `uncertainty` is
# an argument of the layer: give it the expected distance of a first prediction, or any other number in [0, 1] that is
# there at test time too.
#
# A second point: the text of the paper says that an uncertain sample should rely on its standard deviations, while
# Eq. 8 gives the distance as a weight to the means. The default follows the text; `mean_weight="uncertainty"` is the
# equation. :doc:`/equations` has more of such choices.
