"""One suite for every implementation of decode attention, against dense float64 attention; kernels run in the Pallas interpreter."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from prfaas_jax.errors import InvalidInput
from prfaas_jax.ops import paged_attention as ops
from prfaas_jax.testing import attention_cases as oracle

LENGTHS = [0, 1, 15, 16, 17, 63, 64, 65, 530]
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


@functools.partial(jax.jit, static_argnames=("pages_per_layer", "scale", "implementation", "interpret"))
def attention(*args, **kwargs):
    return ops.paged_attention(*args, **kwargs)


def run(case: oracle.PagedCase, q: np.ndarray, scale: float, implementation: str = "xla") -> np.ndarray:
    """The op on a case with one new token per row, which is put into the pool first where the implementation wants that."""
    k_new, v_new = (np.stack([row[-1] for row in rows]) for rows in (case.k, case.v))
    k_pool, v_pool = case.k_pool.copy(), case.v_pool.copy()
    if ops.needs_current_in_pool(implementation):
        rows = np.arange(len(case.cached))
        page = case.layer * case.pages_per_layer + case.table[rows, case.cached // case.page_size]
        k_pool[:, page, case.cached % case.page_size] = k_new.transpose(1, 0, 2)
        v_pool[:, page, case.cached % case.page_size] = v_new.transpose(1, 0, 2)
        # What a caller hands a kernel as k_new must not matter.
        k_new, v_new = np.full_like(k_new, np.nan), np.full_like(v_new, np.nan)
    out = attention(
        q, k_new, v_new, k_pool, v_pool, case.table, case.cached, jnp.int32(case.layer), pages_per_layer=case.pages_per_layer,
        scale=scale, implementation=implementation, interpret=implementation != "xla",
    )  # fmt: skip
    assert out.dtype == q.dtype
    return np.asarray(out)


def expected(case: oracle.PagedCase, q: np.ndarray, scale: float) -> np.ndarray:
    rows = zip(q, case.k, case.v, case.cached, strict=True)
    return np.stack([oracle.attend(x[None], k, v, scale, int(n))[0] for x, k, v, n in rows])


def shapes():
    """(implementation, dtype, group, head_dim, page_size); what the interpreter takes long for is slow, one of each kind is not."""
    quick = {("pallas_gpu", "bfloat16", 3, 64, 16), ("pallas_gpu", "float32", 4, 128, 64), ("pallas_tpu", "bfloat16", 3, 128, 16)}
    for name in ops.IMPLEMENTATIONS:
        for dtype in DTYPES:
            for group in (1, 3, 4):
                for head_dim in (64, 128):
                    for page_size in (16, 64):
                        shape = (name, dtype, group, head_dim, page_size)
                        if ops.supports(name, group=group, head_dim=head_dim, page_size=page_size) is None:
                            yield pytest.param(*shape, marks=[] if name == "xla" or shape in quick else pytest.mark.slow)


@pytest.mark.parametrize(("implementation", "dtype", "group", "head_dim", "page_size"), list(shapes()))
def test_matches_dense_attention(implementation, dtype, group, head_dim, page_size):
    rng = np.random.default_rng(group * head_dim + page_size)
    # Kernels load whole pages and multiply what lies past the length by zero: huge is harmless there, NaN is not.
    kernel = ops.needs_current_in_pool(implementation)
    case = oracle.paged_case(
        rng, LENGTHS, 1, kv_heads=2, head_dim=head_dim, page_size=page_size, dtype=DTYPES[dtype],
        tail=1e20 if kernel else np.nan, dummy=-1e20 if kernel else np.nan,
    )  # fmt: skip
    q = rng.standard_normal((len(LENGTHS), 2 * group, head_dim)).astype(DTYPES[dtype])
    out = run(case, q, head_dim**-0.5, implementation).astype(np.float64)
    # The TPU kernel rounds keys and values to bfloat16 whatever the pool holds.
    tolerance = 2e-2 if dtype == "bfloat16" or implementation == "pallas_tpu" else 2e-6
    np.testing.assert_allclose(out, expected(case, q, head_dim**-0.5), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("implementation", ops.IMPLEMENTATIONS)
def test_layer_is_traced_and_dummy_rows_are_finite(implementation):
    rng = np.random.default_rng(0)
    case = oracle.paged_case(
        rng, [0, 20], 1, kv_heads=1, head_dim=128, page_size=16, dtype=DTYPES["float32"], layer=2, tail=0.0, table_width=3
    )
    case.table[0] = 0  # a padded row of the bucket: length 0, dummy table
    q = rng.standard_normal((2, 2, 128)).astype(np.float32)
    out = run(case, q, 0.1, implementation)
    assert np.isfinite(out).all()
    tolerance = 2e-2 if implementation == "pallas_tpu" else 2e-6
    np.testing.assert_allclose(out[1], expected(case, q, 0.1)[1], atol=tolerance)


def case_of(lengths: list[int], page_size: int = 16) -> tuple[oracle.PagedCase, np.ndarray]:
    """A case whose rows are a function of their length only, so that one row can be looked at in different batches."""
    case = oracle.paged_case(
        np.random.default_rng(1), lengths, 1, kv_heads=2, head_dim=64, page_size=page_size, dtype=DTYPES["float32"],
        table_width=1280 // page_size, pages_per_layer=10_240 // page_size,
    )  # fmt: skip
    q = np.zeros((len(lengths), 6, 64), np.float32)
    for row, length in enumerate(lengths):
        rng = np.random.default_rng(length)
        oracle.set_row(case, row, *(rng.standard_normal((length + 1, 2, 64)).astype(np.float32) for _ in range(2)))
        q[row] = rng.standard_normal((6, 64))
    return case, q


@pytest.mark.parametrize("length", [0, 5, 300, 513])
def test_a_row_does_not_depend_on_its_companions_its_position_or_the_page_size(length):
    alone = run(*case_of([length, 0, 0, 0, 0, 0, 0, 0]), 0.125)[0]
    for position, companions in ((3, [1, 40, 900, 1000, 7, 0, 600]), (7, [1100] * 7), (0, [257, 256, 255, 3, 2, 1, 0])):
        lengths = [*companions[:position], length, *companions[position:]]
        for page_size in (16, 64):
            np.testing.assert_array_equal(run(*case_of(lengths, page_size), 0.125)[position], alone)


def test_kernel_shapes_and_defaults():
    assert not ops.needs_current_in_pool("xla")
    assert "power of two" in (ops.supports("pallas_gpu", head_dim=80, page_size=16, group=4) or "")
    assert "page_size" in (ops.supports("pallas_gpu", head_dim=128, page_size=48, group=4) or "")
    assert "128" in (ops.supports("pallas_tpu", head_dim=64, page_size=16, group=4) or "")
    assert ops.default_implementation("cpu", head_dim=64, page_size=16, group=3)[0] == "xla"
    assert ops.default_implementation("cuda", head_dim=64, page_size=16, group=3)[0] == "pallas_gpu"
    assert ops.default_implementation("tpu", head_dim=128, page_size=16, group=3)[0] == "pallas_tpu"
    name, reason = ops.default_implementation("tpu", head_dim=64, page_size=16, group=3)
    assert name == "xla" and "head_dim=64" in reason


def test_asking_for_what_cannot_be_is_an_error():
    case, q = case_of([3])
    with pytest.raises(InvalidInput, match="head_dim=64 is not a multiple of 128"):
        run(case, q, 1.0, "pallas_tpu")
    with pytest.raises(InvalidInput, match="implementation='flash'"):
        run(case, q, 1.0, "flash")


def test_values_of_another_width_and_sinks():
    rng = np.random.default_rng(2)
    case = oracle.paged_case(rng, [0, 5, 130], 1, kv_heads=2, head_dim=24, value_dim=16, page_size=16, dtype=DTYPES["float32"])
    q, sinks = rng.standard_normal((3, 6, 24)).astype(np.float32), rng.standard_normal(6).astype(np.float32) * 3
    k_new, v_new = (np.stack([row[-1] for row in rows]) for rows in (case.k, case.v))
    out = attention(
        q, k_new, v_new, case.k_pool, case.v_pool, case.table, case.cached, jnp.int32(case.layer), sinks=sinks,
        pages_per_layer=case.pages_per_layer, scale=0.2,
    )  # fmt: skip
    rows = zip(q, case.k, case.v, case.cached, strict=True)
    want = np.stack([oracle.attend(x[None], k, v, 0.2, int(n), sinks=sinks)[0] for x, k, v, n in rows])
    np.testing.assert_allclose(out, want, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize(("platform", "kernel"), [("cuda", "pallas_gpu"), ("tpu", "pallas_tpu")])
def test_kernels_refuse_values_of_another_width_and_sinks(platform, kernel):
    shape = {"head_dim": 128, "page_size": 16, "group": 4}
    assert ops.supports(kernel, **shape, value_dim=128) is None
    for extra, reason in (({"value_dim": 64}, "value_dim=64 is not head_dim=128"), ({"sinks": True}, "sinks")):
        assert ops.supports("xla", **shape, **extra) is None
        assert reason in (ops.supports(kernel, **shape, **extra) or "")
        name, why = ops.default_implementation(platform, **shape, **extra)
        assert name == "xla" and reason in why


def test_no_implementation_copies_the_pool():
    """Compiled temporaries do not grow with the pool, also when the layer is traced."""

    def temp_bytes(pages_per_layer: int) -> int:
        pool = jax.ShapeDtypeStruct((2, 3 * pages_per_layer, 16, 64), jnp.float32)
        row = jax.ShapeDtypeStruct((8, 2, 64), jnp.float32)
        ints = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((8, 20), (8,), ())]
        args = (jax.ShapeDtypeStruct((8, 6, 64), jnp.float32), row, row, pool, pool, *ints)
        lowered = attention.lower(*args, pages_per_layer=pages_per_layer, scale=1.0, implementation="xla", interpret=False)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    assert temp_bytes(1000) <= temp_bytes(100) + 4096
