"""What the manifest says of engine and model: digests that change with the files, and nothing that nobody knows."""

import json
import os
import socket
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from vllm_batch_dagster.adapters import model_digests, provenance
from vllm_batch_dagster.adapters.engine.folder import EngineFolder, EngineRecord
from vllm_batch_dagster.adapters.model_digests import describe_model, describe_weights
from vllm_batch_dagster.adapters.provenance import ExternalProvenance, OwnProvenance, last_option
from vllm_batch_dagster.adapters.simulated.process import SimulatedProcess
from vllm_batch_dagster.core.models import Model
from vllm_batch_dagster.core.provenance import ModelFact

COMMAND = ("python", "-m", "vllm", "serve", "/models/x", "--port", "1", "--dtype", "float16", "--dtype=bfloat16")


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine on a machine that others use too may need longer for its answer than a manifest waits."""
    monkeypatch.setattr(provenance, "ASK_SECONDS", 50.0)


def model_folder(folder: Path, weights: bytes = b"w" * 100) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "config.json").write_text(json.dumps({"torch_dtype": "bfloat16"}))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.6, "top_p": 0.9}))
    return folder


def change(path: Path, content: bytes) -> None:
    """Write it anew, with another time of change: that of two writes within one tick of the kernel is the same."""
    before = path.stat().st_mtime_ns
    path.write_bytes(content)
    os.utime(path, ns=(before + 1_000_000, before + 1_000_000))


def digest_of(folder: Path) -> str:
    found = describe_weights(folder)
    assert found is not None
    return found.digest


def test_a_local_model_is_described_by_its_files(tmp_path: Path) -> None:
    fact = describe_model(Model("m", str(model_folder(tmp_path / "m"))))
    assert fact.weights is not None
    assert (fact.weights.method, fact.weights.files, fact.weights.bytes) == ("sha256", 1, 100)
    assert (fact.stored_dtype, fact.sampling_defaults) == ("bfloat16", {"temperature": 0.6, "top_p": 0.9})
    assert fact.tokenizer_sha256
    assert fact.chat_template_sha256
    assert fact.revision is None


def test_the_same_weights_elsewhere_have_the_same_digest_and_other_weights_another(tmp_path: Path) -> None:
    one, same = model_folder(tmp_path / "one"), model_folder(tmp_path / "same")
    other = model_folder(tmp_path / "other", b"w" * 99 + b"v")
    assert digest_of(one) == digest_of(same) != digest_of(other)


def test_weights_that_are_changed_in_place_are_read_again(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "m")
    before = digest_of(folder)
    change(folder / "model.safetensors", b"w" * 99 + b"v")
    assert digest_of(folder) != before


@pytest.mark.parametrize("place", [3, 4_000, 3_999_999])
def test_a_large_file_is_sampled_from_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: int) -> None:
    monkeypatch.setattr(model_digests, "FULL_BYTES", 1000)
    monkeypatch.setattr(model_digests, "BLOCK_BYTES", 1000)
    weights = bytearray(4_000_000)
    weights[:8] = (5000).to_bytes(8, "little")
    folder = model_folder(tmp_path / "m", bytes(weights))
    found = describe_weights(folder)
    assert found is not None
    assert found.method == "sampled"
    weights[place] ^= 1
    change(folder / "model.safetensors", bytes(weights))
    assert digest_of(folder) != found.digest


def test_the_hubs_cache_names_its_files_by_their_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    hub = tmp_path / "models--some--model"
    snapshot = model_folder(hub / "snapshots" / "abc123")
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text("abc123")
    (hub / "blobs").mkdir()
    (snapshot / "model.safetensors").rename(hub / "blobs" / ("a" * 64))
    (snapshot / "model.safetensors").symlink_to(hub / "blobs" / ("a" * 64))
    fact = describe_model(Model("m", "some/model"))
    assert fact.weights is not None
    assert (fact.revision, fact.weights.method) == ("abc123", "hub")


def test_a_model_that_is_not_here_has_a_name_and_a_path_only() -> None:
    assert describe_model(Model("m", "some/where-else")) == ModelFact("m", "some/where-else")


def record(port: int, model: str = "m") -> EngineRecord:
    return EngineRecord("s", "f", model, COMMAND, port, 4, "boot", 12.5, 0)


def test_our_own_engine_is_described_by_its_record_and_its_version(tmp_path: Path) -> None:
    model = Model("m", str(model_folder(tmp_path / "model")))
    folder = EngineFolder(tmp_path / "engine")
    folder.create()
    with SimulatedProcess("--model", "m") as engine:
        port = urlsplit(engine.url).port
        assert port is not None
        folder.write(record(port))
        origin = OwnProvenance(folder.root, "cpu").describe(model)
    assert origin.engine.versions == ("simulated",)
    assert (origin.engine.device, origin.engine.dtype, origin.engine.started_at) == ("cpu", "bfloat16", 12.5)
    assert origin.engine.arguments == COMMAND[4:]
    assert origin.unknown == ("model.revision",)


def test_an_engine_of_another_model_or_none_is_not_taken_for_this_one(tmp_path: Path) -> None:
    folder = EngineFolder(tmp_path)
    folder.create()
    for write in (lambda: None, lambda: folder.write(record(free_port(), "another"))):
        write()
        origin = OwnProvenance(tmp_path, "cpu").describe(Model("m", "some/where-else"))
        assert origin.engine.arguments is None
        assert {"engine.versions", "engine.arguments", "engine.device", "engine.dtype"} <= set(origin.unknown)


def test_of_servers_behind_a_url_only_the_version_is_known(tmp_path: Path) -> None:
    model = Model("m", str(model_folder(tmp_path / "m")))
    with SimulatedProcess("--model", "m") as engine:
        origin = ExternalProvenance(f"{engine.url},http://127.0.0.1:{free_port()}", "").describe(model)
    assert (origin.engine.kind, origin.engine.versions) == ("external", ("simulated",))
    assert origin.model == ModelFact("m")
    assert {"engine.arguments", "engine.dtype", "model.path", "model.weights", "model.tokenizer_sha256"} <= set(
        origin.unknown
    )


@pytest.mark.parametrize(
    ("arguments", "value"),
    [
        ((), None),
        (("--dtype", "half"), "half"),
        (("--dtype=a", "--max_x", "--dtype", "b"), "b"),
        (("--dtypes", "a"), None),
    ],
)
def test_the_last_mention_of_an_option_counts(arguments: tuple[str, ...], value: str | None) -> None:
    assert last_option(arguments, "--dtype") == value


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
