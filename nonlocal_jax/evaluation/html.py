"""Builds HTML and SVG in which all text is escaped."""

import base64
import html
from collections.abc import Iterable, Mapping
from typing import Any

_VOID = frozenset(('img', 'meta', 'br'))

GENERATOR = 'nonlocal-jax report'  # in the pages' <meta>, by which they are known again

_STYLE = """
:root { color-scheme: light; --ink: #1d2733; --soft: #5b6776; --line: #d9dee5; --bar: #2f6fb5;
  --other: #d9822b; --good: #1b7f4d; --bad: #b3261e; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 16px; max-width: 1120px; color: var(--ink); background: #fff;
  font: 15px/1.5 system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif;
  overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 8px 0 4px; }
h2 { font-size: 1.2rem; margin: 40px 0 8px; padding-top: 12px; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 20px 0 6px; }
p { margin: 6px 0; max-width: 75ch; }
.soft { color: var(--soft); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(140px, 1fr)); gap: 8px;
  margin: 16px 0; }
.tile { border: 1px solid var(--line); border-radius: 6px; padding: 8px 12px; }
.tile b { display: block; font-size: 1.45rem; line-height: 1.3; }
.tile span { color: var(--soft); font-size: .85rem; }
.bars { display: grid; gap: 4px; }
.row { display: grid; grid-template-columns: minmax(120px, 210px) 1fr 305px; gap: 10px;
  align-items: center; }
.row .name { display: flex; gap: 8px; align-items: center; }
.row .numbers { display: grid; grid-template-columns: 80px 84px 1fr; gap: 8px;
  font-variant-numeric: tabular-nums; text-align: right; font-size: .88rem; }
.swatch { flex: none; width: 14px; height: 14px; border: 1px solid #0004; border-radius: 3px;
  display: inline-block; vertical-align: -2px; }
.track { position: relative; height: 16px; background: #eef1f5; border-radius: 3px; }
.track.two { height: 22px; }
.fill { position: absolute; left: 0; top: 0; bottom: 0; background: var(--bar);
  border-radius: 3px; }
.two .fill { bottom: 12px; }
.two .fill.other { top: 12px; bottom: 0; background: var(--other); }
.mark { position: absolute; top: -3px; bottom: -3px; width: 3px; margin-left: -1px;
  background: #111; outline: 1px solid #fff; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 330px), 1fr));
  gap: 16px 32px; align-items: start; }
svg { display: block; width: 100%; max-width: 560px; height: auto; }
svg text { font-family: inherit; fill: var(--ink); }
table { border-collapse: collapse; width: 100%; font-size: .92rem; }
th, td { text-align: left; padding: 4px 8px 4px 0; border-bottom: 1px solid var(--line);
  vertical-align: top; }
td.number, th.number { text-align: right; padding-right: 18px; font-variant-numeric: tabular-nums;
  overflow-wrap: normal; }
table.facts th { width: 170px; font-weight: 600; }
.sides td:first-child { overflow-wrap: normal; padding-right: 12px; }
.example { margin: 14px 0 22px; }
.panels { display: grid; grid-template-columns: repeat(4, 1fr); gap: 6px; margin: 6px 0; }
figure { margin: 0; }
figure img { width: 100%; height: auto; display: block; border: 1px solid var(--line); }
figcaption { font-size: .8rem; color: var(--soft); }
.chips { display: flex; flex-wrap: wrap; gap: 4px 14px; font-size: .85rem; }
.good { color: var(--good); } .bad { color: var(--bad); }
code { font-size: .88em; }
@media (max-width: 640px) {
  body { padding: 12px; font-size: 14px; }
  .row { grid-template-columns: 1fr; gap: 2px; margin-bottom: 8px; }
  .row .numbers { text-align: left; }
  td.number, th.number { padding-right: 6px; width: 64px; }
  .panels { grid-template-columns: repeat(2, 1fr); }
  table.facts th { width: 110px; }
}
@media print { .example { break-inside: avoid; } }
"""


class Markup(str):
  """Text that is HTML already, and is not escaped."""


Content = str | Markup | Iterable[Any] | None  # text, or what `tag` returns, also nested
Attribute = str | float | None


def tag(
  name: str,
  *children: Content,
  attributes: Mapping[str, Attribute] | None = None,
  **more: Attribute,
) -> Markup:
  """Returns an element; text in it and its attributes are escaped.

  >>> tag('p', 'a < b', tag('br'), class_='soft')
  '<p class="soft">a &lt; b<br></p>'

  Args:
    name: The element's name.
    *children: Text, markup, nothing, or iterables of these.
    attributes: Attributes whose names are not those of Python's arguments.
    **more: Attributes, underscores for hyphens but for a last one. None leaves one out.
  """
  given = {key.rstrip('_').replace('_', '-'): value for key, value in more.items()}
  listed = ''.join(
    f' {key}="{html.escape(_text(value))}"'
    for key, value in {**given, **(attributes or {})}.items()
    if value is not None
  )
  if name in _VOID:
    return Markup(f'<{name}{listed}>')
  return Markup(f'<{name}{listed}>{joined(*children)}</{name}>')


def joined(*children: Content) -> Markup:
  """Joins text, which is escaped, and markup."""
  return Markup(''.join(map(_escaped, children)))


def data_uri(data: bytes, kind: str) -> str:
  """Returns a file as an address that holds it; `kind` is its media type, as 'image/png'."""
  return f'data:{kind};base64,{base64.b64encode(data).decode()}'


def page(title: str, *sections: Content) -> str:
  """Returns a whole page, which needs no other file."""
  head = tag(
    'head',
    tag('meta', charset='utf-8'),
    tag('meta', name_='viewport', content='width=device-width, initial-scale=1'),
    tag('meta', name_='generator', content=GENERATOR),
    tag('title', title),
    Markup(f'<style>{_STYLE}</style>'),
  )
  return f'<!doctype html>\n{tag("html", head, tag("body", *sections), lang="en")}\n'


def is_page(text: str) -> bool:
  """Whether a file's beginning is that of one of `page`."""
  return str(tag('meta', name_='generator', content=GENERATOR)) in text


def table(
  head: Iterable[Content], rows: Iterable[Iterable[Content]], *, numbers: Iterable[int] = ()
) -> Markup:
  """Returns a table; `numbers` are the columns that are aligned to the right."""
  right = set(numbers)

  def cells(kind: str, contents: Iterable[Content]) -> list[Markup]:
    return [
      tag(kind, content, class_='number' if place in right else None)
      for place, content in enumerate(contents)
    ]

  return tag(
    'table',
    tag('thead', tag('tr', cells('th', head))),
    tag('tbody', [tag('tr', cells('td', row)) for row in rows]),
  )


def facts_table(facts: Iterable[tuple[str, Content]]) -> Markup:
  """Returns a table of names and values."""
  rows = [tag('tr', tag('th', name, scope='row'), tag('td', value)) for name, value in facts]
  return tag('table', tag('tbody', rows), class_='facts')


def tiles(facts: Iterable[tuple[str, str]]) -> Markup:
  """Returns a row of values with their names below."""
  return tag(
    'div',
    [tag('div', tag('b', value), tag('span', name), class_='tile') for name, value in facts],
    class_='tiles',
  )


def swatch(color: Iterable[int]) -> Markup:
  """Returns a small square in a color, RGB in [0, 255]."""
  red, green, blue = color
  return tag('span', class_='swatch', style=f'background:rgb({red},{green},{blue})')


def _escaped(content: Content) -> str:
  if content is None:
    return ''
  if isinstance(content, Markup):
    return content
  if isinstance(content, str):
    return html.escape(content)
  return ''.join(map(_escaped, content))


def _text(value: str | float) -> str:
  return f'{value:.6g}' if isinstance(value, float) else str(value)
