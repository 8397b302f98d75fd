"""A Llama small enough for tests: 262,720 parameters, 2,048 KV bytes per token in float32.

Ours, random weights: untied embeddings, no q/k norm. 4 kv heads, so that a model axis of 1, 2 or 4 divides them.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Fields of ModelConfig."""
    return ConfigDict(
        {
            "name": "llama_toy",
            "vocab_size": 512,
            "hidden_size": 64,
            "num_layers": 4,
            "num_heads": 8,
            "num_kv_heads": 4,
            "head_dim": 16,
            "intermediate_size": 128,
            "max_position": 4096,
            "rope_theta": 10_000.0,
            "rms_norm_eps": 1e-5,
            "tie_embeddings": False,
            "dtype": "float32",
        }
    )
