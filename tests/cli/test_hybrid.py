"""The whole job on a hybrid, and the verbs before and after it."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from nestling.ranking import Ranking
from tests import checkpoint
from tests.cli.workplace import FEW, JOB, run

PROMPT = torch.arange(3, 9)[None]
GREEDY = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
# Every type of hybrid, with axes that are cut and a shape of odd sizes.
KINDS = {
    "mamba2": ("state_size,num_hidden_layers", "state_size=5,num_hidden_layers=3"),
    "bamba": ("mamba_d_state,intermediate_size", "mamba_d_state=5,intermediate_size=33,num_key_value_heads=1"),
    "granitemoehybrid": ("mamba_d_state,shared_intermediate_size", "mamba_d_state=3,shared_intermediate_size=31"),
    "falcon_h1": ("mamba_d_head,intermediate_size", "mamba_d_head=7,mamba_n_heads=4,intermediate_size=33"),
    "qwen3_5_text": ("linear_value_head_dim,intermediate_size", "linear_num_key_heads=2,linear_value_head_dim=5"),
    "qwen3_next": ("linear_num_key_heads,moe_intermediate_size", "linear_num_value_heads=3,moe_intermediate_size=8"),
}


def test_a_hybrid_is_inspected_ranked_compressed_reported_and_timed(place, capsys, brief):
    checkpoint.write(place / "h", "nemotron_h")
    found = run(capsys, "inspect", "h", "--shape", "mamba_num_heads=4,ssm_state_size=3")
    assert {kind: row["layers"] for kind, row in found["kinds"].items()} == {"mamba": 2, "mlp": 1, "attention": 1}
    assert found["shape_cost"]["state_bytes"] < found["cost"]["state_bytes"] == found["kinds"]["mamba"]["state_bytes"]
    run(capsys, "rank", "h", "--out", "h.safetensors", "--layers", "output_error", *FEW)
    scores = Ranking.load(place / "h.safetensors").scores
    assert [len(layer) for layer in scores["mamba_head_dim"]] == [54, 0, 0, 54]
    axes = ("--axes", "mamba_num_heads,intermediate_size,num_hidden_layers")
    summary = run(capsys, "compress", "h", "--to", "0.8x", "--out", "run", *JOB, *axes)
    child = AutoModelForCausalLM.from_pretrained(place / "run" / "model")
    assert child.num_parameters() == summary["child"]["cost"]["params"] <= 0.8 * summary["parent"]["cost"]["params"]
    assert torch.equal(*(child.generate(PROMPT, use_cache=cache, **GREEDY) for cache in (True, False)))
    assert run(capsys, "report", "run") == {"report": "run/report.html"}
    assert "state" in (place / "run" / "report.html").read_text()
    models = ("bench", "h,run/model", "--prompt_tokens", 4, "--new_tokens", 1, "--rounds", 1)
    assert all(speed["decode_tokens_per_s"] > 0 for speed in run(capsys, *models).values())


@pytest.mark.parametrize("variant", KINDS)
def test_every_hybrid_is_searched_pruned_and_timed(variant, place, capsys, brief):
    checkpoint.write(place / "h", variant)
    axes, shape = KINDS[variant]
    found = run(capsys, "inspect", "h", "--shape", shape)
    assert found["shape_cost"]["params"] < found["cost"]["params"]
    searched = run(capsys, "search", "h", "--to", "0.97x", "--axes", axes, "--finalists", 2, "--out", "found", *FEW)
    assert searched["candidates"]
    made = run(capsys, "prune", "h", "--shape", shape, "--out", "child", *FEW)
    assert made["cost"]["params"] == found["shape_cost"]["params"]
    child = AutoModelForCausalLM.from_pretrained(place / "child")
    assert torch.equal(*(child.generate(PROMPT, use_cache=cache, **GREEDY) for cache in (True, False)))
    timed = run(capsys, "bench", "h,child", "--prompt_tokens", 4, "--new_tokens", 1, "--rounds", 1)
    assert all(speed["decode_tokens_per_s"] > 0 for speed in timed.values())


def test_a_family_of_hybrids(place, capsys, brief):
    checkpoint.write(place / "h", "qwen3_5_text")
    axes = ("--axes", "linear_num_key_heads,intermediate_size")
    summary = run(capsys, "family", "h", "--to", "0.9x", "--out", "run", *axes, *JOB)
    assert [member["name"] for member in summary["members"]] == ["0.9x"]
    for member in summary["members"]:
        child = AutoModelForCausalLM.from_pretrained(place / "run" / member["model"])
        assert child.num_parameters() == member["cost"]["params"]
