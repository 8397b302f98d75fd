"""Qwen3-235B-A22B: 235 B parameters, 192,512 KV bytes per token in bfloat16.

94 equal layers of grouped-query attention and 128 experts of which a token sees 8.

Source: the config.json of Qwen/Qwen3-235B-A22B as recalled; the KV sizes that the PrfaaS paper's figures imply agree with it.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Fields of ModelConfig."""
    attention = {
        "kind": "attention",
        "num_heads": 64,
        "num_kv_heads": 4,
        "head_dim": 128,
        "rope": {"theta": 1_000_000.0},
        "qk_norm": "head",
    }
    moe = {"kind": "moe", "num_experts": 128, "top_k": 8, "intermediate_size": 1536}
    return ConfigDict(
        {
            "name": "qwen3_235b",
            "vocab_size": 151_936,
            "hidden_size": 4096,
            "max_position": 40_960,
            "blocks": {"attention": {"mixer": attention, "mlp": moe}},
            "layers": ["attention"] * 94,
            "rms_norm_eps": 1e-6,
            "dtype": "bfloat16",
        }
    )
