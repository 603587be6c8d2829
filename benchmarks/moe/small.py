"""What the training benchmarks of experts share: small Qwen3 models, one text, one recipe, results kept run by run.

A run that is in the work folder is not done again, so a benchmark can be interrupted and spread over several sittings.
Held-out loss is measured on the validation part of the text, the same tokens for every run.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from nestling import evaluate, hub
from nestling.cost import cost
from nestling.data import train_tokenizer
from nestling.hub.load import load_tokenizer
from nestling.moe import MixtureSettings, fresh_scale, health, loads, mixture_config, scale_experts, train
from nestling.pretrain import PretrainSettings, build, pretrain

RESULTS = Path(__file__).parents[1] / "results/moe"
DATA, VOCAB, CONTEXT, BATCH = "builtin:stdlib", 512, 128, 16
EVALUATION_TOKENS = 65_536
SIZES = {"small": (64, 256, 3), "large": (96, 384, 4)}  # hidden size, FFN, layers


def dense_config(size: str) -> Any:
    hidden, width, layers = SIZES[size]
    return AutoConfig.for_model(
        "qwen3",
        hidden_size=hidden,
        intermediate_size=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=hidden // 4,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )


def tokenizer(work: Path) -> PreTrainedTokenizerBase:
    folder = work / "tokenizer"
    if not folder.exists():
        train_tokenizer(DATA, VOCAB, seed=0).save_pretrained(folder)
    found = load_tokenizer(folder)
    assert found is not None
    return found


def options(steps: int, seed: int, rate: float) -> dict[str, Any]:
    shared = {"batch_size": BATCH, "micro_batch_size": BATCH, "context": CONTEXT, "gradient_checkpointing": False}
    return shared | {"steps": steps, "seed": seed, "learning_rate": rate, "save_every": 0}


def fresh(work: Path, size: str, seed: int, mixture: tuple[int, int, int, bool] | None) -> PreTrainedModel:
    """Fresh weights, as `nestling moe train` makes them.

    mixture: experts and those of a token at granularity 1, granularity, normalized over the chosen; None: dense.
    """
    if mixture is None:
        return build(dense_config(size), tokenizer(work), seed)
    model = build(mixture_config(dense_config(size), *mixture), tokenizer(work), seed)
    scale_experts(model, fresh_scale(*mixture))
    return model


def trained(
    work: Path, name: str, make: Callable[[], PreTrainedModel], steps: int, seed: int, rate: float, **more: Any
) -> dict:
    """The record of a run, which is done if it is not in the work folder; its model is there as `name`/model.

    more: settings of the training of a mixture.
    """
    folder = work / name
    if (folder / "record.json").exists():
        return json.loads((folder / "record.json").read_text())
    words, model = tokenizer(work), make()
    before, started = held_out(model, words), time.perf_counter()
    chosen, routed = options(steps, seed, rate), hasattr(model.config, "num_experts")
    if routed:
        train(model, DATA, words, MixtureSettings(**chosen, **more), folder)
    else:
        pretrain(model, DATA, words, PretrainSettings(**chosen), folder)
    found = cost(model, context=CONTEXT)
    record = {
        "run": name,
        "seed": seed,
        "steps": steps,
        "tokens": steps * BATCH * CONTEXT,
        "loss_before": before,
        "loss": held_out(model, words),
        "curve": curve(folder),
        "params": found.params,
        "active_params": found.active_params,
        "flops_per_token": found.flops_per_token,
        "seconds": round(time.perf_counter() - started, 1),
    }
    if routed:
        record |= {name: round(value, 3) for name, value in health(loads(model, texts(words))).items()}
    hub.save(model, folder / "model", words, overwrite=True)
    (folder / "record.json").write_text(json.dumps(record))
    return record


def held_out(model: PreTrainedModel, words: PreTrainedTokenizerBase) -> float:
    """Nats per token of the validation part."""
    return evaluate.perplexity(model, words, DATA, context=CONTEXT, tokens=EVALUATION_TOKENS).loss


def texts(words: PreTrainedTokenizerBase, rows: int = 64) -> list[dict[str, torch.Tensor]]:
    """Calibration batches of training text."""
    from nestling.data import packed

    kept = packed(DATA, words, context=CONTEXT, tokens=rows * CONTEXT, seed=7)
    ids = torch.stack([torch.as_tensor(kept[i]["input_ids"]) for i in range(min(rows, len(kept)))])
    return [{"input_ids": part} for part in ids.split(16)]


def curve(folder: Path, window: int = 20) -> list[float]:
    """Training cross-entropy, averaged over windows of steps."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    losses = [record["ce"] for record in map(json.loads, lines) if "ce" in record]
    groups = [losses[i : i + window] for i in range(0, len(losses), window)]
    return [round(sum(group) / len(group), 4) for group in groups]


def write(name: str, rows: Sequence[dict], claims: dict[str, dict], seeds: Sequence[int]) -> None:
    """The benchmark's result file."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    RESULTS.mkdir(parents=True, exist_ok=True)
    record = {
        "command": f"python benchmarks/moe/{name}.py {' '.join(sys.argv[1:])}",
        "commit": commit.stdout.strip(),
        "versions": {package: version(package) for package in ("nestling", "torch", "transformers")},
        "seeds": list(seeds),
        "rows": list(rows),
        "claims": claims,
    }
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")


def claim(
    values: Sequence[float], seeds: Sequence[int], how: str, unit: str = "nats", paper: float | None = None
) -> dict:
    """The mean over seeds and its spread."""
    return {
        "value": round(sum(values) / len(values), 4),
        "spread": [round(min(values), 4), round(max(values), 4)],
        "seeds": list(seeds),
        "paper": paper,
        "unit": unit,
        "how": how,
    }
