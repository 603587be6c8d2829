"""What can be known about a checkpoint folder without reading its weights.

Reads JSON files and the headers of safetensors files (a few kilobytes each): existence, readability, the shards of an
index, and whether each file is as long as its header says. Knows nothing about models.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from nestling.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
JSON_FILES = ("config.json", "generation_config.json", "tokenizer_config.json", INDEX)
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def check_folder(folder: Path) -> None:
    """Raise `CheckpointError` unless `folder` holds a `config.json` and its JSON files can be read."""
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"'{folder}' has no config.json: give the folder that save_pretrained (or git) made")
    for name in JSON_FILES:
        if (folder / name).exists():
            read_json(folder / name)


def check_weights(folder: Path) -> None:
    """Raise `CheckpointError` unless all safetensors files of `folder` are there and whole."""
    if (folder / INDEX).exists():
        for file, expected in _shards(folder).items():
            missing = expected - tensor_names(folder / file)
            if missing:
                raise CheckpointError(
                    f"'{folder / file}' lacks the tensor '{min(missing)}' that {INDEX} places in it: copy it again"
                )
    elif (folder / SINGLE).exists():
        tensor_names(folder / SINGLE)
    else:
        raise CheckpointError(_no_weights(folder))


def tensor_names(file: Path) -> set[str]:
    """Names of the tensors in a safetensors file. Raises `CheckpointError` when it is missing, cut off or corrupt."""
    if not file.is_file():
        raise CheckpointError(f"the weight file '{file}' is missing: copy or download the checkpoint again")
    try:
        with safe_open(file, framework="pt") as tensors:
            return set(tensors.keys())
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"'{file}' is cut off or corrupt ({first_line(error)}): copy or download the checkpoint again"
        ) from error


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises `CheckpointError`."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"'{file}' cannot be read as JSON ({first_line(error)}): copy it again") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"'{file}' holds a JSON {type(found).__name__} instead of an object: copy it again")
    return found


def first_line(error: BaseException) -> str:
    """What an exception says in its first line (two, if that ends with a colon): to be quoted within a sentence."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    text = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    text = text.rstrip(".:")
    return text if len(text) <= 300 else text[:297] + "..."


def _shards(folder: Path) -> dict[str, set[str]]:
    places = read_json(folder / INDEX).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise CheckpointError(f"'{folder / INDEX}' has no weight_map: copy or download the checkpoint again")
    shards: dict[str, set[str]] = {}
    for tensor, file in places.items():
        shards.setdefault(str(file), set()).add(tensor)
    return shards


def _no_weights(folder: Path) -> str:
    pickles = [file.name for pattern in PICKLES for file in folder.glob(pattern)]
    if pickles:
        return (
            f"'{folder}' holds its weights only as pickle ({pickles[0]}), which can run code and is not read: "
            f"convert it to safetensors first"
        )
    return f"'{folder}' has no {SINGLE}: give a checkpoint folder with its weights"
