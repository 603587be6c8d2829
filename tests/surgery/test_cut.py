"""What must hold for every architecture and axis: sorting changes nothing, masking equals cutting."""

import copy

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from nestling.anatomy import Anatomy
from nestling.errors import NestlingError, ShapeError
from nestling.experts import use_fast_experts
from nestling.ranking import Ranking
from nestling.shape import Shape
from nestling.surgery import masked, prune, reorder
from tests.models import VARIANTS, cuts, in_float64, logits, random_ranking, tiny, token_batches

IDS = token_batches(1)[0]["input_ids"]
CLOSE = {"atol": 1e-10, "rtol": 1e-10}


@pytest.fixture(autouse=True)
def _exact():
    with in_float64():
        yield


@pytest.mark.parametrize("variant", VARIANTS)
def test_reorder_changes_no_logit(variant):
    model = tiny(variant)
    before, weights = logits(model, IDS), copy.deepcopy(model.state_dict())
    reorder(model, random_ranking(model))
    torch.testing.assert_close(logits(model, IDS), before, **CLOSE)
    assert any(not torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("variant", VARIANTS)
def test_masked_parent_equals_pruned_child(variant):
    model = tiny(variant)
    ranking = random_ranking(model)
    whole = logits(model, IDS)
    in_order = copy.deepcopy(model)
    reorder(in_order, ranking)
    for shape in cuts(variant):
        child = prune(model, ranking, Shape(**shape))
        expected = logits(child, IDS)
        with masked(model, shape, ranking):
            torch.testing.assert_close(logits(model, IDS), expected, **CLOSE)
        with masked(in_order, shape):
            torch.testing.assert_close(logits(in_order, IDS), expected, **CLOSE)
        torch.testing.assert_close(logits(prune(in_order, ranking, shape), IDS), expected, **CLOSE)
        assert not torch.allclose(expected, whole, atol=1e-2), f"{shape} should change the function"
    assert torch.equal(logits(model, IDS), whole)


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v != "gemma3_text-tied"])
def test_gradients_of_the_masked_parent_are_those_of_the_child(variant):
    model = tiny(variant)
    ranking = random_ranking(model)
    shape = cuts(variant)[6] | ({"hidden_size": model.config.hidden_size} if "gemma" in variant else {})
    child = prune(model, ranking, shape)
    child(input_ids=IDS, labels=IDS).loss.backward()
    with masked(model, shape, ranking):
        loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    expected = sorted(p.grad.abs().sum().item() for p in child.parameters())
    found = sorted(p.grad.abs().sum().item() for p in model.parameters() if p.grad is not None and p.grad.any())
    assert found == pytest.approx(expected, rel=1e-9)
    kept = sum((p.grad != 0).sum().item() for p in model.parameters() if p.grad is not None)
    assert kept <= child.num_parameters()


@pytest.mark.parametrize("variant", VARIANTS)
def test_cutting_nothing_changes_no_bit_and_shares_no_memory(variant):
    model = tiny(variant)
    child = prune(model, random_ranking(model), {})
    assert torch.equal(logits(child, IDS), logits(model, IDS))
    assert type(child) is type(model)
    parents = {tensor.data_ptr() for tensor in model.state_dict().values()}
    assert not parents & {tensor.data_ptr() for tensor in child.state_dict().values()}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("which", [6, 7])
def test_child_saves_loads_and_generates_with_its_cache(variant, which, tmp_path):
    model = tiny(variant, dtype=torch.float32)
    child = prune(model, random_ranking(model), cuts(variant)[which])
    child.save_pretrained(tmp_path)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    use_fast_experts(loaded)
    torch.testing.assert_close(logits(loaded, IDS), logits(child, IDS), rtol=1e-5, atol=1e-5)
    assert which == 6 or loaded.config.model_type == model.config.model_type, "uniform shapes are stock checkpoints"
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    cached = loaded.generate(IDS[:1], use_cache=True, **settings)
    assert torch.equal(cached, loaded.generate(IDS[:1], use_cache=False, **settings))


@pytest.mark.parametrize("variant", ["llama", "mixtral", "qwen3_moe", "nemotron_h"])
def test_a_child_is_saved_under_the_names_that_its_type_has_on_the_hub(variant, tmp_path):
    """A mixture's experts one by one, not as transformers keeps them inside: other programs read these names alone."""
    model = tiny(variant)
    model.save_pretrained(tmp_path / "parent")
    prune(model, random_ranking(model), {"hidden_size": 36}).save_pretrained(tmp_path / "child")
    names = [set(safe_open(tmp_path / f"{who}/model.safetensors", "pt").keys()) for who in ("parent", "child")]
    assert names[0] == names[1]
    assert (names[0] == set(model.state_dict())) == (variant == "llama")  # negative control: inside they are others


def test_a_child_can_be_cut_again(tmp_path):
    model = tiny("llama")
    once = prune(
        model,
        random_ranking(model),
        {"intermediate_size": [40, 30, 20, 10], "num_attention_heads": [6, 4, 2, 4]},
    )
    ranking = random_ranking(once)
    twice = prune(once, ranking, {"hidden_size": 36, "num_hidden_layers": 3})
    with masked(once, {"hidden_size": 36, "num_hidden_layers": 3}, ranking):
        torch.testing.assert_close(logits(once, IDS), logits(twice, IDS), **CLOSE)
    even = prune(once, ranking, {"intermediate_size": 10, "num_attention_heads": 2})
    once.save_pretrained(tmp_path)
    read = AutoModelForCausalLM.from_pretrained(tmp_path)  # its config was told its type by a file
    for model in (even, prune(read, ranking, {"intermediate_size": 10, "num_attention_heads": 2})):
        assert model.config.model_type == Anatomy.of(model).config.model_type == "llama"


def test_heads_moved_across_groups_would_change_the_function():
    model = tiny("llama")
    before = logits(model, IDS)
    attention, d = model.model.layers[0].self_attn, 8
    swap = torch.arange(48)
    swap[0:d], swap[3 * d : 4 * d] = torch.arange(3 * d, 4 * d), torch.arange(0, d)
    with torch.no_grad():
        attention.q_proj.weight.copy_(attention.q_proj.weight[swap])
        attention.o_proj.weight.copy_(attention.o_proj.weight[:, swap])
    assert not torch.allclose(logits(model, IDS), before, atol=1e-2)


def test_masked_without_norm_correction_would_differ():
    model = tiny("llama")
    ranking, shape = random_ranking(model), {"hidden_size": 36}
    kept = ranking["hidden_size"][:36]
    expected = logits(prune(model, ranking, shape), IDS)
    mask = torch.zeros(48, dtype=torch.float64)
    mask[kept] = 1
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            for dim, letter in enumerate(Anatomy.of(model).tensors[name].layout):
                if "hidden" in letter.letters:
                    tensor.mul_(mask.view([-1 if i == dim else 1 for i in range(tensor.dim())]))
    assert not torch.allclose(logits(model, IDS), expected, atol=1e-2)


def test_identity_layers_can_be_dropped_without_change():
    model = tiny("llama")
    for layer in (1, 2):
        model.model.layers[layer].self_attn.o_proj.weight.data.zero_()
        model.model.layers[layer].mlp.down_proj.weight.data.zero_()
    ranking = Ranking({"num_hidden_layers": torch.tensor([2.0, 0.0, 0.0, 1.0])})
    child = prune(model, ranking, {"num_hidden_layers": 2})
    assert torch.equal(logits(child, IDS), logits(model, IDS))


def test_layer_types_and_cache_indices_follow_the_kept_layers():
    model = tiny("qwen2-sliding")
    ranking = Ranking({"num_hidden_layers": torch.tensor([0.0, 3.0, 2.0, 1.0])})
    child = prune(model, ranking, {"num_hidden_layers": 3})
    assert child.config.layer_types == model.config.layer_types[1:]
    assert child.config.max_window_layers == 1
    assert [layer.self_attn.layer_idx for layer in child.model.layers] == [0, 1, 2]


def test_no_hook_or_shadow_stays_after_an_error():
    model = tiny("llama")
    before = logits(model, IDS)

    def fail():
        with masked(model, {"hidden_size": 36, "num_hidden_layers": 2}, random_ranking(model)):
            model(input_ids=torch.full((1, 2), 10_000))

    with pytest.raises(IndexError):
        fail()
    assert torch.equal(logits(model, IDS), before)
    assert all("weight" not in module.__dict__ and "forward" not in module.__dict__ for module in model.modules())


def test_masked_needs_an_order_of_layers_to_drop_any():
    with pytest.raises(ShapeError, match="ranking"), masked(tiny("llama"), {"num_hidden_layers": 2}):
        pass


def test_a_ranking_of_another_model_is_refused():
    with pytest.raises(ShapeError, match="rank this model anew"):
        prune(tiny("llama"), random_ranking(tiny("llama", intermediate_size=40)), {"hidden_size": 36})


def test_an_unknown_merge_is_refused():
    model = tiny("llama")
    with pytest.raises(NestlingError, match="median"):
        prune(model, random_ranking(model), {"num_attention_heads": 4}, merge="median")
