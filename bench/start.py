#!/usr/bin/env python3
"""Measure what starting a command costs, in jobman and in other programs.

    python3 bench/start.py --hyperqueue VENV

has each of them start `true` many times, two at a time, in turns, and prints
how many it started a second. README.md beside this file says what each row
of the table is. It needs Python 3.8 or later and Linux.
"""

import argparse
import contextlib
import datetime
import multiprocessing
import os
import platform
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time

sys.dont_write_bytecode = True  # leave nothing beside the sources

HERE = os.path.dirname(os.path.abspath(__file__))
TOP = os.path.dirname(HERE)
JOBMAN = os.path.join(TOP, "jobman.py")
WORKER = os.path.join(TOP, "worker.py")
TRUE = shutil.which("true")  # by its path, or a shell takes its own

SLOTS = 2  # commands side by side, also in the names of rows
SECONDS = 5  # that a contender should take for one measurement
WARM_UP = 500  # commands, by which that is estimated
PATIENCE = 60  # seconds without a command that ends
LIMIT = 1800  # seconds for one measurement


class Missing(Exception):
    """Name a contender that isn't installed."""


class Failed(Exception):
    """Say what kept a contender from running its commands."""


def stop(process):
    """End a process, if there is one, and wait for it."""
    if process is None:
        return
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


class Place:
    """Hold what all measurements share: Pythons, folder, environment."""

    def __init__(self, folder, python, peers):
        self.folder = folder
        self.python = python  # runs jobman
        self.peers = peers  # a Python that has the packages to compare with
        self.log = os.path.join(folder, "log")
        self.busy = False  # starting or stopping a process
        self.signal = None  # that came
        self.environment = {
            name: value for name, value in os.environ.items()
            if not name.startswith(("JOBMAN_", "PARALLEL", "PYTHON"))
        }
        self.environment.update(
            HOME=folder, TMPDIR=folder, PARALLEL_SHELL="/bin/sh",
            PYTHONDONTWRITEBYTECODE="1",
        )

    def fresh(self):
        """Return a new folder that lasts as long as a `with`."""
        return tempfile.TemporaryDirectory(dir=self.folder)

    def failure(self, argv, cause):
        """Return a Failed that has the end of the log."""
        with open(self.log, errors="replace") as file:
            end = file.read()[-2000:]
        return Failed("%s: %s\n%s" % (" ".join(argv), cause, end))

    def end(self, number, _):
        """End the program by a signal, at once or when it may be."""
        self.signal = number
        if not self.busy:
            sys.exit(128 + number)

    @contextlib.contextmanager
    def undisturbed(self):
        """Let signals wait, so that no process is lost from sight."""
        self.busy = True
        try:
            yield
        finally:
            self.busy = False
        if self.signal:
            sys.exit(128 + self.signal)

    def start(self, argv, stdin, stdout):
        """Start a process; its standard error goes to the log."""
        with open(stdin) as source, open(self.log, "a") as log:
            return subprocess.Popen(
                argv, env=self.environment, stdin=source, stdout=stdout,
                stderr=log, universal_newlines=True,
            )

    @contextlib.contextmanager
    def running(self, *argv, stdin=os.devnull, stdout=subprocess.DEVNULL):
        """Run a process no longer than a `with` lasts; yield it."""
        process = None
        try:
            with self.undisturbed():
                process = self.start(argv, stdin, stdout)
            yield process
        finally:
            with self.undisturbed():
                stop(process)

    def output(self, *argv, stdin=os.devnull, stdout=subprocess.PIPE):
        """Run a process to its end; return what it printed.

        Raises Failed unless its exit status is 0.
        """
        with self.running(*argv, stdin=stdin, stdout=stdout) as process:
            try:
                text = process.communicate(timeout=LIMIT)[0]
            except subprocess.TimeoutExpired:
                raise self.failure(argv, "it doesn't end") from None
        if process.returncode:
            raise self.failure(argv, "exit status %d" % process.returncode)
        return text


# ------------------------------------------------------------ contenders ---
# Each runs `jobs` commands and returns {row of the table: seconds}.


def program(name):
    """Return the path of a program; raise Missing without it."""
    path = shutil.which(name)
    if path is None:
        raise Missing(name)
    return path


def timed(place, *argv, stdin=os.devnull):
    """Return the seconds that a process takes from start to end."""
    began = time.monotonic()
    place.output(*argv, stdin=stdin, stdout=subprocess.DEVNULL)
    return time.monotonic() - began


def items(folder, jobs):
    """Return a file with a number a line, from 1 to `jobs`."""
    path = os.path.join(folder, "items")
    with open(path, "w") as file:
        file.writelines("%d\n" % number for number in range(1, jobs + 1))
    return path


def watch(figure, jobs):
    """Wait until `figure()` is `jobs`: how many commands have ended.

    To ask costs time, so it asks seldom until the end is near; but the end
    is seen at most a twentieth too late, should the start mislead it.
    """
    began = moved = time.monotonic()
    ended = figure()
    while ended < jobs:
        now = time.monotonic()
        if now > moved + PATIENCE:
            raise Failed("%d of %d commands ended" % (ended, jobs))
        left = (now - began) * (jobs - ended) / ended if ended else 0
        time.sleep(max(0.01, min(left / 2, (now - began) / 20)))
        last, ended = ended, figure()
        if ended > last:
            moved = time.monotonic()


def spawn(jobs):
    """Start `jobs` commands, one after the other."""
    for _ in range(jobs):
        pid = os.posix_spawn(TRUE, [TRUE], os.environ)
        if os.waitpid(pid, 0)[1]:
            raise Failed(TRUE)


def spawn_loops(place, jobs):
    """Run a bare loop of posix_spawn and wait in each of two processes."""
    context = multiprocessing.get_context("fork")
    loops = [
        context.Process(target=spawn, args=((jobs + i) // SLOTS,), daemon=True)
        for i in range(SLOTS)
    ]
    began = time.monotonic()
    for loop in loops:
        loop.start()
    for loop in loops:
        loop.join()
        if loop.exitcode:
            raise Failed("a loop ended with %d" % loop.exitcode)
    return {"posix_spawn, 2 loops": time.monotonic() - began}


def xargs(place, jobs):
    """Run xargs, a command for each line."""
    path = program("xargs")
    with place.fresh() as folder:
        source = items(folder, jobs)
        taken = timed(place, path, "-P2", "-n1", TRUE, stdin=source)
    return {"xargs -P2 -n1": taken}


def parallel(place, jobs):
    """Run GNU parallel, a command for each line."""
    path = program("parallel")
    if "GNU" not in place.output(path, "--version"):
        raise Missing("GNU parallel")
    with place.fresh() as folder:
        source = items(folder, jobs)
        taken = timed(place, path, "--will-cite", "-j2", TRUE, stdin=source)
    return {"GNU parallel -j2": taken}


class Asked(Exception):
    """End a wait for HyperQueue's jobs that was meant as a question."""


def ended_in_hyperqueue(client, submitted):
    """Return how many tasks have finished.

    The library's own wait looks once a second, too coarse to time by; so
    it is left at its first look.
    """
    found = {}

    def look(states):
        found.update(states)
        raise Asked

    with contextlib.suppress(Asked):
        client.connection.wait_for_jobs([submitted.id], look)
    state = found[submitted.id]
    if state["completed"] and state["finished"] < state["total"]:
        raise Failed("HyperQueue: a task failed")
    return state["finished"]


def run_in_hyperqueue(client, folder, jobs, channels):
    """Run tasks; return the seconds from their submission on."""
    import hyperqueue

    job = hyperqueue.Job(default_workdir=folder)
    for _ in range(jobs):
        job.program([TRUE], **channels)
    began = time.monotonic()
    submitted = client.submit(job)
    watch(lambda: ended_in_hyperqueue(client, submitted), jobs)
    return time.monotonic() - began


def be_hyperqueue(folder, jobs, kept):
    """Run HyperQueue in this process; print the seconds, last of all."""
    from hyperqueue.cluster import LocalCluster, WorkerConfig

    channels = {} if kept == "kept" else {"stdout": None, "stderr": None}
    server = os.path.join(folder, "server")
    with LocalCluster(server, WorkerConfig(cores=SLOTS)) as cluster:
        client = cluster.client()
        # When this is done the worker is there
        run_in_hyperqueue(client, folder, 1, channels)
        taken = run_in_hyperqueue(client, folder, int(jobs), channels)
        print("\n%f" % taken, flush=True)


def hyperqueue_version(place):
    """Return HyperQueue's version; raise Missing without it."""
    code = "import hyperqueue; print(hyperqueue.get_version())"
    try:
        return place.output(place.peers, "-c", code).strip()
    except (Failed, OSError):
        raise Missing("HyperQueue") from None


def hyperqueue(place, jobs, kept="kept"):
    """Run HyperQueue's server, worker and client in a process of its own."""
    hyperqueue_version(place)
    code = "import sys, start; start.be_hyperqueue(*sys.argv[1:])"
    with place.fresh() as folder:
        text = place.output(
            place.peers, "-c", "import sys; sys.path.insert(0, %r); %s"
            % (HERE, code), folder, str(jobs), kept,
        )
    taken = float(text.split()[-1])
    return {"HyperQueue" + ("" if kept == "kept" else ", no output"): taken}


def silent_hyperqueue(place, jobs):
    """Run HyperQueue with what commands print thrown away."""
    return hyperqueue(place, jobs, "thrown away")


def states(client):
    """Return the number of jobs in each state, by /status."""
    found = client.status()["totals"]["states"]
    if found["failed"] or found["delayed"]:
        raise Failed("jobman: a job failed")
    return found


def check(place, process, began):
    """Raise Failed when a process ends too early, or does nothing."""
    if process.poll() is not None:
        raise place.failure(process.args, "it ended")
    if time.monotonic() > began + PATIENCE:
        raise place.failure(process.args, "it does nothing")


@contextlib.contextmanager
def serving(place, folder):
    """Run a server while a `with` lasts; yield its access file."""
    access = os.path.join(folder, "access.json")
    database = os.path.join(folder, "jobman.db")
    with place.running(
        place.python, JOBMAN, "serve", "--db", database, "--port", "0",
        "--access", access,
    ) as server:
        began = time.monotonic()
        while not os.path.exists(access):
            check(place, server, began)
            time.sleep(0.01)
        yield access


def time_worker(place, client, access, jobs):
    """Run a worker; return the seconds from its start and first claim."""
    began = time.monotonic()
    with place.running(
        place.python, WORKER, "--slots", str(SLOTS), "--access", access
    ) as process:
        while states(client)["waiting"] == jobs:
            check(place, process, began)
            time.sleep(0.005)
        claimed = time.monotonic()
        watch(lambda: states(client)["done"], jobs)
        ended = time.monotonic()
    return ended - began, ended - claimed


def jobman_worker(place, jobs):
    """Run a server and, when the jobs are there, a worker."""
    sys.path.insert(0, TOP)
    from worker import Client

    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(place.fresh())
        access = stack.enter_context(serving(place, folder))
        client = Client(access)
        stack.callback(client.close)
        client.submit(
            "start", [{"jobstage": 0, "jobcmd": [TRUE], "laststage": 2}] * jobs
        )
        whole, claimed = time_worker(place, client, access, jobs)
    return {"jobman worker": whole, "jobman from 1st claim": claimed}


def jobman_run(place, jobs):
    """Run `jobman.py run`, a command for each line."""
    with place.fresh() as folder:
        source = items(folder, jobs)
        database = os.path.join(folder, "run.db")
        taken = timed(
            place, place.python, JOBMAN, "run", "--db", database,
            "--slots", str(SLOTS), "-a", source, TRUE + " {}",
        )
    return {"jobman run": taken}


CONTENDERS = [
    spawn_loops, xargs, parallel, hyperqueue, silent_hyperqueue,
    jobman_worker, jobman_run,
]


# ----------------------------------------------------------- measurement ---


def say(line):
    """Write a line on how far the measurement is."""
    print(line, file=sys.stderr, flush=True)


def warm_up(place, jobs):
    """Run each contender once; return how many commands each is to run.

    That is {contender: number}, and a list of those that are missing.
    """
    counts, missing = {}, []
    for contender in CONTENDERS:
        say("warming up: %s" % contender.__name__)
        try:
            taken = contender(place, WARM_UP)
        except Missing as name:
            missing.append(str(name))
            continue
        rate = WARM_UP / min(taken.values())
        counts[contender] = jobs or max(100, round(SECONDS * int(rate), -2))
    return counts, sorted(set(missing))


def measure(place, counts, rounds):
    """Measure each contender once a round.

    Returns {row: [(commands, commands a second), …]}. The first round's
    order is the table's; the others are shuffled, so that no contender
    always comes after the same one.
    """
    rates, contenders = {}, list(counts)
    for number in range(rounds):
        say("round %d of %d" % (number + 1, rounds))
        if number:
            random.shuffle(contenders)
        for contender in contenders:
            jobs = counts[contender]
            for row, taken in contender(place, jobs).items():
                rates.setdefault(row, []).append((jobs, jobs / taken))
    return rates


# ---------------------------------------------------------------- report ---


def ratio(rates, row, base):
    """Return the median of the rounds' ratios as text."""
    if base not in rates:
        return "-"
    pairs = zip(rates[row], rates[base])
    return "%.2f" % statistics.median(a[1] / b[1] for a, b in pairs)


def table(rates):
    """Return the lines of a table in Markdown, each 79 characters."""
    line = "| %-21s | %5s | %8s | %11s | %10s | %5s |"
    lines = [
        line % ("row", "runs", "a second", "range",
                "HyperQueue", "xargs"),
        line % ("---", "--:", "--:", "--:", "--:", "--:"),
    ]
    for row, measured in rates.items():
        found = [rate for _, rate in measured]
        lines.append(line % (
            row, measured[0][0], "%.0f" % statistics.median(found),
            "%.0f - %.0f" % (min(found), max(found)),
            ratio(rates, row, "HyperQueue"),
            ratio(rates, row, "xargs -P2 -n1"),
        ))
    return lines


def versions(place, missing):
    """Return the versions of what is compared, as a list of texts."""
    code = (
        "import platform, sqlite3; print('Python', platform.python_version(),"
        " 'with SQLite', sqlite3.sqlite_version)"
    )
    calls = [
        (place.python, JOBMAN, "--version"), (place.python, "-c", code),
        ("xargs", "--version"), ("parallel", "--version"),
    ]
    found = [
        place.output(*call).splitlines()[0] for call in calls
        if shutil.which(call[0]) and call[0] not in missing
    ]
    if "HyperQueue" not in missing:
        found.append("HyperQueue " + hyperqueue_version(place).lstrip("v"))
    return found


def machine(place, load):
    """Return a line on date, machine and load; no name of it in that."""
    kernel = platform.release().split("-")[0]
    kind = place.output("df", "--output=fstype", place.folder).split()[-1]
    return "%s; %d cores, Linux %s, %s; load before %.2f" % (
        datetime.date.today(), len(os.sched_getaffinity(0)), kernel, kind, load
    )


def report(place, rates, missing, load):
    """Print the table, and what it was measured on and with."""
    print("\n".join(table(rates)))
    print()
    print(machine(place, load))
    print(textwrap.fill("; ".join(versions(place, missing)), 79))
    if missing:
        print("left out, not installed: " + ", ".join(missing))


# ------------------------------------------------------------------ main ---


def parse(arguments):
    """Return the command line's options."""
    parser = argparse.ArgumentParser(
        description="Measure what starting a command costs.",
        epilog="TMPDIR says where databases and outputs are written.",
    )
    add = parser.add_argument
    add("--jobs", type=int, metavar="N",
        help="commands for each contender (default: about %d seconds' worth)"
        % SECONDS)
    add("--rounds", type=int, default=5, metavar="R",
        help="how often each is measured (default 5)")
    add("--python", default=sys.executable, metavar="PATH",
        help="the Python that runs jobman (default: this one)")
    add("--hyperqueue", metavar="VENV",
        help="a virtual environment with hyperqueue (default: this Python's)")
    options = parser.parse_args(arguments)
    if options.rounds < 1 or (options.jobs is not None and options.jobs < 1):
        parser.error("--jobs and --rounds must be at least 1")
    if sys.version_info < (3, 8):
        parser.error("it needs Python 3.8 or later; see --python")
    return options


def real_python(path):
    """Return the Python behind `path`, which may be a wrapper.

    One that looks for its Pythons at home would not find them later.
    """
    code = "import sys; print(sys.executable)"
    try:
        return subprocess.check_output(
            [path, "-c", code], universal_newlines=True
        ).strip()
    except (OSError, subprocess.CalledProcessError) as error:
        raise Failed("--python: %s" % error) from None


def python_of(venv):
    """Return the Python of a virtual environment, without one this one."""
    if not venv:
        return sys.executable
    return os.path.join(os.path.abspath(venv), "bin", "python")


def heed_signals(place):
    """Let signals to end stop all that was started, too."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, place.end)


def compare(options, folder):
    """Measure everything and print the table."""
    venv_python = python_of(options.hyperqueue)
    place = Place(folder, real_python(options.python), venv_python)
    heed_signals(place)
    load = os.getloadavg()[0]
    counts, missing = warm_up(place, options.jobs)
    rates = measure(place, counts, options.rounds)
    report(place, rates, missing, load)


def main(arguments=None):
    """Run the command line; return its exit status."""
    options = parse(arguments)
    with tempfile.TemporaryDirectory(prefix="jobman-bench-") as folder:
        try:
            compare(options, folder)
        except Failed as failed:
            say("start.py: %s" % failed)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
