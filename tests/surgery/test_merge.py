"""The head merge: every pruned head taken up once, inside its group, by the formula of the paper."""

import pytest
import torch

from nestling.errors import ShapeError
from nestling.ranking import Ranking
from nestling.surgery import prune
from nestling.surgery.merge import pairs
from tests.models import random_ranking, tiny


@pytest.mark.parametrize(("total", "kept"), [(8, 6), (8, 5), (8, 4), (48, 32), (4, 4), (3, 2)])
def test_every_pruned_head_is_taken_up_once(total, kept):
    found = pairs(list(range(total)), kept)
    assert sorted(pruned for _, pruned in found) == list(range(kept, total))
    assert len({head for head, _ in found}) == len(found)
    assert all(head < kept for head, _ in found)


def test_the_weakest_kept_head_takes_the_strongest_pruned_one():
    assert pairs(list(range(8)), 6) == [(4, 7), (5, 6)]


def test_less_than_half_is_refused():
    with pytest.raises(ShapeError, match="at least half"):
        pairs(list(range(8)), 3)


@pytest.mark.parametrize(("merge", "rule"), [("paper", lambda a, b: 2 * a - b), ("average", lambda a, b: (a + b) / 2)])
@pytest.mark.parametrize("variant", ["llama-biases", "phi3"])
def test_merged_weights_by_hand(merge, rule, variant):
    model = tiny(variant)
    scores = torch.tensor([0.5, 0.9, 0.1, 0.2, 0.3, 0.4])
    ranking = Ranking({"num_attention_heads": (scores,) * 4})
    child = prune(model, ranking, {"num_attention_heads": 4}, merge=merge)
    name = "q_proj" if variant == "llama-biases" else "qkv_proj"
    old = getattr(model.model.layers[1].self_attn, name).weight[:48].view(6, 8, 48)
    new = getattr(child.model.layers[1].self_attn, name).weight[:32].view(4, 8, 48)
    # group 0 keeps heads 0, 1 (best 1, then 0, which takes 2); group 1 keeps 4, 5 (best 5, then 4, which takes 3)
    expected = [rule(old[0], old[2]), old[1], rule(old[4], old[3]), old[5]]
    torch.testing.assert_close(new, torch.stack(expected))


def test_keeping_all_heads_merges_nothing():
    model = tiny("llama")
    child = prune(model, random_ranking(model), {}, merge="paper")
    assert all(torch.equal(a, b) for a, b in zip(child.parameters(), model.parameters(), strict=True))
