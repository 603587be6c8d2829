"""Attention over a compressed cache, three ways that are one function when decisions are hard.

`parallel`: all positions at once, for training (relaxed decisions) and for text without a cache. Position j's partial
state is a key of its own; later queries see it as far as token j + 1 did not merge into it:

    scores(i, j) = q_i . RoPE(K_j, j) / sqrt(d) + log(1 - alpha_{j+1})   j < i;    no term at j = i, where the query is

`prefill`: with hard decisions only the last state of each slot, and a query's own, are ever seen, so the work falls
with the ratio, and what is seen is what the cache keeps. `decode`: one token per sequence, by running sums.

With the method `dms` a state is the token itself, the term is left out within a window, and `drop` has the prefill.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import dropout, logsigmoid, pad

from .drop import executed
from .drop import prefill as prefill_dropping
from .gates import Gates, forced, logits, relaxed, wide
from .heads import Decisions, Heads, Text
from .kernel import step as compiled_step
from .kernel import usable
from .plain import step as plain_step
from .pool import running_sums
from .ragged import attention_for
from .slots import SlotLayer

QUERIES = 256  # of a prefill at once
DENSE = 1024  # tokens up to which text without a cache is scored in one square


def attention(
    heads: Heads, gates: Gates, text: Text, slots: SlotLayer | None, training: bool, dropped: float = 0.0
) -> tuple[Tensor, Decisions | None]:
    """`[batch, heads, group, seq, dim]`, and the decisions where they were computed for all tokens at once."""
    if slots is not None and not training:
        if not slots.is_initialized:
            slots.lazy_initialization(heads.key, heads.value, gates.recent)
        slots.check(heads.key, gates.recent)
        if heads.key.shape[2] == 1 and not torch.is_grad_enabled():
            return decode(heads, gates, text, slots), None
        return prefill(heads, gates, text, slots)
    if not training and heads.key.shape[2] > DENSE:
        slots = SlotLayer()
        slots.lazy_initialization(heads.key, heads.value, gates.recent)
        return prefill(heads, gates, text, slots, keep=False)
    return parallel(heads, gates, text, training, dropped)


# ---- all positions at once


def parallel(
    heads: Heads, gates: Gates, text: Text, training: bool = False, dropped: float = 0.0
) -> tuple[Tensor, Decisions]:
    """All positions from nothing before them; relaxed decisions if `training`, else hard ones."""
    merge, weight = logits(heads.query, heads.key, gates)
    opens = _opens(text, None, gates)
    noisy = relaxed(merge, gates) if training and gates.active else merge
    alpha = torch.sigmoid(noisy) if training else (merge > 0).to(merge.dtype)
    unseen = logsigmoid(-noisy) if training else torch.where(merge > 0, -torch.inf, 0.0).to(merge.dtype)
    alpha, unseen = alpha.masked_fill(opens, 0), unseen.masked_fill(opens, 0)
    keys, values = heads.key, heads.value
    if gates.method == "dmc":
        sums = running_sums(alpha, _terms(heads, weight * text.valid.unsqueeze(1)))
        keys, values = _means(sums, heads)
    bias = pad(unseen[..., 1:], (0, 1))  # of key j: whether token j + 1 left it alone
    query, keys = heads.rotated(keys, gates.keep)
    out = _attend_square(query, keys, values, _bias(bias, text.valid, gates.spared), heads.scaling, dropped)
    quiet = (merge > 0) & ~opens
    hard = (noisy > 0) & ~opens
    straight = hard.to(alpha.dtype) + alpha - alpha.detach() if training else hard.to(alpha.dtype)
    if gates.method == "dms":
        done = executed(text.valid, gates.window).unsqueeze(1)
        quiet, straight = quiet & done, straight * done
    return out, Decisions(straight, quiet, merge, text.valid)


def _bias(unseen: Tensor, valid: Tensor, spared: int) -> Tensor:
    """`[batch, heads, 1, seq, seq]` from a term per key `[batch, heads, seq]` that the first queries are spared: those
    up to `spared` tokens behind it. Finite for padding, whose own queries see nothing else."""
    seq = unseen.shape[-1]
    near = torch.ones(seq, seq, dtype=torch.bool, device=unseen.device).triu(-spared)
    bias = unseen[:, :, None, None, :].masked_fill(near, 0)
    return bias.masked_fill(~valid[:, None, None, None, :], torch.finfo(unseen.dtype).min / 2)


def _attend_square(query: Tensor, keys: Tensor, values: Tensor, bias: Tensor, scaling: float, dropped: float) -> Tensor:
    seq = query.shape[-2]
    precise = wide(query.dtype)  # scores rounded to half precision would cost more than their softmax forgives
    scores = (query.to(precise) @ keys.to(precise).unsqueeze(2).mT) * scaling + bias
    later = torch.ones(seq, seq, dtype=torch.bool, device=query.device).triu(1)
    weights = torch.softmax(scores.masked_fill(later, -torch.inf), dim=-1)
    weights = dropout(weights, dropped, training=dropped > 0)
    return weights.to(values.dtype) @ values.unsqueeze(2)


# ---- hard decisions, on top of a cache


def prefill(heads: Heads, gates: Gates, text: Text, slots: SlotLayer, keep: bool = True) -> tuple[Tensor, Decisions]:
    """Any number of tokens on top of what `slots` holds, which then holds them too (unless not `keep`)."""
    if gates.method == "dms":
        return prefill_dropping(heads, gates, text, slots, keep)
    merge, weight = logits(heads.query, heads.key, gates)
    opens = _opens(text, slots, gates)
    real = text.valid.unsqueeze(1)
    merged = (merge > 0) & ~opens & real
    weight = weight * real
    sums = running_sums((merged | ~real).to(weight.dtype), _terms(heads, weight), slots.sums.to(weight.dtype))
    means = _means(sums, heads)
    query, keys = heads.rotated(means[0], gates.keep)
    place = slots.length.unsqueeze(-1) + (real & ~merged).cumsum(-1) - 1  # slot that each token is in
    ends = _ends(place - slots.length.unsqueeze(-1) + 1, real.expand_as(place))
    out = torch.empty_like(query)
    for row in range(len(query)):
        for head in range(query.shape[1]):
            last = ends[row, head]
            kept = int(slots.length[row, head]) - int(last[0] >= 0)
            old = slots.read(row, head, kept) if kept > 0 else None
            of_head = (query[row, head], keys[row, head], means[1][row, head])
            out[row, head] = _attend_finals(*of_head, old, last[last >= 0], heads.scaling)
    if keep:
        _store(slots, keys, means[1], sums, place, ends, text)
    return out, Decisions(merged.to(weight.dtype), merged, merge, text.valid)


def _ends(place: Tensor, real: Tensor) -> Tensor:
    """Last token of each slot that these tokens are in `[batch, heads, slots]`, -1 for none; slot 0 is the old top."""
    seq = place.shape[-1]
    ends = torch.full((*place.shape[:-1], int(place.max()) + 1), -1, device=place.device)
    tokens = torch.where(real, torch.arange(seq, device=place.device), -1)
    return ends.scatter_reduce(-1, place, tokens, "amax")


def _attend_finals(
    query: Tensor, keys: Tensor, values: Tensor, old: tuple[Tensor, Tensor] | None, ends: Tensor, scaling: float
) -> Tensor:
    """One head: queries `[group, seq, dim]` over the old slots, the new ones closed before each query, and its own."""
    out = torch.empty_like(query)
    final_keys, final_values = keys[ends], values[ends]
    for start in range(0, query.shape[1], QUERIES):
        stop = min(start + QUERIES, query.shape[1])
        near = int((ends < stop - 1).sum())
        some_keys, some_values = final_keys[:near], final_values[:near]
        positions = torch.arange(start, stop, device=query.device)
        unseen = ends[:near] >= positions.unsqueeze(-1)
        if old is not None:
            some_keys, some_values = torch.cat([old[0], some_keys]), torch.cat([old[1], some_values])
            unseen = pad(unseen, (len(old[0]), 0))
        part = query[:, start:stop].to(wide(query.dtype))
        scores = (part @ some_keys.to(part.dtype).T).masked_fill(unseen, -torch.inf)
        own = (part * keys[start:stop]).sum(-1, keepdim=True)
        weights = torch.softmax(torch.cat([scores, own], -1) * scaling, -1).to(query.dtype)
        out[:, start:stop] = weights[..., :-1] @ some_values + weights[..., -1:] * values[start:stop]
    return out


def _store(
    slots: SlotLayer, keys: Tensor, values: Tensor, sums: Tensor, place: Tensor, ends: Tensor, text: Text
) -> None:
    length = place[..., -1] + 1
    slots.reserve(length)
    row, head, relative = torch.nonzero(ends >= 0, as_tuple=True)
    token = ends[row, head, relative]
    slot = slots.length[row, head] - 1 + relative
    slots.write(row, head, slot, keys[row, head, token], values[row, head, token])
    slots.length = length
    slots.sums = sums[:, :, -1].to(slots.sums.dtype).contiguous()
    _note(slots, text)


def decode(heads: Heads, gates: Gates, text: Text, slots: SlotLayer) -> Tensor:
    """One token per sequence, by compiled loops or, where they do not serve, by what there is for the device."""
    if heads.turn is not None and usable(heads.key, slots.keys):
        out = compiled_step(heads, gates, text, slots)
    else:
        out = plain_step(heads, gates, text, slots, attention_for(slots.keys))
    slots.tokens += 1
    return out.to(heads.query.dtype)


# ---- shared


def _opens(text: Text, slots: SlotLayer | None, gates: Gates) -> Tensor:
    """Tokens that open a slot whatever their gate says, `[batch, 1, seq]`; where none merge, the first alone."""
    never = torch.zeros_like(text.valid[:, 0])
    before, seen = (never, never) if slots is None else (slots.ended, slots.length[:, 0] > 0)
    ends = text.ends if gates.method == "dmc" else torch.zeros_like(text.ends)
    return forced(text.valid, ends, before, seen).unsqueeze(1)


def _note(slots: SlotLayer, text: Text) -> None:
    """Remember how long the text is and whether it ended on a separator."""
    seq = text.valid.shape[1]
    last = torch.where(text.valid, torch.arange(seq, device=text.valid.device), -1).amax(1)
    ended = text.ends.gather(1, last.clamp_min(0).unsqueeze(1)).squeeze(1)
    slots.ended = torch.where(last < 0, slots.ended, ended)
    slots.tokens += seq


def _terms(heads: Heads, weight: Tensor) -> Tensor:
    """omega * (key, value, 1) `[batch, heads, seq, 2 dim + 1]`."""
    one = torch.ones_like(weight).unsqueeze(-1)
    return torch.cat([heads.key.to(weight.dtype), heads.value.to(weight.dtype), one], -1) * weight.unsqueeze(-1)


def _means(sums: Tensor, heads: Heads) -> tuple[Tensor, Tensor]:
    """Mean key and value of the slot after each token; zero before the first real one."""
    dim = heads.key.shape[-1]
    means = torch.where(sums[..., -1:] > 0, sums[..., :-1] / sums[..., -1:].clamp_min(1e-30), 0)
    return means[..., :dim], means[..., dim:].to(heads.value.dtype)
