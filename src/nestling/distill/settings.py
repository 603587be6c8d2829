"""The settings of distillation: what `distill()`, the command line and YAML files take."""

from __future__ import annotations

from dataclasses import dataclass, field

from nestling.distill.states import check_states
from nestling.train import Objective, TrainSettings, documented


@documented
@dataclass
class DistillSettings(TrainSettings):
    """Settings of distillation.

    Args:
        loss: Divergence of the student's from the teacher's distribution: forward_kl or reverse_kl.
        temperature: Of both softmaxes in that divergence; 1 did best in the paper.
        scale_by_temperature: Multiply the divergence by temperature squared, so that its gradient keeps its size.
        kd_weight: Weight of the divergence.
        ce_weight: Weight of the cross-entropy with the data; 0 did best in the paper.
        states: Intermediate states to compare too (embedding, output, mlp_input): embedding and output help when many
            layers were cut, none are needed otherwise.
        state_loss: Loss between states: cosine or mse.
    """

    loss: str = "forward_kl"
    temperature: float = 1.0
    scale_by_temperature: bool = False
    kd_weight: float = 1.0
    ce_weight: float = 0.0
    states: list[str] = field(default_factory=list)
    state_loss: str = "cosine"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.objective()
        check_states(self.states, self.state_loss)

    def objective(self) -> Objective:
        """What is asked of the logits. Raises `NestlingError` for a value that is not possible."""
        return Objective(self.loss, self.temperature, self.scale_by_temperature, self.kd_weight, self.ce_weight)
