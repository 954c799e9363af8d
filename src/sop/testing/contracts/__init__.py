"""The rules of the protocols as executable sentences: run every rule over every implementation.

    @pytest.mark.parametrize("rule", STORE_RULES)
    def test_my_store_keeps_the_rule(rule, tmp_path):
        rule(lambda: MyStore(tmp_path))

A rule takes a function that opens the thing under test; each call opens the same place again.
"""

from collections.abc import Callable


def require(condition: bool, broken: str) -> None:
    """Fail the contract test with a sentence about what is broken.

    Raises:
        AssertionError: the condition is false.
    """
    if not condition:
        raise AssertionError(broken)


def require_equal(actual: object, expected: object, what: str) -> None:
    """Fail the contract test unless both are equal.

    Raises:
        AssertionError: names what differs, with both values.
    """
    require(actual == expected, f"{what}: expected {expected!r}, got {actual!r}")


def require_raises(error: type[Exception], what: str, call: Callable[..., object], *args: object) -> None:
    """Fail the contract test unless `call(*args)` raises the error.

    Raises:
        AssertionError: the call succeeded. Other exceptions pass through.
    """
    try:
        result = call(*args)
    except error:
        return
    raise AssertionError(f"{what}: expected {error.__name__}, got {result!r}")
