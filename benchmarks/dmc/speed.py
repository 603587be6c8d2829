"""Decoding over a compressed cache: attention alone at 64k, models by context and batch, against transformers' own.

`attention`: the same compiled loops over a full cache and over compressed ones with ragged heads (lengths lognormal,
0.5), far beyond the processor's cache. `model`: a Llama whose keys and values exceed its weights decodes
after a context of random keys and values, compressed or not, against the stock model with SDPA and a `StaticCache`.
The model is small and its cache is 17 times its weights at 16k: the proportion that Llama 3 8B has with about 130
such sequences at once. What a step costs apart from attention is the same for every ratio, so it weighs less the
longer the context and the larger the batch. Arms take turns, in reversed order every other round; figures are medians
over rounds.

    python -m benchmarks.dmc.speed [--rounds 7] [--cells 1024x1 16384x1 32768x1 1024x4 16384x4]
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from benchmarks.record import commit
from rich.console import Console
from rich.table import Table
from torch.nn.functional import scaled_dot_product_attention
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel, StaticCache, set_seed
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from nestling import dmc
from nestling.anatomy import cache_name
from nestling.dmc.runtime import kernel
from nestling.dmc.runtime.gates import Gates
from nestling.dmc.runtime.heads import Heads, Text
from nestling.dmc.runtime.slots import SlotLayer

RESULT = Path(__file__).parents[1] / "results/dmc/speed.json"
SEED = 0
RATIOS = (1, 2, 4, 8)
ATTENTION = {"heads": 8, "dim": 64, "context": 65536, "layers": 1}
MODEL = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 6, "heads": 8, "dim": 64}
CELLS = ["1024x1", "16384x1", "32768x1", "1024x4", "16384x4"]
LONG = 16384  # tokens from which a ratio of 8 is claimed too
STEPS = 4  # tokens per round of each sequence
Clock = Callable[[], float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--cells", nargs="*", default=CELLS, help="CONTEXTxBATCH of whole models; none to skip them")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--processor", action="store_true", help="processor time of one thread, for a busy machine")
    chosen = parser.parse_args()
    if chosen.processor:
        torch.set_num_threads(1)
    clock = time.process_time if chosen.processor else time.perf_counter
    cells = [tuple(map(int, cell.split("x"))) for cell in chosen.cells]
    found = attention(chosen.rounds, clock)
    for context, batch in cells:
        found += model(context, batch, chosen.rounds, clock)
    show(found)
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    chosen.out.write_text(json.dumps(record(found, chosen.rounds, cells, chosen.processor), indent=1) + "\n")


@torch.no_grad()
def attention(rounds: int, clock: Clock) -> list[dict[str, Any]]:
    """One token over the layers' caches, in ms: full SDPA, and a step of the compiled loops at each ratio."""
    set_seed(SEED)
    heads, dim, context, layers = ATTENTION.values()
    query, real = torch.randn(1, heads, 1, dim), torch.ones(1, 1, dtype=torch.bool)
    angles = torch.randn(1, 1, dim)
    token = Heads(query.unsqueeze(2), query, query, apply_rotary_pos_emb, dim**-0.5, (angles, angles))
    full = [(torch.randn(1, heads, context, dim), torch.randn(1, heads, context, dim)) for _ in range(layers)]
    arms: dict[str, Callable[[], Any]] = {
        "sdpa": lambda: [scaled_dot_product_attention(query, keys, values) for keys, values in full]
    }
    for ratio in RATIOS:
        filled = [slots(1, heads, dim, context, ratio) for _ in range(layers)]
        arms[f"loops {ratio}x"] = lambda filled=filled: [
            kernel.step(token, Gates(keep=0.0), Text(real, ~real), layer) for layer in filled
        ]
    return _rows("attention", context, 1, interleaved(arms, rounds, clock))


@torch.no_grad()
def model(context: int, batch: int, rounds: int, clock: Clock) -> list[dict[str, Any]]:
    """ms per step of greedy decoding of `batch` sequences after `context` tokens."""
    set_seed(SEED)
    stock = llama()
    small = dmc.free(dmc.convert(copy.deepcopy(stock)))
    static = StaticCache(config=stock.config, max_cache_len=context + STEPS * (rounds + 2))
    fill_static(static, stock.config, context, batch)
    arms = {"sdpa": stepper(stock, static, context, batch)}
    for ratio in RATIOS:
        arms[f"dmc {ratio}x"] = stepper(small, slot_cache(small, context, ratio, batch), context, batch)
    found = _rows("model", context, batch, interleaved(arms, rounds, clock), per=STEPS)
    weights = sum(p.numel() for p in stock.parameters())
    held = 2 * MODEL["num_hidden_layers"] * MODEL["heads"] * MODEL["dim"] * context * batch
    return [
        row | {"kv_over_weights": round(held / weights, 2), "tokens_per_second": round(1000 * batch / row["ms"], 1)}
        for row in found
    ]


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


def stepper(of: PreTrainedModel, cache: Any, context: int, batch: int = 1) -> Callable[[], None]:
    """Decodes `STEPS` tokens more each time it is called."""
    state = {"token": torch.zeros(batch, 1, dtype=torch.long), "at": context}

    def run() -> None:
        for _ in range(STEPS):
            position = torch.full((batch, 1), state["at"])
            out = of(state["token"], position_ids=position, use_cache=True, **{cache_name(of): cache})
            state["token"] = out.logits[:, -1:].argmax(-1)
            state["at"] += 1

    return run


def fill_static(cache: StaticCache, config: Any, context: int, batch: int = 1) -> None:
    states = torch.randn(batch, config.num_key_value_heads, context, config.head_dim)
    for layer in range(config.num_hidden_layers):
        cache.update(states, states, layer)


def slot_cache(of: PreTrainedModel, context: int, ratio: float, batch: int = 1) -> DynamicCache:
    """A cache as `context` tokens would leave it at that ratio."""
    cache = DynamicCache(config=of.config)
    heads, dim = of.config.num_key_value_heads, of.config.head_dim
    cache.layers = [slots(batch, heads, dim, context, ratio) for _ in cache.layers]
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


def interleaved(
    arms: dict[str, Callable[[], Any]], rounds: int, clock: Clock = time.perf_counter
) -> dict[str, list[float]]:
    """ms of each round of each arm, after one round that does not count."""
    taken: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(rounds + 1):
        for name in arms if turn % 2 == 0 else reversed(arms):
            started = clock()
            arms[name]()
            if turn:
                taken[name].append((clock() - started) * 1000)
    return taken


def _rows(what: str, context: int, batch: int, taken: dict[str, list[float]], per: int = 1) -> list[dict[str, Any]]:
    threads = torch.get_num_threads()
    return [
        {"what": what, "context": context, "batch": batch, "arm": arm, "threads": threads}
        | {"ms": median(ms) / per, "all_ms": [m / per for m in ms]}
        for arm, ms in taken.items()
    ]


def speedup(found: list[dict[str, Any]], what: str, context: int, base: str, arm: str, batch: int = 1) -> list[float]:
    """How many times faster `arm` is than `base`: of the medians, and the least and most of any round."""
    where = (what, context, batch)
    rows = {row["arm"]: row for row in found if (row["what"], row["context"], row["batch"]) == where}
    rounds = [a / b for a, b in zip(rows[base]["all_ms"], rows[arm]["all_ms"], strict=True)]
    return [rows[base]["ms"] / rows[arm]["ms"], min(rounds), max(rounds)]


def record(found: list[dict[str, Any]], rounds: int, cells: list[tuple[int, ...]], processor: bool) -> dict[str, Any]:
    clock = "processor time" if processor else "wall time"
    how = f"{torch.get_num_threads()} threads, {clock}"
    loops = f"compiled loops over a full cache against one of ratio 4 with ragged heads, {ATTENTION}, {how}"
    whole = f"stock Llama with SDPA and a preallocated cache against a compressed one, {MODEL}, {how}"
    full, words = ATTENTION["context"], " ".join(f"{context}x{batch}" for context, batch in cells)
    claims = {
        "same_kernel_speedup_4x_64k": _claim(speedup(found, "attention", full, "loops 1x", "loops 4x"), loops, 4.0)
    }
    for context, batch in cells:
        for ratio in (4,) if context < LONG else (4, 8):
            values = speedup(found, "model", context, "sdpa", f"dmc {ratio}x", batch)
            name = f"end_to_end_speedup_{ratio}x_{context // 1024}k" + (f"_batch{batch}" if batch > 1 else "")
            claims[name] = _claim(values, whole, None)
    return {
        "command": f"python -m benchmarks.dmc.speed --rounds {rounds} --cells {words}" + " --processor" * processor,
        "commit": commit(),
        "versions": {name: version(name) for name in ("nestling", "torch", "transformers", "numba")},
        "seeds": [SEED],
        "rows": found,
        "claims": claims,
    }


def _claim(values: list[float], how: str, paper: float | None) -> dict[str, Any]:
    value, least, most = (round(v, 2) for v in values)
    return {"value": value, "spread": [least, most], "seeds": [SEED], "paper": paper, "unit": "x", "how": how}


def show(found: list[dict[str, Any]]) -> None:
    table = Table("what", "context", "batch", "arm", "ms per step", "tokens per second", title="decoding", box=None)
    for row in found:
        rate = f"{1000 * row['batch'] / row['ms']:.1f}"
        table.add_row(row["what"], f"{row['context']:,}", str(row["batch"]), row["arm"], f"{row['ms']:.2f}", rate)
    Console().print(table)


if __name__ == "__main__":
    main()
