"""
Training loops: plain, Lightning, several processes
===================================================

The components are modules and hold no opinion about training. This page trains one model twice, in a loop of our own
and in Lightning, and shows that it is the same; then what to mind with half precision, several processes and
`torch.compile`.
"""

import logging
import warnings

import lightning as L
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

import uncertainty_mm as umm
from uncertainty_mm.data import MultimodalDataset, SyntheticMMER

world = SyntheticMMER(noise=(0.3, 2.0))
names = ["happy", "sad", "angry", "surprised", "disgusted", "afraid"]
samples = world.sample(1000, seed=1)
data = MultimodalDataset(
    samples.features, samples.padding_mask, samples.labels, names
)


def loader() -> DataLoader:
    return data.loader(
        batch_size=100, shuffle=True, generator=torch.Generator().manual_seed(0)
    )


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
        self.decoupler = umm.GaussianDecoupler(3, in_dim=32, latent_dim=16)
        self.head = nn.Linear(3 * 6 * 16, 6)
        self.contrastive = umm.DistributionSupConLoss(3, 6, 16, queue_size=1024)
        self.tracker = umm.CorrectnessTracker(num_samples=len(data))

    def losses(self, batch) -> torch.Tensor:
        missing = self.attention.missing(batch.features, batch.padding_mask)
        latent = self.decoupler(
            self.attention(batch.features, batch.padding_mask), missing
        )
        logits = self.head(latent.mean.flatten(1))
        correct = (logits > 0) == (batch.labels > 0)
        self.tracker.update(batch.indices, correct.float().mean(1))
        classification = F.binary_cross_entropy_with_logits(
            logits.float(), batch.labels.float()
        )
        return classification + 0.1 * self.contrastive(
            latent, batch.labels, missing
        )


# %%
# A plain loop
# ------------

torch.manual_seed(0)
model = Model()
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
for epoch in range(3):
    losses = []
    for batch in loader():
        loss = model.losses(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"epoch {epoch}: loss {sum(losses) / len(losses):.4f}")
history = model.tracker(torch.arange(len(data)))
print(
    f"seen {int(model.tracker.counts(torch.tensor([0])))} times, correct {history.mean():.3f}"
)

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
        loss = self.model.losses(batch)
        self.log(
            "loss", loss, on_epoch=True, on_step=False, batch_size=len(batch.labels)
        )
        return loss

    def on_train_epoch_end(self):
        self.model.tracker.synchronize()  # for several processes, see below
        print(
            f"epoch {self.current_epoch}: loss {self.trainer.callback_metrics['loss']:.4f}"
        )

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=3e-3)


quiet = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
}
torch.manual_seed(0)
lit = LitModel()
trainer = L.Trainer(
    accelerator="cpu", max_epochs=3, enable_model_summary=False, **quiet
)
trainer.fit(lit, loader())
difference = max(
    float((a - b).abs().max())
    for a, b in zip(model.parameters(), lit.model.parameters(), strict=True)
)
print(f"largest difference of a parameter: {difference:.1e}")
