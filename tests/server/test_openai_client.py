# SPDX-License-Identifier: Apache-2.0
"""The official `openai` client, as it is installed, against `megamoe serve`'s application."""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import time
from collections.abc import Iterator
from typing import Any

import openai
import pydantic
import pytest

from megamoe.models.deepseek_v4.chat import ToolCall

from .fakes import RunningServer
from .test_chat import NOW, SCHEMA, WEATHER, calls, says

MESSAGES: Any = [{"role": "user", "content": "Hello"}]


@pytest.fixture
def sdk(server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_models(sdk: openai.OpenAI) -> None:
    assert [model.id for model in sdk.models.list()] == ["fake"]
    assert sdk.models.retrieve("fake").owned_by == "megamoe"
    with pytest.raises(openai.NotFoundError, match="no model 'other'"):
        sdk.models.retrieve("other")


def test_chat(server: RunningServer, sdk: openai.OpenAI) -> None:
    says(server, "Hi there.")
    answer = sdk.chat.completions.create(model="fake", messages=MESSAGES, logprobs=True, top_logprobs=2, seed=3)
    assert answer.choices[0].message.content == "Hi there." and answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None and answer.usage.total_tokens > 5
    assert answer.usage.prompt_tokens_details is not None and answer.usage.prompt_tokens_details.cached_tokens == 3
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None and len(logprobs.content[0].top_logprobs) == 2


def test_chat_stream(server: RunningServer, sdk: openai.OpenAI) -> None:
    says(server, "Because.</think>Grüße 😀")
    stream = sdk.chat.completions.create(
        model="fake",
        messages=MESSAGES,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"thinking": {"type": "enabled"}, "top_k": 5, "min_p": 0.01},
    )
    content, reasoning, usage = "", "", None
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            content += choice.delta.content or ""
            reasoning += getattr(choice.delta, "reasoning_content", None) or ""
    assert (content, reasoning) == ("Grüße 😀", "Because.")
    assert usage is not None and usage.completion_tokens_details is not None
    assert usage.completion_tokens_details.reasoning_tokens > 0


def test_the_client_s_stream_helper(server: RunningServer, sdk: openai.OpenAI) -> None:
    """It checks on its own that events fit together, and builds the final message from them."""
    says(server, "Look: " + calls(ToolCall("weather", '{"city": "Rome"}'), ToolCall("now", "{}")))
    with sdk.chat.completions.stream(model="fake", messages=MESSAGES, tools=[WEATHER, NOW]) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion()
    assert "content.delta" in kinds and "tool_calls.function.arguments.done" in kinds
    made = final.choices[0].message.tool_calls
    assert made is not None and [call.function.name for call in made] == ["weather", "now"]
    assert json.loads(made[0].function.arguments) == {"city": "Rome"}


def test_what_the_client_s_helpers_made_can_be_sent_back(server: RunningServer, sdk: openai.OpenAI) -> None:
    """`.parse()` adds parsed, `.stream()` index and parsed_arguments; a call that broke off adds malformed_calls."""
    written = calls(ToolCall("weather", '{"city": "Rome"}'))
    says(server, written)
    strict = {"type": "function", "function": {**WEATHER["function"], "strict": True}}
    strict["function"]["parameters"] = {**WEATHER["function"]["parameters"], "additionalProperties": False}
    parsed = sdk.chat.completions.parse(model="fake", messages=MESSAGES, tools=[strict]).choices[0].message
    with sdk.chat.completions.stream(model="fake", messages=MESSAGES, tools=[WEATHER, NOW]) as stream:
        streamed = stream.get_final_completion().choices[0].message
    says(server, written[: written.index("me<")])
    broken = sdk.chat.completions.create(model="fake", messages=MESSAGES, tools=[WEATHER]).choices[0].message
    says(server, "ok")
    for message in (parsed, streamed, broken):
        for sent in (message, message.model_dump()):
            result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "sun"}
            answer = sdk.chat.completions.create(model="fake", messages=[*MESSAGES, sent, result], tools=[WEATHER])
            assert answer.choices[0].message.content == "ok"


def test_tools_and_their_results(server: RunningServer, sdk: openai.OpenAI) -> None:
    says(server, calls(ToolCall("weather", '{"city": "Rome"}')))
    first = sdk.chat.completions.create(model="fake", messages=MESSAGES, tools=[WEATHER], tool_choice="required")
    message = first.choices[0].message
    assert message.tool_calls is not None and first.choices[0].finish_reason == "tool_calls"
    says(server, "Sunny.")
    result: Any = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "sun"}
    for echoed in (message, message.model_dump()):  # both ways that programs send a message back
        history: Any = [*MESSAGES, echoed, result]
        second = sdk.chat.completions.create(model="fake", messages=history, tools=[WEATHER])
        assert second.choices[0].message.content == "Sunny."


def test_structured_output(server: RunningServer, sdk: openai.OpenAI) -> None:
    class Answer(pydantic.BaseModel):
        answer: str
        score: int

    says(server, '{"answer": "yes", "score": 7}')
    parsed = sdk.chat.completions.parse(model="fake", messages=MESSAGES, response_format=Answer)
    assert parsed.choices[0].message.parsed == Answer(answer="yes", score=7)
    form: Any = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA, "strict": True}}
    says(server, '{"answer": "perhaps"}')
    forced = sdk.chat.completions.create(model="fake", messages=MESSAGES, response_format=form)
    assert json.loads(forced.choices[0].message.content or "")["answer"] in ("yes", "no")


def test_completions(sdk: openai.OpenAI) -> None:
    whole = sdk.completions.create(model="fake", prompt=["def f(", "class"], max_tokens=9, logprobs=2, n=2)
    assert len(whole.choices) == 4 and whole.usage is not None and whole.usage.completion_tokens == 36
    stream = sdk.completions.create(model="fake", prompt="def f(", max_tokens=9, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == whole.choices[0].text


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"model": "other"}, openai.NotFoundError, "no model 'other'"),
        ({"temperature": 5.0}, openai.BadRequestError, "less than or equal to 2"),
        ({"extra_body": {"nonsense": 1}}, openai.BadRequestError, "'nonsense' is not supported here"),
        ({"stream": True, "max_tokens": -1}, openai.BadRequestError, "greater than or equal to 1"),
    ],
    ids=str,
)
def test_errors_are_the_client_s_own(
    sdk: openai.OpenAI, fields: dict[str, Any], error: type[openai.APIStatusError], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        sdk.chat.completions.create(**{"model": "fake", "messages": MESSAGES, **fields})
    assert caught.value.body is not None and {"message", "type", "param", "code"} == set(caught.value.body)  # type: ignore[call-overload]


def test_the_client_waits_and_tries_again(server: RunningServer) -> None:
    """429 with Retry-After is what the client's own retries look for."""
    says(server, "ok")
    server.engine.hold.set()
    url = f"{server.url}/v1"
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
        posts = [pool.submit(client.chat.completions.create, model="fake", messages=MESSAGES) for _ in range(13)]
        server.wait_until(lambda: any(post.done() for post in posts))
        refused = [post for post in posts if post.done()]
        error = refused[0].exception()
        assert isinstance(error, openai.RateLimitError) and error.response.headers["retry-after"] == "8"
        server.engine.hold.clear()
        assert sum(post.exception() is None for post in posts) == 12


def test_closing_a_stream_ends_the_request(server: RunningServer, sdk: openai.OpenAI) -> None:
    server.engine.script = lambda prompt, params: [10] * 10_000
    server.engine.delay_s = 0.02
    stream = sdk.chat.completions.create(model="fake", messages=MESSAGES, stream=True)
    next(iter(stream))
    stream.close()
    server.wait_until(lambda: len(server.engine.aborted) == 1)
    assert not server.engine.has_work()


def test_an_error_in_a_stream_is_raised(server: RunningServer, sdk: openai.OpenAI) -> None:
    server.engine.script = lambda prompt, params: [10] * 10_000
    server.engine.delay_s = 0.02
    with pytest.raises(openai.APIError, match="shutting down"):
        for place, _ in enumerate(sdk.chat.completions.create(model="fake", messages=MESSAGES, stream=True)):
            if place == 2:
                server.loop.call_soon_threadsafe(server.state.service.end_streams, "The server is shutting down.")


def test_many_at_once_get_their_own_answers(server: RunningServer) -> None:
    server.engine.script = lambda prompt, params: server.tokenizer.encode(f"answer {sum(prompt)} {params.seed}")

    async def ask(client: openai.AsyncOpenAI, place: int) -> tuple[str, str]:
        prompt = "x" * (place % 5 + 1)
        expected = f"answer {sum(server.state.encoder.encode(prompt))} {place}"
        for _ in range(50):
            try:
                answer = await client.completions.create(model="fake", prompt=prompt, seed=place, max_tokens=40)
                return answer.choices[0].text, expected
            except openai.RateLimitError:
                await asyncio.sleep(0.05)
        raise AssertionError("never served")

    async def all_of_them() -> list[tuple[str, str]]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(ask(client, place) for place in range(40)))

    started = time.monotonic()
    answers = asyncio.run(all_of_them())
    assert all(text == expected for text, expected in answers) and len(set(answers)) == 40
    assert time.monotonic() - started < 20
