"""Settings that several verbs share, documented once."""

from __future__ import annotations

from dataclasses import dataclass

from nestling.train import documented


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
        context: Tokens per row of text.
        seed: The one seed of every random choice.
    """

    data: str = "builtin:stdlib"
    generated: float = 0.5
    context: int = 256
    seed: int = 0


@documented
@dataclass(kw_only=True)
class ShapeSettings(CalibrationSettings):
    """Settings of a verb that finds a shape on calibration text.

    Args:
        axes: Config fields that may be cut, with commas between; all of them unless given.
        finalists: Candidate shapes that are really cut and scored.
        cost_context: Tokens per sequence at which KV cache and FLOPs are counted.
    """

    axes: str | list[str] = ""
    finalists: int = 4
    cost_context: int = 4096


def listed(value: str | list[str]) -> list[str]:
    """Names given as a list, or as one text with commas between them."""
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else list(value)
