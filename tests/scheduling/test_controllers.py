import dataclasses
import itertools

import numpy as np
import pytest
from systems import PAPER, PAPER_MIX, idle_view

from prfaas_jax.errors import InvalidInput
from prfaas_jax.scheduling.controllers import (
    CONTROL_PERIOD_S,
    FEWEST_FOR_ROLES,
    Both,
    Convert,
    PriceController,
    RoleController,
    ThresholdController,
    UsePolicy,
    present,
)
from prfaas_jax.scheduling.mix import Mix
from prfaas_jax.scheduling.optimum import optimum
from prfaas_jax.scheduling.planner import topology_of
from prfaas_jax.scheduling.policies import Threshold
from prfaas_jax.scheduling.prediction import Predictor
from prfaas_jax.scheduling.predictive import Prices, ShadowPrice
from prfaas_jax.scheduling.prices import placement_prices
from prfaas_jax.scheduling.recent import FEWEST, WINDOW, link_rates
from prfaas_jax.scheduling.topology import GBPS, Link, PrefillCluster, Region
from prfaas_jax.scheduling.view import ClusterView, Placement, Request

TOPOLOGY = topology_of(PAPER, 3)
FAR, NEAR = TOPOLOGY.prefill[0].name, TOPOLOGY.regions[0].name
LENGTHS = [int(x) for x in np.random.default_rng(0).permutation(PAPER_MIX.tokens[:: len(PAPER_MIX.tokens) // WINDOW])][:WINDOW]
HERE = Placement(None, NEAR, "")
STEP_S = 5.0


def wave(now: float) -> float:
    """100 Gbit/s, and 5 for the second half of every minute."""
    return (100.0 if now % 60.0 < 30.0 else 5.0) * GBPS


class World:
    """Requests of the paper's lengths, three a second, and a region whose instances change their roles as they are told."""

    def __init__(self, controller, topology=TOPOLOGY, output=1024, takes_s=0.0):
        self.controller, self.output, self.takes_s, self.now = controller, output, takes_s, 0.0
        self.view = idle_view(topology)
        self.slots = topology.regions[0].instance.max_batch
        self.lengths = itertools.cycle(LENGTHS)
        self.acts: list[tuple[float, object]] = []
        self._coming: list[tuple[float, str]] = []

    @property
    def n_p(self) -> int:
        return int(self.view.decode.load.instances[0])

    @property
    def n_d(self) -> int:
        return int(self.view.decode.load.slots[0]) // self.slots

    def run(self, seconds: float, rate=None, backlog_s: float = 0.0) -> list[tuple[float, object]]:
        """What the controller did in the next `seconds`; `rate(now)` is what the link moves, `backlog_s` waits in both pools."""
        done = []
        for _ in range(int(seconds / STEP_S)):
            for _ in range(15):
                self.controller.observe(Request(next(self.lengths), self.output), HERE, self.now)
            self.now += STEP_S
            if rate is not None:
                self.view.links.bytes_per_s[:] = rate(self.now)
            for load in (self.view.prefill.load, self.view.decode.load):
                load.drained_at_s[:] = self.now + backlog_s
            self._arrive()
            for action in self.controller.update(self.view, self.now):
                done.append((self.now, action))
                if isinstance(action, Convert):
                    self._drain(action.to)
        self.acts += done
        return done

    def _drain(self, to: str) -> None:
        load = self.view.decode.load
        if to == "prefill":
            load.slots[0] -= self.slots
        else:
            load.instances[0] -= 1
        self._coming.append((self.now + self.takes_s, to))
        self._arrive()

    def _arrive(self) -> None:
        load = self.view.decode.load
        for due, to in [x for x in self._coming if x[0] <= self.now]:
            load.instances[0] += to == "prefill"
            load.slots[0] += self.slots * (to == "decode")
            self._coming.remove((due, to))


def threshold_controller(**options) -> ThresholdController:
    return ThresholdController(PAPER, 3, 19_400, **options)


def loss(t: float, n_p: int, gbps: float = 100.0, output: int = 1024) -> float:
    """Share of what the best t sustains, by the model, that this one does not; for the lengths that the world sends."""
    mix, case = Mix.of(np.array(LENGTHS), output), dataclasses.replace(PAPER, b_out=gbps * GBPS)
    found = case.operate(mix, np.append(np.arange(0.0, 131_000.0, 250.0), t), n_p, "exact").lambda_max
    return float(1 - found[-1] / found.max())


# --- prices ------------------------------------------------------------------------------------------------------------------------


def price_controller(topology=TOPOLOGY, **options) -> PriceController:
    return PriceController(topology, ShadowPrice(Predictor(topology, 8192), Prices({}, {}), busy_s=2.0), **options)


def test_prices_follow_every_period_once_the_mix_is_known():
    controller = price_controller()
    view = idle_view(TOPOLOGY)
    for _ in range(FEWEST - 1):
        controller.observe(Request(20_000, 1024), HERE, 0.0)
    assert not controller.update(view, 5.0)
    world = World(controller)
    acts = world.run(300.0)
    assert [now for now, _ in acts] == [5.0 + 30.0 * i for i in range(10)]
    policy = acts[-1][1].policy
    assert isinstance(policy, ShadowPrice) and policy.busy_s == 2.0
    expected = placement_prices(TOPOLOGY, Mix.of(np.array([20_000] * (FEWEST - 1) + LENGTHS[: 15 * 55]), 1024))
    assert policy.prices.prefill == pytest.approx(expected.prefill) and policy.prices.links == pytest.approx(expected.links)


def test_a_wave_is_priced_at_its_mean_and_a_lasting_change_as_it_is():
    world = World(price_controller())
    world.run(900.0, wave)
    waved = [action.policy.prices.links[FAR, NEAR] for _, action in world.acts]
    assert max(waved) == 0.0, "at 52 Gbit/s nobody waits for the link"
    world.run(2400.0, lambda now: 5 * GBPS)
    scarce = world.acts[-1][1].policy.prices
    steady = placement_prices(TOPOLOGY, Mix.of(np.array(LENGTHS), 1024), {(FAR, NEAR): 5 * GBPS})
    assert scarce.links[FAR, NEAR] == pytest.approx(steady.links[FAR, NEAR], rel=0.05) and scarce.links[FAR, NEAR] > 0


def test_a_link_that_is_down_for_hours_has_no_price_and_no_region_to_price_is_no_error():
    """The mean falls below any number that a program can take."""
    controller, view = price_controller(window_s=10.0), idle_view(TOPOLOGY)
    for _ in range(FEWEST):
        controller.observe(Request(20_000, 1024), HERE, 0.0)
    controller.update(view, 0.0)
    view.links.bytes_per_s[:] = 0.0
    for now in (60.0, 200.0, 600.0, 1200.0, 90_000.0):
        (action,) = controller.update(view, now)
        assert ((FAR, NEAR) in action.policy.prices.links) == (now <= 200.0) and action.policy.prices.prefill[NEAR] > 0
    view.decode.load.instances[:] = 0
    (action,) = controller.update(view, 100_000.0)
    assert action.policy.prices == Prices({}, {})


# --- t -----------------------------------------------------------------------------------------------------------------------------


def test_t_is_searched_again_when_the_link_shrinks_and_when_it_comes_back():
    world = World(threshold_controller())
    assert not world.run(60.0), "nothing has changed"
    assert not world.run(15.0, lambda now: 96 * GBPS), "by less than a twentieth"
    ((now, action),) = world.run(300.0, lambda now: 8 * GBPS)
    assert now == 80.0 and isinstance(action, UsePolicy)
    t = action.policy.tokens
    assert 25_000 < t < 60_000 and "N_p 3" in action.reason
    world.run(600.0, lambda now: 8 * GBPS, backlog_s=30.0)
    assert loss(world.controller.t, 3, 8.0) < 0.02
    world.run(60.0, lambda now: 100 * GBPS)
    assert loss(world.controller.t, 3) < 0.02


def test_t_is_searched_again_for_a_queue_and_taken_only_for_a_gain():
    world = World(ThresholdController(PAPER, 3, 40_000))
    assert not world.run(100.0, backlog_s=4.9)
    ((now, action),) = world.run(10.0, backlog_s=5.1)
    assert now == 105.0 and action.policy == Threshold(world.controller.t)
    world.run(700.0, backlog_s=60.0)
    assert len(world.acts) <= 4, "the mix is known ever better; that alone moves t little"
    assert not world.run(1800.0, backlog_s=60.0) and loss(world.controller.t, 3) < 0.02
    stubborn = World(ThresholdController(PAPER, 3, 40_000, gain=10.0))
    assert not stubborn.run(600.0, backlog_s=60.0)


def test_what_is_placed_on_the_link_counts_as_a_queue():
    world = World(ThresholdController(PAPER, 3, 40_000))
    world.run(100.0)
    world.view.links.pending_bytes[:] = 4.9 * 100 * GBPS
    assert not world.run(50.0)
    world.view.links.pending_bytes[:] = 5.1 * 100 * GBPS
    assert world.run(50.0)


def test_t_waits_for_its_period_for_requests_and_for_a_link():
    world = World(ThresholdController(PAPER, 3, 40_000, period_s=50.0))
    few = int(FEWEST / 15) * STEP_S
    assert not world.run(few, backlog_s=60.0), "too few requests"
    assert not world.run(100.0, lambda now: 0.0, backlog_s=60.0), "the link is down"
    searched = itertools.cycle([20 * GBPS, 5 * GBPS])
    world.run(500.0, lambda now: next(searched))
    assert min(b - a for (a, _), (b, _) in itertools.pairwise(world.acts)) >= 50.0


def test_a_square_wave_moves_t_at_most_twice_a_period_and_between_two_places():
    world = World(threshold_controller())
    world.run(900.0, wave)
    acts = world.run(3600.0, wave)
    assert len(acts) <= 2 * 60
    high, low = ({a.policy.tokens for now, a in acts if (wave(now) > 50 * GBPS) == up} for up in (True, False))
    assert max(high) < min(low) and max(high) - min(high) <= 1000 and max(low) - min(low) <= 2000


@pytest.mark.parametrize("n_p", [1, 2])
def test_t_follows_the_region_when_instances_change_their_roles(n_p):
    world = World(threshold_controller())
    world.run(700.0, backlog_s=60.0)
    assert loss(world.controller.t, 3) < 0.02 < 0.05 < loss(world.controller.t, n_p)
    world.view.decode.load.instances[:] = n_p
    ((_, action),) = world.run(60.0)
    assert loss(action.policy.tokens, n_p) < 0.02 and f"N_p {n_p}" in action.reason
    assert not world.run(300.0)


def test_t_with_all_instances_prefilling_or_none():
    for n_p in (0, 8):
        world = World(threshold_controller())
        world.view.decode.load.instances[:] = n_p
        world.run(120.0, backlog_s=60.0)
        assert 0 <= world.controller.t <= 131_072


# --- roles -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("output", "to", "end"), [(64, "prefill", 7), (4096, "decode", 0)])
def test_roles_follow_the_outputs_one_by_one_to_the_best_split(output, to, end):
    world = World(RoleController(TOPOLOGY, cooldown_s=60.0), takes_s=40.0)
    assert not world.run(300.0), "the planned split is the best"
    world.output = output
    world.run(1500.0)
    converted = [(now, action) for now, action in world.acts if isinstance(action, Convert)]
    assert all((a.region, a.to) == (NEAR, to) for _, a in converted) and world.n_p == end and world.n_d == 8 - end
    assert min(b - a for (a, _), (b, _) in itertools.pairwise(converted)) >= 60.0
    world.output = 1024
    world.run(1800.0)
    assert world.n_p in (3, 4), "and back, as far as it is worth more than the hysteresis"


def test_roles_are_exchanged_for_a_gain_confirmed_several_times():
    def first(**options) -> float:
        world = World(RoleController(TOPOLOGY, **options), output=4096)
        acts = world.run(300.0)
        return acts[0][0] if acts else float("inf")

    assert first() == 120.0, "enough requests after 90 s, then three more looks"
    assert first(confirm=1) == 90.0 and first(confirm=2, period_s=60.0) == 150.0
    assert first(gain=0.3) == float("inf")


def test_a_square_wave_on_the_link_moves_no_instance():
    world = World(RoleController(TOPOLOGY))
    world.run(3600.0, wave)
    assert not world.acts


@pytest.mark.parametrize("seconds", [30.0, 60.0])
def test_an_outage_that_ends_moves_no_instance(seconds):
    """Of a link so narrow that, by its mean, the region would do better with one more."""
    topology = topology_of(dataclasses.replace(PAPER, b_out=12 * GBPS), 3)
    world = World(RoleController(topology), topology)
    for lasts, gbps in ((900.0, 12), (seconds, 0), (900.0, 12)):
        world.run(lasts, lambda now, rate=gbps * GBPS: rate)
    assert not world.acts


def test_a_link_that_is_cut_moves_an_instance_and_its_price_within_three_control_periods():
    """A mean over minutes made both wait for minutes."""
    world = World(RoleController(TOPOLOGY))
    world.run(600.0)
    assert not world.acts
    ((now, action),) = world.run(3 * CONTROL_PERIOD_S, lambda now: 8 * GBPS)
    assert isinstance(action, Convert) and action.to == "prefill" and now - 600.0 <= 80.0
    world = World(price_controller())
    world.run(600.0)
    cut = world.run(3 * CONTROL_PERIOD_S, lambda now: 8 * GBPS)
    steady = placement_prices(TOPOLOGY, Mix.of(np.array(LENGTHS), 1024), {(FAR, NEAR): 8 * GBPS})
    assert cut[-1][1].policy.prices.links[FAR, NEAR] == pytest.approx(steady.links[FAR, NEAR], rel=0.05) and steady.links[FAR, NEAR] > 0


def test_a_link_that_shrank_for_good_does_move_them():
    world = World(RoleController(TOPOLOGY))
    world.run(2400.0, lambda now: 5 * GBPS)
    mix = Mix.of(np.array(LENGTHS), 1024)
    case = dataclasses.replace(PAPER, b_out=5 * GBPS)
    assert world.n_p == max(range(8), key=lambda n: optimum(topology_of(case, n), mix).lambda_max) == 5
    world.run(600.0, lambda now: 0.0)
    assert world.n_p == 6, "and one more while it is down"


def test_a_failed_instance_is_not_taken_for_one_that_decodes():
    """With 2 + 5 of 8 left nothing is gained by a change; were it 2 + 6, another for prefill would be right."""
    world = World(RoleController(TOPOLOGY), output=1200)
    world.view.decode.load.instances[:] = 2
    assert not world.run(600.0)
    assert (present(TOPOLOGY, world.view).regions[0].prefill, present(TOPOLOGY, world.view).regions[0].decode) == (2, 5)


def test_t_and_n_p_move_together():
    thresholds, roles = threshold_controller(), RoleController(TOPOLOGY)
    world = World(Both(thresholds, roles), output=256)
    world.run(1800.0)
    assert world.n_p == 6
    kinds = [type(action) for _, action in world.acts]
    assert kinds.count(Convert) == 3 and kinds.count(UsePolicy) >= 3
    assert loss(thresholds.t, 6, output=256) < 0.02 < 0.1 < loss(19_400, 6, output=256)


def test_both_pass_everything_on_and_keep_the_order():
    class Saying:
        def __init__(self, *words):
            self.words, self.seen = words, 0

        def observe(self, request, placement, now):
            self.seen += 1

        def update(self, view, now):
            return self.words

    one, two = Saying("a", "b"), Saying("c")
    both = Both(one, two)
    both.observe(Request(1, 1), HERE, 0.0)
    assert (one.seen, two.seen) == (1, 1) and both.update(idle_view(TOPOLOGY), 0.0) == ["a", "b", "c"]


def test_present_and_link_rates_read_the_view():
    region = TOPOLOGY.regions[0]
    topology = dataclasses.replace(
        TOPOLOGY,
        prefill=(*TOPOLOGY.prefill, PrefillCluster("b", TOPOLOGY.prefill[0].instance, 1)),
        regions=(region, Region("alone", region.instance, 2, 2), Region("far", region.instance, 0, 2)),
        links=(*TOPOLOGY.links, Link("b", "far", GBPS)),
    )
    view = idle_view(topology)
    assert present(topology, view) == topology
    linked = {(FAR, NEAR): 100 * GBPS, ("b", "far"): GBPS}
    assert link_rates(view) == {(p, d): linked.get((p, d), 0.0) for p in (FAR, "b") for d in (NEAR, "alone", "far")}
    view.decode.load.instances[:] = 9, 0, 1
    view.decode.load.slots[:] = 0, 2 * region.instance.max_batch, region.instance.max_batch
    got = [(r.prefill, r.decode) for r in present(topology, view).regions]
    assert got == [(7, 1), (1, 2), (1, 1)], "one decodes always, and one prefills where no link leads"
    # A live region without prefill servers: its decode servers prefill, and count as instances of both kinds.
    view.decode.load.instances[:] = 3, 2, 2
    view.decode.load.slots[:] = np.array([5, 2, 2]) * region.instance.max_batch
    assert [(r.prefill, r.decode) for r in present(topology, view).regions] == [(3, 5), (2, 2), (0, 2)]
    other = present(dataclasses.replace(TOPOLOGY, regions=(dataclasses.replace(region, name="new"),), links=(Link(FAR, "new", 1.0),)), view)
    assert (other.regions[0].prefill, other.regions[0].decode) == (3, 5), "not in the view: as planned"


POLICY = ShadowPrice(Predictor(TOPOLOGY, 8192), Prices({}, {}))


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (lambda: PriceController(TOPOLOGY, POLICY, period_s=0.0), "prices.period_s"),
        (lambda: PriceController(TOPOLOGY, POLICY, window_s=-1.0), "window_s"),
        (lambda: threshold_controller(period_s=-1.0), "threshold.period_s"),
        (lambda: threshold_controller(backlog_s=float("nan")), "threshold.backlog_s"),
        (lambda: threshold_controller(gain=-0.1), "threshold.gain"),
        (lambda: RoleController(TOPOLOGY, period_s=0.0), "roles.period_s"),
        (lambda: RoleController(TOPOLOGY, cooldown_s=float("nan")), "roles.cooldown_s"),
        (lambda: RoleController(TOPOLOGY, window_s=0.0), "window_s"),
        (lambda: RoleController(TOPOLOGY, gain=-1.0), "roles.gain"),
        (lambda: RoleController(TOPOLOGY, confirm=0), "roles.confirm"),
    ],
)
def test_bad_constants_are_refused(call, field):
    with pytest.raises(InvalidInput) as error:
        call()
    assert error.value.field == field


BARE = idle_view(TOPOLOGY)
NO_LOADS = ClusterView(*(dataclasses.replace(s, load=None) for s in (BARE.prefill, BARE.decode)), BARE.links)


@pytest.mark.parametrize("view", [ClusterView(BARE.prefill, BARE.decode), NO_LOADS], ids=["links", "loads"])
@pytest.mark.parametrize("make", [lambda: price_controller(), threshold_controller, lambda: RoleController(TOPOLOGY)])
def test_views_that_lack_what_a_controller_reads_are_refused(make, view):
    controller = make()
    for _ in range(FEWEST_FOR_ROLES):
        controller.observe(Request(1000, 10), HERE, 0.0)
    with pytest.raises(InvalidInput) as error:
        controller.update(view, 100.0)
    assert error.value.field.startswith("view")


def test_the_papers_controller_refuses_a_view_of_several_clusters():
    cluster = dataclasses.replace(TOPOLOGY.prefill[0], name="more")
    several = dataclasses.replace(TOPOLOGY, prefill=(*TOPOLOGY.prefill, cluster), links=(*TOPOLOGY.links, Link("more", NEAR, GBPS)))
    with pytest.raises(InvalidInput, match=r"view.links=\(2, 1\): expected \(1, 1\): one prefill cluster and one region"):
        threshold_controller().update(idle_view(several), 100.0)
