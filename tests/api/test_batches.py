"""Batches over HTTP: items 25 to 37 and 46 to 50 of the contract's checklist."""

from collections.abc import Callable
from typing import Any

import pytest
from starlette.testclient import TestClient

from vllm_batch_dagster.adapters.memory import FixedClock
from vllm_batch_dagster.core.models import LineError, RequestCounts, Usage
from vllm_batch_dagster.core.ports import BatchStore
from vllm_batch_dagster.core.windows import WindowRule
from vllm_batch_dagster.settings import Settings

BATCH_KEYS = {
    "id", "object", "endpoint", "model", "errors", "input_file_id", "completion_window", "status",
    "output_file_id", "error_file_id", "created_at", "in_progress_at", "expires_at", "finalizing_at",
    "completed_at", "failed_at", "expired_at", "cancelling_at", "cancelled_at", "request_counts", "usage", "metadata",
}  # fmt: skip
PARAMS: dict[str, Any] = {
    "input_file_id": "file-1",
    "endpoint": "/v1/chat/completions",
    "completion_window": "24h",
}
Create = Callable[..., dict[str, Any]]
Lead = Callable[[str], str]


def test_25_create_gives_a_validating_batch_with_every_key(create: Create, clock: FixedClock) -> None:
    batch = create()

    assert batch.keys() == BATCH_KEYS
    assert batch["id"].startswith("batch_")
    assert (batch["object"], batch["status"], batch["created_at"]) == ("batch", "validating", int(clock()))
    assert batch["request_counts"] == {"total": 0, "completed": 0, "failed": 0}
    set_keys = {"id", "object", "endpoint", "input_file_id", "completion_window", "status", "created_at"}
    assert {key for key in BATCH_KEYS if batch[key] is not None} == set_keys | {"expires_at", "request_counts"}


@pytest.mark.parametrize(
    "metadata",
    [None, {}, {"k" * 64: "v" * 512}, {f"key {n}": "ü" for n in range(16)}],
)
def test_26_27_metadata_round_trips(client: TestClient, create: Create, metadata: dict[str, str] | None) -> None:
    batch = create(metadata=metadata)

    assert batch["metadata"] == metadata
    assert client.get(f"/v1/batches/{batch['id']}").json()["metadata"] == metadata
    assert client.get("/v1/batches").json()["data"][0]["metadata"] == metadata


@pytest.mark.parametrize(
    ("metadata", "param", "code"),
    [
        ({f"k{n}": "v" for n in range(17)}, "metadata", "object_above_max_properties"),
        ({"k" * 65: "v"}, "metadata." + "k" * 65, "property_name_above_max_length"),
        ({"k": "v" * 513}, "metadata.k", "string_above_max_length"),
        ({"tags": ["v"]}, "metadata.tags", "invalid_type"),
        ({"k": None}, "metadata.k", "invalid_type"),
        ({"k": "\0"}, "metadata.k", "invalid_value"),
        ({"\0": "v"}, "metadata", "invalid_value"),
        ("text", "metadata", "invalid_type"),
    ],
)
def test_26_wrong_metadata_is_refused(client: TestClient, metadata: object, param: str, code: str) -> None:
    answer = client.post("/v1/batches", json={**PARAMS, "metadata": metadata})

    assert answer.status_code == 400
    assert (answer.json()["error"]["param"], answer.json()["error"]["code"]) == (param, code)


@pytest.mark.parametrize("param", list(PARAMS))
def test_28_missing_parameters_are_named(client: TestClient, param: str) -> None:
    answer = client.post("/v1/batches", json={key: PARAMS[key] for key in PARAMS if key != param})

    assert answer.status_code == 400
    assert answer.json() == {
        "error": {
            "message": f"Missing required parameter: '{param}'.",
            "type": "invalid_request_error",
            "param": param,
            "code": "missing_required_parameter",
        }
    }


@pytest.mark.parametrize(
    ("param", "value", "code"),
    [
        ("endpoint", "/v1/nonsense", "invalid_value"),
        ("completion_window", "1w", "invalid_value"),
        ("completion_window", "", "invalid_value"),
        ("completion_window", 24, "invalid_type"),
        ("input_file_id", None, "invalid_type"),
        ("input_file_id", "f" * 513, "string_above_max_length"),
    ],
)
def test_29_wrong_parameters_are_named(client: TestClient, param: str, value: object, code: str) -> None:
    answer = client.post("/v1/batches", json={**PARAMS, param: value})

    assert answer.status_code == 400
    assert (answer.json()["error"]["param"], answer.json()["error"]["code"]) == (param, code)


def test_30_an_unknown_input_file_is_taken(create: Create) -> None:
    assert create(input_file_id="file-nobody-has")["status"] == "validating"


@pytest.mark.parametrize(("window", "seconds"), [("1m", 60), ("90m", 5400), ("6h", 21_600), ("30d", 2_592_000)])
def test_29_31_other_windows_are_an_extension(create: Create, window: str, seconds: int) -> None:
    batch = create(completion_window=window)

    assert batch["completion_window"] == window
    assert batch["expires_at"] == batch["created_at"] + seconds


class TestAsOpenAI:
    """COMPLETION_WINDOWS=24h: nothing but what OpenAI takes."""

    @pytest.fixture
    def settings(self, settings: Settings) -> Settings:
        return settings.model_copy(update={"completion_windows": WindowRule.OPENAI})

    @pytest.mark.parametrize("window", ["1h", "48h", "1d", ""])
    def test_29_another_window_is_refused(self, client: TestClient, window: str) -> None:
        answer = client.post("/v1/batches", json={**PARAMS, "completion_window": window})

        assert answer.status_code == 400
        assert answer.json()["error"] == {
            "message": f"Invalid value: '{window}'. Supported values are: '24h'.",
            "type": "invalid_request_error",
            "param": "completion_window",
            "code": "invalid_value",
        }

    def test_29_a_day_is_taken(self, create: Create) -> None:
        assert create()["completion_window"] == "24h"


def test_31_the_deadline_is_a_day_after_the_creation(create: Create) -> None:
    batch = create()
    assert batch["expires_at"] == batch["created_at"] + 86_400


def test_32_the_life_of_the_output_is_kept(create: Create, store: BatchStore) -> None:
    batch = create(output_expires_after={"anchor": "created_at", "seconds": 3600})
    assert store.batches.get(batch["id"]).output_expires_after == 3600
    assert store.batches.get(create(output_expires_after=None)["id"]).output_expires_after is None


@pytest.mark.parametrize("seconds", [3599, 2_592_001, 3600.5, "3600", True])
def test_32_a_wrong_life_is_refused(client: TestClient, seconds: object) -> None:
    expiry = {"anchor": "created_at", "seconds": seconds}
    answer = client.post("/v1/batches", json={**PARAMS, "output_expires_after": expiry})

    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "output_expires_after.seconds"


def test_33_list_is_newest_first_and_twenty_long(client: TestClient, create: Create) -> None:
    made = [create()["id"] for _ in range(21)][::-1]

    page = client.get("/v1/batches").json()
    assert [batch["id"] for batch in page["data"]] == made[:20]
    assert (page["first_id"], page["last_id"], page["has_more"]) == (made[0], made[19], True)
    rest = client.get(f"/v1/batches?after={made[19]}&limit=100").json()
    assert ([batch["id"] for batch in rest["data"]], rest["has_more"]) == (made[20:], False)


@pytest.mark.parametrize("query", ["limit=0", "limit=101", "limit=x", "after=batch_unknown"])
def test_33_wrong_queries_are_refused(client: TestClient, query: str) -> None:
    answer = client.get(f"/v1/batches?{query}")

    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == query.partition("=")[0]


@pytest.mark.parametrize(("method", "path"), [("GET", ""), ("POST", "/cancel"), ("GET", "/results")])
@pytest.mark.parametrize("batch_id", ["batch_unknown", "%00"])
def test_35_unknown_ids_are_404(client: TestClient, method: str, path: str, batch_id: str) -> None:
    answer = client.request(method, f"/v1/batches/{batch_id}{path}")

    assert answer.status_code == 404
    assert "No batch found" in answer.json()["error"]["message"]


def test_37_usage_errors_and_counts_are_shown(client: TestClient, lead_to: Lead, store: BatchStore) -> None:
    batch_id = lead_to("in_progress")
    store.batches.amend(
        batch_id,
        model="tiny",
        counts=RequestCounts(9, 7, 2),
        usage=Usage(10, 3, 20, 4),
        errors=(LineError("invalid_json_line", "This line is not parseable as valid JSON.", None, 2),),
    )

    batch = client.get(f"/v1/batches/{batch_id}").json()
    assert batch["usage"] == {
        "input_tokens": 10,
        "input_tokens_details": {"cached_tokens": 3},
        "output_tokens": 20,
        "output_tokens_details": {"reasoning_tokens": 4},
        "total_tokens": 30,
    }
    assert batch["errors"]["object"] == "list"
    assert batch["errors"]["data"] == [
        {
            "code": "invalid_json_line",
            "message": "This line is not parseable as valid JSON.",
            "param": None,
            "line": 2,
        }
    ]
    assert batch["model"] == "tiny"


@pytest.mark.parametrize("status", ["validating", "in_progress", "finalizing"])
def test_47_48_an_open_batch_is_cancelled_by_an_empty_body(
    client: TestClient, lead_to: Lead, clock: FixedClock, status: str
) -> None:
    batch_id = lead_to(status)
    answer = client.post(f"/v1/batches/{batch_id}/cancel", headers={"content-type": "application/json"})

    assert answer.status_code == 200
    assert (answer.json()["status"], answer.json()["cancelling_at"]) == ("cancelling", int(clock()))


@pytest.mark.parametrize("status", ["cancelling", "cancelled"])
def test_49_what_is_cancelled_stays_as_it_is(client: TestClient, lead_to: Lead, status: str) -> None:
    batch_id = lead_to(status)
    before = client.get(f"/v1/batches/{batch_id}").json()

    answer = client.post(f"/v1/batches/{batch_id}/cancel")
    assert (answer.status_code, answer.json()) == (200, before)


@pytest.mark.parametrize("status", ["completed", "failed", "expired"])
def test_49_50_what_has_ended_is_409_and_not_retried(client: TestClient, lead_to: Lead, status: str) -> None:
    answer = client.post(f"/v1/batches/{lead_to(status)}/cancel")

    assert answer.status_code == 409
    assert answer.headers["x-should-retry"] == "false"
    assert answer.json()["error"] == {
        "message": f"Cannot cancel a batch with status '{status}'.",
        "type": "invalid_request_error",
        "param": None,
        "code": None,
    }


@pytest.mark.parametrize(
    ("body", "content_type", "status"),
    [
        (b"", "application/json", 400),
        (b"{", "application/json", 400),
        (b"[]", "application/json; charset=utf-8", 400),
        (b"\xff", "application/json", 400),
        (b"[" * 100_000, "application/json", 400),
        (b'{"a": 1e999}', "application/json", 400),
        (b'{"metadata": {"half a surrogate pair": "\\ud83d"}}', "application/json", 400),
        (b" " * (1 << 20) + b"{}", "application/json", 413),
        (b"{}", "text/plain", 415),
        (b"{}", "", 415),
    ],
)
def test_bodies_that_are_no_json_object_are_refused(
    client: TestClient, body: bytes, content_type: str, status: int
) -> None:
    answer = client.post("/v1/batches", content=body, headers={"content-type": content_type})

    assert answer.status_code == status
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_unknown_parameters_are_ignored(create: Create) -> None:
    assert create(priority="high")["status"] == "validating"
