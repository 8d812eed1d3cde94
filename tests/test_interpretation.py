"""Latents explained by another language model: what is asked, how answers are scored, and what a server may do wrong.

The server is a small one on this machine that speaks OpenAI's chat completions.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from monitor.cli.explain import main
from monitor.evaluation.latents.explorer import Explorer
from monitor.http.explorer_handle import ExplorerHandle
from monitor.http.service import make_app, start_service
from monitor.interpretation.endpoint import Endpoint, EndpointError
from monitor.interpretation.prompts import Example, explanation_prompt, read_explanation, read_list
from monitor.interpretation.scoring import balanced_accuracy, interpret
from producer.common.metrics import new_registry
from tests.small_reading import WORDS, read_run, small_model

TOKEN = "a-token-of-sixteen-letters"
FIRING = [Example([" we", " import", f" {name}"], [0.0, 10.0, 0.0]) for name in "abcdef"]
SILENT = [Example([" we", " return", f" {name}"], [0.0, 0.0, 0.0]) for name in "abcdef"]

Answer = Callable[[str], Any]


class Server:
    """Answers prompts by a function: a text, or (status, body) as they are; keeps what it was asked."""

    def __init__(self) -> None:
        self.answer: Answer = understanding
        self.requests: list[tuple[str, dict[str, Any], str]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append((self.path, body, self.headers.get("Authorization", "")))
                answer = outer.answer(body["messages"][0]["content"])
                if isinstance(answer, str):
                    answer = 200, json.dumps({"choices": [{"message": {"role": "assistant", "content": answer}}]})
                status, text = answer
                self.send_response(status)
                self.send_header("Content-Length", str(len(text.encode())))
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_: object) -> None: ...

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()


def understanding(prompt: str) -> str:
    """A model that has understood: the latent fires on " import"."""
    if "Answer with one phrase" in prompt:
        return '"the keyword import"\nbecause of Python'
    right = "<< import>>" if "tokens between << and >> those" in prompt else "import"
    texts = re.findall(r"^\d+\. (.*)$", prompt, re.MULTILINE)
    return f"Here: {[int(right in text) for text in texts]}"


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


def endpoint(server: Server) -> Endpoint:
    return Endpoint(server.url, "small", key="secret", pause_seconds=0.01)


def test_an_explanation_that_predicts_scores_one(server: Server):
    """On texts that the explainer has not seen; the request is the one that OpenAI's servers take."""
    answer = interpret(endpoint(server), endpoint(server), FIRING, SILENT)
    assert (answer.explanation, answer.detection, answer.fuzzing) == ("the keyword import", 1.0, 1.0)
    assert (answer.scored_texts, answer.unread_answers) == (3 + 6, 0)
    path, body, authorization = server.requests[0]
    assert path == "/v1/chat/completions" and authorization == "Bearer secret"
    assert body["model"] == "small" and body["temperature"] == 0 and "<< import>>" in body["messages"][0]["content"]
    explained, scored = server.requests[0][1]["messages"][0]["content"], server.requests[1][1]["messages"][0]["content"]
    assert (
        "we<< import>> a" in explained
        and "we import a" not in scored
        and "we import b" in scored + str(server.requests[2])
    )


def test_a_model_that_always_says_yes_scores_a_half(server: Server):
    """Balanced accuracy: right where yes is right, wrong where no is."""
    server.answer = lambda prompt: (
        "x" if "one phrase" in prompt else str([1] * len(re.findall(r"^\d+\. ", prompt, re.MULTILINE)))
    )
    answer = interpret(endpoint(server), endpoint(server), FIRING, SILENT)
    assert (answer.detection, answer.fuzzing) == (0.5, 0.5)


def test_answers_that_are_no_list_are_counted(server: Server):
    """And give no score rather than a wrong one."""
    server.answer = lambda prompt: "import" if "one phrase" in prompt else "I cannot say."
    answer = interpret(endpoint(server), endpoint(server), FIRING, SILENT)
    assert answer.detection is None and answer.fuzzing is None and answer.unread_answers == 3


def test_answers_are_read():
    """The last list of the right length; the first line without its quotes."""
    assert read_list("[1, 2] so [1, 0,1]", 3) == [True, False, True]
    assert read_list("[1,0]", 3) is None and read_list("", 1) is None
    assert read_explanation("\n “a word”\nmore") == "a word" and read_explanation(" \n") == ""
    assert balanced_accuracy([(True, True), (True, True), (True, False), (False, False)]) == 0.75
    assert balanced_accuracy([(True, True)]) is None


def test_weak_tokens_are_not_marked():
    """Those under a third of the strongest in the text; lines stay one line of the prompt."""
    example = Example([" a", " b\n", " c"], [1.0, 10.0, 5.0])
    assert example.marked() == " a<< b\n>><< c>>"
    assert "1.  a<< b⏎>><< c>>\n\n" in explanation_prompt([example])


def test_a_latent_that_hardly_fires_is_not_explained(server: Server):
    """Without text to score on, nothing is asked."""
    with pytest.raises(ValueError, match="fires in 1 texts; at least 2"):
        interpret(endpoint(server), endpoint(server), FIRING[:1], SILENT)
    assert server.requests == []


def test_a_busy_server_is_asked_again(server: Server):
    """Twice too many requests, then an answer; a refusal that stays is told after a few tries."""
    answers = iter([(429, "slow down"), (503, "later"), "done"])
    server.answer = lambda prompt: next(answers)
    assert endpoint(server).ask("x") == "done"
    server.answer = lambda prompt: (500, "broken")
    with pytest.raises(EndpointError, match="answers 500: broken"):
        endpoint(server).ask("x")
    assert len(server.requests) == 3 + 4


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ((401, "no key"), "answers 401: no key"),
        ((200, "[]"), "OpenAI-compatible"),
        ((200, '{"choices": []}'), "OpenAI-"),
    ],
)
def test_a_server_that_cannot_be_used_is_told(server: Server, answer: tuple[int, str], words: str):
    """At once: asking again would not help."""
    server.answer = lambda prompt: answer
    with pytest.raises(EndpointError, match=words):
        endpoint(server).ask("x")
    assert len(server.requests) == 1


@pytest.fixture(scope="module")
def explorer(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Explorer]:
    folder = tmp_path_factory.mktemp("interpretation")
    return folder / "run", read_run(folder, small_model())


def test_the_command_explains_latents_of_a_run(
    explorer: tuple[Path, Explorer], server: Server, capsys: pytest.CaptureFixture[str], monkeypatch
):
    """One JSON line each, kept as notes where asked; a silent latent is told, and the others go on."""
    app = make_app(explorer[0], new_registry(), token=TOKEN, handle=ExplorerHandle(explorer[1]))
    port, close = start_service(app, "127.0.0.1", 0, lambda: False)
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    silent = WORDS.index(" socket")
    command = [f"http://127.0.0.1:{port}", "--token", TOKEN, "--sae", "planted", "--latents", f"{silent},0"]
    assert main([*command, "--endpoint", server.url, "--model", "small", "--save"]) == 1
    output = capsys.readouterr()
    assert f"planted {silent}: the latent fires in 0 texts" in output.err
    line = json.loads(output.out)
    assert (line["latent"], line["explanation"], line["fuzzing"]) == (0, "the keyword import", 1.0)
    assert line["detection"] > 0.9  # a text that begins with `import` holds another token
    note = json.loads((explorer[0] / "notes.json").read_text())["notes"]["planted"]["0"]
    assert note["label"] == "the keyword import" and "fuzzing 1.00" in note["note"]
    close()


def test_wrong_usage_is_told(capsys: pytest.CaptureFixture[str]):
    """A server must be named: nothing is sent anywhere otherwise."""
    for arguments in (["http://127.0.0.1:1", "--sae", "a", "--latents", "1", "--model", "m"], ["x", "--latents", "a"]):
        with pytest.raises(SystemExit) as error:
            main(arguments)
        assert error.value.code == 2
    assert "--endpoint" in capsys.readouterr().err
