"""The loops of attention over slots and of the recurrence of `pool`, compiled by numba where that is installed.

One query over a cache is bound by memory: every key and value row is read once for all query heads of its group, and
row after row of a page, since several streams of reads at once are slower than one. What is computed meanwhile has to
keep up, so exponentials are a polynomial (a call for each would not be vectorized), and a 0 is one of the
numbers' own type (a plain one would make sums double). Work is cut into pieces of a head's slots. Threads draw numbers
for the next piece, so neither a long head nor a busy core keeps the others waiting; who finishes the last piece of a
head merges what its pieces found by their log-sum-exp. Rows in half precision are widened as they are read.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

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
POWERS = tuple(math.log(2) ** n / math.factorial(n) for n in reversed(range(14)))  # of 2 ** x, highest first
carray: Any = numba.carray
compiled: Any = numba.njit(**OPTIONS)
machine: Any = extending.intrinsic


class Places(NamedTuple):
    """What a step is told: the addresses of these, in this order.

    sizes: batch, heads, group, dim, pages, rows of a page, columns of the table, pieces of a head, channels that are
    rotated, rotations (1 or batch), newest tokens that stay, whether decisions are shared. factors: scale, offset and
    keep of gates, and what scores are multiplied by, in float64. missing: room to say which pages and columns are
    missing `[2]`; nothing is done then. query: `[batch, heads, group, dim]`. key, value: `[batch, heads, dim]`. cos,
    sin: `[rotations, channels]`. valid, ends: real tokens and separators `[batch]`. From keys to seen: those of the
    cache. Room: turned, as query; found, what pieces find `[rows, pieces, group, dim + 2]`, where a row is a head of a
    sequence; counters `[rows + 1]`. out: the result, as query.
    """

    sizes: Any
    factors: Any
    missing: Any
    query: Any
    key: Any
    value: Any
    cos: Any
    sin: Any
    valid: Any
    ends: Any
    keys: Any
    values: Any
    table: Any
    used: Any
    sums: Any
    length: Any
    ended: Any
    recent: Any
    seen: Any
    turned: Any
    found: Any
    counters: Any
    out: Any


AT = Places(*range(len(Places._fields)))


def step_function(body: Any) -> Any:
    """A C function of a pointer to those addresses."""
    return numba.cfunc(types.void(types.CPointer(types.voidptr)), **OPTIONS)(body)


def kinds(dtype: str) -> tuple[Any, Any]:
    """How numbers of the pools are read, and in what is computed with them."""
    stored = STORED[dtype]
    return stored, np.float64 if stored is np.float64 else np.float32


def attends(dtype: str) -> Any:
    """The loop over all heads, which any number of threads may run at once. dtype: of the pools."""
    stored, kind = kinds(dtype)

    def body(at):
        batch, heads, group, dim, pages, page, columns, pieces, _, _, _, _ = carray(at[AT.sizes], (12,), np.int64)
        rows = batch * heads
        _attend(
            carray(at[AT.turned], (rows, group, dim), kind),
            carray(at[AT.table], (rows, columns), np.int64),
            carray(at[AT.length], (rows,), np.int64),
            carray(at[AT.keys], (pages, page, dim), stored),
            carray(at[AT.values], (pages, page, dim), stored),
            carray(at[AT.found], (rows, pieces, group, dim + 2), kind),
            carray(at[AT.counters], (rows + 1,), np.int64),
            carray(at[AT.out], (rows, group, dim), kind),
        )

    return step_function(body)


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


# ---- attention


@compiled
def _attend(query, table, length, keys, values, found, counters, out):
    """What one thread does. counters: pieces finished of each head, and drawn of all."""
    rows, pieces, group, _ = found.shape
    scores = np.empty((group, PIECE), query.dtype)
    while True:
        item = _draw(counters, rows)
        if item >= rows * pieces:
            break
        row, piece = item // pieces, item % pieces
        begin, end = piece * PIECE, min((piece + 1) * PIECE, length[row])
        if begin >= end:
            continue
        _score(query[row], keys, table[row], begin, end, scores)
        for g in range(group):
            _soften(scores[g, : end - begin], found[row, piece, g])
        _gather(scores, values, table[row], begin, end, found[row, piece])
        held = -(-length[row] // PIECE)
        if _draw(counters, row) == held - 1:
            _merge(found[row, :held], out[row])


@compiled
def _score(query, keys, table, begin, end, scores):
    (group, dim), page, kind = query.shape, keys.shape[1], query.dtype.type
    for start in range(begin, end, page):
        rows = keys[table[start // page]]
        for i in range(min(page, end - start)):
            for g in range(group):
                total = kind(0)
                for c in range(dim):
                    total += query[g, c] * _wide(rows[i, c])
                scores[g, start - begin + i] = total


@compiled
def _soften(scores, found):
    """Scores become weights; the weights' sum and the highest score stand behind where the weighted values will be."""
    dim, kind = len(found) - 2, scores.dtype.type
    highest, total = scores[0], kind(0)
    for i in range(len(scores)):
        highest = max(highest, scores[i])
    for i in range(len(scores)):
        scores[i] = _power(scores[i] - highest)
        total += scores[i]
    for c in range(dim):
        found[c] = 0
    found[dim], found[dim + 1] = total, highest


@compiled
def _gather(weights, values, table, begin, end, found):
    (group, dim), page = (found.shape[0], values.shape[2]), values.shape[1]
    for start in range(begin, end, page):
        rows, at, count = values[table[start // page]], start - begin, min(page, end - start)
        fours = count // 4 * 4
        for i in range(0, fours, 4):
            for g in range(group):
                w, x, y, z = weights[g, at + i], weights[g, at + i + 1], weights[g, at + i + 2], weights[g, at + i + 3]
                for c in range(dim):
                    near = w * _wide(rows[i, c]) + x * _wide(rows[i + 1, c])
                    found[g, c] += near + (y * _wide(rows[i + 2, c]) + z * _wide(rows[i + 3, c]))
        for i in range(fours, count):
            for g in range(group):
                for c in range(dim):
                    found[g, c] += weights[g, at + i] * _wide(rows[i, c])


@compiled
def _merge(found, out):
    (group, dim), kind = out.shape, out.dtype.type
    for g in range(group):
        highest, total = found[0, g, dim + 1], kind(0)
        for i in range(len(found)):
            highest = max(highest, found[i, g, dim + 1])
        for c in range(dim):
            out[g, c] = 0
        for i in range(len(found)):
            factor = _power(found[i, g, dim + 1] - highest)
            total += factor * found[i, g, dim]
            for c in range(dim):
                out[g, c] += factor * found[i, g, c]
        for c in range(dim):
            out[g, c] /= total


@compiled
def _power(x):
    """2 ** x for x up to 0, and 2 ** -126 for less than that."""
    kind = type(x)
    x = max(x, kind(-126))
    whole = np.floor(x + kind(0.5))
    rest, total = x - whole, kind(0)
    for factor in POWERS:
        total = total * rest + kind(factor)
    return _shifted(total, whole)


# ---- what numba has no words for


@machine
def _draw(typingctx, counters, place):
    """The number that a counter holds, which then holds the next, whoever else draws."""

    def codegen(context, builder, signature, arguments):
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        at = builder.gep(array.data, [arguments[1]])
        return builder.atomic_rmw("add", at, context.get_constant(types.int64, 1), "acq_rel")

    return types.int64(counters, place), codegen


@machine
def _shifted(typingctx, number, power):
    """number * 2 ** power, where power is whole and above -127."""

    def codegen(context, builder, signature, arguments):
        integer, bias, bits = (types.int32, 127, 23) if number == types.float32 else (types.int64, 1023, 52)
        exponent = builder.fptosi(arguments[1], context.get_value_type(integer))
        exponent = builder.add(exponent, context.get_constant(integer, bias))
        exponent = builder.shl(exponent, context.get_constant(integer, bits))
        return builder.fmul(arguments[0], builder.bitcast(exponent, context.get_value_type(number)))

    return number(number, number), codegen


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


@machine
def narrow(typingctx, number, like):
    """A number as one of the kind of `like` is stored: as it is, or rounded, the reverse of `_wide`."""

    def codegen(context, builder, signature, arguments):
        if isinstance(like, types.Float):
            return arguments[0]

        def constant(value: int) -> Any:
            return context.get_constant(types.int32, value)

        scale, shift, infinity, none = (2.0**-112, 13, 0x7C00, 0x7E00) if like.signed else (1.0, 16, 0x7F80, 0x7FC0)
        small = builder.fmul(arguments[0], context.get_constant(types.float32, scale))
        bits = builder.bitcast(small, context.get_value_type(types.int32))
        sign = builder.and_(builder.lshr(bits, constant(16)), constant(0x8000))
        size = builder.and_(bits, constant(0x7FFFFFFF))
        odd = builder.and_(builder.lshr(size, constant(shift)), constant(1))  # a tie goes to the even one
        size = builder.add(builder.add(size, odd), constant(2 ** (shift - 1) - 1))
        size = builder.lshr(size, constant(shift))
        most = builder.select(builder.fcmp_unordered("uno", small, small), constant(none), constant(infinity))
        size = builder.select(builder.icmp_unsigned("<", size, most), size, most)
        return builder.trunc(builder.or_(sign, size), context.get_value_type(like))

    return like(number, like), codegen
