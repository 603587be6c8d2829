"""A small distillation run in a process of its own, to be killed, interrupted or spread over several processes.

python -m tests.distill.worker RUN_DIR OUT [--die-in-step N | --die-in-save N | --interrupt-in-step N]
"""

import argparse
import os
import signal
from pathlib import Path

import torch
from safetensors.torch import save_file

from nestling.distill import distill
from nestling.train import trainer as trainer_module
from tests.models import tiny, token_batches

STEPS, SAVE_EVERY = 7, 3


def models():
    """A narrower student with dropout (so that random state counts) and its teacher, float64."""
    student = tiny("llama-tied", seed=1, hidden_size=36, num_hidden_layers=3, attention_dropout=0.1)
    return student, tiny("llama-tied", seed=0)


def run(run_dir: str | None, batch_size: int = 4, **overrides):
    """Seven steps over five batches, so that the data is passed over more than once."""
    student, teacher = models()
    student.config.attention_dropout = overrides.pop("dropout", 0.1)
    for layer in student.model.layers:
        layer.self_attn.attention_dropout = student.config.attention_dropout
    settings = {"steps": STEPS, "save_every": SAVE_EVERY, "states": ["embedding", "output"], "learning_rate": 1e-2}
    return distill(
        student, teacher, token_batches(5, 4, 11), run_dir=run_dir, batch_size=batch_size, **(settings | overrides)
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run_dir")
    parser.add_argument("out")
    parser.add_argument("--die-in-step", type=int)
    parser.add_argument("--die-in-save", type=int)
    parser.add_argument("--interrupt-in-step", type=int)
    parser.add_argument("--spread", action="store_true")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    if chosen.die_in_step or chosen.interrupt_in_step:
        number = signal.SIGKILL if chosen.die_in_step else signal.SIGINT
        _signal_in_step(chosen.die_in_step or chosen.interrupt_in_step, number)
    if chosen.die_in_save:
        _die_in_save(chosen.die_in_save)
    overrides = {"dropout": 0.0, "states": [], "ce_weight": 0.3} if chosen.spread else {}
    student = run(chosen.run_dir, **overrides)
    if int(os.environ.get("RANK", "0")) == 0:
        save_file({name: p.detach().contiguous() for name, p in student.named_parameters()}, Path(chosen.out))


def _signal_in_step(step: int, number: int) -> None:
    plain, calls = trainer_module.LearnerTrainer.training_step, []

    def training_step(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == step:
            os.kill(os.getpid(), number)
        return plain(self, *args, **kwargs)

    trainer_module.LearnerTrainer.training_step = training_step


def _die_in_save(save: int) -> None:
    """Die in the middle of the n-th checkpoint, between its files."""
    plain, calls = trainer_module.LearnerTrainer._save_rng_state, []

    def save_rng_state(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == save:
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(self, *args, **kwargs)

    trainer_module.LearnerTrainer._save_rng_state = save_rng_state


if __name__ == "__main__":
    main()
