"""Figures of live runs: by the very definitions of the simulator, from rows and from what relays saw."""

import itertools
import types

import pytest

from configs.clusters import load_deployment
from configs.clusters.paper_profiled import get_config as paper_profiled
from configs.clusters.two_sites_cpu import get_config as two_sites
from configs.models import load_model_config
from prfaas_jax.errors import InvalidInput
from prfaas_jax.results import Workdir
from prfaas_jax.serving.report import PARTS
from prfaas_jax.testing import live_bench, live_tables
from prfaas_jax.testing.replay_script import Row, as_played

SCALE = 1e-3


@pytest.fixture(scope="module")
def played():
    """The deployment, its arrivals, what the simulator makes of them, and rows as if a live run had gone exactly so."""
    config = paper_profiled()
    with config.unlocked():
        config.requests = 200
    deployment = load_deployment(config)
    recorded = as_played(deployment.workload, 1, 200, deployment.scale.tokens)
    simulated = live_bench.simulated(deployment, recorded)
    rows = []
    for job, row in zip(simulated.jobs, simulated.rows, strict=True):
        moved = round(job.sent_bytes * SCALE)
        rows.append(
            Row(
                number=job.id,
                tenant="",
                tokens=job.arrival.tokens,
                new_tokens=17,
                arrival_s=job.arrival.time_s,
                sent_s=job.arrival.time_s,
                first_s=job.first_s,
                done_s=job.done_s,
                received=17,
                placement="remote",  # also beside its decode server
                prefill=row["prefill"] or "pd",
                decode="pd",
                parts=dict.fromkeys(PARTS, 0.0) | {"queue": row["queue_s"], "prefill": row["prefill_s"]},
                kv_moved=moved,
                kv_expected=moved,
            )
        )
    return deployment, recorded, simulated, rows


def test_a_live_run_is_counted_as_a_simulation_is(played):
    deployment, recorded, simulated, rows = played
    figures = live_bench.live_figures(rows, recorded, deployment, SCALE)
    for name in set(simulated.figures) - {"conversions", "simulated_s", "events", "egress_gbps"}:
        assert figures[name] == pytest.approx(simulated.figures[name], rel=1e-9), name
    assert figures["egress_gbps"] == pytest.approx(simulated.figures["egress_gbps"], rel=1e-5), "live bytes are whole"
    assert all(abs(error) < 1e-5 for error in live_bench.errors(figures, simulated.figures).values())
    assert live_bench.same_placement(rows, simulated.rows) == 1.0
    assert figures["failed"] == {} and figures["parts_mean_s"]["prefill"] == pytest.approx(
        sum(row["prefill_s"] for row in simulated.rows) / 200
    )


def test_chaos_is_what_late_arrivals_make_of_a_simulation(played):
    deployment, recorded, simulated, _ = played
    found = live_bench.chaos(deployment, recorded, simulated.figures, count=3)
    # A threshold looks at the prompt alone: the same bytes move, and nobody waits much longer.
    assert set(found) == set(live_bench.COMPARED) and found["egress"] < 1e-3 and 0 < found["ttft_p50"] < 0.05
    assert live_bench.chaos(deployment, recorded, simulated.figures, late_s=0.0, count=2) == dict.fromkeys(found, 0.0)
    slower = {field: 2 * simulated.figures[field] for field in live_bench.COMPARED.values()}
    assert live_bench.chaos(deployment, recorded, slower, late_s=0.0, count=2) == dict.fromkeys(found, 0.5)


def test_what_failed_is_no_completion(played):
    deployment, recorded, _, rows = played
    lost = [*rows[:150], *(Row(i, "", 1, 1, rows[i].arrival_s, error="RESOURCE_EXHAUSTED") for i in range(150, 200))]
    figures = live_bench.live_figures(lost, recorded, deployment, SCALE)
    assert figures["requests"] == 140 and figures["failed"] == {"RESOURCE_EXHAUSTED": 50} and figures["failed_share"] == 0.25


def test_without_profiles_there_is_no_slo(played):
    _, recorded, _, rows = played
    deployment = load_deployment(two_sites())
    figures = live_bench.live_figures(rows, recorded, deployment, 1.0)
    assert "goodput_rps" not in figures and "slo_share" not in figures and figures["ttft_p50_s"] > 0
    with pytest.raises(InvalidInput, match=r"config\.clusters"):
        live_bench.simulated(deployment, recorded)


def test_what_is_sustained_is_all_over_the_time_until_the_last(played):
    assert live_bench.lambda_live([2.0, 9.0, 5.0], 1.0) == 3 / 8
    with pytest.raises(InvalidInput, match="first_s"):
        live_bench.lambda_live([], 0.0)


def test_link_use_is_bytes_per_period_of_the_model():
    # 1000 live bytes a wall second, which are 10^6 of the model, in two of its seconds.
    trace = types.SimpleNamespace(samples=[(100.0, 0), (101.0, 1000), (104.0, 1000), (105.0, 2000)])
    rows = live_bench.egress_rows({"a->b": trace}, began=100.0, time_scale=2.0, bytes_scale=SCALE, period_s=1.0)
    assert [row["time_s"] for row in rows] == [float(i) for i in range(1, 11)]
    gbit = [row["a->b"] for row in rows]
    assert gbit[:3] == pytest.approx([4e-3, 4e-3, 0.0]) and sum(gbit) == pytest.approx(2 * 8e-3)


def test_a_probe_is_one_prompt_at_a_time_of_those_that_were_drawn(played):
    deployment, recorded, _, _ = played
    asks = live_bench.probe_asks(deployment, recorded, 10)
    lengths = [ask.tokens for ask in asks]
    assert lengths == sorted(lengths) and set(lengths) <= {a.tokens for a in recorded.recorded} and {a.new_tokens for a in asks} == {1}
    gaps = [b.time_s - a.time_s for a, b in itertools.pairwise(asks)]
    # The 8xH20 take longest.
    assert all(gap > 0.46425 + 1.30599 * ask.tokens / 1e4 for gap, ask in zip(gaps, asks, strict=False))


@pytest.mark.parametrize(("prefill", "alone_s"), [("prfaas", 1.21 + 0.0163), ("pd", 3.13)])
def test_a_probe_is_held_against_the_path_that_it_took(played, prefill, alone_s):
    """19,000 tokens: 1.23 s on 8xH200 and 16 ms for what is left of the cache, 3.05 s on 8xH20."""
    deployment = played[0]
    parts = dict.fromkeys(PARTS, 0.0) | {"queue": 0.1}
    rows = [Row(i, "", 19_000, 1, 0.0, 0.0, alone_s + 0.1, alone_s + 0.1, 1, "remote", prefill, "pd", parts=parts) for i in range(2)]
    found = live_bench.probe_errors(deployment, rows)
    assert found["requests"] == 2 and found["unloaded_mean_s"] == pytest.approx(alone_s, rel=0.04)
    assert found["over_s"] == pytest.approx(alone_s + 0.1 - found["unloaded_mean_s"])
    assert found["mean_without_queue_part"] == pytest.approx(alone_s / found["unloaded_mean_s"] - 1)


def test_the_vocabulary_is_that_of_what_is_played(played):
    assert live_bench.vocab_size(played[0], load_model_config) == 163_840
    assert live_bench.vocab_size(load_deployment(two_sites()), load_model_config) == load_model_config("qwen3_toy").vocab_size


def test_tables_and_pictures(played, tmp_path):
    text = live_tables.table(("name", "a", "b"), [("x", 1.23456, None), ("long name", 7, "y")])
    assert text.splitlines() == ["name           a  b", "x          1.235  -", "long name      7  y"]
    workdir = Workdir(tmp_path)
    requests = workdir.write_rows("requests_x.csv", [row.flat() for row in played[3]])
    egress = workdir.write_rows("egress_x.csv", [{"time_s": 1.0, "a->b": 2.0}, {"time_s": 2.0, "a->b": 1.0}])
    assert live_tables.ttft_of(requests) == pytest.approx(sorted(row.ttft_s for row in played[3]))
    live_tables.draw(tmp_path / "figure.png", {"x": requests}, {"x": egress}, {"cut": 1.5})
    assert (tmp_path / "figure.png").stat().st_size > 10_000
