import pytest

from personas_tune import errors
from personas_tune.errors import ConfigError, DataError, PersonasTuneError, SeveralErrors, raise_together


def test_an_error_is_one_line_of_place_mistake_and_remedy():
    error = DataError("rating 7 is\nabove\tthe scale", where="log.csv row 2", remedy="mend  the row")
    assert str(error) == "log.csv row 2: rating 7 is above the scale; mend the row"
    assert error.lines == [str(error)]


def test_place_and_remedy_may_be_left_out():
    assert str(ConfigError("no log")) == "no log"
    assert str(ConfigError("no log", where="data.path")) == "data.path: no log"
    assert str(ConfigError("no log", remedy="set one")) == "no log; set one"


def test_no_error_raises_nothing():
    raise_together([])


def test_one_error_is_raised_as_it_is():
    error = DataError("no log")
    with pytest.raises(DataError) as caught:
        raise_together([error])
    assert caught.value is error


def test_several_errors_keep_their_lines_and_their_order():
    inner = SeveralErrors([ConfigError("b"), ConfigError("c")])
    with pytest.raises(SeveralErrors) as caught:
        raise_together([DataError("a"), inner, DataError("d")])
    assert caught.value.lines == ["a", "b", "c", "d"]
    assert str(caught.value) == "a\nb\nc\nd"


def test_every_error_of_ours_belongs_to_one_tree():
    ours = [each for each in vars(errors).values() if isinstance(each, type) and issubclass(each, Exception)]
    assert len(ours) > 5
    assert all(issubclass(each, PersonasTuneError) for each in ours)
