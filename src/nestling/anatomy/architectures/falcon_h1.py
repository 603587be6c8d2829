"""Falcon-H1: Mamba-2 and attention side by side in every layer, then a gated MLP, with fixed factors on everything.

The factors of the mixer's input are one vector for all layers, made from the config, so the sizes of mixers cannot
differ between layers. The norm inside the mixer is optional, and may stand before its gate.
"""

from nestling.anatomy.architectures._dense import ATTENDS, KV_CACHE
from nestling.anatomy.architectures._hybrid import (
    AXES,
    BLOCKS,
    HEADS,
    INNER_NORMS,
    MODEL,
    RECENT,
    SIZES,
    STATE,
    STRIDES,
)
from nestling.anatomy.declare import Architecture, register

register(
    Architecture(
        model_type="falcon_h1",
        axes=AXES,
        sizes=SIZES,
        tensors=MODEL,
        blocks=BLOCKS,
        kv_cache=KV_CACHE,
        attends=ATTENDS,
        state=STATE,
        recent=RECENT,
        inner_norms=INNER_NORMS,
        strides=STRIDES,
        per_layer_fields=(),
        alike=HEADS,
        layer_tuples=True,
        logits_factor="lm_head_multiplier",
        derived={"mamba_d_ssm": lambda config: config.mamba_n_heads * config.mamba_d_head},
    )
)
