"""The PrfaaS paper's 1 T hybrid on 8xH20, the instance of its PD clusters: prefill and decode.

    python -m experiments.reproduce_paper --only=table6

gives 4.45 s mean TTFT and 2.11 requests/s of 12 such instances, as the paper's Table 6 has them (4.44 s, 2.11 requests/s).

The paper prints no coefficients: those of prefill are fitted as in h200_paper_1t. Decode is 800 tokens/s per instance, which gives its
Theta_pd-d to the last digit: 20 requests at 25 ms a step, the 40 tokens/s that it asks for, whatever their contexts hold.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Fields of prfaas_jax.scheduling.profile_files: seconds with x = tokens / 10,000, cost relative to one 8xH20 instance."""
    return ConfigDict(
        {
            "name": "8xH20 paper_1t",
            "model": "paper_1t",
            "basis": "fitted",
            "prefill": {"start_s": 0.46425, "linear_s": 1.30599, "quadratic_s": 0.02806, "max_tokens": 131_072},
            "decode": {"base_s": 0.025, "per_request_s": 0.0, "per_kv_token_s": 0.0},
            "max_batch": 20,
            "kv_memory_gib": None,  # never binds
            "nic_gbps": None,  # the link binds first
            "cost_per_hour": 1.0,
        }
    )
