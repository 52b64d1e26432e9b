"""Log-probabilities in the three shapes that clients know: completions', chat's, and vLLM's for prompts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from multigraft.core.request import Logprob, TokenLogprobs
from multigraft.engine.client import EngineClient

# JSON has no -inf, which a token outside the sampled set has.
LOWEST = -9999.0


class TokenNames:
    """The text of single tokens, looked up once each."""

    def __init__(self, client: EngineClient, *, as_ids: bool):
        """as_ids: "token_id:123" in place of the text."""
        self.client = client
        self.as_ids = as_ids
        self.known: dict[int, str] = {}

    def learn(self, entries: Iterable[TokenLogprobs | None], token_ids: Iterable[int] = ()) -> None:
        """Look up all tokens of these entries in one call."""
        wanted = set(token_ids)
        for entry in entries:
            if entry is not None:
                wanted.add(entry.token.token_id)
                wanted.update(top.token_id for top in entry.top)
        new = sorted(wanted - self.known.keys())
        if not new:
            return
        texts = [f"token_id:{i}" for i in new] if self.as_ids else self.client.token_texts(new)
        self.known.update(zip(new, texts, strict=True))

    def __getitem__(self, token_id: int) -> str:
        return self.known[token_id]


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST)


def completion_logprobs(
    token_ids: Sequence[int], entries: Sequence[TokenLogprobs | None], names: TokenNames, offset: int
) -> dict[str, Any]:
    """OpenAI's completions shape. An entry is None for the first token of an echoed prompt.

    offset: characters of this choice's text before these tokens. top_logprobs has the sampled token as well.
    """
    names.learn(entries, token_ids)
    tokens: list[str] = []
    values: list[float | None] = []
    tops: list[dict[str, float] | None] = []
    offsets: list[int] = []
    for token_id, entry in zip(token_ids, entries, strict=True):
        text = names[token_id]
        tokens.append(text)
        offsets.append(offset)
        offset += len(text)
        values.append(None if entry is None else _finite(entry.token.logprob))
        if entry is None:
            tops.append(None)
            continue
        top: dict[str, float] = {}
        for candidate in (*entry.top, entry.token):
            top.setdefault(names[candidate.token_id], _finite(candidate.logprob))  # of equal texts the likelier
        tops.append(top)
    return {"tokens": tokens, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}


def chat_logprobs(entries: Sequence[TokenLogprobs], names: TokenNames) -> dict[str, Any]:
    """OpenAI's chat shape."""
    names.learn(entries)

    def show(item: Logprob) -> dict[str, Any]:
        text = names[item.token_id]
        return {"token": text, "logprob": _finite(item.logprob), "bytes": list(text.encode(errors="replace"))}

    content = [show(entry.token) | {"top_logprobs": [show(top) for top in entry.top]} for entry in entries]
    return {"content": content, "refusal": None}


def prompt_logprobs(entries: Sequence[TokenLogprobs | None], names: TokenNames) -> list[dict[str, Any] | None]:
    """vLLM's shape: for each prompt token but the first, its candidates by token id."""
    names.learn(entries)

    def show(item: Logprob) -> dict[str, Any]:
        return {"logprob": _finite(item.logprob), "rank": item.rank, "decoded_token": names[item.token_id]}

    return [
        None if entry is None else {str(item.token_id): show(item) for item in (entry.token, *entry.top)}
        for entry in entries
    ]
