"""Building blocks of HTML. Here and in every caller, text from people and files goes through `esc`."""

from collections.abc import Iterable, Sequence
from html import escape
from itertools import zip_longest


def esc(value: object) -> str:
    """Escapes text for use in content and in attributes."""
    return escape(str(value), quote=True)


def tag(name: str, content: str = "", /, **attributes: object) -> str:
    """An element around `content`, which is HTML already.

    Attributes: `class_` becomes class and `data_act` data-act; None and False leave one out, True gives it no value,
    and all other values are escaped here.
    """
    parts = [name]
    for key, value in attributes.items():
        key = key.rstrip("_").replace("_", "-")
        if value is True:
            parts.append(key)
        elif value is not None and value is not False:
            parts.append(f'{key}="{esc(value)}"')
    opening = " ".join(parts)
    return f"<{opening}>" if name in ("img", "input", "br", "source") else f"<{opening}>{content}</{name}>"


def button(label: str, act: str, *, kind: str = "", name: str | None = None, **data: object) -> str:
    """A button whose clicks the page's script sends with its data-* values. Screen readers read `name`."""
    return _button(esc(label), act, kind, name, data)


def icon_button(icon: str, act: str, name: str, *, disabled: bool = False, **data: object) -> str:
    """The same with one of ICONS in place of a label."""
    return _button(ICONS[icon], act, "icon", name, data, disabled=disabled)


def _button(content: str, act: str, kind: str, name: str | None, data: dict[str, object], **more: object) -> str:
    more |= {f"data_{key}": value for key, value in data.items()}
    classes = f"btn {kind}".strip()
    return tag("button", content, type="button", class_=classes, data_act=act, aria_label=name, title=name, **more)


def table(head: Sequence[str], rows: Iterable[Sequence[object]], *, marks: Sequence[str] = (), class_: str = "") -> str:
    """A table; the first cell of each row is its header. `marks` are the classes of the rows, "" for none."""
    top = tag("tr", "".join(tag("th", esc(cell), scope="col") for cell in head))
    body = ""
    for (first, *others), mark in zip_longest(rows, marks):
        cells = tag("th", esc(first), scope="row") + "".join(tag("td", esc(cell)) for cell in others)
        body += tag("tr", cells, class_=mark or None)
    return tag("table", tag("thead", top) + tag("tbody", body), class_=class_ or None)


def _icon(path: str) -> str:
    return (
        '<svg viewBox="0 0 16 16" width="16" height="16" fill="none" stroke="currentColor" stroke-width="1.5" '
        f'stroke-linecap="round" stroke-linejoin="round" aria-hidden="true"><path d="{path}"/></svg>'
    )


ICONS = {
    "up": _icon("M8 13V3M4 7l4-4 4 4"),
    "down": _icon("M8 3v10M4 9l4 4 4-4"),
    "edit": _icon("M3 13l.7-2.9L10.8 3 13 5.2 5.9 12.3z"),
    "close": _icon("M4 4l8 8M12 4l-8 8"),
    "compare": _icon("M2.5 3.5h5v9h-5zM8.5 3.5h5v9h-5z"),
    "trash": _icon("M3 4.5h10M6 4.5V3h4v1.5M4.5 4.5l.5 8.5h6l.5-8.5"),
}
