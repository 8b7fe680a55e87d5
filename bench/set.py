#!/usr/bin/env python3
"""Measure how long claims take while one client adds a million jobs.

    python3 bench/set.py

starts a server and some clients that claim and update jobs, each on a
connection of its own that is kept, first alone and then while another
process adds jobs by one call of worker.py's Client. It needs Linux and
Python 3.8 or later.
"""

import argparse
import os
import subprocess
import sys
import time

sys.dont_write_bytecode = True  # leave nothing beside the sources
HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(HERE), HERE]

import load  # noqa: E402
import scale  # noqa: E402

STOCK = 100000  # jobs that are there before
ADDING = """
import sys
sys.path.insert(0, %r)
import worker
url, jobix, jobs = sys.argv[1:]
worker.Client(url=url, jobix=jobix).set(
    (jobid, {"jobstage": 0, "jobcmd": %r %% jobid, "laststage": 2})
    for jobid in range(10**7, 10**7 + int(jobs)))
""" % (os.path.dirname(HERE), load.COMMAND)


def timed_talk(going_on, times):
    """Claim a job and update it, over and over; note how long claims take."""
    done = []
    talk = load.cycle_talk(scale.JOBIX, iter(going_on, False), done, False)
    request, claims = next(talk), True
    while True:
        began = time.perf_counter()
        answer = yield request
        if claims:
            times.append(time.perf_counter() - began)
        claims = not claims
        try:
            request = talk.send(answer)
        except StopIteration:
            return


class Bench(scale.Bench):
    """A server, who claims its jobs, and who adds some."""

    def runTest(self):
        options = self.options
        process, address = self.server()
        load.set_jobs(address, scale.JOBIX, STOCK)
        scale.head("claims of %d clients" % options.clients, "a second",
                   "median", "99 of 100", "longest")
        end = time.monotonic() + options.seconds
        self.measure("alone", address, lambda: time.monotonic() < end)
        began = time.monotonic()
        adding = subprocess.Popen([
            sys.executable, "-c", ADDING, "http://%s:%d" % address,
            str(scale.JOBIX), str(options.jobs)])
        self.addCleanup(adding.wait)
        self.measure("while jobs are added", address,
                     lambda: adding.poll() is None)
        taken = time.monotonic() - began
        assert adding.returncode == 0
        scale.head("%d jobs in one call" % options.jobs, "")
        scale.row("added a second", "%.0f" % (options.jobs / taken))
        scale.row("memory of the server, at most", "%.0f MiB" % (
            scale.test_jobman.most_memory(process) / 2**20))
        self.end(process)

    def measure(self, what, address, going_on):
        """Print how long claims take."""
        times = []
        taken = load.carry([
            load.Line(address, timed_talk(going_on, times), load.whole_http,
                      False) for _ in range(self.options.clients)
        ])
        scale.row(what, "%.0f" % (len(times) / taken), *(
            scale.milliseconds(times, part) for part in (0.5, 0.99, 1)))


def main():
    """Run the measurement."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--jobs", type=int, default=10**6)
    add("--clients", type=int, default=8)
    add("--seconds", type=int, default=5, help="for claims alone")
    Bench.options = parser.parse_args()
    result = scale.test_jobman.unittest.TestResult()
    Bench().run(result)
    for _, trace in result.errors + result.failures:
        sys.exit(trace)


if __name__ == "__main__":
    main()
