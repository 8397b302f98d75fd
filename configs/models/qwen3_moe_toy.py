"""A Qwen3-MoE small enough for tests: 363,200 parameters, 2,048 KV bytes per token in float32.

Ours, random weights. Four equal layers of grouped-query attention and experts. 4 kv heads, so that a model axis of 1, 2 or 4 divides
them.

    python -m experiments.check_equivalence --model=configs/models/qwen3_moe_toy.py
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Fields of ModelConfig."""
    attention = {
        "kind": "attention",
        "num_heads": 8,
        "num_kv_heads": 4,
        "head_dim": 16,
        "rope": {"theta": 1_000_000.0},
        "qk_norm": "head",
    }
    moe = {"kind": "moe", "num_experts": 8, "top_k": 2, "intermediate_size": 32}
    return ConfigDict(
        {
            "name": "qwen3_moe_toy",
            "vocab_size": 512,
            "hidden_size": 64,
            "max_position": 4096,
            "blocks": {"attention": {"mixer": attention, "mlp": moe}},
            "layers": ["attention"] * 4,
            "rms_norm_eps": 1e-6,
            "dtype": "float32",
        }
    )
