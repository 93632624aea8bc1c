"""A server of ``/v1/completions`` and ``/v1/models`` over real models: PEFT adapters on a transformers base.

It answers in vLLM's form: a prompt of token ids, ``logprob_token_ids``, ``return_tokens_as_token_ids``; and
refuses what vLLM 0.33 refuses: ids without ``logprobs``, more than 128 of them, a prompt that leaves no room.

    with serve_models(base_folder, {"persona-0": adapter_folder}) as server:
        agent = load_served_agent(root, "persona", base_url=server.base_url)
        server.requests  # bodies, in the order in which they came
"""

import json
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch

Json = dict[str, Any]
BASE = "tiny-base"
MOST_IDS = 128


class Models:
    """A base with adapters, one pass at a time."""

    def __init__(self, base: Path, adapters: Mapping[str, Path]) -> None:
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
            for number, (name, folder) in enumerate(adapters.items()):
                if number == 0:
                    self._model = PeftModel.from_pretrained(self._model, folder, adapter_name=name)
                else:
                    self._model.load_adapter(folder, adapter_name=name)
        self._model.eval()
        self.names = [BASE, *adapters]
        self._has_adapters = bool(adapters)
        self._lock = threading.Lock()
        self.vocab_size: int = self._model.config.vocab_size
        self.context: int = self._model.config.max_position_embeddings

    @torch.no_grad()
    def next_log_probabilities(self, name: str, prompts: list[list[int]]) -> torch.Tensor:
        """Of every token of the vocabulary after each prompt, shape ``(n_prompts, V)``."""
        with self._lock:
            if name != BASE:
                self._model.set_adapter(name)
                return self._last(prompts)
            if not self._has_adapters:
                return self._last(prompts)
            with self._model.disable_adapter():
                return self._last(prompts)

    def _last(self, prompts: list[list[int]]) -> torch.Tensor:
        longest = max(map(len, prompts))
        tokens = torch.tensor([[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts])
        logits = self._model(input_ids=tokens, use_cache=False).logits  # what is behind a prompt changes nothing before
        last = torch.tensor([len(prompt) - 1 for prompt in prompts])
        found: torch.Tensor = logits[torch.arange(len(prompts)), last].float().log_softmax(-1)
        return found


@dataclass
class Served:
    """A running server, seen by a test.

    Args:
        port: Where it listens.
        models: What it serves.
        faults: What the next requests for completions get in place of an answer: a status, or the name of a way
            to answer wrongly (``no_ids``, ``too_few``, ``no_choices``, ``not_a_number``, ``zero``).
        faulty: The same for all requests, once ``faults`` are used up.
        merged: Models that are listed as bases of their own.
        requests: Bodies of the requests for completions.
        keys: What came as ``Authorization`` with each.
        hosts: What came as ``Host`` with each.
        n_connections: How many were opened.
        most_at_once: The most requests for completions that were under way together.
    """

    port: int
    models: Models
    faults: list[int | str] = field(default_factory=list)
    faulty: int | str | None = None
    merged: tuple[str, ...] = ()
    requests: list[Json] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    hosts: list[str] = field(default_factory=list)
    n_connections: int = 0
    most_at_once: int = 0
    _under_way: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def answer(self, path: str, body: Json | None, key: str | None, host: str) -> tuple[int, Json]:
        if path == "/v1/models":
            return 200, {"object": "list", "data": [self._card(name) for name in self.models.names]}
        if path != "/v1/completions" or body is None:
            return 404, {"detail": "Not Found"}
        with self._lock:
            self.requests.append(body)
            self.keys.append(key)
            self.hosts.append(host)
            self._under_way += 1
            self.most_at_once = max(self.most_at_once, self._under_way)
            fault = self.faults.pop(0) if self.faults else self.faulty
        try:
            return self._complete(body, fault)
        finally:
            with self._lock:
                self._under_way -= 1

    def _card(self, name: str) -> Json:
        parent = None if name in (BASE, *self.merged) else BASE
        return {"id": name, "object": "model", "owned_by": "vllm", "parent": parent}

    def _refusal(self, body: Json) -> str | None:
        """Why vLLM wouldn't take a request."""
        ids = body.get("logprob_token_ids") or []
        if ids and body.get("logprobs") is None:
            return "when using `logprob_token_ids`, `logprobs` must be set."
        if ids and body["logprobs"] != len(ids):
            return f"logprobs is {body['logprobs']}, there are {len(ids)} ids"
        if len(ids) > MOST_IDS:
            return f"{len(ids)} ids are above {MOST_IDS}"
        longest = max(map(len, body["prompt"]))
        if longest + body["max_tokens"] > self.models.context:
            return f"This model's maximum context length is {self.models.context} tokens, the prompt has {longest}"
        largest = max(max(each) for each in (*body["prompt"], ids or [0]))
        if largest >= self.models.vocab_size:
            return f"Token id {largest} is out of vocabulary"
        return None

    def _complete(self, body: Json, fault: int | str | None) -> tuple[int, Json]:
        if isinstance(fault, int):
            return fault, _error(fault, "as told")
        if body["model"] not in self.models.names:
            return 404, _error(404, f"The model `{body['model']}` does not exist.")
        refusal = self._refusal(body)
        if refusal is not None:
            return 400, _error(400, refusal)
        told = self.models.next_log_probabilities(body["model"], body["prompt"])
        choices = [_choice(index, each, body, fault) for index, each in enumerate(told)]
        if fault == "too_few":
            choices = choices[:-1]
        return 200, {"object": "text_completion", "model": body["model"]} | (
            {} if fault == "no_choices" else {"choices": choices[::-1]}
        )


def _key(token: int, body: Json) -> str:
    """What an answer calls a token: without the flag its text, by which ids can't be told apart."""
    return f"token_id:{token}" if body.get("return_tokens_as_token_ids") else f" text of {token // 2}"


def _choice(index: int, told: torch.Tensor, body: Json, fault: int | str | None) -> Json:
    drawn = int(told.argmax())
    wanted = [drawn] if fault == "no_ids" else [drawn, *body.get("logprob_token_ids", [])]
    values = {"not_a_number": float("nan"), "zero": -9999.0}
    top = {_key(token, body): values.get(str(fault), float(told[token])) for token in wanted}
    logprobs = {
        "text_offset": [0], "tokens": [_key(drawn, body)], "token_logprobs": [float(told[drawn])],
        "top_logprobs": [top],
    }  # fmt: skip
    return {"index": index, "text": "", "finish_reason": "length", "logprobs": logprobs}


def _error(status: int, message: str) -> Json:
    return {"error": {"message": message, "type": "BadRequestError", "param": None, "code": status}}


@contextmanager
def serve_models(base: Path, adapters: Mapping[str, Path]) -> Iterator[Served]:
    """Serve a base and adapters until the block ends."""
    served = Served(0, Models(base, adapters))
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(served))
    server.daemon_threads = True
    served.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield served
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _handler(served: Served) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # an answer in one piece: on a connection that stays open, the second one waits for an ACK

        def setup(self) -> None:
            served.n_connections += 1
            super().setup()

        def do_GET(self) -> None:
            self._reply(None)

        def do_POST(self) -> None:
            self._reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def _reply(self, body: Json | None) -> None:
            status, answer = served.answer(self.path, body, self.headers.get("Authorization"), self.headers["Host"])
            content = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    return Handler
