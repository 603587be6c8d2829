"""How many tokens a state-space scan works on at once: a matter of speed alone, the function is the same.

Mamba-2 is computed in chunks (arXiv 2405.21060, section 6): quadratic inside a chunk, a recurrence from chunk to
chunk. Checkpoints name a chunk that suits a GPU kernel; a CPU spends most of a step on the quadratic part of those.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel

CHUNK = {"cpu": 32}


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


def _mixers(model: nn.Module) -> list[Any]:
    """Modules with a scan: they have the rates of its decay, and a chunk."""
    return [m for m in model.modules() if isinstance(getattr(m, "chunk_size", None), int) and hasattr(m, "A_log")]
