"""Traces in the Chrome format, which ui.perfetto.dev opens: numbers for processes and rows, and the file whole or not at all."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

US = 1e6


def write_trace(path: Path, events: Sequence[dict[str, Any]]) -> None:
    """Writes events whose `pid` is the name of a process; where `tid` is given, it names a row of it. Times are microseconds already.

    The format wants numbers: they are given in order of first appearance, and the names written beside them.
    """
    processes: dict[str, int] = {}
    rows: dict[tuple[str, str], int] = {}
    numbered, names = [], []
    for event in events:
        process = event["pid"]
        if process not in processes:
            processes[process] = len(processes) + 1
            names.append({"name": "process_name", "ph": "M", "pid": processes[process], "args": {"name": process}})
        event = {**event, "pid": processes[process]}
        if "tid" in event:
            row = process, event["tid"]
            if row not in rows:
                rows[row] = len(rows) + 1
                names.append({"name": "thread_name", "ph": "M", "pid": event["pid"], "tid": rows[row], "args": {"name": row[1]}})
            event["tid"] = rows[row]
        numbered.append(event)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        partial.write_text(json.dumps({"traceEvents": [*names, *numbered]}))
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
