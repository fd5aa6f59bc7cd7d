"""The example's model at the sizes of the paper: 3 modalities of 50 steps, 768, 74 and 35 features."""

import gc
import logging
import time
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.profilers import SimpleProfiler
from measuring import captured, status, wait

from uncertainty_mm.data import MultimodalBatch, MultimodalDataset, read, write_folder
from uncertainty_mm.examples.lddu_full import LDDU
from uncertainty_mm.lightning import MultimodalDataModule

DIMS = {"text": 768, "audio": 74, "vision": 35}
SAMPLES = 16_326  # training samples of CMU-MOSEI


def drawn(count, steps=50, dims=DIMS, num_labels=6, device="cpu"):
    """A batch of random sequences, 10 to `steps` of whose steps are not padding."""
    lengths = torch.randint(min(10, steps), steps + 1, (count, 1), device=device)
    padding = {name: torch.arange(steps, device=device) >= lengths for name in dims}
    features = {n: torch.randn(count, steps, dim, device=device) for n, dim in dims.items()}
    labels = (torch.rand(count, num_labels, device=device) < 0.225).to(torch.uint8)
    return MultimodalBatch(features, padding, labels, torch.arange(count, device=device))


def model_for(batch, **options):
    """The example's model for such sequences, on their device."""
    dims = {name: x.shape[2] for name, x in batch.features.items()}
    steps = {name: x.shape[1] for name, x in batch.features.items()}
    names = [str(label) for label in range(batch.labels.shape[1])]
    return LDDU(dims, steps, names, SAMPLES, **options).to(batch.labels.device)


class TrainingStep:
    """A job: one training step, forward, backward and optimiser.

    Args:
        batch: The batch, again and again.
        precision: `"float32"`, `"tf32"` (products of float32 on tensor cores) or `"bfloat16"` (autocast).
        compiled: Whether the model's forward pass is compiled.
    """

    def __init__(self, batch, precision="float32", compiled=False):
        torch.manual_seed(0)
        self.batch, self.precision = batch, precision
        self.device = batch.labels.device.type
        self.half = precision == "bfloat16"
        options = {"bf16_products": self.half, "max_batch_size": len(batch.labels)}
        self.model = model_for(batch, contrastive=options).train()
        capturable = self.device == "cuda"  # the count of steps is on the device
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=2e-5, fused=True, capturable=capturable
        )
        self.forward = torch.compile(self.model) if compiled else self.model

    def __call__(self):
        batch = self.batch
        torch.set_float32_matmul_precision("high" if self.precision == "tf32" else "highest")
        with torch.autocast(self.device, torch.bfloat16, enabled=self.half):
            output = self.forward(batch.features, batch.padding_mask, batch.labels)
            loss = self.model.losses(output, batch)["total"]
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        torch.set_float32_matmul_precision("highest")

    def parts(self, now, steps=3):
        """The share of the parts in the time of a step in %, and the seconds of a step, by the clock `now`."""
        seconds, model = Counter(), self.model

        def clock():
            wait(self.device)
            return now()

        def measure(part, module):
            return (
                module.register_forward_pre_hook(lambda *_: seconds.subtract({part: clock()})),
                module.register_forward_hook(lambda *_: seconds.update({part: clock()})),
            )

        modules = [("encoders", encoder) for encoder in model.encoder.values()]
        modules += [("label attention", model.attention), ("predictions by place", model.places)]
        modules += [("decoupler", model.decoupler), ("fusion", model.fusion)]
        modules += [("contrastive loss", model.contrastive), ("ordinality loss", model.ordinality)]
        modules += [("tracker", model.tracker)]
        self()
        hooks = [hook for part, module in modules for hook in measure(part, module)]
        seconds.subtract({"whole": clock()})
        for _ in range(steps):
            self()
        seconds.update({"whole": clock()})
        for hook in hooks:
            hook.remove()
        whole = seconds.pop("whole")
        seconds["backward, optimiser, rest"] = whole - sum(seconds.values())
        shares = {part: 100 * spent / whole for part, spent in seconds.items()}
        return shares | {"seconds of a step": whole / steps}


def on_device(job):
    """Milliseconds for which a CUDA device works on a job, and the number of kernels."""
    job()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        job()
        torch.cuda.synchronize()
    events = profile.key_averages()
    spent = sum(event.self_device_time_total for event in events) / 1e3
    return {"device ms": spent, "kernels": sum(event.count for event in events)}


def encoder_products(rows, device, precision="float32", width=256, layers=3):
    """A job: the matrix products of the encoders alone, forward, for the weights and for the inputs."""
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    jobs = []
    for dim in DIMS.values():
        sizes = [(dim, width), *[(width, 3 * width), *[(width, width)] * 3] * layers]
        for number, (fan_in, fan_out) in enumerate(sizes):
            x = torch.randn(rows, fan_in, device=device, dtype=dtype)
            weight = torch.randn(fan_out, fan_in, device=device, dtype=dtype)
            grad = torch.randn(rows, fan_out, device=device, dtype=dtype)
            jobs.append((x, weight, grad, number > 0))  # features need no gradient

    def run():
        torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
        for x, weight, grad, deep in jobs:
            x @ weight.T
            grad.T @ x
            if deep:
                grad @ weight
        torch.set_float32_matmul_precision("highest")

    return run


def serving(steps, device):
    """Jobs: the prediction of one sample that nobody else waits for."""
    torch.manual_seed(0)
    batch = drawn(1, steps, device=device)
    model = model_for(batch).eval()
    train = drawn(64, steps)
    data = MultimodalDataset(*train[:3], [str(label) for label in range(6)])
    model.conflict.fit(*model.typicality.fit_and_summarize(data))
    no_grad = torch.inference_mode()
    ask = no_grad(lambda: model(*batch[:2]).logits)
    jobs = {  # `.cpu()`: the answer is there when the job is done
        "model(features, padding_mask)": lambda: ask().cpu(),
        "model.predict_step(batch, 0)": no_grad(
            lambda: model.predict_step(batch, 0)["probs"].cpu()
        ),
    }
    if device == "cuda":
        replay = captured(ask)
        jobs["model(features, padding_mask) in a CUDA graph"] = lambda: (replay(), wait(device))
    return jobs


def loading(samples, steps, mapped):
    """Processor seconds of an epoch through the loader, of half-filled sequences in memory or mapped from a folder."""
    batch = drawn(samples, steps // 2)
    longer = (0, 0, 0, steps - steps // 2)
    features = {name: F.pad(x, longer) for name, x in batch.features.items()}
    padding = {n: F.pad(x, longer[2:], value=True) for n, x in batch.padding_mask.items()}
    data = MultimodalDataset(features, padding, batch.labels, list("abcdef"))
    del batch, features, padding
    with TemporaryDirectory() as folder:
        if mapped:
            write_folder({"train": data}, Path(folder) / "data")
            data = read(Path(folder) / "data", splits=())["train"]
            gc.collect()
        before, most = status("RssAnon"), 0.0
        for _ in range(2):  # the second counts
            start, batches, longest = time.process_time(), 0, 0
            for batch in data.loader(128, shuffle=True, trim=True):
                batches, longest = batches + 1, longest + batch.padding_mask["text"].shape[1]
                most = max(most, status("RssAnon") - before)
            spent = time.process_time() - start
        start = time.process_time()
        data.statistics()
        moments = time.process_time() - start
    return {
        "s an epoch": spent,
        "ms a batch": 1e3 * spent / batches,
        "steps of a batch": longest / batches,
        "MB more": most,
        "statistics, s": moments,
    }


class DrawnModule(MultimodalDataModule):
    """Random sequences as a training split."""

    def __init__(self, samples):
        self.samples = samples
        super().__init__(batch_size=128)

    def _synthetic(self):
        return {"train": MultimodalDataset(*drawn(self.samples)[:3], list("abcdef"))}


def epoch(samples, device, precision):
    """The seconds of an epoch of training, after one that does not count, and of what precedes training."""
    module = DrawnModule(samples)
    sizes = module.modality_dims, module.max_steps, module.label_names, module.num_train_samples
    profiler = SimpleProfiler()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    trainer = L.Trainer(
        accelerator=device,
        devices=1,
        max_epochs=2,
        precision={"float32": "32-true", "bfloat16": "bf16-mixed"}[precision],
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        profiler=profiler,
    )
    trainer.fit(LDDU(*sizes), module)
    spent = profiler.recorded_durations
    waits = spent["[_TrainingEpochLoop].train_dataloader_next"]
    return {
        "s an epoch": spent["run_training_epoch"][-1],
        "of it waiting for data, s": sum(waits[len(waits) // 2 :]),
        "once, statistics and typicality, s": spent["[LightningModule]LDDU.on_fit_start"][0],
    }
