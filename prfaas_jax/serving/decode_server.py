"""The decode server: the Generation service over one decode engine."""

import asyncio
import dataclasses
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc

from prfaas_jax.engine import api
from prfaas_jax.errors import InvalidInput, PrfaasError
from prfaas_jax.serving import messages
from prfaas_jax.serving.codec_policy import CodecPolicy
from prfaas_jax.serving.front import DeadlinePassed, FrontOptions, GenerationFront
from prfaas_jax.serving.generation import Generation, Progress, Site, Write
from prfaas_jax.serving.held import HeldRequests
from prfaas_jax.serving.joining import JoinOptions, Membership
from prfaas_jax.serving.peers import PrefillPeers
from prfaas_jax.serving.proto import generation_pb2
from prfaas_jax.serving.text import TextCodec
from prfaas_jax.transfer.child import MAX_PROCESSES


@dataclasses.dataclass(frozen=True)
class DecodeServerOptions(JoinOptions, FrontOptions):
    """What a decode server bounds, besides the options of every front; the engine's own queue is bounded by its own options.

    Attributes:
        site: where this server is, as prefill servers know it that are reached at other addresses from there (see their advertise_lane).
        idle_s: a remote prefill without any sign of life for so long has failed.
        lanes: connections to each prefill server's lane port; more of them fill a link with a long round trip sooner.
        receiver_processes: processes of its own that lanes end in, for links that one interpreter cannot empty; 0: they end in this one.
            A prefill server's lanes end in as many of them as it has sender processes.
        codec: how KV travels: none, zstd (lossless), kinds and names as in paged=int8,state=bf16, or auto, which picks by what the link
            carries.
        allow_lossy: auto may pick a codec that loses bits.
        detach_s: a request with an id goes on for so long without a caller, who may come back to it.
        max_staging_bytes: received KV of one request that waits for its scatter; each sender process of a prefill server has an equal part
            of it, which one segment (a chunk's KV of a few layers) must fit.
        max_unread_bytes: tokens and logits of one request that wait for its client to read; one that lags further is cut.
    """

    site: str = ""
    idle_s: float = 5.0
    lanes: int = 2
    receiver_processes: int = 0
    codec: str = "none"
    allow_lossy: bool = False
    detach_s: float = 5.0
    max_staging_bytes: int = 64 << 20
    max_unread_bytes: int = 64 << 20

    def __post_init__(self) -> None:
        JoinOptions.__post_init__(self)
        FrontOptions.__post_init__(self)
        self.check_reachable(self.address)
        for field in ("idle_s", "detach_s", "lanes", "max_staging_bytes", "max_unread_bytes"):
            if not getattr(self, field) > 0:
                raise InvalidInput(field, getattr(self, field), "a positive number")
        if not 0 <= self.receiver_processes <= MAX_PROCESSES:
            raise InvalidInput("receiver_processes", self.receiver_processes, f"0..{MAX_PROCESSES}")
        CodecPolicy(self.codec, self.allow_lossy)


class DecodeServer(GenerationFront):
    """Serves one engine. `start` and `stop` run on the event loop that serves; the engine stays the caller's to close."""

    def __init__(
        self,
        engine: api.DecodeEngine,
        tokenizer: TextCodec | None,
        options: DecodeServerOptions,
        eos_ids: tuple[int, ...] = (),
        convert: Callable[[str], None] | None = None,
    ):
        """`eos_ids` stop every generation that does not ask to ignore them; `convert` has an instance take a role, where any can."""
        super().__init__(options)
        self._engine, self._tokenizer, self._convert = engine, tokenizer, convert
        # Each request waits in two threads at most: for the last byte of its cache, and for its lanes to end.
        self._executor = ThreadPoolExecutor(2 * options.max_requests, thread_name_prefix="decode-server")
        self._peers = PrefillPeers(options, options.lanes, options.receiver_processes)
        self._held = HeldRequests(options.detach_s)
        self._membership = Membership(options, "decode", options)
        limits = (options.idle_s, options.max_staging_bytes, options.max_unread_bytes)
        codecs = CodecPolicy(options.codec, options.allow_lossy)
        self._site = Site(engine, tokenizer, eos_ids, self._peers, self._executor, *limits, codecs, self._bulletin.accepted, options.site)

    @property
    def fingerprint(self) -> str:
        """The model's, which both sides must share."""
        return self._engine.fingerprint

    async def start(self) -> None:
        """See GenerationFront.start; receiver processes are up before anything is served."""
        await asyncio.to_thread(self._peers.start)
        try:
            await super().start()
        except BaseException:
            await self._peers.close()
            raise
        self._membership.start(self.address)

    async def stop(self, grace_s: float) -> None:
        """NOT_SERVING at once; running requests get `grace_s` seconds, then they are cut."""
        await asyncio.gather(super().stop(grace_s), self._membership.stop())
        await self._held.close()
        await self._peers.close()
        await asyncio.to_thread(self._executor.shutdown)

    async def Cancel(self, request: generation_pb2.CancelRequest, context: Any) -> generation_pb2.CancelReply:
        """See generation.proto."""
        self._held.cancel(request.request_id)
        return generation_pb2.CancelReply()

    async def Convert(self, request: generation_pb2.ConvertRequest, context: Any) -> generation_pb2.ConvertReply:
        """See generation.proto."""
        if self._convert is None:
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, "the instances of this server have one role")
        assert self._convert is not None  # abort raises
        try:
            await asyncio.to_thread(self._convert, request.to)
        except PrfaasError as error:
            await context.abort(messages.code_of(error), str(error))
        self._bulletin.changed()
        return generation_pb2.ConvertReply()

    def _status(self) -> generation_pb2.GenerationStatus:
        status = super()._status()
        engine = self._engine.status()
        status.engine.CopyFrom(messages.status_to_proto(engine))
        status.standby = self._standby or not engine.decode_slots
        status.model_fingerprint = self._engine.fingerprint
        status.cache_fingerprint = self._engine.spec.fingerprint()
        status.links.extend(self._peers.links())
        status.has_tokenizer = self._tokenizer is not None
        return status

    async def _answer(
        self, request: generation_pb2.GenerateRequest, write: Write, arrived: float, deadline: float, progress: Progress
    ) -> generation_pb2.Usage:
        """A request with an id runs by itself, and calls attend it."""
        if not request.request_id:
            return await super()._answer(request, _after(request.events_received, write), arrived, deadline, progress)

        async def run(emit: Write) -> generation_pb2.Usage:
            with self._admitted():
                try:
                    async with asyncio.timeout_at(deadline):
                        return await self._generate(request, emit, arrived, deadline, progress)
                except TimeoutError as error:
                    raise DeadlinePassed(f"the deadline passed during {progress.phase}") from error

        return await self._held.attend(request, write, run)

    def _first_told(self, request: generation_pb2.GenerateRequest) -> bool:
        return not request.request_id or self._held.first_told(request.request_id)

    async def _generate(
        self, request: generation_pb2.GenerateRequest, write: Write, arrived: float, deadline: float, progress: Progress
    ) -> generation_pb2.Usage:
        generation = Generation(self._site, request, arrived, deadline, write, progress)
        try:
            usage = await generation.run()
        finally:
            self._fallbacks += generation.fallback is not None
        usage.decode_address = self.address
        return usage


def _after(count: int, write: Write) -> Write:
    """Writes all but the first `count` events: whoever asks again has them from another server."""

    async def later(event: generation_pb2.GenerateEvent) -> None:
        nonlocal count
        if count:
            count -= 1
        else:
            await write(event)

    return later if count else write
