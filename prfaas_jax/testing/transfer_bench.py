"""Our lanes against raw sockets and others, taking turns over the same path: samples, their medians, a table and a picture."""

import contextlib
import dataclasses
import json
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from tqdm import tqdm

from prfaas_jax.errors import InvalidInput
from prfaas_jax.serving.launcher import LaunchFailed
from prfaas_jax.testing.relay_process import RelayProcess
from prfaas_jax.testing.transfer_baselines import JaxTransfer, Mooncake, Nixl, Pair, RawSockets, Sample, Unavailable
from prfaas_jax.transfer.channel import MOVER_ENV

OURS, RAW = "lanes", "raw sockets"


class Lanes(Pair):
    """This project's lanes, with the environment that the launcher gives to processes that move KV."""

    def __init__(
        self,
        nbytes: int,
        lanes: int,
        message_kib: int,
        checksum: bool,
        compressed: bool = False,
        via: str | None = None,
        address: str = "127.0.0.1:0",
        security: Mapping[str, Mapping[str, Any]] | None = None,
        processes: int = 0,
    ):
        """Starts nothing yet.

        Args:
            nbytes: size of the sender's buffer.
            lanes: connections.
            message_kib: size of messages, and of the segments that the buffer is cut into.
            checksum: payloads under it, on both sides.
            compressed: payloads compressed.
            via: "host:port" that the receiver connects to instead, a relay whose target is `address`.
            address: where the sender listens.
            security: fields of `Security` by role, "sender" and "receiver".
            processes: sender processes, and as many receiver processes, each pair with its lanes; 0: one interpreter on each side.

        Raises InvalidInput for several sender processes on a path that leads to one.
        """
        if processes > 1 and via is not None:
            raise InvalidInput("processes", processes, "at most 1 over a relay, which leads to one address")
        shape = {"lanes": lanes, "message_kib": message_kib, "processes": processes}
        how: dict[str, Any] = {"checksum": checksum, "compressed": compressed, "via": via, "security": security or {}}
        super().__init__("lanes", nbytes, address, None, MOVER_ENV, **shape, **how)


class GrpcStream(Pair):
    """A gRPC stream of bare bytes with the same options and environment: the most that lanes can reach."""

    def __init__(self, nbytes: int, message_kib: int, via: str | None = None, address: str = "127.0.0.1:0"):
        """Starts nothing yet."""
        super().__init__("grpc", nbytes, address, None, MOVER_ENV, message_kib=message_kib, via=via)


@dataclasses.dataclass(frozen=True)
class Route:
    """What the bytes pass: loopback alone, or a relay that shapes it."""

    gbps: float | None = None
    rtt_ms: float = 0.0

    @property
    def shaped(self) -> bool:
        """Whether a relay is needed."""
        return self.gbps is not None or self.rtt_ms > 0


@dataclasses.dataclass(frozen=True)
class Figures:
    """Medians of one transport.

    Attributes:
        gb_s: 10^9 bytes a second.
        core_s_per_gb: of sender and receiver together.
        ratio_to_raw: median of the ratios to the raw-socket transfer of the same round.
        ratio_to_shaped: of the relay's rate, its round trip taken off; None on a path that is not shaped.
        samples: transfers.
    """

    gb_s: float
    core_s_per_gb: float
    ratio_to_raw: float
    ratio_to_shaped: float | None
    samples: int


def run_rounds(pairs: Mapping[str, Pair], nbytes: int, rounds: int) -> dict[str, list[Sample]]:
    """Every transport once per round, in an order that turns, so that none always comes after the same one."""
    samples: dict[str, list[Sample]] = {name: [] for name in pairs}
    names = list(pairs)
    for number in tqdm(range(rounds), desc="rounds", unit="round", leave=False):
        for at in range(len(names)):
            name = names[(number + at) % len(names)]
            samples[name].append(pairs[name].run(nbytes))
    return samples


def figures(samples: Mapping[str, Sequence[Sample]], route: Route) -> dict[str, Figures]:
    """Medians by transport; `samples` has raw sockets among them, and as many of each."""
    raw = samples[RAW]
    found = {}
    for name, taken in samples.items():
        gb_s = float(np.median([s.gb_s for s in taken]))
        shaped = None
        if route.gbps is not None:
            # A request has to get there first: that is no fault of the transport.
            shaped = float(np.median([s.nbytes * 8 / 1e9 / (s.seconds - route.rtt_ms / 1e3) / route.gbps for s in taken]))
        ratio = float(np.median([s.gb_s / r.gb_s for s, r in zip(taken, raw, strict=True)]))
        found[name] = Figures(gb_s, float(np.median([s.core_s_per_gb for s in taken])), ratio, shaped, len(taken))
    return found


def table(found: Mapping[str, Figures]) -> str:
    """A line per transport."""
    lines = [f"{'':<22}{'GB/s':>8}{'core-s/GB':>12}{'of raw':>9}{'of the link':>13}"]
    for name, f in found.items():
        shaped = "" if f.ratio_to_shaped is None else f"{f.ratio_to_shaped:13.3f}"
        lines.append(f"{name:<22}{f.gb_s:8.3f}{f.core_s_per_gb:12.2f}{f.ratio_to_raw:9.2f}{shaped}")
    return "\n".join(lines)


def measure(
    route: Route,
    nbytes: int,
    rounds: int,
    checksum: bool,
    lanes: int,
    message_kib: int,
    *,
    compressed: bool = False,
    security: Mapping[str, Mapping[str, Any]] | None = None,
    processes: int = 0,
    others: bool = False,
    peers_python: str | None = None,
) -> tuple[dict[str, list[Sample]], dict[str, str]]:
    """Samples by transport, and why those that cannot run here do not.

    Over a shaped path every transport that takes an address goes through a relay of its own with the same settings: they take turns, so
    none has to share it. `others` adds those of other projects, which neither checksum nor can be shaped.
    """
    if nbytes % (message_kib << 10):
        raise InvalidInput("nbytes", nbytes, f"a multiple of the message size, {message_kib} KiB")
    made: dict[str, Any] = {
        OURS: lambda **at: Lanes(nbytes, lanes, message_kib, checksum, compressed, security=security, **at),
        RAW: lambda **at: RawSockets(nbytes, checksum, **at),
    }
    if processes:
        made[f"{OURS}, {processes} + {processes} processes"] = lambda **at: Lanes(
            nbytes, lanes, message_kib, checksum, compressed, security=security, processes=processes, **at
        )
    if not checksum:
        made["bare gRPC stream"] = lambda **at: GrpcStream(nbytes, message_kib, **at)
    if others and not route.shaped and not checksum:
        made |= {
            "jax transfer": lambda: JaxTransfer(nbytes),
            "mooncake tcp write": lambda: Mooncake(nbytes, True, python=peers_python),
            "mooncake tcp read": lambda: Mooncake(nbytes, False, python=peers_python),
            "nixl ucx tcp read": lambda: Nixl(nbytes, False, python=peers_python),
            "nixl ucx tcp write": lambda: Nixl(nbytes, True, python=peers_python),
        }
    missing: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        pairs: dict[str, Pair] = {}
        for name, make in made.items():
            at = {}
            if route.shaped:
                address = f"127.0.0.1:{_free_port()}"
                relay = stack.enter_context(RelayProcess(address, gbps=route.gbps, rtt_ms=route.rtt_ms))
                at = {"address": address, "via": relay.address}
            try:
                pairs[name] = stack.enter_context(make(**at))
            except (Unavailable, LaunchFailed) as error:
                if name in (OURS, RAW):
                    raise
                missing[name] = str(error).splitlines()[0]
        return run_rounds(pairs, nbytes, rounds), missing


def draw(summary: Path, picture: Path) -> None:
    """Bars of GB/s and core-seconds from a result file: `cases` by name, each {transport: fields of Figures}."""
    cases = json.loads(summary.read_text())["cases"]
    figure = Figure(figsize=(10, 0.8 + 0.42 * sum(len(found) + 1 for found in cases.values())), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    labels, at = [], 0
    for case, found in cases.items():
        for name, fields in found.items():
            colour = "tab:orange" if name == OURS else "tab:gray" if name == RAW else "tab:blue"
            left.barh(at, fields["gb_s"], color=colour)
            right.barh(at, fields["core_s_per_gb"], color=colour)
            left.text(fields["gb_s"], at, f" {fields['gb_s']:.2f} ({fields['ratio_to_raw']:.2f} of raw)", va="center", fontsize=8)
            labels.append((at, f"{case}: {name}"))
            at += 1
        at += 1
    left.set_yticks([y for y, _ in labels], [text for _, text in labels], fontsize=8)
    left.invert_yaxis()
    left.set_xlim(right=1.35 * left.get_xlim()[1])
    left.set_xlabel("GB/s, median")
    right.set_xlabel("core-seconds per GB, sender and receiver")
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(picture, dpi=110)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])
