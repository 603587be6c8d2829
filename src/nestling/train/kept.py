"""A teacher's likeliest tokens, computed once and kept, for any number of students.

A folder of safetensors shards: for each row of text its tokens, and for each of its positions the k likeliest tokens
(uint16 where the vocabulary allows), their log-probabilities and that of all others together (float16). The manifest
(`cache.json`) says what it was made for and each shard's SHA-256; shards are written beside their name and renamed, so
an interrupted job goes on after the last whole one. Trained on, it gives the loss of a live teacher with the same
`top_k`, to the rounding of float16.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nestling import processes
from nestling.anatomy import decoder, logits_head
from nestling.anatomy.bypass import evaluating
from nestling.errors import CheckpointError, NestlingError
from nestling.runs import held, whole
from nestling.train.divergences import TopK, top_k
from nestling.train.losses import Objective
from nestling.train.rows import Rows, collate, rows_of
from nestling.train.settings import MICRO_TOKENS, MICRO_TOKENS_ELSEWHERE, TrainSettings

MANIFEST = "cache.json"
SHARD_BYTES = 16 << 20
HEAD_TOKENS = 256  # whose logits exist at once


@dataclass
class Cache(torch.utils.data.Dataset):
    """Rows of text with what the teacher says about them.

    made_for: what it was computed from; a cache serves only that. shards: name -> {rows, sha256}. rows: how many it
    will have when it is whole. shuffle: whether the first pass over the rows is shuffled too.
    """

    folder: Path
    made_for: dict[str, Any]
    rows: int
    shuffle: bool = False
    shards: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: str | Path) -> Cache | None:
        """What is in a folder; None if there is none yet. Raises `CheckpointError` when the manifest is damaged."""
        try:
            return cls(Path(folder), **json.loads(Path(folder, MANIFEST).read_text()))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(f"'{folder}' holds a damaged {MANIFEST} ({error}): remove the folder") from error

    @property
    def whole(self) -> bool:
        return sum(shard["rows"] for shard in self.shards.values()) == self.rows

    def check(self) -> Cache:
        """This cache, if every shard is what was written. Raises `CheckpointError` for one that is damaged."""
        for name, shard in self.shards.items():
            if not (self.folder / name).exists() or _digest(self.folder / name) != shard["sha256"]:
                raise CheckpointError(
                    f"'{self.folder / name}' is damaged or missing: remove '{self.folder}' to compute it anew"
                )
        return self

    def add(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Write one shard, then say so in the manifest."""
        with whole(self.folder / name) as beside:
            save_file(tensors, beside)
            shard = {"rows": len(tensors["input_ids"]), "sha256": _digest(beside)}
        self.shards[name] = shard
        values = {"made_for": self.made_for, "rows": self.rows, "shuffle": self.shuffle, "shards": self.shards}
        with whole(self.folder / MANIFEST) as beside:
            beside.write_text(json.dumps(values, indent=1))

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """`input_ids` `[seq]` (maybe `attention_mask`, `labels`), and a `TopK` in `teacher_...`."""
        name, place = self._places[index]
        try:
            file = self._files.setdefault(name, safe_open(str(self.folder / name), "pt"))
            row = {key: file.get_slice(key)[place] for key in file.keys()}  # noqa: SIM118  not a dict
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"'{self.folder / name}' cannot be read: {error}") from error
        return {key: value if value.is_floating_point() else value.to(torch.int32) for key, value in row.items()}

    @cached_property
    def _places(self) -> list[tuple[str, int]]:
        return [(name, i) for name, shard in sorted(self.shards.items()) for i in range(shard["rows"])]

    @cached_property
    def _files(self) -> dict[str, Any]:
        return {}


def kept_teacher(
    teacher: PreTrainedModel | None,
    data: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    settings: TrainSettings,
    objective: Objective,
    folder: str | Path,
    vocab_size: int,
    progress: Callable[[int], None] | None = None,
) -> Cache:
    """The cache of what that objective asks of that teacher on that data, computed as far as it is missing.

    Of several processes the first computes it. teacher: may be None if the cache is whole. progress: told the tokens
    done. Raises `NestlingError` for an objective that a cache cannot serve, `CheckpointError` for a cache of another
    job, one that another job is filling, or a damaged one.
    """
    if not objective.top_k:
        raise NestlingError("a teacher cache keeps the likeliest tokens only: say how many with top_k, such as 64")

    def filled() -> int:
        rows, _ = rows_of(data, tokenizer, settings, vocab_size)
        source = Rows(rows.source, min(len(rows.source), len(rows)), settings.seed)
        cache = _opened(folder, teacher, source, rows.shuffle, objective)
        if not cache.whole:
            if teacher is None:
                raise CheckpointError(f"'{folder}' is not whole: give the teacher, which computes the rest")
            with held(cache.folder):
                _fill(cache, teacher, source, objective, vocab_size, progress)
        return len(cache)

    processes.first(filled)
    found = Cache.open(folder)
    assert found is not None
    return found


def _opened(
    folder: str | Path, teacher: PreTrainedModel | None, source: Rows, shuffle: bool, objective: Objective
) -> Cache:
    """The cache in that folder, as far as it is there, or an empty one."""
    wanted = {
        "top_k": objective.top_k,
        "temperature": objective.temperature,
        "text": _digest_of(source[i]["input_ids"] for i in range(len(source))),
    }
    cache = Cache.open(folder) or Cache(Path(folder), wanted, len(source), shuffle)
    differing = [name for name in wanted if cache.made_for.get(name) != wanted[name]]
    if teacher is not None:
        weights, cache.made_for["name"] = _weights(teacher), str(teacher.config._name_or_path)
        differing += [] if cache.made_for.setdefault("teacher", weights) == weights else ["teacher"]
    if differing:
        raise CheckpointError(
            f"'{folder}' was computed for another {differing[0]}: name another folder, or give what it was made for"
        )
    return cache.check()


@torch.no_grad()
def _fill(
    cache: Cache,
    teacher: PreTrainedModel,
    source: Rows,
    objective: Objective,
    vocab_size: int,
    progress: Callable[[int], None] | None,
) -> None:
    cache.folder.mkdir(parents=True, exist_ok=True)
    length = len(source[0]["input_ids"])
    size = max(1, SHARD_BYTES // (length * objective.top_k * 6))
    rows_at_once = max(1, MICRO_TOKENS.get(teacher.device.type, MICRO_TOKENS_ELSEWHERE) // length)
    ids = torch.uint16 if vocab_size <= 2**16 else torch.int32
    for number, start in enumerate(range(0, len(source), size)):
        name = f"shard-{number:05d}.safetensors"
        if name in cache.shards:
            continue
        parts: list[dict[str, Tensor]] = []
        for first in range(start, min(start + size, len(source)), rows_at_once):
            rows = [source[i] for i in range(first, min(first + rows_at_once, start + size, len(source)))]
            batch = collate(vocab_size)(rows)
            kept = _kept(teacher, batch, objective)
            own = {key: torch.stack([row[key] for row in rows]).to(torch.int32) for key in rows[0]}
            of_teacher = {"teacher_log_probs": kept.log_probs.half(), "teacher_rest": kept.rest.half()}
            parts.append(own | of_teacher | {"teacher_indices": kept.indices.to(ids)})
            if progress is not None:
                progress(batch["input_ids"].numel())
        cache.add(name, {key: torch.cat([part[key] for part in parts]) for key in parts[0]})


def _kept(teacher: PreTrainedModel, batch: dict[str, Tensor], objective: Objective) -> TopK:
    """The teacher's likeliest tokens at each position `[batch, seq, k]`, on the CPU."""
    inputs = {name: batch[name].to(teacher.device) for name in ("input_ids", "attention_mask")}
    if inputs["attention_mask"].all():
        inputs.pop("attention_mask")
    with evaluating(teacher):
        hidden = decoder(teacher)(**inputs, use_cache=False).last_hidden_state
        parts = [
            top_k((_wide(logits_head(teacher)(states)) / objective.temperature).log_softmax(-1), objective.top_k)
            for states in hidden.flatten(0, 1).split(HEAD_TOKENS)
        ]
    shape = hidden.shape[:2]
    indices, log_probs, rest = (
        torch.cat([getattr(part, name) for part in parts]).cpu() for name in ("indices", "log_probs", "rest")
    )
    return TopK(indices.unflatten(0, shape), log_probs.unflatten(0, shape), rest.unflatten(0, shape))


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _weights(model: PreTrainedModel) -> str:
    """A digest of a model's weights: names, shapes, and the sum of each tensor."""
    sums = [(name, list(p.shape), float(p.detach().sum(dtype=torch.float64))) for name, p in model.named_parameters()]
    return hashlib.sha256(json.dumps(sums).encode()).hexdigest()


def _digest_of(rows: Any) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(torch.as_tensor(row).to(torch.int32).numpy().tobytes())
    return digest.hexdigest()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _sha(file)


def _sha(file: Any) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()
