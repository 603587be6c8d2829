"""Shapes of a budget that no router has chosen: what learned shapes are to be compared with."""

from __future__ import annotations

import torch

from nestling.elastic.space import Space
from nestling.elastic.target import Target, harden
from nestling.shape import Shape

PULL = 50.0
SPREAD = 3.0


def uniform(space: Space, target: Target) -> Shape:
    """About the same part of every axis, layers included; the part that meets the budget."""
    low, high = 0.0, 1.0
    for _ in range(20):
        part = (low + high) / 2
        sizes = {field: (knob.sizes[:, 0] * part).ceil().clamp(min=1).long() for field, knob in space.knobs.items()}
        low, high = (part, high) if target.of_sizes(space, sizes) < 1 else (low, part)
    near = {field: -PULL * (knob.sizes / knob.sizes[:, :1] - low).abs() for field, knob in space.knobs.items()}
    return space.shape(harden(space, target, near))


def random(space: Space, target: Target, seed: int) -> Shape:
    """Wishes drawn at random, as far as the budget allows."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {f: SPREAD * torch.randn(knob.sizes.shape, generator=generator) for f, knob in space.knobs.items()}
    return space.shape(harden(space, target, drawn))
