"""Attention over a window of the last W cached tokens, and the rings that hold them.

A ring is a page of W tokens in a pool [K, layers * P, W, H], P slots per layer: position p lies at offset p % W. Slot 0 of each
layer is a dummy. A decode step's token is written by `pool_write.write_tokens` at (slot, length % W) like any other.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from prfaas_jax.errors import InvalidInput
from prfaas_jax.ops.pool_write import read_pages, write_pages
from prfaas_jax.ops.prefill_attention import QUERY_BLOCK
from prfaas_jax.ops.running_softmax import (
    KEY_BLOCK,
    KEY_BLOCK_FEW,
    MASKED,
    Block,
    SoftmaxState,
    add_block,
    add_blocks,
    add_sinks,
    scores,
    start_state,
)


def window_prefill(
    q: Float[Array, "B T N H"],
    k_new: Float[Array, "B T K H"],
    v_new: Float[Array, "B T K Hv"],
    k_ring: Float[Array, "K X W H"],
    v_ring: Float[Array, "K X W Hv"],
    slot: Int[Array, " B"],
    start: Int[Array, " B"],
    layer: Int[Array, ""],
    *,
    slots_per_layer: int,
    window: int,
    scale: float,
    sinks: Float[Array, " N"] | None = None,
) -> Float[Array, "B T N Hv"]:
    """Attention of T new tokens per row at positions start.., each over the `window` tokens before it and itself.

    Shard-local; rings are only read. The cost is O(T * (window + QUERY_BLOCK)). Padding sits at a row's end and must be finite;
    valid tokens never attend it. A row's result depends on its own data only, not on its companions, its position in the bucket
    or its slot; rows with `start == 0` take nothing from their slot.

    Args:
        q: queries, already rotated.
        k_new: the chunk's keys.
        v_new: the chunk's values.
        k_ring: rings of all layers, X = L * slots_per_layer, W = window.
        v_ring: like `k_ring`, of the width of values.
        slot: slot within a layer that holds the row's earlier tokens.
        start: tokens before the chunk.
        layer: layer to read, may be traced.
        slots_per_layer: P.
        window: tokens before the current one that a query attends.
        scale: factor on q . k.
        sinks: a logit per query head that joins the softmax and takes no value, in float32.

    Raises:
        InvalidInput: rings of another size than `window`.
    """
    _check_window(k_ring, window)
    batch, tokens, heads, head_dim = q.shape
    kv_heads = k_new.shape[2]
    group = heads // kv_heads
    size = min(tokens, QUERY_BLOCK)
    blocks = -(-tokens // size)
    # The keys before a query block come in `count` equal blocks that reach at least a window back.
    count = -(-window // KEY_BLOCK)
    step = -(-window // count)
    reach = count * step

    pad = ((0, 0), (0, blocks * size - tokens), (0, 0), (0, 0))
    position = start[:, None] - reach + jnp.arange(reach)
    # Index reach + t is the chunk's token t; before it lies what is cached, the newest last.
    k, v = (
        jnp.concatenate([_history(ring, slot, position, layer, slots_per_layer), jnp.pad(x, pad).transpose(2, 0, 1, 3)], axis=2)
        for ring, x in ((k_ring, k_new), (v_ring, v_new))
    )
    q_blocks = jnp.pad(q, pad).reshape(batch, blocks, size, kv_heads, group, head_dim).transpose(1, 3, 0, 4, 2, 5)
    index = jnp.tile(jnp.arange(size), group)[:, None]

    def attend(i: Int[Array, ""], queries: Float[Array, "K B G t H"]) -> Float[Array, "K B G t Hv"]:
        rows = queries.reshape(kv_heads, batch, group * size, head_dim)

        def visible_scores(first: Int[Array, ""], keys: int) -> Float[Array, "K B R S"]:
            """Scores of the keys from index `first`; a query sees its own position, a window back, and no position below 0."""
            key = first + jnp.arange(keys)
            distance = reach + i * size + index - key
            there = (start[:, None] - reach + key >= 0)[:, None]
            visible: Bool[Array, "B R S"] = (distance >= 0) & (distance <= window) & there
            return jnp.where(visible, scores(rows, jax.lax.dynamic_slice_in_dim(k, first, keys, axis=2), scale), MASKED)

        def earlier(j: Int[Array, ""], state: SoftmaxState) -> SoftmaxState:
            first = reach + i * size - (j + 1) * step
            return add_block(state, visible_scores(first, step), jax.lax.dynamic_slice_in_dim(v, first, step, axis=2))

        own = reach + i * size
        state = start_state(visible_scores(own, size), jax.lax.dynamic_slice_in_dim(v, own, size, axis=2))
        before = start.max() + i * size
        state = jax.lax.fori_loop(0, jnp.minimum(count, (before + step - 1) // step), earlier, state)
        if sinks is not None:
            state = add_sinks(state, sinks)
        return state.output().reshape(kv_heads, batch, group, size, -1).astype(q.dtype)

    out = attend(jnp.int32(0), q_blocks[0])[None] if blocks == 1 else jax.lax.map(lambda x: attend(*x), (jnp.arange(blocks), q_blocks))
    return out.transpose(2, 0, 4, 1, 3, 5).reshape(batch, blocks * size, heads, -1)[:, :tokens]


def _history(
    ring: Float[Array, "K X W H"],
    slot: Int[Array, " B"],
    position: Int[Array, "B S"],
    layer: Int[Array, ""],
    slots_per_layer: int,
) -> Float[Array, "K B S H"]:
    """Cached tokens at `position`; zeros below position 0, whatever a recycled slot holds there."""
    whole = read_pages(ring, layer * slots_per_layer + slot)
    tokens = jnp.take_along_axis(whole, (position % ring.shape[2])[None, :, :, None], axis=2, mode="promise_in_bounds")
    return jnp.where((position >= 0)[None, :, :, None], tokens, 0)


def window_decode(
    q: Float[Array, "B N H"],
    k_new: Float[Array, "B K H"],
    v_new: Float[Array, "B K Hv"],
    k_ring: Float[Array, "K X W H"],
    v_ring: Float[Array, "K X W Hv"],
    slot: Int[Array, " B"],
    length: Int[Array, " B"],
    layer: Int[Array, ""],
    *,
    slots_per_layer: int,
    scale: float,
    sinks: Float[Array, " N"] | None = None,
) -> Float[Array, "B N Hv"]:
    """Attention of one new token per row, at position `length[b]`, over its last W cached tokens and itself.

    Arguments and promises are those of `window_prefill`. The new token need not be in the ring yet. Rings are read whole, scores follow
    the longest row, up to W; padded rows (length 0, slot 0) are harmless.
    """
    batch, heads, head_dim = q.shape
    kv_heads, window = k_ring.shape[0], k_ring.shape[2]
    block = min(window, KEY_BLOCK_FEW)
    k_rings, v_rings = (read_pages(ring, layer * slots_per_layer + slot) for ring in (k_ring, v_ring))
    grouped = q.reshape(batch, kv_heads, heads // kv_heads, head_dim).transpose(1, 0, 2, 3)
    k, v = (x.transpose(1, 0, 2)[:, :, None] for x in (k_new, v_new))

    def read(i: Int[Array, ""]) -> Block:
        # The last block ends with the ring, and leaves out what the block before had.
        first = jnp.minimum(i * block, window - block)
        offset = first + jnp.arange(block)
        live = (offset >= i * block) & (offset < length[:, None])

        def tokens(rings: Float[Array, "K B W H"]) -> Float[Array, "K B S H"]:
            return jnp.where(live[None, :, :, None], jax.lax.dynamic_slice_in_dim(rings, first, block, axis=2), 0)

        return tokens(k_rings), tokens(v_rings), live

    state = start_state(scores(grouped, k, scale), v)
    state = add_blocks(state, grouped, read, (jnp.minimum(length.max(), window) + block - 1) // block, scale=scale)
    if sinks is not None:
        state = add_sinks(state, sinks)
    return jnp.swapaxes(state.output(), 0, 1).reshape(batch, heads, -1).astype(q.dtype)


def write_rings(
    pool: Float[Array, "K X W H"],
    new: Float[Array, "L B T K H"],
    read_slot: Int[Array, " B"],
    write_slot: Int[Array, " B"],
    start: Int[Array, " B"],
    valid: Int[Array, " B"],
    *,
    slots_per_layer: int,
    window: int,
) -> Float[Array, "K X W H"]:
    """The pool after a chunk: each row's ring in `write_slot` holds its last W tokens, zeros where it has fewer.

    One scatter of whole rings, in place when the pool is donated. `read_slot` may equal `write_slot` and is otherwise left as it was; all
    reads come before all writes. Rows with `valid == 0` write to the dummy slot; no two other rows may share a write slot.

    Args:
        pool: rings of all L layers.
        new: the chunk's keys or values of all layers; tokens from `valid` on are padding.
        read_slot: slot within a layer that holds the row's earlier tokens.
        write_slot: slot that will hold the row's last tokens.
        start: tokens before the chunk.
        valid: tokens of the chunk.
        slots_per_layer: P.
        window: W.

    Raises:
        InvalidInput: rings of another size than `window`.
    """
    _check_window(pool, window)
    layers, batch, tokens, kv_heads, _ = new.shape
    last = (start + valid - 1)[:, None]
    # The newest position at each offset of a ring.
    position = last - (last - jnp.arange(window)) % window
    from_chunk = jnp.clip(position - start[:, None], 0, tokens - 1)
    fresh = new.at[:, jnp.arange(batch)[:, None], from_chunk].get(mode="promise_in_bounds")
    cached = read_pages(pool, jnp.arange(layers)[:, None] * slots_per_layer + read_slot)
    is_fresh, there = (x[None, :, None, :, None] for x in (position >= start[:, None], position >= 0))
    rings = jnp.where(is_fresh, fresh.astype(pool.dtype).transpose(0, 1, 3, 2, 4), cached.transpose(1, 2, 0, 3, 4))
    # Fused into the scatter, the reads would meet its writes: XLA would copy the pool first.
    rings = jax.lax.optimization_barrier(jnp.where(there, rings, 0))
    page = jnp.where(valid > 0, write_slot, 0)
    return write_pages(pool, rings.reshape(layers, batch, kv_heads, -1), page, pages_per_layer=slots_per_layer)


def _check_window(pool: Float[Array, "K X W H"], window: int) -> None:
    if pool.shape[2] != window:
        raise InvalidInput("window", window, f"the rings' size, {pool.shape[2]}")
