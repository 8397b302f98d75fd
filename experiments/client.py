"""Sends one prompt to a router or decode server, streams the answer, prints what it cost.

    python -m experiments.client --address=127.0.0.1:7000 --prompt="What is a KV cache?" --max_new_tokens=64
    python -m experiments.client --address=127.0.0.1:7000 --prompt_tokens=ids.json --temperature=0.7 --seed=3 --trace=trace.json

Text goes out as a chat message of the user, or as it is with --nochat. The last line of stdout is one JSON object: text, tokens, usage.
"""

import json
import pathlib
import sys

import grpc
from absl import flags

from experiments import dataclass_flags
from prfaas_jax.engine.inputs import read_prompts
from prfaas_jax.errors import InvalidInput
from prfaas_jax.results import headline
from prfaas_jax.serving.process import run_main
from prfaas_jax.serving.proto import common_pb2, generation_pb2, generation_pb2_grpc
from prfaas_jax.serving.report import usage_dict, usage_table
from prfaas_jax.serving.trace import Traced, write_requests
from prfaas_jax.transfer.channel import FRONT_CHANNEL_OPTIONS
from prfaas_jax.transfer.endpoint import parse_address
from prfaas_jax.transfer.security import Security, open_channel

dataclass_flags.define(Security)
flags.adopt_module_key_flags(dataclass_flags)

ADDRESS = flags.DEFINE_string("address", None, "host:port of a router or decode server", required=True)
PROMPT = flags.DEFINE_string("prompt", None, "the prompt itself")
PROMPT_FILE = flags.DEFINE_string("prompt_file", None, "UTF-8 text file with the prompt")
PROMPT_TOKENS = flags.DEFINE_string("prompt_tokens", None, "JSON file with one list of token ids in a list")
CHAT = flags.DEFINE_boolean("chat", True, "send text as a chat message, in the model's chat template")
SYSTEM = flags.DEFINE_string("system", None, "system message of the chat")
MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 128, "most tokens to generate", lower_bound=1)
TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 is greedy")
TOP_K = flags.DEFINE_integer("top_k", 0, "keep the k likeliest tokens; 0 keeps all")
TOP_P = flags.DEFINE_float("top_p", 1.0, "keep the likeliest tokens up to this mass")
SEED = flags.DEFINE_integer("seed", 0, "the same seed gives the same sample wherever it is computed")
STOP = flags.DEFINE_multi_string("stop", [], "end before this text; may be repeated")
STOP_TOKEN_IDS = flags.DEFINE_multi_integer("stop_token_id", [], "end after this token; may be repeated")
IGNORE_EOS = flags.DEFINE_boolean("ignore_eos", False, "go on after the model's own end tokens")
PREFILL = flags.DEFINE_string("prefill", None, "decode server only: prefill at this prefill server; a router decides itself")
FALLBACK = flags.DEFINE_boolean("allow_fallback", True, "when a remote prefill fails: prefill in the decode server, and say so")
TRACE = flags.DEFINE_string("trace", None, "file for the request's timeline across both sites, which ui.perfetto.dev opens")
TIMEOUT_S = flags.DEFINE_float("timeout_s", 300.0, "deadline of the request", lower_bound=0.001)

ERROR_EXIT = 1


def _request() -> generation_pb2.GenerateRequest:
    given = [flag.name for flag in (PROMPT, PROMPT_FILE, PROMPT_TOKENS) if flag.value is not None]
    if len(given) != 1:
        raise InvalidInput("prompt", given, "exactly one of --prompt, --prompt_file, --prompt_tokens")
    request = generation_pb2.GenerateRequest(
        max_new_tokens=MAX_NEW_TOKENS.value,
        stop_strings=STOP.value,
        allow_fallback=FALLBACK.value,
        ignore_eos=IGNORE_EOS.value,
        sampling=common_pb2.Sampling(
            temperature=TEMPERATURE.value,
            top_k=TOP_K.value,
            top_p=TOP_P.value,
            seed=SEED.value,
            stop_token_ids=STOP_TOKEN_IDS.value,
        ),
    )
    if PREFILL.value is not None:
        parse_address("prefill", PREFILL.value)
        request.placement.prefill_address, request.placement.reason = PREFILL.value, "asked for by the client"
    if PROMPT_TOKENS.value is not None:
        prompts = read_prompts(PROMPT_TOKENS.value)
        if len(prompts) != 1:
            raise InvalidInput("prompt_tokens", PROMPT_TOKENS.value, f"a file with one prompt; this one has {len(prompts)}")
        request.token_ids.ids[:] = prompts[0]
        return request
    text = PROMPT.value if PROMPT.value is not None else _read_text(PROMPT_FILE.value)
    if not CHAT.value:
        request.text = text
        return request
    if SYSTEM.value is not None:
        request.chat.messages.add(role="system", content=SYSTEM.value)
    request.chat.messages.add(role="user", content=text)
    return request


def _read_text(path: str | None) -> str:
    try:
        return pathlib.Path(path or "").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput("prompt_file", path, f"a readable UTF-8 file ({error})") from error


def main(argv: list[str]) -> None:
    """One call; tokens to stdout as they come."""
    del argv
    parse_address("address", ADDRESS.value)
    if TRACE.value is not None and not pathlib.Path(TRACE.value).parent.is_dir():
        raise InvalidInput("trace", TRACE.value, "a file in a folder that exists")
    security = dataclass_flags.read(Security)
    request = _request()
    text, tokens, usage = "", [], generation_pb2.Usage()
    with open_channel(ADDRESS.value, FRONT_CHANNEL_OPTIONS, security) as channel:
        try:
            for event in generation_pb2_grpc.GenerationStub(channel).Generate(request, timeout=TIMEOUT_S.value):
                if event.HasField("usage"):
                    usage = event.usage
                    continue
                if event.token.HasField("token"):
                    tokens.append(event.token.token.id)
                text += event.token.text
                print(event.token.text, end="", flush=True)
        except grpc.RpcError as error:
            print(f"\nerror: {error.code().name}: {error.details()}", file=sys.stderr)
            sys.exit(ERROR_EXIT)
    if not text:
        print(json.dumps(tokens), end="")
    if TRACE.value is not None:
        write_requests(pathlib.Path(TRACE.value), [Traced("request", usage)])
    print(f"\n\n{usage_table(usage)}\n")
    headline({"text": text, "tokens": tokens, "usage": usage_dict(usage)})


if __name__ == "__main__":
    run_main(main)
