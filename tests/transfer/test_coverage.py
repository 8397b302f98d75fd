import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transfer_fixtures import SPEC

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
        missing = np.flatnonzero(~bitmap)
        gap = intervals.first_gap(SIZE)
        if gap is None:
            assert not missing.size
        else:
            assert gap[0] == missing[0]
            assert not bitmap[gap[0] : gap[1]].any()
            assert gap[1] == SIZE or bitmap[gap[1]]


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_coverage_agrees_with_a_bitmap(data):
    length = 6
    coverage = Coverage(SPEC, length)
    bitmaps = {
        (g, t): np.zeros((len(group.layers), length), bool) for g, group in enumerate(SPEC.groups) for t in range(len(group.cache.tensors))
    }
    for _ in range(data.draw(st.integers(0, 25))):
        at = data.draw(st.sampled_from(sorted(bitmaps)))
        layers, tokens = (data.draw(half_open(n)) for n in bitmaps[at].shape)
        key = SegmentKey(*at, layers, tokens, (0, 1))
        place = slice(*layers), slice(*tokens)
        if bitmaps[at][place].any():
            with pytest.raises(TransferError, match="overlaps"):
                coverage.claim(key)
        else:
            coverage.claim(key)
            bitmaps[at][place] = True
    assert (coverage.gap() is None) == all(bitmap.all() for bitmap in bitmaps.values())


def test_coverage_of_nothing_has_no_gap():
    assert Coverage(SPEC, 0).gap() is None
    assert "group 0, tensor 0, layer 0: tokens [0, 3)" in Coverage(SPEC, 3).gap()
