# SPDX-License-Identifier: Apache-2.0
"""Prompts in, text out.

Row C10 of docs/faults.md.
"""

from __future__ import annotations

import pathlib
import shutil
from collections.abc import Callable

import pytest

import megamoe
from megamoe.cli import main
from megamoe.engine.sampling_params import SamplingParams
from megamoe.models import BUNDLED, load
from megamoe.text.llm import LLM, Completion

from ..fakes import BOS, EOS, FakeConfig, FakeModel, next_after


@pytest.fixture
def llm(tokenizer_directory: pathlib.Path) -> LLM:
    return LLM.from_model(FakeModel(tokenizer_directory))


def writer(llm: LLM, content: bytes) -> Callable[[list[int]], int]:
    """Return a rule that writes `content` byte by byte after a prompt of BOS alone, and then EOS."""
    by_byte = {llm.tokenizer.token_bytes(token_id): token_id for token_id in range(3, 259)}
    ids = [*(by_byte[bytes([byte])] for byte in content), EOS]
    return lambda fed: ids[len(fed) - 1]


# known answers


def test_it_is_the_public_class() -> None:
    assert megamoe.LLM is LLM


def test_prompts_begin_with_bos(llm: LLM) -> None:
    assert llm.encode("def") == [BOS, *llm.tokenizer.encode("def")]
    assert llm.encode("") == [BOS]


def test_a_model_without_bos_gets_none(tokenizer_directory: pathlib.Path) -> None:
    llm = LLM.from_model(FakeModel(tokenizer_directory, config=FakeConfig(bos_token_id=None)))
    assert llm.encode("a") == llm.tokenizer.encode("a")
    with pytest.raises(ValueError, match="got no token ids"):
        llm.generate("")


def test_completion(llm: LLM, tokenizer_directory: pathlib.Path) -> None:
    model = FakeModel(tokenizer_directory, rule=writer(llm, "héllo 😀".encode()))
    completion = LLM.from_model(model).generate("", SamplingParams(max_tokens=50))[0]
    assert completion.text == "héllo 😀"
    assert completion.prompt_tokens == 1 and completion.finish_reason == "stop"
    assert completion.token_ids[-1] == EOS and len(completion.token_ids) == len("héllo 😀".encode()) + 1


def test_text_that_ends_inside_a_character(llm: LLM, tokenizer_directory: pathlib.Path) -> None:
    model = FakeModel(tokenizer_directory, rule=writer(llm, "a😀".encode()))
    completion = LLM.from_model(model).generate("", SamplingParams(max_tokens=3))[0]
    assert completion.text == "a\ufffd" and completion.finish_reason == "length"


def test_no_tokens(llm: LLM) -> None:
    completion = llm.generate("ab", SamplingParams(max_tokens=0))[0]
    assert completion == Completion("", (), prompt_tokens=len(llm.encode("ab")), finish_reason="length")


# properties


def test_stream_is_generate_in_pieces(llm: LLM) -> None:
    params = SamplingParams(max_tokens=40)
    pieces = list(llm.stream(llm.encode("def"), params))
    completion = llm.generate("def", params)[0]
    assert "".join(piece.text for piece in pieces) == completion.text
    assert tuple(piece.token_id for piece in pieces) == completion.token_ids
    assert [piece.finish_reason for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert completion.text == llm.tokenizer.decode(completion.token_ids)


def test_text_appears_as_soon_as_it_is_certain(llm: LLM, tokenizer_directory: pathlib.Path) -> None:
    model = FakeModel(tokenizer_directory, rule=writer(llm, b"abc"))
    pieces = LLM.from_model(model).stream([BOS], SamplingParams(max_tokens=9))
    assert next(pieces).text == "a" and model.steps == [1]
    assert next(pieces).text == "b" and model.steps == [1, 1]


def test_a_completion_does_not_depend_on_the_other_prompts(llm: LLM, seed: int) -> None:
    params = SamplingParams(max_tokens=8, temperature=0.7, seed=seed)
    prompts = ["", "def", "class A:"]
    together = llm.generate(prompts, params)
    assert together == [llm.generate(prompt, params)[0] for prompt in prompts]
    assert len({completion.token_ids for completion in together}) == 3


def test_generate_is_greedy_by_default(llm: LLM) -> None:
    ids = llm.encode("x")
    expected = []
    for _ in range(SamplingParams().max_tokens):
        if len(ids) > 64:
            break
        ids.append(next_after(ids))
        expected.append(ids[-1])
    assert llm.generate(["x"])[0].token_ids == tuple(expected)


def test_no_prompts(llm: LLM) -> None:
    assert llm.generate([]) == []


# refusals


def test_every_prompt_is_checked_before_the_first_token(llm: LLM) -> None:
    with pytest.raises(ValueError, match=r"prompt: got \d+ tokens; the context .* is 64"):
        llm.generate(["fine", "much too long " * 40])
    with pytest.raises(ValueError, match="not valid Unicode"):
        llm.generate(["fine", "\udc80"])
    assert isinstance(llm.model, FakeModel) and llm.model.steps == []


def test_tokenizer_of_another_model(tokenizer_directory: pathlib.Path) -> None:
    with pytest.raises(ValueError, match=r"has ids up to \d+, but model 'fake' has 100 ids"):
        LLM.from_model(FakeModel(tokenizer_directory, config=FakeConfig(vocab_size=100)))


def test_a_missing_tokenizer_is_told_before_the_weights_are_read(tmp_path, monkeypatch, capsys):
    directory = tmp_path / "model"
    shutil.copytree(BUNDLED["tiny"], directory)
    (directory / "tokenizer.json").unlink()
    monkeypatch.setattr(load, "examine", None)  # would raise TypeError
    with pytest.raises(ValueError, match=r"tokenizer: no file .*tokenizer.json. Copy tokenizer.json from the release"):
        LLM(directory)
    for command in (["generate", "--prompt", "x"], ["serve"]):
        assert main([*command, "--model", str(directory)]) == 2
        assert "Copy tokenizer.json from the release" in capsys.readouterr().err
    (directory / "convert-manifest.jsonl").write_text("{}\n")  # a conversion copies its tokenizer last
    assert main(["generate", "--prompt", "x", "--model", str(directory)]) == 2
    assert "a conversion that was stopped" in capsys.readouterr().err


def test_logprobs_are_returned_where_they_were_asked_for(llm: LLM) -> None:
    plain, asked = llm.generate(
        ["def", "def"], [SamplingParams(max_tokens=5), SamplingParams(max_tokens=5, logprobs=2)]
    )
    assert plain.logprobs is None and plain.text == asked.text
    assert asked.logprobs is not None and [one.token_id for one in asked.logprobs] == list(asked.token_ids)
    assert all(len(one.top) == 2 and one.top[0] == (one.token_id, one.logprob) for one in asked.logprobs)
    assert llm.generate("def", SamplingParams(max_tokens=0, logprobs=0))[0].logprobs == ()
    pieces = list(llm.stream(llm.encode("def"), SamplingParams(max_tokens=5, logprobs=2)))
    assert [piece.logprobs for piece in pieces] == list(asked.logprobs)


def test_prompts_may_be_token_ids(llm: LLM) -> None:
    params = SamplingParams(max_tokens=6)
    ids = llm.encode("def")
    by_text = llm.generate("def", params)
    for prompts in (ids, tuple(ids), [ids]):
        assert llm.generate(prompts, params) == by_text
    assert llm.generate([ids, "def", ids], params) == by_text * 3
    for bad in ([ids, 3], [[1.0]], [True], b"def", [b"def"], [None]):
        with pytest.raises(TypeError, match="a prompt must be text or a sequence of token ids"):
            llm.generate(bad, params)  # type: ignore[arg-type]


def test_every_prompt_may_have_its_own_parameters(llm: LLM) -> None:
    each = [SamplingParams(max_tokens=3), SamplingParams(max_tokens=6, temperature=1.0, seed=1)]
    together = llm.generate(["def", "class"], each)
    assert together == [llm.generate(prompt, one)[0] for prompt, one in zip(["def", "class"], each, strict=True)]
    assert [len(one.token_ids) for one in together] == [3, 6]
    with pytest.raises(ValueError, match="2 sampling parameters for 1 prompts"):
        llm.generate("def", each)
    assert llm.generate([], []) == []
