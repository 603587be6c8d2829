"""The record: orders, ties, fingerprints, and the file it is kept in."""

import pytest
import torch
from safetensors.torch import save_file

from nestling.errors import CheckpointError, NestlingError
from nestling.ranking import Ranking, rank
from tests.models import random_ranking, tiny, token_batches


def test_orders_are_best_first_and_ties_keep_their_places():
    ranking = Ranking(
        {"hidden_size": torch.tensor([1.0, 3.0, 1.0, 3.0]), "ffn": (torch.tensor([0.0, 2.0]), torch.zeros(0))}
    )
    assert ranking["hidden_size"].tolist() == [1, 3, 0, 2]
    assert [order.tolist() for order in ranking["ffn"]] == [[1, 0], []]
    assert ranking.order("ffn", 0).tolist() == [1, 0]
    assert ranking.order("hidden_size").tolist() == [1, 3, 0, 2]


def test_the_fingerprint_follows_the_order_alone():
    scores = torch.rand(20)
    same, other = scores * 3 + 1, scores.flip(0)
    assert Ranking({"a": scores}).fingerprint == Ranking({"a": same}).fingerprint
    assert Ranking({"a": scores}).fingerprint != Ranking({"a": other}).fingerprint
    assert Ranking({"a": scores}).fingerprint != Ranking({"b": scores}).fingerprint


def test_an_unknown_axis_is_refused():
    ranking = random_ranking(tiny("llama"))
    for look in (ranking.__getitem__, ranking.order):
        with pytest.raises(NestlingError, match=r"no axis 'ffn': it has hidden_size"):
            look("ffn")


@pytest.mark.parametrize("variant", ["llama", "llama-mha"])
def test_saving_and_loading_gives_the_same_ranking(variant, tmp_path):
    ranking = rank(tiny(variant), token_batches(), greedy_layers=1, layers="kl")
    ranking.save(tmp_path / "ranking.safetensors")
    loaded = Ranking.load(tmp_path / "ranking.safetensors")
    assert loaded.fingerprint == ranking.fingerprint
    assert loaded.info == ranking.info
    assert set(loaded.scores) == set(ranking.scores)
    for axis, scores in ranking.scores.items():
        torch.testing.assert_close(loaded.scores[axis], scores, rtol=0, atol=0)


def test_more_than_ten_layers_come_back_in_their_order(tmp_path):
    ranking = Ranking({"ffn": tuple(torch.full((layer,), float(layer)) for layer in range(13))})
    ranking.save(tmp_path / "ranking.safetensors")
    assert [len(layer) for layer in Ranking.load(tmp_path / "ranking.safetensors").scores["ffn"]] == list(range(13))


@pytest.mark.parametrize("damage", ["missing", "cut", "text", "empty", "other"])
def test_a_file_that_is_no_ranking_is_refused(damage, tmp_path):
    path = tmp_path / "ranking.safetensors"
    random_ranking(tiny("llama")).save(path)
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-40])
    elif damage == "text":
        path.write_text("not a ranking")
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        save_file({"weight": torch.zeros(3)}, path)
    with pytest.raises(CheckpointError, match="not a ranking that can be read"):
        Ranking.load(path)
