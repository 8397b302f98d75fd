"""A PD server: one process that prefills or decodes, and changes its role without a restart."""

import asyncio
from typing import Literal

from absl import logging

from prfaas_jax.engine import api
from prfaas_jax.errors import EngineFailed, InvalidInput
from prfaas_jax.serving.decode_server import DecodeServer, DecodeServerOptions
from prfaas_jax.serving.prefill_server import PrefillServer, PrefillServerOptions
from prfaas_jax.serving.text import TextCodec

PdRole = Literal["prefill", "decode"]
_DRAIN_POLL_S = 0.02
_BEGIN_S = 10.0


class PdServer:
    """Two servers over two engines of the same weights: one works, the other stands by. `start` and `stop` run on the serving event loop.

    Converting, the one that works stands by at once and finishes what it has; then the other one takes over. Engines stay the caller's.

    Attributes:
        prefill: answers on a port of its own in either role.
        decode: likewise; Convert is asked of it.
        role: what the process does; during a conversion what it did before.
    """

    def __init__(
        self,
        role: PdRole,
        prefill: tuple[api.PrefillEngine, PrefillServerOptions],
        decode: tuple[api.DecodeEngine, DecodeServerOptions],
        tokenizer: TextCodec | None = None,
        eos_ids: tuple[int, ...] = (),
    ):
        self.role = role
        self.prefill = PrefillServer(*prefill)
        self.decode = DecodeServer(decode[0], tokenizer, decode[1], eos_ids, convert=self.convert)
        self._servers: dict[PdRole, PrefillServer | DecodeServer] = {"prefill": self.prefill, "decode": self.decode}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._conversion: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Binds and serves; raises InvalidInput naming an address that cannot be bound."""
        self._loop = asyncio.get_running_loop()
        for role, server in self._servers.items():
            server.stand_by(role != self.role)
        await self.prefill.start()
        try:
            await self.decode.start()
        except BaseException:
            await self.prefill.stop(0)
            raise

    async def stop(self, grace_s: float) -> None:
        """NOT_SERVING at once; what runs gets `grace_s` seconds, then it is cut."""
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
