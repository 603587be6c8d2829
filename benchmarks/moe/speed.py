"""Speed of routed experts: the implementation `nestling` against transformers' own, and fine against coarse experts.

A Qwen3-MoE of 2 layers and hidden size 256; its experts have 1,024 active neurons together, whether 2 of 8, 8 of 64 or
16 of 256 are used, so all arms have equal FLOPs. A training step is forward, loss and backward over 1,024 tokens, in
float32; the experts of a step are what it does in them alone, forward and backward through both layers for choices
that are made before; decoding is one token through one layer's experts. All arms take turns in one process, so that
what else the machine does hits all of them; a claim is the median over rounds of the ratio within a round.

    OMP_NUM_THREADS=2 python benchmarks/moe/speed.py [--rounds 8]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from nestling.experts import NAME, register_experts

RESULT = Path(__file__).parents[1] / "results/moe/speed.json"
SHAPES = {"8 top 2": (8, 2, 512), "64 top 8": (64, 8, 128), "256 top 16": (256, 16, 64)}
ARMS = [(shape, NAME) for shape in SHAPES] + [("8 top 2", "eager"), ("64 top 8", "eager"), ("64 top 8", "grouped_mm")]
TOKENS = (4, 256)
SEED = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=8, help="timed rounds")
    rounds = parser.parse_args().rounds
    register_experts()
    models = {shape: build(*sizes) for shape, sizes in SHAPES.items()}
    steps = timed({arm: step(models[arm[0]], arm[1]) for arm in ARMS}, rounds)
    alone = timed({arm: experts(models[arm[0]], arm[1]) for arm in ARMS}, rounds)
    single = timed({arm: decode(models[arm[0]], arm[1]) for arm in ARMS if arm[1] != "grouped_mm"}, rounds, calls=50)
    rows = [row(arm, steps[arm], alone[arm], single.get(arm)) for arm in ARMS]
    show(rows)
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(record(rows, steps, alone, single), indent=1) + "\n")


def build(experts: int, top_k: int, width: int) -> PreTrainedModel:
    config = AutoConfig.for_model(
        "qwen3_moe",
        vocab_size=1024,
        hidden_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=64,
        num_experts=experts,
        num_experts_per_tok=top_k,
        moe_intermediate_size=width,
        norm_topk_prob=True,
    )
    torch.manual_seed(SEED)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def step(model: PreTrainedModel, implementation: str) -> Callable[[], None]:
    """Forward, loss and backward."""
    ids = torch.randint(0, 1024, TOKENS, generator=torch.Generator().manual_seed(SEED))

    def run() -> None:
        model.set_experts_implementation(implementation)
        model.zero_grad(set_to_none=True)
        model(input_ids=ids, labels=ids).loss.backward()

    return run


def experts(model: PreTrainedModel, implementation: str) -> Callable[[], None]:
    """Forward and backward of the experts of every layer, one after another, without the rest of the model."""
    blocks, tokens = [layer.mlp for layer in model.model.layers], TOKENS[0] * TOKENS[1]
    start = torch.randn(tokens, 256, generator=torch.Generator().manual_seed(SEED)).requires_grad_()
    with torch.no_grad():
        _, *routed = zip(*(block.gate(start) for block in blocks), strict=True)
    weights, choices = [shares.requires_grad_() for shares in routed[0]], routed[1]

    def run() -> None:
        model.set_experts_implementation(implementation)
        for tensor in (start, *weights, *(p for block in blocks for p in block.parameters())):
            tensor.grad = None
        hidden = start
        for block, chosen, shares in zip(blocks, choices, weights, strict=True):
            hidden = block.experts(hidden, chosen, shares)
        hidden.sum().backward()

    return run


def decode(model: PreTrainedModel, implementation: str) -> Callable[[], None]:
    """One token through the experts of one layer, router included."""
    block, hidden = model.model.layers[0].mlp, torch.randn(1, 1, 256)

    @torch.no_grad()
    def run() -> None:
        model.set_experts_implementation(implementation)
        block(hidden)

    return run


def timed(arms: dict, rounds: int, calls: int = 1) -> dict[tuple[str, str], list[float]]:
    """Seconds per call of each arm in each round; the first round is not counted."""
    seconds: dict = {arm: [] for arm in arms}
    for number in range(rounds + 1):
        for arm, run in arms.items():
            started = time.perf_counter()
            for _ in range(calls):
                run()
            if number:
                seconds[arm].append((time.perf_counter() - started) / calls)
    return seconds


def row(arm: tuple[str, str], steps: list[float], alone: list[float], single: list[float] | None) -> dict:
    tokens = TOKENS[0] * TOKENS[1]
    return {
        "experts": arm[0],
        "implementation": arm[1],
        "tokens_per_s": round(tokens / median(steps)),
        "best_tokens_per_s": round(tokens / min(steps)),
        "step_ms": round(1e3 * median(steps), 1),
        "experts_ms": round(1e3 * median(alone), 1),
        "decode_us": round(1e6 * median(single), 1) if single else None,
    }


def claim(slow: list[float], fast: list[float], how: str) -> dict:
    """How many times faster, round by round."""
    ratios = [a / b for a, b in zip(slow, fast, strict=True)]
    return {
        "value": round(median(ratios), 3),
        "spread": [round(min(ratios), 3), round(max(ratios), 3)],
        "seeds": [SEED],
        "paper": None,
        "unit": "x",
        "how": how,
    }


def record(rows: list[dict], steps: dict, alone: dict, single: dict) -> dict:
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    what = "training step of 1,024 tokens, 2 layers, hidden 256, equal FLOPs"
    inside, fine = f"the experts alone of a {what}", "64 experts top 8"
    few, many, most = ((shape, NAME) for shape in SHAPES)
    eager = ("64 top 8", "eager")
    return {
        "command": f"OMP_NUM_THREADS={torch.get_num_threads()} python benchmarks/moe/speed.py {' '.join(sys.argv[1:])}",
        "commit": commit.stdout.strip(),
        "versions": {name: version(name) for name in ("nestling", "torch", "transformers")},
        "seeds": [SEED],
        "threads": torch.get_num_threads(),
        "rows": rows,
        "claims": {
            "speed_64top8_vs_8top2": claim(steps[few], steps[many], f"64 experts top 8 over 8 top 2, {what}"),
            "speed_256top16_vs_8top2": claim(steps[few], steps[most], f"256 experts top 16 over 8 top 2, {what}"),
            "speed_vs_transformers_eager": claim(
                steps[eager], steps[many], f"over transformers' eager, {fine}, {what}"
            ),
            "experts_64top8_vs_8top2": claim(alone[few], alone[many], f"64 experts top 8 over 8 top 2, {inside}"),
            "experts_256top16_vs_8top2": claim(alone[few], alone[most], f"256 experts top 16 over 8 top 2, {inside}"),
            "experts_vs_transformers_eager": claim(
                alone[eager], alone[many], f"over transformers' eager, {fine}, {inside}"
            ),
            "experts_vs_transformers_grouped_mm": claim(
                alone["64 top 8", "grouped_mm"], alone[many], f"over transformers' grouped_mm, {fine}, {inside}"
            ),
            "decode_vs_transformers_eager": claim(
                single[eager], single[many], "one token through a layer's experts, 64 top 8"
            ),
        },
    }


def show(rows: list[dict]) -> None:
    table = Table("experts", "implementation", "tokens/s", "best", "step, ms", "its experts, ms", "decode, us")
    for found in rows:
        speed = (f"{found['tokens_per_s']:,}", f"{found['best_tokens_per_s']:,}")
        times = (str(found[name] or "-") for name in ("step_ms", "experts_ms", "decode_us"))
        table.add_row(found["experts"], found["implementation"], *speed, *times)
    Console().print(table)


if __name__ == "__main__":
    main()
