"""The router: a policy decides where each request is prefilled and decoded, its decode server is told, and is held to it.

One request: `Router._generate` -> `Dispatcher.decide` (policy, then servers) -> `_forward` (the decode server's stream to the client); when
a decode server is lost, once more from `decide`, without repeating a token.
"""

import asyncio
import dataclasses
import time
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any

import grpc
from absl import logging

from prfaas_jax.errors import InvalidInput, PrfaasError
from prfaas_jax.scheduling.controllers import Controller, Convert
from prfaas_jax.scheduling.view import NoDecodeServer, Policy
from prfaas_jax.serving import messages
from prfaas_jax.serving.deployment import ClusterServers, Deployment
from prfaas_jax.serving.dispatcher import Dispatch, Dispatcher, Rollout
from prfaas_jax.serving.fleet import FleetOptions
from prfaas_jax.serving.front import FAILED_PREFILL, FrontOptions, GenerationFront, is_final
from prfaas_jax.serving.generation import Progress, Write
from prfaas_jax.serving.held import RequestCancelled
from prfaas_jax.serving.metrics import RouterMetrics
from prfaas_jax.serving.proto import fleet_pb2, fleet_pb2_grpc, generation_pb2, generation_pb2_grpc
from prfaas_jax.serving.tenancy import Tenancy
from prfaas_jax.serving.text import TextCodec, encode_prompt
from prfaas_jax.serving.usage import InvalidRun

# What another decode server may do better. CANCELLED: a server that ends cuts what its grace did not suffice for.
_ELSEWHERE = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.RESOURCE_EXHAUSTED)
# What says that a decode server is ill although it answers. Another one is tried, once: it may be the request that makes them ill.
_SICK = (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN)
# How often a request that waits for a decode server looks for one of which nothing was heard: breakers close with time.
_LOOK_S = 0.1
_CANCEL_S, _CONVERT_S = 2.0, 5.0


@dataclasses.dataclass(frozen=True)
class RouterOptions(FleetOptions, FrontOptions):
    """What stands behind a router, besides the options of every front.

    Attributes:
        decode: addresses of decode servers, comma separated, each a region of its own; for a larger system there are deployments.
        prefill: addresses of prefill servers, comma separated, each a cluster of its own; may be empty.
        max_attempts: decode servers that a request is sent to, one after the other, while they fail.
        park_s: a request that no decode server can take waits so long for one.
    """

    decode: str = ""
    prefill: str = ""
    max_attempts: int = 3
    park_s: float = 5.0
    max_requests: int = 1024

    def __post_init__(self) -> None:
        FleetOptions.__post_init__(self)
        FrontOptions.__post_init__(self)
        if self.max_attempts < 1:
            raise InvalidInput("max_attempts", self.max_attempts, "an integer >= 1")
        if not self.park_s >= 0:
            raise InvalidInput("park_s", self.park_s, "seconds >= 0")


class DecodeServerLost(PrfaasError):
    """The fleet has given a decode server up while it had a request."""


class Router(GenerationFront, fleet_pb2_grpc.FleetServicer):
    """Serves Generate by forwarding it, and Fleet for servers that come and go. `start` and `stop` run on the event loop that serves."""

    def __init__(
        self,
        policy: Policy,
        tokenizer: TextCodec | None,
        options: RouterOptions,
        clusters: Sequence[ClusterServers] | None = None,
        deployment: Deployment | None = None,
        controller: Controller | None = None,
    ):
        """With a tokenizer, text is turned into token ids here, once; without one, prompts must come as token ids.

        `clusters` are the servers of a larger system, instead of the options' lists; `deployment` says how they are linked, what they can
        do and for whom. Raises InvalidInput for malformed or repeated addresses, or no decode server.
        """
        super().__init__(options, RouterMetrics)
        metrics = self._metrics
        assert isinstance(metrics, RouterMetrics)
        self._tokenizer, self._options = tokenizer, options
        self._tenancy = Tenancy(deployment.tenants if deployment else {})
        self._dispatcher = Dispatcher(
            policy,
            controller,
            clusters if clusters is not None else _clusters(options),
            deployment,
            options,
            options,
            self._tenancy,
            Rollout.of(deployment),
            self._convert,
            metrics.decided,
        )
        self._running: dict[str, set[asyncio.Task[Any]]] = {}  # by the ids that clients gave; one a call
        self._cancelled: set[asyncio.Task[Any]] = set()  # those of them that Cancel has ended

    async def start(self) -> None:
        """Asks every server once, binds and serves; raises InvalidInput naming an address that cannot be bound."""
        await self._dispatcher.start()
        try:
            await super().start()
        except BaseException:
            await self._dispatcher.stop()
            raise

    async def stop(self, grace_s: float) -> None:
        """NOT_SERVING at once; running requests get `grace_s` seconds, then they are cut."""
        await super().stop(grace_s)
        await self._dispatcher.stop()

    def _add(self, server: Any) -> None:
        super()._add(server)
        fleet_pb2_grpc.add_FleetServicer_to_server(self, server)

    def _status(self) -> generation_pb2.GenerationStatus:
        status = super()._status()
        status.has_tokenizer = self._tokenizer is not None
        self._dispatcher.report(status)
        return status

    async def Join(self, request: fleet_pb2.JoinRequest, context: Any) -> fleet_pb2.JoinReply:
        """See fleet.proto."""
        try:
            self._dispatcher.fleet.join(request.cluster, request.role, request.address)
        except InvalidInput as error:
            await context.abort(messages.code_of(error), str(error))
        return fleet_pb2.JoinReply()

    async def Leave(self, request: fleet_pb2.LeaveRequest, context: Any) -> fleet_pb2.LeaveReply:
        """See fleet.proto."""
        self._dispatcher.fleet.leave(request.address)
        return fleet_pb2.LeaveReply()

    async def Cancel(self, request: generation_pb2.CancelRequest, context: Any) -> generation_pb2.CancelReply:
        """See generation.proto."""
        for task in self._running.get(request.request_id, set()) - self._cancelled:
            self._cancelled.add(task)
            task.cancel()
        servers = [s for s in self._dispatcher.fleet if s.role == "decode"]
        stubs: list[Any] = [generation_pb2_grpc.GenerationStub(server.channel) for server in servers]
        await asyncio.gather(*(stub.Cancel(request, timeout=_CANCEL_S) for stub in stubs), return_exceptions=True)
        return generation_pb2.CancelReply()

    async def _convert(self, action: Convert) -> bool:
        """Tells one server of the region; whichever can."""
        for server in self._dispatcher.fleet.of(action.region, "decode"):
            stub: Any = generation_pb2_grpc.GenerationStub(server.channel)
            try:
                await stub.Convert(generation_pb2.ConvertRequest(to=action.to), timeout=_CONVERT_S)
            except grpc.RpcError as error:
                logging.info("%s does not convert an instance: %s: %s", server.address, error.code().name, error.details())
                continue
            return True
        return False

    # --- one request -----------------------------------------------------------------------------------------------------------

    async def _generate(
        self, request: generation_pb2.GenerateRequest, write: Write, arrived: float, deadline: float, progress: Progress
    ) -> generation_pb2.Usage:
        if request.WhichOneof("prompt") != "token_ids":
            # Not on the event loop: a long text takes a while, and other requests' tokens are waiting.
            prompt = await asyncio.to_thread(encode_prompt, request, self._tokenizer)
            request.token_ids.ids[:] = prompt
        if not request.token_ids.ids:
            raise InvalidInput("prompt", (), "at least one token id")
        with self._tenancy.running(request.tenant, request.request_id):
            usage = await self._cancellable(request, self._until_done(request, write, arrived, deadline, progress))
        self._fallbacks += usage.fallbacks
        return usage

    async def _cancellable(
        self, request: generation_pb2.GenerateRequest, work: Coroutine[Any, Any, generation_pb2.Usage]
    ) -> generation_pb2.Usage:
        """Does the work where Cancel finds it, whatever it waits for. Not in a task of its own: that would wait for its turn."""
        if not request.request_id:
            return await work
        task = asyncio.current_task()
        assert task is not None  # of the call
        tasks = self._running.setdefault(request.request_id, set())
        tasks.add(task)
        try:
            return await work
        except asyncio.CancelledError:
            if task not in self._cancelled or task.uncancel():  # its client is gone, or the deadline has passed, too
                raise
            raise RequestCancelled(f"request {request.request_id} was cancelled") from None
        finally:
            self._cancelled.discard(task)
            tasks.discard(task)
            if not tasks:
                self._running.pop(request.request_id, None)

    async def _until_done(
        self, request: generation_pb2.GenerateRequest, write: Write, arrived: float, deadline: float, progress: Progress
    ) -> generation_pb2.Usage:
        """Sends the request to one decode server after the other, until one has done it."""
        full: dict[str, grpc.RpcError] = {}  # what servers without room, or that are ill, said
        returns = bool(request.held_by)
        most = self._options.max_attempts + returns  # to come back is not one of them
        for attempt in range(1, most + 1):
            request.placement.again = returns or attempt > 1
            dispatch = self._dispatcher.attach(request) if request.held_by else None
            if dispatch is None:
                request.held_by = ""  # whoever takes it now is not to look for it
                progress.phase = "placement"
                dispatch = await self._place(request, full, attempt > 1, deadline)
                request.placement.route_s = time.monotonic() - arrived
            progress.phase = f"generation by {dispatch.decode.address}"
            try:
                usage = await self._forward(request, dispatch, attempt, write, deadline)
            except DecodeServerLost as error:
                if attempt == most:
                    raise
                logging.warning("placing a request again: %s", error)
            except grpc.RpcError as error:
                ill = any(said.code() in _SICK for said in full.values())
                if not self._worth_another(error, dispatch, attempt < most, ill):
                    raise
                logging.warning("placing a request again: %s: %s", error.code().name, error.details())
                if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED or error.code() in _SICK:
                    full[dispatch.decode.address] = error
            else:
                usage.attempts = attempt
                return usage
            request.held_by = ""
        raise AssertionError("the last attempt returns or raises")

    async def _place(
        self, request: generation_pb2.GenerateRequest, full: Mapping[str, grpc.RpcError], again: bool, deadline: float
    ) -> Dispatch:
        """Decides; where no decode server can take the request now it waits a little for one. None but `full`: what the last one said."""
        until = min(deadline, time.monotonic() + self._options.park_s)
        while True:
            news = self._dispatcher.news()
            try:
                return self._dispatcher.decide(request, full, again)
            except NoDecodeServer:
                if full:
                    raise [*full.values()][-1] from None
                if time.monotonic() >= until:
                    raise
            try:
                async with asyncio.timeout_at(min(until, time.monotonic() + _LOOK_S)):
                    await news.wait()
            except TimeoutError:
                continue

    def _worth_another(self, error: grpc.RpcError, dispatch: Dispatch, left: bool, ill: bool) -> bool:
        """Whether another decode server may do what this one, or one before it that was `ill`, did not; notes whose fault it was."""
        code = error.code()
        if failed := dict(error.trailing_metadata() or ()).get(FAILED_PREFILL):
            dispatch.failed(str(failed), code.name)  # and no fallback was allowed
            return False
        if is_final(error):
            return False
        if dispatch.attached and code is grpc.StatusCode.NOT_FOUND:
            return left
        if code is grpc.StatusCode.UNAVAILABLE:
            dispatch.lost(f"{code.name}: {error.details()}")
        elif code in _SICK:
            dispatch.sick()
        return left and (code in _ELSEWHERE or (code in _SICK and not ill))

    async def _forward(
        self, request: generation_pb2.GenerateRequest, dispatch: Dispatch, attempt: int, write: Write, deadline: float
    ) -> generation_pb2.Usage:
        """Streams the decode server's tokens to the client and returns its usage; cancelling this cancels the call to it.

        What the client has is counted in `request.events_received`, for the next attempt.
        """
        server = dispatch.decode
        stub: Any = generation_pb2_grpc.GenerationStub(server.channel)
        call = stub.Generate(request, timeout=max(0.0, deadline - time.monotonic() - self._options.deadline_margin_s))
        usage: generation_pb2.Usage | None = None
        server.calls.add(call)
        dispatch.begin()
        try:
            if request.request_id and not dispatch.attached:
                await write(dispatch.placed(attempt))  # while the request is on its way
            async for event in call:  # to its end: cancelled behind the usage, it would count as failed there
                if event.WhichOneof("event") == "usage":
                    usage = event.usage
                    continue
                if event.HasField("placed"):
                    await write(dispatch.placed(attempt, event.placed))
                    continue
                dispatch.first_token(event.token)
                await write(event)
                request.events_received += event.HasField("token")
            if usage is None:
                raise InvalidRun(f"decode server {server.address} ended the stream without usage")
            dispatch.account(usage)
            return usage
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and not task.cancelling():  # the fleet has cut the call, nobody this request
                raise DecodeServerLost(f"decode server {server.address} is lost: {server.why}") from None
            raise
        finally:
            call.cancel()
            server.calls.discard(call)
            dispatch.end()

    def _label(self, usage: generation_pb2.Usage) -> str:
        # Reasons of one kind differ in their numbers only: "threshold: 700 > 512 tokens".
        where = "near" if usage.placement == "remote" and usage.prefill_cluster == usage.decode_cluster else usage.placement
        return f"{where}: {usage.reason.partition(':')[0]}"


def _clusters(options: RouterOptions) -> tuple[ClusterServers, ...]:
    """Every server a cluster of its own."""
    prefill, decode = _addresses(options.prefill), _addresses(options.decode)
    return (*(ClusterServers(a, "prefill", (a,)) for a in prefill), *(ClusterServers(a, "region", (), (a,)) for a in decode))


def _addresses(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())
