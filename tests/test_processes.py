"""Two processes give what one gives: rankings, repairs, losses of shapes; and what one makes, both have."""

import pytest
import torch

from nestling import processes
from nestling.anatomy import Anatomy
from nestling.errors import DataError, NestlingError
from nestling.ranking import rank
from nestling.search import token_loss
from nestling.surgery import choose
from nestling.surgery.repair import Repair
from tests.models import VOCAB, random_ranking, tiny, token_batches
from tests.several import together


def batches():
    """Five rows, two and one, with padding: some batch leaves a process without a row."""
    found = [token_batches(1, rows, 9, seed=rows)[0] for rows in (5, 2, 1)]
    mask = torch.ones_like(found[0]["input_ids"])
    mask[1, 6:] = 0
    return [found[0] | {"attention_mask": mask}, *found[1:]]


def rankings():
    model, text = tiny("llama-tied"), batches()
    found = [rank(model, text, metric=metric) for metric in ("activation", "contribution", "taylor")]
    found += [rank(model, text, over_batch=over, over_sequence="var") for over in ("mean", "var")]
    return [ranking.scores for ranking in found] + [rank(model, text[1:], layers="kl", greedy_layers=2).scores]


def repaired(text):
    model = tiny("llama")
    selection = choose(Anatomy.of(model), random_ranking(model), {"intermediate_size": 30, "num_hidden_layers": 2})
    return Repair(model, text).refit(selection)


def measured():
    return rankings(), repaired(batches()[1:]), repaired(batches()[2:]), token_loss(batches())(tiny("qwen2"))


def test_two_processes_measure_what_one_does(tmp_path):
    expected = measured()
    for found in together(2, tmp_path, measured):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def of_one_share_alone():
    return [rank(tiny("llama-tied"), processes.share(batches())).scores["intermediate_size"]]


def test_sums_matter(tmp_path):
    """Negative control: of half the rows alone the scores are others."""
    expected = [rank(tiny("llama-tied"), batches()).scores["intermediate_size"]]
    with pytest.raises(AssertionError):
        torch.testing.assert_close(together(2, tmp_path, of_one_share_alone)[0], expected)


def test_every_row_is_in_one_process(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    seen = []
    for number in range(3):
        monkeypatch.setenv("RANK", str(number))
        seen += [row.tolist() for part in processes.share(batches()) for row in part["input_ids"]]
    assert sorted(seen) == sorted(row.tolist() for batch in batches() for row in batch["input_ids"])


def test_processes_that_nobody_launched_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(NestlingError, match="torchrun"):
        rank(tiny("llama-tied"), batches())


def exchanged():
    made = []

    def make():
        made.append(1)
        return processes.first(lambda: {"made by": processes.number(), "of": processes.count()})

    plain = processes.first(make)
    tensors = processes.tensors(lambda: {"ids": torch.arange(VOCAB), "half": torch.ones(2, dtype=torch.bfloat16)})
    nothing = processes.first(lambda: None)
    with pytest.raises(DataError, match="no such text"):
        processes.first(refuse)
    with pytest.raises(KeyError if processes.is_first() else RuntimeError, match="missing"):
        processes.first(lambda: {}["missing"])
    return plain, tensors, nothing, len(made)


def refuse():
    raise DataError("no such text")


def test_what_the_first_makes_all_have(tmp_path):
    for number, (plain, tensors, nothing, made) in enumerate(together(2, tmp_path, exchanged)):
        assert plain == {"made by": 0, "of": 1}
        assert torch.equal(tensors["ids"], torch.arange(VOCAB))
        assert tensors["half"].dtype == torch.bfloat16
        assert nothing is None
        assert made == (1 if number == 0 else 0)
