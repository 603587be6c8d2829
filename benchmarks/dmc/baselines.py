"""What a compressed cache is held against, at equal memory: eviction as text streams by, and fewer key-value heads.

An eviction policy is a function from what attention has seen to a score per token; when a head holds more than its
budget, the token with the least score is dropped for good. Softmax runs over what is held, so later scores feel earlier
drops, as they would in use. `pooled` is the start of GQA up-training: the key and value heads of a group become their
mean (arXiv 2305.13245).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, LlamaForCausalLM, PreTrainedModel


@dataclass
class Seen:
    """What a policy may look at after token t. weights: attention of token t `[batch, heads, seq]`; sums: of all tokens
    so far. t, budget: numbers."""

    weights: Tensor
    sums: Tensor
    t: int
    budget: int


Policy = Callable[[Seen], Tensor]
POLICIES: dict[str, Policy] = {}


def policy(name: str) -> Callable[[Policy], Policy]:
    """Register a policy: what it returns is `[batch, heads, seq]`, and the least is dropped."""

    def add(function: Policy) -> Policy:
        POLICIES[name] = function
        return function

    return add


@policy("h2o")
def h2o(seen: Seen) -> Tensor:
    """Heavy hitters: most attention so far; half of the budget is for the newest (arXiv 2306.14048)."""
    return seen.sums.clone().index_fill(-1, _newest(seen, seen.budget // 2), torch.inf)


@policy("tova")
def tova(seen: Seen) -> Tensor:
    """Least attention from the newest token, all heads of a layer together (arXiv 2401.06104)."""
    return seen.weights.mean(1, keepdim=True).expand_as(seen.weights)


@policy("streaming")
def streaming(seen: Seen) -> Tensor:
    """Four first tokens and a window (arXiv 2309.17453)."""
    age = torch.arange(seen.weights.shape[-1], dtype=seen.weights.dtype).expand_as(seen.weights).clone()
    age[..., :4] = torch.inf
    return age


def _newest(seen: Seen, count: int) -> Tensor:
    return torch.arange(max(0, seen.t + 1 - count), seen.t + 1)


@contextmanager
def evicting(model: PreTrainedModel, name: str, budget: int) -> Iterator[None]:
    """Within this context every head of the model holds `budget` tokens at most."""

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **_: Any
    ) -> tuple[Tensor, None]:
        return stream(query, key, value, scaling, POLICIES[name], budget), None

    AttentionInterface.register("evicting", attention)
    before = model.config._attn_implementation
    model.config._attn_implementation = "evicting"
    try:
        yield
    finally:
        model.config._attn_implementation = before


def stream(query: Tensor, key: Tensor, value: Tensor, scaling: float, policy: Policy, budget: int) -> Tensor:
    """Attention token by token `[batch, seq, query heads, dim]`, dropping what the policy gives up."""
    batch, heads, seq, dim = key.shape
    query = query.view(batch, heads, -1, seq, dim)
    held = torch.zeros(batch, heads, seq, dtype=torch.bool)
    sums = torch.zeros(batch, heads, seq, dtype=key.dtype)
    out = torch.empty_like(query)
    for t in range(seq):
        held[..., t] = True
        scores = (query[..., t, :] @ key[..., : t + 1, :].mT) * scaling
        weights = scores.masked_fill(~held[:, :, None, : t + 1], -torch.inf).softmax(-1)
        out[..., t, :] = weights @ value[..., : t + 1, :]
        of_head = weights.mean(2)
        sums[..., : t + 1] += of_head
        if t + 1 > budget:
            seen = Seen(of_head, sums[..., : t + 1], t, budget)
            least = policy(seen).masked_fill(~held[..., : t + 1], torch.inf)
            least[..., t] = torch.inf  # the newest token stays
            held.scatter_(-1, least.argmin(-1, keepdim=True), False)
    return out.flatten(1, 2).transpose(1, 2)


def pooled(model: LlamaForCausalLM, heads: int) -> LlamaForCausalLM:
    """The model with `heads` key-value heads, each the mean of a group."""
    config = type(model.config).from_dict(model.config.to_dict() | {"num_key_value_heads": heads})
    small, weights = LlamaForCausalLM(config), model.state_dict()
    for name in weights:
        if "k_proj" in name or "v_proj" in name:
            groups = weights[name].view(heads, -1, config.head_dim, weights[name].shape[-1])
            weights[name] = groups.mean(1).flatten(0, 1)
    small.load_state_dict(weights)
    return small
