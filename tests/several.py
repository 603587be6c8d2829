"""Several processes for a test: forks of this one, connected by gloo, that each run a function."""

import os
import pickle
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def together(count: int, folder: Path, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `function(*arguments)` returns in each of `count` processes; what it raises is an AssertionError here."""
    found = outcomes(count, folder, function, *arguments)
    assert all(code == 0 for code, _ in found), next(result for code, result in found if code)
    return [result for _, result in found]


def outcomes(count: int, folder: Path, function: Callable[..., Any], *arguments: Any) -> list[tuple[int, Any]]:
    """Exit code of each process, and what the function returned or raised there; None where it was killed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    files = [folder / f"result-{rank}" for rank in range(count)]
    for file in files:
        file.unlink(missing_ok=True)
    children = [_fork(rank, count, port, files[rank], function, arguments) for rank in range(count)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    results = [pickle.loads(file.read_bytes()) if file.exists() else None for file in files]
    return list(zip(codes, results, strict=True))


def _fork(rank: int, count: int, port: int, file: Path, function: Callable[..., Any], arguments: tuple) -> int:
    child = os.fork()
    if child:
        return child
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count}
    os.environ.update({name: str(value) for name, value in place.items()})
    code = 1
    try:
        torch.set_num_threads(1)
        result = function(*arguments)
        code = 0
    except BaseException:
        result = traceback.format_exc()
    file.write_bytes(pickle.dumps(result))
    sys.stdout.flush()
    os._exit(code)
