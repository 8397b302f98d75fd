"""A Qwen3-Next small enough for tests: 788,288 parameters, 1,024 KV bytes per token and 67,584 fixed bytes in float32.

Ours, random weights. Gated DeltaNet to output-gated attention 3:1, twice: 2 x 4 body layers. Every layer has experts, and a shared
one behind a gate. 4 kv heads and 4 key heads, so that a model axis of 1, 2 or 4 divides them.

    python -m experiments.check_equivalence --model=configs/models/qwen3_next_toy.py
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Fields of ModelConfig."""
    moe = {"kind": "moe", "num_experts": 8, "top_k": 3, "intermediate_size": 32, "shared_size": 32, "shared_gate": True}
    gated_delta = {"kind": "gated_delta", "num_key_heads": 4, "num_value_heads": 8, "key_dim": 16, "value_dim": 16}
    attention = {
        "kind": "attention",
        "num_heads": 8,
        "num_kv_heads": 4,
        "head_dim": 16,
        "rope": {"theta": 10_000_000.0, "dims": 4},
        "qk_norm": "head",
        "output_gate": True,
    }
    return ConfigDict(
        {
            "name": "qwen3_next_toy",
            "vocab_size": 512,
            "hidden_size": 64,
            "max_position": 4096,
            "blocks": {"gated_delta": {"mixer": gated_delta, "mlp": moe}, "attention": {"mixer": attention, "mlp": moe}},
            "layers": ["gated_delta", "gated_delta", "gated_delta", "attention"] * 2,
            "rms_norm_eps": 1e-6,
            "norm_offset": True,
            "dtype": "float32",
        }
    )
