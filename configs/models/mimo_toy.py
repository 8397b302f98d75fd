"""A MiMo-V2 small enough for tests: 788,528 parameters, 1,920 KV bytes per token and 122,880 fixed bytes in float32.

Ours, random weights. A dense first layer with full attention, then twice two windows of 24 tokens and one full layer: 1 head layer
and 2 x 3 body layers. As in MiMo-V2-Flash only windows have sinks, keys are wider than values, a third of each head is rotated, and
windows have other kv heads and another theta than full layers. 4 and 8 kv heads, so that a model axis of 1, 2 or 4 divides them.

    python -m experiments.check_equivalence --model=configs/models/mimo_toy.py
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Fields of ModelConfig."""
    heads = {"kind": "attention", "num_heads": 16, "head_dim": 24, "value_dim": 16, "value_scale": 0.707}
    full = {**heads, "num_kv_heads": 4, "rope": {"theta": 5_000_000.0, "dims": 8}}
    window = {**heads, "num_kv_heads": 8, "rope": {"theta": 10_000.0, "dims": 8}, "window": 24, "sinks": True}
    dense = {"kind": "dense", "intermediate_size": 128}
    moe = {"kind": "moe", "num_experts": 8, "top_k": 2, "intermediate_size": 32, "scoring": "sigmoid", "correction_bias": True}
    return ConfigDict(
        {
            "name": "mimo_toy",
            "vocab_size": 512,
            "hidden_size": 64,
            "max_position": 4096,
            "blocks": {
                "full_dense": {"mixer": full, "mlp": dense},
                "window": {"mixer": window, "mlp": moe},
                "full": {"mixer": full, "mlp": moe},
            },
            "layers": ["full_dense"] + ["window", "window", "full"] * 2,
            "rms_norm_eps": 1e-5,
            "dtype": "float32",
        }
    )
