"""`esrl evaluate` and `esrl generate`: what a trained model says, and how good it is."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

from esrl.data.examples import Example, number_examples
from esrl.data.files import read_json_lines, read_lines
from esrl.data.readers import DataConfig, load_examples
from esrl.evaluation.decode import DecodingConfig, decode
from esrl.evaluation.scores import check_references, metrics_by_name, paired_bootstrap, score_corpus
from esrl.models.seq2seq import load_policy
from esrl.training.storage import replace_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateConfig:
    """`esrl evaluate`: decode a test set and score it."""

    model: Annotated[str, tyro.conf.Positional]
    """A model folder, or a text file with one output per line."""
    source: Path
    """The sources, a line each, plain or gzip; or a .tsv or .jsonl file with columns `source` and `reference`."""
    reference: Path | None = None
    """The references, line by line."""
    metrics: tuple[str, ...] = ("bleu", "chrf")
    """bleu, chrf, rouge_l, exact_match."""
    against: str | None = None
    """Another model folder or file of outputs: compared by paired bootstrap."""
    num_resamples: int = 1000
    """Of the bootstrap."""
    output: Path | None = None
    """Write the outputs here, a line each."""
    json: bool = False
    """Print one JSON object instead of a table."""
    decoding: Annotated[DecodingConfig, tyro.conf.OmitArgPrefixes] = field(default_factory=DecodingConfig)
    """How the model is asked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateConfig:
    """`esrl generate`: lines in, lines out."""

    model: Annotated[str, tyro.conf.Positional]
    """A model folder."""
    input: Path | None = None
    """Sources, a line each, or a .jsonl file with a column `source`; unset: standard input."""
    output: Path | None = None
    """Where the outputs go, a line each; unset: standard output."""
    decoding: Annotated[DecodingConfig, tyro.conf.OmitArgPrefixes] = field(default_factory=DecodingConfig)
    """How the model is asked."""


def evaluate(config: EvaluateConfig) -> dict[str, dict[str, Any]]:
    """Score a model (or a file of outputs) on a test set.

    Returns:
        For each metric ``score``, ``signature`` and its 95 % interval ``low``, ``high``; with ``against`` also
        ``against``: the other's score, the difference with its 95 % interval, and the p-value.
    """
    metrics = metrics_by_name(config.metrics)
    examples = load_examples(_data(config)).examples
    if "reference" not in examples[0].columns:
        raise ValueError(f"{config.source} has no references; give --reference FILE.")
    references = [example.columns["reference"] for example in examples]
    check_references(metrics, references)
    outputs = _outputs(config.model, examples, config.decoding)
    result: dict[str, dict[str, Any]] = {
        name: asdict(score)
        for name, score in score_corpus(metrics, outputs, references, num_resamples=config.num_resamples).items()
    }
    if config.against is not None:
        others = _outputs(config.against, examples, config.decoding)
        for metric in metrics:
            compared = asdict(paired_bootstrap(metric, outputs, others, references, num_resamples=config.num_resamples))
            compared.pop("score")
            result[metric.name]["against"] = compared
    if config.output is not None:
        replace_bytes(config.output, _lines(outputs))
    return result


def show_evaluation(result: dict[str, dict[str, Any]], config: EvaluateConfig) -> None:
    """Print scores for people, or one JSON object."""
    if config.json:
        print(json.dumps(result, ensure_ascii=False))
        return
    table = Table(title=f"{config.model} on {config.source}", title_justify="left")
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
        console.print(f"{name}|{score['signature']}", highlight=False, soft_wrap=True)


def generate(config: GenerateConfig) -> list[str]:
    """The model's output for each source; an empty line gives an empty line."""
    policy = load_policy(config.model)
    sources = list(_sources(config.input))
    examples = list(number_examples({"source": source} for source in sources if source.strip()))
    texts = iter(decode(policy, examples, config.decoding))
    outputs = [next(texts) if source.strip() else "" for source in sources]
    if config.output is not None:
        replace_bytes(config.output, _lines(outputs))
    else:
        sys.stdout.write(_lines(outputs).decode())
        sys.stdout.flush()
    return outputs


def _data(config: EvaluateConfig) -> DataConfig:
    if config.reference is None and config.source.suffix in (".tsv", ".jsonl", ".parquet"):
        return DataConfig(path=str(config.source))
    return DataConfig(source=config.source, reference=config.reference)


def _outputs(model: str, examples: Sequence[Example], decoding: DecodingConfig) -> list[str]:
    path = Path(model)
    if path.is_file():
        outputs = [text for _, text in read_lines(path)]
        if len(outputs) != len(examples):
            raise ValueError(
                f"{path} has {len(outputs)} lines, but there are {len(examples)} examples; "
                "line n must be the output for example n."
            )
        return outputs
    return decode(load_policy(model), examples, decoding)


def _sources(path: Path | None) -> Iterator[str]:
    if path is None:
        yield from _standard_input(sys.stdin.buffer)
    elif path.suffix == ".jsonl":
        for number, record in read_json_lines(path):
            if record is None:
                continue
            if not isinstance(record.get("source"), str):
                raise ValueError(f"{path}:{number}: no text in column source; there are: {', '.join(record)}.")
            yield str(record["source"])
    else:
        for _, text in read_lines(path):
            yield text


def _standard_input(stream: Iterable[bytes]) -> Iterator[str]:
    for number, raw in enumerate(stream, 1):
        try:
            yield raw.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"standard input:{number}: not UTF-8 at byte {error.start}; convert it first.") from error


def _lines(texts: Sequence[str]) -> bytes:
    """A text per line; a line break within a text becomes a blank, so that line n stays output n."""
    return "".join(" ".join(text.splitlines()) + "\n" for text in texts).encode()
