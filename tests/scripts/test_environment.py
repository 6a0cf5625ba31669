"""The decisions of the scripts before they install anything.

The installation itself is not tested here: every run of a script in a new checkout tests it.
"""

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
NAME = f"python{sys.version_info.major}.{sys.version_info.minor}"
PYTHON = shutil.which(NAME, path=f"{sys.base_prefix}/bin") or sys.executable
VERSION = sys.version_info[:3]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout without an environment. Its path has a space."""
    checkout = tmp_path / "a checkout"
    shutil.copytree(ROOT / "scripts", checkout / "scripts")
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, checkout)
    return checkout


@pytest.fixture
def environment(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module `scripts/environment.py` of the checkout."""
    monkeypatch.delenv("EM_PYTHON", raising=False)
    spec = importlib.util.spec_from_file_location(
        "environment", checkout / "scripts" / "environment.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def created(environment: ModuleType) -> ModuleType:
    """The same module. The checkout has an environment for tests, without packages and pip."""
    subprocess.run(
        [PYTHON, "-I", "-m", "venv", "--without-pip", environment.VENV], check=True, timeout=200
    )
    environment.STAMP.write_text(f"{environment.fingerprint(VERSION)}\ntest\n")
    return environment


@pytest.fixture
def package(created: ModuleType) -> Path:
    """The dist-info folder of a package that is installed in the environment."""
    [folder] = created.VENV.glob("lib/python*/site-packages")
    info = folder / "tool-1.0.dist-info"
    info.mkdir()
    (folder / "tool.py").write_text("x = 1\n")
    (info / "RECORD").write_text("tool.py,sha256=0,6\ntool-1.0.dist-info/RECORD,,\n")
    return info


def run(script: Path, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name not in ("EM_PYTHON", "VIRTUAL_ENV")
    }
    return subprocess.run(
        [script, *arguments],
        cwd="/",
        env={**inherited, **environ},
        capture_output=True,
        text=True,
        timeout=200,
    )


def write_executable(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


# --- Whether the environment is ready ---


def test_environment_is_ready_for_its_purpose(created):
    assert created.is_ready("test")


def test_environment_for_tests_is_ready_for_earlier_purposes(created):
    assert created.is_ready("docs")
    assert created.is_ready("runtime")


def test_environment_for_the_program_is_not_ready_for_tests(created):
    created.STAMP.write_text(created.STAMP.read_text().replace("test", "runtime"))
    assert created.is_ready("runtime")
    assert not created.is_ready("test")


def test_environment_is_not_ready_without_its_stamp(created):
    created.STAMP.unlink()
    assert not created.is_ready("test")


def test_environment_is_not_ready_without_its_python(created):
    created.PYTHON.unlink()
    assert not created.is_ready("test")


def test_environment_is_not_ready_without_its_configuration(created):
    (created.VENV / "pyvenv.cfg").unlink()
    assert not created.is_ready("test")


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_environment_is_not_ready_after_its_inputs_change(created, name):
    with (created.ROOT / name).open("a") as file:
        file.write("# more\n")
    assert not created.is_ready("test")


def test_environment_is_not_ready_after_a_move(created, tmp_path, monkeypatch):
    monkeypatch.setattr(created, "ROOT", (tmp_path / "elsewhere").resolve())
    shutil.copytree(tmp_path / "a checkout", created.ROOT, symlinks=True)
    assert not created.is_ready("test")


def test_environment_is_not_ready_if_em_python_has_another_version(created, monkeypatch):
    monkeypatch.setenv("EM_PYTHON", "python")
    assert created.is_ready("test")
    monkeypatch.setattr(created, "sys", SimpleNamespace(version_info=(3, 99, 0)))
    assert not created.is_ready("test")


# --- Repairs after an interrupted installation ---


def test_complete_package_is_kept(created, package):
    created.remove_damaged_packages()
    assert package.exists()


def test_package_without_a_record_is_removed(created, package):
    (package / "RECORD").unlink()
    created.remove_damaged_packages()
    assert not package.exists()


@pytest.mark.parametrize(
    "damage", [Path.unlink, lambda file: file.write_text("x")], ids=["missing", "truncated"]
)
def test_package_with_a_damaged_file_is_removed(created, package, damage):
    damage(package.parent / "tool.py")
    created.remove_damaged_packages()
    assert not package.exists()


def test_environment_without_pip_cannot_be_repaired(created):
    assert not created.can_be_repaired()


# --- The choice of a Python ---


def test_script_refuses_a_python_that_does_not_run(checkout):
    done = run(checkout / "scripts/run_cluster.sh", EM_PYTHON="/bin/false")
    assert done.returncode == 1
    assert "EM_PYTHON is '/bin/false'" in done.stderr
    assert not (checkout / ".venv").exists()


def test_script_skips_pythons_that_do_not_run(checkout, tmp_path):
    shims = tmp_path / "shims"
    shims.mkdir()
    write_executable(shims / "python3", "#!/bin/sh\nexit 127\n")
    (shims / "python3.13").symlink_to("/nowhere")
    write_executable(shims / "python3.11", f'#!/bin/sh\nexec "{PYTHON}" "$@"\n')
    for tool in ("bash", "dirname", "readlink"):
        (shims / tool).symlink_to(shutil.which(tool) or tool)
    command = f'source "{checkout}/scripts/env.sh"; find_python'
    done = subprocess.run(
        [shims / "bash", "-c", command],
        env={"PATH": str(shims)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.stdout == f"{shims}/python3.11\n"


def test_script_reports_the_package_that_a_python_lacks(checkout, tmp_path):
    without_ensurepip = write_executable(
        tmp_path / "python",
        f'#!/bin/sh\ncase "$*" in *ensurepip*) exit 1 ;; esac\nexec "{PYTHON}" "$@"\n',
    )
    done = run(checkout / "scripts/test.sh", EM_PYTHON=str(without_ensurepip))
    assert done.returncode == 1
    assert "apt-get install python3-venv" in done.stderr


# --- The command line ---


@pytest.mark.parametrize("script", ["run_cluster.sh", "test.sh"])
def test_script_prints_help_without_creating_an_environment(checkout, script):
    done = run(checkout / "scripts" / script, "--help", EM_PYTHON="/bin/false")
    assert done.returncode == 0
    assert done.stdout.startswith(f"usage: scripts/{script}")


def test_run_cluster_refuses_an_argument_without_an_option(checkout):
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
def test_run_cluster_passes_its_options_to_the_program(checkout, created, arguments, command):
    write_executable(created.VENV / "bin" / "em-runner", '#!/bin/sh\necho "$@"\n')
    done = run(checkout / "scripts/run_cluster.sh", *arguments, EM_PYTHON=PYTHON)
    assert (done.stdout, done.stderr, done.returncode) == (f"{command}\n", "", 0)
