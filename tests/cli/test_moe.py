"""The verbs of mixtures on a tiny checkpoint: upcycled, trained, pruned, merged, dense again; and a fresh one."""

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from nestling.cli import main
from nestling.experts import use_fast_experts
from tests import checkpoint
from tests.cli.workplace import FEW, JOB, TEXT, run
from tests.models import logits

IDS = torch.arange(3, 15)[None]
TRAIN = [
    *("--data", "text.jsonl", "--evaluation_tokens", 64, "--train.steps", 2, "--train.batch_size", 2),
    *("--train.context", 32, "--train.save_every", 1),
]


def load(folder):
    return use_fast_experts(AutoModelForCausalLM.from_pretrained(folder).eval())


def test_a_dense_model_and_back(place, capsys):
    made = run(capsys, "moe", "upcycle", "m", "--num_experts", 4, "--granularity", 2, "--out", "mix")
    assert made["logit_difference"] < 1e-3
    torch.testing.assert_close(logits(load("mix"), IDS), logits(load("m"), IDS), rtol=1e-3, atol=1e-3)
    assert load("mix").config.num_local_experts == 8
    fine = run(capsys, "moe", "upcycle", "mix", "--granularity", 2, "--out", "fine")
    assert fine["logit_difference"] < 1e-3
    trained = run(capsys, "moe", "train", "mix", "--out", "run", *TRAIN)
    assert len(trained["load"]["per_layer"]) == 4
    assert not torch.equal(logits(load("run/model"), IDS), logits(load("mix"), IDS))
    assert run(capsys, "moe", "train", "mix", "--out", "run", *TRAIN) == trained
    few = run(capsys, "moe", "prune", "run/model", "--keep", "0.5x", "--out", "few", *FEW)
    assert few["fewest_tokens"] >= 0
    whole, cut = (few["evaluation"][stage]["text.jsonl"] for stage in ("parent", "pruned"))
    assert whole["loss"] != cut["loss"]
    assert cut["perplexity"] == pytest.approx(math.exp(cut["loss"]))
    again = run(capsys, "eval", "few", *TEXT, "--tokens", 8192)
    assert again["text.jsonl"]["loss"] == pytest.approx(cut["loss"], rel=1e-5)
    assert load("few").config.num_local_experts == 4
    run(capsys, "prune", "run/model", "--shape", "num_local_experts=4", "--out", "same", "--repair", "false", *FEW)
    assert torch.equal(logits(load("same"), IDS), logits(load("few"), IDS))
    run(capsys, "moe", "prune", "run/model", "--keep", 5, "--merge", "true", "--out", "merged", *FEW)
    assert load("merged").config.num_local_experts == 5
    run(capsys, "moe", "prune", "run/model", "--dense", "true", "--out", "dense", *FEW)
    assert load("dense").config.model_type == "mistral"
    run(capsys, "distill", "dense", "--teacher", "run/model", *FEW[:2], "--out", "learned", *JOB[-8:])
    assert not torch.equal(logits(load("learned/model"), IDS), logits(load("dense"), IDS))
    found = run(capsys, "prune", "run/model", "--to", "0.8x", "--axes", "num_local_experts", "--out", "cut", *FEW)
    assert set(found["shape"]) == {"num_local_experts"}


def test_pruning_does_not_need_text_to_measure_on(place, capsys):
    checkpoint.write(place / "mix", "mixtral")
    (place / "one.jsonl").write_text(json.dumps({"text": "the model reads words " * 40}))
    few = ["--keep", 3, "--data", "one.jsonl", "--context", 32, "--calibration_tokens", 128, "--generated", 0]
    assert run(capsys, "moe", "prune", "mix", *few, "--out", "a")["evaluation"] == {"parent": {}, "pruned": {}}
    assert main(["moe", "prune", "mix", *map(str, few), "--out", "b"]) == 0
    assert "is not measured: 'one.jsonl' has no text for the split 'validation'" in " ".join(
        capsys.readouterr().err.split()
    )
    few[3] = "text.jsonl"
    assert (
        run(capsys, "moe", "prune", "mix", *few, "--evaluation_tokens", 0, "--out", "c")["evaluation"]["parent"] == {}
    )


def test_what_a_mixture_has_already_is_not_made_anew(place, capsys):
    checkpoint.write(place / "mix", "mixtral")
    (place / "mix.yaml").write_text(
        "model_type: mixtral\nnum_local_experts: 4\nhidden_size: 32\nnum_hidden_layers: 1\n"
    )
    for arguments, says in (
        (("upcycle", "mix"), "--granularity 2"),
        (("upcycle", "mix", "--granularity", "2", "--mode", "paper"), "mode would do nothing"),
        (("train", "mix.yaml", "--num_experts", "16", *TEXT[:2]), "--set"),
    ):
        assert main(["moe", *arguments, "--out", "x"]) == 2
        assert says in capsys.readouterr().err
    few = run(capsys, "moe", "upcycle", "mix", "--granularity", 2, "--out", "fine")
    assert few["logit_difference"] < 1e-3


def test_a_fresh_fine_grained_mixture(place, capsys):
    (place / "dense.yaml").write_text(
        "model_type: qwen3\nhidden_size: 32\nintermediate_size: 32\nnum_hidden_layers: 2\nnum_attention_heads: 2\n"
        "num_key_value_heads: 1\nhead_dim: 16\n"
    )
    sizes = ("--num_experts", 4, "--num_experts_per_tok", 1, "--granularity", 4)
    run(capsys, "moe", "train", "dense.yaml", *sizes, "--tokenizer", "m", "--out", "run", *TRAIN)
    config = load("run/model").config
    assert (config.num_experts, config.num_experts_per_tok, config.moe_intermediate_size) == (16, 4, 8)
    assert config.norm_topk_prob
    assert (place / "run/report.html").read_text().count('class="loads"') == 2


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("prune", "m", "--keep", "0.5x", *FEW), "no routed experts"),
        (("prune", "m", *FEW), "how many"),
        (("prune", "m", "--keep", "2", "--merge", "true", "--dense", "true", *FEW), "not both"),
        (("prune", "m", "--keep", "2", "--metric", "size", *FEW), "reap"),
        (("upcycle", "m", "--granularity", "7"), "divide"),
        (("upcycle", "m", "--num_experts_per_tok", "9"), "take 1 to 8"),
        (("upcycle", "m", "--granularity", "2", "--shared", "1"), "granite"),
        (("train", "m", *TEXT[:2]), "no routed experts"),
        (("train", "m", "--granularity", "2", "--set", "head_dim=4", *TEXT[:2]), "granularity, set would do nothing"),
    ],
)
def test_what_cannot_be_is_one_sentence(place, capsys, arguments, says):
    assert main(["moe", *map(str, arguments), "--out", "x"]) == 2
    said = capsys.readouterr().err
    assert says in said
    assert "Traceback" not in said


def test_compress_cuts_experts_with_everything_else(place, capsys, brief):
    run(capsys, "moe", "upcycle", "m", "--num_experts", 4, "--out", "mix")
    axes = "num_local_experts,intermediate_size,hidden_size,num_hidden_layers"
    run(capsys, "compress", "mix", "--to", "0.4x", "--axes", axes, "--out", "run", *JOB)
    config = load("run/model").config
    assert config.num_local_experts >= config.num_experts_per_tok
    assert load("run/model").num_parameters() <= 0.4 * load("mix").num_parameters()


def test_a_family_has_experts_as_an_axis(place, capsys):
    run(capsys, "moe", "upcycle", "m", "--num_experts", 4, "--out", "mix")
    few = ["--calibration_tokens", 128, "--generated", 0, "--evaluation_tokens", 64, "--compare", 0]
    train = ["--train.steps", 4, "--train.batch_size", 2, "--train.context", 32, "--train.save_every", 0]
    axes = ["--train.axes", "num_local_experts,intermediate_size"]
    found = run(capsys, "elastic", "train", "mix", *TEXT, "--to", "0.6x", "--out", "run", *axes, *few, *train)
    assert round(found["members"]["0.6x"]["of_parent"], 2) == 0.6
    run(capsys, "elastic", "extract", "run", "0.6x", "small")
    assert load("small").config.num_local_experts <= 4
    assert load("small").num_parameters() < 0.61 * load("mix").num_parameters()
