"""Mixtral and its kin: experts in every layer, each a gated FFN.

Mixtral normalizes over the chosen experts, the Qwen mixtures and OLMoE where `norm_topk_prob` says so, Granite and
GPT-OSS by a softmax over the chosen. The Qwen mixtures may have dense layers in between, and Qwen2-MoE has an expert
that all tokens share, behind a gate of its own. OLMoE normalizes the queries of all heads together, in a norm as wide
as the hidden size, which binds that to the heads.
"""

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
from nestling.anatomy.architectures._moe import (
    GATED_SHARED,
    SHARED_AXIS,
    SHARED_MLP,
    expert_axes,
    is_sparse,
    routed_tensors,
)
from nestling.anatomy.architectures.qwen import HEAD_NORMS
from nestling.anatomy.declare import Architecture, Axis, Config, Routed, register

HIDDEN, FFN, KV, Q = axes()
STREAM: tuple[Axis, ...] = (HIDDEN, KV, Q)

register(
    Architecture(
        model_type="mixtral",
        dense_kin="mistral",
        axes=(*STREAM, *expert_axes("num_local_experts", "intermediate_size")),
        sizes=SIZES,
        tensors=MODEL,
        blocks={"attention": ATTENTION, "moe": routed_tensors(), "norms": PRE_NORMS},
        kv_cache=KV_CACHE,
        attends=ATTENDS,
        routed=Routed("mlp.gate", "mlp.experts"),
    )
)

register(
    Architecture(
        model_type="granitemoe",
        dense_kin="granite",
        axes=(*STREAM, *expert_axes("num_local_experts", "intermediate_size", at="block_sparse_moe")),
        sizes=SIZES,
        tensors=MODEL,
        blocks={
            "attention": ATTENTION | ATTENTION_BIAS,
            "moe": routed_tensors("block_sparse_moe", "router"),
            "norms": PRE_NORMS,
        },
        kv_cache=KV_CACHE,
        attends=ATTENDS,
        routed=Routed("block_sparse_moe.router", "block_sparse_moe.experts"),
        logits_divisor="logits_scaling",
    )
)


def granite_blocks(config: Config, layer: int) -> tuple[str, ...]:
    """A layer has an expert that all tokens share unless its width is zero."""
    return ("attention", "moe", *(("mlp",) if config.shared_intermediate_size else ()), "norms")


register(
    Architecture(
        model_type="granitemoeshared",
        dense_kin="granite",
        axes=(
            *axes(
                gate="shared_mlp.input_linear",
                down="shared_mlp.output_linear",
                neurons="shared_intermediate_size",
            ),
            *expert_axes("num_local_experts", "intermediate_size", at="block_sparse_moe"),
        ),
        sizes=SIZES,
        tensors=MODEL,
        blocks={
            "attention": ATTENTION | ATTENTION_BIAS,
            "moe": routed_tensors("block_sparse_moe", "router"),
            "mlp": SHARED_MLP,
            "norms": PRE_NORMS,
        },
        layer_blocks=granite_blocks,
        kv_cache=KV_CACHE,
        attends=ATTENDS,
        routed=Routed("block_sparse_moe.router", "block_sparse_moe.experts", shared="shared_mlp"),
        logits_divisor="logits_scaling",
    )
)


def qwen_blocks(config: Config, layer: int) -> tuple[str, ...]:
    """Experts in sparse layers, an MLP in the others."""
    return ("attention", "moe" if is_sparse(config, layer) else "mlp", "norms")


register(
    Architecture(
        model_type="qwen3_moe",
        dense_kin="qwen3",
        axes=(*axes(), *expert_axes("num_experts", "moe_intermediate_size")),
        sizes=SIZES,
        tensors=MODEL,
        blocks={
            "attention": ATTENTION | ATTENTION_BIAS | HEAD_NORMS,
            "mlp": MLP,
            "moe": routed_tensors(),
            "norms": PRE_NORMS,
        },
        layer_blocks=qwen_blocks,
        kv_cache=KV_CACHE,
        attends=ATTENDS,
        routed=Routed("mlp.gate", "mlp.experts", post="norm_topk_prob"),
        listed_blocks={"mlp_only_layers": "mlp"},
        derived={"decoder_sparse_step": lambda config: 1},
    )
)

register(
    Architecture(
        model_type="qwen2_moe",
        dense_kin="qwen2",
        axes=(
            *axes("self_attn.q_proj", "mlp.gate_proj", "mlp.shared_expert.gate_proj"),
            *expert_axes("num_experts", "moe_intermediate_size"),
            SHARED_AXIS,
        ),
        sizes=SIZES,
        tensors=MODEL,
        blocks={
            "attention": ATTENTION | ATTENTION_BIAS,
            "mlp": MLP,
            "moe": routed_tensors() | GATED_SHARED,
            "norms": PRE_NORMS,
        },
        layer_blocks=qwen_blocks,
        kv_cache=KV_CACHE,
        attends=ATTENDS,
        layer_thresholds=("max_window_layers",),
        routed=Routed("mlp.gate", "mlp.experts", post="norm_topk_prob", shared="mlp.shared_expert"),
        listed_blocks={"mlp_only_layers": "mlp"},
        derived={"decoder_sparse_step": lambda config: 1},
    )
)


def olmoe_refuses(config: Config) -> str | None:
    """The norm over all queries has as many channels as the residual stream."""
    head_dim = getattr(config, "head_dim", None)
    if head_dim is None or config.hidden_size == config.num_attention_heads * head_dim:
        return None
    return f"hidden_size={config.hidden_size} must be num_attention_heads times {head_dim}: cut both alike"


register(
    Architecture(
        model_type="olmoe",
        axes=(*STREAM, *expert_axes("num_experts", "intermediate_size")),
        sizes=SIZES,
        tensors=MODEL,
        blocks={
            "attention": ATTENTION
            | ATTENTION_BIAS
            | {"self_attn.q_norm.weight": "(kv q d)", "self_attn.k_norm.weight": "(kv d)"},
            "moe": routed_tensors(),
            "norms": PRE_NORMS,
        },
        kv_cache=KV_CACHE,
        attends=ATTENDS,
        routed=Routed("mlp.gate", "mlp.experts", post="norm_topk_prob"),
        refuses=olmoe_refuses,
    )
)

register(
    Architecture(
        model_type="gpt_oss",
        axes=(*STREAM, *expert_axes("num_local_experts", "intermediate_size")),
        sizes=SIZES,
        tensors=MODEL,
        blocks={
            "attention": ATTENTION | ATTENTION_BIAS | {"self_attn.sinks": "(kv q)"},
            "moe": {
                "mlp.router.weight": "experts hidden",
                "mlp.router.bias": "experts",
                "mlp.experts.gate_up_proj": "experts hidden (neuron 2)",
                "mlp.experts.gate_up_proj_bias": "experts (neuron 2)",
                "mlp.experts.down_proj": "experts neuron hidden",
                "mlp.experts.down_proj_bias": "experts hidden",
            },
            "norms": PRE_NORMS,
        },
        kv_cache=KV_CACHE,
        attends=ATTENDS,
        attention={},  # a softmax with sinks
        routed=Routed("mlp.router", "mlp.experts"),
    )
)
