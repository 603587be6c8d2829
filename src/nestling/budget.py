"""Budgets: what `--to` says, as limits on what a model costs.

0.5x                                    half the parameters
100M, 7B                                at most so many parameters
params=4B,kv_bytes=1G,latency=0.7x      named limits, absolute or relative to the parent
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from nestling.cost import Cost
from nestling.errors import TargetError

COSTS = ("params", "active_params", "weight_bytes", "kv_bytes", "state_bytes", "flops_per_token")
LATENCY = "latency"
_NUMBER = re.compile(r"(\d+(?:\.\d+)?|\.\d+)\s*([a-zA-Z]*)\Z")
_FACTORS = {
    "": 1,
    "k": 1e3,
    "m": 1e6,
    "g": 1e9,
    "b": 1e9,
    "t": 1e12,
    "ki": 2**10,
    "mi": 2**20,
    "gi": 2**30,
    "ti": 2**40,
}


@dataclass(frozen=True)
class Limit:
    """At most `value`, or at most `value` times the parent's if relative."""

    value: float
    relative: bool

    def of(self, parent: float) -> float:
        return self.value * parent if self.relative else self.value

    def __str__(self) -> str:
        return f"{self.value:g}x" if self.relative else f"{self.value:g}"


@dataclass(frozen=True)
class Budget:
    """Limits by name: fields of `Cost`, or `latency` (always relative to the parent)."""

    limits: Mapping[str, Limit]

    @classmethod
    def parse(cls, text: str | float) -> Budget:
        """Read what `--to` takes. Raises `TargetError` on anything else."""
        text = f"{text:g}x" if isinstance(text, float) else str(text)
        limits = {}
        for part in text.split(","):
            name, _, value = part.rpartition("=")
            name = name.strip() or "params"
            if name not in (*COSTS, LATENCY):
                raise TargetError(f"'{name}' is not a limit: choose from {', '.join((*COSTS, LATENCY))}")
            limits[name] = _limit(name, value.strip())
        return cls(limits)

    def check(self, parent: Cost) -> None:
        """Raises `TargetError` if a limit leaves nothing to cut, or the parent has nothing of what it limits."""
        for name, limit in self.limits.items():
            have = 1.0 if name == LATENCY else float(getattr(parent, name))
            if limit.of(have) >= have:
                raise TargetError(
                    f"the target {name}={limit} is not below the parent's {have:,.0f}: ask for less, such as 0.75x"
                )

    def met_by(self, cost: Cost, parent: Cost) -> bool:
        """Whether a cost keeps every limit; latency, which is measured, aside."""
        return all(
            getattr(cost, name) <= limit.of(getattr(parent, name))
            for name, limit in self.limits.items()
            if name != LATENCY
        )

    def __str__(self) -> str:
        if set(self.limits) == {"params"}:
            return str(self.limits["params"])
        return ",".join(f"{name}={limit}" for name, limit in self.limits.items())


def _limit(name: str, text: str) -> Limit:
    found = _NUMBER.match(text)
    suffix = found.group(2).lower() if found else ""
    relative = suffix == "x"
    if not found or (not relative and suffix not in _FACTORS) or (name == LATENCY and not relative):
        raise TargetError(f"'{text}' is not a target for {name}: write 0.5x, or a number such as 100M or 7B")
    value = float(found.group(1)) * (1 if relative else _FACTORS[suffix])
    if value <= 0:
        raise TargetError(f"the target {name}={text} is not above zero: write 0.5x, or a number such as 100M")
    return Limit(value, relative)
