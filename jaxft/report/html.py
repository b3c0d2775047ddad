"""The little HTML that a report needs: escaped by construction, styled by one sheet."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Mapping, Sequence

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""Content security policy: nothing runs and nothing is loaded, whatever a page came to hold."""

STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --paper: #ffffff; --soft: #60666e;
  --line: #dfe3e8; --band: #f5f7f9; --link: #1f5f9e; --good: #1d7a43; --bad: #b3261e;
  --warn: #8a5a00; --warnband: #fff6e0; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7eb; --paper: #15181c; --soft: #9aa2ac;
  --line: #333a42; --band: #1d2227; --link: #79b4ea; --good: #67c98e; --bad: #ff8f86;
  --warn: #f0c060; --warnband: #2e2612; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 72rem; background: var(--paper);
  color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .5rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .75rem; padding-bottom: .3rem;
  border-bottom: 1px solid var(--line); scroll-margin-top: 1rem; }
h2 a { color: inherit; text-decoration: none; }
h2 a:hover::after { content: " #"; color: var(--soft); }
h3 { font-size: 1rem; margin: 1.5rem 0 .5rem; }
a { color: var(--link); }
nav { display: flex; flex-wrap: wrap; gap: .25rem 1rem; font-size: .9rem; margin: 1rem 0; }
p.note, figcaption { color: var(--soft); font-size: .9rem; margin: .4rem 0; }
ul.warnings { list-style: none; margin: 1rem 0; padding: 0; }
ul.warnings li { background: var(--warnband); color: var(--warn); padding: .5rem .75rem;
  border-left: 3px solid var(--warn); margin: .25rem 0; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .5rem 0; }
th, td { padding: .3rem .8rem .3rem 0; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--line); vertical-align: top; }
thead th { color: var(--soft); font-weight: 600; font-size: .85rem; white-space: normal;
  vertical-align: bottom; }
th.text, td.text { text-align: left; }
td.text { white-space: normal; overflow-wrap: break-word; max-width: 36rem; }
td.good { color: var(--good); } td.bad { color: var(--bad); }
pre { background: var(--band); border: 1px solid var(--line); border-radius: 4px;
  padding: .75rem 1rem; overflow-x: auto; font: 12.5px/1.45 ui-monospace, Menlo, Consolas,
  monospace; }
details { margin: .5rem 0; } summary { cursor: pointer; color: var(--link); }
figure { margin: 1rem 0; } svg { max-width: 100%; height: auto; color: var(--ink); }
svg * { stroke-linejoin: round; stroke-linecap: butt; }
footer { margin-top: 3rem; color: var(--soft); font-size: .85rem; }
@media print { :root { --ink: #000; --paper: #fff; --soft: #444; --line: #bbb; --band: #fff;
  --link: #000; --good: #0a5c2c; --bad: #8f1a14; --warn: #6b4600; --warnband: #fff; }
  body { max-width: none; padding: 0; font-size: 10pt; } nav, .screen { display: none; }
  h2 { break-after: avoid; } figure, tr, ul.warnings li { break-inside: avoid; }
  pre { white-space: pre-wrap; overflow-wrap: anywhere; }
  .scroll { overflow: visible; }
  details::details-content { content-visibility: visible; block-size: auto; } }
"""


class Markup(str):
    """Text that is HTML already. Everything else is escaped."""

    __slots__ = ()


def tag(name: str, /, *children: str, **attributes: str | None) -> Markup:
    """An element; ``class_`` and ``http_equiv`` stand for ``class`` and ``http-equiv``.

    Example:
      >>> tag("p", "a < b", Markup("<br>"), class_="note")
      '<p class="note">a &lt; b<br></p>'
    """
    shown = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items()}
    pairs = "".join(f' {k}="{html.escape(v)}"' for k, v in shown.items() if v is not None)
    return Markup(f"<{name}{pairs}>{join(children)}</{name}>")


def void(name: str, /, **attributes: str) -> Markup:
    """An element without content and end, such as ``meta``."""
    return Markup(tag(name, **attributes).removesuffix(f"</{name}>"))


def join(parts: Iterable[str]) -> Markup:
    """One after the other, escaped where they are no markup."""
    return Markup("".join(p if isinstance(p, Markup) else html.escape(p) for p in parts))


def slug(text: str) -> str:
    """For an anchor."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def section(title: str, *children: str) -> Markup:
    """With a heading that links to itself."""
    anchor = tag("a", title, href=f"#{slug(title)}")
    return tag("section", tag("h2", anchor, id=slug(title)), *children)


def table(headings: Sequence[str], rows: Iterable[Sequence[str]], *, text: int = 1) -> Markup:
    """A table whose first ``text`` columns are words and the others numbers, aligned right.

    Cells are text, or finished ``td`` elements.
    """

    def aligned(column: int) -> str | None:
        return "text" if column < text else None

    def row(cells: Sequence[str]) -> Markup:
        ready = (
            c if isinstance(c, Markup) else tag("td", c, class_=aligned(i))
            for i, c in enumerate(cells)
        )
        return tag("tr", *ready)

    heads = (tag("th", h, class_=aligned(i), scope="col") for i, h in enumerate(headings))
    head = tag("thead", tag("tr", *heads))
    return tag("div", tag("table", head, tag("tbody", *map(row, rows))), class_="scroll")


def facts(pairs: Mapping[str, object]) -> Markup:
    """Names and values, one pair per line."""
    rows = (
        tag("tr", tag("th", name, class_="text", scope="row"), tag("td", str(value), class_="text"))
        for name, value in pairs.items()
    )
    return tag("table", tag("tbody", *rows))


def folded(summary: str, *children: str) -> Markup:
    """Hidden until asked for."""
    return tag("details", tag("summary", summary), *children)


def document(title: str, *body: str, **meta: str) -> str:
    """A whole page that loads nothing and runs nothing; ``meta`` names become meta elements."""
    head = tag(
        "head",
        void("meta", charset="utf-8"),
        void("meta", http_equiv="Content-Security-Policy", content=POLICY),
        void("meta", name="viewport", content="width=device-width, initial-scale=1"),
        *(void("meta", name=name, content=value) for name, value in meta.items()),
        tag("title", title),
        tag("style", Markup(STYLE)),
    )
    return f"<!doctype html>\n{tag('html', head, tag('body', *body), lang='en')}\n"
