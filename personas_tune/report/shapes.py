"""What the report takes for granted of the JSON files that it reads, and a line on the first thing that isn't so."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from personas_tune.errors import DataError
from personas_tune.workspace import STAGE_RECIPES, read_json

Shape = Any  # a mapping of shapes by key, or one of the classes below
_MOST = 1e15  # no figure of a run is greater, infinity and NaN aren't less


@dataclass(frozen=True)
class Value:
    """A value by itself: what it is called, and whether something is one."""

    name: str
    fits: Callable[[Any], bool]


@dataclass(frozen=True)
class Nullable:
    """A shape, or null."""

    of: Shape


@dataclass(frozen=True)
class Many:
    """A list, of so many at least."""

    of: Shape
    least: int = 0


@dataclass(frozen=True)
class Each:
    """An object with the same shape at every key; keys may have to be numbers."""

    of: Shape
    numbered: bool = False


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -_MOST < value < _MOST


NUMBER = Value("a number", _is_number)
COUNT = Value("a whole number of 0 or more", lambda value: _is_number(value) and isinstance(value, int) and value >= 0)
SHARE = Value("a number from 0 to 1", lambda value: _is_number(value) and 0 <= value <= 1)
TEXT = Value("a text", lambda value: isinstance(value, str))
READOUT = Value("a readout", lambda value: value in ("expected", "argmax", "generate"))
MEMORIES = Value("short, long or both", lambda value: value in ("short", "long", "both"))
ENDS = Value(
    "two numbers or nulls",
    lambda value: isinstance(value, list) and len(value) == 2 and all(v is None or _is_number(v) for v in value),
)
_FIGURE = Nullable(NUMBER)

# A key that ends in "?" may be left out.
_SHARES = {
    "js": _FIGURE, "wasserstein": _FIGURE, "variance_ratio": _FIGURE,
    "true": Nullable(Many(NUMBER)), "simulated": Nullable(Many(NUMBER)),
}  # fmt: skip
_DISTRIBUTION = {
    "labels": Many(NUMBER), "overall": _SHARES, "points?": {"js?": _FIGURE},
    "per_user?": {"js?": _FIGURE}, "per_persona?": Each(_SHARES, numbered=True),
}  # fmt: skip
_ERRORS = ("rmse", "mae", "rmse_filled", "mae_filled", "macro_rmse")
_FAITHFULNESS = (
    "accuracy", "within_1", "kappa", "pearson", "spearman", "pairwise_order", "nll", "rps", "ece",
)  # fmt: skip
_ROW = {
    "name": TEXT, "n": COUNT, "n_parsed": COUNT, "urr": SHARE, "rmse_ci": ENDS, "mae_ci": ENDS,
    **dict.fromkeys(_ERRORS, _FIGURE),
    **{f"{figure}?": _FIGURE for figure in _FAITHFULNESS},
    "per_user": Each({"n": COUNT, "sse": NUMBER}),
    "tuned?": Nullable({"label?": NUMBER}),
    "skill?": Nullable(Each(_FIGURE)),
    "distribution?": Nullable(_DISTRIBUTION),
    "confusion?": Nullable(Many(Many(COUNT))),
    "calibration_curve?": Nullable(Many({"predicted": NUMBER, "true": NUMBER})),
}  # fmt: skip
_AGENT = {
    **_ROW, "base": TEXT, "adapters": Nullable(TEXT), "memories": MEMORIES, "readout": READOUT,
    "published?": Nullable({"rmse": _FIGURE, "mae": _FIGURE, "urr": _FIGURE}),
}  # fmt: skip
_DIFFERENCE = {"difference": _FIGURE, "low": _FIGURE, "high": _FIGURE}
_MATRIX = {
    "adapters": Many(TEXT, 1), "personas": Many(TEXT, 1), "n": Many(COUNT, 1), "rmse": Many(Many(_FIGURE, 1), 1),
    "own_minus_other?": Nullable(_DIFFERENCE),
}  # fmt: skip
METRICS = {
    "agents": Many(_AGENT),
    "baselines": Many(_ROW),
    "oracle?": Nullable(_ROW),
    "paired": Many(
        {"a": TEXT, "b": TEXT, **_DIFFERENCE, **{f"{figure}?": Nullable(_DIFFERENCE) for figure in ("mae", "js")}}
    ),
    "settings": {
        "n_users": COUNT, "n_rows": COUNT, "n_resamples": COUNT, "confidence": SHARE, "seed": COUNT,
        "historical_average": TEXT, "traits": TEXT,
    },
    "own_versus_other?": Nullable(Each(_MATRIX)),
}  # fmt: skip
PROMPT = {"labels": Many(TEXT, 1)}
CLUSTERING = {
    "k": COUNT,
    "elbow": Nullable(COUNT),
    "range": Many({"k": COUNT, "inertia": NUMBER, "silhouette": _FIGURE}, 1),
    "stability?": Nullable({"seeds": Many(COUNT), "mean": _FIGURE, "low": _FIGURE}),
    "words?": Nullable(Each(Many({"word": TEXT, "score": NUMBER, "n_users?": Nullable(COUNT)}), numbered=True)),
}
MANIFEST = {"settings?": Each(Value("anything", lambda value: True)), "versions?": Nullable(Each(TEXT))}
EVAL_MANIFEST = {
    **MANIFEST,
    "settings?": {
        "agents?": Nullable(Each(Each(Value("anything", lambda value: True)))),
        "adapter_sets?": Nullable(Each({"share?": _FIGURE})),
    },
}


def read_shaped(path: Path, shape: Shape) -> Any:
    """Read a stage's JSON file that has a shape.

    Raises:
        MissingInputError: If it isn't there.
        DataError: If it is damaged or foreign.
    """
    value = read_json(path)
    if (wrong := mismatch(value, shape)) is not None:
        raise damaged(path, wrong)
    return value


def damaged(path: Path, what: str) -> DataError:
    """What to say of a file of a stage that can't be used."""
    recipes = (STAGE_RECIPES[folder.name] for folder in path.parents if folder.name in STAGE_RECIPES)
    return DataError(what, where=str(path), remedy=f"run {next(recipes)} again")


def mismatch(value: Any, shape: Shape, at: str = "") -> str | None:
    """The first place at which a value hasn't the shape, in words; None if it has.

    Example:
        >>> mismatch({"agents": [{"n": "2"}]}, {"agents": Many({"n": COUNT})})
        'agents[0].n is not a whole number of 0 or more'
        >>> mismatch({}, {"agents": Many(TEXT), "oracle?": TEXT})
        "no 'agents' in it"
    """
    name = at or "it"
    match shape:
        case Value():
            return None if shape.fits(value) else f"{name} is not {shape.name}"
        case Nullable():
            return None if value is None else mismatch(value, shape.of, at)
        case Many():
            if not isinstance(value, list) or len(value) < shape.least:
                return f"{name} is not a list{f' of {shape.least} or more' if shape.least else ''}"
            return _first((each, shape.of, f"{at}[{place}]") for place, each in enumerate(value))
    if not isinstance(value, Mapping):
        return f"{name} is not an object"
    if isinstance(shape, Each):
        if shape.numbered and not all(key.isdecimal() for key in value):
            return f"{name} has a key that is no number"
        return _first((each, shape.of, _below(at, key)) for key, each in value.items())
    needed = (key for key in shape if not key.endswith("?") and key not in value)
    if (missing := next(needed, None)) is not None:
        return f"no {missing!r} in {name}"
    known = {key.removesuffix("?"): of for key, of in shape.items()}
    return _first((value[key], of, _below(at, key)) for key, of in known.items() if key in value)


def _first(parts: Any) -> str | None:
    return next((wrong for part in parts if (wrong := mismatch(*part)) is not None), None)


def _below(at: str, key: str) -> str:
    return f"{at}.{key}" if at else key
