"""Gemma 3 270M: 268 M parameters (tied embeddings counted once), 3,072 KV bytes per token and 7,848,960 fixed bytes in bfloat16.

15 windows of 511 tokens before the current one (Hugging Face's sliding_window 512 counts that one too) and 3 full layers, 5:1. One kv
head: a model axis of 2 or 4 replicates it. Norms behind both branches, embeddings scaled by sqrt(640).

Source: metadata of a published GGUF of google/gemma-3-270m and its class in transformers.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Fields of ModelConfig."""
    heads = {"kind": "attention", "num_heads": 4, "num_kv_heads": 1, "head_dim": 256, "qk_norm": "head"}
    window = {**heads, "rope": {"theta": 10_000.0}, "window": 511}
    full = {**heads, "rope": {"theta": 1_000_000.0}}
    mlp = {"kind": "dense", "intermediate_size": 2048, "activation": "gelu_tanh"}
    return ConfigDict(
        {
            "name": "gemma3_270m",
            "vocab_size": 262_144,
            "hidden_size": 640,
            "max_position": 32_768,
            "blocks": {"window": {"mixer": window, "mlp": mlp}, "full": {"mixer": full, "mlp": mlp}},
            "layers": (["window"] * 5 + ["full"]) * 3,
            "rms_norm_eps": 1e-6,
            "tie_embeddings": True,
            "norm_offset": True,
            "post_norms": True,
            "embed_scale": 640**0.5,
            "dtype": "bfloat16",
        }
    )
