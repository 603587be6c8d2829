"""How long a step of a shape takes on this machine: blocks are timed once, then thousands of shapes cost nothing.

A few models of different sizes are timed, each attention, MLP or other block apart (`timing`). For each of these parts

    seconds = (a + b weights + c cache) exp(r(sizes))        a, b, c >= 0 by least squares of the relative error

where r spreads the logarithm of what the fit misses from the measured sizes to those between them (inverse distance
weights). Times are kept in a file for this machine, number format and parent.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from nestling import processes
from nestling.anatomy import Anatomy
from nestling.errors import CheckpointError
from nestling.hub.builtin import cache
from nestling.runs import whole
from nestling.search.parts import Part, Sizes, Work, parts
from nestling.search.timing import Sample, measure
from nestling.shape import Form

VERSION = 2  # of the file


@dataclass
class Table:
    """Times of the parts of one parent's children."""

    work: Work
    samples: dict[str, list[Sample]]
    _known: dict[Any, float] = field(default_factory=dict, repr=False)

    def milliseconds(self, anatomy: Anatomy, form: Form) -> float:
        """How long a step of this form takes."""
        total = 0.0
        place = {layer: position for position, layer in enumerate(form.layers)}
        for part in parts(anatomy):
            if part.layer is None or part.layer in place:
                total += self.seconds(anatomy, part, form.sizes[0 if part.layer is None else place[part.layer]])
        return 1e3 * total

    def seconds(self, anatomy: Anatomy, part: Part, sizes: Sizes) -> float:
        """How long one part takes at these sizes."""
        letters = tuple(sizes[letter] for letter in part.letters)
        if (part.name, letters) not in self._known:
            reads = part.reads(anatomy, sizes, self.work)
            self._known[part.name, letters] = self._curves[part.name].at(letters, reads)
        return self._known[part.name, letters]

    @cached_property
    def _curves(self) -> dict[str, Curve]:
        return {name: Curve.fit(samples) for name, samples in self.samples.items()}


@dataclass(frozen=True)
class Curve:
    """The law of one part: three coefficients, and what they miss at the sizes that were measured."""

    coefficients: tuple[float, float, float]
    missed: tuple[tuple[tuple[float, ...], float], ...]

    @classmethod
    def fit(cls, samples: list[Sample]) -> Curve:
        """Non-negative least squares of the relative error, by trying which coefficients are zero."""
        inputs = torch.tensor([[1.0, *sample.reads] for sample in samples], dtype=torch.float64)
        seconds = torch.tensor([sample.seconds for sample in samples], dtype=torch.float64)
        scale = inputs.amax(0).clamp_min(1e-30)
        relative = inputs / scale / seconds[:, None]
        best, least = torch.zeros(3, dtype=torch.float64), math.inf
        for used in itertools.chain.from_iterable(itertools.combinations(range(3), n) for n in (1, 2, 3)):
            found = torch.zeros(3, dtype=torch.float64)
            found[list(used)] = torch.linalg.lstsq(
                relative[:, used], torch.ones(len(samples), 1, dtype=torch.float64), driver="gelsd"
            ).solution[:, 0]
            error = (relative @ found - 1).square().sum().item()
            if (found >= 0).all() and error < least:
                best, least = found, error
        law = tuple((best / scale).tolist())
        return cls(law, tuple((_place(s.sizes), math.log(s.seconds / _apply(law, s.reads))) for s in samples))

    def at(self, sizes: tuple[int, ...], reads: tuple[float, float]) -> float:
        here = _place(sizes)
        weights = [1 / (sum((a - b) ** 2 for a, b in zip(here, there, strict=True)) + 1e-9) for there, _ in self.missed]
        spread = sum(w * r for w, (_, r) in zip(weights, self.missed, strict=True)) / sum(weights)
        return _apply(self.coefficients, reads) * math.exp(spread)


def _place(sizes: tuple[int, ...]) -> tuple[float, ...]:
    return tuple(math.log2(max(1, size)) for size in sizes)


def _apply(law: tuple[float, ...], reads: tuple[float, float]) -> float:
    return max(1e-12, law[0] + law[1] * reads[0] + law[2] * reads[1])


def table(
    anatomy: Anatomy,
    device: torch.device,
    dtype: torch.dtype,
    work: Work | None = None,
    progress: Callable[[int], None] | None = None,
) -> Table:
    """The table of a parent on this machine, measured unless it was before. progress: told of every model timed.

    Of several processes the first measures, and all have its times.
    """
    work = work or Work()
    path = _file(anatomy, device, dtype, work)

    def rows() -> dict[str, Any]:
        if not path.exists():
            _write(path, Table(work, measure(anatomy, device, dtype, work, progress)))
        return _read(path)

    return Table(work, _samples(processes.first(rows)))


# ---- keeping


def _file(anatomy: Anatomy, device: torch.device, dtype: torch.dtype, work: Work) -> Path:
    """Where the times of this parent on this machine are kept."""
    config = {name: value for name, value in anatomy.config.to_dict().items() if not name.startswith("_")}
    depends = [VERSION, _machine(device), torch.__version__, str(dtype), asdict(work), config]
    key = hashlib.blake2b(json.dumps(depends, sort_keys=True, default=str).encode(), digest_size=12).hexdigest()
    return cache() / "latency" / f"{anatomy.architecture.model_type}-{key}.json"


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpus = Path("/proc/cpuinfo")
    names = [line for line in cpus.read_text().splitlines() if line.startswith("model name")] if cpus.exists() else []
    return f"{device.type} {platform.machine()} {names[0] if names else ''} {torch.get_num_threads()} threads"


def _samples(rows: dict[str, Any]) -> dict[str, list[Sample]]:
    return {
        name: [Sample(tuple(s["sizes"]), tuple(s["reads"]), s["seconds"]) for s in measured]
        for name, measured in rows.items()
    }


def _read(path: Path) -> dict[str, Any]:
    """The times of every part as they are kept."""
    try:
        found: dict[str, Any] = json.loads(path.read_text())["samples"]
        _samples(found)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"the latency table '{path}' is damaged: delete it, and it is measured anew") from error
    return found


def _write(path: Path, found: Table) -> None:
    rows = {name: [asdict(sample) for sample in samples] for name, samples in found.samples.items()}
    with whole(path, "set NESTLING_CACHE to another folder") as beside:
        beside.write_text(json.dumps({"work": asdict(found.work), "samples": rows}))
