"""The Generation service as decode servers and routers have it in common: admission, deadline, errors to statuses, counters."""

import asyncio
import collections
import contextlib
import dataclasses
import time
from collections.abc import Iterator
from typing import Any, NoReturn

import grpc

from prfaas_jax.errors import Exhausted, InvalidInput, PrfaasError
from prfaas_jax.serving import messages
from prfaas_jax.serving.controlled_server import ControlledServer
from prfaas_jax.serving.generation import Progress, Write
from prfaas_jax.serving.held import CutShort, RequestCancelled, TakenOver, UnknownRequest
from prfaas_jax.serving.metrics import GenerationMetrics
from prfaas_jax.serving.proto import generation_pb2, generation_pb2_grpc
from prfaas_jax.serving.remote_prefill import RemotePrefillFailed
from prfaas_jax.serving.usage import InvalidRun
from prfaas_jax.transfer.channel import FRONT_SERVER_OPTIONS
from prfaas_jax.transfer.security import Security, check_listen

SERVICE = "prfaas.v1.Generation"
_ABORT_S = 0.5
# Trailing metadata of errors: when it may be worth trying again, and the prefill server that failed.
RETRY_AFTER, FAILED_PREFILL = "retry-after-ms", "failed-prefill"
# And the id by which a request was cancelled: it is over, where a bare CANCELLED is a server that ends.
CANCELLED_ID = "cancelled-request-id"
Metadata = tuple[tuple[str, str], ...]
_RETRY_AFTER_S = 0.05
# Of the last request in the mean time that requests take.
_REQUEST_SHARE = 0.1


@dataclasses.dataclass(frozen=True)
class FrontOptions(Security):
    """Where a Generation service listens, who may connect, and what it bounds.

    Attributes:
        address: host:port; port 0 takes any free one.
        metrics_address: host:port where Prometheus finds /metrics, over HTTP or, with TLS, HTTPS; port 0 takes any free one, empty is none.
        max_requests: Generate calls served at once; more are refused.
        max_request_s: deadline of a request whose client set none, and the longest that any may take.
        deadline_margin_s: how long before the client's deadline a request is given up, so that the error that says why still arrives.
    """

    address: str = "127.0.0.1:0"
    max_requests: int = 128
    max_request_s: float = 600.0
    deadline_margin_s: float = 0.05
    metrics_address: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_listen("address", self.address, self)
        if self.metrics_address:
            check_listen("metrics_address", self.metrics_address, self)
        for field in ("max_requests", "max_request_s", "deadline_margin_s"):
            if not getattr(self, field) > 0:
                raise InvalidInput(field, getattr(self, field), "a positive number")


class GenerationFront(ControlledServer, generation_pb2_grpc.GenerationServicer):
    """Base of DecodeServer and Router, which give `_generate`."""

    _metrics: GenerationMetrics

    def __init__(self, options: FrontOptions, metrics: type[GenerationMetrics] = GenerationMetrics):
        self._front = options
        super().__init__(options.address, SERVICE, metrics(self._status, options.metrics_address, options), options, FRONT_SERVER_OPTIONS)
        self._streams = 0
        self._request_s = 0.0
        self._fallbacks = 0
        self._served: collections.Counter[str] = collections.Counter()
        self._failed: collections.Counter[str] = collections.Counter()

    def _add(self, server: Any) -> None:
        generation_pb2_grpc.add_GenerationServicer_to_server(self, server)

    @property
    def busy(self) -> int:
        """Requests that are not done."""
        return self._streams

    async def Generate(self, request: generation_pb2.GenerateRequest, context: Any) -> None:
        """See generation.proto."""
        arrived = time.monotonic()
        asked = context.time_remaining()
        remaining = self._front.max_request_s if asked is None else min(asked, self._front.max_request_s)
        deadline = arrived + remaining - min(self._front.deadline_margin_s, 0.1 * remaining)
        progress = Progress()
        try:
            async with asyncio.timeout_at(deadline):
                usage = await self._answer(request, context.write, arrived, deadline, progress)
                if not self._first_told(request):
                    await context.write(generation_pb2.GenerateEvent(usage=usage))
                    return
                # Counted first: whoever has read the usage finds it counted.
                counted = collections.Counter((self._label(usage),))
                self._served += counted
                try:
                    await context.write(generation_pb2.GenerateEvent(usage=usage))
                except BaseException:
                    self._served -= counted
                    raise
                self._metrics.observe(usage)
        except TimeoutError:
            await self._refuse(context, grpc.StatusCode.DEADLINE_EXCEEDED, f"the deadline passed during {progress.phase}")
        except RemotePrefillFailed as error:
            await self._refuse(context, error.code, str(error), ((FAILED_PREFILL, error.address),))
        except RequestCancelled as error:
            await self._refuse(context, grpc.StatusCode.CANCELLED, str(error), ((CANCELLED_ID, request.request_id),))
        except PrfaasError as error:
            await self._refuse(context, status_of(error), str(error))
        except grpc.RpcError as error:
            metadata = ((CANCELLED_ID, request.request_id),) if is_final(error) else ()
            await self._refuse(context, error.code(), error.details(), metadata)
        except asyncio.CancelledError:
            self._failed[grpc.StatusCode.CANCELLED.name] += 1
            raise

    def _status(self) -> generation_pb2.GenerationStatus:
        return generation_pb2.GenerationStatus(
            boot=self._boot,
            streams=self._streams,
            fallbacks=self._fallbacks,
            draining=self.draining,
            served=self._served,
            failed=self._failed,
        )

    async def _answer(
        self, request: generation_pb2.GenerateRequest, write: Write, arrived: float, deadline: float, progress: Progress
    ) -> generation_pb2.Usage:
        """One call; arguments as of `_generate`."""
        with self._admitted():
            return await self._generate(request, write, arrived, deadline, progress)

    @contextlib.contextmanager
    def _admitted(self) -> Iterator[None]:
        """A request is being served, while the block runs; raises NotServing or Exhausted."""
        if self.draining or self._standby:
            raise NotServing("this server is shutting down" if self.draining else "this server stands by: it has another role")
        if self._streams >= self._front.max_requests:
            raise Exhausted(f"{self._streams} requests are being served (max_requests={self._front.max_requests})")
        began = time.monotonic()
        self._streams += 1
        try:
            yield
        finally:
            self._streams -= 1
            self._request_s += _REQUEST_SHARE * (time.monotonic() - began - self._request_s)
            self._bulletin.changed()

    async def _generate(
        self, request: generation_pb2.GenerateRequest, write: Write, arrived: float, deadline: float, progress: Progress
    ) -> generation_pb2.Usage:
        """Streams tokens through `write` and returns the usage; times are monotonic seconds. Cancelled at the deadline."""
        raise NotImplementedError

    def _first_told(self, request: generation_pb2.GenerateRequest) -> bool:
        """Whether nobody was told this request's usage before: each counts once."""
        return True

    def _label(self, usage: generation_pb2.Usage) -> str:
        """What a finished request is counted under."""
        return usage.placement

    async def _refuse(self, context: Any, code: grpc.StatusCode, why: str, metadata: Metadata = ()) -> NoReturn:
        self._failed[code.name] += 1
        if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
            metadata = (*metadata, self._retry_after())
        # An abort waits behind tokens that the client does not read; cut short, it is still sent when the client reads on.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_ABORT_S):
                await context.abort(code, why, metadata)
        raise grpc.aio.AbortError(why)

    def _retry_after(self) -> tuple[str, str]:
        """Trailing metadata for whoever was refused: about when, in milliseconds, one of those that are served will have ended."""
        seconds = max(_RETRY_AFTER_S, self._request_s / self._front.max_requests)
        return RETRY_AFTER, str(round(1e3 * seconds))


class DeadlinePassed(PrfaasError):
    """A request took longer than it may; maps to DEADLINE_EXCEEDED."""


class NotServing(PrfaasError):
    """The server drains, or has another role, and takes nothing new; maps to UNAVAILABLE."""


def is_final(error: grpc.RpcError) -> bool:
    """Whether somebody has cancelled the request by its id: nobody is to start it again."""
    return error.code() is grpc.StatusCode.CANCELLED and CANCELLED_ID in dict(error.trailing_metadata() or ())


def status_of(error: PrfaasError) -> grpc.StatusCode:
    """The status a client gets."""
    match error:
        case InvalidRun():
            return grpc.StatusCode.DATA_LOSS
        case DeadlinePassed():
            return grpc.StatusCode.DEADLINE_EXCEEDED
        case UnknownRequest():
            return grpc.StatusCode.NOT_FOUND
        case CutShort():
            return grpc.StatusCode.CANCELLED
        case TakenOver():
            return grpc.StatusCode.ABORTED
        case _:
            return messages.code_of(error)
