"""Nestling turns one language model into a family."""

__version__ = "0.1.0"
