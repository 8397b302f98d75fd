"""The hybrid that bench_engine measures: 59.0 M parameters, 1,536 KV bytes per token and 2,525,184 fixed bytes in float32.

Ours, random weights. KDA:MLA 3:1, three times: 3 x 4 body layers, 512 wide. A KDA head is 128 x 128 as in Kimi Linear. States are
44.5 % of a request's KV bytes at 2,048 tokens. 4 heads, so that a model axis of 1, 2 or 4 divides them.

    python -m experiments.bench_engine --model=configs/models/hybrid_bench.py
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Fields of ModelConfig."""
    kda = {"kind": "kda", "num_heads": 4, "key_dim": 128, "value_dim": 128, "gate_rank": 128}
    mla = {"kind": "mla", "num_heads": 4, "kv_lora_rank": 96, "nope_dim": 96, "rope_dim": 32, "value_dim": 128}
    dense = {"kind": "dense", "intermediate_size": 1536}
    return ConfigDict(
        {
            "name": "hybrid_bench",
            "vocab_size": 32_768,
            "hidden_size": 512,
            "max_position": 16_384,
            "blocks": {"kda": {"mixer": kda, "mlp": dense}, "mla": {"mixer": mla, "mlp": dense}},
            "layers": ["kda", "kda", "kda", "mla"] * 3,
            "rms_norm_eps": 1e-5,
            "tie_embeddings": True,
            "dtype": "float32",
        }
    )
