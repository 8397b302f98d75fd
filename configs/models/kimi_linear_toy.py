"""A Kimi Linear small enough for tests: 640,636 parameters, 480 KV bytes per token and 32,000 fixed bytes in float32.

Ours, random weights. KDA:MLA 2:1, where Kimi-Linear-48B has 3:1: fewer layers compile faster. As there the last layer is MLA, the first
is dense, the others have experts. It folds into 1 head layer, 2 x 3 body layers and 1 tail layer. 4 heads, so that a model axis of 1, 2
or 4 divides them.

    python -m experiments.check_equivalence --model=configs/models/kimi_linear_toy.py
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Fields of ModelConfig."""
    kda = {"kind": "kda", "num_heads": 4, "key_dim": 16, "value_dim": 16, "gate_rank": 16}
    mla = {"kind": "mla", "num_heads": 4, "kv_lora_rank": 32, "nope_dim": 16, "rope_dim": 8, "value_dim": 16}
    dense = {"kind": "dense", "intermediate_size": 128}
    moe = {
        "kind": "moe",
        "num_experts": 8,
        "top_k": 2,
        "intermediate_size": 32,
        "scoring": "sigmoid",
        "correction_bias": True,
        "scale": 2.446,
        "shared_size": 32,
    }
    return ConfigDict(
        {
            "name": "kimi_linear_toy",
            "vocab_size": 512,
            "hidden_size": 64,
            "max_position": 4096,
            "blocks": {
                "kda_dense": {"mixer": kda, "mlp": dense},
                "kda": {"mixer": kda, "mlp": moe},
                "mla": {"mixer": mla, "mlp": moe},
            },
            "layers": ["kda_dense", *["kda", "kda", "mla"] * 2, "mla"],
            "rms_norm_eps": 1e-5,
            "dtype": "float32",
        }
    )
