"""The decoder-only transformer as Flax NNX modules: embedding, a pattern of layers, final norm and output head.

The layers run as (head, body x repeats, tail). The repeats of the body are one `lax.scan`, and runs of equal layers inside it another, so
compile time follows the pattern and not the depth; the weights of a run are stacked over all its layers, in order of depth. Weight
matrices keep the Hugging Face layout [out, in]. The model does not know where keys, latents and states live: that is the business of
the `Cache` that it is given.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from prfaas_jax.kvcache.spec import cache_spec
from prfaas_jax.models.caching import Added, Cache, Island, New, Place, Step
from prfaas_jax.models.config import ModelConfig
from prfaas_jax.models.layer_config import AttentionConfig, LatentConfig, Layer, LightningConfig, Rope
from prfaas_jax.models.mixers import make_mixer
from prfaas_jax.models.mlp import UNSLICED, make_mlp
from prfaas_jax.models.modules import Maker, RMSNorm
from prfaas_jax.models.pattern import Alone, Program, Repeats, RunLayers, whole
from prfaas_jax.models.rope import Tables, rope_tables
from prfaas_jax.ops.thin_matmul import matmul_transposed
from prfaas_jax.sharding import Sharder

# Scope of what runs on each device by itself: attention, recurrences and pool writes.
ISLAND = "island"


def island(shard: Sharder) -> Island:
    """`(fn, in_axes, out_axes) -> fn on each device's own shard`, axes given by logical names; its operations are named in profiles."""

    def spec(axes: Any) -> Any:
        if axes is None or (isinstance(axes, tuple) and all(a is None or isinstance(a, str) for a in axes)):
            return shard.spec(*(axes or ()))
        return tuple(spec(a) for a in axes)

    def run(fn: Callable, in_axes: tuple, out_axes: Any) -> Callable:
        named = jax.named_scope(ISLAND)(fn)
        return jax.shard_map(named, mesh=shard.mesh, in_specs=spec((*in_axes,)), out_specs=spec(out_axes), check_vma=False)

    return run


class Block(nnx.Module):
    """One pre-norm layer; inside the body its weights are those of a whole run until the scan slices them (experts': ever)."""

    def __init__(self, layer: Layer, make: Maker):
        config = make.config
        self.layer, self.normalized_residual = layer, config.normalized_residual
        norm = lambda: RMSNorm(make, config.hidden_size, "embed", config.norm_offset)  # noqa: E731
        self.mixer_norm, self.mixer = norm(), make_mixer(layer.mixer, make)
        self.mlp_norm, self.mlp = norm(), make_mlp(layer.mlp, make)
        self.mixer_post_norm = norm() if config.post_norms else None
        self.mlp_post_norm = norm() if config.post_norms else None

    def __call__(self, x: Float[Array, "B T D"], place: Place, step: Step, carry: Any) -> tuple[Float[Array, "B T D"], Any, New]:
        """Returns the residual stream, the carry, and what this layer adds to the cache."""
        # The residual may be split along the sequence; what enters a projection is whole.
        whole = lambda y: step.shard.constrain(y, "batch", None, "embed")  # noqa: E731
        normed = self.mixer_norm(x)
        branch, carry, new = self.mixer(whole(normed), place, step, carry)
        x = self._add(normed if self.normalized_residual else x, branch, self.mixer_post_norm, self.layer.mixer_scales, step)
        normed = self.mlp_norm(x)
        branch = self.mlp(whole(normed), place, step)
        x = self._add(normed if self.normalized_residual else x, branch, self.mlp_post_norm, self.layer.mlp_scales, step)
        return x, carry, new

    def _add(
        self, x: Float[Array, "B T D"], branch: Float[Array, "B T D"], norm: RMSNorm | None, scales: tuple[float, float], step: Step
    ) -> Float[Array, "B T D"]:
        branch = step.shard.constrain(branch, "batch", "seq", "embed")
        if norm is not None:
            branch = norm(branch)
        alpha, beta = scales
        return (x if alpha == 1.0 else x * alpha) + (branch if beta == 1.0 else branch * beta)


class Transformer(nnx.Module):
    """Token ids in, hidden states and what every layer adds to the cache out."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config = config
        pattern, layers = config.pattern, config.layers
        alone = Maker(config, rngs)
        table = (config.vocab_size, config.hidden_size), ("vocab", "embed")
        self.embed = alone(*table)
        first_tail = pattern.head + pattern.body_layers
        self.head = nnx.List([Block(layer, alone) for layer in layers[: pattern.head]])
        runs = config.body_runs
        self.body = nnx.List([Block(layers[pattern.head + r.start], Maker(config, rngs, pattern.repeats * len(r))) for r in runs])
        self.tail = nnx.List([Block(layer, alone) for layer in layers[first_tail:]])
        self.final_norm = RMSNorm(alone, config.hidden_size, "embed", config.norm_offset)
        self.lm_head = None if config.tie_embeddings else alone(*table)

    def __call__(
        self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"], cache: Cache, carry: Any, shard: Sharder
    ) -> tuple[Float[Array, "B T D"], Any, Added]:
        """Runs all layers. `cache` sees each layer's queries and threads `carry` (e.g. pools that a kernel must find updated).

        Returns the final-norm hidden states, the carry, and per cache group its new tensors stacked over the group's layers: tokens
        [L, B, T, heads, width] or states [L, B, heads, width]. Those are what is cached and exported.
        """
        step = self.step(positions, cache, shard)
        x, added = self.embedded(tokens, step), []
        for piece in whole(self.config.pattern):
            x, carry, new = self.run(piece.program, x, step, carry, piece.first)
            added.append(new)
        return self.final_norm(x), carry, join(added)

    # The parts of a forward pass: `step`, `embedded`, `run` for every piece in order, `final_norm`.

    def step(self, positions: Int[Array, "B T"], cache: Cache, shard: Sharder) -> Step:
        """What the parts of one forward pass share."""
        return Step(cache, shard, island(shard), self._rope(positions))

    def embedded(self, tokens: Int[Array, "B T"], step: Step) -> Float[Array, "B T D"]:
        """The residual stream in front of the first layer."""
        x = jnp.take(self.embed[...], tokens, axis=0)
        if self.config.embed_scale != 1.0:
            x = x * jnp.asarray(self.config.embed_scale, x.dtype)
        return step.shard.constrain(x, "batch", "seq", "embed")

    def run(
        self, program: Program, x: Float[Array, "B T D"], step: Step, carry: Any, first: Int[Array, ""] | int
    ) -> tuple[Float[Array, "B T D"], Any, Added]:
        """One piece of the stack; `first` (`Piece.first`) may be traced. Returns as `__call__`, without the final norm."""
        match program:
            case Alone(layers):
                return self._run_alone(layers, x, step, carry)
            case Repeats(count):
                return self._run_repeats(count, x, step, carry, first)
            case RunLayers(run, count):
                return self._run_layers(run, count, x, step, carry, first)

    def _run_alone(self, layers: range, x: jax.Array, step: Step, carry: Any) -> tuple[jax.Array, Any, Added]:
        places = _Places(self.config)
        first_tail = self.config.pattern.head + self.config.pattern.body_layers
        news: list[list[New]] = [[] for _ in places.groups]
        for layer in layers:
            place = places.at(layer)
            block = self.head[layer] if layer < first_tail else self.tail[layer - first_tail]
            x, carry, new = block(x, place, step, carry)
            news[place.group].append(tuple(n[None] for n in new))
        return x, carry, tuple(map(_concatenate, news))

    def _run_repeats(self, count: int, x: jax.Array, step: Step, carry: Any, first: Int[Array, ""] | int) -> tuple[jax.Array, Any, Added]:
        """`count` repeats of the body from `first` on, as one scan."""
        places = _Places(self.config)
        body_runs = [_Run(self, places, step, number) for number in range(len(self.body))]

        def body(state: tuple[jax.Array, Any], repeat: jax.Array) -> tuple[tuple[jax.Array, Any], tuple[New, ...]]:
            news = []
            for run in body_runs:
                state, new = run(state, repeat, 0, run.layers)
                news.append(new)
            return state, tuple(news)

        (x, carry), by_run = jax.lax.scan(body, (x, carry), first + jnp.arange(count))
        members = places.body_groups()
        by_group = ([by_run[r] for r in members.get(g, ())] for g in range(len(places.groups)))
        return x, carry, tuple(tuple(map(_in_depth_order, zip(*news, strict=True))) for news in by_group)

    def _run_layers(
        self, number: int, count: int, x: jax.Array, step: Step, carry: Any, first: Int[Array, ""] | int
    ) -> tuple[jax.Array, Any, Added]:
        """`count` layers of a run, all of one repeat; `first` counts the run's layers in all repeats."""
        places = _Places(self.config)
        run = _Run(self, places, step, number)
        repeat, i = jnp.divmod(first, run.layers)
        (x, carry), new = run((x, carry), repeat, i, count)
        group = places.group_of_run(number)
        return x, carry, tuple(new if g == group else () for g in range(len(places.groups)))

    def _rope(self, positions: Int[Array, "B T"]) -> dict[tuple[Rope, int], Tables]:
        """One table per rotary embedding that some layer uses."""
        wanted = dict.fromkeys(key for layer in self.config.layers if (key := _rope_key(layer)))
        return {(rope, dims): rope_tables(positions, rope, dims) for rope, dims in wanted}

    def logits(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Unnormalised log-probabilities in float32."""
        head = self.embed if self.lm_head is None else self.lm_head
        return matmul_transposed(hidden, head[...], preferred_element_type=jnp.float32)


def _rope_key(layer: Layer) -> tuple[Rope, int] | None:
    match layer.mixer:
        case AttentionConfig(rope=Rope() as rope, head_dim=dims) | LightningConfig(rope=Rope() as rope, head_dim=dims):
            return rope, rope.dims or dims
        case LatentConfig(rope=Rope() as rope, rope_dim=dims):
            return rope, rope.dims or dims
    return None


def _in_depth_order(runs: tuple[jax.Array, ...]) -> jax.Array:
    """Layers of several runs of the body, each [repeats, layers, ...], as one axis."""
    joined = runs[0] if len(runs) == 1 else jnp.concatenate(runs, axis=1)
    return joined.reshape(math.prod(joined.shape[:2]), *joined.shape[2:])


def _concatenate(parts: Sequence[New]) -> New:
    """Layers of several parts, each tensor [layers, ...]; () of no parts."""
    return parts[0] if len(parts) == 1 else tuple(map(jnp.concatenate, zip(*parts, strict=True)))


def join(parts: Sequence[Added]) -> Added:
    """What consecutive parts of a forward pass added, as if they were one."""
    return tuple(_concatenate([new for new in news if new]) for news in zip(*parts, strict=True))


class _Places:
    """Where each layer's cache lies, for layers by themselves and for traced layers of the body."""

    def __init__(self, config: ModelConfig):
        self.groups, self.pattern, self.runs = cache_spec(config).groups, config.pattern, config.body_runs
        self._of = {layer: (g, i) for g, group in enumerate(self.groups) for i, layer in enumerate(group.layers)}

    def at(self, layer: int) -> Place:
        group, index = self._of[layer]
        return Place(group, index, layer)

    def in_body(self, run: int, repeat: jax.Array, i: jax.Array | int) -> Place:
        first = self.pattern.head + self.runs[run].start
        group, index = self._of[first]
        stride = sum(len(self.runs[r]) for r in self.body_groups()[group])
        in_run = repeat * len(self.runs[run]) + i
        return Place(group, index + repeat * stride + i, first + repeat * self.pattern.period + i, in_run)

    def group_of_run(self, run: int) -> int:
        return self._of[self.pattern.head + self.runs[run].start][0]

    def body_groups(self) -> dict[int, list[int]]:
        """Group -> runs of the body that belong to it."""
        found: dict[int, list[int]] = {}
        for number in range(len(self.runs)):
            found.setdefault(self.group_of_run(number), []).append(number)
        return found


class _Run:
    """A run of equal layers of the body: `layers` of them in each repeat."""

    def __init__(self, model: Transformer, places: _Places, step: Step, number: int):
        self._places, self._step, self._number = places, step, number
        self.layers = len(places.runs[number])
        # Structure, the weights that stay whole, and those that are sliced layer by layer.
        split: tuple[Any, ...] = nnx.split(model.body[number], UNSLICED, ...)
        self._graph, self._unsliced, self._sliced = split

    def __call__(
        self, state: tuple[jax.Array, Any], repeat: jax.Array, first: jax.Array | int, count: int
    ) -> tuple[tuple[jax.Array, Any], New]:
        """Layers [first, first + count) of a repeat; returns (residual stream, carry) and the new tensors [count, ...]."""
        if count == 1:
            state, new = self._layer(state, repeat, first)
            return state, tuple(n[None] for n in new)
        return jax.lax.scan(lambda state, i: self._layer(state, repeat, i), state, first + jnp.arange(count))

    def _layer(self, state: tuple[jax.Array, Any], repeat: jax.Array, i: jax.Array | int) -> tuple[tuple[jax.Array, Any], New]:
        place = self._places.in_body(self._number, repeat, i)
        # Sliced out of the whole run's weights: a slice of a slice would copy every weight twice.
        mine = jax.tree.map(lambda w: jax.lax.dynamic_index_in_dim(w, place.in_run, keepdims=False), self._sliced)
        x, carry, new = nnx.merge(self._graph, self._unsliced, mine)(state[0], place, self._step, state[1])
        return (x, carry), new
