#!/usr/bin/env python3
"""Adds up the suites of scripts/test.sh and prints one line: N passed, N failed, N skipped.

Each suite left `<name>.rc` with its exit code (or `skipped`), `<name>.log`, and `<name>.xml` where its runner writes a
JUnit report. A test that printed `SKIPPED: reason` counts as skipped. A suite that ended with another code than 0
though no test of it failed, or that ran no test at all, counts as one failure. Ends with 1 when anything failed.
"""
import pathlib
import re
import sys
import xml.etree.ElementTree as ElementTree

# A runner may have printed the test's name in front.
SKIPPED = re.compile(r"(?:^\s*|\.\.\. )SKIPPED: (.+)$", re.MULTILINE)
PLAIN = re.compile(r"^(?:\S+: )?(\d+) passed, (\d+) failed(?:, (\d+) skipped)?$", re.MULTILINE)
CARGO = re.compile(r"^test result: \w+\. (\d+) passed; (\d+) failed; (\d+) ignored", re.MULTILINE)
PYTEST = re.compile(r"^=*\s*((?:\d+ \w+(?:, )?)+) in [\d.:]+s?.*$", re.MULTILINE)
PYTEST_REASON = re.compile(r"^SKIPPED \[(\d+)\] (.+)$", re.MULTILINE)
UNITTEST = re.compile(r"^Ran (\d+) tests? in .*\n\n(OK|FAILED)(?: \((.*)\))?$", re.MULTILINE)


class Count:
    """Tests by what became of them; `reasons` has one text per skipped test, as far as known."""

    def __init__(self, passed=0, failed=0, skipped=0, reasons=()):
        self.passed, self.failed, self.skipped, self.reasons = passed, failed, skipped, list(reasons)

    @property
    def total(self):
        return self.passed + self.failed + self.skipped

    def line(self):
        return f"{self.passed} passed, {self.failed} failed, {self.skipped} skipped"


def from_junit(text):
    count = Count()
    for case in ElementTree.fromstring(text).iter("testcase"):
        output = "\n".join(element.text or "" for element in case.iter() if element.tag.startswith("system-"))
        reason = SKIPPED.search(output)
        if case.find("failure") is not None or case.find("error") is not None:
            count.failed += 1
        elif case.find("skipped") is not None or reason:
            count.skipped += 1
            why = reason.group(1) if reason else "ignored"
            count.reasons.append(f"{case.get('name')}: {why}")
        else:
            count.passed += 1
    return count


def from_pytest(log):
    words = dict((word, int(n)) for n, word in re.findall(r"(\d+) (\w+)", PYTEST.findall(log)[-1]))
    failed = words.get("failed", 0) + words.get("errors", 0) + words.get("error", 0)
    skipped = words.get("skipped", 0) + words.get("xfailed", 0) + words.get("deselected", 0)
    reasons = [f"{reason} ({n})" for n, reason in PYTEST_REASON.findall(log)]
    return Count(words.get("passed", 0) + words.get("xpassed", 0), failed, skipped, reasons)


def from_unittest(log):
    count = Count(reasons=re.findall(r"^.* \.\.\. skipped ['\"](.*)['\"]$", log, re.MULTILINE))
    for ran, _, details in UNITTEST.findall(log):
        words = dict((word, int(n)) for word, n in re.findall(r"(\w+)=(\d+)", details))
        bad = words.get("failures", 0) + words.get("errors", 0)
        count.failed += bad
        count.skipped += words.get("skipped", 0)
        count.passed += int(ran) - bad - words.get("skipped", 0)
    return count


def from_log(log):
    reasons = SKIPPED.findall(log)
    plain = PLAIN.findall(log)
    if plain:
        passed, failed, skipped = plain[-1]
        return Count(int(passed), int(failed), int(skipped or 0), reasons)
    cargo = CARGO.findall(log)
    if cargo:
        passed, failed, ignored = (sum(int(row[i]) for row in cargo) for i in range(3))
        # A test that says it was skipped has passed in cargo's eyes.
        return Count(passed - len(reasons), failed, ignored + len(reasons), reasons)
    if UNITTEST.search(log):
        return from_unittest(log)
    if PYTEST.search(log):
        return from_pytest(log)
    return Count()


def suite(rc_file):
    log_file, xml_file = rc_file.with_suffix(".log"), rc_file.with_suffix(".xml")
    log = log_file.read_text(encoding="utf-8", errors="replace") if log_file.exists() else ""
    # Colors of a runner that takes the pipe for a terminal.
    log = re.sub(r"\x1b\[[0-9;]*m", "", log)
    rc = rc_file.read_text(encoding="utf-8").strip()
    if rc == "skipped":
        return Count(skipped=1, reasons=["the whole suite: " + reason for reason in SKIPPED.findall(log)])
    count = from_junit(xml_file.read_text(encoding="utf-8")) if xml_file.exists() else from_log(log)
    if rc != "0" and count.failed == 0:
        print(f"{rc_file.stem}: ended with code {rc} though no test failed: counted as a failure")
        count.failed += 1
    elif count.total == 0:
        print(f"{rc_file.stem}: ran no test: counted as a failure")
        count.failed += 1
    return count


def main(argv):
    files = sorted(pathlib.Path(argv[1]).glob("*.rc"))
    total = Count()
    for rc_file in files:
        count = suite(rc_file)
        print(f"{rc_file.stem + ':':<10} {count.line()}")
        for reason in count.reasons:
            print(f"           skipped {reason}")
        total.passed += count.passed
        total.failed += count.failed
        total.skipped += count.skipped
    if total.passed == 0 and total.failed == 0:
        print("no test passed: counted as a failure")
        total.failed = 1
    print(total.line())
    return 1 if total.failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
