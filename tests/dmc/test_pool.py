"""The recurrence: compiled and by doubling, against a loop, and its gradient."""

import pytest
import torch

from nestling.dmc.runtime import pool
from nestling.dmc.runtime.pool import doubling, running_sums


@pytest.mark.parametrize("seq", [1, 2, 7, 64])
def test_against_a_loop(seq):
    alpha, terms = torch.rand(2, 3, seq, dtype=torch.float64), torch.randn(2, 3, seq, 5, dtype=torch.float64)
    start = torch.randn(2, 3, 5, dtype=torch.float64)
    alpha[..., ::3] = 0
    state, expected = start, []
    for t in range(seq):
        state = alpha[..., t : t + 1] * state + terms[..., t, :]
        expected.append(state)
    expected = torch.stack(expected, -2)
    torch.testing.assert_close(running_sums(alpha, terms, start), expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(doubling(alpha, terms, start), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("compiled", [True, False])
def test_gradient(compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr(pool, "usable", lambda *tensors: False)
    alpha = torch.rand(2, 6, dtype=torch.float64, requires_grad=True)
    terms = torch.randn(2, 6, 3, dtype=torch.float64, requires_grad=True)
    start = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(running_sums, (alpha, terms, start))
