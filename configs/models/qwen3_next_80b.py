"""Qwen3-Next-80B-A3B: 79.7 B parameters, 24,576 KV bytes per token and 77,266,944 fixed bytes in bfloat16.

36 Gated DeltaNet and 12 output-gated attention layers, 3:1. 512 experts in every layer of which a token sees 10, and a shared one behind
a gate. 2 kv heads: a model axis wider than 2 replicates them.

Source: the defaults of its class in transformers (multi-token prediction left out). Recalled: theta and the context of 262,144 tokens.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Fields of ModelConfig."""
    gated_delta = {"kind": "gated_delta", "num_key_heads": 16, "num_value_heads": 32, "key_dim": 128, "value_dim": 128}
    attention = {
        "kind": "attention",
        "num_heads": 16,
        "num_kv_heads": 2,
        "head_dim": 256,
        "rope": {"theta": 10_000_000.0, "dims": 64},
        "qk_norm": "head",
        "output_gate": True,
    }
    moe = {"kind": "moe", "num_experts": 512, "top_k": 10, "intermediate_size": 512, "shared_size": 512, "shared_gate": True}
    return ConfigDict(
        {
            "name": "qwen3_next_80b",
            "vocab_size": 151_936,
            "hidden_size": 2048,
            "max_position": 262_144,
            "blocks": {"gated_delta": {"mixer": gated_delta, "mlp": moe}, "attention": {"mixer": attention, "mlp": moe}},
            "layers": ["gated_delta", "gated_delta", "gated_delta", "attention"] * 12,
            "rms_norm_eps": 1e-6,
            "norm_offset": True,
            "dtype": "bfloat16",
        }
    )
