"""The settings of distillation: what `distill()`, the command line and YAML files take."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass, field
from typing import ClassVar

from nestling.distill.states import check_states, parse_layer_map
from nestling.errors import NestlingError
from nestling.train import Objective, TrainSettings, documented

CORRECTIONS = ("none", "first", "together")
LARGEST_BATCH = 8  # sequences per step that are taken unless more are asked for
ENOUGH_STEPS = 96  # from a given number of tokens, more and smaller steps teach more


@documented
@dataclass
class DistillSettings(TrainSettings):
    """Settings of distillation.

    Args:
        batch_size: Sequences per optimizer step, over all devices together; 0 takes 8, or as many fewer as give a short
            run 96 steps.
        learning_rate: Peak of the learning rate.
        min_lr_ratio: Last learning rate, as a part of the peak; the decay is a cosine, to nothing unless given.
        loss: Divergence of the student's from the teacher's distribution: forward_kl, reverse_kl, jensen_shannon, mse,
            cosine or logit_mse.
        temperature: Of both softmaxes in that divergence; 1 did best in the paper.
        scale_by_temperature: Multiply the divergence by temperature squared, so that its gradient keeps its size.
        kd_weight: Weight of the divergence.
        ce_weight: Weight of the cross-entropy with the data; 0 did best in the paper.
        top_k: Compare the teacher's k likeliest tokens only; 0 compares all. The paper finds 100 and fewer worse.
        remaining_mass: With top_k, the mass of all other tokens is one more class; otherwise the k are renormalized.
        states: Intermediate states to compare too (embedding, output, mlp_input): embedding and output help when many
            layers were cut, none are needed otherwise.
        state_loss: Loss between states: cosine or mse.
        state_weight: Weight of the states' loss; 0 balances it, for each sequence, to be worth as much as the
            divergence.
        correction: Fine-tune a copy of the teacher on the data with cross-entropy: first, together with the student, or
            none. For a teacher that was trained on other text.
        correct_tokens: Tokens of a correction that comes first; as many as the student's unless given.
        correct_rate: The teacher's learning rate, as a part of the student's.
        keep_teacher: Leave the corrected teacher in the run folder, under teacher/.
        layer_map: Layers whose output and mlp_input are compared, TEACHER:STUDENT, counted from 0; the third from the
            end of each unless given.
    """

    SMALLEST_BATCH = 0
    FREE: ClassVar[tuple[str, ...]] = (*TrainSettings.FREE, "keep_teacher")

    batch_size: int = 0
    learning_rate: float = 2e-4
    min_lr_ratio: float = 0.0
    evaluate_every: int | None = None
    loss: str = "forward_kl"
    temperature: float = 1.0
    scale_by_temperature: bool = False
    kd_weight: float = 1.0
    ce_weight: float = 0.0
    top_k: int = 0
    remaining_mass: bool = True
    states: list[str] = field(default_factory=list)
    state_loss: str = "cosine"
    state_weight: float = 0.0
    layer_map: str = ""
    correction: str = "none"
    correct_tokens: int = 0
    correct_rate: float = 0.2
    keep_teacher: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.objective()
        check_states(self.states, self.state_loss)
        parse_layer_map(self.layer_map)
        if self.correction not in CORRECTIONS:
            raise NestlingError(f"correction '{self.correction}' is not known: choose from {', '.join(CORRECTIONS)}")
        if self.correct_tokens < 0 or not self.correct_rate > 0:
            raise NestlingError(
                f"correct_tokens {self.correct_tokens} and correct_rate {self.correct_rate} are not possible: give at "
                f"least 0 tokens and a rate above 0"
            )
        if self.state_weight < 0:
            raise NestlingError(f"state_weight {self.state_weight} is not possible: give a number of at least 0")

    def objective(self) -> Objective:
        """What is asked of the logits. Raises `NestlingError` for a value that is not possible."""
        return Objective(
            self.loss,
            self.temperature,
            self.scale_by_temperature,
            self.kd_weight,
            self.ce_weight,
            self.top_k,
            self.remaining_mass,
        )

    def sized(self) -> DistillSettings:
        """These settings with a batch size where none was given, a multiple of the devices there are."""
        if self.batch_size:
            return self
        ranks = int(os.environ.get("WORLD_SIZE", "1"))
        fitting = LARGEST_BATCH if self.steps else self.tokens // (ENOUGH_STEPS * self.context)
        share = -(-max(1, min(LARGEST_BATCH, fitting)) // ranks)
        return dataclasses.replace(self, batch_size=share * ranks)
