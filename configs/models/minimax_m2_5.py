"""MiniMax-M2.5: 229 B parameters, 253,952 KV bytes per token in bfloat16.

62 equal layers of grouped-query attention, queries and keys normed over all heads jointly, and 256 experts of which a token sees 8.

Source: the published config.json of the M2 family and its class in transformers. Sources differ on how much of a head is rotated in
M2.5; here it is 64 of 128 elements, as in M2.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Fields of ModelConfig."""
    attention = {
        "kind": "attention",
        "num_heads": 48,
        "num_kv_heads": 8,
        "head_dim": 128,
        "rope": {"theta": 5_000_000.0, "dims": 64},
        "qk_norm": "all",
    }
    moe = {"kind": "moe", "num_experts": 256, "top_k": 8, "intermediate_size": 1536, "scoring": "sigmoid", "correction_bias": True}
    return ConfigDict(
        {
            "name": "minimax_m2_5",
            "vocab_size": 200_064,
            "hidden_size": 3072,
            "max_position": 196_608,
            "blocks": {"attention": {"mixer": attention, "mlp": moe}},
            "layers": ["attention"] * 62,
            "rms_norm_eps": 1e-6,
            "dtype": "bfloat16",
        }
    )
