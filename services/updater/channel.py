"""What a channel says, and which release of it a device takes: pure.

A channel is a target `channels/NAME.json` of the repository, signed as every target is. For each
group it names a bundle and its releases in order of preference; a device takes the first one that
is for it: its hash lies within the rollout, the time has come, nobody has withdrawn it, and it was
not bad here. A bundle is a target `bundles/BUNDLE/RELEASE/PROFILE.tar`.
"""

import hashlib
from collections.abc import Mapping
from datetime import datetime
from typing import Annotated

import msgspec
from msgspec import Meta

from common.config import NAME
from common.errors import UntrustedError

REASON = 1000  # characters
Name = Annotated[str, Meta(pattern=f"^{NAME}$")]
Release = Annotated[int, Meta(ge=0)]
Text = Annotated[str, Meta(max_length=200)]
Time = Annotated[datetime, Meta(tz=True)]
ANY = "any"  # the profile of a bundle that every device may take


class _Signed(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class Offer(_Signed, frozen=True):
    release: Release
    rollout: Annotated[float, Meta(ge=0, le=100)] = 100.0  # per cent of the devices
    not_before: Time | None = None


class Choice(_Signed, frozen=True):
    bundle: Name
    releases: Annotated[tuple[Offer, ...], Meta(max_length=64)]  # in order of preference


class Channel(_Signed, frozen=True, kw_only=True):
    format: Annotated[int, Meta(ge=1, le=1)] = 1
    serial: Annotated[int, Meta(ge=1)]  # of this channel, only grows
    groups: dict[Name, Choice]
    withdrawn: dict[Name, dict[str, Text]] = {}  # bundle -> release -> why


class Custom(_Signed, frozen=True):
    """What the signed targets metadata says of a bundle, beside its length and hashes."""

    name: str  # as in the bundle's manifest, as are version and release
    version: Text
    release: Release
    profile: Name
    slot: Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]  # digest of its content
    published: Time


def parse(content: bytes, where: str) -> Channel:
    """
    Raises:
        UntrustedError: it is no channel.
    """
    try:
        return msgspec.json.decode(content, type=Channel)
    except msgspec.MsgspecError as error:
        raise UntrustedError(f"{where}: is no channel of format 1: {error}") from error


def channel_path(channel: str) -> str:
    return f"channels/{channel}.json"


def bundle_paths(bundle: str, release: int, profile: str) -> list[str]:
    """The targets that a device of a profile may take, in order of preference."""
    return [f"bundles/{bundle}/{release}/{one}.tar" for one in dict.fromkeys((profile, ANY))]


def share(device: str, bundle: str, release: int) -> float:
    """Where a device stands in a rollout, 0 to 100: the same each time, another each release."""
    digest = hashlib.sha256(f"{device}\0{bundle}\0{release}".encode()).digest()
    return int.from_bytes(digest[:8]) / 2**64 * 100


def wanted(
    channel: Channel, group: str, device: str, now_s: float, floor: int, bad: Mapping[int, str]
) -> tuple[int | None, str]:
    """The release that a group of a device should run, and why not a more preferred one.

    Args:
        floor: the highest release it ever ran; older ones only where each way back is signed:
            the floor's release itself withdrawn.
        bad: releases that can't be had here, and why.
    """
    choice = channel.groups.get(group)
    if choice is None:
        return None, f"the channel has nothing for group {group}"
    withdrawn = channel.withdrawn.get(choice.bundle, {})
    passed = []
    for offer in choice.releases:
        name = f"release {offer.release}"
        if str(offer.release) in withdrawn:
            passed.append(f"{name} is withdrawn: {withdrawn[str(offer.release)]}")
        elif offer.release in bad:
            passed.append(f"{name} {bad[offer.release]}")
        elif offer.release < floor and str(floor) not in withdrawn:
            passed.append(f"{name} is older than release {floor}, which is not withdrawn")
        elif offer.not_before is not None and now_s < offer.not_before.timestamp():
            passed.append(f"{name} not before {offer.not_before:%Y-%m-%dT%H:%MZ}")
        elif share(device, choice.bundle, offer.release) >= offer.rollout:
            passed.append(f"{name} is rolled out to {offer.rollout:g} %, not to this device")
        else:
            return offer.release, "; ".join(passed)[:REASON]
    return None, "; ".join(passed)[:REASON] or "the channel has no release for it"
