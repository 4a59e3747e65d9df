"""Tokens as a model's own files count them: a small real tokenizer, real Jinja, and files that lack something."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing

from vllm_batch_dagster.adapters import model_facts
from vllm_batch_dagster.adapters.chat_templates import load_template
from vllm_batch_dagster.adapters.model_facts import LocalModelFacts, find_model_folder, read_context
from vllm_batch_dagster.adapters.simulated import SimulatedProcess
from vllm_batch_dagster.adapters.tokenizers import MESSAGE_ALLOWANCE, load_counter
from vllm_batch_dagster.core.models import Model
from vllm_batch_dagster.core.prompts import PromptLength, Prompts, read_prompts

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}\n"
    "[ {{ message.role }} ] {{ message.content }}\n"
    "{% endfor %}{% if add_generation_prompt %}[ assistant ]{% endif %}"
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model: one token a word, [CLS] before each text, truncated to 4 tokens as files for training are."""
    words = {"[UNK]": 0, "[CLS]": 1}
    tokenizer = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", 1)])
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=4)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    write(tmp_path / "config.json", max_position_embeddings=64)
    return tmp_path


def write(path: Path, **content: Any) -> None:
    path.write_text(json.dumps(content))


def chat(*texts: str, **fields: Any) -> Prompts:
    messages = [{"role": "user", "content": text} for text in texts]
    prompts = read_prompts(json.dumps({"messages": messages, **fields}).encode())
    assert prompts is not None
    return prompts


def test_texts_get_the_special_tokens_and_are_not_cut_or_filled(folder: Path) -> None:
    counter = load_counter(folder)
    assert counter.count(Prompts(texts=("one two three four five six", "one"))) == PromptLength(9, 7)
    assert counter.count(Prompts(id_counts=(3, 5))) == PromptLength(8, 5)
    assert counter.count(Prompts()) == PromptLength(0, 0)
    assert counter.is_exact
    assert "own tokenizer" in counter.method


@pytest.mark.parametrize("where", ["file", "config", "named"])
def test_a_conversation_is_rendered_by_the_template(folder: Path, where: str) -> None:
    config: dict[str, Any] = {"bos_token": {"content": "start"}}
    if where == "file":
        (folder / "chat_template.jinja").write_text(TEMPLATE)
    elif where == "config":
        config["chat_template"] = TEMPLATE
    else:
        config["chat_template"] = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": TEMPLATE}]
    write(folder / "tokenizer_config.json", **config)

    counter = load_counter(folder)

    template = load_template(folder)
    assert template is not None
    assert template.render([{"role": "user", "content": "one two"}], ()) == "start[ user ] one two\n[ assistant ]"
    assert counter.count(chat("one two")).tokens == 9  # start [ user ] one two [ assistant ]
    assert "no chat template" not in counter.method


@pytest.mark.parametrize("template", [None, "{% nonsense %}", "{{ raise_exception('roles') }}", "{{ messages.x.y }}"])
def test_without_a_usable_template_messages_are_joined_with_an_allowance(folder: Path, template: str | None) -> None:
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    assert load_counter(folder).count(chat("one two", "three")).tokens == 3 + 2 * MESSAGE_ALLOWANCE


def test_a_template_gets_tools_and_reaches_nothing_outside(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{% for tool in tools %}{{ tool | tojson }}{% endfor %}<>")
    tools = [{"name": "a&b"}]
    rendered = load_template(folder)
    assert rendered is not None
    assert rendered.render([], tools) == '{"name": "a&b"}<>'
    (folder / "chat_template.jinja").write_text("{{ ''.__class__.__mro__[1].__subclasses__() }}")
    unsafe = load_template(folder)
    assert unsafe is not None
    assert not unsafe.render([], ())


def test_a_model_without_a_tokenizer_is_estimated_and_says_so(tmp_path: Path) -> None:
    counter = load_counter(tmp_path)
    assert not counter.is_exact
    assert "no tokenizer.json" in counter.method
    assert counter.count(Prompts(texts=("x" * 40, "\ud800" * 8))).tokens == 12
    assert counter.count(chat("x" * 40)).tokens == 10 + MESSAGE_ALLOWANCE
    (tmp_path / "tokenizer.json").write_text("{}")
    assert "cannot be read" in load_counter(tmp_path).method


def test_half_a_surrogate_pair_is_counted(folder: Path) -> None:
    assert load_counter(folder).count(Prompts(texts=("one \ud800",))).tokens == 3


@pytest.mark.parametrize(
    ("files", "tokens", "source"),
    [
        ({"config.json": {"max_position_embeddings": 64}}, 64, "config.json"),
        ({"config.json": {"text_config": {"max_position_embeddings": 32}}}, 32, "config.json"),
        (
            {"config.json": {"n_positions": 64}, "tokenizer_config.json": {"model_max_length": 48}},
            48,
            "config.json",
        ),
        (
            {"config.json": {"n_positions": 64}, "tokenizer_config.json": {"model_max_length": 10**30}},
            64,
            "config.json",
        ),
        (
            {"config.json": {"n_positions": 64}, "sentence_bert_config.json": {"max_seq_length": 16}},
            16,
            "sentence_bert_config.json",
        ),
    ],
)
def test_the_context_is_that_of_the_models_files(
    tmp_path: Path, files: dict[str, dict[str, Any]], tokens: int, source: str
) -> None:
    for name, content in files.items():
        write(tmp_path / name, **content)
    found = read_context(Model("m", str(tmp_path)))
    assert found is not None
    assert (found.tokens, source in found.source) == (tokens, True)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"max_position_embeddings": "many"}', "\xff"])
def test_files_that_say_nothing_give_no_context(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content, encoding="latin-1")
    assert read_context(Model("m", str(tmp_path))) is None


def test_arguments_go_before_the_files(folder: Path) -> None:
    facts = LocalModelFacts(folder / "engine", extra_args="--max_model_len=12")
    for args, expected in ((("--max-model-len", "24"), 24), (("--max-model-len", "auto"), 64), ((), 12)):
        found = facts.context(Model("m", str(folder), args=args))
        assert found is not None
        assert found.tokens == expected


def test_a_running_server_goes_before_everything(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_facts, "ASK_SECONDS", 50.0)
    with SimulatedProcess("--model", "tiny", "--max-model-len", "77") as engine:
        facts = LocalModelFacts(folder / "engine", engine_url=engine.url)
        found = facts.context(Model("tiny", str(folder), args=("--max-model-len", "24")))
        other = facts.context(Model("other", str(folder)))
    assert found is not None
    assert (found.tokens, "running" in found.source) == (77, True)
    assert other is not None
    assert other.tokens == 64
    assert facts.context(Model("tiny", "owner/tiny")) is None  # nobody answers any more


def test_a_hub_id_is_found_in_the_cache_of_this_machine(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    model = Model("m", "owner/model")
    assert find_model_folder(model) is None
    cached = tmp_path / "hub" / "models--owner--model"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("abc\n")
    (cached / "snapshots").mkdir()
    (cached / "snapshots" / "abc").symlink_to(folder)
    assert find_model_folder(model) == cached / "snapshots" / "abc"
    assert LocalModelFacts(tmp_path).counter(model).is_exact
    assert "not on this machine" in LocalModelFacts(tmp_path).counter(Model("x", "owner/other")).method


def test_a_counter_is_loaded_once_and_few_are_kept(folder: Path, tmp_path: Path) -> None:
    facts = LocalModelFacts(tmp_path)
    first = facts.counter(Model("m", str(folder)))
    assert facts.counter(Model("m", str(folder))) is first
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        facts.counter(Model(name, str(tmp_path / name)))
    assert facts.counter(Model("m", str(folder))) is not first


@pytest.mark.timeout(180)
def test_neither_the_api_nor_the_graph_imports_the_library() -> None:
    code = (
        "import sys, api_shim.server, vllm_batch_dagster.definitions\n"
        "from vllm_batch_dagster.adapters import model_facts\n"
        "assert not {'tokenizers', 'huggingface_hub', 'jinja2.sandbox', 'transformers'} & set(sys.modules)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
