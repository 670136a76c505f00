"""`esrl evaluate` and `esrl generate`: what a trained model says, and how good it is."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from esrl.data.examples import Example, limit_lengths, number_examples
from esrl.data.files import read_lines
from esrl.data.readers import DataConfig, load_examples
from esrl.data.tables import is_table_name
from esrl.errors import StorageError
from esrl.evaluation.decode import DecodingConfig, decode, on_device, source_limit
from esrl.evaluation.scores import check_references, metrics_by_name, paired_bootstrap, score_corpus
from esrl.models.seq2seq import MarianPolicy, load_policy
from esrl.training.display import say


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateConfig:
    """`esrl evaluate`: decode a test set and score it."""

    model: Annotated[str, tyro.conf.Positional]
    """A model folder, or a text file with one output per line."""
    source: Path
    """The sources, a line each, plain or gzip; or a .tsv, .jsonl (either .gz too) or .parquet file with columns
    `source` and `reference`. Blank lines count: their output is empty."""
    reference: Path | None = None
    """The references, line by line."""
    metrics: tuple[str, ...] = ("bleu", "chrf")
    """bleu, chrf, rouge_l, exact_match."""
    against: str | None = None
    """Another model folder or file of outputs: compared by paired bootstrap."""
    num_resamples: int = 1000
    """Of the bootstrap."""
    output: Path | None = None
    """Write the outputs here, a line each, when the scores are shown."""
    json: bool = False
    """Print one JSON object instead of a table."""
    decoding: Annotated[DecodingConfig, tyro.conf.OmitArgPrefixes] = field(default_factory=DecodingConfig)
    """How the model is asked."""

    def __post_init__(self) -> None:
        repeated = sorted({name for name in self.metrics if self.metrics.count(name) > 1})
        if repeated or not self.metrics:
            fault = f"names {repeated[0]!r} twice" if repeated else "is empty"
            raise ValueError(f"metrics {fault}; name each once: bleu, chrf, rouge_l, exact_match.")
        if self.num_resamples < 1:
            raise ValueError(f"num_resamples is {self.num_resamples}; the bootstrap needs 1 at least, 1000 is usual.")


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateConfig:
    """`esrl generate`: lines in, lines out."""

    model: Annotated[str, tyro.conf.Positional]
    """A model folder."""
    input: Path | None = None
    """Sources, a line each, plain or gzip, or a .tsv, .jsonl (either .gz too) or .parquet file with a column `source`;
    unset: standard input."""
    output: Path | None = None
    """Where the outputs go, a line each; unset: standard output."""
    decoding: Annotated[DecodingConfig, tyro.conf.OmitArgPrefixes] = field(default_factory=DecodingConfig)
    """How the model is asked."""


def evaluate(
    config: EvaluateConfig, show: Callable[[dict[str, dict[str, Any]]], None] | None = None
) -> dict[str, dict[str, Any]]:
    """Score a model (or a file of outputs) on a test set.

    A pair with a blank source or reference counts, as in sacreBLEU: the output for a blank source is empty.

    Args:
        show: told the result before the outputs are written, which may fail.

    Returns:
        For each metric ``score``, ``signature`` and its 95 % interval ``low``, ``high``; with ``against`` also
        ``against``: the other's score, the difference with its 95 % interval, and the p-value.
    """
    metrics = metrics_by_name(config.metrics)
    _check_output(config.output)
    examples = load_examples(_data(config), keep_blank=True).examples
    if "reference" not in examples[0].columns:
        raise ValueError(f"{config.source} has no references; give --reference FILE.")
    references = [example.columns["reference"] for example in examples]
    check_references(metrics, references)
    systems = [_system(name, len(examples)) for name in (config.model, config.against) if name is not None]
    outputs, *others = [
        system if isinstance(system, list) else _answers(system, examples, config.decoding) for system in systems
    ]
    result: dict[str, dict[str, Any]] = {
        name: asdict(score)
        for name, score in score_corpus(metrics, outputs, references, num_resamples=config.num_resamples).items()
    }
    for other in others:
        for metric in metrics:
            compared = asdict(paired_bootstrap(metric, outputs, other, references, num_resamples=config.num_resamples))
            compared.pop("score")
            result[metric.name]["against"] = compared
    if show is not None:
        show(result)
    if config.output is not None:
        _write(config.output, outputs)
    return result


def show_evaluation(result: dict[str, dict[str, Any]], config: EvaluateConfig) -> None:
    """Print scores for people, or one JSON object."""
    if config.json:
        print(json.dumps(result, ensure_ascii=False))
        return
    table = Table(title=escape(f"{config.model} on {config.source}"), title_justify="left")
    columns = ["metric", "score", "95 % interval"]
    compared = config.against is not None
    for name in columns + (["other", "difference", "95 % interval", "p"] if compared else []):
        table.add_column(name, justify="left" if name == "metric" else "right", no_wrap=True)
    for name, score in result.items():
        row = [name, f"{score['score']:.2f}", f"{score['low']:.2f} to {score['high']:.2f}"]
        if compared:
            other = score["against"]
            row += [f"{other['other_score']:.2f}", f"{other['difference']:+.2f}"]
            row += [f"{other['low']:+.2f} to {other['high']:+.2f}", f"{other['p_value']:.4f}"]
        table.add_row(*row)
    console = Console()
    console = Console(width=max(90, console.width))
    console.print(table)
    for name, score in result.items():
        console.print(f"{name}|{score['signature']}", highlight=False, markup=False, soft_wrap=True)


def generate(config: GenerateConfig) -> list[str]:
    """The model's output for each source; a blank line gives an empty line."""
    _check_output(config.output)
    policy = on_device(load_policy(config.model))
    outputs = _answers(policy, _examples(config.input), config.decoding)
    if config.output is not None:
        _write(config.output, outputs)
    else:
        sys.stdout.write(_lines(outputs).decode())
        sys.stdout.flush()
    return outputs


def _data(config: EvaluateConfig) -> DataConfig:
    if is_table_name(config.source.name):
        return DataConfig(path=str(config.source), reference=config.reference)
    return DataConfig(source=config.source, reference=config.reference)


def _examples(path: Path | None) -> Sequence[Example]:
    if path is None:
        return list(number_examples({"source": line} for line in _standard_input(sys.stdin.buffer)))
    is_table = is_table_name(path.name)
    config = DataConfig(path=str(path), reference_column=None) if is_table else DataConfig(source=path)
    return load_examples(config, keep_blank=True).examples


def _system(name: str, num_examples: int) -> list[str] | MarianPolicy:
    """The outputs in a file, or a model that is to give them."""
    path = Path(name)
    if not path.is_file():
        return on_device(load_policy(name))
    outputs = [text for _, text in read_lines(path)]
    if len(outputs) != num_examples:
        raise ValueError(
            f"{path} has {len(outputs)} lines, but there are {num_examples} examples; "
            "line n must be the output for example n."
        )
    return outputs


def _answers(policy: MarianPolicy, examples: Sequence[Example], decoding: DecodingConfig) -> list[str]:
    """The model's output for each source; a blank one is not decoded and gives an empty one."""

    def tokenize(texts: list[str]) -> list[list[int]]:
        rows: list[list[int]] = policy.tokenizer(texts)["input_ids"]
        return rows

    asked = [example for example in examples if example.source.strip()]
    limit = source_limit(policy, decoding)
    _, report = limit_lengths(asked, tokenize, max_source_tokens=limit, max_target_tokens=None, rule="cut")
    if report.long_sources:
        say(f"{report.long_sources:,} of {len(asked):,} sources have more than {limit:,} tokens and were cut")
    texts = iter(decode(policy, asked, decoding))
    return [next(texts) if example.source.strip() else "" for example in examples]


def _standard_input(stream: Iterable[bytes]) -> Iterator[str]:
    for number, raw in enumerate(stream, 1):
        try:
            yield raw.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"standard input:{number}: not UTF-8 at byte {error.start}; convert it first.") from error


def _check_output(path: Path | None) -> None:
    """Refuse an output that cannot be written before any time is spent."""
    if path is not None and path.is_dir():
        raise ValueError(f"output {path} is a folder; name a file in it.")
    if path is not None and not path.parent.is_dir():
        raise ValueError(f"output {path}: there is no folder {path.parent}; make it first.")


def _write(path: Path, texts: Sequence[str]) -> None:
    data = _lines(texts)
    try:
        path.write_bytes(data)
    except OSError as error:
        raise StorageError(
            f"{path} ({len(data)} bytes to write): {error.strerror}. Free the disk, or choose another --output."
        ) from error


def _lines(texts: Sequence[str]) -> bytes:
    """A text per line; a line break within a text becomes a blank, so that line n stays output n."""
    return "".join(" ".join(text.splitlines()) + "\n" for text in texts).encode()
