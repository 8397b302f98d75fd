"""A batch of prompts through one decode engine with its own prefill: no network, the reference that disaggregation is held to."""

import dataclasses
import queue
import time
from collections.abc import Sequence

import numpy as np

from prfaas_jax.engine.api import (
    Admitted,
    Committed,
    DecodeEngine,
    Event,
    Failed,
    Finished,
    Job,
    PrefillDone,
    SamplingParams,
    Sink,
    Token,
)
from prfaas_jax.errors import EngineFailed


@dataclasses.dataclass
class Completion:
    """What a prompt became. Times are seconds since submission.

    Attributes:
        tokens: drawn ids, a stop token included.
        logprobs: natural log-probability of each.
        logits: [n, V] float32, row j being what token j was drawn from; None unless asked for.
        finish_reason: "stop" or "length".
        ttft_s: until the first token.
        parts: what ttft_s is the sum of.
    """

    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    logits: np.ndarray | None = None
    finish_reason: str = ""
    ttft_s: float = 0.0
    parts: dict[str, float] = dataclasses.field(default_factory=dict)


def complete(
    engine: DecodeEngine, prompts: Sequence[Sequence[int]], sampling: SamplingParams, timeout_s: float = 600.0
) -> list[Completion]:
    """Submits all prompts at once and waits for all; `timeout_s` bounds the wait for any one event.

    Raises InvalidInput or Exhausted when a prompt is not accepted, EngineFailed when one does not finish; the others are aborted.
    """
    events: queue.SimpleQueue[tuple[int, float, Event]] = queue.SimpleQueue()
    jobs = [Job(f"offline-{i}", tuple(prompt), sampling) for i, prompt in enumerate(prompts)]
    start = time.monotonic()
    try:
        for i, job in enumerate(jobs):
            engine.reserve(job, _sink(events, i, start))
        return _collect(engine, jobs, events, timeout_s)
    finally:
        for job in jobs:
            engine.abort(job.ticket)


def _sink(events: "queue.SimpleQueue[tuple[int, float, Event]]", index: int, start: float) -> Sink:
    return lambda event: events.put((index, time.monotonic() - start, event))


def _collect(
    engine: DecodeEngine, jobs: Sequence[Job], events: "queue.SimpleQueue[tuple[int, float, Event]]", timeout_s: float
) -> list[Completion]:
    done = [Completion() for _ in jobs]
    logits: list[list[np.ndarray]] = [[] for _ in jobs]
    open_jobs = len(jobs)
    while open_jobs:
        try:
            i, at, event = events.get(timeout=timeout_s)
        except queue.Empty:
            raise EngineFailed(f"no progress for {timeout_s} s with {open_jobs} of {len(jobs)} prompts unfinished") from None
        completion = done[i]
        match event:
            case Admitted():
                completion.parts["queue"] = at
                engine.prefill_local(jobs[i].ticket)
            case PrefillDone():
                completion.parts["queue"] = at - event.compute_s
                completion.parts["prefill"] = event.compute_s
            case Committed():
                completion.parts["admit"] = at - sum(completion.parts.values())
            case Token():
                if not completion.tokens:
                    completion.ttft_s = at
                    completion.parts["first_step"] = at - sum(completion.parts.values())
                completion.tokens.append(event.token)
                completion.logprobs.append(event.logprob)
                if event.logits is not None:
                    logits[i].append(event.logits)
            case Finished():
                completion.finish_reason = event.reason
                completion.logits = np.stack(logits[i]) if logits[i] else None
                open_jobs -= 1
            case Failed():
                raise EngineFailed(f"prompt {i} failed: {event.error}") from event.error
    return done
