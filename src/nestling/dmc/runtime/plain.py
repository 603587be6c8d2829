"""A decoding step in whole tensors, for any device and dtype: what the compiled loops are held against.

Heads are padded to the longest while they are read, so it saves memory but little time where heads differ.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .gates import Gates, logits
from .heads import Heads, Text
from .slots import PAGE, SlotLayer

Attend = Callable[[Tensor, SlotLayer, float], Tensor]


def attend(query: Tensor, slots: SlotLayer, scaling: float) -> Tensor:
    """Queries `[batch, heads, group, dim]` over the slots of their heads."""
    keys, values, held = slots.padded()
    held = held | (slots.length == 0).unsqueeze(-1)  # only padding so far: any finite answer will do
    return scaled_dot_product_attention(query, keys, values, attn_mask=held.unsqueeze(2), scale=scaling)


def step(heads: Heads, gates: Gates, text: Text, slots: SlotLayer, attend: Attend = attend) -> Tensor:
    """One token per sequence is merged or appended, or let in where tokens are dropped, and attends over the slots with
    itself among them: `[batch, heads, group, 1, dim]`. Padding changes nothing."""
    take = absorb if gates.method == "dmc" else admit
    query, key, value = heads.query[..., 0, :], heads.key[:, :, 0], heads.value[:, :, 0]
    key, value = take(query, key, value, slots, (text.valid[:, 0], text.ends[:, 0]), gates)
    query, key = heads.rotated(key.unsqueeze(2), gates.keep)
    row, head = torch.nonzero(text.valid.expand_as(slots.length), as_tuple=True)
    slots.write(row, head, slots.length[row, head] - 1, key[row, head, 0], value[row, head])
    return attend(query[..., 0, :].to(slots.keys.dtype), slots, heads.scaling).unsqueeze(3)


def absorb(
    query: Tensor, key: Tensor, value: Tensor, slots: SlotLayer, text: tuple[Tensor, Tensor], gates: Gates
) -> tuple[Tensor, Tensor]:
    """Merge or append: updates sums, lengths and the page table, and returns the mean key and value of the top slot,
    not rotated, which are still to be stored.

    query: `[batch, heads, group, dim]`. key, value: `[batch, heads, dim]`. text: real tokens, and separators of
    documents, both `[batch]`.
    """
    merge, weight = (found[..., 0] for found in logits(query.unsqueeze(3), key.unsqueeze(2), gates))
    opens = (slots.ended | text[1] | (slots.length[:, 0] == 0)).unsqueeze(1)
    slots.ended = torch.where(text[0], text[1], slots.ended)
    real = text[0].unsqueeze(1)
    appended = real & (opens | ~(merge > 0))
    slots.reserve(slots.length + appended)
    slots.length = slots.length + appended
    terms = torch.cat([key, value, torch.ones_like(key[..., :1])], -1).to(slots.sums.dtype) * weight.unsqueeze(-1)
    kept = torch.where(appended.unsqueeze(-1), 0, slots.sums)
    slots.sums = torch.where(real.unsqueeze(-1), kept + terms, slots.sums)
    means = torch.where(slots.sums[..., -1:] > 0, slots.sums[..., :-1] / slots.sums[..., -1:].clamp_min(1e-30), 0)
    mean_key, mean_value = means.to(key.dtype).chunk(2, -1)
    return mean_key, mean_value


def admit(
    query: Tensor, key: Tensor, value: Tensor, slots: SlotLayer, text: tuple[Tensor, Tensor], gates: Gates
) -> tuple[Tensor, Tensor]:
    """As `absorb`, where tokens are dropped and not merged: the new one is in the last slot, and what was there moves
    to the slot of a token that leaves the window and was given up, if there is one."""
    leave = logits(query.unsqueeze(3), key.unsqueeze(2), gates)[0][..., 0] > 0
    row = torch.arange(len(query), device=query.device)
    now, before = slots.seen % gates.recent, (slots.seen - 1) % gates.recent
    real, newest = text[0].unsqueeze(1), slots.recent[row, :, before]
    newest = torch.where(real & (slots.seen > 0).unsqueeze(1) & leave, -1 - newest, newest)
    slots.recent[row, :, before] = newest
    leaving = slots.recent[row, :, now]
    freed = real & (slots.seen > gates.window).unsqueeze(1) & (leaving < 0)
    appended = real & ~freed
    slots.reserve(slots.length + appended)
    _move_last(slots, freed, -1 - leaving)
    slots.recent[row, :, before] = torch.where(freed, torch.where(newest < 0, leaving, -1 - leaving), newest)
    slots.length = slots.length + appended
    slots.recent[row, :, now] = torch.where(real, slots.length - 1, slots.recent[row, :, now]).to(newest.dtype)
    slots.seen = slots.seen + text[0]
    return key, value


def _move_last(slots: SlotLayer, chosen: Tensor, goal: Tensor) -> None:
    """Of the chosen heads `[batch, heads]`, the last slot goes to the slots `goal` `[batch, heads]`."""
    row, head = torch.nonzero(chosen, as_tuple=True)
    last = slots.length[row, head] - 1
    place = (slots.table[row, head, last // PAGE], last % PAGE)
    slots.write(row, head, goal[row, head].long(), slots.keys[place], slots.values[place])
