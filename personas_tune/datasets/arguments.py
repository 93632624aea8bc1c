"""What the dataset builders are given, checked: torchtune hands on whatever a YAML holds."""

from numbers import Integral

from personas_tune.errors import ConfigError


def require(right: bool, argument: str, value: object, remedy: str) -> None:
    """Refuse an argument that can't be used.

    Raises:
        ConfigError: If it isn't ``right``; says what to use, which is ``remedy``.
    """
    if not right:
        raise ConfigError(f"{value!r} can't be used", where=f"dataset.{argument}", remedy=remedy)


def require_whole(argument: str, value: object, least: int) -> None:
    """Refuse what is no whole number of ``least`` or more.

    Raises:
        ConfigError: As :func:`require`.
    """
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    require(whole and int(value) >= least, argument, value, f"use a whole number of {least} or more")  # type: ignore[call-overload]
