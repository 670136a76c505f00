"""`esrl evaluate`, `generate` and `merge`: how good a trained model is, what it says, and a plain folder of it."""

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

from esrl.building import encoder_for, tell_notice
from esrl.data.conversations import Format
from esrl.data.encoding import PromptConfig
from esrl.data.examples import SOURCE, Example, number_examples
from esrl.data.files import read_lines
from esrl.data.readers import DataConfig, load_examples
from esrl.data.tables import is_table_name
from esrl.errors import StorageError
from esrl.evaluation.decode import DecodingConfig, decode, on_device, source_limit
from esrl.evaluation.scores import check_references, metrics_by_name, paired_bootstrap, score_corpus
from esrl.models.adapters import ADAPTER_CONFIG, base_of, merge_adapter
from esrl.models.causal import CausalPolicy
from esrl.models.load import load_policy
from esrl.models.seq2seq import MarianPolicy
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
    """bleu, chrf, rouge_l, exact_match, gsm8k."""
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
    format: Format = "columns"
    """What a table's records are: `columns`, or those of `instruction`, `messages` or `gsm8k` sets."""
    template: str | None = None
    """What makes prompts of a file's sources, as `data.template` of a run."""
    prompts: PromptConfig = field(default_factory=PromptConfig)
    """How prompts become token ids of a causal model."""

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
    """Sources, a line each, plain or gzip, or a .tsv, .jsonl (either .gz too) or .parquet file with a column for them;
    unset: standard input."""
    source_column: str = SOURCE
    """The column of a table's sources."""
    output: Path | None = None
    """Where the outputs go, a line each; into a .jsonl file beside the table's columns, as `answer`, which `esrl judge`
    reads. Unset: standard output."""
    decoding: Annotated[DecodingConfig, tyro.conf.OmitArgPrefixes] = field(default_factory=DecodingConfig)
    """How the model is asked."""
    format: Format = "columns"
    """What a table's records are: `columns`, or those of `instruction`, `messages` or `gsm8k` sets."""
    template: str | None = None
    """What makes prompts of a file's sources, as `data.template` of a run."""
    prompts: PromptConfig = field(default_factory=PromptConfig)
    """How prompts become token ids of a causal model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeConfig:
    """`esrl merge`: adapters and their base as one plain model folder."""

    adapter: Annotated[str, tyro.conf.Positional]
    """A folder of adapters, as a run with lora writes it."""
    output: Annotated[Path, tyro.conf.Positional]
    """The folder to write; it must be new or empty."""
    base: str | None = None
    """The model that the adapters belong to; unset: the one that their folder names."""


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
        system if isinstance(system, list) else _answers(system, examples, config) for system in systems
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
        _write(config.output, _lines(outputs))
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
    policy = _loaded(config.model)
    examples = _examples(config)
    outputs = _answers(policy, examples, config)
    if config.output is not None and config.output.suffix == ".jsonl":
        _write(config.output, _records(examples, outputs))
    elif config.output is not None:
        _write(config.output, _lines(outputs))
    else:
        sys.stdout.write(_lines(outputs).decode())
        sys.stdout.flush()
    return outputs


def merge(config: MergeConfig) -> Path:
    """Add adapters to the weights of their base and write a plain model folder.

    Raises:
        ValueError: no folder of adapters, adapters of another model, or an output that is not empty.
    """
    output = config.output
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"output {output} is there already, and not empty; name a new folder.")
    if not (Path(config.adapter) / ADAPTER_CONFIG).is_file():
        raise ValueError(f"{config.adapter}: no {ADAPTER_CONFIG} here; give a folder of adapters as training saves it.")
    merge_adapter(load_policy(config.base or base_of(config.adapter)), config.adapter, output)
    return output


def _data(config: EvaluateConfig) -> DataConfig:
    if is_table_name(config.source.name):
        return DataConfig(
            path=str(config.source), reference=config.reference, format=config.format, template=config.template
        )
    return DataConfig(source=config.source, reference=config.reference, template=config.template)


def _examples(config: GenerateConfig) -> Sequence[Example]:
    path = config.input
    if path is None:
        return list(number_examples({"source": line} for line in _standard_input(sys.stdin.buffer)))
    data = DataConfig(source=path, template=config.template)
    if is_table_name(path.name):
        data = DataConfig(
            path=str(path),
            source_column=config.source_column,
            reference_column=None,
            format=config.format,
            template=config.template,
        )
    return load_examples(data, keep_blank=True).examples


def _loaded(name: str) -> MarianPolicy | CausalPolicy:
    """A folder's model where it is to run."""
    policy = on_device(load_policy(name))
    tell_notice(policy, True)
    return policy


def _system(name: str, num_examples: int) -> list[str] | MarianPolicy | CausalPolicy:
    """The outputs in a file, or a model that is to give them."""
    path = Path(name)
    if not path.is_file():
        return _loaded(name)
    outputs = [text for _, text in read_lines(path)]
    if len(outputs) != num_examples:
        raise ValueError(
            f"{path} has {len(outputs)} lines, but there are {num_examples} examples; "
            "line n must be the output for example n."
        )
    return outputs


def _answers(
    policy: MarianPolicy | CausalPolicy, examples: Sequence[Example], config: EvaluateConfig | GenerateConfig
) -> list[str]:
    """The model's output for each source; a blank one is not decoded and gives an empty one."""
    asked = [example for example in examples if example.source.strip()]
    encoder = encoder_for(policy, config.prompts, config.decoding.max_new_tokens)
    if encoder is None:
        limit, cut = source_limit(policy, config.decoding), "cut"
        texts = [example.source for example in asked]
        lengths = [len(ids) for ids in policy.tokenizer(texts)["input_ids"]] if texts else []
    else:
        limit, cut = encoder.config.max_source_tokens, "cut at their beginning"
        lengths = [len(ids) for ids in encoder.prompt_ids(asked)]
    if long := sum(length > limit for length in lengths):
        say(f"{long:,} of {len(asked):,} sources have more than {limit:,} tokens and were {cut}")
    outputs = iter(decode(policy, asked, config.decoding, encoder))
    return [next(outputs) if example.source.strip() else "" for example in examples]


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


def _write(path: Path, data: bytes) -> None:
    try:
        path.write_bytes(data)
    except OSError as error:
        raise StorageError(
            f"{path} ({len(data)} bytes to write): {error.strerror}. Free the disk, or choose another --output."
        ) from error


def _lines(texts: Sequence[str]) -> bytes:
    """A text per line; a line break within a text becomes a blank, so that line n stays output n."""
    return "".join(" ".join(text.splitlines()) + "\n" for text in texts).encode()


def _records(examples: Sequence[Example], texts: Sequence[str]) -> bytes:
    """A JSON object per example: its columns, and the text as ``answer``."""
    rows = ({**example.columns, "answer": text} for example, text in zip(examples, texts, strict=True))
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
