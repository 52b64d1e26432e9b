"""From wire fields to core.request.SamplingParams."""

from __future__ import annotations

import json
import re
from typing import Any

from multigraft.core.errors import InvalidRequest
from multigraft.core.messages import check_text
from multigraft.core.request import SamplingParams, StructuredSpec

from .schemas import GenerationRequest

_SAME_NAME = (
    "n",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logit_bias",
    "stop_token_ids",
    "include_stop_str_in_output",
    "ignore_eos",
    "min_tokens",
    "skip_special_tokens",
)


def sampling_params(
    body: GenerationRequest, *, max_tokens: int | None, logprobs: int | None, prompt_logprobs: int | None
) -> SamplingParams:
    """InvalidRequest for values out of range, and for more than one constraint on the output."""
    return SamplingParams(
        **{name: getattr(body, name) for name in _SAME_NAME},
        stop=tuple(check_text(text, "stop") for text in body.stop),
        max_tokens=max_tokens,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        structured=structured_spec(body),
    )


def structured_spec(body: GenerationRequest) -> StructuredSpec | None:
    """The one constraint among response_format, structured_outputs and guided_*; None when there is none."""
    found: list[tuple[str, StructuredSpec]] = []
    if body.response_format is not None:
        spec = _response_format(body.response_format)
        if spec is not None:
            found.append(("response_format", spec))
    for kind, value in (body.structured_outputs or {}).items():
        if value is None or value is False:
            continue
        if kind not in _BUILDERS:
            raise InvalidRequest(
                f"structured_outputs.{kind} is not supported; use one of {', '.join(_BUILDERS)}.",
                param="structured_outputs",
            )
        found.append((f"structured_outputs.{kind}", _build(kind, value, "structured_outputs")))
    for kind in ("json", "regex", "choice", "grammar"):
        value = getattr(body, f"guided_{kind}")
        if value is not None:
            found.append((f"guided_{kind}", _build(kind, value, f"guided_{kind}")))

    if len(found) > 1:
        names = ", ".join(name for name, _ in found)
        raise InvalidRequest(f"Only one constraint on the output is possible, got {names}.", param=found[1][0])
    return found[0][1] if found else None


def _response_format(fmt: dict[str, Any]) -> StructuredSpec | None:
    kind = fmt.get("type")
    match kind:
        case "text":
            return None
        case "json_object":
            return StructuredSpec(json_object=True)
        case "json_schema":
            wrapper = fmt.get("json_schema")
            if not isinstance(wrapper, dict) or "schema" not in wrapper:
                raise InvalidRequest(
                    'response_format of type json_schema needs {"json_schema": {"name": ..., "schema": {...}}}.',
                    param="response_format",
                )
            return _build("json", wrapper["schema"], "response_format")
        case "regex":
            return _build("regex", fmt.get("regex"), "response_format")
        case _:
            raise InvalidRequest(
                f"response_format.type must be text, json_object, json_schema or regex, got {kind!r:.100}.",
                param="response_format",
            )


def _build(kind: str, value: Any, param: str) -> StructuredSpec:
    spec = _BUILDERS[kind](value)
    if spec is None:
        raise InvalidRequest(f"{param} has no usable {kind}: got {value!r:.100}.", param=param)
    return spec


def _json_schema(value: Any) -> StructuredSpec | None:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            return None
    return StructuredSpec(json_schema=json.dumps(value)) if isinstance(value, dict | bool) else None


def _regex(value: Any) -> StructuredSpec | None:
    return StructuredSpec(regex=value) if isinstance(value, str) and value else None


def _choice(value: Any) -> StructuredSpec | None:
    if not isinstance(value, list) or not value or not all(isinstance(text, str) and text for text in value):
        return None
    # Only what every regex dialect takes as an operator is escaped; re.escape also escapes spaces and dashes.
    alternatives = (re.sub(r"([\\.^$|?*+()\[\]{}])", r"\\\1", text) for text in value)
    return StructuredSpec(regex=f"({'|'.join(alternatives)})")


def _grammar(value: Any) -> StructuredSpec | None:
    return StructuredSpec(grammar=value) if isinstance(value, str) and value else None


def _json_object(value: Any) -> StructuredSpec | None:
    return StructuredSpec(json_object=True) if value is True else None


_BUILDERS = {"json": _json_schema, "regex": _regex, "choice": _choice, "grammar": _grammar, "json_object": _json_object}
