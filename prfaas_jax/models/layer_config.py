"""What one layer is made of, as plain data: mixers (attention and its linear relatives) and feed-forward parts.

Every mixer says what it caches per request (`cache`), how many parameters it has, and how many heads a mesh may split. No jax here.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar, Literal

from prfaas_jax.errors import InvalidInput
from prfaas_jax.kvcache.spec import LayerCache, TensorSpec


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Frequency scaling of rotary embeddings: "linear" divides by `factor`; "llama3" only the long wavelengths, smoothly."""

    kind: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192

    def __post_init__(self) -> None:
        if self.kind not in ("linear", "llama3"):
            raise InvalidInput("model.rope.scaling.kind", self.kind, "linear or llama3")


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary embedding of the first `dims` elements of each head (all when None), pairs (i, i + dims / 2)."""

    theta: float = 10_000.0
    dims: int | None = None
    scaling: RopeScaling | None = None


def check_counts(kind: str, config: Any, *fields: str) -> None:
    """Raises InvalidInput naming the first of `fields` that is no positive integer."""
    for field in fields:
        value = getattr(config, field)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise InvalidInput(f"model.{kind}.{field}", value, "a positive integer")


def _check_conv(kind: str, width: int) -> None:
    if width < 2:
        raise InvalidInput(f"model.{kind}.conv_width", width, "at least 2 taps (one has no history to cache)")


def _check_rope(kind: str, rope: Rope | None, head_dim: int) -> None:
    dims = head_dim if rope is None or rope.dims is None else rope.dims
    if rope is not None and (dims % 2 or not 0 < dims <= head_dim):
        raise InvalidInput(f"model.{kind}.rope.dims", dims, f"an even number up to head_dim={head_dim} (rotary embeddings rotate pairs)")


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """Grouped-query softmax attention, over all tokens or over a window.

    Attributes:
        num_heads: query heads N.
        num_kv_heads: key-value heads K, a divisor of N.
        head_dim: elements of a query and of a key.
        value_dim: elements of a value; None is `head_dim`.
        rope: rotary embedding; None for none.
        window: tokens before the current one that a query attends, and that are cached; None for all of them. (Hugging Face's
            `sliding_window` counts the current token too.)
        sinks: a learned logit per query head joins every softmax and takes no value.
        qk_norm: RMS norm of queries and keys: "head" each head by itself, "all" over all heads jointly.
        output_gate: the output is multiplied by sigmoid(W x) before the output projection.
        bias: biases of the q, k and v projections.
        value_scale: factor on values before they are cached.
        scale: factor on q . k; None is head_dim ** -0.5.
    """

    kind: ClassVar[str] = "attention"
    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int | None = None
    rope: Rope | None = Rope()
    window: int | None = None
    sinks: bool = False
    qk_norm: Literal["none", "head", "all"] = "none"
    output_gate: bool = False
    bias: bool = False
    value_scale: float = 1.0
    scale: float | None = None

    def __post_init__(self) -> None:
        check_counts(self.kind, self, "num_heads", "num_kv_heads", "head_dim")
        for field in ("value_dim", "window"):
            if getattr(self, field) is not None:
                check_counts(self.kind, self, field)
        if self.num_heads % self.num_kv_heads:
            raise InvalidInput("model.attention.num_kv_heads", self.num_kv_heads, f"a divisor of num_heads={self.num_heads}")
        if self.qk_norm not in ("none", "head", "all"):
            raise InvalidInput("model.attention.qk_norm", self.qk_norm, "none, head or all")
        _check_rope(self.kind, self.rope, self.head_dim)

    @property
    def values(self) -> int:
        """Elements of a value."""
        return self.head_dim if self.value_dim is None else self.value_dim

    @property
    def softmax_scale(self) -> float:
        """Factor on q . k."""
        return self.head_dim**-0.5 if self.scale is None else self.scale

    def cache(self, dtype: str) -> LayerCache:
        """k and v of all tokens, or of the last `window`."""
        tensors = (TensorSpec("k", self.num_kv_heads, self.head_dim, dtype), TensorSpec("v", self.num_kv_heads, self.values, dtype))
        return LayerCache("paged", tensors) if self.window is None else LayerCache("window", tensors, self.window)

    def axis_sizes(self) -> Iterator[tuple[str, int]]:
        """(logical axis, size) of what a mesh may shard."""
        yield "heads", self.num_heads
        yield "kv_heads", self.num_kv_heads

    def num_params(self, hidden: int) -> int:
        """Parameters, norms and biases included."""
        queries, keys, values = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim, self.num_kv_heads * self.values
        out = self.num_heads * self.values
        norms = {"none": 0, "head": 2 * self.head_dim, "all": queries + keys}[self.qk_norm]
        gate = hidden * out if self.output_gate else 0
        biases = queries + keys + values if self.bias else 0
        return hidden * (queries + keys + values + out) + norms + gate + biases + self.sinks * self.num_heads


@dataclasses.dataclass(frozen=True)
class LatentConfig:
    """Multi-head latent attention (MLA): keys and values are expanded from one cached latent per token.

    Attributes:
        num_heads: heads.
        kv_lora_rank: elements of the latent that keys and values are expanded from.
        nope_dim: elements of a key that come from the latent.
        rope_dim: elements of a key that all heads share; rotated unless `rope` is None.
        value_dim: elements of a value.
        q_lora_rank: rank of the query projection; None for one full matrix.
        rope: rotary embedding of the shared part; None leaves it unrotated.
    """

    kind: ClassVar[str] = "mla"
    num_heads: int
    kv_lora_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    q_lora_rank: int | None = None
    rope: Rope | None = None

    def __post_init__(self) -> None:
        check_counts(self.kind, self, "num_heads", "kv_lora_rank", "nope_dim", "rope_dim", "value_dim")
        if self.q_lora_rank is not None:
            check_counts(self.kind, self, "q_lora_rank")
        _check_rope(self.kind, self.rope, self.rope_dim)

    @property
    def softmax_scale(self) -> float:
        """Factor on q . k."""
        return (self.nope_dim + self.rope_dim) ** -0.5

    def cache(self, dtype: str) -> LayerCache:
        """The latent after its norm, and behind it the shared part of the key after rotation: every head reads all of it."""
        return LayerCache("paged", (TensorSpec("latent", 1, self.kv_lora_rank + self.rope_dim, dtype, shared=True),))

    def axis_sizes(self) -> Iterator[tuple[str, int]]:
        """(logical axis, size) of what a mesh may shard."""
        yield "heads", self.num_heads

    def num_params(self, hidden: int) -> int:
        """Parameters, norms included."""
        queries = self.num_heads * (self.nope_dim + self.rope_dim)
        rank = self.q_lora_rank
        q = hidden * queries if rank is None else hidden * rank + rank + rank * queries
        kv = hidden * (self.kv_lora_rank + self.rope_dim) + self.kv_lora_rank
        return q + kv + self.num_heads * (self.kv_lora_rank * (self.nope_dim + self.value_dim) + self.value_dim * hidden)


def _recurrent(heads: int, key_dim: int, value_dim: int) -> TensorSpec:
    return TensorSpec("recurrent", heads, key_dim * value_dim, "float32")


@dataclasses.dataclass(frozen=True)
class KdaConfig:
    """Kimi Delta Attention: a delta rule whose state decays per key channel (Kimi Linear).

    Attributes:
        num_heads: heads H.
        key_dim: elements of a query and of a key.
        value_dim: elements of a value.
        conv_width: taps of the causal depthwise convolutions of q, k and v.
        gate_rank: rank of the projections of the decay and of the output gate.
    """

    kind: ClassVar[str] = "kda"
    num_heads: int
    key_dim: int
    value_dim: int
    gate_rank: int
    conv_width: int = 4

    def __post_init__(self) -> None:
        check_counts(self.kind, self, "num_heads", "key_dim", "value_dim", "gate_rank", "conv_width")
        _check_conv(self.kind, self.conv_width)

    def cache(self, dtype: str) -> LayerCache:
        """The state `[H, key_dim, value_dim]` in float32 and the last conv_width - 1 inputs of each convolution, oldest first."""
        tail = self.conv_width - 1
        tails = (("q_tail", self.key_dim), ("k_tail", self.key_dim), ("v_tail", self.value_dim))
        tensors = (TensorSpec(name, self.num_heads, tail * dim, dtype) for name, dim in tails)
        return LayerCache("state", (_recurrent(self.num_heads, self.key_dim, self.value_dim), *tensors))

    def axis_sizes(self) -> Iterator[tuple[str, int]]:
        """(logical axis, size) of what a mesh may shard."""
        yield "heads", self.num_heads

    def num_params(self, hidden: int) -> int:
        """Parameters, norms and gates included."""
        keys, values, rank = self.num_heads * self.key_dim, self.num_heads * self.value_dim, self.gate_rank
        projections = (hidden + self.conv_width) * (2 * keys + values) + hidden * self.num_heads + values * hidden
        decay = rank * (hidden + keys) + keys + self.num_heads
        return projections + decay + rank * (hidden + values) + self.value_dim


@dataclasses.dataclass(frozen=True)
class GatedDeltaConfig:
    """Gated DeltaNet: a delta rule whose state decays per head (Qwen3-Next, Qwen3.5).

    Attributes:
        num_key_heads: heads of q and k; each serves num_value_heads / num_key_heads consecutive value heads.
        num_value_heads: heads of v, and of the state.
        key_dim: elements of a query and of a key.
        value_dim: elements of a value.
        conv_width: taps of the causal depthwise convolutions of q, k and v.
    """

    kind: ClassVar[str] = "gated_delta"
    num_key_heads: int
    num_value_heads: int
    key_dim: int
    value_dim: int
    conv_width: int = 4

    def __post_init__(self) -> None:
        check_counts(self.kind, self, "num_key_heads", "num_value_heads", "key_dim", "value_dim", "conv_width")
        _check_conv(self.kind, self.conv_width)
        if self.num_value_heads % self.num_key_heads:
            expected = f"a divisor of num_value_heads={self.num_value_heads}"
            raise InvalidInput("model.gated_delta.num_key_heads", self.num_key_heads, expected)

    def cache(self, dtype: str) -> LayerCache:
        """The state `[Hv, key_dim, value_dim]` in float32 and the last conv_width - 1 inputs of each convolution, oldest first."""
        tail = self.conv_width - 1
        keys, values = (self.num_key_heads, self.key_dim), (self.num_value_heads, self.value_dim)
        tails = (("q_tail", keys), ("k_tail", keys), ("v_tail", values))
        tensors = (TensorSpec(name, heads, tail * dim, dtype) for name, (heads, dim) in tails)
        return LayerCache("state", (_recurrent(self.num_value_heads, self.key_dim, self.value_dim), *tensors))

    def axis_sizes(self) -> Iterator[tuple[str, int]]:
        """(logical axis, size) of what a mesh may shard."""
        yield "heads", self.num_value_heads
        yield "kv_heads", self.num_key_heads

    def num_params(self, hidden: int) -> int:
        """Parameters, norms and gates included."""
        keys, values = self.num_key_heads * self.key_dim, self.num_value_heads * self.value_dim
        projections = (hidden + self.conv_width) * (2 * keys + values) + 2 * hidden * values
        return projections + 2 * self.num_value_heads * (hidden + 1) + self.value_dim


@dataclasses.dataclass(frozen=True)
class LightningConfig:
    """Lightning attention: linear attention with a fixed decay per head and layer (MiniMax-Text-01, Ring 2.5).

    Attributes:
        num_heads: heads.
        head_dim: elements of a query, a key and a value.
        activation: applied to q, k and v after projection; None for none.
        rope: rotary embedding of q and k; None for none.
        qk_norm: RMS norm of each query and key head.
        norm_groups: groups of heads that the output's RMS norm treats separately.
        scale: factor on queries.
    """

    kind: ClassVar[str] = "lightning"
    num_heads: int
    head_dim: int
    activation: Literal["silu"] | None = "silu"
    rope: Rope | None = None
    qk_norm: bool = False
    norm_groups: int = 1
    scale: float = 1.0

    def __post_init__(self) -> None:
        check_counts(self.kind, self, "num_heads", "head_dim", "norm_groups")
        if self.num_heads % self.norm_groups:
            raise InvalidInput("model.lightning.norm_groups", self.norm_groups, f"a divisor of num_heads={self.num_heads}")
        if self.activation not in ("silu", None):
            raise InvalidInput("model.lightning.activation", self.activation, "silu or None")
        _check_rope(self.kind, self.rope, self.head_dim)

    def cache(self, dtype: str) -> LayerCache:
        """The state `[H, head_dim, head_dim]` in float32."""
        del dtype
        return LayerCache("state", (_recurrent(self.num_heads, self.head_dim, self.head_dim),))

    def axis_sizes(self) -> Iterator[tuple[str, int]]:
        """(logical axis, size) of what a mesh may shard."""
        yield "heads", self.num_heads

    def num_params(self, hidden: int) -> int:
        """Parameters, norms and gate included."""
        width = self.num_heads * self.head_dim
        return 5 * hidden * width + width + (2 * self.head_dim if self.qk_norm else 0)


@dataclasses.dataclass(frozen=True)
class DenseConfig:
    """A gated feed-forward: down(activation(gate x) * up x)."""

    kind: ClassVar[str] = "dense"
    intermediate_size: int
    activation: Literal["silu", "gelu_tanh"] = "silu"

    def __post_init__(self) -> None:
        check_counts(self.kind, self, "intermediate_size")
        if self.activation not in ("silu", "gelu_tanh"):
            raise InvalidInput("model.dense.activation", self.activation, "silu or gelu_tanh")

    def axis_sizes(self) -> Iterator[tuple[str, int]]:
        """(logical axis, size) of what a mesh may shard."""
        yield "mlp", self.intermediate_size

    def num_params(self, hidden: int) -> int:
        """Parameters."""
        return 3 * hidden * self.intermediate_size


@dataclasses.dataclass(frozen=True)
class MoeConfig:
    """A mixture of gated feed-forward experts; each token goes to `top_k` of them, and to the shared expert.

    Attributes:
        num_experts: routed experts.
        top_k: experts per token.
        intermediate_size: width of a routed expert.
        scoring: "softmax" over the experts, or "sigmoid" of each.
        correction_bias: a learned bias per expert joins the scores when experts are chosen, not when they are weighed.
        num_groups: groups of experts; a token goes to experts of its `top_groups` best groups only (sum of a group's two best scores).
        top_groups: see `num_groups`.
        renormalize: the chosen weights are made to sum to 1.
        scale: factor on the weights, after that.
        shared_size: width of the expert that every token goes to; 0 for none.
        shared_gate: the shared expert is multiplied by sigmoid(w . x).
    """

    kind: ClassVar[str] = "moe"
    num_experts: int
    top_k: int
    intermediate_size: int
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    correction_bias: bool = False
    num_groups: int = 1
    top_groups: int = 1
    renormalize: bool = True
    scale: float = 1.0
    shared_size: int = 0
    shared_gate: bool = False

    def __post_init__(self) -> None:
        check_counts(self.kind, self, "num_experts", "top_k", "intermediate_size", "num_groups", "top_groups")
        if self.scoring not in ("softmax", "sigmoid"):
            raise InvalidInput("model.moe.scoring", self.scoring, "softmax or sigmoid")
        if self.num_experts % self.num_groups:
            raise InvalidInput("model.moe.num_groups", self.num_groups, f"a divisor of num_experts={self.num_experts}")
        if self.top_groups > self.num_groups:
            raise InvalidInput("model.moe.top_groups", self.top_groups, f"at most num_groups={self.num_groups}")
        reachable = self.num_experts // self.num_groups * self.top_groups
        if self.top_k > reachable:
            raise InvalidInput("model.moe.top_k", self.top_k, f"at most {reachable}, the experts of {self.top_groups} group(s)")
        if self.shared_size < 0 or (self.shared_gate and not self.shared_size):
            raise InvalidInput("model.moe.shared_size", self.shared_size, "the width of the shared expert, 0 for none (then without gate)")

    def axis_sizes(self) -> Iterator[tuple[str, int]]:
        """(logical axis, size) of what a mesh may shard."""
        yield "experts", self.num_experts
        yield "expert_mlp", self.intermediate_size
        if self.shared_size:
            yield "mlp", self.shared_size

    def num_params(self, hidden: int) -> int:
        """Parameters, router included."""
        router = self.num_experts * (hidden + self.correction_bias)
        shared = 3 * hidden * self.shared_size + (hidden if self.shared_gate else 0)
        return router + 3 * hidden * self.intermediate_size * self.num_experts + shared


MixerConfig = AttentionConfig | LatentConfig | KdaConfig | GatedDeltaConfig | LightningConfig
MlpConfig = DenseConfig | MoeConfig

MIXERS: dict[str, type[MixerConfig]] = {c.kind: c for c in (AttentionConfig, LatentConfig, KdaConfig, GatedDeltaConfig, LightningConfig)}
MLPS: dict[str, type[MlpConfig]] = {c.kind: c for c in (DenseConfig, MoeConfig)}


@dataclasses.dataclass(frozen=True)
class Layer:
    """A mixer and a feed-forward part; each branch is added as `alpha * residual + beta * branch`, scales being (alpha, beta)."""

    mixer: MixerConfig
    mlp: MlpConfig
    mixer_scales: tuple[float, float] = (1.0, 1.0)
    mlp_scales: tuple[float, float] = (1.0, 1.0)
