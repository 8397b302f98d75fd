import queue
import threading
import time

import pytest

from prfaas_jax.errors import EngineFailed, InvalidInput
from prfaas_jax.testing.realtime import RealTimeKernel


@pytest.fixture
def kernel():
    kernel = RealTimeKernel("test", 100.0, ended=lambda error: None)
    kernel.start()
    yield kernel
    kernel.close()


def test_events_come_when_their_time_has_come(kernel):
    seen: queue.Queue = queue.Queue()
    began = time.monotonic()
    for seconds in (30.0, 10.0, 20.0):
        kernel.call(lambda s=seconds: kernel.at(s, lambda _: seen.put((kernel.now, time.monotonic()))))
    for seconds in (10.0, 20.0, 30.0):
        now, wall = seen.get(timeout=10)
        assert now == seconds
        assert wall - began >= (seconds - kernel.present + (wall - began) * 100) / 100 - 1.0  # not before its time
    assert kernel.present >= 30.0


def test_a_late_thread_keeps_the_order_and_the_moments_of_events_and_commands(kernel):
    """While a command blocks the thread, commands are posted between the times of two events: they run between them, as of then."""
    order: list[tuple[str, float]] = []
    blocked, go = threading.Event(), threading.Event()
    start = kernel.call(lambda: kernel.now)

    def schedule() -> None:
        for name, seconds in (("first", 10.0), ("second", 1000.0)):
            kernel.at(start + seconds, lambda _, n=name: order.append((n, kernel.now)))

    kernel.call(schedule)
    kernel.post(lambda: (blocked.set(), go.wait(10)))
    assert blocked.wait(10)
    while kernel.present < start + 20:
        time.sleep(0.01)
    before = kernel.present
    kernel.post(lambda: order.append(("command", kernel.now)))
    after = kernel.present
    time.sleep(0.2)
    go.set()
    kernel.call(lambda: None)
    assert [name for name, _ in order] == ["first", "command"]
    assert order[0][1] == start + 10.0
    assert before <= order[1][1] <= after
    assert kernel.max_late_s >= 0.2 and 0 < kernel.mean_late_s <= kernel.max_late_s


def test_a_handler_that_raises_ends_the_kernel_and_says_why():
    ended: queue.Queue = queue.Queue()
    kernel = RealTimeKernel("test", 100.0, ended.put)
    kernel.start()
    kernel.post(lambda: 1 / 0)
    assert "ZeroDivisionError" in str(ended.get(timeout=10))
    with pytest.raises(EngineFailed, match="ZeroDivisionError"):
        kernel.post(lambda: None)
    kernel.close()


def test_a_call_returns_or_raises_what_its_command_does_and_close_refuses_more(kernel):
    assert kernel.call(lambda: 7) == 7
    with pytest.raises(KeyError):
        kernel.call(lambda: {}["missing"])
    assert kernel.call(lambda: 8) == 8
    kernel.close()
    with pytest.raises(EngineFailed, match="closed"):
        kernel.call(lambda: 9)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("inf"), float("nan")])
def test_a_scale_that_is_none_is_refused(scale):
    with pytest.raises(InvalidInput, match="time_scale"):
        RealTimeKernel("test", scale, ended=lambda error: None)
