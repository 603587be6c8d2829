"""The whole job on a hybrid, and the verbs before and after it."""

import torch
from transformers import AutoModelForCausalLM

from nestling.ranking import Ranking
from tests import checkpoint
from tests.cli.workplace import FEW, JOB, run

PROMPT = torch.arange(3, 9)[None]


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
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    cached, whole = (child.generate(PROMPT, use_cache=cache, **settings) for cache in (True, False))
    assert torch.equal(cached, whole)
    assert run(capsys, "report", "run") == {"report": "run/report.html"}
    assert "state" in (place / "run" / "report.html").read_text()
    models = ("bench", "h,run/model", "--prompt_tokens", 4, "--new_tokens", 1, "--rounds", 1)
    assert all(speed["decode_tokens_per_s"] > 0 for speed in run(capsys, *models).values())
