"""A small elastic run in a process of its own, to be spread over several.

python -m tests.elastic.worker RUN_DIR OUT
"""

import argparse
import json
import os
from pathlib import Path

import torch
from safetensors.torch import save_file

from nestling.elastic import Family, train
from tests.models import random_ranking, tiny, token_batches

STEPS = 6


def run(run_dir: str | None, **overrides) -> Family:
    """Three steps under soft masks and three on slices, of two members drawn for each."""
    model = tiny("llama-tied", hidden_size=36, intermediate_size=40, num_hidden_layers=3)
    settings = {
        "steps": STEPS,
        "batch_size": 4,
        "save_every": 2,
        "routing": 0.5,
        "members_per_step": 2,
        "weights": [1, 2, 3],
        "per_layer": "intermediate_size",
        "learning_rate": 1e-3,
    }
    data, ranking = token_batches(6, 4, 11), random_ranking(model)
    return train(model, ["0.75x", "0.5x"], data, run_dir=run_dir, ranking=ranking, **(settings | overrides))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run_dir")
    parser.add_argument("out")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    family = run(chosen.run_dir)
    if int(os.environ.get("RANK", "0")) == 0:
        save_file({name: p.detach().contiguous() for name, p in family.parent.named_parameters()}, Path(chosen.out))
        shapes = {name: entry.shape.to_dict() for name, entry in family.entries.items()}
        Path(chosen.out).with_suffix(".json").write_text(json.dumps(shapes))


if __name__ == "__main__":
    main()
