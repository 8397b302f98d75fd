"""A Qwen3 small enough for tests: 230,080 parameters, 2,048 KV bytes per token in float32.

Ours, random weights. 4 kv heads, so that a model axis of 1, 2 or 4 divides them.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Fields of ModelConfig."""
    return ConfigDict(
        {
            "name": "qwen3_toy",
            "vocab_size": 512,
            "hidden_size": 64,
            "num_layers": 4,
            "num_heads": 8,
            "num_kv_heads": 4,
            "head_dim": 16,
            "intermediate_size": 128,
            "max_position": 4096,
            "rope_theta": 1_000_000.0,
            "rms_norm_eps": 1e-6,
            "tie_embeddings": True,
            "qk_norm": True,
            "dtype": "float32",
        }
    )
