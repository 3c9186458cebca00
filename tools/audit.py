"""Looks for known vulnerabilities of the releases that constraints.txt pins.

    make audit

Runs pip-audit, in an environment of its own (.venv-audit), on this Python's pins. It asks PyPI's
JSON interface, which many mirrors of PyPI do not have. A package that could not be looked up is
counted and is no success: exit code 0 means that every pin was looked up and none is known bad.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONSTRAINTS = ROOT / 'constraints.txt'
ENVIRONMENT = ROOT / '.venv-audit'


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    result = subprocess.run(
        [install_pip_audit(), '--requirement', CONSTRAINTS, '--require-hashes', '--disable-pip',
         '--progress-spinner', 'off', '--format', 'json'],
        capture_output=True,
        text=True,
    )  # fmt: skip
    # 1 is for vulnerabilities found, but for its own errors too
    if result.returncode not in (0, 1) or not result.stdout:
        raise SystemExit(f'error: nothing was audited: {last_line(result.stderr)}')
    report, failed = summary(json.loads(result.stdout)['dependencies'])
    print(report)
    raise SystemExit(int(failed))


def install_pip_audit() -> Path:
    """Makes the environment, or brings it up to date, and returns the program."""
    if not ENVIRONMENT.exists():
        venv.create(ENVIRONMENT)
    result = subprocess.run(
        [sys.executable, '-m', 'pip', '--python', ENVIRONMENT / 'bin/python', 'install', '--quiet',
         '--disable-pip-version-check', '--constraint', CONSTRAINTS, 'pip', 'pip-audit'],
    )  # fmt: skip
    if result.returncode != 0:
        raise SystemExit('error: pip could not install pip-audit; its own error is above')
    return ENVIRONMENT / 'bin/pip-audit'


def summary(dependencies: list[dict]) -> tuple[str, bool]:
    """What to print of pip-audit's list of packages, and whether it is no success."""
    skipped = [package for package in dependencies if 'skip_reason' in package]
    bad = [package for package in dependencies if package.get('vulns')]
    lines = [
        f'{package["name"]} {package["version"]}: {vulnerability["id"]}, '
        f'fixed in {", ".join(vulnerability["fix_versions"]) or "no release"}'
        for package in bad
        for vulnerability in package['vulns']
    ]
    lines.append(
        f'{len(dependencies)} pins: {len(dependencies) - len(skipped)} looked up, '
        f'{len(bad)} with known vulnerabilities, {len(skipped)} could not be looked up'
    )
    if skipped:
        lines.append(f'the first of these: {skipped[0]["skip_reason"]}')
    if len(skipped) == len(dependencies):
        lines.append("error: nothing was audited: PyPI's JSON interface is not reached from here")
    return '\n'.join(lines), bool(skipped or bad)


def last_line(text: str) -> str:
    return (text.strip().splitlines() or ['no output'])[-1]


if __name__ == '__main__':
    main()
