"""How long a unit that failed waits for its next attempt."""


def exponential(failures: int) -> float:
    """Seconds after the given number of failures: 1, 2, 4 … up to a minute.

    Without jitter: only single units wait, and a run stays the same when it is repeated.
    """
    return float(min(60, 2 ** (failures - 1)))


def immediate(failures: int) -> float:
    return 0.0
