"""Questions on a web page: one HTML form, served on this machine."""

from __future__ import annotations

import hmac
import secrets
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs

from textgym.display import html_text
from textgym.rewards.human.questions import Question, Questions, key_of

LONGEST_FORM = 10_000
"""Bytes of a form at most."""
PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>Ratings</title>{refresh}
<style>
body {{ font: 1.1em sans-serif; max-width: 50em; margin: 2em auto; padding: 0 1em }}
pre {{ white-space: pre-wrap; background: #f4f4f4; padding: 1em }}
button {{ font-size: 1em; padding: .4em 1em }}
</style></head><body>
{content}
</body></html>
"""


class RatingServer(ThreadingHTTPServer):
    """Serves the page until `close`, in a thread of its own.

    The page has a secret that an answer must repeat, so that other web pages in the rater's browser cannot answer.

    Args:
        questions: The questions.
        port: Port on this machine; 0 for any that is free.
    """

    daemon_threads = True

    def __init__(self, questions: Questions, port: int) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.questions, self.secret = questions, secrets.token_urlsafe(16)
        self.hosts = tuple(f"{name}:{self.server_port}" for name in ("127.0.0.1", "localhost"))
        self.address = f"http://{self.hosts[0]}/"
        threading.Thread(target=self.serve_forever, daemon=True, name="ratings").start()

    def close(self) -> None:
        """Stop serving."""
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: RatingServer

    def do_GET(self) -> None:
        """Show the first question that waits."""
        if self._from_here():
            question = self.server.questions.next()
            page = _waiting() if question is None else _page(question, self.server.questions, self.server.secret)
            self._send(200, page)

    def do_POST(self) -> None:
        """Take an answer, and go back to the page."""
        if not self._from_here():
            return
        length = self.headers.get("Content-Length", "")
        body = self.rfile.read(min(int(length), LONGEST_FORM)) if length.isdecimal() else b""
        given = {name: values[0] for name, values in parse_qs(body.decode(errors="replace")).items()}
        question = self.server.questions.asked.get(given.get("question", ""))
        if question is None or not hmac.compare_digest(given.get("secret", "").encode(), self.server.secret.encode()):
            self._send(403, "This form is not of the current run: open the page again.")
            return
        try:
            self.server.questions.answer(question, float(given["answer"]) if given.get("answer") else None)
        except ValueError as error:
            self._send(400, html_text(str(error)))
            return
        self.send_response(303)
        self.send_header("Location", "/")
        self.end_headers()

    def _from_here(self) -> bool:
        """Return whether the address is this machine's own; a name that leads here could be somebody else's page."""
        right = self.headers.get("Host") in self.server.hosts
        if not right:
            self._send(403, f"Open {self.server.hosts[0]}.")
        return right

    def _send(self, status: int, page: str) -> None:
        body = page.encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Security-Policy", "default-src 'none'; style-src 'unsafe-inline'")
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Write nothing into the terminal of the run."""


def _waiting() -> str:
    return PAGE.format(refresh='<meta http-equiv="refresh" content="2">', content="<p>No text waits for a rating.</p>")


def _page(question: Question, questions: Questions, secret: str) -> str:
    texts = [f"<pre>{html_text(text)}</pre>" for text in question.texts]
    if len(texts) == 2:
        first, second = ("0", "1") if question.turned else ("1", "0")
        shown = "".join(texts[::-1] if question.turned else texts)
        asked, buttons = "Which is better?", {"The upper one": first, "They are alike": "0.5", "The lower one": second}
    else:
        shown, asked = texts[0], "How good is it?"
        buttons = {f"{value:g}": f"{value:g}" for value in questions.possible}
    choices = "".join(f'<button name="answer" value="{v}">{name}</button> ' for name, v in buttons.items())
    form = (
        f'<form method="post"><input type="hidden" name="secret" value="{secret}">'
        f'<input type="hidden" name="question" value="{key_of(question)}">'
        f'{choices}<button name="answer" value="">Skip</button></form>'
    )
    waiting = f"<p>{len(questions.waiting)} to go</p>"
    content = f"<pre>{html_text(question.prompt)}</pre>{shown}<p>{asked}</p>{form}{waiting}"
    return PAGE.format(refresh="", content=content)
