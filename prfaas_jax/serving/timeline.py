"""The picture of where a request's time went: its spans as bars, and what was on the link meanwhile. Drawn from a result file."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from prfaas_jax.errors import InvalidInput

# Top to bottom, in the order in which a request passes them; what else a usage names comes after.
_ROWS = ("queue", "failed remote prefill", "prefill", "transfer", "admit", "first step", "tokens")
_COLOURS = {"prefill": "tab:blue", "transfer": "tab:orange", "tokens": "tab:green", "failed remote prefill": "tab:red"}
_CHUNK = re.compile(r"prefill (\d+-\d+)")
# Seconds after the first token that are still shown, as a share of those before it.
_AFTER = 0.12
_BIN_S = 0.05


class Bar(NamedTuple):
    """One bar: which row it lies in, when (seconds), and what is written on it."""

    row: str
    start_s: float
    end_s: float
    label: str


def bars(spans: Sequence[Mapping[str, Any]]) -> list[Bar]:
    """Bars of a usage's spans ({"name", "start_s", "end_s"}); the chunks of a prefill share one row and keep their token range.

    Those of the link are left out: the decode server's own bar, "transfer", covers them.

    Raises InvalidInput for a span that ends before it starts.
    """
    found = []
    for span in spans:
        name, start, end = span["name"], float(span["start_s"]), float(span["end_s"])
        if end < start:
            raise InvalidInput(f"span {name}", (start, end), "an end that is not before its start")
        if span.get("site") == "link":
            continue
        chunk = _CHUNK.fullmatch(name)
        found.append(Bar("prefill", start, end, chunk[1]) if chunk else Bar(name, start, end, ""))
    return found


def rates(samples: Sequence[tuple[float, int]], bin_s: float) -> tuple[Float[np.ndarray, " bins"], Float[np.ndarray, " bins"]]:
    """Bits per second in bins of `bin_s` seconds, from samples (seconds, bytes so far); between samples bytes flow evenly.

    Returns the start of each bin and its rate; both are empty when there are fewer than two samples.
    """
    if len(samples) < 2:
        return np.empty(0), np.empty(0)
    at, passed = np.array([t for t, _ in samples], float), np.array([n for _, n in samples], float)
    edges = np.arange(at[0], at[-1] + bin_s, bin_s)
    return edges[:-1], np.diff(np.interp(edges, at, passed)) * 8 / bin_s


def draw(timeline: Path, picture: Path) -> None:
    """Draws what a run left in `timeline` (JSON) as a PNG.

    The file holds `requests`: a list of {"name", "placement", "prompt_tokens", "ttft_s", "route_s", "spans"}, with spans in seconds
    since arrival at the decode server, and optionally "link": samples [[seconds since that arrival, bytes], ..] of the lane.
    """
    requests = json.loads(timeline.read_text())["requests"]
    panels = [(request, "bars") for request in requests] + [(request, "link") for request in requests if request.get("link")]
    panels.sort(key=lambda panel: requests.index(panel[0]))
    heights = [0.24 * len(_rows(bars(request["spans"]))) if kind == "bars" else 1.2 for request, kind in panels]
    figure = Figure(figsize=(9.6, 0.4 + sum(heights) + 0.55 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axis, (request, kind) in zip(axes, panels, strict=True):
        if kind == "bars":
            _draw_bars(axis, request)
        else:
            _draw_link(axis, request)
        first_token = request["ttft_s"] - request["route_s"]
        axis.set_xlim(-0.02 * first_token, (1 + _AFTER) * first_token)
        axis.axvline(first_token, color="black", linewidth=0.8, linestyle=":")
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlabel("seconds since the request reached the decode server (dotted: first token)")
    figure.savefig(picture, dpi=110)


def _rows(found: Sequence[Bar]) -> list[str]:
    """Names of the rows in use, top to bottom."""
    names = dict.fromkeys(bar.row for bar in found)
    return [name for name in _ROWS if name in names] + [name for name in names if name not in _ROWS]


def _draw_bars(axis: Axes, request: Mapping[str, Any]) -> None:
    found = bars(request["spans"])
    rows = _rows(found)
    for i, bar in enumerate(found):
        colour = _COLOURS.get(bar.row, "tab:gray")
        # Neighbouring chunks in two shades, so that they can be told apart.
        alpha = 0.9 if i % 2 or bar.row != "prefill" else 0.6
        # An edge, so that what took no time to speak of is still seen.
        look: dict[str, Any] = {"color": colour, "edgecolor": colour, "linewidth": 0.8, "alpha": alpha}
        axis.barh(rows.index(bar.row), bar.end_s - bar.start_s, height=0.7, left=bar.start_s, **look)
        if bar.label:
            axis.text((bar.start_s + bar.end_s) / 2, rows.index(bar.row), bar.label, ha="center", va="center", fontsize=7, clip_on=True)
    axis.set_yticks(range(len(rows)), rows)
    axis.invert_yaxis()
    where = "remotely" if request["placement"] == "remote" else "locally"
    tokens, ttft_s = request["prompt_tokens"], request["ttft_s"]
    title = f"{request['name']}: {tokens:,} prompt tokens, prefilled {where}, first token after {ttft_s:.2f} s"
    axis.set_title(title, loc="left", fontsize=10)


def _draw_link(axis: Axes, request: Mapping[str, Any]) -> None:
    start, rate = rates(request["link"], _BIN_S)
    axis.fill_between(start, rate / 1e6, step="post", color="tab:orange", linewidth=0)
    axis.set_ylabel("Mbit/s", fontsize=8)
    axis.set_title(f"KV entering the link between the clusters, means of {_BIN_S * 1e3:.0f} ms", loc="left", fontsize=10)
