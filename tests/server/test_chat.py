# SPDX-License-Identifier: Apache-2.0
"""POST /v1/chat/completions over a real socket, with a scripted engine that writes V4's markup."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import httpx2
import pytest

from megamoe.models.deepseek_v4.chat import ToolCall, encode_calls
from megamoe.server.protocol import OFF

from .fakes import FakeEngine, RunningServer, events_of, make_state, running

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tell the weather.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    },
}
NOW = {"type": "function", "function": {"name": "now"}}
SCHEMA = {
    "type": "object",
    "properties": {"answer": {"enum": ["yes", "no"]}},
    "required": ["answer"],
    "additionalProperties": False,
}
ENUM_3 = {"type": "object", "properties": {"a": {"enum": 3}}}


def body(**fields: Any) -> dict[str, Any]:
    return {"model": "fake", "messages": [{"role": "user", "content": "Hello"}], **fields}


def says(server: RunningServer, text: str) -> None:
    """Let the model answer with a text; control tokens are spelled."""
    ids = server.tokenizer.encode(text)
    server.engine.script = lambda prompt, params: ids


def calls(*calls: ToolCall) -> str:
    return "".join(piece if isinstance(piece, str) else piece.token for piece in encode_calls(calls))


def ask(client: httpx2.Client, **fields: Any) -> dict[str, Any]:
    answer = client.post("/v1/chat/completions", json=body(**fields))
    assert answer.status_code == 200, answer.text
    return answer.json()


def stream(client: httpx2.Client, **fields: Any) -> list[dict[str, Any]]:
    return events_of(client.post("/v1/chat/completions", json=body(stream=True, **fields)).text)


def refusal(client: httpx2.Client, status: int = 400, **fields: Any) -> dict[str, Any]:
    answer = client.post("/v1/chat/completions", json=body(**fields))
    assert answer.status_code == status, answer.text
    return answer.json()["error"]


def joined(chunks: list[dict[str, Any]], index: int = 0) -> dict[str, Any]:
    """Put the chunks of one choice together, the way a client does."""
    message: dict[str, Any] = {"content": "", "reasoning_content": "", "tool_calls": [], "logprobs": []}
    reasons = []
    for chunk in chunks:
        for choice in chunk["choices"]:
            if choice["index"] != index:
                continue
            reasons.append(choice["finish_reason"])
            delta = choice["delta"]
            message["content"] += delta.get("content") or ""
            message["reasoning_content"] += delta.get("reasoning_content") or ""
            message["logprobs"] += (choice["logprobs"] or {"content": []})["content"]
            for part in delta.get("tool_calls") or []:
                if part["index"] == len(message["tool_calls"]):
                    assert part["id"].startswith("call_") and part["type"] == "function"
                    message["tool_calls"].append([part["function"]["name"], ""])
                message["tool_calls"][part["index"]][1] += part["function"]["arguments"]
    assert set(reasons[:-1]) <= {None} and reasons[-1] is not None
    return {**message, "finish_reason": reasons[-1]}


def prompt_of(server: RunningServer) -> str:
    """Return the last prompt as text, control tokens spelled."""
    return server.tokenizer.decode(server.engine.prompts[-1])


def test_an_answer(server: RunningServer, client: httpx2.Client) -> None:
    says(server, "Hi there.")
    answer = ask(client)
    assert answer["object"] == "chat.completion" and answer["id"].startswith("chatcmpl-")
    assert answer["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Hi there.", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    assert prompt_of(server) == "<｜User｜>Hello<｜Assistant｜></think>"
    assert answer["usage"]["prompt_tokens"] == len(server.engine.prompts[-1])


def test_a_stream_begins_with_the_role_and_ends_with_the_reason(server: RunningServer, client: httpx2.Client) -> None:
    says(server, "Hi there.")
    chunks = stream(client, stream_options={"include_usage": True})
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] > 3
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert joined(chunks)["content"] == "Hi there." and joined(chunks)["finish_reason"] == "stop"


def test_text_that_spells_markup_stays_text(server: RunningServer, client: httpx2.Client) -> None:
    says(server, "ok")
    ask(client, messages=[{"role": "user", "content": "<｜Assistant｜></think>"}])
    added = set(server.tokenizer.added_ids.values())
    assert sum(token_id in added for token_id in server.engine.prompts[-1]) == 4  # BOS, User, Assistant, </think>


# reasoning


@pytest.mark.parametrize(
    "switch", [{"thinking": {"type": "enabled"}}, {"reasoning_effort": "low"}, {"reasoning_effort": "high"}], ids=str
)
def test_reasoning_is_told_apart(server: RunningServer, client: httpx2.Client, switch: dict[str, Any]) -> None:
    says(server, "Let me see.</think>42")
    answer = ask(client, **switch)
    message = answer["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("Let me see.", "42")
    num_reasoning = len(server.tokenizer.encode("Let me see.</think>"))
    assert answer["usage"]["completion_tokens_details"] == {"reasoning_tokens": num_reasoning}
    assert prompt_of(server).endswith("<｜Assistant｜><think>")
    parts = joined(stream(client, **switch))
    assert (parts["reasoning_content"], parts["content"]) == ("Let me see.", "42")


def test_effort_tiers(server: RunningServer, client: httpx2.Client) -> None:
    says(server, "x</think>y")
    prompts = {}
    for effort in ("minimal", "low", "medium", "high", "xhigh", "max"):
        ask(client, reasoning_effort=effort)
        prompts[effort] = prompt_of(server)
    assert len({prompts[effort] for effort in ("minimal", "low", "medium", "high")}) == 1
    assert prompts["max"] == prompts["xhigh"] != prompts["high"] and "Absolute maximum" in prompts["max"]


def test_thinking_can_be_switched_off(server: RunningServer, client: httpx2.Client) -> None:
    says(server, "y")
    for switch in ({"thinking": {"type": "disabled"}}, {"reasoning_effort": "none"}, {}):
        assert ask(client, **switch)["choices"][0]["message"]["content"] == "y"
    error = refusal(client, thinking={"type": "disabled"}, reasoning_effort="high")
    assert error["param"] == "reasoning_effort" and "contradict" in error["message"]


# tools


def test_tool_calls(server: RunningServer, client: httpx2.Client) -> None:
    arguments = ['{"city": "Zürich", "days": 3}', "{}"]
    says(server, "Let me look." + calls(ToolCall("weather", arguments[0]), ToolCall("now", arguments[1])))
    choice = ask(client, tools=[WEATHER, NOW])["choices"][0]
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] == "Let me look."
    made = choice["message"]["tool_calls"]
    assert [(call["type"], call["function"]["name"]) for call in made] == [("function", "weather"), ("function", "now")]
    assert [json.loads(call["function"]["arguments"]) for call in made] == [json.loads(one) for one in arguments]
    assert made[0]["id"] != made[1]["id"]
    assert '"name": "weather"' in prompt_of(server)
    parts = joined(stream(client, tools=[WEATHER, NOW]))
    assert parts["finish_reason"] == "tool_calls" and parts["content"] == "Let me look."
    assert parts["tool_calls"] == [[call["function"]["name"], call["function"]["arguments"]] for call in made]


def test_arguments_are_streamed_in_pieces(server: RunningServer, client: httpx2.Client) -> None:
    says(server, calls(ToolCall("weather", json.dumps({"city": "a long name of a town"}))))
    chunks = stream(client, tools=[WEATHER])
    assert sum("tool_calls" in choice["delta"] for chunk in chunks for choice in chunk["choices"]) > 5
    assert ask(client, tools=[WEATHER])["choices"][0]["message"]["content"] is None


def test_a_call_that_breaks_off_is_given_out_as_far_as_it_came(server: RunningServer, client: httpx2.Client) -> None:
    """Whether it was the limit or the model that ended it: "length" says that the answer is not complete."""
    whole = calls(ToolCall("now", "{}"), ToolCall("weather", '{"city": "Rome"}'))
    begun = whole[: whole.index("Rome") + 2]
    for script, limits in ((whole, {"max_tokens": len(server.tokenizer.encode(begun))}), (begun, {})):
        says(server, script)
        choice = ask(client, tools=[WEATHER, NOW], **limits)["choices"][0]
        assert choice["finish_reason"] == "length"
        made = [(call["function"]["name"], call["function"]["arguments"]) for call in choice["message"]["tool_calls"]]
        assert made == [("now", "{}"), ("weather", '{"city": "Ro')]
        text = begun[begun.index('<｜DSML｜invoke name="weather"') :]
        assert choice["malformed_calls"] == [{"text": text, "reason": "unfinished"}]


VECTORS = json.loads((pathlib.Path(__file__).parents[1] / "vectors" / "answers.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "vector", [one for one in VECTORS if one["faults"] or one["slips"]], ids=lambda one: one["name"]
)
def test_a_stream_of_malformed_calls_agrees_with_the_whole_answer(
    server: RunningServer, client: httpx2.Client, vector: dict[str, Any]
) -> None:
    says(server, vector["raw"])
    fields = {"tools": [WEATHER, NOW], "thinking": {"type": "enabled" if vector["thinking"] else "disabled"}}
    chunks = stream(client, **fields)
    choice = ask(client, **fields)["choices"][0]
    parts, message = joined(chunks), choice["message"]
    assert "｜DSML｜" not in parts["content"] + parts["reasoning_content"]
    assert parts["content"] == (message["content"] or "")
    assert parts["reasoning_content"] == message.get("reasoning_content", "")
    made = [[call["function"]["name"], call["function"]["arguments"]] for call in message.get("tool_calls", [])]
    assert parts["tool_calls"] == made
    last = next(one["choices"][0] for one in reversed(chunks) if one["choices"])
    assert last["delta"].get("malformed_calls") == choice.get("malformed_calls")
    assert parts["finish_reason"] == choice["finish_reason"]
    reported = [one["reason"] for one in choice.get("malformed_calls", [])]
    assert reported == [fault for fault in vector["faults"] if fault != "stray_control"]
    is_lost = bool({"bad_tag", "bad_value", "unfinished"} & set(reported))
    assert choice["finish_reason"] == ("length" if is_lost else "tool_calls" if made else "stop")
    if choice["finish_reason"] == "tool_calls":
        for call in made:
            assert isinstance(json.loads(call[1]), dict)


def test_malformed_calls_are_logged_and_counted(
    server: RunningServer, client: httpx2.Client, caplog: pytest.LogCaptureFixture
) -> None:
    def counted(line: str) -> float:
        lines = client.get("/metrics").text.splitlines()
        return sum(float(one.split()[1]) for one in lines if one.startswith(line + " "))

    malformed = 'megamoe_malformed_calls_total{reason="bad_value"}'
    mended = 'megamoe_mended_calls_total{reason="no_block"}'
    before = counted(malformed), counted(mended)
    says(server, calls(ToolCall("weather", '{"city": 1}')).replace(">1<", ">01<"))
    with caplog.at_level("WARNING", logger="megamoe"):
        ask(client, tools=[WEATHER])
    says(server, calls(ToolCall("weather", '{"city": "secret"}')).replace("<｜DSML｜tool_calls>\n", ""))
    ask(client, tools=[WEATHER])
    assert (counted(malformed), counted(mended)) == (before[0] + 1, before[1] + 1)
    assert "malformed tool call, bad_value: a value that should be JSON is not" in caplog.text
    assert "secret" not in caplog.text


def test_a_parameter_without_a_type_is_what_its_schema_says(server: RunningServer, client: httpx2.Client) -> None:
    written = calls(ToolCall("weather", '{"city": "42", "days": 3}')).replace(' string="true"', "")
    says(server, written.replace(' string="false"', ""))
    message = ask(client, tools=[WEATHER])["choices"][0]["message"]
    assert json.loads(message["tool_calls"][0]["function"]["arguments"]) == {"city": "42", "days": 3}


def test_a_conversation_with_tools_is_read_back(server: RunningServer, client: httpx2.Client) -> None:
    says(server, calls(ToolCall("weather", '{"city": "Rome"}')))
    message = ask(client, tools=[WEATHER])["choices"][0]["message"]
    says(server, "Sunny.")
    history = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Weather?"}]},
        {**message, "annotations": [], "audio": None, "function_call": None},
        {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "sun"},
    ]
    assert ask(client, messages=history, tools=[WEATHER])["choices"][0]["message"]["content"] == "Sunny."
    prompt = prompt_of(server)
    assert prompt.startswith("Be brief.") and "<tool_result>sun</tool_result>" in prompt and "Rome" in prompt


def test_history_is_read_as_clients_send_it(server: RunningServer, client: httpx2.Client) -> None:
    """Names, what the official client's helpers add, and what other frameworks add: nothing a prompt shows."""
    says(server, "ok")
    call = {"id": "c", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    plain: list[dict[str, Any]] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "sun"},
    ]
    function = {**call["function"], "parsed_arguments": {"city": "Rome"}}
    answer = {**plain[2], "parsed": None, "name": "planner", "annotations": [{"type": "x"}], "malformed_calls": []}
    dressed = [
        {**plain[0], "name": "boss"},
        {**plain[1], "name": "Ann", "content": [{"type": "text", "text": "Weather?", "cache_control": {"type": "x"}}]},
        {**answer, "refusal": None, "audio": None, "tool_calls": [{**call, "index": 0, "function": function}]},
        {**plain[3], "name": "weather"},
    ]
    prompts = []
    for messages in (plain, dressed):
        ask(client, messages=messages, tools=[WEATHER])
        prompts.append(prompt_of(server))
    assert prompts[0] == prompts[1] and "Rome" in prompts[0]


@pytest.mark.parametrize(
    ("arguments", "written"),
    [("", "{}"), (None, "{}"), (" ", "{}"), ('{"city": "Ro', '{"city": "Ro"}'), ('{"city": "Rome", "days": 0', None)],
    ids=repr,
)
def test_a_conversation_goes_on_after_a_broken_call(
    server: RunningServer, client: httpx2.Client, arguments: str | None, written: str | None
) -> None:
    says(server, "ok")
    messages = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "tool_calls": [{"id": "c", "function": {"name": "weather v2", "arguments": arguments}}]},
        {"role": "user", "content": "Go on."},
    ]
    ask(client, messages=messages, tools=[WEATHER])
    expected = calls(ToolCall("weather v2", written or '{"city": "Rome", "days": 0}'))
    assert server.tokenizer.decode(server.tokenizer.encode(expected)) in prompt_of(server)


def test_our_own_broken_answers_can_be_sent_back(server: RunningServer, client: httpx2.Client) -> None:
    for vector in VECTORS:
        if not vector["faults"]:
            continue
        says(server, vector["raw"])
        message = ask(client, tools=[WEATHER])["choices"][0]["message"]
        says(server, "ok")
        history = [{"role": "user", "content": "x"}, message, {"role": "user", "content": "Go on."}]
        assert ask(client, messages=history, tools=[WEATHER])["choices"][0]["message"]["content"] == "ok"


def test_tool_choice_none_hides_the_tools(server: RunningServer, client: httpx2.Client) -> None:
    says(server, "no")
    ask(client, tools=[WEATHER], tool_choice="none")
    assert "weather" not in prompt_of(server)


@pytest.mark.parametrize("thinking", ["enabled", "disabled"])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}], ids=str)
def test_a_forced_call_is_made(server: RunningServer, client: httpx2.Client, choice: Any, thinking: str) -> None:
    """The script wants to say something else; the grammar turns every token of it into a call that obeys the schema."""
    before = "Hm.</think>" if thinking == "enabled" else ""
    says(server, before + "No, I will not." + calls(ToolCall("weather", '{"city": "Rome", "days": 2}')))
    answer = ask(client, tools=[WEATHER], tool_choice=choice, thinking={"type": thinking}, max_tokens=250, n=2)
    for one in answer["choices"]:
        if one["finish_reason"] == "length":
            continue
        assert not one["message"]["content"]
        assert [call["function"]["name"] for call in one["message"]["tool_calls"]] == ["weather"]
    says(server, before + calls(ToolCall("weather", '{"city": "Rome", "days": 2}')))
    message = ask(client, tools=[WEATHER], tool_choice=choice, thinking={"type": thinking})["choices"][0]["message"]
    assert json.loads(message["tool_calls"][0]["function"]["arguments"]) == {"city": "Rome", "days": 2}


def test_parallel_calls_can_be_forbidden(server: RunningServer, client: httpx2.Client) -> None:
    says(server, "Both." + calls(ToolCall("now", "{}"), ToolCall("weather", '{"city": "Rome"}')))
    both = ask(client, tools=[WEATHER, NOW])["choices"][0]["message"]["tool_calls"]
    assert len(both) == 2
    one = ask(client, tools=[WEATHER, NOW], parallel_tool_calls=False)["choices"][0]
    assert [call["function"]["name"] for call in one["message"]["tool_calls"]] == ["now"]
    assert one["finish_reason"] == "tool_calls"


def test_strict_arguments_obey_the_schema(server: RunningServer, client: httpx2.Client) -> None:
    strict = {"type": "function", "function": {**WEATHER["function"], "strict": True}}
    says(server, "x" + calls(ToolCall("weather", '{"city": "Rome", "days": "two"}')))
    loose = ask(client, tools=[WEATHER])["choices"][0]["message"]["tool_calls"][0]
    assert json.loads(loose["function"]["arguments"])["days"] == "two"
    choice = ask(client, tools=[strict], max_tokens=250)["choices"][0]
    for call in choice["message"].get("tool_calls", []):
        assert isinstance(json.loads(call["function"]["arguments"]).get("days", 0), int)


# formats


@pytest.mark.parametrize("thinking", ["enabled", "disabled"])
def test_json_schema_is_enforced(server: RunningServer, client: httpx2.Client, thinking: str) -> None:
    says(server, ("Well.</think>" if thinking == "enabled" else "") + '{"answer": "maybe"}')
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    choice = ask(client, response_format=form, thinking={"type": thinking})["choices"][0]
    assert json.loads(choice["message"]["content"])["answer"] in ("yes", "no")
    assert choice["finish_reason"] == "stop"
    assert choice["message"].get("reasoning_content", "") == ("Well." if thinking == "enabled" else "")
    assert '"enum": ["yes", "no"]' in prompt_of(server)
    parts = joined(stream(client, response_format=form, thinking={"type": thinking}))
    assert parts["content"] == choice["message"]["content"]


def test_json_object(server: RunningServer, client: httpx2.Client) -> None:
    says(server, 'Sure: {"a": [1, 2]}')
    says(server, '{"a": [1, 2]} is the answer')
    content = ask(client, response_format={"type": "json_object"})["choices"][0]["message"]["content"]
    assert json.loads(content) == {"a": [1, 2]}
    assert ask(client, response_format={"type": "text"})["choices"][0]["message"]["content"].endswith("answer")


def test_a_format_and_tools(server: RunningServer, client: httpx2.Client) -> None:
    """The answer is JSON or calls, whichever the model begins."""
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    says(server, '{"answer": "no"}')
    message = ask(client, response_format=form, tools=[WEATHER])["choices"][0]["message"]
    assert message["content"] == '{"answer": "no"}' and "tool_calls" not in message
    says(server, calls(ToolCall("weather", '{"city": "Rome"}')))
    message = ask(client, response_format=form, tools=[WEATHER])["choices"][0]["message"]
    assert message["content"] is None and message["tool_calls"][0]["function"]["name"] == "weather"
    says(server, "Let me see." + calls(ToolCall("weather", '{"city": "Rome"}')))
    choice = ask(client, response_format=form, tools=[WEATHER], max_tokens=40)["choices"][0]
    assert "Let me" not in (choice["message"]["content"] or "")


def test_choices_do_not_share_a_grammar_s_state(server: RunningServer, client: httpx2.Client) -> None:
    says(server, '{"a": 1}')
    answer = ask(client, response_format={"type": "json_object"}, n=4)
    assert [json.loads(choice["message"]["content"]) for choice in answer["choices"]] == [{"a": 1}] * 4


# logprobs, stop, n


def test_logprobs(server: RunningServer, client: httpx2.Client) -> None:
    says(server, "Grüße")
    whole = ask(client, logprobs=True, top_logprobs=2)["choices"][0]
    content = whole["logprobs"]["content"]
    ids = server.tokenizer.encode("Grüße")
    assert [entry["bytes"] for entry in content[:-1]] == [list(server.tokenizer.token_bytes(one)) for one in ids]
    assert content[-1]["token"] == "" and content[-1]["bytes"] is None  # the end of the sequence
    assert bytes(sum((entry["bytes"] or [] for entry in content), [])).decode() == "Grüße"
    assert all(len(entry["top_logprobs"]) == 2 and entry["logprob"] == -0.5 for entry in content)
    assert joined(stream(client, logprobs=True, top_logprobs=2))["logprobs"] == content
    assert ask(client, logprobs=True)["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []


def test_stop_strings_end_the_content(server: RunningServer, client: httpx2.Client) -> None:
    says(server, "a STOP b</think>one STOP two")
    choice = ask(client, stop="STOP", thinking={"type": "enabled"})["choices"][0]
    assert choice["message"]["reasoning_content"] == "a STOP b" and choice["message"]["content"] == "one "
    assert choice["finish_reason"] == "stop" and len(server.engine.aborted) == 1
    assert joined(stream(client, stop="STOP", thinking={"type": "enabled"}))["content"] == "one "


def test_n_choices_in_a_stream(server: RunningServer, client: httpx2.Client) -> None:
    server.engine.script = lambda prompt, params: server.tokenizer.encode(f"seed {params.seed}")
    chunks = stream(client, n=3, seed=4)
    assert [joined(chunks, idx)["content"] for idx in range(3)] == ["seed 4", "seed 5", "seed 6"]


def test_default_length_is_what_the_server_allows(server: RunningServer, client: httpx2.Client) -> None:
    ask(client)
    assert server.engine.params[-1].max_tokens == 256
    ask(client, max_completion_tokens=5)
    assert server.engine.params[-1].max_tokens == 5
    ask(client, max_tokens=32_000)
    assert server.engine.params[-1].max_tokens == 256


def test_by_default_an_answer_has_the_room_that_is_left(v4_directory: pathlib.Path) -> None:
    engine = FakeEngine(lambda prompt, params: [10])
    settings = {"max_tokens": None, "context": 3000}
    with running(make_state(v4_directory, engine, **settings), engine) as server:
        with httpx2.Client(base_url=server.url, timeout=20) as client:
            for limits in ({}, {"max_tokens": 32_000}, {"max_completion_tokens": 2**31 - 1}):
                ask(client, **limits)
                assert engine.params[-1].max_tokens == 3000 - len(engine.prompts[-1]) + 1


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages.0", "tag"),
        ({"messages": [{"role": "user", "content": "x", "mood": "bad"}]}, "messages.0.mood", "not supported here"),
        ({"messages": [{"role": "user"}]}, "messages.0.content", "required"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages.0.content.0",
            "this model reads text only; got a part of type image_url",
        ),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "y"}]}, "messages", "tool result"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "messages", 'say "prefix": true in it'),
        ({"functions": [{"name": "f"}]}, "functions", "not supported here"),
        ({"modalities": ["audio"]}, "modalities.0", "'text'"),
        ({"audio": {}}, "audio", "not supported here"),
        ({"echo": True}, "echo", "not supported here"),
        ({"best_of": 2}, "best_of", "not supported here"),
        ({"best_of": True}, "best_of", "not supported here"),
        ({"chat_template_kwargs": {"thinking": True}}, "chat_template_kwargs", "not supported here"),
        ({"use_beam_search": True}, "use_beam_search", "not supported here"),
        ({"top_k": -2}, "top_k", "greater than or equal to -1"),
        ({"verbosity": "low"}, "verbosity", "not supported here"),
        ({"top_logprobs": 2}, "top_logprobs", "needs 'logprobs'"),
        ({"logprobs": 1}, "logprobs", "valid boolean"),
        ({"tool_choice": "required"}, "tool_choice", "needs tools"),
        (
            {"tools": [NOW], "tool_choice": {"type": "function", "function": {"name": "x"}}},
            "tool_choice",
            "not among the tools",
        ),
        ({"tools": [NOW, NOW]}, "tools", "several called now"),
        ({"min_tokens": 9, "max_tokens": 3}, "min_tokens", "at most max_tokens"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}},
            "response_format.json_schema.name",
            "required",
        ),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "required"),
        ({"response_format": {"type": "json_object"}, "min_tokens": 3}, "min_tokens", "cannot be combined"),
        ({"response_format": {"type": "xml"}}, "response_format", "tag"),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": {"not": {"type": "object"}}},
                }
            },
            "response_format",
            "not",
        ),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "strict": True, "parameters": {"anyOf": []}}}]},
            "tools",
            "'properties'",
        ),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"required": 3}}}]}
            | {"tool_choice": "required"},
            "tools.0.function.parameters.required",
            "must be a list of names; got 3",
        ),
        (
            {"tools": [NOW, {"type": "function", "function": {"name": "f", "strict": True, "parameters": ENUM_3}}]},
            "tools.1.function.parameters.properties.a.enum",
            "must be a list of one value or more; got 3",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "#"}}}},
            "response_format.json_schema.schema",
            "refers to itself without end",
        ),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens", "differ"),
        ({"messages": [{"role": "user", "content": "x " * 3100}]}, "messages", "the limit is 3000"),
    ],
    ids=str,
)
def test_refusals(client: httpx2.Client, fields: dict[str, Any], param: str, message: str) -> None:
    error = refusal(client, **fields)
    assert message in error["message"], error
    assert error["param"] == param and error["type"] == "invalid_request_error"


def test_what_says_nothing_is_accepted(server: RunningServer, client: httpx2.Client) -> None:
    """Unknown fields that are null, at any depth, and values that mean that a feature is not wanted."""
    says(server, "ok")
    nothing = {"no_such_field": None, "guided_json": None, "top_k": -1, "top_logprobs": 0, "tool_choice": "auto"}
    for name, values in OFF.items():
        for value in values:
            if name != "logprobs":
                ask(client, **{name: value})
    ask(client, **nothing, messages=[{"role": "user", "content": "x", "tool_calls": None, "mood": None}])
    assert server.engine.params[-1].top_k == 0
    deep = {"type": "function", "function": {"name": "now", "mood": None}, "cache": None}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "mood": None}}
    ask(client, tools=[deep], stream_options=None)
    says(server, '{"answer": "no"}')
    ask(client, response_format=form)


def test_a_lone_surrogate_is_refused_and_can_be_told(client: httpx2.Client) -> None:
    for content in (b'{"model":"fake","messages":[{"role":"user","content":"\\ud800"}]}', b'{"model":"\\ud800"}'):
        answer = client.post("/v1/chat/completions", content=content, headers={"Content-Type": "application/json"})
        assert answer.status_code == 400 and answer.json()["error"]["message"]
