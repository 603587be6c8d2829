"""`nestling elastic`: from a checkpoint to a family, a member of it, and what is shown of both."""

import json
from types import SimpleNamespace

import pytest
import torch

from nestling import hub
from nestling.cli import main
from nestling.cost import cost_of_form
from nestling.elastic import Family
from tests.cli.workplace import TEXT
from tests.models import logits, token_batches

TRAIN = ["elastic", "train", "m", *TEXT, "--out", "run", "--calibration_tokens", "128", "--generated", "0"]
SMALL = ["--evaluation_tokens", "64", "--compare", "1", "--train.steps", "4", "--train.batch_size", "2"]
QUICK = ["--train.context", "32", "--train.save_every", "2"]


def run(capsys, *words: str) -> dict:
    assert main([*words, "--json"]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_a_family_from_train_to_extract(place, capsys):
    summary = run(capsys, *TRAIN, *SMALL, *QUICK, "--to", "0.75x", "0.5x", "--train.per_layer", "intermediate_size")
    assert {name: round(m["of_parent"], 2) for name, m in summary["members"].items()} == {
        "1x": 1.0, "0.75x": 0.75, "0.5x": 0.5,
    }  # fmt: skip
    assert set(summary["compared"]["0.75x"]) == {"learned", "searched", "uniform", "random"}
    assert summary["compared"]["0.75x"]["searched"][0]["shape"]
    page = (place / "run/report.html").read_text()
    assert "What each layer keeps" in page
    assert "0.75x" in page
    assert (
        run(capsys, *TRAIN, *SMALL, *QUICK, "--to", "0.75x", "0.5x", "--train.per_layer", "intermediate_size")
        == summary
    )

    made = run(capsys, "elastic", "extract", "run", "0.5x", "half")
    assert made["trained"] is True
    ids = token_batches(1)[0]["input_ids"] % 90
    family = Family.load("run")
    torch.testing.assert_close(logits(family["0.5x"], ids), logits(hub.load("half")[0], ids), atol=1e-5, rtol=1e-5)
    between = run(capsys, "elastic", "extract", "run", "0.6x", "between")
    assert between["trained"] is False
    assert hub.load("between")[0].config.nestling_member == {"budget": "0.6x", "trained": False}
    shown = run(capsys, "elastic", "inspect", "run")
    assert shown["0.75x"]["params"] == summary["members"]["0.75x"]["params"]


def test_a_latency_is_met_with_times_of_this_machine(place, capsys, monkeypatch):
    """Times are made up here: measuring is tested with the search."""
    times = SimpleNamespace(milliseconds=lambda anatomy, form: 1 + cost_of_form(anatomy, form).params / 1000)
    monkeypatch.setattr("nestling.recipes.elastic.table", lambda *arguments: times)
    nothing = ["--evaluation_tokens", "0", "--compare", "0", "--train.steps", "2", "--train.batch_size", "2"]
    summary = run(capsys, *TRAIN, *nothing, *QUICK, "--to", "latency=0.7x")
    assert abs(summary["members"]["latency=0.7x"]["budget_error"]) < 0.01
    assert summary["members"]["latency=0.7x"]["of_parent"] < 0.75


def test_a_teacher_is_kept_and_taken_again(place, capsys):
    nothing = ["--evaluation_tokens", "0", "--compare", "0", "--train.steps", "2", "--train.batch_size", "2"]
    kept = ["--to", "0.5x", "--train.top_k", "8", "--teacher_cache", "kept"]
    first = run(capsys, *TRAIN, *nothing, *QUICK, *kept)
    shards = {path: path.stat().st_mtime_ns for path in (place / "kept").iterdir()}
    assert shards
    second = run(capsys, *TRAIN, *nothing, *QUICK, *kept, "--overwrite")
    assert {path: path.stat().st_mtime_ns for path in (place / "kept").iterdir()} == shards
    assert second["members"] == first["members"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["elastic", "train", "m", *TEXT, "--to", "0.01x"], "no member can keep the budget 0.01x"),
        (["elastic", "train", "m", *TEXT, "--to", "2x"], "not below the parent"),
        (["elastic", "train", "m", *TEXT, "--to", "0.5x", "0.5x"], "give each budget once"),
        (["elastic", "train", "m", *TEXT, "--train.per_layer", "width"], "'width' is not an axis"),
        (["elastic", "train", "m", *TEXT, "--train.weights", "[1.0]"], "do not fit the parent and 2 budgets"),
        (["elastic", "train", "m", *TEXT, "--teacher_cache", "kept"], "say how many with train.top_k"),
        (["elastic", "train", "m", *TEXT, "--train.masks", "odd"], "masks 'odd' is not known"),
        (["elastic", "extract", "m", "0.5x", "out"], "holds no family"),
        (["elastic", "fly"], "elastic"),
    ],
)
def test_mistakes_are_one_sentence(words, sentence, place, capsys):
    assert main(words) == 2
    said = capsys.readouterr().err.strip()
    assert sentence in said
    assert len(said.splitlines()) == 1
    assert not (place / "runs").exists()
