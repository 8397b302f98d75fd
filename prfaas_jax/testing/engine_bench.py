"""Speed of a Runner's steps as a server uses them (plan, execute, fetch tokens), in turns with the same work by an oracle."""

import dataclasses
import statistics
import time
from collections.abc import Iterable, Iterator

import numpy as np
from tqdm import tqdm

from prfaas_jax.engine.api import SamplingParams
from prfaas_jax.engine.plan import DecodeInput, PrefillInput, plan_decode, plan_prefill
from prfaas_jax.engine.runner import Runner
from prfaas_jax.errors import EngineFailed
from prfaas_jax.scheduling.batching import decode_bucket
from prfaas_jax.testing.hf_oracle import HfOracle

GREEDY = SamplingParams()


@dataclasses.dataclass(frozen=True)
class Sample:
    """One measurement: `tokens` in `seconds`. `phase` is "prefill" (size: prompt tokens) or "decode" (size: batch)."""

    side: str
    phase: str
    size: int
    repeat: int
    tokens: int
    seconds: float


def prompt(length: int, vocab: int, seed: int = 0) -> list[int]:
    """Random token ids."""
    return np.random.default_rng([length, seed]).integers(0, vocab, length).tolist()


class EngineBench:
    """Drives one Runner with pages handed out by position; `context` is the prompt length of decode rows."""

    def __init__(self, runner: Runner, context: int = 512):
        self.runner, self.context = runner, context
        self._pages_per_row = runner.options.pages_per_request
        self._first: dict[int, int] = {}

    def _pages(self, row: int) -> np.ndarray:
        return np.arange(1 + row * self._pages_per_row, 1 + (row + 1) * self._pages_per_row, dtype=np.int32)

    def _run_prompt(self, tokens: list[int], row: int) -> int:
        runner, chunk, start = self.runner, self.runner.options.chunk, 0
        while start < len(tokens):
            count = min(chunk, len(tokens) - start)
            bucket = next(b for b in runner.prefill_buckets if b.rows == 1 and b.tokens >= count)
            inputs = [PrefillInput(0, tokens, start, count, self._pages(row), GREEDY, 1 + row, 1 + row)]
            drawn, _ = runner.prefill(plan_prefill(inputs, bucket.rows, bucket.tokens, runner.geometry.width))
            start += count
        return int(np.asarray(drawn.token)[0])

    def prefill(self, tokens: list[int]) -> tuple[float, int]:
        """Seconds for one prompt alone, chunk by chunk, and its greedy next token."""
        start = time.perf_counter()
        token = self._run_prompt(tokens, 0)
        return time.perf_counter() - start, token

    def fill(self, prompts: list[list[int]]) -> None:
        """Computes the cache of decode rows; needed once, as long as no prefill measurement runs over row 0."""
        self._first = {row: self._run_prompt(tokens, row) for row, tokens in enumerate(prompts)}

    def decode(self, batch: int, steps: int) -> tuple[list[float], list[int]]:
        """Seconds of each of `steps` greedy steps behind the first `batch` prompts, and the tokens of the last one."""
        rows = decode_bucket(batch, self.runner.decode_buckets)
        tokens, seconds = [self._first[row] for row in range(batch)], []
        for step in range(steps):
            start = time.perf_counter()
            inputs = [DecodeInput(r, tokens[r], self.context + step, self._pages(r), GREEDY, 1 + r) for r in range(batch)]
            drawn = self.runner.decode(plan_decode(inputs, rows, self.runner.geometry.width))
            tokens = np.asarray(drawn.token)[:batch].tolist()
            np.asarray(drawn.logprob)
            seconds.append(time.perf_counter() - start)
        return seconds, tokens


def compare(
    bench: EngineBench, oracle: HfOracle | None, lengths: Iterable[int], batches: Iterable[int], repeats: int, steps: int = 8
) -> Iterator[Sample]:
    """Measures both sides in turns (A B A B ...), after one unmeasured round each.

    Raises EngineFailed when the two disagree on a prompt's next token: then it was not the same work.
    """
    lengths, batches = list(lengths), list(batches)
    vocab = bench.runner.config.vocab_size
    progress = tqdm(total=(repeats + 1) * (len(lengths) + len(batches)), desc="measuring", unit="round", leave=False)
    with progress:
        for length in lengths:
            tokens = prompt(length, vocab)
            for repeat in range(-1, repeats):
                seconds, token = bench.prefill(tokens)
                if repeat >= 0:
                    yield Sample("ours", "prefill", length, repeat, length, seconds)
                if oracle is not None:
                    seconds, theirs = oracle.prefill(tokens)
                    _check_same("prefill", length, [token], [theirs])
                    if repeat >= 0:
                        yield Sample("hf", "prefill", length, repeat, length, seconds)
                progress.update()
        prompts = [prompt(bench.context, vocab, seed) for seed in range(max(batches, default=0))]
        bench.fill(prompts)
        for batch in batches:
            for repeat in range(-1, repeats):
                times, last = bench.decode(batch, steps)
                if repeat >= 0:
                    yield Sample("ours", "decode", batch, repeat, batch, statistics.median(times))
                if oracle is not None:
                    times, their_last = oracle.decode(prompts[:batch], steps)
                    _check_same("decode", batch, last, their_last)
                    if repeat >= 0:
                        yield Sample("hf", "decode", batch, repeat, batch, statistics.median(times))
                progress.update()


def _check_same(phase: str, size: int, ours: list[int], theirs: list[int]) -> None:
    """Random weights leave near-ties, so a few of many rows may part; more means different weights or positions."""
    differing = sum(a != b for a, b in zip(ours, theirs, strict=True))
    if differing > len(ours) // 4:
        raise EngineFailed(f"{phase} {size}: {differing} of {len(ours)} greedy tokens differ from the oracle's: not the same work")


def rates(samples: Iterable[Sample], side: str, phase: str) -> dict[str, float]:
    """Median tokens per second by size."""
    grouped: dict[int, list[float]] = {}
    for s in samples:
        if (s.side, s.phase) == (side, phase):
            grouped.setdefault(s.size, []).append(s.tokens / s.seconds)
    return {str(size): round(statistics.median(values), 2) for size, values in grouped.items()}


def ratios(samples: list[Sample]) -> dict[str, dict[str, float]] | None:
    """Ours over the oracle's, of medians, by phase and size; None without an oracle."""
    result = {}
    for phase in ("prefill", "decode"):
        ours, theirs = rates(samples, "ours", phase), rates(samples, "hf", phase)
        result[f"{phase}_tok_s"] = {size: round(ours[size] / theirs[size], 3) for size in theirs}
    return result if any(result.values()) else None
