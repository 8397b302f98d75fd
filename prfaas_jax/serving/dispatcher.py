"""From a request to servers: the policy names clusters, the dispatcher finds servers in them, and keeps account of what goes there."""

import asyncio
import collections
import dataclasses
import itertools
import time
import uuid
import zlib
from collections.abc import Awaitable, Callable, Container, Sequence

from absl import logging

from prfaas_jax.scheduling.controllers import Controller, Convert
from prfaas_jax.scheduling.footprint import KvFootprint
from prfaas_jax.scheduling.view import ClusterView, NoDecodeServer, Placement, Policy, Request
from prfaas_jax.serving.breaker import Breaker, BreakerOptions
from prfaas_jax.serving.control_loop import ControlLoop
from prfaas_jax.serving.deployment import ClusterServers, Deployment, Scale
from prfaas_jax.serving.fleet import Fleet, FleetOptions, Server
from prfaas_jax.serving.live_view import LiveView
from prfaas_jax.serving.proto import generation_pb2
from prfaas_jax.serving.tenancy import Tenancy
from prfaas_jax.serving.usage import InvalidRun
from prfaas_jax.transfer.security import Security

# Servers that a request may be moved to; each costs it the time that the one before took to fail.
_MAX_ALTERNATIVES = 2
# Failures that say something about a prefill server, or the way to it; others are the request's.
_ITS_FAULT = frozenset({"UNAVAILABLE", "INTERNAL", "ABORTED", "UNKNOWN", "FAILED_PRECONDITION", "DATA_LOSS", "CANCELLED"})
_CONTROL_S = 5.0


@dataclasses.dataclass(frozen=True)
class Rollout:
    """How far the policy is trusted.

    Attributes:
        canary_share: of the requests that it would offload; the others stay in their region.
        shadow: another policy that is asked as well, and only counted and logged; `name` is what it is called.
    """

    canary_share: float = 1.0
    shadow: Policy | None = None
    name: str = ""

    @classmethod
    def of(cls, deployment: Deployment | None) -> "Rollout":
        """As a deployment has it."""
        if deployment is None:
            return cls()
        shadow = deployment.build_policy(deployment.shadow, deployment.shadow_parameter)[0] if deployment.shadow else None
        return cls(deployment.canary_share, shadow, deployment.shadow)

    def trusted(self, key: str) -> bool:
        """Whether the request of this key is one of the share."""
        return self.canary_share >= 1 or zlib.crc32(key.encode()) / 2**32 < self.canary_share


class Dispatch:
    """One attempt of one request: its servers, and what is booked for it while it runs.

    Attributes:
        decode: has its stream.
        attached: it only comes back to a stream that the server holds; nothing was decided.
    """

    def __init__(
        self,
        dispatcher: "Dispatcher",
        request: generation_pb2.GenerateRequest,
        decode: Server,
        placement: Placement | None,
        candidates: Sequence[tuple[str, Server]],
    ):
        """`candidates` are the prefill servers that may have it, the chosen one first, each at the address that `decode` reaches it at."""
        self.decode, self.attached = decode, placement is None
        self._dispatcher, self._placement, self._candidates = dispatcher, placement, candidates
        self._prefill = candidates[0][1] if candidates else None
        self._account = request.placement.account
        self._tokens = len(request.token_ids.ids)
        self._reason, self._computing = request.placement.reason, False
        self._begun = 0.0
        # It is the one that tries the decode server, or the way to its prefill server, whose breaker is half-open.
        self._tries, self._tries_way = False, False
        self._judged = False  # the ways that its KV came, or did not come

    def placed(self, attempt: int, held: generation_pb2.Placed | None = None) -> generation_pb2.GenerateEvent:
        """For the client, so that it can come back; `held` is what the decode server says of a request that it had already."""
        cluster = self._prefill.cluster if self._prefill is not None else ""
        where = (cluster, self._reason) if held is None else (held.prefill_cluster, held.reason)
        word = generation_pb2.Placed(decode_address=self.decode.address, prefill_cluster=where[0], reason=where[1], attempt=attempt)
        return generation_pb2.GenerateEvent(placed=word)

    def begin(self) -> None:
        """It is sent."""
        self._begun = time.monotonic()
        self.decode.here += 1
        if self.attached:
            return  # whether it was the server's to try was asked when it was placed
        self._computing = True
        self._tries = self.decode.breaker.sent(self._begun)
        self._dispatcher.book(self.decode, self._prefill, self._account, self._tokens)
        if self._prefill is not None:
            self._tries_way = self._way(self._prefill).sent(self._begun)
        self._turned(self._tries or self._tries_way)

    def first_token(self, token: generation_pb2.TokenOut) -> None:
        """Its prompt is computed, and the KV is where it is decoded; later tokens say nothing new."""
        if not self._unbook():
            return
        self._tries = False
        self._turned(self.decode.breaker.answered(self._begun))
        if token.HasField("prefilled"):
            self._prefilled(token.prefilled)

    def failed(self, address: str, code: str) -> None:
        """A prefill server did not deliver."""
        server = dict(self._candidates).get(address)
        if server is not None and code in _ITS_FAULT:
            self._tries_way &= server is not self._prefill
            self._turned(self._way(server).failed(time.monotonic(), self._begun))
        elif server is self._prefill:
            self._withdraw()

    def lost(self, why: str) -> None:
        """The decode server could not be reached."""
        self._tries = False
        self._dispatcher.fleet.suspect(self.decode, why, self._begun)
        self._turned(True)

    def sick(self) -> None:
        """The decode server answers, but cannot do what it should."""
        self._tries = False
        self._turned(self.decode.breaker.failed(time.monotonic(), self._begun))

    def end(self) -> None:
        """It is over, one way or another; once for each `begin`."""
        self._unbook()
        self.decode.here -= 1
        if self._tries:
            self.decode.breaker.withdrawn()
            self._turned(True)
        self._withdraw()
        self._dispatcher.live.touch(self.decode.cluster)

    def _prefilled(self, by: generation_pb2.Prefilled | generation_pb2.Usage) -> None:
        """Who computed the prompt, and who failed to: once."""
        if self._judged or self.attached or by.account != self._account:
            return  # of an earlier placement, to which the request has come back
        self._judged = True
        for failure in by.failures:
            self.failed(failure.address, failure.code)
        server = dict(self._candidates).get(by.prefill_address)
        if server is not None:
            self._tries_way &= server is not self._prefill
            self._turned(self._way(server).succeeded(self._begun))

    def _unbook(self) -> bool:
        """Whether its prompt was being computed until now."""
        computing, self._computing = self._computing, False
        if computing:
            self._dispatcher.unbook(self.decode, self._prefill, self._account)
        return computing

    def _way(self, server: Server) -> Breaker:
        return self._dispatcher.way(self.decode.cluster, server)

    def _withdraw(self) -> None:
        """It was to try the way, and says nothing of it."""
        if self._tries_way and self._prefill is not None:
            self._tries_way = False
            self._way(self._prefill).withdrawn()
            self._turned(True)

    def _turned(self, breaker: bool) -> None:
        if breaker:
            self._dispatcher.live.unsettled()

    def account(self, usage: generation_pb2.Usage) -> None:
        """Takes the usage in: the decode server did well; and refuses one that is not what was decided.

        A fallback is said, never silent, and so is another server that went on: else InvalidRun.
        """
        self._turned(self.decode.breaker.succeeded(self._begun))
        self._prefilled(usage)  # its first token is not sent again to whoever has it from another server
        usage.decode_address = self.decode.address
        server = dict(self._candidates).get(usage.prefill_address)
        if self.attached or (usage.account and usage.account != self._account):
            return  # of an earlier placement, to which the request has come back
        usage.decode_cluster = self.decode.cluster
        usage.prefill_cluster = server.cluster if server is not None else self.decode.cluster
        chosen = self._candidates[0][0] if self._candidates else ""
        decided = ("remote" if chosen else "local", chosen)
        done = (usage.placement, usage.prefill_address)
        resumed = usage.resumes and usage.placement == "remote" and server is not None
        if not usage.fallbacks and not resumed and done != decided:
            raise InvalidRun(f"INVALID: the router decided {decided}, the usage says {done} and no fallback")


class Dispatcher:
    """Decides for requests. On the router's event loop.

    Attributes:
        fleet: the servers.
        live: what policies see of them.
    """

    def __init__(
        self,
        policy: Policy,
        controller: Controller | None,
        clusters: Sequence[ClusterServers],
        deployment: Deployment | None,
        options: FleetOptions,
        security: Security,
        tenancy: Tenancy,
        rollout: Rollout,
        convert: Callable[[Convert], Awaitable[bool]],
        decided: Callable[[float, str], None],
    ):
        """`decided` is told how many seconds each decision took, and its reason.

        Raises InvalidInput for malformed or repeated addresses, or no decode server.
        """
        topology = deployment.topology if deployment is not None else None
        scale = deployment.scale if deployment is not None else Scale()
        self.fleet = Fleet(clusters, options, security, self._changed)
        links = deployment.links if deployment is not None else None
        self.live = LiveView(clusters, links, topology, scale, self.fleet)
        self._output_tokens = scale.output_tokens
        self._kv: KvFootprint | None = topology.kv if topology is not None else None
        control_s = deployment.sim.control_s if deployment is not None else _CONTROL_S
        self._control = ControlLoop(policy, controller, self.live, control_s / scale.time, convert)
        self._breakers: BreakerOptions = options
        self._tenancy, self._rollout, self._decided = tenancy, rollout, decided
        self._decisions: collections.Counter[str] = collections.Counter()
        prefix = uuid.uuid4().hex[:12]  # other routers have other ones
        self._accounts = (f"{prefix}-{i}" for i in itertools.count())
        self._news, self._turns = asyncio.Event(), 0

    async def start(self) -> None:
        """Hears of every server, then watches."""
        await self.fleet.start()
        self._control.start()

    async def stop(self) -> None:
        """Ends all of it."""
        await self._control.stop()
        await self.fleet.stop()

    def news(self) -> asyncio.Event:
        """Set as soon as some server comes to take work, or ceases to."""
        if self._news.is_set():
            self._news = asyncio.Event()
        return self._news

    def _changed(self, cluster: str) -> None:
        self.live.touch(cluster)
        if self.fleet.turns != self._turns:
            self._turns = self.fleet.turns
            self._news.set()
            self.live.unsettled()  # breakers go with their servers

    def report(self, status: generation_pb2.GenerationStatus) -> None:
        """Adds servers, ways to them, decisions, and what the controller did."""
        now = time.monotonic()
        status.backends.extend(self.fleet.report(now))
        for (region, address), breaker in self.live.breakers.items():
            status.ways.add(region=region, prefill_address=address, breaker=breaker.state(now))
        status.decisions.update(self._decisions)
        self._control.report(status)

    # --- deciding --------------------------------------------------------------------------------------------------------------

    def decide(self, request: generation_pb2.GenerateRequest, full: Container[str] = (), again: bool = False) -> Dispatch:
        """Places the request, and writes into it what its decode server has to know; `full` are decode servers that have no room.

        `again` says that it was placed before, which controllers have seen.
        Raises NoDecodeServer, and InvalidInput where the policy breaks a tenant's residency.
        """
        began = time.perf_counter()
        live, now = self.live, self.live.now
        asked = Request(len(request.token_ids.ids), self._output_tokens(max(1, request.max_new_tokens)))
        view = self._tenancy.view(request.tenant, live.at(now))
        placement = self._control.place(asked, live.with_room(view, full) if full else view, now)
        account = request.placement.account = next(self._accounts)
        if placement.prefill is not None and not self._rollout.trusted(request.request_id or account):
            placement = Placement(None, placement.decode, f"canary: stays; {placement.reason}")
        self._tenancy.check(request.tenant, placement)
        decode = live.decode_server(placement.decode, full)
        if decode is None:
            raise NoDecodeServer(f"no decode server of {placement.decode} takes requests now")
        candidates = self._candidates(placement, view, bool(self._tenancy.of(request.tenant).regions))
        if placement.prefill is not None and (not candidates or candidates[0][1].cluster != placement.prefill):
            # The policy cannot know everything, such as which clusters have a route to the region.
            instead = candidates[0][1].cluster if candidates and candidates[0][1].cluster != decode.cluster else None
            reason = f"{placement.reason}, but {f'on {instead}' if instead else 'local'}: no open way to {placement.prefill}"
            placement = placement._replace(prefill=instead, reason=reason)
        self._decisions[_kind(placement)] += 1
        message = request.placement
        message.prefill_address = candidates[0][0] if candidates else ""
        message.alternatives[:] = [address for address, _ in candidates[1:]]
        message.prefill_cluster = candidates[0][1].cluster if candidates else decode.cluster
        message.decode_cluster, message.reason = decode.cluster, placement.reason
        self._decided(time.perf_counter() - began, placement.reason)
        if not again:
            self._control.placed(asked, placement, now)
            self._ask_shadow(asked, view, now, placement, account)
        return Dispatch(self, request, decode, placement, candidates)

    def _ask_shadow(self, asked: Request, view: ClusterView, now: float, placement: Placement, account: str) -> None:
        """What the other policy would have done is counted and logged, and changes nothing: neither does its failing."""
        shadow, name = self._rollout.shadow, self._rollout.name
        if shadow is None:
            return
        try:
            other = shadow.place(asked, view, now)
        except Exception:
            logging.exception("shadow %s has failed", name)
            self._decisions["shadow failed"] += 1
            return
        self._decisions[f"shadow {_kind(other)}"] += 1
        logging.info("shadow %s: %s to %s, where %s", name, account, other.prefill or other.decode, placement.reason)

    def attach(self, request: generation_pb2.GenerateRequest) -> Dispatch | None:
        """To the decode server that a client says has its request, be it drained or silent; None where that is gone."""
        server = self.fleet.get("decode", request.held_by)
        if server is None or not server.there:
            return None
        return Dispatch(self, request, server, None, ())

    def _candidates(self, placement: Placement, view: ClusterView, resident: bool) -> list[tuple[str, Server]]:
        """Who may prefill it, the chosen one first, then who may go on when that fails; none: the decode server itself."""
        region = placement.decode
        chosen = placement.prefill or region
        clusters = [chosen] if placement.prefill is None or resident else [chosen, *self._others(chosen, region, view), region]
        found = [(cluster, s) for cluster in clusters for s in self.live.open_servers(cluster, region)]
        return [(self.fleet.clusters[cluster].seen_from(region, s.address), s) for cluster, s in found[: 1 + _MAX_ALTERNATIVES]]

    def _others(self, chosen: str, region: str, view: ClusterView) -> list[str]:
        """Other prefill clusters with a route to the region, least busy first."""
        names = [view.prefill.names[i] for i in view.prefill.queue.argsort(kind="stable")]
        return [name for name in names if name != chosen and self.live.route(name, region)]

    # --- accounts --------------------------------------------------------------------------------------------------------------

    def way(self, region: str, server: Server) -> Breaker:
        """The breaker between a region and a prefill server."""
        return self.live.breakers.setdefault((region, server.address), Breaker(self._breakers))

    def book(self, decode: Server, prefill: Server | None, account: str, tokens: int) -> None:
        """Prefill work that no report counts yet, and KV that is to come."""
        worker = prefill or decode
        worker.sent[account] = self.live.work_s(worker.cluster, tokens)
        if prefill is not None:
            prefill.here += 1
            if prefill.cluster != decode.cluster:
                decode.coming[account] = prefill.cluster, self._bytes(tokens)
        self.live.touch(worker.cluster)
        self.live.touch(decode.cluster)

    def unbook(self, decode: Server, prefill: Server | None, account: str) -> None:
        """The other way round."""
        worker = prefill or decode
        worker.sent.pop(account, None)
        if prefill is not None:
            prefill.here -= 1
            decode.coming.pop(account, None)
        self.live.touch(worker.cluster)
        self.live.touch(decode.cluster)

    def _bytes(self, tokens: int) -> float:
        return self._kv.bytes(tokens) if self._kv is not None else 0.0


def _kind(placement: Placement) -> str:
    return f"{'remote' if placement.prefill is not None else 'local'}: {placement.reason.partition(':')[0]}"
