"""Loss and far recall at equal memory: a compressed cache against more training, fewer heads and eviction.

A small Llama (4 layers, 4 heads of 32 channels, context 512) learns bytes of the standard library with pairs strewn in
that must be recalled from up to 500 tokens back (see `corpus`). Then every arm gets the same tokens: `vanilla+` goes on
as it is, `dmc` learns to merge at the ratio, `shared` decides once per layer, `gqa` starts from pooled heads. Eviction
(H2O, TOVA, StreamingLLM) is applied to `vanilla+`, which costs it nothing in training. All are scored on held-out rows,
`dmc` with the decisions of decoding.

    python -m benchmarks.dmc.quality [--seeds 0 1] [--parent-tokens N] [--tokens N] [--work DIR] [--only ARM]

Models are kept in `--work`, so arms can be run one by one; without `--only` those that are missing are run, and the
result is written.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from importlib.metadata import version
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F
from benchmarks.dmc.baselines import POLICIES, evicting, pooled
from benchmarks.dmc.corpus import CONTEXT, END, KEYS, VOCAB, rows
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel, set_seed

from nestling import dmc
from nestling.train import CausalLM, TrainSettings, fit

RESULT = Path(__file__).parents[1] / "results/dmc/quality.json"
RATIO = 4
HEADS, LAYERS = 4, 4
ARMS = ("vanilla+", "dmc", "gqa")
ROWS = 96  # of held-out text
LEARNT = 0.2  # recall of vanilla+ below which recall says nothing: it has not been learnt
HOW = {"batch_size": 4, "micro_batch_size": 4, "gradient_checkpointing": False, "save_every": 0, "warmup": 0.05}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--parent-tokens", type=int, default=2_500_000)
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[1_000_000], help="of each arm; several show the trend"
    )
    parser.add_argument("--ratios", type=int, nargs="+", default=[RATIO])
    parser.add_argument("--work", type=Path, default=Path("runs/dmc-quality"))
    parser.add_argument("--only", help="make this arm (or `parent`) and stop")
    chosen = parser.parse_args()
    parent = kept(chosen.work / f"parent-{chosen.parent_tokens}", lambda: train_parent(chosen.parent_tokens))
    found: list[dict[str, Any]] = []
    for tokens in chosen.tokens if chosen.only != "parent" else ():
        for seed in chosen.seeds:
            found += run(parent, tokens, seed, chosen)
    if chosen.only:
        return
    found.append({"arm": "parent", "ratio": 1.0, "seed": 0, "tokens": chosen.parent_tokens} | score(parent))
    show(found)
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(record(found, chosen), indent=1) + "\n")


def run(parent: Path, tokens: int, seed: int, chosen: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of all arms of one seed; arms whose model is there are only scored."""
    found = []
    for arm in ARMS:
        for ratio in (1,) if arm == "vanilla+" else chosen.ratios:
            if chosen.only in (None, arm):
                name = f"{arm}-{ratio}-{tokens}-{chosen.parent_tokens}-s{seed}"
                where = kept(chosen.work / name, lambda a=arm, r=ratio: train_arm(parent, a, r, tokens, seed))
                about = {"arm": arm, "ratio": float(ratio), "seed": seed, "tokens": tokens}
                found.append(about | (score(where) if chosen.only is None else {}))
    if chosen.only is None:
        vanilla = chosen.work / f"vanilla+-1-{tokens}-{chosen.parent_tokens}-s{seed}"
        for policy in POLICIES:
            for ratio in chosen.ratios:
                about = {"arm": policy, "ratio": float(ratio), "seed": seed, "tokens": tokens}
                found.append(about | score(vanilla, policy, CONTEXT // ratio))
    return found


def kept(folder: Path, make: Any) -> Path:
    """The folder with a model; made if it is not there."""
    if not (folder / "config.json").exists():
        make().save_pretrained(folder)
    return folder


def train_parent(tokens: int) -> PreTrainedModel:
    """The model that every arm starts from."""
    set_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32 * HEADS,
        head_dim=32,
        intermediate_size=384,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=END,
        pad_token_id=END,
    )
    model = LlamaForCausalLM(config)
    return _fit(model, tokens, 0, 2e-3)


def train_arm(parent: Path, arm: str, ratio: int, tokens: int, seed: int) -> PreTrainedModel:
    """One arm, from the parent, on `tokens` tokens of its seed."""
    model = AutoModelForCausalLM.from_pretrained(parent, dtype=torch.float32)
    if arm == "dmc":
        settings = {"tokens": tokens, "seed": seed, "learning_rate": 1e-3, "kd_weight": 0.0, "ce_weight": 1.0}
        return dmc.retrofit(model, _data(tokens, seed), ratio=ratio, **HOW, **settings)
    return _fit(pooled(model, HEADS // ratio) if arm == "gqa" else model, tokens, seed, 1e-3)


def _fit(model: PreTrainedModel, tokens: int, seed: int, rate: float) -> PreTrainedModel:
    settings = TrainSettings(tokens=tokens, seed=seed, learning_rate=rate, **HOW)
    fit(CausalLM(model), _data(tokens, seed), None, settings)
    return model


def _data(tokens: int, seed: int) -> list[dict[str, torch.Tensor]]:
    ids, _ = rows("train", -(-tokens // CONTEXT), seed + 1)
    return [{"input_ids": part} for part in ids.split(HOW["batch_size"])]


@torch.no_grad()
def score(folder: Path, policy: str | None = None, budget: int = 0) -> dict[str, float]:
    """Nats per byte of text, share of pairs recalled, and the measured ratio, on held-out rows."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids, recalled = rows("validation", ROWS, 99)
    losses, hits = [], []
    for part, wanted in zip(ids.split(16), recalled.split(16), strict=True):
        if policy is None:
            logits = model(input_ids=part).logits[:, :-1]
        else:
            with evicting(model, policy, budget):
                logits = model(input_ids=part).logits[:, :-1]
        goals = part[:, 1:]
        losses.append(F.cross_entropy(logits.mT, goals, reduction="none")[goals < KEYS])
        hits.append((logits.argmax(-1) == goals)[wanted[:, 1:]].float())
    found = {"loss": torch.cat(losses).mean().item(), "recall": torch.cat(hits).mean().item()}
    if dmc.is_converted(model):
        measured = dmc.measure(model, [{"input_ids": part} for part in ids.split(16)])
        found |= {"measured": measured.ratio, "by_layer": [round(r, 2) for r in measured.by_layer]}
    return found


def record(found: list[dict[str, Any]], chosen: argparse.Namespace) -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    words = f"--seeds {' '.join(map(str, chosen.seeds))} --parent-tokens {chosen.parent_tokens} "
    words += f"--tokens {' '.join(map(str, chosen.tokens))} --ratios {' '.join(map(str, chosen.ratios))}"
    return {
        "command": f"python -m benchmarks.dmc.quality {words}",
        "commit": commit.stdout.strip(),
        "versions": {name: version(name) for name in ("nestling", "torch", "transformers")},
        "seeds": chosen.seeds,
        "rows": found,
        "claims": claims(found, max(chosen.tokens)),
    }


def claims(found: list[dict[str, Any]], tokens: int) -> dict[str, Any]:
    """Per seed: loss of dmc over that of vanilla+, and recall of dmc minus that of the best eviction."""

    def value(arm: str, seed: int, name: str) -> float:
        rows = [r for r in found if r["arm"] == arm and r["seed"] == seed and r["tokens"] == tokens]
        return next(r[name] for r in rows if r["ratio"] in (1, RATIO))

    seeds = sorted({row["seed"] for row in found if row["arm"] == "dmc"})
    loss = [value("dmc", seed, "loss") / value("vanilla+", seed, "loss") for seed in seeds]
    best = [max(value(policy, seed, "recall") for policy in POLICIES) for seed in seeds]
    gain = [value("dmc", seed, "recall") - other for seed, other in zip(seeds, best, strict=True)]
    what = f"ratio {RATIO}, small Llama trained here, {tokens:,} tokens of retrofit"
    text = "held-out loss of bytes, dmc over vanilla with the same further training"
    pairs = "share of pairs recalled, dmc minus the best of H2O, TOVA, StreamingLLM at as many slots"
    found_claims = {"loss_ratio_4x": _claim(loss, seeds, "x", f"{text}; {what}")}
    if mean(value("vanilla+", seed, "recall") for seed in seeds) > LEARNT:
        found_claims["recall_4x_vs_best_eviction"] = _claim(gain, seeds, "share", f"{pairs}; {what}")
    return found_claims


def _claim(values: list[float], seeds: list[int], unit: str, how: str) -> dict[str, Any]:
    spread = [round(min(values), 4), round(max(values), 4)]
    return {"value": round(mean(values), 4), "spread": spread, "seeds": seeds, "paper": None, "unit": unit, "how": how}


def show(found: list[dict[str, Any]]) -> None:
    table = Table("arm", "ratio", "measured", "tokens", "seed", "loss", "recall", title="equal memory", box=None)
    for row in found:
        measured = f"{row['measured']:.2f}" if "measured" in row else "-"
        figures = (f"{row['ratio']:g}", measured, f"{row['tokens']:,}", str(row["seed"]))
        table.add_row(row["arm"], *figures, f"{row['loss']:.4f}", f"{row['recall']:.3f}")
    Console().print(table)


if __name__ == "__main__":
    main()
