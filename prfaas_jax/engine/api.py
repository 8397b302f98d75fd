"""The engine's edge: jobs in, events out. No jax types cross it, so a profiled engine can stand in for a real one."""

import dataclasses
from collections.abc import Callable, Collection, Sequence
from typing import Protocol

import numpy as np

from prfaas_jax.errors import InvalidInput, PrfaasError
from prfaas_jax.kvcache.codecs import AS_CACHED, CacheCodec
from prfaas_jax.kvcache.segments import Segment, SegmentKey
from prfaas_jax.kvcache.spec import CacheSpec


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn and when to stop.

    Attributes:
        temperature: 0 means greedy; otherwise logits are divided by it.
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: keep the smallest set of likeliest tokens whose mass reaches top_p; 1 keeps all. Applied after top_k.
        seed: the sample at absolute position p uses fold_in(key(seed), p), whatever the placement or batch.
        max_new_tokens: at least 1; the token drawn by prefill counts.
        stop_token_ids: generation ends after any of these; the stop token is the last token reported.
        return_logits: also hand out the full logits [V] that each token was drawn from.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    max_new_tokens: int = 16
    stop_token_ids: tuple[int, ...] = ()
    return_logits: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise InvalidInput("temperature", self.temperature, "a finite number >= 0 (0 is greedy)")
        if self.top_k < 0:
            raise InvalidInput("top_k", self.top_k, "an integer >= 0 (0 keeps every token)")
        if not 0 < self.top_p <= 1:
            raise InvalidInput("top_p", self.top_p, "a number in (0, 1]")
        if not 0 <= self.seed < 2**32:
            raise InvalidInput("seed", self.seed, "an integer in [0, 2**32)")
        if self.max_new_tokens < 1:
            raise InvalidInput("max_new_tokens", self.max_new_tokens, "an integer >= 1")


@dataclasses.dataclass(frozen=True)
class Job:
    """One request as an engine sees it.

    Attributes:
        ticket: unique within the engine.
        prompt: token ids.
        sampling: how tokens are drawn.
        codec: how the cache is written where it leaves an engine or enters one.
        held_tokens: the receiver has the cache of this many first tokens: they are computed, and do not leave.
    """

    ticket: str
    prompt: tuple[int, ...]
    sampling: SamplingParams
    codec: CacheCodec = AS_CACHED
    held_tokens: int = 0


def check_prompt(prompt: Sequence[int], vocab_size: int, max_tokens: int) -> None:
    """Raises InvalidInput for an empty prompt, one of more than `max_tokens` tokens, or an id outside the vocabulary."""
    if not prompt:
        raise InvalidInput("prompt", prompt, "at least one token id")
    if len(prompt) > max_tokens:
        raise InvalidInput("prompt length", len(prompt), f"at most {max_tokens} tokens")
    bad = next((t for t in prompt if not 0 <= t < vocab_size), None)
    if bad is not None:
        raise InvalidInput("prompt token id", bad, f"an id in [0, {vocab_size})")


def check_job(job: Job, vocab_size: int, max_length: int) -> None:
    """As `check_prompt`, and prompt + max_new_tokens must not pass `max_length`."""
    check_prompt(job.prompt, vocab_size, max_length)
    if len(job.prompt) + job.sampling.max_new_tokens > max_length:
        total = f"{len(job.prompt)} + {job.sampling.max_new_tokens}"
        raise InvalidInput("prompt length + max_new_tokens", total, f"a sum of at most {max_length}")


def check_transfer(job: Job, spec: CacheSpec, codecs: Collection[str]) -> None:
    """Raises InvalidInput for more held tokens than the prompt has, or a codec that is not among `codecs` for some kind that is cached."""
    if not 0 <= job.held_tokens <= len(job.prompt):
        raise InvalidInput("held_tokens", job.held_tokens, f"a number of the prompt's {len(job.prompt)} tokens")
    if not job.codec.names(spec) <= {*codecs}:
        raise InvalidInput("codec", str(job.codec), f"one that this engine has programs for: {('none', *codecs)} (option codecs)")


# --- events; an engine delivers them in order to the job's sink, from its own thread -------------------------------------


@dataclasses.dataclass(frozen=True)
class Admitted:
    """Pages are reserved; nothing computed yet. Of the prompt's first `held_tokens` they hold the cache already."""

    held_tokens: int = 0


@dataclasses.dataclass(frozen=True)
class PrefillProgress:
    """The first `tokens` prompt tokens have been computed."""

    tokens: int


@dataclasses.dataclass(frozen=True)
class SegmentReady:
    """A segment of the cache may leave, written as the job's codec says: its payload has `key.nbytes(codec.wire_spec(spec))` bytes."""

    segment: Segment


@dataclasses.dataclass(frozen=True)
class Token:
    """One drawn token. `logits` is [V] float32 only when asked for."""

    token: int
    logprob: float
    logits: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class PrefillDone:
    """Every segment has been handed out.

    Attributes:
        first: what the prompt's last position drew.
        queue_s: from submission until the first chunk was dispatched.
        compute_s: from then until the last part of the prompt was computed; segments may have been handed out after that, and what of the
            transfer comes later is exposed.
    """

    first: Token
    queue_s: float
    compute_s: float


@dataclasses.dataclass(frozen=True)
class Committed:
    """Every cache byte is in place and the block-table row is published; tokens follow."""

    admit_s: float


@dataclasses.dataclass(frozen=True)
class Finished:
    """The job is over; its pages are free. `reason` is "stop", "length" or "cancelled"."""

    reason: str


@dataclasses.dataclass(frozen=True)
class Failed:
    """The job is over; its pages are free."""

    error: PrfaasError


Event = Admitted | PrefillProgress | SegmentReady | Token | PrefillDone | Committed | Finished | Failed
Sink = Callable[[Event], None]


@dataclasses.dataclass(frozen=True)
class InstanceLoad:
    """Prefill work on one instance, waiting or running.

    Attributes:
        free_in_s: seconds until it is done, 0 where the engine cannot tell yet.
        jobs: prompts.
        fresh: of these, the ones of which no chunk has been computed yet.
    """

    free_in_s: float
    jobs: int
    fresh: int


@dataclasses.dataclass(frozen=True)
class EngineStatus:
    """For health, routing and leak tests; state slots are 0 for a model that keeps no windows or states.

    `instances` are those that prefill and take work; `decode_slots` of requests can decode together, and `decode_waiting` have their cache
    in place and wait to.
    """

    running: int
    waiting: int
    pages_free: int
    pages_total: int
    compiles_after_warmup: int
    local_prefills: int = 0
    tokens_prefilled: int = 0
    tokens_decoded: int = 0
    state_slots_free: int = 0
    state_slots_total: int = 0
    instances: tuple[InstanceLoad, ...] = ()
    decode_slots: int = 0
    decode_waiting: int = 0


class PrefillEngine(Protocol):
    """Computes prompts and hands out their cache. `codecs` are the names, besides "none", that it has programs for."""

    spec: CacheSpec
    fingerprint: str
    codecs: tuple[str, ...]

    def submit(self, job: Job, sink: Sink) -> None:
        """Queues a prompt. Events: Admitted, (PrefillProgress | SegmentReady)*, PrefillDone; or Failed / Finished("cancelled").

        Raises InvalidInput when the job can never run here, also for its codec, and Exhausted when the queue is full.
        """
        ...

    def cancel(self, ticket: str) -> None:
        """Stops the job within one chunk; unknown tickets are ignored."""
        ...

    def status(self) -> EngineStatus:
        """Current load."""
        ...

    def close(self) -> None:
        """Stops the engine thread; outstanding jobs fail."""
        ...


class DecodeEngine(Protocol):
    """Owns the paged cache of running requests and generates their tokens. `codecs` as of a PrefillEngine.

    `codec_rates` are what these were measured to do here: (encode, decode) canonical bytes per second by name.
    """

    spec: CacheSpec
    fingerprint: str
    codecs: tuple[str, ...]
    codec_rates: dict[str, tuple[float, float]]

    def reserve(self, job: Job, sink: Sink) -> None:
        """Queues for pages for prompt + max_new_tokens, and a state slot; Admitted when they are there.

        Then exactly one of: `prefill_local`, or `ingest`* followed by `commit`. Raises InvalidInput or Exhausted.
        """
        ...

    def prefill_local(self, ticket: str) -> None:
        """Computes the prompt here, straight into the reserved pages; then PrefillDone, Committed, Token*, Finished."""
        ...

    def ingest(self, ticket: str, key: SegmentKey, block: np.ndarray, done: Callable[[], None]) -> None:
        """Queues a verified block `[layers, tokens, all heads, width]`, of any layers and tokens, for the ticket's own pages or slot.

        Dtype and width are those of the job's codec; bfloat16 travels as uint16 views. `done` is called from the engine thread once
        `block` may be reused.
        """
        ...

    def commit(self, ticket: str, first: Token) -> None:
        """All bytes are ingested: publish the row and go on from `first`. Then Committed, Token*, Finished."""
        ...

    def abort(self, ticket: str, reason: str = "cancelled") -> None:
        """Ends the job in any phase: Finished(reason). Unknown tickets are ignored."""
        ...

    def status(self) -> EngineStatus:
        """Current load."""
        ...

    def close(self) -> None:
        """Stops the engine thread; outstanding jobs fail."""
        ...
