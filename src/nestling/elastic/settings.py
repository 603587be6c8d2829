"""The settings of elastic training: what `elastic.train()`, the command line and YAML files take."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from transformers.modeling_layers import GradientCheckpointingLayer

from nestling.elastic.router import MASKS, Schedule
from nestling.errors import NestlingError
from nestling.train import Objective, TrainSettings, documented

TEACHERS = ("frozen", "trainable", "none")
WHOLE = "1x"
# Whether what is recomputed of a layer is its forward pass alone, not its hooks too, as before transformers 5.24.
HOOKS_STAY_OUT = "__call__" not in vars(GradientCheckpointingLayer)


@documented
@dataclass
class ElasticSettings(TrainSettings):
    """Settings of elastic training.

    Args:
        per_layer: Config fields whose size may differ between layers, with commas between; such members load through
            `import nestling`, the others in plain transformers.
        axes: Config fields that may be cut; all of them unless given.
        chain: Nest every member in the next larger one too, not only in the parent.
        routing: Part of the steps in which the router learns, under masks; shapes are fixed afterwards and members run
            on slices. 0 takes the shapes the router starts with.
        probe_tokens: Tokens on which every axis is tried at smaller sizes to find what the router starts with; 0 starts
            at about the same part of every axis.
        masks: While the router learns: soft, straight_through or hard.
        router_learning_rate: Peak of the router's learning rate.
        tau_start: First temperature of the router's softmax.
        tau_end: Its last temperature.
        scale_end: What the router's logits are multiplied by at the end, from 1.
        teacher: Who teaches the members: a frozen copy of the parent, the trainable parent, or none (cross-entropy).
        loss: Divergence of the member's from the teacher's distribution: forward_kl or reverse_kl.
        temperature: Of both softmaxes in that divergence.
        top_k: Compare the teacher's k likeliest tokens only, as a teacher cache keeps them; 0 compares all.
        ce_weight: Weight of the cross-entropy that guards a trainable teacher.
        members_per_step: Members (the parent is one) that learn from each batch, drawn by weight; 0 for all of them.
        weights: Weight of the parent, then of each budget as given; equal unless given.
        cost_context: Tokens at which KV cache and FLOPs are counted.
        long_context: Tokens per sequence of a second stage, with fixed shapes; 0 for none.
        long_tokens: Tokens of the second stage.
        long_batch_size: Sequences per step of the second stage; as many tokens per step as before unless given.
        long_weights: Weights in the second stage; those of the first unless given.
    """

    per_layer: str | list[str] = ""
    axes: str | list[str] = ""
    chain: bool = False
    routing: float = 0.1
    probe_tokens: int = 2048
    masks: str = "soft"
    router_learning_rate: float = 1e-2
    tau_start: float = 1.0
    tau_end: float = 0.05
    scale_end: float = 10.0
    teacher: str = "frozen"
    loss: str = "forward_kl"
    temperature: float = 1.0
    top_k: int = 0
    ce_weight: float = 1.0
    members_per_step: int = 0
    weights: list[float] = field(default_factory=list)
    cost_context: int = 4096
    long_context: int = 0
    long_tokens: int = 0
    long_batch_size: int = 0
    long_weights: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.objective()
        for name, value, known in (("masks", self.masks, MASKS), ("teacher", self.teacher, TEACHERS)):
            if value not in known:
                raise NestlingError(f"{name} '{value}' is not known: choose from {', '.join(known)}")
        if not 0 <= self.routing <= 1:
            raise NestlingError(f"routing {self.routing} is not a part of the steps: give a number from 0 to 1")
        if not (self.tau_end > 0 and self.tau_start > 0 and self.scale_end > 0 and self.router_learning_rate > 0):
            raise NestlingError("tau_start, tau_end, scale_end and router_learning_rate must be above 0")
        if not HOOKS_STAY_OUT:
            if self.gradient_checkpointing:
                raise NestlingError("transformers 5.24 or later is needed to recompute activations here: upgrade it")
            self.gradient_checkpointing = False
        if bool(self.long_context) != bool(self.long_tokens):
            raise NestlingError("a second stage needs both long_context and long_tokens: give the other one too")

    def objective(self) -> Objective:
        """What is asked of a member's logits. Raises `NestlingError` for a value that is not possible."""
        if self.teacher == "none":
            return Objective(kd_weight=0.0, ce_weight=1.0)
        return Objective(self.loss, self.temperature, kd_weight=1.0, ce_weight=0.0, top_k=self.top_k)

    def schedule(self) -> Schedule:
        return Schedule((self.tau_start, self.tau_end), (1.0, self.scale_end))

    def shares(self, budgets: int) -> list[float]:
        """The weight of the parent and of each budget. Raises `NestlingError` when there are not as many."""
        weights = self.weights or [1.0] * (budgets + 1)
        if len(weights) != budgets + 1 or min(weights) < 0 or max(weights[1:]) <= 0:
            raise NestlingError(
                f"weights {weights} do not fit the parent and {budgets} budgets: give {budgets + 1} numbers of at "
                f"least 0, parent first"
            )
        return [weight / sum(weights) for weight in weights]

    def second(self) -> ElasticSettings:
        """The settings of the second stage."""
        return replace(
            self,
            context=self.long_context,
            tokens=self.long_tokens,
            steps=None,
            batch_size=self.long_batch_size or max(1, self.batch_size * self.context // self.long_context),
            micro_batch_size=0,  # that of short sequences neither fits nor divides
            weights=self.long_weights or self.weights,
            routing=0.0,
            long_context=0,
            long_tokens=0,
        )


def listed(value: str | list[str]) -> tuple[str, ...]:
    """Names given as a list, or as one text with commas between them."""
    parts = value.split(",") if isinstance(value, str) else value
    return tuple(part.strip() for part in parts if part.strip())
