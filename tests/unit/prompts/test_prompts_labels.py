import pytest

from personas_tune.prompts.labels import rating_labels


@pytest.mark.parametrize(
    ("scale", "labels"),
    [
        ((1, 5, 1), ["1", "2", "3", "4", "5"]),
        ((0.5, 2, 0.5), ["0.5", "1", "1.5", "2"]),
        ((0, 0.3, 0.1), ["0", "0.1", "0.2", "0.3"]),
        ((-1, 1, 0.5), ["-1", "-0.5", "0", "0.5", "1"]),
        ((0, 100, 50), ["0", "50", "100"]),
        ((1000000, 1000002, 1), ["1000000", "1000001", "1000002"]),
        ((1, 2, 0.25), ["1", "1.25", "1.5", "1.75", "2"]),
    ],
)
def test_labels_are_the_ratings_of_the_scale_without_needless_decimals(scale, labels):
    assert rating_labels(*scale) == labels


def test_labels_read_as_numbers_give_the_scale_back():
    labels = rating_labels(-0.3, 9.7, 0.1)
    assert [float(label) for label in labels] == [round(-0.3 + 0.1 * i, 1) for i in range(101)]
