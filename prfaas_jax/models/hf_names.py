"""Which tensor of a Hugging Face file becomes which parameter: names, splits and reorderings, layer by layer."""

import functools
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from prfaas_jax.models.config import ModelConfig
from prfaas_jax.models.layer_config import (
    AttentionConfig,
    GatedDeltaConfig,
    KdaConfig,
    LatentConfig,
    Layer,
    LightningConfig,
    MoeConfig,
)
from prfaas_jax.models.stacking import Part, Shape, Source, layer_place

# Buffers that some files carry and that follow from the config.
_DERIVED = r"model\.layers\.\d+\.self_attn\.(rotary_emb\.inv_freq|slope_rate|query_decay|key_decay|diagonal_decay)"
# What predicts more than the next token, or sees: not part of the text model.
_OTHER_MODELS = r"mtp\..*|model\.mtp\..*|model\.visual\..*"

_EMBED, LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"

# Spelling of the mixtures whose repositories go back to Mixtral.
_MIXTRAL = {".gate_proj.": ".w1.", ".down_proj.": ".w2.", ".up_proj.": ".w3."}


def hf_sources(config: ModelConfig, architecture: str) -> list[Source]:
    """The tensors that make up a model of one architecture (hf_config.ARCHITECTURES), each with what becomes of it."""
    spell = _SPELLINGS.get(architecture, _as_is)
    sources = [_whole(_EMBED, "embed"), _whole("model.norm.weight", "final_norm/weight")]
    if not config.tie_embeddings:
        sources.append(_whole(LM_HEAD, "lm_head"))
    for number, layer in enumerate(config.layers):
        prefix, index = layer_place(config, number)
        for source in _layer(config, layer, fused_delta=architecture == "Qwen3NextForCausalLM"):
            parts = tuple(Part(f"{prefix}/{part.name}", index + part.index, part.take) for part in source.parts)
            sources.append(Source((f"model.layers.{number}.{source.names[0]}",), parts, source.shapes))
    return [Source(spell(source.names[0]), source.parts, source.shapes) for source in sources]


def hf_skipped(config: ModelConfig, fields: Mapping[str, Any]) -> re.Pattern[str]:
    """Full names of the tensors that a file may hold besides; `fields` is its config.json.

    Layers that predict further tokens stand behind the last layer in DeepSeek's files.
    """
    further = range(config.num_layers, config.num_layers + (fields.get("num_nextn_predict_layers") or 0))
    return re.compile("|".join([_DERIVED, _OTHER_MODELS, *(rf"model\.layers\.{n}\..*" for n in further)]))


def _as_is(name: str) -> tuple[str, ...]:
    return (name,)


def _mixtral(name: str) -> tuple[str, ...]:
    """Feed-forward parts under another name, or under this one; experts as w1, w2, w3."""
    if ".experts." in name:
        name = functools.reduce(lambda text, pair: text.replace(*pair), _MIXTRAL.items(), name)
    return tuple(dict.fromkeys((name.replace(".mlp.", ".block_sparse_moe."), name)))


def _wrapped(name: str) -> tuple[str, ...]:
    """A text model inside a multimodal one has one more prefix."""
    return (name, name.replace("model.", "model.language_model.", 1))


def _qwen_moe(name: str) -> tuple[str, ...]:
    return (name.replace(".shared_experts.", ".shared_expert."),)


EMBED = _wrapped(_EMBED)

_SPELLINGS: dict[str, Callable[[str], tuple[str, ...]]] = {
    "KimiLinearForCausalLM": _mixtral,
    "MiniMaxForCausalLM": _mixtral,
    "Qwen3_5ForCausalLM": _wrapped,
    "Qwen3NextForCausalLM": _qwen_moe,
}


def _whole(tensor: str, parameter: str, *shapes: Shape) -> Source:
    return Source((tensor,), (Part(parameter),), shapes)


def _weights(names: Mapping[str, str], scope: str, mixer: str) -> Iterator[Source]:
    """Matrices and norms that are taken as they are: parameter -> tensor."""
    for parameter, tensor in names.items():
        yield _whole(f"{scope}.{tensor}.weight", f"{mixer}/{parameter}/weight")


def _same(*names: str) -> dict[str, str]:
    return {name: name for name in names}


def _split(tensor: str, shape: Shape, groups: int, sizes: Mapping[str, int]) -> Source:
    """A tensor whose first axis is `groups` times (some rows of the first parameter, some of the second, ..)."""
    parts, start = [], 0
    for parameter, size in sizes.items():
        parts.append(Part(parameter, take=functools.partial(_rows, groups=groups, start=start, stop=start + size)))
        start += size
    return Source((tensor,), tuple(parts), (shape,))


def _rows(values: np.ndarray, groups: int, start: int, stop: int) -> np.ndarray:
    return values.reshape(groups, values.shape[0] // groups, -1)[:, start:stop]


def half_rotation(values: np.ndarray, groups: int, rope_dim: int) -> np.ndarray:
    """Rows [groups * H, in] whose last `rope_dim` of each group are interleaved pairs (0, 1), (2, 3), .. -> pairs (i, i + rope_dim/2)."""
    rows = values.reshape(groups, values.shape[0] // groups, -1)
    kept, pairs = rows[:, :-rope_dim], rows[:, -rope_dim:]
    return np.concatenate([kept, pairs[:, 0::2], pairs[:, 1::2]], axis=1).reshape(values.shape)


def _layer(config: ModelConfig, layer: Layer, fused_delta: bool) -> Iterator[Source]:
    norms = {"mixer_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    if config.post_norms:
        norms |= {
            "mixer_post_norm": "post_attention_layernorm",
            "mlp_norm": "pre_feedforward_layernorm",
            "mlp_post_norm": "post_feedforward_layernorm",
        }
    for parameter, tensor in norms.items():
        yield _whole(f"{tensor}.weight", f"{parameter}/weight")
    match layer.mixer:
        case AttentionConfig() as mixer:
            yield from _attention(config, mixer)
        case LatentConfig() as mixer:
            yield from _latent(config, mixer)
        case KdaConfig() as mixer:
            yield from _kda(mixer)
        case GatedDeltaConfig() as mixer:
            yield from _gated_delta(config, mixer, fused_delta)
        case LightningConfig() as mixer:
            yield from _lightning(config, mixer)
    if isinstance(layer.mlp, MoeConfig):
        yield from _moe(layer.mlp, config.hidden_size)
    else:
        yield from _weights(_same("gate_proj", "up_proj", "down_proj"), "mlp", "mlp")


def _attention(config: ModelConfig, mixer: AttentionConfig) -> Iterator[Source]:
    norms = () if mixer.qk_norm == "none" else ("q_norm", "k_norm")
    yield from _weights(_same("k_proj", "v_proj", "o_proj", *norms), "self_attn", "mixer")
    rows = mixer.num_heads * mixer.head_dim
    if mixer.output_gate:
        heads = {"mixer/q_proj/weight": mixer.head_dim, "mixer/gate_proj/weight": mixer.values}
        yield _split("self_attn.q_proj.weight", (rows + mixer.num_heads * mixer.values, config.hidden_size), mixer.num_heads, heads)
    else:
        yield from _weights(_same("q_proj"), "self_attn", "mixer")
    if mixer.sinks:
        yield _whole("self_attn.attention_sink_bias", "mixer/sinks")


def _latent(config: ModelConfig, mixer: LatentConfig) -> Iterator[Source]:
    def rotated(tensor: str, parameter: str, groups: int) -> Source:
        # The kernels here rotate halves; these files are written for interleaved pairs.
        take = functools.partial(half_rotation, groups=groups, rope_dim=mixer.rope_dim) if mixer.rope else None
        return Source((f"self_attn.{tensor}.weight",), (Part(f"mixer/{parameter}/weight", take=take),))

    if mixer.q_lora_rank is None:
        yield rotated("q_proj", "q_proj", mixer.num_heads)
    else:
        yield from _weights({"q_a_proj": "q_a_proj", "q_a_norm": "q_a_layernorm"}, "self_attn", "mixer")
        yield rotated("q_b_proj", "q_b_proj", mixer.num_heads)
    yield rotated("kv_a_proj_with_mqa", "kv_a_proj", 1)
    yield from _weights({"kv_a_norm": "kv_a_layernorm", "o_proj": "o_proj"}, "self_attn", "mixer")
    shape = (mixer.num_heads * (mixer.nope_dim + mixer.value_dim), mixer.kv_lora_rank)
    yield _split("self_attn.kv_b_proj.weight", shape, mixer.num_heads, {"mixer/k_up": mixer.nope_dim, "mixer/v_up": mixer.value_dim})


def _kda(mixer: KdaConfig) -> Iterator[Source]:
    projections = ("q_proj", "k_proj", "v_proj", "f_a_proj", "f_b_proj", "b_proj", "g_a_proj", "g_b_proj", "o_norm", "o_proj")
    yield from _weights(_same(*projections), "self_attn", "mixer")
    for name, dim in (("q", mixer.key_dim), ("k", mixer.key_dim), ("v", mixer.value_dim)):
        yield _whole(f"self_attn.{name}_conv1d.weight", f"mixer/{name}_conv", (mixer.num_heads * dim, 1, mixer.conv_width))
    yield _whole("self_attn.A_log", "mixer/a_log", (1, 1, mixer.num_heads, 1), (mixer.num_heads,))
    yield _whole("self_attn.dt_bias", "mixer/dt_bias", (mixer.num_heads * mixer.key_dim,))


def _gated_delta(config: ModelConfig, mixer: GatedDeltaConfig, fused: bool) -> Iterator[Source]:
    keys, values = mixer.num_key_heads * mixer.key_dim, mixer.num_value_heads * mixer.value_dim
    per_key = mixer.num_value_heads // mixer.num_key_heads
    qkv = {f"mixer/{n}_proj/weight": size for n, size in (("q", keys), ("k", keys), ("v", values))}
    if fused:
        # Per key head: its query and key, then values and gates of the value heads that it serves.
        width = per_key * mixer.value_dim
        sizes = (("q", mixer.key_dim), ("k", mixer.key_dim), ("v", width), ("z", width))
        heads = {f"mixer/{n}_proj/weight": size for n, size in sizes}
        yield _split("linear_attn.in_proj_qkvz.weight", (2 * (keys + values), config.hidden_size), mixer.num_key_heads, heads)
        heads = dict.fromkeys(("mixer/b_proj/weight", "mixer/a_proj/weight"), per_key)
        yield _split("linear_attn.in_proj_ba.weight", (2 * mixer.num_value_heads, config.hidden_size), mixer.num_key_heads, heads)
    else:
        yield _split("linear_attn.in_proj_qkv.weight", (2 * keys + values, config.hidden_size), 1, qkv)
        yield from _weights({f"{n}_proj": f"in_proj_{n}" for n in "zba"}, "linear_attn", "mixer")
    convs = {"mixer/q_conv": keys, "mixer/k_conv": keys, "mixer/v_conv": values}
    yield _split("linear_attn.conv1d.weight", (2 * keys + values, 1, mixer.conv_width), 1, convs)
    yield from _weights({"o_norm": "norm", "o_proj": "out_proj"}, "linear_attn", "mixer")
    yield _whole("linear_attn.A_log", "mixer/a_log")
    yield _whole("linear_attn.dt_bias", "mixer/dt_bias")


def _lightning(config: ModelConfig, mixer: LightningConfig) -> Iterator[Source]:
    heads = {f"mixer/{n}_proj/weight": mixer.head_dim for n in "qkv"}
    yield _split("self_attn.qkv_proj.weight", (3 * mixer.num_heads * mixer.head_dim, config.hidden_size), mixer.num_heads, heads)
    yield from _weights({"gate_proj": "output_gate", "o_norm": "norm", "o_proj": "out_proj"}, "self_attn", "mixer")


def _moe(mlp: MoeConfig, hidden_size: int) -> Iterator[Source]:
    yield _whole("mlp.gate.weight", "mlp/router")
    if mlp.correction_bias:
        yield _whole("mlp.gate.e_score_correction_bias", "mlp/correction_bias")
    for expert in range(mlp.num_experts):
        for name in ("gate_proj", "up_proj", "down_proj"):
            shape = (hidden_size, mlp.intermediate_size) if name == "down_proj" else (mlp.intermediate_size, hidden_size)
            part = Part(f"mlp/experts/{name}", (expert,), np.transpose)
            yield Source((f"mlp.experts.{expert}.{name}.weight",), (part,), (shape,))
    if mlp.shared_size:
        yield from _weights({f"shared/{n}": f"shared_experts.{n}" for n in ("gate_proj", "up_proj", "down_proj")}, "mlp", "mlp")
    if mlp.shared_gate:
        yield _whole("mlp.shared_expert_gate.weight", "mlp/shared_gate")
