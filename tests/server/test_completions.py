# SPDX-License-Identifier: Apache-2.0
"""POST /v1/completions over a real socket: shapes, streams that add up to the whole, and every refusal by name."""

from __future__ import annotations

from typing import Any

import httpx2
import pytest

from megamoe.engine.sampling_params import SamplingParams

from .fakes import RunningServer, echo_of_prompt, events_of


def body(**fields: Any) -> dict[str, Any]:
    return {"model": "fake", "prompt": "def f(", "max_tokens": 8, **fields}


def complete(client: httpx2.Client, **fields: Any) -> dict[str, Any]:
    answer = client.post("/v1/completions", json=body(**fields))
    assert answer.status_code == 200, answer.text
    return answer.json()


def refusal(client: httpx2.Client, status: int = 400, **fields: Any) -> dict[str, Any]:
    answer = client.post("/v1/completions", json=body(**fields))
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def expected_text(server: RunningServer, prompt: str, num: int = 8, seed: int = 0) -> str:
    ids = server.state.encoder.encode(prompt)
    return server.tokenizer.decode(echo_of_prompt(ids, SamplingParams(seed=seed))[:num])


def test_an_answer(server: RunningServer, client: httpx2.Client) -> None:
    answer = complete(client)
    assert list(answer) == ["id", "object", "created", "model", "choices", "usage", "system_fingerprint"]
    assert answer["object"] == "text_completion" and answer["model"] == "fake" and answer["id"].startswith("cmpl-")
    assert answer["choices"] == [
        {"index": 0, "text": expected_text(server, "def f("), "logprobs": None, "finish_reason": "length"}
    ]
    num_prompt = len(server.state.encoder.encode("def f("))
    assert answer["usage"] == {
        "prompt_tokens": num_prompt,
        "completion_tokens": 8,
        "total_tokens": num_prompt + 8,
        "prompt_tokens_details": {"cached_tokens": 3},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }


def test_the_end_of_the_text(client: httpx2.Client) -> None:
    answer = complete(client, max_tokens=100)
    assert answer["choices"][0]["finish_reason"] == "stop" and answer["usage"]["completion_tokens"] == 25


def test_default_is_sixteen_tokens(client: httpx2.Client) -> None:
    answer = client.post("/v1/completions", json={"model": "fake", "prompt": "x"}).json()
    assert answer["usage"]["completion_tokens"] == 16


@pytest.mark.parametrize("per_step", [1, 3])
def test_a_stream_adds_up_to_the_answer(server: RunningServer, client: httpx2.Client, per_step: int) -> None:
    server.engine.per_step = per_step
    whole = complete(client, logprobs=1, n=2, seed=5)
    response = client.post("/v1/completions", json=body(logprobs=1, n=2, seed=5, stream=True))
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-store"
    chunks = events_of(response.text)
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert all("usage" not in chunk for chunk in chunks)
    for idx in (0, 1):
        parts = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == idx]
        expected = whole["choices"][idx]
        assert "".join(part["text"] for part in parts) == expected["text"]
        assert [part["finish_reason"] for part in parts][-1] == expected["finish_reason"]
        assert {part["finish_reason"] for part in parts[:-1]} <= {None}
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            joined = [one for part in parts if part["logprobs"] for one in part["logprobs"][name]]
            assert joined == expected["logprobs"][name], name


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
@pytest.mark.parametrize("include", [False, True])
def test_usage_in_every_chunk(server: RunningServer, client: httpx2.Client, path: str, include: bool) -> None:
    server.engine.script = lambda prompt, params: [70, 71, 72, 73, 74, 75]
    prompt = {"messages": [{"role": "user", "content": "x"}]} if path.startswith("chat") else {"prompt": "x"}
    options = {"include_usage": include, "continuous_usage_stats": True}
    request = {"model": "fake", **prompt, "max_tokens": 6, "n": 2, "stream": True, "stream_options": options}
    chunks = events_of(client.post(f"/v1/{path}", json=request).text)
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts) and counts[-1] == 12 and len(set(counts)) > 6
    assert all(chunk["usage"]["prompt_tokens"] > 0 for chunk in chunks)
    assert all(
        one["usage"]["total_tokens"] == one["usage"]["prompt_tokens"] + count
        for one, count in zip(chunks, counts, strict=True)
    )
    assert (chunks[-1]["choices"] == []) is include


def test_usage_in_a_stream(client: httpx2.Client) -> None:
    whole = complete(client)
    chunks = events_of(
        client.post("/v1/completions", json=body(stream=True, stream_options={"include_usage": True})).text
    )
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"] == whole["usage"]


def test_n_draws_with_seeds_that_follow(server: RunningServer, client: httpx2.Client) -> None:
    texts = [choice["text"] for choice in complete(client, n=3, seed=7)["choices"]]
    assert texts == [expected_text(server, "def f(", seed=seed) for seed in (7, 8, 9)]
    assert [params.seed for params in server.engine.params] == [7, 8, 9]


@pytest.mark.parametrize(("seed", "engine_seed"), [(2**63 - 1, 2**63 - 1), (-1, 2**63 - 1), (2**70 + 5, 5), (5.0, 5)])
def test_any_integer_is_a_seed(server: RunningServer, client: httpx2.Client, seed: float, engine_seed: int) -> None:
    complete(client, seed=seed)
    assert server.engine.params[-1].seed == engine_seed


def test_several_prompts_in_every_form(server: RunningServer, client: httpx2.Client) -> None:
    texts = complete(client, prompt=["def", "class"], n=2)["choices"]
    assert [choice["index"] for choice in texts] == [0, 1, 2, 3]
    assert texts[0]["text"] == texts[1]["text"] == expected_text(server, "def")
    assert texts[2]["text"] == expected_text(server, "class")
    ids = server.state.encoder.encode("def")
    assert complete(client, prompt=ids)["choices"][0]["text"] == expected_text(server, "def")
    both = complete(client, prompt=[ids, server.state.encoder.encode("class")])["choices"]
    assert [choice["text"] for choice in both] == [expected_text(server, "def"), expected_text(server, "class")]


def test_echo(server: RunningServer, client: httpx2.Client) -> None:
    assert complete(client, echo=True)["choices"][0]["text"] == "def f(" + expected_text(server, "def f(")
    chunks = events_of(client.post("/v1/completions", json=body(echo=True, stream=True)).text)
    assert chunks[0]["choices"][0]["text"] == "def f("


def test_logprobs(server: RunningServer, client: httpx2.Client) -> None:
    logprobs = complete(client, logprobs=2)["choices"][0]["logprobs"]
    ids = server.engine.script(server.state.encoder.encode("def f("), server.engine.params[-1])[:8]
    tokens = [server.tokenizer.token_bytes(one).decode("utf-8", "replace") for one in ids]
    assert logprobs["tokens"] == tokens and logprobs["token_logprobs"] == [-0.5] * 8
    assert [list(top.values()) for top in logprobs["top_logprobs"]] == [[-1.0, -2.0]] * 8
    assert logprobs["text_offset"] == [sum(map(len, tokens[:place])) for place in range(8)]
    assert complete(client, logprobs=0)["choices"][0]["logprobs"]["top_logprobs"] == [{}] * 8


def test_stop_strings_end_the_text_and_the_request(server: RunningServer, client: httpx2.Client) -> None:
    whole = expected_text(server, "def f(", 24)
    stop = whole[5:8]
    answer = complete(client, max_tokens=24, stop=["never", stop])
    assert answer["choices"][0]["text"] == whole[: whole.index(stop)]
    assert answer["choices"][0]["finish_reason"] == "stop" and answer["usage"]["completion_tokens"] < 24
    assert len(server.engine.aborted) == 1, "the engine must not go on"
    assert complete(client, max_tokens=24, stop=stop)["choices"] == answer["choices"]
    chunks = events_of(client.post("/v1/completions", json=body(max_tokens=24, stop=stop, stream=True)).text)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == answer["choices"][0]["text"]


def test_tokens_after_a_stop_string_in_one_step_do_not_count(server: RunningServer, client: httpx2.Client) -> None:
    stop = expected_text(server, "def f(", 24)[5:8]
    expected = complete(client, max_tokens=24, stop=stop, logprobs=0)
    server.engine.per_step = 7
    assert complete(client, max_tokens=24, stop=stop, logprobs=0)["usage"] == expected["usage"]
    assert complete(client, max_tokens=24, stop=stop, logprobs=0)["choices"] == expected["choices"]


def test_stop_token_ids_are_no_text(server: RunningServer, client: httpx2.Client) -> None:
    ids = echo_of_prompt(server.state.encoder.encode("def f("), SamplingParams())
    answer = complete(client, max_tokens=24, stop_token_ids=[ids[4]])
    first = list(ids).index(ids[4])
    assert answer["choices"][0]["text"] == server.tokenizer.decode(ids[:first])
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == first + 1


def test_every_parameter_reaches_the_engine(server: RunningServer, client: httpx2.Client) -> None:
    complete(
        client,
        temperature=0.5,
        top_p=0.9,
        top_k=7,
        min_p=0.1,
        presence_penalty=0.2,
        frequency_penalty=-0.3,
        repetition_penalty=1.2,
        logit_bias={"5": -100, "6": 1.5},
        ignore_eos=True,
        min_tokens=3,
        seed=11,
        logprobs=4,
        stop_token_ids=[9],
    )
    params = server.engine.params[-1]
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.5, 0.9, 7, 0.1)
    assert (params.presence_penalty, params.frequency_penalty, params.repetition_penalty) == (0.2, -0.3, 1.2)
    assert params.logit_bias == {5: -100.0, 6: 1.5} and params.ignore_eos and params.min_tokens == 3
    assert (params.seed, params.logprobs, params.stop_token_ids, params.max_tokens) == (11, 4, (9,), 8)
    complete(client)
    assert server.engine.params[-1].temperature == 1.0 and server.engine.params[-1].seed is None


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"suffix": "x"}, "suffix", "not supported here"),
        ({"max_tokns": 4}, "max_tokns", "not supported here"),
        ({"best_of": 3}, "best_of", "must equal n"),
        ({"echo": True, "logprobs": 1}, "echo", "not supported"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": "8"}, "max_tokens", "valid integer"),
        ({"max_tokens": True}, "max_tokens", "valid integer"),
        ({"temperature": -1}, "temperature", "greater than or equal to 0"),
        ({"temperature": 3}, "temperature", "less than or equal to 2"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"n": 17}, "n", "at most 16"),
        ({"prompt": ["a"] * 9, "n": 2}, "n", "at most 16"),
        ({"logprobs": 21}, "logprobs", "less than or equal to 20"),
        ({"prompt": []}, "prompt", "at least 1 item"),
        ({"prompt": [5000]}, "prompt", "0 to 399; got 5000"),
        ({"prompt": {"a": 1}}, "prompt", "valid"),
        ({"prompt": "x " * 3100}, "prompt", "tokens; the limit is 3000"),
        ({"stop": ""}, "stop", "at least 1 character"),
        ({"stop": ["a"] * 17}, "stop", "at most 16 items"),
        ({"logit_bias": {"x": 1}}, "logit_bias.x", "match pattern"),
        ({"logit_bias": {"5": 101}}, "logit_bias", "-100 to 100"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "needs 'stream'"),
        ({"stream": True, "stream_options": {"foo": 1}}, "stream_options.foo", "not supported here"),
        ({"min_tokens": 9}, "min_tokens", "min_tokens must be at most max_tokens"),
        ({"stop_token_ids": [400]}, "stop_token_ids", "0 to 399; got 400"),
        ({"logit_bias": {"400": 1}}, "logit_bias", "0 to 399; got 400"),
        ({"store": True}, "store", "must be false"),
        ({"store": 0}, "store", "valid boolean"),
        ({"seed": 1.5}, "seed", "valid integer"),
        ({"model": 5}, "model", "valid string"),
    ],
    ids=str,
)
def test_refusals(client: httpx2.Client, fields: dict[str, Any], param: str | None, message: str) -> None:
    error = refusal(client, **fields)
    assert message in error["message"] and error["param"] == param and error["type"] == "invalid_request_error"


def test_what_says_nothing_is_accepted(server: RunningServer, client: httpx2.Client) -> None:
    complete(client, no_such_field=None, top_k=-1, best_of=1, suffix="", logprobs=False, use_beam_search=False)
    assert server.engine.params[-1].logprobs is None and server.engine.params[-1].top_k == 0
    assert refusal(client, use_beam_search=1)["param"] == "use_beam_search"


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("logit_bias", {str(idx): 0 for idx in range(4097)}, "at most 4096"),
        ("stop_token_ids", [5] * 1025, "at most 1024"),
    ],
    ids=["logit_bias", "stop_token_ids"],
)
def test_more_ids_than_allowed(client: httpx2.Client, field: str, value: Any, message: str) -> None:
    error = refusal(client, **{field: value})
    assert message in error["message"] and error["param"] == field


def test_more_than_fits_is_cut_to_the_room(server: RunningServer, client: httpx2.Client) -> None:
    """The context has 3000 places, and the last token needs none; the server of these tests allows 256 tokens."""
    ids = [10] * 2988
    for asked, given in ((12, 12), (13, 13), (14, 13), (32_000, 13)):
        answer = complete(client, prompt=ids, max_tokens=asked, ignore_eos=True)
        assert answer["usage"]["completion_tokens"] == given and answer["choices"][0]["finish_reason"] == "length"
    complete(client, prompt=ids[:5], max_tokens=32_000)
    assert server.engine.params[-1].max_tokens == 256
    assert refusal(client, prompt=[10] * 3001)["code"] == "context_length_exceeded"


def test_unknown_model(client: httpx2.Client) -> None:
    error = refusal(client, 404, model="gpt-9")
    assert error["code"] == "model_not_found" and "'fake'" in error["message"]


def test_a_refused_stream_is_told_by_its_status(client: httpx2.Client) -> None:
    assert refusal(client, stream=True, prompt=[5000])["param"] == "prompt"


def test_what_the_engine_refuses(server: RunningServer, client: httpx2.Client) -> None:
    server.engine.script = lambda prompt, params: (_ for _ in ()).throw(ValueError("engine: too special"))
    assert refusal(client)["message"] == "engine: too special"
    assert refusal(client, stream=True)["message"] == "engine: too special"
