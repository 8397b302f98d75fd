"""What a compiled program does, read from its HLO text: collectives, kernels, matrix flops and buffer copies, with loop trip counts.

XLA's own cost analysis counts a scanned body once, hides what custom calls do and, on GPU, gives no flops at all.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator

DTYPE_BYTES = {
    **dict.fromkeys(("pred", "s8", "u8", "f8e4m3fn", "f8e5m2"), 1),
    **dict.fromkeys(("s16", "u16", "f16", "bf16"), 2),
    **dict.fromkeys(("s32", "u32", "f32"), 4),
    **dict.fromkeys(("s64", "u64", "f64", "c64"), 8),
}

# numpy's name of a dtype -> HLO's.
DTYPES = {"float32": "f32", "bfloat16": "bf16"}

COLLECTIVES = (
    *("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all"),
    *("collective-permute", "collective-broadcast"),
)

# Custom calls that are compute; the rest are annotations (AllocateBuffer, AssumeGatherIndicesInBound, ...).
_KERNEL_TARGET = re.compile(r"tpu_custom_call|triton|mosaic|^__cu|^cu(blas|dnn)", re.IGNORECASE)
# Operations that produce a buffer without moving it.
_NO_COPY = ("parameter", "get-tuple-element", "tuple", "bitcast", "while", "conditional", "call", "optimization-barrier")
# Operations that update a buffer where it lies.
_IN_PLACE = ("scatter", "dynamic-update-slice")

# Attributes that name the computations an operation runs; "calls" for every other.
_RUNS = {"while": ("body",), "conditional": ("branch_computations", "true_computation", "false_computation"), "call": ("to_apply",)}

_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{[^}]*?S\((\d+)\)[^}]*\})?")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


@dataclasses.dataclass(frozen=True)
class Shape:
    """One array: dtype as HLO names it, dimensions, and where it lies: 0 the device's memory, 1 the fast memory of a TPU core."""

    dtype: str
    dims: tuple[int, ...]
    space: int = 0

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """Bytes without padding; 0 for tokens and other types that are no arrays."""
        return self.size * DTYPE_BYTES.get(self.dtype, 0)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of HLO: `shapes` are its results, `arguments` what is in its brackets, `attributes` the rest of the line."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    arguments: str
    attributes: str
    root: bool

    @property
    def operands(self) -> list[str]:
        """Names of instructions of the same computation."""
        return re.findall(r"%([\w.\-]+)", self.arguments)

    def attribute(self, name: str) -> str | None:
        """Value of a `name=value` attribute that holds no spaces or commas outside braces."""
        found = re.search(rf"(?:^|[ ,]){name}=(\{{[^}}]*\}}|[^, ]+)", self.attributes)
        return found[1] if found else None

    @property
    def op_name(self) -> str:
        """Where in the traced function it comes from; empty when the compiler lost it."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""


@dataclasses.dataclass(frozen=True)
class Executed:
    """An instruction in its place.

    Attributes:
        instruction: what runs.
        computation: its computation, by name.
        times: how often it runs in one call: the product of `trips`.
        loops: names of the enclosing loops, outermost first.
        trips: their trip counts; a loop without a known count stands as 1.
        conditional: inside a branch that may not be taken.
        fused: inside a fusion, so that it does not touch memory by itself.
        operands: result shapes of its operands.
        op_name: where in the traced function it comes from; what the compiler lost is taken from the operation around it.
    """

    instruction: Instruction
    computation: str
    loops: tuple[str, ...]
    trips: tuple[int, ...]
    conditional: bool
    fused: bool
    operands: tuple[tuple[Shape, ...], ...]
    op_name: str

    @property
    def times(self) -> int:
        """Executions in one call."""
        return math.prod(self.trips)


class Module:
    """A parsed HLO module."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        current: dict[str, Instruction] = {}
        for line in text.splitlines():
            if head := _COMPUTATION.match(line):
                current = self.computations[head[2]] = {}
                self.entry = head[2] if head[1] else self.entry
            elif found := _INSTRUCTION.match(line):
                current[found[2]] = _parse(found[2], found[3], root=bool(found[1]))
        if not self.entry:
            raise ValueError("no ENTRY computation in the HLO text")

    def root(self, computation: str) -> Instruction:
        """The instruction whose value a computation returns."""
        return next(i for i in self.computations[computation].values() if i.root)

    def executed(self) -> Iterator[Executed]:
        """Every instruction reachable from the entry, fusions and branches included, scalar reducers left out."""
        yield from self._walk(self.entry, (), (), conditional=False, fused=False, around="")

    def _walk(
        self, computation: str, loops: tuple[str, ...], trips: tuple[int, ...], conditional: bool, fused: bool, around: str
    ) -> Iterator[Executed]:
        table = self.computations[computation]
        for i in table.values():
            operands = tuple(table[o].shapes for o in i.operands if o in table)
            op_name = i.op_name or around
            yield Executed(i, computation, loops, trips, conditional, fused, operands, op_name)
            inner = loops, trips
            if i.opcode == "while":
                inner = (*loops, i.name), (*trips, self.trip_count(i) or 1)
            branch, fusion = i.opcode == "conditional", i.opcode == "fusion"
            for callee in _callees(i):
                if callee in self.computations:
                    yield from self._walk(callee, *inner, conditional or branch, fused or fusion, op_name)

    def trip_count(self, loop: Instruction) -> int | None:
        """As the compiler wrote it down, else (TPU) from a counter that runs from 0 in constant steps; None when data decides."""
        if found := _TRIPS.search(loop.attributes):
            return int(found[1])
        names = ((loop.attribute(part) or "").lstrip("%") for part in ("condition", "body"))
        condition, body = (self.computations[name] for name in names)
        test = next(i for i in condition.values() if i.root)
        if test.opcode != "compare" or test.attribute("direction") != "LT":
            return None
        counter, limit = condition.get(test.operands[0]), _constant(condition, test.operands[1])
        if limit is None or counter is None or counter.opcode != "get-tuple-element":
            return None
        result = next(i for i in body.values() if i.root)
        update = body.get(result.operands[int(counter.attribute("index") or 0)])
        steps = [_constant(body, o) for o in update.operands] if update is not None and update.opcode == "add" else []
        # Where the addition is fused away, the step is that of every scan.
        step = next((n for n in steps if n is not None), 1)
        return -(-limit // step)


def _constant(table: dict[str, Instruction], name: str) -> int | None:
    """Value of an integer constant, seen through copies."""
    i = table.get(name)
    while i is not None and i.opcode == "copy":
        i = table.get(i.operands[0])
    return int(i.arguments) if i is not None and i.opcode == "constant" else None


def _callees(i: Instruction) -> list[str]:
    """Computations that an instruction runs; scalar reducers (`to_apply` of anything but a call) left out."""
    values = (i.attribute(name) or "" for name in _RUNS.get(i.opcode, ("calls",)))
    return [name.strip().lstrip("%") for value in values for name in value.strip("{}").split(",") if name]


def _parse(name: str, rest: str, root: bool) -> Instruction:
    """`rest` is `TYPE opcode(operands), attributes`; TYPE may be a tuple with layouts in it."""
    end = _closing(rest, 0) if rest.startswith("(") else rest.index(" ")
    kind, rest = rest[:end], rest[end:].lstrip()
    opcode, _, rest = rest.partition("(")
    end = _closing("(" + rest, 0) - 2
    return Instruction(name, opcode, _shapes(kind), rest[:end], rest[end + 1 :], root)


def _closing(text: str, start: int) -> int:
    """Index after the bracket that closes the one at `start`."""
    depth = 0
    for at in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[at], 0)
        if not depth:
            return at + 1
    raise ValueError(f"unbalanced brackets in HLO: {text[:80]}")


def _shapes(kind: str) -> tuple[Shape, ...]:
    return tuple(Shape(d, tuple(int(n) for n in dims.split(",") if n), int(space or 0)) for d, dims, space in _ARRAY.findall(kind))


# --- collectives -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective in its place; bytes are per chip and execution.

    Attributes:
        kind: one of `COLLECTIVES`.
        group: chips that take part together.
        payload: bytes of the whole array that is reduced, gathered or moved.
        executed: where it stands and how often it runs.
    """

    kind: str
    group: int
    payload: int
    executed: Executed

    @property
    def link_bytes(self) -> float:
        """Bytes that each chip sends, by the ring algorithms: a lower bound of what crosses its links."""
        share = (self.group - 1) / self.group
        return self.payload * {"all-reduce": 2 * share, "collective-permute": 1.0, "collective-broadcast": 1.0}.get(self.kind, share)


def collectives(module: Module) -> list[Collective]:
    """Collectives between at least two chips. An all-reduce that a fusion slices at once (TPU) is a reduce-scatter."""
    found = []
    for e in module.executed():
        kind = e.instruction.opcode.removesuffix("-start")
        if kind not in COLLECTIVES:
            continue
        group = _group_size(e.instruction)
        payload = sum(s.bytes for shapes in e.operands for s in shapes) * (group if kind == "all-gather" else 1)
        if e.computation.startswith("all-reduce-scatter"):
            kind = "reduce-scatter"
        if group > 1:
            found.append(Collective(kind, group, payload, e))
    return found


def longest_loop(module: Module, trips: int) -> str | None:
    """Name of the outermost loop of `trips` repetitions that holds the most instructions; None when there is none."""
    sizes: dict[str, int] = {}
    for e in module.executed():
        if e.trips[:1] == (trips,):
            sizes[e.loops[0]] = sizes.get(e.loops[0], 0) + 1
    return max(sizes, key=lambda name: sizes[name], default=None)


def windowed(module: Module) -> list[tuple[str, Executed]]:
    """Loops that a TPU compiler makes of a collective and its matrix multiplication, as (collective, loop).

    Their bytes are those of the permutes inside.
    """
    kinds = {"ag": "all-gather", "rs": "reduce-scatter"}
    loops = ((re.search(r"windowed_dot_general_body_(ag|rs)", e.instruction.attribute("body") or ""), e) for e in module.executed())
    return [(kinds[found[1]], e) for found, e in loops if found]


def _group_size(i: Instruction) -> int:
    """Chips per replica group, from any of the ways that HLO writes groups."""
    text = i.attributes
    if "source_target_pairs=" in text:
        return 2
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\([^{]*\))? \{([^}]*)\}", text):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", mesh[2]))
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", text):
        return int(iota[2])
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", text):
        return len(listed[1].split(","))
    raise ValueError(f"cannot read the replica groups of {i.name}: {text[:200]}")


# --- kernels, flops, copies ------------------------------------------------------------------------------------------------


def kernels(module: Module) -> dict[str, int]:
    """Executions of every compute custom call, by the name of the jitted function around it, or its own."""
    counts: dict[str, int] = {}
    for e in module.executed():
        target = (e.instruction.attribute("custom_call_target") or "").strip('"')
        if e.instruction.opcode == "custom-call" and _KERNEL_TARGET.search(target):
            around = re.findall(r"jit\(([\w.]+)\)", e.instruction.op_name)
            name = around[-1] if len(around) > 1 else re.sub(r"[.\d]+$", "", e.instruction.name)
            counts[name] = counts.get(name, 0) + e.times
    return counts


def dot_flops(module: Module, skip: Callable[[str], bool] = lambda op_name: False) -> int:
    """Flops of all matrix multiplications that run unconditionally, trip counts applied, a multiply-add counted as two.

    `skip` says by its op_name which multiplications to leave out (those counted in another way).
    """
    total = 0
    for e in module.executed():
        if e.conditional or skip(e.op_name):
            continue
        match e.instruction.opcode:
            case "dot":
                total += e.times * _dot(e)
            case "convolution":
                total += e.times * _convolution(e)
            case "custom-call" if "cublas" in e.instruction.attributes:
                total += e.times * _gemm(e)
    return total


def _contracted(dims: str | None, shape: Shape) -> int:
    return math.prod(shape.dims[int(d)] for d in re.findall(r"\d+", dims or ""))


def _dot(e: Executed) -> int:
    return 2 * e.instruction.shapes[0].size * _contracted(e.instruction.attribute("lhs_contracting_dims"), e.operands[0][0])


def _gemm(e: Executed) -> int:
    """A library call carries its dot dimensions in the backend config."""
    dims = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', e.instruction.attributes)
    return 2 * e.instruction.shapes[0].size * _contracted(dims[1], e.operands[0][0]) if dims else 0


def _convolution(e: Executed) -> int:
    """On TPU a dot is a convolution whose spatial axes, if any, carry head or batch axes: only taps inside the base count."""
    labels = re.match(r"(\w+)_(\w+)->(\w+)", e.instruction.attribute("dim_labels") or "")
    if labels is None:
        raise ValueError(f"convolution without dim_labels: {e.instruction.name}")
    lhs, rhs, out = e.operands[0][0], e.operands[1][0], e.instruction.shapes[0]
    window = re.search(r"window=\{([^}]*)\}", e.instruction.attributes)
    fields = dict(part.split("=") for part in window[1].split()) if window else {}
    per_axis = {key: value.split("x") for key, value in fields.items()}
    flops = 2 * out.size * rhs.dims[labels[2].index("i")]
    for axis in (c for c in labels[3] if c.isdigit()):
        at = int(axis)
        size = out.dims[labels[3].index(axis)]

        def number(key: str, default: int, at: int = at) -> int:
            return int(per_axis[key][at]) if key in per_axis else default

        low = int(per_axis["pad"][at].split("_")[0]) if "pad" in per_axis else 0
        dilate, stride, spread = number("lhs_dilate", 1), number("stride", 1), number("rhs_dilate", 1)
        reach = (lhs.dims[labels[1].index(axis)] - 1) * dilate
        positions = [y * stride + k * spread - low for y in range(size) for k in range(number("size", 1))]
        flops = flops // size * sum(0 <= p <= reach and p % dilate == 0 for p in positions)
    return flops


def copies_of(module: Module, size: int, dtype: str) -> list[str]:
    """Operations that write a buffer of `size` elements of `dtype` and do not update it in place: "opcode name xN".

    Fusions count by their root; what is inside a fusion touches no memory of its own. A TPU takes small pools into its fast memory while
    it works on them, and back: no copies either.
    """
    copied = _copies(module, {(size, dtype)})
    return [f"{e.instruction.opcode} {e.instruction.name} x{e.times}" for e, _ in copied]


def copied_bytes(module: Module, sizes: set[tuple[int, str]]) -> int:
    """Bytes that one call writes to device memory by copying buffers of such (elements, dtype), see `copies_of`."""
    return sum(e.times * shape.bytes for e, shape in _copies(module, sizes) if shape.space == 0)


def _copies(module: Module, sizes: set[tuple[int, str]]) -> Iterator[tuple[Executed, Shape]]:
    for e in module.executed():
        i = e.instruction
        if e.fused or i.opcode in _NO_COPY or i.opcode.endswith("-done"):
            continue
        if i.opcode == "copy-start" and {s.space for s in i.shapes[:2]} == {0, 1}:
            continue
        written = next((s for s in i.shapes if (s.size, s.dtype) in sizes), None)
        if written is not None and not all(r in _IN_PLACE + _NO_COPY for r in _roots(module, i)):
            yield e, written


def _roots(module: Module, i: Instruction) -> list[str]:
    """Opcodes that produce the results of an instruction, looked up through fusions, tuples and bitcasts."""
    if i.opcode != "fusion":
        return [i.opcode]
    (callee,) = _callees(i)
    table = module.computations[callee]

    def through(inner: Instruction) -> list[str]:
        if inner.opcode in ("bitcast", "tuple"):
            return [op for o in inner.operands if o in table for op in through(table[o])]
        return _roots(module, inner)

    return through(module.root(callee))
