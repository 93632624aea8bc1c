"""The picture behind the choice of k."""

import io

from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from personas_tune.personas.clustering import PersonaChoice


def draw_choice(choice: PersonaChoice) -> bytes:
    """A PNG of inertia and silhouette against k, with the k taken and the elbow marked.

    Equal choices give equal bytes with one version of matplotlib.
    """
    with style.context("default"):
        figure = Figure(figsize=(8, 3.2), dpi=120, layout="constrained")
        FigureCanvasAgg(figure)
        inertia_axes, silhouette_axes = figure.subplots(1, 2)
        ks = range(1, len(choice.candidates) + 1)
        inertia_axes.plot(ks, [candidate.inertia for candidate in choice.candidates], marker="o")
        inertia_axes.set(title="inertia (lower is tighter)", xlabel="k")
        defined = [(k, value) for k, value in zip(ks, choice.silhouettes, strict=True) if value is not None]
        silhouette_axes.plot([k for k, _ in defined], [value for _, value in defined], marker="o")
        silhouette_axes.set(title="silhouette (higher is better separated)", xlabel="k")
        for axes in (inertia_axes, silhouette_axes):
            _mark(axes, choice)
        image = io.BytesIO()
        figure.savefig(image, format="png", metadata={"Software": None})  # else matplotlib's version is in the bytes
    return image.getvalue()


def _mark(axes: Axes, choice: PersonaChoice) -> None:
    axes.axvline(choice.clusters.k, color="tab:red", label=f"taken: {choice.clusters.k}")
    if choice.elbow is not None:
        axes.axvline(choice.elbow, color="tab:gray", linestyle="--", label=f"elbow: {choice.elbow}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend()
