"""The PrfaaS paper's case study as processes: 4 instances of 8xH200 prefill for 3 + 5 of 8xH20 over 100 Gbit/s, played by profiles.

    python -m experiments.run_cluster --config=configs/clusters/paper_profiled.py

starts two processes without jax and a router. A thousandth of the KV's bytes are sent, over a link of 0.1 Gbit/s, and a live token stands
for 64; time is not scaled, since what a request costs on two cores (some 25 ms) counts as many times as time is faster. Where throughput
is measured, and not latency, `--config.time_scale=3` saves time. It sustains the 3.25 requests/s of configs/studies/paper_case.py;
threshold, roles and profiles are the same, so it is what the simulator is to be compared with.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Fields of `configs.clusters`."""
    return ConfigDict(
        {
            "engine": "profiled",
            "model": "paper_1t",
            "tokenizer": "",
            "time_scale": 1.0,
            "byte_scale": 1e-3,
            "token_scale": 64,
            "clusters": {
                "prfaas": {"kind": "prefill", "prefill": 4, "profile": "h200_paper_1t"},
                "pd": {"kind": "region", "prefill": 3, "decode": 5, "profile": "h20_paper_1t", "local_gbps": 800.0},
            },
            "links": {"prfaas->pd": {"gbps": 100.0, "rtt_ms": 0.0, "window_mib": 0.0}},
            "policy": "threshold",
            "parameter": 19_400.0,
            "sim": {
                "prefill_chunk": 8192,
                "prefill_rows": 1,
                "overlap": True,
                "link_order": "fair",
                "convert_s": 10.0,
                "control_s": 5.0,
                "slo_scale": 3.0,
                "slo_base_s": 0.5,
                "slo_tpot_s": 0.05,
            },
            "router": {"address": "127.0.0.1:0"},
            "metrics": True,
            "security": {"tls_ca": "", "tls_cert": "", "tls_key": "", "token_file": "", "insecure": False},
            "tenants": {},
            "canary_share": 1.0,
            "shadow": "",
            "shadow_parameter": -1.0,
            "load": 0.7,
            "rate": 0.0,
            "requests": 400,
            "trace": "",
            "workload": {
                "mu": 9.90,
                "sigma": 1.00,
                "low": 128,
                "high": 131_072,
                "output_tokens": 1024,
                "arrivals": "poisson",
                "cv": 1.0,
                "burst_factor": 4.0,
                "burst_s": 20.0,
                "quiet_s": 60.0,
            },
        }
    )
