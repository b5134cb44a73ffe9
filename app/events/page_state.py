"""One open page of a visitor: what the server knows of it, and why no update of it is lost.

Events of a page cross: one that left the browser early may be answered late, and answers may arrive in another order.

- Who the visitor is and what they look at is here and nowhere else. gradio gives all events of one page the same Tab,
  and each works under its lock on what the one before left. What the browser keeps is a copy, read when a page opens.
- What is typed belongs to the browser. An event carries all fields, the preset's name among them, as they stand in one
  moment; an answer has values only for the fields that the event was about.
- All else on the page follows from these two and from the jobs. Every event says which version of each part the page
  shows, and its answer brings those that ought to be different. So what two answers in the wrong order left behind
  is put right by the next tick.
"""

from __future__ import annotations

import threading
from typing import Any, Self

from ..backend.visitor import Visitor


class Tab:
    """The state of one page; gradio makes one for each by copying the first."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        """Held while an event is answered."""
        self.visitor: Visitor | None = None
        self.pictures: dict[str, str | None] = {}
        """Paths of the chosen pictures, by field: too much to come with every event."""
        self.problem: tuple[str, dict[str, Any]] | None = None
        """Why something could not be done, and what the fields said then: it is shown until they say something else."""
        self.untouched: dict[str, Any] | None = None
        """What the fields said at first."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return type(self)()
