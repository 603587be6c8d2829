"""What can be done to a model once its units are ranked: sort it, mask it, cut it."""

from nestling.surgery.choose import Selection, choose
from nestling.surgery.cut import prune, reorder
from nestling.surgery.mask import masked

__all__ = ["Selection", "choose", "masked", "prune", "reorder"]
