"""Request bodies as they come over the wire. null means the default. Fields we do not know are ignored, but
fields that would change the result and that we do not support are refused by name."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from multigraft.core.errors import InvalidRequest
from multigraft.core.messages import check_text
from multigraft.core.region import Scope
from multigraft.core.training import MAX_SUFFIX_LEN

MAX_N = 128

# Field -> values that ask for nothing (besides null, false and empty ones). A request type that declares
# a field of these supports it.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "suffix": (),
    "echo": (),
    "best_of": (1,),
    "max_completion_tokens": (),
    "top_logprobs": (),
    "audio": (),
    "modalities": (["text"],),
    "functions": (),
    "function_call": ("none", "auto"),
    "web_search_options": (),
    "verbosity": ("medium",),
    "chat_template": (),
    "documents": (),
    "mm_processor_kwargs": (),
    "use_beam_search": (),
    "length_penalty": (1, 1.0),
    "early_stopping": (),
    "allowed_token_ids": (),
    "bad_words": (),
    "logits_processors": (),
    "truncate_prompt_tokens": (),
    "prompt_embeds": (),
    "thinking_token_budget": (),
    "kv_transfer_params": (),
    "vllm_xargs": (),
    "guided_whitespace_pattern": (),
}


class WireRequest(BaseModel):
    model_config = ConfigDict(extra="allow")

    @model_validator(mode="before")
    @classmethod
    def _null_is_default(cls, body: Any) -> Any:
        if isinstance(body, dict):
            return {name: value for name, value in body.items() if value is not None}
        return body

    @model_validator(mode="after")
    def _refuse_unsupported(self) -> WireRequest:
        for name, value in (self.model_extra or {}).items():
            if name in UNSUPPORTED and value and value not in UNSUPPORTED[name]:
                raise InvalidRequest(f"{name} is not supported, got {value!r:.100}.", param=name)
        return self


class StreamOptions(WireRequest):
    include_usage: bool = False
    continuous_usage_stats: bool = False
    """Usage so far with every event; needs include_usage."""


def _stop_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class GenerationRequest(WireRequest):
    """What completions and chat completions have in common; meanings as in core.request.SamplingParams."""

    model: str | None = None
    scope: Scope | None = None
    """On which positions the adapter acts; the default is the adapter's own."""
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int = Field(1, ge=1, le=MAX_N)
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = Field(0, le=2**31 - 1)
    min_p: float = 0.0
    seed: int | None = Field(None, ge=-(2**63), lt=2**63 - MAX_N)
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    stop: Annotated[list[str], BeforeValidator(_stop_list)] = []
    stop_token_ids: list[int] = []
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    min_tokens: int = 0
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    priority: int = 0
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: str | dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    return_token_ids: bool = False
    """Add prompt_token_ids and token_ids to the response."""
    return_tokens_as_token_ids: bool = False
    """Show tokens in log-probabilities as "token_id:123"."""

    @model_validator(mode="after")
    def _check_stream(self) -> GenerationRequest:
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("stream_options is only allowed when stream is true.", param="stream_options")
        if self.stream and self.prompt_logprobs is not None:
            raise InvalidRequest("prompt_logprobs are not available when stream is true.", param="prompt_logprobs")
        return self


def _parse_prompts(value: Any) -> list[str | list[int]]:
    """A string, strings, token ids or lists of token ids; always as a list of prompts."""
    if isinstance(value, str) or (isinstance(value, list) and value and _is_ids(value)):
        value = [value]
    if not isinstance(value, list) or not value:
        raise InvalidRequest(
            "prompt must be a string, a list of strings, a list of token ids or a list of such lists, "
            f"got {value!r:.100}.",
            param="prompt",
        )
    for prompt in value:
        if isinstance(prompt, str):
            check_text(prompt, "prompt")
        elif not (isinstance(prompt, list) and prompt and _is_ids(prompt)):
            raise InvalidRequest(
                f"Every prompt must be a string or a list of token ids, got {prompt!r:.100}.", param="prompt"
            )
    return value


def _is_ids(value: list[Any]) -> bool:
    return all(type(x) is int and x >= 0 for x in value)


class CompletionRequest(GenerationRequest):
    prompt: Annotated[list[Any], BeforeValidator(_parse_prompts)]
    """After validation: a list of strings and token id lists."""
    max_tokens: int = Field(16, ge=0)
    logprobs: int | None = None
    echo: bool = False
    best_of: int | None = None

    @model_validator(mode="after")
    def _check_completion(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of != self.n:
            raise InvalidRequest(
                f"best_of is only supported when equal to n ({self.n}), got {self.best_of}.", param="best_of"
            )
        if self.max_tokens == 0 and not self.echo:
            raise InvalidRequest("max_tokens must be at least 1 unless echo is true, got 0.", param="max_tokens")
        return self


class Message(BaseModel):
    """One chat message. Other fields (name, tool_calls, tool_call_id, ...) go to the chat template as they are."""

    model_config = ConfigDict(extra="allow")

    role: str
    content: str | list[dict[str, Any] | str] | None = None


class ChatTemplateRequest(WireRequest):
    messages: list[Message] = Field(min_length=1)
    tools: list[dict[str, Any]] = []
    """Shown to the chat template. Calls are not parsed from the output: they arrive as text in `content`."""
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] = {}

    @model_validator(mode="after")
    def _check_template(self) -> ChatTemplateRequest:
        if self.continue_final_message and self.add_generation_prompt:
            raise InvalidRequest(
                "continue_final_message needs add_generation_prompt to be false.", param="continue_final_message"
            )
        return self


class ChatRequest(GenerationRequest, ChatTemplateRequest):
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    """Goes before max_tokens, its former name."""
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=20)
    tool_choice: str | dict[str, Any] | None = None
    reasoning_effort: str | None = None
    """Given to the chat template."""

    @model_validator(mode="after")
    def _check_chat(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequest("top_logprobs needs logprobs to be true.", param="top_logprobs")
        if self.tool_choice not in (None, "auto", "none"):
            raise InvalidRequest(
                f"tool_choice must be 'auto' or 'none': tool calls cannot be forced, got {self.tool_choice!r:.100}.",
                param="tool_choice",
            )
        return self


class TokenizeRequest(ChatTemplateRequest):
    """A text or a chat."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] = []
    add_special_tokens: bool = True
    """Of a text; a chat template writes its own."""
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _check_either(self) -> TokenizeRequest:
        if (self.prompt is None) == (not self.messages):
            raise InvalidRequest("Exactly one of prompt and messages must be given.", param="prompt")
        return self


class DetokenizeRequest(WireRequest):
    model: str | None = None
    tokens: list[Annotated[int, Field(ge=0)]]


class LoadAdapterRequest(WireRequest):
    lora_name: str = ""
    lora_path: str = ""
    load_inplace: bool = False
    scope: Scope | None = None
    """On which positions it acts; the default is what its files say."""


class UnloadAdapterRequest(WireRequest):
    lora_name: str = ""


class StrictRequest(WireRequest):
    """For what is too costly to be done otherwise than meant, because of a field with another name or place."""

    @model_validator(mode="after")
    def _refuse_unknown(self) -> StrictRequest:
        for name, value in (self.model_extra or {}).items():
            known = ", ".join(type(self).model_fields)
            raise InvalidRequest(f"{name} is {value!r:.100}, but there is no such field here: {known}.", param=name)
        return self


class MethodParameters(StrictRequest):
    hyperparameters: dict[str, Any] = {}


class FineTuningMethod(StrictRequest):
    type: Literal["supervised", "dpo", "reinforcement"]
    supervised: MethodParameters = MethodParameters()
    dpo: MethodParameters = MethodParameters()
    reinforcement: dict[str, Any] = {}

    @model_validator(mode="after")
    def _check_type(self) -> FineTuningMethod:
        if self.type == "reinforcement":
            raise InvalidRequest(
                "method.type 'reinforcement' is not supported yet; it must be 'supervised' or 'dpo'.", param="method"
            )
        for name in {"supervised", "dpo", "reinforcement"} & self.model_fields_set - {self.type}:
            raise InvalidRequest(f"method.{name} is given, but method.type is {self.type!r}.", param="method")
        return self

    @property
    def hyperparameters(self) -> dict[str, Any]:
        return (self.dpo if self.type == "dpo" else self.supervised).hyperparameters


class WandbParameters(StrictRequest):
    project: str = Field(min_length=1)
    name: str | None = None
    entity: str | None = None
    tags: list[str] = []


class Integration(StrictRequest):
    type: Literal["wandb"]
    wandb: WandbParameters


FileId = Annotated[str, AfterValidator(lambda text: check_text(text, "file"))]


class FineTuningRequest(StrictRequest):
    model: str
    training_file: FileId
    validation_file: FileId | None = None
    method: FineTuningMethod = FineTuningMethod(type="supervised")
    hyperparameters: dict[str, Any] = {}
    """Its place before `method` came; of a supervised job."""
    adapter: dict[str, Any] = {}
    """Not OpenAI's: what is trained."""
    weight: float = Field(1.0, gt=0, allow_inf_nan=False)
    """Not OpenAI's: share of the training time, relative to the other jobs'."""
    seed: int | None = Field(None, ge=0, lt=2**31)
    suffix: str | None = Field(None, min_length=1, max_length=MAX_SUFFIX_LEN)
    metadata: Annotated[
        dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
    ] = {}
    integrations: list[Integration] = Field([], max_length=1)

    @model_validator(mode="after")
    def _check_hyperparameters(self) -> FineTuningRequest:
        if self.hyperparameters and self.method.hyperparameters:
            raise InvalidRequest(
                f"Give the hyperparameters once, in method.{self.method.type}.", param="hyperparameters"
            )
        return self
