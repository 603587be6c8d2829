"""What the training benchmarks of experts share: small Qwen3 models, one text, one recipe, one command line.

Rows are kept in the benchmark's record as they come (`benchmarks/record.py`), models in the work folder, and what is in
either is not done again. Held-out loss is measured on the validation part of the text, the same tokens for every run.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from benchmarks.record import Record, Row, claim, commit
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from nestling import evaluate, hub
from nestling.anatomy import Anatomy
from nestling.cost import cost
from nestling.data import train_tokenizer
from nestling.hub.load import load_tokenizer
from nestling.moe import MixtureSettings, fresh_scale, health, loads, mixture_config, scale_experts, train
from nestling.pretrain import PretrainSettings, build, pretrain

DATA, VOCAB, CONTEXT, BATCH = "builtin:stdlib", 512, 128, 16
EVALUATION_TOKENS = 65_536
SIZES = {"tiny": (48, 192, 2), "small": (64, 256, 3), "large": (96, 384, 4)}  # hidden size, FFN, layers
RATE = 4e-3


def parser(doc: str | None, arms: Iterable[str], steps: int) -> argparse.ArgumentParser:
    """The options that all of them have."""
    made = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    made.add_argument("--work", type=Path, required=True, help="folder for models")
    made.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    made.add_argument("--steps", type=int, default=steps, help="of 2,048 tokens")
    made.add_argument("--arms", nargs="+", default=list(arms), choices=list(arms), help="only these")
    return made


def gap(record: Record, worse: Row, better: Row, how: str, figure: str = "loss", paper: float | None = None) -> Row:
    """The claim that one arm's figure lies above another's, over the seeds that have both; nothing without such."""
    pairs = [(row, record.find(**better, seed=row["seed"])) for row in record.rows if worse.items() <= row.items()]
    both = [(one, other) for one, other in pairs if other is not None]
    if not both:
        return {}
    return claim([a[figure] - b[figure] for a, b in both], [a["seed"] for a, _ in both], how, "nats", paper)


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
    """Figures of a run, which is done if it is not in the work folder; its model is there as `name`/model.

    One that was interrupted goes on from its last checkpoint. more: settings of the training of a mixture.
    """
    folder = work / name
    if (folder / "record.json").exists():
        return json.loads((folder / "record.json").read_text())
    words, model, at = tokenizer(work), make(), commit()
    before, routed = held_out(model, words), bool(Anatomy.of(model).routed_layers())
    chosen = options(steps, seed, rate) | {"save_every": 100}
    if routed:
        train(model, DATA, words, MixtureSettings(**chosen, **more), folder)
    else:
        pretrain(model, DATA, words, PretrainSettings(**chosen), folder)
    found = cost(model, context=CONTEXT)
    record = {
        "commit": at,
        "run": name,
        "updates": steps,
        "tokens": steps * BATCH * CONTEXT,
        "loss_before": before,
        "loss": held_out(model, words),
        "curve": curve(folder),
        "params": found.params,
        "active_params": found.active_params,
        "flops_per_token": found.flops_per_token,
        "training_seconds": round(logged(folder)[-1]["elapsed_s"], 1),
    }
    if routed:
        record |= {name: round(value, 3) for name, value in health(loads(model, texts(words))).items()}
    hub.save(model, folder / "model", words, overwrite=True)
    (folder / "record.json").write_text(json.dumps(record))
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
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
    losses = [record["ce"] for record in logged(folder) if "ce" in record]
    groups = [losses[i : i + window] for i in range(0, len(losses), window)]
    return [round(sum(group) / len(group), 4) for group in groups]


def logged(folder: Path) -> list[dict[str, float]]:
    """What a training wrote down step by step."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
