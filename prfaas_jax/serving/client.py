"""A client that misses nothing: it comes back to its request when a connection breaks, also to a router that was restarted."""

import asyncio
import contextlib
import dataclasses
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc

from prfaas_jax.errors import InvalidInput
from prfaas_jax.serving.control_plane import control_channel
from prfaas_jax.serving.front import RETRY_AFTER, is_final
from prfaas_jax.serving.proto import generation_pb2, generation_pb2_grpc
from prfaas_jax.transfer.endpoint import parse_address
from prfaas_jax.transfer.security import NONE, Security

# What a new connection may cure: the router is gone, or it ends and cuts what its grace did not suffice for.
_COME_BACK = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
_PAUSE_S = (0.05, 1.0)
_CANCEL_S = 2.0


@dataclasses.dataclass
class Answer:
    """What came of a request.

    Attributes:
        tokens: ids, in order, each once.
        text: what they say, where the server has a tokenizer.
        usage: the account; None until the end.
        events: that said so, at least one a token.
        placed: who had the request, one after the other.
        returns: connections that broke, after which it came back.
        first_s: monotonic second of the first token, None before; `last_s` of the last one.
    """

    tokens: list[int] = dataclasses.field(default_factory=list)
    text: str = ""
    usage: generation_pb2.Usage | None = None
    events: int = 0
    placed: list[generation_pb2.Placed] = dataclasses.field(default_factory=list)
    returns: int = 0
    first_s: float | None = None
    last_s: float | None = None


class Client:
    """Connections to one router, or several that stand for each other. On one event loop; close it, or use it as a context manager."""

    def __init__(self, addresses: Sequence[str], security: Security = NONE):
        """Raises InvalidInput for no address or a malformed one."""
        if not addresses:
            raise InvalidInput("addresses", addresses, "at least one router, host:port")
        for address in addresses:
            parse_address("addresses", address)
        self._channels = [control_channel(address, security) for address in addresses]

    async def __aenter__(self) -> "Client":
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Cuts what still runs."""
        for channel in self._channels:
            await channel.close()

    async def generate(self, request: generation_pb2.GenerateRequest, timeout_s: float) -> Answer:
        """The whole answer; raises as `stream`."""
        answer = Answer()
        async for _ in self.stream(request, timeout_s, answer):
            pass
        return answer

    async def stream(
        self, request: generation_pb2.GenerateRequest, timeout_s: float, answer: Answer
    ) -> AsyncIterator[generation_pb2.TokenOut]:
        """Tokens as they come, each once, whatever breaks in between; `answer` is filled meanwhile.

        The request gets an id unless it has one. A caller that stops early cancels it everywhere. Raises grpc.RpcError: UNAVAILABLE or
        CANCELLED only once there is no time left to come back, or CANCELLED because somebody has cancelled it by its id.
        """
        message = generation_pb2.GenerateRequest()
        message.CopyFrom(request)
        message.request_id = message.request_id or uuid.uuid4().hex
        deadline, pause_s, attempt = time.monotonic() + timeout_s, _PAUSE_S[0], 0
        try:
            while True:
                stub: Any = generation_pb2_grpc.GenerationStub(self._channels[attempt % len(self._channels)])
                call = stub.Generate(message, timeout=max(0.0, deadline - time.monotonic()))
                try:
                    async for event in call:
                        pause_s = _PAUSE_S[0]
                        match event.WhichOneof("event"):
                            case "token":
                                _take(answer, event.token)
                                yield event.token
                            case "placed":
                                answer.placed.append(event.placed)
                            case "usage":
                                answer.usage = event.usage
                    if answer.usage is not None:
                        return
                except grpc.RpcError as error:
                    if error.code() not in _COME_BACK or is_final(error) or time.monotonic() + pause_s >= deadline:
                        raise
                finally:
                    call.cancel()
                attempt += 1
                answer.returns += 1
                message.events_received = answer.events
                message.held_by = answer.placed[-1].decode_address if answer.placed else ""
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, _PAUSE_S[1])
        except grpc.RpcError:
            raise  # the other side has ended it
        except BaseException:
            # Without the word it would go on for a while, and wait for us to come back.
            with contextlib.suppress(Exception):
                await asyncio.shield(self._cancel(message.request_id))
            raise

    async def _cancel(self, request_id: str) -> None:
        stubs: list[Any] = [generation_pb2_grpc.GenerationStub(channel) for channel in self._channels]
        message = generation_pb2.CancelRequest(request_id=request_id)
        await asyncio.gather(*(stub.Cancel(message, timeout=_CANCEL_S) for stub in stubs), return_exceptions=True)


def _take(answer: Answer, out: generation_pb2.TokenOut) -> None:
    answer.last_s = time.monotonic()
    answer.first_s = answer.first_s or answer.last_s
    answer.text += out.text
    answer.events += 1
    if out.HasField("token"):
        answer.tokens.append(out.token.id)


def retry_after_s(error: grpc.RpcError) -> float | None:
    """When a server that was full thinks that it is worth trying again; None where it does not say."""
    value = dict(error.trailing_metadata() or ()).get(RETRY_AFTER)
    return float(value) / 1e3 if value else None
