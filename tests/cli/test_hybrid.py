"""The whole job on a hybrid, and the verbs before and after it."""

from contextlib import nullcontext

import pytest
import torch
from transformers import PreTrainedModel

from nestling import hub
from nestling.cli import main
from nestling.ranking import Ranking
from nestling.recipes import evaluate as evaluating
from tests import checkpoint
from tests.cli.workplace import FEW, JOB, run

PROMPT = torch.arange(3, 9)[None]
GREEDY = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
# Every type of hybrid, with axes that are searched and a shape of odd sizes.
KINDS = {
    "mamba2": ("state_size,num_hidden_layers", "state_size=5,num_hidden_layers=3"),
    "nemotron_h": ("mamba_num_heads,intermediate_size", "mamba_num_heads=4,ssm_state_size=3,num_hidden_layers=3"),
    "nemotron_h-moe": ("mamba_head_dim,moe_intermediate_size", "mamba_head_dim=7,moe_intermediate_size=9"),
    "bamba": ("mamba_d_state,intermediate_size", "mamba_d_state=5,intermediate_size=33,num_key_value_heads=1"),
    "granitemoehybrid": ("mamba_d_state,shared_intermediate_size", "mamba_d_state=3,shared_intermediate_size=31"),
    "granitemoehybrid-moe": ("num_local_experts,intermediate_size", "num_local_experts=5,intermediate_size=9"),
    "falcon_h1": ("mamba_d_head,intermediate_size", "mamba_d_head=7,mamba_n_heads=4,intermediate_size=33"),
    "zamba2": ("mamba_d_state,intermediate_size", "mamba_headdim=4,intermediate_size=33,num_hidden_layers=4"),
    "zamba2-two": ("num_attention_heads,intermediate_size", "num_key_value_heads=1,mamba_d_state=5"),
    "qwen3_5_text": ("linear_value_head_dim,intermediate_size", "linear_num_key_heads=2,linear_value_head_dim=5"),
    "qwen3_5_moe_text": ("linear_value_head_dim,num_experts", "linear_num_value_heads=3,moe_intermediate_size=9"),
    "qwen3_next": ("linear_num_key_heads,moe_intermediate_size", "linear_num_value_heads=3,moe_intermediate_size=8"),
}


def loaded(folder) -> PreTrainedModel:
    """A checkpoint that generates the same with a cache as without."""
    model, _ = hub.load(folder)  # which computes experts of any width; transformers' own on a CPU wants multiples of 4
    assert torch.equal(*(model.generate(PROMPT, use_cache=cache, **GREEDY) for cache in (True, False)))
    return model


def test_kinds_of_layers_and_states_are_told_apart(place, capsys):
    checkpoint.write(place / "h", "nemotron_h")
    found = run(capsys, "inspect", "h", "--shape", "mamba_num_heads=4,ssm_state_size=3")
    assert {kind: row["layers"] for kind, row in found["kinds"].items()} == {"mamba": 2, "mlp": 1, "attention": 1}
    assert found["shape_cost"]["state_bytes"] < found["cost"]["state_bytes"] == found["kinds"]["mamba"]["state_bytes"]
    run(capsys, "rank", "h", "--out", "h.safetensors", "--layers", "output_error", *FEW)
    scores = Ranking.load(place / "h.safetensors").scores
    assert [len(layer) for layer in scores["mamba_head_dim"]] == [54, 0, 0, 54]


@pytest.mark.parametrize("variant", KINDS)
def test_every_verb_on_every_hybrid(variant, place, capsys, brief):
    checkpoint.write(place / "h", variant)
    axes, shape = KINDS[variant]
    found = run(capsys, "inspect", "h", "--shape", shape)
    assert found["shape_cost"]["params"] < found["cost"]["params"]
    run(capsys, "rank", "h", "--out", "r", *FEW)
    searching = ("--axes", axes, "--finalists", 2, "--ranking", "r", "--out", "found")
    assert run(capsys, "search", "h", "--to", "0.97x", *searching, *FEW)["candidates"]
    made = run(capsys, "prune", "h", "--shape", shape, "--ranking", "r", "--out", "child", *FEW)
    assert made["cost"]["params"] == found["shape_cost"]["params"] == loaded(place / "child").num_parameters()
    run(capsys, "distill", "child", "--teacher", "h", *FEW[:2], "--out", "trained", *JOB[-8:])
    assert loaded(place / "trained" / "model").num_parameters() == made["cost"]["params"]
    whole = run(capsys, "compress", "h", "--to", "0.97x", "--axes", axes, "--out", "run", *JOB)
    child = loaded(place / "run" / "model")
    assert child.num_parameters() == whole["child"]["cost"]["params"] <= 0.97 * whole["parent"]["cost"]["params"]
    family = run(capsys, "family", "h", "--to", "0.97x", "--axes", axes, "--out", "kin", *JOB)
    for member in family["members"]:
        assert loaded(place / "kin" / member["model"]).num_parameters() == member["cost"]["params"]
    assert run(capsys, "report", "run") == {"report": "run/report.html"}
    assert "state" in (place / "run" / "report.html").read_text()
    timed = run(capsys, "bench", "h,child", "--prompt_tokens", 4, "--new_tokens", 1, "--rounds", 1)
    assert all(speed["decode_tokens_per_s"] > 0 for speed in timed.values())


def test_mixers_are_compiled_where_it_is_asked_for_and_can_be(place, capsys, monkeypatch):
    checkpoint.write(place / "h", "nemotron_h")
    asked = []
    monkeypatch.setattr(evaluating, "compiled_steps", lambda model: nullcontext(asked.append(type(model).__name__)))
    timing = ("bench", "h", "--prompt_tokens", 4, "--new_tokens", 1, "--rounds", 1)
    run(capsys, *timing)
    assert not asked
    monkeypatch.setattr(evaluating.shutil, "which", lambda name: name)
    assert run(capsys, *timing, "--compiled", "true")["h"]["decode_tokens_per_s"] > 0
    assert asked == ["NemotronHForCausalLM"]
    monkeypatch.setattr(evaluating.shutil, "which", lambda name: None)
    assert main([*map(str, timing), "--compiled", "true"]) == 2
    assert "needs a C++ compiler" in capsys.readouterr().err
