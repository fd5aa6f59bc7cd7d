"""One small example of every public component, for the tests that run on all of them.

A component gets the whole contract (test_contract.py, test_cuda.py) by one entry: how it is built, drawn for, and what
its equation says in plain float64.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import _pytree as pytree

import uncertainty_mm as umm
from uncertainty_mm import functional
from uncertainty_mm.beliefs import BeliefRule
from uncertainty_mm.data import MultimodalBatch
from uncertainty_mm.decisions import DecisionRule
from uncertainty_mm.encoder import PlaceReads, SequenceEncoder
from uncertainty_mm.gaussian import DistanceKind
from uncertainty_mm.metrics import functional as measures
from uncertainty_mm.places import PlaceClassifier
from uncertainty_mm.rules import Rule

LATENT, WIDTH, BANK = 5, 6, 7


@dataclass(frozen=True)
class Sizes:
    batch: int = 4
    labels: int = 3
    modalities: int = 2
    steps: int = 4

    @property
    def dims(self):
        return dict(list({"voice": 3, "face": 6}.items())[: self.modalities])


SMALL = Sizes()


def flattened(outputs):
    return [x for x in pytree.tree_leaves(outputs) if isinstance(x, torch.Tensor)]


def weighted(outputs):
    """One number that every entry of every floating output moves by an amount of its own."""
    total = 0.0
    for x in outputs:
        if x.is_floating_point():
            weights = torch.linspace(1, 2, x.numel(), dtype=torch.float64, device=x.device)
            total = total + (x.double() * weights.view_as(x)).sum()
    return total


def run_steps(case, module, steps):
    return [x for step in steps for x in case.results(module, case.inputs(step))]


def all_equal(left, right):
    return len(left) == len(right) and all(map(torch.equal, left, right))


class Function(nn.Module):
    """A function as a module without parameters."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


def steady(module):
    """Half of the hidden units always on, the others always off: none may change sides by rounding."""
    for layers in module.modules():
        if isinstance(layers, nn.Sequential):
            bias = layers[0].bias.data
            bias.copy_(4 - 8 * (torch.arange(bias.shape[-1]) % 2))
    return module


@dataclass(frozen=True)
class Case:
    """How a component is made, drawn for and run.

    `plain` is its equation to the letter, without care for range or speed; `shown` is part of its repr; `untransformed`
    is what `torch.func.vmap` says where it does not work; `float32` says that its state stays so when it is cast.
    """

    make: Callable[..., nn.Module]
    draw: Callable[[Sizes], tuple]
    plain: Callable | None = None
    shown: str = ""
    run: Callable = lambda module, *inputs: module(*inputs)
    untransformed: str = ""
    float32: bool = False

    def build(self, sizes=SMALL, **kwargs):
        return self.make(sizes, **kwargs)

    def inputs(self, step, device="cpu", dtype=torch.float32, sizes=SMALL):
        """The batch of a step: the same for the same step, floating tensors being leaves."""
        torch.manual_seed(step)

        def place(x):
            x = x.to(device, dtype if x.is_floating_point() else None)
            return x.requires_grad_(x.is_floating_point())

        return pytree.tree_map(place, self.draw(sizes))

    def results(self, module, inputs, leaves=None, run=None):
        """Detached outputs of a run, and the gradients that reach `leaves` (`inputs`) and parameters."""
        outputs = flattened((run or self.run)(module, *inputs))
        leaves = pytree.tree_leaves(inputs if leaves is None else leaves)
        leaves = [x for x in (*leaves, *module.parameters()) if x.requires_grad]
        live = [x for x in outputs if x.requires_grad]
        grads = torch.autograd.grad(weighted(live), leaves, materialize_grads=True) if live else ()
        return [x.detach() for x in (*outputs, *grads)]

    def expected(self, module, inputs):
        """What `results` should be: the plain equation in float64, on the values as they were rounded."""
        double = pytree.tree_map(
            lambda x: (
                x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x
            ),
            inputs,
        )
        return self.results(module.double(), double, run=self.plain)


# ----------------------------------------------------------------------------------------- inputs


def draw_features(sizes):
    steps = dict(zip(sizes.dims, (sizes.steps, (sizes.steps + 1) // 2), strict=False))
    features = {m: torch.randn(sizes.batch, steps[m], dim) for m, dim in sizes.dims.items()}
    padding_mask = {m: torch.rand(sizes.batch, steps[m]) < 0.3 for m in sizes.dims}
    return features, padding_mask


def draw_sequence(sizes):
    steps = min(sizes.steps, 200)  # the plain equation takes their square of memory
    return torch.randn(sizes.batch, steps, WIDTH), torch.rand(sizes.batch, steps) < 0.3


def draw_places(sizes):
    return *draw_features(sizes), 0.5 + torch.rand(sizes.batch, sizes.modalities)


def draw_missing(sizes):
    missing = torch.zeros(sizes.batch, sizes.modalities, dtype=torch.bool)
    missing[1::4, 0] = missing[2::4, -1] = True
    return missing


def draw_latent(sizes):
    shape = (sizes.batch, sizes.modalities, sizes.labels, LATENT)
    return umm.DiagonalGaussian(torch.randn(shape), 0.1 + torch.rand(shape))


def draw_evidence(sizes):
    return 4 * torch.rand(sizes.batch, sizes.modalities, sizes.labels, 2)


def draw_labelled_evidence(sizes):
    return draw_evidence(sizes)[:, 0], draw_labels(sizes), draw_labels(sizes) > 0


def draw_decisions(sizes):
    shape = (sizes.batch, sizes.modalities, sizes.labels)
    return 2 * torch.randn(shape), *(0.1 + 0.8 * torch.rand(2, *shape)), draw_missing(sizes)


def draw_scores(sizes):
    return torch.randn(sizes.batch), torch.randn(sizes.batch), torch.arange(sizes.batch) % 4 == 1


def draw_views(sizes):
    norm, distance, correctness = torch.rand(3, sizes.batch)
    return 0.5 + norm, distance, correctness, torch.arange(sizes.batch) % 4 == 1


def draw_probs(sizes):
    return torch.rand(sizes.batch, sizes.labels), draw_labels(sizes)


def draw_labels(sizes):
    return torch.randint(2, (sizes.batch, sizes.labels))


def draw_embeddings(sizes):
    rows = torch.randn(sizes.batch, WIDTH), torch.randint(-1, 2, (sizes.batch,))
    return *rows, torch.randn(BANK, WIDTH), torch.randint(-1, 2, (BANK,))


# -------------------------------------------------------------------------------- plain equations


def plain_attention(module, features, padding_mask):
    outputs, weights = [], {}
    for name, layers in module.attention.items():
        mask = padding_mask[name]
        keys = layers.key(features[name].masked_fill(mask.unsqueeze(2), 0))
        scores = module.scale * layers.query(module.label_embedding.weight) @ keys.mT
        missing = mask.all(1)[:, None, None]
        shares = scores.masked_fill(mask.unsqueeze(1), -1e300).softmax(2)
        outputs.append(layers.out(shares @ keys).masked_fill(missing, 0))
        weights[name] = shares.masked_fill(missing, 0)
    return torch.stack(outputs, 1), weights


def plain_encoder(module, x, padding):
    """One sequence after the other, without what is padding."""
    encoded = x.new_zeros(*x.shape[:2], module.hidden_dim) + 0 * x.nan_to_num().sum()
    for sample, left_out in enumerate(padding):
        if left_out.all():
            continue
        features = (x[sample, ~left_out] - module.mean) / module.std
        h = module.positions[: x.shape[1]][~left_out]
        if module.size is not None:
            size = features.square().mean().clamp_min(1e-6).sqrt()
            features = features / size
            h = h + module.size(size.log().view(1))
        h = h + module.project(features)
        for layer in module.layers:
            parts = layer.qkv(layer.norm(h)).chunk(3, 1)
            query, key, value = (part.unflatten(1, (layer.num_heads, -1)) for part in parts)
            scores = torch.einsum("ihd,jhd->hij", query, key) / query.shape[2] ** 0.5
            attended = torch.einsum("hij,jhd->ihd", scores.softmax(2), value)
            h = h + layer.out(attended.flatten(1))
            h = h + layer.feed_forward(h)
        encoded[sample, ~left_out] = module.norm(h)
    return encoded


def plain_reads(module, x, padding):
    """One sequence after the other, without what is padding."""
    readings = []
    for steps, left_out in zip(x, padding, strict=True):
        weight = module.weight[:, : len(steps)][:, ~left_out]
        readings.append(torch.einsum("rs,sd->rd", weight, steps[~left_out]).flatten())
    return torch.stack(readings)


def plain_places(module, features, padding_mask, factor):
    said = [
        plain_reads(read, features[name], padding_mask[name]) / factor[:, [index]]
        for index, (name, read) in enumerate(module.reads.items())
    ]
    return module.classify(torch.cat(said, 1))


def plain_decoupler(module, z, missing):
    means, stds = [], []
    for m in range(module.num_modalities):
        first, mean, raw = module.encoder[0], module.mean_head, module.log_var_head
        hidden = (z[:, m] @ first.weight[m].T + first.bias[m]).relu()
        mean, raw = (hidden @ x.weight[m].T + x.bias[m] for x in (mean, raw))
        if module.normalize_mean:
            mean = module.latent_dim**0.5 * F.normalize(mean, dim=-1)
        limit = torch.full_like(raw, 2 * math.log(1e4))  # `where` of two numbers would be float32
        limit = limit.masked_fill(raw < 0, -2 * math.log(module.min_std))
        std = module.min_std + torch.exp(0.5 * raw / (1 + (raw / limit) ** 2).sqrt())
        left_out = missing[:, m, None, None]
        means.append(mean.masked_fill(left_out, 0))
        stds.append(std.masked_fill(left_out, 1))
    return torch.stack(means, 1), torch.stack(stds, 1)


def plain_similarity(rows, keys, similarity):
    if similarity == "cosine":
        return rows @ keys.T
    (mean, std), (others, their_std) = rows.chunk(2, -1), keys.chunk(2, -1)
    far = {"compute_mode": "donot_use_mm_for_euclid_dist"}
    spread = torch.cdist(std, their_std, **far) ** 2
    if similarity == "sampled":
        spread = (std**2).sum(1, keepdim=True) + (their_std**2).sum(1)
    return -(torch.cdist(mean, others, **far) ** 2 + spread) / (2 * LATENT)


def plain_supcon(_, rows, classes, bank, bank_classes, temperature=0.125, similarity="cosine"):
    keys, of_keys = torch.cat([rows, bank.detach()]), torch.cat([classes, bank_classes])
    scores = plain_similarity(rows, keys, similarity) / temperature
    own = torch.eye(*scores.shape, dtype=torch.bool)
    normaliser = scores.masked_fill(own | (of_keys < 0), -1e300).logsumexp(1)
    positive = (classes.unsqueeze(1) == of_keys) & ~own & (of_keys >= 0)
    losses = normaliser - (scores * positive).sum(1) / positive.sum(1).clamp_min(1)
    anchors = positive.any(1)
    return (losses * anchors).sum() / anchors.sum().clamp_min(1)


def plain_distribution_supcon(module, latent, labels, missing):
    present = module.num_modalities * module.num_labels
    classes = torch.arange(present).view(1, module.num_modalities, module.num_labels)
    classes = torch.where(labels.unsqueeze(1) > 0, classes, classes + present)
    classes = classes.masked_fill(missing.unsqueeze(2), -1).flatten()
    rows = torch.cat(latent, -1).flatten(0, 2)
    if module.similarity == "cosine":
        rows = F.normalize(rows, dim=-1)
    queue = module.queue.rows, module.queue.classes, module.temperature
    return plain_supcon(None, rows, classes, *queue, module.similarity)


def plain_queue(queue, rows, classes):
    keys, of_keys, slot = queue.rows.clone(), queue.classes + 1, int(queue.pointer)
    for row, class_id in zip(rows, classes, strict=True):
        if class_id >= 0:
            keys[slot], of_keys[slot] = row.detach(), class_id + 1
            slot = (slot + 1) % queue.size
    return keys.sum(0), of_keys.to(keys.dtype)


def plain_mixture(fused, mean_logits, std_logits, uncertainty):
    probs = (1 - uncertainty) * mean_logits.sigmoid() + uncertainty * std_logits.sigmoid()
    return probs.logit(), mean_logits, std_logits, 1 - uncertainty, probs


def plain_concat_fusion(module, latent, uncertainty, missing):
    left_out = missing[:, :, None, None]
    logits = (
        head(x.masked_fill(left_out, 0).transpose(1, 2).flatten(2)).squeeze(2)
        for head, x in ((module.mean_head, latent.mean), (module.std_head, latent.std))
    )
    return plain_mixture(module, *logits, uncertainty)


def plain_product(latent, missing, prior_mean):
    kept = (~missing)[:, :, None, None].double()
    precision = 1 + (kept / latent.std**2).sum(1)
    mean = (prior_mean + (kept * latent.mean / latent.std**2).sum(1)) / precision
    return umm.DiagonalGaussian(mean, precision.rsqrt())


def plain_fusion(module, latent, uncertainty, missing):
    mean, std = plain_product(latent, missing, module.prior_mean)
    logits = module.mean_head(mean).squeeze(2), module.std_head(std.detach()).squeeze(2)
    return plain_mixture(module, *logits, uncertainty)


def plain_moments(weights, mean, std):
    """Of the mixture whose components lie along the first axis."""
    fused = (weights * mean).sum(0)
    return fused, ((weights * (std**2 + mean**2)).sum(0) - fused**2).clamp_min(0).sqrt()


def plain_subsets(mean, std):
    """Moments of the mixture of the products of all subsets, and shares of precision."""
    parts = []
    for size in range(1, len(mean) + 1):
        for subset in itertools.combinations(range(len(mean)), size):
            inside = torch.tensor([m in subset for m in range(len(mean))]).view(-1, 1, 1)
            precision = inside / std**2
            total = precision.sum(0)
            share = precision / total
            parts.append(((share * mean).sum(0), total**-0.5, share))
    means, stds, shares = (torch.stack(x) for x in zip(*parts, strict=True))
    return *plain_moments(1 / len(parts), means, stds), shares.mean(0)


def plain_rule(module, latent, missing):
    """One sample after the other, without what is missing."""
    results = []
    for mean, std, left_out in zip(*latent, missing, strict=True):
        shares, kept = 0 * mean, ~left_out
        if not kept.any():
            results.append((shares.sum(0), shares.sum(0) + 1, shares.mean(-1)))
            continue
        mean, std = mean[kept], std[kept]
        equal, precision = torch.full_like(mean, 1 / len(mean)), std**-2
        if module.rule == "product":
            shares = precision / (1 + precision.sum(0))
            fused = (shares * mean).sum(0), (1 + precision.sum(0)) ** -0.5
        elif module.rule == "generalized_product":
            if module.num_modalities is not None:
                equal = module.weight_logits.expand(len(kept), *mean.shape[1:])[kept].softmax(0)
            shares, precision = equal, equal * precision
            fused = (precision * mean).sum(0) / precision.sum(0), precision.sum(0) ** -0.5
        elif module.rule == "mixture_of_products":
            *fused, shares = plain_subsets(mean, std)
        elif module.rule == "barycenter":
            shares, fused = equal, (mean.mean(0), std.mean(0))
        else:
            norm = std.square().sum(-1, keepdim=True).sqrt()
            shares = equal if module.rule == "mixture" else 1 / norm / (1 / norm).sum(0) + 0 * mean
            fused = plain_moments(shares, mean, std)
        whole = torch.zeros(len(kept), *shares.shape[1:], dtype=shares.dtype)
        results.append((*fused, whole.index_put((kept,), shares).mean(-1)))
    if not results:
        nothing = latent.mean.sum(1) + latent.std.sum(1)
        return nothing, nothing, latent.mean.sum(-1) + sum(x.sum() for x in module.parameters())
    return tuple(torch.stack(x) for x in zip(*results, strict=True))


def plain_belief(module, evidence, missing):
    evidence = evidence.masked_fill(missing[:, :, None, None], 0)
    total = evidence.sum(-1)
    certainty, p = total / (total + 2), (evidence[..., 0] + 1) / (total + 2)
    pairs = list(itertools.product(range(evidence.shape[1]), repeat=2))
    conflict = {
        (m, n): (p[:, m] - p[:, n]).abs() * certainty[:, m] * certainty[:, n] for m, n in pairs
    }
    if module.rule == "dempster":
        fused = 2 * (1 + evidence / 2).prod(1) - 2
    elif module.rule == "discounted":
        trusted = []
        for m in range(evidence.shape[1]):
            others = [1 - conflict[m, n] for n in range(evidence.shape[1]) if n != m]
            trust = torch.stack([torch.ones_like(p[:, m]), *others]).prod(0).unsqueeze(-1)
            belief = trust * evidence[:, m] / (total[:, m] + 2).unsqueeze(-1)
            trusted.append(2 * belief / (1 - belief.sum(-1, keepdim=True)))
        fused = torch.stack(trusted).sum(0)
    else:
        fused = evidence.sum(1)
        if module.rule == "average":
            fused = fused / (~missing).sum(1).clamp_min(1)[:, None, None]
    strength = 2 + fused.sum(-1)
    largest = torch.stack([*conflict.values()]).amax(0)
    return fused, (fused[..., 0] + 1) / strength, 2 / strength, largest


def plain_decision(module, logits, std, confidence, missing):
    """One sample after the other, without what is missing."""
    results = []
    for x, s, c, left_out in zip(logits, std, confidence, missing, strict=True):
        weights, kept = 0 * (x + s + c), ~left_out
        if not kept.any():
            results.append((weights.sum(0), weights, weights.sum(0)))
            continue
        x, s, c = x[kept], s[kept], c[kept]
        scores, number = torch.ones_like(x), len(x)
        if module.rule == "precision":
            scores = s**-2
        elif module.rule == "energy":
            scores = torch.log1p(x.exp()).sum(-1, keepdim=True).expand_as(x)
        elif module.rule == "predictive":
            loss, distance = -c.log(), (x.sigmoid() - 0.5).abs()
            ratio = distance * (number - 1) / (distance.sum(0) - distance)
            belief = c + (loss.sum(0) - loss) / loss.sum(0)
            scores = (torch.where(ratio < 1, ratio, 1) * belief).exp() if number > 1 else scores
        shares = scores / scores.sum(0)
        fused = (shares * x).sum(0)
        if module.rule == "precision":
            fused = fused / (1 + math.pi / 8 / (shares * s**-2).sum(0)) ** 0.5
            x = x / (1 + math.pi / 8 * s**2) ** 0.5
        sides = torch.stack([x, -x]).sigmoid()
        bits = -torch.special.xlogy(sides, sides).sum(0).mean(0) / math.log(2)
        sides = sides.mean(1)
        conflict = -torch.special.xlogy(sides, sides).sum(0) / math.log(2) - bits
        results.append((fused, weights.index_put((kept,), shares), conflict))
    if not results:
        return logits.sum(1), logits + std + confidence, logits.sum(1)
    return tuple(torch.stack(x) for x in zip(*results, strict=True))


def plain_beta_loss(_, evidence, labels, unknown):
    a, b = (evidence + 1).unbind(-1)
    loss = torch.digamma(a + b) - torch.digamma(torch.where(labels > 0, a, b))
    return loss.masked_fill(unknown, 0)


def plain_beta_kl(_, evidence, labels, unknown):
    wrong = 1 + evidence.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    return (wrong.log() + 1 / wrong - 1).masked_fill(unknown, 0)


def plain_evidence(module, *given):
    weight = min(1, module.step.item() / module.annealing_steps)
    loss = plain_beta_loss(None, *given) + weight * plain_beta_kl(None, *given)
    return loss.sum() / (~given[2]).sum().clamp_min(1)


def plain_expected_entropy(_, evidence):
    a, total = evidence + 1, evidence.sum(-1, keepdim=True) + 2
    return (a / total * (torch.digamma(total + 1) - torch.digamma(a + 1))).sum(-1)


def plain_mutual_information(_, evidence):
    p = (evidence + 1) / (evidence.sum(-1, keepdim=True) + 2)
    return -(p * p.log()).sum(-1) - plain_expected_entropy(None, evidence)


def plain_chi2(_, latent, missing):
    weight = (~missing)[:, :, None, None] / latent.std**2
    total = weight.sum(1, keepdim=True).clamp_min(1e-9)
    centre = (weight * latent.mean).sum(1, keepdim=True) / total
    freedom = (~missing).sum(1).view(-1, 1) - 1
    chi2 = (weight * (latent.mean - centre) ** 2).sum(1).mean(-1) / freedom.clamp_min(1)
    return chi2.masked_fill(freedom < 1, 0)


def plain_rank(scores, temperature, mask):
    kept = (~mask).double()
    gaps = (scores.unsqueeze(1) - scores) / (2 * temperature)
    # A clamp would pass no gradient at 0 in torch 2.14.
    near = 0.5 * torch.where(gaps < 0, gaps, -gaps).exp()
    beats = torch.where(gaps < 0, near, 1 - near) * kept
    return torch.where(mask, 1, 0.5 + beats.sum(1))


def plain_divergence(_, a, b, mask):
    if mask.all():
        return (a * 0).sum()
    log_a, log_b = (x[~mask].log_softmax(0) for x in (a, b))
    return (log_a.exp() * (log_a - log_b) + log_b.exp() * (log_b - log_a)).sum()


def plain_ordinality(module, std_norm, distance, correctness, mask):
    scores = (1 / std_norm)[~mask], correctness.detach()[~mask]
    if len(scores[0]) < 2:
        return std_norm.sum() * 0
    scores = [(x - x.mean()) / x.std(correction=0) for x in scores]
    if module.mode == "pearson":
        return 1 - (scores[0] * scores[1]).mean()
    whole = torch.zeros_like(scores[0], dtype=torch.bool)
    ranks = [(plain_rank(x, module.temperature, whole) - 1) / (len(x) - 1) for x in scores]
    return plain_divergence(None, *ranks, whole)


def plain_ranking(module, confidence, correctness, mask):
    k, c = (x[~mask].tolist() for x in (confidence, correctness))
    places = range(len(k))
    pairs = [(i, j) for i in places for j in places if i != j]
    if module.pairs == "neighbours":
        pairs = [(i, (i + 1) % len(k)) for i in places]
    total = confidence.sum() * 0
    for i, j in pairs if len(k) > 1 else []:
        sign = (c[i] > c[j]) - (c[i] < c[j])
        if abs(c[i] - c[j]) > sign * (k[i] - k[j]):
            live = confidence[~mask][i] - confidence[~mask][j]
            total = total + abs(c[i] - c[j]) - sign * live
    return total / max(len(pairs), 1)


def plain_accuracy_uncertainty(module, probs, uncertainty, labels, unknown):
    """One prediction after the other."""
    places = [(b, q) for b, q in itertools.product(*map(range, probs.shape)) if not unknown[b, q]]
    right = {(b, q): bool(probs[b, q] > 0.5) == bool(labels[b, q] > 0) for b, q in places}
    groups = [[uncertainty[at].item() for at in places if right[at] == each] for each in (0, 1)]
    means = [sum(group) / len(group) for group in groups if group]
    total = {True: 0 * probs.sum(), False: 0 * uncertainty.sum()}
    for at in places:
        p, u = probs[at], uncertainty[at]
        weight = torch.maximum(p, 1 - p) if right[at] else torch.minimum(p, 1 - p)
        certain = u.item() <= sum(means) / len(means)
        weight = weight * (1 - u.tanh() if certain else u.tanh())
        total[right[at] == certain] = total[right[at] == certain] + weight
    if total[True] == 0:
        least = torch.finfo(torch.float32).eps * total[False].detach()
        return torch.log1p(total[False] / least.clamp_min(1e-30))
    return -(total[True] / (total[True] + total[False])).log()


def plain_monotone(_, full, subset, mask):
    gaps = [b - a for a, b, out in zip(full, subset, mask, strict=True) if b > a and not out]
    return sum(gaps, 0 * (full.sum() + subset.sum())) / max(int((~mask).sum()), 1)


def plain_histogram(module, probs):
    columns = []
    for p, edges, frequency in zip(probs.T, module.edges, module.frequency, strict=True):
        found = frequency[(p.unsqueeze(1) >= edges).sum(1)]
        columns.append(torch.where(found < 0, p, found))
    return torch.stack(columns, 1)


def plain_isotonic(module, probs):
    columns = []
    for p, knots, levels in zip(probs.T, module.knots, module.levels, strict=True):
        column = torch.where(p <= knots[0], levels[0], levels[-1]) + 0 * p
        pieces = zip(knots[:-1], knots[1:], levels[:-1], levels[1:], strict=True)
        for left, right, low, high in pieces:
            if left < right:
                linear = low + (p - left) / (right - left) * (high - low)
                column = torch.where((left < p) & (p <= right), linear, column)
        columns.append(column)
    return torch.stack(columns, 1)


def plain_typicality(module, features, padding_mask):
    """One sequence after the other, without what is padding."""
    distances = []
    for name, part in module.modality.items():
        shift, weight, root, *sequence = (x.double() for x in part.state_dict().values())
        for x, padding in zip(features[name], padding_mask[name], strict=True):
            if padding.all():
                distances.append(0 * x.sum())
                continue
            z = (x[~padding] - shift) * weight
            steps = (~padding).nonzero().flatten()
            pairs = steps.diff() == 1
            change = z.diff(dim=0)[pairs].square().sum() / z.shape[1] / pairs.sum().clamp_min(1)
            rows = torch.cat(
                [
                    z.mean(0),
                    0.5 * (z.var(0, correction=0) + 1e-2).log(),
                    0.5 * (z.square().mean() + 1e-6).log().view(1),
                    0.5 * ((z @ root.T).square().mean() + 1e-6).log().view(1),
                    0.5 * (change + 1e-4).log().view(1),
                ]
            )
            z = (rows - sequence[0]) * sequence[1]
            distances.append((sequence[2] @ z).square().sum())
    distances = torch.stack(distances).view(len(module.modality), -1).T
    quantiles = torch.stack([part.quantile.double() for part in module.modality.values()])
    return 1 + (distances / quantiles).clamp_min(1).log(), distances


def plain_conflict(module, rows, missing):
    """The densities of the parts that are there, one sample after the other."""
    joined = torch.cat([rows[name] for name in module.modality_dims], 1)
    z = (joined - module.shift.double()) * module.weight.double() @ module.projection.double()
    sizes = [min(dim, module.num_directions) for dim in module.modality_dims.values()]
    parts = torch.arange(z.shape[1]).split(sizes)

    def log_density(x, modalities):
        if not modalities:
            return 0
        at = torch.cat([parts[m] for m in modalities])
        covariance = module.covariance.double()[at][:, at]
        return torch.distributions.MultivariateNormal(0 * x[at], covariance).log_prob(x[at])

    ratios, probs = [], []
    for x, gone in zip(z, missing, strict=True):
        there = [m for m in range(len(parts)) if not gone[m]]
        odds = {}
        for m in there if len(there) > 1 else []:
            rest = [n for n in there if n != m]
            ratio = log_density(x, [m]) + log_density(x, rest) - log_density(x, there)
            odds[m] = module.slope.double() * ratio
        share = module.prior / max(len(odds), 1)
        total = 1 - module.prior + sum(share * each.exp() for each in odds.values())
        nothing = 0 * x.sum()
        ratios += [odds.get(m, nothing) for m in range(len(parts))]
        probs += [
            share * odds[m].exp() / total if m in odds else nothing for m in range(len(parts))
        ]
    return tuple(torch.stack(each).view(len(z), -1) for each in (probs, ratios))


def plain_tracker(module, indices, correct):
    (total, count, forgotten), last = module.history.double().clone(), module.last.clone()
    for i, now in zip(indices, correct, strict=True):
        total[i], count[i] = total[i] + now * 2**32, count[i] + 1
        forgotten[i] += (last[i] == 1) & ~now
        last[i] = now
    return total[indices] / 2**32 / count[indices], count[indices], forgotten[indices]


# ------------------------------------------------------------------------------------------ cases


def track(tracker, indices, correct):
    tracker.update(indices, correct)
    return tracker(indices), tracker.counts(indices), tracker.forgetting_events(indices)


def ordered(loss, std_norm, distance, correctness, mask=None):
    return loss(std_norm=std_norm, distance=distance, correctness=correctness, mask=mask)


def ranked(loss, confidence, correctness, mask=None):
    return loss(confidence=confidence, correctness=correctness, mask=mask)


def fitted(calibration, sizes, draw=torch.rand):
    """Fitted to samples that say little, so that no label is separated."""
    shape = 20, sizes.labels
    return calibration.fit(draw(shape), torch.arange(20 * sizes.labels).view(shape) % 3 == 0)


def fuse(fusion, latent, uncertainty, missing):
    fused = fusion(latent, uncertainty, missing)
    return *fused, fused.probs


def soft_rank(scores, _, mask):
    return functional.soft_rank(scores, 0.5, mask=mask)


def ordinality_divergence(a, b, mask):
    return functional.ordinality_divergence(a, b, mask=mask)


def supcon_loss(embeddings, classes, bank, bank_classes):
    return functional.supcon_loss(
        embeddings, classes, bank=bank, bank_classes=bank_classes, temperature=0.125
    )


def expected_distance(probs, _):
    return functional.expected_distance(probs)


def fitted_typicality(sizes, **kwargs):
    """Fitted to sequences like those that are drawn, a little smaller, so that some are unlike them."""
    features, padding_mask = draw_features(replace(sizes, batch=60))
    features = {name: 0.8 * x for name, x in features.items()}
    batch = MultimodalBatch(features, padding_mask, torch.ones(60, 1), torch.arange(60))
    return umm.Typicality(sizes.dims, **kwargs).fit([batch])


def draw_rows(sizes):
    topic = torch.randn(sizes.batch, 3)
    rows = {
        name: topic @ torch.linspace(-1, 1, 3 * dim).view(3, dim) + torch.randn(sizes.batch, dim)
        for name, dim in sizes.dims.items()
    }
    return rows, draw_missing(sizes)


def fitted_conflict(sizes, **kwargs):
    rows, missing = draw_rows(replace(sizes, batch=200))
    if sizes.modalities < 2:
        return umm.Conflict(sizes.dims, **kwargs)
    return umm.Conflict(sizes.dims, num_directions=2, prior=0.25, **kwargs).fit(rows, missing)


def probabilities_and_ratios(conflict, rows, missing):
    return conflict(rows, missing), conflict.log_ratios(rows, missing)


def factor_and_distances(typicality, features, padding_mask):
    inputs = features, padding_mask
    return typicality(*inputs), typicality.distances(*inputs)


def enqueue(queue, rows, classes):
    queue.enqueue(rows, classes)
    return queue.rows.sum(0), (queue.classes + 1).to(rows.dtype)


def prediction_distance(probs, labels, unknown):
    return functional.prediction_distance(probs, labels, unknown)


def reduced_chi2(latent, missing):
    return functional.reduced_chi2(*latent, missing)


def decide(module, logits, std, confidence, missing):
    return module(logits, std=std, confidence=confidence, missing=missing)


def properties_of(latent, missing):
    product = latent.inflated(1.0 + missing.to(latent.std.dtype)).product(missing)
    joint = latent.embedding("joint")
    first = umm.DiagonalGaussian(*(x[:, :1] for x in latent))
    distances = (latent.squared_distance(first, kind) for kind in get_args(DistanceKind))
    own = latent.variance, latent.log_var, latent.kl_to_standard_normal(), joint
    return product, *own, *distances


def plain_properties(_, latent, missing):
    mean, std = latent
    kl = torch.distributions.Normal(0, 1)
    kl = torch.distributions.kl_divergence(torch.distributions.Normal(mean, std), kl).sum(-1)
    joint = F.normalize(torch.cat(latent, -1), dim=-1)
    gap = (mean - mean[:, :1]) ** 2
    spreads = (std - std[:, :1]) ** 2, std**2 + std[:, :1] ** 2
    distances = ((gap + spread).sum(-1) for spread in spreads)
    return plain_product(latent, missing, 0), std**2, (std**2).log(), kl, joint, *distances


MODULES = {
    "SequenceEncoder": Case(
        lambda sizes, **kwargs: SequenceEncoder(
            WIDTH, min(sizes.steps, 200), 8, num_layers=2, num_heads=2, dropout=0, **kwargs
        ),
        draw_sequence,
        plain_encoder,
        "max_steps=4",
    ),
    "PlaceReads": Case(
        lambda sizes, **kwargs: PlaceReads(WIDTH, min(sizes.steps, 200), 3, **kwargs),
        draw_sequence,
        plain_reads,
        "max_steps=4, num_reads=3",
    ),
    "PlaceClassifier": Case(
        lambda sizes, **kwargs: steady(
            PlaceClassifier(
                sizes.dims,
                dict.fromkeys(sizes.dims, sizes.steps),
                sizes.labels,
                num_reads=3,
                hidden_dim=8,
                dropout=0,
                **kwargs,
            )
        ),
        draw_places,
        plain_places,
        "max_steps=4, num_reads=3",
    ),
    "EmotionQueryAttention": Case(
        lambda sizes, **kwargs: umm.EmotionQueryAttention(
            sizes.dims, sizes.labels, label_dim=7, proj_dim=8, out_dim=WIDTH, **kwargs
        ),
        draw_features,
        lambda *inputs: plain_attention(*inputs)[0],
        r"Embedding\(3, 7\)",
    ),
    "EmotionQueryAttention (weights)": Case(
        lambda sizes, **kwargs: umm.EmotionQueryAttention(
            sizes.dims, sizes.labels, label_dim=7, proj_dim=8, out_dim=WIDTH, **kwargs
        ),
        draw_features,
        plain_attention,
        "scale=0.35",
        lambda module, *inputs: module(*inputs, need_weights=True),
    ),
    "GaussianDecoupler": Case(
        lambda sizes, **kwargs: steady(
            umm.GaussianDecoupler(
                sizes.modalities,
                WIDTH,
                LATENT,
                hidden_dims=(9,),
                dropout=0,
                min_std=0.0125,
                **kwargs,
            )
        ),
        lambda sizes: (
            torch.randn(sizes.batch, sizes.modalities, sizes.labels, WIDTH),
            draw_missing(sizes),
        ),
        plain_decoupler,
        "0.0125",
    ),
    "DistributionSupConLoss": Case(
        lambda sizes, **kwargs: umm.DistributionSupConLoss(
            sizes.modalities, sizes.labels, LATENT, queue_size=50, temperature=0.125, **kwargs
        ),
        lambda sizes: (draw_latent(sizes), draw_labels(sizes), draw_missing(sizes)),
        plain_distribution_supcon,
        "temperature=0.125",
        untransformed="supcon",
    ),
    "BetaEvidenceLoss": Case(
        lambda _, **kwargs: umm.BetaEvidenceLoss(annealing_steps=4, **kwargs),
        draw_labelled_evidence,
        plain_evidence,
        "annealing_steps=4",
    ),
    "EmbeddingQueue": Case(
        lambda sizes, **kwargs: umm.EmbeddingQueue(50, WIDTH, **kwargs),
        lambda sizes: draw_embeddings(sizes)[:2],
        plain_queue,
        "size=50, dim=6",
        enqueue,
        "index_put_",
    ),
    "UncertaintyGatedFusion": Case(
        lambda sizes, **kwargs: steady(
            umm.UncertaintyGatedFusion(
                sizes.modalities, sizes.labels, LATENT, hidden_dim=9, dropout=0, **kwargs
            )
        ),
        lambda sizes: (draw_latent(sizes), draw_probs(sizes)[0], draw_missing(sizes)),
        plain_fusion,
        "combine='product'",
        fuse,
    ),
    "UncertaintyGatedFusion (concat)": Case(
        lambda sizes, **kwargs: steady(
            umm.UncertaintyGatedFusion(
                sizes.modalities,
                sizes.labels,
                LATENT,
                hidden_dim=9,
                dropout=0,
                combine="concat",
                detach_std=False,
                **kwargs,
            )
        ),
        lambda sizes: (draw_latent(sizes), draw_probs(sizes)[0], draw_missing(sizes)),
        plain_concat_fusion,
        "combine='concat'",
        fuse,
    ),
    "SoftRankOrdinalityLoss": Case(
        lambda sizes, **kwargs: umm.SoftRankOrdinalityLoss(temperature=0.5, **kwargs),
        draw_views,
        plain_ordinality,
        "temperature=0.5",
        ordered,
    ),
    "SoftRankOrdinalityLoss (pearson)": Case(
        lambda sizes, **kwargs: umm.SoftRankOrdinalityLoss(mode="pearson", **kwargs),
        draw_views,
        plain_ordinality,
        "mode='pearson'",
        ordered,
    ),
    "PlattScaling": Case(
        lambda sizes, **kwargs: umm.PlattScaling(sizes.labels, **kwargs).fit(
            torch.randn(20, sizes.labels), torch.randint(2, (20, sizes.labels))
        ),
        lambda sizes: (torch.randn(sizes.batch, sizes.labels),),
        lambda module, logits: module.scale * logits + module.shift,
        "num_labels=3",
    ),
    "LogitPool": Case(
        lambda sizes, **kwargs: umm.LogitPool(sizes.modalities, sizes.labels, **kwargs).fit(
            torch.randn(20, sizes.modalities, sizes.labels),
            torch.randint(2, (20, sizes.labels)),
        ),
        lambda sizes: (torch.randn(sizes.batch, sizes.modalities, sizes.labels),),
        lambda module, logits: (
            torch.einsum("e,beq->bq", module.weight.to(logits), logits)
            / module.weight.to(logits).sum()
        ),
        "num_experts=2, num_labels=3",
    ),
    "TemperatureScaling": Case(
        lambda sizes, **kwargs: fitted(
            umm.TemperatureScaling(sizes.labels, per_label=True, **kwargs), sizes, torch.randn
        ),
        lambda sizes: (torch.randn(sizes.batch, sizes.labels),),
        lambda module, logits: logits / module.temperature,
        "per_label=True",
    ),
    "HistogramBinning": Case(
        lambda sizes, **kwargs: fitted(
            umm.HistogramBinning(sizes.labels, num_bins=4, **kwargs), sizes
        ),
        lambda sizes: draw_probs(sizes)[:1],
        plain_histogram,
        "num_bins=4",
    ),
    "IsotonicCalibration": Case(
        lambda sizes, **kwargs: fitted(
            umm.IsotonicCalibration(sizes.labels, max_knots=9, **kwargs), sizes
        ),
        lambda sizes: draw_probs(sizes)[:1],
        plain_isotonic,
        "max_knots=9",
    ),
    "BetaCalibration": Case(
        lambda sizes, **kwargs: fitted(umm.BetaCalibration(sizes.labels, **kwargs), sizes),
        lambda sizes: draw_probs(sizes)[:1],
        lambda module, probs: (
            module.a * probs.log() - module.b * (1 - probs).log() + module.c
        ).sigmoid(),
        "num_labels=3",
    ),
    "ConformalRiskControl": Case(
        lambda sizes, **kwargs: fitted(umm.ConformalRiskControl(0.25, **kwargs), sizes),
        lambda sizes: draw_probs(sizes)[:1],
        lambda module, probs: (probs >= module.threshold) * probs,
        "risk=0.25",
        lambda module, probs: module(probs) * probs,
    ),
    "CorrectnessRankingLoss": Case(
        lambda _, **kwargs: umm.CorrectnessRankingLoss(**kwargs),
        lambda sizes: draw_views(sizes)[1:],
        plain_ranking,
        "pairs='all'",
        ranked,
    ),
    "CorrectnessRankingLoss (neighbours)": Case(
        lambda _, **kwargs: umm.CorrectnessRankingLoss(pairs="neighbours", **kwargs),
        lambda sizes: draw_views(sizes)[1:],
        plain_ranking,
        "pairs='neighbours'",
        ranked,
    ),
    "AccuracyUncertaintyLoss": Case(
        lambda _, **kwargs: umm.AccuracyUncertaintyLoss(**kwargs),
        lambda sizes: (
            draw_probs(sizes)[0],
            0.7 * draw_probs(sizes)[0],
            draw_labels(sizes),
            torch.rand(sizes.batch, sizes.labels) < 0.2,
        ),
        plain_accuracy_uncertainty,
        "^AccuracyUncertaintyLoss",
        lambda loss, probs, uncertainty, labels, unknown: loss(
            probs=probs, uncertainty=uncertainty, labels=labels, unknown=unknown
        ),
    ),
    "MonotoneConfidenceLoss": Case(
        lambda _, **kwargs: umm.MonotoneConfidenceLoss(**kwargs),
        draw_scores,
        plain_monotone,
        run=lambda loss, full, subset, mask: loss(full=full, subset=subset, mask=mask),
    ),
    "CorrectnessTracker": Case(
        lambda sizes, **kwargs: umm.CorrectnessTracker(8, sizes.labels, prior=0.125, **kwargs),
        lambda sizes: (torch.randint(8, (sizes.batch,)), draw_labels(sizes) > 0),
        plain_tracker,
        "0.125",
        track,
        "index_add_",
    ),
    "Typicality": Case(
        fitted_typicality,
        draw_features,
        plain_typicality,
        "level=0.95",
        factor_and_distances,
        float32=True,
    ),
    "Conflict": Case(
        fitted_conflict,
        draw_rows,
        plain_conflict,
        "prior=0.25",
        probabilities_and_ratios,
        float32=True,
    ),
    "GaussianFusion (learned)": Case(
        lambda sizes, **kwargs: umm.GaussianFusion(
            "generalized_product", sizes.modalities, sizes.labels, LATENT, **kwargs
        ),
        lambda sizes: (draw_latent(sizes), draw_missing(sizes)),
        plain_rule,
        "num_modalities=2",
    ),
}
for _similarity in get_args(DistanceKind):
    MODULES[f"DistributionSupConLoss ({_similarity})"] = replace(
        MODULES["DistributionSupConLoss"],
        make=lambda sizes, _similarity=_similarity, **kwargs: umm.DistributionSupConLoss(
            sizes.modalities,
            sizes.labels,
            LATENT,
            queue_size=50,
            temperature=0.125,
            similarity=_similarity,
            **kwargs,
        ),
        shown=f"similarity='{_similarity}'",
    )
for _rule in get_args(Rule):
    MODULES[f"GaussianFusion ({_rule})"] = Case(
        lambda _, _rule=_rule, **kwargs: umm.GaussianFusion(_rule, **kwargs),
        lambda sizes: (draw_latent(sizes), draw_missing(sizes)),
        plain_rule,
        f"rule='{_rule}'",
    )
for _rule in get_args(BeliefRule):
    MODULES[f"BeliefFusion ({_rule})"] = Case(
        lambda _, _rule=_rule, **kwargs: umm.BeliefFusion(_rule, **kwargs),
        lambda sizes: (draw_evidence(sizes), draw_missing(sizes)),
        plain_belief,
        f"rule='{_rule}'",
    )
for _rule in get_args(DecisionRule):
    MODULES[f"DecisionFusion ({_rule})"] = Case(
        lambda _, _rule=_rule, **kwargs: umm.DecisionFusion(_rule, **kwargs),
        draw_decisions,
        plain_decision,
        f"rule='{_rule}'",
        decide,
    )


def _function(function, draw, plain=None, untransformed=""):
    return Case(lambda _: Function(function), draw, plain, untransformed=untransformed)


FUNCTIONS = {
    "beta_evidence_loss": _function(
        functional.beta_evidence_loss, draw_labelled_evidence, plain_beta_loss
    ),
    "beta_evidence_kl": _function(
        functional.beta_evidence_kl, draw_labelled_evidence, plain_beta_kl
    ),
    "beta_expected_entropy": _function(
        functional.beta_expected_entropy,
        lambda sizes: (draw_evidence(sizes)[:, 0],),
        plain_expected_entropy,
    ),
    "beta_mutual_information": _function(
        functional.beta_mutual_information,
        lambda sizes: (draw_evidence(sizes)[:, 0],),
        plain_mutual_information,
    ),
    "DiagonalGaussian": _function(
        properties_of,
        lambda sizes: (draw_latent(sizes), draw_missing(sizes)),
        plain_properties,
    ),
    "distribution_embedding": _function(
        functional.distribution_embedding,
        lambda sizes: tuple(draw_latent(sizes)),
        lambda _, mean, std: torch.cat([F.normalize(x, dim=-1) for x in (mean, std)], -1),
    ),
    "expected_distance": _function(
        expected_distance, draw_probs, lambda _, probs, labels: 2 * probs * (1 - probs)
    ),
    "logistic_normal_probs": _function(
        functional.logistic_normal_probs,
        lambda sizes: draw_decisions(sizes)[:2],
        lambda _, mean, std: (mean / (1 + math.pi / 8 * std**2) ** 0.5).sigmoid(),
    ),
    "ordinality_divergence": _function(ordinality_divergence, draw_scores, plain_divergence),
    "prediction_distance": _function(
        prediction_distance,
        lambda sizes: (*draw_probs(sizes), draw_labels(sizes) > 0),
        lambda _, probs, labels, unknown: torch.where(labels > 0, 1 - probs, probs) * ~unknown,
    ),
    "reduced_chi2": _function(
        reduced_chi2, lambda sizes: (draw_latent(sizes), draw_missing(sizes)), plain_chi2
    ),
    "soft_rank": _function(
        soft_rank, draw_scores, lambda _, scores, __, mask: plain_rank(scores, 0.5, mask)
    ),
    "supcon_loss": _function(supcon_loss, draw_embeddings, plain_supcon, "supcon"),
}

CASES = MODULES | FUNCTIONS

# Always in float64 and of values that are looked at: neither differentiated, compiled nor exported.
MEASURES = {
    "augrc": _function(measures.augrc, lambda sizes: draw_scores(sizes)[:2]),
    "auroc": _function(measures.auroc, lambda sizes: draw_scores(sizes)[::2]),
    "brier_decomposition": _function(measures.brier_decomposition, draw_probs),
    "by_label": _function(
        lambda *given: measures.by_label(measures.augrc, *given),
        lambda sizes: (*draw_probs(sizes), draw_labels(sizes) > 0),
    ),
    "calibration_error": _function(measures.calibration_error, draw_probs),
    "coverage_at_risk": _function(
        lambda *given: measures.coverage_at_risk(*given, risk=0.5),
        lambda sizes: draw_scores(sizes)[:2],
    ),
    "evaluate": _function(
        lambda *given: torch.tensor(
            [-9 if x is None else x for x in measures.evaluate(*given, threshold=0.4).values()]
        ),
        draw_probs,
    ),
    "fpr_at_tpr": _function(measures.fpr_at_tpr, lambda sizes: draw_scores(sizes)[::2]),
    "joint_energy": _function(measures.joint_energy, lambda sizes: draw_probs(sizes)[:1]),
    "modality_attribution": _function(
        measures.modality_attribution,
        lambda sizes: (0.1 + torch.rand(sizes.batch, sizes.modalities), draw_missing(sizes)),
    ),
    "predictive_entropy": _function(
        measures.predictive_entropy, lambda sizes: draw_probs(sizes)[:1]
    ),
    "risk_at_coverage": _function(
        lambda *given: measures.risk_at_coverage(*given, coverage=0.5),
        lambda sizes: draw_scores(sizes)[:2],
    ),
    "risk_coverage": _function(measures.risk_coverage, lambda sizes: draw_scores(sizes)[:2]),
    "sample_jaccard": _function(measures.sample_jaccard, draw_probs),
    "selective_f1": _function(
        lambda probs, labels: measures.selective_f1(probs.sum(1), probs, labels, coverage=0.5),
        draw_probs,
    ),
    "smooth_calibration_error": _function(measures.smooth_calibration_error, draw_probs),
    "spearman": _function(measures.spearman, lambda sizes: draw_scores(sizes)[:2]),
}


def in_turn(cases):
    """Names for parametrised tests: of a class with several cases all but the first are long."""
    seen, chosen = set(), []
    for name in cases:
        kind = name.split()[0]
        chosen.append(pytest.param(name, marks=[pytest.mark.long] if kind in seen else []))
        seen.add(kind)
    return chosen
