import pytest

from bitfleet.launch.parsing.options import take_flag, take_list, take_number, take_option


def test_take_option() -> None:
    assert take_option(["a", "--x", "1", "b"], "--x") == ("1", ["a", "b"])
    assert take_option(["--x=1"], "--x") == ("1", [])
    assert take_option(["a"], "--x") == (None, ["a"])
    assert take_option(["--x-y", "a-b", "--z=c-d", "e-f"], "--x_y") == ("a-b", ["--z=c-d", "e-f"])
    with pytest.raises(ValueError, match="--x needs a value"):
        take_option(["--x"], "--x")


def test_take_number() -> None:
    assert take_number(["a", "--x", "12"], "--x", 3) == (12, ["a"])
    assert take_number(["a"], "--x", 3) == (3, ["a"])
    for value in ("0", "-1", "1.5", "many"):
        with pytest.raises(ValueError, match=f"--x must be a positive number, not '{value}'"):
            take_number(["--x", value], "--x", 3)


def test_take_flag() -> None:
    assert take_flag(["a", "--x", "b"], "--x") == (True, ["a", "b"])
    assert take_flag(["a"], "--x") == (False, ["a"])
    assert take_flag(["--x-y"], "--x_y") == (True, [])


def test_take_list() -> None:
    assert take_list(["a", "--x", "1", "2", "--y", "b"], "--x") == (["1", "2"], ["a", "--y", "b"])
    assert take_list(["--x-y", "1"], "--x_y") == (["1"], [])
    assert take_list(["a", "--y", "b"], "--x") == ([], ["a", "--y", "b"])
    with pytest.raises(ValueError, match="--x needs a value"):
        take_list(["--x", "--y", "1"], "--x")
