"""What a fault drill found: a row for each fault, a row for each request, the whole in one line."""

import collections
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from prfaas_jax.testing.drill_faults import Fault
from prfaas_jax.testing.drill_load import Asked, Reference


@dataclasses.dataclass(frozen=True)
class FaultReport:
    """What one fault did. Seconds; None where there is nothing to say.

    Attributes:
        detection_s: from the fault to the router's view of the server, or to the router's own silence.
        exit_s: from SIGKILL until the operating system had ended the process, which closes its connections: nobody can know sooner.
        recovery_s: from the end of the fault until every server was used again.
        affected: requests that ran between the fault and its end.
        outcomes: how many of them came to what.
        extra_ttft_s: the worst first token among them, against the same prompt without a fault.
        extra_s: the worst last token, likewise.
        wrong_tokens, leaked_pages, hung: must be 0.
        more_fds, more_threads: the most that a process which lives on holds beyond what it held when it was first idle.
        machine_load: processes that wanted a core, of the last minute (as os.getloadavg has it), and how many cores there are.
        broken: every invariant that did not hold, in words.
    """

    fault: Fault
    detection_s: float | None
    exit_s: float | None
    recovery_s: float
    affected: int
    outcomes: Mapping[str, int]
    extra_ttft_s: float | None
    extra_s: float | None
    wrong_tokens: int
    leaked_pages: int
    hung: int
    more_fds: int
    more_threads: int
    machine_load: float
    broken: tuple[str, ...]

    def row(self) -> dict[str, Any]:
        """For faults.csv."""
        row = {"fault": self.fault.name, "breaks": self.fault.breaks, "kind": self.fault.kind, "target": self.fault.target}
        row |= {"phase": self.fault.phase or "", "outcomes": self.outcome_text}
        for field in dataclasses.fields(self):
            if field.name not in ("fault", "outcomes", "broken"):
                row[field.name] = getattr(self, field.name)
        return row | {"broken": "; ".join(self.broken)}

    @property
    def outcome_text(self) -> str:
        """Such as "3 as planned, 1 resumed"."""
        return ", ".join(f"{count} {outcome}" for outcome, count in sorted(self.outcomes.items(), key=lambda x: -x[1]))


def outcomes(affected: Iterable[Asked]) -> Mapping[str, int]:
    """How many requests came to what."""
    return collections.Counter(asked.outcome() for asked in affected)


def worst_extra(affected: Iterable[Asked], references: Sequence[Reference], since_s: float) -> tuple[float | None, float | None]:
    """The most seconds that a first, and a last, token came later than without a fault, of requests that had it after `since_s`."""
    first, last = [], []
    for asked in affected:
        reference, answer = references[asked.prompt.number], asked.answer
        if asked.ttft_s is not None and answer.first_s is not None and answer.first_s >= since_s:
            first.append(asked.ttft_s - reference.ttft_s)
        if answer.usage is not None and answer.last_s is not None and asked.total_s is not None and answer.last_s >= since_s:
            last.append(asked.total_s - reference.total_s)
    return max(first, default=None), max(last, default=None)


def request_row(asked: Asked, fault: str, reference: Reference) -> dict[str, Any]:
    """For requests.csv."""
    usage, answer = asked.answer.usage, asked.answer
    row: dict[str, Any] = {"fault": fault, "kind": asked.kind, "prompt": asked.prompt.number, "prompt_tokens": len(asked.prompt.ids)}
    row |= {"outcome": asked.outcome(), "tokens": len(answer.tokens), "sent_s": asked.sent_s, "ttft_s": asked.ttft_s}
    row |= {"reference_ttft_s": reference.ttft_s, "returns": answer.returns, "error": asked.error.details() if asked.error else ""}
    row["placed"] = "; ".join(f"{p.prefill_cluster or 'local'} -> {p.decode_address}" for p in answer.placed)
    if usage is not None:
        row |= {"prefill": usage.prefill_address, "decode": usage.decode_address, "attempts": usage.attempts, "resumes": usage.resumes}
        row |= {"fallbacks": usage.fallbacks, "moved": usage.kv_bytes_moved, "skipped": usage.kv_bytes_skipped}
        row |= {"resent": usage.kv_bytes_resent, "wire": usage.kv_bytes_wire, "recomputed": usage.tokens_recomputed}
        row["failures"] = "; ".join(f"{f.address} {f.phase} {f.code}" for f in usage.failures)
    return row


def table(reports: Sequence[FaultReport]) -> str:
    """The faults, one a line, for a terminal."""
    rows: list[tuple[str, ...]] = [("fault", "seen after", "extra TTFT", "whole again", "requests that met it")]
    for report in reports:
        figures = (_seconds(report.detection_s), _seconds(report.extra_ttft_s), _seconds(report.recovery_s))
        rows.append((report.fault.name, *figures, report.outcome_text + ("  BROKEN" if report.broken else "")))
    first, *widths = (max(len(row[column]) for row in rows) for column in range(4))
    lines = []
    for name, *figures_text, text in rows:
        cells = (cell.rjust(width) for cell, width in zip(figures_text, widths, strict=True))
        lines.append("  ".join([name.ljust(first), *cells, text]).rstrip())
    return "\n".join(lines)


def summary(reports: Sequence[FaultReport], requests: int, cores: int) -> dict[str, Any]:
    """The drill as a whole."""
    seen = {
        kind: [r.detection_s for r in reports if r.fault.kind == kind and r.detection_s is not None] for kind in ("kill", "freeze", "drain")
    }
    killed = [(r.detection_s, r.exit_s) for r in reports if r.detection_s is not None and r.exit_s is not None]
    return {
        "faults": len(reports),
        "wrong_tokens": sum(r.wrong_tokens for r in reports),
        "leaked_pages": sum(r.leaked_pages for r in reports),
        "hung_requests": sum(r.hung for r in reports),
        "worst_detection_s": _worst([s for of_kind in seen.values() for s in of_kind]),
        "worst_dead_detection_s": _worst(seen["kill"]),
        "worst_exit_s": _worst([exit_s for _, exit_s in killed]),
        "worst_dead_detection_after_exit_s": _worst([detection_s - exit_s for detection_s, exit_s in killed]),
        "worst_frozen_detection_s": _worst(seen["freeze"]),
        "worst_drain_detection_s": _worst(seen["drain"]),
        "worst_extra_ttft_s": _worst([r.extra_ttft_s for r in reports if r.extra_ttft_s is not None]),
        "most_more_fds": max((r.more_fds for r in reports), default=0),
        "most_more_threads": max((r.more_threads for r in reports), default=0),
        "requests": requests,
        "broken": sum(bool(r.broken) for r in reports),
        "cores": cores,
        "most_machine_load": _worst([r.machine_load for r in reports]),
    }


def _worst(values: Sequence[float]) -> float | None:
    return round(max(values), 4) if values else None


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f} s"
