"""A model, its tokenizer and its calibration text, opened the same way by every verb."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from nestling import data, hub
from nestling.errors import DataError
from nestling.recipes.settings import ModelSettings


def load(settings: ModelSettings, where: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """`hub.load` with the settings' dtype, device and trust."""
    return hub.load(
        where,
        dtype=settings.dtype,
        device=settings.device,
        trust_remote_code=settings.trust_remote_code,
    )


@dataclass
class Source:
    """A loaded model with its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @classmethod
    def open(cls, settings: ModelSettings, name: str = "model") -> Source:
        """Load what `settings.<name>` says, with the settings' dtype, device and trust; seeds everything.

        Raises `DataError` when there is no tokenizer, or one that does not fit the model.
        """
        set_seed(getattr(settings, "seed", 0))
        where = getattr(settings, name)
        model, tokenizer = load(settings, where)
        if tokenizer is None:
            raise DataError(f"'{where}' has no tokenizer, which text data needs: add its tokenizer files")
        data.check_tokenizer(tokenizer, model.config.vocab_size)
        return cls(model.eval().requires_grad_(False), tokenizer)

    def batches(
        self, spec: str, tokens: int, context: int, batch_size: int = 8, seed: int = 0
    ) -> list[dict[str, Tensor]]:
        """Calibration batches `[batch, context]`."""
        return data.batches(
            spec,
            self.tokenizer,
            context=context,
            tokens=tokens,
            batch_size=batch_size,
            seed=seed,
        )
