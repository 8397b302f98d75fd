"""Qwen3-235B on 8xH200, prefill only: the times behind its column of the PrfaaS paper's Table 3.

    python -m experiments.reproduce_paper --only=table3

gives 4.12 / 22.42 / 33.35 / 21.50 Gbps back at 1,024 / 8,192 / 32,000 / 130,000 tokens.

Derived, not measured here: T = S_kv / Phi_kv, with the Phi_kv that the paper prints and the bytes of configs/models/qwen3_235b.py.
So the column coming back, or its 64-fold in the paper's sizing, checks units and interpolation and is no evidence of its own.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Fields of prfaas_jax.scheduling.profile_files; cost relative to one 8xH20 instance."""
    return ConfigDict(
        {
            "name": "8xH200 qwen3_235b",
            "model": "qwen3_235b",
            "basis": "measured",
            "prefill": {"tokens": [1024, 8192, 32_000, 130_000], "seconds": [0.382781, 0.562733, 1.477753, 9.312208]},
            "decode": None,
            "max_batch": 1,
            "kv_memory_gib": None,
            "nic_gbps": None,
            "cost_per_hour": 2.0,
        }
    )
