"""The command line: one line for every failure, with its exit code; a traceback only with --debug."""

from __future__ import annotations

import io
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, suppress
from pathlib import Path
from typing import Any

HELP = """\
esrl: reinforcement learning for sequence generation that spends its samples where they count (AAAI 2024).

  esrl demo                        the built-in task, start to report; needs no file and no network
  esrl data NAME                   fetch a public data set (multi30k)
  esrl mle CONFIG.toml             maximum likelihood, fine-tuning: from scratch or from a model folder
  esrl reward-model CONFIG.toml    a score for answers, from pairs of a better and a worse one
  esrl rl CONFIG.toml              reinforcement learning: ESRL, REINFORCE, MRT, GRPO, RLOO, PPO
  esrl plan CONFIG.toml            how would the sampling budget be spent? no training
  esrl evaluate MODEL              decode and score a test set, paired bootstrap, --json
  esrl generate MODEL              lines in, lines out
  esrl merge ADAPTER OUTPUT        low-rank adapters and their base as one plain model folder
  esrl judge CONFIG.toml           answers judged by a language model behind an OpenAI-compatible endpoint, --json
  esrl report RUN [RUN ...]        one HTML file from one or several runs, or from a benchmark's results
  esrl benchmark                   speed and memory beside other tools, on this machine

`esrl COMMAND --help` shows every setting. Settings come from the class defaults, then the TOML file, then flags:
  esrl rl configs/multi30k-de-en/rl.toml --optimizer.learning-rate 5e-5
`--debug` shows the traceback of a failure. Exit codes: 0 done, 2 bad input, 3 reward, 4 numerics, 5 memory, 6 storage,
7 run folder in use, 8 judge's endpoint, 130 and 143 interrupted and saved.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    if not words or words[0] in ("-h", "--help", "help"):
        print(HELP)
        return 0
    if words[0] in ("-V", "--version"):
        from esrl import __version__

        print(f"esrl {__version__}")
        return 0
    return _guarded(words[0], words[1:], debug)


def _guarded(name: str, rest: list[str], debug: bool) -> int:
    """Run a command; every expected failure becomes one line and its exit code."""
    from esrl.errors import Interrupted

    try:
        if name not in COMMANDS:
            return _fail(_unknown(name), 2)
        _quiet()
        code = COMMANDS[name](rest)
        sys.stdout.flush()  # a reader that has gone is noticed here, not when Python ends
        return code
    except SystemExit as error:  # --help; and rich ends the program by it when nobody reads its tables any more
        return 0 if isinstance(error.__context__, BrokenPipeError) else int(error.code or 0)
    except Interrupted as error:
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except Exception as error:  # noqa: BLE001 - the outermost frame: whatever has failed is one line
        if isinstance(error, BrokenPipeError) and name in PRINTING:
            _silence_stdout()  # whoever read our output has seen enough
            return 0
        if debug:
            traceback.print_exc()
        return _fail(*_described(error))


def _described(error: Exception) -> tuple[str, int]:
    """A failure's one line and exit code."""
    from esrl.errors import EsrlError

    name, text = type(error).__name__, " ".join(str(error).split())
    if isinstance(error, EsrlError | ValueError):
        return text or name, error.exit_code if isinstance(error, EsrlError) else 2
    is_network = isinstance(error, ConnectionError | TimeoutError)
    # safetensors writes in Rust, and has an error of its own for a full disk
    if name == "SafetensorError" or (isinstance(error, OSError) and not is_network):
        remedy = "Check the disk, and the one for temporary files (TMPDIR), where models are exported first."
        return f"{name}: {text.rstrip('.')}. {remedy}", 6
    from esrl.training.oom import is_out_of_memory

    if is_out_of_memory(error):
        reason = ". ".join(text.split(". ")[:2]).rstrip(".") or name  # what follows is about CUDA's allocator
        remedy = "Take smaller batches (likelihood.micro_batch_tokens, sampling.max_cache_tokens, --batch-size)."
        return f"out of memory: {reason}. {remedy}", 5
    return f"{name}: {text} (--debug shows where).", 1


def _silence_stdout() -> None:
    """Or Python's own flush at its end would fail once more, and change the exit code."""
    from esrl.training.display import silence

    silence(sys.stdout)


def _fail(message: str, code: int) -> int:
    with suppress(OSError):  # nobody may be there to read it
        print(f"esrl: {message}", file=sys.stderr)
    return code


def _unknown(name: str) -> str:
    import difflib

    near = difflib.get_close_matches(name, COMMANDS, 1, 0.5)
    return f"unknown command {name!r}. " + (f"Did you mean {near[0]}?" if near else "`esrl --help` lists them.")


def _quiet() -> None:
    """Libraries' progress bars and chatter are not ours to show."""
    import transformers
    from transformers.utils import logging

    warnings.formatwarning = lambda message, *_, **__: f"esrl: {message}\n"
    logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()


def _configured(cls: type[Any], name: str, rest: list[str], presets: dict[str, Any] | None = None) -> Any:
    """Class defaults, then the method's preset, then the TOML file, then flags."""
    import tyro

    from esrl.config import data_of_flags, locate, settle, with_method
    from esrl.settings import build, read_toml

    file, words = None, list(rest)
    if words and not words[0].startswith("-"):
        file = Path(words.pop(0))
        if file.suffix != ".toml":
            raise ValueError(f"{file}: the configuration must be a .toml file; see `esrl {name} --help`.")
    values = {} if file is None else read_toml(file)
    folder = None if file is None else file.resolve().parent
    if presets is not None:
        values = with_method(values, presets, _flag(words, "--method"))
    values = data_of_flags(values, lambda name: _flag(words, name))
    if any(word.startswith("--lora.") for word in words):
        values.setdefault("lora", {})  # tyro knows no flags of a section that is unset
    if folder is not None:
        values = locate(values, folder)
    default = build(cls, values, str(file or "command line"), folder, missing=tyro.MISSING)
    program = f"esrl {name}" + (f" {file}" if file else " [CONFIG.toml]")
    flags = {word.split("=")[0] for word in words if word.startswith("--")}
    return settle(_parse(cls, program, words, default), folder, flags)


def _flags_only(cls: type[Any], name: str, rest: list[str]) -> Any:
    return _parse(cls, f"esrl {name}", rest)


def _parse(cls: type[Any], program: str, words: list[str], default: Any = None) -> Any:
    """Flags to a configuration; what tyro says of a wrong one in a box becomes one line."""
    import tyro

    _check_repeated(words)
    options = {} if default is None else {"default": default}
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            return tyro.cli(cls, prog=program, args=words, config=(tyro.conf.AvoidSubcommands,), **options)
    except SystemExit as error:
        if not error.code:
            raise
    message, near = _unboxed(said.getvalue())
    hint = f" Did you mean {near}?" if near else f" `{program.split(' [')[0]} --help` lists the flags."
    raise ValueError(f"{message.rstrip('.')}.{hint}")


def _check_repeated(words: list[str]) -> None:
    """A flag that is given twice would silently count once, with the last values."""
    flags = [word.split("=")[0].replace("_", "-") for word in words if re.match("--[a-z]", word)]
    for flag in flags:
        if flags.count(flag) > 1:
            raise ValueError(f"{flag} is given {flags.count(flag)} times. Give it once; several values go behind it.")


def _unboxed(box: str) -> tuple[str, str | None]:
    """tyro's message, and the flag it thinks was meant: parts between rules, after a title (in the frame, if any)."""
    lines = [line.strip("│ ") for line in box.splitlines() if not line.startswith(("╭", "╰"))]
    parts: list[list[str]] = [[]]
    for line in lines:
        if re.fullmatch("[─-]{9,}", line):
            parts.append([])
        else:
            parts[-1].append(line)
    first = parts[0] if "╭" in box or len(parts) == 1 else parts[1]
    near = re.search(r"Perhaps you meant: (--\S+)", " ".join(line for part in parts for line in part))
    message = " ".join(first).strip()
    if message.startswith("Missing from"):
        names = [line.split()[0] for line in first if line.startswith("--")] or ["what the usage has in capitals"]
        message = ", ".join(names) + " must be given"
    return message, near[1] if near else None


def _flag(words: Sequence[str], name: str) -> str | None:
    for i, word in enumerate(words):
        if word == name and i + 1 < len(words):
            return words[i + 1]
        if word.startswith(f"{name}="):
            return word.split("=", 1)[1]
    return None


def _report_run(result: Any) -> int:
    if result.already_complete:
        return _tell(f"already complete: {result.steps} steps, nothing to do. {result.model}")
    gain = ""
    if result.best_score is not None:
        start = "" if result.start_score is None else f" (start {result.start_score:.2f})"
        gain = f"; best development score {result.best_score:.2f} at step {result.best_step}{start}"
    return _tell(f"done: {result.steps} steps in {result.seconds:.0f} s{gain}\nmodel: {result.model}")


def _tell(text: str) -> int:
    """The last words of a run that is done, whether or not somebody still reads them."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        _silence_stdout()
    return 0


def _mle(rest: list[str]) -> int:
    from esrl import commands
    from esrl.config import MLEConfig

    return _report_run(commands.mle(_configured(MLEConfig, "mle", rest)))


def _reward_model(rest: list[str]) -> int:
    from esrl import commands
    from esrl.config import RewardModelConfig

    return _report_run(commands.reward_model(_configured(RewardModelConfig, "reward-model", rest)))


def _rl(rest: list[str]) -> int:
    from esrl import commands
    from esrl.config import METHODS, RLConfig

    return _report_run(commands.rl(_configured(RLConfig, "rl", rest, METHODS)))


def _plan(rest: list[str]) -> int:
    from esrl.config import METHODS
    from esrl.plan import PlanConfig, plan, show_plan

    config = _configured(PlanConfig, "plan", rest, METHODS)
    show_plan(plan(config), config.json)
    return 0


def _evaluate(rest: list[str]) -> int:
    from esrl.apply import EvaluateConfig, evaluate, show_evaluation

    config = _flags_only(EvaluateConfig, "evaluate", rest)
    evaluate(config, lambda result: show_evaluation(result, config))
    return 0


def _generate(rest: list[str]) -> int:
    from esrl.apply import GenerateConfig, generate

    generate(_flags_only(GenerateConfig, "generate", rest))
    return 0


def _merge(rest: list[str]) -> int:
    from esrl.apply import MergeConfig, merge

    return _tell(f"model: {merge(_flags_only(MergeConfig, 'merge', rest))}")


def _judge(rest: list[str]) -> int:
    from esrl import commands
    from esrl.judge import JudgeConfig, show_judgment

    config = _configured(JudgeConfig, "judge", rest)
    show_judgment(commands.judge(config), config.json)
    return 0


def _report(rest: list[str]) -> int:
    from esrl.report import write_report
    from esrl.report.command import ReportConfig

    config = _flags_only(ReportConfig, "report", rest)
    print(write_report(config.runs, config.page))
    return 0


def _data(rest: list[str]) -> int:
    from esrl.data.command import FetchConfig
    from esrl.data.download import fetch

    config = _flags_only(FetchConfig, "data", rest)
    print(fetch(config.name, config.root, base_url=config.base_url))
    return 0


def _demo(rest: list[str]) -> int:
    from esrl.demo import DemoConfig, demo, show_demo

    show_demo(demo(_flags_only(DemoConfig, "demo", rest)))
    return 0


def _benchmark(rest: list[str]) -> int:
    from esrl.benchmark import BenchmarkConfig, run_command

    return run_command(_flags_only(BenchmarkConfig, "benchmark", rest))


PRINTING = {"data", "plan", "evaluate", "generate", "judge", "report", "benchmark"}
"""Commands that are done when nobody reads their output any more; a run goes on."""

COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "demo": _demo,
    "data": _data,
    "mle": _mle,
    "reward-model": _reward_model,
    "rl": _rl,
    "plan": _plan,
    "evaluate": _evaluate,
    "generate": _generate,
    "merge": _merge,
    "judge": _judge,
    "report": _report,
    "benchmark": _benchmark,
}

if __name__ == "__main__":
    sys.exit(main())
