"""``drcnn completion``: what a shell proposes."""

import shutil
import subprocess
import sys

import pytest

from drcnn.cli import VERBS
from drcnn.cli import main as drcnn

TRIES = """\
source "$1"
shift
COMP_WORDS=("$@")
COMP_CWORD=$(($# - 1))
_shtab_drcnn
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    pytest.importorskip("shtab", reason="needs shtab, which the extra `completion` installs")
    if shutil.which("bash") is None:
        pytest.skip("needs bash")
    file = tmp_path_factory.mktemp("completion") / "drcnn.bash"
    made = subprocess.run([sys.executable, "-m", "drcnn.completion", "bash"], capture_output=True, check=True)
    file.write_bytes(made.stdout)
    return file


@pytest.mark.parametrize(
    "words, proposed",
    [
        (["drcnn", ""], set(VERBS)),
        (["drcnn", "pre"], {"predict"}),
        (["drcnn", "predict", "--soft"], {"--soft-nms"}),
        (["drcnn", "predict", "--soft-nms", ""], {"config", "off", "linear", "gaussian"}),
        (["drcnn", "train", "--data.roo"], {"--data.root"}),
        (["drcnn", "train", "quick.py", "--optim.no-f"], {"--optim.no-fused"}),
        (["drcnn", "train", "qui"], {"quick.py"}),
        (["drcnn", "export", "run", "--form"], {"--format"}),
    ],
)
def test_bash(script, tmp_path, words, proposed):
    (tmp_path / "quick.py").touch()
    command = ["bash", "-c", TRIES, "bash", str(script), *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
    assert set(done.stdout.split()) == proposed


@pytest.mark.parametrize("shell", ["zsh", "tcsh"])
def test_other_shells(shell, capsys):
    pytest.importorskip("shtab", reason="needs shtab, which the extra `completion` installs")
    assert drcnn(["completion", shell]) == 0
    said = capsys.readouterr().out
    assert all(word in said for word in ("benchmark", "soft-nms", "data.root", "gaussian"))


def test_errors_are_one_line(monkeypatch, capsys):
    assert drcnn(["completion", "fish"]) == 2
    assert "'bash', 'zsh', 'tcsh'" in capsys.readouterr().err.replace('"', "'")
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert drcnn(["completion", "bash"]) == 2
    assert (
        capsys.readouterr().err
        == "error: this needs shtab; install it with: pip install 'drcnn[completion]'\n"
    )
