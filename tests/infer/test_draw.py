"""Answers drawn for many conversations are those drawn one by one."""

from pathlib import Path

import pytest

from puna.infer.config import EngineConfig
from puna.infer.draw import draw_answers
from puna.infer.load import load_engine
from puna.infer.sampling import SamplingParams
from puna.runtime.errors import InputError
from puna.tokenizer.chat import render_chat

CPU = EngineConfig(device="cpu", num_threads=1)


def test_answers_stand_by_prompt_temperature_and_sample(base_model: Path) -> None:
    engine = load_engine(base_model, CPU)
    prompts = [[{"role": "user", "content": f"What is {n}?"}] for n in range(3)]
    sampling = SamplingParams(max_tokens=60)
    drawn = draw_answers(engine, prompts, samples=2, temperatures=[0.5, 1.5], sampling=sampling, seed=3)
    assert [[answer.temperature for answer in own] for own in drawn] == [[0.5, 0.5, 1.5, 1.5]] * 3
    everything = [answer for own in drawn for answer in own]
    assert len({answer.ids for answer in everything}) > 6, "they differ"
    for answer in everything:
        assert answer.text == engine.tokenizer.decode(list(answer.ids), skip_special=True).strip()
        assert answer.finished == (answer.ids[-1] in engine.tokenizer.stop_ids)
        assert answer.finished or len(answer.ids) == 60
    assert {answer.finished for answer in everything} == {True, False}
    # The slow twin: one prompt alone. Answers depend on the seed and on their place, not on what runs beside them.
    ids = render_chat(engine.tokenizer, prompts[0], add_generation_prompt=True).ids
    [greedy] = engine.generate([ids], SamplingParams(max_tokens=60, temperature=0), new_text=True)
    [[alone]] = draw_answers(engine, prompts[:1], samples=1, temperatures=[0.0], sampling=sampling, seed=0)
    assert alone.ids == greedy.ids
    first = draw_answers(engine, prompts[:1], samples=2, temperatures=[0.5, 1.5], sampling=sampling, seed=3)
    assert first == drawn[:1]
    other = draw_answers(engine, prompts[:1], samples=2, temperatures=[0.5, 1.5], sampling=sampling, seed=4)
    assert other != first


def test_a_model_that_does_not_chat_is_refused(base_model: Path) -> None:
    engine = load_engine(base_model, CPU)
    engine.tokenizer.chat_template = None
    prompts = [[{"role": "user", "content": "Who?"}]]
    with pytest.raises(InputError, match="no chat template"):
        draw_answers(engine, prompts, samples=1, temperatures=[1.0], sampling=SamplingParams(), seed=0)
