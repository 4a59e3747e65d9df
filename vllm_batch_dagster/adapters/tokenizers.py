"""Counts input tokens with a model's own tokenizer.json. Used by the pre-flight, for a model whose files are here.

The library is imported when the first file is measured. Without a tokenizer the count is an estimate, and says so.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from vllm_batch_dagster.adapters.chat_templates import ChatTemplate, load_template
from vllm_batch_dagster.core.prompts import Message, PromptLength, Prompts

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BYTES_PER_TOKEN = 4  # a rule of thumb for English
MESSAGE_ALLOWANCE = 8  # tokens around a message (role, separators) when no template can be rendered


class EstimatedCounter:
    """A token for every four bytes, when there is nothing better; see TokenCounter. `reason`: why there is not."""

    is_exact = False

    def __init__(self, reason: str) -> None:
        self.method = f"Estimated from the length of the text, {BYTES_PER_TOKEN} bytes a token: {reason}."

    def count(self, prompts: Prompts) -> PromptLength:
        lengths = [len(text.encode("utf-8", "replace")) // BYTES_PER_TOKEN for text in prompts.texts]
        said = sum(
            MESSAGE_ALLOWANCE + len(content_of(message).encode("utf-8", "replace")) // BYTES_PER_TOKEN
            for message in prompts.messages
        )
        return sum_up([*lengths, *prompts.id_counts, *([said] if prompts.messages else [])])


class ModelCounter:
    """Counts as the engine will; see TokenCounter. Without a chat template messages are joined, with an allowance."""

    def __init__(self, tokenizer: "Tokenizer", template: ChatTemplate | None) -> None:
        self._tokenizer, self._template = tokenizer, template
        self.is_exact = True
        self.method = "Counted with the model's own tokenizer"
        if template is None:
            self.method += f"; it has no chat template, so a message counts its text and {MESSAGE_ALLOWANCE} tokens"
        self.method += "."

    def count(self, prompts: Prompts) -> PromptLength:
        lengths = [self._length(text, special=True) for text in prompts.texts]
        talk = [self._conversation(prompts)] if prompts.messages else []
        return sum_up([*lengths, *prompts.id_counts, *talk])

    def _conversation(self, prompts: Prompts) -> int:
        rendered = self._template.render(prompts.messages, prompts.tools) if self._template else None
        if rendered is not None:
            return self._length(rendered, special=False)  # the template writes the special tokens
        texts = (content_of(message) for message in prompts.messages)
        return sum(MESSAGE_ALLOWANCE + self._length(text, special=False) for text in texts)

    def _length(self, text: str, *, special: bool) -> int:
        clean = text.encode("utf-8", "replace").decode()  # half a surrogate pair has no tokens
        return len(self._tokenizer.encode(clean, add_special_tokens=special))


def load_counter(folder: Path) -> ModelCounter | EstimatedCounter:
    """Return the counter of the model in `folder`."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return EstimatedCounter("the model has no tokenizer.json")
    try:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # noqa: BLE001 - the library raises bare exceptions
        return EstimatedCounter(f"the model's tokenizer.json cannot be read ({error})")
    # Both may be set in the file for training; the engine does neither.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return ModelCounter(tokenizer, load_template(folder))


def content_of(message: Message) -> str:
    content = message.get("content")
    return content if isinstance(content, str) else ""


def sum_up(lengths: list[int]) -> PromptLength:
    return PromptLength(sum(lengths), max(lengths, default=0))
