"""Layers by what is lost when they are left out.

Each layer is taken out in turn and the model compared with itself: by the loss on the text (`perplexity`), by the KL
divergence of its next-token distribution (`kl`), or by the normalized error of its last hidden state
(`output_error`). A model is only run from the layer that is missing, on the stored stream before it, so a round costs
half a forward pass per layer. Greedy removal repeats this on what is left. Papers: arXiv 2407.14679, section 2.2
(perplexity), 2504.11409 (normalized error, KL).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from nestling import processes
from nestling.anatomy import Anatomy, decoder, logits_head
from nestling.anatomy.bypass import evaluating
from nestling.errors import NestlingError
from nestling.ranking.sweep import Batch

Progress = Callable[[int], None]
Task = Callable[[PreTrainedModel], float]  # a score that is better when higher
CHUNK = 512

Head = Callable[[Tensor], Tensor]
# From the whole model's hidden states [batch, seq, hidden], the ids [batch, seq], what of them is no padding
# [batch, seq] and the head to a function that gives the damage of a cut model's hidden states, summed over the tokens
# that count, and how many those are.
Damage = Callable[[Tensor, Tensor, Tensor, Head], tuple[Callable[[Tensor], Tensor], int]]


def _loss(whole: Tensor, ids: Tensor, real: Tensor, head: Head) -> tuple[Callable[[Tensor], Tensor], int]:
    counts = real[:, 1:] & real[:, :-1]  # a token that is predicted from another one
    targets = ids[:, 1:][counts]
    return lambda cut: F.cross_entropy(head(cut[:, :-1][counts]).float(), targets, reduction="sum"), len(targets)


def _kl(whole: Tensor, ids: Tensor, real: Tensor, head: Head) -> tuple[Callable[[Tensor], Tensor], int]:
    target = F.log_softmax(head(whole[real]).float(), dim=-1)
    return (
        lambda cut: F.kl_div(F.log_softmax(head(cut[real]).float(), -1), target, log_target=True, reduction="sum"),
        len(target),
    )


def _output_error(whole: Tensor, ids: Tensor, real: Tensor, head: Head) -> tuple[Callable[[Tensor], Tensor], int]:
    kept = whole[real].float()
    size = kept.square().sum(-1)
    return lambda cut: ((cut[real].float() - kept).square().sum(-1) / size).sum(), len(kept)


DAMAGES: dict[str, Damage] = {"perplexity": _loss, "kl": _kl, "output_error": _output_error}


def leave_one_out(
    model: PreTrainedModel,
    batches: Iterable[Batch],
    damage: str | Task = "kl",
    removed: Iterable[int] = (),
    progress: Progress | None = None,
) -> Tensor:
    """What each layer's absence does, mean over tokens `[num_layers]`; infinite for those `removed` already.

    damage: `perplexity` (loss, over predicted tokens), `kl`, `output_error`, or a function from a model to a score
    that is better when higher, such as accuracy on a task. Padding is left out. progress: told of each layer done in
    each batch.
    """
    anatomy, gone = Anatomy.of(model), set(removed)
    totals = torch.full((anatomy.num_layers,), float("inf"), dtype=torch.float64)
    candidates = [layer for layer in range(anatomy.num_layers) if layer not in gone]
    if not isinstance(damage, str):
        totals[candidates] = _task_losses(model, anatomy, damage, candidates, gone, progress)
        return totals
    if damage not in DAMAGES:
        raise NestlingError(f"'{damage}' is not a layer metric: choose from {', '.join(DAMAGES)}")
    totals[candidates] = 0
    tokens = 0
    with evaluating(model):
        for batch in processes.share(batches):
            for part in few_rows(batch, model.device):
                found, counted = _damages(model, anatomy, part, DAMAGES[damage], candidates, gone, progress)
                totals[candidates] += found
                tokens += counted
    return processes.summed(totals) / max(1, int(processes.summed(torch.tensor(tokens))))


def greedy(
    model: PreTrainedModel,
    batches: Iterable[Batch],
    damage: str | Task = "kl",
    rounds: int | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Scores from removing the least harmful layer again and again `[num_layers]`, higher for those that last longer.

    rounds: layers to remove this way; the rest follow by their damage in the last round. All but one unless given.
    """
    kept = list(batches)
    anatomy = Anatomy.of(model)
    order: list[int] = []
    damages = leave_one_out(model, kept, damage, order, progress)
    for _ in range(min(rounds or anatomy.num_layers - 1, anatomy.num_layers - 1)):
        order.append(int(damages.argmin()))
        if len(order) < (rounds or anatomy.num_layers - 1):
            damages = leave_one_out(model, kept, damage, order, progress)
    rest = [layer for layer in damages.argsort().tolist() if layer not in order]
    scores = torch.empty(anatomy.num_layers, dtype=torch.float64)
    scores[order + rest] = torch.arange(anatomy.num_layers, dtype=torch.float64)
    return scores


def _task_losses(
    model: PreTrainedModel,
    anatomy: Anatomy,
    task: Task,
    candidates: list[int],
    gone: set[int],
    progress: Progress | None,
) -> Tensor:
    """What the task's score loses without each candidate, beside those that are gone."""
    layers, whole, losses = anatomy.layers(model), task(model), []
    for layer in candidates:
        with ExitStack() as stack:
            for other in (*gone, layer):
                stack.enter_context(anatomy.bypassed(layers[other]))
            losses.append(whole - task(model))
        if progress is not None:
            progress(1)
    return torch.tensor(losses, dtype=torch.float64)


def few_rows(batch: Batch, device: torch.device) -> Iterator[dict[str, Tensor]]:
    """A batch in parts of about `CHUNK` tokens, rows of padding alone left out, and a mask that hides nothing."""
    ids = batch["input_ids"].to(device)
    mask = batch["attention_mask"].to(device) if "attention_mask" in batch else torch.ones_like(ids)
    some = mask.any(-1)
    step = max(1, CHUNK // ids.shape[1])
    for rows, real in zip(ids[some].split(step), mask[some].split(step), strict=True):
        if len(rows):
            yield {"input_ids": rows} if real.all() else {"input_ids": rows, "attention_mask": real}


def _damages(
    model: PreTrainedModel,
    anatomy: Anatomy,
    part: dict[str, Tensor],
    damage: Damage,
    candidates: list[int],
    gone: set[int],
    progress: Progress | None,
) -> tuple[Tensor, int]:
    """The damage of leaving out each candidate, summed over the tokens of one piece of text, and their number."""
    layers, ids = anatomy.layers(model), part["input_ids"]
    real = part.get("attention_mask", torch.ones_like(ids)).bool()
    whole = decoder(model)(**part, use_cache=False).last_hidden_state
    measure, counted = damage(whole, ids, real, logits_head(model))
    entering = streams(model, anatomy, part, gone)
    result = []
    for layer in candidates:
        with ExitStack() as stack:
            for other in gone | set(range(layer)):
                stack.enter_context(anatomy.bypassed(layers[other]))
            stack.enter_context(anatomy.bypassed(layers[layer], _always(entering[layer])))
            cut = decoder(model)(**part, use_cache=False).last_hidden_state
        result.append(measure(cut).double().cpu())
        if progress is not None:
            progress(1)
    return torch.stack(result), counted


def streams(
    model: PreTrainedModel, anatomy: Anatomy, part: dict[str, Tensor], gone: set[int], with_last: bool = False
) -> list[Tensor]:
    """What enters each layer `[batch, seq, hidden]` when those in `gone` are left out, and what leaves the last."""
    streams: list[Tensor] = []
    with ExitStack() as stack:
        for index, layer in enumerate(anatomy.layers(model)):
            stack.callback(layer.register_forward_pre_hook(_store(streams), with_kwargs=True).remove)
            if index in gone:
                stack.enter_context(anatomy.bypassed(layer))
        if with_last:
            stack.callback(anatomy.layers(model)[-1].register_forward_hook(_store_output(streams)).remove)
        decoder(model)(**part, use_cache=False)
    return streams


def _always(stream: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda hidden: stream


def _store(streams: list[Tensor]) -> Callable[..., None]:
    def hook(module: object, args: tuple, kwargs: Mapping[str, Tensor]) -> None:
        streams.append(args[0] if args else kwargs["hidden_states"])

    return hook


def _store_output(streams: list[Tensor]) -> Callable[..., None]:
    def hook(module: object, args: tuple, output: Tensor | tuple[Tensor, ...]) -> None:
        streams.append(output[0] if isinstance(output, tuple) else output)

    return hook
