"""A prefill where tokens are dropped and not merged: delayed eviction (DMS, arXiv 2506.05345).

Token t + 1 decides about token t, and what is decided is done when `window` later tokens have come; until then every
query sees the token. So query i sees key j if i - j <= window or j stays:

    scores(i, j) = q_i . k_j / sqrt(d) + log(1 - alpha_{j+1})   i - j > window;    no term within the window

`attend.parallel` is that for all positions at once, and a step of decoding is in `kernel` and `plain`. Here any number
of tokens comes on top of a cache, and a block of queries is scored against the tokens that stay and those of its
window only, so the work falls with the ratio.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .gates import Gates, logits, wide
from .heads import Decisions, Heads, Text
from .slots import SlotLayer

QUERIES = 256  # at once
STAYS = 2**62  # until when a token is seen that nobody drops


@dataclass(frozen=True)
class Held:
    """One head: slots and then new tokens, keys and values `[n, dim]`, from which query on each is seen and until which
    `[n]`. movable: those among them whose place may change, oldest first; number: which tokens these are."""

    keys: Tensor
    values: Tensor
    born: Tensor
    until: Tensor
    movable: Tensor
    number: Tensor


def prefill(heads: Heads, gates: Gates, text: Text, slots: SlotLayer, keep: bool = True) -> tuple[Tensor, Decisions]:
    """Any number of tokens on top of what `slots` holds, which then holds them too (unless not `keep`)."""
    leave, _ = logits(heads.query, heads.key, gates)
    query, keys = heads.rotated(heads.key, gates.keep)
    out, found = torch.zeros_like(query), {}
    for row in range(len(query)):
        real = text.valid[row].nonzero().flatten()
        for head in range(query.shape[1]) if len(real) else ():
            states = (keys[row, head, real], heads.value[row, head, real], leave[row, head, real] > 0)
            held = found[row, head] = _held(slots, (row, head), *states, gates.window)
            out[row, head, :, real] = _attend(query[row, head][:, real], held, int(slots.seen[row]), heads.scaling)
    decided = executed(text.valid, gates.window, slots.seen).unsqueeze(1) & (leave > 0)
    if keep:
        _store(slots, found, text)
    return out, Decisions(decided.to(leave.dtype), decided, leave, text.valid)


def executed(valid: Tensor, window: int, before: Tensor | int = 0) -> Tensor:
    """Tokens whose decision about the token before was carried out by the end of the text `[batch, seq]`.

    valid: real tokens `[batch, seq]`. before: how many came earlier `[batch]`.
    """
    before = torch.as_tensor(before, device=valid.device).expand(len(valid)).unsqueeze(1)
    number = before + valid.cumsum(1) - 1
    return valid & (number > 0) & (number < before + valid.sum(1, keepdim=True) - window)


def _held(slots: SlotLayer, place: tuple[int, int], keys: Tensor, values: Tensor, leave: Tensor, window: int) -> Held:
    seen, count, device = int(slots.seen[place[0]]), int(slots.length[place]), keys.device
    old_keys, old_values = slots.read(*place, count)
    recent = torch.arange(max(0, seen - window - 1), seen, device=device)
    entries = slots.recent[place][recent % (window + 1)].long()
    slot, doomed = torch.where(entries < 0, -1 - entries, entries), entries < 0
    if seen:
        doomed[-1] |= leave[0]
    number = seen + torch.arange(len(keys), device=device)
    until = torch.full((count,), STAYS, device=device)
    until[slot[doomed]] = recent[doomed] + window
    leaves = torch.cat([leave[1:], torch.zeros_like(leave[:1])])
    return Held(
        keys=torch.cat([old_keys, keys.to(old_keys.dtype)]),
        values=torch.cat([old_values, values.to(old_values.dtype)]),
        born=torch.cat([torch.full_like(until, -1), number]),
        until=torch.cat([until, torch.where(leaves, number + window, STAYS)]),
        movable=torch.cat([slot, count + torch.arange(len(keys), device=device)]),
        number=torch.cat([recent, number]),
    )


def _attend(query: Tensor, held: Held, seen: int, scaling: float) -> Tensor:
    """Queries `[group, seq, dim]`, the first being token `seen`."""
    out = torch.empty_like(query)
    for start in range(0, query.shape[1], QUERIES):
        stop = min(start + QUERIES, query.shape[1])
        number = torch.arange(seen + start, seen + stop, device=query.device).unsqueeze(1)
        near = (held.until >= number[0]) & (held.born <= number[-1])
        sees = (held.born[near] <= number) & (held.until[near] >= number)
        part = query[:, start:stop].to(wide(query.dtype))
        scores = (part @ held.keys[near].to(part.dtype).T) * scaling
        weights = torch.softmax(scores.masked_fill(~sees, -torch.inf), -1)
        out[:, start:stop] = weights.to(query.dtype) @ held.values[near].to(query.dtype)
    return out


def _store(slots: SlotLayer, found: dict[tuple[int, int], Held], text: Text) -> None:
    """Newest tokens and new ones go where newest tokens were and behind, oldest first; what stays longer stays put."""
    slots.seen = slots.seen + text.valid.sum(1)
    length = slots.length.clone()
    for (row, head), held in found.items():
        length[row, head] = (held.until >= slots.seen[row] - 1).sum()
    slots.reserve(length)
    size = slots.recent.shape[-1]
    for (row, head), held in found.items():
        last, before = int(slots.seen[row]) - 1, int(slots.length[row, head])
        stays = held.until[held.movable] >= last
        source, number = held.movable[stays], held.number[stays]
        behind = torch.arange(before, int(length[row, head]), device=length.device)
        goal = torch.cat([held.movable[held.movable < before].sort().values, behind])
        where = (torch.full_like(goal, row), torch.full_like(goal, head), goal)
        slots.write(*where, held.keys[source], held.values[source])
        new = number > last - size
        entries = torch.where(held.until[source] < STAYS, -1 - goal, goal)[new]
        slots.recent[row, head, number[new] % size] = entries.to(slots.recent.dtype)
    slots.length = length
    slots.tokens += text.valid.shape[1]
