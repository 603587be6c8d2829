"""How a state-space scan is computed: a matter of speed alone, the function is the same.

Mamba-2 is computed in chunks (arXiv 2405.21060, section 6): quadratic inside a chunk, a recurrence from chunk to
chunk. Checkpoints name a chunk that suits a GPU kernel; a CPU spends most of a step on the quadratic part of those.
For a single token the scan is one update of the state, many small operations on a CPU, which compiling makes few.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

CHUNK = {"cpu": 32, "meta": 32}  # without weights: another process has them, on its CPU


@contextmanager
def suited_scans(model: PreTrainedModel) -> Iterator[None]:
    """Within this context scans of the model work on chunks that suit its device, never larger than its own."""
    most = CHUNK.get(model.device.type)
    before = {mixer: mixer.chunk_size for mixer in _mixers(model)}
    for mixer, chunk in before.items():
        mixer.chunk_size = chunk if most is None else min(chunk, most)
    try:
        yield
    finally:
        for mixer, chunk in before.items():
            mixer.chunk_size = chunk


@contextmanager
def compiled_steps(model: PreTrainedModel, backend: str = "inductor") -> Iterator[None]:
    """Within this context mixers with a scan compute single tokens compiled (`torch.compile`), longer texts as ever.

    For decoding with a cache; the first steps take the time of compiling. backend: of `torch.compile`; its default
    needs a C++ compiler on a CPU. Models without such mixers are left alone.
    """
    mixers = _mixers(model)
    for mixer in mixers:
        mixer.__dict__["forward"] = _stepping(mixer.forward, backend)
    try:
        yield
    finally:
        for mixer in mixers:
            mixer.__dict__.pop("forward", None)


def _stepping(plain: Callable[..., Any], backend: str) -> Callable[..., Any]:
    """A mixer's forward, compiled for one token."""

    def step(*args: Any, **kwargs: Any) -> Any:
        return plain(*args, **kwargs)

    # What is compiled is kept with the code object, up to a limit: every mixer gets one of its own.
    step.__code__ = step.__code__.replace()
    compiled = torch.compile(step, backend=backend, dynamic=False)

    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        return (compiled if hidden.shape[1] == 1 else plain)(*args, **kwargs)

    return forward


def _mixers(model: nn.Module) -> list[Any]:
    """Modules with a scan: they have the rates of its decay, and a chunk."""
    return [m for m in model.modules() if isinstance(getattr(m, "chunk_size", None), int) and hasattr(m, "A_log")]
