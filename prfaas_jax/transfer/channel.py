"""gRPC options and process environment that both planes share."""

from typing import Final

# Keepalive alone takes 60 s to see a frozen peer: the ping timeout is what sees it. A link that is silent for a second is ridden out.
_KEEPALIVE: Final[tuple[tuple[str, int], ...]] = (
    ("grpc.keepalive_time_ms", 500),
    ("grpc.keepalive_timeout_ms", 1500),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.ping_timeout_ms", 1500),
    ("grpc.http2.max_pings_without_data", 0),
)
# Large frames and look-ahead: fewer, longer copies. The 4 MiB receive limit stays as it is, and grpc.minimal_stack is left out
# because it switches that limit off.
_FRAMES: Final[tuple[tuple[str, int], ...]] = (
    ("grpc.http2.max_frame_size", 16_777_215),
    ("grpc.http2.write_buffer_size", 64 << 20),
    ("grpc.http2.lookahead_bytes", 64 << 20),
)

SERVER_OPTIONS: Final[tuple[tuple[str, int], ...]] = (
    *_KEEPALIVE,
    *_FRAMES,
    # A silent prefill is pinged for as long as it computes, and bandwidth probes of a fast stream count as pings too: by default the
    # server answers either with too_many_pings and closes the connection.
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 100),
    ("grpc.http2.max_ping_strikes", 0),
    # Two servers on one port would each get some of the calls; a port in use must be an error.
    ("grpc.so_reuseport", 0),
)

CHANNEL_OPTIONS: Final[tuple[tuple[str, int], ...]] = (
    *_KEEPALIVE,
    *_FRAMES,
    # Every channel its own connection, so that lanes do not share one TCP window.
    ("grpc.use_local_subchannel_pool", 1),
    # The calling thread reads a stream itself; no hand-over from a channel thread per message.
    ("SingleThreadedUnaryStream", 1),
)

# To be set before exec of a process that moves KV bytes: most of a transfer's cost is page faults of freshly mapped buffers.
MOVER_ENV: Final[dict[str, str]] = {
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(4 << 30),
    "MALLOC_TOP_PAD_": str(64 << 20),
    "GRPC_EXPERIMENTS": "tcp_frame_size_tuning,tcp_rcv_lowat",
}
