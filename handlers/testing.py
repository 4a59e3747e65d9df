"""The contract of a result handler as tests. Subclass `HandlerContract` in your own test suite; it needs pytest.

    class TestMine(HandlerContract):
        def make(self) -> Handler:
            return MyHandler()

        def arrived(self, batch_id: str) -> list[str]:
            return my_rows(batch_id)  # the custom_id of everything that stands there for the batch, repeats included

Every built-in handler passes it (tests/contract/test_handlers.py).
"""

import io
import itertools
import json
import tracemalloc
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from handlers.base import Batch, Delivery, Handler
from vllm_batch_dagster.core.models import RequestCounts, Usage
from vllm_batch_dagster.core.states import BatchStatus

MANY = 30_000

_numbers = itertools.count(1)


def answered(custom_id: str, content: str = "an answer") -> dict[str, Any]:
    """Return a line of an output file."""
    message = {"role": "assistant", "content": content}
    body = {
        "id": f"chatcmpl-{custom_id}",
        "object": "chat.completion",
        "created": 1_800_000_000,
        "model": "tiny",
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8},
    }
    response = {"status_code": 200, "request_id": f"req_{custom_id}", "body": body}
    return {"id": f"batch_req_{custom_id}", "custom_id": custom_id, "response": response, "error": None}


def unanswered(custom_id: str) -> dict[str, Any]:
    """Return a line of an error file that has no answer."""
    error = {"code": "batch_expired", "message": "This request could not be executed before the window ended."}
    return {"id": f"batch_req_{custom_id}", "custom_id": custom_id, "response": None, "error": error}


def refused(custom_id: str) -> dict[str, Any]:
    """Return a line of an error file that the engine rejected."""
    body = {"error": {"message": "too long", "type": "invalid_request_error", "param": None, "code": 400}}
    response = {"status_code": 400, "request_id": f"req_{custom_id}", "body": body}
    return {"id": f"batch_req_{custom_id}", "custom_id": custom_id, "response": response, "error": None}


class Interrupted(Exception):
    """What a broken reader raises in the middle of the lines."""


@dataclass(frozen=True, slots=True)
class Case:
    """A batch with these results."""

    output: Sequence[dict[str, Any]] = ()
    errors: Sequence[dict[str, Any]] = ()
    batch_id: str = ""
    version: int = 1
    attempt: int = 1

    def delivery(self, wrap: Callable[[bytes], BinaryIO] = io.BytesIO) -> Delivery:
        """Return what a handler is given of it. `wrap` makes a file of the lines."""
        total, failed = len(self.output) + len(self.errors), len(self.errors)
        batch = Batch(
            id=self.batch_id,
            input_file_id="file-input",
            endpoint="/v1/chat/completions",
            completion_window="24h",
            status=BatchStatus.COMPLETED,
            created_at=1_800_000_000,
            expires_at=1_800_086_400,
            metadata={"team": "sëarch"},
            model="tiny",
            counts=RequestCounts(total, total - failed, failed),
            usage=Usage(3 * total, 0, 5 * total, 0),
            output_file_id="file-output" if self.output else None,
            error_file_id="file-error" if self.errors else None,
            in_progress_at=1_800_000_001,
            finalizing_at=1_800_000_002,
            completed_at=1_800_000_003,
            result_version=self.version,
            merged_version=self.version,
        )
        key = f"dlv_{self.batch_id}_{self.version}"
        return Delivery(batch, key, self.version, self.attempt, _opener(self.output, wrap), _opener(self.errors, wrap))


def _opener(lines: Sequence[dict[str, Any]], wrap: Callable[[bytes], BinaryIO]) -> Callable[[], BinaryIO | None]:
    return lambda: wrap(b"".join(json.dumps(line).encode() + b"\n" for line in lines)) if lines else None


class BreakingFile(io.BytesIO):
    """A file that cannot be read beyond its middle, as on a disk that is gone."""

    def __init__(self, content: bytes) -> None:
        super().__init__(content)
        self._middle = len(content) // 2

    def __next__(self) -> bytes:
        if self.tell() > self._middle:
            raise Interrupted("the results cannot be read any further")
        return super().__next__()

    def read(self, size: int | None = -1, /) -> bytes:
        if self.tell() >= self._middle:
            raise Interrupted("the results cannot be read any further")
        left = self._middle - self.tell()
        return super().read(left if size is None or size < 0 else min(size, left))


def new_batch_id() -> str:
    """Return an id that no other test of this process has."""
    return f"batch_contract_{next(_numbers):04d}"


def three_kinds(batch_id: str, **changes: Any) -> Case:
    """Return a batch with two answers, a rejected line and one without an answer."""
    return Case(
        [answered("a"), answered("b", "zwei\nZeilen \u2028 \x00 ☃")],
        [refused("c"), unanswered("d")],
        batch_id,
        **changes,
    )


class HandlerContract(ABC):
    """See the module docstring. `takes_errors` False: the handler stores the answered lines only."""

    takes_errors = True
    most_held_bytes = 16 << 20

    @abstractmethod
    def make(self) -> Handler:
        """Return the handler, switched on and with an empty destination of its own for this test."""

    @abstractmethod
    def arrived(self, batch_id: str) -> Sequence[str]:
        """Return the custom_id of everything that stands at the destination for the batch, in any order."""

    @pytest.fixture
    def handler(self) -> Handler:
        return self.make()

    def expected(self, case: Case) -> list[str]:
        lines = [*case.output, *(case.errors if self.takes_errors else ())]
        return sorted(line["custom_id"] for line in lines)

    def assert_arrived(self, case: Case) -> None:
        assert sorted(self.arrived(case.batch_id)) == self.expected(case)

    def test_it_has_a_name_that_stays(self, handler: Handler) -> None:
        name = handler.name()
        assert name
        assert name == handler.name() == self.make().name()
        assert not set(name) & set(",: \t\n"), "a comma-separated list must be able to hold it"

    def test_it_is_enabled(self, handler: Handler) -> None:
        assert handler.enabled() is True

    def test_every_line_arrives_once(self, handler: Handler) -> None:
        case = three_kinds(new_batch_id())
        handler.deliver(case.delivery())
        self.assert_arrived(case)

    def test_the_same_delivery_again_doubles_nothing(self, handler: Handler) -> None:
        """The process died after the effect and before it could be noted."""
        case = three_kinds(new_batch_id())
        handler.deliver(case.delivery())
        self.make_again(handler).deliver(replace(case, attempt=2).delivery())
        self.assert_arrived(case)

    def test_what_broke_in_the_middle_is_whole_afterwards(self, handler: Handler) -> None:
        case = replace(three_kinds(new_batch_id()), output=[answered(f"line-{number}") for number in range(50)])
        with pytest.raises(Exception):  # noqa: B017, PT011 - whatever the handler makes of it, it must not say: done
            handler.deliver(case.delivery(BreakingFile))
        self.make_again(handler).deliver(replace(case, attempt=2).delivery())
        self.assert_arrived(case)

    def test_new_results_take_the_place_of_the_old_ones(self, handler: Handler) -> None:
        """A chunk was run again: lines that failed have answers now."""
        old = three_kinds(new_batch_id())
        new = replace(old, output=[*old.output, answered("c")], errors=[unanswered("d")], version=2)
        handler.deliver(old.delivery())
        handler.deliver(new.delivery())
        self.assert_arrived(new)

    @pytest.mark.parametrize("has_output", [True, False])
    def test_a_batch_with_one_of_the_two_files(self, handler: Handler, has_output: bool) -> None:
        whole = three_kinds(new_batch_id())
        case = replace(whole, errors=()) if has_output else replace(whole, output=())
        handler.deliver(case.delivery())
        self.assert_arrived(case)

    def test_batches_do_not_touch_each_other(self, handler: Handler) -> None:
        first, second = three_kinds(new_batch_id()), three_kinds(new_batch_id())
        handler.deliver(first.delivery())
        handler.deliver(second.delivery())
        handler.deliver(replace(second, output=second.output[:1], version=2).delivery())
        self.assert_arrived(first)

    def test_it_does_not_hold_the_results(self, handler: Handler, tmp_path: Path) -> None:
        path = tmp_path / "many.jsonl"
        with path.open("wb") as file:
            file.writelines(
                json.dumps(answered(f"line-{number}", "word " * 200)).encode() + b"\n" for number in range(MANY)
            )
        case = Case(batch_id=new_batch_id(), output=[answered("stand-in")])
        delivery = replace(case.delivery(), open_output=lambda: path.open("rb"))
        tracemalloc.start()
        try:
            handler.deliver(delivery)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert len(self.arrived(case.batch_id)) == MANY
        assert peak < self.most_held_bytes, f"{peak} bytes at once of a file of {path.stat().st_size}"

    def make_again(self, handler: Handler) -> Handler:
        """Return the handler of the next process, over the same destination. Override it where `make` empties that."""
        return handler
