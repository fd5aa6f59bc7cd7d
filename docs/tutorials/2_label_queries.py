"""
Label queries
=============

:class:`~uncertainty_mm.EmotionQueryAttention` lets every label read a sequence for itself: it returns one vector for
each label, gathered from the steps that its query weighs most. Does a label look where it is to be seen? On real data
nobody knows. Here sequences are made so that the answer is known.

Every label has a prototype, a vector of sixteen numbers. A frame shows the prototype of one label that is present, or
nothing but noise.
"""

import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt
from torch import nn

from uncertainty_mm import EmotionQueryAttention, plots
from uncertainty_mm.data import SyntheticMMER

torch.manual_seed(0)
names = ["Happy", "Sad", "Angry", "Fearful"]
world = SyntheticMMER(4, {"text": (20, 16, 0.5)}, noise=(0.3, 0.6))
train = world.sample(2000, seed=1)

# %%
# Each vector that a query has gathered is turned into one logit. Nothing says to the model which frame shows what: it
# sees the labels of the whole sequence only.


class Reader(nn.Module):
    def __init__(self, own_weights: bool = True) -> None:
        super().__init__()
        self.attention = EmotionQueryAttention(
            {"text": 16}, num_labels=4, out_dim=32
        )
        self.weight = nn.Parameter(torch.zeros(4 if own_weights else 1, 32))
        self.bias = nn.Parameter(torch.zeros(4))

    def forward(self, features, padding_mask=None):
        z, weights = self.attention(features, padding_mask, need_weights=True)
        logits = (z[:, 0] * self.weight).sum(2) + self.bias
        return logits, weights["text"]  # (B, Q) and (B, Q, S)


# %%
# For the look afterwards we build sequences ourselves, from the prototypes of the same world, and keep the source of
# each frame: 0 to 3 for a label, 4 for nothing. Two labels are present in each.


def build(count: int, steps: int = 20, noise: float = 0.5):
    """Frames (count, steps, 16) and their sources (count, steps)."""
    present = torch.stack([torch.randperm(4)[:2] for _ in range(count)])
    which = torch.randint(4, (count, steps))  # half of the frames show nothing
    source = torch.where(which < 2, present.gather(1, which.clamp_max(1)), 4)
    vectors = torch.cat([world.prototypes["text"].float(), torch.zeros(1, 16)])
    return vectors[source] + noise * torch.randn(count, steps, 16), source


frames, source = build(500)


def share_on_own_frames(model) -> torch.Tensor:
    """Attention of each label on the frames that show it, if any do, (Q,)."""
    with torch.no_grad():
        weights = model({"text": frames})[1]
    own = source.unsqueeze(1) == torch.arange(4).unsqueeze(1)  # (B, Q, S)
    present = own.any(2)
    return ((weights * own).sum(2) * present).sum(0) / present.sum(0)


# %%
# Training
# --------


def fit(model: Reader) -> float:
    """Trains 200 steps, returns the mean loss of the last 20."""
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(200):
        rows = torch.randint(2000, (64,))
        features = {"text": train.features["text"][rows]}
        logits, _ = model(features, {"text": train.padding_mask["text"][rows]})
        loss = F.binary_cross_entropy_with_logits(
            logits, train.labels[rows].float()
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses[-20:]) / 20


torch.manual_seed(0)
model = Reader()
before = share_on_own_frames(model)
weights_before = model({"text": frames[:1]})[1][0].detach()
print(f"loss {fit(model):.3f}")

# %%
# Where the labels look
# ---------------------
#
# The rows are labels, the columns steps of one sequence. The letters below name the label that each step shows; a dot
# is nothing. Mind the scales: before training no step has as much as a tenth of the weight. Afterwards a label that
# is present puts nearly all of it on a frame of its own. The labels that are absent look somewhere too: weights sum
# to 1, whether there is something to be seen or not.

weights_after = model({"text": frames[:1]})[1][0].detach()
fig, axes = plt.subplots(2, 1, figsize=(7, 4.6), layout="constrained")
letters = ["HSAF."[index] for index in source[0]]
both = {"before": weights_before, "after": weights_after}
for ax, (title, weights) in zip(axes, both.items(), strict=True):
    plots.attention_map(weights, names, ax=ax)
    ax.set_xticks(range(20), letters)
    ax.set(title=f"{title} training", xlabel="what the step shows")

# %%
# One picture is an example; this is the mean over the 500 sequences, for labels that are present.

after = share_on_own_frames(model)
print("attention on own frames")
for name, *shares in zip(names, before.tolist(), after.tolist(), strict=True):
    print(f"{name:9s} before {shares[0]:.2f}, after {shares[1]:.2f}")

# %%
# When labels share their weights
# -------------------------------
#
# Above, each label has weights of its own that turn its vector into a logit. What happens if all labels share them?

torch.manual_seed(0)
shared = Reader(own_weights=False)
print(f"loss {fit(shared):.3f}")
for name, share in zip(
    names, share_on_own_frames(shared).tolist(), strict=True
):
    print(f"{name:9s} {share:.2f}")
# sphinx_gallery_start_ignore
assert weights_before.max() < 0.1
assert before.max() < 0.5
assert after.min() > 0.9
assert share_on_own_frames(shared).min() < 0.1
# sphinx_gallery_end_ignore

# %%
# At least one label has learned to look away from its own frames, and the loss is higher. A likely reason: to shared
# weights the prototype of one label may at first be bad news. That label gains by avoiding the frames that show it,
# and once its attention is sharp, no gradient leads back. So let something after the attention belong to the label:
# weights of its own, as here, or a layer that reads the vectors of all labels, as the first prediction of
# :doc:`1_first_model`.
