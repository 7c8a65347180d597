"""What to do, given what is seen and remembered: pure, time is an argument.

`decide` goes through its rules in the order in which they matter: whatever makes no progress is
killed, then each group is looked at (who should be live comes first), then what can wait: starts,
memory, heat, the hardware watchdog. Orders that did not come to pass (a commit that was refused)
are found necessary again the next time.
"""

from collections.abc import Callable

import msgspec

from common import slots, verdict
from common.errors import TransitionError
from common.messages import LaneReport
from common.processes import lane_name
from common.slots import PASS, Record
from common.states import Phase, Severity
from services.watchdog import changes
from services.watchdog.facts import (
    Action,
    Asked,
    Death,
    Deaths,
    Down,
    Event,
    Feed,
    Group,
    Incident,
    Kill,
    Limits,
    Live,
    Mark,
    Memory,
    Observation,
    Restart,
    Restore,
    Seen,
    SetPace,
    Settings,
    Start,
    Transition,
    Wake,
)

S = 1_000_000_000
UNKILLABLE_S = 5.0  # alive so long after its SIGKILL: beyond our means
SILENT_S = 10.0  # supervisord
ABSENT_S = 60.0  # an expected process without a pid, though its start was asked for
RESTART_S = 1.5  # without a pid for so long: supervisord does not see to it
ASK_MOST_S = 60.0
SETTLED_S = 10.0  # a process that lived so long is no crash loop
RESTORE_MOST_S = 6 * 3600.0
STOP_S = 10  # from SIGTERM
AGAIN_S = 60  # a planned restart of one process, at most so often
HEAT_S = 30.0  # between two changes of pace
PACE_LEAST = 0.125


def decide(
    settings: Settings, memory: Memory, seen: Observation
) -> tuple[Memory, tuple[Action, ...]]:
    """What to remember, and what to do now, in this order. The last action says when to look again
    at the latest."""
    step = _Step(settings, memory, seen)
    step.bury()
    step.end_hangs()
    for name, group in seen.groups.items():
        step.look_after(name, group)
    step.start_missing()
    step.govern_heat()
    step.feed()
    wake = Wake(min(step.due_ns, default=seen.now_ns + S))
    return step.remembered(), (*step.actions, wake)


def transition(record: Record, order: Transition) -> Record:
    """The record after an order. Raises: TransitionError: it does not apply (any more)."""
    change: Callable[..., Record] = getattr(slots, order.kind)
    arguments: dict[str, tuple[str, ...]] = {
        "take_over": (order.lane, order.reason),
        "abandon": (order.reason,),
        "fail_soak": (order.reason,),
        "give_way": (order.lane,),
        "restore": (order.lane,),
    }
    return change(record, *arguments.get(order.kind, ()))


class _Step:
    def __init__(self, settings: Settings, memory: Memory, seen: Observation) -> None:
        self._settings, self._seen, self._now = settings, seen, seen.now_ns
        self._m = _copy(memory)
        self.actions: list[Action] = []
        self.due_ns: list[int] = []

    def remembered(self) -> Memory:
        return self._m

    def _remember(self, **changes: object) -> None:
        self._m = msgspec.structs.replace(self._m, **changes)

    def _past(self, at_ns: int) -> bool:
        """Whether it is later than `at_ns`; if not, this is to be looked at again then."""
        if self._now > at_ns:
            return True
        self.due_ns.append(at_ns + 1)
        return False

    # -- deaths and hangs --------------------------------------------------------------------

    def bury(self) -> None:
        new = self._seen.supervisord
        if new and new != self._m.supervisord:  # and all of its children are new
            self._remember(supervisord=new, pids={}, killed={}, planned={}, down={}, asked={})
        for death in (*self._seen.deaths, *self._unseen()):
            limits = self._settings.processes[death.name]
            self._m.pids.pop(death.name, None)
            killed = self._m.killed.get(death.name)
            told = self._m.planned.get(death.name)
            ours = killed is not None and killed.pid == death.pid
            planned = told is not None and told.pid == death.pid
            clean = not ours and (planned or self._left_in_order(death, limits))
            if limits.lane:
                self._m.down[death.name] = Down(death.at_ns, clean, death.how)
                if not clean:
                    self._count(death, limits)
            if ours:
                del self._m.killed[death.name]
            elif not clean:
                text = f"{death.name} (pid {death.pid}) {death.how}"
                self._event("process.died", Severity.ERROR, text, of=death.name)
                self._incident(death.name, death.how, death.at_ns, death.report)

        pids = {n: p.pid for n, p in self._seen.processes.items() if p.pid is not None}
        self._remember(pids=self._m.pids | pids)

    def _unseen(self) -> list[Death]:
        """Who was replaced while no watchdog ran."""
        known, told = self._m.pids, {death.name for death in self._seen.deaths}
        return [
            Death(name, known[name], self._now, how="died while no watchdog ran")
            for name, seen in self._seen.processes.items()
            if seen.pid is not None and known.get(name, seen.pid) != seen.pid and name not in told
        ]

    def _left_in_order(self, death: Death, limits: Limits) -> bool:
        """By its exit status, or because the record has another slot in its place."""
        if death.clean or death.report is None or not limits.lane:
            return bool(death.clean)
        now = self._seen.groups[limits.group].record.lanes.get(limits.lane)
        return now is None or now.slot != death.report.slot

    def _count(self, death: Death, limits: Limits) -> None:
        """A death on a proven slot, for the cap."""
        record = self._seen.groups[limits.group].record
        slot = death.report.slot if death.report else record.lanes[limits.lane].slot
        if not record.proven(slot):
            return
        if record.chain(after=slot) == PASS and _was_of_use(death.report):
            return  # with only pass-through behind it, a model that judges now and then stays
        known = self._m.deaths.get(death.name)
        earlier = known.at_ns if known and known.slot == slot else ()
        since = self._now - self._settings.watchdog.window_s * S
        recent = tuple(at for at in earlier if at > since)
        self._m.deaths[death.name] = Deaths(slot, (*recent, death.at_ns))

    def end_hangs(self) -> None:
        for name, limits in self._settings.processes.items():
            seen = self._process(name)
            if seen.pid is not None and not self._was_killed(name):
                told = self._m.planned.get(name)
                if self._past(self._hangs_after_ns(seen, limits)):
                    worked_ns = seen.sent_ns if seen.wait_until_ns else seen.progressed_ns
                    since = max(worked_ns, seen.spawned_ns)
                    self._hang(name, f"no progress for {(self._now - since) / S:.1f} s", since)
                elif told and told.pid == seen.pid and self._past(told.at_ns + STOP_S * S):
                    self._hang(name, f"it was told to stop {STOP_S} s ago", told.at_ns)

    def _hangs_after_ns(self, seen: Seen, limits: Limits) -> int:
        hang_ns = round(limits.hang_s * S)
        after = max(self._seen.listening_ns, seen.progressed_ns) + hang_ns
        if not seen.begun:
            after = max(after, seen.spawned_ns + round(limits.start_s * S))
        return max(after, seen.wait_until_ns)

    def _hang(self, name: str, why: str, since_ns: int) -> None:
        seen = self._process(name)
        assert seen.pid is not None
        self._m.killed[name] = Mark(seen.pid, self._now)
        self.actions.append(Kill(name, seen.pid, why))
        text = f"{name} (pid {seen.pid}) hangs: {why}; killed"
        self._event("process.hung", Severity.ERROR, text, of=name)
        self._incident(name, f"hung: {why}", since_ns, seen.report)

    def _was_killed(self, name: str) -> bool:
        mark = self._m.killed.get(name)
        return mark is not None and mark.pid == self._process(name).pid

    # -- groups ------------------------------------------------------------------------------

    def look_after(self, group: str, now: Group) -> None:
        self._note(group, now)
        self._end_stall(group, now)
        if self._take_over(group, now):
            return
        if self._give_way(group, now) or self._judge(group, now) or self._restore(group, now):
            return
        self._limit_memory(group, now)

    def _note(self, group: str, now: Group) -> None:
        """When the live epoch began, and which change is under way since when."""
        record = now.record
        live = self._m.live.get(group)
        if live is None or live.epoch != record.epoch:
            self._m.live[group] = Live(record.epoch, self._now)
        for lane in record.lanes:
            name = lane_name(group, lane)
            down = self._m.down.get(name)
            if down and self._ready(group, record, lane):
                del self._m.down[name]
        reports = {lane: its for lane in record.lanes if (its := self._report(group, lane))}
        txn = record.txn
        ready = txn.lane in record.lanes and self._ready(group, record, txn.lane)
        watched = changes.note(self._m.watched.get(group), record, reports, ready, self._now)
        if watched:
            self._m.watched[group] = watched
        else:
            self._m.watched.pop(group, None)

    def _end_stall(self, group: str, now: Group) -> None:
        """Frames wait, and nobody decides: the live lane is to blame, whatever it says."""
        lane = now.record.live
        name = lane_name(group, lane)
        seen = self._process(name)
        if seen.pid is None or self._was_killed(name) or not self._ready(group, now.record, lane):
            return
        begun_ns = max(self._seen.listening_ns, self._m.live[group].since_ns, seen.ready_ns)
        hang_ns = round(self._settings.groups[group].hang_s * S)
        for camera, ring in now.cameras.items():
            since = max(ring.undecided_ns, begun_ns)
            if ring.undecided_ns and self._past(since + hang_ns):
                self._hang(name, f"frames of {camera} wait, none is decided", since)
                return

    def _take_over(self, group: str, now: Group) -> bool:
        """The live lane is lost: by the other one, at once."""
        record = now.record
        lost = self._lost(group, now)
        if lost is None:
            return False
        soaks = record.txn.phase is Phase.SOAK and record.txn.lane == record.live
        if record.other and self._ready(group, record, record.other):
            reason = f"lane {record.live} {lost}"
            inputs = self._soak(group, now, reason) if soaks else None
            order = Transition(group, "take_over", record.other, reason, inputs)
            if self._order(record, order):
                return True
        if soaks:
            inputs = self._soak(group, now, f"it {lost}")
            return self._order(record, changes.order(group, "fail_soak", "", inputs))
        return False

    def _lost(self, group: str, now: Group) -> str | None:
        """Why the live lane can't decide; None where it can, or is about to."""
        name = lane_name(group, now.record.live)
        if self._was_killed(name):
            return "hung"
        down, seen = self._m.down.get(name), self._process(name)
        # A model in soak is not judged by a stop in good order, unless it does not come back.
        soaks = now.record.txn.phase is Phase.SOAK and now.record.txn.lane == now.record.live
        load_s = self._settings.groups[group].load_s
        if down is None:
            missing_s = load_s if soaks else RESTART_S
            missing = seen.pid is None and self._past(seen.gone_ns + round(missing_s * S))
            return "is not there" if missing else None
        if soaks and down.clean:
            return "stays away" if self._past(down.at_ns + round(load_s * S)) else None
        return down.how

    def _give_way(self, group: str, now: Group) -> bool:
        record, watchdog = now.record, self._settings.watchdog
        for lane, its in record.lanes.items():
            name = lane_name(group, lane)
            deaths = self._m.deaths.get(name)
            if deaths is None:
                continue
            since = self._now - watchdog.window_s * S
            recent = [at for at in deaths.at_ns if at > since]
            if deaths.slot != its.slot or not recent:
                del self._m.deaths[name]
            elif len(recent) > watchdog.restarts and its.slot != PASS:
                del self._m.deaths[name]
                if self._order(record, Transition(group, "give_way", lane)):
                    earlier = self._m.restores.get(group)
                    wait_s = watchdog.restore_s
                    if earlier:
                        wait_s = min(2 * earlier.wait_s, max(RESTORE_MOST_S, wait_s))
                    at_ns = self._now + round(wait_s * S)
                    self._m.restores[group] = Restore(at_ns, wait_s)
                    what = f"gave way: {len(recent)} deaths within {watchdog.window_s:g} s"
                    self._incident(name, what, recent[-1], self._report(group, lane))
                    return True
        return False

    # -- a change of model -------------------------------------------------------------------

    def _judge(self, group: str, now: Group) -> bool:
        match now.record.txn.phase:
            case Phase.PROVING | Phase.REQUESTED:
                return self._judge_candidate(group, now)
            case Phase.SOAK:
                return self._judge_soak(group, now)
        return False

    def _judge_candidate(self, group: str, now: Group) -> bool:
        record, txn = now.record, now.record.txn
        if now.gate_failed:  # the updater keeps what it rests on
            return self._order(record, Transition(group, "abandon", reason=now.gate_failed))
        if fact := self._no_candidate(group, now):
            settings = self._settings.groups[group]
            inputs = changes.proof(now, settings, self._recorded(group, record, txn.lane), fact)
            return self._order(record, changes.order(group, "abandon", "", inputs))
        if txn.phase is Phase.REQUESTED and self._ready(group, record, txn.lane):
            return self._order(record, Transition(group, "hand_over", txn.lane))
        return False

    def _no_candidate(self, group: str, now: Group) -> str:
        """Why a candidate will not do, whatever it judged; "" where it still may."""
        record = now.record
        txn, name = record.txn, lane_name(group, record.txn.lane)
        settings, watched = self._settings.groups[group], self._m.watched[group]
        down, report = self._m.down.get(name), self._recorded(group, record, txn.lane)
        slot = record.slots.get(txn.slot)
        tried = slot is not None and not record.proven(txn.slot) and slot.tries == 0
        if report and report.refused:
            return report.refused
        if record.lanes[txn.lane].slot != txn.slot:
            why = "its tries are used up" if tried else "it could not be loaded"
            return f"{why}; its lane went on without it"
        if tried and self._process(name).pid is None and down and not down.clean:
            return f"its tries are used up; the last time it {down.how}"
        if self._above_memory(name):
            return self._memory_words(name)
        live, ready = self._report(group, record.live), self._ready(group, record, txn.lane)
        late = self._past(watched.since_ns + round(settings.prove_s * S))
        if late and changes.had_its_chance(watched, settings, live, ready):
            return f"it has not proved itself within {settings.prove_s:g} s"
        return ""

    def _judge_soak(self, group: str, now: Group) -> bool:
        record, txn = now.record, now.record.txn
        inputs = self._soak(group, now, self._fails_soak(group, record))
        reason = verdict.judge(inputs)
        if reason:
            return self._order(record, changes.order(group, "fail_soak", "", inputs))
        report = self._report(group, txn.lane)
        if not self._ready(group, record, txn.lane) or report is None or not report.live:
            return False
        fenced = all(camera.fence == record.epoch for camera in now.cameras.values())
        if reason is None or record.live != txn.lane or not fenced:
            return False
        return self._order(record, changes.order(group, "mark_good", txn.lane, inputs))

    def _soak(self, group: str, now: Group, fact: str) -> verdict.Soak:
        settings, watched = self._settings.groups[group], self._m.watched[group]
        over = self._past(watched.since_ns + round(settings.soak_s * S))
        report = self._recorded(group, now.record, now.record.txn.lane)
        return changes.soak(watched, now, settings, report, fact=fact, over=over)

    def _fails_soak(self, group: str, record: Record) -> str:
        """What is bad enough by itself; "" if nothing is."""
        txn, name = record.txn, lane_name(group, record.txn.lane)
        watched, report = self._m.watched[group], self._recorded(group, record, txn.lane)
        down = self._m.down.get(name)
        if record.lanes[txn.lane].slot != txn.slot:
            return "its lane went on without it"
        if self._was_killed(name):
            return "it hung"
        if down and not down.clean and down.at_ns >= watched.since_ns:
            return f"it {down.how}"
        if self._above_memory(name):
            return self._memory_words(name)
        return report.refused if report else ""

    def _restore(self, group: str, now: Group) -> bool:
        """Long after a lane gave way: known good again, first in the lane that is not live."""
        record = now.record
        off = [lane for lane, its in record.lanes.items() if its.slot != record.known_good]
        due: Restore | None = self._m.restores.get(group)
        if record.txn.phase is not Phase.NONE:
            return False
        if due is None:
            if off:
                wait_s = self._settings.watchdog.restore_s
                self._m.restores[group] = Restore(self._now + round(wait_s * S), wait_s)
            return False
        if self._better(group, record):
            reason = f"lane {record.live} has a worse model"
            return self._order(record, Transition(group, "take_over", record.other or "", reason))
        if not self._past(due.at_ns):
            return False
        if not off:
            del self._m.restores[group]
            return False
        target = record.other or record.live
        at_ns = self._now + round(due.wait_s * S)
        self._m.restores[group] = Restore(at_ns, due.wait_s)
        if target not in off:
            return False
        return self._order(record, Transition(group, "restore", target))

    def _better(self, group: str, record: Record) -> bool:
        """Whether the lane that is not live is ready with a better model."""
        if record.other is None or not self._ready(group, record, record.other):
            return False
        order = list(dict.fromkeys((record.known_good, record.previous, slots.FACTORY, PASS)))
        mine, other = record.lanes[record.live].slot, record.lanes[record.other].slot
        return other in order and (mine not in order or order.index(other) < order.index(mine))

    # -- memory ------------------------------------------------------------------------------

    def _limit_memory(self, group: str, now: Group) -> None:
        """A lane's; a live one goes only when the other has taken over, if there is one ready."""
        record = now.record
        for lane in record.lanes:
            name = lane_name(group, lane)
            if not self._above_memory(name):
                continue
            if lane == record.live and record.other and self._ready(group, record, record.other):
                reason = f"lane {lane}: {self._memory_words(name)}"
                if self._order(record, Transition(group, "take_over", record.other, reason)):
                    return
            self._restart(name)

    def _above_memory(self, name: str) -> bool:
        seen, told = self._process(name), self._m.planned.get(name)
        above = seen.rss_bytes > self._settings.processes[name].memory_bytes
        if seen.pid is None or not above or self._was_killed(name):
            return False
        return told is None or (told.pid != seen.pid and self._past(told.at_ns + AGAIN_S * S))

    def _memory_words(self, name: str) -> str:
        limit = self._settings.processes[name].memory_bytes
        return f"it takes {self._process(name).rss_bytes / 1e6:.0f} MB, {limit / 1e6:.0f} may be"

    def _restart(self, name: str) -> None:
        pid = self._process(name).pid
        assert pid is not None
        self._event(
            "process.memory",
            Severity.WARNING,
            f"{name}: {self._memory_words(name)}; restarted",
            of=name,
        )
        self._m.planned[name] = Mark(pid, self._now)
        self.actions.append(Restart(name, pid))

    # -- what can wait -----------------------------------------------------------------------

    def start_missing(self) -> None:
        for name, limits in self._settings.processes.items():
            seen, asked = self._process(name), self._m.asked.get(name)
            if seen.pid is not None:
                if asked and self._past(seen.spawned_ns + round(SETTLED_S * S)):
                    del self._m.asked[name]
                elif asked and asked.first_ns:
                    self._m.asked[name] = msgspec.structs.replace(asked, first_ns=0)
                if not limits.lane and self._above_memory(name):
                    self._restart(name)
                continue
            after = max(seen.gone_ns + round(RESTART_S * S), asked.next_ns if asked else 0)
            if self._past(after):
                wait_s = min(2 * asked.wait_s, ASK_MOST_S) if asked else 1.0
                first_ns = asked.first_ns if asked and asked.first_ns else self._now
                next_ns = self._now + round(wait_s * S)
                self._m.asked[name] = Asked(first_ns, next_ns, wait_s)
                self.actions.append(Start(name))

    def govern_heat(self) -> None:
        for device in self._seen.lost:
            if device not in self._m.lost:
                text = f"{device}: its sensor reads what cannot be: the device is lost"
                self._event("device.lost", Severity.ERROR, text, device=device)
        for device in self._m.lost:
            if device not in self._seen.lost:
                self._event("device.back", Severity.INFO, f"{device} is back", device=device)
        self._remember(lost=self._seen.lost)
        if not self._seen.temperatures_c:
            return
        watchdog, pace = self._settings.watchdog, self._m.pace
        hottest = max(self._seen.temperatures_c.values())
        if hottest > watchdog.cool_c:
            self._remember(cool_ns=0)
        elif not self._m.cool_ns:
            self._remember(cool_ns=self._now)
        heat_ns = round(HEAT_S * S)
        waited = self._now >= self._m.paced_ns + heat_ns
        if hottest >= watchdog.hot_c and pace > PACE_LEAST and (pace == 1.0 or waited):
            text = f"{hottest:.0f} C: {pace / 2:g} of the frame rate"
            self._set_pace(pace / 2, "board.hot", Severity.WARNING, text)
        elif pace < 1.0 and self._m.cool_ns:
            cool = self._now >= self._m.cool_ns + heat_ns
            if cool and waited:
                text = f"{hottest:.0f} C: {pace * 2:g} of the frame rate"
                self._set_pace(min(1.0, pace * 2), "board.cool", Severity.INFO, text)

    def _set_pace(self, pace: float, code: str, severity: Severity, text: str) -> None:
        self._remember(pace=pace, paced_ns=self._now)
        self.actions.append(SetPace(pace))
        self._event(code, severity, text)

    def feed(self) -> None:
        """The hardware watchdog: unless something is stuck beyond our means."""
        stuck = self._stuck()
        if not stuck:
            self.actions.append(Feed())
        elif stuck != self._m.starved:
            text = f"{stuck}; the board will restart"
            self._event("watchdog.starved", Severity.CRITICAL, text)
        self._remember(starved=stuck)

    def _stuck(self) -> str:
        if self._past(self._seen.answered_ns + round(SILENT_S * S)):
            return "supervisord does not answer"
        for name in self._settings.processes:
            seen, killed = self._process(name), self._m.killed.get(name)
            asked: Asked | None = self._m.asked.get(name)
            if killed and killed.pid == seen.pid:
                if self._past(killed.at_ns + round(UNKILLABLE_S * S)):
                    return f"{name} (pid {killed.pid}) does not die"
            elif seen.pid is None and asked and asked.first_ns:
                absent = self._past(asked.first_ns + round(ABSENT_S * S))
                if absent:
                    return f"{name} can't be started"
        return ""

    # -- parts -------------------------------------------------------------------------------

    def _process(self, name: str) -> Seen:
        return self._seen.processes.get(name, _UNSEEN)

    def _report(self, group: str, lane: str) -> LaneReport | None:
        return self._process(lane_name(group, lane)).report

    def _recorded(self, group: str, record: Record, lane: str) -> LaneReport | None:
        """A lane's report, if it is of the process that the record has there."""
        report, its = self._report(group, lane), record.lanes.get(lane)
        same = report and its and (report.run, report.slot) == (its.run, its.slot)
        return report if same else None

    def _ready(self, group: str, record: Record, lane: str) -> bool:
        name = lane_name(group, lane)
        seen, told = self._process(name), self._m.planned.get(name)
        if seen.pid is None or self._was_killed(name) or (told and told.pid == seen.pid):
            return False
        return seen.ready_ns > 0 and self._recorded(group, record, lane) is not None

    def _order(self, record: Record, order: Transition) -> bool:
        """Order a transition if the record allows it; whether it did."""
        try:
            transition(record, order)
        except TransitionError:
            return False
        self.actions.append(order)
        return True

    def _event(self, code: str, severity: Severity, text: str, **data: str) -> None:
        self.actions.append(Event(code, severity, text, data))

    def _incident(self, name: str, what: str, at_ns: int, report: LaneReport | None) -> None:
        self.actions.append(Incident(name, what, at_ns, report.run if report else 0))


def _was_of_use(report: LaneReport | None) -> bool:
    """Whether a lane that died had judged, or stood by ready to."""
    return report is not None and report.ready and (report.judged > 0 or not report.live)


def _copy(memory: Memory) -> Memory:
    """With dictionaries of its own, so that the memory that was given stays as it is."""
    fields = msgspec.structs.asdict(memory).items()
    return msgspec.structs.replace(memory, **{k: dict(v) for k, v in fields if isinstance(v, dict)})


_UNSEEN = Seen()
