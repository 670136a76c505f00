"""A server that speaks the protocol of /chat/completions over real HTTP, misbehaves on demand, and counts."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from esrl.judge import JudgeConfig

DATA = Path(__file__).parent / "data"
KEY = "sk-verysecret-4711/abc+def"


@dataclass(kw_only=True)
class Act:
    """What the server does with one request."""

    text: str | None = None
    """The judge's words; None with status 200: `body` is sent as it is."""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    delay: float = 0.0
    """Seconds before anything is sent."""
    drip: float = 0.0
    """Seconds between single bytes of the body."""
    close: bool = False
    """Close the connection instead of answering."""
    lose: int = 0
    """Bytes of the announced body that are never sent."""


def completion(text: str | None, finish_reason: str = "stop") -> bytes:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish_reason}
    usage = {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120}
    return json.dumps({"id": "x", "object": "chat.completion", "choices": [choice], "usage": usage}).encode()


def error(status: int, message: str, code: str = "oops", **headers: str) -> Act:
    body = json.dumps({"error": {"message": message, "type": "t", "code": code}}).encode()
    return Act(status=status, body=body, headers={name.replace("_", "-"): value for name, value in headers.items()})


@dataclass(kw_only=True)
class Seen:
    """One request as it came in; ``number`` counts from 0."""

    number: int
    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    time: float

    @property
    def prompt(self) -> str:
        return str(self.body["messages"][-1]["content"])

    @property
    def answers(self) -> list[str]:
        """The answers that the judge is shown, out of FastChat's templates."""
        return re.findall(r"\[The Start of Assistant.*?'s Answer\]\n(.*?)\n\[The End of Assistant", self.prompt, re.S)


class JudgeServer:
    """``server.act`` decides by the request; all that came in is in ``server.seen``."""

    def __init__(self, act: Callable[[Seen], Act]) -> None:
        self.act = act
        self.seen: list[Seen] = []
        self.at_once = self.most_at_once = 0
        self._lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                server.handle(self)

            def log_message(self, *_: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_address[1]}/v1"

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def handle(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        with self._lock:
            headers = {name.lower(): value for name, value in handler.headers.items()}
            number, now = len(self.seen), time.monotonic()
            seen = Seen(number=number, path=handler.path, headers=headers, body=body, time=now)
            self.seen.append(seen)
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            self._answer(handler, self.act(seen))
        except (BrokenPipeError, ConnectionResetError):
            pass  # the client has had enough
        finally:
            with self._lock:
                self.at_once -= 1

    def _answer(self, handler: BaseHTTPRequestHandler, act: Act) -> None:
        time.sleep(act.delay)
        if act.close:
            handler.close_connection = True
            return
        body = act.body if act.text is None else completion(act.text)
        handler.send_response(act.status)
        for name, value in act.headers.items():
            handler.send_header(name, value)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        sent = body[: len(body) - act.lose]
        if act.lose:
            handler.close_connection = True
        if not act.drip:
            handler.wfile.write(sent)
            return
        for byte in sent:
            handler.wfile.write(bytes([byte]))
            handler.wfile.flush()
            time.sleep(act.drip)


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def environ(server: JudgeServer) -> dict[str, str]:
    return {"ESRL_JUDGE_URL": server.url, "ESRL_JUDGE_KEY": KEY}


def grade(seen: Seen) -> Act:
    """Ours is worth 9 and theirs 6 on odd questions, both 7 on even ones; of two answers the better one by that."""
    points = [
        7 if int(answer.split()[2]) % 2 == 0 else 9 if answer.startswith("ours") else 6 for answer in seen.answers
    ]
    if len(points) == 1:
        return Act(text=f"Well. Rating: [[{points[0]}]]")
    return Act(text="[[A]]" if points[0] > points[1] else "[[B]]" if points[1] > points[0] else "[[C]]")


def kept(config: JudgeConfig) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (config.output_dir / "judgments.jsonl").read_text().splitlines()]
