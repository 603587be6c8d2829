"""Architectures that are known and not declared: why, in the sentence that their users get."""

from nestling.anatomy.declare import REFUSED

REFUSED["zamba2"] = (
    "its attention blocks are shared by layers in turn, each with adapters of its own, and its config derives the "
    "sizes of all heads from hidden_size, so that no width and no layer can go alone"
)
