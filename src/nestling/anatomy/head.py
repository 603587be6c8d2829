"""The two halves of a causal language model: the backbone, and the head that turns hidden states into logits.

Losses and evaluation need them apart, so that `[tokens, vocab]` never has to exist at once. What an architecture
does to its logits (a divisor, a factor, a soft cap) is in its declaration and applied here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from nestling.anatomy.declare import architecture_of

Head = Callable[[Tensor], Tensor]


def decoder(model: PreTrainedModel) -> nn.Module:
    """The backbone: called like the model, its output's `last_hidden_state` `[batch, seq, hidden]` feeds the head."""
    return model.get_decoder()


def logits_head(model: PreTrainedModel) -> Head:
    """The function from hidden states `[..., hidden]` (after the final norm) to logits `[..., vocab]`."""
    architecture = architecture_of(model.config)
    projection = model.get_output_embeddings()
    divisor = _number(model.config, architecture.logits_divisor)
    factor = _number(model.config, architecture.logits_factor)
    softcap = _number(model.config, architecture.logits_softcap)

    def head(hidden: Tensor) -> Tensor:
        logits = projection(hidden)
        if divisor is not None:
            logits = logits / divisor
        if factor is not None:
            logits = logits * factor
        if softcap is not None:
            logits = torch.tanh(logits / softcap) * softcap
        return logits

    return head


def cache_name(model: PreTrainedModel) -> str:
    """What a model calls its cache, as argument and in its output: `cache`, or `past_key_values` in older versions."""
    return "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"


def _number(config: object, name: str | None) -> float | None:
    return getattr(config, name) if name else None
