"""A GGUF file of a Llama fixture, written as llama.cpp's converter writes it, with a byte-level vocabulary of 256."""

import re
from pathlib import Path

import gguf
import numpy as np
from safetensors.numpy import load_file
from tokenizers import pre_tokenizers

from prfaas_jax.models.hf_config import read_json

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MERGES = ["Ġ t", "h e", "Ġt he", "i n", "1 2", "e r", "o n", "a n", "r e", "Ġ Ġ"]
TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe brief.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# Hugging Face name -> GGUF name, spelt out here so that the reader's own table is not its own witness.
RENAMED = (
    (r"model\.embed_tokens", "token_embd"),
    (r"model\.norm", "output_norm"),
    (r"lm_head", "output"),
    (r"model\.layers\.(\d+)\.input_layernorm", r"blk.\1.attn_norm"),
    (r"model\.layers\.(\d+)\.post_attention_layernorm", r"blk.\1.ffn_norm"),
    (r"model\.layers\.(\d+)\.self_attn\.o_proj", r"blk.\1.attn_output"),
    (r"model\.layers\.(\d+)\.self_attn\.([qkv])_proj", r"blk.\1.attn_\2"),
    (r"model\.layers\.(\d+)\.mlp\.(gate|up|down)_proj", r"blk.\1.ffn_\2"),
)


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's LlamaModel.permute: rows of each head from halves to interleaved pairs."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def write(
    fixture: Path,
    path: Path,
    *,
    arch: str = "llama",
    drop: str = "",
    extra: dict[str, str] | None = None,
    quantised: gguf.GGMLQuantizationType | None = None,
) -> Path:
    """Writes `path` from a Hugging Face fixture; `drop` leaves out one tensor, `extra` adds string metadata."""
    config = read_json(fixture / "config.json")
    writer = gguf.GGUFWriter(path, arch)
    writer.add_name("tiny")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    for key, value in (extra or {}).items():
        writer.add_string(key, value)
    _add_tokenizer(writer)
    for name, tensor in load_file(fixture / "model.safetensors").items():
        target = name
        for pattern, replacement in RENAMED:
            target = re.sub(pattern, replacement, target)
        if "q_proj" in name:
            tensor = permute(tensor, config["num_attention_heads"])
        if "k_proj" in name:
            tensor = permute(tensor, config["num_key_value_heads"])
        if target == drop:
            continue
        if quantised and tensor.ndim == 2:
            writer.add_tensor(target, gguf.quants.quantize(tensor, quantised), raw_dtype=quantised)
        else:
            writer.add_tensor(target, np.ascontiguousarray(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tokenizer(writer: gguf.GGUFWriter) -> None:
    # The thirteen bytes that never occur in UTF-8 make room for special tokens and merges.
    never = {chr(byte) for byte in (0xC0, 0xC1, *range(0xF5, 0x100))}
    tokens = [*SPECIAL, *sorted(set(pre_tokenizers.ByteLevel.alphabet()) - never), *(m.replace(" ", "") for m in MERGES)]
    assert len(tokens) == 256
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (len(tokens) - 3))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(TEMPLATE)
