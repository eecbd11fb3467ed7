"""Arithmetic that a model may ask for: numbers, operators and a few functions, nothing else."""

import ast
import math
import operator
from collections.abc import Callable
from typing import Any

LONGEST = 500  # characters of an expression
_BITS = 1024  # of a whole number; one that is printed has about 300 digits
_SPELLED = str.maketrans({"×": "*", "·": "*", "÷": "/", "−": "-", "^": "**"})
Number = int | float


class CalculatorError(Exception):
    """The expression has no value here; the text says why."""


def calculate(expression: str) -> str:
    """The value of an arithmetic expression, as `7`, `-0.5` or `1e+30`; whole numbers are exact.

    Raises:
        CalculatorError: it is no such expression, it has no value, or it takes too much to compute.
    """
    if len(expression) > LONGEST:
        raise CalculatorError(f"the expression has {len(expression)} characters; use {LONGEST} at most")
    try:
        tree = ast.parse(expression.translate(_SPELLED).strip(), mode="eval")
        found = _value(tree.body)
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        said = error.msg if isinstance(error, SyntaxError) else str(error)
        raise CalculatorError(f"not an arithmetic expression ({said or 'too deep'})") from error
    except ZeroDivisionError as error:
        raise CalculatorError("division by zero") from error
    except OverflowError as error:
        raise CalculatorError("the result is too large") from error
    if isinstance(found, float) and found.is_integer() and abs(found) < 1e15:
        return str(int(found))
    return str(found) if isinstance(found, int) else f"{found:.12g}"


def _value(node: ast.AST) -> Number:
    match node:
        case ast.Constant(value=bool() | complex()):
            raise CalculatorError(f"{ast.unparse(node)} is no number")
        case ast.Constant(value=int() | float() as number):
            return _checked(number)
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _UNARY:
            return _UNARY[type(op)](_value(operand))
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            return _checked(_power(_value(left), _value(right)))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            return _checked(_BINARY[type(op)](_value(left), _value(right)))
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in _FUNCTIONS:
            return _call(name, [_value(each) for each in args])
        case ast.Name(id=name) if name in _CONSTANTS:
            return _CONSTANTS[name]
    raise CalculatorError(
        f"{ast.unparse(node)[:50]!r} is not known; there are numbers, + - * / // % ** and {', '.join(_FUNCTIONS)}"
    )


def _checked(value: Any) -> Number:
    if isinstance(value, int) and value.bit_length() > _BITS:
        raise CalculatorError("the result is too large")
    if isinstance(value, complex) or (isinstance(value, float) and not math.isfinite(value)):
        raise CalculatorError("the result is no finite real number")
    number: Number = value
    return number


def _power(base: Number, exponent: Number) -> Any:
    if isinstance(base, int) and isinstance(exponent, int) and base.bit_length() * abs(exponent) > 2 * _BITS:
        if abs(base) > 1:
            raise CalculatorError("the result is too large")
        exponent %= 2  # 0, 1 and -1
    return base**exponent


def _call(name: str, values: list[Number]) -> Number:
    try:
        return _checked(_FUNCTIONS[name](*values))
    except TypeError as error:
        raise CalculatorError(f"{name}: {error}") from error
    except ValueError as error:
        raise CalculatorError(f"{name} has no value there") from error


_UNARY: dict[type, Callable[[Number], Number]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}
_BINARY: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "abs": abs,
    "min": min,
    "max": max,
    "round": round,
    "sqrt": math.sqrt,
    "floor": math.floor,
    "ceil": math.ceil,
    "gcd": math.gcd,
    "lcm": math.lcm,
    "exp": math.exp,
    "log": math.log,
    "sin": math.sin,
    "cos": math.cos,
    "tan": math.tan,
}
_CONSTANTS = {"pi": math.pi, "e": math.e}
