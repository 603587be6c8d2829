"""Every kind of bad input: one sentence with the thing, its value and the remedy, exit code 2, nothing left behind."""

import json
import shutil
from types import SimpleNamespace

import pytest

from nestling.cli import main
from nestling.cost import cost_of_form
from tests import checkpoint
from tests.cli.workplace import FEW, JOB, TEXT, files
from tests.data import toy


def _cut_off(place):
    weights = place / "m" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])


def _bad_config(place):
    (place / "m" / "config.json").write_text('{"model_type": ')


def _no_tokenizer(place):
    for file in (place / "m").glob("*token*"):
        file.unlink()


def _other_tokenizer(place):
    toy.tokenizer().save_pretrained(place / "m")


def _ranking_of_another(place):
    checkpoint.write(place / "other", intermediate_size=40)
    assert main(["rank", "other", "--out", "other.safetensors", *FEW]) == 0


def _text(text):
    return lambda place: (place / "text.jsonl").write_text(text)


def _file(name, text="x"):
    def write(place):
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_text(text)

    return write


HALF = ["prune", "m", "--to", "0.5x", *FEW]
MODEL = {
    "missing folder": (["inspect", "no/such/model"], None, "'no/such/model' does not exist: give a model folder"),
    "no hub": (["inspect", "owner/model"], None, "'owner/model' is no folder .* give a local folder"),
    "truncated weights": (
        ["prune", "m", "--to", "0.5x", *FEW],
        _cut_off,
        "'m/model.safetensors' is cut off .* copy or",
    ),
    "wrong JSON": (["inspect", "m"], _bad_config, "'m/config.json' cannot be read as JSON .* copy it again"),
    "no tokenizer": (["rank", "m", *FEW], _no_tokenizer, "'m' has no tokenizer.* add its tokenizer files"),
    "another tokenizer": (
        ["rank", "m", *FEW],
        _other_tokenizer,
        "tokenizer has 300 tokens and the model 97 .* give the",
    ),
    "dtype": (["rank", "m", "--dtype", "int8", *FEW], None, "dtype 'int8' is not known: use auto, float32"),
    "device": (["rank", "m", "--device", "cuda:9", *FEW], None, "device 'cuda:9' cannot be used here"),
}
TARGET = {
    "larger than the parent": (
        ["prune", "m", "--to", "2x", *FEW],
        None,
        "params=2x is not below the parent's 59,664: ask",
    ),
    "shape larger": (
        ["prune", "m", "--shape", "intermediate_size=99", *FEW],
        None,
        "intermediate_size=99 is larger than",
    ),
    "no shape meets": (
        ["compress", "m", "--to", "0.01x", *JOB],
        None,
        r"no shape of this model keeps 0\.01x: .* ask for a",
    ),
    "no unit": (["search", "m", "--to", "5Q", *FEW], None, "'5Q' is not a target for params: write 0.5x"),
    "no limit": (["search", "m", "--to", "ram=5G", *FEW], None, "'ram' is not a limit: choose from params"),
    "negative target": (["prune", "m", "--to=-0.5x", *FEW], None, "'-0.5x' is not a target for params: write 0.5x"),
    "latency without unit": (
        ["prune", "m", "--to", "latency=5", *FEW],
        None,
        "'5' is not a target for latency: .* 20ms",
    ),
    "axis": (["prune", "m", "--to", "0.5x", "--axes", "ffn", *FEW], None, "'ffn' is not an axis of this model: choose"),
    "axis of a shape": (
        ["prune", "m", "--shape", "ffn=3", *FEW],
        None,
        "'ffn' is not an axis of this model: choose from",
    ),
    "refused by the config": (
        ["prune", "m", "--shape", "hidden_size=41", *FEW],
        None,
        "hidden_size=41 .* nearest allowed",
    ),
    "negative size": (
        ["inspect", "m", "--shape", "hidden_size=-4"],
        None,
        "'hidden_size=-4' is not a size: write FIELD=",
    ),
    "shape file": (
        ["prune", "m", "--shape", "s.json", *FEW],
        _file("s.json", "[1"),
        "'s.json' is not a shape file .* expected",
    ),
    "no size": (["prune", "m", "--shape", "", *FEW], None, "'' names no size: write FIELD=NUMBER"),
    "no experts": (
        ["moe", "train", "m", *TEXT[:2]],
        None,
        "has no routed experts: make some with nestling moe upcycle",
    ),
    "both": (
        ["prune", "m", "--shape", "hidden_size=42", "--to", "0.5x"],
        None,
        "either --to or --shape: say --to 0.5x",
    ),
}
CHOICE = {
    "metric": (["rank", "m", "--metric", "magic", *FEW], None, "'magic' is not an importance metric: choose from"),
    "layer metric": (
        ["compress", "m", "--layers", "magic", *JOB],
        None,
        "'magic' is not a layer metric: choose from block",
    ),
    "aggregation": (
        ["rank", "m", "--over_batch", "median", *FEW],
        None,
        "'median' is not an aggregation: choose from mean",
    ),
    "merge": ([*HALF, "--merge", "median"], None, "merge='median' is not known: choose none, paper"),
    "loss": (["compress", "m", *JOB, "--distill.loss", "magic"], None, "loss 'magic' is not known: choose from"),
    "state": (
        ["distill", "m", "--teacher", "m", *TEXT[:2], '--distill.states=["x"]'],
        None,
        "state 'x' is not known: choose",
    ),
    "no teacher": (["distill", "m"], None, "distill needs a model to learn from: give --teacher"),
    "nothing to evaluate": (["eval", "m"], None, "eval has nothing to measure: give --data"),
    "nothing to bench": (["bench", ""], None, "bench has nothing to measure: give at least one model"),
    "greedy": (
        ["rank", "m", "--greedy_layers", "1", *FEW],
        None,
        "greedy_layers needs a metric that .* choose from perp",
    ),
}
DATA = {
    "missing": (["compress", "m", "--data", "no.jsonl"], None, "'no.jsonl' does not exist: give a .txt"),
    "empty": (["rank", "m", *FEW], _text(""), "'text.jsonl' has no text for the split 'train': give"),
    "too short": (["rank", "m", *FEW], _text('{"text": "a"}\n' * 3), "has fewer than 32 tokens .* give more text"),
    "no validation": (
        ["compress", "m", *JOB],
        _text(json.dumps({"text": "a " * 99})),
        "no text for the split 'validation'",
    ),
    "no JSON": (["rank", "m", *FEW], _text('{"text": \n'), "line 1 of 'text.jsonl' is not JSON"),
    "no column": (["rank", "m", *FEW], _text('{"body": "a"}\n'), "no column 'text' .* rename the one"),
    "text that is none": (
        ["rank", "m", *FEW],
        _text('{"text": 5}\n'),
        "line 1 of 'text.jsonl' has a 'text' of type int",
    ),
    "too short to train on": (
        ["compress", "m", *JOB, "--distill.context", "9999"],
        None,
        "has fewer than 9999 tokens for the split 'train'",
    ),
    "evaluation data": (
        ["compress", "m", *JOB, "--evaluate_on", "no.txt"],
        None,
        "'no.txt' does not exist: give a .txt",
    ),
    "pairs": (["compress", "m", *JOB, "--pairs", "no.jsonl"], None, "'no.jsonl' is no .jsonl file and no folder"),
    "split": (["eval", "m", "--data", "text.jsonl", "--split", "dev"], None, "split 'dev' is not known: use train"),
}
NUMBER = {
    "tokens": (
        ["rank", "m", *TEXT, "--calibration_tokens", "-5"],
        None,
        "-5 tokens are not possible: ask for at least 1",
    ),
    "context": (
        ["rank", "m", "--data", "text.jsonl", "--context", "-3"],
        None,
        "context -3 is not possible: a row needs",
    ),
    "no device": (["rank", "m", *FEW, "--device", "meta"], None, "device 'meta' holds no numbers .* use cpu"),
    "rounds of ranking": (["rank", "m", *FEW, "--rounds", "0"], None, "rounds 0 is not possible: give at least 1"),
    "nothing to limit": (
        ["search", "m", *FEW, "--to", "state_bytes=0.5x"],
        None,
        "this model has no state_bytes that could be fewer: leave",
    ),
    "greedy layers": (
        ["rank", "m", *FEW, "--layers", "kl", "--greedy_layers", "99"],
        None,
        "greedy_layers 99 is not possible in a model with 4 layers.*give at most 3",
    ),
    "batch": (["rank", "m", *FEW, "--batch_size", "-1"], None, "batch_size -1 is not possible: give at least 1"),
    "finalists": ([*HALF, "--finalists", "0"], None, "finalists 0 is not possible: give at least 1"),
    "calibration": (
        ["compress", "m", *TEXT, "--calibration_tokens", "0"],
        None,
        "calibration tokens 0 is not possible",
    ),
    "evaluation": (
        ["compress", "m", *JOB[:-2], "--evaluation_tokens", "0"],
        None,
        "evaluation_tokens 0 is not possible",
    ),
    "distillation": (
        ["compress", "m", *TEXT, "--distill.tokens", "-1"],
        None,
        "tokens -1 is not possible: give at least",
    ),
    "learning rate": (
        ["compress", "m", *TEXT, "--distill.learning_rate", "-1"],
        None,
        "learning_rate -1.0 is not possible",
    ),
    "generated": (
        ["rank", "m", *TEXT, "--generated", "2"],
        None,
        "generated 2.0 is not a part of the text: give a number",
    ),
    "seed": (["rank", "m", *FEW, "--seed", "-1"], None, "seed -1 is not possible: give a number from 0 to 4294967295"),
    "rows of training": (
        ["compress", "m", *JOB, "--distill.context", "1"],
        None,
        "context 1 is not possible: give at least 2",
    ),
    "beta": (["compress", "m", *JOB, "--distill.beta2", "1"], None, "beta2 1.0 do not make an AdamW: give .* below 1"),
    "micro-batches": (
        ["compress", "m", *JOB, "--distill.micro_batch_size", "3"],
        None,
        "micro_batch_size 3 does not divide the 2 sequences",
    ),
    "vocabulary": (["pretrain", "dense-3m", *TEXT[:2], "--vocab_size", "9"], None, "vocab_size 9 is not possible"),
    "rows of members": (
        ["elastic", "train", "m", *FEW, "--to", "0.8x", "--train.context", "9999"],
        None,
        "has fewer than 9999 tokens for the split 'train'",
    ),
    "rows of a retrofit": (
        ["dmc", "retrofit", "m", *TEXT[:2], "--train.micro_batch_size", "3", "--train.context", "32"],
        None,
        "micro_batch_size 3 does not divide the 8 sequences",
    ),
    "no pairs": (["eval", "m", "--pairs", "p", "--limit", "0"], None, "limit 0 is not possible: give at least 1"),
    "costs": (["inspect", "m", "--batch", "0"], None, "batch 0 is not possible: give at least 1"),
    "rounds": (["bench", "m", "--rounds", "0"], None, "rounds 0 is not possible: give at least 1"),
    "no number": (
        ["rank", "m", "--calibration_tokens", "abc"],
        None,
        "--calibration_tokens: expected int, got abc: see nestling rank --help",
    ),
}
PLACE = {
    "folder in use": (
        ["prune", "m", "--to", "0.5x", "--out", "m", *FEW],
        None,
        "'m' exists: name another folder with --out",
    ),
    "not a run": (
        ["compress", "m", "--out", "mine", *JOB],
        _file("mine/thesis"),
        "'mine' is not empty and holds no run: name",
    ),
    "file for a run": (["compress", "m", "--out", "f", *JOB], _file("f"), "'f' is a file: name a folder with --out"),
    "below a file": (
        ["rank", "m", "--out", "f/r", *FEW],
        _file("f"),
        "'f/r' cannot be written .* name another file with",
    ),
    "folder for a file": (
        ["rank", "m", "--out", "m", *FEW],
        None,
        "'m' cannot be written .it is a folder.: name another",
    ),
    "file for a model": ([*HALF, "--out", "f"], _file("f"), "'f' is a file: name a folder with --out"),
    "model below a file": (
        [*HALF, "--out", "f/child"],
        _file("f"),
        "'f/child' cannot be written .*name another folder",
    ),
    "no model to replace": (
        [*HALF, "--out", "mine", "--overwrite"],
        _file("mine/thesis"),
        "'mine' holds no model that could be replaced: name",
    ),
    "export below a file": (["export", "m", "f/m.gguf"], _file("f"), "'f/m.gguf' cannot be written .* name another"),
    "no run to report": (["report", "m"], None, "'m' holds no finished run: give the folder that"),
    "ranking of another model": (
        ["prune", "m", "--to", "0.5x", "--ranking", "other.safetensors", *FEW],
        _ranking_of_another,
        r"the ranking scores intermediate_size=\[40.* rank this model anew",
    ),
    "no ranking": ([*HALF, "--ranking", "no.safetensors"], None, "'no.safetensors' is not a ranking .* make one with"),
}
LINE = {
    "no verb": ([], None, 'expected "verb" to be one of .* see nestling --help'),
    "unknown verb": (["squeeze", "m"], None, "'squeeze' is not a verb: there are inspect, .*see nestling --help"),
    "mistyped verb": (["comprss", "m"], None, "'comprss' is not a verb: perhaps compress was meant"),
    "half a verb": (["dmc", "shwo"], None, "'dmc' is not a verb: perhaps dmc show was meant"),
    "unknown option": (
        ["rank", "m", "--sideways", "3"],
        None,
        "unrecognized arguments: --sideways 3: see nestling rank --help",
    ),
    "mistyped option": (
        ["rank", "m", "--calibration-tokns=3"],
        None,
        "--calibration-tokns=3: perhaps --calibration_tokens was meant, see",
    ),
    "option of nested settings": (
        ["distill", "m", "--learning_rate", "3"],
        None,
        "--learning_rate 3: perhaps --distill.learning_rate was meant, see nestling distill --help",
    ),
    "no model": (["rank"], None, "arguments are required: rank.model: see nestling rank --help"),
    "no config": (
        ["rank", "--config", "no.yaml"],
        None,
        "--config: File does not exist: .*no.yaml.* see nestling rank",
    ),
    "bad config": (["rank", "--config", "c.yaml"], _file("c.yaml", "tokens: ["), "parsing config"),
    "unknown setting": (
        ["rank", "--config", "c.yaml"],
        _file("c.yaml", "model: m\ncontxt: 3"),
        "option 'contxt': perhaps context was meant",
    ),
}
CASES = {
    f"{kind}: {name}": case
    for kind, cases in (
        ("model", MODEL),
        ("target", TARGET),
        ("choice", CHOICE),
        ("data", DATA),
        ("number", NUMBER),
        ("place", PLACE),
        ("line", LINE),
    )
    for name, case in cases.items()
}


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_one_sentence(name, place, capsys):
    import re

    arguments, prepare, expected = CASES[name]
    if prepare is not None:
        prepare(place)
    before = files(place)
    capsys.readouterr()
    assert main(arguments) == 2
    said = capsys.readouterr()
    lines = said.err.strip().splitlines()
    assert len(lines) == 1, said.err
    assert re.search(f"^nestling: .*{expected}", lines[0]), lines[0]
    assert said.out == ""
    assert files(place) == before


def test_the_folder_of_these_tests_is_sound(place, capsys):
    """The negative control: with nothing wrong, the command line of the first cases works."""
    assert main(["prune", "m", "--to", "0.5x", "--out", "child", *FEW]) == 0
    assert {"child/config.json", "child/model.safetensors"} <= files(place)
    shutil.rmtree(place / "child")


@pytest.mark.parametrize("words", [["search"], ["prune"], ["compress"], ["family"]])
def test_a_latency_that_no_shape_keeps_leaves_no_folder(place, capsys, monkeypatch, words):
    """Times are made up here: measuring is tested with the search."""
    times = SimpleNamespace(milliseconds=lambda anatomy, form: 1 + cost_of_form(anatomy, form).params / 1e9)
    monkeypatch.setattr("nestling.recipes.shapes.latency.table", lambda *arguments: times)
    assert main([*words, "m", *FEW, "--to", "latency=0.5x", "--out", "out"]) == 2
    assert "no shape of this model keeps latency=0.5x" in capsys.readouterr().err
    assert not (place / "out").exists()
