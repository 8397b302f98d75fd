"""Router and experts against Hugging Face's, a numpy router, and each other."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from prfaas_jax.errors import InvalidInput
from prfaas_jax.ops.moe import IMPLEMENTATIONS, default_implementation, experts_mlp, route, supports
from prfaas_jax.ops.moe.grouped import block_size

GOLDENS = Path(__file__).resolve().parents[1] / "goldens" / "ops_moe"
RULES = json.loads((GOLDENS / "rules.json").read_text())
PLAIN = {"num_groups": 1, "top_groups": 1, "renormalize": False, "scale": 1.0}

stacked = jax.jit(experts_mlp, static_argnames=("activation", "implementation", "interpret"))


def mlp(x, weights, experts, gate, up, down, first_expert, **options):
    """The middle one of three layers; nobody may use the others. Kernels run in the interpreter."""
    name = options.get("implementation")
    options["interpret"] = name == "pallas_gpu"
    # XLA's grouped product on CPU multiplies all groups and masks with zeros.
    foreign = 1e3 if name == "ragged" else np.nan
    around = ([np.full_like(w, foreign), w, np.full_like(w, foreign)] for w in (gate, up, down))
    return stacked(x, weights, experts, *map(np.stack, around), first_expert, 1, **options)


def load(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDENS / f"{name}.npz") as arrays:
        return dict(arrays)


def by_expert(weights: jax.Array, experts: jax.Array) -> tuple[np.ndarray, np.ndarray]:
    order = np.argsort(experts, axis=-1)
    return np.take_along_axis(np.asarray(weights), order, -1), np.take_along_axis(np.asarray(experts), order, -1)


# --- router ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RULES)
def test_routes_as_hugging_face_does(name):
    golden = load(name)
    got, experts = route(golden["logits"], golden.get("bias"), **RULES[name])
    assert got.dtype == jnp.float32 and experts.dtype == jnp.int32
    got, experts = by_expert(got, experts)
    np.testing.assert_array_equal(experts, golden["experts"])
    np.testing.assert_allclose(got, golden["weights"], rtol=2e-6)


@pytest.mark.parametrize("name", ["kimi_linear", "deepseek_v3"])
@pytest.mark.parametrize("change", ["no bias", "no groups"])
def test_the_goldens_tell_these_rules_from_simpler_ones(name, change):
    golden, rules = load(name), RULES[name]
    bias = None if change == "no bias" else golden["bias"]
    if change == "no groups":
        rules = rules | {"num_groups": 1, "top_groups": 1}
    _, experts = by_expert(*route(golden["logits"], bias, **rules))
    assert (experts != golden["experts"]).any()


def numpy_route(logits, bias, *, top_k, scoring, num_groups, top_groups, renormalize, scale):
    """One token at a time, in float64."""
    weights, experts = [], []
    for row in logits.astype(np.float64):
        scores = 1 / (1 + np.exp(-row)) if scoring == "sigmoid" else np.exp(row - row.max()) / np.exp(row - row.max()).sum()
        choice = scores if bias is None else scores + bias
        groups = np.split(np.arange(len(row)), num_groups)
        groups.sort(key=lambda group: -np.sort(choice[group])[-2:].sum())
        allowed = np.sort(np.concatenate(groups[:top_groups]))
        chosen = sorted(allowed, key=lambda e: -choice[e])[:top_k]
        weight = scores[chosen]
        weights.append(scale * (weight / weight.sum() if renormalize else weight))
        experts.append(chosen)
    return np.array(weights), np.array(experts)


@st.composite
def routings(draw):
    # Few shapes: each is compiled anew.
    num_groups, top_groups = draw(st.sampled_from([(1, 1), (3, 1), (3, 2), (4, 4), (12, 5)]))
    rules = {
        "top_k": draw(st.sampled_from([1, 4])),
        "scoring": draw(st.sampled_from(["softmax", "sigmoid"])),
        "num_groups": num_groups,
        "top_groups": top_groups,
        "renormalize": draw(st.booleans()),
        "scale": draw(st.sampled_from([1.0, 2.5])),
    }
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    bias = rng.normal(size=12).astype(np.float32) if draw(st.booleans()) else None
    return rules, 2 * rng.normal(size=(20, 12)).astype(np.float32), bias


@settings(max_examples=40)
@given(routings())
def test_routes_as_the_rules_say(case):
    rules, logits, bias = case
    weights, experts = route(logits, bias, **rules)
    expected_weights, expected_experts = numpy_route(logits, bias, **rules)
    np.testing.assert_array_equal(experts, expected_experts)
    np.testing.assert_allclose(weights, expected_weights, rtol=1e-5)


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_among_equal_scores_the_lowest_index_wins(scoring):
    logits = jnp.array([[0, 1, 0, 1, 1, 0, 0, 1]], jnp.float32)
    _, experts = route(logits, None, top_k=6, scoring=scoring, **PLAIN)
    assert experts.tolist() == [[1, 3, 4, 7, 0, 2]]
    _, experts = route(jnp.zeros((1, 8)), None, top_k=3, scoring=scoring, **PLAIN | {"num_groups": 4, "top_groups": 2})
    assert experts.tolist() == [[0, 1, 2]]


def test_a_negative_bias_does_not_let_another_group_in():
    """Masked with zero instead of -inf, experts of closed groups would beat the open group's own."""
    bias = jnp.full(6, -3.0).at[:2].set(-2.0)
    _, experts = route(jnp.zeros((1, 6)), bias, top_k=2, scoring="sigmoid", **PLAIN | {"num_groups": 3, "top_groups": 1})
    assert experts.tolist() == [[0, 1]]


def test_scores_that_underflow_do_not_become_nan():
    weights, _ = route(jnp.full((1, 4), -200.0), None, top_k=2, scoring="sigmoid", **PLAIN | {"renormalize": True})
    assert weights.tolist() == [[0.0, 0.0]]


def test_leading_axes_are_any():
    logits = np.random.default_rng(0).normal(size=(2, 3, 12)).astype(np.float32)
    rules = {"top_k": 3, "scoring": "sigmoid", "num_groups": 3, "top_groups": 2, "renormalize": True, "scale": 2.0}
    for got, flat in zip(route(logits, None, **rules), route(logits.reshape(6, 12), None, **rules), strict=True):
        np.testing.assert_array_equal(got.reshape(6, 3), flat)


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("scoring", {"scoring": "tanh"}),
        ("num_groups", {"num_groups": 5}),
        ("num_groups", {"num_groups": 0}),
        ("top_groups", {"top_groups": 3}),
        ("top_k", {"top_k": 5}),
        ("top_k", {"top_k": 0}),
    ],
)
def test_impossible_routing_is_refused(field, change):
    rules = {"top_k": 2, "scoring": "softmax", **PLAIN, "num_groups": 2}
    with pytest.raises(InvalidInput, match=field):
        route(jnp.zeros((1, 8)), None, **rules | change)


def test_rounded_logits_are_refused():
    with pytest.raises(InvalidInput, match=r"logits.dtype"):
        route(jnp.zeros((1, 8), jnp.bfloat16), None, top_k=2, scoring="softmax", **PLAIN)


# --- experts ---------------------------------------------------------------------------------------------------------------


def case_of(tokens: int, experts: int, top_k: int, width: int, intermediate: int, *, skew: float = 0.0, seed: int = 0):
    """(x, weights, experts, gate, up, down) of one layer; `skew` pulls tokens to the last experts."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(tokens, experts)) + skew * np.arange(experts)
    chosen = np.argsort(-logits, axis=-1)[:, :top_k].astype(np.int32)
    weights = rng.uniform(0.1, 1.0, (tokens, top_k)).astype(np.float32)
    x = rng.normal(size=(tokens, width)).astype(np.float32)
    shapes = (experts, width, intermediate), (experts, width, intermediate), (experts, intermediate, width)
    return x, weights, chosen, *((rng.normal(size=s) / s[-2] ** 0.5).astype(np.float32) for s in shapes)


def whole(x, weights, experts, gate, up, down):
    """Every expert on every token at once; weights of the others are zero. In float64 when given numpy arrays."""
    xp = np if isinstance(x, np.ndarray) else jnp
    if xp is np:
        x, gate, up, down = (a.astype(np.float64) for a in (x, gate, up, down))
    mask = (weights[..., None] * (experts[..., None] == np.arange(gate.shape[0]))).sum(axis=1)
    g = xp.einsum("td,edf->tef", x, gate)
    hidden = g / (1 + xp.exp(-g)) * xp.einsum("td,edf->tef", x, up)
    return xp.einsum("tef,efd,te->td", hidden, down, mask)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["kimi_linear", "qwen3_moe"])
def test_experts_are_hugging_faces(name, implementation):
    golden = load(name)
    tokens = (golden[key] for key in ("x", "weights", "experts"))
    # The goldens' experts are 12 wide; zeros up to 16, which the kernel takes, add nothing.
    more = {"gate": ((0, 0), (0, 4), (0, 0)), "up": ((0, 0), (0, 4), (0, 0)), "down": ((0, 0), (0, 0), (0, 4))}
    projections = (np.pad(golden[key], widths).swapaxes(-1, -2) for key, widths in more.items())
    np.testing.assert_allclose(mlp(*tokens, *projections, 0, implementation=implementation), golden["output"], atol=2e-6)


# Tokens, experts, experts per token, D, F: the same where the shape does not matter, so that it is compiled once.
CASE = 40, 8, 3, 16, 32

SHAPES = [
    (*CASE, 0.0),
    (40, 8, 3, 16, 12, 0.0),
    (400, 6, 2, 48, 16, 1.0),
    (1, 16, 4, 16, 16, 0.0),
    (1, 1, 1, 8, 4, 0.0),
    (1, 16, 4, 16, 8, 0.0),
    (150, 5, 1, 16, 8, 9.0),
    (400, 6, 2, 8, 8, 1.0),
]


TAKEN = [(*s, name) for name in IMPLEMENTATIONS for s in SHAPES if supports(name, width=s[3], intermediate=s[4]) is None]


@pytest.mark.parametrize(("tokens", "experts", "top_k", "width", "intermediate", "skew", "implementation"), TAKEN)
def test_every_implementation_is_the_weighted_sum(tokens, experts, top_k, width, intermediate, skew, implementation):
    case = case_of(tokens, experts, top_k, width, intermediate, skew=skew)
    np.testing.assert_allclose(mlp(*case, 0, implementation=implementation), whole(*case), atol=3e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_shards_of_the_experts_and_of_their_width_add_up(implementation):
    x, weights, experts, gate, up, down = case_of(*CASE, skew=0.5)
    total = np.zeros(x.shape)
    for first in (0, 4):
        e = slice(first, first + 4)
        for f in (slice(0, 16), slice(16, 32)):
            part = mlp(x, weights, experts, gate[e, :, f], up[e, :, f], down[e, f], first, implementation=implementation)
            total += np.asarray(part, np.float64)
    np.testing.assert_allclose(total, whole(x, weights, experts, gate, up, down), atol=3e-6)


def test_shards_of_a_mesh_add_up():
    case = case_of(*CASE)
    mesh = jax.make_mesh((2, 2), ("expert", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    wide, narrow = P(None, "expert", None, "model"), P(None, "expert", "model")

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(P(), P(), P(), wide, wide, narrow), out_specs=P(), check_vma=False)
    def sharded(x, weights, experts, gate, up, down):
        first = jax.lax.axis_index("expert") * gate.shape[1]
        return jax.lax.psum(experts_mlp(x, weights, experts, gate, up, down, first), ("expert", "model"))

    x, weights, experts, *projections = case
    got = jax.jit(sharded)(x, weights, experts, *(w[None] for w in projections))
    np.testing.assert_allclose(got, whole(*case), atol=3e-6)


def test_tokens_of_another_dtype_than_the_experts_meet_the_kernel_too():
    x, weights, experts, *projections = case_of(*CASE)
    got = mlp(x.astype(ml_dtypes.bfloat16), weights, experts, *projections, 0, implementation="pallas_gpu")
    np.testing.assert_allclose(got.astype(np.float32), whole(x, weights, experts, *projections), atol=0.05)


def test_largest_blocks_and_several_tiles():
    case = case_of(600, 8, 2, 160, 192)
    np.testing.assert_allclose(mlp(*case, 0, implementation="pallas_gpu"), whole(*case), atol=3e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("first", [8, 96])
def test_a_shard_that_nobody_asked_for_adds_nothing(first, implementation):
    x, weights, experts, *projections = case_of(*CASE)
    out = mlp(x, weights, experts + 50, *(np.full_like(p, np.inf) for p in projections), first, implementation=implementation)
    np.testing.assert_array_equal(out, np.zeros_like(x))


@pytest.mark.parametrize("implementation", ["dense", "grouped", "pallas_gpu"])
def test_an_expert_that_overflows_spoils_only_its_own_tokens(implementation):
    x, weights, experts, gate, up, down = case_of(*CASE)
    before = np.asarray(mlp(x, weights, experts, gate, up, down, 0, implementation=implementation))
    down[5] = np.inf
    spoiled = mlp(x, weights, experts, gate, up, down, 0, implementation=implementation)
    free = (experts != 5).all(axis=1)
    assert 0 < free.sum() < len(x)
    np.testing.assert_array_equal(spoiled[free], before[free])
    assert not np.isfinite(spoiled[~free]).all(axis=1).any()


@pytest.mark.parametrize(
    ("shape", "implementation", "atol"),
    [
        ((8, 16, 4, 64, 32), None, 0.0),
        ((64, 8, 2, 64, 48), None, 0.0),
        ((256, 8, 2, 64, 32), None, 0.0),
        ((200, 64, 4, 128, 96), None, 0.0),
        (CASE, "dense", 0.0),
        ((200, 64, 4, 128, 96), "dense", 0.0),
        (CASE, "ragged", 1e-6),
        (CASE, "pallas_gpu", 1e-6),
    ],
)
def test_a_token_does_not_depend_on_its_companions(shape, implementation, atol):
    """Companions go to other experts, which moves the token to other rows of other blocks."""
    x, weights, experts, *projections = case_of(*shape)
    alone = mlp(x, weights, experts, *projections, 0, implementation=implementation)
    mine = np.arange(shape[0]) % 3 == 1
    for seed, skew in ((1, 0.0), (2, 0.3), (3, -5.0)):
        others = case_of(*shape, skew=skew, seed=seed)[:3]
        mixed = (np.where(mine[:, None], own, other) for own, other in zip((x, weights, experts), others, strict=True))
        got = mlp(*mixed, *projections, 0, implementation=implementation)
        np.testing.assert_allclose(got[mine], alone[mine], rtol=0, atol=atol)


@pytest.mark.parametrize("implementation", ["dense", "grouped", "pallas_gpu"])
def test_padding_changes_no_token(implementation):
    x, weights, experts, *projections = case_of(*CASE)
    before = np.asarray(mlp(x, weights, experts, *projections, 0, implementation=implementation))
    x[30:], experts[30:] = np.nan, experts[0]
    np.testing.assert_array_equal(mlp(x, weights, experts, *projections, 0, implementation=implementation)[:30], before[:30])


def gradients(form, x, weights, experts, *projections):
    """Of the sum of sines, so that no two outputs weigh the same, to all but `experts`."""

    def loss(x, weights, *projections):
        return jnp.sin(form(x, weights, experts, *projections)).sum()

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3, 4)))(x, weights, *projections)


@functools.cache
def true_gradients():
    return gradients(whole, *case_of(*CASE, skew=0.5))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradients_flow_to_tokens_weights_and_experts(implementation):
    def form(x, weights, experts, *projections):
        interpret = implementation == "pallas_gpu"
        return experts_mlp(x, weights, experts, *(w[None] for w in projections), 0, implementation=implementation, interpret=interpret)

    got = gradients(form, *case_of(*CASE, skew=0.5))
    for a, b in zip(got, true_gradients(), strict=True):
        assert np.abs(b).max() > 0.1
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5)


def test_gradients_flow_through_the_router_but_not_into_the_bias():
    rules = {"top_k": 2, "scoring": "sigmoid", "num_groups": 2, "top_groups": 1, "renormalize": True, "scale": 2.0}
    logits, bias, value = np.float32([[0.1, -0.4, 0.7, 1.2]]), np.float32([0.0, 0.1, 0.0, -0.2]), np.array([1.0, 3.0])

    def slope(logit: int) -> float:
        step = 1e-4 * np.eye(4)[logit]
        above, below = (numpy_route(logits.astype(np.float64) + sign * step, bias, **rules)[0] @ value for sign in (1, -1))
        return float((above - below)[0] / 2e-4)

    both = jax.jit(jax.grad(lambda logits, bias: (route(logits, bias, **rules)[0] @ value).sum(), argnums=(0, 1)))
    of_logits, of_bias = both(logits, bias)
    assert np.flatnonzero(of_logits).tolist() == [2, 3] and not of_bias.any()
    np.testing.assert_allclose(of_logits[0], [slope(logit) for logit in range(4)], atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16_products_add_up_in_float32(implementation):
    """In bfloat16, 1024 ones add up to 256."""
    bf16 = np.dtype(ml_dtypes.bfloat16)
    x = np.ones((6, 1024), bf16)
    gate, up, down = (np.ones(shape, bf16) for shape in ((2, 1024, 512), (2, 1024, 512), (2, 512, 1024)))
    weights, experts = np.full((6, 2), 2.0**-20, np.float32), np.tile(np.int32([0, 1]), (6, 1))
    out = mlp(x, weights, experts, gate, up, down, 0, activation=jnp.asarray, implementation=implementation)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out.astype(np.float32), 2 * 512.0)


def test_only_blocks_with_tokens_are_computed():
    """One shard of many has few of the assignments, yet must have room for all of them."""
    x, weights, experts, gate, up, down = case_of(64, 16, 4, 8, 8)
    local = 4
    size = block_size(experts.size, local)
    visits = []

    def counted(gate):
        jax.debug.callback(lambda: visits.append(1))
        return jax.nn.silu(gate)

    mlp(x, weights, experts, gate[:local], up[:local], down[:local], 0, activation=counted, implementation="grouped").block_until_ready()
    jax.effects_barrier()
    assert len(visits) == sum(-(-(experts == e).sum() // size) for e in range(local))


@pytest.mark.parametrize(
    ("platform", "width", "name"),
    [("cpu", 16, "grouped"), ("cuda", 16, "pallas_gpu"), ("cuda", 24, "grouped"), ("rocm", 16, "grouped"), ("tpu", 16, "ragged")],
)
def test_the_default_is_that_of_the_platform_compiled_for(platform, width, name):
    x, weights, experts, *projections = case_of(16, 8, 2, width, 16)
    lowered = stacked.trace(x, weights, experts, *(w[None] for w in projections), 0).lower(lowering_platforms=(platform,)).as_text()
    assert ("ragged_dot" in lowered) == (name == "ragged")
    assert ("triton" in lowered) == (name == "pallas_gpu")
    chosen, reason = default_implementation(platform, width=width, intermediate=16)
    assert chosen == name and platform in reason


@pytest.mark.parametrize(
    ("field", "index", "shape"),
    [
        ("weights", 1, (4, 3)), ("experts", 2, (3, 2)), ("gate", 3, (1, 4, 7, 6)), ("up", 4, (1, 4, 8, 5)), ("down", 5, (1, 4, 8, 6)),
        ("down", 5, (2, 4, 6, 8)),
    ],
)  # fmt: skip
def test_shapes_that_do_not_belong_together_are_refused(field, index, shape):
    x, weights, experts, *projections = case_of(4, 4, 2, 8, 6)
    case = [x, weights, experts, *(w[None] for w in projections)]
    case[index] = np.zeros(shape, case[index].dtype)
    with pytest.raises(InvalidInput, match=f"{field}|experts"):
        experts_mlp(*case, 0)


def test_an_unknown_implementation_is_refused():
    with pytest.raises(InvalidInput, match="one of"):
        mlp(*case_of(4, 4, 2, 8, 6), 0, implementation="magic")


@pytest.mark.parametrize(("width", "intermediate", "field"), [(24, 16, "width=24"), (16, 40, "intermediate=40")])
def test_a_shape_that_the_kernel_does_not_take_is_refused(width, intermediate, field):
    x, weights, experts, *projections = case_of(4, 4, 2, width, intermediate)
    with pytest.raises(InvalidInput, match=field):
        experts_mlp(x, weights, experts, *(w[None] for w in projections), 0, implementation="pallas_gpu")
