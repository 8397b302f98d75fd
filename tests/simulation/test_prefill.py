import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prfaas_jax.errors import InvalidInput
from prfaas_jax.scheduling.batching import PrefillItem, choose_prefill, prefill_buckets
from prfaas_jax.scheduling.profiles import FittedPrefill, MeasuredPrefill, prefill_s
from prfaas_jax.simulation import prefill
from prfaas_jax.simulation.kernel import Kernel
from prfaas_jax.simulation.prefill import PrefillInstance, PrefillTask

CHUNK = 256
TIME = FittedPrefill(0.05, 10.0, 3.0, max_tokens=4096)


class Reference:
    """The instance step by step: every choice is `choose_prefill`'s over all that is there."""

    def __init__(self, time, rows):
        self.time, self.rows, self.buckets = time, rows, prefill_buckets(CHUNK, rows)
        self.items, self.cached, self.done, self.steps = {}, {}, {}, []

    def run(self, arrivals):
        """(time, start, length) -> when each is done; `steps` gets (end, tickets)."""
        now, step, coming = 0.0, 0, sorted(range(len(arrivals)), key=lambda i: (arrivals[i][0], i))
        while coming or self.items:
            if not self.items:
                now = max(now, arrivals[coming[0]][0])
            while coming and arrivals[coming[0]][0] <= now:
                i = coming.pop(0)
                _, start, length = arrivals[i]
                self.cached[str(i)] = start
                self.items[str(i)] = PrefillItem(str(i), start, length, 0, -1, i)
                if len(self.items) == 1 and coming and arrivals[coming[0]][0] <= now:
                    break  # the first one starts before others of the same moment come
            step += 1
            choice = choose_prefill(self.items.values(), self.buckets, CHUNK, step)
            for row in choice.rows:
                item = self.items[row.ticket]
                if row.start == self.cached[row.ticket]:
                    now += self.time.start_s
                now += self.time.growth(row.start + row.tokens) - self.time.growth(row.start)
            for row in choice.rows:
                item = self.items.pop(row.ticket)
                if row.start + row.tokens < item.length:
                    self.items[row.ticket] = PrefillItem(row.ticket, row.start + row.tokens, item.length, 0, step, item.arrival)
                else:
                    self.done[int(row.ticket)] = now
            self.steps.append(now)
        return self.done


def play(arrivals, time=TIME, rows=1, chunks=False):
    """The instance itself: (when each is done, when chunks ended, the instance, its tasks)."""
    kernel, done, ends, tasks = Kernel(), {}, [], {}
    instance = PrefillInstance(kernel, time, CHUNK, rows)

    def submit(i):
        _, start, length = arrivals[i]
        task = tasks[i] = PrefillTask(i, start, length, lambda t: done.setdefault(t.owner, kernel.now))
        if chunks:
            task.on_chunk = lambda t: ends.append(kernel.now)
        before = max(instance.free_at, kernel.now)
        instance.submit(task)
        assert instance.free_at == pytest.approx(before + prefill_s(time, length - start, start))

    for i, (at, _, _) in enumerate(arrivals):
        kernel.at(at, submit, i)
    kernel.run()
    return done, ends, instance, tasks


@st.composite
def loads(draw, most=8):
    arrivals, now = [], 0.0
    for _ in range(draw(st.integers(1, most))):
        now += draw(st.sampled_from([0.0, 0.0123, 0.31, 0.7, 1.9, 5.0]))
        length = draw(st.sampled_from([1, 64, 100, 256, 257, 700, 1300, 4096]))
        arrivals.append((now, draw(st.integers(0, (length - 1) // 64)) * 64, length))
    return arrivals


@given(loads(), st.booleans())
def test_running_through_gives_the_times_of_stepping(arrivals, measured):
    time = MeasuredPrefill((100, 1000, 4096), (0.2, 1.1, 6.0)) if measured else TIME
    through, _, instance, _ = play(arrivals, time)
    stepped, ends, _, _ = play(arrivals, time, chunks=True)
    assert through == pytest.approx(stepped, abs=1e-9)
    assert ends == sorted(ends)
    total = sum(prefill_s(time, length - start, start) for _, start, length in arrivals)
    assert instance.busy_s == pytest.approx(total) and instance.jobs == 0


@settings(max_examples=60)
@given(loads(), st.sampled_from([1, 2, 4]))
def test_every_step_is_the_choice_of_the_engine(arrivals, rows):
    reference = Reference(TIME, rows)
    expected = reference.run(arrivals)
    assert play(arrivals, rows=rows)[0] == pytest.approx(expected, abs=1e-9)
    assert sorted(set(play(arrivals, rows=rows, chunks=True)[1])) == pytest.approx(sorted(set(reference.steps)), abs=1e-9)


def test_a_flood_of_new_prompts_is_served_as_the_engine_does():
    """Long prompts among many short ones: patience runs out, and more wait than one step looks at."""
    arrivals = [(0.0, 0, 4096)] + [(0.1 * i, 0, 4096 if i % 20 == 0 else 200) for i in range(1, 120)]
    for rows in (1, 4):
        assert play(arrivals, rows=rows)[0] == pytest.approx(Reference(TIME, rows).run(arrivals), abs=1e-6)


def test_looking_only_so_far_ahead_changes_nothing_with_one_row(monkeypatch):
    arrivals = [(0.05 * i, 0, 200 + 37 * (i % 40)) for i in range(100)]
    whole = play(arrivals)[0]
    monkeypatch.setattr(prefill, "LOOKAHEAD", 1)
    assert play(arrivals)[0] == whole


@given(loads(6), st.integers(0, 5), st.sampled_from([0.001, 0.2, 0.9, 2.0, 6.0]), st.booleans(), st.sampled_from([1, 2]))
def test_a_cancelled_prompt_calls_nobody_and_the_others_are_served(arrivals, which, at, chunks, rows):
    kernel, done = Kernel(), []
    instance = PrefillInstance(kernel, TIME, CHUNK, rows)
    tasks = {}

    def submit(i):
        task = tasks[i] = PrefillTask(i, arrivals[i][1], arrivals[i][2], lambda t: done.append(t.owner))
        if chunks:
            task.on_chunk = lambda t: pytest.fail("a late chunk") if t.owner in cancelled else None
        instance.submit(task)

    cancelled = []

    def cancel(_):
        if which in tasks and which not in done:
            instance.cancel(tasks[which])
            cancelled.append(which)

    for i, (time, _, _) in enumerate(arrivals):
        kernel.at(time, submit, i)
    kernel.at(at, cancel)
    kernel.run()
    assert sorted(done + cancelled) == list(range(len(arrivals)))
    assert instance.jobs == 0
    most = sum(prefill_s(TIME, length - start, start) for i, (_, start, length) in enumerate(arrivals))
    least = sum(prefill_s(TIME, length - start, start) for i, (_, start, length) in enumerate(arrivals) if i not in cancelled)
    assert least - 1e-9 <= instance.busy_s <= most + 1e-9


@given(loads(6), st.sampled_from([0.001, 0.2, 0.9, 2.0]))
def test_work_is_conserved_when_one_is_cancelled(arrivals, at):
    """`free_at` after a cancel is when the instance is really free."""
    kernel, ends = Kernel(), []
    instance = PrefillInstance(kernel, TIME, CHUNK, 1)
    tasks = [PrefillTask(i, start, length, lambda t: ends.append(kernel.now)) for i, (_, start, length) in enumerate(arrivals)]
    for task in tasks:
        instance.submit(task)
    kernel.run(at)
    alive = [t for t in tasks if t.instance is instance and t.start < t.length]
    if len(alive) < 2:
        return
    instance.cancel(alive[0])
    free_at = instance.free_at
    kernel.run()
    assert ends[-1] == pytest.approx(free_at, abs=1e-9)
    assert instance.busy_s == pytest.approx(free_at, abs=1e-9), "never idle since 0"


def test_a_failed_instance_hands_back_everything_and_forgets_it():
    kernel, done = Kernel(), []
    instance = PrefillInstance(kernel, TIME, CHUNK, 1)
    tasks = [PrefillTask(i, 0, 1000, lambda t: done.append(t.owner)) for i in range(3)]
    for task in tasks:
        instance.submit(task)
    kernel.run(0.6)
    assert instance.jobs == 3
    lost = instance.fail()
    assert set(lost) == set(tasks) and not instance.up and all(t.instance is None for t in tasks)
    assert instance.busy_s == pytest.approx(0.6), "what was under way counts until now"
    with pytest.raises(InvalidInput, match="prefill instance"):
        instance.submit(PrefillTask(9, 0, 10, done.append))
    kernel.run(5.0)
    assert not done
    instance.recover()
    instance.submit(PrefillTask(7, 0, 1000, lambda t: done.append(kernel.now)))
    kernel.run()
    assert done == [pytest.approx(5.0 + prefill_s(TIME, 1000))]


@pytest.mark.parametrize("fails", [False, True])
def test_a_draining_instance_says_so_when_it_is_up_and_empty(fails):
    kernel, drained = Kernel(), []
    instance = PrefillInstance(kernel, TIME, CHUNK, 1)
    instance.submit(PrefillTask(0, 0, 1000, lambda t: None))
    instance.draining, instance.drained = True, lambda i: drained.append(kernel.now)
    if fails:
        kernel.run(0.5)
        instance.fail()
        kernel.run(9.0)
        assert not drained
        instance.recover()
        assert drained == [9.0]
    else:
        kernel.run()
        assert drained == [pytest.approx(prefill_s(TIME, 1000))]


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (lambda: PrefillTask(0, 5, 5, print), "prefill start"),
        (lambda: PrefillTask(0, -1, 5, print), "prefill start"),
        (lambda: PrefillInstance(Kernel(), TIME, CHUNK, 1).submit(PrefillTask(0, 0, 4097, print)), "prompt"),
        (lambda: PrefillInstance(Kernel(), TIME, 100, 1), "prefill_chunk"),
    ],
)
def test_bad_input_names_the_field(call, field):
    with pytest.raises(InvalidInput) as caught:
        call()
    assert caught.value.field == field


def test_begun_is_when_the_first_chunk_starts():
    arrivals = [(0.0, 0, 1000), (0.1, 0, 300)]
    _, _, _, tasks = play(arrivals)
    assert tasks[0].begun_s == 0.0
    assert tasks[1].begun_s == pytest.approx(TIME.start_s + TIME.growth(256))
    assert not math.isnan(tasks[1].begun_s) and tasks[1].ticket != tasks[0].ticket and tasks[1].shard == 0
