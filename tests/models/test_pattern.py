"""`fold`: a stack of layers as (head, body x repeats, tail) with as little to compile as there can be."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prfaas_jax.models.pattern import Alone, Pattern, Repeats, RunLayers, cut, fold, runs, whole


def cost(pattern: Pattern) -> int:
    """Layers that are compiled one by one."""
    return pattern.head + pattern.period + pattern.tail


def every_pattern(layers: list[int]):
    """All patterns that are true of `layers`, found the slow way."""
    total = len(layers)
    yield Pattern(total, 0, 0, 0)
    for head, period in itertools.product(range(total), range(1, total + 1)):
        for repeats in range(2, (total - head) // period + 1):
            body = layers[head : head + period * repeats]
            if body == body[:period] * repeats:
                yield Pattern(head, period, repeats, total - head - period * repeats)


STACKS = st.lists(st.integers(0, 2), min_size=1, max_size=12)


@given(STACKS)
def test_cost_is_never_above_brute_force_and_ties_go_to_the_shortest_body_then_head(layers):
    best = min(every_pattern(layers), key=lambda p: (cost(p), p.period, p.head))
    assert fold(layers) == best


# A body that does repeat, so that long folds are not left to chance.
@given(STACKS, STACKS, st.integers(1, 12), STACKS)
def test_a_pattern_covers_every_layer_once_and_its_repeats_are_equal(head, body, repeats, tail):
    layers = head + body * repeats + tail
    pattern = fold(layers)
    assert pattern.num_layers == len(layers)
    positions = [range(pattern.head + i, pattern.head + pattern.body_layers, max(1, pattern.period)) for i in range(pattern.period)]
    last = range(pattern.head + pattern.body_layers, len(layers))
    assert sorted(itertools.chain(range(pattern.head), *positions, last)) == list(range(len(layers)))
    for position in positions:
        assert len(position) == pattern.repeats
        assert len({layers[i] for i in position}) == 1
    if repeats > 1:
        assert cost(pattern) <= len(head) + len(body) + len(tail)


@given(STACKS, STACKS, st.integers(1, 12), STACKS, st.integers(1, 40))
def test_pieces_follow_each_other_and_share_programs_whatever_the_depth(head, body, repeats, tail, number):
    layers = head + body * repeats + tail
    pattern = fold(layers)
    body_runs = runs(layers[pattern.head : pattern.head + pattern.period])
    pieces = cut(pattern, body_runs, number)
    assert [i for piece in pieces for i in piece.layers] == list(range(len(layers)))
    assert len(pieces) >= min(number, len(layers))
    in_body = [piece for piece in pieces if not isinstance(piece.program, Alone)]
    assert len({piece.program for piece in in_body}) <= max(1, len(body_runs))
    for piece in in_body:
        start = piece.layers.start - pattern.head
        match piece.program:
            case Repeats(count):
                assert len(piece.layers) == count * pattern.period
                assert start == piece.first * pattern.period
            case RunLayers(run, count):
                repeat, i = divmod(piece.first, len(body_runs[run]))
                assert len(piece.layers) == count <= len(body_runs[run]) - i, "one repeat's layers only"
                assert start == repeat * pattern.period + body_runs[run].start + i


def sizes(layers: str, pieces: int) -> list[int]:
    pattern = fold(layers)
    return [len(p.layers) for p in cut(pattern, runs(layers[pattern.head : pattern.head + pattern.period]), pieces)]


@pytest.mark.parametrize(
    ("layers", "pieces", "expected"),
    [
        ("kkkm" * 3, 12, [1] * 12),
        ("kkkm" * 3, 6, [1] * 12),  # two do not divide three
        ("kkkm" * 3, 3, [4] * 3),
        ("kkkm" * 14 + "m", 16, [3, 1] * 14 + [1]),
        ("a" * 30, 16, [1] * 30),
        ("a" * 30, 12, [2] * 15),
        ("D" + "a" * 8, 2, [1, 4, 4]),
        ("abc", 2, [1, 1, 1]),
    ],
)
def test_known_cuts(layers, pieces, expected):
    assert sizes(layers, pieces) == expected


def test_whole_leaves_empty_pieces_out():
    assert [p.layers for p in whole(fold("aaaa"))] == [range(4)]
    assert [p.layers for p in whole(fold("Dkmkmt"))] == [range(1), range(1, 5), range(5, 6)]


@pytest.mark.parametrize(
    ("layers", "pattern"),
    [
        ("a", Pattern(1, 0, 0, 0)),
        ("ab", Pattern(2, 0, 0, 0)),
        ("aa", Pattern(0, 1, 2, 0)),
        ("aaaa", Pattern(0, 1, 4, 0)),
        ("kkkmkkkm", Pattern(0, 4, 2, 0)),
        ("Dkkmkkkmkm", Pattern(1, 4, 2, 1)),  # the body is shifted by one, so that it starts right behind the dense layer
        ("Dmmmm", Pattern(1, 1, 4, 0)),
        ("ssssfssssfss", Pattern(0, 5, 2, 2)),
        ("abc", Pattern(3, 0, 0, 0)),
    ],
)
def test_known_stacks(layers, pattern):
    assert fold(layers) == pattern


def test_depth_costs_nothing():
    """57 and 29 layers of one pattern compile the same head, body and tail."""
    deep, shallow = fold("kkkm" * 14 + "m"), fold("kkkm" * 7 + "m")
    assert (deep.num_layers, shallow.num_layers) == (57, 29)
    assert (deep.head, deep.period, deep.tail) == (shallow.head, shallow.period, shallow.tail) == (0, 4, 1)
    assert (deep.repeats, shallow.repeats) == (14, 7)


def test_only_equality_of_layers_counts():
    assert fold([("a", 1), ("b",), ("a", 1), ("b",)]) == fold("xyxy") == Pattern(0, 2, 2, 0)


@pytest.mark.parametrize(
    ("layers", "expected"),
    [("", []), ("a", [(0, 1)]), ("aab", [(0, 2), (2, 3)]), ("aba", [(0, 1), (1, 2), (2, 3)]), ("aaaa", [(0, 4)])],
)
def test_runs_are_consecutive_equal_layers(layers, expected):
    assert [(run.start, run.stop) for run in runs(layers)] == expected
