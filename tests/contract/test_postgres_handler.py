"""The handler `postgres` on a real server: what the rows hold, whose results stay, migrations, and what errors say."""

import io
import itertools
import json
import logging
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import psycopg
import pytest
from psycopg.rows import dict_row
from pydantic import SecretStr

from handlers import postgres_schema
from handlers.base import Delivery, DeliveryFailed, Undeliverable
from handlers.postgres import PostgresHandler
from handlers.settings import HandlerSettings
from handlers.testing import BreakingFile, Case, answered, three_kinds, unanswered
from vllm_batch_dagster.core.errors import ConfigurationError

PASSWORD = "not-for-any-log"
_schemas = itertools.count(1)


class Table:
    """A handler with a schema of its own."""

    def __init__(self, dsn: str) -> None:
        self.dsn, self.schema = dsn, f"table_{next(_schemas)}"
        self.handler = self.make()

    def make(self) -> PostgresHandler:
        return PostgresHandler(
            HandlerSettings(handler_postgres_dsn=SecretStr(self.dsn), handler_postgres_schema=self.schema)
        )

    def ask(self, statement: str, *values: object) -> list[dict[str, Any]]:
        with psycopg.connect(self.dsn, autocommit=True, row_factory=dict_row) as connection:
            cursor = connection.execute(statement.replace("{schema}", self.schema).encode(), values)
            return cursor.fetchall() if cursor.description else []

    def rows(self, table: str = "results") -> dict[str, dict[str, Any]]:
        key = "custom_id" if table == "results" else "batch_id"
        return {row[key]: row for row in self.ask(f"SELECT * FROM {{schema}}.{table} ORDER BY {key}")}


@pytest.fixture
def table(handler_dsn: str) -> Table:
    return Table(handler_dsn)


def test_what_a_row_holds(table: Table) -> None:
    table.handler.deliver(three_kinds("batch_1").delivery())
    rows = table.rows()
    good, refused, lost = rows["a"], rows["c"], rows["d"]
    assert good["response"]["choices"][0]["message"]["content"] == good["answer"] == "an answer"
    assert (good["status"], good["status_code"], good["model"]) == ("answered", 200, "tiny")
    assert (good["finish_reason"], good["input_tokens"], good["output_tokens"]) == ("stop", 3, 5)
    assert (good["batch_id"], good["version"], good["project_id"]) == ("batch_1", 1, "default")
    assert (good["endpoint"], good["metadata"]) == ("/v1/chat/completions", {"team": "sëarch"})
    assert (good["request_id"], good["error"], good["error_code"]) == ("req_a", None, None)
    assert good["delivered_at"].tzinfo is not None
    assert (refused["status"], refused["status_code"], refused["error_code"]) == ("failed", 400, "400")
    assert (refused["error_message"], refused["error"]["type"]) == ("too long", "invalid_request_error")
    assert (lost["status"], lost["status_code"], lost["response"]) == ("failed", None, None)
    assert lost["error"]["code"] == lost["error_code"] == "batch_expired"


def test_what_is_noted_of_a_delivery(table: Table) -> None:
    delivery = three_kinds("batch_1").delivery()
    table.handler.deliver(delivery)
    noted = table.rows("deliveries")["batch_1"]
    assert (noted["version"], noted["delivery_key"], noted["status"]) == (1, delivery.key, "completed")
    assert (noted["answered"], noted["failed"], noted["metadata"]) == (2, 2, {"team": "sëarch"})


def test_what_postgresql_cannot_store_is_replaced_and_the_row_says_so(table: Table) -> None:
    lines = [answered("nul", "a\x00b"), answered("text", "a\U0001f600\\u0000b")]
    table.handler.deliver(Case(lines, batch_id="batch_1").delivery())
    rows = table.rows()
    said = {name: row["response"]["choices"][0]["message"]["content"] for name, row in rows.items()}
    assert said == {"nul": "a\ufffdb", "text": "a\U0001f600\\u0000b"}
    assert {name: row["is_altered"] for name, row in rows.items()} == {"nul": True, "text": False}
    assert (rows["nul"]["answer"], rows["text"]["answer"]) == ("a\ufffdb", "a\U0001f600\\u0000b")


def test_older_results_never_take_the_place_of_newer_ones(table: Table) -> None:
    old = three_kinds("batch_1")
    new = replace(old, output=[*old.output, answered("c", "late")], errors=[unanswered("d")], version=2)
    table.handler.deliver(new.delivery())
    table.handler.deliver(old.delivery())
    rows = table.rows()
    assert {row["version"] for row in rows.values()} == {2}
    assert (rows["c"]["answer"], rows["c"]["status"]) == ("late", "answered")
    assert table.rows("deliveries")["batch_1"]["version"] == 2


def test_lines_that_are_gone_from_newer_results_go(table: Table) -> None:
    old = three_kinds("batch_1")
    table.handler.deliver(old.delivery())
    table.handler.deliver(replace(old, output=old.output[:1], errors=(), version=2).delivery())
    assert list(table.rows()) == ["a"]


def test_readers_see_all_of_a_delivery_or_nothing(table: Table) -> None:
    old = three_kinds("batch_1")
    table.handler.deliver(old.delivery())
    before = table.rows()
    new = replace(old, output=[answered(f"line-{number}", "word " * 100) for number in range(2000)], version=2)
    with pytest.raises(Exception, match="cannot be read any further"):
        table.handler.deliver(new.delivery(BreakingFile))
    assert table.rows() == before


def test_two_attempts_at_a_batch_do_not_meet(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that was given up after its time goes on: the next one fails for now."""
    monkeypatch.setattr("handlers.postgres.LOCK_SECONDS", 1)
    case = three_kinds("batch_1")
    reached, go_on = threading.Event(), threading.Event()

    def open_slowly() -> Any:
        reached.set()
        assert go_on.wait(120)
        return case.delivery().open_output()

    with ThreadPoolExecutor() as pool:
        first = pool.submit(table.handler.deliver, replace(case.delivery(), open_output=open_slowly))
        assert reached.wait(120)
        try:
            with pytest.raises(DeliveryFailed, match="another attempt is writing batch_1"):
                table.make().deliver(case.delivery())
        finally:
            go_on.set()
        first.result(120)
    table.make().deliver(case.delivery())
    assert len(table.rows()) == 4


def test_ids_that_become_the_same_cannot_be_delivered(table: Table) -> None:
    case = Case([answered("a\x00"), answered("a\ufffd")], batch_id="batch_1")
    with pytest.raises(Undeliverable, match="the same custom_id"):
        table.handler.deliver(case.delivery())
    assert table.rows() == {}


class TestMigrations:
    def test_first_deliveries_of_many_processes_make_the_tables_once(self, table: Table) -> None:
        cases = [three_kinds(f"batch_{number}") for number in range(8)]
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda case: table.make().deliver(case.delivery()), cases))
        assert len(table.ask("SELECT 1 AS one FROM {schema}.results")) == 8 * 4
        assert len(table.ask("SELECT 1 AS one FROM {schema}.schema_version")) == len(postgres_schema.STEPS)

    def test_a_new_step_changes_tables_that_hold_rows(self, table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
        table.handler.deliver(three_kinds("batch_1").delivery())
        step = "ALTER TABLE {schema}.results ADD COLUMN note text NOT NULL DEFAULT 'none'"
        monkeypatch.setattr(postgres_schema, "STEPS", (*postgres_schema.STEPS, step))
        table.handler.deliver(three_kinds("batch_2").delivery())
        notes = table.ask("SELECT batch_id, note FROM {schema}.results")
        assert sorted({(row["batch_id"], row["note"]) for row in notes}) == [("batch_1", "none"), ("batch_2", "none")]

    def test_a_step_that_fails_leaves_nothing(self, table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
        table.handler.deliver(three_kinds("batch_1").delivery())
        steps = (*postgres_schema.STEPS, "ALTER TABLE {schema}.results ADD COLUMN note text; SELECT 1 / 0")
        monkeypatch.setattr(postgres_schema, "STEPS", steps)
        with pytest.raises(DeliveryFailed, match="division by zero"):
            table.handler.deliver(three_kinds("batch_2").delivery())
        assert "note" not in table.rows()["a"]
        assert len(table.ask("SELECT 1 AS one FROM {schema}.schema_version")) == len(steps) - 1

    def test_tables_of_a_newer_program_are_left_alone(self, table: Table) -> None:
        table.handler.deliver(three_kinds("batch_1").delivery())
        table.ask("INSERT INTO {schema}.schema_version (version) VALUES (99)")
        with pytest.raises(DeliveryFailed, match="of version 99, this program knows"):
            table.handler.deliver(three_kinds("batch_2").delivery())

    def test_a_user_without_rights_to_the_database_takes_a_schema_that_is_there(self, table: Table) -> None:
        user = f"user_of_{table.schema}"
        table.ask(f"CREATE ROLE {user} LOGIN")
        table.ask(f"CREATE SCHEMA {{schema}} AUTHORIZATION {user}")
        table.dsn = table.dsn.replace("postgres@", f"{user}@")
        table.make().deliver(three_kinds("batch_1").delivery())
        assert len(table.rows()) == 4


class TestErrors:
    def told(self, deliver: Callable[[Delivery], None], case: Case, kind: type[Exception]) -> str:
        """Return all that a log could show of the error."""
        with pytest.raises(kind) as caught:
            deliver(case.delivery())
        return "".join(traceback.format_exception(caught.value))

    @pytest.mark.parametrize(
        ("dsn", "kind", "said"),
        [
            (f"postgresql://me:{PASSWORD}@127.0.0.1:1/x", DeliveryFailed, "refused"),
            (f"postgresql://me:{PASSWORD}@127.0.0.1:x1/x", DeliveryFailed, "port"),
            (f"host=127.0.0.1 passwort {PASSWORD}", ConfigurationError, "HANDLER_POSTGRES_DSN cannot be read"),
            (f"postgresql://me:{PASSWORD}@[127.0.0.1/x", ConfigurationError, "HANDLER_POSTGRES_DSN cannot be read"),
        ],
    )
    def test_the_password_is_never_told(
        self, dsn: str, kind: type[Exception], said: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.DEBUG)
        handler = PostgresHandler(HandlerSettings(handler_postgres_dsn=SecretStr(dsn)))
        told = self.told(handler.deliver, three_kinds("batch_1"), kind)
        assert said in told
        assert PASSWORD not in told + repr(vars(handler)) + repr(HandlerSettings(handler_postgres_dsn=SecretStr(dsn)))
        with pytest.raises(kind):
            handler.check()
        assert PASSWORD not in caplog.text

    def test_answers_are_never_told(self, table: Table) -> None:
        """PostgreSQL's details quote the row, and the error is shown in Dagster."""
        line = json.dumps(answered("a", "a private answer")).replace('"created": 1800000000', '"created": 1e200000')
        delivery = replace(Case([answered("a")], batch_id="batch_1").delivery(), open_output=_file(line))
        with pytest.raises(Undeliverable) as caught:
            table.handler.deliver(delivery)
        told = "".join(traceback.format_exception(caught.value))
        assert "numeric" in told
        assert "private" not in told


def _file(line: str) -> Callable[[], Any]:
    return lambda: io.BytesIO(line.encode() + b"\n")


def test_it_is_off_without_a_destination(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HANDLER_POSTGRES_DSN", raising=False)
    assert not PostgresHandler().enabled()
    monkeypatch.setenv("HANDLER_POSTGRES_DSN", "postgresql://somewhere/x")
    assert PostgresHandler().enabled()
