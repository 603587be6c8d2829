"""The script that Nestling is held against: Minitron as one writes it down from the paper, for Llama models alone.

Neurons by mean absolute activation over all tokens, layers by block influence, one-shot slices, and distillation by
forward KL on whole logits with AdamW and a cosine. Uses nothing of Nestling.
"""

from __future__ import annotations

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel


@torch.no_grad()
def cut_neurons(model: PreTrainedModel, rows: Tensor, keep: int) -> PreTrainedModel:
    """The model with the `keep` neurons per layer of largest mean |activation| on rows `[rows, seq]`."""
    scores = [torch.zeros(model.config.intermediate_size) for _ in model.model.layers]

    def add(index: int, activation: Tensor) -> None:
        scores[index] += activation.abs().sum((0, 1))

    hooks = [
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, args, i=i: add(i, args[0]))
        for i, layer in enumerate(model.model.layers)
    ]
    _read(model, rows)
    for hook in hooks:
        hook.remove()
    child = copy.deepcopy(model)
    for layer, score in zip(child.model.layers, scores, strict=True):
        kept = score.topk(keep).indices.sort().values
        for part in (layer.mlp.gate_proj, layer.mlp.up_proj):
            part.weight = nn.Parameter(part.weight[kept].clone())
        layer.mlp.down_proj.weight = nn.Parameter(layer.mlp.down_proj.weight[:, kept].clone())
    child.config.intermediate_size = keep
    return child


@torch.no_grad()
def cut_layers(model: PreTrainedModel, rows: Tensor, count: int) -> PreTrainedModel:
    """The model without the `count` layers of lowest block influence, 1 - cos(input, output), on rows `[rows, seq]`."""
    layers = model.model.layers
    influence = [0.0] * len(layers)

    def compare(index: int, before: Tensor, after: Tensor) -> None:
        influence[index] += (1 - F.cosine_similarity(before, after, dim=-1)).sum().item()

    hooks = [
        layer.register_forward_hook(
            lambda _, args, output, i=i: compare(i, args[0], output[0] if isinstance(output, tuple) else output)
        )
        for i, layer in enumerate(layers)
    ]
    _read(model, rows)
    for hook in hooks:
        hook.remove()
    gone = sorted(range(len(layers)), key=lambda index: influence[index])[:count]
    child = copy.deepcopy(model)
    child.model.layers = nn.ModuleList(layer for i, layer in enumerate(child.model.layers) if i not in gone)
    for index, layer in enumerate(child.model.layers):
        layer.self_attn.layer_idx = index
    child.config.num_hidden_layers = len(child.model.layers)
    return child


def distill(
    student: PreTrainedModel, teacher: PreTrainedModel, rows: Tensor, batch: int, rate: float, plain_loss: bool = False
) -> PreTrainedModel:
    """Train the student on rows `[rows, seq]`, each once, `batch` per step, under a cosine from `rate` to zero.

    plain_loss: learn from the text (cross-entropy) instead of the teacher.
    """
    steps = len(rows) // batch
    student.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(student.parameters(), lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: 0.5 * (1 + math.cos(math.pi * s / steps)))
    for step in range(steps):
        for row in rows[step * batch : (step + 1) * batch].split(1):
            logits = student(row, use_cache=False).logits[0, :-1]
            if plain_loss:
                loss = F.cross_entropy(logits, row[0, 1:])
            else:
                with torch.no_grad():
                    target = F.log_softmax(teacher(row, use_cache=False).logits[0, :-1], -1)
                loss = F.kl_div(F.log_softmax(logits, -1), target, log_target=True, reduction="batchmean")
            (loss / batch).backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
    return student.eval()


def _read(model: PreTrainedModel, rows: Tensor) -> None:
    for part in rows.split(4):
        model.model(part, use_cache=False)
