import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from configs.models import load_model_config
from prfaas_jax.errors import InvalidInput
from prfaas_jax.sharding import TABLE, MeshSpec, Sharder, check_divides, make_mesh


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("data:1,model:2", MeshSpec(1, 2)),
        ("model:4", MeshSpec(1, 4)),
        ("data:2", MeshSpec(2, 1)),
        (" model:2 , data:3 ", MeshSpec(3, 2)),
        ("data:1,expert:4,model:2", MeshSpec(1, 2, expert=4)),
    ],
)
def test_mesh_spec_reads_what_it_writes(text, spec):
    assert MeshSpec.parse(text) == spec
    assert MeshSpec.parse(str(spec)) == spec
    assert spec.size == spec.data * spec.expert * spec.model == spec.data * spec.tensor


@pytest.mark.parametrize(
    "text", ["", "model", "model:", "model:0", "model:-1", "model:1.5", "model:x", "tensor:2", "model:1,model:2", "data:1;model:2"]
)
def test_malformed_mesh_names_the_flag(text):
    with pytest.raises(InvalidInput) as error:
        MeshSpec.parse(text, "--prefill_mesh")
    assert f"--prefill_mesh={text!r}" in str(error.value)


def test_mesh_lays_devices_out_data_major():
    mesh = make_mesh(MeshSpec(2, 2))
    assert dict(mesh.shape) == {"data": 2, "expert": 1, "model": 2}
    assert mesh.devices.ravel().tolist() == jax.devices()[:4]


def test_too_few_devices():
    with pytest.raises(InvalidInput, match=r"mesh='data:1,model:4096'.*at most \d+ devices"):
        make_mesh(MeshSpec(1, 4096))
    with pytest.raises(InvalidInput, match="at most 1 devices"):
        make_mesh(MeshSpec(2, 1), jax.devices()[:1])


def test_the_two_readings_differ_in_the_sequence_only():
    mesh = make_mesh(MeshSpec(2, 2))
    prefill, decode = Sharder(mesh, "prefill"), Sharder(mesh, "decode")
    assert {name for name in TABLE if prefill.axis(name) != decode.axis(name)} == {"seq"}
    assert prefill.spec("batch", "seq", "embed") == P("data", "model", None)
    assert decode.spec("batch", "seq", "embed") == P("data", None, None)
    assert prefill.spec("kv_heads", "pages", None, "head_dim") == P("model", "data", None, None)


def test_the_expert_axis_splits_experts_and_joins_the_model_axis_elsewhere():
    sharder = Sharder(make_mesh(MeshSpec(1, 2, expert=2)), "decode")
    assert sharder.spec("experts", "expert_mlp", "embed") == P("expert", "model", None)
    assert sharder.spec("heads", "embed") == P(("expert", "model"), None) == sharder.spec("vocab", "embed")
    assert sharder.size("heads") == 4 and sharder.size("experts") == 2


@pytest.mark.parametrize(("heads", "copies", "sharded"), [(8, 1, True), (4, 1, True), (2, 2, False), (1, 4, False)])
def test_heads_fewer_than_devices_live_on_several(heads, copies, sharded):
    sharder = Sharder(make_mesh(MeshSpec(1, 4)), "decode")
    assert sharder.copies(heads) == copies
    assert sharder.spec(f"kv_heads/{heads}") == (P("model") if sharded else P(None))
    spread = sharder.spread(jnp.arange(heads), heads, axis=0)
    assert spread.tolist() == np.repeat(np.arange(heads), copies).tolist()


def test_replicated_attention_keeps_heads_whole_and_shards_the_rest():
    sharder = Sharder(make_mesh(MeshSpec(1, 2)), "decode", "replicated")
    assert sharder.spec("heads", "kv_heads") == P(None, None)
    assert sharder.spec("mlp") == P("model") and sharder.spec("vocab") == P("model")
    assert sharder.size("kv_heads") == 1 and sharder.size("mlp") == 2 and sharder.size("embed") == 1


def test_one_mesh_axis_cannot_split_two_array_axes():
    with pytest.raises(ValueError, match="one mesh axis"):
        Sharder(make_mesh(MeshSpec(1, 2)), "prefill").spec("seq", "heads")


def test_unknown_logical_axis_is_an_error():
    with pytest.raises(KeyError, match="tokens"):
        Sharder(make_mesh(MeshSpec()), "prefill").spec("tokens")


def test_arrays_land_where_the_table_says():
    sharder = Sharder(make_mesh(MeshSpec(2, 2)), "prefill")
    x = np.arange(4 * 6 * 8, dtype=np.float32).reshape(4, 6, 8)
    placed = jax.device_put(x, sharder("batch", None, "mlp"))
    assert placed.addressable_shards[0].data.shape == (2, 6, 4)

    y = jax.jit(lambda a: sharder.constrain(a * 2, "batch", "seq", None))(jnp.asarray(x))
    assert y.sharding.is_equivalent_to(sharder("batch", "seq", None), 3)
    np.testing.assert_array_equal(y, x * 2)


def test_check_divides_names_axis_and_way_out():
    sizes = load_model_config("smollm2_135m").axis_sizes()  # 9 query heads, 3 kv heads
    check_divides(sizes, MeshSpec(8, 1), "sharded")  # the data axis splits no weight
    check_divides(sizes, MeshSpec(1, 3), "sharded")
    check_divides(sizes, MeshSpec(1, 2), "replicated")
    with pytest.raises(InvalidInput) as error:
        check_divides(sizes, MeshSpec(1, 2), "sharded", "--decode_mesh")
    message = str(error.value)
    assert "--decode_mesh='data:1,model:2'" in message and "heads=9" in message and "attention=replicated" in message
    with pytest.raises(InvalidInput, match="mlp=1536"):
        check_divides(sizes, MeshSpec(1, 5), "replicated")


def test_kv_heads_may_divide_the_devices_and_experts_must_be_divided():
    check_divides([("heads", 8), ("kv_heads", 2)], MeshSpec(1, 4), "sharded")
    with pytest.raises(InvalidInput, match="kv_heads=3"):
        check_divides([("kv_heads", 3)], MeshSpec(1, 4), "sharded")
    check_divides([("experts", 8), ("expert_mlp", 6)], MeshSpec(1, 2, expert=4), "sharded")
    with pytest.raises(InvalidInput, match=r"axes expert that divides experts=6"):
        check_divides([("experts", 6)], MeshSpec(1, 1, expert=4), "sharded")
