"""What can go wrong, said in one sentence each.

Every error a user can cause is a `NestlingError`: its message names the thing, the value that was given and
the remedy. The command line prints that sentence and exits with code 2; nothing else is caught there.
"""


class NestlingError(Exception):
    """A mistake in the input that the user can mend; the message is one sentence that says how."""


class UnsupportedArchitecture(NestlingError):
    """The model's architecture has no declaration in `nestling.anatomy.architectures`."""


class ShapeError(NestlingError):
    """A shape that the model or its config class cannot take; the message names the nearest that it can."""


class TargetError(NestlingError):
    """A budget (`--to`) that cannot be read, or that no shape of the model meets."""


class DataError(NestlingError):
    """Data that is missing, empty, too short or of the wrong form."""


class CheckpointError(NestlingError):
    """A checkpoint or run folder that is missing, damaged or does not fit what is asked of it."""
