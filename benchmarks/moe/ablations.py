"""Router choices, one changed at a time: what each does to the held-out loss and to how even the load is.

Small Qwen3-MoE from scratch (see `small.py`), 64 experts of an eighth of the FFN, 8 of a token. An arm is a line of
`ARMS`: what is made, and settings of the training that differ from the defaults. Selection biases, which Qwen's routers
do not have, are tried on DeepSeek-V3's (sigmoids instead of a softmax; 7 of 64 experts and one that is shared).

    python -m benchmarks.moe.ablations --work runs/moe [--seeds 0 1] [--steps 200] [--arms default pre ...]
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.moe.small import RATE, dense_config, fresh, gap, parser, tokenizer, trained
from benchmarks.record import Record, Row, show
from transformers import AutoConfig, PreTrainedModel

from nestling.moe import fresh_scale, scale_experts
from nestling.pretrain import build

ALIKE = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "tie_word_embeddings",
)

POST, PRE, SIGMOID = "post", "pre", "sigmoid"  # normalized over the chosen; softmax over all; DeepSeek-V3's

ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "default": (POST, {}),
    "pre": (PRE, {}),
    "pre, small output": (PRE, {"init_scale": 1 / 8}),
    "small output": (POST, {"init_scale": 1 / 8}),
    "no balance": (POST, {"balance": 0.0}),
    "balance 0.001": (POST, {"balance": 1e-3}),
    "balance 0.1": (POST, {"balance": 0.1}),
    "balance per batch": (POST, {"balance_over": "batch"}),
    "balance per sequence": (POST, {"balance_over": "sequence"}),
    "no z-loss": (POST, {"z_loss": 0.0}),
    "capacity 1.25": (POST, {"capacity": 1.25}),
    "sigmoid": (SIGMOID, {}),
    "sigmoid, bias": (SIGMOID, {"balance": 0.0, "bias_rate": 1e-3}),
    "sigmoid, no balance": (SIGMOID, {"balance": 0.0}),
}


def main() -> None:
    chosen, record = parser(__doc__, ARMS, 200).parse_args(), Record("moe", "ablations")
    for seed in chosen.seeds:
        for arm in chosen.arms:
            kind, settings = ARMS[arm]
            name = f"ablations-{chosen.steps}/{arm.replace(' ', '-').replace(',', '')}-{seed}"
            make = partial(made, chosen.work, kind, seed)
            run = lambda name=name, make=make, seed=seed, more=settings: trained(  # noqa: E731
                chosen.work, name, make, chosen.steps, seed, RATE, **more
            )
            record.row({"steps": chosen.steps, "arm": arm, "seed": seed}, run)
            record.save(claims(record, chosen.steps))
    show(record.rows, ("steps", "arm"), ("loss", "max_load", "entropy", "dead", "training_seconds"))


def made(work: Path, kind: str, seed: int) -> PreTrainedModel:
    """Fresh weights with that kind of router."""
    if kind != SIGMOID:
        return fresh(work, "small", seed, (8, 1, 8, kind == POST))
    dense = dense_config("small")
    config = AutoConfig.for_model(
        "deepseek_v3",
        **{name: getattr(dense, name) for name in ALIKE},
        n_routed_experts=64,
        n_shared_experts=1,
        num_experts_per_tok=7,
        moe_intermediate_size=dense.intermediate_size // 8,
        first_k_dense_replace=0,
        n_group=1,
        topk_group=1,
        routed_scaling_factor=1.0,
        q_lora_rank=None,
        kv_lora_rank=32,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=16,
    )
    model = build(config, tokenizer(work), seed)
    scale_experts(model, fresh_scale(8, 1, 8, shared=1))
    return model


def claims(record: Record, steps: int) -> dict[str, Row]:
    """How much better the default is than each other arm, among routers of a kind with the balance loss."""
    found = {}
    for arm in ARMS:
        base = "sigmoid" if ARMS[arm][0] == SIGMOID else "default"
        how = f"held-out loss of '{arm}' minus that of '{base}', {steps * 2048 / 1e6:.2g}M tokens"
        one = gap(record, {"steps": steps, "arm": arm}, {"steps": steps, "arm": base}, how)
        if arm != base and one:
            found["router_" + "".join(c if c.isalnum() else "_" for c in arm) + "_loss_gap"] = one
    return found


if __name__ == "__main__":
    main()
