"""What is installed, held against what is pinned and against known vulnerabilities: `python -m bench.audit [--pin] [--strict]`.

1. Every installed package is in constraints.txt, in that version.
2. What the registry offers for these versions has the SHA-256 that hashes.txt has, so that a file which was replaced there
   is seen. `--pin` writes hashes.txt anew. Files of other platforms are not in it, and are said to be so.
3. pip-audit looks for known vulnerabilities, where its data can be reached.

The exit status is 1 where versions or hashes are wrong, and with `--strict` where a vulnerability is known: advisories come
without a change of ours, so CI shows them and goes on. What cannot be reached is said and is no failure.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import urllib.request
from pathlib import Path

ROOT = Path(__file__).parents[1]
CONSTRAINTS, HASHES = ROOT / "constraints.txt", ROOT / "hashes.txt"
OURS = {"veneer", "pip", "setuptools", "wheel"}
SECONDS = 240
ADVISORIES, PIP_AUDIT = "https://pypi.org", "pip-audit==2.10.1"
VULNERABLE = "requests/2.19.0"  # known to be: a mirror without advisories would call everything safe


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pinned() -> dict[str, str]:
    lines = [line.split("#")[0].strip() for line in CONSTRAINTS.read_text().splitlines()]
    return {canonical(n): v for n, _, v in (line.partition("==") for line in lines if line)}


def installed() -> dict[str, str]:
    return {canonical(d.metadata["Name"]): d.version for d in importlib.metadata.distributions()}


def unpinned() -> list[str]:
    """Packages that are installed in another version than the pinned one, or not pinned."""
    pins = pinned()
    found = []
    for name, version in sorted(installed().items()):
        if name not in OURS and pins.get(name) != version.partition("+")[0]:
            found.append(f"{name} {version} is installed, and {pins.get(name, 'nothing')} is pinned")
    return found


def offered() -> dict[str, str]:
    """File name -> SHA-256 of what pip would install of all that is installed here.

    Raises:
        OSError: the registry cannot be reached.
    """
    there = installed()
    wanted = [f"{n}=={v.partition('+')[0]}" for n, v in pinned().items() if n in there]
    with tempfile.TemporaryDirectory() as folder:
        report, names = Path(folder) / "report.json", Path(folder) / "names.txt"
        names.write_text("\n".join(wanted))
        command = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--dry-run",
            "--ignore-installed",
            "--no-deps",
            "--no-build-isolation",
        ]
        command += ["-q", "--report", str(report), "-r", str(names)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
        except subprocess.TimeoutExpired as error:
            raise OSError(f"pip took more than {SECONDS} s") from error
        if done.returncode:
            raise OSError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "pip failed")
        entries = json.loads(report.read_text())["install"]
    found = {}
    for entry in entries:
        about = entry["download_info"]
        digest = about.get("archive_info", {}).get("hashes", {}).get("sha256")
        if digest:
            found[about["url"].rpartition("/")[2].partition("#")[0]] = digest
    return found


def replaced(now: dict[str, str]) -> tuple[list[str], list[str]]:
    """Files with another hash than the pinned one, and files without a pinned hash."""
    lines = [line.split() for line in HASHES.read_text().splitlines() if line and not line.startswith("#")]
    then = {name: digest for digest, name in lines}
    wrong = [f"{n}: SHA-256 {d}, and {then[n]} is pinned" for n, d in now.items() if n in then and then[n] != d]
    return wrong, sorted(n for n in now if n not in then)


def vulnerable() -> tuple[list[str], str]:
    """What pip-audit finds, and why it found nothing where it could not look. It gets an environment of its own."""
    try:
        with urllib.request.urlopen(f"{ADVISORIES}/pypi/{VULNERABLE}/json", timeout=10) as answer:
            if not json.load(answer)["vulnerabilities"]:
                return (
                    [],
                    f"{ADVISORIES} here says that {VULNERABLE} has no vulnerability, so it would say so of anything",
                )
    except (OSError, ValueError, KeyError) as error:
        return [], f"{ADVISORIES} has no advisories here: {error}"
    with tempfile.TemporaryDirectory() as folder:
        python = str(Path(folder) / "bin" / "python")
        without = {k: v for k, v in os.environ.items() if k != "PIP_CONSTRAINT"}
        look = [
            python,
            "-m",
            "pip_audit",
            "--path",
            sysconfig.get_paths()["purelib"],
            "--format",
            "json",
            "--progress-spinner",
            "off",
        ]
        try:
            for command in ([sys.executable, "-m", "venv", folder], [python, "-m", "pip", "install", "-q", PIP_AUDIT]):
                subprocess.run(command, env=without, capture_output=True, timeout=SECONDS, check=True)
            done = subprocess.run(look, capture_output=True, text=True, timeout=SECONDS, check=False)
            report = json.loads(done.stdout)
        except subprocess.SubprocessError as error:
            return [], f"pip-audit: {error}"
        except ValueError:
            return [], (done.stderr.strip().splitlines() or ["pip-audit said nothing"])[-1][:200]
    found = [
        f"{d['name']} {d['version']}: {v['id']}, fixed in {', '.join(v['fix_versions']) or 'no version'}"
        for d in report["dependencies"]
        for v in d.get("vulns", [])
    ]
    return found, ""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.audit", description=__doc__.splitlines()[0])
    parser.add_argument("--pin", action="store_true", help="write hashes.txt from what the registry offers now")
    parser.add_argument("--strict", action="store_true", help="fail where a vulnerability is known")
    given = parser.parse_args()
    os.environ.setdefault("PIP_DISABLE_PIP_VERSION_CHECK", "1")
    wrong = unpinned()
    print(f"versions: {len(wrong)} of {len(installed())} installed packages differ from constraints.txt")
    try:
        now = offered()
    except OSError as error:
        print(f"hashes: not looked at, as the registry cannot be reached ({error})")
    else:
        if given.pin:
            lines = [f"{digest}  {name}" for name, digest in sorted(now.items(), key=lambda i: i[0].lower())]
            HASHES.write_text(
                "\n".join(
                    ["# SHA-256 of what `make test` installs; `python -m bench.audit --pin` writes it.", *lines, ""]
                )
            )
            print(f"hashes: {len(lines)} written to {HASHES.name}")
        else:
            bad, new = replaced(now)
            wrong += bad
            print(f"hashes: {len(bad)} of {len(now)} files are not those of hashes.txt; {len(new)} are not in it")
            for name in new:
                print(f"  not in hashes.txt: {name}")
    found, why = vulnerable()
    wrong += found if given.strict else []
    print(f"vulnerabilities: {f'not looked up ({why})' if why else f'{len(found)} known'}")
    for line in dict.fromkeys([*wrong, *found]):
        print(f"  {line}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
