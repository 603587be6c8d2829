"""What a source string means, and how a hub id becomes files on this machine.

A string that exists as a path is a path; one that starts with `builtin:` is built in; one that looks like a path
(`./x`, `/x`, `x/y/z`, `x.gguf`) and does not exist is a mistake, and never sent to the hub; the rest are hub ids.
"""

from __future__ import annotations

import os
import re
import socket
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.constants import ENDPOINT
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from nestling.errors import CheckpointError
from nestling.hub.check import first_line

BUILTIN = "builtin:"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
FILES = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]


@dataclass(frozen=True)
class Place:
    """Where a model is: `kind` is one of builtin, folder, gguf, hub."""

    kind: str
    name: str
    path: Path = field(default=Path())


def locate(source: str | Path) -> Place:
    """Say what a source is, from its spelling and the file system alone. Raises `CheckpointError`."""
    name = str(source)
    if name.startswith(BUILTIN):
        return Place("builtin", name[len(BUILTIN) :])
    path = Path(name).expanduser()
    if path.is_file():
        return Place("gguf", name, _gguf_file(path))
    if path.is_dir():
        return _folder(name, path)
    if isinstance(source, Path) or _looks_like_path(name):
        raise CheckpointError(f"'{name}' does not exist: give a model folder, a .gguf file or a hub id")
    return Place("hub", name)


def fetch_config(name: str) -> Path:
    """The local folder that holds `config.json` of a hub id. Raises `CheckpointError`."""
    try:
        return Path(hf_hub_download(name, "config.json", local_files_only=not reachable())).parent
    except (OSError, ValueError) as error:
        raise CheckpointError(_hub_sentence(name, error)) from error


def fetch_snapshot(name: str, code: bool = False, weights: bool = True) -> Path:
    """Download config, tokenizer and safetensors of a hub id; the folder they are in. Raises `CheckpointError`."""
    allow = [*(file for file in FILES if weights or "safetensors" not in file), *(["*.py"] if code else [])]
    # Sub-folders and consolidated* hold second copies of the weights in other layouts.
    ignore = ["*/*", "consolidated*"]
    try:
        return Path(
            snapshot_download(name, allow_patterns=allow, ignore_patterns=ignore, local_files_only=not reachable())
        )
    except (OSError, ValueError) as error:
        raise CheckpointError(_hub_sentence(name, error)) from error


def reachable() -> bool:
    """Whether the hub answers at all: asked once and briefly, where the hub's client would retry for half a minute."""
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        return False
    url = urlsplit(ENDPOINT)
    if getproxies().get(url.scheme):
        return True  # only the proxy can know
    try:
        socket.create_connection((url.hostname or "", url.port or 443), timeout=5).close()
    except OSError:
        return False
    return True


def _folder(name: str, path: Path) -> Place:
    files = sorted(path.glob("*.gguf"))
    if (path / "config.json").exists() or not files:
        return Place("folder", name, path)
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise CheckpointError(f"'{name}' holds {len(files)} GGUF files ({names}): give the path of one of them")
    return Place("gguf", name, files[0])


def _gguf_file(path: Path) -> Path:
    if path.suffix.lower() != ".gguf":
        raise CheckpointError(f"'{path}' is a file, but not a .gguf one: give the folder that holds config.json")
    return path


def _looks_like_path(name: str) -> bool:
    return name.endswith(".gguf") or os.sep * 2 in name or not HUB_ID.fullmatch(name)


def _hub_sentence(name: str, error: Exception) -> str:
    where = f"'{name}' is no folder on this machine, and"
    if isinstance(error, GatedRepoError):
        return f"the hub model '{name}' is gated: accept its terms on its page and log in with `hf auth login`"
    if isinstance(error, (RepositoryNotFoundError, HFValidationError)):
        return f"{where} the hub has no model of that name (or not for you): check the spelling"
    if isinstance(error, LocalEntryNotFoundError):  # also an EntryNotFoundError: it must come first
        return f"{where} the hub cannot be reached: check the network, or give a local folder or builtin: model"
    if isinstance(error, EntryNotFoundError):
        return f"the hub model '{name}' has no config.json: download its .gguf file, if it has one, and give its path"
    if isinstance(error, HfHubHTTPError):
        return f"{where} the hub answered: {first_line(error)}"
    return f"{where} downloading it failed: {first_line(error)}"
