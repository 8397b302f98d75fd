"""A Gemma 3 small enough for tests: 626,112 parameters, 1,024 KV bytes per token and 158,720 fixed bytes in float32.

Ours, random weights. Five windows of 31 tokens (Hugging Face's sliding_window 32 counts the current one) to one full layer, twice:
2 x 6 body layers. Norms behind both branches, scaled embeddings, linear rope scaling on full layers as in Gemma 3 4B and larger.
4 kv heads, so that a model axis of 1, 2 or 4 divides them.

    python -m experiments.check_equivalence --model=configs/models/gemma3_toy.py
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Fields of ModelConfig."""
    heads = {"kind": "attention", "num_heads": 8, "num_kv_heads": 4, "head_dim": 16, "qk_norm": "head"}
    window = {**heads, "rope": {"theta": 10_000.0}, "window": 31}
    full = {**heads, "rope": {"theta": 1_000_000.0, "scaling": {"kind": "linear", "factor": 8.0}}}
    mlp = {"kind": "dense", "intermediate_size": 128, "activation": "gelu_tanh"}
    return ConfigDict(
        {
            "name": "gemma3_toy",
            "vocab_size": 512,
            "hidden_size": 64,
            "max_position": 4096,
            "blocks": {"window": {"mixer": window, "mlp": mlp}, "full": {"mixer": full, "mlp": mlp}},
            "layers": (["window"] * 5 + ["full"]) * 2,
            "rms_norm_eps": 1e-6,
            "tie_embeddings": True,
            "norm_offset": True,
            "post_norms": True,
            "embed_scale": 8.0,
            "dtype": "float32",
        }
    )
