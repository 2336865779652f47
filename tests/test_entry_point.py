"""Another package's memory: one file, one line of metadata, and it is there in every command."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from hmlab.templates import my_memory

NAME = "leaky-of-another-package"


@pytest.fixture
def installed(tmp_path):
    """An installed distribution, as pip leaves it, whose memory is the template."""
    site = tmp_path / "site"
    package, metadata = site / "other_package", site / "other_package-1.0.dist-info"
    package.mkdir(parents=True)
    metadata.mkdir()
    (package / "__init__.py").touch()
    shutil.copy(my_memory.__file__, package / "leaky.py")
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: other-package\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[hmlab.memories]\n{NAME} = other_package.leaky:Config\n")
    return site


def hmlab(*arguments, site=None):
    paths = [str(site)] if site else []
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])])}
    command = [sys.executable, "-m", "hmlab", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def test_memory_of_another_package_is_listed_shown_and_checked(installed):
    listed = hmlab("list", "--json", site=installed)
    assert listed.returncode == 0, listed.stderr
    found = {memory["name"]: memory for memory in json.loads(listed.stdout)["memories"]}
    assert found[NAME]["about"].startswith("A leaky integrator")

    arguments = ("show", NAME, "--dim", "32", "--vocab", "65", "--json")
    shown = hmlab(*arguments, "--set", "decay=0.5", site=installed)
    assert shown.returncode == 0, shown.stderr
    assert json.loads(shown.stdout)["parameters"] > 0

    checked = hmlab("check", NAME, "--no-compile", "--json", site=installed)
    assert checked.returncode == 0, checked.stderr
    assert "gradients" in {point["point"] for point in json.loads(checked.stdout)["points"]}


def test_memory_that_is_not_installed_is_not_there():
    shown = hmlab("show", NAME, "--dim", "32", "--vocab", "65")
    assert shown.returncode != 0
    assert NAME in shown.stderr


def test_taken_name_is_refused(installed):
    metadata = installed / "other_package-1.0.dist-info" / "entry_points.txt"
    metadata.write_text(metadata.read_text().replace(NAME, "lmn"))
    listed = hmlab("list", site=installed)
    assert listed.returncode != 0
    assert "lmn" in listed.stderr and "exists already" in listed.stderr
