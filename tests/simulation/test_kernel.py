import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prfaas_jax.errors import InvalidInput
from prfaas_jax.simulation.kernel import Kernel


@given(st.lists(st.tuples(st.sampled_from([0.0, 1.0, 1.5, 2.0, math.inf]), st.sampled_from([None, 0.0, 0.5])), max_size=30))
def test_events_run_in_order_of_time_then_of_making(events):
    kernel, seen, made = Kernel(), [], []

    def make(time, then):
        number = len(made)
        made.append(time)

        def handler(_):
            assert kernel.now == time
            seen.append((time, number))
            if then is not None:
                make(kernel.now + then, None)

        kernel.at(time, handler)

    for time, then in events:
        make(time, then)
    kernel.run()
    assert seen == sorted(seen)
    assert sorted(n for _, n in seen) == [n for n, time in enumerate(made) if time < math.inf]
    assert kernel.events == len(seen) and kernel.pending == 0


def test_runs_until_and_with_that_moment():
    kernel, seen = Kernel(), []
    for time in (1.0, 2.0, 3.0):
        kernel.at(time, seen.append, time)
    kernel.run(2.0)
    assert seen == [1.0, 2.0] and kernel.now == 2.0 and kernel.pending == 1
    kernel.run(2.5)
    assert kernel.now == 2.5
    kernel.run(1.0)
    assert kernel.now == 2.5, "the clock does not go back"
    kernel.run()
    assert seen == [1.0, 2.0, 3.0] and kernel.now == 3.0


@pytest.mark.parametrize("time", [0.5, -1.0, math.nan])
def test_the_past_is_refused(time):
    kernel = Kernel()
    kernel.run(1.0)
    with pytest.raises(InvalidInput, match="event time"):
        kernel.at(time, print)
