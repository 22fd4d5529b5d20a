"""The rating page over HTTP: what is shown comes from a `Session`, and no answer says which model wrote it."""

import base64
import hashlib
import re
from collections.abc import Awaitable, Callable
from importlib.resources import files
from typing import Annotated, Any

import uvicorn
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import HTMLResponse
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints

from puna.evaluate.rating.records import Verdict
from puna.evaluate.rating.session import Session, Turn, as_text

_SECONDS_TO_FINISH = 2
_LONGEST_EDIT = 200_000


def _clean(name: str) -> str:
    """A name without control characters and doubled spaces."""
    cleaned = " ".join("".join(letter if letter.isprintable() else " " for letter in name).split())
    if not cleaned:
        raise ValueError("A rater needs a name.")
    return cleaned


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    rater: Annotated[str, StringConstraints(max_length=60), AfterValidator(_clean)]


class _RatingBody(_Body):
    item: str
    verdict: Verdict
    seconds: Annotated[float, Field(ge=0, le=86400, allow_inf_nan=False)]
    edited: Annotated[str, StringConstraints(max_length=_LONGEST_EDIT)] | None = None
    left_unsafe: bool = False
    right_unsafe: bool = False


def build_app(session: Session, changed: Callable[[], object] = lambda: None) -> FastAPI:
    """The rating page as an ASGI application.

    Its functions run on one thread, the event loop's, so the session needs no lock.

    Args:
        session: what is rated.
        changed: called after every rating and every undoing.
    """
    app = FastAPI(title="Puna: rating", docs_url=None, redoc_url=None, openapi_url=None)
    page = files("puna.evaluate.rating").joinpath("page.html").read_text(encoding="utf-8")
    headers = {
        "Content-Security-Policy": (
            f"default-src 'none'; script-src {_hashes(page, 'script')}; style-src {_hashes(page, 'style')}; "
            "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        ),
        "Cache-Control": "no-store",
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
    }

    @app.middleware("http")
    async def add_headers(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        response = await call_next(request)
        response.headers.update(headers)
        return response

    @app.get("/", response_class=HTMLResponse)
    async def show_page() -> str:
        return page

    @app.post("/next")
    async def next_turn(body: _Body) -> dict[str, Any]:
        return state(body.rater, session.next(body.rater))

    @app.post("/rate")
    async def rate(body: _RatingBody) -> dict[str, Any]:
        try:
            replaced = session.rate(
                body.item,
                body.rater,
                body.verdict,
                body.seconds,
                edited=body.edited,
                left_unsafe=body.left_unsafe,
                right_unsafe=body.right_unsafe,
            )
        except KeyError as error:
            raise HTTPException(404, "These answers are not among those to rate; load the page again.") from error
        except ValueError as error:
            raise HTTPException(422, str(error)) from error
        except OSError as error:
            raise HTTPException(
                507, f"The rating could not be kept: {error.strerror}. Tell whoever runs this."
            ) from error
        changed()
        return {"replaced": replaced, **state(body.rater, session.next(body.rater))}

    @app.post("/undo")
    async def undo(body: _Body) -> dict[str, Any]:
        taken_back = session.undo(body.rater)
        changed()
        turn = session.turn(taken_back.item, body.rater) if taken_back else session.next(body.rater)
        return {"undone": taken_back and {"verdict": taken_back.verdict}, **state(body.rater, turn)}

    def state(rater: str, turn: Turn | None) -> dict[str, Any]:
        return {
            "rated": session.num_rated(rater),
            "left": session.num_left(rater),
            "turn": turn
            and {
                "item": turn.comparison.item,
                "prompt": [{"role": each["role"], "content": as_text(each)} for each in turn.comparison.prompt],
                "left": turn.left.text,
                "right": turn.right.text,
            },
        }

    return app


def build_server(app: FastAPI) -> uvicorn.Server:
    """A server for it, which Ctrl-C ends."""
    return uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=_SECONDS_TO_FINISH))


def _hashes(page: str, tag: str) -> str:
    """What a Content-Security-Policy calls the page's own scripts or styles, so that no others can run."""
    bodies = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
    return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()}'" for body in bodies)
