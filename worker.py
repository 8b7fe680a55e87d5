#!/usr/bin/env python3
"""Run the jobs of a jobman server, on any number of nodes.

    python3 worker.py --stage 0      run the jobs that wait in stage 0

claims jobs, runs their commands, and reports the results to the server.
As a library it is for programs that do the work themselves:

    import worker

    def square(job):
        return {"jobcmd": {"n": job.jobcmd, "square": job.jobcmd ** 2}}

    client = worker.Client()  # finds the server by its access file
    client.submit("squares", [
        {"jobstage": 10, "laststage": 12, "jobcmd": n} for n in range(5)])
    worker.run(square, stage=10, idle_timeout=1)
    for job in client.jobs(stage=12)["jobs"]:
        print(job["jobcmd"]["square"])

Start it as often as you like: the jobs are added once and shared by all.

`run` calls a function for each job; `claim_jobs` yields the jobs, for a loop.
Both give it as a `Job`. `Client` has a method for every call of the server;
`python3 jobman.py help http` explains the calls. Errors are `Refused`, by the
server, and `Unreachable`; both are `Trouble`.

It needs only Python 3.6 or later, and works when copied alone.
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
__all__ = [
    "Client", "Job", "Refused", "Trouble", "Unreachable", "claim_jobs", "run",
]

MAX_STAGE = 1000000
MAX_BODY = 64 * 2**20  # bytes that a server takes in one call
STDERR_KEPT = 4096  # bytes of a command's stderr that go to the server
RESULT_LIMIT = 2**20  # bytes that a command may leave in JOBMAN_RESULT
NOTE_LIMIT = 4096  # bytes in JOBMAN_NOTE, and in JOBMAN_PROGRESS
TEMPFAIL = 75  # EX_TEMPFAIL of sysexits.h: try again, without counting
TIMED_OUT = 124  # the exit status of timeout(1)
QUARANTINED = 3  # exit status of a worker on a bad node
MARGIN = 5  # seconds kept free before the end of an allocation


# ---------------------------------------------------------------- errors ---


class Trouble(Exception):
    """Say in one sentence what is wrong and what to do."""


class Refused(Trouble):
    """Hold the server's refusal: its `status` and its sentence."""

    def __init__(self, status, message):
        super().__init__(message)
        self.status = status


class Unreachable(Trouble):
    """Say that the server can't be reached."""


class Impostor(OSError):
    """Say why the program at the server's address is not our server."""


def printable(text):
    """Return `text` with control characters as escapes."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def number_of(n, thing):
    """Return a number and its noun: 1 job, 2 jobs."""
    return "%d %s%s" % (n, thing, "" if n == 1 else "s")


def say(line):
    """Write a line for a person on standard error."""
    with contextlib.suppress(OSError):
        sys.stderr.write("worker.py: %s\n" % printable(str(line)))
        sys.stderr.flush()


# ---------------------------------------------------------------- client ---

PORTS = {"http": 80, "https": 443}


def access_path():
    """Return the default path of the access file."""
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
            raise ValueError("its jobix isn't a number")
        url, fingerprint = str(access["url"]), access.get("fingerprint")
        return url, int(access["jobix"]), fingerprint
    except FileNotFoundError:
        raise Trouble(
            "There is no access file %s: start a server with `python3"
            " jobman.py serve`, or name its access file with --access." % path
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Trouble("Can't read %s: %s." % (path, error)) from None


def backoff():
    """Yield random pauses that grow up to 10 seconds ("full jitter").

    They keep a thousand workers from coming back to a server all at once.
    """
    longest = 0.1
    while True:
        yield random.uniform(0, longest)
        longest = min(10, longest * 2)


def read_fingerprint(text, scheme):
    """Return a certificate's SHA-256 as 64 hex digits, None for no text.

    Takes colons and capitals, as openssl prints them. Raises Trouble for
    anything else, and for a server without TLS.
    """
    if not text:
        return None
    digits = str(text).replace(":", "").lower()
    if not re.match(r"[0-9a-f]{64}\Z", digits):
        raise Trouble("The server's fingerprint isn't a SHA-256 in hex.")
    if scheme != "https":
        raise Trouble("A server with a fingerprint needs an https:// address.")
    return digits


def tls_context(fingerprint):
    """Return an SSLContext that trusts certificate authorities.

    With a fingerprint it trusts any certificate: the caller compares the
    fingerprint. Only https needs ssl, which some Pythons lack.
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


def connect(connection):
    """Connect an HTTPConnection; raise Impostor for a bad certificate."""
    try:
        connection.connect()
    except (OSError, ValueError) as error:  # ValueError: Python 3.6
        reason = getattr(error, "reason", None)
        if reason == "WRONG_VERSION_NUMBER":
            raise OSError(
                "it doesn't speak TLS; is its address http://?") from None
        if reason != "CERTIFICATE_VERIFY_FAILED" and isinstance(
                error, OSError):
            raise
        reason = "its certificate can't be trusted (%s)" % error
        raise Impostor(reason) from None


def check_listener(sock):
    """Raise Impostor if another user listens at the other end on this host.

    When a server has ended, any user of its host can take its port. The
    kernel knows who listens. It is asked after the connection is made, so
    nobody can take the port between the two.
    """
    host, port = sock.getpeername()[:2]
    packed = socket.inet_pton(sock.family, host)
    if sock.family == socket.AF_INET:
        if packed[0] != 127:
            return
        mapped = b"\0" * 10 + b"\xff\xff" + packed
    elif packed == b"\0" * 15 + b"\1":
        mapped = packed
    else:
        return
    addresses = [memoryview(each).cast("I")
                 for each in (packed, mapped, b"\0" * 4, b"\0" * 16)]
    there = {"%s:%04X" % ("".join("%08X" % word for word in words), port)
             for words in addresses}
    owners = set()
    for name in "tcp", "tcp6":
        with contextlib.suppress(FileNotFoundError):  # no IPv6 here
            with open("/proc/net/" + name) as file:
                for line in file:
                    words = line.split()
                    if words[1] in there and words[3] == "0A":  # LISTEN
                        owners.add(int(words[7]))
    if not owners or owners - {os.geteuid(), 0}:
        raise Impostor("a program of another user listens there")


def chunks(pairs, most, size):
    """Yield JSON objects that together hold all `pairs`.

    Each holds up to `most` of them, and up to `size` characters if it holds
    more than one. There is at least one object.
    """
    part, length = [], 0
    for key, value in pairs:
        text = "%s: %s" % (json.dumps(str(key)), json.dumps(value))
        if part and (len(part) == most or length + len(text) > size):
            yield "{%s}" % ", ".join(part)
            part, length = [], 0
        part.append(text)
        length += len(text)
    yield "{%s}" % ", ".join(part)


def path_of(*parts):
    """Return the path of a call: its verb and its arguments, except None."""
    return "".join("/" + quote(str(part), safe=",")
                   for part in parts if part is not None)


class Client:
    """Speak to a server: one method for each of its calls.

    `access` names the access file (default: $JOBMAN_ACCESS, else
    ~/.jobman/access.json); `url` and `jobix` (or $JOBMAN_URL and
    $JOBMAN_JOBIX) replace the file; a `jobix` alone replaces the file's. An
    https server is verified by the SHA-256 of its certificate, from the access
    file or `fingerprint` (or $JOBMAN_FINGERPRINT); without a fingerprint, by
    certificate authorities and its host name.

    One connection is kept open; threads take turns on it. Each new connection
    reads the access file again, because the server may have moved. While the
    server can't be reached, a call that is safe to repeat is repeated for up
    to `patience` seconds (None: forever). Every method raises Refused when
    the server refuses the call, and Unreachable when it can't be reached.
    """

    CONNECT_TIMEOUT = 10  # seconds
    READ_TIMEOUT = 10  # seconds without an answer, for calls that only read
    TIMEOUT = 60  # the same, for calls that change something
    SWEEP_TIMEOUT = 3600  # for a call that may be about millions of jobs
    LATE = 5  # seconds after which a call reports why it waits
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
            raise Trouble("The jobix ($JOBMAN_JOBIX) must be a number.")
        self.own_jobix = int(jobix) if known else None
        self.fixed = url and (url, self.own_jobix, fingerprint)
        self.patience = patience
        self.tell = None  # called once a call with the reason why it waits
        self.told = True
        self.mutex = threading.Lock()  # guards the connection
        self.connection = None
        self.sent = False  # whether a call has gone out on it
        self.met = False  # whether our server has ever been at the address
        self.aborted = threading.Event()
        self.jobix = None
        self.locate()

    def locate(self):
        """Find out the server's address, and the jobix.

        The jobix stays the same: another jobix has other jobs.
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
                "The server's address %r must begin with http:// or https://."
                % url)
        fingerprint = read_fingerprint(fingerprint, parts.scheme)
        if self.jobix not in (None, jobix):
            raise Trouble("The access file belongs to another server now.")
        tls = tls_context(fingerprint) if parts.scheme == "https" else None
        self.url, self.jobix, self.address = url, jobix, address
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
        """Make `changes`, if any; return what stages have been given.

        {stage: {"name"?, "minutes"?, "cores"?, "memory"?}}; `changes` has the
        same form; None removes a value, and memory is in bytes or as "4G". As
        in all other calls, a stage may be given by its name.
        """
        method = "GET" if changes is None else "POST"
        found = self.call(method, "/stages", changes)
        return {int(stage): values for stage, values in found.items()}

    def set(self, jobs):
        """Add `jobs`: {jobid: {"jobstage": int, "jobcmd": any JSON, …}}.

        Or an iterable of such pairs. Many jobs go in several calls, so that
        other calls come between. After an error some jobs may be there:
        call it again with all, and none is added twice.
        """
        pairs = jobs.items() if hasattr(jobs, "items") else jobs
        for text in chunks(pairs, self.PART, self.PART_SIZE):
            self.call("POST", "/set", text=text)

    def submit(self, key, jobs, part=0):
        """Add `jobs`, a list of entries; return their ids.

        The same key again gives the same ids and adds nothing. To add more
        jobs under the key, give `part`, the number of jobs before them.
        """
        value = {"key": key, "jobs": jobs, "part": part}
        return self.call("POST", "/submit", value)["ids"]

    def submissions(self, name=None):
        """Return the latest 100 submissions, or a list with the named one.

        [{"key": its name, "ids": "1-1000", "jobs": 1000, "time"}, …]; `last`
        names the latest.
        """
        return self.call("GET", "/submissions", options={"submission": name})

    def get(self, stage, nextstage=None, **options):
        """Claim a job that waits in `stage`; return it, None without one.

        `stage` may be a list: the first stage that has a job is used.
        Options: `worker` (a name), `wait`, `lease` (seconds), `n` (jobs:
        returns a list), `cores`, `memory` (bytes: what the worker has in all;
        a stage that needs more gives none). A claim without a lease is not
        repeated when its answer is lost.
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
        """Report that an attempt failed: `error`, `exit_code`, `stderr`."""
        return self.end_claim("fail_job", jobid, claim, report)

    def reject_job(self, jobid, claim=None, **report):
        """Report that a job's files are missing or have changed.

        `report`: `error`, `stderr`, and `files` that it must still have.
        """
        return self.end_claim("reject_job", jobid, claim, report)

    def release_job(self, jobid, claim=None):
        """Give a claim back; no failure is counted."""
        return self.end_claim("release_job", jobid, claim, {})

    def heartbeat(self, worker, lease, claims, **about):
        """Renew `claims`, [[jobid, token], …], for `lease` seconds.

        A claim may report on its attempt: [jobid, token, {"progress": [0.4,
        "epoch 3"], "note": "for the next attempt"}].

        `about` the worker: `host`, `stages` (a list), `slots`, `memory`
        (bytes), `busy`, `done`, `failed`, `quarantine` (why it takes no more
        work), `ended` (True). Returns {"lost": [jobid, …], "drain": bool,
        "beat": seconds}.
        """
        beat = dict(about, worker=worker, lease=lease, claims=claims)
        return self.call("POST", "/heartbeat", beat)

    def check_stages(self, old=None, new=None):
        """Mark the expired jobs; move those of stage `old` to `new`."""
        path = path_of("check_stages", old, None if old is None else new)
        return self.call("GET", path, repeat=old is None,
                         timeout=self.SWEEP_TIMEOUT)

    def retry(self, **selector):
        """Run ended jobs again; return how many.

        `selector`: `ids`, or `submission`, `stage` and `state`, or
        `all=True`.
        """
        return self.sweep("/retry", selector)["retried"]

    def cancel(self, **selector):
        """Cancel jobs that aren't done; return how many; as retry."""
        return self.sweep("/cancel", selector)["cancelled"]

    def release(self, **selector):
        """Take jobs from their workers, uncounted; return how many."""
        return self.sweep("/release", selector)["released"]

    def forget(self, **selector):
        """Delete done jobs; return how many; as retry."""
        return self.sweep("/forget", selector)["forgotten"]

    def pause(self, stage):
        """Hand out no more jobs of a stage."""
        return self.call("POST", path_of("pause", stage), {})

    def resume(self, stage):
        """Hand out the jobs of a paused stage again."""
        return self.call("POST", path_of("resume", stage), {})

    def drain(self, worker):
        """Tell a worker, by its name, to claim no more."""
        return self.call("POST", "/drain/" + quote(worker), {})

    def undrain(self, worker):
        """Tell a drained worker to go on."""
        return self.call("POST", "/undrain/" + quote(worker), {})

    def status(self, **options):
        """Return the figures: jobs per stage and state, totals, rate.

        Options: `ids` (as 1,3,5-8) or `submission`, a name: only those jobs.
        """
        return self.call("GET", "/status", options=options)

    def pace(self, minutes=None):
        """Return how many attempts and jobs were done over time.

        Of the last `minutes`, else of all time: {"start", "step" (seconds),
        "updates": [attempts in each step, …], "done": [jobs, …]}.
        """
        return self.call("GET", "/pace", options={"minutes": minutes})

    def workers(self):
        """Return the workers heard from in the last day, the latest first.

        {"time": now, "workers": [{"name", "host", "slots", "heard", …}, …]}
        """
        return self.call("GET", "/workers")

    def jobs(self, **options):
        """Return a page of jobs: {"jobs": [job, …], "after": place or None}.

        Options: `stage`, `state` (also `expired`), `order` (`id` or `time`),
        `after` (from the page before), `limit`, `attempts` (how many of each
        job, the last), and those of status(). Only the last page has `after`
        None; others may be short, too.
        """
        return self.call("GET", "/jobs", options=options)

    def failures(self, **options):
        """Return the latest failed jobs, in groups; options as status().

        {"failed": jobs, "looked_at": jobs, "groups": [{"stage", "exit_code",
        "message", "host", "jobs", "ids"}, …]}
        """
        return self.call("GET", "/failures", options=options)

    def stats(self):
        """Return how much time attempts took: a dict, as GET /stats."""
        return self.call("GET", "/stats")

    def metrics(self):
        """Return figures of all jobix together, as text for Prometheus."""
        return self.call("GET", "/metrics")

    def job(self, jobid):
        """Return a job and its attempts."""
        return self.call("GET", path_of("job", jobid))

    def output(self, jobid, **options):
        """Return the end of the output of the last attempt at a job.

        {"stdout", "stderr", "truncated", "running"}; the texts have the last
        `bytes`, 65,536 by default.
        """
        return self.call("GET", path_of("output", jobid), options=options)

    # How a call is made

    def call(
        self, method, path, value=None, *,
        text=None, options=None, repeat=True, timeout=None
    ):
        """Make a call; return its answer: a JSON value, or text.

        It sends `value`, or the JSON `text`.
        """
        given = {k: v for k, v in (options or {}).items() if v is not None}
        if given:
            path += "?" + urlencode(given)
        if timeout is None:
            timeout = self.READ_TIMEOUT if method == "GET" else self.TIMEOUT
        if value is not None:
            text = json.dumps(value)
        body = None
        if text is not None:
            body = zlib.compress(text.encode("ascii"), 1)
            if len(body) > MAX_BODY:
                raise Refused(413, "The body is too large; use several calls.")
        with self.mutex:
            status, answer = self.persist(method, path, body, repeat, timeout)
        if status != 200:
            known = isinstance(answer, dict) and answer.get("error")
            raise Refused(status, known or "The server said %d." % status)
        return answer

    def persist(self, method, path, body, repeat, timeout):
        """Make a call; repeat it while that is safe and there is patience."""
        began = time.monotonic()
        self.told = self.tell is None
        for pause in backoff():
            final = False
            try:
                answer = self.exchange(method, path, body, timeout)
                if answer[0] < 500:
                    return answer
                error = "The server can't answer now (%d)." % answer[0]
                final = answer[0] != 503 and not repeat  # it may be done
            except Trouble as trouble:  # the access file is missing
                error = str(trouble)
            except Impostor as lost:
                self.close()
                error = "Another server than ours is at %s:%d: %s." % (
                    *self.address, lost)
                settled = time.monotonic() >= began + self.SETTLE
                if settled and not self.met:  # ours was never there
                    raise Trouble(error) from None
            except (OSError, http.client.HTTPException) as lost:
                final = self.close() and not repeat
                error = "The server at %s:%d can't be reached (%s)." % (
                    *self.address, lost or type(lost).__name__)
            took = time.monotonic() - began
            late = self.patience is not None and took >= self.patience
            if took >= self.LATE and not (late or final):
                self.tell_once(error)
            if final or late or self.aborted.wait(pause):
                raise Unreachable(error)

    def tell_once(self, error):
        """Report the reason why this call waits, once."""
        if not self.told:
            self.told = True
            self.tell("%s Waiting for it." % error)

    def end_claim(self, verb, jobid, claim, report):
        """End a claim; with a token that is safe to repeat."""
        return self.call("POST", path_of(verb, jobid), report,
                         options={"claim": claim}, repeat=claim is not None)

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
        if not self.told and not self.has_input(self.LATE):
            self.tell_once(
                "The server at %s:%d hasn't answered yet." % self.address)
            self.connection.sock.settimeout(max(1, timeout - self.LATE))
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
        raise OSError("the program there isn't a jobman server")

    def has_input(self, seconds):
        """Return whether the server sends something within so many seconds."""
        poll = select.poll()
        poll.register(self.connection.sock, select.POLLIN)
        return bool(poll.poll(seconds * 1000))

    def connect(self, timeout):
        """Open a connection, unless one is open."""
        if self.connection is not None and self.has_input(0):
            self.close()  # the server has closed it
        self.sent = False
        if self.connection is None:
            self.locate()
            kind, more = http.client.HTTPConnection, {}
            if self.tls is not None:
                kind, more = http.client.HTTPSConnection, {"context": self.tls}
            self.connection = kind(
                *self.address, timeout=self.CONNECT_TIMEOUT, **more)
            self.connection.auto_open = 0  # it would do without our checks
            try:
                connect(self.connection)
                self.identify(self.connection.sock)
            except BaseException:  # nothing may go out on it
                self.close()
                raise
        self.connection.sock.settimeout(timeout)

    def identify(self, sock):
        """Raise Impostor if another server than ours is at the other end."""
        if self.fingerprint:
            shown = hashlib.sha256(sock.getpeercert(binary_form=True))
            if shown.hexdigest() != self.fingerprint:
                raise Impostor("its fingerprint is %s" % shown.hexdigest())
        elif self.tls is None and not self.fixed:
            check_listener(sock)
        self.met = True

    def close(self):
        """Close the connection; return whether a call was sent on it."""
        if self.connection is not None:
            self.connection.close()
            self.connection = None
        return self.sent

    def abort(self, how=socket.SHUT_WR):
        """Break off the current call, from another thread, and make no more.

        With SHUT_WR an answer on its way still arrives, and the server sees
        that it shouldn't hand out jobs any more. SHUT_RDWR drops the answer.
        """
        self.aborted.set()
        with contextlib.suppress(OSError, AttributeError, TypeError):
            # beneath TLS, whose own shutdown would end the reading too
            socket.socket.shutdown(self.connection.sock, how)


# ----------------------------------------------------------------- files ---


CHANGED = "files are missing or have changed: %s"


def to_bytes(text):
    """Return `text` as bytes, whatever the locale.

    Bytes that aren't UTF-8 travel as lone surrogates (PEP 383).
    """
    return text.encode("utf-8", "surrogateescape")


def describe(path):
    """Return a file as it is now: {"path", "size" (bytes), "sha256" (hex)}.

    Raises OSError when it can't be read, ValueError when it is no file.
    """
    digest, size = hashlib.sha256(), 0
    if not stat.S_ISREG(os.stat(to_bytes(path)).st_mode):
        raise ValueError("%s isn't a file" % path)
    with open(to_bytes(path), "rb", buffering=0) as file:
        for block in iter(lambda: file.read(2**20), b""):
            digest.update(block)
            size += len(block)
    return {"path": path, "size": size, "sha256": digest.hexdigest()}


def intact(file):
    """Return whether a file is still as describe() returned it."""
    try:
        size = os.stat(to_bytes(file["path"])).st_size
        return size == file["size"] and describe(file["path"]) == file
    except (OSError, ValueError):
        return False


def await_files(files, lag, ending):
    """Return those of `files` that don't become intact within `lag` seconds.

    A shared file system may show late what another node has written. Returns
    early when the Event `ending` is set.
    """
    end = time.monotonic() + lag
    while True:
        files = [file for file in files if not intact(file)]
        if not files or time.monotonic() >= end or ending.wait(0.2):
            return files


def touched(path):
    """Return a file's size, time and inode, None when it is gone."""
    try:
        found = os.stat(to_bytes(path))
    except (OSError, ValueError):
        return None
    return found.st_size, found.st_mtime_ns, found.st_ino


def output_paths(job, brought):
    """Return the absolute paths of the files that an attempt has made.

    They are those that its result names, else those that the job names, and
    the `filename` that it hands on, if that is a file. Raises OSError when
    our folder is gone, ValueError for a name that no file can have.
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
    with contextlib.suppress(OSError):
        if filename and stat.S_ISREG(os.stat(to_bytes(handed_on)).st_mode):
            paths.append(handed_on)
    return list(dict.fromkeys(paths))


def results(job, brought, paths, inputs):
    """Return the fields of an update: an attempt's results and files.

    Without `paths` the files that the job was given are handed on, unless
    they were changed since `inputs`. Raises OSError or ValueError when one
    of `paths` is missing.
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
    """Return the first of `folders` without free space, None if all have."""
    for folder in folders:
        with contextlib.suppress(OSError, ValueError):
            found = os.statvfs(to_bytes(folder))
            if found.f_blocks and found.f_bavail * found.f_frsize < 2**16:
                return folder
    return None


# -------------------------------------------------------------- log, spool ---


def namespace(jobix):
    """Return a jobix's name in file names, which doesn't reveal it."""
    return hashlib.sha256(b"jobman %d" % int(jobix)).hexdigest()[:12]


def is_ours(owner, folder):
    """Return whether a user id is root's, or that of our files in a folder.

    A network file system may map our id to another.
    """
    if owner in (os.geteuid(), 0):
        return True
    with contextlib.suppress(OSError):
        with tempfile.TemporaryFile(dir=folder) as probe:
            return os.fstat(probe.fileno()).st_uid == owner
    return False


def check_folder(folder):
    """Raise OSError if a folder exists and other users can write to it.

    Results that they leave there would be taken for ours.
    """
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        status = os.stat(folder)
        if status.st_mode & 0o022 or not is_ours(status.st_uid, folder):
            raise OSError(
                "Other users can write to the folder %s: keep jobman's files"
                " in a folder of your own (mkdir -m 700 FOLDER)."
                % folder)


def append_to(path):
    """Open a private file for appending; return its descriptor."""
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
    """Keep the output of all commands of a worker in one file, PATH.out.

    PATH.index says where each piece is: `jobid stage attempt began stream
    offset length` a line, `began` in milliseconds since 1970, stream 1 or 2,
    offset and length in bytes. A piece that can't be written is dropped, and
    `failed(reason)` is called.
    """

    def __init__(self, path, failed):
        check_folder(os.path.dirname(path))
        self.path = path
        self.failed = failed
        self.fds = ()

    def add(self, key, stream, data):
        """Write a piece of output; `key` has the index line's first four."""
        try:
            if not self.fds:
                output = append_to(self.path + ".out")
                self.fds = output, append_to(self.path + ".index")
            output, index = self.fds
            at = os.fstat(output).st_size
            write(output, data)
            write(index, b"%s %d %d %d\n" % (key, stream, at, len(data)))
        except OSError as error:
            self.failed("%s.out can't be written: %s" % (
                self.path, error.strerror or error))


class LoggedOutput:
    """Pass one command's output to the log, up to a limit."""

    def __init__(self, log, key, limit):
        self.log = log
        self.key = key
        self.room = limit
        self.cut = 0

    def take(self, stream, data):
        """Keep `data` from stream 1 or 2."""
        kept = data[: self.room]
        self.room -= len(kept)
        self.cut += len(data) - len(kept)
        if kept:
            self.log.add(self.key, stream, kept)

    def close(self):
        """Note in the log how much was cut."""
        if self.cut:
            note = "\n[worker.py cut %d bytes here: --log-limit]\n" % self.cut
            self.log.add(self.key, 2, note.encode("ascii"))


class PrintedOutput:
    """Hold one command's output until it is printed as a whole."""

    def __init__(self):
        self.files = [tempfile.SpooledTemporaryFile(2**20) for _ in "12"]

    def take(self, stream, data):
        """Keep `data` from stream 1 or 2; raise OSError on a full disk."""
        if self.files:
            self.files[stream - 1].write(data)

    def print(self):
        """Print it; raise BrokenPipeError when nobody reads any more."""
        for kept, stream in zip(self.files, (sys.stdout, sys.stderr)):
            kept.seek(0)
            shutil.copyfileobj(kept, stream.buffer)
            stream.flush()

    def close(self):
        """Free its memory, or its disk space; drop what comes later."""
        for file in self.files:
            with contextlib.suppress(OSError):  # unwritten output
                file.close()
        self.files = []


VERBS = "update", "fail", "release", "reject"  # how an attempt can end

# How a claim's attempt ended: its verb, and `values` that go with it
Outcome = collections.namedtuple("Outcome", "space jobid claim verb values")


def read_outcomes(lines, space):
    """Return the outcomes for a server in a spool file, and if those are all.

    Says which ones are dropped because we can't deliver them.
    """
    found, complete = [], True
    for line in lines:
        outcome = None
        with contextlib.suppress(ValueError, TypeError, RecursionError):
            outcome = Outcome(**json.loads(line.decode("ascii")))
        if outcome is None or outcome.space != space:
            complete = False  # another worker may know it
        elif not (outcome.claim and outcome.verb in VERBS
                  and type(outcome.jobid) is int
                  and type(outcome.values) is dict):
            say("Job %s: its result in the spool is malformed and is dropped."
                % outcome.jobid)
        else:
            found.append(outcome)
    return found, complete


class Spool:
    """Keep undelivered outcomes on disk, one on each line.

    The worker holds a `flock` on its file, PATH. Where locks don't work two
    workers may deliver the same outcome: the server takes it once.
    """

    def __init__(self, folder, name):
        check_folder(folder)
        self.folder = folder
        self.path = os.path.join(folder, name + ".spool")
        self.fd = None
        self.adopted = []  # (path, descriptor, bytes of outcomes for us)

    def add(self, outcomes):
        """Write outcomes to disk; raise OSError if that fails."""
        if not outcomes:
            return
        lines = [json.dumps(outcome._asdict()) + "\n" for outcome in outcomes]
        if self.fd is None:
            new = self.path + ".new"  # not adopted before it is locked
            self.fd = append_to(new)
            self.lock(self.fd)
            os.rename(new, self.path)
        size = os.fstat(self.fd).st_size
        try:
            write(self.fd, "".join(lines).encode("ascii"))
            os.fsync(self.fd)
        except OSError:
            os.ftruncate(self.fd, size)  # a torn line would spoil the next
            raise

    def lock(self, fd):
        """Lock a spool file; return False if a live worker has it."""
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:
            pass  # no locks on this file system
        return True

    def adopt(self, space):
        """Return the outcomes that ended workers have left."""
        found, names = [], []
        with contextlib.suppress(OSError):
            check_folder(self.folder)
            names = sorted(os.listdir(self.folder))
        for name in names:
            path = os.path.join(self.folder, name)
            if name.endswith(".spool") and path != self.path:
                with contextlib.suppress(OSError):  # gone, or not ours
                    found += self.take_over(path, space)
        return found

    def take_over(self, path, space):
        """Return the outcomes in a spool file, [] if its worker lives."""
        fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_NOFOLLOW)
        regular = stat.S_ISREG(os.fstat(fd).st_mode)
        if not (regular and self.lock(fd) and os.fstat(fd).st_nlink):
            os.close(fd)
            return []
        with open(fd, "rb", closefd=False) as file:
            text = file.read()
        size, lines = len(text), text.split(b"\n")[:-1]  # the rest is torn
        found, complete = read_outcomes(lines, space)
        self.adopted.append((path, fd, size if complete else -1))
        return found

    def clear(self):
        """Remove the files whose outcomes have been delivered."""
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


JUDGED = 400, 404, 409, 413  # statuses that refuse an outcome for ever


def deliver_one(client, outcome):
    """Deliver one outcome; return 1, or 0 if the server refuses it."""
    try:
        client.end_claim(outcome.verb + "_job", outcome.jobid, outcome.claim,
                         outcome.values)
        return 1
    except Refused as refused:
        if refused.status not in JUDGED:
            raise
        say("Job %d: %s Dropped." % (outcome.jobid, refused))
        return 0


def deliver(client, outcomes):
    """Deliver the first of a list of outcomes; updates many at a time.

    Returns how many, and how many of them the server took. Raises an
    exception when nothing was judged: the server is away.
    """
    updates = list(itertools.takewhile(
        lambda outcome: outcome.verb == "update", outcomes[:100]))
    if not updates:
        return 1, deliver_one(client, outcomes[0])
    try:
        answers = client.update_jobs(
            [dict(u.values, jobid=u.jobid, claim=u.claim) for u in updates]
        )
    except (Refused, RecursionError) as refused:
        if getattr(refused, "status", 400) not in JUDGED:
            raise
        if len(updates) > 1:  # which one is to blame?
            return deliver(client, outcomes[:1])
        values = {"error": "Its result: %s" % refused}
        return 1, deliver_one(
            client, updates[0]._replace(verb="fail", values=values))
    for answer in answers:
        if answer["status"] != 200:
            say("Job %(jobid)d: its result is too late and is dropped"
                " (%(status)d)." % answer)
    return len(updates), sum(answer["status"] == 200 for answer in answers)


class Claims:
    """Renew the claims of a worker, and deliver how its attempts ended.

    One thread does both on the connection of `client`, which has no
    patience. Outcomes that can't be delivered are kept on disk, in `spool`.
    `about()` returns a heartbeat's report on the worker, and `told(jobid)`
    that on an attempt; `lost(jobid, claim)` is called for a lost claim, and
    `drained(whether)` after each heartbeat.
    """

    LINGER = 0.02  # seconds in which outcomes gather for one call
    LAST = 5  # seconds that the end may take when the server is away

    def __init__(
        self, client, spool, name, lease, *, about, lost, drained,
        told=lambda jobid: None
    ):
        self.client = client
        self.spool = spool
        self.name = name
        self.lease = lease
        self.about = about
        self.told = told
        self.lost = lost
        self.drained = drained
        self.news = threading.Condition()  # guards the next six
        self.held = {}  # jobid: newest token, until its outcome is delivered
        self.fresh = []  # outcomes that have just come
        self.waiting = []  # outcomes in order; only the thread changes it
        self.spooled = 0  # how many of these are on disk
        self.closing = None  # when to give up, in monotonic seconds
        self.next_beat = 0  # when, in monotonic seconds
        self.away = False  # the server: then a heartbeat tries it again
        self.pauses = backoff()
        self.thread = threading.Thread(target=self.work, daemon=True)
        self.thread.start()

    def hold(self, job):
        """Renew the lease of a claimed job from now on."""
        with self.news:
            self.held[job["jobid"]] = job["claim"]

    def holds(self, jobid, claim):
        """Return whether a claim is held, and is the newest of its job."""
        with self.news:
            return self.held.get(jobid) == claim

    def forget(self, jobid, claim):
        """Stop renewing a claim."""
        with self.news:
            if self.held.get(jobid) == claim:
                del self.held[jobid]

    def settle(self, job, verb, **values):
        """Tell the server, soon, how the attempt at a job has ended."""
        space = namespace(job["jobix"])
        outcome = Outcome(space, job["jobid"], job["claim"], verb, values)
        with self.news:
            self.fresh.append(outcome)
            self.news.notify_all()

    def unsafe(self):
        """Return how many outcomes are neither delivered nor on disk."""
        with self.news:
            return len(self.fresh) + len(self.waiting) - self.spooled

    def wait(self):
        """Return when all outcomes are delivered, or at least on disk."""
        with self.news:
            self.news.wait_for(lambda: not self.unsafe())

    def beat_soon(self):
        """Send a heartbeat at once: the worker has news."""
        with self.news:
            self.next_beat = 0
            self.news.notify_all()

    def close(self):
        """Deliver the outcomes, or leave them on disk; beat a last time."""
        with self.news:
            self.closing = time.monotonic() + self.LAST
            if self.away:
                self.next_beat = 0
            self.news.notify_all()
        self.thread.join(self.LAST + 1)
        if self.thread.is_alive():  # the server doesn't answer
            self.client.abort(socket.SHUT_RDWR)
            self.thread.join()
        if self.unsafe():
            say("%s lost: the server can't be reached and %s can't be written."
                % (
                number_of(self.unsafe(), "result"), self.spool.path))
        if not self.away:
            with contextlib.suppress(Trouble):
                self.beat(ended=True)
        self.client.close()

    def work(self):
        """Deliver outcomes and send heartbeats until close()."""
        self.adopt()
        while self.gather():
            if not self.away or time.monotonic() >= self.next_beat:
                self.try_server()
            if self.away and len(self.waiting) > self.spooled:
                self.keep()

    def gather(self):
        """Wait for outcomes, the time of a heartbeat, or close().

        Returns False when all is delivered, or there is no time left for it.
        """
        with self.news:
            if self.closing is not None and not self.fresh and (
                    not self.waiting or time.monotonic() >= self.closing):
                return False
            if self.away or not self.waiting:
                end = min(self.next_beat, self.closing or self.next_beat)
                self.news.wait_for(
                    lambda: self.fresh or not self.next_beat
                    or (self.closing and not self.away),
                    max(0, end - time.monotonic()),
                )
            linger = self.fresh and not self.waiting and not self.closing
        if linger:
            time.sleep(self.LINGER)
        with self.news:
            self.waiting += self.fresh
            self.fresh = []
        return True

    def adopt(self):
        """Take over the spool of workers that have ended."""
        found = self.spool.adopt(namespace(self.client.jobix))
        with self.news:
            self.waiting[:0] = found
            self.spooled += len(found)

    def try_server(self):
        """Beat and deliver; say when the server goes and when it is back."""
        try:
            if time.monotonic() >= self.next_beat:
                self.beat()
            while self.waiting and time.monotonic() < self.next_beat:
                self.drop(deliver(self.client, self.waiting)[0])
        except Exception as error:  # also another program's answer
            if not self.away:
                say("%s Waiting for it." % (str(error) or repr(error)))
            self.away = True
            pause = min(next(self.pauses), self.lease / 3)  # be back in time
            self.next_beat = time.monotonic() + pause
            return
        if not self.waiting:
            self.spool.clear()
        if self.away:
            say("The server is back.")
            self.away, self.pauses = False, backoff()
            self.adopt()

    def drop(self, n):
        """Drop the first `n` outcomes, which have been delivered."""
        with self.news:
            for outcome in self.waiting[:n]:
                self.forget(outcome.jobid, outcome.claim)
            del self.waiting[:n]
            self.spooled = max(0, self.spooled - n)
            self.news.notify_all()

    def keep(self):
        """Write to disk the waiting outcomes that aren't there yet."""
        try:
            self.spool.add(self.waiting[self.spooled :])
        except OSError as error:
            return say("%s can't be written: %s" % (
                self.spool.path, error.strerror or error))
        if not self.spooled:
            say("Results are kept in %s until the server is back."
                % self.spool.folder)
        with self.news:
            self.spooled = len(self.waiting)
            self.news.notify_all()

    def beat(self, **about):
        """Renew all leases; learn which claims are lost, and of a drain."""
        with self.news:
            claims = sorted(self.held.items())
            self.next_beat = time.monotonic() + self.lease / 3
        listed = []
        for jobid, claim in claims:
            news = self.told(jobid)
            listed.append([jobid, claim, news] if news else [jobid, claim])
        answer = self.client.heartbeat(
            self.name, self.lease, listed, **dict(self.about(), **about))
        with self.news:
            pause = min(answer.get("beat", self.lease), self.lease / 3)
            self.next_beat = time.monotonic() + pause
        for jobid, claim in claims:
            if jobid in answer["lost"]:
                self.lost(jobid, claim)
        if not about:  # else it ends
            self.drained(bool(answer.get("drain")))


# ----------------------------------------------------------------- guard ---

ENDING_SIGNALS = (
    signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1,
)
FATAL = [128 + number for number in ENDING_SIGNALS]  # exit statuses


def kill_group(group, number=signal.SIGKILL):
    """Send a signal to a process group, if there is one."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)  # a process may have changed its user


def read_processes(name):
    """Yield (pid, text) of the file /proc/PID/NAME of each process."""
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            with open("/proc/%s/%s" % (pid, name), "rb") as file:
                yield int(pid), file.read()


def running_groups():
    """Return {session: process groups} of all processes but zombies.

    A zombie stays where nobody waits for it, as in a container without init.
    """
    sessions = {}
    for _, text in read_processes("stat"):
        words = text.rpartition(b")")[2].split()
        if words[0] not in b"ZX":
            sessions.setdefault(int(words[3]), set()).add(int(words[2]))
    return sessions


def kill_session(session, number=signal.SIGKILL, running=None):
    """Send a signal to all process groups of a session.

    A shell with job control, or timeout(1), makes groups of its own.
    """
    if running is None:
        running = running_groups()
    for group in {session} | running.get(session, set()):
        kill_group(group, number)


def kill_marked(mark):
    """Kill processes with `mark` in their environment; return how many."""
    killed = 0
    for pid, text in read_processes("environ"):
        if mark in text and pid != os.getpid():
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
                killed += 1
    return killed


def watch_over(pipe, sessions, folder):
    """Kill the commands of a dead worker, and remove its `folder`.

    When the pipe ends, the worker has died, unless it wrote a byte before:
    that is its normal end. A command that it had just started is found by the
    folder, which is in its environment.
    """
    if os.read(pipe, 1):
        return
    for session in filter(None, sessions):
        kill_session(session)
    time.sleep(0.1)  # between fork and exec a process has no mark yet
    while kill_marked(os.fsencode(folder)):
        time.sleep(0.05)
    shutil.rmtree(folder, ignore_errors=True)


class Guard:
    """A small process that kills commands when their worker has died.

    It shares `sessions` with the worker: for each slot the session of its
    command, 0 for none. (A pipe would wake it for each command.) It is
    forked before any thread starts.
    """

    def __init__(self, folder, slots):
        self.shared = mmap.mmap(-1, 8 * slots)
        self.sessions = memoryview(self.shared).cast("q")
        reader, self.pipe = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                self.detach(reader)
                watch_over(reader, self.sessions, folder)
            finally:
                os._exit(0)
        os.close(reader)

    def detach(self, reader):
        """Leave, in the guard, the worker's session, signals and files."""
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
        """End the guard."""
        with contextlib.suppress(BrokenPipeError):
            os.write(self.pipe, b".")
        os.close(self.pipe)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, 0)


# --------------------------------------------------------------- command ---

REMEDIES = {  # what to do about an errno for which a command can't start
    errno.EMFILE: "raise `ulimit -n`, or give fewer --slots",
    errno.ENFILE: "too many files are open on this node",
    errno.EAGAIN: "raise `ulimit -u`, or give fewer --slots",
    errno.ENOMEM: "give fewer --slots",
}


def refuse_constant(name):
    """Refuse NaN and Infinity, which Python accepts but JSON doesn't."""
    raise ValueError("%s is not JSON" % name)


def read_left(path, owner, limit):
    """Return the bytes that a command wrote to a file, b"" without a file.

    Raises ValueError when there are over `limit`, and for a file of another
    user than `owner`.
    """
    try:
        flags = os.O_RDONLY | os.O_NONBLOCK  # it may be a pipe
        with open(os.open(path, flags), "rb") as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise ValueError("it isn't a file")
            if found.st_uid not in (owner, 0):
                raise ValueError("it belongs to another user")
            text = file.read(limit + 1)
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise ValueError(error.strerror) from None
    if len(text) > limit:
        raise ValueError("it is over %d bytes" % limit)
    return text


def read_progress(text):
    """Return a command's progress: [0.4, "epoch 3"] for `0.4 epoch 3`.

    Raises ValueError when it doesn't begin with a number from 0 to 1.
    """
    last = text.decode("utf-8", "replace").strip().rpartition("\n")[2]
    number, *word = last.split(None, 1) or [""]
    part = float(number)
    if not 0 <= part <= 1:
        raise ValueError("it must be from 0 to 1")
    return [part, "".join(word)[:100]]


def read_result(path, owner):
    """Return the result that a command wrote to its result file.

    Raises ValueError when it isn't an object with the known keys, or belongs
    to another user than `owner`.
    """
    text = read_left(path, owner, RESULT_LIMIT)
    if not text.strip():
        return {}
    try:
        result = json.loads(
            text.decode("utf-8", "surrogateescape"),
            parse_constant=refuse_constant,
        )
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    keys = {"filename", "jobcmd", "outputs"}
    if not isinstance(result, dict) or set(result) - keys:
        raise ValueError("it isn't an object with filename, jobcmd or outputs")
    if not isinstance(result.get("filename"), (str, type(None))):
        raise ValueError("its filename isn't a string")
    outputs = result.get("outputs") or []
    if not isinstance(outputs, list) or {type(o) for o in outputs} - {str}:
        raise ValueError("its outputs aren't a list of strings")
    return result


def start_process(argv, environment, cwd, files):
    """Start a process in a session of its own; return its pid.

    `files` are the descriptors of its standard input, output and error.
    Raises OSError when it can't be started. Where posix_spawn can't do it,
    subprocess does, by a fork, which is slow in a large process.
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
    process.returncode = 0  # reap() waits for all children
    return process.pid


def allow_open_files(slots):
    """Raise the soft limit on open files to what `slots` need.

    Raises Trouble where the hard limit is far too low.
    """
    needed = slots * 10 + 100  # pipes, input, output and files that are read
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY:
        if hard < needed - 64:
            raise Trouble("Only %d files may be open, too few: %s." % (
                hard, REMEDIES[errno.EMFILE]))
        needed = min(needed, hard)
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def needs_of(values):
    """Return the cores and the bytes of memory that a job, or a stage, needs.
    """
    return values.get("cores", 1), values.get("memory", 0)


class Attempt:
    """One attempt at a job, from its claim until its outcome is reported."""

    def __init__(self, job):
        self.job = job
        self.cores, self.memory = needs_of(job)
        self.claimed = time.monotonic()
        self.slots = []  # the numbers of those that it has, one for a core
        self.result = None  # the path of its result file
        self.output = None
        self.tail = b""  # the end of its stderr
        self.readers = []  # descriptors of the pipes of its command's
        self.writers = []  # stdout and stderr
        self.pid = None  # of its command, also its session
        self.status = None  # of its command, as a shell gives it
        self.began = self.seconds = None
        self.reason = None  # why it is cut off: timeout, output, lost or end
        self.kill_at = None  # when its remaining processes are killed
        self.inputs = {}  # path: touched(path), of files that were checked
        self.events = []  # of the scheduler

    def key(self):
        """Return the first columns of its lines in the index of the log."""
        job = self.job
        numbers = job["jobid"], job["jobstage"], job["attempt"]
        return b"%d %d %d %d" % (*numbers, time.time() * 1000)

    def environment(self, base):
        """Return the environment of its command: `base`, and its own."""
        job = self.job
        added = {
            "JOBMAN_JOBID": str(job["jobid"]),
            "JOBMAN_STAGE": str(job["jobstage"]),
            "JOBMAN_ATTEMPT": str(job["attempt"]),
            "JOBMAN_FILENAME": job["filename"] or "",
            "JOBMAN_RESULT": self.result,
            "JOBMAN_PROGRESS": self.result + ".progress",
            "JOBMAN_NOTE": self.result + ".note",
            "JOBMAN_CORES": str(self.cores),
            "JOBMAN_MEMORY": str(self.memory or ""),
        }
        if "cores" in job and b"OMP_NUM_THREADS" not in base:
            added["OMP_NUM_THREADS"] = str(self.cores)
        jobcmd = job["jobcmd"]
        if isinstance(jobcmd, dict) and isinstance(jobcmd.get("item"), str):
            added["JOBMAN_ITEM"] = jobcmd["item"]
        environment = dict(base)
        for name, text in added.items():
            environment[name.encode("ascii")] = to_bytes(text)
        return environment

    def start(self, argv, stdin, base):
        """Start its command; `stdin` is the descriptor of its input.

        Raises OSError, or ValueError for words that no command can have.
        Both ends of its pipes stay open here, so nothing ends when the
        command closes them: by then all its output is in the pipe.
        """
        argv, cwd = [to_bytes(word) for word in argv], self.job.get("cwd")
        for _ in "12":
            reader, writer = os.pipe()
            self.readers.append(reader)
            self.writers.append(writer)
            os.set_blocking(reader, False)
        self.began = time.monotonic()
        self.pid = start_process(
            argv, self.environment(base), cwd and to_bytes(cwd),
            (stdin, *self.writers))

    def give_note(self):
        """Put the note of an earlier attempt where its command looks."""
        if self.job.get("note"):
            with open(self.result + ".note", "wb") as file:
                file.write(to_bytes(self.job["note"]))

    def note(self, owner):
        """Return its command's note for the next attempt; raise ValueError.
        """
        text = read_left(self.result + ".note", owner, NOTE_LIMIT)
        return text.decode("utf-8", "surrogateescape")

    def news(self, owner):
        """Return what its command has told by now, for a heartbeat."""
        news = {}
        with contextlib.suppress(ValueError):
            text = read_left(self.result + ".progress", owner, NOTE_LIMIT)
            news["progress"] = read_progress(text)
        with contextlib.suppress(ValueError):
            news["note"] = self.note(owner)
        if not news.get("note"):  # it may be just being written
            news.pop("note", None)
        return news

    def remove_files(self):
        """Remove the files that its command has left for us."""
        for suffix in "", ".progress", ".note":
            with contextlib.suppress(OSError):
                os.unlink(self.result + suffix)

    def read(self, fd):
        """Keep the contents of a pipe; return whether there was any."""
        try:
            data = os.read(fd, 65536)
        except BlockingIOError:
            return False
        stream = self.readers.index(fd) + 1
        if stream == 2:
            self.tail = (self.tail + data)[-STDERR_KEPT:]
        self.output.take(stream, data)
        return True

    def drain(self):
        """Keep all that its command has written: a pipe holds 1 MiB at most.

        A process that left its session may write on for ever.
        """
        for fd in self.readers:
            for _ in range(16):
                if not self.read(fd):
                    break

    def close(self):
        """Close its pipes and its output."""
        for fd in self.readers + self.writers:
            os.close(fd)
        if self.output:
            self.output.close()


# ------------------------------------------------------------ allocation ---


TIME_FORMS = (
    r"(?:(?P<d>\d+)-)?(?P<h>\d+):(?P<m>[0-5]\d):(?P<s>[0-5]\d)",
    r"(?P<d>\d+)-(?P<h>\d+)(?::(?P<m>[0-5]\d))?",
    r"(?:(?P<d>\d+)d)?(?:(?P<h>\d+)h)?(?:(?P<m>\d+)m)?(?:(?P<s>\d+)s)?",
)


def read_span(text):
    """Return the seconds in a time such as 1:00:00, 90s or 2h30m.

    Days come before a hyphen, as in Slurm. A number alone, or two with a
    colon, mean minutes to one batch system, seconds to another and hours to a
    person: ValueError.
    """
    matches = [re.fullmatch(form, text, re.ASCII) for form in TIME_FORMS]
    found = next((match.groupdict() for match in matches if match), {})
    days, hours, minutes, rest = (int(found.get(u) or 0) for u in "dhms")
    span = ((days * 24 + hours) * 60 + minutes) * 60 + rest
    if not 0 < span <= 10**9:
        raise ValueError(
            "%r isn't a time; write 1:00:00, 1-12:00:00, 90s or 2h30m" % text
        )
    return span


def output_of(*command):
    """Return the output of a batch system's command, "" if it fails."""
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
    told = output_of("scontrol", "show", "job", environment["SLURM_JOB_ID"])
    found = re.search(r"\bEndTime=(\d+-\d+-\d+T\d+:\d+:\d+)", told)
    if not found:
        return None
    end = time.strptime(found.group(1), "%Y-%m-%dT%H:%M:%S")
    return time.mktime(end) - time.time()


def pbs_left(environment):
    """Return the seconds left in a PBS allocation, None if unknown.

    Torque prints `Walltime.Remaining`; PBS Pro prints the requested time, and
    when the job started.
    """
    told = output_of("qstat", "-f", environment["PBS_JOBID"])
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


MEMORY_LIMITS = {  # of a cgroup, by its controllers: versions 2 and 1
    "": "/sys/fs/cgroup%s/memory.max",
    "memory": "/sys/fs/cgroup/memory%s/memory.limit_in_bytes",
}


def memory_limit(environment):
    """Return the bytes of memory that we may use.

    That is the least of what the machine has, Slurm gave, and the cgroups
    that we are in allow.
    """
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    given = environment.get("SLURM_MEM_PER_NODE", "")
    if given.isdigit() and int(given):
        limits.append(int(given) * 2**20)
    with contextlib.suppress(OSError), open("/proc/self/cgroup") as groups:
        for line in groups:
            _, controllers, path = line.rstrip("\n").split(":", 2)
            name = MEMORY_LIMITS.get(controllers)
            while name and path is not None:  # those around it, too
                with contextlib.suppress(OSError, ValueError), open(
                        name % path) as file:
                    limits.append(int(file.read()))  # or "max"
                path = path.rpartition("/")[0] if path else None
    return min(limits)


# --------------------------------------------------------------- claimer ---


class NodeCheck:
    """Tell a bad node from bad jobs when several jobs fail here in a row.

    Three different jobs that fail fast, one after another, make the node
    suspect. The server knows how attempts at these jobs end elsewhere: if
    they succeed, the node is bad; if they fail, the jobs are bad. When that
    isn't known in time, a few more jobs are claimed.
    """

    ENOUGH = 3  # jobs that fail here in a row and are done elsewhere
    KEPT = 10  # failed jobs that are looked up
    FAST = 10  # seconds
    HEARD = 120  # seconds without a heartbeat until a worker is ignored
    PATIENCE = 15  # seconds for which a suspect node claims nothing

    def __init__(self, client, name, stages):
        self.client = client
        self.name = name
        self.stages = stages
        self.failed = {}  # jobid: stage
        self.fresh = set()  # those not yet waited for

    def record(self, job, failed, seconds):
        """Record how an attempt ended here, and how long it took."""
        if not failed:
            self.trust()
        elif seconds < self.FAST:
            self.fresh.add(job["jobid"])
            self.failed[job["jobid"]] = job["jobstage"]
            if len(self.failed) > self.KEPT:
                del self.failed[next(iter(self.failed))]

    def suspect(self):
        """Return whether the node is suspect."""
        return len(self.fresh & set(self.failed)) >= self.ENOUGH

    def trust(self):
        """Trust the node again: the jobs are bad."""
        self.failed.clear()
        self.fresh.clear()

    def await_verdict(self, ending):
        """Wait while the node is suspect; return why it is bad, or None.

        Returns early when the Event `ending` is set.
        """
        end = time.monotonic() + self.PATIENCE
        while self.suspect() and not ending.is_set():
            done = self.count_done_elsewhere()
            if done >= self.ENOUGH:
                return ("%d jobs in a row failed here and were done elsewhere"
                        % done)
            if time.monotonic() > end:
                self.fresh.clear()
            elif self.suspect():
                ending.wait(1)
        return None

    def count_done_elsewhere(self):
        """Return how many of the failed jobs were done by other workers.

        Jobs that fail elsewhere, too, are forgotten. A job done before it
        failed here proves nothing about the node: its command or its input
        may have changed.
        """
        told = self.client.workers()
        if not any(other["name"] != self.name and not other["quarantine"]
                   and told["time"] - other["heard"] < self.HEARD
                   and set(other["stages"] or ()) & set(self.stages)
                   for other in told["workers"]):
            self.trust()  # no other worker can try them
        done = 0
        for jobid, stage in list(self.failed.items()):
            outcomes = set()
            for attempt in self.client.job(jobid)["attempts"]:
                if attempt["worker"] == self.name:
                    outcomes.discard("done")
                elif attempt["stage"] == stage:
                    outcomes.add(attempt["outcome"])
            if "done" in outcomes:
                done += 1
            elif "failed" in outcomes:
                self.failed.pop(jobid, None)
        return done


def find_stages(client, stages):
    """Return {number: what it was given} of stages, by number or name.

    Raises Trouble for a name that no stage has.
    """
    client.tell = say  # the server may not be there yet
    known = client.stages()
    client.tell = None
    numbers = {values.get("name"): number for number, values in known.items()}
    for stage in stages:
        if isinstance(stage, str) and stage not in numbers:
            raise Trouble("No stage has the name %s." % stage)
    found = [numbers.get(stage, stage) for stage in stages]
    return {number: known.get(number, {}) for number in found}


class Claimer:
    """Claim jobs for a worker. `busy()` returns whether it has work."""

    LONGEST_WAIT = 30  # seconds of a long poll
    FRESH = 15  # seconds for which known run times are good

    def __init__(self, options, client, name, busy):
        self.options = options
        self.client = client
        self.name = name
        self.busy = busy
        known = find_stages(client, options.stage)
        self.names = {n: values.get("name") for n, values in known.items()}
        self.needs = {n: needs_of(values) for n, values in known.items()}
        self.stages = sorted(known, reverse=True)
        for stage in filter(self.too_large, self.stages):
            say("Stage %s is left to others: each job needs %s." % (
                self.label(stage), self.too_large(stage)))
        self.check = NodeCheck(client, name, self.stages)
        self.run_times = {}  # stage: seconds that most of its commands need
        self.looked = None  # when these were fresh
        self.drained = False  # claim nothing for now
        self.idle = False  # whether it ended because it was idle
        self.bad = None  # why the node is bad
        self.told = None  # why it isn't idle
        self.ending = threading.Event()

    def set_drained(self, drained):
        """Claim nothing while the server says so."""
        if drained != self.drained and not self.ending.is_set():
            self.drained = drained
            say("Drained: it claims no more jobs for now." if drained
                else "Undrained: it claims jobs again.")

    def label(self, stage):
        """Return a stage's name, else its number, as text."""
        return self.names.get(stage) or str(stage)

    def too_large(self, stage):
        """Return why no job of a stage fits here, None if they do."""
        cores, memory = self.needs[stage]
        slots, most = self.options.slots, self.options.memory
        if slots is not None and cores > slots:
            return "%d cores, more than --slots %d" % (cores, slots)
        if most is not None and memory > most:
            return "%.4g GiB, more than --memory %.4g GiB" % (
                memory / 2**30, most / 2**30)
        return None

    def claim(self, n, wait):
        """Return up to `n` jobs; [] if there are none, None to end."""
        since, least = time.monotonic(), 0  # a poll's least wait, in seconds
        while not self.ending.is_set():
            self.bad = self.check.await_verdict(self.ending)
            stages = not self.bad and self.stages_in_time()
            if not stages or self.ending.is_set():
                return None
            left = since + self.options.idle_timeout - time.monotonic()
            longest = min(self.LONGEST_WAIT, max(left, least)) if wait else 0
            jobs = self.ask(stages, n, round(longest, 3))
            if jobs or not wait:
                return jobs
            now, busy = time.monotonic(), self.busy()
            if not busy and now >= since + self.options.idle_timeout:
                coming = None if self.drained else self.coming()
                if coming is None:  # a job may have come free just before
                    jobs = self.ask(stages, n, 0)
                    self.idle = not jobs
                    return jobs or None
                if coming != self.told and not self.options.quiet:
                    self.told = coming
                    say("Nothing to do yet: %s." % coming)
                busy = True
            if busy:
                since, least = now, 0.2
        return None

    def ask(self, stages, n, wait):
        """Make one call; return its jobs."""
        if self.drained:
            self.ending.wait(min(wait, 1))
            return []
        began = time.monotonic()
        jobs = self.client.get(
            stages, worker=self.name, lease=self.options.lease, n=n, wait=wait,
            cores=self.options.slots, memory=self.options.memory)
        if not jobs and time.monotonic() - began < wait:  # too many wait there
            self.ending.wait(random.uniform(0.1, 1))
        return jobs

    def reached_from(self, stage):
        """Return our stages that a job comes to, by and by, from `stage`."""
        return [ours for ours in self.stages
                if ours >= stage and (ours - stage) % 2 == 0
                and not self.too_large(ours)]

    def coming(self):
        """Return why jobs may still come to our stages, None if they won't.

        One may wait for its time. One may run in an earlier stage, on a worker
        that doesn't serve the next one. Or its worker is silent, so that the
        job may come back.
        """
        for row in self.client.status()["stages"]:
            if row["states"]["delayed"] and self.reached_from(row["stage"]):
                return "jobs in stage %s are delayed" % (
                    row["name"] or row["stage"])
        told = self.client.workers()
        silent = told["time"] - 0.4 * self.options.lease  # > a third: see beat
        serving = {
            other["name"]: set(other["stages"] or ())
            for other in told["workers"] if other["heard"] > silent
            and other["name"] != self.name}  # we run none: a claim was lost
        jobs = self.client.jobs(state="working", limit=1000)["jobs"]
        for job in jobs:
            served = serving.get(job["worker"])
            claimed, last = job["stage"] - 1, job["laststage"]
            if job["due"] is not None and any(
                    (last is None or last > stage) and (
                        served is None
                        or (stage > claimed and stage not in served))
                    for stage in self.reached_from(claimed)):
                return "job %d runs on %s%s" % (
                    job["jobid"], job["worker"] or "an unnamed worker",
                    ", which is silent" if served is None else "")
        return None

    def stages_in_time(self):
        """Return the stages whose commands mostly end before our time does."""
        if self.options.until is None:
            return self.stages
        now = time.monotonic()
        if self.looked is None or now > self.looked + self.FRESH:
            self.looked = now
            self.run_times = {
                stage["stage"]: stage["runtime"]["p90"]
                for stage in self.client.status()["stages"]
                if stage.get("runtime")
            }
        left = self.options.until - now
        stages = [s for s in self.stages if self.run_times.get(s, 0) <= left]
        if not stages:
            say("No job is known to be short enough for the %s seconds that"
                " are left." % int(max(0, left)))
        return stages


# ---------------------------------------------------------------- worker ---


def own_name():
    """Return a worker's default name: host, batch job if any, process id."""
    words = [socket.gethostname()]
    for variable, system in ("SLURM_JOB_ID", "slurm"), ("PBS_JOBID", "pbs"):
        if os.environ.get(variable):
            words.append(system + os.environ[variable].partition(".")[0])
    return "-".join([*words, str(os.getpid())])


def beside(access, folder):
    """Return the path of a folder next to the access file."""
    return os.path.join(os.path.dirname(os.path.abspath(access)), folder)


def file_name(name, jobix):
    """Return a name for a worker's files that no other worker has had."""
    plain = re.sub(r"[^\w.-]", "_", name, flags=re.A)[:100]
    return "%s.%s.%s" % (plain, namespace(jobix), secrets.token_hex(4))


class Interrupted(Exception):
    """End the printing of output by a signal."""


class Worker:
    """Run the commands of jobs side by side, in slots.

    All that happens to an attempt happens in one loop, in the main thread,
    which calls run(). Other threads claim, report and read files; they reach
    the loop by call(). `options` are those of the command line, see parse().
    """

    SECRETS = "jobix", "claim"  # of a job, which its command isn't told
    MOST_AHEAD = 200  # jobs claimed for slots that aren't idle yet
    HELD = 1  # seconds after which these are given back
    KEPT = 60  # seconds for which slots are kept idle for a large job
    GRACE = 5  # seconds between TERM and KILL for a command that is cut off
    NAMED = 10  # failed jobs named at the end

    def __init__(self, options):
        self.options = options
        self.name = options.name or own_name()
        client = Client(options.access, patience=None)
        self.claimer = Claimer(options, client, self.name, self.busy)
        self.wanted = queue.Queue()  # arguments of Claimer.claim
        self.files = file_name(self.name, client.jobix)
        self.log = None
        if not options.print:
            logs = options.logs or beside(client.access, "logs")
            self.log = OutputLog(
                os.path.join(logs, self.files), self.put_in_quarantine)
        self.environment = dict(os.environb)
        self.environment.pop(b"JOBMAN_JOBIX", None)  # the secret
        self.null = open(os.devnull, "rb")
        self.idle = list(range(options.slots))  # slots without a command
        self.memory = options.memory  # bytes that no command needs
        self.streams = {}  # descriptor: Attempt, of commands' output
        self.ready = collections.deque()  # attempts that wait for a slot
        self.attempts = {}  # jobid: Attempt, from its claim to its outcome
        self.running = {}  # process id: Attempt
        self.numbers = itertools.count()  # of result files
        self.inbox = collections.deque()  # what other threads call
        self.schedule = sched.scheduler(time.monotonic, time.sleep)
        self.delay = None  # seconds until the next event
        self.status = 0  # exit status
        self.why = None  # why it ends
        self.printing = self.eof = self.draining = self.scarce = False
        self.hasty = False  # kill what runs, and end
        self.quarantine = None  # why the node is bad
        self.done = self.failed = 0  # attempts
        self.failures = {}  # jobid: True, of jobs whose last attempt failed
        self.claiming, self.asking = True, False
        self.ahead = 0  # jobs to claim for slots that aren't idle yet
        self.received = 0  # when claims came last

    def busy(self):
        """Return whether there is work, or an outcome that may free a job."""
        return bool(self.attempts or self.claims.unsafe())

    def run(self):
        """Work until there is nothing left to do, or a signal ends it.

        Returns the exit status.
        """
        self.make_folder(tempfile.gettempdir(), "jobman-")
        self.guard = Guard(self.folder, self.options.slots)  # no thread yet
        self.prepare()
        self.inform("%s serves %s %s of %s with %s" % (
            self.name, "stages" if len(self.claimer.stages) > 1 else "stage",
            ", ".join(map(self.claimer.label, self.claimer.stages)),
            self.claimer.client.url, number_of(self.options.slots, "slot")))
        try:
            while self.turn():
                self.wait()
        finally:
            self.finish()
        self.inform(self.summary())
        return self.status

    def inform(self, line):
        """Say a line, unless --quiet."""
        if not self.options.quiet:
            say(line)

    def summary(self):
        """Return a line on the jobs done, and why the worker ends."""
        line = number_of(self.done, "job") + " done"
        if self.failures:
            ids = list(map(str, self.failures))
            line += ", %d failed (%s%s)" % (
                len(ids), ", ".join(ids[: self.NAMED]),
                ", …" if len(ids) > self.NAMED else "")
        if self.why is None and self.claimer.idle:
            self.why = "idle for %g s" % self.options.idle_timeout
        return line + (", " + self.why if self.why else "")

    def make_folder(self, place, prefix):
        """Make the folder where commands leave their results."""
        self.folder = tempfile.mkdtemp(prefix=prefix, dir=place)
        self.owner = os.stat(self.folder).st_uid  # ids may be mapped

    def prepare(self):
        """Handle signals, and start the other threads."""
        self.wake, self.waker = os.pipe()
        for fd in (self.wake, self.waker):
            os.set_blocking(fd, False)
        self.poll = select.poll()
        self.poll.register(self.wake, select.POLLIN)
        allow_open_files(self.options.slots)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self.waker)
        for number in ENDING_SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
                signal.signal(number, self.signalled)
        client = Client(self.options.access, patience=0)
        spool = self.options.spool or beside(client.access, "spool")
        self.claims = Claims(
            client, Spool(spool, self.files),
            self.name, self.options.lease, about=self.about, told=self.told,
            lost=lambda *claim: self.call(  # the job may be coming back
                self.schedule.enter, 1, 0, self.give_up, claim),
            drained=lambda whether: self.call(self.set_drained, whether),
        )
        threading.Thread(target=self.claim, daemon=True).start()
        if self.options.until_eof:
            threading.Thread(target=self.end_at_eof, daemon=True).start()
        if self.options.until is not None:
            left = max(0, self.options.until - time.monotonic())
            self.schedule.enter(
                left, 0, self.drain, (signal.SIGTERM, 0, "its time is over"))

    def signalled(self, number, _):
        """Drain, in the loop. SIGUSR1 only asks us to end; it is no failure.

        https://slurm.schedmd.com/sbatch.html, --signal
        """
        status = 0 if self.eof or number == signal.SIGUSR1 else 128 + number
        why = "ended by " + signal.Signals(number).name
        self.call(self.drain, number, status, why)
        if self.printing:
            raise Interrupted

    def end_at_eof(self):
        """Drain when standard input ends, with the program at its other end.
        """
        while os.read(sys.stdin.fileno(), 4096):
            pass
        self.eof = True
        os.kill(os.getpid(), signal.SIGTERM)

    def call(self, function, *args):
        """Call a function in the loop, from any thread or signal handler."""
        self.inbox.append((function, args))
        with contextlib.suppress(BlockingIOError):  # it is awake then
            os.write(self.waker, b".")

    def about(self):
        """Return a heartbeat's report on the worker."""
        return {
            "host": socket.gethostname(), "stages": self.claimer.stages,
            "slots": self.options.slots, "memory": self.options.memory,
            "busy": len(self.running), "done": self.done,
            "failed": self.failed, "quarantine": self.quarantine,
        }

    def told(self, jobid):
        """Return what an attempt's command has told by now, None without one.
        """
        attempt = self.attempts.get(jobid)
        if attempt and attempt.began:
            return attempt.news(self.owner) or None
        return None

    def turn(self):
        """Take the steps that can be taken now; return False at the end."""
        while self.inbox:
            function, args = self.inbox.popleft()
            function(*args)
        self.reap()
        self.schedule.run(blocking=False)  # it may free slots
        self.fill_slots()
        self.ask()
        self.delay = self.schedule.run(blocking=False)
        return not self.hasty and (self.claiming or bool(self.attempts))

    def wait(self):
        """Wait for an event, or a time; read what commands print."""
        delay = 3600 if self.delay is None else min(self.delay, 3600)
        if self.inbox:
            delay = 0
        for fd, _ in self.poll.poll(delay * 1000):
            if fd == self.wake:
                with contextlib.suppress(BlockingIOError):
                    os.read(fd, 65536)
            else:
                attempt = self.streams[fd]
                try:
                    attempt.read(fd)
                except OSError as error:
                    self.fail_output(attempt, error)

    def fail_output(self, attempt, error):
        """Fail an attempt whose output can't be kept: the disk is full."""
        attempt.output.close()
        attempt.error = "its output can't be kept in %s: %s" % (
            tempfile.gettempdir(), error.strerror)
        self.cut_off(attempt, "output", signal.SIGTERM, self.GRACE)
        attempt.reason = attempt.reason or "output"

    def finish(self):
        """Report the last outcomes, and end the rest."""
        if self.hasty:
            self.claims.LAST = 1
        for attempt in self.running.values():  # after a fault, or in haste
            kill_session(attempt.pid)
        for attempt in list(self.attempts.values()):
            self.tell(attempt, "release")
        self.claims.close()
        self.guard.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    # Claims come

    def rooms(self, cores, memory):
        """Return how many jobs with such needs could begin now."""
        rooms = len(self.idle) // cores
        return min(rooms, self.memory // memory) if memory else rooms

    def ask(self):
        """Ask for jobs: for the room that there is, and some ahead.

        Twice as many as the last time are asked for ahead if these lasted
        for less than a tenth of a second, half as many if they lasted long.
        """
        if self.asking or not self.claiming or self.claimer.ending.is_set():
            return
        if self.idle and self.ready:  # the first one waits for room
            return
        found = [self.rooms(*self.claimer.needs[stage])
                 for stage in self.claimer.stages]
        # if all are too large ask for one: what they need may have changed
        rooms = min(filter(None, found), default=int(not self.attempts))
        if rooms or len(self.ready) * 2 < self.ahead:
            lasted = time.monotonic() - self.received
            if lasted < 0.1:
                self.ahead = min(self.MOST_AHEAD, self.ahead * 2 + 1)
            elif lasted > 0.3:
                self.ahead //= 2
            n = rooms + self.ahead - len(self.ready)
            if n > 0:
                self.asking = True
                self.wanted.put((n, bool(rooms)))

    def claim(self):
        """Claim, in a thread of its own, what is wanted until the end."""
        jobs = ()
        while jobs is not None:
            try:
                jobs = self.claimer.claim(*self.wanted.get())
            except Unreachable:  # only after the end
                jobs = None
            except Exception as error:
                say(str(error) or repr(error))
                self.call(self.drain, signal.SIGTERM, 1, None)
                jobs = None
            self.call(self.receive, jobs)

    def receive(self, jobs):
        """Take claimed jobs; None: there will be no more."""
        self.asking = False
        self.received = time.monotonic()
        if jobs is None:
            self.claiming = False
            if self.claimer.bad:
                self.put_in_quarantine(self.claimer.bad)
        if not jobs:
            self.ahead = 0
        for job in jobs or ():
            self.claims.hold(job)
            self.claimer.needs[job["jobstage"]] = needs_of(job)
            attempt = self.attempts.get(job["jobid"])
            if attempt:  # a lapse has brought our own job back to us
                self.take_up(attempt, job)
            else:
                attempt = self.attempts[job["jobid"]] = Attempt(job)
                self.ready.append(attempt)
        if self.claimer.ending.is_set() or self.claimer.drained:
            self.give_back()
        elif self.ready:
            self.schedule.enter(self.HELD, 0, self.give_back, (self.HELD,))

    def take_up(self, attempt, job):
        """Go on with an attempt under a new claim of its job.

        If the job has changed meanwhile its command is cut off.
        """
        keys = "jobstage", "jobcmd", "filename", "files"
        if any(attempt.job.get(key) != job.get(key) for key in keys):
            self.cut_off(attempt, "end", signal.SIGTERM, self.GRACE)
            attempt.reason = "end"
        elif attempt.reason == "lost":
            attempt.reason = "end"
        attempt.job = job

    def give_back(self, held=0):
        """Release the claims that have waited so many seconds for room.

        The first one keeps its place while idle slots, too few, wait for it,
        but not for ever: another worker may have room.
        """
        latest, kept = time.monotonic() - held, 0
        if held == self.HELD and self.idle and self.ready:
            kept = 1
            self.schedule.enter(self.KEPT, 0, self.give_back, (self.KEPT,))
        while len(self.ready) > kept and self.ready[kept].claimed <= latest:
            attempt = self.ready[kept]
            del self.ready[kept]
            self.ahead = 0
            self.tell(attempt, "release")

    def stop_claiming(self):
        """Claim no more, and release the jobs that haven't begun."""
        if not self.claimer.ending.is_set():
            self.claimer.ending.set()
            self.wanted.put((0, False))
            self.claimer.client.abort()
        self.schedule.enter(1, 0, self.claimer.client.abort,
                            (socket.SHUT_RDWR,))
        self.give_back()

    # Commands begin

    def fill_slots(self):
        """Begin attempts while there is room, in the order of their claims.

        So small jobs never keep a large one waiting.
        """
        while self.ready and self.rooms(
                self.ready[0].cores, self.ready[0].memory):
            attempt = self.ready.popleft()
            attempt.slots = [self.idle.pop() for _ in range(attempt.cores)]
            self.memory -= attempt.memory
            files = attempt.job.get("files")
            if files and attempt.job.get("made") != attempt.job["jobstage"]:
                self.in_thread(
                    self.checked, attempt, await_files, files,
                    self.options.lag, self.claimer.ending,
                )
            else:
                self.launch(attempt)

    def in_thread(self, then, attempt, work, *args):
        """Do `work(*args)` in a thread, then call `then(attempt, result)`.

        The result is an exception if there was one. It is dropped if the
        attempt has ended meanwhile, or is cut off.
        """

        def go_on(found):
            if self.attempts.get(attempt.job["jobid"]) is not attempt:
                return
            if attempt.reason:
                self.conclude(attempt)
            else:
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

        When the worker ends they had less than their time to come.
        """
        if self.claimer.ending.is_set():
            self.end(attempt, "release")
        elif isinstance(bad, Exception):
            self.end(attempt, "fail", error="worker.py has a fault: %r" % bad)
        elif bad:
            error = CHANGED % ", ".join(file["path"] for file in bad)
            say("Job %d: %s" % (attempt.job["jobid"], error))
            self.end(attempt, "reject", error=error)
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
        try:
            attempt.output = (
                LoggedOutput(self.log, attempt.key(), self.options.log_limit)
                if self.log else PrintedOutput())
            attempt.result = self.new_result()
            attempt.give_note()
            with contextlib.ExitStack() as stack:
                stdin = self.null
                if given:
                    stdin = stack.enter_context(tempfile.TemporaryFile())
                    stdin.write(given)
                    stdin.seek(0)
                attempt.start(argv, stdin.fileno(), self.environment)
        except (OSError, ValueError) as error:
            return self.not_started(attempt, error)
        for fd in attempt.readers:
            self.streams[fd] = attempt
            self.poll.register(fd, select.POLLIN)
        self.guard.sessions[attempt.slots[0]] = attempt.pid
        self.running[attempt.pid] = attempt
        if attempt.job.get("timeout"):
            attempt.events.append(self.schedule.enter(
                attempt.job["timeout"], 0, self.cut_off,
                (attempt, "timeout", signal.SIGTERM, self.GRACE),
            ))

    def new_result(self):
        """Return a path for a result file that no other attempt has had.

        A command, or a cleaner of /tmp, may have removed our folder, and
        another user made one of its name: then we make one of another name.
        """
        place, name = os.path.split(self.folder)
        try:
            ours = os.stat(self.folder).st_uid == self.owner
        except FileNotFoundError:
            ours = False
        if not ours:
            self.make_folder(place, name + ".")  # the guard's mark stays
        return os.path.join(self.folder, "result-%d" % next(self.numbers))

    def command(self, job):
        """Return a job's command as argv, and its input, as bytes.

        Raises ValueError when it has none.
        """
        if self.options.command is not None:
            shown = {name: value for name, value in job.items()
                     if name not in self.SECRETS}
            given = json.dumps(shown).encode("ascii")
            return ["/bin/sh", "-c", self.options.command], given
        jobcmd = job["jobcmd"]
        if isinstance(jobcmd, dict) and isinstance(jobcmd.get("steps"), dict):
            if str(job["jobstage"]) not in jobcmd["steps"]:
                raise ValueError(
                    "The job has no command for stage %d; start the worker"
                    " with --command, or with --stage for the stages that have"
                    " one: %s" % (job["jobstage"], ", ".join(jobcmd["steps"])))
            jobcmd = jobcmd["steps"][str(job["jobstage"])]
        if isinstance(jobcmd, str):
            return ["/bin/sh", "-c", jobcmd], b""
        words = isinstance(jobcmd, list) and jobcmd
        if words and all(isinstance(word, str) for word in words):
            return words, b""
        raise ValueError(
            "The job's jobcmd isn't a command; start the worker with --command"
            " to give it one."
        )

    def not_started(self, attempt, error):
        """End an attempt whose command can't be started."""
        number = getattr(error, "errno", None)
        if number in (errno.ENOSPC, errno.EDQUOT):
            self.put_in_quarantine("no room is left in %s"
                                   % tempfile.gettempdir())
        status = 127 if number == errno.ENOENT else 126
        if number in REMEDIES:
            status, error = TEMPFAIL, "%s: %s" % (error, REMEDIES[number])
            if not self.scarce:
                self.scarce = True
                say("A command can't be started: %s." % error)
        self.end(attempt, "fail", error=str(error), exit_code=status)

    # Commands end

    def cut_off(self, attempt, reason, number, grace, running=None):
        """End a command: by a signal to its session, and KILL after `grace`.

        Not one that has ended: its number may be another's by now.
        """
        if attempt.reason is None and attempt.pid in self.running:
            attempt.reason = reason
            attempt.kill_at = time.monotonic() + grace
            kill_session(attempt.pid, number, running)
            attempt.events.append(self.schedule.enter(
                grace, 0, kill_session, (attempt.pid,)))

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
            os.waitpid(found.si_pid, 0)
            if attempt:
                killed = found.si_code != os.CLD_EXITED
                attempt.status = found.si_status + 128 * killed
                self.exited(attempt)

    def exited(self, attempt):
        """Go on with an attempt whose command has ended.

        If it was cut off, what else runs in its session has its time, too.
        """
        if attempt.reason:
            running = running_groups()
            if (time.monotonic() < attempt.kill_at
                    and attempt.pid in running):
                attempt.events.append(
                    self.schedule.enter(0.2, 0, self.exited, (attempt,)))
                return
            kill_session(attempt.pid, signal.SIGKILL, running)
        del self.running[attempt.pid]
        self.guard.sessions[attempt.slots[0]] = 0
        try:
            attempt.drain()
        except OSError as error:
            self.fail_output(attempt, error)
        attempt.seconds = time.monotonic() - attempt.began
        if attempt.reason or attempt.status:
            self.conclude(attempt)
        else:
            self.collect(attempt)

    def collect(self, attempt):
        """Read the results of a command that succeeded."""
        try:
            brought = read_result(attempt.result, self.owner)
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
            self.in_thread(self.collected, attempt, results, *found)
        else:
            self.collected(attempt, results(*found))

    def collected(self, attempt, brought):
        """End an attempt that has done its work."""
        if isinstance(brought, Exception):
            self.end(attempt, "fail", error="An output is missing: %s"
                     % brought)
        else:
            self.end(attempt, "update", exit_code=0,
                     jobstage=attempt.job["jobstage"] + 2, **brought)

    def conclude(self, attempt, *, waited=False):
        """End an attempt that failed or was cut off.

        A batch system may send the signal that ends us to the commands, too,
        and they may die before we get it: so wait a second for it.
        """
        fatal = attempt.status in FATAL and not attempt.reason
        if fatal and not (waited or self.draining):
            attempt.events.append(self.schedule.enter(
                1, 0, self.conclude, (attempt,), {"waited": True}))
        elif attempt.reason == "lost":
            self.end(attempt, None)
        elif attempt.reason == "timeout":
            self.end(attempt, "fail", exit_code=TIMED_OUT, error="not done"
                     " after %g seconds" % attempt.job["timeout"])
        elif attempt.reason == "output":
            self.end(attempt, "fail", error=attempt.error)
        elif attempt.reason or self.draining:
            self.end(attempt, "release")
        else:
            whose = "" if self.options.command is None else \
                " of the worker's --command %s" % self.options.command
            self.end(attempt, "fail", exit_code=attempt.status,
                     error="exit status %d%s" % (attempt.status, whose))

    def end(self, attempt, verb, **values):
        """End an attempt: print its output, then report its outcome."""
        for event in attempt.events:
            with contextlib.suppress(ValueError):
                self.schedule.cancel(event)
        for fd in attempt.readers:
            if self.streams.pop(fd, None):
                self.poll.unregister(fd)
        if verb == "fail":
            verb = self.judge_failure(attempt, values)
        if verb in ("fail", "update"):
            if attempt.output:
                values["stderr"] = attempt.tail.decode("utf-8", "replace")
            if attempt.seconds is not None:
                values["seconds"] = round(attempt.seconds, 3)
            if self.options.print and attempt.output:
                verb = verb if self.print(attempt) else "release"
        if verb == "release":
            values = {}
        if attempt.result:
            if verb in ("fail", "release") and attempt.began:
                try:
                    values["note"] = attempt.note(self.owner)
                except ValueError as error:
                    say("Job %d: JOBMAN_NOTE can't be used: %s." % (
                        attempt.job["jobid"], error))
            attempt.remove_files()
        attempt.close()
        self.tell(attempt, verb, **values)

    def print(self, attempt):
        """Print a command's output; return whether that worked.

        An attempt whose output wasn't printed isn't done.
        """
        try:
            self.printing = True
            attempt.output.print()
            self.printing = False
            return True
        except Interrupted:
            return False
        except BrokenPipeError:
            null = os.open(os.devnull, os.O_WRONLY)
            for stream in (sys.stdout, sys.stderr):
                os.dup2(null, stream.fileno())
            self.call(self.drain, signal.SIGTERM, 128 + signal.SIGPIPE, None)
        except OSError as error:
            say("The output of commands can't be written: %s" % error)
            self.call(self.drain, signal.SIGTERM, 1, None)
        finally:
            self.printing = False
        return False

    def judge_failure(self, attempt, values):
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
        self.ahead = 0
        self.claimer.check.record(
            attempt.job, failed=True, seconds=attempt.seconds or 0)
        if self.claimer.check.suspect():
            self.give_back()
        return "fail"

    def tell(self, attempt, verb, **values):
        """Report the attempt's outcome, and free its slot."""
        job = attempt.job
        if verb is None:
            self.claims.forget(job["jobid"], job["claim"])
        else:
            self.claims.settle(job, verb, **values)
        del self.attempts[job["jobid"]]
        if attempt.slots:
            self.idle += attempt.slots
            self.memory += attempt.memory
        if verb == "update":
            self.claimer.check.record(job, failed=False, seconds=0)
            self.done += 1
            self.failures.pop(job["jobid"], None)
        elif verb == "fail":
            self.failed += 1
            self.failures[job["jobid"]] = True
            if not self.options.quiet and sys.stderr.isatty():
                last = values.get("stderr", "").strip().rpartition("\n")[2]
                say("Job %d failed in stage %s: %s" % (
                    job["jobid"], self.claimer.label(job["jobstage"]),
                    ": ".join(filter(None, [values.get("error"), last]))))

    # The worker ends

    def give_up(self, jobid, claim):
        """Kill the command of a lost claim, unless a newer one is held."""
        attempt = self.attempts.get(jobid)
        if attempt is None or not self.claims.holds(jobid, claim):
            return
        if attempt.reason is None:
            say("Job %d: its claim is lost." % jobid)
        if attempt.pid in self.running:
            self.cut_off(attempt, "lost", signal.SIGTERM, self.GRACE)
        elif attempt in self.ready:
            self.ready.remove(attempt)
            self.tell(attempt, None)
        else:
            attempt.reason = "lost"

    def set_drained(self, drained):
        """Claim nothing while drained; running commands go on."""
        self.claimer.set_drained(drained)
        if drained:
            self.give_back()

    def drain(self, number, status, why):
        """Claim no more, signal running commands, and release their jobs.

        A second SIGINT kills it at once.
        """
        if self.draining:
            self.hasty |= number == signal.SIGINT
            return
        self.draining = True
        self.status = self.status or status
        self.why = why
        self.stop_claiming()
        running = running_groups()
        for attempt in list(self.running.values()):
            self.cut_off(attempt, "end", number, self.options.grace, running)
        self.schedule.enter(self.options.grace, 0, self.release_idle)

    def release_idle(self):
        """Give back the claims whose files are being read."""
        for attempt in list(self.attempts.values()):
            if attempt.pid not in self.running:
                self.end(attempt, "release")

    def put_in_quarantine(self, reason):
        """Claim no more: this node is bad. Running commands may end."""
        if self.quarantine is None:
            self.quarantine = reason
            self.why = "in quarantine"
            self.status = self.status or QUARANTINED
            say("In quarantine: %s." % reason)
            self.stop_claiming()
            self.claims.beat_soon()


# --------------------------------------------------------------- library ---


class Job:
    """A claimed job, for a program that does the work itself.

    It has `jobid`, `stage`, `jobcmd`, `filename` and `attempt`. `lost` is True
    once the claim is lost, until the attempt ends. In a `with` statement an
    exception fails the attempt and is not passed on; a normal end is
    done().
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

    def __repr__(self):
        return "<worker.Job %d in stage %d: %.80r>" % (
            self.jobid, self.stage, self.jobcmd)

    @property
    def lost(self):
        """Return whether the claim is lost, as far as heartbeats know."""
        held = self.claims.holds(self.jobid, self.job["claim"])
        return not (held or self.ended)

    def done(self, filename=None, jobcmd=None, outputs=None):
        """Put the job two stages up, with its results for the next stage.

        `outputs`, a list of paths, and the file `filename`, if it exists,
        are checked before the next stage starts. Returns when the server
        has the results, or when they are on disk because the server can't be
        reached. Raises OSError or ValueError when an output is missing; then
        the job isn't done.
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
        """Give the claim back; no failure is counted."""
        self.end("release")

    def end(self, verb, **values):
        """End the attempt; only the first end counts."""
        if not self.ended:
            self.ended = True
            self.claims.settle(self.job, verb, **values)
            self.claims.wait()

    def check(self, lag):
        """Return whether the files given to it are unchanged."""
        files = self.job.get("files") or ()
        if self.job.get("made") == self.stage:
            files = ()
        bad = await_files(files, lag, threading.Event())
        if bad:
            self.end("reject", error=CHANGED % ", ".join(
                file["path"] for file in bad))
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
    """Claim and yield jobs; see claim_jobs."""
    try:
        for found in iter(lambda: claimer.claim(1, True), None):
            claims.hold(found[0])
            job = Job(claims, found[0])
            try:
                if claimer.drained:  # during a long poll
                    job.release()
                elif job.check(lag):
                    yield job
            finally:
                job.fail("The program went on without job.done().")
    finally:
        claims.close()
        claimer.client.close()


def claim_jobs(
    stage=0, *, access=None, name=None, lease=120, idle_timeout=60, lag=10,
    spool=None
):
    """Return an iterator over the jobs of a stage, each as a Job.

    It ends after `idle_timeout` seconds without a job. Leases are renewed
    meanwhile. A job that is left without done(), fail() or release(), as by
    an exception in the loop, has failed. Options are those of the command
    line.
    """
    options = argparse.Namespace(
        stage=[stage], lease=lease, idle_timeout=idle_timeout, until=None,
        quiet=True, slots=None, memory=None)  # a program knows what it has
    client, name = Client(access, patience=None), name or own_name()
    claimer = Claimer(options, client, name, lambda: False)
    about = {
        "host": socket.gethostname(), "slots": 1, "stages": claimer.stages}
    claims = Claims(
        Client(access, patience=0),
        Spool(spool or beside(client.access, "spool"),
              file_name(name, client.jobix)),
        name, lease, about=lambda: about,
        lost=lambda *claim: claims.forget(*claim), drained=claimer.set_drained,
    )
    jobs = each_job(claimer, claims, lag)
    atexit.register(jobs.close)  # at last: later our threads are gone
    return jobs


def run(function, stage=0, **options):
    """Call `function(job)` for each job of a stage; options as claim_jobs.

    Its result, a dict or None, goes to the job's done(). An exception fails
    the attempt, and is printed on standard error.
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
    """Deliver the outcomes of ended workers; return the exit status."""
    client = Client(options.access)
    spool = Spool(options.spool or beside(client.access, "spool"), "none")
    outcomes = spool.adopt(namespace(client.jobix))
    taken = 0
    while outcomes:
        n, accepted = deliver(client, outcomes)
        taken += accepted
        del outcomes[:n]
    spool.clear()
    print(number_of(taken, "result"), "was" if taken == 1 else "were",
          "delivered.")
    return 0


def stage_list(text):
    """Read --stage: numbers from which a job can move two up, or names."""
    most = MAX_STAGE - 2
    stages = [int(stage) if stage.isdecimal() else stage
              for stage in text.replace(" ", "").split(",")]
    if all(re.match("[A-Za-z]", stage) if isinstance(stage, str)
           else stage <= most for stage in stages):
        return stages
    raise argparse.ArgumentTypeError(
        "%r isn't a list of stages up to %d; write 0, 2,0 or their names"
        % (text, most))


def span(text):
    """Read --time-limit: a time such as 2h30m."""
    try:
        return read_span(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def duration(text):
    """Read seconds: a number, or a time such as 90s or 2h30m."""
    with contextlib.suppress(ValueError):
        if 0 <= float(text) <= 10**9:  # nor NaN
            return float(text)
    try:
        return read_span(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            "%r isn't a duration; write 90 (seconds), 90s, 2h30m or 1:00:00"
            % text) from None


def size(text):
    """Read --memory: bytes, or a size such as 4G."""
    found = re.fullmatch(
        r"([0-9]{1,18}(?:\.[0-9]{1,9})?)([KMGT]?)", text.upper())
    if not found:
        raise argparse.ArgumentTypeError(
            "%r is no size such as 500M or 64G" % text)
    return int(float(found[1]) * 1024 ** " KMGT".index(found[2] or " "))


def parse(arguments):
    """Return the command line's options."""
    parser = argparse.ArgumentParser(
        description="Run the jobs of a jobman server.",
        epilog="example: python3 worker.py --stage 0,2 --slots 4",
    )
    add = parser.add_argument
    add("--stage", default=[0], type=stage_list, metavar="S[,S...]",
        help="stages to serve, by number or name; jobs of the highest stage"
        " go first (default 0)")
    add("--slots", type=int, default=len(os.sched_getaffinity(0)), metavar="N",
        help="how many commands to run at a time (default: one for each core)")
    add("--memory", type=size, default=memory_limit(os.environ),
        metavar="SIZE", help="memory for commands whose stage needs some, as"
        " 64G (default: what this node or its batch job allows)")
    add("--command", metavar="CMD",
        help="run CMD for each job, with the job as JSON on standard input")
    add("--idle-timeout", type=duration, default=60, metavar="TIME",
        help="end after this time without work (default 60s)")
    add("--lease", type=duration, default=120, metavar="TIME",
        help="give the jobs of this worker to others after it was silent for"
        " this time (default 2m)")
    add("--time-limit", type=span, metavar="TIME",
        help="end after 1:00:00, 90s, 2h30m (default: with the batch job)")
    add("--grace", type=duration, default=10, metavar="TIME",
        help="time between a signal to commands and SIGKILL (default 10s)")
    add("--lag", type=duration, default=10, metavar="TIME",
        help="how long to wait for files of other nodes to appear here"
        " (default 10s)")
    add("--logs", metavar="DIR",
        help="the folder for the output of commands (default: logs, next to"
        " the access file)")
    add("--log-limit", type=int, default=2**20, metavar="BYTES",
        help="how much output of an attempt to keep (default 1048576)")
    add("--print", action="store_true",
        help="print the output of commands instead of keeping it")
    add("--quiet", action="store_true", help="print only problems")
    add("--spool", metavar="DIR",
        help="the folder for results while the server can't be reached"
        " (default: spool, next to the access file)")
    add("--send-spool", action="store_true",
        help="only deliver the results that ended workers left in the spool")
    add("--access", metavar="FILE",
        help="the server's access file (default ~/.jobman/access.json)")
    add("--name", help="the worker's name (default HOST-PID, with the number"
        " of the batch job)")
    add("--until-eof", action="store_true",
        help="end when standard input ends; includes --quiet")
    options = parser.parse_args(arguments)
    options.quiet |= options.until_eof
    if options.slots < 1 or options.lease == 0:
        parser.error("--slots and --lease must be more than 0")
    if options.log_limit < 0:
        parser.error("--log-limit must be 0 or more")
    return options


def open_standard_files():
    """Open those of standard input to error that are closed."""
    fd = os.open(os.devnull, os.O_RDWR)  # takes the lowest number
    while fd <= 2:
        fd = os.dup(fd)
    os.close(fd)
    sys.stdout = sys.stdout or open(1, "w", closefd=False)
    sys.stderr = sys.stderr or open(2, "w", closefd=False)


def main(arguments=None):
    """Run the command line; return its exit status."""
    open_standard_files()
    options = parse(arguments)
    try:
        if options.send_spool:
            return send_spool(options)
        left = options.time_limit or allocation_left(os.environ)
        options.until = None
        if left is not None:  # then it drains
            options.until = time.monotonic() + left - options.grace - MARGIN
        return Worker(options).run()
    except (Trouble, OSError) as trouble:
        remedy = REMEDIES.get(getattr(trouble, "errno", None))
        say("%s: %s." % (trouble, remedy) if remedy else trouble)
    except RuntimeError as error:
        if "start new thread" not in str(error):
            raise
        say("No thread can be started: %s." % REMEDIES[errno.EAGAIN])
    return 1


if __name__ == "__main__":
    sys.exit(main())
