"""`Learner`: what a method hands to the training loop, a model and the loss of a batch.

A method (distillation, elastic families, DMC, experts, pretraining) subclasses it and writes `forward`; data order,
optimizer, checkpoints, resuming, metrics and progress are the loop's (`nestling.train.fit`). Being one module, it is
wrapped (DDP) or sharded (`nestling.train.sharding`) as a whole. A teacher is held, not owned: it is in no optimizer,
checkpoint or gradient reduction.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from nestling.anatomy import decoder, logits_head
from nestling.train.divergences import TopK
from nestling.train.losses import CROSS_ENTROPY, Head, LogitLosses, Objective, logit_losses


class Learner(nn.Module):
    """A model that learns, and maybe one that teaches.

    student: trained, and what a checkpoint's folder holds as `save_pretrained` writes it. Other submodules and buffers
    of a learner (routers, projections, dual variables) are trained and checkpointed beside it. teacher: called without
    gradients, in its own dtype. rates: for parameters whose name in the learner begins so, a multiple of the
    learning rate. gathers_all: whether its forward pass reads weights elsewhere than in the layers that have them, so
    that sharding must gather all of them at once.
    """

    accepts_loss_kwargs = True  # `Trainer` passes num_items_in_batch, and does not divide by accumulation steps
    rates: Mapping[str, float] = {}
    gathers_all = False
    is_sharded = False  # while `nestling.train.sharding` has spread it over the processes

    def __init__(self, student: PreTrainedModel, teacher: PreTrainedModel | None = None):
        super().__init__()
        self.student = student
        self._taught = (Taught(teacher) if teacher is not None else None,)  # in a tuple, so that it is no submodule
        self._heads = (logits_head(student), logits_head(teacher) if teacher is not None else None)

    @property
    def teacher(self) -> PreTrainedModel | None:
        return self._taught[0].model if self._taught[0] is not None else None

    @property
    def taught(self) -> Taught:
        """The teacher as one module that is called for its last hidden states."""
        assert self._taught[0] is not None, "this learner has no teacher"
        return self._taught[0]

    def begin(self, step: int, steps: int) -> None:
        """Called before each optimizer step, numbered from 0: the place for schedules and for noise of (seed, step)."""

    def recomputed(self) -> tuple[AbstractContextManager, AbstractContextManager]:
        """Contexts of a layer's forward pass and of that which recomputes it: the place to restore what hooks did."""
        return nullcontext(), nullcontext()

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        attention_mask: Tensor | None = None,
        num_items_in_batch: Tensor | float | None = None,
    ) -> dict[str, Tensor]:
        """The scalar `loss`, and detached scalars by name for the log, all means over real tokens.

        input_ids, attention_mask: `[batch, seq]`. labels: the token after each position `[batch, seq]`, -100 where it
        does not count. num_items_in_batch: real tokens of the whole accumulated batch; of this one unless given.
        """
        raise NotImplementedError

    @torch.no_grad()
    def teach(self, inputs: Mapping[str, Any]) -> Tensor:
        """The teacher's last hidden states `[batch, seq, hidden]`."""
        with own_dtype(inputs["input_ids"]):
            return self.taught(**inputs)

    def nats(self, input_ids: Tensor, labels: Tensor, of_teacher: bool = False) -> Tensor:
        """The student's (or teacher's) cross-entropy in nats, summed over labels `[batch, seq]`; a scalar."""
        if of_teacher:
            hidden = self.teach(model_inputs(input_ids, None))
            head = Head(self._teacher_head, ())
            return logit_losses(hidden, head, None, head, labels, CROSS_ENTROPY, count=1).cross_entropy
        hidden = decoder(self.student)(**model_inputs(input_ids, None)).last_hidden_state
        return self.logit_losses(hidden, labels, CROSS_ENTROPY, None, 1).cross_entropy

    def logit_losses(
        self,
        hidden: Tensor,
        labels: Tensor,
        objective: Objective,
        taught: Tensor | TopK | None = None,
        count: Tensor | float | None = None,
    ) -> LogitLosses:
        """The losses of the student's last hidden states `[batch, seq, hidden]`, in chunks of tokens.

        taught: the teacher's, or what was kept of its distributions; without them only cross-entropy can be asked for.
        count: what sums are divided by.
        """
        head = Head(self._heads[0], tuple(self.student.get_output_embeddings().parameters()))
        return logit_losses(hidden, head, taught, self._teacher_head, labels, objective, count=count)

    def _teacher_head(self, hidden: Tensor) -> Tensor:
        assert self._heads[1] is not None, "this learner has no teacher"
        with own_dtype(hidden):
            return self._heads[1](hidden)


class Taught(nn.Module):
    """A teacher as one module: what sharding needs, to know when its forward pass begins."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, **inputs: Any) -> Tensor:
        """The last hidden states `[batch, seq, hidden]`."""
        return decoder(self.model)(**inputs).last_hidden_state


def model_inputs(input_ids: Tensor, attention_mask: Tensor | None) -> dict[str, Any]:
    """What a backbone is called with; a mask that masks nothing is left out, since attention is faster without."""
    if attention_mask is not None and attention_mask.all():
        attention_mask = None
    return {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}


def own_dtype(tensor: Tensor) -> torch.autocast:
    """A context in which a model computes in the dtype of its weights, mixed precision or not."""
    return torch.autocast(tensor.device.type, enabled=False)
