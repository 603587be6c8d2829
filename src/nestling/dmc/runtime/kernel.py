"""A decoding step over heads of different length, and the recurrence of `pool`, by compiled loops on a CPU.

The loops are in `takes` and `loops`, the threads that run them in `team`. They are told addresses: to hand over arrays
would take longer than a step over a short text. Without numba, or for other devices and dtypes, `usable` is False and
callers take what `ragged` has for the device, which computes the same.
"""

from __future__ import annotations

import ctypes
import math
import os
from functools import lru_cache
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .gates import Gates, wide
from .heads import Heads, Text
from .slots import SlotLayer
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


def step(heads: Heads, gates: Gates, text: Text, slots: SlotLayer) -> Tensor:
    """See `plain.step`; `heads.turn` must be known. The result is in float32 at least."""
    stored, precise = slots.keys.dtype, wide(slots.keys.dtype)
    assert heads.turn is not None
    states = (heads.query, heads.key, heads.value, *heads.turn)
    given = [*(part.to(precise).contiguous() for part in states), text.valid.contiguous(), text.ends.contiguous()]
    batch, count, group, _, dim = heads.query.shape
    turned, out = torch.empty_like(given[0]), torch.empty_like(given[0])
    counters = torch.empty(batch * count + 1, dtype=torch.long)
    angles, _, channels = heads.turn[0].shape
    factors = (ctypes.c_double * 4)(gates.scale, gates.offset, gates.keep, heads.scaling / math.log(2))
    missing, loops = (ctypes.c_int64 * 2)(), _loops()
    take, attend = _taking(stored, gates.method).address, _attending(stored).address
    while True:
        held, columns = slots.tensors(), slots.table.shape[-1]
        pages, page, _ = slots.keys.shape
        pieces = -(-columns * page // loops.PIECE)
        found = torch.empty(batch * count * pieces * group * (dim + 2), dtype=precise)
        sizes = (ctypes.c_int64 * 12)(
            batch, count, group, dim, pages, page, columns, pieces, channels, angles, gates.recent, gates.shared
        )
        addresses = [ctypes.addressof(part) for part in (sizes, factors, missing)]
        addresses += [part.data_ptr() for part in (*given, *held, turned, found, counters, out)]
        places = (ctypes.c_void_p * len(addresses))(*addresses)
        run(take, places, 1)
        if not missing[1]:
            break
        slots.make_room(*missing)
    run(attend, places, torch.get_num_threads() if slots.keys.numel() >= THREADED_NUMBERS else 1)
    return out


def _array(tensor: Tensor) -> np.ndarray:
    return (tensor.detach() if tensor.requires_grad else tensor).contiguous().numpy()


@lru_cache
def _loops() -> Any:
    try:
        from .loops import PIECE, attends, recurrence
        from .takes import takes
    except ImportError as error:  # numba is said to be there by `usable`, but broken
        raise RuntimeError("numba is installed but cannot be imported: repair or uninstall it") from error
    return SimpleNamespace(PIECE=PIECE, takes=takes, attends=attends, recurrence=recurrence)


@lru_cache
def _taking(dtype: torch.dtype, method: str) -> Any:
    return _loops().takes(str(dtype).removeprefix("torch."), method)


@lru_cache
def _attending(dtype: torch.dtype) -> Any:
    return _loops().attends(str(dtype).removeprefix("torch."))
