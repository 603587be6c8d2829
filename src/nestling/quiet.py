"""Transformers without its bars and tables, its auto classes with a type, and its names in files."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, cast

from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence load reports and progress bars: what matters of them is raised as an error."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def model_class_name(config: PreTrainedConfig) -> str | None:
    """The name of the causal language model class for a config, or `None` when there is none."""
    found: Any = AutoModelForCausalLM._model_mapping.get(type(config), None)
    return found.__name__ if found is not None else None


def saved_as_published(model: PreTrainedModel) -> None:
    """Let a model be saved under the names that its type has on the hub; one of a type of ours as it is inside.

    transformers keeps inside a model other names than in its files (all experts of a layer in one tensor), and saves a
    model as it was read: one that was made from tensors in memory as it is inside, which other programs cannot read,
    and one that became another type since with names that it does not know of that type.
    """
    stock = type(model).__module__.startswith("transformers.")
    cast(Any, model)._weight_conversions = None if stock else []
