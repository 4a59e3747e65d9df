"""Makes the input files: deterministic, every line different, so that a repetition sends the same bytes."""

import json
import random
from pathlib import Path

_TASKS = (
    "Explain {topic} to a ten year old.",
    "Name three facts about {topic}.",
    "Why does {topic} matter? Answer in two sentences.",
    "Write a short note about {topic} for a school magazine.",
    "What should a beginner know about {topic}?",
    "Summarise the history of {topic}.",
)
_THINGS = ("tides", "bread", "bridges", "volcanoes", "bees", "clocks", "maps", "rivers", "glass", "trains", "salt")
_PLACES = ("Norway", "Kenya", "Japan", "Chile", "Canada", "Greece", "India", "Scotland", "Peru", "Vietnam")


def write_chat_file(path: Path, lines: int, model: str, max_tokens: int) -> Path:
    """Write `lines` chat requests for `model`.

    Each asks for exactly `max_tokens` tokens (`ignore_eos`), so that both sides do the same work. Prompts stay under
    128 tokens, vLLM's block size on a processor: no repetition profits from the prefix cache of the one before.
    """
    with path.open("w") as file:
        for number in range(lines):
            file.write(json.dumps(_line(number, model, max_tokens)) + "\n")
    return path


def _line(number: int, model: str, max_tokens: int) -> dict[str, object]:
    body = {
        "model": model,
        "messages": [{"role": "user", "content": write_prompt(number)}],
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
    }
    return {"custom_id": f"line-{number:06d}", "method": "POST", "url": "/v1/chat/completions", "body": body}


def write_prompt(number: int) -> str:
    """Return the prompt of line `number`: always the same, and never that of another line."""
    choice = random.Random(number)
    topic = f"{choice.choice(_THINGS)} in {choice.choice(_PLACES)}"
    return f"Question {number + 1}. " + choice.choice(_TASKS).format(topic=topic)


def read_bodies(path: Path) -> list[bytes]:
    """Return the request bodies of an input file, for a client that talks to the engine itself."""
    return [json.dumps(json.loads(line)["body"]).encode() for line in path.read_text().splitlines()]


def write_models(path: Path, name: str) -> Path:
    """Write a catalogue with one model, for a measurement whose engine is simulated or absent."""
    path.write_text(f"models:\n  - name: {name}\n    path: someone/{name}\n")
    return path


def write_padded_file(path: Path, lines: int, model: str, line_bytes: int) -> Path:
    """Write `lines` chat requests of `line_bytes` bytes each, the newline among them; every custom_id differs."""
    head, tail = json.dumps(_line(0, model, 8)).replace("line-000000", "line-%07d").rsplit("Question", 1)
    room = line_bytes - len(f"{head}Question{tail}") + len("%07d") - 7 - 1
    line = f"{head}{'word ' * (room // 5)}{'.' * (room % 5)}Question{tail}\n"
    with path.open("w") as file:
        file.writelines(line % number for number in range(lines))
    return path


def write_sized_file(path: Path, size: int) -> Path:
    """Write a file of `size` bytes made of lines like those of an input file."""
    block = b"".join(json.dumps(_line(number, "simulated", 8)).encode() + b"\n" for number in range(4000))
    with path.open("wb") as file:
        for start in range(0, size, len(block)):
            file.write(block[: size - start])
    return path
