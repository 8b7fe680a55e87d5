#!/usr/bin/env python3
"""Measure what a move of a job costs, in jobman and in other programs.

    python3 bench/run.py --venv VENV

has each of them take jobs through a claim and an update, or add jobs, in
turns, and prints how many it did a second. README.md beside this file says
what each row of the table is. It needs Python 3.8 or later and Linux.
"""

import argparse
import contextlib
import functools
import itertools
import json
import os
import platform
import random
import re
import socket
import sqlite3
import statistics
import sys
import tempfile
import textwrap
import time
import typing
import urllib.parse

sys.dont_write_bytecode = True  # leave nothing beside the sources

import start  # noqa: E402
from start import Failed, Missing, say  # noqa: E402

LOAD = os.path.join(start.HERE, "load.py")
LOCAL = "127.0.0.1"
SECONDS = 2  # that one measurement should take
FSYNCS = 200
QUICK = 500  # jobs for each row with --quick, which has no longer queue
LONG, LONGER = 100000, 1000000  # jobs waiting


# ----------------------------------------------------------------- parts ---


def write_part(folder, part, given):
    """Return a new file that tells load.py what to do."""
    handle, path = tempfile.mkstemp(dir=folder)  # it may hold the jobix
    with os.fdopen(handle, "w") as file:
        json.dump(dict(given, part=part), file)
    return path


def load(place, folder, part, python=None, **given):
    """Run a part of load.py to its end; return its seconds."""
    path = write_part(folder, part, given)
    text = place.output(python or place.python, LOAD, path)
    return float(text.split()[-1])


def free_address():
    """Return an address at which nobody listens."""
    with socket.socket() as found:
        found.bind((LOCAL, 0))
        return found.getsockname()


@contextlib.contextmanager
def listening(place, address, *argv):
    """Run a server while a `with` lasts; yield when it can be reached."""
    with place.running(*argv) as server:
        began = time.monotonic()
        while True:
            with socket.socket() as tried:
                if tried.connect_ex(address) == 0:
                    break
            start.check(place, server, began)
            time.sleep(0.01)
        yield


# ------------------------------------------------------------ contenders ---
# Each takes a number of jobs and returns the seconds that they took.


def reach(access):
    """Return the address and the jobix in an access file."""
    with open(access) as file:
        found = json.load(file)
    url = urllib.parse.urlsplit(found["url"])
    return {"address": (url.hostname, url.port), "jobix": found["jobix"]}


def jobman(place, jobs, part="cycles", waiting=0, **given):
    """Stock a server and start it anew; run a part of load.py with it."""
    with place.fresh() as folder:
        with start.serving(place, folder) as access:
            stocked = max(jobs, waiting)
            load(place, folder, "set_jobs", jobs=stocked, **reach(access))
        with start.serving(place, folder) as access:
            os.sync()
            given.update(reach(access))
            return load(place, folder, part, jobs=jobs, **given)


def jobman_set(place, jobs):
    """Have an empty server take jobs by /set."""
    with place.fresh() as folder, start.serving(place, folder) as access:
        os.sync()
        return load(place, folder, "set_jobs", jobs=jobs, **reach(access))


def bare(place, jobs, part, **given):
    """Run SQLite alone, in a process of its own."""
    with place.fresh() as folder:
        database = os.path.join(folder, "lean.db")
        return load(place, folder, part, database=database, jobs=jobs, **given)


def stock_http(place, jobs, **given):
    """Run the standard library's server, which does nothing."""
    address = free_address()
    with place.fresh() as folder:
        path = write_part(folder, "serve_http", {"address": address})
        with listening(place, address, place.python, LOAD, path):
            return load(
                place, folder, "requests", address=address, jobs=jobs, **given
            )


def beanstalkd(place, jobs, durable, part="beanstalkd_cycles", **given):
    """Run beanstalkd with every change on disk, or none."""
    address = free_address()
    argv = [start.program("beanstalkd"), "-l", LOCAL, "-p", str(address[1])]
    with place.fresh() as folder:
        if durable:
            argv += ["-b", folder, "-f", "0"]
        with listening(place, address, *argv):
            return load(
                place, folder, part, address=address, jobs=jobs, **given
            )


def redis(place, jobs, part="redis_cycles", python=None, **given):
    """Run redis with every change on disk."""
    address = free_address()
    with place.fresh() as folder:
        argv = [
            start.program("redis-server"), "--bind", LOCAL, "--dir", folder,
            "--port", str(address[1]), "--save", "",
            "--appendonly", "yes", "--appendfsync", "always",
        ]
        with listening(place, address, *argv):
            return load(
                place, folder, part, python, address=address, jobs=jobs,
                **given
            )


def rq(place, jobs, forks):
    """Run a worker of RQ on redis."""
    return redis(place, jobs, "rq_worker", place.peers, forks=forks)


def huey(place, jobs, fsync):
    """Run a consumer of huey on SQLite."""
    with place.fresh() as folder:
        database = os.path.join(folder, "huey.db")
        return load(
            place, folder, "huey_consumer", place.peers, database=database,
            jobs=jobs, fsync=fsync,
        )


def original(place, jobs, clients):
    """Use the server that --original names."""
    with place.fresh() as folder:
        return load(
            place, folder, "original", jobs=jobs, clients=clients,
            **place.original
        )


class Row(typing.NamedTuple):
    """One line of the table, and how it is measured."""

    name: str
    peer: str  # what --only names
    run: typing.Callable
    unit: int = 500  # jobs that warm it up; it is measured with a multiple
    adds: bool = False  # jobs are added, not taken through
    waiting: int = 0  # jobs, at least, while it is measured


def line(name, peer, function, *, unit=500, adds=False, **given):
    """Return a Row whose function is called with what is given."""
    run = functools.partial(function, **given)
    return Row(name, peer, run, unit, adds, given.get("waiting", 0))


SQLITE = "SQLite FULL"
SQLITE_ADD = "SQLite FULL, add"
BEANSTALKD = "beanstalkd fsync, 16"
BEANSTALKD_ADD = "beanstalkd fsync, put"

ROWS = [
    line("jobman, 1 client", "jobman", jobman, clients=1),
    line("jobman, 4 clients", "jobman", jobman, clients=4),
    line("jobman, 16 clients", "jobman", jobman, clients=16),
    line("jobman, 64 clients", "jobman", jobman, clients=64),
    line("jobman, 16, 100k waiting", "jobman", jobman, clients=16,
         waiting=LONG),
    line("jobman, 16, 1M waiting", "jobman", jobman, clients=16,
         waiting=LONGER),
    line("jobman, 16, new conn.", "jobman", jobman, clients=16, fresh=True),
    line("jobman, n=1000, 1 client", "jobman", jobman, part="batches",
         clients=1, unit=10000),
    line("jobman, n=1000, 4 clients", "jobman", jobman, part="batches",
         clients=4, unit=10000),
    line("jobman, /set", "jobman", jobman_set, adds=True, unit=50000),
    line(SQLITE, "sqlite", bare, part="sqlite_cycles", synchronous="full"),
    line("SQLite FULL, 1M waiting", "sqlite", bare, part="sqlite_cycles",
         synchronous="full", waiting=LONGER),
    line("SQLite NORMAL", "sqlite", bare, part="sqlite_cycles",
         synchronous="normal"),
    line(SQLITE_ADD, "sqlite", bare, part="sqlite_insert", synchronous="full",
         adds=True, unit=50000),
    line("http.server, 1 client", "http", stock_http, clients=1),
    line("http.server, 16 clients", "http", stock_http, clients=16),
    line("http.server, 16, new conn.", "http", stock_http, clients=16,
         fresh=True),
    line("beanstalkd fsync, 1", "beanstalkd", beanstalkd, durable=True,
         clients=1),
    line("beanstalkd fsync, 4", "beanstalkd", beanstalkd, durable=True,
         clients=4),
    line(BEANSTALKD, "beanstalkd", beanstalkd, durable=True, clients=16),
    line("beanstalkd memory, 1", "beanstalkd", beanstalkd, durable=False,
         clients=1),
    line("beanstalkd memory, 16", "beanstalkd", beanstalkd, durable=False,
         clients=16),
    line(BEANSTALKD_ADD, "beanstalkd", beanstalkd, durable=True,
         part="beanstalkd_puts", clients=16, adds=True),
    line("beanstalkd, pipelined put", "beanstalkd", beanstalkd, durable=True,
         part="beanstalkd_puts", at_once=100, adds=True),
    line("redis fsync, lists, 16", "redis", redis, clients=16),
    line("RQ, a fork each", "rq", rq, forks=True, unit=50),
    line("RQ, SimpleWorker", "rq", rq, forks=False, unit=50),
    line("huey, fsync", "huey", huey, fsync=True),
    line("huey, no fsync", "huey", huey, fsync=False),
    line("the original, 1 client", "original", original, clients=1,
         unit=1000),
    line("the original, 16 clients", "original", original, clients=16,
         unit=1000),
]

# Rows, divided by each other, and what the quotient is to be (and at best)
SECOND = "a second"  # no row: the target is a rate
TARGETS = [
    ("jobman, 16 clients", SQLITE, "1.3 (2)"),
    ("jobman, 16 clients", BEANSTALKD, "(1)"),
    ("jobman, 16 clients", "the original, 16 clients", "80"),
    ("jobman, 1 client", SQLITE, "0.4 (0.5)"),
    ("jobman, 16, 100k waiting", "jobman, 16 clients", "0.9"),
    ("jobman, 16, 1M waiting", "jobman, 16 clients", "0.9"),
    ("jobman, 16, new conn.", "http.server, 16, new conn.", "0.8"),
    ("jobman, n=1000, 1 client", SECOND, "50000 (100000)"),
    ("jobman, /set", SECOND, "200000"),
]


# ----------------------------------------------------------------- peers ---


def version_of(place, *argv):
    """Return the version that a program or a package says it has."""
    try:
        text = place.output(*argv)
    except (Failed, OSError):
        raise Missing(argv[-1]) from None
    return re.search(r"\d+(\.\d+)+", text).group()


def package(place, name):
    """Return a package and its version; raise Missing without it."""
    code = "import importlib.metadata as m, sys; print(m.version(sys.argv[1]))"
    return name + " " + version_of(place, place.peers, "-c", code, name)


def server(place, name, option):
    """Return a program and its version; raise Missing without it."""
    path = start.program(name)
    return name + " " + version_of(place, path, option)


def rq_version(place):
    """Return RQ's version; raise Missing without it or redis."""
    start.program("redis-server")
    return package(place, "rq")


def original_version(place):
    """Return the original's name; raise Missing if none is given."""
    if place.original is None:
        raise Missing("--original")
    return "the original"


PEERS = {
    "jobman": lambda place: "jobman " + version_of(
        place, place.python, start.JOBMAN, "--version"),
    "sqlite": lambda place: "SQLite " + sqlite3.sqlite_version,
    "http": lambda place: "Python " + platform.python_version(),
    "beanstalkd": lambda place: server(place, "beanstalkd", "-v"),
    "redis": lambda place: server(place, "redis-server", "--version"),
    "rq": rq_version,
    "huey": lambda place: package(place, "huey"),
    "original": original_version,
}


def look_around(place, only):
    """Return the versions of the peers that are there, and those missing.

    The first is {peer: text}, the second a list of names.
    """
    found, missing = {}, []
    for peer, version in PEERS.items():
        if not only or peer in only:
            try:
                found[peer] = version(place)
            except Missing as name:
                missing.append(str(name))
    return found, sorted(set(missing))


# ----------------------------------------------------------- measurement ---


def rate(place, row, jobs):
    """Measure a row once; return jobs a second."""
    found = jobs / row.run(place, jobs)
    say("    %-26s %8.0f a second" % (row.name, found))
    return found


def counts(place, rows, jobs):
    """Return {row: how many jobs it is to be measured with}."""
    if jobs:
        return dict.fromkeys(rows, jobs)
    say("warming up")
    return {
        row: row.unit if row.peer == "original" else row.unit * max(
            1, round(SECONDS * rate(place, row, row.unit) / row.unit))
        for row in rows
    }


def measure(place, numbers, rounds):
    """Measure each row once a round; return {row's name: [rate, …]}.

    The first round's order is the table's; the others are shuffled, so that
    no row always comes after the same one.
    """
    rates, rows = {}, list(numbers)
    for number in range(rounds):
        say("round %d of %d" % (number + 1, rounds))
        if number:
            random.shuffle(rows)
        for row in rows:
            found = rate(place, row, numbers[row])
            rates.setdefault(row.name, []).append(found)
    return rates


def fsync_time(folder):
    """Return the median seconds that one fsync takes in a folder."""
    times = []
    with tempfile.TemporaryFile(dir=folder) as file:
        for _ in range(FSYNCS):
            file.write(b"x" * 4096)
            file.flush()
            began = time.monotonic()
            os.fsync(file.fileno())
            times.append(time.monotonic() - began)
    return statistics.median(times)


# ---------------------------------------------------------------- report ---


def ratio(rates, name, base):
    """Return the median of the rounds' quotients as text."""
    if name not in rates or base not in rates:
        return "-"
    pairs = zip(rates[name], rates[base])
    middle = statistics.median(a / b for a, b in pairs)
    return "%.*f" % (0 if middle > 1000 else 2, middle)


def table(numbers, rates):
    """Return the lines of a table in Markdown, each 79 characters."""
    form = "| %-26s | %7s | %8s | %6s | %6s | %7s |"
    lines = [
        form % ("row", "jobs", "a second", "spread", "SQLite", "beanst."),
        form % ("---", "--:", "--:", "--:", "--:", "--:"),
    ]
    for row, jobs in numbers.items():
        found = rates[row.name]
        middle = statistics.median(found)
        bases = (SQLITE_ADD, BEANSTALKD_ADD) if row.adds else (
            SQLITE, BEANSTALKD)
        lines.append(form % (
            row.name, jobs, "%.0f" % middle,
            "%.0f %%" % (100 * (max(found) - min(found)) / middle),
            *(ratio(rates, row.name, base) for base in bases)
        ))
    return lines


def quotients(rates):
    """Return the lines of a table with the ratios that have a target."""
    form = "| %-24s | %-26s | %6s | %14s |"
    rates = dict(rates, **{SECOND: itertools.repeat(1)})
    lines = [
        form % (name, base, ratio(rates, name, base), target)
        for name, base, target in TARGETS if name in rates and base in rates
    ]
    head = [form % ("row", "divided by", "is", "target"),
            form % ("---", "---", "--:", "--:")]
    return ["", *head, *lines] if lines else []


def machine(place):
    """Return two lines on the machine, as it is before the measurement."""
    text = "%s\nfsync of 4 KiB before, median of %d: %.2f ms"
    load = os.getloadavg()[0]
    return text % (start.machine(place, load), FSYNCS,
                   1000 * fsync_time(place.folder))


def report(lines, facts, found, missing):
    """Print the tables, and what they were measured on and with."""
    print("\n".join(lines))
    print()
    print(facts)
    versions = ["Python " + platform.python_version(),
                "SQLite " + sqlite3.sqlite_version, *found.values()]
    print(textwrap.fill("; ".join(dict.fromkeys(versions)), 79))
    if missing:
        print("left out, not installed or given: " + ", ".join(missing))


# ------------------------------------------------------------------ main ---


def parse(arguments):
    """Return the command line's options."""
    parser = argparse.ArgumentParser(
        description="Measure what a move of a job costs.",
        epilog="TMPDIR says where databases are written.",
    )
    add = parser.add_argument
    add("--rounds", type=int, metavar="R",
        help="how often each row is measured (default 5)")
    add("--jobs", type=int, metavar="N",
        help="jobs for each row (default: about %d seconds' worth)" % SECONDS)
    add("--only", nargs="+", choices=PEERS, metavar="NAME",
        help="measure only these: " + ", ".join(PEERS))
    add("--quick", action="store_true",
        help="one round of %d jobs a row, no long queues" % QUICK)
    add("--venv", metavar="VENV",
        help="a virtual environment with rq and huey (default: this Python's)")
    add("--original", metavar="URL",
        help="a server with the original's protocol, which keeps the jobs")
    add("--jobix-file", metavar="FILE", help="the jobix for --original")
    options = parser.parse_args(arguments)
    if options.quick:
        options.rounds = options.rounds or 1
        options.jobs = options.jobs or QUICK
    if options.rounds is None:
        options.rounds = 5
    if options.rounds < 1 or (options.jobs is not None and options.jobs < 1):
        parser.error("--rounds and --jobs must be at least 1")
    if bool(options.original) != bool(options.jobix_file):
        parser.error("--original and --jobix-file need each other")
    return options


def original_server(options):
    """Return how the original is reached, None without one."""
    if options.original is None:
        return None
    url = urllib.parse.urlsplit(options.original)
    if url.scheme != "http" or not url.hostname:
        raise Failed("--original: not an address like http://host:80")
    with open(options.jobix_file) as file:
        jobix = int(file.read())
    return {"address": (url.hostname, url.port or 80), "jobix": jobix,
            "path": url.path.rstrip("/")}


def compare(options, folder):
    """Measure everything and print the table."""
    place = start.Place(
        folder, sys.executable, start.python_of(options.venv)
    )
    place.original = original_server(options)
    start.heed_signals(place)
    facts = machine(place)
    found, missing = look_around(place, options.only)
    rows = [
        row for row in ROWS
        if row.peer in found and not (options.quick and row.waiting)
    ]
    numbers = counts(place, rows, options.jobs)
    rates = measure(place, numbers, options.rounds)
    lines = table(numbers, rates) + quotients(rates)
    report(lines, facts, found, missing)


def main(arguments=None):
    """Run the command line; return its exit status."""
    options = parse(arguments)
    with tempfile.TemporaryDirectory(prefix="jobman-bench-") as folder:
        try:
            compare(options, folder)
        except (Failed, OSError, ValueError) as failed:
            say("run.py: %s" % failed)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
