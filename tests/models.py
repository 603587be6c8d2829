"""Tiny random models of every declared architecture, with odd sizes, and helpers that all tests share."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from nestling.anatomy import Anatomy
from nestling.experts import use_fast_experts
from nestling.ranking import Ranking

VOCAB = 97
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 44,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
ODD = {"hidden_size": 80, "head_dim": 12}

MAMBA2 = {"num_heads": 12, "head_dim": 8, "state_size": 6, "n_groups": 2, "chunk_size": 5}
PARALLEL = {
    "mamba_n_heads": 12,
    "mamba_d_head": 8,
    "mamba_d_state": 6,
    "mamba_n_groups": 2,
    "mamba_chunk_size": 5,
    "mamba_proj_bias": True,
}
FACTORS = {"lm_head_multiplier": 0.625, "embedding_multiplier": 2.0, "ssm_multipliers": [0.5, 1.25, 0.75, 1.5, 0.625]}
HYBRID = {
    "layers_block_type": ["linear_attention", "mlp", "full_attention", "linear_attention"],
    "mamba_num_heads": 6,
    "mamba_head_dim": 9,
    "ssm_state_size": 5,
    "n_groups": 2,
    "chunk_size": 5,
}

SHARING = {
    "num_hidden_layers": 5,
    "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid", "hybrid"],
    "n_mamba_heads": 12,
    "mamba_headdim": 8,
    "mamba_expand": 2,
    "mamba_d_state": 6,
    "mamba_ngroups": 2,
    "chunk_size": 5,
    "adapter_rank": 5,
    "tie_word_embeddings": True,
}
DELTA = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention", "linear_attention"],
    "head_dim": 16,
    "linear_num_key_heads": 3,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 5,
    "linear_value_head_dim": 7,
    "linear_conv_kernel_dim": 3,
}

EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 14}
LOCAL_EXPERTS = {"num_local_experts": 6, "num_experts_per_tok": 2, "intermediate_size": 14}
GROUPED = {
    "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"],
    "head_dim": 10,
    "n_routed_experts": 8,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 14,
    "moe_shared_expert_intermediate_size": 11,
}
LATENT = {
    "n_routed_experts": 8,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 14,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 6,
    "v_head_dim": 10,
    "num_key_value_heads": 6,
}

VARIANTS: dict[str, tuple[str, dict]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True, "head_dim": 12}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-mha": ("llama", {"num_key_value_heads": 6}),
    "mistral": ("mistral", ODD | {"sliding_window": 6}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-sliding": ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}),
    "qwen3": ("qwen3", ODD),
    "gemma3_text": ("gemma3_text", {"head_dim": 12, "sliding_window": 6, "query_pre_attn_scalar": 10}),
    "gemma3_text-tied": (
        "gemma3_text",
        {"head_dim": 12, "sliding_window": 6, "tie_word_embeddings": True, "final_logit_softcapping": 5.0},
    ),
    "granite": (
        "granite",
        {
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.7,
            "logits_scaling": 4.0,
            "attention_multiplier": 0.3,
        },
    ),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", {"sliding_window": 6}),
    "phi3": ("phi3", {}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0, 1, 1]}),
    "nemotron": ("nemotron", ODD | {"partial_rotary_factor": 0.5}),
    "mamba2": ("mamba2", MAMBA2),
    "mamba2-tied": ("mamba2", MAMBA2 | {"tie_word_embeddings": True, "use_bias": True, "n_groups": 1}),
    "bamba": ("bamba", PARALLEL | {"attn_layer_indices": [2]}),
    "granitemoehybrid": (
        "granitemoehybrid",
        PARALLEL
        | {
            "layer_types": ["linear_attention", "linear_attention", "full_attention", "linear_attention"],
            "num_local_experts": 0,
            "shared_intermediate_size": 44,
            "position_embedding_type": "rope",
            "residual_multiplier": 0.7,
            "embedding_multiplier": 3.0,
            "logits_scaling": 4.0,
            "tie_word_embeddings": True,
        },
    ),
    "falcon_h1": (
        "falcon_h1",
        PARALLEL | FACTORS | {"mamba_d_ssm": 54, "mamba_n_heads": 6, "mamba_d_head": 9, "mamba_d_state": 5},
    ),
    "falcon_h1-norm": (
        "falcon_h1",
        PARALLEL
        | FACTORS
        | {"mamba_d_ssm": 54, "mamba_n_heads": 6, "mamba_d_head": 9, "mamba_d_state": 5, "mamba_rms_norm": True},
    ),
    "nemotron_h": ("nemotron_h", HYBRID | {"head_dim": 10}),
    "nemotron_h-biases": (
        "nemotron_h",
        HYBRID
        | {"head_dim": 12, "use_bias": True, "mlp_bias": True, "attention_bias": True, "tie_word_embeddings": True},
    ),
    "nemotron_h-moe": ("nemotron_h", HYBRID | GROUPED),
    "nemotron_h-latent": ("nemotron_h", HYBRID | GROUPED | {"moe_latent_size": 20, "mlp_bias": True}),
    "granitemoehybrid-moe": (
        "granitemoehybrid",
        PARALLEL
        | LOCAL_EXPERTS
        | {
            "layer_types": ["linear_attention", "linear_attention", "full_attention", "linear_attention"],
            "shared_intermediate_size": 44,
        },
    ),
    "qwen3_5_text": ("qwen3_5_text", DELTA),
    "qwen3_5_text-tied": (
        "qwen3_5_text",
        DELTA | {"tie_word_embeddings": True, "attention_bias": True, "linear_key_head_dim": 8},
    ),
    "qwen3_next": (
        "qwen3_next",
        DELTA | EXPERTS | {"shared_expert_intermediate_size": 11, "mlp_only_layers": [1]},
    ),
    "qwen3_5_moe_text": ("qwen3_5_moe_text", DELTA | EXPERTS | {"shared_expert_intermediate_size": 11}),
    "zamba2": (
        "zamba2",
        SHARING | {"num_key_value_heads": 6, "use_shared_attention_adapter": True, "use_mem_rope": True},
    ),
    "zamba2-two": ("zamba2", SHARING | {"num_mem_blocks": 2, "add_bias_linear": True}),
    "mixtral": ("mixtral", LOCAL_EXPERTS | {"head_dim": 12}),
    "qwen3_moe": ("qwen3_moe", EXPERTS | {"norm_topk_prob": True, "mlp_only_layers": [1]}),
    "qwen3_moe-pre": ("qwen3_moe", EXPERTS | {"decoder_sparse_step": 2, "tie_word_embeddings": True}),
    "qwen2_moe": (
        "qwen2_moe",
        EXPERTS | {"shared_expert_intermediate_size": 11, "mlp_only_layers": [1], "norm_topk_prob": True},
    ),
    "olmoe": ("olmoe", EXPERTS | {"intermediate_size": 14}),
    "granitemoe": ("granitemoe", LOCAL_EXPERTS | {"logits_scaling": 2.0, "attention_bias": True}),
    "granitemoeshared": ("granitemoeshared", LOCAL_EXPERTS | {"shared_intermediate_size": 18}),
    "gpt_oss": ("gpt_oss", LOCAL_EXPERTS | {"head_dim": 8, "sliding_window": 6}),
    "deepseek_v3": ("deepseek_v3", LATENT | {"q_lora_rank": None}),
    "deepseek_v3-latent": ("deepseek_v3", LATENT | {"q_lora_rank": 20, "n_group": 1, "num_experts_per_tok": 3}),
}
SHARED = ("zamba2", "zamba2-two")  # layers that share tensors
HYBRID_MOE = ("nemotron_h-moe", "nemotron_h-latent", "granitemoehybrid-moe", "qwen3_next", "qwen3_5_moe_text")
GRANITE_MOE = ("granitemoe", "granitemoeshared")
QWEN_MOE = ("qwen2_moe", "qwen3_moe", "qwen3_moe-pre")
MOE = ("mixtral", *QWEN_MOE, "olmoe", *GRANITE_MOE, "gpt_oss", "deepseek_v3", "deepseek_v3-latent")


def tiny(variant: str, seed: int = 0, dtype: torch.dtype = torch.float64, **overrides) -> PreTrainedModel:
    """A random model of that variant, in eval mode; no parameter is left at 0 or 1, so that nothing hides."""
    model_type, fields = VARIANTS[variant]
    config = AutoConfig.for_model(model_type, **(COMMON | fields | overrides))
    torch.manual_seed(seed)
    model = use_fast_experts(AutoModelForCausalLM.from_config(config, dtype=dtype).eval())
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.2 if parameter.dim() == 1 else 0.1 + 1.0 / parameter.shape[-1] ** 0.5
            parameter.add_(torch.randn_like(parameter) * spread)
    return model


@contextmanager
def in_float64() -> Iterator[None]:
    """Within this context what models compute in float32 whatever their dtype (norms, state-space scans) is float64."""
    with (
        mock.patch.object(torch, "float32", torch.float64),
        mock.patch.object(torch, "float", torch.float64),
        mock.patch.object(torch.Tensor, "float", torch.Tensor.double),
    ):
        yield


def token_batches(count: int = 3, batch: int = 2, seq: int = 12, seed: int = 1) -> list[dict[str, torch.Tensor]]:
    """Random token ids `[batch, seq]`, none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(3, VOCAB, (batch, seq), generator=generator)} for _ in range(count)]


@torch.no_grad()
def logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Logits `[batch, seq, vocab]`."""
    return model(input_ids=ids).logits


def random_ranking(model: PreTrainedModel, seed: int = 0) -> Ranking:
    """Random scores for every axis and for the layers."""
    anatomy, generator = Anatomy.of(model), torch.Generator().manual_seed(seed)
    scores = {}
    for field, axis in anatomy.axes.items():
        counts = [
            anatomy.units(axis, i) if axis.scope == "model" or anatomy.has(axis, i) else 0
            for i in range(anatomy.num_layers)
        ]
        layers = [torch.rand(count, generator=generator) for count in counts]
        scores[field] = layers[0] if axis.scope == "model" else tuple(layers)
    scores[anatomy.depth_field] = torch.rand(anatomy.num_layers, generator=generator)
    return Ranking(scores)


# Sizes of heads, channels and state that go with a hidden size of 36, and with one of 24.
MAMBA_CUTS = {
    "nemotron_h": ({"mamba_num_heads": 4, "mamba_head_dim": 7, "ssm_state_size": 3}, {"mamba_num_heads": 2}),
    "falcon_h1": ({"mamba_n_heads": 4, "mamba_d_head": 7, "mamba_d_state": 3}, {"mamba_n_heads": 2}),
    "bamba": ({"mamba_n_heads": 6, "mamba_d_head": 6, "mamba_d_state": 4}, {"mamba_n_heads": 6}),
    "granitemoehybrid": ({"mamba_n_heads": 6, "mamba_d_head": 6, "mamba_d_state": 4}, {"mamba_n_heads": 6}),
    "qwen3_5_text": ({"linear_num_value_heads": 3, "linear_value_head_dim": 4}, {"linear_num_key_heads": 2}),
}


def cuts(variant: str) -> list[dict]:
    """Shapes that a tiny model can take: each axis alone, one size per layer, and all at once."""
    if variant.startswith("mamba2"):  # heads times channels stay a multiple of the hidden size
        return [
            {"num_heads": 6},
            {"hidden_size": 32},
            {"head_dim": 4},
            {"state_size": 4},
            {"num_hidden_layers": 3},
            {"state_size": [6, 5, 4, 3]},
            {"num_hidden_layers": 3, "state_size": [3, 5, 4], "hidden_size": 32, "num_heads": 8, "head_dim": 4},
            {"num_hidden_layers": 2, "state_size": 5, "hidden_size": 24, "num_heads": 6},
        ]
    if variant in SHARED:
        return zamba2_cuts(variant)
    if variant in MOE:
        return moe_cuts(variant)
    if variant in HYBRID_MOE:
        return hybrid_moe_cuts(variant)
    some, few = MAMBA_CUTS.get(VARIANTS[variant][0], ({}, {}))
    ffn = "shared_intermediate_size" if variant == "granitemoehybrid" else "intermediate_size"
    whole = few.get("mamba_n_heads") == 6  # heads times channels stay a multiple of the hidden size
    heads = {"num_attention_heads": 4} | ({"num_key_value_heads": 4} if variant == "llama-mha" else {})
    return [
        {ffn: 30},
        {"hidden_size": 32 if whole else 36},
        heads,
        {"num_key_value_heads": 1},
        {"num_hidden_layers": 3},
        {ffn: [44, 30, 17, 8]},
        {"num_hidden_layers": 3, ffn: [10, 20, 30], "hidden_size": 36} | heads | some,
        {"num_hidden_layers": 2, ffn: 12, "hidden_size": 24, "num_key_value_heads": 1} | few,
        *({field: size} for field, size in some.items() if size != 6 or field in few),
    ]


def zamba2_cuts(variant: str) -> list[dict]:
    """As `cuts`, for layers that share transformer blocks; with adapters in attention its heads go with the width."""
    alone = variant == "zamba2"
    fewer = {"hidden_size": 32, "num_attention_heads": 4} | ({"num_key_value_heads": 4} if alone else {})
    return [
        {"intermediate_size": 30},
        fewer,
        {"n_mamba_heads": 6},
        {"mamba_headdim": 4},
        {"num_hidden_layers": 4},
        {"mamba_d_state": 4},
        {"num_hidden_layers": 4, "intermediate_size": 20, "mamba_d_state": 4, "n_mamba_heads": 8, "mamba_headdim": 8}
        | fewer,
        {"num_hidden_layers": 2, "intermediate_size": 12, "mamba_headdim": 4},
        *([] if alone else [{"num_attention_heads": 4}, {"num_key_value_heads": 1}, {"hidden_size": 24}]),
    ]


def moe_cuts(variant: str) -> list[dict]:
    """As `cuts`, for models with experts: experts, neurons in each, both, and all axes at once."""
    config = VARIANTS[variant][1]
    experts = next(name for name in ("num_experts", "num_local_experts", "n_routed_experts") if name in config)
    width = "moe_intermediate_size" if "moe_intermediate_size" in config else "intermediate_size"
    if variant == "olmoe":
        width = "intermediate_size"
    if variant.startswith("deepseek"):
        return [
            {"intermediate_size": 30},
            {"hidden_size": 36},
            {experts: 6},
            {experts: 4},
            {"num_hidden_layers": 3},
            {"num_hidden_layers": 2, experts: 6},
            {"num_hidden_layers": 3, experts: 4, "hidden_size": 36},
            {"num_hidden_layers": 3, experts: 6, "hidden_size": 24},
        ]
    heads = {} if variant == "olmoe" else {"num_attention_heads": 4}
    hidden = {} if variant == "olmoe" else {"hidden_size": 36}
    return [
        {experts: 4},
        {width: 8},
        {experts: 3, width: 5},
        {"hidden_size": 32, "num_attention_heads": 4} if variant == "olmoe" else hidden,
        {"num_hidden_layers": 3},
        {width: [14, 8, 3, 5]},
        {"num_hidden_layers": 3, experts: [6, 3, 4], width: [10, 12, 6]}
        | hidden
        | ({} if variant == "olmoe" else heads),
        {"num_hidden_layers": 2, experts: 2, width: 8} | hidden,
        {"num_key_value_heads": 1} | ({"hidden_size": 24} if variant == "olmoe" else {}),
        *([{"intermediate_size": 30}] if variant in QWEN_MOE else []),
        *([{"shared_expert_intermediate_size": 7}] if variant == "qwen2_moe" else []),
        *([{"shared_intermediate_size": 7}] if variant == "granitemoeshared" else []),
    ]


def hybrid_moe_cuts(variant: str) -> list[dict]:
    """As `cuts`, for hybrids with experts."""
    if variant.startswith("granite"):  # heads times channels stay a multiple of the hidden size
        some = {"hidden_size": 36, "mamba_n_heads": 6, "mamba_d_head": 6, "mamba_d_state": 4}
        experts, width, shared = "num_local_experts", "intermediate_size", {"shared_intermediate_size": 30}
        narrow = {"hidden_size": 32}
    elif variant.startswith("qwen"):
        some = {"hidden_size": 36, "linear_num_value_heads": 3, "linear_value_head_dim": 4}
        experts, width, shared = "num_experts", "moe_intermediate_size", {"shared_expert_intermediate_size": 7}
        narrow = {"hidden_size": 32, "linear_num_key_heads": 2}
    else:
        some = {"hidden_size": 36, "mamba_num_heads": 4, "mamba_head_dim": 7, "ssm_state_size": 3}
        experts, width, shared = "n_routed_experts", "moe_intermediate_size", {"moe_shared_expert_intermediate_size": 7}
        narrow = {"hidden_size": 32}
    return [
        {experts: 4},
        narrow,
        {width: 8},
        {experts: 4, width: 5},
        {"num_hidden_layers": 3},
        {"num_attention_heads": 4},
        {"num_hidden_layers": 3, experts: 4, width: [10, 12, 6], "num_attention_heads": 4} | some | shared,
        {"num_hidden_layers": 2, experts: 4, width: 8, "num_key_value_heads": 1},
        shared,
        *([{"intermediate_size": 30}] if variant == "qwen3_next" else []),
    ]
