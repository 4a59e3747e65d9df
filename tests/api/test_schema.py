"""The OpenAPI document against the API, by schemathesis: whatever a client sends, the answer is one that it lists."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import schemathesis
from fastapi import FastAPI
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import APIOperation, Case, GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance
from starlette.testclient import TestClient

EXAMPLES = 20
GENERATED = settings(
    max_examples=EXAMPLES, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)
# A schema cannot say which ids exist, nor how long `43200m` is: valid requests may be refused.
NOT_HELD = [positive_data_acceptance]
# The batch has ended without results, no part of an upload is known, and generated URLs are not those of receivers.
NEVER_200 = {
    "GET /v1/batches/{batch_id}/results",
    "POST /v1/batches/{batch_id}/cancel",
    "POST /v1/batches/{batch_id}/retry",
    "POST /v1/uploads/{upload_id}/complete",
    "POST /v1/webhook_endpoints",
    "POST /v1/webhook_endpoints/{webhook_endpoint_id}/test",
}
OPEN = {"GET /", "GET /health"}

Operation = APIOperation[Any, Any, Any, Any]


@pytest.fixture
def operations(app: FastAPI) -> Sequence[Operation]:
    document = schemathesis.openapi.from_asgi("/openapi.json", app)
    return [found.ok() for found in document.get_all_operations()]


@pytest.fixture
def make_objects(
    client: TestClient, upload: Callable[..., dict[str, Any]], lead_to: Callable[[str], str]
) -> Callable[[], Mapping[str, str]]:
    """Make one object of each kind; returns their ids by the names of the path parameters."""

    def make_objects() -> Mapping[str, str]:
        wanted = {"filename": "a", "purpose": "batch", "bytes": 1, "mime_type": "text/plain"}
        pending = client.post("/v1/uploads", json=wanted)
        assert pending.status_code == 200, pending.text
        hook = {"name": "a", "url": "https://receiver.invalid/", "event_types": ["batch.failed"]}
        endpoint = client.post("/v1/webhook_endpoints", json=hook)
        assert endpoint.status_code == 200, endpoint.text
        return {
            "file_id": str(upload()["id"]),
            "batch_id": lead_to("completed"),
            "upload_id": str(pending.json()["id"]),
            "webhook_endpoint_id": str(endpoint.json()["id"]),
        }

    return make_objects


def check_status_is_listed(_context: object, response: Any, case: Case) -> None:
    """`default` is in the document for clients; here it would allow everything."""
    listed = set(case.operation.definition.raw["responses"]) - {"default"}
    assert str(response.status_code) in listed, f"{case.operation.label} answers {response.status_code}: {listed}"


def ask_what_is_allowed(operation: Operation, objects: Mapping[str, str]) -> set[int]:
    """Send requests that the document allows; half of the ids in the paths are of `objects`. Returns the statuses."""
    statuses = set()

    @GENERATED
    @given(case=operation.as_strategy(generation_mode=GenerationMode.POSITIVE), exists=st.booleans())
    def ask(case: Case, exists: bool) -> None:
        if exists:
            case.path_parameters.update({name: objects[name] for name in case.path_parameters if name in objects})
        answer = case.call_and_validate(excluded_checks=NOT_HELD, additional_checks=[check_status_is_listed])
        statuses.add(answer.status_code)

    ask()
    return statuses


@pytest.mark.timeout(900)
def test_what_the_document_allows(
    operations: Sequence[Operation], make_objects: Callable[[], Mapping[str, str]]
) -> None:
    statuses = {operation.label: ask_what_is_allowed(operation, make_objects()) for operation in operations}
    assert {label for label, seen in statuses.items() if 200 not in seen} <= NEVER_200


@pytest.mark.timeout(900)
def test_what_the_document_forbids(operations: Sequence[Operation]) -> None:
    for operation in operations:
        if not operation.body and not operation.query:
            continue

        @GENERATED
        @given(case=operation.as_strategy(generation_mode=GenerationMode.NEGATIVE))
        def ask(case: Case) -> None:
            case.call_and_validate(additional_checks=[check_status_is_listed])

        ask()


@pytest.mark.timeout(900)
def test_a_stranger_gets_what_the_document_lists(operations: Sequence[Operation], new_key: Callable[..., str]) -> None:
    new_key()
    for operation in operations:
        statuses = ask_what_is_allowed(operation, {})
        assert statuses == {200} if operation.label in OPEN else statuses == {401}, operation.label
