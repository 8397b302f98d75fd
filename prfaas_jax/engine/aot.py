"""Compiles the prefill and decode steps for accelerators that are not here and says what can be known without running them.

Everything reported is "compiled, not run": bytes and collectives are facts of the compiled program, seconds are lower bounds.
"""

import contextlib
import dataclasses
import math
import re
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
from jax.experimental import topologies

from prfaas_jax.engine import hlo
from prfaas_jax.engine.options import EngineOptions
from prfaas_jax.engine.plan import plan_decode, plan_prefill
from prfaas_jax.engine.runner import choose_implementation
from prfaas_jax.engine.steps import ISLAND, StepGeometry, Steps
from prfaas_jax.engine.targets import GPU_TARGET_CONFIG, Chip, Target
from prfaas_jax.errors import InvalidInput
from prfaas_jax.kvcache.pools import pool_shapes
from prfaas_jax.kvcache.spec import DTYPE_BYTES, cache_spec
from prfaas_jax.models.config import ModelConfig
from prfaas_jax.models.params import flat_names
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
    def attention_shards(self) -> int:
        """Chips that share the heads."""
        return self.mesh.model if self.options.attention == "sharded" else 1

    def steps(self) -> Steps:
        """The programs, over devices that exist only as a description."""
        options, mesh = self.options, self.mesh
        geometry = StepGeometry(options.page_size, options.pages_per_shard(mesh.data), options.pages_per_request)
        implementation = choose_implementation(self.config, options, self.platform)
        return Steps(self.config, make_mesh(mesh, self.devices), options.attention, geometry, implementation)

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
        bytes_per_chip: parameters, pools, temporaries, outputs (those that no argument is reused for), plan, total.
        fits: whether the total is within the chip's memory; `over_bytes` by how much it is not.
        aliased_bytes: argument bytes that the outputs reuse: the pools, when donation works.
        pool_copies: operations that write a pool-sized buffer anywhere else than in place.
        collectives: kind -> {per_layer, per_step, bytes (payload per step), link_bytes (sent per chip and step), largest_bytes};
            on the path that samples greedily. "reduce-scatter in a ring" is one that TPU runs as permutes between partial matmuls.
        sampling_collectives: the same for the branch that draws with a temperature, which comes on top.
        kernels: name -> executions per step.
        flops_per_chip: multiplications found in the program, plus `attention_flops_per_chip` by formula.
        hbm_bytes_per_chip: the least that must be read and written: parameters, cached context, new KV, logits.
        bytes_accessed_xla: the compiler's figure, scanned bodies counted once; None on GPU.
        roofline_s: the largest of `bounds_s`: flops / peak, bytes / bandwidth, link bytes / links.
    """

    step: StepName
    rows: int
    tokens: int
    bytes_per_chip: dict[str, int]
    fits: bool
    over_bytes: int
    aliased_bytes: int
    pool_copies: list[str]
    collectives: dict[str, dict[str, float]]
    sampling_collectives: dict[str, dict[str, float]]
    kernels: dict[str, int]
    flops_per_chip: float
    attention_flops_per_chip: float
    hbm_bytes_per_chip: float
    bytes_accessed_xla: float | None
    bounds_s: dict[str, float]
    roofline_s: float
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
    steps = deployed.steps()
    pools = pool_shapes(cache_spec(deployed.config), steps.geometry.pages, steps.geometry.page_size, deployed.mesh.data)
    held = {"parameters": _shard_bytes(steps.abstract_params, steps.params_shardings), "pools": sum(_bytes(p) for p in pools)}
    held["pools"] //= deployed.mesh.data * deployed.attention_shards
    rows, width = deployed.rows(step), steps.geometry.width
    plan: Any = plan_prefill([], rows, deployed.options.chunk, width) if step == "prefill" else plan_decode([], rows, width)
    plan = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), plan)
    fn: Any = steps.prefill if step == "prefill" else steps.decode
    lowered = fn.trace(steps.abstract_params, pools, plan).lower(lowering_platforms=(deployed.platform,))
    try:
        with _names_of_this_program():
            compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        used = re.search(r"Used .*? of .*? hbm.*", str(error))
        over = max(0, sum(held.values()) - int(deployed.chip.hbm_bytes))
        return DoesNotFit(step, held, over, used[0].strip() if used else str(error).splitlines()[0])
    return _report(deployed, step, compiled, held, pools)


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


def _bytes(a: Any) -> int:
    return math.prod(a.shape) * a.dtype.itemsize


def _shard_bytes(params: Any, shardings: Any) -> int:
    """Bytes of one chip's shard of the parameters."""
    placed = flat_names(shardings)
    return sum(
        math.prod(placed[name].get_value().shard_shape(leaf.shape)) * leaf.dtype.itemsize for name, leaf in flat_names(params).items()
    )


def _report(deployed: Deployment, step: StepName, compiled: Any, held: dict[str, int], pools: tuple[Any, ...]) -> StepReport:
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
    module = hlo.Module(compiled.as_text())
    arguments, aliased = int(memory.argument_size_in_bytes), int(memory.alias_size_in_bytes)
    bytes_per_chip = {
        **held,
        "plan": arguments - sum(held.values()),
        "temporaries": int(memory.temp_size_in_bytes),
        "outputs": int(memory.output_size_in_bytes) - aliased,
        "code": int(memory.generated_code_size_in_bytes),
    }
    bytes_per_chip["total"] = sum(bytes_per_chip.values())
    pool = pools[0]
    pool_elements = math.prod(pool.shape) // (deployed.mesh.data * deployed.attention_shards)
    collectives = _summary(module, deployed.config.num_layers, conditional=False)
    attention = _attention_flops(deployed, step)
    # Attention's come from a formula: kernels hide them, and its loops follow the data.
    flops = hlo.dot_flops(module, skip=lambda op_name: ISLAND in op_name.split("/")) + attention
    moved = _hbm_bytes(deployed, step, held["parameters"])
    bounds = {
        "compute": flops / deployed.chip.peak_flops(deployed.config.dtype),
        "memory": moved / deployed.chip.hbm_bandwidth,
        "interconnect": sum(c["link_bytes"] for c in collectives.values()) / deployed.chip.link_bandwidth,
    }
    return StepReport(
        step=step,
        rows=deployed.rows(step),
        tokens=deployed.rows(step) * (deployed.options.chunk if step == "prefill" else 1),
        bytes_per_chip=bytes_per_chip,
        fits=bytes_per_chip["total"] <= deployed.chip.hbm_bytes,
        over_bytes=max(0, bytes_per_chip["total"] - int(deployed.chip.hbm_bytes)),
        aliased_bytes=aliased,
        pool_copies=hlo.copies_of(module, pool_elements, {"bfloat16": "bf16", "float32": "f32"}[deployed.config.dtype]),
        collectives=collectives,
        sampling_collectives=_summary(module, deployed.config.num_layers, conditional=True),
        kernels=hlo.kernels(module),
        flops_per_chip=flops,
        attention_flops_per_chip=attention,
        hbm_bytes_per_chip=moved,
        bytes_accessed_xla=cost.get("bytes accessed"),
        bounds_s=bounds,
        roofline_s=max(bounds.values()),
    )


def _summary(module: hlo.Module, layers: int, conditional: bool) -> dict[str, dict[str, float]]:
    """Counts and bytes by kind; "per_layer" counts what runs inside the layer scan."""
    kinds: dict[str, dict[str, float]] = {}

    def add(kind: str, e: hlo.Executed, payload: float, link_bytes: float) -> None:
        if e.conditional != conditional:
            return
        entry = kinds.setdefault(kind, {"per_layer": 0, "per_step": 0, "bytes": 0, "link_bytes": 0, "largest_bytes": 0})
        entry["per_layer"] += 0 if conditional or e.trips[:1] != (layers,) else e.times / layers
        entry["per_step"] += e.times
        entry["bytes"] += e.times * payload
        entry["link_bytes"] += e.times * link_bytes
        entry["largest_bytes"] = max(payload, entry["largest_bytes"])

    for c in hlo.collectives(module):
        add(c.kind, c.executed, c.payload, c.link_bytes)
    for kind, loop in hlo.windowed(module):
        add(f"{kind} in a ring", loop, 0, 0)
    return dict(sorted(kinds.items()))


def _attention_flops(deployed: Deployment, step: StepName) -> float:
    """Per chip: each query meets the keys before it and itself; a score and a weighted value take 2 H flops each."""
    config, options = deployed.config, deployed.options
    context, chunk = options.max_length, options.chunk
    # Prefill: the last chunk of the context. Decode: one query over the context and itself.
    pairs = sum(range(context - chunk + 1, context + 1)) if step == "prefill" else context + 1
    rows = deployed.rows(step) // deployed.mesh.data
    return rows * pairs * 4 * config.head_dim * config.num_heads * config.num_layers / deployed.attention_shards


def _hbm_bytes(deployed: Deployment, step: StepName, parameters: int) -> float:
    """Per chip: weights read once, the cached context read once, new KV written (prefill: also as the exported copy)."""
    config, options = deployed.config, deployed.options
    if not config.tie_embeddings:  # of the input embedding only a few rows are read
        parameters -= config.vocab_size * config.hidden_size * DTYPE_BYTES[config.dtype] // deployed.mesh.model
    rows = deployed.rows(step) // deployed.mesh.data
    token = cache_spec(config).bytes_per_token / deployed.attention_shards
    logits = 4 * rows * config.vocab_size / deployed.mesh.model
    if step == "decode":
        return parameters + rows * token * (options.max_length + 1) + logits
    return parameters + rows * token * (options.max_length + options.chunk) + logits


def compile_steps(deployed: Deployment, progress: Callable[[str], None] = lambda text: None) -> dict[StepName, StepReport | DoesNotFit]:
    """Both steps, prefill first; `progress` hears what is about to be compiled."""
    reports: dict[StepName, StepReport | DoesNotFit] = {}
    for step in STEPS:
        progress(f"compiling {step} of {deployed.config.name} for {len(deployed.devices)} chips")
        reports[step] = compile_step(deployed, step)
    return reports
