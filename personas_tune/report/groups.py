"""The personas: how many, where their users lie, what they say, and whether their own adapters fit them better."""

from collections.abc import Mapping, Sequence
from typing import Any

from personas_tune.report.charts import draw_curve, draw_map, draw_matrix, draw_ranked
from personas_tune.report.figure import BROAD, Absent, Figure, write_panels
from personas_tune.report.markup import count, number
from personas_tune.report.plots import padded
from personas_tune.report.run import Run

_N_WORDS = 12
_N_MARKERS = 16  # different ones
_FLOOR = 0.05  # shades are of deviations of so large a share of the error, or larger ones
_N_WITH_ROOM = 6  # so many columns of a matrix can have three decimals
_OLD = "{} doesn’t have it; run persona_cluster again"
_NO_STAGE = "there is no personas/ folder"


def persona_figures(run: Run) -> list[Figure | Absent]:
    """Map, elbow, silhouette, words and the matrix of adapters."""
    return [_map(run), _elbow(run), _silhouette(run), _words(run), *_own_versus_other(run)]


def _map(run: Run) -> Figure | Absent:
    title = "Users by persona"
    if run.personas is None or run.clustering is None:
        return Absent("map", title, _NO_STAGE)
    if not {"x", "y"} <= set(run.personas.column_names):
        return Absent("map", title, _OLD.format("personas/personas.parquet"))
    groups: dict[str, list[tuple[float, float]]] = {}
    for row in sorted(run.personas.to_pylist(), key=lambda row: (row["persona"], row["user_id"])):
        groups.setdefault(str(row["persona"]), []).append((row["x"], row["y"]))
    sizes = sorted(map(len, groups.values()))
    repeated = f" Markers repeat after {_N_MARKERS} personas." if len(groups) > _N_MARKERS else ""
    return Figure(
        "map",
        title,
        f"Profiles in two dimensions (PCA of their embeddings): users who lie close have similar ones. Each persona "
        f"has a marker, and its number stands at its middle; they have {sizes[0]} to {sizes[-1]} users.{repeated}",
        draw_map(groups),
        told="Map of users by persona; "
        + ", ".join(f"persona {name}: {count(len(points), 'user')}" for name, points in groups.items()),
    )


def _elbow(run: Run) -> Figure | Absent:
    title = "How many personas: inertia"
    if run.clustering is None:
        return Absent("elbow", title, _NO_STAGE)
    points = [(each["k"], each["inertia"]) for each in run.clustering["range"]]
    told = ", ".join(f"{k}: {number(value, 2)}" for k, value in points)
    elbow = run.clustering["elbow"]
    says = (
        f"Squared distances to the centres fall with every persona; the bend is at {elbow}."
        if elbow
        else "Squared distances to the centres by number of personas."
    )
    return Figure(
        "elbow",
        title,
        f"{says}{_stability(run.clustering)}",
        _by_k(run.clustering, points, "inertia"),
        told=f"Inertia by k: {told}",
    )


def _stability(clustering: Mapping[str, Any]) -> str:
    stability = clustering.get("stability")
    if not stability or stability.get("mean") is None:
        return ""
    return (
        f" Grouped again with {count(len(stability['seeds']), 'seed')}, the groups agree by an adjusted Rand index of "
        f"{number(stability['mean'], 2)} on average and {number(stability['low'], 2)} at least "
        "(1: the same groups, 0: chance)."
    )


def _silhouette(run: Run) -> Figure | Absent:
    title = "How many personas: silhouette"
    if run.clustering is None:
        return Absent("silhouette", title, _NO_STAGE)
    points = [(each["k"], each["silhouette"]) for each in run.clustering["range"] if each["silhouette"] is not None]
    if not points:
        return Absent("silhouette", title, "it needs at least two personas")
    best = max(points, key=lambda point: float(point[1]))
    says = (
        f"How much closer users are to their own persona than to the next one, from \N{MINUS SIGN}1 to 1; highest at "
        f"{best[0]} with {number(best[1], 2)}. Values near 0 are groups that run into each other."
    )
    told = "Silhouette by k: " + ", ".join(f"{k}: {number(value)}" for k, value in points)
    return Figure("silhouette", title, says, _by_k(run.clustering, points, "silhouette"), told=told)


def _by_k(clustering: Mapping[str, Any], points: Sequence[tuple[int, float]], name: str) -> Any:
    ks = [each["k"] for each in clustering["range"]]
    x = (min(ks) - 0.4, max(ks) + 0.4)
    chosen = {f"taken: {clustering['k']}": clustering["k"]}
    ticks = [(float(k), str(k)) for k in ks]
    return draw_curve(x, padded([value for _, value in points], 0.1), points, ("personas", name), chosen, ticks)


def _words(run: Run) -> Figure | Absent:
    title = "What sets the personas apart"
    if run.clustering is None:
        return Absent("words", title, _NO_STAGE)
    words: Mapping[str, Any] = run.clustering.get("words") or {}
    if not any(words.values()):
        return Absent("words", title, _OLD.format("personas/clustering.json"))
    names = sorted(words, key=int)
    panels = [
        (f"persona {name}", draw_ranked([_word(entry) for entry in words[name][:_N_WORDS]], at))
        for at, name in enumerate(names)
    ]
    told = "; ".join(
        f"persona {name}: " + ", ".join(entry["word"] for entry in words[name][:_N_WORDS]) for name in names
    )
    return Figure(
        "words",
        title,
        "Words that a persona’s profiles have more often than the others’, the most distinct first; bars are scores.",
        write_panels(panels, "multiples"),
        told=f"Distinct words. {told}",
        size=BROAD,
    )


def _word(entry: Mapping[str, Any]) -> tuple[str, float, str]:
    users = entry.get("n_users")
    told = f"score {number(entry['score'])}" + ("" if users is None else f", {count(users, 'user')}")
    return str(entry["word"]), float(entry["score"]), told


def _own_versus_other(run: Run) -> list[Figure | Absent]:
    title = "Own adapter against the others"
    matrices: Mapping[str, Any] = run.metrics.get("own_versus_other") or {}
    if not matrices:
        return [Absent("own-versus-other", title, "the evaluation was not asked for it")]
    panels = [(agent, _adapters(matrix)) for agent, matrix in matrices.items()]
    told = "; ".join(f"{agent}: {_own_wins(matrix)}" for agent, matrix in matrices.items())
    return [
        Figure(
            "own-versus-other",
            title,
            "RMSE of every adapter (row) on every persona’s users (column). A fuller shade is a lower error than the "
            "column’s highest, on one scale for all columns; the persona’s own adapter is framed. If adapters were "
            f"alike, the own one would come out lowest for about 1 of K personas. {told}.",
            write_panels(panels),
            told=f"RMSE of adapters on personas. {told}",
        )
    ]


def _adapters(matrix: Mapping[str, Any]) -> Any:
    columns = list(zip(*matrix["rmse"], strict=True))
    shades = shades_of(matrix["rmse"])
    has_room = len(columns) <= _N_WITH_ROOM
    personas = [
        f"{name}\nn={n:,}" if has_room else str(name) for name, n in zip(matrix["personas"], matrix["n"], strict=True)
    ]
    texts = [[number(value, 3 if has_room else 2) for value in row] for row in matrix["rmse"]]
    return draw_matrix(shades, texts, matrix["adapters"], personas, ("adapter", "persona"), _own_cells(matrix))


def shades_of(errors: Sequence[Sequence[float | None]]) -> list[list[float | None]]:
    """How dark cells are, 0 to 0.75: how far each lies below its column's highest, on one scale for all columns.

    Args:
        errors: Rows of cells; None for empty ones, which have no shade.
    """
    highest = [
        max((value for value in column if value is not None), default=0.0) for column in zip(*errors, strict=True)
    ]
    below = [
        [None if value is None else (top - value) / (top or 1.0) for value, top in zip(row, highest, strict=True)]
        for row in errors
    ]
    scale = max([_FLOOR, *(each for row in below for each in row if each is not None)])
    return [[None if each is None else 0.75 * each / scale for each in row] for row in below]


def _own_cells(matrix: Mapping[str, Any]) -> list[tuple[int, int]]:
    return [
        (row, column)
        for row, adapter in enumerate(matrix["adapters"])
        for column, persona in enumerate(matrix["personas"])
        if str(adapter) == str(persona)
    ]


def _own_wins(matrix: Mapping[str, Any]) -> str:
    own = _own_cells(matrix)
    wins = sum(_is_lowest(matrix["rmse"], row, column) for row, column in own)
    said = f"the own adapter has the lowest error for {wins} of {count(len(own), 'persona')}"
    mean = matrix.get("own_minus_other") or {}
    if mean.get("low") is None or mean.get("high") is None:
        return said
    ends = f"{number(mean['low'], sign=True)} to {number(mean['high'], sign=True)}"
    return f"{said}; own minus other adapters on average {number(mean['difference'], sign=True)} ({ends})"


def _is_lowest(rmse: Sequence[Sequence[float | None]], row: int, column: int) -> bool:
    known = [each[column] for each in rmse if each[column] is not None]
    return bool(known) and rmse[row][column] == min(value for value in known if value is not None)
