"""
Training loops: plain, Lightning, several processes
===================================================

The components are modules and leave the training to you. This page trains one model twice, in a plain loop
and in Lightning, and shows that it is the same; then what to mind with half precision, several processes and
`torch.compile`.
"""

import logging
import warnings

import lightning as L
import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt
from torch import nn

import uncertainty_mm as umm
from uncertainty_mm.data import MultimodalDataset, SyntheticMMER

world = SyntheticMMER(noise=(0.3, 2.0))
names = ["happy", "sad", "angry", "surprised", "disgusted", "afraid"]
samples = world.sample(1000, seed=1)
data = MultimodalDataset(
    samples.features, samples.padding_mask, samples.labels, names
)
batches = data.loader(batch_size=100)  # made data need no shuffling
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

# %%
# The model
# ---------
#
# A loss with a queue and a history of the samples are submodules too: so both are in `state_dict()`, and a run that
# was stopped goes on where it was. The history names samples by their position in the data set, which each batch
# carries as `indices`.


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = umm.EmotionQueryAttention(
            data.dims, num_labels=6, out_dim=32
        )
        self.decoupler = umm.GaussianDecoupler(
            3, in_dim=32, latent_dim=16, dropout=0.0
        )
        self.head = nn.Linear(3 * 6 * 16, 6)
        self.contrastive = umm.DistributionSupConLoss(3, 6, 16, queue_size=1024)
        self.tracker = umm.CorrectnessTracker(num_samples=len(data))

    def forward(self, batch) -> torch.Tensor:
        features, padding_mask, labels = *batch[:2], batch.labels.float()
        missing = self.attention.missing(features, padding_mask)
        latent = self.decoupler(self.attention(features, padding_mask), missing)
        logits = self.head(latent.mean.flatten(1))
        correct = (logits > 0) == (labels > 0)
        self.tracker.update(batch.indices, correct.float().mean(1))
        loss = F.binary_cross_entropy_with_logits(logits.float(), labels)
        return loss + 0.1 * self.contrastive(latent, labels, missing)


# %%
# A plain loop
# ------------

torch.manual_seed(0)
model = Model()
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
plain, lightning = [], []  # mean losses of the epochs
for epoch in range(3):
    losses = []
    for batch in batches:
        loss = model(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    plain.append(sum(losses) / len(losses))
    print(f"epoch {epoch}: loss {plain[-1]:.4f}")
history = model.tracker(torch.arange(len(data)))
times = model.tracker.counts(torch.arange(len(data)))
print(f"each sample seen {times.min()} to {times.max()} times,", end=" ")
print(f"share of its labels that were right: {history.mean():.3f}")

# %%
# Lightning
# ---------
#
# The same model inside a `LightningModule`. Nothing of it changes.


class LitModel(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = Model()

    def training_step(self, batch, batch_idx):
        loss = self.model(batch)
        self.log(
            "loss",
            loss,
            on_epoch=True,
            on_step=False,
            batch_size=len(batch.labels),
        )
        return loss

    def on_train_epoch_end(self):
        self.model.tracker.synchronize()  # for several processes, see below
        loss = self.trainer.callback_metrics["loss"]
        print(f"epoch {self.current_epoch}: loss {loss:.4f}")
        lightning.append(float(loss))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=3e-3)


torch.manual_seed(0)
lit = LitModel()
trainer = L.Trainer(
    accelerator="cpu",
    max_epochs=3,
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # advice on the number of workers
    trainer.fit(lit, batches)
difference = max(
    float((a - b).detach().abs().max())
    for a, b in zip(model.parameters(), lit.model.parameters(), strict=True)
)
print(f"largest difference of a parameter: {difference:.1e}")

fig, ax = plt.subplots(figsize=(5, 3), layout="constrained")
ax.plot(plain, label="plain loop")
ax.plot(lightning, "o", label="Lightning")
ax.set(xlabel="epoch", ylabel="loss", xticks=range(3), ylim=(0, None))
ax.legend()
# sphinx_gallery_start_ignore
assert difference < 1e-5
# sphinx_gallery_end_ignore

# %%
# Half precision
# --------------
#
# Under autocast the linear layers compute in bfloat16, softmax, logarithms and losses in float32, by themselves. In
# Lightning this is `Trainer(precision="bf16-mixed")`. On a CPU it pays only with instructions for bfloat16; without,
# it takes many times as long (:doc:`/benchmarks`).

batch = next(iter(batches))
seen = {}
for name in ("attention", "decoupler", "contrastive"):
    getattr(model, name).register_forward_hook(
        lambda module, arguments, output, name=name: seen.update({name: output})
    )
full = model(batch).item()
with torch.autocast("cpu", dtype=torch.bfloat16):
    half = model(batch).item()
print("z          ", seen["attention"].dtype)
print("mean       ", seen["decoupler"].mean.dtype)
print("contrastive", seen["contrastive"].dtype)
print(f"loss {full:.4f} in float32, {half:.4f} under autocast")
# sphinx_gallery_start_ignore
assert seen["attention"].dtype == torch.bfloat16
assert seen["contrastive"].dtype == torch.float32
# sphinx_gallery_end_ignore

# %%
# Several processes
# -----------------
#
# Three components know of other processes, two of them here. The loops above ran in one; this is not run here:
#
# .. code-block:: python
#
#     self.contrastive = umm.DistributionSupConLoss(3, 6, 16, gather=True, max_batch_size=100)
#     ...
#     model = DistributedDataParallel(model)
#     for epoch in range(epochs):
#         ...
#         model.module.tracker.synchronize()  # on all ranks
#
# - `gather=True` compares each Gaussian with those of all ranks, and gives loss and gradient of one process with
#   the joined batch. `max_batch_size` spares the ranks asking each other for it at every step.
# - `tracker.synchronize()` adds up what the ranks have seen. Without it each rank knows the history of its own samples.
#
# In Lightning the hook above does the second.
#
# Compilation
# -----------
#
# All components go through `torch.compile` in one graph. It is not run here, because the first step then takes half a
# minute or so and needs a C++ compiler:
#
# .. code-block:: python
#
#     compiled = torch.compile(model, fullgraph=True)
#     for batch in batches:
#         loss = compiled(batch)
#
# :doc:`/conventions` has the rules behind this page: state, precision, processes.
