"""A server of chat completions in a thread of this process."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace


@contextmanager
def chat_server() -> Iterator[SimpleNamespace]:
    """Serve at `url`; set `reply` and `delay` (seconds), then read the requests in `requests`.

    `reply`: status, headers and content of every response; or all bytes of the response.
    `requests`: (path, headers, body) of every request; the body of a GET is None.
    """
    state = SimpleNamespace(requests=[], reply=(200, {}, b""), delay=0.0)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            state.requests.append((self.path, self.headers, json.loads(body)))
            time.sleep(state.delay)
            if isinstance(state.reply, bytes):
                self.wfile.write(state.reply)
                return
            status, headers, content = state.reply
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(content))} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def do_GET(self):  # the client must not follow a redirect
            state.requests.append((self.path, self.headers, None))

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        state.url = f"http://127.0.0.1:{http.server_port}"
        yield state
        http.shutdown()


def chat_reply(content: str | None) -> bytes:
    """Return the body of a response with one choice."""
    message = {"role": "assistant", "content": content}
    return json.dumps({"choices": [{"message": message}]}).encode()
