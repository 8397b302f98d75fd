"""What happens to a running simulation from outside: links that change, instances that fail and come back, controllers that act.

The router learns of a failure `detect_s` late, as live; until then its policy decides on a view that is wrong, and what it sends to a
dead instance is placed again. Requests are never lost: they are placed again, or parked until something can take them.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from prfaas_jax.errors import InvalidInput
from prfaas_jax.scheduling.controllers import Convert, UsePolicy
from prfaas_jax.simulation.decode import DecodeInstance, DecodeTask
from prfaas_jax.simulation.job import Job
from prfaas_jax.simulation.links import Pair, Transfer
from prfaas_jax.simulation.pools import DecodePool, PrefillPool
from prfaas_jax.simulation.prefill import PrefillInstance
from prfaas_jax.simulation.prefix_cache import PrefixCache
from prfaas_jax.simulation.scenario import LinkPlan, Outage, SquareWave

if TYPE_CHECKING:
    from prfaas_jax.simulation.simulator import Simulation

# Turns in vain of every wave and of the controller, with nothing else to come, after which nothing will help what is parked.
IDLE_TURNS = 100


@dataclasses.dataclass(frozen=True, eq=False)
class _Course:
    """A link's plan under way: rows of the view, changes to come, the cap of one transfer. Only an `endless` one has to be ended."""

    cluster: int
    region: int
    changes: Iterator[tuple[float, float]]
    window: float
    endless: bool


def schedule(sim: "Simulation", links: Mapping[tuple[str, str], LinkPlan], outages: Sequence[Outage]) -> None:
    """Puts link changes and outages on the clock. Raises InvalidInput for what the topology does not have."""
    for (cluster, region), plan in links.items():
        link = sim.topology.link(cluster, region)
        if link is None:
            raise InvalidInput("links", (cluster, region), f"one of {[(x.prefill, x.decode) for x in sim.topology.links]}")
        rows, changes = (sim.cluster_row[cluster], sim.region_row[region]), plan.changes(link.bytes_per_s)
        _next_change(sim, _Course(*rows, changes, link.window_bytes_per_s, isinstance(plan, SquareWave)))
    for outage in outages:
        pools: Sequence[PrefillPool | DecodePool] = (*sim.prefill, *sim.local) if outage.part == "prefill" else sim.decode
        pool = next((p for p in pools if p.name == outage.cluster), None)
        if pool is None or not 0 <= outage.index < len(pool.instances):
            raise InvalidInput("outage", outage, f"an instance of {[(p.name, len(p.instances)) for p in pools]}")
        instance = pool.instances[outage.index]
        sim.kernel.at(outage.start_s, functools.partial(_fail, sim, instance))
        sim.kernel.at(outage.start_s + outage.seconds, functools.partial(_recover, sim, instance))


# --- links -------------------------------------------------------------------------------------------------------------------------


def _next_change(sim: "Simulation", course: _Course) -> None:
    change = next(course.changes, None)
    if change is not None:
        _at(sim, change[0], course if course.endless else None, lambda: _change(sim, course, change[1]))


def _change(sim: "Simulation", course: _Course, capacity: float) -> None:
    for table in (sim.pairs, sim.reverse):
        pair = table[course.cluster][course.region]
        assert pair is not None  # schedule() found the link
        pair.set_capacity(capacity)
        for transfer in pair.open:
            watch(sim, pair, transfer)
    _at(sim, sim.kernel.now + sim.options.detect_s, course if course.endless else None, lambda: _tell(sim, course))
    if _going(sim):
        _next_change(sim, course)


def _tell(sim: "Simulation", course: _Course) -> None:
    """The router's view follows; a cluster that no link reaches is not healthy."""
    cluster, region = course.cluster, course.region
    pair = sim.pairs[cluster][region]
    assert pair is not None  # schedule() found the link
    sim.view_links.bytes_per_s[cluster, region] = pair.capacity
    sim.view_links.transfer_bytes_per_s[cluster, region] = min(pair.capacity, course.window)
    refresh_health(sim)
    _unpark(sim)
    if course.endless:
        sim.vain[course] += 1


def watch(sim: "Simulation", pair: Pair, transfer: Transfer) -> None:
    """Gives up a transfer that stands still from now on, unless its link comes back within `stall_s`.

    While its prompt is still being computed nothing is lost by waiting, so a transfer is watched once it is closed.
    """
    since = pair.down_since
    if not (transfer.active and transfer.closed and pair.capacity == 0):
        return

    def give_up(_: object) -> None:
        if transfer.active and pair.down_since == since:
            sim.retry(transfer.owner)

    sim.kernel.at(sim.kernel.now + sim.options.stall_s, give_up)


def _at(sim: "Simulation", time: float, endless: object | None, handler: Callable[[], None]) -> None:
    """Puts a turn on the clock; `endless` is what it belongs to, where that does not end by itself: `_going` has to end it."""
    if endless is None or time == math.inf:
        sim.kernel.at(time, lambda _: handler())
        return

    def turn(_: object) -> None:
        sim.turns -= 1
        handler()

    sim.turns += 1
    sim.vain.setdefault(endless, 0)
    sim.kernel.at(time, turn)


def _going(sim: "Simulation") -> bool:
    """Whether changes and controllers go on: while requests are to come or under way, and while those that are parked may yet be taken.

    They wait for everything that ends by itself (repairs, conversions, the last of given steps), then for `IDLE_TURNS` of what does not.
    """
    if not (sim.left or sim.jobs):
        return False
    if sim.left or len(sim.jobs) > len(sim.parked) or sim.kernel.pending > sim.turns:
        sim.vain = dict.fromkeys(sim.vain, 0)
        return True
    return min(sim.vain.values(), default=0) < IDLE_TURNS


# --- instances ---------------------------------------------------------------------------------------------------------------------


def _fail(sim: "Simulation", instance: PrefillInstance | DecodeInstance, _: object) -> None:
    sim.down[instance] = sim.down.get(instance, 0) + 1
    if sim.down[instance] > 1:
        return
    pool = _pool(instance)
    lost = [task.owner for task in instance.fail()]
    if instance in pool.instances:  # it has not changed its role
        lost += [job for job in sim.jobs.values() if job.source is instance and not _gone(job)]
    pool.refresh()
    _forget(sim)
    for job in lost:
        sim.retry(job)

    def known(_: object) -> None:
        refresh_health(sim)
        if isinstance(pool, DecodePool) and not pool.alive:
            # What waits there has lost its KV.
            for task in list(pool.waiting):
                sim.retry(task.owner)

    sim.kernel.at(sim.kernel.now + sim.options.detect_s, known)


def _gone(job: Job) -> bool:
    """Whether the last byte of its KV has left the prefill instance, and is at most on its way."""
    return job.transfer is not None and job.transfer.closed and not job.transfer.active


def _forget(sim: "Simulation") -> None:
    """Empties the prefix caches of clusters that have no instance up."""
    parts: list[tuple[PrefixCache, list[PrefillPool | DecodePool]]] = [(c, [p]) for c, p in zip(sim.far_caches, sim.prefill, strict=False)]
    parts += [(c, [p, d]) for c, p, d in zip(sim.near_caches, sim.local, sim.decode, strict=False)]
    for cache, pools in parts:
        if not any(i.up for pool in pools for i in pool.instances):
            cache.clear()


def take_from_decode(sim: "Simulation", task: DecodeTask) -> int:
    """Takes a request out of decode, whether it runs, waits or was thrown out; tokens that it has streamed since it joined."""
    if task.instance is None:
        pool = sim.decode[task.owner.region]
        pool.waiting.remove(task)
        pool.pump()
        return 0
    if task.running:
        task.instance.cancel(task)
    return 1 + task.generated


def _recover(sim: "Simulation", instance: PrefillInstance | DecodeInstance, _: object) -> None:
    sim.down[instance] -= 1
    if sim.down[instance]:
        return
    pool = _pool(instance)
    instance.recover()
    pool.refresh()

    def known(_: object) -> None:
        refresh_health(sim)
        _unpark(sim)

    sim.kernel.at(sim.kernel.now + sim.options.detect_s, known)


def _pool(instance: PrefillInstance | DecodeInstance) -> PrefillPool | DecodePool:
    pool = instance.cluster if isinstance(instance, PrefillInstance) else instance.region
    assert isinstance(pool, PrefillPool | DecodePool)  # pools make them
    return pool


def refresh_health(sim: "Simulation") -> None:
    """What the router knows from now on."""
    pools: tuple[PrefillPool | DecodePool, ...] = (*sim.prefill, *sim.local, *sim.decode)
    for each in pools:
        each.publish()
    for i, pool in enumerate(sim.prefill):
        sim.view.prefill.healthy[i] = pool.alive and bool(sim.view_links.bytes_per_s[i].any())
    for i, decode in enumerate(sim.decode):
        sim.view.decode.healthy[i] = decode.alive


def _unpark(sim: "Simulation") -> None:
    parked, sim.parked = sim.parked, []
    for job in parked:
        sim.place(job)


# --- controllers -------------------------------------------------------------------------------------------------------------------


def await_control(sim: "Simulation") -> None:
    """Puts the controller's next turn on the clock."""
    _at(sim, sim.kernel.now + sim.options.control_s, "controller", lambda: _control(sim))


def _control(sim: "Simulation") -> None:
    """One period of the controller; it ends with the requests."""
    assert sim.controller is not None  # who schedules this has one
    sim.vain["controller"] += 1
    for action in sim.controller.update(sim.view, sim.kernel.now):
        if isinstance(action, UsePolicy):
            sim.policy = action.policy
        elif isinstance(action, Convert):
            _convert(sim, action)
        else:
            raise InvalidInput("action", action, "UsePolicy or Convert")
    if _going(sim):
        await_control(sim)


def _convert(sim: "Simulation", action: Convert) -> None:
    """Drains one instance and gives it the other role; refused where no other decodes, or no other could prefill for the region.

    One that fails while it drains changes its role after it has come back.
    """
    if action.region not in sim.regions:
        raise InvalidInput("convert.region", action.region, f"one of {sim.regions}")
    if action.to not in ("prefill", "decode"):
        raise InvalidInput("convert.to", action.to, "prefill or decode")
    region = sim.region_row[action.region]
    source: PrefillPool | DecodePool = sim.decode[region] if action.to == "prefill" else sim.local[region]
    able = [i for i in source.instances if i.up and not i.draining]
    reached = any(pairs[region] is not None for pairs in sim.pairs)
    if len(able) < (2 if action.to == "prefill" or not reached else 1):
        return
    sim.conversions += 1
    instance = min(able, key=lambda i: i.free_at if isinstance(i, PrefillInstance) else i.running)
    target: PrefillPool | DecodePool = sim.local[region] if action.to == "prefill" else sim.decode[region]

    def changed(_: object) -> None:
        target.add()
        refresh_health(sim)
        _unpark(sim)

    def drained(_: object) -> None:
        instance.drained = None
        source.instances.remove(instance)  # type: ignore[arg-type]  # it came from there
        sim.kernel.at(sim.kernel.now + sim.options.convert_s, changed)

    instance.draining, instance.drained = True, drained
    source.refresh()
    refresh_health(sim)
    if not (instance.jobs if isinstance(instance, PrefillInstance) else instance.running):
        drained(instance)
