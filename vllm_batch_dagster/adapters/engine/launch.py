"""Decides how the server of a model is started: its arguments, environment and request window. Pure.

In: the configuration, the device, a catalogue entry. Out: a `Launch`, which the starter turns into a process.
"""

import hashlib
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from vllm_batch_dagster.adapters.engine.config import Device, EngineConfig
from vllm_batch_dagster.core.errors import ConfigurationError
from vllm_batch_dagster.core.ladder import Rung, highest_share
from vllm_batch_dagster.core.models import Model

# API-server defaults are latency values on a 16 GB card (engine report D11, 4.1), so we state ours.
_DEFAULT_SEQS: Mapping[Device, int] = {"cpu": 128, "cuda": 256}
_GPU_BATCHED_TOKENS = 8192

# In flight per sequence slot: keeps the engine's queue filled while answers travel (engine report D10).
WINDOW_PER_SEQUENCE = 2

# How long a stopping server may finish what is in flight (engine report 5.2, SIGTERM rows).
DRAIN_SECONDS = 30

# Options that decide how we reach the server. Setting them would make us wait for one that is not there.
_KV_VARIABLE = "VLLM_CPU_KVCACHE_SPACE"
_OURS = ("--host", "--port", "--uds", "--api-key", "--ssl-keyfile", "--ssl-certfile", "--root-path")


@dataclass(frozen=True, slots=True)
class Launch:
    """How to start the server of one model. `argv` still has the placeholder `{port}`; `env` is what we add.

    `top` are the memory settings that these say; `highest_share` is how much of the device the ladder may take.
    `states_context`: the arguments name a context length, so vLLM does not choose one.
    """

    model: Model
    device: Device
    argv: tuple[str, ...]
    env: Mapping[str, str]
    top: Rung
    highest_share: float
    states_context: bool

    @property
    def max_num_seqs(self) -> int:
        return self.top.max_num_seqs

    @property
    def window(self) -> int:
        """How many requests to keep in flight, as configured."""
        return WINDOW_PER_SEQUENCE * self.max_num_seqs

    @property
    def keeps_tokens(self) -> bool:
        """A pooling model reads its whole input in one step."""
        return self.model.task != "generate"

    @property
    def fingerprint(self) -> str:
        """Equal for launches whose running server may be shared."""
        content = json.dumps([self.model.name, self.argv, sorted(self.env.items())])
        return hashlib.sha256(content.encode()).hexdigest()

    def at(self, port: int, rung: Rung | None = None) -> list[str]:
        """Return the command line that listens on `port`, with the memory settings of `rung` (`top` by default) behind
        the configured ones: vLLM takes the last."""
        argv = [part.replace("{port}", str(port)) for part in self.argv]
        for name, value in (rung or self.top).changes(self.top).items():
            if name != "cpu_kvcache_gib":
                option = f"--{name.replace('_', '-')}"
                argv += [option] if isinstance(value, bool) else [option, f"{value:g}"]
        return argv

    def env_at(self, rung: Rung) -> dict[str, str]:
        """Return what we add to the environment at `rung`."""
        return {**self.env, **({_KV_VARIABLE: str(rung.cpu_kvcache_gib)} if rung.cpu_kvcache_gib else {})}


def plan_launch(config: EngineConfig, device: Device, model: Model, *, is_local: bool) -> Launch:
    """Return how to start `model` on `device`. `is_local` says that `model.path` is a folder of this machine.

    `config.command` may hold the placeholders {python}, {path}, {name}, {port} and {max_num_seqs} anywhere, and
    {names} (every served name) and {args} (the model's and the operator's arguments) as whole words.
    Raises ConfigurationError for arguments that cannot work.
    """
    user_args = _user_args(config, model)
    default = config.max_num_seqs or _DEFAULT_SEQS[device]
    seqs = _last_int(user_args, "--max-num-seqs", default)
    if config.command is None:
        argv = _vllm_argv(config, device, model, default, user_args)
    else:
        argv = _fill(config.command, config, model, seqs, user_args)
    return Launch(
        model=model,
        device=device,
        argv=argv,
        env=_environment(config, device, is_local=is_local),
        top=_top_rung(config, device, seqs, user_args),
        highest_share=highest_share(
            _share(config, user_args), is_argument=_last_value(user_args, "--gpu-memory-utilization") is not None
        ),
        states_context=_last_value(user_args, "--max-model-len") not in (None, "auto", "-1"),
    )


def _top_rung(config: EngineConfig, device: Device, seqs: int, user_args: Sequence[str]) -> Rung:
    """Return the configured memory settings. A value that is not a plain number is vLLM's to read: the ladder leaves
    that setting alone."""
    stated = _last_value(user_args, "--max-num-batched-tokens")
    tokens = config.max_num_batched_tokens or (_GPU_BATCHED_TOKENS if device == "cuda" else 0)
    if stated is not None:
        tokens = int(stated) if stated.isdecimal() else 0
    return Rung(
        max_num_seqs=seqs,
        max_num_batched_tokens=tokens,
        gpu_memory_utilization=_share(config, user_args) if device == "cuda" else 0.0,
        cpu_kvcache_gib=config.cpu_kvcache_gib if device == "cpu" else 0,
        enforce_eager=device == "cpu" or any(_option_name(arg) == "--enforce-eager" for arg in user_args),
    )


def _share(config: EngineConfig, user_args: Sequence[str]) -> float:
    try:
        return float(_last_value(user_args, "--gpu-memory-utilization") or config.gpu_memory_utilization)
    except ValueError:
        return 0.0


def _user_args(config: EngineConfig, model: Model) -> tuple[str, ...]:
    try:
        extra = shlex.split(config.extra_args)
    except ValueError as error:
        raise ConfigurationError(f"ENGINE_ARGS is not a command line ({error}): {config.extra_args!r}") from error
    args = (*model.args, *extra)
    for arg in args:
        name = _option_name(arg)
        if name in _OURS:
            raise ConfigurationError(
                f"{name} cannot be set in ENGINE_ARGS or in the arguments of model {model.name!r}: the engine "
                "listens on loopback only. Use ENGINE_PORT, or ENGINE_URL for a server of your own."
            )
    return args


def _option_name(arg: str) -> str:
    """vLLM takes `--max_num_seqs` and `--max-num-seqs=4` alike."""
    if not arg.startswith("--"):
        return ""
    return arg.partition("=")[0].replace("_", "-")


def _last_value(args: Sequence[str], option: str) -> str | None:
    value = None
    for arg, following in pairwise((*args, "")):
        if _option_name(arg) == option:
            value = arg.partition("=")[2] if "=" in arg else following
    return value


def _last_int(args: Sequence[str], option: str, default: int) -> int:
    value = _last_value(args, option)
    if value is None:
        return default
    if not value.isdecimal() or int(value) < 1:
        raise ConfigurationError(f"{option} must be a number of at least 1, not {value!r}")
    return int(value)


def _vllm_argv(
    config: EngineConfig, device: Device, model: Model, seqs: int, user_args: tuple[str, ...]
) -> tuple[str, ...]:
    # The module form works with wheels whose `vllm` script is broken (engine report 1).
    return (
        *(config.python, "-m", "vllm.entrypoints.cli.main", "serve", model.path),
        *("--served-model-name", *model.names),
        *("--host", "127.0.0.1", "--port", "{port}"),
        *_task_args(model),
        *("--shutdown-timeout", str(DRAIN_SECONDS)),
        "--enable-request-id-headers",
        "--enable-server-load-tracking",
        "--disable-uvicorn-access-log",
        *("--max-model-len", "auto"),
        *("--max-num-seqs", str(seqs)),
        *_device_args(config, device),
        *user_args,
    )


def _task_args(model: Model) -> tuple[str, ...]:
    runner = () if model.task == "generate" else ("--runner", "pooling")
    return (*runner, "--scheduling-policy", "priority")


def _device_args(config: EngineConfig, device: Device) -> tuple[str, ...]:
    tokens = config.max_num_batched_tokens
    if device == "cpu":
        # Eager: ready in 35 s instead of 100 s at 5 % less speed (engine report 8).
        return ("--enforce-eager", *(("--max-num-batched-tokens", str(tokens)) if tokens else ()))
    return (
        *("--max-num-batched-tokens", str(tokens or _GPU_BATCHED_TOKENS)),
        *("--gpu-memory-utilization", str(config.gpu_memory_utilization)),
    )


def _fill(
    template: Sequence[str], config: EngineConfig, model: Model, seqs: int, user_args: tuple[str, ...]
) -> tuple[str, ...]:
    lists: Mapping[str, tuple[str, ...]] = {"{names}": model.names, "{args}": user_args}
    words = {"{python}": config.python, "{path}": model.path, "{name}": model.name, "{max_num_seqs}": str(seqs)}
    filled: list[str] = []
    for part in template:
        filled.extend(lists[part] if part in lists else (_replace_all(part, words),))
    return tuple(filled)


def _replace_all(part: str, words: Mapping[str, str]) -> str:
    for placeholder, value in words.items():
        part = part.replace(placeholder, value)
    return part


def _environment(config: EngineConfig, device: Device, *, is_local: bool) -> dict[str, str]:
    # 5 s is vLLM's default: sockets would close under our pool (engine report 2.3).
    env = {"VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "120", "VLLM_NO_USAGE_STATS": "1"}
    if is_local:
        env["HF_HUB_OFFLINE"] = "1"
    if device == "cpu":
        env[_KV_VARIABLE] = str(config.cpu_kvcache_gib)
    return env
