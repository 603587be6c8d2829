"""`pretrain`: cross-entropy with the text and nothing else; the loop is `nestling.train.fit`.

The baseline that a pruned and distilled model is compared with, and the way to a small model of any architecture where
there is no hub. Logits exist a chunk of tokens at a time, as in distillation.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from nestling.anatomy import decoder
from nestling.train import Learner, Objective, TrainSettings, documented, fit, model_inputs


@documented
@dataclass
class PretrainSettings(TrainSettings):
    """Settings of pretraining."""

    tokens: int = 2_000_000
    batch_size: int = 16
    learning_rate: float = 2e-3
    weight_decay: float = 0.1


class CrossEntropy(Learner):
    """A model that learns from the tokens of text."""

    objective = Objective(kd_weight=0.0, ce_weight=1.0)

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        attention_mask: Tensor | None = None,
        num_items_in_batch: Tensor | float | None = None,
    ) -> dict[str, Tensor]:
        """Scalar `loss`: the mean of -log p(next token); see `Learner.forward`."""
        hidden = decoder(self.student)(**model_inputs(input_ids, attention_mask)).last_hidden_state
        return {"loss": self.logit_losses(hidden, labels, self.objective, count=num_items_in_batch).loss}


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
    fit(CrossEntropy(model), data, tokenizer, settings, run_dir, resume)
    return model
