"""Requests through clusters: arrival, placement by the very policy that serves live, prefill, transfer, decode; failures in between."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from prfaas_jax.scheduling.controllers import Controller
from prfaas_jax.scheduling.profiles import prefill_s
from prfaas_jax.scheduling.topology import Topology
from prfaas_jax.scheduling.view import ClusterView, Links, Load, NoDecodeServer, Policy, Request, Servers
from prfaas_jax.simulation import disturbances
from prfaas_jax.simulation.decode import DecodeTask
from prfaas_jax.simulation.job import Job
from prfaas_jax.simulation.kernel import Kernel
from prfaas_jax.simulation.links import Network, Pair, Transfer
from prfaas_jax.simulation.pools import DecodePool, PrefillPool
from prfaas_jax.simulation.prefill import PrefillTask
from prfaas_jax.simulation.prefix_cache import PrefixCache
from prfaas_jax.simulation.scenario import LinkPlan, Outage, SimOptions
from prfaas_jax.simulation.workloads import Arrival, Workload


class Simulation:
    """One run. `finished(job)` is called for every request as its last token comes, in that order.

    Args:
        topology: clusters, links, KV sizes.
        workload: arrivals; its `block_tokens` says what a block id stands for.
        policy: decides; a controller may replace it.
        options: see SimOptions.
        seed: of the workload; everything else is deterministic.
        finished: takes finished requests; statistics are the caller's.
        links: (prefill cluster, region) -> how that link changes; links that are not named keep their capacity.
        outages: instances that fail.
        controller: asked every `options.control_s`.

    Raises:
        InvalidInput: names that the topology does not have.
    """

    def __init__(
        self,
        topology: Topology,
        workload: Workload,
        policy: Policy,
        options: SimOptions,
        seed: int,
        finished: Callable[[Job], None],
        links: Mapping[tuple[str, str], LinkPlan] | None = None,
        outages: Sequence[Outage] = (),
        controller: Controller | None = None,
    ):
        self.topology, self.policy, self.options, self.controller = topology, policy, options, controller
        self.kernel = Kernel()
        self._arrivals: Iterator[Arrival] = workload.arrivals(seed)
        self._finished = finished
        self.arrived = self.completed = self.fallbacks = self.conversions = 0
        self.clusters = tuple(c.name for c in topology.prefill)
        self.regions = tuple(r.name for r in topology.regions)
        self.row = {name: i for names in (self.clusters, self.regions) for i, name in enumerate(names)}
        self.view = _idle_view(topology)
        self.prefill = [self._prefill_pool(c.name, c.instance, c.instances, self.view.prefill, i) for i, c in enumerate(topology.prefill)]
        self.local = [self._prefill_pool(r.name, r.instance, r.prefill, self.view.decode, i) for i, r in enumerate(topology.regions)]
        self.decode = [
            DecodePool(self.kernel, r.name, r.instance, r.decode, self._decoded, self.view.decode, i)
            for i, r in enumerate(topology.regions)
        ]
        for pool in self.decode:
            pool.joined = self._joined
        self.pairs, self.reverse = self._network()
        self._caches(workload.block_tokens)
        self.left: float = 0  # arrivals to come
        self.jobs: dict[int, Job] = {}  # in the system
        self.parked: list[Job] = []  # nothing can take them now
        disturbances.schedule(self, dict(links or {}), outages)

    # --- set-up ----------------------------------------------------------------------------------------------------------------

    def _prefill_pool(self, name: str, instance: Any, count: int, servers: Servers, row: int) -> PrefillPool:
        return PrefillPool(self.kernel, name, instance, count, self.options.prefill_chunk, self.options.prefill_rows, servers, row)

    def _network(self) -> tuple[list[list[Pair | None]], list[list[Pair | None]]]:
        """Pairs towards the regions, which carry KV, and back, which carry copied prefixes only."""
        caps = {f"out {c.name}": c.instances * c.instance.nic_bytes_per_s for c in self.topology.prefill}
        caps |= {f"in {r.name}": r.instances * r.instance.nic_bytes_per_s for r in self.topology.regions}
        network = Network(self.kernel, caps)

        def pairs(delivered: Callable[[Transfer], None], forward: bool) -> list[list[Pair | None]]:
            table: list[list[Pair | None]] = [[None] * len(self.regions) for _ in self.clusters]
            for x in self.topology.links:
                hosts = {"egress": f"out {x.prefill}", "ingress": f"in {x.decode}"} if forward else {}
                pair = network.add(x.bytes_per_s, delivered, x.transfer_bytes_per_s, x.rtt_s / 2, **hosts)
                table[self.row[x.prefill]][self.row[x.decode]] = pair
            return table

        return pairs(self._delivered, True), pairs(self._copied, False)

    def _caches(self, block_tokens: int) -> None:
        o, kv = self.options, self.topology.kv
        far, near = (o.prefill_cache_bytes, o.decode_cache_bytes) if block_tokens else (0.0, 0.0)

        def caches(count: int, size: float) -> list[PrefixCache] | None:
            return [PrefixCache(kv, block_tokens, size, o.checkpoint_blocks) for _ in range(count)] if size else None

        self.far_caches, self.near_caches = caches(len(self.clusters), far), caches(len(self.regions), near)

    # --- running ---------------------------------------------------------------------------------------------------------------

    def run(self, requests: int | None = None, until_s: float = math.inf) -> None:
        """Runs `requests` arrivals (None: all there are) to their ends, or stops the clock at `until_s`.

        Raises:
            InvalidInput: an endless workload without an end, a prompt beyond a profile, a request too large for decode memory.
            NoDecodeServer: requests are left that nothing will ever take.
        """
        self.left = math.inf if requests is None else requests
        self._arrive(None)
        if self.controller is not None:
            self.kernel.at(self.kernel.now + self.options.control_s, disturbances.control, self)
        self.kernel.run(until_s)
        if self.jobs and not self.kernel.pending:
            raise NoDecodeServer(f"{len(self.jobs)} requests are left at {self.kernel.now:.1f} s and nothing will take them")

    def _arrive(self, arrival: Arrival | None) -> None:
        """Places the request that has come and schedules the next one."""
        if arrival is not None:
            self.arrived += 1
            job = Job(self.arrived - 1, arrival, self.unloaded_ttft(arrival.tokens))
            self.jobs[job.id] = job
            self.place(job)
        if self.left > 0:
            self.left -= 1
            following = next(self._arrivals, None)
            if following is None:
                self.left = 0
            else:
                self.kernel.at(following.time_s, self._arrive, following)

    def unloaded_ttft(self, tokens: int) -> float:
        """TTFT of a prompt on its best path when nothing else is there, nothing cached, links as the topology has them."""
        best = math.inf
        for region in self.topology.regions:
            if region.prefill:
                best = min(best, prefill_s(region.instance.prefill, tokens) + self._local_transfer_s(region.local_bytes_per_s, tokens, 0))
        for link in self.topology.links:
            time = self.topology.prefill[self.row[link.prefill]].instance.prefill
            sent = self._tail_bytes(tokens, 0) / link.transfer_bytes_per_s
            best = min(best, prefill_s(time, tokens) + sent + link.rtt_s / 2)
        return best

    def _tail_bytes(self, tokens: int, held: int) -> float:
        """What cannot leave before the prefill ends: the last chunk's tokens, windows, states; everything without overlap."""
        if not self.options.overlap:
            return self.topology.kv.bytes(tokens, held)
        last = tokens % self.options.prefill_chunk or min(tokens, self.options.prefill_chunk)
        return self.topology.kv.bytes(tokens, max(held, tokens - last))

    def _local_transfer_s(self, bytes_per_s: float, tokens: int, held: int) -> float:
        return self._tail_bytes(tokens, held) / bytes_per_s

    # --- placement -------------------------------------------------------------------------------------------------------------

    def place(self, job: Job) -> None:
        """Asks the policy and sets the request going; parks it where nothing can take it."""
        now, view = self.kernel.now, self.view
        far, near = self._matches(job)
        try:
            placement = self.policy.place(Request(job.tokens, job.output, far, near), view, now)
        except NoDecodeServer:
            self.parked.append(job)
            return
        region = self.row[placement.decode]
        cluster = self.row[placement.prefill] if placement.prefill is not None else -1
        pool = self.prefill[cluster] if cluster >= 0 else self.local[region]
        if not pool.alive or (cluster >= 0 and self.pairs[cluster][region] is None):
            # The policy could not know, or named what is not there: what works, or nothing now.
            alternatives = [i for i, p in enumerate(self.prefill) if p.alive and self.pairs[i][region] is not None]
            if not self.local[region].alive and not alternatives:
                self.parked.append(job)
                return
            cluster = -1 if self.local[region].alive else alternatives[0]
            pool = self.prefill[cluster] if cluster >= 0 else self.local[region]
            job.fallbacks += 1
            self.fallbacks += 1
        job.attempts += 1
        job.cluster, job.region, job.reason, job.placed_s = cluster, region, placement.reason, now
        job.held = near if isinstance(near, int) else int(near[region])
        job.cached = job.held if cluster < 0 else (far if isinstance(far, int) else int(far[cluster]))
        if self.controller is not None:
            self.controller.observe(job.tokens, job.output, job.held, cluster >= 0, now)
        view.decode.queue[region] += 1
        if cluster >= 0:
            view.prefill.queue[cluster] += 1
            job.want_bytes = job.pending_bytes = self.topology.kv.bytes(job.tokens, job.held)
            assert view.links is not None
            view.links.pending_bytes[cluster, region] += job.pending_bytes
        if placement.copied_tokens and self._copy(job, placement.copied_tokens):
            return
        self._submit(job)

    def _matches(self, job: Job) -> tuple[Any, Any]:
        """Cached prefix in tokens per prefill cluster and per region; plain zeros where there are no caches."""
        blocks = job.arrival.blocks
        far = np.array([c.match(blocks, job.tokens) for c in self.far_caches], np.int64) if self.far_caches else 0
        near = np.array([c.match(blocks, job.tokens) for c in self.near_caches], np.int64) if self.near_caches else 0
        return far, near

    def _copy(self, job: Job, tokens: int) -> bool:
        """Moves a cached prefix to the side that will compute; False where there is no way."""
        towards = job.cluster < 0
        source = next((i for i in range(len(self.clusters)) if self.pairs[i][job.region] is not None), -1) if towards else job.cluster
        pair = (self.pairs if towards else self.reverse)[source][job.region] if source >= 0 else None
        if pair is None:
            return False
        job.pair, job.transfer = pair, pair.start(job, tokens)
        pair.release(job.transfer, self.topology.kv.bytes(job.cached + tokens, job.cached), True)
        return True

    def _copied(self, transfer: Transfer) -> None:
        job: Job = transfer.owner
        job.sent_bytes += transfer.released
        job.transfer = job.pair = None
        job.cached += transfer.copied_tokens
        if job.cluster < 0:
            job.held = job.cached
        self._submit(job)

    def _submit(self, job: Job) -> None:
        task = PrefillTask(job, job.cached, job.tokens, self._computed)
        job.prefill = task
        pool = self.local[job.region]
        if job.cluster >= 0:
            pool = self.prefill[job.cluster]
            pair = self.pairs[job.cluster][job.region]
            assert pair is not None  # place
            job.pair, job.transfer, job.released = pair, pair.start(job), 0.0
            if self.options.overlap and job.tokens - job.cached > self.options.prefill_chunk:
                task.on_chunk = self._chunk_done
        if not pool.alive:  # died while a prefix was copied
            self.retry(job)
            return
        pool.submit(task)

    # --- the stages ------------------------------------------------------------------------------------------------------------

    def _chunk_done(self, task: PrefillTask) -> None:
        """Releases what the chunk made, and with the first one the cached prefix that the region lacks."""
        job: Job = task.owner
        if task.start < task.length and job.pair is not None and job.transfer is not None:
            total = self.topology.kv.bytes_per_token * max(0, task.start - job.held)
            if total > job.released:
                job.pair.release(job.transfer, total - job.released, False)
                job.released = total

    def _computed(self, task: PrefillTask) -> None:
        job: Job = task.owner
        now = self.kernel.now
        job.begun_s, job.computed_s, job.prefill = task.begun_s, now, None
        assert task.instance is not None  # it has run
        task.instance.cluster.refresh()
        if job.cluster >= 0:
            self.view.prefill.queue[job.cluster] -= 1
            if self.far_caches:
                self.far_caches[job.cluster].insert(job.arrival.blocks, job.arrival.tokens)
            assert job.pair is not None and job.transfer is not None  # _submit
            job.pair.release(job.transfer, max(0.0, job.want_bytes - job.released), True)
        else:
            region = self.topology.regions[job.region]
            seconds = self._local_transfer_s(region.local_bytes_per_s, job.tokens, job.held)
            self.kernel.at(now + seconds, self._local_kv, (job, job.attempts))

    def _local_kv(self, argument: tuple[Job, int]) -> None:
        job, attempt = argument
        if job.attempts == attempt and not math.isnan(job.computed_s):
            self._commit(job)

    def _delivered(self, transfer: Transfer) -> None:
        if transfer.copied_tokens:
            self._copied(transfer)
            return
        job: Job = transfer.owner
        job.sent_bytes += transfer.released
        job.transfer = job.pair = None
        self._unpend(job)
        self._commit(job)

    def _unpend(self, job: Job) -> None:
        if job.pending_bytes:
            assert self.view.links is not None
            self.view.links.pending_bytes[job.cluster, job.region] -= job.pending_bytes
            job.pending_bytes = 0.0

    def _commit(self, job: Job) -> None:
        """All KV is in the region."""
        job.kv_s = self.kernel.now
        if self.near_caches:
            self.near_caches[job.region].insert(job.arrival.blocks, job.arrival.tokens)
        if job.output == 1:
            self._joined(DecodeTask(job, job.tokens, 0, 0.0))
            self._complete(job)
            return
        job.decode = DecodeTask(job, job.tokens, job.output - 1, self.topology.kv.bytes(job.tokens + job.output))
        self.decode[job.region].submit(job.decode)

    def _joined(self, task: DecodeTask) -> None:
        job: Job = task.owner
        if math.isnan(job.first_s):
            job.first_s = self.kernel.now

    def _decoded(self, task: DecodeTask) -> None:
        task.owner.decode = None
        self._complete(task.owner)

    def _complete(self, job: Job) -> None:
        job.done_s = self.kernel.now
        self.view.decode.queue[job.region] -= 1
        self.completed += 1
        del self.jobs[job.id]
        self._finished(job)

    # --- when something fails --------------------------------------------------------------------------------------------------

    def retry(self, job: Job) -> None:
        """Takes the request from wherever it is and places it again; tokens that it has streamed become part of its prompt."""
        job.fallbacks += 1
        self.fallbacks += 1
        if job.prefill is not None and job.prefill.instance is not None and job.prefill.instance.up:
            job.prefill.instance.cancel(job.prefill)
        if job.prefill is not None and job.cluster >= 0:
            self.view.prefill.queue[job.cluster] -= 1
        if job.pair is not None and job.transfer is not None:
            job.sent_bytes += job.transfer.released - job.pair.remaining(job.transfer)
            job.pair.cancel(job.transfer)
        if job.decode is not None:
            generated = disturbances.take_from_decode(self, job.decode)
            if generated:
                job.tokens, job.output = job.tokens + generated, job.output - generated
        self._unpend(job)
        self.view.decode.queue[job.region] -= 1
        job.prefill = job.transfer = job.pair = job.decode = None
        job.computed_s = job.kv_s = math.nan
        self.place(job)


def _idle_view(topology: Topology) -> ClusterView:
    """The view that the run writes into; everything idle and healthy."""

    def servers(names: Sequence[str]) -> Servers:
        return Servers(tuple(names), np.ones(len(names), bool), np.zeros(len(names), np.int64), Load.idle(len(names)))

    prefill, decode = servers([c.name for c in topology.prefill]), servers([r.name for r in topology.regions])
    table = np.zeros((4, len(prefill.names), len(decode.names)))
    for link in topology.links:
        pair = prefill.names.index(link.prefill), decode.names.index(link.decode)
        table[0][pair], table[1][pair], table[2][pair] = link.bytes_per_s, link.transfer_bytes_per_s, link.rtt_s
    return ClusterView(prefill, decode, Links(*table))
