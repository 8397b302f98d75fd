"""Parts of a recorded trace: a stretch of the file, and in it a window per seed."""

import dataclasses
import itertools
import json

import pytest

from prfaas_jax.errors import InvalidInput
from prfaas_jax.simulation.traces import AzureTrace, MooncakeTrace, open_workload
from prfaas_jax.simulation.workload_mix import workload_mix

LINES = 60


@pytest.fixture
def mooncake(tmp_path):
    """Ten lines a tick of 3 s; block ids name the line."""
    path = tmp_path / "trace.jsonl"
    rows = [{"timestamp": 3000 * (i // 10), "input_length": 600, "output_length": i + 1, "hash_ids": [0, i + 1]} for i in range(LINES)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return lambda **options: MooncakeTrace(path, **options)


@pytest.fixture
def azure(tmp_path):
    """A line every second."""
    path = tmp_path / "trace.csv"
    rows = (f"2023-11-16 18:{i // 60:02}:{i % 60:02},600,{i + 1}\n" for i in range(LINES))
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + "".join(rows))
    return lambda **options: AzureTrace(path, **options)


@pytest.fixture(params=["mooncake", "azure"])
def trace(request):
    return request.getfixturevalue(request.param)


def lines(workload, seed=0):
    return [row.output_tokens - 1 for row in workload.arrivals(seed)]


def test_a_stretch_is_what_lies_from_start_to_stop(trace):
    assert lines(trace(start=25)) == list(range(25, 60)) and lines(trace(stop=13)) == list(range(13))
    assert lines(trace(start=17, stop=43)) == list(range(17, 43)) and lines(trace(start=17, stop=43, requests=5)) == list(range(17, 22))
    assert lines(trace(start=50, requests=500)) == list(range(50, 60)), "`requests` may be more than there are"
    assert lines(trace(start=55, repeat=2, stop=65)) == [*range(55, 60), *range(5)]


def test_a_part_begins_at_0_and_is_otherwise_the_file(trace):
    whole, part = list(trace().arrivals(3)), list(trace(start=17, stop=43).arrivals(3))
    assert part[0].time_s == 0.0
    for before, after in zip(whole[17:43], part, strict=True):
        assert before[1:] == after[1:] and after.time_s == pytest.approx(before.time_s - whole[17].time_s)
    assert list(trace(start=17).scaled(2.0).arrivals(3))[-1].time_s == pytest.approx((whole[-1].time_s - whole[17].time_s) / 2)


def test_each_seed_has_its_window_and_they_are_evenly_spaced(trace):
    windows = trace(start=10, stop=60, requests=10, windows=5)
    assert [lines(windows, seed) for seed in range(5)] == [list(range(i, i + 10)) for i in (10, 20, 30, 40, 50)]
    assert lines(windows, 2003) == lines(windows, 3) and next(windows.arrivals(2003)).time_s == 0.0
    overlapping = trace(start=10, stop=60, requests=30, windows=3)
    assert [lines(overlapping, seed)[0] for seed in range(3)] == [10, 20, 30] and len(lines(overlapping, 1)) == 30
    assert [lines(trace(stop=60, requests=60, windows=3), seed)[0] for seed in range(3)] == [0, 0, 0]
    assert lines(dataclasses.replace(windows, windows=1), 4) == list(range(10, 20))


def test_a_window_has_the_jitter_of_its_seed(mooncake):
    windows = mooncake(stop=60, requests=30, windows=2)
    times = [[row.time_s for row in windows.arrivals(seed)] for seed in (0, 2)]
    assert times[0] != times[1] and times[0] == [row.time_s for row in windows.arrivals(0)]
    # Cut after the jitter: a tick that the window has half of takes half of its time.
    half = [row.time_s for row in mooncake(start=5, requests=30).arrivals(0)]
    assert all(a <= b for a, b in itertools.pairwise(half)) and half[-1] < 10


def test_the_mix_of_a_part_has_the_prefixes_of_the_part(mooncake):
    mix, rate = workload_mix(mooncake(start=30, stop=60, jitter=False))
    assert len(mix.tokens) == 30 and rate == pytest.approx(29 / 6)
    assert sorted(mix.cached_pd) == [0.0] + [512.0] * 29, "the first of the part finds nothing"


def test_what_the_file_does_not_have_is_refused_when_it_is_reached(trace):
    for seed in (0, 1):
        stream = trace(start=40, stop=80, requests=20, windows=2).arrivals(seed)
        if seed == 0:
            assert len(list(stream)) == 20
            continue
        with pytest.raises(InvalidInput, match=r"trace.start=40"):
            next(stream)
    with pytest.raises(InvalidInput, match=r"trace.stop=61: expected at most the 60 arrivals of the file"):
        list(trace(stop=61).arrivals(0))
    with pytest.raises(InvalidInput, match=r"trace.start=60: expected fewer than the arrivals of the file"):
        list(trace(start=60).arrivals(0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": -1}, "trace.start=-1"),
        ({"start": 1.5}, "trace.start=1.5"),
        ({"stop": 0}, "trace.stop=0"),
        ({"start": 9, "stop": 9}, "trace.stop=9: expected an arrival after trace.start=9"),
        ({"windows": 0}, "trace.windows=0"),
        ({"windows": 2, "stop": 60}, "trace.windows=2: expected 1, or `requests` and `stop`"),
        ({"windows": 2, "requests": 10}, "trace.windows=2: expected 1, or `requests` and `stop`"),
        ({"windows": 2, "requests": 31, "start": 10, "stop": 40}, "trace.requests=31: expected at most the 30 arrivals from start to stop"),
    ],
)
def test_parts_that_make_no_sense_are_refused_before_any_work(trace, options, message):
    with pytest.raises(InvalidInput, match=message):
        trace(**options)


def test_parts_are_options_of_every_reader(trace):
    made = trace(start=10, stop=60, requests=10, windows=5)
    assert open_workload(made.path, start=10, stop=60, requests=10, windows=5) == made
