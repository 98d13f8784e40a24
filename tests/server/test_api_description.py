# SPDX-License-Identifier: Apache-2.0
"""Schemathesis: requests generated from /openapi.json, valid ones and ones that break a rule, against the server.

Checked are: no 5xx, only described statuses and content types, answers that fit their schemas, and that what the
schema forbids is refused. Not checked is that what the schema allows is accepted: rules between fields ("top_logprobs
needs logprobs"), limits of the server and token counts cannot be said in a JSON schema.
"""

from __future__ import annotations

import collections
import json
import pathlib
from typing import Any

import hypothesis
import pytest
import schemathesis
from schemathesis.checks import CHECKS, load_all_checks
from schemathesis.config import SchemathesisConfig

from .fakes import FakeEngine, echo_of_prompt, make_state, running

TOO_LARGE = 413  # of generated bodies some are larger than the limit, whatever else is wrong with them


def run(directory: pathlib.Path, max_examples: int) -> collections.Counter[tuple[str, int]]:
    """Try every operation with generated requests and return how often it answered with which status."""
    statuses: collections.Counter[tuple[str, int]] = collections.Counter()
    engine = FakeEngine(echo_of_prompt)
    allowed = ["2xx", "400", "401", "403", "404", "405", "406", str(TOO_LARGE), "415", "422", "428", "429"]
    config = SchemathesisConfig.from_dict({"checks": {"negative_data_rejection": {"expected-statuses": allowed[1:]}}})
    load_all_checks()
    excluded = CHECKS.get_by_names(["positive_data_acceptance"])
    with running(make_state(directory, engine), engine) as server:
        schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json", config=config)
        for result in schema.get_all_operations():
            _try(result.ok(), max_examples, excluded, statuses)
        server.wait_until(lambda: not engine.has_work())
    return statuses


def _try(operation: Any, max_examples: int, excluded: Any, statuses: collections.Counter[tuple[str, int]]) -> None:
    modes = hypothesis.strategies.sampled_from(list(schemathesis.GenerationMode))

    @hypothesis.settings(max_examples=max_examples, suppress_health_check=list(hypothesis.HealthCheck))
    @hypothesis.given(data=hypothesis.strategies.data())
    def check(data: Any) -> None:
        case = data.draw(operation.as_strategy(generation_mode=data.draw(modes)))
        model = case.body.get("model") if isinstance(case.body, dict) else None
        if isinstance(model, str) and 1 <= len(model) <= 512:
            case.body["model"] = "fake"  # else nearly everything is a 404
        response = case.call_and_validate(excluded_checks=excluded, timeout=20)
        statuses[operation.path, response.status_code] += 1

    check()


def assert_all_was_tried(statuses: collections.Counter[tuple[str, int]], at_least: int) -> None:
    paths = {path for path, _ in statuses}
    assert paths == {
        "/v1/chat/completions", "/v1/completions", "/v1/models", "/v1/models/{model}", "/health", "/ready", "/metrics",
    }  # fmt: skip
    for path in ("/v1/chat/completions", "/v1/completions"):
        assert statuses[path, 400] >= at_least, statuses
    assert statuses["/v1/completions", 200] >= at_least, statuses


def test_some_requests(v4_directory: pathlib.Path) -> None:
    assert_all_was_tried(run(v4_directory, 30), 2)


@pytest.mark.slow
def test_many_requests(v4_directory: pathlib.Path) -> None:
    assert_all_was_tried(run(v4_directory, 400), 20)


def test_a_wrong_description_is_found(v4_directory: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = json.dumps
    monkeypatch.setattr(
        "megamoe.server.errors.json.dumps",
        lambda content, **options: original({**content, "surprise": 1} if "usage" in content else content, **options),
    )
    with pytest.raises(BaseException, match="surprise|Response violates schema|not expected"):
        run(v4_directory, 60)
