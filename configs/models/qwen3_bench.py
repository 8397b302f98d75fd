"""The Qwen3 that bench_engine measures: 71.3 M parameters, 24,576 KV bytes per token in float32.

Ours, random weights: 12 layers, 512 wide, feed-forward three times that as in Qwen3-0.6B.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Fields of ModelConfig."""
    return ConfigDict(
        {
            "name": "qwen3_bench",
            "vocab_size": 32_768,
            "hidden_size": 512,
            "num_layers": 12,
            "num_heads": 8,
            "num_kv_heads": 4,
            "head_dim": 64,
            "intermediate_size": 1536,
            "max_position": 16_384,
            "rope_theta": 1_000_000.0,
            "rms_norm_eps": 1e-6,
            "tie_embeddings": False,
            "qk_norm": True,
            "dtype": "float32",
        }
    )
