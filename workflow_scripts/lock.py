"""Write requirements.lock and environment.yml from what is installed in this environment."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Installed from this directory, or brought by every virtual environment.
LEFT_OUT = {"prunelib", "pip"}

HEADER = "# Written by `make lock`: every package of the environment, for Python 3.11.\n"


def pins() -> list[str]:
    """Return ``name==version`` of all installed distributions, local tags such as +cpu removed."""
    frozen = subprocess.run(
        [sys.executable, "-m", "pip", "list", "--format=freeze"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    found = []
    for line in frozen.split():
        name, _, version = line.partition("==")
        if name.lower() not in LEFT_OUT:
            found.append(f"{name}=={version.partition('+')[0]}")
    return sorted(found, key=str.lower)


def main() -> None:
    """Write both files."""
    found = pins()
    (ROOT / "requirements.lock").write_text(HEADER + "\n".join(found) + "\n", encoding="utf-8")
    lines = "".join(f"      - {pin}\n" for pin in found)
    (ROOT / "environment.yml").write_text(
        f"{HEADER}name: prunelib\nchannels:\n  - conda-forge\ndependencies:\n  - python=3.11\n"
        f"  - pip\n  - pip:\n{lines}",
        encoding="utf-8",
    )


if __name__ == "__main__":
    main()
