"""A prefill server: computes prompts and hands out their KV cache.

    python -m experiments.serve_prefill --checkpoint=DIR [--mesh=data:1,model:2] [--address=127.0.0.1:7001] [--advertise_lane=HOST:PORT]

Prints `READY {"address", "lane_addresses", "metrics_address", "fingerprint"}` once it serves. SIGTERM drains it: NOT_SERVING at once,
running work is finished within --grace_s, exit 0. Other than loopback addresses take TLS (--tls_ca, --tls_cert, --tls_key), or --insecure.
"""

import asyncio

from absl import flags

from experiments import dataclass_flags
from prfaas_jax.engine.options import EngineOptions
from prfaas_jax.serving.prefill_server import PrefillServer, PrefillServerOptions
from prfaas_jax.serving.process import run_main, serve

dataclass_flags.define(EngineOptions)
dataclass_flags.define(PrefillServerOptions)
flags.adopt_module_key_flags(dataclass_flags)
GRACE_S = flags.DEFINE_float("grace_s", 10.0, "seconds that running prompts and fetches get after SIGTERM", lower_bound=0)


def main(argv: list[str]) -> None:
    """Flags to options, options to an engine, the engine to its server."""
    del argv
    engine_options, options = dataclass_flags.read(EngineOptions), dataclass_flags.read(PrefillServerOptions)
    # After the flags have been judged: what follows loads the accelerator stack and the weights.
    from configs.models import load_model_config
    from prfaas_jax.engine.build import build_prefill

    engine, _ = build_prefill(engine_options, load_model_config)
    try:
        server = PrefillServer(engine, options)
        asyncio.run(serve(server, lambda: {**server.addresses, "fingerprint": server.fingerprint}, GRACE_S.value))
    finally:
        engine.close()


if __name__ == "__main__":
    run_main(main)
