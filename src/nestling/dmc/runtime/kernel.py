"""Loops compiled by numba for CPUs: the recurrence of `pool`, and one decoding step over heads of different length.

One query over a cache is bound by memory: every key and value row is read once for all query heads of its group, the
softmax is taken in one pass with a running maximum, and work is cut into stretches of rows so that long heads do not
keep threads waiting; what the stretches found is merged by their log-sum-exp. Without numba, or for other devices and
dtypes, `usable` is False and callers take the torch path, which computes the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from importlib.util import find_spec
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

STRETCH = 1024  # rows of one piece of work
BLOCK = 128  # rows whose scores are kept at once
THREADED_NUMBERS = 2**19  # keys and values below which more threads cost more than they bring
LOWEST = -1e30  # stands for minus infinity, which fast arithmetic may not see
FAST = {"reassoc", "contract", "arcp", "nsz", "afn"}
LOOPS: dict[str, Any] = {}


def usable(*tensors: Tensor) -> bool:
    """Whether the compiled loops take these tensors: on a CPU, float32 or float64, and numba is installed."""
    return _has_numba() and all(
        tensor.device.type == "cpu" and tensor.dtype in (torch.float32, torch.float64) for tensor in tensors
    )


@lru_cache
def _has_numba() -> bool:
    return find_spec("numba") is not None


def recurrence(alpha: Tensor, terms: Tensor, start: Tensor) -> Tensor:
    """S_t = alpha_t S_{t-1} + x_t; see `pool.running_sums`."""
    seq, width = terms.shape[-2:]
    sums = torch.empty(terms.shape, dtype=terms.dtype)
    _loop("recurrence")(
        _array(alpha.to(terms.dtype)).reshape(-1, seq),
        _array(terms).reshape(-1, seq, width),
        _array(start.to(terms.dtype)).reshape(-1, width),
        sums.numpy().reshape(-1, seq, width),
    )
    return sums


def absorb(
    query: Tensor, key: Tensor, value: Tensor, state: Any, text: tuple[Tensor, Tensor], gates: Any
) -> tuple[Tensor, Tensor]:
    """Merge or append one token per sequence: updates sums, lengths, page table and the top slot's value.

    query: `[batch, heads, group, dim]`. key, value: `[batch, heads, dim]`. state: the cache layer. text: real tokens,
    and separators of documents, both `[batch]`. Returns query and the top slot's mean key, both unrotated and with the
    gate channel times `gates.keep`.
    """
    held = ("sums", "length", "table", "used", "values", "ended")
    return _take("absorb", (query, key, value, *text), state, held, gates)


def admit(
    query: Tensor, key: Tensor, value: Tensor, state: Any, text: tuple[Tensor, Tensor], gates: Any
) -> tuple[Tensor, Tensor]:
    """As `absorb`, where tokens are dropped and not merged: the new one is in the last slot, and what was there moves
    to the slot of a token that leaves the window and was given up, if there is one."""
    held = ("length", "table", "used", "keys", "values", "recent", "seen")
    return _take("admit", (query, key, value, text[0]), state, held, gates)


def _take(name: str, token: tuple[Tensor, ...], state: Any, held: tuple[str, ...], gates: Any) -> tuple[Tensor, Tensor]:
    out = torch.empty(token[0].shape, dtype=token[0].dtype), torch.empty(token[1].shape, dtype=token[1].dtype)
    settings = (float(gates.scale), float(gates.offset), float(gates.keep), bool(gates.shared))
    pages, columns = _loop("room")(_array(state.length), state.values.shape[1])
    if pages or columns > state.table.shape[-1]:
        state.make_room(pages, columns)
    arrays = [_array(getattr(state, part)) for part in held]
    _loop(name)(*map(_array, token), settings, *arrays, out[0].numpy(), out[1].numpy())
    return out


def attend(query: Tensor, key: Tensor, state: Any, keep: float, scaling: float) -> Tensor:
    """Store the rotated key of each head's top slot, then attend over the head's slots: `[batch, heads, group, dim]`.

    query: `[batch, heads, group, dim]`, rotated. key: `[batch, heads, dim]`, rotated.
    """
    batch, heads, group, dim = query.shape
    queries, top = _array(query).reshape(-1, group, dim), _array(key).reshape(-1, dim)
    table, length = _array(state.table).reshape(batch * heads, -1), _array(state.length).reshape(-1)
    keys, values = _array(state.keys), _array(state.values)
    work = np.empty((len(length) * -(-table.shape[1] * keys.shape[1] // STRETCH), 3), np.int64)
    count, rows = _loop("store")(queries, top, keys, table, length, float(keep), work, STRETCH)
    work = work[:count]
    found = np.empty((len(work), group, dim + 2), queries.dtype)
    stretch = _loop("stretch")
    threads = torch.get_num_threads() if rows * dim >= THREADED_NUMBERS else 1
    if threads == 1 or len(work) == 1:
        stretch(queries, keys, values, table, work, float(scaling), found, 0, len(work))
    else:
        cuts = [len(work) * i // threads for i in range(threads + 1)]
        jobs = [
            _threads(threads).submit(stretch, queries, keys, values, table, work, float(scaling), found, *cut)
            for cut in pairwise(cuts)
        ]
        for job in jobs:
            job.result()
    out = torch.empty(batch, heads, group, dim, dtype=state.keys.dtype)
    _loop("merge")(found, work, out.numpy().reshape(-1, group, dim))
    return out


class Step(NamedTuple):
    """A decoding step in its two halves, between which the caller rotates query and key; the first is `absorb` where
    tokens merge and `admit` where they are dropped."""

    absorb: Callable[..., tuple[Tensor, Tensor]]
    admit: Callable[..., tuple[Tensor, Tensor]]
    attend: Callable[..., Tensor]


COMPILED = Step(absorb, admit, attend)


@lru_cache(maxsize=1)
def _threads(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count)


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().contiguous().numpy()


def _loop(name: str) -> Any:
    """A loop, compiled for the dtypes it meets; the machine code is kept on disk between processes."""
    if name not in LOOPS:
        try:
            from numba import njit
        except ImportError as error:  # said to be there by `usable`, but broken
            raise RuntimeError("numba is installed but cannot be imported: repair or uninstall it") from error
        LOOPS[name] = njit(_SOURCES[name], nogil=True, fastmath=FAST, cache=True)
    return LOOPS[name]


def _recurrence(alpha, terms, start, sums):
    for row in range(terms.shape[0]):
        last = start[row]
        for t in range(terms.shape[1]):
            a = alpha[row, t]
            for c in range(terms.shape[2]):
                # 0 * infinity must not matter: a closed slot leaves nothing behind
                sums[row, t, c] = terms[row, t, c] + (a * last[c] if a != 0 else 0)
            last = sums[row, t]


def _room(length, page):
    """Pages, and columns of the table, that one token more in each head may need."""
    pages, columns = 0, 0
    for b in range(length.shape[0]):
        for h in range(length.shape[1]):
            pages += length[b, h] % page == 0
            columns = max(columns, length[b, h] // page + 1)
    return pages, columns


def _absorb(query, key, value, valid, ends, gates, sums, length, table, used, values, ended, out_query, out_key):
    scale, offset, keep, shared = gates
    batch, heads, group, dim = query.shape
    page = values.shape[1]
    for b in range(batch):
        opens = ended[b] or ends[b] or length[b, 0] == 0
        mean = 0.0
        for h in range(heads):
            mean += key[b, h, dim - 1] / heads
        for h in range(heads):
            weighs = 0.0
            for g in range(group):
                weighs += query[b, h, g, dim - 1] / group
                for c in range(dim):
                    out_query[b, h, g, c] = query[b, h, g, c]
                out_query[b, h, g, dim - 1] *= keep
            logit = scale * (mean if shared else key[b, h, dim - 1]) - offset
            weight = 1.0 / (1.0 + math.exp(-(scale * weighs + offset))) + 2.0**-23 if keep == 0 else 1.0
            if valid[b]:
                if opens or keep != 0 or not logit > 0:
                    for c in range(2 * dim + 1):
                        sums[b, h, c] = 0
                    if length[b, h] % page == 0:
                        table[b, h, length[b, h] // page] = used[0]
                        used[0] += 1
                    length[b, h] += 1
                for c in range(dim):
                    sums[b, h, c] += weight * key[b, h, c]
                    sums[b, h, dim + c] += weight * value[b, h, c]
                sums[b, h, 2 * dim] += weight
            total = sums[b, h, 2 * dim]
            for c in range(dim):
                out_key[b, h, c] = sums[b, h, c] / total if total > 0 else 0
            out_key[b, h, dim - 1] *= keep
            if length[b, h] > 0:
                top = length[b, h] - 1
                for c in range(dim):
                    values[table[b, h, top // page], top % page, c] = sums[b, h, dim + c] / total
        if valid[b]:
            ended[b] = ends[b]


def _admit(query, key, value, valid, gates, length, table, used, keys, values, recent, seen, out_query, out_key):
    scale, offset, keep, shared = gates
    batch, heads, group, dim = query.shape
    page, size = values.shape[1], recent.shape[2]
    for b in range(batch):
        now, before = seen[b] % size, (seen[b] - 1) % size
        mean = 0.0
        for h in range(heads):
            mean += key[b, h, dim - 1] / heads
        for h in range(heads):
            for c in range(dim):
                for g in range(group):
                    out_query[b, h, g, c] = query[b, h, g, c] * (keep if c == dim - 1 else 1)
                out_key[b, h, c] = key[b, h, c] * (keep if c == dim - 1 else 1)
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
                if length[b, h] % page == 0:
                    table[b, h, length[b, h] // page] = used[0]
                    used[0] += 1
                length[b, h] += 1
            top = length[b, h] - 1
            recent[b, h, now] = top
            for c in range(dim):
                values[table[b, h, top // page], top % page, c] = value[b, h, c]
        if valid[b]:
            seen[b] += 1


def _store(query, key, keys, table, length, keep, work, stretch):
    """Also cuts the work into (head, first row, last row + 1), an empty piece for a head without a slot; returns how
    many pieces and rows there are."""
    count, rows = 0, 0
    page, dim = keys.shape[1], keys.shape[2]
    for row in range(key.shape[0]):
        for g in range(query.shape[1]):
            query[row, g, dim - 1] *= keep
        key[row, dim - 1] *= keep
        if length[row] > 0:
            top = length[row] - 1
            for c in range(dim):
                keys[table[row, top // page], top % page, c] = key[row, c]
        rows += length[row]
        for first in range(0, max(1, length[row]), stretch):
            work[count, 0], work[count, 1], work[count, 2] = row, first, min(first + stretch, length[row])
            count += 1
    return count, rows


def _stretch(query, keys, values, table, work, scaling, found, first, last):
    """For each piece of work: weighted sum of values, sum of weights and maximum score, per query head."""
    page, group, dim = keys.shape[1], query.shape[1], query.shape[2]
    scores = np.empty((group, BLOCK), query.dtype)
    for item in range(first, last):
        row, begin, end = work[item, 0], work[item, 1], work[item, 2]
        out = found[item]
        for g in range(group):
            for c in range(dim + 1):
                out[g, c] = 0
            out[g, dim + 1] = LOWEST
        for start in range(begin, end, BLOCK):
            stop = min(start + BLOCK, end)
            for slot in range(start, stop):
                line = keys[table[row, slot // page], slot % page]
                for g in range(group):
                    total = query[row, g, 0] * line[0]
                    for c in range(1, dim):
                        total += query[row, g, c] * line[c]
                    scores[g, slot - start] = total * scaling
            for g in range(group):
                highest = out[g, dim + 1]
                for i in range(stop - start):
                    highest = max(highest, scores[g, i])
                shrink = math.exp(out[g, dim + 1] - highest) if out[g, dim] > 0 else out[g, dim] * 0
                out[g, dim + 1] = highest
                for c in range(dim + 1):
                    out[g, c] *= shrink
                for i in range(stop - start):
                    scores[g, i] = math.exp(scores[g, i] - highest)
                    out[g, dim] += scores[g, i]
            for slot in range(start, stop):
                line = values[table[row, slot // page], slot % page]
                for g in range(group):
                    weight = scores[g, slot - start]
                    for c in range(dim):
                        out[g, c] += weight * line[c]


def _merge(found, work, out):
    group, dim = out.shape[1], out.shape[2]
    item = 0
    for row in range(out.shape[0]):
        end = item
        while end < len(work) and work[end, 0] == row:
            end += 1
        for g in range(group):
            highest = found[item, g, dim + 1]
            for c in range(dim):
                out[row, g, c] = 0
            for i in range(item, end):
                highest = max(highest, found[i, g, dim + 1])
            total = found[item, g, dim] * 0
            for i in range(item, end):
                if found[i, g, dim] > 0:
                    factor = math.exp(found[i, g, dim + 1] - highest)
                    total += factor * found[i, g, dim]
                    for c in range(dim):
                        out[row, g, c] += factor * found[i, g, c]
            if total > 0:
                for c in range(dim):
                    out[row, g, c] /= total
        item = end


_SOURCES = {
    "recurrence": _recurrence,
    "room": _room,
    "absorb": _absorb,
    "admit": _admit,
    "store": _store,
    "stretch": _stretch,
    "merge": _merge,
}
