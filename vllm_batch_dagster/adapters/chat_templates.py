"""Renders a conversation with a model's own chat template, as the engine will before it counts the tokens.

Used by adapters/tokenizers.py. Templates run in Jinja's sandbox: they come from whoever made the model.
"""

import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_batch_dagster.core.prompts import Message

if TYPE_CHECKING:
    from jinja2 import Template

_TEMPLATE_FILE = "chat_template.jinja"
_CONFIG_FILE = "tokenizer_config.json"
_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")


class ChatTemplate:
    """A compiled template and the special tokens that it may name."""

    def __init__(self, template: "Template", tokens: dict[str, str]) -> None:
        self._template, self._tokens = template, tokens

    def render(self, messages: Sequence[Message], tools: Sequence[Any]) -> str | None:
        """Return the prompt, open for the assistant's answer; None when the template refuses the conversation."""
        values = {**self._tokens, "messages": [dict(message) for message in messages], "add_generation_prompt": True}
        try:
            return self._template.render(**values, tools=list(tools) or None, documents=None)
        except Exception:  # noqa: BLE001 - a template may raise anything; the engine will say what
            return None


def load_template(folder: Path) -> ChatTemplate | None:
    """Return the template of the model in `folder`, None when it has none that can be compiled."""
    config = read_json(folder / _CONFIG_FILE)
    source = find_template(folder)
    if source is None:
        return None
    try:
        template = _compile(source)
    except Exception:  # noqa: BLE001 - tags of other libraries, syntax errors
        return None
    return ChatTemplate(template, {name: text for name in _TOKENS if (text := _token_text(config.get(name)))})


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a file of a model's folder; empty when it is missing or no object."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def find_template(folder: Path) -> str | None:
    """Return the text of the model's own template, None when it has none."""
    try:
        return (folder / _TEMPLATE_FILE).read_text("utf-8")
    except (OSError, UnicodeDecodeError):
        pass
    written = read_json(folder / _CONFIG_FILE).get("chat_template")
    if isinstance(written, list):  # several, by name
        named = {item.get("name"): item.get("template") for item in written if isinstance(item, dict)}
        written = named.get("default")
    return written if isinstance(written, str) else None


def _compile(source: str) -> "Template":
    """Compile with the names that chat templates expect, which transformers has defined."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now(tz=datetime.UTC).strftime(form)
    return environment.from_string(source)


def _to_json(value: Any, indent: int | None = None, **_options: Any) -> str:
    """JSON as it is: Jinja's own filter escapes for HTML."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> str:
    raise ValueError(message)


def _token_text(token: object) -> str:
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else ""
