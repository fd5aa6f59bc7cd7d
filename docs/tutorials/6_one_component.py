"""
One component in a model you have
=================================

Nobody needs the whole of it. Each component takes tensors and returns tensors, and knows nothing of the others. Here
are two models that exist already and get one component each, in a change of a few lines: a text classifier gets label
queries, and a tagger of pictures with captions gets the gated fusion. Neither is about emotions.
"""

import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt
from torch import nn

from uncertainty_mm import (
    EmotionQueryAttention,
    GaussianDecoupler,
    UncertaintyGatedFusion,
)
from uncertainty_mm.data import SyntheticMMER
from uncertainty_mm.functional import expected_distance


def train(model, inputs, labels, steps: int) -> None:
    """Any training loop; this one knows nothing of the components."""
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    model.train()
    for _ in range(steps):
        rows = torch.randint(len(labels), (64,))
        logits = model(*(x[rows] for x in inputs))
        loss = F.binary_cross_entropy_with_logits(logits, labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def brier(model, inputs, labels) -> float:
    """Mean squared error of the probabilities."""
    model.eval()
    with torch.no_grad():
        return float((model(*inputs).sigmoid() - labels).square().mean())


def draw(scores: dict[str, float]) -> None:
    """Bars of Brier scores."""
    _, ax = plt.subplots(figsize=(5, 1.6), layout="constrained")
    ax.barh(
        list(scores), list(scores.values()), color=["0.6", "tab:blue", "0.8"]
    )
    ax.invert_yaxis()
    ax.set(xlabel="Brier score, smaller is better")


# %%
# Label queries in a text classifier
# ----------------------------------
#
# Texts of 30 to 60 tokens, five topics that a text may have. A token is a vector of 32 numbers, as a frozen language
# model gives it; about one in seven says something about a topic of the text. The model at hand takes the mean of the
# tokens. The data are made, so the best score is known here too.

world = SyntheticMMER(5, {"text": (60, 32, 0.15)}, noise=(0.5, 0.5))


class MeanReader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.topics = nn.Sequential(
            nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, 5)
        )

    def forward(self, tokens, padding):
        there = (~padding).unsqueeze(2)
        return self.topics((tokens * there).sum(1) / there.sum(1))


# %%
# Instead of one mean of all tokens, each topic gathers a vector from the tokens that it asks for.


class QueryReader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.read = EmotionQueryAttention(
            {"text": 32}, num_labels=5, out_dim=32
        )
        self.topics = nn.Linear(5 * 32, 5)

    def forward(self, tokens, padding):
        z = self.read({"text": tokens}, {"text": padding})  # (B, 1, 5, 32)
        return self.topics(z.flatten(1))


def texts(count: int, seed: int):
    """Tokens (count, 60, 32), their padding (count, 60), topics (count, 5)."""
    samples = world.sample(count, seed=seed)
    return (
        samples.features["text"],
        samples.padding_mask["text"],
        samples.labels.float(),
    )


*inputs, labels = texts(4000, seed=1)
*test_inputs, test_labels = texts(1000, seed=2)
best = world.posterior(world.sample(1000, seed=2)).marginals
print("Brier score on new texts")
scores = {}
for kind in (MeanReader, QueryReader):
    torch.manual_seed(0)
    model = kind()
    train(model, inputs, labels, steps=300)
    scores[kind.__name__] = brier(model, test_inputs, test_labels)
    print(f"{kind.__name__:12s} {scores[kind.__name__]:.3f}")
scores["Bayes"] = float((best - test_labels).square().mean())
print(f"{'Bayes':12s} {scores['Bayes']:.3f}")
draw(scores)
# sphinx_gallery_start_ignore
assert scores["QueryReader"] < 0.7 * scores["MeanReader"]
# sphinx_gallery_end_ignore

# %%
# The mean drowns the few tokens that matter in those that do not; a query can pick them. This is what queries are
# for: of a short text whose every token counts, the mean may be as good.
#
# Gated fusion in a tagger
# ------------------------
#
# Pictures with captions, six tags. A picture comes as the vector of some image network, a caption as that of some
# text network; how clear they are differs, and a part of the samples lacks one or the other, which is then a vector
# of zeros. The model at hand joins both vectors.

sizes = {"image": (30, 48, 0.6), "text": (12, 32, 0.6)}
world = SyntheticMMER(6, sizes, noise=(0.3, 2.0), missing_rate=0.3)


def tagged(count: int, seed: int):
    """Pictures (count, 48), captions (count, 32), what is missing, tags."""
    samples = world.sample(count, seed=seed)
    vectors = []
    for name, frames in samples.features.items():
        steps = (~samples.padding_mask[name]).sum(1, keepdim=True).clamp_min(1)
        vectors.append(frames.sum(1) / steps)
    return *vectors, samples.missing, samples.labels.float()


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(48, 64), nn.Linear(32, 64)
        self.hidden, self.tags = nn.Linear(128, 128), nn.Linear(128, 6)

    def forward(self, image, text, missing):
        both = torch.cat([self.image(image), self.text(text)], dim=1)
        return self.tags(self.hidden(both.relu()).relu())


# %%
# The fusion wants a Gaussian for each modality and label, and a number that says how unsure a first prediction is.
# The old model becomes the first prediction; the Gaussians come from its vectors, one part for each tag. What is
# missing is a mask, and no longer a vector of zeros that happens to be known.


class GatedTagger(Tagger):
    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(
            [nn.Linear(64, 6 * 32), nn.Linear(64, 6 * 32)]
        )
        self.decoupler = GaussianDecoupler(2, 32, latent_dim=16)
        self.fusion = UncertaintyGatedFusion(2, 6, latent_dim=16)

    def forward(self, image, text, missing):
        first = super().forward(image, text, missing)
        vectors = self.image(image), self.text(text)
        z = [
            part(x.relu()) for part, x in zip(self.parts, vectors, strict=True)
        ]
        z = torch.stack(z, dim=1).unflatten(2, (6, 32))  # (B, M, Q, 32)
        latent = self.decoupler(z, missing)
        return self.fusion(
            latent, expected_distance(first.sigmoid()), missing
        ).logits


*inputs, labels = tagged(4000, seed=1)
*test_inputs, test_labels = tagged(1000, seed=2)
best = world.posterior(world.sample(1000, seed=2)).marginals
scores = {}
print("Brier score on new samples")
for kind in (Tagger, GatedTagger):
    torch.manual_seed(0)
    model = kind()
    train(model, inputs, labels, steps=300)
    scores[kind.__name__] = brier(model, test_inputs, test_labels)
    print(f"{kind.__name__:12s} {scores[kind.__name__]:.3f}")
scores["Bayes"] = float((best - test_labels).square().mean())
print(f"{'Bayes':12s} {scores['Bayes']:.3f}")
draw(scores)
# sphinx_gallery_start_ignore
assert abs(scores["GatedTagger"] - scores["Tagger"]) < 0.01
# sphinx_gallery_end_ignore

# %%
# The predictions are about as good as before. What the tagger has gained is a Gaussian for each modality and tag, to
# which the other losses of the library apply, and a defined behaviour where something is missing. If all that is
# wanted is a better score, measure first.
