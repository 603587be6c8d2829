"""Qwen2 (biases on q, k, v) and Qwen3 (RMSNorm on every head's query and key)."""

from nestling.anatomy.architectures._dense import (
    ATTENDS,
    ATTENTION,
    ATTENTION_BIAS,
    KV_CACHE,
    MLP,
    MODEL,
    PRE_NORMS,
    SIZES,
    axes,
)
from nestling.anatomy.declare import Architecture, register

register(
    Architecture(
        model_type="qwen2",
        shared_kin="qwen2_moe",
        axes=axes(),
        sizes=SIZES,
        tensors=MODEL,
        blocks={"attention": ATTENTION | ATTENTION_BIAS, "mlp": MLP, "norms": PRE_NORMS},
        kv_cache=KV_CACHE,
        attends=ATTENDS,
        layer_thresholds=("max_window_layers",),
    )
)

HEAD_NORMS = {
    "self_attn.q_norm.weight": "d",
    "self_attn.k_norm.weight": "d",
}

register(
    Architecture(
        model_type="qwen3",
        mixture_kin="qwen3_moe",
        axes=axes(),
        sizes=SIZES,
        tensors=MODEL,
        blocks={"attention": ATTENTION | ATTENTION_BIAS | HEAD_NORMS, "mlp": MLP, "norms": PRE_NORMS},
        kv_cache=KV_CACHE,
        attends=ATTENDS,
        layer_thresholds=("max_window_layers",),
    )
)
