"""`prune` against slicing written out by hand, tensor by tensor: a separate layout and a fused one."""

import torch

from nestling.ranking import Ranking
from nestling.surgery import prune
from tests.models import random_ranking, tiny


def best(scores: torch.Tensor, count: int) -> list[int]:
    return sorted(sorted(range(len(scores)), key=lambda i: -scores[i].item())[:count])


def expected_rows(ranking: Ranking, layer: int, d: int) -> tuple[list[int], list[int], list[int]]:
    """Kept neurons (30), query rows (2 of 3 heads in each of 2 groups) and head numbers."""
    neurons = best(ranking.scores["intermediate_size"][layer], 30)
    scores = ranking.scores["num_attention_heads"][layer]
    heads = [group * 3 + i for group in range(2) for i in best(scores[group * 3 : group * 3 + 3], 2)]
    return neurons, [head * d + c for head in heads for c in range(d)], heads


SHAPE = {"hidden_size": 36, "intermediate_size": 30, "num_attention_heads": 4, "num_hidden_layers": 3}


def test_llama_by_hand():
    model = tiny("llama-biases")
    ranking = random_ranking(model)
    old, new = model.state_dict(), prune(model, ranking, SHAPE).state_dict()
    channels = best(ranking.scores["hidden_size"], 36)
    for j, i in enumerate(best(ranking.scores["num_hidden_layers"], 3)):
        neurons, rows, _ = expected_rows(ranking, i, 8)
        a, b = f"model.layers.{j}.", f"model.layers.{i}."
        for name in ("gate_proj", "up_proj"):
            assert torch.equal(new[f"{a}mlp.{name}.weight"], old[f"{b}mlp.{name}.weight"][neurons][:, channels])
            assert torch.equal(new[f"{a}mlp.{name}.bias"], old[f"{b}mlp.{name}.bias"][neurons])
        assert torch.equal(new[f"{a}mlp.down_proj.weight"], old[f"{b}mlp.down_proj.weight"][channels][:, neurons])
        assert torch.equal(new[f"{a}mlp.down_proj.bias"], old[f"{b}mlp.down_proj.bias"][channels])
        assert torch.equal(new[f"{a}self_attn.q_proj.weight"], old[f"{b}self_attn.q_proj.weight"][rows][:, channels])
        assert torch.equal(new[f"{a}self_attn.q_proj.bias"], old[f"{b}self_attn.q_proj.bias"][rows])
        for name in ("k_proj", "v_proj"):
            assert torch.equal(new[f"{a}self_attn.{name}.weight"], old[f"{b}self_attn.{name}.weight"][:, channels])
        assert torch.equal(new[f"{a}self_attn.o_proj.weight"], old[f"{b}self_attn.o_proj.weight"][channels][:, rows])
        for name in ("input_layernorm", "post_attention_layernorm"):
            assert torch.equal(new[f"{a}{name}.weight"], old[f"{b}{name}.weight"][channels])
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(new[name], old[name][:, channels])
    assert torch.equal(new["model.norm.weight"], old["model.norm.weight"][channels])


def test_phi3_fused_matrices_by_hand():
    model = tiny("phi3")
    ranking = random_ranking(model)
    old, new = model.state_dict(), prune(model, ranking, SHAPE | {"num_hidden_layers": 4}).state_dict()
    channels = best(ranking.scores["hidden_size"], 36)
    for i in range(4):
        neurons, rows, _ = expected_rows(ranking, i, 8)
        name = f"model.layers.{i}.self_attn.qkv_proj.weight"
        assert torch.equal(new[name], old[name][rows + list(range(48, 48 + 32))][:, channels])
        name = f"model.layers.{i}.mlp.gate_up_proj.weight"
        assert torch.equal(new[name], old[name][neurons + [44 + n for n in neurons]][:, channels])


def test_kv_groups_take_their_query_heads_along():
    model = tiny("llama")
    scores = tuple(torch.tensor([0.0, 1.0]) for _ in range(4))
    child = prune(model, Ranking({"num_key_value_heads": scores}), {"num_key_value_heads": 1})
    assert (child.config.num_attention_heads, child.config.num_key_value_heads) == (3, 1)
    assert torch.equal(
        child.model.layers[2].self_attn.q_proj.weight, model.model.layers[2].self_attn.q_proj.weight[24:]
    )
    assert torch.equal(child.model.layers[2].self_attn.v_proj.weight, model.model.layers[2].self_attn.v_proj.weight[8:])
