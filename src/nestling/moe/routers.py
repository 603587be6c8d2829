"""What routers did in one call, and what is asked of them: balance losses, z-loss, capacity, and their health.

Scales are Megatron's: with coefficient c the balance loss is c when every expert gets as many tokens, for any number of
experts per token, and is taken layer by layer (pooled over layers, two collapsed ones can look balanced). f_i is the
part of the chosen slots that went to expert i, P_i the mean probability of expert i over all experts:

    balance = N sum_i f_i P_i          z = mean (log sum_i exp l_i)^2          (arXiv 2101.03961; 2202.08906)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Call:
    """One router's call.

    logits: `[tokens, experts]`, float32. index: chosen experts `[tokens, k]`. real: 1 for tokens, 0 for padding
    `[tokens]`. rows: sequences in the batch. dropped: slots `[tokens, k]` above an expert's capacity. sigmoid: whether
    the router's scores are sigmoids of the logits, not their softmax.
    """

    logits: Tensor
    index: Tensor
    real: Tensor
    rows: int = 1
    dropped: Tensor | None = None
    sigmoid: bool = False

    def chosen(self) -> Tensor:
        """How often each token chose each expert, 0 or 1: `[tokens, experts]`."""
        hits = torch.zeros(self.logits.shape, device=self.logits.device).scatter_(-1, self.index, 1.0)
        return hits * self.real[:, None]

    def probabilities(self) -> Tensor:
        """The router's scores, normalized over all experts `[tokens, experts]`, zero at padding."""
        if self.sigmoid:
            scores = torch.sigmoid(self.logits.float())
            return scores / scores.sum(-1, keepdim=True) * self.real[:, None]
        return F.softmax(self.logits.float(), dim=-1) * self.real[:, None]

    def counts(self) -> Tensor:
        """Slots that each expert got `[experts]`."""
        return self.chosen().sum(0)


def balance_loss(call: Call, counts: Tensor | None = None) -> Tensor:
    """N sum_i f_i P_i over the whole call. counts: slots of each expert over more than this call, for f (global)."""
    counts = call.counts() if counts is None else counts
    share = counts / counts.sum().clamp_min(1)
    mean = call.probabilities().sum(0) / call.real.sum().clamp_min(1)
    return len(share) * (share.detach() * mean).sum()


def sequence_balance_loss(call: Call) -> Tensor:
    """The mean over sequences of each one's own balance loss (DeepSeek-V3, arXiv 2412.19437, eq. 17)."""
    experts = call.logits.shape[-1]
    chosen = call.chosen().view(call.rows, -1, experts).sum(1)
    probabilities = call.probabilities().view(call.rows, -1, experts).sum(1)
    tokens = call.real.view(call.rows, -1).sum(1, keepdim=True)
    share = chosen / chosen.sum(1, keepdim=True).clamp_min(1)
    losses = experts * (share.detach() * probabilities / tokens.clamp_min(1)).sum(1)
    some = tokens[:, 0] > 0
    return losses[some].mean() if some.any() else losses.sum()


def z_loss(call: Call) -> Tensor:
    """Mean squared log-partition of the real tokens: keeps logits small."""
    return (torch.logsumexp(call.logits.float(), -1).square() * call.real).sum() / call.real.sum().clamp_min(1)


def over_capacity(index: Tensor, experts: int, factor: float) -> Tensor:
    """Slots `[tokens, k]` that come after an expert is full, which is at tokens * k / experts * factor of them.

    Earlier tokens go first, so that within a sequence no token depends on a later one.
    """
    limit = -(-index.numel() * factor // experts)
    hits = F.one_hot(index.flatten(), experts)
    place = (hits.cumsum(0) * hits).sum(-1)
    return (place > limit).view_as(index)


def health(counts: Sequence[Tensor]) -> dict[str, float]:
    """From the slots of each expert `[experts]`, layer by layer: how even the load is, as means over layers.

    max_load: busiest expert over the mean (1 is even). entropy: of the load, over that of an even one. dead: part of
    the experts that got nothing.
    """
    layers = [_health(count.double()) for count in counts]
    return {name: sum(layer[name] for layer in layers) / len(layers) for name in layers[0]}


def _health(counts: Tensor) -> dict[str, float]:
    share, experts = counts / counts.sum().clamp_min(1), len(counts)
    entropy = -(share * share.clamp_min(1e-30).log()).sum().item()
    return {
        "max_load": share.max().item() * experts,
        "entropy": entropy / math.log(experts) if experts > 1 else 1.0,
        "dead": (counts == 0).double().mean().item(),
    }
