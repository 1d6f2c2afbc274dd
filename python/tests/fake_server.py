"""A server that speaks as vLLM does, as far as clients see: chat, tokenizer, refusals. It keeps what it was sent."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


def render(messages: list[dict], tools: list | None = None, prompted: bool = True) -> list[int]:
    """Tokens of a conversation, one a byte: each message behind its role, tools behind the first one."""
    text = ""
    for number, message in enumerate(messages):
        text += f"[{message['role']}] {message['content']}\n"
        if tools and number == 0:
            text += f"[tools] {json.dumps(tools)}\n"
    return list((text + ("[assistant] " if prompted else "")).encode())


class FakeServer(ThreadingHTTPServer):
    """Serves on a free port until `close`. `requests` has (path, headers, body) of each request but the tokenizer's."""

    daemon_threads = True

    def __init__(self, refuses: bool = False, tokenizer: int = 200):
        self.refuses, self.tokenizer = refuses, tokenizer
        self.requests: list[tuple[str, dict, dict]] = []
        self.tokenized: list[dict] = []
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def close(self) -> None:
        """Stops it; nobody listens on its port then."""
        self.shutdown()
        self.server_close()

    def said(self, number: int = -1) -> dict:
        """The hints of a request."""
        return json.loads(self.requests[number][2]["vllm_xargs"]["kvtier"])


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Any

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/tokenize":
            return self._tokenize(body)
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.server.requests.append((self.path, headers, body))
        if self.server.refuses and "vllm_xargs" in body:
            return self._answer(400, {"error": {"message": "unknown field", "type": "invalid_request_error"}})
        message = {"role": "assistant", "content": "yes"}
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        whole = {"id": "c", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}
        if not (isinstance(body, dict) and body.get("stream")):
            return self._answer(200, {**whole, "usage": usage})
        chunk = {**whole, "object": "chat.completion.chunk", "choices": [{"index": 0, "delta": message}]}
        return self._answer(200, b"data: " + json.dumps(chunk).encode() + b"\n\ndata: [DONE]\n\n")

    def _tokenize(self, body: dict) -> None:
        self.server.tokenized.append(body)
        if self.server.tokenizer != 200:
            return self._answer(self.server.tokenizer, {})
        tokens = render(body["messages"], body.get("tools"), body["add_generation_prompt"])
        self._answer(200, {"tokens": tokens, "count": len(tokens)})

    def _answer(self, status: int, body: Any) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        kind = "text/event-stream" if isinstance(body, bytes) else "application/json"
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: Any) -> None:
        """Nothing on standard error."""
