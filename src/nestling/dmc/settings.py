"""The settings of a retrofit: what `retrofit()`, the command line and YAML files take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nestling.dmc.runtime.gates import METHODS
from nestling.errors import NestlingError
from nestling.train import Objective, TrainSettings, documented


@documented
@dataclass
class RetrofitSettings(TrainSettings):
    """Settings of a retrofit.

    Args:
        ratio: Tokens per slot of the cache that the model shall reach, over all layers and heads together.
        method: What the cache does with a token that is to have no slot of its own: dmc merges it into the one before,
            dms drops it when it has left a window (the ratio is then tokens over what a row holds at its end).
        window: Tokens that dms keeps whatever is decided.
        shared: One decision for all heads of a layer (DMC-C), so that they stay equally long.
        free_part: Part of the steps in which the gate channel is taken out of attention.
        settle_part: Part of the steps at the end in which the ratio stays where it is.
        scale: Factor of the gates' logits; at 1, as in the paper, a short retrofit never leaves the noise.
        offset: Below which logits start: at 5 nothing merges at first.
        temperature: Of the relaxed decisions in training.
        pressure: Least weight of the loss that asks for the ratio.
        gain: By how much that weight grows in a step that is all of the ratio short; it falls back in the same way.
        calibration_tokens: Tokens of the training text on which the gates' offset is moved to meet the ratio; with 0 it
            stays.
        kd_weight: Weight of the divergence from the model as it was.
        ce_weight: Weight of the cross-entropy with the data.
        loss: Divergence of the student's from the teacher's distribution: forward_kl or reverse_kl.
        kd_temperature: Of both softmaxes in that divergence.
    """

    ratio: float = 4.0
    method: str = "dmc"
    window: int = 16
    shared: bool = False
    free_part: float = 0.05
    settle_part: float = 0.25
    scale: float = 10.0
    offset: float = 5.0
    temperature: float = 0.1
    pressure: float = 1.0
    gain: float = 1.0
    calibration_tokens: int = 8192
    kd_weight: float = 1.0
    ce_weight: float = 0.0
    loss: str = "forward_kl"
    kd_temperature: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.objective()
        if not self.ratio >= 1:
            raise NestlingError(f"ratio {self.ratio} is not possible: give how many tokens shall share a slot, say 4")
        if self.free_part < 0 or self.settle_part < 0 or not self.free_part + self.settle_part < 1:
            raise NestlingError(
                f"free_part {self.free_part} and settle_part {self.settle_part} leave no step to raise the ratio in: "
                f"give parts that are less than 1 together"
            )
        if self.method not in METHODS:
            raise NestlingError(f"there is no method '{self.method}' for a cache: choose from {', '.join(METHODS)}")
        if self.window < 0:
            raise NestlingError(f"window {self.window} is not possible: give how many tokens are kept at least")
        if self.calibration_tokens < 0:
            raise NestlingError(f"calibration_tokens {self.calibration_tokens} is not possible: give 0 or more")
        if self.pressure < 0 or self.gain < 0:
            raise NestlingError(f"pressure {self.pressure} and gain {self.gain} are weights: give at least 0")

    def objective(self) -> Objective:
        """What is asked of the logits. Raises `NestlingError` for a value that is not possible."""
        return Objective(self.loss, self.kd_temperature, False, self.kd_weight, self.ce_weight)

    def check_rows(self, seq: int) -> None:
        """Raises `NestlingError` for rows of `seq` tokens of which a window keeps more than the ratio leaves."""
        held, most = self.window + 1, seq / self.ratio
        if self.method == "dms" and held > most:
            raise NestlingError(
                f"rows of {seq} tokens at a ratio of {self.ratio:g} leave {most:.0f} to be held, and a window of "
                f"{self.window} holds {held} alone: give a smaller window or a longer context"
            )

    def gates(self) -> dict[str, Any]:
        """The fields of `Gates` that `convert` takes."""
        return {name: getattr(self, name) for name in ("scale", "offset", "temperature", "shared", "method", "window")}
