"""Reports folded into the view that policies see, in the model's units; and controllers that act on it."""

import asyncio
import math
import time

import numpy as np
import pytest

from prfaas_jax.scheduling.controllers import Convert, UsePolicy
from prfaas_jax.scheduling.policies import AlwaysLocal, AlwaysRemote
from prfaas_jax.scheduling.prediction import Predictor
from prfaas_jax.scheduling.predictive import LeastTtft
from prfaas_jax.scheduling.view import Request
from prfaas_jax.serving.breaker import Breaker, BreakerOptions
from prfaas_jax.serving.control_loop import ControlLoop
from prfaas_jax.serving.deployment import ClusterServers, Scale
from prfaas_jax.serving.fleet import Fleet, FleetOptions, Server
from prfaas_jax.serving.live_view import LiveView
from prfaas_jax.serving.proto import common_pb2, generation_pb2, prefill_pb2
from prfaas_jax.transfer.security import NONE

FAR, NEAR, HOME = "127.0.0.1:1", "127.0.0.1:2", "127.0.0.1:3"
SEEN = "127.0.0.1:4"  # the far server from home
CLUSTERS = (
    ClusterServers("prfaas", "prefill", (FAR,), (), {"pd": {FAR: SEEN}}),
    ClusterServers("pd", "region", (NEAR,), (HOME,)),
)
OPTIONS = FleetOptions()


def topology(gbps=100.0):
    from configs.studies import case_study
    from configs.studies.paper_case import get_config
    from prfaas_jax.scheduling.planner import topology_of

    config = get_config()
    config.link_gbps = gbps
    return topology_of(case_study(config), 3)


def engine(instances=(), **fields) -> common_pb2.EngineStatus:
    rows = [common_pb2.EngineStatus.PrefillInstance(free_in_s=s, jobs=j, fresh=f) for s, j, f in instances]
    return common_pb2.EngineStatus(instances=rows, **fields)


def made(time_scale=1.0, byte_scale=1.0):
    """A view over servers that have reported nothing yet, and a way to let one report."""
    system = topology()
    fleet = Fleet(CLUSTERS, OPTIONS, NONE, lambda cluster: live.touch(cluster))
    live = LiveView(CLUSTERS, system.links, system, Scale(time_scale, byte_scale), fleet)
    for cluster, role, address in (("prfaas", "prefill", FAR), ("pd", "prefill", NEAR), ("pd", "decode", HOME)):
        fleet._servers[role, address] = Server(cluster, role, address, None, Breaker(OPTIONS))

    def report(role, address, status):
        fleet._heard(fleet.get(role, address), status)

    return live, fleet, report


def test_instances_queues_and_slots_become_rows():
    live, _, report = made()
    report("decode", HOME, generation_pb2.GenerationStatus(engine=engine(decode_slots=100, decode_waiting=4, running=30, waiting=2)))
    report("prefill", NEAR, prefill_pb2.PrefillStatus(engine=engine([(2.0, 3, 1), (1.0, 2, 2)], running=2, waiting=3)))
    now = live.now
    view = live.at(now)
    assert view.decode.healthy.tolist() == [True] and view.prefill.healthy.tolist() == [False]
    load = view.decode.load
    assert (load.instances[0], load.slots[0], load.waiting[0]) == (2, 100, 4)
    assert load.free_at_s[0] - now == pytest.approx(1.0, abs=0.05)
    assert load.drained_at_s[0] - now == pytest.approx(1.5, abs=0.05)
    assert (load.jobs[0], load.fresh[0]) == (2, 2)
    assert view.decode.queue[0] == 32
    report("prefill", FAR, prefill_pb2.PrefillStatus(engine=engine([(0.0, 0, 0)] * 4)))
    assert live.at(live.now) is view and view.prefill.healthy.tolist() == [True]
    assert view.links.bytes_per_s[0, 0] == 12.5e9, "not measured yet: as the deployment has it"


def test_what_was_sent_counts_until_a_report_counts_it():
    live, fleet, report = made()
    report("decode", HOME, generation_pb2.GenerationStatus(engine=engine(decode_slots=1)))
    report("prefill", FAR, prefill_pb2.PrefillStatus(engine=engine([(0.0, 0, 0), (5.0, 1, 1)])))
    server = fleet.get("prefill", FAR)
    server.sent["a"] = 3.0
    live.touch("prfaas")
    view = live.at(live.now)
    assert view.prefill.load.free_at_s[0] - live.now == pytest.approx(3.0, abs=0.05)
    assert view.prefill.load.drained_at_s[0] - live.now == pytest.approx(4.0, abs=0.05)
    report("prefill", FAR, prefill_pb2.PrefillStatus(engine=engine([(3.0, 1, 1), (5.0, 1, 1)]), accepted=["a", "of another router"]))
    assert not server.sent
    assert live.at(live.now).prefill.load.free_at_s[0] - live.now == pytest.approx(3.0, abs=0.05)
    server.sent["b"] = 7.0
    report("prefill", FAR, prefill_pb2.PrefillStatus(engine=engine([(0.0, 0, 0)]), boot="another process"))
    assert not server.sent, "it has none of what the old one was sent"


def test_a_scaled_system_is_seen_in_the_models_units():
    """A wall second is ten of the model's; of its bytes a thousandth travels."""
    live, _, report = made(10.0, 1e-3)
    link = generation_pb2.Link(prefill_address=SEEN, bytes_per_s=20e6, rtt_s=0.003, age_s=0.5)
    stranger = generation_pb2.Link(prefill_address="127.0.0.1:77", bytes_per_s=90e6, age_s=0.5)
    report("decode", HOME, generation_pb2.GenerationStatus(engine=engine(decode_slots=1), links=[link, stranger]))
    report("prefill", FAR, prefill_pb2.PrefillStatus(engine=engine([(0.5, 1, 0)])))
    view = live.at(live.now)
    assert view.prefill.load.free_at_s[0] - live.now == pytest.approx(5.0, abs=0.3)
    assert view.links.bytes_per_s[0, 0] == pytest.approx(20e6 / 1e-3 / 10)
    assert view.links.rtt_s[0, 0] == pytest.approx(0.03)
    link.age_s = 60.0
    report("decode", HOME, generation_pb2.GenerationStatus(engine=engine(decode_slots=1), links=[link]))
    assert live.at(live.now).links.bytes_per_s[0, 0] == 12.5e9, "what is that old tells nothing"


def test_what_a_dead_decode_server_had_is_no_queue():
    """Its region looked busy for ever, and got nothing."""
    clusters = (ClusterServers("a", "region", (), (HOME, FAR)), ClusterServers("b", "region", (), (NEAR,)))
    fleet = Fleet(clusters, OPTIONS, NONE, lambda cluster: live.touch(cluster))
    live = LiveView(clusters, None, None, Scale(), fleet)
    for cluster, address, running in (("a", HOME, 40), ("a", FAR, 5), ("b", NEAR, 10)):
        server = fleet._servers["decode", address] = Server(cluster, "decode", address, None, Breaker(OPTIONS))
        fleet._heard(server, generation_pb2.GenerationStatus(engine=engine(decode_slots=64, running=running)))
    assert live.at(live.now).decode.queue.tolist() == [45, 10]
    fleet._lost(fleet.get("decode", HOME), "killed")
    view = live.at(live.now)
    assert view.decode.queue.tolist() == [5, 10] and view.decode.load.slots.tolist() == [64, 64]


def test_a_way_whose_breaker_is_open_is_no_link():
    live, _, report = made()
    report("decode", HOME, generation_pb2.GenerationStatus(engine=engine(decode_slots=1)))
    report("prefill", FAR, prefill_pb2.PrefillStatus(engine=engine([(0.0, 0, 0)])))
    breaker = live.breakers["pd", FAR] = Breaker(BreakerOptions(1, 0.2))
    breaker.failed(time.monotonic(), time.monotonic())
    live.unsettled()
    view = live.at(live.now)
    assert view.links.bytes_per_s[0, 0] == 0 and not view.prefill.healthy[0] and not live.open_servers("prfaas", "pd")
    time.sleep(0.25)
    assert live.at(live.now).prefill.healthy[0], "half open"
    assert breaker.succeeded(time.monotonic())
    live.unsettled()
    assert live.at(live.now).links.bytes_per_s[0, 0] == 12.5e9


def test_predictive_policies_place_by_the_live_view():
    live, _, report = made()
    report("decode", HOME, generation_pb2.GenerationStatus(engine=engine(decode_slots=100)))
    report("prefill", NEAR, prefill_pb2.PrefillStatus(engine=engine([(0.0, 0, 0)] * 3)))
    report("prefill", FAR, prefill_pb2.PrefillStatus(engine=engine([(0.0, 0, 0)] * 4)))
    policy = LeastTtft(Predictor(topology(), 8192))
    assert policy.place(Request(60_000, 100), live.at(live.now), live.now).prefill == "prfaas"
    report("prefill", FAR, prefill_pb2.PrefillStatus(engine=engine([(500.0, 40, 40)] * 4)))
    assert policy.place(Request(60_000, 100), live.at(live.now), live.now).prefill is None


def test_pending_bytes_are_what_is_reported_and_what_was_sent_since():
    """Also of other routers, and of one that was restarted; from another server of the region, or another site, nothing."""
    live, fleet, report = made(byte_scale=0.5)
    decode = fleet.get("decode", HOME)

    def pending() -> tuple[float, float]:
        live.touch("pd")
        links = live.at(live.now).links
        return links.pending[0, 0], links.pending_bytes[0, 0]

    def said(count: int, nbytes: float, *accepted: str) -> None:
        links = [generation_pb2.Link(prefill_address=a, pending=count, pending_bytes=nbytes) for a in (SEEN, NEAR)]
        report("decode", HOME, generation_pb2.GenerationStatus(engine=engine(decode_slots=10), links=links, accepted=accepted))

    assert pending() == (0, 0)
    decode.coming |= {"a": ("prfaas", 1e9), "b": ("prfaas", 2e9), "near": ("pd", 4e9)}
    assert pending() == (2, 3e9)
    said(2, 0.75e9, "a")
    assert pending() == (3, 1.5e9 + 2e9) and set(decode.coming) == {"b", "near"}
    said(0, 0.0, "b")
    assert pending() == (0, 0)
    said(1, 1e9)
    decode.heard_s -= 60.0
    assert pending() == (0, 0), "nothing was heard of it for a minute"


class Scripted:
    """A controller that says what it is told to, and remembers what it saw."""

    def __init__(self, *updates):
        self.updates, self.seen, self.views = list(updates), [], []

    def observe(self, request, placement, now):
        self.seen.append((request.tokens, placement.prefill))

    def update(self, view, now):
        self.views.append(np.array(view.decode.healthy))
        action = self.updates.pop(0) if self.updates else ()
        if isinstance(action, Exception):
            raise action
        return action


def test_a_controllers_actions_are_carried_out_and_its_failure_changes_nothing():
    live, _, report = made()
    report("decode", HOME, generation_pb2.GenerationStatus(engine=engine(decode_slots=1)))
    told = []

    async def convert(action):
        told.append((action.region, action.to))
        return action.to == "prefill"

    controller = Scripted(
        [UsePolicy(AlwaysRemote(), "prices")],
        ZeroDivisionError("a bug"),
        [Convert("pd", "prefill", "more"), Convert("pd", "decode", "less")],
    )

    async def run():
        loop = ControlLoop(AlwaysLocal(), controller, live, 0.02, convert)
        request = Request(10, 1)
        loop.placed(request, loop.place(request, live.at(live.now), live.now), live.now)
        loop.start()
        deadline = time.monotonic() + 5
        while len(told) < 2 and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        await loop.stop()
        return loop

    loop = asyncio.run(run())
    assert controller.seen == [(10, None)] and controller.views[0].tolist() == [True]
    assert isinstance(loop.policy, AlwaysRemote)
    assert told == [("pd", "prefill"), ("pd", "decode")] and loop.conversions == 1
    loop.report(status := generation_pb2.GenerationStatus())
    assert status.conversions == 1 and "cannot" in status.control[-1]


@pytest.mark.parametrize(("failures", "state"), [(1, "closed"), (2, "open")])
def test_a_breaker_opens_after_failures_in_a_row(failures, state):
    breaker = Breaker(BreakerOptions(2, 1.0, 8.0))
    assert [breaker.failed(10.0, 9.0) for _ in range(failures)][-1] is (state == "open")
    assert breaker.state(10.5) == state and breaker.allows(10.5) is (state == "closed")
    assert breaker.turns_at(10.5) == (math.inf if state == "closed" else 11.0)


def test_a_half_open_breaker_lets_one_request_try_and_waits_twice_as_long_when_it_fails():
    breaker = Breaker(BreakerOptions(1, 1.0, 3.0))
    breaker.failed(0.0, 0.0)
    assert breaker.allows(1.0) and breaker.state(1.0) == "half-open" and breaker.turns_at(1.0) == math.inf
    breaker.sent(1.0)
    assert not breaker.allows(1.1) and breaker.turns_at(1.1) == 4.0
    assert breaker.failed(1.2, 1.0)
    assert not breaker.allows(3.1) and breaker.allows(3.3)
    breaker.sent(3.3)
    breaker.withdrawn()
    assert breaker.allows(3.4), "cancelled by its client: it said nothing"
    breaker.sent(3.4)
    breaker.failed(3.5, 3.4)
    assert not breaker.allows(6.4) and breaker.allows(6.6), "never longer than the longest"
    breaker.sent(6.6)
    assert breaker.succeeded(6.6)
    assert breaker.state(6.7) == "closed"
    breaker.failed(7.0, 6.8)
    assert breaker.allows(8.1), "it begins anew"


def test_what_becomes_of_requests_sent_before_it_opened_says_nothing():
    breaker = Breaker(BreakerOptions(1, 1.0, 8.0))
    assert breaker.failed(0.3, 0.0)
    assert not breaker.failed(0.4, 0.1) and not breaker.failed(5.0, 0.2), "they have not tried it"
    assert breaker.allows(1.35)
    assert not breaker.succeeded(0.2) and not breaker.answered(0.2) and breaker.state(0.5) == "open"
    breaker.sent(6.0)
    assert not breaker.failed(6.1, 0.25) and not breaker.allows(6.2), "the one that tries is still on its way"
    assert breaker.succeeded(6.0)
    assert not breaker.failed(6.3, 0.28) and breaker.state(6.4) == "closed", "nor do they open it again"


def test_a_first_token_lets_others_follow_and_a_failure_behind_it_closes_the_door_again():
    breaker = Breaker(BreakerOptions(3, 1.0, 8.0))
    for _ in range(3):
        breaker.failed(0.0, 0.0)
    breaker.sent(1.0)
    assert breaker.answered(1.0) and breaker.state(1.1) == "closed"
    assert not breaker.answered(1.0), "it is closed already"
    assert breaker.failed(2.0, 1.0) and not breaker.allows(3.9) and breaker.allows(4.1), "for twice as long"
    breaker.sent(4.1)
    breaker.answered(4.1)
    breaker.succeeded(4.1)
    assert not breaker.failed(5.0, 4.2), "it takes three again"


def test_the_rate_that_a_dead_decode_server_reported_ages():
    live, fleet, report = made()
    link = generation_pb2.Link(prefill_address=SEEN, bytes_per_s=99e9, rtt_s=0.003, age_s=0.5)
    report("decode", HOME, generation_pb2.GenerationStatus(engine=engine(decode_slots=1), links=[link]))
    report("prefill", FAR, prefill_pb2.PrefillStatus(engine=engine([(0.5, 1, 0)])))
    assert live.at(live.now).links.bytes_per_s[0, 0] == 99e9
    fleet.get("decode", HOME).heard_s -= 3600
    fleet._lost(fleet.get("decode", HOME), "silent")
    report("prefill", FAR, prefill_pb2.PrefillStatus(engine=engine([(0.5, 1, 0)])))
    assert live.at(live.now).links.bytes_per_s[0, 0] == 12.5e9
