"""Speed of hybrids on this machine: a half-size child against its parent and an attention-only model, and the scan.

Weights are random, which speed does not depend on. The child has 3/4 of the hidden size, 5/8 of the Mamba heads and 2/7
of the neurons, half the parameters; the attention-only model is a Llama of the child's size. All run in one process,
interleaved. A training step is timed with the chunk that Nemotron-H's configs name, which is what transformers does by
itself, and with the one that Nestling trains with.

    python -m benchmarks.hybrid.speed [--prompt 4096] [--rounds 3]
"""

from __future__ import annotations

import argparse
import time
from contextlib import nullcontext
from statistics import median

import torch
from benchmarks.record import Record, claim
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, set_seed

from nestling.anatomy import Anatomy, suited_scans
from nestling.cost import cost
from nestling.evaluate import speed
from nestling.surgery import prune
from nestling.surgery.choose import prefix_ranking
from nestling.train import CausalLM
from nestling.train.rows import shifted

PARENT = {
    "vocab_size": 8192,
    "hidden_size": 512,
    "hybrid_override_pattern": "M-M*M-M-M*M-",
    "intermediate_size": 1792,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "mamba_num_heads": 32,
    "mamba_head_dim": 32,
    "n_groups": 4,
    "ssm_state_size": 64,
    "chunk_size": 128,
    "max_position_embeddings": 16384,
}
CHILD = {"hidden_size": 384, "mamba_num_heads": 20, "intermediate_size": 512}
ATTENTION = {
    "vocab_size": 8192,
    "hidden_size": 384,
    "intermediate_size": 896,
    "num_hidden_layers": 5,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "head_dim": 32,
    "max_position_embeddings": 16384,
    "tie_word_embeddings": False,
}
SHORT, NEW = 128, 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompt", type=int, default=4096, help="tokens before those that are decoded")
    parser.add_argument("--rounds", type=int, default=3)
    chosen = parser.parse_args()
    set_seed(0)
    models = built()
    record = Record("hybrid", "speed")
    record.rows = [
        row
        for prompt in (SHORT, chosen.prompt)
        for row in decoded(models, prompt, chosen.rounds if prompt > SHORT else chosen.rounds + 2)
    ]
    record.rows += [trained(models["parent"], chosen.rounds + 2)]
    record.save(claims(record.rows, chosen.prompt), seeds=[0])
    show(record.rows)


def built() -> dict[str, PreTrainedModel]:
    parent = AutoModelForCausalLM.from_config(AutoConfig.for_model("nemotron_h", **PARENT)).eval()
    child = prune(parent, prefix_ranking(Anatomy.of(parent)), CHILD)
    attention = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **ATTENTION)).eval()
    return {"parent": parent, "child": child, "attention": attention}


def decoded(models: dict[str, PreTrainedModel], prompt: int, rounds: int) -> list[dict]:
    """Prefill and decode of each model, and what a sequence of that length keeps."""
    found = speed(models, prompt_tokens=prompt, new_tokens=NEW, rounds=rounds)
    rows = []
    for name, model in models.items():
        price, taken = cost(model, context=prompt), found[name]
        rows.append(
            {
                "what": name,
                "prompt": prompt,
                "params": price.params,
                "kv_bytes": price.kv_bytes,
                "state_bytes": price.state_bytes,
                "prefill": round(taken.prefill_tokens_per_s, 1),
                "decode": round(taken.decode_tokens_per_s, 1),
                "decode_range": [round(value, 1) for value in taken.decode_range],
            }
        )
    return rows


def trained(model: PreTrainedModel, rounds: int, rows: int = 2, context: int = 256) -> dict:
    """Seconds of a training step with the config's chunk and with Nestling's, interleaved."""
    learner = CausalLM(model.train().requires_grad_(True))
    ids = torch.randint(0, PARENT["vocab_size"], (rows, context))
    labels = shifted(ids, torch.ones_like(ids).bool())
    taken: dict[str, list[float]] = {"transformers": [], "nestling": []}
    for turn in range(rounds + 1):
        for name in sorted(taken, reverse=turn % 2 == 1):
            with suited_scans(model) if name == "nestling" else nullcontext():
                start = time.perf_counter()
                learner(ids, labels)["loss"].backward()
                model.zero_grad()
            if turn:
                taken[name].append(time.perf_counter() - start)
    medians = {name: round(median(values), 3) for name, values in taken.items()}
    ratios = [a / b for a, b in zip(taken["transformers"], taken["nestling"], strict=True)]
    return {"what": "training step, s", "prompt": rows * context, **medians, "ratios": [round(r, 2) for r in ratios]}


def claims(rows: list[dict], prompt: int) -> dict[str, dict]:
    at = {(row["what"], row["prompt"]): row for row in rows}
    step = rows[-1]

    def faster(name: str, other: str, tokens: int) -> list[float]:
        mine, theirs = at[name, tokens], at[other, tokens]
        slow = mine["decode_range"][0] / theirs["decode_range"][0]
        return [mine["decode"] / theirs["decode"], slow, mine["decode_range"][1] / theirs["decode_range"][1]]

    def spread(values: list[float], how: str, paper: float | None = None) -> dict:
        return claim(values, [0], how, "x", paper) | {"value": round(values[0], 3)}

    size = at["child", prompt]["params"] / at["parent", prompt]["params"]
    return {
        "decode_speedup_vs_parent": spread(
            faster("child", "parent", SHORT),
            f"decoding after {SHORT} tokens, child of {size:.2f} x the parameters",
            1.4,
        ),
        "decode_speedup_vs_parent_long": spread(
            faster("child", "parent", prompt), f"decoding after {prompt} tokens, the same child", 1.4
        ),
        "decode_speedup_vs_attention_long": spread(
            faster("child", "attention", prompt),
            f"decoding after {prompt} tokens, against a Llama of about the child's size with as many KV heads as heads",
            2.0,
        ),
        "train_step_speedup_vs_transformers": spread(
            [median(step["ratios"]), min(step["ratios"]), max(step["ratios"])],
            "forward and backward of the parent at 2 x 256 tokens: chunk of 128, as configured, over chunk of 32",
        ),
    }


def show(rows: list[dict]) -> None:
    table = Table(
        "model", "after tokens", "params", "KV, bytes", "state, bytes", "prefill, tokens/s", "decode, tokens/s"
    )
    for row in rows[:-1]:
        values = (row[name] for name in ("prompt", "params", "kv_bytes", "state_bytes", "prefill", "decode"))
        table.add_row(row["what"], *(f"{value:,}" for value in values))
    Console(width=140).print(table)
    Console(width=140).print(rows[-1])


if __name__ == "__main__":
    main()
