"""Products of the tokens of one chunk with each other, under decay: all that does not depend on the state.

Decays are sums of log decays over the very tokens that they span, never differences of longer sums, and every exponent is at most 0:
nothing overflows, and a token that erases a channel costs no precision after it.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from prfaas_jax.ops.products import einsum

# Up to this size, blocks are treated whole under masks, as smaller products would cost as much; beyond, by halves.
NEAR = 16
_HALVES = (1, 2, 4, 8)


class Scores(NamedTuple):
    """Decayed products of the tokens of a chunk, and their distances in log decay from its ends.

    Attributes:
        keys: key i with key j for i > j, otherwise 0.
        queries: query i with key j for i >= j, otherwise 0.
        since_start: log decay from before the chunk to token i.
        until_end: log decay from token i to the chunk's end.
    """

    keys: Float[Array, "*n C C"]
    queries: Float[Array, "*n C C"]
    since_start: Float[Array, "*n C dg"]
    until_end: Float[Array, "*n C dg"]


def scores_per_head(q: Float[Array, "*n C dk"], k: Float[Array, "*n C dk"], g: Float[Array, "*n C 1"]) -> Scores:
    """Scores under one decay per head, which leaves the dot product."""
    i = np.arange(q.shape[-2])
    upto = jnp.asarray(i[:, None] >= i, jnp.float32)
    after = i[:, None] > i
    # between[i, j]: the sum of g over j < t <= i.
    between = einsum("it,...tj->...ij", upto, jnp.where(after, g, 0))
    decay = jnp.exp(jnp.where(i[:, None] >= i, between, -jnp.inf))
    keys = jnp.where(after, einsum("...ik,...jk->...ij", k, k) * decay, 0)
    queries = einsum("...ik,...jk->...ij", q, k) * decay
    return Scores(keys, queries, einsum("it,...tk->...ik", upto, g), between[..., -1, :, None])


def scores_per_channel(q: Float[Array, "*n C dk"], k: Float[Array, "*n C dk"], g: Float[Array, "*n C dk"]) -> Scores:
    """Scores under a decay per channel: blocks of 2, 4, 8 .. tokens, each from two of half its size.

    Between the halves the decay factors at their border: from the earlier token to the border times from the border to the later one.
    """
    scores = _near_scores(_blocks(q, NEAR), _blocks(k, NEAR), _blocks(g, NEAR))
    while (size := scores.keys.shape[-1]) < q.shape[-2]:
        (k1, k2), (_, q2) = _halves(_blocks(k, size)), _halves(_blocks(q, size))
        earlier, later = k1 * jnp.exp(_halves(scores.until_end)[0]), jnp.exp(_halves(scores.since_start)[1])
        (keys1, keys2), (queries1, queries2) = _halves(scores.keys), _halves(scores.queries)
        scores = Scores(
            _lower(keys1, einsum("...ik,...jk->...ij", k2 * later, earlier), keys2),
            _lower(queries1, einsum("...ik,...jk->...ij", q2 * later, earlier), queries2),
            *_extend(scores.since_start, scores.until_end),
        )
    return Scores(*(x.squeeze(-3) for x in scores))


def _near_scores(q: Float[Array, "*n NEAR dk"], k: Float[Array, "*n NEAR dk"], g: Float[Array, "*n NEAR dk"]) -> Scores:
    """Scores of blocks of `NEAR` tokens: for every size of halves one product of all tokens, of which a mask keeps the blocks wanted.

    Distances in log decay come from one product with zeros and ones, which takes a CPU less time than running sums.
    """
    i, t = np.arange(NEAR)[:, None], np.arange(NEAR)
    spans = []
    for half in _HALVES:
        # From an earlier half to the border between the two, exclusive of the token itself; from the border to a later token.
        border = i // (2 * half) * 2 * half + half
        spans.append(np.where(i < border, (i < t) & (t < border), (border <= t) & (t <= i)))
    spans += [t <= i, t > i]
    distance = einsum("xit,...td->x...id", jnp.asarray(np.stack(spans), jnp.float32), g)
    decay = jnp.exp(distance[: len(_HALVES)])
    decayed = k * decay
    keys, queries = einsum("...ik,...jk->...ij", decayed, decayed), einsum("...ik,...jk->...ij", q * decay, decayed)
    below = [_below(half) for half in _HALVES]
    own = jnp.where(np.eye(NEAR, dtype=bool), einsum("...ik,...jk->...ij", q, k), 0)
    return Scores(
        sum((jnp.where(mask, x, 0) for mask, x in zip(below, keys, strict=True)), jnp.zeros_like(own)),
        sum((jnp.where(mask, x, 0) for mask, x in zip(below, queries, strict=True)), own),
        distance[-2],
        distance[-1],
    )


def _extend(since: Float[Array, "*n m s d"], until: Float[Array, "*n m s d"]) -> tuple[Array, Array]:
    """Log decay since the start and until the end of blocks twice as large. Adds zeros rather than concatenates, which CPUs do faster."""
    size, dim = since.shape[-2:]
    since, until = (x.reshape(*x.shape[:-3], -1, 2, size, dim) for x in (since, until))
    total, second = since[..., -1:, :], np.array([False, True])[:, None, None]
    since = since + jnp.where(second, total[..., :1, :, :], 0)
    until = until + jnp.where(second, 0, total[..., 1:, :, :])
    return since.reshape(*since.shape[:-3], 2 * size, dim), until.reshape(*until.shape[:-3], 2 * size, dim)


def inverse_of_one_plus(a: Float[Array, "*n C C"]) -> Float[Array, "*n C C"]:
    """`(I + a)^-1` for `a` strictly lower triangular; C is `NEAR` times a power of 2.

    Blocks of 2, 4, 8 .. rows, each from two of half its size: as stable as substitution, which a series in powers of `a` is not.
    """
    size, chunk = NEAR, a.shape[-1]
    near = _diagonal_blocks(a, size, 0)
    inverse = jnp.eye(size) - jnp.where(_below(1), near, 0)
    for half in _HALVES[1:]:
        inverse -= einsum("...ij,...jk,...kl->...il", inverse, jnp.where(_below(half), near, 0), inverse)
    while size < chunk:
        first, second = _halves(inverse)
        below = einsum("...ij,...jk,...kl->...il", second, _diagonal_blocks(a, size, 1), first)
        inverse = _lower(first, -below, second)
        size *= 2
    return inverse.squeeze(-3)


def _below(half: int) -> Bool[np.ndarray, "NEAR NEAR"]:
    """In each pair of diagonal blocks of `half` rows, the block that is below the first and left of the second."""
    block = np.arange(NEAR) // half
    return (block[:, None] % 2 == 1) & (block[:, None] == block + 1)


def _diagonal_blocks(a: Float[Array, "*n C C"], size: int, below: int) -> Float[Array, "*n m s s"]:
    """Blocks of `size` on the diagonal, or (`below` 1) the one below the diagonal in each pair of them."""
    step = size * (1 + below)
    starts = range(0, a.shape[-1], step)
    return jnp.stack([a[..., i + below * size : i + step, i : i + size] for i in starts], axis=-3)


def _blocks(x: Float[Array, "*n C d"], size: int) -> Float[Array, "*n m s d"]:
    return x.reshape(*x.shape[:-2], -1, size, x.shape[-1])


def _halves(x: Float[Array, "*n m s d"]) -> tuple[Float[Array, "*n m2 s d"], Float[Array, "*n m2 s d"]]:
    """The first and the second of each pair of blocks."""
    pairs = x.reshape(*x.shape[:-3], -1, 2, *x.shape[-2:])
    return pairs[..., 0, :, :], pairs[..., 1, :, :]


def _lower(first: Array, low: Array, second: Array) -> Array:
    """The block matrix [[first, 0], [low, second]]."""
    top = jnp.concatenate([first, jnp.zeros_like(first)], axis=-1)
    return jnp.concatenate([top, jnp.concatenate([low, second], axis=-1)], axis=-2)
