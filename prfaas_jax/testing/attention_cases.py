"""Dense float64 attention in numpy, and paged pools filled with shuffled pages: cases for every attention op, on any device."""

import dataclasses

import numpy as np


def attend(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float, first: int, window: int | None = None, sinks: np.ndarray | None = None
) -> np.ndarray:
    """Causal attention of q [T, N, H] at positions first.. over k [S, K, H] and v [S, K, Hv], in float64.

    `window` limits a query to that many positions before its own; `sinks` [N] are logits without a value.
    """
    tokens, heads, _ = q.shape
    group = heads // k.shape[1]
    k, v = (np.repeat(x.astype(np.float64), group, axis=1).swapaxes(0, 1) for x in (k, v))
    s = q.astype(np.float64).swapaxes(0, 1) @ k.swapaxes(1, 2) * scale
    distance = (first + np.arange(tokens))[:, None] - np.arange(k.shape[1])[None]
    visible = distance >= 0 if window is None else (distance >= 0) & (distance <= window)
    s = np.where(visible[None], s, -np.inf)
    if sinks is not None:
        s = np.concatenate([s, np.broadcast_to(sinks.astype(np.float64)[:, None, None], (heads, tokens, 1))], axis=2)
        v = np.concatenate([v, np.zeros_like(v[:, :1])], axis=1)
    w = np.exp(s - s.max(axis=-1, keepdims=True))
    return (w / w.sum(axis=-1, keepdims=True) @ v).swapaxes(0, 1)


@dataclasses.dataclass
class PagedCase:
    """Rows' full k [S, K, H] and v [S, K, Hv], as stored (rounded to the dtype), beside the pools with the first `cached[b]` tokens."""

    k: list[np.ndarray]
    v: list[np.ndarray]
    k_pool: np.ndarray
    v_pool: np.ndarray
    table: np.ndarray
    cached: np.ndarray
    layer: int
    pages_per_layer: int
    page_size: int
    tail: float


def set_row(case: PagedCase, row: int, k: np.ndarray, v: np.ndarray) -> None:
    """Gives a row new k and v, and writes what is cached of them into the row's pages."""
    case.k[row], case.v[row] = k, v
    length, ids = case.cached[row], case.layer * case.pages_per_layer + case.table[row][case.table[row] > 0]
    for pool, x in ((case.k_pool, k), (case.v_pool, v)):
        flat = np.full((len(ids) * case.page_size, *x.shape[1:]), case.tail, pool.dtype)
        flat[:length] = x[:length]
        pool[:, ids] = flat.reshape(len(ids), case.page_size, *x.shape[1:]).transpose(2, 0, 1, 3)


def paged_case(
    rng: np.random.Generator,
    cached: list[int],
    new: int,
    *,
    kv_heads: int,
    head_dim: int,
    page_size: int,
    dtype: np.dtype,
    layers: int = 3,
    layer: int = 1,
    table_width: int | None = None,
    pages_per_layer: int | None = None,
    garbage: float = np.nan,
    tail: float = np.nan,
    dummy: float = 0.0,
    value_dim: int | None = None,
) -> PagedCase:
    """Rows with `cached[b]` tokens in shuffled pages and `new` more tokens outside the pool.

    `garbage` fills pages no row owns (other layers too), `tail` the positions past a row's cached tokens inside its own pages,
    `dummy` page 0 of each layer. `value_dim` is the width of v; None is `head_dim`.
    """
    widths = (head_dim, value_dim or head_dim)
    owned = [-(-(n + new) // page_size) for n in cached]
    pages_per_layer = pages_per_layer or 1 + sum(owned) + 3
    pools = [np.full((kv_heads, layers * pages_per_layer, page_size, width), garbage, dtype) for width in widths]
    for pool in pools:
        pool[:, ::pages_per_layer] = dummy
    free = list(rng.permutation(np.arange(1, pages_per_layer)))
    table = np.zeros((len(cached), table_width or max([*owned, 1])), np.int32)
    none: list[np.ndarray] = [np.empty(0)] * len(cached)
    case = PagedCase(
        none, list(none), pools[0], pools[1], table, np.array(cached, np.int32), layer, pages_per_layer, page_size, tail
    )
    for row, (length, pages) in enumerate(zip(cached, owned, strict=True)):
        table[row, :pages] = [free.pop() for _ in range(pages)]
        k, v = (rng.standard_normal((length + new, kv_heads, width)).astype(dtype) for width in widths)
        set_row(case, row, k, v)
    return case
