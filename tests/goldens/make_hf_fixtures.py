"""Makes tests/goldens/hf/<name>/: tiny random Hugging Face models with float32 logits and greedy continuations to match.

Needs torch and transformers (the "oracle" extra): `python tests/goldens/make_hf_fixtures.py [name ..]`. The results are committed.

Each model is small where that costs nothing, and awkward where mistakes could hide: grouped kv heads, keys and values of different
widths, a window that divides nothing, dense first layers, several expert groups, layer stacks with a head, a body and a tail, and an
epsilon so large that a norm which should have another one shows.
"""

import copy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import transformers as hf

OUT = Path(__file__).parent / "hf"
NEW_TOKENS = 12

DENSE = {"vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 512, "eos_token_id": 2}
HYBRID = {"vocab_size": 128, "hidden_size": 32, "max_position_embeddings": 512, "eos_token_id": None, "pad_token_id": None}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
FULL, LINEAR, SLIDING = "full_attention", "linear_attention", "sliding_attention"
MLA = {"kv_lora_rank": 24, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12}
DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 12,
    "linear_value_head_dim": 16,
    "head_dim": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
}


def llama_tied() -> torch.nn.Module:
    return hf.LlamaForCausalLM(
        hf.LlamaConfig(**DENSE, num_attention_heads=8, num_key_value_heads=4, intermediate_size=96, tie_word_embeddings=True)
    )


def llama_rope_scaled() -> torch.nn.Module:
    return hf.LlamaForCausalLM(
        hf.LlamaConfig(
            **DENSE,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=80,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "llama3", "rope_theta": 500.0, **LLAMA3},
        )
    )


def qwen3() -> torch.nn.Module:
    return hf.Qwen3ForCausalLM(
        hf.Qwen3Config(
            **DENSE,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=24,
            intermediate_size=96,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        )
    )


def qwen3_moe() -> torch.nn.Module:
    return hf.Qwen3MoeForCausalLM(
        hf.Qwen3MoeConfig(
            **HYBRID,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=24,
            intermediate_size=40,
            moe_intermediate_size=24,
            num_experts=8,
            num_experts_per_tok=3,
            norm_topk_prob=False,
            mlp_only_layers=[0],
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        )
    )


def deepseek_v3() -> torch.nn.Module:
    return hf.DeepseekV3ForCausalLM(
        hf.DeepseekV3Config(
            **HYBRID,
            **MLA,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            q_lora_rank=20,
            intermediate_size=40,
            moe_intermediate_size=20,
            first_k_dense_replace=1,
            n_routed_experts=8,
            n_group=4,
            topk_group=2,
            num_experts_per_tok=3,
            n_shared_experts=2,
            num_mtp_layers=0,
            rms_norm_eps=1e-3,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        )
    )


def kimi_linear() -> torch.nn.Module:
    return hf.KimiLinearForCausalLM(
        hf.KimiLinearConfig(
            **HYBRID,
            **MLA,
            num_hidden_layers=6,
            layer_types=[LINEAR, LINEAR, FULL, LINEAR, FULL, FULL],
            num_attention_heads=4,
            num_key_value_heads=4,
            linear_num_heads=4,
            linear_head_dim=16,
            intermediate_size=40,
            moe_intermediate_size=16,
            num_local_experts=6,
            num_experts_per_tok=2,
            rms_norm_eps=1e-3,
        )
    )


def qwen3_next() -> torch.nn.Module:
    return hf.Qwen3NextForCausalLM(
        hf.Qwen3NextConfig(
            **HYBRID,
            **DELTA,
            num_hidden_layers=5,
            layer_types=[LINEAR, LINEAR, FULL, LINEAR, FULL],
            mlp_only_layers=[0],
            moe_intermediate_size=16,
            shared_expert_intermediate_size=12,
            num_experts=6,
            num_experts_per_tok=2,
            rms_norm_eps=1e-3,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25},
        )
    )


def qwen3_5() -> torch.nn.Module:
    return hf.Qwen3_5ForCausalLM(
        hf.Qwen3_5TextConfig(
            **HYBRID,
            **DELTA,
            num_hidden_layers=5,
            layer_types=[LINEAR, FULL, LINEAR, FULL, LINEAR],
            tie_word_embeddings=True,
            rms_norm_eps=1e-3,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25},
        )
    )


def gemma3() -> torch.nn.Module:
    return hf.Gemma3ForCausalLM(
        hf.Gemma3TextConfig(
            **HYBRID,
            num_hidden_layers=7,
            layer_types=[SLIDING, SLIDING, FULL, SLIDING, SLIDING, FULL, SLIDING],
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            query_pre_attn_scalar=20,
            sliding_window=14,
            intermediate_size=40,
            rope_parameters={
                FULL: {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                SLIDING: {"rope_type": "default", "rope_theta": 1e4},
            },
        )
    )


def mimo_v2_flash() -> torch.nn.Module:
    config = hf.MiMoV2FlashConfig(
        **HYBRID,
        num_hidden_layers=6,
        layer_types=[FULL, SLIDING, FULL, SLIDING, FULL, SLIDING],
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=24,
        v_head_dim=16,
        sliding_window=14,
        intermediate_size=40,
        moe_intermediate_size=12,
        n_routed_experts=4,
        num_experts_per_tok=2,
    )
    config._attn_implementation = "eager"  # the only one with sinks
    return hf.MiMoV2FlashForCausalLM(config)


def minimax() -> torch.nn.Module:
    return hf.MiniMaxForCausalLM(
        hf.MiniMaxConfig(
            **HYBRID,
            num_hidden_layers=5,
            layer_types=[LINEAR, FULL, LINEAR, FULL, LINEAR],
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=12,
            intermediate_size=24,
            num_local_experts=4,
            num_experts_per_tok=2,
            block_size=16,
            full_attn_alpha_factor=1.7,
            full_attn_beta_factor=0.9,
            linear_attn_alpha_factor=1.3,
            linear_attn_beta_factor=1.1,
            mlp_alpha_factor=0.8,
            mlp_beta_factor=1.2,
            rms_norm_eps=1e-3,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        )
    )


DENSE_LENGTHS, HYBRID_LENGTHS = (1, 17, 70, 300), (1, 15, 70, 131)
# (maker, seed, prompt lengths); with these seeds float32 rounding stays below 3e-5.
MODELS: tuple[tuple[Callable[[], torch.nn.Module], int, tuple[int, ...]], ...] = (
    (llama_tied, 0, DENSE_LENGTHS),
    (llama_rope_scaled, 1, DENSE_LENGTHS),
    (qwen3, 2, DENSE_LENGTHS),
    (qwen3_moe, 3, HYBRID_LENGTHS),
    (deepseek_v3, 4, HYBRID_LENGTHS),
    (kimi_linear, 5, HYBRID_LENGTHS),
    (qwen3_next, 6, HYBRID_LENGTHS),
    (qwen3_5, 21, HYBRID_LENGTHS),
    (gemma3, 22, HYBRID_LENGTHS),
    (mimo_v2_flash, 9, HYBRID_LENGTHS),
    (minimax, 10, HYBRID_LENGTHS),
)


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Draws every weight; what initialises to zero or one (norms, router biases), and so would hide mistakes, is spread around that."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        scale = 1.0 if "embed" in name or "lm_head" in name else 1.2
        if name.endswith("A_log"):
            parameter.data = 0.5 * noise
        elif name.endswith("dt_bias"):
            parameter.data = noise - 2.0
        elif name.endswith("sinks"):
            parameter.data = noise
        elif parameter.ndim == 1:
            parameter.data = float(parameter.data[0]) + 0.3 * noise
        else:
            parameter.data = scale * noise / parameter.shape[-1] ** 0.5
    for name, buffer in sorted(model.named_buffers()):
        if name.endswith("e_score_correction_bias"):
            buffer.data = 0.2 * torch.randn(buffer.shape, generator=generator)


@torch.no_grad()
def continuation(model: torch.nn.Module, prompt: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """NEW_TOKENS greedy tokens [n] and the float32 logits [n, V] that each was drawn from, recomputed whole at every step."""
    ids, rows = torch.from_numpy(prompt)[None].long(), []
    for _ in range(NEW_TOKENS):
        row = model(ids, use_cache=False).logits[0, -1]
        rows.append(row)
        ids = torch.cat([ids, row.argmax()[None, None]], dim=1)
    return ids[0, len(prompt) :].numpy().astype(np.int32), torch.stack(rows).numpy()


def main(names: list[str]) -> None:
    """Writes the named fixtures anew, all of them without names."""
    print(f"torch {torch.__version__}, transformers {hf.__version__}")
    for make, seed, lengths in MODELS:
        name = make.__name__
        if names and name not in names:
            continue
        model = make().float().eval()
        model.set_experts_implementation("eager")  # the others know no float64, in which rounding is judged
        randomise(model, seed)
        directory = OUT / name
        shutil.rmtree(directory, ignore_errors=True)
        model.save_pretrained(directory)
        rng = np.random.default_rng(seed)
        expected = {}
        for length in lengths:
            prompt = rng.integers(0, model.config.vocab_size, length, dtype=np.int32)
            tokens, logits = continuation(model, prompt)
            expected |= {f"prompt_{length}": prompt, f"tokens_{length}": tokens, f"logits_{length}": logits}
            gaps = np.sort(logits)[:, -1] - np.sort(logits)[:, -2]
            exact = continuation(copy.deepcopy(model).double(), prompt)[1]
            rounding = np.abs(exact - logits).max()
            print(f"{name} {length}: float32 rounding {rounding:.1e}, smallest top-2 gap {gaps.min():.4f}, tokens {tokens}")
        np.savez_compressed(directory / "expected.npz", **expected)


if __name__ == "__main__":
    main(sys.argv[1:])
