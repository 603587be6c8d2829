"""Tiny models whose gates are open about half of the time."""

import torch
from transformers import PreTrainedModel

from nestling import dmc
from tests.models import VARIANTS, tiny

# No layer has plain full attention of its own: it slides, is a state, shares its cache with one, has sinks or latents,
# or is used by several layers.
OTHERS = ("mistral", "gemma3_text", "mamba2", "falcon_h1", "gpt_oss", "deepseek", "qwen3_5", "qwen3_next", "zamba2")
BOUNDED = [name for name in VARIANTS if name.startswith(OTHERS)]
FULL = [name for name in VARIANTS if name not in BOUNDED]
HYBRID = [name for name in FULL if name.startswith(("nemotron_h", "bamba", "granitemoehybrid"))]


def merging(variant: str = "llama", dtype: torch.dtype = torch.float64, **gates) -> PreTrainedModel:
    """A converted random model, its gate channel as random as the rest of it."""
    model = dmc.convert(tiny(variant, dtype=dtype), **({"scale": 8.0, "offset": 0.3} | gates))
    model.config.dmc["keep"] = 0.0
    return model
