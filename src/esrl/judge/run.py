"""`esrl judge`: what is to be asked, asked; and what the replies come to."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import tomli_w

from esrl.judge.client import Client, Endpoint, JudgeError, Refusal, endpoint_of, make_body
from esrl.judge.inputs import Question, System, read_answers, read_questions
from esrl.judge.parsing import FORMATS, Judgment
from esrl.judge.prompts import Template, messages, read_template
from esrl.judge.records import Records, request_key
from esrl.judge.settings import JudgeConfig
from esrl.judge.summary import Place, signature, summarize
from esrl.settings import to_toml
from esrl.training.display import say
from esrl.training.lock import RunLock
from esrl.training.storage import dump_json, replace_bytes

RESULT, PER_QUESTION, CONFIG = "result.json", "questions.jsonl", "config.toml"
_SHOWN_EVERY = 15.0  # seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One thing to ask; ``place`` says which question it is about, and whose answers the judge sees in which order."""

    place: Place
    body: dict[str, Any]
    key: str
    output_format: str


@dataclass(slots=True, kw_only=True)
class Progress:
    """How asking goes: what it costs, and a reason for each request that was given up."""

    asked: int
    reused: int
    answered: int = 0
    retries: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0
    given_up: list[str] = field(default_factory=list)
    given_up_in_a_row: int = 0
    ended: str | None = None


def run_judge(config: JudgeConfig, environ: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Ask for every judgment that ``output_dir`` does not hold yet, keep each as it comes, and sum them up.

    Args:
        environ: where the endpoint and its key are named; the process's environment if None.

    Returns:
        the result, as written to ``result.json``: see docs/judge.md.

    Raises:
        ValueError: the settings, files or endpoint are wrong; found before anything is asked.
        JudgeError: the endpoint does not work, or some requests were given up and ``allow_missing`` is off.
        StorageError: the disk refused; what was kept before stays.
        LockedError: another process is at work in ``output_dir``.
    """
    questions = read_questions(config.questions, config.limit)
    named = zip(config.answers, config.system_names, strict=True)
    systems = [read_answers(path, name, questions) for path, name in named]
    templates = _templates(config, questions)
    requests = list(_requests(config, questions, systems, templates))
    with RunLock(config.output_dir), Records(config.output_dir) as records:
        progress = _ask_missing(config, requests, records, environ)
        missing = sum(request.key not in records.by_key for request in requests)
        if progress.ended is not None or (missing and not config.allow_missing):
            raise JudgeError(_ending(progress, missing, len(requests)))
        judgments = {request.place: _judgment(request, records) for request in requests}
        result, rows = summarize(config, questions, systems, judgments)
        used = sorted({template.name for template in templates})
        result = {"signature": signature(config, used, len(questions)), **result, "cost": _cost(progress)}
        if missing:
            result["missing"] = missing
        _write(config, result, rows)
    return result


def _templates(config: JudgeConfig, questions: Sequence[Question]) -> list[Template]:
    """The template for each question: the one with a reference where there is one to show."""
    plain, with_reference = config.template_names(config.mode)
    names = [with_reference if config.use_references and question.reference else plain for question in questions]
    found = {name: read_template(config.templates, name, config.mode) for name in dict.fromkeys(names)}
    if plain in found and found[plain].needs_reference:
        raise ValueError(
            f"template {plain!r} shows a reference answer, and there are questions without one; name it as "
            "reference_template, or add the references."
        )
    return [found[name] for name in names]


def _requests(
    config: JudgeConfig, questions: Sequence[Question], systems: Sequence[System], templates: Sequence[Template]
) -> Iterator[Request]:
    """Everything there is to ask, question by question."""
    orders: list[tuple[int, ...]] = [(number,) for number in range(len(systems))]
    if config.mode == "pairwise":
        orders = [(0, 1), (1, 0)] if config.swap else [(0, 1)]
    for number, (question, template) in enumerate(zip(questions, templates, strict=True)):
        for shown in orders:
            answers = [systems[system].answers[number] for system in shown]
            body = make_body(config.judge, messages(template, question, answers), config.request)
            place = Place(question=number, shown=shown)
            yield Request(place=place, body=body, key=request_key(body), output_format=template.output_format)


def _ask_missing(
    config: JudgeConfig, requests: Sequence[Request], records: Records, environ: Mapping[str, str] | None
) -> Progress:
    """Ask for what is not there; the same request twice (two systems with one answer) is asked once."""
    distinct = {request.key: request for request in requests}
    pending = [request for request in distinct.values() if _is_pending(request, records, config.ask_again)]
    progress = Progress(asked=len(pending), reused=len(distinct) - len(pending))
    if pending:
        endpoint = endpoint_of(os.environ if environ is None else environ)
        there = f", {progress.reused} are there already" if progress.reused else ""
        say(f"{len(pending)} judgments to ask {config.judge} for{there}")
        started = time.monotonic()
        _run(lambda: _ask_all(endpoint, config, pending, records, progress))
        progress.seconds = time.monotonic() - started
    return progress


def _is_pending(request: Request, records: Records, ask_again: bool) -> bool:
    return request.key not in records.by_key or (ask_again and _judgment(request, records) is None)


def _judgment(request: Request, records: Records) -> Judgment | None:
    """The reply, read anew: so that a better parser needs no new reply."""
    record = records.by_key.get(request.key)
    _, parse = FORMATS[request.output_format]
    return None if record is None else parse(record["text"])


def _run(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run it to its end, in a thread of its own where an event loop (a notebook's) is running in this one."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        asyncio.run(work())
        return
    with ThreadPoolExecutor(1) as pool:
        pool.submit(lambda: asyncio.run(work())).result()


async def _ask_all(
    endpoint: Endpoint, config: JudgeConfig, pending: Sequence[Request], records: Records, progress: Progress
) -> None:
    """As many requests at once as allowed, each kept as soon as it is answered."""
    queue = iter(pending)
    shown = time.monotonic()

    async def work(client: Client) -> None:
        nonlocal shown
        for request in queue:
            if progress.ended is not None:
                return
            await _ask(client, config, request, records, progress)
            if time.monotonic() - shown > _SHOWN_EVERY:
                shown = time.monotonic()
                say(f"{progress.answered} of {progress.asked} judgments, {client.retries} retries")

    async with Client(endpoint, config.request) as client:
        try:
            await asyncio.gather(*(work(client) for _ in range(min(config.request.concurrency, len(pending)))))
        finally:
            client.stop()
            progress.retries = client.retries


async def _ask(client: Client, config: JudgeConfig, request: Request, records: Records, progress: Progress) -> None:
    """One request: its reply goes to the disk, its refusal to the reasons, and too many of these end the run."""
    started = time.monotonic()
    outcome = await client.ask(request.body)
    if isinstance(outcome, Refusal):
        progress.given_up.append(outcome.reason)
        progress.given_up_in_a_row += 1
        if outcome.then == "stop" or progress.given_up_in_a_row >= config.request.max_failures:
            progress.ended = progress.ended or outcome.reason
            client.stop()
        return
    progress.given_up_in_a_row = 0
    progress.answered += 1
    progress.prompt_tokens += outcome.prompt_tokens or 0
    progress.completion_tokens += outcome.completion_tokens or 0
    reply = asdict(outcome) | {"seconds": round(time.monotonic() - started, 3)}
    records.append(request.key, {"judge": config.judge, **reply})


def _ending(progress: Progress, missing: int, total: int) -> str:
    reason = (progress.ended or progress.given_up[-1]).rstrip(".")
    return (
        f"{missing} of {total} judgments are missing: {reason}. What was answered is kept; "
        "run the same command again to ask for the rest" + (", or add --allow-missing." if not progress.ended else ".")
    )


def _cost(progress: Progress) -> dict[str, Any]:
    """What this call asked for; judgments that were there already cost nothing again."""
    names = ("asked", "reused", "answered", "retries", "prompt_tokens", "completion_tokens", "seconds")
    return {name: getattr(progress, name) for name in names}


def _write(config: JudgeConfig, result: Mapping[str, Any], rows: Iterable[Mapping[str, Any]]) -> None:
    folder = config.output_dir
    files = {name: getattr(config, name).absolute() for name in ("output_dir", "questions", "templates")}
    values = to_toml(replace(config, **files)) | {"answers": [str(path.absolute()) for path in config.answers]}
    lines = "".join(dump_json(row, PER_QUESTION) + "\n" for row in rows)
    replace_bytes(folder / CONFIG, tomli_w.dumps(values).encode())
    replace_bytes(folder / PER_QUESTION, lines.encode())
    replace_bytes(folder / RESULT, (dump_json(result, RESULT) + "\n").encode())
