"""Lossless compression of a message's payload on the host, for links that are slower than a core compresses (`codec_choice.py`).

zstd at its fastest ordinary level, over byte planes: first the low byte of every element, then the next. In a float's high byte sign and
exponent repeat, its low bytes are noise, and interleaved each hides the other. KV of 1,024 tokens of SmolLM2 in messages of 1 MiB, one
core of an AMD EPYC, 2026-11-27; the ratio, and GB/s of payload in and out:

    bfloat16   planes, level 1   1.46   0.50, 1.18        float32   planes, level 1   1.19   0.70, 1.48
               planes, level 3   1.41   0.26, 0.96                  planes, level 3   1.17   0.45, 1.36
               plain,  level 1   1.27   0.96, 1.17                  plain,  level 1   1.08   0.94, 1.32
               plain,  level 3   1.27   0.81, 1.23                  plain,  level 3   1.08   0.68, 1.17

Taking planes apart costs a copy on each side, at 3 GB/s; level 3 looks for longer matches, which KV does not have.
"""

import numpy as np
import zstandard

from prfaas_jax.errors import InvalidInput, TransferError
from prfaas_jax.transfer.wire import MAX_MESSAGE_BYTES

LEVEL = 1
# The format's least window: shorter payloads have one as long as themselves, or this.
_LEAST_WINDOW_BYTES = 1 << 10


def compress(payload: bytes | memoryview, item_bytes: int) -> bytes:
    """One zstd frame that `decompress` makes the same bytes of, whatever they are.

    It may be longer than the payload (by less than 1 %, at least 12 bytes): then the payload itself is what should travel.

    Args:
        payload: contiguous, at most `MAX_MESSAGE_BYTES`.
        item_bytes: size of an element; a payload that ends inside one is fine.

    Raises InvalidInput for a longer payload, or elements without size.
    """
    plain = np.frombuffer(payload, np.uint8)
    if plain.size > MAX_MESSAGE_BYTES:
        raise InvalidInput("payload bytes", plain.size, f"at most {MAX_MESSAGE_BYTES}")
    whole = _whole(plain.size, item_bytes)
    planes = plain.copy()
    planes[:whole].reshape(item_bytes, -1)[:] = plain[:whole].reshape(-1, item_bytes).T
    return zstandard.ZstdCompressor(level=LEVEL).compress(planes.data)


def decompress(frame: bytes | memoryview, nbytes: int, item_bytes: int) -> bytes:
    """What `compress` was given.

    Nothing beyond `nbytes` is ever allocated: what the frame says about its size and window is compared before it is read on.

    Args:
        frame: from the peer: not to be trusted.
        nbytes: bytes that must come out, from a header that has been checked.
        item_bytes: as for `compress`.

    Raises TransferError for a frame that is damaged, truncated, followed by more, or not of `nbytes` bytes; InvalidInput for sizes that no
    message has.
    """
    if not 0 <= nbytes <= MAX_MESSAGE_BYTES:
        raise InvalidInput("nbytes", nbytes, f"0..{MAX_MESSAGE_BYTES}")
    whole = _whole(nbytes, item_bytes)
    try:
        header = zstandard.get_frame_parameters(frame)
        if header.content_size != nbytes or header.window_size > max(nbytes, _LEAST_WINDOW_BYTES):
            claim = f"{header.content_size} bytes with a window of {header.window_size}"
            raise TransferError(f"zstd frame of {len(frame)} bytes claims {claim}, expected {nbytes} bytes")
        plain = zstandard.ZstdDecompressor().decompress(frame, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise TransferError(f"zstd frame of {len(frame)} bytes, for {nbytes}: {error}") from error
    planes = np.frombuffer(plain, np.uint8)
    payload = planes.copy()
    # Plane by plane: numpy's own transpose goes byte by byte here, at a fifth of the speed.
    for index, plane in enumerate(planes[:whole].reshape(item_bytes, -1)):
        payload[index:whole:item_bytes] = plane
    return payload.tobytes()


def _whole(nbytes: int, item_bytes: int) -> int:
    """Bytes of whole elements."""
    if item_bytes < 1:
        raise InvalidInput("item_bytes", item_bytes, "at least 1")
    return nbytes - nbytes % item_bytes
