"""What every folder of a run needs, whoever fills it: one job at a time, the settings that it was begun with, whole
files."""

from nestling.runs.hold import Hold, held, hold
from nestling.runs.same import difference, plain
from nestling.runs.write import whole, write_atomically

__all__ = ["Hold", "difference", "held", "hold", "plain", "whole", "write_atomically"]
