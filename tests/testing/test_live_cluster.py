"""A live deployment: real processes with toy engines, a link to each of two regions, one of which prefills beside its decode server."""

import socket
import threading
import urllib.request

import psutil
import pytest

from configs.clusters import load_deployment
from configs.clusters.paper_profiled import get_config as paper_profiled
from configs.clusters.three_regions_cpu import get_config as three_regions
from configs.clusters.two_sites_cpu import get_config as two_sites
from prfaas_jax.errors import InvalidInput
from prfaas_jax.serving.deployment import read_servers
from prfaas_jax.testing.demo import ask, token_prompt
from prfaas_jax.testing.live_cluster import LiveCluster
from prfaas_jax.testing.live_launches import relay_keys, server_launches

KV_BYTES = 2048  # of the toy, per token


def deployment():
    config = two_sites()
    with config.unlocked():
        config.engine_options.update({"chunk": 64, "max_length": 256})
        config.clusters["away"] = {"kind": "region", "decode": 1}
        config.links["far->home"].rtt_ms = 4.0
        config.links["far->away"] = {"gbps": 0.5, "rtt_ms": 8.0}
        config.parameter = 100.0
        config.tenants = {name: {"regions": (name,)} for name in ("home", "away")}
    return load_deployment(config)


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    before = set(psutil.Process().children(recursive=True))
    threads = threading.active_count()
    with LiveCluster(deployment(), tmp_path_factory.mktemp("live")) as cluster:
        yield cluster
        addresses = [*cluster.addresses.values(), *(r.address for r in (*cluster.lanes.values(), *cluster.controls.values()))]
    assert set(psutil.Process().children(recursive=True)) <= before
    assert [a for a in addresses if _taken(a)] == []
    assert not [t for t in threading.enumerate() if t.name == "relay"] and threading.active_count() <= threads + 2


def _taken(address: str) -> bool:
    host, port = address.rsplit(":", 1)
    with socket.socket() as sock:
        return sock.connect_ex((host, int(port))) == 0


def generate(live, tokens, tenant=""):
    request = token_prompt([7] * tokens, 3)
    request.tenant = tenant
    return ask(live.router_address, request, lambda text: None, 60).usage


def crossed(live):
    return {name: relay.passed("down") for name, relay in live.lanes.items()}


def test_names_addresses_and_files(live):
    servers = ["far/0", "home/prefill/0", "away/decode/0", "home/decode/0", "router"]
    assert sorted(live.processes) == sorted(live.addresses) == sorted(servers)
    assert list(live.lanes) == list(live.controls) == ["far->away", "far->home"]
    assert {name: relay.status()["down"]["gbps"] for name, relay in live.lanes.items()} == {"far->away": 0.5, "far->home": 1.0}
    found = {c.name: c for c in read_servers(live.processes["router"].log_path.parent / "servers.json")}
    assert found == {c.name: c for c in live.servers}
    assert found["far"].seen_from("home", live.addresses["far/0"]) == live.controls["far->home"].address
    assert found["home"].prefill == (live.addresses["home/prefill/0"],)
    assert live.startup() == ", ".join(f"{name}: ready" for name in live.processes)
    assert live.ended() == ()


def test_statuses_and_metrics_of_every_server(live):
    statuses = live.statuses(timeout_s=30)
    assert sorted(statuses) == sorted(live.addresses)
    assert len({s.model_fingerprint for name, s in statuses.items() if name != "router"}) == 1
    assert len(statuses["router"].backends) == 4
    assert sorted(live.metrics_addresses) == sorted(live.addresses)
    for address in live.metrics_addresses.values():
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=30) as answer:
            assert b"prfaas:" in answer.read()


def check_crossed(live, before, lane, tokens):
    """The request's KV has crossed one lane, or none, and the others nothing but pings."""
    for name, count in crossed(live).items():
        passed = count - before[name]
        if name == lane:
            assert tokens * KV_BYTES < passed < 1.1 * tokens * KV_BYTES + 4096
        else:
            assert passed < 2048


def test_a_long_prompt_comes_over_the_link_of_its_region(live):
    before = crossed(live)
    usage = generate(live, 150)
    assert (usage.placement, usage.prefill_cluster) == ("remote", "far"), usage.reason
    assert usage.kv_bytes_moved == usage.kv_bytes_expected == 150 * KV_BYTES and usage.tokens_recomputed == 0
    check_crossed(live, before, f"far->{usage.decode_cluster}", 150)


@pytest.mark.parametrize("region", ["home", "away"])
def test_each_region_is_told_its_own_lane(live, region):
    """The decode server itself is asked, so that the region is chosen here."""
    before = crossed(live)
    request = token_prompt([5] * 150, 3)
    request.placement.prefill_address = live.controls[f"far->{region}"].address
    usage = ask(live.addresses[f"{region}/decode/0"], request, lambda text: None, 60).usage
    assert usage.placement == "remote" and usage.kv_bytes_moved == 150 * KV_BYTES
    check_crossed(live, before, f"far->{region}", 150)


@pytest.mark.parametrize(("region", "prefill"), [("home", "home"), ("away", "")])
def test_a_short_prompt_stays_in_its_region(live, region, prefill):
    """Beside the decode server where there is a prefill server, else in it; tenants say which region."""
    before = crossed(live)
    usage = generate(live, 80, region)
    assert (usage.decode_cluster, usage.placement) == (region, "remote" if prefill else "local"), usage.reason
    assert usage.kv_bytes_moved == usage.kv_bytes_expected == (80 * KV_BYTES if prefill else 0)
    assert usage.prefill_address == (live.addresses["home/prefill/0"] if prefill else "")
    check_crossed(live, before, None, 80)


def test_a_process_that_dies_is_reported_and_comes_back_where_it_was(live):
    address, process = live.addresses["home/decode/0"], live.processes["home/decode/0"]
    with pytest.raises(InvalidInput, match="name='home/decode/0'"):
        live.restart("home/decode/0")  # it runs
    process.popen.kill()
    process.popen.wait(30)
    assert live.ended() == ("home/decode/0",)
    assert "home/decode/0" not in live.statuses(timeout_s=5)
    assert live.restart("home/decode/0").ready["address"] == address
    assert live.ended() == () and (process.log_path.with_suffix(".1.log")).exists()
    assert live.status("home/decode/0").engine.decode_slots > 0
    assert live.stop("home/prefill/0") == 0
    assert live.ended() == ()  # it was told to
    live.restart("home/prefill/0")


@pytest.mark.parametrize("call", ["stop", "restart", "status"])
def test_unknown_names_are_refused(live, call):
    with pytest.raises(InvalidInput, match="name='nobody'"):
        getattr(live, call)("nobody")


def test_sender_processes_cannot_stand_behind_a_relay(tmp_path):
    config = two_sites()
    with config.unlocked():
        config.clusters.far.prefill_server = {"sender_processes": 2}
    with pytest.raises(InvalidInput, match=r"config\.clusters\.far\.prefill_server\.sender_processes=2"):
        LiveCluster(load_deployment(config), tmp_path)


def test_several_servers_share_their_link_and_each_has_relays(tmp_path):
    deployment = load_deployment(three_regions())
    keys = [key for link in deployment.links for key in relay_keys(deployment, link)]
    assert keys == [
        *("bulk->east/0", "bulk->east/1", "bulk->south/0", "bulk->south/1", "bulk->west/0", "bulk->west/1"),
        *("spot->east", "spot->west"),
    ]
    lanes = {key: f"127.0.0.1:{i + 1}" for i, key in enumerate(keys)}
    launches = server_launches(deployment, lanes, tmp_path)
    assert list(launches) == ["bulk/0", "bulk/1", "spot/0", "east/prefill/0", "east/decode/0", "south/decode/0", *WEST]
    assert launches["bulk/1"].flags["advertise_lane"] == "east=127.0.0.1:2,south=127.0.0.1:4,west=127.0.0.1:6"
    assert launches["east/prefill/0"].flags["advertise_lane"] is None
    assert {launches[name].flags["site"] for name in WEST} == {"west"}


WEST = ("west/decode/0", "west/decode/1")


def test_convertible_servers_are_both_and_come_back_at_their_addresses(tmp_path):
    config = two_sites()
    config.clusters.home.convertible = True
    deployment = load_deployment(config)
    launches = server_launches(deployment, {"far->home": "127.0.0.1:1"}, tmp_path)
    assert {name: launch.flags.get("role") for name, launch in launches.items()} == {"far/0": None, "home/0": "prefill", "home/1": "decode"}
    launch = launches["home/1"]
    assert launch.services == {"prefill": "home/prefill/1", "decode": "home/decode/1"}
    prefill = {"address": "127.0.0.1:2", "lane_addresses": ["127.0.0.1:3"], "metrics_address": ""}
    launch.keep({"prefill": prefill, "decode": {"address": "127.0.0.1:4", "metrics_address": "127.0.0.1:5"}})
    found = {name: launch.flags[name] for name in ("address", "lane_address", "decode_address", "decode_site", "decode_metrics_address")}
    assert found == {
        "address": "127.0.0.1:2",
        "lane_address": "127.0.0.1:3",
        "decode_address": "127.0.0.1:4",
        "decode_site": "home",
        "decode_metrics_address": "127.0.0.1:5",
    }
    assert launch.flags.get("metrics_address") != "", "there is none to come back at"


def test_profiled_clusters_are_one_process_each(tmp_path):
    config = paper_profiled()
    config.time_scale = 20.0
    config.metrics = False
    with LiveCluster(load_deployment(config), tmp_path) as live:
        assert list(live.processes) == ["prfaas/0", "pd/0", "router"]
        assert list(live.addresses) == ["prfaas/0", "pd/prefill/0", "pd/decode/0", "router"]
        # 100 Gbit/s, 20 times as fast, a thousandth of the bytes; the scale is met to within 2 %.
        assert live.lanes["prfaas->pd"].status()["down"]["gbps"] == pytest.approx(2.0, rel=0.02)
        usage = generate(live, 30_000)
        assert (usage.prefill_cluster, usage.decode_cluster, usage.tokens_recomputed) == ("prfaas", "pd", 0)
        expected = 1e-3 * load_deployment(config).topology.kv.bytes(30_000)
        assert usage.kv_bytes_moved == usage.kv_bytes_expected == pytest.approx(expected, rel=0.02)
        assert live.lanes["prfaas->pd"].passed("down") > usage.kv_bytes_moved
        near = generate(live, 1000)
        assert near.prefill_cluster in ("", "pd") and near.tokens_recomputed == 0
        live.processes["pd/0"].popen.kill()
        live.processes["pd/0"].popen.wait(30)
        before = live.addresses["pd/decode/0"]
        assert live.restart("pd/0").ready["decode"]["address"] == before
        assert set(live.statuses()) == set(live.addresses)
