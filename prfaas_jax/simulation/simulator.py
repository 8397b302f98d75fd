"""Requests through clusters: arrival, placement by the very policy that serves live, prefill, transfer, decode; failures in between."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

from prfaas_jax.errors import InvalidInput
from prfaas_jax.scheduling.controllers import Controller
from prfaas_jax.scheduling.profiles import Instance
from prfaas_jax.scheduling.topology import Topology
from prfaas_jax.scheduling.view import NoDecodeServer, Placement, Policy, Request, Servers
from prfaas_jax.simulation import disturbances
from prfaas_jax.simulation.clusters import idle_view, pair_tables, prefix_caches
from prfaas_jax.simulation.decode import DecodeTask
from prfaas_jax.simulation.job import Job
from prfaas_jax.simulation.kernel import Kernel
from prfaas_jax.simulation.links import Pair, Transfer
from prfaas_jax.simulation.pools import DecodePool, PrefillPool
from prfaas_jax.simulation.prefill import PrefillTask
from prfaas_jax.simulation.prefix_cache import Held, held_at, held_column
from prfaas_jax.simulation.scenario import LinkPlan, Outage, SimOptions
from prfaas_jax.simulation.unloaded import Unloaded, tail_bytes
from prfaas_jax.simulation.workloads import Arrival, Workload, check_cap


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
        slo_topology: whose unloaded TTFT the SLO counts; None: that of `topology`.

    Raises:
        InvalidInput: names that the topology does not have, a negative seed.
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
        slo_topology: Topology | None = None,
    ):
        self.topology, self.policy, self.options, self.controller = topology, policy, options, controller
        self.kernel = Kernel()
        self._workload = workload
        self._arrivals: Iterator[Arrival] = workload.arrivals(seed)
        self._finished = finished
        self._ran = False
        self.arrived = self.completed = self.fallbacks = self.conversions = 0
        self.last_s = 0.0  # when the last request was finished
        self.clusters = tuple(c.name for c in topology.prefill)
        self.regions = tuple(r.name for r in topology.regions)
        self.cluster_row = {name: i for i, name in enumerate(self.clusters)}
        self.region_row = {name: i for i, name in enumerate(self.regions)}
        self.view, self.view_links = idle_view(topology)
        self.prefill = [self._prefill_pool(c.name, c.instance, c.instances, self.view.prefill, i) for i, c in enumerate(topology.prefill)]
        self.local = [self._prefill_pool(r.name, r.instance, r.prefill, self.view.decode, i) for i, r in enumerate(topology.regions)]
        self.decode = [
            DecodePool(self.kernel, r.name, r.instance, r.decode, self._decoded, self.view.decode, i)
            for i, r in enumerate(topology.regions)
        ]
        for pool in self.decode:
            pool.joined = self._joined
        self._local_rates = [r.local_bytes_per_s for r in topology.regions]
        self.pairs, self.reverse = pair_tables(
            self.kernel, topology, options.link_order == "least_left", self._delivered, self._copied
        )
        self._lively: dict[Pair, tuple[int, int]] = {}  # pairs towards regions on which something is pending
        self.far_caches, self.near_caches = prefix_caches(topology, options, workload, seed)
        self.unloaded = Unloaded(slo_topology or topology, options.prefill_chunk, options.overlap)
        # What is restarted must not outgrow any profile.
        self._longest = min(p.instance.prefill.max_tokens for p in (*self.prefill, *self.local) if p.instances)
        self.left: float = 0  # arrivals to come
        self.jobs: dict[int, Job] = {}  # in the system
        self.parked: list[Job] = []  # nothing can take them now
        self.down: dict[object, int] = {}  # instances: outages under way
        self.turns = 0  # events to come of what is endless: waves, the controller
        self.vain: dict[object, int] = {}  # their turns since there was last hope for what is parked
        disturbances.refresh_health(self)
        disturbances.schedule(self, dict(links or {}), outages)

    # --- set-up ----------------------------------------------------------------------------------------------------------------

    def _prefill_pool(self, name: str, instance: Instance, count: int, servers: Servers, row: int) -> PrefillPool:
        return PrefillPool(self.kernel, name, instance, count, self.options.prefill_chunk, self.options.prefill_rows, servers, row)

    # --- running ---------------------------------------------------------------------------------------------------------------

    def run(self, requests: int | None = None, until_s: float = math.inf) -> None:
        """Runs `requests` arrivals (None: all there are) to their ends, or stops the clock at `until_s`; once.

        Raises:
            InvalidInput: an endless workload without an end, a second run, a prompt beyond a profile, a request too large for decode
                memory, a policy that names clusters which are not there.
            NoDecodeServer: requests are left that nothing will ever take.
        """
        check_cap("requests", requests)
        if not until_s > 0:
            raise InvalidInput("until_s", until_s, "seconds above zero")
        endless = self._workload.requests is None and getattr(self._workload, "repeat", None) is None
        if endless and requests is None and until_s == math.inf:
            raise InvalidInput("requests", requests, "a number of requests, or until_s: the workload never ends")
        if self._ran:
            raise InvalidInput("run", "a second one", "one run of a Simulation")
        self._ran = True
        self.left = math.inf if requests is None else requests
        self._await_next()
        if self.controller is not None:
            disturbances.await_control(self)
        self.kernel.run(until_s)
        if self.jobs and not self.kernel.pending:
            raise NoDecodeServer(f"{len(self.jobs)} requests are left at {self.kernel.now:.1f} s and nothing will take them")

    def _await_next(self) -> None:
        following = next(self._arrivals, None) if self.left else None
        if following is None:
            self.left = 0
        else:
            self.kernel.at(following.time_s, self._arrive, following)

    def _arrive(self, arrival: Arrival) -> None:
        job = self.jobs[self.arrived] = Job(self.arrived, arrival, self.unloaded.ttft(arrival.tokens))
        self.arrived += 1
        self.left -= 1
        self.place(job)
        self._await_next()

    # --- placement -------------------------------------------------------------------------------------------------------------

    def place(self, job: Job) -> None:
        """Asks the policy and sets the request going; parks it where nothing can take it."""
        now, view = self.kernel.now, self.view
        for lively in self._lively:
            lively.advance()
            self._note_pending(lively)
        far, near = self._matches(job)
        request = Request(job.tokens, job.output, far, near)
        try:
            placement = self.policy.place(request, view, now)
        except NoDecodeServer:
            self.parked.append(job)
            return
        cluster, region = self._rows(placement)
        if self._known_dead(region):
            self.parked.append(job)
            return
        if not self._open(cluster, region):
            # The policy could not know, or named what is not there: what works, or nothing now.
            others = (-1, *sorted(range(len(self.clusters)), key=view.prefill.queue.__getitem__))
            cluster = next((i for i in others if self._open(i, region)), -2)
            if cluster == -2:
                self.parked.append(job)
                return
            placement = placement._replace(prefill=self.clusters[cluster] if cluster >= 0 else None, copied_tokens=0)
            job.fallbacks += 1
            self.fallbacks += 1
        job.attempts += 1
        job.cluster, job.region, job.reason, job.placed_s = cluster, region, placement.reason, now
        job.held = held_at(near, region)
        job.cached = job.held if cluster < 0 else held_at(far, cluster)
        if self.controller is not None:
            self.controller.observe(request, placement, now)
        view.decode.queue[region] += 1
        if cluster >= 0:
            view.prefill.queue[cluster] += 1
            job.want_bytes = job.pending_bytes = self.topology.kv.bytes(job.tokens, job.held)
            pair = self.pairs[cluster][region]
            assert pair is not None  # it is open
            self._lively[pair] = cluster, region
            pair.pending += 1
            pair.to_come += job.pending_bytes
            self._note_pending(pair)
        if not placement.copied_tokens or not self._copy(job, placement.copied_tokens, far):
            self._submit(job)

    def _rows(self, placement: Placement) -> tuple[int, int]:
        """Cluster (-1: local) and region; raises InvalidInput for names that the view does not have."""
        region = self.region_row.get(placement.decode, -1)
        cluster = -1 if placement.prefill is None else self.cluster_row.get(placement.prefill, -2)
        if region < 0:
            raise InvalidInput("placement.decode", placement.decode, f"one of {self.regions}")
        if cluster < -1:
            raise InvalidInput("placement.prefill", placement.prefill, f"one of {self.clusters}, or None")
        return cluster, region

    def _known_dead(self, region: int) -> bool:
        """Whether nothing decodes there, and the router knows."""
        return not self.decode[region].alive and not self.view.decode.healthy[region]

    def _open(self, cluster: int, region: int) -> bool:
        """Whether the path (-1: local) has an instance that takes prompts, and a link that is not down, as far as the router knows."""
        if cluster < 0:
            return self.local[region].alive
        pair = self.pairs[cluster][region]
        return self.prefill[cluster].alive and pair is not None and bool(pair.capacity or self.view_links.bytes_per_s[cluster, region])

    def _matches(self, job: Job) -> tuple[Held, Held]:
        """Cached prefix in tokens, per prefill cluster and per region."""
        blocks = job.arrival.blocks
        if not blocks or not (self.far_caches or self.near_caches):
            return 0, 0
        # Tokens that a restart added are no part of the blocks.
        tokens = min(job.tokens, job.arrival.tokens + 1)
        far = [c.match(blocks, tokens) for c in self.far_caches]
        near = [c.match(blocks, tokens) for c in self.near_caches]
        return held_column(far), held_column(near)

    def _copy(self, job: Job, tokens: int, far: Held) -> bool:
        """Starts to move up to `tokens` of a cached prefix to the side that will compute; False where nobody has more than that side."""
        pair: Pair | None
        if job.cluster >= 0:
            pair, holds = self.reverse[job.cluster][job.region], job.held
        else:
            sources = [i for i in range(len(self.clusters)) if self._open(i, job.region)]
            source = max(sources, key=lambda i: held_at(far, i), default=-1)
            pair, holds = (self.pairs[source][job.region], held_at(far, source)) if source >= 0 else (None, 0)
        tokens = min(tokens, holds - job.cached)
        if pair is None or tokens <= 0:
            return False
        size = self.topology.kv.bytes(job.cached + tokens, job.cached)
        job.pair, job.transfer = pair, pair.start(job, size, tokens)
        pair.release(job.transfer, size, True)
        disturbances.watch(self, pair, job.transfer)
        return True

    def _copied(self, transfer: Transfer) -> None:
        job: Job = transfer.owner
        if job.cluster < 0:
            job.sent_bytes += transfer.released
            job.held = job.cached + transfer.copied_tokens
        else:
            job.returned_bytes += transfer.released
        job.transfer = job.pair = None
        job.cached += transfer.copied_tokens
        self._submit(job)

    def _submit(self, job: Job) -> None:
        pool = self.prefill[job.cluster] if job.cluster >= 0 else self.local[job.region]
        if not pool.alive:  # died while a prefix was copied
            self.retry(job)
            return
        task = job.prefill = PrefillTask(job, job.cached, job.tokens, self._computed)
        if job.cluster >= 0:
            pair = self.pairs[job.cluster][job.region]
            assert pair is not None  # place
            job.pair, job.transfer, job.released = pair, pair.start(job, job.want_bytes), 0.0
            chunk = self.options.prefill_chunk
            if self.options.overlap and (job.tokens - 1) // chunk * chunk > job.cached:
                task.on_chunk = self._chunk_done
        pool.submit(task)

    # --- the stages ------------------------------------------------------------------------------------------------------------

    def _chunk_done(self, task: PrefillTask) -> None:
        """Releases what the chunk made, and with the first one the cached prefix that the region lacks."""
        job: Job = task.owner
        if task.start < task.length:
            self._release(job, self.topology.kv.bytes_per_token * (task.start - job.held), False)

    def _release(self, job: Job, total: float, last: bool) -> None:
        """Lets KV travel, up to `total` bytes of it in all."""
        assert job.pair is not None and job.transfer is not None  # _submit
        more = max(0.0, total - job.released)
        job.released += more
        job.pending_bytes -= more
        job.pair.to_come -= more
        job.pair.release(job.transfer, more, last)

    def _computed(self, task: PrefillTask) -> None:
        job: Job = task.owner
        now, cluster = self.kernel.now, job.cluster
        job.begun_s, job.computed_s, job.prefill = task.begun_s, now, None
        assert task.instance is not None  # it has run
        job.source = task.instance
        task.instance.cluster.note()
        if cluster >= 0:
            self.view.prefill.queue[cluster] -= 1
            if self.far_caches:
                self.far_caches[cluster].insert(job.arrival.blocks, job.arrival.tokens, job.cached)
            pair, transfer = job.pair, job.transfer
            self._release(job, job.want_bytes, True)
            if pair is not None and transfer is not None:
                disturbances.watch(self, pair, transfer)
        else:
            sent = tail_bytes(self.topology.kv, job.tokens, job.held, self.options.prefill_chunk, self.options.overlap)
            self.kernel.at(now + sent / self._local_rates[job.region], self._local_kv, (job, job.attempts))

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
        self._unpend(job)
        job.transfer = job.pair = None
        self._commit(job)

    def _unpend(self, job: Job) -> None:
        """The request's KV has arrived, or will not come this way."""
        pair = self.pairs[job.cluster][job.region]
        assert pair is not None  # place
        pair.pending -= 1
        pair.to_come -= job.pending_bytes
        job.pending_bytes = 0.0
        self._note_pending(pair)
        if not pair.pending:
            del self._lively[pair]

    def _note_pending(self, pair: Pair) -> None:
        row = self._lively[pair]
        self.view_links.pending[row] = pair.pending
        self.view_links.pending_bytes[row] = pair.to_come + pair.backlog if pair.pending else 0.0

    def _commit(self, job: Job) -> None:
        """All KV is in the region."""
        region = job.region
        job.kv_s, job.source = self.kernel.now, None
        if self._known_dead(region):
            self.retry(job)
            return
        if self.near_caches:
            known = job.cached if job.cluster < 0 else job.arrival.tokens
            self.near_caches[region].insert(job.arrival.blocks, job.arrival.tokens, known)
        job.decode = DecodeTask(job, job.tokens, job.output - 1, self.topology.kv.bytes(job.tokens + job.output))
        if job.output == 1:
            self._joined(job.decode)
            self._decoded(job.decode)
        else:
            self.decode[region].submit(job.decode)

    def _joined(self, task: DecodeTask) -> None:
        job: Job = task.owner
        if job.first_s != job.first_s:  # NaN: not restarted after its first token
            job.first_s = self.kernel.now
            job.path = job.placed_s, job.begun_s, job.computed_s, job.kv_s

    def _decoded(self, task: DecodeTask) -> None:
        job: Job = task.owner
        job.decode, job.done_s = None, self.kernel.now
        self.last_s = job.done_s
        self.view.decode.queue[job.region] -= 1
        self.completed += 1
        del self.jobs[job.id]
        self._finished(job)

    # --- when something fails --------------------------------------------------------------------------------------------------

    def retry(self, job: Job) -> None:
        """Takes the request from wherever it is and places it again; tokens that it has streamed become part of its prompt.

        As far as the profiles reach: what is beyond is generated again, and not streamed again.
        """
        job.fallbacks += 1
        self.fallbacks += 1
        if job.prefill is not None and job.prefill.instance is not None:
            instance = job.prefill.instance
            instance.cancel(job.prefill)
            instance.cluster.note()
        if job.transfer is not None:
            assert job.pair is not None  # they come together
            gone = job.transfer.released - job.pair.remaining(job.transfer)
            if job.cluster >= 0 and job.transfer.copied_tokens:
                job.returned_bytes += gone
            else:
                job.sent_bytes += gone
            job.pair.cancel(job.transfer)
        if job.cluster >= 0:
            if math.isnan(job.computed_s):
                self.view.prefill.queue[job.cluster] -= 1
            if math.isnan(job.kv_s):
                self._unpend(job)
        if job.decode is not None:
            streamed = min(disturbances.take_from_decode(self, job.decode), max(0, self._longest - job.tokens))
            job.tokens, job.output = job.tokens + streamed, job.output - streamed
        self.view.decode.queue[job.region] -= 1
        job.prefill = job.source = job.transfer = job.pair = job.decode = None
        job.computed_s = job.kv_s = math.nan
        self.place(job)
