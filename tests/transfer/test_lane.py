"""A lane server spoken to by hand, frame by frame."""

import threading
import time

import grpc
import pytest
from transfer_fixtures import SPEC, Cache, LaneWire, Sender, wait_until, wide_spec

from prfaas_jax.transfer import frames
from prfaas_jax.transfer.channel import LANE_CHANNEL_OPTIONS
from prfaas_jax.transfer.lane import METHOD
from prfaas_jax.transfer.lanes import LaneGroup


@pytest.fixture(scope="module")
def sender():
    with Sender(SPEC, message_bytes=97) as sender:
        yield sender
    assert sender.lane.streams == 0


def converse(address: str, *said: bytes) -> list[bytes]:
    """What a lane answers to raw frames, until it ends the stream."""
    with grpc.insecure_channel(address, LANE_CHANNEL_OPTIONS) as channel:
        return list(channel.stream_stream(METHOD)(iter(said), timeout=5))


HELLO = frames.encode(frames.Hello(b"s" * 16, 1))


@pytest.mark.parametrize(
    ("said", "code"),
    [
        ([], "INVALID_ARGUMENT"),
        ([b"junk"], "INVALID_ARGUMENT"),
        ([frames.encode(frames.Ping(1))], "INVALID_ARGUMENT"),
        ([frames.encode(frames.Hello(b"s" * 16, 1, version=9))], "FAILED_PRECONDITION"),
        ([HELLO[:-1] + bytes([HELLO[-1] ^ 1])], "DATA_LOSS"),
        ([HELLO, b"junk"], "INVALID_ARGUMENT"),
        ([HELLO, frames.encode(frames.End(b"t" * 16, 1))], "INVALID_ARGUMENT"),
        ([HELLO, frames.encode(frames.Ack(1))], "INVALID_ARGUMENT"),
    ],
)
def test_frames_bad_ones_get_their_status(sender, said, code):
    with pytest.raises(grpc.RpcError) as raised:
        converse(sender.lane.address, *said)
    assert raised.value.code().name == code
    wait_until(lambda: sender.lane.streams == 0)


def test_frames_one_session_cannot_use_a_stream_number_twice(sender):
    with LaneWire(sender.lane.address) as first, LaneWire(sender.lane.address) as second:
        first.say(frames.Hello(b"x" * 16, 1), frames.Ping(1))
        assert first.hear() == frames.Pong(1)
        second.say(frames.Hello(b"x" * 16, 1))
        with pytest.raises(grpc.RpcError, match="stream=1"):
            second.hear()


def test_resume_sends_again_what_was_not_acknowledged_and_nothing_else(sender):
    cache = Cache(SPEC, 24)
    ticket = sender.send(cache, cache.keys(8))
    with LaneWire(sender.lane.address) as whole:
        whole.say(frames.Hello(b"a" * 16, 1), frames.Open(ticket.id, ticket.epoch, 1 << 20))
        sent = []
        while len(sent) < 12:
            sent.append(whole.hear())
        whole.say(frames.Ack(3))
        with LaneWire(sender.lane.address) as after:
            after.say(frames.Hello(b"a" * 16, 2), frames.Lost(1, 7))
            got = {}
            while sum(len(p) for _, p in got.values()) < SPEC.bytes(24) - sum(len(p) for _, p in sent[:7]):
                header, payload = after.hear()
                got[header.key, header.offset] = header, payload
            for header, _ in sent[:7]:
                assert (header.key, header.offset) not in got
            for header, payload in sent[7:]:
                again, same = got[header.key, header.offset]
                assert (again.again, same) == (True, payload)


def test_grants_bound_what_a_sender_may_send(sender):
    cache = Cache(SPEC, 24)
    ticket = sender.send(cache, cache.keys(8))
    with LaneWire(sender.lane.address) as lane:
        lane.say(frames.Hello(b"b" * 16, 1), frames.Open(ticket.id, ticket.epoch, 200), frames.Ping(1))
        seen, pongs = 0, 0
        while pongs < 2:
            match lane.hear():
                case frames.Pong(token):
                    pongs += 1
                    time.sleep(0.1)
                    if token == 1:
                        lane.say(frames.Ping(2))
                case _, payload:
                    seen += len(payload)
        assert 0 < seen <= 200


@pytest.mark.parametrize("silence", ["never says hello", "acknowledges nothing", "says nothing more"])
def test_backpressure_stalled_reader_does_not_keep_its_threads(silence):
    spec, length = wide_spec(), 1024
    cache = Cache(spec, length)
    with Sender(spec, stall_s=0.4 if silence == "acknowledges nothing" else 30, idle_s=0.4) as sender:
        ticket = sender.send(cache, cache.keys(64))
        with LaneWire(sender.lane.address) as lane:
            if silence == "acknowledges nothing":
                lane.say(frames.Hello(b"c" * 16, 1), frames.Open(ticket.id, ticket.epoch, 1 << 30))
            elif silence == "says nothing more":
                lane.say(frames.Hello(b"c" * 16, 1))
            wait_until(lambda: sender.lane.streams == 1)
            wait_until(lambda: sender.lane.streams == 0)
            with pytest.raises(grpc.RpcError):
                while True:
                    lane.hear()


class Slow:
    """A receiver that takes its time, and notes what it had taken when it was told that there is no more."""

    def __init__(self):
        self.taken, self.taken_at_end = 0, None
        self.over = threading.Event()

    def take(self, header, payload, wire_bytes):
        time.sleep(0.02)
        self.taken += payload.nbytes

    def ended(self):
        self.taken_at_end = self.taken
        self.over.set()

    def failed(self, error):
        raise error


def test_the_end_does_not_overtake_what_another_lane_is_still_taking():
    """Acknowledged means taken: else the end comes over one lane while the last message of the other has not been looked at.

    And every message is: one that had others ready behind it, which then went over the other lane, once kept the end from coming at all.
    """
    cache = Cache(SPEC, 8)
    with Sender(SPEC) as sender:
        group = LaneGroup(sender.lane.address, 2, probe=False)
        assert group.warm()
        for _ in range(5):
            ticket, receiver = sender.send(cache, cache.keys(8)), Slow()
            group.open(frames.Open(ticket.id, ticket.epoch, 1 << 20), receiver)
            assert receiver.over.wait(10)
            assert receiver.taken_at_end == SPEC.bytes(8)
            group.release(ticket.id)
        group.close()
