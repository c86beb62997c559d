"""What gets installed: a wheel that runs from anywhere, its dependencies, and the README's test command."""

from __future__ import annotations

import email
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import ffmini

ROOT = Path(__file__).parent.parent
SOURCES = ("ffmini", "cuda", "models", "setup.py", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[zipfile.ZipFile]:
    """The wheel, built without network from a copy of the sources (building leaves files beside them)."""
    copy, out = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, copy)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*command, "--wheel-dir", str(out), str(copy)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    with zipfile.ZipFile(next(out.glob("ffmini-*.whl"))) as archive:
        yield archive


def tree(folder: str) -> set[str]:
    """The files under a top-level folder, relative to the checkout."""
    paths = (ROOT / folder).rglob("*")
    return {str(p.relative_to(ROOT)) for p in paths if p.is_file() and "__pycache__" not in p.parts}


def test_wheel_holds_the_package_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    inside = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert inside == tree("ffmini") | {f"ffmini/{name}" for name in tree("cuda") | tree("models")}


def test_wheel_metadata(wheel: zipfile.ZipFile) -> None:
    text = wheel.read(f"ffmini-{ffmini.__version__}.dist-info/METADATA").decode()
    metadata = email.message_from_string(text)
    assert (metadata["Name"], metadata["Version"]) == ("ffmini", ffmini.__version__)
    assert metadata["Requires-Python"] == ">=3.10"
    required: dict[str, set[str]] = {}
    for line in metadata.get_all("Requires-Dist"):
        extra = re.search(r'extra == "(.+)"', line)
        name = re.match(r"[\w-]+", line)[0]
        required.setdefault(extra[1] if extra else "", set()).add(name)
    assert required[""] == {"numpy", "safetensors", "tokenizers", "tqdm"}
    assert required["cuda12"] == {"cupy-cuda12x", "nvidia-cuda-nvrtc-cu12"}
    assert required["cuda13"] == {"cupy-cuda13x", "nvidia-cuda-nvrtc"}
    assert required["chat"] == {"jinja2"}


def test_wheel_runs_from_another_folder(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    """The wheel's own files make text with the bundled model and compile the kernel's source."""
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    wheel.extractall(site)
    elsewhere.mkdir()
    program = (
        "import ffmini, ffmini.kernel as k; print(ffmini.__file__); print(len(k.device_sources())); "
        "print(ffmini.load(device='cpu').generate('Once upon a time', temperature=0, max_new_tokens=4).text)"
    )
    environment = os.environ | {"PYTHONPATH": str(site)}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    file, sources, text = done.stdout.splitlines()
    assert Path(file).is_relative_to(site)
    assert int(sources) == len(tree("cuda"))
    assert text == " there lived a king"


def test_lost_resources_are_an_error(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    wheel.extractall(tmp_path, [name for name in wheel.namelist() if not name.startswith("ffmini/models/")])
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-m", "ffmini", "generate", "Once", "--device", "cpu"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert re.fullmatch(r"ffmini: models/ is missing from the installation: .*\n", done.stderr)


# ---- .ci/run -------------------------------------------------------------------------------------------


def run_ci(folder: Path, readme: str) -> subprocess.CompletedProcess[str]:
    """.ci/run in a checkout whose README is `readme`."""
    (folder / ".ci").mkdir(parents=True)
    shutil.copy(ROOT / ".ci" / "run", folder / ".ci" / "run")
    (folder / "README.md").write_text(readme)
    return subprocess.run([folder / ".ci" / "run"], capture_output=True, text=True)


def test_ci_runs_the_readmes_test_command(tmp_path: Path) -> None:
    """What stands in the README is what runs, and its exit status is that of .ci/run."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^<!-- test command -->\n+```sh\n(.*?)```$", readme, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 1
    assert "-m venv" in blocks[0] and "-e '.[cuda13,test]'" in blocks[0] and "-m pytest" in blocks[0]
    passing = run_ci(tmp_path / "passing", readme.replace(blocks[0], "echo from the README\n"))
    assert (passing.returncode, passing.stdout.splitlines()[-1]) == (0, "from the README")
    failing = run_ci(tmp_path / "failing", readme.replace(blocks[0], "false\n"))
    assert failing.returncode == 1


def test_ci_refuses_a_readme_without_a_test_command(tmp_path: Path) -> None:
    done = run_ci(tmp_path / "checkout", "# ffmini\n")
    assert done.returncode == 1
    assert "a test command" in done.stdout + done.stderr
