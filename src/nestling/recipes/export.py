"""`nestling export`: a model as one GGUF file, for llama.cpp."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nestling.errors import CheckpointError
from nestling.hub.to_gguf import save_gguf
from nestling.recipes.progress import console
from nestling.recipes.run import check_place
from nestling.recipes.settings import ModelSettings
from nestling.recipes.source import load
from nestling.train import documented


@documented
@dataclass
class ExportSettings(ModelSettings):
    """Settings of `export`.

    Args:
        model: Hub id, folder, GGUF file, or builtin:smollm2-135m-instruct.
        out: File to write, NAME.gguf.
        type: Of the matrices in it: float32, float16 or bfloat16; the model's own unless given.
        tokenizer: Write the tokenizer and its chat template too.
        overwrite: Replace the file.
    """

    model: str
    out: str
    type: str = "auto"
    tokenizer: bool = True
    overwrite: bool = False


def export(settings: ExportSettings) -> dict[str, Any]:
    """Write the file; returns where it is and its size."""
    target = Path(settings.out)
    if target.suffix != ".gguf":
        raise CheckpointError(f"'{settings.out}' is not a .gguf file: models in folders are ready for other programs")
    if target.exists() and not settings.overwrite:
        raise CheckpointError(f"'{settings.out}' exists: name another file, or give --overwrite")
    check_place(target)
    model, tokenizer = load(settings, settings.model)
    save_gguf(model, target, tokenizer if settings.tokenizer else None, settings.type)
    size = target.stat().st_size
    console.print(f"file: {target} ({size / 1e6:.1f} MB)")
    return {"file": str(target), "bytes": size}
