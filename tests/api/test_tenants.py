"""Two keys of two projects: no route shows, gives, changes or admits what belongs to the other one."""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute
from starlette.testclient import TestClient

from vllm_batch_dagster.adapters.local_files import LocalWorkspace
from vllm_batch_dagster.adapters.memory import FixedClock, MemoryCatalog
from vllm_batch_dagster.core.models import File, Model
from vllm_batch_dagster.core.ports import BatchStore, FileStore
from vllm_batch_dagster.core.states import BatchEvent
from vllm_batch_dagster.settings import Settings
from vllm_batch_dagster.stages.validation import ValidationLimits, validate_batch

LINE = {"custom_id": "one", "method": "POST", "url": "/v1/embeddings", "body": {"model": "tiny", "input": "x"}}
BATCH = {"endpoint": "/v1/embeddings", "completion_window": "24h"}
FORM = "multipart/form-data; boundary=cut"

# A body with which the route works for the owner, by (method, path); none for the others.
BODIES: dict[tuple[str, str], dict[str, Any]] = {
    ("POST", "/v1/uploads/{upload_id}/parts"): {
        "content": b'--cut\r\nContent-Disposition: form-data; name="data"; filename="d"\r\n\r\nabc\r\n--cut--\r\n',
        "headers": {"content-type": FORM},
    },
    ("POST", "/v1/uploads/{upload_id}/complete"): {"json": {"part_ids": []}},
    ("POST", "/v1/webhook_endpoints/{webhook_endpoint_id}"): {"json": {"name": "taken over"}},
    ("POST", "/v1/webhook_endpoints/{webhook_endpoint_id}/test"): {"json": {"event_type": "batch.failed"}},
}


@dataclass
class Tenant:
    """A project, seen through its key."""

    project_id: str
    client: TestClient
    secret: str

    def ask(self, method: str, path: str, **more: Any) -> Any:
        headers = {**more.pop("headers", {}), "authorization": f"Bearer {self.secret}"}
        return self.client.request(method, path, headers=headers, **more)

    def upload(self, content: bytes = json.dumps(LINE).encode() + b"\n") -> str:
        answer = self.ask("POST", "/v1/files", data={"purpose": "batch"}, files={"file": ("in.jsonl", content)})
        assert answer.status_code == 200, answer.text
        return str(answer.json()["id"])

    def create(self, file_id: str) -> str:
        answer = self.ask("POST", "/v1/batches", json={**BATCH, "input_file_id": file_id})
        assert answer.status_code == 200, answer.text
        return str(answer.json()["id"])

    def begin_upload(self) -> str:
        params = {"filename": "in.jsonl", "purpose": "batch", "bytes": 3, "mime_type": "application/jsonl"}
        answer = self.ask("POST", "/v1/uploads", json=params)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["id"])

    def add_webhook(self) -> str:
        params = {"name": "hook", "url": "https://receiver.invalid/", "event_types": ["batch.failed"]}
        answer = self.ask("POST", "/v1/webhook_endpoints", json=params)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["id"])

    def send_part(self, upload_id: str) -> str:
        route = ("POST", "/v1/uploads/{upload_id}/parts")
        answer = self.ask("POST", f"/v1/uploads/{upload_id}/parts", **BODIES[route])
        assert answer.status_code == 200, answer.text
        return str(answer.json()["id"])

    def listed(self, path: str, **query: str) -> list[str]:
        return [item["id"] for item in self.ask("GET", path, params=query).json()["data"]]


@pytest.fixture
def owner(client: TestClient, new_key: Callable[..., str]) -> Tenant:
    return Tenant("team-a", client, new_key("team-a"))


@pytest.fixture
def stranger(client: TestClient, new_key: Callable[..., str]) -> Tenant:
    return Tenant("team-b", client, new_key("team-b"))


@pytest.fixture
def ids(owner: Tenant, stranger: Tenant, store: BatchStore, files: FileStore, clock: FixedClock) -> dict[str, str]:
    """Objects of the owner by the name of the path parameter. The batch is completed and has an output file."""
    file_id = owner.upload()
    batch_id = owner.create(file_id)
    for event in (BatchEvent.PLANNED, BatchEvent.MERGE):
        store.batches.advance(batch_id, event, int(clock()))
    contents = files.create("file-output")
    contents.write(b"{}\n")
    size, digest = contents.commit()
    output = File("file-output", size, int(clock()), "out.jsonl", "batch_output", digest, None, "team-a")
    store.batches.advance(batch_id, BatchEvent.PUBLISHED, int(clock()), files=(output,), output_file_id="file-output")
    upload_id = owner.begin_upload()
    owner.send_part(upload_id)
    return {
        "file_id": file_id,
        "batch_id": batch_id,
        "upload_id": upload_id,
        "webhook_endpoint_id": owner.add_webhook(),
    }


def routes_of(routes: Any) -> Iterator[APIRoute]:
    """Every route of an app, those of its routers too, those that the OpenAPI document leaves out too."""
    for route in routes:
        if isinstance(route, APIRoute):
            yield route
        elif (router := getattr(route, "original_router", None)) is not None:
            yield from routes_of(router.routes)


def named_routes(app: FastAPI) -> list[tuple[str, str, str]]:
    """(method, path, parameter) of every route that names an object in its path."""
    return sorted(
        (method, route.path, parameter)
        for route in routes_of(app.routes)
        for method in route.methods
        for parameter in re.findall(r"{(\w+)}", route.path)
    )


def test_no_route_works_on_an_object_of_another_project(
    app: FastAPI, owner: Tenant, stranger: Tenant, ids: dict[str, str]
) -> None:
    routes = named_routes(app)
    assert len(routes) >= 10
    assert {parameter for _, _, parameter in routes} == ids.keys(), "a new kind of object needs its place here"
    before = snapshot(owner)

    for method, path, parameter in routes:
        body = BODIES.get((method, path), {})
        theirs, unknown = ids[parameter], ids[parameter][:-8] + "00000000"
        answer = stranger.ask(method, path.format(**{parameter: theirs}), **body)
        nothing = stranger.ask(method, path.format(**{parameter: unknown}), **body)

        assert answer.status_code == nothing.status_code == 404, (method, path, answer.text)
        assert answer.content == nothing.content.replace(unknown.encode(), theirs.encode()), (method, path)
        assert header_names(answer) == header_names(nothing), (method, path)

    assert snapshot(owner) == before


def snapshot(tenant: Tenant) -> dict[str, Any]:
    """All that a tenant sees, contents included."""
    file_ids = tenant.listed("/v1/files")
    return {
        "files": tenant.ask("GET", "/v1/files").json(),
        "batches": tenant.ask("GET", "/v1/batches").json(),
        "webhooks": tenant.ask("GET", "/v1/webhook_endpoints").json(),
        "contents": [tenant.ask("GET", f"/v1/files/{file_id}/content").content for file_id in file_ids],
    }


def header_names(answer: Any) -> set[str]:
    return set(answer.headers) - {"content-length"}


def test_the_owner_passes_where_the_stranger_does_not(app: FastAPI, owner: Tenant, ids: dict[str, str]) -> None:
    """So that a 404 of the walk is the project's, and not that of a route which answers everybody so."""
    order = {"GET": 0, "HEAD": 0, "POST": 1, "DELETE": 2}
    for method, path, parameter in sorted(named_routes(app), key=lambda route: order[route[0]]):
        body = BODIES.get((method, path), {})
        answer = owner.ask(method, path.format(**{parameter: ids[parameter]}), **body)
        assert answer.status_code != 404, (method, path, answer.text)


def test_lists_hold_what_is_ones_own(owner: Tenant, stranger: Tenant, ids: dict[str, str]) -> None:
    mine = stranger.upload()
    batch = stranger.create(mine)
    webhook = stranger.add_webhook()

    assert stranger.listed("/v1/webhook_endpoints") == [webhook]
    assert owner.listed("/v1/webhook_endpoints") == [ids["webhook_endpoint_id"]]
    assert stranger.listed("/v1/files") == [mine]
    assert stranger.listed("/v1/batches") == [batch]
    assert set(owner.listed("/v1/files")) == {ids["file_id"], "file-output"}
    assert owner.listed("/v1/batches") == [ids["batch_id"]]
    assert stranger.listed("/v1/files", purpose="batch_output") == []


@pytest.mark.parametrize(
    ("path", "parameter"),
    [
        ("/v1/files", "file_id"),
        ("/v1/batches", "batch_id"),
        ("/v1/webhook_endpoints", "webhook_endpoint_id"),
    ],
)
def test_a_foreign_cursor_is_an_unknown_one(stranger: Tenant, ids: dict[str, str], path: str, parameter: str) -> None:
    theirs, unknown = ids[parameter], ids[parameter][:-8] + "00000000"
    answers = [stranger.ask("GET", path, params={"after": after}) for after in (theirs, unknown)]
    assert [answer.status_code for answer in answers] == [400, 400]
    assert answers[0].text == answers[1].text.replace(unknown, theirs)


def test_a_batch_cannot_read_a_foreign_file(
    owner: Tenant, stranger: Tenant, ids: dict[str, str], settings: Settings, store: BatchStore, files: FileStore
) -> None:
    theirs = validated(stranger.create(ids["file_id"]), settings, store, files)
    unknown = validated(stranger.create("file-00000000"), settings, store, files)
    own = validated(owner.create(ids["file_id"]), settings, store, files)

    assert (theirs.status, unknown.status, own.status) == ("failed", "failed", "in_progress")
    assert theirs.errors[0].code == "invalid_request"
    assert theirs.errors[0].message == unknown.errors[0].message.replace("file-00000000", ids["file_id"])
    assert theirs.errors[0].message.startswith("Cannot find file")


def validated(batch_id: str, settings: Settings, store: BatchStore, files: FileStore) -> Any:
    """Validate a batch as the graph does."""
    workspace = LocalWorkspace(settings.batches_folder, settings.datasets_folder)
    catalog, limits = MemoryCatalog([Model(name="tiny", path="models/tiny")]), ValidationLimits(5, 5)
    validate_batch(store.batches.get(batch_id), store, files, workspace, catalog, limits, FixedClock())
    return store.batches.get(batch_id)


def test_a_foreign_part_does_not_complete_an_upload(owner: Tenant, stranger: Tenant) -> None:
    part_id = owner.send_part(owner.begin_upload())
    mine = stranger.begin_upload()

    answers = [
        stranger.ask("POST", f"/v1/uploads/{mine}/complete", json={"part_ids": [part]})
        for part in (part_id, "part_00000000")
    ]
    assert [answer.status_code for answer in answers] == [400, 400]
    assert answers[0].text.replace(part_id, "") == answers[1].text.replace("part_00000000", "")


def test_a_file_that_a_foreign_batch_names_can_be_deleted(owner: Tenant, stranger: Tenant) -> None:
    file_id = owner.upload()
    stranger.create(file_id)
    assert owner.ask("DELETE", f"/v1/files/{file_id}").status_code == 200


def test_two_keys_of_one_project_share_everything(
    owner: Tenant, client: TestClient, new_key: Callable[..., str]
) -> None:
    second = Tenant("team-a", client, new_key("team-a"))
    file_id = owner.upload()
    assert second.listed("/v1/files") == [file_id]
    assert second.ask("DELETE", f"/v1/files/{file_id}").status_code == 200


def test_what_was_made_without_keys_belongs_to_the_default_project(
    store: BatchStore, client: TestClient, new_key: Callable[..., str]
) -> None:
    store.files.add(File("file-old", 3, 1, "old.jsonl", "user_data", "ab" * 32))
    heir, other = (Tenant(name, client, new_key(name)) for name in ("default", "team-b"))
    assert heir.listed("/v1/files") == ["file-old"]
    assert other.listed("/v1/files") == []
