"""Shared by the transfer tests: a small cache, random bytes for it, and ways to cut it up."""

import itertools
import queue
import random
import threading
import time
from collections.abc import Callable, Sequence

import grpc
import numpy as np

from prfaas_jax.kvcache.segments import CARRIER, Segment, SegmentKey, kept_part
from prfaas_jax.kvcache.spec import CacheGroup, CacheSpec, LayerCache, TensorSpec
from prfaas_jax.transfer import frames, wire
from prfaas_jax.transfer.channel import LANE_CHANNEL_OPTIONS
from prfaas_jax.transfer.counters import Counters
from prfaas_jax.transfer.lane import METHOD, LaneServer
from prfaas_jax.transfer.lanes import LaneGroup
from prfaas_jax.transfer.outbox import Outbox, Ticket
from prfaas_jax.transfer.puller import Puller
from prfaas_jax.transfer.receivers import Receivers
from prfaas_jax.transfer.security import Security
from prfaas_jax.transfer.senders import SharedOutbox

GQA = LayerCache("paged", (TensorSpec("k", 4, 8, "bfloat16"), TensorSpec("v", 4, 8, "bfloat16")))
MLA = LayerCache("paged", (TensorSpec("latent", 1, 12, "float32", shared=True),))
WINDOW = LayerCache("window", (TensorSpec("k", 2, 8, "bfloat16"), TensorSpec("v", 2, 4, "bfloat16")), 6)
# As a gated delta layer: float32 state, tails of its convolutions in the model's dtype, fewer heads for q and k than for v.
DELTA = LayerCache(
    "state",
    (
        TensorSpec("recurrent", 4, 30, "float32"),
        TensorSpec("q_tail", 2, 9, "bfloat16"),
        TensorSpec("k_tail", 2, 9, "bfloat16"),
        TensorSpec("v_tail", 4, 6, "bfloat16"),
    ),
)
SPEC = CacheSpec((CacheGroup(GQA, (0, 2, 3)), CacheGroup(MLA, (1,)), CacheGroup(WINDOW, (4, 6)), CacheGroup(DELTA, (5, 7, 8))))


def wide_spec(layers: int = 4) -> CacheSpec:
    """2 KiB per token, layer and tensor: megabytes in few segments."""
    cache = LayerCache("paged", (TensorSpec("k", 8, 128, "bfloat16"), TensorSpec("v", 8, 128, "bfloat16")))
    return CacheSpec((CacheGroup(cache, tuple(range(layers))),))


class Cache:
    """Random bytes of what a request leaves behind, `[layers, kept tokens, heads, width]` per (group, tensor)."""

    def __init__(self, spec: CacheSpec, length: int, seed: int = 0):
        self.spec, self.length = spec, length
        rng = np.random.default_rng(seed)
        self.tensors = {}
        for g, group in enumerate(spec.groups):
            start, stop = group.cache.kept(length)
            for t, tensor in enumerate(group.cache.tensors):
                shape = len(group.layers), stop - start, tensor.heads, tensor.token_bytes // tensor.heads
                self.tensors[g, t] = rng.integers(0, 256, shape, np.uint8).view(CARRIER[tensor.dtype])

    def place(self, key: SegmentKey) -> tuple[slice, slice, slice]:
        """Where a key's elements lie in its tensor."""
        first = self.spec.groups[key.group].cache.kept(self.length)[0]
        start, stop = key.tokens
        assert start >= first
        return slice(*key.layers), slice(start - first, stop - first), slice(*key.heads)

    def segment(self, key: SegmentKey) -> Segment:
        piece = self.tensors[key.group, key.tensor][self.place(key)]
        return Segment(key, memoryview(np.ascontiguousarray(piece)))

    def keys(self, chunk: int, layer_step: int = 10**6, shards: int = 1) -> list[SegmentKey]:
        """Chunk by chunk, what stays of every tensor, in layer steps and head slices."""
        keys = []
        for start in range(0, self.length, chunk):
            for (g, t), array in self.tensors.items():
                tokens = kept_part(self.spec.groups[g].cache, (start, start + chunk), self.length)
                if tokens is None:
                    continue
                layers, _, heads, _ = array.shape
                slices = min(shards, heads)
                for layer in range(0, layers, layer_step):
                    for s in range(slices):
                        head_range = (s * heads // slices, (s + 1) * heads // slices)
                        keys.append(SegmentKey(g, t, (layer, min(layers, layer + layer_step)), tokens, head_range))
        return keys

    def random_keys(self, rng: random.Random) -> list[SegmentKey]:
        """Any disjoint cover: random token, layer and head cuts, different for every tensor and every token range."""
        keys = []
        for (g, t), array in self.tensors.items():
            layers, tokens, heads, _ = array.shape
            first = self.spec.groups[g].cache.kept(self.length)[0]
            for start, stop in _cuts(rng, tokens):
                token_range = first + start, first + stop
                for layer_range in _cuts(rng, layers):
                    keys += [SegmentKey(g, t, layer_range, token_range, head_range) for head_range in _cuts(rng, heads)]
        return keys


def _cuts(rng: random.Random, size: int) -> list[tuple[int, int]]:
    inner = sorted(rng.sample(range(1, size), rng.randint(0, min(3, size - 1)))) if size > 1 else []
    edges = [0, *inner, size]
    return list(itertools.pairwise(edges))


class Sink:
    """An on_block that writes into a cache of its own; every byte may be written once."""

    def __init__(self, spec: CacheSpec, length: int):
        self.cache = Cache(spec, length, seed=-1 % 2**32)
        self.written = {at: np.zeros(array.shape, np.uint8) for at, array in self.cache.tensors.items()}
        self.lock = threading.Lock()
        self.blocks = 0

    def __call__(self, key, block, done):
        at = key.group, key.tensor
        place = self.cache.place(key)
        with self.lock:
            assert block.dtype == self.cache.tensors[at].dtype
            self.cache.tensors[at][place] = block
            self.written[at][place] += 1
            self.blocks += 1
        done()

    def check(self, sent: Cache) -> None:
        for at, array in sent.tensors.items():
            assert (self.written[at] == 1).all()
            np.testing.assert_array_equal(self.cache.tensors[at].view(np.uint8), array.view(np.uint8))


class Sender:
    """An outbox behind a lane server, as a context manager."""

    def __init__(self, spec: CacheSpec, capacity: int = 1 << 28, lease_s: float = 30.0, **lane):
        self.outbox = Outbox(spec, capacity, lease_s)
        self.lane = LaneServer(self.outbox, **lane)

    def __enter__(self) -> "Sender":
        self.lane.start()
        return self

    def __exit__(self, *_) -> None:
        self.lane.stop(0)

    def send(self, cache: Cache, keys: Sequence[SegmentKey], finish: bool = True) -> Ticket:
        ticket = self.outbox.open(cache.length)
        for key in keys:
            self.outbox.put(ticket, cache.segment(key))
        if finish:
            self.outbox.finish(ticket)
        return ticket


class Pull:
    """One transfer over lanes of its own, which close when it is over: what remains afterwards is a leak."""

    def __init__(self, ticket: Ticket, puller: Puller, groups: Sequence[LaneGroup]):
        self.puller, self.groups = puller, groups
        puller.start(ticket.id, ticket.epoch, groups)

    def finish(self, expected_bytes: int) -> Counters:
        try:
            return self.puller.finish(expected_bytes)
        finally:
            self.close()

    def cancel(self) -> None:
        self.puller.cancel()
        self.close()

    def touch(self) -> None:
        self.puller.touch()

    @property
    def staging_bytes(self) -> int:
        return self.puller.staging_bytes

    def close(self) -> None:
        for group in self.groups:
            group.close()


class Movers:
    """Sender and receiver processes, as a context manager; without receivers, lanes end in this process."""

    def __init__(self, spec: CacheSpec, senders: int = 2, receivers: int = 2, capacity: int = 1 << 26, **options):
        options = {"message_bytes": 1 << 18} | options
        self.outbox = SharedOutbox(spec, capacity, processes=senders, **options)
        self.receivers = Receivers(receivers, options.get("security", Security())) if receivers else None

    def __enter__(self) -> "Movers":
        self.outbox.start()
        if self.receivers is not None:
            self.receivers.start()
        return self

    def __exit__(self, *_) -> None:
        if self.receivers is not None:
            self.receivers.close()
        self.outbox.stop(0)

    def send(self, cache: Cache, keys, finish: bool = True, **options) -> Ticket:
        ticket = self.outbox.open(cache.length, **options)
        for key in keys:
            self.outbox.put(ticket, cache.segment(key))
        if finish:
            self.outbox.finish(ticket)
        return ticket

    def pull(self, ticket: Ticket, spec: CacheSpec, length: int, on_block, addresses=None, **options) -> Pull:
        addresses = addresses or list(self.outbox.shares(ticket).result(5).values())
        connect = LaneGroup if self.receivers is None else self.receivers.connect
        return Pull(ticket, Puller(spec, length, on_block, **options), [connect(address, 1, probe=False) for address in addresses])

    def fetch(self, ticket: Ticket, cache: Cache, **options):
        """Pulls, compares and releases."""
        sink = Sink(cache.spec, cache.length)
        counters = self.pull(ticket, cache.spec, cache.length, sink, **options).finish(cache.spec.bytes(cache.length))
        sink.check(cache)
        self.outbox.release(ticket.id, ticket.epoch)
        return counters

    def regions_taken(self) -> int:
        with self.outbox.changed:
            self.outbox._collect()
            return len(self.outbox._users)


class LaneWire:
    """A lane spoken by hand."""

    def __init__(self, address: str):
        self._channel = grpc.insecure_channel(address, LANE_CHANNEL_OPTIONS)
        self._said: queue.SimpleQueue = queue.SimpleQueue()
        self.call = self._channel.stream_stream(METHOD)(iter(self._said.get, None), timeout=20)

    def __enter__(self) -> "LaneWire":
        return self

    def __exit__(self, *_) -> None:
        self._said.put(None)
        self.call.cancel()
        self._channel.close()

    def say(self, *said: frames.Frame) -> None:
        for frame in said:
            self._said.put(frames.encode(frame))

    def say_bytes(self, message: bytes) -> None:
        self._said.put(message)

    def hang_up(self) -> None:
        self._said.put(None)

    def hear(self) -> frames.Frame | tuple[wire.Header, bytes]:
        message = next(self.call)
        if message[:4] != wire.MAGIC:
            return frames.decode(message)
        header, payload = wire.decode(message)
        return header, bytes(payload)


def pull(ticket: Ticket, spec: CacheSpec, length: int, addresses: Sequence[str], on_block, lanes: int = 1, **kwargs) -> Pull:
    return Pull(ticket, Puller(spec, length, on_block, **kwargs), [LaneGroup(address, lanes, probe=False) for address in addresses])


def wait_until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.005)
