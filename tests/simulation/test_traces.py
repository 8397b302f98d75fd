import gzip
import itertools
import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prfaas_jax.errors import InvalidInput
from prfaas_jax.scheduling.mix import LogNormalLengths
from prfaas_jax.simulation.traces import AzureTrace, MooncakeTrace, open_workload
from prfaas_jax.simulation.workload_mix import workload_mix
from prfaas_jax.simulation.workloads import Arrival, Poisson, Sessions, Synthetic

TRACES = Path(__file__).resolve().parents[2].parent / "shared" / "traces"
MOONCAKE = TRACES / "mooncake_conversation_trace.jsonl.gz"
AZURE = TRACES / "AzureLLMInferenceTrace_conv_2023.csv.gz"


def recorded(path):
    return pytest.mark.skipif(not path.is_file(), reason=f"{path} is not there")


def line(timestamp=0, tokens=600, output=10, ids=(0, 1), **more):
    return {"timestamp": timestamp, "input_length": tokens, "output_length": output, "hash_ids": list(ids), **more}


THREE_TICKS = [line(t, ids=(0, i)) for i, t in enumerate([500] * 4 + [3500] * 3 + [6499] * 5, 1)]


@pytest.fixture
def mooncake(tmp_path):
    """Writes lines (dicts, or text as it is) and opens them."""

    def write(lines, name="trace.jsonl", **options):
        path = tmp_path / name
        text = "".join((item if isinstance(item, str) else json.dumps(item)) + "\n" for item in lines)
        path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
        return MooncakeTrace(path, **options)

    return write


@pytest.fixture
def azure(tmp_path):
    def write(text, **options):
        path = tmp_path / "trace.csv"
        path.write_bytes(text.encode())
        return AzureTrace(path, **options)

    return write


HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens\r\n"


@pytest.mark.parametrize("name", ["trace.jsonl", "trace.jsonl.gz"])
def test_mooncake_lines_become_arrivals(mooncake, name):
    trace = mooncake([line(7000, 513, 3, [5, 9]), "", line(7250.5, 512, 4, [6])], name, jitter=False)
    assert list(trace.arrivals(0)) == [Arrival(0.0, 513, 3, (5, 9), -1), Arrival(0.2505, 512, 4, (6,), -1)]


def test_block_size_and_time_unit_belong_to_the_file(mooncake):
    trace = mooncake([line(61.0, 33, 1, [0, 1, 2]), line(61.5, 16, 1, [0])], block_tokens=16, unit_s=1.0, jitter=False)
    assert [(row.time_s, row.blocks) for row in trace.arrivals(0)] == [(0.0, (0, 1, 2)), (0.5, (0,))]


def test_sessions_are_read_where_the_file_has_them(mooncake):
    fields = [{"session_id": 4}, {"chat_id": 5}, {"session_id": "a"}, {"session_id": "b"}, {"session_id": "a"}, {"chat_id": None}]
    fields += [{"session_id": -1}, {"chat_id": 8, "parent_chat_id": 5}, {"session_id": 3, "chat_id": 8, "parent_chat_id": 5}]
    sessions = [row.session for row in mooncake([line(**more) for more in fields]).arrivals(0)]
    assert sessions[:2] == [4, 5] and sessions[5:] == [-1, -1, -1, 3]
    assert sessions[2] == sessions[4] != sessions[3] and min(sessions[2:5]) > 2**32


def test_jitter_spreads_a_tick_in_order(mooncake):
    trace = mooncake(THREE_TICKS)
    rows = list(trace.arrivals(0))
    times = np.array([row.time_s for row in rows])
    # The smallest step between timestamps is 2.999 s.
    for start, rows_of_tick in ((0, slice(0, 4)), (3, slice(4, 7)), (5.999, slice(7, 12))):
        assert np.all((times[rows_of_tick] >= start) & (times[rows_of_tick] <= start + 2.999))
    assert np.all(np.diff(times) > 0)
    assert [row.blocks[1] for row in rows] == list(range(1, 13)), "arrivals keep the order of the file"
    assert rows == list(trace.arrivals(0)) != list(trace.arrivals(1))


def test_a_tick_given_too_long_does_not_mix_ticks(mooncake):
    times = [row.time_s for row in mooncake(THREE_TICKS, tick_s=60.0).arrivals(0)]
    assert times == sorted(times) and times[3] < 3.0 <= times[4] and times[6] < 5.999 <= times[7] < times[-1] < 66


def test_jitter_is_uniform_inside_the_tick(mooncake):
    lines = [line(3000 * (i // 10)) for i in range(20_000)]
    inside = np.sort([row.time_s % 3.0 for row in mooncake(lines).arrivals(0)]) / 3.0
    assert np.abs(inside - (np.arange(20_000) + 0.5) / 20_000).max() < 0.015


def test_without_jitter_arrivals_stay_on_their_timestamps(mooncake):
    assert [row.time_s for row in mooncake(THREE_TICKS, jitter=False).arrivals(0)] == [0.0] * 4 + [3.0] * 3 + [pytest.approx(5.999)] * 5


@pytest.mark.parametrize("jitter", [False, True])
def test_scaling_the_rate_divides_the_times(mooncake, jitter):
    trace = mooncake(THREE_TICKS, jitter=jitter)
    for slow, fast in zip(trace.arrivals(0), trace.scaled(2.0).scaled(1.25).arrivals(0), strict=True):
        assert fast.time_s == pytest.approx(slow.time_s / 2.5) and fast[1:] == slow[1:]


@pytest.mark.parametrize("jitter", [False, True])
def test_a_repetition_follows_one_tick_later_and_shares_nothing(mooncake, jitter):
    lines = [line(0, session_id=2), line(0, ids=(0, 4)), line(2000, ids=(0, 7), session_id=0), line(4000, ids=(0, 1))]
    trace = mooncake(lines, repeat=3, jitter=jitter)
    rows = list(trace.arrivals(0))
    assert len(rows) == 12
    assert all(before.time_s <= after.time_s for before, after in itertools.pairwise(rows))
    for n, play in enumerate((rows[:4], rows[4:8], rows[8:])):
        assert [row.blocks for row in play] == [(8 * n + a, 8 * n + b) for a, b in ((0, 1), (0, 4), (0, 7), (0, 1))]
        assert [row.session for row in play] == [3 * n + 2, -1, 3 * n, -1]
        starts = [6.0 * n + t for t in (0, 0, 2, 4)]
        if jitter:
            assert all(start <= row.time_s <= start + 2 for start, row in zip(starts, play, strict=True))
        else:
            assert [row.time_s for row in play] == starts


def test_a_trace_can_be_played_for_ever_and_cut_off(mooncake):
    trace = mooncake(THREE_TICKS, repeat=None, requests=100)
    assert len(list(trace.arrivals(0))) == 100
    assert len(list(mooncake(THREE_TICKS, requests=5).arrivals(0))) == 5
    assert len(list(mooncake(THREE_TICKS, requests=500).arrivals(0))) == 12


def test_a_trace_of_one_time_repeats_only_with_a_tick(mooncake):
    assert [row.time_s for row in mooncake([line(5), line(5)], repeat=2, tick_s=3.0, jitter=False).arrivals(0)] == [0, 0, 3, 3]
    assert [row.time_s for row in mooncake([line(5), line(5)]).arrivals(0)] == [0, 0]
    with pytest.raises(InvalidInput, match=r"repeat=2: expected .*tick_s"):
        list(mooncake([line(5), line(5)], repeat=2).arrivals(0))


@settings(max_examples=50)
@given(
    st.lists(st.integers(0, 3).map(lambda n: 100 * n), min_size=1, max_size=60),
    st.integers(0, 2**32),
    st.one_of(st.none(), st.floats(0.01, 5)),
    st.floats(0.1, 10),
)
def test_times_never_go_backwards(tmp_path_factory, steps, seed, tick_s, rate_scale):
    path = tmp_path_factory.mktemp("traces") / "t.jsonl"
    path.write_text("".join(json.dumps(line(t)) + "\n" for t in itertools.accumulate(steps, initial=0)))
    repeat = 1 if tick_s is None else 2
    rows = list(MooncakeTrace(path, tick_s=tick_s, rate_scale=rate_scale, repeat=repeat).arrivals(seed))
    assert len(rows) == repeat * (len(steps) + 1)
    assert all(before.time_s <= after.time_s for before, after in itertools.pairwise(rows))


@pytest.mark.parametrize(
    ("bad", "field", "value", "expected"),
    [
        ("{not json", "", "{not json", "one JSON object"),
        ("[1, 2]", "", "[1, 2]", "one JSON object"),
        ("3", "", "3", "one JSON object"),
        ('{"timestamp": 1}', "", '{"timestamp": 1}', "one JSON object of a trace (Object missing required field `input_length`)"),
        (json.dumps(line(2999)), " timestamp", 2999, "at least the 3000"),
        (json.dumps(line("4000")), " timestamp", "4000", "a number"),
        ('{"timestamp": NaN, "input_length": 5, "output_length": 1, "hash_ids": [1]}', "", None, "one JSON object"),
        ('{"timestamp": 1e400, "input_length": 5, "output_length": 1, "hash_ids": [1]}', " timestamp", None, "a number"),
        (json.dumps(line(4000, tokens=0, ids=())), " input_length", 0, "at least 1"),
        (json.dumps(line(4000, tokens=-5)), " input_length", -5, "at least 1"),
        (json.dumps(line(4000, tokens=600.0)), " input_length", 600.0, "whole number"),
        (json.dumps(line(4000, output=0)), " output_length", 0, "at least 1"),
        (json.dumps(line(4000, output=True)), " output_length", True, "whole number"),
        (json.dumps(line(4000, tokens=512)), " hash_ids", "2 ids", "1 ids for input_length=512 at block_tokens=512"),
        (json.dumps({**line(4000), "hash_ids": 7}), " hash_ids", 7, "whole numbers"),
        (json.dumps(line(4000, ids=(1, "x"))), " hash_ids", "[1, 'x']", "whole numbers"),
        (json.dumps(line(4000, ids=(1, -2))), " hash_ids", "[1, -2]", "at least 0"),
        (json.dumps(line(4000, session_id=1.5)), " session_id", 1.5, "whole number"),
        (json.dumps(line(4000, chat_id=-7)), " chat_id", -7, "at least 0"),
    ],
)
@pytest.mark.parametrize("jitter", [False, True])
def test_a_bad_mooncake_line_is_named_when_it_is_reached(mooncake, bad, field, value, expected, jitter):
    trace = mooncake([line(0), line(3000), bad, line(9000)], jitter=jitter)
    stream = trace.arrivals(0)
    next(stream)
    with pytest.raises(InvalidInput) as caught:
        list(stream)
    assert caught.value.field == f"{trace.path}:3{field}"
    assert expected in caught.value.expected
    if value is not None:
        assert caught.value.value == value


def test_the_wrong_block_size_is_refused(mooncake):
    with pytest.raises(InvalidInput, match=r"trace.jsonl:1 hash_ids='2 ids': expected 38 ids for input_length=600 at block_tokens=16"):
        list(mooncake(THREE_TICKS, block_tokens=16).arrivals(0))


def test_azure_rows_become_arrivals(azure):
    day = "2023-11-16 18:17:"
    trace = azure(HEADER + f"{day}03.9799600,4808,10\r\n\r\n{day}04.0319600,3180,8\r\n{day}04.0319600,2,1")
    assert list(trace.arrivals(0)) == list(trace.arrivals(5))
    assert [row[1:3] for row in trace.arrivals(0)] == [(4808, 10), (3180, 8), (2, 1)]
    assert [row.time_s for row in trace.arrivals(0)] == [0.0, 0.052, 0.052]
    assert {(row.blocks, row.session) for row in trace.arrivals(0)} == {((), -1)} and trace.block_tokens == 0
    assert [row.time_s for row in trace.scaled(4.0).arrivals(0)] == pytest.approx([0.0, 0.013, 0.013])


def test_azure_columns_are_found_by_name(azure):
    rows = "7,100,x,2024-05-10 00:00:00.009930+00:00\n8,200,y,2024-05-10 00:00:01+00:00\n"
    trace = azure("\ufeffGeneratedTokens, ContextTokens,extra,TIMESTAMP\n" + rows)
    assert [row[:3] for row in trace.arrivals(0)] == [(0.0, 100, 7), (pytest.approx(0.99007), 200, 8)]


def test_azure_repeats_a_mean_gap_after_its_end(azure):
    rows = "".join(f"2023-11-16 18:17:0{s},5,5\n" for s in (0, 1, 4))
    assert [row.time_s for row in azure(HEADER + rows, repeat=2).arrivals(0)] == [0, 1, 4, 6, 7, 10]
    assert len(list(azure(HEADER + rows, repeat=None, requests=10).arrivals(0))) == 10


@pytest.mark.parametrize(
    ("bad", "field", "value"),
    [
        ("2023-11-16 18:17:05.0,100", "", "2023-11-16 18:17:05.0,100"),
        ("2023-11-16 18:17:05.0,100,5,6", "", "2023-11-16 18:17:05.0,100,5,6"),
        ("yesterday,100,5", " TIMESTAMP", "yesterday"),
        ("2023-11-16 18:17:03.0,100,5", " TIMESTAMP", "2023-11-16 18:17:03.0"),
        ("2023-11-16 18:17:05.0,0,5", " ContextTokens", "0"),
        ("2023-11-16 18:17:05.0,-3,5", " ContextTokens", "-3"),
        ("2023-11-16 18:17:05.0,100,0", " GeneratedTokens", "0"),
        ("2023-11-16 18:17:05.0,100,", " GeneratedTokens", ""),
        ("2023-11-16 18:17:05.0,1.5,5", " ContextTokens", "1.5"),
    ],
)
def test_a_bad_azure_row_is_named_when_it_is_reached(azure, bad, field, value):
    trace = azure(HEADER + "2023-11-16 18:17:04.0000000,10,10\r\n" + bad + "\r\n")
    stream = trace.arrivals(0)
    assert next(stream).tokens == 10
    with pytest.raises(InvalidInput) as caught:
        next(stream)
    assert (caught.value.field, caught.value.value) == (f"{trace.path}:3{field}", value)


@pytest.mark.parametrize("missing", ["TIMESTAMP", "ContextTokens", "GeneratedTokens"])
def test_a_missing_azure_column_is_named(azure, missing):
    with pytest.raises(InvalidInput, match=rf"trace.csv:1=.*: expected a header with the column {missing}"):
        list(azure(HEADER.replace(missing, "other") + "1,2,3\n").arrivals(0))


def test_an_empty_trace_is_refused(mooncake, azure):
    for trace in (mooncake([]), mooncake(["", ""], "blank.jsonl", repeat=None), azure(HEADER)):
        with pytest.raises(InvalidInput, match=r"trace.path=.*: expected at least one arrival"):
            list(trace.arrivals(0))
    with pytest.raises(InvalidInput, match=r"trace.csv:1='': expected a header"):
        list(azure("").arrivals(0))


def test_a_file_that_is_cut_short_or_no_text_is_refused_at_the_line(tmp_path):
    whole = gzip.compress("".join(json.dumps(line(i, ids=(i, i + 1))) + "\n" for i in range(5000)).encode())
    cut, plain, binary = tmp_path / "cut.jsonl.gz", tmp_path / "plain.jsonl.gz", tmp_path / "binary.jsonl"
    cut.write_bytes(whole[: len(whole) // 2])
    plain.write_bytes(b"{}\n")
    binary.write_bytes(whole)
    readable = "a readable file, gzip if its name ends in .gz"
    for path, expected in ((cut, readable), (plain, readable), (binary, "one JSON object of a trace")):
        with pytest.raises(InvalidInput, match=rf"{path}:\d+=.*: expected {expected}"):
            list(MooncakeTrace(path).arrivals(0))
    assert next(MooncakeTrace(cut).arrivals(0)).blocks == (0, 1), "what is readable is played"


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"block_tokens": 0}, "trace.block_tokens"),
        ({"rate_scale": 0.0}, "trace.rate_scale"),
        ({"rate_scale": -2.0}, "trace.rate_scale"),
        ({"tick_s": 0.0}, "trace.tick_s"),
        ({"requests": 0}, "trace.requests"),
        ({"repeat": 0}, "trace.repeat"),
        ({"unit_s": float("inf")}, "trace.unit_s"),
    ],
)
def test_bad_options_are_refused_before_any_work(mooncake, options, field):
    with pytest.raises(InvalidInput) as caught:
        mooncake(["not read"], **options)
    assert caught.value.field == field


@pytest.mark.parametrize("reader", [MooncakeTrace, AzureTrace])
def test_a_path_without_a_file_is_refused_before_any_work(reader, tmp_path):
    for path in (tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(InvalidInput, match=r"trace.path=.*: expected a file that exists"):
            reader(path)


def test_the_reader_is_chosen_by_name(tmp_path):
    for name, reader in (("a.jsonl", MooncakeTrace), ("b.jsonl.gz", MooncakeTrace), ("c.csv", AzureTrace), ("d.csv.gz", AzureTrace)):
        (tmp_path / name).touch()
        assert open_workload(tmp_path / name, rate_scale=2.0) == reader(tmp_path / name, rate_scale=2.0)
    for name in ("trace.json", "trace.gz", "trace"):
        with pytest.raises(InvalidInput, match=r"trace.path=.*\.jsonl or \.csv"):
            open_workload(tmp_path / name)
    with pytest.raises(InvalidInput, match=r"trace.jitter=True: expected an option of AzureTrace: rate_scale"):
        open_workload(tmp_path / "c.csv", jitter=True)


def test_memory_does_not_grow_with_the_file(mooncake):
    short, long = (mooncake([line(100 * i) for i in range(n)], f"{n}.jsonl") for n in (1500, 5000))

    def peak(trace):
        tracemalloc.start()
        assert sum(1 for _ in trace.arrivals(0)) >= 1500
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    peak(short)
    assert peak(long) < 1.1 * peak(short) + 10_000


def test_the_mix_of_a_trace_counts_what_an_endless_cache_would_hold(mooncake):
    lines = [
        line(0, 1100, 10, [0, 1, 2]),
        line(1000, 1600, 20, [0, 1, 3, 4]),  # two blocks seen
        line(2000, 1100, 30, [0, 1, 2]),  # the same prompt again: its whole blocks
        line(4000, 100, 40, [9]),
    ]
    mix, rate = workload_mix(mooncake(lines, jitter=False))
    assert rate == pytest.approx(3 / 4)
    order = np.argsort(mix.tokens * 100 + mix.output)
    assert mix.tokens[order].tolist() == [100, 1100, 1100, 1600]
    assert mix.output[order].tolist() == [40, 10, 30, 20]
    assert mix.cached_pd[order].tolist() == [0, 0, 1024, 1024]
    assert mix.weight.tolist() == [0.25] * 4 and not mix.cached_prfaas.any()


def test_the_mix_of_a_distribution_is_its_distribution():
    lengths = LogNormalLengths()
    mix, rate = workload_mix(Synthetic(Poisson(2.5), lengths, 1024), requests=40_000, bins=1000)
    assert len(mix.tokens) == 1000 and not mix.cached_pd.any()
    assert rate == pytest.approx(2.5, rel=0.03)
    assert mix.mean(mix.tokens) == pytest.approx(27_486, rel=0.03)
    assert mix.mean(mix.output) == pytest.approx(1024)


def test_the_mix_of_sessions_has_prefixes():
    growth = LogNormalLengths(6.0, 0.5, 16, 4096)
    workload = Sessions(Poisson(10.0), LogNormalLengths(8.0, 0.5, 512, 16_384), growth, 100, mean_turns=6.0, think_s=5.0, block_tokens=64)
    mix, rate = workload_mix(workload, requests=20_000)
    assert rate == pytest.approx(10, rel=0.05)
    # What is new in a later turn: the answer, the added tokens and part of a block.
    assert 500 < mix.mean(mix.uncached) < mix.mean(mix.tokens) / 3


def test_a_mix_needs_time_to_pass(mooncake):
    with pytest.raises(InvalidInput, match=r"workload='1 arrivals in 0.0 s': expected at least two arrivals"):
        workload_mix(mooncake([line()]))
    with pytest.raises(InvalidInput, match="bins=0"):
        workload_mix(mooncake(THREE_TICKS), bins=0)
    with pytest.raises(InvalidInput, match="requests=0"):
        workload_mix(mooncake(THREE_TICKS), requests=0)


@recorded(MOONCAKE)
def test_the_conversation_trace():
    trace = open_workload(MOONCAKE)
    rows = list(trace.arrivals(0))
    assert len(rows) == 12_031 and rows == list(trace.arrivals(0))
    times = np.array([row.time_s for row in rows])
    assert np.all(np.diff(times) >= 0) and 3536 < times[-1] < 3540
    # Jitter takes the volleys away: counts per second vary as those of independent arrivals do.
    per_second = np.bincount(times.astype(int))
    assert 0.7 < per_second.var() / per_second.mean() < 1.6
    volleys = np.bincount([int(row.time_s) for row in MooncakeTrace(MOONCAKE, jitter=False).arrivals(0)])
    assert volleys.var() / volleys.mean() > 5
    # Ids are chained: each stands after one id, at one place.
    before_id = {}
    for row in rows[:3000]:
        for previous, block in itertools.pairwise((None, *row.blocks)):
            assert before_id.setdefault(block, previous) == previous


@recorded(MOONCAKE)
def test_the_mix_of_the_conversation_trace():
    mix, rate = workload_mix(MooncakeTrace(MOONCAKE))
    assert rate == pytest.approx(3.4, rel=0.01)
    assert mix.mean(mix.tokens) == pytest.approx(12_035, rel=0.001)
    assert mix.mean(mix.output) == pytest.approx(343, rel=0.002)
    assert mix.mean(mix.cached_pd) / mix.mean(mix.tokens) == pytest.approx(0.3736, abs=0.001)


@recorded(AZURE)
def test_the_azure_trace():
    rows = list(open_workload(AZURE).arrivals(0))
    assert len(rows) == 19_366
    assert rows[0][1:3] == (374, 44) and rows[-1][1:3] == (197, 183)
    assert rows[-1].time_s == pytest.approx(3501.721937)
    assert all(before.time_s <= after.time_s for before, after in itertools.pairwise(rows))
