"""One workload through a live cluster, and the very same arrivals through the simulator: rows, figures by one definition, link use.

What a request counts for is `simulation.summary`'s business in both. Times, rates and bytes are the model's; only `Row` has live bytes.
"""

import collections
import contextlib
import dataclasses
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from prfaas_jax.errors import InvalidInput
from prfaas_jax.models.config import ModelConfig
from prfaas_jax.models.source import read_config
from prfaas_jax.scheduling.topology import GBPS, Topology
from prfaas_jax.serving.deployment import Deployment
from prfaas_jax.serving.report import PARTS
from prfaas_jax.simulation.contenders import Ground
from prfaas_jax.simulation.job import Job
from prfaas_jax.simulation.recorder import Usage
from prfaas_jax.simulation.runs import Run, prepare
from prfaas_jax.simulation.scenario import LinkPlan
from prfaas_jax.simulation.summary import Finished, Summary
from prfaas_jax.simulation.unloaded import Unloaded
from prfaas_jax.testing.cluster import LinkTrace
from prfaas_jax.testing.live_cluster import LiveCluster
from prfaas_jax.testing.live_launches import router_launch
from prfaas_jax.testing.replay import ReplayProcess
from prfaas_jax.testing.replay_script import Ask, Recorded, Row, Script, violations

# A live system without the tokens of a checker is asked a few requests again.
_RECHECKED = 3
# Figures of a live run that are held against a simulation, by short names.
COMPARED = {"ttft_p50": "ttft_p50_s", "ttft_p90": "ttft_p90_s", "throughput": "throughput_rps", "egress": "egress_gbps"}
# Model seconds that a probe's requests are apart, beyond what each takes.
_PROBE_PAUSE_S = 1.0


@dataclasses.dataclass(frozen=True)
class Played:
    """What a live run gave.

    Attributes:
        rows: one per request, by arrival.
        egress: {"time_s", one Gbit/s per link} over model time, as the relays saw it: with gRPC's own bytes, and the probes of idle
            links, a fortieth of them and at most 4 MiB/s.
        late_p99_s: wall seconds that the load generator was late.
        began: monotonic second of the first arrival.
        broken: what makes the run invalid.
    """

    rows: list[Row]
    egress: list[dict[str, float]]
    late_p99_s: float
    began: float
    broken: list[str]


def restart_router(live: LiveCluster, deployment: Deployment) -> None:
    """A fresh router for another policy of the same clusters; the other servers stay."""
    live.stop("router")
    router_launch(deployment, live.servers, Path(live.processes["router"].log_path).parent)
    live.deployment = deployment
    live.restart("router")


def byte_scale(live: LiveCluster) -> float:
    """Live bytes of KV per byte of the model's, as whole elements allow."""
    scales = {p.ready["byte_scale"] for p in live.processes.values() if "byte_scale" in p.ready}
    return scales.pop() if scales else 1.0


def script_of(live: LiveCluster, asks: Sequence[Ask], seed: int, vocab_size: int, block_tokens: int = 0, **more: Any) -> Script:
    """For the router of a live cluster; profiled engines have their tokens checked, of others a few requests are asked again."""
    deployment = live.deployment
    profiled = deployment.engine == "profiled"
    return Script(
        routers=(live.router_address,),
        asks=tuple(asks),
        seed=seed,
        vocab_size=vocab_size,
        time_scale=deployment.scale.time,
        block_tokens=block_tokens,
        check=profiled,
        recheck=0 if profiled else _RECHECKED,
        security={name: value for name, value in dataclasses.asdict(deployment.security).items() if value is not None},
        **more,
    )


def play(
    live: LiveCluster,
    script: Script,
    workdir: Path,
    label: str,
    period_s: float = 1.0,
    begun: Callable[[float], None] = lambda at: None,
) -> Played:
    """Replays a script and samples the links every `period_s` model seconds; `begun` is told the monotonic second of the first arrival.

    Raises ReplayInvalid where the load generator was late.
    """
    scale = script.time_scale
    paths = [os.fspath(workdir / f".{label}.{name}.json") for name in ("script", "rows")]
    try:
        with ReplayProcess(label) as process, contextlib.ExitStack() as stack:
            traces = {name: stack.enter_context(LinkTrace(lane, period_s / scale / 4)) for name, lane in live.lanes.items()}
            began = process.start(script, *paths)
            begun(began)
            rows, said = process.wait()
    finally:
        for path in paths:
            Path(path).unlink(missing_ok=True)
    egress = egress_rows(traces, began, scale, byte_scale(live), period_s)
    return Played(rows, egress, said["late_p99_s"], began, violations(rows))


def egress_rows(
    traces: Mapping[str, LinkTrace], began: float, time_scale: float, bytes_scale: float, period_s: float
) -> list[dict[str, float]]:
    """Gbit/s of the model per link and period of model time, from samples of live bytes."""
    end = max((trace.samples[-1][0] for trace in traces.values() if trace.samples), default=began)
    edges = np.arange(0.0, max((end - began) * time_scale, period_s) + period_s, period_s)
    rows: list[dict[str, float]] = [{"time_s": float(edge)} for edge in edges[1:]]
    for name, trace in traces.items():
        times, passed = (np.array(column, np.float64) for column in zip(*trace.samples, strict=True))
        at = np.interp(edges, (times - began) * time_scale, passed)
        for row, gained in zip(rows, np.diff(at), strict=True):
            row[name] = float(gained) / bytes_scale / period_s / GBPS
    return rows


def live_figures(rows: Sequence[Row], recorded: Recorded, deployment: Deployment, bytes_scale: float) -> dict[str, Any]:
    """`Summary.figures` of a live run, with failures by code, mean parts of TTFT, and counters.

    The SLO needs profiles: without a topology goodput and its share are absent.
    """
    summary = Summary(deployment.sim, len(rows))
    unloaded = _unloaded(deployment)
    done = [row for row in rows if row.done]
    for row in done:
        assert row.first_s is not None and row.done_s is not None  # done
        alone = unloaded.ttft(row.tokens) if unloaded is not None else math.nan
        output = recorded.recorded[row.number].output_tokens
        far = -1 if row.prefill == row.decode else 0
        sent = (row.kv_moved + row.kv_resent) / bytes_scale if far == 0 else 0.0
        times = row.arrival_s, row.first_s, row.done_s, alone
        summary.take(row.number, Finished(*times, row.tokens, output, 0, far, row.fallbacks, sent))
    figures = summary.figures()
    if unloaded is None:
        figures = {name: value for name, value in figures.items() if name not in ("goodput_rps", "slo_share")}
    figures["failed"] = dict(collections.Counter(row.error for row in rows if row.error))
    figures["failed_share"] = 1 - len(done) / len(rows)
    figures["parts_mean_s"] = {name: float(np.mean([row.parts[name] for row in done])) for name in PARTS} if done else {}
    for name in ("resumes", "returns", "kv_resent", "kv_skipped"):
        figures[name] = sum(getattr(row, name) for row in rows)
    return figures


def lambda_live(first_s: Sequence[float], began_s: float) -> float:
    """Requests per second that a system sustains, from the first tokens (model seconds) of requests that came faster than it can.

    All requests over the time from the first arrival to the last first token. A system with several paths is done when the last of them
    is: a rate counted while all are still busy would add up paths that are not loaded in the proportions of the workload, which Eq. 6
    does not allow. What the ends cost, a first prompt that must be computed before anything comes and instances that run empty one after
    the other, is about the time of one long prompt, 1 to 3 % of 600 requests, for each system alike and in the simulator too.
    """
    if not first_s:
        raise InvalidInput("first_s", (), "at least one finished request")
    return len(first_s) / (max(first_s) - began_s)


# --- the same in the simulator -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Simulated:
    """What a simulation gave: its jobs by arrival, its figures, {"time_s", ..} of `recorder.Usage`."""

    jobs: list[Job]
    rows: list[dict[str, Any]]
    figures: dict[str, Any]
    usage: list[dict[str, float]]


def simulated(
    deployment: Deployment, recorded: Recorded, links: Mapping[tuple[str, str], LinkPlan] | None = None, period_s: float = 1.0
) -> Simulated:
    """The deployment's own policy on the very arrivals; without prefix caches, which a live system has not.

    Raises InvalidInput for a deployment without profiles.
    """
    ground = deployment.ground
    if ground is None:
        raise InvalidInput("config.clusters", [c.name for c in deployment.clusters if c.instance is None], "a profile for each")
    options = dataclasses.replace(ground.options, prefill_cache_bytes=0.0, decode_cache_bytes=0.0)
    ground = Ground(ground.topology, ground.mix, options)
    run = Run(ground, recorded, deployment.policy, deployment.parameter, 0, recorded.requests, links or {})
    jobs: list[Job] = []
    simulation, summary = prepare(run, jobs.append)
    usage = Usage(simulation, period_s)
    simulation.run(recorded.requests)
    jobs.sort(key=lambda job: job.id)
    rows = [job.row(simulation.clusters, simulation.regions) for job in jobs]
    return Simulated(jobs, rows, summary.result(simulation), usage.samples.rows)


def errors(live: Mapping[str, Any], simulation: Mapping[str, Any]) -> dict[str, float]:
    """How far the live figures are from the simulated ones, as signed shares."""
    return {name: live[field] / simulation[field] - 1 if simulation[field] else live[field] for name, field in COMPARED.items()}


def chaos(
    deployment: Deployment, recorded: Recorded, simulation: Mapping[str, Any], late_s: float = 0.03, count: int = 20
) -> dict[str, float]:
    """How far a simulation is from others whose arrivals are up to `late_s` wall seconds late: root mean squares of `errors`.

    A policy that looks at queues decides otherwise after a little change, and that changes the queues: below this, errors say nothing.
    """
    late_s *= deployment.scale.time
    others = [errors(simulated(deployment, recorded.late(late_s, seed)).figures, simulation) for seed in range(count)]
    return {name: math.sqrt(np.mean([other[name] ** 2 for other in others])) for name in others[0]}


def same_placement(rows: Sequence[Row], jobs: Sequence[Mapping[str, Any]]) -> float:
    """Share of the live requests that were prefilled and decoded where the simulated ones were."""
    same = [
        (row.prefill if row.prefill != row.decode else "", row.decode) == (job["prefill"], job["decode"])
        for row, job in zip(rows, jobs, strict=True)
        if row.done
    ]
    return sum(same) / max(1, len(same))


def vocab_size(deployment: Deployment, load_model: Callable[[str], ModelConfig]) -> int:
    """Of the model that is played; `load_model` reads a model config by name."""
    return read_config(f"random:{deployment.model}" if deployment.engine == "profiled" else deployment.model, None, load_model).vocab_size


def _unloaded(deployment: Deployment, topology: Topology | None = None) -> Unloaded | None:
    topology = topology or deployment.topology
    return None if topology is None else Unloaded(topology, deployment.sim.prefill_chunk, deployment.sim.overlap)


# --- without queues ----------------------------------------------------------------------------------------------------------------


def probe_asks(deployment: Deployment, recorded: Recorded, count: int) -> tuple[Ask, ...]:
    """`count` of the prompts that were drawn, from short to long, one at a time and with one token each."""
    unloaded = _unloaded(deployment)
    assert unloaded is not None  # profiled
    by_length = sorted(range(recorded.requests), key=lambda i: recorded.recorded[i].tokens)
    chosen = [by_length[(2 * i + 1) * len(by_length) // (2 * count)] for i in range(count)]
    asks, now = [], 0.0
    for number, i in enumerate(chosen):
        arrival = recorded.recorded[i]
        asks.append(Ask(number, now, arrival.tokens, 1, tuple(arrival.blocks)))
        now += 2 * max(_path_ttft(deployment, None, arrival.tokens), unloaded.ttft(arrival.tokens)) + _PROBE_PAUSE_S
    return tuple(asks)


def probe_errors(deployment: Deployment, rows: Sequence[Row]) -> dict[str, Any]:
    """TTFT of requests that were alone, against `simulation.unloaded` on the path that each took: signed shares, model seconds."""
    done = [row for row in rows if row.done]
    expected = np.array([_path_ttft(deployment, row.prefill if row.prefill != row.decode else None, row.tokens) for row in done])
    measured = np.array([row.ttft_s for row in done])
    bare = measured - np.array([row.parts["queue"] for row in done])
    return {
        "requests": len(done),
        "mean": float(measured.mean() / expected.mean() - 1),
        "worst": float(np.abs(measured / expected - 1).max()),
        "mean_without_queue_part": float(bare.mean() / expected.mean() - 1),
        "over_s": float((measured - expected).mean()),
        "ttft_mean_s": float(measured.mean()),
        "unloaded_mean_s": float(expected.mean()),
    }


def _path_ttft(deployment: Deployment, prefill: str | None, tokens: int) -> float:
    """Seconds to the first token by a prefill cluster, None for a region's own instances; infinite where there is no such path."""
    topology = deployment.topology
    assert topology is not None  # profiled
    if prefill is None:
        regions = tuple(r for r in topology.regions if r.prefill)
        only = Topology(topology.kv, (), regions, ()) if regions else None
    else:
        # Nobody prefills beside the decode instances.
        links = tuple(x for x in topology.links if x.prefill == prefill)
        reached = {x.decode for x in links}
        regions = tuple(dataclasses.replace(r, prefill=0) for r in topology.regions if r.name in reached)
        only = Topology(topology.kv, tuple(c for c in topology.prefill if c.name == prefill), regions, links)
    unloaded = _unloaded(deployment, only) if only is not None else None
    return unloaded.ttft(tokens) if unloaded is not None else 0.0
