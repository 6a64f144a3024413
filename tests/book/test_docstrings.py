"""Plain docstrings become valid reStructuredText."""

import pytest

import docstrings


@pytest.mark.parametrize(
    ("plain", "restructured"),
    [
        ("a `name` here", "a ``name`` here"),
        ("read as `Event`s", r"read as ``Event``\ s"),
        ("2 * x | y", r"2 \* x \| y"),
        ("ends_ with", r"ends\_ with"),
        ("snake_case stays", "snake_case stays"),
        ("a single ` is text", r"a single \` is text"),
    ],
)
def test_signs_of_restructured_text_are_escaped(plain, restructured):
    assert docstrings.escaped(plain) == restructured


def processed(text):
    lines = text.splitlines()
    docstrings.as_written(None, "function", "f", None, None, lines)
    return "\n".join(lines)


def test_aligned_columns_stay_as_they_stand():
    assert "   x  [n]  an array\n   n  int  its length" in processed("Sum.\n\nx  [n]  an array\nn  int  its length")


def test_a_later_paragraph_of_prose_is_prose():
    assert processed("First.\n\nSecond one,\nfolded.").endswith("Second one, folded.\n")


def test_fields_of_a_named_tuple_are_skipped():
    assert docstrings.skip(None, "class", "x", type("F", (), {"__doc__": "Alias for field number 0"}), False, None)
