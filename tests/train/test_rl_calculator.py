"""A calculator that computes, and does nothing else."""

import time

import pytest

from drivetrain.train.rl.calculator import CalculatorError, calculate


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("1 + 2 * 3", "7"),
        ("(4+2)/4", "1.5"),
        ("6 / 3", "2"),
        ("1/3", "0.333333333333"),
        ("-7 // 2 + 7 % 4", "-1"),
        ("2^10 − 3×4 ÷ 2", "1018"),
        ("2**100", str(2**100)),
        ("(-1)**100000001 + 0**99999999999", "-1"),
        ("2**-1", "0.5"),
        ("gcd(12, 18) + lcm(4, 6) + abs(-1) + max(1, 2.5) + sqrt(16)", "25.5"),
        ("round(2.567, 2) + floor(1.5) + ceil(1.5)", "5.57"),
        ("cos(pi)", "-1"),
        ("1e300 * 10", "1e+301"),
    ],
)
def test_values(expression: str, value: str) -> None:
    assert calculate(expression) == value


@pytest.mark.parametrize(
    ("expression", "said"),
    [
        ("", "not an arithmetic expression"),
        ("1 +", "not an arithmetic expression"),
        ("two", "'two' is not known"),
        ("__import__('os').system('true')", "is not known"),
        ("(1).__class__", "is not known"),
        ("[1] * 3", "is not known"),
        ("'a' * 3", "is not known"),
        ("abs(x=1)", "is not known"),
        ("True + 1", "True is no number"),
        ("2j", "2j is no number"),
        ("1 / 0", "division by zero"),
        ("0 ** -1", "division by zero"),
        ("9**9**9**9", "too large"),
        ("2**1000 * 2**1000", "too large"),
        ("9999**9999999999999", "too large"),
        ("10.0**400", "too large"),
        ("1e999", "no finite real number"),
        ("(-8)**0.5", "no finite real number"),
        ("sqrt(-1)", "sqrt has no value there"),
        ("gcd(1.5, 2)", "gcd: "),
        ("min()", "min: "),
        ("floor(1, 2)", "floor: "),
        ("-" * 499 + "1", None),
        ("(" * 250 + "1" + ")" * 249, "not an arithmetic expression"),
        ("1+" * 300 + "1", "601 characters; use 500 at most"),
        ("1\0", "not an arithmetic expression"),
        ("9" * 400, "too large"),
    ],
)
def test_what_has_no_value_says_why(expression: str, said: str | None) -> None:
    began = time.monotonic()
    if said is None:
        assert calculate(expression) == "-1"
    else:
        with pytest.raises(CalculatorError, match=said.replace("(", "[(]")):
            calculate(expression)
    assert time.monotonic() - began < 2
