# SPDX-License-Identifier: Apache-2.0
"""Start `megamoe serve` with the bundled model, ask it with the official openai client, and stop it again.

pip install 'megamoe[server]' openai
python examples/serve_and_ask.py
"""

from __future__ import annotations

import json
import re
import subprocess
import sys

import openai


def start() -> tuple[subprocess.Popen[str], str]:
    """Start a server on a free port and return it with its URL once it is ready."""
    command = [sys.executable, "-m", "megamoe.cli", "serve", "--model", "tiny", "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    for line in server.stdout:
        print(line, end="")
        if found := re.search(r"ready at (\S+)", line):
            return server, found[1]
    raise SystemExit("the server did not start; see above")


def ask(client: openai.OpenAI) -> None:
    """Continue a text as it is streamed, and get an answer that obeys a JSON schema."""
    print("\n--- a text, streamed")
    text = "def parse_header(line):\n"
    print(text, end="")
    for chunk in client.completions.create(
        model="tiny", prompt=text, max_tokens=64, temperature=0.6, seed=2, stream=True
    ):
        print(chunk.choices[0].text, end="", flush=True)

    print("\n\n--- an answer with a schema")
    schema = {
        "type": "object",
        "properties": {"language": {"enum": ["Python", "C", "Rust"]}, "lines": {"type": "integer", "maximum": 999}},
        "required": ["language", "lines"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "Which language is this module in, and how long is it?"}],
        response_format={"type": "json_schema", "json_schema": {"name": "module", "schema": schema}},
        max_tokens=64,
        seed=1,
    )
    print(json.loads(answer.choices[0].message.content or ""))
    print(answer.usage)


def main() -> None:
    """Serve, ask, stop."""
    server, url = start()
    try:
        with openai.OpenAI(base_url=f"{url}/v1", api_key="not needed") as client:
            ask(client)
    finally:
        server.terminate()
        print(f"--- the server ended with exit code {server.wait(60)}")


if __name__ == "__main__":
    main()
