"""Tiny models whose gates are open about half of the time."""

import torch
from transformers import PreTrainedModel

from nestling import dmc
from tests.models import VARIANTS, tiny

BOUNDED = ("mistral", "gemma3_text", "gemma3_text-tied", "mamba2", "mamba2-tied")  # no layer has full attention
FULL = [name for name in VARIANTS if name not in BOUNDED]


def merging(variant: str = "llama", dtype: torch.dtype = torch.float64, **gates) -> PreTrainedModel:
    """A converted random model, its gate channel as random as the rest of it."""
    model = dmc.convert(tiny(variant, dtype=dtype), **({"scale": 8.0, "offset": 0.3} | gates))
    model.config.dmc["keep"] = 0.0
    return model
