"""The PrfaaS paper's 1 T hybrid on 8xH200, the instance of its PrfaaS cluster: prefill only.

    python -m experiments.reproduce_paper --only=table5

gives 0.43 / 0.74 / 1.84 / 7.46 s at 1,024 / 8,192 / 32,000 / 130,000 tokens; the paper's Table 5 has 0.44 / 0.72 / 1.84 / 7.40 s.

The paper prints no coefficients. These three and the three of h20_paper_1t are fitted to its Tables 5 and 6: six parameters, sixteen
numbers. One H200 is priced as two H20, which its "15 % better at equal cost" implies.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Fields of prfaas_jax.scheduling.profile_files: seconds with x = tokens / 10,000, cost relative to one 8xH20 instance."""
    return ConfigDict(
        {
            "name": "8xH200 paper_1t",
            "model": "paper_1t",
            "basis": "fitted",
            "prefill": {"start_s": 0.39035, "linear_s": 0.42233, "quadratic_s": 0.00936, "max_tokens": 131_072},
            "decode": None,
            "max_batch": 1,
            "kv_memory_gib": None,  # never binds
            "nic_gbps": None,  # the link binds first
            "cost_per_hour": 2.0,
        }
    )
