"""A model, its tokenizer and its texts, opened and measured the same way by every verb."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from nestling import data, evaluate, hub, processes
from nestling.errors import DataError
from nestling.recipes.progress import bar
from nestling.recipes.settings import CalibrationSettings, ModelSettings

ROWS_AT_ONCE = 8  # at most
UPDATES = 16  # of a progress bar over the text, where it has so many rows


def load(
    settings: ModelSettings, where: str, once: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """`hub.load` with the settings' dtype, device and trust; each of several processes uses its own device.

    once: whole in the first process only, and without weights in the others: for models that are only to be sharded.
    """
    opened = hub.load_once if once else hub.load
    return opened(
        where,
        dtype=settings.dtype,
        device=settings.device or processes.device(),
        trust_remote_code=settings.trust_remote_code,
    )


@dataclass
class Source:
    """A loaded model with its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @classmethod
    def open(cls, settings: ModelSettings, name: str = "model", once: bool = False) -> Source:
        """Load what `settings.<name>` says, with the settings' dtype, device and trust; seeds everything.

        once: as `load` takes it.

        Raises `DataError` when there is no tokenizer, or one that does not fit the model.
        """
        set_seed(getattr(settings, "seed", 0))
        where = getattr(settings, name)
        model, tokenizer = load(settings, where, once)
        if tokenizer is None:
            raise DataError(f"'{where}' has no tokenizer, which text data needs: add its tokenizer files")
        data.check_tokenizer(tokenizer, model.config.vocab_size)
        return cls(model.eval().requires_grad_(False), tokenizer)

    def calibration(self, settings: CalibrationSettings, tokens: int) -> Tensor:
        """Token ids `[rows, context]` of the settings' data and the model's own text, made once for all processes."""
        return processes.tensors(lambda: {"input_ids": self._calibration(settings, tokens)})["input_ids"]

    def _calibration(self, settings: CalibrationSettings, tokens: int) -> Tensor:
        options: dict[str, Any] = {"context": settings.context, "seed": settings.seed, "generated": settings.generated}
        with bar("calibration text, tokens", round(settings.generated * tokens)) as advance:
            parts = data.calibration(
                self.model, self.tokenizer, settings.data, tokens=tokens, progress=advance, **options
            )
        return torch.cat([part["input_ids"] for part in parts])


def measured(
    what: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, spec: str, tokens: int, **window: Any
) -> dict[str, Any]:
    """A model's perplexity and loss on so many of a text's tokens, under a bar that says what is measured.

    window: `context`, `stride` and `split`, as `evaluate.perplexity` takes them.
    """
    with bar(what, tokens) as advance:
        found = evaluate.perplexity(model, tokenizer, spec, tokens=tokens, progress=advance, **window)
    return {"perplexity": found.value, **asdict(found)}


def in_batches(rows: Tensor, batch_size: int | None = None) -> list[dict[str, Tensor]]:
    """Rows `[rows, context]` as batches `{"input_ids": [batch, context]}`.

    Unless a size is given they are small enough for a bar to move, and have a row for each process.
    """
    size = batch_size or max(processes.count(), min(ROWS_AT_ONCE, len(rows) // UPDATES))
    return [{"input_ids": part} for part in rows.split(size)]
