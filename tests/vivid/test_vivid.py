"""V4L2 on a real kernel driver, in a guest: cases.py says what."""

import pytest

from tests.vivid import guest


@pytest.mark.slow
@pytest.mark.timeout(guest.BOOT_S + 60)
def test_all_cases_pass_on_a_real_driver() -> None:
    if missing := guest.missing():
        pytest.skip(f"needs {', '.join(missing)}: scripts/test_v4l2 installs them")
    plugins = "-p no:cacheprovider -p no:hypothesispytest"  # they write into the project
    pytest_here = f"pytest {plugins} -o timeout=200 -v --color=no tests/vivid/cases.py"
    assert guest.run(["vivid"], f".venv/bin/python -m {pytest_here}") == 0
