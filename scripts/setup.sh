# Sourced: `. scripts/setup.sh EXTRA` makes .venv with that extra of pyproject.toml, once, and puts
# it first in PATH. A change of pyproject.toml or constraints.txt makes it look again.
extra=$1
stamp=.venv/.installed-$extra
want=$(cat pyproject.toml constraints.txt | cksum)
if [ "$(cat "$stamp" 2>/dev/null)" != "$want" ]; then
    for python in "${PYTHON:-python3}" python3.13 python3.12 python3.11; do
        "$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break
        python=
    done
    [ -n "$python" ] || { echo "Vigil needs Python 3.11 or newer with venv (Debian: python3-venv); set PYTHON to one" >&2; exit 1; }
    echo "Setting up .venv ($extra) with $("$python" --version) ..." >&2
    [ -x .venv/bin/python ] || "$python" -m venv .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check \
        --constraint constraints.txt --editable ".[$extra]" >&2
    echo "$want" >"$stamp"
fi
PATH=$PWD/.venv/bin:$PATH
