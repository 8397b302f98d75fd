"""How a cache travels between two servers: what the options say, what both can do, and, for "auto", what pays on the link as it is."""

import dataclasses
import functools
import time
from collections.abc import Collection, Mapping

import ml_dtypes
import numpy as np

from prfaas_jax.errors import InvalidInput
from prfaas_jax.kvcache.codecs import AS_CACHED, CODECS, CacheCodec
from prfaas_jax.kvcache.spec import CacheSpec
from prfaas_jax.transfer.codec_choice import CodecRate, choose
from prfaas_jax.transfer.compression import compress, decompress
from prfaas_jax.transfer.link import LinkEstimate

AUTO, ZSTD = "auto", "zstd"
_SAMPLE_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True)
class Travel:
    """A decision: the codec, whether messages are compressed, and why."""

    codec: CacheCodec
    compressed: bool
    reason: str

    @property
    def name(self) -> str:
        """As options name it."""
        return ZSTD if self.compressed else str(self.codec)


@dataclasses.dataclass(frozen=True)
class CodecPolicy:
    """What a decode server asks for.

    Attributes:
        wanted: "none", "zstd", "auto", or a codec as in `kvcache/codecs.py`.
        allow_lossy: "auto" may pick one that loses bits.
    """

    wanted: str = "none"
    allow_lossy: bool = False

    def __post_init__(self) -> None:
        if self.wanted not in (AUTO, ZSTD):
            try:
                CacheCodec.parse(self.wanted)
            except InvalidInput as error:
                raise InvalidInput("codec", self.wanted, f"{AUTO}, {ZSTD}, {error.expected}") from error

    def decide(
        self,
        spec: CacheSpec,
        ours: Collection[str],
        theirs: Collection[str],
        link: LinkEstimate | None,
        rates: Mapping[str, tuple[float, float]],
    ) -> Travel:
        """For a cache of `spec`.

        Args:
            spec: the cache.
            ours: names of device codecs that this engine has programs for.
            theirs: and the other one.
            link: between them; None or without a rate: nothing can be known to pay.
            rates: (encode, decode) canonical bytes per second of device codecs, by name, as measured; others are no candidates.
        """
        if self.wanted == ZSTD:
            return Travel(AS_CACHED, True, "the options say so")
        if self.wanted != AUTO:
            return Travel(CacheCodec.parse(self.wanted), False, "the options say so")
        if link is None or not link.bytes_per_s:
            return Travel(AS_CACHED, False, "the link has not been measured yet")
        made: dict[str, CacheCodec] = {ZSTD: AS_CACHED}
        candidates = [zstd_rate()]
        common = set(ours) & set(theirs) & set(rates)
        length = _typical_tokens(spec)
        for codec in _combinations(spec, common):
            # The slowest of what it is made of: groups are encoded one after the other.
            encode, decode = (min(rates[name][end] for name in codec.names(spec)) for end in (0, 1))
            ratio = spec.bytes(length) / codec.wire_spec(spec).bytes(length)
            made[str(codec)] = codec
            candidates.append(CodecRate(str(codec), ratio, encode, decode, lossy=True))
        # Encoding runs while other segments are on the link.
        choice = choose(link.bytes_per_s, candidates, self.allow_lossy, overlapped=True)
        return Travel(made.get(choice.name, AS_CACHED), choice.name == ZSTD, choice.reason)


@functools.cache
def zstd_rate() -> CodecRate:
    """Of one core of this machine, on values like a cache's: normal, in bfloat16. Measured once per process, a few milliseconds."""
    sample = np.random.default_rng(0).standard_normal(_SAMPLE_BYTES // 2, np.float32).astype(ml_dtypes.bfloat16).tobytes()
    began = time.perf_counter()
    frame = compress(sample, 2)
    encoded = time.perf_counter()
    decompress(frame, len(sample), 2)
    decoded = time.perf_counter()
    return CodecRate(ZSTD, len(sample) / len(frame), len(sample) / (encoded - began), len(sample) / (decoded - encoded), lossy=False)


def _combinations(spec: CacheSpec, names: Collection[str]) -> list[CacheCodec]:
    """For each name of a byte codec that codec wherever it can be, alone and with states in bfloat16."""
    kinds = {group.cache.kind for group in spec.groups}
    found = []
    for byte in ("none", *(name for name in CODECS["paged"] if name in names)):
        for state in ("none", *(name for name in CODECS["state"] if name in names and "state" in kinds)):
            codec = CacheCodec(byte if "paged" in kinds else "none", byte if "window" in kinds else "none", state)
            if codec.lossy and codec not in found:
                found.append(codec)
    return found


def _typical_tokens(spec: CacheSpec) -> int:
    """Where tokens weigh as much as what is fixed, at least a window."""
    windows = [group.cache.window or 1 for group in spec.groups]
    per_token = spec.bytes_per_token
    return max(*windows, 1, spec.fixed_bytes // per_token if per_token else 1)
