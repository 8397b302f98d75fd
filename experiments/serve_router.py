"""The router: takes Generate calls, decides where each prompt is prefilled, forwards to a decode server.

    python -m experiments.serve_router --decode=127.0.0.1:7002 --prefill=127.0.0.1:7001 --policy=threshold --threshold_tokens=512

Prints `READY {"address", "policy"}` once it serves. Other than loopback addresses take TLS (--tls_ca, --tls_cert, --tls_key), or
--insecure.
"""

import asyncio
from typing import Any

from absl import flags

from experiments import dataclass_flags
from prfaas_jax.scheduling.policies import make_policy
from prfaas_jax.serving.process import run_main, serve
from prfaas_jax.serving.router import Router, RouterOptions

dataclass_flags.define(RouterOptions)
flags.adopt_module_key_flags(dataclass_flags)
POLICY = flags.DEFINE_enum("policy", "threshold", ["always_local", "always_remote", "threshold"], "who decides where a prompt is prefilled")
THRESHOLD_TOKENS = flags.DEFINE_integer("threshold_tokens", 512, "policy threshold: longer prompts go remote", lower_bound=0)
TOKENIZER = flags.DEFINE_string("tokenizer", None, "directory or GGUF file with the tokenizer; without it prompts must be token ids")
GRACE_S = flags.DEFINE_float("grace_s", 10.0, "seconds that running requests get after SIGTERM", lower_bound=0)


def main(argv: list[str]) -> None:
    """Flags to options, a policy and a tokenizer, and those to the router."""
    del argv
    options = dataclass_flags.read(RouterOptions)
    params = {"tokens": THRESHOLD_TOKENS.value} if POLICY.value == "threshold" else {}
    policy = make_policy(POLICY.value, **params)
    tokenizer = None
    if TOKENIZER.value is not None:
        # Only here: it needs the optional `tokenizers` package.
        from prfaas_jax.models.tokenizer import Tokenizer

        tokenizer = Tokenizer.load(TOKENIZER.value)
    asyncio.run(_serve(Router(policy, tokenizer, options)))


async def _serve(router: Router) -> None:
    def describe() -> dict[str, Any]:
        return {"address": router.address, "policy": POLICY.value}

    await serve(router, describe, GRACE_S.value)


if __name__ == "__main__":
    run_main(main)
