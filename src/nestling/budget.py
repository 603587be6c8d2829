"""Budgets: what `--to` says, as limits on what a model costs.

0.5x                                    half the parameters; a bare number below 1 means the same
100M, 7B                                at most so many parameters
params=4B,kv_bytes=1G,latency=0.7x      named limits, absolute or relative to the parent
memory_bytes=8G,latency=20ms            weights, cache and state together; time per new token on this machine
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from nestling.cost import Cost
from nestling.errors import TargetError

LATENCY = "latency"
# limit -> the field of `Cost` that it limits
LIMITS = {
    "params": "params",
    "active_params": "active_params",
    "weight_bytes": "weight_bytes",
    "kv_bytes": "kv_bytes",
    "state_bytes": "state_bytes",
    "memory_bytes": "memory_bytes",
    "flops_per_token": "flops_per_token",
    LATENCY: "latency_ms",
}
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
_TIMES = {"us": 1e-3, "ms": 1, "s": 1e3}


@dataclass(frozen=True)
class Limit:
    """At most `value`, or at most `value` times the parent's if relative. Latencies are in milliseconds."""

    value: float
    relative: bool

    def of(self, parent: float) -> float:
        return self.value * parent if self.relative else self.value

    def __str__(self) -> str:
        return f"{self.value:g}x" if self.relative else f"{self.value:.12g}"


@dataclass(frozen=True)
class Budget:
    """Limits by name: costs of a model, or its `latency`."""

    limits: Mapping[str, Limit]

    @classmethod
    def parse(cls, text: str | float) -> Budget:
        """Read what `--to` takes. Raises `TargetError` on anything else."""
        text = f"{text:g}x" if isinstance(text, float) else str(text)
        limits = {}
        for part in text.split(","):
            name, _, value = part.rpartition("=")
            name = name.strip() or "params"
            if name not in LIMITS:
                raise TargetError(f"'{name}' is not a limit: choose from {', '.join(LIMITS)}")
            limits[name] = _limit(name, value.strip())
        return cls(limits)

    @property
    def timed(self) -> bool:
        """Whether latencies must be known to tell if it is kept."""
        return LATENCY in self.limits

    def check(self, parent: Cost) -> None:
        """Raises `TargetError` if a limit leaves nothing to cut, or the parent has nothing of what it limits."""
        for name, limit in self.limits.items():
            have = getattr(parent, LIMITS[name])
            if have is None:  # not measured yet; a ratio can be judged all the same
                have = 1.0 if limit.relative else None
            if have == 0:
                raise TargetError(f"this model has no {name} that could be fewer: leave the limit on them out")
            if have is not None and limit.of(have) >= have:
                raise TargetError(
                    f"the target {name}={_shown(name, limit)} is not below the parent's {have:,.0f}: ask for less, "
                    f"such as 0.75x"
                )

    def met_by(self, cost: Cost, parent: Cost) -> bool:
        """Whether a cost keeps every limit; latency, where it was not measured, aside."""
        for name, limit in self.limits.items():
            value, whole = getattr(cost, LIMITS[name]), getattr(parent, LIMITS[name])
            if value is not None and whole is not None and value > limit.of(whole):
                return False
        return True

    def used_by(self, cost: Cost, parent: Cost) -> float:
        """How much of the tightest limit a cost uses, 1 for all of it; what was not measured aside."""
        pairs = [
            (getattr(cost, LIMITS[name]), getattr(parent, LIMITS[name]), limit) for name, limit in self.limits.items()
        ]
        return max(
            (value / limit.of(whole) for value, whole, limit in pairs if value is not None and whole), default=1.0
        )

    def resolved(self, parent: Cost) -> Budget:
        """The same limits in absolute figures, for a model that is cut from another one than `parent`.

        A relative latency whose parent was not measured stays relative.
        """
        absolute = {}
        for name, limit in self.limits.items():
            whole = getattr(parent, LIMITS[name])
            absolute[name] = limit if whole is None else Limit(limit.of(whole), False)
        return Budget(absolute)

    def __str__(self) -> str:
        if set(self.limits) == {"params"}:
            return str(self.limits["params"])
        return ",".join(f"{name}={_shown(name, limit)}" for name, limit in self.limits.items())


def _shown(name: str, limit: Limit) -> str:
    return f"{limit}ms" if name == LATENCY and not limit.relative else str(limit)


def amount(text: str | float) -> float:
    """A number as people write it: 94B, 400T, 48Gi. Raises `TargetError` for anything else, and for none at all."""
    found = _NUMBER.match(str(text).strip())
    factor = _FACTORS.get(found.group(2).lower()) if found else None
    if not found or factor is None or float(found.group(1)) <= 0:
        raise TargetError(f"'{text}' is not an amount above zero: write a number such as 94B or 48Gi")
    return float(found.group(1)) * factor


def _limit(name: str, text: str) -> Limit:
    found = _NUMBER.match(text)
    suffix = found.group(2).lower() if found else "?"
    factors = _TIMES if name == LATENCY else _FACTORS
    # Half a parameter is nothing that anyone asks for.
    relative = suffix == "x" or (found is not None and not suffix and 0 < float(found.group(1)) < 1)
    if not found or not (relative or suffix in factors):
        example = "20ms" if name == LATENCY else "a number such as 100M or 7B"
        raise TargetError(f"'{text}' is not a target for {name}: write 0.5x, or {example}")
    value = float(found.group(1)) * (1 if relative else factors[suffix])
    if value <= 0:
        raise TargetError(f"the target {name}={text} is not above zero: write 0.5x, or a number such as 100M")
    return Limit(value, relative)
