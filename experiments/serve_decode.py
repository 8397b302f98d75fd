"""A decode server: serves Generate over a paged decode engine, with remote or local prefill.

    python -m experiments.serve_decode --checkpoint=DIR [--mesh=data:1,model:1] [--address=127.0.0.1:7002]

Prints `READY {"address", "metrics_address", "fingerprint"}` once it serves. SIGTERM drains it: NOT_SERVING at once, running requests
are finished within --grace_s, exit 0. Other than loopback addresses take TLS (--tls_ca, --tls_cert, --tls_key), or --insecure.
"""

import asyncio

from absl import flags

from experiments import dataclass_flags
from prfaas_jax.engine.options import EngineOptions
from prfaas_jax.serving.decode_server import DecodeServer, DecodeServerOptions
from prfaas_jax.serving.process import run_main, serve

dataclass_flags.define(EngineOptions)
dataclass_flags.define(DecodeServerOptions)
flags.adopt_module_key_flags(dataclass_flags)
GRACE_S = flags.DEFINE_float("grace_s", 10.0, "seconds that running requests get after SIGTERM", lower_bound=0)


def main(argv: list[str]) -> None:
    """Flags to options, options to an engine, the engine to its server."""
    del argv
    engine_options, options = dataclass_flags.read(EngineOptions), dataclass_flags.read(DecodeServerOptions)
    # After the flags have been judged: what follows loads the accelerator stack and the weights.
    from configs.models import load_model_config
    from prfaas_jax.engine.build import build_decode
    from prfaas_jax.models.tokenizer import Tokenizer

    engine, loaded = build_decode(engine_options, load_model_config)
    tokenizer = Tokenizer.load(loaded.tokenizer_path) if loaded.tokenizer_path else None
    try:
        server = DecodeServer(engine, tokenizer, options, loaded.eos_ids)
        asyncio.run(serve(server, lambda: {**server.addresses, "fingerprint": server.fingerprint}, GRACE_S.value))
    finally:
        engine.close()


if __name__ == "__main__":
    run_main(main)
