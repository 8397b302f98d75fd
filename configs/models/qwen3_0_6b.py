"""Qwen3-0.6B: 596 M parameters (tied embeddings counted once), 114,688 KV bytes per token in bfloat16.

Source: the published config.json of Qwen/Qwen3-0.6B.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Fields of ModelConfig."""
    return ConfigDict(
        {
            "name": "qwen3_0_6b",
            "vocab_size": 151_936,
            "hidden_size": 1024,
            "num_layers": 28,
            "num_heads": 16,
            "num_kv_heads": 8,
            "head_dim": 128,
            "intermediate_size": 3072,
            "max_position": 40_960,
            "rope_theta": 1_000_000.0,
            "rms_norm_eps": 1e-6,
            "tie_embeddings": True,
            "qk_norm": True,
            "dtype": "bfloat16",
        }
    )
