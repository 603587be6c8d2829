"""What verbs that train from scratch share: their settings, the tokenizer, and the loss on text that was held back.

Such a job starts from an architecture and text. The tokenizer is that of a checkpoint, or is trained on the data first
and kept in the run folder. Knows nothing of how the model is trained.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nestling import evaluate, hub, processes
from nestling.cost import cost
from nestling.data import train_tokenizer
from nestling.data.vocabulary import SMALLEST
from nestling.errors import DataError, NestlingError
from nestling.hub.load import load_tokenizer
from nestling.pretrain import names_checkpoint
from nestling.recipes.run import Run
from nestling.recipes.settings import at_least, listed


@dataclass(kw_only=True)
class ScratchSettings:
    """Settings of a verb that trains an architecture on text.

    Args:
        data: Training text: hub dataset, local file or folder, or builtin:stdlib.
        set: Config fields to set on top, as FIELD=VALUE with commas between.
        tokenizer: Take the tokenizer of this checkpoint. Otherwise a checkpoint given as architecture brings its own,
            and one is trained on the data where there is none.
        vocab_size: Tokens of a tokenizer that is trained on the data.
        evaluation_tokens: Tokens of the validation part on which the result is measured.
        device: Where to compute; the best there is unless given.
        trust_remote_code: Let the checkpoint run code of its own.
        overwrite: Start anew even if the run folder holds a run.
    """

    data: str = "builtin:stdlib"
    set: str | list[str] = ""
    tokenizer: str | None = None
    vocab_size: int = 2048
    evaluation_tokens: int = 32768
    device: str | None = None
    trust_remote_code: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        at_least("vocab_size", self.vocab_size, SMALLEST)
        at_least("evaluation_tokens", self.evaluation_tokens, 1)


def fields(texts: str | list[str]) -> dict[str, Any]:
    """Config fields from `FIELD=VALUE` texts, values as YAML writes them. Raises `NestlingError` for other texts."""
    found = {}
    for text in listed(texts):
        name, equals, value = text.partition("=")
        if not (equals and name.strip().isidentifier()):
            raise NestlingError(f"'{text}' does not set a config field: write FIELD=VALUE, as in num_hidden_layers=8")
        found[name.strip()] = yaml.safe_load(value)
    return found


def given_tokenizer(settings: Any) -> PreTrainedTokenizerBase | None:
    """The tokenizer that was named, or that of a checkpoint given as architecture."""
    source = settings.tokenizer
    if source is None and names_checkpoint(settings.architecture):
        source = settings.architecture
    if source is None:
        return None
    found = hub.tokenizer(source, trust_remote_code=settings.trust_remote_code)
    if found is None and settings.tokenizer is not None:
        raise DataError(f"'{source}' has no tokenizer: name another checkpoint, or leave --tokenizer out")
    return found


def trained_tokenizer(settings: Any, run: Run) -> PreTrainedTokenizerBase:
    """One of `vocab_size` tokens made from the data, kept in the run folder."""
    folder = run.path("tokenizer")
    if not run.has("tokenizer"):
        processes.first(lambda: _train_tokenizer(settings, folder))
    found = load_tokenizer(folder)
    assert found is not None, "the folder has just been written"
    return found


def trained_model(settings: Any, folder: Path) -> PreTrainedModel:
    """The model that the job saved, whole in every process."""
    return hub.load(folder, device=settings.device)[0]


def validated(settings: Any, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The loss on the validation part of the data, and what the model costs."""
    found = evaluate.perplexity(
        model, tokenizer, settings.data, context=settings.train.context, tokens=settings.evaluation_tokens
    )
    return {"loss": found.loss, "validation": asdict(found), "cost": cost(model).to_dict()}


def _train_tokenizer(settings: Any, folder: Path) -> None:
    with hub.replacing(folder) as partial:
        made = train_tokenizer(settings.data, settings.vocab_size, seed=settings.train.seed)
        made.save_pretrained(partial)
