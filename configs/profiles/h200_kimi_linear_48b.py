"""Kimi Linear 48B on 8xH200, prefill only: the times behind its column of the PrfaaS paper's Table 3.

    python -m experiments.reproduce_paper --only=table3

gives 1.19 / 2.29 / 3.87 / 4.88 Gbps back at 1,024 / 8,192 / 32,000 / 130,000 tokens.

Derived, not measured here: T = S_kv / Phi_kv, with the Phi_kv that the paper prints and the bytes of configs/models/kimi_linear_48b.py.
So the column coming back checks units and interpolation and is no evidence of its own.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Fields of prfaas_jax.scheduling.profile_files; cost relative to one 8xH20 instance."""
    return ConfigDict(
        {
            "name": "8xH200 kimi_linear_48b",
            "model": "kimi_linear_48b",
            "basis": "measured",
            "prefill": {"tokens": [1024, 8192, 32_000, 130_000], "seconds": [0.347396, 0.382456, 0.623185, 1.789734]},
            "decode": None,
            "max_batch": 1,
            "kv_memory_gib": None,
            "nic_gbps": None,
            "cost_per_hour": 2.0,
        }
    )
