"""Publish models to devices: a repository of signed static files, for any web server, S3 or a CDN.

Devices are made with REPO/metadata/1.root.json and read REPO by URL, or a copy of it from a stick.
"""

import argparse
import re
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

from common.errors import VigilError
from scripts.metadata import DAYS, EXPIRY_DAYS, INTERRUPTED, ONLINE, ROLES
from scripts.repository import Repository, bundles, channels
from scripts.signers import named
from services.updater.channel import Channel

_EPILOG = """\
examples:
  scripts/publish init updates --keys keys      a new repository and its keys
  scripts/publish add updates parts-8.tar --keys keys
  scripts/publish channel updates line --bundle parts --release 8 --rollout 1 --keys keys
  scripts/publish promote updates line --release 8 --rollout 100 --keys keys
  scripts/publish withdraw updates line --bundle parts --release 8 --why "sees ghosts" --keys keys
  scripts/publish refresh updates --keys online     each day: needs only these two keys
  scripts/publish rotate updates timestamp snapshot --keys keys     when online keys were stolen
  scripts/publish export updates /media/stick --channel line

keys: the folder of `init` holds all of them, and keys.json, which says where each is. Give each
holder of a root key that file and their own root-N.pem, and the machine that refreshes that file,
snapshot.pem and timestamp.pem; name several folders with --keys A --keys B.
"""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/publish",
        description=__doc__,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, help: str, *, signs: bool = True) -> argparse.ArgumentParser:
        one = commands.add_parser(name, help=help, description=f"{help[0].upper()}{help[1:]}.")
        one.add_argument("repo", type=Path, metavar="REPO", help="the repository's folder")
        if signs:
            one.add_argument(
                "--keys", type=Path, action="append", required=True, metavar="DIR",
                help="a folder with keys; several may be given, new keys go to the first",
            )  # fmt: skip
        return one

    one = command("init", "make a repository and its keys: root 2 of 3, targets, online ones")
    for role, days in DAYS.items():
        one.add_argument(
            f"--{role}-days", type=_days, default=days, metavar="N",
            help=f"how long what the key of {role} signs is valid ({days})",
        )  # fmt: skip

    one = command("add", "check bundles as a device does, and publish them")
    one.add_argument("tars", type=Path, nargs="+", metavar="BUNDLE.tar")
    one.add_argument("--profile", help="of the devices they are for (the manifest's own)")

    one = command("channel", "offer a release to a group before all others, or change its offer")
    one.add_argument("channel", metavar="CHANNEL", help="made where it is new")
    one.add_argument("--group", default="main", help="of cameras (main)")
    one.add_argument("--bundle", required=True, metavar="NAME")
    one.add_argument("--release", type=int, required=True, metavar="N")
    _rollout(one, None)
    one.add_argument(
        "--not-before", type=_utc, metavar="TIME", help="UTC, such as 2026-11-30T00:00Z"
    )

    one = command("promote", "change the rollout of a release that a channel offers")
    one.add_argument("channel", metavar="CHANNEL")
    one.add_argument("--group", help="where several have the release")
    one.add_argument("--release", type=int, required=True, metavar="N")
    _rollout(one, 100.0)

    one = command("withdraw", "call a release back; devices that run it leave it")
    one.add_argument("channel", metavar="CHANNEL")
    one.add_argument("--bundle", required=True, metavar="NAME")
    one.add_argument("--release", type=int, required=True, metavar="N")
    one.add_argument("--why", required=True, metavar="TEXT", help="shown on the devices")
    one.add_argument(
        "--fallback", type=int, metavar="N", help="a release for all, where none is left"
    )
    one.add_argument(
        "--unpublished", action="store_true",
        help="it was never published here, but by whoever stole the keys",
    )  # fmt: skip

    one = command("refresh", "sign snapshot and timestamp, or other roles, for another while")
    one.add_argument("roles", nargs="*", type=_role, metavar="ROLE", help=", ".join(ROLES))
    one.add_argument(
        "--days", type=_days, metavar="N", help="from now on valid so long (as it was)"
    )

    one = command("rotate", "replace keys by new ones")
    one.add_argument("roles", nargs="+", type=_role, metavar="ROLE", help=", ".join(ROLES))
    one.add_argument(
        "--key-name", action="append", default=[], metavar="NAME",
        help="only this one, such as root-2; may be repeated",
    )  # fmt: skip

    one = command("export", "copy what devices need, for a stick or a drop folder", signs=False)
    one.add_argument("into", type=Path, metavar="DIR")
    one.add_argument("--channel", help="only this one")
    one.add_argument("--profile", help="only bundles for these devices")

    command("show", "what is published, by which keys, until when", signs=False)
    return parser.parse_args()


def _rollout(parser: argparse.ArgumentParser, default: float | None) -> None:
    text = "per cent of the devices, by a hash of their ids (100, or as it was)"
    parser.add_argument("--rollout", type=float, default=default, metavar="PERCENT", help=text)


def _role(text: str) -> str:
    if text not in ROLES:
        raise argparse.ArgumentTypeError(f"{text}: expected one of {', '.join(ROLES)}")
    return text


def _days(text: str) -> int:
    if not re.fullmatch("[1-9][0-9]{0,4}", text):
        raise argparse.ArgumentTypeError(f"{text}: expected whole days, at least 1")
    return int(text)


def _utc(text: str) -> datetime:
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        found = datetime.min
    if found.tzinfo is None:
        raise argparse.ArgumentTypeError(f"{text}: expected a time such as 2026-11-30T00:00Z")
    return found.astimezone(UTC)


class Progress:
    """Per cent on stderr: on a terminal, or else for what takes more than a second."""

    def __init__(self) -> None:
        self._what, self._since, self._shown = "", 0.0, -1

    def __call__(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if what != self._what:
            self._what, self._since, self._shown = what, now, -1
        percent = 100 * done // max(total, 1)
        terminal = sys.stderr.isatty()
        if percent == self._shown or not (terminal or now - self._since > 1):
            return
        if not terminal and percent < min(self._shown + 10, 100):
            return
        self._shown = percent
        end = "\r" if terminal and percent < 100 else "\n"
        print(f"{what}: {percent} %", file=sys.stderr, end=end, flush=True)


def run(args: argparse.Namespace) -> list[str]:
    """Do it; returns what there is to tell.

    Raises:
        VigilError, OSError: it could not be done.
    """
    repo = Repository(args.repo, getattr(args, "keys", ()), progress=Progress())
    match args.command:
        case "init":
            days = {role: getattr(args, f"{role}_days") for role in ROLES}
            Repository.init(args.repo, args.keys, days=days)
            return [
                f"Devices trust {args.repo}/metadata/1.root.json.",
                f"{args.keys[0]} holds the keys: take those of root and targets off the network.",
            ]
        case "add":
            return [f"added {path}" for path in repo.add_bundles(*args.tars, profile=args.profile)]
        case "channel":
            offer = (args.bundle, args.release, args.rollout, args.not_before)
            return _told(args.channel, repo.set_channel(args.channel, args.group, *offer))
        case "promote":
            offered = repo.promote(args.channel, args.release, args.rollout, args.group)
            return _told(args.channel, offered)
        case "withdraw":
            what = (args.bundle, args.release, args.why, args.fallback, args.unpublished)
            return _told(args.channel, repo.withdraw(args.channel, *what))
        case "refresh":
            repo.refresh(args.roles or ONLINE, args.days)
        case "rotate":
            repo.rotate(args.roles, args.key_name)
        case "export":
            paths = repo.export(args.into, args.channel, args.profile)
            return [*(f"copied {path}" for path in paths), *_roles(Repository(args.into))]
        case "show":
            return [*_roles(repo), *_content(repo)]
    return _roles(repo)


def _roles(repo: Repository) -> list[str]:
    state, now, lines = repo.state(), datetime.now(UTC), []
    for role in ROLES:
        signed, signers = state.role(role), state.root.roles[role]
        left = (signed.expires - now).total_seconds() / 86400
        warning = ""
        if left < signed.unrecognized_fields[EXPIRY_DAYS] / 4:
            state_of = f"expires in {left:.1f} days" if left > 0 else "HAS EXPIRED"
            warning = f"  <- {state_of}: publish refresh {role}"
        keys = sorted(named(state.root.keys[keyid]) for keyid in signers.keyids)
        lines.append(
            f"{role:10} version {signed.version:<5} until {signed.expires:%Y-%m-%dT%H:%MZ}  "
            f"{signers.threshold} of {', '.join(keys)}{warning}"
        )
    return [*lines, INTERRUPTED] if state.stale else lines


def _content(repo: Repository) -> list[str]:
    state = repo.state()
    lines = [
        f"bundle     {custom.name} release {custom.release} (version {custom.version}) for "
        f"{custom.profile}: {target.length} bytes, slot {custom.slot[:12]}, "
        f"{custom.published:%Y-%m-%dT%H:%MZ}"
        for target, custom in bundles(state)
    ]
    for name in channels(state):
        lines += _told(name, repo.channel(name))
    return lines


def _told(name: str, channel: Channel) -> list[str]:
    lines = [f"channel    {name}, serial {channel.serial}"]
    for group, choice in channel.groups.items():
        for offer in choice.releases:
            when = f", not before {offer.not_before:%Y-%m-%dT%H:%MZ}" if offer.not_before else ""
            what = f"{choice.bundle} release {offer.release} to {offer.rollout:g} %{when}"
            lines.append(f"  group {group}: {what}")
    for bundle, releases in channel.withdrawn.items():
        lines += [f"  withdrawn: {bundle} release {n}: {why}" for n, why in releases.items()]
    return lines


def main() -> int:
    try:
        print("\n".join(run(arguments())))
    except VigilError as error:
        print("publish:", " ".join(str(error).split("\n")), file=sys.stderr)
    except OSError as error:
        print(f"publish: {error.filename}: {error.strerror}", file=sys.stderr)
    else:
        return 0
    return 1


if __name__ == "__main__":
    sys.exit(main())
