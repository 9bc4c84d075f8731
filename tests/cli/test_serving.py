"""`actscale-fast serving`: the folder that a server follows, and the server's own answer."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import tiny

import actscale_fast as af
from actscale_fast.cli import main


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    af.ActivScalar.for_model(tiny.llama()).save_pretrained(tmp_path / "capitals")
    return tmp_path / "capitals"


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ACTSCALE_INTERVENTIONS", str(tmp_path / "served"))
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    return tmp_path / "served"


class Server(BaseHTTPRequestHandler):
    """Answers like the routes of the plug-in: knows "good", refuses "bad"."""

    def do_GET(self) -> None:
        name = self.path.removeprefix("/v1/actscale/interventions").removeprefix("/")
        row = {"name": "good", "kind": "ActivScalar", "layers": [0, 1], "digest": "0" * 64, "requests": 7}
        everything = {"data": [row], "refused": {"bad": "a reason"}, "workers": [{"slots": 8, "slots_in_use": 1}]}
        known = {"": (200, everything), "good": (200, row), "bad": (400, {"error": {"message": "a reason"}})}
        status, content = known.get(name, (404, {"detail": "Not Found"}))
        if self.headers.get("Authorization") != "Bearer secret":
            status, content = 401, {"error": "Unauthorized"}
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(content).encode())

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def url(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def result(capsys: pytest.CaptureFixture[str], *words: object) -> dict:
    capsys.readouterr()
    assert main(["serving", *map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def failure(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    capsys.readouterr()
    assert main(["serving", *map(str, words)]) == 1
    return capsys.readouterr().err


def test_interventions_are_added_listed_and_removed(
    saved: Path, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert result(capsys, "add", saved)["name"] == "capitals"
    assert result(capsys, "add", saved, "--name", "other")["replaced"] is False
    assert "already holds 'other'" in failure(capsys, "add", saved, "--name", "other")
    assert result(capsys, "add", saved, "--name", "other", "--replace")["replaced"] is True
    listed = result(capsys, "list")["interventions"]
    assert [(row["name"], row["kind"], row["active"]) for row in listed] == [
        ("capitals", "ActivScalar", 0), ("other", "ActivScalar", 0),
    ]  # fmt: skip
    result(capsys, "remove", "capitals")
    assert "did you mean 'other'" in failure(capsys, "remove", "othr")
    assert [row["name"] for row in result(capsys, "list", "--interventions", root)["interventions"]] == ["other"]


def test_a_damaged_intervention_is_listed_with_the_reason(
    saved: Path, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result(capsys, "add", saved)
    next((root / "capitals").glob("*.safetensors")).write_bytes(b"x")
    assert main(["serving", "list"]) == 1
    assert "refused: 'capitals': " in capsys.readouterr().out


def test_the_folder_must_be_known(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("ACTSCALE_INTERVENTIONS", raising=False)
    assert "ACTSCALE_INTERVENTIONS is not set" in failure(capsys, "list")


def test_a_running_server_tells_what_it_serves(root: Path, url: str, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["serving", "list", "--url", url]) == 1, "something is refused"
    shown = capsys.readouterr().out
    assert "good" in shown
    assert "requests" in shown
    assert "refused: 'bad': a reason" in shown
    assert "worker 0: slots 8, slots in use 1" in shown


def test_what_the_server_refuses_is_not_left_in_the_folder(
    saved: Path, root: Path, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    result(capsys, "add", saved, "--name", "good", "--url", url)
    assert "answers 400: a reason" in failure(capsys, "add", saved, "--name", "bad", "--url", url)
    assert "VLLM_PLUGINS=actscale" in failure(capsys, "add", saved, "--name", "unknown", "--url", url)
    assert [path.name for path in root.iterdir()] == ["good"]


def test_addresses_and_keys_that_do_not_serve_are_errors(
    root: Path, url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "expected an address that begins with http" in failure(capsys, "list", "--url", "file:///etc/passwd")
    assert "does not answer" in failure(capsys, "list", "--url", "http://127.0.0.1:1")
    monkeypatch.setenv("VLLM_API_KEY", "wrong")
    assert "answers 401: Unauthorized" in failure(capsys, "list", "--url", url)
