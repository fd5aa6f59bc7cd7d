"""
Gaussians and the contrastive loss
==================================

What a label reads from a modality becomes a Gaussian: a mean, which says what was seen, and a standard deviation.
:class:`~uncertainty_mm.DistributionSupConLoss` asks of these Gaussians that those of one class lie close together and
apart from the others. A class is a modality, a label, and whether the label is present. This page trains with this
loss alone, in two dimensions, where it can be drawn.
"""

from itertools import product

import torch
from matplotlib import pyplot as plt
from matplotlib.patches import Ellipse

from uncertainty_mm import (
    DiagonalGaussian,
    DistributionSupConLoss,
    GaussianDecoupler,
)
from uncertainty_mm.data import SyntheticMMER

torch.manual_seed(0)
names = ["happy", "sad", "angry"]
even = torch.full((8,), 1 / 8)  # all sets of labels are equally likely
world = SyntheticMMER(3, {"text": (20, 16, 0.6)}, noise=(0.3, 0.6), prior=even)
train, test = world.sample(2000, seed=1), world.sample(60, seed=2)


def vectors(samples) -> torch.Tensor:
    """The mean frame of each sample, and which label asks, (B, 1, 3, 19)."""
    frames, there = (
        samples.features["text"],
        ~samples.padding_mask["text"].unsqueeze(2),
    )
    mean = (frames * there).sum(1) / there.sum(1)
    who = torch.eye(3).expand(len(mean), 3, 3)
    return torch.cat(
        [mean.unsqueeze(1).expand(-1, 3, -1), who], dim=2
    ).unsqueeze(1)


# %%
# One modality and three labels make six classes. The label queries are left out here: each Gaussian is made from the
# mean frame of the sequence and the name of the label that asks.

decoupler = GaussianDecoupler(
    num_modalities=1, in_dim=19, latent_dim=2, dropout=0.0, normalize_mean=False
)
contrastive = DistributionSupConLoss(1, 3, latent_dim=2, queue_size=512)
z_train, z_test = vectors(train), vectors(test)
with torch.no_grad():
    before = decoupler(z_test)
print(
    "means",
    tuple(before.mean.shape),
    "standard deviations",
    tuple(before.std.shape),
)

# %%
# Training
# --------
#
# No classifier, no cross-entropy. The queue holds Gaussians of earlier batches, so that an anchor has more to compare
# itself with than its own batch.

optimizer = torch.optim.Adam(decoupler.parameters(), lr=1e-2)
losses = []
for _ in range(600):
    rows = torch.randint(2000, (64,))
    loss = contrastive(decoupler(z_train[rows]), train.labels[rows])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
with torch.no_grad():
    after = decoupler(z_test)
print(f"loss {losses[10]:.3f} after ten steps, {losses[-1]:.3f} at the end")
print("Gaussians in the queue:", contrastive.queue.length)

# %%
# What has changed
# ----------------
#
# Every ellipse is the Gaussian of one label in one of sixty samples that were not trained on: its centre is the mean,
# its width and height are proportional to the standard deviations. It is filled where the label is present, dashed
# where it is absent; the cross is the origin.

colors = ("tab:blue", "tab:orange", "tab:green")
fig, axes = plt.subplots(1, 2, figsize=(9, 4.4), layout="constrained")
both = {"before": before, "after": after}
for ax, (title, latent) in zip(axes, both.items(), strict=True):
    scale = 0.08 * float(latent.mean.abs().max() / latent.std.mean())
    for i, q in product(range(60), range(3)):
        width, height = (scale * latent.std[i, 0, q]).tolist()
        here = bool(test.labels[i, q])
        center = latent.mean[i, 0, q].tolist()
        ellipse = Ellipse(center, width, height, ec=colors[q], alpha=0.6)
        ellipse.set(fc=colors[q] if here else "none", ls="-" if here else "--")
        ax.add_patch(ellipse)
    ax.plot(0, 0, "k+", markersize=10)
    ax.autoscale_view()
    ax.set(
        title=title, xlabel="latent dimension 1", ylabel="latent dimension 2"
    )
for color, name in zip(colors, names, strict=True):
    axes[1].plot([], [], color=color, label=name)
axes[1].legend()

# %%
# The loss compares two Gaussians by the dot product of their embeddings, between -2 and 2. Its means over pairs:

label, present = torch.arange(3).repeat(60), test.labels.flatten()
same_label = label.unsqueeze(1) == label
same_state = present.unsqueeze(1) == present
kinds = {
    "same class": same_label & same_state & ~torch.eye(180, dtype=torch.bool),
    "same label, present and absent": same_label & ~same_state,
    "different labels": ~same_label,
}
similarity = {}
for title, latent in both.items():
    points = latent.embedding().flatten(0, 2)
    similarity[title] = [
        float((points @ points.T)[kind].mean()) for kind in kinds.values()
    ]
for kind, *means in zip(kinds, *similarity.values(), strict=True):
    print(f"{kind:31s} before {means[0]:5.2f}, after {means[1]:5.2f}")
# sphinx_gallery_start_ignore
(a, b, c), (x, y, z) = similarity["before"], similarity["after"]
assert a - c < 0.3
assert x > a
assert x > y > z
assert x - z > 1
assert x - y > 1.5 * (a - b)
# sphinx_gallery_end_ignore

# %%
# Before, the Gaussians of all classes lie in one heap. Afterwards those of one class are more alike than before, and
# those of different labels far less. The two states of one label move apart by less: the gap between the first two
# rows grows, but both rows rise. The name of the label is an input of the network and its presence is not. Only
# directions count: a group may stretch along a ray from the origin, as the loss does not see how long a mean is.
#
# The paper's embedding loses the size
# ------------------------------------
#
# The embedding of the paper (Eq. 4) divides the mean by its length, and the standard deviation by its own. So it
# forgets how large the standard deviation is. `"joint"` divides both by one length and keeps it.

sure = DiagonalGaussian(torch.tensor([3.0, 4.0]), torch.tensor([0.1, 0.1]))
unsure = DiagonalGaussian(sure.mean, 10 * sure.std)
for kind in ("both", "joint"):
    for name, latent in {"sure": sure, "unsure": unsure}.items():
        print(f"{kind:5s} {name:6s}", latent.embedding(kind))

# %%
# With more dimensions and modalities :func:`~uncertainty_mm.plots.latent_tsne` draws such a picture. Whether the
# standard deviations mean anything is another question, which this loss does not answer:
# :doc:`5_checking_uncertainty`.
