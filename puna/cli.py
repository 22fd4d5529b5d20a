"""The command line: parse, load the configuration, call the stage's main.

Nothing heavy is imported before a stage is chosen, so that `puna --help` answers at once.
"""

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from puna.pipeline.stages import STAGES, load_stage
from puna.runtime.errors import InputError

app = typer.Typer(
    name="puna",
    help="From raw text to an aligned, measured, served Llama.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class _OrModel(TyperGroup):
    """`puna inspect MODEL` is `puna inspect model MODEL`."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        return super().resolve_command(ctx, args if args[0] in self.commands else ["model", *args])


inspect_app = typer.Typer(
    help="Look at what Puna made or reads; `puna inspect MODEL` is short for `puna inspect model MODEL`.",
    no_args_is_help=True,
    cls=_OrModel,
)
app.add_typer(inspect_app, name="inspect")

Source = Annotated[
    str | None,
    typer.Argument(
        metavar="[RECIPE.toml|PATH]",
        help="A TOML recipe; or what the stage starts from: a model, or the folder that `curate` reads.",
    ),
]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a setting, such as train.steps=100.")
]


def _run_stage(name: str, source: str | None, settings: list[str]) -> None:
    from puna.config import load_config

    kind, main = load_stage(name)
    recipe = None
    if source is not None:
        starts_from = next((key for key in ("model", "source") if key in kind.__annotations__), None)
        if starts_from and not source.endswith(".toml"):
            settings = [_setting(starts_from, source), *settings]
        else:
            recipe = Path(source)
    main(load_config(kind, recipe, settings))


def _setting(key: str, text: str) -> str:
    """KEY=VALUE with a value that TOML takes for this very string."""
    return f"{key}={json.dumps(text)}"


def _add_stage(name: str) -> None:
    def command(source: Source = None, set_: Settings = None) -> None:
        _run_stage(name, source, set_ or [])

    command.__doc__ = f"{STAGES[name].help}\n\n`puna config {name}` prints every setting with its meaning and default."
    app.command(name)(command)


for _name in STAGES:
    if _name not in ("align", "compare", "convert", "predict"):
        _add_stage(_name)


@app.command(help=STAGES["align"].help + "\n\n`puna config align` prints every setting with its meaning and default.")
def align(
    source: Annotated[
        str | None,
        typer.Argument(
            metavar="[RECIPE.toml|MODEL|collect]",
            help="A TOML recipe; or the model to start from; or `collect`, to have people compare answers first.",
        ),
    ] = None,
    recipe: Annotated[str | None, typer.Argument(metavar="[RECIPE.toml]", help="After `collect`: its recipe.")] = None,
    set_: Settings = None,
) -> None:
    if source == "collect":
        _run_stage("collect", recipe, set_ or [])
    elif recipe is None:
        _run_stage("align", source, set_ or [])
    else:
        raise InputError(f"{recipe} stands behind {source}; of these, only `puna align collect` takes a recipe there.")


@app.command(help=STAGES["convert"].help + " Ends by comparing the logits of both sides.")
def convert(
    source: Annotated[str, typer.Argument(help="A checkpoint in any format, or hub:organisation/name.")],
    destination: Annotated[Path, typer.Argument(help="The folder to write.")],
    to: Annotated[str, typer.Option("--to", metavar="hf|meta|gguf", help="The format to write.")] = "hf",
    set_: Settings = None,
) -> None:
    settings = [_setting("source", source), _setting("destination", str(destination)), _setting("to", to)]
    _run_stage("convert", None, [*settings, *(set_ or [])])


@app.command(help=STAGES["predict"].help + "\n\n`puna config predict` prints every setting.")
def predict(
    model: Annotated[str, typer.Argument(help="A directory with a head: model/ or adapter/ of `puna finetune`.")],
    data: Annotated[
        Path, typer.Argument(help="Texts: the task's own form, with or without labels; or .txt, one a line.")
    ],
    output: Annotated[Path | None, typer.Option(help="JSON Lines to write; printed where absent.")] = None,
    set_: Settings = None,
) -> None:
    settings = [_setting("model", model), _setting("data", str(data))]
    settings += [] if output is None else [_setting("output", str(output))]
    _run_stage("predict", None, [*settings, *(set_ or [])])


@app.command(help=STAGES["compare"].help + " Or one recipe of it.\n\n`puna config compare` prints every setting.")
def compare(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL MODEL...", help="Model directories, or names such as llama-3.1-8b.")
    ],
    output: Annotated[Path | None, typer.Option(help="The folder to write.")] = None,
    set_: Settings = None,
) -> None:
    recipe = models[0] if len(models) == 1 and models[0].endswith(".toml") else None
    settings = [] if recipe else [f"models={json.dumps(models)}"]
    settings += [] if output is None else [_setting("output", str(output))]
    _run_stage("compare", recipe, [*settings, *(set_ or [])])


@app.command()
def run(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.toml", help="A recipe of several stages.")],
    set_: Settings = None,
) -> None:
    """Run the stages of a recipe in order, skipping those that are up to date, and write a report."""
    from puna.pipeline.run import run_recipe

    run_recipe(recipe, set_ or [])


@app.command()
def config(
    stage: Annotated[str, typer.Argument(metavar="STAGE[.KIND]", help="One of: " + ", ".join(STAGES) + ".")],
) -> None:
    """Print a recipe of a stage, or of one kind of step in it: every setting, what it means, and its default."""
    from puna.config import render_defaults, render_kind

    name, dot, kind = stage.partition(".")
    config, _ = load_stage(name)
    print(render_kind(config, kind) if dot else render_defaults(config), end="")


@inspect_app.command("chat")
def inspect_chat(
    model: Annotated[Path, typer.Argument(help="A model directory, or a tokenizer file.")],
    conversations: Annotated[
        Path | None, typer.Option(help='JSON Lines with "messages"; a short example where absent.')
    ] = None,
    index: Annotated[int, typer.Option(help="Which conversation, counted from 0.")] = 0,
    template: Annotated[str | None, typer.Option(help="A built-in chat template: llama2, llama3 or chatml.")] = None,
    ids: Annotated[bool, typer.Option("--ids", help="Show token ids.")] = False,
) -> None:
    """Show a conversation as the model is trained on it: special tokens, and what is supervised, in colour."""
    from puna.pipeline.inspect import show_chat

    show_chat(model, conversations, index, template, ids)


@inspect_app.command("model")
def inspect_model(
    model: Annotated[str, typer.Argument(help="A checkpoint, or the name of a published model such as llama-3.1-8b.")],
    card: Annotated[bool, typer.Option("--card", help="Write its model card, README.md, from the manifests.")] = False,
    evaluations: Annotated[
        list[Path] | None,
        typer.Option(help="Folder with evaluations for the card, besides the run's own; may be repeated."),
    ] = None,
    licence: Annotated[str | None, typer.Option(help="For the card, as the hub names it: apache-2.0.")] = None,
) -> None:
    """Show a model's architecture, and its parameters, FLOPs and cache bytes; or write its model card."""
    if card:
        from puna.pipeline.card import write_card
        from puna.runtime.progress import say

        say(f"Wrote {write_card(Path(model), evaluations or [], licence)}")
        return
    if evaluations or licence:
        raise InputError("--evaluations and --licence belong to --card.")
    from puna.pipeline.inspect import show_model

    show_model(model)


@inspect_app.command("data")
def inspect_data(
    folder: Annotated[
        Path, typer.Argument(help="Output of `puna curate`, or any Parquet or JSON Lines; with --token, token shards.")
    ],
    page: Annotated[Path | None, typer.Option(help="Where to write the page; FOLDER.html where absent.")] = None,
    tokens: Annotated[
        Path | None, typer.Option(help="Token shards of these documents; looked for beside FOLDER where absent.")
    ] = None,
    token: Annotated[
        int | None, typer.Option(help="Which document this token of FOLDER's shards came from, and by which steps.")
    ] = None,
) -> None:
    """Show what documents there are, what was rejected and why, and what is alike; or where one token came from."""
    if token is not None:
        from puna.pipeline.token_lineage import show_token

        show_token(folder, token)
        return
    from puna.pipeline.look import show_data

    show_data(folder, page, tokens)


def main() -> None:
    """Entry point: exit status 0 when done, 2 for wrong use or bad input, 1 for a fault of ours, 130 for Ctrl-C."""
    try:
        app()
    except (InputError, OSError) as error:
        if os.environ.get("PUNA_TRACEBACK"):
            traceback.print_exc()
        message = str(error) if isinstance(error, InputError) else _explain(error)
        print(f"puna: {message}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("puna: interrupted; the same command goes on from the last checkpoint.", file=sys.stderr)
        sys.exit(130)


def _explain(error: OSError) -> str:
    what = error.strerror or str(error)
    return f"{what}: {error.filename}." if error.filename else f"{what}."


if __name__ == "__main__":
    main()
