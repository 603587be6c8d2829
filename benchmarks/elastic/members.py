"""What members cost: memory of a family, speed of a member beside its extracted checkpoint, time of a training step.

SmolLM2-135M is the parent, in float32; 0.75x and 0.5x members have uniformly scaled shapes, since nothing here depends
on how good they are. Memory is resident size in a fresh process, less what it was before the model was loaded.
Decoding is timed in turns by `nestling.evaluate.speed`. A step is the loss on 256 tokens, its gradients and the fused
AdamW that training uses over the whole parent, with a frozen teacher's forward pass and without: processor time of one
thread, in turns. Linux only.

    python benchmarks/elastic/members.py [--rounds 3]
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import PreTrainedModel

from nestling import Family, evaluate, hub
from nestling.anatomy import Anatomy
from nestling.elastic import ElasticLearner, ElasticSettings, Entry
from nestling.elastic.controls import uniform
from nestling.elastic.member import Blocks, Member
from nestling.elastic.train import make_plan

RESULT = Path(__file__).parents[1] / "results/elastic/members.json"
MODEL = "builtin:smollm2-135m-instruct"
BUDGETS = ("0.75x", "0.5x")
TOKENS = 256
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
    """Speeds of every member beside its extracted checkpoint, in turns; `packed`: the member without gaps in memory."""
    rows = {}
    for name in BUDGETS:
        arms = {"member": family[name], "packed": packed(family, name), "extracted": family.extract(name)}
        found = evaluate.speed(arms, prompt_tokens=32, new_tokens=24)
        rows[name] = {arm: vars(value) for arm, value in found.items()}
    return rows


def packed(family: Family, name: str) -> PreTrainedModel:
    """A member whose windows are copied out of the parent: the same modules and calls, rows without gaps."""
    model, copies = Member(family.parent, family.selection(name)).model, {}
    for module in model.modules():
        if isinstance(module, Blocks):
            module.blocks = [[nn.Parameter(block.detach().clone()) for block in row] for row in module.blocks]
        for attribute, window in module._parameters.items():
            if window is not None:
                copies.setdefault(window, nn.Parameter(window.detach().clone(), requires_grad=False))
                module._parameters[attribute] = copies[window]
    return model


def steps(family: Family, rounds: int) -> list[dict[str, Any]]:
    """Seconds of a training step of each member, with a teacher and without, in turns."""
    generator = torch.Generator().manual_seed(SEED)
    ids = torch.randint(3, 40000, (1, TOKENS), generator=generator)
    anatomy = family.anatomy
    seconds: dict[tuple[str, str], list[float]] = {}
    for teacher in ("frozen", "none"):
        settings = ElasticSettings(teacher=teacher)
        plan = make_plan(anatomy, family.order, BUDGETS, settings)
        shapes = [plan.space.sizes_of(family.entry(name).shape) for name in BUDGETS]
        taught = hub.load(MODEL, dtype="float32")[0] if teacher == "frozen" else None
        parent = family.parent.requires_grad_(True)
        learner = ElasticLearner(parent, taught, plan, settings, shapes)
        optimizer = torch.optim.AdamW(learner.parameters(), lr=1e-6, fused=True)  # as `transformers.Trainer` does
        for turn in range(rounds + 1):
            for number, name in ((-1, "1x"), (1, "0.5x"), (0, "0.75x")):
                started = time.process_time()
                learner.drawn = [number]
                learner(ids, ids.roll(-1))["loss"].backward()
                optimizer.step()
                optimizer.zero_grad()
                if turn:
                    seconds.setdefault((teacher, name), []).append(time.process_time() - started)
    return [
        {
            "teacher": teacher,
            "member": name,
            "seconds": times,
            "to_full": median(times) / median(seconds[teacher, "1x"]),
        }
        for (teacher, name), times in seconds.items()
    ]


def show(rows: dict[str, Any]) -> None:
    table = Table("what", "member", "value", title="members of SmolLM2-135M")
    seen = rows["memory"]
    table.add_row("resident, family over parent", "all", f"{seen['family_bytes'] / seen['parent_bytes']:.4f}")
    for name, arms in rows["decoding"].items():
        for arm in ("member", "packed"):
            table.add_row(f"decoding, {arm} over extracted", name, f"{_ratio(arms, arm):.3f}")
    for row in rows["steps"]:
        took = f"{median(row['seconds']):.2f} s, {row['to_full']:.3f}"
        table.add_row(f"step, teacher {row['teacher']}", row["member"], took)
    Console().print(table)


def _ratio(arms: dict[str, Any], arm: str) -> float:
    return arms[arm]["decode_tokens_per_s"] / arms["extracted"]["decode_tokens_per_s"]


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
            "half_member_step_time_ratio": _steps_claim(rows["steps"], "frozen", "frozen teacher's forward pass, "),
            "half_member_step_time_ratio_without_teacher": _steps_claim(rows["steps"], "none", ""),
        },
    }


def _steps_claim(rows: list[dict[str, Any]], teacher: str, also: str) -> dict[str, Any]:
    seconds = {row["member"]: row["seconds"] for row in rows if row["teacher"] == teacher}
    ratios = [half / full for half, full in zip(seconds["0.5x"], seconds["1x"], strict=True)]
    return {
        "value": median(seconds["0.5x"]) / median(seconds["1x"]),
        "spread": [min(ratios), max(ratios)],
        "paper": None,
        "seeds": [SEED],
        "unit": "x of the full step",
        "how": f"step of the 0.5x member over the parent's, {TOKENS} tokens: {also}loss, gradients and AdamW over the "
        "whole parent in both; processor time of one thread",
    }


def _commit() -> str:
    return subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    main()
