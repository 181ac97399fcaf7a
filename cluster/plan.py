"""A set of units as a graph: who waits for whom, how long a chain hangs on each, and plans that cannot be carried out."""

from collections import Counter
from collections.abc import Mapping, Sequence

from cluster.units import Unit


class Plan:
    """The units by their place in the declaration.

    `missing`: how many dependencies each waits for. `dependents`: who waits for it. `ranks`: the order in which ready
    units are taken, each rank once. `levels`: equal for units of equal priority, and ordered as these.
    Raises ValueError where the plan cannot be carried out.
    """

    def __init__(self, units: Sequence[Unit]) -> None:
        self.places = _places(units)
        self.missing, self.dependents = _graph(units, self.places)
        order = _topological(units, self.places, self.missing, self.dependents)
        heights = _heights(order, self.dependents)
        priorities = {priority: level for level, priority in enumerate(sorted({unit.priority for unit in units}))}
        self.levels = [priorities[unit.priority] for unit in units]
        # What holds back the longest chain goes first among equals: the chain is the least that the run takes.
        by_rank = sorted(range(len(units)), key=lambda place: (self.levels[place], -heights[place], place))
        self.ranks = [0] * len(units)
        for rank, place in enumerate(by_rank):
            self.ranks[place] = rank
        self.by_rank = by_rank


def _places(units: Sequence[Unit]) -> dict[str, int]:
    places = {unit.name: place for place, unit in enumerate(units)}
    if len(places) < len(units):
        twice = [name for name, count in Counter(unit.name for unit in units).items() if count > 1]
        raise ValueError(f"Unit names must be unique; given more than once: {listed(twice)}.")
    return places


def _graph(units: Sequence[Unit], places: Mapping[str, int]) -> tuple[list[int], list[list[int]]]:
    """For each unit how many dependencies it waits for, and which units wait for it."""
    missing = [0] * len(units)
    dependents: list[list[int]] = [[] for _ in units]
    for place, unit in enumerate(units):
        for name in dict.fromkeys(unit.depends_on):
            if name not in places:
                raise ValueError(f"Unit {unit.name} depends on {name}, which is not among the units.")
            dependents[places[name]].append(place)
            missing[place] += 1
    return missing, dependents


def _topological(
    units: Sequence[Unit], places: Mapping[str, int], missing: Sequence[int], dependents: Sequence[Sequence[int]]
) -> list[int]:
    left = list(missing)
    free = [place for place, count in enumerate(left) if not count]
    for place in free:  # grows while it is walked
        for dependent in dependents[place]:
            left[dependent] -= 1
            if not left[dependent]:
                free.append(dependent)
    if len(free) < len(units):
        stuck = {place for place, count in enumerate(left) if count}
        raise ValueError(f"Units wait for each other in a circle: {_circle(units, places, stuck)}.")
    return free


def _heights(order: Sequence[int], dependents: Sequence[Sequence[int]]) -> list[int]:
    """The length of the longest chain of units that wait for each."""
    heights = [0] * len(order)
    for place in reversed(order):
        heights[place] = max((heights[dependent] + 1 for dependent in dependents[place]), default=0)
    return heights


def _circle(units: Sequence[Unit], places: Mapping[str, int], stuck: set[int]) -> str:
    """Every stuck unit depends on a stuck one, so walking up from any must come round."""
    path = [min(stuck)]
    while True:
        before = next(places[name] for name in units[path[-1]].depends_on if places[name] in stuck)
        if before in path:
            names = [units[place].name for place in [*path[path.index(before) :], before]]
            return " waits for ".join(names)
        path.append(before)


def listed(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
