"""A prefill server that is reached at other addresses from other sites: what it tells whom."""

import pytest
from serving_fixtures import FINGERPRINT, SPEC, channel, decode_server, generate, prefill_server, request

from prfaas_jax.errors import InvalidInput
from prfaas_jax.serving import messages
from prfaas_jax.serving.proto import prefill_pb2, prefill_pb2_grpc
from prfaas_jax.testing.relay import Relay
from prfaas_jax.transfer.endpoint import parse_advertised
from prfaas_jax.transfer.wire import PROTOCOL_VERSION


def told(address: str, site: str) -> list[str]:
    """The lanes that a caller from `site` is told."""
    asked = prefill_pb2.PrefillRequest(
        protocol_version=PROTOCOL_VERSION,
        model_fingerprint=FINGERPRINT,
        cache_fingerprint=SPEC.fingerprint(),
        prompt=[1, 2, 3],
        sampling=messages.sampling_to_proto(messages.sampling_from_proto(prefill_pb2.PrefillRequest().sampling, 1, False)),
        site=site,
    )
    with channel(address) as opened:
        call = prefill_pb2_grpc.PrefillStub(opened).Prefill(asked, timeout=20)
        lanes = [lane.address for lane in next(call).accepted.lanes]
        call.cancel()
    return lanes


def test_each_site_has_its_own_lane_and_others_the_plain_one():
    with prefill_server(advertise_lane="east=127.0.0.1:11,127.0.0.1:12,west=127.0.0.1:13") as server:
        assert {site: told(server.address, site) for site in ("east", "west", "south", "")} == {
            "east": ["127.0.0.1:11"],
            "west": ["127.0.0.1:13"],
            "south": ["127.0.0.1:12"],
            "": ["127.0.0.1:12"],
        }


def test_an_unknown_site_comes_to_the_server_itself_where_nothing_else_is_said():
    with prefill_server(advertise_lane="east=127.0.0.1:11") as server:
        assert told(server.address, "west") == list(server.lane_addresses)


def test_a_decode_server_says_where_it_is():
    with Relay("127.0.0.1:9") as relay, prefill_server(advertise_lane=f"east={relay.address}") as prefill:
        relay.set_target(prefill.lane_addresses[0])
        for site, crosses in (("west", False), ("east", True)):
            before = relay.passed("down")
            with decode_server(site=site) as decode:
                usage = generate(decode.address, request(range(40), prefill=prefill.address)).usage
            assert usage.placement == "remote" and usage.kv_bytes_moved == SPEC.bytes(40)
            assert (relay.passed("down") - before > usage.kv_bytes_moved) == crosses


@pytest.mark.parametrize("text", ["", "east", "east=", "east=nowhere", "127.0.0.1:1,127.0.0.1:2", "a=h:1,a=h:2", "127.0.0.1:1,"])
def test_malformed_advertisements_are_refused_by_name(text):
    with pytest.raises(InvalidInput) as error:
        parse_advertised("advertise_lane", text)
    assert error.value.field == "advertise_lane"
