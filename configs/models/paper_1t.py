"""The PrfaaS paper's internal 1 T hybrid: 1.00 T parameters, 17,280 KV bytes per token and 182,353,920 fixed bytes in bfloat16.

    python -m experiments.kv_table --models=paper_1t

gives 190.78 / 308.91 / 701.25 / 2316.24 MiB at 1,024 / 8,192 / 32,000 / 130,000 tokens; the paper's Table 5 has 190.8 / 308.9 /
701.3 / 2316.3 MiB at 1K / 8K / 32K / 128K.

The paper (arXiv 2604.15039) says 1 T and KDA:MLA 3:1, no more. Inferred from its four sizes, which it gives to within 0.1 MiB:
42 KDA layers of 64 heads of 128 x 128 and 15 MLA layers of 512 + 64 elements. That is every fourth layer of 57, and a last one more,
as in Kimi-Linear-48B. Chosen, so that the total is 1 T: a width of 7168 and MLA heads as in Kimi K2; 448 experts of width 1792 in every
layer, of which a token sees 8, and a shared one. Heads and experts divide over 64 chips.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Fields of ModelConfig."""
    kda = {"kind": "kda", "num_heads": 64, "key_dim": 128, "value_dim": 128, "gate_rank": 128}
    mla = {
        "kind": "mla",
        "num_heads": 64,
        "kv_lora_rank": 512,
        "nope_dim": 128,
        "rope_dim": 64,
        "value_dim": 128,
        "q_lora_rank": 1536,
    }
    moe = {
        "kind": "moe",
        "num_experts": 448,
        "top_k": 8,
        "intermediate_size": 1792,
        "scoring": "sigmoid",
        "correction_bias": True,
        "scale": 2.827,
        "shared_size": 1792,
    }
    return ConfigDict(
        {
            "name": "paper_1t",
            "vocab_size": 163_840,
            "hidden_size": 7168,
            "max_position": 131_072,
            "blocks": {"kda": {"mixer": kda, "mlp": moe}, "mla": {"mixer": mla, "mlp": moe}},
            "layers": ["kda", "kda", "kda", "mla"] * 14 + ["mla"],
            "rms_norm_eps": 1e-5,
            "dtype": "bfloat16",
        }
    )
