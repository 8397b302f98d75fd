"""Chat templates: the Jinja text that a checkpoint brings, rendered as transformers renders it."""

import dataclasses
from collections.abc import Mapping, Sequence

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from prfaas_jax.errors import InvalidInput


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """A template and the special tokens that it may refer to."""

    source: str
    bos_token: str = ""
    eos_token: str = ""

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The conversation as text, up to and including the head of the assistant's next turn.

        Raises InvalidInput for malformed messages and for what the template itself refuses (roles out of order, ..).
        """
        if not messages:
            raise InvalidInput("messages", list(messages), "at least one message")
        for message in messages:
            if set(message) != {"role", "content"} or not all(isinstance(v, str) for v in message.values()):
                raise InvalidInput("messages", message, "mappings of exactly role and content, both text")
        # A template is data from elsewhere: the sandbox keeps it from reaching Python. Trimming as transformers does.
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
        environment.globals["raise_exception"] = _refuse
        tokens = {"bos_token": self.bos_token, "eos_token": self.eos_token}
        try:
            return environment.from_string(self.source).render(messages=messages, add_generation_prompt=True, **tokens)
        except jinja2.TemplateError as e:
            raise InvalidInput("messages", list(messages), f"messages that the model's chat template takes ({e})") from e


def _refuse(reason: str) -> None:
    raise jinja2.TemplateError(reason)
