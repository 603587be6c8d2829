"""Checkpoints in and out: one `load` for every kind of source, one atomic `save`, safetensors only.

A source is a hub id, a local folder, a GGUF file (or a folder that holds one) or `builtin:<name>`. Whatever is wrong
with it is found before weights are read, and said as one `CheckpointError`. This package knows file formats and
nothing about what is inside a model.
"""

from nestling.hub.load import config, load, load_once, tokenizer
from nestling.hub.save import replacing, save

__all__ = ["config", "load", "load_once", "replacing", "save", "tokenizer"]
