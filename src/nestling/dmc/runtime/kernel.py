"""A decoding step over heads of different length, and the recurrence of `pool`, by compiled loops on a CPU.

The loops are in `loops`, the threads that run them in `team`. Without numba, or for other devices and dtypes, `usable`
is False and callers take what `ragged` has for the device, which computes the same.
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
    query: Tensor, key: Tensor, value: Tensor, state: Any, text: tuple[Tensor, Tensor], gates: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Merge or append one token per sequence: updates sums, lengths and the page table.

    query: `[batch, heads, group, dim]`. key, value: `[batch, heads, dim]`. state: the cache layer. text: real tokens,
    and separators of documents, both `[batch]`. Returns query and the top slot's mean key, both unrotated and with the
    gate channel times `gates.keep`, and its mean value; key and value are still to be stored.
    """
    states = [_array(_wide(states)) for states in (query, key, value)]
    out = [torch.empty(part.shape, dtype=state.sums.dtype) for part in (query, key, value)]
    found, marks, settings = [part.numpy() for part in out], [_array(mark) for mark in text], _settings(gates)

    def step() -> tuple[int, int]:
        held = (state.sums, state.length, state.table, state.used, state.ended)
        pool = tuple(state.values.shape[:2])
        return _loops().absorb(*states, *marks, settings, pool, *map(_array, held), *found)

    _in_room(step, state)
    return out[0].to(query.dtype), out[1].to(key.dtype), out[2].to(value.dtype)


def admit(
    query: Tensor, key: Tensor, value: Tensor, state: Any, text: tuple[Tensor, Tensor], gates: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """As `absorb`, where tokens are dropped and not merged: the new one is in the last slot, and what was there moves
    to the slot of a token that leaves the window and was given up, if there is one."""
    states = [_array(_wide(states)) for states in (query, key)]
    out = [torch.empty(part.shape, dtype=wide(part.dtype)) for part in (query, key)]
    found, mark, settings = [part.numpy() for part in out], _array(text[0]), _settings(gates)

    def step() -> tuple[int, int]:
        held = (_bits(state.keys), _bits(state.values), state.length, state.table, state.used, state.recent, state.seen)
        return _loops().admit(*states, mark, settings, *map(_array, held), *found)

    _in_room(step, state)
    return out[0].to(query.dtype), out[1].to(key.dtype), value


def attend(query: Tensor, top: tuple[Tensor, Tensor], real: Tensor, state: Any, keep: float, scaling: float) -> Tensor:
    """Store key and value of each head's top slot, then attend over the head's slots: `[batch, heads, group, dim]`.

    query: `[batch, heads, group, dim]`, rotated. top: rotated key, and value `[batch, heads, dim]`. real: rows whose
    token is no padding `[batch]`; others change nothing. Query and key may be written to.
    """
    batch, heads, group, dim = query.shape
    stored, precise = state.keys.dtype, wide(state.keys.dtype)
    pages, page, _ = state.keys.shape
    pieces = -(-state.table.shape[-1] * page // _loops().PIECE)
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
    run(_attends(stored).address, (ctypes.c_void_p * len(addresses))(*addresses), threads)
    return out.to(query.dtype)


class Step(NamedTuple):
    """A decoding step in its two halves, between which the caller rotates query and key; the first is `absorb` where
    tokens merge and `admit` where they are dropped."""

    absorb: Callable[..., tuple[Tensor, Tensor, Tensor]]
    admit: Callable[..., tuple[Tensor, Tensor, Tensor]]
    attend: Callable[..., Tensor]


COMPILED = Step(absorb, admit, attend)


def _in_room(step: Callable[[], tuple[int, int]], state: Any) -> None:
    """Take a step, after making room where it says that some is missing."""
    missing = step()
    if missing[1]:
        state.make_room(*missing)
        step()


def _settings(gates: Any) -> tuple[float, float, float, bool]:
    return float(gates.scale), float(gates.offset), float(gates.keep), bool(gates.shared)


def _bits(pool: Tensor) -> Tensor:
    """Numbers in half precision as whole ones, which numpy knows."""
    return pool.view(torch.int16) if pool.element_size() == 2 else pool


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.element_size() > 2 else tensor.float()


def _array(tensor: Tensor) -> np.ndarray:
    return (tensor.detach() if tensor.requires_grad else tensor).contiguous().numpy()


@lru_cache
def _loops() -> Any:
    try:
        from .loops import PIECE, absorb, admit, attends, recurrence
    except ImportError as error:  # numba is said to be there by `usable`, but broken
        raise RuntimeError("numba is installed but cannot be imported: repair or uninstall it") from error
    return SimpleNamespace(PIECE=PIECE, absorb=absorb, admit=admit, attends=attends, recurrence=recurrence)


@lru_cache
def _attends(dtype: torch.dtype) -> Any:
    return _loops().attends(str(dtype).removeprefix("torch."))
