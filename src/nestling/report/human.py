"""Numbers as people read them: 134.5M, 512 MiB, 1.3 GFLOP, 0.74x.

One place for every figure that the page, the card and the terminal show, so that they never disagree. `None` (not
measured) becomes a dash, infinity its sign. Knows nothing of runs or models.
"""

from __future__ import annotations

import math

NOTHING = "–"

_COUNTS = ("", "K", "M", "B", "T")
_BYTES = (" B", " KiB", " MiB", " GiB", " TiB")
_FLOPS = (" FLOP", " kFLOP", " MFLOP", " GFLOP", " TFLOP")


def count(value: float | None) -> str:
    """Parameters, tokens, units: 576, 1,536, 24.6K, 134.5M. Whole below ten thousand."""
    if value is not None and abs(value) < 10_000:
        return f"{value:,.0f}"
    return _scaled(value, 1000, _COUNTS)


def size(value: float | None) -> str:
    """Bytes in powers of 1024: 512 MiB."""
    return _scaled(value, 1024, _BYTES)


def flops(value: float | None) -> str:
    """Floating-point operations: 1.3 GFLOP."""
    return _scaled(value, 1000, _FLOPS)


def figure(value: float | None) -> str:
    """A measured number with three digits that mean something: 8.23, 84.3, 328, 1,234."""
    if not value or not math.isfinite(value):
        return _scaled(value, 1000, ("",))
    height = abs(value)
    if 0 < height < 0.001:
        return f"{value:.1e}"
    digits = 0 if height >= 99.95 else 1 if height >= 9.995 else 2 if height >= 0.0995 else 4
    return f"{value:,.{digits}f}"


def ratio(value: float | None) -> str:
    """How many times the parent's: 0.74x, 12.3x."""
    if value is None or not math.isfinite(value):
        return NOTHING if value is None else "∞"
    return f"{value:,.2f}x" if abs(value) < 9.995 else f"{value:,.1f}x"


def quotient(value: float | None, base: float | None) -> float | None:
    """value / base, or None where there is no such number."""
    if value is None or not base or not math.isfinite(base):
        return None
    return value / base


def _scaled(value: float | None, base: int, units: tuple[str, ...]) -> str:
    if value is None or math.isnan(value):
        return NOTHING
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    power = 0
    while power < len(units) - 1 and round(abs(value), 1) >= base:
        value, power = value / base, power + 1
    decimals = 0 if not power else 2 if abs(value) < 9.995 else 1
    digits = f"{value:,.{decimals}f}"
    return (digits.rstrip("0").rstrip(".") if decimals else digits) + units[power]
