"""A small Prefill-as-a-Service system on this machine: a prefill server behind an emulated WAN, a decode server, a router.

Three processes on free loopback ports, as `LiveCluster` starts them. Timers that tell a dead peer are longer than between real hosts:
where all compute on the same few cores, a peer that is late is just busy.
"""

import dataclasses
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from prfaas_jax.engine.options import EngineOptions
from prfaas_jax.scheduling.topology import GBPS, Link
from prfaas_jax.serving.deployment import DeployedCluster, Deployment
from prfaas_jax.serving.proto import common_pb2, generation_pb2, prefill_pb2, prefill_pb2_grpc
from prfaas_jax.testing.live_cluster import LiveCluster
from prfaas_jax.testing.relay import Relay
from prfaas_jax.transfer.channel import FRONT_CHANNEL_OPTIONS
from prfaas_jax.transfer.security import NONE, Security, open_channel

_STATUS_S = 30.0
_REPORT_S, _SILENCE_S = 1.0, 10.0


@dataclasses.dataclass(frozen=True)
class ClusterOptions:
    """What to start.

    Attributes:
        prefill: engine of the prefill server.
        decode: engine of the decode server.
        threshold_tokens: longer prompts are prefilled remotely.
        tokenizer: directory or GGUF file for the router; None when prompts are token ids.
        gbps: Gbit/s of the WAN in each direction. Lane and control stream each have a link of their own.
        rtt_ms: its round trip.
        platform: what JAX runs on ("cpu", ..); None leaves the choice to JAX.
        security: of all three processes, and of what this one asks them.
    """

    prefill: EngineOptions
    decode: EngineOptions
    threshold_tokens: int
    tokenizer: str | None = None
    gbps: float = 1.0
    rtt_ms: float = 20.0
    platform: str | None = "cpu"
    security: Security = NONE

    @property
    def deployment(self) -> Deployment:
        """A prefill cluster "far" of one server, a region "home" of one, and the link between."""
        security = {name: value for name, value in dataclasses.asdict(self.security).items() if value is not None}
        router = {"report_s": _REPORT_S, "silence_s": _SILENCE_S}
        config = {
            "engine": "jax",
            "checkpoint": self.prefill.checkpoint,
            "platform": self.platform or "",
            "tokenizer": self.tokenizer or "",
            "clusters": {
                "far": {"kind": "prefill", "prefill": 1, "prefill_engine": _fields(self.prefill)},
                "home": {"kind": "region", "decode": 1, "decode_engine": _fields(self.decode)},
            },
            "links": {"far->home": {"gbps": self.gbps, "rtt_ms": self.rtt_ms}},
            "policy": "threshold",
            "parameter": float(self.threshold_tokens),
            "router": router,
            "security": security,
        }
        return Deployment(
            engine="jax",
            model=self.prefill.checkpoint,
            clusters=(
                DeployedCluster("far", "prefill", 1, 0, prefill_engine=self.prefill),
                DeployedCluster("home", "region", 0, 1, decode_engine=self.decode),
            ),
            links=(Link("far", "home", self.gbps * GBPS, self.rtt_ms * 1e-3),),
            policy="threshold",
            parameter=self.threshold_tokens,
            platform=self.platform,
            tokenizer=self.tokenizer,
            security=self.security,
            router=router,
            config=config,
        )


def _fields(engine: EngineOptions) -> dict[str, Any]:
    return {name: value for name, value in dataclasses.asdict(engine).items() if name != "checkpoint"}


class Cluster(LiveCluster):
    """Starts everything when the block is entered and ends it when the block is left, however that happens.

    Raises LaunchFailed, with the end of the log, when a process does not come up.
    """

    def __init__(self, options: ClusterOptions, log_dir: Path):
        """Starts nothing yet. Each process logs to `<log_dir>/<name>.log`: far/0, home/decode/0, router."""
        super().__init__(options.deployment, log_dir)

    @property
    def address(self) -> str:
        """host:port of the router."""
        return self.router_address

    @property
    def lane(self) -> Relay:
        """What the KV crosses."""
        return self.lanes["far->home"]

    @property
    def control(self) -> Relay:
        """What the control stream crosses."""
        return self.controls["far->home"]

    @property
    def decode_address(self) -> str:
        """host:port of the decode server."""
        return self.addresses["home/decode/0"]

    def decode_status(self) -> generation_pb2.GenerationStatus:
        """The decode server's own account of what it did."""
        status = self.status("home/decode/0")
        assert isinstance(status, generation_pb2.GenerationStatus)
        return status

    def prefill_status(self) -> prefill_pb2.PrefillStatus:
        """The prefill server's, asked over the WAN."""
        with open_channel(self.control.address, FRONT_CHANNEL_OPTIONS, self.deployment.security) as channel:
            return prefill_pb2_grpc.PrefillStub(channel).Status(common_pb2.StatusRequest(), timeout=_STATUS_S)


class LinkTrace:
    """Samples how many bytes have passed a relay, while the block runs.

    Attributes:
        samples: (monotonic seconds, bytes that have come down since the block was entered).
    """

    def __init__(self, relay: Relay, period_s: float = 0.01):
        self._relay, self._period_s = relay, period_s
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="link trace", daemon=True)
        self._before = relay.passed("down")
        self.samples: list[tuple[float, int]] = []

    @property
    def passed(self) -> int:
        """Bytes by the last sample."""
        return self.samples[-1][1] if self.samples else 0

    def __enter__(self) -> "LinkTrace":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._done.set()
        self._thread.join()
        self._sample()

    def _run(self) -> None:
        while not self._done.wait(self._period_s):
            self._sample()

    def _sample(self) -> None:
        """Only changes, and the last moment before one: idle seconds are two samples."""
        sample = (time.monotonic(), self._relay.passed("down") - self._before)
        if len(self.samples) > 1 and self.samples[-1][1] == self.samples[-2][1] == sample[1]:
            self.samples[-1] = sample
        else:
            self.samples.append(sample)
