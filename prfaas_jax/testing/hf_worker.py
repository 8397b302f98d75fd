"""The same work by Hugging Face transformers, in its own process: one JSON request per line in, one JSON answer per line out.

Run as a script by an interpreter that has torch and transformers; it imports nothing else, so that interpreter needs no jax.
"""

import json
import sys
import time
from typing import Any


class Model:
    """A causal language model with sdpa attention in float32, on the CPU."""

    def __init__(self, path: str, threads: int):
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        self._torch = torch
        self._model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="sdpa").eval()
        self._caches: dict[tuple[int, int], Any] = {}

    def forward(self, tokens: list[list[int]], cache: Any) -> list[int]:
        """Greedy next tokens; logits of the last position only, as a server would."""
        ids = self._torch.tensor(tokens)
        out = self._model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1].argmax(-1).tolist()

    def new_cache(self) -> Any:
        """An empty cache."""
        from transformers import DynamicCache

        return DynamicCache(config=self._model.config)

    def prefill(self, tokens: list[int]) -> dict[str, Any]:
        """One prompt in one call, as transformers does it best."""
        cache = self.new_cache()
        start = time.perf_counter()
        (token,) = self.forward([tokens], cache)
        return {"seconds": time.perf_counter() - start, "token": token}

    def decode(self, prompts: list[list[int]], steps: int) -> dict[str, Any]:
        """`steps` greedy steps of a batch of prompts, all of one length; the prompts' cache is computed once and kept."""
        key = len(prompts), len(prompts[0])
        if key not in self._caches:
            cache = self.new_cache()
            self._caches[key] = cache, self.forward(prompts, cache)
        cache, first = self._caches[key]
        tokens, seconds = first, []
        for _ in range(steps):
            start = time.perf_counter()
            tokens = self.forward([[t] for t in tokens], cache)
            seconds.append(time.perf_counter() - start)
        cache.crop(-steps)
        return {"seconds": seconds, "tokens": tokens}


def main() -> None:
    """Serves requests until stdin ends."""
    answers = sys.stdout
    sys.stdout = sys.stderr  # libraries chatter
    model: Model | None = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if request["op"] == "load":
                import torch
                import transformers

                model = Model(request["path"], request["threads"])
                answer = {"torch": torch.__version__, "transformers": transformers.__version__}
            else:
                assert model is not None
                with model._torch.inference_mode():
                    answer = getattr(model, request["op"])(**request["arguments"])
        except Exception as error:  # the parent decides what a failed comparison means
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
