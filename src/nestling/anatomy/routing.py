"""Routers, as transformers computes them: from `[tokens, hidden]` to (logits, weights, index of the chosen experts).

Here one is narrowed to some of its experts, which is what a mask, a leave-one-out score and a pruned model have in
common: an expert that is not there cannot be chosen, and the others share its probability. Every tensor of a router has
the experts as its first dimension. Knows transformers' router modules, no architecture.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import LongTensor, Tensor, nn

# Added to scores for the choice alone (DeepSeek-V3, arXiv 2412.19437): minus infinity there removes an expert, also
# from groups, whose number of experts is written into the module.
BIAS = "e_score_correction_bias"

Routing = tuple[Tensor, Tensor, Tensor]


def narrowed(router: nn.Module, kept: LongTensor) -> Callable[..., Routing]:
    """The router over the `kept` experts alone; its output numbers experts as before.

    Returns a function from hidden states `[tokens, hidden]` to logits `[tokens, experts]` (minus infinity for experts
    that are not kept), weights and index `[tokens, k]`. Gradients reach the router's parameters.
    """

    def route(hidden: Tensor, *args: Any) -> Routing:
        device = hidden.device
        index = kept.to(device)
        gone = torch.ones(_experts(router), dtype=torch.bool, device=device).index_fill(0, index, False)
        narrow = _without(router, gone) if hasattr(router, BIAS) else _cut(router, index)
        logits, weights, chosen = narrow(hidden, *args)
        if hasattr(router, BIAS):
            return logits.masked_fill(gone, -torch.inf), weights, chosen
        wide = logits.new_full((*logits.shape[:-1], len(gone)), -torch.inf)
        return wide.index_copy(-1, index, logits), weights, index[chosen]

    return route


def _experts(router: nn.Module) -> int:
    return len(next(iter(router.parameters())))


def _copied(router: nn.Module, tensors: dict[str, Tensor], **attributes: Any) -> nn.Module:
    narrow = copy.copy(router)
    hooks: dict[str, Any] = {name: {} for name in ("_forward_hooks", "_forward_pre_hooks", "_parameters", "_buffers")}
    narrow.__dict__ = dict(router.__dict__) | hooks | tensors | attributes
    return narrow


def _tensors(router: nn.Module) -> dict[str, Tensor]:
    return {name: getattr(router, name) for name in (*router._parameters, *router._buffers)}


def _cut(router: nn.Module, index: Tensor) -> nn.Module:
    tensors = {name: tensor[index] for name, tensor in _tensors(router).items() if tensor is not None}
    return _copied(router, tensors, num_experts=len(index))


def _without(router: nn.Module, gone: Tensor) -> nn.Module:
    tensors = _tensors(router)
    return _copied(router, tensors | {BIAS: tensors[BIAS].masked_fill(gone, -torch.inf)})
