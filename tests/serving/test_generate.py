"""Generate end to end, in process: local, remote, and an account that adds up."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest
from serving_fixtures import (
    FINGERPRINT,
    SPEC,
    VOCAB,
    decode_engine,
    decode_server,
    error_of,
    eventually,
    generate,
    generation_status,
    greedy,
    idle,
    prefill_engine,
    prefill_server,
    prefill_status,
    prompt_of,
    request,
)

from prfaas_jax.engine import api
from prfaas_jax.serving.proto import common_pb2, generation_pb2
from prfaas_jax.testing.fake_decode import FakeDecodeEngine


def check_sum(usage: generation_pb2.Usage) -> None:
    parts = {field.name: getattr(usage.parts, field.name) for field in usage.parts.DESCRIPTOR.fields}
    assert sum(parts.values()) == pytest.approx(usage.ttft_s, abs=1e-3)
    assert all(value >= -1e-3 for value in parts.values()), parts


@pytest.mark.parametrize("length", [1, 63, 64, 65, 300])
def test_remote_prefill_moves_every_byte_and_gives_the_tokens_of_a_local_one(length):
    prompt = prompt_of(length)
    with prefill_server() as prefill, decode_server() as decode:
        remote = generate(decode.address, request(prompt, 5, prefill.address))
        local = generate(decode.address, request(prompt, 5))
        assert remote.tokens == local.tokens == greedy(prompt, 5)
        usage = remote.usage
        assert (usage.placement, usage.prefill_address, usage.fallbacks) == ("remote", prefill.address, 0)
        assert usage.kv_bytes_moved == usage.kv_bytes_expected == SPEC.bytes(length)
        assert (usage.kv_bytes_skipped, usage.kv_bytes_resent, usage.tokens_recomputed) == (0, 0, 0)
        assert (usage.prompt_tokens, usage.output_tokens, usage.finish_reason, len(usage.itl_s)) == (length, 5, "length", 4)
        assert (local.usage.placement, local.usage.kv_bytes_moved, local.usage.kv_bytes_expected) == ("local", 0, 0)
        check_sum(usage)
        check_sum(local.usage)
        eventually(lambda: idle(prefill.address, decode.address))
        status = generation_status(decode.address)
        assert dict(status.served) == {"local": 1, "remote": 1}
        # The engine's own count agrees: what was called remote was not prefilled here.
        assert (status.engine.local_prefills, status.engine.tokens_prefilled) == (1, length)


def test_a_decode_server_says_what_is_still_to_come_over_a_link():
    """From when a request is accepted until its last byte is here; a router that was restarted knows of it by that."""
    whole, seen = SPEC.bytes(600), []
    with prefill_server(prefill_engine(tokens_per_s=400)) as prefill, decode_server() as decode, ThreadPoolExecutor(1) as pool:
        answer = pool.submit(generate, decode.address, request(prompt_of(600), 5, prefill.address))
        while not answer.done():
            seen += [(link.prefill_address, link.pending, link.pending_bytes) for link in generation_status(decode.address).links]
        assert answer.result(10).usage.kv_bytes_moved == whole
        (after,) = generation_status(decode.address).links
    assert (after.pending, after.pending_bytes) == (0, 0.0)
    coming = [nbytes for address, count, nbytes in seen if (address, count) == (prefill.address, 1)]
    assert coming[0] == whole and coming == sorted(coming, reverse=True) and any(0 < nbytes < 0.6 * whole for nbytes in coming)


def test_nothing_is_to_come_any_more_while_a_fallback_waits_for_pages():
    with decode_server(decode_engine(pages=20, step_s=0.05)) as decode, ThreadPoolExecutor(2) as pool:
        with prefill_server(prefill_engine(tokens_per_s=1.0)) as prefill:
            # 20 pages of 16 tokens: each of the two holds them all.
            falls_back = pool.submit(generate, decode.address, request(prompt_of(300), 5, prefill.address, allow_fallback=True))
            eventually(lambda: prefill_status(prefill.address).engine.running == 1)
            (link,) = generation_status(decode.address).links
            assert (link.pending, link.pending_bytes) == (1, SPEC.bytes(300))
            other = pool.submit(generate, decode.address, request(prompt_of(10), 60))
            eventually(lambda: generation_status(decode.address).engine.waiting == 1)
        eventually(lambda: generation_status(decode.address).engine.tokens_decoded > 2, what="the other one has its pages")
        assert generation_status(decode.address).engine.waiting == 1
        assert not any(link.pending for link in generation_status(decode.address).links)
        assert other.result(20).usage.output_tokens == 60
        usage = falls_back.result(20).usage
        assert (usage.placement, usage.fallbacks) == ("local", 1) and falls_back.result().tokens == greedy(prompt_of(300), 5)


@pytest.mark.smoke
def test_ttft_parts_are_where_the_time_went():
    with prefill_server(prefill_engine(tokens_per_s=1280)) as prefill, decode_server() as decode:
        message = request(prompt_of(128), 3, prefill.address)
        message.placement.route_s = 0.25
        usage = generate(decode.address, message).usage
    check_sum(usage)
    assert usage.parts.route == 0.25
    assert 0.1 <= usage.parts.prefill < 0.2
    names = [span.name for span in usage.spans]
    assert names[0] == "queue" and "prefill 0-64" in names and "prefill 64-128" in names and "transfer" in names and names[-1] == "tokens"
    assert all(0 <= span.start_s <= span.end_s <= usage.ttft_s + sum(usage.itl_s) for span in usage.spans)


def test_logits_of_every_token_when_asked_for():
    with prefill_server() as prefill, decode_server() as decode:
        for where in (prefill.address, ""):
            answer = generate(decode.address, request(prompt_of(10), 3, where, want_logits=True))
            assert [np.frombuffer(logits, "<f4").shape for logits in answer.logits] == [(VOCAB,)] * 3
        assert generate(decode.address, request(prompt_of(10), 3)).logits == [b""] * 3


def test_stop_tokens_end_a_generation_and_eos_unless_ignored():
    prompt = prompt_of(10)
    tokens = greedy(prompt, 6)
    with decode_server(eos_ids=(tokens[3],)) as decode:
        stopped = generate(decode.address, request(prompt, 6, sampling=common_pb2.Sampling(stop_token_ids=[tokens[1]])))
        assert (stopped.tokens, stopped.usage.finish_reason) == (tokens[:2], "stop")
        ended = generate(decode.address, request(prompt, 6))
        assert (ended.tokens, ended.usage.finish_reason) == (tokens[:4], "stop")
        ignored = generate(decode.address, request(prompt, 6, ignore_eos=True))
        assert (ignored.tokens, ignored.usage.finish_reason) == (tokens, "length")


def test_one_token_is_what_prefill_drew():
    with prefill_server() as prefill, decode_server() as decode:
        answer = generate(decode.address, request(prompt_of(70), 1, prefill.address))
        assert answer.tokens == greedy(prompt_of(70), 1)
        assert (answer.usage.output_tokens, len(answer.usage.itl_s)) == (1, 0)


def test_a_silent_reprefill_is_an_invalid_run():
    """Bug class H: the engine takes the KV, throws it away, and prefills again behind everyone's back."""

    class Reprefilling(FakeDecodeEngine):
        def _commit(self, ticket, first):
            request = self._requests[ticket]
            request.sink(api.PrefillProgress(len(request.job.prompt)))
            super()._commit(ticket, first)

    with prefill_server() as prefill, decode_server(decode_engine(Reprefilling)) as decode:
        error = error_of(decode.address, request(prompt_of(100), 3, prefill.address, allow_fallback=True))
        assert error.code() is grpc.StatusCode.DATA_LOSS
        assert "INVALID" in error.details() and "100 prompt tokens were prefilled again" in error.details()
        eventually(lambda: idle(prefill.address, decode.address))


def test_wrong_bytes_never_become_tokens():
    with prefill_server(prefill_engine(seed=1)) as prefill, decode_server() as decode:
        error = error_of(decode.address, request(prompt_of(100), 3, prefill.address))
        assert "wrong bytes" in error.details()
        eventually(lambda: idle(prefill.address, decode.address))


@pytest.mark.parametrize(
    ("message", "named"),
    [
        (request([], 4), "prompt"),
        (request([1, VOCAB], 4), f"prompt token id={VOCAB}"),
        (request([1, -1], 4), "prompt token id=-1"),
        (request([1] * 4096, 4), "4096 + 4"),
        (request([1], 0), "max_new_tokens=0"),
        (request(None, 4), "prompt=None"),
        (request(None, 4, text="hello"), "no tokenizer"),
        (request(None, 4, chat=generation_pb2.Chat()), "no tokenizer"),
        (request([1], 4, stop_strings=["x"]), "stop_strings"),
        (request([1], 4, sampling=common_pb2.Sampling(temperature=-1)), "temperature=-1"),
        (request([1], 4, sampling=common_pb2.Sampling(top_p=0)), "top_p=0"),
    ],
)
def test_bad_input_is_refused_by_name_before_any_work(message, named):
    with decode_server() as decode:
        error = error_of(decode.address, message)
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert named in error.details()
        status = generation_status(decode.address)
        assert dict(status.failed) == {"INVALID_ARGUMENT": 1} and status.engine.tokens_prefilled == 0


@pytest.mark.parametrize("allow_fallback", [False, True])
def test_another_model_is_refused_with_both_fingerprints(allow_fallback):
    other = prefill_engine(fingerprint="0" * 32)
    with prefill_server(other) as prefill, decode_server() as decode:
        message = request(prompt_of(20), 3, prefill.address, allow_fallback)
        if allow_fallback:
            usage = generate(decode.address, message).usage
            code, why = grpc.StatusCode.FAILED_PRECONDITION, usage.fallback_reason
            assert (usage.placement, usage.fallbacks) == ("local", 1) and usage.reason.startswith("fallback: ")
        else:
            error = error_of(decode.address, message)
            code, why = error.code(), error.details()
        assert code is grpc.StatusCode.FAILED_PRECONDITION
        assert "model_fingerprint" in why and FINGERPRINT in why and "0" * 32 in why
        assert other.status().tokens_prefilled == 0


def test_another_cache_layout_is_refused_with_both_fingerprints():
    tensors = SPEC.groups[0].cache.tensors
    wider = dataclasses.replace(SPEC.groups[0].cache, tensors=tuple(dataclasses.replace(t, width=16) for t in tensors))
    spec = dataclasses.replace(SPEC, groups=(dataclasses.replace(SPEC.groups[0], cache=wider),))
    with prefill_server(prefill_engine(spec)) as prefill, decode_server() as decode:
        error = error_of(decode.address, request(prompt_of(20), 3, prefill.address))
        assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert SPEC.fingerprint() in error.details() and spec.fingerprint() in error.details()


def test_text_in_text_out_and_stop_strings():
    """With a tokenizer that writes token n as the word "n"."""

    class Words:
        def encode(self, text):
            return [int(word) for word in text.split()]

        def chat(self, messages):
            return self.encode(" ".join(m["content"] for m in messages))

        def stream(self):
            return self

        def push(self, token):
            return f"{token} "

        def finish(self):
            return ""

    prompt = prompt_of(10)
    tokens = greedy(prompt, 6)
    words = [f"{t} " for t in tokens]
    text = " ".join(map(str, prompt))
    with decode_server(decode_engine(step_s=0.005), tokenizer=Words()) as decode:
        whole = generate(decode.address, request(None, 6, text=text))
        assert (whole.tokens, whole.text) == (tokens, "".join(words))
        chat = generation_pb2.Chat(messages=[generation_pb2.Chat.Message(role="user", content=text)])
        assert generate(decode.address, request(None, 6, chat=chat)).tokens == tokens
        stop = words[2][1:] + words[3][:1]  # across two tokens
        stopped = generate(decode.address, request(None, 6, text=text, stop_strings=[stop]))
        assert stopped.text == "".join(words).partition(stop)[0]
        assert (stopped.tokens, stopped.usage.finish_reason) == (tokens[:4], "stop")
        never = generate(decode.address, request(None, 6, text=text, stop_strings=[words[5] + "never"]))
        assert never.text == "".join(words), "a partial match at the end is text after all"
        eventually(lambda: idle(None, decode.address))
