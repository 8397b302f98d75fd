"""How small codecs make a real cache, and how fast: device codecs by their programs' wall time, zstd by one core's."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from prfaas_jax.errors import TransferError
from prfaas_jax.kvcache.codecs import CacheCodec
from prfaas_jax.kvcache.spec import DTYPE_BYTES, CacheSpec
from prfaas_jax.models.caching import Added
from prfaas_jax.testing.codec_quality import decode_cache, encode_cache
from prfaas_jax.transfer.codec_choice import CodecRate
from prfaas_jax.transfer.compression import compress, decompress
from prfaas_jax.transfer.wire import MESSAGE_BYTES

REPEATS = 7


@dataclasses.dataclass(frozen=True)
class Measured:
    """A codec on one request's cache.

    Attributes:
        rate: what the break-even rule takes; ratio over the cache's own bytes.
        ratio_bf16: bytes of the same cache in bfloat16, over bytes on the wire.
    """

    rate: CodecRate
    ratio_bf16: float


def device_codec(codec: CacheCodec, spec: CacheSpec, added: Added) -> Measured:
    """Encodes and decodes what a forward pass over one sequence left behind; medians of `REPEATS`, on the device where it lies."""
    wire = jax.block_until_ready(encode_cache(codec, spec, added))
    encode_s = _median_s(lambda: jax.block_until_ready(encode_cache(codec, spec, added)))
    jax.block_until_ready(decode_cache(codec, spec, wire))
    decode_s = _median_s(lambda: jax.block_until_ready(decode_cache(codec, spec, wire)))
    sent = sum(x.nbytes for new, coded in zip(added, wire, strict=True) for x in coded or new)
    return _measured(str(codec), added, sent, encode_s, decode_s, lossy=codec.lossy)


def host_zstd(name: str, added: Added) -> Measured:
    """Compresses the same in messages as a lane cuts them, on the calling thread; raises TransferError if a byte comes back changed."""
    messages = list(_messages(added))
    frames = [compress(payload, item_bytes) for payload, item_bytes in messages]
    for (payload, item_bytes), frame in zip(messages, frames, strict=True):
        if decompress(frame, len(payload), item_bytes) != payload:
            raise TransferError("zstd: a message came back changed")
    encode_s = _median_s(lambda: [compress(payload, item_bytes) for payload, item_bytes in messages])
    decode_s = _median_s(lambda: [decompress(f, len(p), item) for (p, item), f in zip(messages, frames, strict=True)])
    sent = sum(min(len(frame), len(payload)) for (payload, _), frame in zip(messages, frames, strict=True))
    return _measured(name, added, sent, encode_s, decode_s, lossy=False)


def nbytes(added: Added) -> int:
    """Bytes of all that a forward pass added."""
    return sum(x.nbytes for new in added for x in new)


def in_bfloat16_bytes(added: Added) -> int:
    """Bytes that the same would have in bfloat16."""
    return sum(x.size for new in added for x in new) * DTYPE_BYTES["bfloat16"]


def _measured(name: str, added: Added, sent: int, encode_s: float, decode_s: float, lossy: bool) -> Measured:
    canonical = nbytes(added)
    rate = CodecRate(name, canonical / sent, canonical / encode_s, canonical / decode_s, lossy)
    return Measured(rate, in_bfloat16_bytes(added) / sent)


def _messages(added: Added) -> Iterator[tuple[bytes, int]]:
    """(payload, bytes of an element)."""
    for tensor in (x for new in added for x in new):
        payload = np.asarray(tensor).tobytes()
        for at in range(0, len(payload), MESSAGE_BYTES):
            yield payload[at : at + MESSAGE_BYTES], tensor.dtype.itemsize


def _median_s(work: Callable[[], Any]) -> float:
    taken = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)
