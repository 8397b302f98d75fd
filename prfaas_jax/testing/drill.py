"""A fault drill: a deployment of real processes under a steady load is broken in every way there is, and is to lose nothing by it.

For each fault: the load runs; a request is sent that the fault is to meet, and when it has come far enough, the fault strikes; after a
while the system is made whole; once every server is used again the load ends, and what was promised is checked: tokens equal to those
without any fault, an end for every request, pages, slots, tickets and staged bytes back, threads and file descriptors as before.
"""

import collections
import contextlib
import dataclasses
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import grpc

from prfaas_jax.errors import PrfaasError
from prfaas_jax.kvcache.spec import cache_spec
from prfaas_jax.models.config import ModelConfig
from prfaas_jax.serving.deployment import Deployment
from prfaas_jax.testing.drill_faults import Fault, Injector
from prfaas_jax.testing.drill_load import Asked, Kind, Load, Prompt, Reference, judge, make_prompts
from prfaas_jax.testing.drill_report import FaultReport, outcomes, request_row, worst_extra
from prfaas_jax.testing.drill_watch import Held, Inventory, RouterWatch
from prfaas_jax.testing.live_cluster import LiveCluster

_POLL_S = 0.001
# Bounds of waits: for a request to come as far as its fault is due, for the router to see it, for all to be well, for all to be idle.
_MEET_S, _SEEN_S, _RECOVER_S, _IDLE_S = 30.0, 10.0, 40.0, 12.0
_PROBES = 2
# Requests go on for so long with a liar among the servers.
_LIAR_S = 2.0
# Of its KV, so much has come when a transfer is in its midst.
_MIDST = 0.2
# Tokens that a request has when its transfer is long over.
_AFTER_TOKENS = 3


class DrillFailed(PrfaasError):
    """The drill itself could not go on: no request came as far as a fault was due, or the system did not come up without any."""


@dataclasses.dataclass(frozen=True)
class DrillOptions:
    """The load, and what may be left.

    Attributes:
        prompts: different ones, alternately longer and shorter than what is offloaded.
        new_tokens: of each answer.
        per_s: requests per second of the steady load.
        timeout_s: deadline of a request.
        burst: requests at once that are more than the router takes.
        spare_fds, spare_threads: by how many a process that lives on may differ from when it was first idle.
        seed: of prompts and arrivals.
    """

    prompts: int = 12
    new_tokens: int = 32
    per_s: float = 1.5
    timeout_s: float = 20.0
    burst: int = 40
    spare_fds: int = 16
    spare_threads: int = 48
    seed: int = 0


class Drill:
    """Runs faults against a deployment, one after the other.

    Attributes:
        references: by prompt, the answers without a fault.
        requests: rows of every request that was sent under a fault.
    """

    def __init__(self, deployment: Deployment, model: ModelConfig, workdir: Path, options: DrillOptions):
        """Starts nothing yet. `model` is what the deployment's engines compute; configs and logs of processes go into `workdir`."""
        self._deployment, self._workdir, self._options = deployment, workdir, options
        engine = deployment.prefill[0].prefill_engine
        assert engine is not None  # real engines
        self._kv_bytes = cache_spec(model).bytes
        threshold, longest = int(deployment.parameter), engine.max_length - options.new_tokens
        short, long = (64, threshold - 32), (threshold + 64, longest)
        self._prompts = make_prompts(options.prompts, model.vocab_size, short, long, options.new_tokens, options.seed)
        self._region = deployment.regions[0].name
        self.references: list[Reference] = []
        self.requests: list[dict[str, object]] = []

    def run(self, faults: Sequence[Fault], show: Callable[[str], None] = lambda text: None) -> Iterator[FaultReport]:
        """Starts the deployment, then yields a report after each fault; `show` is told what is going on.

        Raises DrillFailed, and LaunchFailed when a process does not come up, at first or again.
        """
        options = self._options
        live = LiveCluster(self._deployment, self._workdir)
        show("starting")
        with (
            live,
            RouterWatch(live.router_address, self._deployment.security) as watch,
            Load(live.router_address, self._prompts, options.timeout_s, options.seed, self._deployment.security) as load,
            contextlib.closing(Injector(live, self._workdir)) as injector,
        ):
            self._live, self._watch, self._load, self._injector = live, watch, load, injector
            self._inventory = Inventory(live)
            show("measuring without a fault")
            self._recover(time.monotonic())
            self.references = self._measure()
            self._settle([])
            for fault in faults:
                show(fault.name)
                yield self._meet(fault)

    # --- without a fault

    def _measure(self) -> list[Reference]:
        """Each prompt alone, then all of them under load; the tokens must be the same, and the times are those under load."""
        load, together = self._load, collections.defaultdict(list)
        for prompt in self._prompts:
            load.ask(prompt)
            load.drain()
        load.steady(self._options.per_s)
        for prompt in self._prompts * 2:
            together[prompt.number].append(load.ask(prompt))
            time.sleep(1 / self._options.per_s)
        load.steady(0)
        load.drain()
        tokens: dict[int, set[tuple[int, ...]]] = collections.defaultdict(set)
        for asked in load.asked:
            if asked.answer.usage is None:
                raise DrillFailed(f"a request failed without any fault: {asked.outcome()}, {asked.error.details() if asked.error else ''}")
            tokens[asked.prompt.number].add(tuple(asked.answer.tokens))
        if several := [number for number, answers in tokens.items() if len(answers) > 1]:
            raise DrillFailed(f"prompts {several} have several answers without any fault")
        return [
            Reference(
                tokens[prompt.number].pop(),
                statistics.median(asked.ttft_s or 0.0 for asked in together[prompt.number]),
                statistics.median(asked.total_s or 0.0 for asked in together[prompt.number]),
            )
            for prompt in self._prompts
        ]

    # --- one fault

    def _meet(self, fault: Fault) -> FaultReport:
        load, injector = self._load, self._injector
        first = len(load.asked)
        load.steady(self._options.per_s)
        self._wait(lambda: bool(load.running()), _MEET_S, "a running request")
        broken: list[str] = []
        if fault.breaks == "client":
            struck, detection, exit_s = self._client_fault(fault), None, None
            healed = time.monotonic()
        else:
            if fault.phase is not None:
                with self._noted(broken):  # strikes whatever runs, then
                    self._arm(fault)
            struck = time.monotonic()
            hold_s = injector.inject(fault)
            if fault.kind == "overload":
                for i in range(self._options.burst):
                    load.ask(self._prompts[i % len(self._prompts)], "burst")
            detection = self._seen(fault, struck, hold_s, broken)
            exit_s = injector.exit_s(fault.target) if fault.kind == "kill" else None
            injector.heal(fault)
            healed = time.monotonic()
            if fault.kind == "drain" and injector.exit_code:
                broken.append(f"{fault.target} ended with code {injector.exit_code}, not 0")
        recovery = self._recover(healed, broken)
        load.steady(0)
        load.drain()
        leaked, more = self._settle(broken)
        asked = load.asked[first:]
        affected = [a for a in asked if a.sent_s <= healed and a.ended_s is not None and a.ended_s >= struck]
        wrong, hung = self._judge(asked, fault, broken)
        self.requests += [request_row(a, fault.name, self.references[a.prompt.number]) for a in asked]
        ttft, total = worst_extra(affected, self.references, struck)
        return FaultReport(
            fault=fault,
            detection_s=detection,
            exit_s=exit_s,
            recovery_s=recovery,
            affected=len(affected),
            outcomes=outcomes(affected),
            extra_ttft_s=ttft,
            extra_s=total,
            wrong_tokens=wrong,
            leaked_pages=leaked,
            hung=hung,
            more_fds=more.fds,
            more_threads=more.threads,
            machine_load=os.getloadavg()[0],
            broken=tuple(broken),
        )

    def _arm(self, fault: Fault, kind: Kind = "probe") -> Asked:
        """Sends requests until one has come as far as the fault is due; raises DrillFailed when none does."""
        near = fault.target.startswith(f"{self._region}/prefill/")
        prompts = [p for p in self._prompts if (p.number % 2 == 1) == near]
        deadline, turn = time.monotonic() + _MEET_S, 0
        while time.monotonic() < deadline:
            base = {name: relay.passed("down") for name, relay in self._live.lanes.items()}
            probe = self._load.ask(prompts[turn % len(prompts)], kind)
            turn += 1
            if self._meets(probe, fault) and self._comes(probe, fault, base):
                return probe
            while sum(asked.kind == kind for asked in self._load.running()) >= _PROBES:
                time.sleep(_POLL_S)
        raise DrillFailed(f"no request in {_MEET_S:.0f} s was where {fault.name!r} is due")

    def _meets(self, probe: Asked, fault: Fault) -> bool:
        """Waits until it is placed; whether on what is to be broken."""
        self._wait(lambda: bool(probe.answer.placed) or probe.ended_s is not None, _MEET_S, "a placed request")
        if not probe.answer.placed or not probe.answer.placed[-1].prefill_cluster:
            return False
        placed, target = probe.answer.placed[-1], fault.target
        if target in ("", "router"):
            return True
        if "/decode/" in target:
            return placed.decode_address == self._live.addresses[target]
        return placed.prefill_cluster == target.partition("->")[0].partition("/")[0]

    def _comes(self, probe: Asked, fault: Fault, base: dict[str, int]) -> bool:
        """Waits until it has come as far as the fault is due; False: it is beyond that."""
        answer, cluster = probe.answer, probe.answer.placed[-1].prefill_cluster
        nbytes = _MIDST * self._kv_bytes(len(probe.prompt.ids))
        lanes = [name for name in base if name.startswith(f"{cluster}->")]

        def midst() -> bool:
            if lanes:
                return sum(self._live.lanes[name].passed("down") - base[name] for name in lanes) >= nbytes
            # Beside the decode server no relay sees the bytes.
            return bool(self._live.status(f"{cluster}/prefill/0").streams)

        while probe.ended_s is None:
            if fault.phase == "after":
                if len(answer.tokens) >= _AFTER_TOKENS:
                    return True
            elif answer.first_s is not None:
                return False
            elif fault.phase == "before" or midst():
                return True
            time.sleep(_POLL_S)
        return False

    def _seen(self, fault: Fault, struck: float, hold_s: float, broken: list[str]) -> float | None:
        """Waits out the fault, and longer where that takes until the router has seen it; seconds until then, None where it need not."""
        names = [fault.target] if fault.breaks == "process" else []
        if fault == Fault("freeze", "router", fault.phase):
            names = []  # it is silent, and says nothing wrong
        if fault.kind == "all remotes gone":
            names = self._injector.remotes
        addresses = ["" if name == "router" else self._live.addresses[name] for name in names]
        time.sleep(max(0.0, struck + hold_s - time.monotonic()))

        def detected() -> list[float]:
            found = [self._watch.detected_s(address, struck) for address in addresses]
            return [seconds for seconds in found if seconds is not None]

        with self._noted(broken):
            self._wait(lambda: len(detected()) == len(addresses), _SEEN_S, "the router sees it")
            if fault.kind.startswith("liar"):
                self._wait(self._liar_known, _SEEN_S, "the router knows the liar for one")
                time.sleep(_LIAR_S)
        return max(detected(), default=None)

    def _liar_known(self) -> bool:
        backend = self._watch.backends().get(self._injector.liar_address)
        return backend is not None and not backend.healthy and "another model" in backend.why

    def _client_fault(self, fault: Fault) -> float:
        """A client that gives up, or some whose deadline passes; returns once they are over, with when it began."""
        if fault.kind == "cancel":
            met = [self._arm(fault, "cancelled")]
            struck = time.monotonic()
            self._load.cancel(met[0])
        else:
            struck = time.monotonic()
            met = [self._load.ask(prompt, "deadline", self._deadline_s(prompt, fault)) for prompt in self._prompts[:4]]
        self._wait(lambda: all(asked.ended_s is not None for asked in met), _MEET_S, "the end of requests that were given up")
        return struck

    def _deadline_s(self, prompt: Prompt, fault: Fault) -> float:
        """Seconds after which a request is in the phase that the fault is due in, when all goes well."""
        reference = self.references[prompt.number]
        if fault.phase == "before":
            return 0.1 * reference.ttft_s
        return 0.7 * reference.ttft_s if fault.phase == "during" else 0.5 * (reference.ttft_s + reference.total_s)

    # --- whole again

    def _recover(self, since: float, broken: list[str] | None = None) -> float:
        """Waits until every server is healthy and every prefill cluster has done a request well that was sent since; how long it took."""
        longs, turn = self._prompts[::2], 0
        clusters = {cluster.name for cluster in self._deployment.prefill}
        deadline = time.monotonic() + _RECOVER_S
        while time.monotonic() < deadline:
            backends = self._watch.backends()
            sick = [b.address for b in backends.values() if not b.healthy or b.breaker not in ("", "closed")]
            missing = clusters - self._used(since)
            if not missing and len(backends) == len(self._live.addresses) - 1 and not sick:
                return time.monotonic() - since
            probing = sum(asked.kind == "probe" for asked in self._load.running())
            if missing and not sick and backends and probing < len(clusters):
                self._load.ask(longs[turn % len(longs)], "probe")
                turn += 1
            time.sleep(0.01)
        why = f"not whole after {_RECOVER_S:.0f} s: {missing or 'no prefill cluster'} not used, {sick or 'no server'} unhealthy"
        if broken is None:
            raise DrillFailed(why)
        broken.append(why)
        return time.monotonic() - since

    def _used(self, since: float) -> set[str]:
        """Prefill clusters that have done a request well that was sent since."""
        usages = [asked.answer.usage for asked in self._load.asked[-200:] if asked.sent_s >= since]
        return {usage.prefill_cluster for usage in usages if usage is not None and not usage.failures}

    def _settle(self, broken: list[str]) -> tuple[int, Held]:
        """Waits until nothing is left of any request; pages that are, and the most that a process holds beyond what it held at first."""
        left = self._inventory.left(_IDLE_S)
        broken += [f"{name} still has {', '.join(f'{n} {what}' for what, n in found.items())}" for name, found in left.items()]
        growth = self._inventory.growth()
        for name, more in growth.items():
            if more.fds > self._options.spare_fds or more.threads > self._options.spare_threads:
                broken.append(f"{name} holds {more.fds} descriptors and {more.threads} threads more than when it was first idle")
        most = Held(max(more.fds for more in growth.values()), max(more.threads for more in growth.values()))
        return sum(found.get("pages", 0) for found in left.values()), most

    def _judge(self, asked: Sequence[Asked], fault: Fault, broken: list[str]) -> tuple[int, int]:
        """Wrong tokens and hung requests among all that were sent; what is wrong is said in `broken`."""
        wrong = 0
        for one in asked:
            found = judge(one, self.references[one.prompt.number], self._kv_bytes)
            wrong += any(text.startswith("wrong tokens") for text in found)
            if one.error is not None and not self._may_fail(one, fault):
                found.append(f"failed: {one.error.code().name}: {one.error.details()}")
            broken += [f"{one.kind} request, prompt {one.prompt.number}: {text}" for text in found]
        if fault.kind == "overload" and not any(one.retry_after_s for one in asked):
            broken.append("no request of the burst was refused with a time to come back")
        return wrong, sum(one.hung for one in asked)

    def _may_fail(self, asked: Asked, fault: Fault) -> bool:
        """Whether an error is right."""
        assert asked.error is not None  # its caller
        code = asked.error.code()
        if fault.kind == "overload":
            return code is grpc.StatusCode.RESOURCE_EXHAUSTED and asked.retry_after_s is not None
        return asked.kind == "deadline" and code is grpc.StatusCode.DEADLINE_EXCEEDED

    @contextlib.contextmanager
    def _noted(self, broken: list[str]) -> Iterator[None]:
        """What does not happen in time is an invariant that broke, and no reason to end the drill."""
        try:
            yield
        except DrillFailed as error:
            broken.append(str(error))

    def _wait(self, done: Callable[[], bool], seconds: float, what: str) -> None:
        deadline = time.monotonic() + seconds
        while not done():
            if time.monotonic() > deadline:
                raise DrillFailed(f"not within {seconds:.0f} s: {what}")
            time.sleep(_POLL_S)
