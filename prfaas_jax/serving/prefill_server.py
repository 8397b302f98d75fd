"""The prefill server: prompts come in on the control plane, their cache leaves on the lanes."""

import asyncio
import contextlib
import dataclasses
import time
from typing import Any

import grpc
from absl import logging

from prfaas_jax.engine import api
from prfaas_jax.errors import Exhausted, InvalidInput, PrfaasError, TransferError
from prfaas_jax.kvcache.segments import SegmentKey
from prfaas_jax.kvcache.spec import CacheSpec
from prfaas_jax.serving import messages
from prfaas_jax.serving.controlled_server import ControlledServer
from prfaas_jax.serving.events import EventQueue
from prfaas_jax.serving.joining import JoinOptions, Membership
from prfaas_jax.serving.metrics import PrefillMetrics
from prfaas_jax.serving.proto import prefill_pb2, prefill_pb2_grpc
from prfaas_jax.transfer.child import MAX_PROCESSES
from prfaas_jax.transfer.endpoint import parse_advertised
from prfaas_jax.transfer.lane import LaneServer
from prfaas_jax.transfer.outbox import Outbox, StaleEpoch, Ticket, UnknownTicket
from prfaas_jax.transfer.security import Security, check_listen
from prfaas_jax.transfer.senders import SharedOutbox
from prfaas_jax.transfer.wire import PROTOCOL_VERSION

SERVICE = "prfaas.v1.Prefill"
# Notices of one control stream that wait for its client to read: a hundred thousand segments.
_MAX_UNREAD_BYTES = 8 << 20
# A sender process hears of a ticket within a millisecond.
_KNOWN_S = 2.0


@dataclasses.dataclass(frozen=True)
class PrefillServerOptions(JoinOptions, Security):
    """Where a prefill server listens, who may connect, and what it bounds.

    Attributes:
        address: host:port of the control plane; port 0 takes any free one.
        lane_address: host:port of the lane that KV is fetched from.
        sender_processes: processes of its own that KV leaves through, for links that one interpreter cannot fill; 0: it leaves through this
            one. Each listens on a port: `lane_address`'s and those after it, or free ones where that is 0.
        advertise_lane: what peers are told to fetch from instead of `lane_address`, e.g. a relay or a public name; with several sender
            processes, its port and those after it. With site=host:port, joined by commas, peers of that site are told another one.
        staging_bytes: KV computed and not yet fetched, all requests together; beyond it prompts are refused.
        max_requests: control streams served at once; the engine's own queue is bounded by its own options.
        max_streams: lane streams served at once.
        lease_s: a ticket that nobody fetches from for so long is dropped.
        heartbeat_s: silence on a control stream is broken this often.
        detach_s: a prompt whose control stream broke is computed for so long without one, so that its caller can come back to it.
        message_kib: largest message of KV.
        pace_gbps: KV leaves no faster than this, all readers together; None leaves the pace to TCP.
        metrics_address: host:port where Prometheus finds /metrics, over HTTP or, with TLS, HTTPS; port 0 takes any free one, empty is none.
    """

    address: str = "127.0.0.1:0"
    lane_address: str = "127.0.0.1:0"
    sender_processes: int = 0
    advertise_lane: str | None = None
    staging_bytes: int = 1 << 30
    max_requests: int = 64
    max_streams: int = 64
    lease_s: float = 30.0
    heartbeat_s: float = 0.5
    detach_s: float = 1.0
    message_kib: int = 2048
    pace_gbps: float | None = None
    metrics_address: str = ""

    def __post_init__(self) -> None:
        JoinOptions.__post_init__(self)
        Security.__post_init__(self)
        check_listen("address", self.address, self)
        self.check_reachable(self.address)
        check_listen("lane_address", self.lane_address, self)
        if self.metrics_address:
            check_listen("metrics_address", self.metrics_address, self)
        if self.advertise_lane is not None:
            parse_advertised("advertise_lane", self.advertise_lane)
        for field in ("staging_bytes", "max_requests", "max_streams", "lease_s", "heartbeat_s", "detach_s", "message_kib"):
            if not getattr(self, field) > 0:
                raise InvalidInput(field, getattr(self, field), "a positive number")
        if not 0 <= self.sender_processes <= MAX_PROCESSES:
            raise InvalidInput("sender_processes", self.sender_processes, f"0..{MAX_PROCESSES}")


@dataclasses.dataclass(eq=False)
class _Stream:
    """One prompt being served: its ticket, what its engine says, and what has been staged (engine thread only).

    Attributes:
        attached: serves its control stream; None while there is none.
        last_words: what ends a control stream that went well, kept for a caller who may have missed it.
    """

    ticket: Ticket
    job: api.Job
    events: EventQueue[api.Event | tuple[SegmentKey, float]]
    submitted: float
    segments: int = 0
    bytes: int = 0
    attached: "asyncio.Task[Any] | None" = None
    last_words: list[prefill_pb2.PrefillEvent] = dataclasses.field(default_factory=list)


def _outbox(spec: CacheSpec, options: PrefillServerOptions) -> tuple[Outbox, LaneServer | SharedOutbox]:
    """What holds the segments, and what sends them."""
    pace = None if options.pace_gbps is None else options.pace_gbps * 1e9 / 8
    lane: dict[str, Any] = {"message_bytes": options.message_kib << 10, "bytes_per_s": pace, "security": options}
    lane["max_streams"] = options.max_streams
    held = spec, options.staging_bytes, options.lease_s
    if options.sender_processes:
        shared = SharedOutbox(*held, processes=options.sender_processes, address=options.lane_address, **lane)
        return shared, shared
    outbox = Outbox(*held)
    return outbox, LaneServer(outbox, options.lane_address, **lane)


class PrefillServer(ControlledServer, prefill_pb2_grpc.PrefillServicer):
    """Serves one engine. `start` and `stop` run on the event loop that serves; the engine stays the caller's to close."""

    def __init__(self, engine: api.PrefillEngine, options: PrefillServerOptions):
        super().__init__(options.address, SERVICE, PrefillMetrics(self._status, options.metrics_address, options), options)
        self._engine = engine
        self._options = options
        self._outbox, self._lanes = _outbox(engine.spec, options)
        self._membership = Membership(options, "prefill", options)
        self._streams: dict[str, _Stream] = {}
        self._sweeper: asyncio.Task[None] | None = None

    @property
    def fingerprint(self) -> str:
        """The model's, which both sides must share."""
        return self._engine.fingerprint

    @property
    def lane_addresses(self) -> tuple[str, ...]:
        """host:port of the lanes of each sender process, as bound; peers are told `advertise_lane` where that was given."""
        return self._lanes.addresses

    @property
    def addresses(self) -> dict[str, Any]:
        """See ControlledServer.addresses; the lanes, too."""
        return {**super().addresses, "lane_addresses": self.lane_addresses}

    async def start(self) -> None:
        """Binds its ports and serves; raises InvalidInput naming an address that cannot be bound."""
        await asyncio.to_thread(self._lanes.start)
        try:
            await super().start()
        except BaseException:
            await asyncio.to_thread(self._lanes.stop, 0)
            raise
        self._membership.start(self.address)
        self._sweeper = asyncio.create_task(self._sweep())

    async def stop(self, grace_s: float) -> None:
        """NOT_SERVING at once; running prompts and fetches get `grace_s` seconds, then everything is cut."""
        await asyncio.gather(super().stop(grace_s), self._membership.stop())
        if self._sweeper is not None:
            self._sweeper.cancel()
            await asyncio.wait({self._sweeper})
        await asyncio.to_thread(self._lanes.stop, 0)

    def _add(self, server: Any) -> None:
        prefill_pb2_grpc.add_PrefillServicer_to_server(self, server)

    # --- the service ---------------------------------------------------------------------------------------------------------

    async def Prefill(self, request: prefill_pb2.PrefillRequest, context: Any) -> None:
        """See prefill.proto."""
        received = time.monotonic()
        if self.draining or (self._standby and not request.resume_ticket):
            why = "is shutting down" if self.draining else "stands by: its instance has another role"
            await context.abort(grpc.StatusCode.UNAVAILABLE, f"this prefill server {why}")
        try:
            stream = self._find(request) if request.resume_ticket else self._open(request)
        except UnknownTicket as error:
            await context.abort(grpc.StatusCode.NOT_FOUND, str(error))
        except PrfaasError as error:
            await context.abort(messages.code_of(error), str(error))
        if stream.attached is not None:
            stream.attached.cancel()  # its caller has given it up, and must not miss what it would still take from the queue
        stream.attached = task = asyncio.current_task()
        try:
            try:
                async with asyncio.timeout(_KNOWN_S):
                    # Shielded: whoever comes back to the ticket waits for the same.
                    lanes = await asyncio.shield(asyncio.wrap_future(self._lanes.shares(stream.ticket)))
            except TransferError as error:
                await context.abort(messages.code_of(error), str(error))
            except TimeoutError:
                await context.abort(grpc.StatusCode.UNAVAILABLE, f"a sender process has said nothing for {_KNOWN_S} s")
            await context.write(prefill_pb2.PrefillEvent(accepted=self._accepted(stream, lanes, received, request.site)))
            if not stream.last_words:
                await self._relay(stream, context)
            for words in stream.last_words:
                await context.write(words)
        finally:
            if stream.attached is task:
                stream.attached = None
                if not stream.last_words:
                    self._leave(stream)

    def _leave(self, stream: _Stream) -> None:
        """The control stream of a prompt that is still computed has ended: cut off, if its caller is not back soon, or it has failed."""

        def abandon() -> None:
            if stream.attached is None and not stream.last_words:
                self._forget(stream)

        asyncio.get_running_loop().call_later(0.0 if self.draining else self._options.detach_s, abandon)

    def _forget(self, stream: _Stream) -> None:
        """Nothing of a request that will not be fetched stays behind."""
        if self._streams.pop(stream.job.ticket, None) is not None:
            self._engine.cancel(stream.job.ticket)
            self._outbox.release(stream.ticket.id, stream.ticket.epoch)
            self._bulletin.changed()

    async def Release(self, request: prefill_pb2.ReleaseRequest, context: Any) -> prefill_pb2.ReleaseReply:
        """See prefill.proto."""
        try:
            self._outbox.release(request.ticket, request.epoch)
        except StaleEpoch as error:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
        if (stream := self._streams.get(request.ticket.hex())) is not None:
            self._forget(stream)
        return prefill_pb2.ReleaseReply()

    def _status(self) -> prefill_pb2.PrefillStatus:
        status = self._engine.status()
        return prefill_pb2.PrefillStatus(
            engine=messages.status_to_proto(status),
            model_fingerprint=self._engine.fingerprint,
            cache_fingerprint=self._engine.spec.fingerprint(),
            protocol_version=PROTOCOL_VERSION,
            tickets=len(self._outbox.tickets),
            staged_bytes=self._outbox.bytes_held,
            streams=self._attached,
            draining=self.draining,
            codecs=self._engine.codecs,
            boot=self._boot,
            standby=self._standby or not status.instances,
        )

    @property
    def busy(self) -> int:
        """Prompts that are not done. A ticket outlives its control stream until its KV has been fetched."""
        return max(self._attached, len(self._outbox.tickets))

    @property
    def _attached(self) -> int:
        return sum(stream.attached is not None for stream in self._streams.values())

    # --- one prompt ----------------------------------------------------------------------------------------------------------

    def _open(self, request: prefill_pb2.PrefillRequest) -> _Stream:
        """Handshake, then a ticket, then the engine's queue; raises what `code_of` maps."""
        messages.check_peer(
            [
                ("protocol_version", PROTOCOL_VERSION, request.protocol_version),
                ("model_fingerprint", self._engine.fingerprint, request.model_fingerprint),
                ("cache_fingerprint", self._engine.spec.fingerprint(), request.cache_fingerprint),
            ]
        )
        # The decode side stops the generation; here one token is drawn.
        sampling = messages.sampling_from_proto(request.sampling, 1, request.want_logits)
        if not request.prompt:
            raise InvalidInput("prompt", (), "at least one token id")
        if self._attached >= self._options.max_requests:
            raise Exhausted(f"{self._attached} prompts are being served (max_requests={self._options.max_requests})")
        codec, prefix = messages.agree_codec(request.codecs, self._engine), request.decode_has_tokens
        if prefix > len(request.prompt):
            raise InvalidInput("decode_has_tokens", prefix, f"at most the prompt's {len(request.prompt)} tokens")
        ticket = self._outbox.open(len(request.prompt), spec=codec.wire_spec(self._engine.spec), prefix=prefix)
        job = api.Job(ticket.hex, tuple(request.prompt), sampling, codec, prefix)
        stream = _Stream(ticket, job, EventQueue(_MAX_UNREAD_BYTES), time.monotonic())
        try:
            self._engine.submit(job, lambda event: self._on_event(stream, event))
        except BaseException:
            self._outbox.release(ticket.id, ticket.epoch)
            raise
        self._streams[job.ticket] = stream
        self._bulletin.accepted(request.request_id)
        return stream

    def _find(self, request: prefill_pb2.PrefillRequest) -> _Stream:
        """The prompt of a control stream that broke; raises UnknownTicket."""
        stream = self._streams.get(request.resume_ticket.hex())
        if stream is None or stream.ticket.epoch != request.resume_epoch:
            raise UnknownTicket(f"ticket {request.resume_ticket.hex()} of epoch {request.resume_epoch} is not served here, or not any more")
        return stream

    def _accepted(self, stream: _Stream, lanes: dict[int, str], received: float, site: str) -> prefill_pb2.Accepted:
        epoch, job = stream.ticket.epoch, stream.job
        if self._options.advertise_lane is not None:
            told = parse_advertised("advertise_lane", self._options.advertise_lane)
            if (place := told.get(site, told.get(""))) is not None:
                lanes = {index: f"{place[0]}:{place[1] + index}" for index in lanes}
        return prefill_pb2.Accepted(
            ticket=stream.ticket.id,
            epoch=epoch,
            manifest=messages.manifest(self._engine.spec, len(job.prompt), job.held_tokens, job.codec),
            codec=str(job.codec),
            lanes=[prefill_pb2.Lane(address=lane, epoch=epoch) for lane in lanes.values()],
            received_s=received,
            submitted_s=stream.submitted,
            sent_s=time.monotonic(),
        )

    def _on_event(self, stream: _Stream, event: api.Event) -> None:
        """The engine's sink, on the engine's thread: KV goes to the outbox, word of it to the control stream."""
        try:
            match event:
                case api.SegmentReady(segment):
                    self._outbox.put(stream.ticket, segment)
                    stream.segments += 1
                    stream.bytes += segment.payload.nbytes
                    stream.events.push((segment.key, time.monotonic() - stream.submitted))
                    return
                case api.PrefillDone():
                    self._outbox.finish(stream.ticket)
                case api.Failed(error):
                    self._outbox.fail(stream.ticket, error)
        except PrfaasError as error:
            # The ticket is gone (cancelled, swept) or was overfilled: that is this request's end, not the engine's.
            self._engine.cancel(stream.job.ticket)
            event = api.Failed(error)
        stream.events.push(event)

    async def _relay(self, stream: _Stream, context: Any) -> None:
        """Engine events to the control stream, until there are last words or it has failed."""
        tokens, at = 0, stream.submitted
        while not stream.last_words:
            # Nothing said for a heartbeat: repeat the last progress, which also tells the peer that somebody is there.
            item: api.Event | tuple[SegmentKey, float] = api.PrefillProgress(tokens)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._options.heartbeat_s):
                    try:
                        item, at = await stream.events.get()
                    except Exhausted as overflow:
                        item = api.Failed(overflow)
            match item:
                case (SegmentKey() as key, ready_s):
                    await context.write(prefill_pb2.PrefillEvent(segment_ready=messages.key_to_proto(key, ready_s)))
                case api.PrefillProgress(tokens):
                    self._outbox.extend(stream.ticket)
                    await context.write(prefill_pb2.PrefillEvent(progress=prefill_pb2.Progress(tokens=tokens, at_s=at - stream.submitted)))
                case api.PrefillDone(first, queue_s, compute_s):
                    token = prefill_pb2.FirstToken(token=messages.token_to_proto(first))
                    done = prefill_pb2.Done(segments=stream.segments, bytes=stream.bytes, queue_s=queue_s, prefill_s=compute_s)
                    self._bulletin.changed()
                    stream.last_words = [prefill_pb2.PrefillEvent(first_token=token), prefill_pb2.PrefillEvent(done=done)]
                case api.Failed(error):
                    await self._fail(stream, context, messages.code_of(error).name, str(error))
                    return
                case api.Finished(reason):
                    await self._fail(stream, context, "CANCELLED", f"the prefill ended early: {reason}")
                    return

    async def _fail(self, stream: _Stream, context: Any, code: str, message: str) -> None:
        self._forget(stream)
        await context.write(prefill_pb2.PrefillEvent(failed=prefill_pb2.Failed(code=code, message=message)))

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(min(1.0, self._options.lease_s / 4))
            for ticket in self._outbox.sweep():
                self._streams.pop(ticket.hex, None)
                self._engine.cancel(ticket.hex)
                logging.warning("ticket %s was dropped: nobody fetched from it for %.1f s", ticket.hex, self._options.lease_s)
