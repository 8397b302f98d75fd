"""The prefill engine: chunks of several prompts share a step; what each part of the stack caches leaves while the next one computes."""

import collections
import dataclasses
import functools
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from prfaas_jax.engine.api import (
    Admitted,
    EngineStatus,
    Failed,
    Finished,
    InstanceLoad,
    Job,
    PrefillDone,
    PrefillProgress,
    SegmentReady,
    Sink,
    Token,
    check_prompt,
    check_transfer,
)
from prfaas_jax.engine.plan import PrefillInput, plan_prefill
from prfaas_jax.engine.runner import Leaving, Runner
from prfaas_jax.engine.steps import Drawn
from prfaas_jax.engine.thread import EngineThread
from prfaas_jax.errors import EngineFailed, Exhausted, InvalidInput
from prfaas_jax.kvcache.pages import PageAllocator, Reservation
from prfaas_jax.kvcache.segments import kept_part
from prfaas_jax.scheduling.batching import PrefillItem, choose_prefill


@dataclasses.dataclass
class Prompt:
    """A prompt on its way through prefill; `done` tokens are computed or dispatched."""

    job: Job
    sink: Sink
    arrival: int
    submitted: float
    reservation: Reservation | None = None
    done: int = 0
    last_step: int = -1
    started: float = 0.0

    def item(self) -> PrefillItem:
        """What batch formation needs to know."""
        assert self.reservation is not None
        return PrefillItem(self.job.ticket, self.done, len(self.job.prompt), self.reservation.shard, self.last_step, self.arrival)


@dataclasses.dataclass
class DispatchedStep:
    """A prefill step that has been dispatched and whose results have not been read.

    Attributes:
        rows: its prompts.
        drawn: ready when all of it has been computed.
        parts: those that have not been handed out; they become ready one after another.
        computed: when `drawn` was first seen ready, in monotonic seconds.
    """

    rows: list[tuple[Prompt, PrefillInput]]
    drawn: Drawn
    parts: collections.deque[Leaving]
    computed: float | None = None

    def computed_at(self, wait: bool = False) -> float | None:
        """When it was computed; looks again if it was not when last asked, or waits for it."""
        token: Any = self.drawn.token
        if self.computed is None and (wait or token.is_ready()):
            token.block_until_ready()
            self.computed = time.monotonic()
        return self.computed


def dispatch_prefill(
    runner: Runner, prompts: dict[str, Prompt], step: int, export: bool, dispatched: Callable[[], None] = lambda: None
) -> DispatchedStep:
    """Chooses rows among `prompts`, dispatches one step and advances the chosen prompts.

    `step` numbers the steps; without `export` what is new stays on the device. `dispatched` is called after every part.
    """
    choice = choose_prefill([p.item() for p in prompts.values()], runner.prefill_buckets, runner.options.chunk, step)
    rows = []
    for ticket, row, start, count in choice.rows:
        prompt = prompts[ticket]
        held = prompt.reservation
        assert held is not None
        if start == 0:
            prompt.started = time.monotonic()
        prompt.done, prompt.last_step = start + count, step
        rows.append((prompt, PrefillInput(row, prompt.job.prompt, start, count, held.pages, prompt.job.sampling, held.slot, held.slot)))
    plan = plan_prefill([r for _, r in rows], choice.bucket.rows, choice.bucket.tokens, runner.geometry.width)
    wanted = {
        (group.cache.kind, prompt.job.codec.of(group.cache.kind))
        for prompt, row in rows
        for group in runner.spec.groups
        if export and kept_part(group.cache, (row.start, row.start + row.valid), len(row.prompt), prompt.job.held_tokens)
    }
    drawn, parts = runner.prefill(plan, wanted, dispatched)
    return DispatchedStep(rows, drawn, collections.deque(parts))


def new_pages(runner: Runner) -> PageAllocator:
    """Accounts of the runner's pools, with everything free."""
    geometry = runner.geometry
    return PageAllocator(geometry.pages, geometry.page_size, runner.shards, geometry.slots)


def read_token(drawn: Drawn, row: int, with_logits: bool) -> Token:
    """Fetches what one row drew; waits for the step."""
    logits = np.asarray(drawn.logits)[row] if with_logits else None
    return Token(int(np.asarray(drawn.token)[row]), float(np.asarray(drawn.logprob)[row]), logits)


class Pace:
    """How fast prompts are computed, from the steps of an engine: an exponential mean over the last tokens. Written by one thread."""

    _MEMORY_TOKENS = 16_384

    def __init__(self) -> None:
        self._since: float | None = None
        self._s_per_token = 0.0

    def step(self, tokens: int, more: bool) -> None:
        """A step of `tokens` tokens has been computed; `more` says that the next one is under way already."""
        now = time.monotonic()
        if self._since is not None and tokens:
            share = 1.0 if not self._s_per_token else min(1.0, tokens / self._MEMORY_TOKENS)
            self._s_per_token += share * ((now - self._since) / tokens - self._s_per_token)
        self._since = now if more else None

    def load(self, prompts: Sequence[Prompt]) -> InstanceLoad:
        """What these prompts are for one instance; no seconds before the first step that followed another."""
        left = sum(len(p.job.prompt) - p.done for p in prompts)
        return InstanceLoad(left * self._s_per_token, len(prompts), sum(not p.done for p in prompts))


class PrefillWorker(EngineThread):
    """`PrefillEngine` over a Runner; see engine/api.py for the protocol."""

    def __init__(self, runner: Runner):
        super().__init__("prefill-engine")
        self.spec, self.fingerprint, self.codecs = runner.spec, runner.fingerprint, runner.options.codec_names
        self._runner = runner
        self._options = runner.options
        self._pages = new_pages(runner)
        self._waiting: dict[str, Prompt] = {}
        self._active: dict[str, Prompt] = {}
        self._pending: DispatchedStep | None = None
        self._lock = threading.Lock()  # guards what submit changes from other threads
        self._queued = 0
        self._arrivals = 0
        self._steps = 0
        self._prefilled = 0
        self._pace = Pace()

    # --- the edge ------------------------------------------------------------------------------------------------------------

    def submit(self, job: Job, sink: Sink) -> None:
        """See PrefillEngine.submit."""
        check_prompt(job.prompt, self._runner.config.vocab_size, min(self._options.max_length, self._pages.max_tokens))
        check_transfer(job, self.spec, self.codecs)
        with self._lock:
            if self._queued >= self._options.max_queue:
                raise Exhausted(f"prefill queue is full: {self._queued} prompts wait (max_queue={self._options.max_queue})")
            self._queued += 1
            self._arrivals += 1
            prompt = Prompt(job, sink, self._arrivals, time.monotonic())
        self._post(functools.partial(self._enqueue, prompt))

    def cancel(self, ticket: str) -> None:
        """See PrefillEngine.cancel."""
        self._post_unless_closed(functools.partial(self._cancel, ticket))

    def status(self) -> EngineStatus:
        """See PrefillEngine.status."""
        self._check_alive()
        return EngineStatus(
            running=len(self._active),
            waiting=self._queued,
            pages_free=self._pages.pages_free,
            pages_total=self._pages.pages_total,
            compiles_after_warmup=self._runner.compiles_after_warmup(),
            tokens_prefilled=self._prefilled,
            state_slots_free=self._pages.states.free,
            state_slots_total=self._pages.states.total,
            instances=(self._pace.load([*self._waiting.values(), *self._active.values()]),),
        )

    # --- the engine thread ---------------------------------------------------------------------------------------------------

    def _enqueue(self, prompt: Prompt) -> None:
        ticket = prompt.job.ticket
        if ticket in self._waiting or ticket in self._active:
            with self._lock:
                self._queued -= 1
            prompt.sink(Failed(InvalidInput("ticket", ticket, "a ticket that is not in use")))
            return
        self._waiting[ticket] = prompt

    def _cancel(self, ticket: str) -> None:
        prompt = self._forget(ticket)
        if prompt is not None:
            prompt.sink(Finished("cancelled"))

    def _forget(self, ticket: str) -> Prompt | None:
        """Drops a prompt and returns its pages and slot: whatever is dispatched later runs after the steps that still write them."""
        if prompt := self._waiting.pop(ticket, None):
            with self._lock:
                self._queued -= 1
        elif prompt := self._active.pop(ticket, None):
            self._pages.free(ticket)
        return prompt

    def _admit(self) -> None:
        for ticket, prompt in list(self._waiting.items()):
            try:
                prompt.reservation = self._pages.reserve(ticket, len(prompt.job.prompt))
            except Exhausted:
                return  # first come, first served
            del self._waiting[ticket]
            with self._lock:
                self._queued -= 1
            self._active[ticket] = prompt
            prompt.sink(Admitted())

    def _step(self) -> bool:
        self._admit()
        previous, self._pending = self._pending, None
        open_prompts = {t: p for t, p in self._active.items() if p.done < len(p.job.prompt)}
        if open_prompts:
            meanwhile = functools.partial(self._hand_out_ready, previous)
            self._pending = dispatch_prefill(self._runner, open_prompts, self._steps, export=True, dispatched=meanwhile)
            self._steps += 1
        if previous is not None:
            self._deliver(previous)
            self._pace.step(sum(row.valid for _, row in previous.rows), self._pending is not None)
        return self._pending is not None or bool(self._waiting and not self._active)

    def _hand_out_ready(self, step: DispatchedStep | None) -> None:
        """Hands out parts that need no waiting."""
        while step is not None and step.parts and step.parts[0].ready:
            self._hand_out(step)

    def _hand_out(self, step: DispatchedStep) -> None:
        """Hands out what stays of a step's next part, as soon as that has been computed."""
        part = step.parts.popleft()
        for prompt, row in self._remaining(step):
            for segment in self._runner.export(part, row.row, row.start, row.valid, prompt.job):
                prompt.sink(SegmentReady(segment))
        step.computed_at()

    def _remaining(self, step: DispatchedStep) -> list[tuple[Prompt, PrefillInput]]:
        """A step's prompts without those that were cancelled meanwhile."""
        return [(prompt, row) for prompt, row in step.rows if self._active.get(prompt.job.ticket) is prompt]

    def _deliver(self, step: DispatchedStep) -> None:
        """Hands out the rest of a step, part by part, while later parts and the next step compute."""
        while step.parts:
            self._hand_out(step)
        computed = step.computed_at(wait=True)
        assert computed is not None
        for prompt, row in self._remaining(step):
            self._prefilled += row.valid
            prompt.sink(PrefillProgress(row.start + row.valid))
            if row.start + row.valid == len(prompt.job.prompt):
                first = read_token(step.drawn, row.row, prompt.job.sampling.return_logits)
                self._forget(prompt.job.ticket)
                prompt.sink(PrefillDone(first, prompt.started - prompt.submitted, computed - prompt.started))

    def _fail_all(self, error: EngineFailed) -> None:
        outstanding = [*self._waiting.values(), *self._active.values()]
        with self._lock:
            self._queued -= len(self._waiting)  # others are still in the inbox
        self._waiting.clear()
        self._active.clear()
        self._pending = None
        self._pages = new_pages(self._runner)
        for prompt in outstanding:
            prompt.sink(Failed(error))

    def _reset(self) -> None:
        self._runner.reset_pools()
