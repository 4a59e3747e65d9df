"""The built-in handlers keep the contract that third parties can run on theirs, on real servers."""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import polars
import psycopg
import pytest
from psycopg import sql
from pydantic import SecretStr

from handlers.base import Handler
from handlers.directory import DirectoryHandler
from handlers.parquet import ParquetHandler
from handlers.postgres import PostgresHandler
from handlers.s3 import S3Handler
from handlers.settings import HandlerSettings
from handlers.testing import HandlerContract
from tests.contract.object_server import ObjectServer, list_keys, list_unfinished, read_object

_schemas = itertools.count(1)


class TestDirectory(HandlerContract):
    folder: Path

    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path: Path) -> None:
        self.folder = tmp_path / "out"

    def make(self) -> Handler:
        return DirectoryHandler(str(self.folder))

    def arrived(self, batch_id: str) -> Sequence[str]:
        with (self.folder / f"{batch_id}.jsonl").open() as lines:
            return [json.loads(line)["custom_id"] for line in lines]


class TestPostgres(HandlerContract):
    settings: HandlerSettings

    @pytest.fixture(autouse=True)
    def _settings(self, handler_dsn: str) -> None:
        self.settings = HandlerSettings(
            handler_postgres_dsn=SecretStr(handler_dsn), handler_postgres_schema=f"contract_{next(_schemas)}"
        )

    def make(self) -> Handler:
        return PostgresHandler(self.settings)

    def make_again(self, handler: Handler) -> Handler:
        return self.make()

    def arrived(self, batch_id: str) -> Sequence[str]:
        with psycopg.connect(self.settings.handler_postgres_dsn.get_secret_value()) as connection:
            table = sql.Identifier(self.settings.handler_postgres_schema, "results")
            select = sql.SQL("SELECT custom_id FROM {} WHERE batch_id = %s").format(table)
            return [row[0] for row in connection.execute(select, (batch_id,))]


class TestS3(HandlerContract):
    with_parquet = False
    objects: ObjectServer
    url: str

    @pytest.fixture(autouse=True)
    def _destination(self, objects: ObjectServer) -> None:
        self.objects, self.url = objects, objects.new_prefix()

    def make(self) -> Handler:
        handler = S3Handler(
            HandlerSettings(
                handler_s3_url=self.url,
                handler_s3_endpoint_url=self.objects.endpoint_url,
                handler_s3_parquet=self.with_parquet,
            )
        )
        handler.check()  # boto3's own 27 MB are not the handler's
        return handler

    def make_again(self, handler: Handler) -> Handler:
        return self.make()

    def arrived(self, batch_id: str) -> Sequence[str]:
        """What the manifest names is all there is."""
        manifest = json.loads(read_object(self.objects, self.url, f"{batch_id}/manifest.json"))
        named = [entry["key"] for entry in manifest["files"]]
        found = [key for key in list_keys(self.objects, self.url) if key.startswith(f"{batch_id}/")]
        assert found == sorted([*named, f"{batch_id}/manifest.json"])
        assert list_unfinished(self.objects, self.url) == []
        lines = [self._read(key) for key in named if key.endswith(".jsonl")]
        return [json.loads(line)["custom_id"] for content in lines for line in content.splitlines()]

    def _read(self, key: str) -> bytes:
        return read_object(self.objects, self.url, key)


class TestS3WithParquet(TestS3):
    with_parquet = True


class TestParquet(HandlerContract):
    folder: Path

    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path: Path) -> None:
        self.folder = tmp_path / "out"

    def make(self) -> Handler:
        return ParquetHandler(HandlerSettings(handler_parquet_url=str(self.folder)))

    def make_again(self, handler: Handler) -> Handler:
        return self.make()

    def arrived(self, batch_id: str) -> Sequence[str]:
        """The folder is read as a data set, as a user would."""
        rows = polars.scan_parquet(self.folder / "results", hive_partitioning=True)
        return rows.filter(batch=batch_id).select("custom_id").collect()["custom_id"].to_list()


class TestParquetOnS3(HandlerContract):
    objects: ObjectServer
    url: str

    @pytest.fixture(autouse=True)
    def _destination(self, objects: ObjectServer) -> None:
        self.objects, self.url = objects, objects.new_prefix()

    def make(self) -> Handler:
        handler = ParquetHandler(
            HandlerSettings(handler_parquet_url=self.url, handler_s3_endpoint_url=self.objects.endpoint_url)
        )
        handler.check()
        return handler

    def make_again(self, handler: Handler) -> Handler:
        return self.make()

    def arrived(self, batch_id: str) -> Sequence[str]:
        assert list_unfinished(self.objects, self.url) == []
        found = [key for key in list_keys(self.objects, self.url) if f"/batch={batch_id}/" in key]
        assert found == [f"results/batch={batch_id}/results.parquet"]
        rows = polars.read_parquet(read_object(self.objects, self.url, found[0]))
        return rows["custom_id"].to_list()
