"""The private keys of a repository, spread over folders as their owners like.

A folder's keys.json maps the id of a key to its securesystemslib URI. "file2:NAME.pem" is a file of
that folder; where it is missing, somebody else keeps it. For a key that was brought into an HSM or
a key service, put its URI there and remove the file.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import msgspec
from cryptography.exceptions import UnsupportedAlgorithm
from securesystemslib.exceptions import Error as SignerError
from securesystemslib.signer import CryptoSigner, Key, Signer
from tuf.api.metadata import Root

from common import durable
from common.errors import VigilError

LIST = "keys.json"
_FILE = "file2:"


class PublishError(VigilError):
    """It was not published; the message says why."""


class Keys:
    """
    Args:
        folders: where keys are looked for, in this order; new ones go to the first.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        self.folders = [folder.absolute() for folder in folders]
        self._signers: dict[str, Signer] = {}

    def make(self, name: str) -> Key:
        """A new ed25519 key."""
        if not self.folders:
            raise PublishError("new keys need a folder: give --keys DIR")
        folder, signer = self.folders[0], CryptoSigner.generate_ed25519()
        key = signer.public_key
        key.unrecognized_fields["name"] = name
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        file = folder / f"{name}.pem"
        if file.exists():  # an older one, which may still be needed
            file = folder / f"{name}-{key.keyid[:8]}.pem"
        durable.write(file, signer.private_bytes, 0o600)
        listed = _listed(folder) | {key.keyid: f"{_FILE}{file.name}"}
        durable.write(folder / LIST, json.dumps(listed, indent=1).encode(), 0o600)
        self._signers[key.keyid] = signer
        return key

    def signers(self, root: Root, role: str) -> list[Signer]:
        """Every key of a role that is at hand.

        Raises:
            PublishError: those are fewer than the role's threshold.
        """
        found, missing = [], []
        for keyid in root.roles[role].keyids:
            one = self._signer(root.keys[keyid])
            if isinstance(one, str):
                missing.append(f"{named(root.keys[keyid])}: {one}")
            else:
                found.append(one)
        if len(found) < (threshold := root.roles[role].threshold):
            raise PublishError(
                f"{role} is signed by {threshold} of {len(found) + len(missing)} keys, "
                f"{len(found)} at hand; missing {'; '.join(missing)}"
            )
        return found

    def _signer(self, key: Key) -> Signer | str:
        """The key, or why there is none."""
        if key.keyid in self._signers:
            return self._signers[key.keyid]
        why = []
        for folder in self.folders:
            uri = _listed(folder).get(key.keyid)
            if uri is None:
                why.append(f"not in {folder / LIST}")
                continue
            if uri.startswith(_FILE):
                uri = f"{_FILE}{folder / uri.removeprefix(_FILE)}"
                if not Path(uri.removeprefix(_FILE)).exists():
                    why.append(f"no file {uri.removeprefix(_FILE)}")
                    continue
            try:
                self._signers[key.keyid] = Signer.from_priv_key_uri(uri, key)
                return self._signers[key.keyid]
            except (OSError, ValueError, TypeError, SignerError, UnsupportedAlgorithm) as error:
                why.append(f"{folder / LIST}: {uri}: {error}")
        return ", ".join(why) or "no folder to look in, give --keys DIR"


def _listed(folder: Path) -> dict[str, str]:
    path = folder / LIST
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, str])
    except FileNotFoundError:
        return {}
    except msgspec.MsgspecError as error:
        raise PublishError(f"{path}: {error}; expected an object of key id and URI") from error


def named(key: Key) -> str:
    return f"{key.unrecognized_fields.get('name', 'unnamed')} ({key.keyid[:8]})"
