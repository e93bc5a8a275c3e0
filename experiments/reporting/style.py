"""How figures look."""

import io
from typing import Any

GREY, BLUE, ORANGE = "#6b7280", "#1f77b4", "#d9480f"
GREEN, PURPLE = "#2b8a3e", "#7048e8"


def new_figure(width: float, height: float) -> Any:
    """An empty matplotlib figure of this size in inches, which needs no screen."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", dpi=140)
    FigureCanvasAgg(figure)
    return figure


def with_grid(*axes: Any) -> None:
    """Light lines behind the data, and no frame."""
    for each in axes:
        each.grid(color="0.9")
        each.set_axisbelow(True)
        each.spines[["top", "right"]].set_visible(False)


def as_png(figure: Any) -> bytes:
    """The figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
