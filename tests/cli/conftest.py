"""Fixtures of the command line's tests."""

from tests.cli.workplace import brief, original, place

__all__ = ["brief", "original", "place"]
