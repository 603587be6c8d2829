"""Text of the model's own: its size, its reproducibility, and that nothing of the caller's is disturbed."""

from types import SimpleNamespace

import torch

from nestling.data.calibration import in_turn, written
from tests.models import VOCAB, tiny

TOKENIZER = SimpleNamespace(bos_token_id=1, eos_token_id=2)


def test_rows_of_exactly_that_many_tokens():
    seen = []
    rows = written(tiny("llama"), TOKENIZER, rows=35, context=9, progress=seen.append)
    assert rows.shape == (35, 9)
    assert (rows[:, 0] == 1).all()
    assert rows.min() >= 0
    assert rows.max() < VOCAB
    assert sum(seen) == 35 * 8


def test_the_seed_decides_and_the_callers_generator_is_left_alone():
    model = tiny("llama")
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, again, other = (written(model, TOKENIZER, 4, 12, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_models_own_generation_settings_do_not_narrow_it():
    model = tiny("llama")
    plain = written(model, TOKENIZER, 4, 12)
    model.generation_config.update(do_sample=True, top_k=1, temperature=0.01, repetition_penalty=3.0)
    assert torch.equal(written(model, TOKENIZER, 4, 12), plain)


def test_a_tokenizer_without_bos_begins_with_eos():
    rows = written(tiny("llama"), SimpleNamespace(bos_token_id=None, eos_token_id=2), 2, 5)
    assert (rows[:, 0] == 2).all()


def test_rows_take_turns():
    mixed = in_turn(torch.zeros(6, 1), torch.ones(3, 1)).flatten().tolist()
    assert mixed == [0, 1, 0, 0, 1, 0, 0, 1, 0]
