"""Zamba2: Mamba-2 in every layer, and before some of them a transformer block that several layers share in turn.

The block reads the stream and the embeddings side by side, `(hidden + hidden)`; each layer that uses it adds low-rank
adapters of its own and projects what comes out with its own `linear`. What is shared is cut once, ranked over all uses.
All sizes are the same in all layers. Paper: arXiv 2411.15242.
"""

from nestling.anatomy.architectures import _mamba2
from nestling.anatomy.declare import Architecture, Axis, Config, Shared, register

PLAIN, BESIDE = "mamba", "mamba_decoder.mamba"  # the mixer of a layer of its own, and of one with a shared block
SHARED = "shared_transformer"
HEADS = ("n_mamba_heads", "mamba_headdim", "mamba_d_state")
AXES = (
    Axis(
        "hidden",
        "hidden_size",
        scope="model",
        scored_at=(f"{PLAIN}.in_proj", f"{BESIDE}.in_proj", f"{SHARED}.feed_forward.gate_up_proj"),
    ),
    Axis("ffn", "intermediate_size", scored_at=(f"{SHARED}.feed_forward.down_proj",), metric="relative"),
    Axis("kv", "num_key_value_heads", scored_at=(f"{SHARED}.self_attn.o_proj",)),
    Axis("q", "num_attention_heads", within=("kv",), scored_at=(f"{SHARED}.self_attn.o_proj",), merges=True),
    *_mamba2.axes((PLAIN, BESIDE), *HEADS),
)
TRANSFORMER = {
    "input_layernorm.weight": "(hidden + hidden)",
    "self_attn.q_proj.weight": "(kv q d) (hidden + hidden)",
    "self_attn.k_proj.weight": "(kv d) (hidden + hidden)",
    "self_attn.v_proj.weight": "(kv d) (hidden + hidden)",
    "self_attn.o_proj.weight": "hidden (kv q d)",
    "self_attn.linear_q_adapter_list.{use}.0.weight?": "rank (hidden + hidden)",
    "self_attn.linear_q_adapter_list.{use}.1.weight?": "(kv q d) rank",
    "self_attn.linear_k_adapter_list.{use}.0.weight?": "rank (hidden + hidden)",
    "self_attn.linear_k_adapter_list.{use}.1.weight?": "(kv d) rank",
    "self_attn.linear_v_adapter_list.{use}.0.weight?": "rank (hidden + hidden)",
    "self_attn.linear_v_adapter_list.{use}.1.weight?": "(kv d) rank",
    "pre_ff_layernorm.weight": "hidden",
    "feed_forward.gate_up_proj.weight": "(ffn + ffn) hidden",
    "feed_forward.gate_up_proj.bias?": "(ffn + ffn)",
    "feed_forward.gate_up_proj_adapter_list.{use}.0.weight": "rank hidden",
    "feed_forward.gate_up_proj_adapter_list.{use}.1.weight": "(ffn + ffn) rank",
    "feed_forward.down_proj.weight": "hidden ffn",
    "feed_forward.down_proj.bias?": "hidden",
}


def blocks(config: Config, layer: int) -> tuple[str, ...]:
    """A layer's blocks: a mixer and its norm, and in some the shared transformer and the projection after it."""
    shares = config.layers_block_type[layer] == "hybrid"
    return ("transformer", "linear", "mamba_decoder") if shares else ("norm", "mamba")


def refuses(config: Config) -> str | None:
    """What the config class takes and the model's code does not."""
    inner, width = config.n_mamba_heads * config.mamba_headdim, 2 * config.hidden_size
    if inner % config.hidden_size:
        return f"n_mamba_heads x mamba_headdim must be a multiple of hidden_size {config.hidden_size}"
    heads = {config.num_attention_heads * config.attention_head_dim, config.num_key_value_heads * config.head_dim}
    if config.use_shared_attention_adapter and heads != {width}:
        return f"with adapters in attention, all heads together must be 2 x hidden_size = {width} wide"
    return None


register(
    Architecture(
        model_type="zamba2",
        axes=AXES,
        sizes={
            "vocab": "vocab_size",
            "d": "attention_head_dim",
            "g": "mamba_ngroups",
            "k": "mamba_d_conv",
            "rank": "adapter_rank",
        },
        tensors={
            "model.embed_tokens.weight": "vocab hidden",
            "model.final_layernorm.weight": "hidden",
            "lm_head.weight": "vocab hidden",
        },
        blocks={
            "norm": {"input_layernorm.weight": "hidden"},
            "mamba": _mamba2.tensors(PLAIN),
            "transformer": {f"{SHARED}.{name}": spec for name, spec in TRANSFORMER.items()},
            "linear": {"linear.weight": "hidden hidden"},
            "mamba_decoder": {"mamba_decoder.input_layernorm.weight": "hidden", **_mamba2.tensors(BESIDE)},
        },
        layer_blocks=blocks,
        shared=Shared("transformer", lambda config: config.num_mem_blocks),
        kv_cache={"transformer": ("kv d", "kv d")},
        attends={"transformer": "kv q d"},
        attention={},
        state={"mamba": _mamba2.STATE, "mamba_decoder": _mamba2.STATE},
        recent={"mamba": _mamba2.RECENT, "mamba_decoder": _mamba2.RECENT},
        inner_norms=(f"{PLAIN}.norm", f"{BESIDE}.norm"),
        strides={f"{PLAIN}.in_proj.weight": _mamba2.ALIGNED, f"{BESIDE}.in_proj.weight": _mamba2.ALIGNED},
        keeps=("transformer",),
        per_layer_fields=("layers_block_type",),
        layer_numbers=("hybrid_layer_ids",),
        alike=("intermediate_size", "num_key_value_heads", "num_attention_heads", *HEADS),
        derived={
            "mamba_expand": _mamba2.expand("n_mamba_heads", "mamba_headdim"),
            "attention_hidden_size": lambda config: 2 * config.hidden_size,
        },
        refuses=refuses,
    )
)
