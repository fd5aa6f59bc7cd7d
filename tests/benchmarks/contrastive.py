"""Implementations of one contrastive loss on one input, for timing in process and for memory in a fresh process.

`python contrastive.py NAME ANCHORS QUEUE` prints the peak extra memory of one forward and backward pass in MB.
"""

import math
import subprocess
import sys
from functools import partial

import torch
import torch.nn.functional as F
from measuring import peak_mb

from uncertainty_mm.functional import supcon_loss

ROWS, DIM, CLASSES, TEMPERATURE = 128 * 3 * 6, 128, 36, 0.07


class Inputs:
    """Embeddings as of Eq. 4, with 22 % of the rows as anchors for `present`."""

    def __init__(self, anchors, queue, rows=ROWS, device="cpu"):
        generator = torch.Generator().manual_seed(0)

        def embeddings(count):
            mean = torch.randn(count, DIM // 2, generator=generator)
            std = torch.rand(count, DIM // 2, generator=generator) + 0.2
            return torch.cat([F.normalize(mean, dim=1), F.normalize(std, dim=1)], dim=1).to(device)

        def classes(count):
            return torch.randint(0, CLASSES, (count,), generator=generator).to(device)

        self.rows, self.classes = embeddings(rows), classes(rows)
        self.bank, self.bank_classes = embeddings(queue), classes(queue)
        share = 1.0 if anchors == "all" else 0.22
        self.anchors = (torch.rand(rows, generator=generator) < share).to(device)


def dense_loss(rows, classes, bank, bank_classes, anchors):
    keys, key_classes = torch.cat([rows, bank]), torch.cat([classes, bank_classes])
    scores = rows @ keys.T / TEMPERATURE
    itself = torch.eye(len(rows), len(keys), dtype=torch.bool, device=rows.device)
    positive = (classes[:, None] == key_classes[None]) & ~itself
    log_prob = scores - scores.masked_fill(itself, -math.inf).logsumexp(1, keepdim=True)
    losses = -(log_prob * positive).sum(1) / positive.sum(1).clamp_min(1)
    return (losses * anchors).sum() / anchors.sum()


compiled_loss = torch.compile(dense_loss)


def ours(inputs, bf16_products=False):
    return lambda rows: supcon_loss(
        rows,
        inputs.classes,
        anchor_mask=inputs.anchors,
        bank=inputs.bank,
        bank_classes=inputs.bank_classes,
        temperature=TEMPERATURE,
        bf16_products=bf16_products,
    )


def dense(inputs, loss=dense_loss):
    return lambda rows: loss(rows, inputs.classes, inputs.bank, inputs.bank_classes, inputs.anchors)


def compiled(inputs):
    return dense(inputs, compiled_loss)


def metric_learning(inputs):
    """pytorch-metric-learning's CrossBatchMemory(SupConLoss), which has no choice of anchors."""
    from pytorch_metric_learning.losses import CrossBatchMemory, SupConLoss

    def loss(rows):
        memory = CrossBatchMemory(
            SupConLoss(temperature=TEMPERATURE), DIM, memory_size=len(inputs.bank) + len(rows)
        ).to(rows.device)
        memory.embedding_memory[: len(inputs.bank)] = inputs.bank
        memory.label_memory[: len(inputs.bank)] = inputs.bank_classes
        memory.queue_idx = len(inputs.bank)
        return memory(rows, inputs.classes)

    return loss


IMPLEMENTATIONS = {
    "uncertainty_mm": ours,
    "uncertainty_mm, bf16_products": partial(ours, bf16_products=True),
    "dense": dense,
    "dense, compiled": compiled,
    "pytorch-metric-learning": metric_learning,
}


def step(name, inputs):
    """One forward and backward pass, as a callable."""
    loss = IMPLEMENTATIONS[name](inputs)

    def run():
        rows = inputs.rows.detach().requires_grad_()
        loss(rows).backward()
        return rows.grad

    return run


def floor(inputs):
    """The necessary matrix products alone: scores once, gradient of anchors, gradient of the batch's keys."""
    anchors = inputs.rows[inputs.anchors]
    keys = torch.cat([inputs.rows, inputs.bank])
    scores = torch.empty(len(anchors), len(keys), device=keys.device)
    first = torch.empty_like(anchors)
    second = torch.empty_like(inputs.rows)

    def run():
        torch.mm(anchors, keys.T, out=scores)
        torch.mm(scores, keys, out=first)
        torch.mm(scores[:, : len(inputs.rows)].T, anchors, out=second)

    return run


def memory(name, anchors, queue):
    """Peak extra memory of one step in MB, on the processor in a process of its own."""
    command = [sys.executable, __file__, name, anchors, str(queue)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


if __name__ == "__main__":
    name, anchors, queue = sys.argv[1], sys.argv[2], int(sys.argv[3])
    # Threads, kernels and compiled code first, on a small input
    small = Inputs(anchors, 512, rows=256)
    step(name, small)()
    if name == "dense, compiled":
        step(name, Inputs(anchors, queue))()
    print(peak_mb(step(name, Inputs(anchors, queue)), "cpu"))
