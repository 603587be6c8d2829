"""What the dense decoders have in common: grouped-query attention, a gated FFN, pre-norms, tied or untied heads.

Letters: `kv` KV groups, `q` query heads inside their KV group, `d` head channels (rotary, never cut), `ffn`
neurons, `hidden` channels of the residual stream.
"""

from nestling.anatomy.declare import Axis, Config, SizeOf


def head_dim(config: Config) -> int:
    """Channels per head: explicit in newer configs, a quotient in older ones."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def axes(
    query: str = "self_attn.q_proj",
    gate: str = "mlp.gate_proj",
    *others: str,
    down: str = "mlp.down_proj",
    neurons: str = "intermediate_size",
) -> tuple[Axis, ...]:
    """The four width axes; `query`, `gate` and `others` are the modules that read the residual stream."""
    return (
        Axis("hidden", "hidden_size", scope="model", scored_at=(query, gate, *others)),
        Axis("ffn", neurons, scored_at=(down,), metric="relative"),
        Axis("kv", "num_key_value_heads", scored_at=("self_attn.o_proj",)),
        Axis("q", "num_attention_heads", within=("kv",), scored_at=("self_attn.o_proj",), merges=True),
    )


SIZES: dict[str, SizeOf] = {"vocab": "vocab_size", "d": head_dim}

MODEL = {
    "model.embed_tokens.weight": "vocab hidden",
    "model.norm.weight": "hidden",
    "lm_head.weight": "vocab hidden",
}

ATTENTION = {
    "self_attn.q_proj.weight": "(kv q d) hidden",
    "self_attn.k_proj.weight": "(kv d) hidden",
    "self_attn.v_proj.weight": "(kv d) hidden",
    "self_attn.o_proj.weight": "hidden (kv q d)",
}

ATTENTION_BIAS = {
    "self_attn.q_proj.bias?": "(kv q d)",
    "self_attn.k_proj.bias?": "(kv d)",
    "self_attn.v_proj.bias?": "(kv d)",
    "self_attn.o_proj.bias?": "hidden",
}

MLP = {
    "mlp.gate_proj.weight": "ffn hidden",
    "mlp.up_proj.weight": "ffn hidden",
    "mlp.down_proj.weight": "hidden ffn",
}

MLP_BIAS = {
    "mlp.gate_proj.bias?": "ffn",
    "mlp.up_proj.bias?": "ffn",
    "mlp.down_proj.bias?": "hidden",
}

PRE_NORMS = {
    "input_layernorm.weight": "hidden",
    "post_attention_layernorm.weight": "hidden",
}

KV_CACHE = {"attention": ("kv d", "kv d")}
ATTENDS = {"attention": "kv q d"}
