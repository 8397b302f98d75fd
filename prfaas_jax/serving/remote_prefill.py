"""The decode side of one remote prefill: control stream, lanes, verification, and a clean end whatever happens."""

import asyncio
import dataclasses
import time
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any

import grpc
import numpy as np

from prfaas_jax.engine import api
from prfaas_jax.errors import InvalidInput, PeerMismatch, PrfaasError, TransferError
from prfaas_jax.kvcache.segments import SegmentKey
from prfaas_jax.serving import messages
from prfaas_jax.serving.control_plane import control_channel
from prfaas_jax.serving.proto import prefill_pb2, prefill_pb2_grpc
from prfaas_jax.transfer.counters import Counters
from prfaas_jax.transfer.puller import Puller
from prfaas_jax.transfer.security import Security
from prfaas_jax.transfer.wire import PROTOCOL_VERSION

# Release is a courtesy: the lease of the other side ends what this does not reach.
_RELEASE_S = 2.0
# Clocks of two machines may run a little differently; beyond this a peer's report is wrong.
_CLOCK_SLACK_S = 1e-3


class RemotePrefillFailed(TransferError):
    """A remote prefill did not deliver.

    Attributes:
        phase: "handshake" (not accepted yet), "prefill" (no byte yet), "transfer", or "completion" (every byte verified).
        code: the gRPC status that fits.
        tokens: prompt tokens that the other side had computed by then.
    """

    def __init__(self, phase: str, address: str, code: grpc.StatusCode, why: str, tokens: int = 0):
        super().__init__(f"remote prefill at {address} failed during {phase}: {code.name}: {why}")
        self.phase, self.code, self.tokens = phase, code, tokens


@dataclasses.dataclass
class Timeline:
    """When things happened on this side, in monotonic seconds; None: not yet."""

    started: float
    accepted: float | None = None
    first_block: float | None = None
    last_block: float | None = None
    verified: float | None = None
    progress: list[tuple[int, float]] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class RemoteResult:
    """A verified cache in the engine's reserved pages, and what goes on from it. Seconds are the prefill engine's own."""

    first: api.Token
    counters: Counters
    queue_s: float
    prefill_s: float
    timeline: Timeline


class PrefillPeers:
    """One warm control channel per prefill server, shared by all requests; lanes are opened with the same `security`."""

    def __init__(self, security: Security) -> None:
        self.security = security
        self._channels: dict[str, Any] = {}
        self._releases: set[asyncio.Task[None]] = set()

    def stub(self, address: str) -> prefill_pb2_grpc.PrefillStub:
        """The stub for an address; the channel connects on first use and reconnects by itself."""
        if address not in self._channels:
            self._channels[address] = control_channel(address, self.security)
        return prefill_pb2_grpc.PrefillStub(self._channels[address])

    def release(self, address: str, ticket: bytes, epoch: int) -> None:
        """Tells the other side, in the background and for a bounded time, that its staging is not needed any more."""
        task = asyncio.create_task(self._release(address, ticket, epoch))
        self._releases.add(task)
        task.add_done_callback(self._releases.discard)

    async def close(self) -> None:
        """Waits for releases under way and closes the channels."""
        if self._releases:
            await asyncio.wait(self._releases, timeout=_RELEASE_S)
        for channel in self._channels.values():
            await channel.close()
        self._channels.clear()

    async def _release(self, address: str, ticket: bytes, epoch: int) -> None:
        try:
            await self.stub(address).Release(prefill_pb2.ReleaseRequest(ticket=ticket, epoch=epoch), timeout=_RELEASE_S)
        except grpc.RpcError:
            return  # gone or unreachable: the lease ends it there


class RemotePrefill:
    """One attempt. `run` either returns with every byte verified and in place, or leaves nothing behind and raises."""

    def __init__(
        self,
        engine: api.DecodeEngine,
        job: api.Job,
        address: str,
        peers: PrefillPeers,
        executor: Executor,
        *,
        deadline: float,
        idle_s: float,
        max_staging_bytes: int,
    ):
        """`job` holds reserved pages in `engine`; `deadline` is in monotonic seconds; `executor` has two threads to wait in.

        `idle_s` without a control message, a byte or a scatter ends the attempt.
        """
        self._engine, self._job, self._address, self._peers, self._executor = engine, job, address, peers, executor
        self._deadline, self._idle_s, self._max_staging_bytes = deadline, idle_s, max_staging_bytes
        self._phase = "handshake"
        self._tokens = 0  # computed there, by its own word
        self._received = 0  # computed there, as blocks show
        self._first: api.Token | None = None
        self._done: prefill_pb2.Done | None = None
        self._puller: Puller | None = None
        self.timeline = Timeline(time.monotonic())

    async def run(self) -> RemoteResult:
        """Raises RemotePrefillFailed; on cancellation, too, the other side is told and every thread of the transfer is gone."""
        call = self._peers.stub(self._address).Prefill(self._request(), timeout=max(0.0, self._deadline - time.monotonic()))
        accepted: prefill_pb2.Accepted | None = None
        try:
            accepted = await self._accept(call)
            counters = await self._transfer(call, accepted)
            return self._result(counters)
        except grpc.RpcError as error:
            raise self._failed(error.code(), error.details()) from error
        except TimeoutError as error:
            raise self._failed(grpc.StatusCode.UNAVAILABLE, f"no sign of life for {self._idle_s} s") from error
        except RemotePrefillFailed:
            raise
        except PrfaasError as error:
            raise self._failed(messages.code_of(error), str(error)) from error
        finally:
            call.cancel()
            if accepted is not None:
                self._peers.release(self._address, accepted.ticket, accepted.epoch)

    def _request(self) -> prefill_pb2.PrefillRequest:
        return prefill_pb2.PrefillRequest(
            protocol_version=PROTOCOL_VERSION,
            model_fingerprint=self._engine.fingerprint,
            cache_fingerprint=self._engine.spec.fingerprint(),
            prompt=self._job.prompt,
            sampling=messages.sampling_to_proto(self._job.sampling),
            want_logits=self._job.sampling.return_logits,
        )

    async def _accept(self, call: Any) -> prefill_pb2.Accepted:
        async with asyncio.timeout(self._idle_s):
            event = await call.read()
        accepted = self._expect(event, "accepted")
        self.timeline.accepted = time.monotonic()
        self._phase = "prefill"
        expected = messages.manifest(self._engine.spec, len(self._job.prompt))
        if accepted.manifest != expected:
            raise PeerMismatch("manifest", str(expected).replace("\n", " "), str(accepted.manifest).replace("\n", " "))
        # Head slices come with sharded export; what a lane carries is in its messages either way, and the puller proves coverage.
        if not accepted.lanes or any(lane.epoch != accepted.epoch for lane in accepted.lanes):
            raise InvalidInput("lanes", [(lane.address, lane.epoch) for lane in accepted.lanes], f"lanes of epoch {accepted.epoch}")
        return accepted

    async def _transfer(self, call: Any, accepted: prefill_pb2.Accepted) -> Counters:
        """Runs control stream and lanes side by side; the first to fail ends both."""
        puller = self._puller = Puller(
            self._engine.spec,
            len(self._job.prompt),
            accepted.ticket,
            accepted.epoch,
            [lane.address for lane in accepted.lanes],
            self._on_block,
            self._idle_s,
            self._max_staging_bytes,
            security=self._peers.security,
        )
        puller.start()
        pulled = asyncio.get_running_loop().run_in_executor(self._executor, puller.finish, accepted.manifest.bytes)
        control = asyncio.create_task(self._follow(call, puller, pulled))
        try:
            both: set[asyncio.Future[Any]] = {pulled, control}
            await asyncio.wait(both, return_when=asyncio.FIRST_EXCEPTION)
            if control.done():
                control.result()
            return await pulled
        finally:
            control.cancel()
            # Not to be interrupted: until the lane threads have ended a block could still reach pages that are about to be freed.
            await asyncio.shield(self._end(puller, control, pulled))

    async def _end(self, puller: Puller, control: asyncio.Task[None], pulled: "asyncio.Future[Counters]") -> None:
        if not pulled.done():
            await asyncio.get_running_loop().run_in_executor(self._executor, puller.cancel)
        await asyncio.gather(control, pulled, return_exceptions=True)

    async def _follow(self, call: Any, puller: Puller, pulled: "asyncio.Future[Counters]") -> None:
        """Reads the control stream to its end; every message restarts the idle timer, which the lanes' bytes restart as well."""
        while self._done is None:
            read = asyncio.ensure_future(call.read())
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
                    self.timeline.progress.append((self._tokens, time.monotonic()))
            case "segment_ready":
                pass  # the lane's own stream hands it out; here it is a sign of life
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
        self._engine.ingest(self._job.ticket, key, block, done)

    def _result(self, counters: Counters) -> RemoteResult:
        self._phase = "completion"
        self.timeline.verified = now = time.monotonic()
        done, first = self._done, self._first
        assert done is not None
        if first is None:
            raise TransferError("the prefill is done but sent no first token")
        if done.bytes != counters.moved + counters.skipped:
            raise TransferError(f"the prefill exported {done.bytes} bytes, {counters.moved + counters.skipped} came")
        elapsed = now - self.timeline.started
        if min(done.queue_s, done.prefill_s) < 0 or done.queue_s + done.prefill_s > elapsed + _CLOCK_SLACK_S:
            raise TransferError(f"the prefill reports {done.queue_s:.3f} + {done.prefill_s:.3f} s, but only {elapsed:.3f} s have passed")
        return RemoteResult(first, counters, done.queue_s, done.prefill_s, self.timeline)

    def _failed(self, code: grpc.StatusCode, why: str) -> RemotePrefillFailed:
        return RemotePrefillFailed(self._phase, self._address, code, why, max(self._tokens, self._received))
