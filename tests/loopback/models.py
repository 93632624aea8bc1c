"""Chat completions and embeddings: what a model answers, and how each fault spoils it."""

import base64
import hashlib
import json
import re
import struct
import zlib
from functools import lru_cache
from math import sqrt
from typing import Any

from loopback import reflection
from loopback.options import Options

Json = dict[str, Any]
_WORD = re.compile(r"\w+")


def sha256_of(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def without_complaints(path: str, body: Json) -> Json:
    """What names a request: its path and body, of the messages only the first two."""
    return {"path": path, **body, **({"messages": body["messages"][:2]} if "messages" in body else {})}


def n_tokens(text: str) -> int:
    return max(1, len(text) // 4)


def tokens_asked(body: Json) -> int:
    texts = [message["content"] for message in body["messages"]] if "messages" in body else inputs_of(body)
    return sum(n_tokens(text) for text in texts)


def mistake_in(path: str, body: Any) -> str | None:
    """What OpenAI would refuse in a body; None if nothing."""
    if not isinstance(body, dict) or not isinstance(body.get("model"), str):
        return "you must provide a model parameter"
    if path == "/chat/completions":
        messages = body.get("messages")
        if not isinstance(messages, list) or not all(isinstance(m, dict) and "content" in m for m in messages):
            return "Missing required parameter: 'messages'."
        return None if messages else "[] is too short - 'messages'"
    inputs = inputs_of(body)
    if not inputs or not all(isinstance(text, str) and text for text in inputs):
        return "'$.input' is invalid. Please check the API reference."
    return None if len(inputs) <= 2048 else "'input' array must have at most 2048 elements"


def inputs_of(body: Json) -> list[str]:
    inputs = body.get("input", [])
    return [inputs] if isinstance(inputs, str) else inputs


def complete(path: str, body: Json, what: str, options: Options, *, cached: bool) -> Json:
    """The answer's JSON.

    Args:
        cached: Whether the first message was seen before.
    """
    if path == "/embeddings":
        return embeddings(body, what, options.dimensions)
    return chat_completion(body, what, options, cached=cached)


def chat_completion(body: Json, what: str, options: Options, *, cached: bool) -> Json:
    messages = body["messages"]
    text: str | None = spoilt(reflection.answer(messages[1]["content"] if len(messages) > 1 else ""), what, options)
    message: Json = {"role": "assistant", "content": text, "refusal": None}
    if what == "refusal":
        message |= {"content": None, "refusal": "I'm sorry, but I can't help with that."}
    asked, answered = tokens_asked(body), n_tokens(text or "")
    n_cached = n_tokens(messages[0]["content"]) // 128 * 128 if cached else 0
    return {
        "object": "chat.completion",
        "model": body["model"],
        "choices": [
            {
                "index": 0,
                "message": message,
                "finish_reason": "length" if what == "truncated" else "stop",
                "logprobs": None,
            }
        ],
        "usage": {
            "prompt_tokens": asked,
            "completion_tokens": answered,
            "total_tokens": asked + answered,
            "prompt_tokens_details": {"cached_tokens": n_cached},
        },
    }


def spoilt(answer: Json, what: str, options: Options) -> str:
    """The answer as text, as the fault leaves it."""
    if what == "wrong_json" and answer.get("memories"):
        answer = {**answer, "memories": answer["memories"][:-1]}
    elif what == "wrong_json":
        answer = {"portrait" if key == "profile" else key: value for key, value in answer.items()}
    elif what == "extra_keys":
        answer = {**answer, "notes": "nothing else"}
    elif what == "too_long":
        answer = {**answer, "profile": " ".join(["very"] * options.long_words)}
    text = json.dumps(answer, ensure_ascii=False)
    if what == "truncated":
        return text[: len(text) * 3 // 5]
    return f"Gladly! I would say that {len(text)} things matter." if what == "not_json" else text


def embeddings(body: Json, what: str, dimensions: int) -> Json:
    texts = inputs_of(body)
    vectors = [embed(text, body.get("dimensions", dimensions)) for text in texts]
    as_base64 = body.get("encoding_format") == "base64"
    data = [
        {"object": "embedding", "index": index, "embedding": in_base64(vector) if as_base64 else list(vector)}
        for index, vector in enumerate(vectors)
    ]
    n = sum(n_tokens(text) for text in texts)
    return {
        "object": "list",
        "data": data[:-1] if what in ("wrong_json", "truncated", "not_json") else data,
        "model": body["model"],
        "usage": {"prompt_tokens": n, "total_tokens": n},
    }


@lru_cache(4096)
def embed(text: str, dimensions: int) -> tuple[float, ...]:
    """A hashed bag of words of unit length."""
    vector = [0.0] * dimensions
    for word in _WORD.findall(text.lower()):
        code = zlib.crc32(word.encode())
        vector[(code >> 1) % dimensions] += 1.0 if code & 1 else -1.0
    length = sqrt(sum(value * value for value in vector))
    return tuple(value / length for value in vector) if length else (1.0, *vector[1:])


def in_base64(vector: tuple[float, ...]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
