"""Neighbouring layers that are removed together: which block of a given length is missed least.

Removing the layers of lowest importance one by one leaves holes all over the model; P2 of Minitron (arXiv 2408.11796,
section 4.3) finds that for deep cuts a contiguous block does better on tasks although its loss is worse. A block
i .. i+n-1 is scored by what it does to the stream, 1 - E[cos(X_i, X_{i+n})] (ShortGPT, arXiv 2403.03853; the angle
instead of the cosine: Gromov et al., arXiv 2403.17887), by any damage of `layers`, or by a task of the user's. The
last layer stays unless the caller says otherwise: both papers find it matters most.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import ExitStack

import torch
from torch import Tensor
from transformers import PreTrainedModel

from nestling import processes
from nestling.anatomy import Anatomy, decoder, logits_head
from nestling.anatomy.bypass import evaluating
from nestling.errors import NestlingError
from nestling.ranking.layers import DAMAGES, Task, few_rows, streams
from nestling.ranking.sweep import Batch

STREAM = ("block_influence", "angular_distance")


def blocks(
    model: PreTrainedModel,
    batches: Iterable[Batch],
    length: int,
    layers: str | Task = "block_influence",
    keep_last: bool = True,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """The harm of removing `length` neighbouring layers, by where they begin `[starts]`.

    layers: `block_influence`, `angular_distance`, `perplexity`, `kl`, `output_error`, or a function from a model to a
    score that is better when higher. progress: told of each block done. Raises `NestlingError` for anything else, and
    for a length that the model does not have.
    """
    anatomy = Anatomy.of(model)
    starts = anatomy.num_layers - length + (0 if keep_last else 1)
    if length < 1 or starts < 1:
        raise NestlingError(
            f"layer_block {length} is not possible in a model with {anatomy.num_layers} layers: give 1 to "
            f"{anatomy.num_layers - 1}"
        )
    if isinstance(layers, str) and layers not in (*STREAM, *DAMAGES):
        raise NestlingError(f"'{layers}' is not a metric of blocks: choose from {', '.join((*STREAM, *DAMAGES))}")
    with evaluating(model):
        if layers in STREAM:
            return _stream_changes(model, anatomy, batches, length, str(layers))[:starts]
        kept, harms = list(batches), []
        for start in range(starts):
            harms.append(harm_without(model, kept, range(start, start + length), layers))
            if progress is not None:
                progress(1)
    return torch.tensor(harms, dtype=torch.float64)


def block_scores(harms: Tensor, length: int, single: Tensor) -> Tensor:
    """Scores `[num_layers]` by which the best block goes first, its deepest layers first; then the rest by `single`.

    harms: of each block `[starts]`. single: scores of layers one by one `[num_layers]`.
    """
    start = int(harms.argmin())
    block = list(range(start + length - 1, start - 1, -1))
    rest = [layer for layer in single.argsort(stable=True).tolist() if layer not in block]
    scores = torch.empty(len(single), dtype=torch.float64)
    scores[block + rest] = torch.arange(len(single), dtype=torch.float64)
    return scores


@torch.no_grad()
def harm_without(model: PreTrainedModel, batches: Iterable[Batch], removed: Iterable[int], layers: str | Task) -> float:
    """What the absence of several layers does: a damage per token, or what a task's score loses."""
    anatomy, removed = Anatomy.of(model), list(removed)
    if not isinstance(layers, str):
        whole = layers(model)
        with _removed(model, anatomy, removed):
            return whole - layers(model)
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    for batch in processes.share(batches):
        for part in few_rows(batch, model.device):
            ids = part["input_ids"]
            real = part.get("attention_mask", torch.ones_like(ids)).bool()
            whole = decoder(model)(**part, use_cache=False).last_hidden_state
            measure, counted = DAMAGES[layers](whole, ids, real, logits_head(model))
            with _removed(model, anatomy, removed):
                total += measure(decoder(model)(**part, use_cache=False).last_hidden_state).double().cpu()
            tokens += counted
    return float(processes.summed(total)) / max(1, int(processes.summed(torch.tensor(tokens))))


def _removed(model: PreTrainedModel, anatomy: Anatomy, removed: Iterable[int]) -> ExitStack:
    stack = ExitStack()
    for layer in removed:
        stack.enter_context(anatomy.bypassed(anatomy.layers(model)[layer]))
    return stack


def _stream_changes(
    model: PreTrainedModel, anatomy: Anatomy, batches: Iterable[Batch], length: int, how: str
) -> Tensor:
    """1 - cos(X_i, X_{i+n}), or the angle over pi, mean over real tokens, for each i."""
    totals = torch.zeros(anatomy.num_layers - length + 1, dtype=torch.float64)
    tokens = 0
    for batch in processes.share(batches):
        for part in few_rows(batch, model.device):
            real = part.get("attention_mask", torch.ones_like(part["input_ids"])).bool()
            seen = [stream[real].float() for stream in streams(model, anatomy, part, set(), with_last=True)]
            for start in range(len(totals)):
                cosine = torch.cosine_similarity(seen[start], seen[start + length], dim=-1)
                change = 1 - cosine if how == "block_influence" else cosine.clamp(-1, 1).arccos() / math.pi
                totals[start] += change.sum(dtype=torch.float64).cpu()
            tokens += int(real.sum())
    return processes.summed(totals) / max(1, int(processes.summed(torch.tensor(tokens))))
