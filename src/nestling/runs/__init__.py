"""What every folder of a run needs, whoever fills it: one job at a time, and the settings that it was begun with."""

from nestling.runs.hold import Hold, held, hold
from nestling.runs.same import difference, plain

__all__ = ["Hold", "difference", "held", "hold", "plain"]
