"""How figures look."""

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
