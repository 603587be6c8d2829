"""A decoding step over heads of different length, and the recurrence of `pool`, by compiled loops on a CPU.

The loops are in `loops` and `takes`, the threads that run them in `team`. Without numba, or for other devices and
dtypes, `usable` is False and callers take what `ragged` has for the device, which computes the same.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .gates import wide
from .team import run

THREADED_NUMBERS = 2**18  # keys and values below which more threads cost more than they bring
Text = tuple[Tensor, Tensor]
Turn = tuple[Tensor, Tensor]
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def usable(*tensors: Tensor) -> bool:
    """Whether the compiled loops take these tensors: on a CPU, of a floating dtype, and numba is installed."""
    return _has_numba() and all(tensor.device.type == "cpu" and tensor.dtype in DTYPES for tensor in tensors)


@lru_cache
def _has_numba() -> bool:
    return find_spec("numba") is not None and os.environ.get("NUMBA_DISABLE_JIT", "0") == "0"


def recurrence(alpha: Tensor, terms: Tensor, start: Tensor) -> Tensor:
    """S_t = alpha_t S_{t-1} + x_t; see `pool.running_sums`. In float32 or float64."""
    seq, width = terms.shape[-2:]
    sums = torch.empty(terms.shape, dtype=terms.dtype)
    _loops().recurrence(
        _array(alpha.to(terms.dtype)).reshape(-1, seq),
        _array(terms).reshape(-1, seq, width),
        _array(start.to(terms.dtype)).reshape(-1, width),
        sums.numpy().reshape(-1, seq, width),
    )
    return sums


def absorb(
    query: Tensor, key: Tensor, value: Tensor, state: Any, text: Text, gates: Any, turn: Turn | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Merge or append one token per sequence: updates sums, lengths and the page table.

    query: `[batch, heads, group, dim]`. key, value: `[batch, heads, dim]`. state: the cache layer. text: real tokens,
    and separators of documents, both `[batch]`. turn: cosines and sines of a rotation of channels i and i + half, both
    `[batch or 1, 1, channels]`. Returns query and the top slot's mean key, rotated if `turn` is given, with the gate
    channel times `gates.keep` before and after that, and its mean value; key and value are still to be stored.
    """
    precise = state.sums.dtype
    states = [part.to(precise).contiguous() for part in (query, key, value)]
    out = [torch.empty(part.shape, dtype=precise) for part in states]
    given = [*states, *text, *_angles(turn, query, precise)]
    _take(_compiled("absorbs", precise), given, ("sums", "length", "table", "used", "ended"), out, state, gates)
    return (out[0], out[1], out[2]) if turn else (out[0].to(query.dtype), out[1].to(key.dtype), out[2].to(value.dtype))


def admit(
    query: Tensor, key: Tensor, value: Tensor, state: Any, text: Text, gates: Any, turn: Turn | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """As `absorb`, where tokens are dropped and not merged: the new one is in the last slot, and what was there moves
    to the slot of a token that leaves the window and was given up, if there is one."""
    precise = wide(state.keys.dtype)
    states = [part.to(precise).contiguous() for part in (query, key)]
    out = [torch.empty(part.shape, dtype=precise) for part in states]
    given, held = [*states, text[0], *_angles(turn, query, precise)], ("length", "table", "used", "recent", "seen")
    _take(_compiled("admits", state.keys.dtype), given, ("keys", "values", *held), out, state, gates)
    return (out[0], out[1], value) if turn else (out[0].to(query.dtype), out[1].to(key.dtype), value)


def attend(query: Tensor, top: tuple[Tensor, Tensor], real: Tensor, state: Any, keep: float, scaling: float) -> Tensor:
    """Store key and value of each head's top slot, then attend over the head's slots: `[batch, heads, group, dim]`.

    query: `[batch, heads, group, dim]`, rotated. top: rotated key, and value `[batch, heads, dim]`. real: rows whose
    token is no padding `[batch]`; others change nothing. keep: factor of the gate channel of both. Query and key may be
    written to.
    """
    batch, heads, group, dim = query.shape
    stored, precise = state.keys.dtype, wide(state.keys.dtype)
    pages, page, _ = state.keys.shape
    pieces = -(-state.table.shape[-1] * page // _loops().PIECE)
    if keep != 1:
        top[0][..., -1] *= keep
    given = (query.to(precise), top[0].to(stored), top[1].to(stored), real, state.table, state.length)
    found = torch.empty(batch, heads, pieces, group, dim + 2, dtype=precise)
    counters = torch.zeros(batch * heads + 1, dtype=torch.long)
    out = torch.zeros(query.shape, dtype=precise)  # a head without a slot has only seen padding
    tensors = [*(tensor.contiguous() for tensor in given), state.keys, state.values, found, counters, out]
    sizes = (ctypes.c_int64 * 8)(batch, heads, group, dim, pages, page, state.table.shape[-1], pieces)
    factors = (ctypes.c_double * 2)(keep, scaling)
    addresses = [ctypes.addressof(sizes), ctypes.addressof(factors), *(tensor.data_ptr() for tensor in tensors)]
    threads = torch.get_num_threads() if state.keys.numel() >= THREADED_NUMBERS else 1
    run(_compiled("attends", stored).address, (ctypes.c_void_p * len(addresses))(*addresses), threads)
    return out.to(query.dtype)


class Step(NamedTuple):
    """A decoding step in its two halves, the first of which is `absorb` where tokens merge and `admit` where they are
    dropped. Between them the caller rotates query and key, unless the first half did (`turns` says that it can)."""

    absorb: Callable[..., tuple[Tensor, Tensor, Tensor]]
    admit: Callable[..., tuple[Tensor, Tensor, Tensor]]
    attend: Callable[..., Tensor]
    turns: bool = False


COMPILED = Step(absorb, admit, attend, turns=True)


def _take(
    function: Any, given: list[Tensor], names: tuple[str, ...], out: list[Tensor], state: Any, gates: Any
) -> None:
    """Take the first half of a step, after making room where it says that some is missing."""
    missing = (ctypes.c_int64 * 2)()
    factors = (ctypes.c_double * 3)(gates.scale, gates.offset, gates.keep)
    given = [tensor.contiguous() for tensor in given]
    turned, newest = given[-1].shape[-1], state.recent.shape[-1]
    for name in names:
        setattr(state, name, getattr(state, name).contiguous())  # what it changes must not be a copy
    while True:
        room = (*state.keys.shape[:2], state.table.shape[-1])
        sizes = (ctypes.c_int64 * 10)(*given[0].shape, *room, turned, gates.shared, newest)
        tensors = [*given, *(getattr(state, name) for name in names), *out]
        addresses = [ctypes.addressof(part) for part in (sizes, factors, missing)]
        addresses += [tensor.data_ptr() for tensor in tensors]
        run(function.address, (ctypes.c_void_p * len(addresses))(*addresses), 1)
        if not missing[1]:
            return
        state.make_room(*missing)


def _angles(turn: Turn | None, query: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines `[batch, channels]`; no channels where nothing is rotated."""
    if turn is None:
        return torch.empty(0, dtype=dtype), torch.empty(0, dtype=dtype)
    cos, sin = (part[:, 0].to(dtype).expand(len(query), -1) for part in turn)
    return cos, sin


def _array(tensor: Tensor) -> np.ndarray:
    return (tensor.detach() if tensor.requires_grad else tensor).contiguous().numpy()


@lru_cache
def _loops() -> Any:
    try:
        from .loops import PIECE, attends, recurrence
        from .takes import absorbs, admits
    except ImportError as error:  # numba is said to be there by `usable`, but broken
        raise RuntimeError("numba is installed but cannot be imported: repair or uninstall it") from error
    return SimpleNamespace(PIECE=PIECE, absorbs=absorbs, admits=admits, attends=attends, recurrence=recurrence)


@lru_cache
def _compiled(name: str, dtype: torch.dtype) -> Any:
    return getattr(_loops(), name)(str(dtype).removeprefix("torch."))
