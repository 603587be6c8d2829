"""Plans against the arithmetic they claim, published recipes, and what PyTorch keeps and counts for small models."""

import json

import pytest
import torch
import yaml
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoConfig

from nestling.anatomy import Anatomy, decoder
from nestling.cli import main
from nestling.errors import NestlingError, TargetError
from nestling.plan import DEVICES, Figures, Job, Machines, plan
from nestling.shape import fit
from tests.models import tiny

LLAMA = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "dtype": "bfloat16",
}
WIDTH = {"hidden_size": 3072, "intermediate_size": 9216}


@pytest.fixture(scope="module")
def llama():
    return Anatomy.of(AutoConfig.for_model(**LLAMA))


def job(**overrides):
    return Job(**({"tokens": 94e9, "context": 8192, "batch_size": 1152, "utilisation": 0.4} | overrides))


def test_the_papers_llama_recipe(llama):
    """8B to 4.5B on 94 B tokens, 1,152 x 8,192 per step: 2 N FLOP for the teacher's weights, 6 N for the student's."""
    found = plan(llama, WIDTH, Machines.parse("24x8xH100"), job())
    assert found.steps == 9961
    embedding = 128256 * 4096
    attention = 4 * 32 * 4096 * 4096  # scores and values: 32 layers, 4096 channels, 4096 tokens on average
    assert found.teacher_flops == pytest.approx(2 * (8.03e9 - embedding) + attention, rel=1e-3)
    student = 2 * (4.5125e9 - 128256 * 3072) + attention
    assert found.student_flops == pytest.approx(student, rel=1e-3)
    assert found.flops_per_token == found.teacher_flops + 3 * found.student_flops
    seconds = 94e9 * found.flops_per_token / (192 * 989e12 * 0.4) * max(1, found.exchange)
    assert found.hours == pytest.approx(seconds / 3600)
    assert found.gpu_hours == pytest.approx(192 * found.hours)
    assert found.fits
    assert found.fsdp


def test_memory_of_weights_is_counted_per_weight(llama):
    params = Figures.of(llama, fit(llama, WIDTH), 8192).params
    eight = plan(llama, WIDTH, Machines.parse("8xH100"), job())
    assert eight.memory.weights + eight.memory.gradients + eight.memory.optimizer == pytest.approx(2 * params, rel=1e-6)
    assert eight.memory.teacher == pytest.approx(2 * 8.03e9 / 8, rel=1e-3)
    whole = plan(llama, {"num_hidden_layers": 2}, Machines.parse("2xB200"), job(context=512))
    params = Figures.of(llama, fit(llama, {"num_hidden_layers": 2}), 512).params
    assert not whole.fsdp
    assert whole.memory.weights + whole.memory.gradients + whole.memory.optimizer == (4 + 2 + 4 + 4 + 8) * params


def test_the_first_way_that_fits_is_taken(llama):
    """Small models stay whole; larger ones recompute or are sharded; what fits nowhere says how many it takes."""
    small = Anatomy.of(
        AutoConfig.for_model(**LLAMA | {"hidden_size": 1024, "num_hidden_layers": 4, "vocab_size": 9000})
    )
    assert not plan(small, {"intermediate_size": 4096}, Machines.parse("1xRTX4090"), job(context=1024)).fsdp
    one = plan(llama, WIDTH, Machines.parse("1xH100"), job())
    assert (one.fits, one.recompute, one.devices_needed) == (False, True, 2)
    enough = plan(llama, WIDTH, Machines.parse(f"{one.devices_needed}xH100"), job())
    assert enough.fits
    assert plan(llama, WIDTH, Machines.parse("8xL4"), job(context=65536)).devices_needed is None


@pytest.mark.parametrize(("variant", "close"), [("llama", 0.12), ("qwen2", 0.12), ("olmo2", 0.15)])
def test_activations_are_near_what_pytorch_keeps(variant, close):
    """Bytes of a layer and token, from the difference between three layers and one, without the weights' copies."""
    how = {"hidden_size": 192, "intermediate_size": 512, "num_attention_heads": 6, "dtype": torch.float32}
    one, three = (tiny(variant, num_hidden_layers=layers, **how) for layers in (1, 3))
    copies = sum(2 * p.numel() for name, p in one.named_parameters() if "layers" in name and p.dim() > 1)
    kept = (kept_bytes(three) - kept_bytes(one)) / 2 - copies
    anatomy = Anatomy.of(one)
    assert Figures.of(anatomy, fit(anatomy, {}), 128).layer_bytes[0] == pytest.approx(kept / 128, rel=close)


def kept_bytes(model):
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no address is used twice
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu", dtype=torch.bfloat16):
        decoder(model)(input_ids=torch.randint(3, 90, (1, 128)), use_cache=False)
    return sum(size for size, _ in kept.values())


def test_machines_are_read_and_refused():
    assert (Machines.parse("32x8xH100").count, Machines.parse("32x8xH100").per_node) == (256, 8)
    assert Machines.parse("a100").device == DEVICES["a100"]
    assert Machines.parse("8xH100").link > Machines.parse("2x8xH100").link
    own = Machines.parse("4xTPU", flops=1e14, memory=2**35)
    assert (own.device.flops, own.device.name) == (1e14, "TPU")
    for text, sentence in (("8xTPU", "known"), ("eight H100", "read"), ("2x2x2xH100", "read"), ("0xH100", "read")):
        with pytest.raises(TargetError, match=sentence):
            Machines.parse(text)
    with pytest.raises(NestlingError, match="utilisation"):
        job(utilisation=0)


def test_a_batch_that_cannot_be_shared_is_refused(llama):
    with pytest.raises(TargetError, match="take 1024"):
        plan(llama, WIDTH, Machines.parse("32x8xH100"), job())


def test_from_a_config_alone(tmp_path, capsys):
    """The verb reads a YAML file or a folder with a config, finds an even cut, and prints one JSON object last."""
    fields = LLAMA | {"hidden_size": 1024, "num_hidden_layers": 3, "vocab_size": 4096}
    (tmp_path / "model.yaml").write_text(yaml.safe_dump(fields))
    AutoConfig.for_model(**fields).save_pretrained(tmp_path / "folder")
    results = []
    for model in ("model.yaml", "folder"):
        command = ["plan", str(tmp_path / model), "--to", "0.5x", "--gpus", "2xA100", "--tokens", "1B", "--json"]
        assert main(command) == 0
        results.append(json.loads(capsys.readouterr().out.splitlines()[-1]))
    assert results[0] == results[1]
    kept = {name: size / fields[name] for name, size in results[0]["shape"].items()}
    assert set(kept) == {"hidden_size", "intermediate_size"}
    assert abs(kept["hidden_size"] - kept["intermediate_size"]) < 0.15
    assert results[0]["child"]["params"] <= 0.5 * results[0]["parent"]["params"]
    assert main(["plan", str(tmp_path / "model.yaml"), "--tokens", "many"]) == 2
    assert "'many' is not an amount" in capsys.readouterr().err
    (tmp_path / "broken.yaml").write_text("hidden_size: 3")
    assert main(["plan", str(tmp_path / "broken.yaml")]) == 2
