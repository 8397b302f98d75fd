"""What a codec costs a model: a prefix's cache through the codec, and the tokens behind it predicted from what came out.

As in disaggregation and in its order: the prefix is prefilled exactly, all it leaves behind is encoded and decoded, and the tokens that
follow are run over that, teacher-forced, beside the same over the exact cache. What they add to the cache themselves stays exact.
"""

import dataclasses
import functools
import math
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int
from scipy import stats

from prfaas_jax.errors import InvalidInput
from prfaas_jax.kvcache.codecs import CacheCodec
from prfaas_jax.kvcache.spec import CacheSpec, cache_spec
from prfaas_jax.models.caching import Added, New, Place
from prfaas_jax.models.config import ModelConfig
from prfaas_jax.models.layer_config import AttentionConfig, LatentConfig
from prfaas_jax.models.params import abstract
from prfaas_jax.models.score import WholeSequence
from prfaas_jax.ops.kv_codec import decode, encode
from prfaas_jax.sharding import Sharder


class AfterPrefix(WholeSequence):
    """The `Cache` of a forward pass whose sequences go on behind a prefix, which left `prefix` behind."""

    def __init__(self, spec: CacheSpec, tokens: Int[Array, "B T"], shard: Sharder, prefix: Added):
        super().__init__(spec, tokens, shard)
        self.prefix = prefix

    def attend(
        self,
        place: Place,
        config: AttentionConfig,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K Hv"],
        sinks: Float[Array, " N"] | None,
        carry: Any,
    ) -> tuple[Float[Array, "B T N Hv"], Any]:
        """See `Cache.attend`."""
        k_prefix, v_prefix = self.states(place)
        k, v = jnp.concatenate([k_prefix, k], axis=1), jnp.concatenate([v_prefix, v], axis=1)
        return super().attend(place, config, q, k, v, sinks, carry)

    def attend_latent(
        self,
        place: Place,
        config: LatentConfig,
        q_nope: Float[Array, "B T N Hn"],
        q_rope: Float[Array, "B T N Hr"],
        latent: Float[Array, "B T C"],
        k_up: Float[Array, "N Hn R"],
        v_up: Float[Array, "N Hv R"],
    ) -> Float[Array, "B T N Hv"]:
        """See `Cache.attend_latent`."""
        (prefix,) = self.states(place)
        return super().attend_latent(place, config, q_nope, q_rope, jnp.concatenate([prefix[:, :, 0], latent], axis=1), k_up, v_up)

    def states(self, place: Place) -> New:
        """What a layer has of the prefix: see `Cache.states`, or its tokens [B, T, heads, width]."""
        return tuple(jax.lax.dynamic_index_in_dim(x, place.index, keepdims=False) for x in self.prefix[place.group])


@functools.partial(jax.jit, static_argnums=(0, 3))
def run(
    config: ModelConfig, params: nnx.State, tokens: Int[Array, "B T"], shard: Sharder, first: int = 0, prefix: Added | None = None
) -> tuple[Float[Array, "B T V"], Added]:
    """Logits after every token, float32, and what the tokens add to the cache; from position 0, or from `first` on behind a prefix."""
    spec = cache_spec(config)
    cache = WholeSequence(spec, tokens, shard) if prefix is None else AfterPrefix(spec, tokens, shard, prefix)
    model = nnx.merge(abstract(config)[0], params)
    positions = jnp.broadcast_to(first + jnp.arange(tokens.shape[1]), tokens.shape)
    hidden, _, added = model(tokens, positions, cache, None, shard)
    return model.logits(hidden), added


@functools.partial(jax.jit, static_argnums=(0, 1))
def encode_cache(codec: CacheCodec, spec: CacheSpec, added: Added) -> Added:
    """Every tensor that a forward pass added as its kind's codec writes it; () for a tensor that stays as it is."""
    names = [codec.of(group.cache.kind) for group in spec.groups]
    return tuple(tuple(encode(x, name) for x in new) if name != "none" else () for name, new in zip(names, added, strict=True))


@functools.partial(jax.jit, static_argnums=(0, 1))
def decode_cache(codec: CacheCodec, spec: CacheSpec, wire: Added) -> Added:
    """What `encode_cache` wrote, in the cache's own dtypes."""
    return tuple(
        tuple(decode(x, codec.of(group.cache.kind), t.dtype, t.width) for x, t in zip(new, group.cache.tensors, strict=bool(new)))
        for group, new in zip(spec.groups, wire, strict=True)
    )


def through(codec: CacheCodec, spec: CacheSpec, added: Added) -> Added:
    """What the other side of the link has of `added`."""
    decoded = decode_cache(codec, spec, encode_cache(codec, spec, added))
    return tuple(new or exact for new, exact in zip(decoded, added, strict=True))


def codecs_of(spec: CacheSpec) -> tuple[CacheCodec, ...]:
    """Every byte-sized codec for all that may have one, bf16 for states, and int8 with bf16: what applies to this cache."""
    kinds = {group.cache.kind for group in spec.groups}
    growing = [kind for kind in ("paged", "window") if kind in kinds]
    found = [CacheCodec(**dict.fromkeys(growing, name)) for name in ("int8", "fp8") if growing]
    if "state" in kinds:
        found.append(CacheCodec(state="bf16"))
        found += [dataclasses.replace(found[0], state="bf16")] if growing else []
    return tuple(found)


@dataclasses.dataclass(frozen=True)
class WindowQuality:
    """One window's scored tokens over a decoded prefix against the same over the exact one.

    Attributes:
        codec: as text.
        window: its number.
        tokens: scored.
        nll: mean negative log-probability over the exact cache, nats.
        nll_change: what the codec adds to it.
        kl: mean divergence of the codec's distributions from the exact ones, nats.
        max_logit_error: largest difference of any logit.
        agreed: tokens whose most likely successor is the same.
    """

    codec: str
    window: int
    tokens: int
    nll: float
    nll_change: float
    kl: float
    max_logit_error: float
    agreed: int

    def exact(self) -> "WindowQuality":
        """The same window over the exact cache."""
        return dataclasses.replace(self, codec="none", nll_change=0.0, kl=0.0, max_logit_error=0.0, agreed=self.tokens)


def windows(tokens: np.ndarray, prefix: int, scored: int) -> np.ndarray:
    """[W, prefix + scored + 1] of a text's ids [n]: the scored parts are disjoint, prefixes overlap what was scored before.

    Raises InvalidInput unless there are two windows: one has no interval.
    """
    starts = range(0, len(tokens) - prefix - scored, scored)
    if len(starts) < 2:
        raise InvalidInput("tokens", len(tokens), f"at least {prefix + 2 * scored + 1}, for two windows of {scored} behind {prefix}")
    return np.stack([tokens[start : start + prefix + scored + 1] for start in starts]).astype(np.int32)


def evaluate(
    config: ModelConfig, params: nnx.State, rows: np.ndarray, prefix: int, codecs: Sequence[CacheCodec], shard: Sharder
) -> Iterator[list[WindowQuality]]:
    """One list per window, an entry per codec.

    Every scored token is predicted from a decode step's input: the token before it, run over the decoded cache of the first `prefix`.

    Args:
        config: the model.
        params: its parameters, placed as `shard` says.
        rows: ids as `windows` gives them.
        prefix: tokens whose cache goes through the codec.
        codecs: what to try.
        shard: the mesh.
    """
    spec = cache_spec(config)
    for number, row in enumerate(rows):
        _, exact = run(config, params, row[None, :prefix], shard)
        inputs, targets = row[None, prefix:-1], row[prefix + 1 :]
        expected, _ = run(config, params, inputs, shard, prefix, exact)
        found = []
        for codec in codecs:
            got, _ = run(config, params, inputs, shard, prefix, through(codec, spec, exact))
            nll, change, kl, error, agreed = map(float, _compare(expected[0], got[0], targets))
            found.append(WindowQuality(str(codec), number, len(targets), nll, change, kl, error, int(agreed)))
        yield found


@jax.jit
def _compare(expected: Float[Array, "T V"], got: Float[Array, "T V"], targets: Int[Array, " T"]) -> tuple[jax.Array, ...]:
    """(mean nll, its mean change, mean KL, largest error, how often the best agree)."""
    p, q = jax.nn.log_softmax(expected), jax.nn.log_softmax(got)
    at = (jnp.arange(targets.shape[0]), targets)
    # Sum of p (e^d - 1 - d): no term is negative, so a small divergence is not lost in rounding as in the sum of -p d.
    kl = jnp.sum(jnp.exp(p) * (jnp.expm1(q - p) - (q - p)), axis=-1)
    same = jnp.argmax(expected, axis=-1) == jnp.argmax(got, axis=-1)
    return -p[at].mean(), (p[at] - q[at]).mean(), kl.mean(), jnp.abs(expected - got).max(), same.sum()


@dataclasses.dataclass(frozen=True)
class Quality:
    """A codec over all windows.

    Attributes:
        tokens: scored.
        perplexity: over the exact cache.
        perplexity_change: relative, by the codec.
        low: lower end of its 95 % interval, paired over windows (t).
        high: upper end.
        kl: mean, nats.
        max_logit_error: largest.
        top1_agreement: share of tokens.
    """

    tokens: int
    perplexity: float
    perplexity_change: float
    low: float
    high: float
    kl: float
    max_logit_error: float
    top1_agreement: float

    @classmethod
    def over(cls, found: Sequence[WindowQuality]) -> "Quality":
        """Of one codec's windows, at least two, all with the same number of tokens."""
        mean, spread = paired_interval([w.nll_change for w in found])
        tokens = sum(w.tokens for w in found)
        return cls(
            tokens=tokens,
            perplexity=math.exp(statistics.fmean(w.nll for w in found)),
            perplexity_change=math.expm1(mean),
            low=math.expm1(mean - spread),
            high=math.expm1(mean + spread),
            kl=statistics.fmean(w.kl for w in found),
            max_logit_error=max(w.max_logit_error for w in found),
            top1_agreement=sum(w.agreed for w in found) / tokens,
        )


def paired_interval(changes: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """(mean, half width) by Student's t, for independent differences of at least two pairs."""
    spread = statistics.stdev(changes) / math.sqrt(len(changes))
    return statistics.fmean(changes), float(stats.t.ppf((1 + confidence) / 2, len(changes) - 1)) * spread
