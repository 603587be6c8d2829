"""Minimal pairs: does the model find the grammatical sentence likelier than its twin? (BLiMP; Warstadt et al. 2020.)

A sentence's score is the sum of log p over its tokens. Something has to stand before the first: BOS, or EOS for a
tokenizer without BOS, as in lm-eval, whether or not the tokenizer adds one by itself. A tie counts as wrong. Sentences
are padded on the right, which a causal model cannot see, and padding is not scored.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nestling.anatomy.bypass import evaluating
from nestling.data.pack import check_tokenizer
from nestling.errors import DataError
from nestling.evaluate.score import IGNORE, token_losses

BATCH_TOKENS = 4096
FIELDS = ("sentence_good", "sentence_bad")


@dataclass(frozen=True)
class Accuracy:
    """Share of pairs decided rightly, its standard error, and their number."""

    accuracy: float
    standard_error: float
    pairs: int


@dataclass(frozen=True)
class MinimalPairs:
    """Accuracy over all pairs with its standard error, and per file (by name without suffix)."""

    accuracy: float
    standard_error: float
    pairs: int
    per_file: dict[str, Accuracy]


def minimal_pairs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    path: str | Path,
    *,
    limit: int | None = None,
    batch_tokens: int = BATCH_TOKENS,
    progress: Callable[[int], Any] | None = None,
) -> MinimalPairs:
    """Score a .jsonl file in BLiMP's format, or every such file in a folder (`limit`: pairs per file).

    `progress` is called with the number of pairs done since the last call. Raises `DataError`.
    """
    check_tokenizer(tokenizer, model.config.get_text_config().vocab_size)
    files = read_pairs(path, limit)
    sentences = [sentence for pairs in files.values() for pair in pairs for sentence in pair]
    scores = iter(_scores(model, tokenizer, sentences, batch_tokens, progress))
    per_file = {name: [next(scores) > next(scores) for _ in pairs] for name, pairs in files.items()}
    total = _accuracy([right for found in per_file.values() for right in found])
    by_file = {name: _accuracy(found) for name, found in per_file.items()}
    return MinimalPairs(total.accuracy, total.standard_error, total.pairs, by_file)


def read_pairs(path: str | Path, limit: int | None = None) -> dict[str, list[tuple[str, str]]]:
    """The pairs of every file, by its name without suffix. Raises `DataError` for what is missing or no pair."""
    return {file.stem: list(_read(file, limit)) for file in _files(Path(path).expanduser())}


def prefix_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token before the first: BOS, else EOS. Raises `DataError` for a tokenizer without either."""
    for found in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if found is not None:
            return int(found)
    raise DataError("the tokenizer has neither a BOS nor an EOS token to begin a sentence with: set one")


def _scores(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sentences: list[str],
    batch_tokens: int,
    progress: Callable[[int], Any] | None,
) -> list[float]:
    """log p of each sentence, in nats; long ones first, so that a batch holds sentences of like length."""
    prefix = prefix_token(tokenizer)
    ids = [[prefix, *found] for found in tokenizer(sentences, add_special_tokens=False)["input_ids"]]
    scores = [0.0] * len(ids)
    order = sorted(range(len(ids)), key=lambda index: len(ids[index]), reverse=True)
    with evaluating(model):
        while order:
            size = max(1, batch_tokens // len(ids[order[0]]))
            group, order = order[:size], order[size:]
            for index, score in zip(group, _score(model, [ids[index] for index in group]), strict=True):
                scores[index] = score
            if progress is not None:
                progress((len(group) + len(order) % 2) // 2)
    return scores


def _score(model: PreTrainedModel, group: list[list[int]]) -> list[float]:
    longest = max(map(len, group))
    padded = torch.tensor([ids + [ids[0]] * (longest - len(ids)) for ids in group])
    lengths = torch.tensor([len(ids) for ids in group])
    targets = padded[:, 1:].clone()
    targets[torch.arange(1, longest) >= lengths[:, None]] = IGNORE
    losses = token_losses(model, padded[:, :-1].to(model.device), targets.to(model.device))
    return (-losses.double().sum(dim=1)).tolist()


def _files(path: Path) -> list[Path]:
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        raise DataError(f"'{path}' is no .jsonl file and no folder of them: give minimal pairs in BLiMP's format")
    return files


def _read(file: Path, limit: int | None) -> Iterator[tuple[str, str]]:
    try:
        lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"'{file}' cannot be read as UTF-8 text: {error}") from error
    if not lines:
        raise DataError(f"'{file}' is empty: give at least one pair")
    for number, line in enumerate(lines[:limit], 1):
        try:
            row = json.loads(line)
            good, bad = (row[name] for name in FIELDS)
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise DataError(
                f"line {number} of '{file}' is no pair: each line is an object with {' and '.join(FIELDS)}"
            ) from error
        yield str(good), str(bad)


def _accuracy(right: list[bool]) -> Accuracy:
    count = len(right)
    share = sum(right) / count
    error = math.sqrt(share * (1 - share) / (count - 1)) if count > 1 else math.nan
    return Accuracy(share, error, count)
