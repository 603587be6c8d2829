"""Settings that several verbs share, documented once."""

from __future__ import annotations

from dataclasses import dataclass

from nestling.errors import NestlingError
from nestling.ranking.metrics import find_metric
from nestling.ranking.rank import check_layer_metric
from nestling.train import documented
from nestling.train.settings import check_seed

FORMER_TOKENS = {"tokens": "calibration_tokens"}  # of the verbs whose only tokens these are


@dataclass(kw_only=True)
class ModelSettings:
    """Settings of a verb that loads models.

    Args:
        dtype: Of the weights: auto, float32, bfloat16 or float16.
        device: Where to compute; the best there is unless given.
        trust_remote_code: Let the checkpoint run code of its own.
    """

    dtype: str = "auto"
    device: str | None = None
    trust_remote_code: bool = False


@documented
@dataclass(kw_only=True)
class CalibrationSettings(ModelSettings):
    """Settings of a verb that reads calibration text.

    Args:
        data: Text: hub dataset, local file or folder, or builtin:stdlib.
        generated: Part of the calibration text that the model writes itself, from 0 to 1, so that the child is good
            on other text than the data too.
        calibration_tokens: Tokens of that text.
        context: Tokens per row of text.
        seed: The one seed of every random choice.
    """

    data: str = "builtin:stdlib"
    generated: float = 0.5
    calibration_tokens: int = 8192
    context: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        check_seed(self.seed)


@documented
@dataclass(kw_only=True)
class ShapeSettings(CalibrationSettings):
    """Settings of a verb that finds a shape on calibration text.

    Args:
        axes: Config fields that may be cut, with commas between; all of them unless given.
        finalists: Candidate shapes that are really cut and scored.
        trial_tokens: Tokens for which each finalist is distilled before the choice, the better half again for twice as
            many until one is left; 0 chooses by the loss on calibration text.
        cost_context: Tokens per sequence at which KV cache and FLOPs are counted.
        cost_batch: Sequences at which caches are counted and latency is measured.
        latency_context: Tokens in the cache before the one whose latency is measured.
    """

    axes: str | list[str] = ""
    finalists: int = 4
    trial_tokens: int = 0
    cost_context: int = 4096
    cost_batch: int = 1
    latency_context: int = 512

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("finalists", 1), ("trial_tokens", 0), ("cost_context", 1), ("cost_batch", 1)):
            at_least(name, getattr(self, name), least)
        at_least("latency_context", self.latency_context, 1)


def at_least(name: str, value: int, least: int) -> None:
    """Raises `NestlingError` for a number below what is possible."""
    if value < least:
        raise NestlingError(f"{name} {value} is not possible: give at least {least}")


def check_metrics(metric: str | None, layers: str, greedy_layers: int = 0) -> None:
    """Raises `NestlingError` for importance metrics that do not exist or do not go together."""
    if metric is not None:
        find_metric(metric.partition("@")[0])
    check_layer_metric(layers, greedy_layers)


def listed(value: str | list[str]) -> list[str]:
    """Names given as a list, or as one text with commas between them."""
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else list(value)
