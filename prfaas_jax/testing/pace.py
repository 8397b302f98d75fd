"""Do running decodes keep their pace while another request's KV arrives? Client-side gaps between tokens, with and without."""

import concurrent.futures
import dataclasses
import itertools
import time
from collections.abc import Iterator

import grpc
import numpy as np

from prfaas_jax.serving.proto import generation_pb2, generation_pb2_grpc
from prfaas_jax.transfer.channel import CHANNEL_OPTIONS
from prfaas_jax.transfer.security import open_channel

_TIMEOUT_S = 600.0
# Streams are up to speed after this many tokens.
_WARM_TOKENS = 4


@dataclasses.dataclass(frozen=True)
class Gap:
    """One inter-token gap of one stream: `arriving` when KV of another request was arriving during it."""

    round: int
    stream: int
    arriving: bool
    seconds: float


class Pace:
    """Drives one decode server: `streams` requests that decode, and one remote request of `tokens` tokens that comes on top."""

    def __init__(self, decode: str, prefill: str, vocab: int, streams: int, tokens: int):
        self._channel = open_channel(decode, CHANNEL_OPTIONS)
        self._stub = generation_pb2_grpc.GenerationStub(self._channel)
        self._prefill, self._vocab, self._streams, self._tokens = prefill, vocab, streams, tokens
        self._pool = concurrent.futures.ThreadPoolExecutor(streams)

    def close(self) -> None:
        """Ends what is open."""
        self._channel.close()
        self._pool.shutdown()

    def round(self, number: int, arrivals: int, quiet_s: float) -> Iterator[Gap]:
        """`quiet_s` seconds of decoding undisturbed, then as long as `arrivals` remote requests take, one after the other."""
        calls = [self._stub.Generate(self._request(f"{number}/{i}", 64, 900), timeout=_TIMEOUT_S) for i in range(self._streams)]
        times: list[list[float]] = [[] for _ in calls]
        readers = [self._pool.submit(_read, call, seen) for call, seen in zip(calls, times, strict=True)]
        while any(len(seen) < _WARM_TOKENS for seen in times):
            for reader in readers:
                if reader.done():
                    reader.result()
            time.sleep(0.01)
        began = time.monotonic()
        time.sleep(quiet_s)
        arrived = time.monotonic()
        for i in range(arrivals):
            for event in self._stub.Generate(self._request(f"{number}+{i}", self._tokens, 1, self._prefill), timeout=_TIMEOUT_S):
                if event.HasField("usage"):
                    assert event.usage.placement == "remote" and event.usage.kv_bytes_moved == event.usage.kv_bytes_expected
        ended = time.monotonic()
        for call in calls:
            call.cancel()
        for reader in readers:
            reader.result()
        for stream, seen in enumerate(times):
            for a, b in itertools.pairwise(seen):
                if began <= a and b <= ended:
                    yield Gap(number, stream, b > arrived, b - a)

    def _request(self, seed: str, length: int, new_tokens: int, prefill: str = "") -> generation_pb2.GenerateRequest:
        prompt = np.random.default_rng(list(seed.encode())).integers(0, self._vocab, length)
        request = generation_pb2.GenerateRequest(
            token_ids=generation_pb2.TokenIds(ids=prompt.tolist()), max_new_tokens=new_tokens, ignore_eos=True
        )
        if prefill:
            request.placement.CopyFrom(generation_pb2.Placement(prefill_address=prefill, reason="pace"))
        return request


def _read(call: grpc.Call, seen: list[float]) -> None:
    try:
        seen.extend(time.monotonic() for event in call if event.token.HasField("token"))
    except grpc.RpcError as error:
        if error.code() is not grpc.StatusCode.CANCELLED:
            raise


def percentiles(gaps: list[Gap], arriving: bool) -> tuple[float, float]:
    """p50 and p99 in milliseconds."""
    p50, p99 = np.percentile([g.seconds * 1e3 for g in gaps if g.arriving == arriving], (50, 99))
    return float(p50), float(p99)
