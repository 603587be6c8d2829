"""Teacher correction: the teacher learns the text that it shall teach, before the student or together with it.

A teacher that was trained on other data than the student will see teaches it worse (arXiv 2408.11796, section 3.1):
it is fine-tuned on the distillation text with plain cross-entropy, at a fifth of the learning rate, and the student
then learns from it. Pruning the original and correcting at the same time does as well there (figure 5). The
correction works on a copy in float32: the model that was given stays as it is.
"""

from __future__ import annotations

import copy
import dataclasses
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nestling import hub, processes
from nestling.anatomy import decoder
from nestling.distill.pair import Pair
from nestling.distill.settings import DistillSettings
from nestling.train import CROSS_ENTROPY, CausalLM, Head, TrainSettings, fit, logit_losses

FOLDER = "teacher"  # in the run folder, while it is needed or if it is kept
CHECKPOINTS = "correction"  # while it is being made


def corrected(
    teacher: PreTrainedModel,
    data: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    settings: DistillSettings,
    run_dir: str | Path | None = None,
    resume: bool = True,
) -> PreTrainedModel:
    """A copy of the teacher, fine-tuned on the data; with a `run_dir` resumable, and kept in its folder `teacher`."""
    folder = Path(run_dir, FOLDER) if run_dir is not None else None
    if folder is not None and resume and (folder / "config.json").exists():
        return hub.load(folder, dtype=teacher.dtype, device=teacher.device)[0]
    model, settings = copied(teacher), settings.sized()
    shared = {each.name: getattr(settings, each.name) for each in dataclasses.fields(TrainSettings)}
    if settings.correct_tokens:
        shared |= {"tokens": settings.correct_tokens, "steps": None}
    shared["learning_rate"] = settings.learning_rate * settings.correct_rate
    place = Path(run_dir, CHECKPOINTS) if run_dir is not None else None
    fit(CausalLM(model), data, tokenizer, TrainSettings(**shared), place, resume)
    model = model.to(teacher.dtype)  # type: ignore[arg-type]
    if folder is not None:
        processes.first(lambda: str(hub.save(model, folder, tokenizer, overwrite=True)))
    return model


def leave(run_dir: str | Path, keep: bool) -> None:
    """Remove what a correction left in the run folder; the corrected teacher stays if it is to be kept."""
    shutil.rmtree(Path(run_dir, CHECKPOINTS), ignore_errors=True)
    if not keep:
        shutil.rmtree(Path(run_dir, FOLDER), ignore_errors=True)


class Together(Pair):
    """A student that learns from a teacher that is being corrected: two losses in one step, no gradient between them.

    The copy of the teacher is part of this module, so it is trained and checkpointed beside the student; `rate` is its
    learning rate as a multiple of the student's.
    """

    def __init__(self, student: PreTrainedModel, teacher: PreTrainedModel, *how: Any, rate: float):
        teacher = copied(teacher)
        super().__init__(student, teacher, *how)
        self.corrected = teacher
        self.rates = {"corrected": rate}

    def learned_from(
        self, inputs: dict[str, Any], labels: Tensor, count: Tensor | float | None
    ) -> tuple[Tensor, Tensor | None]:
        hidden = decoder(self.corrected)(**inputs).last_hidden_state
        head = Head(self._heads[1], tuple(self.corrected.get_output_embeddings().parameters()))  # type: ignore[arg-type]
        losses = logit_losses(hidden, head, None, head, labels, CROSS_ENTROPY, count=count)
        return hidden.detach(), losses.loss


def copied(teacher: PreTrainedModel) -> PreTrainedModel:
    """A trainable copy with weights of at least float32."""
    dtype = torch.promote_types(teacher.dtype, torch.float32)
    return copy.deepcopy(teacher).to(dtype).requires_grad_(True)  # type: ignore[arg-type]
