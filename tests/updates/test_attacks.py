"""The attacks that TUF's and Uptane's specifications list, by name, on the real updater."""

from pathlib import Path

import pytest

from tests.updates.attacks import ATTACKS, staged


@pytest.mark.parametrize("name", ATTACKS)
def test_attack(name: str, tmp_path: Path) -> None:
    with staged(tmp_path) as stage:
        ATTACKS[name](stage)
