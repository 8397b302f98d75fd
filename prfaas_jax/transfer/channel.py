"""gRPC options and process environment that both planes share.

They differ in how long a ping may take. On a lane it queues behind megabytes of KV, seconds of a slow link, so a lane leaves a frozen peer
to the idle timer; control messages are short, so between servers a late ping means a peer that is gone. A client is no peer: it may
stall for seconds and loses nothing but its own stream's pace, so the front that it talks to is as patient as a lane.
"""

import os
from collections.abc import Sequence
from typing import Final

from prfaas_jax.errors import InvalidInput

Options = Sequence[tuple[str, int]]

# Seconds that a ping between servers may take before the peer counts as gone. To be raised where processes that are alive may have to
# wait for seconds until they run: a whole system on one busy machine.
PING_TIMEOUT_ENV: Final = "PRFAAS_PING_TIMEOUT_S"
_PING_TIMEOUT_S: Final = "1.5"


def _keepalive(ping_timeout_ms: int) -> Options:
    # Keepalive alone takes 60 s to see a frozen peer: the ping timeout is what sees it.
    return (
        ("grpc.keepalive_time_ms", 500),
        ("grpc.keepalive_timeout_ms", ping_timeout_ms),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.ping_timeout_ms", ping_timeout_ms),
        ("grpc.http2.max_pings_without_data", 0),
    )


def _ping_timeout_ms() -> int:
    text = os.environ.get(PING_TIMEOUT_ENV, _PING_TIMEOUT_S)
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0.1 <= seconds <= 600:
        raise InvalidInput(PING_TIMEOUT_ENV, text, "seconds from 0.1 to 600")
    return round(seconds * 1000)


# By default a link that is silent for a second is ridden out, and a frozen peer is seen within two.
_CONTROL_PINGS: Final = _keepalive(_ping_timeout_ms())
_PATIENT_PINGS: Final = _keepalive(20_000)

_SERVER: Final[Options] = (
    # A silent prefill is pinged for as long as it computes, and bandwidth probes of a fast stream count as pings too: by default the
    # server answers either with too_many_pings and closes the connection.
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 100),
    ("grpc.http2.max_ping_strikes", 0),
    # Two servers on one port would each get some of the calls; a port in use must be an error.
    ("grpc.so_reuseport", 0),
    # Who connects and does not speak, or speaks something else, holds a descriptor no longer than this; by default two minutes.
    ("grpc.server_handshake_timeout_ms", 20_000),
)
_CHANNEL: Final[Options] = (
    # Every channel its own connection, so that lanes do not share one TCP window.
    ("grpc.use_local_subchannel_pool", 1),
)
# Large frames and look-ahead: fewer, longer copies. The 4 MiB receive limit stays as it is, and grpc.minimal_stack is left out
# because it switches that limit off.
_FRAMES: Final[Options] = (
    ("grpc.http2.max_frame_size", 16_777_215),
    ("grpc.http2.write_buffer_size", 64 << 20),
    ("grpc.http2.lookahead_bytes", 64 << 20),
)

SERVER_OPTIONS: Final[Options] = (*_CONTROL_PINGS, *_SERVER)
CHANNEL_OPTIONS: Final[Options] = (*_CONTROL_PINGS, *_CHANNEL)
FRONT_SERVER_OPTIONS: Final[Options] = (*_PATIENT_PINGS, *_SERVER)
FRONT_CHANNEL_OPTIONS: Final[Options] = (*_PATIENT_PINGS, *_CHANNEL)
LANE_SERVER_OPTIONS: Final[Options] = (*_PATIENT_PINGS, *_SERVER, *_FRAMES)
# Without SingleThreadedUnaryStream: no faster, and it leaves the connection open for ever when an error overtakes the request's own event.
LANE_CHANNEL_OPTIONS: Final[Options] = (*_PATIENT_PINGS, *_CHANNEL, *_FRAMES)

# To be set before exec of a process that moves KV bytes: most of a transfer's cost is page faults of freshly mapped buffers.
MOVER_ENV: Final[dict[str, str]] = {
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(4 << 30),
    "MALLOC_TOP_PAD_": str(64 << 20),
    "GRPC_EXPERIMENTS": "tcp_frame_size_tuning,tcp_rcv_lowat",
}
