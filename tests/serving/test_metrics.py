"""Metrics over HTTP: they are what usages and statuses say, their labels are few, and only those who may can read them."""

import asyncio
import contextlib
import dataclasses
import socket
import ssl
import urllib.error
import urllib.request

import grpc
import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from serving_fixtures import (
    decode_engine,
    decode_server,
    error_of,
    eventually,
    generate,
    generation_status,
    prefill_server,
    prefill_status,
    prompt_of,
    request,
)

from prfaas_jax.errors import InvalidInput
from prfaas_jax.serving import metrics_endpoint
from prfaas_jax.serving.decode_server import DecodeServer, DecodeServerOptions
from prfaas_jax.serving.metric_families import MAX_VALUES, OTHER, Histogram
from prfaas_jax.serving.metrics import GenerationMetrics, RouterMetrics
from prfaas_jax.serving.metrics_endpoint import MetricsEndpoint
from prfaas_jax.serving.prefill_server import PrefillServerOptions
from prfaas_jax.serving.proto import generation_pb2
from prfaas_jax.serving.report import PARTS
from prfaas_jax.testing.certificates import CertificateOptions, make_certificates
from prfaas_jax.transfer.security import NONE, Security

ANY = "127.0.0.1:0"
# Nobody listens there.
NOWHERE = "127.0.0.1:1"


def scrape(address: str, path: str = "/metrics", tls: ssl.SSLContext | None = None) -> str:
    with urllib.request.urlopen(f"{'https' if tls else 'http'}://{address}{path}", timeout=20, context=tls) as reply:
        return reply.read().decode()


class Samples:
    """A scrape, parsed as Prometheus would."""

    def __init__(self, text: str):
        self.all = [sample for family in text_string_to_metric_families(text) for sample in family.samples]

    def __call__(self, name: str, **labels: str) -> float:
        (value,) = [s.value for s in self.all if s.name == f"prfaas:{name}" and s.labels == labels]
        return value

    def labels(self, name: str) -> list[dict[str, str]]:
        return [s.labels for s in self.all if s.name == f"prfaas:{name}"]


def samples_of(metrics: GenerationMetrics) -> Samples:
    async def collect() -> str:
        await metrics.start()
        return (await asyncio.to_thread(generate_latest, metrics.registry)).decode()

    return Samples(asyncio.run(collect()))


def test_a_live_pairs_metrics_are_what_its_usages_and_statuses_say():
    with prefill_server(metrics_address=ANY) as prefill, decode_server(metrics_address=ANY) as decode:
        usages = [generate(decode.address, request(prompt_of(n), 5, prefill.address)).usage for n in (70, 200, 300)]
        usages.append(generate(decode.address, request(prompt_of(33), 20)).usage)
        usages.append(generate(decode.address, request(prompt_of(50), 3, NOWHERE, allow_fallback=True)).usage)
        assert error_of(decode.address, request(prompt_of(50), 3, NOWHERE)).code() is grpc.StatusCode.UNAVAILABLE
        eventually(lambda: prefill_status(prefill.address).tickets == 0)
        eventually(lambda: Samples(scrape(decode.metrics_address))("request_success_total", finished_reason="length") == 5)
        there = Samples(scrape(prefill.metrics_address))
        here = Samples(scrape(decode.metrics_address))
        prefill_engine, engine = prefill_status(prefill.address).engine, generation_status(decode.address).engine

    for name in ("time_to_first_token_seconds", "e2e_request_latency_seconds", "request_queue_time_seconds"):
        assert here(f"{name}_count") == here(f"{name}_bucket", le="+Inf") == 5
    assert here("time_to_first_token_seconds_sum") == pytest.approx(sum(u.ttft_s for u in usages))
    assert here("inter_token_latency_seconds_count") == 3 * 4 + 19 + 2
    assert here("inter_token_latency_seconds_sum") == pytest.approx(sum(sum(u.itl_s) for u in usages))
    for part in PARTS:
        assert here("ttft_part_seconds_sum", part=part) == pytest.approx(sum(getattr(u.parts, part) for u in usages))
    for name, field in (("moved", "kv_bytes_moved"), ("skipped", "kv_bytes_skipped"), ("resent", "kv_bytes_resent")):
        assert here(f"kv_bytes_{name}_total") == sum(getattr(u, field) for u in usages)
    assert here("kv_bytes_moved_total") > 0 == here("tokens_recomputed_total")
    assert here("link_bytes_total", prefill_address=prefill.address) == sum(u.kv_bytes_wire for u in usages)
    assert here.labels("link_goodput_bytes_per_second") == [{"prefill_address": prefill.address}]
    assert (here("prompt_tokens_total"), here("generation_tokens_total")) == (70 + 200 + 300 + 33 + 50, 15 + 20 + 3)
    assert here("requests_total", placement="remote", reason="") == 3 and here("requests_total", placement="local", reason="") == 2
    assert here("request_success_total", finished_reason="length") == 5
    assert here("request_failures_total", code="UNAVAILABLE") == 1 == here("fallbacks_total")
    assert (here("kv_pages"), here("kv_pages_free")) == (engine.pages_total, engine.pages_free)
    assert here("kv_cache_usage_perc") == here("num_requests_running") == here("num_requests_waiting") == here("draining") == 0
    assert there("engine_tokens_prefilled_total") == prefill_engine.tokens_prefilled == 570
    assert there("tickets") == there("staged_bytes") == there("streams") == 0
    assert any(s.name == "process_resident_memory_bytes" and s.value > 0 for s in there.all)


def test_a_routers_status_becomes_gauges_by_server():
    status = generation_pb2.GenerationStatus(
        served={"remote: threshold": 3, "local: fallback": 1},
        failed={"UNAVAILABLE": 2},
        conversions=3,
        ways=[generation_pb2.Way(region="near", prefill_address="10.0.0.1:1", breaker="open")],
        decisions={"remote: threshold": 4, "local: canary": 1, "shadow remote: least_ttft": 5, "shadow failed": 2},
        backends=[
            generation_pb2.Backend(role="prefill", cluster="far", address="10.0.0.1:1", healthy=True, breaker="half-open"),
            generation_pb2.Backend(role="prefill", cluster="far", address="10.0.0.2:1", healthy=False, breaker="open"),
            generation_pb2.Backend(role="decode", cluster="near", address="10.0.0.3:1", healthy=True, breaker="closed"),
        ],
        links=[
            generation_pb2.Link(prefill_address="10.0.0.1:1", bytes_per_s=1e9, rtt_s=0.02, stalls=7, stalled_s=1.5),
            generation_pb2.Link(prefill_address="10.0.0.2:1", pending=2, pending_bytes=3e6),
        ],
    )
    metrics = RouterMetrics(lambda: status, "", NONE)
    metrics.decided(3e-5, "threshold: 700 > 512 tokens")
    metrics.decided(0.5, "threshold: 9 > 8 tokens")
    found = samples_of(metrics)
    assert found("requests_total", placement="remote", reason="threshold") == 3
    assert found("conversions_total") == 3
    assert found("way_breaker_state", region="near", prefill_address="10.0.0.1:1") == 2
    assert found("decisions_total", placement="remote", reason="threshold") == 4
    assert found("decisions_total", placement="local", reason="canary") == 1
    assert found("decisions_total", placement="shadow remote", reason="least_ttft") == 5
    assert found("decisions_total", placement="shadow failed", reason="") == 2
    assert [found("breaker_state", role=r, cluster=c, address=a) for r, c, a in FAR_AND_NEAR] == [1, 2, 0]
    assert [found("backend_healthy", role=r, cluster=c, address=a) for r, c, a in FAR_AND_NEAR] == [1, 0, 1]
    assert found("backends_healthy", role="prefill") == found("backends_healthy", role="decode") == 1
    link = {"prefill_address": "10.0.0.1:1"}
    assert (found("link_bytes_per_second", **link), found("link_rtt_seconds", **link)) == (1e9, 0.02)
    assert (found("link_stalls_total", **link), found("link_stalled_seconds_total", **link)) == (7, 1.5)
    assert found.labels("link_bytes_per_second") == [link], "the other one was never measured"
    assert [found("link_requests_pending", prefill_address=a) for _, _, a in FAR_AND_NEAR[:2]] == [0, 2]
    assert found("link_bytes_pending", prefill_address="10.0.0.2:1") == 3e6
    assert found("router_decision_seconds_count", reason="threshold") == 2
    assert found("router_decision_seconds_bucket", reason="threshold", le="5e-05") == 1
    assert not found.labels("kv_pages")  # it has no engine


def test_what_is_done_again_is_no_latency():
    """A request whose decode server died after a minute had its first token long before the second one drew it again."""
    metrics = GenerationMetrics(generation_pb2.GenerationStatus, "", NONE)
    metrics.observe(generation_pb2.Usage(ttft_s=61.0, itl_s=[0.1], output_tokens=2, finish_reason="length", events_before=1))
    metrics.observe(generation_pb2.Usage(ttft_s=1.0, itl_s=[0.1], output_tokens=2, finish_reason="length"))
    found = samples_of(metrics)
    assert found("time_to_first_token_seconds_sum") == 1.0 and found("inter_token_latency_seconds_count") == 1
    assert found("ttft_part_seconds_count", part="route") == 1 and found("generation_tokens_total") == 4


FAR_AND_NEAR = (("prefill", "far", "10.0.0.1:1"), ("prefill", "far", "10.0.0.2:1"), ("decode", "near", "10.0.0.3:1"))


def test_labels_have_few_values_whatever_others_send():
    many = range(3 * MAX_VALUES)
    status = generation_pb2.GenerationStatus(
        served={f"remote: reason{i}: {i} tokens": 1 for i in many},
        decisions={f"remote: reason{i}": 1 for i in many},
        links=[generation_pb2.Link(prefill_address=f"10.0.0.1:{i}", rtt_s=0.01) for i in many],
    )
    metrics = RouterMetrics(lambda: status, "", NONE)
    for i in many:
        metrics.observe(
            generation_pb2.Usage(placement="remote", prefill_address=f"10.0.0.1:{i}", finish_reason=f"stop{i}", kv_bytes_wire=1)
        )
        metrics.decided(1e-4, f"reason{i}")
    found = samples_of(metrics)
    for name in ("requests_total", "decisions_total", "link_rtt_seconds", "link_bytes_total", "request_success_total"):
        assert MAX_VALUES <= len(found.labels(name)) <= MAX_VALUES + 1
    assert found("decisions_total", placement=OTHER, reason=OTHER) == 2 * MAX_VALUES
    assert found("link_bytes_total", prefill_address=OTHER) == 2 * MAX_VALUES
    assert found("router_decision_seconds_count", reason=OTHER) == 2 * MAX_VALUES
    names = {label for sample in found.all for label in sample.labels}
    assert names == {"placement", "reason", "prefill_address", "finished_reason", "part", "le"}


def test_a_histogram_puts_values_at_and_above_its_bounds_where_prometheus_does():
    one_by_one, together = Histogram((0.1, 0.2, 0.4)), Histogram((0.1, 0.2, 0.4))
    values = [0.1, 0.05, 0.15, 0.2, 0.4, 0.5, 7.0] * 4
    for value in values:
        one_by_one.observe([value])
    together.observe(values)
    for histogram in (one_by_one, together):
        buckets, total = histogram.read()
        assert buckets == [("0.1", 8), ("0.2", 16), ("0.4", 20), ("+Inf", 28)]
        assert total == pytest.approx(sum(values))


# --- the port ------------------------------------------------------------------------------------------------------------------------


def test_other_paths_and_a_server_that_cannot_answer_are_http_errors():
    async def errors() -> list[int]:
        metrics = GenerationMetrics(lambda: generation_pb2.GenerationStatus()[0], ANY, NONE)
        await metrics.start()
        try:
            return [await asyncio.to_thread(code, metrics.address, path) for path in ("/", "/metrics/", "/../etc/passwd", "/metrics")]
        finally:
            await metrics.stop()

    def code(address: str, path: str) -> int:
        with pytest.raises(urllib.error.HTTPError) as caught:
            scrape(address, path)
        caught.value.close()
        return caught.value.code

    assert asyncio.run(errors()) == [404, 404, 404, 503]


def test_a_scrape_is_answered_while_the_server_drains_and_not_after():
    engine = decode_engine(step_s=0.05)

    async def run() -> tuple[Samples, str]:
        server = DecodeServer(engine, None, DecodeServerOptions(metrics_address=ANY))
        await server.start()
        answer = asyncio.create_task(asyncio.to_thread(generate, server.address, request(prompt_of(5), 40)))
        while not server._status().engine.running:
            await asyncio.sleep(0.01)
        stopping = asyncio.create_task(server.stop(20))
        await asyncio.sleep(0)
        text = await asyncio.to_thread(scrape, server.metrics_address)
        assert not stopping.done()
        await stopping
        assert len((await answer).tokens) == 40
        return Samples(text), server.metrics_address

    with contextlib.closing(engine):
        found, address = asyncio.run(run())
    assert found("draining") == found("num_requests_running") == 1
    with pytest.raises(urllib.error.URLError):
        scrape(address)


def test_a_port_in_use_is_named_and_nothing_stays_bound():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        taken = prefill_server(metrics_address=f"127.0.0.1:{port}")
        with pytest.raises(InvalidInput, match="metrics_address"), taken:
            pass
    with decode_server() as decode:
        assert decode.metrics_address == ""
        second = decode_server(address=decode.address, metrics_address=f"127.0.0.1:{port}")
        with pytest.raises(InvalidInput, match=r"\baddress="), second:
            pass
    socket.create_server(("127.0.0.1", port)).close()


@pytest.mark.parametrize("options", [DecodeServerOptions, PrefillServerOptions])
def test_others_than_this_machine_only_with_tls_or_insecure(options):
    with pytest.raises(InvalidInput, match="metrics_address"):
        options(metrics_address="0.0.0.0:9090")
    with pytest.raises(InvalidInput, match="metrics_address"):
        options(metrics_address="9090")
    assert options(metrics_address="0.0.0.0:9090", insecure=True).metrics_address == "0.0.0.0:9090"


def test_with_tls_only_certificates_of_the_same_ca_may_scrape(tmp_path):
    ours, theirs = (CertificateOptions(str(tmp_path / name)) for name in ("ours", "theirs"))
    for made in (ours, theirs):
        make_certificates(made)
    client, stranger = ours.security("client"), theirs.security("client")
    with decode_server(metrics_address=ANY, **dataclasses.asdict(ours.security("decode"))) as decode:
        host, port = decode.metrics_address.split(":")
        with contextlib.closing(socket.create_connection((host, int(port)))):  # one that says nothing holds nobody up
            assert "prfaas:streams 0.0" in scrape(decode.metrics_address, tls=context(client))
        for refused in (context(dataclasses.replace(client, tls_cert=stranger.tls_cert, tls_key=stranger.tls_key)), anonymous(client)):
            with pytest.raises((OSError, ssl.SSLError)):
                scrape(decode.metrics_address, tls=refused)
        with pytest.raises(OSError):
            scrape(decode.metrics_address)
        assert "prfaas:streams 0.0" in scrape(decode.metrics_address, tls=context(client))


def anonymous(security: Security) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=security.tls_ca)


def context(security: Security) -> ssl.SSLContext:
    made = anonymous(security)
    made.load_cert_chain(security.tls_cert, security.tls_key)
    return made


def test_a_flood_of_silent_connections_ends_nothing(monkeypatch):
    monkeypatch.setattr(metrics_endpoint, "_IDLE_S", 0.5)
    endpoint = MetricsEndpoint(ANY, GenerationMetrics(generation_pb2.GenerationStatus, "", NONE).registry, NONE)
    endpoint.start()
    host, port = endpoint.address.split(":")
    with contextlib.ExitStack() as held:
        for _ in range(40):
            held.enter_context(contextlib.closing(socket.create_connection((host, int(port)))))
        with pytest.raises(OSError):
            scrape(endpoint.address)
        # They are hung up on, and who speaks is heard; its 503 says that this server was never started.
        eventually(lambda: code_of(endpoint.address) == 503, 10)
    endpoint.stop()
    endpoint.stop()
    with pytest.raises(urllib.error.URLError):
        scrape(endpoint.address)


def code_of(address: str) -> int:
    try:
        scrape(address)
    except urllib.error.HTTPError as error:
        with error:
            return error.code
    except OSError:
        pass
    return 0
