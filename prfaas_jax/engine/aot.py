"""Compiles the prefill and decode steps for accelerators that are not here and says what can be known without running them.

Everything reported is "compiled, not run": bytes and collectives are facts of the compiled program, seconds are lower bounds. The prefill
step is compiled as one program here; the engine of a model with states runs the same layers in several (engine/steps.py).
"""

import contextlib
import dataclasses
import math
import re
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import jax
from jax.experimental import topologies

from prfaas_jax.engine import hlo
from prfaas_jax.engine.flops import Spread, Work, cache_bytes, island_flops, unread_parameter_bytes
from prfaas_jax.engine.options import EngineOptions
from prfaas_jax.engine.plan import plan_decode, plan_prefill
from prfaas_jax.engine.runner import choose_implementations, pool_geometry
from prfaas_jax.engine.steps import Steps
from prfaas_jax.engine.targets import GPU_TARGET_CONFIG, Chip, Target
from prfaas_jax.errors import InvalidInput
from prfaas_jax.kvcache.pools import pool_shapes, pool_shardings
from prfaas_jax.kvcache.spec import DTYPE_BYTES, cache_spec
from prfaas_jax.models.config import ModelConfig
from prfaas_jax.models.params import flat_names
from prfaas_jax.models.transformer import ISLAND
from prfaas_jax.sharding import MeshSpec, check_divides, make_mesh

StepName = Literal["prefill", "decode"]
STEPS: tuple[StepName, ...] = ("prefill", "decode")
LABEL = "compiled, not run"


@dataclasses.dataclass(frozen=True)
class Deployment:
    """A model on a mesh of chips, with the options of the engine that is to run there.

    `options.max_length` is the context: decode rows have that many tokens cached, prefill computes the last chunk of a prompt of
    that length, one row per data shard.
    """

    config: ModelConfig
    options: EngineOptions
    chip: Chip
    platform: str
    devices: tuple[Any, ...]

    def __post_init__(self) -> None:
        mesh, options = self.mesh, self.options
        if mesh.size != len(self.devices):
            raise InvalidInput("mesh", str(mesh), f"a product of {len(self.devices)}, the number of chips of the target")
        check_divides(self.config.axis_sizes(), mesh, options.attention)
        if options.max_length > self.config.max_position:
            raise InvalidInput("context", options.max_length, f"at most max_position={self.config.max_position} of {self.config.name}")
        if options.max_rows % mesh.data:
            raise InvalidInput("batch", options.max_rows, f"a multiple of the mesh's data axis ({mesh.data})")
        if options.chunk > options.max_length:
            raise InvalidInput("chunk", options.chunk, f"at most the context ({options.max_length})")

    @property
    def mesh(self) -> MeshSpec:
        """The mesh that the chips form."""
        return MeshSpec.parse(self.options.mesh)

    @property
    def spread(self) -> Spread:
        """How the mesh divides the work."""
        mesh = self.mesh
        return Spread(mesh.data, mesh.tensor, mesh.tensor if self.options.attention == "sharded" else 1)

    def work(self, step: StepName) -> Work:
        """What the step that is compiled computes."""
        options, rows = self.options, self.rows(step)
        if step == "prefill":
            return Work.prefill(rows, options.chunk, options.max_length)
        return Work.decoding(rows, options.max_length)

    def activation_bytes(self, step: StepName) -> int:
        """Bytes of the residual stream of one data shard's tokens."""
        work = self.work(step)
        return work.rows * work.tokens // self.mesh.data * self.config.hidden_size * DTYPE_BYTES[self.config.dtype]

    def steps(self) -> Steps:
        """The programs, over devices that exist only as a description."""
        options, mesh = self.options, self.mesh
        geometry = pool_geometry(cache_spec(self.config), options, mesh.data)
        implementations = choose_implementations(self.config, options, self.platform)
        return Steps(self.config, make_mesh(mesh, self.devices), options.attention, geometry, implementations)

    def rows(self, step: StepName) -> int:
        """Rows of the step that is compiled."""
        return self.mesh.data if step == "prefill" else self.options.max_rows


def deployment(config: ModelConfig, target: Target, options: EngineOptions) -> Deployment:
    """A deployment on the described topology. Raises InvalidInput when the compiler is missing or something does not fit."""
    target.check_installed()
    if MeshSpec.parse(options.mesh).size != target.chips:
        raise InvalidInput("mesh", options.mesh, f"a product of {target.chips}, the number of chips of {target}")
    try:
        if target.kind == "gpu":
            described = topologies.get_topology_desc(
                target.chip_name, platform="cuda", target_config=GPU_TARGET_CONFIG[target.chip_name], topology=target.topology
            )
        else:
            described = topologies.get_topology_desc(f"{target.chip_name}:{target.topology}", platform="tpu")
    except jax.errors.JaxRuntimeError as error:
        raise InvalidInput("target", str(target), f"a topology that the compiler knows ({str(error).splitlines()[0]})") from error
    return Deployment(config, options, target.chip, target.platform, tuple(described.devices))


@dataclasses.dataclass(frozen=True)
class StepReport:
    """What one compiled step needs per chip.

    Attributes:
        bytes_per_chip: parameters, pools, plan, padding (what the compiler's layouts of these add), temporaries, outputs (those that no
            argument is reused for), code, total.
        fits: whether the total is within the chip's memory; `over_bytes` by how much it is not.
        aliased_bytes: argument bytes that the outputs reuse: the pools, when donation works.
        pool_copies: operations that write a pool-sized buffer anywhere else than in place.
        weights_copied_bytes: written per step by operations that copy large weights, whole or layer by layer, because a product cannot read
            them as they lie. Not part of `hbm_bytes_per_chip`.
        collectives: kind -> {per_layer (inside the body's scan, per body layer), outside (of that scan: head and tail layers, embedding,
            output head, sampling), outside_large (of these, what moves at least half of a layer's activations), per_step, bytes (payload
            per step), link_bytes (sent per chip and step), largest_bytes}; on the path that samples greedily. "reduce-scatter in a
            ring" is one that TPU runs as permutes between partial matmuls.
        sampling_collectives: the same for the branch that draws with a temperature, which comes on top.
        kernels: name -> executions per step.
        flops_per_chip: multiplications found in the program, plus `island_flops_per_chip` by formula (engine/flops.py), kind by kind.
        hbm_bytes_per_chip: the least that must be read and written: parameters (of experts, those that the step's tokens can reach),
            cached context, new KV and states, logits.
        bytes_accessed_xla: the compiler's figure, scanned bodies counted once; None on GPU.
        roofline_s: the largest of `bounds_s`: flops / peak, bytes / bandwidth, link bytes / links.
        compile_s: seconds that tracing and compiling took.
    """

    step: StepName
    rows: int
    tokens: int
    bytes_per_chip: dict[str, int]
    fits: bool
    over_bytes: int
    aliased_bytes: int
    pool_copies: list[str]
    weights_copied_bytes: int
    collectives: dict[str, dict[str, float]]
    sampling_collectives: dict[str, dict[str, float]]
    kernels: dict[str, int]
    flops_per_chip: float
    island_flops_per_chip: dict[str, float]
    hbm_bytes_per_chip: float
    bytes_accessed_xla: float | None
    bounds_s: dict[str, float]
    roofline_s: float
    compile_s: float
    label: str = LABEL


@dataclasses.dataclass(frozen=True)
class DoesNotFit:
    """A step that its compiler refused because memory is too small; `message` is the compiler's.

    `over_bytes` counts what is held between steps; temporaries, which would come on top, are not known.
    """

    step: StepName
    bytes_per_chip: dict[str, int]
    over_bytes: int
    message: str
    fits: bool = False
    label: str = LABEL


def compile_step(deployed: Deployment, step: StepName) -> StepReport | DoesNotFit:
    """Compiles one step and reads everything that can be known of it."""
    started = time.monotonic()
    program = lower_step(deployed, step)
    try:
        with _names_of_this_program():
            compiled = program.lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        used = re.search(r"Used .*? of .*? hbm.*", str(error))
        over = max(0, sum(program.held.values()) - int(deployed.chip.hbm_bytes))
        return DoesNotFit(step, program.held, over, used[0].strip() if used else str(error).splitlines()[0])
    return _report(deployed, step, program, compiled, time.monotonic() - started)


class Lowered(NamedTuple):
    """A step before compilation.

    `held` are bytes per chip of its arguments, `pools` (elements, dtype) of each pool's shard, `weights` those of large parameters and of
    one layer's slice of them.
    """

    lowered: Any
    held: dict[str, int]
    pools: tuple[tuple[int, str], ...]
    weights: tuple[tuple[int, str], ...]


def lower_step(deployed: Deployment, step: StepName) -> Lowered:
    """Traces one step for the deployment's platform."""
    steps = deployed.steps()
    shard = steps.sharders["decode"]
    pools = pool_shapes(steps.spec, steps.geometry, shard)
    placed = jax.tree.leaves(pool_shardings(steps.spec, shard))
    shards = [(math.prod(where.shard_shape(pool.shape)), pool.dtype) for where, pool in zip(placed, jax.tree.leaves(pools), strict=True)]
    rows, width = deployed.rows(step), steps.geometry.width
    plan: Any = plan_prefill([], rows, deployed.options.chunk, width) if step == "prefill" else plan_decode([], rows, width)
    plan = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), plan)
    held = {
        "parameters": _shard_bytes(steps.abstract_params, steps.params_shardings),
        "pools": sum(size * dtype.itemsize for size, dtype in shards),
        "plan": sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(plan)) // deployed.mesh.data,
    }
    fn: Any = steps.prefill if step == "prefill" else steps.decode
    lowered = fn.trace(steps.abstract_params, pools, plan).lower(lowering_platforms=(deployed.platform,))
    weights = tuple(_large_weights(steps.abstract_params, steps.params_shardings))
    return Lowered(lowered, held, tuple((size, hlo.DTYPES[dtype.name]) for size, dtype in shards), weights)


# A weight smaller than this is no burden, and may look like an activation.
_LARGE_WEIGHT_BYTES = 16 << 20


def _large_weights(params: Any, shardings: Any) -> Iterator[tuple[int, str]]:
    """(elements, dtype) of one chip's shard of every large weight of the layers, and of one layer of those that are stacked."""
    placed = flat_names(shardings)
    for name, leaf in flat_names(params).items():
        shape = placed[name].get_value().shard_shape(leaf.shape)
        layers = shape[0] if name.startswith("body/") else 1
        size = math.prod(shape) // layers
        if name.startswith(("head/", "body/", "tail/")) and size * leaf.dtype.itemsize >= _LARGE_WEIGHT_BYTES:
            yield from {(size, hlo.DTYPES[leaf.dtype.name]), (size * layers, hlo.DTYPES[leaf.dtype.name])}


@contextlib.contextmanager
def _names_of_this_program() -> Iterator[None]:
    """A program from the persistent cache may carry the op names of an older source; here the names are read, so they are in the key."""
    option = "jax_compilation_cache_include_metadata_in_key"
    before = jax.config.values[option]
    jax.config.update(option, True)
    try:
        yield
    finally:
        jax.config.update(option, before)


def _shard_bytes(params: Any, shardings: Any) -> int:
    """Bytes of one chip's shard of the parameters."""
    placed = flat_names(shardings)
    return sum(
        math.prod(placed[name].get_value().shard_shape(leaf.shape)) * leaf.dtype.itemsize for name, leaf in flat_names(params).items()
    )


def _report(deployed: Deployment, step: StepName, program: Lowered, compiled: Any, seconds: float) -> StepReport:
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
    module = hlo.Module(compiled.as_text())
    arguments, aliased = int(memory.argument_size_in_bytes), int(memory.alias_size_in_bytes)
    bytes_per_chip = {
        **program.held,
        "padding": max(0, arguments - sum(program.held.values())),  # unused arguments are dropped
        "temporaries": int(memory.temp_size_in_bytes),
        "outputs": int(memory.output_size_in_bytes) - aliased,
        "code": int(memory.generated_code_size_in_bytes),
    }
    bytes_per_chip["total"] = sum(bytes_per_chip.values())
    config, chip, work = deployed.config, deployed.chip, deployed.work(step)
    pattern = config.pattern
    body = hlo.longest_loop(module, pattern.repeats) if pattern.repeats else None
    activations = deployed.activation_bytes(step)
    collectives = _summary(module, body, pattern.body_layers, activations // 2, conditional=False)
    islands = island_flops(config, work, deployed.spread)
    # What runs on each device by itself comes from formulas: kernels hide it, and its loops follow the data.
    flops = hlo.dot_flops(module, skip=lambda op_name: ISLAND in op_name.split("/")) + sum(islands.values())
    logits = 4 * work.rows * config.vocab_size / deployed.mesh.size
    moved = program.held["parameters"] - unread_parameter_bytes(config, work, deployed.spread)
    moved += cache_bytes(config, work, deployed.spread) + logits
    bounds = {
        "compute": flops / chip.peak_flops(config.dtype),
        "memory": moved / chip.hbm_bandwidth,
        "interconnect": sum(c["link_bytes"] for c in collectives.values()) / chip.link_bandwidth,
    }
    return StepReport(
        step=step,
        rows=work.rows,
        tokens=work.rows * work.tokens,
        bytes_per_chip=bytes_per_chip,
        fits=bytes_per_chip["total"] <= chip.hbm_bytes,
        over_bytes=max(0, bytes_per_chip["total"] - int(chip.hbm_bytes)),
        aliased_bytes=aliased,
        pool_copies=[found for pool in dict.fromkeys(program.pools) for found in hlo.copies_of(module, *pool)],
        weights_copied_bytes=hlo.copied_bytes(module, set(program.weights)),
        collectives=collectives,
        sampling_collectives=_summary(module, body, pattern.body_layers, activations // 2, conditional=True),
        kernels=hlo.kernels(module),
        flops_per_chip=flops,
        island_flops_per_chip=islands,
        hbm_bytes_per_chip=moved,
        bytes_accessed_xla=cost.get("bytes accessed"),
        bounds_s=bounds,
        roofline_s=max(bounds.values()),
        compile_s=seconds,
    )


def _summary(module: hlo.Module, body: str | None, body_layers: int, large: int, conditional: bool) -> dict[str, dict[str, float]]:
    """Counts and bytes by kind; `body` is the loop over the pattern's repeats, `large` the payload from which on one is large."""
    fields = ("per_layer", "outside", "outside_large", "per_step", "bytes", "link_bytes", "largest_bytes")
    kinds: dict[str, dict[str, float]] = {}

    def add(kind: str, e: hlo.Executed, payload: float, link_bytes: float, is_large: bool) -> None:
        if e.conditional != conditional:
            return
        entry = kinds.setdefault(kind, dict.fromkeys(fields, 0))
        if body is not None and e.loops[:1] == (body,):
            entry["per_layer"] += e.times
        else:
            entry["outside"] += e.times
            entry["outside_large"] += e.times * is_large
        entry["per_step"] += e.times
        entry["bytes"] += e.times * payload
        entry["link_bytes"] += e.times * link_bytes
        entry["largest_bytes"] = max(payload, entry["largest_bytes"])

    for c in hlo.collectives(module):
        add(c.kind, c.executed, c.payload, c.link_bytes, c.payload >= large)
    for kind, loop in hlo.windowed(module):
        add(f"{kind} in a ring", loop, 0, 0, True)
    for entry in kinds.values():
        entry["per_layer"] /= max(1, body_layers)
    return dict(sorted(kinds.items()))


def compile_steps(deployed: Deployment, progress: Callable[[str], None] = lambda text: None) -> dict[StepName, StepReport | DoesNotFit]:
    """Both steps, prefill first; `progress` hears what is about to be compiled."""
    reports: dict[StepName, StepReport | DoesNotFit] = {}
    for step in STEPS:
        progress(f"compiling {step} of {deployed.config.name} for {len(deployed.devices)} chips")
        reports[step] = compile_step(deployed, step)
    return reports
