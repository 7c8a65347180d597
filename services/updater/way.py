"""One group's signed update on its way, step by step. Each step ends in what is noted on disk
(`life`) or in the record, so that any of them may be cut short at any instant."""

import random
import time
from contextlib import suppress
from functools import partial

import msgspec

from common import durable, slots
from common.errors import LockedError, StorageError, TransitionError
from common.service import Service
from common.slots import Record
from common.states import Phase, Severity, SlotState
from common.updates import HISTORY, GroupReport
from common.updates import Status as Entry
from services.updater import floors, life
from services.updater.candidate import INSTALL_S, RETRY_S, Candidate
from services.updater.children import Child, Outcome
from services.updater.device import within
from services.updater.life import Answer, Fetched, Noted, Step, Update

FETCH_S = 6 * 3600.0  # for one try of a download; the next goes on where it ended
LEAST_S = 30.0  # between two tries, at first
SLOW_B_S = 1e6  # of a medium on which an install is not called hung
INSTALLS = 3  # an install that is killed is not the bundle's fault at once
CLOCK_S = 120.0  # that a clock may be behind the last signed time, and still be right
DAY_S = 86_400.0
AGE_S = 60.0  # between two looks at the model's age


class Way:
    def __init__(self, service: Service, candidate: Candidate, child: type[Child]) -> None:
        self._service, self._candidate, self._child = service, candidate, child
        self._settings = service.config.updates
        self._folder = service.paths.updates
        self.group = candidate.group
        self._file = self._folder / f"txn-{self.group}.json"
        self.noted, problem = life.load(self._file)
        if problem:
            service.event("update.damaged", Severity.ERROR, problem)
            with suppress(OSError):
                durable.set_aside(self._file)
        self._fetching = False  # from the network
        self._reason = ""  # of the last check: why not more
        self._age_s: float | None = None  # of the live model
        self._level = ""  # of that
        self._aged = 0.0  # when that was looked at
        self._begin(since=0.0)

    def _begin(self, since: float | None = None) -> None:
        """A new step: nothing is known against it."""
        self._since = time.monotonic() if since is None else since
        self._retry, self._tries, self._waits, self._told, self._ended = 0.0, 0, "", "", ""

    def _note(self, noted: Noted) -> None:
        life.save(self._file, noted)
        self.noted = noted

    def _at(self, update: Update | None) -> Noted:
        return msgspec.structs.replace(self.noted, update=update)

    @property
    def wants(self) -> str:
        """The file that is to be downloaded, or installed from there; "" for none."""
        update = self.noted.update
        return update.sha256 if update and update.step in (Step.DOWNLOAD, Step.INSTALL) else ""

    # -- what a check found ------------------------------------------------------------------

    def line(self, answer: Answer) -> str:
        """An answer for people."""
        if answer.back:
            return f"{self.group}: goes back to slot {answer.back[:12]}; {answer.reason}"
        if answer.update is None:
            return f"{self.group}: nothing to do: {answer.reason}"
        update, now = answer.update, self.noted.update
        if now and now.slot == update.slot:
            return f"{self.group}: {update.title} is on its way: {now.step}"
        more = f"; {answer.reason}" if answer.reason else ""
        return f"{self.group}: {update.title}, {update.length} bytes from {update.source}{more}"

    def take(self, answer: Answer, at_once: bool) -> None:
        """It becomes what the group is about.

        Args:
            at_once: somebody asks: without the rest of a pause.
        """
        self._reason = answer.reason
        self._leave(answer)
        record, found = self._candidate.store.read(), answer.update
        self.observe(record)  # what was judged meanwhile is told before it is forgotten
        now = self.noted.update
        if found and record.state(found.slot) in (SlotState.GOOD, SlotState.BAD):
            return  # judged since it was found
        if now and record.txn.slot == now.slot and record.txn.phase is not Phase.NONE:
            return  # it is judged first
        if now and found and now.slot == found.slot:
            there = msgspec.structs.replace(found, step=now.step, moved=now.moved)
            if there != now:  # the stick was pulled, the network is back; or it was packed anew
                self._note(self._at(there))
                at_once = True
            self._retry = 0.0 if at_once else self._retry
            return
        if now is not None:
            if record.state(now.slot) is SlotState.INSTALLED:
                self._candidate.store.commit(partial(slots.discard, name=now.slot))
            why = answer.withdrawn.get(now.slot)
            gone = "it is not offered any more" if why is None else f"withdrawn: {why}"
            self._tell(now, "failed", gone)
        published = dict(self.noted.published_s)
        if found:
            published[found.slot] = found.published_s
            step, _ = life.followed(found, record)  # it may be here already
            found = msgspec.structs.replace(found, step=step)
        self._note(Noted(found, self.noted.refused, published))
        self._begin()
        if found:
            self._tell(found, "ok", step="found")

    def _leave(self, answer: Answer) -> None:
        """What is withdrawn: under test no longer; live only until there is something to go to."""
        noted = self.noted.update
        if not (answer.withdrawn or answer.back):
            return

        def change(now: Record) -> Record:
            why = answer.withdrawn.get(now.txn.slot)
            if now.txn.phase is not Phase.NONE and why is not None:
                now = slots.roll_back(now, f"withdrawn: {why}")
            elif (
                answer.back
                and now.txn.phase is Phase.NONE  # else it goes back already, or something is tested
                and now.chain(after=now.known_good) == answer.back
            ):
                now = slots.roll_back(now, "withdrawn")
            for name in answer.withdrawn.keys() - {noted and noted.slot}:
                if now.state(name) is SlotState.INSTALLED:
                    now = slots.discard(now, name)
            return now

        with suppress(TransitionError, LockedError):  # looked at again after the next check
            self._candidate.store.commit(change)

    # -- bringing it on ----------------------------------------------------------------------

    def next_step(self) -> Child | None:
        """Begin with what a child has to do, if it is time."""
        update = self.noted.update
        if update is None or time.monotonic() < self._retry:
            return None
        tar = self._folder / "partial" / update.sha256
        if update.step is Step.INSTALL and not tar.is_file():  # removed, or packed anew
            update = msgspec.structs.replace(update, step=Step.DOWNLOAD)
            self._note(self._at(update))
        if update.step is Step.DOWNLOAD:
            if not update.offline and not self._open(self._settings.download):
                self._waits = "a download window"
                return None
            self._waits, self._fetching = "", not update.offline
            return self._child(
                "services.updater.fetch", self.group,
                limit_s=FETCH_S, settle=partial(self._fetched, update),
            )  # fmt: skip
        if update.step is Step.INSTALL:
            self._waits = "" if self._candidate.free else "another model that is under test"
            return None if self._waits else self._child(
                "services.updater.install", self.group, str(tar), str(self._file),
                limit_s=INSTALL_S + update.length / SLOW_B_S,
                settle=partial(self._installed, update),
            )  # fmt: skip
        return None

    @property
    def overtime(self) -> bool:
        """Whether it downloads though its window has closed."""
        return self._fetching and not self._open(self._settings.download)

    def _fetched(self, update: Update, outcome: Outcome, said: str) -> None:
        self._fetching = False
        if (outcome is Outcome.LATER and not said) or self.noted.update != update:
            return  # it made way, or the record tells more
        try:
            fetched = msgspec.json.decode(said, type=Fetched)
        except msgspec.MsgspecError:  # it was killed
            fetched = Fetched(update.moved, error=said)
        update = msgspec.structs.replace(update, moved=fetched.moved)
        self._note(self._at(update))
        if outcome is Outcome.DONE:
            self._go_on(update, Step.INSTALL)
        elif outcome is not Outcome.LATER or fetched.error:  # else it goes on at once
            told, wait_s = "waits", fetched.wait_s
            if outcome is Outcome.REFUSED:  # all of it moved in vain
                told, wait_s = "failed", min(max(DAY_S, wait_s), wait_s * 2 ** min(self._tries, 16))
            self._later(update, told, fetched.error, wait_s)

    def _installed(self, update: Update, outcome: Outcome, said: str) -> None:
        if self.noted.update != update:  # the record has told already
            return
        again = outcome is Outcome.DIED and self._tries < INSTALLS
        if outcome is Outcome.LATER or again:
            self._later(update, "waits", said, RETRY_S)
        elif outcome is Outcome.DONE:
            self._go_on(update, Step.ACTIVATE)
        else:
            self._end(update, Step.BAD, said, self.noted.refused | {update.slot: said})

    def _go_on(self, update: Update, step: Step) -> None:
        self._note(self._at(msgspec.structs.replace(update, step=step)))
        self._tell(update, "ok")
        self._begin()

    def _later(self, update: Update, outcome: str, text: str, least_s: float = 0.0) -> None:
        """Try again after a pause that grows; say why, once."""
        wait_s = max(least_s, min(self._settings.check_s, LEAST_S * 2 ** min(self._tries, 16)))
        self._tries += 1
        self._retry = time.monotonic() + wait_s * random.uniform(0.5, 1.5)
        if text != self._told:
            self._tell(update, outcome, text)
        self._told = self._waits = text

    def observe(self, record: Record) -> None:
        """Tell what became of it since it was installed."""
        self._age(record)
        update = self.noted.update
        if update is None:
            return
        step, reason = life.followed(update, record)
        if step is Step.ACTIVATE:
            self._waits = "its turn" if self.may_activate else "an activation window"
        if step is update.step:
            return
        if step in (Step.GOOD, Step.BAD):
            self._end(update, step, reason, self.noted.refused)
            return
        self._note(self._at(msgspec.structs.replace(update, step=step)))
        if reason:
            self._tell(update, "failed", reason)
        self._tell_passed(update, step)
        self._begin()

    def _end(self, update: Update, step: Step, reason: str, refused: dict[str, str]) -> None:
        """Tell what it came to, and then forget it: a kill in between has it told once more."""
        if self._ended != update.slot:  # else the disk refused to forget it
            self._ended = update.slot
            if step is Step.BAD:
                self._tell(update, "failed", reason)
            else:
                self._tell_passed(update, step)
            self._tell(update, "failed" if step is Step.BAD else "ok", reason, step=step)
        self._note(Noted(None, refused, self.noted.published_s))
        self._begin()

    # -- windows -----------------------------------------------------------------------------

    @property
    def may_activate(self) -> bool:
        """Whether a test of a new model may begin now."""
        return self._open(self._settings.activate)

    def _open(self, windows: tuple[str, ...]) -> bool:
        """Without any, always; else not by a clock that is behind what is known to have come."""
        if not windows:
            return True
        now_s = time.time()
        return now_s >= floors.trusted_now(self._folder) - CLOCK_S and within(windows, now_s)

    # -- telling -----------------------------------------------------------------------------

    def _tell_passed(self, update: Update, step: Step) -> None:
        """The steps before this one, the one that was noted first."""
        order = list(Step)
        for passed in order[order.index(update.step) : order.index(step)]:
            self._tell(update, "ok", step=passed)

    def _tell(self, update: Update, outcome: str, reason: str = "", step: str = "") -> None:
        """A status event, kept on disk until it is among the oldest."""
        step = step or update.step
        entry = Entry(
            group=self.group, bundle=update.bundle, version=update.version,
            release=update.release, slot=update.slot, step=step, outcome=outcome, reason=reason,
            bytes=update.moved, wall_s=time.time(),
            seconds=round(time.monotonic() - self._since, 3) if self._since else 0.0,
        )  # fmt: skip
        with suppress(StorageError):  # it is told all the same
            life.add_status(self._folder / HISTORY, entry)
        severity = {"ok": Severity.INFO, "waits": Severity.WARNING}.get(outcome, Severity.ERROR)
        text = f"{update.title}: {step}: {outcome}{': ' if reason else ''}{reason}"
        data = {key: str(value) for key, value in msgspec.structs.asdict(entry).items()}
        self._service.event(f"update.{step}", severity, text, **data)

    def _age(self, record: Record) -> None:
        """How old the live model is, since it was published, by trusted time; the factory's is as
        old as the build. Told once a level."""
        if time.monotonic() < self._aged + AGE_S and self._aged:
            return
        self._aged = time.monotonic()
        published_s = self.noted.published_s.get(record.known_good)
        if record.known_good == slots.FACTORY:
            published_s = floors.build_time_s()
        now_s = floors.trusted_now(self._folder)
        self._age_s = None if published_s is None else now_s - published_s
        level = ""
        limits = {"warning": self._settings.warn_days, "critical": self._settings.escalate_days}
        for name, days in limits.items():
            if days is not None and (self._age_s or 0.0) > days * DAY_S:
                level = name
        if level and level != self._level:
            old = (self._age_s or 0.0) / DAY_S
            text = f"group {self.group}: its model was published {old:.0f} days ago"
            self._service.event("model.old", Severity(level), text, group=self.group)
        self._level = level

    def report(self) -> GroupReport:
        report = GroupReport(reason=self._reason, age_level=self._level, age_s=self._age_s)
        update = self.noted.update
        if update is None:
            return report
        have = 0
        with suppress(OSError):  # not begun, or gone just now
            have = (self._folder / "partial" / update.sha256).stat().st_size
        return msgspec.structs.replace(
            report, title=update.title, step=update.step, waits=self._waits,
            length=update.length, have=have,
        )  # fmt: skip
