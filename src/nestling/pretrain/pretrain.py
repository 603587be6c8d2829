"""`pretrain`: cross-entropy with the text and nothing else; the loop is `nestling.train.fit`.

The baseline that a pruned and distilled model is compared with, and the way to a small model of any architecture where
there is no hub. Logits exist a chunk of tokens at a time, as in distillation.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from nestling.train import CausalLM, TrainSettings, documented, fit


@documented
@dataclass
class PretrainSettings(TrainSettings):
    """Settings of pretraining."""

    tokens: int = 2_000_000
    batch_size: int = 16
    learning_rate: float = 2e-3
    weight_decay: float = 0.1


def pretrain(
    model: PreTrainedModel,
    data: Any,
    tokenizer: PreTrainedTokenizerBase | None = None,
    settings: PretrainSettings | None = None,
    run_dir: str | Path | None = None,
    resume: bool = True,
    **overrides: Any,
) -> PreTrainedModel:
    """Train a model, in place, on text; returns it in eval mode.

    model: fresh weights (`build`, or any transformers model), or trained ones to go on with. data, run_dir, resume: as
    `nestling.train.fit` takes them. overrides: single settings, such as `learning_rate=1e-3`. Raises what `fit` raises.
    """
    settings = dataclasses.replace(settings or PretrainSettings(), **overrides)
    set_seed(settings.seed)
    fit(CausalLM(model), data, tokenizer, settings, run_dir, resume)
    return model
