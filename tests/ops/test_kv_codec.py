"""Codecs against their promised error, bit patterns of numpy, and the wire form that a peer on another platform reads."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from prfaas_jax.errors import InvalidInput
from prfaas_jax.kvcache.codecs import CacheCodec
from prfaas_jax.kvcache.spec import CacheGroup, CacheSpec, LayerCache, TensorSpec
from prfaas_jax.ops.kv_codec import decode, encode
from prfaas_jax.testing.device_codecs import DTYPES, LARGEST, VALUES, promised, read_wire

BF16, FP8 = DTYPES["bfloat16"], VALUES["fp8"]
TINY = 2.0**-126
# Few shapes, or most of the time goes into compiling.
SHAPES = [(1, 1), (2, 3, 8), (2, 1, 3, 5)]

_encode = jax.jit(encode, static_argnums=1)
_decode = jax.jit(decode, static_argnums=(1, 2, 3))


def wire_of(x, codec):
    """Encoded, on the way proven the same eagerly and jitted."""
    wire = np.asarray(_encode(x, codec))
    np.testing.assert_array_equal(bits(encode(x, codec)), bits(wire))
    return wire


def back(wire, codec, dtype, width):
    got = np.asarray(_decode(wire, codec, dtype, width))
    np.testing.assert_array_equal(bits(decode(wire, codec, dtype, width)), bits(got))
    return got


def bits(x):
    return np.asarray(x).view(np.uint8)


@st.composite
def arrays(draw, dtype, special=True):
    """Any bit patterns, or finite values of one magnitude; rows of zeros and a few NaNs and infinities among them."""
    shape = draw(st.sampled_from(SHAPES))
    if special and draw(st.booleans()):
        unsigned = np.dtype(f"u{dtype.itemsize}")
        return draw(hnp.arrays(unsigned, shape)).view(dtype)
    magnitude = 2.0 ** draw(st.integers(-140, 120))
    unit = hnp.arrays(np.float64, shape, elements=st.floats(-1, 1, allow_subnormal=False))
    return (draw(unit) * magnitude).astype(dtype)


@pytest.mark.parametrize("codec", ["int8", "fp8"])
@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
def test_error_is_within_the_promise_and_what_is_not_finite_stays_in_its_row(codec, dtype, data):
    x = data.draw(arrays(DTYPES[dtype]))
    wire = wire_of(x, codec)
    assert wire.dtype == np.uint8 and wire.shape == (*x.shape[:-1], x.shape[-1] + 2)
    got = back(wire, codec, "float32", x.shape[-1]).astype(np.float64)
    x64 = x.astype(np.float64)
    finite = np.isfinite(x64).all(axis=-1)
    assert np.isnan(got[~finite]).all()
    assert (np.abs(got[finite] - x64[finite]) <= promised(x64[finite], codec)).all()


@pytest.mark.parametrize("codec", ["int8", "fp8"])
@given(data=st.data())
def test_decoding_is_value_times_scale_as_a_peer_reads_them(codec, data):
    """In float64 from the wire's bytes alone: values, then a little-endian bfloat16; float32 holds the product exactly."""
    x = data.draw(arrays(DTYPES["float32"], special=False))
    wire = wire_of(x, codec)
    values, scale = read_wire(wire, codec)
    assert (np.abs(values) <= LARGEST[codec]).all(), "nothing saturates"
    np.testing.assert_array_equal(back(wire, codec, "float32", x.shape[-1]), values * scale)
    np.testing.assert_array_equal(back(wire, codec, "bfloat16", x.shape[-1]), (values * scale).astype(np.float32).astype(BF16))
    largest = np.abs(x.astype(np.float64)).max(axis=-1, keepdims=True)
    normal = largest >= 2.0**-108
    assert (scale * LARGEST[codec] >= largest * (1 - 2.0**-20))[normal].all()
    assert (scale * LARGEST[codec] <= largest * (1 + 2.0**-7) * (1 + 2.0**-20))[normal].all()


@pytest.mark.parametrize("codec", ["int8", "fp8"])
@pytest.mark.parametrize("tokens", [4, 2000])
def test_a_bad_row_changes_no_bit_of_its_neighbours(codec, tokens):
    """Of many tokens too: over large arrays compilers vectorise, and a vectorised maximum of floats was seen to lose NaN."""
    x = np.random.default_rng(0).normal(size=(tokens, 3, 64)).astype(np.float32)
    clean = wire_of(x, codec)
    for bad in (np.nan, -np.nan, np.inf, -np.inf):
        broken = x.copy()
        broken[1, 2, 5] = bad
        wire = wire_of(broken, codec)
        same = (wire == clean).all(axis=-1)
        assert same.sum() == same.size - 1 and not same[1, 2]
        assert np.isnan(back(wire, codec, "bfloat16", 64)[1, 2].astype(np.float32)).all()


@pytest.mark.parametrize("codec", ["int8", "fp8"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [33, 64, 128, 576])
def test_a_nan_anywhere_in_a_row_is_seen(width, dtype, codec):
    """Real widths: a vectorised maximum passes over NaN."""
    x = np.random.default_rng(0).normal(size=(3 * width + 1, 1, width)).astype(DTYPES[dtype])
    for place, special in enumerate((np.nan, np.inf, -np.inf)):
        x[place * width + np.arange(width), 0, np.arange(width)] = special
    got = back(wire_of(x, codec), codec, "float32", width)
    assert np.isnan(got[:-1]).all() and np.isfinite(got[-1]).all()


@pytest.mark.parametrize("codec", ["int8", "fp8"])
@pytest.mark.parametrize("largest", [0.0, 1e-45, 1e-40, TINY, 1e-37, 1e-30, 1.0, 3e38])
def test_extreme_magnitudes_neither_overflow_nor_divide_by_zero(codec, largest):
    x = np.array([[largest, -largest, 0.0, largest / 2]], np.float32)
    got = back(wire_of(x, codec), codec, "float32", 4)
    assert np.isfinite(got).all() and (np.abs(got - x.astype(np.float64)) <= promised(x.astype(np.float64), codec)).all()
    if largest == 0:
        assert not got.any()


def test_rounds_to_nearest_and_ties_to_even():
    # The largest is 127, so the scale is 1.
    x = np.array([[127, 0.5, 1.5, 2.5, -0.5, -1.5, 0.500001, -126.5]], np.float32)
    assert wire_of(x, "int8")[0].view(np.int8).tolist() == [127, 0, 2, 2, 0, -2, 1, -126, -128, 63]


def test_every_float8_value_and_the_midpoints_between_them_round_as_in_numpy():
    codes = np.arange(256, dtype=np.uint8).view(FP8).astype(np.float32)
    grid = np.sort(codes[np.isfinite(codes)])
    middle = (grid[1:] + grid[:-1]) / 2
    x = np.concatenate([[448], grid, middle, np.nextafter(middle, np.float32(np.inf)), np.nextafter(middle, np.float32(-np.inf))])
    x = x.astype(np.float32)[None]
    np.testing.assert_array_equal(wire_of(x, "fp8")[..., :-2], x.astype(FP8).view(np.uint8))


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
def test_bf16_is_numpys_rounding_and_keeps_nan_and_infinity(dtype, data):
    x = data.draw(arrays(DTYPES[dtype]))
    wire = wire_of(x, "bf16")
    assert wire.dtype == BF16
    got = back(wire, "bf16", "float32", x.shape[-1])
    nan = np.isnan(x.astype(np.float32))
    np.testing.assert_array_equal(np.isnan(got), nan)
    with np.errstate(over="ignore"):
        expected = x.astype(np.float32).astype(BF16).astype(np.float32)
    flushed = np.abs(np.where(nan, 1, x.astype(np.float64))) < TINY
    np.testing.assert_array_equal(got[~flushed & ~nan], expected[~flushed & ~nan])
    assert (np.abs(got[flushed]) <= TINY).all()


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
def test_none_keeps_every_bit(dtype, data):
    x = data.draw(arrays(DTYPES[dtype]))
    np.testing.assert_array_equal(bits(back(wire_of(x, "none"), "none", dtype, x.shape[-1])), bits(x))


@pytest.mark.parametrize("text", ["none", "paged=int8,window=fp8,state=bf16"])
def test_the_wire_is_what_the_wire_spec_says(text):
    codec = CacheCodec.parse(text)
    caches = [
        LayerCache("paged", (TensorSpec("k", 3, 64, "bfloat16"),)),
        LayerCache("window", (TensorSpec("k", 2, 8, "float32"),), 6),
        LayerCache("state", (TensorSpec("recurrent", 4, 30, "float32"),)),
    ]
    spec = CacheSpec(tuple(CacheGroup(cache, (i,)) for i, cache in enumerate(caches)))
    for group, wire_group in zip(spec.groups, codec.wire_spec(spec).groups, strict=True):
        (tensor,), (wire_tensor,) = group.cache.tensors, wire_group.cache.tensors
        wire = _encode(jnp.ones((5, tensor.heads, tensor.width), tensor.dtype), codec.of(group.cache.kind))
        assert (wire.dtype, wire.shape) == (jnp.dtype(wire_tensor.dtype), (5, wire_tensor.heads, wire_tensor.width))


@pytest.mark.parametrize("codec", ["none", "bf16", "int8", "fp8"])
def test_one_program_per_shape_and_none_for_other_values(codec):
    @functools.partial(jax.jit, static_argnums=1)
    def there_and_back(x, name):
        return decode(encode(x, name), name, x.dtype, x.shape[-1])

    for value in (0.0, 1.0, np.nan, np.inf):
        there_and_back(np.full((4, 2, 8), value, np.float32), codec)
    assert there_and_back._cache_size() == 1


@pytest.mark.parametrize("codec", ["none", "bf16", "int8", "fp8"])
def test_no_tokens_are_encoded_to_no_bytes(codec):
    wire = encode(jnp.zeros((0, 3, 8)), codec)
    assert wire.size == 0 and decode(wire, codec, "float32", 8).shape == (0, 3, 8)


@pytest.mark.parametrize(
    ("x", "codec", "field"),
    [
        (np.zeros((2, 4), np.float32), "int4", "codec"),
        (np.zeros((2, 4), np.int32), "int8", "x"),
        (np.zeros(4, np.float32), "int8", "x"),
        (np.zeros((2, 0), np.float32), "int8", "x"),
    ],
)
def test_what_cannot_be_encoded_is_named(x, codec, field):
    with pytest.raises(InvalidInput) as e:
        encode(x, codec)
    assert e.value.field == field


@pytest.mark.parametrize(
    ("wire", "codec", "dtype", "width", "field"),
    [
        (np.zeros((2, 6), np.uint8), "int4", "float32", 4, "codec"),
        (np.zeros((2, 6), np.uint8), "int8", "float16", 4, "dtype"),
        (np.zeros((2, 6), np.uint8), "int8", "float32", 6, "wire"),
        (np.zeros((2, 2), np.uint8), "int8", "float32", 0, "wire"),
        (np.zeros((2, 6), np.int8), "int8", "float32", 4, "wire"),
        (np.zeros((2, 4), np.float32), "none", "bfloat16", 4, "wire"),
        (np.zeros((2, 4), np.float32), "bf16", "float32", 4, "wire"),
    ],
)
def test_what_cannot_be_decoded_is_named(wire, codec, dtype, width, field):
    with pytest.raises(InvalidInput) as e:
        decode(wire, codec, dtype, width)
    assert e.value.field == field


@pytest.mark.parametrize("codec", ["int8", "fp8"])
@given(data=st.data())
def test_any_bytes_decode_without_an_error(codec, data):
    wire = data.draw(hnp.arrays(np.uint8, (3, 2, 10)))
    assert _decode(wire, codec, "bfloat16", 8).shape == (3, 2, 8)
