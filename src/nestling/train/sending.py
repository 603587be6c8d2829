"""Weights that only the first process has: sent to the others part by part, as the parts are cut.

`hub.load_once` gives the first of several processes a model, and the others the same model without weights, on torch's
meta device. Each layer is sent whole just before it is sharded and freed after, so that no other process ever holds
more than its part of the model and one layer. Knows nothing of what a part is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from nestling import processes


def home(model: PreTrainedModel) -> torch.device:
    """Where a model is; one without weights stands for one that is on the CPU of the first process."""
    return torch.device("cpu") if model.device.type == "meta" else model.device


def some_lack_weights(models: Sequence[PreTrainedModel]) -> bool:
    """Whether any process holds one of the models without its weights; the same answer for all."""
    lacking = any(model.device.type == "meta" for model in models)
    return bool(processes.summed(torch.tensor(float(lacking))))


@torch.no_grad()
def send(module: nn.Module) -> None:
    """Let all processes have the first one's weights and buffers of a module, but for what is cut already.

    A tensor under several names is sent once, and stays one.
    """
    arrived: dict[int, torch.Tensor] = {}
    for owner in module.modules():
        for kept in (owner._parameters, owner._buffers):
            for name, tensor in kept.items():
                if tensor is None or isinstance(tensor, DTensor):
                    continue
                if id(tensor) not in arrived:
                    arrived[id(tensor)] = _broadcast(tensor)
                kept[name] = arrived[id(tensor)]  # type: ignore[assignment]


def _broadcast(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.device.type != "meta":
        dist.broadcast(tensor.detach(), 0)
        return tensor
    whole = torch.empty_like(tensor, device="cpu", requires_grad=False)
    dist.broadcast(whole, 0)
    return nn.Parameter(whole, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else whole
