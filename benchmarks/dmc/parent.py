"""The model that every arm of `quality` starts from: a small Llama that has learned text and to recall.

4 layers, 4 heads of 32 channels, context 512, 1.0 million parameters, trained on the rows of `corpus`: first on short
drills, until it recalls, then on rows of text with facts. Kept under `runs/`, with checkpoints, so an interrupted
training goes on.

    python -m benchmarks.dmc.parent [--tokens N] [--work DIR]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks.dmc.corpus import CONTEXT, END, NEAR, VOCAB, near, training
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, set_seed

from nestling.train import CausalLM, TrainSettings, fit

TOKENS = 2_000_000
FIRST = 600_000  # tokens of short drills before them
HEADS, LAYERS, DIM = 4, 4, 32
SHORT = 32  # rows of a batch of short drills
HOW: dict[str, Any] = {
    "batch_size": 4,
    "micro_batch_size": 4,
    "gradient_checkpointing": False,
    "log_every": 20,
    "save_every": 100,
    "weight_decay": 0.01,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--work", type=Path, default=Path("runs/dmc-quality"))
    chosen = parser.parse_args()
    print(parent(chosen.work, chosen.tokens))


def parent(work: Path, tokens: int) -> Path:
    """The folder of the parent, trained if it is not there."""
    folder = work / f"parent-{tokens}"
    if not (folder / "config.json").exists():
        set_seed(0)
        model = LlamaForCausalLM(config())
        learn(model, batches(*near(FIRST // NEAR, 0), SHORT), folder / "near", tokens=FIRST)
        learn(model, rows(tokens, 0), folder, tokens=tokens)
        model.save_pretrained(folder)
    return folder


def learn(model: PreTrainedModel, data: list[dict[str, Tensor]], folder: Path, **how: Any) -> None:
    """Train in place on batches that are all of one size."""
    size = len(data[0]["input_ids"])
    settings = HOW | {"learning_rate": 3e-3, "batch_size": size, "micro_batch_size": size} | how
    fit(CausalLM(model), data, None, TrainSettings(**settings), run_dir=folder)


def config() -> LlamaConfig:
    """Of the parent."""
    return LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=DIM * HEADS,
        head_dim=DIM,
        intermediate_size=3 * DIM * HEADS,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=END,
        pad_token_id=END,
    )


def rows(tokens: int, seed: int) -> list[dict[str, Tensor]]:
    """Batches of training rows."""
    return batches(*training(-(-tokens // CONTEXT), seed), HOW["batch_size"])


def batches(ids: Tensor, labels: Tensor, size: int) -> list[dict[str, Tensor]]:
    """Of `size` rows each."""
    return [{"input_ids": a, "labels": b} for a, b in zip(ids.split(size), labels.split(size), strict=True)]


if __name__ == "__main__":
    main()
