"""What ranking costs beside the forward pass that it rides on, in time and in memory.

SmolLM2-135M in float32. Arms in turns within each round, in one process: `forward` is the model's plain forward pass
with its logits, `backbone` the same without the head, `rank` is `nestling.rank` with its default metrics, `activation`
with Minitron's. Time is the processor's (one thread), which other work on the machine stretches little; memory is the
high-water mark of a fresh process above the loaded model, ranking few and many tokens in batches of the same size.
Linux only.

    python benchmarks/speed/rank_time.py [--rounds 5] [--rows 4]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table

import nestling as nl
from nestling import hub
from nestling.anatomy import decoder

RESULT = Path(__file__).parents[1] / "results/speed/rank_time.json"
MODEL = "builtin:smollm2-135m-instruct"
CONTEXT, BATCH = 256, 2
SEED = 0
FEW, MANY = 1024, 4096  # tokens whose ranking is compared in memory
# glibc gives freed blocks back at once, instead of raising its threshold to 32 MiB and keeping them in a heap with
# holes, so that the process holds what is used.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(128 << 10)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count, after one that does not")
    parser.add_argument("--rows", type=int, default=4, help=f"rows of {CONTEXT} tokens in each pass")
    parser.add_argument("--memory", type=int, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.memory:
        print(memory(chosen.memory))
        return
    torch.set_num_threads(1)
    seconds = times(chosen.rounds, chosen.rows)
    peaks = {tokens: child(tokens) for tokens in (FEW, MANY)}
    rows = [
        {"arm": arm, "seconds": median(taken), "all_seconds": taken, "tokens": chosen.rows * CONTEXT}
        for arm, taken in seconds.items()
    ]
    rows += [{"arm": f"memory, {tokens} tokens", "mib": mib, "tokens": tokens} for tokens, mib in peaks.items()]
    show(rows)
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(record(rows, seconds, peaks, chosen), indent=1) + "\n")


def batches(tokens: int) -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(0, 49152, (tokens // CONTEXT, CONTEXT), generator=torch.Generator().manual_seed(SEED))
    return [{"input_ids": part} for part in ids.split(BATCH)]


@torch.no_grad()
def times(rounds: int, rows: int) -> dict[str, list[float]]:
    """Seconds of each arm in every round; arms run in reversed order every other round."""
    model = hub.load(MODEL, dtype="float32")[0]
    text = batches(rows * CONTEXT)
    arms = {
        "forward": lambda: [model(**batch, use_cache=False) for batch in text],
        "backbone": lambda: [decoder(model)(**batch, use_cache=False) for batch in text],
        "rank": lambda: nl.rank(model, text),
        "activation": lambda: nl.rank(model, text, metric="activation"),
    }
    taken: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(rounds + 1):
        for name in arms if turn % 2 == 0 else reversed(arms):
            started = time.process_time()
            arms[name]()
            if turn:
                taken[name].append(round(time.process_time() - started, 3))
    return taken


def child(tokens: int) -> float:
    """The memory arm in a fresh process."""
    command, how = [sys.executable, __file__, "--memory", str(tokens)], os.environ | ALLOCATOR
    return float(subprocess.run(command, env=how, stdout=subprocess.PIPE, text=True, check=True).stdout.split()[-1])


def memory(tokens: int) -> float:
    """Peak MiB of ranking so many tokens, above the process with the model in it."""
    model = hub.load(MODEL, dtype="float32")[0]
    with torch.no_grad():
        for parameter in model.parameters():  # in memory rather than in a mapped file
            parameter.data = parameter.clone()
    nl.rank(model, batches(BATCH * CONTEXT))  # what libraries allocate once
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    nl.rank(model, batches(tokens))
    return status("VmHWM") - before


def status(field: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return round(int(line.split()[1]) / 1024)


def ratio(seconds: dict[str, list[float]], arm: str, to: str) -> dict:
    """An arm's time over another's, round by round."""
    each = sorted(round(a / b, 3) for a, b in zip(seconds[arm], seconds[to], strict=True))
    how = f"processor time of nestling.rank over that of the {to} pass on the same batches, {len(each)} rounds in turns"
    found = {"value": median(each), "spread": [each[0], each[-1]], "seeds": [SEED], "paper": None, "unit": "x"}
    return found | {"how": how}


def record(
    rows: list[dict], seconds: dict[str, list[float]], peaks: dict[int, float], chosen: argparse.Namespace
) -> dict:
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    grown = round(peaks[MANY] - peaks[FEW], 1)
    return {
        "command": f"python benchmarks/speed/rank_time.py --rounds {chosen.rounds} --rows {chosen.rows}",
        "commit": commit.stdout.strip(),
        "versions": {name: version(name) for name in ("nestling", "torch", "transformers")},
        "threads": torch.get_num_threads(),
        "seeds": [SEED],
        "rows": rows,
        "claims": {
            "rank_time_vs_forward": ratio(seconds, "rank", "forward"),
            "rank_time_vs_backbone": ratio(seconds, "rank", "backbone"),
            "rank_memory_growth": {
                "value": grown,
                "spread": [grown, grown],
                "seeds": [SEED],
                "paper": None,
                "unit": "MiB",
                "how": f"peak memory of ranking {MANY:,} tokens less that of {FEW:,}, batches of {BATCH} x {CONTEXT}",
            },
        },
    }


def show(rows: list[dict]) -> None:
    table = Table("arm", "seconds, median", "rounds", "MiB")
    for row in rows:
        rounds = ", ".join(f"{s:.2f}" for s in row.get("all_seconds", []))
        table.add_row(row["arm"], f"{row['seconds']:.2f}" if "seconds" in row else "", rounds, str(row.get("mib", "")))
    Console().print(table)


if __name__ == "__main__":
    main()
