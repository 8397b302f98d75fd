"""The work of a step by formula: flops that no compiler counts, and the bytes that must at least move. Pure Python.

Formulas cover what each device computes by itself: attention over the cache, recurrences, experts. There kernels hide their
products from the compiler and loops follow the data. Only products count, a multiply-add as two; masked halves of square blocks do not.
"""

import dataclasses
from collections.abc import Iterator

from prfaas_jax.kvcache.spec import DTYPE_BYTES, CacheGroup, TensorSpec, cache_spec
from prfaas_jax.models.config import ModelConfig
from prfaas_jax.models.layer_config import (
    AttentionConfig,
    GatedDeltaConfig,
    KdaConfig,
    LatentConfig,
    LightningConfig,
    MixerConfig,
    MlpConfig,
    MoeConfig,
)

# Tokens that chunkwise recurrences take at a time.
CHUNK = 64


@dataclasses.dataclass(frozen=True)
class Spread:
    """How a mesh divides work.

    Attributes:
        data: data shards; each has its own rows.
        tensor: devices that share feed-forward parts, experts and vocabulary.
        heads: devices that share the heads: `tensor`, or 1 where attention is replicated.
    """

    data: int = 1
    tensor: int = 1
    heads: int = 1

    def placed(self, tensor: TensorSpec) -> float:
        """Share of a cached tensor that one device holds: fewer heads than devices come in copies, what all heads share is whole."""
        return 1.0 if tensor.shared else max(1 / self.heads, 1 / tensor.heads)


@dataclasses.dataclass(frozen=True)
class Work:
    """One step: `rows` requests of which each computes `tokens` new tokens behind `start` cached ones."""

    rows: int
    tokens: int
    start: int
    decode: bool

    @classmethod
    def prefill(cls, rows: int, chunk: int, context: int) -> "Work":
        """The last chunk of prompts of `context` tokens."""
        return cls(rows, chunk, context - chunk, decode=False)

    @classmethod
    def decoding(cls, rows: int, context: int) -> "Work":
        """One token per row, behind `context` others."""
        return cls(rows, 1, context, decode=True)

    def pairs(self, window: int | None = None) -> int:
        """Pairs of a query and a key that it attends, per row and head: the keys before it, in its window, and its own."""
        first, last = self.start, self.start + self.tokens - 1
        if window is None or last <= window:
            return (first + last) * self.tokens // 2 + self.tokens
        grown = max(0, window - first)  # queries whose window is not full yet
        return grown * (first + window - 1) // 2 + (self.tokens - grown) * window + self.tokens


def mixer_flops(mixer: MixerConfig, work: Work) -> float:
    """Flops of one layer's attention or recurrence over all heads and rows, projections and convolutions left out.

    Recurrences take their recurrent form when decoding, else the chunkwise one over `CHUNK` tokens.
    """
    tokens = work.tokens
    match mixer:
        case AttentionConfig():
            row = work.pairs(mixer.window) * 2 * (mixer.head_dim + mixer.values) * mixer.num_heads
        case LatentConfig():
            expansion = 2 * mixer.kv_lora_rank * (mixer.nope_dim + mixer.value_dim)
            if work.decode:  # absorbed: queries go to the latents, weighted latents to the values
                pair, expanded = 2 * (2 * mixer.kv_lora_rank + mixer.rope_dim), tokens
            else:  # every latent is expanded once
                pair, expanded = 2 * (mixer.nope_dim + mixer.rope_dim + mixer.value_dim), work.start + tokens
            row = (work.pairs() * pair + expanded * expansion) * mixer.num_heads
        case KdaConfig() | GatedDeltaConfig():
            heads = mixer.num_heads if isinstance(mixer, KdaConfig) else mixer.num_value_heads
            dk, dv = mixer.key_dim, mixer.value_dim
            # Three products with the state: what it predicts, its update, what is read. Within a chunk: k k^T and q k^T, the triangular
            # system solved for keys and values, and the weighted values.
            row = tokens * heads * (6 * dk * dv + (0 if work.decode else CHUNK * (3 * dk + 2 * dv)))
        case LightningConfig():
            d = mixer.head_dim
            row = tokens * mixer.num_heads * (4 * d * d + (0 if work.decode else CHUNK * 2 * d))
    return float(work.rows * row)


def mlp_flops(mlp: MlpConfig, hidden: int, work: Work) -> float:
    """Flops of one layer's experts, the shared one included, over all tokens; 0 for a dense part, which compilers count."""
    if not isinstance(mlp, MoeConfig):
        return 0.0
    gate = 2 * hidden if mlp.shared_gate else 0
    return float(work.rows * work.tokens * (6 * hidden * (mlp.top_k * mlp.intermediate_size + mlp.shared_size) + gate))


def island_flops(config: ModelConfig, work: Work, spread: Spread) -> dict[str, float]:
    """Flops per device of what each computes by itself, by kind of mixer and "moe"; experts are taken to be equally busy."""
    found: dict[str, float] = {}

    def add(kind: str, flops: float, shards: int) -> None:
        if flops:
            found[kind] = found.get(kind, 0.0) + flops / (spread.data * shards)

    for layer in config.layers:
        add(layer.mixer.kind, mixer_flops(layer.mixer, work), spread.heads)
        add(layer.mlp.kind, mlp_flops(layer.mlp, config.hidden_size, work), spread.tensor)
    return found


def matmul_params(config: ModelConfig) -> int:
    """Elements of the matrices that every token meets: what 2 flops per weight and token are counted on, the output head left out.

    Of experts, those that one token goes to.
    """
    d, embeddings = config.hidden_size, config.vocab_size * config.hidden_size
    idle = sum(_expert_params(mlp, d) * (1 - mlp.top_k / mlp.num_experts) for mlp in _experts(config))
    return config.num_params() - embeddings * (1 if config.tie_embeddings else 2) - round(idle)


def _experts(config: ModelConfig) -> Iterator[MoeConfig]:
    """The mixture of every layer that has one."""
    return (layer.mlp for layer in config.layers if isinstance(layer.mlp, MoeConfig))


def _expert_params(mlp: MoeConfig, hidden: int) -> int:
    """Elements of all routed experts of a layer."""
    return 3 * hidden * mlp.intermediate_size * mlp.num_experts


def unread_parameter_bytes(config: ModelConfig, work: Work, spread: Spread) -> float:
    """Bytes of parameters per device that a step need not read.

    An input embedding that is not also the output head, of which it reads a few rows; and experts: `tokens * top_k` different ones are
    the most that a data shard's tokens can reach.
    """
    size = DTYPE_BYTES[config.dtype]
    unread = 0.0 if config.tie_embeddings else config.vocab_size * config.hidden_size
    tokens = work.rows * work.tokens / spread.data
    for mlp in _experts(config):
        reached = min(1.0, tokens * mlp.top_k / mlp.num_experts)
        unread += _expert_params(mlp, config.hidden_size) * (1 - reached)
    return unread * size / spread.tensor


def _row_bytes(group: CacheGroup, tokens: int, spread: Spread) -> float:
    """Bytes of one row's last `tokens` tokens in one group, as one device holds them."""
    return len(group.layers) * tokens * sum(t.token_bytes * spread.placed(t) for t in group.cache.tensors)


def cache_bytes(config: ModelConfig, work: Work, spread: Spread) -> float:
    """Bytes of cache per device that a step reads and writes: what its rows hold once, what it adds (in prefill also as exported copy)."""
    total = 0.0
    for group in cache_spec(config).groups:
        first, last = group.cache.kept(work.start)
        stop = work.start + work.tokens
        added = stop - max(work.start, group.cache.kept(stop)[0])
        total += _row_bytes(group, last - first, spread) + _row_bytes(group, added, spread) * (1 if work.decode else 2)
    return total * work.rows / spread.data
