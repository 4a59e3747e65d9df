"""Finds the lines that kill or wedge the engine, by halving the sets that were in flight when it died. Pure.

    watched   every line may fly; a line that was in flight at a death has a strike, and an answer takes it away
    suspect   two strikes: the line flies only in a probe, which is a group of suspects with nothing else in flight
    convicted alone in flight at three deaths: it is not sent again

One death with an outside cause costs nothing but the lines in flight: they are sent again among the others. A probe
that dies is cut into halves; when the first half passes, the second one is to blame and is cut without a try. Both
halves of a set are tried before a half is cut further: the one that passes shows that the engine works at all.

Two strikes can be bad luck, so nothing is held against a line that gets an answer. Whether the engine or a line is to
blame is decided by answers to other lines: a conviction is `proven` by an answer to any of them since the line's first
strike, and after MOST_BARREN deaths in a row without one the engine is given up (`is_hopeless`).
"""

from collections import deque
from collections.abc import Collection, Iterable, Mapping

import msgspec

SUSPECT_STRIKES = 2
LONE_DEATHS = 3
"""With two, a hundred kills in ten minutes from outside condemned two of 50,000 innocent lines."""
MOST_BARREN = 18
"""Deaths in a row without an answer. Three poison lines alone make twelve; in a window of others, fifteen."""

ENGINE_CRASHED = "engine_crashed"


def describe_conviction(deaths: int, alone: int, seen: str) -> str:
    """Return the message of the error line: what was seen, so that a person can judge it."""
    message = (
        f"This request was in flight at {deaths} deaths of the engine, at {alone} of them alone, while the engine "
        "lived through the other requests. It is not sent again."
    )
    return f"{message} Last death: {seen}" if seen else message


class Group(msgspec.Struct, frozen=True):
    """Suspects that are tried together. `is_guilty`: one of them at least is to blame, as far as we know;
    `clears_itself_only`: when it passes, the group behind it is guilty."""

    lines: tuple[int, ...]
    is_guilty: bool = False
    clears_itself_only: bool = False


class SuspectRecord(msgspec.Struct, frozen=True):
    """What outlives a run. Lines are 0-based in the byte index; at most a window of them. `probe` is in flight,
    `is_running` stands while a run is at work and `abrupt_ends` counts the runs that ended without taking it away."""

    strikes: Mapping[int, int] = {}
    lone: Mapping[int, int] = {}
    groups: tuple[Group, ...] = ()
    probe: tuple[int, ...] = ()
    is_running: bool = False
    abrupt_ends: int = 0


class Suspicion:
    """What is known of the lines of a run. Begins with what an earlier run has left."""

    def __init__(self, record: SuspectRecord | None = None) -> None:
        record = record or SuspectRecord()
        self._strikes, self._lone = dict(record.strikes), dict(record.lone)
        self._groups = deque(record.groups)
        self._answers = self._barren = 0
        self._since: dict[int, int] = {}
        self.probe: frozenset[int] = frozenset(record.probe)
        if self.probe:
            self.close_probe(self.probe)

    @property
    def is_calm(self) -> bool:
        """True when nothing is held against any line."""
        return not self._strikes

    @property
    def is_hopeless(self) -> bool:
        """True when the engine dies whatever it is given."""
        return self._barren >= MOST_BARREN

    def is_suspect(self, line: int) -> bool:
        """True for a line that flies in probes only."""
        return self._strikes.get(line, 0) >= SUSPECT_STRIKES

    def is_convicted(self, line: int) -> bool:
        return self._lone.get(line, 0) >= LONE_DEATHS

    def is_proven(self, line: int) -> bool:
        """True when the engine has answered another line since the first death of this one."""
        return self._answers > self._since.get(line, 0)

    def deaths(self, line: int) -> tuple[int, int]:
        """Return at how many deaths the line was in flight, and at how many of them alone."""
        return self._strikes.get(line, 0), self._lone.get(line, 0)

    def note_answer(self, line: int) -> None:
        """The engine has answered: neither it nor this line is dead."""
        self._answers += 1
        self._barren = 0
        if self._strikes:
            self.forget(line)

    def note_failure(self, line: int) -> None:
        """The line was in flight at a death, among lines of any kind."""
        self._since.setdefault(line, self._answers)
        self._strikes[line] = self._strikes.get(line, 0) + 1

    def note_death(self) -> None:
        """The engine is back after a death that was not in a probe."""
        self._barren += 1

    def accuse(self, line: int) -> None:
        """Make a suspect of a line that was in flight when runs died."""
        self._since.setdefault(line, self._answers)
        self._strikes[line] = max(SUSPECT_STRIKES, self._strikes.get(line, 0))

    def forget(self, line: int) -> None:
        """Hold nothing against a line that has its answer, or its place in the error file."""
        for known in (self._strikes, self._lone, self._since):
            known.pop(line, None)

    def next_probe(self, present: Collection[int]) -> frozenset[int]:
        """Return the suspects to be sent next, with nothing beside them; of those `present`, which are suspects, not
        convicted. Empty only when none is present."""
        self._group_strangers(present)
        for _ in range(len(self._groups)):
            group = self._cut(self._groups[0], present)
            if found := frozenset(group.lines).intersection(present):
                self.probe = found
                return found
            self._drop_absent(group)
        return frozenset()

    def close_probe(self, fallen: Collection[int]) -> None:
        """The probe has ended: all its lines have an answer, but those that have `fallen` with the engine."""
        probe, self.probe = self.probe, frozenset()
        group = self._groups.popleft() if self._groups else Group(())
        for line in fallen:
            self.note_failure(line)
        if fallen:
            self._barren += 1
            self._keep_guilty(tuple(sorted(fallen)), is_alone=len(probe) == 1)
        elif group.clears_itself_only and self._groups:
            self._groups.appendleft(msgspec.structs.replace(self._groups.popleft(), is_guilty=True))
        # Lines that were not there, or that nobody wanted to answer yet, are tried later.
        if rest := self._still_suspect(set(group.lines).difference(fallen)):
            self._groups.append(Group(rest))

    def to_record(self, *, is_running: bool, abrupt_ends: int) -> SuspectRecord:
        return SuspectRecord(
            self._strikes, self._lone, tuple(self._groups), tuple(sorted(self.probe)), is_running, abrupt_ends
        )

    def _keep_guilty(self, fallen: tuple[int, ...], *, is_alone: bool) -> None:
        if is_alone:
            self._lone[fallen[0]] = self._lone.get(fallen[0], 0) + 1
        if len(fallen) > 1:
            self._groups.append(Group(fallen, is_guilty=True))
        elif not self.is_convicted(fallen[0]):
            # The next try follows at once, so that what comes behind is tried on a mended engine or not at all.
            self._groups.appendleft(Group(fallen, is_guilty=True))

    def _group_strangers(self, present: Collection[int]) -> None:
        """Suspects of no group have just been in flight at their second death: one of them is to blame."""
        known = {line for group in self._groups for line in group.lines}
        if strangers := self._still_suspect(set(present).difference(known)):
            self._groups.appendleft(Group(strangers, is_guilty=True))

    def _cut(self, group: Group, present: Collection[int]) -> Group:
        """Return the group at the head, or its first half: a group that is to blame is not tried whole."""
        lines = tuple(line for line in group.lines if line in present)
        if not group.is_guilty or len(lines) < 2:
            return group
        self._groups.popleft()
        absent = tuple(line for line in group.lines if line not in present)
        middle = (len(lines) + 1) // 2
        first = Group(lines[:middle], clears_itself_only=True)
        self._groups.extendleft((Group(lines[middle:] + absent), first))
        return first

    def _drop_absent(self, group: Group) -> None:
        """Let a group wait behind the others while none of its lines is at hand; forget one that is settled."""
        self._groups.popleft()
        if rest := self._still_suspect(group.lines):
            self._groups.append(Group(rest, group.is_guilty))

    def _still_suspect(self, lines: Iterable[int]) -> tuple[int, ...]:
        return tuple(sorted(line for line in lines if self.is_suspect(line) and not self.is_convicted(line)))
