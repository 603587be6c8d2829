"""The colour scale of importance: light to dark through yellow, green, blue, even to the eye.

Drawn in OKLab (Ottosson 2020, "A perceptual color space for image processing"), where equal steps look equal:
lightness and hue run linearly, so the scale keeps its order for every kind of colour blindness and in grey print.
The pale end is the page's own background, so what matters little recedes: light pages run it one way, dark ones the
other.
"""

from __future__ import annotations

import math

LEVELS = 24

_LIGHTNESS = (0.945, 0.32)
_HUE = (100.0, 272.0)
_CHROMA = 0.105

Triple = tuple[float, float, float]


def scale(dark: bool = False, levels: int = LEVELS) -> list[str]:
    """`levels` hex colours from least to most important, for a light or a dark page."""
    steps = [level / (levels - 1) for level in range(levels)]
    return [_hex(_colour(1 - step if dark else step)) for step in steps]


def oklab(colour: str) -> Triple:
    """(lightness, a, b) of a hex colour; lightness runs from 0 to 1."""
    red, green, blue = (_linear(int(colour[start : start + 2], 16) / 255) for start in (1, 3, 5))
    long = math.cbrt(0.4122214708 * red + 0.5363325363 * green + 0.0514459929 * blue)
    medium = math.cbrt(0.2119034982 * red + 0.6806995451 * green + 0.1073969566 * blue)
    short = math.cbrt(0.0883024619 * red + 0.2817188376 * green + 0.6299787005 * blue)
    return (
        0.2104542553 * long + 0.7936177850 * medium - 0.0040720468 * short,
        1.9779984951 * long - 2.4285922050 * medium + 0.4505937099 * short,
        0.0259040371 * long + 0.7827717662 * medium - 0.8086757660 * short,
    )


def _colour(step: float) -> Triple:
    """The point of the scale at `step` in 0..1, as RGB in 0..1; chroma gives way where screens lack the colour."""
    lightness = _LIGHTNESS[0] + step * (_LIGHTNESS[1] - _LIGHTNESS[0])
    hue = math.radians(_HUE[0] + step * (_HUE[1] - _HUE[0]))
    chroma = _CHROMA
    while True:
        rgb = _rgb(lightness, chroma * math.cos(hue), chroma * math.sin(hue))
        if all(-1e-6 <= channel <= 1 + 1e-6 for channel in rgb) or chroma < 0.005:
            return rgb
        chroma -= 0.002


def _rgb(lightness: float, a: float, b: float) -> Triple:
    long = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
    medium = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
    short = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
    return (
        _gamma(4.0767416621 * long - 3.3077115913 * medium + 0.2309699292 * short),
        _gamma(-1.2684380046 * long + 2.6097574011 * medium - 0.3413193965 * short),
        _gamma(-0.0041960863 * long - 0.7034186147 * medium + 1.7076147010 * short),
    )


def _gamma(value: float) -> float:
    return 12.92 * value if value <= 0.0031308 else 1.055 * value ** (1 / 2.4) - 0.055


def _linear(value: float) -> float:
    return value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4


def _hex(rgb: Triple) -> str:
    return "#" + "".join(f"{round(255 * min(1.0, max(0.0, channel))):02x}" for channel in rgb)
