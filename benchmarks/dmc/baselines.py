"""What a compressed cache is held against, at equal memory: eviction as text streams by, and fewer key-value heads.

An eviction policy is a function from what attention has seen to a score per token; when a head holds more than its
budget, the token with the least score is dropped for good. Softmax runs over what is held, so later scores feel earlier
drops, as they would in use. Criteria that were published for a prompt that is cut once (SnapKV, Expected Attention) are
asked after every token here, by their published formulas. `pooled` is the start of GQA up-training: the key and value
heads of a group become their mean (arXiv 2305.13245).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, LlamaForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

WINDOW = 16  # newest queries that SnapKV asks
SMOOTH = 5  # neighbours over which it takes the mean
SINKS = 4  # first tokens that StreamingLLM and Expected Attention keep
FUTURE = 512  # positions over which Expected Attention takes the mean


@dataclass
class Seen:
    """What a policy may look at after token t, all of the tokens so far (seq).

    weights: attention of token t `[batch, heads, seq]`, mean over a group's queries; sums: of all tokens so far;
    recent: of the newest `WINDOW` tokens, in any order `[batch, heads, WINDOW, seq]`. held: which tokens are left.
    keys, values: `[batch, heads, seq, dim]`, keys rotated. mean, second: first and second moments of the queries, not
    rotated and without the first ones `[batch, heads, group, 1 or dim, dim]`. ahead: the mean rotation of the next
    `FUTURE` positions `[dim, dim]`, for row vectors. t, budget: numbers.
    """

    weights: Tensor
    sums: Tensor
    recent: Tensor
    held: Tensor
    keys: Tensor
    values: Tensor
    mean: Tensor
    second: Tensor
    ahead: Tensor
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
    age[..., :SINKS] = torch.inf
    return age


@policy("snapkv")
def snapkv(seen: Seen) -> Tensor:
    """Attention of the newest queries, smoothed over neighbours; those tokens themselves stay (arXiv 2404.14469)."""
    smooth = F.avg_pool1d(seen.recent.mean(2), SMOOTH, stride=1, padding=SMOOTH // 2)
    return smooth.index_fill(-1, _newest(seen, WINDOW), torch.inf)


@policy("keydiff")
def keydiff(seen: Seen) -> Tensor:
    """Keys that are least like the mean direction of those that are held stay (arXiv 2504.15364)."""
    directions = F.normalize(seen.keys, dim=-1)
    held = seen.held.unsqueeze(-1).to(directions.dtype)
    anchor = (directions * held).sum(2, keepdim=True) / held.sum(2, keepdim=True)
    return -F.cosine_similarity(seen.keys, anchor, dim=-1)


@policy("expected")
def expected(seen: Seen) -> Tensor:
    """Attention that normally distributed queries of the next positions would give, times the value's norm; the first
    tokens stay (Expected Attention, arXiv 2510.00636)."""
    dim = seen.keys.shape[-1]
    spread = seen.ahead.mT @ (seen.second - seen.mean.mT @ seen.mean) @ seen.ahead
    mean = seen.mean @ seen.ahead
    keys = seen.keys.unsqueeze(2)
    scores = (keys * mean).sum(-1) / dim**0.5 + ((keys @ spread) * keys).sum(-1) / (2 * dim)
    weights = scores.masked_fill(~seen.held.unsqueeze(2), -torch.inf).softmax(-1).mean(2)
    return (weights * seen.values.norm(dim=-1)).index_fill(-1, torch.arange(SINKS), torch.inf)


def _newest(seen: Seen, count: int) -> Tensor:
    return torch.arange(max(0, seen.t + 1 - count), seen.t + 1)


@contextmanager
def evicting(model: PreTrainedModel, name: str, budget: int) -> Iterator[None]:
    """Within this context every head of a Llama holds `budget` tokens at most."""

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **_: Any
    ) -> tuple[Tensor, None]:
        turns = rotations(model, query.shape[2] + FUTURE).to(query.dtype)
        return stream(query, key, value, scaling, POLICIES[name], budget, turns), None

    AttentionInterface.register("evicting", attention)
    before = model.config._attn_implementation
    model.config._attn_implementation = "evicting"
    try:
        yield
    finally:
        model.config._attn_implementation = before


def rotations(model: PreTrainedModel, count: int) -> Tensor:
    """What turns a row vector to each of the first positions `[count, dim, dim]`."""
    rotary: Any = model.get_submodule("model.rotary_emb")
    cos, sin = rotary(torch.zeros(1), torch.arange(count).unsqueeze(0))
    axes = torch.eye(cos.shape[-1]).expand(1, count, -1, -1).transpose(1, 2)  # one "head" for each channel
    return apply_rotary_pos_emb(axes, axes, cos, sin)[0][0].transpose(0, 1)


def stream(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, policy: Policy, budget: int, turns: Tensor
) -> Tensor:
    """Attention token by token `[batch, seq, query heads, dim]`, dropping what the policy gives up.

    turns: rotation of every position and of `FUTURE` more `[seq + FUTURE, dim, dim]`, for row vectors.
    """
    batch, heads, seq, dim = key.shape
    query = query.view(batch, heads, -1, seq, dim)
    flat = (query.unsqueeze(-2) @ turns[:seq].mT).squeeze(-2)
    until = F.pad(turns, (0, 0, 0, 0, 1, 0)).cumsum(0)
    first, second = torch.zeros_like(flat[..., :1, :]), flat.new_zeros(*flat.shape[:3], dim, dim)
    held = torch.zeros(batch, heads, seq, dtype=torch.bool)
    sums = torch.zeros(batch, heads, seq, dtype=key.dtype)
    recent = torch.zeros(batch, heads, WINDOW, seq, dtype=key.dtype)
    out = torch.empty_like(query)
    for t in range(seq):
        held[..., t] = True
        scores = (query[..., t, :] @ key[..., : t + 1, :].mT) * scaling
        weights = scores.masked_fill(~held[:, :, None, : t + 1], -torch.inf).softmax(-1)
        out[..., t, :] = weights @ value[..., : t + 1, :]
        of_head = weights.mean(2)
        sums[..., : t + 1] += of_head
        recent[:, :, t % WINDOW, : t + 1] = of_head
        if t >= SINKS:
            last = flat[..., t : t + 1, :]
            first, second = first + last, second + last.mT @ last
        if t + 1 > budget:
            parts = (states[..., : t + 1] for states in (sums, recent, held))
            moments = (moment / max(1, t + 1 - SINKS) for moment in (first, second))
            ahead = (until[t + 1 + FUTURE] - until[t + 1]) / FUTURE
            least = policy(
                Seen(of_head, *parts, key[..., : t + 1, :], value[..., : t + 1, :], *moments, ahead, t, budget)
            )
            least = least.masked_fill(~held[..., : t + 1], torch.inf)
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
