"""Hugging Face transformers as an oracle in another process, with the very weights of one of our models."""

import dataclasses
import json
import os
import select
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from flax import nnx

from prfaas_jax.errors import EngineFailed, InvalidInput
from prfaas_jax.models.config import ModelConfig
from prfaas_jax.models.layer_config import AttentionConfig, DenseConfig
from prfaas_jax.models.params import flat_names

_WORKER = Path(__file__).with_name("hf_worker.py")
_IMPORT_TIMEOUT_S = 120.0


def oracle_missing(python: str) -> str | None:
    """None when `python` can import torch and transformers, otherwise why not."""
    check = "import torch, transformers"
    try:
        done = subprocess.run([python, "-c", check], capture_output=True, text=True, timeout=_IMPORT_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{python}: {error}"
    return None if done.returncode == 0 else f"{python}: {done.stderr.strip().splitlines()[-1]}"


def export_hf(path: Path, config: ModelConfig, params: nnx.State) -> None:
    """Writes config.json and model.safetensors of a Llama or Qwen3 model in float32, the inverse of models/hf.py.

    Needs the `safetensors` package. Raises InvalidInput for any other model.
    """
    from safetensors.numpy import save_file

    from prfaas_jax.models.hf_names import hf_sources

    mixer, mlp = config.layers[0].mixer, config.layers[0].mlp
    if not isinstance(mixer, AttentionConfig) or not isinstance(mlp, DenseConfig) or mixer.rope is None:
        raise InvalidInput("model", config.name, "a Llama or Qwen3 model")
    others = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name != "layers"}
    qwen = mixer.qk_norm == "head"
    plain = ModelConfig.dense(
        **others,
        num_layers=config.num_layers,
        num_heads=mixer.num_heads,
        num_kv_heads=mixer.num_kv_heads,
        head_dim=mixer.head_dim,
        intermediate_size=mlp.intermediate_size,
        rope_theta=mixer.rope.theta,
        qk_norm=qwen,
    )
    if plain != config or config.norm_offset or config.post_norms or config.normalized_residual or config.embed_scale != 1.0:
        raise InvalidInput("model", config.name, "a Llama or Qwen3 model without attention bias and rope scaling")
    architecture, kind = ("Qwen3ForCausalLM", "qwen3") if qwen else ("LlamaForCausalLM", "llama")
    fields = {
        "architectures": [architecture],
        "model_type": kind,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": mixer.num_heads,
        "num_key_value_heads": mixer.num_kv_heads,
        "head_dim": mixer.head_dim,
        "intermediate_size": mlp.intermediate_size,
        "max_position_embeddings": config.max_position,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": mixer.rope.theta,
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_act": "silu",
        "torch_dtype": "float32",
    }
    arrays = {name: np.asarray(leaf[...]).astype(np.float32, copy=False) for name, leaf in flat_names(params).items()}
    tensors: dict[str, np.ndarray] = {}
    for source in hf_sources(config, architecture):
        (part,) = source.parts
        tensors[source.names[0]] = np.ascontiguousarray(arrays[part.name][part.index])
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(fields, indent=2) + "\n")
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


class HfOracle:
    """A worker process; it computes only while it is asked, so it can be measured in turns with another engine.

    Every request has a deadline; a worker that misses it, dies or reports an error raises EngineFailed.
    """

    def __init__(self, python: str, path: Path, threads: int, timeout_s: float = 600.0):
        self._timeout_s = timeout_s
        environment = {**os.environ, "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}
        environment.pop("PYTHONPATH", None)  # the worker needs nothing of this package, and must not find this interpreter's
        self._process = subprocess.Popen([python, str(_WORKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        self._buffer = b""
        try:
            self.versions = self._ask({"op": "load", "path": str(path), "threads": threads})
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "HfOracle":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def prefill(self, tokens: list[int]) -> tuple[float, int]:
        """Seconds for one prompt, and its greedy next token."""
        answer = self._ask({"op": "prefill", "arguments": {"tokens": tokens}})
        return answer["seconds"], answer["token"]

    def decode(self, prompts: list[list[int]], steps: int) -> tuple[list[float], list[int]]:
        """Seconds of each of `steps` greedy steps behind the prompts, and the tokens of the last one."""
        answer = self._ask({"op": "decode", "arguments": {"prompts": prompts, "steps": steps}})
        return answer["seconds"], answer["tokens"]

    def close(self) -> None:
        """Ends the worker."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        deadline = time.monotonic() + self._timeout_s
        try:
            stdin.write(json.dumps(request).encode() + b"\n")
            stdin.flush()
        except BrokenPipeError as error:
            raise EngineFailed(f"the oracle process ended with {self._process.poll()}") from error
        while b"\n" not in self._buffer:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([stdout], [], [], left)[0]:
                self._process.kill()
                raise EngineFailed(f"the oracle did not answer {request['op']} within {self._timeout_s} s")
            data = os.read(stdout.fileno(), 1 << 16)
            if not data:
                raise EngineFailed(f"the oracle process ended with {self._process.wait(10)}")
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise EngineFailed(f"the oracle: {answer['error']}")
        return answer
