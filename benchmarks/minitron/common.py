"""What Minitron's tables share: a small parent trained here on the standard library, its texts, and short trainings.

One parent per seed (0.66 M parameters, a vocabulary of 512) is trained once and kept under runs/, which git ignores.
Children are ranked on training text, trained on other training text than the parent began with, and judged on the
validation part alone. Every table is a command: `python -m benchmarks.minitron.<table>`, from the repository's root.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

import nestling as nl
from nestling import data
from nestling.data import train_tokenizer
from nestling.pretrain import PretrainSettings, build, pretrain
from nestling.search import token_loss
from nestling.surgery.repair import Repair

RUNS = Path("runs/minitron")
TEXT, CONTEXT, VOCAB, BATCH = "builtin:stdlib", 128, 512, 4
PARENT_TOKENS, CALIBRATION_TOKENS, HELD_OUT = 1_280_000, 16_384, 16_384
SCRATCH_RATE, CHILD_RATE = 8e-3, 2e-3
PARENT = {
    "model_type": "llama",
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "max_position_embeddings": 512,
    "initializer_range": 0.05,
    "tie_word_embeddings": True,
}


class Ground:
    """The parent of one seed, and text to rank, train and judge its children on."""

    def __init__(self, seed: int):
        self.seed = seed
        self.tokenizer = train_tokenizer(TEXT, VOCAB)
        self.loss = token_loss(self.batches(HELD_OUT, split="validation"))
        self.calibration = self.batches(CALIBRATION_TOKENS, seed=seed + 50)

    @cached_property
    def parent(self) -> PreTrainedModel:
        folder = RUNS / f"parent-{self.seed}"
        if not folder.exists():
            nl.hub.save(self.from_scratch(AutoConfig.for_model(**PARENT), PARENT_TOKENS), folder, self.tokenizer)
        return nl.load(folder)[0].requires_grad_(False)

    @cached_property
    def ranking(self) -> nl.Ranking:
        return nl.rank(self.parent, self.calibration)

    @cached_property
    def repair(self) -> Repair:
        return Repair(self.parent, self.calibration)

    def from_scratch(self, config: Any, tokens: int) -> PreTrainedModel:
        """A model of fresh weights, trained on the text alone under a whole schedule."""
        model = build(copy.deepcopy(config), self.tokenizer, self.seed)
        settings = PretrainSettings(tokens=tokens, learning_rate=SCRATCH_RATE, **self._how(self.seed))
        return pretrain(model, TEXT, self.tokenizer, settings)

    def fresh(self, config: Any) -> PreTrainedModel:
        return build(copy.deepcopy(config), None, self.seed)

    def trained(
        self,
        child: PreTrainedModel,
        tokens: int,
        teacher: PreTrainedModel | None = None,
        text: Iterable[dict[str, Tensor]] | str = TEXT,
        **settings: Any,
    ) -> PreTrainedModel:
        """A copy of a child, distilled from the parent unless the settings say otherwise."""
        how = {"tokens": tokens, "learning_rate": CHILD_RATE, **self._how(self.seed + 100), **settings}
        return nl.distill(copy.deepcopy(child), teacher or self.parent, text, self.tokenizer, **how)

    def batches(self, tokens: int, text: str = TEXT, **options: Any) -> list[dict[str, Tensor]]:
        return data.batches(text, self.tokenizer, context=CONTEXT, tokens=tokens, **options)

    @staticmethod
    def _how(seed: int) -> dict[str, Any]:
        whole = {"micro_batch_size": BATCH, "gradient_checkpointing": False, "log_every": 10}
        return {"batch_size": BATCH, "context": CONTEXT, "seed": seed, **whole}
