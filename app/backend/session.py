"""Session: the secret that one browser keeps, and the runs that its visitor looks at. No gradio here."""

import re
import secrets
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

from ..strings import TABLES, preferred
from .studio import JOB_ID

OWNER = re.compile(r"[A-Za-z0-9_-]{32,64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """The browser's storage. It comes from outside, so only well-formed values are used."""

    owner: str
    """The secret that makes runs this visitor's own."""
    language: str = "en"
    job: str = ""
    """The run on the stage."""
    pinned: bool = False
    """Whether the visitor chose that run; if not, the stage follows the run in progress."""
    compared: tuple[str, ...] = ()
    editing: str = ""
    uploaded: str = ""
    """The token of a dropped video that is on the stage."""

    @classmethod
    def of(cls, stored: Any, accept_language: str = "") -> Self:
        """Reads the browser's storage; starts a new session if it holds nothing usable."""
        data = stored if isinstance(stored, dict) else {}
        owner = data.get("owner")
        if not (isinstance(owner, str) and OWNER.fullmatch(owner)):
            return cls(owner=secrets.token_urlsafe(32), language=preferred(accept_language))
        language, compared = data.get("language"), data.get("compared")
        return cls(
            owner=owner,
            language=language if language in TABLES else preferred(accept_language),
            pinned=data.get("pinned") is True,
            compared=tuple(filter(None, map(_id, compared[:2]))) if isinstance(compared, list) else (),
            **{name: _id(data.get(name)) for name in ("job", "editing", "uploaded")},
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"compared": list(self.compared)}

    def toggle_compared(self, job_id: str) -> Self:
        """Adds a run to the comparison or removes it; a third run replaces the second."""
        if job_id in self.compared:
            return replace(self, compared=tuple(other for other in self.compared if other != job_id))
        return replace(self, compared=(*self.compared[:1], job_id))


def _id(value: Any) -> str:
    return value if isinstance(value, str) and JOB_ID.fullmatch(value) else ""
