"""PageState: the server's state of one open page, and why no update of that page is lost.

Events of a page cross: one that left the browser early may be answered late, and answers may arrive out of order.

- The session lives here and nowhere else. gradio gives all events of one page the same PageState, and each event works
  under its lock on what the event before left. The browser's storage is a copy, read when a page opens.
- The browser owns what the visitor types. An event carries all fields, the preset's name among them, as they were at
  one moment; an answer holds values only for the fields that the event was about.
- Everything else on the page follows from these two and from the jobs. Every event carries the version of each part
  that the page shows, and its answer replaces the parts that are out of date. So the next tick corrects whatever two
  answers in the wrong order left behind.
"""

import threading
from typing import Any, Self

from ..backend.session import Session


class PageState:
    """The state of one page; gradio makes one per page by copying the first."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        """Held while an event is answered."""
        self.session: Session | None = None
        self.paired: dict[str, str] = {}
        """The low-noise LoRAs that the page filled in itself, by field: they follow the high-noise ones."""
        self.replaced: list[dict[str, Any]] = []
        """The fields as they were before another run's settings or an example took their place, for an undo."""
        self.pictures: dict[str, str | None] = {}
        """Paths of the chosen pictures, by field: too large to send with every event."""
        self.problem: tuple[str, str] | None = None
        """An error message and the digest of the field values it belongs to: shown until the fields change."""
        self.catalog = 0
        """The version of the catalogue whose files the page offers."""
        self.untouched: str | None = None
        """The digest of the field values when the page opened. The values of a forged event may be large."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return type(self)()
