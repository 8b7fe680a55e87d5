#!/usr/bin/env python3
"""Measure what open pages cost a server that has a million jobs.

    python3 bench/page.py --pages 10 --jobs 1000000

starts a server, opens the page in that many windows of Chromium, and prints
the share of a core that the server needs: without pages, with them while
nothing happens, and with them while one client claims and updates jobs. It
needs Debian's chromium and chromium-driver.
"""

import argparse
import contextlib
import os
import shutil
import sys
import tempfile
import threading
import time

sys.dont_write_bytecode = True  # leave nothing beside the sources
TOP = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, TOP)

import test_jobman  # noqa: E402
import worker  # noqa: E402

CHUNK = 50000  # jobs in one call


def cpu_seconds(pid):
    """Return the processor time that a process has used."""
    with open("/proc/%d/stat" % pid) as file:
        fields = file.read().rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


def share(pid, seconds):
    """Return the part of a core that a process needs for a while."""
    began, used = time.monotonic(), cpu_seconds(pid)
    time.sleep(seconds)
    return (cpu_seconds(pid) - used) / (time.monotonic() - began)


@contextlib.contextmanager
def moving(access, rate):
    """Claim and update `rate` jobs a second while the body runs."""
    ending = threading.Event()

    def move():
        client = worker.Client(access)
        while not ending.wait(1 / rate):
            job = client.get(0, lease=60)
            client.update_job(job["jobid"], 2, claim=job["claim"])

    thread = threading.Thread(target=move)
    thread.start()
    try:
        yield
    finally:
        ending.set()
        thread.join()


class Bench(test_jobman.TemporaryFolder):
    """A server with jobs, and pages that show them."""

    def runTest(self):
        options = self.options
        process, address = self.serve()
        access = self.path(".jobman", "access.json")
        client = worker.Client(access)
        for first in range(0, options.jobs, CHUNK):
            last = min(first + CHUNK, options.jobs)
            client.set({i: {"jobstage": 0, "jobcmd": "true %d" % i,
                            "laststage": 2} for i in range(first, last)})
        self.tell("no page", process.pid)
        with moving(access, options.rate):
            self.tell("no page, jobs move", process.pid)
        folder = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, folder, ignore_errors=True)
        browser = test_jobman.Browser(folder)
        self.addCleanup(browser.close)
        page = "http://%s:%d/get#jobix=%s" % (*address, client.jobix)
        for number in range(options.pages):
            if number:
                window = browser.call("POST", "/window/new", type="window")
                browser.call("POST", "/window", handle=window["handle"])
            browser.open(page)
        seen = "return document.visibilityState"
        handles = browser.call("GET", "/window/handles")
        for handle in handles:
            browser.call("POST", "/window", handle=handle)
            assert browser.script(seen) == "visible"
        self.tell("%d pages" % len(handles), process.pid)
        with moving(access, options.rate):
            self.tell("%d pages, jobs move" % len(handles), process.pid)

    def tell(self, what, pid):
        """Print the server's share of a core over some time."""
        part = share(pid, self.options.seconds)
        print("| %-22s | %5.2f %% |" % (what, 100 * part), flush=True)


def main():
    """Run the measurement."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--jobs", type=int, default=10**6)
    add("--pages", type=int, default=10)
    add("--seconds", type=int, default=30, help="for each row")
    add("--rate", type=float, default=5, help="jobs that move a second")
    Bench.options = parser.parse_args()
    print("| %d jobs | of a core |\n| --- | --- |" % Bench.options.jobs)
    result = test_jobman.unittest.TestResult()
    Bench().run(result)
    for _, trace in result.errors + result.failures:
        sys.exit(trace)


if __name__ == "__main__":
    main()
