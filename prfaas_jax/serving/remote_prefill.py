"""The decode side of one remote prefill: control stream, lanes, verification, and a clean end whatever happens."""

import asyncio
import dataclasses
import itertools
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import Any

import grpc
import numpy as np
from absl import logging

from prfaas_jax.engine import api
from prfaas_jax.errors import InvalidInput, PeerMismatch, PrfaasError, TransferError
from prfaas_jax.kvcache.segments import SegmentKey
from prfaas_jax.serving import messages
from prfaas_jax.serving.clock import clock_offset
from prfaas_jax.serving.control_stream import ControlStream
from prfaas_jax.serving.peers import PrefillPeers
from prfaas_jax.serving.prefill_site import PrefillSite
from prfaas_jax.serving.proto import prefill_pb2
from prfaas_jax.transfer.counters import Counters
from prfaas_jax.transfer.link import LinkEstimate
from prfaas_jax.transfer.overlap import exposed_bound_s
from prfaas_jax.transfer.puller import Puller
from prfaas_jax.transfer.wire import PROTOCOL_VERSION

# Failures that another server may not have.
_ELSEWHERE = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.FAILED_PRECONDITION,  # another model, cache or version there
)
# Clocks of two machines may run a little differently; beyond this a peer's report is wrong.
_CLOCK_SLACK_S = 1e-3
# How often a transfer's end is predicted; and it is given up when it would take so many times what is left, and has for so long.
_PREDICT_S = 0.25
_LATE_BY = 1.25
_SURE_S = 1.0
_FRESH_S = 2.0


class RemotePrefillFailed(TransferError):
    """A remote prefill did not deliver.

    Attributes:
        address: of the prefill server.
        phase: "handshake" (not accepted yet), "prefill" (no byte yet), "transfer", or "completion" (every byte verified).
        code: the gRPC status that fits.
        tokens: prompt tokens that the other side had computed by then.
    """

    def __init__(self, phase: str, address: str, code: grpc.StatusCode, why: str, tokens: int = 0):
        super().__init__(f"remote prefill at {address} failed during {phase}: {code.name}: {why}")
        self.phase, self.address, self.code, self.tokens = phase, address, code, tokens


@dataclasses.dataclass
class Timeline:
    """When things happened on this side, in monotonic seconds; None: not yet."""

    started: float
    accepted: float | None = None
    first_block: float | None = None
    last_block: float | None = None
    verified: float | None = None


@dataclasses.dataclass(frozen=True)
class RemoteResult:
    """A verified cache in the engine's reserved pages, and what goes on from it.

    Attributes:
        address: where it was computed.
        first: the token that the prefill drew.
        counters: of the transfer.
        queue_s: the prompt waited there, by that engine's clock.
        prefill_s: and was computed.
        timeline: of the attempt that succeeded.
        site: what the prefill server did meanwhile, by its own account.
        link: as measured when the transfer ended.
        exposed_bound_s: the least that the transfer could add to queue and prefill on that link; None when its rate is not known.
    """

    address: str
    first: api.Token
    counters: Counters
    queue_s: float
    prefill_s: float
    timeline: Timeline
    site: PrefillSite
    link: LinkEstimate
    exposed_bound_s: float | None


class RemotePrefill:
    """A remote prefill, at one server or, when that fails, at the next. `run` either returns with every byte verified and in place, or
    leaves nothing behind and raises.

    Attributes:
        timeline: of the attempt under way, or the last one.
        resumes: attempts that went on where another had failed.
        recomputed: prompt tokens that failed attempts had computed.
        failures: of every attempt that failed, the last one too.
    """

    def __init__(
        self,
        engine: api.DecodeEngine,
        job: api.Job,
        addresses: Sequence[str],
        peers: PrefillPeers,
        executor: Executor,
        *,
        deadline: float,
        idle_s: float,
        max_staging_bytes: int,
        prefix: int = 0,
        compressed: bool = False,
        account: str = "",
        site: str = "",
    ):
        """`job` holds reserved pages in `engine`; `deadline` is in monotonic seconds; `executor` has two threads to wait in.

        `addresses` are tried in turn. Of the prompt, `prefix` tokens are in the engine's pages already. The cache travels as the job's
        codec says, and, with `compressed`, in compressed messages where that saves bytes. `idle_s` without a control message, a byte or a
        scatter ends an attempt. `site` is where this side is.
        """
        self._engine, self._job, self._addresses, self._peers, self._executor = engine, job, addresses, peers, executor
        self._deadline, self._idle_s, self._max_staging_bytes = deadline, idle_s, max_staging_bytes
        self._prefix, self._compressed = prefix, compressed
        self._wire_spec = job.codec.wire_spec(engine.spec)
        self._account, self._at = account, site
        self._puller: Puller | None = None
        self.resumes, self.recomputed = 0, 0
        self.failures: list[RemotePrefillFailed] = []
        self._begin(addresses[0])

    def _begin(self, address: str) -> None:
        self._address = address
        self._phase = "handshake"
        self._tokens = 0  # computed there, by its own word
        self._received = 0  # computed there, as blocks show
        self._first: api.Token | None = None
        self._done: prefill_pb2.Done | None = None
        self._site = PrefillSite()
        self._ready: list[tuple[float, int]] = []  # when segments were handed out there, and their bytes
        self.timeline = Timeline(time.monotonic())

    @property
    def coming(self) -> tuple[str, float]:
        """Where the cache comes from now, and how many bytes of it are still to come."""
        if self._puller is not None:
            return self._address, self._puller.left_bytes
        return self._address, self._wire_spec.bytes(len(self._job.prompt)) - self._wire_spec.bytes(self._prefix)

    async def run(self) -> RemoteResult:
        """Raises RemotePrefillFailed; on cancellation, too, the other side is told and every lane has let go of this transfer."""
        for address, following in itertools.pairwise(self._addresses):
            self._begin(address)
            try:
                return await self._attempt()
            except RemotePrefillFailed as failure:
                self.failures.append(failure)
                if failure.code not in _ELSEWHERE:
                    raise
                logging.warning("going on at %s: %s", following, failure)
                self.resumes += 1
                self.recomputed += failure.tokens
        self._begin(self._addresses[-1])
        try:
            return await self._attempt()
        except RemotePrefillFailed as failure:
            self.failures.append(failure)
            raise

    async def _attempt(self) -> RemoteResult:
        control = ControlStream(self._peers, self._address, self._request(), self._time_left)
        accepted: prefill_pb2.Accepted | None = None
        try:
            accepted = await self._accept(control)
            counters = await self._transfer(control, accepted)
            return self._result(counters, accepted)
        except grpc.RpcError as error:
            raise self._failed(error.code(), error.details()) from error
        except TimeoutError as error:
            raise self._failed(grpc.StatusCode.UNAVAILABLE, f"no sign of life for {self._idle_s} s") from error
        except RemotePrefillFailed:
            raise
        except PrfaasError as error:
            raise self._failed(messages.code_of(error), str(error)) from error
        finally:
            if accepted is not None:
                self._peers.release(self._address, accepted.ticket, accepted.epoch)
            await asyncio.shield(control.close())

    def _time_left(self) -> float:
        return max(0.0, self._deadline - time.monotonic())

    def _request(self) -> prefill_pb2.PrefillRequest:
        return prefill_pb2.PrefillRequest(
            protocol_version=PROTOCOL_VERSION,
            model_fingerprint=self._engine.fingerprint,
            cache_fingerprint=self._engine.spec.fingerprint(),
            prompt=self._job.prompt,
            sampling=messages.sampling_to_proto(self._job.sampling),
            want_logits=self._job.sampling.return_logits,
            decode_has_tokens=self._prefix,
            codecs=[str(self._job.codec)],
            request_id=self._account,
            site=self._at,
        )

    async def _accept(self, control: ControlStream) -> prefill_pb2.Accepted:
        async with asyncio.timeout(self._idle_s):
            event = await control.read()
        accepted = self._expect(event, "accepted")
        self.timeline.accepted = got = time.monotonic()
        self._phase = "prefill"
        self._site.accepted(clock_offset(control.sent, accepted.received_s, accepted.sent_s, got), accepted.submitted_s)
        control.accepted(accepted.ticket, accepted.epoch)
        if accepted.codec != str(self._job.codec):
            raise PeerMismatch("codec", str(self._job.codec), accepted.codec)
        expected = messages.manifest(self._engine.spec, len(self._job.prompt), self._prefix, self._job.codec)
        if accepted.manifest != expected:
            raise PeerMismatch("manifest", str(expected).replace("\n", " "), str(accepted.manifest).replace("\n", " "))
        # Head slices come with sharded export; what a lane carries is in its messages either way, and the puller proves coverage.
        if not accepted.lanes or any(lane.epoch != accepted.epoch for lane in accepted.lanes):
            raise InvalidInput("lanes", [(lane.address, lane.epoch) for lane in accepted.lanes], f"lanes of epoch {accepted.epoch}")
        return accepted

    async def _transfer(self, control: ControlStream, accepted: prefill_pb2.Accepted) -> Counters:
        """Runs control stream and lanes side by side; the first to fail ends both."""
        if self._puller is None:
            self._puller = Puller(
                self._engine.spec,
                len(self._job.prompt),
                self._on_block,
                codec=self._job.codec,
                prefix=self._prefix,
                compressed=self._compressed,
                idle_s=self._idle_s,
                max_staging_bytes=self._max_staging_bytes,
            )
        puller, groups = self._puller, await self._peers.groups(self._address, [lane.address for lane in accepted.lanes])
        puller.start(accepted.ticket, accepted.epoch, groups)
        pulled = asyncio.get_running_loop().run_in_executor(self._executor, puller.finish, accepted.manifest.wire_bytes)
        following = asyncio.create_task(self._follow(control, puller, pulled))
        hopeless = asyncio.create_task(self._predict(puller, pulled))
        try:
            tasks: set[asyncio.Future[Any]] = {pulled, following, hopeless}
            await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
            for task in (following, hopeless):
                if task.done():
                    task.result()
            return await pulled
        finally:
            following.cancel()
            hopeless.cancel()
            # Not to be interrupted: until lanes have let go a block could still reach pages that are about to be freed.
            await asyncio.shield(self._end(puller, following, pulled))

    async def _predict(self, puller: Puller, pulled: "asyncio.Future[Counters]") -> None:
        """Raises RemotePrefillFailed once it is clear that the link brings the rest too late: something else may still be in time."""
        late_since: float | None = None
        while not pulled.done():
            await asyncio.wait({pulled}, timeout=_PREDICT_S)
            link = self._peers.link(self._address)
            if link is None or self.timeline.first_block is None or not 0 <= link.age_s <= _FRESH_S or link.bytes_per_s <= 0:
                continue
            # The least that it takes: the rest of the prefill, and whoever shares the link, come on top.
            needed, left = puller.left_bytes / link.bytes_per_s, self._time_left()
            now = time.monotonic()
            late_since = (late_since or now) if needed > _LATE_BY * left else None
            if late_since is not None and now - late_since >= _SURE_S:
                rate = f"{link.bytes_per_s * 8 / 1e6:.3g} Mbit/s"
                why = f"predicted to take {needed:.1f} s more at {rate}, and the deadline is in {left:.1f} s"
                raise self._failed(grpc.StatusCode.RESOURCE_EXHAUSTED, why)

    async def _end(self, puller: Puller, following: asyncio.Task[None], pulled: "asyncio.Future[Counters]") -> None:
        if not pulled.done():
            await asyncio.get_running_loop().run_in_executor(self._executor, puller.cancel)
        await asyncio.gather(following, pulled, return_exceptions=True)

    async def _follow(self, control: ControlStream, puller: Puller, pulled: "asyncio.Future[Counters]") -> None:
        """Reads the control stream to its end; every message restarts the idle timer, which the lanes' bytes restart as well."""
        while self._done is None:
            read = asyncio.ensure_future(control.read())
            try:
                await asyncio.wait({read, pulled}, return_when=asyncio.FIRST_COMPLETED)
                # While lanes are open theirs is the idle timer; afterwards this one.
                async with asyncio.timeout(self._idle_s):
                    event = await read
            finally:
                read.cancel()
            puller.touch()
            self._on_control(event)

    def _on_control(self, event: Any) -> None:
        kind = None if event is grpc.aio.EOF else event.WhichOneof("event")
        match kind:
            case "progress":
                if event.progress.tokens > self._tokens:
                    self._tokens = event.progress.tokens
                    self._site.progressed(self._tokens, event.progress.at_s)
            case "segment_ready":
                key = messages.key_from_proto(event.segment_ready)
                key.check(self._wire_spec, len(self._job.prompt), self._prefix)
                self._ready.append((event.segment_ready.ready_s, key.nbytes(self._wire_spec)))
                self._site.handed_out(key.tokens[1], event.segment_ready.ready_s)
            case "first_token":
                self._first = messages.token_from_proto(event.first_token.token)
            case "done":
                self._tokens = len(self._job.prompt)
                self._done = event.done
            case _:
                self._expect(event, "done")

    def _expect(self, event: Any, kind: str) -> Any:
        """The event's content if it is of `kind`; otherwise raises what the event, or the end of the stream, means."""
        if event is grpc.aio.EOF:
            raise TransferError(f"the control stream ended before {kind!r}")
        got = event.WhichOneof("event")
        if got == "failed":
            code = getattr(grpc.StatusCode, event.failed.code, grpc.StatusCode.UNKNOWN)
            raise self._failed(code, event.failed.message)
        if got != kind:
            raise TransferError(f"the control stream said {got!r} where {kind!r} was due")
        return getattr(event, kind)

    def _on_block(self, key: SegmentKey, block: np.ndarray, done: Callable[[], None]) -> None:
        """Called from lane threads with verified blocks."""
        now = time.monotonic()
        if self.timeline.first_block is None:
            self.timeline.first_block = now
            self._phase = "transfer"
        self.timeline.last_block = now
        self._received = max(self._received, key.tokens[1])
        self._site.arrived(key.tokens[1], now)
        self._engine.ingest(self._job.ticket, key, block, done)

    def _result(self, counters: Counters, accepted: prefill_pb2.Accepted) -> RemoteResult:
        self._phase = "completion"
        self.timeline.verified = now = time.monotonic()
        done, first = self._done, self._first
        assert done is not None
        if first is None:
            raise TransferError("the prefill is done but sent no first token")
        if done.bytes != accepted.manifest.wire_bytes:
            raise TransferError(f"the prefill exported {done.bytes} bytes, {accepted.manifest.wire_bytes} were announced")
        elapsed = now - self.timeline.started
        if min(done.queue_s, done.prefill_s) < 0 or done.queue_s + done.prefill_s > elapsed + _CLOCK_SLACK_S:
            raise TransferError(f"the prefill reports {done.queue_s:.3f} + {done.prefill_s:.3f} s, but only {elapsed:.3f} s have passed")
        estimate = self._peers.link(self._address) or LinkEstimate()
        bound_s = exposed_bound_s(self._ready, done.queue_s + done.prefill_s, estimate.bytes_per_s) if estimate.bytes_per_s else None
        return RemoteResult(self._address, first, counters, done.queue_s, done.prefill_s, self.timeline, self._site, estimate, bound_s)

    def _failed(self, code: grpc.StatusCode, why: str) -> RemotePrefillFailed:
        return RemotePrefillFailed(self._phase, self._address, code, why, max(self._tokens, self._received))
