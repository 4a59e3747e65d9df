"""The model catalogue: the file's shape and its errors, MODEL, and what servers behind ENGINE_URL say."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from vllm_batch_dagster.adapters.catalog import REMEMBER_SECONDS, ServedCatalog, load_catalog, read_models
from vllm_batch_dagster.adapters.followed_catalog import LOOK_SECONDS, FollowedCatalog
from vllm_batch_dagster.core.errors import ConfigurationError, EngineUnavailable
from vllm_batch_dagster.core.models import Model

NOWHERE = "http://127.0.0.1:1"


class Servers:
    """A stand-in for GET /v1/models of an engine: says what `answer` holds, counts how often it was asked."""

    def __init__(self) -> None:
        self.answer: tuple[int, bytes] = (200, b"{}")
        self.asked: list[tuple[str, str | None]] = []
        servers = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                servers.asked.append((self.path, self.headers.get("Authorization")))
                status, body = servers.answer
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                """Say nothing."""

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def serve(self, **names: str | None) -> None:
        """Serve these names, each with its root."""
        cards = [{"id": name.replace("__", "/"), "object": "model", "root": root} for name, root in names.items()]
        self.answer = 200, json.dumps({"object": "list", "data": cards}).encode()


@pytest.fixture
def engine() -> Iterator[Servers]:
    yield from run_servers()


@pytest.fixture
def other_engine() -> Iterator[Servers]:
    yield from run_servers()


def run_servers() -> Iterator[Servers]:
    servers = Servers()
    thread = threading.Thread(target=servers.http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield servers
    servers.http.shutdown()
    servers.http.server_close()
    thread.join()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A catalogue with one local model, one behind a relative path, and one of Hugging Face."""
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    path = tmp_path / "models" / "models.yaml"
    path.write_text(
        """
        models:
          - {name: tiny, aliases: [gpt-4o-mini, small], path: tiny, task: generate, args: [--max-model-len, 2048]}
          - {name: embedder, path: ../elsewhere, task: embed}
          - {name: big, path: owner/big-model, aliases: , args: }
        """
    )
    return path


def names(models: object) -> list[str]:
    assert isinstance(models, tuple)
    return [model.name for model in models]


class TestFile:
    def test_entries_become_models_in_order(self, file: Path, tmp_path: Path) -> None:
        catalog = load_catalog(file)
        assert catalog.all() == (
            Model(
                "tiny",
                str(tmp_path / "models" / "tiny"),
                aliases=("gpt-4o-mini", "small"),
                args=("--max-model-len", "2048"),
            ),
            Model("embedder", str(tmp_path / "elsewhere"), task="embed"),
            Model("big", "owner/big-model"),
        )

    def test_a_model_is_found_by_every_name(self, file: Path) -> None:
        catalog = load_catalog(file)
        assert {model.name for name in ("tiny", "gpt-4o-mini", "small") if (model := catalog.find(name))} == {"tiny"}
        assert catalog.find("Tiny") is None
        assert catalog.find("") is None

    @pytest.mark.parametrize("content", ["", "models:", "models: []", "# nothing yet"])
    def test_an_empty_catalogue_has_no_models(self, tmp_path: Path, content: str) -> None:
        (tmp_path / "models.yaml").write_text(content)
        assert load_catalog(tmp_path / "models.yaml").all() == ()

    def test_a_missing_catalogue_says_the_mend(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigurationError, match=r"models\.yaml: run `make setup`, or set MODELS_FILE / MODEL"):
            load_catalog(tmp_path / "models.yaml")

    def test_a_catalogue_that_is_a_folder_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigurationError, match="cannot be read: Is a directory"):
            load_catalog(tmp_path)

    @pytest.mark.parametrize(
        ("entry", "said"),
        [
            (
                "{name: a, path: p, colour: red}",
                "entry 2 (a) of `models` is wrong: Object contains unknown field `colour`",
            ),
            ("{name: a, path: p, task: chat}", "entry 2 (a) of `models` is wrong: Invalid enum value 'chat'"),
            ("{name: a}", "entry 2 (a) of `models` is wrong: Object missing required field `path`"),
            ("{path: p}", "entry 2 of `models` is wrong: Object missing required field `name`"),
            ("{name: '', path: p}", "entry 2 of `models` is wrong"),
            ("{name: a, path: p, args: --verbose}", "entry 2 (a) of `models` is wrong: Expected `array | null`"),
            ("{name: a, path: p, args: [true]}", "entry 2 (a) of `models` is wrong"),
            ("just-a-name", "entry 2 of `models` is wrong: Expected `object`"),
            ("{name: first, path: p}", "the name 'first' stands in entry 1 and in entry 2"),
            ("{name: b, path: p, aliases: [one]}", "the name 'one' stands in entry 1 and in entry 2"),
            ("{name: b, path: p, aliases: [b]}", "the name 'b' stands in entry 2 and in entry 2"),
        ],
    )
    def test_a_wrong_entry_is_named_with_its_mend(self, tmp_path: Path, entry: str, said: str) -> None:
        path = tmp_path / "models.yaml"
        path.write_text(f"models:\n  - {{name: first, path: p, aliases: [one]}}\n  - {entry}\n")
        with pytest.raises(ConfigurationError) as wrong:
            load_catalog(path)
        assert said in str(wrong.value)
        assert str(path) in str(wrong.value)
        assert "Mend it: an entry has `name`" in str(wrong.value) or "must differ" in str(wrong.value)

    @pytest.mark.parametrize("content", ["models: [", "- a list", "model: []", "models: 3", "models: [\0]", "\xff"])
    def test_a_file_of_another_shape_is_refused(self, tmp_path: Path, content: str) -> None:
        (tmp_path / "models.yaml").write_bytes(content.encode("latin-1"))
        with pytest.raises(ConfigurationError, match=r"models\.yaml cannot be read: .*one key, `models`"):
            load_catalog(tmp_path / "models.yaml")


class TestExtra:
    def test_a_hugging_face_id_is_added_last_with_a_short_name(self, file: Path) -> None:
        catalog = load_catalog(file, extra="owner/new-model")
        assert names(catalog.all()) == ["tiny", "embedder", "big", "owner/new-model"]
        assert catalog.find("new-model") == Model("owner/new-model", "owner/new-model", aliases=("new-model",))

    def test_it_needs_no_file(self, tmp_path: Path) -> None:
        assert load_catalog(tmp_path / "none.yaml", extra="gpt2").all() == (Model("gpt2", "gpt2"),)

    def test_a_local_folder_is_served_under_the_given_string(self, tmp_path: Path) -> None:
        folder = tmp_path / "weights" / "mine"
        folder.mkdir(parents=True)
        (model,) = load_catalog(tmp_path / "none.yaml", extra=f"{folder}/").all()
        assert model == Model(f"{folder}/", str(folder), aliases=("mine",))

    def test_a_folder_beside_the_working_directory(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "weights" / "mine").mkdir(parents=True)
        monkeypatch.chdir(tmp_path)
        (model,) = load_catalog(tmp_path / "none.yaml", extra="weights/mine").all()
        assert model == Model("weights/mine", str(tmp_path / "weights" / "mine"), aliases=("mine",))

    def test_a_folder_that_is_not_there_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigurationError, match="MODEL is '/no/such/folder'"):
            load_catalog(tmp_path / "none.yaml", extra="/no/such/folder")

    def test_the_files_own_entry_holds(self, file: Path) -> None:
        assert load_catalog(file, extra="tiny").all() == load_catalog(file).all()
        assert load_catalog(file, extra="small").all() == load_catalog(file).all()

    def test_a_taken_short_name_is_left_to_its_owner(self, file: Path) -> None:
        catalog = load_catalog(file, extra="owner/tiny")
        assert catalog.find("owner/tiny") == Model("owner/tiny", "owner/tiny")
        found = catalog.find("tiny")
        assert found is not None
        assert found.aliases == ("gpt-4o-mini", "small")


class TestFollowed:
    def test_a_changed_file_is_seen_after_a_while(self, file: Path) -> None:
        now = [100.0]
        catalog = FollowedCatalog(file, read_models(file), lambda: read_models(file), clock=lambda: now[0])
        file.write_text("models: [{name: new, path: owner/new}]")
        assert catalog.find("tiny") is not None
        now[0] += LOOK_SECONDS
        assert names(catalog.all()) == ["new"]
        assert catalog.find("tiny") is None

    def test_a_broken_or_missing_file_changes_nothing_until_it_is_whole(self, file: Path) -> None:
        now = [100.0]
        catalog = FollowedCatalog(file, read_models(file), lambda: read_models(file), clock=lambda: now[0])
        for content in ("models: [", None):
            file.write_text(content) if content else file.unlink()
            now[0] += LOOK_SECONDS
            assert names(catalog.all()) == ["tiny", "embedder", "big"]
        file.write_text("models: [{name: new, path: owner/new}]")
        now[0] += LOOK_SECONDS
        assert names(catalog.all()) == ["new"]


class TestServed:
    def test_the_servers_names_are_the_models(self, engine: Servers, tmp_path: Path) -> None:
        engine.serve(llama="owner/llama", adapter=None)
        catalog = load_catalog(tmp_path / "none.yaml", engine_url=f"{engine.url}/v1/")
        assert catalog.all() == (Model("llama", "owner/llama"), Model("adapter", "adapter"))
        assert catalog.find("llama") == Model("llama", "owner/llama")
        assert catalog.find("other") is None

    def test_nothing_is_asked_before_a_look_up(self, engine: Servers, tmp_path: Path) -> None:
        load_catalog(tmp_path / "none.yaml", engine_url=engine.url)
        assert engine.asked == []

    def test_the_file_adds_what_it_knows_of_served_models_only(self, engine: Servers, file: Path) -> None:
        engine.serve(other="x", embedder="y", small="z")
        catalog = load_catalog(file, engine_url=engine.url)
        assert names(catalog.all()) == ["small", "embedder", "other"]
        found = catalog.find("embedder")
        assert found is not None
        assert found.task == "embed"
        # Requests reach the server unchanged, so a name that it does not take is no name.
        assert catalog.find("tiny") is None
        assert catalog.find("gpt-4o-mini") is None
        assert catalog.find("big") is None

    def test_an_answer_holds_for_a_while(self, engine: Servers) -> None:
        now = [100.0]
        catalog = ServedCatalog([engine.url], (), clock=lambda: now[0])
        engine.serve(one="x")
        assert names(catalog.all()) == ["one"]
        engine.serve(two="x")
        now[0] += REMEMBER_SECONDS - 1
        assert catalog.find("one") is not None
        now[0] += 1
        assert names(catalog.all()) == ["two"]
        assert len(engine.asked) == 2

    def test_a_failure_is_not_remembered(self, engine: Servers) -> None:
        catalog = ServedCatalog([engine.url], ())
        engine.answer = 503, b""
        with pytest.raises(EngineUnavailable):
            catalog.all()
        engine.serve(one="x")
        assert names(catalog.all()) == ["one"]

    def test_a_server_that_does_not_answer_adds_nothing(self, engine: Servers, tmp_path: Path) -> None:
        engine.serve(one="x")
        catalog = load_catalog(tmp_path / "none.yaml", engine_url=f"{NOWHERE}, {engine.url}")
        assert names(catalog.all()) == ["one"]

    def test_what_any_server_serves_is_a_model(self, engine: Servers, other_engine: Servers, tmp_path: Path) -> None:
        engine.serve(one="x", both="first")
        other_engine.serve(both="second", two="y")
        catalog = load_catalog(tmp_path / "none.yaml", engine_url=f"{engine.url},{other_engine.url}")
        assert names(catalog.all()) == ["one", "both", "two"]
        assert catalog.find("both") == Model("both", "first")

    def test_no_server_at_all_names_each(self, tmp_path: Path) -> None:
        catalog = load_catalog(tmp_path / "none.yaml", engine_url=f"{NOWHERE},http://localhost:2")
        with pytest.raises(EngineUnavailable, match=r"127\.0\.0\.1:1 does not answer.*localhost:2 does not answer"):
            catalog.find("one")

    def test_the_key_is_sent(self, engine: Servers, tmp_path: Path) -> None:
        engine.serve(one="x")
        load_catalog(tmp_path / "none.yaml", engine_url=engine.url, api_key="secret").all()
        load_catalog(tmp_path / "none.yaml", engine_url=engine.url).all()
        assert engine.asked == [("/v1/models", "Bearer secret"), ("/v1/models", None)]

    @pytest.mark.parametrize(
        ("status", "body", "said"),
        [
            (401, b"{}", "answers 401: set ENGINE_API_KEY"),
            (404, b"not found", "answers 404: check that ENGINE_URL is a vLLM server"),
            (200, b"<html>", "is no list of models"),
            (200, b'{"data": [{"name": "x"}]}', "is no list of models"),
            (200, b'{"data": [{"id": "\xff"}]}', "is no list of models"),
        ],
    )
    def test_another_answer_is_explained(self, engine: Servers, status: int, body: bytes, said: str) -> None:
        engine.answer = status, body
        with pytest.raises(EngineUnavailable, match=said):
            ServedCatalog([engine.url], ()).all()

    def test_a_proxy_of_the_environment_is_passed_by(self, engine: Servers, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("http_proxy", NOWHERE)
        engine.serve(one="x")
        assert names(ServedCatalog([engine.url], ()).all()) == ["one"]

    def test_what_is_no_url_is_refused_at_once(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigurationError, match="ENGINE_URL"):
            load_catalog(tmp_path / "none.yaml", engine_url="file:///etc/passwd")
