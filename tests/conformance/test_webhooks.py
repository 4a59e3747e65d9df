"""Numbers 65 to 69 of the checklist: the event of each terminal state, as OpenAI signs and sends it."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import openai
import pytest
from openai.types.webhooks import (
    BatchCancelledWebhookEvent,
    BatchCompletedWebhookEvent,
    BatchExpiredWebhookEvent,
    BatchFailedWebhookEvent,
)

from tests.conformance.inputs import INPUTS
from tests.conformance.receiver import FIRST_ANSWER, Delivery, Receiver
from tests.conformance.submissions import TERMINAL, submit
from tests.stack import wait_for
from tests.target import Target

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SECONDS = 800
CLASSES = {
    "completed": BatchCompletedWebhookEvent,
    "failed": BatchFailedWebhookEvent,
    "cancelled": BatchCancelledWebhookEvent,
    "expired": BatchExpiredWebhookEvent,
}
TYPES = [f"batch.{status}" for status in CLASSES]
ENDS = {"completed": "all_good", "failed": "broken", "cancelled": "cut", "expired": "expiring"}


@dataclass(frozen=True, slots=True)
class Hooks:
    """A receiver with an endpoint on each of its paths, and a batch for each terminal state."""

    client: openai.OpenAI
    receiver: Receiver
    secrets: Mapping[str, Sequence[str]]
    batches: Mapping[str, str]

    def wait(self, name: str, status: str, count: int = 1) -> Sequence[Delivery]:
        """Return the deliveries of one event to one path, once there are so many."""

        def found() -> Sequence[Delivery]:
            wanted = self.batches[status]
            return [one for one in self.receiver.got(name) if json.loads(one.body)["data"]["id"] == wanted]

        wait_for(lambda: len(found()) >= count, SECONDS)
        return found()


def refuse_without_endpoints(client: openai.OpenAI, config: pytest.Config) -> None:
    """Skip where another server sends no webhooks at all: then there is nothing of 65 to 69 that it could get wrong."""
    try:
        client.webhooks.list()
    except openai.NotFoundError:
        if not config.getoption("base_url"):
            raise
        pytest.skip("this server has no /v1/webhook_endpoints: it sends no webhooks")


@pytest.fixture(scope="module")
def hooks(target: Target, request: pytest.FixtureRequest) -> Iterator[Hooks]:
    """Windows of one minute are an extension: all of it is about the extended server, which is lenient elsewhere."""
    with openai.OpenAI(base_url=target.extended_url, api_key=target.extended_key) as client:
        refuse_without_endpoints(client, request.config)
        receiver = Receiver()
        made = {
            name: client.webhooks.create(name=name, url=f"{receiver.url}/{name}", event_types=TYPES)  # type: ignore[arg-type]
            for name in FIRST_ANSWER
        }
        secrets = {name: [endpoint.signing_secret] for name, endpoint in made.items()}
        rotated = client.webhooks.rotate_secret(made["ok"].id, keep_old_secret_active_for_24_hours=True)
        secrets["ok"].append(rotated.signing_secret)
        inputs = {status: INPUTS[name](target) for status, name in ENDS.items()}
        inputs["failed"] = replace(inputs["failed"], parameters={"metadata": {"validation": "strict"}})
        batches = {status: submit(client, wanted).id for status, wanted in inputs.items()}
        client.batches.cancel(batches["cancelled"])
        yield Hooks(client, receiver, secrets, batches)
        for endpoint in made.values():
            client.webhooks.delete(endpoint.id)
    receiver.close()


def test_h065_one_event_for_each_terminal_state(hooks: Hooks) -> None:
    for status, kind in CLASSES.items():
        delivery = hooks.wait("empty", status)[0]
        event = hooks.client.webhooks.unwrap(delivery.body, delivery.headers, secret=hooks.secrets["empty"][0])
        assert isinstance(event, kind)
        assert (event.type, event.object) == (f"batch.{status}", "event")
        assert event.data.id == hooks.batches[status]
        batch = hooks.client.batches.retrieve(event.data.id)
        assert batch.status == status
        assert batch.status in TERMINAL
        assert event.created_at == getattr(batch, f"{status}_at")
    # One event, which comes again when our answer to it was late.
    events = [{one.id for one in hooks.wait("empty", status)} for status in CLASSES]
    assert [len(ids) for ids in events] == [1] * len(CLASSES)
    assert len(set().union(*events)) == len(CLASSES)


def test_h066_a_tampered_event_is_refused(hooks: Hooks) -> None:
    delivery = hooks.wait("empty", "failed")[0]
    secret, other = hooks.secrets["empty"][0], hooks.secrets["error"][0]
    for body, key in ((delivery.body + b" ", secret), (delivery.body, other)):
        with pytest.raises(openai.InvalidWebhookSignatureError):
            hooks.client.webhooks.unwrap(body, delivery.headers, secret=key)


def test_h067_a_retry_is_signed_anew(hooks: Hooks) -> None:
    """The client refuses what is older than 300 s, and retries go on for days: each has a time of its own."""
    first, second = hooks.wait("error", "failed", 2)[:2]
    assert first.id == second.id
    assert int(first.headers["webhook-timestamp"]) < int(second.headers["webhook-timestamp"])
    assert first.headers["webhook-signature"] != second.headers["webhook-signature"]
    assert first.body == second.body
    hooks.client.webhooks.unwrap(second.body, second.headers, secret=hooks.secrets["error"][0])


def test_h068_what_is_retried(hooks: Hooks) -> None:
    for name in ("error", "redirect", "hang"):
        assert len({one.id for one in hooks.wait(name, "failed", 2)}) == 1, name
    assert len(hooks.wait("empty", "failed")) == 1


def test_h069_both_secrets_hold_during_rotation(hooks: Hooks) -> None:
    delivery = hooks.wait("ok", "failed")[0]
    signatures = delivery.headers["webhook-signature"].split()
    assert [signature.split(",")[0] for signature in signatures] == ["v1", "v1"]
    for secret in hooks.secrets["ok"]:
        hooks.client.webhooks.unwrap(delivery.body, delivery.headers, secret=secret)
