"""Tables and pictures of live benchmarks; pictures are drawn from the files of a run."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Aligned text; floats with four digits, what is missing as a dash."""
    cells = [list(columns), *([_cell(value) for value in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    lines = ["  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))) for row in cells]
    return "\n".join(line.rstrip() for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a csv file."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def ttft_of(path: Path) -> list[float]:
    """TTFT in seconds, ascending, of the requests in a requests csv file that were done."""
    return sorted(float(row["ttft_s"]) for row in read_csv(path) if row["ttft_s"])


def draw(path: Path, requests: Mapping[str, Path], usage: Mapping[str, Path], marks: Mapping[str, float] | None = None) -> None:
    """Distribution of TTFT and Gbit/s of every link over time, one colour per run; `marks` are model seconds with a label.

    Args:
        path: of the picture.
        requests: label -> requests csv.
        usage: label -> csv with "time_s" and a column "<from>-><to>" per link.
        marks: what happened when.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    for label, file in requests.items():
        ordered = ttft_of(file)
        left.plot(ordered, [(i + 1) / len(ordered) for i in range(len(ordered))], lw=1.2, label=label)
    left.set(xscale="log", xlabel="TTFT, model s", ylabel="share of requests", ylim=(0, 1))
    for label, file in usage.items():
        rows = read_csv(file)
        for column in [c for c in (rows[0] if rows else ()) if "->" in c]:
            points = [(float(row["time_s"]), float(row[column])) for row in rows if row[column]]
            right.plot(*zip(*points, strict=True), lw=0.9, label=f"{label} {column}")
    for label, at in (marks or {}).items():
        right.axvline(at, color="gray", ls="--", lw=1, label=label)
    right.set(xlabel="model s", ylabel="Gbit/s of the model")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="small")
    figure.savefig(path, dpi=110)
    plt.close(figure)
