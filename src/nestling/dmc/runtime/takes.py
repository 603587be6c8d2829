"""The loops of what a decoding step does before attention, compiled by numba: a token is merged, appended or let in.

One call serves all heads of a layer: decisions, running sums or what leaves the window, the page table, the newest slot
with its key rotated, and the rotation of queries.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .loops import AT, carray, compiled, kinds, narrow, step_function


def takes(dtype: str, method: str) -> Any:
    """What comes before attention, if nothing is missing: see `loops.Places`. dtype: of the pools."""
    (stored, kind), merges = kinds(dtype), method == "dmc"

    def body(at):
        batch, heads, group, dim, pages, page, columns, _, channels, angles, newest, shared = carray(
            at[AT.sizes], (12,), np.int64
        )
        scale, offset, keep, scaling = carray(at[AT.factors], (4,), np.float64)
        length, used = carray(at[AT.length], (batch, heads), np.int64), carray(at[AT.used], (1,), np.int64)
        table, missing = carray(at[AT.table], (batch, heads, columns), np.int64), carray(at[AT.missing], (2,), np.int64)
        missing[0], missing[1] = _missing(length, table, used, pages, page)
        if missing[1] > 0:
            return
        query, valid = carray(at[AT.query], (batch, heads, group, dim), kind), carray(at[AT.valid], (batch,), np.bool_)
        key, value = carray(at[AT.key], (batch, heads, dim), kind), carray(at[AT.value], (batch, heads, dim), kind)
        turn = carray(at[AT.cos], (angles, channels), kind), carray(at[AT.sin], (angles, channels), kind), kind(keep)
        keys = carray(at[AT.keys], (pages, page, dim), stored)
        values = carray(at[AT.values], (pages, page, dim), stored)
        gates, held = (scale, offset, keep, shared != 0), (keys, values, length, table, used)
        if merges:
            ends, ended = carray(at[AT.ends], (batch,), np.bool_), carray(at[AT.ended], (batch,), np.bool_)
            sums = carray(at[AT.sums], (batch, heads, 2 * dim + 1), kind)
            _absorb(query, key, value, valid, ends, turn, gates, held, sums, ended)
        else:
            recent = carray(at[AT.recent], (batch, heads, newest), np.int32)
            _admit(key, value, valid, turn, gates, held, recent, carray(at[AT.seen], (batch,), np.int64))
        turned = carray(at[AT.turned], (batch, heads, group, dim), kind)
        for b in range(batch):
            for h in range(heads):
                for g in range(group):
                    _turn(query[b, h, g], b, turn, turned[b, h, g])
        turned *= kind(scaling)
        carray(at[AT.counters], (batch * heads + 1,), np.int64)[:] = 0
        carray(at[AT.out], (batch, heads, group, dim), kind)[:] = 0  # where a head has only seen padding

    return step_function(body)


@compiled
def _missing(length, table, used, pages, page):
    """Pages, and columns of the table, that are needed if every head opens a slot, where there are not enough."""
    new, columns = 0, 0
    for b in range(length.shape[0]):
        for h in range(length.shape[1]):
            new += length[b, h] % page == 0
            columns = max(columns, length[b, h] // page + 1)
    return (new, columns) if used[0] + new > pages or columns > table.shape[2] else (0, 0)


@compiled
def _absorb(query, key, value, valid, ends, turn, gates, held, sums, ended):
    (batch, heads, dim), (scale, offset, keep, shared) = key.shape, gates
    mean_key, mean_value = np.empty(dim, key.dtype), np.empty(dim, key.dtype)
    for b in range(batch):
        if not valid[b]:
            continue
        mean = key[b, :, dim - 1].mean()
        opens = ended[b] or ends[b] or held[2][b, 0] == 0
        for h in range(heads):
            logit = scale * (mean if shared else key[b, h, dim - 1]) - offset
            weighs = scale * query[b, h, :, dim - 1].mean() + offset
            weight = 1.0 / (1.0 + math.exp(-weighs)) + 2.0**-23 if keep == 0 else 1.0
            if opens or keep != 0 or not logit > 0:
                sums[b, h, :] = 0
                _open(held, b, h)
            for c in range(dim):
                sums[b, h, c] += weight * key[b, h, c]
                sums[b, h, dim + c] += weight * value[b, h, c]
            sums[b, h, 2 * dim] += weight
            for c in range(dim):
                mean_key[c] = sums[b, h, c] / sums[b, h, 2 * dim]
                mean_value[c] = sums[b, h, dim + c] / sums[b, h, 2 * dim]
            _write(mean_key, mean_value, turn, held, b, h)
        ended[b] = ends[b]


@compiled
def _admit(key, value, valid, turn, gates, held, recent, seen):
    (batch, heads, dim), (scale, offset, keep, shared) = key.shape, gates
    keys, values, length, table, _ = held
    page, size = keys.shape[1], recent.shape[2]
    for b in range(batch):
        if not valid[b]:
            continue
        now, before = seen[b] % size, (seen[b] - 1) % size
        mean = key[b, :, dim - 1].mean()
        for h in range(heads):
            logit = scale * (mean if shared else key[b, h, dim - 1]) - offset
            if keep == 0 and logit > 0 and seen[b] > 0:
                recent[b, h, before] = -1 - recent[b, h, before]
            leaving = recent[b, h, now]
            if seen[b] >= size and leaving < 0:
                goal, last = -1 - leaving, length[b, h] - 1
                to, source = table[b, h, goal // page], table[b, h, last // page]
                keys[to, goal % page] = keys[source, last % page]
                values[to, goal % page] = values[source, last % page]
                recent[b, h, before] = goal if recent[b, h, before] >= 0 else -1 - goal
            else:
                _open(held, b, h)
            recent[b, h, now] = length[b, h] - 1
            _write(key[b, h], value[b, h], turn, held, b, h)
        seen[b] += 1


@compiled
def _open(held, b, h):
    """One slot more for a head, on a new page where it needs one."""
    keys, _, length, table, used = held
    page = keys.shape[1]
    if length[b, h] % page == 0:
        table[b, h, length[b, h] // page] = used[0]
        used[0] += 1
    length[b, h] += 1


@compiled
def _write(key, value, turn, held, b, h):
    """Put a key, rotated, and a value in a head's last slot."""
    keys, values, length, table, _ = held
    page, last, turned = keys.shape[1], length[b, h] - 1, np.empty_like(key)
    _turn(key, b, turn, turned)
    row = table[b, h, last // page]
    for c in range(len(key)):
        keys[row, last % page, c] = narrow(turned[c], keys[row, last % page, c])
        values[row, last % page, c] = narrow(value[c], values[row, last % page, c])


@compiled
def _turn(states, b, turn, out):
    """One head's `[dim]` of sequence b, rotated in channels i and i + half, the last channel times `keep` before and
    after that."""
    cos, sin, keep = turn
    dim, half, b = len(states), cos.shape[1] // 2, b % len(cos)
    out[:] = states
    out[dim - 1] *= keep
    for c in range(half):
        x, y = out[c], out[c + half]
        out[c], out[c + half] = x * cos[b, c] - y * sin[b, c], y * cos[b, c + half] + x * sin[b, c + half]
    if half > 0:
        out[dim - 1] *= keep
