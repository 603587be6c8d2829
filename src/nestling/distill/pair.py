"""Student and teacher as one `Learner`, whose forward pass is the distillation loss of a batch.

Both backbones run without their heads; what becomes of the last hidden states is in `nestling.train.losses`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from nestling.anatomy import decoder
from nestling.distill.states import balance, catching, projection, readers, states_loss
from nestling.train import IGNORE, Learner, Objective, TopK, model_inputs


class Pair(Learner):
    """A student that learns from a teacher.

    student: trained. teacher: called in eval mode without gradients, in its own dtype; None if every batch brings what
    a cache kept of it. objective: of the logits.
    states: names of intermediate states to compare, with the loss `state_loss`. state_weight: of their loss; 0 gives
    them as much weight as the logits have, sequence by sequence. layer_map: the layers (teacher's, student's) whose
    states are compared; the third from the end of each unless given.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel | None,
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
        self.projection: nn.Module = nn.Identity()
        self._readers: tuple[dict[str, nn.Module]] = ({},)  # in a tuple, so that they are no submodules of this one
        self._teacher_readers: tuple[dict[str, nn.Module]] = ({},)
        if states and teacher is not None:
            self.projection = projection(student, teacher, seed)
            self._readers = ({**readers(student, states, of_student)},)
            self._teacher_readers = ({**readers(teacher, states, of_teacher)},)

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        attention_mask: Tensor | None = None,
        num_items_in_batch: Tensor | float | None = None,
        teacher_indices: Tensor | None = None,
        teacher_log_probs: Tensor | None = None,
        teacher_rest: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Scalars: the loss, and detached `kl`, `ce` and (with states) `states`; see `Learner.forward`.

        teacher_...: what a cache kept of the teacher (`TopK`) `[batch, seq, k]`, instead of running it.
        """
        inputs, count = model_inputs(input_ids, attention_mask), num_items_in_batch
        taught: Tensor | TopK
        of_teacher: Tensor | None = None
        taught_states: dict[str, Tensor] = {}
        if teacher_indices is not None and teacher_log_probs is not None and teacher_rest is not None:
            taught = TopK(teacher_indices, teacher_log_probs, teacher_rest)
        else:
            with catching(self._teacher_readers[0]) as taught_states:
                taught, of_teacher = self.learned_from(inputs, labels, count)
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
        if of_teacher is not None:
            loss = loss + of_teacher
            parts["teacher_ce"] = of_teacher.detach()
        return {"loss": loss, **parts}

    def learned_from(
        self, inputs: dict[str, Any], labels: Tensor, count: Tensor | float | None
    ) -> tuple[Tensor, Tensor | None]:
        """The teacher's last hidden states, and a loss of its own where it learns too."""
        return self.teach(inputs), None

    def _alpha(self, apart: Tensor, between: Tensor) -> Tensor | float:
        """The weight of each sequence's states, from its two losses `[batch]`."""
        return self.state_weight or balance(self.objective.kd_weight * apart, between)
