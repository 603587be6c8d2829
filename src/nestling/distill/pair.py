"""Student and teacher as one `Learner`, whose forward pass is the distillation loss of a batch.

Both backbones run without their heads; what becomes of the last hidden states is in `nestling.train.losses`.
"""

from __future__ import annotations

from torch import Tensor, nn
from transformers import PreTrainedModel

from nestling.anatomy import decoder
from nestling.distill.states import balance, catching, projection, readers, states_loss
from nestling.train import IGNORE, Learner, Objective, model_inputs


class Pair(Learner):
    """A student that learns from a teacher.

    student: trained. teacher: called in eval mode without gradients, in its own dtype. objective: of the logits.
    states: names of intermediate states to compare, with the loss `state_loss`. state_weight: of their loss; 0 gives
    them as much weight as the logits have, sequence by sequence. layer_map: the layers (teacher's, student's) whose
    states are compared; the third from the end of each unless given.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel,
        objective: Objective | None = None,
        states: tuple[str, ...] = (),
        state_loss: str = "cosine",
        seed: int = 0,
        state_weight: float = 0.0,
        layer_map: tuple[int, int] | None = None,
    ):
        super().__init__(student, teacher)
        self.objective = objective or Objective()
        self.state_loss, self.state_weight = state_loss, state_weight
        of_teacher, of_student = layer_map or (None, None)
        self.projection = projection(student, teacher, seed) if states else nn.Identity()
        self._readers = ({**readers(student, states, of_student)},)
        self._teacher_readers = ({**readers(teacher, states, of_teacher)},)

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        attention_mask: Tensor | None = None,
        num_items_in_batch: Tensor | float | None = None,
    ) -> dict[str, Tensor]:
        """Scalars: the loss, and detached `kl`, `ce` and (with states) `states`; see `Learner.forward`."""
        inputs, count = model_inputs(input_ids, attention_mask), num_items_in_batch
        with catching(self._teacher_readers[0]) as taught_states:
            taught = self.teach(inputs)
        with catching(self._readers[0]) as states:
            hidden = decoder(self.student)(**inputs).last_hidden_state
        loss, apart, cross_entropy, each = self.logit_losses(hidden, labels, self.objective, taught, count)
        parts = {"kl": apart, "ce": cross_entropy}
        if states:
            counted = labels != IGNORE
            total = count if count is not None else counted.sum().clamp_min(1)
            between = states_loss(states, taught_states, self.projection, counted, self.state_loss) / total
            loss = loss + (self._alpha(each.sum(-1) / total, between) * between).sum()
            parts["states"] = between.detach().sum()
        return {"loss": loss, **parts}

    def _alpha(self, apart: Tensor, between: Tensor) -> Tensor | float:
        """The weight of each sequence's states, from its two losses `[batch]`."""
        return self.state_weight or balance(self.objective.kd_weight * apart, between)
