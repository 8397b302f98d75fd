"""What a server tells everyone who watches it: its status, at once after every change, and now and then without one."""

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

from prfaas_jax.errors import InvalidInput, PrfaasError
from prfaas_jax.serving import messages
from prfaas_jax.serving.proto import common_pb2

# Changes that come together are told together; by then the engine's thread has counted them too.
_GAP_S = 0.01
_PERIOD_S = (0.02, 60.0)
# Ids that nobody has read yet; a watcher that lags further misses some, and finds the requests in the counts.
_MAX_IDS = 100_000


class _Watcher:
    def __init__(self) -> None:
        self.changed = asyncio.Event()
        self.accepted: list[str] = []


class Bulletin:
    """The Watch calls of one server. On its event loop only."""

    def __init__(self, status: Callable[[], Any]):
        """`status` makes a fresh status message with a field `accepted`."""
        self._status = status
        self._watchers: set[_Watcher] = set()

    def changed(self) -> None:
        """Tells everyone soon."""
        for watcher in self._watchers:
            watcher.changed.set()

    def accepted(self, request_id: str) -> None:
        """A request has been taken in: from the next status on, counts include it."""
        for watcher in self._watchers:
            if request_id and len(watcher.accepted) < _MAX_IDS:
                watcher.accepted.append(request_id)
            watcher.changed.set()

    async def watch(self, request: common_pb2.WatchRequest, context: Any) -> None:
        """Serves one Watch call until its caller ends it."""
        least, most = _PERIOD_S
        if not least <= request.period_s <= most:
            error = InvalidInput("period_s", request.period_s, f"{least}..{most} seconds")
            await context.abort(messages.code_of(error), str(error))
        watcher = _Watcher()
        self._watchers.add(watcher)
        try:
            while True:
                watcher.changed.clear()
                ids, watcher.accepted = watcher.accepted, []
                try:
                    status = self._status()
                except PrfaasError as error:
                    await context.abort(messages.code_of(error), str(error))
                status.accepted.extend(ids)
                await context.write(status)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(request.period_s - _GAP_S):
                        await watcher.changed.wait()
                await asyncio.sleep(_GAP_S)
        finally:
            self._watchers.discard(watcher)
