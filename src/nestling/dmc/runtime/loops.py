"""The loops of attention over slots and of the recurrence of `pool`, compiled by numba where that is installed.

One query over a cache is bound by memory: every key and value row is read once for all query heads of its group, and
four pages at once, as one stream of reads alone leaves half of the memory's speed unused. Work is cut into pieces of a
head's slots. Threads draw numbers for the next piece, so neither a long head nor a busy core keeps the others waiting;
who finishes the last piece of a head merges what its pieces found by their log-sum-exp. Rows in half precision are
widened as they are read.
"""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np
from numba import extending, types

PIECE = 512  # slots
OPTIONS: dict[str, Any] = {
    "nogil": True,
    "cache": True,
    "error_model": "numpy",
    "fastmath": {"reassoc", "contract", "arcp", "nsz", "afn"},
}
STORED = {"float32": np.float32, "float64": np.float64, "bfloat16": np.uint16, "float16": np.int16}  # how rows are read
carray: Any = numba.carray
compiled: Any = numba.njit(**OPTIONS)
machine: Any = extending.intrinsic


@compiled
def recurrence(alpha, terms, start, sums):
    for row in range(terms.shape[0]):
        last = start[row]
        for t in range(terms.shape[1]):
            a = alpha[row, t]
            for c in range(terms.shape[2]):
                # 0 * infinity must not matter: a closed slot leaves nothing behind
                sums[row, t, c] = terms[row, t, c] + (a * last[c] if a != 0 else 0)
            last = sums[row, t]


@machine
def _draw(typingctx, counters, place):
    """The number that a counter holds, which then holds the next, whoever else draws."""

    def codegen(context, builder, signature, arguments):
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        at = builder.gep(array.data, [arguments[1]])
        return builder.atomic_rmw("add", at, context.get_constant(types.int64, 1), "acq_rel")

    return types.int64(counters, place), codegen


@machine
def _wide(typingctx, number):
    """A number as it is, or a float32 from the bits of a bfloat16 (unsigned) or a float16 (signed)."""
    single = types.float32

    def codegen(context, builder, signature, arguments):
        if isinstance(number, types.Float):
            return arguments[0]
        bits = builder.zext(arguments[0], context.get_value_type(types.int32))

        def constant(value: int) -> Any:
            return context.get_constant(types.int32, value)

        if not number.signed:
            return builder.bitcast(builder.shl(bits, constant(16)), context.get_value_type(single))
        size = builder.shl(builder.and_(bits, constant(0x7FFF)), constant(13))
        sign = builder.shl(builder.and_(bits, constant(0x8000)), constant(16))
        small = builder.bitcast(builder.or_(size, sign), context.get_value_type(single))
        return builder.fmul(small, context.get_constant(single, 2.0**112))  # the exponents' offsets differ by 112

    return (number if isinstance(number, types.Float) else single)(number), codegen


@compiled
def _attend(query, key, value, real, table, length, keys, values, found, counters, out, keep, scaling):
    """What one thread does: see `attends`. counters: pieces drawn of all, and finished of each head."""
    (rows, pieces), (group, dim), page = found.shape[:2], query.shape[1:], keys.shape[1]
    scores, mine = np.empty((group, PIECE), query.dtype), np.empty((group, dim), query.dtype)
    while True:
        item = _draw(counters, rows)
        if item >= rows * pieces:
            break
        row, piece = item // pieces, item % pieces
        begin, end = piece * PIECE, min((piece + 1) * PIECE, length[row])
        if begin >= end:
            continue
        for g in range(group):
            for c in range(dim):
                mine[g, c] = query[row, g, c] * (keep if c == dim - 1 else 1)
        if end == length[row] and real[row * len(real) // rows]:  # only this piece reads the newest slot
            last = end - 1
            for c in range(dim):
                keys[table[row, last // page], last % page, c] = key[row, c]
                values[table[row, last // page], last % page, c] = value[row, c]
        _score(mine, keys, table[row], begin, end, scaling, scores)
        for g in range(group):
            _soften(scores[g], end - begin, found[row, piece, g])
        _gather(scores, values, table[row], begin, end, found[row, piece])
        held = -(-length[row] // PIECE)
        if _draw(counters, row) == held - 1:
            _merge(found[row, :held], out[row])


@compiled
def _score(query, keys, table, begin, end, scaling, scores):
    page, group, dim = keys.shape[1], query.shape[0], query.shape[1]
    fours = begin + (end - begin) // (4 * page) * (4 * page)
    for start in range(begin, fours, 4 * page):
        p = start // page
        a, b, c, d = keys[table[p]], keys[table[p + 1]], keys[table[p + 2]], keys[table[p + 3]]
        for g in range(group):
            at = start - begin
            for i in range(page):
                w = x = y = z = query[g, 0] * 0
                for k in range(dim):
                    q = query[g, k]
                    w += q * _wide(a[i, k])
                    x += q * _wide(b[i, k])
                    y += q * _wide(c[i, k])
                    z += q * _wide(d[i, k])
                scores[g, at + i], scores[g, at + page + i] = w * scaling, x * scaling
                scores[g, at + 2 * page + i], scores[g, at + 3 * page + i] = y * scaling, z * scaling
    for slot in range(fours, end):
        line = keys[table[slot // page], slot % page]
        for g in range(group):
            total = query[g, 0] * 0
            for k in range(dim):
                total += query[g, k] * _wide(line[k])
            scores[g, slot - begin] = total * scaling


@compiled
def _soften(scores, count, found):
    """Scores become weights; their highest and the weights' sum stand behind where the weighted values will be."""
    dim = found.shape[0] - 2
    highest = scores[0]
    for i in range(1, count):
        highest = max(highest, scores[i])
    total = highest * 0
    for i in range(count):
        scores[i] = math.exp(scores[i] - highest)
        total += scores[i]
    for c in range(dim):
        found[c] = 0
    found[dim], found[dim + 1] = total, highest


@compiled
def _gather(weights, values, table, begin, end, found):
    page, group, dim = values.shape[1], found.shape[0], values.shape[2]
    fours = begin + (end - begin) // (4 * page) * (4 * page)
    for start in range(begin, fours, 4 * page):
        p = start // page
        a, b, c, d = values[table[p]], values[table[p + 1]], values[table[p + 2]], values[table[p + 3]]
        for g in range(group):
            at = start - begin
            for i in range(page):
                w, x = weights[g, at + i], weights[g, at + page + i]
                y, z = weights[g, at + 2 * page + i], weights[g, at + 3 * page + i]
                for k in range(dim):
                    near = w * _wide(a[i, k]) + x * _wide(b[i, k])
                    found[g, k] += near + (y * _wide(c[i, k]) + z * _wide(d[i, k]))
    for slot in range(fours, end):
        line = values[table[slot // page], slot % page]
        for g in range(group):
            weight = weights[g, slot - begin]
            for k in range(dim):
                found[g, k] += weight * _wide(line[k])


@compiled
def _merge(found, out):
    pieces, group, dim = found.shape[0], out.shape[0], out.shape[1]
    for g in range(group):
        highest = found[0, g, dim + 1]
        for i in range(1, pieces):
            highest = max(highest, found[i, g, dim + 1])
        total = highest * 0
        for c in range(dim):
            out[g, c] = 0
        for i in range(pieces):
            factor = math.exp(found[i, g, dim + 1] - highest)
            total += factor * found[i, g, dim]
            for c in range(dim):
                out[g, c] += factor * found[i, g, c]
        for c in range(dim):
            out[g, c] /= total


def attends(dtype: str) -> Any:
    """The loop over all heads as a C function that any number of threads may run at once; it takes addresses.

    They are of: sizes (batch, heads, group, dim, pages, rows of a page, columns, pieces); keep and scaling in float64;
    queries `[rows, group, dim]`, where a row is a head of a sequence; the newest keys and values `[rows, dim]`, which
    sequences have them `[batch]`, table `[rows, columns]`, lengths `[rows]`; pools of keys and of values
    `[pages, page, dim]`; room for what pieces find `[rows, pieces, group, dim + 2]`; zeros `[rows + 1]`; the
    result `[rows, group, dim]`. dtype: of the pools.
    """
    stored = STORED[dtype]
    kind = np.float64 if stored is np.float64 else np.float32

    def body(at):
        batch, heads, group, dim, pages, page, columns, pieces = carray(at[0], (8,), np.int64)
        keep, scaling = carray(at[1], (2,), np.float64)
        rows = batch * heads
        _attend(
            carray(at[2], (rows, group, dim), kind),
            carray(at[3], (rows, dim), stored),
            carray(at[4], (rows, dim), stored),
            carray(at[5], (batch,), np.bool_),
            carray(at[6], (rows, columns), np.int64),
            carray(at[7], (rows,), np.int64),
            carray(at[8], (pages, page, dim), stored),
            carray(at[9], (pages, page, dim), stored),
            carray(at[10], (rows, pieces, group, dim + 2), kind),
            carray(at[11], (rows + 1,), np.int64),
            carray(at[12], (rows, group, dim), kind),
            kind(keep),
            kind(scaling),
        )

    return numba.cfunc(types.void(types.CPointer(types.voidptr)), **OPTIONS)(body)
