"""Decoding over a compressed cache: attention alone at 64k, whole models at 1k and 16k, against transformers' own.

`attention`: the same compiled loops over a full cache and over compressed ones with ragged heads (lengths lognormal,
0.5), far beyond the processor's cache. `model`: a Llama whose keys and values exceed its weights decodes
after a context of random keys and values, compressed or not, against the stock model with SDPA and a `StaticCache`.
Arms take turns, in reversed order every other round; figures are medians over rounds.

    python -m benchmarks.dmc.speed [--rounds 7]
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.nn.functional import scaled_dot_product_attention
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel, StaticCache, set_seed

from nestling import dmc
from nestling.dmc.runtime import kernel
from nestling.dmc.runtime.slots import SlotLayer

RESULT = Path(__file__).parents[1] / "results/dmc/speed.json"
SEED = 0
RATIOS = (1, 2, 4, 8)
ATTENTION = {"heads": 8, "dim": 64, "context": 65536, "layers": 1}
MODEL = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 6, "heads": 8, "dim": 64}
STEPS = 4  # tokens per round


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--contexts", type=int, nargs="*", default=[1024, 16384], help="of whole models; none to skip them"
    )
    chosen = parser.parse_args()
    found = attention(chosen.rounds)
    for context in chosen.contexts:
        found += model(context, chosen.rounds)
    show(found)
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(record(found, chosen.rounds, chosen.contexts), indent=1) + "\n")


@torch.no_grad()
def attention(rounds: int) -> list[dict[str, Any]]:
    """One query over the layers' caches, in ms per token: full SDPA, and the compiled loops at each ratio."""
    set_seed(SEED)
    heads, dim, context, layers = ATTENTION.values()
    query, key = torch.randn(1, heads, 1, dim), torch.randn(1, heads, dim)
    full = [(torch.randn(1, heads, context, dim), torch.randn(1, heads, context, dim)) for _ in range(layers)]
    arms: dict[str, Callable[[], Any]] = {
        "sdpa": lambda: [scaled_dot_product_attention(query, keys, values) for keys, values in full]
    }
    for ratio in RATIOS:
        filled = [slots(1, heads, dim, context, ratio) for _ in range(layers)]
        arms[f"loops {ratio}x"] = lambda filled=filled: [
            kernel.attend(query.clone(), key.clone(), layer, 0.0, dim**-0.5) for layer in filled
        ]
    return _rows("attention", context, interleaved(arms, rounds))


@torch.no_grad()
def model(context: int, rounds: int) -> list[dict[str, Any]]:
    """ms per token of greedy decoding after `context` tokens."""
    set_seed(SEED)
    stock = llama()
    small = dmc.free(dmc.convert(copy.deepcopy(stock)))
    static = StaticCache(config=stock.config, max_cache_len=context + STEPS * (rounds + 2))
    fill_static(static, stock.config, context)
    arms = {"sdpa": stepper(stock, static, context)}
    for ratio in RATIOS:
        arms[f"dmc {ratio}x"] = stepper(small, slot_cache(small, context, ratio), context)
    found = _rows("model", context, interleaved(arms, rounds), per=STEPS)
    weights = sum(p.numel() for p in stock.parameters())
    held = 2 * MODEL["num_hidden_layers"] * MODEL["heads"] * MODEL["dim"] * context
    return [row | {"kv_over_weights": round(held / weights, 2)} for row in found]


def llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=MODEL["hidden_size"],
        intermediate_size=MODEL["intermediate_size"],
        num_hidden_layers=MODEL["num_hidden_layers"],
        num_attention_heads=MODEL["heads"],
        num_key_value_heads=MODEL["heads"],
        head_dim=MODEL["dim"],
        max_position_embeddings=2**17,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config).eval()


def stepper(of: PreTrainedModel, cache: Any, context: int) -> Callable[[], None]:
    """Decodes `STEPS` tokens more each time it is called."""
    state = {"token": torch.zeros(1, 1, dtype=torch.long), "at": context}

    def run() -> None:
        for _ in range(STEPS):
            position = torch.tensor([[state["at"]]])
            out = of(state["token"], position_ids=position, past_key_values=cache, use_cache=True)
            state["token"] = out.logits[:, -1:].argmax(-1)
            state["at"] += 1

    return run


def fill_static(cache: StaticCache, config: Any, context: int) -> None:
    states = torch.randn(1, config.num_key_value_heads, context, config.head_dim)
    for layer in range(config.num_hidden_layers):
        cache.update(states, states, layer)


def slot_cache(of: PreTrainedModel, context: int, ratio: float) -> DynamicCache:
    """A cache as `context` tokens would leave it at that ratio."""
    cache = DynamicCache(config=of.config)
    heads, dim = of.config.num_key_value_heads, of.config.head_dim
    cache.layers = [slots(1, heads, dim, context, ratio) for _ in cache.layers]
    return cache


def slots(batch: int, heads: int, dim: int, context: int, ratio: float) -> SlotLayer:
    """A layer whose heads hold `context / ratio` slots on average, ragged unless the ratio is 1."""
    layer = SlotLayer()
    layer.lazy_initialization(torch.zeros(batch, heads, 0, dim), torch.zeros(batch, heads, 0, dim))
    share = torch.exp(0.5 * torch.randn(batch, heads)) if ratio > 1 else torch.ones(batch, heads)
    length = (share / share.mean() * context / ratio).round().long().clamp(1, context)
    layer.reserve(length)
    layer.length, layer.tokens = length, context
    layer.keys.normal_()
    layer.values.normal_()
    layer.sums.fill_(1.0)
    return layer


def interleaved(arms: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """ms of each round of each arm, after one round that does not count."""
    taken: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(rounds + 1):
        for name in arms if turn % 2 == 0 else reversed(arms):
            started = time.perf_counter()
            arms[name]()
            if turn:
                taken[name].append((time.perf_counter() - started) * 1000)
    return taken


def _rows(what: str, context: int, taken: dict[str, list[float]], per: int = 1) -> list[dict[str, Any]]:
    threads = torch.get_num_threads()
    return [
        {"what": what, "context": context, "arm": arm, "ms": median(ms) / per, "all_ms": [m / per for m in ms]}
        | {"threads": threads}
        for arm, ms in taken.items()
    ]


def speedup(found: list[dict[str, Any]], what: str, context: int, base: str, arm: str) -> list[float]:
    """How many times faster `arm` is than `base`: of the medians, and the least and most of any round."""
    rows = {row["arm"]: row for row in found if row["what"] == what and row["context"] == context}
    rounds = [a / b for a, b in zip(rows[base]["all_ms"], rows[arm]["all_ms"], strict=True)]
    return [rows[base]["ms"] / rows[arm]["ms"], min(rounds), max(rounds)]


def record(found: list[dict[str, Any]], rounds: int, contexts: list[int]) -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    threads = torch.get_num_threads()
    loops = f"compiled loops over a full cache against one of ratio 4 with ragged heads, {ATTENTION}, {threads} threads"
    whole = f"stock Llama with SDPA and a preallocated cache against a compressed one, {MODEL}, {threads} threads"
    full = ATTENTION["context"]
    claims = {
        "same_kernel_speedup_4x_64k": _claim(speedup(found, "attention", full, "loops 1x", "loops 4x"), loops, 4.0)
    }
    for context, ratio in ((16384, 4), (16384, 8), (1024, 4)):
        if context in contexts:
            values = speedup(found, "model", context, "sdpa", f"dmc {ratio}x")
            claims[f"end_to_end_speedup_{ratio}x_{context // 1024}k"] = _claim(values, whole, None)
    return {
        "command": f"python -m benchmarks.dmc.speed --rounds {rounds} --contexts " + " ".join(map(str, contexts)),
        "commit": commit.stdout.strip(),
        "versions": {name: version(name) for name in ("nestling", "torch", "transformers", "numba")},
        "seeds": [SEED],
        "rows": found,
        "claims": claims,
    }


def _claim(values: list[float], how: str, paper: float | None) -> dict[str, Any]:
    value, least, most = (round(v, 2) for v in values)
    return {"value": value, "spread": [least, most], "seeds": [SEED], "paper": paper, "unit": "x", "how": how}


def show(found: list[dict[str, Any]]) -> None:
    table = Table("what", "context", "arm", "ms per token", title="decoding", box=None)
    for row in found:
        table.add_row(row["what"], f"{row['context']:,}", row["arm"], f"{row['ms']:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
