"""Handlers: found by entry point, by module and by a call; a broken one is only reported; the seed's shape and ours."""

import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from handlers import registry
from handlers.base import Delivery, DeliveryFailed, Handler, ResultHandler, Results, Undeliverable
from handlers.courier import HandlerCourier
from handlers.directory import DirectoryHandler
from handlers.registry import BrokenHandler, load_handlers, register_handler
from handlers.testing import three_kinds
from vllm_batch_dagster.adapters.local_files import LocalFiles
from vllm_batch_dagster.core.deliveries import DeliveryRecord, new_delivery
from vllm_batch_dagster.core.models import Batch
from vllm_batch_dagster.core.ports import OutboxEvent

LINES = [b'{"custom_id":"a"}\n', b'{"custom_id":"b"}\n']
EVENT = OutboxEvent("evt_1", "batch_1", "batch.completed", 1, 1)


class Noting(Handler):
    """Notes what it is given."""

    def __init__(self, name: str = "noting", error: Exception | None = None, enabled: object = True) -> None:
        self._name, self._error, self._enabled = name, error, enabled
        self.given: list[Delivery] = []

    def name(self) -> str:
        return self._name

    def enabled(self) -> bool:
        if isinstance(self._enabled, Exception):
            raise self._enabled
        return bool(self._enabled)

    def deliver(self, delivery: Delivery) -> None:
        self.given.append(delivery)
        if self._error:
            raise self._error


class Seeds(ResultHandler):
    """The seed's shape."""

    def __init__(self, answer: bool = True) -> None:
        self.answer, self.given = answer, list[Any]()

    def name(self) -> str:
        return "seeds"

    def enabled(self) -> bool:
        return True

    def handle(self, batch_id: str, results: Results, metadata: Mapping[str, str]) -> bool:
        self.given.append((batch_id, [line["custom_id"] for line in results], metadata))
        return self.answer


@pytest.fixture(autouse=True)
def nothing_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registered", [])


@pytest.fixture
def files(tmp_path: Path) -> LocalFiles:
    files = LocalFiles(tmp_path / "files")
    for file_id in ("file-output", "file-error"):
        stored = files.create(file_id)
        for line in LINES:
            stored.write(line)
        stored.commit()
    return files


def install(monkeypatch: pytest.MonkeyPatch, **entries: str) -> None:
    found = [EntryPoint(name, value, registry.GROUP) for name, value in entries.items()]
    monkeypatch.setattr(registry, "entry_points", lambda group: found)


def a_batch(**changes: Any) -> Batch:
    return replace(three_kinds("batch_1").delivery().batch, **changes)


def to(name: str) -> DeliveryRecord:
    return replace(new_delivery("batch_1", "evt_1", f"handler:{name}", 1, version=1), attempts=2)


class TestRegistry:
    def test_the_built_in_handlers_come_through_their_entry_points(self) -> None:
        found = [handler for handler in load_handlers() if isinstance(handler, Handler)]
        assert "directory" in [handler.name() for handler in found]

    def test_a_broken_handler_is_reported_and_the_others_load(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        (tmp_path / "leaves.py").write_text("import sys\nsys.exit('no licence')\n")
        monkeypatch.syspath_prepend(tmp_path)
        install(
            monkeypatch,
            missing="no_such_module:Handler",
            wrong="pathlib:Path",
            leaves="leaves:Handler",
            directory="handlers.directory:DirectoryHandler",
        )
        good, leaves, missing, wrong = load_handlers()
        assert isinstance(good, DirectoryHandler)
        for broken, problem in ((leaves, "no licence"), (missing, "no_such_module"), (wrong, "not a ResultHandler")):
            assert isinstance(broken, BrokenHandler)
            assert problem in broken.problem

    def test_an_entry_point_may_name_a_module_that_registers(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        lines = ["from result_handlers import register_handler", "from tests.unit.test_handlers import Noting"]
        (tmp_path / "registering.py").write_text("\n".join([*lines, "register_handler(Noting('from a module'))"]))
        monkeypatch.syspath_prepend(tmp_path)
        install(monkeypatch, registering="registering")
        assert [handler.name() for handler in load_handlers() if isinstance(handler, Handler)] == ["from a module"]

    def test_modules_and_files_are_imported_once(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        install(monkeypatch)
        path = tmp_path / "mine.py"
        path.write_text(
            "from result_handlers import register_handler\nfrom tests.unit.test_handlers import Noting\n"
            "class Mine(Noting): pass\nregister_handler(Mine('mine'))\n"
        )
        first, missing = load_handlers([str(path), "no_such_module"])[::-1]
        assert isinstance(first, Handler)
        assert isinstance(missing, BrokenHandler)
        assert missing.name == "no_such_module"
        assert load_handlers([str(path)]) == [first]

    def test_a_file_that_breaks_is_tried_again(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        install(monkeypatch)
        path, modules = tmp_path / "broken.py", set(sys.modules)
        path.write_text("1 / 0")
        for _ in range(2):
            (broken,) = load_handlers([str(path)])
            assert isinstance(broken, BrokenHandler)
            assert "ZeroDivisionError" in broken.problem
        assert not [name for name in set(sys.modules) - modules if name.startswith("handler_file")]

    def test_a_name_is_given_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        install(monkeypatch, directory="handlers.directory:DirectoryHandler")
        register_handler(Noting("directory"))
        first, second = load_handlers()
        assert isinstance(first, DirectoryHandler)
        assert isinstance(second, BrokenHandler)
        assert "another handler has the name" in second.problem

    def test_registering_again_replaces(self, monkeypatch: pytest.MonkeyPatch) -> None:
        install(monkeypatch)
        first, second = Noting(), Noting()
        register_handler(first)
        register_handler(second)
        assert load_handlers() == [second]

    def test_only_handlers_can_be_registered(self) -> None:
        with pytest.raises(TypeError, match="no instance"):
            register_handler("mine")  # type: ignore[arg-type]

    def test_the_seeds_names_are_ours(self) -> None:
        import result_handlers.base

        assert result_handlers.base.ResultHandler is ResultHandler
        assert result_handlers.register_handler is register_handler


class TestResults:
    def test_they_can_be_read_twice(self) -> None:
        def read() -> Iterator[bytes]:
            return iter(LINES)

        shown = Results(read)
        assert [row["custom_id"] for row in shown] == ["a", "b"]
        assert [row["custom_id"] for row in shown] == ["a", "b"]
        assert list(shown.lines()) == LINES

    def test_output_then_errors_and_each_alone(self) -> None:
        delivery = three_kinds("batch_1").delivery()
        assert [line["custom_id"] for line in delivery.results] == ["a", "b", "c", "d"]
        assert [line["custom_id"] for line in delivery.output] == ["a", "b"]
        assert [line["custom_id"] for line in delivery.errors] == ["c", "d"]

    def test_the_seeds_shape_gets_the_same(self) -> None:
        handler = Seeds()
        handler.deliver(three_kinds("batch_1").delivery())
        assert handler.given == [("batch_1", ["a", "b", "c", "d"], {"team": "sëarch"})]
        with pytest.raises(DeliveryFailed, match="did not return True"):
            Seeds(answer=False).deliver(three_kinds("batch_1").delivery())


class TestCourier:
    @pytest.fixture
    def loaded(self, monkeypatch: pytest.MonkeyPatch) -> list[Handler | BrokenHandler]:
        loaded: list[Handler | BrokenHandler] = [Noting("a"), Noting("b"), Noting("off", enabled=False)]
        loaded += [BrokenHandler("broken", "no module"), Noting("doubtful", enabled=RuntimeError("no variable"))]
        monkeypatch.setattr("handlers.courier.load_handlers", lambda modules: loaded)
        return loaded

    @pytest.mark.parametrize(
        ("metadata", "allowed", "names"),
        [
            (None, [], ["a", "b"]),
            ({"handlers": "b"}, [], ["b"]),
            ({"handlers": " b , a,b,"}, [], ["b", "a"]),
            ({"handlers": "none"}, [], []),
            ({"handlers": "off, unknown"}, [], ["off", "unknown"]),
            (None, ["a"], ["a"]),
            (None, ["a", "broken"], ["a", "broken"]),
        ],
    )
    def test_who_gets_the_results(
        self,
        loaded: object,
        files: LocalFiles,
        metadata: dict[str, str] | None,
        allowed: list[str],
        names: list[str],
    ) -> None:
        courier = HandlerCourier(files, limit_seconds=9, allowed=allowed)
        assert courier.targets(a_batch(metadata=metadata), EVENT) == [f"handler:{name}" for name in names]

    def test_a_batch_without_results_has_no_handler(self, loaded: object, files: LocalFiles) -> None:
        courier = HandlerCourier(files, limit_seconds=9)
        assert courier.targets(a_batch(output_file_id=None, error_file_id=None), EVENT) == ()

    def test_why_a_handler_gets_nothing(self, loaded: object, files: LocalFiles) -> None:
        assert HandlerCourier(files, limit_seconds=9, allowed=["a", "off", "doubtful"]).unused() == {
            "b": "off: HANDLERS does not name it",
            "off": "off",
            "broken": "broken: no module",
            "doubtful": "broken: enabled() raised RuntimeError: no variable",
        }

    def test_what_a_handler_is_given(self, loaded: list[Noting], files: LocalFiles) -> None:
        assert HandlerCourier(files, limit_seconds=9).attempt(to("a"), a_batch(), EVENT).is_delivered
        (delivery,) = loaded[0].given
        assert (delivery.key, delivery.version, delivery.attempt) == (to("a").id, 1, 2)
        assert delivery.batch.id == "batch_1"
        assert list(delivery.output.lines()) == LINES
        assert list(delivery.results.lines()) == LINES * 2
        with delivery.open_errors() or pytest.fail("there is an error file") as reader:
            reader.seek(len(LINES[0]))
            assert reader.read() == LINES[1]

    def test_a_file_that_the_batch_does_not_have(self, loaded: list[Noting], files: LocalFiles) -> None:
        HandlerCourier(files, limit_seconds=9).attempt(to("a"), a_batch(error_file_id=None), EVENT)
        (delivery,) = loaded[0].given
        assert delivery.open_errors() is None
        assert list(delivery.errors) == []

    @pytest.mark.parametrize(
        ("name", "reason", "is_final"),
        [
            ("off", "off is off", True),
            ("unknown", "no handler has the name 'unknown'; installed: a, b, broken, doubtful, off", True),
            ("broken", "broken is broken: no module", False),
        ],
    )
    def test_a_target_behind_which_nothing_stands(
        self, loaded: object, files: LocalFiles, name: str, reason: str, is_final: bool
    ) -> None:
        """What is broken may be mended within the hours of the attempts."""
        outcome = HandlerCourier(files, limit_seconds=9).attempt(to(name), a_batch(), EVENT)
        assert (outcome.is_delivered, outcome.reason, outcome.is_final) == (False, reason, is_final)

    def test_a_handler_may_say_that_it_is_useless(
        self, loaded: list[Noting], files: LocalFiles, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        loaded[0] = Noting("a", Undeliverable("the table has another shape"))
        outcome = HandlerCourier(files, limit_seconds=9).attempt(to("a"), a_batch(), EVENT)
        assert (outcome.is_final, outcome.reason) == (True, "the table has another shape")

    def test_results_that_were_deleted_cannot_be_delivered(self, loaded: list[Noting], files: LocalFiles) -> None:
        files.delete("file-error")
        outcome = HandlerCourier(files, limit_seconds=9).attempt(to("a"), a_batch(), EVENT)
        assert outcome.is_final
        assert "the results of batch_1 are gone" in outcome.reason
        assert loaded[0].given == []


def test_the_directory_handler_is_off_without_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DELIVERY_FOLDER", raising=False)
    assert not DirectoryHandler().enabled()
