"""The answers that a rating scale allows, as text."""


def rating_labels(min: float, max: float, step: float) -> list[str]:
    """Every rating of a scale as the text that a model reads and answers, lowest first.

    Whole numbers have no decimal point.

    Args:
        min: The lowest rating.
        max: The highest rating, a whole number of steps above ``min``.
        step: The distance between neighbouring ratings.

    Example:
        >>> rating_labels(0.5, 2.0, 0.5)
        ['0.5', '1', '1.5', '2']
    """
    n_steps = round((max - min) / step)
    # Rounding hides what adding steps such as 0.1 leaves behind; + 0.0 turns -0.0 into 0.0.
    ratings = [round(min + i * step, 6) + 0.0 for i in range(n_steps + 1)]
    return [f"{rating:.6f}".rstrip("0").rstrip(".") for rating in ratings]
