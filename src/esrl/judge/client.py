"""The judge's endpoint: OpenAI's /chat/completions over HTTP, asked patiently and given up by rule.

The key is sent in one header and kept out of everything else: it is in no message here, and what the server says is
searched for it before it is shown or kept. Redirects are not followed, for the key would go along.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from email.utils import parsedate_to_datetime
from typing import Any, Literal

import httpx2

from esrl.errors import EsrlError
from esrl.judge.prompts import Messages
from esrl.judge.settings import RequestConfig

MAX_REPLY_BYTES = 16 * 2**20
SHORTEST_SECRET = 8
_RETRIED = {408, 409, 425, 429}
_STOPPING = {
    401: "Check the key (ESRL_JUDGE_KEY).",
    402: "Check the account's credit.",
    403: "Check what the key may do, and the model's name.",
    404: "Check the URL (ESRL_JUDGE_URL, which usually ends in /v1) and the model's name.",
    405: "Check the URL (ESRL_JUDGE_URL, which usually ends in /v1).",
}


class JudgeError(EsrlError):
    """The judge's endpoint does not work, or did not answer everything; what it did answer is kept."""

    exit_code = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Where the judge is. ``url`` is the part before /chat/completions."""

    url: str
    key: str | None = field(default=None, repr=False)

    def clean(self, text: str) -> str:
        """``text`` without the key. One of a few letters (EMPTY, where none is needed) is a word, and no secret."""
        return text.replace(self.key, "[key]") if self.key and len(self.key) >= SHORTEST_SECRET else text


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What the judge said."""

    text: str
    finish_reason: str | None
    prompt_tokens: int | None
    completion_tokens: int | None
    attempts: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """Why there is no reply, and whether another attempt (``retry``), another request (``skip``) or none (``stop``)
    could have one. ``wait``: seconds the server asks to be left alone."""

    reason: str
    then: Literal["retry", "skip", "stop"]
    wait: float = 0.0


def endpoint_of(environ: Mapping[str, str]) -> Endpoint:
    """The endpoint named by ESRL_JUDGE_URL and ESRL_JUDGE_KEY, or else by OPENAI_BASE_URL and OPENAI_API_KEY.

    With ESRL_JUDGE_URL set, OPENAI_API_KEY is not looked at: it belongs to another server. Without a key none is sent.

    Raises:
        ValueError: no URL, a URL that is none or that holds a password or query, or a key no header can hold.
    """
    name, key_names = "ESRL_JUDGE_URL", ["ESRL_JUDGE_KEY"]
    if not environ.get(name, "").strip():
        name, key_names = "OPENAI_BASE_URL", ["ESRL_JUDGE_KEY", "OPENAI_API_KEY"]
    text = environ.get(name, "").strip().rstrip("/")
    if not text:
        raise ValueError(
            "no endpoint is named; set ESRL_JUDGE_URL (http://localhost:8000/v1, say) and, if it needs one, "
            "ESRL_JUDGE_KEY in the environment."
        )
    try:
        url = httpx2.URL(text)
    except httpx2.InvalidURL:
        url = None
    if url is None or url.scheme not in ("http", "https") or not url.host:
        raise ValueError(f"{name} is no URL that can be asked; write it as https://HOST/v1.")
    if url.userinfo or url.query or url.fragment:
        raise ValueError(f"{name} holds a user, a password, a query or a fragment; a key belongs into ESRL_JUDGE_KEY.")
    key_name = next((key for key in key_names if environ.get(key, "").strip()), None)
    key = environ[key_name].strip() if key_name else None
    if key is not None and not (key.isascii() and key.isprintable() and " " not in key):
        raise ValueError(f"{key_name} holds a blank, a line break or a character beyond ASCII; copy the key again.")
    return Endpoint(url=text.removesuffix("/chat/completions"), key=key)


def make_body(judge: str, messages: Messages, config: RequestConfig) -> dict[str, Any]:
    """A request's body: all that the reply depends on."""
    body: dict[str, Any] = {"model": judge, "messages": messages, config.max_tokens_name: config.max_tokens}
    return body if config.temperature is None else body | {"temperature": config.temperature}


class Client:
    """Asks one endpoint; several requests may be under way at once, and share what the server says about waiting.

        async with Client(endpoint, config) as client:
            reply = await client.ask(make_body("gpt-4", messages, config))

    ``retries`` counts attempts after a first one. After ``stop()`` nothing is tried again.
    """

    def __init__(self, endpoint: Endpoint, config: RequestConfig) -> None:
        self.endpoint = endpoint
        self.config = config
        self.retries = 0
        self._quiet_until = 0.0
        self._stopped = asyncio.Event()
        headers = {"Authorization": f"Bearer {endpoint.key}"} if endpoint.key else {}
        limits = httpx2.Limits(max_connections=config.concurrency, max_keepalive_connections=config.concurrency)
        # the time limit is for a whole request: the client's own are for single reads, and a slow drip passes them
        self._http = httpx2.AsyncClient(headers=headers, limits=limits, timeout=None, follow_redirects=False)

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    def stop(self) -> None:
        """Let requests that are under way end, but none begin again."""
        self._stopped.set()

    async def ask(self, body: Mapping[str, Any]) -> Reply | Refusal:
        """The judge's reply, after as many attempts as it takes or as are allowed; a refusal says why there is none."""
        content = json.dumps(body).encode()
        refusal = Refusal(reason="the run has ended", then="stop")
        for attempt in range(1, self.config.max_attempts + 1):
            await self._sleep(self._quiet_until - time.monotonic())
            if self._stopped.is_set():
                return refusal
            self.retries += attempt > 1
            outcome = await self._try(content)
            if isinstance(outcome, Reply):
                return replace(outcome, attempts=attempt)
            refusal = outcome
            if refusal.then != "retry":
                return refusal
            if refusal.wait > self.config.max_retry_after_seconds:
                return self._too_long(refusal)
            if attempt < self.config.max_attempts:
                self._quiet_until = max(self._quiet_until, time.monotonic() + refusal.wait)
                await self._sleep(max(refusal.wait, self._delay(attempt)))
        return replace(refusal, reason=f"{refusal.reason} ({self.config.max_attempts} attempts)", then="skip")

    def _too_long(self, refusal: Refusal) -> Refusal:
        limit = f"max_retry_after_seconds is {self.config.max_retry_after_seconds:g}"
        reason = f"{refusal.reason}; it asks to wait {refusal.wait:.0f} s and {limit}. Run again later"
        return Refusal(reason=reason, then="stop")

    async def _try(self, content: bytes) -> Reply | Refusal:
        """One attempt."""
        url, headers = f"{self.endpoint.url}/chat/completions", {"Content-Type": "application/json"}
        seconds = self.config.timeout_seconds
        try:
            async with (
                asyncio.timeout(seconds),
                self._http.stream("POST", url, content=content, headers=headers) as response,
            ):
                data = bytearray()
                async for part in response.aiter_bytes():
                    data += part
                    if len(data) > MAX_REPLY_BYTES:
                        return Refusal(reason=f"the reply is longer than {MAX_REPLY_BYTES:,} bytes", then="skip")
        except TimeoutError:
            return Refusal(reason=f"no whole reply within {seconds:g} s", then="retry")
        except (httpx2.UnsupportedProtocol, httpx2.LocalProtocolError) as error:
            return Refusal(reason=f"the request cannot be sent ({type(error).__name__})", then="stop")
        except httpx2.RequestError as error:
            said = self.endpoint.clean(" ".join(str(error).split()))[:200]
            return Refusal(reason=f"the connection failed ({type(error).__name__}: {said})", then="retry")
        return self._read(response, bytes(data))

    def _read(self, response: httpx2.Response, data: bytes) -> Reply | Refusal:
        """A complete response."""
        try:
            value = json.loads(data)
        except (ValueError, RecursionError):
            value = None
        if response.status_code != 200:
            return self._refusal(response, value)
        if value is None:
            return Refusal(reason="the reply is no JSON, or cut off", then="retry")
        reply = _reply(value)
        if reply is None:
            return Refusal(reason=f"the reply holds no message{self._said(value)}", then="retry")
        reason = reply.finish_reason and self.endpoint.clean(reply.finish_reason)
        return replace(reply, text=self.endpoint.clean(reply.text), finish_reason=reason)

    def _refusal(self, response: httpx2.Response, value: object) -> Refusal:
        status = response.status_code
        reason = f"HTTP {status}{self._said(value)}"
        if status in _STOPPING:
            return Refusal(reason=f"{reason.rstrip('.')}. {_STOPPING[status]}", then="stop")
        if 300 <= status < 400:
            return Refusal(reason=f"{reason}: it points elsewhere. Set ESRL_JUDGE_URL to that place", then="stop")
        if "insufficient_quota" in _error(value).values():
            return Refusal(reason=f"{reason.rstrip('.')}. Check the account's credit", then="stop")
        if status in _RETRIED or status >= 500 or status < 300:
            return Refusal(reason=reason, then="retry", wait=retry_after(response.headers.get("Retry-After")))
        return Refusal(reason=reason, then="skip")

    def _said(self, value: object) -> str:
        """The server's own words, if they come in the protocol's form."""
        message = _error(value).get("message")
        if not isinstance(message, str) or not message.strip():
            return ""
        return f": {self.endpoint.clean(' '.join(message.split()))[:200]}"

    def _delay(self, attempt: int) -> float:
        longest = min(self.config.max_delay_seconds, self.config.min_delay_seconds * 2.0 ** (attempt - 1))
        return longest * random.uniform(0.5, 1.0)

    async def _sleep(self, seconds: float) -> None:
        """Wait, but not past ``stop()``."""
        if seconds > 0:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stopped.wait(), seconds)


def retry_after(value: str | None, now: float | None = None) -> float:
    """The seconds a Retry-After header asks for, given as a number or as a date; 0 for none or nonsense."""
    if value is None:
        return 0.0
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - (time.time() if now is None else now)
        except (ValueError, TypeError, OverflowError):
            return 0.0
    return max(0.0, seconds) if math.isfinite(seconds) else 0.0


def _reply(value: object) -> Reply | None:
    """The first choice's message; without text (a content filter, a limit) it is an empty one."""
    try:
        choice = value["choices"][0]  # type: ignore[index]
        text, reason = choice["message"].get("content"), choice.get("finish_reason")
    except (KeyError, IndexError, TypeError, AttributeError):
        return None
    if not isinstance(text, str | None) or (text is None and not isinstance(reason, str)):
        return None
    usage = value.get("usage") if isinstance(value, dict) else None
    counts = usage if isinstance(usage, dict) else {}
    return Reply(
        text=text or "",
        finish_reason=reason if isinstance(reason, str) else None,
        prompt_tokens=_count(counts.get("prompt_tokens")),
        completion_tokens=_count(counts.get("completion_tokens")),
    )


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _error(value: object) -> dict[str, Any]:
    error = value.get("error") if isinstance(value, dict) else None
    return error if isinstance(error, dict) else {"message": error}
