"""One axis at a time: what cutting it to three quarters and to half costs in loss, and what it saves in time.

Times are of a hybrid of 28 M parameters with random weights (`speed.py`), forward and decoding, all cuts in one
process, interleaved; losses are those that `pruning.py` recorded for the same parts of the same axes of a trained
parent of 1 M, over that parent's. Layers are the first ones, which hold every kind in the parent's proportion.

    python -m benchmarks.hybrid.axes [--rounds 5] [--prompt 256]
"""

from __future__ import annotations

import argparse

import torch
from benchmarks.hybrid.pruning import DEPTH, HALF, QUARTER
from benchmarks.hybrid.speed import PARENT
from benchmarks.record import Record, Row, claim, show
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, set_seed

from nestling.anatomy import Anatomy
from nestling.evaluate import Speed, speed
from nestling.surgery import prune
from nestling.surgery.choose import prefix_ranking

NEW = 16
PARTS = {"3/4": QUARTER, "1/2": HALF}
PAPER = {"mamba_num_heads": 1.18, "mamba_head_dim": 1.15}  # Minitron-SSM, figure 7, throughput at half


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=256, help="tokens of the forward pass, before those decoded")
    chosen, record = parser.parse_args(), Record("hybrid", "axes")
    set_seed(0)
    models = built()
    taken = speed(models, prompt_tokens=chosen.prompt, new_tokens=NEW, rounds=chosen.rounds)
    record.rows = [
        row(name, part, models, taken) for name, part in (key.split(" ") for key in models if key != "whole")
    ]
    record.save(claims(record.rows, chosen.prompt), seeds=[0])
    show(record.rows, ("axis", "part"), ("params", "forward_speedup", "decode_speedup", "loss_increase"))


def built() -> dict[str, PreTrainedModel]:
    """The parent and every cut of one axis, by `axis part`."""
    parent = AutoModelForCausalLM.from_config(AutoConfig.for_model("nemotron_h", **PARENT)).eval()
    anatomy = Anatomy.of(parent)
    ranking = prefix_ranking(anatomy, -torch.arange(anatomy.num_layers).float())
    models = {"whole": parent}
    for part, share in (("3/4", 0.75), ("1/2", 0.5)):
        for field in HALF:
            whole = anatomy.num_layers if field == DEPTH else anatomy.value(anatomy.axis(field), 0)
            models[f"{field} {part}"] = prune(parent, ranking, {field: round(share * whole)})
    return models


def row(field: str, part: str, models: dict[str, PreTrainedModel], taken: dict[str, Speed]) -> Row:
    """A cut's speed over the parent's, and the loss that the same part costs where it was measured."""
    mine, whole = taken[f"{field} {part}"], taken["whole"]
    found = {
        "axis": field,
        "part": part,
        "params": round(models[f"{field} {part}"].num_parameters() / models["whole"].num_parameters(), 3),
        "forward_speedup": round(mine.prefill_tokens_per_s / whole.prefill_tokens_per_s, 3),
        "decode_speedup": round(mine.decode_tokens_per_s / whole.decode_tokens_per_s, 3),
    }
    return found | loss_increase(field, PARTS[part][field])


def loss_increase(field: str, value: int) -> Row:
    """Held-out loss over the parent's, mean over seeds; nothing where `pruning` has not been run."""
    recorded = {row["what"]: row["loss"] for row in Record("hybrid", "pruning").rows if row["table"] != "rank order"}
    name = f"{field} {value}"
    return {"loss_increase": round(recorded[name] - recorded["parent"], 4)} if name in recorded else {}


def claims(rows: list[Row], prompt: int) -> dict[str, Row]:
    made = {}
    for row in rows:
        if row["part"] == "1/2":
            how = f"{prompt} tokens through a hybrid of 28 M parameters with half of {row['axis']}, over the whole one"
            paper = PAPER.get(row["axis"])
            made[f"forward_speedup_half_{row['axis']}"] = claim([row["forward_speedup"]], [0], how, "x", paper)
    return made


if __name__ == "__main__":
    main()
