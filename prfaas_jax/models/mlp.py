"""Feed-forward parts: dense, and mixtures of experts."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from prfaas_jax.models.caching import Place, Step
from prfaas_jax.models.layer_config import DenseConfig, MlpConfig, MoeConfig
from prfaas_jax.models.modules import ACTIVATIONS, Linear, Maker
from prfaas_jax.ops.moe import experts_mlp, route
from prfaas_jax.ops.thin_matmul import matmul_transposed
from prfaas_jax.sharding import TENSOR


class MLP(nnx.Module):
    """SwiGLU, or its GELU sibling."""

    def __init__(self, config: DenseConfig, make: Maker):
        d, f = make.config.hidden_size, config.intermediate_size
        self.activation = config.activation
        self.gate_proj = Linear(make, f, d, ("mlp", "embed"))
        self.up_proj = Linear(make, f, d, ("mlp", "embed"))
        self.down_proj = Linear(make, d, f, ("embed", "mlp"))

    def __call__(self, x: Float[Array, "B T D"], place: Place, step: Step) -> Float[Array, "B T D"]:
        """down(act(gate x) * up x)."""
        del place, step
        return self.down_proj(ACTIVATIONS[self.activation](self.gate_proj(x)) * self.up_proj(x))

    def matrices(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Gate, up and down."""
        return self.gate_proj.weight[...], self.up_proj.weight[...], self.down_proj.weight[...]


# Parameters that the scan over a run of layers leaves whole.
UNSLICED = nnx.PathContains("experts")


class Experts(nnx.Module):
    """A router, its experts, and the shared expert where there is one.

    Each device computes its own experts (and its slice of each) for all tokens of its data shard; one sum over the expert and model
    axes brings the parts together, the shared expert's among them. Experts' matrices are [in, out], as grouped products read them, and
    those of a run of layers stay together (`UNSLICED`): an expert is found where it lies.
    """

    def __init__(self, config: MoeConfig, make: Maker):
        self.config = config
        d, e, f = make.config.hidden_size, config.num_experts, config.intermediate_size
        self.router = make((e, d), ("latent", "embed"))
        self.correction_bias = make((e,), ("latent",), nnx.initializers.zeros, "float32") if config.correction_bias else None
        wide, narrow = ("experts", "embed", "expert_mlp"), ("experts", "expert_mlp", "embed")
        self.experts = nnx.Dict(gate_proj=make((e, d, f), wide), up_proj=make((e, d, f), wide), down_proj=make((e, f, d), narrow))
        self.shared = MLP(DenseConfig(config.shared_size), make) if config.shared_size else None
        self.shared_gate = make((1, d), ("latent", "embed")) if config.shared_gate else None

    def __call__(self, x: Float[Array, "B T D"], place: Place, step: Step) -> Float[Array, "B T D"]:
        """Sum of the chosen experts, weighted, and of the shared one."""
        config, shard = self.config, step.shard
        logits = matmul_transposed(x.astype(jnp.float32), self.router[...].astype(jnp.float32))
        bias = None if self.correction_bias is None else self.correction_bias[...]
        weights, chosen = route(
            logits,
            bias,
            top_k=config.top_k,
            scoring=config.scoring,
            num_groups=config.num_groups,
            top_groups=config.top_groups,
            renormalize=config.renormalize,
            scale=config.scale,
        )
        # Long chunks come back split along the sequence, as the residual stream is.
        split = shard.size("seq")
        scattered = split > 1 and x.shape[1] % split == 0
        shared = () if self.shared is None else self.shared.matrices()
        gate = None if self.shared_gate is None else self.shared_gate[...]

        def local(
            x: Float[Array, "B T D"],
            weights: Float[Array, "B T k"],
            chosen: Int[Array, "B T k"],
            experts: tuple[jax.Array, ...],
            layer: Int[Array, ""],
            shared: tuple[jax.Array, ...],
            gate: Float[Array, "1 D"] | None,
        ) -> Float[Array, "B T D"]:
            batch, tokens, width = x.shape
            flat = x.reshape(batch * tokens, width)
            first = jax.lax.axis_index("expert") * experts[0].shape[1]
            rows = lambda y: y.reshape(batch * tokens, -1)  # noqa: E731
            gates, ups, downs = experts
            y = experts_mlp(flat, rows(weights), rows(chosen), gates, ups, downs, first, layer)
            if shared:
                gated, up, down = shared
                z = matmul_transposed(jax.nn.silu(matmul_transposed(flat, gated)) * matmul_transposed(flat, up), down)
                if gate is not None:
                    z = z * jax.nn.sigmoid(matmul_transposed(flat, gate))
                y = y + z
            y = y.reshape(x.shape)
            if scattered:
                return jax.lax.psum_scatter(y, TENSOR, scatter_dimension=1, tiled=True)
            return jax.lax.psum(y, TENSOR)

        tokens = ("batch", None, None)
        wide, narrow = ("layers", "experts", None, "expert_mlp"), ("layers", "experts", "expert_mlp", None)
        shared_axes = (("mlp", None), ("mlp", None), (None, "mlp")) if shared else ()
        axes = (tokens, tokens, tokens, (wide, wide, narrow), (), shared_axes, (None, None))
        out = ("batch", "seq" if scattered else None, None)
        matrices = tuple(self.experts[name][...] for name in ("gate_proj", "up_proj", "down_proj"))
        if matrices[0].ndim == 3:
            matrices = tuple(w[None] for w in matrices)
        return step.island(local, axes, out)(x, weights, chosen, matrices, jnp.asarray(place.in_run, jnp.int32), shared, gate)


def make_mlp(config: MlpConfig, make: Maker) -> MLP | Experts:
    """The module that computes what `config` describes."""
    return MLP(config, make) if isinstance(config, DenseConfig) else Experts(config, make)
