"""Every stage by its command's name. Importing this imports no stage."""

import difflib
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

from puna.runtime.errors import InputError


class Stage(NamedTuple):
    """Where a stage's configuration class and main function are."""

    module: str
    config: str
    help: str
    by_people: bool = False
    """Its output is people's work, which it goes on with itself and refuses to mix with other; never to be replaced."""


STAGES = {
    "curate": Stage("puna.curate.main", "CurateConfig", "Read raw files into clean documents."),
    "questions": Stage("puna.curate.questions", "QuestionsConfig", "Draw questions with answers from documents."),
    "reference": Stage(
        "puna.curate.filters.train_reference", "ReferenceConfig", "Learn how good text reads, for the step perplexity."
    ),
    "classifier": Stage(
        "puna.curate.filters.train_classifier", "ClassifierConfig", "Teach a linear classifier to label documents."
    ),
    "quality_head": Stage("puna.curate.quality_head", "QualityHeadConfig", "Teach a small Llama to score documents."),
    "tokenizer": Stage("puna.tokenizer.train", "TokenizerConfig", "Train a tokenizer on documents."),
    "tokenize": Stage("puna.batches.tokenize", "TokenizeConfig", "Turn documents into token shards."),
    "mix": Stage("puna.curate.mix", "MixConfig", "Rank mixtures of sources by what tiny models learn from them."),
    "extend": Stage("puna.pretrain.extend", "ExtendConfig", "Give a model new tokens or a longer context."),
    "pretrain": Stage("puna.pretrain.main", "PretrainConfig", "Train a model on token shards."),
    "average": Stage("puna.pretrain.average", "AverageConfig", "Average checkpoints or models."),
    "plan": Stage(
        "puna.pretrain.planner.main", "PlanConfig", "Find the fastest layout of a model on a cluster that fits."
    ),
    "scaling": Stage("puna.pretrain.scaling.main", "ScalingConfig", "Fit scaling laws, and say how to spend a budget."),
    "finetune": Stage("puna.finetune.main", "FinetuneConfig", "Teach a model to answer, classify, tag or find."),
    "predict": Stage("puna.finetune.predict", "PredictConfig", "Classify, tag or search new texts by a trained head."),
    "search": Stage(
        "puna.finetune.search.main", "SearchConfig", "Find the settings of a fine-tuning recipe that do best."
    ),
    "explain": Stage(
        "puna.finetune.explain.main", "ExplainConfig", "Show what an answer rests on, or how sure a text's tokens are."
    ),
    "augment": Stage(
        "puna.finetune.augment.main", "AugmentConfig", "Make more examples of a task: other words, the same labels."
    ),
    "self_train": Stage(
        "puna.finetune.unlabelled.self_training", "SelfTrainConfig", "Teach a classifier by its own sure labels, too."
    ),
    "active": Stage("puna.finetune.unlabelled.active", "ActiveConfig", "Choose the texts most worth labelling next."),
    "reward": Stage(
        "puna.align.reward", "RewardConfig", "Teach a model to say how good an answer is, from comparisons of answers."
    ),
    "reject": Stage(
        "puna.align.rejection", "RejectConfig", "Answer prompts several times, and keep what a reward model likes best."
    ),
    "distil_context": Stage(
        "puna.align.context_distillation",
        "DistilContextConfig",
        "Answer prompts under a safety preprompt, to learn to answer so without it.",
    ),
    "simulate": Stage(
        "puna.align.simulate",
        "SimulateConfig",
        "Draw answers and let a program compare them: preferences to learn from.",
    ),
    "winrate": Stage(
        "puna.align.winrate",
        "WinRateConfig",
        "Say how often a model's answers beat another's, and how far apart they are.",
    ),
    "collect": Stage(
        "puna.align.collect",
        "CollectConfig",
        "Have people compare answers in the browser: preferences to learn from.",
        True,
    ),
    "align": Stage("puna.align.main", "AlignConfig", "Teach a model what people prefer, from comparisons of answers."),
    "sums": Stage("puna.align.reinforce.sums", "SumsConfig", "Make up additions, to try reinforcement on."),
    "reinforce": Stage(
        "puna.align.reinforce.main", "ReinforceConfig", "Teach a model by rewards for answers that it draws itself."
    ),
    "evaluate": Stage("puna.evaluate.main", "EvaluateConfig", "Measure a model on held-out text and questions."),
    "compare": Stage("puna.evaluate.compare.main", "CompareConfig", "Compare models on one page."),
    "contamination": Stage(
        "puna.evaluate.contamination", "ContaminationConfig", "Look for a benchmark's questions in training text."
    ),
    "power": Stage("puna.evaluate.statistics.power", "PowerConfig", "Say how many questions show a difference."),
    "rate": Stage(
        "puna.evaluate.rating.human",
        "RateConfig",
        "Have people compare models' answers blindly, and say who is better.",
        True,
    ),
    "needle": Stage("puna.evaluate.needle", "NeedleConfig", "Hide a sentence in long texts and ask for it."),
    "bias": Stage(
        "puna.evaluate.bias.main", "BiasConfig", "Measure what changes where only the people in a sentence change."
    ),
    "compress": Stage(
        "puna.evaluate.compress", "CompressConfig", "Store weights in 8 or 4 bits, and measure the loss."
    ),
    "convert": Stage("puna.weights.convert", "ConvertConfig", "Convert between Hugging Face, Meta, GGUF, llama2.c."),
    "generate": Stage("puna.infer.generate", "GenerateConfig", "Complete prompts."),
    "chat": Stage("puna.infer.chat", "ChatConfig", "Talk to a model in the terminal."),
    "serve": Stage("puna.serve.server", "ServeConfig", "Serve a model over HTTP, with the OpenAI protocol."),
}


def load_stage(name: str) -> tuple[type[Any], Callable[[Any], None]]:
    """A stage's configuration class and its main function.

    Raises:
        InputError: there is no such stage; the message names the nearest.
    """
    if name not in STAGES:
        near = difflib.get_close_matches(name, STAGES, n=1, cutoff=0)[0]
        raise InputError(f"There is no stage {name!r}; did you mean {near!r}? Stages: {', '.join(STAGES)}.")
    module = importlib.import_module(STAGES[name].module)
    return getattr(module, STAGES[name].config), module.main
