# SPDX-License-Identifier: Apache-2.0
"""What the server costs per streamed token, without a model: CPU time of everything above the engine and of a fake one.

    python tools/server_overhead.py

32 streams of 250 tokens each, one token per event, read by a process of its own. The fake engine's step is in the
number; it does next to nothing. Prints a Markdown table.
"""

from __future__ import annotations

import asyncio
import json
import pathlib
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parent.parent
STREAMS, TOKENS = 32, 250


async def read_streams(host: str, port: int, path: str, body: bytes) -> None:
    """Open all streams and read them to their ends, which must be reached."""

    async def read_one() -> None:
        reader, writer = await asyncio.open_connection(host, port)
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        answer = await reader.read(-1)
        assert b"[DONE]" in answer, answer[:300]
        writer.close()

    await asyncio.gather(*(read_one() for _ in range(STREAMS)))


def main() -> None:
    """Measure both APIs."""
    sys.path.insert(0, str(ROOT))
    from tests.server.fakes import FakeEngine, make_state, running, write_v4_tokenizer

    print("| API | CPU per token, µs | tokens/s |\n| --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        directory = pathlib.Path(folder)
        write_v4_tokenizer(directory)
        engine = FakeEngine(lambda prompt, params: [100] * TOKENS, max_sequences=STREAMS)
        with running(make_state(directory, engine), engine) as server:
            host, port = server.url.removeprefix("http://").split(":")
            for path, prompt in (
                ("/v1/completions", {"prompt": "x"}),
                ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
            ):
                body = {"model": "fake", "max_tokens": TOKENS, "stream": True, "ignore_eos": True, **prompt}
                cpu, wall = time.process_time(), time.perf_counter()
                subprocess.run([sys.executable, __file__, host, port, path, json.dumps(body)], check=True)
                cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
                count = STREAMS * TOKENS
                print(f"| `{path}` | {cpu / count * 1e6:.0f} | {count / wall:.0f} |")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        asyncio.run(read_streams(sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4].encode()))
    else:
        main()
