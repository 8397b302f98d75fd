"""What the demo asks, and what it lets pass."""

import io
import time

import pytest

from prfaas_jax.errors import InvalidInput
from prfaas_jax.serving.proto import generation_pb2
from prfaas_jax.testing.demo import question_about, violations
from prfaas_jax.testing.status_line import StatusLine


class Words:
    """A tokenizer of the simplest kind: a word is a token, a chat message costs three more."""

    def chat(self, messages):
        return [0] * (3 + sum(len(m["content"].split()) for m in messages))


TEXT = "".join(f"line {i} of text\n" for i in range(100))


@pytest.mark.parametrize("tokens", [45, 101, 399])
def test_the_question_fills_its_length_with_whole_lines(tokens):
    question = question_about(TEXT, "And why?", tokens, Words())
    length = len(Words().chat([{"role": "user", "content": question}]))
    assert tokens - 4 < length <= tokens
    assert question.endswith("of text\n\nAnd why?")


@pytest.mark.parametrize("tokens", [4, 4000])
def test_a_text_that_cannot_fill_the_length_is_refused(tokens):
    with pytest.raises(InvalidInput, match=f"tokens={tokens}"):
        question_about(TEXT, "And why?", tokens, Words())


LOCAL = {"placement": "local", "prompt_tokens": 40}
REMOTE = {"placement": "remote", "prompt_tokens": 100, "kv_bytes_moved": 1000, "kv_bytes_expected": 1000}


def judge(local=None, remote=None, expected=1000, prefilled=40, passed=1001):
    usages = [generation_pb2.Usage(**base, **(more or {})) for base, more in ((LOCAL, None), (REMOTE, None))]
    for usage, more in zip(usages, (local, remote), strict=True):
        usage.MergeFrom(generation_pb2.Usage(**(more or {})))
    return violations(*usages, expected, prefilled, passed)


def test_a_sound_run_passes():
    assert judge() == []


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"local": {"placement": "remote"}}, "short prompt was prefilled remotely"),
        ({"remote": {"placement": "local"}}, "long prompt was prefilled locally"),
        ({"remote": {"kv_bytes_moved": 999}}, "999 bytes of KV moved, 1000 expected"),
        ({"remote": {"kv_bytes_expected": 999}}, "expects 999"),
        ({"remote": {"tokens_recomputed": 1}}, "1 tokens were recomputed"),
        ({"remote": {"fallbacks": 1}}, "1 fallbacks"),
        # Silent re-prefill: the usage says remote, the engine's own counter does not.
        ({"prefilled": 140}, "decode server prefilled 140 tokens"),
        ({"passed": 999}, "only 999 bytes passed the link"),
    ],
)
def test_every_broken_promise_is_named(change, named):
    assert any(named in why for why in judge(**change))


def test_a_status_line_elsewhere_than_on_a_terminal_is_lines_of_its_own():
    out = io.StringIO()
    with StatusLine(lambda: "waiting", out, period_s=0.01) as status:
        deadline = time.monotonic() + 10
        while "\n" not in out.getvalue() and time.monotonic() < deadline:
            time.sleep(0.005)
        status.end()
        written = out.getvalue()
        time.sleep(0.05)
    assert written.startswith("waiting ... 0 s\n") and out.getvalue() == written


def test_a_status_line_on_a_terminal_is_rewritten_and_taken_away():
    out = io.StringIO()
    out.isatty = lambda: True
    with StatusLine(lambda: "waiting", out, period_s=0.01):
        time.sleep(0.1)
    assert "\n" not in out.getvalue() and out.getvalue().endswith("\r\x1b[K")
