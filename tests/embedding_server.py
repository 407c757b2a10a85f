"""An embedding server as OpenAI's, on this machine, that counts what it is asked and can misbehave."""

import base64
import json
import threading
from collections import Counter, deque
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np

from storage.probe import PROBE_TEXTS
from tests.conftest import HashTeacher

PROBES = {text[:400] for text in PROBE_TEXTS}


def tokens_of(text):
    """A word is a token."""
    return len(text.split())


class EmbeddingServer:
    """Answers `/v1/embeddings`.

    Args:
        key: The key it asks for; None for none.
        dim: Values of a vector, unless a request asks for other `dimensions`.
        most_texts: Of a request; one with more is refused.
        most_tokens: Of a text. A longer one is refused, or read to there if it `truncates`.
        by_input_type: Whether the vector of a text differs by the request's `input_type`.
        encodings: What it can send vectors as; the first of them if a request does not say.

    `misbehave` holds what is to be done instead of an answer, a function of the handler and the answer it
    would give, one for each of the next requests that do not ask for the probe texts; None for an answer.
    """

    def __init__(
        self,
        *,
        key=None,
        dim=16,
        most_texts=None,
        most_tokens=None,
        truncates=False,
        counts=True,
        by_input_type=False,
        encodings=("float", "base64"),
    ):
        self.key, self.most_texts, self.counts = key, most_texts, counts
        self.by_input_type = by_input_type
        self.most_tokens, self.truncates, self.encodings = most_tokens, truncates, encodings
        self.teacher = HashTeacher(dim)
        self.misbehave = deque()
        self.requests, self.probes, self.tokens, self.at_once, self.most_at_once = 0, 0, 0, 0, 0
        self.texts = Counter()  # answered ones, without the probe texts
        self.bodies = []
        self.lock = threading.Lock()

    def vector(self, text):
        return self.teacher.vector(text)

    def answer(self, asked):
        """Status and body."""
        texts = asked["input"]
        encoding = asked.get("encoding_format", self.encodings[0])
        if encoding not in self.encodings:
            return 400, {"error": {"message": f"Invalid value for 'encoding_format': {encoding}"}}
        if self.most_texts is not None and len(texts) > self.most_texts:
            return 422, {"error": f"batch size {len(texts)} > maximum allowed {self.most_texts}"}
        counts = [tokens_of(text) for text in texts]
        if self.most_tokens is not None:
            if max(counts) > self.most_tokens and not self.truncates:
                said = f"maximum context length is {self.most_tokens} tokens, got {max(counts)}"
                return 400, {"error": {"message": said}}
            texts = [" ".join(text.split(" ")[: self.most_tokens]) for text in texts]
            counts = [min(count, self.most_tokens) for count in counts]
        kind = f"{asked.get('input_type')}|" if self.by_input_type else ""
        vectors = [self.vector(kind + text) for text in texts]
        if "dimensions" in asked:
            vectors = [vector[: asked["dimensions"]] for vector in vectors]
        data = [
            {
                "object": "embedding",
                "index": place,
                "embedding": base64.b64encode(vector.astype("<f4")).decode()
                if encoding == "base64"
                else [float(value) for value in vector],
            }
            for place, vector in enumerate(vectors)
        ]
        usage = {"prompt_tokens": sum(counts), "total_tokens": sum(counts)}
        return 200, {"data": data, **({"usage": usage} if self.counts else {})}

    def note(self, asked):
        """Count what is answered."""
        is_probes = asked["input"][0] in PROBES
        with self.lock:
            self.probes += is_probes
            self.tokens += sum(map(tokens_of, asked["input"]))
            if not is_probes:
                self.texts.update(asked["input"])


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        server = self.server.embeddings
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.requests += 1
            server.at_once += 1
            server.most_at_once = max(server.most_at_once, server.at_once)
            server.bodies.append(asked)
            is_probes = asked["input"][0] in PROBES
            misdeed = server.misbehave.popleft() if server.misbehave and not is_probes else None
        try:
            if server.key and self.headers["Authorization"] != f"Bearer {server.key}":
                said = f"Incorrect API key provided: {self.headers['Authorization']}."
                self.send(401, {"error": {"message": said, "code": "invalid_api_key"}})
            elif self.path.partition("?")[0] != "/v1/embeddings":
                self.send(404, {"detail": "Not Found"})
            else:
                status, reply = server.answer(asked)
                if status == 200 and (misdeed is None or getattr(misdeed, "counts", False)):
                    server.note(asked)
                if misdeed is None:
                    self.send(status, reply)
                else:
                    misdeed(self, reply)
        finally:
            with server.lock:
                server.at_once -= 1

    def send(self, status, reply, headers=()):
        body = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
        self.send_response(status)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@contextmanager
def running(server):
    """Yields the address of the server, to be written into `embed.api.url`."""
    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    http.embeddings = server
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{http.server_address[1]}/v1"
    finally:
        http.shutdown()
        http.server_close()
        thread.join()


def refuses(status, body=None, **headers):
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda handler, _: handler.send(status, body or {"error": {"message": "busy"}}, named)


def cuts(handler, reply):
    """Closes the connection in the middle of an answer."""
    body = json.dumps(reply).encode()
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body[: len(body) // 2])
    handler.wfile.flush()
    handler.close_connection = True


def sends(change):
    """An answer that `change` has changed."""
    return lambda handler, reply: handler.send(200, change(reply))


def with_vector(reply, place, vector):
    entries = [dict(entry) for entry in reply["data"]]
    entries[place]["embedding"] = vector
    return reply | {"data": entries}


def reversed_order(reply):
    return reply | {"data": reply["data"][::-1]}


def without_one(reply):
    return reply | {"data": reply["data"][:-1]}


def floats(reply):
    """The vectors of an answer in base64 as lists."""
    entries = [
        entry | {"embedding": np.frombuffer(base64.b64decode(entry["embedding"]), "<f4").tolist()}
        for entry in reply["data"]
    ]
    return reply | {"data": entries}
