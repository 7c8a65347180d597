"""One screen: which processes run, which lane is live, and for each camera whether its results
come, come on time, and are valid, three questions kept apart."""

import argparse
import sys

import msgspec

from common.messages import Stages
from common.paths import Paths
from common.states import CameraState, Phase
from services.cli.groups import GroupStatus, Incident, LaneStatus
from services.cli.listen import configuration, listener
from services.cli.models import short
from services.cli.observe import PREFIXES, CameraStatus, Observer, ProcessStatus, Status
from services.cli.text import number, red, seconds, size, table, yes
from services.cli.update import state

LISTEN_S = 1.5  # three beats
WATCH_S = 1.0
NOT_WELL = 2

_EPILOG = """\
examples:
  vigil status                          once
  vigil status --watch                  again and again, until Ctrl-C
  vigil status --json | jq .problems    for a program

exit status: 0 all is well; 2 it runs, but something is not alive, not on time or not valid;
1 nothing runs
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _EPILOG
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--watch", action="store_true", help="refresh until Ctrl-C")
    parser.add_argument(
        "--seconds", type=float, default=LISTEN_S, metavar="N", help="listen so long first (1.5)"
    )


def run(args: argparse.Namespace) -> int:
    paths = Paths.from_environment()
    config = configuration(paths)
    with listener(config, paths, PREFIXES) as listening:
        observer = Observer(config, paths, listening)
        observer.listen(args.seconds)
        status = observer.status()
        show(status, args.json, clear=args.watch)
        while args.watch:
            observer.listen(WATCH_S)
            status = observer.status()
            show(status, args.json, clear=True)
    return 0 if status.well else NOT_WELL


def show(status: Status, as_json: bool, clear: bool) -> None:
    if as_json:
        print(msgspec.json.encode(status).decode(), flush=True)
        return
    home = "\x1b[H\x1b[J" if clear and sys.stdout.isatty() else ""
    print(home + "\n".join(screen(status)), flush=True)


def screen(status: Status) -> list[str]:
    lines = [f"Vigil under {status.root}, running in {status.run}", ""]
    lines += table(
        ("PROCESS", "STATE", "ALIVE", " BEAT", " WORK", " PID", " UP", " MEMORY", " RESTARTS"),
        [_process(row) for row in status.processes],
    )
    lines.append("")
    lines += table(
        ("LANE", "IS", "SLOT", " RUN", " JUDGED", " FAILED", " INFER P99", " AGREES", "DEGRADED"),
        [_lane(lane) for row in status.groups for lane in row.lanes],
    )
    lines += [line for row in status.groups if (line := _group(row))]
    lines.append("")
    lines += table(
        ("CAMERA", "SOURCE", "STATE", " FRAMES", " FRAME AGE", " RESULTS", "ALIVE", "ON TIME",
         "VALID"),
        [_camera(row) for row in status.cameras],
    )  # fmt: skip
    lines.append("")
    lines += table(
        ("CAMERA", " LATENCY P50", " MAX", " PRECISION", " RECALL", "MODEL", " RELEASE", "SLOT",
         "RUNTIME"),
        [_model(row) for row in status.cameras],
    )  # fmt: skip
    lines.append("")
    lines += table(
        ("CAMERA", " CAPTURED", " = INFERRED", " + NOT INFERRED", " + FAILED", " + SKIPPED",
         " + TORN", " + OVERRUN", " + IN FLIGHT"),
        [(row.name, *_account(row)) for row in status.cameras],
    )  # fmt: skip
    lines.append("")
    lines += table(
        ("CAMERA", " IN STATE FOR", "FORMAT", " GIVES", " PASSED OVER", " RECONNECTS", " TRIGGERS",
         " MISSED", "ZONES"),
        [_given(row) for row in status.cameras],
    )  # fmt: skip
    lines.append("")
    lines += table(
        ("CAMERA", *(f" {stage.upper().replace('_', ' ')}" for stage in Stages.__struct_fields__)),
        [_stages(row) for row in status.cameras],
    )
    lines.append("")
    if status.incidents:
        lines += table(
            ("INCIDENT", " AGO", "WHAT", "OUTCOME", " NEXT VALID RESULT AFTER"),
            [_incident(row) for row in status.incidents],
        )
        lines.append("")
    if status.well:
        return [*lines, "All is well."]
    return [*lines, red("NOT WELL"), *(red(f"  {problem}") for problem in status.problems)]


def _process(row: ProcessStatus) -> tuple[str, ...]:
    return (
        row.name,
        row.state,
        yes(row.alive),
        seconds(row.beat_age_s),
        number(row.work_per_s, "/s"),
        str(row.pid or "-"),
        seconds(row.uptime_s),
        size(row.rss_bytes),
        "-" if row.restarts is None else str(row.restarts),
    )


def _lane(row: LaneStatus) -> tuple[str, ...]:
    return (
        row.process,
        row.role if row.ready else f"{row.role}, not ready",
        short(row.slot),
        str(row.run),
        str(row.judged),
        str(row.failed),
        number(row.infer_ms_p99, " ms"),
        number(row.agreement),
        row.degraded or "-",
    )


def _group(row: GroupStatus) -> str:
    """The change of model under way, and whether anything could take over meanwhile."""
    said = []
    if row.phase != Phase.NONE:
        said.append(f"slot {short(row.candidate)} is {row.phase}")
    if len(row.lanes) > 1 and not row.standby:
        said.append("no warm standby")
    if row.update and row.update.step:
        said.append(state(row.update))
    return f"group {row.name}: {', '.join(said)}" if said else ""


def _incident(row: Incident) -> tuple[str, ...]:
    recovery_s = None if row.recovery_ms is None else row.recovery_ms / 1e3
    return (row.process, seconds(row.age_s), row.what, row.outcome, seconds(recovery_s))


def _camera(row: CameraStatus) -> tuple[str, ...]:
    expected = row.frames.expected_per_s
    of = f" of {expected:g}" if expected else ""
    ended = row.state == CameraState.ENDED  # nothing more is to come
    valid = "-" if row.validity is None else "yes" if row.valid else f"NO: {row.validity}"
    return (
        row.name,
        row.source,
        row.state,
        f"{number(row.frames.per_s)}{of}/s",
        seconds(row.frame_age_s),
        number(row.results.per_s, "/s"),
        "-" if ended else yes(row.results.alive),
        "-" if ended else yes(row.results.on_time),
        valid,
    )


def _model(row: CameraStatus) -> tuple[str, ...]:
    model = row.model
    return (
        row.name,
        number(row.latency_p50_ms, " ms"),
        number(row.latency_max_ms, " ms"),
        number(row.precision),
        number(row.recall),
        f"{model.name} {model.version}".strip() if model else "-",
        str(model.release) if model else "-",
        model.slot if model else "-",
        model.runtime if model else "-",
    )


def _given(row: CameraStatus) -> tuple[str, ...]:
    return (
        row.name,
        seconds(row.state_s),
        row.format or "-",
        number(row.given_per_s, "/s"),
        str(row.passed_over),
        str(row.reconnects),
        str(row.triggers),
        str(row.triggers_missed),
        ", ".join(row.zones) or "-",
    )


def _stages(row: CameraStatus) -> tuple[str, ...]:
    times = (row.stages_ms.get(stage) for stage in Stages.__struct_fields__)
    return (row.name, *(number(time, " ms") for time in times))


def _account(row: CameraStatus) -> tuple[str, ...]:
    names = ("captured", "inferred", "not_inferred", "failed", "skipped", "torn", "overrun")
    account = row.account
    if account is None:
        return ("-",) * 8
    return tuple(str(account[name]) for name in (*names, "in_flight"))
