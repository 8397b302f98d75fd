import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transfer_fixtures import SPEC, WINDOW

from prfaas_jax.errors import TransferError
from prfaas_jax.kvcache.segments import SegmentKey
from prfaas_jax.transfer.coverage import Coverage, Intervals

SIZE = 40
pieces = st.lists(st.tuples(st.integers(0, SIZE - 1), st.integers(1, 8)).map(lambda p: (p[0], min(SIZE, p[0] + p[1]))), max_size=30)


def half_open(size: int) -> st.SearchStrategy[tuple[int, int]]:
    return st.integers(0, size - 1).flatmap(lambda start: st.tuples(st.just(start), st.integers(start + 1, size)))


@given(pieces)
def test_intervals_agree_with_a_bitmap(ranges):
    intervals, bitmap = Intervals(), np.zeros(SIZE, bool)
    for start, stop in ranges:
        assert intervals.overlap(start, stop) == bitmap[start:stop].sum()
        if not bitmap[start:stop].any():
            intervals.add(start, stop)
            bitmap[start:stop] = True
        for first, last in ((0, SIZE), (SIZE // 3, SIZE // 2), (SIZE // 2, SIZE)):
            missing = first + np.flatnonzero(~bitmap[first:last])
            gap = intervals.first_gap(first, last)
            if gap is None:
                assert not missing.size
            else:
                assert gap[0] == missing[0]
                assert not bitmap[gap[0] : gap[1]].any()
                assert gap[1] == last or bitmap[gap[1]]


@given(pieces, st.data())
def test_what_is_taken_out_of_intervals_is_missing_again(ranges, data):
    intervals, bitmap = Intervals(), np.zeros(SIZE, bool)
    for start, stop in ranges:
        if not bitmap[start:stop].any():
            intervals.add(start, stop)
            bitmap[start:stop] = True
    start, stop = data.draw(half_open(SIZE))
    if bitmap[start:stop].all():
        intervals.remove(start, stop)
        bitmap[start:stop] = False
    else:
        with pytest.raises(KeyError):
            intervals.remove(start, stop)
    for at in range(SIZE):
        assert intervals.overlap(at, at + 1) == bitmap[at]


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_coverage_agrees_with_a_bitmap(data):
    """Of each kind of group the tokens that it keeps, and no others: shorter than the window, as long, longer."""
    length = data.draw(st.sampled_from([1, WINDOW.window, WINDOW.window + 3]))
    coverage = Coverage(SPEC, length)
    kept = [group.cache.kept(length) for group in SPEC.groups]
    bitmaps = {
        (g, t): np.zeros((len(group.layers), kept[g][1] - kept[g][0]), bool)
        for g, group in enumerate(SPEC.groups)
        for t in range(len(group.cache.tensors))
    }
    todo = sorted(bitmaps)
    for _ in range(data.draw(st.integers(0, 40))):
        at = data.draw(st.sampled_from(todo))
        layers, tokens = (data.draw(half_open(n)) for n in bitmaps[at].shape)
        first = kept[at[0]][0]
        key = SegmentKey(*at, layers, (first + tokens[0], first + tokens[1]), (0, 1))
        key.check(SPEC, length)
        place = slice(*layers), slice(*tokens)
        if bitmaps[at][place].any():
            with pytest.raises(TransferError, match="overlaps"):
                coverage.claim(key)
        else:
            coverage.claim(key)
            bitmaps[at][place] = True
    assert (coverage.gap() is None) == all(bitmap.all() for bitmap in bitmaps.values())
    for (g, t), bitmap in bitmaps.items():
        for layer, token in np.argwhere(~bitmap):
            coverage.claim(SegmentKey(g, t, (layer, layer + 1), (kept[g][0] + token, kept[g][0] + token + 1), (0, 1)))
    assert coverage.gap() is None


def test_coverage_of_nothing_has_no_gap():
    assert Coverage(SPEC, 0).gap() is None
    assert "group 0, tensor 0, layer 0: tokens [0, 3)" in Coverage(SPEC, 3).gap()


@pytest.mark.parametrize(("group", "missing"), [(2, "tokens [14, 20)"), (3, "tokens [19, 20)")])
def test_a_gap_of_a_window_or_state_names_the_tokens_that_stay(group, missing):
    coverage = Coverage(SPEC, 20)
    for g, other in enumerate(SPEC.groups):
        for t in range(len(other.cache.tensors)):
            if (g, t) != (group, 1):
                coverage.claim(SegmentKey(g, t, (0, len(other.layers)), other.cache.kept(20), (0, 1)))
    assert coverage.gap() == f"group {group}, tensor 1, layer 0: {missing}"
