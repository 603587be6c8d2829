"""Peak memory and time of one distillation step at 2,048 tokens: whole logits against Nestling.

SmolLM2-135M teaches a copy of itself whose weights are 1 % off, in float32. Three ways to the same gradient: `plain`
takes the KL of the models' own logits, `chunked` is `Pair` on the same batch, `distill` cuts the batch and recomputes
activations as `distill()` does on its own. Memory is the high-water mark of a fresh process, over forward and backward;
time is measured in turns in one process. Linux only.

    python benchmarks/speed/kd_memory.py [--rounds 3]
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
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel, set_seed

from nestling import hub
from nestling.distill import Pair
from nestling.train import TrainSettings, split_batch

RESULT = Path(__file__).parents[1] / "results/speed/kd_memory.json"
MODEL = "builtin:smollm2-135m-instruct"
LAYOUTS = ("8x256", "1x2048")
ARMS = ("plain", "chunked", "distill")
SEED = 0
MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="timed steps of each kind")
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.measure:
        what, layout, *rest = chosen.measure
        print(json.dumps(memory(layout, rest[0]) if what == "memory" else times(layout, int(rest[0]))))
        return
    rows = [row for layout in LAYOUTS for row in compare(layout, chosen.rounds)]
    show(rows)
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(record(rows, chosen.rounds), indent=1) + "\n")


def compare(layout: str, rounds: int) -> list[dict]:
    """One row per arm: gradients' agreement, memory and time."""
    seconds = child("times", layout, rounds)
    rows = []
    for arm in ARMS:
        measured = child("memory", layout, arm)
        taken = {"seconds": median(seconds[arm]), "all_seconds": seconds[arm], "threads": torch.get_num_threads()}
        rows.append({"layout": layout, "arm": arm, **measured, **taken})
    return rows


def child(*measure: object) -> dict:
    """Run this file in a fresh process; what it printed last."""
    command = [sys.executable, __file__, "--measure", *map(str, measure)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def memory(layout: str, arm: str) -> dict:
    """Peak of one step above the process with both models in it, and of the whole process, in MiB."""
    student, teacher = models()
    step = arms(student, teacher, layout)[arm]
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew: loading is not measured
    loss = step()
    peak = status("VmHWM")
    norm = torch.stack([p.grad.norm() for p in student.parameters()]).norm().item()
    return {"step_mib": peak - before, "process_mib": peak, "models_mib": before, "loss": loss, "grad_norm": norm}


def times(layout: str, rounds: int) -> dict:
    """Seconds of each round of each arm, in turns."""
    student, teacher = models()
    steps = arms(student, teacher, layout)
    seconds: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for _ in range(rounds):
        for arm, step in steps.items():
            started = time.perf_counter()
            step()
            seconds[arm].append(round(time.perf_counter() - started, 2))
            student.zero_grad()
    return seconds


def models() -> tuple[PreTrainedModel, PreTrainedModel]:
    """Student and teacher, with every weight in memory rather than in a mapped file."""
    set_seed(SEED)
    student, teacher = (hub.load(MODEL, dtype="float32")[0] for _ in range(2))
    with torch.no_grad():
        for ours, theirs in zip(student.parameters(), teacher.parameters(), strict=True):
            theirs.data = theirs.clone()
            ours.data = ours * (1 + 0.01 * torch.randn_like(ours))
    return student.train(), teacher.eval()


def arms(student: PreTrainedModel, teacher: PreTrainedModel, layout: str) -> dict[str, Callable[[], float]]:
    """The three ways to do a step: each leaves gradients in the student and returns the loss."""
    rows, seq = map(int, layout.split("x"))
    ids = torch.randint(0, student.config.vocab_size, (rows, seq), generator=torch.Generator().manual_seed(SEED))
    pair = Pair(student, teacher)
    split = split_batch(TrainSettings(batch_size=rows), seq, torch.device("cpu"))

    def plain() -> float:
        with torch.no_grad():
            theirs = F.log_softmax(teacher(ids, use_cache=False).logits[:, :-1].float(), -1)
        ours = F.log_softmax(student(ids, use_cache=False).logits[:, :-1].float(), -1)
        loss = F.kl_div(ours.flatten(0, 1), theirs.flatten(0, 1), log_target=True, reduction="batchmean")
        loss.backward()
        return loss.item()

    def distill() -> float:
        if split.recompute:
            student.activation_checkpointing_enable()
        loss = accumulate(pair, ids, split.rows)
        if split.recompute:
            student.activation_checkpointing_disable()
        return loss

    return {"plain": plain, "chunked": lambda: accumulate(pair, ids, rows), "distill": distill}


def accumulate(pair: Pair, ids: Tensor, at_once: int) -> float:
    """The step of `ids` `[batch, seq]`, `at_once` rows at a time."""
    count, total = ids[:, 1:].numel(), 0.0
    for part in ids.split(at_once):
        labels = F.pad(part[:, 1:], (0, 1), value=-100)
        loss = pair(part, labels, num_items_in_batch=count)["loss"]
        loss.backward()
        total += loss.item()
    return total


def status(field: str) -> float:
    """A field of /proc/self/status in MiB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return round(int(line.split()[1]) * 1024 / MIB)


def ratios(rows: list[dict], field: str) -> list[float]:
    """How many times more `plain` needs than `distill`, for each layout."""
    found = {(row["layout"], row["arm"]): row[field] for row in rows}
    return [round(found[layout, "plain"] / found[layout, "distill"], 2) for layout in LAYOUTS]


def claim(values: list[float], how: str) -> dict:
    spread = [min(values), max(values)]
    return {"value": values[0], "spread": spread, "seeds": [SEED], "paper": None, "unit": "x", "how": how}


def record(rows: list[dict], rounds: int) -> dict:
    what = "plain step over that of distill(), SmolLM2-135M, 2,048 tokens as 8 x 256; spread: also as 1 x 2048"
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    return {
        "command": f"python benchmarks/speed/kd_memory.py --rounds {rounds}",
        "commit": commit.stdout.strip(),
        "versions": {name: version(name) for name in ("nestling", "torch", "transformers")},
        "seeds": [SEED],
        "rows": rows,
        "claims": {
            "kd_peak_memory_ratio": claim(
                ratios(rows, "step_mib"), f"peak memory above both models in memory, forward and backward: {what}"
            ),
            "kd_process_memory_ratio": claim(
                ratios(rows, "process_mib"), f"peak of the whole process, weights and libraries included: {what}"
            ),
            "kd_speed_ratio": claim(ratios(rows, "seconds"), f"median time of forward and backward: {what}"),
        },
    }


def show(rows: list[dict]) -> None:
    table = Table("batch", "step", "peak of step, MiB", "peak of process, MiB", "seconds", "loss", "gradient norm")
    for row in rows:
        memory = (f"{row['step_mib']:,.0f}", f"{row['process_mib']:,.0f}")
        values = (f"{row['seconds']:.1f}", f"{row['loss']:.6f}", f"{row['grad_norm']:.5f}")
        table.add_row(row["layout"], row["arm"], *memory, *values)
    Console().print(table)


if __name__ == "__main__":
    main()
