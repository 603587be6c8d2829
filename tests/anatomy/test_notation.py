"""The notation's arithmetic against plain loops."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nestling.anatomy.notation import Choice, parse
from nestling.errors import NestlingError

SIZES = {"kv": 2, "q": 3, "d": 4, "hidden": 10, "ffn": 5, "g": 2, "h": 3, "p": 2, "n": 3, "k": 4}


def by_loops(part: list[str], chosen: dict[str, set[int]], start: int) -> list[int]:
    """Flat positions whose unit is kept for every letter, in ascending order."""
    found = []
    for flat, units in enumerate(itertools.product(*(range(SIZES[letter]) for letter in part))):
        if all(unit in chosen.get(letter, range(SIZES[letter])) for letter, unit in zip(part, units, strict=True)):
            found.append(start + flat)
    return found


def test_sizes_of_sums_and_products():
    layout = parse("(g h p + g h p + g n + g n + g h) hidden")
    assert [dimension.size(SIZES) for dimension in layout] == [12 + 12 + 6 + 6 + 6, 10]
    assert [dimension.size(SIZES) for dimension in parse("(g h p + g n) 1 k")] == [18, 1, 4]


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_index_of_ungrouped_choices_matches_loops(data):
    spec = data.draw(st.sampled_from(["(kv q d)", "(kv q d + kv d + kv d)", "(ffn + ffn)", "(g h p + g n)", "hidden"]))
    dimension = parse(spec)[0]
    chosen = {
        letter: data.draw(st.sets(st.integers(0, SIZES[letter] - 1), min_size=1))
        for letter in sorted(dimension.letters)
    }
    index = dimension.index({k: Choice(torch.tensor(sorted(v))) for k, v in chosen.items()}, SIZES)
    start, expected = 0, []
    for part in dimension.parts:
        expected += by_loops(list(part), chosen, start)
        start += len(by_loops(list(part), {}, 0))
    assert index.tolist() == expected


def test_units_chosen_inside_groups_may_differ_between_groups():
    heads = Choice(torch.tensor([[2, 0], [1, 2]]), within=("kv",))
    index = parse("(kv q d)")[0].index({"q": heads}, SIZES)
    rows = [0 * 12 + 2 * 4, 0 * 12 + 0 * 4, 1 * 12 + 1 * 4, 1 * 12 + 2 * 4]
    assert index.tolist() == [row + channel for row in rows for channel in range(4)]


def test_three_levels_of_groups():
    channels = Choice(torch.tensor([[[0], [1], [0]], [[1], [1], [0]]]), within=("g", "h"))
    index = parse("(g h p)")[0].index({"p": channels}, SIZES)
    assert index.tolist() == [0, 3, 4, 7, 9, 10]


def test_nothing_chosen_means_everything():
    assert parse("(kv q d)")[0].index({"ffn": Choice(torch.tensor([0]))}, SIZES) is None


def test_owner_names_the_unit_of_every_element():
    owner = parse("(kv q d + kv d)")[0].owner(("kv", "q"), SIZES)
    assert owner.tolist() == [u for u in range(6) for _ in range(4)] + [-1] * 8
    assert parse("(kv d)")[0].owner(("kv",), SIZES).tolist() == [0] * 4 + [1] * 4


def test_a_sum_inside_a_product_is_interleaved():
    """`(kv (d + d + q p))`: each unit of kv has its channels, then others, then its heads; against loops."""
    dimension = parse("(kv (d + d + q p)) hidden")[0]
    each = 4 + 4 + 3 * 2
    assert dimension.size(SIZES) == 2 * each
    assert str(dimension) == "(kv (d + d + q p))"
    heads, channels = torch.tensor([[2, 0], [1, 2]]), [3, 1]
    chosen = {"kv": Choice(torch.tensor([1, 0])), "q": Choice(heads, ("kv",)), "d": Choice(torch.tensor(channels))}
    expected = []
    for place, unit in enumerate([1, 0]):
        start = unit * each
        expected += [start + c for c in channels] + [start + 4 + c for c in channels]
        expected += [start + 8 + 2 * int(head) + p for head in heads[place] for p in range(2)]
    assert dimension.index(chosen, SIZES).tolist() == expected
    owner = [-1] * 8 + [0, 0, 1, 1, 2, 2] + [-1] * 8 + [3, 3, 4, 4, 5, 5]
    assert dimension.owner(("kv", "q"), SIZES).tolist() == owner
    plain = parse("(kv d + kv d + kv q p)")[0]
    assert plain.size(SIZES) == dimension.size(SIZES)
    assert plain.index(chosen, SIZES).tolist() != expected


@pytest.mark.parametrize(
    "spec", ["", "(a b", "(a (b + c)", "(a (b (c + d)))", "(a + b (c + d))", "A b", "(a + ) b", "a,b"]
)
def test_a_spec_that_is_not_of_the_notation_is_refused(spec):
    with pytest.raises(NestlingError):
        parse(spec)
