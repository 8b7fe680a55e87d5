#!/usr/bin/env python3
"""Measure whether a folder is a good place for a database.

    python3 bench/place.py /scratch/me

takes half a minute. It writes to the disk, then starts a server there, which
hands out jobs to clients on the same machine. Nothing stays there.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

sys.dont_write_bytecode = True  # leave nothing beside the sources
TOP = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, TOP)

import jobman  # noqa: E402
import worker  # noqa: E402

JOBS = 200000  # at most: on a disk they take 50 MB
CLIENTS = 16
BATCH = 1000  # jobs added, claimed or updated in one call
LENGTHS = {"1 s": 1, "10 s": 10, "1 min": 60, "10 min": 600, "1 h": 3600}
SAFE_LOAD = 0.5  # of the measured rate, so that no call waits for long
MEASURED = {
    "fsync": "%.2f ms until 4 KiB are on the disk, at the median",
    "fsync_p95": "%.2f ms for 95 of 100",
    "added": "%d jobs a second are added",
    "cycles_1": "%d jobs a second are claimed and updated by one client",
    "cycles_16": "%d jobs a second by 16 clients",
    "batches": "%d jobs a second, a thousand at a time",
}


def fsync_times(folder, seconds):
    """Return the sorted seconds of writes of 4 KiB that reach the disk."""
    times, end = [], time.monotonic() + seconds
    with tempfile.TemporaryFile(dir=folder) as file:
        while len(times) < 10 or time.monotonic() < end:
            file.write(b"x" * 4096)
            file.flush()
            began = time.monotonic()
            os.fsync(file.fileno())
            times.append(time.monotonic() - began)
    return sorted(times)


def add_jobs(client, end):
    """Add jobs until `end`; return how many."""
    for first in range(0, JOBS, BATCH):
        if time.monotonic() >= end:
            return first
        client.set({i: {
            "jobstage": 0, "jobcmd": "simulate --seed %d" % i, "laststage": 2,
        } for i in range(first, first + BATCH)})
    return JOBS


def cycle(client, end):
    """Claim and update jobs one by one until `end`; return how many."""
    n = 0
    while time.monotonic() < end:
        job = client.get(0, lease=600)
        if job is None:
            break
        client.update_job(job["jobid"], 2, job["claim"])
        n += 1
    return n


def cycle_batches(client, end):
    """Claim and update jobs by the thousand until `end`; return how many."""
    n = 0
    while time.monotonic() < end:
        jobs = client.get(0, lease=600, n=BATCH)
        if not jobs:
            break
        client.update_jobs([
            {"jobid": job["jobid"], "jobstage": 2, "claim": job["claim"]}
            for job in jobs])
        n += len(jobs)
    return n


def rate(access, act, clients, seconds):
    """Return how many jobs a second some clients get done."""
    def run(_):
        with contextlib.closing(worker.Client(access)) as client:
            return act(client, end)

    began = time.monotonic()
    end = began + seconds
    with ThreadPoolExecutor(clients) as pool:
        n = sum(pool.map(run, range(clients)))
    return n / (time.monotonic() - began)


@contextlib.contextmanager
def serving(folder):
    """Serve a database in a folder; yield the path of its access file."""
    access = os.path.join(folder, "access.json")
    process = subprocess.Popen(
        [sys.executable, os.path.join(TOP, "jobman.py"), "serve",
         "--db", os.path.join(folder, "jobs.db"), "--port", "0",
         "--access", access],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    try:
        if not process.stdout.readline():
            sys.exit("The server didn't start.")
        yield access
    finally:
        process.terminate()
        process.stdout.close()
        process.wait()


def measure(folder, seconds):
    """Yield names and figures of a folder, as they are measured."""
    times = fsync_times(folder, min(seconds, 2))
    yield "fsync", times[len(times) // 2]
    yield "fsync_p95", times[int(0.95 * len(times))]
    with serving(folder) as access:
        yield "added", rate(access, add_jobs, 1, seconds)
        yield "cycles_1", rate(access, cycle, 1, seconds)
        yield "cycles_16", rate(access, cycle, CLIENTS, seconds)
        yield "batches", rate(access, cycle_batches, 1, seconds)


def main():
    """Measure a folder, and print what it is good for."""
    parser = argparse.ArgumentParser(
        description="Measure whether a folder is a good place for a database.")
    parser.add_argument("folder", nargs="?", default=".")
    parser.add_argument("--seconds", type=float, default=5,
                        help="how long each figure is measured (default 5)")
    parser.add_argument("--output", choices=("table", "json"),
                        default="table")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        scratch = tempfile.mkdtemp(prefix=".jobman-", dir=options.folder)
    except OSError as error:
        sys.exit("Can't make a folder in %s: %s." % (
            options.folder, error.strerror))
    location = jobman.DatabaseLocation(os.path.join(scratch, "jobs.db"))
    location.path = os.path.abspath(options.folder)  # for describe()
    found = {"place": location.describe(), "network": location.exclusive,
             "python": "%d.%d.%d" % sys.version_info[:3],
             "sqlite": sqlite3.sqlite_version}
    say = print if options.output == "table" else lambda *_, **__: None
    say("%(place)s; Python %(python)s, SQLite %(sqlite)s" % found)
    try:
        for name, figure in measure(scratch, options.seconds):
            found[name] = figure
            shown = 1000 * figure if "fsync" in name else figure
            say("  " + MEASURED[name] % shown, flush=True)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    found["slots"] = {
        name: int(found["cycles_16"] * SAFE_LOAD * seconds)
        for name, seconds in LENGTHS.items()}
    say("At half of the rate of 16 clients that is enough for so many"
        " commands side by side:")
    for length, slots in found["slots"].items():
        say("  %9d if a job takes %s" % (slots, length))
    if options.output == "json":
        print(json.dumps(found))


if __name__ == "__main__":
    main()
