"""Windows on a tensor: views, and gradients that are the sum of what autograd's own slices give, in float64."""

import pytest
import torch

from nestling.elastic.windows import runs, seen_through, windows

SCATTERED = torch.tensor([0, 1, 2, 5, 6])
SETS = {
    "one": [((0, 3), (0, 4))],
    "inside": [((1, 3), (2, 4))],
    "whole": [(None, None)],
    "nested": [((0, 5), (0, 4)), ((0, 3), (0, 2))],
    "crossed": [((0, 5), (0, 2)), ((0, 2), (0, 6))],
    "scattered": [(SCATTERED, (0, 4)), ((0, 3), SCATTERED), (SCATTERED, SCATTERED)],
    "of experts": [((0, 2), SCATTERED, (0, 3)), (None, (0, 4), None)],
}


def tensor_for(wanted):
    generator = torch.Generator().manual_seed(0)
    return torch.randn((7, 8, 6)[: len(wanted[0])], dtype=torch.float64, generator=generator)


def slices(tensor, wanted):
    return tuple(seen_through(window, tensor) for window in wanted)


def gradient_of(function, tensor, wanted, used):
    """Of a sum of cubes of the windows in use, so that every element has a gradient of its own."""
    leaf = tensor.clone().requires_grad_()
    seen = function(leaf, wanted)
    sum((i + 1) * (seen[i] ** 3).sum() for i in used).backward()
    return leaf.grad


@pytest.mark.parametrize("wanted", SETS.values(), ids=SETS)
def test_gradients_are_those_of_slices_added_up(wanted):
    tensor = tensor_for(wanted)
    for found, expected in zip(windows(tensor, wanted), slices(tensor, wanted), strict=True):
        assert torch.equal(found, expected)
    for used in ([*range(len(wanted))], [len(wanted) - 1]):
        found, expected = (gradient_of(function, tensor, wanted, used) for function in (windows, slices))
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
        assert found.is_contiguous()


@pytest.mark.parametrize("rows", [None, (1, 5)])
def test_sparse_gradients_of_an_embedding_are_added_to_those_of_a_head(rows):
    tensor, ids = tensor_for(SETS["one"]), torch.tensor([[1, 4, 1, 0]])
    wanted = [(rows, (0, 4)), (rows, (0, 4))]

    def gradient(function, sparse, heads):
        leaf = tensor.clone().requires_grad_()
        embedding, head = function(leaf, wanted)
        hidden = torch.nn.functional.embedding(ids, embedding, sparse=sparse)
        (hidden**3).sum().backward() if not heads else ((hidden @ head.T) ** 2).sum().backward()
        return leaf.grad

    for heads in (True, False):
        expected = gradient(slices, False, heads)
        torch.testing.assert_close(gradient(windows, True, heads), expected, atol=1e-12, rtol=1e-12)


def test_a_window_elsewhere_has_another_gradient():
    tensor = tensor_for(SETS["one"])
    found = gradient_of(windows, tensor, SETS["one"], [0])
    assert not torch.allclose(found, gradient_of(slices, tensor, SETS["inside"], [0]))


def test_windows_are_views_where_their_elements_lie_in_one_run():
    tensor = torch.randn(7, 8).requires_grad_()
    one, other = windows(tensor, [((0, 3), (0, 4)), (SCATTERED, None)])
    assert one.data_ptr() == tensor.data_ptr()
    assert other.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr()


def test_runs():
    assert runs(torch.tensor([0, 1, 2, 6, 7, 9])) == [(0, 3), (6, 2), (9, 1)]
    assert runs(torch.arange(4)) == [(0, 4)]
