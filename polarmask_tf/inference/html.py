"""Static HTML: a page that opens from disk, with nothing to load and no script. Tables, line charts, pictures.

Pieces are strings of HTML. What comes out of files, like names of classes and pictures, reaches a page by `text` alone, which
escapes it.
"""

from __future__ import annotations

import base64
import html
import io
import math
import typing

from PIL import Image

from polarmask_tf.errors import one_line

# Of lines, dark enough for white paper.
_INKS = (
    "#202124",
    "#1f77b4",
    "#d9480f",
    "#2b8a3e",
    "#9c36b5",
    "#b08900",
    "#0b7285",
    "#c2255c",
    "#5f3dc4",
    "#795548",
    "#868e96",
)
_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#202124;background:#faf9f6;max-width:1080px;margin:0 auto;padding:24px}
h1{font-size:26px;margin:0 0 4px}h2{font-size:19px;margin:36px 0 8px}p{margin:8px 0;max-width:72ch}
table{border-collapse:collapse;margin:8px 0;font-variant-numeric:tabular-nums}
th,td{padding:3px 12px 3px 0;text-align:right;border-bottom:1px solid #e4e2dc}th{font-weight:600;color:#6e6e72}
th:first-child,td:first-child{text-align:left;overflow-wrap:anywhere}
figure{margin:0}figcaption{color:#6e6e72;font-size:13px;overflow-wrap:anywhere}img{max-width:100%;display:block}
.row{display:flex;flex-wrap:wrap;gap:20px;align-items:flex-start}.good{color:#1a7f37}.bad{color:#b3261e}
svg text{font:12px system-ui,sans-serif;fill:#6e6e72}.quiet{color:#6e6e72}
"""
# No script runs and nothing is loaded, whatever a name in the data says.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def page(title: str, body: typing.Iterable[str], style: str = "") -> str:
    """A whole document. `title` is text."""
    head = f'<meta charset=utf-8><meta http-equiv=Content-Security-Policy content="{_POLICY}"><title>{text(title)}</title>'
    view = '<meta name=viewport content="width=device-width">'
    head = f"<head>{head}{view}<style>{_STYLE}{style}</style></head>"
    return f"<!doctype html><html lang=en>{head}<body>{''.join(body)}</body></html>\n"


def text(value, longest: int = 300) -> str:
    """Anything as escaped text in one line, for between tags and within quotes."""
    return html.escape(one_line(value, longest))


def table(head: typing.Sequence, rows: typing.Iterable[typing.Sequence]) -> str:
    """Cells are text; the first column to the left."""

    def line(cells, tag):
        return "<tr>" + "".join(f"<{tag}>{text(cell)}</{tag}>" for cell in cells) + "</tr>"

    return f"<table>{line(head, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"


def picture(image: Image.Image, caption: str = "", quality: int = 85) -> str:
    """A picture within the page itself, as JPEG. `caption` is text."""
    file = io.BytesIO()
    image.convert("RGB").save(file, "JPEG", quality=quality)
    data = base64.b64encode(file.getvalue()).decode()
    size = f"width={image.width} height={image.height}"
    return f'<figure><img alt="" {size} src="data:image/jpeg;base64,{data}"><figcaption>{text(caption)}</figcaption></figure>'


def line_chart(
    title: str,
    lines: typing.Mapping[str, tuple[typing.Sequence[float], typing.Sequence[float]]],
    x_label: str,
    y_label: str,
    *,
    marks: typing.Sequence[tuple[float, float]] = (),
    diagonal: bool = False,
) -> str:
    """An SVG of lines {name: (xs, ys)}, all within [0, 1] x [0, 1], and a legend where there are several.

    marks: points with a ring around them. diagonal: a dashed line where y = x.
    """
    width, height, left, top, low = 340, 270, 46, 28, 40
    right = width - 12

    def at(x, y):
        x, y = (min(max(value, 0.0), 1.0) if math.isfinite(value) else 0.0 for value in (float(x), float(y)))
        return f"{left + x * (right - left):.1f},{top + (1 - y) * (height - top - low):.1f}"

    def stroke(points, rest):
        return f'<polyline fill="none" points="{" ".join(points)}" {rest}/>'

    parts = [f'<text x="{left}" y="16" style="fill:#202124;font-weight:600">{text(title, 60)}</text>']
    for tick in range(0, 11, 2):
        (x, bottom), (_, y) = at(tick / 10, 0).split(","), at(0, tick / 10).split(",")
        parts.append(stroke((at(0, tick / 10), at(1, tick / 10)), 'stroke="#e4e2dc"'))
        parts.append(f'<text x="{x}" y="{float(bottom) + 16:.1f}" text-anchor="middle">{tick / 10:g}</text>')
        parts.append(f'<text x="{left - 6}" y="{float(y) + 4:.1f}" text-anchor="end">{tick / 10:g}</text>')
    middle = (left + right) / 2
    parts.append(f'<text x="{middle:.0f}" y="{height - 6}" text-anchor="middle">{text(x_label, 60)}</text>')
    turned = f'transform="rotate(-90 12 {height / 2:.0f})" x="12" y="{height / 2:.0f}"'
    parts.append(f'<text {turned} text-anchor="middle">{text(y_label, 60)}</text>')
    if diagonal:
        parts.append(stroke((at(0, 0), at(1, 1)), 'stroke="#6e6e72" stroke-dasharray="4 4"'))
    legend = []
    for number, (name, (xs, ys)) in enumerate(lines.items()):
        rgb = _INKS[number % len(_INKS)]
        parts.append(stroke((at(x, y) for x, y in _thinned(xs, ys)), f'stroke="{rgb}" stroke-width="2"'))
        legend.append(f'<span style="color:{rgb}">&#9632;</span> {text(name, 40)}')
    for x, y in marks:
        cx, cy = at(x, y).split(",")
        parts.append(f'<circle cx="{cx}" cy="{cy}" r="5" fill="none" stroke="#202124" stroke-width="1.5"/>')
    names = f"<figcaption>{' &nbsp; '.join(legend)}</figcaption>" if len(legend) > 1 else ""
    drawing = f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img">{"".join(parts)}</svg>'
    return f"<figure>{drawing}{names}</figure>"


def _thinned(xs, ys, most: int = 400):
    """Points that are at least 1/`most` of the chart apart, and the last."""
    kept: list[tuple[float, float]] = []
    points = list(zip(xs, ys, strict=True))
    for point in points:
        if not kept or max(abs(point[0] - kept[-1][0]), abs(point[1] - kept[-1][1])) >= 1 / most:
            kept.append(point)
    return kept if not points or kept[-1] == points[-1] else [*kept, points[-1]]
