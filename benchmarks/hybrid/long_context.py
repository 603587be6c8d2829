"""Decoding speed by context: a half-size child against its hybrid parent and an attention-only model of its own size.

Weights are random, which speed does not depend on, and large enough that reading them takes longer than starting
operations. Contexts are not read: a short prompt fills states and caches, and random keys and values of a long text are
put before its own. The attention-only model is a Llama with three query heads to a KV head. All run in one process,
interleaved; a round times a few tokens of each.

    python -m benchmarks.hybrid.long_context [--contexts 1024,8192,32768] [--rounds 5] [--tokens 8] [--profile]
"""

from __future__ import annotations

import argparse
import time
from statistics import median
from typing import Any

import torch
from benchmarks.record import Record, claim
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel, set_seed

from nestling.anatomy import Anatomy, cache_name
from nestling.cost import cost
from nestling.surgery import prune
from nestling.surgery.choose import prefix_ranking

PARENT = {
    "vocab_size": 8192,
    "hidden_size": 1024,
    "hybrid_override_pattern": "M-M*M-M-M*M-",
    "intermediate_size": 4096,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "mamba_num_heads": 32,
    "mamba_head_dim": 64,
    "n_groups": 4,
    "ssm_state_size": 128,
    "chunk_size": 128,
    "max_position_embeddings": 65536,
}
CHILD = {"hidden_size": 768, "mamba_num_heads": 20, "intermediate_size": 2048}
ATTENTION = {
    "vocab_size": 8192,
    "hidden_size": 768,
    "intermediate_size": 1664,
    "num_hidden_layers": 7,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 65536,
    "tie_word_embeddings": False,
}
PROMPT = 16
PAPER = {"parent": 1.4, "attention": 2.0}  # Minitron-SSM, table 1 and section 5: GPU, 65,536 tokens in, 1,024 out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--contexts", default="1024,8192,32768", help="tokens before those that are decoded")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=8, help="tokens that a round decodes with each model")
    parser.add_argument("--profile", action="store_true", help="print what a step of the child spends its time on")
    chosen = parser.parse_args()
    set_seed(0)
    models = built()
    if chosen.profile:
        return profiled(models["child"])
    record = Record("hybrid", "long_context")
    record.rows = []
    for context in map(int, chosen.contexts.split(",")):
        record.rows += measured(models, context, chosen.rounds, chosen.tokens)
        show(record.rows)
    record.save(claims(record.rows), seeds=[0])


def built() -> dict[str, PreTrainedModel]:
    parent = AutoModelForCausalLM.from_config(AutoConfig.for_model("nemotron_h", **PARENT)).eval()
    child = prune(parent, prefix_ranking(Anatomy.of(parent)), CHILD)
    attention = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **ATTENTION)).eval()
    return {"parent": parent, "child": child, "attention": attention}


@torch.no_grad()
def filled(model: PreTrainedModel, context: int) -> Any:
    """The cache after `context` tokens: states of a short prompt, and random keys and values before its own."""
    cache = DynamicCache(config=model.config)
    model(input_ids=torch.arange(3, 3 + PROMPT)[None], use_cache=True, **{cache_name(model): cache})
    for layer in cache.layers:
        keys = getattr(layer, "keys", None)
        if keys is not None and keys.dim() == 4:
            before = torch.randn(2, *keys.shape[:2], context - PROMPT, keys.shape[3])
            layer.keys, layer.values = torch.cat([before[0], keys], 2), torch.cat([before[1], layer.values], 2)
    return cache


@torch.no_grad()
def decode(model: PreTrainedModel, cache: Any, tokens: int) -> float:
    """Seconds per token."""
    start = time.perf_counter()
    for token in range(tokens):
        model(input_ids=torch.tensor([[3 + token]]), use_cache=True, **{cache_name(model): cache})
    return (time.perf_counter() - start) / tokens


def in_turn(models: dict[str, PreTrainedModel], context: int, rounds: int, tokens: int) -> dict[str, list[float]]:
    """Seconds per token of each model after a context in each round; the order is turned every time."""
    caches = {name: filled(model, context) for name, model in models.items()}
    taken: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(rounds + 1):
        for name in sorted(models, reverse=turn % 2 == 1):
            seconds = decode(models[name], caches[name], tokens)
            if turn:
                taken[name].append(seconds)
    return taken


def measured(models: dict[str, PreTrainedModel], context: int, rounds: int, tokens: int) -> list[dict[str, Any]]:
    """Tokens per second of each model after a context, round by round, the order turned every time."""
    taken, rows = in_turn(models, context, rounds, tokens), []
    for name, model in models.items():
        price = cost(model, context=context)
        rows.append(
            {
                "what": name,
                "context": context,
                "params": price.params,
                "kv_bytes": price.kv_bytes,
                "state_bytes": price.state_bytes,
                "tokens_per_s": round(1 / median(taken[name]), 2),
                "child_is_faster": [round(a / b, 3) for a, b in zip(taken[name], taken["child"], strict=True)],
            }
        )
    return rows


def claims(rows: list[dict[str, Any]]) -> dict[str, dict]:
    """At every context, how many times faster the child decodes than each of the others: median and range of rounds."""
    found = {}
    size = {row["what"]: row["params"] for row in rows}
    for row in rows:
        other = row["what"]
        if other != "child":
            how = (
                f"decoding after {row['context']:,} tokens, batch 1, float32: child of {size['child'] / 1e6:.0f} M "
                f"parameters over {other} model of {size[other] / 1e6:.0f} M"
            )
            made = claim(row["child_is_faster"], [0], how, "x", PAPER[other])
            found[f"decode_speedup_vs_{other}_{row['context']}"] = made | {"value": median(row["child_is_faster"])}
    return found


def profiled(model: PreTrainedModel, context: int = 1024, tokens: int = 8) -> None:
    """A table of the operations that decoding spends its time on."""
    cache = filled(model, context)
    decode(model, cache, 2)
    with torch.profiler.profile() as profile:
        decode(model, cache, tokens)
    print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=20, max_name_column_width=40))


def show(rows: list[dict[str, Any]]) -> None:
    table = Table("after tokens", "model", "params", "KV, bytes", "state, bytes", "tokens/s", "child is faster")
    for row in rows:
        values = (f"{row[name]:,}" for name in ("params", "kv_bytes", "state_bytes", "tokens_per_s"))
        faster = f"{median(row['child_is_faster']):.2f} x" if row["what"] != "child" else ""
        table.add_row(f"{row['context']:,}", row["what"], *values, faster)
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
