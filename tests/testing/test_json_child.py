import sys
import time

import psutil
import pytest

from prfaas_jax.serving.launcher import LaunchFailed
from prfaas_jax.testing.json_child import ChildFailed, JsonChild

ECHO = """
import sys
print("a library says hello"); print("{not json"); print('{"ready": 1}', flush=True)
for line in sys.stdin:
    if "silent" not in line:
        print("chatter"); print(line, end="", flush=True)
    if "end" in line:
        sys.exit("it had enough")
"""


def child(code: str = ECHO, ready_s: float = 20.0) -> JsonChild:
    return JsonChild("echo", [sys.executable, "-c", code], ready_s=ready_s)


def test_it_answers_and_what_libraries_print_is_no_answer():
    with child() as echo:
        assert echo.ready == {"ready": 1}
        assert [echo.ask({"n": n}, 5) for n in range(3)] == [{"n": 0}, {"n": 1}, {"n": 2}]
    assert not psutil.pid_exists(echo.pid)


def test_silence_ends_at_the_deadline():
    with child() as echo:
        started = time.monotonic()
        with pytest.raises(ChildFailed, match=r"echo said nothing for 0\.2 s"):
            echo.ask({"silent": 1}, 0.2)
        assert time.monotonic() - started < 2
        assert echo.ask({"then": 1}, 5) == {"then": 1}


def test_an_end_is_told_at_once_and_with_its_reason():
    with child() as echo:
        assert echo.ask({"end": 1}, 5) == {"end": 1}
        for _ in range(2):
            with pytest.raises(ChildFailed, match="it had enough"):
                echo.ask({"n": 1}, 5)


@pytest.mark.parametrize(("code", "ready_s"), [("import sys; sys.exit('no such thing')", 20), ("import time; time.sleep(60)", 0.2)])
def test_one_that_does_not_come_up_leaves_nothing_behind(code, ready_s):
    before = set(psutil.Process().children())
    with pytest.raises(LaunchFailed, match="no such thing" if ready_s > 1 else "said nothing"), child(code, ready_s):
        pass
    assert set(psutil.Process().children()) <= before


def test_a_frozen_one_goes_on_where_it_was_and_ends_with_the_block():
    with child() as echo:
        echo.freeze()
        echo.tell({"n": 1})
        with pytest.raises(ChildFailed):
            echo.answer(0.2)
        echo.thaw()
        assert echo.answer(5) == {"n": 1}
        echo.freeze()
    assert not psutil.pid_exists(echo.pid)
