"""The ops of hybrid models on whatever device is here, against float64 in numpy: windows, latents, recurrences, experts."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from prfaas_jax.ops import moe
from prfaas_jax.ops.delta_rule import delta_rule
from prfaas_jax.ops.latent_attention import latent_decode, latent_prefill
from prfaas_jax.ops.lightning import lightning, log_decay
from prfaas_jax.ops.window_attention import window_decode, window_prefill
from prfaas_jax.testing.attention_cases import attend

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}

# (op, shape in words, largest error)
Found = tuple[str, str, float]

_TOKENS, _HEADS, _WINDOW, _PAGE, _CACHED = 96, 4, 40, 16, 80


def check(dtype: str) -> Iterator[Found]:
    """Every op of hybrid models in one dtype; recurrent states are float32 in any case."""
    with jax.default_matmul_precision("highest" if dtype == "float32" else "default"):
        yield from _windows(dtype)
        yield from _latents(dtype)
        yield from _recurrences(dtype)
        yield from _experts(dtype)


def _error(got: Any, expected: np.ndarray) -> float:
    return float(np.abs(np.asarray(got).astype(np.float64) - expected).max())


def _draw(rng: np.random.Generator, dtype: str, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(DTYPES[dtype])


def _windows(dtype: str) -> Iterator[Found]:
    """A chunk behind a full ring, and one token behind it; keys wider than values, sinks."""
    rng = np.random.default_rng(0)
    dk, dv, kv, start = 48, 32, 2, _CACHED
    k, v = _draw(rng, dtype, start + _TOKENS, kv, dk), _draw(rng, dtype, start + _TOKENS, kv, dv)
    q, sinks = _draw(rng, dtype, _TOKENS, _HEADS, dk), rng.standard_normal(_HEADS).astype(np.float32)
    rings = [np.zeros((kv, 2, _WINDOW, x.shape[-1]), x.dtype) for x in (k, v)]
    held = np.arange(start - _WINDOW, start)
    for ring, x in zip(rings, (k, v), strict=True):
        ring[:, 1, held % _WINDOW] = x[held].swapaxes(0, 1)
    scale = dk**-0.5
    expected = attend(q, k, v, scale, start, _WINDOW, sinks)
    logits = jnp.asarray(sinks)
    slot, at, layer = np.ones(1, np.int32), np.full(1, start, np.int32), np.int32(0)
    chunk = jax.jit(functools.partial(window_prefill, slots_per_layer=2, window=_WINDOW, scale=scale, sinks=logits))
    out = chunk(q[None], k[None, start:], v[None, start:], *rings, slot, at, layer)
    shape = f"window {_WINDOW}, {dk} x {dv}, sinks"
    yield "window_prefill", shape, _error(out[0], expected)
    token = jax.jit(functools.partial(window_decode, slots_per_layer=2, scale=scale, sinks=logits))
    out = token(q[:1], k[None, start], v[None, start], *rings, slot, at, layer)
    yield "window_decode", shape, _error(out[0], expected[0])


def _latents(dtype: str) -> Iterator[Found]:
    """A chunk behind cached latents (expanded), and one token behind them (absorbed)."""
    rng = np.random.default_rng(1)
    rank, nope, rope, dv = 64, 32, 16, 32
    q = _draw(rng, dtype, _TOKENS, _HEADS, nope + rope)
    latent = _draw(rng, dtype, _CACHED + _TOKENS, rank + rope)
    k_up, v_up = (_draw(rng, dtype, _HEADS, n, rank) * np.asarray(rank**-0.5, DTYPES[dtype]) for n in (nope, dv))
    wide = latent.astype(np.float64)
    k = np.einsum("sr,nhr->snh", wide[:, :rank], k_up.astype(np.float64))
    k = np.concatenate([k, np.repeat(wide[:, None, rank:], _HEADS, axis=1)], axis=-1)
    v = np.einsum("sr,nhr->snh", wide[:, :rank], v_up.astype(np.float64))
    scale = (nope + rope) ** -0.5
    expected = attend(q, k, v, scale, _CACHED)
    pages = _CACHED // _PAGE
    pool = np.zeros((1, 1 + pages, _PAGE, rank + rope), latent.dtype)
    pool[0, 1:] = latent[:_CACHED].reshape(pages, _PAGE, -1)
    where = (np.arange(1, 1 + pages, dtype=np.int32)[None], np.full(1, _CACHED, np.int32), np.int32(0))
    options = {"pages_per_layer": 1 + pages, "scale": scale}
    shape = f"rank {rank}, {nope} + {rope}, values {dv}"
    parts = (q[None, ..., :nope], q[None, ..., nope:], latent[None, _CACHED:])
    out = jax.jit(functools.partial(latent_prefill, **options))(*parts, pool, *where, k_up, v_up)
    yield "latent_prefill", shape, _error(out[0], expected)
    one = (q[:1, :, :nope], q[:1, :, nope:], latent[_CACHED : _CACHED + 1])
    out = jax.jit(functools.partial(latent_decode, **options))(*one, pool, *where, k_up, v_up)
    yield "latent_decode", shape, _error(out[0], expected[0])


def _recurrences(dtype: str) -> Iterator[Found]:
    """Chunkwise and recurrent forms, output and final state, from a state that is not zero."""
    rng = np.random.default_rng(2)
    dim, tokens = 32, 150
    q, k = (_unit(rng.standard_normal((tokens, _HEADS, dim))).astype(DTYPES[dtype]) for _ in range(2))
    v, beta = _draw(rng, dtype, tokens, _HEADS, dim), rng.uniform(0, 1, (tokens, _HEADS)).astype(np.float32)
    state = rng.standard_normal((_HEADS, dim, dim)).astype(np.float32)
    valid = np.full(1, tokens, np.int32)
    batch = lambda *xs: tuple(jnp.asarray(x)[None] for x in xs)  # noqa: E731
    for kind, width in (("kda", dim), ("gated_delta", 1)):
        g = -rng.uniform(0, 0.5, (tokens, _HEADS, width)).astype(np.float32)
        expected = _delta_float64(q, k, v, g, beta, state)
        for form in ("chunkwise", "recurrent"):
            run = jax.jit(functools.partial(delta_rule, implementation=form))
            out, new = run(*batch(q, k, v, g, beta, state), valid)
            yield f"delta_rule/{form}", f"{kind}, {dim} x {dim}", max(_error(out[0], expected[0]), _error(new[0], expected[1]))
    decay = np.asarray(log_decay(1, 4, _HEADS))
    expected = _delta_float64(q, k, v, np.broadcast_to(decay[None, :, None], (tokens, _HEADS, 1)), None, state)
    for form in ("chunkwise", "recurrent"):
        run = jax.jit(functools.partial(lightning, implementation=form))
        out, new = run(*batch(q, k, v), decay, jnp.asarray(state)[None], valid)
        yield f"lightning/{form}", f"{dim} x {dim}", max(_error(out[0], expected[0]), _error(new[0], expected[1]))


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def _delta_float64(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, g: np.ndarray, beta: np.ndarray | None, state: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The recurrence token by token; without beta nothing is subtracted (lightning)."""
    s, outputs = state.astype(np.float64), []
    for t in range(len(q)):
        qt, kt, vt = (x[t].astype(np.float64) for x in (q, k, v))
        s = s * np.exp(g[t].astype(np.float64))[..., None]
        if beta is not None:
            vt = beta[t][:, None] * (vt - np.einsum("hkv,hk->hv", s, kt))
        s = s + kt[..., None] * vt[:, None]
        outputs.append(np.einsum("hkv,hk->hv", s, qt))
    return np.stack(outputs), s


# Tokens, width, size, experts: small blocks of tokens, and blocks of the largest size over several tiles of columns and features.
_EXPERT_SHAPES = ((70, 64, 32, 8), (600, 320, 192, 8))


def _experts(dtype: str) -> Iterator[Found]:
    """Every form of the experts' feed-forward that runs here, some experts without tokens."""
    for tokens, width, size, experts in _EXPERT_SHAPES:
        rng = np.random.default_rng(3)
        k = 2
        x = _draw(rng, dtype, tokens, width)
        gate, up = (_draw(rng, dtype, 2, experts, width, size) * np.asarray(width**-0.5, DTYPES[dtype]) for _ in range(2))
        down = _draw(rng, dtype, 2, experts, size, width) * np.asarray(size**-0.5, DTYPES[dtype])
        weights = rng.uniform(0.1, 1, (tokens, k)).astype(np.float32)
        chosen = np.stack([rng.choice(experts - 2, k, replace=False) for _ in range(tokens)]).astype(np.int32)
        wide = [a.astype(np.float64) for a in (x, gate[1], up[1], down[1])]
        inner = np.einsum("td,edf->tef", wide[0], wide[1])
        inner = inner / (1 + np.exp(-inner)) * np.einsum("td,edf->tef", wide[0], wide[2])
        every = np.einsum("tef,efd->ted", inner, wide[3])
        expected = (np.take_along_axis(every, chosen[..., None], axis=1) * weights[..., None]).sum(axis=1)
        for form in moe.IMPLEMENTATIONS:
            if form == "pallas_gpu" and jax.default_backend() != "gpu":
                continue
            run = jax.jit(functools.partial(moe.experts_mlp, implementation=form))
            shape = f"{tokens} tokens, {experts} experts of {width} x {size}, top {k}"
            yield f"experts_mlp/{form}", shape, _error(run(x, weights, chosen, gate, up, down, 0, 1), expected)
