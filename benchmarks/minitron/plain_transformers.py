"""A child cut on every axis at once, loaded in a fresh environment that has torch and transformers and not Nestling.

SmolLM2-135M-Instruct loses hidden channels, FFN neurons, KV groups, query heads and layers in one cut, and is saved as
every verb saves. Then an environment is made from nothing, in which the child is loaded, and its logits and the tokens
it writes, with and without cache, are compared with those computed here.

    python -m benchmarks.minitron.plain_transformers [--work DIR] [--packages torch==2.13.0 transformers==5.24.0]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
import venv
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from benchmarks.record import Record, Row, claim
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

import nestling as nl
from nestling import data, hub

MODEL = "builtin:smollm2-135m-instruct"
SHAPE = nl.Shape(
    hidden_size=512, intermediate_size=1152, num_key_value_heads=2, num_attention_heads=4, num_hidden_layers=26
)
READER = Path(__file__).with_name("plain_reader.py")
TOKENS = 12  # written after the prompt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, help="folder for child and environment, which stay there")
    own = [f"{name}=={version(name).partition('+')[0]}" for name in ("torch", "transformers")]
    parser.add_argument("--packages", nargs="+", default=own, help="what is installed; the versions here unless given")
    chosen, record = parser.parse_args(), Record("minitron", "plain_transformers")
    key = {"model": MODEL, "shape": SHAPE.to_dict(), "packages": chosen.packages, "seed": 0}
    with tempfile.TemporaryDirectory() as temporary:
        work = chosen.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        row = record.row(key, lambda: compare(work, chosen.packages))
    assert row["tokens_equal"], row
    assert not row["left_over"] + row["foreign_fields"], row
    how = "largest difference of a logit of a child cut on all axes, loaded in a fresh environment, from the one here"
    record.save({"plain_transformers_difference": claim([row["largest_difference"]], [0], how, "logits")})
    show(row)


def compare(work: Path, packages: list[str]) -> Row:
    """What the reader finds in a fresh environment."""
    make_child(work)
    python = environment(work / "venv", packages)
    isolated = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [python, "-I", READER, work / "child", work / "expected.safetensors"],
        env=isolated,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@torch.no_grad()
def make_child(work: Path) -> None:
    """The child, and what it computes here."""
    model, tokenizer = nl.load(MODEL, dtype="float32")
    batches = data.batches("builtin:stdlib", tokenizer, context=128, tokens=512)
    child = nl.prune(model, nl.rank(model, batches), SHAPE)
    hub.save(child, work / "child", tokenizer, overwrite=True)
    ids = batches[0]["input_ids"][:2, :24]
    expected = {
        "ids": ids,
        "logits": child(ids).logits,
        "generated": child.generate(ids, max_new_tokens=TOKENS, do_sample=False, pad_token_id=0),
    }
    save_file({name: tensor.contiguous() for name, tensor in expected.items()}, work / "expected.safetensors")


def environment(folder: Path, packages: list[str]) -> Path:
    """The interpreter of an environment made from nothing, with these packages."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
    return python


def show(row: Row) -> None:
    table = Table("", "", title="a child in plain transformers", show_header=False)
    for name in ("class", "params", "largest_logit", "largest_difference", "tokens_equal", "chat_template", "versions"):
        table.add_row(name, str(row[name]))
    Console().print(table)


if __name__ == "__main__":
    main()
