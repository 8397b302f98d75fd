"""Which codec, if any, brings a byte of the cache across a link soonest: a pure rule over measured rates."""

import dataclasses
import math
from collections.abc import Sequence

from prfaas_jax.errors import InvalidInput

NONE = "none"


@dataclasses.dataclass(frozen=True)
class CodecRate:
    """What a codec was measured to do; rates in canonical bytes, those of the cache before any codec.

    Attributes:
        name: of the codec.
        ratio: canonical bytes over bytes on the wire.
        encode_bytes_per_s: on the sending side.
        decode_bytes_per_s: on the receiving side; infinite for either, where it costs nothing.
        lossy: whether a bit may be lost.
    """

    name: str
    ratio: float
    encode_bytes_per_s: float
    decode_bytes_per_s: float
    lossy: bool

    def __post_init__(self) -> None:
        if not self.name or self.name == NONE:
            raise InvalidInput("codec name", self.name, f"a name, and not {NONE!r}, which is what codecs are compared with")
        _positive(f"{self.name} ratio", self.ratio, finite=True)
        _positive(f"{self.name} encode_bytes_per_s", self.encode_bytes_per_s)
        _positive(f"{self.name} decode_bytes_per_s", self.decode_bytes_per_s)

    def seconds_per_byte(self, link_bytes_per_s: float, overlapped: bool) -> float:
        """Time for one canonical byte: of encode, link and decode the sum, or while they overlap on other bytes the slowest."""
        parts = 1 / self.encode_bytes_per_s, 1 / (self.ratio * link_bytes_per_s), 1 / self.decode_bytes_per_s
        return max(parts) if overlapped else sum(parts)

    def break_even_bytes_per_s(self, overlapped: bool) -> float:
        """The link rate below which it pays and from which on it does not; 0 when it never pays, as it makes nothing smaller.

        In sequence it pays iff (1 - 1/ratio) / link > 1/encode + 1/decode, overlapped iff the link is slower than both of them.
        """
        if self.ratio <= 1:
            return 0.0
        if overlapped:
            return min(self.encode_bytes_per_s, self.decode_bytes_per_s)
        spent = 1 / self.encode_bytes_per_s + 1 / self.decode_bytes_per_s
        return (1 - 1 / self.ratio) / spent if spent else math.inf

    def pays(self, link_bytes_per_s: float, overlapped: bool) -> bool:
        """Whether it beats sending the bytes as they are. What pays at some rate pays at every slower one."""
        return link_bytes_per_s < self.break_even_bytes_per_s(overlapped)


@dataclasses.dataclass(frozen=True)
class Choice:
    """A codec's name, or `NONE`; the time that a canonical byte takes with it; and why it was chosen."""

    name: str
    seconds_per_byte: float
    reason: str


def choose(link_bytes_per_s: float, codecs: Sequence[CodecRate], allow_lossy: bool, overlapped: bool) -> Choice:
    """The codec with the least time per canonical byte among those that pay and are allowed, else none.

    Of equals a lossless one, then the earlier one.

    Args:
        link_bytes_per_s: measured rate of the link.
        codecs: what both sides have, as measured where they run.
        allow_lossy: without it a lossy codec is never chosen, whatever it saves.
        overlapped: encoding and decoding run while other bytes are on the link.

    Raises InvalidInput for a link rate that is not positive and finite, or two codecs of one name.
    """
    _positive("link_bytes_per_s", link_bytes_per_s, finite=True)
    if len({codec.name for codec in codecs}) < len(codecs):
        raise InvalidInput("codecs", [codec.name for codec in codecs], "names that differ")
    plain = 1 / link_bytes_per_s
    allowed = [codec for codec in codecs if allow_lossy or not codec.lossy]
    link = f"at {link_bytes_per_s / 1e6:.4g} MB/s"
    paying = [codec for codec in allowed if codec.pays(link_bytes_per_s, overlapped)]
    if not paying:
        if not allowed:
            return Choice(
                NONE, plain, f"{link} only lossy codecs are to be had, and none is allowed" if codecs else f"{link} no codec is to be had"
            )
        limits = ", ".join(f"{codec.name} below {codec.break_even_bytes_per_s(overlapped) / 1e6:.4g} MB/s" for codec in allowed)
        return Choice(NONE, plain, f"{link} no codec pays: {limits}")
    best = min(paying, key=lambda codec: (codec.seconds_per_byte(link_bytes_per_s, overlapped), codec.lossy))
    seconds = best.seconds_per_byte(link_bytes_per_s, overlapped)
    return Choice(best.name, seconds, f"{link} {best.name} takes {seconds * 1e9:.4g} ns per byte, none {plain * 1e9:.4g}")


def _positive(field: str, value: float, finite: bool = False) -> None:
    if not value > 0 or (finite and math.isinf(value)):
        raise InvalidInput(field, value, "a positive number" + (", not infinite" if finite else ""))
