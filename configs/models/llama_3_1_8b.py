"""Llama-3.1-8B: 8.03 B parameters, 131,072 KV bytes per token in bfloat16.

Source: the published config.json of meta-llama/Llama-3.1-8B.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Fields of ModelConfig."""
    return ConfigDict(
        {
            "name": "llama_3_1_8b",
            "vocab_size": 128_256,
            "hidden_size": 4096,
            "num_layers": 32,
            "num_heads": 32,
            "num_kv_heads": 8,
            "head_dim": 128,
            "intermediate_size": 14_336,
            "max_position": 131_072,
            "rope_theta": 500_000.0,
            "rope_scaling": {
                "kind": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position": 8192,
            },
            "rms_norm_eps": 1e-5,
            "tie_embeddings": False,
            "dtype": "bfloat16",
        }
    )
