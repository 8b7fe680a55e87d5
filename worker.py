#!/usr/bin/env python3
"""Work through the jobs of a jobman server, on any number of nodes.

    python3 worker.py --stage 0      run the jobs that wait in stage 0

claims jobs, runs each one's command and tells the server what came of it.
As a library this file gives `Client`, with a method for every call that the
server answers. It needs Python 3.6 or later and nothing else, and works when
copied alone. The manual is jobman's README.md.
"""

import argparse
import contextlib
import http.client
import json
import os
import queue
import random
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from urllib.parse import urlencode, urlsplit

__version__ = "0.1.0"

MAX_STAGE = 1000000
MAX_BODY = 64 * 2**20  # bytes that a server takes in one call
STDERR_KEPT = 4096  # bytes of a command's stderr that go to the server
RESULT_LIMIT = 2**20  # bytes that a command may leave in JOBMAN_RESULT


# ---------------------------------------------------------------- errors ---


class Trouble(Exception):
    """Say in one sentence what is wrong and what to do."""


class Refused(Trouble):
    """Hold the server's refusal: `status` and its sentence."""

    def __init__(self, status, message):
        super().__init__(message)
        self.status = status


class Unreachable(Trouble):
    """Say that the server can't be reached."""


# ---------------------------------------------------------------- client ---


def access_path():
    """Return where the access file is, unless an option says otherwise."""
    default = os.path.join(os.path.expanduser("~"), ".jobman", "access.json")
    return os.environ.get("JOBMAN_ACCESS") or default


def read_access(path):
    """Return (url, jobix) from an access file; raise Trouble without one."""
    try:
        with open(path, encoding="utf-8") as file:
            access = json.load(file)
        return str(access["url"]), int(access["jobix"])
    except FileNotFoundError:
        raise Trouble(
            "There is no access file %s: start a server with `python3"
            " jobman.py serve`, or name its file with --access." % path
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Trouble("Can't read %s: %s." % (path, error)) from None


class Client:
    """Speak to a server: one method for each of its calls.

    `access` names the access file (default: $JOBMAN_ACCESS, else
    ~/.jobman/access.json); `url` and `jobix` (or $JOBMAN_URL and
    $JOBMAN_JOBIX) do without one. One connection is kept open; threads take
    turns on it. What is safe to repeat is repeated for up to `patience`
    seconds (None: for ever) when the server can't be reached, with growing,
    random pauses; the access file is read again each time, for the server
    may have moved. Every method raises Refused when the server says no, and
    Unreachable when it can't be reached.
    """

    CONNECT_TIMEOUT = 10  # seconds
    TIMEOUT = 60  # seconds without a byte before a connection is given up
    LONGEST_PAUSE = 10

    def __init__(self, access=None, *, url=None, jobix=None, patience=60):
        self.access = access or access_path()
        if access is None and url is None:
            url = os.environ.get("JOBMAN_URL")
            jobix = os.environ.get("JOBMAN_JOBIX")
        if url is not None and jobix is None:
            raise Trouble("A url needs a jobix too ($JOBMAN_JOBIX).")
        self.fixed = None if url is None else (url, jobix)
        self.patience = patience
        self.mutex = threading.Lock()  # guards the connection
        self.connection = None
        self.sent = False  # whether a call has gone out on it
        self.aborted = False
        self.locate()

    def locate(self):
        """Find out where the server is, and with what jobix to come."""
        url, jobix = self.fixed or read_access(self.access)
        try:
            parts = urlsplit(url)
            address = parts.hostname, parts.port or 80
        except ValueError:
            parts = None
        if parts is None or parts.scheme != "http" or not parts.hostname:
            raise Trouble("The server's address %r is not http://..." % url)
        self.jobix, self.address = jobix, address
        self.prefix = parts.path.rstrip("/")

    # The calls, in the order of the server's route table

    def health(self):
        """Return the server's health, a dict; raise Refused when it is ill."""
        return self.call("GET", "/health")

    def init(self, *minutes):
        """Set the lifetimes of stages 0 … n where there are none yet.

        Returns {stage: minutes} in force; without arguments only that.
        """
        path = "/".join(["/init", *map(str, minutes)])
        found = self.call("GET", path)
        return {int(stage): value for stage, value in found.items()}

    def lifetime(self, stage, minutes=None):
        """Return the lifetime of a stage in minutes, or set it."""
        change = "" if minutes is None else "/%d" % minutes
        return self.call("GET", "/lifetime/%d%s" % (stage, change))

    def set(self, jobs):
        """Add `jobs`: {jobid: {"jobstage": int, "jobcmd": any JSON, …}}."""
        return self.call("POST", "/set", jobs)

    def submit(self, key, jobs):
        """Add `jobs`, a list of entries; return the ids they are given.

        The same key again gives the same ids and adds nothing.
        """
        return self.call("POST", "/submit", {"key": key, "jobs": jobs})["ids"]

    def get(self, stage, nextstage=None, **options):
        """Claim a job that waits in `stage`; return it, None without one.

        `stage` may be a list: the first that has a job. Options: `worker`
        (a name), `wait`, `lease` (seconds), `n` (jobs: returns a list).
        A claim without a lease whose answer is lost is not repeated.
        """
        listed = [stage] if isinstance(stage, int) else stage
        path = "/get/" + ",".join(map(str, listed))
        if nextstage is not None:
            path += "/%d" % nextstage
        found = self.call(
            "GET", path, options=options, repeat="lease" in options,
            timeout=self.TIMEOUT + options.get("wait", 0),
        )
        return None if found == "nada" else found

    def update_job(self, jobid, stage, claim=None, **result):
        """Put a job into `stage`.

        `result` may have `filename`, `jobcmd`, `files`, `error`, `stderr`,
        `exit_code` and `seconds`.
        """
        path = "/update_job/%d/%d" % (jobid, stage)
        return self.call("POST", path, result, options={"claim": claim})

    def update_jobs(self, updates):
        """Put many jobs into stages; return a list of their statuses.

        An update is {"jobid", "jobstage", "claim"?, "filename"?, …}.
        """
        return self.call("POST", "/update_jobs", updates)

    def fail_job(self, jobid, claim=None, **report):
        """Say that an attempt failed: `error`, `exit_code`, `stderr`."""
        return self.call(
            "POST", "/fail_job/%d" % jobid, report,
            options={"claim": claim}, repeat=claim is not None,
        )

    def reject_job(self, jobid, claim=None, **report):
        """Say that the files that a job was given aren't there as made.

        `report`: `error`, `stderr`, and `files` that the job must have still.
        """
        return self.call(
            "POST", "/reject_job/%d" % jobid, report,
            options={"claim": claim}, repeat=claim is not None,
        )

    def release_job(self, jobid, claim=None):
        """Give a claim back unharmed."""
        return self.call(
            "POST", "/release_job/%d" % jobid, {},
            options={"claim": claim}, repeat=claim is not None,
        )

    def heartbeat(self, worker, lease, claims, **about):
        """Renew `claims`, [[jobid, token], …], for `lease` seconds.

        `about` the worker: `host`, `slots`, `busy`, `done`, `failed`,
        `quarantine` (why it takes no more work), `ended` (True).
        Returns {"lost": [jobid, …], "drain": bool}.
        """
        beat = dict(about, worker=worker, lease=lease, claims=claims)
        return self.call("POST", "/heartbeat", beat)

    def check_stages(self, old=None, new=None):
        """Flag the expired jobs; move those of stage `old` to `new`."""
        if old is None:
            return self.call("GET", "/check_stages")
        path = "/check_stages/%d/%d" % (old, new)
        return self.call("GET", path, repeat=False)

    def retry(self, **selector):
        """Let ended jobs run again; return how many.

        `selector`: `ids`, or `stage` and `state`, or `all=True`.
        """
        return self.call("POST", "/retry", selector)["retried"]

    def cancel(self, **selector):
        """Cancel jobs that aren't done; return how many; as retry."""
        return self.call("POST", "/cancel", selector)["cancelled"]

    def status(self):
        """Return the figures: jobs per stage and state, totals, rate."""
        return self.call("GET", "/status")

    def workers(self):
        """Return the workers heard of in the last day, the latest first.

        {"time": now, "workers": [{"name", "host", "slots", "heard", …}, …]}
        """
        return self.call("GET", "/workers")

    def jobs(self, **options):
        """Return a page of jobs: {"jobs": [job, …], "after": jobid or None}.

        Options: `stage`, `state`, `after` (from the page before), `limit`.
        A page may be short, or empty, and not the last.
        """
        return self.call("GET", "/jobs", options=options)

    def job(self, jobid):
        """Return all that the server knows of a job, and its attempts."""
        return self.call("GET", "/job/%d" % jobid)

    # How a call is made

    def call(
        self, method, path, value=None, *,
        options=None, repeat=True, timeout=TIMEOUT
    ):
        """Make a call; return its answer: a JSON value, or text."""
        given = {k: v for k, v in (options or {}).items() if v is not None}
        if given:
            path += "?" + urlencode(given)
        body = None
        if value is not None:
            body = zlib.compress(json.dumps(value).encode("ascii"), 1)
            if len(body) > MAX_BODY:
                raise Refused(413, "That is too much for one call.")
        with self.mutex:
            status, kind, text = self.persist(
                method, path, body, repeat, timeout
            )
        if kind.startswith("application/json"):
            text = json.loads(text)
        if status != 200:
            known = isinstance(text, dict) and text.get("error")
            raise Refused(status, known or "The server said %d." % status)
        return text

    def persist(self, method, path, body, repeat, timeout):
        """Make a call, again and again while that is safe and may help."""
        end = time.monotonic() + (self.patience or 0)
        pause = 0.1
        while True:
            try:
                answer = self.exchange(method, path, body, timeout)
                if answer[0] != 503:
                    return answer
                error = "The server can't answer now."
            except (OSError, http.client.HTTPException) as lost:
                sent = self.close()
                error = "The server at %s:%d can't be reached (%s)." % (
                    *self.address, lost or type(lost).__name__
                )
                if sent and not repeat:
                    raise Unreachable(error) from None
            late = self.patience is not None and time.monotonic() > end
            if late or self.aborted:
                raise Unreachable(error)
            time.sleep(random.uniform(0, pause))
            pause = min(self.LONGEST_PAUSE, pause * 2)
            with contextlib.suppress(Trouble):  # it may be in the writing
                self.locate()

    def exchange(self, method, path, body, timeout):
        """Make a call once; return (status, content type, text)."""
        self.connect(timeout)
        headers = {"jobix": str(self.jobix)}
        if body is not None:
            headers["Content-Encoding"] = "deflate"
            headers["Content-Type"] = "application/json"
        if self.aborted:
            raise OSError("broken off")
        self.sent = True
        self.connection.request(method, self.prefix + path, body, headers)
        response = self.connection.getresponse()
        text = response.read().decode("utf-8")
        if response.getheader("Connection", "").lower() == "close":
            self.close()
        return response.status, response.getheader("Content-Type", ""), text

    def connect(self, timeout):
        """Open the connection, unless it still stands."""
        if self.connection is not None:
            poll = select.poll()
            poll.register(self.connection.sock, select.POLLIN)
            if poll.poll(0):  # nothing is due: the server has closed it
                self.close()
        self.sent = False
        if self.connection is None:
            self.connection = http.client.HTTPConnection(
                *self.address, timeout=self.CONNECT_TIMEOUT
            )
            self.connection.connect()
        self.connection.sock.settimeout(timeout)

    def close(self):
        """Close the connection; return whether a call was sent on it."""
        if self.connection is not None:
            self.connection.close()
            self.connection = None
        return self.sent

    def abort(self):
        """Break off the call on its way, from another thread; no more."""
        self.aborted = True
        with contextlib.suppress(OSError, AttributeError):
            self.connection.sock.shutdown(socket.SHUT_RDWR)


# --------------------------------------------------------------- command ---


def to_bytes(text):
    """Return the bytes that `text` stands for, whatever the locale.

    Bytes that aren't UTF-8 travel as lone surrogates (PEP 383).
    """
    return text.encode("utf-8", "surrogateescape")


def tail(file):
    """Return the end of a command's stderr as text."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - STDERR_KEPT))
    return file.read().decode("utf-8", "replace")


def remove(path):
    """Remove what a command left at `path`, if anything."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass
    except OSError:
        shutil.rmtree(path)


def refuse_constant(name):
    """Refuse NaN and Infinity, which Python reads but JSON doesn't have."""
    raise ValueError("%s is not JSON" % name)


def read_result(text):
    """Return the object in a result file; raise ValueError for a bad one."""
    try:
        result = json.loads(
            text.decode("utf-8", "surrogateescape"),
            parse_constant=refuse_constant,
        )
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(result, dict) or set(result) - {"filename", "jobcmd"}:
        raise ValueError("it is no object with filename and jobcmd")
    if not isinstance(result.get("filename"), (str, type(None))):
        raise ValueError("its filename is no string")
    return result


class Command:
    """Run the command of one job and keep what it prints.

    `argv` is a list of strings, `given` the bytes for its standard input.
    Its process group is its own, so that it can be killed as a whole.
    """

    GRACE = 5  # seconds between TERM and KILL

    def __init__(self, job, argv, given, result):
        self.job = job
        self.argv = [to_bytes(word) for word in argv]
        self.given = given
        self.result = result  # the file that JOBMAN_RESULT names
        self.out = tempfile.TemporaryFile()
        self.err = tempfile.TemporaryFile()
        self.mutex = threading.Lock()  # guards process and killed
        self.process = None
        self.killed = False

    def environment(self):
        """Return the worker's environment with what the job adds."""
        job = self.job
        added = {
            "JOBMAN_JOBID": str(job["jobid"]),
            "JOBMAN_STAGE": str(job["jobstage"]),
            "JOBMAN_ATTEMPT": str(job["attempt"]),
            "JOBMAN_FILENAME": job["filename"] or "",
            "JOBMAN_RESULT": self.result,
        }
        environment = dict(os.environb)
        for name, text in added.items():
            environment[name.encode("ascii")] = to_bytes(text)
        return environment

    def start(self):
        """Start the process; raise OSError or ValueError if it can't be."""
        cwd = self.job.get("cwd")
        remove(self.result)
        with tempfile.TemporaryFile() as stdin, self.mutex:
            stdin.write(self.given)
            stdin.seek(0)
            if not self.killed:
                self.process = subprocess.Popen(
                    self.argv,
                    stdin=stdin,
                    stdout=self.out,
                    stderr=self.err,
                    cwd=None if cwd is None else to_bytes(cwd),
                    env=self.environment(),
                    start_new_session=True,
                    close_fds=False,
                )

    def wait(self):
        """Return the exit status, as a shell gives it: 124 after a timeout."""
        if self.process is None:
            return 128 + signal.SIGTERM
        try:
            status = self.process.wait(self.job.get("timeout"))
        except subprocess.TimeoutExpired:
            self.kill()
            self.process.wait()
            return 124
        return status if status >= 0 else 128 - status

    def kill(self):
        """End the process group: TERM, and KILL for what outlives it."""
        with self.mutex:
            self.killed = True
            if self.process is None or self.process.poll() is not None:
                return
        self.signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(self.GRACE)
        self.signal(signal.SIGKILL)

    def signal(self, number):
        """Send a signal to the process group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def brought(self):
        """Return what the command left in JOBMAN_RESULT, a dict.

        Raises ValueError when that is no object with filename and jobcmd.
        """
        try:
            flags = os.O_RDONLY | os.O_NONBLOCK  # it may be a pipe
            with open(os.open(self.result, flags), "rb") as file:
                text = file.read(RESULT_LIMIT + 1) or b""
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise ValueError(error.strerror) from None
        if len(text) > RESULT_LIMIT:
            raise ValueError("it is over %d bytes" % RESULT_LIMIT)
        return read_result(text) if text.strip() else {}

    def close(self):
        """Let go of the files."""
        self.out.close()
        self.err.close()


# ---------------------------------------------------------------- worker ---


class Worker:
    """Claim jobs, run them side by side in slots, report what came of them.

    One thread claims (`dispatch`, the caller's own), each slot runs one
    command at a time, one thread reports and one renews the leases.
    """

    LONGEST_WAIT = 30  # seconds of a long poll
    MOST_REPORTS = 100  # in one call

    def __init__(
        self, access=None, *, stages=(0,), slots=1, command=None,
        lease=120, idle_timeout=60, name=None
    ):
        self.claimer = Client(access, patience=None)
        self.reporter = Client(access, patience=None)
        self.beater = Client(access, patience=None)
        self.stages = sorted(stages, reverse=True)
        self.slots = slots
        self.command = command
        self.lease = lease
        self.idle_timeout = idle_timeout
        self.name = name or "%s-%d" % (socket.gethostname(), os.getpid())
        self.free = threading.Semaphore(slots)
        self.jobs = queue.Queue()
        self.outcomes = queue.Queue()
        self.mutex = threading.Lock()  # guards claims and commands
        self.claims = {}  # jobid: newest token, until its outcome is told
        self.commands = {}  # jobid: Command, while it runs
        self.printing = threading.Lock()
        self.status = 0
        self.ending = threading.Event()
        self.over = threading.Event()

    def run(self):
        """Work until there is nothing left to do, or end() is called."""
        self.folder = tempfile.mkdtemp(prefix="jobman-")
        slots = [
            threading.Thread(target=self.work_on, args=(i,), daemon=True)
            for i in range(self.slots)
        ]
        others = [
            threading.Thread(target=self.guard, args=(work,), daemon=True)
            for work in (self.report_on, self.beat_on)
        ]
        for thread in slots + others:
            thread.start()
        try:
            self.dispatch()
        finally:
            self.finish(slots, others)

    def end(self, status):
        """Claim no more, kill what runs and give it back.

        run() returns then; `status` is the worker's exit status.
        """
        self.status = self.status or status
        self.ending.set()
        self.claimer.abort()
        self.reporter.patience = self.beater.patience = 0
        with self.mutex:
            for command in self.commands.values():
                threading.Thread(target=command.kill, daemon=True).start()

    def guard(self, work):
        """Do the work of a thread; without it the worker can't go on."""
        try:
            work()
        except Exception as error:
            self.say("%s: %s" % (type(error).__name__, error))
            self.end(1)

    def finish(self, slots, others):
        """Wait for what runs and for its reports."""
        for _ in slots:
            self.jobs.put(None)
        for thread in slots:
            thread.join()
        self.outcomes.put(None)
        others[0].join()
        self.over.set()
        shutil.rmtree(self.folder, ignore_errors=True)

    # Claiming

    def dispatch(self):
        """Claim jobs for idle slots until there have been none for long."""
        busy, least = time.monotonic(), 0  # a poll's least wait, in seconds
        while True:
            slots = self.take_slots()
            if self.ending.is_set():
                return
            left = busy + self.idle_timeout - time.monotonic()
            jobs = self.claim(slots, max(left, least))
            for _ in range(slots - len(jobs)):
                self.free.release()
            now = time.monotonic()
            idle = not jobs and not self.claims
            if idle and now < busy + self.idle_timeout:
                continue
            if idle and not self.delayed():
                return
            busy, least = now, 0.2

    def take_slots(self):
        """Wait for an idle slot; return how many there are then."""
        self.free.acquire()
        slots = 1
        while self.free.acquire(blocking=False):
            slots += 1
        return slots

    def claim(self, n, left):
        """Claim up to `n` jobs and put them before the slots; return those."""
        wait = round(min(self.LONGEST_WAIT, left), 3)
        began = time.monotonic()
        try:
            claimed = self.claimer.get(
                self.stages, worker=self.name, lease=self.lease, n=n, wait=wait
            )
        except Unreachable:
            return []  # only after end()
        if not claimed and time.monotonic() < began + wait:
            self.ending.wait(random.uniform(0.1, 1))  # too many wait there
        jobs = [job for job in claimed if not self.adopt(job)]
        for job in jobs:
            self.jobs.put(job)
        return jobs

    def adopt(self, job):
        """Keep a new claim; return whether its job is running here already.

        A lease that lapsed has brought our own job back to us: its command
        goes on, under the new claim.
        """
        with self.mutex:
            self.claims[job["jobid"]] = job["claim"]
            command = self.commands.get(job["jobid"])
            if command is not None:
                command.job = job
            return command is not None

    def delayed(self):
        """Return whether a job of our stages waits for its time."""
        try:
            figures = self.claimer.status()
        except Unreachable:
            return False
        return any(
            stage["stage"] in self.stages and stage["states"]["delayed"]
            for stage in figures["stages"]
        )

    # Running

    def work_on(self, slot):
        """Run one job after another in a slot."""
        result = os.path.join(self.folder, "result-%d" % slot)
        for job in iter(self.jobs.get, None):
            try:
                self.outcomes.put(self.perform(job, result))
            except Exception as error:
                report = {"error": "worker.py has a fault: %r" % error}
                self.outcomes.put((job, "fail", report))
            finally:
                self.free.release()

    def perform(self, job, result):
        """Run a job's command; return what to report.

        That is the job in its newest claim, a verb and the verb's values.
        """
        try:
            argv, given = self.prepare(job)
            command = Command(job, argv, given, result)
        except (ValueError, OSError) as error:
            return job, "fail", {"error": str(error)}
        with contextlib.closing(command):
            if not self.register(command):
                return job, "release", {}
            try:
                verb, values = self.carry_out(command)
            finally:
                with self.mutex:
                    del self.commands[job["jobid"]]
            return command.job, verb, values

    def carry_out(self, command):
        """Run a command and print its output; return a verb and values."""
        try:
            command.start()
            status = command.wait()
            if not self.print(command):
                return "release", {}
            return self.judge(command, status)
        except (OSError, ValueError) as error:
            status = 127 if isinstance(error, FileNotFoundError) else 126
            return "fail", {"error": str(error), "exit_code": status}

    def register(self, command):
        """Note that a command runs; return whether it still should."""
        jobid, claim = command.job["jobid"], command.job["claim"]
        with self.mutex:
            current = self.claims.get(jobid) == claim
            if self.ending.is_set() or not current:
                return False
            self.commands[jobid] = command
            return True

    def prepare(self, job):
        """Return a job's command as argv, and what it reads, as bytes.

        Raises ValueError when it has none.
        """
        if self.command is not None:
            return ["/bin/sh", "-c", self.command], json.dumps(job).encode()
        jobcmd = job["jobcmd"]
        if isinstance(jobcmd, str):
            return ["/bin/sh", "-c", jobcmd], b""
        words = isinstance(jobcmd, list) and jobcmd
        if words and all(isinstance(word, str) for word in jobcmd):
            return jobcmd, b""
        raise ValueError(
            "The job's jobcmd is no command; start the worker with --command"
            " to say what is to be done with it."
        )

    def judge(self, command, status):
        """Return what to report of a command that has ended."""
        job = command.job
        if command.killed and status != 124:
            return "release", {}
        report = {"exit_code": status, "stderr": tail(command.err)}
        if status:
            report["error"] = "exit status %d" % status
            return "fail", report
        try:
            report.update(command.brought())
        except ValueError as error:
            report["error"] = "JOBMAN_RESULT can't be used: %s" % error
            return "fail", report
        return "update", dict(report, jobstage=job["jobstage"] + 2)

    def print(self, command):
        """Print what a command has printed, whole; return whether it went.

        When nobody reads any more, the worker ends as by SIGPIPE.
        """
        pairs = (command.out, sys.stdout), (command.err, sys.stderr)
        with self.printing:
            try:
                for kept, stream in pairs:
                    kept.seek(0)
                    shutil.copyfileobj(kept, stream.buffer)
                    stream.flush()
                return True
            except BrokenPipeError:
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream.fileno())
        self.end(128 + signal.SIGPIPE)
        return False

    # Reporting

    def report_on(self):
        """Deliver outcomes, all that have come together in one call."""
        last = False
        while not last:
            outcomes = [self.outcomes.get()]
            with contextlib.suppress(queue.Empty):
                while len(outcomes) < self.MOST_REPORTS:
                    outcomes.append(self.outcomes.get_nowait())
            last = None in outcomes
            outcomes = [outcome for outcome in outcomes if outcome]
            try:
                self.report(outcomes)
            except Unreachable as error:  # only after end()
                self.say("%d results are lost: %s" % (len(outcomes), error))

    def report(self, outcomes):
        """Deliver some outcomes."""
        updates = []
        for job, verb, values in outcomes:
            jobid, claim = job["jobid"], job["claim"]
            if verb == "update":
                updates.append(dict(values, jobid=jobid, claim=claim))
            elif verb == "fail":
                self.deliver(self.reporter.fail_job, jobid, claim, **values)
            else:
                self.deliver(self.reporter.release_job, jobid, claim)
        if updates:
            self.deliver_updates(updates)
        with self.mutex:
            for job, _, _ in outcomes:
                if self.claims.get(job["jobid"]) == job["claim"]:
                    del self.claims[job["jobid"]]

    def deliver_updates(self, updates):
        """Deliver results together, or each alone if they are refused."""
        try:
            for answer in self.reporter.update_jobs(updates):
                if answer["status"] != 200:
                    self.say("Job %(jobid)d: refused, %(status)d." % answer)
        except Refused as refused:
            if len(updates) > 1:
                for update in updates:
                    self.deliver_updates([update])
            else:
                self.deliver(
                    self.reporter.fail_job, updates[0]["jobid"],
                    updates[0]["claim"], error="Its result: %s" % refused,
                )

    def deliver(self, verb, jobid, claim, **values):
        """Make one call; a refusal is only worth a line."""
        try:
            verb(jobid, claim, **values)
        except Refused as refused:
            self.say("Job %d: %s" % (jobid, refused))

    def say(self, line):
        """Write a line to the worker's log, its standard error."""
        with self.printing:
            print(line, file=sys.stderr, flush=True)

    # Heartbeats

    def beat_on(self):
        """Renew all leases four times in a lease's time."""
        while not self.over.wait(self.lease / 4):
            with self.mutex:
                claims = sorted(self.claims.items())
            if claims:
                self.beat(claims)

    def beat(self, claims):
        """Renew `claims`; kill the commands of those that are lost."""
        try:
            answer = self.beater.heartbeat(self.name, self.lease, claims)
        except Trouble as trouble:
            return self.say("No heartbeat: %s" % trouble)
        for jobid, claim in claims:
            if jobid in answer["lost"]:
                threading.Thread(
                    target=self.give_up, args=(jobid, claim), daemon=True
                ).start()

    def give_up(self, jobid, claim):
        """Kill the command of a claim that is lost.

        Not if the job has come back to us, which we may be about to hear.
        """
        self.over.wait(1)
        with self.mutex:
            lost = self.claims.get(jobid) == claim
            command = self.commands.get(jobid) if lost else None
        if command is not None:
            self.say("Job %d: its claim is lost." % jobid)
            command.kill()


# ------------------------------------------------------------------ main ---


def stage_list(text):
    """Read --stage: stages from which a job can move two up."""
    stages = [int(stage) for stage in text.split(",")]
    if not 0 <= min(stages) <= max(stages) <= MAX_STAGE - 2:
        raise ValueError
    return stages


def seconds(text):
    """Read a number of seconds."""
    if not 0 <= float(text) <= 10**9:  # nor NaN
        raise ValueError
    return float(text)


def parse(arguments):
    """Return the command line's options."""
    parser = argparse.ArgumentParser(
        description="Work through the jobs of a jobman server.",
        epilog="example: python3 worker.py --stage 0,2 --slots 4",
    )
    add = parser.add_argument
    add("--stage", default=[0], type=stage_list, metavar="S[,S...]",
        help="stages to claim from, the later ones first (default 0)")
    add("--slots", type=int, metavar="N",
        help="commands side by side (default: the cores we may use)")
    add("--command", metavar="CMD",
        help="run CMD for each job, the job as JSON on its standard input")
    add("--idle-timeout", type=seconds, default=60, metavar="SECONDS",
        help="end after so long with nothing to do (default 60)")
    add("--lease", type=seconds, default=120, metavar="SECONDS",
        help="a job goes to others when its worker is silent so long")
    add("--access", metavar="FILE",
        help="the server's access file (default ~/.jobman/access.json)")
    add("--name", help="what this worker is called (default HOST-PID)")
    add("--until-eof", action="store_true",
        help="end when standard input ends")
    options = parser.parse_args(arguments)
    if options.slots is None:
        options.slots = len(os.sched_getaffinity(0))
    if options.slots < 1 or options.lease == 0:
        parser.error("--slots and --lease must be more than 0")
    return options


def end_on_signals(worker):
    """End `worker` on SIGINT, SIGTERM, and SIGHUP unless under nohup."""

    def end(number, _):
        status = (128 + number,)  # in a thread, for it may wait for locks
        threading.Thread(target=worker.end, args=status).start()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, end)


def end_at_eof(worker):
    """End `worker` when whoever started it is gone."""
    while os.read(sys.stdin.fileno(), 4096):
        pass
    worker.end(0)


def main(arguments=None):
    """Run the command line; return its exit status."""
    options = parse(arguments)
    if sys.stdout is None or sys.stderr is None:  # closed by who started us
        nowhere = open(os.devnull, "w")
        sys.stdout = sys.stdout or nowhere
        sys.stderr = sys.stderr or nowhere
    try:
        worker = Worker(
            options.access, stages=options.stage, slots=options.slots,
            command=options.command, lease=options.lease,
            idle_timeout=options.idle_timeout, name=options.name,
        )
        end_on_signals(worker)
        if options.until_eof:
            threading.Thread(
                target=end_at_eof, args=(worker,), daemon=True
            ).start()
        worker.run()
        return worker.status
    except (Trouble, OSError) as trouble:
        print("worker.py: %s" % trouble, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
