"""MiMo-V2-Flash: 309 B parameters, 23,040 KV bytes per token and 25,559,040 fixed bytes in bfloat16.

39 windows of 128 tokens before the current one and 9 full layers, 5:1 behind a full first layer. Windows have sinks, more kv heads and
a smaller theta; keys are wider than values, a third of each head is rotated. First layer dense, then 256 experts of which a token
sees 8.

Source: the published config.json of XiaomiMiMo/MiMo-V2-Flash (its multi-token prediction layers are left out) and its class in
transformers, whose sliding_window 129 counts the current token. Recalled: the context of 262,144 tokens.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Fields of ModelConfig."""
    heads = {"kind": "attention", "num_heads": 64, "head_dim": 192, "value_dim": 128, "value_scale": 0.707}
    full = {**heads, "num_kv_heads": 4, "rope": {"theta": 5_000_000.0, "dims": 64}}
    window = {**heads, "num_kv_heads": 8, "rope": {"theta": 10_000.0, "dims": 64}, "window": 128, "sinks": True}
    dense = {"kind": "dense", "intermediate_size": 16_384}
    moe = {"kind": "moe", "num_experts": 256, "top_k": 8, "intermediate_size": 2048, "scoring": "sigmoid", "correction_bias": True}
    return ConfigDict(
        {
            "name": "mimo_v2_flash",
            "vocab_size": 152_576,
            "hidden_size": 4096,
            "max_position": 262_144,
            "blocks": {
                "full_dense": {"mixer": full, "mlp": dense},
                "window": {"mixer": window, "mlp": moe},
                "full": {"mixer": full, "mlp": moe},
            },
            "layers": ["full_dense"] + ["window"] * 4 + ["full"] + (["window"] * 5 + ["full"]) * 7,
            "rms_norm_eps": 1e-5,
            "dtype": "bfloat16",
        }
    )
