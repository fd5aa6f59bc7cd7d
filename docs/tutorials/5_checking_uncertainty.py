"""
Is the uncertainty right?
=========================

A model that says how sure it is can be wrong about that too. This page trains a small model and asks four questions
of it. The data are made, so that even the last two, which real data cannot answer, have an answer.
"""

import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt
from torch import nn

import uncertainty_mm as umm
from uncertainty_mm import plots
from uncertainty_mm.data import SyntheticMMER
from uncertainty_mm.functional import expected_distance
from uncertainty_mm.metrics.functional import (
    calibration_error,
    predictive_entropy,
    spearman,
)

torch.manual_seed(0)
world = SyntheticMMER(num_labels=4)
names = ["happy", "sad", "angry", "afraid"]
train, validation, test = (
    world.sample(count, seed=seed)
    for seed, count in enumerate((3000, 1000, 1500))
)
modalities = list(train.features)


def features_of(samples, rows=slice(None)):
    """Frames divided by the size of their sequence, one more feature; masks."""
    masks = {name: mask[rows] for name, mask in samples.padding_mask.items()}
    features = {}
    for name, mask in masks.items():
        x, there = samples.features[name][rows], ~mask.unsqueeze(2)
        size = (x.square().sum((1, 2)) / there.sum((1, 2)) / x.shape[2]).sqrt()[
            :, None, None
        ]
        features[name] = torch.cat(
            [x / size, size.log().expand(-1, x.shape[1], 1)], dim=2
        )
    return features, masks


# %%
# The model
# ---------
#
# As in :doc:`1_first_model`, where a modality that is unsure counts less, because Gaussians are multiplied. Here the
# standard deviations are also trained to be right: each modality makes a prediction of its own, and where that has
# often been wrong in the past, its standard deviation should be large
# (:class:`~uncertainty_mm.SoftRankOrdinalityLoss`).


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        dims = dict.fromkeys(modalities, 17)
        self.attention = umm.EmotionQueryAttention(
            dims, 4, label_dim=64, proj_dim=64, out_dim=32
        )
        self.first = nn.Linear(3 * 4 * 32, 4)
        self.decoupler = umm.GaussianDecoupler(3, 32, 16, dropout=0.0)
        self.alone = nn.Linear(16, 1)
        self.fusion = umm.UncertaintyGatedFusion(3, 4, 16, dropout=0.0)

    def forward(self, features, masks):
        z = self.attention(features, masks)
        first = self.first(z.flatten(1))
        latent = self.decoupler(z)
        fused = self.fusion(latent, expected_distance(first.detach().sigmoid()))
        return first, latent, self.alone(latent.mean).squeeze(-1), fused


model = Model()
contrastive = umm.DistributionSupConLoss(3, 4, 16, queue_size=512)
tracker, ordinality = (
    umm.CorrectnessTracker(3000, 3),
    umm.SoftRankOrdinalityLoss(),
)
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
for epoch in range(6):
    for rows in torch.randperm(3000).split(100):
        labels = train.labels[rows].float()
        first, latent, alone, fused = model(*features_of(train, rows))
        each = labels.unsqueeze(1).expand_as(alone)
        loss = F.binary_cross_entropy_with_logits(fused.logits, labels)
        loss = loss + 0.1 * F.binary_cross_entropy_with_logits(first, labels)
        loss = loss + F.binary_cross_entropy_with_logits(alone, each)
        loss = loss + 0.1 * contrastive(latent, labels)
        distance = (alone.sigmoid() - each).abs().mean(2)  # (B, M)
        if epoch > 0:  # there is a history
            std_norm = latent.std.flatten(2).norm(dim=2)
            history = tracker(rows)
            for m in range(3):
                loss = loss + 0.3 * ordinality(
                    std_norm=std_norm[:, m],
                    distance=distance[:, m],
                    correctness=history[:, m],
                )
        tracker.update(rows, 1 - distance.detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

# %%
# Probabilities are calibrated on the validation split. All that follows is measured on the test split.

with torch.no_grad():
    held_out = model(*features_of(validation))[3].logits
    calibration = umm.PlattScaling(4).fit(held_out, validation.labels)
    _, latent, _, fused = model(*features_of(test))
probs = calibration(fused.logits).sigmoid()
std_norm = latent.std.flatten(2).norm(dim=2)  # their size, (B, M)
exact = world.posterior(test)
for name, p in {"model": probs, "Bayes": exact.marginals}.items():
    print(f"Brier score of {name}: {(p - test.labels).square().mean():.3f}")

# %%
# 1. Are the probabilities frequencies?
# -------------------------------------
#
# Of the cases in which the model says 0.7, the label should be present in seven of ten: the points should lie on the
# diagonal. The bars above count the cases. ECE, the expected calibration error, is the mean distance from the
# diagonal.

fig, axes = plt.subplots(2, 2, figsize=(7, 7), layout="constrained")
plots.reliability_diagram(probs, test.labels, names, ax=axes)
for name, p in {"before": fused.probs, "after": probs}.items():
    error = calibration_error(p, test.labels)
    print(f"ECE {name} calibration: {error:.3f}")

# %%
# The points are near the diagonal, and calibration had little to correct: this model was not overconfident.
#
# 2. Does it know when it is wrong?
# ---------------------------------
#
# Answer the surest samples first: the error of what has been answered should be small at first and grow. Two numbers
# can say how sure the model is of a sample: the entropy of its probabilities, and the size of all its standard
# deviations.

error = (probs - test.labels).abs().mean(1)
scores = {
    "entropy": predictive_entropy(probs),
    "standard deviations": std_norm.norm(dim=1),
}
fig, ax = plt.subplots(figsize=(6, 3.8), layout="constrained")
plots.risk_coverage(scores, error, ax=ax)
with_error = {
    name: float(spearman(score, error)) for name, score in scores.items()
}
for name, correlation in with_error.items():
    print(f"rank correlation with the error: {name} {correlation:.2f}")

# %%
# Both are better than a random order. The entropy is nearer to the best one: to choose which samples to answer, take
# the entropy.
#
# 3. Do the standard deviations follow the noise?
# -----------------------------------------------
#
# The noise of each sequence is known here. The model has never been told of it.

fig, axes = plt.subplots(1, 3, figsize=(9, 3.2), layout="constrained")
plots.uncertainty_against_noise(test.noise, std_norm, modalities, ax=axes)
for ax in axes[1:]:
    ax.set_ylabel("")
with_noise = [
    float(spearman(std_norm[:, m], test.noise[:, m])) for m in range(3)
]
print("rank correlation with the noise:")
for name, correlation in zip(modalities, with_noise, strict=True):
    print(f"  {name:6s} {correlation:.2f}")

# %%
# In each modality they rise with the noise. Only the order within a modality was trained, so do not compare sizes
# between modalities.
#
# 4. Does it know what cannot be known?
# -------------------------------------
#
# The entropy of the exact posterior says how uncertain the labels of a sample are, for the best of all models.

ceiling = predictive_entropy(exact.marginals.clamp(0, 1))
scores["entropy of exact probabilities"] = ceiling
with_truth = {
    name: float(spearman(score, exact.entropy))
    for name, score in scores.items()
}
print("rank correlation with the entropy of the posterior:")
for name, correlation in with_truth.items():
    print(f"  {name:30s} {correlation:.2f}")
# sphinx_gallery_start_ignore
assert with_error["entropy"] > with_error["standard deviations"] + 0.1
assert with_error["standard deviations"] > 0.1
assert min(with_noise) > 0.2
assert 1 > with_truth["entropy"] > with_truth["standard deviations"] > 0.3
# sphinx_gallery_end_ignore

# %%
# The model knows in part. The last row is what exact probabilities would reach.
#
# Limitations
# -----------
#
# This is one seed of a small model, trained for seconds on one made world. With `torch.manual_seed(1)` in the first
# block one of the modalities fell to 0.31 in the third question. :doc:`/uncertainty` is the study: five seeds,
# variants with one part changed, real data, and what remains open. There the standard deviations follow the noise
# only with the repairs used here, and with the paper's own equations they fall as noise rises.
