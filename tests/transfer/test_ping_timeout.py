"""The one setting of the channels that a machine, and not the code, decides."""

import os
import subprocess
import sys

import pytest

from prfaas_jax.transfer.channel import PING_TIMEOUT_ENV

CODE = """
from prfaas_jax.transfer import channel
for options in (channel.SERVER_OPTIONS, channel.CHANNEL_OPTIONS, channel.LANE_CHANNEL_OPTIONS, channel.FRONT_SERVER_OPTIONS):
    print(dict(options)["grpc.http2.ping_timeout_ms"], dict(options)["grpc.keepalive_timeout_ms"])
"""


def run(**environment) -> subprocess.CompletedProcess:
    env = {name: value for name, value in os.environ.items() if name != PING_TIMEOUT_ENV}
    return subprocess.run([sys.executable, "-c", CODE], env={**env, **environment}, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(("setting", "control"), [({}, 1500), ({PING_TIMEOUT_ENV: "20"}, 20_000), ({PING_TIMEOUT_ENV: "0.25"}, 250)])
def test_only_pings_between_servers_follow_the_setting(setting, control):
    assert run(**setting).stdout.split() == [str(control)] * 4 + ["20000"] * 4


@pytest.mark.parametrize("bad", ["soon", "0", "-1", "nan", "inf", "1e9", ""])
def test_a_senseless_setting_is_refused_by_name(bad):
    done = run(**{PING_TIMEOUT_ENV: bad})
    assert done.returncode != 0
    assert f"{PING_TIMEOUT_ENV}={bad!r}: expected seconds" in done.stderr
