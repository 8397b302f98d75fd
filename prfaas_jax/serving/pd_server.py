"""Two servers in one process; with instances that take either role, a PD server: it prefills or decodes, and changes without a restart."""

import asyncio
import time
from typing import Any, Literal

from absl import logging

from prfaas_jax.engine import api
from prfaas_jax.errors import EngineFailed, InvalidInput
from prfaas_jax.serving.decode_server import DecodeServer, DecodeServerOptions
from prfaas_jax.serving.prefill_server import PrefillServer, PrefillServerOptions
from prfaas_jax.serving.text import TextCodec

PdRole = Literal["prefill", "decode"]
_DRAIN_POLL_S = 0.02
_BEGIN_S = 10.0


class ServerPair:
    """A prefill server and, where there is one, a decode server: started, ended and described as one.

    Attributes:
        prefill: answers on ports of its own.
        decode: likewise.
    """

    def __init__(self, prefill: PrefillServer, decode: DecodeServer | None):
        self.prefill, self.decode = prefill, decode

    async def start(self) -> None:
        """Binds and serves; raises InvalidInput naming an address that cannot be bound."""
        await self.prefill.start()
        if self.decode is not None:
            try:
                await self.decode.start()
            except BaseException:
                await self.prefill.stop(0)
                raise

    async def stop(self, grace_s: float) -> None:
        """Decode first, whose requests may still want prompts computed; one grace of `grace_s` seconds for both."""
        deadline = time.monotonic() + grace_s
        if self.decode is not None:
            await self.decode.stop(grace_s)
        await self.prefill.stop(max(0.0, deadline - time.monotonic()))

    def describe(self) -> dict[str, Any]:
        """What its READY line says."""
        decode = self.decode.addresses if self.decode is not None else None
        return {"prefill": self.prefill.addresses, "decode": decode, "fingerprint": self.prefill.fingerprint}


class PdServer(ServerPair):
    """Two servers over two engines of the same weights: one works, the other stands by. `start` and `stop` run on the serving event loop.

    Converting, the one that works stands by at once and finishes what it has; then the other one takes over. Engines stay the caller's.

    Attributes:
        prefill: answers in either role.
        decode: likewise; Convert is asked of it.
        role: what the process does; during a conversion what it did before.
    """

    decode: DecodeServer

    def __init__(
        self,
        role: PdRole,
        prefill: tuple[api.PrefillEngine, PrefillServerOptions],
        decode: tuple[api.DecodeEngine, DecodeServerOptions],
        tokenizer: TextCodec | None = None,
        eos_ids: tuple[int, ...] = (),
    ):
        self.role = role
        super().__init__(PrefillServer(*prefill), DecodeServer(decode[0], tokenizer, decode[1], eos_ids, convert=self.convert))
        self._servers: dict[PdRole, PrefillServer | DecodeServer] = {"prefill": self.prefill, "decode": self.decode}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._conversion: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """See ServerPair.start."""
        self._loop = asyncio.get_running_loop()
        for role, server in self._servers.items():
            server.stand_by(role != self.role)
        await super().start()

    async def stop(self, grace_s: float) -> None:
        """NOT_SERVING at once, both: neither wants anything of the other one. What runs gets `grace_s` seconds, then it is cut."""
        if self._conversion is not None:
            self._conversion.cancel()
            await asyncio.wait({self._conversion})
        await asyncio.gather(self.decode.stop(grace_s), self.prefill.stop(grace_s))

    def convert(self, to: str) -> None:
        """Begins to take the other role, and returns; from any thread. Raises InvalidInput for a role that it has or is taking already."""
        assert self._loop is not None  # whoever asks has been served
        begun = asyncio.run_coroutine_threadsafe(self._begin(to), self._loop)
        try:
            begun.result(_BEGIN_S)
        except TimeoutError as error:
            raise EngineFailed(f"the server has not begun to convert within {_BEGIN_S} s") from error

    async def _begin(self, to: str) -> None:
        if to not in self._servers:
            raise InvalidInput("to", to, "prefill or decode")
        if self._conversion is not None and not self._conversion.done():
            raise InvalidInput("to", to, "asked for once the conversion that is under way is over")
        if to == self.role:
            raise InvalidInput("to", to, "the other role: it has this one")
        old, new = self._servers[self.role], self._servers["prefill" if to == "prefill" else "decode"]
        old.stand_by(True)
        self._conversion = asyncio.create_task(self._change("prefill" if to == "prefill" else "decode", old, new))

    async def _change(self, to: PdRole, old: PrefillServer | DecodeServer, new: PrefillServer | DecodeServer) -> None:
        # As long as a request may take: its own deadline ends it, if nothing does before.
        while old.busy:
            await asyncio.sleep(_DRAIN_POLL_S)
        self.role = to
        new.stand_by(False)
        logging.info("this server's instance is to %s from now on", to)
