"""No program copies the pools: temporaries do not grow with them, and donated pools are the outputs."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.models import load_model_config
from prfaas_jax.engine import caches
from prfaas_jax.engine.api import SamplingParams
from prfaas_jax.engine.plan import DecodeInput, PrefillInput, plan_decode, plan_ingest, plan_prefill
from prfaas_jax.engine.steps import Steps
from prfaas_jax.kvcache.pools import PoolGeometry, Pools, create_pools, pool_shapes, pool_shardings
from prfaas_jax.kvcache.spec import cache_spec
from prfaas_jax.models.params import init_random
from prfaas_jax.ops.paged_attention import reference
from prfaas_jax.sharding import MeshSpec, make_mesh

DENSE = "qwen3_toy"
PAGE = 16
SMALL, LARGE = 65, 1025
TOYS = ("kimi_linear_toy", "mimo_toy", "gated_delta_toy", "lightning_toy", "deepseek_toy", "gemma3_toy", "qwen3_next_toy", "qwen3_moe_toy")
# What the suite compiles every time: pages and states. The others take minutes together.
FAST = ("gated_delta_toy",)
MODELS = [pytest.param(m, marks=() if m in (DENSE, *FAST) else pytest.mark.slow) for m in (DENSE, *TOYS)]


def make_steps(pages: int, mesh: str = "data:1,model:1", model: str = DENSE) -> Steps:
    config = load_model_config(model)
    names = tuple("xla" if g.cache.kind == "paged" else None for g in cache_spec(config).groups)
    return Steps(config, make_mesh(MeshSpec.parse(mesh)), "sharded", PoolGeometry(PAGE, pages, 64, slots=pages // 4 + 2), names)


def analyse(steps: Steps, program: str) -> tuple[int, int, int]:
    """(temporary bytes, aliased bytes, bytes of the pools that the program is given), per device.

    "prefill" is all that the engine may run: the step as one program, and as several, of which one writes the pools.
    """
    shard, width = steps.sharders["decode"], steps.geometry.width
    data = shard.size("pages")
    pools = pool_shapes(steps.spec, steps.geometry, shard)
    placed = jax.tree.map(lambda p, s: np.prod(s.shard_shape(p.shape)) * p.dtype.itemsize, pools, pool_shardings(steps.spec, shard))
    nbytes = jax.tree.leaves(placed)
    if program == "ingest":
        group = steps.spec.groups[0]
        tensor = group.cache.tensors[0]
        window = group.cache.window or 1
        rows = {"paged": 64, "window": window, "state": 1}[group.cache.kind] * (1 if group.cache.kind == "state" else len(group.layers))
        block = jax.ShapeDtypeStruct((rows, tensor.heads, tensor.width), jnp.dtype(tensor.dtype))
        lowered = [steps.ingest(0, 0, "none").lower(pools[0][0], block, plan_ingest([], rows, data))]
        nbytes = nbytes[:1]
    elif program == "prefill":
        lowered = lower_prefill(steps, pools)
    else:
        lowered = [steps.decode.lower(steps.abstract_params, pools, plan_decode([], 8, width))]
    memory = [program.compile().memory_analysis() for program in lowered]
    return max(m.temp_size_in_bytes for m in memory), max(m.alias_size_in_bytes for m in memory), int(sum(nbytes))


def lower_prefill(steps: Steps, pools: Pools) -> list[jax.stages.Lowered]:
    given = steps.abstract_params, pools, plan_prefill([], 2, 64, steps.geometry.width)
    x = steps.prefill_embed.eval_shape(*given)
    runs = {piece.program: steps.prefill_piece(piece.program) for piece in steps.pieces}
    added = tuple(runs[piece.program].eval_shape(*given, x, np.int32(0))[1] for piece in steps.pieces)
    ahead = steps.prefill_ahead(steps.pieces[-1].program)
    return [
        steps.prefill.lower(*given),
        steps.prefill_embed.lower(*given),
        *(run.lower(*given, x, np.int32(0)) for run in (*runs.values(), ahead)),
        steps.prefill_end.lower(*given, x, added),
    ]


def assert_no_copy(program: str, mesh: str = "data:1,model:1", model: str = DENSE) -> None:
    small, large = (analyse(make_steps(pages, mesh, model), program) for pages in (SMALL, LARGE))
    growth = large[2] - small[2]
    assert growth > 1 << 20
    # Alignment and a slightly different schedule are no copies; one page more per layer would be.
    assert abs(large[0] - small[0]) < growth // 100, (program, small, large)
    for _, alias, pools in (small, large):
        assert alias >= pools


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("program", ["prefill", "decode", "ingest"])
def test_temporaries_do_not_grow_with_the_pools(program: str, model: str) -> None:
    assert_no_copy(program, model=model)


@pytest.mark.parametrize("program", ["prefill", "decode"])
def test_sharded_programs_copy_no_pool_either(program: str) -> None:
    assert_no_copy(program, "data:2,model:2")


def read_current(q, k_new, v_new, k_pool, v_pool, table, lengths, layer, *, pages_per_layer, scale, implementation, sinks):  # type: ignore[no-untyped-def]
    """The reference, with the current token's k and v taken from the pool, as the kernels do."""
    page = jnp.take_along_axis(table, (lengths // PAGE)[:, None], axis=1, mode="clip")[:, 0] + layer * pages_per_layer
    k, v = (pool[:, page, lengths % PAGE].swapaxes(0, 1) for pool in (k_pool, v_pool))
    return reference.paged_attention(q, k, v, k_pool, v_pool, table, lengths, layer, pages_per_layer=pages_per_layer, scale=scale)


@pytest.fixture
def kernel_path(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Switches to the path for kernels that read the current token from the pool."""

    def switch() -> None:
        monkeypatch.setattr(caches, "needs_current_in_pool", lambda name: True)
        monkeypatch.setattr(caches, "paged_attention", read_current)

    return switch


def test_pools_in_the_carry_are_not_copied(kernel_path: Callable[[], None]) -> None:
    kernel_path()
    assert_no_copy("decode")


def test_pools_in_the_carry_change_no_bit(kernel_path: Callable[[], None]) -> None:
    """Two prompts prefilled, three tokens decoded: tokens, logits and pools are those of the other path."""
    config, shard = load_model_config(DENSE), make_steps(SMALL).sharders["decode"]
    params = init_random(config, 0, shard)
    outputs = []
    for switch in (lambda: None, kernel_path):
        switch()
        steps = make_steps(SMALL)
        pools = create_pools(steps.spec, steps.geometry, shard)
        pages = [np.arange(1, 6, dtype=np.int32), np.arange(6, 11, dtype=np.int32)]
        prompts, greedy = [tuple(range(3, 43)), tuple(range(100, 117))], SamplingParams()
        rows = [PrefillInput(i, p, 0, len(p), pages[i], greedy) for i, p in enumerate(prompts)]
        pools, drawn, _ = steps.prefill(params, pools, plan_prefill(rows, 2, 64, 64))
        logits = []
        for step in range(3):
            tokens = np.asarray(drawn.token)
            inputs = [DecodeInput(i, int(tokens[i]), len(p) + step, pages[i], greedy) for i, p in enumerate(prompts)]
            pools, drawn = steps.decode(params, pools, plan_decode(inputs, 8, 64))
            logits.append(np.asarray(drawn.logits)[:2])
        outputs.append((np.stack(logits), *(np.asarray(p).reshape(4, 4, SMALL, PAGE, 16)[:, :, 1:] for p in pools[0])))
    for a, b in zip(*outputs, strict=True):
        np.testing.assert_array_equal(a, b)
