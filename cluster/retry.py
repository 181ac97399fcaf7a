"""How long a unit that failed waits for its next attempt."""

from hashlib import sha256


def exponential(unit: str, failures: int) -> float:
    """Seconds after the given number of failures: 1, 2, 4 … up to a minute, times a factor in [0.5, 1.5).

    The factor keeps units that failed together from coming back together; taken from the names, it is the same when a
    run is repeated.
    """
    digest = sha256(f"{unit} {failures}".encode()).digest()
    return float(min(60, 2 ** (failures - 1))) * (0.5 + int.from_bytes(digest[:4], "big") / 2**32)


def immediate(unit: str, failures: int) -> float:
    return 0.0
