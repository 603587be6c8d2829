"""Out of the house: children load in plain transformers without this package, and as GGUF files."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from nestling import hub
from nestling.anatomy import Anatomy
from nestling.cli import main
from nestling.errors import CheckpointError, UnsupportedArchitecture
from nestling.hub.to_gguf import in_pairs, save_gguf
from nestling.surgery import prune
from tests.models import VARIANTS, VOCAB, logits, random_ranking, tiny, token_batches

IDS = token_batches(1)[0]["input_ids"]
CUTS = {
    "llama": {"hidden_size": 36, "intermediate_size": 30, "num_hidden_layers": 3},
    "llama-tied": {"num_attention_heads": 4, "intermediate_size": 12},
    "llama-mha": {"num_attention_heads": 4, "num_key_value_heads": 4},
    "mistral": {"hidden_size": 36, "intermediate_size": 17},
    "qwen2": {"intermediate_size": 8, "num_hidden_layers": 2},
    "qwen3": {"intermediate_size": 8, "hidden_size": 40},
}


def child(variant):
    overrides = {"mistral": {"sliding_window": None}, "qwen3": {"head_dim": 128}}.get(variant, {})
    model = tiny(variant, dtype=torch.float32, **overrides)
    return prune(model, random_ranking(model), CUTS[variant])


@pytest.mark.parametrize("variant", list(CUTS))
def test_a_gguf_file_read_by_transformers_is_the_child(variant, tmp_path):
    model = child(variant)
    save_gguf(model, tmp_path / "child.gguf")
    found, _ = hub.load(tmp_path / "child.gguf")
    torch.testing.assert_close(logits(found, IDS), logits(model, IDS), rtol=1e-4, atol=1e-4)
    assert [path.name for path in tmp_path.iterdir()] == ["child.gguf"]


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 2e-3), ("bfloat16", 2e-2)])
def test_half_precision_rounds_and_no_more(dtype, tolerance, tmp_path):
    model = child("llama")
    save_gguf(model, tmp_path / "child.gguf", dtype=dtype)
    found, _ = hub.load(tmp_path / "child.gguf", dtype="float32")
    for name, value in model.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], value, rtol=tolerance, atol=tolerance * 0.1)


def test_pairs_matter():
    """Negative control: without them queries and keys would be turned by the wrong angles."""
    rows = torch.arange(12).view(12, 1)
    assert in_pairs(rows, 2).flatten().tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]


@pytest.mark.parametrize(
    ("variant", "overrides", "match"),
    [
        ("granite", {}, "'granite' is not exported"),
        ("mistral", {}, "sliding window of 6"),
        ("llama-biases", {}, "MLP has biases"),
        ("qwen3", {"attention_bias": True}, "attention has biases"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "are scaled"),
    ],
)
def test_what_llama_cpp_has_otherwise_is_refused(variant, overrides, match, tmp_path):
    with pytest.raises(UnsupportedArchitecture, match=match):
        save_gguf(tiny(variant, **overrides), tmp_path / "child.gguf")
    assert not list(tmp_path.iterdir())


def test_layers_of_different_size_are_refused(tmp_path):
    model = tiny("llama")
    with pytest.raises(UnsupportedArchitecture, match="layers differ in size"):
        save_gguf(prune(model, random_ranking(model), {"intermediate_size": [10, 20, 30, 40]}), tmp_path / "a.gguf")


DENSE = {
    "hidden_size": 36,
    "intermediate_size": 30,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 3,
}
EXPERTS = {"num_experts": 4, "moe_intermediate_size": 8}
# Cuts of every axis that the architecture has.
WHOLE_CUTS = {
    **dict.fromkeys(("llama-tied", "llama-biases", "mistral", "qwen2", "qwen3", "olmo2", "phi3"), DENSE),
    **dict.fromkeys(("gemma3_text-tied", "granite", "nemotron"), DENSE),
    "nemotron_h": DENSE | {"mamba_num_heads": 4, "mamba_head_dim": 7, "ssm_state_size": 3},
    "bamba": DENSE | {"mamba_n_heads": 6, "mamba_d_head": 6, "mamba_d_state": 4},
    "qwen3_moe": DENSE | EXPERTS,
    "mixtral": DENSE | {"num_local_experts": 4, "intermediate_size": 8},
}
PLAIN = """
import sys
sys.modules["nestling"] = None  # any import of it fails
import torch
from transformers import AutoModelForCausalLM
from safetensors.torch import load_file
for folder in sys.argv[1:]:
    expected = load_file(folder + "/expected.safetensors")
    ids = expected["ids"]
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    cached = model.generate(ids[:1], max_new_tokens=4, do_sample=False)
    plain = model.generate(ids[:1], max_new_tokens=4, do_sample=False, use_cache=False)
    assert torch.equal(cached, plain)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, expected["logits"], rtol=1e-4, atol=1e-4, msg=folder)
assert not any(name.startswith("nestling.") for name in sys.modules)
"""


def test_children_load_where_this_package_is_not(tmp_path):
    """In a fresh interpreter that cannot import it: cut on all axes at once, the same logits, cached or not."""
    for variant, shape in WHOLE_CUTS.items():
        model = tiny(variant, dtype=torch.float32)
        assert set(shape) == set(Anatomy.of(model).fields)
        small = prune(model, random_ranking(model), shape)
        hub.save(small, tmp_path / variant)
        save_file({"ids": IDS, "logits": logits(small, IDS)}, tmp_path / variant / "expected.safetensors")
        config = json.loads((tmp_path / variant / "config.json").read_text())
        assert config["model_type"] == VARIANTS[variant][0]
        assert config["architectures"] == [type(model).__name__]
        assert "auto_map" not in config
        assert not any(key.startswith(("nestling", "layer_shapes")) for key in config)
    done = subprocess.run(
        [sys.executable, "-c", PLAIN, *(str(tmp_path / variant) for variant in WHOLE_CUTS)],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_verb(tmp_path, capsys):
    hub.save(child("llama"), tmp_path / "model")
    assert main(["export", str(tmp_path / "model"), str(tmp_path / "a.gguf"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["bytes"] == (tmp_path / "a.gguf").stat().st_size
    for arguments, match in (([str(tmp_path / "a.gguf")], "exists"), ([str(tmp_path / "a.bin")], "not a .gguf file")):
        assert main(["export", str(tmp_path / "model"), *arguments]) == 2
        assert match in capsys.readouterr().err


def test_a_tokenizer_comes_back_with_its_chat_template(tmp_path):
    from nestling.data import train_tokenizer

    (tmp_path / "text.txt").write_text("the cat sat on the mat, 12 times; the dog did not.\n" * 200)
    tokenizer = train_tokenizer(tmp_path / "text.txt", 300)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    model = tiny("llama", dtype=torch.float32, vocab_size=320)
    save_gguf(model, tmp_path / "child.gguf", tokenizer)
    _, found = hub.load(tmp_path / "child.gguf")
    text = "the dog sat 12 times on the mat; caf\u00e9"
    assert found(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert found.chat_template == tokenizer.chat_template
    assert VOCAB < 300


def test_a_tokenizer_that_llama_cpp_does_not_know_is_refused(tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    with pytest.raises(CheckpointError, match="no byte-level BPE"):
        save_gguf(child("llama"), tmp_path / "child.gguf", words)
    assert not list(tmp_path.iterdir())
