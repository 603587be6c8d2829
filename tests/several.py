"""Several processes for a test: forks of this one, connected by gloo, that each run a function and hand a result back."""

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
    """What `function(*arguments)` returns in each of `count` processes; an exception there is an AssertionError here."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = [_fork(rank, count, port, folder, function, arguments) for rank in range(count)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    results = [pickle.loads((folder / f"result-{rank}").read_bytes()) for rank in range(count)]
    assert codes == [0] * count, next(result for result, code in zip(results, codes, strict=True) if code)
    return results


def _fork(rank: int, count: int, port: int, folder: Path, function: Callable[..., Any], arguments: tuple) -> int:
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
    (folder / f"result-{rank}").write_bytes(pickle.dumps(result))
    sys.stdout.flush()
    os._exit(code)
