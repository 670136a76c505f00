"""A judge behind real HTTP, and the files of a small comparison."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from judge_server import DATA, Act, JudgeServer, Seen, write_lines

from esrl.judge.settings import JudgeConfig, RequestConfig

ENDPOINT_NAMES = ("ESRL_JUDGE_URL", "ESRL_JUDGE_KEY", "OPENAI_BASE_URL", "OPENAI_API_KEY")


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a real endpoint nor a proxy has a part in these tests."""
    for name in ENDPOINT_NAMES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def serve() -> Iterator[Callable[[Callable[[Seen], Act]], JudgeServer]]:
    servers: list[JudgeServer] = []

    def start(act: Callable[[Seen], Act]) -> JudgeServer:
        servers.append(JudgeServer(act))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture
def patient() -> RequestConfig:
    """Retries without long waits."""
    return RequestConfig(min_delay_seconds=0.01, max_delay_seconds=0.02, timeout_seconds=5.0, max_attempts=4)


@pytest.fixture
def comparison(tmp_path: Path, patient: RequestConfig) -> Callable[..., JudgeConfig]:
    """``comparison(num_questions, **settings)``: two systems whose answers say which question they belong to."""

    def make(num_questions: int = 6, **settings: Any) -> JudgeConfig:
        rows = [{"question_id": n, "category": "odd" if n % 2 else "even", "prompt": f"Question {n}?"}
                for n in range(1, num_questions + 1)]  # fmt: skip
        questions = write_lines(tmp_path / "questions.jsonl", rows)
        answers = [
            write_lines(tmp_path / f"{name}.jsonl", [{"question_id": row["question_id"],
                        "answer": f"{name} to {row['question_id']}" + " and more" * more} for row in rows])
            for name, more in (("ours", 3), ("theirs", 0))
        ]  # fmt: skip
        values: dict[str, Any] = {"answers": tuple(answers), "questions": questions, "judge": "judge-7b"}
        values |= {"output_dir": tmp_path / "out", "templates": DATA / "judge_prompts.jsonl", "request": patient}
        return JudgeConfig(**{**values, "num_resamples": 500, **settings})

    return make
