"""The page of a report: one HTML file that needs nothing else, and the pictures in it.

The page is made from the report's own JSON and from nothing else, so whoever holds ``report.json`` can make
it again. It loads nothing, runs nothing (a content security policy in the page says so to the browser),
prints on paper, and follows the reader's choice of light or dark. Pictures are SVG: their attributes make
them right on their own, on white; the page's style sheet recolours them.

Every bound is rounded up and every remainder down, so the page never shows less than what was spent.
"""

from __future__ import annotations

import html
import math
import statistics
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

from privacy.errors import RunError

SCHEMA: Final = "tacit-report/2"
LEDGER_SCHEMA: Final = "tacit-ledger-report/1"
INFINITY: Final = "infinity"
UNKNOWN: Final = "unknown"

# More clients than this, and the table shows those that matter most; all of them are in the JSON.
_TABLE_ROWS: Final = 200
_EXTREMES: Final = 40
# A page over ledgers shows so many charges in all, and no fewer of each data set than this.
_LEDGER_ROWS: Final = 2000
_LEAST_ROWS: Final = 5

# More clients than this are drawn as a band, since nobody can follow so many lines.
_LINES: Final = 24

# More clients than this do not fit into a partition picture with rows that can be told apart.
_BARS: Final = 80

# Paul Tol's "muted" scheme: ten colours that colour-blind readers can tell apart.
_TEN: Final = (
    "#332288", "#88ccee", "#117733", "#ddcc77", "#cc6677", "#44aa99", "#aa4499", "#999933", "#882255",
    "#bbbbbb",
)  # fmt: skip
# Beyond ten classes colours follow the order of the classes, along the "cividis" scale.
_SCALE: Final = ((0, 34, 78), (66, 78, 108), (124, 123, 120), (187, 175, 113), (254, 232, 56))

_EPSILON: Final = "&#949;"
_DELTA: Final = "&#948;"


def figure_words(value: float | str) -> str:
    """Returns an upper bound in three digits, rounded up; words such as "unknown" stay words."""
    if isinstance(value, str):
        return value
    return _digits(_round(value, math.ceil))


def _floor_words(value: float | str) -> str:
    """Returns a remainder in three digits, rounded down."""
    return value if isinstance(value, str) else _digits(_round(value, math.floor))


def _round(value: float, towards: Callable[[float], int]) -> float:
    """Returns a value in three significant digits, rounded up or down."""
    if value == 0 or not math.isfinite(value):
        return value
    places = 2 - math.floor(math.log10(abs(value)))
    # Ten digits first: 3 computed as 3.0000000000000004 is still 3.00, not 3.01.
    return towards(float(f"{value:.10g}") * 10.0**places - (1e-9 if towards is math.ceil else -1e-9)) / 10.0**places


def _digits(value: float) -> str:
    """Returns three significant digits of a number that was rounded to them."""
    if value == 0:
        return "0"
    if not 1e-3 <= abs(value) < 1e6:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    return f"{value:,.{max(0, 2 - math.floor(math.log10(abs(value)) + 1e-12))}f}"


def _percent(rate: float | str) -> str:
    """Returns a rate in [0, 1] as percent, rounded up."""
    return rate if isinstance(rate, str) else f"{_trim(_digits(_round(100 * rate, math.ceil)))}\u00a0%"


def _trim(digits: str) -> str:
    """Returns a number without zeros at its end."""
    return digits.rstrip("0").rstrip(".") if "." in digits and "e" not in digits else digits


def _safe(value: object) -> str:
    """Returns text that stays text: markup escaped, characters that hide or reorder others replaced."""
    text = "".join(
        "\ufffd" if unicodedata.category(char) in {"Cc", "Cf", "Cs", "Cn"} and char not in "\n\t" else char
        for char in str(value)
    )
    return html.escape(text, quote=True)


def _power(words: str) -> str:
    """Returns safe HTML for a number in words, with a power of ten written as one."""
    mantissa, found, exponent = words.partition("e")
    if not found or not exponent.lstrip("-").isdigit():
        return _safe(words)
    factor = "" if mantissa == "1" else f"{_safe(mantissa)}&#8239;&times;&#8239;"
    return f"{factor}10<sup>{exponent.replace('-', '&minus;')}</sup>"


def _bound(value: float | str) -> str:
    """Returns safe HTML for an upper bound."""
    return _power(figure_words(value))


# ----------------------------------------------------------------------------------------------------
# pictures


def _ticks(low: float, high: float, most: int = 6, least: float = 0.0) -> list[float]:
    """Returns round numbers that enclose [low, high], about ``most`` of them, ``least`` or more apart."""
    if high <= low:
        high = low + (abs(low) or 1.0)
    raw = max(least, (high - low) / max(1, most - 1))
    power = 10.0 ** math.floor(math.log10(raw))
    factors = (1, 2, 5, 10) if least else (1, 2, 2.5, 5, 10)
    step = next(power * factor for factor in factors if power * factor >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{index * step:.12g}") for index in range(first, last + 1)]


class _Frame:
    """Axes of a small chart: 480 by 300 units, so that its type stays readable on a phone and on paper."""

    width, height = 480, 300
    left, right, top, bottom = 62, 56, 36, 46

    def __init__(self, xs: tuple[float, float], ys: tuple[float, float], whole: bool = False) -> None:
        self.x_ticks = [tick for tick in _ticks(*xs, most=7, least=1) if xs[0] <= tick <= xs[1]]
        self.y_ticks = _ticks(*ys, least=1 if whole else 0)
        self.xs = xs if xs[1] > xs[0] else (xs[0] - 1, xs[1] + 1)
        self.ys = (self.y_ticks[0], self.y_ticks[-1])

    def x(self, value: float) -> float:
        """Returns the horizontal position of a value."""
        share = (value - self.xs[0]) / (self.xs[1] - self.xs[0])
        return round(self.left + share * (self.width - self.left - self.right), 1)

    def y(self, value: float) -> float:
        """Returns the vertical position of a value."""
        share = (value - self.ys[0]) / (self.ys[1] - self.ys[0])
        return round(self.height - self.bottom - share * (self.height - self.top - self.bottom), 1)

    def draw(self, name: str, title: str, desc: str, labels: tuple[str, str], body: str, keys: str) -> str:
        """Returns the whole picture: grid, ticks, axis labels, keys and what is drawn on them."""
        base, end = self.height - self.bottom, self.width - self.right
        parts = []
        for tick in self.y_ticks:
            y = self.y(tick)
            parts.append(f'<path class="grid" d="M{self.left} {y}H{end}" stroke="#e3e1da"/>')
            parts.append(_text(self.left - 8, y + 4, f"{tick:,g}", anchor="end"))
        for tick in self.x_ticks:
            parts.append(f'<path class="axis" d="M{self.x(tick)} {base}v5" stroke="#6b7280"/>')
            parts.append(_text(self.x(tick), base + 19, f"{tick:,.0f}", anchor="middle"))
        parts.append(f'<path class="axis" d="M{self.left} {base}H{end}" stroke="#6b7280"/>')
        parts.append(_text((self.left + end) / 2, self.height - 6, labels[0], anchor="middle"))
        middle = (self.top + base) / 2
        turn = f' transform="rotate(-90 13 {middle:g})"'
        parts.append(_text(13, middle, labels[1], anchor="middle", more=turn))
        return _svg(name, title, desc, self.width, self.height, "".join(parts) + body + keys)


def _svg(name: str, title: str, desc: str, width: float, height: float, body: str) -> str:
    """Returns a picture with a title and a description for readers who do not see it."""
    return (
        f'<svg class="picture" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" '
        f'role="img" '
        f'aria-labelledby="{name}-title {name}-desc" font-family="system-ui, sans-serif" font-size="13">'
        f'<title id="{name}-title">{_safe(title)}</title><desc id="{name}-desc">{_safe(desc)}</desc>'
        f'<rect class="paper" width="100%" height="100%" fill="#ffffff"/>{body}</svg>'
    )


def _label(x: float, y: float, words: str) -> str:
    """Returns the number at the end of a curve, in the margin to its right."""
    return _text(x + 7, y + 4, words, more=' class="strong" font-weight="600"')


def _text(x: float, y: float, words: str, *, anchor: str = "start", more: str = "") -> str:
    """Returns one line of text in a picture."""
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" fill="#4b5563"{more}>{_safe(words)}</text>'


def _line(kind: str, path: str, color: str, width: float = 2, more: str = "") -> str:
    """Returns a curve; ``kind`` lets the page recolour it."""
    return f'<path class="{kind}" d="{path}" fill="none" stroke="{color}" stroke-width="{width:g}"{more}/>'


def _keys(entries: Sequence[tuple[str, str, str, str]], x: float = 58) -> str:
    """Returns the legend in one row above the plot: (class, colour, dash, words)."""
    parts = []
    for kind, color, dash, words in entries:
        more = f' stroke-dasharray="{dash}"' if dash else ""
        parts.append(_line(kind, f"M{x:g} 15h18", color, 3, more))
        parts.append(_text(x + 24, 19, words))
        x += 24 + 6.9 * len(words) + 16
    return "".join(parts)


def _numbers(points: Iterable[tuple[Any, Any]]) -> list[tuple[float, float]]:
    """Returns the points that can be drawn."""
    return [
        (float(x), float(y))
        for x, y in points
        if isinstance(x, int | float) and isinstance(y, int | float) and not isinstance(y, bool)
    ]


def _accuracy_picture(rounds: Sequence[Mapping[str, Any]]) -> str:
    """Returns the headline metric by round, or nothing where no round was measured."""
    names = [name for record in rounds for name in record.get("metrics") or {}]
    if not names:
        return ""
    name = names[0]
    points = _numbers((record["round"], (record.get("metrics") or {}).get(name)) for record in rounds)
    if not points:
        return ""
    share = all(0 <= y <= 1 for _, y in points)
    points = [(x, 100 * y if share else y) for x, y in points]
    low, high = min(y for _, y in points), max(y for _, y in points)
    frame = _Frame((points[0][0], points[-1][0]), (0 if share and low < 50 else low, 100 if share else high))
    unit = " (%)" if share else ""
    words = name.replace("-", " ").replace("_", " ")
    path = "M" + "L".join(f"{frame.x(x)} {frame.y(y)}" for x, y in points)
    body = _line("s1", path, "#0072b2", 2.5, ' stroke-linejoin="round"')
    if len(points) <= 40:
        body += "".join(
            f'<circle class="d1" cx="{frame.x(x)}" cy="{frame.y(y)}" r="3" fill="#0072b2"/>' for x, y in points
        )
    x, y = points[-1]
    last = f"{y:.1f} %" if share else f"{y:.4g}"
    body += _label(frame.x(x), frame.y(y), last)
    desc = f"From {points[0][1]:.4g}{unit} in round {points[0][0]:g} to {last} in round {x:g}."
    keys = _keys([("s1", "#0072b2", "", f"{words}, server's public test set")])
    return frame.draw("metric", f"{words} by round", desc, ("round", f"{words}{unit}"), body, keys)


def _steps(history: Sequence[tuple[float, float]], start: float | None, end: float) -> list[tuple[float, float]]:
    """Returns a client's spend as steps, from round 0 where its start is known, to the end."""
    points = list(history) if start is None else [(0.0, start), *history]
    return points if not points or points[-1][0] >= end else [*points, (end, points[-1][1])]


def _epsilon_picture(clients: Sequence[Mapping[str, Any]]) -> str:
    """Returns epsilon by client and round, or nothing where no client's spend can be drawn."""
    drawable = []
    for client in clients:
        history = sorted(_numbers(client["history"]))
        spent = client["spent_epsilon"]
        if isinstance(spent, str):
            continue
        if history:
            drawable.append((client, history, 0.0 if client["runs"] <= 1 else None))
        elif client["runs"] <= 1:
            drawable.append((client, history, 0.0))
    end = max((history[-1][0] for _, history, _ in drawable if history), default=0.0)
    if end <= 0:
        return ""
    # The last charge is a step as well: without room after it, it would be a bare stroke on the frame.
    end += max(0.5, 0.02 * end)
    curves = [(client, _steps(history, start, end)) for client, history, start in drawable]
    most, highest = max(curves, key=lambda curve: (curve[1][-1][1], len(curve[1])))
    peak = max(y for _, y in highest)
    budgets = [client["granted_epsilon"] for client, _ in curves if not isinstance(client["granted_epsilon"], str)]
    budget = min(budgets, default=math.inf)
    shown = budget <= 2.5 * peak
    frame = _Frame((0, end), (0, max(peak, budget) if shown else peak))
    body, entries = "", []
    if len(curves) > _LINES:
        low, middle, high = _band([points for _, points in curves], end)
        forth = "L".join(f"{frame.x(x)} {frame.y(y)}" for x, y in _corners(high))
        back = "L".join(f"{frame.x(x)} {frame.y(y)}" for x, y in reversed(_corners(low)))
        body += f'<path class="band" d="M{forth}L{back}Z" fill="#0072b2" fill-opacity="0.2"/>'
        body += _line("s1", _stairs(frame, middle), "#0072b2")
        entries += [("band-key", "#a6cbe3", "", "least to most"), ("s1", "#0072b2", "", "median")]
    else:
        for client, points in curves:
            if client is not most:
                body += _line("s1", _stairs(frame, points), "#0072b2", 1.5, ' stroke-opacity="0.5"')
        if len(curves) > 1:
            entries.append(("s1", "#0072b2", "", "a client each"))
    body += _line("s2", _stairs(frame, highest), "#d55e00", 2.5)
    entries.append(("s2", "#d55e00", "", "most spent"))
    if shown:
        y = frame.y(budget)
        body += _line("s3", f"M{frame.left} {y}H{frame.width - frame.right}", "#374151", 1.5, ' stroke-dasharray="6 4"')
        entries.append(("s3", "#374151", "6 4", "budget" if len(set(budgets)) == 1 else "least budget"))
    x, y = highest[-1]
    body += _label(frame.x(x), frame.y(y), figure_words(y))
    desc = (
        f"Epsilon spent by {len(curves):,} clients over {math.floor(end)} rounds, a step per charge; "
        f"the most is {figure_words(peak)}" + (f", the least budget is {budget:g}." if budgets else ".")
    )
    label = "\u03b5 spent (add/remove, RDP filter)"
    return frame.draw("epsilon", "Epsilon by client and round", desc, ("round", label), body, _keys(entries, 36))


def _stairs(frame: _Frame, points: Sequence[tuple[float, float]]) -> str:
    """Returns the path of a step line: a charge is paid at once, in its round."""
    (x, y), *rest = points
    return f"M{frame.x(x)} {frame.y(y)}" + "".join(f"H{frame.x(x)}V{frame.y(y)}" for x, y in rest)


def _corners(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Returns all corners of a step line."""
    corners = [points[0]]
    for x, y in points[1:]:
        corners += [(x, corners[-1][1]), (x, y)]
    return corners


def _band(
    curves: Sequence[Sequence[tuple[float, float]]], end: float
) -> tuple[list[tuple[float, float]], list[tuple[float, float]], list[tuple[float, float]]]:
    """Returns least, median and most over clients at (at most 400) rounds from 0 to ``end``, and there."""
    rounds = sorted({round(math.floor(end) * index / 400) for index in range(401)} | {end})
    columns: list[list[float]] = [[] for _ in rounds]
    for points in curves:
        position = -1
        for column, moment in zip(columns, rounds, strict=True):
            while position + 1 < len(points) and points[position + 1][0] <= moment:
                position += 1
            if position >= 0:
                column.append(points[position][1])
    bands = [
        (float(moment), min(column), statistics.median(column), max(column))
        for moment, column in zip(rounds, columns, strict=True)
        if column
    ]
    return (
        [(x, low) for x, low, _, _ in bands],
        [(x, middle) for x, _, middle, _ in bands],
        [(x, high) for x, _, _, high in bands],
    )


def _replies_picture(rounds: Sequence[Mapping[str, Any]]) -> str:
    """Returns who answered by round, or nothing where every client always answered."""
    fields = ("replies", "declined", "missing")
    counts = [
        (float(record["round"]), *(float(record.get(name) or 0) for name in fields))
        for record in rounds
        if all(isinstance(record.get(name) or 0, int | float) for name in fields)
    ]
    if not any(declined or missing for _, _, declined, missing in counts):
        return ""
    total = max(sum(row[1:]) for row in counts)
    frame = _Frame((counts[0][0] - 0.5, counts[-1][0] + 0.5), (0, total), whole=True)
    width = max(0.8, min(22.0, 0.8 * (frame.x(1) - frame.x(0))))
    kinds = (("f1", "#0072b2"), ("f2", "#e69f00"), ("f3", "#9ca3af"))
    body = ""
    for moment, *parts in counts:
        base = 0.0
        for (kind, color), part in zip(kinds, parts, strict=True):
            if part:
                top, foot = frame.y(base + part), frame.y(base)
                body += (
                    f'<rect class="{kind}" x="{frame.x(moment) - width / 2:.1f}" y="{top}" '
                    f'width="{width:.1f}" '
                    f'height="{foot - top:.1f}" fill="{color}"/>'
                )
            base += part
    keys = [
        ("s1", "#0072b2", "", "answered"),
        ("k2", "#e69f00", "", "declined"),
        ("k3", "#9ca3af", "", "missing"),
    ]
    declined, missing = (int(sum(row[index] for row in counts)) for index in (2, 3))
    desc = f"Over all rounds {declined:,} refusals and {missing:,} missing replies."
    return frame.draw("replies", "Answers by round", desc, ("round", "clients asked"), body, _keys(keys))


def partition_picture(label_table: Sequence[Sequence[int]], class_names: Sequence[str]) -> str:
    """Returns an SVG of how a simulation split its records: each client's mix of labels and its size.

    It shows exact counts, so it exists for simulations only (G12).

    Args:
        label_table: Records of each client and class, shape (clients, classes).
        class_names: Names of the classes, in the order of the columns.
    """
    total = len(label_table)
    chosen = range(total) if total <= _BARS else sorted({round(i * (total - 1) / (_BARS - 1)) for i in range(_BARS)})
    names = [str(name) for name in class_names]
    colors = _colors(len(names))
    row = 20 if len(chosen) <= 25 else 12 if len(chosen) <= 40 else 8
    legend, top = _legend(names, colors)
    left, mix, gap, room = 66, 290, 26, 164
    largest = max((sum(label_table[index]) for index in chosen), default=0) or 1
    every = 1 if row >= 12 else 5
    parts = [legend, _text(left, top - 9, "labels (% of the client's records)")]
    scale = "records (number)" if row >= 12 else f"records (longest {largest:,})"
    parts.append(_text(left + mix + gap, top - 9, scale))
    for place, index in enumerate(chosen):
        y, counts = top + place * row, label_table[index]
        size, x = sum(counts), float(left)
        if place % every == 0:
            label = f"client {index + 1}" if row >= 20 else f"{index + 1:,}"
            parts.append(_text(left - 8, y + row / 2 + 4, label, anchor="end", more=' font-size="11"'))
        for name, color, count in zip(names, colors, counts, strict=True):
            if not count:
                continue
            width = mix * count / size
            tip = f"client {index + 1}, {name}: {count:,} of {size:,}"
            parts.append(
                f'<rect class="cell" x="{x:.1f}" y="{y}" width="{width:.1f}" height="{row - 2}" '
                f'fill="{color}" '
                f'stroke="#ffffff" stroke-width="0.6"><title>{_safe(tip)}</title></rect>'
            )
            if row >= 20 and width > 9 + 7 * len(name):
                ink = f' font-size="11" class="on" style="fill:{_ink(color)}"'
                parts.append(_text(x + width / 2, y + 13, name, anchor="middle", more=ink))
            x += width
        width = (room - 46) * size / largest
        parts.append(
            f'<rect class="f1" x="{left + mix + gap}" y="{y}" width="{width:.1f}" height="{row - 2}" fill="#0072b2"/>'
        )
        if row >= 12:
            parts.append(_text(left + mix + gap + width + 6, y + row / 2 + 4, f"{size:,}", more=' font-size="11"'))
    height = top + len(chosen) * row + 8
    title = "Simulation only: labels and number of records of each client"
    desc = f"{total:,} clients, {len(names)} classes, {sum(map(sum, label_table)):,} records."
    if len(chosen) < total:
        desc += f" {len(chosen)} clients, evenly spaced, are drawn."
    return _svg("partition", title, desc, left + mix + gap + room, height, "".join(parts))


def _legend(names: Sequence[str], colors: Sequence[str]) -> tuple[str, int]:
    """Returns the names beside their colours, and the height at which the bars may start."""
    if len(names) > 20:
        words = f"{len(names)} classes, in order from {names[0][:16]} (dark) to {names[-1][:16]} (light)"
        return _text(66, 18, words), 50
    x, y, parts = 66.0, 6, []
    for name, color in zip(names, colors, strict=True):
        short = name if len(name) <= 18 else name[:17] + "\u2026"
        width = 26 + 7.2 * len(short)
        if x > 66 and x + width > 540:
            x, y = 66.0, y + 20
        parts.append(f'<rect x="{x:.1f}" y="{y}" width="12" height="12" fill="{color}"/>')
        parts.append(_text(x + 17, y + 11, short))
        x += width
    return "".join(parts), y + 46


def _colors(classes: int) -> list[str]:
    """Returns one colour per class."""
    if classes <= len(_TEN):
        return list(_TEN[:classes])
    colors = []
    for index in range(classes):
        place = index / (classes - 1) * (len(_SCALE) - 1)
        lower = min(int(place), len(_SCALE) - 2)
        mixed = (round(a + (b - a) * (place - lower)) for a, b in zip(_SCALE[lower], _SCALE[lower + 1], strict=True))
        colors.append("#" + "".join(f"{part:02x}" for part in mixed))
    return colors


def _ink(color: str) -> str:
    """Returns black or white, whichever is read more easily on a colour."""
    red, green, blue = (int(color[place : place + 2], 16) for place in (1, 3, 5))
    return "#111111" if 0.299 * red + 0.587 * green + 0.114 * blue > 135 else "#ffffff"


# --------------------------------------------------------------------------------------------------------
# page


def render(report: Mapping[str, Any]) -> str:
    """Returns the page of a report as HTML.

    Guarantees:
        Alone: the page loads no other resource and runs no script.
        Escaped: no value of the report can become markup.

    Args:
        report: What `privacy.report.build` made, or the same read back from ``report.json``.

    Raises:
        RunError: The report is of another schema, or not whole.
    """
    if report.get("schema") != SCHEMA:
        raise RunError(f"expected a report of schema {SCHEMA}, got {report.get('schema')!r}; make it with this version")
    parts = (
        _top,
        _headline,
        _curves,
        _clients,
        _cost,
        _chain,
        _coverage,
        _adversaries,
        _witness,
        _how,
        _empirical,
        _simulation,
        _software,
    )
    try:
        title = f"Privacy report: {_safe(report['run']['task'])}, {_safe(report['run']['job'])}"
        body = "\n".join(text for part in parts if (text := part(report)))
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise RunError(
            f"expected a whole report of schema {SCHEMA}, got one that breaks it ({error}); make it again"
        ) from error
    return _document(title, body)


def _document(title: str, body: str) -> str:
    """Returns a whole page around safe HTML."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<meta name="referrer" content="no-referrer">\n'
        f"<title>{title}</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def render_ledgers(report: Mapping[str, Any]) -> str:
    """Returns the page of a report over ledgers as HTML; as alone and as escaped as that of a run.

    Args:
        report: What `privacy.ledger_report.over_ledgers` made, or the same read back.

    Raises:
        RunError: The report is of another schema, or not whole.
    """
    if report.get("schema") != LEDGER_SCHEMA:
        raise RunError(f"expected a report of schema {LEDGER_SCHEMA}, got {report.get('schema')!r}; make it anew")
    try:
        gaps = "".join(f"<li>{_safe(text)}</li>" for text in report["not_covered"])
        named = [("Report id", f"<code>{_safe(report['report_id'])}</code>")]
        # A page for many data sets must still open: all charges are in the JSON.
        rows = max(_LEAST_ROWS, _LEDGER_ROWS // max(1, len(report["data_sets"])))
        sections = "".join(_data_set(number, row, rows) for number, row in enumerate(report["data_sets"]))
        body = (
            '<header><p class="mark"><b>tacit</b> <i>understood without being said</i></p><h1>Privacy ledgers</h1>'
            f'<p class="about">{len(report["data_sets"]):,} data sets; {_safe(report["meaning"])}.</p></header>'
            f"{sections}{_section('Not covered', f'<ul>{gaps}</ul>', 'coverage')}"
            f"{_section('Report', _pairs(named), 'software')}"
        )
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise RunError(
            f"expected a whole report over ledgers, got one that breaks it ({error}); make it again"
        ) from error
    return _document("Privacy ledgers", body)


def _data_set(number: int, row: Mapping[str, Any], rows: int) -> str:
    """Returns one data set: its budget, its runs, the price of its schedule, and its last charges."""
    facts = [
        ("Budget", f"{_EPSILON} {_bound(row['granted_epsilon'])}"),
        ("Spent", f"<strong>{_epsilon(row['spent_epsilon'])}</strong>"),
        ("Left", f"{_EPSILON} {_power(_floor_words(row['remaining_epsilon']))}"),
        ("Delta", _bound(row["delta"])),
        ("Charges", f"{row['charges']:,}"),
        ("Key", f"<code>{_safe(row['public_key'])}</code>"),
        ("Ledger head", f"<code>{_safe(row['ledger_head'])}</code>"),
    ]
    notes = [
        f"The budget was {'raised' if change['raised'] else 'lowered'} from {_bound(change['before'])} to "
        f"{_bound(change['after'])} at {_moment(change['time'])}."
        for change in row["budget_changes"]
    ]
    if row["test_noise"]:
        notes.append("Its noise came from a test source, which is no protection.")
    if row["unsigned_entries"]:
        notes.append(f"{row['unsigned_entries']:,} entries of version 1 were never signed.")
    if row["clock_set_back"]:
        notes.append("The holder's clock was set back: times are not to be relied on.")
    warnings = f'<ul class="warnings">{"".join(f"<li>{note}</li>" for note in notes)}</ul>' if notes else ""
    runs = [
        [
            f"<code>{_safe(run['job'][:12])}</code>",
            f"{run['charges']:,}",
            _bound(run["alone_epsilon"]),
            _safe(", ".join(run["released"])),
            _safe(run["sampling"]),
            f"{_moment(run['first'])} to {_moment(run['last'])}",
        ]
        for run in row["runs"]
    ]
    heads = ["Run", "#charges", f"#{_EPSILON} of it alone", "Released", "Sampling law", "Time"]
    table = _table(heads, runs, kind="words") if runs else ""
    schedule = row["schedule"]
    priced = ""
    if schedule is not None:
        figures = [
            [label, _bound(schedule[name])]
            for label, name in (
                ("PLD, add or remove a record", "pld"),
                ("PLD, replace a record", "pld_replace_one"),
                ("PRV, add or remove a record", "prv"),
                ("RDP at the best order", "rdp"),
            )
        ]
        priced = _table(
            ["The one committed schedule, all of it", f"#{_EPSILON} at {_DELTA} = {_bound(row['delta'])}"], figures
        )
    shown = row["history"][-rows:]
    lines = [
        [
            _moment(when),
            f"<code>{_safe(row['runs'][run]['job'][:12])}</code>",
            f"{moment:,}",
            _safe(released),
            _bound(spent),
        ]
        for when, run, moment, released, spent in shown
    ]
    caption = f"The last {len(shown):,} of {len(row['history']):,} charges." if len(shown) < len(row["history"]) else ""
    heads = ["Time", "Run", "#round", "Released", f"#{_EPSILON} spent after it"]
    spend = _table(heads, lines, caption=caption) if lines else ""
    return _section(row["name"], f"{_pairs(facts, 'facts')}{warnings}{table}{priced}{spend}", f"data-set-{number}", "")


def _section(title: str, body: str, name: str, lead: str = "") -> str:
    """Returns a section with a heading, and a leading sentence where there is one."""
    first = f'<p class="lead">{lead}</p>' if lead else ""
    head = f'<h2 id="{name}-h">{_safe(title)}</h2>'
    return f'<section id="{name}" aria-labelledby="{name}-h">{head}{first}{body}</section>'


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]], *, kind: str = "", caption: str = "") -> str:
    """Returns a table; heads and cells are safe HTML, a head that starts with '#' has numbers below it."""
    numeric = [head.startswith("#") for head in heads]
    mark = [' class="n"' if number else "" for number in numeric]
    head = "".join(f'<th scope="col"{m}>{text.lstrip("#")}</th>' for text, m in zip(heads, mark, strict=True))
    lines = []
    for row in rows:
        first, *rest = (f"{m}>{cell}" for cell, m in zip(row, mark, strict=True))
        lines.append(f'<tr><th scope="row"{first}</th>' + "".join(f"<td{cell}</td>" for cell in rest) + "</tr>")
    note = f"<caption>{caption}</caption>" if caption else ""
    return (
        f'<div class="scroll" tabindex="0" role="group"><table class="{kind}">{note}'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def _pairs(entries: Iterable[tuple[str, str]], kind: str = "pairs") -> str:
    """Returns a list of names and what they stand for; both are safe HTML."""
    return f'<dl class="{kind}">' + "".join(f"<div><dt>{a}</dt><dd>{b}</dd></div>" for a, b in entries) + "</dl>"


def _name(key: str) -> str:
    """Returns the words of a key."""
    return _safe(str(key).replace("_", " ").replace("-", " "))


def _value(value: Any) -> str:
    """Returns safe HTML for a plain value."""
    if isinstance(value, Mapping):
        return ", ".join(f"{_name(key)} {_value(item)}" for key, item in value.items()) or "&ndash;"
    if isinstance(value, list):
        return ", ".join(_value(item) for item in value) or "&ndash;"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return _power(f"{value:.6g}".replace("e-0", "e-").replace("e+0", "e"))
    return "&ndash;" if value is None or value == "" else _safe(value)


def _top(report: Mapping[str, Any]) -> str:
    """Returns what this is about."""
    run = report["run"]
    facts = [
        ("Job", f"<code>{_safe(run['job'])}</code>"),
        ("Task", _safe(run["task"])),
        ("One record is", _safe(run["record"])),
        ("Status", _safe(run["status"])),
        ("Time", f"{_moment(run['started'])} to {_moment(run['finished'])}"),
        ("Covers", f"<strong>{_safe(run['covers'])}</strong>"),
        # Reports of before there was one have no such line.
        *((("Model", f"<code>{_safe(run['model'])}</code>"),) if run.get("model") else ()),
        *((_name(key).capitalize(), _safe(text)) for key, text in report["product"].items() if text != "not stated"),
    ]
    return (
        '<header><p class="mark"><b>tacit</b> <i>understood without being said</i></p><h1>Privacy report</h1>'
        f'<p class="about">{_safe(run["summary"])}</p>{_pairs(facts, "facts")}</header>'
    )


def _moment(text: str) -> str:
    """Returns an ISO time in a form that people read; anything else as it is."""
    day, found, time = str(text).partition("T")
    return _safe(f"{day} {time[:8]}{' UTC' if time.endswith(('Z', '+00:00')) else time[8:]}" if found else text)


def _headline(report: Mapping[str, Any]) -> str:
    """Returns the person-level line, the sentence, the figures and the warnings."""
    headline = report["headline"]
    epsilon = headline["epsilon"]
    state = "known" if not isinstance(epsilon, str) else "open" if epsilon == UNKNOWN else "none"
    person = " ".join(
        f"{_safe(line['who'])}: <strong>{_epsilon(line['epsilon'])}</strong>"
        + (f", since {_safe(line['note'])}." if line.get("note") else ".")
        for line in headline["person"]
    )
    swap = headline["replace_one"]
    delta = f"at {_DELTA} = {_bound(headline['delta'])}"
    # Where figures differ by who looks, none stands without its adversary.
    against = f", against {_safe(headline['against'])}" if "against" in headline else ""
    tiles = [
        (_bound(epsilon), f"{_EPSILON}, add or remove {_safe(headline['protects'])}{against}", delta, " main"),
        (
            _bound(swap["epsilon"]),
            f"{_EPSILON}, replace {_safe(headline['protects'])}{against}",
            f"at {_DELTA} = {_bound(swap['delta'])}",
            " main",
        ),
        (
            _bound(headline["odds_factor"]),
            "largest change of odds",
            f"e<sup>{_EPSILON}</sup>, add/remove",
            "",
        ),
    ] + [
        (
            _safe(_percent(entry["tpr"])),
            "of members found, at most",
            f"by a test that wrongly accuses {_safe(_percent(entry['fpr']))} of the others",
            "",
        )
        for entry in headline["tpr"]
    ]
    boxes = "".join(
        f'<div class="tile{kind}"><b>{number}</b><span>{words}</span><small>{note}</small></div>'
        for number, words, note, kind in tiles
    )
    federation = headline["federation"]
    alone = (
        f" For a person in one data set: {_epsilon(federation['one_data_set'])}."
        if federation["multiplicity"] > 1
        else ""
    )
    found = (
        ""
        if isinstance(epsilon, str)
        else f"<b>Found by:</b> {_safe(headline['basis'])}; replace-one by {_safe(swap['basis'])}. "
    )
    notes = (
        f'<p class="note"><b>Whole federation:</b> {_epsilon(federation["epsilon"])}, '
        f"{_safe(federation['rule'])}.{alone} "
        f"{found}<b>Scale:</b> no threshold holds for every use; a common reading calls {_EPSILON} up to 1 "
        "strong and up to 10 reasonable (Ponomareva et al., 2023).</p>"
    )
    reasons = "".join(f"<li>{_safe(reason)}</li>" for reason in headline["reasons"])
    # A single reason is in the sentence already.
    why = f'<div class="why"><p>Why there is no figure:</p><ul>{reasons}</ul></div>'
    why = why if len(headline["reasons"]) > 1 else ""
    warnings = "".join(f"<li>{_safe(text)}</li>" for text in report["warnings"])
    notice = f'<ul class="warnings">{warnings}</ul>' if warnings else ""
    return (
        f'<section id="headline" class="headline {state}" aria-label="Headline">'
        f'<p class="person"><b>For a person.</b> {person}</p>'
        f'<p class="sentence">{_safe(headline["sentence"])}</p>'
        f'{why}<div class="tiles">{boxes}</div>{notes}</section>{notice}'
    )


def _epsilon(value: float | str) -> str:
    """Returns safe HTML for an epsilon inside a sentence."""
    if value in (UNKNOWN, INFINITY):
        return f"{_EPSILON} {value}"
    return _safe(value) if isinstance(value, str) else f"{_EPSILON}&#8239;=&#8239;{_bound(value)}"


def _curves(report: Mapping[str, Any]) -> str:
    """Returns the pictures by round, and a short table for readers who prefer numbers."""
    rounds, clients = report["rounds"], report["clients"]
    hidden = sum(isinstance(client["spent_epsilon"], str) for client in clients)
    pictures = []
    if picture := _accuracy_picture(rounds):
        pictures.append(f"<figure>{picture}<figcaption>What the model learned.</figcaption></figure>")
    if picture := _epsilon_picture(clients):
        note = f" Not drawn, since unknown or infinite: {hidden:,} of {len(clients):,} clients." if hidden else ""
        words = f"What it cost, as each client's ledger counted it.{note}"
        pictures.append(f"<figure>{picture}<figcaption>{words}</figcaption></figure>")
    elif clients:
        pictures.append('<p class="empty">Epsilon by round is not drawn: it is unknown, infinite or zero.</p>')
    if picture := _replies_picture(rounds):
        words = (
            "Who answered. A client that declines says one of a few fixed words that do not depend on "
            "data, most often because its budget is spent. A missing reply counts as no reply; the round "
            "goes on without it."
        )
        pictures.append(f'<figure class="row">{picture}<figcaption>{words}</figcaption></figure>')
    return _section("Round by round", f'<div class="figures">{"".join(pictures)}</div>{_round_table(rounds)}', "rounds")


def _round_table(rounds: Sequence[Mapping[str, Any]]) -> str:
    """Returns at most a dozen rounds as numbers, the first and the last included."""
    if not rounds:
        return "<p>No round was finished.</p>"
    last = len(rounds) - 1
    chosen = sorted({round(index * last / 11) for index in range(12)}) if last >= 12 else list(range(last + 1))
    metrics = list(dict.fromkeys(name for record in rounds for name in record.get("metrics") or {}))[:3]
    said = list(dict.fromkeys(name for record in rounds for name in record.get("client_metrics") or {}))
    # A histogram has no room in a cell; it is in report.json.
    said = [name for name in said if not any(isinstance(_told(record, name)[0], list) for record in rounds)]
    heads = ["Round", *(f"#{_name(name)}" for name in metrics), *(f"#{_name(name)}, clients say" for name in said)]
    heads += [f"#{_EPSILON}, most over clients"]
    heads += ["#answered", "#declined", "#missing", "#seconds"]
    rows = []
    for record in (rounds[index] for index in chosen):
        told = record.get("metrics") or {}
        cells = [_metric(told.get(name)) for name in metrics]
        cells += [_with_error(*_told(record, name)) for name in said] + [_bound(record["epsilon"])]
        cells += [_value(record.get(name)) for name in ("replies", "declined", "missing")]
        rows.append([_value(record.get("round")), *cells, _metric(record.get("seconds"))])
    caption = f"{len(chosen)} of {len(rounds):,} rounds; all of them are in report.json" if len(chosen) <= last else ""
    return _table(heads, rows, caption=caption)


def _told(record: Mapping[str, Any], name: str) -> tuple[Any, Any]:
    """Returns what the clients of a round say about their own records, and its standard error by the noise alone."""
    figure = (record.get("client_metrics") or {}).get(name) or {}
    return figure.get("value"), figure.get("stderr")


def _with_error(value: Any, error: Any) -> str:
    """Returns safe HTML for a noised number; one that its noise drowns is unknown."""
    return UNKNOWN if value is None or error is None else f"{_metric(value)} &plusmn; {_metric(error)}"


def _metric(value: Any) -> str:
    """Returns safe HTML for a measured number."""
    return _power(_digits(float(f"{value:.3g}"))) if isinstance(value, float) else _value(value)


def _clients(report: Mapping[str, Any]) -> str:
    """Returns the budget and one line per client; of very many clients those that matter most."""
    clients, budget = report["clients"], report["budget"]
    granted = budget["granted"]
    words = " to ".join(dict.fromkeys(_bound(value) for value in (*granted[:1], *granted[-1:])))
    summary = [
        ("Clients", f"{budget['clients']:,}"),
        ("Budget of each", f"{_EPSILON} {words}" if granted else "&ndash;"),
        ("Most spent", _epsilon(budget["largest_spent"])),
        ("Least left", f"{_EPSILON} {_power(_floor_words(budget['least_remaining']))}"),
        ("Charges", f"{budget['charges']:,}"),
        ("Never delivered", f"{budget['undelivered']:,}"),
        ("Rounds declined", f"{budget['declined']:,}"),
        ("Spend not proven", f"{budget['unproven']:,} clients" if budget["unproven"] else "none"),
    ]
    shown, caption = _extremes(clients), ""
    if len(shown) < len(clients):
        caption = (
            f"{len(shown)} of {len(clients):,} clients: any with an open question, then the most and the "
            "least spent. All of them are in report.json."
        )
    heads = [
        "Client", f"#{_EPSILON} spent", f"#{_EPSILON} granted", f"#{_EPSILON} left", f"#{_DELTA}",
        "#rounds joined", "#charges", "#declined", "#runs",
        "#never delivered", "#receipts missing", "Proof", "Ledger head",
    ]  # fmt: skip
    lead = (
        "Each holder sets its own budget, for the lifetime of its data set. Its ledger refuses what would "
        f"exceed it: {_safe(budget['filter'])}. When a budget ends, {_safe(budget['at_exhaustion'])}. A charge whose "
        "update was never delivered, after a crash or a lost reply, is spent all the same."
    )
    table = _table(heads, [_client_row(client) for client in shown], kind="clients", caption=caption) if shown else ""
    return _section("Budgets, client by client", _pairs(summary, "facts") + table, "clients", lead)


def _extremes(clients: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Returns all clients where they fit a table, else the open questions and both ends of the spend."""
    if len(clients) <= _TABLE_ROWS:
        return list(clients)
    strange = [client for client in clients if isinstance(client["spent_epsilon"], str)]
    plain = sorted(
        (client for client in clients if not isinstance(client["spent_epsilon"], str)),
        key=lambda client: -client["spent_epsilon"],
    )
    if len(plain) <= 2 * _EXTREMES:
        return strange[:_EXTREMES] + plain
    return strange[:_EXTREMES] + plain[:_EXTREMES] + plain[-_EXTREMES:]


def _client_row(client: Mapping[str, Any]) -> list[str]:
    """Returns the cells of one client."""
    spent, granted = client["spent_epsilon"], client["granted_epsilon"]
    filled = 0.0
    if not isinstance(spent, str) and not isinstance(granted, str) and granted > 0:
        filled = min(100.0, 100 * spent / granted)
    bar = f'<span class="bar" aria-hidden="true"><i style="width:{filled:.0f}%"></i></span>'
    if isinstance(spent, str):
        bar = ""
    receipts = "test noise" if client["test_noise"] else client["verdict"]
    state = "bad" if isinstance(spent, str) else "good" if client["verdict"] == "verified" else "word"
    key = f' title="public key {_safe(client["public_key"])}"' if client["public_key"] else ""
    return [
        f"<span{key}>{_safe(client['name'])}</span>",
        f"{bar}{_bound(spent)}",
        _bound(granted),
        _power(_floor_words(client["remaining_epsilon"])),
        _bound(client["delta"]),
        *(f"{client[name]:,}" for name in ("rounds_joined", "charges", "declined", "runs", "undelivered")),
        f"{client['receipts_missing']:,}",
        f'<span class="chip {state}">{_safe(receipts)}</span>',
        f'<code title="{_safe(client["ledger_head"])}">{_safe(str(client["ledger_head"])[:12])}</code>',
    ]


def _cost(report: Mapping[str, Any]) -> str:
    """Returns the price of the schedule by every accountant, at both adjacencies and several deltas."""
    prices, delta = report["prices"], report["prices"]["delta"]
    swap = report["headline"]["replace_one"]
    order = prices["gate_order"]
    rows = [
        (
            "PLD",
            "add/remove",
            _bound(prices["pld"]),
            "tight; for a schedule that was fixed before its first round",
        ),
        (
            "PLD",
            "replace one",
            _bound(prices["pld_replace_one"]),
            f"the same schedule, one {_safe(report['headline']['unit'])} exchanged",
        ),
        *_second_replace_one(prices),
        (
            "PRV",
            "add/remove",
            _bound(prices["prv"]),
            _safe(prices["prv_note"]) or "cross-check, other method",
        ),
        ("RDP", "add/remove", _bound(prices["rdp"]), "always valid, looser"),
        (
            "RDP filter",
            "add/remove",
            _bound(prices["gate"]),
            f"what the ledgers count by, at order {_value(order)}",
        ),
    ]
    agree = {True: "agree within their error", False: "disagree", None: "could not be compared"}
    at = [[_bound(entry["delta"]), _bound(entry["epsilon"])] for entry in prices["at_deltas"]]
    other = _table([f"{_DELTA}", f"#{_EPSILON} (PLD, add/remove)"], at, kind="narrow") if at else ""
    lead = (
        f"<b>{_safe(prices['schedule'])}.</b> This is the price of the plan: {_safe(prices['meaning'])}. "
        "What a client has really spent is counted by the RDP filter, which stays valid when plans change "
        "on the way and covers every run in its ledger; for the same schedule it is the larger number."
    )
    foot = (
        f'<p class="note"><b>Accountants:</b> {_safe(prices["accountant"])}. '
        f"They {agree[prices['accountants_agree']]}. "
        f"<b>Replace-one in the headline:</b> {_epsilon(swap['epsilon'])}, {_safe(swap['basis'])}.</p>"
    )
    heads = ["Accountant", "Neighbouring data sets", f"#{_EPSILON} at {_DELTA} = {_bound(delta)}", "Use"]
    return _section("What the plan costs", f'<div class="pair">{_table(heads, rows)}{other}</div>{foot}', "cost", lead)


def _second_replace_one(prices: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """Returns the rows of the other accountants for replacing; none in reports of before there were any."""
    if "saddle_replace_one" not in prices:
        return []
    note = _safe(prices["saddle_note"]) or "cross-check, other method"
    return [
        ("Second method", "replace one", _bound(prices["saddle_replace_one"]), note),
        ("RDP", "replace one", _bound(prices["rdp_replace_one"]), "always valid, looser"),
    ]


def _chain(report: Mapping[str, Any]) -> str:
    """Returns the guarantee chain with who answers for each link."""
    kinds = {"enforced": "good", "declared by holder": "word", "not enforced": "bad"}
    rows = [
        [
            _safe(row["name"]),
            _safe(row["words"]),
            f'<span class="chip {kinds.get(row["standing"], "bad")}">{_safe(row["standing"])}</span>',
        ]
        for row in report["assumptions"]
    ]
    lead = (
        "The order in which a client handles every release, then what the figures rest on. Where one of "
        "these is not enforced, no finite figure is printed."
    )
    return _section(
        "What the figures rest on",
        _table(["Rule", "In words", "Who answers for it"], rows, kind="words"),
        "chain",
        lead,
    )


def _coverage(report: Mapping[str, Any]) -> str:
    """Returns what is covered beside what is not."""
    boxes = []
    for name, title, kind in (("covered", "Covered", "yes"), ("not_covered", "Not covered", "no")):
        items = "".join(f"<li>{_safe(text)}</li>" for text in report[name])
        boxes.append(f'<div class="{kind}"><h3>{title}</h3><ul>{items}</ul></div>')
    return _section("What is covered and what is not", f'<div class="columns">{"".join(boxes)}</div>', "coverage")


def _adversaries(report: Mapping[str, Any]) -> str:
    """Returns who sees what."""
    rows = [[_safe(row["who"]), _safe(row["sees"]), _safe(row["protected_by"])] for row in report["adversaries"]]
    table = _table(["Who", "Sees", "What protects the data holder"], rows, kind="words")
    return _section("Who sees what, and what protects from them", table, "adversaries")


def _witness(report: Mapping[str, Any]) -> str:
    """Returns what the receipts prove."""
    witness = report["witness"]
    entries = [(_name(key).capitalize(), _safe(text)) for key, text in witness.items()]
    return _section("Receipts and witnesses", _pairs(entries), "witness")


def _how(report: Mapping[str, Any]) -> str:
    """Returns how noise and batches were made."""
    entries = [(_name(key).capitalize(), _safe(text)) for key, text in report["mechanism"].items()]
    rows = [[_safe(row["what"]), _safe(row["assumed"]), _safe(row["actual"])] for row in report["sampling"]]
    table = _table(["Sampling", "Assumed by the accountants", "What the code does"], rows, kind="words")
    heads = ["Use of private data", "Accounted for", "In words"]
    uses = [[_safe(row["access"]), _safe(row["accounted"]), _safe(row["words"])] for row in report["accesses"]]
    limits = "".join(f"<li>{_safe(text)}</li>" for text in report["limits"])
    return _section(
        "How it was done", f"{_pairs(entries)}{table}{_table(heads, uses, kind='words')}<ul>{limits}</ul>", "how"
    )


def _empirical(report: Mapping[str, Any]) -> str:
    """Returns what an audit found, in its own words."""
    found = report["empirical"]
    entries = [("Status", _safe(found["status"])), ("Meaning", _safe(found["words"]))]
    audit = found.get("audit", {})
    bounds = audit.get("bounds", ()) if isinstance(audit, Mapping) else ()
    rows = [
        [
            _safe(row.get("audit", "")),
            _safe("holds" if row.get("holds") else "contradicted"),
            _safe(_floor_words(row.get("epsilon_lower", row.get("epsilon", UNKNOWN)))),
            _safe(figure_words(row.get("epsilon_upper", UNKNOWN))),
            _safe(f"{row.get('correct', '-')} of {row.get('guesses', '-')}"),
            _safe(_percent(row.get("confidence", UNKNOWN))),
            _safe(_floor_words(row.get("ceiling", UNKNOWN))),
            _safe(row.get("threat_model", "")),
        ]
        for row in bounds
        if isinstance(row, Mapping)
    ]
    heads = ("Audit", "Verdict", "#ε from below", "#ε claimed", "#Right guesses", "#Confidence", "#Ceiling", "Attacker")
    table = _table(heads, rows, kind="words") if rows else ""
    entries += [
        (_name(key).capitalize(), _value(item))
        for key, item in (audit.items() if isinstance(audit, Mapping) else ())
        if key != "bounds"
    ]
    return _section("Empirical evidence", f"{table}{_pairs(entries)}", "empirical")


def _simulation(report: Mapping[str, Any]) -> str:
    """Returns what only a simulation may show; nothing in a deployment."""
    facts = report.get("simulation_only")
    if facts is None:
        return ""
    lead = (
        "This section exists because one machine simulated all clients and could look at their data. It is "
        "not covered by any figure above, and a deployment never has it."
    )
    body = f"<p>{_safe(facts['partition'])}</p>" if facts.get("partition") else ""
    table = facts.get("label_table")
    if table:
        names = facts.get("class_names") or [str(index) for index in range(len(table[0]))]
        caption = "How the records were split over the clients."
        if len(table) > _BARS:
            caption += f" {_BARS} of {len(table):,} clients, evenly spaced."
        picture = partition_picture(table, names)
        body += f'<figure class="wide">{picture}<figcaption>{caption}</figcaption></figure>'
    if facts.get("sizes"):
        sizes = sorted(facts["sizes"])
        entries = [
            ("Records in all", f"{sum(sizes):,}"),
            ("Smallest client", f"{sizes[0]:,}"),
            ("Median client", f"{statistics.median(sizes):,.1f}".removesuffix(".0")),
            ("Largest client", f"{sizes[-1]:,}"),
        ]
        body += _pairs(entries, "facts")
    if facts.get("truth"):
        truth = facts["truth"]
        entries = (
            [(_name(key).capitalize(), _value(item)) for key, item in truth.items()]
            if isinstance(truth, Mapping)
            else [("Truth", _value(truth))]
        )
        body += _pairs(entries)
    return _section("Simulation only", body, "simulation", lead)


def _software(report: Mapping[str, Any]) -> str:
    """Returns versions, hashes and every setting, for whoever wants to repeat the run."""
    software = report["software"]
    plain = [
        (_name(key).capitalize(), f"<code>{_value(item)}</code>" if key.endswith("hash") else _value(item))
        for key, item in software.items()
        if key != "versions"
    ]
    signature = report["signature"]
    signed = (
        f"by the {_safe(signature['by'])}, key <code>{_safe(signature['public_key'])}</code>; compare it with the key "
        "that you were given another way, and check the file with <code>tacit verify</code>"
        if signature
        else "not signed: only the receipts in it speak for its figures"
    )
    plain.insert(0, ("Report id", f"<code>{_safe(report['report_id'])}</code>"))
    plain.insert(1, ("Signed", signed))
    groups = [
        ("Versions", software["versions"]),
        ("Plan", report["plan"]),
        ("Local optimiser", report["local"]),
    ]
    groups.append(("Scenario", report["config"]))
    tables = ""
    for title, group in groups:
        if group:
            entries = [(_name(key), _value(item)) for key, item in group.items()]
            tables += f"<div><h3>{title}</h3>{_pairs(entries, 'small')}</div>"
    return _section("Versions, hashes and settings", f'{_pairs(plain)}<div class="groups">{tables}</div>', "software")


_STYLE: Final = """
:root{--paper:#fbfaf7;--card:#fff;--ink:#1b2430;--soft:#55606e;--rule:#e3e1da;--blue:#0072b2;--orange:#d55e00;
--amber:#e69f00;--grey:#9ca3af;--teal:#0b6e6e;--good:#0b6e4f;--good-bg:#e2f2ea;--bad:#a32b00;--bad-bg:#fde8dd;
--word:#5b4a00;--word-bg:#faf0cf;--dash:#374151}
@media (prefers-color-scheme:dark){:root{--paper:#11161d;--card:#181f28;--ink:#e6e9ee;--soft:#a3adba;
--rule:#2c3541;
--blue:#56b4e9;--orange:#ff8c42;--amber:#f0b93a;--grey:#7b8794;--teal:#5cc5c0;--good:#7fdcb4;--good-bg:#123527;
--bad:#ffb08a;--bad-bg:#432012;--word:#f0d887;--word-bg:#3a3110;--dash:#c4ccd6}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--paper);color:var(--ink);font:1rem/1.55 system-ui,-apple-system,"Segoe UI",
Roboto,
"Noto Sans","DejaVu Sans",sans-serif}
main{max-width:66rem;margin:0 auto;padding:2.2rem 1.4rem 4rem}
h1,h2,h3,p,ul,dl,figure{margin:0}
h1{font:600 2.3rem/1.15 Georgia,"Times New Roman","DejaVu Serif",serif;letter-spacing:-.01em}
h2{font:600 1.45rem/1.25 Georgia,"Times New Roman","DejaVu Serif",serif;margin-bottom:.6rem}
h3{font-size:1rem;margin-bottom:.35rem}
section{margin-top:2.8rem}
code{font:.86em ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;
overflow-wrap:anywhere}
sup{line-height:0}
.mark{color:var(--teal);margin-bottom:1.1rem}
.mark b{font:italic 600 1.35rem Georgia,"DejaVu Serif",serif}
.mark i{color:var(--soft);font-size:.92rem;margin-left:.5rem}
.about{font-size:1.1rem;color:var(--soft);margin:.3rem 0 1.2rem}
.facts{display:flex;flex-wrap:wrap;gap:.75rem 2rem;padding:.9rem 0;border-top:1px solid var(--rule);
border-bottom:1px solid var(--rule);margin-bottom:1.2rem}
dt{color:var(--soft);font-size:.8rem}
dd{margin:0;overflow-wrap:anywhere}
.headline{background:var(--card);border:1px solid var(--rule);border-left:.45rem solid var(--teal);
border-radius:.6rem;
padding:1.4rem 1.5rem;margin-top:1.6rem}
.headline.open{border-left-color:var(--amber)}
.headline.none{border-left-color:var(--orange)}
.person{font-size:.97rem;padding-bottom:.8rem;margin-bottom:.9rem;border-bottom:1px solid var(--rule)}
.sentence{font:400 1.32rem/1.42 Georgia,"Times New Roman","DejaVu Serif",serif}
.why{margin-top:.9rem;color:var(--bad)}
.tiles{display:grid;grid-template-columns:1.25fr 1.25fr 1fr 1fr 1fr;gap:.7rem;margin:1.2rem 0 1rem}
.tile{border:1px solid var(--rule);border-radius:.5rem;padding:.75rem .85rem;background:var(--paper)}
.tile b{display:block;font:600 1.6rem/1.15 Georgia,"DejaVu Serif",serif;font-variant-numeric:lining-nums;
overflow-wrap:anywhere}
.tile.main b{font-size:2.1rem;color:var(--teal)}
.open .tile.main b{color:var(--word)}
.none .tile.main b{color:var(--bad)}
.tile span{display:block;font-size:.88rem;margin-top:.25rem}
.tile small{display:block;color:var(--soft);font-size:.8rem;line-height:1.35;margin-top:.15rem}
.note,.lead,figcaption,caption{color:var(--soft);font-size:.9rem}
.lead{margin-bottom:1rem;max-width:54rem;font-size:.95rem}
.note b,.lead b{color:var(--ink)}
.warnings{margin-top:.9rem;padding:.7rem 1rem .7rem 2.1rem;background:var(--word-bg);color:var(--word);
border-radius:.5rem;font-size:.93rem}
.figures{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:1.2rem;margin-bottom:1.2rem}
figure{background:var(--card);border:1px solid var(--rule);border-radius:.6rem;padding:.9rem .9rem .7rem}
figure.wide{max-width:46rem;overflow-x:auto}
figure.wide svg{min-width:30rem}
figcaption{margin-top:.4rem}
figure.row{grid-column:1/-1;display:grid;grid-template-columns:1fr 1fr;gap:1.2rem;align-items:center}
.empty{padding:1rem;border:1px dashed var(--rule);border-radius:.6rem;color:var(--soft)}
svg{display:block;width:100%;height:auto}
svg .paper{fill:none}
svg text{fill:var(--soft)}
svg .strong{fill:var(--ink)}
svg .grid{stroke:var(--rule)}
svg .axis{stroke:var(--soft)}
svg .s1{stroke:var(--blue)}svg .d1,svg .f1{fill:var(--blue)}
svg .s2{stroke:var(--orange)}svg .s3{stroke:var(--dash)}
svg .k2{stroke:var(--amber)}svg .f2{fill:var(--amber)}
svg .k3{stroke:var(--grey)}svg .f3{fill:var(--grey)}
svg .band{fill:var(--blue)}svg .band-key{stroke:var(--blue);stroke-opacity:.35}
svg .cell{stroke:var(--card)}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:.9rem;margin-bottom:.8rem}
caption{text-align:left;padding-bottom:.4rem}
th,td{text-align:left;vertical-align:top;padding:.42rem .7rem .42rem 0;border-bottom:1px solid var(--rule);
font-weight:400}
thead th{color:var(--soft);font-size:.8rem;vertical-align:bottom;border-bottom:1.5px solid var(--soft)}
tbody th{font-weight:600;overflow-wrap:anywhere;min-width:6.4rem}
.n+td:not(.n){padding-left:1.1rem}
.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
thead .n{white-space:normal}
.clients{font-size:.86rem}
.clients th,.clients td{padding-right:.8rem}
.clients code{white-space:nowrap}
.bar{display:inline-block;width:3.4rem;height:.5rem;border-radius:.25rem;background:var(--rule);margin-right:.5rem;
overflow:hidden;vertical-align:middle}
.bar i{display:block;height:100%;background:var(--blue)}
.chip{display:inline-block;padding:.02rem .5rem;border-radius:.7rem;font-size:.82rem;white-space:nowrap}
.good{background:var(--good-bg);color:var(--good)}
.bad{background:var(--bad-bg);color:var(--bad)}
.word{background:var(--word-bg);color:var(--word)}
.pair{display:grid;grid-template-columns:minmax(0,1fr) auto;gap:0 2.5rem;align-items:start}
.columns{display:grid;grid-template-columns:1fr 1.25fr;gap:1.2rem}
.columns>div{background:var(--card);border:1px solid var(--rule);border-radius:.6rem;padding:1rem 1.1rem;
border-top:.3rem solid var(--good)}
.columns>.no{border-top-color:var(--orange)}
ul{padding-left:1.15rem}
.columns li{margin-bottom:.4rem;font-size:.93rem}
.pairs{font-size:.93rem;margin-bottom:1rem}
.pairs>div{display:grid;grid-template-columns:10.5rem minmax(0,1fr);gap:1rem;padding:.38rem 0;
border-bottom:1px solid var(--rule)}
.pairs dt{font-size:.88rem}
#simulation{border:1.5px dashed var(--amber);border-radius:.6rem;padding:1.2rem 1.3rem}
#simulation .facts{border-bottom:0;margin:1rem 0 0}
#simulation figure{margin-top:.8rem}
.groups{columns:3 15rem;column-gap:2.2rem}
.groups>div{margin-bottom:1.2rem}
.small{font-size:.82rem}
.small>div{display:flex;justify-content:space-between;gap:1rem;border-bottom:1px solid var(--rule);
padding:.14rem 0;
break-inside:avoid}
.small dd{text-align:right}
@media screen and (max-width:56rem){.tiles{grid-template-columns:repeat(6,1fr)}.tile{grid-column:span 2}
.tile.main{grid-column:span 3}.pair,.columns{grid-template-columns:minmax(0,1fr)}}
@media screen and (max-width:42rem){main{padding:1.3rem .9rem 3rem}h1{font-size:1.8rem}
.sentence{font-size:1.12rem}
.headline{padding:1.1rem 1rem}.figures,figure.row{grid-template-columns:minmax(0,1fr)}
.tile.main b{font-size:1.65rem}
.tile{grid-column:span 3;padding:.6rem .65rem}.tile b{font-size:1.35rem}.pairs>div{grid-template-columns:1fr;
gap:0}
section{margin-top:2.1rem}.facts{gap:.6rem 1.5rem}.tile:last-child{grid-column:span 6}
.scroll table:not(.words,.narrow){min-width:34rem}.words thead{display:none}.words tr{display:block;
padding:.5rem 0;
border-bottom:1px solid var(--rule)}.words th,.words td{display:block;border:0;padding:.1rem 0}}
@media print{@page{size:A4;margin:14mm 13mm}
:root{--paper:#fff;--card:#fff;--ink:#111;--soft:#4a5360;--rule:#d9d7d0;--blue:#0072b2;--orange:#d55e00;--amber:#e69f00;
--grey:#9ca3af;--teal:#0b6e6e;--good:#0b6e4f;--good-bg:#e2f2ea;--bad:#a32b00;--bad-bg:#fde8dd;--word:#5b4a00;
--word-bg:#faf0cf;--dash:#374151;color-scheme:light}
html{font-size:11.5px;-webkit-print-color-adjust:exact;print-color-adjust:exact}
main{max-width:none;padding:0}section{margin-top:2rem}
h2,h3,.lead,thead{break-after:avoid}tr,figure,.tile,.headline,.columns>div,.warnings,.pairs>div,.facts{break-inside:avoid}
thead{display:table-header-group}.scroll{overflow:visible}
.clients{font-size:9px}.clients th,.clients td{padding-right:.5rem}.clients .bar{width:2rem}
.clients tbody th{min-width:0}}
"""
