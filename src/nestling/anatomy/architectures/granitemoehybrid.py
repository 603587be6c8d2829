"""Granite 4: Mamba-2 or attention in every layer, each followed by a gated MLP for all tokens, and maybe experts.

As in Mamba-2 itself, heads times channels must be a whole multiple of the hidden size.
"""

from nestling.anatomy.architectures._dense import ATTENDS, KV_CACHE, MODEL, PRE_NORMS, axes
from nestling.anatomy.architectures._hybrid import (
    ATTENTION,
    EXPAND,
    INNER_NORMS,
    MIXER,
    MIXER_AXES,
    RECENT,
    SIZES,
    STATE,
    STRIDES,
)
from nestling.anatomy.architectures._moe import SHARED_MLP, expert_axes, routed_tensors
from nestling.anatomy.declare import Architecture, Config, Routed, register


def blocks(config: Config, layer: int) -> tuple[str, ...]:
    """A layer's blocks: norms, the shared MLP, a mixer of its kind, and experts where the config has any."""
    attends = config.layer_types[layer] == "full_attention"
    experts = ("moe",) if config.num_local_experts else ()
    return ("norms", "attention" if attends else "mamba", "mlp", *experts)


register(
    Architecture(
        model_type="granitemoehybrid",
        axes=(
            *axes(
                "self_attn.q_proj",
                "shared_mlp.input_linear",
                "mamba.in_proj",
                down="shared_mlp.output_linear",
                neurons="shared_intermediate_size",
            ),
            *MIXER_AXES,
            *expert_axes("num_local_experts", "intermediate_size", at="block_sparse_moe"),
        ),
        sizes=SIZES,
        tensors=MODEL,
        blocks={
            "norms": PRE_NORMS,
            "attention": ATTENTION,
            "mamba": MIXER,
            "moe": routed_tensors("block_sparse_moe", "router"),
            "mlp": SHARED_MLP,
        },
        layer_blocks=blocks,
        routed=Routed("block_sparse_moe.router", "block_sparse_moe.experts"),
        kv_cache=KV_CACHE,
        attends=ATTENDS,
        state=STATE,
        recent=RECENT,
        inner_norms=INNER_NORMS,
        strides=STRIDES,
        keeps=("attention",),
        logits_divisor="logits_scaling",
        derived=EXPAND,
    )
)
