"""The model that every arm of `quality` starts from: a small Llama that has learned text and to recall.

4 layers, 4 heads of 32 channels, context 512, 1.0 million parameters, trained on the rows of `corpus`. Kept under
`runs/`, with checkpoints, so an interrupted training goes on.

    python -m benchmarks.dmc.parent [--tokens N] [--work DIR]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from benchmarks.dmc.corpus import CONTEXT, END, VOCAB, training
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from nestling.train import CausalLM, TrainSettings, fit

TOKENS = 3_000_000
HEADS, LAYERS, DIM = 4, 4, 32
HOW = {"batch_size": 4, "micro_batch_size": 4, "gradient_checkpointing": False, "log_every": 20, "weight_decay": 0.01}


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
        settings = TrainSettings(tokens=tokens, learning_rate=3e-3, save_every=100, **HOW)
        fit(CausalLM(model), rows(tokens, 0), None, settings, run_dir=folder)
        model.save_pretrained(folder)
    return folder


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


def rows(tokens: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """Batches of training rows."""
    ids, labels = training(-(-tokens // CONTEXT), seed)
    size = HOW["batch_size"]
    return [{"input_ids": a, "labels": b} for a, b in zip(ids.split(size), labels.split(size), strict=True)]


if __name__ == "__main__":
    main()
