"""Pretraining: the loss and its gradients, resuming, architectures from files, tokenizers from data, the verb whole."""

import json

import pytest
import torch
import torch.nn.functional as F
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from nestling import hub
from nestling.cli import main
from nestling.data import documents, train_tokenizer
from nestling.errors import CheckpointError, DataError, NestlingError
from nestling.hub.load import tokenizer_beside
from nestling.pretrain import PRESETS, PretrainSettings, architecture_config, build, pretrain
from nestling.recipes.pretrain import PretrainVerb, pretrain_model
from nestling.recipes.scratch import fields
from nestling.train import CausalLM
from nestling.train.rows import shifted
from tests.models import in_float64, tiny, token_batches
from tests.several import together

SMALL = {
    "model_type": "nemotron_h",
    "hidden_size": 16,
    "hybrid_override_pattern": "M-*",
    "intermediate_size": 20,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "mamba_num_heads": 4,
    "mamba_head_dim": 6,
    "n_groups": 2,
    "ssm_state_size": 4,
    "chunk_size": 8,
}


@pytest.mark.parametrize("variant", ["llama-tied", "nemotron_h", "mamba2"])
def test_loss_and_gradients_are_those_of_plain_cross_entropy(variant):
    model, ids = tiny(variant), token_batches(1)[0]["input_ids"]
    with in_float64():
        expected = F.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        expected.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        model.zero_grad()
        found = CausalLM(model)(ids, shifted(ids, torch.ones_like(ids).bool()))["loss"]
        found.backward()
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-8, atol=1e-11)


def test_learns_a_pattern():
    model = build(architecture_config("hybrid-2m", {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32}))
    batch = {"input_ids": (torch.arange(64).view(4, 16) * 5) % 32}
    before = model(batch["input_ids"], labels=batch["input_ids"]).loss.item()
    pretrain(model, [batch], steps=50, batch_size=4, learning_rate=1e-2)
    assert model(batch["input_ids"], labels=batch["input_ids"]).loss.item() < 0.5 * before
    assert not model.training


def test_an_interrupted_run_continues_to_the_same_weights(tmp_path, monkeypatch):
    settings = {"steps": 6, "batch_size": 2, "save_every": 2}
    batches, file = token_batches(8, seq=12), write(tmp_path / "a.yaml", SMALL)

    def fresh():
        return build(architecture_config(file, {"vocab_size": 97}), seed=3)

    whole = pretrain(fresh(), batches, **settings)
    with monkeypatch.context() as broken:
        broken.setattr(CausalLM, "begin", fails_in_step(5))
        with pytest.raises(RuntimeError, match="power"):
            pretrain(fresh(), batches, run_dir=tmp_path / "run", **settings)
    again = pretrain(fresh(), batches, run_dir=tmp_path / "run", **settings)
    records = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert records == [1, 2, 3, 4, 5, 6]
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))


def test_vectors_do_not_decay():
    model = build(architecture_config("hybrid-2m", {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32}))
    mixer = model.model.layers[0].mixer
    rates, weight = mixer.A_log.detach().clone(), mixer.in_proj.weight.detach().clone()
    silent = {"input_ids": torch.zeros(2, 8, dtype=torch.long), "labels": torch.full((2, 8), -100)}
    pretrain(model, [silent], steps=3, batch_size=2, weight_decay=0.5, learning_rate=0.1, warmup=0.0)
    assert torch.equal(mixer.A_log, rates)
    assert mixer.in_proj.weight.norm() < 0.95 * weight.norm()


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_size_in_their_name(name):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(architecture_config(name, {"vocab_size": 2048}))
    millions = float(name.rpartition("-")[2].removesuffix("m"))
    assert model.num_parameters() / 1e6 == pytest.approx(millions, rel=0.1)


def test_architectures_from_yaml_json_and_checkpoints(tmp_path):
    file = write(tmp_path / "small.yaml", SMALL)
    (tmp_path / "small.json").write_text(json.dumps(SMALL))
    model = build(architecture_config(file, {"vocab_size": 50}))
    model.save_pretrained(tmp_path / "model")
    found = [
        architecture_config(source, {"vocab_size": 50, "hidden_size": 24}).to_diff_dict()
        for source in (file, tmp_path / "small.json", tmp_path / "model")
    ]
    for config in found:
        assert (config["model_type"], config["hidden_size"], config["mamba_num_heads"]) == ("nemotron_h", 24, 4)


@pytest.mark.parametrize("variant", ["qwen2-sliding", "bamba", "smollm3"])
def test_fewer_layers_of_a_checkpoint_take_along_what_is_listed_of_them(variant, tmp_path):
    tiny(variant).save_pretrained(tmp_path)
    config = architecture_config(tmp_path, {"num_hidden_layers": 3, "vocab_size": 50})
    assert (config.num_hidden_layers, config.vocab_size) == (3, 50)
    build(config)(input_ids=torch.arange(5)[None])
    if variant != "bamba":  # it lists its layers with attention
        with pytest.raises(CheckpointError, match="must be equal to"):
            architecture_config(tmp_path, {"num_hidden_layers": 6})


def test_same_seed_same_weights():
    one, same, other = (build(architecture_config("hybrid-2m", {"vocab_size": 32}), seed=seed) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)


def test_a_tokenizer_of_the_data_writes_every_text(tmp_path):
    corpus = tmp_path / "text.txt"
    corpus.write_text("def f(x):\n    return x + 1\n" * 200)
    made, again = (train_tokenizer(corpus, 300) for _ in range(2))
    assert len(made) <= 300
    assert made.get_vocab() == again.get_vocab()
    for text in ("def f(x):\n    return x", "Grüße, 世界 \u2603\n\t"):
        assert made.decode(made(text)["input_ids"]) == text
    assert len(made("return x + 1")["input_ids"]) < len("return x + 1") / 2
    assert "def" in next(documents(corpus))
    with pytest.raises(DataError, match="258"):
        train_tokenizer(corpus, 100)


def test_a_model_learns_from_the_tokenizer_that_is_read_beside_it(tmp_path):
    """The auto classes give every Qwen2 its own way to split text (each digit alone), whatever the file says."""
    (tmp_path / "text.txt").write_text("year = 12345\n" * 200)
    made = train_tokenizer(tmp_path / "text.txt", 300)
    found = tokenizer_beside(made, "qwen2")
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 1}
    model = build(AutoConfig.for_model("qwen2", intermediate_size=20, **sizes), found)
    hub.save(model, tmp_path / "model", found)
    later = AutoTokenizer.from_pretrained(tmp_path / "model")
    ids = [tokenizer("year = 12345")["input_ids"] for tokenizer in (found, later, made)]
    assert ids[0] == ids[1] != ids[2]
    assert tokenizer_beside(made, "llama")("year = 12345")["input_ids"] == ids[2]


def test_the_verb_writes_a_checkpoint_that_loads(tmp_path, capsys):
    corpus = tmp_path / "text.txt"
    corpus.write_text("\n\n".join(f"the {i} quick brown foxes jump over {i * 7} lazy dogs" for i in range(300)))
    file, out = write(tmp_path / "small.yaml", SMALL), tmp_path / "run"
    command = [
        *("pretrain", str(file), "--data", str(corpus), "--out", str(out), "--vocab_size", "280", "--json"),
        *("--train.steps", "3", "--train.context", "16", "--train.batch_size", "2", "--set", "hidden_size=24"),
        *("--evaluation_tokens", "64"),
    ]
    assert main(command) == 0
    first = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert main(command) == 0  # nothing is left to do
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == first
    model = AutoModelForCausalLM.from_pretrained(out / "model")
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    assert model.config.hidden_size == 24
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert len((out / "metrics.jsonl").read_text().splitlines()) >= 3
    assert yaml.safe_load((out / "run.yaml").read_text())["verb"] == "pretrain"
    again = [*command[:2], "--data", str(corpus), "--out", str(tmp_path / "b"), "--tokenizer", str(out / "model")]
    assert main([*again, *command[9:]]) == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [("hidden_size: 4", "model_type"), ("[1, 2]", "mapping"), ("model_type: nonsense", "nonsense"), ("a: [", "read")],
)
def test_what_is_no_architecture_is_one_sentence(tmp_path, content, message):
    (tmp_path / "bad.yaml").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        architecture_config(tmp_path / "bad.yaml")


def test_sizes_that_do_not_go_together_are_one_sentence(tmp_path):
    file = write(tmp_path / "bad.yaml", {"model_type": "llama", "hidden_size": 30, "num_attention_heads": 4})
    with pytest.raises(CheckpointError, match="llama"):
        build(architecture_config(file))


def test_fields_are_read_as_yaml():
    assert fields("hidden_size=24, use_bias=true,layer_types=") == {
        "hidden_size": 24,
        "use_bias": True,
        "layer_types": None,
    }
    with pytest.raises(NestlingError, match="FIELD=VALUE"):
        fields("hidden_size")


def write(path, values):
    path.write_text(yaml.safe_dump(values))
    return path


def fails_in_step(number):
    def begin(self, step, steps):
        if step + 1 == number:
            raise RuntimeError("power cut")

    return begin


def test_two_processes_write_one_checkpoint(tmp_path):
    """The tokenizer, the model and its loss are made once, by the first, and are those of one process."""
    corpus, file = tmp_path / "text.txt", write(tmp_path / "small.yaml", SMALL)
    corpus.write_text("\n\n".join(f"the {i} quick brown foxes jump over {i * 7} lazy dogs" for i in range(300)))
    training = PretrainSettings(steps=2, context=16, batch_size=4, save_every=0)

    def job(out):
        settings = PretrainVerb(
            str(file), data=str(corpus), out=str(out), vocab_size=280, evaluation_tokens=64, train=training
        )
        return pretrain_model(settings), pretrain_model(settings)

    expected = job(tmp_path / "one")[0]
    for first, again in together(2, tmp_path, job, tmp_path / "two"):
        assert first == again
        assert first["loss"] == pytest.approx(expected["loss"], rel=1e-4)
    one, two = (AutoModelForCausalLM.from_pretrained(tmp_path / name / "model") for name in ("one", "two"))
    torch.testing.assert_close(dict(two.named_parameters()), dict(one.named_parameters()), rtol=1e-3, atol=1e-5)
    assert sorted(path.name for path in (tmp_path / "two").iterdir() if path.name.startswith(".")) == []
