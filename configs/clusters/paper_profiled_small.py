"""Another system as processes, to check what paper_profiled was fitted on: Kimi Linear 48B, two prefill clusters, 10 Gbit/s and 30 ms.

    python -m experiments.run_cluster --config=configs/clusters/paper_profiled_small.py

starts three processes without jax and a router. Two model seconds pass in one and a fiftieth of the KV's bytes are sent. The link of
`near` binds before its prefill does, and caches have a bound. The region's times are assumed: three times the prefill times of 8xH200, as
the paper's two kinds of instances have it, and a decode step that grows with batch and context.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Fields of `configs.clusters`."""
    return ConfigDict(
        {
            "engine": "profiled",
            "model": "kimi_linear_48b",
            "tokenizer": "",
            "time_scale": 2.0,
            "byte_scale": 0.02,
            "token_scale": 16,
            "clusters": {
                "near": {"kind": "prefill", "prefill": 1, "profile": "h200_kimi_linear_48b"},
                "far": {"kind": "prefill", "prefill": 2, "profile": "h200_kimi_linear_48b"},
                "pd": {
                    "kind": "region",
                    "prefill": 1,
                    "decode": 2,
                    "profile": {
                        "name": "8xH20 kimi_linear_48b",
                        "model": "kimi_linear_48b",
                        "prefill": {"tokens": [1024, 8192, 32_000, 130_000], "seconds": [1.042, 1.147, 1.870, 5.369]},
                        "decode": {"base_s": 0.012, "per_request_s": 0.0002, "per_kv_token_s": 4e-9},
                        "max_batch": 32,
                        "kv_memory_gib": 12.0,
                    },
                    "local_gbps": 400.0,
                },
            },
            "links": {
                "near->pd": {"gbps": 2.0, "rtt_ms": 4.0, "window_mib": 0.0},
                "far->pd": {"gbps": 10.0, "rtt_ms": 30.0, "window_mib": 0.0},
            },
            "policy": "shadow_price",
            "parameter": -1.0,
            "sim": {
                "prefill_chunk": 4096,
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
            "requests": 2000,
            "trace": "",
            "workload": {
                "mu": 9.20,
                "sigma": 1.10,
                "low": 128,
                "high": 120_000,
                "output_tokens": 256,
                "arrivals": "poisson",
                "cv": 1.0,
                "burst_factor": 4.0,
                "burst_s": 20.0,
                "quiet_s": 60.0,
            },
        }
    )
