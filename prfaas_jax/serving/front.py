"""The Generation service as decode servers and routers have it in common: admission, deadline, errors to statuses, counters."""

import asyncio
import collections
import contextlib
import dataclasses
import time
from typing import Any, NoReturn

import grpc

from prfaas_jax.errors import InvalidInput, PrfaasError
from prfaas_jax.serving import messages
from prfaas_jax.serving.control_plane import ControlPlane
from prfaas_jax.serving.generation import Progress, Write
from prfaas_jax.serving.proto import common_pb2, generation_pb2, generation_pb2_grpc
from prfaas_jax.serving.remote_prefill import RemotePrefillFailed
from prfaas_jax.serving.usage import InvalidRun
from prfaas_jax.transfer.channel import FRONT_SERVER_OPTIONS
from prfaas_jax.transfer.security import Security, check_listen

SERVICE = "prfaas.v1.Generation"
_ABORT_S = 0.5


@dataclasses.dataclass(frozen=True)
class FrontOptions(Security):
    """Where a Generation service listens, who may connect, and what it bounds.

    Attributes:
        address: host:port; port 0 takes any free one.
        max_requests: Generate calls served at once; more are refused.
        max_request_s: deadline of a request whose client set none, and the longest that any may take.
        deadline_margin_s: how long before the client's deadline a request is given up, so that the error that says why still arrives.
    """

    address: str = "127.0.0.1:0"
    max_requests: int = 128
    max_request_s: float = 600.0
    deadline_margin_s: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        check_listen("address", self.address, self)
        for field in ("max_requests", "max_request_s", "deadline_margin_s"):
            if not getattr(self, field) > 0:
                raise InvalidInput(field, getattr(self, field), "a positive number")


class GenerationFront(generation_pb2_grpc.GenerationServicer):
    """Base of DecodeServer and Router, which give `_generate`."""

    def __init__(self, options: FrontOptions):
        self._front = options
        self._plane = ControlPlane(options.address, SERVICE, options, FRONT_SERVER_OPTIONS)
        self._streams = 0
        self._fallbacks = 0
        self._served: collections.Counter[str] = collections.Counter()
        self._failed: collections.Counter[str] = collections.Counter()

    @property
    def address(self) -> str:
        """host:port as bound."""
        return self._plane.address

    async def start(self) -> None:
        """Binds and serves; raises InvalidInput naming an address that cannot be bound."""
        self._plane.bind(lambda server: generation_pb2_grpc.add_GenerationServicer_to_server(self, server))
        await self._plane.start()

    async def stop(self, grace_s: float) -> None:
        """NOT_SERVING at once; running requests get `grace_s` seconds, then they are cut."""
        await self._plane.stop(grace_s, lambda: self._streams)

    async def Generate(self, request: generation_pb2.GenerateRequest, context: Any) -> None:
        """See generation.proto."""
        arrived = time.monotonic()
        if self._plane.draining:
            await self._refuse(context, grpc.StatusCode.UNAVAILABLE, "this server is shutting down")
        if self._streams >= self._front.max_requests:
            why = f"{self._streams} requests are being served (max_requests={self._front.max_requests})"
            await self._refuse(context, grpc.StatusCode.RESOURCE_EXHAUSTED, why)
        asked = context.time_remaining()
        remaining = self._front.max_request_s if asked is None else min(asked, self._front.max_request_s)
        deadline = arrived + remaining - min(self._front.deadline_margin_s, 0.1 * remaining)
        progress = Progress()
        self._streams += 1
        try:
            async with asyncio.timeout_at(deadline):
                usage = await self._generate(request, context.write, arrived, deadline, progress)
                # Counted first: whoever has read the usage finds it counted.
                counted = collections.Counter((self._label(usage),))
                self._served += counted
                try:
                    await context.write(generation_pb2.GenerateEvent(usage=usage))
                except BaseException:
                    self._served -= counted
                    raise
        except TimeoutError:
            await self._refuse(context, grpc.StatusCode.DEADLINE_EXCEEDED, f"the deadline passed during {progress.phase}")
        except PrfaasError as error:
            await self._refuse(context, status_of(error), str(error))
        except grpc.RpcError as error:
            await self._refuse(context, error.code(), error.details())
        except asyncio.CancelledError:
            self._failed[grpc.StatusCode.CANCELLED.name] += 1
            raise
        finally:
            self._streams -= 1

    async def Status(self, request: common_pb2.StatusRequest, context: Any) -> generation_pb2.GenerationStatus:
        """See generation.proto."""
        return generation_pb2.GenerationStatus(
            streams=self._streams,
            fallbacks=self._fallbacks,
            draining=self._plane.draining,
            served=self._served,
            failed=self._failed,
        )

    async def _generate(
        self, request: generation_pb2.GenerateRequest, write: Write, arrived: float, deadline: float, progress: Progress
    ) -> generation_pb2.Usage:
        """Streams tokens through `write` and returns the usage; times are monotonic seconds. Cancelled at the deadline."""
        raise NotImplementedError

    def _label(self, usage: generation_pb2.Usage) -> str:
        """What a finished request is counted under."""
        return usage.placement

    async def _refuse(self, context: Any, code: grpc.StatusCode, why: str) -> NoReturn:
        self._failed[code.name] += 1
        # An abort waits behind tokens that the client does not read; cut short, it is still sent when the client reads on.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_ABORT_S):
                await context.abort(code, why)
        raise grpc.aio.AbortError(why)


def status_of(error: PrfaasError) -> grpc.StatusCode:
    """The status a client gets: that of the failed prefill server's answer where there was one."""
    match error:
        case RemotePrefillFailed():
            return error.code
        case InvalidRun():
            return grpc.StatusCode.DATA_LOSS
        case _:
            return messages.code_of(error)
