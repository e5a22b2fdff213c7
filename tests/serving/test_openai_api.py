"""The server from outside: the real openai client, plain sockets, lm-eval; the same tokens as `generate`."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx2 as httpx
import openai
import pytest
import torch
from served import post, served

from sparsessm import runtime
from sparsessm.runtime.generation import Model
from sparsessm.serving.running import Server

PROMPT = "def main("
TEMPLATE = "{% for m in messages %}# {{ m.role }}: {{ m.content }}\n{% endfor %}# assistant:"


@pytest.fixture(scope="module")
def model() -> Model:
    return runtime.load("builtin:pycode")


@pytest.fixture(scope="module")
def server(model: Model) -> Iterator[Server]:
    model.tokenizer.chat_template = TEMPLATE
    limits = {"new_tokens": 200, "prompt_tokens": 3000}
    with served(model, batch=4, waiting=4, cache=1 << 26, **limits) as found:
        yield found


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.address + "/v1", api_key="none", max_retries=0) as found:
        yield found


def test_the_same_text_as_generate(client: openai.OpenAI, model: Model) -> None:
    want = model.generate(PROMPT, 40)
    done = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=40, temperature=0)
    assert done.choices[0].text == want.text and done.choices[0].finish_reason == "length"
    assert done.usage is not None
    assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (len(want.prompt_ids), 40)
    warm = model.generate(PROMPT, 30, temperature=0.8, top_p=0.9, seed=5)
    how: Any = {"temperature": 0.8, "top_p": 0.9, "seed": 5, "max_tokens": 30}
    assert client.completions.create(model="tiny", prompt=PROMPT, **how).choices[0].text == warm.text
    ids = model.encode(PROMPT)
    several = client.completions.create(model="tiny", prompt=[ids, ids], n=2, **how)
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    texts = [choice.text for choice in several.choices]
    assert texts[0] == texts[2] == warm.text and texts[1] == texts[3] != warm.text


def test_a_stream_adds_up_to_the_answer(client: openai.OpenAI, model: Model) -> None:
    want = model.generate(PROMPT, 40)
    how: Any = {"model": "tiny", "prompt": PROMPT, "max_tokens": 40, "temperature": 0, "stream": True}
    chunks = list(client.completions.create(**how, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == want.text and len(chunks) > 10
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + [
        "length"
    ]
    assert not chunks[-1].choices and chunks[-1].usage and chunks[-1].usage.completion_tokens == 40


def test_stop_texts(client: openai.OpenAI, model: Model) -> None:
    whole = model.generate(PROMPT, 60).text
    stop = whole[25:28]
    for stream in (False, True):
        how: Any = {"prompt": PROMPT, "max_tokens": 60, "temperature": 0, "stop": ["\x00", stop]}
        found: Any = client.completions.create(model="tiny", stream=stream, **how)
        choices = [chunk.choices[0] for chunk in found] if stream else found.choices
        assert "".join(choice.text for choice in choices) == whole[: whole.index(stop)]
        assert choices[-1].finish_reason == "stop"


def test_a_chat_by_the_tokenizers_template(client: openai.OpenAI, model: Model) -> None:
    want = model.generate("# user: sort a list\n# assistant:", 25)
    messages: Any = [{"role": "user", "content": "sort a list"}]
    how: Any = {"model": "tiny", "messages": messages, "max_completion_tokens": 25, "temperature": 0}
    done = client.chat.completions.create(**how, logprobs=True, top_logprobs=2)
    assert done.choices[0].message.content == want.text and done.choices[0].message.role == "assistant"
    assert done.choices[0].logprobs and len(done.choices[0].logprobs.content or []) == 25
    first = (done.choices[0].logprobs.content or [])[0]
    assert first.token == first.top_logprobs[0].token and first.logprob == first.top_logprobs[0].logprob
    pieces = client.chat.completions.create(**how, stream=True)
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == want.text
    parts: Any = [{"role": "user", "content": [{"type": "text", "text": "sort a list"}]}]
    again = client.chat.completions.create(**{**how, "messages": parts})
    assert again.choices[0].message.content == want.text


def test_logprobs_with_echo_are_the_models(client: openai.OpenAI, model: Model) -> None:
    how: Any = {"prompt": PROMPT + "self):", "max_tokens": 1, "temperature": 0, "echo": True, "logprobs": 2}
    done = client.completions.create(model="tiny", **how)
    told = done.choices[0].logprobs
    assert told is not None and told.tokens is not None and told.token_logprobs is not None
    ids = model.encode(PROMPT + "self):")
    want = torch.log_softmax(model.logits(ids).double(), -1)
    assert told.token_logprobs[0] is None and len(told.tokens) == len(ids) + 1
    found = torch.tensor(told.token_logprobs[1:-1], dtype=torch.float64)
    expected = want[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert done.choices[0].text == "".join(told.tokens) and told.text_offset is not None
    assert [done.choices[0].text[place] for place in told.text_offset] == [text[0] for text in told.tokens]


def test_models_health_and_metrics(client: openai.OpenAI, server: Server) -> None:
    assert [one.id for one in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "sparsessm"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("huge")
    assert httpx.get(server.address + "/health").json() == {"status": "ok"}
    before = counted(server, "sparsessm_new_tokens_total")
    client.completions.create(model="tiny", prompt=PROMPT, max_tokens=7, temperature=0)
    assert counted(server, "sparsessm_new_tokens_total") == before + 7
    assert counted(server, 'sparsessm_requests_total{path="/v1/completions",status="200"}') >= 1
    assert counted(server, "sparsessm_time_to_first_token_seconds_count") >= 1


def counted(server: Server, name: str) -> float:
    lines = httpx.get(server.address + "/metrics").text.splitlines()
    return next((float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"{name} ")), 0.0)


WRONG = [
    ({"prompt": "x", "best_of": 3}, "best_of is not supported"),
    ({"prompt": "x", "logit_bias": {"5": 1}}, "logit_bias is not supported"),
    ({"prompt": "x", "surprise": 1}, "surprise"),
    ({"prompt": "x", "max_tokens": -1}, "max_tokens"),
    ({"prompt": "x", "max_tokens": 201}, "max_tokens is 201; allowed: at most 200"),
    ({"prompt": "x", "temperature": -1}, "temperature"),
    ({"prompt": "x", "temperature": "warm"}, "temperature"),
    ({"prompt": "x", "top_p": 0}, "top_p"),
    ({"prompt": "x", "n": 0}, "n:"),
    ({"prompt": "x", "n": 5}, "n is 5; allowed: 1 to 4"),
    ({"prompt": "x", "stop": [""]}, "at least one character"),
    ({"prompt": "x", "stop": ["a"] * 17}, "17 texts"),
    ({"prompt": [5, 10**9]}, "token 1000000000"),
    ({"prompt": [[5], [-1]]}, "token -1"),
    ({"prompt": [5] * 3001}, "3,001 tokens; allowed: at most 3,000"),
    ({"prompt": ["x"] * 300}, "300 continuations"),
    ({"prompt": {"a": 1}}, "prompt"),
    ({}, "prompt"),
    ({"prompt": "\ud800"}, ""),
    ([], ""),
]


@pytest.mark.parametrize("body, said", WRONG)
def test_a_wrong_request_is_refused_by_name(server: Server, body: Any, said: str) -> None:
    status, found = post(server.address, "/v1/completions", json.dumps(body).encode())
    error = json.loads(found)["error"]
    assert status == 400 and error["type"] == "invalid_request_error" and said in error["message"]


def test_what_is_no_request_at_all(server: Server) -> None:
    for body in (b"", b"{", b"\xff\xfe", b"[" * 5000, b'{"prompt": NaN}'):
        assert post(server.address, "/v1/completions", body)[0] == 400
    status, found = post(server.address, "/v1/completions", b'{"prompt": "' + b"x" * (9 << 20) + b'"}')
    assert status == 413 and "8,388,608 bytes" in json.loads(found)["error"]["message"]
    assert post(server.address, "/v1/nothing", b"{}")[0] == 404
    assert httpx.get(server.address + "/v1/completions").status_code == 405
    status, found = post(server.address, "/v1/completions", b'{"prompt": "x", "model": "huge"}')
    assert status == 404 and "'huge'" in json.loads(found)["error"]["message"]
    status, _ = post(server.address, "/v1/chat/completions", b'{"messages": []}')
    assert status == 400


def test_a_body_without_a_length_is_bounded_too(server: Server) -> None:
    def endless() -> Iterator[bytes]:
        yield b'{"prompt": "'
        for _ in range(10):
            yield b"x" * (1 << 20)

    answer = httpx.post(
        server.address + "/v1/completions", content=endless(), headers={"Content-Type": "application/json"}
    )
    assert answer.status_code == 413


def test_other_names_of_this_machine_are_refused(server: Server) -> None:
    status, found = post(server.address, "/v1/completions", b'{"prompt": "x"}', Host="evil.example")
    assert status == 421 and "evil.example" in json.loads(found)["error"]["message"]
    assert httpx.get(server.address + "/health", headers={"Host": "localhost:1"}).status_code == 200


def test_who_leaves_is_not_answered_any_more(model: Model) -> None:
    endless, most = Model(model.engine, model.tokenizer, model.config), 10**7  # hours of work
    with served(endless, batch=4, new_tokens=most) as server:
        host, port = server.address.removeprefix("http://").split(":")
        for stream in ("true", "false"):
            body = f'{{"prompt": "x", "max_tokens": {most}, "n": 4, "stream": {stream}}}'.encode()
            head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
            with socket.create_connection((host, int(port))) as line:
                line.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
                end = time.monotonic() + 60
                while server.scheduler.load()["running"] < 4 and time.monotonic() < end:
                    time.sleep(0.001)
            while server.scheduler.busy and time.monotonic() < end:
                time.sleep(0.001)
            assert not server.scheduler.busy


def test_too_many_at_once_are_told_so(model: Model) -> None:
    endless = Model(model.engine, model.tokenizer, model.config)  # nothing ends a text
    with served(endless, batch=1, waiting=1, new_tokens=100_000) as server:
        body = b'{"prompt": "x", "max_tokens": 100000, "stream": true}'
        with httpx.Client(timeout=30) as one, httpx.Client(timeout=30) as two:
            send = {"content": body, "headers": {"Content-Type": "application/json"}}
            with one.stream("POST", server.address + "/v1/completions", **send) as first:
                begun = first.iter_bytes()  # while it lives, so does the connection
                next(begun)
                with two.stream("POST", server.address + "/v1/completions", **send):
                    status, found = post(server.address, "/v1/completions", body)
        assert status == 503 and "1 requests are waiting" in json.loads(found)["error"]["message"]


def test_a_key_is_asked_for(model: Model) -> None:
    with served(model, key="s3cret") as server:
        ok = b'{"prompt": "x", "max_tokens": 1}'
        for headers in ({}, {"Authorization": "Bearer other"}, {"Authorization": "s3cret"}):
            status, found = post(server.address, "/v1/completions", ok, **headers)
            assert status == 401 and "s3cret" not in found.decode()
        assert post(server.address, "/v1/completions", ok, Authorization="Bearer s3cret")[0] == 200
        assert httpx.get(server.address + "/metrics").status_code == 401
        assert httpx.get(server.address + "/health").status_code == 200


def test_without_a_template_there_is_no_chat(model: Model) -> None:
    model.tokenizer.chat_template = None
    try:
        with served(model) as server:
            chat = b'{"messages": [{"role": "user", "content": "hello"}]}'
            status, found = post(server.address, "/v1/chat/completions", chat)
            assert status == 400 and "has no chat template" in json.loads(found)["error"]["message"]
            model.tokenizer.chat_template = "{{ raise_exception('only the system may speak') }}"
            status, found = post(server.address, "/v1/chat/completions", chat)
            assert status == 400 and "only the system may speak" in json.loads(found)["error"]["message"]
    finally:
        model.tokenizer.chat_template = TEMPLATE
