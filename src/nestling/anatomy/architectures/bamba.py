"""Bamba: Mamba-2 or attention in every layer, each followed by a gated MLP; `attn_layer_indices` says which.

As in Mamba-2 itself, heads times channels must be a whole multiple of the hidden size.
"""

from nestling.anatomy.architectures._dense import ATTENDS, KV_CACHE
from nestling.anatomy.architectures._hybrid import (
    AXES,
    BLOCKS,
    EXPAND,
    INNER_NORMS,
    MODEL,
    RECENT,
    SIZES,
    STATE,
    STRIDES,
)
from nestling.anatomy.declare import Architecture, Config, register


def blocks(config: Config, layer: int) -> tuple[str, ...]:
    """A layer's blocks: norms, MLP, and a mixer of its kind."""
    attends = config.layers_block_type[layer] == "full_attention"
    return ("norms", "attention" if attends else "mamba", "mlp")


register(
    Architecture(
        model_type="bamba",
        axes=AXES,
        sizes=SIZES,
        tensors=MODEL,
        blocks=BLOCKS,
        layer_blocks=blocks,
        layer_arguments=lambda config, layer: (config.layers_block_type[layer],),
        kv_cache=KV_CACHE,
        attends=ATTENDS,
        state=STATE,
        recent=RECENT,
        inner_norms=INNER_NORMS,
        strides=STRIDES,
        keeps=("attention",),
        per_layer_fields=(),
        layer_numbers=("attn_layer_indices",),
        layer_tuples=True,
        derived=EXPAND,
    )
)
