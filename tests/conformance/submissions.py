"""Every batch that the checklist needs, created at once at the start: one after the other they would take ten minutes.

A thread watches them, so that each status is seen, and does what must be done to a batch while it runs.
"""

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import httpx2
import openai
from openai.types import Batch

from tests.conformance.inputs import INPUTS, Input, Line
from tests.target import Target

TERMINAL = {"completed", "failed", "expired", "cancelled"}
SECONDS = 800
POLL_SECONDS = 0.5
ANSWER_SECONDS = 60

# What is done to a batch as soon as a state of it is seen, by name.
Actions = Mapping[str, tuple[Callable[[Batch], bool], Callable[[str], Batch]]]


class Submission:
    """One batch of the checklist. `lines` are what was sent, `seen` every different state of it since then."""

    def __init__(self, lines: Sequence[Line], created: Mapping[str, Any], batch: Batch, client: openai.OpenAI) -> None:
        self.lines = lines
        self.created = created
        self.client = client
        self.seen = [batch]
        self.acted: Batch | None = None

    @property
    def id(self) -> str:
        return self.seen[0].id

    @property
    def newest(self) -> Batch:
        return self.seen[-1]

    @property
    def has_ended(self) -> bool:
        return self.newest.status in TERMINAL


class Submissions:
    """All of them, by the names of tests/conformance/inputs.py."""

    def __init__(self) -> None:
        self._all: dict[str, Submission] = {}
        self._failures: dict[str, Exception] = {}
        self._watch_failure: Exception | None = None
        self._is_over = threading.Event()

    def add(self, name: str, create: Callable[[], Submission]) -> None:
        """Make a batch. What goes wrong is told to the tests that ask for it."""
        try:
            self._all[name] = create()
        except Exception as failure:  # noqa: BLE001 - raised again where the test looks
            self._failures[name] = failure

    def __getitem__(self, name: str) -> Submission:
        if name in self._failures:
            raise AssertionError(f"the batch {name!r} could not be made") from self._failures[name]
        return self._all[name]

    def refusal(self, name: str) -> Exception | None:
        """Return what went wrong when a batch was made, None when it was made."""
        return self._failures.get(name)

    def finish(self, name: str) -> Batch:
        """Wait until a batch has ended."""
        submission = self[name]
        end = time.monotonic() + SECONDS
        while not submission.has_ended:
            self.raise_watch_failure()
            assert time.monotonic() < end, f"{name} is still {submission.newest}"
            time.sleep(0.1)
        return submission.newest

    def finish_all(self) -> Sequence[Submission]:
        for name in self._all:
            self.finish(name)
        return list(self._all.values())

    def raise_watch_failure(self) -> None:
        if self._watch_failure is not None:
            raise AssertionError("the batches could not be watched") from self._watch_failure

    @contextmanager
    def watched(self, actions: Actions) -> Iterator[None]:
        """Follow all batches meanwhile. `actions`: name -> (when, what)."""
        thread = threading.Thread(target=self._watch, args=(actions,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._is_over.set()
            thread.join()

    def _watch(self, actions: Actions) -> None:
        try:
            while not self._is_over.wait(POLL_SECONDS):
                for name, submission in list(self._all.items()):  # more may be made meanwhile
                    if not submission.has_ended:
                        self._look(submission, *actions.get(name, ()))
        except Exception as failure:  # noqa: BLE001 - raised again where the test looks
            self._watch_failure = failure

    @staticmethod
    def _look(
        submission: Submission,
        when: Callable[[Batch], bool] = lambda _: False,
        act: Callable[[str], Batch] | None = None,
    ) -> None:
        batch = submission.client.batches.retrieve(submission.id)
        if batch != submission.newest:
            submission.seen.append(batch)
        if act is not None and submission.acted is None and when(batch):
            submission.acted = act(batch.id)
            submission.seen.append(submission.acted)


@contextmanager
def submit_all(target: Target, client: openai.OpenAI) -> Iterator[Submissions]:
    """Create every batch, those that take longest first, and watch them."""
    submissions = Submissions()
    with ExitStack() as ending:
        extended = ending.enter_context(
            openai.OpenAI(base_url=target.extended_url, api_key=target.extended_key, _strict_response_validation=True)
        )
        actions = {
            "cut": (lambda batch: batch.request_counts.completed > 0, client.batches.cancel),
            "largest": (lambda batch: batch.status == "in_progress", partial(cancel_without_body, target)),
        }
        # From the start: what is to be cut must not have ended when the last and largest input is made.
        ending.enter_context(submissions.watched(actions))
        for name, describe in INPUTS.items():
            wanted = describe(target)
            submissions.add(name, partial(submit, extended if wanted.is_extension else client, wanted))
        yield submissions


def finish_again(client: openai.OpenAI, wanted: Input) -> Submission:
    """Make one more batch and wait until it has ended."""
    submission = submit(client, wanted)
    end = time.monotonic() + SECONDS
    while not submission.has_ended:
        assert time.monotonic() < end, f"it is still {submission.newest}"
        time.sleep(POLL_SECONDS)
        submission.seen.append(client.batches.retrieve(submission.id))
    return submission


def submit(client: openai.OpenAI, wanted: Input) -> Submission:
    """Upload an input and create its batch."""
    file_id = wanted.file_id or upload(client, wanted)
    answer = client.batches.with_raw_response.create(
        input_file_id=file_id,
        endpoint=wanted.endpoint,  # type: ignore[arg-type]
        completion_window=wanted.window,  # type: ignore[arg-type]
        **wanted.parameters,
    )
    created = {"status_code": answer.http_response.status_code, **answer.http_response.json()}
    return Submission(wanted.lines, created, answer.parse(), client)


def upload(client: openai.OpenAI, wanted: Input) -> str:
    content = wanted.content
    if not wanted.in_parts:
        return client.files.create(file=("lines.jsonl", content), purpose="batch").id
    upload = client.uploads.upload_file_chunked(
        file=content,
        filename="lines.jsonl",
        bytes=len(content),
        mime_type="application/jsonl",
        purpose="batch",
        part_size=len(content) // 3,
    )
    assert upload.file is not None
    return upload.file.id


def cancel_without_body(target: Target, batch_id: str) -> Batch:
    """Cancel as [48] says: a content type that promises JSON, and no byte of it."""
    headers = {"Authorization": f"Bearer {target.api_key}", "Content-Type": "application/json"}
    answer = httpx2.post(
        f"{target.base_url}/batches/{batch_id}/cancel", headers=headers, content=b"", timeout=ANSWER_SECONDS
    )
    assert answer.status_code == 200, answer.text
    return Batch.model_validate(answer.json())


def read_lines(client: openai.OpenAI, file_id: str | None) -> Sequence[Mapping[str, Any]]:
    """Return the lines of an output or error file; none for no file."""
    if file_id is None:
        return ()
    return [json.loads(line) for line in client.files.content(file_id).text.splitlines()]
