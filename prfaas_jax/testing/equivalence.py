"""Colocated against disaggregated: the same prompts through one engine and through two processes, compared logit by logit.

What is promised (float32): bit-equal logits where both sides run the same mesh, bucket shape and chunk grid; within `TOLERANCE`
elsewhere, with the same top-1 wherever the gap between the two best logits exceeds twice that.
"""

import dataclasses
import itertools
import pathlib
from collections.abc import Iterator, Sequence

import numpy as np
from tqdm import tqdm

from prfaas_jax.engine.api import SamplingParams
from prfaas_jax.engine.build import build_decode, ensure_cpu_devices
from prfaas_jax.engine.offline import Completion, complete
from prfaas_jax.engine.options import EngineOptions
from prfaas_jax.models.source import RandomConfig, read_config
from prfaas_jax.serving.launcher import Process, Processes
from prfaas_jax.serving.pair import READY_S, generate, launch_server
from prfaas_jax.serving.proto import generation_pb2

TOLERANCE = 1e-4
NEW_TOKENS = 6

PREFILL_MESHES = ("data:1,model:1", "data:1,model:2", "data:2,model:2")
DECODE_MESHES = ("data:1,model:1", "data:1,model:2")
PAGE_SIZES = (16, 64)


@dataclasses.dataclass(frozen=True)
class Layout:
    """One disaggregated system: a mesh and a page size on either side."""

    prefill_mesh: str
    decode_mesh: str
    prefill_page: int
    decode_page: int


# Every value meets every value of every other column.
PAIRWISE = tuple(
    Layout(PREFILL_MESHES[p], DECODE_MESHES[d], a, b)
    for p, d, a, b in ((0, 0, 64, 16), (0, 1, 16, 64), (1, 0, 16, 16), (1, 1, 64, 64), (2, 0, 64, 64), (2, 1, 16, 16))
)
FULL = tuple(
    Layout(*columns) for columns in itertools.product((*PREFILL_MESHES, "data:1,model:4"), DECODE_MESHES, PAGE_SIZES, PAGE_SIZES)
)


@dataclasses.dataclass(frozen=True)
class Case:
    """One prompt through one layout, alone or together with all the others; `error` is empty when it holds what is promised."""

    layout: Layout
    length: int
    together: bool
    bit_equal_promised: bool
    bit_equal: bool
    max_diff: float
    bytes_moved: int
    error: str


def lengths(chunk: int) -> list[int]:
    """Prompt lengths around every boundary: pages, the smallest bucket, the chunk."""
    return sorted({1, 15, 16, 17, 63, 64, 65, chunk - 1, chunk, chunk + 1, 3 * chunk + 5})


def compare(expected: Completion, got: Completion) -> tuple[float, bool, str]:
    """(largest logit difference, bit-equal, what is wrong or ""). After a tie broken differently the rest is not comparable."""
    assert expected.logits is not None and got.logits is not None
    worst, equal = 0.0, True
    for step, (a, b) in enumerate(zip(expected.logits, got.logits, strict=False)):
        worst = max(worst, float(np.abs(a - b).max()))
        equal = equal and np.array_equal(a, b)
        if not worst <= TOLERANCE:  # a NaN is not within it either
            return worst, False, f"logits of token {step} differ by {worst:.3g}"
        if expected.tokens[step] != got.tokens[step]:
            second, first = np.partition(a, -2)[-2:]
            tie = first - second <= 2 * TOLERANCE
            return worst, False, "" if tie else f"token {step} is {got.tokens[step]}, not {expected.tokens[step]}"
    if len(expected.tokens) != len(got.tokens):
        return worst, False, f"{len(got.tokens)} tokens, not {len(expected.tokens)}"
    return worst, equal, ""


class Matrix:
    """Runs the layouts of a matrix over one model, starting each server process once."""

    def __init__(self, checkpoint: str, chunk: int, log_dir: pathlib.Path, random_config: RandomConfig, seed: int = 0):
        self._random_config = random_config
        config = read_config(checkpoint, "float32", random_config)
        rng = np.random.default_rng(seed)
        self._prompts = [rng.integers(0, config.vocab_size, n).tolist() for n in lengths(chunk)]
        self._sampling = SamplingParams(max_new_tokens=NEW_TOKENS, return_logits=True)
        self._base = EngineOptions(
            checkpoint, dtype="float32", chunk=chunk, max_length=3 * chunk + 64, max_rows=8, max_prefill_rows=4, warmup=False
        )
        self._log_dir = log_dir

    def references(self) -> dict[str, list[Completion]]:
        """Mesh -> every prompt alone through one engine on it, with its own prefill."""
        ensure_cpu_devices(2)
        found = {}
        for mesh in tqdm(DECODE_MESHES, desc="colocated", unit="mesh"):
            engine, _ = build_decode(dataclasses.replace(self._base, mesh=mesh), self._random_config)
            try:
                found[mesh] = [complete(engine, [prompt], self._sampling)[0] for prompt in self._prompts]
            finally:
                engine.close()
        return found

    def run(self, layouts: Sequence[Layout]) -> Iterator[Case]:
        """Every prompt through every layout, alone and together with the others."""
        references = self.references()
        with Processes(self._log_dir) as processes:
            servers: dict[str, Process] = {}

            def server(role: str, mesh: str, page: int) -> Process:
                name = f"{role}-{mesh}-{page}".replace(":", "").replace(",", "-")
                if name not in servers:
                    servers[name] = launch_server(processes, name, role, dataclasses.replace(self._base, mesh=mesh, page_size=page))
                return servers[name]

            for layout in tqdm(layouts, desc="disaggregated", unit="layout"):
                pair = (
                    server("prefill", layout.prefill_mesh, layout.prefill_page),
                    server("decode", layout.decode_mesh, layout.decode_page),
                )
                for process in pair:
                    process.wait_ready(READY_S)
                prefill, decode = (process.ready["address"] for process in pair)
                yield from self._layout(layout, prefill, decode, references)

    def _layout(self, layout: Layout, prefill: str, decode: str, references: dict[str, list[Completion]]) -> Iterator[Case]:
        remote = generation_pb2.Placement(prefill_address=prefill, reason="equivalence")
        alone = [generate(decode, [prompt], self._sampling, remote, READY_S)[0] for prompt in self._prompts]
        together = generate(decode, self._prompts, self._sampling, remote, READY_S)
        same_mesh = layout.prefill_mesh == layout.decode_mesh
        reference = references[layout.decode_mesh if same_mesh else DECODE_MESHES[0]]
        for is_together, answers in ((False, alone), (True, together)):
            for prompt, expected, (completion, usage) in zip(self._prompts, reference, answers, strict=True):
                promised = same_mesh and not is_together
                worst, equal, error = compare(expected, completion)
                if promised and not equal:
                    error = error or f"logits are not bit-equal (largest difference {worst:.3g})"
                if usage.kv_bytes_moved != usage.kv_bytes_expected or not usage.kv_bytes_moved:
                    error = f"{usage.kv_bytes_moved} bytes moved, {usage.kv_bytes_expected} expected"
                if usage.tokens_recomputed or usage.placement != "remote":
                    error = f"placement {usage.placement}, {usage.tokens_recomputed} tokens recomputed"
                yield Case(layout, len(prompt), is_together, promised, equal, worst, usage.kv_bytes_moved, error)
