"""Loss and far recall at equal memory: compressed caches against more training, fewer heads and eviction.

Every arm starts from the same `parent` and gets the same rows of `corpus`: `vanilla+` goes on as it is; `dmc` learns to
merge at the ratio, `shared` decides once per layer, `dms` drops tokens behind a window of 16, `gqa` starts from pooled
heads; `no-free`, `jump` and `taught` are `dmc` without its first stage, with the whole ratio asked for at once, and
with the parent's distributions in place of the data. Eviction (H2O, TOVA, StreamingLLM) is applied to `vanilla+`, which
costs it nothing in training. All are scored on held-out rows, caches with the decisions of decoding, at equal slots at
the end of a row. Several `--tokens` show the trend.

    python -m benchmarks.dmc.quality [--seeds 0 1] [--arms vanilla+ dmc ...] [--ratios 4] [--tokens N] [--work DIR]

Models and scores are kept in `--work`, an interrupted training goes on, and the result is written after every arm.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F
from benchmarks.dmc.baselines import POLICIES, evicting, pooled
from benchmarks.dmc.corpus import CONTEXT, TEXT, held_out
from benchmarks.dmc.parent import HEADS, HOW, TOKENS, parent, rows
from benchmarks.record import PACKAGES, claim, commit
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, PreTrainedModel

from nestling import dmc
from nestling.train import CausalLM, TrainSettings, fit

RESULT = Path(__file__).parents[1] / "results/dmc/quality.json"
RATIO = 4
RATE = 1e-3
PARTS = {"free_part": 0.05, "settle_part": 0.4}
ARMS: dict[str, dict[str, Any] | None] = {  # settings of a retrofit; None for arms without one
    "vanilla+": None,
    "dmc": {},
    "dms": {"method": "dms", "window": 16},
    "gqa": None,
    "shared": {"shared": True},
    "taught": {"kd_weight": 1.0, "ce_weight": 0.0},
    "no-free": {"free_part": 0.0},
    "jump": {"settle_part": 0.94},
}
ROWS = 96  # held out
LEARNT = 0.2  # recall of vanilla+ below which recall says nothing: it has not been learnt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=["vanilla+", "dmc", "dms", "gqa"])
    parser.add_argument("--ratios", type=int, nargs="+", default=[RATIO])
    parser.add_argument("--parent-tokens", type=int, default=TOKENS)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1_000_000], help="of each arm")
    parser.add_argument("--work", type=Path, default=Path("runs/dmc-quality"))
    chosen = parser.parse_args()
    folder = parent(chosen.work, chosen.parent_tokens)
    found = [{"arm": "parent", "ratio": 1.0, "seed": 0, "tokens": 0} | kept_score(folder)]
    for seed in chosen.seeds:
        for tokens in chosen.tokens:
            for row in run(folder, tokens, seed, chosen):
                found.append(row)
                write(found, chosen)
    show(found)


def run(start: Path, tokens: int, seed: int, chosen: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rows of all arms of one seed, each as soon as it is there; eviction comes with `vanilla+`."""
    for arm in chosen.arms:
        for ratio in (1,) if arm == "vanilla+" else chosen.ratios:
            folder = chosen.work / f"{start.name}-{arm}-{ratio}-{tokens}-s{seed}"
            train_arm(start, folder, arm, ratio, tokens, seed)
            about = {"seed": seed, "tokens": tokens}
            yield {"arm": arm, "ratio": float(ratio)} | about | kept_score(folder)
            for policy in POLICIES if arm == "vanilla+" else ():
                for cut in chosen.ratios:
                    yield {"arm": policy, "ratio": float(cut)} | about | kept_score(folder, policy, CONTEXT // cut)


def train_arm(start: Path, folder: Path, arm: str, ratio: int, tokens: int, seed: int) -> None:
    """One arm's model, from the parent, in `folder`; nothing is done if it is there."""
    if (folder / "config.json").exists():
        return
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32)
    common = HOW | {"tokens": tokens, "seed": seed, "learning_rate": RATE, "save_every": 50}
    data, settings = rows(tokens, seed + 1), ARMS[arm]
    if settings is not None:
        plain = {"kd_weight": 0.0, "ce_weight": 1.0} | PARTS
        dmc.retrofit(model, data, run_dir=folder, ratio=ratio, **(common | plain | settings))
    else:
        model = pooled(model, HEADS // ratio) if arm == "gqa" else model
        fit(CausalLM(model), data, None, TrainSettings(**common), run_dir=folder)
    model.save_pretrained(folder)


def kept_score(folder: Path, policy: str | None = None, budget: int = 0) -> dict[str, float]:
    """`score`, read from the folder if it was taken before."""
    path = folder / (f"score-{policy}-{budget}.json" if policy else "score.json")
    if not path.exists():
        path.write_text(json.dumps(score(folder, policy, budget)))
    return json.loads(path.read_text())


@torch.no_grad()
def score(folder: Path, policy: str | None = None, budget: int = 0) -> dict[str, float]:
    """Nats per token of text, share of facts recalled, and the measured ratio, on held-out rows."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids, recalled = held_out(ROWS)
    losses, hits = [], []
    for part, wanted in zip(ids.split(16), recalled.split(16), strict=True):
        if policy is None:
            logits = model(input_ids=part).logits[:, :-1]
        else:
            with evicting(model, policy, budget):
                logits = model(input_ids=part).logits[:, :-1]
        goals = part[:, 1:]
        losses.append(F.cross_entropy(logits.mT, goals, reduction="none")[goals < TEXT])
        hits.append((logits.argmax(-1) == goals)[wanted[:, 1:]].float())
    found = {"loss": torch.cat(losses).mean().item(), "recall": torch.cat(hits).mean().item()}
    if dmc.is_converted(model):
        measured = dmc.measure(model, [{"input_ids": part} for part in ids.split(16)])
        found |= {"measured": measured.ratio, "by_layer": [round(r, 2) for r in measured.by_layer]}
    return found


def write(found: list[dict[str, Any]], chosen: argparse.Namespace) -> None:
    """Record what there is so far."""
    lists = {name: " ".join(map(str, getattr(chosen, name))) for name in ("seeds", "arms", "ratios", "tokens")}
    words = f"--parent-tokens {chosen.parent_tokens} " + " ".join(f"--{name} {what}" for name, what in lists.items())
    recorded = {
        "command": f"python -m benchmarks.dmc.quality {words}",
        "seeds": chosen.seeds,
        "commit": commit(),
        "versions": {name: version(name) for name in PACKAGES},
        "rows": found,
        "claims": claims(found, max(chosen.tokens)),
    }
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(recorded, indent=1) + "\n")


def claims(found: list[dict[str, Any]], tokens: int) -> dict[str, Any]:
    """Of the seeds whose arms are all there: loss of a cache over that of vanilla+, and its lead in recall."""
    value = {(r["arm"], r["ratio"], r["seed"]): r for r in found if r["tokens"] == tokens}
    what = f"ratio {RATIO}, small Llama trained here, {tokens:,} tokens of retrofit"
    text = "held-out loss of text, over that of the model without a compressed cache after the same further training"
    pairs = "share of facts recalled, minus the best of H2O, TOVA, StreamingLLM at as many slots"
    made = {}
    for arm, ending in (("dmc", ""), ("dms", "_dms")):
        seeds = sorted(s for a, ratio, s in value if (a, ratio) == (arm, RATIO) and ("streaming", RATIO, s) in value)
        if not seeds:
            continue
        own, plain = ([value[a, r, s] for s in seeds] for a, r in ((arm, RATIO), ("vanilla+", 1)))
        losses = [a["loss"] / b["loss"] for a, b in zip(own, plain, strict=True)]
        made[f"loss_ratio_4x{ending}"] = claim(losses, seeds, f"{arm}: {text}; {what}", "x")
        best = [max(value[policy, RATIO, s]["recall"] for policy in POLICIES) for s in seeds]
        leads = [a["recall"] - b for a, b in zip(own, best, strict=True)]
        if mean(row["recall"] for row in plain) > LEARNT:
            made[f"recall_4x_vs_best_eviction{ending}"] = claim(leads, seeds, f"{arm}: {pairs}; {what}", "share")
    return made


def show(found: list[dict[str, Any]]) -> None:
    table = Table("arm", "ratio", "measured", "tokens", "seed", "loss", "recall", title="equal memory", box=None)
    for row in found:
        measured = f"{row['measured']:.2f}" if "measured" in row else "-"
        figures = (f"{row['ratio']:g}", measured, f"{row['tokens']:,}", str(row["seed"]))
        table.add_row(row["arm"], *figures, f"{row['loss']:.4f}", f"{row['recall']:.3f}")
    Console().print(table)


if __name__ == "__main__":
    main()
