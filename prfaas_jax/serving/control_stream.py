"""The reading end of a Prefill call, which survives the connection that it runs over."""

import asyncio
import time
from collections.abc import Callable
from typing import Any

import grpc

from prfaas_jax.serving.control_plane import control_channel
from prfaas_jax.serving.peers import PrefillPeers
from prfaas_jax.serving.proto import prefill_pb2, prefill_pb2_grpc

# Pauses before each try to find the server again; a process that is gone refuses all of them within a blink.
_REATTACH_PAUSES_S = (0.0, 0.03, 0.1)
# Broken connections that one call lives through.
_MAX_REATTACHED = 8


class ControlStream:
    """One Prefill call. `read` goes on, over a connection of its own, where the server still knows the ticket.

    Attributes:
        sent: when the call began, in monotonic seconds.
    """

    def __init__(self, peers: PrefillPeers, address: str, request: prefill_pb2.PrefillRequest, time_left: Callable[[], float]):
        """`time_left` are the seconds until the request's deadline, now."""
        self._security, self._address, self._request, self._time_left = peers.security, address, request, time_left
        self.sent = time.monotonic()
        self._call = peers.stub(address).Prefill(request, timeout=time_left())
        self._channels: list[Any] = []
        self._reattached = 0

    async def read(self) -> Any:
        """The next event, or `grpc.aio.EOF`; raises grpc.RpcError when the call ended with an error or cannot be found again."""
        while True:
            try:
                return await self._call.read()
            except grpc.RpcError as error:
                if error.code() is not grpc.StatusCode.UNAVAILABLE or not self._request.resume_ticket:
                    raise
                await self._reattach(error)

    def accepted(self, ticket: bytes, epoch: int) -> None:
        """From now on a broken connection is not the end."""
        self._request = prefill_pb2.PrefillRequest()
        self._request.resume_ticket, self._request.resume_epoch = ticket, epoch

    async def close(self) -> None:
        """Ends the call and the connections that it took."""
        self._call.cancel()
        for channel in self._channels:
            await channel.close()

    async def _reattach(self, error: grpc.RpcError) -> None:
        """Puts a new call in place of a broken one; raises `error` when that does not succeed."""
        self._reattached += 1
        if self._reattached > _MAX_REATTACHED:
            raise error
        for pause_s in _REATTACH_PAUSES_S:
            await asyncio.sleep(pause_s)
            # A channel of its own: the shared one may still be waiting to connect again.
            channel = control_channel(self._address, self._security)
            self._channels.append(channel)
            call = prefill_pb2_grpc.PrefillStub(channel).Prefill(self._request, timeout=max(0.0, self._time_left()))
            try:
                event = await call.read()
            except grpc.RpcError as again:
                if again.code() is not grpc.StatusCode.UNAVAILABLE:
                    raise error from again
                continue
            if event is not grpc.aio.EOF and event.WhichOneof("event") == "accepted":
                self._call = call
                return
        raise error
