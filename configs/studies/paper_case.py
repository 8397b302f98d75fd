"""The PrfaaS paper's case study: 4 instances of 8xH200 prefill for 8 instances of 8xH20 over 100 Gbit/s (section 4, Table 6).

    python -m experiments.plan --config=configs/studies/paper_case.py

gives threshold 19,400, 3 local prefill and 5 decode instances, and 3.25 requests/s: 1.54 times the 2.11 of 12 homogeneous instances, 1.16
times the 2.81 of 16, which cost as much. The paper prints 19.4K, 3 / 5, 3.24, 1.54 and "15 %". `--config.reading=exact` takes E[T] instead
of T at the mean length: 3.19 requests/s.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Fields of `configs.studies.case_study` and `mix_of`, and of the simulation."""
    return ConfigDict(
        {
            "model": "paper_1t",  # under configs/models, or a file
            "prfaas_profile": "h200_paper_1t",  # under configs/profiles, or a .py or .json file
            "pd_profile": "h20_paper_1t",
            "efficiency": 0.0,  # share of the roofline, for profiles that were compiled and not run; they refuse 0
            "prfaas_cost": 0.0,  # per instance and hour; 0: as the profile says
            "pd_cost": 0.0,
            "n_prfaas": 4,
            "n_pd": 8,
            "n_prefill_local": -1,  # of n_pd; -1: the planner decides
            "link_gbps": 100.0,
            "rtt_ms": 0.0,
            "window_mib": 0.0,  # in flight per transfer; 0: no limit
            "local_gbps": 800.0,  # inside the PD cluster
            "reading": "mean",  # T at the mean length, as printed; or "exact", E[T]
            "t_step": 100.0,  # tokens between the thresholds that are tried
            "policy": "threshold",  # a name of prfaas_jax.simulation.contenders.CONTENDERS
            "parameter": -1.0,  # its threshold or share; -1: the planner's
            "load": 0.9,  # of Lambda_max
            "rate": 0.0,  # requests/s; 0: load * Lambda_max
            "requests": 20_000,
            "trace": "",  # .jsonl or .csv, also .gz, instead of the workload's lengths
            "wave_low_gbps": 0.0,  # the link has this for half of every wave_period_s; 0: it is steady
            "wave_period_s": 120.0,
            "mtbf_s": 0.0,  # mean seconds between failures of each instance; 0: none fails
            "mttr_s": 60.0,
            "workload": {
                "mu": 9.90,  # of log(prompt tokens)
                "sigma": 1.00,
                "low": 128,
                "high": 131_072,
                "output_tokens": 1024,
                "arrivals": "poisson",  # or "gamma" (cv), "bursty" (burst_factor, burst_s, quiet_s)
                "cv": 1.0,
                "burst_factor": 4.0,
                "burst_s": 20.0,
                "quiet_s": 60.0,
            },
            "sim": {  # prfaas_jax.simulation.scenario.SimOptions
                "prefill_chunk": 8192,
                "prefill_rows": 1,
                "overlap": True,
                "link_order": "fair",
                "prefill_cache_bytes": 0.0,
                "decode_cache_bytes": 0.0,
                "checkpoint_blocks": 16,
                "stall_s": 5.0,
                "detect_s": 1.0,
                "convert_s": 10.0,
                "control_s": 5.0,
                "slo_scale": 3.0,
                "slo_base_s": 0.5,
                "slo_tpot_s": 0.05,
                "warmup": 0.05,
            },
        }
    )
