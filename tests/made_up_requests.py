"""Requests that schemathesis makes up from an endpoint's OpenAPI document; each answer must be in it, and no 5xx.

Cases are drawn per operation, from what the document allows and from what it doesn't. Not checked is that all it allows
be accepted (a schema can't say that the last message must be the user's), and nothing else: the endpoint overlooks
parameters of a URL or a form that it doesn't know, as OpenAI's does.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import schemathesis
from hypothesis import HealthCheck, Phase, given, settings, strategies
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.endpoints import Served

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]


def ask_for_anything(endpoint: Served, num_cases: int, *, key: str | None = None) -> Counter[tuple[str, str, int]]:
    """Call the endpoint so often, check each answer against the document; returns what was asked and answered."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    schema = schemathesis.openapi.from_url(endpoint.url + "/openapi.json", headers=headers)
    operations = [found.ok() for found in schema.get_all_operations()]
    modes = (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
    each = [operation.as_strategy(generation_mode=mode) for operation in operations for mode in modes]
    seen: Counter[tuple[str, str, int]] = Counter()

    @settings(
        max_examples=num_cases,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=strategies.one_of(each))
    def call(case: Any) -> None:
        answer = case.call(headers=headers, timeout=30)
        seen[case.method, case.path, answer.status_code] += 1
        case.validate_response(answer, headers=headers, checks=CHECKS)

    call()
    return seen
