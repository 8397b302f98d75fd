"""Two prefill clusters and three regions of a toy hybrid on one machine; not every pair has a link, and one tenant stays in its region.

    python -m experiments.run_cluster --config=configs/clusters/three_regions_cpu.py

starts eight servers, each with an engine, and a router; the first time in two minutes or so on two cores. `west` has two decode servers
and no prefill server of its own, and `south` is reached from `bulk` only: a long prompt that is decoded there never comes from `spot`.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Fields of `configs.clusters`."""
    return ConfigDict(
        {
            "engine": "jax",
            "checkpoint": "random:kimi_linear_toy",
            "tokenizer": "",
            "platform": "cpu",
            "compile_cache": ".cache/xla",
            "engine_options": {
                "dtype": "float32",
                "chunk": 256,
                "max_length": 2048,
                "max_rows": 8,
                "max_prefill_rows": 1,
                "page_size": 16,
            },
            "clusters": {
                "bulk": {"kind": "prefill", "prefill": 2},
                "spot": {"kind": "prefill", "prefill": 1},
                "east": {"kind": "region", "prefill": 1, "decode": 1, "convertible": False},
                "west": {"kind": "region", "prefill": 0, "decode": 2, "convertible": False},
                "south": {"kind": "region", "prefill": 0, "decode": 1, "convertible": False},
            },
            "links": {
                "bulk->east": {"gbps": 1.0, "rtt_ms": 20.0},
                "bulk->west": {"gbps": 0.5, "rtt_ms": 60.0},
                "bulk->south": {"gbps": 0.2, "rtt_ms": 120.0},
                "spot->east": {"gbps": 0.5, "rtt_ms": 40.0},
                "spot->west": {"gbps": 1.0, "rtt_ms": 10.0},
            },
            "policy": "threshold",
            "parameter": 512.0,
            "sim": {"control_s": 5.0},
            "router": {"address": "127.0.0.1:0", "report_s": 1.0, "silence_s": 10.0},  # engines that compile are late, not gone
            "metrics": True,
            "security": {"tls_ca": "", "tls_cert": "", "tls_key": "", "token_file": "", "insecure": False},
            "tenants": {"clinic": {"max_running": 4, "regions": ("south",)}},
            "canary_share": 1.0,
            "shadow": "always_local",
            "shadow_parameter": -1.0,
            "rate": 1.0,
            "requests": 60,
            "workload": {"mu": 6.0, "sigma": 0.8, "low": 16, "high": 1536, "output_tokens": 32, "arrivals": "poisson"},
        }
    )
