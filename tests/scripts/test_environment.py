"""What the scripts decide before anything is installed. That they install is seen by whoever runs them."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

ROOT = Path(__file__).parents[2]
PYTHON = getattr(sys, "_base_executable", sys.executable)
VERSION = sys.version_info[:3]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with a space in its path, and no environment."""
    checkout = tmp_path / "a checkout"
    shutil.copytree(ROOT / "scripts", checkout / "scripts")
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, checkout)
    return checkout


@pytest.fixture
def environment(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """`scripts/environment.py` of that checkout."""
    monkeypatch.delenv("EM_PYTHON", raising=False)
    spec = importlib.util.spec_from_file_location("environment", checkout / "scripts" / "environment.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def made(environment: ModuleType) -> ModuleType:
    """The same, with an environment that was made for tests, but for the packages."""
    subprocess.run([PYTHON, "-I", "-m", "venv", "--without-pip", environment.VENV], check=True, timeout=60)
    environment.STAMP.write_text(f"{environment.fingerprint(VERSION)}\ntest\n")
    return environment


@pytest.fixture
def package(made: ModuleType) -> Path:
    """The dist-info of a package that is installed in that environment."""
    [folder] = made.VENV.glob("lib/python*/site-packages")
    info = folder / "tool-1.0.dist-info"
    info.mkdir()
    (folder / "tool.py").write_text("x = 1\n")
    (info / "RECORD").write_text("tool.py,sha256=0,6\ntool-1.0.dist-info/RECORD,,\n")
    return info


def run(script: Path, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if name not in ("EM_PYTHON", "VIRTUAL_ENV")}
    return subprocess.run(
        [script, *arguments], cwd="/", env={**inherited, **environ}, capture_output=True, text=True, timeout=60
    )


def executable(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


# --- when the environment is ready ---


def test_environment_is_ready_for_what_it_was_made_for(made):
    assert made.is_ready("test")


def test_environment_for_tests_serves_to_run(made):
    assert made.is_ready("docs")
    assert made.is_ready("runtime")


def test_environment_to_run_does_not_serve_for_tests(made):
    made.STAMP.write_text(made.STAMP.read_text().replace("test", "runtime"))
    assert made.is_ready("runtime")
    assert not made.is_ready("test")


def test_environment_is_not_ready_without_its_stamp(made):
    made.STAMP.unlink()
    assert not made.is_ready("test")


def test_environment_is_not_ready_without_its_python(made):
    made.PYTHON.unlink()
    assert not made.is_ready("test")


def test_environment_is_not_ready_when_its_python_is_no_environments(made):
    (made.VENV / "pyvenv.cfg").unlink()
    assert not made.is_ready("test")


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_environment_is_not_ready_after_a_change_of_what_it_is_made_from(made, name):
    with (made.ROOT / name).open("a") as file:
        file.write("# more\n")
    assert not made.is_ready("test")


def test_environment_is_not_ready_after_a_move(made, tmp_path, monkeypatch):
    monkeypatch.setattr(made, "ROOT", (tmp_path / "elsewhere").resolve())
    shutil.copytree(tmp_path / "a checkout", made.ROOT, symlinks=True)
    assert not made.is_ready("test")


def test_environment_of_another_python_is_not_what_em_python_asks_for(made, monkeypatch):
    monkeypatch.setenv("EM_PYTHON", "python")
    assert made.is_ready("test")
    monkeypatch.setattr(made, "sys", SimpleNamespace(version_info=(3, 99, 0)))
    assert not made.is_ready("test")


# --- what an interrupted install left ---


def test_package_that_is_whole_is_kept(made, package):
    made.forget_damaged_packages()
    assert package.exists()


def test_package_without_a_record_is_forgotten(made, package):
    (package / "RECORD").unlink()
    made.forget_damaged_packages()
    assert not package.exists()


@pytest.mark.parametrize("damage", [Path.unlink, lambda file: file.write_text("x")], ids=["missing", "cut off"])
def test_package_with_a_damaged_file_is_forgotten(made, package, damage):
    damage(package.parent / "tool.py")
    made.forget_damaged_packages()
    assert not package.exists()


def test_environment_without_pip_is_made_anew(made):
    assert not made.can_be_mended()


# --- which Python ---


def test_script_refuses_a_python_that_does_not_run(checkout):
    done = run(checkout / "scripts/run_cluster.sh", EM_PYTHON="/bin/false")
    assert done.returncode == 1
    assert "EM_PYTHON is '/bin/false'" in done.stderr
    assert not (checkout / ".venv").exists()


def test_script_passes_over_pythons_that_only_look_like_one(checkout, tmp_path):
    shims = tmp_path / "shims"
    shims.mkdir()
    executable(shims / "python3", "#!/bin/sh\nexit 127\n")
    (shims / "python3.13").symlink_to("/nowhere")
    executable(shims / "python3.11", f'#!/bin/sh\nexec "{PYTHON}" "$@"\n')
    for tool in ("bash", "dirname", "readlink"):
        (shims / tool).symlink_to(shutil.which(tool) or tool)
    command = f'source "{checkout}/scripts/env.sh"; find_python'
    done = subprocess.run(
        [shims / "bash", "-c", command], env={"PATH": str(shims)}, capture_output=True, text=True, timeout=60
    )
    assert done.stdout == f"{shims}/python3.11\n"


def test_script_says_what_a_python_without_venv_needs(checkout, tmp_path):
    half = executable(
        tmp_path / "python",
        f'#!/bin/sh\ncase "$*" in *ensurepip*) exit 1 ;; esac\nexec "{PYTHON}" "$@"\n',
    )
    done = run(checkout / "scripts/test.sh", EM_PYTHON=str(half))
    assert done.returncode == 1
    assert "apt-get install python3-venv" in done.stderr


# --- the command line ---


@pytest.mark.parametrize("script", ["run_cluster.sh", "test.sh"])
def test_script_helps_without_making_an_environment(checkout, script):
    done = run(checkout / "scripts" / script, "--help", EM_PYTHON="/bin/false")
    assert done.returncode == 0
    assert done.stdout.startswith(f"usage: scripts/{script}")


def test_run_cluster_refuses_a_word_that_is_no_option(checkout):
    done = run(checkout / "scripts/run_cluster.sh", "my.toml", EM_PYTHON="/bin/false")
    assert done.returncode == 2
    assert "run_cluster.sh -c FILE" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "command"),
    [
        ([], "demo"),
        (["--nodes", "3", "--http", "127.0.0.1:0"], "demo --nodes 3 --http 127.0.0.1:0"),
        (["-c", "my file.toml"], "run -c my file.toml"),
        (["--http", "127.0.0.1:0", "--config=a.toml"], "run --http 127.0.0.1:0 --config=a.toml"),
    ],
)
def test_run_cluster_hands_its_options_to_the_program(checkout, made, arguments, command):
    executable(made.VENV / "bin" / "em-runner", '#!/bin/sh\necho "$@"\n')
    done = run(checkout / "scripts/run_cluster.sh", *arguments, EM_PYTHON=PYTHON)
    assert (done.stdout, done.stderr, done.returncode) == (f"{command}\n", "", 0)
