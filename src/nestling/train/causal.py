"""`CausalLM`: plain language modelling as a `Learner`, the cross-entropy with the data and nothing else.

What a model is trained with from scratch, what a teacher is corrected with, and what distillation is held against.
"""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedModel

from nestling.anatomy import decoder
from nestling.train.learner import Learner, model_inputs
from nestling.train.losses import CROSS_ENTROPY


class CausalLM(Learner):
    """A model that learns to predict the next token; its logits exist for a chunk of tokens at a time."""

    def __init__(self, model: PreTrainedModel):
        super().__init__(model)

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        attention_mask: Tensor | None = None,
        num_items_in_batch: Tensor | float | None = None,
    ) -> dict[str, Tensor]:
        """The mean cross-entropy over real tokens, as `loss` and as `ce`; see `Learner.forward`."""
        hidden = decoder(self.student)(**model_inputs(input_ids, attention_mask)).last_hidden_state
        losses = self.logit_losses(hidden, labels, CROSS_ENTROPY, None, num_items_in_batch)
        return {"loss": losses.loss, "ce": losses.cross_entropy}
