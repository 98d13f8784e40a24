# SPDX-License-Identifier: Apache-2.0
"""The command: what it prints, its exit codes, and one line for every kind of bad input.

Most tests put a FakeModel where a checkpoint would be loaded; those marked by the `bundled` fixture run the real one.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch

import megamoe
import megamoe.text.llm
from megamoe.cli import _tokens_per_second, main
from megamoe.models.load import BUNDLED
from megamoe.text.tokenizer import Tokenizer

from .fakes import BOS, FakeConfig, FakeModel

KEYS = ["text", "token_ids", "prompt_tokens", "completion_tokens", "tokens_per_second", "recipe", "device", "model"]
STATUS = re.compile(r"\[(\d+) tokens, \d+\.\d tokens/s, recipe (\w+), device (\w+)\]\n\Z")

# The command in a process of its own, with a FakeModel that never ends; its argument is the tokenizer's directory.
FAKE_COMMAND = """
import pathlib, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever started the tests may have had it ignored
import megamoe.text.llm as llm
from megamoe.cli import main
from tests.fakes import FakeConfig, FakeModel
directory = pathlib.Path(sys.argv.pop(1))
llm.load_model = lambda *_, **__: FakeModel(directory, config=FakeConfig(max_position_embeddings=10**6))
sys.exit(main())
"""


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tokenizer_directory: pathlib.Path) -> FakeModel:
    """A FakeModel that `megamoe generate` loads whatever --model says."""
    model = FakeModel(tokenizer_directory)
    monkeypatch.setattr(megamoe.text.llm, "load_model", lambda *_, **__: model)
    return model


@pytest.fixture
def bundled(tmp_path: pathlib.Path) -> pathlib.Path:
    """A copy of the bundled model that a test may damage."""
    return pathlib.Path(shutil.copytree(BUNDLED["tiny"], tmp_path / "tiny"))


def command(
    *arguments: str | pathlib.Path, repository: pathlib.Path, stdin: bytes | None = None, **environment: str
) -> subprocess.CompletedProcess[bytes]:
    """Run Python with `arguments` in a process of its own."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=repository,
        input=stdin,
        stdin=None if stdin is not None else subprocess.DEVNULL,
        capture_output=True,
        env={**os.environ, **environment},
        timeout=120,
        check=False,
    )


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a command that must be refused and return its one line on standard error."""
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("megamoe: error: ") and captured.err.count("\n") == 1, captured.err
    return captured.err


# output


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"megamoe {megamoe.__version__}\n"


@pytest.mark.parametrize(
    "arguments", [["--help"], ["generate", "-h"], ["verify", "--help"], ["inspect", "-h"]], ids=str
)
def test_help(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 0
    assert capsys.readouterr().out.startswith("Usage: megamoe")


def test_stream(fake: FakeModel, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--prompt", "def", "--max-tokens", "7"]) == 0
    captured = capsys.readouterr()
    expected = megamoe.text.llm.LLM.from_model(fake).generate("def", megamoe.SamplingParams(max_tokens=7))[0]
    assert captured.out.startswith(expected.text)
    status = STATUS.search(captured.out)
    assert status is not None and status.groups() == ("7", "w4a16", "cpu")
    assert captured.out[: status.start()].endswith("\n") and captured.err == ""


def test_json(fake: FakeModel, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--prompt", "def", "--max-tokens", "7", "--json"]) == 0
    out = capsys.readouterr().out
    result = json.loads(out)
    expected = megamoe.text.llm.LLM.from_model(fake).generate("def", megamoe.SamplingParams(max_tokens=7))[0]
    assert list(result) == KEYS and out.count("\n") == 1
    assert result["text"] == expected.text and tuple(result["token_ids"]) == expected.token_ids
    assert result["prompt_tokens"] == expected.prompt_tokens and result["completion_tokens"] == 7
    assert result["tokens_per_second"] > 0
    assert (result["recipe"], result["device"], result["model"]) == ("w4a16", "cpu", "fake")


def test_empty_prompt_is_bos(fake: FakeModel, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--prompt", "", "--max-tokens", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["prompt_tokens"] == 1
    assert fake.fed[0] == [BOS]


def test_no_tokens(fake: FakeModel, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--prompt", "x", "--max-tokens", "0", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["text"], result["token_ids"], result["tokens_per_second"]) == ("", [], 0.0)


def test_seed(fake: FakeModel, capsys: pytest.CaptureFixture[str]) -> None:
    def draw(seed: str) -> object:
        arguments = ["--prompt", "x", "--max-tokens", "9", "--temperature", "3", "--top-p", "0.9", "--json"]
        assert main(["generate", *arguments, "--seed", seed]) == 0
        return json.loads(capsys.readouterr().out)["token_ids"]

    assert draw("1") == draw("1") != draw("2")


def test_speed_counts_the_tokens_after_the_first() -> None:
    assert _tokens_per_second([0.0]) == 0.0
    assert _tokens_per_second([0.0, 0.5]) == 2.0
    assert _tokens_per_second([0.0, 100.0, 100.25, 100.5]) == 4.0


def test_prompt_from_standard_input(repository: pathlib.Path, tokenizer_directory: pathlib.Path) -> None:
    text = "naïve 😀\r\n"
    arguments = ("generate", "--prompt", "-", "--max-tokens", "1", "--json")
    done = command("-c", FAKE_COMMAND, tokenizer_directory, *arguments, repository=repository, stdin=text.encode())
    assert done.returncode == 0, done.stderr
    tokenizer = Tokenizer(tokenizer_directory)
    assert json.loads(done.stdout)["prompt_tokens"] == 1 + len(tokenizer.encode(text))


def test_a_terminal_without_unicode(repository: pathlib.Path, tokenizer_directory: pathlib.Path) -> None:
    arguments = (tokenizer_directory, "generate", "--prompt", "x", "--max-tokens", "300")
    done = command("-c", FAKE_COMMAND, *arguments, repository=repository, PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and done.stderr == b""
    assert STATUS.search(done.stdout.decode("ascii"))


# imports


def test_help_and_bad_flags_do_not_load_torch(repository: pathlib.Path) -> None:
    code = "import sys; from megamoe.cli import main; main(sys.argv[1:]); sys.exit('torch' in sys.modules)"
    for arguments in (
        ["--help"],
        ["--version"],
        ["generate", "--nonsense"],
        ["generate", "--prompt", "x", "--seed=-1"],
    ):
        assert command("-c", code, *arguments, repository=repository).returncode == 0, arguments


def test_generating_loads_nothing_of_the_extras(repository: pathlib.Path, tokenizer_directory: pathlib.Path) -> None:
    code = FAKE_COMMAND.replace("sys.exit(main())", "main(); print(*sys.modules, file=sys.stderr)")
    arguments = ("-c", code, tokenizer_directory, "generate", "--prompt", "x", "--max-tokens", "2")
    loaded = set(command(*arguments, repository=repository).stderr.decode().split())
    assert "torch" in loaded and "megamoe.text.llm" in loaded
    assert not loaded & {"transformers", "accelerate", "safetensors", "rich", "matplotlib", "hypothesis", "pytest"}
    assert not loaded & {"fastapi", "uvicorn", "pydantic", "prometheus_client", "llguidance", "openai"}


# ends other than success


def test_reader_that_leaves(repository: pathlib.Path, tokenizer_directory: pathlib.Path) -> None:
    arguments = ["-c", FAKE_COMMAND, str(tokenizer_directory), "generate", "--prompt", "x", "--max-tokens", "1000000"]
    with subprocess.Popen(
        [sys.executable, *arguments], cwd=repository, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(60) == 141


def test_interrupt(repository: pathlib.Path, tokenizer_directory: pathlib.Path) -> None:
    arguments = ["-c", FAKE_COMMAND, str(tokenizer_directory), "generate", "--prompt", "x", "--max-tokens", "1000000"]
    with subprocess.Popen(
        [sys.executable, *arguments], cwd=repository, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        assert (process.returncode, errors) == (130, b"")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_full_disk(repository: pathlib.Path, tokenizer_directory: pathlib.Path) -> None:
    arguments = ["-c", FAKE_COMMAND, str(tokenizer_directory), "generate", "--prompt", "x", "--max-tokens", "3"]
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, *arguments], cwd=repository, stdout=full, stderr=subprocess.PIPE, check=False
        )
    assert done.returncode == 2
    assert done.stderr == b"megamoe: error: [Errno 28] No space left on device\n"


# refusals that need no model


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Missing command"),
        (["nonsense"], "No such command 'nonsense'"),
        (["--nonsense"], "No such option"),
        (["generate"], "Missing option '--prompt'"),
        (["generate", "--prompt", "x", "--nonsense"], "No such option"),
        (["generate", "--prompt", "x", "more"], "unexpected extra argument"),
        (["generate", "--prompt", "x", "--max-tokens", "-1"], "max_tokens must be 0 or more; got -1"),
        (["generate", "--prompt", "x", "--max-tokens", "1.5"], "'1.5' is not a valid integer"),
        (["generate", "--prompt", "x", "--temperature", "-1"], "temperature must be 0 (greedy) to 1e6; got -1.0"),
        (["generate", "--prompt", "x", "--temperature", "nan"], "temperature must be"),
        (["generate", "--prompt", "x", "--top-p", "0"], "top_p must be 1e-9 to 1; got 0.0"),
        (["generate", "--prompt", "x", "--seed", "-1"], "seed must be 0 or more"),
        (["generate", "--prompt", "x", "--model", "no-such-model"], "no model 'no-such-model'"),
        (["generate", "--prompt", "x", "--recipe", "fp3"], "unknown recipe 'fp3'; allowed are exact, w4a16, w4a4"),
        (["generate", "--prompt", "x", "--device", "abacus"], "unknown device 'abacus'"),
        (["verify", "--model", "no-such-model"], "'no-such-model'"),
    ],
    ids=str,
)
def test_bad_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in refusal(capsys, *arguments)


def test_absent_gpu(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "torch sees no CUDA device" in refusal(capsys, "generate", "--prompt", "x", "--device", "cuda")


def test_prompt_longer_than_the_context(
    tokenizer_directory: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = FakeModel(tokenizer_directory, config=FakeConfig(max_position_embeddings=8))
    monkeypatch.setattr(megamoe.text.llm, "load_model", lambda *_, **__: model)
    assert "the context of model 'fake' is 8 tokens" in refusal(capsys, "generate", "--prompt", "x" * 50)


def test_prompt_that_is_not_unicode(fake: FakeModel, capsys: pytest.CaptureFixture[str]) -> None:
    assert "not valid Unicode" in refusal(capsys, "generate", "--prompt", "a\udcff")


def test_standard_input_that_is_not_utf8(repository: pathlib.Path) -> None:
    done = command("-m", "megamoe.cli", "generate", "--prompt", "-", repository=repository, stdin=b"ab\xff")
    assert done.returncode == 2 and done.stdout == b""
    assert b"must be UTF-8; got byte 0xff at position 2" in done.stderr and done.stderr.count(b"\n") == 1


def test_closed_standard_input(repository: pathlib.Path) -> None:
    code = "import os, sys; os.close(0); from megamoe.cli import main; sys.exit(main())"
    done = command("-c", code, "generate", "--prompt", "-", repository=repository)
    assert done.returncode == 2 and b"Bad file descriptor" in done.stderr and done.stderr.count(b"\n") == 1


def test_an_error_of_ours_is_not_hidden(fake: FakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeModel, "run", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["generate", "--prompt", "x"])


# the bundled model


def test_bundled_model_is_reproducible(capsys: pytest.CaptureFixture[str]) -> None:
    results = []
    for _ in range(2):
        assert main(["generate", "--prompt", "def ", "--max-tokens", "12", "--json"]) == 0
        results.append(json.loads(capsys.readouterr().out))
    assert results[0]["token_ids"] == results[1]["token_ids"] and results[0]["text"] == results[1]["text"]
    assert results[0]["model"] == "tiny" and results[0]["completion_tokens"] <= 12


@pytest.mark.parametrize("recipe", ["exact", "w4a16", "w4a4"])
def test_bundled_model_in_every_recipe(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--prompt", "import ", "--max-tokens", "4", "--recipe", recipe, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["recipe"] == recipe and len(result["token_ids"]) == result["completion_tokens"]


def test_a_directory_is_a_model(bundled: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--prompt", "x", "--max-tokens", "1", "--model", str(bundled), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model"] == str(bundled)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_missing_file(bundled: pathlib.Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    (bundled / name).unlink()
    line = refusal(capsys, "generate", "--prompt", "x", "--model", str(bundled))
    assert name.removeprefix("model") in line


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("keep", [0, 7, 0.5, -1])
def test_truncated_file(bundled: pathlib.Path, name: str, keep: float, capsys: pytest.CaptureFixture[str]) -> None:
    content = (bundled / name).read_bytes()
    size = int(len(content) * keep) if isinstance(keep, float) else keep
    if name == "config.json":
        content = content.rstrip()
    (bundled / name).write_bytes(content[:size])
    refusal(capsys, "generate", "--prompt", "x", "--model", str(bundled))


def test_wrong_shapes(bundled: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(bundled / "model.safetensors")
    name = next(name for name in sorted(tensors) if tensors[name].ndim == 2)
    tensors[name] = tensors[name][:-1].contiguous()
    save_file(tensors, bundled / "model.safetensors")
    assert name in refusal(capsys, "generate", "--prompt", "x", "--model", str(bundled))


def test_nan_scale(bundled: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = bundled / "model.safetensors"
    content = bytearray(path.read_bytes())
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    name = next(n for n in sorted(header) if n != "__metadata__" and header[n]["dtype"] == "F8_E4M3")
    content[8 + length + header[name]["data_offsets"][0]] = 0x7F
    path.write_bytes(content)
    line = refusal(capsys, "generate", "--prompt", "x", "--model", str(bundled))
    assert "NaN" in line or "nan" in line
