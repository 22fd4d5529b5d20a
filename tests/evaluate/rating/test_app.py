"""The rating page's requests, without a browser: what they give away, what they refuse, what they keep."""

import base64
import errno
import hashlib
import json
import os
import re
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from puna.batches.preferences import STRENGTHS
from puna.evaluate.rating.app import build_app
from puna.evaluate.rating.records import RatingLog
from puna.evaluate.rating.session import Answer, Comparison, Session

PAGE = files("puna.evaluate.rating").joinpath("page.html").read_text(encoding="utf-8")


@pytest.fixture
def session(tmp_path: Path) -> Session:
    prompt = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "What is the weather?"},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "weather"}}]},
        {"role": "tool", "content": [{"sky": "clear"}], "name": "weather"},
    ]
    both = (Answer("secret-alpha", "Clear."), Answer("secret-beta", "It is clear."))
    compared = [Comparison(f"i{n}", prompt, "advice", both, shared=n < 2) for n in range(4)]
    return Session(compared, RatingLog(tmp_path / "ratings.jsonl"), raters=2, seed=0)


@pytest.fixture
def client(session: Session) -> Iterator[TestClient]:
    with TestClient(build_app(session), raise_server_exceptions=False) as client:
        yield client


def rating(item: str, **more: Any) -> dict[str, Any]:
    return {"rater": "Ann", "item": item, "verdict": 3, "seconds": 2.5, **more}


def test_nothing_that_is_sent_says_which_model_is_which(client: TestClient, session: Session) -> None:
    sent = [client.get("/")]
    for rater in ("Ann", "Bo"):
        while (reply := client.post("/next", json={"rater": rater})).json()["turn"] is not None:
            sent.append(reply)
            sent.append(client.post("/rate", json=rating(reply.json()["turn"]["item"], rater=rater)))
        sent += [reply, client.post("/undo", json={"rater": rater})]
    sent.append(client.post("/rate", json=rating("absent")))
    for reply in sent:
        everything = (reply.text + str(reply.headers)).lower()
        assert "secret" not in everything
        assert "advice" not in everything
    assert {rating.left for rating in session.log.ratings} == {"secret-alpha", "secret-beta"}, "sides change"


def test_a_turn_shows_the_whole_conversation(client: TestClient) -> None:
    state = client.post("/next", json={"rater": " Ann\u200b  \n B. "}).json()
    assert (state["rated"], state["left"]) == (0, 4)
    assert [message["role"] for message in state["turn"]["prompt"]] == ["system", "user", "assistant", "tool"]
    assert state["turn"]["prompt"][2]["content"] == '{"tool_calls": [{"function": {"name": "weather"}}]}'
    assert state["turn"]["prompt"][3]["content"] == '[{"sky": "clear"}]\n{"name": "weather"}'
    client.post("/rate", json=rating("i0", rater="Ann  B."))
    assert client.post("/next", json={"rater": "Ann B."}).json()["rated"] == 1, "the same name, however it is spaced"


def test_a_second_rating_replaces_the_first_and_undoing_takes_it_back(client: TestClient, session: Session) -> None:
    assert client.post("/rate", json=rating("i1")).json()["replaced"] is False
    second = client.post("/rate", json=rating("i1", verdict="both_bad", left_unsafe=True)).json()
    assert second["replaced"] is True
    assert second["rated"] == 1
    [kept] = session.log.ratings
    assert (kept.verdict, kept.left_unsafe, kept.right_unsafe) == ("both_bad", True, False)
    undone = client.post("/undo", json={"rater": "Ann"}).json()
    assert undone["undone"] == {"verdict": "both_bad"}
    assert undone["turn"]["item"] == client.post("/next", json={"rater": "Ann"}).json()["turn"]["item"] == "i1"
    assert client.post("/undo", json={"rater": "Ann"}).json()["undone"] is None
    assert session.log.ratings == []


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("/rate", rating("absent"), 404, "not among those to rate"),
        ("/rate", rating("i0", verdict=5), 422, "verdict is 5"),
        ("/rate", rating("i0", verdict=True), 422, "valid integer"),
        ("/rate", rating("i0", verdict="tie"), 422, "both_bad"),
        ("/rate", rating("i0", seconds=-1), 422, "greater than or equal to 0"),
        ("/rate", rating("i0", verdict=0, edited="Better."), 422, "Only a better answer can be edited"),
        ("/rate", rating("i0", edited=" Clear. "), 422, "the same as one of the answers"),
        ("/rate", rating("i0", edited="x" * 200_001), 422, "at most 200000"),
        ("/rate", rating("i0", model="secret"), 422, "Extra inputs"),
        ("/rate", rating("i0", rater="\t "), 422, "needs a name"),
        ("/next", {"rater": "x" * 61}, 422, "at most 60"),
        ("/undo", {}, 422, "Field required"),
    ],
)
def test_what_is_no_rating_is_refused(
    client: TestClient, session: Session, path: str, body: dict[str, Any], status: int, message: str
) -> None:
    reply = client.post(path, json=body)
    assert reply.status_code == status
    assert message in reply.text
    assert session.log.ratings == []


def test_a_full_disk_loses_nothing_and_is_said(
    client: TestClient, session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.post("/rate", json=rating("i0"))
    before = (tmp_path / "ratings.jsonl").read_bytes()
    written = []

    def full(file: int, data: bytes) -> int:
        if written:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(data)
        return write(file, data[:10])

    write = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        reply = client.post("/rate", json=rating("i1"))
    assert reply.status_code == 507
    assert "No space left on device" in reply.json()["detail"]
    assert (tmp_path / "ratings.jsonl").read_bytes() == before
    assert [rating.item for rating in session.log.ratings] == ["i0"]
    assert client.post("/rate", json=rating("i1")).json()["rated"] == 2


def test_the_page_runs_its_own_script_and_no_other(client: TestClient) -> None:
    reply = client.get("/")
    assert reply.text == PAGE
    policy = reply.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    for tag in ("script", "style"):
        [body] = re.findall(rf"<{tag}>(.*?)</{tag}>", PAGE, re.S)
        digest = base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert not re.search(r"https?:|<link|\bsrc=|@import|url\(|innerHTML|insertAdjacentHTML|document\.write", PAGE)


def test_the_page_knows_the_strengths() -> None:
    [listed] = re.findall(r"const STRENGTHS = (\[.*?\]);", PAGE)
    assert tuple(json.loads(listed)) == STRENGTHS
