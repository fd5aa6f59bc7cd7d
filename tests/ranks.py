"""Processes joined by gloo, started once and fed with jobs, and the jobs that the tests send."""

import os
import pickle
import time
import traceback
import warnings
from datetime import timedelta

import torch
import torch.distributed as dist

import uncertainty_mm as umm
from cases import MODULES, run_steps
from support import processes
from uncertainty_mm import distributed, functional

START, JOB, COLLECTIVE = 120, 60, 30  # seconds that each may take


def _serve(rank, world_size, meeting_point, connection):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{meeting_point}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=COLLECTIVE),
    )
    connection.send_bytes(pickle.dumps((True, rank)))
    while (job := pickle.loads(connection.recv_bytes())) is not None:
        function, arguments = job
        try:
            answer = (True, function(rank, *arguments))
        except Exception:
            answer = (False, traceback.format_exc())
        connection.send_bytes(pickle.dumps(answer))
    dist.destroy_process_group()


def go_on(modules, connection):
    """Sends what the components of `cases.py` do in a process of their own."""
    torch.set_num_threads(1)
    answers = {name: run_steps(MODULES[name], module, range(3)) for name, module in modules.items()}
    connection.send_bytes(pickle.dumps(answers))


class Ranks:
    """A pool of processes that form one process group."""

    def __init__(self, world_size, meeting_point):
        context = processes()
        self.world_size = world_size
        self.connections, self.processes = [], []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            arguments = (rank, world_size, meeting_point, theirs)
            self.processes.append(context.Process(target=_serve, args=arguments, daemon=True))
            self.connections.append(ours)
        for process in self.processes:
            process.start()
        self._answers(START)

    def run(self, function, *arguments):
        """`function(rank, *arguments)` on all ranks at once; its results by rank."""
        for connection in self.connections:
            connection.send_bytes(pickle.dumps((function, arguments)))
        return self._answers(JOB)

    def run_first(self, function, *arguments):
        """The result of rank 0; what becomes of the other ranks does not matter."""
        for connection in self.connections:
            connection.send_bytes(pickle.dumps((function, arguments)))
        return self._answers(JOB, self.connections[:1])[0]

    def _answers(self, seconds, connections=None):
        deadline = time.monotonic() + seconds
        answers = []
        for rank, connection in enumerate(connections or self.connections):
            if not connection.poll(max(0, deadline - time.monotonic())):
                self.stop()
                raise TimeoutError(f"rank {rank} did not answer within {seconds} s")
            answers.append(pickle.loads(connection.recv_bytes()))
        failures = [answer for succeeded, answer in answers if not succeeded]
        if failures:
            raise RuntimeError("\n".join(failures))
        return [answer for _, answer in answers]

    def close(self):
        for connection in self.connections:
            connection.send_bytes(pickle.dumps(None))
        for process in self.processes:
            process.join(COLLECTIVE)
        self.stop()

    def stop(self):
        for process in self.processes:
            process.kill()
            process.join()


def contrast(rank, shares, batches, settings):
    """Losses, gradients and queue of a DistributionSupConLoss that sees this rank's share."""
    return _contrast(rank, shares, batches, settings)


def contrast_compiled(rank, shares, batches, settings):
    """The same, compiled whole and only once."""
    with torch._dynamo.config.patch(error_on_recompile=True):
        try:
            return _contrast(rank, shares, batches, settings, fullgraph=True, backend="aot_eager")
        finally:
            torch.compiler.reset()


def _contrast(rank, shares, batches, settings, **compiler):
    modalities, labels, latent = batches[0][0].shape[1:]
    module = umm.DistributionSupConLoss(modalities, labels, latent, **settings).double()
    if compiler:
        module.compile(**compiler)
    steps = []
    for mean, std, labels, missing in batches:
        share = slice(*shares[rank])
        leaves = [x[share].clone().requires_grad_() for x in (mean, std)]
        loss = module(umm.DiagonalGaussian(*leaves), labels[share], missing[share])
        loss.sum().backward()
        steps.append((loss.detach(), *(x.grad for x in leaves)))
    return steps, module.state_dict()


def average_gradient(rank, shares, batch, settings):
    """Gradient of a linear encoder wrapped in DistributedDataParallel."""
    mean, std, labels, missing = batch
    encoder = torch.nn.Linear(mean.shape[-1], mean.shape[-1], bias=False).double()
    torch.nn.init.eye_(encoder.weight)
    parallel = torch.nn.parallel.DistributedDataParallel(encoder)
    module = umm.DistributionSupConLoss(*mean.shape[1:], **settings).double()
    share = slice(*shares[rank])
    latent = umm.DiagonalGaussian(parallel(mean[share]), std[share])
    module(latent, labels[share], missing[share]).backward()
    return encoder.weight.grad


def rank_errors(rank, shares, views, correctness, mask, joined, settings):
    """Loss, and gradient of a weight under DistributedDataParallel, of a loss that sees this rank's share."""
    share = slice(*shares[rank])
    encoder = torch.nn.Linear(3, 2, bias=False).double()
    torch.nn.init.eye_(encoder.weight)
    parallel = torch.nn.parallel.DistributedDataParallel(encoder)
    std_norm, distance = parallel(views[share]).sigmoid().unbind(1)
    loss = umm.SoftRankOrdinalityLoss(gather=True, **settings)
    scores = {"std_norm": std_norm, "distance": distance}
    scores |= {"correctness": correctness[share], "mask": mask[share]}
    if joined:
        scores = {name: x.unsqueeze(1) for name, x in scores.items()}  # of one modality
        scores = {name: x.flatten() for name, x in loss.gathered(**scores).items()}
    loss = loss(**scores, joined=joined)
    loss.backward()
    return loss.detach(), encoder.weight.grad


def track_in_parallel(rank):
    """History of this rank after a forward pass of DistributedDataParallel as it is by default."""
    model = torch.nn.Linear(2, 2)
    model.tracker = umm.CorrectnessTracker(4)
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    model.tracker.update(torch.tensor([rank]), torch.tensor([True]))
    parallel(torch.ones(1, 2)).sum().backward()
    return model.tracker.counts(torch.arange(4)).tolist()


def synchronize_two(rank):
    """History of this rank after only the first two have merged theirs."""
    tracker, pair = umm.CorrectnessTracker(4), dist.new_group([0, 1])
    tracker.update(torch.tensor([rank]), torch.tensor([True]))
    if rank < 2:
        tracker.synchronize(pair)
    return tracker.counts(torch.arange(4)).tolist()


def contrast_in_group(rank, members, shares, batches, settings):
    """The same as contrast, among the members of a group; None on the other ranks."""
    group = dist.new_group(members)  # all ranks have to call it
    if rank not in members:
        return None
    place = members.index(rank)
    return _contrast(place, shares, batches, settings | {"process_group": group})


def contrast_within_ddp(rank, shares, batches, settings):
    """State of a loss without `gather` that is part of a model wrapped in DistributedDataParallel."""

    class Model(torch.nn.Module):
        def __init__(self, latent):
            super().__init__()
            self.encoder = torch.nn.Linear(latent, latent).double()
            self.norm = torch.nn.BatchNorm1d(
                latent
            ).double()  # DDP does have something to broadcast
            self.loss = umm.DistributionSupConLoss(*batches[0][0].shape[1:], **settings).double()

        def forward(self, mean, std, labels, missing):
            mean = self.norm(self.encoder(mean).flatten(0, 2)).view_as(mean)
            return self.loss(umm.DiagonalGaussian(mean, std), labels, missing)

    model = Model(batches[0][0].shape[-1])
    parallel = torch.nn.parallel.DistributedDataParallel(model, broadcast_buffers=True)
    share = slice(*shares[rank])
    for batch in batches:
        before = [x.clone() for x in model.loss.state_dict().values()]
        parallel(*(x[share] for x in batch)).backward()
    return model.loss.state_dict(), before


def gathered_scores(rank, shares, scores, max_rows):
    """What every rank gathers, and the gradient of its own scores under a loss of all that depends on the rank."""
    own = scores[slice(*shares[rank])].clone().requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)  # torch renames what it exchanges with
        gathered, kept = distributed.gather_rows(
            own, torch.zeros(len(own)).long(), max_rows=max_rows
        )
        ((rank + 1) * gathered.square().sum()).backward()
    return gathered.detach(), kept, own.grad


def track(rank, histories, every):
    """A tracker after histories[round][rank] = [(index, correct)], synchronised each round.

    Returns for each round the share, the counts and the forgetting events of all samples.
    """
    tracker = umm.CorrectnessTracker(len(every))
    rounds = []
    for history in histories:
        for index, correct in history[rank]:
            tracker.update(torch.tensor([index]), torch.tensor([correct]))
        tracker.synchronize()
        rounds.append(
            [
                x.tolist()
                for x in (tracker(every), tracker.counts(every), tracker.forgetting_events(every))
            ]
        )
    return rounds


def evaluate(rank, shares, probs, labels, errors, uncertainty):
    """What every metric says of the data, of which each rank sees its share."""
    from uncertainty_mm import metrics

    share = slice(*shares[rank])
    answers = {}
    for metric, batch in (
        (metrics.MultilabelCalibrationError(probs.shape[1]), (probs, labels)),
        (metrics.MultilabelCalibrationError(probs.shape[1], binning="mass"), (probs, labels)),
        (metrics.MultilabelBrierDecomposition(probs.shape[1]), (probs, labels)),
        (metrics.SampleJaccard(), (probs, labels)),
        (metrics.AURC(), (uncertainty, errors)),
        (metrics.DetectionAUROC(), (uncertainty, errors)),
        (metrics.SpearmanCorrelation(), (uncertainty, errors)),
    ):
        if shares[rank][0] < shares[rank][1]:  # else this rank never updates
            metric.update(*(x[share] for x in batch))
        answers[repr(metric), getattr(metric, "binning", None)] = metric.compute()
    return answers


def gathered_supcon(rank, source, shares, embeddings, classes):
    """Loss and gradient of this rank's share, by the function that `source` defines."""
    names = {"functional": functional}
    exec(source, names)
    share = slice(*shares[rank])
    own = embeddings[share].clone().requires_grad_()
    loss = names["gathered_supcon"](own, classes[share], len(embeddings))
    loss.backward()
    return loss.detach(), own.grad


def exchanged(rank, strategy, targets):
    """What the formula says that this rank sends in a step of LDDU, and what it sends, with the number of exchanges."""
    from benchmarks import scale_out

    sizes = {"dims": {"a": 6, "b": 4}, "steps": 5, "labels": 3, "scl_rows": 12, "targets": targets}
    small = {"hidden_dim": 8, "num_heads": 2, "num_layers": 1}
    step, by_formula = scale_out.training_step(
        4, dist.group.WORLD, strategy, False, **sizes, encoder=small, places={"hidden_dim": 8}
    )
    for _ in range(2):  # DDP gathers its buckets anew after the first
        step()
    return by_formula, *scale_out.counted(step)


def left_alone(rank, how, timeout):
    """What rank 0 meets in every exchange while the others have died or hang: {name: (error, seconds)}."""
    latent = umm.DiagonalGaussian(torch.randn(4, 2, 3, 4), torch.ones(4, 2, 3, 4))
    contrastive = umm.DistributionSupConLoss(2, 3, 4, queue_size=50, gather=True)
    contrastive(latent, torch.ones(4, 3))  # all are well
    before = contrastive.queue.rows.clone()
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=timeout))
    if rank:
        if how == "dies":
            os._exit(1)
        time.sleep(JOB)
    bounded = umm.DistributionSupConLoss(2, 3, 4, gather=True, max_batch_size=4)
    tracker = umm.CorrectnessTracker(5)
    tracker.update(torch.arange(3), torch.ones(3))
    exchanges = {
        "loss": lambda: contrastive(latent, torch.ones(4, 3)),
        "loss with max_batch_size": lambda: bounded(latent, torch.ones(4, 3)),
        "synchronize": tracker.synchronize,
    }
    met = {}
    for name, exchange in exchanges.items():
        begin = time.monotonic()
        try:
            exchange()
        except Exception as error:
            met[name] = type(error).__name__, time.monotonic() - begin
        else:
            met[name] = None, time.monotonic() - begin
    unchanged = torch.equal(contrastive.queue.rows, before)
    return met, unchanged, tracker.counts(torch.arange(5)).tolist()
