"""Turn a matplotlib figure into an SVG that lives inside a page: its colours, its fonts, no identifiers that clash.

Colours of a figure are placeholders (`INK`, `ACCENT`, ...), replaced by the page's CSS variables, so one SVG is
right on a light and on a dark page. Metadata, namespaces and dates are cut: the same figure gives the same bytes, and
the page names no address.
"""

from __future__ import annotations

import html
import io
import re
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from unbackdoor.report.escape import shown_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, RULE, ACCENT = "#010203", "#010204", "#010205", "#010206"
_VARIABLES = {
    INK: "currentColor",
    MUTED: "var(--muted, #70757a)",
    RULE: "var(--rule, #9aa0a655)",
    ACCENT: "var(--accent, #2f7f86)",
}
_SETTINGS = {
    "svg.fonttype": "none",
    "svg.hashsalt": "unbackdoor",
    "font.family": ["DejaVu Sans"],
    "font.size": 12.5,
    "axes.unicode_minus": False,
    "text.parse_math": False,
    "path.simplify": True,
}


def new_figure(
    width: float, height: float, *, left: float = 42, right: float = 8, bottom: float = 42, top: float = 8
) -> tuple[Figure, Axes]:
    """Return an empty figure with one set of axes, without pyplot's global state.

    The margins are given, not fitted: fitting draws every figure twice more, and panels side by side should line up.

    Args:
        width: In units of the SVG (a pixel of the page where it is shown unscaled).
        height: Likewise.
        left: Room for the labels on this side.
        right: Likewise.
        bottom: Likewise.
        top: Likewise.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / 72, height / 72))
    figure.subplots_adjust(left / width, bottom / height, 1 - right / width, 1 - top / height)
    figure.patch.set_visible(False)
    axes = figure.add_subplot()
    axes.patch.set_visible(False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(RULE)
    axes.tick_params(colors=RULE, labelcolor=MUTED, length=3, labelsize=12)
    axes.xaxis.label.set_color(MUTED)
    axes.yaxis.label.set_color(MUTED)
    return figure, axes


def to_svg(figure: Figure, name: str, description: str) -> str:
    """Return the figure as an `<svg>` element.

    Args:
        figure: From `new_figure`; drawn in the placeholder colours.
        name: Prefix of the identifiers inside, different for every plot of a page.
        description: What a reader who cannot see it should hear.
    """
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    written = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with drawing():
        FigureCanvasSVG(figure).print_svg(written, metadata=nothing)
    return _for_a_page(written.getvalue(), name, description)


def drawing() -> AbstractContextManager[None]:
    """Return matplotlib's settings of this module as a context; figures are made and written inside it."""
    import matplotlib as mpl

    context: AbstractContextManager[None] = mpl.rc_context(_SETTINGS)
    return context


def _for_a_page(svg: str, name: str, description: str) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\s+xmlns(:\w+)?="[^"]*"', "", svg)
    svg = svg.replace("xlink:href=", "href=")
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    for placeholder, variable in _VARIABLES.items():
        svg = svg.replace(placeholder, variable)
    svg = re.sub(r"font: ([\w. ]*?)([\d.]+)px [^;\"]*", r"font: \1\2px var(--sans, sans-serif)", svg)
    svg = _own_identifiers(svg, re.sub(r"\W+", "-", name).strip("-") or "plot")
    label = html.escape(shown_line(description, 2000), quote=True)
    # Not by re.sub: what is escaped in the label has backslashes.
    return f'<svg role="img" aria-label="{label}"{svg.removeprefix("<svg")}'.strip()


def _own_identifiers(svg: str, prefix: str) -> str:
    """Keep only identifiers that are referred to, and put the plot's name before them."""
    used = set(re.findall(r'href="#([^"]+)"', svg)) | set(re.findall(r"url\(#([^)]+)\)", svg))

    def rename(match: re.Match[str]) -> str:
        return f' id="{prefix}-{match.group(1)}"' if match.group(1) in used else ""

    svg = re.sub(r'\s+id="([^"]+)"', rename, svg)
    return re.sub(r'(href="#|url\(#)', rf"\g<1>{prefix}-", svg)
