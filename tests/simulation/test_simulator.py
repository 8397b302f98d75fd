import dataclasses
import itertools
import math
import tracemalloc

import numpy as np
import pytest
from sim_fixtures import H20, KV, PAPER, Always, Listed, check_finished, simulate, wide

from prfaas_jax.errors import InvalidInput
from prfaas_jax.scheduling.mix import LogNormalLengths
from prfaas_jax.scheduling.policies import AlwaysLocal, AlwaysRemote, PaperPrefix, Threshold
from prfaas_jax.scheduling.prediction import Predictor
from prfaas_jax.scheduling.predictive import LeastTtft
from prfaas_jax.scheduling.profiles import FittedPrefill, prefill_s
from prfaas_jax.scheduling.throughput import CaseStudy
from prfaas_jax.scheduling.topology import GBPS, Link, PrefillCluster, Region, Topology
from prfaas_jax.scheduling.view import NoDecodeServer, Placement
from prfaas_jax.simulation.scenario import SimOptions, SquareWave, Steps
from prfaas_jax.simulation.simulator import Simulation
from prfaas_jax.simulation.traces import MooncakeTrace
from prfaas_jax.simulation.workloads import Arrival, Poisson, Sessions, Synthetic

LENGTHS = LogNormalLengths()
CACHES = SimOptions(prefill_cache_bytes=1e13, decode_cache_bytes=1e13)


def alone(tokens: int, output: int = 8) -> Listed:
    return Listed((Arrival(1.0, tokens, output),))


@pytest.mark.parametrize("tokens", [1, 8192, 8193, 20_000, 100_000])
@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("gbps", [100.0, 1.0])
@pytest.mark.parametrize("policy", [AlwaysLocal(), AlwaysRemote()])
def test_a_lone_request_has_its_unloaded_ttft(tokens, overlap, gbps, policy):
    link = dataclasses.replace(PAPER.links[0], bytes_per_s=gbps * GBPS, rtt_s=0.2, window_bytes=1e8)
    remote = isinstance(policy, AlwaysRemote)
    region = dataclasses.replace(PAPER.regions[0], prefill=0 if remote else 3)
    topology = dataclasses.replace(PAPER, links=() if not remote else (link,), regions=(region,))
    options = SimOptions(overlap=overlap)
    (job,), sim = simulate(topology, alone(tokens), policy, options)
    assert job.ttft_s == pytest.approx(job.unloaded_s, rel=1e-9) == sim.unloaded.ttft(tokens)
    assert job.e2e_s - job.ttft_s == pytest.approx(7 * 0.025) and job.tpot_s == pytest.approx(0.025)
    if not overlap and not remote:
        study = CaseStudy(KV, H20, H20, 1, 8, GBPS, region.local_bytes_per_s)
        assert job.ttft_s == pytest.approx(prefill_s(H20.prefill, tokens) + KV.bytes(tokens) / study.local_bytes_per_s)
    assert job.sent_bytes == (KV.bytes(tokens) if remote else 0)


def test_ttft_without_overlap_and_queue_is_that_of_the_paper():
    lengths = [1000, 19_400, 19_401, 100_000]
    rows = tuple(Arrival(100.0 * i, n, 4) for i, n in enumerate(lengths))
    jobs, _ = simulate(PAPER, Listed(rows), Threshold(19_400), SimOptions(overlap=False))
    far, near = PAPER.prefill[0].instance.prefill, H20.prefill
    for job, n in zip(jobs, lengths, strict=True):
        paper = prefill_s(far, n) + KV.bytes(n) / (100 * GBPS) if n > 19_400 else prefill_s(near, n) + KV.bytes(n) / (800 * GBPS)
        assert job.ttft_s == pytest.approx(paper)


def test_one_output_token_needs_no_slot():
    region = dataclasses.replace(PAPER.regions[0], instance=dataclasses.replace(H20, max_batch=1), decode=1)
    rows = (Arrival(0.0, 100, 10_000), Arrival(0.1, 200, 1))
    jobs, sim = simulate(dataclasses.replace(PAPER, regions=(region,)), Listed(rows), AlwaysLocal())
    assert [j.id for j in jobs] == [1, 0]
    assert jobs[0].first_s == jobs[0].done_s and jobs[0].tpot_s == 0 and sim.decode[0].instances[0].generated == pytest.approx(9999)


FIRST, ADDED = LogNormalLengths(9.0, 1.0, 128, 65536), LogNormalLengths(7.0, 1.0, 16, 8192)
SESSIONS = Sessions(Poisson(1.0), FIRST, ADDED, 200, 4.0, 5.0, output_sigma=0.7, requests=250)


def policies():
    yield from (AlwaysLocal(), AlwaysRemote(), Threshold(8000), PaperPrefix(4000), PaperPrefix(4000, scarce_s=0.0))
    yield LeastTtft(Predictor(wide(), 8192))


@pytest.mark.parametrize("policy", list(policies()), ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("rows", [1, 4])
def test_every_policy_on_several_clusters_and_regions(policy, rows):
    options = dataclasses.replace(CACHES, prefill_rows=rows, prefill_chunk=4096, decode_cache_bytes=2e10)
    jobs, sim = simulate(wide(), SESSIONS, policy, options)
    assert {j.region for j in jobs} == {0, 1}, "both regions are used"
    assert all(j.cluster >= 0 for j in jobs if j.region == 1), "one has no prefill instances"
    b_x = sim.pairs[1][0]
    assert b_x is None and all((j.cluster, j.region) != (1, 0) for j in jobs)


def test_host_caps_hold_over_all_links_of_a_cluster():
    """Two long prompts leave cluster a at once, for two regions: its hosts are slower than the links together."""
    slow = dataclasses.replace(wide().prefill[0].instance, nic_bytes_per_s=1 * GBPS)
    topology = dataclasses.replace(wide(), prefill=(PrefillCluster("a", slow, 2), wide().prefill[1]))
    topology = dataclasses.replace(topology, links=tuple(dataclasses.replace(x, rtt_s=0.0, window_bytes=math.inf) for x in topology.links))

    class Split:
        def place(self, request, view, now):
            return Placement("a", "xy"[request.output_tokens % 2], "split")

    rows = (Arrival(0.0, 60_000, 2), Arrival(0.0, 60_000, 3))
    jobs, _ = simulate(topology, Listed(rows), Split(), SimOptions(overlap=False))
    whole, prefill = KV.bytes(60_000), prefill_s(slow.prefill, 60_000)
    assert [j.ttft_s for j in jobs] == pytest.approx([prefill + 2 * whole / (2 * GBPS)] * 2)


def test_a_window_caps_each_transfer_however_fast_the_link_becomes():
    link = Link("h200", "pd", 10 * GBPS, rtt_s=0.1, window_bytes=0.1 * 20 * GBPS)
    topology = dataclasses.replace(PAPER, links=(link,))
    faster = {("h200", "pd"): Steps(((0.5, 40 * GBPS),))}
    (job,), _ = simulate(topology, alone(50_000), AlwaysRemote(), SimOptions(overlap=False), links=faster)
    assert job.kv_s - job.computed_s == pytest.approx(KV.bytes(50_000) / (20 * GBPS) + 0.05)


def test_without_a_window_one_transfer_takes_all_that_the_link_has_become():
    faster = {("h200", "pd"): Steps(((0.5, 400 * GBPS),))}
    (job,), sim = simulate(PAPER, alone(50_000), AlwaysRemote(), SimOptions(overlap=False), links=faster)
    assert job.kv_s - job.computed_s == pytest.approx(KV.bytes(50_000) / (400 * GBPS))
    assert sim.view.links.transfer_bytes_per_s[0, 0] == 400 * GBPS


# --- prefix caches -----------------------------------------------------------------------------------------------------------------


def blocks_of(n: int, first: int = 0) -> tuple[int, ...]:
    return tuple(range(first, first + n))


def test_a_prefix_held_by_the_region_is_not_sent_again():
    rows = (Arrival(0.0, 40 * 512, 4, blocks_of(40)), Arrival(50.0, 60 * 512, 4, blocks_of(60)))
    (first, second), _ = simulate(PAPER, Listed(rows, 512), AlwaysRemote(), CACHES)
    assert (first.cached, first.held) == (0, 0) and (second.cached, second.held) == (40 * 512, 40 * 512)
    assert first.sent_bytes == KV.bytes(40 * 512) and second.sent_bytes == KV.bytes(60 * 512, 40 * 512)
    time = PAPER.prefill[0].instance.prefill
    assert second.computed_s - second.begun_s == pytest.approx(prefill_s(time, 20 * 512, 40 * 512))


class Scripted:
    """One placement after the other."""

    def __init__(self, *placements):
        self.placements, self.requests = iter(placements), []

    def place(self, request, view, now):
        self.requests.append(request)
        return next(self.placements)


def test_a_copied_prefix_goes_to_the_side_that_computes_and_takes_its_time():
    rows = (Arrival(0.0, 40 * 512, 4, blocks_of(40)), Arrival(50.0, 60 * 512, 4, blocks_of(60)))
    here, there = Placement(None, "pd", "here"), Placement("h200", "pd", "there")
    copied = 40 * 512
    back = Scripted(here, there._replace(copied_tokens=copied))
    (_, job), sim = simulate(PAPER, Listed(rows, 512), back, CACHES)
    assert back.requests[1].cached_decode == copied and back.requests[1].cached_prefill == 0
    assert job.cached == job.held == copied and job.cluster == 0
    assert job.returned_bytes == KV.bytes(copied) == pytest.approx(sim.reverse[0][0].moved)
    assert job.sent_bytes == KV.bytes(60 * 512, copied)
    assert job.begun_s - 50.0 == pytest.approx(KV.bytes(copied) / (100 * GBPS))

    far_only = dataclasses.replace(CACHES, decode_cache_bytes=0.0)
    forth = Scripted(there, here._replace(copied_tokens=copied))
    (first, job), sim = simulate(PAPER, Listed(rows, 512), forth, far_only)
    assert job.cached == job.held == copied and job.cluster == -1 and job.returned_bytes == 0
    assert job.sent_bytes == KV.bytes(copied) and sim.pairs[0][0].moved == pytest.approx(first.sent_bytes + KV.bytes(copied))


def test_a_prefix_is_copied_from_the_cluster_that_has_it():
    rows = (Arrival(0.0, 40 * 512, 4, blocks_of(40)), Arrival(90.0, 60 * 512, 4, blocks_of(60)))
    topology = dataclasses.replace(wide(), regions=tuple(dataclasses.replace(r, prefill=1) for r in wide().regions))
    policy = Scripted(Placement("b", "y", "there"), Placement(None, "y", "here", copied_tokens=40 * 512))
    (first, job), sim = simulate(topology, Listed(rows, 512), policy, dataclasses.replace(CACHES, decode_cache_bytes=0.0))
    assert job.cached == 40 * 512
    assert sim.pairs[1][1].moved == pytest.approx(first.sent_bytes + job.sent_bytes) and sim.pairs[0][1].moved == 0


def test_only_what_is_there_can_be_copied():
    rows = (Arrival(0.0, 40 * 512, 4, blocks_of(40)), Arrival(50.0, 60 * 512, 4, blocks_of(60)), Arrival(99.0, 512, 4, blocks_of(1, 900)))
    there = Placement("h200", "pd", "there", copied_tokens=55 * 512)
    (_, second, third), _ = simulate(PAPER, Listed(rows, 512), Scripted(Placement(None, "pd", ""), there, there), CACHES)
    assert second.cached == 40 * 512 and second.returned_bytes == KV.bytes(40 * 512)
    assert third.cached == 0 and third.returned_bytes == 0


def test_abundant_bandwidth_copies_in_both_directions():
    options = dataclasses.replace(CACHES, decode_cache_bytes=2e10)  # the region forgets what the cluster still has
    jobs, _ = simulate(PAPER, dataclasses.replace(SESSIONS, think_s=60.0, requests=600), PaperPrefix(3000, scarce_s=100.0), options)
    assert any(j.returned_bytes for j in jobs) and any(j.cluster < 0 and j.sent_bytes for j in jobs)


# --- the view ----------------------------------------------------------------------------------------------------------------------


def test_the_view_says_what_is_there():
    """Every column against what can be counted in the simulator, at every placement."""
    seen = []

    class Checking(Threshold):
        def place(self, request, view, now):
            for servers, pools in ((view.prefill, sim.prefill), (view.decode, sim.local)):
                for i, pool in enumerate(pools):
                    work = [max(0.0, x.free_at - now) for x in pool.instances]
                    assert servers.load.instances[i] == len(work)
                    if work:
                        assert max(0.0, servers.load.free_at_s[i] - now) == pytest.approx(min(work), abs=1e-6)
                        assert max(0.0, servers.load.drained_at_s[i] - now) == pytest.approx(sum(work) / len(work), abs=1e-6) or 0 in work
            jobs = [j for j in sim.jobs.values() if j.region >= 0]
            for i, pool in enumerate(sim.decode):
                assert view.decode.queue[i] == sum(j.region == i for j in jobs)
                assert view.decode.load.waiting[i] == len(pool.waiting)
            for i, row in enumerate(sim.pairs):
                computing = [j for j in jobs if j.cluster == i and math.isnan(j.computed_s)]
                assert view.prefill.queue[i] == len(computing)
                for k, pair in enumerate(row):
                    coming = [j for j in jobs if (j.cluster, j.region) == (i, k) and math.isnan(j.kv_s)]
                    assert view.links.pending[i, k] == len(coming)
                    left = sum(j.want_bytes - j.released + pair.remaining(j.transfer) for j in coming)
                    assert view.links.pending_bytes[i, k] == pytest.approx(left, abs=1.0)
                    seen.append(left)
            return super().place(request, view, now)

    jobs = []
    sim = Simulation(wide(), Synthetic(Poisson(1.5), LENGTHS, 200, requests=300), Checking(15_000), SimOptions(), 0, jobs.append)
    sim.run()
    check_finished(sim, jobs)
    assert max(seen) > 0


# --- determinism and memory --------------------------------------------------------------------------------------------------------


def table(jobs, sim):
    return [j.row(sim.clusters, sim.regions) for j in jobs]


def test_one_configuration_and_seed_give_one_table_to_the_bit():
    def run(seed):
        waves = {("a", "x"): SquareWave(1 * GBPS, 20.0)}
        return table(*simulate(wide(), SESSIONS, PaperPrefix(4000), CACHES, seed, links=waves))

    assert run(3) == run(3) != run(4)


def test_memory_does_not_grow_with_the_trace():
    def most(requests):
        workload = Synthetic(Poisson(1.5), LogNormalLengths(8.0, 1.0), 64, requests=requests)
        sim = Simulation(PAPER, workload, Threshold(19_400), SimOptions(), 0, lambda job: None)
        tracemalloc.start()
        sim.run()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    few = most(2000)
    assert most(8000) < 1.25 * few


# --- bad input ---------------------------------------------------------------------------------------------------------------------


ENDLESS = Synthetic(Poisson(1.0), LENGTHS, 10)
SHORT = dataclasses.replace(ENDLESS, requests=3)


def runs(**kwargs):
    given = {"topology": PAPER, "workload": SHORT, "policy": AlwaysLocal(), "options": SimOptions(), "seed": 0, "finished": print} | kwargs
    run = given.pop("run", {})
    return lambda: Simulation(**given).run(**run)


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (runs(workload=ENDLESS), "requests"),
        (runs(workload=dataclasses.replace(SESSIONS, requests=None)), "requests"),
        (runs(run={"requests": 0}), "requests"),
        (runs(run={"requests": -1}), "requests"),
        (runs(run={"requests": 1.5}), "requests"),
        (runs(run={"until_s": 0.0}), "until_s"),
        (runs(run={"until_s": math.nan}), "until_s"),
        (runs(seed=-1), "seed"),
        (runs(policy=Always(Placement(None, "moon", ""))), "placement.decode"),
        (runs(policy=Always(Placement(None, "h200", ""))), "placement.decode"),
        (runs(policy=Always(Placement("moon", "pd", ""))), "placement.prefill"),
        (runs(policy=Always(Placement("pd", "pd", ""))), "placement.prefill"),
        (runs(workload=Listed((Arrival(0.0, 200_000, 1),))), "prompt"),
        (runs(workload=Listed((Arrival(1.0, 10, 1), Arrival(0.5, 10, 1)))), "event time"),
        (runs(links={("h200", "moon"): SquareWave(1.0, 1.0)}), "links"),
        (runs(links={("pd", "h200"): SquareWave(1.0, 1.0)}), "links"),
    ],
)
def test_bad_input_names_the_field(call, field):
    with pytest.raises(InvalidInput) as caught:
        call()
    assert caught.value.field == field


def test_an_endless_workload_is_refused_before_any_work_and_may_be_cut():
    sim = Simulation(PAPER, ENDLESS, AlwaysLocal(), SimOptions(), 0, print)
    with pytest.raises(InvalidInput):
        sim.run()
    assert sim.kernel.events == 0
    for cut in ({"requests": 5}, {"until_s": 60.0}, {"requests": 5, "until_s": 60.0}):
        jobs = []
        sim = Simulation(PAPER, ENDLESS, AlwaysLocal(), SimOptions(), 0, jobs.append)
        sim.run(**cut)
        assert jobs and (sim.arrived == 5 or sim.kernel.now == 60.0)
        with pytest.raises(InvalidInput, match="one run of a Simulation"):
            sim.run(**cut)


def test_a_trace_is_endless_only_when_repeated_for_ever(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text("".join(f'{{"timestamp": {i}, "input_length": 9, "output_length": 2, "hash_ids": [{i}]}}\n' for i in range(4)))
    jobs, _ = simulate(PAPER, MooncakeTrace(path), AlwaysLocal())
    assert len(jobs) == 4
    with pytest.raises(InvalidInput, match="the workload never ends"):
        simulate(PAPER, MooncakeTrace(path, repeat=None), AlwaysLocal())


def test_a_prompt_that_only_one_side_covers_is_refused_by_the_other():
    short = dataclasses.replace(H20, prefill=FittedPrefill(0.4, 1.0, max_tokens=1000))
    topology = dataclasses.replace(PAPER, regions=(Region("pd", short, 3, 5),))
    simulate(topology, alone(2000), AlwaysRemote())
    with pytest.raises(InvalidInput, match=r"prompt=2000: expected at most 1000 tokens"):
        simulate(topology, alone(2000), AlwaysLocal())


def test_a_request_that_no_decode_memory_holds_is_refused():
    small = dataclasses.replace(H20, kv_memory_bytes=KV.bytes(1000))
    topology = Topology(KV, (), (Region("pd", small, 1, 1),), ())
    simulate(topology, alone(900, 100), AlwaysLocal())
    with pytest.raises(InvalidInput, match="request KV"):
        simulate(topology, alone(900, 101), AlwaysLocal())


def test_a_policy_that_places_nothing_is_told_so_at_the_end():
    class Never:
        def place(self, request, view, now):
            raise NoDecodeServer("never")

    with pytest.raises(NoDecodeServer, match="1 requests are left"):
        simulate(PAPER, alone(10), Never())


def test_without_local_prefill_short_prompts_go_where_they_can():
    topology = dataclasses.replace(PAPER, regions=(dataclasses.replace(PAPER.regions[0], prefill=0, decode=8),))
    jobs, sim = simulate(topology, Synthetic(Poisson(1.0), LENGTHS, 50, requests=100), Threshold(19_400))
    assert all(j.cluster == 0 for j in jobs) and sim.fallbacks == sum(j.tokens <= 19_400 for j in jobs)


def test_arrivals_stay_in_order_of_time():
    jobs, _ = simulate(PAPER, Synthetic(Poisson(3.0), LENGTHS, 50, requests=200), Threshold(19_400))
    jobs.sort(key=lambda j: j.id)
    assert all(a.arrival.time_s <= b.arrival.time_s for a, b in itertools.pairwise(jobs))
    assert np.all(np.diff([j.arrival.time_s for j in jobs]) >= 0)
