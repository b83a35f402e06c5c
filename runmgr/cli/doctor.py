"""`doctor`: what a directory's file system can do, what runmgr will do there, and what to fix."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from runmgr import ranks as launch_ranks
from runmgr.cli import tables
from runmgr.disk import probe, probe_host, probe_hosts
from runmgr.errors import RunError

if TYPE_CHECKING:
    import argparse

    from runmgr.disk.probe import Finding

_ORDER = ("fine", "worse", "unsafe")
_NAME_WIDTH = 20


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command of this file."""
    doctor = commands.add_parser(
        "doctor", help="probe the file system that runs shall lie on; between hosts under torchrun or srun",
        allow_abbrev=False,
    )  # fmt: skip
    doctor.add_argument("path", metavar="PATH", help="the directory that experiments lie in; nothing is left there")
    doctor.add_argument("--json", action="store_true", help="print JSON")
    doctor.set_defaults(command=_doctor)


def _doctor(given: argparse.Namespace) -> int:
    """Status 0 when all is fine, 1 when something costs safety or works worse. Every rank; rank 0 prints."""
    root = Path(given.path).expanduser().absolute()
    ranks = launch_ranks.from_environment()
    if not ranks.is_main:
        try:
            return probe_hosts.follow(root, launch_ranks.step_word(), ranks)
        except RunError as error:
            if ranks.local_rank == 0:  # once for each host
                print(f"runmgr: {error}", file=sys.stderr)
            return 1
    if ranks.world_size == 1:
        with probe.fresh_directory(root) as folder:
            findings = probe_host.check_one_host(folder)
        status = _status(findings)
    else:
        with probe_hosts.leading(root, launch_ranks.step_word(), ranks) as (folder, lead):
            findings = [*lead.findings, *probe_host.check_one_host(folder)]
            status = _status(findings)
            lead.finish(status)
    hosts = probe_hosts.hosts_of(findings) or [ranks.host]
    if given.json:
        told = [finding._asdict() for finding in findings]
        tables.print_json({"path": str(root), "hosts": hosts, "verdict": _worst(findings), "findings": told})
    else:
        _print(root, hosts, findings)
    return status


def _worst(findings: list[Finding]) -> str:
    return max((finding.verdict for finding in findings), key=_ORDER.index)


def _status(findings: list[Finding]) -> int:
    return int(_worst(findings) != "fine")


def _print(root: Path, hosts: list[str], findings: list[Finding]) -> None:
    print(f"{root} as {', '.join(hosts)} {'sees' if len(hosts) == 1 else 'see'} it\n")
    for finding in findings:
        print(f"{finding.verdict:<7} {finding.name:<{_NAME_WIDTH}} {finding.measured}")
        if finding.verdict != "fine":
            indent = " " * (_NAME_WIDTH + 9)
            print(f"{indent}runmgr: {finding.consequence}{os.linesep}{indent}fix: {finding.advice}")
    bad = sum(finding.verdict != "fine" for finding in findings)
    print(f"\n{'runmgr works here' if not bad else f'{bad} of {len(findings)} findings cost safety or work worse'}")
