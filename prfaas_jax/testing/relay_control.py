"""Command line and control channel of a relay process.

A command is one JSON object a line on stdin, the name of a method of `Relay` and its arguments:

    {"command": "set_rate", "gbps": 0.1, "direction": "down", "after_s": 2}      -> {"ok": true}
    {"command": "status"}                                                        -> {"ok": true, "status": {..}}
    {"command": "set_rate", "gbps": -1}
        -> {"ok": false, "field": "gbps", "expected": "a positive number, ..", "error": "gbps=-1.0: expected a positive number, .."}

Each is answered with one line on stdout, in order and at once: a command acts later (`after_s`), it never waits.
"""

import functools
import inspect
import json
import sys
import threading
import typing
from typing import Any, BinaryIO, Final

import msgspec
from absl import app, flags

from prfaas_jax.errors import InvalidInput
from prfaas_jax.serving.signals import EndSignals
from prfaas_jax.testing.relay import Relay

NOTICE: Final = (
    "relay: ends TCP on both sides, so it emulates rate, delay and broken connections; it says nothing about packet loss in the kernel, "
    "retransmission or congestion control"
)

# Methods of Relay that a line may name.
COMMANDS: Final = (
    "set_link",
    "set_rate",
    "set_slices",
    "set_target",
    "black_hole",
    "black_hole_after",
    "pause",
    "resume",
    "flip_byte_after",
    "flip_rate",
    "reset_after",
    "half_close_after",
    "reset",
    "half_close",
    "status",
)
_LINE_BYTES = 64 << 10


@functools.cache
def _hints(name: str) -> dict[str, Any]:
    return {field: hint for field, hint in typing.get_type_hints(getattr(Relay, name)).items() if field != "return"}


def obey(relay: Relay, line: bytes | str) -> dict[str, Any] | None:
    """Does what one line says; the status where it asks for one.

    Raises InvalidInput that names the field: "line" where it is no JSON object, "command", or an argument.
    """
    try:
        fields = msgspec.json.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidInput("line", line, f"one JSON object ({error})") from error
    if not isinstance(fields, dict):
        raise InvalidInput("line", line, "one JSON object")
    name = fields.pop("command", None)
    if name not in COMMANDS:
        raise InvalidInput("command", name, f"one of {', '.join(COMMANDS)}")
    hints = _hints(name)
    arguments = {field: _argument(field, value, hints) for field, value in fields.items()}
    method = getattr(relay, name)
    for field, parameter in inspect.signature(method).parameters.items():
        if parameter.default is parameter.empty and field not in arguments:
            raise InvalidInput(field, None, f"an argument that {name} needs")
    return method(**arguments)


def _argument(field: str, value: Any, hints: dict[str, Any]) -> Any:
    if field not in hints:
        raise InvalidInput(field, value, f"nothing of that name; the command takes {', '.join(hints) or 'no arguments'}")
    try:
        return msgspec.convert(value, hints[field])
    except msgspec.ValidationError as error:
        raise InvalidInput(field, value, str(error)) from error


def answer(relay: Relay, line: bytes | str) -> str:
    """`obey`, and the line that says how it went."""
    try:
        status = obey(relay, line)
    except InvalidInput as error:
        return json.dumps({"ok": False, "field": error.field, "expected": error.expected, "error": str(error)})
    return json.dumps({"ok": True} if status is None else {"ok": True, "status": status})


def serve(relay: Relay, lines: BinaryIO) -> None:
    """Answers on stdout what comes on `lines`, until they end."""
    while line := lines.readline(_LINE_BYTES):
        whole = line.endswith(b"\n")
        while not whole and (more := lines.readline(_LINE_BYTES)):
            whole, line = more.endswith(b"\n"), b"(longer than 64 KiB)"
        if line.strip():
            print(answer(relay, line), flush=True)


def define_flags() -> None:
    """Flags of the command line."""
    flags.DEFINE_string("listen", "127.0.0.1:0", "host:port to listen on; port 0 takes a free one.")
    flags.DEFINE_string("target", None, "host:port to relay to.", required=True)
    flags.DEFINE_float("gbps", None, "Gbit/s per direction, shared by all connections; unlimited when not given.")
    flags.DEFINE_float("gbps_up", None, "Gbit/s from the client, where it differs from --gbps.")
    flags.DEFINE_float("gbps_down", None, "Gbit/s to the client, where it differs from --gbps.")
    flags.DEFINE_multi_string("step", [], "SECONDS:GBPS, a change of the rate so long after the start; may be repeated.")
    flags.DEFINE_float("rtt_ms", 0.0, "Round trip added, in milliseconds.")
    flags.DEFINE_float("jitter_ms", 0.0, "Up to this much more delay per direction, in milliseconds.")
    flags.DEFINE_integer("seed", 0, "Seed of the jitter and of --flips_per_gb.")
    flags.DEFINE_integer("slice_bytes", None, "Hand on at most so many bytes at a time.")
    flags.DEFINE_float("slice_pause_ms", 0.0, "Milliseconds between two slices of one connection.")
    flags.DEFINE_multi_integer("flip_byte_after", [], "Flip a bit of the byte after this many bytes; may be repeated.")
    flags.DEFINE_float("flips_per_gb", 0.0, "Flip a bit of random bytes, so many in 10^9 on average.")
    flags.DEFINE_integer("reset_after", None, "Reset the connection after this many bytes.")
    flags.DEFINE_integer("half_close_after", None, "End one direction of the connection after this many bytes.")
    flags.DEFINE_integer("black_hole_after", None, "Let nothing through after this many bytes.")
    flags.DEFINE_float("black_hole_s", None, "Seconds that --black_hole_after lasts; for ever when not given.")
    flags.DEFINE_bool("paused", False, "Let nothing through before the command resume.")
    flags.DEFINE_enum("direction", "down", ["up", "down"], "Which bytes the faults above count: from the client, or to it.")
    flags.DEFINE_multi_string("command", [], "A command of the control channel, obeyed at the start; may be repeated.")
    flags.DEFINE_bool("until_eof", False, "Stop when stdin ends.")


def apply_flags(relay: Relay, flag: Any) -> None:
    """Sets what the flags ask for, beyond what the relay was made with; raises InvalidInput."""
    if flag.gbps_up is not None:
        relay.set_rate(flag.gbps_up, "up")
    if flag.gbps_down is not None:
        relay.set_rate(flag.gbps_down, "down")
    for step in flag.step:
        seconds, _, gbps = step.partition(":")
        try:
            relay.set_rate(float(gbps), after_s=float(seconds))
        except ValueError as error:
            raise InvalidInput("step", step, f"SECONDS:GBPS ({error})") from error
    relay.set_slices(flag.slice_bytes, flag.slice_pause_ms)
    relay.flip_byte_after(flag.flip_byte_after, flag.direction)
    relay.flip_rate(flag.flips_per_gb, flag.direction, flag.seed)
    if flag.reset_after is not None:
        relay.reset_after(flag.reset_after, flag.direction)
    if flag.half_close_after is not None:
        relay.half_close_after(flag.half_close_after, flag.direction)
    if flag.black_hole_after is not None:
        seconds_given = {} if flag.black_hole_s is None else {"seconds": flag.black_hole_s}
        relay.black_hole_after(flag.black_hole_after, direction=flag.direction, **seconds_given)
    elif flag.black_hole_s is not None:
        raise InvalidInput("black_hole_s", flag.black_hole_s, "--black_hole_after with it")
    if flag.paused:
        relay.pause()
    for command in flag.command:
        obey(relay, command)


def main(argv: list[str]) -> None:
    """Relays until told to stop."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    flag = flags.FLAGS
    with EndSignals() as ends:
        try:
            relay = Relay(flag.target, flag.listen, flag.gbps, flag.rtt_ms, flag.jitter_ms, flag.seed)
            apply_flags(relay, flag)
        except InvalidInput as error:
            raise app.UsageError(str(error)) from error

        def listen() -> None:
            serve(relay, sys.stdin.buffer)
            if flag.until_eof:
                ends.tell()

        print(NOTICE, file=sys.stderr, flush=True)
        with relay:
            print(json.dumps({"address": relay.address, "port": relay.port}), flush=True)
            threading.Thread(target=listen, name="control", daemon=True).start()
            ends.wait()
