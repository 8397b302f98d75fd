"""A PD server: prefills or decodes, one at a time, and changes its role when a router's controller says so.

    python -m experiments.serve_pd --checkpoint=DIR --role=decode [--address=127.0.0.1:7003] [--decode_address=127.0.0.1:7004]

One set of weights, both engines compiled and with pools of their own. Flags of the prefill server have their own names, those of the decode
server the prefix decode_. Prints `READY {"prefill": {"address", "lane_addresses"}, "decode": {"address"}, "fingerprint"}` once it serves.
SIGTERM drains it. Other than loopback addresses take TLS (--tls_ca, ..; --decode_tls_ca, ..), or --insecure.
"""

import asyncio

from absl import flags

from experiments import dataclass_flags
from prfaas_jax.engine.options import EngineOptions
from prfaas_jax.serving.decode_server import DecodeServerOptions
from prfaas_jax.serving.pd_server import PdRole, PdServer
from prfaas_jax.serving.prefill_server import PrefillServerOptions
from prfaas_jax.serving.process import run_main, serve

dataclass_flags.define(EngineOptions)
dataclass_flags.define(PrefillServerOptions)
dataclass_flags.define(DecodeServerOptions, "decode_")
flags.adopt_module_key_flags(dataclass_flags)
ROLE = flags.DEFINE_enum("role", "decode", ["prefill", "decode"], "what it does at first")
GRACE_S = flags.DEFINE_float("grace_s", 10.0, "seconds that running work gets after SIGTERM", lower_bound=0)


def main(argv: list[str]) -> None:
    """Flags to options, options to both engines, the engines to their servers."""
    del argv
    engine_options, prefill_options = dataclass_flags.read(EngineOptions), dataclass_flags.read(PrefillServerOptions)
    decode_options = dataclass_flags.read(DecodeServerOptions, "decode_")
    # After the flags have been judged: what follows loads the accelerator stack and the weights.
    from configs.models import load_model_config
    from prfaas_jax.engine.build import build_pd
    from prfaas_jax.models.tokenizer import Tokenizer

    prefill, decode, loaded = build_pd(engine_options, load_model_config)
    tokenizer = Tokenizer.load(loaded.tokenizer_path) if loaded.tokenizer_path else None
    try:
        role: PdRole = "prefill" if ROLE.value == "prefill" else "decode"
        server = PdServer(role, (prefill, prefill_options), (decode, decode_options), tokenizer, loaded.eos_ids)
        asyncio.run(serve(server, server.describe, GRACE_S.value))
    finally:
        prefill.close()
        decode.close()


if __name__ == "__main__":
    run_main(main)
