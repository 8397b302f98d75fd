"""Qwen3-8B: 8.19 B parameters, 147,456 KV bytes per token in bfloat16.

Source: the published config.json of Qwen/Qwen3-8B.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Fields of ModelConfig."""
    return ConfigDict(
        {
            "name": "qwen3_8b",
            "vocab_size": 151_936,
            "hidden_size": 4096,
            "num_layers": 36,
            "num_heads": 32,
            "num_kv_heads": 8,
            "head_dim": 128,
            "intermediate_size": 12_288,
            "max_position": 40_960,
            "rope_theta": 1_000_000.0,
            "rms_norm_eps": 1e-6,
            "tie_embeddings": False,
            "qk_norm": True,
            "dtype": "bfloat16",
        }
    )
