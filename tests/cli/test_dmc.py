"""The verbs of compressed caches on a tiny checkpoint: retrofit, go on with it, show, evaluate, refuse."""

import pytest
from transformers import AutoModelForCausalLM

from nestling import dmc
from nestling.cli import main
from tests.cli.workplace import run

TRAIN = [
    *("--data", "text.jsonl", "--evaluation_tokens", 64, "--train.steps", 12, "--train.batch_size", 2),
    *("--train.context", 32, "--train.save_every", 5, "--train.learning_rate", 0.02, "--train.gain", 5),
]


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_retrofit_show_and_eval(place, capsys):
    made = run(capsys, "dmc", "retrofit", "m", "--ratio", 3, "--out", "run", *TRAIN)
    assert made["compression"]["ratio"] > 1
    model = AutoModelForCausalLM.from_pretrained("run/model")
    assert model.config.dmc["keep"] == 0
    assert model.config.dmc["measured"] == made["compression"]
    page = (place / "run/report.html").read_text()
    assert all(
        part in page for part in ("by layer and head", "perplexity before", "as trained", "Which tokens share a slot")
    )
    assert run(capsys, "dmc", "retrofit", "m", "--ratio", 3, "--out", "run", *TRAIN) == made
    shown = run(capsys, "dmc", "show", "run/model", "some words to look at", "--out", "page.html")
    assert shown["ratio"] >= 1
    assert "layer 0, head 0" in (place / "page.html").read_text()
    found = run(capsys, "dmc", "eval", "run/model", "--data", "text.jsonl", "--context", 32, "--tokens", 64)
    assert found["perplexity"] == pytest.approx(made["perplexity"], rel=0.2)
    assert found["cache_bytes"] > 0
    assert dmc.is_converted(model)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_tokens_that_are_dropped(place, capsys):
    method = ("--method", "dms", "--train.window", 3)
    made = run(capsys, "dmc", "retrofit", "m", "--ratio", 3, *method, "--out", "run", *TRAIN)
    assert made["compression"]["ratio"] > 1
    assert AutoModelForCausalLM.from_pretrained("run/model").config.dmc["method"] == "dms"
    assert run(capsys, "dmc", "show", "run/model", "some words to look at")["ratio"] >= 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("show", "m", "words"), "not compressed"),
        (("eval", "m", "--data", "text.jsonl", "--context", "32", "--tokens", "64"), "not compressed"),
        (("retrofit", "m", "--data", "text.jsonl", "--ratio", "0.5"), "ratio 0.5"),
        (("retrofit", "m", "--data", "text.jsonl", "--method", "h2o"), "choose from dmc, dms"),
        (("retrofit", "m", "--data", "text.jsonl", "--method", "dms", "--ratio", "16"), "window of 16 holds 17"),
        (("retrofit", "m", "--data", "text.jsonl", "--train.free_part", "0.9"), "less than 1 together"),
    ],
)
def test_refusals_are_sentences(place, capsys, arguments, says):
    assert main(["dmc", *arguments]) == 2
    assert says in " ".join(capsys.readouterr().err.split())
