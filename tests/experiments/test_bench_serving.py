"""The bench_serving command on tiny profiled systems, mode by mode: counts, files and the last line; times only in very wide bounds."""

import csv
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from configs.clusters import load_deployment
from configs.clusters.paper_profiled import get_config as paper_profiled
from prfaas_jax.errors import InvalidInput
from prfaas_jax.testing import live_cut, live_router, live_systems, live_tenants
from prfaas_jax.testing.replay_script import Ask, Row, as_played

ROOT = Path(__file__).resolve().parents[2]
LATE = "--max_late_s=30"


def run(workdir: Path, *flags: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "experiments.bench_serving", f"--workdir={workdir}", *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)


def said(done: "subprocess.CompletedProcess[str]") -> dict:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


# --- the command


def test_load_plays_every_policy_and_writes_its_files(tmp_path):
    quick = ("--config.time_scale=10", "--config.requests=40", "--config.load=0.4", "--probe=3", "--min_completions=40")
    result = said(run(tmp_path, *quick, LATE, "--policies=threshold,always_local"))
    assert result["mode"] == "load" and result["valid"] and result["scale"]["time"] == 10.0
    assert list(result["policies"]) == ["threshold", "always_local"]
    threshold, local = result["policies"].values()
    assert threshold["requests"] == local["requests"] == 38 and local["offload_share"] == 0 == local["egress_gbps"]
    assert threshold["offload_share"] == threshold["simulated"]["offload_share"] > 0
    assert sum(threshold["parts_mean_s"].values()) > 0 and threshold["failed"] == {}
    assert result["queue_free"]["requests"] == 3 and 0 < result["queue_free"]["unloaded_mean_s"] < 30
    for name in ("threshold", "always_local"):
        requests = rows(tmp_path / f"requests_{name}.csv")
        assert len(requests) == 40 and all(r["error"] == "" and r["kv_moved"] == r["kv_expected"] for r in requests)
        assert rows(tmp_path / f"egress_{name}.csv")
    names = {"config.json", "env.json", "summary.json", "figure.png", "requests_probe.csv"}
    assert names <= {p.name for p in tmp_path.iterdir()}
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_a_trace_is_played_with_its_prefixes(tmp_path):
    trace = tmp_path / "trace.jsonl"
    lines = [{"timestamp": 500 * i, "input_length": 1000, "output_length": 64, "hash_ids": [1, 2 + i % 2]} for i in range(20)]
    trace.write_text("".join(json.dumps(line) + "\n" for line in lines))
    quick = ("--config.time_scale=20", "--config.requests=20", "--config.load=0.3", "--probe=0", "--min_completions=20")
    result = said(run(tmp_path / "run", f"--trace={trace}", *quick, LATE))
    assert result["queue_free"] is None and result["policies"]["threshold"]["requests"] == 19
    assert [r["tokens"] for r in rows(tmp_path / "run" / "requests_threshold.csv")] == ["1000"] * 20


def test_too_few_completions_are_invalid(tmp_path):
    done = run(tmp_path, "--config.time_scale=20", "--config.requests=5", "--probe=0", LATE)
    assert done.returncode == 1 and "INVALID: threshold: 5 requests were done, 300 are asked for" in done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["valid"] is False


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--policies=nobody",), "config.policy"),
        (("--mode=saturate", "--systems=naive"), "systems"),
        (("--mode=saturate", "--systems=prfaas,nobody"), "systems"),
        (("--config=configs/clusters/two_sites_cpu.py", "--mode=router"), "config.engine"),
        (("--config=configs/clusters/paper_profiled_small.py", "--mode=saturate"), "topology"),
    ],
)
def test_bad_input_is_one_line(tmp_path, flags, says):
    done = run(tmp_path, *flags)
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("error: ") and says in done.stderr.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["saturate", "cut", "tenants"])
def test_the_other_modes(tmp_path, mode):
    # After a cut there have to be arrivals for longer than controllers need.
    many = ("--config.requests=300", "--cut_periods=1") if mode == "cut" else ("--config.requests=60",)
    quick = ("--config.time_scale=10", "--min_completions=60", LATE, *many)
    result = said(run(tmp_path, f"--mode={mode}", *quick))
    if mode == "saturate":
        assert list(result["lambda_max"]) == list(live_systems.SYSTEMS) and set(result["errors"]) == set(live_systems.SYSTEMS[1:])
        for row in result["lambda_max"].values():
            assert row["completed"] == 60 and row["live_rps"] == pytest.approx(row["simulated_rps"], rel=0.3)
    elif mode == "cut":
        assert result["optimum"]["after_rps"] < result["optimum"]["before_rps"]
        assert 0 < result["policies"]["threshold"]["after_rps"] < 2 * result["optimum"]["after_rps"]
        assert result["policies"]["threshold"]["conversions"] == 0 and result["cut"]["settled_s"] == result["cut"]["at_s"] + 30.0
    else:
        assert result["tenants"]["alone"]["polite"]["done"] == result["tenants"]["beside"]["polite"]["done"] == 60
        assert result["tenants"]["beside"]["greedy"]["refused"] > 0


def test_the_router_mode(tmp_path):
    quick = ("--router_rps=20", "--router_requests=60", "--router_queue=50", "--restart_rps=10", "--min_completions=60")
    result = said(run(tmp_path, "--mode=router", *quick, LATE))
    assert result["rate"]["completed"] == 60 and 0 < result["rate"]["route_p50_ms"] <= result["rate"]["route_p99_ms"]
    assert result["rate"]["cpu_ms_per_request"]["router"] > 0
    assert result["queue"]["queued"] == 50 and result["queue"]["memory_mib"]["queued"]["router"] > 10
    assert result["restart"]["requests"] == 100 and result["restart"]["lost"] == 0
    assert result["restart"]["came_back"] >= 1, "some were running, or came while it was down"


# --- what it is made of


@pytest.fixture(scope="module")
def deployment():
    return load_deployment(paper_profiled())


def test_systems_are_those_of_the_planner(deployment):
    found = live_systems.systems(deployment)
    planned = {name: system.planned_rps for name, system in found.items()}
    assert planned == pytest.approx({"prfaas": 3.25, "homogeneous": 2.11, "naive": 2.47, "length_blind": 3.17}, rel=5e-3)
    roles = {name: [(c.name, c.prefill, c.decode) for c in system.deployment.clusters] for name, system in found.items()}
    assert roles == {
        "prfaas": [("prfaas", 4, 0), ("pd", 3, 5)],
        "homogeneous": [("pd", 9, 3)],
        "naive": [("prfaas", 4, 0), ("pd", 0, 8)],
        "length_blind": [("prfaas", 4, 0), ("pd", 3, 5)],
    }
    for system in found.values():
        # What the router reads is what is simulated here.
        read = load_deployment(ConfigDict({**system.deployment.config}))
        assert read.clusters == system.deployment.clusters and read.topology == system.deployment.topology
        assert (read.policy, read.parameter) == (system.deployment.policy, system.deployment.parameter)


def test_the_drawn_mix_is_that_of_the_arrivals(deployment):
    recorded = as_played(deployment.workload, 0, 500, deployment.scale.tokens)
    mix = live_systems.drawn_mix(recorded)
    assert mix.mean(mix.tokens) == pytest.approx(sum(a.tokens for a in recorded.recorded) / len(recorded.recorded))
    exact = live_systems.systems(deployment, ("prfaas",))["prfaas"].lambda_max(mix, "exact")
    assert 2.5 < exact < 3.6


def test_what_is_sustained_counts_the_backlog():
    first = [1.0, 2.0, 3.0, 4.0, 10.0]
    assert live_cut.reached(first, 1.0, 4.0) == 1.0 and live_cut.reached(first, 4.0, 9.0) == 0.0
    assert live_cut.sustained(first, 2.0) == 3 / 8 and live_cut.sustained(first, 20.0) == 0.0
    cut = live_cut.Cut(5.0, 8.0, 2.0)
    assert cut.settled_s == 11.0
    periods = live_cut.by_period([1.0, 5.5, 6.0], [0.0, 1.0, 2.0], cut)
    assert [p["period"] for p in periods] == [-3, -2, -1, 0] and periods[3]["first_tokens_rps"] == 1.0
    assert sum(p["arrivals_rps"] for p in periods) * 2.0 == 3
    with pytest.raises(InvalidInput, match=r"cut\.gbps"):
        live_cut.Cut(1.0, 0.0, 5.0)


def test_a_cut_that_leaves_no_time_to_adapt_is_refused(tmp_path):
    """It was counted over a time below zero, and a share of 0 was printed as if it had been measured."""
    cut = live_cut.Cut(5.0, 8.0, 2.0)
    cut.check(13.0)
    with pytest.raises(InvalidInput, match=r"config\.requests"):
        cut.check(12.9)
    done = run(tmp_path, "--mode=cut", "--config.requests=100", "--min_completions=60")
    assert done.returncode == 2 and "config.requests" in done.stderr.splitlines()[-1]


def test_the_planner_knows_what_a_cut_link_leaves(deployment):
    best = live_cut.optima(deployment.topology, deployment.mix, live_cut.Cut(1.0, 8.0))
    assert best["before_rps"] > best["after_best_roles_rps"] >= best["after_rps"] and best["after_best_roles_rps"] == pytest.approx(
        2.63, rel=0.03
    )


def test_two_tenants_in_one_script_and_what_became_of_them(deployment):
    polite = (Ask(0, 0.0, 10, 1, tenant="polite"), Ask(1, 2.0, 10, 1, tenant="polite"))
    both = live_tenants.merged(polite, (Ask(0, 1.0, 20, 1, tenant="greedy"),))
    assert [(a.number, a.time_s, a.tenant) for a in both] == [(0, 0.0, "polite"), (1, 1.0, "greedy"), (2, 2.0, "polite")]
    done = Row(0, "polite", 10, 1, 0.0, 0.0, 1.5, 2.0, 1)
    refused = Row(1, "greedy", 20, 1, 1.0, error="RESOURCE_EXHAUSTED")
    assert live_tenants.of([done, refused], "polite")["ttft_p90_s"] == 1.5
    assert live_tenants.of([done, refused], "greedy") | {"ttft_p50_s": None} == {
        "asked": 1, "done": 0, "refused": 1, "failed": 0, "ttft_p50_s": None, "ttft_p90_s": None,
    }  # fmt: skip
    quota = live_tenants.with_quota(deployment, 4)
    assert quota.tenants["greedy"].max_running == 4 and quota.config["tenants"]["greedy"]["max_running"] == 4


def test_engines_are_as_fast_as_the_rate_needs(deployment):
    quick = live_router.quick(deployment, 300.0, live_router.Shape(128))
    prefill_s = 0.46425 + 1.30599 * 0.0128 + 0.02806 * 0.0128**2
    assert quick.scale.time == pytest.approx(300 * prefill_s / (3 * 0.3)) and quick.config["time_scale"] == quick.scale.time
    asks = live_router.asks(live_router.Shape(128, 3), 50.0, 400, 1)
    assert asks[0].time_s == 0.0 and asks[-1].time_s == pytest.approx(8.0, rel=0.3) and math.isfinite(asks[-1].time_s)
    assert {a.time_s for a in live_router.asks(live_router.Shape(), 0.0, 5, 1)} == {0.0}


def test_servers_have_room_for_all_unless_the_config_says_how_much(deployment):
    config = paper_profiled()
    with config.unlocked():
        config.clusters.pd.decode_server = {"max_requests": 7}
    roomy = live_systems.with_room(load_deployment(config), 900)
    far, near = roomy.clusters
    assert far.prefill_server == near.prefill_server == {"max_requests": 900, "max_streams": 900}
    assert near.decode_server["max_requests"] == 7 and far.decode_server["max_requests"] == 900
    assert roomy.router["max_requests"] == roomy.config["router"]["max_requests"] == 900
    assert load_deployment(ConfigDict({**roomy.config})).clusters == roomy.clusters
