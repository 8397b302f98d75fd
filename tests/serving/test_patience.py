"""Who is given up for being late: a server that froze, within seconds; a client that stalled, not at all."""

import os
import signal
import subprocess
import sys
import time

import grpc
import pytest
from serving_fixtures import channel, decode_engine, decode_server, eventually, generation_status, idle, request

from prfaas_jax.serving.proto import generation_pb2_grpc

# Reads the first token, then its process is stopped for longer than servers wait for each other, then reads the rest.
CLIENT = """
import sys, grpc
from prfaas_jax.serving.proto import generation_pb2, generation_pb2_grpc
from prfaas_jax.transfer.channel import FRONT_CHANNEL_OPTIONS
request = generation_pb2.GenerateRequest(token_ids=generation_pb2.TokenIds(ids=[1, 2, 3]), max_new_tokens=200, ignore_eos=True)
with grpc.insecure_channel(sys.argv[1], options=FRONT_CHANNEL_OPTIONS) as channel:
    events = generation_pb2_grpc.GenerationStub(channel).Generate(request, timeout=60)
    next(events)
    print("reading", flush=True)
    sys.stdin.readline()
    print(1 + sum(event.HasField("token") for event in events), flush=True)
"""


def test_a_client_that_stalls_for_longer_than_servers_wait_gets_every_token():
    with decode_server(decode_engine(step_s=0.02)) as decode:
        client = subprocess.Popen([sys.executable, "-c", CLIENT, decode.address], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        try:
            assert client.stdout.readline() == "reading\n"
            os.kill(client.pid, signal.SIGSTOP)
            time.sleep(7.0)
            os.kill(client.pid, signal.SIGCONT)
            assert client.communicate("\n", timeout=60)[0] == "200\n"
        finally:
            client.kill()
        assert dict(generation_status(decode.address).failed) == {}


def test_a_client_that_never_reads_leaves_at_the_deadline():
    """Even the error that says so waits behind tokens that nobody reads; the request's slot must not."""
    with decode_server(max_request_s=1.0) as decode, channel(decode.address) as open_channel:
        call = generation_pb2_grpc.GenerationStub(open_channel).Generate(request([1, 2, 3], 4000, want_logits=True))
        eventually(lambda: generation_status(decode.address).streams == 1)
        eventually(lambda: idle(None, decode.address) and generation_status(decode.address).streams == 0, 6)
        assert dict(generation_status(decode.address).failed) == {"DEADLINE_EXCEEDED": 1}
        with pytest.raises(grpc.RpcError) as raised:
            for _ in call:
                continue
        assert raised.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
