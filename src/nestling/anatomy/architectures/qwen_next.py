"""Qwen3-Next and Qwen3.5: gated delta nets in most layers, gated attention in the others, then an MLP or experts.

A delta net is linear attention: key heads `kh` of `dk` channels, each with value heads `r` of `v` channels, so they are
cut as attention is. Channels of values are the same in all heads of a layer, whose norm they share; those of keys are
never cut, because queries are divided by the root of their number. In attention each query head has its gate after it.
Paper: Gated DeltaNet, arXiv 2412.06464.
"""

from typing import Any

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
from nestling.anatomy.architectures._moe import GATED_SHARED, SHARED_AXIS, expert_axes, is_sparse, routed_tensors
from nestling.anatomy.architectures.qwen import HEAD_NORMS
from nestling.anatomy.declare import Architecture, Axis, Config, Routed, register

GATED = (
    ATTENTION
    | ATTENTION_BIAS
    | HEAD_NORMS
    | {"self_attn.q_proj.weight": "(kv q 2 d) hidden", "self_attn.q_proj.bias?": "(kv q 2 d)"}
)
DELTA = {
    "linear_attn.conv1d.weight": "(kh dk + kh dk + kh r v) 1 k",
    "linear_attn.dt_bias": "(kh r)",
    "linear_attn.A_log": "(kh r)",
    "linear_attn.norm.weight": "v",
    "linear_attn.out_proj.weight": "hidden (kh r v)",
}
APART = {
    "linear_attn.in_proj_qkv.weight": "(kh dk + kh dk + kh r v) hidden",
    "linear_attn.in_proj_z.weight": "(kh r v) hidden",
    "linear_attn.in_proj_b.weight": "(kh r) hidden",
    "linear_attn.in_proj_a.weight": "(kh r) hidden",
}
INTERLEAVED = {
    "linear_attn.in_proj_qkvz.weight": "(kh (dk + dk + r v + r v)) hidden",
    "linear_attn.in_proj_ba.weight": "(kh (r + r)) hidden",
}
READ = ("linear_attn.out_proj",)
DELTA_AXES = (
    Axis("kh", "linear_num_key_heads", scored_at=READ),
    Axis("r", "linear_num_value_heads", within=("kh",), scored_at=READ),
    Axis("v", "linear_value_head_dim", counts_all=False, scored_at=READ),
)
EXPERT_AXES = (
    *expert_axes("num_experts", "moe_intermediate_size"),
    SHARED_AXIS,
)
# What all of them have alike. `attention` is empty because what their attention gives is gated.
COMMON: dict[str, Any] = {
    "sizes": SIZES | {"dk": "linear_key_head_dim", "k": "linear_conv_kernel_dim"},
    "tensors": MODEL,
    "kv_cache": KV_CACHE,
    "attends": ATTENDS,
    "attention": {},
    "state": {"delta": ("kh r dk v",)},
    "recent": {"delta": ("kh dk k", "kh dk k", "kh r v k")},
    "inner_norms": ("linear_attn.norm",),
    "keeps": ("attention",),
}


def mixer(config: Config, layer: int) -> str:
    """The mixer of a layer."""
    return "attention" if config.layer_types[layer] == "full_attention" else "delta"


def next_blocks(config: Config, layer: int) -> tuple[str, ...]:
    """Experts in sparse layers, if there are any."""
    return ("norms", mixer(config, layer), "moe" if config.num_experts and is_sparse(config, layer) else "mlp")


register(
    Architecture(
        model_type="qwen3_5_text",
        axes=(*axes("self_attn.q_proj", "mlp.gate_proj", "linear_attn.in_proj_qkv"), *DELTA_AXES),
        blocks={"norms": PRE_NORMS, "attention": GATED, "delta": DELTA | APART, "mlp": MLP},
        layer_blocks=lambda config, layer: ("norms", mixer(config, layer), "mlp"),
        **COMMON,
    )
)

register(
    Architecture(
        model_type="qwen3_5_moe_text",
        axes=(
            *(
                axis
                for axis in axes("self_attn.q_proj", "mlp.shared_expert.gate_proj", "linear_attn.in_proj_qkv")
                if axis.letter != "ffn"
            ),
            *DELTA_AXES,
            *EXPERT_AXES,
        ),
        blocks={
            "norms": PRE_NORMS,
            "attention": GATED,
            "delta": DELTA | APART,
            "moe": routed_tensors() | GATED_SHARED,
        },
        layer_blocks=lambda config, layer: ("norms", mixer(config, layer), "moe"),
        routed=Routed("mlp.gate", "mlp.experts", shared="mlp.shared_expert"),
        **COMMON,
    )
)

register(
    Architecture(
        model_type="qwen3_next",
        axes=(
            *axes("self_attn.q_proj", "mlp.gate_proj", "linear_attn.in_proj_qkvz", "mlp.shared_expert.gate_proj"),
            *DELTA_AXES,
            *EXPERT_AXES,
        ),
        blocks={
            "norms": PRE_NORMS,
            "attention": GATED,
            "delta": DELTA | INTERLEAVED,
            "mlp": MLP,
            "moe": routed_tensors() | GATED_SHARED,
        },
        layer_blocks=next_blocks,
        routed=Routed("mlp.gate", "mlp.experts", post="norm_topk_prob", shared="mlp.shared_expert"),
        listed_blocks={"mlp_only_layers": "mlp"},
        derived={"decoder_sparse_step": lambda config: 1},
        **COMMON,
    )
)
