"""The fields of a Hugging Face config.json, architecture by architecture -> layers of a ModelConfig. No jax.

Each reader follows the class of that name in transformers: what that class computes is either computed here too or refused by name.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from prfaas_jax.models.hf_fields import Fields, read_rope
from prfaas_jax.models.layer_config import (
    AttentionConfig,
    DenseConfig,
    GatedDeltaConfig,
    KdaConfig,
    LatentConfig,
    Layer,
    LightningConfig,
    MixerConfig,
    MlpConfig,
    MoeConfig,
    Rope,
)

# Options that change the mathematics, and the only value of each that is computed; absent or null means this value.
_ONLY: dict[str, Any] = {
    "hidden_act": "silu",
    "mlp_bias": False,
    "attention_bias": False,
    "use_sliding_window": False,
    "rope_interleaved": False,
    "quantization_config": None,
    "final_logit_softcapping": None,
    "attn_logit_softcapping": None,
}

# Of mixtures with sigmoid scores (DeepSeek's, and those that descend from it), as their own repositories spell them.
_ONLY_SIGMOID = {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_router_activation_func": "sigmoid"}

FULL, LINEAR, SLIDING = "full_attention", "linear_attention", "sliding_attention"


def _moe(fields: Fields, **changes: Any) -> MoeConfig:
    """Routed experts as most classes spell them; `changes` says what is different."""
    values = {
        "num_experts": fields.count("num_experts", "num_local_experts", "n_routed_experts"),
        "top_k": fields.count("num_experts_per_tok", "num_experts_per_token"),
        "intermediate_size": fields.get("moe_intermediate_size"),
    }
    return MoeConfig(**values | changes)


def _sigmoid_moe(fields: Fields) -> MoeConfig:
    """DeepSeek's router: sigmoid scores, a correction bias, groups of experts, shared experts without a gate."""
    width = fields.count("moe_intermediate_size")
    return _moe(
        fields,
        scoring="sigmoid",
        correction_bias=True,
        num_groups=fields.count("n_group", "num_expert_group"),
        top_groups=fields.count("topk_group"),
        renormalize=bool(fields.need("norm_topk_prob", "moe_renormalize")),
        # MiMo's file has null for both: no factor, no shared expert.
        scale=fields.number("routed_scaling_factor", 1.0),
        shared_size=width * fields.get("n_shared_experts", "num_shared_experts", default=0),
    )


def _dense_first(fields: Fields, default: int) -> list[str]:
    """Which layers are "dense" and which "sparse", of classes whose first layers are dense."""
    fields.only({"moe_layer_freq": 1})
    if fields.get("mlp_layer_types") is not None:
        return fields.per_layer("mlp_layer_types", "dense", "sparse")
    dense = fields.get("first_k_dense_replace", default=default)
    return ["dense" if i < dense else "sparse" for i in range(fields.count("num_hidden_layers"))]


def _sparse_steps(fields: Fields) -> list[bool]:
    """Which layers are mixtures, of classes that say so by a step and a list of exceptions (Qwen)."""
    step, dense = fields.get("decoder_sparse_step", default=1), fields.get("mlp_only_layers", default=[])
    return [i not in dense and (i + 1) % step == 0 for i in range(fields.count("num_hidden_layers"))]


def _intervals(fields: Fields) -> list[str]:
    """Full attention at the end of every interval, linear attention elsewhere (Qwen3-Next, Qwen3.5)."""
    if fields.get("layer_types") is not None:
        return fields.per_layer("layer_types", FULL, LINEAR)
    every = fields.get("full_attention_interval", default=4)
    return [LINEAR if (i + 1) % every else FULL for i in range(fields.count("num_hidden_layers"))]


def _stack(kinds: Iterable[Any], mixers: Mapping[Any, MixerConfig], mlps: Iterable[MlpConfig]) -> tuple[Layer, ...]:
    return tuple(Layer(mixers[kind], mlp) for kind, mlp in zip(kinds, mlps, strict=True))


def _heads(fields: Fields) -> tuple[int, int]:
    """Query and kv heads; without the latter every query head has its own."""
    heads = fields.count("num_attention_heads")
    return heads, fields.get("num_key_value_heads", default=heads)


def _head_dim(fields: Fields) -> int:
    return fields.get("head_dim", default=fields.count("hidden_size") // fields.count("num_attention_heads"))


def _plain_layers(fields: Fields, head_dim: int, mlps: Iterable[MlpConfig], **options: Any) -> dict[str, Any]:
    """Attention over everything in every layer."""
    mixer = AttentionConfig(*_heads(fields), head_dim, rope=read_rope(fields, head_dim), **options)
    kinds = fields.per_layer("layer_types", FULL) if fields.get("layer_types") else [FULL] * fields.count("num_hidden_layers")
    return {"layers": _stack(kinds, {FULL: mixer}, mlps)}


def _dense(fields: Fields, **options: Any) -> list[MlpConfig]:
    return [DenseConfig(fields.count("intermediate_size"), **options)] * fields.count("num_hidden_layers")


def _llama(fields: Fields) -> dict[str, Any]:
    fields.only({"sliding_window": None})
    return _plain_layers(fields, _head_dim(fields), _dense(fields))


def _qwen3(fields: Fields) -> dict[str, Any]:
    # A window may be written; it takes effect only with use_sliding_window. The head size does not follow from hidden_size.
    return _plain_layers(fields, fields.count("head_dim"), _dense(fields), qk_norm="head")


def _qwen3_moe(fields: Fields) -> dict[str, Any]:
    moe = _moe(fields, renormalize=bool(fields.get("norm_topk_prob", default=False)))
    mlps = [moe if sparse else DenseConfig(fields.count("intermediate_size")) for sparse in _sparse_steps(fields)]
    return _plain_layers(fields, _head_dim(fields), mlps, qk_norm="head")


def _gated_delta_layers(fields: Fields, mlps: Iterable[MlpConfig]) -> dict[str, Any]:
    """Gated DeltaNet with output-gated attention in between."""
    fields.only({"attn_output_gate": True})
    head_dim = fields.count("head_dim")
    gated = AttentionConfig(
        *_heads(fields), head_dim, rope=read_rope(fields, head_dim, partial=0.25), qk_norm="head", output_gate=True
    )  # fmt: skip
    delta = GatedDeltaConfig(
        fields.count("linear_num_key_heads"),
        fields.count("linear_num_value_heads"),
        fields.count("linear_key_head_dim"),
        fields.count("linear_value_head_dim"),
        fields.count("linear_conv_kernel_dim"),
    )
    return {"layers": _stack(_intervals(fields), {FULL: gated, LINEAR: delta}, mlps), "norm_offset": True}


def _qwen3_next(fields: Fields) -> dict[str, Any]:
    moe = _moe(
        fields,
        renormalize=bool(fields.get("norm_topk_prob", default=True)),
        shared_size=fields.count("shared_expert_intermediate_size"),
        shared_gate=True,
    )
    mlps = [moe if sparse else DenseConfig(fields.count("intermediate_size")) for sparse in _sparse_steps(fields)]
    return _gated_delta_layers(fields, mlps)


def _qwen3_5(fields: Fields) -> dict[str, Any]:
    return _gated_delta_layers(fields, _dense(fields))


def _latent(fields: Fields, rope: Rope | None) -> LatentConfig:
    return LatentConfig(
        fields.count("num_attention_heads"),
        fields.count("kv_lora_rank"),
        fields.count("qk_nope_head_dim"),
        fields.count("qk_rope_head_dim"),
        fields.count("v_head_dim"),
        fields.get("q_lora_rank"),
        rope,
    )


def _dense_or_moe(fields: Fields, default: int) -> list[MlpConfig]:
    parts: dict[str, MlpConfig] = {"dense": DenseConfig(fields.count("intermediate_size")), "sparse": _sigmoid_moe(fields)}
    return [parts[kind] for kind in _dense_first(fields, default)]


def _deepseek_v3(fields: Fields) -> dict[str, Any]:
    # Interleaved pairs are what the import of the weights puts in order.
    fields.only({**_ONLY_SIGMOID, "rope_interleave": True})
    mlps = _dense_or_moe(fields, 3)
    mixer = _latent(fields, read_rope(fields, fields.count("qk_rope_head_dim")))
    return {"layers": _stack([FULL] * len(mlps), {FULL: mixer}, mlps)}


def _kimi_linear(fields: Fields) -> dict[str, Any]:
    fields.only({**_ONLY_SIGMOID, "mla_use_nope": True, "num_nextn_predict_layers": 0})
    linear = fields.child("linear_attn_config")
    head_dim = linear.get("head_dim") or fields.count("linear_head_dim")
    kda = KdaConfig(
        linear.get("num_heads") or fields.count("linear_num_heads"),
        head_dim,
        head_dim,
        gate_rank=head_dim,
        conv_width=linear.get("short_conv_kernel_size") or fields.count("linear_conv_kernel_dim"),
    )
    return {"layers": _stack(_kimi_kinds(fields, linear), {FULL: _latent(fields, None), LINEAR: kda}, _dense_or_moe(fields, 1))}


def _kimi_kinds(fields: Fields, linear: Fields) -> list[str]:
    """The kinds of the layers; never the class's default, which is not the pattern of the published model."""
    if fields.get("layer_types") is not None:
        return fields.per_layer("layer_types", FULL, LINEAR)
    # Here layers count from one.
    full, kda = (linear.get(name, default=[]) for name in ("full_attn_layers", "kda_layers"))
    numbers = range(1, fields.count("num_hidden_layers") + 1)
    if sorted([*full, *kda]) != list(numbers):
        raise fields.refusal(
            "linear_attn_config", {"full_attn_layers": full, "kda_layers": kda}, f"each of the layers 1..{len(numbers)} in one of them"
        )
    return [FULL if number in full else LINEAR for number in numbers]


def _gemma3(fields: Fields) -> dict[str, Any]:
    fields.only({"hidden_activation": "gelu_pytorch_tanh", "use_bidirectional_attention": False})
    head_dim, scalar = fields.count("head_dim"), fields.count("query_pre_attn_scalar")
    if fields.get("layer_types") is not None:
        kinds = fields.per_layer("layer_types", FULL, SLIDING)
    else:
        every = fields.get("sliding_window_pattern", "_sliding_window_pattern", default=6)
        kinds = [SLIDING if (i + 1) % every else FULL for i in range(fields.count("num_hidden_layers"))]
    full_rope = read_rope(fields, head_dim, layer_type=FULL, base=1e6)
    near_rope = read_rope(fields, head_dim, layer_type=SLIDING, theta="rope_local_base_freq", scaled=False)
    scale = None if scalar == head_dim else scalar**-0.5
    full = AttentionConfig(*_heads(fields), head_dim, rope=full_rope, qk_norm="head", scale=scale)
    # Their window counts the current token.
    window = fields.count("sliding_window") - 1
    near = AttentionConfig(*_heads(fields), head_dim, rope=near_rope, qk_norm="head", scale=scale, window=window)
    return {
        "layers": _stack(kinds, {FULL: full, SLIDING: near}, _dense(fields, activation="gelu_tanh")),
        "norm_offset": True,
        "post_norms": True,
        "embed_scale": fields.count("hidden_size") ** 0.5,
        "tie_embeddings": bool(fields.get("tie_word_embeddings", default=True)),
    }


def _mimo_v2_flash(fields: Fields) -> dict[str, Any]:
    heads, kv_heads = _heads(fields)
    head_dim, value_dim = fields.count("head_dim"), fields.count("v_head_dim")
    fields.only({**_ONLY_SIGMOID, "add_swa_attention_sink_bias": True, "add_full_attention_sink_bias": False})
    fields.only({"swa_num_attention_heads": heads, "swa_num_key_value_heads": 2 * kv_heads})
    fields.only({"swa_head_dim": head_dim, "swa_v_head_dim": value_dim})
    values: dict[str, Any] = {"value_dim": value_dim, "value_scale": fields.number("attention_value_scale", 1.0)}
    full_rope = read_rope(fields, head_dim, layer_type=FULL, base=5e6, partial=0.334)
    near_rope = read_rope(fields, head_dim, layer_type=SLIDING, theta="swa_rope_theta", partial=0.334)
    full = AttentionConfig(heads, kv_heads, head_dim, rope=full_rope, **values)
    # `sliding_window` counts the current token, `sliding_window_size` does not.
    window = fields.get("sliding_window_size") or fields.count("sliding_window") - 1
    near = AttentionConfig(heads, 2 * kv_heads, head_dim, rope=near_rope, window=window, sinks=True, **values)
    mlps: dict[str, MlpConfig] = {"dense": DenseConfig(fields.count("intermediate_size")), "sparse": _sigmoid_moe(fields)}
    kinds = _named_or_flagged(fields, "layer_types", "hybrid_layer_pattern", (FULL, SLIDING))
    sparse = _named_or_flagged(fields, "mlp_layer_types", "moe_layer_freq", ("dense", "sparse"))
    return {"layers": _stack(kinds, {FULL: full, SLIDING: near}, [mlps[kind] for kind in sparse])}


def _named_or_flagged(fields: Fields, named: str, flagged: str, kinds: tuple[str, str]) -> list[str]:
    """One of two kinds per layer, as names (transformers) or as 0 and 1 (the published file); never the class's default."""
    if fields.get(named) is not None:
        return fields.per_layer(named, *kinds)
    return [kinds[flag] for flag in fields.per_layer(flagged, 0, 1)]


def _minimax(fields: Fields) -> dict[str, Any]:
    head_dim = _head_dim(fields)
    fields.only({"sliding_window": None, "rotary_dim": head_dim})
    heads, kv_heads = _heads(fields)
    mixers: dict[str, MixerConfig] = {
        FULL: AttentionConfig(heads, kv_heads, head_dim, rope=read_rope(fields, head_dim, base=1e6)),
        LINEAR: LightningConfig(heads, head_dim),
    }
    moe = _moe(fields, intermediate_size=fields.count("intermediate_size"))

    def scales(part: str) -> tuple[float, float]:
        alpha, beta = (fields.number(f"{part}_{which}_factor") for which in ("alpha", "beta"))
        return alpha, beta

    mixer_scales = {FULL: scales("full_attn"), LINEAR: scales("linear_attn")}
    kinds = fields.per_layer("layer_types", FULL, LINEAR)
    return {
        "layers": tuple(Layer(mixers[kind], moe, mixer_scales[kind], scales("mlp")) for kind in kinds),
        "normalized_residual": True,
    }


# Architecture -> the fields of ModelConfig that are its own.
READERS: dict[str, Callable[[Fields], dict[str, Any]]] = {
    "LlamaForCausalLM": _llama,
    "Qwen3ForCausalLM": _qwen3,
    "Qwen3MoeForCausalLM": _qwen3_moe,
    "Qwen3NextForCausalLM": _qwen3_next,
    "Qwen3_5ForCausalLM": _qwen3_5,
    "DeepseekV3ForCausalLM": _deepseek_v3,
    "KimiLinearForCausalLM": _kimi_linear,
    "Gemma3ForCausalLM": _gemma3,
    "MiMoV2FlashForCausalLM": _mimo_v2_flash,
    "MiniMaxForCausalLM": _minimax,
}


def read_family(architecture: str, fields: Fields) -> dict[str, Any]:
    """Layers, and whatever else of ModelConfig depends on the architecture; raises InvalidInput naming what is not computed."""
    fields.only(_ONLY)
    return READERS[architecture](fields)
