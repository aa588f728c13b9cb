"""Draws packages on floors, and the imports between them, as an SVG: a layered drawing in the manner of Sugiyama."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from html import escape
from itertools import pairwise

BOX, GAP, BYPASS = (168.0, 44.0), 26.0, 14.0  # size of a box, space between neighbours, width of a passing arrow's lane
FLOOR, MARGIN = 92.0, 24.0  # from floor to floor, around the picture
# Middle tones, legible on white and on black; the picture has no background of its own.
BAND, FILL, TEXT, LINE, WRONG = "#7f8fa4", "#41658a", "#ffffff", "#8294a8", "#d9534f"

Pair = tuple[str, str]
Point = tuple[float, float]


def thin_arrows(arrows: Collection[Pair]) -> set[Pair]:
    """The arrows that no longer path replaces (transitive reduction); `arrows` close no circle."""
    below: dict[str, set[str]] = {}
    for source, target in arrows:
        below.setdefault(source, set()).add(target)

    def reach(start: str) -> set[str]:
        seen: set[str] = set()
        todo = [start]
        while todo:
            new = below.get(todo.pop(), set()) - seen
            seen |= new
            todo += new
        return seen

    return {(s, t) for s, t in arrows if not any(t in reach(other) for other in below[s] - {t})}


def draw_floors(
    floors: Sequence[Sequence[str]], arrows: Collection[Pair], wrong: Collection[Pair], notes: Mapping[str, str]
) -> str:
    """The picture as text of an SVG file; the same for the same arguments.

    Args:
        floors: names of the boxes by floor, from the top.
        arrows: pairs of names, from the box that imports to the box that is imported: down or on one floor, no circle.
        wrong: the arrows that break the rule, drawn all and in another colour.
        notes: name -> a second line in its box.
    """
    level = {name: n for n, floor in enumerate(floors) for name in floor}
    routes = {pair: _route(*pair, level) for pair in sorted(thin_arrows(arrows))}
    rows: list[list[str]] = [list(floor) for floor in floors]
    for route in routes.values():
        for name in route[1:-1]:
            rows[_level_of(name, level)].append(name)
    x = _place(rows, [link for route in routes.values() for link in pairwise(route)], level)

    left = min((x[n] - BOX[0] / 2 for n in level), default=0.0) - 2 * MARGIN
    width = max((x[n] + BOX[0] / 2 for n in level), default=0.0) + 2 * MARGIN - left
    height = FLOOR * len(floors)
    top = {name: _level_of(name, level) * FLOOR + (FLOOR - BOX[1]) / 2 for name in x}
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{left:.0f} 0 {width:.0f} {height:.0f}" width="{width:.0f}" '
        f'height="{height:.0f}" role="img" font-family="system-ui, sans-serif" text-anchor="middle">',
        "<title>Packages by floor; arrows are imports, drawn only if no longer path of arrows implies them</title>",
        *(_marker(name, colour) for name, colour in (("tip", LINE), ("wrong", WRONG))),
    ]
    out += [
        f'<rect x="{left:.0f}" y="{n * FLOOR + MARGIN / 2:.0f}" width="{width:.0f}" height="{FLOOR - MARGIN:.0f}" '
        f'fill="{BAND}" fill-opacity="0.14"/>'
        for n in range(len(floors))
    ]
    for (s, t), route in routes.items():
        if level[s] == level[t]:
            between = any(min(x[s], x[t]) < x[n] < max(x[s], x[t]) for n in rows[level[s]])
            out.append(_draw_level(x[s], x[t], top[s], between))
        else:
            out.append(_draw_down([(x[n], top[n]) for n in route]))
    for s, t in sorted(wrong):
        if level[s] == level[t]:
            out.append(_draw_arc(x[s], x[t], top[s] + BOX[1], WRONG, "wrong"))
        else:
            out.append(_path(f"M{x[s]:.1f} {top[s]:.1f}L{x[t]:.1f} {top[t] + BOX[1]:.1f}", WRONG, "wrong"))
    out += [
        f'<rect x="{x[name] - BOX[0] / 2:.1f}" y="{top[name]:.1f}" width="{BOX[0]:.0f}" height="{BOX[1]:.0f}" rx="6" '
        f'fill="{FILL}"/>\n<text x="{x[name]:.1f}" y="{top[name] + 19:.1f}" fill="{TEXT}" font-size="15" '
        f'font-weight="600">{escape(name)}</text>\n<text x="{x[name]:.1f}" y="{top[name] + 35:.1f}" fill="{TEXT}" '
        f'font-size="11.5">{escape(notes.get(name, ""))}</text>'
        for name in level
    ]
    return "\n".join([*out, "</svg>", ""])


def _route(source: str, target: str, level: Mapping[str, int]) -> list[str]:
    """The names that an arrow goes through: its ends, and a lane of its own on each floor between them."""
    return [source, *(f"{source}>{target}>{n}" for n in range(level[source] + 1, level[target])), target]


def _level_of(name: str, level: Mapping[str, int]) -> int:
    return level[name] if name in level else int(name.rpartition(">")[2])


def _place(rows: list[list[str]], links: list[Pair], level: Mapping[str, int]) -> dict[str, float]:
    """The horizontal centre of every box and lane: near the mean of what it is linked to, without overlap."""
    near: dict[str, list[str]] = {name: [] for row in rows for name in row}
    for s, t in links:
        near[s].append(t)
        near[t].append(s)
    size = {name: BOX[0] if name in level else BYPASS for name in near}
    x = dict.fromkeys(near, 0.0)
    for row in rows:
        _spread(row, size, {name: float(n) for n, name in enumerate(row)}, x)
    for sweep in range(24):
        for row in rows if sweep % 2 == 0 else reversed(rows):
            wish = {n: sum(x[o] for o in near[n]) / len(near[n]) if near[n] else x[n] for n in row}
            row.sort(key=lambda n: (wish[n], n))
            _spread(row, size, wish, x)
    return x


def _spread(row: list[str], size: Mapping[str, float], wish: Mapping[str, float], x: dict[str, float]) -> None:
    """Give each name of a row the place it wishes for, moved as little as keeps the order and the gaps."""
    right = float("-inf")
    for name in row:
        x[name] = max(wish[name], right + size[name] / 2)
        right = x[name] + size[name] / 2 + GAP
    excess = sum(x[n] - wish[n] for n in row) / max(len(row), 1)
    for name in row:
        x[name] -= excess


def _draw_down(points: Sequence[Point]) -> str:
    """A curve from the bottom of the first box past the lanes to the top of the last box."""
    (x, y), *lanes, end = points
    y += BOX[1]
    d = f"M{x:.1f} {y:.1f}"
    for next_x, next_y in [*lanes, end]:
        middle = (y + next_y) / 2
        d += f"C{x:.1f} {middle:.1f} {next_x:.1f} {middle:.1f} {next_x:.1f} {next_y:.1f}"
        x, y = next_x, next_y
        if (x, y) != end:
            y += BOX[1]
            d += f"V{y:.1f}"
    return _path(d, LINE, "tip")


def _draw_level(start: float, end: float, top: float, between: bool) -> str:
    """An arrow to a box on the same floor: straight to the neighbour, below the boxes between."""
    if between:
        return _draw_arc(start, end, top + BOX[1], LINE, "tip")
    side = BOX[0] / 2 if end > start else -BOX[0] / 2
    return _path(f"M{start + side:.1f} {top + BOX[1] / 2:.1f}H{end - side:.1f}", LINE, "tip")


def _draw_arc(start: float, end: float, y: float, colour: str, tip: str) -> str:
    return _path(f"M{start:.1f} {y:.1f}Q{(start + end) / 2:.1f} {y + 40:.1f} {end:.1f} {y:.1f}", colour, tip)


def _path(d: str, colour: str, tip: str) -> str:
    return f'<path d="{d}" fill="none" stroke="{colour}" stroke-width="1.6" marker-end="url(#{tip})"/>'


def _marker(name: str, colour: str) -> str:
    return (
        f'<marker id="{name}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 0L8 4L0 8z" fill="{colour}"/></marker>'
    )
