"""Shapes of a budget that no router has chosen: what learned shapes are to be compared with."""

from __future__ import annotations

import torch

from nestling.elastic.harden import harden
from nestling.elastic.prior import even
from nestling.elastic.space import Space
from nestling.elastic.target import Target
from nestling.shape import Shape

SPREAD = 3.0


def uniform(space: Space, target: Target) -> Shape:
    """About the same part of every axis, layers included; the part that meets the budget."""
    return space.shape(harden(space, target, {field: -loss for field, loss in even(space, target).items()}))


def random(space: Space, target: Target, seed: int) -> Shape:
    """Wishes drawn at random, as far as the budget allows."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {f: SPREAD * torch.randn(knob.sizes.shape, generator=generator) for f, knob in space.knobs.items()}
    return space.shape(harden(space, target, drawn))
