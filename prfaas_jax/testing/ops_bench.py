"""Speed of the linear-attention ops by form: the token recurrence against the chunkwise form, in turns."""

import dataclasses
import functools
import statistics
import time
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from prfaas_jax.ops.delta_rule import delta_rule, l2_normalize

FORMS = ("recurrent", "chunkwise")
# Heads of 128 x 128, as in every published model; kda decays per key channel, gated_delta per head.
HEADS, DIM = 4, 128
KINDS = {"kda": DIM, "gated_delta": 1}


@dataclasses.dataclass(frozen=True)
class OpSample:
    """One prefill of `tokens` tokens by one form of one kind."""

    kind: str
    form: str
    tokens: int
    repeat: int
    seconds: float


@functools.partial(jax.jit, static_argnames="form")
def _run(inputs: tuple[jax.Array, ...], state: jax.Array, valid: jax.Array, form: str) -> tuple[jax.Array, jax.Array]:
    q, k, v, g, beta = inputs
    return delta_rule(q, k, v, g, beta, state, valid, implementation=form)


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
        inputs = _inputs(kind, tokens)
        for repeat in range(-1, repeats):
            for form in FORMS:
                start = time.perf_counter()
                jax.block_until_ready(_run(*inputs, form=form))
                if repeat >= 0:
                    yield OpSample(kind, form, tokens, repeat, time.perf_counter() - start)


def summary(samples: list[OpSample]) -> dict[str, Any]:
    """kind -> tokens -> tokens per second of each form (medians) and chunkwise over recurrent."""
    found: dict[str, Any] = {}
    for kind in KINDS:
        for tokens in sorted({s.tokens for s in samples if s.kind == kind}):
            times = {f: [s.seconds for s in samples if (s.kind, s.form, s.tokens) == (kind, f, tokens)] for f in FORMS}
            rate = {f"{f}_tok_s": round(tokens / statistics.median(t), 1) for f, t in times.items()}
            speedup = statistics.median(times["recurrent"]) / statistics.median(times["chunkwise"])
            found.setdefault(kind, {})[str(tokens)] = {**rate, "speedup": round(speedup, 2)}
    return found
