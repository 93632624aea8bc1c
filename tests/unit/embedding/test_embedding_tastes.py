import pytest

from personas_tune.embedding.tastes import taste_words


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("I love War and Crime.", ["+war", "+and", "+crime"]),
        ("I like war and dislike romance", ["+war", "+and", "-romance"]),
        ("I am neutral about war; I avoid romance", ["0about", "0war", "-romance"]),
        ("I rate often. I prefer Amélie. Sometimes.", ["+amélie"]),  # a stance ends with its sentence
        ("I don't like war", ["-war"]),
        ("She doesn’t dislike war\nand never enjoyed romance", ["+war", "-romance"]),
        ("Not a film fan. I like war", ["+war"]),  # so does a negation
        ("I am cool about war. I love cool jazz", ["-about", "-war", "+cool", "+jazz"]),
        ("Guerre et paix, l'amour", ["+guerre", "+et", "+paix", "+l'amour"]),
        ("  ", []),
    ],
)
def test_words_stand_behind_the_stance_that_governs_them(text, words):
    assert taste_words(text) == words
