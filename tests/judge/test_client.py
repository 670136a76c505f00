"""The client against a server that misbehaves: what is tried again, what is not, and where the key goes."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
import traceback
from typing import Any

import pytest
from judge_server import KEY, Act, completion, error

from esrl.judge.client import Client, Endpoint, Refusal, Reply, endpoint_of, make_body, retry_after
from esrl.judge.settings import RequestConfig

BODY = make_body("judge-7b", [{"role": "user", "content": "Rate it. \U0001f600 \ud800"}], RequestConfig())


def ask(url: str, config: RequestConfig, key: str | None = KEY, times: int = 1) -> list[Reply | Refusal]:
    async def work() -> list[Reply | Refusal]:
        async with Client(Endpoint(url=url, key=key), config) as client:
            return list(await asyncio.gather(*(client.ask(BODY) for _ in range(times))))

    return asyncio.run(work())


def test_a_request_is_what_the_protocol_asks_for(serve, patient):
    server = serve(lambda seen: Act(text="[[8]]"))
    [reply] = ask(server.url, patient)
    assert reply == Reply(text="[[8]]", finish_reason="stop", prompt_tokens=100, completion_tokens=20, attempts=1)
    [seen] = server.seen
    assert seen.path == "/v1/chat/completions"
    assert seen.body == {"model": "judge-7b", "messages": BODY["messages"], "temperature": 0.0, "max_tokens": 2048}
    assert seen.headers["authorization"] == f"Bearer {KEY}"
    assert seen.headers["content-type"] == "application/json"


def test_without_a_key_none_is_sent_and_settings_change_the_body(serve, patient):
    server = serve(lambda seen: Act(text="[[8]]"))
    ask(server.url, patient, key=None)
    assert "authorization" not in server.seen[0].headers
    config = RequestConfig(temperature=None, max_tokens=7, max_tokens_name="max_completion_tokens")
    assert make_body("j", [], config) == {"model": "j", "messages": [], "max_completion_tokens": 7}


FAULTS: dict[str, Act] = {
    "429": error(429, "slow down"),
    "500": error(500, "oh no"),
    "502 in HTML": Act(status=502, body=b"<html>bad gateway</html>"),
    "529": error(529, "overloaded"),
    "408": error(408, "timeout"),
    "cut-off JSON": Act(body=completion("[[8]]")[:-9]),
    "body shorter than announced": Act(text="[[8]]", lose=9),
    "connection closed": Act(close=True),
    "no JSON": Act(body=b"hello"),
    "empty body": Act(),
    "error in a 200": Act(body=b'{"error": {"message": "busy"}}'),
    "no choices": Act(body=b'{"choices": []}'),
    "a list": Act(body=b"[1]"),
    "choices of another type": Act(body=b'{"choices": {"0": 1}}'),
    "message of another type": Act(body=b'{"choices": [{"message": "hi"}]}'),
    "too slow": Act(text="[[8]]", delay=1.0),
    "byte by byte": Act(text="[[8]]", drip=0.05),  # no single read takes long
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_passing_fault_is_tried_again(serve, patient, fault):
    config = dataclasses.replace(patient, timeout_seconds=0.4)
    server = serve(lambda seen: FAULTS[fault] if seen.number < 2 else Act(text="[[8]]"))
    [reply] = ask(server.url, config)
    assert isinstance(reply, Reply) and (reply.text, reply.attempts) == ("[[8]]", 3)
    assert len(server.seen) == 3


@pytest.mark.parametrize("fault", ["500", "connection closed", "cut-off JSON", "too slow"])
def test_a_lasting_fault_is_given_up_after_max_attempts(serve, patient, fault):
    config = dataclasses.replace(patient, timeout_seconds=0.2, max_attempts=3)
    server = serve(lambda seen: FAULTS[fault])
    [refusal] = ask(server.url, config)
    assert isinstance(refusal, Refusal) and refusal.then == "skip" and "(3 attempts)" in refusal.reason
    assert len(server.seen) == 3


FINAL: dict[str, tuple[Act, str, str]] = {
    "400": (error(400, "maximum context length is 4096"), "skip", "HTTP 400: maximum context length is 4096"),
    "413": (error(413, "too large"), "skip", "HTTP 413"),
    "401": (error(401, "no such key"), "stop", "HTTP 401: no such key. Check the key"),
    "403": (error(403, "not yours"), "stop", "HTTP 403"),
    "404": (error(404, "no such model"), "stop", "HTTP 404: no such model. Check the URL"),
    "no credit": (error(429, "pay first", "insufficient_quota"), "stop", "credit"),
    "redirect": (Act(status=307, headers={"Location": "http://127.0.0.1:9/"}), "stop", "points elsewhere"),
    "a day": (error(429, "later", Retry_After="86400"), "stop", "asks to wait 86400 s"),
}


@pytest.mark.parametrize("fault", FINAL)
def test_what_another_attempt_cannot_change_is_asked_once(serve, patient, fault):
    act, then, said = FINAL[fault]
    server = serve(lambda seen: act)
    [refusal] = ask(server.url, patient)
    assert isinstance(refusal, Refusal) and refusal.then == then and said in refusal.reason
    assert len(server.seen) == 1


def test_nobody_there_is_a_refusal(patient):
    [refusal] = ask("http://127.0.0.1:9/v1", patient)
    assert isinstance(refusal, Refusal) and "the connection failed (ConnectError" in refusal.reason


@pytest.mark.parametrize(("status", "reason"), [(200, "content_filter"), (200, "length")])
def test_a_reply_without_text_is_a_reply(serve, patient, status, reason):
    server = serve(lambda seen: Act(body=completion(None, reason)))
    [reply] = ask(server.url, patient)
    assert isinstance(reply, Reply) and (reply.text, reply.finish_reason) == ("", reason)
    assert len(server.seen) == 1


def test_retry_after_is_waited_for_by_all_requests(serve, patient):
    # the delays of our own are at most 0.02 s, so whoever comes back only after a second has obeyed the header
    server = serve(lambda seen: error(429, "wait", Retry_After="1") if seen.number < 1 else Act(text="[[8]]"))
    started = time.monotonic()
    [reply] = ask(server.url, patient)
    assert isinstance(reply, Reply) and 1.0 <= server.seen[1].time - server.seen[0].time < 3.0
    assert time.monotonic() - started < 4


def test_a_wait_that_one_request_is_told_of_holds_the_others_back(serve, patient):
    first = error(429, "wait", Retry_After="1")
    server = serve(lambda seen: first if seen.number == 0 else Act(text="[[8]]", delay=0.1))

    async def work() -> list[Any]:
        async with Client(Endpoint(url=server.url), patient) as client:
            refused = asyncio.create_task(client.ask(BODY))
            await asyncio.sleep(0.3)  # by then the server has said so
            return list(await asyncio.gather(refused, client.ask(BODY)))

    assert all(isinstance(reply, Reply) for reply in asyncio.run(work()))
    assert all(later.time - server.seen[0].time >= 1.0 for later in server.seen[1:])


def test_waits_double_and_are_scattered(patient):
    config = dataclasses.replace(patient, min_delay_seconds=1.0, max_delay_seconds=8.0)

    async def delays() -> list[list[float]]:
        async with Client(Endpoint(url="http://127.0.0.1:9"), config) as client:
            return [[client._delay(attempt) for _ in range(200)] for attempt in range(1, 7)]

    for drawn, longest in zip(asyncio.run(delays()), (1, 2, 4, 8, 8, 8), strict=True):
        assert longest / 2 <= min(drawn) < 0.6 * longest and 0.9 * longest < max(drawn) <= longest


def test_stop_ends_a_wait_at_once(serve, patient):
    server = serve(lambda seen: error(429, "wait", Retry_After="100"))

    async def work() -> tuple[Any, float]:
        async with Client(Endpoint(url=server.url), patient) as client:
            task = asyncio.create_task(client.ask(BODY))
            await asyncio.sleep(0.3)
            started = time.monotonic()
            client.stop()
            return await task, time.monotonic() - started

    refusal, seconds = asyncio.run(work())
    assert isinstance(refusal, Refusal) and refusal.reason == "HTTP 429: wait" and seconds < 1
    assert len(server.seen) == 1


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (None, 0), ("", 0), ("7", 7), ("1.5", 1.5), ("-3", 0), ("nan", 0), ("inf", 0), ("soon", 0),
        ("Thu, 01 Jan 1970 00:02:00 GMT", 20), ("Thu, 01 Jan 1970 00:01:00 GMT", 0),
    ],
)  # fmt: skip
def test_retry_after(value, seconds):
    assert retry_after(value, now=100.0) == seconds


# Where the endpoint is


def test_the_endpoint_comes_from_the_environment():
    both = {"ESRL_JUDGE_URL": " http://a:1/v1/ ", "ESRL_JUDGE_KEY": f"{KEY}\n"}
    assert endpoint_of(both) == Endpoint(url="http://a:1/v1", key=KEY)
    fallback = {"OPENAI_BASE_URL": "https://b/v1", "OPENAI_API_KEY": "sk-other"}
    assert endpoint_of(fallback) == Endpoint(url="https://b/v1", key="sk-other")
    assert endpoint_of({**fallback, "ESRL_JUDGE_KEY": KEY}).key == KEY
    assert endpoint_of({"ESRL_JUDGE_URL": "http://a/v1/chat/completions"}).url == "http://a/v1"


def test_openai_s_key_is_not_sent_to_another_server():
    environ = {"ESRL_JUDGE_URL": "http://a/v1", "OPENAI_BASE_URL": "https://b/v1", "OPENAI_API_KEY": "sk-other"}
    assert endpoint_of(environ) == Endpoint(url="http://a/v1", key=None)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("", "no endpoint is named; set ESRL_JUDGE_URL"),
        ("localhost:8000/v1", "is no URL that can be asked"),
        ("ftp://a/v1", "is no URL that can be asked"),
        ("http://", "is no URL that can be asked"),
        (f"http://user:{KEY.replace('/', '')}@a/v1", "holds a user, a password"),
        (f"http://a/v1?key={KEY}", "holds a user, a password, a query"),
    ],
)
def test_an_endpoint_that_cannot_be_used_is_refused_without_its_secrets(url, said):
    with pytest.raises(ValueError, match="ESRL_JUDGE_URL") as caught:
        endpoint_of({"ESRL_JUDGE_URL": url})
    assert said in str(caught.value) and "verysecret" not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("key", ["sk-secret\nX-Other: 1", "sk secret", "sk-sécret", "sk-secret\x7f"])
def test_a_key_no_header_can_hold_is_refused_without_being_shown(key):
    with pytest.raises(ValueError, match="ESRL_JUDGE_KEY holds a blank") as caught:
        endpoint_of({"ESRL_JUDGE_URL": "http://a/v1", "ESRL_JUDGE_KEY": key})
    assert "cret" not in "".join(traceback.format_exception(caught.value))


def test_the_key_is_in_nothing_but_its_header(serve, patient, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    acts = [
        error(500, f"wrong key {KEY} in {KEY}"),
        Act(status=502, body=f"<html>{KEY}</html>".encode()),
        Act(close=True),
        Act(text=f"[[8]] said {KEY}"),
    ]
    server = serve(lambda seen: acts[seen.number])
    [reply] = ask(server.url, patient)
    assert isinstance(reply, Reply) and reply.text == "[[8]] said [key]" and reply.attempts == 4
    refused = serve(lambda seen: error(401, f"Incorrect API key provided: {KEY}"))
    [refusal] = ask(refused.url, patient)
    assert isinstance(refusal, Refusal) and "Incorrect API key provided: [key]" in refusal.reason
    assert all(seen.headers["authorization"] == f"Bearer {KEY}" for seen in server.seen + refused.seen)
    said = capfd.readouterr()
    endpoint = Endpoint(url="http://a", key=KEY)
    everything = [caplog.text, said.out, said.err, repr(reply), repr(refusal), repr(endpoint), str(endpoint)]
    assert not any(KEY in text for text in everything)


def test_a_short_key_is_no_secret_but_may_be_a_word(serve, patient):
    server = serve(lambda seen: Act(text="The answer is EMPTY: [[1]]"))
    assert ask(server.url, patient, key="EMPTY")[0].text == "The answer is EMPTY: [[1]]"
