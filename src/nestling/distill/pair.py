"""Student and teacher as one module, whose forward pass is the distillation loss of a batch.

Being one module, it is wrapped, sharded and moved as a whole by accelerate (DDP, FSDP): all of the student is used
inside its `forward`. The teacher is held, not owned: it is in no optimizer, checkpoint or gradient reduction. Both
backbones run without their heads; what becomes of the last hidden states is in `losses`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from nestling.anatomy import decoder, logits_head
from nestling.distill.losses import IGNORE, Head, Objective, logit_losses
from nestling.distill.states import balance, catching, projection, readers, states_loss


class Pair(nn.Module):
    """A student that learns from a teacher.

    student: trained. teacher: called in eval mode without gradients, in its own dtype. objective: of the logits.
    states: names of intermediate states to compare, with the loss `state_loss`.
    """

    accepts_loss_kwargs = True  # `Trainer` passes num_items_in_batch, and does not divide by accumulation steps

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel,
        objective: Objective | None = None,
        states: tuple[str, ...] = (),
        state_loss: str = "cosine",
        seed: int = 0,
    ):
        super().__init__()
        self.student = student
        self._teacher = (teacher,)  # in a tuple, so that it is no submodule
        self.objective = objective or Objective()
        self.state_loss = state_loss
        self.projection = projection(student, teacher, seed) if states else nn.Identity()
        self._readers = ({**readers(student, states)},)
        self._teacher_readers = ({**readers(teacher, states)},)
        self._student_head, self._head_of_teacher = logits_head(student), logits_head(teacher)
        self._no_split_modules = student._no_split_modules  # where FSDP cuts

    @property
    def teacher(self) -> PreTrainedModel:
        return self._teacher[0]

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        attention_mask: Tensor | None = None,
        num_items_in_batch: Tensor | float | None = None,
    ) -> dict[str, Tensor]:
        """Scalars: the loss, and detached `kl`, `ce` and (with states) `states`, all means over real tokens.

        input_ids, attention_mask: `[batch, seq]`. labels: the token after each position `[batch, seq]`, -100 where it
        does not count. num_items_in_batch: real tokens of the whole accumulated batch; of this one unless given.
        """
        if attention_mask is not None and attention_mask.all():
            attention_mask = None  # attention without a mask is the faster one
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
        taught, taught_states = self._teach(inputs)
        with catching(self._readers[0]) as states:
            hidden = decoder(self.student)(**inputs).last_hidden_state
        count = num_items_in_batch
        head = Head(self._student_head, tuple(self.student.get_output_embeddings().parameters()))
        loss, apart, cross_entropy = logit_losses(
            hidden, head, taught, self._teacher_head, labels, self.objective, count=count
        )
        parts = {"kl": apart, "ce": cross_entropy}
        if states:
            between = states_loss(states, taught_states, self.projection, labels != IGNORE, self.state_loss, count)
            loss = loss + balance(self.objective.kd_weight * apart, between) * between
            parts["states"] = between.detach()
        return {"loss": loss, **parts}

    @torch.no_grad()
    def _teach(self, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """The teacher's last hidden states `[batch, seq, hidden]` and the states it was asked for."""
        with _own_dtype(inputs["input_ids"]), catching(self._teacher_readers[0]) as states:
            hidden = decoder(self.teacher)(**inputs).last_hidden_state
        return hidden, states

    def _teacher_head(self, hidden: Tensor) -> Tensor:
        with _own_dtype(hidden):
            return self._head_of_teacher(hidden)


def _own_dtype(tensor: Tensor) -> torch.autocast:
    return torch.autocast(tensor.device.type, enabled=False)
