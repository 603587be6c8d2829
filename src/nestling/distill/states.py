"""Losses between intermediate states of student and teacher.

Minitron, arXiv 2407.14679, section 3: L_is = L_emb + L_o + L_i, of the embedding output, a decoder layer's output and
an MLP's input, all after the norm that follows them; a learned linear map shared by all of them takes the student's
width to the teacher's and is thrown away after training. One pair of layers is compared, the third from the end
of each model unless a map says otherwise. L = L_logits + alpha L_is with alpha = L_logits / L_is, no gradient
through alpha. Here alpha is taken for each sequence: the sequence is never cut, so loss and gradient of a step are the
same however its batch is split over micro-batches and devices, which one alpha per micro-batch would not give.

A state "after its norm" is what the next block reads, so it is caught at the input of the modules that read the
residual stream; the anatomy says which those are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from nestling.anatomy import Anatomy
from nestling.errors import NestlingError

STATES = ("embedding", "output", "mlp_input")
FROM_THE_END = 3  # the layer compared is the third from the end: 29 of 32 in the paper, counted from 0

StateLoss = Callable[[Tensor, Tensor], Tensor]
STATE_LOSSES: dict[str, StateLoss] = {}


def state_loss(name: str) -> Callable[[StateLoss], StateLoss]:
    """Register a function of the states of student and teacher `[tokens, hidden]` -> `[tokens]`."""

    def add(function: StateLoss) -> StateLoss:
        STATE_LOSSES[name] = function
        return function

    return add


@state_loss("cosine")
def cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - cos(h_s, h_t), the paper's best."""
    return 1 - F.cosine_similarity(student, teacher, dim=-1)


@state_loss("mse")
def mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference over channels."""
    return (student - teacher).square().mean(-1)


def projection(student: PreTrainedModel, teacher: PreTrainedModel, seed: int = 0) -> nn.Module:
    """The shared map from the student's width to the teacher's; the identity when they match."""
    narrow, wide = (model.config.get_text_config().hidden_size for model in (student, teacher))
    if narrow == wide:
        return nn.Identity()
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        return nn.Linear(narrow, wide).to(student.device, torch.promote_types(student.dtype, torch.float32))


def check_states(states: Sequence[str], loss: str) -> None:
    """Raise `NestlingError` for a state or a state loss that does not exist."""
    for name in states:
        if name not in STATES:
            raise NestlingError(f"state '{name}' is not known: choose from {', '.join(STATES)}")
    if loss not in STATE_LOSSES:
        raise NestlingError(f"state loss '{loss}' is not known: choose from {', '.join(sorted(STATE_LOSSES))}")


def parse_layer_map(text: str) -> tuple[int, int] | None:
    """The layers `TEACHER:STUDENT` compared, counted from 0, as in the paper's 29:13; None for an empty text."""
    if not text:
        return None
    parts = [part.strip() for part in text.split(":")]
    if len(parts) != 2 or not all(part.isdigit() for part in parts):
        raise NestlingError(f"layer_map '{text}' is not a pair of layers: write TEACHER:STUDENT, as in 29:13")
    return int(parts[0]), int(parts[1])


def readers(model: PreTrainedModel, states: Sequence[str], layer: int | None = None) -> dict[str, nn.Module]:
    """For each state the module whose input it is, its layer the third from the end unless given.

    Raises `NestlingError` when the model has fewer than two layers, or not the layer after the one given.
    """
    if not states:
        return {}
    anatomy = Anatomy.of(model)
    if anatomy.num_layers < 2:
        raise NestlingError(f"states {', '.join(states)} need at least 2 layers: leave `states` empty for this model")
    layer = max(0, anatomy.num_layers - FROM_THE_END) if layer is None else layer
    if not layer < anatomy.num_layers - 1:
        raise NestlingError(
            f"layer {layer} of a model with {anatomy.num_layers} layers cannot be compared: its output is read by the "
            f"layer after it, so name one from 0 to {anatomy.num_layers - 2} in layer_map"
        )
    places = {"embedding": (0, 0), "output": (layer + 1, 0), "mlp_input": (layer, -1)}
    return {name: _reader(model, anatomy, *places[name]) for name in states}


@contextmanager
def catching(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """While open, the mapping it yields receives the input `[batch, seq, hidden]` of each module as it is called."""
    caught: dict[str, Tensor] = {}

    def catch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            caught[name] = args[0]

        return hook

    handles = [module.register_forward_pre_hook(catch(name)) for name, module in modules.items()]
    try:
        yield caught
    finally:
        for handle in handles:
            handle.remove()


def states_loss(
    student: Mapping[str, Tensor],
    teacher: Mapping[str, Tensor],
    project: nn.Module,
    counted: Tensor,
    loss: str = "cosine",
) -> Tensor:
    """L_is of each sequence `[batch]`: over all states and counted tokens, added up, in at least float32.

    student, teacher: states by name `[batch, seq, hidden]`. counted: which tokens are real `[batch, seq]`, bool.
    """
    measure = STATE_LOSSES[loss]
    totals: list[Tensor] = []
    for name, state in student.items():
        ours, theirs = project(state[counted]), teacher[name][counted].detach()
        wide = torch.promote_types(ours.dtype, torch.float32)
        each = measure(ours.to(wide), theirs.to(wide))
        totals.append(each.new_zeros(counted.shape).masked_scatter(counted, each).sum(-1))
    return torch.stack(totals).sum(0)


def balance(logits_loss: Tensor, states: Tensor) -> Tensor:
    """alpha = L_logits / L_is of each sequence `[batch]`, detached; 0 where there is no state loss to scale."""
    logits_loss, states = logits_loss.detach(), states.detach()
    return torch.where(states > 0, logits_loss / states.clamp_min(torch.finfo(states.dtype).tiny), 0.0)


def _reader(model: PreTrainedModel, anatomy: Anatomy, layer: int, which: int) -> nn.Module:
    residual = next(axis for axis in anatomy.axes.values() if axis.scope == "model")
    found = [anatomy.tensors[name].module for name in anatomy.readers(residual, layer)]
    return model.get_submodule(found[which])
