"""What the benchmarks of hybrids share: the trained parent of a seed, held-out loss, short distillation, the record."""

from __future__ import annotations

import copy
import json
import shlex
import statistics
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nestling import data, hub
from nestling.distill import distill
from nestling.pretrain import PretrainSettings
from nestling.recipes.pretrain import PretrainVerb, pretrain_model
from nestling.search import token_loss

ARCHITECTURE = Path(__file__).parent / "parent.yaml"
RESULTS = Path(__file__).parents[1] / "results/hybrid"
TEXT = "builtin:stdlib"
CONTEXT = 128
PARENT_TOKENS = 450_000


def parent(seed: int, work: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The hybrid that is cut, trained here first unless `work` holds it."""
    folder = work / f"parent-{seed}"
    if not (folder / "model").exists():
        training = PretrainSettings(
            tokens=PARENT_TOKENS,
            context=CONTEXT,
            batch_size=8,
            micro_batch_size=8,
            learning_rate=4e-3,
            log_every=10,
            seed=seed,
        )
        pretrain_model(
            PretrainVerb(
                str(ARCHITECTURE),
                data=TEXT,
                out=str(folder),
                vocab_size=512,
                evaluation_tokens=16384,
                train=training,
            )
        )
    model, tokenizer = hub.load(folder / "model")
    assert tokenizer is not None, "a pretrained model has its tokenizer"
    return model.requires_grad_(False), tokenizer


class Ground:
    """Text that a parent's children are ranked, judged and distilled on; judged on the validation part alone."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, seed: int, held_out: int = 16384, kd_tokens: int = 60_000):
        rows = {"context": CONTEXT, "seed": seed}
        self.calibration = data.batches(TEXT, tokenizer, tokens=16384, **rows)
        self.loss = token_loss(data.batches(TEXT, tokenizer, tokens=held_out, split="validation", **rows))
        self._training = data.batches(TEXT, tokenizer, tokens=kd_tokens, **(rows | {"seed": seed + 100}))
        self._seed = seed

    def distilled(self, child: PreTrainedModel, teacher: PreTrainedModel, tokens: int | None = None) -> float:
        """Held-out loss of a copy of the child after a short distillation, on all of the text unless given."""
        student = copy.deepcopy(child)
        tokens = tokens or sum(batch["input_ids"].numel() for batch in self._training)
        settings = {"batch_size": 8, "micro_batch_size": 8, "learning_rate": 1e-3, "seed": self._seed}
        distill(student, teacher, self._training, tokens=tokens, **settings)
        return self.loss(student)


def permuted(mixer: Any, heads: list[int]) -> None:
    """Put the heads of a Mamba-2 mixer in this order in every tensor, groups disregarded; B and C stay in place."""
    p, inner = mixer.head_dim, mixer.intermediate_size
    shared = list(range(2 * mixer.n_groups * mixer.ssm_state_size))
    rows = [head * p + channel for head in heads for channel in range(p)]
    conv = rows + [inner + i for i in shared]
    projected = rows + [inner + i for i in conv] + [2 * inner + len(shared) + head for head in heads]
    for tensor, index in (
        (mixer.in_proj.weight, projected),
        (mixer.conv1d.weight, conv),
        (mixer.conv1d.bias, conv),
        (mixer.A_log, heads),
        (mixer.D, heads),
        (mixer.dt_bias, heads),
        (mixer.norm.weight, rows),
    ):
        _in_place(tensor, tensor.detach()[index])
    _in_place(mixer.out_proj.weight, mixer.out_proj.weight.detach()[:, rows])


def _in_place(tensor: Tensor, values: Tensor) -> None:
    tensor.detach().copy_(values.clone())


def claim(values: list[float], seeds: list[int], how: str, unit: str, paper: float | None = None) -> dict[str, Any]:
    """A claim over seeds: their mean and range."""
    return {
        "value": round(statistics.mean(values), 4),
        "spread": [round(min(values), 4), round(max(values), 4)],
        "seeds": seeds,
        "paper": paper,
        "unit": unit,
        "how": how,
    }


def write(name: str, rows: Any, claims: dict[str, Any], seeds: list[int]) -> Path:
    """Record a benchmark under `benchmarks/results/hybrid/`."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    record = {
        "command": shlex.join(["python", "benchmarks/hybrid/" + Path(sys.argv[0]).name, *_options(sys.argv[1:])]),
        "commit": commit.stdout.strip(),
        "versions": {package: version(package) for package in ("nestling", "torch", "transformers")},
        "seeds": seeds,
        "rows": rows,
        "claims": claims,
    }
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path


def _options(arguments: list[str]) -> list[str]:
    """The command's options without the folder that this machine keeps parents in."""
    return [part for i, part in enumerate(arguments) if part != "--work" and arguments[i - 1 : i] != ["--work"]]
