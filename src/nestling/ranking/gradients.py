"""A backward pass over calibration text for metrics that need gradients of activations, in little memory.

Weights are frozen, so that neither their gradients nor what those need is kept; rows go through a few at a time; logits
exist for a chunk of tokens at a time. Knows no metric.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from nestling.anatomy import logits_head

PIECE_TOKENS = 512  # that go forward and back together
CHUNK_TOKENS = 128  # whose logits exist at once


@contextmanager
def differentiating(model: PreTrainedModel) -> Iterator[None]:
    """Gradients flow from the embeddings on, through frozen weights; which were trainable is put back afterwards."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.requires_grad_(False)
    hook = model.get_input_embeddings().register_forward_hook(lambda module, args, output: output.requires_grad_())
    try:
        with torch.enable_grad():
            yield
    finally:
        hook.remove()
        for parameter, learns in before:
            parameter.requires_grad_(learns)


def pieces(batch: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """The batch `[batch, seq]` a few rows at a time."""
    rows = max(1, PIECE_TOKENS // batch["input_ids"].shape[1])
    for start in range(0, len(batch["input_ids"]), rows):
        yield {name: value[start : start + rows] for name, value in batch.items()}


def go_back(model: PreTrainedModel, hidden: Tensor, input_ids: Tensor, attention_mask: Tensor | None = None) -> None:
    """Differentiate the sum of -log p(next token) over real tokens; hidden: last states `[batch, seq, hidden]`."""
    counts = torch.ones_like(input_ids[:, 1:], dtype=torch.bool)
    if attention_mask is not None:
        counts = attention_mask[:, 1:].bool() & attention_mask[:, :-1].bool()
    places = torch.nonzero(F.pad(counts, (0, 1)), as_tuple=True)
    head, gradient = logits_head(model), torch.zeros_like(hidden)
    for rows, columns in zip(*(place.split(CHUNK_TOKENS) for place in places), strict=True):
        states = hidden.detach()[rows, columns].requires_grad_()
        logits = head(states)
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        loss = F.cross_entropy(wide, input_ids[rows, columns + 1], reduction="sum")
        gradient[rows, columns] = torch.autograd.grad(loss, states)[0]
    hidden.backward(gradient)
