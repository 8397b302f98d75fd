"""A userspace TCP relay that behaves like a WAN link and breaks like one: rate, delay, jitter, slices, stalls, resets, flipped bytes.

    python -m prfaas_jax.testing.relay --listen=127.0.0.1:0 --target=127.0.0.1:7001 --gbps=1 --rtt_ms=20

prints {"address": "127.0.0.1:PORT", "port": PORT} and relays until SIGTERM or SIGINT; flags set every fault at the start, and JSON
lines on stdin change a running one (`relay_control`). One thread, one event loop, big reads into buffers that are used again.

What it is not: it ends TCP on both sides. Each side sees a loss-free peer on this host, so it says nothing about kernel loss,
retransmission or congestion control; a black hole is a silence, after which what was sent arrives.

What queues where, per direction. In front of the bottleneck, in the relay: at most 512 KiB for all connections together (a read of at
most 256 KiB, after at most two milliseconds of the line or 256 KiB that were read ahead); in the kernel: four milliseconds of the line
for each connection, at least 256 KiB and at most 2 MiB (as the rate was when it was made), and the sender's own socket buffer. Behind
it flies rate x one-way delay, and at most 1 MiB of a connection waits for a receiver that does not take it. With an RTT the relay
keeps these bytes in flight by itself, whatever the windows of the two TCPs. The loop's clock ticks in milliseconds, so delays come
out up to that much longer, and a line that was idle may send two milliseconds' worth at once.
"""

import functools
import time
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Any, Literal

from absl import app

from prfaas_jax.errors import InvalidInput
from prfaas_jax.testing.relay_link import FOREVER, Link, Mark
from prfaas_jax.testing.relay_loop import Loop
from prfaas_jax.transfer.endpoint import parse_address

_address = functools.partial(parse_address, allow_zero=True)

# "up" flows from the client to the target, "down" from the target to the client.
Direction = Literal["up", "down"]


class Relay:
    """Relays connections on `address` to `target` over one emulated link. Use as a context manager; every control is thread safe.

    The rate holds per direction and is shared by all connections. Offsets count the bytes of one direction, over all connections,
    from the call on. A control that takes `after_s` acts that many seconds later, so that a run can be planned before it begins;
    its arguments are checked at once and raise InvalidInput. `direction` None means both.
    """

    def __init__(
        self,
        target: str,
        listen: str = "127.0.0.1:0",
        gbps: float | None = None,
        rtt_ms: float = 0.0,
        jitter_ms: float = 0.0,
        seed: int = 0,
    ):
        """Binds at once; raises InvalidInput for a malformed or busy address or a negative figure. See `set_link` for the units."""
        self._links: dict[Direction, Link] = {"up": Link(), "down": Link()}
        self._loop = Loop(_address("target", target), _address("listen", listen), self._links["up"], self._links["down"], seed)
        self.port: int = self._loop.port
        self.address = f"{listen.rpartition(':')[0]}:{self.port}"
        try:
            self.set_link(gbps, rtt_ms, jitter_ms)
        except InvalidInput:
            self._loop.close()
            raise

    def __enter__(self) -> "Relay":
        self._loop.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Resets every connection and ends the thread."""
        self._loop.close()

    # --- the link

    def set_link(
        self,
        gbps: float | None = None,
        rtt_ms: float = 0.0,
        jitter_ms: float = 0.0,
        direction: Direction | None = None,
        after_s: float = 0.0,
    ) -> None:
        """Sets rate, delay and jitter, all three.

        Args:
            gbps: Gbit/s per direction; None is unlimited.
            rtt_ms: round trip added, half of it in each direction.
            jitter_ms: up to this much more per direction, uniform.
            direction: which one.
            after_s: when.
        """
        _check_rate(gbps)
        for field, value in (("rtt_ms", rtt_ms), ("jitter_ms", jitter_ms)):
            if not 0 <= value < 60_000:
                raise InvalidInput(field, value, "milliseconds in [0, 60000)")

        def act() -> None:
            for link in self._select(direction):
                link.bytes_per_s = _bytes_per_s(gbps)
                link.delay_s, link.jitter_s = rtt_ms / 2e3, jitter_ms / 1e3

        self._loop.do(after_s, act)

    def set_rate(self, gbps: float | None, direction: Direction | None = None, after_s: float = 0.0) -> None:
        """Sets the rate and leaves the delay: a step of the bandwidth."""
        _check_rate(gbps)

        def act() -> None:
            for link in self._select(direction):
                link.bytes_per_s = _bytes_per_s(gbps)

        self._loop.do(after_s, act)

    def set_slices(self, slice_bytes: int | None, pause_ms: float = 0.0, direction: Direction | None = None, after_s: float = 0.0) -> None:
        """Hands on at most `slice_bytes` at a time, at least `pause_ms` between two of one connection; None ends it."""
        if slice_bytes is not None and slice_bytes < 1:
            raise InvalidInput("slice_bytes", slice_bytes, "a positive number of bytes, or None for no slices")
        if not 0 <= pause_ms < 60_000:
            raise InvalidInput("pause_ms", pause_ms, "milliseconds in [0, 60000)")
        if slice_bytes is None and pause_ms:
            raise InvalidInput("pause_ms", pause_ms, "0 without slices")

        def act() -> None:
            for link in self._select(direction):
                link.slice_bytes, link.slice_pause_s = slice_bytes, pause_ms / 1e3

        self._loop.do(after_s, act)

    def set_target(self, target: str) -> None:
        """Where connections go that are accepted from now on; a relay can so be known before the server behind it has a port."""
        with self._loop.lock:
            self._loop.target = _address("target", target)

    # --- faults

    def black_hole(self, seconds: float = FOREVER, direction: Direction | None = None, after_s: float = 0.0) -> None:
        """Nothing passes for `seconds`; connections stay open, new ones are made, and what was sent arrives afterwards."""
        if not seconds >= 0:
            raise InvalidInput("seconds", seconds, "a number that is not negative")

        def act() -> None:
            for link in self._select(direction):
                link.stalled_until = time.monotonic() + seconds

        self._loop.do(after_s, act)

    def black_hole_after(self, nbytes: int, seconds: float = FOREVER, direction: Direction = "down", after_s: float = 0.0) -> None:
        """Lets exactly `nbytes` more through, then nothing for `seconds`."""
        if not seconds >= 0:
            raise InvalidInput("seconds", seconds, "a number that is not negative")
        self._mark(nbytes, "black_hole", direction, after_s, seconds)

    def pause(self, direction: Direction | None = None, after_s: float = 0.0) -> None:
        """Nothing passes until `resume`."""
        self.black_hole(FOREVER, direction, after_s)

    def resume(self, direction: Direction | None = None, after_s: float = 0.0) -> None:
        """Ends a pause or black hole."""
        self.black_hole(0.0, direction, after_s)

    def flip_byte_after(self, nbytes: int | Sequence[int], direction: Direction = "down", after_s: float = 0.0) -> None:
        """Inverts one bit of the byte that follows the next `nbytes`; of several bytes, when given several counts."""
        counts = [nbytes] if isinstance(nbytes, int) else list(nbytes)
        for count in counts:
            _check_count(count)
        link = self._links[direction]
        self._loop.do(after_s, lambda: link.flips.add(link.passed + count for count in counts))

    def flip_rate(self, flips_per_gb: float, direction: Direction = "down", seed: int = 0, after_s: float = 0.0) -> None:
        """Inverts a random bit of random bytes, `flips_per_gb` of them in 10^9 on average; 0 ends it. Which, the seed decides alone."""
        if not 0 <= flips_per_gb <= 1e9:
            raise InvalidInput("flips_per_gb", flips_per_gb, "a number in [0, 1e9]")
        link = self._links[direction]
        self._loop.do(after_s, lambda: link.flips.set_rate(flips_per_gb / 1e9, seed, link.passed))

    def reset_after(self, nbytes: int, direction: Direction = "down", after_s: float = 0.0) -> None:
        """Lets exactly `nbytes` more through, then resets the connection that would have carried the next one."""
        self._mark(nbytes, "reset", direction, after_s)

    def half_close_after(self, nbytes: int, direction: Direction = "down", after_s: float = 0.0) -> None:
        """Lets exactly `nbytes` more through, then ends that direction of the connection that would have carried the next one."""
        self._mark(nbytes, "half_close", direction, after_s)

    def reset(self, after_s: float = 0.0) -> None:
        """Resets every connection."""
        self._loop.do(after_s, self._loop.reset)

    def half_close(self, direction: Direction = "down", after_s: float = 0.0) -> None:
        """Ends one direction of every connection with a FIN, behind what is already under way; the other goes on."""

        def act() -> None:
            for pipe in self._loop.pipes():
                if pipe.link is self._links[direction]:
                    pipe.ended = True

        self._loop.do(after_s, act)

    # --- what it sees

    def passed(self, direction: Direction = "down") -> int:
        """Bytes taken from senders so far."""
        with self._loop.lock:
            return self._links[direction].passed

    def held(self, direction: Direction = "down") -> int:
        """Bytes taken from senders and not yet handed on."""
        with self._loop.lock:
            return sum(pipe.held for pipe in self._loop.pipes() if pipe.link is self._links[direction])

    @property
    def connections(self) -> int:
        """Connections that are open now."""
        with self._loop.lock:
            return len(self._loop.pairs)

    def status(self) -> dict[str, Any]:
        """Open connections, and for each direction what has passed, what is held, and the rate (Gbit/s, None when unlimited)."""
        with self._loop.lock:
            now = time.monotonic()
            return {"connections": self.connections} | {
                direction: {
                    "passed": link.passed,
                    "held": self.held(direction),
                    "gbps": None if link.bytes_per_s == FOREVER else link.bytes_per_s * 8 / 1e9,
                    "stalled": link.stalled_until > now,
                }
                for direction, link in self._links.items()
            }

    def _select(self, direction: Direction | None) -> Iterable[Link]:
        return self._links.values() if direction is None else (self._links[direction],)

    def _mark(
        self, nbytes: int, kind: Literal["reset", "half_close", "black_hole"], direction: Direction, after_s: float, seconds: float = 0.0
    ) -> None:
        _check_count(nbytes)
        link = self._links[direction]
        self._loop.do(after_s, lambda: link.mark(Mark(link.passed + nbytes, kind, seconds)))


def _check_rate(gbps: float | None) -> None:
    if gbps is not None and not 0 < gbps < FOREVER:
        raise InvalidInput("gbps", gbps, "a positive number, or None for an unlimited link")


def _check_count(nbytes: int) -> None:
    if nbytes < 0:
        raise InvalidInput("nbytes", nbytes, "a number of bytes, not negative")


def _bytes_per_s(gbps: float | None) -> float:
    return FOREVER if gbps is None else gbps * 1e9 / 8


if __name__ == "__main__":
    # Run as a script this file is not the module of its name, so the command line works on that one.
    from prfaas_jax.testing import relay_control

    relay_control.define_flags()
    app.run(relay_control.main)
