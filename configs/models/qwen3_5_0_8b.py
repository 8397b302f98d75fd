"""Qwen3.5-0.8B, its text part: 752 M parameters, 12,288 KV bytes per token and 19,537,920 fixed bytes in bfloat16.

18 Gated DeltaNet and 6 output-gated attention layers, 3:1, all with a dense feed-forward. 2 kv heads: a model axis wider than 2
replicates them. For text its rotary embedding in three sections is the plain one.

Source: the published config.json of Qwen/Qwen3.5-0.8B. The parameters are those of this config, tied embeddings counted once; the
name counts the vision tower too, which is not here. Recalled: the context of 262,144 tokens.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Fields of ModelConfig."""
    gated_delta = {"kind": "gated_delta", "num_key_heads": 16, "num_value_heads": 16, "key_dim": 128, "value_dim": 128}
    attention = {
        "kind": "attention",
        "num_heads": 8,
        "num_kv_heads": 2,
        "head_dim": 256,
        "rope": {"theta": 10_000_000.0, "dims": 64},
        "qk_norm": "head",
        "output_gate": True,
    }
    dense = {"kind": "dense", "intermediate_size": 3584}
    return ConfigDict(
        {
            "name": "qwen3_5_0_8b",
            "vocab_size": 248_320,
            "hidden_size": 1024,
            "max_position": 262_144,
            "blocks": {"gated_delta": {"mixer": gated_delta, "mlp": dense}, "attention": {"mixer": attention, "mlp": dense}},
            "layers": ["gated_delta", "gated_delta", "gated_delta", "attention"] * 6,
            "rms_norm_eps": 1e-6,
            "tie_embeddings": True,
            "norm_offset": True,
            "dtype": "bfloat16",
        }
    )
