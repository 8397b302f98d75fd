"""Makes tests/goldens/ops/*.npz: what transformers' own torch code says about the linear attention ops.

Needs torch and transformers: `python tests/goldens/make_ops_goldens.py`. Arrays are float32, `[B, T, H, d]` for tokens and `[B, H, dk, dv]`
for states; q and k are as a model's projections give them, before normalisation and scaling. Nothing here uses prfaas_jax.
"""

from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import MiniMaxConfig
from transformers.models.kimi_linear import modeling_kimi_linear as kimi
from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention
from transformers.models.qwen3_next import modeling_qwen3_next as qwen3_next

OPS = Path(__file__).parent / "ops"
# Crosses a chunk of 64 and ends inside the next one.
BATCH, TOKENS, HEADS, KEY_DIM, VALUE_DIM = 1, 84, 3, 12, 8


def save(name: str, **arrays: torch.Tensor | np.ndarray) -> None:
    """Writes one golden file."""
    np.savez_compressed(OPS / f"{name}.npz", **{k: np.asarray(v, np.float32) for k, v in arrays.items()})


def delta_inputs(rng: np.random.Generator, gate_dim: int | None) -> dict[str, torch.Tensor]:
    """Inputs of the delta rule whose heads decay slowly, usually, and so fast that exp(-cumsum(g)) overflows float32 within a chunk."""

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    tokens = (BATCH, TOKENS, HEADS)
    rate = np.array([0.02, 0.5, 12.0], np.float32)
    softplus = np.logaddexp(0, normal(*tokens, gate_dim or 1)).astype(np.float32)
    g = -rate[:, None] * softplus
    arrays = {
        "q": normal(*tokens, KEY_DIM),
        "k": normal(*tokens, KEY_DIM),
        "v": normal(*tokens, VALUE_DIM),
        "g": g if gate_dim else g[..., 0],
        "beta": 1 / (1 + np.exp(-normal(*tokens))),
        "state": normal(BATCH, HEADS, KEY_DIM, VALUE_DIM),
    }
    return {name: torch.from_numpy(x) for name, x in arrays.items()}


def delta_rule(name: str, seed: int, gate_dim: int | None, recurrent: object, chunked: object) -> None:
    """One file: inputs, and outputs and states of both of a model's forms."""
    x = delta_inputs(np.random.default_rng(seed), gate_dim)
    results = {}
    for form, op in (("recurrent", recurrent), ("chunked", chunked)):
        args = [x[n].clone() for n in ("q", "k", "v")]
        out, state = op(
            *args, g=x["g"].clone(), beta=x["beta"].clone(), initial_state=x["state"].clone(),
            output_final_state=True, use_qk_l2norm_in_kernel=True,
        )  # fmt: skip
        results |= {f"{form}_out": out, f"{form}_state": state}
    save(name, **x, **results)


class _Cache:
    """The part of MiniMax's cache that the module reads, so that it starts from a given state."""

    def __init__(self, state: torch.Tensor):
        self.state = state

    def get_linear_cache(self, layer: int) -> torch.Tensor:
        return self.state

    def set_linear_cache(self, layer: int, state: torch.Tensor) -> None:
        self.state = state


class _OpenGate(nn.Module):
    """A gate whose sigmoid is exactly 1."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.full((*x.shape[:-1], 1), 100.0)


def lightning() -> None:
    """MiniMax's module with everything around the recurrence replaced by identities: blocks from zeros, then tokens from that state."""
    rng = np.random.default_rng(3)
    layers, layer, dim = 5, 2, VALUE_DIM
    config = MiniMaxConfig(
        hidden_size=HEADS * dim, num_attention_heads=HEADS, num_key_value_heads=HEADS, head_dim=dim, num_hidden_layers=layers,
        block_size=16, layer_types=["linear_attention"] * layers,
    )  # fmt: skip
    module = MiniMaxLightningAttention(config, layer)
    module.act_fn = module.norm = module.out_proj = module.qkv_proj = nn.Identity()
    module.output_gate = _OpenGate()
    qkv = torch.from_numpy(rng.standard_normal((BATCH, TOKENS, HEADS, 3 * dim)).astype(np.float32))
    out, state = module(qkv.flatten(2), None, None)
    cache = _Cache(state.clone())
    more_out, more_state = module(qkv.flatten(2), None, None, past_key_values=cache)
    q, k, v = qkv.split(dim, dim=-1)
    shape = (BATCH, TOKENS, HEADS, dim)
    rates = {f"rate_{i}": MiniMaxLightningAttention(config, i).get_slope_rate()[:, 0, 0] for i in range(layers)}
    save(
        "lightning", q=q, k=k, v=v, out=out.reshape(shape), state=state, more_out=more_out.reshape(shape), more_state=more_state,
        layer=np.float32(layer), layers=np.float32(layers), **rates,
    )  # fmt: skip


def causal_conv() -> None:
    """Kimi Linear's convolution: a sequence from its start, then more tokens after the state that it left behind."""
    rng = np.random.default_rng(4)
    heads, dim, width, tokens, more = 2, 6, 4, 9, 5
    weight = torch.from_numpy(rng.standard_normal((heads * dim, width)).astype(np.float32))
    x = torch.from_numpy(rng.standard_normal((BATCH, heads * dim, tokens + more)).astype(np.float32))
    state = x[..., tokens - width : tokens].clone()
    first = kimi.causal_conv1d_fn(x[..., :tokens], weight)
    second = kimi.causal_conv1d_update(x[..., tokens:], state, weight)
    by_token = {"x": x, "out": torch.cat([first, second], dim=-1)}
    by_token = {n: a.transpose(1, 2).reshape(BATCH, tokens + more, heads, dim) for n, a in by_token.items()}
    # The module keeps `width` inputs; the oldest is never read again.
    tail = state.transpose(1, 2).reshape(BATCH, width, heads, dim)[:, 1:]
    save("causal_conv", **by_token, weight=weight.reshape(heads, dim, width), tail=tail, split=np.float32(tokens))


def main() -> None:
    """Writes all files."""
    OPS.mkdir(exist_ok=True)
    torch.set_grad_enabled(False)
    delta_rule("kda", 1, KEY_DIM, kimi.recurrent_kimi_delta_attention, kimi.chunk_kimi_delta_attention)
    delta_rule("gated_delta", 2, None, qwen3_next.torch_recurrent_gated_delta_rule, qwen3_next.torch_chunk_gated_delta_rule)
    lightning()
    causal_conv()


if __name__ == "__main__":
    main()
