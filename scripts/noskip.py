"""Fail when a test run skipped something or ran nothing: `python scripts/noskip.py REPORT.xml` (a junit file)."""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ET


def verdict(report: str) -> tuple[int, str]:
    """(tests run, what is wrong with the run: "" when nothing is). Expected failures count as skipped."""
    cases = list(ET.parse(report).iter("testcase"))
    skipped = [
        f"  {case.get('classname')}::{case.get('name')}: {mark.get('message') or 'no reason given'}"
        for case in cases
        for mark in case.iter("skipped")
    ]
    if not cases:
        return 0, "no test ran"
    if skipped:
        return len(cases), "\n".join(["these tests were skipped, and none may be:", *skipped])
    return len(cases), ""


def main(arguments: list[str]) -> int:
    """Exit status 0 when every test ran, 1 when not, 2 when the report cannot be read."""
    if len(arguments) != 1:
        print("usage: noskip.py REPORT.xml", file=sys.stderr)
        return 2
    try:
        _, fault = verdict(arguments[0])
    except (OSError, ET.ParseError) as exc:
        print(f"noskip: cannot read {arguments[0]}: {exc}", file=sys.stderr)
        return 2
    if fault:
        print(f"noskip: {fault}", file=sys.stderr)
    return 1 if fault else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
