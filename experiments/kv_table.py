"""How many bytes of KV a request of each model makes, and how many a dense model of equal width and depth would. No accelerator, no jax.

    python -m experiments.kv_table [--lengths=1024,8192,32000,130000] [--models=paper_1t,kimi_linear_48b] [--workdir=runs/kv_table]

The dense counterpart attends all tokens in every layer with 8 kv heads of 128 elements (as many elements as the model is wide where
that is less), at the model's dtype; a dense model is its own. Sizes follow the formula, also beyond the context a model was trained for.
The last line is JSON: models {name: {fixed_bytes, bytes_per_token}}.
"""

from collections.abc import Sequence
from pathlib import Path

from absl import flags

from configs.models import available_models, load_model_config
from prfaas_jax.errors import InvalidInput
from prfaas_jax.kvcache.sizes import MIB, KvSize, check_lengths, kv_sizes, size_rows, size_table
from prfaas_jax.models.config import ModelConfig
from prfaas_jax.results import Workdir, headline
from prfaas_jax.serving.process import run_main

# The lengths behind 1K, 8K, 32K and 128K of the paper's Table 5.
LENGTHS = flags.DEFINE_list("lengths", ["1024", "8192", "32000", "130000"], "tokens of a request, comma-separated")
MODELS = flags.DEFINE_list("models", None, "model configs, names or files, comma-separated; default: all under configs/models")
WORKDIR = flags.DEFINE_string("workdir", None, "where to keep config, environment, sizes.csv, summary and figure")

# Points of a curve in the figure.
_CURVE_POINTS = 60


def read_lengths(texts: Sequence[str]) -> list[int]:
    """The flag's numbers of tokens; raises InvalidInput on anything else."""
    if not all(text.strip().isdecimal() for text in texts):
        raise InvalidInput("lengths", ",".join(texts), "whole numbers of tokens, comma-separated, such as 1024,8192")
    lengths = [int(text) for text in texts]
    check_lengths(lengths)
    return lengths


def read_models(names: Sequence[str]) -> dict[str, ModelConfig]:
    """The named configs by name; raises InvalidInput on unknown or repeated ones."""
    models: dict[str, ModelConfig] = {}
    for config in map(load_model_config, names):
        if config.name in models:
            raise InvalidInput("models", config.name, "each model once")
        models[config.name] = config
    if not models:
        raise InvalidInput("models", list(names), f"one or more of {', '.join(available_models())}")
    return models


def draw(sizes: Sequence[KvSize], lengths: Sequence[int], path: Path) -> None:
    """S(l) of each model on logarithmic axes, dense models dashed, the requested lengths marked. Toys only where there is nothing else."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    first, last = min(lengths) / 4, max(lengths)
    grid = sorted({max(1, round(first * (last / first) ** (i / (_CURVE_POINTS - 1)))) for i in range(_CURVE_POINTS)})
    figure, axes = plt.subplots(figsize=(11, 7), layout="constrained")
    for i, size in enumerate([s for s in sizes if not s.name.endswith("_toy")] or sizes):
        color, style = plt.colormaps["tab20"](i % 20), "--" if size.spec == size.dense else "-"
        axes.plot(grid, [size.spec.bytes(n) / MIB for n in grid], style, color=color, label=size.name)
        axes.plot(lengths, [size.spec.bytes(n) / MIB for n in lengths], ".", color=color)
    axes.set(xscale="log", yscale="log", xlabel="tokens of the request", ylabel="KV cache, MiB", title="S(l), KV bytes per request")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: list[str]) -> None:
    """Flags to configs, the table to stdout, its rows and figure to the workdir, the headline last."""
    del argv
    lengths = read_lengths(LENGTHS.value)
    models = read_models(available_models() if MODELS.value is None else MODELS.value)
    workdir = Workdir(WORKDIR.value) if WORKDIR.value else None
    sizes = sorted(kv_sizes(models), key=lambda size: size.spec.bytes(max(lengths)), reverse=True)
    print("S(l) of a request in MiB; in brackets, how many times as much a dense model of equal width and depth makes")
    print(size_table(sizes, lengths))
    result = {"models": {s.name: {"fixed_bytes": s.spec.fixed_bytes, "bytes_per_token": s.spec.bytes_per_token} for s in sizes}}
    if workdir:
        workdir.write_config(flags.FLAGS.flag_values_dict())
        workdir.write_env()
        workdir.write_rows("sizes.csv", size_rows(sizes, lengths))
        draw(sizes, lengths, workdir.path / "figure.png")
        workdir.write_summary({"lengths": lengths, **result})
    headline(result)


if __name__ == "__main__":
    run_main(main)
