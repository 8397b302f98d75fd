"""MiMo-V2-Flash 309B on 8xH200, prefill only: the times behind its column of the PrfaaS paper's Table 3.

    python -m experiments.reproduce_paper --only=table3

gives 0.82 / 2.85 / 4.66 / 4.71 Gbps back at 1,024 / 8,192 / 32,000 / 130,000 tokens.

Derived, not measured here: T = S_kv / Phi_kv, with the Phi_kv that the paper prints and the bytes of configs/models/mimo_v2_flash.py.
So the column coming back checks units and interpolation and is no evidence of its own.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Fields of prfaas_jax.scheduling.profile_files; cost relative to one 8xH20 instance."""
    return ConfigDict(
        {
            "name": "8xH200 mimo_v2_flash",
            "model": "mimo_v2_flash",
            "basis": "measured",
            "prefill": {"tokens": [1024, 8192, 32_000, 130_000], "seconds": [0.479532, 0.601551, 1.309595, 5.130801]},
            "decode": None,
            "max_batch": 1,
            "kv_memory_gib": None,
            "nic_gbps": None,
            "cost_per_hour": 2.0,
        }
    )
