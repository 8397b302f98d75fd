"""Speed of ops by form, in turns: linear attention (the token recurrence against the chunkwise form), and the experts of a layer."""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from prfaas_jax.models.layer_config import MoeConfig
from prfaas_jax.ops import moe
from prfaas_jax.ops.delta_rule import delta_rule, l2_normalize
from prfaas_jax.ops.delta_rule.chunkwise import Chunk, advance
from prfaas_jax.ops.token_chunks import CHUNK, split_chunks

FORMS = ("recurrent", "chunkwise")
# What in "chunkwise" depends on the state, over chunks that are ready: what it could reach at most, were the rest free.
BOUND = "products"
# Heads of 128 x 128, as in every published model; kda decays per key channel, gated_delta per head.
HEADS, DIM = 4, 128
KINDS = {"kda": DIM, "gated_delta": 1}
_RATIOS = {"speedup": "chunkwise", "speedup_bound": BOUND}


@dataclasses.dataclass(frozen=True)
class OpSample:
    """One prefill of `tokens` tokens by one form of one kind, or by its `BOUND`."""

    kind: str
    form: str
    tokens: int
    repeat: int
    seconds: float


@functools.partial(jax.jit, static_argnames="form")
def _run(inputs: tuple[jax.Array, ...], state: jax.Array, valid: jax.Array, form: str) -> tuple[jax.Array, jax.Array]:
    q, k, v, g, beta = inputs
    return delta_rule(q, k, v, g, beta, state, valid, implementation=form)


@jax.jit
def _products(state: jax.Array, chunks: Chunk) -> tuple[jax.Array, jax.Array]:
    return jax.lax.scan(advance, state, chunks)


@jax.jit
def _chunks(inputs: tuple[jax.Array, ...]) -> Chunk:
    """Tokens in place of what would have been made of them: the right shapes, not the right values."""
    q, k, v, g, _ = (split_chunks(x[..., None] if x.ndim == 3 else x).swapaxes(2, 3) for x in inputs)
    small = q[..., :CHUNK] * 1e-3
    return Chunk(jnp.full(q.shape[:2], CHUNK), k, q, k, jnp.exp(g[..., -1, :]), small, small, v)


def _inputs(kind: str, tokens: int) -> tuple[tuple[jax.Array, ...], jax.Array, jax.Array]:
    rng = np.random.default_rng(tokens)
    q, k, v = (jnp.asarray(rng.standard_normal((1, tokens, HEADS, DIM)), jnp.float32) for _ in range(3))
    g = -jnp.asarray(rng.uniform(0.0, 0.2, (1, tokens, HEADS, KINDS[kind])), jnp.float32)
    beta = jnp.asarray(rng.uniform(0.0, 1.0, (1, tokens, HEADS)), jnp.float32)
    state = jnp.zeros((1, HEADS, DIM, DIM), jnp.float32)
    return (l2_normalize(q) * DIM**-0.5, l2_normalize(k), v, g, beta), state, jnp.full(1, tokens, jnp.int32)


def measure(lengths: Iterable[int], repeats: int) -> Iterator[OpSample]:
    """Both forms of both kinds at every length, in turns, after one unmeasured round."""
    cases = [(kind, tokens) for kind in KINDS for tokens in lengths]
    for kind, tokens in tqdm(cases, desc="ops", unit="case", leave=False):
        inputs, state, valid = _inputs(kind, tokens)
        runs: dict[str, Callable[[], Any]] = {form: functools.partial(_run, inputs, state, valid, form=form) for form in FORMS}
        runs[BOUND] = functools.partial(_products, state, jax.block_until_ready(_chunks(inputs)))
        for form, repeat, seconds in _in_turns(runs, repeats):
            yield OpSample(kind, form, tokens, repeat, seconds)


def _in_turns(runs: Mapping[str, Callable[[], Any]], repeats: int) -> Iterator[tuple[str, int, float]]:
    """(name, repeat, seconds) of every run in turns, after one unmeasured round."""
    for repeat in range(-1, repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            if repeat >= 0:
                yield name, repeat, time.perf_counter() - start


def experts(config: MoeConfig, width: int, forms: Iterable[str], token_counts: Iterable[int], repeats: int) -> dict[str, Any]:
    """tokens -> form -> seconds (median) and flops per second of one layer's routed experts in bfloat16, tokens spread evenly at random."""
    key, (count, size) = jax.random.key(0), (config.num_experts, config.intermediate_size)
    shapes = ((1, count, width, size), (1, count, width, size), (1, count, size, width))
    draw = jax.jit(lambda key, shape: jax.random.normal(key, shape, jnp.bfloat16) * shape[-2] ** -0.5, static_argnums=1)
    matrices = [draw(jax.random.fold_in(key, i), shape) for i, shape in enumerate(shapes)]
    found: dict[str, Any] = {}
    for tokens in tqdm(list(token_counts), desc="experts", unit="size", leave=False):
        rng = np.random.default_rng(tokens)
        x = jax.random.normal(key, (tokens, width), jnp.bfloat16)
        weights = jnp.asarray(rng.uniform(0.1, 1, (tokens, config.top_k)), jnp.float32)
        chosen = jnp.asarray(rng.permuted(np.tile(np.arange(count), (tokens, 1)), axis=1)[:, : config.top_k], jnp.int32)
        args = x, weights, chosen, *matrices, 0
        runs = {name: functools.partial(jax.jit(functools.partial(moe.experts_mlp, implementation=name)), *args) for name in forms}
        times: dict[str, list[float]] = {name: [] for name in runs}
        for name, _, seconds in _in_turns(runs, repeats):
            times[name].append(seconds)
        flops = 6 * tokens * config.top_k * width * size
        medians = {name: statistics.median(t) for name, t in times.items()}
        found[str(tokens)] = {name: {"seconds": s, "flops_per_s": flops / s} for name, s in medians.items()}
    return found


def summary(samples: list[OpSample]) -> dict[str, Any]:
    """kind -> tokens -> tokens per second of each form (medians), chunkwise over recurrent, and the most that this could become."""
    found: dict[str, Any] = {}
    for kind in KINDS:
        for tokens in sorted({s.tokens for s in samples if s.kind == kind}):
            times = {f: [s.seconds for s in samples if (s.kind, s.form, s.tokens) == (kind, f, tokens)] for f in (*FORMS, BOUND)}
            rate = {f"{f}_tok_s": round(tokens / statistics.median(t), 1) for f, t in times.items()}
            ratios = {n: statistics.median(times["recurrent"]) / statistics.median(times[f]) for n, f in _RATIOS.items()}
            found.setdefault(kind, {})[str(tokens)] = {**rate, **{name: round(ratio, 2) for name, ratio in ratios.items()}}
    return found
