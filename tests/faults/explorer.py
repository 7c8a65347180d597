"""Every interleaving of lanes, watchdog, updater, capture, a journal's reader and faults, within
bounds, over the real code: transitions through a `Store` on real files, grants through `Seat`,
fence and journal on a real ring whose bytes are kept and put back.

What a call gives depends on the bytes it finds alone, so each different call is made once and
remembered. Run and epoch numbers matter only by their order and are renumbered, so that states
which differ in nothing else meet. Steps of the system itself (internal) are told from what comes
from outside: where no internal step is left the state must be a good one, and internal steps have
no cycle, so that from anywhere the system settles by itself.
"""

import fcntl
import os
from array import array
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, cast

import msgspec

from common import frames, slots
from common.errors import FencedError, TransitionError
from common.frames import Ring, Shape
from common.paths import Paths
from common.slots import FACTORY, TRIES, Lane, Record, Slot
from common.states import Phase, Policy, SlotState
from common.store import Store, render
from services.inference.seat import Seat

GOOD = "1" * 64
CANDIDATES = ("2" * 64, "3" * 64)
LANES = slots.LANES
DEATHS = 2  # of a proven slot, one after the other, until the lane gives way
MAX_ATTEMPTS = 2


class Violation(Exception):  # noqa: N818 - it is what is looked for
    pass


class Proc(NamedTuple):
    """A lane's process. `epochs`: by camera, under which it believes to decide; 0: not."""

    st: str = "dead"  # load idle comp dec send fatal; grant (a mutant's)
    lane: str = ""
    run: int = 0
    slot: str = ""
    epochs: tuple[int, ...] = ()
    cam: int = 0
    n: int = 0
    kind: str = ""
    todo: tuple[tuple[int, bytes, bytes], ...] = ()  # what is left to write: ring, account
    stopped: bool = False


class Budget(NamedTuple):
    """How often something may still come from outside."""

    kill: int = 0
    stop: int = 0
    cont: int = 0
    suspect: int = 0
    orphan: int = 0
    power: int = 0
    plan: int = 0
    deadline: int = 0
    restore: int = 0
    flip: int = 0
    back: int = 0  # rolled back by hand


class State(NamedTuple):
    record: bytes
    boot: int
    rings: tuple[tuple[bytes, bytes], ...]  # ring, account
    procs: tuple[Proc, ...]  # a lane's each, then an orphan
    left: Budget
    cursors: tuple[int, ...]
    judged: tuple[tuple[int, ...], ...]  # by camera: sequences
    deaths: tuple[int, ...] = (0, 0)
    unclean: tuple[int, ...] = (0, 0)  # by candidate: deaths while it was not proven
    flipped: bool = False
    handed: bool = False  # the candidate was handed over to in good order


@dataclass(frozen=True)
class Scenario:
    frames: tuple[int, ...] = (2,)
    slots: int = 2
    policy: Policy = Policy.EVERY
    lanes: int = 2
    candidates: tuple[str, ...] = ()  # each one's behaviour
    good: str = "ok"
    killer: int = 0  # a frame that kills whoever infers it
    fresh: bool = False  # known good is the factory's
    budget: Budget = field(default_factory=Budget)
    stale_grant: bool = False  # mutants of the processes
    unaccounted: bool = False


class Real:
    """The real code on real files, each different call once."""

    def __init__(self, paths: Paths, scenario: Scenario) -> None:
        self.paths = paths
        shape = Shape(8, 1, 1, scenario.slots, scenario.policy)
        self.rings = [
            Ring.create(paths.rings, paths.accounts, f"cam{i}", shape)
            for i in range(len(scenario.frames))
        ]
        self.fresh = tuple(self.content(cam) for cam in range(len(self.rings)))
        self.store = Store(paths, "main", scenario.lanes, "boot 0")
        entry, first = frames.ENTRY_BYTES // 8, self.rings[0]._journal
        self.numbers = [3 * 8]  # words of a ring that hold epochs or runs
        for at in range(first, first + frames.JOURNAL * entry, entry):
            self.numbers += [at + 1, at + 2, at + 6, at + 7]
        self._seen: dict[object, Any] = {}
        self._decoded: dict[bytes, Record] = {}

    def once(self, key: object, call: Callable[[], Any]) -> Any:
        if key not in self._seen:
            self._seen[key] = call()
        return self._seen[key]

    def record(self, content: bytes) -> Record:
        if content not in self._decoded:
            self._decoded[content] = msgspec.json.decode(content, type=Record)
        return self._decoded[content]

    def _place(self, content: bytes, boot: int) -> None:
        record = self.record(content)
        for sequence in (1, 2):
            (self.store.folder / f"state.{sequence % 2}").write_bytes(render(sequence, record))
        self.store._boot = f"boot {boot}"

    def commit(
        self, content: bytes, boot: int, key: object, change: Callable[[Record], Record]
    ) -> bytes | None:
        """The record after a transition; None where it may not be."""

        def call() -> bytes | None:
            self._place(content, boot)
            try:
                after = self.store.commit(change)
            except TransitionError:
                return None
            assert after == self.store.read()
            return msgspec.json.encode(after)

        return cast(bytes | None, self.once((content, boot, key), call))

    def content(self, cam: int) -> tuple[bytes, bytes]:
        return bytes(self.rings[cam]._map), bytes(self.rings[cam]._totals._map)

    def on_ring(
        self, cam: int, content: tuple[bytes, bytes], key: object, call: Callable[[Ring], Any]
    ) -> tuple[tuple[bytes, bytes], Any]:
        """A ring's bytes after a call, and what it gave."""

        def run() -> tuple[tuple[bytes, bytes], Any]:
            ring = self.rings[cam]
            ring._map[:], ring._totals._map[:] = content
            given = call(ring)
            return self.content(cam), given

        return cast(tuple[tuple[bytes, bytes], Any], self.once((cam, content, key), run))

    def grant(
        self, state: State, proc: Proc, cam: int, locked: bool
    ) -> tuple[tuple[bytes, bytes], int]:
        """`Seat.raise_fence` by a lane's process, the camera's lock held by another or not."""

        def call(ring: Ring) -> int:
            self._place(state.record, state.boot)
            seat = Seat.__new__(Seat)
            seat.store, seat.lane, seat.run, seat.slot = self.store, proc.lane, proc.run, proc.slot
            fd = os.open(self.paths.accounts / f"cam{cam}", os.O_RDWR)
            try:
                if locked:
                    fcntl.flock(fd, fcntl.LOCK_EX)
                return seat.raise_fence(ring)
            finally:
                os.close(fd)

        key = ("grant", state.record, state.boot, proc.lane, proc.run, proc.slot, locked)
        return self.on_ring(cam, state.rings[cam], key, call)

    def decide(
        self, cam: int, content: tuple[bytes, bytes], proc: Proc
    ) -> tuple[tuple[int, bytes, bytes], ...] | None:
        """What `Ring.decide` writes, in order, in two parts: up to its last barrier, and after.
        None where it refuses."""
        parts: list[tuple[bytes, bytes]] = []

        def call(ring: Ring) -> bool:
            order = ring._order
            ring._order = lambda: parts.append(self.content(cam))  # type: ignore[assignment]
            try:
                ring.decide(proc.n, proc.epochs[cam], proc.run, 7, proc.kind, result(proc, cam))
            except FencedError:
                return False
            finally:
                ring._order = order
            return True

        key = ("decide", proc.n, proc.epochs[cam], proc.run, proc.kind)

        def both() -> tuple[tuple[int, bytes, bytes], ...] | None:
            after, done = self.on_ring(cam, content, key, call)
            if not done:
                return None
            return (
                *difference(content, parts[-1]),
                (-1, b"", b""),
                *difference(parts[-1], after),
            )

        found = self.once(("parts", cam, content, key), both)
        return cast(tuple[tuple[int, bytes, bytes], ...] | None, found)


def result(proc: Proc, cam: int) -> bytes:
    return b"".join(n.to_bytes(8, "little") for n in (proc.n, proc.epochs[cam], proc.run))


def difference(
    before: tuple[bytes, bytes], after: tuple[bytes, bytes]
) -> Iterator[tuple[int, bytes, bytes]]:
    """The words that changed: place (those of the account after all of the ring's), old, new."""
    at = 0
    for old, new in zip(before, after, strict=True):
        for i in range(0, len(old), 8):
            if old[i : i + 8] != new[i : i + 8]:
                yield at + i, old[i : i + 8], new[i : i + 8]
        at += len(old)


def applied(content: tuple[bytes, bytes], at: int, new: bytes) -> tuple[bytes, bytes]:
    ring, account = content
    if at < len(ring):
        return ring[:at] + new + ring[at + 8 :], account
    at -= len(ring)
    return ring, account[:at] + new + account[at + 8 :]


Emit = Callable[[str, State, bool], None]


class World:
    """What may happen next in a state."""

    def __init__(self, paths: Paths, scenario: Scenario) -> None:
        self.scenario = scenario
        self.real = Real(paths, scenario)
        self.cams = range(len(scenario.frames))
        self.dead = Proc(epochs=(0,) * len(scenario.frames))

    # -- reading -----------------------------------------------------------------------------

    def word(self, state: State, cam: int, at: int) -> int:
        return int.from_bytes(state.rings[cam][0][at * 8 : at * 8 + 8], "little")

    def written(self, state: State, cam: int) -> int:
        return self.word(state, cam, frames._WRITTEN)

    def decided(self, state: State, cam: int) -> int:
        return self.word(state, cam, frames._DECIDED)

    def fence(self, state: State, cam: int) -> int:
        return self.word(state, cam, frames._FENCE)

    def behaves(self, slot: str) -> str:
        if slot in CANDIDATES:
            return self.scenario.candidates[CANDIDATES.index(slot)]
        return self.scenario.good if slot == GOOD else "ok"

    def initial(self) -> State:
        known = FACTORY if self.scenario.fresh else GOOD
        names = LANES[: self.scenario.lanes]
        record = Record(
            counter=3,
            epoch=1,
            lanes={name: Lane(known, i + 1) for i, name in enumerate(names)},
            known_good=known,
            slots={GOOD: Slot(SlotState.GOOD)} if known == GOOD else {},
            boot="boot 1",
        )
        procs = [Proc("idle", lane, i + 1, known, self.dead.epochs) for i, lane in enumerate(names)]
        empty: tuple[tuple[int, ...], ...] = ((),) * len(self.cams)
        return State(
            msgspec.json.encode(record),
            1,
            self.real.fresh,
            (*procs, *[self.dead] * (3 - len(procs))),
            self.scenario.budget,
            (0,) * len(self.cams),
            empty,
        )

    def canonical(self, state: State) -> State:
        """The same with epochs and runs numbered from 1."""
        if any(proc.todo for proc in state.procs):
            return state
        record, at = self.real.record(state.record), self.real.numbers
        used = {record.counter, record.epoch, *(lane.run for lane in record.lanes.values())}
        words = [memoryview(ring).cast("Q") for ring, _ in state.rings]
        for view in words:
            used.update(view[i] for i in at)
        for proc in state.procs:
            used.update((proc.run, *proc.epochs))
        ordered = sorted(used - {0})
        if not ordered or ordered[-1] == len(ordered):
            return state
        new = {0: 0} | {n: i for i, n in enumerate(ordered, 1)}
        lanes = {
            name: msgspec.structs.replace(lane, run=new[lane.run])
            for name, lane in record.lanes.items()
        }
        record = msgspec.structs.replace(
            record, counter=new[record.counter], epoch=new[record.epoch], lanes=lanes
        )
        rings = []
        for view, (_, account) in zip(words, state.rings, strict=True):
            ring = array("Q", view.tobytes())
            for i in at:
                ring[i] = new[ring[i]]
            rings.append((ring.tobytes(), account))
        procs = tuple(
            proc._replace(run=new[proc.run], epochs=tuple(new[e] for e in proc.epochs))
            for proc in state.procs
        )
        return state._replace(record=msgspec.json.encode(record), rings=tuple(rings), procs=procs)

    # -- parts of steps ----------------------------------------------------------------------

    def put(self, state: State, p: int, proc: Proc) -> State:
        return state._replace(procs=(*state.procs[:p], proc, *state.procs[p + 1 :]))

    def with_ring(self, state: State, cam: int, content: tuple[bytes, bytes]) -> State:
        return state._replace(rings=(*state.rings[:cam], content, *state.rings[cam + 1 :]))

    def spend(self, state: State, what: str) -> State:
        left = state.left._replace(**{what: getattr(state.left, what) - 1})
        return state._replace(left=left)

    def commit(self, state: State, key: object, change: Callable[[Record], Record]) -> State | None:
        after = self.real.commit(state.record, state.boot, key, change)
        return None if after is None else state._replace(record=after)

    def locked(self, state: State, cam: int) -> bool:
        return any(proc.st == "dec" and proc.cam == cam for proc in state.procs)

    def proc_of(self, state: State, lane: str) -> Proc:
        return state.procs[LANES.index(lane)]

    def ready(self, state: State, lane: str, slot: str) -> bool:
        proc, now = self.proc_of(state, lane), self.real.record(state.record).lanes[lane]
        warm = proc.st in ("idle", "comp", "dec", "send", "grant") and not proc.stopped
        return warm and (proc.run, proc.slot) == (now.run, now.slot) and now.slot == slot

    def die(self, state: State, p: int, *, clean: bool = False) -> State:
        proc, record = state.procs[p], self.real.record(state.record)
        if not clean and proc.slot in CANDIDATES and not record.proven(proc.slot):
            at = CANDIDATES.index(proc.slot)
            unclean = tuple(n + (i == at) for i, n in enumerate(state.unclean))
            if unclean[at] > TRIES + state.boot - 1:
                raise Violation(f"a candidate died {unclean[at]} times")
            state = state._replace(unclean=unclean)
        st, slot = "dead", ""
        if not clean and p < 2 and record.proven(proc.slot):
            deaths = tuple(n + (i == p) for i, n in enumerate(state.deaths))
            # Only a model that fails by itself is worth another one: kills are none of its doing.
            if deaths[p] >= DEATHS and self.behaves(proc.slot) != "ok":
                st, slot = "fatal", proc.slot
            state = state._replace(deaths=tuple(min(n, DEATHS) for n in deaths))
        return self.put(state, p, self.dead._replace(st=st, slot=slot))

    # -- steps -------------------------------------------------------------------------------

    def steps(self, state: State) -> list[tuple[str, State, bool]]:
        """What may happen: words, the state after it, and whether the system does it itself."""
        out: list[tuple[str, State, bool]] = []

        def emit(label: str, after: State | None, internal: bool = True) -> None:
            if after is not None:
                out.append((label, self.canonical(after), internal))

        for p, proc in enumerate(state.procs):
            if proc.stopped:
                emit(f"watchdog kills {p}", self.die(state, p))
            elif p == 2 and proc.st != "dead":
                emit("the orphan is ended", self.die(state, p))
            if not proc.stopped:
                self.lane(state, p, emit)
        for cam in self.cams:
            self.read(state, cam, emit)
        self.watchdog(state, emit)
        self.updater(state, emit)
        self.outside(state, emit)
        self.check(state)
        return out

    def lane(self, state: State, p: int, emit: Any) -> None:
        proc, record = state.procs[p], self.real.record(state.record)
        if proc.st == "dead":
            if p < self.scenario.lanes:
                emit(f"{LANES[p]} starts", self.start(state, p))
        elif proc.st == "load":
            self.load(state, p, emit)
        elif proc.st == "idle":
            self.idle(state, p, record, emit)
        elif proc.st == "grant":
            self.raise_late(state, p, emit)
        elif proc.st == "comp":
            self.infer(state, p, emit)
        elif proc.st == "dec":
            self.write(state, p, emit)
        elif proc.st == "send":
            _, entry = self.real.on_ring(
                proc.cam, state.rings[proc.cam], ("entry", proc.n), lambda r: r.entry(proc.n)
            )
            if entry is None or entry.result != result(proc, proc.cam):
                raise Violation(f"{proc.lane} publishes what is not the journal's {proc.n}")
            emit(f"{proc.lane} publishes {proc.n}", self.put(state, p, at_rest(proc)))

    def start(self, state: State, p: int) -> State | None:
        lane = LANES[p]
        broken = (GOOD,) if state.flipped else ()
        after = self.commit(
            state, ("start", lane, broken), lambda record: slots.start(record, lane, broken)
        )
        assert after is not None
        record = self.real.record(after.record)
        mine = record.lanes[lane]
        if record.state(mine.slot) is SlotState.BAD:
            raise Violation("a bad slot is loaded")
        if mine.slot in broken:
            raise Violation("a slot is loaded that does not verify")
        return self.put(after, p, Proc("load", lane, mine.run, mine.slot, self.dead.epochs))

    def load(self, state: State, p: int, emit: Any) -> None:
        proc = state.procs[p]
        how = self.behaves(proc.slot)
        if how == "crash at load":
            emit(f"{proc.lane} crashes at load", self.die(state, p))
        elif how == "hang":
            emit(f"{proc.lane} hangs", self.put(state, p, proc._replace(stopped=True)))
        elif how == "board":
            emit("the model hangs the board", self.power_cut(state))
        else:
            emit(f"{proc.lane} is ready", self.put(state, p, at_rest(proc)))

    def idle(self, state: State, p: int, record: Record, emit: Any) -> None:
        proc = state.procs[p]
        now = record.lanes[proc.lane]
        for cam in self.cams:
            mine = proc.epochs[cam] == self.fence(state, cam) != 0
            if not mine or (record.live == proc.lane and record.epoch != proc.epochs[cam]):
                self.go_live(state, p, cam, emit)
            if not mine:
                continue
            decided, written = self.decided(state, cam), self.written(state, cam)
            if decided < written:
                n = decided + 1 if self.scenario.policy is Policy.EVERY else written
                content, count = self.real.on_ring(
                    cam, state.rings[cam], ("attempt", n), partial(Ring.attempt, sequence=n)
                )
                kind = "inferred" if count <= MAX_ATTEMPTS else "failed"
                judging = proc._replace(st="comp", cam=cam, n=n, kind=kind)
                after = self.put(self.with_ring(state, cam, content), p, judging)
                emit(f"{proc.lane} judges {cam}/{n}", after)
        if (now.run, now.slot) != (proc.run, proc.slot):
            emit(f"{proc.lane} stops: not its place any more", self.leave(state, p))
        if state.left.plan and p < 2:
            emit(f"{proc.lane} is stopped", self.leave(self.spend(state, "plan"), p), False)

    def leave(self, state: State, p: int) -> State:
        proc = state.procs[p]
        after = self.commit(
            state, ("stop", proc.lane, proc.run), lambda r: slots.stop(r, proc.lane, proc.run)
        )
        assert after is not None
        return self.die(after, p, clean=True)

    def go_live(self, state: State, p: int, cam: int, emit: Any) -> None:
        proc, record = state.procs[p], self.real.record(state.record)
        if self.scenario.stale_grant:
            mine = (record.lanes[proc.lane].run, record.lanes[proc.lane].slot)
            if record.live == proc.lane and mine == (proc.run, proc.slot):
                late = proc._replace(st="grant", cam=cam, n=record.epoch)
                emit(f"{proc.lane} reads a grant", self.put(state, p, late))
            return
        content, epoch = self.real.grant(state, proc, cam, self.locked(state, cam))
        if epoch:
            self.raised(state, p, cam, content, epoch, emit)

    def raise_late(self, state: State, p: int, emit: Any) -> None:
        """A mutant: what it was granted it read earlier."""
        proc = state.procs[p]

        def call(ring: Ring) -> bool:
            try:
                return ring.raise_fence(proc.n, wait=False)
            except FencedError:
                return False

        if self.locked(state, proc.cam):
            return
        key = ("raise", proc.n)
        content, done = self.real.on_ring(proc.cam, state.rings[proc.cam], key, call)
        if done:
            self.raised(state, p, proc.cam, content, proc.n, emit)
        else:
            emit("too late", self.put(state, p, at_rest(proc)))

    def raised(
        self, state: State, p: int, cam: int, content: tuple[bytes, bytes], epoch: int, emit: Any
    ) -> None:
        proc, record = state.procs[p], self.real.record(state.record)
        if self.locked(state, cam):
            raise Violation("a fence is raised while another decides")
        if record.state(proc.slot) is SlotState.BAD:
            raise Violation("live on a bad slot")
        if not record.proven(proc.slot) and not state.handed:
            raise Violation("an unproven model is live that nobody handed over to")
        epochs = tuple(epoch if i == cam else e for i, e in enumerate(proc.epochs))
        after = self.put(self.with_ring(state, cam, content), p, at_rest(proc, epochs))
        emit(f"{proc.lane} goes live on {cam}", after)

    def infer(self, state: State, p: int, emit: Any) -> None:
        proc = state.procs[p]
        cam = proc.cam
        crashes = self.behaves(proc.slot) == "crash on a frame" or proc.n == self.scenario.killer
        if crashes and proc.kind == "inferred":
            emit(f"{proc.lane} crashes on {proc.n}", self.die(state, p))
            return
        if self.locked(state, cam):
            return
        _, intact = self.real.on_ring(
            cam, state.rings[cam], ("intact", proc.n), lambda ring: ring.intact(proc.n)
        )
        if not intact:
            mine = proc.epochs[cam] == self.fence(state, cam) and proc.n > self.decided(state, cam)
            if self.scenario.policy is Policy.EVERY and mine:
                raise Violation(f"frame {proc.n} is overwritten before it is decided")
            emit("torn", self.put(state, p, at_rest(proc)))
            return
        todo = self.real.decide(cam, state.rings[cam], proc)
        if todo is None:
            epochs = tuple(0 if i == cam else e for i, e in enumerate(proc.epochs))
            emit(f"{proc.lane} is refused {proc.n}", self.put(state, p, at_rest(proc, epochs)))
        else:
            after = self.put(state, p, proc._replace(st="dec", todo=todo))
            emit(f"{proc.lane} has the lock", after)

    def write(self, state: State, p: int, emit: Any) -> None:
        """The first part of a decision, or its second."""
        proc = state.procs[p]
        places = [at for at, _, _ in proc.todo]
        first = -1 in places
        part = proc.todo[: places.index(-1)] if first else proc.todo
        content = state.rings[proc.cam]
        before = self.decided(state, proc.cam)
        for at, _, new in part:
            content = applied(content, at, new)
        after = self.with_ring(state, proc.cam, content)
        if (decided := self.decided(after, proc.cam)) != before:
            if self.fence(state, proc.cam) != proc.epochs[proc.cam]:
                raise Violation(f"{proc.lane} decides without the fence")
            if decided in state.judged[proc.cam]:
                raise Violation(f"frame {decided} is judged twice")
            if decided != before + 1 and self.scenario.policy is Policy.EVERY:
                raise Violation(f"a gap before frame {decided}")
            judged = (*state.judged[proc.cam], decided)
            every = tuple(judged if i == proc.cam else j for i, j in enumerate(state.judged))
            after = after._replace(judged=every)
        if first:
            left = proc.todo[places.index(-1) + 1 :]
            emit(f"{proc.lane} writes {proc.n}", self.put(after, p, proc._replace(todo=left)))
        else:
            done = proc._replace(st="send", todo=())
            emit(f"{proc.lane} decides {proc.n}", self.put(after, p, done))

    def read(self, state: State, cam: int, emit: Any) -> None:
        """A reader of the journal catches up."""
        cursor, decided = state.cursors[cam], self.decided(state, cam)
        if cursor >= decided:
            return
        for n in range(cursor + 1, decided + 1):
            _, entry = self.real.on_ring(
                cam, state.rings[cam], ("entry", n), partial(Ring.entry, sequence=n)
            )
            expected = n in state.judged[cam]
            if (entry is None) == expected:
                raise Violation(f"the journal has {entry} for {n}")
        cursors = tuple(decided if i == cam else c for i, c in enumerate(state.cursors))
        emit(f"reader at {cam}/{decided}", state._replace(cursors=cursors))

    def watchdog(self, state: State, emit: Any) -> None:
        record = self.real.record(state.record)
        live, other, txn = record.live, record.other, record.txn
        proc = self.proc_of(state, live)
        gone = proc.st in ("dead", "fatal") or proc.stopped
        if other is not None and (gone or state.left.suspect):
            if self.ready(state, other, record.lanes[other].slot):
                after = self.commit(
                    state if gone else self.spend(state, "suspect"),
                    ("take over", other),
                    lambda r: slots.take_over(r, other, "it died"),
                )
                emit(f"{other} takes over", after, gone)
            elif gone and self.died_in_soak(state, record):
                after = self.commit(state, "fail", lambda r: slots.fail_soak(r, "no"))
                emit("soak failed: it died", after)
        for p, lane in enumerate(record.lanes):
            self.give_way(state, p, lane, emit)
        if other is not None and self.better(state, other):
            after = self.commit(
                state, ("take over", other), lambda r: slots.take_over(r, other, "better")
            )
            emit(f"{other} has a better model", after)
        if txn.phase is Phase.NONE:
            return
        behaviour = self.behaves(txn.slot)
        ready = self.ready(state, txn.lane, txn.slot)
        elsewhere = record.lanes[txn.lane].slot != txn.slot
        if txn.phase is Phase.REQUESTED and ready:
            after = self.commit(state, "hand over", slots.hand_over)
            emit("hand-over", after and after._replace(handed=True))
        if txn.phase in (Phase.PROVING, Phase.REQUESTED):
            self.exhausted(state, txn.slot, emit)
            must = elsewhere or (behaviour == "wrong" and ready)
            if must or state.left.deadline:
                after = self.commit(
                    state if must else self.spend(state, "deadline"),
                    "abandon",
                    lambda r: slots.abandon(r, "no"),
                )
                emit("abandoned", after, must)
        elif elsewhere or (behaviour == "wrong" and ready):
            emit("soak failed", self.commit(state, "fail", lambda r: slots.fail_soak(r, "no")))
        elif (
            ready
            and behaviour != "wrong"
            and record.live == txn.lane
            and all(self.fence(state, cam) == record.epoch for cam in self.cams)
        ):
            emit("soak passed", self.commit(state, "good", slots.mark_good))

    def died_in_soak(self, state: State, record: Record) -> bool:
        txn = record.txn
        if txn.phase is not Phase.SOAK or txn.lane != record.live:
            return False
        return record.proven(txn.slot) or state.unclean[CANDIDATES.index(txn.slot)] > 0

    def give_way(self, state: State, p: int, lane: str, emit: Any) -> None:
        """A lane whose process is not started any more: it has died too often."""
        if state.procs[p].st != "fatal":
            return
        if self.real.record(state.record).lanes[lane].slot == state.procs[p].slot:
            after = self.commit(state, ("give way", lane), lambda r: slots.give_way(r, lane))
        else:
            after = state
        if after is not None:
            deaths = tuple(0 if i == p else n for i, n in enumerate(after.deaths))
            emit(f"{lane} gives way", self.put(after._replace(deaths=deaths), p, self.dead))

    def better(self, state: State, other: str) -> bool:
        """Whether the lane that is not live is ready with a better model, after it gave way."""
        record = self.real.record(state.record)
        order = list(dict.fromkeys((record.known_good, record.previous, FACTORY, slots.PASS)))
        mine, its = record.lanes[record.live].slot, record.lanes[other].slot
        if record.txn.phase is not Phase.NONE or not self.ready(state, other, its):
            return False
        return its in order and (mine not in order or order.index(its) < order.index(mine))

    def exhausted(self, state: State, slot: str, emit: Any) -> None:
        """Tries are used up: judged under the lock, when the boot is accounted for."""

        def change(record: Record) -> Record:
            used = record.slots[slot].tries == 0 and record.txn.phase in (
                Phase.PROVING,
                Phase.REQUESTED,
            )
            return slots.abandon(record, "tries") if used else record

        record = self.real.record(state.record)
        if record.proven(slot):
            return
        running = any(proc.slot == slot for proc in state.procs)
        if record.slots[slot].tries or running:
            return
        if self.scenario.unaccounted:
            after: State | None = state._replace(
                record=msgspec.json.encode(slots.abandon(record, "tries"))
            )
        else:
            after = self.commit(state, ("exhausted", slot), change)
        if after is None or after.record == state.record:
            return
        bad = self.real.record(after.record).state(slot) is SlotState.BAD
        died = state.unclean[CANDIDATES.index(slot)]
        if bad and died < TRIES and self.real.record(state.record).boot == f"boot {state.boot}":
            raise Violation("a planned restart or a power cut cost a try")
        if bad and self.scenario.unaccounted and died < TRIES:
            raise Violation("judged before the boot was accounted for")
        emit("exhausted", after)

    def updater(self, state: State, emit: Any) -> None:
        record = self.real.record(state.record)
        txn = record.txn
        if txn.phase is Phase.NONE:
            todo = CANDIDATES[: len(self.scenario.candidates)]
            for name in (name for name in todo if name not in record.slots):

                def change(record: Record, name: str = name) -> Record:
                    return slots.activate(
                        slots.install(record, name, Slot(SlotState.INSTALLED)), name
                    )

                after = self.commit(state, ("activate", name), change)
                emit("activated", after and after._replace(handed=self.scenario.lanes == 1))
                return
        elif txn.phase is Phase.PROVING and self.ready(state, txn.lane, txn.slot):
            emit("requested", self.commit(state, "request", slots.request))

    def power_cut(self, state: State) -> State:
        if state.boot > 4:
            raise Violation("the board starts again and again")
        procs = (self.dead,) * len(state.procs)
        return State(
            state.record,
            state.boot + 1,
            self.real.fresh,
            procs,
            state.left,
            (0,) * len(self.cams),
            ((),) * len(self.cams),
            unclean=state.unclean,
            flipped=state.flipped,
            handed=state.handed,
        )

    def outside(self, state: State, emit: Any) -> None:
        left, record = state.left, self.real.record(state.record)
        for cam in self.cams:
            if self.written(state, cam) < self.scenario.frames[cam]:
                after = self.publish(state, cam)
                if after is not None:
                    emit(f"frame on {cam}", after, False)
        for p, proc in enumerate(state.procs[:2]):
            if proc.st in ("dead", "fatal"):
                continue
            if left.kill:
                emit(f"KILL {p}", self.die(self.spend(state, "kill"), p), False)
            if left.stop and not proc.stopped:
                stopped = self.put(state, p, proc._replace(stopped=True))
                emit(f"STOP {p}", self.spend(stopped, "stop"), False)
            if left.cont and proc.stopped and proc.st != "load":
                going = self.put(state, p, proc._replace(stopped=False))
                emit(f"CONT {p}", self.spend(going, "cont"), False)
            if left.orphan and state.procs[2].st == "dead":
                two = self.put(self.put(state, 2, proc), p, self.dead)
                emit(f"{p} is orphaned", self.spend(two, "orphan"), False)
        if left.power:
            emit("POWER CUT", self.power_cut(self.spend(state, "power")), False)
        if left.flip and not state.flipped:
            emit("a bit flips", self.spend(state, "flip")._replace(flipped=True), False)
        if left.back:
            after = self.commit(
                self.spend(state, "back"), "back", lambda r: slots.roll_back(r, "by hand")
            )
            emit("rolled back by hand", after, False)
        if left.restore:
            lane = record.other or record.live
            if record.lanes[lane].slot != record.known_good:
                after = self.commit(
                    self.spend(state, "restore"),
                    ("restore", lane),
                    lambda r: slots.restore(r, lane),
                )
                emit(f"{lane} is restored", after, False)

    def publish(self, state: State, cam: int) -> State | None:
        def call(ring: Ring) -> bool:
            if ring.full and ring.shape.policy is Policy.EVERY:
                return False
            ring.begin()
            ring.publish(1, 1)
            return True

        content, done = self.real.on_ring(cam, state.rings[cam], "publish", call)
        return self.with_ring(state, cam, content) if done else None

    # -- what must hold ----------------------------------------------------------------------

    def check(self, state: State) -> None:
        for cam in self.cams:
            fence = self.fence(state, cam)
            holders = [p for p in state.procs if p.epochs and p.epochs[cam] == fence != 0]
            if len(holders) > 1:
                raise Violation("two processes may decide")

    def settled(self, state: State) -> str:
        """What is wrong where nothing is left to do."""
        record = self.real.record(state.record)
        proc, now = self.proc_of(state, record.live), record.lanes[record.live]
        if proc.st != "idle" or (proc.run, proc.slot) != (now.run, now.slot):
            return "nobody is live"
        if record.state(proc.slot) is SlotState.BAD:
            return "live on a bad slot"
        if record.txn.phase is not Phase.NONE:
            return f"an update is neither done nor abandoned: {record.txn.phase}"
        for name in CANDIDATES[: len(self.scenario.candidates)]:
            if record.state(name) not in (SlotState.GOOD, SlotState.BAD):
                return "an update was never judged"
        for cam in self.cams:
            if self.decided(state, cam) != self.written(state, cam):
                return "frames are left undecided"
            if state.cursors[cam] != self.decided(state, cam):
                return "the reader is behind"
            if self.fence(state, cam) != record.epoch:
                return "a ring was not taken over"
        if record.other is None:
            return ""
        standby = self.proc_of(state, record.other)
        if standby.st != "idle":
            return "no standby"
        return "the standby has a bad slot" if record.state(standby.slot) is SlotState.BAD else ""


def at_rest(proc: Proc, epochs: tuple[int, ...] | None = None) -> Proc:
    return Proc("idle", proc.lane, proc.run, proc.slot, proc.epochs if epochs is None else epochs)


@dataclass
class Explored:
    states: int
    edges: int
    settled: int
    why: str  # what was violated
    trace: list[str]


def explore(paths: Paths, scenario: Scenario, limit: int = 5_000_000) -> Explored:
    """Breadth first, to the end or to the first violation."""
    world = World(paths, scenario)
    first = world.initial()
    ids = {first: 0}
    queue = deque([first])
    came: list[tuple[int, str]] = [(0, "")]
    internal_from, internal_to = array("I"), array("I")
    edges = settled = 0

    def ended(why: str, at: int) -> Explored:
        trace = []
        while at:
            at, label = came[at][0], came[at][1]
            trace.append(label)
        return Explored(len(ids), edges, settled, why, trace[::-1])

    while queue:
        state = queue.popleft()
        at = ids[state]
        try:
            following = world.steps(state)
        except Violation as violation:
            return ended(str(violation), at)
        moves = False
        for label, after, internal in following:
            edges += 1
            to = ids.get(after)
            if to is None:
                to = ids[after] = len(ids)
                queue.append(after)
                came.append((at, label))
            if internal and to != at:
                moves = True
                internal_from.append(at)
                internal_to.append(to)
        if not moves:
            settled += 1
            if why := world.settled(state):
                return ended(why, at)
        assert len(ids) < limit, "more states than expected"
    if (at := _on_a_cycle(len(ids), internal_from, internal_to)) >= 0:
        return ended("it can go round for ever", at)
    for ring in world.real.rings:
        ring.close()
    return ended("", 0)


def _on_a_cycle(states: int, sources: "array[int]", targets: "array[int]") -> int:
    """A state on a cycle of these steps, or behind one; -1 where there is none."""
    following: list[list[int]] = [[] for _ in range(states)]
    degree = [0] * states
    for source, target in zip(sources, targets, strict=True):
        following[source].append(target)
        degree[target] += 1
    free = [state for state in range(states) if not degree[state]]
    for state in free:
        for target in following[state]:
            degree[target] -= 1
            if not degree[target]:
                free.append(target)
    return -1 if len(free) == states else next(i for i in range(states) if degree[i])
