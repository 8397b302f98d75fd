"""A DeepSeek-V3 small enough for tests: 439,800 parameters, 800 KV bytes per token in float32.

Ours, random weights. MLA in every layer, with rotary embeddings and low-rank queries; a dense first layer, then experts in 4 groups
of which a token sees 2, and a shared one: 1 head layer and 4 x 1 body layers. 8 heads, so that a model axis of 1, 2 or 4 divides them;
the latent has no heads and every device keeps it whole.

    python -m experiments.check_equivalence --model=configs/models/deepseek_toy.py
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Fields of ModelConfig."""
    mla = {
        "kind": "mla",
        "num_heads": 8,
        "kv_lora_rank": 32,
        "nope_dim": 16,
        "rope_dim": 8,
        "value_dim": 16,
        "q_lora_rank": 24,
        "rope": {"theta": 10_000.0},
    }
    dense = {"kind": "dense", "intermediate_size": 128}
    moe = {
        "kind": "moe",
        "num_experts": 8,
        "top_k": 3,
        "intermediate_size": 32,
        "scoring": "sigmoid",
        "correction_bias": True,
        "num_groups": 4,
        "top_groups": 2,
        "scale": 2.5,
        "shared_size": 32,
    }
    return ConfigDict(
        {
            "name": "deepseek_toy",
            "vocab_size": 512,
            "hidden_size": 64,
            "max_position": 4096,
            "blocks": {"mla_dense": {"mixer": mla, "mlp": dense}, "mla": {"mixer": mla, "mlp": moe}},
            "layers": ["mla_dense"] + ["mla"] * 4,
            "rms_norm_eps": 1e-6,
            "dtype": "float32",
        }
    )
