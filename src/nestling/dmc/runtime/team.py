"""Runs a compiled loop in torch's own threads: those of the OpenMP library that torch is linked to.

A pool of our own would compete with torch's, whose threads spin for a while after each operation in wait of the next;
on few cores that costs more than the threads bring. Where torch has no OpenMP of the usual kind (Windows), Python
threads serve. The loop must share out its work itself: every thread runs it with the same arguments.
"""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch


def run(address: int, arguments: Any, threads: int) -> None:
    """Call the C function at `address` with a pointer to `arguments`, in that many threads at once."""
    if threads == 1:
        _function(address)(arguments)
    elif (parallel := _team()) is not None:
        parallel(address, arguments, threads, 0)
    else:
        for job in [_pool(threads).submit(_function(address), arguments) for _ in range(threads)]:
            job.result()


@lru_cache
def _function(address: int) -> Any:
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address)


@lru_cache
def _team() -> Any:
    """`GOMP_parallel` as torch itself finds it, whichever OpenMP it came with; None if there is none."""
    folder = Path(torch.__file__).parent / "lib"
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        if (folder / name).exists():
            try:
                parallel = ctypes.CDLL(str(folder / name)).GOMP_parallel
            except (OSError, AttributeError):
                return None
            parallel.argtypes, parallel.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint), None
            return parallel
    return None


@lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads)
