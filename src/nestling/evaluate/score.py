"""The negative log-likelihood of tokens, without ever holding all their logits.

The backbone runs once per batch; the head runs on chunks of the positions that count, in float32, each dropped when
its losses are taken. Architectures without a declaration run whole, their logits chunked all the same.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from nestling.anatomy import decoder, logits_head
from nestling.errors import UnsupportedArchitecture

IGNORE = -100
CHUNK_NUMBERS = 2**24  # numbers in a chunk of logits: 64 MiB in float32


def token_losses(model: PreTrainedModel, input_ids: Tensor, targets: Tensor, chunk: int | None = None) -> Tensor:
    """-log p(target) in nats `[batch, seq]`, float32 at least, 0 where the target is -100.

    `input_ids[b, t]` is the last token seen when `targets[b, t]` is predicted: targets are already shifted.
    `chunk`: tokens whose logits exist at once; as many as fit in 64 MiB unless given.
    """
    counted = targets != IGNORE
    if not counted.any():
        return torch.zeros(targets.shape, device=targets.device)
    hidden, head = _forward(model, input_ids)
    rows, wanted = hidden[counted], targets[counted]
    step = chunk or max(1, CHUNK_NUMBERS // model.config.get_text_config().vocab_size)
    exact = torch.promote_types(hidden.dtype, torch.float32)
    losses = torch.zeros(targets.shape, device=hidden.device, dtype=exact)
    parts = zip(rows.split(step), wanted.split(step), strict=True)
    losses[counted] = torch.cat([F.cross_entropy(head(part).to(exact), want, reduction="none") for part, want in parts])
    return losses


def _forward(model: PreTrainedModel, input_ids: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Something per position `[batch, seq, width]`, and the function from it to logits `[..., vocab]`."""
    try:
        head = logits_head(model)
    except UnsupportedArchitecture:
        return model(input_ids=input_ids, use_cache=False).logits, lambda logits: logits
    return decoder(model)(input_ids=input_ids, use_cache=False).last_hidden_state, head
