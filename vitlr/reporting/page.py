"""One HTML page that needs nothing else: no script, no network; whatever a file says in it is text."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence
from pathlib import Path

MOST = 3_000_000  # bytes of a page
# Nothing may be fetched or run, whatever a name manages to say.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
_STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1f; --soft: #6a6a72; --line: #d9d9de; --back: #fff; --card: #f6f6f8 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8ec; --soft: #9a9aa4; --line: #36363c; --back: #131316; --card: #1d1d21 } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1rem; max-width: 62rem; background: var(--back); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere }
h1 { font-size: 1.5rem; margin: .5rem 0 } h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem;
  border-top: 1px solid var(--line); padding-top: 1rem } h3 { font-size: 1rem; margin: 1.5rem 0 .25rem }
p { margin: .25rem 0 .75rem } .soft { color: var(--soft); font-size: .875rem }
.wide { overflow-x: auto; margin: .5rem 0 } table { border-collapse: collapse; font-size: .875rem;
  font-variant-numeric: tabular-nums } td, th { padding: .2rem .6rem; border-bottom: 1px solid var(--line);
  text-align: right; white-space: nowrap; overflow-wrap: normal } td:first-child, th:first-child { text-align: left }
th { color: var(--soft); font-weight: 600 } td.long { white-space: normal; text-align: left; min-width: 12rem }
img.figure { width: 100%; min-width: 34rem; max-width: 46rem; height: auto; display: block }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); gap: .75rem }
.card { background: var(--card); border-radius: .5rem; padding: .75rem; font-size: .8125rem }
.card img { width: 7rem; height: 7rem; object-fit: cover; border-radius: .25rem; float: left; margin: 0 .75rem .5rem 0 }
.card .two { clear: both; display: grid; grid-template-columns: 1fr 1fr; gap: .5rem }
.card ol { margin: .25rem 0 0; padding-left: 1.2rem } summary { cursor: pointer; color: var(--soft) }
"""


def escape(text: object) -> str:
    """Text as HTML, safe in attributes too."""
    return html.escape(str(text), quote=True)


def page(title: str, parts: Iterable[str]) -> str:
    """The whole page."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


def heading(text: str, level: int = 2) -> str:
    return f"<h{level}>{escape(text)}</h{level}>"


def words(text: str, soft: bool = False) -> str:
    """A paragraph."""
    kind = ' class="soft"' if soft else ""
    return f"<p{kind}>{escape(text)}</p>"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], long: int | None = None) -> str:
    """Rows of text, the first column flush left; column `long` may break its lines."""
    kinds = [' class="long"' if index == long else "" for index in range(len(header))]
    cells = [[f"<td{kind}>{escape(cell)}</td>" for kind, cell in zip(kinds, row, strict=True)] for row in rows]
    return _grid(header, cells)


def _grid(header: Sequence[str], rows: Iterable[Iterable[str]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join(f"<tr>{''.join(cells)}</tr>" for cells in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def heat(header: Sequence[str], rows: Sequence[tuple[str, Sequence[tuple[str, float] | None]]]) -> str:
    """A table whose cells are (text, share): the larger the share, the fuller the colour, on dark and light."""

    def cell(of: tuple[str, float] | None) -> str:
        if of is None:
            return "<td></td>"
        return f'<td style="background:rgba(28,126,214,{min(max(of[1], 0.0), 1.0) * 0.6:.2f})">{escape(of[0])}</td>'

    return _grid(header, [[f"<td>{escape(name)}</td>", *map(cell, cells)] for name, cells in rows])


def folded(summary: str, inner: str) -> str:
    """What is shown when it is asked for."""
    return f"<details><summary>{escape(summary)}</summary>{inner}</details>"


def figure(path: Path, says: str) -> str:
    """An SVG file, put into the page."""
    data = base64.b64encode(path.read_bytes()).decode()
    picture = f'<img class="figure" alt="{escape(says)}" src="data:image/svg+xml;base64,{data}">'
    return f'<div class="wide">{picture}</div>'


def card(picture: str, says: str, lists: Iterable[tuple[str, Sequence[str]]]) -> str:
    """A picture (a data URI) with a line, and lists side by side."""
    sides = ""
    for title, items in lists:
        sides += f"<div><b>{escape(title)}</b><ol>{''.join(f'<li>{escape(item)}</li>' for item in items)}</ol></div>"
    return f'<div class="card"><img alt="" src="{escape(picture)}">{escape(says)}<div class="two">{sides}</div></div>'


def cards(items: Iterable[str]) -> str:
    return f'<div class="cards">{"".join(items)}</div>'
