"""`puna align collect`: a person in a real browser, what is written, and what is learnt from it."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from queue import Queue
from typing import Any

import httpx
import pytest

from puna.align.collect import CollectConfig, to_preference_row
from puna.align.collect import main as collect
from puna.align.reward import RewardConfig
from puna.align.reward import main as train_reward
from puna.batches.preferences import STRENGTHS, to_preference
from puna.batches.tables import Row
from puna.config import load_config
from puna.evaluate.rating.records import Rating, RatingLog
from puna.runtime.errors import InputError
from puna.runtime.files import only_process, read_jsonl, write_jsonl
from puna.runtime.listen import listen
from puna.runtime.manifest import Manifest

NASTY = "<b>hay</b> <img src=x onerror=\"document.title='owned'\"> & <script>document.title='owned'</script>"
CODE = "So:\n\n```python\ndef eat(hay):\n    return hay[::-1]\n```\nand `eat` it."


def find_browser() -> str:
    pytest.importorskip("playwright")
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    return found or pytest.skip("there is no Chromium")


@pytest.fixture
def answers(tmp_path: Path) -> Path:
    def row(prompt: Any, one: str, other: str) -> dict[str, Any]:
        both = [{"model": "secret-alpha", "text": one}, {"model": "secret-beta", "text": other}]
        return {"prompt": prompt, "category": "advice", "answers": both}

    talk = [("user", "Where do llamas live?"), ("assistant", "in Peru"), ("user", "And what do they eat?")]
    rows = [
        row([{"role": role, "content": content} for role, content in talk], NASTY, CODE),
        row("介绍一下羊驼。", "羊驼是温顺的动物。", "一种动物。"),
        row("What is 2?", "a llama", "a city"),
        row("What is 3?", "a bad llama", "a good city"),
        row("What is 4?", "the same", "the same "),
    ]
    write_jsonl(tmp_path / "answers.jsonl", rows)
    return tmp_path / "answers.jsonl"


def test_a_person_rates_in_a_browser_and_a_reward_model_learns_from_it(
    answers: Path, base_model: Path, tmp_path: Path
) -> None:
    browser_path = find_browser()
    from playwright.sync_api import Page, sync_playwright

    def sent(page: Page, act: Callable[[], object], path: str = "rate") -> dict[str, Any]:
        with page.expect_response(f"**/{path}") as reply:
            act()
        said: dict[str, Any] = reply.value.json()
        # The page has drawn it once it counts what the server counts.
        page.locator("#count", has_text=f"{said['rated']} rated, {said['left']} to go").wait_for()
        return said

    def shown(page: Page) -> tuple[str, str]:
        left, right = (page.locator(f"#{side} .text").inner_text() for side in ("left", "right"))
        return left, right

    output = tmp_path / "out"
    command = [sys.executable, "-m", "puna.cli", "align", "collect"]
    command += ["--set", f"answers={answers}", "--set", f"output={output}", "--set", "port=0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        url = re.search(r"http://\S+", process.stdout.readline())
        assert url is not None, process.communicate()[1]
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=browser_path, args=["--no-sandbox"], timeout=120_000)
            page = browser.new_page(viewport={"width": 390, "height": 780})
            page.set_default_timeout(120_000)
            problems: list[str] = []
            page.on("pageerror", lambda error: problems.append(str(error)))
            page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
            page.goto(url[0])
            page.get_by_label("Your name").fill("Ann")
            page.get_by_role("button", name="Begin").click()
            page.locator("#comparison").wait_for()

            # By keyboard: 2 is "A is better".
            page.keyboard.press("2")
            assert page.get_by_role("status").inner_text() == "A is better"
            first = shown(page)
            sent(page, lambda: page.keyboard.press("Enter"))
            second = shown(page)
            assert second != first
            # Taken back, it is shown again, on the same sides, also after loading the page anew.
            sent(page, lambda: page.keyboard.press("u"), "undo")
            assert shown(page) == first
            sent(page, page.reload, "next")
            assert shown(page) == first
            # By mouse, and the better answer made better still; letters typed there are no commands.
            page.locator("#scale label").nth(8).click()
            page.get_by_role("button", name="Edit the better").click()
            page.get_by_label("Answer B, edited").fill("")
            page.keyboard.type("but 2 u")
            page.get_by_label("unsafe").first.check()
            sent(page, page.get_by_role("button", name="Send").click)
            assert shown(page) == second
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "scrolls sideways on a phone"

            found = [first]
            for keys in (["b"], ["ArrowLeft", "ArrowLeft"], ["t", "5"]):
                found.append(shown(page))
                for key in keys:
                    page.keyboard.press(key)
                said = sent(page, lambda: page.keyboard.press("Enter"))
                if said["turn"] and NASTY in (said["turn"]["left"], said["turn"]["right"]):
                    check_texts(page)
            assert said["turn"] is None
            page.locator("#finished").wait_for()
            assert "You have rated 4" in page.locator("#thanks").inner_text()
            assert "secret" not in page.content()
            assert any(CODE.partition("\n")[0] in text for pair in found for text in pair)
            assert problems == []
            process.send_signal(signal.SIGINT)
            messages = process.communicate(timeout=120)[1]
            assert process.returncode == 0, messages
            page.keyboard.press("u")
            page.get_by_role("alert", name="").filter(has_text="cannot be reached; nothing was sent").wait_for()
            browser.close()
    finally:
        process.kill()
        process.communicate()
    assert "Wrote 3 preferences" in messages

    log = RatingLog(output / "ratings.jsonl")
    assert [rating.verdict for rating in log.ratings] == [4, "both_bad", -2, 1]
    assert all(rating.rater == "Ann" and rating.seconds > 0 for rating in log.ratings)
    assert log.ratings[0].left_unsafe
    first_row, *rest = read_jsonl(output / "preferences.jsonl")
    assert (first_row["edited"], first_row["unsafe"]) == ("but 2 u", ["rejected"])
    assert [row["strength"] for row in rest] == ["slightly better", "negligibly better"]
    assert [len(list(read_jsonl(output / f"{kind}.jsonl"))) for kind in ("ties", "both_bad")] == [0, 1]
    manifest = Manifest.read(output)
    assert manifest.results["num_prompts_left_out"] == 1
    assert manifest.inputs.keys() == {str(answers)}

    settings = [f"model={base_model}", f"preferences={output / 'preferences.jsonl'}", f"output={tmp_path / 'reward'}"]
    training = {"steps": 2, "batch_rows": 1, "micro_batch_rows": 1, "row_length": 128, "device": "cpu"}
    training |= {"num_threads": 1, "tensorboard": "false", "schedule.warmup_steps": 1}
    settings += ["leave_out=true", *(f"train.{key}={value}" for key, value in training.items())]
    train_reward(load_config(RewardConfig, None, settings))
    assert (tmp_path / "reward" / "model" / "model.safetensors").exists()


def check_texts(page: Any) -> None:
    """What a model wrote is text, whatever it looks like; what stands between fences is code."""
    assert page.title() == "Which answer is better?"
    assert page.locator(".text b, .text img, .text script").count() == 0
    written = {page.locator(f"#{side} .text").inner_text(): side for side in ("left", "right")}
    assert NASTY in written
    code = page.locator(f"#{'right' if written[NASTY] == 'left' else 'left'} .text")
    assert code.locator("pre").inner_text() == "def eat(hay):\n    return hay[::-1]"
    assert code.locator("code").inner_text() == "eat"
    assert "monospace" in code.locator("pre").evaluate("node => getComputedStyle(node).fontFamily")
    assert page.locator("#prompt .message").count() == 3


def test_drawing_stopping_and_going_on(base_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_jsonl(tmp_path / "prompts.jsonl", ({"prompt": f"What is {n}?", "category": "qa"} for n in range(3)))
    output = tmp_path / "out"
    settings = [f"models.now={base_model}", f"models.before={base_model}", f"prompts={tmp_path / 'prompts.jsonl'}"]
    settings += [f"output={output}", "samples=10", "sampling.max_tokens=100", "port=0", "overlap=1", "raters=2"]
    settings += ["engine.device=cpu", "engine.num_threads=1"]

    def rate(raters: str, *more: str) -> None:
        """Run the command while these raters rate a comparison each, and then somebody presses Ctrl-C."""
        address: Queue[str] = Queue()
        monkeypatch.setattr("puna.evaluate.rating.ask._announce", lambda found, _: address.put(found))

        def person() -> None:
            try:
                with httpx.Client(base_url=address.get(timeout=100), timeout=60) as client:
                    for rater in raters:
                        item = client.post("/next", json={"rater": rater}).json()["turn"]["item"]
                        verdict = 0 if rater == "t" else -3
                        client.post("/rate", json={"rater": rater, "item": item, "verdict": verdict, "seconds": 1.0})
            finally:
                os.kill(os.getpid(), signal.SIGINT)

        thread = threading.Thread(target=person)
        if raters:
            thread.start()
        try:
            collect(load_config(CollectConfig, None, [*settings, *more]))
        finally:
            if raters:
                thread.join(timeout=100)

    with pytest.raises(KeyboardInterrupt):
        rate("tst")
    drawn = list(read_jsonl(output / "answers" / "answers.jsonl"))
    rows = list(read_jsonl(output / "preferences.jsonl"))
    assert len(rows) == 1
    assert len(list(read_jsonl(output / "ties.jsonl"))) == 2
    for row in rows:
        assert to_preference(Row("", row)).strength == 2
        assert set(row["models"].values()) == {"now", "before"}
        assert row["category"] == "qa"
        of_prompt = next(each["answers"] for each in drawn if each["prompt"] == row["prompt"])
        for place, model in row["models"].items():
            assert {"model": model, "text": row[place]} in of_prompt
    assert Manifest.read(output).results["agreement_num_comparisons"] == 1

    rate("sts")
    assert Manifest.read(output).results["num_comparisons_finished"] == 3
    assert len(list(read_jsonl(output / "preferences.jsonl"))) == 3
    rate("")  # returns at once: nothing is left
    assert list(read_jsonl(output / "answers" / "answers.jsonl")) == drawn
    with pytest.raises(InputError, match=r"made with other settings \(samples changed\)"):
        rate("", "samples=7")


@pytest.mark.parametrize("verdict", [-4, -1, 1, 2, 3])
def test_a_rating_becomes_the_preference_that_it_is(verdict: int) -> None:
    prompt = [{"role": "user", "content": "Who?"}]
    rating = Rating(
        item="i", prompt=prompt, category="", left="one", right="two", left_answer="a llama", right_answer="a city",
        verdict=verdict, rater="Ann", seconds=1.0, left_unsafe=True,
    )  # fmt: skip
    row = to_preference_row(rating)
    preference = to_preference(Row("", json.loads(json.dumps(row))))
    assert preference.prompt == prompt
    texts = [answer[0]["content"] for answer in preference.answers]
    assert texts == (["a llama", "a city"] if verdict < 0 else ["a city", "a llama"])
    assert preference.strength == abs(verdict) - 1
    assert row["strength"] == STRENGTHS[abs(verdict) - 1]
    assert row["models"]["chosen" if verdict < 0 else "rejected"] == "one"
    assert row["unsafe"] == ["chosen" if verdict < 0 else "rejected"]
    edited = to_preference(Row("", to_preference_row(replace(rating, edited="a good llama"))))
    assert [answer[0]["content"] for answer in edited.answers] == ["a good llama", *texts]
    assert edited.strength is None, "nobody said how much better the edited answer is"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ([], "set one of models and answers"),
        (["models.a=x"], "prompts says what"),
        (["answers={answers}", "prompts=x"], "leave prompts and max_prompts out"),
        (["answers={answers}", "overlap=1.5"], "overlap between 0 and 1"),
        (["answers={answers}", "port=70000"], "port is 70000"),
        (["models.a=x", "prompts=y", "temperatures=[0.0]"], "each above 0"),
        (["models.a=x", "prompts=y", "sampling.temperature=0.5"], "Set temperatures instead"),
        (["answers={prompts}"], "line 1 does not read .*: 'answers'"),
        (["answers={alike}"], "nothing to compare"),
    ],
)
def test_what_cannot_be_rated_is_explained(answers: Path, tmp_path: Path, settings: list[str], message: str) -> None:
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "Who?"}])
    write_jsonl(tmp_path / "alike.jsonl", [{"prompt": "Who?", "answers": [{"model": "a", "text": "I"}] * 2}])
    named = {"answers": answers, "prompts": tmp_path / "prompts.jsonl", "alike": tmp_path / "alike.jsonl"}
    given = [f"output={tmp_path / 'out'}", "port=0", *(setting.format(**named) for setting in settings)]
    with pytest.raises(InputError, match=message):
        collect(load_config(CollectConfig, None, given))
    assert not (tmp_path / "out").exists()


def test_a_taken_port_or_folder_is_said_before_anybody_rates(answers: Path, tmp_path: Path) -> None:
    given = [f"output={tmp_path / 'out'}"]
    with closing(listen("127.0.0.1", 0)) as taken:
        port = f"port={taken.getsockname()[1]}"
        with pytest.raises(InputError, match=r"Cannot listen on 127\.0\.0\.1"):
            collect(load_config(CollectConfig, None, [*given, port, "models.a=absent", "prompts=absent"]))
    with only_process(tmp_path / "out", "rating session"), pytest.raises(InputError, match="Another rating session"):
        collect(load_config(CollectConfig, None, [*given, "port=0", f"answers={answers}"]))
