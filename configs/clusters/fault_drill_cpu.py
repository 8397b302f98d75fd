"""What `experiments.fault_drill` breaks: two prefill clusters, and a region of two decode servers and a prefill server, on one machine.

    python -m experiments.fault_drill --config=configs/clusters/fault_drill_cpu.py

Prompts of more than 512 tokens are prefilled far away: their 1.2 to 2.5 MB of KV cross a link of 30 Mbit/s in 0.3 to 0.7 s, long enough
for something to happen to it meanwhile. Timers are those of a deployment, not of a machine that is busy compiling: a server that is silent
for a second is taken for frozen, and a transfer without a sign of life for two has failed.
"""

from ml_collections import ConfigDict

_PREFILL_SERVER = {"lease_s": 4.0}
_ENVIRONMENT = {"PRFAAS_PING_TIMEOUT_S": "1.5"}


def get_config() -> ConfigDict:
    """Fields of `configs.clusters`."""
    return ConfigDict(
        {
            "engine": "jax",
            "checkpoint": "random:qwen3_toy",
            "tokenizer": "",
            "platform": "cpu",
            "engine_options": {
                "dtype": "float32",
                "chunk": 256,
                "max_length": 1280,
                "max_rows": 8,
                "max_prefill_rows": 1,
                "page_size": 16,
            },
            "clusters": {
                "alpha": {"kind": "prefill", "prefill": 1, "prefill_server": _PREFILL_SERVER, "environment": _ENVIRONMENT},
                "beta": {"kind": "prefill", "prefill": 1, "prefill_server": _PREFILL_SERVER, "environment": _ENVIRONMENT},
                "home": {
                    "kind": "region",
                    "prefill": 1,
                    "decode": 2,
                    "prefill_server": _PREFILL_SERVER,
                    "decode_server": {"idle_s": 2.0, "detach_s": 3.0},
                    "environment": _ENVIRONMENT,
                },
            },
            "links": {"alpha->home": {"gbps": 0.03, "rtt_ms": 10.0}, "beta->home": {"gbps": 0.03, "rtt_ms": 10.0}},
            "policy": "threshold",
            "parameter": 512.0,
            "sim": {"control_s": 5.0},
            "router": {
                "address": "127.0.0.1:0",
                "report_s": 0.25,
                "silence_s": 1.0,
                "park_s": 5.0,
                "max_requests": 24,
                "breaker_most_open_s": 4.0,
            },
            "metrics": False,
            "security": {"tls_ca": "", "tls_cert": "", "tls_key": "", "token_file": "", "insecure": False},
            "tenants": {},
            "canary_share": 1.0,
            "shadow": "",
            "shadow_parameter": -1.0,
        }
    )
