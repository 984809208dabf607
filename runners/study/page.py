"""A report as a list of blocks, written as Markdown and as one HTML page that needs no other file."""

import base64
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from utils.files import MIB, read_regular


@dataclass(frozen=True)
class Heading:
    text: str


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class Table:
    """``bold``: (row, column) of the cells that stand out."""

    header: list[str]
    rows: list[list[str]]
    bold: set[tuple[int, int]] = field(default_factory=set)


@dataclass(frozen=True)
class Picture:
    path: Path
    caption: str


@dataclass(frozen=True)
class Gallery:
    """Small pictures side by side, (caption, path) each."""

    caption: str
    pictures: list[tuple[str, Path]]


STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1b1f24; max-width: 62rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.6rem; line-height: 1.2; } h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; }
.scroll { overflow-x: auto; border: 1px solid #d5d9de; border-radius: 6px; margin: .8rem 0; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .7rem; text-align: left; white-space: nowrap; border-bottom: 1px solid #e6e9ed; }
th { background: #f4f6f8; } tr:last-child td { border-bottom: 0; }
figure { margin: 1rem 0; } figcaption { font-size: .9rem; color: #4a525c; }
img { max-width: 100%; height: auto; } img.wide { width: 100%; }
.gallery { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: .8rem; }
.gallery figure { margin: 0; } .gallery img { width: 100%; image-rendering: pixelated; }
"""


def to_markdown(title: str, blocks: list, folder: Path) -> str:
    """Pictures are named relative to ``folder``."""
    parts = [f"# {title}"]
    for block in blocks:
        match block:
            case Heading(text):
                parts.append(f"## {text}")
            case Text(text):
                parts.append(text)
            case Table():
                parts.append(_markdown_table(block.header, _texts(block, "**{}**")))
            case Picture(path, caption):
                parts.append(f"![{caption}]({path.relative_to(folder)})")
            case Gallery(caption, pictures):
                images = [f"![{name}]({path.relative_to(folder)})" for name, path in pictures]
                parts += [f"{caption}:", _markdown_table([name for name, _ in pictures], [images])]
    return "\n\n".join(parts) + "\n"


def to_html(title: str, blocks: list, style: str = "") -> str:
    """One page with everything inside; tables scroll in their own box where the screen is narrow.

    Args:
        style: Rules that follow the page's own.
    """
    body = "\n".join(_html(block) for block in blocks)
    return (f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{escape(title)}</title>\n'
            f"<style>{STYLE}{style}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n{body}\n</body>\n</html>\n")


def _html(block) -> str:
    match block:
        case Heading(text):
            return f"<h2>{escape(text)}</h2>"
        case Text(text):
            return f"<p>{escape(text)}</p>"
        case Table():
            head = "".join(f"<th>{escape(name)}</th>" for name in block.header)
            rows = _texts(Table(block.header, [[escape(text) for text in row] for row in block.rows], block.bold),
                          "<b>{}</b>")
            body = "\n".join(f"<tr>{''.join(f'<td>{text}</td>' for text in row)}</tr>" for row in rows)
            return (f'<div class="scroll"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table>'
                    "</div>")
        case Picture(path, caption):
            return f"<figure>{_image(path, caption, 'wide')}<figcaption>{escape(caption)}</figcaption></figure>"
        case Gallery(caption, pictures):
            inner = "".join(f"<figure>{_image(path, name)}<figcaption>{escape(name)}</figcaption></figure>"
                            for name, path in pictures)
            return f'<p>{escape(caption)}</p><div class="gallery">{inner}</div>'


def _image(path: Path, text: str, css: str = "") -> str:
    data = base64.b64encode(read_regular(path, 64 * MIB, "picture")).decode()
    return f'<img class="{css}" alt="{escape(text)}" src="data:image/png;base64,{data}">'


def _texts(table: Table, bold: str) -> list[list[str]]:
    return [[bold.format(text) if (r, c) in table.bold else text for c, text in enumerate(row)]
            for r, row in enumerate(table.rows)]


def _markdown_table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
