"""The frame of a server process: start, say READY, serve until a signal, stop gracefully, exit 0."""

import asyncio
import gc
import json
import sys
from collections.abc import Callable
from typing import Any, Protocol

from absl import app

from prfaas_jax.errors import PrfaasError
from prfaas_jax.serving.launcher import READY, follow_parent
from prfaas_jax.serving.signals import EndSignals

BAD_INPUT_EXIT = 2


class Server(Protocol):
    """What PrefillServer, DecodeServer and Router have in common."""

    async def start(self) -> None:
        """Binds and serves."""
        ...

    async def stop(self, grace_s: float) -> None:
        """Drains and stops."""
        ...


async def serve(server: Server, describe: Callable[[], dict[str, Any]], grace_s: float) -> None:
    """Runs `server` until SIGTERM or SIGINT; more of them change nothing. `READY {json}` on stdout, from `describe`, once it answers."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    # Not the loop's own handlers: those end with the loop, before the process does, and the next signal would kill it.
    with EndSignals() as ends:

        def told() -> None:
            loop.remove_reader(ends)
            stop.set()

        loop.add_reader(ends, told)
        try:
            await server.start()
            # What is here by now stays: collections need not walk it again and again while requests wait.
            gc.collect()
            gc.freeze()
            print(READY + json.dumps(describe()), flush=True)
            await stop.wait()
        finally:
            loop.remove_reader(ends)
    await server.stop(grace_s)


def run_main(main: Callable[[list[str]], None]) -> None:
    """absl's app.run, with this package's own errors as one line on stderr and exit code 2 instead of a traceback."""

    def guarded(argv: list[str]) -> None:
        follow_parent()
        try:
            if len(argv) > 1:
                raise app.UsageError(f"unknown arguments {argv[1:]}: everything is a flag, --name=value")
            main(argv)
        except PrfaasError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(BAD_INPUT_EXIT)

    app.run(guarded)
