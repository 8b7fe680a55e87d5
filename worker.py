#!/usr/bin/env python3
"""Work through the jobs of a jobman server, on any number of nodes.

    python3 worker.py --stage 0      run the jobs that wait in stage 0

claims jobs, runs each one's command and tells the server what came of it.
As a library this file gives `claim_jobs` and `run`, for programs that do the
work themselves, and `Client`, with a method for every call that the server
answers. It needs Python 3.6 or later and nothing else, and works when copied
alone. The manual is jobman's README.md.
"""

import signal

if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # no import's traceback

import argparse
import atexit
import collections
import contextlib
import errno
import fcntl
import functools
import hashlib
import http.client
import itertools
import json
import mmap
import os
import queue
import random
import re
import resource
import sched
import secrets
import select
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import zlib
from urllib.parse import quote, urlencode, urlsplit

__version__ = "0.1.0"

MAX_STAGE = 1000000
MAX_BODY = 64 * 2**20  # bytes that a server takes in one call
STDERR_KEPT = 4096  # bytes of a command's stderr that go to the server
RESULT_LIMIT = 2**20  # bytes that a command may leave in JOBMAN_RESULT
TEMPFAIL = 75  # EX_TEMPFAIL of sysexits.h: try again, without counting
TIMED_OUT = 124  # the exit status of timeout(1)
QUARANTINED = 3  # exit status of a worker whose node is in doubt
MARGIN = 5  # seconds kept free before the end of an allocation


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


class Impostor(OSError):
    """Say that a server's certificate is not the one it should have."""


# ---------------------------------------------------------------- client ---

PORTS = {"http": 80, "https": 443}


def access_path():
    """Return where the access file is, unless an option says otherwise."""
    default = os.path.join(os.path.expanduser("~"), ".jobman", "access.json")
    return os.environ.get("JOBMAN_ACCESS") or default


def read_access(path):
    """Return (url, jobix, fingerprint) from an access file, or Trouble.

    The fingerprint is None where there is none.
    """
    try:
        with open(path, encoding="utf-8") as file:
            if os.fstat(file.fileno()).st_mode & 0o077:
                raise ValueError("others can read it: chmod 600 it")
            access = json.load(file)
        if not re.match(r"\d+\Z", str(access["jobix"]), re.A):
            raise ValueError("its jobix is no number")
        url, fingerprint = str(access["url"]), access.get("fingerprint")
        return url, int(access["jobix"]), fingerprint
    except FileNotFoundError:
        raise Trouble(
            "There is no access file %s: start a server with `python3"
            " jobman.py serve`, or name its file with --access." % path
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Trouble("Can't read %s: %s." % (path, error)) from None


def backoff():
    """Yield random pauses that grow, up to 10 seconds ("full jitter").

    So a thousand workers don't come back to a server all at once.
    """
    longest = 0.1
    while True:
        yield random.uniform(0, longest)
        longest = min(10, longest * 2)


def read_fingerprint(text, scheme):
    """Return a certificate's SHA-256 as 64 hex digits, None where it's empty.

    Colons and capitals, as openssl prints them, are taken. Raises Trouble
    for anything else, and where it would be of no use.
    """
    if not text:
        return None
    digits = str(text).replace(":", "").lower()
    if not re.match(r"[0-9a-f]{64}\Z", digits):
        raise Trouble("The server's fingerprint is not a SHA-256.")
    if scheme != "https":
        raise Trouble("A server with a fingerprint must be at https://...")
    return digits


def tls_context(fingerprint):
    """Return an SSLContext that trusts what CAs say.

    With a fingerprint it trusts all, and the caller looks at that. Python
    may have been built without ssl, so nothing but https needs it.
    """
    try:
        import ssl
    except ImportError:
        raise Trouble(
            "This Python has no ssl module, so it can't speak https."
        ) from None
    if not fingerprint:
        context = ssl.create_default_context()
    else:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    if hasattr(context, "minimum_version"):
        context.minimum_version = ssl.TLSVersion.TLSv1_2
    else:  # Python 3.6
        context.options |= ssl.OP_NO_TLSv1 | ssl.OP_NO_TLSv1_1
    return context


def shake_hands(sock, fingerprint):
    """Let an SSLSocket find out who is there; raise Impostor, OSError.

    Nothing may be sent before.
    """
    try:
        sock.do_handshake()
    except (OSError, ValueError) as error:  # ValueError: Python 3.6
        reason = getattr(error, "reason", None)
        vouched = reason != "CERTIFICATE_VERIFY_FAILED"
        if vouched and not isinstance(error, ValueError):
            raise
        reason = "its certificate can't be trusted (%s)" % error
        raise Impostor(reason) from None
    if fingerprint:
        shown = hashlib.sha256(sock.getpeercert(binary_form=True)).hexdigest()
        if shown != fingerprint:
            raise Impostor("its fingerprint is %s" % shown)


def halves(pairs, size):
    """Yield the JSON of an object, in halves where it is over `size` long."""
    text = json.dumps(dict(pairs))
    middle = len(pairs) // 2
    if len(text) <= size or not middle:
        yield text
    else:
        yield from halves(pairs[:middle], size)
        yield from halves(pairs[middle:], size)


def parts(pairs, most, size):
    """Yield the JSON of objects that have, one after another, all `pairs`.

    Each has up to `most` of them, and up to `size` characters where it has
    more than one. There is at least one object.
    """
    left = iter(pairs)
    part = list(itertools.islice(left, most))
    yield from halves(part, size)
    for first in left:
        yield from halves([first, *itertools.islice(left, most - 1)], size)


def path_of(*parts):
    """Return the path of a call: its verb, then its arguments but None."""
    return "".join("/" + quote(str(part), safe=",")
                   for part in parts if part is not None)


class Client:
    """Speak to a server: one method for each of its calls.

    `access` names the access file (default: $JOBMAN_ACCESS, else
    ~/.jobman/access.json); `url` and `jobix` (or $JOBMAN_URL and
    $JOBMAN_JOBIX) do without one; a `jobix` alone replaces the file's. An
    https server is known by the SHA-256 of
    its certificate, which the access file has, or `fingerprint` (or
    $JOBMAN_FINGERPRINT); without one CAs and its host's name vouch for it.
    One connection is kept open; threads take turns on it. What is safe to
    repeat is repeated for up to `patience` seconds (None: for ever) when the
    server can't be reached, with growing, random pauses; the access file is
    read again each time, for the server may have moved. Every method raises
    Refused when the server says no, and Unreachable when it can't be
    reached.
    """

    CONNECT_TIMEOUT = 10  # seconds
    TIMEOUT = 60  # seconds without a byte before a connection is given up
    SWEEP_TIMEOUT = 3600  # for a call that may be about millions of jobs
    LATE = 5  # seconds for which a call tries until it tells of that
    SETTLE = 1  # seconds until a server that starts has its access file
    PART = 2000  # jobs in one call of many
    PART_SIZE = 2**20  # characters of them

    def __init__(
        self, access=None, *, url=None, jobix=None, fingerprint=None,
        patience=60
    ):
        self.access = access or access_path()
        if access is None and url is None:
            url = os.environ.get("JOBMAN_URL")
            jobix = os.environ.get("JOBMAN_JOBIX", jobix)
            fingerprint = os.environ.get("JOBMAN_FINGERPRINT")
        known = re.match(r"\d{1,19}\Z", str(jobix), re.A)
        if not known and url is not None:
            raise Trouble("A url needs a jobix too ($JOBMAN_JOBIX), a number.")
        if not known and jobix is not None:
            raise Trouble("A jobix ($JOBMAN_JOBIX) must be a number.")
        self.own_jobix = int(jobix) if known else None
        self.fixed = url and (url, self.own_jobix, fingerprint)
        self.patience = patience
        self.tell = None  # called with what holds up a call, once for each
        self.mutex = threading.Lock()  # guards the connection
        self.connection = None
        self.sent = False  # whether a call has gone out on it
        self.met = False  # whether our server has ever been at the address
        self.aborted = threading.Event()
        self.jobix = None
        self.locate()

    def locate(self):
        """Find out where the server is, and with what jobix to come.

        Once found, the jobix stays the same: another has other jobs.
        """
        url, jobix, fingerprint = self.fixed or read_access(self.access)
        if self.own_jobix is not None:
            jobix = self.own_jobix
        try:
            parts = urlsplit(url)
            address = parts.hostname, parts.port or PORTS.get(parts.scheme)
            (parts.hostname or "").encode("idna")
            parts.path.encode("ascii")
        except ValueError:
            parts = None
        if parts is None or parts.scheme not in PORTS or not parts.hostname:
            raise Trouble(
                "The server's address %r is neither http://... nor https://..."
                % url)
        fingerprint = read_fingerprint(fingerprint, parts.scheme)
        if self.jobix not in (None, jobix):
            raise Trouble("The access file is another server's now.")
        tls = tls_context(fingerprint) if parts.scheme == "https" else None
        self.jobix, self.address = jobix, address
        self.tls, self.fingerprint = tls, fingerprint
        self.prefix = parts.path.rstrip("/")

    # The calls, in the order of the server's route table

    def health(self):
        """Return the server's health, a dict; raise Refused when it is ill."""
        return self.call("GET", "/health")

    def init(self, *minutes):
        """Set the lifetimes of stages 0 … n where there are none yet.

        Returns {stage: minutes} in force; without arguments only that.
        """
        found = self.call("GET", path_of("init", *minutes))
        return {int(stage): value for stage, value in found.items()}

    def lifetime(self, stage, minutes=None):
        """Return the lifetime of a stage in minutes, or set it."""
        return self.call("GET", path_of("lifetime", stage, minutes))

    def stages(self, changes=None):
        """Return {stage: {"name"?, "minutes"?}} in force; change some before.

        `changes` is of the same kind; None takes a value away. The name of a
        stage may stand for its number, as in all other calls.
        """
        if changes is None:
            found = self.call("GET", "/stages")
        else:
            found = self.call("POST", "/stages", changes)
        return {int(stage): values for stage, values in found.items()}

    def set(self, jobs):
        """Add `jobs`: {jobid: {"jobstage": int, "jobcmd": any JSON, …}}.

        Or an iterable of such pairs. Many go in several calls, one after
        another, so that others' calls come between. After an error some may
        be in: the whole again adds none twice.
        """
        pairs = jobs.items() if hasattr(jobs, "items") else jobs
        for text in parts(pairs, self.PART, self.PART_SIZE):
            answer = self.call("POST", "/set", text=text)
        return answer

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
        listed = [stage] if isinstance(stage, (int, str)) else stage
        path = path_of("get", ",".join(map(str, listed)), nextstage)
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
        path = path_of("update_job", jobid, stage)
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

        `about` the worker: `host`, `stages` (a list), `slots`, `busy`,
        `done`, `failed`, `quarantine` (why it takes no more work), `ended`
        (True). Returns {"lost": [jobid, …], "drain": bool}.
        """
        beat = dict(about, worker=worker, lease=lease, claims=claims)
        return self.call("POST", "/heartbeat", beat)

    def check_stages(self, old=None, new=None):
        """Flag the expired jobs; move those of stage `old` to `new`."""
        if old is None:
            return self.call("GET", "/check_stages")
        path = path_of("check_stages", old, new)
        return self.call("GET", path, repeat=False)

    def retry(self, **selector):
        """Let ended jobs run again; return how many.

        `selector`: `ids`, or `stage` and `state`, or `all=True`.
        """
        return self.sweep("/retry", selector)["retried"]

    def cancel(self, **selector):
        """Cancel jobs that aren't done; return how many; as retry."""
        return self.sweep("/cancel", selector)["cancelled"]

    def release(self, **selector):
        """Take jobs from who works on them, unharmed; return how many."""
        return self.sweep("/release", selector)["released"]

    def forget(self, **selector):
        """Delete done jobs; return how many; as retry."""
        return self.sweep("/forget", selector)["forgotten"]

    def pause(self, stage):
        """Let nothing be handed out of a stage."""
        return self.call("POST", path_of("pause", stage), {})

    def resume(self, stage):
        """Let jobs of a paused stage be handed out again."""
        return self.call("POST", path_of("resume", stage), {})

    def drain(self, worker):
        """Tell a worker, by its name, to claim no more."""
        return self.call("POST", "/drain/" + quote(worker), {})

    def undrain(self, worker):
        """Tell a drained worker to go on."""
        return self.call("POST", "/undrain/" + quote(worker), {})

    def status(self):
        """Return the figures: jobs per stage and state, totals, rate."""
        return self.call("GET", "/status")

    def pace(self, minutes=None):
        """Return how many attempts and jobs became done, as time went.

        Of the last `minutes`, else of all time: {"start", "step" (seconds),
        "updates": [attempts in each step, …], "done": [jobs, …]}.
        """
        return self.call("GET", "/pace", options={"minutes": minutes})

    def workers(self):
        """Return the workers heard of in the last day, the latest first.

        {"time": now, "workers": [{"name", "host", "slots", "heard", …}, …]}
        """
        return self.call("GET", "/workers")

    def jobs(self, **options):
        """Return a page of jobs: {"jobs": [job, …], "after": place or None}.

        Options: `stage`, `state` (also `expired`), `order` (`id` or `time`),
        `after` (from the page before), `limit`, `attempts` (of each job so
        many, the last). A page may be short and not the last.
        """
        return self.call("GET", "/jobs", options=options)

    def failures(self):
        """Return the latest failed jobs, in groups of one reason each.

        {"failed": jobs, "looked_at": jobs, "groups": [{"stage", "exit_code",
        "message", "host", "jobs", "ids"}, …]}
        """
        return self.call("GET", "/failures")

    def stats(self):
        """Return what time attempts have taken: see GET /stats in README."""
        return self.call("GET", "/stats")

    def metrics(self):
        """Return the figures of all jobix together, a text for Prometheus."""
        return self.call("GET", "/metrics")

    def job(self, jobid):
        """Return all that the server knows of a job, and its attempts."""
        return self.call("GET", "/job/%d" % jobid)

    # How a call is made

    def call(
        self, method, path, value=None, *,
        text=None, options=None, repeat=True, timeout=TIMEOUT
    ):
        """Make a call; return its answer: a JSON value, or text.

        It sends `value`, or the JSON `text`.
        """
        given = {k: v for k, v in (options or {}).items() if v is not None}
        if given:
            path += "?" + urlencode(given)
        if value is not None:
            text = json.dumps(value)
        body = None
        if text is not None:
            body = zlib.compress(text.encode("ascii"), 1)
            if len(body) > MAX_BODY:
                raise Refused(413, "That is too much for one call.")
        with self.mutex:
            status, answer = self.persist(method, path, body, repeat, timeout)
        if status != 200:
            known = isinstance(answer, dict) and answer.get("error")
            raise Refused(status, known or "The server said %d." % status)
        return answer

    def persist(self, method, path, body, repeat, timeout):
        """Make a call, again and again while that is safe and may help."""
        began = time.monotonic()
        told = self.tell is None
        for pause in backoff():
            try:
                answer = self.exchange(method, path, body, timeout)
                if answer[0] < 500:
                    return answer
                error = "The server can't answer now (%d)." % answer[0]
                if answer[0] != 503 and not repeat:  # of whom, we can't know
                    raise Unreachable(error)
            except (OSError, http.client.HTTPException) as lost:
                sent = self.close()
                error = "The server at %s:%d can't be reached (%s)." % (
                    *self.address, lost or type(lost).__name__
                )
                stranger = isinstance(lost, Impostor)
                if stranger:
                    error = "At %s:%d is another server than ours: %s." % (
                        *self.address, lost
                    )
                with contextlib.suppress(Trouble):  # it may be in the writing
                    self.locate()
                if sent and not repeat:
                    raise Unreachable(error) from None
                new = time.monotonic() < began + self.SETTLE
                if stranger and not (self.met or new):
                    raise Trouble(error) from None  # ours was never there
            took = time.monotonic() - began
            late = self.patience is not None and took >= self.patience
            if took >= self.LATE and not (late or told):
                told = True
                self.tell("%s It is waited for." % error)
            if late or self.aborted.wait(pause):
                raise Unreachable(error)

    def sweep(self, path, selector):
        """Make a call that may be about millions of jobs."""
        return self.call("POST", path, selector, timeout=self.SWEEP_TIMEOUT)

    def exchange(self, method, path, body, timeout):
        """Make a call once; return (status, answer)."""
        if not self.aborted.is_set():
            self.connect(timeout)
        headers = {"jobix": str(self.jobix)}
        if body is not None:
            headers["Content-Encoding"] = "deflate"
            headers["Content-Type"] = "application/json"
        if self.aborted.is_set():
            raise OSError("broken off")
        self.sent = True
        self.connection.request(method, self.prefix + path, body, headers)
        response = self.connection.getresponse()
        text = response.read().decode("utf-8", "replace")
        if response.will_close:
            self.close()
        kind = response.getheader("Content-Type", "")
        if kind.startswith("application/json"):
            with contextlib.suppress(ValueError):
                return response.status, json.loads(text)
        elif response.status >= 500 or kind.startswith("text/plain"):
            return response.status, text
        raise OSError("what answers there is no jobman server")

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
            self.connection.auto_open = 0  # it would do without TLS
            try:
                self.connection.connect()
                self.secure(self.connection)
            except BaseException:  # nothing may go out on it
                self.close()
                raise
        self.connection.sock.settimeout(timeout)

    def secure(self, connection):
        """Speak TLS on a new connection, where the address says so."""
        if self.tls is not None:
            connection.sock = self.tls.wrap_socket(
                connection.sock, do_handshake_on_connect=False,
                server_hostname=None if self.fingerprint else self.address[0],
            )
            shake_hands(connection.sock, self.fingerprint)
        self.met = True

    def close(self):
        """Close the connection; return whether a call was sent on it."""
        if self.connection is not None:
            self.connection.close()
            self.connection = None
        return self.sent

    def abort(self, how=socket.SHUT_WR):
        """Break off the call on its way, from another thread; no more.

        What the server is answering still arrives, and it sees that it
        shouldn't hand out jobs any more; SHUT_RDWR ends that too.
        """
        self.aborted.set()
        with contextlib.suppress(OSError, AttributeError, TypeError):
            # beneath TLS, whose own shutdown would end the reading too
            socket.socket.shutdown(self.connection.sock, how)


# ----------------------------------------------------------------- files ---


def to_bytes(text):
    """Return the bytes that `text` stands for, whatever the locale.

    Bytes that aren't UTF-8 travel as lone surrogates (PEP 383).
    """
    return text.encode("utf-8", "surrogateescape")


def is_file(path):
    """Return whether there is such a file; raise ValueError if none can be."""
    try:
        return stat.S_ISREG(os.stat(to_bytes(path)).st_mode)
    except OSError:
        return False


def describe(path):
    """Return a file as it is now: {"path", "size" (bytes), "sha256" (hex)}.

    Raises OSError when it can't be read, ValueError when it is no file.
    """
    digest, size = hashlib.sha256(), 0
    if not stat.S_ISREG(os.stat(to_bytes(path)).st_mode):
        raise ValueError("%s is no file" % path)
    with open(to_bytes(path), "rb", buffering=0) as file:
        for block in iter(lambda: file.read(2**20), b""):
            digest.update(block)
            size += len(block)
    return {"path": path, "size": size, "sha256": digest.hexdigest()}


def intact(file):
    """Return whether a file is still as describe() saw it."""
    try:
        size = os.stat(to_bytes(file["path"])).st_size
        return size == file["size"] and describe(file["path"]) == file
    except (OSError, ValueError):
        return False


def await_files(files, lag, ending):
    """Return those of `files` that aren't intact `lag` seconds from now.

    A shared file system may show late what another node has written. Breaks
    off when the Event `ending` is set.
    """
    end = time.monotonic() + lag
    while True:
        files = [file for file in files if not intact(file)]
        if not files or time.monotonic() >= end or ending.wait(0.2):
            return files


def touched(path):
    """Return what changes when a file is written, None when it is gone."""
    try:
        found = os.stat(to_bytes(path))
    except (OSError, ValueError):
        return None
    return found.st_size, found.st_mtime_ns, found.st_ino


def output_paths(job, brought):
    """Return the paths, absolute, of the files that an attempt has made.

    Those that its result names, else those that the job says; and the file
    that it hands on, if that is there. Raises OSError when we are in no
    folder, ValueError for a name that no file can have.
    """
    names = brought.get("outputs")
    if names is None:
        names = job.get("outputs") or ()
    filename = brought.get("filename")
    if not names and not filename:
        return []
    here = os.getcwdb().decode("utf-8", "surrogateescape")
    folder = os.path.join(here, job.get("cwd") or "")
    paths = [os.path.join(folder, name) for name in names]
    handed_on = os.path.join(folder, filename or "")
    if filename and is_file(handed_on):
        paths.append(handed_on)
    return list(dict.fromkeys(paths))


def results(job, brought, paths, inputs):
    """Return what an update says of an attempt's results.

    Files that it was given and left alone stand for themselves: only others
    are read. Raises OSError or ValueError when one of `paths` is missing.
    """
    values = {k: v for k, v in brought.items() if k != "outputs"}
    if paths:
        values["files"] = [describe(path) for path in paths]
    elif job.get("files"):
        seen = {file["path"]: touched(file["path"]) for file in job["files"]}
        if seen != inputs:
            values["files"] = []
    return values


def disk_full(*folders):
    """Return the first of `folders` that has no room left, None if none."""
    for folder in folders:
        with contextlib.suppress(OSError, ValueError):
            found = os.statvfs(to_bytes(folder))
            if found.f_blocks and found.f_bavail * found.f_frsize < 2**16:
                return folder
    return None


# -------------------------------------------------------------- log, spool ---


@functools.lru_cache()
def namespace(jobix):
    """Return a name for a jobix in files, from which nobody learns it."""
    return hashlib.sha256(b"jobman %d" % int(jobix)).hexdigest()[:12]


def is_ours(owner, folder):
    """Return whether a user id is root's, or the one of our files in a folder.

    A network file system may map our id to another.
    """
    if owner in (os.geteuid(), 0):
        return True
    with contextlib.suppress(OSError):
        with tempfile.TemporaryFile(dir=folder) as probe:
            return os.fstat(probe.fileno()).st_uid == owner
    return False


def check_folder(folder):
    """Raise OSError if a folder exists and others can write in it.

    Results that they put there would be taken for ours.
    """
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        status = os.stat(folder)
        if status.st_mode & 0o022 or not is_ours(status.st_uid, folder):
            raise OSError(
                "The folder %s can be written by other users: keep jobman's"
                " files in a folder of your own (mkdir -m 700 FOLDER)."
                % folder)


def append_to(path):
    """Return a descriptor that writes at the end of a file, for us alone."""
    folder = os.path.dirname(path)
    os.makedirs(folder, mode=0o700, exist_ok=True)
    check_folder(folder)
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)


def write(fd, data):
    """Write all of `data`."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


class OutputLog:
    """Keep what the commands of a worker print: all in one file, PATH.out.

    PATH.index says where what is, a line for each piece: `jobid stage
    attempt began stream offset length`, `began` in milliseconds since 1970,
    stream 1 or 2, offset and length in bytes.
    """

    def __init__(self, path):
        check_folder(os.path.dirname(path))
        self.path = path
        self.fds = None
        self.pieces = []  # not written yet: [key, stream, data]

    def add(self, key, stream, data):
        """Keep a piece of output; `key` has the index line's first four."""
        if self.pieces and self.pieces[-1][:2] == [key, stream]:
            self.pieces[-1][2] += data
        else:
            self.pieces.append([key, stream, data])

    def flush(self):
        """Write what has come; raise OSError, and drop it, if that fails."""
        if not self.pieces:
            return
        pieces, self.pieces = self.pieces, []
        if self.fds is None:
            output = append_to(self.path + ".out")
            self.fds = output, append_to(self.path + ".index")
        lines, at = [], os.fstat(self.fds[0]).st_size
        for key, stream, data in pieces:
            lines.append(b"%s %d %d %d\n" % (key, stream, at, len(data)))
            at += len(data)
        for fd, parts in zip(self.fds, ([p[2] for p in pieces], lines)):
            write(fd, b"".join(parts))


class LoggedOutput:
    """What one command prints, on its way to the log: up to a limit."""

    def __init__(self, log, key, limit):
        self.log = log
        self.key = key
        self.room = limit
        self.cut = 0
        self.tail = b""

    def take(self, stream, data):
        """Keep `data`, which has come from stream 1 or 2."""
        if stream == 2:
            self.tail = (self.tail + data)[-STDERR_KEPT:]
        kept = data[: self.room]
        self.room -= len(kept)
        self.cut += len(data) - len(kept)
        if kept:
            self.log.add(self.key, stream, kept)

    def end(self):
        """Say what was cut."""
        if self.cut:
            note = "\n[worker.py cut %d bytes here: --log-limit]\n" % self.cut
            self.log.add(self.key, 2, note.encode("ascii"))


class PrintedOutput:
    """What one command prints, held until it can be printed as a whole."""

    def __init__(self):
        self.files = [tempfile.SpooledTemporaryFile(2**20) for _ in "12"]
        self.tail = b""

    def take(self, stream, data):
        """Keep `data`, which has come from stream 1 or 2."""
        if stream == 2:
            self.tail = (self.tail + data)[-STDERR_KEPT:]
        self.files[stream - 1].write(data)

    def end(self):
        """Nothing is ever cut."""

    def print(self):
        """Print it; raise BrokenPipeError when nobody reads any more."""
        for kept, stream in zip(self.files, (sys.stdout, sys.stderr)):
            with kept:
                kept.seek(0)
                shutil.copyfileobj(kept, stream.buffer)
            stream.flush()


# A claim's attempt has ended: `verb` is update, fail, release or reject, and
# `values` go with it.
Outcome = collections.namedtuple("Outcome", "space jobid claim verb values")


def read_outcomes(lines):
    """Yield the outcomes in lines of a spool file, those that are any."""
    for line in lines:
        with contextlib.suppress(ValueError, TypeError):
            outcome = Outcome(**json.loads(line.decode("ascii")))
            if outcome.claim:  # as workers write it
                yield outcome


class Spool:
    """Keep on disk what can't be delivered: PATH, a line for each outcome.

    Its owner has a `flock` on it. Where locks don't work two may deliver the
    same: the server takes each outcome once.
    """

    SUFFIX = ".spool"

    def __init__(self, folder, name):
        check_folder(folder)
        self.folder = folder
        self.path = os.path.join(folder, name + self.SUFFIX)
        self.fd = None
        self.adopted = []  # (path, descriptor, bytes of outcomes for us)

    def add(self, outcomes):
        """Write outcomes to disk; raise OSError if that fails."""
        if not outcomes:
            return
        lines = [json.dumps(outcome._asdict()) + "\n" for outcome in outcomes]
        if self.fd is None:
            new = self.path + ".new"  # nobody takes it over before the lock
            self.fd = append_to(new)
            self.lock(self.fd)
            os.rename(new, self.path)
        size = os.fstat(self.fd).st_size
        try:
            write(self.fd, "".join(lines).encode("ascii"))
            os.fsync(self.fd)
        except OSError:
            os.ftruncate(self.fd, size)  # or a torn line spoils the next
            raise

    def lock(self, fd):
        """Lock a spool file; return whether it has an owner that lives."""
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:
            pass  # no locks here
        return True

    def adopt(self, space):
        """Return the outcomes that workers which have ended left behind."""
        found, names = [], []
        with contextlib.suppress(OSError):
            check_folder(self.folder)
            names = sorted(os.listdir(self.folder))
        for name in names:
            path = os.path.join(self.folder, name)
            if name.endswith(self.SUFFIX) and path != self.path:
                with contextlib.suppress(OSError):  # gone, or not ours
                    found += self.take_over(path, space)
        return found

    def take_over(self, path, space):
        """Return the outcomes in a spool file that has no owner."""
        fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_NOFOLLOW)
        regular = stat.S_ISREG(os.fstat(fd).st_mode)
        if not (regular and self.lock(fd) and os.fstat(fd).st_nlink):
            os.close(fd)
            return []
        with open(fd, "rb", closefd=False) as file:
            text = file.read()
        size, lines = len(text), text.split(b"\n")[:-1]  # the rest is torn
        ours = [each for each in read_outcomes(lines) if each.space == space]
        whole = len(ours) == len(lines)  # else somebody may know the others
        self.adopted.append((path, fd, size if whole else -1))
        return ours

    def clear(self):
        """Remove what has been delivered."""
        if self.fd is not None:
            own = os.fstat(self.fd).st_size
            self.adopted.append((self.path, self.fd, own))
            self.fd = None
        for path, fd, size in self.adopted:
            if os.fstat(fd).st_size == size:  # without locks it may grow
                with contextlib.suppress(OSError):
                    os.unlink(path)
                    os.rmdir(self.folder)  # if it is empty
            os.close(fd)
        self.adopted = []


# ---------------------------------------------------------------- claims ---


def check_access(refused):
    """Raise Unreachable where no outcome was judged: what we have waits."""
    if refused.status not in (400, 404, 409, 413):
        raise Unreachable(str(refused))


def deliver_one(client, outcome, say):
    """Deliver an outcome by a call of its own."""
    verb = getattr(client, outcome.verb + "_job")
    try:
        verb(outcome.jobid, claim=outcome.claim, **outcome.values)
    except Refused as refused:
        check_access(refused)
        say("Job %d: %s Dropped." % (outcome.jobid, refused))


def deliver_updates(client, updates, say):
    """Deliver updates in one call, or each alone if it is refused."""
    try:
        answers = client.update_jobs(
            [dict(u.values, jobid=u.jobid, claim=u.claim) for u in updates]
        )
    except (Refused, RecursionError) as refused:
        if isinstance(refused, Refused):
            check_access(refused)
        if len(updates) > 1:
            for update in updates:
                deliver_updates(client, [update], say)
        else:
            values = {"error": "Its result: %s" % refused}
            failed = updates[0]._replace(verb="fail", values=values)
            deliver_one(client, failed, say)
        return
    for answer in answers:
        if answer["status"] != 200:
            say("Job %(jobid)d: its result came too late and is dropped"
                " (%(status)d)." % answer)


def is_update(outcome):
    """Return whether an outcome can be told together with others."""
    return outcome.verb == "update"


def deliver(client, outcomes, say):
    """Deliver a list of outcomes, in order; yield each batch when it is told.

    What is told is taken from the list. What the server refuses is worth a
    line. Raises Unreachable.
    """
    while outcomes:
        batch = list(itertools.takewhile(is_update, outcomes[:100]))
        if batch:
            deliver_updates(client, batch, say)
        else:
            batch = outcomes[:1]
            deliver_one(client, batch[0], say)
        del outcomes[: len(batch)]
        yield batch


class Claims:
    """The claims of a worker: renewed while they last, told how they ended.

    One thread renews all leases, one delivers outcomes; both take turns on
    the connection of `client`, which has no patience. What can't be
    delivered waits on disk, in `spool`. `about()` gives what a heartbeat
    says of the worker; `lost(jobid, claim)` is called for a lost claim, and
    `drained(whether)` after each heartbeat.
    """

    LINGER = 0.02  # seconds in which outcomes gather for one call
    LAST = 5  # seconds that the end may take when the server is away

    def __init__(
        self, client, spool, name, lease, *, about, lost, drained, say
    ):
        self.client = client
        self.spool = spool
        self.name = name
        self.lease = lease
        self.about = about
        self.lost = lost
        self.drained = drained
        self.say = say
        self.news = threading.Condition()  # guards the next five
        self.held = {}  # jobid: newest token, until its outcome is told
        self.fresh = []  # outcomes that have just come
        self.unsafe = 0  # outcomes that are neither told nor on disk
        self.closing = None  # when to give up, in monotonic seconds
        self.back = True  # the server, since we last looked for what was left
        self.waiting = []  # outcomes, in order; the reporting thread's own
        self.spooled = 0  # how many of these are on disk
        self.away = False  # the server, as far as reports know
        self.missed = False  # it, as far as heartbeats know
        self.said = False  # so, of an idle worker
        self.retry = 0  # when to try it again
        self.pauses = backoff()
        self.over = False
        self.due = threading.Event()
        self.threads = [
            threading.Thread(target=work, daemon=True)
            for work in (self.report_on, self.beat_on)
        ]
        for thread in self.threads:
            thread.start()

    def hold(self, job):
        """Renew the lease of a claimed job from now on."""
        with self.news:
            self.held[job["jobid"]] = job["claim"]

    def holds(self, jobid, claim):
        """Return whether a claim is held, and is the newest of its job."""
        with self.news:
            return self.held.get(jobid) == claim

    def forget(self, jobid, claim):
        """Renew a claim no more."""
        with self.news:
            if self.held.get(jobid) == claim:
                del self.held[jobid]

    def settle(self, job, verb, **values):
        """Tell the server, soon, how the attempt at a job has ended."""
        space = namespace(job["jobix"])
        outcome = Outcome(space, job["jobid"], job["claim"], verb, values)
        with self.news:
            self.fresh.append(outcome)
            self.unsafe += 1
            self.news.notify_all()

    def wait(self):
        """Return when all outcomes are told, or at least on disk."""
        with self.news:
            self.news.wait_for(lambda: not self.unsafe)

    def close(self, **about):
        """Deliver what there is, or leave it on disk; beat a last time."""
        with self.news:
            self.closing = time.monotonic() + self.LAST
            self.retry = 0
            self.news.notify_all()
        self.threads[0].join(self.LAST + 1)
        if self.threads[0].is_alive():  # the server doesn't answer
            self.client.abort(socket.SHUT_RDWR)
            self.threads[0].join()
        self.over = True
        self.beat_soon()
        self.threads[1].join()
        self.beat(**about)
        self.client.close()

    # Reports

    def report_on(self):
        """Deliver outcomes until close(), first what other workers left."""
        while not self.finished():
            self.gather()
            if time.monotonic() >= self.retry:
                self.try_server()
            if len(self.waiting) > self.spooled:
                self.keep()

    def finished(self):
        """Return whether all is told, or there is no more time for it."""
        with self.news:
            if self.closing is None or self.fresh:
                return False
        return not self.waiting or time.monotonic() >= self.closing

    def gather(self):
        """Wait for outcomes, for the time to try again, or for close()."""
        with self.news:
            if self.away:
                end = min(self.retry, self.closing or self.retry)
                self.news.wait_for(
                    lambda: self.fresh or not self.retry,
                    max(0, end - time.monotonic()),
                )
            elif not self.waiting:
                self.news.wait_for(
                    lambda: self.fresh or self.back or self.closing)
        if self.closing is None:
            time.sleep(self.LINGER)
        with self.news:
            self.waiting += self.fresh
            self.fresh = []
            back, self.back = self.back, False
        if back:
            self.adopt()

    def adopt(self):
        """Take over the spool of workers that have ended."""
        found = self.spool.adopt(namespace(self.client.jobix))
        self.waiting[:0] = found
        self.spooled += len(found)

    def try_server(self):
        """Deliver what waits; say when the server goes and when it is back."""
        try:
            for batch in deliver(self.client, self.waiting, self.say):
                self.told(batch)
        except Exception as error:  # also an answer of somebody else
            if not self.away:
                self.say("%s Results wait on disk." % (error or repr(error)))
            self.away = True
            self.retry = time.monotonic() + next(self.pauses)
            return
        self.spool.clear()
        if self.away:
            self.say("The server is back.")
            self.away, self.retry, self.pauses = False, 0, backoff()
            self.look_again()

    def look_again(self):
        """Look for what workers left while the server was away."""
        with self.news:
            self.back = True
            self.news.notify_all()

    def told(self, batch):
        """Forget the claims of outcomes that have been delivered."""
        for each in batch:
            self.forget(each.jobid, each.claim)
        self.safe(max(0, len(batch) - self.spooled))
        self.spooled = max(0, self.spooled - len(batch))

    def keep(self):
        """Put on disk what waits and isn't there yet."""
        fresh = self.waiting[self.spooled :]
        try:
            self.spool.add(fresh)
        except OSError as error:
            return self.say("%s can't be written: %s" % (
                self.spool.path, error.strerror or error))
        self.spooled = len(self.waiting)
        self.safe(len(fresh))

    def safe(self, n):
        """Note that `n` more outcomes are told or on disk."""
        with self.news:
            self.unsafe -= n
            self.news.notify_all()

    # Heartbeats

    def beat_on(self):
        """Renew all leases four times in a lease's time."""
        while not self.over:
            self.beat()
            self.due.wait(self.lease / 4)
            self.due.clear()

    def beat_soon(self):
        """Beat at once: there is news of the worker."""
        self.due.set()

    def beat(self, **about):
        """Renew all leases; tell which claims are lost, if it is drained."""
        with self.news:
            claims = sorted(self.held.items())
        about = dict(self.about(), **about)
        try:
            answer = self.client.heartbeat(
                self.name, self.lease, claims, **about
            )
            lost, drained = set(answer["lost"]), bool(answer.get("drain"))
        except Unreachable as error:
            if not (claims or self.missed or self.away or self.over):
                self.said = True  # no result will say it
                self.say("%s It is waited for." % error)
            self.missed = True
            return
        except Exception as error:  # also an answer of somebody else
            return self.say("No heartbeat: %s" % (error or repr(error)))
        if self.said:
            self.said = False
            self.say("The server is back.")
        if self.missed:
            self.missed = False
            self.look_again()
        for jobid, claim in claims:
            if jobid in lost:
                self.lost(jobid, claim)
        if not self.over:  # the last beat, of a worker that is forgotten
            self.drained(drained)


# ----------------------------------------------------------------- guard ---

ENDING_SIGNALS = (
    signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1,
)
FATAL = [128 + number for number in ENDING_SIGNALS]  # exit statuses


def marked(mark):
    """Yield the processes of ours that have `mark` in their environment."""
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) != os.getpid():
            with contextlib.suppress(OSError):
                with open("/proc/%s/environ" % name, "rb") as file:
                    if mark in file.read():
                        yield int(name)


def kill_group(group, number=signal.SIGKILL):
    """Send a signal to a process group; return whether there was any."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # it has changed its user
    return True


def group_lives(group):
    """Return whether a process of a group runs; a zombie doesn't.

    One that nobody waits for stays: as in a container with no real init.
    """
    if not kill_group(group, 0):
        return False
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError):
                with open("/proc/%s/stat" % name, "rb") as file:
                    state, _, its = file.read().rpartition(b")")[2].split()[:3]
                if int(its) == group and state not in b"ZX":
                    return True
    return False


def watch_over(pipe, groups, folder):
    """Kill what a worker leaves running, and remove its `folder`.

    The pipe's end of file is the worker's end; a byte before says that it
    was a good one. A command that the worker had just begun is found by the
    folder, which is in its environment.
    """
    if os.read(pipe, 1):
        return
    for group in groups:
        if group:
            kill_group(group)
    for _ in range(10):
        for process in marked(os.fsencode(folder)):
            with contextlib.suppress(OSError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.05)
    shutil.rmtree(folder, ignore_errors=True)


class Guard:
    """A small process that kills what is left when its worker is gone.

    It shares `groups` with the worker, a number of a process group for each
    slot, 0 for none: a word for each command through a pipe would wake it
    each time. It is made before any thread, by a fork, and also shares the
    worker's memory so far.
    """

    def __init__(self, folder, slots):
        self.shared = mmap.mmap(-1, 8 * slots)
        self.groups = memoryview(self.shared).cast("q")
        reader, self.pipe = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                self.detach(reader)
                watch_over(reader, self.groups, folder)
            finally:
                os._exit(0)
        os.close(reader)

    def detach(self, reader):
        """Let go, in the guard, of the worker's session, signals and files."""
        os.setsid()
        for number in ENDING_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        for name in os.listdir("/proc/self/fd"):
            if int(name) not in (0, 1, 2, reader):
                with contextlib.suppress(OSError):
                    os.close(int(name))

    def close(self):
        """Let the guard end: nothing is left for it to do."""
        with contextlib.suppress(BrokenPipeError):
            os.write(self.pipe, b".")
        os.close(self.pipe)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, 0)


# --------------------------------------------------------------- command ---


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
    keys = {"filename", "jobcmd", "outputs"}
    if not isinstance(result, dict) or set(result) - keys:
        raise ValueError("it is no object with filename, jobcmd and outputs")
    if not isinstance(result.get("filename"), (str, type(None))):
        raise ValueError("its filename is no string")
    outputs = result.get("outputs") or []
    if not isinstance(outputs, list) or {type(o) for o in outputs} - {str}:
        raise ValueError("its outputs are no list of strings")
    return result


def remove(path):
    """Remove what a command left at `path`, if anything."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass
    except OSError:
        shutil.rmtree(path)


def start_process(argv, environment, cwd, files):
    """Start a process in a session, so a group, of its own; return its pid.

    `files` are the descriptors of its standard input, output and error.
    Raises OSError when it can't be started. Where the C library can't do it
    by posix_spawn, subprocess does it, by a fork: dear in a large process.
    """
    if cwd is None and hasattr(os, "posix_spawnp"):
        with contextlib.suppress(NotImplementedError):
            return os.posix_spawnp(
                argv[0], argv, environment,
                file_actions=[
                    (os.POSIX_SPAWN_DUP2, fd, n) for n, fd in enumerate(files)
                ],
                setsid=True,
                setsigdef=(signal.SIGPIPE, signal.SIGXFSZ),
            )
    process = subprocess.Popen(
        argv, env=environment, cwd=cwd, stdin=files[0], stdout=files[1],
        stderr=files[2], start_new_session=True, close_fds=False,
    )
    process.returncode = 0  # the worker waits for all its children itself
    return process.pid


def files_needed(slots):
    """Return how many files a worker with so many slots may have open."""
    return slots * 10 + 100  # four for pipes, five for input and output


def allow_open_files(slots):
    """Raise the soft limit on open files to what `slots` need, if we may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = files_needed(slots)
    if soft != resource.RLIM_INFINITY and soft < needed:
        if hard != resource.RLIM_INFINITY:
            needed = min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


class Slot:
    """A place for one command at a time; its pipes serve one after another.

    The write ends stay open here, so nothing ends when a command does: what
    it has printed is in the pipe by then.
    """

    def __init__(self, folder, number):
        self.number = number
        self.put_results(folder)
        pipes = [os.pipe() for _ in "12"]
        self.readers = [reader for reader, _ in pipes]
        self.writers = [writer for _, writer in pipes]
        for reader in self.readers:
            os.set_blocking(reader, False)
        self.null = os.open(os.devnull, os.O_RDONLY)
        self.input = None
        self.output = None  # of its command, until it is told

    def put_results(self, folder):
        """Choose the folder where commands leave their results."""
        self.result = os.path.join(folder, "result-%d" % self.number)
        self.owner = os.stat(folder).st_uid  # ids may be mapped

    def clear_result(self):
        """Remove the last result; create another folder if ours is gone.

        A job or a cleaner of /tmp may have removed it, and another user may
        have created it anew.
        """
        folder = os.path.dirname(self.result)
        with contextlib.suppress(FileNotFoundError):
            if os.stat(folder).st_uid == self.owner:
                return remove(self.result)
        place, name = os.path.split(folder)
        self.put_results(tempfile.mkdtemp(prefix=name + ".", dir=place))

    def given(self, data):
        """Return a descriptor from which a command can read `data`."""
        self.input = tempfile.TemporaryFile()  # the one before is closed
        self.input.write(data)
        self.input.seek(0)
        return self.input.fileno()

    def read(self, stream):
        """Keep what is in a pipe; return whether there was any."""
        try:
            data = os.read(self.readers[stream - 1], 65536)
        except BlockingIOError:
            return False
        if self.output is not None:  # else a stray of an earlier one wrote it
            self.output.take(stream, data)
        return True

    def drain(self):
        """Read all that the command has printed: a pipe holds 1 MiB at most.

        A stray that has left its group may go on writing for ever.
        """
        for stream in (1, 2):
            for _ in range(16):
                if not self.read(stream):
                    break


class Attempt:
    """One attempt at a job, from its claim until its outcome is told."""

    def __init__(self, job):
        self.job = job
        self.claimed = time.monotonic()
        self.placed = None  # when it got its slot
        self.slot = None
        self.output = None
        self.pid = None  # of its command, also its process group
        self.status = None  # of its command, as a shell gives it
        self.began = self.seconds = None
        self.reason = None  # why it is cut off: timeout, lost or end
        self.last = None  # when what is left of it is killed
        self.over = False
        self.inputs = {}  # path: touched(path), of files that were checked
        self.events = []  # of the scheduler

    def key(self):
        """Return the first columns of its lines in the index of the log."""
        job = self.job
        numbers = job["jobid"], job["jobstage"], job["attempt"]
        return b"%d %d %d %d" % (*numbers, time.time() * 1000)

    def environment(self, base):
        """Return the environment of its command, on top of `base`."""
        job = self.job
        added = {
            "JOBMAN_JOBID": str(job["jobid"]),
            "JOBMAN_STAGE": str(job["jobstage"]),
            "JOBMAN_ATTEMPT": str(job["attempt"]),
            "JOBMAN_FILENAME": job["filename"] or "",
            "JOBMAN_RESULT": self.slot.result,
        }
        environment = dict(base)
        for name, text in added.items():
            environment[name.encode("ascii")] = to_bytes(text)
        return environment

    def start(self, argv, given, base):
        """Start the command; `given` are the bytes for its standard input.

        Raises OSError, or ValueError for words that no command can have.
        """
        argv, cwd = [to_bytes(word) for word in argv], self.job.get("cwd")
        self.slot.clear_result()
        stdin = self.slot.given(given) if given else self.slot.null
        self.began = time.monotonic()
        self.pid = start_process(
            argv, self.environment(base), cwd and to_bytes(cwd),
            (stdin, *self.slot.writers),
        )

    def brought(self):
        """Return what the command left in JOBMAN_RESULT, a dict.

        Raises ValueError when that is no object with the known keys.
        """
        try:
            flags = os.O_RDONLY | os.O_NONBLOCK  # it may be a pipe
            with open(os.open(self.slot.result, flags), "rb") as file:
                found = os.fstat(file.fileno())
                if not stat.S_ISREG(found.st_mode):
                    raise ValueError("it is no file")
                if found.st_uid not in (self.slot.owner, 0):
                    raise ValueError("it is another user's")
                text = file.read(RESULT_LIMIT + 1)
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise ValueError(error.strerror) from None
        if len(text) > RESULT_LIMIT:
            raise ValueError("it is over %d bytes" % RESULT_LIMIT)
        return read_result(text) if text.strip() else {}


# ------------------------------------------------------------ allocation ---


TIME_FORMS = (
    r"(?:(?P<d>\d+)-)?(?P<h>\d+):(?P<m>[0-5]\d):(?P<s>[0-5]\d)",
    r"(?P<d>\d+)-(?P<h>\d+)(?::(?P<m>[0-5]\d))?",
    r"(?:(?P<d>\d+)d)?(?:(?P<h>\d+)h)?(?:(?P<m>\d+)m)?(?:(?P<s>\d+)s)?",
)


def read_span(text):
    """Return the seconds that a time stands for: 1:00:00, 90s, 2h30m.

    Days stand before a hyphen, as Slurm has it. A number alone, or two with
    a colon, would be minutes to one batch system, seconds to the other and
    hours to a person: ValueError.
    """
    matches = [re.fullmatch(form, text, re.ASCII) for form in TIME_FORMS]
    found = next((match.groupdict() for match in matches if match), {})
    days, hours, minutes, rest = (int(found.get(u) or 0) for u in "dhms")
    span = ((days * 24 + hours) * 60 + minutes) * 60 + rest
    if not 0 < span <= 10**9:
        raise ValueError(
            "%r is no time such as 1:00:00, 1-12:00:00, 90s or 2h30m" % text
        )
    return span


def told_by(*command):
    """Return what a command of the batch system prints, "" if it fails."""
    try:
        return subprocess.check_output(
            command, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            universal_newlines=True, timeout=30,
        )
    except (OSError, ValueError, subprocess.SubprocessError):
        return ""


def slurm_left(environment):
    """Return the seconds left in a Slurm allocation, None if unknown."""
    end = environment.get("SLURM_JOB_END_TIME", "")
    if end.isdigit():
        return int(end) - time.time()
    told = told_by("scontrol", "show", "job", environment["SLURM_JOB_ID"])
    found = re.search(r"\bEndTime=(\d+-\d+-\d+T\d+:\d+:\d+)", told)
    if not found:
        return None
    end = time.strptime(found.group(1), "%Y-%m-%dT%H:%M:%S")
    return time.mktime(end) - time.time()


def pbs_left(environment):
    """Return the seconds left in a PBS allocation, None if unknown.

    Torque says `Walltime.Remaining`; PBS Pro says what was asked for, and
    when the job started.
    """
    told = told_by("qstat", "-f", environment["PBS_JOBID"])
    found = re.search(r"Walltime\.Remaining = (\d+)", told)
    if found:
        return int(found.group(1))
    limit = re.search(r"Resource_List\.walltime = (\d+:\d\d:\d\d)", told)
    start = re.search(r"\bstime = \w+ (\w+ +\d+ [\d:]+ \d+)", told)
    if not (limit and start):
        return None
    began = time.strptime(start.group(1), "%b %d %H:%M:%S %Y")
    return time.mktime(began) + read_span(limit.group(1)) - time.time()


def allocation_left(environment):
    """Return the seconds left in the batch job we are in, None if unknown."""
    if "SLURM_JOB_ID" in environment:
        return slurm_left(environment)
    if "PBS_JOBID" in environment:
        return pbs_left(environment)
    return None


# --------------------------------------------------------------- claimer ---


class Doubt:
    """Find out whether it is the node's fault that jobs fail.

    Several different jobs that fail fast here, one after another, raise a
    doubt. The server knows what became of them elsewhere: if others get them
    done the node is bad, if others fail too the jobs are. Where nobody can
    tell in time, as others may be in doubt too or have long jobs, a few more
    are claimed, and those that failed are still looked at.
    """

    ENOUGH = 3  # jobs that fail here in a row and are done elsewhere
    KEPT = 10  # jobs that are looked at
    FAST = 10  # seconds
    HEARD = 120  # seconds for which a silent worker counts as there
    SHORTEST, LONGEST = 5, 60  # seconds of a doubt, twice as long each time

    def __init__(self, client, name, stages):
        self.client = client
        self.name = name
        self.stages = stages
        self.mutex = threading.Lock()  # guards the next two
        self.failed = collections.OrderedDict()  # jobid: stage
        self.fresh = set()  # those that failed since the last doubt
        self.patience = self.SHORTEST

    def note(self, job, failed, seconds):
        """Note how an attempt ended here, and how long it took."""
        if not failed:
            self.clear()
        elif seconds < self.FAST:
            with self.mutex:
                self.fresh.add(job["jobid"])
                self.failed[job["jobid"]] = job["jobstage"]
                while len(self.failed) > self.KEPT:
                    self.failed.popitem(last=False)

    def stands(self):
        """Return whether there is a doubt."""
        with self.mutex:
            return len(self.fresh) >= self.ENOUGH

    def clear(self):
        """Blame the jobs."""
        with self.mutex:
            self.failed.clear()
            self.fresh.clear()
            self.patience = self.SHORTEST

    def adjourn(self):
        """Let a few more fail; look at them all then."""
        with self.mutex:
            self.fresh.clear()
            self.patience = min(self.LONGEST, self.patience * 2)

    def look(self):
        """Ask the server; return how many of the jobs are done elsewhere."""
        done = 0
        if self.alone():  # nobody can tell
            self.clear()
        with self.mutex:
            failed = list(self.failed.items())
        for jobid, stage in failed:
            outcomes = self.elsewhere(jobid, stage)
            if "done" in outcomes:
                done += 1
            elif "failed" in outcomes:
                with self.mutex:
                    self.failed.pop(jobid, None)
                    self.fresh.discard(jobid)
        return done

    def alone(self):
        """Return whether no other good worker claims from our stages."""
        told = self.client.workers()
        return not any(
            other["name"] != self.name and not other["quarantine"]
            and told["time"] - other["heard"] < self.HEARD
            and set(other["stages"] or ()) & set(self.stages)
            for other in told["workers"]
        )

    def elsewhere(self, jobid, stage):
        """Return how attempts of other workers at a job have ended.

        One that was done before it failed here says nothing of the node: its
        command, or what it reads, may have changed.
        """
        outcomes = set()
        for attempt in self.client.job(jobid)["attempts"]:
            if attempt["worker"] == self.name:
                outcomes.discard("done")
            elif attempt["stage"] == stage:
                outcomes.add(attempt["outcome"])
        return outcomes


def numbers_of(client, stages, say):
    """Return the numbers of stages that are given by number or by name.

    Raises Trouble for a name that no stage has.
    """
    if all(isinstance(stage, int) for stage in stages):
        return stages
    client.tell = say  # the server may not be there yet
    named = {values.get("name"): number
             for number, values in client.stages().items()}
    client.tell = None
    for stage in stages:
        if isinstance(stage, str) and stage not in named:
            raise Trouble("No stage has the name %s." % stage)
    return [named.get(stage, stage) for stage in stages]


class Claimer:
    """Claim jobs for a worker, in a thread of its own.

    Each call of want() is answered by a `receive(jobs)`: at once, or when
    there are jobs; None means that there will be none.
    """

    LONGEST_WAIT = 30  # seconds of a long poll
    FRESH = 15  # seconds for which known run times are good

    def __init__(
        self, options, client, name, *, say, busy,
        receive=None, suspect=None, fault=None
    ):
        self.options = options
        self.client = client
        self.name = name
        self.receive = receive
        self.busy = busy
        self.suspect = suspect
        self.fault = fault
        self.say = say
        stages = numbers_of(client, options.stage, say)
        self.stages = sorted(stages, reverse=True)
        self.doubt = Doubt(client, name, self.stages)
        self.trip = 0.01  # seconds that a claim takes
        self.usual = {}  # stage: seconds that most of its commands need
        self.looked = None  # when these were fresh
        self.drained = False  # claim nothing for now
        self.ending = threading.Event()
        self.wanted = queue.Queue()
        self.thread = threading.Thread(target=self.claim_on, daemon=True)

    def start(self):
        """Start the thread."""
        self.thread.start()

    def want(self, n, *, wait):
        """Ask for up to `n` jobs; with `wait` only an end comes empty."""
        self.wanted.put((n, wait))

    def end(self):
        """Claim no more."""
        if not self.ending.is_set():
            self.ending.set()
            self.wanted.put((0, False))
            self.client.abort()

    def heed_drain(self, drained):
        """Claim nothing while the server says so; return if that is new."""
        new = drained != self.drained and not self.ending.is_set()
        if new:
            self.drained = drained
            self.say("Drained: it claims no more for now." if drained
                     else "It claims jobs again.")
        return new

    def claim_on(self):
        """Claim what is wanted until the end."""
        jobs = ()
        while jobs is not None:
            n, wait = self.wanted.get()
            try:
                jobs = self.claim(n, wait)
            except Unreachable:  # only after end()
                jobs = None
            except Exception as error:
                self.say(str(error) or repr(error))
                self.fault()
                jobs = None
            self.receive(jobs)

    def claim(self, n, wait):
        """Return up to `n` jobs; [] if there are none, None to end."""
        busy, least = time.monotonic(), 0  # a poll's least wait, in seconds
        while not self.ending.is_set():
            self.hold_back()
            stages = self.stages_in_time()
            if not stages or self.ending.is_set():
                return None
            left = busy + self.options.idle_timeout - time.monotonic()
            longest = min(self.LONGEST_WAIT, max(left, least)) if wait else 0
            longest = min(longest, self.spare(stages))
            jobs = self.ask(stages, n, round(longest, 3))
            if jobs or not wait:
                return jobs
            now, idle = time.monotonic(), not self.busy()
            if idle and now >= busy + self.options.idle_timeout:
                if self.drained or not self.delayed():
                    # what was delayed may have come free just before that
                    return self.ask(stages, n, 0) or None
                idle = False
            if not idle:
                busy, least = now, 0.2
        return None

    def ask(self, stages, n, wait):
        """Make one call; return its jobs."""
        if self.drained:
            self.ending.wait(min(wait, 1))
            return []
        began = time.monotonic()
        jobs = self.client.get(
            stages, worker=self.name, lease=self.options.lease, n=n, wait=wait
        )
        took = time.monotonic() - began
        if jobs and took < 1:
            self.trip += (took - self.trip) / 4
        if not jobs and took < wait:
            self.ending.wait(random.uniform(0.1, 1))  # too many wait there
        return jobs

    def delayed(self):
        """Return whether a job of our stages waits for its time."""
        return any(
            stage["stage"] in self.stages and stage["states"]["delayed"]
            for stage in self.client.status()["stages"]
        )

    def stages_in_time(self):
        """Return the stages whose commands mostly end before our time does."""
        if self.options.until is None:
            return self.stages
        now = time.monotonic()
        if self.looked is None or now > self.looked + self.FRESH:
            self.looked = now
            self.usual = {
                stage["stage"]: stage["runtime"]["p90"]
                for stage in self.client.status()["stages"]
                if stage.get("runtime")
            }
        left = self.options.until - now
        stages = [s for s in self.stages if self.usual.get(s, 0) <= left]
        if not stages:
            self.say("No job here is known to end in the %s seconds that are"
                     " left." % int(max(0, left)))
        return stages

    def spare(self, stages):
        """Return the seconds after which their jobs won't end in time."""
        if self.options.until is None:
            return self.LONGEST_WAIT
        needed = max(self.usual.get(stage, 0) for stage in stages)
        return max(0, self.options.until - time.monotonic() - needed)

    def hold_back(self):
        """Wait while it is in doubt whether the node is good."""
        end = time.monotonic() + self.doubt.patience
        while self.doubt.stands() and not self.ending.is_set():
            done = self.doubt.look()
            if done >= self.doubt.ENOUGH:
                self.ending.set()
                self.suspect(
                    "%d jobs in a row failed here and were done elsewhere"
                    % done
                )
            elif time.monotonic() > end:
                self.doubt.adjourn()
            elif self.doubt.stands():
                self.ending.wait(1)


# ---------------------------------------------------------------- worker ---

def own_name():
    """Return what a worker is called that isn't given a name."""
    return "%s-%d" % (socket.gethostname(), os.getpid())


def beside(access, folder):
    """Return the path of a folder next to the access file."""
    return os.path.join(os.path.dirname(os.path.abspath(access)), folder)


def file_name(name, jobix):
    """Return a name for a worker's files that no other has had."""
    plain = re.sub(r"[^\w.-]", "_", name, flags=re.A)[:100]
    return "%s.%s.%s" % (plain, namespace(jobix), secrets.token_hex(4))


class Printer:
    """Print what commands have printed, in a thread: the reader may be slow.

    `lost()` is called when nobody reads any more.
    """

    def __init__(self, lost):
        self.lost = lost
        self.queue = queue.Queue()
        self.thread = threading.Thread(target=self.print_on, daemon=True)

    def start(self):
        """Start the thread."""
        self.thread.start()

    def put(self, output, then):
        """Print an output, then call `then(whether it went)`."""
        self.queue.put((output, then))

    def print_on(self):
        """Print for ever."""
        while True:
            output, then = self.queue.get()
            then(self.print(output))

    def print(self, output):
        """Print one output; return whether it went."""
        try:
            output.print()
            return True
        except BrokenPipeError:
            null = os.open(os.devnull, os.O_WRONLY)
            for stream in (sys.stdout, sys.stderr):
                os.dup2(null, stream.fileno())
            self.lost()
        except OSError as error:
            self.lost(error)
        return False


class Worker:
    """Run the commands of jobs side by side, in slots.

    All that happens to an attempt happens in one loop, in the thread that
    calls run(), which must be the main one. Other threads claim, report,
    read files and print; they tell the loop by call(). `options` are those
    of the command line, see parse().
    """

    MOST_AHEAD = 200  # jobs claimed for slots that aren't idle yet
    HOARD = 1  # seconds after which these are given back
    GRACE = 5  # seconds between TERM and KILL for a command that is cut off

    def __init__(self, options):
        self.options = options
        self.name = options.name or own_name()
        self.mutex = threading.Lock()  # one writes to our output at a time
        client = Client(options.access, patience=None)
        self.claimer = Claimer(
            options, client, self.name, say=self.say,
            receive=lambda jobs: self.call(self.receive, jobs),
            suspect=lambda reason: self.call(self.put_in_quarantine, reason),
            fault=lambda: self.call(self.drain, signal.SIGTERM, 1),
            busy=self.busy,
        )
        self.files = file_name(self.name, client.jobix)
        self.log = self.printer = None
        if options.print:
            self.printer = Printer(self.nobody_reads)
        else:
            logs = options.logs or beside(client.access, "logs")
            self.log = OutputLog(os.path.join(logs, self.files))
        self.environment = dict(os.environb)
        self.idle = []  # slots
        self.slots = {}  # descriptor: (slot, stream)
        self.ready = collections.deque()  # attempts that wait for a slot
        self.attempts = {}  # jobid: Attempt, from its claim to its outcome
        self.running = {}  # process id: Attempt
        self.over = []  # (attempt, verb, values), to be told
        self.inbox = collections.deque()  # what other threads call
        self.schedule = sched.scheduler(time.monotonic, time.sleep)
        self.delay = None  # seconds until the next is due
        self.status = 0  # exit status
        self.draining = False
        self.quarantine = None  # why, if the node is in doubt
        self.done = self.failed = 0
        self.claiming, self.asking, self.dry = True, False, False
        self.pace = None  # seconds for which recent commands had their slot

    def busy(self):
        """Return whether there is work, or an outcome on its way.

        It may set a job free for us. In the order in which they go: none is
        overlooked.
        """
        return bool(self.attempts or self.over or self.claims.unsafe)

    def run(self):
        """Work until there is nothing left to do, or a signal ends it.

        Returns the exit status.
        """
        self.folder = tempfile.mkdtemp(prefix="jobman-")
        self.guard = Guard(self.folder, self.options.slots)  # no thread yet
        self.prepare()
        try:
            while self.turn():
                self.wait()
        finally:
            self.finish()
        return self.status

    def prepare(self):
        """Make the slots, heed the signals, start the other threads."""
        self.wake, self.waker = os.pipe()
        for fd in (self.wake, self.waker):
            os.set_blocking(fd, False)
        self.poll = select.poll()
        self.poll.register(self.wake, select.POLLIN)
        allow_open_files(self.options.slots)
        for number in range(self.options.slots):
            slot = Slot(self.folder, number)
            self.idle.append(slot)
            for stream, fd in enumerate(slot.readers, 1):
                self.slots[fd] = slot, stream
                self.poll.register(fd, select.POLLIN)
        self.heed_signals()
        client = Client(self.options.access, patience=0)
        spool = self.options.spool or beside(client.access, "spool")
        self.claims = Claims(
            client, Spool(spool, self.files),
            self.name, self.options.lease, about=self.about, say=self.say,
            lost=lambda *claim: self.call(self.lost, *claim),
            drained=lambda whether: self.call(self.heed_drain, whether),
        )
        self.claimer.start()
        if self.printer:
            self.printer.start()
        if self.options.until_eof:
            threading.Thread(target=self.end_at_eof, daemon=True).start()
        if self.options.until is not None:
            left = max(0, self.options.until - time.monotonic())
            self.schedule.enter(left, 0, self.drain, (signal.SIGTERM, 0))

    def heed_signals(self):
        """Let signals wake the loop; those to end drain the worker."""
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self.waker)
        for number in ENDING_SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
                signal.signal(number, self.signalled)

    def signalled(self, number, _):
        """Drain, in the loop. SIGUSR1 only asks us to end; it is no failure.

        https://slurm.schedmd.com/sbatch.html, --signal
        """
        status = 0 if number == signal.SIGUSR1 else 128 + number
        self.call(self.drain, number, status)

    def end_at_eof(self):
        """Drain when whoever started us is gone."""
        while os.read(sys.stdin.fileno(), 4096):
            pass
        self.call(self.drain, signal.SIGTERM, 0)

    def call(self, function, *args):
        """Let the loop call a function, from any thread or signal."""
        self.inbox.append((function, args))
        with contextlib.suppress(BlockingIOError):  # it is awake then
            os.write(self.waker, b".")

    def about(self):
        """Return what a heartbeat says of the worker."""
        return {
            "host": socket.gethostname(), "stages": self.claimer.stages,
            "slots": self.options.slots, "busy": len(self.running),
            "done": self.done, "failed": self.failed,
            "quarantine": self.quarantine,
        }

    def say(self, line):
        """Write a line to the worker's own log, its standard error."""
        with self.mutex, contextlib.suppress(OSError):
            print("worker.py: %s" % line, file=sys.stderr, flush=True)

    def turn(self):
        """Do what is to be done now; return whether there will be more."""
        while self.inbox:
            function, args = self.inbox.popleft()
            function(*args)
        self.reap()
        self.fill_slots()
        self.ask()
        self.put_down()
        self.delay = self.schedule.run(blocking=False)
        return self.claiming or bool(self.attempts)

    def wait(self):
        """Wait for an event, or a time; read what commands have printed."""
        delay = 3600 if self.delay is None else min(self.delay, 3600)
        if self.inbox or self.over:
            delay = 0
        for fd, _ in self.poll.poll(delay * 1000):
            if fd == self.wake:
                with contextlib.suppress(BlockingIOError):
                    os.read(fd, 65536)
            else:
                slot, stream = self.slots[fd]
                slot.read(stream)

    def finish(self):
        """Tell the last outcomes, and let all go."""
        for attempt in self.running.values():  # only after a fault
            kill_group(attempt.pid)
        for attempt in self.attempts.values():
            self.over.append((attempt, "release", {}))
        self.put_down()
        self.claims.close(ended=True)
        self.guard.close()
        for slot, _ in self.slots.values():
            shutil.rmtree(os.path.dirname(slot.result), ignore_errors=True)

    # Claims come

    def ask(self):
        """Ask for jobs: for the idle slots, and a few ahead."""
        if self.asking or not self.claiming or self.claimer.ending.is_set():
            return
        idle, ahead = len(self.idle), self.ahead()
        if idle:
            self.asking = True
            self.claimer.want(idle + ahead, wait=True)
        elif len(self.ready) * 2 < ahead and not self.dry:
            self.asking = True
            self.claimer.want(ahead - len(self.ready), wait=False)

    def ahead(self):
        """Return how many jobs to have ready: some, if commands are short.

        As many as end in the time of a few claims: none where commands take
        longer than that, nor while they fail, which may be the node's fault.
        And no more than have ended so far: they may have been the short ones.
        """
        if self.pace is None or self.claimer.doubt.failed:
            return 0
        ended = self.options.slots * 4 * self.claimer.trip / self.pace
        return min(self.MOST_AHEAD, self.done + self.failed, int(ended))

    def receive(self, jobs):
        """Take what the claimer brings; None: it will bring no more."""
        self.asking = False
        if jobs is None:
            self.claiming = False
        self.dry = not jobs
        for job in jobs or ():
            self.claims.hold(job)
            attempt = self.attempts.get(job["jobid"])
            if attempt:  # a lapse has brought our own job back to us
                self.take_up(attempt, job)
            else:
                attempt = self.attempts[job["jobid"]] = Attempt(job)
                self.ready.append(attempt)
        if self.claimer.ending.is_set() or self.claimer.drained:
            self.give_back()
        elif self.ready:
            self.schedule.enter(self.HOARD, 0, self.unhoard)

    def take_up(self, attempt, job):
        """Go on with an attempt under a new claim of its job.

        Not where the job has come on without us, or back from a retry: then
        the command works on what isn't the job's any more.
        """
        keys = "jobstage", "jobcmd", "filename", "files"
        if any(attempt.job.get(key) != job.get(key) for key in keys):
            self.cut_off(attempt, "end", signal.SIGTERM, self.GRACE)
            attempt.reason = "end"
        elif attempt.reason == "lost":
            attempt.reason = "end"
        attempt.job = job

    def unhoard(self):
        """Give back what has waited for a slot too long."""
        late = time.monotonic() - self.HOARD
        if self.ready and self.ready[0].claimed <= late:
            self.pace = max(self.pace or 0, self.HOARD)
            self.give_back()

    def give_back(self):
        """Release all claims that wait for a slot."""
        while self.ready:
            self.tell(self.ready.popleft(), "release")

    def stop_claiming(self):
        """Claim no more, and give back what hasn't begun."""
        self.claimer.end()
        self.schedule.enter(1, 0, self.claimer.client.abort,
                            (socket.SHUT_RDWR,))
        self.give_back()

    # Commands begin

    def fill_slots(self):
        """Begin attempts in idle slots."""
        while self.ready and self.idle:
            attempt, slot = self.ready.popleft(), self.idle.pop()
            attempt.slot = slot
            attempt.placed = time.monotonic()
            self.dry = False
            files = attempt.job.get("files")
            if files and attempt.job.get("made") != attempt.job["jobstage"]:
                self.aside(
                    self.checked, attempt, await_files, files,
                    self.options.lag, self.claimer.ending,
                )
            else:
                self.launch(attempt)

    def aside(self, then, attempt, work, *args):
        """Do `work(*args)` in a thread, then `then(attempt, what it gave)`.

        It gives an exception that it raised. An attempt that has ended
        meanwhile is forgotten.
        """

        def go_on(found):
            if self.attempts.get(attempt.job["jobid"]) is attempt:
                then(attempt, found)

        def do():
            try:
                found = work(*args)
            except Exception as error:
                found = error
            self.call(go_on, found)

        try:
            threading.Thread(target=do, daemon=True).start()
        except RuntimeError:  # the system has no thread left: do it here
            do()

    def checked(self, attempt, bad):
        """Begin a command, unless the files it is given are `bad`.

        They had less than their time to come when we claim no more.
        """
        if attempt.reason:
            self.conclude(attempt)
        elif self.claimer.ending.is_set():
            self.end(attempt, "release")
        elif isinstance(bad, Exception):
            self.end(attempt, "fail", error="worker.py has a fault: %r" % bad)
        elif bad:
            names = ", ".join(file["path"] for file in bad)
            self.say("Job %d: not as it was made: %s" % (
                attempt.job["jobid"], names))
            self.end(attempt, "reject", error="not as it was made: " + names)
        else:
            paths = [file["path"] for file in attempt.job["files"]]
            attempt.inputs = {path: touched(path) for path in paths}
            self.launch(attempt)

    def launch(self, attempt):
        """Start the command of an attempt."""
        try:
            argv, given = self.command(attempt.job)
        except ValueError as error:
            return self.end(attempt, "fail", error=str(error))
        attempt.output = (
            PrintedOutput() if self.printer else
            LoggedOutput(self.log, attempt.key(), self.options.log_limit)
        )
        try:
            attempt.start(argv, given, self.environment)
        except (OSError, ValueError) as error:
            return self.not_started(attempt, error)
        attempt.slot.output = attempt.output
        self.guard.groups[attempt.slot.number] = attempt.pid
        self.running[attempt.pid] = attempt
        if attempt.job.get("timeout"):
            attempt.events.append(self.schedule.enter(
                attempt.job["timeout"], 0, self.cut_off,
                (attempt, "timeout", signal.SIGTERM, self.GRACE),
            ))

    def command(self, job):
        """Return a job's command as argv, and what it reads, as bytes.

        Raises ValueError when it has none.
        """
        if self.options.command is not None:
            given = json.dumps(job).encode("ascii")
            return ["/bin/sh", "-c", self.options.command], given
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

    def not_started(self, attempt, error):
        """End an attempt whose command can't be started."""
        number = getattr(error, "errno", None)
        if number in (errno.ENOSPC, errno.EDQUOT):
            self.put_in_quarantine(str(error))
        scarce = errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE
        status = 127 if number == errno.ENOENT else 126
        if number in scarce:
            status = TEMPFAIL
        self.end(attempt, "fail", error=str(error), exit_code=status)

    # Commands end

    def cut_off(self, attempt, reason, number, grace):
        """End a command: by a signal to its group, and KILL after `grace`.

        Not one that has ended: its number may be another's by now.
        """
        if attempt.reason is None and attempt.pid in self.running:
            attempt.reason = reason
            attempt.last = time.monotonic() + grace
            kill_group(attempt.pid, number)
            attempt.events.append(self.schedule.enter(
                grace, 0, kill_group, (attempt.pid,)))

    def reap(self):
        """Take note of the commands that have ended.

        What such a command has left running in its group is killed while
        the group's number can't be another's.
        """
        options = os.WEXITED | os.WNOHANG | os.WNOWAIT
        while True:
            try:
                found = os.waitid(os.P_ALL, 0, options)
            except ChildProcessError:
                return
            if found is None:
                return
            attempt = self.running.get(found.si_pid)
            if attempt and attempt.reason is None:
                kill_group(attempt.pid)
            _, status = os.waitpid(found.si_pid, 0)
            if attempt:
                killed = os.WIFSIGNALED(status)
                attempt.status = (
                    128 + os.WTERMSIG(status) if killed
                    else os.WEXITSTATUS(status)
                )
                self.gone(attempt)

    def gone(self, attempt):
        """Go on with an attempt whose command has ended.

        What is left of the group of a command that was cut off has its time
        too.
        """
        cut = attempt.reason and time.monotonic() < attempt.last
        if cut and group_lives(attempt.pid):
            attempt.events.append(
                self.schedule.enter(0.05, 0, self.gone, (attempt,)))
            return
        if attempt.reason:
            kill_group(attempt.pid)
        del self.running[attempt.pid]
        self.guard.groups[attempt.slot.number] = 0
        attempt.slot.drain()
        attempt.seconds = time.monotonic() - attempt.began
        if attempt.reason or attempt.status:
            self.conclude(attempt)
        else:
            self.collect(attempt)

    def collect(self, attempt):
        """Find out what a command that ended well has brought."""
        try:
            brought = attempt.brought()
        except ValueError as error:
            self.end(attempt, "fail",
                     error="JOBMAN_RESULT can't be used: %s" % error)
            return
        try:
            paths = output_paths(attempt.job, brought)
        except (OSError, ValueError) as error:
            return self.collected(attempt, error)
        found = attempt.job, brought, paths, attempt.inputs
        if paths:
            self.aside(self.collected, attempt, results, *found)
        else:
            self.collected(attempt, results(*found))

    def collected(self, attempt, brought):
        """End an attempt that has done its work."""
        if attempt.reason:
            self.conclude(attempt)
        elif isinstance(brought, Exception):
            self.end(attempt, "fail", error="An output is missing: %s"
                     % brought)
        else:
            self.end(attempt, "update", exit_code=0,
                     jobstage=attempt.job["jobstage"] + 2, **brought)

    def conclude(self, attempt, *, doubtful=True):
        """End an attempt that failed or was cut off.

        A batch system may send the signal that ends us to the commands too,
        and we may hear of their deaths before: so such a one waits a second.
        """
        fatal = attempt.status in FATAL and not attempt.reason
        if fatal and doubtful and not self.draining:
            attempt.events.append(self.schedule.enter(
                1, 0, self.conclude, (attempt,), {"doubtful": False}))
        elif attempt.reason == "lost":
            self.end(attempt, None)
        elif attempt.reason == "timeout":
            self.end(attempt, "fail", exit_code=TIMED_OUT, error="not done"
                     " after %g seconds" % attempt.job["timeout"])
        elif attempt.reason or self.draining:
            self.end(attempt, "release")
        else:
            self.end(attempt, "fail", exit_code=attempt.status,
                     error="exit status %d" % attempt.status)

    def end(self, attempt, verb, **values):
        """End an attempt: keep its output, then tell its outcome."""
        if attempt.over:  # its output is being printed
            return
        attempt.over = True
        for event in attempt.events:
            with contextlib.suppress(ValueError):
                self.schedule.cancel(event)
        if verb == "fail":
            verb = self.blame(attempt, values)
        if verb in ("fail", "update"):
            if attempt.output:
                values["stderr"] = attempt.output.tail.decode(
                    "utf-8", "replace")
            if attempt.seconds is not None:
                values["seconds"] = round(attempt.seconds, 3)
        elif verb == "release":
            values = {}
        if attempt.output:
            attempt.output.end()
            attempt.slot.output = None
        if attempt.output and self.printer:
            self.printer.put(attempt.output, lambda went: self.call(
                self.printed, attempt, went, verb, values))
        else:
            self.tell(attempt, verb, **values)

    def printed(self, attempt, went, verb, values):
        """Tell an outcome; what wasn't printed isn't done."""
        if went:
            self.tell(attempt, verb, **values)
        else:
            self.tell(attempt, "release")

    def blame(self, attempt, values):
        """Return fail, or release where it is the node's fault."""
        if values.get("exit_code") == TEMPFAIL:
            return "fail"
        folder = disk_full(
            attempt.job.get("cwd") or ".", self.folder,
            os.environ.get("TMPDIR") or ".",  # if full we are elsewhere
        )
        if folder and not self.quarantine:
            self.put_in_quarantine("no room is left in %s" % folder)
        if self.quarantine:
            return "release"
        self.claimer.doubt.note(
            attempt.job, failed=True, seconds=attempt.seconds or 0)
        if self.claimer.doubt.stands():
            self.give_back()
        return "fail"

    def tell(self, attempt, verb, **values):
        """Let the next have the slot; the outcome is told with others."""
        self.over.append((attempt, verb, values))
        del self.attempts[attempt.job["jobid"]]
        if attempt.slot is not None:
            took = time.monotonic() - attempt.placed
            self.pace = took if self.pace is None else (
                self.pace + (took - self.pace) / 4)
            self.idle.append(attempt.slot)
        if verb == "update":
            self.claimer.doubt.note(attempt.job, failed=False, seconds=0)
            self.done += 1
        elif verb == "fail":
            self.failed += 1

    def put_down(self):
        """Write the log, then pass on what has ended since."""
        if self.log is not None:
            try:
                self.log.flush()
            except OSError as error:
                self.put_in_quarantine("%s.out can't be written: %s" % (
                    self.log.path, error.strerror or error))
        for attempt, verb, values in self.over:
            if verb is None:
                job = attempt.job
                self.claims.forget(job["jobid"], job["claim"])
            else:
                self.claims.settle(attempt.job, verb, **values)
        self.over = []

    # The worker ends

    def lost(self, jobid, claim):
        """Give up a claim that is lost, a second later.

        Not if the job has come back to us, which we may be about to hear.
        """
        self.schedule.enter(1, 0, self.give_up, (jobid, claim))

    def give_up(self, jobid, claim):
        """Kill the command of a claim that is lost."""
        attempt = self.attempts.get(jobid)
        if attempt is None or not self.claims.holds(jobid, claim):
            return
        if attempt.reason is None:
            self.say("Job %d: its claim is lost." % jobid)
        if attempt.pid in self.running:
            self.cut_off(attempt, "lost", signal.SIGTERM, self.GRACE)
        elif attempt in self.ready:
            self.ready.remove(attempt)
            self.tell(attempt, None)
        else:
            attempt.reason = "lost"

    def heed_drain(self, drained):
        """Claim nothing while the server says so; what runs may end."""
        if self.claimer.heed_drain(drained) and drained:
            self.give_back()

    def drain(self, number, status):
        """Claim no more, end what runs by a signal, and give it back.

        A second SIGINT leaves no time for that.
        """
        if self.draining:
            if number == signal.SIGINT:
                self.end_now()
            return
        self.draining = True
        self.status = self.status or status
        self.stop_claiming()
        for attempt in list(self.running.values()):
            self.cut_off(attempt, "end", number, self.options.grace)
        self.schedule.enter(self.options.grace, 0, self.let_go)

    def let_go(self):
        """Give back what isn't running: its files are being read."""
        for attempt in list(self.attempts.values()):
            if attempt.pid not in self.running:
                self.end(attempt, "release")

    def end_now(self):
        """Kill what runs, give it back if the server answers, and end."""
        self.claims.LAST = 1
        self.claiming = False  # whatever the claimer waits for
        for attempt in self.running.values():
            attempt.last = 0
            kill_group(attempt.pid)
        self.let_go()

    def nobody_reads(self, error=None):
        """End as by SIGPIPE, or with a word on why we can't print."""
        if error:
            self.say("The output can't be written: %s" % error)
        status = 1 if error else 128 + signal.SIGPIPE
        self.call(self.drain, signal.SIGTERM, status)

    def put_in_quarantine(self, reason):
        """Claim no more: this node does harm. What runs may end."""
        if self.quarantine is None:
            self.quarantine = reason
            self.status = self.status or QUARANTINED
            self.say("In quarantine: %s." % reason)
            self.stop_claiming()
            self.claims.beat_soon()


# --------------------------------------------------------------- library ---


class Job:
    """A claimed job, for a program that does the work itself.

    `jobid`, `stage`, `jobcmd`, `filename`, `attempt` are what it carries;
    `lost` tells whether somebody else has it by now, until it ends. In a
    `with` statement an exception fails the attempt, and goes no further; a
    good end is done().
    """

    def __init__(self, claims, job):
        self.claims = claims
        self.job = job
        self.jobid, self.stage = job["jobid"], job["jobstage"]
        self.jobcmd, self.filename = job["jobcmd"], job["filename"]
        self.attempt = job["attempt"]
        self.began = time.monotonic()
        self.inputs = {}
        self.ended = False

    @property
    def lost(self):
        """Return whether the claim is lost, as far as heartbeats know."""
        held = self.claims.holds(self.jobid, self.job["claim"])
        return not (held or self.ended)

    def done(self, filename=None, jobcmd=None, outputs=None):
        """Put the job two stages up, with what the next stage should know.

        `outputs`, a list of paths, and the file `filename`, if it is there,
        are checked before the next stage starts. Returns when the server
        has it, or when it waits on disk for a server that is away. Raises
        OSError or ValueError, and the job isn't done, when an output is
        missing.
        """
        brought = {"filename": filename, "jobcmd": jobcmd, "outputs": outputs}
        brought = {k: v for k, v in brought.items() if v is not None}
        paths = output_paths(self.job, brought)
        values = results(self.job, brought, paths, self.inputs)
        values["seconds"] = round(time.monotonic() - self.began, 3)
        self.end("update", jobstage=self.stage + 2, **values)

    def fail(self, error, **report):
        """End the attempt without success: `error`, exit_code?, stderr?."""
        self.end("fail", error=error, **report)

    def release(self):
        """Give the claim back unharmed."""
        self.end("release")

    def end(self, verb, **values):
        """End the attempt; only the first end counts."""
        if not self.ended:
            self.ended = True
            self.claims.settle(self.job, verb, **values)
            self.claims.wait()

    def check(self, lag):
        """Return whether the files that it is given are unchanged."""
        files = self.job.get("files") or ()
        if self.job.get("made") == self.stage:
            files = ()
        bad = await_files(files, lag, threading.Event())
        if bad:
            names = ", ".join(file["path"] for file in bad)
            self.end("reject", error="not as it was made: " + names)
        self.inputs = {file["path"]: touched(file["path"]) for file in files}
        return not bad

    def __enter__(self):
        return self

    def __exit__(self, kind, error, _):
        if kind is None:
            try:
                self.ended or self.done()
            except (OSError, ValueError) as missing:
                self.fail("An output is missing: %s" % missing)
        elif issubclass(kind, Exception):
            trace = traceback.format_exc()[-STDERR_KEPT:]
            self.fail("%s: %s" % (kind.__name__, error), stderr=trace)
            return True
        else:
            self.release()
        return False


def each_job(claimer, claims, lag):
    """Yield jobs; see claim_jobs."""
    try:
        for found in iter(lambda: claimer.claim(1, True), None):
            claims.hold(found[0])
            job = Job(claims, found[0])
            try:
                if claimer.drained:  # while a long poll was on its way
                    job.release()
                elif job.check(lag):
                    yield job
            finally:
                job.fail("The program went on without job.done().")
    finally:
        claims.close(ended=True)
        claimer.client.close()


def claim_jobs(
    stage=0, *, access=None, name=None, lease=120, idle_timeout=60, lag=10,
    spool=None
):
    """Return an iterator over the jobs of a stage, each as a Job.

    It ends when there has been none for `idle_timeout` seconds. Leases are
    renewed meanwhile. A job that is left without done(), fail() or release()
    has failed, as by an exception in the loop. Options are those of the
    command line.
    """

    def say(line):
        print("worker.py: %s" % line, file=sys.stderr, flush=True)

    options = argparse.Namespace(
        stage=[stage], lease=lease, idle_timeout=idle_timeout, until=None
    )
    client, name = Client(access, patience=None), name or own_name()
    claimer = Claimer(options, client, name, busy=lambda: False, say=say)
    about = {
        "host": socket.gethostname(), "slots": 1, "stages": claimer.stages}
    claims = Claims(
        Client(access, patience=0),
        Spool(spool or beside(client.access, "spool"),
              file_name(name, client.jobix)),
        name, lease, about=lambda: about, say=say,
        lost=lambda *claim: claims.forget(*claim), drained=claimer.heed_drain,
    )
    jobs = each_job(claimer, claims, lag)
    atexit.register(jobs.close)  # at last: later our threads are gone
    return jobs


def run(function, stage=0, **options):
    """Call `function(job)` for each job of a stage; options as claim_jobs.

    What it returns, a dict or None, goes to the job's done(); an exception
    fails the attempt, and is told on standard error.
    """
    for job in claim_jobs(stage, **options):
        with job:
            try:
                found = function(job)
            except Exception:
                traceback.print_exc()
                raise
            if not job.ended:
                job.done(**found or {})


# ------------------------------------------------------------------ main ---


def send_spool(options):
    """Deliver what workers that have ended left; return the exit status."""
    client = Client(options.access)
    spool = Spool(options.spool or beside(client.access, "spool"), "none")

    dropped = []

    def say(line):
        dropped.append(line)
        print("worker.py: %s" % line, file=sys.stderr, flush=True)

    outcomes = spool.adopt(namespace(client.jobix))
    n = sum(len(batch) for batch in deliver(client, outcomes, say))
    spool.clear()
    n -= len(dropped)
    print("1 result was delivered." if n == 1 else
          "%d results were delivered." % n)
    return 0


def stage_list(text):
    """Read --stage: numbers, from which a job can move two up, or names."""
    most = MAX_STAGE - 2
    stages = [int(stage) if stage.isdecimal() else stage
              for stage in text.replace(" ", "").split(",")]
    if all(re.match("[A-Za-z]", stage) if isinstance(stage, str)
           else stage <= most for stage in stages):
        return stages
    raise argparse.ArgumentTypeError(
        "%r is no list such as 0 or 2,0, of stages up to %d, or of their names"
        % (text, most))


def time_limit(text):
    """Read --time-limit: seconds, from a time such as 2h30m."""
    try:
        return read_span(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


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
    add("--time-limit", type=time_limit, metavar="TIME",
        help="end after 1:00:00, 90s, 2h30m (default: with the batch job)")
    add("--grace", type=seconds, default=10, metavar="SECONDS",
        help="for commands to end after a signal, then KILL (default 10)")
    add("--lag", type=seconds, default=10, metavar="SECONDS",
        help="how late files of other nodes may be seen here (default 10)")
    add("--logs", metavar="DIR",
        help="keep output there (default: logs, next to the access file)")
    add("--log-limit", type=int, default=2**20, metavar="BYTES",
        help="of output kept of one job (default 1048576)")
    add("--print", action="store_true", help="print output, keep none")
    add("--spool", metavar="DIR",
        help="results wait there for a server that is away (default: spool,"
        " next to the access file)")
    add("--send-spool", action="store_true",
        help="deliver what ended workers left there, do nothing else")
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
    if options.log_limit < 0:
        parser.error("--log-limit must be 0 or more")
    return options


def set_end(options):
    """Find out when the worker must drain: `options.until`, or None."""
    left = options.time_limit
    if left is None:
        left = allocation_left(os.environ)
    options.until = None
    if left is not None:
        options.until = time.monotonic() + left - options.grace - MARGIN


def open_standard_files():
    """Open what who started us has closed of standard input to error."""
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number
    sys.stdout = sys.stdout or open(1, "w", closefd=False)
    sys.stderr = sys.stderr or open(2, "w", closefd=False)


def main(arguments=None):
    """Run the command line; return its exit status."""
    open_standard_files()
    options = parse(arguments)
    try:
        if options.send_spool:
            return send_spool(options)
        set_end(options)
        return Worker(options).run()
    except (Trouble, OSError) as trouble:
        print("worker.py: %s" % trouble, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
