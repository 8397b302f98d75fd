"""What happens to a running simulation from outside: links that change, instances that fail and come back, controllers that act.

The router learns of a failure `detect_s` late, as live; until then its policy decides on a view that is wrong, and what it sends to a
dead instance is placed again. Requests are never lost: they are placed again, or parked until something can take them.
"""

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from prfaas_jax.errors import InvalidInput
from prfaas_jax.scheduling.controllers import Convert, UsePolicy
from prfaas_jax.simulation.decode import DecodeInstance, DecodeTask
from prfaas_jax.simulation.pools import DecodePool, PrefillPool
from prfaas_jax.simulation.prefill import PrefillInstance
from prfaas_jax.simulation.scenario import LinkPlan, Outage

if TYPE_CHECKING:
    from prfaas_jax.simulation.simulator import Simulation

Changes = Iterator[tuple[float, float]]


def schedule(sim: "Simulation", links: Mapping[tuple[str, str], LinkPlan], outages: Sequence[Outage]) -> None:
    """Puts link changes and outages on the clock. Raises InvalidInput for what the topology does not have."""
    for (cluster, region), plan in links.items():
        link = sim.topology.link(cluster, region)
        if link is None:
            raise InvalidInput("links", (cluster, region), f"one of {[(x.prefill, x.decode) for x in sim.topology.links]}")
        _next_change(sim, sim.row[cluster], sim.row[region], plan.changes(link.bytes_per_s), link.transfer_bytes_per_s)
    for outage in outages:
        pools: Sequence[PrefillPool | DecodePool] = (*sim.prefill, *sim.local) if outage.part == "prefill" else sim.decode
        pool = next((p for p in pools if p.name == outage.cluster), None)
        if pool is None or not 0 <= outage.index < len(pool.instances):
            raise InvalidInput("outage", outage, f"an instance of {[(p.name, len(p.instances)) for p in pools]}")
        instance = pool.instances[outage.index]
        sim.kernel.at(outage.start_s, functools.partial(_fail, sim, instance))
        sim.kernel.at(outage.start_s + outage.seconds, functools.partial(_recover, sim, instance))


# --- links -------------------------------------------------------------------------------------------------------------------------


def _next_change(sim: "Simulation", cluster: int, region: int, changes: Changes, cap: float) -> None:
    change = next(changes, None)
    if change is not None:
        sim.kernel.at(change[0], lambda _: _change(sim, cluster, region, change[1], changes, cap))


def _change(sim: "Simulation", cluster: int, region: int, capacity: float, changes: Changes, cap: float) -> None:
    pair, back = sim.pairs[cluster][region], sim.reverse[cluster][region]
    assert pair is not None and back is not None  # schedule() found the link
    pair.set_capacity(capacity)
    back.set_capacity(capacity)
    if not capacity:
        down_since = sim.kernel.now
        sim.kernel.at(down_since + sim.options.stall_s, lambda _: _give_up(sim, cluster, region, down_since))
        pair.down_since = back.down_since = down_since
    sim.kernel.at(sim.kernel.now + sim.options.detect_s, lambda _: _tell(sim, cluster, region, cap))
    if sim.jobs or sim.left:  # a link that nobody uses any more must not keep the clock running
        _next_change(sim, cluster, region, changes, cap)


def _tell(sim: "Simulation", cluster: int, region: int, cap: float) -> None:
    """The router's view follows; a cluster that no link reaches is not healthy."""
    links, pair = sim.view.links, sim.pairs[cluster][region]
    assert links is not None and pair is not None  # schedule() found the link
    links.bytes_per_s[cluster, region] = pair.capacity
    links.transfer_bytes_per_s[cluster, region] = min(pair.capacity, cap)
    _refresh_health(sim)
    _unpark(sim)


def _give_up(sim: "Simulation", cluster: int, region: int, down_since: float) -> None:
    """Transfers that have stood still since then are placed again."""
    for table in (sim.pairs, sim.reverse):
        pair = table[cluster][region]
        assert pair is not None  # schedule() found the link
        if pair.capacity or pair.down_since != down_since:
            return
        for transfer in list(pair.open):
            copied, job = transfer.copied_tokens > 0, transfer.owner
            if copied or not math.isnan(job.computed_s):  # others may still be computing when it comes back
                sim.retry(job)
    sim.kernel.at(sim.kernel.now + max(sim.options.stall_s, 0.1), lambda _: _give_up(sim, cluster, region, down_since))


# --- instances ---------------------------------------------------------------------------------------------------------------------


def _fail(sim: "Simulation", instance: PrefillInstance | DecodeInstance, _: object) -> None:
    if not instance.up:
        return
    lost = [task.owner for task in instance.fail()]
    _pool(instance).refresh()
    for job in lost:
        sim.retry(job)
    sim.kernel.at(sim.kernel.now + sim.options.detect_s, lambda _: _refresh_health(sim))


def take_from_decode(sim: "Simulation", task: DecodeTask) -> int:
    """Takes a request out of decode, whether it runs, waits or was thrown out; tokens that it had generated after the first."""
    if task.running and task.instance is not None:
        generated = task.instance.generated_of(task)
        task.instance.cancel(task)
        return generated
    if task.instance is None:
        sim.decode[task.owner.region].waiting.remove(task)
    return task.generated


def _recover(sim: "Simulation", instance: PrefillInstance | DecodeInstance, _: object) -> None:
    instance.recover()
    pool = _pool(instance)
    pool.refresh()
    if isinstance(pool, DecodePool):
        pool.pump()

    def known(_: object) -> None:
        _refresh_health(sim)
        _unpark(sim)

    sim.kernel.at(sim.kernel.now + sim.options.detect_s, known)


def _pool(instance: PrefillInstance | DecodeInstance) -> PrefillPool | DecodePool:
    pool = instance.cluster if isinstance(instance, PrefillInstance) else instance.region
    assert isinstance(pool, PrefillPool | DecodePool)  # pools make them
    return pool


def _refresh_health(sim: "Simulation") -> None:
    links = sim.view.links
    assert links is not None  # the simulator's view has them
    for i, pool in enumerate(sim.prefill):
        sim.view.prefill.healthy[i] = pool.alive and bool(links.bytes_per_s[i].any())
    for i, decode in enumerate(sim.decode):
        sim.view.decode.healthy[i] = decode.alive


def _unpark(sim: "Simulation") -> None:
    parked, sim.parked = sim.parked, []
    for job in parked:
        sim.place(job)


# --- controllers -------------------------------------------------------------------------------------------------------------------


def control(sim: "Simulation") -> None:
    """One period of the controller; it ends with the requests."""
    assert sim.controller is not None  # who schedules this has one
    for action in sim.controller.update(sim.view, sim.kernel.now):
        if isinstance(action, UsePolicy):
            sim.policy = action.policy
        elif isinstance(action, Convert):
            _convert(sim, action)
        else:
            raise InvalidInput("action", action, "UsePolicy or Convert")
    if sim.jobs or sim.left:
        sim.kernel.at(sim.kernel.now + sim.options.control_s, lambda _: control(sim))


def _convert(sim: "Simulation", action: Convert) -> None:
    """Drains one instance and gives it the other role; refused where it is the last of its role or nothing of that kind is up."""
    region = sim.row.get(action.region, -1)
    if action.region not in sim.regions:
        raise InvalidInput("convert.region", action.region, f"one of {sim.regions}")
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
        target.refresh()
        _refresh_health(sim)
        _unpark(sim)

    def drained(_: object) -> None:
        instance.drained = None
        source.instances.remove(instance)  # type: ignore[arg-type]  # it came from there
        sim.kernel.at(sim.kernel.now + sim.options.convert_s, changed)

    instance.draining = True
    source.refresh()
    if (instance.jobs if isinstance(instance, PrefillInstance) else instance.running) == 0:
        drained(instance)
    else:
        instance.drained = drained
