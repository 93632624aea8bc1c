"""The answers that a rating scale allows, as text."""


def rating_label(rating: float) -> str:
    """A rating as the text that a model reads and answers, without needless decimals.

    Example:
        >>> rating_label(4.0), rating_label(3.5)
        ('4', '3.5')
    """
    # Rounding hides what adding steps such as 0.1 leaves behind; + 0.0 turns -0.0 into 0.0.
    return f"{round(rating, 6) + 0.0:.6f}".rstrip("0").rstrip(".")


def rating_labels(min: float, max: float, step: float) -> list[str]:
    """Every rating of a scale as its label, lowest first.

    Args:
        min: The lowest rating.
        max: The highest rating, a whole number of steps above ``min``.
        step: The distance between neighbouring ratings.

    Example:
        >>> rating_labels(0.5, 2.0, 0.5)
        ['0.5', '1', '1.5', '2']
    """
    n_steps = round((max - min) / step)
    return [rating_label(min + i * step) for i in range(n_steps + 1)]
