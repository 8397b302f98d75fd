"""Everything that shapes an engine, as plain data: what flags and configs fill in."""

import dataclasses
from typing import Literal

from prfaas_jax.errors import InvalidInput
from prfaas_jax.kvcache.codecs import CODEC_NAMES
from prfaas_jax.scheduling.batching import MIN_PREFILL_TOKENS


@dataclasses.dataclass(frozen=True)
class EngineOptions:
    """Shape of one engine.

    Attributes:
        checkpoint: what `models.checkpoint.load` accepts.
        mesh: "data:1,model:1".
        attention: "sharded", or "replicated" for models whose heads the model axis does not divide.
        dtype: "float32" or "bfloat16" for weights, activations and cache; None takes the checkpoint's.
        page_size: tokens per page.
        pages: pages per layer and data shard, dummy page included; None takes enough for `max_rows` requests of `max_length`.
        slots: windows and states per layer and data shard, dummy slot included; None takes enough for `max_rows` requests. Models that
            keep all tokens in every layer need none.
        chunk: prompt tokens per row and prefill step; chunks start at absolute multiples of it.
        segments: parts of the stack, at least, whose cache leaves one after another within a prefill step; None takes what suits the model
            and platform, 1 makes the step one program. Compilers fuse one program differently from several (lightning attention on a CPU
            differs in the last bits), so a decode engine's own prefill is cut the same way, and bit-equal KV asks the same of both sides.
        max_length: prompt plus new tokens of one request.
        max_rows: requests that decode at once.
        max_prefill_rows: requests that share one prefill step.
        max_queue: requests that may wait for pages.
        ingest_tokens: tokens per scatter of received KV, if they are of all layers; of fewer layers it takes as many more.
        ingest_bytes_per_step: received KV scattered between two decode steps at most, so that running decodes keep their pace.
        codecs: what the cache may be written as where it leaves or enters, besides "none": names of `kvcache.codecs.CODEC_NAMES` joined by
            commas. Each costs programs.
        paged_attention: implementation by name; None takes the platform's default.
        warmup: compile every program at start-up.
    """

    checkpoint: str
    mesh: str = "data:1,model:1"
    attention: Literal["sharded", "replicated"] = "sharded"
    dtype: str | None = None
    page_size: int = 16
    pages: int | None = None
    slots: int | None = None
    chunk: int = 256
    segments: int | None = None
    max_length: int = 4096
    max_rows: int = 32
    max_prefill_rows: int = 4
    max_queue: int = 64
    ingest_tokens: int = 64
    ingest_bytes_per_step: int = 3 << 20
    codecs: str = ""
    paged_attention: str | None = None
    warmup: bool = True

    def __post_init__(self) -> None:
        counts = ("page_size", "chunk", "max_length", "max_rows", "max_prefill_rows", "max_queue", "ingest_tokens")
        for field in (*counts, "ingest_bytes_per_step"):
            value = getattr(self, field)
            if not isinstance(value, int) or value < 1:
                raise InvalidInput(field, value, "a positive integer")
        if self.segments is not None and self.segments < 1:
            raise InvalidInput("segments", self.segments, "a positive integer, or None for what suits the model")
        if not set(self.codec_names) <= set(CODEC_NAMES):
            raise InvalidInput("codecs", self.codecs, f"names joined by commas, of {CODEC_NAMES}")
        if self.chunk % MIN_PREFILL_TOKENS:
            raise InvalidInput("chunk", self.chunk, f"a multiple of {MIN_PREFILL_TOKENS}")
        if self.page_size & (self.page_size - 1) or self.page_size > 256:
            raise InvalidInput("page_size", self.page_size, "a power of two up to 256")
        if self.attention not in ("sharded", "replicated"):
            raise InvalidInput("attention", self.attention, "sharded or replicated")
        if self.pages is not None and self.pages < 2:
            raise InvalidInput("pages", self.pages, "at least 2 (page 0 is a dummy)")
        if self.slots is not None and self.slots < 2:
            raise InvalidInput("slots", self.slots, "at least 2 (slot 0 is a dummy)")

    @property
    def codec_names(self) -> tuple[str, ...]:
        """`codecs`, one by one."""
        return tuple(self.codecs.split(",")) if self.codecs else ()

    @property
    def pages_per_request(self) -> int:
        """Width of a block-table row."""
        return -(-self.max_length // self.page_size)

    def pages_per_shard(self, shards: int) -> int:
        """Pages per layer of one data shard."""
        if self.pages is not None:
            return self.pages
        return 1 + self.pages_per_request * -(-self.max_rows // shards)

    def slots_per_shard(self, shards: int) -> int:
        """Slots per layer of one data shard, for models that keep windows or states."""
        return 1 + -(-self.max_rows // shards) if self.slots is None else self.slots
