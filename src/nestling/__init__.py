"""Nestling turns one language model into a family: rank, prune and distill Hugging Face checkpoints."""

from nestling import dmc, elastic, moe
from nestling.anatomy import Anatomy
from nestling.cost import Cost, cost
from nestling.distill import distill
from nestling.elastic import Family
from nestling.errors import NestlingError, ShapeError, UnsupportedArchitecture
from nestling.hub import load
from nestling.pretrain import pretrain
from nestling.ranking import Ranking, rank
from nestling.shape import Shape
from nestling.surgery import masked, prune, reorder

__version__ = "0.1.0"

__all__ = [
    "Anatomy",
    "Cost",
    "Family",
    "NestlingError",
    "Ranking",
    "Shape",
    "ShapeError",
    "UnsupportedArchitecture",
    "cost",
    "distill",
    "dmc",
    "elastic",
    "load",
    "masked",
    "moe",
    "pretrain",
    "prune",
    "rank",
    "reorder",
]
