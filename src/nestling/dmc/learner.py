"""`Retrofit`: the loss of a model that learns to merge (arXiv 2403.09636, sections 3 and 4).

    L = L_model + lambda * mean over sequences of max(0, p* - p)        p* = 1 - 1 / R_t
p is the part of tokens that merge, over all layers and heads together: heads are free to differ. R_t is 1 while the
gate channel is taken out of attention, rises linearly to the target, and stays. The paper's lambda is 1, and a short
retrofit then misses its target; here lambda is a dual variable that follows the shortfall of decisions without noise,
once per step and the same in every process.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from nestling import processes
from nestling.anatomy import decoder
from nestling.dmc.convert import free, set_keep
from nestling.dmc.runtime.heads import Decisions
from nestling.dmc.runtime.modeling import recording
from nestling.dmc.settings import RetrofitSettings
from nestling.train import IGNORE, Learner, model_inputs

MOST = 100.0  # of lambda


class Retrofit(Learner):
    """A converted student that learns to merge; the teacher is the model as it was, or None for plain cross-entropy."""

    pressure: Tensor
    shortfall: Tensor  # of the step so far: p* less the part that merges without noise
    freed: Tensor  # whether the gate channel is out of attention; checkpoints keep it with the two above

    def __init__(self, student: PreTrainedModel, teacher: PreTrainedModel | None, settings: RetrofitSettings):
        super().__init__(student, teacher)
        self.settings = settings
        self.objective = settings.objective()
        self.register_buffer("pressure", torch.tensor(float(settings.pressure)))
        self.register_buffer("shortfall", torch.zeros(()))
        self.register_buffer("freed", torch.zeros((), dtype=torch.bool))
        self.goal = 0.0

    def begin(self, step: int, steps: int) -> None:
        """Where step `step` of `steps` is in the three stages: how much of the channel is left, p*, and lambda."""
        self.press()
        freed = round(self.settings.free_part * steps)
        risen = max(1, steps - freed - round(self.settings.settle_part * steps))
        self.freed.fill_(step >= freed)
        if step < freed:
            set_keep(self.student, max(1e-6, 1 - step / (0.8 * freed)))
        elif step == freed:
            free(self.student)
        else:
            set_keep(self.student, 0.0)
        ratio = 1 + (self.settings.ratio - 1) * min(1.0, max(0, step - freed + 1) / risen)
        self.goal = 1 - 1 / ratio

    def finish(self) -> None:
        """Leave the student with gates that decide, also after a job shorter than its first stage.

        A run that goes on from its last checkpoint has no step to begin, and its channel has learnt since it was freed.
        """
        if self.freed:
            set_keep(self.student, 0.0)
        else:
            free(self.student)

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        attention_mask: Tensor | None = None,
        num_items_in_batch: Tensor | float | None = None,
    ) -> dict[str, Tensor]:
        """Scalars: the loss, and detached `kl`, `ce`, `merged` (part of tokens) and `pressure` (lambda)."""
        self.settings.check_rows(input_ids.shape[1])
        inputs, count = model_inputs(input_ids, attention_mask), num_items_in_batch
        taught = self.teach(inputs) if self.teacher is not None else None
        with recording(self.student) as decisions:
            hidden = decoder(self.student)(**inputs).last_hidden_state
        losses = self.logit_losses(hidden, labels, self.objective, taught, count)
        counted = (labels != IGNORE).sum()
        share = counted / count if count is not None else torch.ones_like(losses.loss)  # of the accumulated batch
        noisy, quiet = (merged_part(decisions, noise) for noise in (True, False))
        short = (self.goal - noisy).clamp_min(0).mean()
        self.shortfall += processes.summed((share * (self.goal - quiet.mean())).detach()).to(self.shortfall)
        parts = {"kl": losses.divergence} if taught is not None else {}
        return {
            "loss": losses.loss + share * self.pressure * short,
            **parts,
            "ce": losses.cross_entropy,
            "merged": share * quiet.mean().detach(),
            "pressure": share * self.pressure,
        }

    def press(self) -> None:
        """Move lambda by what the last step was short of, over all of its micro-batches and processes."""
        self.pressure.add_(self.settings.gain * self.shortfall)
        self.pressure.clamp_(min(self.settings.pressure, MOST), MOST)
        self.shortfall.zero_()


def merged_part(decisions: list[Decisions], noise: bool = False) -> Tensor:
    """Part of its tokens that a sequence merges, over layers and heads, `[batch]`; differentiable with `noise`."""
    valid = decisions[0].valid.to(decisions[0].logits.dtype)
    merged = sum((d.merged if noise else d.quiet.to(valid.dtype)).mul(valid[:, None]).sum((1, 2)) for d in decisions)
    heads = sum(d.merged.shape[1] for d in decisions)
    return merged / (heads * valid.sum(1).clamp_min(1))
