"""Ring-2.5-1T (and Ling-2.5-1T): 1.01 T parameters, 11,520 KV bytes per token and 293,601,280 fixed bytes in bfloat16.

70 Lightning and 10 MLA layers, 7:1. Lightning has no convolutions, so a state is all that its layers keep. The first four layers are
dense, the others have 256 experts of which a token sees 8, and a shared one.

Source: the published config.json for layers, heads, head sizes, experts, vocabulary and norms, and the defaults of its published class
(inclusionAI/Ring-V2.5) for the router's groups and Lightning without activation. Recalled, with siblings of the family as guide: the
rank of MLA's queries, the widths of the feed-forward parts, the four dense layers, the router's factor and Lightning's scale. They give
the published 1 T total and 63 B active parameters.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Fields of ModelConfig."""
    lightning = {
        "kind": "lightning",
        "num_heads": 64,
        "head_dim": 128,
        "activation": None,
        "rope": {"theta": 6_000_000.0, "dims": 64},
        "qk_norm": True,
        "norm_groups": 8,
        "scale": 128**-0.5,
    }
    mla = {
        "kind": "mla",
        "num_heads": 64,
        "kv_lora_rank": 512,
        "nope_dim": 128,
        "rope_dim": 64,
        "value_dim": 128,
        "q_lora_rank": 1536,
        "rope": {"theta": 6_000_000.0},
    }
    dense = {"kind": "dense", "intermediate_size": 18_432}
    moe = {
        "kind": "moe",
        "num_experts": 256,
        "top_k": 8,
        "intermediate_size": 2048,
        "scoring": "sigmoid",
        "correction_bias": True,
        "num_groups": 8,
        "top_groups": 4,
        "scale": 2.5,
        "shared_size": 2048,
    }
    return ConfigDict(
        {
            "name": "ring_2_5_1t",
            "vocab_size": 157_184,
            "hidden_size": 8192,
            "max_position": 131_072,
            "blocks": {
                "lightning_dense": {"mixer": lightning, "mlp": dense},
                "lightning": {"mixer": lightning, "mlp": moe},
                "mla": {"mixer": mla, "mlp": moe},
            },
            "layers": ["lightning_dense"] * 4 + ["lightning"] * 3 + ["mla"] + (["lightning"] * 7 + ["mla"]) * 9,
            "rms_norm_eps": 1e-6,
            "dtype": "bfloat16",
        }
    )
