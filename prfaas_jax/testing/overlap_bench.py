"""How much of a KV transfer the prefill hides: one prefill server and one decode server over a relay whose rate follows the model."""

import contextlib
import dataclasses
import json
import statistics
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
from matplotlib.figure import Figure

from prfaas_jax.engine.api import SamplingParams
from prfaas_jax.engine.options import EngineOptions
from prfaas_jax.serving.launcher import Processes
from prfaas_jax.serving.pair import READY_S, generate, launch_server
from prfaas_jax.serving.proto import common_pb2, generation_pb2, prefill_pb2_grpc
from prfaas_jax.testing.relay import Relay
from prfaas_jax.transfer.channel import FRONT_CHANNEL_OPTIONS
from prfaas_jax.transfer.security import open_channel

_TIMEOUT_S = 600.0
_POLL_S = 0.01
_PORT_TO_COME = "127.0.0.1:9"


@dataclasses.dataclass(frozen=True)
class Measured:
    """One request. Seconds unless said otherwise.

    Attributes:
        tokens: of the prompt.
        link: what the link's rate was chosen as: "2x" or "0.5x" of the KV production rate, or a rate in Gbit/s.
        overlap: the transfer ran while the prompt was computed; otherwise the link was held until it was.
        gbps: rate of the link, Gbit/s; 0 for a local prefill.
        kv_bytes: canonical bytes of the cache.
        ttft_s: to the first token.
        prefill_s: computing the prompt, by its engine.
        exposed_s: what the transfer added: end of the computation until every byte was verified.
        admit_s: from there until the request was decoding.
        bound_s: the least that `exposed_s` could be, from when each segment was ready and the link's measured rate.
        predicted_s: `exposed_s` without knowing segments: bytes over rate, less the computation where there is overlap.
    """

    tokens: int
    link: str
    overlap: bool
    gbps: float
    kv_bytes: int
    ttft_s: float
    prefill_s: float
    exposed_s: float
    admit_s: float
    bound_s: float
    predicted_s: float

    @property
    def share(self) -> float:
        """Of TTFT, what the transfer adds."""
        return self.exposed_s / self.ttft_s


class OverlapBench:
    """Both servers and the relays; they run while the block is entered. Raises LaunchFailed."""

    def __init__(self, prefill: EngineOptions, decode: EngineOptions, vocab: int, rtt_ms: float, log_dir: Path):
        """Starts nothing yet."""
        self._prefill, self._decode, self._vocab, self._rtt_ms, self._log_dir = prefill, decode, vocab, rtt_ms, log_dir
        self._stack = contextlib.ExitStack()
        self._rng = np.random.default_rng(0)

    def __enter__(self) -> "OverlapBench":
        with contextlib.ExitStack() as stack:
            self._lane = stack.enter_context(Relay(_PORT_TO_COME, rtt_ms=self._rtt_ms))
            processes = stack.enter_context(Processes(self._log_dir))
            prefill = launch_server(processes, "prefill", "prefill", self._prefill, advertise_lane=self._lane.address)
            decode = launch_server(processes, "decode", "decode", self._decode)
            for process in (prefill, decode):
                process.wait_ready(READY_S)
            self._lane.set_target(prefill.ready["lane_addresses"][0])
            self._prefill_address, self._decode_address = prefill.ready["address"], decode.ready["address"]
            self._control = stack.enter_context(Relay(self._prefill_address, rtt_ms=self._rtt_ms))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.__exit__(kind, error, trace)

    def local(self, tokens: int) -> generation_pb2.Usage:
        """Prefilled where it is decoded."""
        return self._generate(tokens, generation_pb2.Placement(reason="local"))

    def remote(self, tokens: int, gbps: float | None, overlap: bool = True) -> generation_pb2.Usage:
        """Prefilled behind a link of `gbps`."""
        self._lane.set_link(gbps, self._rtt_ms)
        placement = generation_pb2.Placement(prefill_address=self._control.address, reason="remote")
        if overlap:
            return self._generate(tokens, placement)
        # Nothing passes the lane until the engine has computed the whole prompt.
        self._lane.pause()
        with self._released_after(tokens):
            return self._generate(tokens, placement)

    @contextlib.contextmanager
    def _released_after(self, tokens: int) -> Iterator[None]:
        before, stop = self._computed(), threading.Event()

        def wait() -> None:
            while not stop.wait(_POLL_S) and self._computed() < before + tokens:
                pass
            self._lane.resume()

        thread = threading.Thread(target=wait, name="hold link", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join(5.0)

    def _computed(self) -> int:
        with open_channel(self._prefill_address, FRONT_CHANNEL_OPTIONS) as channel:
            status = prefill_pb2_grpc.PrefillStub(channel).Status(common_pb2.StatusRequest(), timeout=30.0)
            return int(status.engine.tokens_prefilled)

    def _generate(self, tokens: int, placement: generation_pb2.Placement) -> generation_pb2.Usage:
        prompt = self._rng.integers(0, self._vocab, tokens).tolist()
        ((_, usage),) = generate(self._decode_address, [prompt], SamplingParams(max_new_tokens=2), placement, _TIMEOUT_S)
        return usage

    def measure(self, tokens: int, link: str, gbps: float, overlap: bool = True, repeats: int = 1) -> Measured:
        """The median, by exposed transfer, of `repeats` requests."""
        found = []
        for _ in range(repeats):
            usage = self.remote(tokens, gbps, overlap)
            parts, bytes_per_s = usage.parts, gbps * 1e9 / 8
            predicted = max(0.0, usage.kv_bytes_moved / bytes_per_s - (parts.prefill if overlap else 0.0))
            times = (usage.ttft_s, parts.prefill, parts.exposed_transfer, parts.admit, usage.exposed_bound_s, predicted)
            found.append(Measured(tokens, link, overlap, gbps, usage.kv_bytes_moved, *times))
        return sorted(found, key=lambda m: m.exposed_s)[len(found) // 2]


def settle(bench: OverlapBench, tokens: int, repeats: int) -> tuple[float, float]:
    """Over a link that is no limit, for prompts of this length, after one to warm up: KV production in Gbit/s, and seconds of hand-over.

    Both by the medians of `repeats`. Hand-over is what is exposed even there: the request's round trip, turns of threads, the commit.
    """
    bench.remote(tokens, None)
    usages = [bench.remote(tokens, None) for _ in range(repeats)]
    prefill_s = statistics.median(usage.parts.prefill for usage in usages)
    return usages[0].kv_bytes_moved * 8 / 1e9 / prefill_s, statistics.median(usage.parts.exposed_transfer for usage in usages)


def table(rows: Sequence[Measured]) -> str:
    """A line per request."""
    names = f"{'TTFT s':>8} {'prefill':>8} {'exposed':>8} {'bound':>8} {'share':>7}"
    lines = [f"{'tokens':>7} {'link':>6} {'Gbit/s':>8} {'overlap':>8} {names}"]
    for m in rows:
        times = " ".join(f"{t:8.3f}" for t in (m.ttft_s, m.prefill_s, m.exposed_s, m.bound_s))
        lines.append(f"{m.tokens:7} {m.link:>6} {m.gbps:8.4f} {'yes' if m.overlap else 'no':>8} {times} {100 * m.share:6.1f}%")
    return "\n".join(lines)


def draw(summary: Path, picture: Path) -> None:
    """Bars of TTFT by part from a result file: `requests`, a list of fields of Measured."""
    rows = json.loads(summary.read_text())["requests"]
    figure = Figure(figsize=(9, 0.9 + 0.32 * len(rows)), layout="constrained")
    axis = figure.subplots()
    for at, row in enumerate(rows):
        rest = row["ttft_s"] - row["prefill_s"] - row["exposed_s"]
        left = 0.0
        for name, seconds, colour in (
            ("prefill", row["prefill_s"], "tab:blue"),
            ("exposed transfer", row["exposed_s"], "tab:orange"),
            ("rest", rest, "tab:gray"),
        ):
            axis.barh(at, seconds, left=left, color=colour, label=name if at == 0 else None)
            left += seconds
        axis.plot([row["prefill_s"] + row["bound_s"]] * 2, [at - 0.4, at + 0.4], color="black", linewidth=1)
    how = [f"{r['tokens']}, {r['link']}" + ("" if r["overlap"] else ", no overlap") for r in rows]
    axis.set_yticks(range(len(rows)), how, fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel("seconds to the first token (line: the least that the transfer could add)")
    axis.legend(fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(picture, dpi=110)
