"""A Qwen3.5 small enough for tests: 496,960 parameters, 512 KV bytes per token and 67,584 fixed bytes in float32.

Ours, random weights. Gated DeltaNet to output-gated attention 3:1, twice: 2 x 4 body layers. Rotary embeddings on a quarter of each
head. 2 kv heads, so that a model axis of 4 has to replicate them; the 4 key heads of the DeltaNet layers divide.

    python -m experiments.check_equivalence --model=configs/models/gated_delta_toy.py
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Fields of ModelConfig."""
    dense = {"kind": "dense", "intermediate_size": 128}
    gated_delta = {"kind": "gated_delta", "num_key_heads": 4, "num_value_heads": 8, "key_dim": 16, "value_dim": 16}
    attention = {
        "kind": "attention",
        "num_heads": 8,
        "num_kv_heads": 2,
        "head_dim": 16,
        "rope": {"theta": 10_000_000.0, "dims": 4},
        "qk_norm": "head",
        "output_gate": True,
    }
    return ConfigDict(
        {
            "name": "gated_delta_toy",
            "vocab_size": 512,
            "hidden_size": 64,
            "max_position": 4096,
            "blocks": {"gated_delta": {"mixer": gated_delta, "mlp": dense}, "attention": {"mixer": attention, "mlp": dense}},
            "layers": ["gated_delta", "gated_delta", "gated_delta", "attention"] * 2,
            "rms_norm_eps": 1e-6,
            "tie_embeddings": True,
            "norm_offset": True,
            "dtype": "float32",
        }
    )
