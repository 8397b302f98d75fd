"""Two sites on one machine: a prefill server, and a region with a decode server and a prefill server of its own; 1 Gbit/s, 20 ms between.

    python -m experiments.run_cluster --config=configs/clusters/two_sites_cpu.py

starts real engines of a toy model, relays and a router within a minute. Prompts of more than 512 tokens are prefilled at the far site, and
others beside the decode server: one of 600 tokens moves 1,228,800 bytes of KV over the link, one of 100 moves 204,800 past it.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Fields of `configs.clusters`."""
    return ConfigDict(
        {
            "engine": "jax",
            "checkpoint": "random:qwen3_toy",
            "tokenizer": "",
            "platform": "cpu",
            "compile_cache": ".cache/xla",
            "engine_options": {  # few shapes, so that little is compiled
                "dtype": "float32",
                "chunk": 256,
                "max_length": 2048,
                "max_rows": 8,
                "max_prefill_rows": 1,
                "page_size": 16,
            },
            "clusters": {
                "far": {"kind": "prefill", "prefill": 1},
                "home": {"kind": "region", "prefill": 1, "decode": 1, "convertible": False},
            },
            "links": {"far->home": {"gbps": 1.0, "rtt_ms": 20.0}},
            "policy": "threshold",
            "parameter": 512.0,
            "sim": {"control_s": 5.0},
            "router": {"address": "127.0.0.1:0", "report_s": 1.0, "silence_s": 10.0},  # engines that compile are late, not gone
            "metrics": True,
            "security": {"tls_ca": "", "tls_cert": "", "tls_key": "", "token_file": "", "insecure": False},
            "tenants": {},
            "canary_share": 1.0,
            "shadow": "",
            "shadow_parameter": -1.0,
            "rate": 2.0,
            "requests": 300,
            "workload": {"mu": 6.0, "sigma": 0.8, "low": 16, "high": 1536, "output_tokens": 32, "arrivals": "poisson"},
        }
    )
