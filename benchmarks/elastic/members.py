"""What members cost: memory of a family, speed of a member beside its extracted checkpoint, time of a training step.

SmolLM2-135M is the parent, in float32; 0.75x and 0.5x members have uniformly scaled shapes, since nothing here depends
on how good they are. Memory is resident size in a fresh process, less what it was before the model was loaded.
Decoding is timed in many short turns; a ratio is the median of those of single rounds, and the same checkpoint,
extracted a second time, says what such a ratio is worth. A step is the loss on rows of 256 tokens, its gradients and
the fused AdamW that training uses over the whole parent, with a frozen teacher's forward pass and without: processor
time of one thread, in turns. Its floor is the ratio of the operations in products. Linux only.

    python benchmarks/elastic/members.py [--rounds 3]
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from nestling import Family, evaluate, hub
from nestling.anatomy import Anatomy
from nestling.elastic import ElasticLearner, ElasticSettings, Entry
from nestling.elastic.controls import uniform
from nestling.elastic.train import make_plan

RESULT = Path(__file__).parents[1] / "results/elastic/members.json"
MODEL = "builtin:smollm2-135m-instruct"
BUDGETS = ("0.75x", "0.5x")
ROW = 256  # tokens
STEPS = (256, 1024)  # tokens of a step
PROMPT, NEW, ROUNDS = 16, 8, 24  # tokens and rounds of decoding
SEED = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="timed steps of each kind")
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.memory:
        print(json.dumps(memory(chosen.memory)))
        return
    torch.set_num_threads(1)
    family = made()
    with tempfile.TemporaryDirectory() as folder:
        family.save(f"{folder}/family")
        seen = subprocess.run(
            [sys.executable, __file__, "--memory", f"{folder}/family"], capture_output=True, text=True, check=True
        )
        resident = json.loads(seen.stdout.splitlines()[-1])
    rows = {"memory": resident, "decoding": decoding(family), "steps": steps(family, chosen.rounds)}
    show(rows)
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(record(rows, chosen.rounds), indent=1) + "\n")


def made() -> Family:
    """The family, of weights as they are: sorted or not, prefixes cost the same."""
    parent = hub.load(MODEL, dtype="float32")[0]
    anatomy = Anatomy.of(parent)
    plan = make_plan(anatomy, range(anatomy.num_layers), BUDGETS, ElasticSettings())
    entries = {target.name: Entry(uniform(plan.space, target)) for target in plan.targets}
    return Family(parent, entries, range(anatomy.num_layers))


def memory(folder: str) -> dict[str, Any]:
    """Resident bytes: before the model, with the parent, with every member beside it; each has run once."""
    ids = torch.arange(3, 35)[None]
    torch.nn.Linear(64, 64)(torch.randn(8, 64))
    before = resident_bytes()
    family = Family.load(folder, dtype="float32")
    with torch.no_grad():
        family.parent(input_ids=ids)
        family.parent(input_ids=ids)
        gc.collect()
        parent = resident_bytes()
        for name in family:
            family[name](input_ids=ids)
        gc.collect()
    everything = resident_bytes()
    separate = sum(family.cost(name).weight_bytes for name in family)
    return {
        "parent_bytes": parent - before,
        "family_bytes": everything - before,
        "copied_bytes": sum(member.copied_bytes for member in family._members.values()),
        "separate_bytes": separate,
    }


def resident_bytes() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


def decoding(family: Family) -> dict[str, Any]:
    """Tokens per second, round by round, of every member and of its extracted checkpoint, which is there twice."""
    rows = {}
    for name in BUDGETS:
        arms = {"member": family[name], "extracted": family.extract(name), "extracted again": family.extract(name)}
        rows[name] = {arm: [] for arm in arms}
        for turn in range(ROUNDS):
            order = random.Random(turn).sample(list(arms), len(arms))
            models = {arm: arms[arm] for arm in order}
            found = evaluate.speed(models, prompt_tokens=PROMPT, new_tokens=NEW, rounds=1, warmup=int(turn == 0))
            for arm, value in found.items():
                rows[name][arm].append(value.decode_tokens_per_s)
    return rows


def steps(family: Family, rounds: int) -> list[dict[str, Any]]:
    """Seconds of a training step of the parent and of the half member, in turns, and operations in its products."""
    rows = []
    for tokens in STEPS:
        for teacher in ("frozen", "none"):
            kinds = {"1x": -1, "0.5x": BUDGETS.index("0.5x")}
            step = _step(family, teacher, tokens)
            seconds, operations = {name: [] for name in kinds}, {}
            for turn in range(1 + (rounds if tokens == ROW else (rounds + 1) // 2)):
                for name, number in kinds.items():
                    with Counted() if turn == 0 else nullcontext() as counted:
                        took = step(number)
                    if counted is None:
                        seconds[name].append(took)
                    else:
                        operations[name] = counted.operations
            rows += [
                {"tokens": tokens, "teacher": teacher, "member": name, "seconds": seconds[name], "operations": n}
                for name, n in operations.items()
            ]
    return rows


class Counted(TorchDispatchMode):
    """Counts the operations of products of matrices while it is open.

    torch's own counter follows modules too, which does not go with a loss that differentiates as it goes.
    """

    operations = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function._overloadpacket in flop_registry:
            self.operations += flop_registry[function._overloadpacket](*args, **(kwargs or {}), out_val=result)
        return result


def _step(family: Family, teacher: str, tokens: int) -> Callable[[int], float]:
    """A function that takes a step with a member, -1 for the parent, and returns its seconds."""
    generator = torch.Generator().manual_seed(SEED)
    ids = torch.randint(3, 40000, (tokens // ROW, ROW), generator=generator)
    settings = ElasticSettings(teacher=teacher)
    plan = make_plan(family.anatomy, family.order, BUDGETS, settings)
    shapes = [plan.space.sizes_of(family.entry(name).shape) for name in BUDGETS]
    taught = hub.load(MODEL, dtype="float32")[0] if teacher == "frozen" else None
    learner = ElasticLearner(family.parent.requires_grad_(True), taught, plan, settings, shapes)
    optimizer = torch.optim.AdamW(learner.parameters(), lr=1e-6, fused=True)  # as `transformers.Trainer` does

    def step(number: int) -> float:
        started = time.process_time()
        learner.drawn = [number]
        learner(ids, ids.roll(-1, -1))["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.process_time() - started

    return step


def show(rows: dict[str, Any]) -> None:
    table = Table("what", "member", "value", title="members of SmolLM2-135M")
    seen = rows["memory"]
    table.add_row("resident, family over parent", "all", f"{seen['family_bytes'] / seen['parent_bytes']:.4f}")
    for name, arms in rows["decoding"].items():
        for arm in ("member", "extracted again"):
            table.add_row(f"decoding, {arm} over extracted", name, _written(_ratios(arms[arm], arms["extracted"])))
    for tokens, teacher, half, full in _pairs(rows["steps"]):
        floor = half["operations"] / full["operations"]
        took = f"{median(half['seconds']):.2f} of {median(full['seconds']):.2f} s, "
        ratio = _written(_ratios(half["seconds"], full["seconds"]))
        table.add_row(f"step, {tokens} tokens, teacher {teacher}", "0.5x", f"{took}{ratio}, floor {floor:.3f}")
    Console().print(table)


def _ratios(values: list[float], others: list[float]) -> list[float]:
    """What one is of the other in every round."""
    return [value / other for value, other in zip(values, others, strict=True)]


def _written(ratios: list[float]) -> str:
    return f"{median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"


def _pairs(rows: list[dict[str, Any]]) -> Iterator[tuple[int, str, dict[str, Any], dict[str, Any]]]:
    """Tokens, teacher, and the steps of the half member and of the parent."""
    found = {(row["tokens"], row["teacher"], row["member"]): row for row in rows}
    for (tokens, teacher, member), row in found.items():
        if member == "0.5x":
            yield tokens, teacher, row, found[tokens, teacher, "1x"]


def record(rows: dict[str, Any], rounds: int) -> dict[str, Any]:
    seen = rows["memory"]
    return {
        "command": f"python benchmarks/elastic/members.py --rounds {rounds}",
        "commit": _commit(),
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "seeds": [SEED],
        "rows": rows,
        "claims": {
            "resident_memory_ratio": {
                "value": seen["family_bytes"] / seen["parent_bytes"],
                "paper": 1.02,
                "seeds": [SEED],
                "unit": "x of the parent",
                "how": "resident size of parent, 0.75x and 0.5x in one process over the parent alone, each less "
                "the process before the model; the paper allows 2 % for routers, and reports storage, not residence",
            },
            **{f"member_decoding_ratio_{name}": _decoding(arms) for name, arms in rows["decoding"].items()},
            **{
                f"half_member_step_time_ratio_{tokens}_tokens_teacher_{teacher}": _claim(
                    _ratios(half["seconds"], full["seconds"]),
                    "x of the full step",
                    f"step of the 0.5x member over the parent's, {tokens} tokens, teacher {teacher}: loss, gradients "
                    f"and AdamW over the whole parent in both, processor time of one thread; by the operations of its "
                    f"products alone {half['operations'] / full['operations']:.3f}",
                )
                for tokens, teacher, half, full in _pairs(rows["steps"])
            },
        },
    }


def _decoding(arms: dict[str, list[float]]) -> dict[str, Any]:
    again = _written(_ratios(arms["extracted again"], arms["extracted"]))
    return _claim(
        _ratios(arms["member"], arms["extracted"]),
        "x of the extracted checkpoint's speed",
        f"tokens per second of a member on the parent's storage over those of its extracted checkpoint, median of "
        f"{len(arms['member'])} rounds of {NEW} tokens; the checkpoint extracted a second time: {again}",
    )


def _claim(ratios: list[float], unit: str, how: str) -> dict[str, Any]:
    spread = [min(ratios), max(ratios)]
    return {"value": median(ratios), "spread": spread, "paper": None, "seeds": [SEED], "unit": unit, "how": how}


def _commit() -> str:
    return subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    main()
