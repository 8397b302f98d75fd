import dataclasses
import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sim_fixtures import H20, KV, PAPER, Listed, simulate, wide

from prfaas_jax.errors import InvalidInput
from prfaas_jax.scheduling.controllers import Convert, UsePolicy
from prfaas_jax.scheduling.mix import LogNormalLengths
from prfaas_jax.scheduling.policies import AlwaysLocal, AlwaysRemote, LengthBlind, PaperPrefix, Threshold
from prfaas_jax.scheduling.profiles import prefill_s
from prfaas_jax.scheduling.topology import GBPS, Region, Topology
from prfaas_jax.scheduling.view import NoDecodeServer
from prfaas_jax.simulation.disturbances import IDLE_TURNS
from prfaas_jax.simulation.scenario import Outage, SimOptions, SquareWave, Steps
from prfaas_jax.simulation.simulator import Simulation
from prfaas_jax.simulation.workloads import Arrival, Poisson, Sessions, Synthetic

SHORT = LogNormalLengths(8.5, 1.2, 64, 60_000)
MANY = Synthetic(Poisson(2.0), SHORT, 120, requests=60, output_sigma=1.0)
SESSIONS = Sessions(Poisson(2.0), SHORT, LogNormalLengths(6.0, 1.0, 16, 8192), 120, 4.0, 2.0, requests=60)
DOWN = 0.0
PLACES = [("a", "prefill", 0), ("a", "prefill", 1), ("b", "prefill", 0), ("x", "prefill", 0), ("x", "prefill", 1)]
PLACES += [("x", "decode", 0), ("x", "decode", 1), ("y", "decode", 0), ("y", "decode", 1)]

starts = st.sampled_from([0.0, 1.0, 5.0, 12.5, 20.0, 33.0])
outages = st.builds(lambda place, start, seconds: Outage(*place, start, seconds), st.sampled_from(PLACES), starts, st.floats(0.1, 60.0))
capacities = st.sampled_from([0.0, 0.0, 0.5, 5.0, 60.0])


@st.composite
def plans(draw):
    if draw(st.booleans()):
        return SquareWave(draw(capacities) * GBPS, draw(st.sampled_from([1.0, 7.0, 40.0])))
    times = sorted(draw(st.sets(st.floats(0.0, 60.0), max_size=4)))
    return Steps((*((t, draw(capacities) * GBPS) for t in times), (61.0, GBPS)))


@settings(max_examples=60)
@given(
    st.sampled_from([AlwaysLocal(), AlwaysRemote(), Threshold(4000), PaperPrefix(2000, scarce_s=50.0), LengthBlind(0.6)]),
    st.lists(outages, max_size=5),
    st.dictionaries(st.sampled_from([("a", "x"), ("a", "y"), ("b", "y")]), plans()),
    st.sampled_from([MANY, SESSIONS]),
    st.sampled_from([(5.0, 1.0), (0.3, 2.0), (20.0, 0.0)]),
    st.booleans(),
)
def test_whatever_fails_every_request_is_finished_once_and_the_system_is_idle_again(policy, fails, links, workload, delays, overlap):
    stall_s, detect_s = delays
    options = SimOptions(
        prefill_chunk=4096, overlap=overlap, stall_s=stall_s, detect_s=detect_s, prefill_cache_bytes=1e10, decode_cache_bytes=1e10
    )

    def run():
        fresh = dataclasses.replace(policy) if isinstance(policy, LengthBlind) else policy
        jobs, sim = simulate(wide(), workload, fresh, options, links=links, outages=fails)
        return [j.row(sim.clusters, sim.regions) for j in jobs]

    assert run() == run(), "bit-identical"


def lone(tokens=20_000, output=400, at=1.0):
    return Listed((Arrival(at, tokens, output),))


def paper(**region):
    return dataclasses.replace(PAPER, regions=(dataclasses.replace(PAPER.regions[0], **region),))


def test_a_restart_goes_on_behind_the_tokens_that_were_streamed():
    fails = (Outage("pd", "decode", 0, 10.0, 5.0),)
    topology = dataclasses.replace(paper(decode=1), links=())
    (job,), _ = simulate(topology, lone(), AlwaysLocal(), SimOptions(detect_s=9.0), outages=fails)
    streamed = 1 + int((10.0 - job.first_s) / 0.025)
    assert job.tokens == 20_000 + streamed and job.output == 400 - streamed and job.attempts == 2 and job.fallbacks == 1
    assert job.first_s == pytest.approx(1.0 + job.unloaded_s), "the first token is not streamed twice"
    again = prefill_s(H20.prefill, 20_000 + streamed)
    assert job.computed_s == pytest.approx(10.0 + again)
    # The second prefill is done before the instance is back.
    assert job.done_s == pytest.approx(max(15.0, job.kv_s) + (400 - streamed - 1) * 0.025)


def test_a_restart_does_not_outgrow_the_profile():
    (job,), _ = simulate(paper(decode=2), lone(131_070), AlwaysLocal(), outages=(Outage("pd", "decode", 0, 30.0, 5.0),))
    assert job.attempts == 2 and job.tokens == 131_072 and job.output == 398


def test_a_prefill_that_dies_is_computed_again_from_the_start():
    (job,), sim = simulate(PAPER, lone(60_000), AlwaysRemote(), outages=(Outage("h200", "prefill", 0, 2.0, 1.0),))
    whole = prefill_s(PAPER.prefill[0].instance.prefill, 60_000)
    assert job.begun_s == 2.0 and job.computed_s == pytest.approx(2.0 + whole)
    assert job.sent_bytes > KV.bytes(60_000) and job.sent_bytes == pytest.approx(sim.pairs[0][0].moved), "chunks that were sent in vain"


@pytest.mark.parametrize(
    ("index", "after_s", "attempts"), [(0, 2.0, 2), (1, 2.0, 1), (0, 100.0, 1)], ids=["its instance", "another", "all has left"]
)
def test_kv_that_has_not_left_an_instance_is_lost_with_it(index, after_s, attempts):
    link = dataclasses.replace(PAPER.links[0], bytes_per_s=GBPS, rtt_s=4.0)
    whole, prefill = KV.bytes(60_000), prefill_s(PAPER.prefill[0].instance.prefill, 60_000)
    after_s = min(after_s, whole / GBPS + 1.0)  # a second of the two that the last byte travels
    gone = Outage("h200", "prefill", index, 1.0 + prefill + after_s, 0.5)
    topology = dataclasses.replace(PAPER, links=(link,))
    (job,), sim = simulate(topology, lone(60_000), AlwaysRemote(), SimOptions(overlap=False), outages=[gone])
    assert (job.attempts, job.fallbacks) == (attempts, attempts - 1)
    again = after_s + prefill if attempts == 2 else 0.0
    assert job.kv_s == pytest.approx(1.0 + prefill + again + whole / GBPS + 2.0)
    assert job.sent_bytes == pytest.approx(whole + (attempts - 1) * 2.0 * GBPS) == pytest.approx(sim.pairs[0][0].moved)


def test_kv_on_its_way_inside_a_region_is_lost_with_its_instance():
    whole, prefill = KV.bytes(60_000), prefill_s(H20.prefill, 60_000)
    slow = dataclasses.replace(paper(local_bytes_per_s=GBPS), links=())
    gone = (Outage("pd", "prefill", 0, 1.0 + prefill + 2.0, 0.5), Outage("pd", "prefill", 1, 1.0 + prefill + 1.0, 0.5))
    (job,), _ = simulate(slow, lone(60_000), AlwaysLocal(), SimOptions(overlap=False), outages=gone)
    assert job.attempts == 2 and job.computed_s == pytest.approx(1.0 + prefill + 2.0 + prefill)
    assert job.kv_s == pytest.approx(job.computed_s + whole / GBPS)


def test_a_stalled_transfer_is_given_up_after_stall_s_and_counts_from_when_it_stalls():
    link = {("h200", "pd"): Steps(((3.0, DOWN), (100.0, GBPS)))}
    options = SimOptions(overlap=False, stall_s=4.0)
    (job,), _ = simulate(PAPER, lone(60_000), AlwaysRemote(), options, links=link)
    computed = 1.0 + prefill_s(PAPER.prefill[0].instance.prefill, 60_000)
    assert computed > 3.0 and job.cluster == -1, "the router knows by then"
    assert job.placed_s == pytest.approx(computed + 4.0)


def test_a_short_outage_of_a_link_costs_its_length():
    link = {("h200", "pd"): Steps(((3.0, DOWN), (6.0, 100 * GBPS)))}
    (job,), _ = simulate(PAPER, lone(60_000), AlwaysRemote(), SimOptions(overlap=False), links=link)
    assert job.attempts == 1 and job.kv_s == pytest.approx(6.0 + KV.bytes(60_000) / (100 * GBPS))


def test_a_copy_that_stalls_is_given_up_and_leaves_no_queue():
    blocks = tuple(range(40))
    rows = (Arrival(0.0, 40 * 512, 4, blocks), Arrival(50.0, 60 * 512, 4, (*blocks, *range(40, 60))))
    link = {("h200", "pd"): Steps(((50.01, DOWN), (300.0, GBPS)))}
    options = SimOptions(decode_cache_bytes=1e12, stall_s=4.0)

    class First(PaperPrefix):
        def place(self, request, view, now):
            return AlwaysLocal().place(request, view, now) if now < 50.0 else super().place(request, view, now)

    (_, job), sim = simulate(PAPER, Listed(rows, 512), First(1000, scarce_s=9.0), options, links=link)
    assert job.fallbacks == 1 and 0 < job.returned_bytes < KV.bytes(40 * 512) and job.cluster == -1
    assert sim.reverse[0][0].moved == pytest.approx(job.returned_bytes)


def test_a_region_that_decodes_no_more_loses_what_waits_there():
    topology = dataclasses.replace(wide(), regions=tuple(dataclasses.replace(r, prefill=2) for r in wide().regions))
    rows = (Arrival(0.0, 20_000, 50), Arrival(0.0, 20_000, 50))
    fails = [Outage("x", "decode", i, 1.0, math.inf) for i in (0, 1)]
    jobs, _ = simulate(topology, Listed(rows), AlwaysLocal(), outages=fails)
    assert [j.region for j in jobs] == [1, 1] and sorted(j.fallbacks for j in jobs) == [0, 1]


def test_what_nothing_can_take_waits_until_the_router_knows_better():
    (job,), sim = simulate(paper(decode=1), lone(at=6.0), AlwaysLocal(), outages=(Outage("pd", "decode", 0, 2.0, 18.0),))
    assert job.placed_s == 21.0 and job.attempts == 1 and not sim.parked


def test_a_system_that_never_comes_back_is_reported():
    gone = (Outage("pd", "decode", 0, 2.0, math.inf),)
    wave = {("h200", "pd"): SquareWave(GBPS, 1.0)}
    for links in ({}, wave):
        with pytest.raises(NoDecodeServer, match="1 requests are left"):
            simulate(paper(decode=1), lone(at=6.0), AlwaysLocal(), outages=gone, links=links)


def test_a_link_that_stays_down_does_not_keep_the_clock_running():
    jobs, sim = simulate(PAPER, MANY, Threshold(9000), links={("h200", "pd"): Steps(((5.0, DOWN),))})
    assert len(jobs) == 60 and sim.kernel.now < sim.last_s + 20


def test_links_change_until_the_last_request_however_late_it_comes():
    rows = (Arrival(0.0, 100, 2), Arrival(1000.0, 60_000, 2))
    wave = {("h200", "pd"): SquareWave(GBPS, 100.0)}
    jobs, _ = simulate(PAPER, Listed(rows), AlwaysRemote(), SimOptions(overlap=False), links=wave)
    assert jobs[1].kv_s - jobs[1].computed_s == pytest.approx(KV.bytes(60_000) / (100 * GBPS))
    jobs, _ = simulate(PAPER, Listed((rows[0], rows[1]._replace(time_s=1060.0))), AlwaysRemote(), SimOptions(overlap=False), links=wave)
    assert jobs[1].kv_s - jobs[1].computed_s == pytest.approx(KV.bytes(60_000) / GBPS)


def test_links_and_controller_outlive_a_gap_of_thousands_of_periods():
    rows = (Arrival(0.0, 100, 2), Arrival(50_000.0, 60_000, 2))
    controller = Script()
    change = {("h200", "pd"): Steps(((50_001.0, GBPS),))}
    jobs, sim = simulate(PAPER, Listed(rows), AlwaysRemote(), SimOptions(overlap=False), links=change, controller=controller)
    assert jobs[1].kv_s - jobs[1].computed_s == pytest.approx(KV.bytes(60_000) / GBPS)
    assert len(controller.updates) == int(sim.last_s / 5.0) + 1 > 10_000


@pytest.mark.parametrize("plan", [SquareWave(GBPS, 40.0), Steps(((5.0, 50 * GBPS), (3000.0, 10 * GBPS), (4010.0, GBPS)))])
def test_links_and_controller_outlive_an_outage_that_parks_everything(plan):
    """The last arrival is parked for hundreds of periods; when it is placed at last, t and the link are not those of long ago."""
    topology, controller = paper(decode=1), Script((3950.0, UsePolicy(AlwaysRemote(), "")))
    gone = (Outage("pd", "decode", 0, 2.0, 3998.0),)
    options = SimOptions(overlap=False)
    (job,), sim = simulate(
        topology, lone(60_000, at=6.0), AlwaysLocal(), options, links={("h200", "pd"): plan}, outages=gone, controller=controller
    )
    assert (job.placed_s, job.cluster) == (4001.0, 0), "by the policy of that time"
    # The wave is high until 4,020 s and low then; the steps are low from 4,010 s on.
    high, until = (100 * GBPS, 4020.0) if isinstance(plan, SquareWave) else (10 * GBPS, 4010.0)
    whole = KV.bytes(60_000)
    sent = min(whole, high * max(0.0, until - job.computed_s))
    assert job.kv_s == pytest.approx(job.computed_s + sent / high + (whole - sent) / GBPS)
    assert controller.updates[-1][0] > sim.last_s > 4000.0


ONLY_FAR = paper(prefill=0, decode=8)


def test_a_region_that_cannot_prefill_waits_for_its_link_to_come_back():
    """Parked once the router knows, and not tried again every few seconds."""
    link = {("h200", "pd"): Steps(((5.0, DOWN), (9000.0, 100 * GBPS)))}
    rows = (Arrival(1.0, 100, 4), Arrival(5.5, 20_000, 4), Arrival(6.5, 20_000, 4))
    jobs, sim = simulate(ONLY_FAR, Listed(rows), AlwaysRemote(), links=link)
    assert [(j.id, j.attempts) for j in jobs] == [(0, 1), (2, 1), (1, 2)] and sim.fallbacks == 1
    assert jobs[1].placed_s == jobs[2].placed_s == 9001.0


def test_a_link_that_never_comes_back_is_reported():
    for controller in (None, Script()):
        with pytest.raises(NoDecodeServer, match="1 requests are left"):
            simulate(ONLY_FAR, lone(at=5.5), AlwaysRemote(), links={("h200", "pd"): Steps(((5.0, DOWN),))}, controller=controller)


@pytest.mark.parametrize("detect_s", [1.0, 300.0])
def test_what_nothing_will_ever_take_is_reported_in_bounded_time(detect_s):
    sim = Simulation(
        *(paper(decode=1), lone(at=6.0), AlwaysLocal(), SimOptions(detect_s=detect_s), 0, print),
        links={("h200", "pd"): SquareWave(GBPS, 1.0)},
        outages=[Outage("pd", "decode", 0, 2.0, math.inf)],
        controller=Script(),
    )
    with pytest.raises(NoDecodeServer, match="1 requests are left"):
        sim.run()
    assert sim.kernel.now < 2 * IDLE_TURNS * sim.options.control_s + 2 * detect_s


def test_outages_of_one_instance_may_overlap():
    fails = (Outage("pd", "decode", 0, 2.0, 10.0), Outage("pd", "decode", 0, 5.0, 20.0))
    (job,), _ = simulate(paper(decode=1), lone(500, at=1.9), AlwaysLocal(), outages=fails)
    assert job.done_s > 25.0


def test_a_cluster_without_instances_forgets_its_prefixes():
    blocks = tuple(range(40))
    rows = tuple(Arrival(100.0 * i, 40 * 512, 4, blocks) for i in range(3))
    options = SimOptions(prefill_cache_bytes=1e13)
    topology = dataclasses.replace(PAPER, prefill=(dataclasses.replace(PAPER.prefill[0], instances=2),))
    for failed, cached in (((0, 1), 0), ((0,), 39 * 512)):
        fails = [Outage("h200", "prefill", i, 150.0, 5.0) for i in failed]
        jobs, _ = simulate(topology, Listed(rows, 512), AlwaysRemote(), options, outages=fails)
        # The last block is whole, but the last token has to be computed, and a checkpoint is there at the end or every 16 blocks.
        assert [j.cached for j in jobs] == [0, 32 * 512, 32 * 512 if cached else 0]


# --- controllers -------------------------------------------------------------------------------------------------------------------


class Script:
    """A controller that acts at given times, and remembers what it was shown."""

    def __init__(self, *actions):
        self.actions, self.seen, self.updates = list(actions), [], []

    def observe(self, request, placement, now):
        self.seen.append((request, placement, now))

    def update(self, view, now):
        self.updates.append((now, view.decode.load.instances[0], view.decode.load.slots[0] / 20))
        due = [action for at, action in self.actions if at <= now]
        self.actions = [(at, action) for at, action in self.actions if at > now]
        return due


STEADY = Synthetic(Poisson(1.5), SHORT, 300, requests=150)


@pytest.mark.parametrize("to", ["prefill", "decode"])
def test_an_instance_is_drained_before_it_changes_its_role(to):
    controller = Script((20.0, Convert("pd", to, "test")))
    jobs, sim = simulate(PAPER, STEADY, AlwaysLocal(), SimOptions(convert_s=8.0), controller=controller)
    assert sim.conversions == 1
    counts = {tuple(count) for _, *count in controller.updates}
    between, after = ((3, 4), (4, 4)) if to == "prefill" else ((2, 5), (2, 6))
    assert counts == {(3, 5), between, after}
    assert (len(sim.local[0].instances), len(sim.decode[0].instances)) == after
    first_after = next(now for now, *count in controller.updates if tuple(count) == after)
    assert first_after >= 28.0, "the conversion itself takes its time"
    assert all(j.fallbacks == 0 for j in jobs), "nobody notices"
    assert controller.updates[0][0] == 5.0 and all(b[0] - a[0] == pytest.approx(5.0) for a, b in itertools.pairwise(controller.updates))
    assert len(controller.seen) == 150 and all(placement.prefill is None for _, placement, _ in controller.seen)


def test_the_last_of_its_role_stays():
    alone = Topology(KV, (), (Region("pd", H20, 1, 1),), ())
    both = Script((5.0, Convert("pd", "prefill", "")), (5.0, Convert("pd", "decode", "")))
    _, sim = simulate(alone, dataclasses.replace(STEADY, requests=20), AlwaysLocal(), controller=both)
    assert sim.conversions == 0
    # Where a link reaches the region, prefill instances may all go.
    _, sim = simulate(paper(prefill=1), STEADY, Threshold(4000), controller=Script((5.0, Convert("pd", "decode", ""))))
    assert sim.conversions == 1 and not sim.local[0].instances and len(sim.decode[0].instances) == 6


@pytest.mark.parametrize("to", ["prefill", "decode"])
def test_one_that_fails_while_it_drains_changes_its_role_when_it_is_back(to):
    part = "decode" if to == "prefill" else "prefill"
    fails = [Outage("pd", part, i, 10.5, 30.0) for i in range(5 if part == "decode" else 3)]
    controller = Script((10.0, Convert("pd", to, "")))
    jobs, sim = simulate(PAPER, STEADY, Threshold(4000), SimOptions(convert_s=3.0), controller=controller, outages=fails)
    assert sim.conversions == 1
    assert (len(sim.local[0].instances), len(sim.decode[0].instances)) == ((4, 4) if to == "prefill" else (2, 6))
    assert any(j.fallbacks for j in jobs)


def test_a_controller_changes_the_policy():
    jobs, _ = simulate(PAPER, STEADY, AlwaysLocal(), controller=Script((30.0, UsePolicy(AlwaysRemote(), ""))))
    assert {j.cluster for j in jobs if j.placed_s < 30.0} == {-1} and {j.cluster for j in jobs if j.placed_s > 30.0} == {0}


@pytest.mark.parametrize(
    ("action", "field"),
    [
        (Convert("moon", "prefill", ""), "convert.region"),
        (Convert("h200", "prefill", ""), "convert.region"),
        (Convert("pd", "both", ""), "convert.to"),
        ("nonsense", "action"),
    ],
)
def test_unknown_actions_are_refused(action, field):
    with pytest.raises(InvalidInput) as caught:
        simulate(PAPER, STEADY, AlwaysLocal(), controller=Script((5.0, action)))
    assert caught.value.field == field
