"""The ops on whatever device is here, against float64 references on the host, and staging through pinned host memory."""

import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import SingleDeviceSharding

from prfaas_jax.ops.paged_attention import IMPLEMENTATIONS, needs_current_in_pool, paged_attention, supports
from prfaas_jax.ops.pool_write import gather_tokens, write_tokens
from prfaas_jax.ops.prefill_attention import prefill_attention
from prfaas_jax.testing import device_codecs, device_hybrid_ops
from prfaas_jax.testing.attention_cases import PagedCase, attend, paged_case

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
# What is promised across platforms for float32; bfloat16 keeps eight bits.
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}
_KERNEL_PLATFORM = {"pallas_gpu": "gpu", "pallas_tpu": "tpu"}
_LENGTHS = [0, 1, 15, 16, 17, 63, 64, 65, 530]
# (query heads per kv head, head_dim, page_size): SmolLM2, Qwen3-0.6B, Qwen3-8B, and a large page.
_SHAPES = ((3, 64, 16), (2, 128, 16), (4, 128, 16), (4, 128, 64))

Row = dict[str, Any]


def check_ops(platform: str) -> tuple[list[Row], list[str]]:
    """(one row per check with its largest error, what was skipped and why)."""
    elsewhere = {name: where for name, where in _KERNEL_PLATFORM.items() if where != platform}
    rows, skipped = [], [f"ops {name}: runs on {where}, this is {platform}" for name, where in elsewhere.items()]
    for dtype in DTYPES:
        for group, head_dim, page_size in _SHAPES:
            rows.append(_prefill(dtype, group, head_dim, page_size))
            for name in (n for n in IMPLEMENTATIONS if n not in elsewhere):
                if reason := supports(name, head_dim=head_dim, page_size=page_size, group=group):
                    skipped.append(f"ops {name} {dtype}: {reason}")
                else:
                    rows.append(_decode(name, dtype, group, head_dim, page_size))
        rows.append(_round_trip(dtype))
        rows += [_row(op, dtype, shape, error, TOLERANCE[dtype]) for op, shape, error in device_hybrid_ops.check(dtype)]
        # The error is a share of what the codec promises.
        rows += [_row(op, dtype, shape, share, 1.0) for op, shape, share in device_codecs.check(dtype)]
    return rows, skipped


def _attention_row(op: str, dtype: str, shape: tuple[int, int, int], error: float, tolerance: float) -> Row:
    return _row(op, dtype, "group {}, head_dim {}, page_size {}".format(*shape), error, tolerance)


def _row(op: str, dtype: str, shape: str, error: float, tolerance: float) -> Row:
    row = {"op": op, "dtype": dtype, "shape": shape}
    # A NaN is not within any tolerance.
    return {**row, "max_error": error if np.isfinite(error) else None, "tolerance": tolerance, "ok": bool(error <= tolerance)}


@functools.partial(jax.jit, static_argnames=("pages_per_layer", "scale", "implementation"))
def _paged_attention(*args: Any, **kwargs: Any) -> jax.Array:
    return paged_attention(*args, **kwargs)


def _decode(name: str, dtype: str, group: int, head_dim: int, page_size: int) -> Row:
    rng = np.random.default_rng(group * head_dim + page_size)
    sizes = {"kv_heads": 2, "head_dim": head_dim, "page_size": page_size}
    # Kernels multiply what lies past the length by zero: huge is harmless there, NaN is not.
    case = paged_case(rng, _LENGTHS, 1, **sizes, dtype=DTYPES[dtype], garbage=1e20, tail=1e20)
    k_new, v_new = (np.stack([row[-1] for row in rows]) for rows in (case.k, case.v))
    if needs_current_in_pool(name):
        page = case.layer * case.pages_per_layer + case.table[np.arange(len(_LENGTHS)), case.cached // page_size]
        for pool, new in ((case.k_pool, k_new), (case.v_pool, v_new)):
            pool[:, page, case.cached % page_size] = new.transpose(1, 0, 2)
    q = rng.standard_normal((len(_LENGTHS), 2 * group, head_dim)).astype(DTYPES[dtype])
    scale = head_dim**-0.5
    with jax.default_matmul_precision("highest" if dtype == "float32" else "default"):
        out = _paged_attention(
            q, k_new, v_new, case.k_pool, case.v_pool, case.table, case.cached, np.int32(case.layer),
            pages_per_layer=case.pages_per_layer, scale=scale, implementation=name,
        )  # fmt: skip
    expected = _expected(case, q[:, None], scale)[:, 0]
    # The TPU kernel rounds keys and values to bfloat16 whatever the pool holds.
    tolerance = TOLERANCE["bfloat16" if name == "pallas_tpu" else dtype]
    error = np.abs(np.asarray(out).astype(np.float64) - expected).max()
    return _attention_row(f"paged_attention/{name}", dtype, (group, head_dim, page_size), float(error), tolerance)


def _prefill(dtype: str, group: int, head_dim: int, page_size: int) -> Row:
    rng = np.random.default_rng(head_dim)
    tokens, cached, scale = 128, [0, 64, 320], head_dim**-0.5
    case = paged_case(rng, cached, tokens, kv_heads=2, head_dim=head_dim, page_size=page_size, dtype=DTYPES[dtype])
    q = rng.standard_normal((len(cached), tokens, 2 * group, head_dim)).astype(DTYPES[dtype])
    k_new, v_new = (np.stack([row[-tokens:] for row in rows]) for rows in (case.k, case.v))
    op = jax.jit(functools.partial(prefill_attention, pages_per_layer=case.pages_per_layer, scale=scale))
    with jax.default_matmul_precision("highest" if dtype == "float32" else "default"):
        out = op(q, k_new, v_new, case.k_pool, case.v_pool, case.table, case.cached, np.int32(case.layer))
    error = np.abs(np.asarray(out).astype(np.float64) - _expected(case, q, scale)).max()
    return _attention_row("prefill_attention/xla", dtype, (group, head_dim, page_size), float(error), TOLERANCE[dtype])


def _expected(case: PagedCase, q: np.ndarray, scale: float) -> np.ndarray:
    return np.stack([attend(x, k, v, scale, int(n)) for x, k, v, n in zip(q, case.k, case.v, case.cached, strict=True)])


def _round_trip(dtype: str) -> Row:
    """Tokens written into a donated pool and read back: exact."""
    layers, pages, page_size, heads, width, count = 3, 9, 16, 2, 128, 40
    rng = np.random.default_rng(0)
    flat = rng.permutation(np.arange(page_size, pages * page_size))[:count].astype(np.int32)
    new = rng.standard_normal((layers, count, heads, width)).astype(DTYPES[dtype])
    pool = jnp.zeros((heads, layers * pages, page_size, width), dtype)
    where = (flat // page_size, flat % page_size)
    pool = jax.jit(functools.partial(write_tokens, pages_per_layer=pages), donate_argnums=0)(pool, new, *where)
    back = jax.jit(functools.partial(gather_tokens, pages_per_layer=pages))(pool, *where)
    error = np.abs(np.asarray(back).astype(np.float64) - new.astype(np.float64)).max()
    return _attention_row("pool_write", dtype, (1, width, page_size), float(error), 0.0)


def check_staging(device: Any, mebibytes: int = 256) -> Row:
    """bfloat16 through pinned host memory, as KV leaves: are the bytes the same, and how fast do they arrive?

    Every bit pattern travels, NaNs with payloads included.
    """
    patterns = np.arange(2**16, dtype=np.uint16)
    host = np.tile(patterns, mebibytes * 2**20 // patterns.nbytes).reshape(mebibytes, -1).view(ml_dtypes.bfloat16)
    array = jax.device_put(host, SingleDeviceSharding(device)).block_until_ready()
    pinned = SingleDeviceSharding(device, memory_kind="pinned_host")
    jax.block_until_ready(jax.device_put(array, pinned))
    start = time.perf_counter()
    staged = jax.block_until_ready(jax.device_put(array, pinned))
    seconds = time.perf_counter() - start
    same = np.array_equal(np.asarray(staged).view(np.uint16), host.view(np.uint16))
    return {"bytes": host.nbytes, "seconds": seconds, "bytes_per_s": host.nbytes / seconds, "ok": bool(same)}
