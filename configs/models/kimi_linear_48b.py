"""Kimi-Linear-48B-A3B: 49.1 B parameters, 8,064 KV bytes per token and 43,417,600 fixed bytes in bfloat16.

20 KDA and 7 MLA layers: every fourth layer is MLA and so is the last one. No rotary embedding anywhere: MLA keeps the 64 shared
elements of a key unrotated. First layer dense, then 256 experts of which a token sees 8, and a shared one.

Source: the published config.json of moonshotai/Kimi-Linear-48B-A3B-Instruct; its class in transformers has as many parameters at these
shapes. The name is 2 % below: 48.4 B are outside the embedding and the output head.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Fields of ModelConfig."""
    kda = {"kind": "kda", "num_heads": 32, "key_dim": 128, "value_dim": 128, "gate_rank": 128}
    mla = {"kind": "mla", "num_heads": 32, "kv_lora_rank": 512, "nope_dim": 128, "rope_dim": 64, "value_dim": 128}
    dense = {"kind": "dense", "intermediate_size": 9216}
    moe = {
        "kind": "moe",
        "num_experts": 256,
        "top_k": 8,
        "intermediate_size": 1024,
        "scoring": "sigmoid",
        "correction_bias": True,
        "scale": 2.446,
        "shared_size": 1024,
    }
    return ConfigDict(
        {
            "name": "kimi_linear_48b",
            "vocab_size": 163_840,
            "hidden_size": 2304,
            "max_position": 1_048_576,
            "blocks": {
                "kda_dense": {"mixer": kda, "mlp": dense},
                "kda": {"mixer": kda, "mlp": moe},
                "mla": {"mixer": mla, "mlp": moe},
            },
            "layers": ["kda_dense", "kda", "kda", "mla"] + ["kda", "kda", "kda", "mla"] * 5 + ["kda", "kda", "mla"],
            "rms_norm_eps": 1e-5,
            "dtype": "bfloat16",
        }
    )
