"""SmolLM2-135M with its cache halved, on as many tokens as a CPU allows: late eviction, taught by the model as it was.

Late eviction with distillation (`dms`) needs the least data of all arms in `quality`. Loss on held-out text of the
standard library, with the decisions of decoding, beside the model as it is and beside StreamingLLM, which is not
trained, with as many slots at the end of a row. Rows that are recorded already are not computed again.

    python -m benchmarks.dmc.smollm2 [--ratio 2] [--tokens 8192] [--rate 3e-4] [--scale 10] [--seed 0] [--work DIR]
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import torch
from benchmarks.dmc.baselines import evicting
from benchmarks.record import Record, Row, claim, show
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

import nestling as nl
from nestling import data, dmc

MODEL, TEXT = "builtin:smollm2-135m-instruct", "builtin:stdlib"
CONTEXT, WINDOW = 256, 16
ROWS = 8  # held out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ratio", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--rate", type=float, default=3e-4, help="peak of the learning rate")
    parser.add_argument("--scale", type=float, default=10, help="factor of the gates' logits: how fast they learn")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("runs/dmc-smollm2"))
    chosen = parser.parse_args()
    record = Record("dmc", "smollm2")
    model, tokenizer = nl.load(MODEL, dtype="float32")
    held = data.batches(TEXT, tokenizer, context=CONTEXT, tokens=ROWS * CONTEXT, split="validation")
    rows = torch.cat([batch["input_ids"] for batch in held])[:ROWS]
    key = {"ratio": float(chosen.ratio), "seed": chosen.seed}
    plain = record.row({"arm": "as it is", "ratio": 1.0, "seed": 0, "tokens": 0}, partial(score, model, rows))
    streaming = partial(score, model, rows, budget=CONTEXT // chosen.ratio)
    record.row({"arm": "streaming", **key, "tokens": 0}, streaming)

    def taught() -> Row:
        how = {"method": "dms", "window": WINDOW, "ratio": chosen.ratio, "context": CONTEXT, "save_every": 8}
        how |= {"tokens": chosen.tokens, "batch_size": 1, "learning_rate": chosen.rate, "seed": chosen.seed}
        how |= {"scale": chosen.scale}
        folder = chosen.work / f"dms-{chosen.ratio}-{chosen.tokens}-{chosen.rate:g}-{chosen.scale:g}-s{chosen.seed}"
        return score(dmc.retrofit(model, TEXT, tokenizer, run_dir=folder, **how), rows)

    made = record.row(
        {"arm": "dms", **key, "tokens": chosen.tokens, "rate": chosen.rate, "scale": chosen.scale}, taught
    )
    if made["measured"] > 0.9 * chosen.ratio:  # else what it lost is not the price of that ratio
        record.save(record.claims | {f"smollm2_loss_ratio_{chosen.ratio}x": lost(made, plain, chosen)})
    show(record.rows, ["arm", "ratio", "tokens"], ["measured", "loss"])


def lost(made: Row, plain: Row, chosen: argparse.Namespace) -> Row:
    """The claim: loss over that of the model as it is."""
    what = f"SmolLM2-135M, dms with a window of {WINDOW}, {chosen.tokens:,} tokens of distillation, rows of {CONTEXT}"
    return claim([made["loss"] / plain["loss"]], [chosen.seed], f"held-out loss over that of the model: {what}", "x")


@torch.no_grad()
def score(model: PreTrainedModel, rows: Tensor, budget: int = 0) -> Row:
    """Nats per token, and the ratio that is measured; with a `budget` under StreamingLLM with so many slots."""
    model.eval()
    if budget:
        with evicting(model, "streaming", budget):
            logits = model(input_ids=rows, use_cache=False).logits
    else:
        logits = model(input_ids=rows, use_cache=False).logits
    found = {"loss": cross_entropy(logits[:, :-1].flatten(0, 1).float(), rows[:, 1:].flatten()).item()}
    if dmc.is_converted(model):
        measured = dmc.measure(model, [{"input_ids": rows}])
        found |= {"measured": measured.ratio, "by_layer": [round(r, 2) for r in measured.by_layer]}
    return found


if __name__ == "__main__":
    main()
