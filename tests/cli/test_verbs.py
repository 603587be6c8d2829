"""Every verb on a tiny checkpoint: what it writes, what it prints as JSON, and that its YAML file does the same."""

import json

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from nestling.cli import VERBS, main
from nestling.ranking import Ranking
from nestling.shape import Shape
from tests import checkpoint
from tests.cli.workplace import FEW, JOB, TEXT, run
from tests.models import logits

IDS = torch.arange(3, 15)[None]


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def test_inspect(place, capsys):
    found = run(capsys, "inspect", "m", "--shape", "intermediate_size=30", "--context", 100, "--batch", 2)
    assert found["architecture"] == "llama"
    assert found["axes"]["num_key_value_heads"] == 2
    assert found["cost"]["params"] == load(place / "m").num_parameters()
    assert found["cost"]["kv_bytes"] == 2 * 100 * 4 * (2 * 2 * 8) * 4
    assert found["shape_cost"]["params"] == found["cost"]["params"] - 4 * 3 * 14 * 48


def test_rank_search_prune_and_distill_in_steps(place, capsys):
    run(capsys, "rank", "m", "--out", "made/ranking.safetensors", *FEW)
    Ranking.load(place / "made" / "ranking.safetensors")
    given = ("--ranking", "made/ranking.safetensors")
    width = ("--axes", "intermediate_size")
    found = run(capsys, "search", "m", "--to", "0.8x", "--out", "search", *given, *width, *FEW)
    assert found["file"] == "search/shape.json"
    assert Shape.load(place / "search" / "shape.json") == Shape(**found["shape"])
    assert (place / "search" / "report.html").exists()
    cut = run(capsys, "prune", "m", "--shape", "search/shape.json", *given, "--out", "small", *FEW)
    assert cut["shape"] == found["shape"]
    assert load(place / "small").num_parameters() == cut["cost"]["params"] <= 0.8 * 59664
    trained = run(capsys, "distill", "small", "--teacher", "m", *FEW[:2], "--out", "run", *JOB[-8:])
    assert trained == {"model": "run/model", "tokens": 128}
    assert not torch.equal(logits(load(place / "run/model"), IDS), logits(load(place / "small"), IDS))
    assert run(capsys, "distill", "small", "--teacher", "m", *FEW[:2], "--out", "run", *JOB[-8:]) == trained


def test_a_former_name_is_understood_with_a_word(place, capsys):
    run(capsys, "rank", "m", "--out", "now", *FEW)
    assert main(["rank", "m", "--out", "former", *TEXT, "--tokens=128", "--generated", "0"]) == 0
    assert "--tokens of rank is called --calibration_tokens now" in capsys.readouterr().err
    now, then = Ranking.load(place / "now"), Ranking.load(place / "former")
    assert now.fingerprint == then.fingerprint
    (place / "rank.yaml").write_text("tokens: 128\n")
    assert main(["rank", "m", *TEXT, "--config", "rank.yaml"]) == 2
    assert "tokens is called calibration_tokens now" in capsys.readouterr().err
    assert main(["compress", "m", "--tokens", "128"]) == 2  # negative control: it never had that name
    assert "called" not in capsys.readouterr().err


def test_search_may_write_its_shape_to_a_file(place, capsys):
    width = ("--axes", "intermediate_size")
    found = run(capsys, "search", "m", "--to", "0.8x", "--out", "s.json", *width, *FEW)
    assert Shape.load(place / "s.json") == Shape(**found["shape"])
    assert (place / "s" / "run.yaml").exists()


def test_eval_bench_and_report(place, capsys):
    pair = {"sentence_good": "the model reads", "sentence_bad": "the model read read"}
    (place / "pairs.jsonl").write_text(json.dumps(pair) + "\n")
    found = run(capsys, "eval", "m", "--data", "text.jsonl", "--tokens", 64, "--context", 32, "--pairs", "pairs.jsonl")
    assert found["text.jsonl"]["tokens"] == 64
    assert found["minimal pairs"]["pairs"] == 1
    speed = run(capsys, "bench", "m", "--prompt_tokens", 4, "--new_tokens", 1, "--rounds", 1)
    assert speed["m"]["decode_tokens_per_s"] > 0


def test_compress_and_its_report(place, capsys, brief):
    summary = run(capsys, "compress", "m", "--to", "0.7x", "--out", "run", *JOB)
    assert summary["child"]["cost"]["params"] <= 0.7 * summary["parent"]["cost"]["params"]
    child = load(place / "run" / "model")
    assert child.num_parameters() == summary["child"]["cost"]["params"]
    assert {"README.md", "chat_template.jinja"} <= {file.name for file in (place / "run" / "model").iterdir()}
    page = (place / "run" / "report.html").read_text()
    (place / "run" / "report.html").unlink()
    assert run(capsys, "report", "run") == {"report": "run/report.html"}
    assert (place / "run" / "report.html").read_text() == page


def test_a_yaml_file_is_the_same_as_options(place, capsys):
    """The record of a run is such a file: the settings that it holds make the run again."""
    options = dict(zip((name.removeprefix("--") for name in FEW[::2]), FEW[1::2], strict=True))
    typed = {name: yaml.safe_load(value) for name, value in options.items()}
    (place / "rank.yaml").write_text(yaml.safe_dump({"model": "m", "out": "a.safetensors", **typed}))
    run(capsys, "rank", "--config", "rank.yaml")
    run(capsys, "rank", "m", "--out", "b.safetensors", *FEW)
    one, other = (Ranking.load(place / f"{name}.safetensors") for name in "ab")
    assert one.fingerprint == other.fingerprint
    run(capsys, "rank", "--config", "rank.yaml", "--out", "c.safetensors", "--seed", 7)  # options come after the file
    assert Ranking.load(place / "c.safetensors").fingerprint != one.fingerprint


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb, capsys):
    with pytest.raises(SystemExit) as left:
        main([*verb.split(), "--help"])
    assert left.value.code == 0
    said = capsys.readouterr().out
    assert "--config" in said and "--json" in said  # noqa: PT018
    assert f"nestling [options] {verb} [" in said


def test_verbs_of_two_words_are_listed_as_they_are_typed_and_may_have_a_hyphen(place, capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    said = capsys.readouterr().out
    assert all(f" {verb} " in said for verb in VERBS)
    assert main(["moe-prune", "m", "--keep", "2", *FEW]) == 2
    assert "has no routed experts" in capsys.readouterr().err


def test_the_chat_template_and_generation_settings_of_the_parent_stay_with_the_child(place, capsys):
    file = place / "m" / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"temperature": 0.7, "do_sample": True}))
    run(capsys, "prune", "m", "--shape", "intermediate_size=30", "--out", "small", *FEW)
    from nestling import hub

    child, tokenizer = hub.load(place / "small")
    assert tokenizer.chat_template == checkpoint.TEMPLATE
    message = [{"role": "user", "content": "the model"}]
    parents = hub.load(place / "m")[1]
    assert tokenizer.apply_chat_template(message) == parents.apply_chat_template(message)
    assert child.generation_config.temperature == 0.7
