"""Counts XLA compilations, so that a server can prove that it does none after warm-up."""

import threading

import jax

_EVENT = "/jax/core/compile/backend_compile_duration"
_lock = threading.Lock()
_count = 0
_listening = False


def _on_event(event: str, duration_secs: float, **kwargs: str | int) -> None:
    global _count
    if event == _EVENT:
        with _lock:
            _count += 1


def compile_count() -> int:
    """Compilations (persistent-cache hits included) in this process since the first call of this function."""
    global _listening
    with _lock:
        if not _listening:
            _listening = True
            jax.monitoring.register_event_duration_secs_listener(_on_event)
        return _count
