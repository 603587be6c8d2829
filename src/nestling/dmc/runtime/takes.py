"""The loops of what a decoding step does before attention, compiled by numba: a token is merged, appended or let in.

One call serves all heads of a layer: decisions, running sums or what leaves the window, the page table, and the
rotation of queries and of the newest key. It takes addresses, since handing over arrays would cost more than all that.
"""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np
from numba import types

from .loops import OPTIONS, STORED, carray, compiled


def absorbs(dtype: str) -> Any:
    """What a step of merging does before attention (see `kernel.absorb`), as a C function that takes addresses.

    They are of: sizes (batch, heads, group, dim, pages, rows of a page, columns, channels that are rotated, whether
    decisions are shared); scale, offset and keep in float64; room to say which pages and columns are missing `[2]`, and
    then nothing is done; queries `[batch, heads, group, dim]`, keys and values `[batch, heads, dim]`; real tokens and
    separators `[batch]`; cosines and sines `[batch, channels]`; sums, lengths, table, pages in use and `ended` of the
    cache; queries, keys and values as results. dtype: of all of these but the whole numbers.
    """
    kind = STORED[dtype]

    def body(at):
        batch, heads, group, dim, pages, page, columns, turned, shared, _ = carray(at[0], (10,), np.int64)
        scale, offset, keep = carray(at[1], (3,), np.float64)
        missing, length = carray(at[2], (2,), np.int64), carray(at[11], (batch, heads), np.int64)
        table, used = carray(at[12], (batch, heads, columns), np.int64), carray(at[13], (1,), np.int64)
        missing[0], missing[1] = _missing(length, table, used, pages, page)
        if missing[1] == 0:
            _absorb(
                carray(at[3], (batch, heads, group, dim), kind),
                carray(at[4], (batch, heads, dim), kind),
                carray(at[5], (batch, heads, dim), kind),
                carray(at[6], (batch,), np.bool_),
                carray(at[7], (batch,), np.bool_),
                carray(at[8], (batch, turned), kind),
                carray(at[9], (batch, turned), kind),
                carray(at[10], (batch, heads, 2 * dim + 1), kind),
                length,
                table,
                used,
                carray(at[14], (batch,), np.bool_),
                (
                    carray(at[15], (batch, heads, group, dim), kind),
                    carray(at[16], (batch, heads, dim), kind),
                    carray(at[17], (batch, heads, dim), kind),
                ),
                (scale, offset, keep, shared != 0),
                page,
            )

    return numba.cfunc(types.void(types.CPointer(types.voidptr)), **OPTIONS)(body)


def admits(dtype: str) -> Any:
    """As `absorbs`, where tokens are dropped (see `kernel.admit`).

    Its addresses are of: sizes (and how many newest tokens are known), factors, what is missing; queries, keys; real
    tokens; cosines, sines; pools of keys and of values, lengths, table, pages in use, `recent` and `seen` of the cache;
    queries and keys as results. dtype: of the pools.
    """
    stored = STORED[dtype]
    kind = np.float64 if stored is np.float64 else np.float32

    def body(at):
        batch, heads, group, dim, pages, page, columns, turned, shared, size = carray(at[0], (10,), np.int64)
        scale, offset, keep = carray(at[1], (3,), np.float64)
        missing, length = carray(at[2], (2,), np.int64), carray(at[10], (batch, heads), np.int64)
        table, used = carray(at[11], (batch, heads, columns), np.int64), carray(at[12], (1,), np.int64)
        missing[0], missing[1] = _missing(length, table, used, pages, page)
        if missing[1] == 0:
            _admit(
                carray(at[3], (batch, heads, group, dim), kind),
                carray(at[4], (batch, heads, dim), kind),
                carray(at[5], (batch,), np.bool_),
                carray(at[6], (batch, turned), kind),
                carray(at[7], (batch, turned), kind),
                carray(at[8], (pages, page, dim), stored),
                carray(at[9], (pages, page, dim), stored),
                length,
                table,
                used,
                carray(at[13], (batch, heads, size), np.int32),
                carray(at[14], (batch,), np.int64),
                (carray(at[15], (batch, heads, group, dim), kind), carray(at[16], (batch, heads, dim), kind)),
                (scale, offset, keep, shared != 0),
            )

    return numba.cfunc(types.void(types.CPointer(types.voidptr)), **OPTIONS)(body)


# ---- the loops


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
def _absorb(query, key, value, valid, ends, cos, sin, sums, length, table, used, ended, found, gates, page):
    (batch, heads, group, dim), (scale, offset, keep, shared) = query.shape, gates
    out_query, out_key, out_value = found
    for b in range(batch):
        opens = ended[b] or ends[b] or length[b, 0] == 0
        mean = 0.0
        for h in range(heads):
            mean += key[b, h, dim - 1] / heads
        for h in range(heads):
            weighs = 0.0
            for g in range(group):
                weighs += query[b, h, g, dim - 1] / group
                _turn(query[b, h, g], cos[b], sin[b], keep, out_query[b, h, g])
            logit = scale * (mean if shared else key[b, h, dim - 1]) - offset
            weight = 1.0 / (1.0 + math.exp(-(scale * weighs + offset))) + 2.0**-23 if keep == 0 else 1.0
            if valid[b]:
                if opens or keep != 0 or not logit > 0:
                    for c in range(2 * dim + 1):
                        sums[b, h, c] = 0
                    _open(length, table, used, b, h, page)
                for c in range(dim):
                    sums[b, h, c] += weight * key[b, h, c]
                    sums[b, h, dim + c] += weight * value[b, h, c]
                sums[b, h, 2 * dim] += weight
            total = sums[b, h, 2 * dim]
            for c in range(dim):
                out_key[b, h, c] = sums[b, h, c] / total if total > 0 else 0
                out_value[b, h, c] = sums[b, h, dim + c] / total if total > 0 else 0
            _turn(out_key[b, h], cos[b], sin[b], keep, out_key[b, h])
        if valid[b]:
            ended[b] = ends[b]


@compiled
def _admit(query, key, valid, cos, sin, keys, values, length, table, used, recent, seen, found, gates):
    (batch, heads, group, dim), (scale, offset, keep, shared) = query.shape, gates
    (page, size), (out_query, out_key) = (values.shape[1], recent.shape[2]), found
    for b in range(batch):
        now, before = seen[b] % size, (seen[b] - 1) % size
        mean = 0.0
        for h in range(heads):
            mean += key[b, h, dim - 1] / heads
        for h in range(heads):
            for g in range(group):
                _turn(query[b, h, g], cos[b], sin[b], keep, out_query[b, h, g])
            _turn(key[b, h], cos[b], sin[b], keep, out_key[b, h])
            if not valid[b]:
                continue
            logit = scale * (mean if shared else key[b, h, dim - 1]) - offset
            if keep == 0 and logit > 0 and seen[b] > 0:
                recent[b, h, before] = -1 - recent[b, h, before]
            leaving = recent[b, h, now]
            if seen[b] >= size and leaving < 0:
                goal, last = -1 - leaving, length[b, h] - 1
                to, source = table[b, h, goal // page], table[b, h, last // page]
                for c in range(dim):
                    keys[to, goal % page, c] = keys[source, last % page, c]
                    values[to, goal % page, c] = values[source, last % page, c]
                recent[b, h, before] = goal if recent[b, h, before] >= 0 else -1 - goal
            else:
                _open(length, table, used, b, h, page)
            recent[b, h, now] = length[b, h] - 1
        if valid[b]:
            seen[b] += 1


@compiled
def _open(length, table, used, b, h, page):
    """One slot more for a head, on a new page where it needs one."""
    if length[b, h] % page == 0:
        table[b, h, length[b, h] // page] = used[0]
        used[0] += 1
    length[b, h] += 1


@compiled
def _turn(states, cos, sin, keep, out):
    """One head's `[dim]`, rotated in channels i and i + half, the last channel times `keep` before and after that."""
    dim, half = len(states), len(cos) // 2
    for c in range(dim):
        out[c] = states[c] * (keep if c == dim - 1 else 1)
    for c in range(half):
        x, y = out[c], out[c + half]
        out[c], out[c + half] = x * cos[c] - y * sin[c], y * cos[c + half] + x * sin[c + half]
    if half > 0:
        out[dim - 1] *= keep
