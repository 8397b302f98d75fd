"""Mixers and feed-forward parts as data: what each caches, how many parameters it has, what a mesh may split, what is refused."""

import math

import pytest

from prfaas_jax.errors import InvalidInput
from prfaas_jax.kvcache.spec import LayerCache, TensorSpec
from prfaas_jax.models.layer_config import (
    AttentionConfig,
    DenseConfig,
    GatedDeltaConfig,
    KdaConfig,
    LatentConfig,
    Layer,
    LightningConfig,
    MoeConfig,
    Rope,
    RopeScaling,
)
from prfaas_jax.models.layer_dict import layer_from_dict, layer_to_dict

D = 40  # width of the residual stream, unlike every other size here

GQA = AttentionConfig(num_heads=6, num_kv_heads=3, head_dim=10)
WINDOW = AttentionConfig(
    num_heads=6, num_kv_heads=2, head_dim=12, value_dim=8, window=24, sinks=True, qk_norm="head", output_gate=True, bias=True
)
JOINT_NORM = AttentionConfig(num_heads=6, num_kv_heads=3, head_dim=10, qk_norm="all", rope=None)
MLA = LatentConfig(num_heads=5, kv_lora_rank=14, nope_dim=9, rope_dim=4, value_dim=7)
MLA_LOW_RANK = LatentConfig(num_heads=5, kv_lora_rank=14, nope_dim=9, rope_dim=4, value_dim=7, q_lora_rank=11, rope=Rope())
KDA = KdaConfig(num_heads=3, key_dim=8, value_dim=6, gate_rank=5, conv_width=4)
GATED_DELTA = GatedDeltaConfig(num_key_heads=2, num_value_heads=6, key_dim=8, value_dim=7, conv_width=3)
LIGHTNING = LightningConfig(num_heads=6, head_dim=8, qk_norm=True, norm_groups=3, rope=Rope(dims=4))
DENSE = DenseConfig(50)
MOE = MoeConfig(8, 2, 16, scoring="sigmoid", correction_bias=True, shared_size=24, shared_gate=True)
PLAIN_MOE = MoeConfig(8, 2, 16)

# Every array of a part by name, as checkpoints hold them: an account of parameters that shares nothing with num_params.
ARRAYS = [
    (GQA, {"q": (60, D), "k": (30, D), "v": (30, D), "o": (D, 60)}),
    (
        WINDOW,
        {"q": (72, D), "q_bias": (72,), "k": (24, D), "k_bias": (24,), "v": (16, D), "v_bias": (16,), "o": (D, 48), "gate": (48, D)}
        | {"q_norm": (12,), "k_norm": (12,), "sinks": (6,)},
    ),
    (JOINT_NORM, {"q": (60, D), "k": (30, D), "v": (30, D), "o": (D, 60), "q_norm": (60,), "k_norm": (30,)}),
    (
        MLA,
        {"q": (5 * 13, D), "kv_a": (18, D), "kv_a_norm": (14,), "k_up": (5, 9, 14), "v_up": (5, 7, 14), "o": (D, 35)},
    ),
    (
        MLA_LOW_RANK,
        {"q_a": (11, D), "q_a_norm": (11,), "q_b": (5 * 13, 11)}
        | {"kv_a": (18, D), "kv_a_norm": (14,), "k_up": (5, 9, 14), "v_up": (5, 7, 14), "o": (D, 35)},
    ),
    (
        KDA,
        {"q": (24, D), "k": (24, D), "v": (18, D), "q_conv": (3, 8, 4), "k_conv": (3, 8, 4), "v_conv": (3, 6, 4)}
        | {"f_a": (5, D), "f_b": (24, 5), "b": (3, D), "g_a": (5, D), "g_b": (18, 5), "o": (D, 18)}
        | {"a_log": (3,), "dt_bias": (3, 8), "o_norm": (6,)},
    ),
    (
        GATED_DELTA,
        {"q": (16, D), "k": (16, D), "v": (42, D), "q_conv": (2, 8, 3), "k_conv": (2, 8, 3), "v_conv": (6, 7, 3)}
        | {"z": (42, D), "b": (6, D), "a": (6, D), "o": (D, 42), "a_log": (6,), "dt_bias": (6,), "o_norm": (7,)},
    ),
    (
        LIGHTNING,
        {"q": (48, D), "k": (48, D), "v": (48, D), "gate": (48, D), "o": (D, 48), "o_norm": (48,), "q_norm": (8,), "k_norm": (8,)},
    ),
    (DENSE, {"gate": (50, D), "up": (50, D), "down": (D, 50)}),
    (
        MOE,
        {"router": (8, D), "correction_bias": (8,), "experts_gate": (8, 16, D), "experts_up": (8, 16, D), "experts_down": (8, D, 16)}
        | {"shared_gate_proj": (24, D), "shared_up": (24, D), "shared_down": (D, 24), "shared_gate": (1, D)},
    ),
    (PLAIN_MOE, {"router": (8, D), "experts_gate": (8, 16, D), "experts_up": (8, 16, D), "experts_down": (8, D, 16)}),
]


@pytest.mark.parametrize(("part", "arrays"), ARRAYS, ids=lambda x: getattr(x, "kind", ""))
def test_parameters_are_those_of_the_arrays(part, arrays):
    assert part.num_params(D) == sum(math.prod(shape) for shape in arrays.values())


STATE = "float32"  # whatever the model's dtype

CACHES = [
    (GQA, LayerCache("paged", (TensorSpec("k", 3, 10, "bfloat16"), TensorSpec("v", 3, 10, "bfloat16")))),
    (WINDOW, LayerCache("window", (TensorSpec("k", 2, 12, "bfloat16"), TensorSpec("v", 2, 8, "bfloat16")), 24)),
    (MLA, LayerCache("paged", (TensorSpec("latent", 1, 18, "bfloat16", shared=True),))),
    (
        KDA,
        LayerCache(
            "state",
            (
                TensorSpec("recurrent", 3, 8 * 6, STATE),
                TensorSpec("q_tail", 3, 3 * 8, "bfloat16"),
                TensorSpec("k_tail", 3, 3 * 8, "bfloat16"),
                TensorSpec("v_tail", 3, 3 * 6, "bfloat16"),
            ),
        ),
    ),
    (
        GATED_DELTA,
        LayerCache(
            "state",
            (
                TensorSpec("recurrent", 6, 8 * 7, STATE),
                TensorSpec("q_tail", 2, 2 * 8, "bfloat16"),
                TensorSpec("k_tail", 2, 2 * 8, "bfloat16"),
                TensorSpec("v_tail", 6, 2 * 7, "bfloat16"),
            ),
        ),
    ),
    (LIGHTNING, LayerCache("state", (TensorSpec("recurrent", 6, 8 * 8, STATE),))),
]


@pytest.mark.parametrize(("mixer", "cache"), CACHES, ids=lambda x: getattr(x, "kind", ""))
def test_what_a_layer_keeps(mixer, cache):
    assert mixer.cache("bfloat16") == cache


@pytest.mark.parametrize(
    ("mixer", "length", "kept"),
    [
        (GQA, 31, (0, 31)),
        (WINDOW, 7, (0, 7)),
        (WINDOW, 24, (0, 24)),
        (WINDOW, 3 * 24 + 7, (55, 79)),  # the window only, whatever lies before it
        (KDA, 1, (0, 1)),
        (KDA, 31, (30, 31)),
        (LIGHTNING, 0, (0, 0)),
    ],
)
def test_tokens_that_a_layer_keeps(mixer, length, kept):
    assert mixer.cache("float32").kept(length) == kept


@pytest.mark.parametrize(
    ("part", "axes"),
    [
        (GQA, {"heads": 6, "kv_heads": 3}),
        (MLA, {"heads": 5}),  # the latent has no heads to split
        (KDA, {"heads": 3}),
        (GATED_DELTA, {"heads": 6, "kv_heads": 2}),
        (LIGHTNING, {"heads": 6}),
        (DENSE, {"mlp": 50}),
        (MOE, {"experts": 8, "expert_mlp": 16, "mlp": 24}),
        (PLAIN_MOE, {"experts": 8, "expert_mlp": 16}),
    ],
)
def test_what_a_mesh_may_split(part, axes):
    assert dict(part.axis_sizes()) == axes


def test_scale_of_the_softmax():
    assert GQA.softmax_scale == 10**-0.5
    assert AttentionConfig(4, 4, 16, scale=0.5).softmax_scale == 0.5
    assert MLA.softmax_scale == 13**-0.5  # of the whole key, the shared part included


PARTS = [part for part, _ in ARRAYS]


@pytest.mark.parametrize("mixer", [p for p in PARTS if not isinstance(p, DenseConfig | MoeConfig)], ids=lambda p: p.kind)
@pytest.mark.parametrize("mlp", [DENSE, MOE], ids=lambda p: p.kind)
def test_a_layer_survives_its_mapping(mixer, mlp):
    layer = Layer(mixer, mlp, (2.0, 0.5), (1.5, 1.0))
    assert layer_from_dict("block", layer_to_dict(layer)) == layer


def test_rope_survives_its_mapping():
    rope = Rope(5e5, 8, RopeScaling("llama3", 8.0, 1.0, 4.0, 8192))
    layer = Layer(AttentionConfig(4, 2, 16, rope=rope), DENSE)
    assert layer_from_dict("block", layer_to_dict(layer)) == layer
    without = Layer(AttentionConfig(4, 2, 16, rope=None), DENSE)
    assert layer_from_dict("block", layer_to_dict(without)).mixer.rope is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AttentionConfig(6, 4, 10), "model.attention.num_kv_heads=4"),
        (lambda: AttentionConfig(6, True, 10), "model.attention.num_kv_heads=True"),
        (lambda: AttentionConfig(6, 3, 10, window=0), "model.attention.window=0"),
        (lambda: AttentionConfig(6, 3, 10, value_dim=-1), "model.attention.value_dim=-1"),
        (lambda: AttentionConfig(6, 3, 10, qk_norm="layer"), "model.attention.qk_norm='layer'"),
        (lambda: AttentionConfig(6, 3, 10, rope=Rope(dims=12)), "model.attention.rope.dims=12"),
        (lambda: AttentionConfig(6, 3, 9), "model.attention.rope.dims=9"),
        (lambda: LatentConfig(5, 0, 9, 4, 7), "model.mla.kv_lora_rank=0"),
        (lambda: LatentConfig(5, 14, 9, 4, 7, q_lora_rank=0), "model.mla.q_lora_rank=0"),
        (lambda: LatentConfig(5, 14, 9, 5, 7, rope=Rope()), "model.mla.rope.dims=5"),
        (lambda: KdaConfig(3, 8, 6, 5, conv_width=1), "model.kda.conv_width=1"),
        (lambda: KdaConfig(3, 8, 6, 1.5), "model.kda.gate_rank=1.5"),
        (lambda: GatedDeltaConfig(4, 6, 8, 8), "model.gated_delta.num_key_heads=4"),
        (lambda: LightningConfig(6, 8, norm_groups=4), "model.lightning.norm_groups=4"),
        (lambda: LightningConfig(6, 8, activation="relu"), "model.lightning.activation='relu'"),
        (lambda: LightningConfig(6, 8, rope=Rope(dims=3)), "model.lightning.rope.dims=3"),
        (lambda: DenseConfig(0), "model.dense.intermediate_size=0"),
        (lambda: DenseConfig(8, "gelu"), "model.dense.activation='gelu'"),
        (lambda: MoeConfig(8, 9, 16), "model.moe.top_k=9"),
        (lambda: MoeConfig(8, 3, 16, num_groups=4), "model.moe.top_k=3"),
        (lambda: MoeConfig(8, 2, 16, shared_gate=True), "model.moe.shared_size=0"),
        (lambda: RopeScaling("yarn", 4.0), "model.rope.scaling.kind='yarn'"),
    ],
)
def test_impossible_parts_are_refused(make, message):
    with pytest.raises(InvalidInput) as error:
        make()
    assert str(error.value).startswith(message)
