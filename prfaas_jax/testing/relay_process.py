"""A relay in a process of its own, so that what it costs is not taken from who uses it."""

from types import TracebackType
from typing import Any

from prfaas_jax.errors import InvalidInput
from prfaas_jax.serving.launcher import module_command
from prfaas_jax.testing.json_child import JsonChild

_ANSWER_S = 10.0


class RelayProcess:
    """Runs while the block is entered; keyword arguments are the flags of `python -m prfaas_jax.testing.relay`.

    Raises LaunchFailed, with what it printed, when it does not come up.

    Attributes:
        address: "host:port" to connect to.
        pid: its process id.
    """

    def __init__(self, target: str, **flags: Any):
        self._child = JsonChild("relay", module_command("prfaas_jax.testing.relay", {"target": target, "until_eof": True} | flags))

    def __enter__(self) -> "RelayProcess":
        self._child.__enter__()
        self.address: str = self._child.ready["address"]
        self.pid = self._child.pid
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._child.__exit__(kind, error, trace)

    def tell(self, command: str, **arguments: Any) -> dict[str, Any]:
        """Calls a method of its `Relay` (`relay_control.COMMANDS`); the status where it is asked for, else nothing.

        Raises InvalidInput when the relay refuses, ChildFailed when it is gone or does not answer in 10 seconds.
        """
        answer = self._child.ask({"command": command} | arguments, _ANSWER_S)
        if not answer["ok"]:
            raise InvalidInput(answer["field"], arguments.get(answer["field"]), answer["expected"])
        return answer.get("status", {})
