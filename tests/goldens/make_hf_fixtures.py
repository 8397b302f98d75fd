"""Makes tests/goldens/hf/<name>/: tiny random Hugging Face models with float32 logits and greedy continuations to match.

Needs torch and transformers (the "oracle" extra): `python tests/goldens/make_hf_fixtures.py`. The results are committed.
"""

import copy
import shutil
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

OUT = Path(__file__).parent / "hf"
PROMPT_LENGTHS = (1, 17, 70, 300)
NEW_TOKENS = 12

COMMON = {"vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 512, "eos_token_id": 2}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}

MODELS = {
    "llama_tied": LlamaForCausalLM(
        LlamaConfig(**COMMON, num_attention_heads=8, num_key_value_heads=4, intermediate_size=96, tie_word_embeddings=True)
    ),
    "llama_rope_scaled": LlamaForCausalLM(
        LlamaConfig(
            **COMMON,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=80,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "llama3", "rope_theta": 500.0, **LLAMA3},
        )
    ),
    "qwen3": Qwen3ForCausalLM(
        Qwen3Config(
            **COMMON,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=24,
            intermediate_size=96,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        )
    ),
}


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Draws every weight; norms (1-D), which initialise to one and so would hide mistakes, are spread around it."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        scale = 1.0 if "embed" in name or "lm_head" in name else 1.2
        parameter.data = 1.0 + 0.3 * noise if parameter.ndim == 1 else scale * noise / parameter.shape[1] ** 0.5


@torch.no_grad()
def continuation(model: torch.nn.Module, prompt: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """NEW_TOKENS greedy tokens [n] and the float32 logits [n, V] that each was drawn from, recomputed whole at every step."""
    ids, rows = torch.from_numpy(prompt)[None].long(), []
    for _ in range(NEW_TOKENS):
        row = model(ids, use_cache=False).logits[0, -1]
        rows.append(row)
        ids = torch.cat([ids, row.argmax()[None, None]], dim=1)
    return ids[0, len(prompt) :].numpy().astype(np.int32), torch.stack(rows).numpy()


def main() -> None:
    """Writes every fixture anew."""
    print(f"torch {torch.__version__}, transformers {transformers.__version__}")
    for seed, (name, model) in enumerate(MODELS.items()):
        model = model.float().eval()
        randomise(model, seed)
        directory = OUT / name
        shutil.rmtree(directory, ignore_errors=True)
        model.save_pretrained(directory)
        rng = np.random.default_rng(seed)
        expected = {}
        for length in PROMPT_LENGTHS:
            prompt = rng.integers(0, COMMON["vocab_size"], length, dtype=np.int32)
            tokens, logits = continuation(model, prompt)
            expected |= {f"prompt_{length}": prompt, f"tokens_{length}": tokens, f"logits_{length}": logits}
            gaps = np.sort(logits)[:, -1] - np.sort(logits)[:, -2]
            exact = continuation(copy.deepcopy(model).double(), prompt)[1]
            rounding = np.abs(exact - logits).max()
            print(f"{name} {length}: float32 rounding {rounding:.1e}, smallest top-2 gap {gaps.min():.4f}, tokens {tokens}")
        np.savez_compressed(directory / "expected.npz", **expected)


if __name__ == "__main__":
    main()
