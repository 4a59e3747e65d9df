"""Webhook endpoints and signing secrets in the batch store: on every implementation the same."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from vllm_batch_dagster.core.errors import NotFound, StateConflict
from vllm_batch_dagster.core.ports import BatchStore
from vllm_batch_dagster.core.webhooks import EndpointParams, SigningSecret, WebhookEndpoint

NOW = 1_700_000_000
TYPES = ("batch.completed", "batch.failed")


def an_endpoint(
    name: str = "a", project_id: str = "team-a", created_at: int = NOW, types: tuple[str, ...] = TYPES
) -> WebhookEndpoint:
    secret = SigningSecret(f"whsec_{name}")
    url = f"https://example.com/{name}"
    return WebhookEndpoint(f"we_{name}", project_id, f"für {name}", url, types, secret, created_at, created_at)


def test_an_endpoint_comes_back_as_it_was(store: BatchStore) -> None:
    store.webhooks.add(an_endpoint())
    assert store.webhooks.get("we_a") == an_endpoint()
    assert store.webhooks.get("we_a", project_id="team-a") == an_endpoint()


def test_an_id_is_taken_once(store: BatchStore) -> None:
    store.webhooks.add(an_endpoint())
    with pytest.raises(StateConflict):
        store.webhooks.add(an_endpoint(project_id="team-b"))
    assert store.webhooks.get("we_a") == an_endpoint()


def test_what_another_project_has_is_unknown(store: BatchStore) -> None:
    store.webhooks.add(an_endpoint())
    for call in (
        lambda: store.webhooks.get("we_a", project_id="team-b"),
        lambda: store.webhooks.get("we_x"),
        lambda: store.webhooks.list(after="we_a", project_id="team-b"),
        lambda: store.webhooks.list(after="we_x"),
        lambda: store.webhooks.change("we_x", EndpointParams(name="x"), NOW),
        lambda: store.webhooks.rotate("we_x", "whsec_n", NOW, keep_old=True),
        lambda: store.webhooks.delete("we_x"),
    ):
        with pytest.raises(NotFound) as caught:
            call()
        assert caught.value.kind == "webhook endpoint"


def test_pages_are_newest_first(store: BatchStore) -> None:
    for name, project, at in (("a", "t", NOW), ("b", "t", NOW + 1), ("c", "u", NOW + 2), ("d", "t", NOW + 1)):
        store.webhooks.add(an_endpoint(name, project, at))

    first = store.webhooks.list(limit=2, project_id="t")
    assert ([each.id for each in first.data], first.has_more) == (["we_d", "we_b"], True)
    last = store.webhooks.list(after="we_b", limit=2, project_id="t")
    assert ([each.id for each in last.data], last.has_more) == (["we_a"], False)
    assert [each.id for each in store.webhooks.list().data] == ["we_c", "we_d", "we_b", "we_a"]


def test_who_listens(store: BatchStore) -> None:
    store.webhooks.add(an_endpoint("both"))
    store.webhooks.add(an_endpoint("failures", types=("batch.failed",)))
    store.webhooks.add(an_endpoint("others", "team-b"))

    def listening(kind: str) -> list[str]:
        return [each.id for each in store.webhooks.listening("team-a", kind)]

    assert listening("batch.failed") == ["we_both", "we_failures"]
    assert listening("batch.completed") == ["we_both"]
    assert listening("batch.expired") == []


def test_a_change_keeps_the_rest(store: BatchStore) -> None:
    store.webhooks.add(an_endpoint())
    store.webhooks.add(an_endpoint("b"))
    changed = store.webhooks.change("we_a", EndpointParams(name="new", event_types=("batch.expired",)), NOW + 5)

    assert store.webhooks.get("we_a") == changed
    assert (changed.name, changed.url, changed.event_types) == ("new", "https://example.com/a", ("batch.expired",))
    assert (changed.created_at, changed.updated_at, changed.secret) == (NOW, NOW + 5, SigningSecret("whsec_a"))
    assert store.webhooks.change("we_a", EndpointParams(name="new"), NOW + 9) == changed
    assert store.webhooks.get("we_b") == an_endpoint("b")


def test_a_rotation(store: BatchStore) -> None:
    store.webhooks.add(an_endpoint())
    kept = store.webhooks.rotate("we_a", "whsec_2", NOW + 5, keep_old=True)
    assert kept.secret == SigningSecret("whsec_2", "whsec_a", NOW + 5 + 86_400)
    assert kept.updated_at == NOW + 5
    assert store.webhooks.get("we_a") == kept

    assert store.webhooks.rotate("we_a", "whsec_3", NOW + 6, keep_old=False).secret == SigningSecret("whsec_3")
    assert store.webhooks.get("we_a").secret == SigningSecret("whsec_3")


def test_a_deleted_endpoint_is_gone(store: BatchStore) -> None:
    store.webhooks.add(an_endpoint())
    store.webhooks.delete("we_a")
    assert store.webhooks.list().data == ()
    with pytest.raises(NotFound):
        store.webhooks.delete("we_a")


def test_changes_at_once_do_not_undo_each_other(store: BatchStore) -> None:
    store.webhooks.add(an_endpoint())
    calls = [
        lambda: store.webhooks.change("we_a", EndpointParams(name="new"), NOW + 1),
        lambda: store.webhooks.change("we_a", EndpointParams(url="https://example.com/new"), NOW + 1),
        lambda: store.webhooks.rotate("we_a", "whsec_new", NOW + 1, keep_old=True),
    ]
    with ThreadPoolExecutor(len(calls)) as pool:
        list(pool.map(lambda call: call(), calls * 3))
    after = store.webhooks.get("we_a")
    assert (after.name, after.url, after.secret.current) == ("new", "https://example.com/new", "whsec_new")


def test_the_secret_of_a_project_is_made_once(store: BatchStore) -> None:
    assert store.webhooks.project_secret("team-a", "whsec_1") == SigningSecret("whsec_1")
    assert store.webhooks.project_secret("team-a", "whsec_2") == SigningSecret("whsec_1")
    assert store.webhooks.project_secret("team-b", "whsec_3") == SigningSecret("whsec_3")


def test_callers_at_once_get_the_same_first_secret(store: BatchStore) -> None:
    with ThreadPoolExecutor(8) as pool:
        made = set(pool.map(lambda number: store.webhooks.project_secret("t", f"whsec_{number}").current, range(8)))
    assert len(made) == 1


def test_the_secret_of_a_project_is_rotated(store: BatchStore) -> None:
    assert store.webhooks.rotate_project_secret("t", "whsec_1", NOW, keep_old=True) == SigningSecret("whsec_1")
    rotated = store.webhooks.rotate_project_secret("t", "whsec_2", NOW, keep_old=True)
    assert rotated == SigningSecret("whsec_2", "whsec_1", NOW + 86_400)
    assert store.webhooks.project_secret("t", "whsec_x") == rotated
    assert store.webhooks.rotate_project_secret("t", "whsec_3", NOW, keep_old=False) == SigningSecret("whsec_3")
    assert store.webhooks.project_secret("t", "whsec_x") == SigningSecret("whsec_3")
