"""Which architectures llama.cpp has under which name, and how it stores them otherwise than transformers does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nestling.errors import UnsupportedArchitecture


@dataclass(frozen=True)
class Gguf:
    """An architecture in llama.cpp.

    name: what it is called there. paired: the rotary channels of queries and keys are stored in pairs (2i, 2i + 1)
    rather than in halves (i, i + d/2), so rows of both projections change places within each head. biased: whether its
    attention may have biases there.
    """

    name: str
    paired: bool = False
    biased: bool = True


KNOWN = {
    "llama": Gguf("llama", paired=True),
    "mistral": Gguf("llama", paired=True),
    "qwen2": Gguf("qwen2"),
    "qwen3": Gguf("qwen3", biased=False),
}


def gguf_of(config: Any) -> Gguf:
    """How llama.cpp has a config's architecture. Raises `UnsupportedArchitecture` for one not covered, or not as set.

    What its metadata cannot say is refused: sizes that differ per layer, a sliding window, scaled rotary frequencies.
    """
    kind = getattr(config, "base_model_type", None) or config.model_type
    if kind not in KNOWN:
        raise UnsupportedArchitecture(
            f"'{kind}' is not exported to GGUF here (only {', '.join(KNOWN)}): save it as a folder and use llama.cpp's "
            f"own convert_hf_to_gguf.py"
        )
    rope = getattr(config, "rope_parameters", None) or {}
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    for wrong, what in (
        (getattr(config, "layer_shapes", None), "its layers differ in size: prune to sizes that are the same in all"),
        (window and window < config.max_position_embeddings, f"it has a sliding window of {window} tokens"),
        (rope.get("rope_type", "default") != "default", f"its rotary frequencies are scaled ({rope.get('rope_type')})"),
        (getattr(config, "mlp_bias", False), "its MLP has biases"),
        (not KNOWN[kind].biased and getattr(config, "attention_bias", False), "its attention has biases"),
    ):
        if wrong:
            raise UnsupportedArchitecture(f"this {kind} model cannot be written as GGUF, since {what}")
    return KNOWN[kind]
