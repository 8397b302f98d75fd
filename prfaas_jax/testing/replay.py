"""A load generator: sends a script's requests when they are due, whatever the answers take, and writes down what came of each.

    python -m prfaas_jax.testing.replay

in a process of its own, so that it shares an interpreter with nothing that it measures. `ReplayProcess` starts it: one JSON line on stdin
names the script and the file for its rows; on stdout come {"ready"}, {"began", "of"}, {"done"} now and then, and at last {"finished",
"late_p99_s", "late_max_s"}. The end of stdin ends it.

Open loop: an arrival is never held back by the answers before it. A prompt is made before it is due, so what is late is the machine.
"""

import asyncio
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc
import msgspec
import numpy as np
from tqdm import tqdm

from prfaas_jax.errors import PrfaasError
from prfaas_jax.results import to_json
from prfaas_jax.serving.client import Answer, Client
from prfaas_jax.serving.launcher import environment, module_command
from prfaas_jax.serving.proto import generation_pb2
from prfaas_jax.serving.report import PARTS
from prfaas_jax.testing.json_child import JsonChild
from prfaas_jax.testing.profiled import digest_token, prompt_digest
from prfaas_jax.testing.replay_script import Ask, Row, Script, prompt_of
from prfaas_jax.transfer.security import Security

# The first arrival is due so long after all is ready.
_LEAD_S = 0.2
_REPORT_S = 0.5
# Beyond the time that a request may take.
_SLACK_S = 60.0


class ReplayInvalid(PrfaasError):
    """The load generator could not keep up: what it measured is not what the script says."""


class Replay:
    """One replay, on the event loop that runs it.

    Attributes:
        rows: of every request of the script, in its order; filled as they end.
        late_s: wall seconds that each was sent late.
        began: monotonic second that is the script's 0.
        ended: requests that are over.
    """

    def __init__(self, script: Script, client: Client):
        self._script, self._client = script, client
        self.rows = [Row(a.number, a.tenant, a.tokens, a.new_tokens, a.time_s) for a in script.asks]
        self.late_s: list[float] = []
        self.began = 0.0
        self.ended = 0
        self._heard: dict[int, int] = {}  # digests of the answers, where they are to be asked again

    async def run(self, began: Callable[[float], None] = lambda at: None) -> None:
        """Sends every request and waits for all answers; `began` is told the moment when the clock starts."""
        script = self._script
        self.began = time.monotonic() + _LEAD_S
        began(self.began)
        async with asyncio.TaskGroup() as tasks:
            for ask, row in zip(script.asks, self.rows, strict=True):
                request, digest = self._request(ask)
                due = self.began + ask.time_s / script.time_scale
                # At least once per request, so that answers are read however late it is.
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                sent = time.monotonic()
                self.late_s.append(sent - due)
                row.sent_s = self._model_s(sent)
                tasks.create_task(self._ask(request, digest, row))
        for ask, row in [(a, r) for a, r in zip(script.asks, self.rows, strict=True) if r.done][: script.recheck]:
            request, digest = self._request(ask)
            again = await self._client.generate(request, script.timeout_s)
            row.wrong = row.wrong or prompt_digest(again.tokens) != self._heard[row.number]

    def _request(self, ask: Ask) -> tuple[generation_pb2.GenerateRequest, int]:
        prompt: list[int] = prompt_of(self._script, ask).tolist()
        request = generation_pb2.GenerateRequest(
            token_ids=generation_pb2.TokenIds(ids=prompt),
            max_new_tokens=ask.new_tokens,
            ignore_eos=True,
            allow_fallback=True,
            tenant=ask.tenant,
        )
        return request, prompt_digest(prompt)

    async def _ask(self, request: generation_pb2.GenerateRequest, digest: int, row: Row) -> None:
        answer = Answer()
        try:
            async for _ in self._client.stream(request, self._script.timeout_s, answer):
                pass
        except grpc.RpcError as error:
            row.error = error.code().name
        self.ended += 1
        self._fill(row, answer)
        if self._script.check and row.done:
            row.wrong = not self._drawn(digest, answer.tokens)
        if self._script.recheck:
            self._heard[row.number] = prompt_digest(answer.tokens)

    def _fill(self, row: Row, answer: Answer) -> None:
        row.received, row.returns = len(answer.tokens), answer.returns
        if answer.first_s is not None and answer.last_s is not None:
            row.first_s, row.done_s = self._model_s(answer.first_s), self._model_s(answer.last_s)
        usage = answer.usage
        if usage is None:
            return
        row.placement, row.prefill, row.decode, row.reason = usage.placement, usage.prefill_cluster, usage.decode_cluster, usage.reason
        row.parts = {name: getattr(usage.parts, name) * self._script.time_scale for name in PARTS}
        row.kv_moved, row.kv_skipped, row.kv_resent = usage.kv_bytes_moved, usage.kv_bytes_skipped, usage.kv_bytes_resent
        row.kv_expected, row.recomputed = usage.kv_bytes_expected, usage.tokens_recomputed
        row.fallbacks, row.resumes, row.attempts = usage.fallbacks, usage.resumes, usage.attempts

    def _model_s(self, at: float) -> float:
        return (at - self.began) * self._script.time_scale

    def _drawn(self, digest: int, tokens: list[int]) -> bool:
        """Whether a profiled engine draws these tokens after a prompt of this digest."""
        for token in tokens:
            if token != digest_token(digest, self._script.vocab_size).token:
                return False
            digest = prompt_digest((token,), digest)
        return True


class ReplayProcess:
    """The load generator as a child; use it as a context manager.

    Attributes:
        process: its pid is `process.pid`.
        began: monotonic second of the script's 0, once `start` has returned.
    """

    def __init__(self, label: str = "replay"):
        """Starts nothing yet; `label` is what the progress bar says."""
        self._label = label
        self.process = JsonChild(label, module_command("prfaas_jax.testing.replay", {}), environment(moves_kv=False), _SLACK_S)
        self.began = 0.0
        self._script: Script | None = None
        self._rows = ""

    def __enter__(self) -> Self:
        self.process.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.process.__exit__(kind, error, trace)

    def start(self, script: Script, script_path: str, rows_path: str) -> float:
        """Hands the script over and returns `began`; files of that name are written."""
        Path(script_path).write_bytes(msgspec.json.encode(script))
        self._script, self._rows = script, rows_path
        self.process.tell({"script": script_path, "rows": rows_path})
        self.began = self.process.answer(_SLACK_S)["began"]
        return self.began

    def wait(self) -> tuple[list[Row], dict[str, Any]]:
        """The rows, and what the generator says of itself, once all requests are over; a progress bar meanwhile.

        Raises:
            ReplayInvalid: it sent too late.
            ChildFailed: it ended before its time.
        """
        assert self._script is not None  # start
        with tqdm(total=len(self._script.asks), desc=self._label, unit="request", disable=None) as bar:
            while "finished" not in (said := self.process.answer(self._script.timeout_s + _SLACK_S)):
                bar.update(said["done"] - bar.n)
            bar.update(said["finished"] - bar.n)
        late_s = said["late_p99_s"]
        if late_s > self._script.late_s:
            raise ReplayInvalid(
                f"INVALID: {self._label}: a percent of the requests were sent {late_s:.3f} s late or more (at most {self._script.late_s} "
                "s): this machine cannot keep up; a smaller time_scale or a smaller load may help"
            )
        return msgspec.json.decode(Path(self._rows).read_bytes(), type=list[Row]), said


def _say(**fields: Any) -> None:
    print(to_json(fields), flush=True)


async def _replay(script: Script, rows: str) -> None:
    async with Client(script.routers, Security(**script.security)) as client:
        replay = Replay(script, client)
        running = asyncio.create_task(replay.run(lambda at: _say(began=at)))
        try:
            while not running.done():
                await asyncio.wait({running}, timeout=_REPORT_S)
                _say(done=replay.ended)
        finally:
            running.cancel()
        await running
    Path(rows).write_bytes(msgspec.json.encode(replay.rows))
    _say(finished=replay.ended, late_p99_s=float(np.percentile(replay.late_s, 99)), late_max_s=max(replay.late_s))


def _end_with_stdin() -> None:
    while os.read(0, 1):
        pass
    os._exit(1)  # whoever wanted the rows is gone


def main() -> None:
    """Replays one script."""
    _say(ready=True)
    line = sys.stdin.buffer.readline()
    if not line:
        return
    asked = json.loads(line)
    threading.Thread(target=_end_with_stdin, name="stdin", daemon=True).start()
    script = msgspec.json.decode(Path(asked["script"]).read_bytes(), type=Script)
    asyncio.run(_replay(script, asked["rows"]))


if __name__ == "__main__":
    main()
