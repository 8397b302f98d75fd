"""A MiniMax-Text-01 small enough for tests: 759,616 parameters, 1,024 KV bytes per token and 49,152 fixed bytes in float32.

Ours, random weights. Lightning to full attention 3:1 (MiniMax has 7:1), twice: 2 x 4 body layers, whose decays differ by depth. The
residual is what the norm gave, scaled by alpha, the branch by beta; MiniMax has one alpha and beta = 1, here all differ so that none
can stand in for another. 4 kv heads, so that a model axis of 1, 2 or 4 divides them.

    python -m experiments.check_equivalence --model=configs/models/lightning_toy.py
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Fields of ModelConfig."""
    lightning = {"kind": "lightning", "num_heads": 8, "head_dim": 16}
    attention = {"kind": "attention", "num_heads": 8, "num_kv_heads": 4, "head_dim": 16, "rope": {"theta": 10_000.0, "dims": 8}}
    moe = {"kind": "moe", "num_experts": 8, "top_k": 2, "intermediate_size": 32}
    return ConfigDict(
        {
            "name": "lightning_toy",
            "vocab_size": 512,
            "hidden_size": 64,
            "max_position": 4096,
            "blocks": {
                "lightning": {"mixer": lightning, "mlp": moe, "mixer_scales": [1.75, 1.25], "mlp_scales": [1.5, 0.875]},
                "attention": {"mixer": attention, "mlp": moe, "mixer_scales": [2.0, 0.75], "mlp_scales": [1.5, 0.875]},
            },
            "layers": ["lightning", "lightning", "lightning", "attention"] * 2,
            "rms_norm_eps": 1e-5,
            "normalized_residual": True,
            "dtype": "float32",
        }
    )
