"""Stop strings in a text that arrives piece by piece."""

from collections.abc import Sequence


class StopStrings:
    """Passes text on up to the first stop string, holding back what could still become one.

    Where several stop strings occur, the one that is complete first counts, so that the cut does not depend on how
    the text was divided into pieces.

    Attributes:
        found: whether a stop string has come; the text is over then.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._longest = max(map(len, stops), default=0)
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """The text that has become certain."""
        if not self._stops:
            return text
        text = self._held + text
        ends = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if ends:
            self.found, self._held = True, ""
            return text[: min(ends)[1]]
        held = next(
            k
            for k in range(min(self._longest - 1, len(text)), -1, -1)
            if any(stop.startswith(text[len(text) - k :]) for stop in self._stops)
        )
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def flush(self) -> str:
        """What was held back; the text has ended without a stop string."""
        held, self._held = self._held, ""
        return held
