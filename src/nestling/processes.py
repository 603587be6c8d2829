"""Several processes that work on one job: who is first, sums over all of them, and what the first makes for the rest.

`torchrun` and `accelerate launch` start a program many times and say so in its environment; without them there is one
process, and nothing here does anything. Every process runs the same program on the same input: batches are shared out
by rows, sums are added up in float64, and the first process alone makes texts, writes files and prints. What it
refuses, all refuse. Knows nothing of models; what happens around a whole job is in `nestling.cli.job`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from safetensors.torch import load as tensors_of
from safetensors.torch import save as bytes_of
from torch import Tensor

from nestling import errors
from nestling.errors import NestlingError

# How long one process may work while the others wait for it. A process that is lost is noticed at once, by its closed
# connections and by the launcher; this only bounds a job that hangs.
PATIENCE = timedelta(hours=6)

BROKEN = ("connection", "broken pipe", "nccl", "socket", "peer")  # words of torch's errors

T = TypeVar("T")
_alone = False


def count() -> int:
    """How many processes work on this job."""
    return 1 if _alone else int(os.environ.get("WORLD_SIZE", "1"))


def number() -> int:
    """Which of them this is, from 0."""
    return int(os.environ.get("RANK", "0"))


def is_first() -> bool:
    """Whether this process is the one that writes and prints."""
    return _alone or number() == 0


def device() -> torch.device | None:
    """The accelerator of this process where each has one of its own; None otherwise."""
    if count() == 1 or not torch.cuda.is_available():
        return None
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def start() -> dist.Store | None:
    """Connect the processes, unless they are; returns the store they share if this call made it.

    Raises `NestlingError` when the environment names several processes but not where they meet.
    """
    if count() == 1 or dist.is_initialized():
        return None
    own = device()
    if own is not None:
        torch.cuda.set_device(own)
    try:
        store, rank, world = next(dist.rendezvous("env://", timeout=timedelta(minutes=5)))
    except (ValueError, dist.DistError) as error:
        raise NestlingError(
            f"WORLD_SIZE={count()} says that there are several processes, but they cannot be connected "
            f"({str(error).splitlines()[0]}): start them with torchrun or accelerate launch, or unset WORLD_SIZE"
        ) from error
    backend = "cuda:nccl,cpu:gloo" if own is not None else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=PATIENCE)
    return store


def share(batches: Iterable[Mapping[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """This process's rows of each batch `[batch, ...]`; a batch of which it has none is left out.

    Every row is in exactly one process. Which one changes from batch to batch, so that small batches are shared too.
    """
    parts = count()
    for index, batch in enumerate(batches):
        mine = {name: rows.tensor_split(parts)[(number() + index) % parts] for name, rows in batch.items()}
        if parts == 1:
            yield dict(batch)
        elif all(len(rows) for rows in mine.values()):
            yield mine


def summed(tensor: Tensor) -> Tensor:
    """The sum over all processes, in float64 `[...]`, on the tensor's device; the same in every process."""
    total = tensor.double()
    if count() == 1:
        return total
    start()
    where = _meeting_place(total)
    total = total.to(where, copy=True).contiguous()
    dist.all_reduce(total)
    return total.to(tensor.device)


def first(make: Callable[[], T]) -> T:
    """What `make` returns in the first process, in all of them; the others wait. Plain values, as JSON holds them.

    A `NestlingError` that the first process raises is raised by all.
    """
    if count() == 1:
        return make()
    return json.loads(_from_first(lambda: json.dumps(make()).encode()))


def tensors(make: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """As `first`, for tensors by name; they arrive on the CPU."""
    if count() == 1:
        return dict(make())
    return tensors_of(_from_first(lambda: bytes_of({name: t.cpu().contiguous() for name, t in make().items()})))


def first_here(make: Callable[[], Any]) -> None:
    """Let the first process of each machine make something that the others on it find there; all wait for it.

    What any of them raises, all raise.
    """
    if count() == 1:
        make()
        return
    _made_by(os.environ.get("LOCAL_RANK", "0") == "0", make)


def connection_broke(error: BaseException) -> bool:
    """Whether a collective call failed because a process at its other end is gone."""
    if count() == 1:
        return False
    text = str(error).lower()
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(word in text for word in BROKEN)
    )


def _from_first(make: Callable[[], bytes]) -> bytes:
    """What the first process makes, as bytes; or the error that it met."""
    return _broadcast(_made_by(is_first(), make) or b"")


def _made_by(this_one: bool, make: Callable[[], T]) -> T | None:
    """What `make` returns in the processes that make it, while the others wait; what one of them raises, all raise."""
    start()
    made, error = None, None
    if this_one:
        try:
            with _on_its_own():
                made = make()
        except BaseException as met:
            error = met
    _together(error)
    return made


def _together(error: BaseException | None) -> None:
    """Go on when all processes have come here; if one of them has met an error, all raise the first one's."""
    failed = torch.tensor([count() if error is None else number()])
    failed = failed.to(_meeting_place(failed))
    dist.all_reduce(failed, dist.ReduceOp.MIN)
    source = int(failed)
    if source == count():
        return
    told = json.loads(_broadcast(json.dumps([type(error).__name__, str(error)]).encode(), source))
    raise error if error is not None else _error(*told)


def _broadcast(content: bytes, source: int = 0) -> bytes:
    size = torch.tensor([len(content)])
    size = size.to(_meeting_place(size))
    dist.broadcast(size, source)
    buffer = torch.empty(int(size), dtype=torch.uint8, device=size.device)
    if number() == source and len(content):
        buffer.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
    dist.broadcast(buffer, source)
    return buffer.cpu().numpy().tobytes()


def _error(kind: str, sentence: str) -> Exception:
    """Another process's error as its own type, where it is one of ours."""
    found: Any = getattr(errors, kind, None)
    if isinstance(found, type) and issubclass(found, NestlingError):
        return found(sentence)
    return RuntimeError(f"another process stopped with {kind}: {sentence}")


@contextmanager
def _on_its_own() -> Iterator[None]:
    """While the others wait, this process is all there is."""
    global _alone
    _alone = True
    try:
        yield
    finally:
        _alone = False


def _meeting_place(tensor: Tensor) -> torch.device:
    """Where a tensor can be sent from: its own device if the processes are connected there, else the accelerator."""
    if tensor.device.type == "cpu" and "gloo" not in dist.get_backend_config():
        return torch.device("cuda", torch.cuda.current_device())
    return tensor.device
