"""One run, one folder: settings written first, then the result of each stage as soon as it is there.

A stage whose result is in the folder is read back and not done again, so an interrupted job goes on where it stopped.
Results are written beside their final name and renamed, so none is ever half there. Of several processes the first
writes, and all read; the folder must be one that all of them see. Knows nothing of the stages.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, MutableMapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nestling import hub, processes
from nestling.errors import CheckpointError
from nestling.runs import Hold, difference, hold, plain, write_atomically

T = TypeVar("T")
# Settings that say where or how the job runs, not what it makes.
PLACES = ("out", "overwrite")


class Run:
    """The folder of one run.

    Raises `CheckpointError` when the folder holds a run with other settings, or something that is no run, or when
    another job is at work in it.
    """

    def __init__(self, verb: str, settings: Any, folder: str | Path, overwrite: bool = False):
        self.folder = Path(folder)
        self.verb = verb
        self.settings = settings
        self._hold: Hold | None = None
        processes.first(lambda: self._open(overwrite))

    def path(self, name: str) -> Path:
        return self.folder / name

    def has(self, name: str) -> bool:
        """Whether that is in the folder already; the same answer for all processes."""
        return processes.first(self.path(name).exists)

    def stage(self, name: str, make: Callable[[], T], save: Callable[[T, Path], Any], load: Callable[[Path], T]) -> T:
        """The result kept under `name`, or what `make` returns, saved first."""
        path = self.path(name)
        if self.has(name):
            return load(path)
        result = make()
        write_atomically(path, lambda temporary: save(result, temporary))
        return result

    def values(self, name: str, make: Callable[[], Any]) -> Any:
        """As `stage`, for plain values kept as JSON."""
        return self.stage(name, make, lambda value, path: path.write_text(json.dumps(value, indent=1)), read_json)

    def model(
        self, name: str, make: Callable[[], PreTrainedModel], tokenizer: PreTrainedTokenizerBase | None = None
    ) -> Path:
        """The folder of the model kept under `name`: what `make` returns, saved first unless it is there."""
        path = self.path(name)
        if not self.has(name):
            made = make()
            processes.first(lambda: str(hub.save(made, path, tokenizer)))
        return path

    def write(self, name: str, text: str) -> Path:
        """Replace a text file of the run."""
        path = self.path(name)
        write_atomically(path, lambda temporary: temporary.write_text(text))
        return path

    def _open(self, overwrite: bool) -> None:
        record = self.path("run.yaml")
        if overwrite and record.exists():
            _check_apart(self.folder, self.settings)
            self._hold = hold(self.folder)
            shutil.rmtree(self.folder)
        if self.folder.exists() and not self.folder.is_dir():
            raise CheckpointError(f"'{self.folder}' is a file: name a folder with --out")
        if record.exists():
            self._hold = hold(self.folder)
            self._check_same(record)
        elif self.folder.exists() and any(self.folder.iterdir()):
            raise CheckpointError(f"'{self.folder}' is not empty and holds no run: name another folder with --out")
        else:
            self._hold = hold(self.folder)
            kept = {"verb": self.verb, **plain(self.settings)}
            self.write("run.yaml", yaml.safe_dump(kept, sort_keys=False, allow_unicode=True))

    def _check_same(self, record: Path) -> None:
        try:
            before = yaml.safe_load(record.read_text()) or {}
        except (yaml.YAMLError, ValueError) as error:
            raise CheckpointError(f"'{record}' is damaged: start anew with --overwrite") from error
        if not isinstance(before, dict) or before.get("verb") is None:
            raise CheckpointError(f"'{record}' is damaged: start anew with --overwrite")
        verb = before.pop("verb")
        differs = difference(before, self.settings, free=PLACES)
        if verb != self.verb:
            differs = f"verb={verb}, not {self.verb}"
        if differs is not None:
            raise CheckpointError(
                f"'{self.folder}' holds a run with {differs}: name another folder with --out, or start anew with "
                f"--overwrite"
            )


class KeptFigures(MutableMapping[str, float]):
    """Figures by name in a JSON file, which is rewritten whenever one is added."""

    def __init__(self, path: Path):
        self._path = path
        self._figures: dict[str, float] = processes.first(lambda: read_json(path) if path.exists() else {})

    def __getitem__(self, name: str) -> float:
        return self._figures[name]

    def __setitem__(self, name: str, value: float) -> None:
        self._figures[name] = value
        text = json.dumps(self._figures, indent=1)
        write_atomically(self._path, lambda temporary: temporary.write_text(text))

    def __delitem__(self, name: str) -> None:
        del self._figures[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._figures)

    def __len__(self) -> int:
        return len(self._figures)


def read_json(path: Path) -> Any:
    """Raises `CheckpointError` when the file is damaged."""
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(f"'{path}' is damaged: delete it and run the command again") from error


def check_place(path: Path) -> None:
    """Find out before long work whether a file can be written there. Raises `CheckpointError`."""
    problem = "it is a folder" if path.is_dir() else _closed(path)
    if problem:
        raise CheckpointError(f"'{path}' cannot be written ({problem}): name another file with --out")


def check_folder(settings: Any) -> None:
    """Find out before long work whether a model can be saved in `out` of the settings, in all processes.

    Raises `CheckpointError`.
    """
    processes.first(lambda: _check_folder(Path(settings.out), settings))


def _check_folder(path: Path, settings: Any) -> None:
    if path.exists() and not path.is_dir():
        raise CheckpointError(f"'{path}' is a file: name a folder with --out")
    filled = path.is_dir() and any(path.iterdir())
    if filled and not settings.overwrite:
        raise CheckpointError(f"'{path}' exists: name another folder with --out, or give --overwrite")
    if filled and not (path / "config.json").exists():
        raise CheckpointError(f"'{path}' holds no model that could be replaced: name another folder with --out")
    if problem := _closed(path):
        raise CheckpointError(f"'{path}' cannot be written ({problem}): name another folder with --out")
    if filled:
        _check_apart(path, settings)


def _check_apart(folder: Path, settings: Any) -> None:
    """Raises `CheckpointError` when a folder that is to be replaced is, or holds, something that the job is given."""
    values = {name: value for name, value in plain(settings).items() if name not in PLACES}
    for given in (value for value in values.values() if isinstance(value, str)):
        path = Path(given).expanduser()
        if path.exists() and folder.resolve() in (path.resolve(), *path.resolve().parents):
            where = "is what" if path.resolve() == folder.resolve() else f"is in '{folder}', which"
            raise CheckpointError(f"'{given}' {where} --overwrite would remove: name another folder with --out")


def _closed(path: Path) -> str | None:
    """Why nothing can be made under that name; None if it can."""
    above = next(parent for parent in path.absolute().parents if parent.exists())
    if above.is_dir() and os.access(above, os.W_OK):
        return None
    return f"'{above}' is not a folder that may be written to"
