"""The smallest disaggregated system: a prefill process and a decode process on loopback, and a batch of prompts through them."""

import concurrent.futures
import dataclasses
import pathlib
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Final

import grpc
import numpy as np

from prfaas_jax.engine.api import SamplingParams
from prfaas_jax.engine.offline import Completion
from prfaas_jax.engine.options import EngineOptions
from prfaas_jax.errors import PrfaasError
from prfaas_jax.serving import messages
from prfaas_jax.serving.launcher import Process, Processes, environment, module_command
from prfaas_jax.serving.proto import generation_pb2, generation_pb2_grpc
from prfaas_jax.transfer.channel import FRONT_CHANNEL_OPTIONS, PING_TIMEOUT_ENV
from prfaas_jax.transfer.security import open_channel

READY_S = 600.0
# On one machine a peer that answers late is busy (compiling, most often), not gone.
PATIENCE: Final[dict[str, str]] = {PING_TIMEOUT_ENV: "20"}

# Longer than one program of a hybrid takes to compile on a busy CPU: servers started without warm-up compile when first asked.
_IDLE_S = 120.0


class GenerateFailed(PrfaasError):
    """A server ended a Generate call with an error status."""

    def __init__(self, error: grpc.RpcError):
        super().__init__(f"{error.code().name}: {error.details()}")
        self.code = error.code()


def generate(
    address: str, prompts: Sequence[Sequence[int]], sampling: SamplingParams, placement: generation_pb2.Placement, timeout_s: float
) -> list[tuple[Completion, generation_pb2.Usage]]:
    """Sends all prompts at once to a Generation service and waits for all answers; no fallback, the model's own end tokens ignored.

    Raises GenerateFailed for the first call that ends with an error; the others are cancelled.
    """
    with open_channel(address, FRONT_CHANNEL_OPTIONS) as channel:
        stub = generation_pb2_grpc.GenerationStub(channel)
        calls = [stub.Generate(_request(prompt, sampling, placement), timeout=timeout_s) for prompt in prompts]
        with concurrent.futures.ThreadPoolExecutor(max(1, len(calls))) as pool:
            futures = [pool.submit(_read, call) for call in calls]
            try:
                return [future.result() for future in futures]
            finally:
                for call in calls:
                    call.cancel()


def _request(prompt: Sequence[int], sampling: SamplingParams, placement: generation_pb2.Placement) -> generation_pb2.GenerateRequest:
    return generation_pb2.GenerateRequest(
        token_ids=generation_pb2.TokenIds(ids=prompt),
        sampling=messages.sampling_to_proto(sampling),
        max_new_tokens=sampling.max_new_tokens,
        want_logits=sampling.return_logits,
        placement=placement,
        ignore_eos=True,
    )


def _read(call: grpc.Call) -> tuple[Completion, generation_pb2.Usage]:
    completion, logits, usage = Completion(), [], None
    try:
        for event in call:
            if event.HasField("usage"):
                usage = event.usage
            elif event.token.HasField("token"):
                token = messages.token_from_proto(event.token.token)
                completion.tokens.append(token.token)
                completion.logprobs.append(token.logprob)
                if token.logits is not None:
                    logits.append(token.logits)
    except grpc.RpcError as error:
        raise GenerateFailed(error) from error
    assert usage is not None  # an OK status without usage would break the service's contract
    completion.logits = np.stack(logits) if logits else None
    completion.finish_reason, completion.ttft_s = usage.finish_reason, usage.ttft_s
    completion.parts = {field.name: getattr(usage.parts, field.name) for field in usage.parts.DESCRIPTOR.fields}
    return completion, usage


def launch_server(processes: Processes, name: str, role: str, options: EngineOptions, **server: Any) -> Process:
    """Starts a "prefill" or "decode" server on a free loopback port, without waiting for it; `server` are fields of its own options."""
    flags = dataclasses.asdict(options) | ({"idle_s": _IDLE_S} if role == "decode" else {}) | server
    return processes.launch(name, module_command(f"experiments.serve_{role}", flags), environment() | PATIENCE)


class Pair:
    """Starts both processes, side by side, when the block is entered; ends them when it is left.

    Raises LaunchFailed, with the end of the log, when one does not come up.
    """

    def __init__(self, prefill: EngineOptions, decode: EngineOptions, log_dir: pathlib.Path):
        self._options = {"prefill": prefill, "decode": decode}
        self._processes = Processes(log_dir)
        self.servers: dict[str, Process] = {}

    def __enter__(self) -> "Pair":
        self._processes.__enter__()
        try:
            self.servers = {role: launch_server(self._processes, role, role, options) for role, options in self._options.items()}
            for server in self.servers.values():
                server.wait_ready(READY_S)
        except BaseException as error:
            self._processes.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._processes.__exit__(kind, error, trace)

    def address(self, role: str) -> str:
        """host:port of "prefill" or "decode"."""
        return self.servers[role].ready["address"]

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingParams, timeout_s: float = 600.0
    ) -> list[tuple[Completion, generation_pb2.Usage]]:
        """Every prompt prefilled remotely, decoded by the decode process."""
        remote = generation_pb2.Placement(prefill_address=self.address("prefill"), reason="always remote")
        return generate(self.address("decode"), prompts, sampling, remote, timeout_s)
