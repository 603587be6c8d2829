"""Loss and far recall at equal memory: compressed caches against more training, fewer heads and eviction.

Every arm starts from the same `parent` and gets the same rows of `corpus`: `vanilla+` goes on as it is; `dmc` learns to
merge at the ratio, `shared` decides once per layer (DMC-C), `dms` drops tokens behind a window of 16, `gqa` starts from
pooled heads. Ablations of `dmc`: `no-free` is without its first stage, `jump` has the whole ratio asked for at once,
`uniform` gives all tokens of a slot the same weight, `taught` has the parent's distributions in place of the data.
Eviction (`baselines`) is applied to `vanilla+`, which costs it nothing in training. All are scored on held-out rows,
caches with the decisions of decoding, at equal slots at the end of a row. Several `--tokens` show the trend.

    python -m benchmarks.dmc.quality [--seeds 0 1] [--arms vanilla+ dmc ...] [--ratios 4] [--tokens N] [--work DIR]

Models are kept in `--work`, an interrupted training goes on, and every row is kept as soon as it is there.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F
from benchmarks.dmc.baselines import POLICIES, evicting, pooled
from benchmarks.dmc.corpus import CONTEXT, TEXT, held_out
from benchmarks.dmc.parent import HEADS, HOW, TOKENS, parent, rows
from benchmarks.record import Record, Row, claim, show
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from nestling import Anatomy, dmc
from nestling.anatomy.attention import last_channel, sites
from nestling.train import CausalLM, TrainSettings, fit

RATIO = 4
RATE = 1e-3
RETROFIT = 400_000  # tokens of an arm
PARTS = {"free_part": 0.05, "settle_part": 0.4}
ARMS: dict[str, dict[str, Any]] = {  # settings of a retrofit
    "dmc": {},
    "dms": {"method": "dms", "window": 16},
    "shared": {"shared": True},
    "taught": {"kd_weight": 1.0, "ce_weight": 0.0},
    "no-free": {"free_part": 0.0},
    "jump": {"settle_part": 0.94},
    "uniform": {},
}
OTHERS = ("vanilla+", "gqa", *POLICIES)
ABLATIONS = ("shared", "taught", "no-free", "jump", "uniform")
ROWS = 96  # held out
LEARNT = 0.2  # recall of vanilla+ below which recall says nothing: it has not been learnt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--arms", nargs="+", choices=[*OTHERS, *ARMS], default=[*OTHERS, "dmc", "dms"])
    parser.add_argument("--ratios", type=int, nargs="+", default=[RATIO])
    parser.add_argument("--parent-tokens", type=int, default=TOKENS)
    parser.add_argument("--tokens", type=int, nargs="+", default=[RETROFIT], help="of each arm")
    parser.add_argument("--work", type=Path, default=Path("runs/dmc-quality"))
    chosen = parser.parse_args()
    start, record = parent(chosen.work, chosen.parent_tokens), Record("dmc", "quality")
    record.row({"arm": "parent", "ratio": 1.0, "seed": 0, "tokens": 0}, lambda: score(start))
    for seed in chosen.seeds:
        for tokens in chosen.tokens:
            for arm in chosen.arms:
                for ratio in (1,) if arm == "vanilla+" else chosen.ratios:
                    compute(record, start, arm, ratio, tokens, seed)
                    record.save(claims(record))
    show(record.rows, ["arm", "ratio", "tokens"], ["measured", "loss", "recall", "crowded"])


def compute(record: Record, start: Path, arm: str, ratio: int, tokens: int, seed: int) -> None:
    """The row of one arm, unless it is there or there are too few heads to pool."""
    if arm == "gqa" and HEADS % ratio:
        print(f"gqa: {HEADS} heads cannot be pooled {ratio} to one")
        return
    model, cut = ("vanilla+", 1) if arm in POLICIES else (arm, ratio)
    folder = start.parent / f"{start.name}-{model}-{cut}-{tokens}-s{seed}"

    def make() -> Row:
        train_arm(start, folder, model, cut, tokens, seed)
        return score(folder, *(arm, CONTEXT // ratio) if arm in POLICIES else ())

    record.row({"arm": arm, "ratio": float(ratio), "seed": seed, "tokens": tokens}, make)


def train_arm(start: Path, folder: Path, arm: str, ratio: int, tokens: int, seed: int) -> None:
    """One arm's model, from the parent, in `folder`; nothing is done if it is there."""
    if (folder / "config.json").exists():
        return
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32)
    common = HOW | {"tokens": tokens, "seed": seed, "learning_rate": RATE, "save_every": 50}
    data = rows(tokens, seed + 1)
    if arm in ARMS:
        if arm == "uniform":
            weigh_alike(model)
        plain = {"kd_weight": 0.0, "ce_weight": 1.0} | PARTS
        dmc.retrofit(model, data, run_dir=folder, ratio=ratio, **(common | plain | ARMS[arm]))
    else:
        model = pooled(model, HEADS // ratio) if arm == "gqa" else model
        fit(CausalLM(model), data, None, TrainSettings(**common), run_dir=folder)
    model.save_pretrained(folder)


def weigh_alike(model: PreTrainedModel) -> None:
    """Keep the rows that write weights from learning: once the channel has been freed, every weight is the same."""
    anatomy, tensors = Anatomy.of(model), model.state_dict(keep_vars=True)
    for site in sites(anatomy):
        for name, found in last_channel(anatomy, site).items():
            if f".{site.declared.query[0]}." in name:

                def still(gradient: Tensor, found: Tensor = found) -> Tensor:
                    return gradient.index_fill(0, found, 0)

                tensors[name].register_hook(still)


@torch.no_grad()
def score(folder: Path, policy: str | None = None, budget: int = 0) -> Row:
    """On held-out rows: nats per token of text between few facts, the shares of few and of crowded facts that are
    recalled, and the measured ratio."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids, asked = held_out(ROWS)
    losses, right = [], []
    for part in ids.split(16):
        if policy is None:
            logits = model(input_ids=part).logits[:, :-1]
        else:
            with evicting(model, policy, budget):
                logits = model(input_ids=part).logits[:, :-1]
        losses.append(F.cross_entropy(logits.mT, part[:, 1:], reduction="none"))
        right.append((logits.argmax(-1) == part[:, 1:]).float())
    loss, hits, goals, asked = torch.cat(losses), torch.cat(right), ids[:, 1:], asked[:, 1:]
    few, crowded = slice(0, None, 2), slice(1, None, 2)
    found = {"loss": loss[few][goals[few] < TEXT].mean().item(), "recall": hits[few][asked[few]].mean().item()}
    found["crowded"] = hits[crowded][asked[crowded]].mean().item()
    if dmc.is_converted(model):
        measured = dmc.measure(model, [{"input_ids": part} for part in ids.split(16)])
        found |= {"measured": measured.ratio, "by_layer": [round(r, 2) for r in measured.by_layer]}
    return found


def claims(record: Record) -> dict[str, Row]:
    """Of the seeds whose arms are all there: a cache's loss over that of vanilla+, its lead in recall, and by how much
    an ablation of `dmc` has more loss."""
    value = {(r["arm"], r["ratio"], r["seed"]): r for r in record.rows if r["tokens"] == RETROFIT}
    made: dict[str, Row] = {}
    for ratio in sorted({ratio for _, ratio, _ in value if ratio > 1}):
        what = f"ratio {ratio:g}, small Llama trained here, {RETROFIT:,} tokens of retrofit"
        for arm, ending in (("dmc", ""), ("dms", "_dms"), ("shared", "_shared"), ("gqa", "_gqa")):
            made |= _against_vanilla(value, arm, ratio, f"{ratio:g}x", ending, what)
    for arm in ABLATIONS:
        seeds = [s for a, ratio, s in value if (a, ratio) == (arm, RATIO) and ("dmc", RATIO, s) in value]
        gaps = [value[arm, RATIO, s]["loss"] - value["dmc", RATIO, s]["loss"] for s in seeds]
        if seeds:
            how = f"held-out loss of `{arm}` minus that of dmc, same tokens and ratio {RATIO}"
            made[f"loss_gap_{arm}"] = claim(gaps, seeds, how, "nats")
    return made


def _against_vanilla(
    value: dict[tuple[str, float, int], Row], arm: str, ratio: float, name: str, ending: str, what: str
) -> dict[str, Row]:
    text = "held-out loss of text, over that of the model without a compressed cache after the same further training"
    facts = f"share of facts recalled, minus the best of {', '.join(POLICIES)} at as many slots"
    seeds = sorted(s for a, r, s in value if (a, r) == (arm, ratio) and ("vanilla+", 1, s) in value)
    if not seeds:
        return {}
    own, plain = ([value[a, r, s] for s in seeds] for a, r in ((arm, ratio), ("vanilla+", 1)))
    losses = [a["loss"] / b["loss"] for a, b in zip(own, plain, strict=True)]
    made = {f"loss_ratio_{name}{ending}": claim(losses, seeds, f"{arm}: {text}; {what}", "x")}
    seeds = [s for s in seeds if all((policy, ratio, s) in value for policy in POLICIES)]
    for probe, which in (("recall", "few"), ("crowded", "crowded")):
        if seeds and mean(row[probe] for row in plain) > LEARNT:
            best = [max(value[policy, ratio, s][probe] for policy in POLICIES) for s in seeds]
            leads = [value[arm, ratio, s][probe] - b for s, b in zip(seeds, best, strict=True)]
            how = f"{arm}: {facts} ({which} facts in a row); {what}"
            made[f"{probe}_{name}_vs_best_eviction{ending}"] = claim(leads, seeds, how, "share")
    return made


if __name__ == "__main__":
    main()
