#!/usr/bin/env python3
"""Test jobman: real servers, real sockets, real workers, real databases.

    python3 test_jobman.py                 all but what takes minutes
    python3 test_jobman.py --quick         what needs few processes
    python3 test_jobman.py --long          all
    python3 test_jobman.py ContractTest    one class

Several classes run at a time, each in a process of its own (--jobs N). Only
the clock is passed in, so that leases and lifetimes need no sleep.
"""

import argparse
import ast
import atexit
import base64
import concurrent.futures
import contextlib
import csv
import fcntl
import functools
import glob
import grp
import gzip
import hashlib
import http.client
import io
import itertools
import json
import math
import os
import pty
import pwd
import random
import re
import resource
import select
import shlex
import shutil
import signal
import socket
import socketserver
import sqlite3
import ssl
import stat
import struct
import subprocess
import sys
import tempfile
import termios
import textwrap
import threading
import time
import traceback
import types
import unittest
import urllib.error
import urllib.parse
import urllib.request
import warnings
import wsgiref.simple_server
import wsgiref.util
import wsgiref.validate
import zlib
from collections import Counter

import jobman
import worker

HERE = os.path.dirname(os.path.abspath(__file__))
JOBMAN = os.path.join(HERE, "jobman.py")
WORKER = os.path.join(HERE, "worker.py")
BENCH = os.path.join(HERE, "bench", "run.py")
COMPILED = "import os, runpy, sys; del sys.argv[0]; " \
    "folder, name = os.path.split(sys.argv[0]); sys.path.insert(0, folder); " \
    "runpy.run_module(name[:-3], run_name='__main__', alter_sys=True)"
SERVE, BACKUP, CHECK = [
    (name, "--db", "jobman.db") for name in ("serve", "backup", "check")]
PATIENCE = 60  # seconds that a process may take before a test gives it up


# --------------------------------------------------------------- harness ---


class Clock:
    """A clock that a test moves on by hand."""

    def __init__(self):
        self.now = 1.6e9

    def __call__(self):
        return self.now

    def advance(self, seconds):
        self.now += seconds


class Reply:
    """A response: status, headers (lower case), body; `json()` its value."""

    def __init__(self, response):
        self.status = response.status
        self.headers = {k.lower(): v for k, v in response.getheaders()}
        self.body = response.read()

    @property
    def text(self):
        return self.body.decode("utf-8")

    def json(self):
        return json.loads(self.text)


def exchange(address, method, path, body=None, headers=(), tls=None):
    """Make one request on a connection of its own; return the Reply."""
    connection = http.client.HTTPConnection(*address, timeout=PATIENCE)
    if tls:
        connection = http.client.HTTPSConnection(
            *address, timeout=PATIENCE, context=tls)
    with contextlib.closing(connection):
        connection.request(method, path, body, dict(headers))
        return Reply(connection.getresponse())


def packed(value):
    """Return `value` as existing clients send it: zlib of JSON."""
    return zlib.compress(json.dumps(value).encode("utf-8"))


LEGACY = {"Content-Type": "application/json", "content-encoding": "gzip"}


def setUpModule():
    """Heed SIGINT, and so what we start: some shells' background jobs don't.
    """
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


class TemporaryFolder(unittest.TestCase):
    """A test with a folder of its own and processes that end with it."""

    open_to_all = False  # whether its servers take any jobix

    def setUp(self):
        self.folder = self.make_folder()
        self.environment = dict(
            os.environ, HOME=self.folder, TMPDIR=self.make_folder()
        )
        for name in list(self.environment):
            if name.startswith("JOBMAN_"):
                del self.environment[name]

    def make_folder(self):
        folder = tempfile.mkdtemp(prefix="jobman-test-")
        self.addCleanup(shutil.rmtree, folder, ignore_errors=True)
        return folder

    def path(self, *names):
        return os.path.join(self.folder, *names)

    def patch(self, owner, name, value):
        """Give something another value for this test."""
        self.addCleanup(setattr, owner, name, getattr(owner, name))
        setattr(owner, name, value)

    def replace(self, name, value):
        """Give a constant of jobman another value for this test."""
        self.patch(jobman, name, value)

    def spawn(self, *argv, **options):
        """Start a process that is killed when the test ends.

        A file of ours starts from what Python keeps of it, compiled, which
        saves a hundred seconds in all; README's commands start the file.
        """
        if argv[0] in (JOBMAN, WORKER):
            argv = "-c", COMPILED, *argv
        options.setdefault("stdin", subprocess.DEVNULL)
        options.setdefault("stdout", subprocess.PIPE)
        options.setdefault("stderr", subprocess.PIPE)
        options.setdefault("env", self.environment)
        options.setdefault("cwd", self.folder)
        process = subprocess.Popen([sys.executable, *argv], **options)
        self.addCleanup(self.reap, process)
        return process

    def reap(self, process):
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream:
                stream.close()

    def finish(self, process, given=None):
        """Return (exit status, stdout, stderr) of a process, as text."""
        out, err = process.communicate(given, timeout=PATIENCE)
        return (
            process.returncode,
            out.decode("utf-8", "surrogateescape"),
            err.decode("utf-8", "surrogateescape"),
        )

    def small_disk(self, size="256k"):
        """Mount a file system of a size; return its folder."""
        folder = self.path("disk")
        os.mkdir(folder)
        size = "mode=700,size=" + size
        mount = ["mount", "-t", "tmpfs", "-o", size, "none", folder]
        try:
            subprocess.check_output(mount, stderr=subprocess.STDOUT)
        except (OSError, subprocess.CalledProcessError) as error:
            self.skipTest("no file system of a set size: %s" % error)
        self.addCleanup(subprocess.call, ["umount", folder])
        return folder

    def fill(self, folder):
        """Write a file until its disk is full."""
        with contextlib.suppress(OSError):
            with open(os.path.join(folder, "full"), "wb", 0) as file:
                while True:
                    file.write(b"x" * 512)

    def suspend(self, process):
        """Stop a process until SIGCONT; return when all its threads are."""
        process.send_signal(signal.SIGSTOP)
        os.waitpid(process.pid, os.WUNTRACED)

    def command(self, *argv, given=None, **options):
        """Run a command to its end; return (exit status, stdout, stderr)."""
        if given is not None:
            options["stdin"] = subprocess.PIPE
        return self.finish(self.spawn(*argv, **options), given)

    def serve(self, *argv, port=0, start=(JOBMAN,)):
        """Start `jobman.py serve`; return (process, address) when it's up.

        The database is jobman.db in the test's folder, if not said.
        """
        argv += ("--open",) * self.open_to_all
        process = self.spawn(
            *start, *SERVE, "--port", str(port), *argv)
        line = process.stdout.readline().decode()
        found = re.search(r"https?://([\w.-]+):(\d+)", line)
        if not found:
            process.kill()
            self.fail("no server: %r %r" % (line, process.stderr.read()))
        return process, (found.group(1), int(found.group(2)))


def most_memory(process):
    """Return the bytes that a process has had in memory at most."""
    with open("/proc/%d/status" % process.pid) as file:
        return 1024 * int(re.search(r"VmHWM:\s+(\d+)", file.read())[1])


def slow(case):
    """Mark a class of tests as one that starts many processes."""
    case.speed = "slow"
    return case


def long(case):
    """Mark a class of tests as one that takes minutes."""
    case.speed = "long"
    return case


class Invariants:
    """What is true of every database. Each row of a statement is a fault."""

    ATTEMPTS = """
        select count(*), min(id) from attempt where not exists (
            select 1 from job where job.id = attempt.job) group by null"""
    UNMET = """
        select count(*), min(jobid) from job where unmet != (
            select count(*) from dependency where child = job.id and met = 0)
        group by null"""
    EDGES = """
        select count(*), min(child) from dependency
        where not exists (select 1 from job where id = child)
            or not exists (select 1 from job where id = parent)
        group by null"""
    STATES = """
        select count(*), case
            when free != (state in ('waiting', 'done') or state = 'working'
                and lease is null) then 'free by mistake, or not free'
            when state = 'working' and (claim is null
                or claimed_from is null or claimed_to is null)
                then 'working without a claim'
            when (expires_at is null) = (state = 'delayed'
                or lease is not null)
                then 'due without a lease or delay, or never due in one'
            when state = 'done' and (final is null or stage < final)
                or state = 'waiting' and stage >= final
                then 'done before their last stage, or waiting in it'
            when state = 'waiting' and unmet > 0
                or state in ('blocked', 'aborted') and unmet = 0
                then 'waiting for other jobs by mistake, or not waiting'
            end as odd, min(jobid)
        from (""" + jobman.SQL.WHOLE_JOB + """)
        group by odd having odd is not null"""


def faults(execute):
    """Return all that is wrong with a database, also what `check` finds."""
    found = [fault for check in (
        jobman.check_pages, jobman.check_schema, jobman.check_counts)
        for fault in check(execute)]
    for name, statement in vars(Invariants).items():
        if name.isupper():
            found += [(name, *row) for row in execute(statement)]
    return found


class SeededCase(TemporaryFolder):
    """A test by chance, which JOBMAN_SEED repeats; `wrong` until its end."""

    def setUp(self):
        super().setUp()
        seed = int(os.environ.get("JOBMAN_SEED") or random.randrange(10**6))
        self.random = random.Random(seed)
        self.addCleanup(lambda: self.wrong and print("JOBMAN_SEED=%d" % seed))
        self.wrong = True


def changed(module, changes):
    """Return what starts jobman or worker after `changes`, statements."""
    code = "import sys; sys.path.insert(0, %r)\nimport %s\n%s\n" \
        "sys.exit(%s.main(sys.argv[1:]))" % (HERE, module, changes, module)
    return "-c", code


def ahead(jobs, held=60):
    """Return statements that make a worker claim so many jobs ahead."""
    return "worker.Worker.HELD = %s\nworker.Worker.ahead = property(" \
        "lambda self: %s, lambda self, jobs: None)" % (held, jobs)


HASTY = changed("jobman", "jobman.delay_after = lambda failures: 0.1")


def hasty(test):
    """Let the server of a test offer failed jobs again almost at once."""
    test.start = HASTY
    return test


def wait_for(condition, what):
    """Return what `condition()` gives as soon as it is true."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        found = condition()
        if found:
            return found
        time.sleep(0.01)
    raise AssertionError("not within %d s: %s" % (PATIENCE, what))


# -------------------------------------------------------------- contract ---


class SocketFront:
    """The Store behind our own server."""

    def __init__(self, store):
        self.server = jobman.Server(("127.0.0.1", 0), store)
        self.address = self.server.server_address
        self.server.start()
        self.close = self.server.stop


class WsgiServer(wsgiref.simple_server.WSGIServer):
    """The standard library's WSGI server, which looks up no name here."""

    def server_bind(self):
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address
        self.setup_environ()


class QuietWsgiHandler(wsgiref.simple_server.WSGIRequestHandler):
    def log_message(self, *_):
        pass


class WsgiFront:
    """The Store behind the WSGI application, watched by a validator."""

    def __init__(self, store):
        application = jobman.Application()
        application.store = store
        store.keep_ticking()
        self.store = store
        self.server = wsgiref.simple_server.make_server(
            "127.0.0.1", 0, wsgiref.validate.validator(application),
            WsgiServer, QuietWsgiHandler,
        )
        self.address = self.server.server_address
        threading.Thread(
            target=self.server.serve_forever, args=(0.01,), daemon=True
        ).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()
        self.store.close()


def made(*names):
    """Return what an update says of files that a command made."""
    return [
        {"path": name, "size": 5, "sha256": "0123456789abcdef" * 4}
        for name in names
    ]


def to_text(value):
    """Return the JSON of a value, nothing for None."""
    return "" if value is None else json.dumps(value)


def to_add(jobs):
    """Return jobs, {id: entry}, as a Store takes them."""
    return jobman.group_jobs(list(jobs), jobman.read_jobs(jobs.values()))


def hold_commit(store):
    """Begin a commit in another thread; return the event that ends it."""
    begun, go = threading.Event(), threading.Event()
    threading.Thread(target=store.writer.run, daemon=True, args=(
        lambda tx: (begun.set(), go.wait(PATIENCE)),)).start()
    begun.wait(PATIENCE)
    return go


def together(store, *acts):
    """Run operations in one commit; return what each returns.

    Where one is refused that is the status, where it has a fault the fault.
    They come while another commit is under way.
    """
    writer, outcomes = store.writer, [None] * len(acts)
    go, threads = hold_commit(store), []

    def run(number, act):
        try:
            outcomes[number] = writer.run(act)
        except jobman.Error as error:
            outcomes[number] = error.status
        except KeyError as error:
            outcomes[number] = error

    for number, act in enumerate(acts):
        threads.append(threading.Thread(
            target=run, args=(number, act), daemon=True))
        threads[-1].start()
        wait_for(lambda n=number: len(writer.queue) > n, "its place")
    go.set()
    for thread in threads:
        thread.join(PATIENCE)
    return outcomes


class StoreCase(TemporaryFolder):
    """A Store behind a front door, on a clock moved by hand."""

    front = SocketFront
    open_to_all = True
    jobix = 4711
    tls = None  # the client's SSLContext, where TLS is spoken
    vfs = "unix"
    tick_every = None  # seconds, where the usual one isn't right

    def setUp(self):
        super().setUp()
        if self.tick_every:
            self.patch(jobman.Store, "TICK", {False: self.tick_every})
        self.clock = self.make_clock()
        self.open()

    def make_clock(self):
        return Clock()

    def open(self):
        self.store = jobman.Store(
            self.path("jobs.db"), clock=self.clock,
            open_to_all=self.open_to_all)
        self.door = self.front(self.store)
        self.address = self.door.address
        self.closing = contextlib.ExitStack()
        self.closing.callback(self.door.close)
        self.addCleanup(self.closing.close)

    def steps(self, operation):
        """Return how many steps of SQLite's machine an operation takes.

        The committing thread sets the counter and takes it off: sqlite3 would
        wait with Python's lock held for another thread's statement, and that
        one for Python's lock.
        """
        steps, writer = [0], self.store.writer

        def step():
            steps[0] += 1

        def count(call):
            for connection in [writer.connection, *self.store.readers.idle]:
                connection.set_progress_handler(call, 1)

        writer.run(lambda tx: count(step))
        begun = steps[0]
        operation()
        ended = steps[0]
        writer.run(lambda tx: count(None))
        self.assertGreater(ended, begun)
        return ended - begun

    def restart(self):
        self.closing.close()
        self.open()

    def operation(self, name, *args, **named):
        """Return an operation: a method of the Store, in this namespace."""
        method, namespace = getattr(jobman.Store, name), self.namespace
        return lambda tx: method.__wrapped__(
            self.store, tx, namespace, *args, **named)

    @property
    def namespace(self):
        """The id of the test's namespace, which is made when it is new."""
        return self.store.make_namespace(self.jobix)

    def call(self, path, body=None, *, method=None, jobix=None, **headers):
        method = method or ("GET" if body is None else "POST")
        headers["jobix"] = str(self.jobix if jobix is None else jobix)
        return exchange(
            self.address, method, path, body, headers, self.tls)

    def post(self, path, value, **options):
        return self.call(path, packed(value), **options)

    def assertReply(self, status, reply):
        self.assertEqual(status, reply.status, reply.text)
        if status >= 400:
            self.assertEqual(["error"], list(reply.json()))
        return reply

    def expect(self, status, path, value=None, **options):
        """Return the Reply of a call, which has this status.

        A call with a value, or with bytes, is a POST.
        """
        if value is not None and not isinstance(value, bytes):
            value = packed(value)
        return self.assertReply(status, self.call(path, value, **options))

    def ok(self, path, value=None, **options):
        """Return the JSON value of a call that succeeds."""
        return self.expect(200, path, value, **options).json()

    def refuse(self, status, path, *values):
        """Assert that calls are refused and change nothing; return Replies."""
        replies, before = [], self.dump()
        for value in values or (None,):
            with self.subTest(path=path, value=value):
                replies.append(self.expect(status, path, value))
        self.assertEqual(before, self.dump(), path)
        return replies

    def set_jobs(self, jobs, stage=0, **options):
        """Add jobs: {id: jobcmd}, or ids, in one stage."""
        if not isinstance(jobs, dict):
            jobs = dict.fromkeys(jobs)
        entries = {
            jobid: dict(options, jobstage=stage, jobcmd=jobcmd)
            for jobid, jobcmd in jobs.items()
        }
        self.assertReply(200, self.post("/set", entries))

    def get(self, stage=0, **options):
        """Claim a job; return it."""
        query = "&".join("%s=%s" % pair for pair in options.items())
        return self.ok("/get/%s?%s" % (stage, query))

    def update(self, job, stage, **options):
        path = "/update_job/%d/%d?claim=%s"
        path %= (job["jobid"], stage, job["claim"])
        return self.call(path, **options)

    def complete(self, job, stage, **given):
        """Update a claimed job, and see that it is accepted."""
        body = packed(given) if given else None
        self.assertReply(200, self.update(job, stage, body=body))

    def fail(self, job_or_message, **report):
        if not isinstance(job_or_message, dict):
            super().fail(job_or_message)
        path = "/fail_job/%(jobid)d?claim=%(claim)s" % job_or_message
        return self.post(path, report)

    def release(self, job):
        path = "/release_job/%(jobid)d?claim=%(claim)s" % job
        return self.post(path, {})

    def sweep(self, act, jobix=None, **selector):
        """Retry, cancel, release or forget jobs; return how many."""
        answer = self.ok("/" + act, selector, jobix=jobix)
        return next(iter(answer.values()))

    def beat(self, name, **about):
        """Say that a worker is there; return the answer."""
        beat = {"worker": name, "lease": 60, "claims": []}
        return self.ok("/heartbeat", dict(beat, **about))

    def states(self, jobix=None):
        """Return {(stage, state): jobs}, as /status counts them, checked."""
        self.store.tick()
        figures = self.ok("/status", jobix=jobix)
        counted = {
            (stage["stage"], state): n
            for stage in figures["stages"]
            for state, n in stage["states"].items()
            if n
        }
        self.assertCounts()
        return counted

    def look(self):
        """Return a connection of our own to the database."""
        path = "file:%s?vfs=%s" % (self.path("jobs.db"), self.vfs)
        return sqlite3.connect(path, uri=True)

    def rows(self, query):
        """Return the rows that a query finds in the database."""
        with contextlib.closing(self.look()) as db:
            return db.execute(query).fetchall()

    def dump(self):
        """Return all that is in the database, by table."""
        tables = self.rows("select name from sqlite_master where type='table'")
        return {name: self.rows("select * from " + name) for name, in tables}

    def assertCounts(self):
        """Assert that the kept counts and `free` are those of the table."""
        with contextlib.closing(self.look()) as db:
            self.assertEqual([], list(jobman.check_counts(db.execute)))
            self.assertEqual([], db.execute(
                "select jobid from job where free != (state in ('waiting',"
                " 'done') or state = 'working' and lease is null)"
            ).fetchall())

    def attempts(self, *columns):
        """Return the rows of the table of attempts, in order."""
        return self.rows(
            "select %s from attempt order by id" % ", ".join(columns))


class ContractTest(StoreCase):
    """Part 1: what existing clients send and expect."""

    FINE = "Are all simulations within time frame?"
    MOVED = "n_bad_jobs were degraded:"
    NAMES = {0: "align", 1: "aligning", 2: "sort", 3: "sorting", 4: "end"}

    def fetch(self, path, **headers):
        """Make a GET request with these headers alone."""
        return exchange(self.address, "GET", path, None, headers)

    def basic(self, jobix):
        """Return the header with a jobix as password."""
        login = base64.b64encode(b"anybody:%d" % jobix).decode()
        return {"Authorization": "Basic " + login}

    def routes(self):
        """Yield each method, a path, a body that may do, and the endpoint."""
        for method, pattern, endpoint in jobman.ROUTES:
            path = re.sub(
                "<[^>]*>", "1", pattern.replace("<topic>", "http"))
            yield method, path, b"{}" if method == "POST" else None, endpoint

    def expired(self):
        """Return how many jobs are flagged."""
        self.store.tick()
        return self.ok("/status")["totals"]["expired"]

    def test_the_root_greets_programs_and_shows_browsers_the_page(self):
        reply = self.fetch("/")
        self.assertIn("jobman " + jobman.__version__, reply.text)
        self.assertTrue(reply.headers["content-type"].startswith("text/plain"))
        self.assertIn("<html", self.fetch("/", Accept="text/html,*/*").text)

    def test_a_jobix_for_reading_reads_and_does_nothing_else(self):
        self.jobix = self.store.jobix
        self.set_jobs([1])
        before = self.ok("/jobs")
        reading = dict(jobix=self.store.reading_jobix)
        self.assertTrue(self.ok("/status", **reading)["readonly"])
        self.assertFalse(self.ok("/status")["readonly"])
        self.assertIn(">0</td>", self.call("/get?plain=1", **reading).text)
        readable = {"/init", "/lifetime/1", "/stages", "/submissions",
                    "/status", "/pace", "/workers", "/failures", "/stats",
                    "/jobs", "/job/1"}
        for method, path, body, endpoint in self.routes():
            with self.subTest(method + path):
                reply = self.call(path, body, method=method, **reading)
                may = endpoint in jobman.PUBLIC or (
                    method == "GET" and path in readable)
                self.assertEqual(200 if may else 403, reply.status)
                self.assertNotIn(str(self.jobix), reply.text)
        self.restart()
        self.assertEqual(before, self.ok("/jobs", **reading))

    def test_every_call_but_the_public_ones_needs_a_jobix(self):
        for method, path, body, endpoint in self.routes():
            for headers in ({}, {"jobix": "x"}, {"jobix": ""}):
                reply = exchange(self.address, method, path, body, headers)
                self.assertEqual(
                    200 if endpoint in jobman.PUBLIC else 403, reply.status,
                    path)

    def test_a_jobix_is_an_integer_of_63_bits(self):
        for good in ("0", "00", " 7 ", str(2**63 - 1)):
            self.assertReply(200, self.fetch("/init", jobix=good))
        for bad in ("-1", "1.0", "1e3", str(2**63), "9" * 30, "٣", "1 2",
                    "1,1"):
            self.assertReply(403, self.fetch("/init", jobix=bad.encode()))
        for name in ("jobix", "Jobix", "JOBIX"):
            self.assertReply(200, self.fetch("/init", **{name: "7"}))
        for path in ("/get/absent", "/get/1x", "/lifetime/-1"):
            self.assertReply(403, self.fetch(path, jobix="x"))  # not 404, 400

    def test_init_sets_lifetimes_only_where_there_are_none(self):
        self.assertEqual({}, self.ok("/init"))
        self.assertEqual({"0": 5, "1": 0}, self.ok("/init/5/0"))
        self.assertEqual({"0": 5, "1": 0}, self.ok("/init/9/9/9"))
        self.assertEqual({"0": 5, "1": 0}, self.ok("/init"))
        self.assertEqual({}, self.ok("/init", jobix=1))
        self.ok("/lifetime/3/7", jobix=1)
        self.assertEqual({"3": 7}, self.ok("/init/1/2", jobix=1))

    def test_set_accepts_every_habit_of_encoding(self):
        entry = {"jobstage": 0, "jobcmd": "é"}
        text = json.dumps({"1": entry}, ensure_ascii=False).encode("utf-8")
        for body in (text, zlib.compress(text), gzip.compress(text)):
            for headers in ({}, LEGACY):
                self.jobix += 1
                reply = self.call("/set", body, **headers)
                self.assertReply(200, reply)
                self.assertEqual("Accepted to %d!" % self.jobix, reply.text)
                self.assertEqual("é", self.get(0)["jobcmd"])

    def test_a_broken_body_is_refused_with_the_reason(self):
        self.replace("MAX_BODY", 2**20)
        whole, job = packed({"1": {"jobstage": 0}}), '{"1": {"jobstage": %s}}'
        for bodies, status, reason in (
            ((b"x\x9c" + b"\xff" * 9, whole[:-1], whole[:5], b"\x1f\x8b",
              whole + b"x"), 400, "not intact zlib data"),
            ((b"\xff", b"\xff\xfe", b'{"1": "\xff"}'), 400, "not UTF-8"),
            ((b"", b" ", zlib.compress(b""), b"{", job % "NaN",
              job % "-Infinity", b"[" * 100000, job % ("1" * 4301)),
             400, "not JSON"),
            ((b"[]", b"7", b"null", b'"x"'), 400, "must be a JSON object"),
            ((job % '0, "jobcmd": 1e999',
              job % ('0, "jobcmd": ' + "[" * 201 + "]" * 201),
              job % ('0, "jobcmd": ' + '{"a":' * 201 + "0" + "}" * 201)),
             400, "too "),
            (('{"1": {"jobstage": 0}, "1": {"jobstage": 1}}',
              job % '0, "jobstage": 1', job % '0, "jobcmd": {"a": 1, "a": 2}'),
             400, "twice"),
            ((zlib.compress(b" " * (jobman.MAX_BODY + 1)),), 413, "inflates"),
        ):
            for body in bodies:
                with self.subTest(body[:99]):
                    body = body if isinstance(body, bytes) else body.encode()
                    reply = self.assertReply(status, self.call("/set", body))
                    self.assertIn(reason, reply.text)
        self.assertEqual({}, self.states())

    def test_malformed_calls_are_refused_and_change_nothing(self):
        self.set_jobs([1])
        self.ok("/heartbeat", {"worker": "w", "lease": 60, "claims": []})
        self.ok("/submit", {"key": "a", "jobs": []})
        beat = {"worker": "w", "lease": 60, "claims": []}
        new, fine = {"jobstage": 0}, {"jobid": 1, "jobstage": 2}
        file, = made("a")
        jobs = [{"2": entry} for entry in (
            {}, [], None, *(dict(new, **wrong) for wrong in (
                {"jobstage": "0"}, {"jobstage": -1}, {"jobstage": 1.0},
                {"jobstage": True}, {"jobstage": None},
                {"jobstage": 10**6 + 1}, {"laststage": "9"},
                {"priority": 2**31}, {"max_attempts": 0}, {"timeout": 0},
                {"timeout": "1"}, {"outputs": "a"}, {"outputs": ["a", 1]},
                {"cwd": 1}, {"filename": 1}, {"files": []})))]
        jobs += [{jobid: new} for jobid in (
            "x", "-1", "", str(2**53), "1.0", "01")]
        files = [{"files": files} for files in (
            {}, "a", 7, ["a"], [{}], [{"path": "a", "size": 1}],
            *([file, dict(file, **wrong)] for wrong in (
                {"path": 1}, {"path": None}, {"size": -1}, {"size": 1.5},
                {"size": True}, {"size": 2**63}, {"sha256": "0" * 63},
                {"sha256": "0" * 65}, {"sha256": "A" * 64}, {"sha256": 7},
                {"sha256": "0" * 64 + "\n"}, {"more": 1})))]
        for path, values in (
            ("/set", [dict({"1": new}, **wrong) for wrong in jobs]),
            ("/update_job/1/2", [
                [], 7, {"filename": 7}, {"filename": ["x"]}, *files,
                b'{"jobcmd": ' + b"[" * 201 + b"]" * 201 + b"}"]),
            ("/update_jobs", [fine, *([fine, wrong] for wrong in (
                {}, {"jobid": 1}, {"jobid": "1", "jobstage": 2}, 7,
                dict(fine, claim=7), dict(fine, filename=7),
                *(dict(fine, **each) for each in files)))]),
            ("/submit", [
                {"key": "k"}, {"key": "", "jobs": []},
                {"key": "m", "jobs": {}}, {"key": "m", "jobs": [{}]},
                *({"key": "b", "jobs": [], "part": part}
                  for part in (-1, "1", 1.5))]),
            ("/heartbeat", [
                *({key: beat[key] for key in beat if key != missing}
                  for missing in beat),
                *(dict(beat, **wrong) for wrong in (
                    {"worker": None}, {"worker": ""}, {"lease": 0},
                    {"lease": "60"}, {"claims": {}}, {"claims": [1]},
                    {"claims": [[1]]}, {"claims": [["1", "x"]]},
                    {"claims": [[1, None]]}, {"host": 7}, {"host": ""},
                    {"host": "h" * 256}, {"slots": -1}, {"slots": "8"},
                    {"busy": 1.5}, {"done": True}, {"failed": 2**53 + 1},
                    {"quarantine": 1}, {"ended": 1}, {"stages": 2},
                    {"stages": "align"}, {"stages": ["0"]},
                    {"stages": [1000001]}))]),
            *((path, [
                [], {}, {"all": False}, {"all": 1}, {"ids": None}, {"ids": 1},
                {"ids": ["1"]}, {"ids": [-1]}, {"state": "lost"},
                {"stage": "0"}, {"id": [1]}, {"submission": 5},
                {"all": True, "stat": "failed"}, {"all": True, "ids": [1]},
                {"all": True, "stage": 0}, {"all": True, "submission": "a"},
                {"submission": "a", "ids": [1]},
            ]) for path in ("/retry", "/cancel")),
            *((path, [b"", zlib.compress(b""), b" "]) for path in (
                "/set", "/submit", "/update_jobs", "/heartbeat", "/stages")),
            ("/retry", [b""]),
            ("/pause/1x", [{}]),
            ("/reject_job/1", [{"files": "a"}]),
            ("/reject_job/1?files=a", [{}]),
            *(("/get/" + rest, [None]) for rest in (
                "", "1000001", "-1", "1x", "1.0", "%D9%A3", "2,",
                "0/1000001", "1000000", "0?n=0", "0?n=x", "0?wait=-1",
                "0?wait=nan", "0?lease=0", "0?lease=x", "0?colour=1",
                "0?n=1&n=1", "0?worker=", "0?worker=" + "x" * 256)),
            *(("/update_job/" + rest, [None]) for rest in (
                "-1/0", "x/0", "9007199254740992/0", "1/1000001",
                "1/0?claim=", "1/0?claim=a%20b")),
            *((path, [None]) for path in (
                "/check_stages/0/1000001", "/check_stages/all/0",
                "/lifetime/1000001", "/lifetime/0/1000000001",
                "/lifetime/0/-1", "/init/", "/init/1000000001", "/init/1/x",
                "/job/x", "/pace?minutes=0", "/pace?minutes=x",
                "/pace?hours=1", "/status?ids=x", "/failures?submission=")),
            *(("/jobs?" + query, [None]) for query in (
                "attempts=-1", "attempts=101", "attempts=x", "state=lost",
                "stage=1x", "stage=-1", "limit=0", "limit=x", "after=-1",
                "after=x", "after=", "order=x", "order=age", "match=",
                "ids=3-1", "order=time&after=7", "order=time&after=x,7",
                "order=time&after=7,x", "order=time&after=7,-1",
                "order=time&after=,", "order=id&after=1,2")),
        ):
            self.refuse(400, path, *values)
        for path, value, reason in (
            ("/set", {"1": {"jobstage": 0, "colour": 1}}, "colour"),
            ("/update_jobs", fine, "a JSON list"),
        ):
            self.assertIn(reason, self.expect(400, path, value).text)

    def test_no_number_at_all_is_400(self):
        self.expect(400, "/init/1//2")

    def test_what_a_request_may_hold_is_bounded(self):
        self.replace("MAX_JOBS", 3)
        entry = {"jobstage": 0}
        self.set_jobs(range(3))
        for path, value in (
            ("/set", dict.fromkeys("4567", entry)),
            ("/submit", {"key": "k", "jobs": [entry] * 4}),
            ("/update_jobs", [{"jobid": 1, "jobstage": 9}] * 4),
            ("/cancel", {"ids": [0, 1, 2, 3]}),
            ("/heartbeat", {"worker": "w", "lease": 9,
                            "claims": [[1, "x"]] * 4}),
        ):
            self.assertIn("3 jobs", self.expect(413, path, value).text)
        self.replace("MAX_VALUES", 9)  # counted before they are read
        self.refuse(413, "/set", b"[" * 10, b"{" * 10, b"," * 10,
                    b'[[{"a": [1, 2, 3, [4,5,6')
        self.set_jobs("45")
        self.assertEqual({(0, "waiting"): 5}, self.states())

    def test_a_jobcmd_is_any_json_and_may_be_missing(self):
        deep = [[]]
        for _ in range(jobman.MAX_DEPTH - 2):
            deep = [deep]
        values = (
            "text", ["a", 1, None], {"k": {"l": []}}, 3.5, 0, True, None, "",
            "\ud800 \udcff \x00 é 😀", 2**70, deep, "[{" * 1000, 10**4299)
        self.set_jobs(dict(enumerate(values)))
        self.post("/set", {"100": {"jobstage": 0}})
        self.assertEqual(
            [*values, None], [job["jobcmd"] for job in self.get(0, n=99)])

    def test_a_claim_moves_the_job_one_stage_up_or_where_it_is_told(self):
        self.set_jobs({17: "align"})
        job = self.get(0)
        self.assertEqual(
            {"jobid": 17, "jobcmd": "align", "jobstage": 0, "jobix": 4711,
             "filename": None, "attempt": 1, "claim": job["claim"]}, job)
        self.assertRegex(job["claim"], r"\A[A-Za-z0-9_-]+\Z")
        self.assertEqual("nada", self.get(0))
        self.assertEqual({(1, "working"): 1}, self.states())
        self.set_jobs([18], stage=1)  # stages have no parity
        self.assertEqual(17, self.get("1/7")["jobid"])
        self.assertEqual(18, self.get(1)["jobid"])
        self.assertEqual({(7, "working"): 1, (2, "working"): 1}, self.states())

    def test_a_claim_without_lease_is_free_in_its_new_stage(self):
        self.set_jobs([1])
        first = self.get("0/7")
        second = self.get(7)
        self.assertEqual((7, 1), (second["jobstage"], second["attempt"]))
        self.assertReply(409, self.update(first, 9))
        self.complete(second, 9)

    def test_higher_priority_goes_first_then_the_lower_id(self):
        self.set_jobs([5, 4])
        self.set_jobs([7, 6], priority=1)
        self.set_jobs([3], priority=-1)
        order = [self.get(0)["jobid"] for _ in range(5)]
        self.assertEqual([6, 7, 4, 5, 3], order)

    def test_update_sets_the_stage_of_a_job_claimed_or_not(self):
        self.set_jobs([8, 9])
        self.get(0)
        reply = self.expect(200, "/update_job/8/2")
        self.assertEqual("Success, job 8 was updated to stage 2!", reply.text)
        self.expect(200, "/update_job/9/0")
        self.expect(200, "/update_job/9/4")
        self.assertEqual({(2, "waiting"): 1, (4, "waiting"): 1}, self.states())
        for path, value in (("/update_job/7/2", None), ("/job/7", None),
                            ("/update_job/7/2", {}),
                            ("/cancel", {"ids": [8, 7]})):
            self.refuse(404, path, value)
        self.expect(404, "/update_job/8/2", jobix=1)
        self.expect(404, "/job/8", jobix=1)
        self.expect(404, "/cancel", {"ids": [8]}, jobix=1)

    def test_update_brings_filename_and_jobcmd(self):
        self.set_jobs({1: "old"})
        for given, filename, jobcmd in (
            ({"filename": "a.dat"}, "a.dat", "old"),
            ({}, "a.dat", "old"),
            ({"filename": None, "jobcmd": None}, "a.dat", "old"),
            ({"jobcmd": ["new"]}, "a.dat", ["new"]),
            ({"filename": "", "jobcmd": 0}, "", 0),
            ({"filename": "\udcff/\ud800"}, "\udcff/\ud800", 0),
        ):
            self.expect(200, "/update_job/1/2", given, **LEGACY)
            job = self.get(2)
            self.assertEqual((filename, jobcmd),
                             (job["filename"], job["jobcmd"]))
        self.assertReply(200, self.call("/update_job/1/3", b""))
        self.assertEqual({(3, "waiting"): 1}, self.states())

    def test_check_stages_flags_what_is_too_long_in_its_stage(self):
        for stage, minutes in ((0, 10), (1, 5), (2, 0)):
            self.ok("/lifetime/%d/%d" % (stage, minutes))
        self.set_jobs([1, 2])
        self.set_jobs([3], stage=2)  # without a limit
        self.set_jobs([4], stage=8)  # whose lifetime nobody has set
        self.get(0)
        self.ok("/lifetime/0/100", jobix=1)
        self.expect(200, "/set", {1: {"jobstage": 0}}, jobix=1)
        for seconds, fine, expired in (
            (0, 1, 0), (300, 1, 0), (1, 0, 1), (300, 0, 2), (10**9, 0, 2),
        ):
            self.clock.advance(seconds)
            self.assertEqual({self.FINE: fine}, self.ok("/check_stages"))
            self.assertEqual(expired, self.expired())
            self.assertEqual({self.FINE: int(seconds < 10**9)},
                             self.ok("/check_stages", jobix=1))
        self.assertEqual({self.FINE: 1, self.MOVED: 0},
                         self.ok("/check_stages/2/5"))
        self.assertEqual(1, self.states()[8, "waiting"])  # it isn't the last

    def test_check_stages_moves_the_flagged_jobs_of_one_stage(self):
        self.ok("/init/1/1/1/1")
        self.set_jobs([1, 2, 3], max_attempts=1)
        self.set_jobs([4], stage=2)
        self.fail(self.get(0))
        self.clock.advance(50)
        job = self.get(0, lease=1000)
        self.clock.advance(11)
        self.assertEqual(
            '{"Are all simulations within time frame?": 0,'
            ' "n_bad_jobs were degraded:": 1}',
            self.expect(200, "/check_stages/2/0").text)
        for seconds, stages, fine, moved in (
            (0, "2/0", 1, 0),
            (0, "0/5", 0, 1),  # 3 alone: 1 has failed, 4 came just now
            (50, "1/0", 0, 1),
        ):
            self.clock.advance(seconds)
            self.assertEqual({self.FINE: fine, self.MOVED: moved},
                             self.ok("/check_stages/" + stages))
        self.assertEqual(
            {(0, "failed"): 1, (0, "waiting"): 2, (5, "done"): 1},
            self.states())
        self.assertReply(409, self.update(job, 2))
        again = self.get(0)
        self.assertEqual((2, 1), (again["jobid"], again["attempt"]))
        self.assertEqual(
            [("failed",), ("expired",)], self.attempts("outcome"))

    def test_a_move_or_a_longer_lifetime_clears_the_flag(self):
        self.ok("/lifetime/0/1")
        self.set_jobs([1, 2, 3])
        self.clock.advance(60)
        self.set_jobs([4])
        self.clock.advance(70)
        self.assertEqual(4, self.expired())
        self.get(0)
        self.call("/update_job/2/0")
        self.assertEqual(2, self.expired())
        for minutes, expired in ((2, 1), (0, 0), (1, 2), (0, 0)):
            self.ok("/lifetime/0/%d" % minutes)
            self.assertEqual(expired, self.expired())
            self.assertCounts()

    def test_neither_a_delays_end_nor_init_gives_a_job_more_time(self):
        self.set_jobs([1])
        self.set_jobs([2], stage=1)
        self.clock.advance(60)
        self.fail(self.get(0))
        self.ok("/init/1/1")
        self.clock.advance(3)
        self.assertEqual({(0, "waiting"): 1, (1, "done"): 1}, self.states())
        self.assertEqual(1, self.expired())
        self.clock.advance(58)
        self.assertEqual(2, self.expired())

    def test_pages_show_nothing_of_a_job_without_a_jobix(self):
        self.set_jobs({1: "secret-command"}, stage=77)
        for path in ("/get", "/get?plain=0", "/lifetime", "/"):
            reply = self.fetch(path, Accept="text/html")
            self.assertEqual(200, reply.status)
            self.assertNotIn("77", reply.text)
        self.assertIn(">77</td>", self.call("/get?plain=1").text)
        self.assertEqual(401, self.fetch("/get?plain=1").status)
        basic = self.basic(4711)
        self.assertIn(">77</td>", self.fetch("/get?plain=1", **basic).text)
        for path in ("/status", "/get/77", "/check_stages"):
            self.assertReply(403, self.fetch(path, **basic))

    def test_a_page_uses_nothing_but_itself(self):
        for path in ("/get", "/get?plain=1", "/lifetime", "/"):
            page = self.call(path, Accept="text/html")
            policy = page.headers["content-security-policy"].split("; ")
            for rule in ("default-src 'none'", "connect-src 'self'",
                         "base-uri 'none'", "form-action 'none'",
                         "frame-ancestors 'none'"):
                self.assertIn(rule, policy)
            for kind in ("script", "style"):
                texts = re.findall(
                    "<%s>(.*?)</%s>" % (kind, kind), page.text, re.S)
                self.assertEqual(len(texts), page.text.count("<%s>" % kind))
                hashes = "".join(" 'sha256-%s'" % base64.b64encode(
                    hashlib.sha256(text.encode()).digest()
                ).decode() for text in texts)
                self.assertIn(kind + "-src" + (hashes or " 'none'"), policy)
            self.assertEqual("no-referrer", page.headers["referrer-policy"])
            self.assertEqual(
                "nosniff", page.headers["x-content-type-options"])

    def test_a_plain_page_stands_in_for_a_dashboard_that_is_not_there(self):
        self.set_jobs([1], stage=77)
        self.assertNotIn(">77</td>", self.call("/get").text)
        self.replace("beside", self.path)
        self.assertIn(">77</td>", self.call("/get").text)
        page = self.fetch("/get").text
        self.assertIn('href="get?plain=1"', page)
        self.assertNotIn("77", page)
        with open(self.path("dashboard.html"), "wb") as file:
            file.write(b"\xff")
        self.assertIn(">77</td>", self.call("/get").text)

    def test_the_plain_page_shows_the_figures_and_renews_itself(self):
        def cells(*values):
            return "".join("<td>%s</td>" % value for value in values)

        self.ok("/init/1/0/0/0")
        self.set_jobs({1: "a", 2: {"b": "<b>\udcff"}, 3: "late"},
                      max_attempts=1, filename="out<1>")
        self.ok("/get/2")
        self.update(self.get(0), 3)
        self.beat("hurt", quarantine="<b>no disk</b>", slots=0)
        self.clock.advance(61)
        claimed = self.get(0, worker="w")
        self.fail(claimed, exit_code=3, stderr="x\n<i>bad</i>\n")
        self.store.tick()
        self.ok("/pause/1", {})
        self.beat("<i>busy", host="node7", stages=[2, 0], slots=16, busy=3)
        self.ok("/drain/<i>busy", {})
        now = self.clock.now
        page = re.sub(" title=.*?>", ">", self.call("/get?plain=1").text)
        for text in (
            '<meta http-equiv="refresh" content="10">',
            "33 %: 1 of 3 jobs done", "left, until 2020-",
            cells(1, 0, 3, "&lt;i&gt;bad&lt;/i&gt;"),
            cells(0, "", "1 waiting, 1 failed", 1, 1,
                  "median 0.001 s, 90 % within 0.001 s"),
            cells(1, "true", "", 0, 0),
            "&lt;b&gt;\\udcff", cells(3, 0, "waiting", "2020-")[:-5],
            "<td>late</td><td>no worker of stage 0 takes jobs: &lt;i&gt;busy"
            " is drained", "<td>out&lt;1&gt;</td>",
            cells("&lt;i&gt;busy", "node7", "[2, 0]", 16, "true", "",
                  jobman.clock_time(now)),
            cells("hurt", "", "", 0, "", "&lt;b&gt;no disk&lt;/b&gt;",
                  jobman.clock_time(now - 61)),
        ):
            self.assertIn(text, page)
        self.assertEqual(
            ["Failures", "Stages", "Workers", "Failed jobs", "Expired jobs"],
            re.findall("<h2>(.*)</h2>", page))
        for text in ("<i>", "<td>None"):
            self.assertNotIn(text, page)
        empty = self.call("/get?plain=1", jobix=1).text
        self.assertIn("0 of 0 jobs done.", empty)
        self.assertIn("<h2>Failures</h2>\n<p>None.", empty)
        self.assertNotIn("hurt", empty)

    def test_lifetimes_are_numbers_and_a_page_for_their_owner_alone(self):
        for path, minutes in (("0", 0), ("0/14", 14), ("0/15", 15),
                              ("0", 15), ("1/0", 0)):
            self.assertEqual(minutes, self.ok("/lifetime/" + path))
        self.assertEqual(0, self.ok("/lifetime/0", jobix=1))
        link, none = 'href="lifetime?plain=1"', "<p>None."
        table = '<td title="stage">0</td><td title="minutes">15</td></tr>'
        asked = "The password is your jobix."
        for query, headers, status, text in (
            ("", {"jobix": "4711"}, 200, table),
            ("?plain=1", {"jobix": "4711"}, 200, table),
            ("", self.basic(4711), 200, table),
            ("?plain=1", self.basic(4711), 200, table),
            ("", {"jobix": "1"}, 200, none),
            ("?plain=1", self.basic(1), 200, none),
            ("", {}, 200, link),
            ("", {"jobix": "x"}, 200, link),
            ("?plain=0", {}, 200, link),
            ("?plain=1", {}, 401, asked),
            ("?plain=1", {"Authorization": "Basic x"}, 401, asked),
        ):
            with self.subTest(query=query, headers=headers):
                reply = self.fetch("/lifetime" + query, **headers)
                self.assertEqual(status, reply.status)
                self.assertEqual(
                    [text], [each for each in (table, none, link, asked)
                             if each in reply.text])
                self.assertEqual(
                    'Basic realm="jobix as password"' if status == 401
                    else None, reply.headers.get("www-authenticate"))

    def test_a_body_of_no_length_is_411(self):
        for path in ("/set", "/submit", "/update_jobs", "/update_job/1/2"):
            connection = http.client.HTTPConnection(
                *self.address, timeout=PATIENCE)
            with contextlib.closing(connection):
                connection.putrequest("POST", path)
                connection.putheader("jobix", "4711")
                connection.endheaders()
                self.assertReply(411, Reply(connection.getresponse()))

    def test_leading_slashes_count_as_one(self):
        self.expect(200, "//set", {1: {"jobstage": 0}})
        job = self.ok("///get/0?lease=60")
        self.expect(200, "//update_job/1/2?claim=" + job["claim"])
        self.assertEqual(self.ok("/status"), self.ok("//status"))
        self.assertIn("jobman", self.fetch("//").text)
        self.expect(404, "/status/")
        self.assertEqual({(2, "waiting"): 1}, self.states())

    def test_only_a_call_that_may_change_something_makes_a_namespace(self):
        query = "select count(*) from namespace where jobix = 4711"
        for _, path, _, endpoint in self.routes():
            if endpoint in jobman.READING:
                status = 404 if path in ("/job/1", "/output/1") else 200
                self.assertEqual(status, self.call(path).status, path)
        self.assertEqual([(0,)], self.rows(query))
        self.assertEqual("nada", self.ok("/get/0"))
        self.set_jobs([1])
        self.assertEqual([(1,)], self.rows(query))

    def test_a_jobix_can_be_changed_without_touching_its_jobs(self):
        self.set_jobs([1, 2])
        self.ok("/pause/4", {})
        job = self.get(0, lease=60)
        before = self.ok("/status"), self.ok("/jobs")
        self.closing.close()
        with contextlib.closing(self.look()) as db:
            db.execute("update namespace set jobix = 5 where jobix = 4711")
            db.commit()
        self.open()
        self.assertEqual(0, self.ok("/status")["totals"]["jobs"])
        self.jobix = 5
        self.assertEqual(before, (self.ok("/status"), self.ok("/jobs")))
        self.complete(job, 2)
        self.assertEqual(5, self.get(0)["jobix"])

    def test_the_ends_of_the_ranges_work(self):
        self.set_jobs([0, 2**53 - 1], stage=10**6 - 1)
        self.assertEqual(0, self.get(10**6 - 1)["jobid"])
        self.assertEqual(2**53 - 1, self.get(10**6 - 1)["jobid"])
        self.expect(200, "/update_job/0/1000000")
        self.assertEqual(10**9, self.ok("/lifetime/1000000/1000000000"))
        self.assertEqual("nada", self.ok("/get/0", jobix=2**63 - 1))

    def test_one_id_serves_any_number_of_jobix(self):
        for self.jobix in (0, 1, 2**63 - 1):
            self.set_jobs({5: self.jobix})
        for self.jobix in (0, 1, 2**63 - 1):
            job = self.get(0)
            self.assertEqual(
                (self.jobix,) * 2, (job["jobcmd"], job["jobix"]))
            self.assertEqual("nada", self.get(0))

    def test_unknown_addresses_and_methods(self):
        for path in ("/x", "/get/0/1/2", "/set/1", "/update_job/1"):
            self.expect(404, path)
        for path, method, allowed in (
            ("/set", "GET", "POST"), ("/get/0", "POST", "GET"),
            ("/pause/0", "GET", "POST"), ("/drain/a", "GET", "POST"),
            ("/update_job/1/1", "PUT", "GET, POST"),
        ):
            reply = self.call(path, b"", method=method)
            self.assertReply(405, reply)
            self.assertEqual(allowed, reply.headers["allow"])
        self.assertEqual(405, self.call("/get/0", method="HEAD").status)

    def test_a_client_of_part_1_drives_a_pipeline_of_two_stages(self):
        self.ok("/init/10/10/10/10/0")
        self.expect(200, "/set", {
            str(i): {"jobstage": 0, "jobcmd": "sim %d" % i}
            for i in range(20)}, **LEGACY)
        for stage in (0, 2):
            while True:
                job = self.ok("/get/%d" % stage)
                if job == "nada":
                    break
                name = "%d-%d.out" % (job["jobid"], stage)
                path = "/update_job/%d/%d" % (job["jobid"], stage + 2)
                reply = self.expect(200, path, {"filename": name}, **LEGACY)
                self.assertIn("Success", reply.text)
                if stage == 2:
                    self.assertEqual(
                        "%d-0.out" % job["jobid"], job["filename"])
        self.assertEqual({(4, "done"): 20}, self.states())

    def test_stages_are_given_names_and_lifetimes(self):
        full = {"0": {"name": "align", "minutes": 5}, "2": {"name": "sort"}}
        for given, status, left in (
            ({"0": {"name": "align"}}, 200, {"0": {"name": "align"}}),
            ({"0": {"minutes": 5}, "2": {"name": "sort"}}, 200, full),
            ({}, 200, full),
            ({"align": {"minutes": 6}, "2": {"minutes": 0}}, 200, {
                "0": {"name": "align", "minutes": 6},
                "2": {"name": "sort", "minutes": 0}}),
            ({"0": {"name": "sort"}, "2": {"name": "align"}}, 200, {
                "0": {"name": "sort", "minutes": 6},
                "2": {"name": "align", "minutes": 0}}),
            ({"0": {"name": None, "minutes": None}}, 200, {
                "2": {"name": "align", "minutes": 0}}),
            ({"2": {"minutes": None}}, 200, {"2": {"name": "align"}}),
            ({"1": {"name": "A_b.c-9" + "x" * 57}}, 200, {
                "1": {"name": "A_b.c-9" + "x" * 57}, "2": {"name": "align"}}),
            ({"1": {"name": None}, "2": {"name": None}}, 200, {}),
            (full, 200, full),
            ({"3": {"name": "sort"}, "0": {"minutes": 9}}, 409, full),
            ({"3": {"name": "new"}, "4": {"name": "new"}}, 409, full),
            ({"0": {"minutes": 9}, "new": {"minutes": 9}}, 404, full),
            ({"0": {"minutes": 9}, "align": {"minutes": 9}}, 400, full),
            *(({"0": {"minutes": 9}, "1": bad}, 400, full) for bad in (
                None, [], "x", {"name": ""}, {"name": "1a"}, {"name": "a b"},
                {"name": "a,b"}, {"name": "all"}, {"name": "last"},
                {"name": "a\n"}, {"name": "\xe9"}, {"name": "x" * 65},
                {"name": 1}, {"minutes": -1}, {"minutes": "1"},
                {"minutes": 10**9 + 1}, {"paused": True}, {"cores": 0},
                {"cores": 10001}, {"cores": "4"}, {"memory": -1},
                {"memory": 2**63}, {"memory": 1.5}, {"memory": "4GB"},
                {"memory": ""}, {"memory": "\u0664G"})),
            *(({"0": {"minutes": 9}, bad: {"minutes": 9}}, 400, full)
              for bad in ("-1", "1000001", "1.0", "all", "")),
            *((bad, 400, full) for bad in ([], [1], 7, None, "x")),
        ):
            with self.subTest(given=given):
                reply = self.assertReply(status, self.post("/stages", given))
                if status == 200:
                    self.assertEqual(left, reply.json())
                self.assertEqual(left, self.ok("/stages"))
        self.assertEqual({"0": 5}, self.ok("/init"))
        self.assertEqual({}, self.ok("/stages", jobix=1))
        self.restart()
        self.assertEqual(full, self.ok("/stages"))

    def calls(self, names):
        """Return calls with each of their stages as `names` say it."""
        zero, one, two, three, four = names
        return (
            ("/set", {i: {"jobstage": zero, "laststage": four}
                      for i in range(1, 6)}),
            ("/submit", {"key": "k", "jobs": [
                {"jobstage": two, "laststage": four}]}),
            ("/lifetime/%s/1" % one, None),
            ("/lifetime/%s" % one, None),
            ("/get/%s,%s?lease=60" % (two, zero), None),
            ("/get/%s/%s" % (zero, three), None),
            ("/update_job/2/%s" % two, None),
            ("/update_job/1/%s" % four, {"filename": "x"}),
            ("/update_jobs", [{"jobid": 3, "jobstage": two},
                              {"jobid": 99, "jobstage": two}]),
            ("/jobs?stage=%s" % two, None),
            ("/pause/%s" % two, {}),
            ("/get/%s" % two, None),
            ("/resume/%s" % two, {}),
            ("/cancel", {"stage": two, "state": "waiting"}),
            ("/retry", {"stage": two}),
            ("/get/%s" % zero, None),
            ("/release", {"stage": one}),
            ("/get/%s" % zero, None),
            ("/check_stages/%s/%s" % (one, four), None),
            ("/forget", {"stage": four}),
            ("/heartbeat", {"worker": "w", "lease": 60, "claims": [],
                            "stages": [two, zero]}),
            ("/stages", {str(two): {"minutes": 7}}),
            ("/workers", None), ("/status", None), ("/jobs", None),
        )

    def replies(self, names):
        """Return what the calls are answered in a new namespace."""
        self.jobix += 1
        self.ok("/stages", {
            str(stage): {"name": name} for stage, name in self.NAMES.items()})
        replies = []
        for path, value in self.calls(names):
            if path.startswith("/check_stages"):
                self.clock.advance(61)
            text = self.expect(200, path, value).text
            text = text.replace(str(self.jobix), "JOBIX")
            replies.append((path, re.sub('"claim": "[^"]*"', "", text)))
        return replies

    def test_the_name_of_a_stage_works_wherever_its_number_does(self):
        start = self.clock.now
        by_number = self.replies(list(self.NAMES))
        self.clock.advance(start - self.clock.now)
        by_name = self.replies(list(self.NAMES.values()))
        for (_, one), (path, other) in zip(by_number, by_name):
            self.assertEqual(one, other, path)
        self.assertCounts()

    def test_a_name_that_no_stage_has_is_404_and_changes_nothing(self):
        self.set_jobs([1, 2])
        self.ok("/stages", {"0": {"name": "align"}}, jobix=1)
        self.ok("/stages", {"2": {"name": "sort"}})
        names = ["align", "Sort", "absent", "sort.", "x" * 64]
        missed = [(path, value) for path, value in self.calls(names)
                  if any(name in path + to_text(value) for name in names)]
        self.assertEqual(22, len(missed))
        for path, value in missed:
            self.refuse(404, path, value)

    def test_answers_say_the_names_of_stages(self):
        self.ok("/stages", {"0": {"name": "align"}, "5": {"name": "later"}})
        self.set_jobs([1])
        self.set_jobs([2], stage=2)
        for stages, names in (([2, 0], [None, "align"]), (None, None)):
            self.beat("w", stages=stages)
            told, = self.ok("/workers")["workers"]
            self.assertEqual(
                (stages, names), (told["stages"], told["stage_names"]))
        self.assertEqual(
            [(0, "align"), (2, None), (5, "later")],
            [(each["stage"], each["name"])
             for each in self.ok("/status")["stages"]])
        self.assertEqual(["align", None], [
            job["stage_name"] for job in self.ok("/jobs")["jobs"]])
        self.assertEqual("align", self.ok("/job/1")["stage_name"])
        self.ok("/stages", {"0": {"name": None}})
        self.assertIsNone(self.ok("/job/1")["stage_name"])

    def test_a_namespace_has_1000_stages_at_most(self):
        self.expect(400, "/init" + 1001 * "/0")
        self.assertEqual({}, self.ok("/init"))
        self.set_jobs([1, 2])
        self.ok("/lifetime/2/7")
        self.ok("/stages", {"4": {"name": "end"}})
        job = self.get(0)  # which makes stage 1 the fourth
        self.expect(200, "/set", {
            i: {"jobstage": i} for i in range(1004, 2000)})
        for path, value in (
            ("/set", {9: {"jobstage": 3}}),
            ("/set", {9: {"jobstage": 0}, 10: {"jobstage": 3}}),
            ("/submit", {"key": "k", "jobs": [{"jobstage": 3}]}),
            ("/get/1999", None), ("/get/0/3", None),
            ("/update_job/1/3?claim=" + job["claim"], None),
            ("/update_job/1/3", {"filename": "x"}),
            ("/check_stages/0/3", None), ("/lifetime/3/0", None),
            ("/stages", {"0": {"minutes": 1}, "3": {"name": "x"}}),
            ("/stages", {"3": {"minutes": 1}}), ("/pause/3", {}),
        ):
            reply, = self.refuse(400, path, value)
            self.assertIn("over 1000 different stages", reply.text)
        self.assertEqual([400, 200, 400], [
            each["status"] for each in self.ok("/update_jobs", [
                {"jobid": 1, "jobstage": 3}, {"jobid": 2, "jobstage": 4},
                {"jobid": 1, "jobstage": 5}])])
        self.restart()  # stage 0 is empty now, and makes room for one
        self.expect(200, "/set", {9: {"jobstage": 3}})
        self.expect(400, "/set", {10: {"jobstage": 5}})
        for path in ("/update_job/1/2", "/get/4/1999", "/lifetime/1999/1"):
            self.expect(200, path)
        self.expect(200, "/set", {9: {"jobstage": 3}}, jobix=1)
        self.assertEqual(1000, len(self.ok("/init" + 1000 * "/0", jobix=8)))
        self.assertCounts()

    def test_a_refused_call_leaves_no_stage_behind(self):
        self.set_jobs([1])
        self.refuse(400, "/set", {
            "2": {"jobstage": 7}, "3": {"jobstage": 8, "after": [99]}})
        self.set_jobs([2], stage=7)
        self.assertEqual([(0,), (7,)], self.rows("select stage from stage"))


class WsgiContractTest(ContractTest):
    """The same through the WSGI door, its conduct validated."""

    front = WsgiFront


class ClaimTest(StoreCase):
    """Part 2: claims, leases, attempts, and who may end them."""

    ABOUT = {"host": "n\u00e41", "stages": [2, 0], "slots": 8,
             "memory": 2**35, "busy": 0, "done": 2**53, "failed": 1,
             "quarantine": "too hot"}

    def workers(self, *columns):
        """Return columns of the workers, as /workers lists them."""
        answer = self.ok("/workers")
        self.assertEqual(self.clock(), answer["time"])
        return [
            tuple(worker[name] for name in columns)
            for worker in answer["workers"]
        ]

    def lapse(self, stage, times=1):
        """Let a job's lease end, several times."""
        for _ in range(times):
            self.get(stage, lease=1)
            self.clock.advance(2)

    def carried(self, job):
        """Return what a claimed job carries of files, None what it doesn't."""
        return job.get("files"), job.get("made")

    def replaced(self):
        """Return what each attempt's update has replaced."""
        return [given and json.loads(given)
                for given, in self.attempts("given")]

    def test_late_worker_cannot_overwrite_a_newer_attempt(self):
        self.set_jobs({1: "align"})
        first = self.get(stage=0, lease=60)
        self.clock.advance(61)
        second = self.get(stage=0, lease=60)
        self.assertReply(409, self.update(first, stage=2))
        self.assertReply(409, self.fail(first))
        self.assertReply(409, self.release(first))
        self.assertEqual({(1, "working"): 1}, self.states())
        self.assertReply(200, self.update(second, stage=2))
        self.assertEqual({(2, "waiting"): 1}, self.states())

    def test_a_late_result_is_taken_while_nobody_else_has_the_job(self):
        self.set_jobs([1])
        job = self.get(0, lease=60, worker="w")
        self.clock.advance(61)
        self.assertEqual({(0, "waiting"): 1}, self.states())
        self.complete(job, 2)
        self.assertEqual({(2, "waiting"): 1}, self.states())
        self.assertEqual(
            [("w", "done", 2)], self.attempts("worker", "outcome", "target"))

    def test_a_stale_claim_is_409_whatever_made_it_stale(self):
        ways = (
            lambda job: self.release(job),
            lambda job: self.fail(job),
            lambda job: self.post("/cancel", {"ids": [job["jobid"]]}),
            lambda job: self.call("/update_job/%d/3" % job["jobid"]),
        )
        for jobid, way in enumerate(ways):
            self.set_jobs([jobid])
            job = self.get(0, lease=60)
            self.assertReply(200, way(job))
            before = self.states()
            self.assertReply(409, self.update(job, 2))
            self.assertEqual(before, self.states())
            self.post("/cancel", {"all": True})

    def test_the_same_update_again_is_200_and_changes_nothing(self):
        self.set_jobs([1])
        first = self.get(0, lease=60)
        for _ in range(3):
            self.complete(first, 2)
        self.assertReply(409, self.update(first, 4))
        self.assertReply(409, self.update(dict(first, claim="another"), 2))
        second = self.get(2, lease=60)
        self.complete(first, 2)
        self.assertEqual({(3, "working"): 1}, self.states())
        for _ in range(2):
            self.complete(second, 4)
        self.assertEqual(2, len(self.attempts("id")))

    def test_the_same_failure_or_release_again_counts_once(self):
        self.set_jobs([1, 2])
        first, second = self.get(0), self.get(0)
        for seconds, state, delay in (
            (0, "delayed", 2), (0, "delayed", 2), (1.5, "delayed", 0.5),
            (1, "waiting", 0),
        ):
            self.clock.advance(seconds)
            self.assertEqual(
                {"jobid": 1, "state": state, "failures": 1, "delay": delay},
                self.fail(first).json())
            self.assertReply(200, self.release(second))
        self.assertReply(409, self.release(first))
        self.assertEqual({(0, "waiting"): 2}, self.states())
        self.get(0, lease=60)
        self.assertEqual("working", self.fail(first).json()["state"])

    def test_an_attempt_to_be_made_later_is_not_counted_as_a_failure(self):
        self.set_jobs([1], max_attempts=2)
        for delay in (2, 8, 32):
            job = self.get(0, lease=60)
            answer = {"jobid": 1, "state": "delayed", "failures": 0,
                      "delay": delay}
            for _ in range(2):  # the second is a repetition
                reply = self.fail(job, exit_code=75, error="no licence")
                self.assertEqual(answer, reply.json())
            self.assertReply(409, self.fail(job, exit_code=1))
            self.clock.advance(delay + 0.1)
        self.assertEqual(1, self.fail(self.get(0)).json()["failures"])
        self.assertEqual(
            [("deferred", 75, "no licence")] * 3 + [("failed", None, None)],
            self.attempts("outcome", "exit_code", "error"),
        )
        self.clock.advance(3)
        later = self.fail(self.get(0, lease=60), exit_code=75).json()
        self.assertEqual((1, 512), (later["failures"], later["delay"]))
        self.clock.advance(513)
        later = self.fail(self.get(0, lease=60), exit_code=75).json()
        self.assertEqual("delayed", later["state"])
        self.clock.advance(601)
        self.assertEqual("failed", self.fail(self.get(0)).json()["state"])

    def test_a_lapsed_job_goes_back_and_fails_after_five(self):
        self.set_jobs([1])
        tokens = set()
        for attempt in range(1, 6):
            job = self.get("0/7", lease=60)
            tokens.add(job["claim"])
            self.assertEqual(attempt, job["attempt"])
            self.assertEqual("nada", self.get(7))
            self.clock.advance(59.9)
            self.assertEqual({(7, "working"): 1}, self.states())
            self.clock.advance(0.2)
            state = "failed" if attempt == 5 else "waiting"
            self.assertEqual({(0, state): 1}, self.states())
        self.assertEqual(5, len(tokens))
        self.assertEqual("nada", self.get(0))
        self.assertReply(409, self.update(job, 2))
        spent = ("lapsed", "5 leases lapsed in this stage: its workers were"
                 " not heard of in time.")
        self.assertEqual([("lapsed", None)] * 4 + [spent],
                         self.attempts("outcome", "error"))

    def test_a_heartbeat_renews_leases_and_names_the_lost(self):
        self.set_jobs([1, 2, 3])
        kept, lost, done = (self.get(0, lease=60) for _ in range(3))
        self.update(done, 2)
        self.post("/cancel", {"ids": [lost["jobid"]]})
        claims = [[job["jobid"], job["claim"]] for job in (kept, lost, done)]
        claims += [[kept["jobid"], "another"], [99, "x"]]
        self.clock.advance(50)
        self.assertEqual(
            {"lost": [2, 3, 1, 99], "drain": False, "beat": 5},
            self.beat("w", claims=claims))
        self.clock.advance(50)
        self.assertEqual(1, self.states()[(1, "working")])
        self.clock.advance(11)
        self.assertNotIn((1, "working"), self.states())

    def test_a_heartbeat_mends_a_lapse_where_nobody_took_the_job(self):
        self.set_jobs([1])
        job = self.get("0/5", lease=60)
        began = self.clock.now
        for _ in range(9):
            self.clock.advance(61)
            self.assertEqual({(0, "waiting"): 1}, self.states())
            answer = self.beat("w", claims=[[1, job["claim"]]])
            self.assertEqual([], answer["lost"])
        self.assertEqual({(5, "working"): 1}, self.states())
        self.assertEqual("nada", self.get(0))
        self.assertEqual([], self.attempts("outcome"))
        shown = self.ok("/job/1")
        self.assertEqual((0, began), (shown["lapses"], shown["since"]))
        self.complete(job, 2)
        self.assertEqual([("done",)], self.attempts("outcome"))

    def test_a_heartbeat_gives_a_lease_to_a_claim_without(self):
        self.set_jobs([1])
        self.beat("w", claims=[[1, self.get(0)["claim"]]])
        self.assertEqual("nada", self.get(1))
        self.clock.advance(61)
        self.assertEqual({(0, "waiting"): 1}, self.states())

    def test_many_workers_beat_less_often(self):
        def pauses(*leases):
            return [self.beat("a", lease=lease)["beat"] for lease in leases]

        self.assertEqual([5, 1], pauses(120, 3))
        for number in range(600):
            self.beat("w%d" % number)
        self.clock.advance(6)
        self.assertEqual([601 / 60, 4], pauses(120, 12))
        self.clock.advance(200)  # the others have ended
        self.assertEqual([5], pauses(120))

    def test_a_worker_holds_what_it_has_claimed(self):
        self.set_jobs(range(4))
        first = self.get(0, worker="a")
        self.clock.advance(7)
        self.get(0, n=2, worker="a")
        self.get(0, worker="b", lease=60)
        for name in ("a", "b", "c"):
            self.beat(name)
        self.assertEqual(
            [("a", [[0, 7], [1, 0], [2, 0]]), ("b", [[3, 0]]), ("c", [])],
            self.workers("name", "holds"))
        self.update(first, 2)
        self.clock.advance(61)
        self.store.tick()
        self.assertEqual([([[1, 61], [2, 61]],), ([],), ([],)],
                         self.workers("holds"))

    def test_workers_are_those_heard_of_in_the_last_day(self):
        self.assertEqual([], self.workers())
        self.beat("first", **self.ABOUT)
        self.clock.advance(9)
        self.beat("second", quarantine="")
        more = {"drain": False, "holds": []}
        heard = dict(self.ABOUT, **more, name="first",
                     heard=self.clock() - 9, stage_names=[None, None])
        blank = dict(dict.fromkeys([*self.ABOUT, "stage_names"]), **more,
                     name="second", heard=self.clock())
        self.assertEqual([blank, heard], self.ok("/workers")["workers"])
        self.assertEqual([], self.ok("/workers", jobix=1)["workers"])
        self.clock.advance(86400 - 8)
        self.assertEqual([("second",)], self.workers("name"))
        self.beat("\udcff", host="\ud800", quarantine="q" * 5000)
        self.beat("first", slots=3)
        self.assertEqual(
            [("\\udcff", None, "\\ud800", "q" * 4096),
             ("first", 3, None, None), ("second", None, None, None)],
            self.workers("name", "slots", "host", "quarantine"))

    def test_a_worker_that_ended_well_is_gone(self):
        for name in ("a", "b", "c", "d", "e"):
            self.beat(name)
        self.beat("b", quarantine="no disk")
        self.beat("c", quarantine="no disk")
        self.ok("/heartbeat", {"worker": "d", "lease": 60, "claims": [],
                               "ended": True}, jobix=1)  # it is another one
        self.beat("a", ended=True)
        self.beat("b", ended=True)
        self.beat("c", ended=True, quarantine="still")
        self.beat("d", ended=False)
        self.assertEqual(
            [("b", "no disk"), ("c", "still"), ("d", None), ("e", None)],
            sorted(self.workers("name", "quarantine")))
        self.beat("b")
        self.assertIn(("b", None), self.workers("name", "quarantine"))

    def test_a_drained_worker_is_told_until_it_is_undrained(self):
        name, path = "n\u00e4 1/x:7", "drain/n%C3%A4%201/x:7"
        for each in (name, "b"):
            self.assertFalse(self.beat(each)["drain"])
        self.assertEqual({"worker": name, "drain": True},
                         self.ok("/" + path, {}))
        for _ in range(2):
            self.assertTrue(self.beat(name, busy=1)["drain"])
            self.assertFalse(self.beat("b")["drain"])
        self.assertEqual({(name, True), ("b", False)},
                         set(self.workers("name", "drain")))
        self.assertEqual({"worker": name, "drain": False},
                         self.ok("/un" + path, {}))
        self.assertFalse(self.beat(name)["drain"])
        self.expect(404, "/drain/c", {})
        self.expect(404, "/undrain/c", {})
        self.expect(404, "/drain/b", {}, jobix=1)
        self.ok("/drain/b", {})
        self.beat("b", ended=True)
        self.assertFalse(self.beat("b")["drain"])

    def test_nothing_is_handed_out_of_a_paused_stage(self):
        self.set_jobs([1, 2])
        self.set_jobs([3], stage=2)
        claimed = self.get(0)
        for _ in range(2):
            self.assertEqual({"stage": 0, "paused": True},
                             self.ok("/pause/0", {}))
        self.complete(claimed, 0)
        self.assertEqual("nada", self.get(0))
        self.assertEqual(3, self.get("0,2")["jobid"])
        self.assertEqual([], self.get(0, n=5))
        self.expect(200, "/set", {1: {"jobstage": 0}}, jobix=8)
        self.assertEqual(1, self.ok("/get/0", jobix=8)["jobid"])
        self.ok("/pause/7", {})  # an empty one
        figures = self.ok("/status")["stages"]
        self.assertEqual(
            {0: (2, True), 3: (1, False), 7: (0, True)},
            {s["stage"]: (s["jobs"], s["paused"]) for s in figures})
        self.restart()
        self.assertEqual("nada", self.get(0))
        self.assertEqual({"stage": 0, "paused": False},
                         self.ok("/resume/0", {}))
        self.assertEqual([1, 2], [j["jobid"] for j in self.get(0, n=5)])

    def test_a_server_that_starts_gives_every_lease_its_full_time(self):
        self.set_jobs([1, 2])
        long, short = self.get(0, lease=100), self.get(0, lease=10)
        self.clock.advance(9)
        self.restart()
        self.clock.advance(9)
        self.assertEqual({(1, "working"): 2}, self.states())
        self.closing.close()
        self.clock.advance(1000)  # the server is away
        self.open()
        self.clock.advance(9)
        self.assertEqual({(1, "working"): 2}, self.states())
        self.clock.advance(2)
        self.assertEqual(
            {(1, "working"): 1, (0, "waiting"): 1}, self.states())
        self.complete(long, 2)
        self.complete(short, 2)

    def test_a_failed_attempt_is_delayed_longer_each_time(self):
        self.set_jobs([1], max_attempts=8)
        for failures, delay in enumerate([2, 8, 32, 128, 512, 600, 600], 1):
            job = self.get(0)
            self.assertEqual(failures, job["attempt"])
            self.assertEqual(
                {"jobid": 1, "state": "delayed", "failures": failures,
                 "delay": delay}, self.fail(job).json())
            self.clock.advance(delay - 0.1)
            self.assertEqual("nada", self.get(0))
            self.clock.advance(0.2)
        self.assertEqual("failed", self.fail(self.get(0)).json()["state"])
        self.clock.advance(10**6)
        self.assertEqual("nada", self.get(0))
        self.assertEqual({(0, "failed"): 1}, self.states())

    def test_three_failures_fail_a_job_that_says_nothing_else(self):
        self.set_jobs([1])
        for state in ("delayed", "delayed", "failed"):
            self.assertEqual(state, self.fail(self.get("0/5")).json()["state"])
            self.clock.advance(1000)
        self.assertEqual({(0, "failed"): 1}, self.states())

    def test_a_success_starts_the_next_stage_with_fresh_budgets(self):
        self.set_jobs([1], max_attempts=2)
        for stage in (0, 2, 4):
            self.lapse(stage, 4)
            answer = self.fail(self.get(stage)).json()
            self.assertEqual(
                ("delayed", 1), (answer["state"], answer["failures"]))
            self.clock.advance(3)
            job = self.get(stage)
            self.assertEqual(6, job["attempt"])
            self.complete(job, stage + 2)

    def test_a_claim_from_a_claim_without_lease_is_a_fresh_one(self):
        self.set_jobs([1], max_attempts=2)
        self.fail(self.get(0))
        self.clock.advance(3)
        self.lapse(0, 4)
        self.get(0)
        self.assertEqual(1, self.get(1, lease=60)["attempt"])
        self.assertEqual(("superseded",), self.attempts("outcome")[-1])
        self.clock.advance(61)
        self.assertEqual({(1, "waiting"): 1}, self.states())
        answer = self.fail(self.get(1)).json()
        self.assertEqual(("delayed", 1), (answer["state"], answer["failures"]))

    def test_fail_and_release_without_token_mean_the_current_claim(self):
        self.set_jobs([1, 2])
        self.get(0), self.get(0, lease=9)
        self.expect(200, "/fail_job/1", {})
        self.expect(200, "/release_job/2", {})
        for path in ("/fail_job/1", "/fail_job/2", "/release_job/1"):
            self.expect(409, path, {})
        self.expect(404, "/fail_job/3", {})
        self.expect(404, "/release_job/3", {})

    def test_a_release_counts_nothing(self):
        self.set_jobs([1], max_attempts=1)
        for _ in range(6):
            job = self.get("0/9", lease=60)
            self.assertEqual(1, job["attempt"])
            self.assertReply(200, self.release(job))
        self.assertEqual({(0, "waiting"): 1}, self.states())

    def test_an_attempt_leaves_a_row_of_its_own(self):
        self.set_jobs([1])
        job = self.get(0, worker="node7")
        self.clock.advance(5)
        self.fail(job, error="exit status 9", exit_code=9,
                  stderr="x" * 5000 + "\ud800end", more="ignored")
        self.clock.advance(9)
        self.fail(self.get(0), exit_code=2**70, error="e" * 5000)
        self.clock.advance(9)
        self.update(self.get(0, worker="node8"), 2)
        self.assertEqual(
            [(1, 0, "node7", 5.0, "failed", 9, "exit status 9"),
             (2, 0, None, 0.0, "failed", 2**31, "e" * 4096),
             (3, 0, "node8", 0.0, "done", None, None)],
            self.attempts("attempt", "stage", "worker", "ended - started",
                          "outcome", "exit_code", "error"))
        stderr = self.attempts("stderr")[0][0]
        self.assertEqual("\\ud800end", stderr[-9:])
        self.assertLess(len(stderr), 4200)

    def test_n_claims_many_in_one_call(self):
        self.set_jobs(range(30))
        self.assertEqual(list(range(25)),
                         [job["jobid"] for job in self.get(0, n=25)])
        self.replace("MAX_CLAIMS", 3)
        rest = self.get(0, n=10**12, lease=60)
        self.assertEqual([25, 26, 27], [job["jobid"] for job in rest])
        self.assertEqual(2, len(self.get(0, n=5)))
        self.assertEqual([], self.get(0, n=1))
        self.assertEqual({(1, "working"): 30}, self.states())

    def test_a_claim_may_name_several_stages_in_order(self):
        self.set_jobs([1, 2])
        self.set_jobs([3], stage=2)
        self.assertEqual([3, 1], [j["jobid"] for j in self.get("2,0", n=2)])
        self.assertEqual(2, self.get("2,0")["jobid"])
        self.assertEqual("nada", self.get("2,0"))
        self.set_jobs([4])
        self.set_jobs([5], stage=1)
        jobs = [job for job in self.get("0,1,0", n=5) if job["jobid"] > 3]
        self.assertEqual([4, 5], [job["jobid"] for job in jobs])
        for job in jobs:
            self.complete(job, 4)

    def test_a_done_job_can_be_claimed_and_is_done_again_afterwards(self):
        self.set_jobs([1], stage=4, laststage=4)
        ways = (
            lambda job: self.release(job),
            lambda job: self.clock.advance(61),
            lambda job: (self.fail(job), self.clock.advance(10)),
        )
        for way in ways:
            way(self.get(4, lease=60))
            self.assertEqual({(4, "done"): 1}, self.states())

    def test_update_jobs_reports_each_by_itself(self):
        self.set_jobs([1, 2, 3, 4])
        jobs = self.get(0, n=3, lease=60)
        self.release(jobs[1])
        self.assertEqual(
            [{"jobid": 1, "status": 200}, {"jobid": 2, "status": 409},
             {"jobid": 99, "status": 404}, {"jobid": 4, "status": 200}],
            self.ok("/update_jobs", [
                {"jobid": 1, "jobstage": 2, "claim": jobs[0]["claim"],
                 "filename": "one", "jobcmd": ["new"]},
                {"jobid": 2, "jobstage": 2, "claim": jobs[1]["claim"]},
                {"jobid": 99, "jobstage": 2},
                {"jobid": 4, "jobstage": 2},
            ]))
        self.assertEqual(
            {(0, "waiting"): 1, (1, "working"): 1, (2, "waiting"): 2},
            self.states())
        job = self.get(2)
        self.assertEqual(("one", ["new"]), (job["filename"], job["jobcmd"]))

    def test_an_update_says_what_files_were_made(self):
        self.set_jobs([1])
        files = made("a", "b/\udcff\ud800 \0")
        job = self.get(0)
        self.assertEqual((None, None), self.carried(job))
        self.complete(job, 2, files=files)
        for stage, given in ((2, {"files": None}), (4, {})):
            job = self.get(stage)  # without a word of files they stay
            self.assertEqual((files, 0), self.carried(job))
            self.complete(job, stage + 2, **given)
        self.ok("/update_jobs", [
            {"jobid": 1, "jobstage": 8, "claim": self.get(6)["claim"],
             "files": files[:1]}])
        job = self.get(8)
        self.assertEqual((files[:1], 6), self.carried(job))
        self.complete(job, 10, files=[])
        job = self.get(10)
        self.assertEqual((None, 8), self.carried(job))
        self.assertNotIn("files", job)
        self.set_jobs([2])  # which nobody claims
        self.expect(200, "/update_job/2/2", {"files": files})
        self.assertEqual((files, None), self.carried(self.get(2)))

    def test_an_attempt_keeps_what_its_update_replaced(self):
        self.set_jobs({1: ["old"]})
        files = made("a")
        for stage, given in (
            (0, {"files": files}), (2, {"jobcmd": 0, "filename": "f"}),
            (4, {}), (6, {"jobcmd": 1, "filename": "g", "files": []}),
            (8, {"files": files}),
        ):
            self.complete(self.get(stage, lease=60), stage + 2, **given)
        self.fail(self.get(10))
        self.assertEqual([
            {"files": None, "files_stage": None},
            {"jobcmd": '["old"]', "filename": None},
            None,
            {"jobcmd": "0", "filename": '"f"', "files": json.dumps(files),
             "files_stage": 0},
            {"files": "[]", "files_stage": 6},
            None,
        ], self.replaced())

    def test_a_late_result_too_keeps_what_it_replaced(self):
        self.set_jobs({1: "old", 2: "old"})
        files = made("a")
        for job in self.get(0, n=2, lease=60):
            self.complete(job, 2, files=files)
        first, second = self.get(2, n=2, lease=60)
        self.clock.advance(61)
        self.assertEqual({(2, "waiting"): 2}, self.states())
        self.complete(first, 4, jobcmd=1, filename="g", files=files)
        self.complete(second, 4)
        self.assertEqual([
            {"jobcmd": '"old"', "filename": None, "files": json.dumps(files),
             "files_stage": 0},
            None,
        ], self.replaced()[2:])

    def test_a_job_is_done_when_it_reaches_its_last_stage(self):
        self.ok("/init/0/0/0/0/0")
        self.set_jobs([1])
        self.set_jobs([2], laststage=2)
        for job in self.get(0, n=2):
            self.update(job, 2)
        self.assertEqual({(2, "waiting"): 1, (2, "done"): 1}, self.states())
        self.call("/update_job/1/5")
        self.assertEqual({(5, "done"): 1, (2, "done"): 1}, self.states())
        self.assertEqual(2, self.ok("/status")["totals"]["states"]["done"])

    def test_init_after_set_makes_jobs_done_that_are_there(self):
        self.set_jobs([1, 5, 6, 7], stage=2, max_attempts=1)
        self.set_jobs([8], stage=2, laststage=9)
        self.set_jobs([3])
        self.set_jobs([4], stage=10**6)
        self.call("/update_job/1/2")
        self.fail(self.get(2))  # this and the two next are left alone
        job = self.get(2, lease=60)
        self.ok("/cancel", {"ids": [6]})
        kept = {(0, "waiting"): 1, (2, "failed"): 1, (2, "cancelled"): 1,
                (3, "working"): 1}
        self.assertEqual(
            {**kept, (2, "waiting"): 2, (10**6, "waiting"): 1}, self.states())
        self.ok("/init/0/0/0")
        self.assertEqual(
            {**kept, (2, "waiting"): 1, (2, "done"): 1, (10**6, "done"): 1},
            self.states())
        self.complete(job, 4)

    def test_submit_gives_ids_and_the_same_key_gives_the_same(self):
        self.set_jobs([7])
        jobs = [{"jobstage": 0, "jobcmd": "a"}, {"jobstage": 0}]
        for key, entries, ids in (
            ("none", [], []), ("k", jobs, [8, 9]), ("k", jobs, [8, 9]),
            ("l", jobs[:1], [10]),
        ):
            answer = self.ok("/submit", {"key": key, "jobs": entries})
            self.assertEqual({"ids": ids}, answer)
        self.assertEqual({(0, "waiting"): 4}, self.states())
        self.set_jobs([2**53 - 1])  # with it the ids are used up
        self.refuse(409, "/submit", {"key": "m", "jobs": [{"jobstage": 0}]})

    def test_a_delay_outlasts_a_restart(self):
        self.set_jobs([1])
        self.fail(self.get(0))
        self.restart()
        self.clock.advance(1)
        self.assertEqual({(0, "delayed"): 1}, self.states())
        self.clock.advance(2)
        self.assertEqual({(0, "waiting"): 1}, self.states())

    def test_a_jobix_has_ids_keys_and_a_last_stage_of_its_own(self):
        jobs = {"key": "k", "jobs": [{"jobstage": 2}, {"jobstage": 0}]}
        for jobix in (1, 2):
            ids = self.ok("/submit", jobs, jobix=jobix)
            self.assertEqual({"ids": [1, 2]}, ids)
        self.ok("/init/0/0/0", jobix=1)
        self.expect(200, "/set", {3: {"jobstage": 2}}, jobix=2)
        self.expect(200, "/update_job/2/2", jobix=2)
        self.assertEqual({(2, "waiting"): 3}, self.states(jobix=2))
        self.assertEqual(
            {(2, "done"): 1, (0, "waiting"): 1}, self.states(jobix=1))


class RejectTest(StoreCase):
    """Part 2: files that a job was given and that are gone."""

    def work(self, stage, **given):
        """Claim a job and update it, two stages up."""
        self.complete(self.get(stage, lease=60), stage + 2, **given)

    def reject(self, job, **report):
        path = "/reject_job/%(jobid)d?claim=%(claim)s" % job
        return self.post(path, report)

    def content(self, stage):
        """Return a claimed job, and what it is given to work with."""
        job = self.get(stage, lease=60)
        names = "jobcmd", "filename", "files", "made"
        return job, tuple(job.get(name) for name in names)

    def assertBack(self, *content):
        """Assert with what a rejected job is in stage 0 again."""
        self.clock.advance(3)
        self.assertEqual(content, self.content(0)[1])

    def test_a_job_goes_back_as_the_stages_that_made_its_files_had_it(self):
        a, b = made("a"), made("b", "\udcff")
        self.set_jobs({1: "zero"})
        self.work(0, files=a, jobcmd="two", filename="f2")
        self.work(2, files=b, jobcmd="four")
        job, content = self.content(4)
        self.assertEqual(("four", "f2", b, 2), content)
        answer = {"jobid": 1, "state": "delayed", "stage": 2, "rejects": 1,
                  "delay": 2}
        for _ in range(2):  # the second is a repetition
            reply = self.reject(job, error="b is gone", stderr="s")
            self.assertEqual(answer, self.assertReply(200, reply).json())
        self.assertEqual({(2, "delayed"): 1}, self.states())
        self.assertReply(409, self.update(job, 6))
        self.clock.advance(2.1)
        job, content = self.content(2)
        self.assertEqual(("two", "f2", a, 0), content)
        self.assertEqual(1, job["attempt"])
        answer.update(stage=0, rejects=2, delay=8)
        self.assertEqual(answer, self.reject(job).json())
        self.clock.advance(8.1)
        self.assertEqual(("zero", None, None, None), self.content(0)[1])
        self.assertEqual(
            [("done", None), ("done", None), ("rejected", "b is gone"),
             ("rejected", None)], self.attempts("outcome", "error"))

    def test_what_later_stages_replaced_is_restored_too(self):
        self.set_jobs({1: "zero"}, filename="in")
        a = made("a")
        self.work(0, files=a)
        self.work(2, jobcmd="four")
        self.work(4, jobcmd="six", filename="f6")
        job, content = self.content(6)
        self.assertEqual(("six", "f6", a, 0), content)
        self.assertEqual(0, self.reject(job).json()["stage"])
        self.assertBack("zero", "in", None, None)

    def test_a_job_gets_back_nothing_of_another(self):
        self.set_jobs({1: "one"}, filename="in")
        self.set_jobs({2: "two"}, filename="other")
        for given in ({}, {"jobcmd": "new", "filename": "out"}):
            self.work(0, files=made("a"), **given)
        self.assertReply(200, self.reject(self.get(2)))
        self.assertBack("one", "in", None, None)

    def test_only_an_attempt_that_was_done_is_undone(self):
        self.set_jobs({1: "zero"})
        self.work(0, files=made("a"), jobcmd="two")
        self.call("/update_job/1/0")
        self.fail(self.get(0))
        self.call("/update_job/1/2")
        self.expect(200, "/reject_job/1", {})
        self.assertBack("zero", None, None, None)

    def test_nothing_is_restored_as_nothing(self):
        self.set_jobs([1])
        self.work(0, jobcmd=["new"], filename="f", files=made("a"))
        self.reject(self.get(2))
        self.assertBack(None, None, None, None)

    def test_a_stage_done_twice_is_restored_as_it_was_done_last(self):
        self.set_jobs({1: "first", 2: "other"})
        files = made("a")
        self.work(0, files=files, jobcmd="two")
        self.work(0, files=files, jobcmd="two")
        self.expect(
            200, "/update_job/1/0", {"jobcmd": "again", "files": []})
        self.work(0, files=files, jobcmd="two")
        self.expect(200, "/reject_job/1", {})
        self.clock.advance(3)
        self.assertEqual("again", self.content(0)[1][0])

    def test_files_of_no_attempt_are_taken_away(self):
        self.set_jobs({1: "zero"})
        self.release(self.get(0))
        self.expect(
            200, "/update_job/1/2", {"files": made("a"), "jobcmd": "two"})
        self.expect(200, "/reject_job/1", {})
        self.assertBack("two", None, None, None)

    def test_rejections_fail_a_job_in_the_stage_that_made_its_files(self):
        self.set_jobs([1])
        for state, rejects, delay in (
            ("delayed", 1, 2), ("delayed", 2, 8), ("failed", 3, 0),
        ):
            self.work(0, files=made("a"))
            self.assertEqual(
                {"jobid": 1, "state": state, "stage": 0, "rejects": rejects,
                 "delay": delay}, self.reject(self.get(2)).json())
            self.clock.advance(100)
        self.set_jobs([2], max_attempts=1)
        self.work(0, files=made("a"))
        self.assertEqual("failed", self.reject(self.get(2)).json()["state"])
        self.assertEqual({(0, "failed"): 2}, self.states())
        self.ok("/retry", {"ids": [1]})
        self.work(0, files=made("a"))
        self.assertEqual(1, self.reject(self.get(2)).json()["rejects"])

    def test_a_rejection_starts_the_stage_with_fresh_budgets(self):
        self.set_jobs([1], max_attempts=2)
        self.work(0, files=made("a"))
        self.fail(self.get(2))
        self.clock.advance(3)
        for _ in range(4):
            self.get(2, lease=1)
            self.clock.advance(2)
        self.assertReply(200, self.reject(self.get(2)))
        self.clock.advance(3)
        self.get(0, lease=1)
        self.clock.advance(2)
        self.assertEqual({(0, "waiting"): 1}, self.states())
        self.assertEqual("delayed", self.fail(self.get(0)).json()["state"])

    def test_without_a_token_only_what_nobody_works_on_is_rejected(self):
        self.set_jobs(range(7), laststage=6, max_attempts=2)
        for _ in range(7):
            self.work(0, files=made("a"))
        for jobid, to in ((0, 6), (1, 4), (2, 4)):
            self.call("/update_job/%d/%d" % (jobid, to))
        self.fail(self.get(4))  # 1 and 2 are delayed
        self.fail(self.get(4))
        self.ok("/cancel", {"ids": [3]})
        self.get(2), self.get(2, lease=60)  # 4 and 5
        self.clock.advance(2)
        self.fail(self.get(4))  # the last attempt
        self.assertEqual({
            (6, "done"): 1, (4, "failed"): 1, (4, "waiting"): 1,
            (2, "cancelled"): 1, (3, "working"): 2, (2, "waiting"): 1},
            self.states())
        for jobid, status in enumerate((200, 200, 200, 409, 409, 409, 200,
                                        404)):
            self.expect(status, "/reject_job/%d" % jobid, {})
        self.assertEqual({
            (0, "delayed"): 4, (2, "cancelled"): 1, (3, "working"): 2},
            self.states())
        self.assertNotIn(("rejected",), self.attempts("outcome"))

    def test_a_job_without_such_files_cannot_be_rejected(self):
        self.set_jobs([1, 2, 3])
        job = self.get(0, lease=60)
        self.assertReply(409, self.reject(job))
        self.expect(409, "/reject_job/2", {})
        self.complete(job, 2, files=[])
        self.assertReply(409, self.reject(self.get(2)))
        self.expect(200, "/update_job/2/2", {"files": made("a")})
        self.assertReply(409, self.reject(self.get(2)))  # nobody made them
        self.assertReply(409, self.reject(dict(job, claim="another")))
        self.work(0, files=made("a"))
        self.refuse(409, "/reject_job/3", {"files": made("b")})
        file, = made("a")
        turned = {key: file[key] for key in sorted(file)}
        self.expect(200, "/reject_job/3", {"files": [turned]})
        self.assertEqual(
            {(3, "working"): 2, (0, "delayed"): 1}, self.states())

    def test_a_late_rejection_is_taken_while_nobody_else_has_the_job(self):
        self.set_jobs([1])
        self.work(0, files=made("a"))
        job = self.get(2, lease=60)
        self.clock.advance(61)
        self.assertEqual({(2, "waiting"): 1}, self.states())
        self.assertReply(200, self.reject(job))
        self.assertReply(200, self.reject(job))
        self.assertEqual({(0, "delayed"): 1}, self.states())
        self.assertEqual(
            [("done",), ("rejected",)], self.attempts("outcome"))

    def test_a_lapsed_attempt_is_not_rejected_by_others(self):
        self.set_jobs([1])
        self.work(0, files=made("a"))
        job = self.get(2, lease=60)
        self.clock.advance(61)
        self.expect(200, "/reject_job/1", {})
        self.assertReply(409, self.reject(job))
        self.assertEqual([("done",), ("lapsed",)], self.attempts("outcome"))

    def test_retry_of_a_done_job_gives_its_stage_what_it_had(self):
        self.set_jobs({1: "zero"}, laststage=4)
        a = made("a")
        self.work(0, files=a, jobcmd="two")
        self.work(2, jobcmd="four", filename="f4")
        self.ok("/retry", {"ids": [1]})
        self.assertEqual({(2, "waiting"): 1}, self.states())
        job, content = self.content(2)
        self.assertEqual(("two", None, a, 0), content)
        self.complete(job, 4, files=made("b"), jobcmd="four")
        self.ok("/retry", {"ids": [1]})
        self.assertEqual(("two", None, a, 0), self.content(2)[1])

    def test_retry_of_a_failed_job_leaves_it_what_it_has(self):
        self.set_jobs({1: "zero"}, max_attempts=1)
        self.work(0, files=made("a"), jobcmd="two")
        self.fail(self.get(2))
        self.ok("/retry", {"ids": [1]})
        self.assertEqual(("two", None, made("a"), 0), self.content(2)[1])
        self.expect(200, "/update_job/1/0", {"jobcmd": "again"})
        self.fail(self.get(0))
        self.ok("/retry", {"ids": [1]})
        self.assertEqual("again", self.content(0)[1][0])


class ShowTest(StoreCase):
    """Part 2: what there is to know of jobs."""

    def page(self, query=""):
        """Return the ids on a page of jobs, and where to go on."""
        answer = self.ok("/jobs?" + query)
        return [job["jobid"] for job in answer["jobs"]], answer["after"]

    def turn(self, query):
        """Return the ids on each of the pages there are, to the last."""
        pages, place = [], ""
        while place is not None:
            page, place = self.page(query + "&after=%s" % place
                                    if place else query)
            pages.append(page)
        return pages

    def test_a_job_is_shown_with_all_but_its_token(self):
        carried = {
            "filename": "f\udcff", "laststage": 9, "priority": -3,
            "max_attempts": 7, "timeout": 1.5, "cwd": "/tmp",
            "outputs": ["a", "b\ud800"],
        }
        self.set_jobs({1: ["cmd", 2]}, **carried)
        self.assertReply(200, self.fail(
            self.get(0, worker="w1"), error="no", stderr="s", exit_code=9))
        self.clock.advance(3)
        self.complete(self.get(0, lease=60, worker="w2"), 2, files=made("a"))
        job = self.get(2, lease=60, worker="w3")
        now = self.clock()
        shown = self.ok("/job/1")
        attempts = shown.pop("attempts")
        self.assertRegex(shown.pop("why"), "^w3 has worked on it since .* and"
                                           " has a lease until ")
        self.assertEqual(dict(
            carried, jobid=1, command='["cmd", 2]', stage=3,
            stage_name=None, state="working", expired=False, since=now,
            due=now + 60, worker="w3", attempt=1, failures=0, lapses=0,
            rejects=0, jobcmd=["cmd", 2],
            files=made("a"), made=0, waits=0, waits_for=[], aborted_by=None,
            progress=None, note=None,
        ), shown)
        self.assertNotIn(job["claim"], json.dumps(shown))
        self.assertEqual([
            {"attempt": 1, "stage": 0, "target": None, "worker": "w1",
             "host": None, "started": now - 3, "ended": now - 3,
             "outcome": "failed", "exit_code": 9, "error": "no",
             "stderr": "s"},
            {"attempt": 2, "stage": 0, "target": 2, "worker": "w2",
             "host": None, "started": now, "ended": now, "outcome": "done",
             "exit_code": None, "error": None, "stderr": None},
        ], attempts)

    def test_a_bare_job_is_shown_too(self):
        self.ok("/init/1")
        self.set_jobs([0])
        self.clock.advance(61)
        self.store.tick()
        shown = self.ok("/job/0")
        self.assertEqual([], shown["attempts"])
        for name in ("jobcmd", "filename", "files", "made", "laststage",
                     "max_attempts", "timeout", "cwd", "outputs", "due",
                     "worker"):
            self.assertIsNone(shown[name], name)
        self.assertTrue(shown["expired"])

    def test_the_last_hundred_attempts_of_a_job_are_shown(self):
        self.set_jobs([1, 2])
        first, _ = self.get(0, n=2)
        self.assertReply(200, self.release(first))
        for n in range(101):
            self.complete(self.get(0), 0, error=str(n))
        self.ok("/cancel", {"ids": [2]})
        attempts = self.ok("/job/1")["attempts"]
        self.assertEqual([str(n) for n in range(1, 101)],
                         [attempt["error"] for attempt in attempts])
        attempt, = self.ok("/job/2")["attempts"]
        self.assertEqual("cancelled", attempt["outcome"])

    def test_jobs_come_in_pages_by_id(self):
        self.assertEqual(([], None), self.page())
        self.set_jobs(range(0, 240, 2))
        ids = list(range(0, 240, 2))
        self.assertEqual((ids[:100], 198), self.page())
        self.assertEqual((ids[100:], None), self.page("after=198"))
        self.assertEqual((ids[1:4], 6), self.page("after=1&limit=3"))
        self.assertEqual((ids, None), self.page("limit=10000000000000"))
        self.assertEqual(([], None), self.page("after=238"))
        self.assertEqual([], self.ok("/jobs", jobix=1)["jobs"])

    def test_jobs_are_shown_as_one_job_is_with_their_last_attempts(self):
        self.set_jobs({1: "a", 2: {"b": "\udcff"}}, filename="f")
        for _ in range(3):
            self.fail(self.get(0), exit_code=1)
            self.clock.advance(600)
        self.get(0, lease=60)
        for n in (None, 0, 1, 2, 100):
            query = "" if n is None else "?attempts=%d" % n
            for shown in self.ok("/jobs" + query)["jobs"]:
                job = self.ok("/job/%d" % shown["jobid"])
                del job["waits_for"]
                attempts = job.pop("attempts")
                if n is not None:
                    job["attempts"] = attempts[max(0, len(attempts) - n):]
                self.assertEqual(job, shown)

    def mixed(self):
        """Add jobs in several stages, states and priorities, by age."""
        self.ok("/init/0/0/0/0")
        for jobid in range(1, 31):
            self.set_jobs([jobid], stage=jobid % 3, priority=-(jobid % 4),
                          max_attempts=1)
            self.clock.advance(1)
        for stage in (0, 1, 2):
            for lease in ("", "&lease=9999"):
                job = self.ok("/get/%d/2?n=1%s" % (stage, lease))[0]
                self.clock.advance(1)
            self.ok("/fail_job/%d" % job["jobid"], {})
            self.clock.advance(1)
            delayed = self.get(stage, worker="w")
            self.ok("/fail_job/%d" % delayed["jobid"], {"exit_code": 75})
            self.clock.advance(1)
        self.ok("/cancel", {"ids": [29, 30]})
        self.states()
        return self.ok("/jobs?limit=100")["jobs"]

    def test_pages_are_in_order_whatever_is_chosen(self):
        jobs = self.mixed()
        orders = {
            "id": lambda job: job["jobid"],
            "time": lambda job: (job["since"], job["jobid"]),
        }
        groups = {"": jobs, "&stage=99": [], "&state=failed&stage=9": []}
        for job in jobs:
            stage = "&stage=%d" % job["stage"]
            state = "&state=" + job["state"]
            for group in (stage, state, stage + state):
                groups.setdefault(group, []).append(job)
        self.assertGreater(len(groups), 10)
        for group, wanted in groups.items():
            for order, back in itertools.product(orders, ("", "-")):
                ids = [job["jobid"] for job in sorted(
                    wanted, key=orders[order], reverse=back != "")]
                query = "limit=4%s&order=%s%s" % (group, back, order)
                pages = [ids[i : i + 4] for i in range(0, len(ids), 4)]
                self.assertEqual(pages or [[]], self.turn(query), query)

    def test_jobs_are_found_by_their_text_and_by_their_worker(self):
        self.set_jobs({1: "Align a", 2: "align \u00e4/b", 3: ["sort", 'x"y']})
        self.set_jobs([4], filename="out/ALIGN.bam")
        first = self.get(0, worker="w")
        self.get(0, worker="v", lease=9)
        for query, ids in (
            ("match=align", [1, 2, 4]), ("match=ALIGN", [1, 2, 4]),
            ("match=%C3%A4/b", [2]), ("match=x%22y", [3]), ("match=%25", []),
            ("match=align&state=working", [1, 2]), ("match=a&stage=0", [4]),
            ("match=align&order=-id", [4, 2, 1]),
            ("match=align&order=-time", [4, 2, 1]),
            ("match=align&order=-id&after=4", [2, 1]),
            ("match=align&state=expired", []), ("match=align&worker=v", [2]),
            ("worker=w", [1]), ("worker=v", [2]), ("worker=x", []),
            ("worker=v&order=-time&stage=1", [2]), ("worker=v&stage=0", []),
        ):
            with self.subTest(query):
                self.assertEqual((ids, None), self.page(query))
        self.update(first, 2)
        self.assertEqual([], self.page("worker=w")[0])

    def test_pages_by_time_pass_over_no_job_of_one_moment(self):
        self.set_jobs(range(7))
        self.clock.advance(1)
        self.set_jobs([8, 9])
        self.assertEqual(
            [[0, 1, 2], [3, 4, 5], [6, 8, 9]],
            self.turn("order=time&limit=3"))
        self.assertEqual(([], None), self.page("order=time&after=nan,7"))

    def test_the_expired_are_shown_in_either_order(self):
        self.ok("/init/1/1/0")
        self.set_jobs([5], stage=1)
        self.clock.advance(1)
        self.set_jobs([3, 4])
        self.clock.advance(61)
        self.set_jobs([1, 2])
        self.store.tick()
        for query, pages in (
            ("order=id&limit=2", [[3, 4], [5]]),
            ("order=time&limit=2", [[5, 3], [4]]),
            ("order=time&stage=0", [[3, 4]]),
            ("order=id&stage=2", [[]]),
        ):
            self.assertEqual(pages, self.turn("state=expired&" + query))

    def test_a_page_goes_on_where_it_was_while_jobs_move(self):
        self.set_jobs(range(6))
        _, place = self.page("limit=3&stage=0")
        self.get(0), self.get(0), self.get(0), self.get(0)
        self.assertEqual(
            ([4, 5], None), self.page("limit=3&stage=0&after=%s" % place))

    def test_a_page_has_a_bounded_number_of_jobs_and_letters(self):
        self.replace("MAX_PAGE", 5)
        self.set_jobs(dict.fromkeys(range(8), "x" * 100))
        self.assertEqual((list(range(5)), 4), self.page("limit=8"))
        self.replace("PAGE_TEXT", 250)
        self.assertEqual((list(range(3)), 2), self.page())
        self.replace("PAGE_TEXT", 10)
        self.assertEqual(([7], None), self.page("after=6"))
        self.assertEqual(([], None), self.page("after=7"))


class SubmissionTest(StoreCase):
    """Jobs are named by ids, or by the submission that added them."""

    def submit(self, key, n, **more):
        """Add jobs; return their ids."""
        jobs = [{"jobstage": 0, "laststage": 2, "max_attempts": 1}] * n
        return self.ok("/submit", dict({"key": key, "jobs": jobs}, **more))

    def named(self, name):
        """Return the submission of a name."""
        found, = self.ok("/submissions?submission=" + name)
        return found

    def test_a_submission_without_a_key_gets_one(self):
        told = self.ok("/submit", {"jobs": [{"jobstage": 0}] * 2})
        self.assertEqual([1, 2], told["ids"])
        self.assertEqual("1-2", self.named(told["key"])["ids"])

    def test_parts_are_one_submission(self):
        self.submit("a", 2)
        self.clock.advance(5)
        self.submit("b/c", 3)
        for _ in "12":
            self.submit("a", 2, part=2)
        self.assertEqual(
            {"key": "a", "ids": "1-2,6-7", "jobs": 4,
             "time": self.clock.now - 5}, self.named("a"))
        self.assertEqual(self.named("a"), self.named("last"))
        self.assertEqual(["a", "b/c"], [
            found["key"] for found in self.ok("/submissions")])
        self.assertEqual("3-5", self.named("b/c")["ids"])
        self.submit("empty", 0)
        self.assertEqual("", self.named("last")["ids"])
        totals = self.ok("/status?submission=last")["totals"]
        self.assertEqual(0, totals["jobs"])

    def test_calls_mean_the_named_jobs_alone(self):
        self.submit("a", 2)
        self.submit("b", 3)
        self.submit("a", 1, part=2)
        self.set_jobs([9], stage=4)
        self.update(self.get(0, lease=60), 2)
        self.fail(self.get(0, lease=60))
        for named, ids in (
            ("submission=a", [1, 2, 6]), ("submission=last", [1, 2, 6]),
            ("submission=b", [3, 4, 5]), ("ids=2-3,9", [2, 3, 9]),
        ):
            figures = self.ok("/status?" + named)
            self.assertEqual(len(ids), figures["totals"]["jobs"], named)
            waiting = [i for i in ids if i not in (1, 2, 9)]
            failed = [i for i in ids if i == 2]
            for more, found in (
                ("", ids), ("&limit=2", ids[:2]), ("&order=time", ids),
                ("&state=waiting&stage=0", waiting), ("&state=failed", failed),
                ("&after=%d" % ids[0], ids[1:]),
            ):
                jobs = self.ok("/jobs?" + named + more)["jobs"]
                self.assertEqual(found, sorted(j["jobid"] for j in jobs), more)
            failures = self.ok("/failures?" + named)
            self.assertEqual(
                (len(failed), len(failed)),
                (failures["failed"], failures["looked_at"]))
        self.assertEqual([0, 2], [
            stage["stage"] for stage in
            self.ok("/status?submission=a")["stages"]])
        self.assertEqual(3, self.sweep("cancel", submission="b"))
        self.assertEqual(
            0, self.sweep("retry", submission="a", state="cancelled"))

    def test_a_name_of_no_submission_is_404(self):
        self.expect(404, "/submissions?submission=last")
        self.submit("a", 2)
        for path, value in (
            ("/submissions?submission=x", None), ("/jobs?submission=x", None),
            ("/status?ids=1-2,7", None), ("/cancel", {"submission": "x"}),
        ):
            self.refuse(404, path, value)


class SweepTest(StoreCase):
    """Part 2: retry, cancel, status, health."""

    def stages(self, **options):
        """Return the rows of /status."""
        return self.ok("/status", **options)["stages"]

    def pace(self, query=""):
        """Return the points of /pace, with where they begin and how far."""
        pace = self.ok("/pace" + query)
        self.assertEqual(self.clock(), pace["time"])
        self.assertEqual(len(pace["done"]), len(pace["updates"]))
        self.assertEqual(len(pace["done"]), len(pace["failed"]))
        return pace["start"], pace["step"], pace["updates"], pace["done"]

    def failed(self, jobs, **report):
        """Let jobs fail in their last attempt; return their ids."""
        ids = [job["jobid"] for job in jobs]
        for job in jobs:
            self.ok("/fail_job/%d" % job["jobid"], report)
            self.clock.advance(1)
        return ids

    def runtimes(self, jobix=None):
        """Return {stage: (attempts, median, p90)} where there are any."""
        return {
            stage["stage"]: tuple(stage["runtime"][key] for key in
                                  ("attempts", "median", "p90"))
            for stage in self.stages(jobix=jobix) if stage["runtime"]
        }

    def test_retry_puts_failed_jobs_back_with_fresh_budgets(self):
        self.set_jobs([1], max_attempts=1)
        self.fail(self.get("0/5"))
        self.assertEqual(1, self.sweep("retry", ids=[1]))
        self.assertEqual(0, self.sweep("retry", ids=[1]))
        for _ in range(4):
            self.get(0, lease=1)
            self.clock.advance(2)
        self.assertEqual("failed", self.fail(self.get(0)).json()["state"])
        self.ok("/retry", {"all": True})
        self.assertEqual(1, self.get(0, lease=1)["attempt"])
        self.clock.advance(2)
        self.assertEqual({(0, "waiting"): 1}, self.states())

    def test_retry_takes_done_jobs_back_to_where_they_were_claimed(self):
        self.set_jobs([1, 2], laststage=4)
        self.set_jobs([3], stage=4, laststage=4)  # never claimed
        for stage in (0, 2):
            for job in self.get(stage, n=2):
                self.update(job, stage + 2)
        self.assertEqual({(4, "done"): 3}, self.states())
        self.assertEqual(2, self.sweep("retry", stage=4, state="done"))
        self.assertEqual({(2, "waiting"): 2, (4, "done"): 1}, self.states())
        self.ok("/cancel", {"ids": [1]})  # and so it stays in its stage
        self.assertEqual(1, self.sweep("retry", all=True))
        self.assertEqual({(2, "waiting"): 2, (4, "done"): 1}, self.states())

    def test_cancel_takes_whatever_is_not_done(self):
        self.set_jobs([1, 2, 3, 4], max_attempts=2)
        self.set_jobs([5], stage=2, laststage=2)
        self.fail(self.get(0))
        leased = self.get(0, lease=60)
        self.get(0)
        self.assertEqual(0, self.sweep("cancel", all=True, jobix=1))
        for found in (4, 0):
            self.assertEqual(
                {"cancelled": found}, self.ok("/cancel", {"all": True}))
        self.assertEqual({(0, "cancelled"): 4, (2, "done"): 1}, self.states())
        self.assertEqual("nada", self.get(0))
        self.assertReply(409, self.update(leased, 2))
        self.assertEqual(
            [("failed",), ("cancelled",), ("cancelled",)],
            self.attempts("outcome"))

    def test_jobs_are_selected_by_stage_and_state(self):
        self.set_jobs([1, 2])
        self.set_jobs([3, 4], stage=2)
        self.get(2)
        self.assertEqual(0, self.sweep("cancel", stage=0, state="working"))
        self.assertEqual(2, self.sweep("cancel", stage=0))
        self.assertEqual(1, self.sweep("cancel", state="working"))
        self.assertEqual(
            {(0, "cancelled"): 2, (2, "cancelled"): 1, (2, "waiting"): 1},
            self.states())
        self.assertEqual(1, self.sweep("retry", stage=2))
        self.assertEqual(1, self.sweep("cancel", ids=[3, 3]))

    def test_status_counts_stages_states_and_the_expired(self):
        self.assertEqual([], self.stages())
        self.assertEqual(0, self.ok("/status")["totals"]["jobs"])
        self.ok("/init/1/0/0")
        self.set_jobs([1, 2, 3])
        self.update(self.get(0), 2)
        self.clock.advance(61)
        self.store.tick()
        figures = self.ok("/status")
        first, _, last = figures["stages"]
        self.assertEqual((0, 1, 2, 2), tuple(
            first[k] for k in ("stage", "lifetime", "jobs", "expired")))
        self.assertEqual(2, first["states"]["waiting"])
        self.assertEqual((2, 1), (last["stage"], last["states"]["done"]))
        self.assertEqual((3, 2), (figures["totals"]["jobs"],
                                  figures["totals"]["expired"]))
        self.assertEqual(set(jobman.STATES), set(first["states"]))

    def test_status_has_a_row_for_every_stage_that_matters(self):
        cases = (
            (lambda: self.set_jobs([1]), [0]),
            (lambda: self.ok("/lifetime/3/5"), [0, 3]),
            (lambda: self.ok("/lifetime/4/0"), [0, 3, 4]),
            (lambda: self.ok("/pause/6", {}), [0, 3, 4, 6]),
            (lambda: self.update(self.get(0), 8), [0, 3, 4, 6, 8]),
            (lambda: self.ok("/resume/6", {}), [0, 3, 4, 8]),
        )
        for act, rows in cases:
            act()
            self.assertEqual(rows, [row["stage"] for row in self.stages()])
        self.assertEqual([], self.stages(jobix=1))
        self.ok("/init/7/0", jobix=1)
        self.assertEqual([(0, 7, False, None), (1, 0, False, None)], [
            (row["stage"], row["lifetime"], row["paused"], row["name"])
            for row in self.stages(jobix=1)])

    def test_status_knows_the_rate_and_the_time_left(self):
        self.set_jobs(range(90), laststage=2)
        self.clock.now = 1.6e9 // 60 * 60
        for job in self.get(0, n=30):
            self.update(job, 2)
        self.call("/update_job/0/2")  # it is done already
        self.clock.advance(30)
        figures = self.ok("/status")
        self.assertEqual(30 / 90, figures["rate"])  # in 1.5 minutes
        self.assertEqual(60 / figures["rate"], figures["seconds_left"])
        self.assertEqual(0, self.ok("/status", jobix=1)["rate"])
        self.clock.advance(600)
        figures = self.ok("/status")
        self.assertEqual((0, None), (figures["rate"], figures["seconds_left"]))

    def test_pace_counts_what_was_done_in_each_minute(self):
        self.clock.now = start = 1.6e9 // 60 * 60
        self.assertEqual((start, 60, [0], [0]), self.pace())
        self.set_jobs(range(9), laststage=4)
        for job in self.get(0, n=5):
            self.update(job, 2)
        self.clock.advance(60)
        for job in self.get(2, n=3):
            self.update(job, 4)
        one, two, three = self.get(0, n=3)
        self.fail(one)
        self.fail(two, exit_code=75)  # to be tried later
        self.release(three)
        self.clock.advance(150)
        self.assertEqual(
            (start, 60, [5, 3, 0, 0], [0, 3, 0, 0]), self.pace())
        self.assertEqual([0, 1, 0, 0], self.ok("/pace")["failed"])
        self.assertEqual(
            (start + 60, 60, [3, 0, 0], [3, 0, 0]), self.pace("?minutes=3"))
        self.assertEqual(
            (start - 60 * 56, 60, [0] * 56 + [5, 3, 0, 0]),
            self.pace("?minutes=60")[:3])
        self.assertEqual([0], self.ok("/pace", jobix=1)["updates"])

    def test_pace_has_a_bounded_number_of_points(self):
        self.clock.now = start = 1.6e9 // 86400 * 86400
        self.set_jobs([1, 2])
        self.update(self.get(0), 2)
        self.clock.advance(86400 * 10)
        self.update(self.get(0), 2)
        first, step, updates, _ = self.pace()
        self.assertEqual(41 * 60, step)
        self.assertLessEqual(len(updates), jobman.PACE_POINTS + 1)
        self.assertEqual((1, 1, 2), (updates[0], updates[-1], sum(updates)))
        self.assertTrue(first <= start < first + step)
        self.clock.advance(-86400 * 5)  # its clock was set back
        self.assertEqual(1, sum(self.pace()[2]))

    def test_failures_are_grouped_by_what_they_have_in_common(self):
        self.assertEqual({"failed": 0, "looked_at": 0, "groups": []},
                         self.ok("/failures"))
        self.set_jobs(range(20), max_attempts=1)
        self.set_jobs(range(20, 25), stage=2, max_attempts=1)
        self.beat("w", host="n1")
        a = self.failed(self.get(0, n=5, worker="w"), exit_code=1,
                        stderr="x\nno such file\n \n", error="exit 1")
        b = self.failed(self.get(0, n=2, worker="other"), exit_code=1,
                        stderr="no such file")
        c = self.failed(self.get(0, n=3), error="lost\nthe end")
        d = self.failed(self.get(2, n=1, worker="w"), exit_code=1,
                        stderr="no such file")
        answer = self.ok("/failures")
        groups = answer.pop("groups")
        self.assertEqual({"failed": 11, "looked_at": 11}, answer)
        self.assertEqual([
            (0, 1, "no such file", "other", 2, 7, b[::-1] + a[::-1]),
            (0, None, "the end", None, 1, 3, c[::-1]),
            (2, 1, "no such file", "n1", 1, 1, d),
        ], [(g["stage"], g["exit_code"], g["message"], g["host"], g["hosts"],
             g["jobs"], g["ids"]) for g in groups])
        self.assertEqual([], self.ok("/failures", jobix=1)["groups"])

    def test_names_paths_and_numbers_do_not_part_failures_of_one_kind(self):
        messages = (
            "FileNotFoundError: '/scratch/fold1/seed_7.npz'",
            "FileNotFoundError: '/scratch/fold2/a b.npz'",
            'no "this" in /a/b at line 12',
            'no "that" in c/d at line 3456',
            "out of memory", "out of time", "",
        )
        self.set_jobs(range(len(messages)), max_attempts=1)
        for message in messages:
            self.failed([self.get(0)], stderr=message)
        self.assertEqual(
            [[3, 2], [1, 0], [6], [5], [4]],
            [group["ids"] for group in self.ok("/failures")["groups"]])

    def test_a_job_counts_by_its_last_failure_alone(self):
        self.set_jobs([1], max_attempts=1)
        self.failed([self.get(0)], error="first")
        self.ok("/retry", {"ids": [1]})
        self.assertEqual([], self.ok("/failures")["groups"])
        self.failed([self.get(0)], error="second")
        group, = self.ok("/failures")["groups"]
        self.assertEqual(("second", [1]), (group["message"], group["ids"]))

    def test_a_bounded_number_of_failures_is_grouped_the_latest_first(self):
        self.replace("FAILURES_READ", 3)
        self.set_jobs(range(5), max_attempts=1)
        self.set_jobs(range(5, 7), stage=2, max_attempts=1)
        self.failed(self.get(0, n=4))
        self.failed(self.get(2, n=2))
        self.failed(self.get(0, n=1))
        answer = self.ok("/failures")
        self.assertEqual((7, 3), (answer["failed"], answer["looked_at"]))
        self.assertEqual({2: [6, 5], 0: [4]},
                         {g["stage"]: g["ids"] for g in answer["groups"]})

    def test_nothing_new_is_304(self):
        self.set_jobs([1, 2])
        for path in ("/status", "/pace", "/workers", "/failures", "/jobs",
                     "/job/1"):
            first = self.expect(200, path)
            tag = {"If-None-Match": '"x", ' + first.headers["etag"]}
            self.clock.advance(1)
            again = self.call(path, **tag)
            self.assertEqual((304, b""), (again.status, again.body), path)
            self.assertEqual(first.headers["etag"], again.headers["etag"])
            self.expect(200, path, **{"If-None-Match": '"x"'})
        tag = {"If-None-Match": self.call("/status").headers["etag"]}
        self.get(0)
        self.expect(200, "/status", **tag)

    def test_status_knows_how_long_the_commands_of_a_stage_ran(self):
        self.set_jobs(range(10))
        self.assertEqual([None], [row["runtime"] for row in self.stages()])
        updates = [
            {"jobid": job["jobid"], "jobstage": 2, "claim": job["claim"],
             "seconds": 0.004 if job["jobid"] < 5 else 2.048}
            for job in self.get(0, n=10, lease=60)
        ]
        updates[9]["seconds"] = 10**9
        self.ok("/update_jobs", updates)
        self.assertEqual({0: (10, 0.004, 2.048)}, self.runtimes())
        self.assertEqual([[0.004, 5], [2.05, 4], [1.1e9, 1]],
                         self.ok("/status")["stages"][0]["runtime"]["buckets"])
        for job, given in zip(
            self.get(2, n=3, lease=60), ({"seconds": "7"}, {}, {"seconds": 0})
        ):
            self.clock.advance(8.192)
            self.complete(job, 4, **given)
        self.assertEqual((3, 8.192), self.runtimes()[2][:2])
        self.assertEqual({}, self.runtimes(jobix=1))

    def test_only_attempts_that_were_done_count_as_run_times(self):
        self.set_jobs([1, 2, 3])
        failed, late, told = self.get(0, n=3, lease=60)
        self.assertReply(200, self.fail(failed, seconds=5))
        self.clock.advance(61)
        self.store.tick()
        self.assertEqual({}, self.runtimes())
        for _ in range(2):
            self.complete(told, 2, seconds=0.001)
        self.expect(200, "/update_job/3/4")
        self.assertEqual({0: (1, 0.001, 0.001)}, self.runtimes())
        self.complete(late, 2)  # from claim to update
        self.assertEqual({0: (2, 0.001, 65.536)}, self.runtimes())
        self.set_jobs([4], stage=6)
        job = self.get(6, lease=60)
        self.clock.advance(-30)  # it is set back
        self.complete(job, 8)
        self.assertEqual((1, 0.001, 0.001), self.runtimes()[6])

    def test_a_fault_does_not_end_the_ticks(self):
        ticks = []

        def tick():
            ticks.append(1)
            raise OSError("no locks available")

        self.patch(jobman.Store, "TICK", {False: 0.01})
        self.restart()
        self.store.tick = tick
        with contextlib.redirect_stderr(io.StringIO()) as said:
            wait_for(lambda: len(ticks) > 2, "more ticks")
            self.closing.close()
        self.assertIn("no locks available", said.getvalue())

    def test_a_job_that_is_gone_meanwhile_is_passed_over(self):
        self.set_jobs([1, 2], laststage=0)
        real = self.store.ids_in
        self.store.ids_in = lambda *args: [*real(*args), 3, 2]
        self.assertEqual(2, self.sweep("forget", all=True))

    def test_readers_are_bounded_and_wait_for_one_another(self):
        self.set_jobs([1])
        self.ok("/status")  # from now on the namespace is known
        with contextlib.ExitStack() as reading:
            for _ in range(jobman.Readers.KEPT):
                reading.enter_context(self.store.readers.reading())
            with concurrent.futures.ThreadPoolExecutor(1) as pool:
                status = pool.submit(self.ok, "/status")
                self.set_jobs([2])
                self.assertFalse(status.done())
                reading.close()
                self.assertEqual(2, status.result()["totals"]["jobs"])

    def test_health_looks_at_the_database(self):
        reply = exchange(self.address, "GET", "/health")
        self.assertEqual("ok", self.assertReply(200, reply).json()["status"])
        self.store.readers.close()
        os.rename(self.path("jobs.db"), self.path("gone.db"))
        reply = self.assertReply(503, exchange(self.address, "GET", "/health"))
        self.assertIn("retry-after", reply.headers)

    def test_a_change_in_time_is_tried_again_when_it_failed(self):
        self.set_jobs([1])
        self.fail(self.get(0))
        self.patch(jobman.Store, "TICK", {False: 0.05})
        self.restart()
        connection, begun = self.store.writer.connection, []
        connection.set_trace_callback(
            lambda sql: begun.append(sql) if sql.startswith("begin") else None)
        connection.execute("pragma busy_timeout = 1")
        other = sqlite3.connect(self.path("jobs.db"), isolation_level=None)
        with contextlib.closing(other):
            other.execute("begin immediate")  # another process's lock
            self.clock.advance(3)
            wait_for(lambda: len(begun) > 1, "a second try")
        wait_for(lambda: self.rows("select state from job") == [("waiting",)],
                 "the delay's end")


class BrokenOffCase(StoreCase):
    """A Store whose callers hang up."""

    tick_every = 10**6

    def broken_off(self, path, value=None):
        """Make a call, and hang up before its change begins."""
        go = hold_commit(self.store)
        method, body = "GET", None
        if value is not None:
            method, body = "POST", packed(value)
        connection = http.client.HTTPConnection(*self.address)
        connection.request(method, path, body, {"jobix": str(self.jobix)})
        wait_for(lambda: self.store.writer.queue, "the change")
        connection.close()
        go.set()
        wait_for(lambda: not self.door.server.busy, "its end")


class StepsTest(BrokenOffCase):
    """Changes of many jobs go in steps, and others come between them."""

    N = 7

    def setUp(self):
        super().setUp()
        self.replace("CHUNK", 3)
        self.replace("CLAIMS_AT_ONCE", 3)

    def sizes(self, act):
        """Return how many jobs each of the commits of `act` has changed."""
        sizes, writer = [], self.store.writer
        committed = writer.committed

        def note(tx):
            sizes.append(sum(max(map(abs, added))
                             for (table, *_), added in tx.sums.items()
                             if table == "tally"))
            committed(tx)

        writer.committed = note
        act()
        writer.committed = committed
        return [size for size in sizes if size]

    def claim(self, **options):
        return self.get(0, n=self.N, **options)

    def do(self, act):
        """Make a call, a tuple of its path and body, or what else it is."""
        return act() if callable(act) else self.ok(*act)

    def prepare(self, *acts):
        """Add jobs of a namespace of their own, and do `acts` to them."""
        self.jobix += 1
        self.set_jobs(range(self.N))
        for act in acts:
            self.do(act)

    def expire(self):
        self.clock.advance(61)

    def cases(self):
        """Return, by name, what comes before a change, and the change.

        Then how often it counts a job: one that moves where it leaves and
        where it comes.
        """
        everything = {"all": True}
        cancel = "/cancel", everything
        by_ids = "/cancel", {"ids": list(range(self.N))}
        lifetime, finish = ("/lifetime/0/1",), ("/init/0",)
        return {
            "cancel": ([], cancel, 2),
            "cancel by ids": ([], by_ids, 2),
            "retry": ([cancel], ("/retry", everything), 2),
            "release": ([self.claim], ("/release", everything), 2),
            "forget": ([finish], ("/forget", everything), 1),
            "mark": ([self.expire], lifetime, 1),
            "unmark": ([self.expire, lifetime], ("/lifetime/0/0",), 1),
            "check": ([lifetime, self.expire], ("/check_stages",), 1),
            "init": ([], finish, 2),
            "tick": ([lifetime, self.expire], self.store.tick, 1),
            "lapses": ([lambda: self.claim(lease=9), self.expire],
                       self.store.tick, 2),
            "claims": ([], lambda: self.claim(lease=60), 2),
        }

    def test_a_change_of_many_jobs_goes_in_steps(self):
        for name, (acts, change, counted) in self.cases().items():
            self.prepare(*acts)
            sizes = self.sizes(lambda act=change: self.do(act))
            with self.subTest(name):
                self.assertEqual([3 * counted, 3 * counted, counted], sizes)
            self.assertCounts()

    def test_the_expired_are_marked_and_moved_in_steps(self):
        self.prepare(("/lifetime/0/1",), self.expire)
        replies = []
        sizes = self.sizes(
            lambda: replies.append(self.ok("/check_stages/0/2")))
        self.assertEqual([3, 3, 1, 6, 6, 2], sizes)
        self.assertEqual([[0, self.N]], [list(r.values()) for r in replies])
        self.assertEqual({(2, "waiting"): self.N}, self.states())

    def test_a_sweep_stops_when_its_caller_hangs_up(self):
        for name, (acts, change, counted) in self.cases().items():
            if name in ("init", "tick", "lapses", "claims"):
                continue
            self.prepare(*acts)
            sizes = self.sizes(lambda call=change: self.broken_off(*call))
            with self.subTest(name):
                self.assertEqual([3 * counted], sizes)

    def test_half_a_sweep_is_no_success(self):
        self.prepare()
        go = hold_commit(self.store)
        with socket.create_connection(self.address, PATIENCE) as client:
            client.sendall(
                b"POST /cancel HTTP/1.1\r\nHost: localhost\r\njobix: %d\r\n"
                b'Content-Length: 13\r\n\r\n{"all": true}' % self.jobix)
            client.shutdown(socket.SHUT_WR)  # as if it had hung up
            wait_for(lambda: self.store.writer.queue, "the change")
            go.set()
            reply = client.recv(65536)
        self.assertIn(b" 503 ", reply[:13])
        self.assertIn(b"the rest is not done", reply)

    def test_the_tick_goes_on_with_marks_that_a_caller_left(self):
        self.prepare(self.expire)
        for minutes, marked in ((1, self.N), (0, 0)):
            self.broken_off("/lifetime/0/%d" % minutes)
            self.store.tick()
            self.assertEqual(
                marked, self.ok("/status")["totals"]["expired"])

    def test_an_init_that_failed_half_way_is_repeated(self):
        self.prepare()
        finish, n = self.store.writer.finish, itertools.count()

        def spoiled(tx):
            finish(tx)
            if next(n) == 2:
                raise sqlite3.OperationalError("the disk is full")

        self.store.writer.finish = spoiled
        self.expect(503, "/init/5")
        self.assertEqual(4, self.states()[0, "waiting"])
        self.assertEqual({"0": 5}, self.ok("/init/5"))
        self.assertEqual({(0, "done"): self.N}, self.states())

    def test_a_job_is_in_a_large_claim_once(self):
        self.set_jobs(range(7))
        for place in ("0/0", "1,0", "2,1", "3,2"):
            # without a lease they are free again
            jobs = self.get(place, n=7)
            self.assertEqual(
                [(jobid, int(place[-1])) for jobid in range(7)],
                [(job["jobid"], job["jobstage"]) for job in jobs], place)
        for job in jobs:
            self.complete(job, 3)

    def test_claims_before_one_that_is_refused_are_answered(self):
        self.set_jobs(range(7))

        def claim(n):
            jobs = self.store.claim(
                self.namespace, [0], n=n, worker=None, lease=60)
            self.closing.close()
            return jobs

        self.assertEqual(3, len(jobman.claim_in_steps(claim, 7, 3)))
        with self.assertRaises(jobman.Unavailable):
            jobman.claim_in_steps(claim, 7, 3)
        self.open()

    def test_children_that_are_still_to_be_told_do_not_pile_up(self):
        self.replace("CHUNK", 8)
        self.set_jobs(range(0, 400, 2))
        self.post("/set", {i: {"jobstage": 0, "after": [i - 1]}
                           for i in range(1, 400, 2)})
        left, writer = [], self.store.writer
        committed = writer.committed
        writer.committed = lambda tx: (
            left.append(len(tx.ended)), committed(tx))
        self.ok("/cancel", {"all": True})
        writer.committed = committed
        self.assertLess(max(left), 2 * jobman.CHUNK)
        self.assertEqual({(0, "cancelled"): 400}, self.states())

    def test_the_wal_shrinks_again(self):
        wal = self.path("jobs.db-wal")
        self.store.add_jobs(self.namespace, *to_add({
            jobid: {"jobstage": 0, "jobcmd": "x" * 4000}
            for jobid in range(10000)}))
        self.assertGreater(os.path.getsize(wal), jobman.WAL_KEPT)
        self.set_jobs([10**6])
        self.assertLessEqual(os.path.getsize(wal), jobman.WAL_KEPT)


class GapTest(BrokenOffCase):
    """After a pause of the server nobody loses a lease."""

    def open(self):
        super().open()
        self.store.outage = 10

    def pass_time(self, *steps):
        for seconds in steps:
            self.clock.advance(seconds)
            self.store.tick()

    def test_a_pause_gives_every_lease_its_full_time(self):
        for name, steps, state in (
            ("busy", [9] * 7, "waiting"),
            ("paused", [75], "working"),
            ("paused, then not renewed", [75] + [9] * 7, "waiting"),
            ("set a day on", [86400, 9], "working"),
            ("set back", [-3600, 9, 9], "working"),
            ("set back, then not renewed", [-3600] + [9] * 7, "waiting"),
        ):
            self.jobix += 1
            self.set_jobs([1])
            self.get(0, lease=60)
            self.pass_time(*steps)
            with self.subTest(name):
                self.assertEqual(state, self.ok("/job/1")["state"])

    def test_a_disk_that_is_full_for_long_costs_no_lease(self):
        self.set_jobs([1])
        self.get(0, lease=60)
        finish = self.store.writer.finish
        self.store.writer.finish = lambda tx: tx.execute("no statement")
        for _ in range(9):
            with self.assertRaises(jobman.Unavailable):
                self.pass_time(9)
        self.store.writer.finish = finish
        self.pass_time(9)
        self.assertEqual("working", self.ok("/job/1")["state"])

    def test_a_stopped_server_ends_no_lease_and_serves_no_gone_caller(self):
        server, self.address = self.serve("--open", start=changed(
            "jobman", "import os, time\n"
            "jobman.Store.__init__.__kwdefaults__['clock'] = lambda: ("
            "time.time() + 1000 * os.path.exists(%r))" % self.path("later")))
        self.set_jobs([1, 2])
        claim = self.get(0, lease=60)["claim"]
        self.suspend(server)
        for method, path, body in (
            ("GET", "/get/0?lease=60", None),
            ("GET", "/update_job/1/1?claim=" + claim, None),
            ("POST", "/cancel", b'{"all": true}'),
        ):
            connection = http.client.HTTPConnection(*self.address)
            connection.request(method, path, body, {"jobix": str(self.jobix)})
            connection.close()
        with open(self.path("later"), "w"):
            pass
        os.kill(server.pid, signal.SIGCONT)
        self.ok("/pause/9", {})  # a commit, in which the lease would lapse
        folder = "/proc/%d/fd/" % server.pid
        wait_for(lambda: sum(
            "socket" in os.readlink(folder + fd) for fd in os.listdir(folder)
        ) <= 2, "the callers' end")  # it listens, and we are connected
        self.assertEqual(["working", "waiting"], [
            self.ok("/job/%d" % jobid)["state"] for jobid in (1, 2)])


class DependencyTest(StoreCase):
    """Jobs wait for other jobs."""

    tick_every = 10**6

    def add(self, after, **options):
        """Add jobs of one stage: {id: those it waits for}."""
        self.expect(200, "/set", {
            jobid: dict({"jobstage": 0, "laststage": 2, "after": parents},
                        **options)
            for jobid, parents in after.items()
        })

    def add_family(self):
        """Add a job and so many that wait for it that it takes four steps."""
        self.replace("CHUNK", 10)
        self.add({0: [], **{i: [0] for i in range(1, 35)}})

    def finish(self, *ids):
        """Let jobs be done."""
        for jobid in ids:
            self.expect(200, "/update_job/%d/2" % jobid)

    def spoil(self, *ids):
        """Let jobs be claimed, and fail in their last attempt."""
        while ids:
            job = self.get(0)
            self.assertIn(job["jobid"], ids)
            self.assertEqual("failed", self.fail(job).json()["state"])
            ids = [jobid for jobid in ids if jobid != job["jobid"]]

    def told(self):
        """Return {id: state}, having checked what the database says."""
        self.states()
        with contextlib.closing(self.look()) as db:
            self.assertEqual([], faults(db.execute))
        return {job["jobid"]: job["state"]
                for job in self.ok("/jobs?limit=1000")["jobs"]}

    def children(self):
        """Return the states of all jobs but 0."""
        return {state for jobid, state in self.told().items() if jobid}

    def aborters(self):
        """Return {id: by whose end it is aborted}."""
        return {job["jobid"]: job["aborted_by"]
                for job in self.ok("/jobs")["jobs"]
                if job["aborted_by"] is not None}

    def unfinished(self):
        """Return the ids of the jobs whose children are still to be told."""
        return [self.rows("select jobid from job where id = %d" % row)[0][0]
                for row in self.store.unfinished]

    def ends(self):
        """Yield ways for the end of job 0 and its children's state then.

        Each begins where the one before has led to.
        """
        yield lambda: self.ok("/cancel", {"ids": [0]}), "aborted"
        yield lambda: self.ok("/retry", {"ids": [0]}), "blocked"
        yield lambda: self.finish(0), "waiting"

    def test_a_job_waits_until_all_are_done(self):
        self.add({1: [], 2: None, 3: [1, 2, 1]})
        self.assertEqual(
            {1: "waiting", 2: "waiting", 3: "blocked"}, self.told())
        for waits_for in ([1, 2], [1]):
            shown = self.ok("/job/3")
            self.assertEqual((len(waits_for), waits_for),
                             (shown["waits"], shown["waits_for"]))
            self.finish(2)
            self.assertEqual("blocked", self.told()[3])
        self.assertEqual(1, self.get(0, lease=9)["jobid"])
        self.assertEqual("nada", self.get(0, lease=9))
        self.finish(1)
        self.assertEqual(3, self.get(0, lease=9)["jobid"])

    def test_a_job_waits_for_the_last_stage_of_another(self):
        self.add({1: []}, laststage=4)
        self.add({2: [1]})
        self.add({3: [1]}, jobstage=2)  # it is done, and waits for nobody
        for stage, state in ((2, "blocked"), (4, "waiting")):
            self.expect(200, "/update_job/1/%d" % stage)
            self.assertEqual((state, "done"), (self.told()[2], self.told()[3]))

    def test_init_ends_the_waiting_for_and_of_jobs_in_their_last_stage(self):
        self.set_jobs([1, 5], stage=2)
        self.set_jobs([2], after=[1])
        self.set_jobs([3])
        self.set_jobs([4], stage=2, after=[3])
        self.assertEqual("blocked", self.told()[2])
        self.ok("/init/0/0/0")
        done = {1: "done", 2: "waiting", 4: "done", 5: "done"}
        self.assertEqual({**done, 3: "waiting"}, self.told())
        self.ok("/cancel", {"ids": [3]})
        self.assertEqual({**done, 3: "cancelled"}, self.told())

    def test_a_job_heeds_what_has_ended_before_it_came(self):
        self.add({1: [], 2: [], 3: []}, max_attempts=1)
        self.finish(1)
        self.ok("/cancel", {"ids": [2]})
        self.add({4: [1], 5: [1, 2], 6: [1, 3]})
        self.assertEqual(
            {1: "done", 2: "cancelled", 3: "waiting", 4: "waiting",
             5: "aborted", 6: "blocked"}, self.told())
        self.assertEqual({5: 2}, self.aborters())

    def test_a_job_that_fails_for_good_aborts_all_that_wait_for_it(self):
        self.add({1: [], 2: [1], 3: [2], 4: []}, max_attempts=2)
        self.assertEqual("delayed", self.fail(self.get(0)).json()["state"])
        self.assertEqual("blocked", self.told()[2])
        self.clock.advance(10)
        self.fail(self.get(0))
        self.assertEqual(
            {1: "failed", 2: "aborted", 3: "aborted", 4: "waiting"},
            self.told())
        self.assertEqual({2: 1, 3: 2}, self.aborters())
        self.assertEqual(0, self.sweep("retry", ids=[2]))
        self.assertEqual(1, self.sweep("retry", all=True))
        self.assertEqual(
            {1: "waiting", 2: "blocked", 3: "blocked", 4: "waiting"},
            self.told())
        self.assertEqual({}, self.aborters())
        for jobid in (1, 2):
            self.finish(jobid)
            self.assertEqual("waiting", self.told()[jobid + 1])

    def test_spent_leases_and_lost_files_abort_too(self):
        self.add({1: [], 2: [1], 3: [], 4: [3]}, max_attempts=1)
        for _ in range(jobman.MAX_LAPSES):
            self.assertEqual(1, self.get(0, lease=5)["jobid"])
            self.clock.advance(6)
        self.complete(self.get(0, lease=5), 1, files=made("a"))
        self.expect(200, "/reject_job/3", {})
        self.assertEqual(
            {1: "failed", 2: "aborted", 3: "failed", 4: "aborted"},
            self.told())

    def test_a_done_parent_that_runs_again_holds_up_no_child(self):
        ways = (  # of a done job 1, and its state after each
            (lambda: self.ok("/retry", {"ids": [1]}), "waiting"),
            (lambda: self.expect(200, "/reject_job/1", {}), "failed"),
            (lambda: self.call("/update_job/1/0"), "waiting"),
            (lambda: self.call("/update_job/1/0") and
             self.ok("/cancel", {"ids": [1]}), "cancelled"),
        )
        for self.jobix, (way, state) in enumerate(ways):
            self.add({1: [], 2: [1], 3: [1], 4: [1], 5: [], 6: [1, 5]},
                     max_attempts=1)
            self.complete(self.get(0), 2, files=made("a"))
            working = self.get(0, lease=60)
            self.assertEqual(2, working["jobid"])
            self.finish(3)
            way()
            self.assertEqual(
                {1: state, 2: "working", 3: "done", 4: "waiting",
                 5: "waiting", 6: "blocked"}, self.told())
            self.assertEqual([5], self.ok("/job/6")["waits_for"])
            self.release(working)
            self.finish(5)
            self.assertEqual(
                {1: state, 2: "waiting", 3: "done", 4: "waiting",
                 5: "done", 6: "waiting"}, self.told())
            self.add({7: [1]})  # a new one does wait for it
            self.assertEqual(
                "blocked" if state == "waiting" else "aborted",
                self.told()[7])

    def test_parents_come_before_or_in_the_same_call(self):
        self.add({1: [2], 2: [3], 3: []})
        self.add({4: [1]})
        self.assertEqual("blocked", self.told()[1])
        for bad in ({5: [99]}, {5: [5]}, {5: [6], 6: [7], 7: [5]},
                    {5: [1], 6: [6]}, {5: [6, 99], 6: []}):
            reply, = self.refuse(400, "/set", {
                jobid: {"jobstage": 0, "after": parents}
                for jobid, parents in bad.items()})
            self.assertRegex(reply.json()["error"], "99|wait for itself")
        self.refuse(400, "/set", *(
            {5: {"jobstage": 0, "after": bad}}
            for bad in ("1", [1.5], ["1"], [-1], [2**53], {}, [None])))
        self.expect(400, "/set", {2: {"jobstage": 0, "after": [4]}}, jobix=1)

    def test_what_a_request_may_wait_for_is_bounded(self):
        self.replace("MAX_JOBS", 10)
        self.add({i: [] for i in range(6)})
        self.add({6: list(range(6)), 7: list(range(4))})
        entries = {jobid: {"jobstage": 0, "after": list(range(n))}
                   for jobid, n in ((8, 6), (9, 5))}
        self.refuse(413, "/set", entries)
        self.refuse(
            413, "/submit", {"key": "k", "jobs": list(entries.values())})

    def test_a_call_can_be_repeated(self):
        for _ in range(2):
            self.add({1: [], 2: [1]})
            self.assertEqual({1: "waiting", 2: "blocked"}, self.told())
        self.add({2: [99], 3: []})  # a job that is there is left as it is
        self.finish(1)
        self.add({1: [], 2: [1]})
        self.assertEqual(
            {1: "done", 2: "waiting", 3: "waiting"}, self.told())

    def test_submitted_jobs_wait_for_those_that_are_there(self):
        entry = {"jobstage": 0, "laststage": 2}
        self.ok("/submit", {"key": "a", "jobs": [entry, entry]})
        later = dict(entry, after=[1, 2])
        for _ in range(2):
            self.ok("/submit", {"key": "b", "jobs": [later, entry, later]})
        self.assertEqual(
            {1: "waiting", 2: "waiting", 3: "blocked", 4: "waiting",
             5: "blocked"}, self.told())
        self.refuse(400, "/submit", *(
            {"key": "c", "jobs": [entry, dict(entry, after=[bad])]}
            for bad in (6, 7, 99)))

    def test_a_job_wakes_a_long_poll_when_it_comes_free_and_not_before(self):
        self.add({1: []})
        self.get(0, lease=60)
        with self.store.wait_queue.join([(self.namespace, 0)]) as waiter:
            self.add({2: [1]})
            self.assertFalse(waiter.woken)
            self.finish(1)
            self.assertTrue(waiter.woken)

    def test_edges_are_met_though_the_parent_runs_again_meanwhile(self):
        self.add_family()
        self.finish(0)
        self.call("/update_job/0/0")
        for _ in range(4):
            self.ok("/pause/9", {})
        self.assertEqual({(0, "waiting"): 35}, self.states())

    def test_the_rest_is_told_at_the_next_tick(self):
        self.add_family()
        before = "blocked"
        for end, after in self.ends():
            end()
            states = self.ok("/status")["totals"]["states"]
            self.assertEqual(34, states[before] + states[after])
            self.assertTrue(0 < states[after] < 20, states)
            self.assertIn(0, self.unfinished())
            self.store.tick()
            self.assertEqual({after}, self.children())
            self.assertEqual([], self.unfinished())
            before = after

    def test_the_rest_is_told_by_the_next_server(self):
        for self.jobix in (1, 2):
            self.add_family()
        for end, after in self.ends():
            for self.jobix in (1, 2):
                end()
            self.store.ending.set()
            self.store.tick()
            self.assertTrue(self.store.unfinished)
            self.restart()  # so that nothing is in memory
            self.assertEqual([0, 0], self.unfinished())
            for self.jobix in (1, 2):
                self.assertEqual({after}, self.children())
            self.restart()
            self.assertEqual([], self.unfinished())

    def test_a_parent_may_change_before_all_are_told(self):
        self.add_family()
        for end, after in self.ends():
            for path in ("/cancel", "/retry", "/cancel", "/retry"):
                self.ok(path, {"ids": [0]})
            end()
            self.assertEqual({after}, self.children())
            if after == "aborted":
                self.ok("/retry", {"ids": [0]})

    def test_a_tick_that_is_taken_back_is_tried_again(self):
        self.add_family()
        self.finish(0)
        left = dict(self.store.unfinished)
        committed = self.store.writer.finish

        def spoiled(tx):
            committed(tx)
            raise sqlite3.OperationalError("the disk is full")

        self.store.writer.finish = spoiled
        with self.assertRaises(jobman.Unavailable):
            self.store.tick()
        self.assertEqual(left, self.store.unfinished)
        self.store.writer.finish = committed
        self.assertEqual(
            {(0, "waiting"): 34, (2, "done"): 1}, self.states())

    def test_a_lapse_as_the_tick_begins_is_told_to_all(self):
        self.store.max_lapses = 1
        self.add_family()
        self.ok("/cancel", {"ids": [0]})
        self.store.tick()
        self.ok("/retry", {"ids": [0]})
        self.assertEqual(0, self.get(0, lease=1)["jobid"])
        self.assertIn(0, self.unfinished())
        self.clock.advance(2)
        self.assertEqual(
            {(0, "failed"): 1, (0, "aborted"): 34}, self.states())

    def test_a_long_chain_is_aborted_and_comes_back(self):
        n = sys.getrecursionlimit() + 500
        self.add({i: [i - 1] if i else [] for i in range(n)}, max_attempts=1)
        self.spoil(0)
        self.assertEqual(
            {(0, "aborted"): n - 1, (0, "failed"): 1}, self.states())
        self.assertEqual(n - 2, self.ok("/job/%d" % (n - 1))["aborted_by"])
        self.ok("/retry", {"ids": [0]})
        self.assertEqual(
            {(0, "blocked"): n - 1, (0, "waiting"): 1}, self.states())

    def costs_of_waiting_for(self, n):
        """Return what it costs to wait for each of n, and each one's end."""
        self.jobix = n
        entries = {i: {"jobstage": 0, "laststage": 2} for i in range(n)}
        entries[n] = {"jobstage": 0, "after": list(range(n))}
        adding = self.steps(lambda: self.post("/set", entries))
        updates = [{"jobid": i, "jobstage": 2} for i in range(n)]
        ending = self.steps(lambda: (
            self.post("/update_jobs", updates), self.store.tick()))
        self.assertEqual("waiting", self.ok("/job/%d" % n)["state"])
        return adding / n, ending / n

    def test_waiting_for_many_costs_each_the_same(self):
        for few, many in zip(self.costs_of_waiting_for(200),
                             self.costs_of_waiting_for(1500)):
            self.assertLess(many, few * 1.5)

    def test_blocked_jobs_cost_a_claim_nothing(self):
        self.set_jobs([10**6], stage=4)
        self.set_jobs([10**6 + 1, 10**6 + 2])

        def cost():
            namespace = self.namespace
            return self.steps(lambda: self.store.claim(
                namespace, [0], worker=None, lease=60))

        few = cost()
        self.add({i: [10**6] for i in range(2000)})
        self.assertLess(cost(), few * 1.2 + 50)

    def test_any_mix_of_ends_leaves_all_as_it_should_be(self):
        seed = random.randrange(2**32)
        pick = random.Random(seed)
        ids = range(14)
        after = {i: pick.sample(range(i), min(i, pick.choice((0, 1, 1, 3))))
                 for i in ids}
        self.add(after, max_attempts=1)
        met = set()  # pairs of a child and a parent that was done
        for step in range(250):
            jobid = pick.choice(ids)
            act = pick.choice(("claim", "claim", "update", "fail", "release",
                               "retry", "cancel", "lapse", "forth"))
            if act == "claim":
                self.get(0, lease=pick.choice((5, 500)))
            elif act == "lapse":
                self.clock.advance(6)
            elif act in ("retry", "cancel"):
                self.ok("/" + act, {"ids": [jobid]})
            elif act == "forth":
                self.call("/update_job/%d/%d" % (jobid, pick.choice((0, 2))))
            elif act == "update":
                if self.ok("/job/%d" % jobid)["state"] == "working":
                    self.call("/update_job/%d/2" % jobid)
            else:
                self.post("/%s_job/%d" % (act, jobid), {})
            with self.subTest(seed=seed, step=step, act=act):
                self.check_states(after, met)

    def check_states(self, after, met):
        """Check the states of jobs against those that they wait for.

        `met` grows by those that are done now.
        """
        states = self.told()
        for job in self.ok("/jobs")["jobs"]:
            jobid, state = job["jobid"], job["state"]
            met |= {(jobid, parent) for parent in after[jobid]
                    if states[parent] == "done"}
            unmet = {p for p in after[jobid] if (jobid, p) not in met}
            aborting = {p for p in unmet if states[p] in jobman.PUT_ASIDE}
            if state in ("waiting", "blocked", "aborted"):
                held = "aborted" if aborting else \
                    "blocked" if unmet else "waiting"
                self.assertEqual(held, state, (jobid, states))
            self.assertEqual(len(unmet), job["waits"])
            self.assertIn(job["aborted_by"],
                          aborting if state == "aborted" else {None})


class ForgetTest(StoreCase):
    """Done jobs are forgotten, claims released by selectors."""

    tick_every = 10**6

    def test_done_jobs_are_forgotten_with_all_that_was_theirs(self):
        self.set_jobs([1, 2, 3, 4], laststage=2, max_attempts=1)
        self.update(self.get(0), 2)
        self.update(self.get(0), 2)
        self.fail(self.get(0))
        self.ok("/lifetime/2/1")
        self.clock.advance(61)
        self.assertEqual(2, self.states()[2, "done"])
        for ids, forgotten in (([3], 0), ([4], 0), ([1], 1)):
            self.assertEqual(forgotten, self.sweep("forget", ids=ids))
        self.expect(404, "/job/1")
        self.assertEqual(1, self.sweep("forget", all=True))
        self.assertEqual(
            {(0, "failed"): 1, (0, "waiting"): 1}, self.states())
        self.assertEqual([("failed",)], self.attempts("outcome"))
        self.expect(404, "/forget", {"ids": [1]})
        self.assertEqual(3, self.ok("/stats")["totals"]["claims"])

    def test_a_late_worker_has_no_word_in_a_forgotten_job(self):
        self.set_jobs([1], laststage=2)
        late = self.get(0, lease=5)
        self.clock.advance(6)
        self.update(self.get(0, lease=5), 2)
        self.ok("/forget", {"all": True})
        self.assertReply(404, self.update(late, 2))
        self.set_jobs([1], laststage=2)
        self.assertReply(409, self.update(late, 2))

    def test_ids_of_forgotten_jobs_are_given_to_nobody(self):
        entry = {"jobstage": 0, "laststage": 0}
        body = {"key": "a", "jobs": [entry] * 3}
        self.assertEqual([1, 2, 3], self.ok("/submit", body)["ids"])
        self.ok("/forget", {"ids": [3, 1]})
        self.ok("/forget", {"ids": [2]})
        self.assertEqual([1, 2, 3], self.ok("/submit", body)["ids"])
        self.assertEqual({}, self.states())
        body["key"] = "b"
        self.assertEqual([4, 5, 6], self.ok("/submit", body)["ids"])
        self.assertEqual([1, 2, 3], self.ok(
            "/submit", body, jobix=5)["ids"])

    def test_a_job_that_waited_for_a_forgotten_one_goes_on(self):
        self.set_jobs([1], laststage=2)
        self.set_jobs([2], laststage=2, after=[1])
        self.update(self.get(0), 2)
        self.assertEqual(1, self.sweep("forget", ids=[1]))
        self.update(self.get(0), 2)
        self.ok("/retry", {"ids": [2]})
        self.assertEqual({(0, "waiting"): 1}, self.states())
        self.expect(400, "/set", {3: {"jobstage": 0, "after": [1]}})
        self.set_jobs([1])
        self.assertEqual({(0, "waiting"): 2}, self.states())
        self.assertEqual([], self.rows("select * from dependency"))

    def test_a_job_is_kept_until_all_that_wait_for_it_are_told(self):
        self.replace("CHUNK", 10)
        self.set_jobs([0], laststage=2)
        self.set_jobs(range(1, 35), after=[0])
        self.call("/update_job/0/2")
        for forgotten in (0, 1):
            self.assertEqual(forgotten, self.sweep("forget", ids=[0]))
            self.store.tick()
        self.assertEqual({(0, "waiting"): 34}, self.states())

    def test_claims_are_released_by_stage_and_state(self):
        self.set_jobs([1, 2, 3])
        self.set_jobs([4], stage=2)
        jobs = [self.get(0, lease=60) for _ in range(3)] + [self.get(2)]
        for selector, released in (
            ({"stage": 3}, 1), ({"ids": [1]}, 1), ({"state": "waiting"}, 0),
            ({"all": True}, 2),
        ):
            self.assertEqual(released, self.sweep("release", **selector))
        self.assertEqual({(0, "waiting"): 3, (2, "waiting"): 1},
                         self.states())
        for job in jobs:
            self.assertReply(409, self.update(job, 2))
        self.assertEqual(1, self.get(0)["attempt"])


class StatsTest(StoreCase):
    """What /stats and /metrics say of time."""

    def spend(self, stage=0, *, wait=0, run=0):
        """Let a job wait, be claimed and worked on; return it."""
        self.clock.advance(wait)
        job = self.get(stage, lease=1000)
        self.clock.advance(run)
        return job

    def stage(self, number=0):
        """Return what /stats says of a stage."""
        stages = self.ok("/stats")["stages"]
        return next(s for s in stages if s["stage"] == number)

    def samples(self):
        """Return /metrics as {name with labels: value}."""
        reply = exchange(self.address, "GET", "/metrics")
        self.assertReply(200, reply)
        self.assertEqual("text/plain; version=0.0.4; charset=utf-8",
                         reply.headers["content-type"])
        for secret in (self.jobix, self.store.jobix,
                       self.store.reading_jobix):
            self.assertNotIn(str(secret), reply.text)
        kinds = dict(re.findall(
            r"(?m)^# HELP (\w+) .+\n# TYPE \1 (counter|gauge|histogram)$",
            reply.text))
        found = {}
        for line in reply.text.splitlines():
            if not line.startswith("# "):
                sample, value = line.rsplit(" ", 1)
                name = re.match(r'(\w+?)(_bucket|_sum|_count)?'
                                r'({(\w+="[^"]*",?)+})?$', sample).group(1)
                self.assertIn(name, kinds)
                self.assertNotIn(sample, found)
                found[sample] = float(value)
        return found

    def some_work(self):
        self.set_jobs([1, 2, 3, 4], max_attempts=1)
        self.update(self.spend(wait=10, run=100), 2)
        self.fail(self.spend(run=7))
        late = self.get(0, lease=10)
        self.clock.advance(11)
        self.store.tick()
        self.complete(late, 2, seconds=5)
        self.beat("w", slots=4, busy=1, stages=[0])

    def test_useful_time_is_told_from_lost(self):
        stats = self.ok("/stats")
        self.assertEqual([], stats["stages"])
        self.assertEqual({0}, set(stats["totals"].values()))
        self.set_jobs([1, 2, 3, 4], max_attempts=9)
        self.update(self.spend(wait=10, run=100), 2)
        self.fail(self.spend(run=7))
        self.release(self.spend(run=20))
        self.spend(run=30)
        self.ok("/cancel", {"state": "working"})
        found = self.stage()
        self.assertEqual(4, found["claims"])
        self.assertEqual(1, found["retries"])
        self.assertEqual({
            "done": {"attempts": 1, "seconds": 100},
            "failed": {"attempts": 1, "seconds": 7},
            "released": {"attempts": 1, "seconds": 20},
            "cancelled": {"attempts": 1, "seconds": 30},
        }, found["outcomes"])
        self.assertEqual((100, 50), (found["useful"], found["lost"]))
        stats = self.ok("/stats")
        self.assertEqual({"claims": 4, "retries": 1, "useful": 100,
                          "lost": 50}, stats["totals"])
        self.assertEqual([], self.ok("/stats", jobix=1)["stages"])
        self.restart()
        self.assertEqual(stats, self.ok("/stats"))

    def test_retries_are_the_claims_after_the_first_in_a_stage(self):
        self.set_jobs([1], max_attempts=9)
        self.fail(self.spend())
        self.fail(self.spend(wait=600))
        self.update(self.spend(wait=600), 2)
        self.complete(self.spend(2, run=50), 4, seconds=3)
        for stage, claims, retries in ((0, 3, 2), (2, 1, 0)):
            found = self.stage(stage)
            self.assertEqual(
                (claims, retries), (found["claims"], found["retries"]))
        self.assertEqual(3, self.stage(2)["useful"])  # as the worker says

    def test_quantiles_of_run_and_wait_and_the_lifetime_advised(self):
        self.set_jobs(range(100))
        for i, job in enumerate(self.get(0, n=100, lease=100000)):
            self.complete(job, 2, seconds=1 if i < 90 else 300)
        found = self.stage()
        run = found["run"]
        self.assertEqual(100, run["attempts"])
        for name, seconds in (("median", 1), ("p90", 1), ("p95", 300),
                              ("p99", 300)):
            self.assertGreaterEqual(run[name], seconds)
            self.assertLess(run[name], seconds * 1.2)
        self.assertEqual(math.ceil(2 * run["p95"] / 60), found["advised"])
        self.assertEqual(100, found["wait"]["claims"])
        self.assertLess(found["wait"]["p99"], 0.01)
        self.spend(2, wait=50)
        found = self.stage(2)
        self.assertEqual(1, found["wait"]["claims"])
        self.assertGreaterEqual(found["wait"]["median"], 50)
        self.assertLess(found["wait"]["median"], 60)
        self.assertEqual((None, None), (found["run"], found["advised"]))

    def test_a_lapsed_attempt_that_ends_after_all_counts_twice(self):
        self.set_jobs([1, 2])
        late, given_back = self.get(0, lease=10), self.get(0, lease=10)
        self.clock.advance(20)
        self.store.tick()
        self.assertEqual(40, self.stage()["lost"])
        self.complete(late, 2, seconds=18)
        found = self.stage()
        self.assertEqual((18, 40), (found["useful"], found["lost"]))
        self.clock.advance(5)
        self.assertReply(200, self.release(given_back))
        found = self.stage()
        self.assertEqual((18, 65), (found["useful"], found["lost"]))
        self.assertEqual({
            "lapsed": {"attempts": 2, "seconds": 40},
            "done": {"attempts": 1, "seconds": 18},
            "released": {"attempts": 1, "seconds": 25},
        }, found["outcomes"])
        self.assertEqual([("done",), ("released",)],
                         self.attempts("outcome"))

    def test_metrics_are_of_all_jobix_together(self):
        self.some_work()
        self.expect(200, "/set", {"1": {"jobstage": 0}}, jobix=99)
        found = self.samples()
        for name, value in (
            ('jobman_info{version="%s"}' % jobman.__version__, 1),
            ('jobman_jobs{stage="0",state="waiting"}', 2),
            ('jobman_jobs{stage="0",state="failed"}', 1),
            ('jobman_jobs{stage="2",state="waiting"}', 2),
            ('jobman_claims_total{stage="0"}', 3),
            ('jobman_attempts_total{stage="0",outcome="failed"}', 1),
            ('jobman_attempts_total{stage="0",outcome="lapsed"}', 1),
            ('jobman_spent_seconds_total{stage="0",outcome="done"}', 105),
            ('jobman_attempt_seconds_count{stage="0"}', 2),
            ('jobman_attempt_seconds_sum{stage="0"}', 105),
            ('jobman_attempt_seconds_bucket{stage="0",le="65.536"}', 1),
            ('jobman_attempt_seconds_bucket{stage="0",le="262.144"}', 2),
            ('jobman_attempt_seconds_bucket{stage="0",le="+Inf"}', 2),
            ('jobman_wait_seconds_count{stage="0"}', 3),
            ("jobman_workers", 1), ("jobman_slots", 4), ("jobman_busy", 1),
        ):
            self.assertEqual(value, found.get(name), name)

    def test_metrics_count_the_workers_that_were_heard_of_lately(self):
        def counted():
            found = self.samples()
            return [found["jobman_" + name]
                    for name in ("workers", "slots", "busy")]

        self.assertEqual([0, 0, 0], counted())
        self.beat("silent")
        self.beat("w", slots=4, busy=1)
        self.assertEqual([2, 4, 1], counted())
        self.clock.advance(jobman.AWAY_AFTER)
        self.beat("w", slots=3)
        self.assertEqual([2, 3, 0], counted())
        self.clock.advance(1)
        self.assertEqual([1, 3, 0], counted())


class WaitTest(StoreCase):
    """Part 2: long polls."""

    tick_every = 0.05

    def ask(self, path="/get/0?wait=60"):
        """Make a call in the background; return a function for its value."""
        replies = []
        thread = threading.Thread(
            target=lambda: replies.append(self.ok(path)), daemon=True)
        thread.start()

        def answer():
            thread.join(PATIENCE)
            self.assertTrue(replies, "no answer to " + path)
            return replies[0]

        return answer

    def listening(self, n):
        wait_for(lambda: self.store.wait_queue.waiting == n,
                 "%d long polls" % n)

    def asked(self, *paths):
        """Make long polls; return their answers' functions when they wait."""
        answers = [self.ask(path) for path in paths]
        self.listening(len(paths))
        return answers

    def test_a_new_job_answers_a_long_poll_on_its_stage(self):
        for path, stage in (("/get/0?wait=60", 0), ("/get/4,2,0?wait=60", 2)):
            answer, = self.asked(path)
            self.set_jobs([stage], stage=stage)
            self.assertEqual(stage, answer()["jobid"])
            self.listening(0)

    def test_a_new_job_answers_the_first_who_has_room_for_it(self):
        self.ok("/stages", {"0": {"cores": 4}})
        small = self.ask("/get/0?wait=2&cores=1&lease=60")
        self.listening(1)
        large = self.ask("/get/0?wait=60&cores=4&lease=60")
        self.listening(2)
        self.set_jobs([1])
        self.assertEqual(1, large()["jobid"])
        self.assertEqual("nada", small())

    def test_a_claim_that_moves_a_job_to_a_stage_answers_one_there(self):
        answer, = self.asked("/get/7?wait=60")
        self.set_jobs([1])
        self.get("0/7")
        self.assertEqual(7, answer()["jobstage"])

    def test_each_new_job_answers_one_long_poll(self):
        answers = self.asked(*["/get/0?wait=60"] * 5)
        for i in range(5):
            self.set_jobs([i])
            self.listening(4 - i)
        self.assertEqual(set(range(5)), {a()["jobid"] for a in answers})

    def test_many_jobs_at_once_answer_as_many_long_polls(self):
        self.store.wait_queue.AT_ONCE = 2
        answers = self.asked(*["/get/0?wait=60"] * 30)
        self.set_jobs(range(30))
        self.assertEqual(set(range(30)), {a()["jobid"] for a in answers})

    def test_a_wake_up_that_one_does_not_need_reaches_the_next(self):
        both = self.ask("/get/2,0?wait=60")
        self.listening(1)
        other = self.ask()
        self.listening(2)
        self.expect(200, "/set", {1: {"jobstage": 0}, 2: {"jobstage": 2}})
        self.assertEqual({1, 2}, {both()["jobid"], other()["jobid"]})

    def test_all_that_sets_a_job_free_answers_a_long_poll(self):
        self.set_jobs([1], max_attempts=2)
        ways = (
            lambda job: self.release(job),
            lambda job: (self.fail(job), self.clock.advance(3)),
            lambda job: (self.fail(job), self.post("/retry", {"ids": [1]})),
            lambda job: self.clock.advance(61),
            lambda job: self.update(job, 0),
        )
        job = self.get(0, lease=60)
        for way in ways:
            answer, = self.asked("/get/0?wait=60&lease=60")
            way(job)
            job = answer()
            self.assertEqual(1, job["jobid"])

    def test_a_stage_that_is_resumed_answers_a_long_poll_for_each_job(self):
        self.ok("/pause/0", {})
        self.set_jobs([1, 2])
        answers = self.asked(*["/get/0?wait=60"] * 3)
        self.ok("/resume/0", {})
        self.listening(1)
        self.set_jobs([3])
        self.assertEqual({1, 2, 3}, {a()["jobid"] for a in answers})

    def test_jobs_of_a_paused_stage_wake_nobody_in_another_process(self):
        self.set_jobs([1])
        self.ok("/pause/0", {})
        key = self.namespace, 0
        with self.store.wait_queue.join([key]) as waiter:
            self.store.wake_for_others([key])
            self.assertFalse(waiter.woken)
            self.ok("/resume/0", {})
            self.store.wake_for_others([key])
            self.assertTrue(waiter.woken)

    def test_a_worker_that_hung_up_gets_no_job(self):
        with socket.create_connection(self.address) as client:
            client.sendall(b"GET /get/0?wait=60 HTTP/1.1\r\n"
                           b"Host: localhost\r\njobix: 4711\r\n\r\n")
            self.listening(1)
        answer = self.ask()
        self.listening(2)
        self.set_jobs([1])
        self.assertEqual(1, answer()["jobid"])
        self.listening(0)

    def test_a_long_poll_without_a_job_ends_in_time(self):
        began = time.monotonic()
        self.assertEqual("nada", self.get(0, wait=0.1))
        self.replace("MAX_WAIT", 0.1)
        self.assertEqual([], self.get(0, wait=PATIENCE, n=5))
        self.assertGreaterEqual(time.monotonic() - began, 0.2)

    def test_long_polls_over_the_bound_are_answered_at_once(self):
        self.store.wait_queue.limit = 2
        answers = self.asked(*["/get/0?wait=60"] * 2)
        self.assertEqual("nada", self.get(0, wait=60))
        self.set_jobs([1, 2])
        self.assertEqual({1, 2}, {a()["jobid"] for a in answers})

    def test_a_worker_whose_long_poll_is_cut_short_does_not_hurry(self):
        self.store.wait_queue.limit = 0
        claims, join = [], self.store.wait_queue.join

        def counted(keys):
            claims.append(keys)
            return join(keys)

        self.store.wait_queue.join = counted
        self.environment.update(
            JOBMAN_JOBIX="4711", JOBMAN_URL="http://%s:%d" % self.address)
        status, _, _ = self.command(WORKER, "--idle-timeout", "0.7")
        self.assertEqual(0, status)
        self.assertLess(len(claims), 25)

    def test_a_server_that_ends_answers_its_long_polls(self):
        answer, = self.asked("/get/0?wait=60")
        self.store.wake_all()
        self.assertEqual("nada", answer())
        self.assertEqual("nada", self.get(0, wait=60))  # and from then on

    def test_many_are_woken_one_after_the_other(self):
        queue, key = jobman.WaitQueue(99), (1, 0)
        queue.AT_ONCE = 2
        polls = [queue.join([key]) for _ in range(9)]
        waiters = [poll.__enter__() for poll in polls]
        queue.wake(key, 8)
        for n, (poll, waiter) in enumerate(zip(polls, waiters)):
            self.assertEqual(min(n + 2, 8), sum(w.woken for w in waiters))
            waiter.used = True
            poll.__exit__(None, None, None)
        with queue.join([key]) as only:
            queue.wake(key, 9)  # of which nothing is left over
            only.used = True
        self.assertEqual({}, queue.more)

    def test_no_more_wake_ups_are_kept_than_there_are_waiters(self):
        queue, key = jobman.WaitQueue(9), (1, 0)
        queue.AT_ONCE = 1
        with queue.join([key]) as one, queue.join([key]) as two:
            queue.wake(key, 1000)
            queue.wake(key, 1000)
            self.assertEqual((True, True), (one.woken, two.woken))
            self.assertEqual({key: 1}, queue.more)
        self.assertEqual({}, queue.more)

    def test_an_unused_wake_up_is_passed_on(self):
        queue, key = jobman.WaitQueue(9), (1, 0)
        with queue.join([key]) as last:
            for used in (True, False):
                with queue.join([key]) as first:
                    self.assertFalse(last.woken)
                    first.wake()
                    first.used = used
            self.assertTrue(last.woken)


class WrongJobixTest(StoreCase):
    """A wrong jobix is refused after a pause that delays no other call."""

    open_to_all = False

    def setUp(self):
        super().setUp()
        self.jobix = self.store.jobix

    def wrong(self, path="/status", **headers):
        """Bring a wrong jobix; return the seconds until it was refused."""
        began = time.monotonic()
        self.assertIn(self.call(path, jobix=1, **headers).status, (401, 403))
        return time.monotonic() - began

    def test_a_wrong_jobix_is_refused_after_a_pause(self):
        login = base64.b64encode(b":1").decode()
        for seconds in (
            self.wrong(), self.wrong("/heartbeat", method="POST"),
            self.wrong("/get?plain=1", Authorization="Basic " + login),
        ):
            self.assertGreaterEqual(seconds, 0.2)

    def test_a_wrong_jobix_delays_nobody_else(self):
        held, go = threading.Semaphore(0), threading.Event()
        self.addCleanup(go.set)
        self.replace("time", types.SimpleNamespace(**{
            **vars(time), "sleep": lambda seconds: (
                held.release(), go.wait(PATIENCE))}))
        callers = [threading.Thread(target=self.wrong) for _ in range(40)]
        for caller in callers:
            caller.start()
        for _ in callers:
            self.assertTrue(held.acquire(timeout=PATIENCE))
        self.ok("/status")
        self.assertReply(403, self.call("/status", jobix="none"))
        go.set()
        for caller in callers:
            caller.join()


def reset(client):
    """Close a connection as a process that is killed does."""
    client.setsockopt(
        socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


ASKED = b"GET /%s HTTP/1.1\r\nHost: localhost\r\n\r\n"


class SocketTest(StoreCase):
    """Requests as bytes, and what comes back."""

    POST = b"POST /set HTTP/1.1\r\nHost: localhost\r\njobix: 4711\r\n" \
        b"Content-Length: %d\r\n\r\n"

    def dial(self):
        """Return a connection."""
        return socket.create_connection(self.address, PATIENCE)

    def say(self, line, *lines, host=(b"Host: localhost",)):
        """Send lines on one connection; return all that comes back."""
        lines = (line, *(host if b"HTTP/1" in line else ()), *lines)
        with self.dial() as client:
            client.sendall(b"".join(line + b"\r\n" for line in lines))
            socket.socket.shutdown(client, socket.SHUT_WR)  # beneath TLS
            return b"".join(iter(lambda: client.recv(65536), b""))

    def assertSays(self, status, *lines, **options):
        """Assert with what status a request is answered; return all."""
        reply = self.say(*lines, b"", **options)
        self.assertEqual(b"HTTP/1.1 %d " % status, reply[:13], reply)
        return reply

    def assertRefused(self, status, *lines, **options):
        """Assert that a request is refused in JSON, and the connection closed.
        """
        reply = self.assertSays(status, *lines, **options)
        head, _, body = reply.partition(b"\r\n\r\n")
        self.assertIn(b"Connection: close", head)
        self.assertEqual(["error"], list(json.loads(body.decode())))

    @contextlib.contextmanager
    def ending(self, server):
        """Let the server end while the body runs, and see that it does."""
        thread = threading.Thread(target=self.closing.close, daemon=True)
        thread.start()
        wait_for(server.store.ending.is_set, "the end")
        yield
        thread.join(PATIENCE)
        self.assertFalse(thread.is_alive())

    def test_what_is_no_sound_request_is_refused(self):
        self.set_jobs([1])
        post = b"POST /set HTTP/1.1", b"jobix: 1"
        inner = b"GET /lifetime/9/9 HTTP/1.1\r\njobix: 4711\r\n\r\n"
        length = b"Content-Length%%s: %d" % len(inner)
        for status, *lines in (
            (505, b"GET / HTTP/2.0"),
            (400, b"nonsense"),
            (400, b"GET /x y z HTTP/1.1"),
            (400, "GET /\xe9 HTTP/1.1".encode()),
            (400, b"GET / HTTP/1.1x"),
            (400, b"GET /get/0", b"jobix: 4711"),  # that is HTTP/0.9
            (414, b"GET /" + b"x" * 70000 + b" HTTP/1.1"),
            (431, b"GET / HTTP/1.1", b"a: " + b"x" * 70000),
            (431, b"GET / HTTP/1.1", *[b"a: 1"] * 10000),
            (431, b"GET / HTTP/1.1", *[b"a: 1"] * 100),
            *((400, b"GET /status HTTP/1.1", b"jobix: 4711", line,
               length % b"", b"", inner)  # others may read another length
              for line in (
                b"Foo", b"Foo bar", b"Foo: bar\rx", length % b" ",
                b"a: b\nc: d", b"a: b\0", b" folded: 1", b": 1", b"a\xe9: 1",
                b"a: b\n")),
            (411, *post, b"Transfer-Encoding: chunked", b"", b"0"),
            (411, *post),
            *((400, *post, b"Content-Length: " + length) for length in (
                b"-1", b"x", b"1, 1", b"1.5", b"+1", b"-0", b"\xa01",
                b"1" * 30)),
            (400, *post, b"Content-Length: 1", b"Content-Length: 1"),
            (400, *post, b"Content-Length: 99", b"", b"{"),
            (413, *post, b"Content-Length: 99999999"),
            (403, b"POST /set HTTP/1.1", b"Origin: http://evil.example",
             b"Content-Length: 2", b"", b"{}"),  # by a form, without a jobix
        ):
            with self.subTest(lines=lines[:9]):
                self.assertRefused(status, *lines)
        self.assertEqual({}, self.ok("/init"))
        self.assertEqual({(0, "waiting"): 1}, self.states())

    def test_requests_and_their_statuses(self):
        for status, *lines in (
            (200, b"GET / HTTP/1.1", *[b"a: 1"] * 99),
            (200, b"", b"GET / HTTP/1.1", b"Host: localhost"),
            (400, b"GET xhealth HTTP/1.1"),
            (400, b"OPTIONS * HTTP/1.1"),
            (405, b"BREW / HTTP/1.1"),
            (405, b"get / HTTP/1.1"),
            (403, b"GET /status HTTP/1.1", b"jobix: 1", b"jobix: 4711"),
            (400, b"GET http://a@localhost/health HTTP/1.1"),
            (421, b"GET http://evil.example/health HTTP/1.1"),
        ):
            with self.subTest(lines=lines[:9]):
                self.assertSays(status, *lines)
        self.store.open_to_all = False  # no page of a browser knows the jobix
        for target in (b"http://x/health", b"HTTP://127.0.0.1:1/health",
                       b"https://x/health", b"http://evil.example/health"):
            self.assertSays(200, b"GET " + target + b" HTTP/1.1")

    def test_a_head_that_cannot_be_sound_is_refused_before_its_end(self):
        for head, status in (
            (b"GET / HTTP/1.1\r\n" + b"a: 1\r\n" * 12000, b" 431 "),
            (b"GET / HTTP/1.1\nHost: localhost\n\n", b" 400 "),
        ):
            with self.dial() as client:
                client.sendall(head)
                self.assertIn(status, client.recv(100))

    def test_one_host_is_named_and_it_is_ours(self):
        line = b"GET /health HTTP/1.1"
        for host in ((), *((b"Host: " + name,) for name in (
            b"", b"a b", b"a,b", b"a/b", b"u@localhost", b"[::1",
            b"localhost:x",
        )), (b"Host: localhost", b"Host: localhost")):
            self.assertRefused(400, line, host=host)
        self.assertRefused(400, b"GET http://localhost/health HTTP/1.1",
                           b"Host: localhost")
        self.assertSays(200, b"GET /health HTTP/1.0", host=())
        for name, status in (
            (b"evil.example:%d" % self.address[1], 421),
            (b"1.2.3.4.com", 421), (b"localhost.evil.example", 421),
            (b"notlocalhost", 421), (b"LOCALHOST:80", 200),
            (b"a.localhost", 200), (b"10.0.0.1", 200), (b"[::1]:8642", 200),
            (socket.gethostname().encode(), 200),
        ):
            self.assertSays(status, b"GET /status HTTP/1.1", b"jobix: 4711",
                            host=(b"Host: " + name,))

    def test_a_page_of_another_site_can_send_no_jobix(self):
        for path in (b"/set", b"/get/0"):  # its browser asks first
            reply = self.assertSays(
                405, b"OPTIONS " + path + b" HTTP/1.1",
                b"Origin: http://evil.example",
                b"Access-Control-Request-Headers: jobix")
            self.assertNotIn(b"Access-Control", reply)

    def test_a_wrong_jobix_has_one_try_on_a_connection(self):
        self.store.open_to_all = False
        login = b"Authorization: Basic " + base64.b64encode(b":1")
        for path, header, status in ((b"/status", b"jobix: 1", b" 403 "),
                                     (b"/get?plain=1", login, b" 401 ")):
            asked = (b"GET " + path + b" HTTP/1.1", b"Host: localhost",
                     header, b"")
            reply = self.say(*asked, *asked, host=())
            self.assertEqual(1, reply.count(b"HTTP/1.1"), reply)
            self.assertEqual(1, reply.count(status), reply)

    def test_no_request_is_logged(self):
        with contextlib.redirect_stderr(io.StringIO()) as log:
            for line in (b"GET /job/1?claim=x HTTP/1.1", b"x\x1b[2J",
                         b"GET /x HTTP/1.1", b"x /x HTTP/1.1", b"GET / HTTP/9",
                         b"GET /" + b"x" * 70000):
                self.say(line, b"")
        self.assertEqual("", log.getvalue())

    def test_no_body_is_taken_of_a_stranger(self):
        self.store.open_to_all = False
        head = (b"POST /%s HTTP/1.1\r\nHost: x\r\njobix: 1\r\n"
                b"Content-Length: 1000\r\n\r\n")
        expect = head[:-2] + b"Expect: 100-continue\r\n\r\n"
        for path, status in ((b"set", 403), (b"health", 405), (b"x", 404)):
            for asked in (head, expect):
                with self.dial() as client:
                    client.sendall(asked % path)
                    reply = client.recv(65536)
                self.assertIn(b" %d " % status, reply[:13])
                self.assertIn(b"Connection: close", reply)

    def test_a_client_that_asks_first_is_told_to_go_on(self):
        expect = b"Expect: 100-continue"
        with self.dial() as client:
            client.sendall(
                self.POST[:-2] % 2 + expect + b"\r\n\r\n")
            self.assertEqual(b"HTTP/1.1 100 Continue\r\n\r\n",
                             client.recv(100))
            client.sendall(b"{}")
            self.assertIn(b" 200 ", client.recv(100)[:13])
        self.assertSays(  # HTTP/1.0 doesn't know that answer
            200, b"POST /set HTTP/1.0", b"jobix: 4711", b"Content-Length: 4",
            expect, b"", b"{}")

    def test_a_connection_that_breaks_in_a_body_is_no_fault_of_ours(self):
        with contextlib.redirect_stderr(io.StringIO()) as log:
            for more in b"", b"Expect: 100-continue\r\n":
                client = self.dial()
                client.sendall(self.POST[:-2] % 9 + more + b"\r\n{")
                wait_for(lambda: self.door.server.busy, "a request")
                reset(client)
                wait_for(lambda: not self.door.server.open, "its end")
        self.assertEqual("", log.getvalue())

    def test_a_refusal_reaches_a_client_that_sends_on(self):
        self.replace("MAX_BODY", 2**24)  # more than the system buffers
        for more, status in ((1, b" 413 "), (0, b" 403 ")):
            with self.dial() as client:
                client.sendall(self.POST % (jobman.MAX_BODY + more))
                client.sendall(bytes(jobman.MAX_BODY))
                self.assertIn(status, client.recv(100))
            self.store.open_to_all = False  # so the body isn't read at all

    def test_requests_that_come_at_once_are_answered_in_order(self):
        self.set_jobs([1, 2])
        lines = []
        for path in (b"/get/0", b"/status", b"/get/0", b"/x", b"/get/0"):
            lines += (b"GET %s HTTP/1.1" % path, b"Host: localhost",
                      b"jobix: 4711", b"")
        replies = self.say(*lines, host=())
        found = re.findall(rb'"jobid": \d|"totals"|nothing at|"nada"', replies)
        self.assertEqual([b'"jobid": 1', b'"totals"', b'"jobid": 2',
                          b"nothing at", b'"nada"'], found)

    def test_an_old_client_learns_what_becomes_of_its_connection(self):
        reply = self.say(b"GET /health HTTP/1.0", b"")
        self.assertIn(b"Connection: close", reply)
        keep = b"GET /health HTTP/1.0", b"Connection: keep-alive", b""
        reply = self.say(*keep, *keep)
        self.assertEqual(2, reply.count(b"Connection: keep-alive"), reply)

    def test_an_answer_to_head_has_no_body(self):
        self.set_jobs([1])
        health = self.say(b"GET /health HTTP/1.1", b"").partition(b"\r\n\r\n")
        for path, status, length in (
            (b"health", 200, len(health[2])), (b"get/0", 405, 38),
            (b"nowhere", 404, 62),
        ):
            reply = self.assertSays(
                status, b"HEAD /" + path + b" HTTP/1.1", b"jobix: 4711")
            self.assertTrue(reply.endswith(b"\r\n\r\n"), reply)
            self.assertIn(b"Content-Length: %d\r\n" % length, reply)
        self.assertEqual({(0, "waiting"): 1}, self.states())

    def test_at_the_end_a_client_is_told_which_answer_is_the_last(self):
        server = self.door.server
        self.patch(jobman.Server, "GRACE", PATIENCE)
        health = ASKED % b"health"
        with self.dial() as asking, self.dial() as slow, self.dial() as idle:
            for client in (asking, slow, idle):
                client.sendall(health)
                self.assertNotIn(b"Connection: close", client.recv(65536))
            slow.sendall(health[:20])
            with self.ending(server):
                for client, rest in ((asking, health), (slow, health[20:])):
                    client.sendall(rest)
                    reply = client.recv(65536)
                    self.assertIn(b" 200 ", reply[:13])
                    self.assertIn(b"Connection: close", reply)
                    self.assertEqual(b"", client.recv(9))
                idle.close()

    def test_at_the_end_a_client_that_is_silent_is_cut_off(self):
        server, health = self.door.server, ASKED % b"health"
        self.patch(jobman.Server, "GRACE", 0.05)
        self.patch(jobman.Server, "END", PATIENCE)
        with self.dial() as fresh, self.dial() as slow, self.dial() as idle:
            wait_for(lambda: len(server.open) == 3, "three connections")
            idle.sendall(health)
            self.assertIn(b" 200 ", idle.recv(65536)[:13])
            wait_for(lambda: not server.busy, "its end")
            slow.sendall(health[:20])
            wait_for(lambda: server.busy, "half a request")
            with self.ending(server):
                self.assertEqual(b"", fresh.recv(9))
                self.assertEqual(b"", idle.recv(9))
                slow.sendall(health[20:])
                self.assertIn(b" 200 ", slow.recv(65536)[:13])

    def test_at_the_end_clients_that_the_system_let_in_are_answered(self):
        process, address = self.serve()
        self.suspend(process)  # so it doesn't accept them
        clients = [socket.create_connection(address, PATIENCE)
                   for _ in range(100)]
        for client in clients:
            client.sendall(ASKED % b"health")
        process.terminate()
        process.send_signal(signal.SIGCONT)
        for client in clients:
            self.assertIn(b" 200 ", client.recv(65536)[:13])
            client.close()
        self.assertEqual((0, ""), self.finish(process)[::2])

    def drip(self, data):
        """Send a byte now and then until 408 comes."""
        with self.dial() as client:
            client.setblocking(False)
            for i in itertools.count():
                with contextlib.suppress(
                    BlockingIOError, ssl.SSLWantReadError
                ):
                    answer = client.recv(100)
                    break
                with contextlib.suppress(OSError):
                    client.send(data[i : i + 1])
                time.sleep(0.005)
        self.assertIn(b" 408 ", answer[:13])
        self.assertLess(i, len(data))

    def test_a_client_that_sends_a_byte_now_and_then_is_408(self):
        self.patch(jobman.Handler, "HEAD", 0.1)
        self.drip(b"GET / HTTP/1.1\r\na: " + b"x" * 9000)
        self.patch(jobman.Handler, "HEAD", PATIENCE)
        self.patch(jobman.Handler, "PATIENCE", 0.3)
        self.patch(jobman.Handler, "SLOWEST", 10**6)
        self.drip(self.POST % 90000 + b" " * 9000)
        self.patch(jobman.Handler, "SLOWEST", -10**4)  # it's late already
        with self.dial() as client:
            client.sendall(self.POST % 90000 + b" " * 90000)
            self.assertIn(b" 408 ", client.recv(100)[:13])

    def test_a_head_may_come_in_pieces_but_not_by_half(self):
        self.patch(jobman.Handler, "HEAD", PATIENCE)
        with self.dial() as client:
            for byte in ASKED % b"health":
                client.sendall(bytes([byte]))
            self.assertIn(b" 200 ", client.recv(100)[:13])
        self.assertIn(b"too early", self.say(b"GET / HTTP/1.1"))

    def test_a_client_that_says_nothing_is_hung_up_on(self):
        self.patch(jobman.Handler, "FIRST", 0.05)
        with self.dial() as client:
            self.assertEqual(b"", client.recv(100))
        self.patch(jobman.Handler, "FIRST", PATIENCE)
        self.patch(jobman.Handler, "IDLE", 0.05)
        with self.dial() as client:
            client.sendall(ASKED % b"")
            reply = b"".join(iter(lambda: client.recv(100), b""))
            self.assertTrue(reply.startswith(b"HTTP/1.1 200 "), reply)

    def test_a_client_that_hardly_reads_is_hung_up_on(self):
        self.set_jobs(dict.fromkeys(range(9), "x" * 10**6))
        self.patch(jobman.Handler, "PATIENCE", 0.2)
        self.patch(jobman.Handler, "SLOWEST", 10**9)
        server = self.door.server
        with self.dial() as silent, self.dial() as slow:
            for client in (silent, slow):
                client.sendall(b"GET /jobs HTTP/1.1\r\nHost: localhost\r\n"
                               b"jobix: 4711\r\n\r\n" * 9)
            with contextlib.suppress(OSError):
                while slow.recv(100000):
                    time.sleep(0.005)
            wait_for(lambda: not server.open, "their end")

    def test_connections_are_bounded(self):
        server = self.door.server
        server.limit = 2
        with self.dial() as first, self.dial() as second:
            wait_for(lambda: len(server.open) == 2, "two connections")
            with socket.create_connection(self.address, PATIENCE) as third:
                reply = b""
                with contextlib.suppress(ConnectionResetError):
                    reply = third.recv(65536)
            if not self.tls:
                self.assertIn(b" 503 ", reply[:13])
                self.assertIn(b"Retry-After: 1", reply)
            for client in (first, second):
                client.sendall(ASKED % b"health")
                self.assertIn(b" 200 ", client.recv(100)[:13])
        wait_for(lambda: not server.open, "their end")
        self.expect(200, "/health")

    def test_where_no_thread_can_be_started_the_answer_is_503(self):
        if not self.tls:
            kept = threading.stack_size(2**46)  # no system can give that
            try:
                for _ in range(9):
                    reply = self.expect(503, "/set", {})
                    self.assertEqual("1", reply.headers["retry-after"])
            finally:
                threading.stack_size(kept)
        self.expect(200, "/set", {})

    def test_threads_are_used_again(self):
        before = threading.active_count()
        for _ in range(100):
            self.call("/health")
        self.assertLess(threading.active_count(), before + 20)
        before = threading.active_count()
        ended = self.door.server.parked + 2  # and those that accept and tick
        self.closing.close()
        wait_for(lambda: threading.active_count() <= before - ended,
                 "the end of those without a connection")

    def test_a_stop_does_not_wait_where_nobody_is(self):
        took = []
        for _ in range(5):
            self.call("/health")
            wait_for(lambda: not self.door.server.open, "its end")
            began = time.monotonic()
            self.closing.close()
            took.append(time.monotonic() - began)
            self.open()
        self.assertLess(min(took), 0.5)


class LimitsTest(StoreCase):
    """What bounds connections, and requests that come at one time."""

    def test_connections_leave_files_threads_and_processes_to_the_rest(self):
        code = """if 1:
            import os, resource, sys
            sys.path.insert(0, %r)
            import jobman
            if not os.geteuid():  # root isn't bound
                os.setuid(2**16 - 3)
            resource.setrlimit(resource.RLIMIT_NPROC, (%d, %d))
            print(jobman.connections_bound())"""
        for threads, bound in ((150, "75"), (1, "1")):
            done = self.command("-c", code % (HERE, threads, threads))
            self.assertEqual((0, bound + "\n", ""), done)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        self.addCleanup(
            resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        for files, bound in ((512, 412), (50, 1)):
            resource.setrlimit(resource.RLIMIT_NOFILE, (files, hard))
            self.assertEqual(bound, jobman.connections_bound())

    def test_cgroups_bound_connections(self):
        before = jobman.connections_bound()
        os.makedirs(self.path("a", "b"))
        self.replace("OWN_CGROUPS", self.path("own"))
        self.replace("CGROUPS", {"pids": self.folder, "": self.folder})
        for line in ("3:pids:/a/b", "0::/a/b"):
            with open(self.path("own"), "w") as file:
                file.write("1:cpu:/z\n%s\n" % line)
            for inner, outer, bound in (
                ("max", "max", before), ("200", "max", 100),
                ("max", "100", 50), ("1", "100", 1),
            ):
                for name, most in (("a/b", inner), ("a", outer)):
                    with open(self.path(name, "pids.max"), "w") as file:
                        file.write(most + "\n")
                self.assertEqual(bound, jobman.connections_bound())

    def test_long_polls_leave_connections_for_others(self):
        few = changed("jobman", "import resource\n"
                      "resource.setrlimit(resource.RLIMIT_NOFILE, (150, 150))")
        _, address = self.serve("--open", start=few)
        polls = [socket.create_connection(address, PATIENCE)
                 for _ in range(45)]
        self.addCleanup(lambda: [poll.close() for poll in polls])
        for poll in polls:
            poll.sendall(b"GET /get/0?wait=60 HTTP/1.1\r\n"
                         b"Host: localhost\r\njobix: 1\r\n\r\n")

        def answered():
            return len(select.select(polls, (), (), 0)[0])

        wait_for(lambda: answered() == 5, "five that are answered at once")
        self.assertEqual(200, exchange(address, "GET", "/health").status)
        self.assertEqual(5, answered())

    def test_a_server_waits_while_the_system_has_no_file_for_it(self):
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        limits = resource.RLIMIT_NOFILE
        clients = [socket.socket() for _ in range(9)]
        self.addCleanup(resource.setrlimit, limits, (soft, hard))
        resource.setrlimit(limits, (len(os.listdir("/proc/self/fd")), hard))
        for client in clients:
            client.settimeout(PATIENCE)
            client.connect(self.address)
        waiting = clients.pop()
        waiting.sendall(ASKED % b"health")
        for client in clients:
            client.close()
        self.assertIn(b" 200 ", waiting.recv(100)[:13])
        waiting.close()

    def test_a_slow_page_keeps_no_claim_waiting(self):
        go, real = threading.Event(), jobman.overview
        self.addCleanup(go.set)
        self.replace(
            "overview", lambda *args: go.wait(PATIENCE) and real(*args))
        self.set_jobs([1])
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            page = pool.submit(self.call, "/get?plain=1")
            wait_for(lambda: self.door.server.busy, "the page's request")
            self.assertEqual(1, self.get(0)["jobid"])
            go.set()
            self.assertEqual(200, page.result().status)

    def test_requests_of_one_moment_share_a_commit(self):
        self.set_jobs(range(20))
        commits, writer = [], self.store.writer
        go, commit = hold_commit(self.store), writer.commit
        writer.commit = lambda turns: (
            commits.append(len(turns)), commit(turns))
        with concurrent.futures.ThreadPoolExecutor(20) as pool:
            claims = [pool.submit(self.get, 0) for _ in range(20)]
            wait_for(lambda: len(writer.queue) == 20, "all claims")
            go.set()
            jobs = {claim.result()["jobid"] for claim in claims}
        self.assertEqual(set(range(20)), jobs)
        self.assertEqual([20], [n for n in commits if n > 1])

    def test_two_stages_never_have_one_name(self):
        outcomes = together(
            self.store,
            self.operation("put_stages", {0: {"name": "a", "minutes": 1}}),
            self.operation("put_stages", {1: {"name": "a", "minutes": 1}}),
            self.operation("put_stages", {2: {"name": "b"}}))
        self.assertEqual(409, outcomes[1], outcomes)
        self.assertEqual(2, len(outcomes[2]), outcomes)
        self.assertEqual({"0": {"name": "a", "minutes": 1},
                          "2": {"name": "b"}}, self.ok("/stages"))

    def test_few_large_bodies_are_in_memory_at_a_time(self):
        self.store.large_bodies = threading.BoundedSemaphore(2)
        self.set_jobs([0])  # so that there is a namespace
        large = {i: {"jobstage": 0, "jobcmd": os.urandom(999).hex()}
                 for i in range(100)}
        go, writer = hold_commit(self.store), self.store.writer
        with concurrent.futures.ThreadPoolExecutor(9) as pool:
            sets = [pool.submit(self.post, "/set", large) for _ in range(6)]
            wait_for(lambda: len(self.door.server.busy) == 6, "the requests")
            small = pool.submit(self.post, "/set", {7: {"jobstage": 0}})
            wait_for(lambda: len(writer.queue) == 3, "two and the small one")
            self.assertEqual(7, len(self.door.server.busy))
            go.set()
            for reply in (*sets, small):
                self.assertReply(200, reply.result())
        with contextlib.ExitStack() as held:
            for _ in range(2):
                held.enter_context(self.store.large_bodies)
            self.replace("MAX_WAIT", 0.1)
            reply = self.expect(503, "/set", large)
            self.assertEqual("1", reply.headers["retry-after"])
        self.expect(200, "/set", large)

    def test_a_slow_sender_keeps_no_body_from_its_turn(self):
        self.store.large_bodies = threading.BoundedSemaphore(1)
        with socket.create_connection(self.address, PATIENCE) as slow:
            slow.sendall(SocketTest.POST % jobman.RECEIVED_FIRST + b"{")
            wait_for(lambda: self.door.server.busy, "the slow one")
            self.expect(200, "/set", {
                1: {"jobstage": 0, "jobcmd": os.urandom(20000).hex()}})

    def test_a_server_that_lost_its_database_is_not_well(self):
        self.store.lock.lost = "another server has it"
        self.expect(503, "/health")

    def test_a_fault_of_ours_costs_one_connection(self):
        respond, told = jobman.respond, io.StringIO()
        with contextlib.redirect_stderr(told):
            self.replace("respond", lambda *_: 1 / 0)
            with self.assertRaises(OSError):
                self.call("/health")
            jobman.respond = respond
            self.expect(200, "/health")
        self.assertIn("ZeroDivisionError", told.getvalue())


class ManyJobsTest(StoreCase):
    """Many jobs come in at once."""

    CHOICES = {
        "jobcmd": ("true", {"a": [1, None]}, None, 7), "laststage": (0, 9),
        "filename": ("f", "\ud800", None), "priority": (-5, 0, 8, None),
        "cwd": ("/", None), "max_attempts": (1, 4), "timeout": (0.5, 60, None),
        "outputs": (["a", "b/\udcff"], []),
    }

    def random_jobs(self, chance, n):
        """Return jobs that carry this or that."""
        names = chance.sample(sorted(self.CHOICES), chance.randrange(9))
        return {chance.randrange(10**6): dict({
            name: chance.choice(self.CHOICES[name]) for name in names
            if chance.random() < 0.9}, jobstage=0) for _ in range(n)}

    def client(self, **parts):
        """Return a client that adds ten jobs in a call, or as told."""
        client = worker.Client(
            url="http://%s:%d" % self.address, jobix=self.jobix)
        self.addCleanup(client.close)
        vars(client).update({"PART": 10, **parts})
        return client

    def sent(self):
        """Return a list that will have the ids in each /set to come."""
        calls, respond = [], jobman.respond

        def noted(store, request):
            response = respond(store, request)
            if request.path == "/set":
                calls.append([int(jobid) for jobid in request.json()])
            return response

        self.replace("respond", noted)
        return calls

    def test_each_job_is_kept_as_it_came_first(self):
        chance = random.Random(7)
        for self.jobix, n in enumerate((1, 2, 99, 100, 101, 250, 999) * 2):
            jobs = self.random_jobs(chance, n)
            again = {jobid: {"jobstage": 1, "jobcmd": "no"}
                     for jobid in chance.sample(sorted(jobs), n // 9 + 1)}
            self.expect(200, "/set", jobs)
            self.expect(200, "/set", again)
            kept = {}
            for job in self.get(0, n=9999):
                del job["claim"], job["attempt"], job["jobix"]
                kept[job.pop("jobid")] = job
            bare = {"jobcmd": None, "filename": None}
            self.assertEqual({
                jobid: {**bare, **{
                    name: value for name, value in job.items()
                    if value is not None and (name, value) != ("priority", 0)}}
                for jobid, job in jobs.items()}, kept)

    def test_a_jobcmd_keeps_its_type_beside_an_equal_one(self):
        for self.jobix, pair in enumerate((
            (1, True), (2, 2.0), (0.0, -0.0), ([1], [True]), ("", None),
        )):
            self.set_jobs(dict(enumerate(pair)))
            kept = [job["jobcmd"] for job in self.get(0, n=9)]
            self.assertEqual(repr(list(pair)), repr(kept))

    def test_a_set_of_no_jobs_is_no_fault(self):
        self.ok("/init/1/1")
        self.expect(200, "/set", {})

    def test_a_client_adds_large_jobs_in_smaller_parts(self):
        calls = self.sent()
        jobs = {i: {"jobstage": 0, "jobcmd": "x" * (150 * i)}
                for i in range(10)}
        self.client(PART_SIZE=1000).set(jobs)
        self.assertEqual(list(jobs), list(itertools.chain(*calls)))
        self.assertLess(len(calls), 10)
        for ids in calls:
            size = len(json.dumps({i: jobs[i] for i in ids}))
            self.assertTrue(size <= 1000 or len(ids) == 1, calls)
        self.assertEqual({(0, "waiting"): 10}, self.states())

    def test_a_client_adds_jobs_in_parts_as_they_are_made(self):
        calls, client = self.sent(), self.client()

        def pairs(n):
            for jobid in range(n):
                self.assertEqual(len(calls), max(0, jobid - 1) // 10)
                yield jobid, {"jobstage": 0}

        for n in (0, 1, 10, 11, 35):
            client.set(pairs(n))
            ids = list(range(n))
            self.assertEqual(
                [ids[i:i + 10] for i in range(0, max(n, 1), 10)], calls)
            calls.clear()
        self.assertEqual({(0, "waiting"): 35}, self.states())

    def test_a_server_takes_many_with_little_memory(self):
        process, self.address = self.serve("--open")
        client = self.client(PART=worker.Client.PART)
        client.set({1: {"jobstage": 0}})
        before = most_memory(process)
        client.set((i, {"jobstage": 0, "jobcmd": "run %d" % i})
                   for i in range(50000))
        self.assertLess(most_memory(process) - before, 32 * 2**20)
        self.assertEqual(50000, client.status()["totals"]["jobs"])

    def test_a_part_whose_answer_is_lost_is_sent_again(self):
        lost, respond = [], jobman.respond

        def losing(store, request):
            response = respond(store, request)
            if request.path == "/set" and len(lost) < 2:
                lost.append(request)
                for connection in self.door.server.busy.copy():
                    connection.shutdown(socket.SHUT_RDWR)
            return response

        self.replace("respond", losing)
        self.client().set({i: {"jobstage": 0} for i in range(35)})
        self.assertEqual(2, len(lost))
        self.assertEqual({(0, "waiting"): 35}, self.states())

    def test_a_part_that_is_refused_ends_it(self):
        jobs = {i: {"jobstage": 0} for i in range(35)}
        jobs[25] = {"jobstage": -1}
        with self.assertRaises(worker.Refused) as caught:
            self.client().set(jobs)
        self.assertEqual(400, caught.exception.status)
        self.assertEqual({(0, "waiting"): 20}, self.states())


class ApplicationTest(TemporaryFolder):
    """The WSGI callable as a process makes it: from the environment."""

    def call(self, path, application, **environ):
        """Make a call, which a validator watches; return status and body."""
        environ.update(PATH_INFO=path, SCRIPT_NAME="", HTTP_JOBIX="7")
        wsgiref.util.setup_testing_defaults(environ)
        started = []
        checked = wsgiref.validate.validator(application)
        parts = checked(environ, lambda *args: started.append(args))
        with contextlib.closing(parts):
            return started[0][0], b"".join(parts)

    def plain_call(self, application, path, body, **environ):
        """Make a POST that the validator would refuse; return its status."""
        environ.update({
            "REQUEST_METHOD": "POST", "PATH_INFO": path, "SCRIPT_NAME": "",
            "HTTP_JOBIX": "7", "wsgi.input": body})
        started = []
        application(environ, lambda *args: started.append(args))
        return started[0][0][:3]

    def open(self, **variables):
        """Make an application that admits any jobix, if not told else.

        Return it and the answer to its first call.
        """
        application = jobman.Application()
        with replaced_environment({
                **self.environment, "JOBMAN_OPEN": "1",
                "JOBMAN_DB": self.path("wsgi.db"), **variables}):
            first = self.call("/get/0", application)
        self.addCleanup(application.close)
        return application, first

    def poll(self, application):
        """Make a long poll in the background; return its future answer."""
        pool = concurrent.futures.ThreadPoolExecutor(1)
        self.addCleanup(pool.shutdown)
        return pool.submit(
            self.call, "/get/0", application, QUERY_STRING="wait=60")

    def test_an_application_opens_at_its_first_call_and_after_its_end(self):
        self.assertIsNone(jobman.application.store)
        application, first = self.open()
        self.assertEqual(("200 OK", b'"nada"'), first)
        self.assertTrue(os.path.exists(self.path("wsgi.db")))
        kept = application.store
        self.call("/get/0", application)
        self.assertIs(kept, application.store)
        application.close()
        with replaced_environment({
                **self.environment, "JOBMAN_OPEN": "1",
                "JOBMAN_DB": self.path("wsgi.db")}):
            self.assertEqual(first, self.call("/get/0", application))

    def test_an_applications_long_polls_leave_threads_for_others(self):
        application, _ = self.open()
        queue = application.store.wait_queue
        polls = [self.poll(application) for _ in range(2)]
        wait_for(lambda: queue.waiting == 2, "two long polls")
        reply = self.call("/get/0", application, QUERY_STRING="wait=60")
        self.assertEqual(("200 OK", b'"nada"'), reply)
        queue.close()
        for poll in polls:
            poll.result(PATIENCE)
        application, _ = self.open(JOBMAN_WAITERS="7")
        self.assertEqual(7, application.store.wait_queue.limit)

    def test_an_application_shares_its_database_with_a_server(self):
        database = self.path("wsgi.db")
        _, address = self.serve("--shared", "--db", database, "--open")
        application, _ = self.open()
        poll = self.poll(application)
        wait_for(lambda: application.store.wait_queue.waiting, "a long poll")
        jobs = packed({1: {"jobstage": 0}})
        exchange(address, "POST", "/set", jobs, {"jobix": "7"})
        self.assertIn(b'"jobid": 1,', poll.result(PATIENCE)[1])

    def test_an_application_refuses_what_it_cannot_read(self):
        application, _ = self.open()
        chunks = {"HTTP_TRANSFER_ENCODING": "chunked"}
        for status, environ in (
            (411, {}), (411, chunks), (411, dict(chunks, CONTENT_LENGTH="2")),
            (400, {"CONTENT_LENGTH": "9"}), (400, {"CONTENT_LENGTH": "-9"}),
            (413, {"CONTENT_LENGTH": "99999999"}),
        ):
            self.assertEqual(str(status), self.plain_call(
                application, "/set", io.BytesIO(b"{}"), **environ), environ)
        self.assertEqual("404", self.call("/\xff", application)[0][:3])

    def test_a_body_that_breaks_off_is_no_fault_of_ours(self):
        application, _ = self.open()
        with open(self.path("body"), "wb") as body:  # reading raises OSError
            self.assertEqual("400", self.plain_call(
                application, "/fail_job/1", body, CONTENT_LENGTH="2"))

    def test_an_answer_to_head_has_no_body(self):
        application, _ = self.open()
        environ = {"REQUEST_METHOD": "HEAD", "PATH_INFO": "/health"}
        wsgiref.util.setup_testing_defaults(environ)
        self.assertEqual([b""], application(environ, lambda *_: None))

    def test_an_application_admits_one_jobix_alone_unless_open(self):
        for variables, status in (
            ({}, "403"), ({"JOBMAN_OPEN": "0"}, "403"),
            ({"JOBMAN_JOBIX": "8"}, "403"), ({"JOBMAN_JOBIX": " 7\n"}, "200"),
            ({"JOBMAN_OPEN": "1"}, "200"),
        ):
            application, first = self.open(**{"JOBMAN_OPEN": "", **variables})
            self.assertEqual(status, first[0][:3], variables)
            application.close()

    def test_an_application_that_has_a_url_writes_an_access_file(self):
        path = self.path("access.json")
        application, _ = self.open(
            JOBMAN_OPEN="", JOBMAN_URL="http://here:80/jobs",
            JOBMAN_ACCESS=path)
        self.assertEqual(
            ("http://here:80/jobs", application.store.jobix, None),
            worker.read_access(path))

    def test_an_application_that_cannot_start_is_503_and_logs_why(self):
        with open(self.path("odd.db"), "w") as file:
            file.write("no database " * 100)
        for variables, reason in (
            ({"JOBMAN_JOBIX": "7x"}, "JOBMAN_JOBIX must contain a number"),
            ({"JOBMAN_WAITERS": "many"}, "JOBMAN_WAITERS"),
            ({"JOBMAN_DB": self.path("odd.db")}, "odd.db"),
        ):
            with contextlib.redirect_stderr(io.StringIO()) as log:
                _, (status, body) = self.open(**variables)
            self.assertEqual("503 Service Unavailable", status)
            self.assertIn(reason, log.getvalue())
            self.assertNotIn("7x", log.getvalue())
            self.assertNotIn(b"odd.db", body)


@contextlib.contextmanager
def replaced_environment(environment):
    """Let os.environ be `environment` for a while."""
    kept = dict(os.environ)
    os.environ.clear()
    os.environ.update(environment)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(kept)


# ------------------------------------------------------------------ load ---


class Emptier(threading.Thread):
    """A client that claims and updates until nothing is left."""

    def __init__(self, address, fresh=False):
        super().__init__(daemon=True)
        self.address = address
        self.fresh = fresh  # a new connection for each request
        self.claimed = []  # jobs whose claim was answered
        self.updated = []  # jobs whose update was answered
        self.error = None

    def run(self):
        try:
            self.connection = http.client.HTTPConnection(
                *self.address, timeout=PATIENCE
            )
            while self.step():
                pass
        except (OSError, http.client.HTTPException) as error:
            self.error = error
        finally:
            self.connection.close()

    def step(self):
        job = self.ask("/get/0?lease=600")
        if job == "nada":
            return False
        self.claimed.append(job["jobid"])
        self.ask("/update_job/%(jobid)d/2?claim=%(claim)s" % job)
        self.updated.append(job["jobid"])
        return True

    def ask(self, path):
        if self.fresh:
            self.connection.close()
        self.connection.request("GET", path, headers={"jobix": "4711"})
        response = self.connection.getresponse()
        text = response.read().decode()
        if response.status != 200:
            raise OSError("%d %s" % (response.status, text))
        return json.loads(text) if text[0] in '{"' else text


def empty(*addresses, clients=16, fresh=False):
    """Let clients empty the queue behind `addresses`; return them."""
    emptiers = [
        Emptier(addresses[i % len(addresses)], fresh=fresh)
        for i in range(clients)
    ]
    for emptier in emptiers:
        emptier.start()
    for emptier in emptiers:
        emptier.join(PATIENCE * 2)
    return emptiers


class LoadTest(StoreCase):
    """Many clients at once, over real sockets."""

    JOBS = 400

    def assertEachOnce(self, emptiers):
        self.assertEqual([None] * 16, [each.error for each in emptiers])
        self.assertEqual(list(range(self.JOBS)), sorted(
            jobid for each in emptiers for jobid in each.claimed))
        found = rows(self.path("jobs.db"), "select stage from job")
        self.assertEqual([{"stage": 2}] * self.JOBS, found)
        self.assertCounts()

    def test_16_clients_get_every_job_exactly_once(self):
        for fresh in (False, True):
            with self.subTest(new_connections=fresh):
                self.set_jobs(range(self.JOBS), laststage=2)
                self.assertEachOnce(empty(self.address, fresh=fresh))
                self.ok("/forget", {"all": True})

    def test_two_processes_hand_out_every_job_once(self):
        self.set_jobs(range(self.JOBS))
        self.closing.close()
        addresses = [self.serve(
            "--db", self.path("jobs.db"), "--shared",
            "--access", self.path("access%d" % i))[1] for i in range(2)]
        emptiers = empty(*addresses)
        self.assertEachOnce(emptiers)
        for address in addresses:
            self.assertTrue(any(
                each.claimed for each in emptiers if each.address == address))

    def test_a_full_database_costs_its_commit_and_no_other(self):
        self.set_jobs([1, 2])
        execute = self.store.writer.connection.execute
        pages = execute("pragma page_count").fetchone()[0]
        execute("pragma max_page_count = %d" % pages)
        entries = {
            jobid: {"jobstage": 0, "jobcmd": "x" * 1000}
            for jobid in range(9, 500)}
        self.assertEqual([503, 503, 503], together(
            self.store,
            self.operation("update_jobs", [{"jobid": 1, "stage": 2}]),
            self.operation("add_jobs", *to_add(entries)),
            self.operation("update_jobs", [{"jobid": 2, "stage": 2}]),
        ))
        reply = self.assertReply(503, self.post("/set", entries))
        self.assertEqual("1", reply.headers["retry-after"])
        self.assertEqual({(0, "waiting"): 2}, self.states())
        execute("pragma max_page_count = 1000000")
        self.assertReply(200, self.post("/set", entries))
        self.assertEqual({(0, "waiting"): 493}, self.states())

    def test_a_commit_is_on_disk_before_it_is_answered(self):
        execute = self.store.writer.connection.execute
        self.assertEqual(2, execute("pragma synchronous").fetchone()[0])
        self.assertEqual("wal", execute("pragma journal_mode").fetchone()[0])

    def test_only_what_many_commits_have_written_is_checkpointed(self):
        self.store.writer.CHECKPOINT_AFTER = 400
        path = self.path("jobs.db")
        size = os.path.getsize(path)
        self.set_jobs(dict.fromkeys(range(200), "x" * 5000))  # 1 MB
        self.ok("/status")
        self.assertEqual(size, os.path.getsize(path))
        self.set_jobs(range(200, 600))
        self.assertGreater(os.path.getsize(path), 10**6)

    def locked(self, name):
        """Return whether somebody has a lock on a file."""
        with open(self.path(name)) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False

    def shared(self):
        """Return a Store of a database that may have others."""
        store = jobman.Store(self.path("shared.db"), shared=True)
        self.addCleanup(lambda: store.writer.closed or store.close())
        return store

    def test_a_process_that_waits_for_its_turn_keeps_the_gate(self):
        store = self.shared()
        for act in (lambda: store.init(store.namespace, [0]), store.close):
            with open(self.path("shared.db.turn")) as turn:
                fcntl.flock(turn, fcntl.LOCK_EX)
                thread = threading.Thread(target=act, daemon=True)
                thread.start()
                wait_for(lambda: self.locked("shared.db.gate"), "the gate")
                self.assertTrue(thread.is_alive())
            thread.join(PATIENCE)
            self.assertFalse(thread.is_alive())

    def test_a_closed_store_takes_no_change(self):
        store = self.shared()
        store.close()
        with self.assertRaisesRegex(jobman.Unavailable, "it is ending"):
            store.add_jobs(store.namespace, *to_add({}))

    def test_an_end_waits_for_the_commit_on_its_way(self):
        store, begun, go = self.shared(), threading.Event(), threading.Event()

        def slow(tx):
            store.insert_jobs(
                tx, store.namespace, *to_add({1: {"jobstage": 0}}))
            begun.set()
            go.wait(PATIENCE)

        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            commit = pool.submit(store.writer.run, slow)
            begun.wait(PATIENCE)
            end = pool.submit(store.close)
            wait_for(lambda: store.writer.closed, "the end")
            self.assertFalse(end.done())
            go.set()
            self.assertEqual([None] * 2, [commit.result(), end.result()])
        found = rows(self.path("shared.db"), "select jobid from job")
        self.assertEqual([{"jobid": 1}], found)


class TogetherTest(StoreCase):
    """Operations that share a commit see what those before them did."""

    LENT = {"worker": None, "lease": 60}

    def setUp(self):
        super().setUp()
        self.ran = Counter()

    def do(self, name, *args, **named):
        """Return an operation of the Store that counts how often it ran."""
        operation = self.operation(name, *args, **named)

        def counted(tx):
            self.ran[name] += 1
            return operation(tx)

        return counted

    def update(self, jobid, stage, **more):
        """Return an operation that updates a job, or is refused."""
        update = self.do(
            "update_jobs", [dict(more, jobid=jobid, stage=stage)])

        def act(tx):
            error, = update(tx)
            if error:
                raise error

        return act

    def claim(self, *stages, **options):
        """Return an operation that claims jobs and returns their ids."""
        claim = self.do("claim", stages, **dict(self.LENT, **options))
        return lambda tx: [job["jobid"] for job in claim(tx)]

    def sweep(self, act, *ids):
        """Return an operation on jobs in any state."""
        step = self.do("step", getattr(self.store, act), ids, 0,
                       jobman.STATES)
        return lambda tx: step(tx)[0]

    def commit(self, *operations):
        """Run operations in one commit; return their results or statuses."""
        outcomes = together(self.store, *operations)
        self.assertCounts()
        return outcomes

    def lend(self, **options):
        """Claim a job in a commit of its own; return it."""
        job, = self.store.claim(
            self.namespace, [0], **dict(self.LENT, **options))
        return job

    def test_a_job_is_moved_again_and_again(self):
        self.set_jobs([1])
        self.assertEqual(
            [None, [1], None, [1], {"jobid": 1, "state": "waiting"}, [1]],
            self.commit(
                self.update(1, 2), self.claim(2),
                self.update(1, 5), self.claim(5),
                self.do("release_job", 1), self.claim(5, lease=None)))
        self.assertEqual({(6, "working"): 1}, self.states())
        self.assertEqual([("done", 2, 5), ("released", 5, None)],
                         self.attempts("outcome", "stage", "target"))

    def test_an_update_that_is_in_a_list_twice_is_done_once(self):
        self.set_jobs(range(100))
        jobs = [self.lend() for _ in range(40)]
        updates = [
            dict(jobid=job["jobid"], stage=2, claim=job["claim"])
            for job in jobs]
        updates[25:25] = updates[20:25]  # the same: 200
        updates[10]["stage"] = 6
        updates[12] = dict(updates[10], stage=7)  # another: 409
        updates += [dict(jobid=5, stage=3), dict(jobid=500, stage=3)]
        errors = self.store.update_jobs(self.namespace, updates)
        self.assertEqual({12: 409, 46: 404}, {
            i: error.status for i, error in enumerate(errors) if error})
        self.assertEqual(
            {(0, "waiting"): 60, (1, "working"): 1, (2, "waiting"): 37,
             (3, "waiting"): 1, (6, "waiting"): 1}, self.states())
        self.assertEqual(39, len(self.attempts("id")))

    def test_each_claim_takes_what_the_operations_before_it_left(self):
        self.set_jobs(range(10, 20))
        self.set_jobs([1], stage=5)
        self.set_jobs([2])
        self.assertEqual(2, self.lend()["jobid"])
        first = to_add({3: {"jobstage": 0, "priority": 2}})
        outcomes = self.commit(
            self.claim(0),
            self.update(1, 0), self.claim(0),
            self.do("add_jobs", *first), self.claim(0),
            self.do("release_job", 2), self.claim(0),
            self.sweep("cancel_one", 2), self.claim(0, n=2),
            self.sweep("retry_one", 2), self.claim(0),
            self.sweep("cancel_one", 13, 14), self.claim(0),
            self.do("pause", 0, paused=True), self.claim(0),
            self.do("pause", 0, paused=False), self.claim(0, n=9))
        self.assertEqual([[10], [1], [3], [2], [11, 12], [2], [15], [],
                          [16, 17, 18, 19]], outcomes[::2])

    def test_a_claim_without_a_lease_is_free_until_it_has_one(self):
        self.set_jobs([1, 2, 3])
        bare = self.lend(lease=None, target=0)
        again = self.claim(0, target=0, lease=None)
        self.assertEqual([[1], [1, 2]], self.commit(again, self.claim(0, n=2)))
        self.assertEqual(["superseded"] * 2,
                         [outcome for outcome, in self.attempts("outcome")])
        bare = self.lend(lease=None, target=0)
        beat = dict(claims=[(3, bare["claim"])], lease=60,
                    worker=jobman.read_worker({"worker": "w"}))
        self.assertEqual([3], self.commit(
            self.claim(0, target=0, lease=None),
            self.do("heartbeat", **beat), self.claim(0))[2])

    def test_an_operation_that_is_refused_costs_no_other_a_second_run(self):
        self.set_jobs(range(8))
        jobs = [self.lend() for _ in range(3)]
        outcomes = self.commit(
            self.claim(0), self.update(99, 1),
            self.update(3, 2, claim="another"),
            self.claim(0), self.do("fail_job", 6),
            self.update(1, 2, claim=jobs[1]["claim"]))
        self.assertEqual([[3], 404, 409, [4], 409, None], outcomes)
        self.assertEqual(
            {"claim": 2, "update_jobs": 3, "fail_job": 1}, self.ran)
        self.assertEqual({(0, "waiting"): 3, (1, "working"): 4,
                          (2, "waiting"): 1}, self.states())

    def test_an_operation_that_fails_half_done_is_taken_back(self):
        self.set_jobs(range(5))
        half = self.update(3, 9)

        def failing(error):
            def act(tx):
                half(tx)
                raise error
            return act

        fault = KeyError("a fault")
        outcomes = self.commit(
            self.claim(0), failing(jobman.Error(409, "No.")),
            self.update(1, 2), failing(fault), self.claim(0))
        self.assertEqual([[0], 409, None, fault, [2]], outcomes)
        self.assertEqual({(0, "waiting"): 2, (1, "working"): 2,
                          (2, "waiting"): 1}, self.states())

    def test_a_fault_at_the_end_of_a_commit_costs_all_of_it(self):
        self.set_jobs([1, 2])
        writer = self.store.writer
        finish = writer.finish
        for fault in (KeyError("a fault"), sqlite3.OperationalError("full")):
            def spoil(tx, fault=fault):
                raise fault

            writer.finish = spoil
            with self.assertRaises((KeyError, jobman.Unavailable)) as caught:
                writer.run(self.update(1, 2))
            writer.finish = finish
            self.assertIn(str(fault), str(caught.exception))
            self.assertEqual({(0, "waiting"): 2}, self.states())
        self.assertEqual([None], self.commit(self.update(1, 2)))

    def test_a_job_that_somebody_else_has_moved_costs_its_commit(self):
        self.set_jobs([1, 2])
        namespace = self.namespace
        for stale in ({"stage": 3}, {"state": "x"}, {"claim": "y"}):
            def move(tx, stale=stale):
                job = dict(self.store.find(tx, namespace, 1), **stale)
                self.store.move(tx, job, stage=5, state="waiting")

            self.assertEqual([503, 503], self.commit(self.update(2, 3), move))
        self.assertEqual({(0, "waiting"): 2}, self.states())

    def test_a_parent_that_is_done_for_a_moment_holds_up_no_child(self):
        for jobid, acts, state in (
            (1, ["retry_one"], "waiting"),
            (11, ["retry_one", "cancel_one"], "cancelled"),
        ):
            self.set_jobs([jobid], laststage=2, priority=1)
            self.set_jobs([jobid + 1], after=[jobid])
            self.assertEqual(jobid, self.lend()["jobid"])
            self.assertEqual([None] + [1] * len(acts), self.commit(
                self.update(jobid, 2),
                *(self.sweep(act, jobid) for act in acts)))
            self.assertEqual([state, "waiting"], [
                self.ok("/job/%d" % each)["state"]
                for each in (jobid, jobid + 1)])
            self.ok("/cancel", {"all": True})

    def test_children_are_told_in_the_commit_that_ends_their_parent(self):
        self.set_jobs([1], laststage=2)
        self.set_jobs([2], after=[1])
        self.assertEqual([None, []], self.commit(
            self.update(1, 2), self.claim(0)))
        self.assertEqual([[2]], self.commit(self.claim(0)))


class Crowd:
    """Many clients, each in a thread with a connection that it keeps.

    Idle ones wait in long polls until each has a job of stage 5. Working
    ones claim jobs of stage 0 and put them back there, until told to stop.
    """

    def __init__(self, address, jobix, idle=0, working=0):
        self.address, self.headers = tuple(address), {"jobix": str(jobix)}
        self.going = True
        self.times = []  # that answers took, beside what they may wait
        self.updated = []  # tokens of updates that were answered
        self.jobs = []  # that the idle ones got
        self.faults = []
        acts = [self.long_poll] * idle + [self.work] * working
        self.threads = [threading.Thread(target=self.client, args=(act,))
                        for act in acts]

    def client(self, act):
        connection = http.client.HTTPConnection(*self.address, timeout=90)
        try:
            act(functools.partial(self.ask, connection))
        except EOFError:
            pass  # the server has ended
        except (OSError, http.client.HTTPException, ValueError) as error:
            self.faults.append(repr(error))
        connection.close()

    def ask(self, connection, path, wait=0):
        """Make a call; return its answer. EOFError: it was the last one."""
        asked = time.monotonic()
        connection.request("GET", path, headers=self.headers)
        reply = Reply(connection.getresponse())
        took = time.monotonic() - asked
        self.times.append(max(took - wait, 0))
        closes = reply.headers.get("connection") == "close"
        if reply.status != 200 or (
                reply.text == '"nada"' and took < wait - 0.1 and not closes):
            raise ValueError("%s after %.1f s" % (reply.text, took))
        if path.startswith("/update"):
            self.updated.append(path.partition("claim=")[2])
        if closes:
            raise EOFError
        return reply.text

    def long_poll(self, ask):
        job = '"nada"'
        while job == '"nada"':
            wait = random.randint(5, 60)
            job = ask("/get/5?lease=600&wait=%d" % wait, wait)
        self.jobs.append(json.loads(job)["jobid"])

    def work(self, ask):
        while self.going:
            job = ask("/get/0?lease=600")
            if job != '"nada"':
                ask("/update_job/%(jobid)d/0?claim=%(claim)s"
                    % json.loads(job))

    def run(self):
        """Call until all is over, or standard input is closed."""
        for thread in self.threads:
            thread.start()
        print("ready", flush=True)
        sys.stdin.read()
        self.going = False
        for thread in self.threads:
            thread.join()
        print(json.dumps({
            "times": sorted(self.times), "updated": self.updated,
            "jobs": self.jobs, "faults": self.faults,
            "over": time.monotonic()}))


class CrowdCase(TemporaryFolder):
    """A server, and crowds of clients in processes of their own."""

    open_to_all = True
    FEW_FILES = changed(
        "jobman", "import resource\nresource.setrlimit(resource.RLIMIT_NOFILE,"
        " (1024, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))")

    def start(self, clients):
        """Start a server for so many clients."""
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        if 0 <= most < clients + 500:
            self.skipTest("a process may open %d files at most" % most)
        self.server, self.address = self.serve(
            "--db", self.db, start=self.FEW_FILES)

    def set_jobs(self, first, n, stage):
        """Add jobs."""
        jobs = {i: {"jobstage": stage} for i in range(first, first + n)}
        reply = exchange(self.address, "POST", "/set", packed(jobs),
                         {"jobix": "4711"})
        self.assertEqual(200, reply.status, reply.text)

    def crowd(self, **options):
        """Start a Crowd in a process of its own."""
        code = "import json, sys; sys.path.insert(0, %r)\n" \
            "import jobman, test_jobman; jobman.raise_file_limit()\n" \
            "test_jobman.Crowd(**json.loads(sys.argv[1])).run()" % HERE
        options.update(address=self.address, jobix=4711)
        crowd = self.spawn("-c", code, json.dumps(options),
                           stdin=subprocess.PIPE)
        self.assertEqual(b"ready\n", crowd.stdout.readline())
        return crowd

    def report(self, crowd):
        """Return what a crowd saw that ends now."""
        status, out, err = self.finish(crowd)
        self.assertEqual((0, ""), (status, err))
        report = json.loads(out)
        self.assertEqual([], report["faults"][:5])
        return report


@long
class IdleTest(CrowdCase):
    """Thousands of long polls, and two hundred clients that work."""

    IDLE, WORKING, SECONDS = 2000, 200, 60
    POLLS = 9000  # without others
    SLOWEST = 5  # seconds

    def begin(self, idle, working=0):
        """Start a server and crowds; return these when all are there."""
        self.db = self.path("%d.db" % idle)
        self.start((idle + working) * 5 // 4)
        self.set_jobs(0, 1000, 0)
        crowds = [self.crowd(idle=idle)]
        if working:
            crowds.append(self.crowd(working=working))
        files = "/proc/%d/fd" % self.server.pid
        wait_for(lambda: len(os.listdir(files)) > idle + working,
                 "a connection for each")
        return crowds

    def assertUpdated(self, tokens):
        """Assert that these updates are in the database, and no others."""
        done = [row["claim"] for row in rows(
            self.db, "select claim from attempt where outcome = 'done'")]
        self.assertEqual(sorted(tokens), sorted(done))

    def test_none_is_refused_or_waits_for_long(self):
        idle, working = self.begin(self.IDLE, self.WORKING)
        time.sleep(self.SECONDS)
        began = time.monotonic()
        self.set_jobs(10**6, self.IDLE, 5)
        idle = self.report(idle)
        woken = idle["over"] - began
        work = self.report(working)
        self.assertEqual(list(range(10**6, 10**6 + self.IDLE)),
                         sorted(idle["jobs"]))
        self.assertUpdated(work["updated"])
        times = work["times"]
        print("%d calls of %d clients beside %d long polls: the slowest took"
              " %.3f s, 99 of 100 %.3f s; all long polls had a job in %.1f s"
              % (len(times), self.WORKING, self.IDLE, times[-1],
                 times[len(times) * 99 // 100], woken), file=sys.stderr)
        self.assertLess(max(times[-1], idle["times"][-1]), self.SLOWEST)
        self.assertLess(woken, self.SLOWEST * 2)

    def test_a_signal_to_end_cuts_no_request(self):
        for idle, working in ((self.IDLE, self.WORKING), (self.POLLS, 0)):
            with self.subTest(polls=idle, clients=working):
                crowds = self.begin(idle, working)
                time.sleep(2)
                self.assertLess(most_memory(self.server), 2**27 + 60000 * idle)
                self.server.terminate()
                status, _, err = self.finish(self.server)
                self.assertEqual((0, ""), (status, err))
                reports = [self.report(crowd) for crowd in crowds]
                self.assertEqual([], reports[0]["jobs"])
                self.assertGreaterEqual(len(reports[0]["times"]), idle)
                if working:
                    self.assertUpdated(reports[1]["updated"])


class CostTest(StoreCase):
    """What an operation costs doesn't depend on how many jobs there are."""

    def setUp(self):
        self.addCleanup(setattr, jobman.Store, "TICK", jobman.Store.TICK)
        jobman.Store.TICK = {False: 1000}  # none comes between
        super().setUp()
        self.keys = map(str, itertools.count())  # of submissions

    PAGES = {
        "jobs": dict(order="id", after=None, stage=None, state=None),
        "jobs later": dict(order="id", after=10**6 + 50, stage=None,
                           state=None),
        "jobs in a state": dict(order="id", after=None, stage=0,
                                state="working"),
        "expired jobs": dict(order="id", after=None, stage=0,
                             state="expired"),
        "jobs by time": dict(order="time", after=None, stage=None,
                             state=None),
        "jobs by time later": dict(order="time", stage=0, state="waiting",
                                   after=(1.6e9, 10**6 + 50)),
    }

    def costs(self):
        """Return the steps of each of the everyday operations."""
        lent = {"worker": "w", "lease": 60}
        space, store = self.namespace, self.store
        job, failing = store.claim(space, [0], n=2, **lent)
        update = dict(jobid=job["jobid"], stage=2, claim=job["claim"])
        entry = jobman.read_jobs([{"jobstage": 4}])
        store.status(space)  # so that a reader is open
        acts = {
            "claim": lambda: self.assertEqual(
                1, len(store.claim(space, [0], **lent))),
            "miss": lambda: self.assertEqual(
                [], store.claim(space, [500], **lent)),
            "update": lambda: self.assertEqual(
                [None], store.update_jobs(space, [update])),
            "failure": lambda: store.fail_job(
                space, failing["jobid"], claim=failing["claim"]),
            "submit": lambda: store.submit(
                space, [(next(self.keys), 0, 1)], entry),
            "status": lambda: self.assertTrue(
                store.status(space)["totals"]["jobs"]),
            "check_stages": lambda: store.check_stages(space),
            "move_expired": lambda: store.move_expired(space, 0, 2),
            "tick": store.tick,
            "heartbeat": lambda: store.heartbeat(
                space, claims=[(job["jobid"], "x")], lease=60,
                worker=jobman.read_worker({"worker": "w"})),
            "job": lambda: self.assertTrue(store.job(space, job["jobid"])),
            "failures": lambda: store.failures(space),
            "metrics": store.metrics,
            **{
                name: functools.partial(store.jobs, space, limit=10, **page)
                for name, page in self.PAGES.items()
            },
        }
        return {name: self.steps(act) for name, act in acts.items()}

    def test_30000_jobs_cost_what_100_cost(self):
        self.ok("/init/100/100/0/0/0/0")
        self.set_jobs(range(10**6, 10**6 + 100))
        few = self.costs()
        jobs = {
            jobid: {"jobstage": stage}
            for stage in (0, 2) for jobid in
            range(10**6 * (stage + 2), 10**6 * (stage + 2) + 15000)
        }
        self.store.add_jobs(self.namespace, *to_add(jobs))
        self.assertEqual(15097, self.store.status(self.namespace)[
            "stages"][0]["states"]["waiting"])
        many = self.costs()
        for name in few:
            self.assertLess(
                many[name], few[name] * 1.2 + 50, (name, few, many))

    def test_a_page_of_a_stage_by_id_costs_a_few_steps_for_each_job(self):
        page = dict(order="id", after=None, stage=0, state=None, limit=10)
        space, costs = self.namespace, []
        for n in (500, 1500):
            self.set_jobs(range(n))
            self.store.status(space)  # so that a reader is open
            costs.append(self.steps(lambda: self.store.jobs(space, **page)))
        self.assertLess((costs[1] - costs[0]) / 1000, 40, costs)

    def test_jobs_that_cannot_be_claimed_cost_a_claim_nothing(self):
        self.set_jobs(range(6000), max_attempts=1)
        few = self.costs()["claim"]
        self.get(0, n=1500, lease=1000)
        namespace = self.namespace
        for job in self.get(0, n=500):
            self.store.fail_job(namespace, job["jobid"])
        self.ok("/cancel", {"ids": list(range(2500, 4000))})
        self.assertLess(self.costs()["claim"], few * 1.2 + 50)

    def test_many_updates_to_stages_too_many_cost_one_look_at_them(self):
        self.set_jobs([1])
        self.assertReply(200, self.post("/set", {
            i: {"jobstage": i} for i in range(1001, 2000)}))
        costs = []
        for n in (1, 100):
            updates = [dict(jobid=1, stage=5000 + i) for i in range(n)]
            costs.append(self.steps(functools.partial(
                self.store.update_jobs, self.namespace, updates)))
        self.assertLess((costs[1] - costs[0]) / 99, 60, costs)

    def test_1000_stages_cost_a_set_little_and_a_tick_no_statement(self):
        costs, statements = [], []
        connection = self.store.writer.connection
        for stages in (1, 1000):
            self.jobix += 1
            jobs = to_add({i: {"jobstage": i % stages} for i in range(10000)})
            costs.append(self.steps(functools.partial(
                self.store.add_jobs, self.namespace, *jobs)))
            self.ok("/stages", {i: {"minutes": 1} for i in range(stages)})
            seen = Counter()
            connection.set_trace_callback(lambda sql, n=seen: n.update([sql]))
            self.store.tick()
            connection.set_trace_callback(None)
            statements.append(sum(seen.values()))
        self.assertLess(costs[1], costs[0] * 1.5)
        self.assertEqual(statements[0], statements[1])

    def test_1000_stages_cost_a_claim_and_an_update_nothing(self):
        self.set_jobs(range(500), laststage=4)
        few = self.costs()
        self.assertReply(200, self.post("/set", {
            i: {"jobstage": i} for i in range(1004, 1990)}))
        many = self.costs()
        for name in ("claim", "miss", "update", "failure", "submit"):
            self.assertLess(many[name], few[name] * 1.2 + 50, name)

    PIECES = ("STATE", "ANY_JOB", "WHOLE_JOB", "STAGES_JOBS", "NEW_JOB",
              "GROUP", "WHOLE", "PLACES", "FITS")
    RARE = "UNFINISHED_PARENTS",  # at a start

    def statements(self):
        """Return the statements, by their names."""
        sql = jobman.SQL
        found = {name: text for name, text in vars(sql).items()
                 if name.isupper() and name not in self.PIECES}
        for source, order in itertools.product(("WHOLE", "GROUP"), sql.PLACES):
            if (source, order[-4:]) != ("WHOLE", "time"):
                found["%s by %s" % (source, order)] = jobman.page_sql(
                    getattr(sql, source), order)
        found["ADD_JOBS"] += sql.NEW_JOB
        self.assertGreater(len(found), 60)
        return found

    def test_no_statement_walks_over_all_jobs(self):
        walk = re.compile("SCAN (TABLE )?(job|attempt|other|dependency)\\b")
        for name, sql in self.statements().items():
            values = dict.fromkeys(re.findall(r":(\w+)", sql), 1)
            plan = [row["detail"] for row in
                    self.store.writer.connection.execute(
                        "explain query plan " + sql,
                        values or [1] * sql.count("?"))]
            with self.subTest(statement=name, plan=plan):
                self.assertEqual(name in self.RARE,
                                 any(map(walk.match, plan)))


# --------------------------------------------------------------- crashes ---


class Witness:
    """A client in a namespace of its own, which knows all that is there.

    `jobs` has what the jobs are by the answers: {jobid: {...}}. A call that
    isn't answered has happened as a whole, or not at all: then they are what
    `perhaps` says, or still the same.
    """

    LEASE = 600  # and a second longer with each heartbeat
    NEW = {"stage": 0, "state": "waiting", "filename": None, "lease": None,
           "ends": ()}

    def __init__(self, number, seed, padding=0):
        self.jobix = 5000 + number
        self.random = random.Random("%s %d" % (seed, number))
        self.padding = padding
        self.jobs, self.perhaps = {}, {}
        self.tokens = {}  # of the jobs that it holds
        self.beats = self.answers = self.refused = 0
        self.trouble = None  # what should not have been answered
        self.ending = threading.Event()

    def work(self, address):
        """Do this and that, until the server is gone or it should end."""
        self.connection = http.client.HTTPConnection(
            *address, timeout=PATIENCE)
        acts = [self.look, self.add, self.submit, self.beat, self.cancel,
                self.retry, self.update_many, self.fail, self.release,
                *[self.claim] * 3, *[self.update] * 3]
        try:
            while not self.ending.is_set():
                self.random.choice(acts)()
        except socket.timeout as trouble:
            self.trouble = trouble
        except (OSError, http.client.HTTPException):
            pass  # the call stays unanswered
        except BaseException as trouble:
            self.trouble = trouble
        finally:
            self.connection.close()

    def ask(self, path, value=None, changes=()):
        """Make a call that changes jobs; return its answer, None for 503."""
        self.perhaps = {**self.jobs, **dict(changes)}
        if self.jobix % 2:
            self.connection.close()  # half of us connect for each call
        self.connection.request(
            "GET" if value is None else "POST", path,
            None if value is None else packed(value),
            {"jobix": str(self.jobix)})
        reply = Reply(self.connection.getresponse())
        if reply.status == 503 and reply.headers["retry-after"] == "1":
            self.perhaps = self.jobs
            self.refused += 1
            return None
        if reply.status != 200:
            raise AssertionError("%s: %s" % (path, reply.text))
        self.jobs = self.perhaps
        self.answers += 1
        return reply

    def some(self, most, *states):
        """Return the ids of up to `most` jobs in these states."""
        ids = [i for i, job in self.jobs.items() if job["state"] in states]
        return self.random.sample(
            ids, min(len(ids), self.random.randint(1, most)))

    def changed(self, jobid, end=None, **values):
        """Return a job after a change, which ends an attempt."""
        job = self.jobs[jobid]
        ends = job["ends"] + ((end,) if end else ())
        return jobid, dict(job, ends=ends, **values)

    def given_up(self, jobid, end, state):
        """Return a job after an attempt that brought it no further."""
        return self.changed(
            jobid, end, state=state, lease=None,
            stage=self.jobs[jobid]["stage"] - 1)

    def look(self):
        """Read, which works also on a full disk."""
        kept, self.perhaps = self.refused, self.jobs
        self.ask(self.random.choice(["/status", "/jobs?limit=20"]))
        if self.refused > kept:
            raise AssertionError("a read was refused")

    def entries(self):
        """Return new jobs, as they are sent and as they are then."""
        n = self.random.choice([1, 2, 3] if self.padding else [1, 3, 20])
        first = max(self.jobs, default=0) + 1
        entry = {"jobcmd": "x" * self.padding, "jobstage": 0, "laststage": 4}
        return [entry] * n, {first + i: self.NEW for i in range(n)}

    def add(self):
        entries, jobs = self.entries()
        self.ask("/set", dict(zip(jobs, entries)), jobs.items())

    def submit(self):
        entries, jobs = self.entries()
        reply = self.ask("/submit", {"key": "k%d" % min(jobs),
                                     "jobs": entries}, jobs.items())
        if reply and reply.json()["ids"] != list(jobs):
            raise AssertionError("other ids: " + reply.text)

    def claim(self):
        stage, n = self.random.choice([0, 2]), self.random.choice([1, 2, 5])
        lease = self.LEASE + self.beats
        ids = [i for i, job in sorted(self.jobs.items()) if (
            job["state"], job["stage"]) == ("waiting", stage)][:n]
        reply = self.ask("/get/%d?n=%d&lease=%d" % (stage, n, lease), None, [
            self.changed(i, state="working", stage=stage + 1, lease=lease)
            for i in ids])
        if reply:
            claims = {job["jobid"]: job["claim"] for job in reply.json()}
            if list(claims) != ids:
                raise AssertionError("other jobs: " + reply.text)
            self.tokens.update(claims)

    def result(self, jobid):
        """Return what an update says of a job, and what it is then."""
        job, token = self.jobs[jobid], self.tokens[jobid]
        stage, filename = job["stage"] + 1, job["filename"] or token
        update = {"jobid": jobid, "jobstage": stage, "claim": token,
                  "filename": filename}
        return update, self.changed(
            jobid, "done", state="waiting" if stage < 4 else "done",
            stage=stage, filename=filename, lease=None)

    def update(self):
        for jobid in self.some(1, "working"):
            update, job = self.result(jobid)
            self.ask("/update_job/%(jobid)d/%(jobstage)d?claim=%(claim)s"
                     % update, {"filename": update["filename"]}, [job])

    def update_many(self):
        results = [self.result(i) for i in self.some(5, "working")]
        if results:
            updates, jobs = zip(*results)
            self.ask("/update_jobs", updates, jobs)

    def fail(self):
        for i in self.some(1, "working"):
            self.ask("/fail_job/%d?claim=%s" % (i, self.tokens[i]), {},
                     [self.given_up(i, "failed", "delayed")])

    def release(self):
        for i in self.some(1, "working"):
            self.ask("/release_job/%d?claim=%s" % (i, self.tokens[i]), {},
                     [self.given_up(i, "released", "waiting")])

    def cancel(self):
        ids = self.some(3, "working")
        if ids:
            self.ask("/cancel", {"ids": ids}, [
                self.given_up(i, "cancelled", "cancelled") for i in ids])

    def retry(self):
        ids = self.some(3, "cancelled", "done")
        if ids:
            self.ask("/retry", {"ids": ids}, [self.changed(
                i, state="waiting", stage=min(self.jobs[i]["stage"], 2))
                for i in ids])

    def beat(self):
        """Renew all leases."""
        self.beats += 1
        ids = [i for i in self.jobs if self.jobs[i]["state"] == "working"]
        lease = self.LEASE + self.beats
        reply = self.ask("/heartbeat", {
            "worker": "w", "lease": lease,
            "claims": [[i, self.tokens[i]] for i in ids]},
            [self.changed(i, lease=lease) for i in ids])
        if reply and reply.json()["lost"]:
            raise AssertionError("lost: " + reply.text)

    def read(self, execute):
        """Take the jobs and tokens of a database, after an end."""
        found = {}
        for row in execute(
                "select * from job where namespace = (select id from namespace"
                " where jobix = ?) order by jobid", (self.jobix,)):
            job = {name: row[name] for name in self.NEW if name != "ends"}
            job["filename"] = json.loads(job["filename"] or "null")
            job["ends"] = tuple(end for end, in execute(
                "select outcome from attempt where job = ? order by id",
                (row["id"],)))
            if row["claim"]:
                self.tokens[row["jobid"]] = row["claim"]
            if len(json.loads(row["jobcmd"])) != self.padding:
                raise AssertionError("another command")
            found[row["jobid"]] = job
        return found


class CrashCase(SeededCase):
    """A server that may end at any moment, and what it has answered."""

    open_to_all = True
    WITNESSES = 16

    def begin(self, folder, **options):
        """Begin a new database in a folder, with new witnesses."""
        self.db = os.path.join(folder, "jobs.db")
        self.witnesses = [
            Witness(n, self.random.random(), **options)
            for n in range(self.WITNESSES)
        ]

    def start(self, changes=""):
        """Start the server, in which failed jobs wait for ever."""
        delay = "jobman.delay_after = lambda failures: 1e6\n"
        self.started = time.time()
        self.server, self.address = self.serve(
            "--db", self.db, start=changed("jobman", delay + changes))

    def set_to_work(self):
        """Let the witnesses call the server, each in a thread."""
        self.threads = []
        for witness in self.witnesses:
            witness.ending.clear()
            thread = threading.Thread(
                target=witness.work, args=(self.address,), daemon=True)
            thread.start()
            self.threads.append(thread)

    def answers(self):
        """Return how many calls have been answered."""
        return sum(witness.answers for witness in self.witnesses)

    def join(self):
        """Wait for the witnesses; they have seen nothing wrong."""
        for thread in self.threads:
            thread.join(PATIENCE * 2)
            self.assertFalse(thread.is_alive())
        for witness in self.witnesses:
            if witness.trouble:
                raise witness.trouble

    def kill(self):
        """Kill the server; it has said nothing."""
        self.server.kill()
        self.server.wait()
        self.assertEqual(b"", self.server.stderr.read())
        self.reap(self.server)

    def assertSound(self, path):
        """Assert that a database is what `jobman.py check` calls whole."""
        with jobman.open_snapshot(path) as execute:
            self.assertEqual([], faults(execute))

    def assertKept(self, renewed=False):
        """Assert that the database is what the witnesses were told."""
        self.assertSound(self.db)
        with jobman.open_snapshot(self.db) as execute:
            for witness in self.witnesses:
                found = witness.read(execute)
                if found != witness.perhaps:
                    self.assertEqual(witness.jobs, found)
                witness.jobs = witness.perhaps = found
            if renewed:
                first, = execute("select min(expires_at - lease) from job"
                                 " where state = 'working'").fetchone()
                self.assertGreater(first or math.inf, self.started)


# What lets a server kill itself just before its n-th statement, or step with
# a file.
DYING = """
import os, signal
left = [%d]

def step(*_):
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)

def stepping(act):
    return lambda *given: (step(), act(*given))[1]

def connect(*given, connect=jobman.connect, **named):
    connection = connect(*given, **named)
    connection.set_trace_callback(step)
    return connection

jobman.connect = connect
for name in ("open", "replace", "fsync"):
    setattr(os, name, stepping(getattr(os, name)))
"""


@slow
class KillTest(CrashCase):
    """A server that is killed at any moment has kept what it answered."""

    LIVES = 2  # of databases
    KILLS = 4  # in each
    STRIDE = 9  # from one statement to the next that is its last

    def assertBegun(self):
        """Assert that a database that was begun is whole or still empty."""
        try:
            self.assertSound(self.db)
        except jobman.CommandError as trouble:
            self.assertIn("There is no database", str(trouble))
            self.assertEqual(b"", read(self.db))

    def kill_at_work(self, changes):
        """Kill the server under load, or as it ends.

        Look at what it left before the next one starts, or after that.
        """
        self.start(changes)
        self.assertKept(renewed=True)
        self.set_to_work()
        end = self.random.randint(1, 300) + self.answers()
        wait_for(lambda: self.answers() >= end, "so many answers")
        if self.random.random() < 0.2:
            self.server.terminate()
            time.sleep(self.random.uniform(0, 0.2))
        self.kill()
        self.join()
        if self.random.random() < 0.5:
            self.assertKept()

    def live(self):
        """Let a database live through some kills."""
        padding = self.random.choice([0, 0, 3000, 100000])
        folder = self.make_folder()
        self.begin(folder, padding=padding)
        changes = self.random.choice([
            "", "jobman.Writer.CHECKPOINT_AFTER = 1\n",
            "jobman.Writer.CHECKPOINT_AFTER = 50\n",
        ]) + self.random.choice(["", "jobman.Store.TICK = {False: 0.01}\n"])
        for _ in range(self.KILLS):
            self.kill_at_work(changes)
        self.start()
        self.assertKept(renewed=True)
        self.kill()
        shutil.rmtree(folder)

    def dies_at(self, number):
        """Return whether a start has so many steps; it ends there.

        The next one goes on from there.
        """
        self.db = os.path.join(self.make_folder(), "jobs.db")
        process = self.spawn(
            *changed("jobman", DYING % number), "serve", "--port", "0",
            "--db", self.db)
        line = process.stdout.readline()
        self.reap(process)
        self.assertBegun()
        jobman.Store(self.db).close()
        self.assertSound(self.db)
        return not line

    def test_at_each_statement_of_a_start(self):
        number = 1
        while self.dies_at(number):
            number += self.STRIDE
        self.assertGreater(number, 30)  # a start has some 40 of them
        self.wrong = False

    def test_at_any_moment(self):
        for _ in range(self.LIVES):
            self.live()
        self.wrong = False

    def test_with_children_still_to_be_told(self):
        self.begin(self.make_folder())
        jobs = {0: {"jobstage": 0, "laststage": 2}}
        jobs.update(
            (i, {"jobstage": 0, "after": [0]}) for i in range(1, 35))
        for path, value, before, after in (
            ("/set", jobs, "blocked", "blocked"),
            ("/cancel", {"ids": [0]}, "blocked", "aborted"),
            ("/retry", {"ids": [0]}, "aborted", "blocked"),
            ("/update_job/0/2", {}, "blocked", "waiting"),
        ):
            self.start("jobman.CHUNK = 10\n"
                       "jobman.Store.TICK = {False: 1000}\n")
            reply = exchange(self.address, "POST", path, packed(value),
                             {"jobix": "4712"})
            self.assertEqual(200, reply.status, reply.text)
            self.kill()
            self.assertSound(self.db)
            self.assertEqual({before, after}, self.children())
            self.start("jobman.CHUNK = 10\n")  # some are told later
            wait_for(lambda told=after: self.children() == {told}, "all told")
            self.kill()
            self.assertSound(self.db)
        self.wrong = False

    def children(self):
        """Return the states of the jobs that wait for job 0."""
        found = rows(self.db, "select distinct state from job where jobid")
        return {row["state"] for row in found}


@slow
class FullDiskTest(CrashCase):
    """A full disk costs requests, which are told so, and nothing else."""

    WITNESSES = 8
    CHANGES = "jobman.Writer.CHECKPOINT_AFTER = 100\n" \
        "jobman.Store.TICK = {False: 0.02}\n"

    def each(self, name):
        """Wait until a count of each witness has grown."""
        before = [getattr(witness, name) for witness in self.witnesses]

        def grown():
            after = [getattr(witness, name) for witness in self.witnesses]
            return (all(new > old for old, new in zip(before, after))
                    or any(witness.trouble for witness in self.witnesses))

        wait_for(grown, "more that is %s" % name)

    def crowd(self, disk):
        """Fill the disk until each witness has been refused something."""
        self.fill(disk)
        self.each("refused")

    def make_room(self, disk):
        os.unlink(os.path.join(disk, "full"))

    def stop(self):
        """Let the witnesses end, then look at what they were told."""
        for witness in self.witnesses:
            witness.ending.set()
        self.join()
        self.assertKept()

    def go_on(self):
        """See that there is space, and that nobody is refused any more."""
        self.each("answers")
        refused = [witness.refused for witness in self.witnesses]
        self.each("answers")
        self.assertEqual(
            refused, [witness.refused for witness in self.witnesses])
        self.stop()

    def fill_and_make_room(self, disk, times, padding):
        """Fill the disk and make room several times, under load."""
        self.begin(disk, padding=padding)
        self.start(self.CHANGES)
        for _ in range(times):
            self.set_to_work()
            time.sleep(self.random.uniform(0, 0.2))
            self.crowd(disk)
            self.stop()
            self.set_to_work()
            self.each("refused")
            self.make_room(disk)
            self.go_on()
        self.kill()
        self.wrong = False

    def test_when_there_is_space_again_it_goes_on_by_itself(self):
        self.fill_and_make_room(self.small_disk("8m"), 3, 2000)

    def test_it_goes_on_after_changes_too_large_for_memory(self):
        """They meet the end of the disk before their commit."""
        self.fill_and_make_room(self.small_disk("200m"), 1, 400000)

    def test_it_goes_on_when_it_has_filled_the_disk_itself(self):
        disk = self.small_disk("700k")
        self.begin(disk, padding=2000)
        self.start()
        self.set_to_work()
        self.each("refused")
        subprocess.check_call(
            ["mount", "-o", "remount,size=8m", disk])
        self.go_on()
        self.kill()
        self.wrong = False

    def refused(self):
        """Return what a server says that can't start."""
        status, out, err = self.command(
            JOBMAN, "serve", "--port", "0", "--db", self.db)
        self.assertEqual((1, ""), (status, out), err)
        self.assertRegex(err, r"\Ajobman\.py: [^\n]+\.\n\Z")
        return err

    def test_a_server_killed_on_a_full_disk_starts_when_there_is_space(self):
        disk = self.small_disk("8m")
        self.begin(disk, padding=2000)
        for changes in ("", self.CHANGES, self.CHANGES):
            self.start(changes)
            self.assertKept(renewed=True)
            self.set_to_work()
            time.sleep(self.random.uniform(0, 0.2))
            self.crowd(disk)
            self.kill()
            self.join()
            for _ in range(0 if changes else 2):  # there is only the WAL
                self.assertRegex(self.refused(), "full|space")
            self.make_room(disk)
        self.start()
        self.assertKept(renewed=True)
        self.kill()
        self.wrong = False


def wal_end(wal):
    """Return the salts of a WAL and where its last frame of theirs ends.

    Behind it are frames of before the last checkpoint. See section 4.1 of
    https://sqlite.org/fileformat.html.
    """
    size, salts, end = int.from_bytes(wal[8:12], "big") + 24, wal[16:24], 32
    while wal[end + 8 : end + 16] == salts:
        end += size
    return salts, end


class TornTest(CrashCase):
    """A WAL that isn't whole has what was committed before its damage."""

    COMMITS = 50
    CHANGES = "jobman.Writer.CHECKPOINT_AFTER = 150"  # changed rows

    def setUp(self):
        super().setUp()
        self.make_history()
        self.wal = read(self.db + "-wal")
        _, self.end = wal_end(self.wal)

    def post(self, path, value):
        reply = exchange(
            self.address, "POST", path, packed(value), {"jobix": "4712"})
        self.assertEqual(200, reply.status)

    def make_history(self):
        """Make commits, each with a mark on three jobs; note where they end.

        Those of before the last checkpoint are in the database file.
        """
        self.db = self.path("jobs.db")
        self.start(self.CHANGES)
        self.post("/set", {i: {"jobstage": 0}
                           for i in range(3 * self.COMMITS)})
        ends = []
        for k in range(self.COMMITS):
            self.post("/update_jobs", [
                {"jobid": 3 * k + i, "jobstage": 2, "filename": str(k)}
                for i in range(3)
            ])
            ends.append(wal_end(read(self.db + "-wal")))
        self.kill()
        self.ends = [end for salts, end in ends if salts == ends[-1][0]]
        self.checkpointed = self.COMMITS - len(self.ends)
        self.assertGreater(self.checkpointed, 10)
        self.assertGreater(len(self.ends), 10)

    def damaged(self, wal, shm=None):
        """Return a copy of the database with another WAL, and shm."""
        path = os.path.join(self.make_folder(), "jobs.db")
        shutil.copy(self.db, path)
        for suffix, content in (("-wal", wal), ("-shm", shm)):
            if content is not None:
                with open(path + suffix, "wb") as file:
                    file.write(content)
        return path

    def assertLost(self, offset, path):
        """Assert that only commits that end after an offset are lost."""
        self.assertSound(path)
        marks = rows(path, "select jobid, filename from job where stage = 2"
                           " order by jobid")
        kept = self.checkpointed + sum(end <= offset for end in self.ends)
        self.assertEqual(
            [(i, '"%d"' % (i // 3)) for i in range(3 * kept)],
            [(mark["jobid"], mark["filename"]) for mark in marks])

    def damages(self):
        """Yield (what is damaged, its offset, the WAL, its index)."""
        wal, end, randrange = self.wal, self.end, self.random.randrange
        size = int.from_bytes(wal[8:12], "big") + 24
        for offset in [0, 32, end, *self.ends[:3],
                       *(randrange(end) for _ in range(20))]:
            yield "its end is missing", offset, wal[:offset], None
        for _ in range(20):
            offset = randrange(end)
            changed = bytearray(wal)
            changed[offset] ^= 1 << randrange(8)
            yield "a bit is wrong", offset, changed, None
        for _ in range(8):
            offset = 32 + randrange((end - 32) // size) * size
            zeros = wal[:offset] + bytes(size) + wal[offset + size:]
            yield "a part is zero", offset, zeros, None
        garbage = bytes(randrange(256) for _ in range(10000))
        for more in (garbage, garbage[:100], wal[32:end]):
            yield "there is garbage behind it", end, wal[:end] + more, None
        index = read(self.db + "-shm")
        for shm in (b"", index, bytes(32768), b"\xff" * 32768, index[:500],
                    index[::-1]):
            yield "its index is garbage", end, wal, shm

    def test_only_what_was_committed_behind_the_damage_is_lost(self):
        for what, offset, wal, shm in self.damages():
            with self.subTest(what=what, offset=offset):
                path = self.damaged(wal, shm)
                if self.random.random() < 0.5:
                    self.assertLost(offset, path)
                store = jobman.Store(path)
                with contextlib.closing(store):
                    self.assertLost(offset, path)
                    store.init(4712, [1, 2, 3])
                self.assertLost(offset, path)
                shutil.rmtree(os.path.dirname(path))
        half = self.end // 2
        self.db = self.damaged(self.wal[:half], b"\xff" * 32768)
        self.start()
        self.assertLost(half, self.db)
        self.post("/cancel", {"all": True})
        self.kill()
        self.assertSound(self.db)
        self.wrong = False


# What lets a server note all that its connections to the database do, and its
# turns: a line each, in a file that it shares with others.
NOTING = """
import itertools, os, sqlite3, time
notes = os.open(%r, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
numbers = itertools.count()

def note(*words):
    line = "%%r %%d %%s %%s\\n" %% (time.monotonic(), os.getpid(), *words)
    os.write(notes, line.encode())

class Connection(sqlite3.Connection):
    def __init__(self, path, *given, **named):
        super().__init__(path, *given, **named)
        kind = "reader" if "mode=ro" in path else "writer"
        name = "%%s%%d" %% (kind, next(numbers))
        self.note = lambda sql: note(name, " ".join(sql.split())[:60])
        self.set_trace_callback(self.note)
        self.note("open")

    def close(self):
        self.note("close")
        super().close()

class FairLock(jobman.FairLock):
    def __enter__(self):
        super().__enter__()
        note("turn", "begins")

    def __exit__(self, *given):
        note("turn", "ends")
        super().__exit__(*given)

def connect(*given, connect=sqlite3.connect, **named):
    return connect(*given, factory=Connection, **named)

sqlite3.connect, jobman.FairLock = connect, FairLock
jobman.Writer.CHECKPOINT_AFTER = 5
"""


@slow
class CheckpointTest(TemporaryFolder):
    """No checkpoint is ever made beside a commit (see jobman.connect)."""

    open_to_all = True

    def setUp(self):
        super().setUp()
        self.db = self.path("jobs.db")
        self.numbers = itertools.count(0, 1000)
        self.emptiers = []

    def share(self):
        """Start a server that shares the database; return it as serve()."""
        return self.serve(
            "--db", self.db, "--shared",
            start=changed("jobman", NOTING % self.path("notes")))

    def notes(self):
        """Return what the servers noted, as (pid, who, what), by time."""
        lines = read(self.path("notes")).decode().splitlines()
        notes = [line.split(None, 3) for line in lines]
        notes.sort(key=lambda note: float(note[0]))
        return [(pid, who, what) for _, pid, who, what in notes]

    def work(self, *addresses):
        """Have jobs done at the addresses, with some reading."""
        first = next(self.numbers)
        jobs = {first + i: {"jobstage": 0} for i in range(150)}
        for address in addresses:
            for path in ("/set", "/status", "/jobs"):
                body = packed(jobs) if path == "/set" else None
                exchange(address, "POST" if body else "GET", path, body,
                         {"jobix": "4711"})
        self.emptiers += empty(*addresses, clients=8)

    def end(self, server):
        server.terminate()
        self.assertEqual(0, server.wait(PATIENCE), server.stderr.read())

    def live(self):
        """Let three servers share a database, of which the first is killed.
        """
        first, at_first = self.share()
        second, at_second = self.share()
        self.work(at_first, at_second)
        third, at_third = self.share()
        threads = [
            threading.Thread(target=self.work, args=addresses)
            for addresses in ((at_second, at_third), (at_second,))
        ]
        for thread in [*threads, Emptier(at_first), Emptier(at_first)]:
            thread.start()
        time.sleep(0.1)
        first.kill()
        fourth, _ = self.share()
        self.end(fourth)
        for thread in threads:
            thread.join(PATIENCE * 2)
        self.end(second)
        self.work(at_third)
        self.end(third)
        self.assertEqual([None] * 32, [each.error for each in self.emptiers])
        return [str(server.pid) for server in (first, second, third, fourth)]

    def test_three_processes_commit_and_checkpoint_in_turn(self):
        pids = self.live()
        self.assertInTurn(pids)
        self.assertNothingElseCheckpoints()
        self.assertEqual(["jobs.db"], [
            name for name in os.listdir(self.folder) if "jobs" in name])

    def assertInTurn(self, pids):
        holder, checkpointed, seen = None, False, []
        for pid, who, what in self.notes():
            if who == "turn":
                begins = what == "begins"
                if not (begins and holder == pids[0]):  # the killed one
                    self.assertEqual(None if begins else pid, holder)
                holder, checkpointed = pid if begins else None, False
            elif who.startswith("writer") and what != "open":
                self.assertEqual(pid, holder, what)
                self.assertFalse(checkpointed, what)
                checkpointed = "wal_checkpoint" in what
                seen.append((pid, what))
        self.assertIsNone(holder)
        for pid in pids[:3]:
            for what in ("begin immediate", "commit",
                         "pragma wal_checkpoint(passive)"):
                self.assertGreater(seen.count((pid, what)), 5)
        for pid in pids[1:]:
            self.assertEqual(1, seen.count((pid, "close")))

    def assertNothingElseCheckpoints(self):
        begun, ended, known = set(), set(), ("pragma wal_autocheckpoint = 0",
                                             "pragma wal_checkpoint(passive)")
        for pid, who, what in self.notes():
            name = pid, who
            if what == "open":
                begun.add(name)
            elif name in begun:  # the first thing that it does
                self.assertEqual(known[0], what)
                begun.remove(name)
            elif "checkpoint" in what:
                self.assertEqual(known[1], what)
                self.assertRegex(who, "^writer")
            elif what == "close" and who.startswith("writer"):
                ended.add(pid)
            self.assertFalse(who.startswith("reader") and pid in ended)
        self.assertEqual(set(), begun)

    def test_a_server_that_cannot_start_closes_in_its_turn(self):
        ill = "jobman.Store.resume = lambda self, execute: execute('no')"
        start = changed("jobman", NOTING % self.path("notes") + ill)
        status, _, err = self.command(
            *start, "serve", "--port", "0", "--db", self.db, "--shared")
        self.assertEqual(1, status)
        self.assertRegex(err, r"^jobman\.py: .* can't be used: .*syntax")
        *_, close, turn = self.notes()
        self.assertEqual(("close", "ends"), (close[2], turn[2]))

    def test_a_reader_that_closes_last_checkpoints_nothing(self):
        server, address = self.serve("--db", self.db)
        self.address = address
        exchange(address, "POST", "/set", packed({1: {"jobstage": 0}}),
                 {"jobix": "4711"})
        server.kill()
        server.wait()
        before = read(self.db), read(self.db + "-wal")
        with jobman.open_snapshot(self.db) as execute:
            self.assertEqual(
                1, execute("select count(*) from job").fetchone()[0])
        self.assertEqual(before, (read(self.db), read(self.db + "-wal")))


@long
class CrashTest(KillTest):
    """The same, hundreds of times."""

    LIVES = 14
    KILLS = 8
    STRIDE = 1


# ------------------------------------------------------------------ fuzz ---

# For each address, a body that is right, and options. Other addresses get {}.
BODIES = {
    "set": {"1": {"jobstage": 0, "jobcmd": ["x", {"y": 1.5}], "priority": 1,
                  "laststage": 4, "max_attempts": 2, "timeout": 9, "cwd": "c",
                  "outputs": ["o"], "filename": "f"},
            "2": {"jobstage": 2}},
    "submit": {"key": "k", "jobs": [{"jobstage": 0}, {"jobstage": 1}]},
    "update_job": {"filename": "f", "jobcmd": {"z": [1]}, "files": made("a"),
                   "exit_code": 0, "seconds": 1.5},
    "update_jobs": [{"jobid": 1, "jobstage": 2, "claim": "t"},
                    {"jobid": 2, "jobstage": 0, "filename": "f"}],
    "fail_job": {"error": "e", "stderr": "s", "exit_code": 1, "seconds": 2},
    "reject_job": {"files": made("a"), "error": "e"},
    "heartbeat": {"worker": "w", "lease": 60, "claims": [[1, "t"]],
                  "host": "h", "stages": [0], "slots": 2, "busy": 1,
                  "ended": False, "quarantine": ""},
    "retry": {"ids": [1, 2]},
    "cancel": {"stage": 2, "state": "waiting"},
}
OPTIONS = {
    "get": ("worker=w", "lease=60", "n=2", "wait=1", "lease=0.001"),
    "update_job": ("claim=t",),
    "fail_job": ("claim=t",),
    "reject_job": ("claim=t",),
    "release_job": ("claim=t",),
    "jobs": ("stage=0", "state=waiting", "order=time", "limit=5",
             "after=1,2"),
    "pace": ("minutes=9",),
}
ODD_WORDS = [word.encode("latin-1") for word in (
    "", "-1", "1.5", "9" * 25, "9" * 400, "%00", "%2e%2e", "..", "%", "%zz",
    "%ff", "%D9%A1", "\xd9\xa1", "1%20", "+1", "0x1", "1_0", "%2F", "0,1,2",
    ",", "NaN", "inf", "1e9", "x" * 3000, "x" * 70000, "'", '"', "<b>", "\\",
    "*", "a:b", "a b", "1#2", "%0d%0aX:%20y", "\x7f", "\xff", "%ED%A0%80",
    "1000001", "nan,1", "1,-1", "9223372036854775808", "POST", "G\xc9T", "get",
    "HTTP/1.0", "HTTP/2.0", "HTTP/0.9", "HTTP/1.1x", "http://x", "[::1]:x",
    "http://[::1/status", "//status", "http://x:y@z", "Basic a", "time",
    "Content-Length", "Expect", "100-continue", "Connection", "close",
    "Authorization", "Basic Ojc=", "Basic Ou0=", "Content-Encoding", "Origin",
    "Upgrade", "Sec-Fetch-Site", "cross-site", "If-None-Match", "a\0b", "/",
)]
# Each of them may be read in more than one way.
ODD_LINES = (
    b"X: y\r\n z", b" X: y", b"\tX: y", b"X : y", b"X", b":", b": y", b"X:\ny",
    b"X: y\r", b"\0", b"X: \0", b"\xff", b"GET / HTTP/1.1", b"X: y\n\r\n",
    b"Transfer-Encoding: chunked", b"Transfer-Encoding : chunked", b"\x0bX: y",
    b"Transfer-Encoding:\x0bchunked", b"transfer-encoding: identity",
    b"X: y\nTransfer-Encoding: chunked", b"X: y\rTransfer-Encoding: chunked",
    b"X: y\r\n Transfer-Encoding: chunked", b"Transfer\xadEncoding: chunked",
    b"Content-Length: 0", b"Content-Length : 0", b"Content-Length:\r\n 0",
    b"Content-Length: 00", b"X: y\nContent-Length: 0", b"Content-Length: ",
    b"X: y\rContent-Length: 0", b"Content-Length\r: 0", b"\rContent-Length: 0",
    b"Content-Length: -0", b"Content-Length: +0", b"Content-Length: 0, 0",
)
ODD_BODIES = (
    zlib.compress(bytes(jobman.MAX_BODY + 1), 1), b"\xff\xfe{\0}\0", b"{}{}",
    *(zlib.compress(c * 2**20) for c in (b"[", b" ", b'{"a":')), b"[NaN]",
    b'{"all": true, "all": true}', b"[" * 300 + b"]" * 300, b"\xef\xbb\xbf{}",
    b'"\xed\xa0\x80"', b'{"\\ud800": "\\udc00"}', b"", b"1e999", b"[1,]",
    b'{"1": {"jobstage": ' + b"9" * 4000 + b"}}",
    b'{"1": {"jobstage": 0}, "01": {"jobstage": 1}}', b"null",
)
JSON_WORDS = sorted({
    *jobman.CARRIES, *jobman.ABOUT_WORKER, *jobman.STATES, "key", "jobs",
    "jobid", "claim", "claims", "files", "worker", "lease", "ids", "all",
    "state", "stage", "error", "stderr", "exit_code", "seconds", "path",
    "size", "sha256", "0", "1", "2", "01", "x", "-1", "9" * 30,
})
JSON_TEXTS = (
    "", "\ud800", "a\udfff", "\udcff", "\0", "a\0b", "\u0661", "\xe9", "..",
    "\U0001f600", "x" * 300, "x" * 5000, "0123456789abcdef" * 4, "t", "a\n/",
)
JSON_ATOMS = (
    None, True, False, 0, 1, 2, 3, -1, -(2**31), 2**31, 2**53, 2**63, -(2**63),
    10**30, 10**4000, 0.0, -0.0, 0.5, -1.5, 1e9, 1e308, 5e-324, [], {}, [[]],
    [1, "t"], [[1, "t"]], [None], {"": 0},
)


def random_json(random, depth=3):
    """Return a random value, often of words that jobman knows."""
    kind = random.random() if depth else 0
    if kind < 0.6:
        return random.choice(random.choice(
            (JSON_ATOMS, JSON_WORDS, JSON_TEXTS)))
    values = [random_json(random, depth - 1) for _ in range(random.choice(
        (0, 1, 1, 2, 3, 9)))]
    if kind < 0.8:
        return values
    return {random.choice(random.choice((JSON_WORDS, JSON_TEXTS))): value
            for value in values}


def with_another(random, value):
    """Return `value` with one value or key in it replaced, or one more."""
    if not value or not isinstance(value, (list, dict)) \
            or random.random() < 0.1:
        return random_json(random)
    keys = list(value) if isinstance(value, dict) else range(len(value))
    key, kind = random.choice(keys), random.random()
    changed = value.copy()
    if kind < 0.8:
        changed[key] = with_another(random, value[key])
    elif isinstance(value, dict):
        words = random.choice((JSON_WORDS, JSON_WORDS, JSON_TEXTS))
        changed[random.choice(words)] = changed.pop(key)
    else:
        changed.append(random_json(random))
    return changed


def request(random, route, held=(1, "t")):
    """Return a request of a route that is right, about the job `held`.

    It is the method, the path, the options and the value to be sent.
    """
    method, path = route[:2]
    name = path.split("/")[1]
    if random.random() < 0.5:
        path = path.replace("<jobid>", str(held[0]))
    path = re.sub("<.*?>", lambda _: str(random.randrange(4)), path)
    known = OPTIONS.get(name, ())
    options = [option.replace("claim=t", "claim=" + held[1])
               for option in random.sample(known, random.randint(
                   0, len(known)))]
    value = BODIES.get(name, {}) if method == "POST" else None
    return method, path, options, value


class Answer:
    """An answer, read as strictly as can be."""

    STATUSES = {200, 304, 400, 401, 403, 404, 405, 408, 409, 411, 413, 414,
                421, 431, 505}
    HEAD = re.compile(
        rb"HTTP/1\.1 (\d{3}) [A-Za-z -]+\r\n((?:[A-Za-z-]+: [ -~]*\r\n)*)\r\n")

    def __init__(self, data):
        """Read the first answer in `data`; keep what comes after it."""
        found = self.HEAD.match(data)
        assert found, "no answer: %.300r" % data
        self.status = int(found.group(1))
        lines = found.group(2).decode().lower().split("\r\n")[:-1]
        self.headers = dict(line.split(": ", 1) for line in lines)
        assert len(self.headers) == len(lines), "twice: %r" % lines
        rest = data[found.end():]
        if self.status in (100, 304):
            length = 0
        else:
            length = int(self.headers["content-length"])
        self.body, self.rest = rest[:length], rest[length:]
        assert len(self.body) == length, "cut short: %r" % data[-300:]
        self.closes = self.headers.get("connection") == "close"

    def check(self):
        """Assert that it is one of the contract's."""
        assert self.status in self.STATUSES, (self.status, self.body)
        if self.status == 405:
            allowed = self.headers["allow"].split(", ")
            assert {*allowed} <= {"get", "post", "head"}, self.headers
        if self.status in (304, 401) or not self.body:
            return
        kind, body = self.headers["content-type"], self.body
        if "content-encoding" in self.headers:
            body = zlib.decompress(body)
        if self.status >= 400:
            assert kind == "application/json", self.headers
            error, = json.loads(body.decode("ascii")).items()
            assert error[0] == "error" and type(error[1]) is str, error
        elif kind == "application/json":
            json.loads(body.decode("ascii"))


class Fuzzer(threading.Thread):
    """A client that sends odd requests, and looks at the answers.

    `known` is a jobix with the lifetime 77 for stage 7. `inner` is a request
    that nobody makes: it is hidden in the bodies of others.
    """

    def __init__(self, address, random, jobixes, known, inner, requests):
        super().__init__(daemon=True)
        self.address, self.random, self.jobixes = address, random, jobixes
        self.probe = b"GET /lifetime/7 HTTP/1.1\r\nHost: localhost\r\n" \
            b"jobix: %d\r\n\r\n" % known
        self.inner = inner
        self.requests = requests
        self.error = None

    def run(self):
        try:
            for _ in range(self.requests):
                head, body = self.draft()
                self.random.choice((self.send_bent, self.send_bent,
                                    self.send_broken, self.send_smuggled))(
                    head, body)
        except Exception:
            self.error = traceback.format_exc()

    def draft(self):
        """Return the lines of a request that is right, and its body."""
        method, path, options, value = request(
            self.random, self.random.choice(jobman.ROUTES))
        path += "?" * bool(options) + "&".join(options)
        lines = ["%s %s HTTP/1.1" % (method, path), "Host: localhost",
                 "jobix: %d" % self.random.choice(self.jobixes)]
        body = b""
        if method == "POST":
            body = packed(with_another(self.random, value))
            if self.random.random() < 0.2:
                body = self.random.choice(ODD_BODIES)
            lines.append("Content-Length: %d" % len(body))
        return [line.encode() for line in lines], body

    def send_bent(self, head, body):
        """Send a request with an odd word in it; it gets one answer."""
        words = re.split(rb"([/?&=: ])", b"\n".join(head[:3]))
        i = self.random.randrange(len(words))
        j = i + self.random.choice((0, 1, 1, 2))
        words[i:j] = [self.random.choice(ODD_WORDS)]
        lines = b"".join(words).split(b"\n") + head[3:]
        data = b"\r\n".join([*lines, b"", body])
        first, *rest = self.exchange(data + self.probe)
        bodies = [answer.body for answer in rest]
        assert bodies == ([] if first.closes else [b"77"]), data[:9999]

    def send_broken(self, head, body):
        """Send bytes that are hardly a request any more."""
        random, kind = self.random, self.random.random()
        data = b"\r\n".join([*head, b"", body])
        i = random.randrange(len(data) + 1)
        j = i + random.choice((0, 1, 1, 4, 30))
        if kind < 0.3:
            data = data[:i]
        elif kind < 0.7:
            data = data[:i] + random.choice((
                b"", b"\r", b"\n", b"\r\n", b"\r\n\r\n", b"\0", b" ", b":",
                b"\xff", data[i:j] * 2, b"\t")) + data[j:]
        else:
            head.insert(random.randint(0, len(head)),
                        random.choice([*ODD_LINES, *head]))
            end = random.choice((b"\r\n", b"\r\n", b"\n", b"\r", b"\r\r\n"))
            data = end.join([*head, b"", body])
        self.exchange(data)

    def send_smuggled(self, head, _):
        """Send a request whose body is one, and whose length is doubtful.

        Its own Content-Length is right: a server that takes it for two is
        wrong, and one that takes it for one may be.
        """
        head = head[:3]
        head.insert(self.random.randint(1, 3), self.random.choice(ODD_LINES))
        head.insert(self.random.choice((4, 4, 1)),
                    b"Content-Length: %d" % len(self.inner))
        data = b"\r\n".join([*head, b"", self.inner])
        answer, *more = self.exchange(data)
        assert answer and not more, data

    def exchange(self, data):
        """Send all, in one piece or two; return the answers."""
        middle = self.random.choice((0, self.random.randrange(len(data) + 1)))
        with socket.create_connection(self.address, PATIENCE) as client:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            client.sendall(data[:middle])
            client.sendall(data[middle:])
            client.shutdown(socket.SHUT_WR)
            came, answers = b"".join(iter(lambda: client.recv(65536), b"")), []
        while came:
            answer = Answer(came)
            came = answer.rest
            if answer.status != 100:
                answer.check()
                answers.append(answer)
                assert not (answer.closes and came), "more after a close"
        return answers


class FuzzTest(SeededCase):
    """Odd requests by the thousand, beside clients that know what they do."""

    open_to_all = True
    REQUESTS = 8000
    THREADS = 4
    START = changed(  # few connections, of which none may be left over
        "jobman", "jobman.MAX_WAIT = 0.05; jobman.MAX_CONNECTIONS = 200;"
        "jobman.delay_after = lambda failures: 1e6")

    def level(self):
        """Return how many threads and open files the server has."""
        return Counter({
            kind: len(os.listdir("/proc/%d/%s" % (self.server.pid, kind)))
            for kind in ("task", "fd")})

    def ask(self, path, jobix):
        return exchange(self.address, "GET", path,
                        headers={"jobix": str(jobix)}).json()

    def begin(self):
        """Return the witnesses and the fuzzers."""
        self.server, self.address = self.serve(start=self.START)
        access = json.loads(read(self.path(".jobman", "access.json")).decode())
        known, self.hidden = (self.random.getrandbits(62) for _ in "12")
        self.ask("/lifetime/7/77", known)
        witnesses = [Witness(n, self.random.random()) for n in range(3)]
        witnesses[0].jobix = access["jobix"]
        # One can read the jobs of a witness, and can't touch them.
        jobixes = [7, 8, 9, 9223372036854775807, access["reading_jobix"]]
        inner = b"GET /lifetime/9/9 HTTP/1.1\r\nHost: localhost\r\n" \
            b"jobix: %d\r\n\r\n" % self.hidden
        return witnesses, [
            Fuzzer(self.address, random.Random(self.random.random()), jobixes,
                   known, inner, self.REQUESTS // self.THREADS)
            for _ in range(self.THREADS)
        ]

    def test_odd_requests_harm_nobody(self):
        witnesses, fuzzers = self.begin()
        before = self.level()
        with concurrent.futures.ThreadPoolExecutor(3) as pool:
            for witness in witnesses:
                pool.submit(witness.work, self.address)
            for fuzzer in fuzzers:
                fuzzer.start()
            for fuzzer in fuzzers:
                fuzzer.join(PATIENCE * 4)
            for witness in witnesses:
                witness.ending.set()
        for fuzzer in fuzzers:
            self.assertIsNone(fuzzer.error, fuzzer.error)
            self.assertFalse(fuzzer.is_alive())
        self.assertEqual({}, self.ask("/init", self.hidden))
        more = Counter(fd=3 * jobman.Readers.KEPT, task=jobman.Server.PARKED)
        wait_for(lambda: not self.level() - before - more,
                 "threads to end, and files to be closed")
        self.server.terminate()
        status, _, err = self.finish(self.server)
        self.assertEqual((0, ""), (status, err[-2000:]))
        with jobman.open_snapshot(self.path("jobman.db")) as execute:
            self.assertEqual([], faults(execute))
            for witness in witnesses:
                self.assertIsNone(witness.trouble)
                self.assertGreater(witness.answers, 20)
                self.assertEqual(witness.jobs, witness.read(execute))
        self.wrong = False


class RandomJsonTest(SeededCase):
    """What endpoints make of random JSON, without a socket between."""

    BODIES = 3000
    POSTS = [route for route in jobman.ROUTES if route[0] == "POST"]

    def setUp(self):
        super().setUp()
        self.store = jobman.Store(
            self.path("jobman.db"), clock=Clock(), open_to_all=True)
        self.addCleanup(self.store.close)
        self.database = sqlite3.connect(self.path("jobman.db"))
        self.addCleanup(self.database.close)
        self.store.make_namespace(7)

    def content(self):
        """Return all that is in the database."""
        tables = self.database.execute(
            "select name from sqlite_master where type = 'table'").fetchall()
        return {table: self.database.execute(
            "select * from " + table).fetchall() for table, in tables}

    def respond(self, method, path, body=b"", options=()):
        """Answer a request."""
        return jobman.respond(self.store, jobman.Request(
            method, path, "&".join(options), {"jobix": "7"}, lambda: body,
            lambda: False))

    def restock(self):
        """Have a few jobs, one of them claimed, in a database of that alone.
        """
        for table in set(self.content()) - {"setting", "namespace"}:
            self.database.execute("delete from " + table)
        self.database.execute(
            "update namespace set laststage = null, last_jobid = 0")
        self.database.commit()
        jobs = {i: {"jobstage": i // 3, "max_attempts": 9} for i in range(9)}
        self.respond("POST", "/set", packed(jobs))
        answer = self.respond("GET", "/get/0", options=("lease=60",))
        job = json.loads(answer.body.decode())
        self.held = job["jobid"], job["claim"]

    def odd(self):
        """Return a request with a random body."""
        method, path, options, value = request(
            self.random, self.random.choice(self.POSTS), self.held)
        for _ in range(self.random.choice((1, 1, 1, 2, 3))):
            value = with_another(self.random, value)
        return method, path, packed(value), options

    def changes(self):
        return self.store.writer.connection.total_changes

    def test_random_bodies_are_taken_or_change_nothing(self):
        statuses = Counter()
        for i in range(self.BODIES):
            if i % 25 == 0:
                self.restock()
                content, changes = self.content(), self.changes()
            request = self.odd()
            status = self.respond(*request).status
            statuses[status] += 1
            self.assertIn(status, Answer.STATUSES, request)
            if self.changes() != changes:
                before, content = content, self.content()
                changes = self.changes()
                if status >= 400:
                    self.assertEqual(before, content, request)
        self.assertGreater(min(map(statuses.get, (200, 400, 404, 409))), 10)
        self.assertEqual([], faults(self.database.execute))
        self.wrong = False


# ------------------------------------------------------------- processes ---


def rows(path, query, *values):
    """Return what a query finds in a database, as a list of dicts."""
    uri = "file:%s?mode=ro" % path
    connection = sqlite3.connect(uri, uri=True, timeout=PATIENCE)
    with contextlib.closing(connection):
        connection.row_factory = sqlite3.Row
        return [dict(row) for row in connection.execute(query, values)]


def read(path):
    """Return a file's bytes, none when it isn't there."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except (FileNotFoundError, ProcessLookupError):  # in /proc
        return b""


def leave_journal(path, pages):
    """Make a database look as if a commit that found it with so many pages
    was cut off before its journal was deleted.

    It changed no page that was there: see section 3 of
    https://sqlite.org/fileformat.html for the journal's header.
    """
    size = rows(path, "pragma page_size")[0]["page_size"]
    header = bytes.fromhex("d9d505f920a163d7") + struct.pack(
        ">5I", 0, 1, pages, 512, size)
    with open(path + "-journal", "wb") as file:
        file.write(header.ljust(512, b"\0"))


def alive(pid):
    """Return whether a process still runs; a zombie doesn't."""
    state = re.search(br"\) (\w)", read("/proc/%d/stat" % pid))
    return bool(state) and state.group(1) not in b"ZX"


class WorkerCase(TemporaryFolder):
    """A test with a server and workers, for which no beat takes seconds.

    The server is in this process, and so are the workers, unless a test
    sends one a signal or kills it.
    """

    SOON = "--idle-timeout", "0.05", "--slots", "1", "--quiet"
    check_listener = staticmethod(lambda sock: None)  # slow on large hosts

    def setUp(self):
        super().setUp()
        self.patch(jobman, "delay_after", lambda failures: 0.1)
        self.patch(jobman, "BEAT", 0.1)
        self.patch(worker, "check_listener", self.check_listener)
        self.patch(jobman.Store, "TICK", {False: 0.05})
        self.access = self.path(".jobman", "access.json")
        os.mkdir(self.path(".jobman"), 0o700)
        self.server = self.open()
        self.client = self.connect(self.access)

    def patch(self, owner, name, value):
        """Give something another value for this test."""
        self.addCleanup(setattr, owner, name, getattr(owner, name))
        setattr(owner, name, value)

    def open(self, database="jobman.db", access=None):
        """Start a server, and say in its access file where it is."""
        store = jobman.Store(self.path(database))
        server = jobman.Server(("127.0.0.1", 0), store)
        server.GRACE = 0
        store.logs = self.path(".jobman", "logs")
        server.start()
        self.addCleanup(self.close, server)
        url = "http://%s:%d" % server.server_address
        jobman.write_access(access or self.access, url, store)
        return server

    def close(self, server):
        """End a server that may have ended. Its access file stays."""
        if not server.ending:
            server.stop()

    def connect(self, access):
        client = worker.Client(access)
        self.addCleanup(client.close)
        return client

    def add(self, *commands, **carried):
        """Add a job for each command, numbered from 1."""
        job = dict({"jobstage": 0, "laststage": 2}, **carried)
        self.client.set(
            {i: dict(job, jobcmd=cmd) for i, cmd in enumerate(commands, 1)}
        )

    def here(self, main, *argv):
        """Run a program in this process: return (status, stdout, stderr).

        It has the test's folder and environment; its handlers are undone.
        """
        self.streams = [io.TextIOWrapper(io.BytesIO(), "utf-8",
                                         "surrogateescape") for _ in "12"]
        with contextlib.ExitStack() as stack:
            stack.enter_context(replaced_environment(self.environment))
            stack.enter_context(contextlib.redirect_stdout(self.streams[0]))
            stack.enter_context(contextlib.redirect_stderr(self.streams[1]))
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")  # a fork beside threads
            for number in (signal.SIGCHLD, *worker.ENDING_SIGNALS):
                stack.callback(
                    signal.signal, number, signal.getsignal(number))
            stack.callback(signal.set_wakeup_fd, -1)
            stack.callback(os.chdir, os.getcwd())
            stack.callback(setattr, tempfile, "tempdir", tempfile.tempdir)
            os.chdir(self.folder)
            tempfile.tempdir = self.environment["TMPDIR"]
            try:
                status = main(list(argv))
            except SystemExit as end:
                status = end.code
        return (status, *self.said())

    def said(self):
        """Return what a program in this process has printed by now."""
        for stream in self.streams:
            stream.flush()
        return [stream.buffer.getvalue().decode("utf-8", "surrogateescape")
                for stream in self.streams]

    def work(self, *argv, meanwhile=None, status=0):
        """Let a worker do all there is; return (stdout, stderr).

        `meanwhile` is called in a thread. If that fails, or if it takes too
        long, the worker is ended.
        """
        def interrupt(act=None):
            if act is None or act.exception():
                os.kill(os.getpid(), signal.SIGINT)
                os.kill(os.getpid(), signal.SIGINT)

        watchdog = threading.Timer(PATIENCE, interrupt)
        watchdog.start()
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            act = pool.submit(meanwhile or bool)
            act.add_done_callback(interrupt)
            found, out, err = self.here(
                worker.main, *self.SOON, "--print", *argv)
            watchdog.cancel()
            act.result(PATIENCE)
        self.unlock_spools()
        self.assertEqual(status, found, err)
        self.assertNotIn("Traceback", err)
        return out, err

    def unlock_spools(self):
        """Close the spool files of this process, as its end would."""
        for fd in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                if os.readlink("/proc/self/fd/" + fd).endswith(".spool"):
                    os.close(int(fd))

    def start(self, *argv, **options):
        """Start a worker in a process of its own."""
        argv = (*self.SOON, "--print", *argv)
        return self.spawn(WORKER, *argv, **options)

    def jobman(self, *argv, status=0):
        """Run a command of jobman.py; return (stdout, stderr)."""
        found, out, err = self.here(jobman.main, *argv)
        self.assertEqual(status, found, err)
        return out, err

    def go(self):
        """Let the commands end that wait for the file `go`."""
        open(self.path("go"), "w").close()

    def job(self, jobid=1):
        """Return a job as it stands in the database."""
        query = "select * from job where jobid = ?"
        return rows(self.path("jobman.db"), query, jobid)[0]

    def states(self):
        """Return the states of all jobs, by number."""
        query = "select state from job order by jobid"
        return [job["state"] for job in rows(self.path("jobman.db"), query)]

    def await_states(self, *states):
        wait_for(lambda: self.states() == list(states), "these states")

    def attempts(self, jobid=1):
        """Return the attempts of a job as they stand in the database."""
        query = "select * from attempt where job = ? order by id"
        job = self.job(jobid)["id"]
        return rows(self.path("jobman.db"), query, job)

    def outcomes(self, jobid=1):
        """Return how the attempts of a job ended."""
        return [attempt["outcome"] for attempt in self.attempts(jobid)]

    def pids(self, n):
        """Return the `n` process ids that a command writes to `pids`."""
        path = self.path("pids")
        wait_for(lambda: read(path).count(b"\n") >= n, "process ids")
        return [int(pid) for pid in read(path).split()]

    def assertDead(self, pids):
        for pid in pids:
            wait_for(lambda pid=pid: not alive(pid), "its end")

    def ahead(self, jobs, held=60):
        """Let workers claim `jobs(worker)` ahead, and hold them so long."""
        self.patch(worker.Worker, "HELD", held)
        worker.Worker.ahead = property(jobs, lambda *_: None)
        self.addCleanup(delattr, worker.Worker, "ahead")


UNTIL_GO = "until [ -e go ]; do sleep 0.02; done"


@slow
class WorkerTest(WorkerCase):
    """worker.py as people run it, against a real server."""

    # What a job's command is

    def test_a_string_is_run_by_the_shell_and_a_list_as_it_is(self):
        self.add('echo "$0" $((1 + 1))', ["printf", "%s|", "a b", "$HOME"])
        self.assertEqual("/bin/sh 2\na b|$HOME|", self.work()[0])

    def test_a_jobcmd_may_have_a_command_for_each_stage(self):
        steps = {"0": 'echo "$JOBMAN_ITEM" 0',
                 "2": ["printenv", "JOBMAN_ITEM"]}
        self.add({"steps": steps, "item": "a  b"}, laststage=4)
        self.client.set({2: {"jobstage": 0, "max_attempts": 1,
                             "jobcmd": {"steps": {"4": "true"}}}})
        out, _ = self.work("--stage", "0,2")
        self.assertEqual("a  b 0\na  b\n", out)
        self.assertEqual(["done", "failed"], self.states())
        self.assertIn("no command for stage 0; start the worker with",
                      self.attempts(2)[0]["error"])

    def test_a_jobcmd_that_is_no_command_fails_and_says_so(self):
        self.add(None, {"size": 5}, [], ["ls", 1], max_attempts=1)
        self.work()
        self.assertEqual(["failed"] * 4, self.states())
        for jobid in (1, 2, 3, 4):
            self.assertRegex(self.attempts(jobid)[0]["error"],
                             "jobcmd isn't a command; .* with --command")

    def test_a_workers_own_command_reads_the_job_as_json(self):
        self.environment["JOBMAN_URL"] = self.client.url
        self.environment["JOBMAN_JOBIX"] = str(self.client.jobix)
        self.add({"size": 5}, "fail", max_attempts=1, filename="a.txt")
        out, _ = self.work("--command", "cat; env; exit $((JOBMAN_JOBID-1))")
        self.assertNotIn(str(self.client.jobix), out)
        self.assertNotIn('"claim"', out)
        job, _ = json.JSONDecoder().raw_decode(out)
        self.assertEqual((1, 0, {"size": 5}, "a.txt"), tuple(
            job[k] for k in ("jobid", "jobstage", "jobcmd", "filename")))
        self.assertEqual(["done", "failed"], self.states())
        self.assertIn("exit status 1 of the worker's --command cat;",
                      self.attempts(2)[0]["error"])

    def test_a_command_knows_its_job_and_has_no_input(self):
        self.environment["COLOUR"] = "blue"
        os.mkdir(self.path("there"))
        self.client.set({
            7: {"jobstage": 4, "filename": "a  b.txt", "jobcmd":
                'cat; echo "$JOBMAN_JOBID $JOBMAN_STAGE $JOBMAN_ATTEMPT'
                ' $JOBMAN_FILENAME $COLOUR"; pwd -P'},
            8: {"jobstage": 4, "cwd": self.path("there"),
                "jobcmd": 'echo "<$JOBMAN_FILENAME>"; pwd -P'},
        })
        here = os.path.realpath(self.folder)
        self.assertEqual(
            "7 4 1 a  b.txt blue\n%s\n<>\n%s/there\n" % (here, here),
            self.work("--stage", "4")[0])

    # What becomes of it

    def test_a_result_is_for_the_next_stage_of_its_own_job(self):
        result = json.dumps({
            "filename": "new.txt", "jobcmd": 'echo "$JOBMAN_FILENAME"'
        })
        self.add(["sh", "-c", 'echo "$1" > "$JOBMAN_RESULT"', "sh", result],
                 "true", laststage=4)
        self.assertEqual("new.txt\n", self.work("--stage", "0,2")[0])
        self.assertEqual(["done"] * 2, self.states())
        self.assertIsNone(self.job(2)["filename"])

    def test_a_worker_is_not_idle_before_its_results_are_told(self):
        self.patch(worker.Claims, "LINGER", 0.4)
        self.add('echo "$JOBMAN_STAGE"', laststage=6)
        self.assertEqual("0\n2\n4\n", self.work("--stage", "0,2,4")[0])

    def test_names_that_are_not_utf8_pass_byte_for_byte(self):
        self.environment["LC_ALL"] = "C"
        self.add(
            "case $JOBMAN_STAGE in"
            " 0) printf '{\"filename\": \"caf\\351\"}' > \"$JOBMAN_RESULT\";;"
            ' 2) printf %s "$JOBMAN_FILENAME";; esac',
            ["printf", "<%s>", "\udcff\udcfe"], laststage=4)
        _, out, _ = self.finish(self.start("--stage", "0,2"))
        for part in (b"<\xff\xfe>", b"caf\xe9"):
            self.assertIn(part, out.encode("utf-8", "surrogateescape"))

    def test_a_failed_attempt_is_told_and_tried_again(self):
        self.add('seq 9999 >&2; echo "it broke" >&2;'
                 ' [ "$JOBMAN_ATTEMPT" = 2 ] || exit 3')
        _, err = self.work()  # the delayed job keeps it
        self.assertEqual(["failed", "done"], self.outcomes())
        attempt = self.attempts()[0]
        self.assertEqual(3, attempt["exit_code"])
        self.assertTrue(attempt["stderr"].endswith("\n9999\nit broke\n"))
        self.assertEqual(4096, len(attempt["stderr"]))
        self.assertEqual(2 * 48897, len(err))  # printed whole all the same

    def test_what_cannot_be_started_fails_and_the_worker_goes_on(self):
        cases = (
            ({"jobcmd": ["no-such-program"]}, 127, "no-such-program"),
            ({"jobcmd": ["/etc/passwd"]}, 126, "Permission denied"),
            ({"jobcmd": "true", "cwd": "/no/such"}, 127, "/no/such"),
            ({"jobcmd": "a\0b"}, 126, "null"),
            ({"jobcmd": ["\ud800"]}, 126, "surrogates"),
        )
        self.client.set({
            i: dict(job, jobstage=0, max_attempts=1)
            for i, (job, _, _) in enumerate(cases, 1)})
        self.client.set({9: {"jobstage": 0, "jobcmd": "echo on"}})
        self.assertEqual("on\n", self.work()[0])
        for jobid, (job, status, reason) in enumerate(cases, 1):
            with self.subTest(job=job):
                attempt = self.attempts(jobid)[0]
                self.assertEqual(status, attempt["exit_code"])
                self.assertIn(reason, attempt["error"])

    def test_a_bad_result_fails_its_attempt_and_no_other(self):
        save = "printf %%s '%s' > \"$JOBMAN_RESULT\""
        cases = (
            (save % "{", "JOBMAN_RESULT can't be used"),
            (save % "[]", "isn't an object with filename, jobcmd or"),
            (save % '{"colour": "blue"}', "an object with"),
            (save % '{"filename": 1}', "filename isn't a string"),
            (save % '{"outputs": "a"}', "outputs aren't a list of strings"),
            (save % '{"outputs": [1]}', "outputs aren't a list of strings"),
            (save % '{"jobcmd": NaN}', "NaN is not JSON"),
            ('mkfifo "$JOBMAN_RESULT"', "it isn't a file"),
            ('mkdir "$JOBMAN_RESULT"', "directory|no file"),
            ("head -c 1048577 /dev/zero > $JOBMAN_RESULT", "over 1048576"),
            ("head -c 200000 /dev/zero | tr '\\0' '[' > $JOBMAN_RESULT",
             "nested too deeply"),
        )
        self.add(*[command for command, _ in cases], max_attempts=1)
        self.client.set({99: {"jobstage": 0, "jobcmd": "echo on"}})
        self.assertEqual("on\n", self.work()[0])
        for jobid, (command, reason) in enumerate(cases, 1):
            with self.subTest(command=command):
                self.assertEqual("failed", self.outcomes(jobid)[-1])
                self.assertRegex(self.attempts(jobid)[-1]["error"], reason)

    # Which jobs, and when it ends

    def test_later_stages_come_first(self):
        where = 'echo "$JOBMAN_JOBID in $JOBMAN_STAGE"'
        self.client.set({
            1: {"jobstage": 0, "jobcmd": where},
            2: {"jobstage": 2, "jobcmd": where},
        })
        self.assertEqual("2 in 2\n1 in 0\n1 in 2\n",
                         self.work("--stage", "0,2")[0])

    def test_output_of_commands_side_by_side_comes_out_whole(self):
        meet = "for i in 1 2 3; do echo %s$i; echo %s$i >&2;" \
            " touch %s$i; until [ -e %s$i ]; do sleep 0.01; done; done"
        self.add(meet % tuple("aaab"), meet % tuple("bbba"))
        out, err = self.work("--slots", "2")  # they take turns in writing
        a, b = "a1\na2\na3\n", "b1\nb2\nb3\n"
        self.assertIn(out, (a + b, b + a))
        self.assertEqual(out, err)

    def test_a_lapsed_job_that_comes_back_to_its_worker_runs_on(self):
        self.add("echo ran >> log; " + UNTIL_GO)
        process = self.start("--slots", "2", "--lease", "1")
        wait_for(lambda: read(self.path("log")), "the command")
        process.send_signal(signal.SIGSTOP)
        wait_for(lambda: self.outcomes() == ["lapsed"], "a lapse")
        process.send_signal(signal.SIGCONT)  # a beat may come before a claim
        self.await_states("working")
        self.go()
        self.assertEqual((0, "", ""), self.finish(process))
        self.assertEqual(b"ran\n", read(self.path("log")))
        self.assertEqual((2, "done"), tuple(
            self.job()[name] for name in ("stage", "state")))

    def test_it_ends_when_standard_input_does_or_when_it_is_idle(self):
        for wait, close in ((1000, True), (0.05, False)):
            process = self.start("--until-eof", "--idle-timeout", str(wait),
                                 stdin=subprocess.PIPE)
            if close:
                process.stdin.close()
                process.stdin = None
            self.assertEqual(0, process.wait(PATIENCE), process.stderr.read())

    def test_it_works_with_no_standard_output(self):
        self.add("echo x")
        argv = [sys.executable, WORKER, "--idle-timeout", "0.1"]
        shell = ["/bin/sh", "-c", 'exec "$@" >&- 2>&-', "sh", *argv]
        status = subprocess.call(
            shell, env=self.environment, cwd=self.folder, timeout=PATIENCE)
        self.assertEqual(0, status)
        self.assertEqual(["done"], self.states())

    # Drained

    def heard(self, *, after=0, **what):
        """Wait until the worker `a/b` has beaten after a time, saying so."""
        wait_for(lambda: [
            found for found in self.client.workers()["workers"]
            if found["name"] == "a/b" and found["heard"] > after
            and what.items() <= found.items()
        ], "a heartbeat")

    def drain(self):
        self.heard()
        self.client.drain("a/b")
        wait_for(lambda: ": Drained: " in self.said()[1], "its word on it")

    def test_a_drained_worker_finishes_and_claims_when_undrained(self):
        def meanwhile():
            self.pids(1)
            self.drain()
            self.heard(after=time.time(), busy=1, drain=True)
            self.go()
            self.client.set({2: {"jobstage": 0, "jobcmd": "true"}})
            self.heard(after=time.time(), busy=0, done=1)
            self.heard(after=time.time(), busy=0, done=1)
            self.assertEqual(["done", "waiting"], self.states())
            self.client.undrain("a/b")
            wait_for(lambda: self.outcomes(2) == ["done"], "the other job")
            os.kill(os.getpid(), signal.SIGTERM)

        self.add("echo $$ > pids; " + UNTIL_GO)
        _, err = self.work("--idle-timeout", "60", "--name", "a/b",
                           meanwhile=meanwhile, status=143)
        self.assertEqual(
            "worker.py: Drained: it claims no more jobs for now.\n"
            "worker.py: Undrained: it claims jobs again.\n", err)

    def test_a_drained_worker_gives_back_what_a_long_poll_brings(self):
        def meanwhile():
            self.drain()
            self.add("echo ran >> ran")
            wait_for(lambda: self.outcomes() == ["released"], "its return")
            self.heard(after=time.time(), busy=0)
            self.assertEqual(["waiting"], self.states())
            os.kill(os.getpid(), signal.SIGTERM)

        self.work("--idle-timeout", "60", "--name", "a/b",
                  meanwhile=meanwhile, status=143)
        self.assertEqual(b"", read(self.path("ran")))

    def test_a_drained_worker_gives_back_what_it_has_not_begun(self):
        def meanwhile():
            self.await_states(*["working"] * 3)
            self.drain()
            self.await_states("working", "waiting", "waiting")
            self.go()

        self.ahead(lambda _: 5)
        self.add(*[UNTIL_GO] * 3)
        self.work("--name", "a/b", meanwhile=meanwhile)
        self.assertEqual(["done", "waiting", "waiting"], self.states())

    def test_a_drained_worker_ends_when_idle_though_a_job_is_delayed(self):
        self.patch(jobman, "delay_after", lambda failures: 1000)
        self.add("true")
        self.client.fail_job(1, self.client.get(0, lease=60)["claim"])
        self.work("--idle-timeout", "0.3", "--name", "a/b",
                  meanwhile=self.drain)
        self.assertEqual(["delayed"], self.states())
        self.assertEqual([], self.client.workers()["workers"])

    # What it says

    def test_wrong_usage_ends_with_status_2(self):
        number = "%r isn't a list of stages up to 999998"
        time = "%r isn't a duration; write 90 (seconds), 90s, 2h30m or 1:00:00"
        span = "%r isn't a time; write 1:00:00, 1-12:00:00, 90s or 2h30m"
        for option, values, said in (
            ("stage", ("?", "", "0,", "a,", "-1", "0x1", "999999"), number),
            ("lease", ("", "x", "-1", "nan", "1e10", "1:00"), time),
            ("time-limit", ("60", "1:00", "", "0s", "99999d"), span),
            ("slots", ("0",), "must be more than 0"),
            ("lease", ("0",), "must be more than 0"),
            ("log-limit", ("-1",), "must be 0 or more"),
        ):
            for value in values:
                with self.subTest(option=option, value=value):
                    found = self.here(worker.main, "--%s=%s" % (option, value))
                    self.assertEqual((2, ""), found[:2])
                    self.assertIn(said.replace("%r", repr(value)), found[2])

    def test_options_are_read_in_the_units_of_people(self):
        for text, seconds in (("90", 90), ("0.5", 0.5), ("90s", 90),
                              ("2h30m", 9000), ("1:00:00", 3600)):
            options = worker.parse(["--lease", text, "--grace", text])
            self.assertEqual((seconds, seconds),
                             (options.lease, options.grace))
        self.assertEqual(129600, worker.parse(
            ["--time-limit", "1-12:00:00"]).time_limit)
        self.assertEqual(120, worker.parse([]).lease)
        cores = os.sched_getaffinity(0)
        self.addCleanup(os.sched_setaffinity, 0, cores)
        for usable in (cores, {min(cores)}):
            os.sched_setaffinity(0, usable)
            self.assertEqual(len(usable), worker.parse([]).slots)

    def test_it_says_what_it_serves_and_what_it_did(self):
        self.client.stages({0: {"name": "align"}})
        self.add("true", "false", "exit 3", max_attempts=1)
        for argv, stages, did in (
            (("--stage", "align,4"), "stages 4, align",
             "1 job done, 2 failed (2, 3)"),
            ((), "stage align", "0 jobs done"),
        ):
            _, _, err = self.here(worker.main, "--idle-timeout", "0.05",
                                  "--slots", "2", "--name", "me", *argv)
            self.assertEqual([
                "worker.py: me serves %s of %s with 2 slots" % (
                    stages, self.client.url),
                "worker.py: %s, idle for 0.05 s" % did], err.splitlines())

    def test_it_says_each_failure_on_a_terminal(self):
        self.client.stages({0: {"name": "align"}})
        self.add("true", "echo no such thing >&2; exit 3", max_attempts=1)
        master, slave = pty.openpty()
        self.addCleanup(os.close, master)
        process = self.spawn(WORKER, "--idle-timeout", "0.05", stderr=slave)
        self.assertEqual(0, process.wait(PATIENCE))
        os.close(slave)
        self.assertIn(b"worker.py: Job 2 failed in stage align: exit status 3:"
                      b" no such thing\r\n", os.read(master, 9999))

    def test_its_name_has_the_number_of_the_batch_job(self):
        for name, value, part in (("SLURM_JOB_ID", "123", "slurm123"),
                                  ("PBS_JOBID", "45.host", "pbs45")):
            self.environment[name] = value
            _, _, err = self.here(worker.main, "--idle-timeout", "0.05",
                                  "--time-limit", "1h")
            self.assertRegex(err, r"worker\.py: [^ ]+-%s-\d+ serves" % part)
            del self.environment[name]

    # Whether more jobs may come

    def test_it_waits_for_jobs_on_their_way_to_its_stages(self):
        def meanwhile():
            wait_for(lambda: self.said()[1].count("\n") == 2, "a word on it")
            self.client.update_job(1, 2, job["claim"])

        self.add("true", laststage=4)
        self.client.heartbeat("a", 600, [], stages=[0])
        job = self.client.get(0, worker="a", lease=600)
        self.patch(self, "SOON", ("--idle-timeout", "0.3", "--lease", "600"))
        self.work("--quiet")  # the job's worker is alive
        self.client.heartbeat("a", 600, [], stages=[0])
        _, err = self.work(
            "--stage", "2", "--name", "b", meanwhile=meanwhile)
        self.assertEqual(
            ["worker.py: Nothing to do yet: job 1 runs on a.",
             "worker.py: 1 job done, idle for 0.3 s"], err.splitlines()[1:])
        self.assertEqual(["done"], self.states())

    def test_it_waits_for_jobs_that_a_silent_worker_may_have_lost(self):
        for name in ("dead", "w"):  # its own: the answer may have been lost
            with self.subTest(name=name):
                self.client.set({1: {"jobstage": 0, "laststage": 2,
                                     "jobcmd": "true"}})
                self.client.get(0, worker=name, lease=0.5)
                self.work("--name", "w", "--lease", "60")
                self.assertEqual(["lapsed", "done"], self.outcomes()[-2:])
                self.client.forget(all=True)

    def test_a_job_that_comes_free_as_a_worker_would_end_is_done(self):
        look = worker.Claimer.coming

        def coming(claimer):
            return wait_for(lambda: look(claimer) is None, "no more") and None

        self.patch(worker.Claimer, "coming", coming)
        self.add('[ "$JOBMAN_ATTEMPT" = 2 ]')
        self.work()
        self.assertEqual(["done"], self.states())


class ClientTest(WorkerCase):
    """How the server is found, and calls are made."""

    check_listener = staticmethod(worker.check_listener)

    def test_no_access_file_means_no_server(self):
        self.client.status()
        self.close(self.server)
        os.unlink(self.access)
        self.client.patience = 0
        with socket.socket() as other:
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            other.bind(self.client.address)
            other.listen(5)
            other.setblocking(False)
            with self.assertRaisesRegex(
                    worker.Unreachable, "There is no access file"):
                self.client.status()
            with self.assertRaises(BlockingIOError):  # nobody has called
                other.accept()

    def test_a_port_that_another_user_has_taken_is_not_asked(self):
        if os.geteuid():
            self.skipTest("only root can become another user")
        self.close(self.server)
        code = "import os, socket\nos.setuid(1234)\n" \
            "server = socket.socket()\n" \
            "server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)\n" \
            "server.bind(%r)\nserver.listen(5)\nprint('up', flush=True)\n" \
            "while True: print(server.accept()[0].recv(9), flush=True)" % (
                self.client.address,)
        other = self.spawn("-c", code)
        self.assertEqual(b"up\n", other.stdout.readline())
        _, err = self.work(status=1)
        self.assertRegex(err, r"\Aworker\.py: Another server than ours is"
                         r" at 127\.0\.0\.1:\d+: a program of another user")
        self.assertEqual(b"b''\n", other.stdout.readline())

    def test_a_server_that_cannot_be_found_is_one_sentence(self):
        def access(mode=0o600, **content):
            path = self.path("%d.json" % len(os.listdir(self.folder)))
            with open(path, "w") as file:
                json.dump(content, file)
            os.chmod(path, mode)
            return {"JOBMAN_ACCESS": path}

        for given, reason in (
            ({"JOBMAN_ACCESS": "nowhere"}, "no access file nowhere"),
            ({"JOBMAN_ACCESS": "a\x1b]0;b"}, r"file a\\x1b\]0;b"),
            (access(jobix=1), "Can't read .*'url'"),
            (access(jobix="x", url="http://h"), "its jobix isn't a number"),
            (access(0o644, jobix=1, url="http://h"), "chmod 600 it"),
            (access(jobix=1, url="http://h", fingerprint="00"), "fingerpr"),
            (access(jobix=1, url="http://h", fingerprint="0" * 64), "https:"),
            *(({"JOBMAN_URL": url, "JOBMAN_JOBIX": "1"}, "ess %r must" % url)
              for url in ("http://h:999999", "ftp://h", "x")),
            ({"JOBMAN_URL": "http://[::1", "JOBMAN_JOBIX": "1"}, "address"),
            ({"JOBMAN_URL": "http://h"}, "needs a jobix too"),
            ({"JOBMAN_URL": "http://h", "JOBMAN_JOBIX": "secret1"}, "number"),
            ({"JOBMAN_JOBIX": "secret1"}, "must be a number"),
        ):
            with self.subTest(reason=reason):
                kept = self.environment
                self.environment = dict(kept, **given)
                _, err = self.work(status=1)
                self.environment = kept
                self.assertRegex(err, r"\Aworker\.py: [^\n]*\n\Z")
                self.assertRegex(err, reason)
                self.assertNotIn("secret1", err)

    def stand_in(self, *replies):
        """Return a Client of what gives these replies, and what it is asked.

        An empty reply is a connection that is cut.
        """
        asked = []

        def answer():
            with server:
                for reply in replies:
                    with server.accept()[0] as client:
                        asked.append(client.recv(65536))
                        client.sendall(reply)

        server = socket.socket()
        server.bind(("127.0.0.1", 0))
        server.listen(9)
        threading.Thread(target=answer, daemon=True).start()
        client = worker.Client(
            url="http://127.0.0.1:%d" % server.getsockname()[1], jobix=1)
        self.addCleanup(client.close)
        return client, asked

    def test_only_what_is_safe_is_asked_again(self):
        later = b"HTTP/1.1 503 Later\r\nContent-Length: 0\r\n\r\n"
        nada = b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n" \
            b'Content-Type: application/json\r\n\r\n"nada"'
        client, asked = self.stand_in(b"", b"", later, nada)
        with self.assertRaises(worker.Unreachable):
            client.get(0)
        self.assertEqual(1, len(asked))
        self.assertIsNone(client.get(0, lease=60))
        self.assertEqual(4, len(asked))

    def test_another_programs_answer_is_no_servers(self):
        client, _ = self.stand_in(
            b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi")
        client.patience = 0
        with self.assertRaisesRegex(worker.Unreachable, "a jobman server"):
            client.status()

    def test_calls_that_only_read_give_up_soon_and_say_what_they_wait_for(
            self):
        client, told = worker.Client(self.access, patience=0), []
        self.addCleanup(client.close)
        client.tell, client.LATE, client.READ_TIMEOUT = told.append, 0.1, 1
        with socket.socket() as server:
            server.bind(("127.0.0.1", 0))
            server.listen(9)  # and never answers
            jobman.write_access(
                self.access, "http://127.0.0.1:%d" % server.getsockname()[1],
                self.server.store)
            with self.assertRaisesRegex(worker.Unreachable, "timed out"):
                client.status()
        self.assertRegex("".join(told), "hasn't answered yet. Waiting for it.")

    def test_a_client_that_was_aborted_makes_no_more_calls(self):
        self.client.abort()
        with self.assertRaisesRegex(worker.Unreachable, "broken off"):
            self.client.status()

    def test_a_call_that_is_too_large_is_refused(self):
        self.patch(worker, "MAX_BODY", 100)
        with self.assertRaisesRegex(worker.Refused, "too large; use several"):
            self.client.submit("k", [{"jobstage": i} for i in range(100)])

    def test_bad_ids_in_a_clients_call_are_refused_by_the_server(self):
        for jobid in ("x", "1/2", -1):
            for call in (self.client.job, self.client.fail_job,
                         lambda jobid: self.client.update_job(jobid, "x")):
                with self.assertRaises(worker.Refused):
                    call(jobid)


@slow
class SlotsTest(WorkerCase):
    """How many commands run, of which claims, and what they print."""

    def starts(self):
        """Return how many jobs were claimed in each claim, in order."""
        query = "select started, count(*) n from attempt group by started" \
            " order by started"
        return [row["n"] for row in rows(self.path("jobman.db"), query)]

    def test_never_more_commands_run_than_there_are_slots(self):
        self.add(*["echo 1 >> log; sleep 0.0%d; echo -1 >> log" % (i % 5)
                   for i in range(30)])
        self.work("--slots", "3")
        self.assertEqual(["done"] * 30, self.states())
        steps = map(int, read(self.path("log")).split())
        self.assertEqual(3, max(itertools.accumulate(steps)))

    def test_short_commands_are_claimed_many_at_a_time(self):
        self.add(*[["true"]] * 300)
        self.work("--slots", "2")
        self.assertEqual(["done"] * 300, self.states())
        self.assertTrue(2 < max(self.starts()) <= 202, self.starts())

    def test_long_commands_are_claimed_one_by_one(self):
        self.add(*["sleep 0.4"] * 3)
        self.work()
        self.assertEqual([1] * 3, self.starts())

    def test_what_waits_too_long_for_a_slot_is_given_back(self):
        def meanwhile():
            self.await_states(*["working"] * 4)
            self.await_states("working", *["waiting"] * 3)
            self.go()

        self.ahead(lambda worker: 3 if worker.ready or not worker.received
                   else 0, held=0.3)
        self.add(UNTIL_GO, *["true"] * 3)
        self.work(meanwhile=meanwhile)
        for jobid in (2, 3, 4):
            self.assertEqual(
                [("released", 1), ("done", 1)],
                [(a["outcome"], a["attempt"]) for a in self.attempts(jobid)])

    def test_a_command_that_no_process_is_left_for_is_deferred(self):
        start, calls = worker.start_process, []

        def scarce(*args):
            calls.append(1)
            if len(calls) == 1:
                raise BlockingIOError(worker.errno.EAGAIN, "no process")
            return start(*args)

        self.patch(worker, "start_process", scarce)
        self.add("echo ran", max_attempts=1)
        out, err = self.work()
        self.assertEqual("ran\n", out)
        self.assertRegex(err, r"\Aworker\.py: A command can't be started: .*"
                         r" no process: raise `ulimit -u`, .*\.\n\Z")
        self.assertEqual(["deferred", "done"], self.outcomes())
        self.assertEqual(0, self.job()["failures"])

    def scarce_threads(self, *allowed):
        """Let no thread start but for functions of these names."""
        def thread(*, target, **options):
            if target.__name__ in allowed:
                return threading.Thread(target=target, **options)
            return types.SimpleNamespace(start=fail)

        def fail():
            raise RuntimeError("can't start new thread")

        self.patch(worker, "threading", types.SimpleNamespace(
            **dict(vars(threading), Thread=thread)))

    def test_files_are_read_though_no_thread_can_be_started(self):
        with open(self.path("made"), "w") as file:
            file.write("made")
        self.add("true", outputs=["made"], laststage=4)
        self.scarce_threads("work", "claim")
        self.work("--stage", "0,2")
        self.assertEqual(["done"], self.states())

    def test_few_files_or_threads_are_a_sentence_with_a_remedy(self):
        process = self.start(preexec_fn=lambda: resource.setrlimit(
            resource.RLIMIT_NOFILE, (30, 30)))
        status, _, err = self.finish(process)
        self.assertEqual(1, status)
        self.assertRegex(err, r"\Aworker\.py: .* raise `ulimit -n`.*\n\Z")
        self.scarce_threads()
        _, err = self.work(status=1)
        self.assertRegex(err, r"\Aworker\.py: .* raise `ulimit -u`.*\n\Z")

    def test_it_raises_the_limit_on_open_files(self):
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        self.addCleanup(resource.setrlimit, resource.RLIMIT_NOFILE, limits)
        resource.setrlimit(resource.RLIMIT_NOFILE, (100, limits[1]))
        self.add(*["true"] * 20)
        self.work("--slots", "50")
        self.assertEqual(["done"] * 20, self.states())
        self.assertLessEqual(
            600, resource.getrlimit(resource.RLIMIT_NOFILE)[0])

    def test_it_works_where_the_c_library_makes_no_sessions(self):
        def posix_spawnp(*args, **options):
            raise NotImplementedError

        if hasattr(os, "posix_spawnp"):
            self.patch(os, "posix_spawnp", posix_spawnp)
        self.add("echo a", ["no-such-program"],
                 "[ $(ps -o sid= $$) = $$ ] && echo session", max_attempts=1)
        self.assertEqual("a\nsession\n", self.work()[0])
        self.assertEqual(["done", "failed", "done"], self.states())
        self.assertEqual(127, self.attempts(2)[0]["exit_code"])

    # What they print

    def test_megabytes_to_both_streams_come_whole(self):
        self.add("head -c 5000000 /dev/zero | tee /dev/stderr")
        self.assertEqual(("\0" * 5000000,) * 2, self.work())

    def test_pipes_are_new_for_each_command(self):
        self.add(
            [sys.executable, "-c", "import os; os.set_blocking(1, False)"],
            "head -c 2000000 /dev/zero",
            "setsid sh -c 'trap \"\" PIPE; echo > up; %s; echo stray;"
            " echo > gone' & %s" % (UNTIL_GO, UNTIL_GO.replace("go", "up")),
            "echo > go; %s; echo on" % UNTIL_GO.replace("go", "gone"))
        self.assertEqual("\0" * 2000000 + "on\n", self.work()[0])
        self.assertEqual(["done"] * 4, self.states())

    def test_a_command_may_close_its_output_and_go_on(self):
        wait, turns = worker.Worker.wait, []
        self.patch(worker.Worker, "wait",
                   lambda self: turns.append(1) or wait(self))
        self.add("exec >&- 2>&-; sleep 0.5")
        self.work()
        self.assertLess(len(turns), 100)
        self.assertEqual(["done"], self.states())

    def test_output_that_does_not_fit_fails_its_attempt_alone(self):
        self.environment["TMPDIR"] = self.small_disk("2m")
        self.add("head -c 5000000 /dev/zero", "echo on", max_attempts=1)
        self.assertEqual("on\n", self.work()[0].strip("\0"))
        self.assertEqual(["failed", "done"], self.states())
        self.assertIn("its output can't be kept in %s: No space left"
                      % self.path("disk"), self.attempts()[0]["error"])

    def test_a_stray_process_that_writes_on_holds_up_nothing(self):
        """Nor does it while files are read, or while output is printed."""
        look, show = worker.await_files, worker.PrintedOutput.print

        def slowly(act):
            return lambda *args: (act(*args), time.sleep(0.3))[0]

        self.patch(worker, "await_files", slowly(look))
        self.patch(worker.PrintedOutput, "print", slowly(show))
        stray = "setsid sh -c 'echo $$ >> pids; while :; do echo stray;" \
            " done' & until [ -s pids ]; do sleep 0.01; done; echo a > made"
        self.add(stray, *["echo on"] * 2, laststage=4)
        self.client.set({9: {"jobstage": 0, "laststage": 2, "priority": 1,
                             "jobcmd": stray, "outputs": ["made"]}})
        try:
            self.work("--stage", "0,2", "--command",
                      "[ $JOBMAN_STAGE$JOBMAN_JOBID = 21 ] || { %s; }" % stray)
        finally:
            for pid in self.pids(1):
                with contextlib.suppress(ProcessLookupError):  # SIGPIPE
                    os.kill(pid, signal.SIGKILL)
        self.assertEqual(["done"] * 4, self.states())

    # Claims that are renewed or lost

    def test_all_leases_are_renewed_in_one_call(self):
        beat, beats = worker.Client.heartbeat, []

        def heartbeat(client, name, lease, claims, **about):
            beats.append(len(claims))
            return beat(client, name, lease, claims, **about)

        def meanwhile():
            self.await_states(*["working"] * 8)
            first = self.job()["expires_at"]
            self.assertAlmostEqual(time.time() + 120, first, delta=20)
            wait_for(lambda: self.job()["expires_at"] > first, "a renewal")
            self.go()

        self.patch(worker.Client, "heartbeat", heartbeat)
        self.add(*[UNTIL_GO] * 8)
        self.work("--slots", "8", meanwhile=meanwhile)
        self.assertIn(8, beats)
        self.assertEqual(0, beats[-1])
        self.assertEqual(["done"] * 8, self.states())

    def test_a_busy_worker_beats_and_learns_what_is_lost(self):
        """Cancelled commands die; one that is stubborn delays no beat."""
        def meanwhile():
            pids = self.pids(2)
            wait_for(lambda: len(self.states()) - self.states().count("done")
                     < 900, "a hundred short commands")
            first = self.job(3)["expires_at"]
            self.client.cancel(ids=[1])
            wait_for(lambda: not alive(pids[1]), "the end of its child")
            wait_for(lambda: not alive(pids[0]), "its end")
            wait_for(lambda: self.job(3)["expires_at"] > first, "a beat")
            self.client.cancel(stage=0, state="waiting")
            self.go()

        self.patch(worker.Worker, "GRACE", 0.5)
        stubborn = "trap '' TERM; echo $$ >> pids; sleep 60 &" \
            " echo $! >> pids; while :; do wait; done"
        self.add(stubborn, "true", UNTIL_GO, *[["true"]] * 1000)
        _, err = self.work("--slots", "3", meanwhile=meanwhile)
        self.assertEqual("worker.py: Job 1: its claim is lost.\n", err)
        self.assertEqual([["cancelled"], ["done"]],
                         [self.outcomes(1), self.outcomes(3)])
        query = "select distinct outcome from attempt"
        self.assertLessEqual(
            {row["outcome"] for row in rows(self.path("jobman.db"), query)},
            {"done", "released", "cancelled"})

    def test_a_claim_that_is_lost_while_it_waits_never_begins(self):
        def meanwhile():
            self.await_states("working", "working")
            self.client.cancel(ids=[2])
            wait_for(lambda: self.said()[1], "a word on it")
            self.go()

        self.ahead(lambda _: 1)
        self.add(UNTIL_GO, "echo ran")
        self.assertEqual(
            ("", "worker.py: Job 2: its claim is lost.\n"),
            self.work(meanwhile=meanwhile))
        self.assertEqual(["done", "cancelled"], self.states())

    def await_files(self, meanwhile, **options):
        """Let a worker wait for a file; return what it prints."""
        self.add("echo ran", laststage=4)
        job = self.client.get(0, lease=60)
        self.client.update_job(1, 2, job["claim"], files=[{
            "path": self.path("late"), "size": 4,
            "sha256": hashlib.sha256(b"late").hexdigest()}])

        def act():
            self.await_states("working")
            meanwhile()

        return self.work(
            "--stage", "2", "--lag", "60", meanwhile=act, **options)

    def arrive(self):
        with open(self.path("late"), "w") as file:
            file.write("late")

    def test_files_that_are_late_are_awaited(self):
        self.assertEqual(("ran\n", ""), self.await_files(self.arrive))
        self.assertEqual(["done", "done"], self.outcomes())

    def test_a_claim_that_is_lost_while_files_are_read_never_begins(self):
        def lose():
            self.client.cancel(ids=[1])
            wait_for(lambda: self.said()[1], "a word on it")
            self.arrive()

        self.assertEqual(("", "worker.py: Job 1: its claim is lost.\n"),
                         self.await_files(lose))
        self.assertEqual(["done", "cancelled"], self.outcomes())

    def test_a_signal_while_files_are_awaited_releases(self):
        self.assertEqual(("", ""), self.await_files(
            lambda: os.kill(os.getpid(), signal.SIGTERM), status=143))
        self.assertEqual(["done", "released"], self.outcomes())

    def test_a_job_that_comes_back_while_it_is_killed_runs_again(self):
        def meanwhile():
            self.pids(1)
            self.client.cancel(ids=[1])
            wait_for(lambda: "claim is lost" in self.said()[1], "a word on it")
            self.client.retry(ids=[1])
            self.pids(2)
            self.assertEqual(["cancelled", "released"], self.outcomes())
            os.kill(os.getpid(), signal.SIGTERM)

        self.patch(worker.Worker, "GRACE", 1)
        self.add("trap '' TERM; echo $$ >> pids; while :; do sleep 0.05; done")
        self.work("--slots", "2", "--grace", "0.1", meanwhile=meanwhile,
                  status=143)
        self.assertEqual(0, self.job()["lapses"])


class BudgetTest(WorkerCase):
    """What attempts cost a job."""

    def test_exit_status_75_is_deferred_and_not_counted(self):
        self.add('[ "$JOBMAN_ATTEMPT" = 2 ] || exit 75', max_attempts=1)
        self.work()
        self.assertEqual(["deferred", "done"], self.outcomes())

    def test_a_job_over_its_timeout_dies_with_its_children(self):
        self.patch(worker.Worker, "GRACE", 0.3)
        self.add("trap '' TERM; echo $$ >> pids; sleep 60 & echo $! >> pids;"
                 " while :; do wait; done", timeout=0.3, max_attempts=1)
        self.work()
        self.assertDead(self.pids(2))
        attempt = self.attempts()[0]
        self.assertEqual(("failed", 124, "not done after 0.3 seconds"), tuple(
            attempt[k] for k in ("outcome", "exit_code", "error")))

    def test_a_timeout_counts_though_the_command_ends_well_then(self):
        self.add("trap 'exit 0' TERM; sleep 60 & wait", timeout=0.3,
                 max_attempts=1)
        self.work()
        self.assertEqual(124, self.attempts()[0]["exit_code"])

    def test_a_timeout_is_over_when_the_command_has_ended(self):
        look = worker.results

        def slowly(*args):
            time.sleep(0.8)
            return look(*args)

        self.patch(worker, "results", slowly)
        self.add("echo > made", outputs=["made"], timeout=0.4)
        self.work()
        self.assertEqual(["done"], self.states())

    def test_a_month_is_a_time_like_any_other(self):
        self.add("true", timeout=3000000)
        self.work("--time-limit", "30-00:00:00")
        self.assertEqual(["done"], self.states())

    def test_failures_and_lapses_are_bounded_by_the_server(self):
        self.close(self.server)
        self.serve("--retries", "1", "--lapses", "1", start=HASTY)
        self.client.locate()
        self.add("exit 3", "true")
        self.work("--command", "exit $JOBMAN_JOBID")
        self.assertEqual(["failed"] * 2, self.outcomes())
        self.client.retry(ids=[2])
        self.client.get(0, lease=0.1)
        self.await_states("failed", "failed")
        self.assertEqual("lapsed", self.outcomes(2)[-1])


class OutageTest(WorkerCase):
    """A worker and a server that comes and goes."""

    def setUp(self):
        super().setUp()
        self.spool = self.path(".jobman", "spool")
        self.backoff = worker.backoff
        self.patch(worker, "backoff", lambda: itertools.repeat(0.05))

    def lose_server(self):
        """End the server; its access file stays."""
        self.close(self.server)

    def find_server(self):
        """Start the server again, at another port."""
        self.server = self.open()
        self.client.locate()

    def outlive_server(self, n=1):
        """End the server while `n` commands run, and then the commands."""
        self.await_states(*["working"] * n)
        self.lose_server()
        self.go()

    def spooled(self):
        """Return the lines in all spool files."""
        lines = []
        with contextlib.suppress(FileNotFoundError):
            for name in os.listdir(self.spool):
                lines += read(os.path.join(self.spool, name)).splitlines()
        return lines

    def leave_results(self, n=1):
        """Leave `n` results as a worker does whose server is away."""
        def lose():
            self.outlive_server(n)
            wait_for(lambda: len(self.spooled()) == n, "the results")
            os.kill(os.getpid(), signal.SIGTERM)

        self.patch(worker.Claims, "LAST", 0.2)
        self.add(*[UNTIL_GO] * n)
        self.work("--slots", str(n), meanwhile=lose, status=143)
        self.assertEqual(n, len(self.spooled()))

    def leave_outcomes(self, *outcomes, name="left", space=None):
        """Leave outcomes, (jobid, claim, verb, values), of an ended worker."""
        spool = worker.Spool(self.spool, name)
        space = space or worker.namespace(self.client.jobix)
        spool.add([worker.Outcome(space, *each) for each in outcomes])
        os.close(spool.fd)

    def leave_updates(self, n):
        """Leave results of `n` jobs, that are claimed for that."""
        self.add(*["true"] * n)
        self.leave_outcomes(*[
            (job["jobid"], job["claim"], "update", {"jobstage": 2})
            for job in self.client.get(0, lease=600, n=n)])

    def assertDelivered(self, n=1):
        """Assert that all jobs are done, once, and nothing is left."""
        self.assertEqual(["done"] * n, self.states())
        for jobid in range(1, n + 1):
            self.assertEqual(["done"], self.outcomes(jobid))
        self.assertFalse(os.path.exists(self.spool))

    def send_spool(self, *argv):
        return self.here(worker.main, "--send-spool", *argv)

    def test_commands_run_on_and_their_results_wait_on_disk(self):
        def meanwhile():
            self.outlive_server(2)
            wait_for(lambda: len(self.spooled()) == 2, "the results")
            name, = os.listdir(self.spool)
            modes = [stat.S_IMODE(os.stat(path).st_mode)
                     for path in (self.spool, os.path.join(self.spool, name))]
            self.assertEqual([0o700, 0o600], modes)
            for line in self.spooled():
                self.assertNotIn(str(self.client.jobix), line.decode())
            wait_for(lambda: synced, "the sync")
            self.find_server()

        sync, synced = os.fsync, []

        def fsync(fd):
            path = os.readlink("/proc/self/fd/%d" % fd)
            if path.startswith(os.path.realpath(self.spool)):
                synced.append(path)
            sync(fd)

        self.patch(os, "fsync", fsync)
        self.add(*[UNTIL_GO] * 2)
        _, err = self.work("--slots", "2", meanwhile=meanwhile)
        self.assertRegex(
            err, r"\Aworker\.py: The server at .* can't be reached .*"
            r"Waiting for it\.\n.*are kept in .*\n.*is back\.\n\Z")
        self.assertDelivered(2)

    def test_a_lost_server_is_tried_within_a_third_of_the_lease(self):
        def meanwhile():
            wait_for(lambda: self.client.workers()["workers"], "a worker")
            self.lose_server()
            wait_for(lambda: len(tries) > 9, "ten tries")
            os.kill(os.getpid(), signal.SIGTERM)

        tries, beat = [], worker.Claims.beat

        def note(claims, **about):
            tries.append(claims.next_beat)
            beat(claims, **about)

        self.patch(worker.Claims, "beat", note)
        self.patch(worker, "backoff", lambda: itertools.repeat(1000))
        self.work("--lease", "0.3", "--idle-timeout", "1000",
                  meanwhile=meanwhile, status=143)

    def test_pauses_are_random_and_grow_to_ten_seconds(self):
        runs = [list(itertools.islice(self.backoff(), 20))
                for _ in range(200)]
        longest = [max(pauses) for pauses in zip(*runs)]
        self.assertLessEqual(longest[0], 0.1)
        self.assertLess(longest[3], 0.8)
        self.assertTrue(9 < longest[-1] <= 10, longest)
        self.assertTrue(9 < longest[8] <= 10, longest)
        self.assertLess(min(pauses[-1] for pauses in runs), 1)

    def test_results_that_a_worker_left_are_delivered_by_the_next(self):
        self.leave_results(3)
        self.find_server()
        self.work()
        self.assertDelivered(3)

    def test_results_of_a_killed_worker_are_delivered_by_the_next(self):
        self.add(UNTIL_GO)
        process = self.start()
        self.outlive_server()
        wait_for(self.spooled, "the result")
        process.kill()
        process.wait()
        self.find_server()
        self.work()
        self.assertDelivered()

    def test_results_are_delivered_by_a_worker_that_sees_the_server_back(
            self):
        def meanwhile():
            wait_for(lambda: self.client.workers()["workers"], "a worker")
            self.leave_updates(2)
            self.lose_server()
            wait_for(lambda: self.said()[1], "a word on it")
            self.find_server()
            self.await_states("done", "done")
            os.kill(os.getpid(), signal.SIGTERM)

        _, err = self.work("--idle-timeout", "1000", "--stage", "4",
                           meanwhile=meanwhile, status=143)
        self.assertRegex(err, r"\A.*: The server at .* can't be reached"
                         r" .* Waiting for it\.\n.* is back\.\n\Z")
        self.assertDelivered(2)

    def test_a_worker_that_ends_tries_a_lost_server_once_more(self):
        def meanwhile():
            self.outlive_server()
            wait_for(self.spooled, "the result")
            self.find_server()
            os.kill(os.getpid(), signal.SIGTERM)

        self.patch(worker, "backoff", lambda: itertools.repeat(1000))
        self.add(UNTIL_GO)
        self.work(meanwhile=meanwhile, status=143)
        self.assertDelivered()

    def test_send_spool_delivers_and_says_how_many(self):
        self.leave_updates(101)
        self.assertEqual((0, "101 results were delivered.\n", ""),
                         self.send_spool())
        self.assertDelivered(101)
        self.assertEqual((0, "0 results were delivered.\n", ""),
                         self.send_spool())

    def test_a_late_result_is_dropped_with_a_line(self):
        self.leave_updates(2)
        self.client.cancel(ids=[1])
        self.client.retry(ids=[1])
        job = self.client.get(0, lease=60)
        status, out, err = self.send_spool()
        self.assertEqual((0, "1 result was delivered.\n"), (status, out))
        self.assertRegex(err, r"\Aworker\.py: Job 1: [^\n]*dropped[^\n]*\n\Z")
        self.assertEqual([], self.spooled())
        self.assertEqual(["working", "done"], self.states())
        self.leave_outcomes((1, "x", "fail", {}), (2, "x", "release", {}))
        _, out, err = self.send_spool()
        self.assertEqual("0 results were delivered.\n", out)
        self.assertRegex(err, r"Job 1: .* Dropped\.\n.*Job 2: .* Dropped\.\n")
        self.client.update_job(1, 2, job["claim"])

    def test_a_result_that_the_server_refuses_fails_its_attempt_alone(self):
        self.add(*["true"] * 3, max_attempts=1)
        self.leave_outcomes(*[
            (job["jobid"], job["claim"], "update",
             {"jobstage": 2, "filename": "f" if job["jobid"] != 2 else [1]})
            for job in self.client.get(0, lease=600, n=3)])
        self.send_spool()
        self.assertEqual(["done", "failed", "done"], self.states())
        self.assertIn("Its result: ", self.attempts(2)[0]["error"])

    def test_a_torn_line_costs_nothing_else(self):
        self.leave_updates(2)
        name, = os.listdir(self.spool)
        path = os.path.join(self.spool, name)
        os.truncate(path, os.path.getsize(path) - 5)
        self.assertEqual((0, "1 result was delivered.\n", ""),
                         self.send_spool())
        self.assertEqual(["done", "working"], self.states())

    def test_a_malformed_outcome_is_dropped_with_a_line(self):
        self.add("true")
        values = {"jobstage": 2, "jobcmd": "echo > forged"}
        for claim, verb, given in (
                (None, "update", values), ("", "update", values),
                ("c", "progress", values), ("c", "call", values),
                ("c", "fail", [])):
            self.leave_outcomes((1, claim, verb, given))
            self.assertEqual(
                (0, "0 results were delivered.\n", "worker.py: Job 1: its"
                 " result in the spool is malformed and is dropped.\n"),
                self.send_spool())
            self.assertFalse(os.path.exists(self.spool))
        self.assertEqual(["waiting"], self.states())

    def test_what_is_no_spool_file_is_kept_and_holds_nothing_up(self):
        self.leave_updates(1)
        os.mkdir(os.path.join(self.spool, "0.spool"))
        os.mkfifo(os.path.join(self.spool, "1.spool"))
        os.symlink(WORKER, os.path.join(self.spool, "2.spool"))
        with open(os.path.join(self.spool, "3.spool"), "wb") as file:
            file.write(b"\377\n[]\n{}\n")
        self.assertEqual((0, "1 result was delivered.\n", ""),
                         self.send_spool())
        self.assertEqual(["%d.spool" % i for i in range(4)],
                         sorted(os.listdir(self.spool)))

    # The spool, driven by hand

    OUTCOME = worker.Outcome("x", 1, "c", "release", {"stderr": "." * 99})

    def spools(self, names):
        return [worker.Spool(self.spool, name) for name in names]

    def test_a_result_after_a_full_disk_is_whole(self):
        spool, other = self.spools("ab")
        spool.add([self.OUTCOME])
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (250, limits[1]))
        try:
            with self.assertRaises(OSError):
                spool.add([self.OUTCOME] * 2)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        spool.add([self.OUTCOME] * 2)
        os.close(spool.fd)  # its worker has ended
        self.assertEqual([self.OUTCOME] * 3, other.adopt("x"))

    def test_a_spool_file_is_never_without_its_owner(self):
        spool, other = self.spools("ab")
        lock = spool.lock

        def lock_late(fd):
            self.assertEqual([], other.adopt("x"))
            other.clear()
            return lock(fd)

        spool.lock = lock_late
        spool.add([self.OUTCOME])
        self.assertEqual(["a.spool"], os.listdir(self.spool))
        self.assertEqual([], other.adopt("x"))

    def test_a_spool_file_that_another_delivers_meanwhile_is_not_ours(self):
        gone, first, late = self.spools("abc")
        gone.add([self.OUTCOME])
        os.close(gone.fd)  # its worker has ended
        lock = late.lock

        def lock_late(fd):
            self.assertEqual(1, len(first.adopt("x")))
            first.clear()
            return lock(fd)

        late.lock = lock_late
        self.assertEqual([], late.adopt("x"))

    def test_a_spool_file_that_grew_meanwhile_is_kept(self):
        live, other = self.spools("ab")
        other.lock = live.lock = lambda fd: True  # as where there are no locks
        live.add([self.OUTCOME])
        self.assertEqual([self.OUTCOME], other.adopt("x"))
        live.add([self.OUTCOME])
        other.clear()
        self.assertEqual([self.OUTCOME] * 2, other.adopt("x"))

    def test_a_folder_is_left_alone_where_nothing_was_spooled(self):
        os.makedirs(self.spool)
        self.work()
        self.assertTrue(os.path.isdir(self.spool))

    def test_a_folder_that_others_can_write_is_refused(self):
        for mode in (0o777, 0o1777, 0o770):
            folder = self.path("shared%o" % mode)
            os.mkdir(folder)
            os.chmod(folder, mode)
            for argv in (["--spool", folder], ["--logs", folder],
                         ["--spool", folder, "--send-spool"]):
                found = self.here(
                    worker.main, "--idle-timeout", "0.05", *argv)
                self.assertEqual((1, ""), found[:2])
                self.assertRegex(
                    found[2], r"worker\.py: Other users can write to the"
                    r" folder %s: .*mkdir -m 700[^\n]*\n\Z" % folder)

    def test_a_folder_that_others_make_meanwhile_is_not_used(self):
        def fail(reason):
            raise OSError(reason)

        folder = self.path("new")
        spool = worker.Spool(folder, "a")
        log = worker.OutputLog(os.path.join(folder, "a"), fail)
        os.mkdir(folder)
        os.chmod(folder, 0o777)
        with self.assertRaisesRegex(OSError, "mkdir -m 700"):
            spool.add([self.OUTCOME])
        with self.assertRaisesRegex(OSError, "mkdir -m 700"):
            log.add(b"1 0 1 1", 1, b"text")

    # Another server, or none that is well

    def test_results_of_another_server_stay_where_they_are(self):
        self.leave_outcomes((1, "c", "update", {}), space="another")
        left = self.spooled()
        self.add("true")
        self.work()
        self.assertEqual(left, self.spooled())
        self.assertEqual(["done"], self.outcomes())

    def test_a_worker_stays_with_its_jobix_when_another_takes_the_file(self):
        def meanwhile():
            self.await_states("working")
            self.lose_server()
            self.open("other.db")
            self.go()
            wait_for(self.spooled, "the result")
            with self.assertRaisesRegex(worker.Trouble, "to another server"):
                self.client.locate()
            os.kill(os.getpid(), signal.SIGTERM)

        self.patch(worker.Claims, "LAST", 0.2)
        self.add(UNTIL_GO)
        self.work(meanwhile=meanwhile, status=143)
        self.assertEqual(1, len(self.spooled()))
        self.find_server()
        self.work()
        self.assertDelivered()

    def test_results_that_can_be_written_nowhere_wait_in_memory(self):
        """They are lost if the worker ends before its server is back."""
        def meanwhile():
            self.outlive_server()
            wait_for(lambda: "can't be written" in self.said()[1],
                     "a word on it")
            if ends:
                os.kill(os.getpid(), signal.SIGTERM)
            else:
                self.find_server()

        self.patch(worker.Claims, "LAST", 0.2)
        self.add(UNTIL_GO)
        open(self.path("taken"), "w").close()
        for ends, said in (
            (True, "1 result lost: the server can't be"), (False, "back")):
            _, err = self.work("--spool", "taken", meanwhile=meanwhile,
                               status=143 if ends else 0)
            self.assertIn(said, err)
            if ends:
                self.find_server()
                self.client.release(ids=[1])
                os.unlink(self.path("go"))
        self.assertEqual(["released", "done"], self.outcomes())

    def answer(self, status):
        """Let something at the server's address answer with a status."""
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                asked.append(self.path)
                self.send_response(status)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_):
                pass

            do_POST = do_GET

        asked = []
        server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(
            target=server.serve_forever, args=(0.01,), daemon=True).start()
        jobman.write_access(
            self.access, "http://127.0.0.1:%d" % server.server_port,
            self.server.store)
        wait_for(lambda: asked, "a try")
        server.shutdown()
        server.server_close()

    def test_results_wait_for_a_server_that_answers_502_or_503(self):
        def meanwhile():
            self.outlive_server()
            wait_for(self.spooled, "the result")
            self.answer(502)
            self.answer(503)
            self.find_server()

        self.add(UNTIL_GO)
        self.work(meanwhile=meanwhile)
        self.assertDelivered()

    def test_results_wait_while_a_server_refuses_the_jobix(self):
        other = self.open("other.db", self.path("other.json"))
        jobman.write_access(
            self.access, "http://127.0.0.1:%d" % other.server_port,
            self.server.store)
        for outcome in ((1, "c", "update", {"jobstage": 2}),
                        (1, "c", "fail", {})):
            self.leave_outcomes(outcome)
            self.assertEqual(1, self.send_spool()[0])
            self.assertEqual(1, len(self.spooled()))
            self.unlock_spools()
        self.work(status=1)

    def test_a_worker_ends_in_time_while_the_server_hangs(self):
        self.close(self.server)
        server, _ = self.serve()
        self.client.locate()
        self.patch(worker.Claims, "LAST", 0.2)
        self.add(UNTIL_GO)

        def meanwhile():
            self.await_states("working")
            server.send_signal(signal.SIGSTOP)
            self.go()
            os.kill(os.getpid(), signal.SIGTERM)

        self.addCleanup(server.send_signal, signal.SIGCONT)
        self.work(meanwhile=meanwhile, status=143)
        self.assertEqual(1, len(self.spooled()))


@slow
class EndTest(WorkerCase):
    """How a worker ends: by signals, in time, or killed."""

    STUBBORN = "trap '' INT TERM HUP USR1; echo $$ >> pids;" \
        " sleep 60 & echo $! >> pids; while :; do wait; sleep 0.1; done"

    def assertReleased(self, *jobids):
        """Assert that jobs wait as if nobody had ever tried them."""
        for jobid in jobids:
            job = self.job(jobid)
            self.assertEqual(("waiting", 0, 0, 0), tuple(
                job[k] for k in ("state", "stage", "attempt", "failures")))
            self.assertEqual("released", self.outcomes(jobid)[-1])

    def temporary(self):
        """Return what is in the folder for temporary files."""
        return os.listdir(self.environment["TMPDIR"])

    def commands(self):
        """Return the commands of our workers that run, and all they began."""
        mark = "JOBMAN_RESULT=%s/" % self.environment["TMPDIR"]
        pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]
        return [pid for pid in pids if alive(pid) and any(
            entry.startswith(mark.encode()) for entry in environment_of(pid))]

    # By signals

    def test_a_signal_is_passed_on_and_all_is_released(self):
        for number, status in (
            (signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129),
            (signal.SIGUSR1, 0),
        ):
            name, ids = number.name[3:], [3 * number + i for i in range(3)]
            with self.subTest(signal=name):
                handle = "trap 'echo %s >> got; exit %%d' %s;" \
                    " echo $$ >> pids; sleep 60 & wait" % (name, name)
                commands = handle % 0, handle % 1, self.STUBBORN
                self.client.set({i: {"jobstage": 0, "jobcmd": command}
                                 for i, command in zip(ids, commands)})
                process = self.start("--slots", "3", "--grace", "0.5")
                pids = self.pids(4)
                process.send_signal(number)
                self.assertEqual((status, "", ""), self.finish(process))
                self.assertEqual([name] * 2,
                                 read(self.path("got")).decode().split())
                self.assertReleased(*ids)
                self.assertDead(pids)
                self.assertEqual([], self.temporary())
                self.begin_anew()

    def begin_anew(self):
        """Cancel the jobs, and remove what they have written."""
        self.client.cancel(all=True)
        for name in "pids", "got":
            os.unlink(self.path(name))

    def test_a_command_and_its_children_have_the_whole_grace(self):
        def meanwhile():
            self.pids(2)
            os.kill(os.getpid(), signal.SIGTERM)

        self.add("(trap 'sleep 0.7; echo child >> saved; exit' TERM;"
                 " echo >> pids; while :; do sleep 0.05; done) &"
                 " trap 'echo parent >> saved; exit' TERM;"
                 " echo $$ >> pids; while :; do sleep 0.05; done")
        self.work("--grace", "20", meanwhile=meanwhile, status=143)
        self.assertEqual(b"parent\nchild\n", read(self.path("saved")))
        self.assertReleased(1)

    def test_the_reading_of_outputs_has_the_grace_too(self):
        reading, release = threading.Event(), threading.Event()

        def results(*args):
            reading.set()
            release.wait(PATIENCE)

        def meanwhile():
            reading.wait(PATIENCE)
            os.kill(os.getpid(), signal.SIGTERM)

        self.patch(worker, "results", results)
        self.add("echo > made", outputs=["made"])
        self.work("--grace", "0.3", meanwhile=meanwhile, status=143)
        release.set()
        self.assertReleased(1)

    def test_process_groups_of_a_command_end_with_it(self):
        def meanwhile():
            pids.extend(self.pids(9))
            self.client.cancel(ids=[1])
            wait_for(lambda: sum(map(alive, pids)) == 3, "two ends")
            os.kill(os.getpid(), signal.SIGTERM)

        pids = []
        groups = "bash -c 'timeout 200 sleep 60 & echo $! >> pids; set -m;" \
            " sleep 60 & echo $! >> pids; echo $$ >> pids; wait'"
        self.patch(worker.Worker, "GRACE", 3)
        self.add(groups, groups, max_attempts=1)
        self.client.set({3: {"jobstage": 0, "jobcmd": groups, "timeout": 1,
                             "max_attempts": 1}})
        self.work("--slots", "3", "--grace", "3", meanwhile=meanwhile,
                  status=143)
        self.assertDead(pids)
        self.assertEqual(["cancelled", "waiting", "failed"], self.states())

    def test_a_second_sigint_ends_at_once_and_a_second_sigterm_does_not(self):
        for number, status, how in ((signal.SIGINT, 130, "killed"),
                                    (signal.SIGTERM, 143, "saved")):
            with self.subTest(signal=number.name):
                self.add("trap 'echo >> got' INT TERM; echo $$ >> pids;"
                         " %s; echo > saved" % UNTIL_GO)
                process = self.start("--grace", "1000")
                pids = self.pids(1)
                process.send_signal(number)
                wait_for(lambda: read(self.path("got")), "the signal")
                process.send_signal(number)
                if how == "saved":
                    self.go()
                self.assertEqual(status, self.finish(process)[0])
                self.assertEqual(how == "saved",
                                 os.path.exists(self.path("saved")))
                self.assertDead(pids)
                self.assertReleased(1)
                self.begin_anew()
                self.client.retry(all=True)

    def test_a_signal_ends_a_long_poll(self):
        def meanwhile():
            wait_for(lambda: polls, "a poll")
            os.kill(os.getpid(), signal.SIGTERM)

        get, polls = worker.Client.get, []

        def note(client, *args, **options):
            polls.append(options["wait"])
            return get(client, *args, **options)

        self.patch(worker.Client, "get", note)
        self.patch(worker.Claimer, "LONGEST_WAIT", 2 * PATIENCE)
        self.work("--idle-timeout", "1000", meanwhile=meanwhile, status=143)
        self.assertEqual([2 * PATIENCE], polls)

    def test_a_hangup_does_nothing_under_nohup(self):
        self.add("echo $$ >> pids; " + UNTIL_GO)
        process = self.start(preexec_fn=lambda: signal.signal(
            signal.SIGHUP, signal.SIG_IGN))
        self.pids(1)
        process.send_signal(signal.SIGHUP)
        self.go()
        self.assertEqual(0, self.finish(process)[0])
        self.assertEqual(["done"], self.outcomes())

    def test_a_command_that_hears_of_the_end_first_is_released(self):
        """One that a signal ends alone has failed, a second later."""
        def meanwhile():
            os.killpg(self.pids(1)[0], signal.SIGTERM)
            wait_for(lambda: self.outcomes() == ["failed"], "the failure")
            concluded.clear()
            os.killpg(self.pids(2)[1], signal.SIGTERM)
            concluded.wait(PATIENCE)
            os.kill(os.getpid(), signal.SIGTERM)

        conclude, concluded = worker.Worker.conclude, threading.Event()
        self.patch(worker.Worker, "conclude", lambda *args, **options: (
            concluded.set(), conclude(*args, **options)))
        self.add(*["echo $$ >> pids; exec sleep 60"] * 2, max_attempts=1)
        self.work(meanwhile=meanwhile, status=143)
        self.assertEqual(143, self.attempts()[0]["exit_code"])
        self.assertReleased(2)

    def test_what_has_not_begun_is_released(self):
        def meanwhile():
            self.await_states(*["working"] * 5)
            os.kill(os.getpid(), signal.SIGTERM)

        self.ahead(lambda _: 4)
        self.add("sleep 60", *["true"] * 4)
        self.work("--grace", "0.2", meanwhile=meanwhile, status=143)
        self.assertReleased(1, 2, 3, 4, 5)

    # In time

    def test_a_time_limit_or_the_end_of_a_slurm_job_drains(self):
        self.patch(worker, "MARGIN", 8.5)
        self.add("sleep 60")
        for argv, environment in (
            (("--time-limit", "10s"), {}),
            ((), {"SLURM_JOB_ID": "7",
                  "SLURM_JOB_END_TIME": "%d" % (time.time() + 12)}),
        ):
            with self.subTest(argv=argv):
                self.environment.update(environment)
                status, _, err = self.here(
                    worker.main, "--idle-timeout", "1000", "--slots", "1",
                    "--grace", "0.5", *argv)
                self.assertEqual(0, status)
                self.assertIn("0 jobs done, its time is over\n", err)
                self.assertEqual(["waiting"], self.states())

    def test_nothing_is_begun_that_is_known_to_take_too_long(self):
        self.client.set({i: {"jobstage": stage, "jobcmd": "true"}
                         for i, stage in ((1, 0), (2, 0), (3, 2), (4, 4))})
        job = self.client.get(0, lease=60)
        self.client.update_job(1, 8, job["claim"], seconds=1000)
        self.work("--stage", "0,2", "--time-limit", "5m")
        self.assertEqual([8, 0, 4, 4], [
            self.job(i)["stage"] for i in (1, 2, 3, 4)])
        _, err = self.work("--stage", "0", "--time-limit", "5m")
        self.assertRegex(err, r"\Aworker\.py: No job is known to be short"
                         r" enough for the 2\d\d seconds that are left\.\n\Z")
        self.work("--stage", "0", "--time-limit", "2h")
        self.assertEqual(2, self.job(2)["stage"])

    def test_batch_systems_say_how_long_a_job_has(self):
        end = time.strftime("%Y-%m-%dT%H:%M:%S",
                            time.localtime(time.time() + 1000))
        began = time.strftime("%a %b %e %H:%M:%S %Y",
                              time.localtime(time.time() - 600))
        slurm = "JobId=7\n   StartTime=2020-01-01T00:00:00 EndTime=%s Dead"
        pbs = "Job Id: 7.pbs\n    Resource_List.walltime = %s\n" \
            "    stime = " + began + "\n    obittime = " + began
        for program, told, left in (
            ("scontrol", slurm % end, 1000),
            ("scontrol", slurm % "Unknown", None),
            ("scontrol", "", None),
            ("qstat", pbs % "01:00:00", 3000),
            ("qstat", pbs % "3600", None),
            ("qstat", "    Walltime.Remaining = 1234\n", 1234),
            ("qstat", "Unknown Job", None),
        ):
            job, asked = {
                "scontrol": ({"SLURM_JOB_ID": "7"}, b"show job 7\n"),
                "qstat": ({"PBS_JOBID": "7.pbs"}, b"-f 7.pbs\n")}[program]
            with self.subTest(told=told):
                with open(self.path(program), "w") as file:
                    file.write("#!/bin/sh\necho \"$@\" > %s/asked\n"
                               "cat <<END\n%s\nEND\n" % (self.folder, told))
                os.chmod(self.path(program), 0o700)
                with replaced_environment(dict(
                        job, PATH=self.folder + ":" + os.environ["PATH"])):
                    found = worker.allocation_left(os.environ)
                if left is None:
                    self.assertIsNone(found)
                else:
                    self.assertAlmostEqual(left, found, delta=20)
                self.assertEqual(asked, read(self.path("asked")))

    # Its folder

    def test_a_job_that_removes_the_workers_folder_spoils_no_other(self):
        self.add('rm -r "$(dirname "$JOBMAN_RESULT")"',
                 "echo '{\"jobcmd\": 1}' > \"$JOBMAN_RESULT\"",
                 max_attempts=1)
        self.work()
        self.assertEqual(["done"] * 2, self.states())

    def test_a_folder_that_another_user_made_anew_is_not_believed(self):
        if os.geteuid():
            self.skipTest("only root can give a folder to another user")
        forge = 'folder=$(dirname "$JOBMAN_RESULT"); rm -r "$folder";' \
            ' mkdir -m 777 "$folder"; echo "{\\"jobcmd\\": \\"forged\\"}"' \
            ' > "$JOBMAN_RESULT"; chown -R 1234 "$folder"'
        self.add(forge, "echo $JOBMAN_RESULT >> log", max_attempts=1)
        self.work()
        self.assertEqual(["failed", "done"], self.states())
        self.assertIn("to another user", self.attempts()[0]["error"])
        made = os.path.dirname(read(self.path("log")).decode())
        self.assertFalse(os.path.exists(made))
        left, = self.temporary()
        self.assertTrue(made.startswith(os.path.join(
            self.environment["TMPDIR"], left + ".")), made)

    def test_a_job_that_came_on_without_us_is_not_the_same_attempt(self):
        def meanwhile():
            self.pids(1)
            self.go()
            self.client.update_job(1, 2)  # as another worker might

        self.add("echo $JOBMAN_STAGE >> pids; [ -e go ] || exec sleep 60",
                 laststage=4)
        self.work("--stage", "0,2", "--slots", "2", meanwhile=meanwhile)
        self.assertEqual([0, 2], self.pids(2))
        self.assertEqual(["done"], self.states())

    # Killed

    def test_a_killed_worker_leaves_nothing_behind(self):
        self.add("echo $$ >> pids; sleep 60 & echo $! >> pids;"
                 " setsid sleep 60 & echo $! >> pids;"
                 " env -i sleep 60 & echo $! >> pids;"
                 " trap '' TERM INT HUP; while :; do wait; done",
                 self.STUBBORN)
        process = self.start("--slots", "2", start_new_session=True)
        pids = self.pids(6)
        for number in (signal.SIGINT, signal.SIGHUP, signal.SIGKILL):
            os.killpg(process.pid, number)  # the guard survives
        self.assertDead(pids)
        wait_for(lambda: not self.temporary(), "the folder's end")

    def test_workers_killed_at_any_moment_leave_nothing_behind(self):
        self.add(*["sleep 60 & setsid sleep 60 & sleep 0.0%d" % (i % 9)
                   for i in range(2000)], max_attempts=9)
        processes = [self.start("--slots", "2") for _ in range(4)]
        wait_for(lambda: len(self.client.workers()["workers"]) == 4,
                 "all guards")
        wait_for(lambda: len(self.commands()) > 8, "commands")
        for each in processes:
            time.sleep(random.uniform(0, 0.05))
            each.kill()
        wait_for(lambda: not self.commands(), "the end of all commands")
        wait_for(lambda: not self.temporary(), "the folders' end")

    def test_a_command_that_had_just_begun_dies_with_its_worker(self):
        self.add("setsid sleep 60")
        code = "\n".join((
            "import os, signal", "start = worker.start_process",
            "def killed(*args):", "    start(*args)",
            "    os.kill(os.getpid(), signal.SIGKILL)",
            "worker.start_process = killed"))
        self.spawn(*changed("worker", code)).wait()
        wait_for(lambda: not self.temporary(), "the folder's end")
        self.assertEqual([], self.commands())

    def test_a_daemon_outlives_a_worker_that_ends_well(self):
        self.add("setsid sh -c 'echo $$ >> pids; exec sleep 60' &"
                 " until [ -s pids ]; do sleep 0.01; done")
        self.work()
        pid, = self.pids(1)
        self.addCleanup(os.kill, pid, signal.SIGKILL)
        self.assertTrue(alive(pid))
        self.assertEqual([], self.temporary())

    def test_a_child_that_a_command_leaves_in_its_group_ends_with_it(self):
        def meanwhile():
            self.assertDead(self.pids(2)[:1])
            self.go()

        self.add("sleep 60 & echo $! >> pids", "echo $$ >> pids; " + UNTIL_GO)
        self.work(meanwhile=meanwhile)
        self.assertEqual(["done"] * 2, self.states())

    def test_a_worker_does_not_wait_for_zombies(self):
        self.add("sleep 60 & echo $! >> pids; echo $$ >> pids; wait")
        adopt = "import ctypes, subprocess, sys\n" \
            "ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # all orphans below\n" \
            "sys.exit(subprocess.call([sys.executable, *sys.argv[1:]]))"
        self.spawn("-c", adopt, WORKER, "--grace", "1000")
        pid = int(read("/proc/%d/stat" % self.pids(2)[1]).split()[3])
        os.kill(pid, signal.SIGTERM)
        wait_for(lambda: self.outcomes() == ["released"], "the release")
        self.assertTrue(read("/proc/%d/stat" % self.pids(2)[0]))

    def test_a_worker_goes_on_without_its_guard(self):
        self.add("echo $PPID >> pids; " + UNTIL_GO, "true")
        process = self.start()
        self.pids(1)
        children = read("/proc/{0}/task/{0}/children".format(process.pid))
        os.kill(int(children.split()[0]), signal.SIGKILL)
        self.go()
        self.assertEqual((0, "", ""), self.finish(process))
        self.assertEqual(["done"] * 2, self.states())
        self.assertEqual([], self.temporary())


def leaving(command, **result):
    """Return a command that also leaves `result` in JOBMAN_RESULT."""
    return "%s; printf %%s '%s' > \"$JOBMAN_RESULT\"" % (
        command, json.dumps(result))


class FilesTest(WorkerCase):
    """What a stage has made is there, unchanged, for the next."""

    USE = 'case $JOBMAN_STAGE in 0) %s;; *) echo used >> log;; esac'

    def files(self, jobid=1):
        """Return the files of a job as the server knows them."""
        return json.loads(self.job(jobid)["files"] or "null")

    def described(self, *names):
        """Return what is known of files in our folder, by other means."""
        found = []
        for name in names:
            path = os.path.join(os.path.realpath(self.folder), name)
            told = subprocess.check_output(["sha256sum", path]).decode()
            found.append({"path": path, "size": len(read(path)),
                          "sha256": told.split()[0]})
        return found

    def log(self):
        """Return the words that commands have written to the file `log`."""
        return read(self.path("log")).decode().split()

    def make(self, stages=4, **carried):
        """Do the first stage of a job that makes `out`, for the next."""
        made = leaving("echo made >> log; echo abc > out", outputs=["out"])
        self.add(self.USE % made, laststage=stages, **carried)
        self.work()
        self.assertEqual((2, "waiting"), (
            self.job()["stage"], self.job()["state"]))

    # What is recorded

    def test_the_files_of_a_stage_are_recorded(self):
        os.mkdir(self.path("there"))
        there = os.path.join(os.path.realpath(self.folder), "there")
        cases = (  # a command, what its job carries, the files
            (leaving("echo abc > a; : > b", outputs=["a", "b"]),
             {"outputs": ["none"]}, ["a", "b"]),
            ("echo abc > c", {"outputs": ["c"]}, ["c"]),
            (leaving("echo abc > d", filename="d"), {}, ["d"]),
            (leaving("echo abc > e", filename="e", outputs=["e"]), {}, ["e"]),
            (leaving("true", filename="no file"), {}, []),
            (leaving("echo a > a; echo b > b", filename="b"),
             {"outputs": ["a"], "cwd": there}, ["there/a", "there/b"]),
        )
        self.client.set({
            jobid: dict(carried, jobstage=0, laststage=2, jobcmd=command)
            for jobid, (command, carried, _) in enumerate(cases, 1)})
        self.work()
        for jobid, (command, _, names) in enumerate(cases, 1):
            with self.subTest(command=command):
                self.assertEqual(self.described(*names),
                                 self.files(jobid) or [])
        self.assertEqual(0, self.job()["files_stage"])
        self.assertEqual(["done"] * 6, self.states())

    def test_outputs_have_any_name(self):
        os.mkdir(self.path("a b"))
        names = ["a b/$HOME", "caf\udcff\n", "größe"]
        self.environment["LC_ALL"] = "C"
        self.add(
            "printf 1 > 'a b/$HOME'; printf 2 > \"$(printf 'caf\\377\nx')\"; "
            "mv caf* \"$(printf 'caf\\377')\n\"; printf 3 > größe",
            outputs=names, laststage=4)
        self.client.set({
            jobid: {"jobstage": 0, "jobcmd": "true", "cwd": cwd,
                    "max_attempts": 1}
            for jobid, cwd in enumerate(("\ud800", "/größe"), 2)})
        self.assertEqual(0, self.finish(self.start("--stage", "0,2"))[0])
        here = os.path.realpath(self.folder)
        self.assertEqual([(os.path.join(here, name), 1) for name in names], [
            (file["path"], file["size"]) for file in self.files()])
        self.assertEqual(["done", "failed", "failed"], self.states())

    def test_an_output_that_is_no_file_fails_the_attempt(self):
        cases = (
            ("true", "0"), ("mkdir a", "a"), ("mkfifo b", "b"),
            ("ln -s nowhere c", "c"), ("true", "\ud800"), ("true", "a\0b"))
        self.add(*[leaving(command, outputs=[name])
                   for command, name in cases], max_attempts=1)
        self.client.set({
            jobid: {"jobstage": 0, "max_attempts": 1,
                    "jobcmd": leaving("true", filename=name)}
            for jobid, name in enumerate(("\ud800", "a\0b"), 7)})
        self.work()
        self.assertEqual(["failed"] * 8, self.states())
        for jobid in range(1, 7):
            self.assertIn("An output is missing: ",
                          self.attempts(jobid)[0]["error"])

    def test_a_worker_whose_folder_is_gone_says_so_of_outputs(self):
        self.add("rmdir $PWD", "true", outputs=["a"], max_attempts=1)
        os.mkdir(self.path("gone"))
        self.finish(self.start(cwd=self.path("gone")))
        self.assertEqual(["failed"] * 2, self.states())

    # What is looked at before the next stage

    def test_damaged_files_are_made_again_before_they_are_used(self):
        damage = {
            1: "printf aBc > 1; touch -r 2 1",  # of the same size and time
            2: ": > 2", 3: "rm 3", 4: "rm 4; mkdir 4; rm -f none",
            5: "rm 5; mkfifo 5", 6: "echo more >> 6", 7: "true",
        }
        use = "case $JOBMAN_STAGE in 0) %s;; *) cat %d >> used;; esac"
        self.add(*[
            use % (leaving("rm -rf %d; printf abc > %d; echo m%d >> log"
                           % (n, n, n), outputs=[str(n)]), n)
            for n in damage
        ], laststage=4)
        self.work()
        for command in damage.values():
            subprocess.check_call(command, shell=True, cwd=self.folder)
        _, err = self.work("--stage", "0,2", "--lag", "0")
        self.assertEqual(["done"] * 7, self.states())
        self.assertEqual(b"abc" * 7, read(self.path("used")))
        self.assertEqual(13, len(self.log()))
        for jobid in range(1, 7):
            self.assertEqual(1, self.job(jobid)["rejects"])
            self.assertEqual(["done", "rejected", "done", "done"],
                             self.outcomes(jobid))
            self.assertIn("/%d" % jobid, self.attempts(jobid)[1]["error"])
            self.assertIn("Job %d: files are missing or" % jobid, err)
        self.assertEqual(0, self.job(7)["rejects"])

    def test_the_stage_that_made_them_runs_with_what_it_was_given(self):
        first = 'echo "$JOBMAN_FILENAME" >> log; echo abc > out'
        second = leaving(first, outputs=["out"], jobcmd="echo used >> log")
        given = json.dumps({"filename": "second", "jobcmd": second})
        self.add(["sh", "-c", 'echo "$1" > "$JOBMAN_RESULT"', "sh", given],
                 laststage=6)
        self.work("--stage", "0,2")
        os.unlink(self.path("out"))
        self.work("--stage", "0,2,4", "--lag", "0")
        self.assertEqual(["second", "second", "used"], self.log())
        self.assertEqual(["done", "done", "rejected", "done", "done"],
                         self.outcomes())

    def test_a_job_whose_files_are_damaged_too_often_fails(self):
        self.make(max_attempts=1)
        os.unlink(self.path("out"))
        self.work("--stage", "0,2", "--lag", "0")
        job = self.job()
        self.assertEqual(("failed", 0, 1), (
            job["state"], job["stage"], job["rejects"]))
        self.assertEqual(["made"], self.log())

    def test_files_that_a_stage_leaves_alone_are_handed_on(self):
        self.make(stages=6)
        made = self.files()
        self.work("--stage", "2")
        self.assertEqual((made, 0), (self.files(), self.job()["files_stage"]))
        os.unlink(self.path("out"))
        self.work("--stage", "0,2,4", "--lag", "0")
        self.assertEqual(["made", "used", "made", "used", "used"],
                         self.log())
        self.assertEqual("done", self.job()["state"])

    def test_files_that_a_stage_has_changed_are_forgotten(self):
        change = "case $JOBMAN_STAGE in 0) %s;; 2) %s;; esac"
        for jobid, command in enumerate((
            "printf Abc > %d; touch -d @9 %d", "rm %d",
            "touch -r %d a; printf Abc > b; touch -r a b; mv b %d",
            "touch -r %d a; printf abcd > %d; touch -r a %d",
        ), 1):
            command = command.replace("%d", str(jobid))
            made = leaving("printf abc > %d" % jobid, outputs=[str(jobid)])
            self.client.set({jobid: {"jobstage": 0, "laststage": 6, "jobcmd":
                                     change % (made, command)}})
        self.work("--stage", "0,2,4", "--lag", "0")
        self.assertEqual([[]] * 4, [self.files(n) for n in (1, 2, 3, 4)])
        self.assertEqual(["done"] * 4, self.states())

    def test_a_job_in_the_stage_that_made_its_files_is_not_checked(self):
        self.make()
        os.unlink(self.path("out"))
        self.client.update_job(1, 0)
        self.work("--stage", "0", "--lag", "0")
        self.assertEqual(["done", "done"], self.outcomes())
        self.assertEqual(["made", "made"], self.log())

    def test_files_whose_names_no_file_can_have_are_not_there(self):
        self.add("true", laststage=4)
        job = self.client.get(0, lease=60)
        self.client.update_job(1, 0, job["claim"], files=[
            {"path": "\ud800", "size": 1, "sha256": "0" * 64}])
        self.assertEqual(0, self.job()["files_stage"])
        self.work()
        self.assertEqual((2, []), (self.job()["stage"], self.files()))

    def test_a_node_in_quarantine_does_not_judge_files(self):
        def meanwhile():
            self.await_states("working")
            self.client.set({2: {"jobstage": 2, "jobcmd": "echo to the log"}})

        self.make()
        os.rename(self.path("out"), self.path("later"))
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            act = pool.submit(meanwhile)
            status, _, _ = self.here(
                worker.main, "--slots", "2", "--stage", "2", "--lag", "60",
                "--logs", self.path("later", "logs"))
            act.result()
        self.assertEqual(3, status)
        self.assertEqual(["done", "released"], self.outcomes())

    def test_the_reading_of_a_large_file_holds_nothing_up(self):
        describe, go = worker.describe, threading.Event()

        def slowly(path):
            go.wait(PATIENCE)
            return describe(path)

        def meanwhile():
            wait_for(lambda: self.states()[1:] == ["done"] * 9, "the others")
            self.assertEqual("working", self.states()[0])
            go.set()

        self.patch(worker, "describe", slowly)
        self.client.set({1: {"jobstage": 0, "laststage": 2, "jobcmd":
                             "echo > large", "outputs": ["large"]}})
        self.add(*["true"] * 10)  # job 1 is there
        self.work("--slots", "2", meanwhile=meanwhile)
        self.assertEqual(["done"] * 10, self.states())


class LogTest(WorkerCase):
    """What commands print is kept, and found again."""

    def setUp(self):
        super().setUp()
        self.log_folder = self.path(".jobman", "logs")

    def work(self, *argv):
        """Let a worker that keeps output do all there is."""
        self.assertEqual((0, "", ""), self.here(
            worker.main, *self.SOON, *argv))

    def start(self, *argv):
        """Start such a worker in a process of its own."""
        return self.spawn(WORKER, *self.SOON, *argv)

    def kept(self):
        """Return the paths of the files in the folder of the logs."""
        return sorted(glob.glob(os.path.join(self.log_folder, "*")))

    def logs(self, *argv):
        """Return what `jobman.py logs` prints, without its own lines."""
        out, err = self.jobman("logs", *argv)
        return out, re.sub("^--- .*\n", "", err, flags=re.M)

    def test_both_streams_are_kept_and_printed_each_to_its_own(self):
        self.add("echo one; echo two >&2; echo three")
        self.work("--name", "node.cluster 7")
        self.assertEqual(("one\nthree\n", "two\n"), self.logs("1"))
        _, err = self.jobman("logs", "1")
        self.assertRegex(
            err, r"\A--- job 1, stage 0, attempt 1, node\.cluster_7, \d{4}-")

    def test_output_is_shown_and_followed_while_it_is_printed(self):
        def shown(**options):
            with contextlib.suppress(worker.Refused):
                return self.client.output(1, **options)

        self.add("echo ein; echo \u00e4; echo two >&2; " + UNTIL_GO
                 + "; echo end")
        reader = self.spawn(JOBMAN, "logs", "-f", "1")
        process = self.start("--name", "a/b")
        seen = {"stdout": "ein\n\u00e4\n", "stderr": "two\n",
                "running": True, "truncated": False}
        wait_for(lambda: shown() == seen, "its output")
        self.assertEqual(b"ein\n", reader.stdout.readline())
        self.assertEqual("\u00e4\n", reader.stdout.readline().decode())
        self.go()
        self.assertEqual((0, "end\n"), self.finish(reader)[:2])
        self.finish(process)
        self.assertEqual(
            dict(seen, running=False, stdout="ein\n\u00e4\nend\n"), shown())
        self.assertEqual(
            {"stdout": "nd\n", "stderr": "wo\n", "running": False,
             "truncated": True}, shown(bytes=3))
        store = self.server.store
        reading = worker.Client(
            url=self.client.url, jobix=store.reading_jobix)
        with contextlib.closing(reading):
            with self.assertRaisesRegex(worker.Refused, "--share-output"):
                reading.output(1)

    def test_output_is_there_after_a_kill(self):
        self.add("echo begun; echo on >&2; sleep 60")
        process = self.start()
        wait_for(lambda: self.kept() and read(self.kept()[0]).count(b"\n")
                 == 2, "its output")
        process.kill()
        process.wait()
        self.assertEqual(("begun\n", "on\n"), self.logs("1"))

    def test_a_log_that_somebody_has_changed_is_no_fault(self):
        self.add("echo here")
        self.work()
        index, out = self.kept()
        with open(index, "ab") as file:
            file.write(b"1 0 1 1 1 0 " + b"9" * 18 + b"\n1 0 1 1 1 "
                       + b"9" * 99 + b" 1\n")
        self.assertEqual("here\nhere\n", self.logs("1")[0])
        os.unlink(out)
        os.mkfifo(out)
        _, err = self.jobman("logs", "1", status=1)
        self.assertRegex(
            err, r"\njobman.py: The output in .* can't be read: .*\.\n\Z")

    def test_a_server_known_by_its_url_has_logs_too(self):
        self.add("echo here")
        self.work()
        self.environment["JOBMAN_URL"] = self.client.url
        self.environment["JOBMAN_JOBIX"] = str(self.client.jobix)
        os.unlink(self.access)
        self.assertEqual("here\n", self.logs("1")[0])

    def test_bytes_are_kept_as_they_are(self):
        self.add("printf 'caf\\351\\000\\r\\n'; printf '\\377' >&2; "
                 "seq 300000")
        self.work()
        self.environment["LC_ALL"] = "C"
        _, out, err = self.command(JOBMAN, "logs", "1")
        expected = "caf\udce9\0\r\n" + "".join(
            "%d\n" % n for n in range(1, 300001))
        self.assertEqual(expected[:1048576 - 1], out[:1048576 - 1])
        self.assertIn("\n\udcff", err)

    def test_attempts_and_stages_of_many_workers_come_in_order(self):
        command = 'echo "$JOBMAN_STAGE $JOBMAN_ATTEMPT"; ' \
            '[ "$JOBMAN_STAGE $JOBMAN_ATTEMPT" != "0 1" ]'
        self.add(command, "echo other", laststage=4)
        for stage, name in (("0", "z"), ("2", "a")):
            self.work("--stage", stage, "--name", name)
        out, err = self.jobman("logs", "1")
        self.assertEqual("0 1\n0 2\n2 1\n", out)
        heads = re.findall(
            r"--- job 1, stage (\d), attempt (\d), (\w),", err)
        self.assertEqual([("0", "1", "z"), ("0", "2", "z"), ("2", "1", "a")],
                         heads)

    def test_a_worker_has_two_private_files_for_any_number_of_jobs(self):
        self.add(*["true"] * 9)
        self.work()
        self.assertFalse(os.path.exists(self.log_folder))
        self.client.set({i: {"jobstage": 0, "jobcmd": "echo $JOBMAN_JOBID"}
                         for i in range(10, 40)})
        self.work("--slots", "4")
        index, output = self.kept()
        self.assertEqual((".index", ".out"), (index[-6:], output[-4:]))
        self.assertEqual(30, read(index).count(b"\n"))
        self.assertEqual([0o700, 0o600, 0o600], [
            stat.S_IMODE(os.stat(path).st_mode)
            for path in (self.log_folder, index, output)])
        self.assertEqual("37\n", self.logs("37")[0])

    def test_what_is_over_the_limit_is_cut_and_told(self):
        self.add("printf 1234567; printf 890 >&2; seq 99999 >&2; exit 1",
                 max_attempts=1)
        self.work("--log-limit", "9")
        out, err = self.logs("1")
        said = re.search(r"\n\[worker\.py cut (\d+) bytes here:"
                         r" --log-limit\]\n\Z", err)
        printed = len("1234567890") + sum(
            len("%d\n" % n) for n in range(1, 100000))
        self.assertEqual(printed - 9, int(said.group(1)))
        self.assertEqual(9, len(out + err[:said.start()]))
        self.assertLessEqual(read(self.kept()[0]).count(b"\n"), 3)
        tail = self.attempts()[0]["stderr"]
        self.assertTrue(tail.endswith("\n99998\n99999\n"))
        self.assertEqual(4096, len(tail))

    def test_output_of_many_jobs_and_of_those_in_a_state(self):
        self.add("echo 1", "echo 2; exit 1", "echo 3", max_attempts=1)
        self.client.submit("run3", [
            {"jobstage": 0, "laststage": 2, "jobcmd": "echo 4"}])
        self.work()
        for argv, expected in (
            (("1-2,4",), "1\n2\n4\n"), (("--state", "failed"), "2\n"),
            (("1-3", "--state", "done"), "1\n3\n"), (("run3",), "4\n"),
            (("last", "--stage", "2"), "4\n"),
        ):
            self.assertEqual(expected, self.logs(*argv)[0])
        for argv in ((), ("1", "--prune"), ("x,1",)):
            self.jobman("logs", *argv, status=2)

    def test_output_of_forgotten_jobs_is_removed(self):
        self.add("echo one")
        self.work()
        self.client.submit("run3", [{
            "jobstage": 0, "laststage": 2, "jobcmd": "seq 20000"}] * 2)
        self.work()
        self.client.forget(ids=[1, 2])
        out, _ = self.jobman("logs", "--prune")
        self.assertRegex(out, r"^Freed [23]\d bytes: .*\n$")
        self.assertEqual(2, len(self.kept()))  # job 3 is there
        out, err = self.jobman("forget", "all")
        self.assertEqual("1 job forgotten\n", out)
        self.assertRegex(err, r"^Freed 0\.2[12]\d* MB: .*\n$")
        self.assertEqual([], self.kept())

    def test_jobs_of_another_jobix_are_not_shown(self):
        self.add("echo mine")
        self.work()
        other = self.path("other.json")
        self.open("other.db", other)
        client = self.connect(other)
        client.set({1: {"jobstage": 0, "jobcmd": "echo theirs"}})
        where = "--access", other, "--logs", self.log_folder
        self.work(*where)
        self.assertEqual(4, len(self.kept()))
        self.assertEqual("mine\n", self.logs("1")[0])
        self.assertEqual("theirs\n", self.logs("1", *where)[0])
        for path in self.kept():
            self.assertNotIn(str(client.jobix), path)

    def test_files_that_are_not_ours_are_not_read(self):
        self.add("echo mine")
        self.work()
        index, output = self.kept()
        space = worker.namespace(self.client.jobix)
        for name, make in (
            ("fifo", os.mkfifo),
            ("link", lambda path: os.symlink(index, path)),
            ("theirs", lambda path: shutil.copy(index, path)),
        ):
            path = os.path.join(self.log_folder,
                                "%s.%s.a." % (name, space))
            make(path + "index")
            with open(path + "out", "w") as file:
                file.write("theirs")
        if os.geteuid():
            os.unlink(path + "index")
        else:
            os.chown(path + "index", 1234, -1)
        self.assertEqual("mine\n", self.logs("1")[0])
        os.rename(output, output + ".kept")
        os.symlink(output + ".kept", output)
        _, err = self.jobman("logs", "1", status=1)
        self.assertRegex(err, r"\n.*symbolic links")

    def test_nothing_printed_is_one_sentence(self):
        self.jobman("logs", "1", status=1)
        self.add(*["echo x"] * 11)  # the index has a line for 11
        self.work()
        out, err = self.jobman("logs", "12", status=1)
        self.assertEqual("", out)
        self.assertRegex(err, r"\Ajobman\.py: There is no [^\n]*\.\n\Z")

    def test_a_reader_that_goes_is_no_error(self):
        self.add("seq 150000")
        self.work()
        script = '"$@" | head -n 2; echo "${PIPESTATUS[0]}"'
        done = subprocess.check_output(
            ["bash", "-c", script, "-", sys.executable, JOBMAN, "logs", "1"],
            env=self.environment, stderr=subprocess.STDOUT, cwd=self.folder)
        self.assertEqual(b"1\n2\n0\n", done.partition(b"\n")[2])

    def test_offsets_are_right_after_a_write_that_was_cut_short(self):
        disk = self.small_disk()
        failures = []
        log = worker.OutputLog(
            os.path.join(disk, "logs", "x"), failures.append)
        self.addCleanup(lambda: [os.close(fd) for fd in log.fds])
        log.add(b"1 0 1 1", 1, b"a" * 300000)
        self.assertEqual(1, len(failures))
        os.truncate(log.path + ".out", 100)
        log.add(b"1 0 1 1", 1, b"second")
        self.assertEqual(b"1 0 1 1 1 100 6\n", read(log.path + ".index"))


class VerifyTest(WorkerCase):
    """jobman.py verify looks at the files of what is done."""

    def setUp(self):
        super().setUp()
        self.patch(jobman, "delay_after", lambda failures: 1000)
        self.client.set({number: {
            "jobstage": 0, "laststage": 2, "outputs": [str(number)],
            "jobcmd": "echo made > $JOBMAN_JOBID",
        } for number in (1, 2, 3)})
        self.work()
        self.realpath = os.path.realpath(self.folder)

    def verify(self, *argv, status=0):
        """Run verify; return its standard error."""
        out, err = self.jobman("verify", "--lag", "0", *argv, status=status)
        self.assertEqual("", out)
        return err

    def test_intact_files_are_left_alone(self):
        self.assertEqual("The files of 3 done jobs checked: 0 damaged.\n",
                         self.verify())
        self.assertEqual(["done"] * 3, self.states())

    def test_damaged_jobs_are_told_to_programs_too(self):
        os.unlink(self.path("1"))
        argv = "verify", "--lag", "0", "--dry-run", "--output"
        out, _ = self.jobman(*argv, "json", status=1)
        self.assertEqual({"checked": 3, "damaged": [
            {"jobid": 1, "files": [self.realpath + "/1"]}]}, json.loads(out))
        self.assertEqual("1\n", self.jobman(*argv, "quiet", status=1)[0])

    def test_damaged_files_send_their_jobs_back(self):
        os.unlink(self.path("1"))
        with open(self.path("3"), "r+") as file:
            file.write("MADE")
        for argv, now, states in (
            (("--dry-run",), "", ["done"] * 3),
            ((), " (now delayed in stage 0)", ["delayed", "done", "delayed"]),
        ):
            err = self.verify(*argv, status=1)
            self.assertEqual(
                "job 1: missing or changed: %s/1%s\n"
                "job 3: missing or changed: %s/3%s\n"
                "The files of 3 done jobs checked: 2 damaged.\n"
                % ((self.realpath, now) * 2), err)
            self.assertEqual(states, self.states())

    def test_all_pages_are_looked_at(self):
        made = json.loads(self.job()["files"])
        self.client.submit("many", [{"jobstage": 0, "laststage": 2}] * 1200)
        jobs = self.client.get(0, lease=60, n=1200)
        self.client.update_jobs([
            {"jobid": job["jobid"], "jobstage": 2, "claim": job["claim"],
             "files": made} for job in jobs])
        self.client.update_job(jobs[-1]["jobid"], 2, files=[
            dict(made[0], size=1)])
        err = self.verify("--dry-run", status=1)
        self.assertIn("job %d: " % jobs[-1]["jobid"], err)
        self.assertIn("The files of 1203 done jobs checked: 1 damaged.\n", err)

    def test_files_may_be_late(self):
        os.rename(self.path("1"), self.path("later"))
        process = self.spawn(JOBMAN, "verify", "--lag", "60")
        self.assertIn(b"job 1: waiting for its files",
                      process.stderr.readline())
        os.rename(self.path("later"), self.path("1"))
        self.assertEqual(
            (0, "", "The files of 3 done jobs checked: 0 damaged.\n"),
            self.finish(process))

    def test_a_job_that_has_moved_meanwhile_is_left(self):
        def look(files, lag, ending):
            if files and not os.path.exists(files[0]["path"]):
                self.client.retry(ids=[1])
                return files
            return ()

        self.patch(worker, "await_files", look)
        os.unlink(self.path("1"))
        self.assertRegex(self.verify(status=1),
                         "missing or changed: .*/1\n")
        self.assertEqual(("waiting", 0), (
            self.job()["state"], self.job()["rejects"]))

    def test_without_worker_or_server_it_is_one_sentence(self):
        _, err = self.jobman("verify", "--access", "nowhere", status=1)
        self.assertRegex(err, r"\Ajobman\.py: .*no access file nowhere.*\n\Z")
        shutil.copy(JOBMAN, self.folder)
        status, out, err = self.command(self.path("jobman.py"), "verify")
        self.assertEqual((1, ""), (status, out))
        self.assertRegex(err, r"\Ajobman\.py: .*worker.py is needed.*\n\Z")


class QuarantineTest(WorkerCase):
    """A node on which all commands fail does no harm to the jobs."""

    def test_a_bad_node_is_found_out_and_the_jobs_are_done_elsewhere(self):
        def meanwhile():
            wait_for(lambda: len(self.outcomes_of("bad")) >= 3, "failures")
            self.go()

        self.patch(worker.NodeCheck, "PATIENCE", 1000)
        self.add(*['[ -z "$BROKEN" ] && { %s; }' % UNTIL_GO] * 12,
                 max_attempts=10)
        good = self.start("--idle-timeout", "1000", "--name", "good")
        wait_for(lambda: self.client.workers()["workers"], "the good one")
        self.environment["BROKEN"] = "1"
        _, err = self.work("--name", "bad", meanwhile=meanwhile, status=3)
        self.assertRegex(err, r"In quarantine: \d+ jobs in a row failed here")
        self.await_states(*["done"] * 12)
        good.terminate()
        self.assertEqual(143, self.finish(good)[0])
        self.assertLess(self.outcomes_of("bad").count("failed"), 6)
        told, = self.client.workers()["workers"]  # the good one has ended
        self.assertEqual("bad", told["name"])
        self.assertIn("in a row failed here", told["quarantine"])

    def outcomes_of(self, name):
        """Return how a worker's attempts ended."""
        query = "select outcome from attempt where worker = ?"
        return [row["outcome"] for row in
                rows(self.path("jobman.db"), query, name)]

    def test_jobs_that_fail_everywhere_put_nobody_in_quarantine(self):
        self.patch(worker.NodeCheck, "PATIENCE", 0.5)
        self.client.heartbeat("other", 60, [], stages=[0])
        self.add(*["exit 1"] * 8, "true", max_attempts=1)
        self.work()
        self.assertEqual(["failed"] * 8 + ["done"], self.states())

    def test_a_lone_worker_is_not_held_up(self):
        self.patch(worker.NodeCheck, "PATIENCE", 1000)
        self.add(*["exit 1"] * 20, "true", max_attempts=1)
        self.work()
        self.assertEqual(["failed"] * 20 + ["done"], self.states())

    # NodeCheck, driven by hand

    def check(self, patience=PATIENCE):
        """Return the NodeCheck of a node, and three jobs."""
        self.client.forget(all=True)
        self.add(*["true"] * 3, max_attempts=10)
        check = worker.NodeCheck(self.client, "here", [0])
        check.PATIENCE = patience
        self.client.heartbeat("here", 60, [], stages=[0])
        self.client.heartbeat("there", 60, [], stages=[0])
        return check

    def fail_here(self, check):
        """Let the next three jobs fail here."""
        for job in self.client.get(0, worker="here", lease=60, n=3):
            self.client.fail_job(job["jobid"], job["claim"])
            check.record(job, failed=True, seconds=0.1)

    def end_there(self, done):
        """Let another worker end three jobs, once they are free."""
        jobs = []
        wait_for(lambda: jobs.extend(self.client.get(
            0, worker="there", lease=60, n=3)) or len(jobs) == 3, "jobs")
        for job in jobs:
            if done:
                self.client.update_job(job["jobid"], 2, job["claim"])
            else:
                self.client.fail_job(job["jobid"], job["claim"])

    def verdict(self, check):
        return check.await_verdict(threading.Event())

    def test_three_that_are_done_elsewhere_make_a_node_bad(self):
        check = self.check()
        self.fail_here(check)
        self.assertTrue(check.suspect())
        self.end_there(done=True)
        self.assertIn("3 jobs in a row", self.verdict(check))

    def test_what_fails_elsewhere_too_is_the_jobs_fault(self):
        check = self.check()
        self.fail_here(check)
        self.end_there(done=False)
        self.assertIsNone(self.verdict(check))
        self.assertEqual({}, check.failed)

    def test_suspicion_ends_after_a_while_but_what_failed_counts_on(self):
        check = self.check(patience=0.1)
        self.fail_here(check)
        self.assertIsNone(self.verdict(check))
        self.assertFalse(check.suspect())
        self.end_there(done=True)
        self.client.set({
            jobid: {"jobstage": 0, "jobcmd": "true"} for jobid in (4, 5, 6)})
        check.PATIENCE = PATIENCE
        self.fail_here(check)
        self.assertIn("3 jobs in a row", self.verdict(check))

    def test_what_was_done_elsewhere_before_it_failed_here_does_not_count(
            self):
        check = self.check(patience=0.1)
        self.end_there(done=True)
        self.client.retry(all=True)  # the command has been spoilt since
        self.fail_here(check)
        self.assertIsNone(self.verdict(check))

    def test_few_slow_or_repeated_failures_say_nothing(self):
        for ends, suspect in (
            ([(1, 1), (2, 1), (3, 1)], True),
            ([(1, 1), (1, 1), (1, 1), (2, 1)], False),
            ([(1, 11), (2, 11), (3, 11)], False),
            ([(1, 1), (2, 1), (9, None), (3, 1)], False),
        ):
            check = self.check()
            for jobid, seconds in ends:
                check.record({"jobid": jobid, "jobstage": 0},
                             failed=bool(seconds), seconds=seconds)
            self.assertEqual(suspect, check.suspect())

    def test_a_worker_that_cannot_tell_is_not_awaited(self):
        for told, heard in (({"stages": [2]}, 120), ({"stages": [0]}, -1),
                            ({"stages": [0], "quarantine": "bad"}, 120)):
            with self.subTest(told=told, heard=heard):
                check = self.check()
                check.HEARD = heard
                for jobid in (1, 2, 3):
                    check.record({"jobid": jobid, "jobstage": 0}, True, 0.1)
                self.assertTrue(check.suspect())
                self.client.heartbeat("there", 60, [], **told)
                self.assertIsNone(self.verdict(check))
                self.assertEqual({}, check.failed)

    # A full disk

    def test_a_node_whose_disk_is_full_puts_itself_in_quarantine(self):
        disk = self.small_disk()
        self.fill(disk)
        logs = "--logs", self.path("logs")
        for argv, job, environment, outcome in (
            ((), {"jobcmd": "echo x > more", "cwd": disk}, {}, "released"),
            (logs, {"jobcmd": "echo x > %s/more" % disk}, {"TMPDIR": disk},
             "released"),
            (("--logs", disk + "/logs"),
             {"jobcmd": "yes | head -c 100000"}, {}, "done"),
        ):
            with self.subTest(argv=argv, environment=environment):
                kept = self.environment
                self.environment = dict(kept, **environment)
                self.client.cancel(all=True)
                jobid, = self.client.submit(str(len(self.states())), [
                    dict(job, jobstage=0, laststage=2)])
                status, _, err = self.here(
                    worker.main, "--idle-timeout", "0.1", "--slots", "1",
                    "--name", "here", *argv)
                self.environment = kept
                self.assertEqual(3, status, err)
                self.assertNotIn("Traceback", err)
                self.assertEqual([outcome], self.outcomes(jobid))
                told, = self.client.workers()["workers"]
                self.assertIn(disk, told["quarantine"])
                self.assertIn("In quarantine: " + told["quarantine"], err)


class LibraryTest(WorkerCase):
    """worker.py as a library, in programs as people write them."""

    def setUp(self):
        super().setUp()
        self.options = {"access": self.access, "idle_timeout": 0.1, "lag": 0}
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(self.folder)

    def jobs(self, stage=0, **options):
        """Return the iterator of a program, which ends with the test."""
        jobs = worker.claim_jobs(stage, **dict(self.options, **options))
        self.addCleanup(jobs.close)
        return jobs

    def program(self, text, **options):
        """Start a program that has worker.py beside it."""
        with open(self.path("program.py"), "w", encoding="utf-8") as file:
            file.write("import sys, time\nimport worker\n" + text)
        self.environment["PYTHONPATH"] = HERE
        return self.spawn("program.py", **options)

    def test_a_program_that_keeps_the_iterator_ends(self):
        self.add(1, 2)
        self.assertEqual((0, "", ""), self.finish(self.program(
            "jobs = worker.claim_jobs(stage=0)\n"
            "for job in jobs:\n    job.done()\n    break")))
        self.assertEqual(["done", "waiting"], self.states())

    def test_jobs_are_claimed_and_done(self):
        self.add({"n": 1}, {"n": 2}, filename="given", laststage=4)
        for i, job in enumerate(self.jobs(), 1):
            self.assertEqual(
                (i, 0, 1, {"n": i}, "given", False),
                (job.jobid, job.stage, job.attempt, job.jobcmd, job.filename,
                 job.lost))
            job.done(filename="made-%d" % job.jobid, jobcmd=[7])
            self.assertFalse(job.lost)
        for jobid in (1, 2):
            job = self.client.job(jobid)
            self.assertEqual((2, "waiting", "made-%d" % jobid, [7]), (
                job["stage"], job["state"], job["filename"], job["jobcmd"]))
        self.assertEqual([], self.client.workers()["workers"])

    def test_a_drained_program_gives_back_what_a_long_poll_brings(self):
        process = self.program(
            "for job in worker.claim_jobs(name='me', idle_timeout=60):\n"
            "    job.done()\n")
        wait_for(lambda: self.client.workers()["workers"], "a heartbeat")
        self.client.drain("me")
        self.assertIn(b": Drained: ", process.stderr.readline())
        self.add("a")
        wait_for(lambda: self.outcomes() == ["released"], "its return")
        self.assertEqual(["waiting"], self.states())
        self.client.undrain("me")
        self.await_states("done")

    def test_an_exception_in_the_loop_fails_the_attempt_and_goes_on_up(self):
        self.add("x", max_attempts=1)
        jobs = self.jobs()
        with self.assertRaisesRegex(LookupError, "nothing there"):
            for _ in jobs:
                raise LookupError("nothing there")
        jobs.close()
        self.assertEqual(["failed"], self.states())

    def test_an_exception_in_with_fails_the_attempt_and_the_loop_goes_on(
            self):
        self.add("bad", "good", max_attempts=1)
        for job in self.jobs():
            with job:
                if job.jobcmd == "bad":
                    raise LookupError("nothing there")
        self.assertEqual(["failed", "done"], self.states())
        attempt = self.attempts()[0]
        self.assertEqual("LookupError: nothing there", attempt["error"])
        self.assertIn("Traceback", attempt["stderr"])
        self.assertIn("in test_an_exception_in_with", attempt["stderr"])
        out, _ = self.jobman("job", "1")  # it is told once
        self.assertRegex(out, r"(?m)^why +failed: LookupError: nothing there$")

    def test_a_job_that_is_left_without_a_word_has_failed(self):
        self.add("x", "y", "z", max_attempts=1)
        jobs = self.jobs()
        for job in jobs:
            if job.jobid == 2:
                break
        jobs.close()
        self.assertEqual(["failed", "failed", "waiting"], self.states())
        self.assertIn("without job.done()", self.attempts()[0]["error"])

    def test_a_job_can_be_failed_or_released_once(self):
        self.add("fail", "release", max_attempts=1)
        for job in self.jobs():
            if job.jobcmd == "fail":
                job.fail("no luck", exit_code=9, stderr="s")
                job.done()  # only the first end counts
            else:
                job.release()
                break
        self.assertEqual(["failed", "waiting"], self.states())
        attempt = self.attempts()[0]
        self.assertEqual(("no luck", 9, "s"), (
            attempt["error"], attempt["exit_code"], attempt["stderr"]))
        self.assertEqual(["released"], self.outcomes(2))

    def test_an_interrupt_in_with_releases(self):
        self.add("x")
        with self.assertRaises(KeyboardInterrupt):
            for job in self.jobs():
                with job:
                    raise KeyboardInterrupt
        self.assertEqual(["released"], self.outcomes())

    def test_done_raises_when_an_output_is_missing(self):
        self.add("x", max_attempts=1)
        jobs = self.jobs()
        with self.assertRaisesRegex(OSError, "no-such-file"):
            for job in jobs:
                job.done(outputs=["no-such-file"])
        jobs.close()
        self.assertEqual(["failed"], self.states())

    def test_a_missing_output_in_with_fails_the_attempt_and_goes_on(self):
        self.add("x", "y", "z", outputs=["out"], max_attempts=1)
        for job in self.jobs():
            with job:
                if job.jobid == 1:
                    job.done(outputs=["no-such-file"])
                if job.jobid == 3:
                    open("out", "w").close()
        self.assertEqual(["failed", "failed", "done"], self.states())
        for jobid, name in ((1, "no-such-file"), (2, "out")):
            self.assertIn(name, self.attempts(jobid)[0]["error"])

    def test_a_lost_claim_is_seen_and_its_result_is_dropped(self):
        self.add("x")
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            for job in self.jobs():
                self.client.cancel(ids=[1])
                wait_for(lambda job=job: job.lost, "the loss")
                job.done(filename="late")
        self.assertIn("Job 1: its result is too late and is dropped",
                      said.getvalue())
        self.assertEqual(["cancelled"], self.outcomes())
        self.assertIsNone(self.job()["filename"])

    def test_a_result_waits_on_disk_for_a_server_that_is_away(self):
        self.patch(worker.Claims, "LAST", 0.2)
        self.add("x")
        jobs = self.jobs()
        with contextlib.redirect_stderr(io.StringIO()):
            for job in jobs:
                self.close(self.server)
                job.done(filename="kept")  # returns
                break
            jobs.close()
        self.unlock_spools()
        spool, = glob.glob(self.path(".jobman", "spool", "*"))
        self.assertIn(b"kept", read(spool))
        self.server = self.open()
        self.client.locate()
        self.work()  # delivers what was left
        self.assertEqual(("done", '"kept"'), (
            self.job()["state"], self.job()["filename"]))

    def test_files_are_looked_at_before_the_next_stage(self):
        self.add("x", laststage=6)
        for damage in (True, False):
            for job in self.jobs():
                with open("out", "w") as file:
                    file.write("abc")
                job.done(outputs=["out"])
            if damage:
                os.truncate("out", 2)
            for job in self.jobs(stage=2):
                self.assertFalse(damage)
                job.done()
        self.assertEqual(["done", "rejected", "done", "done"],
                         self.outcomes())
        files = json.loads(self.job()["files"])
        self.assertEqual(([3], 0), (
            [file["size"] for file in files], self.job()["files_stage"]))

    def test_a_stages_name_stands_for_its_number(self):
        self.assertEqual({}, self.client.stages())
        given = {0: {"name": "align", "minutes": 5}, 2: {"name": "sort"}}
        self.assertEqual(given, self.client.stages(given))
        given[0] = {"name": "align"}
        self.assertEqual(
            given, self.client.stages({"align": {"minutes": None}}))
        self.assertEqual(5, self.client.lifetime("sort", 5))
        self.assertEqual(5, self.client.lifetime("sort"))
        self.client.set({i: {"jobstage": "align", "laststage": 4,
                             "jobcmd": "true"} for i in range(1, 5)})
        self.client.pause("align")
        self.assertIsNone(self.client.get("align"))
        self.client.resume("align")
        job = self.client.get("align", "sort", lease=60)
        self.assertEqual((1, 0), (job["jobid"], job["jobstage"]))
        self.client.update_job(1, "sort", job["claim"])
        self.assertEqual(1, self.client.get(["sort", "align"])["jobid"])
        self.assertEqual(1, self.client.release(ids=[1]))
        self.assertEqual(
            0, self.client.check_stages("sort", "align")[
                "n_bad_jobs were degraded:"])
        for name in ("absent", "not/a name"):
            with self.assertRaises(worker.Refused):
                self.client.pause(name)
        for job in self.jobs("align"):
            self.assertEqual(0, job.stage)
            job.done()
        self.work("--stage", "align,sort")
        self.assertEqual(["done"] * 4, self.states())
        _, err = self.work("--stage", "absent,0", status=1)
        self.assertEqual("worker.py: No stage has the name absent.\n", err)

    def test_run_calls_a_function_for_each_job(self):
        def square(job):
            return {"jobcmd": job.jobcmd ** 2}

        self.add(2, "bad", 3, max_attempts=1)
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            worker.run(square, stage=0, **self.options)
        self.assertEqual(["done", "failed", "done"], self.states())
        self.assertEqual(["4", '"bad"', "9"], [
            self.job(n)["jobcmd"] for n in (1, 2, 3)])
        self.assertIn("TypeError", said.getvalue())
        self.assertIn("in square", self.attempts(2)[0]["stderr"])

    def test_run_leaves_a_job_alone_that_its_function_has_ended(self):
        self.add("x")
        with self.assertRaises(SystemExit):
            worker.run(lambda job: job.release() or sys.exit(5),
                       **self.options)
        self.assertEqual(["released"], self.outcomes())

    def test_the_manuals_program_runs_as_it_stands(self):
        readme = read(os.path.join(HERE, "README.md")).decode()
        text, = re.findall(r"```python\n([^`]*claim_jobs.*?)```", readme,
                           re.S)
        for name, words in (("a", "x y Y"), ("b", ""), ("c", "z")):
            with open(self.path(name), "w") as file:
                file.write(words)
        with open(self.path("manual.py"), "w") as file:
            file.write(text)
        self.environment["PYTHONPATH"] = HERE
        for expected in ("%s/a: y\n%s/b: \n%s/c: z\n", ""):
            status, out, err = self.command("manual.py", "a", "b", "c")
            self.assertEqual((0, ""), (status, err))
            here = os.path.realpath(self.folder)
            self.assertEqual(expected.replace("%s", here), out)
        self.assertEqual(["done"] * 3, self.states())

    def test_a_job_shows_what_it_is_and_help_what_there_is(self):
        self.add(["cut", "-f1"])
        for job in self.jobs():
            self.assertEqual("<worker.Job 1 in stage 0: ['cut', '-f1']>",
                             repr(job))
            job.done()
        for name in worker.__all__:
            self.assertTrue(getattr(worker, name).__doc__)


NASTY = [
    b"it's", b'"', b"a  b", b" ", b"a\nb\n", b"$(touch pwned)",
    b"`touch pwned`", b"; touch pwned;", b"*", b"-n", b"", b"\\", b"$HOME",
    b"caf\xe9", "größe".encode(), b"{}", b"{#}", b"#", b"~", b"!x", b"%s",
]


class NewsTest(StoreCase):
    """What an attempt tells: how far it is, and a note for the next one."""

    def told(self, job, **news):
        """Send news of a claim with a heartbeat; return the job."""
        self.ok("/heartbeat", {"worker": "w", "lease": 60, "claims": [
            [job["jobid"], job["claim"], news]]})
        return self.ok("/job/%d" % job["jobid"])

    def shown(self, jobid=1):
        job = self.ok("/job/%d" % jobid)
        return job["progress"], job["note"]

    def test_a_heartbeat_tells_how_far_an_attempt_is(self):
        self.set_jobs([1])
        job = self.get(worker="w", lease=60)
        self.assertEqual((None, None), self.shown())
        told = self.told(job, progress=[0.4, "epoch 3"])
        self.assertEqual({"part": 0.4, "word": "epoch 3"}, told["progress"])
        self.assertIn("has done 40% of it (epoch 3) and has", told["why"])
        self.told(job, note="saved/3")
        self.assertEqual(({"part": 0.4, "word": "epoch 3"}, "saved/3"),
                         self.shown())
        self.told(job)  # changes nothing
        self.assertEqual({"part": 0.4, "word": "epoch 3"}, self.shown()[0])
        self.told(dict(job, claim="A" * 12), progress=[0.9, ""])
        self.assertEqual(0.4, self.shown()[0]["part"])
        self.assertReply(200, self.fail(job))
        self.assertEqual((None, "saved/3"), self.shown())

    def test_a_note_lasts_until_a_success(self):
        for end in ("lapse", "release", "fail", "sweep"):
            self.set_jobs([1], laststage=2)
            job = self.get(worker="w", lease=60)
            self.told(job, note="old")
            if end == "lapse":
                self.clock.advance(61)
            elif end == "sweep":
                self.ok("/release", {"ids": [1]})
            else:
                path = "/%s_job/1?claim=%s" % (end, job["claim"])
                self.ok(path, {"note": "new"})
                self.clock.advance(61)
            job = self.get(worker="w", lease=60)
            kept = "new" if end in ("release", "fail") else "old"
            with self.subTest(end):
                self.assertEqual(kept, job["note"])
            self.assertReply(200, self.update(job, 2))
            self.assertEqual((None, None), self.shown())
            self.ok("/forget", {"ids": [1]})

    def test_an_empty_note_takes_it_back(self):
        self.set_jobs([1])
        for end in ("fail", "release"):
            job = self.get(worker="w", lease=60)
            self.told(job, note="old")
            path = "/%s_job/1?claim=%s" % (end, job["claim"])
            self.ok(path, {"note": ""})
            self.assertEqual((None, None), self.shown())
            self.clock.advance(61)

    def test_bad_news_are_refused(self):
        self.set_jobs([1])
        job = self.get(worker="w", lease=60)
        for bad in (7, [], {"word": "x"}, {"progress": 0.5},
                    {"progress": [2, ""]}, {"progress": [-0.1, ""]},
                    {"progress": [True, ""]}, {"progress": ["1", ""]},
                    {"progress": [0.5, 1]}, {"progress": [0.5]},
                    {"note": 7}, {"note": "x" * 4097}):
            with self.subTest(bad):
                self.assertReply(400, self.post("/heartbeat", {
                    "worker": "w", "lease": 60,
                    "claims": [[1, job["claim"], bad]]}))
        self.assertReply(400, self.fail(job, note="x" * 4097))
        self.assertEqual((None, None), self.shown())


class NeedsTest(StoreCase):
    """Stages whose jobs need several cores, or memory."""

    def test_what_stages_need_is_kept_and_shown(self):
        for size, kept in ((5, 5), ("512", 512), ("1.5k", 1536),
                           ("500M", 500 * 2**20), ("4G", 2**32), ("0", 0),
                           (2**63 - 1, 2**63 - 1), ("2T", 2**41)):
            with self.subTest(size):
                needs = {"cores": 4, "memory": kept}
                self.assertEqual({"2": needs}, self.ok(
                    "/stages", {"2": {"cores": 4, "memory": size}}))
                row, = self.ok("/status")["stages"]
                self.assertEqual(needs, {name: row[name] for name in needs})
        self.restart()
        self.assertEqual({"2": {"cores": 4}},
                         self.ok("/stages", {"2": {"memory": None}}))
        self.assertEqual({}, self.ok("/stages", {"2": {"cores": None}}))
        self.assertEqual([], self.ok("/status")["stages"])

    def test_only_a_worker_that_is_large_enough_gets_a_job(self):
        self.ok("/stages", {"0": {"cores": 4, "memory": "1G"},
                            "4": {"cores": 2}})
        self.set_jobs([1])
        self.set_jobs([2], stage=2)
        self.set_jobs([4], stage=4)
        for query, stages in (
            ("", {0: (4, 2**30), 2: (None, None), 4: (2, None)}),
            ("cores=4&memory=%d" % 2**30, {0, 2, 4}),
            ("cores=3&memory=%d" % 2**40, {2, 4}),
            ("cores=99&memory=%d" % (2**30 - 1), {2, 4}),
            ("cores=1", {2}), ("memory=0", {2, 4}),
        ):
            with self.subTest(query):
                jobs = self.ok("/get/0,2,4?n=9&lease=60&" + query)
                found = {job["jobstage"]: (job.get("cores"),
                                           job.get("memory")) for job in jobs}
                self.assertEqual(set(stages), set(found))
                if type(stages) is dict:
                    self.assertEqual(stages, found)
                for job in jobs:
                    self.ok("/release_job/%d" % job["jobid"], {})
        for bad in ("cores=x", "memory=-1", "memory=4G"):
            self.assertReply(400, self.call("/get/0?" + bad))

    def test_why_a_job_waits_says_that_no_worker_is_large_enough(self):
        self.ok("/stages", {"0": {
            "name": "align", "cores": 16, "memory": "64G"}})
        self.set_jobs([1])
        beat = {"worker": "w", "lease": 60, "claims": [], "stages": [0]}
        short = "stage align needs 16 cores and 64 GiB for each job; its" \
            " largest worker has "
        soon = "1 worker with %s serves stage align, and works on 0 jobs:" \
            " its turn should come soon"
        for slots, memory, why in (
            (8, 2**37, short + "8 cores and 128 GiB"),
            (32, 2**35, short + "32 cores and 32 GiB"),
            (16, 2**36, soon % "16 slots"),
            (1, None, soon % "1 slot"),  # a program of its own says no memory
        ):
            self.ok("/heartbeat", dict(beat, slots=slots, memory=memory))
            self.assertEqual(why, self.ok("/job/1")["why"])
            lines = jobman.why_nothing_moves(
                self.ok("/status"), self.ok("/workers"))
            self.assertEqual([
                "1 job waits in align: each job needs 16 cores and 64 GiB,"
                " more than its workers have."] * ("largest" in why), lines)


@slow
class RoomTest(WorkerCase):
    """A worker starts what it has room for, in order."""

    def set_in(self, jobid, stage, command):
        """Add a job to a stage."""
        self.client.set({jobid: {
            "jobstage": stage, "laststage": stage + 2, "jobcmd": command,
            "max_attempts": 1}})

    def test_small_jobs_do_not_overtake_a_large_one(self):
        self.client.stages({1: {"cores": 2}})
        self.set_in(1, 0, "until [ -e go ]; do sleep 0.02; done; echo 1")
        process = self.start("--stage", "0,1", "--slots", "2")
        wait_for(lambda: self.states() == ["working"], "the first job")
        self.set_in(2, 1, "echo 2")
        wait_for(lambda: self.states() == ["working"] * 2, "a claim")
        self.set_in(3, 0, "echo 3")
        time.sleep(1.5)  # it would be given back after one
        self.assertEqual(["working"] * 2 + ["waiting"], self.states())
        self.go()
        status, out, err = self.finish(process)
        self.assertEqual((0, "1\n2\n3\n"), (status, out), err)
        self.assertEqual([["done"]] * 3, [
            self.outcomes(jobid) for jobid in (1, 2, 3)])

    def test_a_large_job_that_waits_too_long_goes_to_another_worker(self):
        self.client.stages({1: {"cores": 2}})
        self.set_in(1, 0, "until [ -e go ]; do sleep 0.02; done")
        changes = "worker.Worker.KEPT, worker.Worker.HELD = 0.5, 0.2"
        first = self.spawn(*changed("worker", changes), *self.SOON,
                           "--stage", "0,1", "--slots", "2")
        wait_for(lambda: self.states() == ["working"], "the first job")
        self.set_in(2, 1, "echo 2")
        wait_for(lambda: self.states() == ["working"] * 2, "a claim")
        other = self.start("--stage", "1", "--slots", "2",
                           "--idle-timeout", "60")
        wait_for(lambda: self.states() == ["working", "done"], "the other")
        other.terminate()
        self.assertEqual("2\n", self.finish(other)[1])
        self.go()
        self.assertEqual(0, self.finish(first)[0])

    def test_a_stage_whose_needs_were_lowered_is_served(self):
        self.client.stages({2: {"cores": 64}})
        self.set_in(1, 2, "true")
        changes = "worker.Claimer.LONGEST_WAIT = 0.2"
        process = self.spawn(*changed("worker", changes), *self.SOON,
                             "--stage", "0,2", "--idle-timeout", "60")
        wait_for(lambda: self.client.workers()["workers"], "the worker")
        self.client.stages({2: {"cores": None}})
        wait_for(lambda: self.states() == ["done"], "the job")
        process.terminate()
        self.finish(process)

    def test_jobs_that_need_much_run_one_at_a_time(self):
        alone = "mkdir alone && sleep 0.1 && rmdir alone"
        for stage, needs in ((0, {"cores": 2}), (1, {"memory": "60M"})):
            self.client.stages({stage: needs})
            for jobid in range(4):
                self.set_in(stage * 10 + jobid, stage, alone)
            _, err = self.work("--stage", str(stage), "--slots", "3",
                               "--memory", "100M")
            self.assertEqual("", err)
        self.assertEqual(["done"] * 8, self.states())
        self.assertEqual([["done"]] * 8, [
            self.outcomes(stage * 10 + jobid)
            for stage in (0, 1) for jobid in range(4)])

    def test_a_command_is_told_what_it_has(self):
        self.client.stages({1: {"cores": 2, "memory": "1M"}})
        self.environment.pop("OMP_NUM_THREADS", None)
        line = 'echo "$JOBMAN_CORES,$JOBMAN_MEMORY,$OMP_NUM_THREADS"'
        for jobid, threads, said in (
                (1, {}, "2,1048576,2\n1,,\n"),
                (3, {"OMP_NUM_THREADS": "7"}, "2,1048576,7\n1,,7\n")):
            self.environment.update(threads)
            self.set_in(jobid, 1, line)
            self.set_in(jobid + 1, 0, line)
            out, _ = self.work("--stage", "1,0", "--slots", "2")
            self.assertEqual(said, out)

    def test_a_worker_leaves_out_a_stage_for_which_it_is_too_small(self):
        self.client.stages({1: {"cores": 2}, 3: {
            "name": "sort", "memory": "3G"}})
        for jobid in (0, 1, 3):
            self.set_in(jobid, jobid, "echo %d" % jobid)
        out, err = self.work("--stage", "0,1,3", "--memory", "1.5G")
        self.assertEqual("0\n", out)
        self.assertEqual(
            "worker.py: Stage sort is left to others: each job needs 3 GiB,"
            " more than --memory 1.5 GiB.\n"
            "worker.py: Stage 1 is left to others: each job needs 2 cores,"
            " more than --slots 1.\n", err)
        self.assertEqual(["done", "waiting", "waiting"], self.states())
        self.assertEqual("", self.work("--stage", "1")[0])  # it ends

    def test_memory_is_the_least_that_is_allowed(self):
        machine = worker.memory_limit({})
        self.assertLessEqual(
            machine, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
        for given, limit in (("100", 100 * 2**20), ("0", machine),
                             ("", machine), ("9" * 12, machine)):
            self.assertEqual(limit, worker.memory_limit(
                {"SLURM_MEM_PER_NODE": given}))
        status, _, err = self.command(WORKER, "--memory", "4 apples")
        self.assertEqual(2, status)
        self.assertIn("'4 apples' is no size such as 500M or 64G", err)


@slow
class NoteTest(WorkerCase):
    """Commands that tell how far they are, and go on where others ended."""

    def test_a_command_tells_how_far_it_is_and_leaves_a_note(self):
        self.add("""
            if [ "$JOBMAN_ATTEMPT" = 1 ]
            then
                echo '0.25 step 1 of 4' > "$JOBMAN_PROGRESS"
                echo step1 > "$JOBMAN_NOTE"
                until [ -e go ]; do sleep 0.02; done
                exit 75
            fi
            cat "$JOBMAN_NOTE"; ls "$(dirname "$JOBMAN_NOTE")"
        """)
        process = self.start("--lease", "1", "--idle-timeout", "60")
        wait_for(lambda: self.client.job(1)["progress"] == {
            "part": 0.25, "word": "step 1 of 4"}, "progress")
        wait_for(lambda: self.client.job(1)["note"] == "step1\n", "the note")
        with open(self.path("go"), "w"):
            pass
        wait_for(lambda: self.states() == ["delayed"], "the failure")
        process.terminate()
        self.finish(process)
        wait_for(lambda: self.states() == ["waiting"], "the end of a delay")
        out, _ = self.work()
        self.assertEqual("step1\nresult-0.note\n", out)
        self.assertEqual("done", self.states()[0])
        self.assertIsNone(self.job()["note"])

    def test_a_command_can_take_back_its_note(self):
        self.add("rm $JOBMAN_NOTE; exit 1", max_attempts=1)
        job = self.client.get(0, lease=60)
        self.client.heartbeat("w", 60, [[1, job["claim"], {"note": "old"}]])
        self.client.release_job(1, job["claim"])
        self.assertEqual('"old"', self.job()["note"])
        self.work()
        self.assertEqual(("failed", None), (
            self.states()[0], self.job()["note"]))

    def test_what_is_no_progress_or_note_is_not_told(self):
        self.add("echo many > $JOBMAN_PROGRESS; mkfifo $JOBMAN_NOTE; exit 1",
                 "echo 7 > $JOBMAN_PROGRESS; head -c 5000 /dev/zero >"
                 " $JOBMAN_NOTE; exit 1", max_attempts=1)
        self.work()
        self.assertEqual(["failed"] * 2, self.states())
        self.assertEqual([None, None], [self.job(i)["note"] for i in (1, 2)])


USAGE = r"usage: [\s\S]*error: .*\n?"  # what wrong usage is told


@contextlib.contextmanager
def standard_files(*files):
    """Let files be standard input, output and error, also of children."""
    kept = [os.dup(fd) for fd in range(3)]
    streams = sys.stdout, sys.stderr
    for fd, file in enumerate(files):
        os.dup2(file.fileno(), fd)
    sys.stdout, sys.stderr = [
        io.TextIOWrapper(open(fd, "wb", closefd=False), "utf-8",
                         "backslashreplace", line_buffering=True)
        for fd in (1, 2)]
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = streams
        for fd, old in enumerate(kept):
            os.dup2(old, fd)
            os.close(old)


class Commands(TemporaryFolder):
    """Commands of jobman, called in this process or on a terminal."""

    def call_main(self, *argv, given=b"", main=jobman.main):
        """Call main() as a process does; return (status, stdout, stderr).

        It works in the test's folder. A process would take 0.3 s longer.
        """
        def give_up(*_):
            raise AssertionError("not within %d s: %s" % (PATIENCE, argv))

        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(tempfile.TemporaryFile())
                     for _ in range(3)]
            files[0].write(given)
            files[0].seek(0)
            for number in (signal.SIGALRM, signal.SIGINT, signal.SIGTERM,
                           signal.SIGHUP):
                stack.callback(
                    signal.signal, number, signal.getsignal(number))
            stack.callback(os.chdir, os.getcwd())
            stack.callback(signal.alarm, 0)
            signal.signal(signal.SIGALRM, give_up)
            signal.alarm(PATIENCE)
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")  # of what its exit would close
            with standard_files(*files), \
                    replaced_environment(self.environment):
                os.chdir(self.folder)
                try:
                    status = main([os.fsdecode(word) for word in argv])
                except SystemExit as ended:
                    status = ended.code
            for file in files:
                file.seek(0)
            out, err = (file.read().decode("utf-8", "surrogateescape")
                        for file in files[1:])
        return status, out, err

    def does(self, line, *words, status=0, err="", given=b""):
        """Run a command line, and more words; return what it prints.

        `err` is a pattern of what it says on standard error, None: anything.
        """
        found, out, said = self.call_main(
            *shlex.split(line), *words, given=given)
        self.assertEqual(status, found, said)
        if err is not None:
            self.assertRegex(said, r"\A%s\Z" % err)
        return out

    def assertPrints(self, *transcript):
        """Assert what commands print: (command line, output) in turn."""
        for line, out in transcript:
            self.assertEqual(out, self.does(line), line)

    def refused(self, line, *words, status=1, given=b""):
        """Return the one sentence that a command ends with."""
        found, out, err = self.call_main(
            *shlex.split(line), *words, given=given)
        self.assertEqual((status, ""), (found, out), err)
        self.assertRegex(err, r"\Ajobman\.py: [^\n]+\n\Z")
        return err

    def patch(self, owner, name, value):
        """Give an attribute another value for this test."""
        self.addCleanup(setattr, owner, name, getattr(owner, name))
        setattr(owner, name, value)

    def write(self, name, data, mode=0o600):
        """Write a file in the test's folder; return its path."""
        with open(self.path(name), "wb") as file:
            file.write(data)
        os.chmod(self.path(name), mode)
        return self.path(name)

    def on_terminal(self, line, *words, start=(JOBMAN,), size=(24, 80),
                    **options):
        """Start a command on a terminal; return (process, its screen)."""
        screen, terminal = pty.openpty()
        self.addCleanup(os.close, screen)
        fcntl.ioctl(screen, termios.TIOCSWINSZ, struct.pack("4H", *size, 0, 0))
        streams = dict.fromkeys(("stdin", "stdout", "stderr"), terminal)
        process = self.spawn(*start, *shlex.split(line), *words,
                             **dict(streams, **options))
        os.close(terminal)
        return process, screen

    def drawn(self, screen, text=None):
        """Return what a terminal shows until it is closed or has `text`."""
        shown, end = "", time.monotonic() + PATIENCE
        with contextlib.suppress(OSError):  # the last one has closed it
            while (not text or text not in shown) and time.monotonic() < end:
                if select.select([screen], [], [], 1)[0]:
                    block = os.read(screen, 65536).decode("utf-8", "replace")
                    shown = (shown + block).replace("\r\n", "\n")
        self.assertIn(text or "", shown)
        return shown


class CommandCase(Commands, StoreCase):
    """Commands that ask a server whose clock and store are at hand."""

    def setUp(self):
        super().setUp()
        self.environment["TZ"] = "UTC"
        with replaced_environment(self.environment):
            time.tzset()
        self.addCleanup(time.tzset)
        self.lead_to("http://%s:%d" % self.address)

    def lead_to(self, url):
        """Lead commands to a server."""
        self.environment.update(JOBMAN_URL=url, JOBMAN_JOBIX=str(self.jobix))

    def forget_server(self):
        """Make commands find the server by its access file."""
        for name in ("JOBMAN_URL", "JOBMAN_JOBIX"):
            del self.environment[name]

    def seen(self, line):
        """Return the JSON value that a command prints."""
        return json.loads(self.does(line + " --output json"))

    def listed(self, line):
        """Return what a command prints when quiet, in words."""
        return self.does(line + " --output quiet").split()

    def memory(self, line, given=None):
        """Return how many KiB of memory a command takes at most."""
        start = changed("jobman", "import atexit; atexit.register(lambda:"
                        " sys.stderr.write(open('/proc/self/status').read()))")
        status, _, err = self.command(*start, *line.split(), given=given)
        self.assertEqual(0, status, err)
        return int(re.search(r"VmHWM:\s+(\d+)", err)[1])

    def told(self):
        """Return {id: state}."""
        return {job["jobid"]: job["state"]
                for job in self.ok("/jobs?limit=1000")["jobs"]}

    def end(self, *ids):
        """Update jobs to stage 2, their last one."""
        for jobid in ids:
            self.assertReply(200, self.call("/update_job/%d/2" % jobid))

    def beat(self, worker, **about):
        """Send a heartbeat of a worker of stage 0; return the answer."""
        beat = dict({"stages": [0], "slots": 4, "busy": 4}, **about)
        beat.update(worker=worker, lease=60, claims=[])
        return self.ok("/heartbeat", beat)

    def meanwhile(self, *acts):
        """Run one of `acts` before each answer to /status.

        Keep the names of all calls in `calls`.
        """
        acts, self.calls, respond = list(acts), [], jobman.respond

        def noted(store, request):
            path = request.path.split("/")[1]
            self.calls.append(path)
            if path == "status" and acts:
                acts.pop(0)()
            return respond(store, request)

        self.replace("respond", noted)

    def nothing(self):
        """Let a call pass."""

    def interrupt(self):
        """Press Ctrl-C."""
        os.kill(os.getpid(), signal.SIGINT)


# For sitecustomize.py: Ctrl-C when a module is imported, or at the end.
STRUCK = """
import atexit, os, sys

class Finder:
    @staticmethod
    def find_spec(name, *_):
        if name == os.environ["MOMENT"]:
            os.kill(os.getpid(), 2)

sys.meta_path.insert(0, Finder)
if os.environ["MOMENT"] == "end":
    atexit.register(os.kill, os.getpid(), 2)
"""


class ActingTest(CommandCase):
    """Commands that change jobs, stages and workers."""

    def test_jobs_are_named_by_ids_state_and_stage(self):
        self.set_jobs(range(1, 10), laststage=2)
        self.set_jobs([20, 21], stage=4)
        self.assertPrints(
            ("cancel 1,3,5-6", "4 jobs cancelled\n"),
            ("cancel 9,20 --stage 4", "1 job cancelled\n"),
            ("retry --state cancelled --output json", '{"retried": 5}\n'),
            ("cancel --stage 4 --output quiet", ""))
        self.assertEqual({(0, "waiting"): 9, (4, "cancelled"): 2},
                         self.states())
        for job in self.get(0, n=3, lease=60):
            self.update(job, 2)
        self.get(0, lease=60)
        self.assertPrints(
            ("release all", "1 job released\n"),
            ("forget 1-2", "2 jobs forgotten\n"),
            ("forget all", "1 job forgotten\n"))
        self.assertEqual({(0, "waiting"): 6, (4, "cancelled"): 2},
                         self.states())

    def test_an_id_without_a_job_changes_nothing_in_its_part(self):
        self.set_jobs(range(5))
        self.assertIn("There is no job 5.", self.refused("cancel 3-5"))
        self.replace("IDS_AT_ONCE", 2)
        self.does("cancel 0-6", status=1, err="4 jobs cancelled before that."
                  "\njobman.py: There is no job 5.\n")
        self.assertEqual("waiting", self.told()[4])

    def test_a_change_of_more_than_100_jobs_needs_a_yes(self):
        self.ok("/lifetime/0/1")
        self.set_jobs(range(101))
        self.set_jobs(range(101, 110), stage=2)
        self.clock.advance(61)
        self.store.tick()
        self.assertPrints(  # only those that may change are counted
            ("retry all", "0 jobs retried\n"),
            ("cancel --state working", "0 jobs cancelled\n"),
            ("move 2 0", "0 expired jobs moved\n"))
        for named in ("all", "0-100", "--stage 0", "--state waiting"):
            self.assertRegex(
                self.refused("cancel " + named),
                r"That would cancel 1\d\d jobs; add --yes to do it\.")
        self.does("cancel --stage 2")
        self.does("cancel 0-99")
        self.assertEqual(1, self.states()[0, "waiting"])
        self.assertPrints(("retry all --yes", "109 jobs retried\n"))

    def test_only_a_person_at_a_terminal_is_asked(self):
        self.set_jobs(range(101))
        for line, reply, status, said in (
            ("cancel all", "\n", 1, "Nothing was changed."),
            ("cancel all", "y\n", 0, "101 jobs cancelled"),
            ("retry all", " YES \n", 0, "101 jobs retried"),
        ):
            process, screen = self.on_terminal(line)
            os.write(screen, reply.encode())
            shown = self.drawn(screen)
            self.assertEqual(status, process.wait(PATIENCE), shown)
            self.assertIn(
                "%s 101 jobs? [y/N]" % line.split()[0].title(), shown)
            self.assertIn(said, shown)
        ours, theirs = pty.openpty()
        self.addCleanup(os.close, ours)
        self.addCleanup(os.close, theirs)
        os.write(ours, b"y\n")
        for options in ({"stdin": theirs}, {
                "stdin": None, "preexec_fn": lambda: os.close(0)}):
            status, _, err = self.command(JOBMAN, "cancel", "all", **options)
            self.assertEqual(1, status)
            self.assertIn("That would cancel 101 jobs; add --yes", err)
        self.assertEqual({(0, "waiting"): 101}, self.states())

    def test_a_stage_goes_by_its_number_or_name(self):
        self.set_jobs([1, 2], stage=4)
        self.ok("/stages", {"4": {"name": "align"}})
        self.assertPrints(("pause 4", "stage 4 is paused\n"))
        self.assertEqual("nada", self.get(4))
        self.assertEqual(
            {"stage": 4, "paused": False}, self.seen("resume align"))
        self.assertPrints(
            ("pause align", "stage align is paused\n"),
            ("resume 4", "stage 4 is resumed\n"),
            ("lifetime align 1", "1\n"),
            ("cancel --stage align --state waiting", "2 jobs cancelled\n"),
            ("retry --stage align", "2 jobs retried\n"))
        self.clock.advance(61)
        self.store.tick()
        self.assertPrints(
            ("move align align", "2 expired jobs moved\n"),
            ("jobs --stage align --output quiet", "1\n2\n"))
        self.assertIn("No stage has the name merge.",
                      self.refused("resume merge"))

    def test_workers_are_drained_one_or_all(self):
        def drained():
            return [self.beat(name)["drain"] for name in names]

        names = ["a", "node 7/\u00e9"]
        self.assertEqual([False, False], drained())
        self.assertPrints(("drain a", "a claims no more\n"))
        self.assertEqual([True, False], drained())
        self.assertEqual(
            set(names), {each["worker"] for each in self.seen("drain all")})
        self.assertEqual([True, True], drained())
        self.does("undrain all")
        self.assertEqual([False, False], drained())
        self.assertIn("There is no worker b.", self.refused("drain b"))
        for i in range(99):
            self.beat("w%d" % i)
        self.assertIn("would drain 101 workers", self.refused("drain all"))
        self.does("drain all --yes")
        self.assertEqual([True, True], drained())

    def test_a_worker_that_ends_meanwhile_keeps_no_other_from_draining(self):
        def end(store, request):
            if "/drain/" in request.path:
                self.beat("b", ended=True)
            return respond(store, request)

        for name in "abcd":
            self.beat(name)
        respond = jobman.respond
        self.replace("respond", end)
        self.assertLessEqual({"a", "c", "d"}, set(self.listed("drain all")))
        self.assertTrue(self.beat("a")["drain"])

    def test_expired_jobs_are_moved(self):
        self.set_jobs([1, 2])
        self.ok("/lifetime/0/1")
        self.clock.advance(61)
        self.set_jobs([3])
        self.assertPrints(("move 0 6", "2 expired jobs moved\n"))
        self.assertEqual({(0, "waiting"): 1, (6, "waiting"): 2},
                         self.states())
        self.set_jobs(range(100, 201))
        self.clock.advance(61)
        self.store.tick()
        self.assertIn("would move 102 jobs;", self.refused("move 0 6"))
        self.assertEqual(
            102, self.seen("move 0 6 --yes")["n_bad_jobs were degraded:"])

    def test_lifetimes_are_shown_and_set(self):
        self.assertPrints(
            ("init 5 0", "stage  minutes\n    0        5\n    1        0\n"),
            ("lifetime 1", "0\n"), ("lifetime 1 90", "90\n"))
        self.assertEqual({"0": 5, "1": 90}, self.seen("lifetime"))
        self.assertIn("90", self.does("init 1", status=1, err=(
            "jobman.py: There are lifetimes already.*\n")))
        self.assertIn("90", self.does("init"))

    def test_ctrl_c_while_it_starts_or_ends_is_no_traceback(self):
        self.write("sitecustomize.py", STRUCK.encode())
        self.environment["PYTHONPATH"] = self.folder
        for argv, moments in (
            ((JOBMAN, "status"), ("argparse", "worker", "end")),
            ((WORKER, "--help"), ("argparse", "end")),
        ):
            for moment in moments:
                with self.subTest(program=argv[0], moment=moment):
                    self.environment["MOMENT"] = moment
                    status, _, err = self.command(*argv)
                    self.assertEqual("", err)
                    self.assertIn(
                        status, [-signal.SIGINT, 128 + signal.SIGINT])
                    if moment == "end":
                        continue
                    status, _, err = self.command(
                        *argv, preexec_fn=lambda: signal.signal(
                            signal.SIGINT, signal.SIG_IGN))
                    self.assertEqual((0, ""), (status, err))

    def test_a_jobix_alone_goes_with_the_access_files_address(self):
        self.set_jobs([1])
        self.forget_server()
        os.mkdir(self.path(".jobman"))
        self.write(".jobman/access.json", json.dumps({
            "url": "http://%s:%d" % self.address, "jobix": self.jobix + 1,
            "fingerprint": None}).encode())
        self.assertEqual([], self.listed("jobs"))
        self.environment["JOBMAN_JOBIX"] = str(self.jobix)
        self.assertEqual(["1"], self.listed("jobs"))
        self.environment["JOBMAN_JOBIX"] = "mine"
        self.assertIn("The jobix ($JOBMAN_JOBIX) must", self.refused("jobs"))

    def test_a_command_says_that_its_server_is_silent_or_away(self):
        self.patch(worker.Client, "LATE", 0)
        self.patch(worker.Client, "READ_TIMEOUT", 0)
        self.replace("PATIENCE", 1)
        with socket.socket() as silent:
            silent.bind(("127.0.0.1", 0))
            silent.listen(1)
            self.lead_to("http://127.0.0.1:%d" % silent.getsockname()[1])
            self.does("cancel all", status=1, err=(
                "jobman.py: The server at .* hasn't answered yet. .*\n"
                "jobman.py: The server at .* can't be reached.*\n"))
        self.does("cancel all", status=1, err=(
            r"(jobman.py: The server at .* can't be reached.*) Waiting for it"
            r"\.\n\1\n"))
        self.forget_server()
        self.assertIn("There is no access file", self.refused("cancel all"))


class UsageTest(Commands):
    """Wrong usage: exit status 2, and nothing is done."""

    WRONG = (  # a command line, and what is said of it
        ("", "name a command: serve, run,"),
        ("status --output xml", "--output"),
        ("workers --nmae x", r"arguments: --nmae x\n"),
        ("jobs ::: a", "::: belongs to run and submit"),
        # Jobs, stages, workers.
        ("retry", "name jobs: 1,3,5-8, a submission, last or all"),
        ("cancel", "name jobs"), ("release", "name jobs"),
        ("forget", "name jobs"), ("cancel 1x", "IDS: '1x' names no jobs"),
        ("cancel 3-1", "IDS"), ("cancel 1,,2", "IDS"), ("cancel -1", "IDS"),
        ("cancel 1 2", "unrecognized arguments: 2"),
        ("retry failed", "'failed' is a state: write --state failed"),
        ("cancel --state lost", "'lost' isn't one of waiting"),
        ("jobs --state fialed", "'fialed' isn't one of .*; did you mean fail"),
        ("cancel --stage -1", "--stage: '-1' isn't a stage"),
        ("cancel --stage 1000001", "--stage: .*write its number"),
        ("jobs --limit 0", "--limit: '0': it must be"),
        ("jobs --order size", "--order"),
        ("job", "JOBID"), ("job x", "JOBID: 'x': it must be an integer"),
        ("job 9007199254740992", "JOBID: .*it must be an integer"),
        ("wait 5-3", "1,3,5-8"), ("wait --timeout -1", "isn't a duration"),
        ("export --format xml", "--format"), ("watch 1 2", "unrecognized"),
        ("logs", "name jobs by ids"), ("logs 1 --prune", "with --prune name"),
        ("logs x,", "IDS: 'x' names no jobs; .*, or the name of a submission"),
        ("pause", "STAGE"), ("lifetime 1 x", "MINUTES: 'x': it must be"),
        ("lifetime 1 -1", "MINUTES"), ("lifetime 1 1.5", "MINUTES"),
        ("lifetime 1 1000000001", "MINUTES"), ("init x", "MINUTES"),
        ("stages 4", "give stage 4 a name"), ("stages 'x y=a'", "isn't a"),
        ("stages --cores 2", "name the stages whose jobs need that"),
        ("stages 4=map --memory 4GB", "a size such as 4G or 500M"),
        ("stages map --cores 0", "an integer from 1 to 10000"),
        # submit
        ("submit", "submit needs a command"), ("submit ''", "needs a command"),
        ("submit --prioritty 5 x", "--prioritty; did you mean --priority"),
        ("submit --stage -1 x", "--stage"), ("submit --laststage 1x x", "1x"),
        ("submit --priority 1.5 x", "--priority"),
        ("submit --max-attempts 0 x", "--max-attempts"),
        ("submit --retries -1 x", "--retries"),
        ("submit --timeout x x", "--timeout"),
        ("submit --after 1x x", "--after"), ("submit --name '' x", "--name"),
        ("submit --name last x", "'last' can't be a name"),
        ("submit --name 1-5 x", "a name is a letter"),
        ("submit --names a,b x", "a name for each command, 1 in all"),
        ("submit --names a,a x", "'a,a' has a name twice"),
        ("submit --names 7 x", "'7' can't be a name"),
        ("submit --array 1 --commands -", "--array or --commands, not both"),
        ("submit --array 1 x ::: 1", "::: or --array, not both"),
        ("submit --from-json - x", "--from-json has the commands"),
        ("submit --array '' x", "isn't numbers"),
        ("submit --array x x", "isn't numbers"),
        ("submit --array 5-1 x", "'5-1' isn't numbers"),
        ("submit --array 1-3:0 x", "isn't numbers"),
        ("submit --array 1- x", "isn't"), ("submit --array 1-2-3 x", "isn't"),
        ("submit 'ls -la' --priority 5", "--priority comes after the comm"),
        ("submit ls --then ls --names=a,b", "--names=a,b comes after"),
        ("submit 'echo {1} {2}' ::: a ::: b", "give one list of items"),
        ("submit 'echo {}' ::: a :::+ b", "give one list of items"),
        ("submit 'gzip {.}' ::: a", r"\{\.\} isn't supported"),
        ("submit ls --then", "--then needs a command"),
        # run
        ("run ::: a", "run needs a command"), ("run", "run needs a command"),
        ("run -a items x ::: a", "::: or --each-line, not both"),
        ("run --array 1 x ::: a", "not both"),
        ("run --retries -1 x ::: a", "--retries"),
        ("run x --db y ::: a", "--db comes after the command"),
        ("run x --then y --db z ::: a", "--db comes after the command"),
        ("run 'echo {.}'", r"\{\.\} isn't supported"),
        ("run --slots 0 x ::: a", "--slots"),
        ("run --slots many x ::: a", "--slots"),
        # serve
        ("serve ::: a", "::: belongs to run and submit"),
        ("serve --port 65536", "--port: .*from 0 to 65535"),
        ("serve --retries -1", "--retries"), ("serve --lapses 0", "--lapses"),
        ("serve --tls --plain", "choose one of --tls"),
        ("serve --plain --certfile x", "choose one of --tls"),
        ("serve --keyfile x", "--keyfile needs --certfile"),
        ("serve --new-jobix --jobix-file x", "--new-jobix can't be combined"),
        ("serve --new-jobix --shared", "--new-jobix can't be combined"),
        ("serve --new-jobix --open", "--new-jobix can't be combined"),
    )

    def check(self, line, said):
        """Check that a command line is refused, and what is said of it."""
        status, out, err = self.call_main(*shlex.split(line))
        self.assertEqual((2, ""), (status, out), err)
        usage, error, sentence = err.rpartition(" error: ")
        self.assertTrue(error and usage.startswith("usage: jobman.py"), err)
        self.assertRegex(sentence, said)
        return usage

    def test_wrong_usage_is_exit_status_2(self):
        for line, said in self.WRONG:
            with self.subTest(line=line):
                usage = self.check(line, said)
                self.assertIn("jobman.py %s" % line.split(" ")[0], usage)
        self.assertEqual([], os.listdir(self.folder))

    def test_an_unknown_command_is_named(self):
        self.check("jbos", "there is no command 'jbos'; did you mean jobs")
        self.check("walk", r"there is no command 'walk'\n\Z")

    def test_a_new_jobix_cannot_be_a_given_one(self):
        self.environment["JOBMAN_JOBIX"] = "7"
        self.check("serve --new-jobix", "can't be combined .*JOBMAN_JOBIX")

    def test_run_reads_no_items_from_a_terminal(self):
        process, screen = self.on_terminal("run echo")
        self.assertIn("give items after :::", self.drawn(screen))
        self.assertEqual(2, process.wait(PATIENCE))


class ArgumentTest(unittest.TestCase):
    """What ids, durations and stages are on the command line."""

    def test_ids_are_kept_as_ranges_in_order(self):
        for text, ranges in (
            ("17", [(17, 17)]),
            ("1,3,5-8", [(1, 1), (3, 3), (5, 8)]),
            ("9,5-5,007", [(5, 5), (7, 7), (9, 9)]),
            ("4-6,1-3", [(1, 6)]),
            ("1-10,3-4,8-12,12", [(1, 12)]),
            ("0-9007199254740991", [(0, 2**53 - 1)]),
            (" 1, 3 ", [(1, 1), (3, 3)]),
        ):
            with self.subTest(text=text):
                self.assertEqual(
                    [range(first, last + 1) for first, last in ranges],
                    jobman.read_ids(text))

    def test_a_duration_is_seconds_however_it_is_written(self):
        for text, seconds in (
            ("90", 90), ("90s", 90), ("0", 0), ("0.5", 0.5), ("2h30m", 9000),
            ("1d", 86400), ("1:00:00", 3600), ("1-12:00:00", 129600),
            ("5m", 300), ("1000000000", 10**9),
        ):
            with self.subTest(text=text):
                self.assertEqual(seconds, jobman.duration(text))

    def test_a_stage_is_its_number_or_its_name(self):
        for text, stage in (("7", 7), ("align", "align"), ("a.b-c_1",) * 2):
            self.assertEqual(stage, jobman.read_stage(text))

    def test_other_texts_are_refused(self):
        for read, said, texts in (
            (jobman.read_ids, "1,3,5-8", (
                "", ",", "1,", "1,,2", "-1", "1-", "8-5", "1-2-3", "1.5",
                "9007199254740992", "1-9007199254740992", "\u0663", "9" * 5000,
                "1 2", "0x1", "all", "-a", "run 3", "run3,4")),
            (jobman.duration, "isn't a duration; write", (
                "", "x", "-1", "1:00", "2h30", "m", "1000000001", "nan",
                "1e3", "9" * 50, "\u0663")),
            (jobman.read_stage, "isn't a stage; write", (
                "", "-1", "1.5", "1000001", "all", "last", "a b", "x" * 65)),
        ):
            for text in texts:
                with self.subTest(text=text[:20]):
                    with self.assertRaisesRegex(
                            argparse.ArgumentTypeError, said):
                        read(text)


@slow
class SubmitTest(CommandCase):
    """`submit`: jobs of many kinds, each once."""

    def carried(self, jobid):
        """Return what a job carries, without what is null."""
        job = self.ok("/job/%d" % jobid)
        names = "stage", *jobman.CARRIES, "waits_for"
        return {name: job[name] for name in names
                if job.get(name) not in (None, [], 0)}

    def work(self, *argv):
        """Run a worker until all is done; return the lines printed."""
        status, out, err = self.command(
            WORKER, "--print", "--quiet", "--idle-timeout", "0", *argv)
        self.assertEqual((0, ""), (status, err))
        return sorted(out.splitlines())

    def test_jobs_are_made_of_items_numbers_and_lines(self):
        self.write("items", b"a\n\nb\xff\n")
        self.write("todo", b"echo 1\n# no\n\n  \necho 2; echo 3\n")
        printed = []
        for words, given, said, lines in (
            (["echo {#} {}", ":::", "a", "b c", "d'e"], b"", "3 jobs: 1-3",
             ["1 a", "2 b c", "3 d'e"]),
            (["echo", "x;", "echo", "y"], b"", "1 job: 4", ["x", "y"]),
            (["--each-line", "items", "echo {}"], b"", "3 jobs: 5-7",
             ["", "a", "b\udcff"]),
            (["--each-line", "-", "echo"], b"c\nd", "2 jobs: 8-9", ["c", "d"]),
            (["-0", "-a", "-", "printf '%s;\n'"], b"a\nb\0c\0",
             "2 jobs: 10-11", ["a", "b;", "c;"]),
            (["--array", "1-9:4,20", "echo {} $JOBMAN_ITEM"], b"",
             "4 jobs: 12-15", ["1 1", "5 5", "9 9", "20 20"]),
            (["--array", "3", "sh -c 'echo $JOBMAN_ITEM' {}"], b"",
             "1 job: 16", ["3"]),
            (["--commands", "todo"], b"", "2 jobs: 17-18", ["1", "2", "3"]),
            (["--commands", "-", "--output", "quiet"], b"true\n", "19", []),
        ):
            self.assertEqual(
                said + "\n", self.does("submit", *words, given=given))
            printed += lines
        self.assertPrints(("submit --output quiet --commands -", ""))
        self.assertEqual(sorted(printed), self.work())
        self.assertEqual({(2, "done"): 19}, self.states())
        self.assertIn("Can't read no: No such file",
                      self.refused("submit --each-line no echo"))

    def test_a_command_is_shown_as_it_was_written(self):
        self.does("submit", "cp {} \"new {}\" '{#}'", ":::", "a", "b c")
        out = self.does("jobs")
        self.assertIn(" cp a \"new a\" '1'\n", out)
        self.assertIn(" cp 'b c' ", out)
        self.assertRegex(self.does("job 1"), "command +cp a ")
        odd = [1, 2, 3, 4, 5], ["a", "b", "c", "d", "e"], None
        self.set_jobs(dict(enumerate(odd, 9)))
        for jobid in range(9, 12):
            self.does("job %d" % jobid)

    def test_options_are_what_jobs_carry(self):
        self.does("submit", "--array", "1-2", "true")
        self.does("submit --stage 4 --laststage 8 --priority -5 --max-attempts"
                  " 7 --timeout 2.5 --cwd /tmp --after 1-2 -- a --priority 5")
        self.assertEqual(
            {"stage": 4, "laststage": 8, "priority": -5, "max_attempts": 7,
             "timeout": 2.5, "cwd": "/tmp", "jobcmd": "a --priority 5",
             "waits_for": [1, 2]}, self.carried(3))
        self.does("submit --retries 3 --timeout 1m30s true")
        self.assertEqual(
            {"laststage": 2, "max_attempts": 4, "timeout": 90,
             "cwd": os.path.realpath(self.folder), "jobcmd": "true"},
            self.carried(4))
        for after, said in (
            ("9", "A job can't wait for "), ("run9", "no submission run9."),
            ("1-100001", "--after can name up to 100000 jobs."),
        ):
            self.assertIn(
                said, self.refused("submit --after %s true" % after))
        self.assertEqual(4, len(self.told()))

    def test_options_fill_in_what_json_leaves_out(self):
        options = "submit --priority 7 --laststage 52 --timeout 9" \
            " --retries 3 --cwd /tmp --from-json - "
        jobs = [{"jobstage": 0, "jobcmd": "a"},
                {"jobstage": 0, "jobcmd": "b", "priority": 1, "timeout": 5,
                 "laststage": 4}]
        self.does(options, given=json.dumps(jobs).encode())
        common = {"laststage": 52, "priority": 7, "timeout": 9,
                  "max_attempts": 4, "cwd": "/tmp"}
        self.assertEqual(dict(common, jobcmd="a"), self.carried(1))
        self.assertEqual(
            dict(common, jobcmd="b", priority=1, timeout=5, laststage=4),
            self.carried(2))
        self.does(options + "--after last --stage 8",
                  given=b'{"30": {}, "31": {"jobstage": 6}}')
        self.assertEqual([8, 6], [self.carried(i)["stage"] for i in (30, 31)])
        self.assertEqual([1, 2], self.carried(30)["waits_for"])
        jobs = [{"jobstage": 10}, {"jobcmd": "a"}, {"jobstage": 10, "jobcmd": {
            "steps": {"10": "a", "14": "b"}}}]
        self.does("submit --from-json -", given=json.dumps(jobs).encode())
        self.assertEqual([12, 2, 16], [
            self.carried(i)["laststage"] for i in (32, 33, 34)])

    def test_jobs_in_json(self):
        jobs = {"7": {"jobstage": 0, "jobcmd": "a"},
                "8": {"jobstage": 0, "after": [7]}, "20": {"jobstage": 5}}
        for _ in range(2):
            self.assertEqual("3 jobs: 7-8,20\n", self.does(
                "submit --from-json -", given=json.dumps(jobs).encode()))
        self.assertEqual(
            {7: "waiting", 8: "blocked", 20: "waiting"}, self.told())
        self.write("list.json", b'[{"jobstage": 0}, {"jobstage": 0}]')
        answer = self.seen("submit --from-json list.json")
        self.assertEqual("21-22", self.ok(
            "/submissions?submission=" + answer.pop("name"))[0]["ids"])
        self.assertEqual({"jobs": 2, "ids": "21-22"}, answer)
        for given, said in (
            (b"5", "must be an object or a list"), (b"{", "Can't read jobs"),
            (b"\xff", "Can't read jobs"), (b"[1]", "object"),
            (b'[\n{"a" 1}]', "Can't read jobs in -: .*line 2 column 6"),
            (b'{"a": {"jobstage": 0}}', "must be jobids"),
            (b'{"1": {"jobstage": -1}}', "jobstage"), (b'[{"x": 1}]', "'x'"),
            (b'{"1": {"jobstage": 0}, "1": {}}', "twice"),
            (b'{"3": {"after": 5}}', "after"),
            (b'{"3": {"after": [9000]}}', "9000"),
        ):
            with self.subTest(given=given):
                self.assertRegex(
                    self.refused("submit --from-json -", given=given), said)
        self.assertEqual(5, len(self.told()))

    def test_json_in_any_order_and_with_a_mark_of_its_encoding(self):
        jobs = {str(i): {"jobstage": 0, "after": [i + 1]}
                for i in range(2500)}
        jobs["2500"] = {"jobstage": 0}
        given = b"\xef\xbb\xbf" + json.dumps(jobs).encode()
        self.assertEqual("2501 jobs: 0-2500\n", self.does(
            "submit --from-json -", given=given))
        self.assertEqual({(0, "blocked"): 2500, (0, "waiting"): 1},
                         self.states())
        self.replace("MAX_JOBS", 2)  # in one call
        self.patch(worker.Client, "PART", 2)
        given = json.dumps({i: {"jobstage": 4, "after": [0]}
                            for i in range(5000, 5003)})
        self.assertEqual("3 jobs: 5000-5002\n", self.does(
            "submit --from-json -", given=given.encode()))

    def test_jobs_run_in_this_folder_if_it_is_there(self):
        def main_in_no_folder(argv):
            folder = self.make_folder()
            os.chdir(folder)
            os.rmdir(folder)
            return jobman.main(argv)

        for line, status, said in (
            ("submit true", 1, "The current folder is gone; use --cwd DIR.\n"),
            ("submit --cwd /tmp true", 0, ""),
        ):
            done, _, err = self.call_main(
                *line.split(), main=main_in_no_folder)
            self.assertEqual((status, said), (done, err[len("jobman.py: "):]))

    def test_input_that_was_read_before_is_left_out(self):
        with open(self.write("todo", b"echo 1\necho 2\n"), "rb") as file:
            file.seek(7)
            self.command(JOBMAN, "submit", "--commands", "-", stdin=file)
        self.assertEqual("echo 2", self.carried(1)["jobcmd"])
        self.assertEqual({1: "waiting"}, self.told())

    def test_long_commands_go_in_small_parts(self):
        sizes, submit = [], self.store.submit

        def noted(jobix, keys, jobs):
            sizes.append(keys[0][2])
            return submit(jobix, keys, jobs)

        self.store.submit = noted
        lines = [b"true " + b"x" * 400000] * 5 + [b"true " + b"x" * 1100000]
        self.does("submit --commands -", given=b"\n".join(lines))
        self.assertEqual([2, 2, 1, 1], sizes)

    def test_a_name_is_not_used_for_other_jobs(self):
        self.does("submit --name run3 --array 1-3 true")
        known = "jobman.py: The submission run3 exists already: .*\n"
        self.does("submit --key run3 --array 1-3 true", err=known)
        self.does("submit --name run3 --array 1-2 true", status=1, err=(
            known + "jobman.py: The name run3 was used for other .*\n"))
        jobs = [{"jobstage": 0}] * 2000 + [{"jobstage": -1}]
        self.does("submit --name b --from-json -", status=1,
                  given=json.dumps(jobs).encode(),
                  err="2000 jobs are known to be added; .* --name b adds .*\n"
                  "jobman.py: .*\n")
        self.assertEqual({(0, "waiting"): 2003}, self.states())

    def test_a_submission_goes_by_its_name(self):
        self.ok("/stages", {"0": {"name": "align"}})
        self.does("submit --name a --array 1-2 true")
        self.does("submit --name b --after a true")
        self.assertEqual([1, 2], self.carried(3)["waits_for"])
        for ids, listed in (("a", "1 2"), ("last", "3"), ("2-3", "2 3")):
            self.assertEqual(listed.split(), self.listed("jobs " + ids))
        self.set_jobs([99], laststage=2)
        self.end(99)
        self.assertGreater(self.ok("/status")["rate"], 0)
        self.assertIsNone(self.ok("/status?submission=a")["rate"])
        told = self.does("status a")
        self.assertIn("0 of 2 jobs done", told)
        self.assertIn("\n2 jobs wait in align: no worker serves it.\n", told)
        self.assertPrints(
            ("cancel a", "2 jobs cancelled\n"),
            ("retry a --state failed", "0 jobs retried\n"),
            ("retry a", "2 jobs retried\n"),
            ("cancel last", "1 job cancelled\n"))
        self.assertIn("There is no submission c.", self.refused("cancel c"))

    STEPS = ("echo 1 {} >> log", "--then", "echo 2 {} '{}' >> log",
             "--then", "test {} != b || exit 7; echo 3 \"$JOBMAN_ITEM\"")

    def test_a_command_for_each_stage(self):
        self.does("submit --retries 0 --name steps --names fetch,align,merge",
                  *self.STEPS, ":::", "a", "b", "c  d")
        self.assertEqual(
            ["fetch", "align", "merge"],
            [values["name"] for values in self.ok("/stages").values()])
        self.assertEqual(["3 a", "3 c  d"],
                         self.work("--stage", "merge,align,fetch"))
        self.assertEqual({(4, "failed"): 1, (6, "done"): 2}, self.states())
        self.assertEqual(
            ["1 a", "1 b", "1 c  d", "2 a a", "2 b b", "2 c  d c  d"],
            sorted(read(self.path("log")).decode().splitlines()))
        self.assertIn("test b != b || exit 7;", self.does("job 2"))
        self.does("submit --stage align --laststage merge true")
        self.assertEqual((2, 4), tuple(
            self.carried(4)[name] for name in ("stage", "laststage")))
        self.assertIn("Stage 0 has the name fetch already: ",
                      self.refused("submit --names x true"))
        self.assertIn("No stage has the name ailgn.",
                      self.refused("submit --stage ailgn true"))

    def test_stages_without_items_and_of_a_worker_with_its_own_command(self):
        self.does("submit", "echo a", "--then", "echo b $JOBMAN_ITEM")
        for laststage in (4, 12):
            self.does("submit --laststage %d --retries 0 --array 7 echo"
                      % laststage)
        self.assertReply(200, self.call("/update_job/3/10"))
        self.assertEqual(["7", "a", "b"], self.work("--stage", "0,2"))
        self.assertIn("no command for stage 2;", self.does("job 2"))
        self.does("retry 2")
        self.assertEqual(["mine 7", "mine 7"], self.work(
            "--stage", "2,10", "--command", "echo mine $JOBMAN_ITEM"))

    def test_a_dry_run_prints_the_commands(self):
        dry = "submit --dry-run"
        for words, out in (
            ((*self.STEPS[:3], ":::", "a"),
             "echo 1 a >> log\necho 2 a ''a'' >> log\n"),
            (("echo $JOBMAN_ITEM", ":::", "x"), "echo $JOBMAN_ITEM\n"),
            (("echo {#}", ":::", "x"), "echo 1\n"),
            (("echo", ":::", "x"), "echo x\n"), (("ls", "-l"), "ls -l\n"),
        ):
            self.assertEqual(out, self.does(dry, *words))
        self.assertEqual("a\nnull\n", self.does(
            dry + " --from-json -",
            given=b'[{"jobstage": 0, "jobcmd": "a"}, {"jobstage": 2}]'))
        self.assertEqual({}, self.told())

    def test_an_answer_that_is_lost_adds_nothing_twice(self):
        def lose(store, request):
            response = respond(store, request)
            if request.path == "/submit" and len(lost) < 3:
                lost.append(1)
                raise ConnectionError
            return response

        lost, respond = [], jobman.respond
        self.replace("respond", lose)
        self.assertPrints(
            ("submit --array 1-5000 true", "5000 jobs: 1-5000\n"))
        self.assertEqual(3, len(lost))
        self.assertEqual({(0, "waiting"): 5000}, self.states())
        lost.clear()
        self.replace("PATIENCE", 0)
        self.does("submit true", status=1, err=(
            "0 jobs are known to be added; .*\n.* can't be reached .*\n"))

    def test_an_interrupted_submit_goes_on_under_its_name(self):
        process = self.spawn(
            JOBMAN, "submit", "--commands", "-", stdin=subprocess.PIPE)
        lines = [b"echo %d\n" % i for i in range(5000)]
        process.stdin.write(b"".join(lines[:4500]))
        process.stdin.flush()
        wait_for(lambda: self.ok("/status")["totals"]["jobs"] == 4000, "jobs")
        process.send_signal(signal.SIGINT)  # of the last it may not know yet
        status, out, err = self.finish(process)
        self.assertEqual((130, ""), (status, out))
        found = re.match(
            r"[24]000 jobs are known to be added; .* --name (\w+) adds the"
            " rest", err)
        self.assertTrue(found, err)
        self.assertEqual("5000 jobs: 1-5000\n", self.does(
            "submit --commands - --name", found.group(1),
            given=b"".join(lines), err="jobman.py: The submission .*\n"))
        self.assertEqual({(0, "waiting"): 5000}, self.states())

    def test_memory_is_bounded(self):
        some, many = [self.memory(
            "submit --commands -", b"".join(
                b"true %2000d\n" % i for i in range(n)))
            for n in (1000, 15000)]
        self.assertLess(many, some + 6000)

    def test_a_line_on_a_terminal_shows_how_far_it_is(self):
        process, screen = self.on_terminal("submit --array 1-4001 true")
        shown = self.drawn(screen)
        self.assertEqual(0, process.wait(PATIENCE))
        self.assertIn("\r4000 jobs\033[K", shown)
        self.assertTrue(shown.endswith("\r\033[K4001 jobs: 1-4001\n"), shown)


class ScriptTest(TemporaryFolder):
    """What a command with an item becomes for /bin/sh."""

    CONTEXTS = (  # a command and what it prints, @ being the item
        ("printf '<%s>' {}", "<@>"),
        ("printf '<%s>' \"{}\"", "<@>"),
        ("printf '<%s>' 'x{}y' x{}\"y\"", "<x@y><x@y>"),
        ("printf '<%s>' \"it's {}\" {}", "<it's @><@>"),
        ('printf \'<%s>\' \\"{}\\" \\\'{}', '<"@"><\'@>'),
        ("printf '<%s>' \"$(printf '%s.' {})\"", "<@.>"),
        ("printf '<%s>' \"$(printf '%s.' \"{}\")\" {}", "<@.><@>"),
        ("printf '<%s>' \"$(printf '%s.' 'x{}')\" '{}'", "<x@.><@>"),
        ("printf '<%s>' \"`printf '%s.' {}`\"", "<@.>"),
        ("x=`printf '%s.' {}`; printf '<%s>' \"$x\"", "<@.>"),
        ("x={}; (printf '<%s>' \"$x\"); printf '<%s>' {}", "<@><@>"),
        ("printf '<%s>' \"${NOT_SET:-{}}\"", "<@>"),
        ("# don't\nprintf '<%s>' {}", "<@>"),
        ("printf '<%s>' {} # don't\nprintf '<%s>' {}", "<@><@>"),
    )

    def test_item_is_one_word_in_any_quotes_and_never_executed(self):
        for command, printed in self.CONTEXTS:
            script = jobman.shell_script(command, 1)
            for item in NASTY:
                with self.subTest(command=command, item=item):
                    self.assertEqual(
                        printed.encode().replace(b"@", item),
                        subprocess.check_output(
                            ["/bin/sh", "-c", script], cwd=self.folder,
                            env={b"JOBMAN_ITEM": item, b"HOME": b"/"},
                            stderr=subprocess.STDOUT))
        self.assertEqual([], os.listdir(self.folder))

    def test_the_script_that_a_command_becomes(self):
        for command, script in (
            ("echo {#}:'{#}' ${#}", "echo 7:'7' ${#}"),
            ("n={}; echo $(( n % 2 ))",
             'n="${JOBMAN_ITEM}"; echo $(( n % 2 ))'),
            *((text, text) for text in (
                "'{.}'", "\\{.}", "${1}", "{1,2}", "{a}", '"${1}"')),
        ):
            self.assertEqual(script, jobman.shell_script(command, 7))
        for said, texts in (
            (r"write n=\{\}", ("echo $(( {} % 2 ))", 'x="$((1+{}))"')),
            ("isn't supported", (
                "{.}", "{/}", "{//}", "{/.}", "{1}", '"{.}"', "$({.})")),
        ):
            for text in texts:
                with self.assertRaisesRegex(ValueError, said):
                    jobman.shell_script("echo " + text, 1)

    def test_words_alone_need_no_shell(self):
        for command, words in (
            ("gzip -k {}", "gzip -k {}"), ("./a --x={} y", "./a --x={} y"),
            ("/bin/true é", None), ("echo {}", None), ("x=1 ls", None),
            ("ls  {}", None), ("ls *", None), ("ls {#}", None), ("", None),
            ("ls ~", None), ("ls; ls", None), ("{} x", None), ("if {}", None),
        ):
            self.assertEqual(
                words and words.split(), jobman.plain_words(command), command)
        jobs = jobman.jobs_of(["ls -- {}{}", "echo {}"], ["a b"],
                              {"jobstage": 4})
        self.assertEqual(
            [{"steps": {"4": ["ls", "--", "a ba b"],
                        "6": 'echo "${JOBMAN_ITEM}"'}, "item": "a b"}],
            [job["jobcmd"] for job in jobs])


@slow
class LookTest(CommandCase):
    """What jobs, job, workers and stats show."""

    # status

    def test_status_has_a_line_for_each_stage(self):
        self.set_jobs([1, 2, 3], laststage=2)
        self.ok("/pause/0", {})
        self.ok("/cancel", {"ids": [3]})
        self.end(2)
        *lines, last, workers, why = self.does("status").splitlines()
        self.assertEqual("There are no workers.", workers)
        self.assertEqual("1 job waits in stage 0: it is paused.", why)
        self.assertEqual([
            "stage      jobs  waiting  done  cancelled  median",
            "0, paused     2        1                1",
            "2             1              1",
            "all           3        1     1          1"], lines)
        self.assertIn("33 %: 1 of 3 jobs done, ", last)
        self.assertEqual(self.ok("/status"), self.seen("status"))
        self.assertPrints(("status --output quiet", ""))

    def test_no_time_is_left_when_all_have_ended(self):
        self.set_jobs([1, 2], laststage=2)
        for jobid, said in ((1, r" minutes, so [0-9:]+ left, un"),
                            (2, r", 1.2 per minute over [a-z ]* minutes\.\n")):
            self.end(jobid)
            self.clock.advance(30)
            self.assertRegex(self.does("status"), said)

    def test_status_says_how_the_workers_are_and_why_jobs_wait(self):
        self.set_jobs([1, 2], laststage=4)
        self.ok("/stages", {"0": {"name": "align"}})
        self.beat("a", slots=3)
        self.assertTrue(self.does("status").endswith(
            "\n1 worker with 3 slots, working on 0 jobs.\n"))
        self.ok("/drain/a", {})
        self.beat("b", quarantine="no disk")
        self.assertIn("""
No worker takes jobs, 1 drained, 1 quarantined.
2 jobs wait in align: its workers are drained or quarantined.
""", self.does("status"))
        self.end(1)
        self.ok("/pause/0", {})
        self.ok("/pause/2", {})
        self.assertIn("\n2 jobs wait in align, stage 2: they are paused.\n",
                      self.does("status"))

    # jobs

    def test_jobs_are_listed_in_columns(self):
        self.ok("/lifetime/4/1")
        self.set_jobs({1: "gzip a", 20: ["ls", "a b"]})
        self.set_jobs({3: None}, stage=4)
        self.get(0, worker="node7", lease=600)
        self.clock.advance(61)
        self.store.tick()
        self.assertPrints(("jobs", """\
job  stage  state             since                worker  attempt  command
  1      1  working           2020-09-13 12:26:40  node7         1  gzip a
  3      4  waiting, expired  2020-09-13 12:26:40
 20      0  waiting           2020-09-13 12:26:40                   ls 'a b'
"""))

    def test_jobs_are_chosen_by_state_and_stage(self):
        self.set_jobs([9])
        self.clock.advance(5)
        self.set_jobs(range(1, 6))
        self.set_jobs([6, 7], stage=2)
        self.ok("/cancel", {"ids": [2, 6]})
        for line, ids in (
            ("jobs", [1, 2, 3, 4, 5, 6, 7, 9]),
            ("jobs --state cancelled", [2, 6]),
            ("jobs --stage 2", [6, 7]),
            ("jobs --stage 2 --state cancelled", [6]),
            ("jobs --limit 3", [1, 2, 3]),
            ("jobs --state expired", []),
            ("jobs --order time --limit 2", [9, 1]),
        ):
            with self.subTest(line=line):
                self.assertEqual(
                    ids, [job["jobid"] for job in self.seen(line)])
                self.assertEqual(list(map(str, ids)), self.listed(line))
        self.assertPrints(("jobs --state failed --output json", "[]\n"))

    def test_pages_of_jobs_are_one_table_and_one_array(self):
        self.set_jobs({**dict.fromkeys(range(1, 1500), "a"), 10**6: "b"})
        lines = self.does("jobs").splitlines()
        self.assertEqual(1501, len(lines))
        self.assertEqual(1, sum("command" in line for line in lines))
        self.assertEqual(
            lines[0].index("command"), lines[1].index(" a") + 1)
        self.assertRegex(lines[-1], "^1000000      0  waiting")
        text = self.does("jobs --output json")
        self.assertEqual([*range(1, 1500), 10**6], [
            job["jobid"] for job in json.loads(text)])
        self.assertEqual(1502, text.count("\n"))
        self.assertEqual(1001, len(self.listed("jobs --limit 1001")))

    def test_many_jobs_take_no_more_memory_than_some(self):
        lines = "jobs", "jobs --output json", "export"
        self.set_jobs(dict.fromkeys(range(2000), "x" * 500))  # two pages
        some = list(map(self.memory, lines))
        self.set_jobs(dict.fromkeys(range(2000, 14000), "x" * 500))
        for line, before in zip(lines, some):  # all at once are over 20 MB
            self.assertLess(self.memory(line), before + 8000)

    def test_commands_are_cut_to_the_terminal_and_nowhere_else(self):
        self.set_jobs({1: "x" * 300})
        self.assertIn("x" * 300, self.does("jobs"))
        process, screen = self.on_terminal("jobs", size=(24, 90))
        lines = self.drawn(screen).splitlines()
        self.assertEqual(90, len(lines[1]))
        self.assertTrue(lines[1].endswith("x..."))
        process.wait(PATIENCE)

    def test_what_comes_from_the_server_cannot_draw(self):
        self.set_jobs({1: "\033[2J\n\u202e"})
        job = self.get(0, worker="%1b[31mw", lease=60)
        self.fail(job, stderr="a\n\033[2Jb\033[0m", error="\033]0;c\a")
        self.beat("w\033[2J", host="\033h", quarantine="\033q")
        for line in ("jobs", "job 1", "workers", "workers --output quiet"):
            self.assertRegex(self.does(line), r"\A[ -~\n]*\Z")
        self.assertIn("\\x1b[31mw", self.does("jobs"))

    def test_a_reader_that_goes_is_no_error(self):
        self.set_jobs(dict.fromkeys(range(1500), "x" * 100))
        for line in ("jobs", "export --format json", "status"):
            with self.subTest(line=line):
                process = self.spawn(JOBMAN, *line.split())
                process.stdout.read(1)
                process.stdout.close()
                self.assertEqual(0, process.wait(PATIENCE))
                self.assertEqual(b"", process.stderr.read())

    def test_a_full_disk_is_one_sentence(self):
        self.set_jobs([1])
        with open("/dev/full", "w") as full:
            for argv in (["jobs"], ["job", "1"]):
                process = self.spawn(JOBMAN, *argv, stdout=full)
                self.assertEqual(1, process.wait(PATIENCE))
                self.assertRegex(process.stderr.read().decode(),
                                 r"\Ajobman\.py: [^\n]*space[^\n]*\n\Z")

    # job, and why it isn't running

    def assertWhy(self, why, jobid=1):
        """Assert why a job isn't running, in each form in which it's told."""
        told = self.seen("job %d" % jobid)
        self.assertEqual(why, told["why"])
        self.assertEqual(self.ok("/job/%d" % jobid), told)
        self.assertRegex(self.does("job %d" % jobid),
                         r"\nwhy +%s\n" % re.escape(why))

    def occupy(self, worker, *ids):
        """Give a worker jobs of another stage."""
        self.set_jobs(ids, stage=90)
        self.get(90, n=len(ids), worker=worker, lease=3600)

    def test_why_a_job_waits_for_workers(self):
        self.set_jobs([1])
        self.assertWhy("no worker serves stage 0")
        self.beat("other", stages=[2])
        self.beat("silent about it", stages=None)
        self.assertWhy("no worker serves stage 0")
        self.beat("a", slots=1)
        self.occupy("a", 10)
        self.assertWhy(
            "1 worker with 1 slot serves stage 0, and works on 1 job")
        self.beat("b", slots=2)
        self.occupy("b", 11, 12)
        self.beat("drained")
        self.ok("/drain/drained", {})
        self.assertWhy(
            "2 workers with 3 slots serve stage 0, and work on 3 jobs")
        self.beat("b", slots=3)
        self.assertWhy(
            "2 workers with 4 slots serve stage 0, and work on 3 jobs: its"
            " turn should come soon")
        self.ok("/pause/0", {})
        self.assertWhy("stage 0 is paused")

    def test_why_a_job_waits_for_workers_that_take_nothing(self):
        self.set_jobs([1])
        self.beat("a", quarantine="no space on /tmp")
        self.assertWhy("no worker of stage 0 takes jobs: a is quarantined:"
                       " no space on /tmp")
        self.clock.advance(121)
        self.beat("b")
        self.ok("/drain/b", {})
        self.beat("a")
        self.clock.advance(121)
        self.beat("b")
        self.assertWhy("no worker of stage 0 takes jobs: b is drained, a is"
                       " silent")
        for i in range(4):
            self.beat("c%d" % i)
            self.ok("/drain/c%d" % i, {})
        self.assertIn(", c1 is drained, ...", self.seen("job 1")["why"])

    def test_why_a_job_is_delayed(self):
        self.set_jobs([1], max_attempts=3)
        self.set_jobs([2, 3, 4])
        one, two, three, four = self.get(0, worker="w", n=4, lease=60)
        self.fail(one, exit_code=1, error="exit status 1",
                  stderr="so\nno such file\n")
        self.fail(two, error="no result")
        self.fail(three, exit_code=75, stderr="no licence")
        self.assertReply(200, self.update(four, 2, body=packed(
            {"files": made("a")})))
        claim = self.get(2, lease=60)["claim"]
        self.ok("/reject_job/4?claim=" + claim, {"error": "changed: a"})
        for jobid, why in (
            (1, "after failure 1 of 3: exit 1: no such file"),
            (2, "after failure 1: no result"),
            (3, "after it was deferred: exit 75: no licence"),
            (4, "after its files were rejected: changed: a"),
        ):
            self.assertWhy("delayed until 12:26:42 " + why, jobid)

    def test_why_a_job_waits_for_others_or_was_aborted(self):
        self.set_jobs(range(2, 103))
        self.set_jobs([1], after=[2])
        self.set_jobs([200], after=[2, 3])
        self.set_jobs([201], after=list(range(2, 103)))
        self.assertWhy("waits for 2")
        self.assertWhy("waits for 2 and 3", 200)
        self.assertWhy("waits for 2, 3 and 99 others", 201)
        self.ok("/cancel", {"ids": [2]})
        self.assertWhy("aborted, because job 2, which it waits for, failed,"
                       " was cancelled or aborted")

    def test_why_a_job_has_ended_or_is_at_work(self):
        self.set_jobs([1, 2, 3], max_attempts=1, laststage=2)
        self.fail(self.get(0, lease=60), exit_code=1, stderr="no such file")
        self.assertWhy("failed: exit 1: no such file")
        self.ok("/cancel", {"ids": [2]})
        self.assertWhy("cancelled since 2020-09-13 12:26:40 +0000", 2)
        self.assertReply(200, self.update(self.get(0, lease=60), 2))
        self.assertWhy("done since 2020-09-13 12:26:40 +0000", 3)
        self.set_jobs([4, 5])
        self.get(0, worker="node7", lease=120)
        self.get(0)
        self.clock.advance(32)
        self.assertWhy("node7 has worked on it since 12:26:40 and has a lease"
                       " until 12:28:40", 4)
        self.assertWhy("somebody has worked on it since 12:26:40"
                       " and has no lease", 5)
        self.clock.advance(86400)
        self.assertIn(
            "since 2020-09-13 12:26:40 +0000", self.seen("job 5")["why"])

    def test_why_a_job_failed_whose_leases_lapsed(self):
        self.set_jobs([1])
        for _ in range(5):
            self.get(0, lease=60)
            self.clock.advance(61)
            self.store.tick()
        self.assertIn("failed: 5 leases lapsed in this stage",
                      self.seen("job 1")["why"])

    def test_a_job_is_shown_with_its_attempts(self):
        self.set_jobs({1: "gzip\ta"}, max_attempts=1, priority=5)
        job = self.get(0, worker="node7", lease=60)
        self.clock.advance(2)
        self.fail(job, exit_code=3, error="exit status 3",
                  stderr="first\nlast\n")
        self.assertPrints(("job 1", """\
job           1
why           failed: exit 3: last
command       gzip\\ta
since         2020-09-13 12:26:42 +0000
stage         0
state         failed
worker        node7
attempt       1
failures      1
priority      5
max_attempts  1

attempt  stage  worker  started                    took  outcome  exit  said
      1      0  node7   2020-09-13 12:26:40 +0000  2 s   failed      3  last

The end of its standard error:
  first
  last
"""), ("job 1 --output quiet", "1\n"))
        self.assertIn("There is no job 17.", self.refused("job 17"))

    # workers

    def test_workers_are_shown_with_what_is_wrong(self):
        nobody = ("There are no workers; those that have ended, or send no"
                  " heartbeats, aren't shown.\n")
        self.assertPrints(("workers", nobody))
        self.beat("a", ended=True)
        self.assertPrints(("workers", nobody))
        self.beat("a", host="node1", done=9, failed=1)
        self.clock.advance(200)
        self.beat("b", stages=[2, 0], quarantine="no space")
        self.clock.advance(1)
        self.beat("c", stages=None, slots=None, busy=None)
        self.ok("/drain/c", {})
        self.assertPrints(("workers", """\
worker  host   stages  slots  busy  done  failed  heard
c                                0                0:00 ago  drained
b              2,0         4     0                0:01 ago  quarantined: no\
 space
a       node1  0           4     0     9       1  3:21 ago  silent
"""), ("workers --output quiet", "c\nb\na\n"))
        self.assertEqual(self.ok("/workers"), self.seen("workers"))

    # stats, failures, and names of stages

    def test_stats_show_what_time_was_taken(self):
        self.assertRegex(self.does("stats"), r"\nall +0 +0 ")
        self.set_jobs([1, 2])
        self.clock.advance(10)
        for _ in range(2):
            job = self.get(0, lease=7200)
            self.clock.advance(3600)
            self.update(job, 2)
        self.assertPrints(("stats", """\
stage  claims  retries  done  run median  p95      wait median  p95      \
useful   lost  lifetime advised
0           2        0     2  1:09:54     1:09:54  11.6 s       1:09:54  \
2:00:00  0:00  140 minutes
all         2        0                                                   \
2:00:00  0:00
"""))
        self.assertEqual(self.ok("/stats"), self.seen("stats"))

    def test_failures_are_grouped_each_with_its_remedy(self):
        self.assertPrints(("failures", "No job has failed.\n"))
        self.ok("/stages", {"4": {"name": "align"}})
        self.set_jobs(range(1, 5), stage=4, max_attempts=1)
        for said in ("no space", "no space", "no space", None):
            self.fail(self.get(4, worker="w", lease=60), exit_code=3,
                      stderr=said and "x\n" + said)
        self.assertPrints(("failures", """\
3 jobs of stage align, exit status 3 on w: no space
    python3 jobman.py retry 1-3
1 job of stage align, exit status 3 on w: no message
    python3 jobman.py retry 4
"""))
        self.assertEqual(self.ok("/failures"), self.seen("failures"))
        self.assertEqual(["1", "2", "3", "4"], sorted(self.listed("failures")))
        heads, first, *_, last = self.does("jobs --state failed").splitlines()
        self.assertEqual(["job", "stage", "since", "worker", "exit", "said",
                          "command"], heads.split())
        self.assertRegex(first, r"^  1  align  .*  w  +3  no space")
        self.assertRegex(last, r"^  4  align  .*  w  +3$")

    def test_stages_go_by_their_names(self):
        head = "stage  name   minutes  cores  memory\n"
        self.assertPrints(("stages 4=align", head + "    4  align\n"))
        self.does("stages align=map 0=fetch")
        self.does("stages 0=")
        self.assertEqual({"4": {"name": "map"}}, self.seen("stages"))
        self.assertPrints((
            "stages map=mapped 6=end --cores 4 --memory 1.5G",
            "stage  name    minutes  cores  memory\n"
            "    4  mapped               4  1.5 GiB\n"
            "    6  end                  4  1.5 GiB\n"))
        self.does("stages 6= mapped=map --memory 0 --cores 1")
        self.assertEqual({"4": {"name": "map", "cores": 1},
                          "6": {"cores": 1}}, self.seen("stages"))
        self.does("stages 6= --cores 1")
        self.refused("stages 4=all")
        self.set_jobs([1], stage=4)
        self.beat("w", stages=[4, 2])
        for line, said in (
            ("status", r"\nmap +1 +1\n"), ("jobs", r"\n +1  map +waiting"),
            ("job 1", "serves stage map, and works on 0 jobs: its turn"),
            ("workers", "  map,2  "),
        ):
            self.assertRegex(self.does(line), said)
        self.fail(self.get(4, lease=60))
        self.assertRegex(self.does("job 1"), r"\n +1  map  ")

    def test_without_a_server_it_is_one_sentence(self):
        self.forget_server()
        for line in ("jobs", "job 1", "workers", "watch", "wait", "export",
                     "stats", "status", "logs 1", "failures", "verify"):
            with self.subTest(line=line):
                self.assertIn("no access file", self.refused(line))


class ExportTest(CommandCase):
    """jobman.py export gives all jobs to other programs."""

    def exported(self, line="export"):
        """Return the bytes that a command prints."""
        return self.does(line).encode("utf-8", "surrogateescape")

    def jobs_of_all_kinds(self):
        """Make jobs that are done, failed, killed, lapsed and waiting."""
        self.set_jobs({
            1: "echo 'a\nb'\tc", 2: ["cat", "a b"], 3: "x, \"y\"\r\nz",
            4: "lapses", 5: {"a": 1}, 6: "never",
        }, laststage=2, max_attempts=1)
        done, failed, killed = self.get(0, n=3, lease=60, worker="w%091")
        self.clock.advance(1.5)
        self.assertReply(200, self.update(done, 2))
        self.beat("w\t1", host="node 1")
        self.fail(failed, exit_code=3, error="exit status 3")
        self.fail(killed, exit_code=137, error="signal 9", stderr="a\nb")
        self.get(0, lease=10)
        self.clock.advance(11)
        self.store.tick()

    def test_joblog_is_that_of_gnu_parallel(self):
        self.jobs_of_all_kinds()
        self.assertEqual([
            b"Seq\tHost\tStarttime\tJobRuntime\tSend\tReceive\tExitval\t"
            b"Signal\tCommand",
            b"1\tw_1\t1600000000.000\t     1.500\t0\t0\t0\t0\t"
            b"echo 'a\0b'\tc",
            b"2\tnode_1\t1600000000.000\t     1.500\t0\t0\t3\t0\t"
            b"cat 'a b'",
            b"3\tnode_1\t1600000000.000\t     1.500\t0\t0\t0\t9\t"
            b"x, \"y\"\r\0z",
            b"4\t:\t1600000001.500\t    11.000\t0\t0\t-1\t0\tlapses",
            b"",
        ], self.exported("export --format joblog").split(b"\n"))

    def test_csv_survives_newlines_and_quotes_and_has_the_item(self):
        job, = jobman.jobs_of(["gzip {}"], ["a b"], {"jobstage": 0})
        self.jobs_of_all_kinds()
        self.set_jobs({7: job["jobcmd"]})
        data = self.exported()
        heads, *lines = csv.reader(io.StringIO(data.decode(), newline=""))
        self.assertEqual(
            [*jobman.JOB_COLUMNS, *jobman.ATTEMPT_COLUMNS], heads)
        found = [dict(zip(heads, line)) for line in lines]
        self.assertEqual([
            ("1", "done", "echo 'a\nb'\tc", "", "done"),
            ("2", "failed", '["cat", "a b"]', "3", "failed"),
            ("3", "failed", 'x, "y"\r\nz', "137", "failed"),
            ("4", "waiting", "lapses", "", "lapsed"),
            ("5", "waiting", '{"a": 1}', "", ""),
            ("6", "waiting", "never", "", ""),
        ], [tuple(job[name] for name in (
            "jobid", "state", "jobcmd", "exit_code", "outcome"))
            for job in found[:6]])
        for at, name, value in (
            (0, "stage", "2"), (0, "expired", "false"),
            (0, "started", "1600000000.0"), (0, "ended", "1600000001.5"),
            (1, "seconds", "1.5"), (1, "command", "cat 'a b'"),
            (2, "stderr", "a\nb"), (6, "command", "gzip 'a b'"),
            (6, "item", "a b"),
        ):
            self.assertEqual(value, found[at][name])

    def test_json_has_the_last_attempt_of_each(self):
        self.jobs_of_all_kinds()
        found = json.loads(self.does("export --format json"))
        self.assertEqual([1, 1, 1, 1, 0, 0],
                         [len(job["attempts"]) for job in found])
        self.assertEqual(self.ok("/jobs?attempts=1")["jobs"], found)

    def test_export_and_jobs_print_the_same_of_the_same_jobs(self):
        self.jobs_of_all_kinds()
        for form in jobman.FORMATS:
            self.assertEqual(self.does("export --format " + form),
                             self.does("jobs --output " + form))
        for options, ids in (
            ("--state failed", ["2", "3"]), ("--stage 2", ["1"]),
            ("--stage 0 --state waiting", ["4", "5", "6"]),
        ):
            self.assertEqual(ids, self.does(
                "export --format quiet " + options).split())
        self.set_jobs(range(10, 1010))
        _, *lines = csv.reader(io.StringIO(self.does("export"), newline=""))
        self.assertEqual([*range(1, 7), *range(10, 1010)],
                         [int(line[0]) for line in lines])

    def test_names_that_are_not_utf_8_survive(self):
        self.set_jobs({1: "cat caf\udce9", 2: "\ud800", 3: "é"},
                      filename="caf\udce9", laststage=0)
        self.environment["LC_ALL"] = "C"
        _, out, _ = self.command(JOBMAN, "export")
        for data in (out.encode("utf-8", "surrogateescape"), self.exported()):
            lines = data.splitlines()
            self.assertTrue(lines[1].startswith(b"1,0,done"))
            self.assertIn(b",caf\xe9,cat caf\xe9,", lines[1])
            self.assertIn(b",\\ud800,", lines[2])
            self.assertIn(",é,".encode(), lines[3])
        self.assertNotIn(b"caf", self.exported("export --format joblog"))
        found = json.loads(self.does("export --format json"))
        self.assertEqual(["cat caf\udce9", "\ud800", "é"],
                         [job["jobcmd"] for job in found])


class AwaitTest(CommandCase):
    """jobman.py wait returns when jobs have ended."""

    def test_wait_returns_when_all_jobs_have_ended(self):
        self.set_jobs([1, 2], laststage=2)
        self.set_jobs([3], after=[2], laststage=2)
        self.meanwhile(
            self.nothing, lambda: self.end(1, 2), self.nothing,
            lambda: self.ok("/cancel", {"ids": [3]}))
        self.assertPrints(("wait", "3 jobs ended: 2 done, 1 cancelled.\n"))
        self.assertEqual(4, self.calls.count("status"))
        self.assertNotIn("jobs", self.calls)

    def test_the_exit_status_of_wait_says_whether_all_are_done(self):
        self.assertPrints(("wait --exit-code", "0 jobs ended.\n"))
        self.set_jobs([1, 2], stage=2, laststage=2)
        self.does("wait --exit-code")
        self.set_jobs([3, 4], laststage=2, max_attempts=1)
        self.set_jobs([5], after=[3], laststage=2)
        self.fail(self.get(0, lease=60))
        self.does("wait 5")
        self.ok("/cancel", {"ids": [4]})
        for ids, status in (
            ("1-2", 0), ("1-3", 1), ("2,4", 1), ("5", 1), ("", 1)
        ):
            with self.subTest(ids=ids):
                self.does("wait " + ids)
                self.does("wait --exit-code " + ids, status=status)
        self.assertEqual(
            {"jobs": 5, "states": {"done": 2, "failed": 1, "cancelled": 1,
                                   "aborted": 1}}, self.seen("wait"))
        self.assertPrints(("wait --output quiet", ""))

    def test_only_the_jobs_that_are_named_are_waited_for(self):
        self.set_jobs(range(5000), laststage=2)
        self.set_jobs([5000, 6000], laststage=0)
        self.meanwhile(self.nothing, lambda: self.end(4999, 4, 3, 2, 1),
                       self.nothing, lambda: self.end(0))
        self.assertPrints(("wait 5000,0-4,4999,6000-9000",
                           "8 jobs ended: 8 done.\n"))
        self.assertEqual(4, self.calls.count("status"))
        for ids, words in (("9000", "no job 9000."),
                           ("1,7000-7005", "no job 7000-7005.")):
            self.assertIn(words, self.refused("wait " + ids))

    def test_a_submission_is_waited_for_by_its_name(self):
        jobs = [{"jobstage": 0, "laststage": 2}] * 2
        self.ok("/submit", {"key": "run1", "jobs": jobs})
        self.meanwhile(
            lambda: self.ok("/submit", {"key": "run2", "jobs": jobs}),
            lambda: self.end(1, 2))
        self.assertPrints(("wait last", "2 jobs ended: 2 done.\n"),
                          ("wait run1 --exit-code", "2 jobs ended: 2 done.\n"))
        self.refused("wait run2 --timeout 0", status=124)
        self.assertIn("no submission run3.", self.refused("wait run3"))

    def test_wait_says_why_nothing_moves_and_when_that_changes(self):
        self.patch(jobman.poll_status, "__defaults__", (0,))
        self.set_jobs([1, 2], laststage=2)
        self.meanwhile(
            self.nothing, self.nothing, lambda: self.end(1), self.nothing,
            lambda: self.ok("/pause/0", {}), self.nothing,
            lambda: self.end(2))
        self.assertEqual("2 jobs ended: 2 done.\n", self.does("wait", err=(
            "jobman.py: 2 jobs wait in stage 0: no worker serves it.\n"
            "jobman.py: 1 job waits in stage 0: it is paused.\n")))

    def test_wait_gives_up_in_time(self):
        self.set_jobs([1])
        for line in ("wait --timeout 0.3", "wait 1 --timeout 0.3"):
            began = time.monotonic()
            self.assertIn("Timed out", self.refused(line, status=124))
            self.assertLess(0.3, time.monotonic() - began)
        self.set_jobs([2], laststage=0)
        self.does("wait 2 --timeout 0")
        self.meanwhile(self.nothing, threading.Thread(
            target=self.closing.close).start)
        self.assertIn("Timed out", self.refused(
            "wait --timeout 1", status=124))
        self.patch(jobman.speaking.__wrapped__, "__defaults__", (0,))
        self.assertIn("can't be reached", self.refused("wait"))

    def test_progress_is_shown_on_a_terminal_only(self):
        self.set_jobs([1, 2], laststage=2)
        self.end(1)
        process, screen = self.on_terminal("wait", stdout=subprocess.PIPE)
        shown = self.drawn(screen, "1 of 2 done, 0 failed")
        self.assertIn("[##########..........]  50% 1 of 2 done", shown)
        self.end(2)
        self.assertEqual(b"2 jobs ended: 2 done.\n", process.stdout.read())
        self.assertTrue(self.drawn(screen).endswith("\r\033[K"))

    def test_a_server_that_is_away_is_waited_for(self):
        self.forget_server()
        server, _ = self.serve()
        access = self.path(".jobman", "access.json")
        with contextlib.closing(worker.Client(access)) as client:
            client.set({1: {"jobstage": 0, "laststage": 2}})
            process, screen = self.on_terminal(
                "wait", stdout=subprocess.PIPE, start=changed(
                    "jobman", "import worker; worker.Client.LATE = 0.3"))
            self.drawn(screen, "0 of 1 done")
            self.reap(server)
            self.drawn(screen, "can't be reached")
            self.serve()  # on another port
            client.update_job(1, 2)
        self.assertEqual(b"1 job ended: 1 done.\n", process.stdout.read())

    def test_ctrl_c_ends_wait(self):
        self.set_jobs([1])
        self.meanwhile(self.interrupt)
        self.assertEqual("", self.does("wait", status=130))


# Starts jobman with clocks that run 50 times as fast.
HURRIED = changed("jobman", """
import time
sleep, monotonic = time.sleep, time.monotonic
time.sleep = lambda seconds: sleep(seconds / 50)
time.monotonic = lambda: 50 * monotonic()
""")


@slow
class WatchTest(CommandCase):
    """jobman.py watch shows the status again and again."""

    def watch(self, line="watch", **options):
        """Start to watch; return the process, its screen and what it shows."""
        process, screen = self.on_terminal(line, start=HURRIED, **options)
        return process, screen, self.drawn(screen, "\033[J")

    def end_it(self, process):
        process.send_signal(signal.SIGINT)
        self.assertEqual(130, process.wait(PATIENCE))

    def test_a_bar_for_each_stage_is_drawn_again_in_its_place(self):
        self.set_jobs(range(8), laststage=2)
        self.set_jobs([8, 9], laststage=0)
        self.get(0, n=4, lease=60, worker="a")
        self.ok("/cancel", {"ids": [7]})
        self.ok("/pause/0", {})
        self.ok("/stages", {"1": {"name": "align"}})
        self.beat("a")
        process, screen, shown = self.watch()
        self.assertTrue(shown.startswith("\033[H"), shown)
        self.assertEqual([
            ("0, paused", "######..........xxxx"),
            ("align", "===================="),
            ("all", "####========......xx"),
        ], re.findall(r"([\w, ]+?) +\d+  \[(.*)\]", shown.split("\033[J")[0]))
        self.assertIn("\n20 %: 2 of 10 jobs done", shown.replace("\033[K", ""))
        self.assertIn("1 worker with 4 slots, working on 4 jobs.", shown)
        self.ok("/resume/0", {})
        self.drawn(screen, "\n0 ")
        self.end_it(process)

    def test_one_submission_is_shown(self):
        self.set_jobs(range(5))
        self.ok("/submit", {"key": "run3", "jobs": [{"jobstage": 0}] * 2})
        process, _, shown = self.watch("watch run3")
        self.assertIn("0 of 2 jobs done", shown)
        self.end_it(process)

    def test_watch_keeps_to_the_size_of_the_terminal(self):
        for stage in range(0, 60, 2):
            self.set_jobs([stage], stage=stage)
        process, _, shown = self.watch(size=(12, 50))
        shown = shown.split("\033[J")[0]
        rows = re.sub("\033\\[[?0-9]*[A-Za-z]", "", shown).split("\n")
        self.assertLessEqual(len(rows), 12)
        self.assertLess(max(map(len, rows)), 50)
        self.assertIn("more lines", shown)
        self.assertIn("\nall ", shown)
        self.end_it(process)

    def test_a_server_that_is_away_is_asked_until_it_is_back(self):
        self.forget_server()
        server, _ = self.serve()
        process, screen, shown = self.watch()
        self.assertIn("0 of 0 jobs done", shown)
        self.reap(server)
        self.drawn(screen, "Trying again: ")
        self.serve()  # on another port
        self.drawn(screen, "\033[K\n\033[K\n\033[J")
        self.end_it(process)

    def test_without_a_terminal_news_are_lines_ten_seconds_apart(self):
        now = Clock()
        self.patch(jobman, "time", types.SimpleNamespace(**dict(
            vars(time), time=now, monotonic=now, sleep=now.advance)))
        self.set_jobs([1, 2], laststage=2)
        self.meanwhile(self.nothing, lambda: self.end(1),
                       *[self.nothing] * 5, self.interrupt)
        first, second = self.does("watch", status=130).splitlines()
        self.assertRegex(first, "^2020-09-13 12:26:40 .* 0 %: 0 of 2 jobs done"
                         ".* 2 jobs wait in stage 0: no worker serves it")
        self.assertRegex(second, "^2020-09-13 12:26:52 .*: 1 of 2 jobs done")


@slow
class RunTest(Commands):
    """jobman.py run as people run it."""

    def setUp(self):
        super().setUp()
        launcher = os.path.join(self.make_folder(), "worker.py")
        with open(launcher, "w") as file:  # compiled, it starts sooner
            file.write(
                "import runpy, sys; sys.path[0] = %r; runpy.run_module("
                "'worker', run_name='__main__', alter_sys=True)" % HERE)
        self.replace("worker_script", lambda: launcher)

    def over(self, *argv, status=0, given=b""):
        """Do a run to its end; return (stdout, stderr)."""
        found, out, err = self.call_main("run", *argv, given=given)
        self.assertEqual(status, found, err)
        return out, err

    def start(self, *argv, start=(JOBMAN,), **options):
        """Start a run in a process of its own."""
        return self.spawn(*start, "run", *argv, **options)

    def log(self):
        """Return the lines that commands wrote to the file `log`."""
        return read(self.path("log")).decode().split("\n")[:-1]

    # What is run

    def test_items_come_from_anywhere(self):
        self.write("items", b"c\n")
        for argv, given, out in (
            (["echo", ":::", "a", "b  c"], b"", "a\nb  c\n"),
            (["--", "echo {}", ":::", "d"], b"", "d\n"),
            (["echo {#}:{}"], b"a\n\n b\\ \n\xff",
             "1:a\n2:\n3: b\\ \n4:\udcff\n"),
            (["-a", "items", "echo {#}:{}"], b"", "1:c\n"),
            (["-0", "printf '<%s>'"], b"a\nb\0c\0", "<a\nb><c>"),
        ):
            with self.subTest(argv=argv):
                self.assertEqual(
                    out, self.over("--slots", "1", *argv, given=given)[0])
        out, err = self.over("echo", given=b"")
        self.assertEqual("", out)
        self.assertIn("0 of 0 done, 0 failed", err)

    def test_any_item_is_one_word_byte_for_byte(self):
        command = "printf '%s\\0' {} \"{}\" 'x{}y' \"$(printf %s. {})\""
        out, _ = self.over("--slots", "1", command, ":::", *NASTY)
        expected = b"".join(
            b"%s\0%s\0x%sy\0%s.\0" % (item, item, item, item)
            for item in NASTY
        )
        self.assertEqual(expected, out.encode("utf-8", "surrogateescape"))
        self.assertNotIn("pwned", os.listdir(self.folder))

    def test_failed_items_are_named_and_cannot_draw(self):
        command = "echo no {} >&2; [ {} = a ]"
        self.environment["LC_ALL"] = "C"
        status, _, err = self.command(
            JOBMAN, "run", command, ":::", "a", "b", "é".encode(),
            "\x1b[31m\nred")
        self.assertEqual(1, status, err)
        self.assertIn("failed: b (exit status 1) no b\n", err)
        self.assertIn("failed: \\x1b[31m\\nred (exit", err)
        self.assertIn("1 of 4 done, 3 failed", err)
        self.assertNotIn("failed: a", err)

    def test_more_than_ten_failures_are_counted(self):
        _, err = self.over("--array", "1-12", "false {}", status=1)
        self.assertEqual(10, err.count("failed: "))
        self.assertIn("... and 2 more. To see them all: python3 jobman.py"
                      " serve --db jobman-run.db, then", err)

    def test_a_command_for_each_stage(self):
        steps = ("echo 1 {} >> log", "--then", "[ {} != b ] || [ -e mended ]",
                 "--then", "echo 3 {} >> log", ":::", "a", "b")
        _, err = self.over("--names", "x,y,z", *steps, status=1)
        self.assertIn("failed: b in stage y (exit status 1)\n", err)
        self.assertIn("1 of 2 done, 1 failed", err)
        self.write("mended", b"")
        self.assertIn("2 of 2 done", self.over(*steps)[1])
        self.assertEqual(["1 a", "1 b", "3 a", "3 b"], sorted(self.log()))

    def test_a_dry_run_and_one_without_its_items_make_nothing(self):
        self.assertPrints(
            ("run --dry-run --array 1-2 'echo {}' --then 'rm {#}'",
             "echo 1\nrm 1\necho 2\nrm 2\n"))
        self.assertIn("Can't read nothing: No such file or directory.",
                      self.refused("run -a nothing echo"))
        self.assertEqual([], os.listdir(self.folder))

    def test_a_command_that_takes_too_long_is_ended(self):
        _, err = self.over("--timeout", "0.2", "sleep", ":::", "60", status=1)
        self.assertIn("failed: 60 (not done after 0.2 seconds)\n", err)

    # Started again

    def test_a_run_started_again_does_what_is_not_done(self):
        once = "echo {} >> log; [ {} != b ] || [ -e mended ]"
        again = "--slots", "1", once, ":::", "a", "b", "c"
        self.over(*again, status=1)
        self.write("mended", b"")
        _, err = self.over(*again)
        self.assertEqual(["a", "b", "c", "b"], self.log())
        self.assertIn("2 were done before", err)
        self.assertIn("3 of 3 done, 0 failed", err)
        self.over(*again)
        self.assertEqual(4, len(self.log()))

    def test_more_or_fewer_items_run_only_what_is_new(self):
        append = "--slots", "1", "echo {} >> log", ":::"
        self.over(*append, "a", "a", "b")  # each one is a job
        self.over(*append, "c", "a", "b", "a", "a")
        self.assertEqual(["a", "a", "b", "c", "a"], self.log())
        _, err = self.over(*append, "b")
        self.assertEqual(5, len(self.log()))
        self.assertIn("1 of 1 done, 0 failed", err)

    def test_a_run_with_other_retries_is_the_same_run(self):
        self.replace("delay_after", lambda failures: 0.1)
        command = "echo {} >> log; [ $(wc -l < log) = 3 ]"
        self.over(command, ":::", "a", status=1)
        _, err = self.over("--retries", "1", command, ":::", "a")
        self.assertEqual(3, len(self.log()))
        self.assertIn("1 of 1 done, 0 failed", err)

    def test_results_of_a_killed_run_are_taken_at_the_next_start(self):
        again = "echo {} >> log", ":::", "a"
        self.over(*again)
        store = jobman.Store(self.path("jobman-run.db"))
        store.sweep(store.namespace, "retry")
        job, = store.claim(store.namespace, [0], worker="w", lease=1000)
        outcome = worker.Outcome(
            worker.namespace(store.jobix), job["jobid"], job["claim"],
            "update", {"jobstage": 2})
        store.close()
        spool = "jobman-run.db.access.spool"
        os.mkdir(self.path(spool), 0o700)
        self.write(spool + "/w.spool",
                   json.dumps(outcome._asdict()).encode() + b"\n")
        self.assertIn("1 of 1 done", self.over(*again)[1])
        self.assertEqual(["a"], self.log())
        self.assertFalse(os.path.exists(self.path(spool)))

    def test_another_run_leaves_the_first_ones_jobs_alone(self):
        first = "echo {} >> log; [ -e go ] || exec sleep 60"
        first = "--slots", "1", first, ":::", "a", "b", "c"
        process = self.start(*first)
        wait_for(lambda: self.log() == ["a"], "its first command")
        process.send_signal(signal.SIGINT)
        status, _, err = self.finish(process)
        self.assertEqual(130, status)
        self.assertIn("run the same command again", err)
        out, err = self.over("echo other {}", ":::", "x")
        self.assertEqual("other x\n", out)
        self.assertIn("1 of 1 done, 0 failed", err)
        self.write("go", b"")
        self.over(*first)
        self.assertEqual(["a", "a", "b", "c"], self.log())

    def test_a_killed_run_goes_on_where_it_was(self):
        items = [str(i) for i in range(40)]
        command = "echo $PPID >> worker; sleep 0.03; echo {} >> log"
        again = "--slots", "2", command, ":::", *items
        hurried = self.write("hurried.py", changed(
            "worker", "worker.Claims.LAST = 0.2")[1].encode())
        process = self.start(*again, start=changed(
            "jobman", "jobman.worker_script = lambda: %r" % hurried))
        wait_for(lambda: len(self.log()) > 10, "some commands")
        self.reap(process)  # kill -9
        pid = int(read(self.path("worker")).split()[0])
        try:
            wait_for(lambda: not alive(pid), "the end of its worker")
        finally:
            if alive(pid):
                os.kill(pid, signal.SIGKILL)
        done = rows(self.path("jobman-run.db"),
                    "select jobid from job where state = 'done'")
        self.over(*again)
        log = self.log()
        self.assertEqual(set(items), set(log))
        for job in done:  # they were numbered from 1
            self.assertEqual(1, log.count(items[job["jobid"] - 1]))
        self.assertLessEqual(len(log), len(items) + 4)

    # How it ends

    def test_a_signal_ends_a_run_that_still_reads_items(self):
        process = self.start("echo", stdin=subprocess.PIPE)
        access = self.path("jobman-run.db.access")
        wait_for(lambda: os.path.exists(access), "its start")
        process.send_signal(signal.SIGINT)
        process.wait(PATIENCE)  # its standard input is still open
        err = process.stderr.read().decode()
        self.assertEqual(130, process.returncode, err)
        self.assertIn("run the same command again", err)

    def test_a_hangup_ends_a_run_and_its_commands(self):
        process = self.start("echo $$ > {}; sleep 60", ":::", "pid")
        pid = wait_for(lambda: read(self.path("pid")), "the command")
        process.send_signal(signal.SIGHUP)
        self.assertEqual(129, process.wait(PATIENCE))
        self.assertFalse(alive(int(pid)))

    def test_a_job_whose_output_nobody_reads_is_not_done(self):
        command = "echo {} >> ran; seq 20000"
        items = [str(i) for i in range(50)]
        process = self.start("--slots", "1", command, ":::", *items)
        process.stdout.read(10)
        process.stdout.close()
        self.assertEqual(141, process.wait(PATIENCE))
        err = process.stderr.read().decode()
        self.assertIn("run the same command again", err)
        self.assertNotIn("Traceback", err)
        ran = read(self.path("ran")).split()
        self.assertLess(len(ran), 50)
        out, _ = self.over("--slots", "1", command, ":::", *items)
        again = read(self.path("ran")).split()[len(ran):]
        self.assertGreaterEqual(len(ran) + len(again), 51)
        self.assertEqual(len(again) * 20000, out.count("\n"))

    def test_items_that_cannot_be_read_end_the_run(self):
        _, err = self.over("-a", "/proc/self/mem", "echo", status=1)
        self.assertIn("The jobs can't be added: [Errno 5] ", err)

    def test_a_worker_that_has_ended_ends_the_run(self):
        self.replace("worker_script", lambda: self.write("w.py", b""))
        _, err = self.over("echo", ":::", "a", status=1)
        self.assertIn("The worker has ended; run the same command again.", err)

    def test_few_open_files_are_raised_or_told(self):
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        for limits, status, printed, said in (
            ((64, most), 0, "1024\n" * 2, "2 of 2 done"),
            ((107, 107), 1, "",
             r"\Ajobman\.py: [^\n]*\(ulimit -n\)[^\n]*\.\n\Z"),
        ):
            done, out, err = self.finish(self.start(
                "ulimit -n; : {}", ":::", "a", "b",
                preexec_fn=functools.partial(
                    resource.setrlimit, resource.RLIMIT_NOFILE, limits)))
            self.assertEqual((status, printed), (done, out), err)
            self.assertRegex(err, said)

    # What it shows

    def test_a_bar_on_a_terminal_makes_way_for_output(self):
        for words, said in (
            (["echo in {}; sleep 0.1; echo out {}", ":::", "a", "b", "c"],
             (r"\r\[#*\.*\] +\d+% \d of 3 done, 0 failed", "100%",
              r"\r\033\[Kin [abc]\n",
              r"\r\033\[K3 of 3 done, 0 failed, in \d")),
            (["printf %s", ":::", "abc"], ("abc\n",)),
        ):
            process, screen = self.on_terminal("run", *words)
            shown = self.drawn(screen)
            self.assertEqual(0, process.wait(PATIENCE), shown)
            for pattern in said:
                self.assertRegex(shown, pattern)

    def test_items_are_worked_on_as_they_come(self):
        process, screen = self.on_terminal(
            "run", "echo got", stdin=subprocess.PIPE)
        self.drawn(screen, "0 of 0 done")
        for item in (b"a", b"b"):
            process.stdin.write(item + b"\n")
            process.stdin.flush()
            self.drawn(screen, "got " + item.decode())
        process.stdin.close()
        self.assertIn("2 of 2 done", self.drawn(screen))
        self.assertEqual(0, process.wait(PATIENCE))

    def test_plain_lines_where_there_is_no_terminal(self):
        stream = io.StringIO()
        with contextlib.redirect_stderr(stream):
            progress = jobman.Progress()
            progress.show(9, 0, 0, 0)
            self.assertEqual("", stream.getvalue())
            progress.said -= progress.period
            progress.show(9, 2, 1, 3)
            progress.end()
        self.assertRegex(
            stream.getvalue(), r"\A2 of 9 done, 1 failed, .* left\n\Z"
        )

    # What is around it

    def test_a_running_server_is_not_disturbed(self):
        _, address = self.serve()
        access = read(self.path(".jobman", "access.json"))
        self.over("echo", ":::", "a")
        self.assertEqual(access, read(self.path(".jobman", "access.json")))
        self.assertEqual(200, exchange(address, "GET", "/health").status)
        self.assertNotIn("jobman-run.db.access", os.listdir(self.folder))

    def test_the_secret_is_shown_to_nobody(self):
        show = "tr '\\0' ' ' < /proc/$PPID/cmdline; env; : {}"
        out, err = self.over(show, ":::", "a")
        own, = rows(self.path("jobman-run.db"),
                    "select jobix, reading from namespace")
        self.assertIn("worker.py", out)
        for secret in own.values():
            self.assertGreater(secret, 10**9)
            self.assertNotIn(str(secret), out + err)

    def test_jobman_without_its_worker_says_so(self):
        alone = shutil.copy(JOBMAN, self.path("jobman.py"))
        status, out, err = self.command(alone, "run", "echo", ":::", "a")
        self.assertEqual((1, ""), (status, out))
        self.assertRegex(err, r"\Ajobman\.py: [^\n]*worker\.py[^\n]*\.\n\Z")


@slow
class StartTest(Commands):
    """How a server starts, how it ends, and when it won't start."""

    def access(self):
        """Return the content of the default access file."""
        return json.loads(read(self.path(".jobman", "access.json")).decode())

    def mode(self, name):
        """Return a file's permissions."""
        return stat.S_IMODE(os.stat(self.path(name)).st_mode)

    def stop(self, process, number=signal.SIGTERM):
        """End a server; return (exit status, stdout, stderr)."""
        process.send_signal(number)
        return self.finish(process)

    @contextlib.contextmanager
    def serving(self, line="", **variables):
        """Serve in this process; yield the address and the access file."""
        with replaced_environment(dict(self.environment, **variables)):
            options = jobman.parse([
                "serve", "--port", "0", "--db", self.path("jobman.db"),
                *shlex.split(line)])
            with jobman.serving(
                    options, self.path("access.json"), threading.Event(),
                    jobman.given_jobix(options.jobix_file)) as found:
                server, access = found
                yield ("127.0.0.1", server.server_port), access

    def call(self, address, path, jobix, value=None):
        """Make a call; return the Reply."""
        method, body = "GET", None
        if value is not None:
            method, body = "POST", packed(value)
        return exchange(address, method, path, body, {"jobix": str(jobix)})

    def comes_in(self, address, jobix):
        """Return whether a jobix is admitted; a refusal says what to do."""
        reply = self.call(address, "/status", jobix)
        if reply.status == 403:
            for word in ("--jobix-file", "JOBMAN_JOBIX", "--open"):
                self.assertIn(word, reply.json()["error"])
        return reply.status == 200

    # Who comes in

    def test_only_its_own_jobix_comes_in_unless_it_is_open(self):
        path = self.write("secret", b" 4711\n")
        for line, variables, admitted in (
            ("", {}, set()), ("--host 0.0.0.0 --plain", {}, set()),
            ("--jobix-file " + path, {}, {4711}),
            ("", {"JOBMAN_JOBIX": "4712"}, {4712}),
            ("--open", {}, {4711, 4712}),
        ):
            with self.subTest(line=line, variables=variables), \
                    self.serving(line, **variables) as (address, access):
                own = access["jobix"]
                self.assertEqual({own, *admitted}, {
                    jobix for jobix in (own, 4711, 4712)
                    if self.comes_in(address, jobix)})
        for value in ("1", "0"):
            self.environment["JOBMAN_OPEN"] = value
            process, address = self.serve()
            self.assertEqual(value == "1", self.comes_in(address, 7))
            self.stop(process)

    def test_both_jobix_can_be_made_anew(self):
        keys = "jobix", "reading_jobix"
        with self.serving() as (address, old):
            self.call(address, "/set", old["jobix"], {7: {"jobstage": 0}})
            claim = self.call(address, "/get/0", old["jobix"]).json()["claim"]
        with self.serving("--new-jobix") as (address, new):
            for key in keys:
                self.assertFalse(self.comes_in(address, old[key]))
                self.assertTrue(self.comes_in(address, new[key]))
            reply = self.call(
                address, "/update_job/7/2?claim=" + claim, new["jobix"])
            self.assertEqual(200, reply.status, reply.text)
        with self.serving("--shared") as (_, access):
            self.assertEqual([new[key] for key in keys],
                             [access[key] for key in keys])
            self.assertIn("Another server", self.refused(
                "serve --port 0 --db jobman.db --new-jobix"))

    def test_a_server_answers_to_the_name_in_its_url(self):
        with self.serving("--open --url http://Jobs.example:99/") as (
                address, _):
            for name, status in (("jobs.example:99", 200), ("b.example", 421)):
                reply = exchange(address, "GET", "/health",
                                 headers={"Host": name})
                self.assertEqual(status, reply.status)

    # Its files

    def test_the_access_file_is_private_and_replaced(self):
        os.mkdir(self.path(".jobman"))
        self.write(".jobman/access.json", b"old" * 1000, 0o644)
        self.addCleanup(os.umask, os.umask(0))
        process, address = self.serve()
        access = self.access()
        self.assertEqual(
            ("http://%s:%d" % address, process.pid, socket.gethostname()),
            (access["url"], access["pid"], access["host"]))
        self.assertEqual(["access.json"], os.listdir(self.path(".jobman")))
        files = [n for n in os.listdir(self.folder) if n.startswith("job")]
        self.assertIn("jobman.db-wal", files)
        for name in (*files, ".jobman/access.json"):
            self.assertEqual(0o600, self.mode(name), name)
        self.stop(process)
        self.assertEqual([], os.listdir(self.path(".jobman")))

    def test_folders_that_are_not_there_are_made_for_us_alone(self):
        self.addCleanup(os.umask, os.umask(0o002))
        name = b"\xff?#%.db"  # not UTF-8
        self.serve("--db", b"a/" + name, "--access", "b/access.json")
        self.assertIn(name, os.listdir(os.fsencode(self.path("a"))))
        for name in ("a", "b"):
            self.assertEqual(0o700, self.mode(name))

    def test_an_access_file_that_others_can_read_is_refused(self):
        with self.serving():
            for mode in (0o640, 0o604, 0o620):
                os.chmod(self.path("access.json"), mode)
                status, out, err = self.call_main(
                    "--access", "access.json", main=worker.main)
                self.assertEqual((1, ""), (status, out))
                self.assertRegex(
                    err, r"\Aworker\.py: [^\n]+ chmod 600 [^\n]+\n\Z")
            os.chmod(self.path("access.json"), 0o600)
            self.does("status --access access.json")

    # What it announces

    def announced(self, *argv, **options):
        """Start a server; return (process, all that it says)."""
        process = self.spawn(
            JOBMAN, "serve", "--port", "0", *argv, **options)
        lines = []
        for line in iter(process.stdout.readline, b""):
            lines.append(line.decode())
            if "worker.py --stage" in lines[-1]:
                break
        return process, "".join(lines)

    def test_the_two_commands_that_it_announces_do_a_job(self):
        database = self.path(".jobman", "jobman.db")
        for number, access in enumerate(([], ["--access", "it's a \"b/a"]), 1):
            with self.subTest(access=access):
                process, said = self.announced(*access)
                self.assertIn(database, said)
                submit, work = re.search(
                    r"\n  python3 jobman\.py (submit.*)"
                    r"\n  python3 worker\.py (.*)\n\Z", said).groups()
                self.assertEqual("1 job: %d\n" % number, self.does(submit))
                self.spawn(WORKER, *shlex.split(work))
                wait_for(lambda: rows(
                    database, "select count(*) n from job where stage = 0"
                )[0]["n"] == 0, "the job done")
                self.stop(process)

    def test_a_terminal_alone_is_shown_a_jobix_for_reading_alone(self):
        process, screen = self.on_terminal("serve --port 0")
        shown = self.drawn(screen, "--stage 0")
        access = self.access()
        self.assertIn(
            "%(url)s/get#jobix=%(reading_jobix)d " % access, shown)
        self.assertNotIn(str(access["jobix"]), shown)
        process.terminate()
        self.assertEqual(0, process.wait(PATIENCE))
        process, said = self.announced()
        access = self.access()
        self.assertIn(access["url"] + "/get (to change jobs, sign in", said)
        self.assertEqual((0, "", ""), self.stop(process))
        for key in ("jobix", "reading_jobix"):
            self.assertNotIn(str(access[key]), said)

    # How it ends

    def test_a_signal_ends_it_and_a_restart_goes_on(self):
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            process, _ = self.announced("--db", "jobman.db")
            access = self.access()
            with contextlib.closing(worker.Client(
                    self.path(".jobman", "access.json"))) as client:
                client.submit(str(number), [{"jobstage": 0}])
            self.assertEqual((0, "", ""), self.stop(process, number))
            self.assertLessEqual(
                {".jobman", "jobman.db"}, set(os.listdir(self.folder)))
            self.assertNotIn("jobman.db-wal", os.listdir(self.folder))
            self.assertEqual([], os.listdir(self.path(".jobman")))
        with self.serving() as (address, again):
            self.assertEqual(access["jobix"], again["jobix"])
            claims = self.call(address, "/get/0?n=9", again["jobix"]).json()
        self.assertEqual([1, 2, 3], [claim["jobid"] for claim in claims])

    def test_a_server_starts_on_what_a_killed_start_left(self):
        """It may leave an empty file, its tables, or those and a journal."""
        path = self.path("jobman.db")
        for empty in (True, False):
            if empty:
                self.write("jobman.db", b"")
            else:
                jobman.Store(path).close()
            leave_journal(path, 0)
            with self.serving():
                self.assertFalse(os.path.exists(path + "-journal"))
            self.does("check --db jobman.db")

    def test_a_bomb_takes_no_more_memory_than_the_bound(self):
        server, address = self.serve()
        squeeze = zlib.compressobj(9)
        head = squeeze.compress(b"") + squeeze.flush(zlib.Z_FULL_FLUSH)
        mebibyte = squeeze.compress(bytes(2**20))
        mebibyte += squeeze.flush(zlib.Z_FULL_FLUSH)
        bomb = head + mebibyte * 1024
        self.assertLess(len(bomb), 2 * 2**20)
        most = most_memory(server)
        jobix = {"jobix": str(self.access()["jobix"])}
        for _ in range(3):
            reply = exchange(address, "POST", "/set", bomb, jobix)
            self.assertEqual(413, reply.status)
        self.assertLess(most_memory(server) - most, 3 * jobman.MAX_BODY)

    # Snapshots

    def test_a_snapshot_shows_what_there_is_and_no_secret(self):
        process, address = self.serve("--snapshot", "shots")
        status = self.path("shots", "status.html")
        self.assertIn('"jobs": 0', read(status).decode())
        jobix = str(self.access()["jobix"])
        self.call(address, "/set", jobix, {7: {
            "jobstage": 0, "jobcmd": "</script><i>", "laststage": 1,
            "max_attempts": 1}})
        claim = self.call(address, "/get/0", jobix).json()["claim"]
        self.call(address, "/fail_job/7", jobix, {})
        self.assertPrints(("snapshot out/deep", "out/deep/status.html\n"))
        self.assertEqual(["status.html"], os.listdir(self.path("out/deep")))
        page = read(self.path("out", "deep", "status.html")).decode()
        data = re.search('id="snapshot">(.*?)</script>', page, re.S).group(1)
        seen = json.loads(data)
        self.assertEqual([name for name, _, _ in jobman.OVERVIEW], list(seen))
        self.assertEqual(1, seen["status"]["totals"]["states"]["failed"])
        self.assertEqual("</script><i>", seen["failed"]["jobs"][0]["jobcmd"])
        self.assertIn('<meta http-equiv="refresh" content="60">', page)
        policy = re.search('-Policy" content="(.*?)">', page).group(1)
        self.assertEqual(jobman.policy(page), policy)
        for secret in (jobix, claim):
            self.assertNotIn(secret, page)
        self.assertIn("can't be written", self.refused("snapshot jobman.db"))
        self.assertEqual(0, self.stop(process)[0])
        self.assertIn('"failed": 1', read(status).decode())

    def test_snapshots_go_on_when_one_could_not_be_written(self):
        class Ending:
            def wait(self, seconds):
                """Let some time pass; return whether that was all."""
                acts.pop(0)()
                return not acts

        folder = self.write("shots", b"")
        acts = [bool, bool, lambda: os.remove(folder), bool]
        store = jobman.Store(self.path("jobs.db"))
        self.addCleanup(store.close)
        with contextlib.redirect_stderr(io.StringIO()) as said:
            jobman.keep_snapshots(store, folder, Ending())
        self.assertEqual(["status.html"], os.listdir(folder))
        self.assertRegex(said.getvalue(), r"\Ajobman\.py: The snapshot [^\n]+"
                         r" can't be written: [^\n]+\.\n\Z")

    def test_a_snapshot_without_dashboard_or_server(self):
        self.assertIn("no access file", self.refused("snapshot out"))
        shutil.copy(JOBMAN, self.path("jobman.py"))
        shutil.copy(WORKER, self.path("worker.py"))
        self.serve()
        status, _, err = self.command(
            self.path("jobman.py"), "snapshot", "out")
        self.assertEqual((0, ""), (status, err))
        page = read(self.path("out", "status.html")).decode()
        self.assertIn("0 of 0 jobs done", page)
        self.assertEqual(1, page.count("refresh"))
        self.assertIn("Content-Security-Policy", page)

    # Two of them

    def test_shared_servers_and_their_access_file(self):
        first, one = self.serve("--shared")
        jobix = self.access()["jobix"]
        second, two = self.serve("--shared")
        access = self.access()
        self.assertEqual(jobix, access["jobix"])
        self.call(one, "/set", jobix, {"5": {"jobstage": 0}})
        self.assertEqual(5, self.call(two, "/get/0", jobix).json()["jobid"])
        self.assertIn("--shared", self.refused(self.SERVE))
        self.assertEqual(0, self.stop(first)[0])
        self.assertEqual(second.pid, self.access()["pid"])
        self.assertIn(
            "process %d on %s" % (second.pid, socket.gethostname()),
            self.refused(self.SERVE))
        self.assertEqual(access, self.access())
        self.assertEqual(0, self.stop(second)[0])
        self.assertEqual([], os.listdir(self.path(".jobman")))

    def test_the_last_of_two_servers_removes_the_lock_file(self):
        path = self.path("jobs.db")
        first, second = (jobman.Store(path, shared=True) for _ in range(2))
        first.close()
        self.assertRaises(jobman.CommandError, jobman.Store, path)
        second.close()
        self.assertEqual(["jobs.db"], os.listdir(self.folder))

    # It won't start

    SERVE = "serve --port 0 --db jobman.db "

    def files(self, folder=None):
        """Return all files of a folder with a checksum of each."""
        paths = [
            os.path.join(where, name)
            for where, _, names in os.walk(folder or self.folder)
            for name in names
        ]
        return {path: zlib.crc32(read(path)) for path in paths}

    def assertUntouched(self, said, options, folder=None):
        """Assert that a server can't start, why, and changes no file."""
        before = self.files(folder)
        self.assertRegex(self.refused(self.SERVE + options), said)
        self.assertEqual(before, self.files(folder), options)

    def test_a_server_that_cannot_start_changes_no_file(self):
        for text in (b"some text\n" * 1000, b"x", b"\0" * 4096):
            self.write("text", text)
            self.assertUntouched("text is not a database", "--db text")
        jobman.Store(self.path("new.db")).close()
        for name, change in (
            ("other.db", "create table mine (a)"),
            ("other.db", "pragma journal_mode = wal"),
            ("new.db", "pragma user_version = %d" % (
                jobman.SCHEMA_VERSION + 1)),
        ):
            with contextlib.closing(sqlite3.connect(self.path(name))) as db:
                db.execute(change)
            self.assertUntouched("another program|newer", "--db " + name)
        os.mkdir(self.path("folder"))
        with socket.socket() as other:
            other.bind(("127.0.0.1", 0))
            other.listen(1)
            port = other.getsockname()[1]
            for options, said in (
                ("--db folder", "folder"), ("--db text/x", "text/x"),
                ("--db text/x/y", "text/x can't be made: Not a dir"),
                ("--access text/x/y", "text/x can't be made: Not a dir"),
                ("--host 256.1.1.1", "Can't listen on port 0 of 256.1.1.1"),
                ("--port %d" % port,
                 "port %d of .* port 0 is any free port" % port),
                ("--jobix-file none", "none: No such file"),
            ):
                self.assertUntouched(said, options)

    def test_a_jobix_file_that_is_no_good_is_refused(self):
        for text, mode, said in (
            (b"4711", 0o640, "chmod 600"), (b"4711", 0o604, "chmod 600"),
            (b"47x11", 0o600, "a number from"), (b"", 0o600, "a number from"),
            (b"\xff", 0o600, "a number from"), (b"-1", 0o600, "a number from"),
            (b"9223372036854775808", 0o600, "a number from"),
        ):
            self.write("secret", text, mode)
            sentence = self.refused(self.SERVE + "--jobix-file secret")
            self.assertIn(said, sentence)
            self.assertNotIn("47", sentence)
        self.assertFalse(os.path.exists(self.path("jobman.db")))

    def test_a_folder_that_others_can_write_is_refused(self):
        for name, mode, fault in (
            ("all", 0o777, "can be written by anyone"),
            ("sticky", 0o1777, "can be written by anyone"),
            ("group", 0o770, "can be written by its group"),
            ("theirs", 0o700, "belongs to another user"),
        ):
            folder = self.path(name)
            os.mkdir(folder)
            os.chmod(folder, mode)
            os.symlink(folder + "/x", folder + ".link")
            if name == "theirs":
                if os.geteuid():
                    continue  # only root can give it to another user
                os.chown(folder, 1234, -1)
            said = "The folder %s %s: .*mkdir -m 700" % (
                os.path.realpath(folder), fault)
            for path in (name + "/x", name + ".link"):
                self.assertUntouched(said, "--db " + path)
                self.assertUntouched(said, "--access " + path)
                status, out, err = self.call_main(
                    "run", "--db", path, "echo", ":::", path)
                self.assertRegex(err, r"\Ajobman\.py: " + said)
                self.assertEqual(1, err.count("mkdir"))
                self.assertEqual(  # a run only warns of the group
                    (0, path + "\n") if name == "group" else (1, ""),
                    (status, out), err)
            variables = dict(self.environment, JOBMAN_DB=folder + "/x")
            with replaced_environment(variables), \
                    self.assertRaisesRegex(jobman.CommandError, said):
                jobman.Application().make()

    def test_a_mount_may_map_our_id(self):
        if os.geteuid():
            self.skipTest("only root can give a folder to another user")
        self.patch(os, "geteuid", lambda: 12345)
        for owner, is_ours in ((65534, True), (1234, False)):
            folder = self.make_folder()
            os.chown(folder, owner, -1)
            os.seteuid(65534)
            self.addCleanup(os.seteuid, 0)
            found = [module.is_ours(owner, folder)
                     for module in (jobman, worker)]
            os.seteuid(0)
            self.assertEqual([is_ours] * 2, found)
            self.assertEqual([], os.listdir(folder))

    def test_a_full_disk(self):
        folder = self.small_disk()
        jobman.Store(self.path("disk", "old.db")).close()
        self.fill(folder)
        for options in ("--db disk/old.db", "--db disk/new.db",
                        "--access disk/access.json"):
            self.assertUntouched(
                options[-8:] + ".*(full|space)", options, folder)
        full = os.path.join(folder, "full")
        os.truncate(full, os.path.getsize(full) - 2**14)
        self.assertUntouched(  # before the tables are made
            "new.db.* (full|space)", "--db disk/new.db", folder)

    # Limits and signals that it inherits

    def status_line(self, process, name):
        """Return what /proc says of a process under a name."""
        found = re.search(
            r"^%s:?\s+(.*)$" % name,
            b"\n".join(read("/proc/%d/%s" % (process.pid, file))
                       for file in ("status", "limits")).decode(), re.M)
        return found.group(1).split()

    def test_what_nohup_ignores_stays_ignored_and_all_files_are_used(self):
        def prepare():
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
            _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.setrlimit(resource.RLIMIT_NOFILE, (100, most))

        server, _ = self.announced(preexec_fn=prepare)
        soft, hard, _ = self.status_line(server, "Max open files")
        self.assertEqual(hard, soft)
        worker = self.spawn(WORKER, preexec_fn=prepare)
        hup = 1 << signal.SIGHUP - 1
        term = 1 << signal.SIGTERM - 1
        for started in (server, worker):
            wait_for(lambda started=started: int(self.status_line(
                started, "SigCgt")[0], 16) & term, "its handlers")
            ignored = int(self.status_line(started, "SigIgn")[0], 16)
            self.assertTrue(ignored & hup)


# ------------------------------------------------------------- data care ---


def mount(test, mounts="1 0 8:1 / / rw - nfs4 far rw\n"):
    """Show jobman other mounts until a test ends."""
    path = os.path.join(test.make_folder(), "mountinfo")
    with open(path, "w") as file:
        file.write(mounts)
    test.replace("MOUNTINFO", path)


class HostCase(TemporaryFolder):
    """Tests that run commands in their own process: a new one takes 0.3 s."""

    start = JOBMAN,  # what starts its servers

    def jobman(self, *argv):
        """Run a command of jobman in the test's folder and environment.

        Return (exit status, stdout, stderr). Ctrl-C ends it after PATIENCE.
        """
        end = threading.Timer(
            PATIENCE, os.kill, (os.getpid(), signal.SIGINT))
        end.start()
        out = io.TextIOWrapper(io.BytesIO(), "utf-8", "surrogateescape")
        numbers = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
        handlers = {number: signal.getsignal(number) for number in numbers}
        folder = os.getcwd()
        os.chdir(self.folder)
        try:
            with replaced_environment(self.environment), \
                    contextlib.redirect_stdout(out), \
                    contextlib.redirect_stderr(io.StringIO()) as err, \
                    warnings.catch_warnings():  # of files that its end closes
                warnings.simplefilter("ignore", ResourceWarning)
                status = jobman.main(list(argv))
        except SystemExit as ended:
            status = ended.code
        finally:
            end.cancel()
            os.chdir(folder)
            for number, handler in handlers.items():
                signal.signal(number, handler)
        out.flush()
        text = out.buffer.getvalue().decode("utf-8", "surrogateescape")
        return status, text, err.getvalue()

    def does(self, *argv):
        """Run a command that succeeds; return what it prints."""
        status, out, err = self.jobman(*argv)
        self.assertEqual((0, ""), (status, err))
        return out

    def refusal(self, *argv, status=1):
        """Run a command that fails; return its one sentence."""
        found, out, err = self.jobman(*argv)
        self.assertEqual((status, ""), (found, out), err)
        if status == 1:
            self.assertRegex(err, r"\Ajobman\.py: [^\n]+\.\n\Z")
        return err

    def server(self):
        """Start a server that is open to all; return it and a Client."""
        process, address = self.serve("--open", start=self.start)
        client = worker.Client(
            url="http://%s:%d" % address, jobix=7, patience=0)
        self.addCleanup(client.close)
        return process, client

    def kill(self, process):
        """Kill a process, and wait for its end."""
        process.kill()
        process.wait()


@slow
class BenchTest(TemporaryFolder):
    """`bench/place.py` measures a place, and leaves nothing there."""

    def test_it_says_what_the_place_is_good_for(self):
        place = os.path.join(HERE, "bench", "place.py")
        status, out, err = self.command(place, "--seconds", "0.2")
        self.assertEqual((0, ""), (status, err))
        self.assertRegex(out, r"\A%s is on \w+.*; Python 3\S+, SQLite 3\S+\n"
                         % re.escape(self.folder))
        self.assertRegex(out, r"\n +[1-9]\d* if a job takes 1 h\n\Z")
        self.assertEqual([], os.listdir(self.folder))
        self.assertRegex(self.command(place, "/proc/self")[2],
                         r"\ACan't make a folder in [^\n]+\n\Z")


class CareCase(HostCase):
    """A database in the test's folder, and a clock moved by hand."""

    LENT = {"worker": "w", "lease": 60}

    def setUp(self):
        super().setUp()
        self.clock = Clock()
        self.db = self.path("jobman.db")

    def store(self, name="jobman.db", **options):
        """Open a Store without a server, so without a ticker."""
        store = jobman.Store(self.path(name), clock=self.clock, **options)
        self.addCleanup(store.close)
        return store

    def add(self, store, ids, **options):
        """Add jobs that are done in stage 4."""
        entry = dict({"jobstage": 0, "laststage": 4, "jobcmd": 1}, **options)
        self.space = store.make_namespace(7)
        store.add_jobs(self.space, *to_add(dict.fromkeys(ids, entry)))

    def claim(self, store, stage=0, **options):
        """Claim a job with a lease; return it."""
        job, = store.claim(self.space, [stage], **dict(self.LENT, **options))
        return job

    def do(self, store, stage, target, **given):
        """Claim a job and update it to another stage."""
        job = self.claim(store, stage)
        self.update(store, job["jobid"], target, claim=job["claim"], **given)

    def fail_one(self, store, stage=0):
        """Claim a job and let its attempt fail."""
        job = self.claim(store, stage)
        store.fail_job(self.space, job["jobid"], claim=job["claim"])

    def update(self, store, jobid, stage, **given):
        """Update a job to a stage."""
        update = dict(given, jobid=jobid, stage=stage)
        self.assertEqual([None], store.update_jobs(self.space, [update]))

    def made(self, name="jobman.db"):
        """Make a database with jobs in several states; return its path."""
        store = jobman.Store(self.path(name), clock=self.clock)
        with contextlib.closing(store):
            self.add(store, range(100))
            for _ in range(10):
                self.do(store, 0, 4)
            store.sweep(self.space, "cancel", ids=[50, 51])
            for _ in range(2):
                self.fail_one(store)
            self.claim(store)
        return self.path(name)

    def change(self, path, *statements):
        """Do something to a database that jobman wouldn't."""
        with contextlib.closing(sqlite3.connect(path)) as db:
            for statement in statements:
                db.execute(statement)
            db.commit()

    def check(self, name="jobman.db"):
        """Check a database; return (exit status, {check: what it found})."""
        status, out, err = self.jobman("check", "--db", name)
        self.assertEqual("", err)
        return status, dict(line.split(None, 1) for line in out.splitlines())

    def assertWhole(self, name):
        """Assert that nothing is wrong with a database."""
        self.assertEqual(
            (0, {"integrity": "ok", "schema": "ok", "counts": "ok"}),
            self.check(name))
        with jobman.open_snapshot(self.path(name)) as execute:
            self.assertEqual([], faults(execute))

    def assertOnly(self, *names):
        """Assert which files are in the folder, except those of SQLite."""
        found = {
            name for name in os.listdir(self.folder)
            if not name.endswith(("-wal", "-shm", ".lock"))
        }
        self.assertEqual({*names}, found)


@slow
class CareTest(CareCase):
    """Databases are copied and checked, also while they are served."""

    def dump(self, path):
        """Return what is in a database except claims, as lines of SQL."""
        with contextlib.closing(sqlite3.connect(path)) as db:
            db.execute("update job set claim = null, lease = null")
            return sorted(db.iterdump())  # and nothing is committed

    # Backup

    def test_a_copy_is_of_one_moment_and_its_server_goes_on(self):
        with contextlib.closing(jobman.Store(self.db)) as store:
            self.add(store, range(20000))
        _, client = self.server()
        new = iter(range(10**6, 10**6 + 5))

        def show(_):  # called from time to time while it copies
            for jobid in itertools.islice(new, 1):
                client.set({jobid: {"jobstage": 0}})

        location = jobman.DatabaseLocation(self.db)
        jobs = jobman.copy_database(location, self.path("copy"), show)
        self.assertEqual(20000, jobs)
        self.assertEqual([], list(new))
        self.assertWhole("copy")

    def test_a_snapshot_shows_one_moment_and_delays_no_server(self):
        _, client = self.server()
        client.set({1: {"jobstage": 0}})
        with jobman.open_snapshot(self.db) as execute:
            client.set({2: {"jobstage": 0}})
            seen = execute("select jobid from job").fetchall()
        self.assertEqual([(1,)], [tuple(row) for row in seen])

    def test_a_backup_of_what_a_killed_server_left_restores_by_copying(self):
        process, client = self.server()
        client.set({
            1: {"jobstage": 0, "jobcmd": "caf\u00e9 \udcff"},
            2: {"jobstage": 0, "jobcmd": 2, "laststage": 1},
        })
        self.kill(process)
        self.assertIn("copy: 2 jobs", self.does(*BACKUP, "copy"))
        self.assertWhole("copy")
        old = rows(self.db, "select * from setting")
        for name in glob.glob(self.db + "*"):
            os.unlink(name)
        os.rename(self.path("copy"), self.db)
        _, client = self.server()
        self.assertEqual(
            [(1, "caf\u00e9 \udcff"), (2, 2)],
            [(job["jobid"], job["jobcmd"]) for job in client.get(0, n=2)])
        self.assertEqual(old, rows(self.db, "select * from setting"))

    def test_no_claim_of_before_holds_after_a_restore(self):
        store = jobman.Store(self.db, clock=self.clock)
        self.add(store, range(4))
        ended, lapsed, live, free = [
            self.claim(store, lease=lease) for lease in (60, 1, 60, None)]
        self.update(store, 0, 4, claim=ended["claim"])
        self.clock.advance(2)
        store.tick()
        store.writer.run(lambda tx: tx.execute(  # the next would be the last
            "update job set lapses = 4 where jobid = 2"))
        self.does(*BACKUP, "copy")
        store.close()
        self.assertWhole("copy")
        restored = self.store("copy")
        for job, stage in ((lapsed, 4), (live, 4), (free, 4), (ended, 2)):
            error, = restored.update_jobs(self.space, [{
                "jobid": job["jobid"], "stage": stage, "claim": job["claim"]}])
            self.assertEqual(409, error.status)
        restored.tick()
        again = restored.claim(self.space, [0], n=9, **self.LENT)
        self.assertEqual([1, 2], [job["jobid"] for job in again])
        self.update(restored, 3, 4)
        self.assertEqual(
            2, restored.status(self.space)["totals"]["states"]["done"])

    def test_a_backup_is_one_private_file_with_all_that_there_is(self):
        before = read(self.made())
        told = json.loads(self.does(*BACKUP, "copy", "--output", "json"))
        copy = self.path("copy")
        self.assertEqual({"file": "copy", "jobs": 100,
                          "bytes": os.path.getsize(copy)}, told)
        self.assertEqual(
            "more\n", self.does(*BACKUP, "more", "--output", "quiet"))
        self.assertOnly("jobman.db", "copy", "more")
        self.assertEqual(0o600, stat.S_IMODE(os.stat(copy).st_mode))
        self.assertEqual(b"\1\1", read(copy)[18:20])  # no WAL
        self.assertEqual(self.dump(self.db), self.dump(copy))
        self.assertEqual(jobman.SCHEMA_VERSION, jobman.inspect(copy))
        self.assertWhole("jobman.db")
        self.assertEqual(before, read(self.db))

    def test_a_backup_overwrites_nothing(self):
        self.made()
        for name in ("copy", "copy-wal", "copy-journal"):
            with open(self.path(name), "w") as file:
                file.write("mine")
            self.assertIn(
                "%s exists already" % name, self.refusal(*BACKUP, "copy"))
            self.assertEqual(b"mine", read(self.path(name)))
            os.unlink(self.path(name))
        self.assertOnly("jobman.db")

    def test_a_backup_that_fails_leaves_nothing(self):
        self.made()
        disk = self.small_disk()
        self.fill(disk)
        self.assertRegex(self.refusal(*BACKUP, os.path.join(disk, "copy")),
                         "can't be copied to .*full")
        self.assertEqual(["full"], os.listdir(disk))
        self.assertIn(
            "no/where: No such file", self.refusal(*BACKUP, "no/where"))

    def test_a_backup_shows_on_a_terminal_how_far_it_is(self):
        self.made()
        main, terminal = pty.openpty()
        self.addCleanup(os.close, main)
        process = self.spawn(
            JOBMAN, *BACKUP, "copy", stdout=terminal, stderr=terminal)
        os.close(terminal)
        self.assertEqual(0, process.wait(PATIENCE))
        self.assertRegex(  # nothing of a bar is left before the last line
            os.read(main, 10**5),
            rb"\r\x1b\[Kcopy: 100 jobs, \d+ bytes\r\n\Z")

    # What is no database of ours, or isn't finished

    def test_only_a_database_of_ours_is_read(self):
        self.change(self.path("other.db"), "create table job (a)")
        self.change(self.made("newer.db"), "pragma user_version = 99")
        with open(self.path("text"), "w") as file:
            file.write("text" * 1000)
        os.mkdir(self.path("shared"))
        os.rename(self.made(), self.path("shared", "jobman.db"))
        os.chmod(self.path("shared"), 0o777)
        for name, sentence in (
            ("none.db", "There is no database none.db"),
            ("text", "text is not a database"),
            ("other.db", "is the database of another program"),
            ("newer.db", "was made by a newer jobman"),
            ("shared/jobman.db", "shared can be written by anyone"),
        ):
            for command in (BACKUP + ("copy",), CHECK):
                said = self.refusal(*command, "--db", name)
                self.assertIn(sentence, said)
        self.assertOnly("other.db", "newer.db", "text", "shared")

    def test_the_journal_of_a_local_database_is_rolled_back(self):
        path = self.made()
        self.change(path, "pragma journal_mode = delete")
        pages = rows(path, "pragma page_count")[0]["page_count"]
        whole = self.dump(path)
        for command in (CHECK, BACKUP + ("copy",)):
            with open(path, "ab") as file:
                file.write(bytes(2**16))
            leave_journal(path, pages)
            self.does(*command)
        self.assertOnly("jobman.db", "copy")
        self.assertEqual(whole, self.dump(path))
        self.assertEqual(whole, self.dump(self.path("copy")))

    def test_a_start_that_was_killed_in_its_commit_left_no_database(self):
        for command in (CHECK, BACKUP + ("copy",)):
            jobman.Store(self.db).close()
            leave_journal(self.db, 0)
            self.assertIn("There is no database jobman.db",
                          self.refusal(*command))
        self.assertOnly("jobman.db")
        self.assertEqual(b"", read(self.db))

    # Check

    DAMAGES = {  # what is done: the check that finds it, and what it says
        "update tally set jobs = jobs + 1 where state = 'done'":
            ("counts", "stage 4, done: counted 11, there 10"),
        "update tally set expired = 2 where state = 'done'":
            ("counts", "expired 2, there 0"),
        "insert into tally values (7, 9, 'working', 1, 0)":
            ("counts", "stage 9, working: counted 1, there 0"),
        "update job set namespace = 99 where jobid = 60":
            ("counts", "stage 0, waiting: counted 0, there 1"),
        "update job set state = 'odd\n' where jobid = 60":
            ("counts", r"stage 0, odd\n: counted 0, there 1"),
        "drop table tally": ("schema", "there is no table tally"),
        "drop index job_expiry": ("schema", "there is no index job_expiry"),
    }

    def test_each_damage_is_found_and_nothing_else(self):
        path = self.made()
        for number, (damage, (check, said)) in enumerate(
                self.DAMAGES.items()):
            with self.subTest(damage):
                name = "%d.db" % number
                shutil.copy(path, self.path(name))
                self.change(self.path(name), damage)
                status, found = self.check(name)
                self.assertEqual(1, status)
                self.assertRegex(found[check], "^wrong  ")
                self.assertIn(said, found.pop(check))
                self.assertLessEqual(set(found.values()), {"ok"}, found)

    def damage(self, index, part):
        """Change bytes of an index in the database."""
        found, = rows(self.db, "select rootpage from sqlite_master"
                      " where name = ?", index)
        size = rows(self.db, "pragma page_size")[0]["page_size"]
        at, data = (found["rootpage"] - 1) * size, bytearray(read(self.db))
        page = data[at : at + size]
        page[part] = bytes(255 - byte for byte in page[part])
        data[at : at + size] = page
        with open(self.db, "wb") as file:
            file.write(data)

    def test_a_damaged_page_is_found_and_a_server_says_so_once(self):
        self.made()
        for index, part, said in (
            ("job_queue", slice(-3, None), "missing from index job_queue"),
            ("attempt_job", slice(None), "(malformed|error code 11)"),
        ):
            self.damage(index, part)
            status, found = self.check()
            self.assertEqual((1, ["integrity"]), (status, list(found)))
            self.assertRegex(found["integrity"], "^wrong  .*" + said)
        server, client = self.server()
        for call in (lambda: client.job(1), lambda: client.job(2),
                     lambda: client.retry(all=True)):
            with self.assertRaisesRegex(worker.Unreachable, "503"):
                call()
        server.terminate()
        _, _, err = self.finish(server)
        self.assertRegex(
            err, r"\Ajobman\.py: The database \S+ is damaged .*\.\n\Z")


class PruneTest(CareCase):
    """Attempts of jobs that ended `--keep-days` ago are deleted."""

    def kept(self, store):
        """Return how many attempts each job has, after a tick."""
        store.tick()
        found = rows(
            store.readers.path, "select jobid, count(attempt.id) as n from job"
            " left join attempt on job = job.id group by jobid")
        return {row["jobid"]: row["n"] for row in found}

    def test_attempts_of_jobs_that_ended_long_ago_are_deleted(self):
        store = self.store(keep_days=3)
        self.add(store, [1, 2, 3, 4])
        for _ in range(3):
            self.do(store, 0, 4)  # jobs 1, 2, 3
        self.fail_one(store)
        store.sweep(self.space, "cancel", ids=[4])
        self.clock.advance(2 * 86400)
        self.do(store, 4, 4)  # job 1 is done again
        self.assertEqual({1: 2, 2: 1, 3: 1, 4: 1}, self.kept(store))
        self.clock.advance(86400)
        self.assertEqual({1: 2, 2: 1, 3: 1, 4: 1}, self.kept(store))
        self.clock.advance(3600)
        self.assertEqual({1: 2, 2: 0, 3: 0, 4: 0}, self.kept(store))
        self.clock.advance(2 * 86400)
        self.assertEqual({1: 0, 2: 0, 3: 0, 4: 0}, self.kept(store))
        other = self.store("other.db")  # without the option
        self.add(other, [1])
        self.do(other, 0, 4)
        self.clock.advance(10**9)
        self.assertEqual({1: 1}, self.kept(other))

    def test_attempts_of_jobs_that_go_on_are_kept(self):
        store = self.store(keep_days=1, max_attempts=1)
        self.add(store, [1, 2, 3])
        self.do(store, 0, 2)
        self.fail_one(store)
        job = self.claim(store)
        store.release_job(self.space, 3, claim=job["claim"])
        self.clock.advance(10 * 86400)
        self.assertEqual({1: 1, 2: 1, 3: 1}, self.kept(store))
        self.assertEqual(
            ["waiting", "failed", "waiting"],
            [store.job(self.space, jobid)[0]["state"] for jobid in (1, 2, 3)])

    def history(self, store, columns):
        """Bring a job through two stages, the second twice, with failures.

        Its updates replace the values of some columns.
        """
        self.add(store, [1], jobcmd="first", filename="first")
        for stage, target in ((0, 2), (2, 3), (2, 4)):
            self.fail_one(store, stage)
            self.clock.advance(5)
            replaced = dict.fromkeys(columns, '["to %d"]' % target)
            self.do(store, stage, target, **replaced)
            if target == 3:
                self.update(store, 1, 2)
            self.clock.advance(5)

    def test_a_retry_gives_back_what_it_would_have_without_the_option(self):
        seen = "stage", "jobcmd", "filename", "files", "files_stage"
        for number, columns in enumerate((
            ["jobcmd", "filename"], ["files"], ["jobcmd", "files"]
        )):
            stories = []
            for days, kept in ((None, 6), (1, 3)):
                store = self.store(
                    "%s-%d.db" % (days, number), keep_days=days)
                self.history(store, columns)
                self.clock.advance(10 * 86400)
                self.assertEqual({1: kept}, self.kept(store))
                story = []
                for _ in range(2):
                    store.sweep(self.space, "retry", ids=[1])
                    story.append(store.job(self.space, 1)[0])
                    if columns[-1] == "files":
                        store.reject_job(self.space, 1)
                        story.append(store.job(self.space, 1)[0])
                    self.update(store, 1, 4)
                stories.append(
                    [[job[name] for name in seen] for job in story])
            self.assertEqual(*stories)
            self.assertIn("to ", str(stories))

    def test_many_are_deleted_some_in_a_commit_and_none_is_missed(self):
        self.replace("PRUNED", 4)
        store = self.store(keep_days=1)
        self.add(store, range(18))
        for _ in range(9):
            self.do(store, 0, 4)
        self.clock.advance(1)
        for _ in range(9):
            self.fail_one(store)
        store.sweep(self.space, "cancel", stage=0)
        store.set_stages(self.space, {0: {"minutes": 1}})
        self.clock.advance(86400 * 2)
        commits, commit = [], store.writer.commit
        store.writer.commit = lambda batch: (
            commits.append(1), commit(batch))
        self.assertEqual(dict.fromkeys(range(18), 0), self.kept(store))
        self.assertGreater(len(commits), 18 // 4)

    def test_a_commit_that_fails_only_delays_it(self):
        store = self.store(keep_days=1)
        self.add(store, [1])
        self.do(store, 0, 4)
        self.clock.advance(86400 * 2)
        store.lock.lost = "lost for now"
        with self.assertRaises(jobman.Unavailable):
            store.prune()
        store.lock.lost = None
        self.assertEqual({1: 0}, self.kept(store))

    def test_a_clock_set_back_delays_it_by_an_hour_at_most(self):
        store = self.store(keep_days=1)
        self.clock.advance(10**8)
        self.kept(store)
        self.clock.advance(-10**8)
        self.kept(store)
        self.add(store, [1])
        self.do(store, 0, 4)
        self.clock.advance(86400 * 2)
        self.assertEqual({1: 0}, self.kept(store))

    def test_a_tick_within_the_hour_looks_at_no_attempt(self):
        store = self.store(keep_days=1)
        store.tick()
        self.clock.advance(60)
        statements = []
        store.writer.connection.set_trace_callback(
            lambda sql: statements.append(sql))
        store.tick()
        store.writer.connection.set_trace_callback(None)
        self.assertNotIn("from attempt", " ".join(statements))

    def test_a_server_deletes_what_it_finds(self):
        path = self.made()
        self.serve("--keep-days", "1")
        wait_for(
            lambda: rows(path, "select count(*) as n from attempt where"
                         " outcome = 'done'") == [{"n": 0}],
            "the end of the attempts of 2020")
        self.assertWhole("jobman.db")
        self.assertIn("--keep-days: ", self.refusal(
            "serve", "--keep-days", "0", status=2))


SHIM = r"""
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

/* Locks that are given to everybody ($LOCKS is lie) or to nobody (fail);
   flock: only that fails. */
static int pretend(void)
{
    if (!strcmp(getenv("LOCKS"), "lie"))
        return 0;
    errno = ENOLCK;
    return -1;
}

int fcntl(int file, int command, ...)
{
    va_list arguments;
    void *argument;
    va_start(arguments, command);
    argument = va_arg(arguments, void *);
    va_end(arguments);
    if (strcmp(getenv("LOCKS"), "flock"))
        switch (command) {
        case F_GETLK: case F_OFD_GETLK:
            ((struct flock *)argument)->l_type = F_UNLCK;
        case F_SETLK: case F_SETLKW: case F_OFD_SETLK: case F_OFD_SETLKW:
            return pretend();
        }
    return syscall(SYS_fcntl, file, command, argument);
}

int fcntl64(int, int, ...) __attribute__((alias("fcntl")));

int flock(int file, int operation)
{
    return pretend();
}
"""


def compile_shim(test):
    """Compile the SHIM in a test's folder; return its path."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if not compiler:
        test.skipTest("no C compiler")
    path = test.path("shim.so")
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-xc", "-", "-o", path],
        input=SHIM.encode(), check=True)
    return path


class FileSystemTest(HostCase):
    """A server finds out what its database is on."""

    MOUNTS = r"""
20 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
23 22 8:2 / /home/fast rw - xfs /dev/sdb1 rw
22 20 0:30 / /home rw,relatime shared:2 master:1 - nfs4 login1:/home rw
24 20 0:31 / /a/b rw - lustre 10.0.0.1@o2ib:/scratch rw
25 20 0:32 / /with\040space\134 rw - fuse.sshfs me@there:/a\040b rw
26 20 8:3 / /twice rw - nfs4 login1:/twice rw
27 26 8:3 / /twice rw - ext4 /dev/sdc1 rw
29 20 0:34 / /odd rw - nfs odd" - "name rw
"""

    def test_a_folder_is_on_its_nearest_mount(self):
        mount(self, self.MOUNTS)
        for folder, found in (
            ("/", ("ext4", "/dev/sda1")),
            ("/homely", ("ext4", "/dev/sda1")),
            ("/home", ("nfs4", "login1:/home")),
            ("/home/me/data", ("nfs4", "login1:/home")),
            ("/home/fast/me", ("xfs", "/dev/sdb1")),
            ("/a/b", ("lustre", "10.0.0.1@o2ib:/scratch")),
            ("/a/bc", ("ext4", "/dev/sda1")),
            ("/with space\\/x", ("fuse.sshfs", "me@there:/a b")),
            ("/twice/x", ("ext4", "/dev/sdc1")),
        ):
            self.assertEqual(found, jobman.find_mount(folder), folder)
        self.replace("MOUNTINFO", self.path("none"))
        self.assertEqual(("", ""), jobman.find_mount("/"))

    def test_a_link_leads_to_where_the_database_is(self):
        os.mkdir(self.path("real"))
        os.symlink("real", self.path("link"))
        os.symlink("real/jobs.db", self.path("jobs.db"))
        real = os.path.realpath(self.path("real"))
        mount(self, "1 0 8:1 / / rw - ext4 /dev/sda1 rw\n"
                    "2 1 0:9 / %s rw - nfs far rw\n" % real)
        for name in ("link/jobs.db", "jobs.db"):
            location = jobman.DatabaseLocation(self.path(name))
            self.assertEqual("nfs", location.kind)
            self.assertEqual(os.path.join(real, "jobs.db"), location.file)

    def test_readers_stay_with_the_database_when_a_link_is_changed(self):
        link = self.path("link.db")
        os.symlink("one.db", link)
        with contextlib.closing(jobman.Store(link)) as store:
            os.unlink(link)
            os.symlink("two.db", link)
            store.add_jobs(store.namespace, *to_add({1: {"jobstage": 0}}))
            self.assertIsNotNone(store.job(store.namespace, 1))

    def test_one_server_alone_uses_what_other_hosts_may_write_to(self):
        network = "nfs nfs4 lustre gpfs beegfs fhgfs cifs smb3 ceph panfs" \
            " afs 9p pvfs2 orangefs fuse.sshfs fuse.glusterfs"
        local = "ext4 xfs tmpfs fuseblk overlay btrfs"
        for kinds, exclusive in ((network, True), (local, False)):
            for kind in kinds.split():
                mount(self, "1 0 8:1 / / rw - %s what rw\n" % kind)
                location = jobman.DatabaseLocation(self.path("jobs.db"))
                self.assertEqual(exclusive, location.exclusive, kind)
                self.assertEqual("unix", location.vfs)
                self.assertIn("%s (what)" % kind, location.describe())

    def test_locks_are_tried_and_leave_nothing(self):
        for folder in (".", "nowhere"):
            location = jobman.DatabaseLocation(self.path(folder, "jobs.db"))
            self.assertFalse(location.exclusive)
        self.assertEqual([], os.listdir(self.folder))
        with open(self.path("file"), "wb") as file, \
                open(self.path("file"), "rb") as unfit:
            self.assertTrue(jobman.try_locks(file))
            self.assertFalse(jobman.try_locks(unfit))

    def test_a_network_file_system_allows_one_connection_and_no_wal(self):
        mount(self)
        path = self.path("jobs.db")
        with contextlib.closing(jobman.Store(path)) as store:
            store.init(7, [1, 2, 3])
        with contextlib.closing(jobman.Store(path)) as store:
            self.assertEqual(3, len(store.stages(7)))
            execute = store.writer.connection.execute
            self.assertEqual(
                ["exclusive", "persist", 2],
                [execute("pragma " + name).fetchone()[0] for name in
                 ("locking_mode", "journal_mode", "synchronous")])
            spill = execute("pragma cache_spill").fetchone()
            self.assertIn(spill and spill[0], (0, None))  # None before 3.8
            self.assertEqual([], store.readers.idle)
        self.assertEqual(["jobs.db"], os.listdir(self.folder))

    def test_other_programs_are_kept_off_where_locks_work(self):
        mount(self)
        path = self.path("jobs.db")
        jobman.Store(path).close()
        location = jobman.DatabaseLocation(path)
        for opened in (lambda: jobman.open_writer(location),
                       lambda: jobman.Store(path)):
            other = sqlite3.connect(path, timeout=0)
            with contextlib.closing(opened()), contextlib.closing(other):
                with self.assertRaisesRegex(sqlite3.Error, "locked"):
                    other.execute("select * from job")


class AloneCase:
    """What holds wherever only one server can have a database."""

    locks = None  # what the SHIM makes of locks

    def setUp(self):
        super().setUp()
        self.db = self.path("jobman.db")
        if self.locks:
            self.environment.update(
                LD_PRELOAD=compile_shim(self), LOCKS=self.locks)
        with open(self.path("mountinfo"), "w") as file:
            file.write("1 0 8:1 / / rw - nfs4 far rw\n")

    def jobs(self, *ids):
        """Return jobs as /set takes them."""
        return {jobid: {"jobstage": 0, "laststage": 2} for jobid in ids}

    def leave(self, jobs=100):
        """Write the files that a killed server leaves which had added jobs.

        It has a WAL, unless jobman takes this for a network file system.
        """
        path = os.path.join(self.make_folder(), "jobman.db")
        with contextlib.closing(jobman.Store(path)) as store:
            store.add_jobs(store.make_namespace(7),
                           *to_add(self.jobs(*range(jobs))))
            for name in glob.glob(path + "*"):
                if not name.endswith(".lock"):
                    shutil.copy(name, self.folder)

    def run_jobman(self, *argv):
        """Run a command where the database is for one server."""
        return self.command(*self.start, *argv)

    def assertFiles(self, *names):
        """Assert which files there are, but for the access file."""
        self.assertEqual(
            {"mountinfo", *names}, set(os.listdir(self.folder)) - {
                ".jobman", "shim.so"})

    def assertWhole(self, jobs):
        """Assert that nothing is wrong with the database."""
        self.does(*CHECK)
        counted = rows(self.db, "select count(*) as n from job")
        self.assertEqual([{"n": jobs}], counted)

    def test_a_server_says_so_and_does_without_a_wal(self):
        process, client = self.server()
        client.set(self.jobs(1))
        self.assertEqual(b"\1\1", read(self.db)[18:20])
        self.assertFiles("jobman.db", "jobman.db-journal", "jobman.db.lock")
        process.terminate()
        status, _, err = self.finish(process)
        self.assertEqual(0, status)
        self.assertRegex(err, r"\Ajobman\.py: jobman\.db [^\n]+\n\Z")
        self.assertRegex(err, self.said + ":")
        self.assertFiles("jobman.db")

    def test_a_second_server_is_told_who_has_it_until_that_is_killed(self):
        process, client = self.server()
        client.set(self.jobs(1))
        holder = r"process %d on %s" % (process.pid, socket.gethostname())
        for argv in (SERVE + ("--port", "0"), CHECK):
            status, out, err = self.run_jobman(*argv)
            self.assertEqual((1, ""), (status, out))
            self.assertRegex(
                err, r"(?m)^jobman\.py: .*\(%s\): end that one first\.\n\Z"
                % holder)
        client.set(self.jobs(2))
        self.kill(process)
        self.assertWhole(2)

    def test_what_a_killed_server_left_in_a_wal_is_taken_over(self):
        self.leave()
        self.assertEqual(b"\2\2", read(self.db)[18:20])
        self.assertGreater(os.path.getsize(self.db + "-wal"), 10000)
        process, client = self.server()
        self.assertEqual(100, client.status()["totals"]["jobs"])
        self.assertEqual(b"\1\1", read(self.db)[18:20])
        self.assertFiles("jobman.db", "jobman.db.lock")
        self.kill(process)
        self.assertWhole(100)

    def test_backup_and_check_read_a_wal_that_was_left(self):
        for argv, said in ((BACKUP + ("copy",), "copy: 100 jobs"),
                           (CHECK, "integrity    ok")):
            self.leave()
            status, out, err = self.run_jobman(*argv)
            self.assertEqual((0, ""), (status, err))
            self.assertIn(said, out)
            for name in glob.glob(self.db + "*"):
                os.unlink(name)
        self.does("check", "--db", "copy")

    def test_a_journal_that_was_left_is_rolled_back(self):
        self.leave(1000)
        db = sqlite3.connect(self.db, isolation_level=None)
        with contextlib.closing(db):
            for statement in (
                "pragma journal_mode = delete", "pragma cache_size = 1",
                "begin", "update job set stage = 5",
            ):
                db.execute(statement)
            left = {name: read(name) for name in glob.glob(self.db + "*")}
        for name, content in left.items():
            with open(name, "wb") as file:
                file.write(content)
        self.assertNotEqual(b"\0", read(self.db + "-journal")[:1])
        self.assertEqual(0, self.run_jobman(*CHECK)[0])
        self.assertFiles("jobman.db")
        self.assertEqual(
            [{"stage": 0}], rows(self.db, "select distinct stage from job"))
        self.assertWhole(1000)


@slow
class NetworkTest(AloneCase, HostCase):
    """On a network file system, though its locks seem to work."""

    start = changed("jobman", "jobman.MOUNTINFO = 'mountinfo'")
    said = r"is on nfs4 \(far\)"

    def run_jobman(self, *argv):
        usual = jobman.MOUNTINFO
        mount(self)
        try:
            return self.jobman(*argv)
        finally:
            jobman.MOUNTINFO = usual

    def test_a_run_goes_through(self):
        status, out, err = self.command(
            *self.start, "run", "--db", "jobman.db", "echo {}", ":::", *"abc")
        self.assertEqual((0, ["a", "b", "c"]), (status, sorted(out.split())))
        self.assertRegex(err, self.said + ":")

    def test_a_signal_ends_it_while_it_waits_for_a_sign_of_life(self):
        lock = self.path("jobman.db.lock")
        for number, command in (
            (signal.SIGTERM, SERVE + ("--port", "0")),
            (signal.SIGINT, ("run", "--db", "jobman.db", "true", ":::", "1")),
        ):
            with open(lock, "w") as file:
                file.write('{"host": "far"}')
            process = self.spawn(*self.start, *command)
            self.assertIn(b"waiting 20 s", process.stderr.readline())
            process.send_signal(number)
            status, out, err = self.finish(process)
            self.assertEqual((1, ""), (status, out))
            self.assertRegex(err, r"\Ajobman\.py: A signal [^\n]+\.\n\Z")
            self.assertEqual(b'{"host": "far"}', read(lock))
            self.assertFalse(glob.glob(self.path("**", "*access*")))

    def test_servers_cannot_share_it(self):
        mount(self)
        said = self.refusal(*SERVE, "--port", "0", "--shared")
        self.assertRegex(said, self.said + ", .*/dev/shm")
        self.environment["JOBMAN_DB"] = self.db
        with replaced_environment(self.environment), \
                contextlib.redirect_stderr(io.StringIO()) as err:
            with self.assertRaises(jobman.Unavailable):
                jobman.Application().open()
        self.assertRegex(err.getvalue(), self.said + ", .*/dev/shm")
        self.assertFiles()

    def test_on_a_usual_file_system_it_has_a_wal_again(self):
        usual = jobman.MOUNTINFO
        mount(self)
        self.leave()
        self.assertEqual(b"\1\1", read(self.db)[18:20])
        self.replace("MOUNTINFO", usual)
        with contextlib.closing(jobman.Store(self.db)) as store:
            store.add_jobs(store.make_namespace(7), *to_add(self.jobs(100)))
            self.assertEqual(b"\2\2", read(self.db)[18:20])
            self.assertFalse(os.path.exists(self.db + "-journal"))
        self.assertWhole(101)


class AloneStore:
    """A Store with one connection that has the database alone."""

    vfs = "unix-none"  # to look past its lock

    def setUp(self):
        mount(self)
        super().setUp()
        self.assertTrue(self.store.location.exclusive)


@slow
class AloneContractTest(AloneStore, ContractTest):
    """The contract, where all goes through one connection."""


@slow
class AloneShowTest(AloneStore, ShowTest):
    """What is shown by the connection that writes."""


@slow
class FailingLocksTest(AloneCase, HostCase):
    """On a file system where locks fail."""

    locks = "fail"
    said = "where locks don't work"


@slow
class LyingLocksTest(AloneCase, HostCase):
    """On a file system where everybody is given every lock."""

    locks = "lie"
    said = "where locks don't work"

    def test_a_server_that_was_paused_meanwhile_changes_nothing(self):
        self.start = changed(
            "jobman", "lock = jobman.ServerLock; lock.BEAT = 0.1;"
            " lock.LOOK = 0.05; lock.STALE = 1")
        old, client = self.server()
        client.set(self.jobs(1))
        os.kill(old.pid, signal.SIGSTOP)
        new, newer = self.server()
        newer.set(self.jobs(2))
        access = read(self.path(".jobman", "access.json"))
        os.kill(old.pid, signal.SIGCONT)
        with self.assertRaises(worker.Unreachable):  # 503, or it has ended
            client.set(self.jobs(3))
        status, _, err = self.finish(old)
        self.assertEqual(1, status)
        self.assertRegex(err, "has lost .*: process %d on .* taken" % new.pid)
        newer.set(self.jobs(4))
        self.assertEqual(access, read(self.path(".jobman", "access.json")))
        new.terminate()
        self.assertEqual(0, self.finish(new)[0])
        self.assertFiles("jobman.db")
        self.assertWhole(3)


class StillLock(jobman.ServerLock):
    """A lock whose heartbeats a test sends by hand."""

    BEAT = 1000


class LockTest(HostCase):
    """Only one server has a database, and one that lost it stops."""

    open_to_all = True

    def setUp(self):
        super().setUp()
        self.clock = Clock()
        self.location = jobman.DatabaseLocation(self.path("jobs.db"))
        self.lock_path = self.path("jobs.db.lock")

    def make_exclusive(self):
        """Put the database on a network file system."""
        mount(self)
        self.location = jobman.DatabaseLocation(self.path("jobs.db"))

    def lock(self, pause=lambda: None, shared=False):
        """Take the lock, as a server does, on a clock moved by hand.

        `pause` is called each time that it waits. What it says is in `said`.
        """
        def wait(seconds):
            self.clock.advance(seconds)
            pause()

        with contextlib.redirect_stderr(io.StringIO()) as said:
            lock = StillLock(
                self.location, shared=shared, clock=self.clock, pause=wait)
        self.said = said.getvalue()
        self.addCleanup(lock.close)
        return lock

    def store(self, *ids):
        """Open a Store without a server; add jobs."""
        store = jobman.Store(self.path("jobs.db"))
        self.addCleanup(store.close)
        for jobid in ids:
            self.add(store, jobid)
        return store

    def add(self, store, jobid):
        """Add a job."""
        store.add_jobs(store.namespace, *to_add({jobid: {"jobstage": 0}}))

    def kept(self, name="jobs.db"):
        """Return the ids of the jobs in a database."""
        query = "select jobid from job order by jobid"
        return [row["jobid"] for row in rows(self.path(name), query)]

    def write(self, content=None, **said):
        """Write another server's record, or a text, into the lock file."""
        if content is None:
            record = {"host": "far", "pid": 17, "key": "other", "beat": 1}
            content = json.dumps(dict(record, **said))
        file = os.open(self.lock_path, os.O_CREAT | os.O_WRONLY, 0o600)
        os.pwrite(file, content.encode().ljust(512), 0)
        os.close(file)

    def lose(self):
        """Take the lock over, as a server on another host."""
        os.unlink(self.lock_path)
        self.write()

    def beat(self):
        """Return how many heartbeats the holder has sent."""
        return json.loads(read(self.lock_path).decode())["beat"]

    # To take it

    def test_a_second_server_is_told_who_has_the_database(self):
        self.store()
        name = "process %d on %s" % (os.getpid(), socket.gethostname())
        for more in ([], ["--shared"]):
            said = self.refusal(
                "serve", "--port", "0", "--db", "jobs.db", *more)
            self.assertIn("(%s): end that one first, or use an" % name, said)
        self.assertEqual(
            0o600, stat.S_IMODE(os.stat(self.lock_path).st_mode))

    def test_the_rest_of_another_database_is_refused(self):
        for suffix in ("-wal", "-journal"):
            with open(self.path("jobs.db" + suffix), "wb") as file:
                file.write(b"x")
            self.assertIn("jobs.db%s exists" % suffix, self.refusal(
                "serve", "--port", "0", "--db", "jobs.db"))
            self.assertFalse(os.path.exists(self.path("jobs.db")))
            os.unlink(self.path("jobs.db" + suffix))

    def test_a_local_database_without_flock_is_refused(self):
        self.environment.update(LD_PRELOAD=compile_shim(self), LOCKS="flock")
        status, _, err = self.command(JOBMAN, *SERVE, "--port", "0")
        self.assertEqual(1, status)
        self.assertRegex(err, r"\Ajobman\.py: .*No locks available\.\n\Z")

    def test_what_is_in_the_file_of_a_local_database_does_not_matter(self):
        for shared in (False, True):
            self.write(pid=os.getpid(), host=socket.gethostname())
            lock = self.lock(shared=shared)
            self.assertEqual("", self.said)
            lock.check()
            lock.close()
            self.assertEqual([], os.listdir(self.folder))

    def test_a_holder_on_another_host_keeps_it_while_it_beats(self):
        self.make_exclusive()
        self.write()
        beats = [2]
        with self.assertRaisesRegex(jobman.CommandError, "17 on far"):
            self.lock(pause=lambda: beats and self.write(beat=beats.pop()))
        self.assertEqual(2, self.beat())
        self.lock()  # it is silent now, and the refused one has let go

    def test_a_holder_on_another_host_that_is_silent_loses_it(self):
        self.make_exclusive()
        self.write()
        began = self.clock()
        lock = self.lock()
        self.assertGreaterEqual(self.clock(), began + lock.STALE)
        self.assertRegex(self.said, r"\Ajobman\.py: process 17 on far .*"
                         r" waiting 20 s .*\n\Z")
        lock.close()
        self.assertEqual([], os.listdir(self.folder))

    def test_of_two_that_take_it_over_at_once_one_wins(self):
        self.make_exclusive()
        self.write()

        def take_it_too():
            if json.loads(read(self.lock_path).decode())["host"] != "far":
                self.write(pid=18)

        with self.assertRaisesRegex(jobman.CommandError, "18 on far"):
            self.lock(pause=take_it_too)
        self.assertIn(b"far", read(self.lock_path))

    def test_the_file_of_a_holder_may_have_any_content(self):
        self.make_exclusive()
        for content in (
            "", "process 1 on host", "\0" * 300, "[1]", "{}", '{"pid": "x"}',
            "\xff\xfe", "[" * 500, '{"pid": 1, "host": []}',
            '{"pid": 1e999}', '{"pid": 1, "host": null}',
        ):
            with self.subTest(content=content):
                self.write(content)
                lock = self.lock()
                self.assertIn("waiting", self.said)
                lock.check()
                lock.close()

    def test_the_name_of_a_holder_has_no_control_characters(self):
        self.assertEqual(
            "process 1 on a\\x1b[31m\\n", jobman.name_holder(
                {"pid": 1, "host": "a\x1b[31m\n"}))
        self.assertEqual("process ? on ?", jobman.name_holder({}))

    def test_a_file_that_its_holder_removes_is_created_again(self):
        self.make_exclusive()
        self.write()
        lock = self.lock(
            pause=lambda: jobman.remove(self.lock_path)
            if "other" in read(self.lock_path).decode() else None)
        self.assertIn("waiting", self.said)
        lock.check()

    def test_a_holder_on_this_host_keeps_it_while_its_process_runs(self):
        self.make_exclusive()
        here = {"host": socket.gethostname()}
        ended = self.spawn("-c", "")
        ended.wait()
        for pid, waits in (
            ({"pid": os.getpid()}, True), ({"pid": ended.pid}, False),
            ({"pid": 10**20}, False), ({"pid": "x"}, False), ({}, False),
        ):
            with self.subTest(pid=pid):
                self.write(json.dumps(dict(here, **pid)))
                began = self.clock()
                self.lock().close()
                self.assertEqual(waits, "waiting" in self.said)
                self.assertEqual(
                    waits, self.clock() >= began + StillLock.STALE)

    def test_a_turn_that_fails_leaves_the_gate_open(self):
        fair = jobman.FairLock(self.path("a"))
        os.close(fair.turn)
        with self.assertRaises(OSError), fair:
            pass
        other = os.open(self.path("a.gate"), os.O_RDWR)
        self.addCleanup(os.close, other)
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)

    # To keep it

    def test_it_beats_on_after_it_could_not_for_a_while(self):
        self.make_exclusive()

        class Hasty(jobman.ServerLock):
            BEAT = 0.01

        lock = Hasty(self.location, shared=False)
        self.addCleanup(lock.close)
        first = self.beat()
        wait_for(lambda: self.beat() > first + 1, "two heartbeats")
        self.assertEqual(512, os.path.getsize(self.lock_path))
        good, lock.file = lock.file, os.open(self.lock_path, os.O_RDONLY)
        self.addCleanup(os.close, lock.file)
        wait_for(lambda: lock.clock() - lock.confirmed_at > 0.3, "a fault")
        lock.file, first = good, self.beat()
        wait_for(lambda: self.beat() > first, "a heartbeat")

    def test_a_heartbeat_is_not_written_into_the_file_of_another(self):
        self.make_exclusive()
        lock = self.lock()
        self.write()
        before = read(self.lock_path)
        lock.confirm()
        with self.assertRaisesRegex(jobman.Unavailable, "process 17 on far"):
            lock.check()
        with self.assertRaisesRegex(jobman.CommandError, "process 17 on far"):
            lock.require()
        lock.close()
        self.assertEqual(before, read(self.lock_path))

    def test_servers_that_share_it_do_not_disturb_each_other(self):
        for lock in [self.lock(shared=True), self.lock(shared=True)]:
            lock.confirm()
            lock.check()

    def test_a_lock_file_that_is_gone_is_noticed(self):
        for shared in (False, True):
            lock = self.lock(shared=shared)
            os.unlink(self.lock_path)
            newer = self.lock(shared=shared)
            lock.confirm()
            with self.assertRaisesRegex(jobman.Unavailable, "taken it"):
                lock.check()
            lock.close()
            newer.confirm()
            newer.check()
            os.unlink(self.lock_path)
            newer.confirm()
            with self.assertRaisesRegex(jobman.Unavailable, "removed"):
                newer.check()
            newer.close()

    def assertStale(self, lock):
        """Assert that a lock is no longer sure of its database."""
        with self.assertRaisesRegex(jobman.Unavailable, "another server may"):
            lock.check()

    def test_nothing_is_changed_long_after_a_heartbeat(self):
        self.make_exclusive()
        lock = self.lock()
        write = lock.write

        def write_slowly():
            write()
            self.clock.advance(5)

        lock.write = write_slowly
        for slow in (0, 5):  # a heartbeat counts from its beginning
            self.clock.advance(lock.LIMIT - slow)
            lock.check()
            self.clock.advance(1)
            self.assertStale(lock)
            lock.confirm()
            lock.check()

    def test_a_heartbeat_that_cannot_be_written_does_not_count(self):
        self.make_exclusive()
        lock = self.lock()
        good, lock.file = lock.file, os.open(self.lock_path, os.O_RDONLY)
        self.addCleanup(os.close, lock.file)
        self.clock.advance(lock.LIMIT)
        with self.assertRaises(OSError):
            lock.confirm()
        lock.check()
        self.clock.advance(1)
        self.assertStale(lock)
        lock.file = good
        lock.confirm()
        lock.check()

    def test_nothing_is_changed_while_the_file_cannot_be_read(self):
        self.make_exclusive()
        lock = self.lock()
        os.rename(self.lock_path, self.path("away"))
        os.mkdir(self.lock_path)
        with self.assertRaisesRegex(jobman.Unavailable, "directory"):
            lock.check()
        os.rmdir(self.lock_path)
        os.rename(self.path("away"), self.lock_path)
        lock.check()

    def test_a_local_server_needs_no_heartbeat(self):
        lock = self.lock()
        self.clock.advance(10**6)
        lock.check()

    # To lose it

    def test_a_database_that_is_moved_is_lost_and_has_all(self):
        for noticed in (False, True):
            self.folder = self.make_folder()
            store = self.store(1)
            os.rename(self.path("jobs.db"), self.path("new.db"))
            if noticed:
                store.lock.confirm()
                with self.assertRaisesRegex(jobman.Unavailable, "moved or"):
                    self.add(store, 2)
            store.close()
            self.assertEqual([1], self.kept("new.db"))

    def test_nothing_is_changed_once_it_is_lost(self):
        for exclusive in (False, True):
            if exclusive:
                self.make_exclusive()
            store = self.store(1)
            self.lose()
            if not exclusive:
                store.lock.confirm()
            ran = []
            with self.assertRaisesRegex(jobman.Unavailable, "17 on far"):
                store.writer.run(ran.append)
            self.assertEqual([], ran)
            store.close()
            self.assertIn(b"far", read(self.lock_path))
            self.assertEqual([1], self.kept())
            for path in glob.glob(self.path("jobs.db*")):
                os.unlink(path)

    def test_a_commit_is_not_made_if_it_was_lost_meanwhile(self):
        self.make_exclusive()
        store = self.store()

        def lose(tx):
            store.insert_jobs(
                tx, store.namespace, *to_add({1: {"jobstage": 0}}))
            os.unlink(self.lock_path)

        with self.assertRaisesRegex(jobman.Unavailable, "removed"):
            store.writer.run(lose)
        store.close()
        self.assertEqual([], self.kept())

    def test_the_journal_of_the_newer_server_is_left_alone(self):
        self.make_exclusive()
        store = self.store(1)
        path = self.path("jobs.db-journal")
        older = os.stat(path).st_ino
        os.unlink(self.lock_path)
        self.location.vfs = "unix-none"  # as if it were on another host
        other = jobman.open_writer(self.location)
        self.addCleanup(other.close)
        other.execute("begin immediate")
        other.execute("update job set stage = 5")
        newer, before = os.stat(path).st_ino, read(path)
        self.assertNotEqual(older, newer)
        store.close()
        self.assertEqual((before, newer), (read(path), os.stat(path).st_ino))
        other.execute("commit")

    def test_a_wsgi_process_that_lost_it_opens_it_again(self):
        application = jobman.Application()
        self.addCleanup(application.close)
        self.environment["JOBMAN_DB"] = self.path("jobs.db")
        with replaced_environment(self.environment):
            first = application.open()
            self.assertIs(first, application.open())
            os.unlink(self.lock_path)
            first.lock.confirm()
            with self.assertRaises(jobman.Unavailable):
                first.init(7, [1])
            second = application.open()
        self.assertIsNot(first, second)
        second.init(7, [1])
        self.assertTrue(first.writer.closed)

    def test_a_server_that_lost_it_ends_and_leaves_the_newer_ones_files(self):
        process, address = self.serve("--db", "jobs.db")
        access = self.path(".jobman", "access.json")
        self.lose()
        with open(access, "w") as file:
            file.write("newer")
        with contextlib.suppress(OSError):  # it has ended
            reply = wait_for(
                lambda: next((reply for reply in [exchange(
                    address, "GET", "/init/5", headers={"jobix": "7"})]
                    if reply.status != 200), None), "a refusal")
            self.assertEqual(503, reply.status)
            self.assertIn("process 17 on far", reply.text)
        status, _, err = self.finish(process)
        self.assertEqual(1, status)
        self.assertRegex(
            err, r"(?m)^jobman\.py: This server has lost .*17 on far.*\.$")
        self.assertIn(b"far", read(self.lock_path))
        self.assertEqual(b"newer", read(access))

    def test_a_run_that_lost_it_ends(self):
        process = self.spawn(
            JOBMAN, "run", "--db", "jobs.db", "sleep 60; {}", ":::", "true")
        wait_for(lambda: os.path.exists(self.path("jobs.db.access")), "it")
        os.unlink(self.lock_path)
        status, _, err = self.finish(process)
        self.assertEqual(1, status)
        self.assertIn("has lost the database", err)


# ------------------------------------------------------------------- TLS ---


def make_certificate(folder, name, *more):
    """Make NAME.crt and NAME.key in a folder; return their paths."""
    paths = [os.path.join(folder, name + end) for end in (".crt", ".key")]
    try:
        subprocess.check_output(
            ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes",
             "-days", "2", "-subj", "/CN=" + name, "-out", paths[0],
             "-keyout", paths[1], *more], stderr=subprocess.STDOUT)
    except FileNotFoundError:
        raise unittest.SkipTest("there is no program openssl") from None
    return paths


def without_checks():
    """Return a client's SSLContext that takes any certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def digest(certfile):
    """Return the fingerprint of a certificate."""
    with open(certfile) as file:
        der = ssl.PEM_cert_to_DER_cert(file.read())
    return hashlib.sha256(der).hexdigest()


class Certified:
    """Tests for which two certificates are made."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.certificates = tempfile.mkdtemp(prefix="jobman-test-")
        cls.certfile, cls.keyfile = make_certificate(
            cls.certificates, "localhost", "-addext",
            "subjectAltName=DNS:localhost", "-addext",
            "keyUsage=critical,digitalSignature,keyCertSign")
        cls.other = make_certificate(cls.certificates, "other")

    @classmethod
    def tearDownClass(cls):
        shutil.rmtree(cls.certificates)
        super().tearDownClass()

    def listen(self, answer, certificate=None):
        """Start a server that sends what `answer` returns for a request.

        Then it hangs up, unless that is None. Return its port and the list
        of the requests, which has an empty one for each connection.
        """
        heard, context = [], None
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*certificate)

        def serve():
            with contextlib.suppress(OSError):
                while True:
                    connection = server.accept()[0]
                    self.addCleanup(connection.close)
                    with contextlib.suppress(OSError):
                        if context:
                            connection = context.wrap_socket(
                                connection, server_side=True)
                        heard.append(b"")
                        heard.append(connection.recv(65536))
                        said = answer(heard[-1])
                        if said is not None:
                            connection.sendall(said)
                            connection.close()

        server = socket.socket()
        self.addCleanup(server.close)
        server.bind(("127.0.0.1", 0))
        server.listen(9)
        self.addCleanup(server.shutdown, socket.SHUT_RDWR)
        threading.Thread(target=serve, daemon=True).start()
        return server.getsockname()[1], heard

    def access(self):
        """Return the content of the access file."""
        return json.loads(read(self.path(".jobman", "access.json")).decode())

    def name_server(self, **changes):
        """Write other values into the access file."""
        path = self.path(".jobman", "access.json")
        os.makedirs(os.path.dirname(path), exist_ok=True)
        access = self.access() if os.path.exists(path) else {}
        jobman.replace_file("access file", path, json.dumps(
            dict(access, **changes)).encode(), 0o600)


@slow
class TlsSocketTest(Certified, SocketTest):
    """Requests as bytes, as in SocketTest, over TLS; and long polls."""

    def open(self):
        super().open()
        self.door.server.tls = jobman.tls_context(self.certfile, self.keyfile)
        self.tls = without_checks()

    def dial(self):
        return self.tls.wrap_socket(super().dial(), suppress_ragged_eofs=False)

    def client(self, **options):
        """Return a worker's Client."""
        client = worker.Client(
            url="https://127.0.0.1:%d" % self.address[1], jobix=self.jobix,
            fingerprint=digest(self.certfile), **options)
        self.addCleanup(client.close)
        return client

    def listening(self, n):
        """Return as soon as there are so many long polls."""
        wait_for(lambda: self.store.wait_queue.waiting == n,
                 "%d long polls" % n)

    def background(self, call):
        """Start a call; return a list that will have its answer."""
        answers = []
        threading.Thread(
            target=lambda: answers.append(call()), daemon=True).start()
        return answers

    def test_one_connection_serves_many_calls_and_is_never_reopened(self):
        client = self.client()
        client.health()
        connection = client.connection
        for _ in range(5):
            client.health()
            self.assertIs(connection, client.connection)
        connection.close()
        with self.assertRaises(http.client.NotConnected):  # without checks
            connection.request("GET", "/health")

    def test_a_worker_that_hung_up_gets_no_job(self):
        for jobid, polite in enumerate((False, True)):
            with self.dial() as client:
                client.sendall(b"GET /get/0?wait=60 HTTP/1.1\r\n"
                               b"Host: localhost\r\n"
                               b"jobix: 4711\r\n\r\n")
                self.listening(1)
                if polite:
                    client.settimeout(0)
                    with self.assertRaises(ssl.SSLWantReadError):
                        client.unwrap()
            self.set_jobs([jobid])
            self.listening(0)
            job = self.get(0)
            self.assertEqual((jobid, 1), (job["jobid"], job["attempt"]))
            self.update(job, 9)

    def test_a_long_poll_gets_a_job_unless_it_is_broken_off(self):
        for jobid, breaks_off in ((1, True), (2, False)):
            client = self.client()
            answers = self.background(
                lambda client=client: client.get(0, n=9, wait=60, lease=60))
            self.listening(1)
            if breaks_off:
                client.abort()
            self.set_jobs([jobid])
            wait_for(lambda answers=answers: answers, "an answer")
            if breaks_off:
                self.assertEqual([[]], answers)
                self.assertEqual(jobid, self.get(0)["jobid"])
            else:
                self.assertEqual(jobid, answers[0][0]["jobid"])

    def test_an_answer_on_its_way_outlasts_a_break(self):
        tls = jobman.tls_context(self.certfile, self.keyfile)
        server, reading = socket.socket(), threading.Event()

        def listen():
            with server, server.accept()[0] as connection:
                with tls.wrap_socket(connection, server_side=True) as client:
                    client.recv(65536)
                    client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n"
                                   b"Content-Type: application/json\r\n\r\n")
                    client.sendall(b"4")
                    reading.set()
                    client.recv(65536)
                    client.sendall(b"2")

        server.bind(("127.0.0.1", 0))
        server.listen(1)
        self.address = server.getsockname()
        client = self.client(patience=0)
        self.background(listen)
        answers = self.background(client.status)
        self.assertTrue(reading.wait(PATIENCE))
        client.abort()
        wait_for(lambda: answers, "the answer")
        self.assertEqual([42], answers)

    def test_a_client_that_says_nothing_delays_no_other(self):
        with contextlib.ExitStack() as stack:
            for _ in range(9):
                stack.enter_context(SocketTest.dial(self))
            wait_for(lambda: len(self.door.server.open) == 9, "nine clients")
            self.assertEqual("ok", self.client().health()["status"])
            self.assertEqual(10, len(self.door.server.open))
            self.closing.close()  # nor does it delay the end
            self.assertEqual(set(), self.door.server.open)

    def test_a_handshake_that_never_comes_ends(self):
        self.addCleanup(setattr, jobman.Handler, "HANDSHAKE", 10)
        jobman.Handler.HANDSHAKE = 0.1
        with SocketTest.dial(self) as client:
            self.assertEqual(b"", client.recv(100))

    def test_a_client_without_tls_is_cut_off_quietly(self):
        hello = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"
        with contextlib.redirect_stderr(io.StringIO()) as log:
            for sent in (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"\0" * 40,
                         b"GET / HTTP/1.1\r\nx: " + b"y" * 2**23,
                         b"SSH-2.0\r\n", hello, hello + b"x" * 600, b""):
                with SocketTest.dial(self) as client:
                    client.sendall(sent)
                    if sent in (hello, b""):
                        client.shutdown(socket.SHUT_WR)
                    answer = b"".join(iter(lambda: client.recv(65536), b""))
                self.assertNotIn(b"HTTP", answer)
            wait_for(lambda: not self.door.server.open, "their end")
        self.assertEqual("", log.getvalue())

    def test_the_end_does_not_wait_for_the_clients(self):
        with self.dial() as client:
            client.sendall(b"GET /health HTTP/1.0\r\n\r\n")
            self.assertIn(b" 200 ", client.recv(100)[:13])
            wait_for(lambda: not self.door.server.open, "its end")

    def allow_old(self, context):
        """Limit a context to TLS 1.1 and older."""
        context.options |= ssl.OP_NO_TLSv1_2
        context.options |= getattr(ssl, "OP_NO_TLSv1_3", 0)
        if hasattr(context, "minimum_version"):
            context.minimum_version = ssl.TLSVersion.TLSv1

    def test_nothing_older_than_tls_1_2_is_spoken(self):
        ours = worker.tls_context(digest(self.certfile))
        old = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        old.load_cert_chain(self.certfile, self.keyfile)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            for context in (ours, old, self.tls, self.door.server.tls):
                context.set_ciphers("ALL:@SECLEVEL=0")
            self.allow_old(self.tls)
            self.allow_old(old)
        with self.assertRaises(OSError):
            self.dial()
        self.door.server.tls = old
        self.dial().close()  # so it is not the program that can't
        self.tls = ours
        with self.assertRaises(OSError):
            self.dial()


@slow
class TlsTest(Certified, HostCase):
    """A server that speaks TLS, and the clients that trust it."""

    def client(self, **options):
        """Return a Client for the server in the access file."""
        access = self.path(".jobman", "access.json")
        client = worker.Client(access, **options)
        self.addCleanup(client.close)
        return client

    def open_server(self):
        """Start a server in this process; return it."""
        store = jobman.Store(self.path("jobman.db"))
        server = jobman.Server(("127.0.0.1", 0), store)
        server.tls = jobman.tls_context(self.certfile, self.keyfile)
        server.start()
        self.addCleanup(server.stop)
        self.name_https(server.server_port, jobix=store.jobix)
        return server

    def name_https(self, port, **access):
        """Name a port of this host in the access file."""
        self.name_server(
            url="https://127.0.0.1:%d" % port,
            fingerprint=digest(self.certfile), **access)

    def stop(self, process):
        """End a server that has nothing to complain of."""
        process.terminate()
        self.assertEqual((0, ""), self.finish(process)[::2])

    # The certificate

    def test_a_certificate_is_made_and_is_private_and_kept(self):
        self.addCleanup(os.umask, os.umask(0))
        server, _ = self.serve("--tls")
        fingerprint = self.access()["fingerprint"]
        self.assertEqual(digest(self.path("jobman.db.crt")), fingerprint)
        for name in ("jobman.db.crt", "jobman.db.key"):
            mode = stat.S_IMODE(os.stat(self.path(name)).st_mode)
            self.assertEqual(0o600, mode)
        self.stop(server)
        self.assertEqual(
            {".jobman", "jobman.db", "jobman.db.crt", "jobman.db.key"},
            set(os.listdir(self.folder)))
        _, address = self.serve("--tls", "--shared")
        self.assertEqual(fingerprint, self.access()["fingerprint"])
        shown = ssl.get_server_certificate(address)
        der = ssl.PEM_cert_to_DER_cert(shown)
        self.assertEqual(fingerprint, hashlib.sha256(der).hexdigest())
        reply = exchange(address, "GET", "/get", tls=without_checks())
        self.assertIn("<script>", reply.text)

    def test_a_worker_runs_a_job_over_tls(self):
        both = self.path("both.pem")
        with open(both, "wb") as file:
            file.write(read(self.keyfile) + read(self.certfile))
        self.serve("--certfile", both)
        self.assertEqual("https", self.access()["url"].split(":")[0])
        self.assertEqual(digest(self.certfile), self.access()["fingerprint"])
        self.client().set({1: {"jobstage": 0, "jobcmd": "echo done"}})
        status, out, err = self.command(
            WORKER, "--print", "--quiet", "--idle-timeout", "0.05")
        self.assertEqual((0, "done\n", ""), (status, out, err))

    def test_a_certificate_that_cannot_be_used_is_named(self):
        locked, trusted = self.path("locked"), self.path("trusted")
        subprocess.check_call([
            "openssl", "rsa", "-in", self.keyfile, "-out", locked, "-aes128",
            "-passout", "pass:secret"], stderr=subprocess.DEVNULL)
        subprocess.check_call([
            "openssl", "x509", "-in", self.certfile, "-trustout",
            "-out", trusted])
        for given, reason in (
            ((self.certfile,), ""), ((self.path("none"),), "No such file"),
            ((JOBMAN,), ""),
            ((trusted, "--keyfile", self.keyfile), "BEGIN CERTIFICATE"),
            ((self.certfile, "--keyfile", self.other[1]), ""),
            ((self.certfile, "--keyfile", locked), "its key has a password"),
        ):
            with self.subTest(given=given):
                said = self.refusal(
                    *SERVE, "--port", "0", "--certfile", *given)
                self.assertIn(
                    "The certificate %s can't be used: " % given[0], said)
                self.assertIn(reason, said)
        self.assertEqual(
            {".jobman", "locked", "trusted"}, set(os.listdir(self.folder)))

    def test_without_an_openssl_that_works_there_is_one_sentence(self):
        os.mkdir(self.path("bin"))
        self.environment["PATH"] = self.path("bin")
        for options in (["--tls"], ["--host", "0.0.0.0"]):
            said = self.refusal(*SERVE, "--port", "0", *options)
            for word in ("openssl", "--certfile", "--plain"):
                self.assertIn(word, said)
        with open(self.path("bin", "openssl"), "w") as file:
            file.write("#!/bin/sh\necho no entropy >&2\nexit 1\n")
        os.chmod(file.name, 0o755)
        self.assertIn("no entropy", self.refusal(
            *SERVE, "--port", "0", "--tls"))
        self.assertEqual({".jobman", "bin"}, set(os.listdir(self.folder)))

    def test_without_the_ssl_module_there_is_one_sentence(self):
        self.name_https(1, jobix=1)
        for name, *argv in (
            ("worker",), ("jobman", *SERVE, "--certfile", self.certfile),
        ):
            status, _, err = self.command(
                "-c", "import sys; sys.modules['ssl'] = None;"
                " sys.path[:0] = [%r]; import %s as it;"
                " sys.exit(it.main(sys.argv[1:]))" % (HERE, name), *argv)
            self.assertEqual(1, status)
            self.assertRegex(
                err, r"\A%s\.py: This Python has no ssl module" % name)
            self.assertEqual(1, err.count("\n"))

    def test_wrong_usage_is_exit_status_2(self):
        for words in (["--keyfile", "x"], ["--tls", "--certfile", "x"],
                      ["--tls", "--keyfile", "x"], ["--plain", "--tls"],
                      ["--plain", "--certfile", "x"]):
            self.refusal("serve", *words, status=2)
        for words in (["--tls"], ["--certfile", self.certfile],
                      ["--host", "0.0.0.0"]):
            self.assertIn("https://; for plain HTTP", self.refusal(
                *SERVE, "--port", "0", "--url", "http://h", *words))
        self.assertEqual([".jobman"], os.listdir(self.folder))

    # Trust

    def test_a_server_with_another_certificate_is_told_nothing(self):
        port, heard = self.listen(lambda request: b"", self.other)
        self.name_https(port, jobix=1)
        client = self.client(patience=PATIENCE)
        client.SETTLE = 0.1
        shown = digest(self.other[0])
        with self.assertRaisesRegex(
                worker.Trouble, "its fingerprint is " + shown) as it:
            client.status()
        self.assertNotIsInstance(it.exception, worker.Unreachable)
        with self.assertRaises(worker.Impostor):
            client.connect(PATIENCE)
        self.assertIsNone(client.connection)
        self.assertEqual({b""}, set(heard))
        self.name_server(fingerprint=shown)
        with self.assertRaises(worker.Unreachable):
            self.client(patience=0).status()
        self.assertTrue(any(heard))

    def test_a_worker_waits_while_another_server_has_the_address(self):
        server, client = self.open_server(), self.client(patience=PATIENCE)
        client.status()
        port, heard = self.listen(lambda request: b"", self.other)
        self.name_https(port)
        client.close()
        client.SETTLE = 0
        threading.Thread(target=lambda: (
            wait_for(lambda: len(heard) > 2, "some tries"),
            self.name_https(server.server_port))).start()
        self.assertEqual(0, client.status()["totals"]["jobs"])
        self.assertEqual({b""}, set(heard))

    def test_a_new_certificate_is_found_in_the_access_file(self):
        server, client = self.open_server(), self.client()
        client.status()
        client.close()
        server.tls = jobman.tls_context(*self.other)
        self.name_server(fingerprint=digest(self.other[0]))
        client.status()
        self.assertEqual(digest(self.other[0]), client.fingerprint)

    def test_without_a_fingerprint_authorities_vouch(self):
        port = self.open_server().server_port
        ours, other = digest(self.certfile), digest(self.other[0])
        colons = re.sub("(..)(?=.)", r"\1:", ours.upper())
        for host, fingerprint, certificates, expected in (
            ("localhost", "", "", "can't be trusted"),
            ("localhost", "", self.certfile, "ok"),
            ("127.0.0.1", "", self.certfile, "can't be trusted"),
            ("127.0.0.1", colons, "", "ok"),
            ("localhost", other, self.certfile, "Another server"),
            ("localhost", "1234", "", "isn't a SHA-256"),
        ):
            with self.subTest(host=host, fingerprint=fingerprint), \
                    replaced_environment(dict(
                        self.environment, JOBMAN_JOBIX="1",
                        JOBMAN_URL="https://%s:%d" % (host, port),
                        JOBMAN_FINGERPRINT=fingerprint,
                        SSL_CERT_FILE=certificates)):
                try:
                    with contextlib.closing(worker.Client(patience=0)) as it:
                        found = it.health()["status"]
                except worker.Trouble as trouble:
                    found = str(trouble)
                self.assertIn(expected, found)
        with self.assertRaisesRegex(worker.Trouble, "needs an https"):
            worker.Client(url="http://h", jobix=1, fingerprint=colons)

    def test_beyond_loopback_it_speaks_tls_unless_told_otherwise(self):
        beyond = "--host", "0.0.0.0"
        warned = r"\Ajobman\.py: .*plain HTTP[^\n]+\n\Z"
        for options, scheme, said in (
            ((), "http", r"\A\Z"), (beyond, "https", r"\A\Z"),
            ((*beyond, "--plain"), "http", warned),
        ):
            server, _ = self.serve(*options)
            access = self.access()
            self.assertEqual(scheme, access["url"].partition(":")[0])
            self.assertEqual(scheme == "https", bool(access["fingerprint"]))
            self.name_server(url=re.sub("//.*:", "//127.0.0.1:",
                                        access["url"]))
            self.assertEqual("ok", self.client().health()["status"])
            server.terminate()
            self.assertRegex(self.finish(server)[2], said)


@slow
class DoctorTest(Certified, HostCase, StoreCase):
    """What doctor finds, on a healthy host and on others."""

    def setUp(self):
        super().setUp()
        self.lead_to("http://127.0.0.1:%d" % self.address[1])

    def lead_to(self, url):
        """Write the access file of a server at `url`."""
        self.name_server(
            url=url, jobix=self.jobix, host=socket.gethostname())

    def examine(self, *argv):
        """Return what doctor finds: {name: (ok, what it says)}."""
        status, out, err = self.jobman("doctor", *argv, "--output", "json")
        self.assertEqual("", err)
        self.assertNotRegex(out, r"\b%d\b" % self.jobix)  # a port may be 47111
        found = json.loads(out)
        for one in found:
            self.assertEqual(["name", "ok", "said"], list(one))
            self.assertNotRegex(one["said"], r"\n|\.$")
        self.assertEqual(int(not all(one["ok"] for one in found)), status)
        return {one["name"]: (one["ok"], one["said"]) for one in found}

    def assertOk(self, name, said, *argv, ok=True):
        """Assert what doctor says of one thing; return all its findings."""
        found = self.examine(*argv)
        self.assertIn(name, found)
        self.assertEqual(ok, found[name][0], found[name])
        self.assertRegex(found[name][1], said)
        return found

    def assertWrong(self, name, said, *argv):
        return self.assertOk(name, said, *argv, ok=False)

    def put(self, name, text):
        """Write a private file in the test's folder."""
        with open(self.path(name), "w", encoding="latin-1") as file:
            os.chmod(self.path(name), 0o600)
            file.write(text)

    # How it is said

    def test_a_healthy_host_has_a_line_for_each_thing(self):
        table = self.does("doctor", "--db", "jobs.db")
        self.assertRegex(table, r"\A(\w+ +ok     \S.*\n){9}\Z")
        self.assertRegex(table, r"\Aprogram .* Python %d\.%d.*, SQLite %s" % (
            *sys.version_info[:2], re.escape(sqlite3.sqlite_version)))
        self.assertEqual(
            "", self.does("doctor", "--db", "jobs.db", "--output", "quiet"))

    def test_what_is_wrong_is_named(self):
        os.unlink(self.path(".jobman", "access.json"))
        self.assertEqual((1, "access\n", ""), self.jobman(
            "doctor", "--output", "quiet"))
        status, table, _ = self.jobman("doctor", "--access", "\033[2J")
        self.assertEqual(1, status)
        self.assertRegex(table, r"\naccess       wrong  There is no access ")
        self.assertNotIn("\033", table)

    def test_nothing_is_changed(self):
        def state():
            return {path: (read(path), os.stat(path).st_mtime_ns)
                    for path in glob.glob(self.path("**"), recursive=True)
                    + glob.glob(self.path(".jobman", "*"))
                    if os.path.isfile(path)}

        self.closing.close()
        before = state()
        self.assertEqual(2, len(before))
        self.examine("--db", "jobs.db")
        self.assertEqual(before, state())

    def test_wrong_usage_is_exit_status_2(self):
        for argv in (["--output", "xml"], ["this"], [":::", "x"]):
            self.refusal("doctor", *argv, status=2)

    # This host

    def test_worker_py_is_of_the_same_version(self):
        self.replace("__version__", "0.0.0+old")
        self.assertWrong("program", r"worker.py is .* jobman.py 0\.0\.0\+old")

    def test_the_access_file_is_there_and_private(self):
        path = self.path(".jobman", "access.json")
        for age, said in ((7200, r"2:0\d:"), (-99, "0 ms ago")):
            os.utime(path, (time.time() - age, time.time() - age))
            self.assertOk("access", "%s, for its owner only, written %s" % (
                re.escape(path), said))
        os.chmod(path, 0o640)
        found = self.assertWrong("access", "others can read it: chmod 600")
        self.assertEqual({"program", "access"}, set(found))
        self.put("odd.json", "[%d" % self.jobix)
        self.assertWrong("access", "Can't read odd.json", "--access",
                         "odd.json")
        self.assertWrong("access", "There is no access file none.json: start",
                         "--access", "none.json")

    def test_variables_may_name_the_server_instead(self):
        self.environment.update(
            JOBMAN_URL="http://127.0.0.1:%d" % self.address[1],
            JOBMAN_JOBIX=str(self.jobix))
        self.assertOk("access", "JOBMAN_URL names the server")
        del self.environment["JOBMAN_JOBIX"]
        self.assertWrong("access", "needs a jobix too")

    # The way to the server

    def test_the_servers_address_is_looked_at(self):
        self.assertOk("address", r"^127\.0\.0\.1, port")
        self.lead_to("http://%s:80" % ("x" * 64))
        found = self.assertWrong("access", "The server's address 'http://x+")
        self.assertNotIn("address", found)
        self.lead_to("http://127.0.0.1:%d" % self.address[1])
        self.name_server(host="login1")
        found = self.assertWrong(
            "address", "own host login1; start it with --host 0.0.0.0")
        self.assertNotIn("connection", found)
        self.name_server(url="http://0.0.0.0:%d" % self.address[1])
        self.assertOk("address", "^0.0.0.0, port")

    def test_a_server_listens_there(self):
        self.assertOk("connection", "takes connections, plain HTTP")
        self.lead_to("http://no host:80")
        self.assertWrong("connection", "can't be reached .*another --url")
        with contextlib.closing(socket.socket()) as deaf:
            deaf.bind(("127.0.0.1", 0))
            self.lead_to("http://127.0.0.1:%d" % deaf.getsockname()[1])
            found = self.assertWrong(
                "connection", "no server listens there: start it")
        self.assertNotIn("server", found)

    def test_a_silent_server_and_a_firewall_are_given_up_in_seconds(self):
        with contextlib.ExitStack() as stack:
            full = stack.enter_context(socket.socket())
            full.bind(("127.0.0.1", 0))
            full.listen(0)
            for _ in range(5):  # no more get in, as with a firewall
                other = stack.enter_context(socket.socket())
                other.setblocking(False)
                other.connect_ex(full.getsockname())
            silent, _ = self.listen(lambda request: None)
            doctors = []
            for port in (full.getsockname()[1], silent):
                self.lead_to("http://127.0.0.1:%d" % port)
                name = "%d.json" % port
                os.rename(self.path(".jobman/access.json"), self.path(name))
                doctors.append(self.spawn(
                    JOBMAN, "doctor", "--access", name))
            for doctor, said in zip(doctors, (
                r"\nconnection +wrong .*\(timed out\); look for a firewall",
                r"\nserver +wrong .*timed out.*its standard error",
            )):
                self.assertRegex(self.finish(doctor)[1], said)

    def test_a_server_has_the_certificate_that_was_announced(self):
        self.lead_to("https://127.0.0.1:%d" % self.address[1])
        self.assertWrong("connection", "it doesn't speak TLS")
        self.door.server.tls = jobman.tls_context(self.certfile, self.keyfile)
        self.name_server(fingerprint=digest(self.certfile))
        self.assertOk("connection", "right fingerprint")
        self.name_server(fingerprint="0" * 64)
        found = self.assertWrong(
            "connection", "not the server of.*its fingerprint is %s.*;"
            " end it, or use" % digest(self.certfile))
        self.assertNotIn("server", found)
        self.name_server(fingerprint=None)
        self.assertWrong("connection", "can't be trusted")
        self.environment["SSL_CERT_FILE"] = self.certfile
        self.name_server(url="https://localhost:%d" % self.address[1])
        self.assertOk("connection", "trusted authority")
        self.name_server(url="http://127.0.0.1:%d" % self.address[1])
        self.assertWrong("server", "can't be reached")

    # The server

    HEAD = (b"HTTP/1.1 %s\r\nContent-Type: %s\r\n"
            b"Content-Length: %d\r\nConnection: close\r\n\r\n%s")

    def test_a_server_and_its_database_are_well(self):
        self.assertOk("server", "and so does its database")
        html, json_type = b"text/html", b"application/json"
        for status, kind, body, said in (
            (b"404 No", html, b"<p>", "isn't a jobman server.*Look at"),
            (b"200 OK", json_type, b"[7", "isn't a jobman server.*Look at"),
            (b"200 OK", json_type, b"{}",
             "not a jobman server; look at the address in the access file$"),
            (b"421 No", json_type, b'{"error": "Not mine."}', "^Not mine$"),
            (b"503 No", html, b"", r"\(503\).*its standard error"),
            (b"200 OK", json_type, b'{"version": "0.0.0+old"}',
             r"server is jobman 0\.0\.0\+old, this is .*; use the same"),
        ):
            with self.subTest(status=status, body=body):
                answer = self.HEAD % (status, kind, len(body), body)
                port, _ = self.listen(lambda request, answer=answer: answer)
                self.lead_to("http://127.0.0.1:%d" % port)
                self.assertNotIn("jobix", self.assertWrong("server", said))

    def test_the_server_takes_our_jobix(self):
        self.store.open_to_all = False
        self.assertWrong("jobix", "doesn't accept our jobix; use")
        self.name_server(jobix=self.store.jobix)
        self.assertOk("jobix", "^it is accepted$")
        self.name_server(jobix=self.store.reading_jobix)
        self.assertOk("jobix", "^it is accepted, for reading only$")

    # The database

    def test_a_database_is_looked_at_where_one_is_named_or_usual(self):
        names = {"database", "locks", "holder"}
        self.assertFalse(names & set(self.examine()))
        os.symlink("../jobs.db", self.path(".jobman", "jobman.db"))
        found = self.assertOk("database", r"jobman\.db, schema \d$")
        self.assertLessEqual(names, set(found))
        for path in ("new.db", "nowhere/new.db"):
            self.assertOk(
                "database", "new.db isn't there yet; serve", "--db", path)
            self.assertOk("holder", "no server uses .*new.db", "--db", path)
            self.assertFalse(os.path.exists(self.path(path)))

    def test_a_database_that_cannot_be_used_is_explained(self):
        self.put("text.db", "x" * 200)
        os.mkdir(self.path("open"))
        os.chmod(self.path("open"), 0o1777)
        shutil.copy(self.path("jobs.db"), self.path("open"))
        for path, said in (
            (self.folder, "can't be used: Is a directory"),
            ("text.db", "text.db is not a database"),
            ("open/new.db", "open can be written by anyone: .*mkdir -m 700"),
            ("open/jobs.db", "open can be written by anyone: .*mkdir -m 700"),
        ):
            self.assertWrong("database", said, "--db", path)
        access = os.access
        self.addCleanup(setattr, os, "access", access)
        os.access = lambda path, mode: mode != os.W_OK and access(path, mode)
        self.assertWrong("database", "isn't writable; chmod u", "--db",
                         "jobs.db")

    def test_the_file_system_and_its_locks_are_named(self):
        self.assertOk("locks", "jobs.db is on .*, where locks work$",
                      "--db", "jobs.db")
        mount(self)
        self.assertOk(
            "locks", r"nfs4 \(far\), where locks work \(a network file system,"
            " so only one", "--db", "new.db")
        self.environment.update(LD_PRELOAD=compile_shim(self), LOCKS="lie")
        _, out, _ = self.command(JOBMAN, "doctor", "--db", "new.db")
        self.assertRegex(
            out, r"\nlocks +wrong .*locks don't work; use a disk of this host")
        self.assertFalse(glob.glob(self.path("new.db*")))

    def test_the_server_that_has_a_database_is_named(self):
        db, here = ("--db", "own.db"), socket.gethostname()
        with contextlib.closing(jobman.Store(self.path("own.db"))):
            me = "process %d on %s" % (os.getpid(), here)
            self.name_server(pid=os.getpid())
            self.assertOk("holder", "^%s serves own.db$" % me, *db)
            self.name_server(pid=os.getppid())
            self.assertWrong(
                "holder", "^%s serves own.db, but the access file is of"
                " process %d on" % (me, os.getppid()), *db)
        with contextlib.closing(jobman.Store(
                self.path("own.db"), shared=True)):  # then it may be of any
            self.assertOk("holder", "^%s serves own.db$" % me, *db)
        ended = self.spawn("-c", "")
        ended.wait()
        self.name_server(host="far", pid=7)
        for content, said in (
            (json.dumps({"host": here, "pid": ended.pid}),
             "^process %d on .* has ended; serve would" % ended.pid),
            ('{"host": "far", "pid": 7}',
             "^process 7 on far serves own.db, if it is still alive there"),
            ("", "^no server uses"), ("\0\xff", "^no server uses"),
            ("[]", "^no server uses"), ('{"host": 7}', "^process . on 7 serv"),
        ):
            with self.subTest(content=content):
                self.put("own.db.lock", content)
                self.assertRegex(self.examine(*db)["holder"][1], said)


class BatchTest(HostCase):
    """The scripts for batch systems, as jobman.py prints them."""

    def script(self, *argv):
        """Return the script that a command prints, which bash can read."""
        script = self.does(*argv)
        subprocess.run(["bash", "-n"], input=script.encode(), check=True)
        return script

    def test_every_line_of_a_script_for_slurm(self):
        script = self.script(
            "sbatch", "--nodes", "4", "--time", "1:00:00",
            "--worker", "--stage 0,2 --command 'cat $x'",
            "--", "-p", "long", "--comment=a b",
        )
        self.assertEqual([
            "#!/bin/bash",
            "#SBATCH --job-name=jobman",
            "#SBATCH --nodes=4",
            "#SBATCH --ntasks-per-node=1",
            "#SBATCH --time=1:00:00",
            "#SBATCH --signal=USR1@60",
            "#SBATCH --no-kill",
            "#SBATCH --exclusive",
            "#SBATCH -p long",
            "#SBATCH '--comment=a b'",
            "",
            'exec srun --nodes="$SLURM_JOB_NUM_NODES"'
            ' --ntasks="$SLURM_JOB_NUM_NODES" \\',
            "    --ntasks-per-node=1 --cpu-bind=none --export=ALL \\",
            "    --no-kill --kill-on-bad-exit=0 --wait=0 \\",
            "    /bin/sh -c 'worker=$1; shift",
            '        exec "$0" "$worker" --slots "$SLURM_CPUS_ON_NODE" "$@"\''
            " \\",
            "    %s %s --access %s --stage 0,2 --command 'cat $x'" % (
                sys.executable, WORKER, self.path(".jobman", "access.json")
            ),
            "",
        ], script.split("\n"))

    def test_every_line_of_a_script_for_pbs(self):
        script = self.script(
            "pbs", "--nodes", "4", "--time", "1:00:00", "--access", "here",
            "--worker", "--slots=3", "--", "-q", "long", "-l", "mem=4gb",
        )
        self.assertEqual([
            "#!/bin/bash",
            "#PBS -N jobman",
            "#PBS -S /bin/bash",
            "#PBS -l walltime=1:00:00",
            "#PBS -l select=4",
            "#PBS -l place=scatter:exclhost",
            "#PBS -q long",
            "#PBS -l mem=4gb",
            "",
            "exec pbsdsh -- /bin/bash -lc"
            " 'cd \"$1\" && shift && exec \"$@\"' bash \\",
            '    "$PBS_O_WORKDIR" \\',
            "    %s %s --access %s --time-limit 3600s --slots=3" % (
                sys.executable, WORKER, self.path("here")
            ),
            "",
        ], script.split("\n"))

    def test_a_node_is_taken_whole_unless_the_options_say_otherwise(self):
        for words, whole in (
            (["-c", "16"], False), (["-c16"], False), (["-s"], False),
            (["--cpus-per-task=16"], False), (["--oversubscribe"], False),
            (["--exclusive=user"], False), ([], True),
            (["--signal=USR1@5"], True), (["--comment=-c"], True),
        ):
            script = self.does("sbatch", "--time", "2h", "--", *words)
            self.assertEqual(whole, "#SBATCH --exclusive\n" in script, words)

    def test_chunks_and_places_are_named_once(self):
        for words, ours in (
            (["-l", "select=2:ncpus=8"], ["place"]),
            (["-lselect=2:ncpus=8"], ["place"]),
            (["-l", "mem=4gb,select=1:x=a b"], ["place"]),
            (["-l", "select=2", "-l", "place=free"], []),
            (["-N", "select=3"], ["select", "place"]),
        ):
            script = self.does("pbs", "--time", "2h", "--", *words)
            self.assertEqual(ours, re.findall(
                "(?m)^#PBS -l (select(?==1$)|place(?==scatter))", script))

    def test_the_notice_is_short_for_a_short_time(self):
        for text, notice in (("1m", 6), ("9m", 54), ("3h", 60), ("5s", 1)):
            self.assertIn("--signal=USR1@%d\n" % notice,
                          self.does("sbatch", "--time", text))

    def test_times_are_read_and_ambiguous_ones_refused(self):
        for text, seconds in (
            ("1:00:00", 3600), ("100:00:01", 360001), ("1-12:00:00", 129600),
            ("0-00:00:09", 9), ("1-0", 86400), ("1-12:30", 131400),
            ("90m", 5400), ("2h30m", 9000), ("1d2h3m4s", 93784), ("45s", 45),
        ):
            self.assertEqual(seconds, worker.read_span(text), text)
        for text in ("", "0", "90", "1:30", "0:00:00", "0m", "1:60:00",
                     "1:00:60", "1h1", "m", "30m2h", "1.5h", " 1h", "1h\n",
                     "\u0661h", "9" * 30 + "d", "9" * 5000 + "d"):
            with self.assertRaises(ValueError):
                worker.read_span(text)

    def test_wrong_usage_is_exit_status_2(self):
        for words, named in (
            ([], "--time"),
            (["--time", "-1:00:00"], "--time"),
            (["--time", "1h", "--nodes", "0"], "--nodes"),
            (["--time", "1h", "--nodes", "many"], "--nodes"),
            (["--time", "1h", "--worker", "--slots 0"], "--slots"),
            (["--time", "1h", "--worker", "--nonsense"], "--nonsense"),
            (["--time", "1h", "--worker", "it's"], "quotation"),
            (["--time", "1h", "--worker"], "--worker"),
            (["--time", "1h", "here"], "here"),
            (["--time", "1h", "--", "long"], "'long'"),
            (["--time", "1h", "--", "-p", "a\nb"], "a\\nb"),
            (["--time", "1h", "--", "--comment=it's"], "it's"),
            (["--time", "1h", "--", '--comment="'], "--comment"),
            (["--time", "1h", "--", "--comment=\\"], "--comment"),
            (["--time", "1h", ":::", "a"], ":::"),
        ):
            for command in ("sbatch", "pbs"):
                with self.subTest(command=command, words=words):
                    self.assertIn(named, self.refusal(
                        command, *words, status=2))

    def test_without_worker_py_there_is_one_sentence(self):
        shutil.copy(JOBMAN, self.folder)
        status, out, err = self.command(
            self.path("jobman.py"), "sbatch", "--time", "1h"
        )
        self.assertEqual((1, ""), (status, out))
        self.assertRegex(err, r"\A\S+ \S+worker\.py is needed[^\n]+\n\Z")

    def test_a_script_for_pbs_starts_a_worker_whatever_the_names(self):
        """A stand-in for pbsdsh, on which it depends, is all there is here."""
        odd = self.path(os.fsdecode(b"it's a \"b\" \xc3\xa9 $x"))
        os.mkdir(odd)
        access = os.path.join(odd, "access.json")
        self.serve("--access", access)
        with contextlib.closing(worker.Client(access)) as client:
            client.set({1: {"jobstage": 0, "laststage": 2}})
        os.mkdir(self.path("bin"))
        with open(self.path("bin", "pbsdsh"), "w") as file:
            file.write('#!/bin/sh\nshift; cd /; exec env -i HOME=$HOME "$@"\n')
        os.chmod(self.path("bin", "pbsdsh"), 0o755)
        self.environment["LC_ALL"] = "C"
        _, script, _ = self.command(
            JOBMAN, "pbs", "--time", "1h", "--access", access, "--worker",
            "--idle-timeout 0.1 --print --command 'echo $PWD \"a  b\"'",
        )
        jobix = json.loads(read(access).decode())["jobix"]
        self.assertNotIn(str(jobix), script)
        out = subprocess.run(
            ["bash", "-c", script.encode("utf-8", "surrogateescape")],
            env=dict(self.environment, PBS_O_WORKDIR=odd,
                     PATH=self.path("bin") + ":" + os.environ["PATH"]),
            stdout=subprocess.PIPE, timeout=PATIENCE).stdout
        self.assertEqual(os.fsencode(odd) + b" a  b\n", out)


def recipe(mark):
    """Return the one block of code in README that has `mark`."""
    with open(os.path.join(HERE, "README.md"), encoding="utf-8") as file:
        blocks = re.findall(r"(?ms)^```\w*\n(.*?)^```$", file.read())
    block, = [block for block in blocks if mark in block]
    return block


def replaced(text, *pairs):
    """Return `text` with the second of each pair in place of the first."""
    for old, new in pairs:
        assert old in text, old
        text = text.replace(old, new)
    return text


def environment_of(pid):
    """Return a process's environment as it started, by entries."""
    try:
        return read("/proc/%d/environ" % pid).split(b"\0")
    except OSError:  # not ours, or gone meanwhile
        return []


class Cluster:
    """Slurm on this host: a controller and two nodes of four cores each.

    All that belongs to it is in `folder`, and all of it ends with stop().
    """

    PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue",
                "sinfo", "scancel", "scontrol")
    CONFIGURATION = """\
ClusterName=jobman
SlurmctldHost=%(host)s(127.0.0.1)
SlurmctldPort=%(port0)d
SlurmUser=root
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
AuthType=auth/munge
AuthInfo=socket=%(folder)s/munge.socket
CredType=cred/munge
StateSaveLocation=%(folder)s/state
SlurmdSpoolDir=%(folder)s/spool-%%n
SlurmctldPidFile=%(folder)s/slurmctld.pid
SlurmdPidFile=%(folder)s/slurmd-%%n.pid
SelectType=select/cons_tres
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1
SlurmdParameters=config_overrides
ReturnToService=2
KillOnBadExit=1
WaitTime=2
KillWait=10
OverTimeLimit=0
NodeName=DEFAULT CPUs=4 RealMemory=4000
NodeName=n1 NodeHostname=%(host)s NodeAddr=127.0.0.1 Port=%(port1)d
NodeName=n2 NodeHostname=%(host)s NodeAddr=127.0.0.1 Port=%(port2)d
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""

    def __init__(self, folder):
        self.folder = folder
        self.processes = []
        self.environment = dict(
            os.environ, SLURM_CONF=self.path("slurm.conf"), TMPDIR=folder)
        path = os.environ["PATH"] + ":/usr/local/sbin:/usr/sbin:/sbin"
        self.programs = {
            name: shutil.which(name, path=path) for name in self.PROGRAMS
        }

    def path(self, name):
        return os.path.join(self.folder, name)

    def missing(self):
        """Return what this host lacks for it, nothing if it has all."""
        lacks = [name for name, path in self.programs.items() if not path]
        return ", ".join(lacks) or ("" if os.geteuid() == 0 else "root")

    def configure(self):
        """Write slurm.conf and the key with which its parts trust each other.
        """
        values = {"folder": self.folder,
                  "host": socket.gethostname().split(".")[0]}
        with contextlib.ExitStack() as stack:
            for i in range(3):
                free = stack.enter_context(socket.socket())
                free.bind(("127.0.0.1", 0))
                values["port%d" % i] = free.getsockname()[1]
        with open(self.environment["SLURM_CONF"], "w") as file:
            file.write(self.CONFIGURATION % values)
        key = os.open(self.path("munge.key"), os.O_WRONLY | os.O_CREAT, 0o400)
        with open(key, "wb") as file:
            file.write(os.urandom(1024))
        os.mkdir(self.path("state"))

    def start(self):
        """Start all of it; return when both nodes are idle."""
        self.configure()
        self.spawn("munged", "--foreground", "--force", *[
            "--%s=%s" % (option, self.path(name)) for option, name in (
                ("key-file", "munge.key"), ("socket", "munge.socket"),
                ("pid-file", "munged.pid"), ("log-file", "munged.log"),
                ("seed-file", "munge.seed"))])
        wait_for(lambda: os.path.exists(self.path("munge.socket")), "munged")
        configuration = ["-D", "-f", self.environment["SLURM_CONF"]]
        self.spawn("slurmctld", *configuration)
        for node in ("n1", "n2"):
            self.spawn("slurmd", *configuration, "-N", node)
        wait_for(self.is_idle, "two idle nodes: " + self.folder)

    def spawn(self, name, *argv):
        """Start a daemon, its output in a file."""
        with open(self.path("%s.out" % name), "ab") as log:
            self.processes.append(subprocess.Popen(
                [self.programs[name], *argv], env=self.environment,
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            ))

    def is_idle(self):
        """Return whether both nodes have nothing to do."""
        return self.query("sinfo", "-hN", "-o", "%t") == "idle\nidle\n"

    def query(self, name, *argv, given=None):
        """Run one of Slurm's commands; return what it prints, also errors."""
        return subprocess.run(
            [self.programs[name], *argv], env=self.environment, input=given,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=self.folder,
            timeout=PATIENCE,
        ).stdout.decode("utf-8")

    def stop(self):
        """End all processes; before that the jobs, which end with theirs."""
        if self.processes[1:]:
            self.query("scancel", "--user=root")
            with contextlib.suppress(AssertionError):
                wait_for(lambda: not self.query("squeue", "-h"), "their end")
        for process in reversed(self.processes):
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(PATIENCE)
            process.kill()
            process.wait()
        for pid in self.strays():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def strays(self):
        """Return the processes that know of this cluster: what it ran."""
        mark = b"SLURM_CONF=" + os.fsencode(self.environment["SLURM_CONF"])
        pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]
        return [pid for pid in pids if mark in environment_of(pid)]


@long
class ChaosTest(SeededCase):
    """A minute in which all goes wrong that can."""

    JOBS = 500
    SECONDS = 60
    COMMAND = r"""
        claim=$(sed 's/.*"claim": "\([^"]*\)".*/\1/')
        name=$JOBMAN_JOBID.$JOBMAN_STAGE
        echo "$JOBMAN_JOBID $JOBMAN_STAGE $claim" >> begun
        [ "$JOBMAN_STAGE" = 0 ] || grep -q "^$JOBMAN_JOBID 0 " \
            "$JOBMAN_FILENAME" || exit 9
        sleep 0.$((JOBMAN_JOBID % 5 + 1))
        echo "$JOBMAN_JOBID $JOBMAN_STAGE $claim" > made/$claim
        mv made/$claim made/$name
        echo '{"filename": "made/'$name'"}' > "$JOBMAN_RESULT"
    """

    def setUp(self):
        super().setUp()
        os.mkdir(self.path("made"))
        self.workers, self.given_up, self.started = {}, set(), 0
        self.move_server()
        self.client = worker.Client(self.path(".jobman", "access.json"))
        self.addCleanup(self.client.close)

    def move_server(self):
        """Start the server, at another port each time."""
        self.server, _ = self.serve("--lapses", "1000")

    def start_worker(self, *argv):
        """Start a worker under a name that tells it from all others."""
        self.started += 1
        name = "w%d" % self.started
        argv = (
            "--name", name, "--stage", "0,2", "--slots", "2", "--lease", "5",
            "--grace", "1", "--idle-timeout", "1000", *argv)
        with open(self.path("%s.err" % name), "wb") as err:
            # its commands are told their tokens, by which to find them here
            start = changed("worker", "worker.Worker.SECRETS = ()")
            self.workers[name] = self.spawn(
                *start, "--command", self.COMMAND, *argv, stderr=err,
                stdout=err)

    def lose_worker(self, number, *argv):
        """End a worker by a signal, and start another."""
        name = self.random.choice(sorted(self.workers))
        self.given_up.add(name)
        self.workers.pop(name).send_signal(number)
        self.start_worker(*argv)

    def cut_allocation(self):
        """End a worker by its notice; start one that has to end soon."""
        limit = "%ds" % self.random.randint(7, 12)
        self.lose_worker(signal.SIGUSR1, "--time-limit", limit)
        self.given_up.add("w%d" % self.started)

    def lose_server(self):
        """End the server, and after a while start it anew elsewhere."""
        number = self.random.choice([signal.SIGKILL, signal.SIGTERM])
        self.server.send_signal(number)
        self.server.wait()
        if self.random.random() < 0.5:  # its end and a worker's together
            self.lose_worker(signal.SIGTERM)
        time.sleep(self.random.uniform(0, 3))
        self.move_server()

    def wreak_havoc(self):
        """Do harm at random for a while."""
        acts = (
            [lambda: self.lose_worker(signal.SIGKILL)] * 3
            + [lambda: self.lose_worker(signal.SIGTERM)] * 2
            + [self.cut_allocation] * 2 + [self.lose_server] * 2
        )
        end = time.monotonic() + self.SECONDS
        while time.monotonic() < end:
            time.sleep(self.random.uniform(0.2, 1.5))
            self.random.choice(acts)()
            for name, process in list(self.workers.items()):
                if process.poll() is not None:  # its time was over
                    del self.workers[name]
                    self.start_worker()

    def lines(self, name):
        """Return the lines of a file as tuples (jobid, stage, claim)."""
        lines = read(self.path(name)).decode().splitlines()
        return [
            (int(jobid), int(stage), claim)
            for jobid, stage, claim in (line.split() for line in lines)
        ]

    def test_every_job_is_done_and_only_killed_ones_ran_again(self):
        job = {"jobstage": 0, "laststage": 4}
        self.client.set(dict.fromkeys(range(1, self.JOBS + 1), job))
        for _ in range(4):
            self.start_worker()
        self.wreak_havoc()
        for _ in range(2):
            self.start_worker()
        end = time.monotonic() + 240
        states = {}
        while states.get("done") != self.JOBS and time.monotonic() < end:
            states = self.client.status()["totals"]["states"]
            time.sleep(0.2)
        self.assertEqual(self.JOBS, states["done"], states)
        self.check_ledger()
        self.assertEqual([{"n": self.JOBS}], rows(
            self.path("jobman.db"),
            "select count(*) as n from job where files_stage = 2"))
        status, _, err = self.command(JOBMAN, "verify")
        self.assertEqual(0, status, err)
        self.wrong = False

    def check_ledger(self):
        """Check what ran against what the server knows of it."""
        database = self.path("jobman.db")
        attempts = rows(
            database, "select jobid, attempt.stage, attempt.claim, outcome,"
            " attempt.worker from attempt join job on job.id = attempt.job")
        done = {
            (each["jobid"], each["stage"]): each["claim"] for each in attempts
            if each["outcome"] == "done"
        }
        steps = [(i, s) for i in range(1, self.JOBS + 1) for s in (0, 2)]
        self.assertEqual(steps, sorted(done))
        begun = self.lines("begun")
        self.assertEqual(len(begun), len(set(begun)))  # none under one claim
        self.assertLessEqual({(*step, done[step]) for step in steps},
                             set(begun))
        killed = [
            each for each in attempts if each["outcome"] != "done"
            and (each["jobid"], each["stage"], each["claim"]) in set(begun)
        ]
        self.assertEqual(len(begun) - len(steps), len(killed))
        self.assertLessEqual(
            {each["outcome"] for each in killed}, {"lapsed", "released"})
        self.assertLessEqual(
            {each["worker"] for each in killed}, self.given_up)
        self.assertTrue(killed)
        for jobid, stage in steps:  # the last word has the newest claim
            made = self.lines("made/%d.%d" % (jobid, stage))
            self.assertEqual([(jobid, stage, done[jobid, stage])], made)


class ClusterCase(HostCase):
    """Tests under a real Slurm, with a real server."""

    @classmethod
    def setUpClass(cls):
        cls.cluster = Cluster(tempfile.mkdtemp(prefix="jobman-test-"))
        missing = cls.cluster.missing()
        try:
            if missing:
                raise unittest.SkipTest("a Slurm of its own needs " + missing)
            cls.cluster.start()
        except BaseException:
            cls.tearDownClass()
            raise

    @classmethod
    def tearDownClass(cls):
        cls.cluster.stop()
        shutil.rmtree(cls.cluster.folder, ignore_errors=True)

    def setUp(self):
        super().setUp()
        self.serve()
        self.client = worker.Client(self.path(".jobman", "access.json"))
        self.addCleanup(self.client.close)
        self.addCleanup(self.clear)

    def clear(self):
        """End what a test has left in the queue."""
        self.cluster.query("scancel", "--user=root")
        wait_for(self.cluster.is_idle, "idle nodes")


@long
class SlurmTest(ClusterCase):
    """The script of sbatch under a real Slurm."""

    LIMIT = 150  # seconds until an allocation of a minute is surely over

    def add(self, *commands, **carried):
        """Add a job for each command, numbered from 1."""
        job = dict({"jobstage": 0, "laststage": 2}, **carried)
        self.client.set({
            i: dict(job, jobcmd=command, cwd=self.folder)
            for i, command in enumerate(commands, 1)
        })

    def script(self, *argv, options=""):
        """Return what sbatch is to be given."""
        return self.does(
            "sbatch", "--worker", "--idle-timeout 1 --lease 4 " + options,
            *argv).encode()

    def sbatch(self, script, *argv):
        """Submit a script; return the number of its allocation."""
        out = self.cluster.query("sbatch", "--parsable", *argv, given=script)
        self.assertRegex(out, r"\A\d+\n\Z")
        return out.strip()

    def submit(self, *argv, options=""):
        """Submit a script that starts workers."""
        return self.sbatch(
            self.script(*argv, options=options), "--open-mode=append",
            "--output", self.path("slurm.out"))

    def over(self, allocation, limit=PATIENCE):
        """Wait for the end of an allocation."""
        end = time.monotonic() + limit
        while self.cluster.query("squeue", "-h", "-j", allocation, "-t", "all",
                                 "-o", "%T").strip() in (
            "PENDING", "CONFIGURING", "RUNNING", "COMPLETING"
        ):
            if time.monotonic() >= end:
                self.fail("%s%s%s" % (
                    self.cluster.query("squeue"), self.output(),
                    self.client.status()["totals"]))
            time.sleep(0.1)

    def output(self):
        """Return what the workers have printed and said."""
        return read(self.path("slurm.out")).decode("utf-8", "replace")

    def states(self):
        """Return how many jobs are in each state that any is in."""
        states = self.client.status()["totals"]["states"]
        return {state: n for state, n in states.items() if n}

    def outcomes(self):
        """Return how the attempts ended, for each job in turn."""
        query = ("select jobid, outcome from attempt join job"
                 " on attempt.job = job.id order by attempt.id")
        found = {}
        for row in rows(self.path("jobman.db"), query):
            found.setdefault(row["jobid"], []).append(row["outcome"])
        return [found[jobid] for jobid in sorted(found)]

    def lines(self, name):
        """Return the lines of a file that commands write to."""
        return read(self.path(name)).decode().split("\n")[:-1]

    def test_each_node_has_a_worker_with_all_of_its_cores(self):
        self.add(*[
            "echo $SLURMD_NODENAME >> nodes; : > here-$JOBMAN_JOBID;"
            " until [ $(ls here-* | wc -l) = 8 ]; do sleep 0.05; done"
        ] * 8)
        self.over(self.submit("--nodes", "2", "--time", "5m"))
        self.assertEqual({"done": 8}, self.states(), self.output())
        self.assertEqual(["n1"] * 4 + ["n2"] * 4, sorted(self.lines("nodes")))
        query = "select distinct worker from attempt"
        self.assertEqual(2, len(rows(self.path("jobman.db"), query)))

    def test_a_worker_has_as_many_slots_as_cores_were_asked_for(self):
        tell = "tr '\\0' ' ' < /proc/$PPID/cmdline >> slots; echo >> slots"
        self.add(tell)
        self.over(self.submit("--time", "5m", "--", "--cpus-per-task=3"))
        self.assertRegex(self.lines("slots")[0], "worker.py --slots 3 ")
        self.client.retry(all=True)
        self.over(self.submit("--time", "5m", options="--slots 2"))
        self.assertRegex(self.lines("slots")[1], "--slots 4 .*--slots 2 ")
        self.assertEqual({"done": 1}, self.states(), self.output())

    def test_jobs_cut_off_by_the_time_limit_are_done_next_time(self):
        """Once by the notice before the end, once by the end itself."""
        self.client.set({
            1: {"jobstage": 0, "laststage": 2},
            2: {"jobstage": 10, "laststage": 12},
        })
        command = "--command 'cd %s; mkdir first-$JOBMAN_JOBID" \
            " && exec sleep 300; true'" % self.folder
        noticed = self.submit("--time", "1m", options=command)
        cut = self.submit("--time", "1m", "--", "--signal=CONT@6",
                          options=command + " --stage 10")
        self.over(noticed, self.LIMIT)
        self.over(cut, self.LIMIT)
        wait_for(lambda: self.states() == {"waiting": 2}, self.output())
        self.over(self.submit(
            "--time", "5m", options=command + " --stage 10,0"
        ))
        self.assertEqual({"done": 2}, self.states(), self.output())
        self.assertEqual([["released", "done"]] * 2, self.outcomes())

    def test_cancelling_an_allocation_loses_nothing(self):
        self.add(*[
            "echo >> began; [ $JOBMAN_JOBID -lt 5 ] || [ -e go ]"
            " || exec sleep 300"
        ] * 20)
        allocation = self.submit("--nodes", "2", "--time", "5m")
        wait_for(lambda: len(self.lines("began")) >= 12, "twelve jobs begun")
        self.cluster.query("scancel", allocation)
        self.over(allocation)
        wait_for(lambda: self.states() == {"done": 4, "waiting": 16},
                 "all but the done ones given back: " + self.output())
        open(self.path("go"), "w").close()
        self.over(self.submit("--nodes", "2", "--time", "5m"))
        self.assertEqual({"done": 20}, self.states(), self.output())
        outcomes = {outcome for job in self.outcomes() for outcome in job}
        self.assertLessEqual(outcomes, {"done", "released", "lapsed"})

    def test_a_worker_that_dies_leaves_the_others_working(self):
        self.add(
            "mkdir died || exit 0; kill -KILL $PPID",
            *["until [ -e died ]; do sleep 0.05; done; sleep 0.5"] * 40
        )
        self.over(self.submit("--nodes", "2", "--time", "5m"))
        self.assertEqual({"done": 41}, self.states(), self.output())
        self.assertEqual(["lapsed", "done"], self.outcomes()[0])

    def test_a_node_that_fails_leaves_the_others_working(self):
        self.add(*[
            "echo $SLURMD_NODENAME >> nodes; [ -e go ] && exit;"
            " until [ -e go ]; do sleep 0.05; done"
        ] * 8)
        allocation = self.submit(
            "--nodes", "2", "--time", "5m", options="--idle-timeout 6"
        )
        wait_for(lambda: len(self.lines("nodes")) == 8, "eight jobs running")
        change = "scontrol", "update", "NodeName=n2"
        self.addCleanup(self.cluster.query, "scontrol", "reconfigure")
        self.addCleanup(self.cluster.query, *change, "State=resume")
        self.cluster.query(*change, "State=down", "Reason=test")
        open(self.path("go"), "w").close()
        self.over(allocation)
        self.assertEqual({"done": 8}, self.states(), self.output())

    def submit_server(self, home, node):
        """Submit the script in README; return its allocation's number."""
        script = replaced(
            recipe("#SBATCH --dependency=singleton"), ("~/jobman", home),
            ("=jobman.log", "=%s/jobman.log" % home),
            ("python3", sys.executable))
        return self.sbatch(
            script.encode(), "--export=ALL,HOME=" + home, "-w", node)

    def served_by(self, home, allocation):
        """Return the server's number as soon as `allocation` has it."""
        mark = b"SLURM_JOB_ID=" + allocation.encode()

        def found():
            access = read(home + "/.jobman/access.json").decode()
            pid = json.loads(access)["pid"] if access else os.getpid()
            return mark in environment_of(pid) and pid

        return wait_for(found, "a server in allocation " + allocation)

    def test_a_server_in_a_batch_job_goes_on_in_the_next_one(self):
        home = self.path("home")
        os.mkdir(home)
        shutil.copy(JOBMAN, home)
        access = home + "/.jobman/access.json"
        server = self.submit_server(home, "n1")
        self.served_by(home, server)
        self.client = worker.Client(access)
        self.addCleanup(self.client.close)
        self.add(*["echo $JOBMAN_JOBID >> ran; sleep 0.2"] * 120)
        workers = self.submit(
            "--access", access, "--time", "5m", "--", "-w", "n2",
            "--oversubscribe", "--cpus-per-task=2", "--mem=1G")

        def end_by(end, node):
            done = self.states().get("done", 0)
            wait_for(lambda: self.states().get("done", 0) > done + 10, "jobs")
            later = self.submit_server(home, node)
            end()
            self.over(server)
            self.served_by(home, later)
            return later

        first, server = server, end_by(lambda: self.cluster.query(
            "scancel", "--batch", "--signal=TERM", server), "n2")
        self.assertIn("JobState=COMPLETED", self.cluster.query(
            "scontrol", "show", "job", first))
        server = end_by(lambda: self.cluster.query("scancel", server), "n1")
        pid = self.served_by(home, server)
        server = end_by(lambda: os.kill(pid, signal.SIGKILL), "n2")
        self.over(workers, 2 * PATIENCE)
        self.assertEqual({"done": 120}, self.states(), self.output())
        self.assertEqual(list(range(1, 121)),
                         sorted(map(int, self.lines("ran"))))
        self.cluster.query("scancel", server)
        self.over(server)
        self.assertFalse(os.path.exists(access))
        self.assertEqual(
            ["jobman.db", "jobman.db.crt", "jobman.db.key"],
            sorted(os.listdir(home + "/.jobman")))
        self.assertEqual(4, read(home + "/jobman.log").count(b"listens at"))

    def test_slurm_takes_further_options_and_the_last_one_wins(self):
        script = self.script(
            "--nodes", "2", "--time", "5m", "--", "--hold", "--nodes", "1",
            "--time=1-0", "-J", "a b #c $d", "--comment=x=y z",
        )
        out = self.cluster.query("sbatch", "--test-only", given=script)
        self.assertIn("to start at", out)
        found = self.cluster.query(
            "squeue", "-h", "-j", self.sbatch(script), "-o", "%j|%k|%D|%l")
        self.assertEqual("a b #c $d|x=y z|1|1-00:00:00\n", found)
        script = self.script("--time", "5m", "--", "--no-such-option")
        out = self.cluster.query("sbatch", "--test-only", given=script)
        self.assertIn("no-such-option", out)


BATCH_COMMANDS = r"""#!/bin/sh
cd %s || exit
command=${0##*/}
echo "$command $*" >> calls
if [ -e $command.slow ]; then mv $command.slow was.slow; sleep 6; fi
if [ -e $command.fails ]; then cat $command.fails >&2; exit 1; fi
submit() {
    number=$(($(cat last) + 1))
    echo $number > last
    cat > script-$number
    [ -e refused ] || echo "$number$1" >> queue
}
for word; do :; done
case $command in
squeue) cat queue ;;
qstat) echo 'Job id            Name             User   Time Use S Queue'
    echo '----------------  ---------------- ------ -------- - -----'
    cat queue ;;
sbatch) submit " $word root 0:00 PD"; echo Welcome!; echo $number ;;
qsub) submit ".login1 $word root 0 Q workq"; echo $number.login1 ;;
scancel | qdel)
    for number; do sed -i "/^$number[ .]/d" queue; done ;;
esac
"""


# jobman.py, but it looks at the queue more often
OFTEN = "import sys; sys.path.insert(0, %r); import jobman;" \
    " jobman.PAUSES = 0.1, 0.2; sys.exit(jobman.main())" % HERE


@slow
class AllocTest(TemporaryFolder):
    """Allocations that come by themselves; programs stand in for a cluster.
    """

    def setUp(self):
        super().setUp()
        programs = self.make_folder()
        self.batch = self.make_folder()
        for name in ("squeue", "sbatch", "scancel", "qstat", "qsub", "qdel"):
            with open(os.path.join(programs, name), "w") as file:
                file.write(BATCH_COMMANDS % self.batch)
            os.chmod(file.name, 0o755)
        self.environment["PATH"] = programs + ":" + os.environ["PATH"]
        self.put("queue", "")
        self.put("last", "0")
        self.server, (_, self.port) = self.serve()
        self.client = worker.Client(self.path(".jobman", "access.json"))
        self.addCleanup(self.client.close)

    def put(self, name, text):
        """Write a file of the stand-ins."""
        with open(os.path.join(self.batch, "new"), "w") as file:
            file.write(text)
        os.rename(file.name, os.path.join(self.batch, name))

    def has(self, name):
        """Return what is in a file of the stand-ins."""
        return read(os.path.join(self.batch, name)).decode()

    def add(self, first, last):
        self.client.set({i: {"jobstage": 0, "laststage": 2, "jobcmd": "true"}
                         for i in range(first, last + 1)})

    def start(self, *argv):
        """Start alloc; what it prints goes to a file."""
        with open(self.path("said"), "wb") as said:
            return self.spawn("-uc", OFTEN, "alloc", "--time", "1h", *argv,
                              stdout=said)

    def said(self, text):
        """Wait until alloc has printed a line."""
        wait_for(lambda: text in read(self.path("said")).decode(), text)

    def lines(self, text):
        """Return how often alloc has printed a text."""
        return read(self.path("said")).decode().count(text)

    def runs(self, number, state="R"):
        """Have a queued allocation run."""
        self.put("queue", re.sub(
            r"(?m)^(%d\D.* )(?:PD|Q)( .*)?$" % number, r"\1%s\2" % state,
            self.has("queue")))

    def beat(self, number, system="slurm", slots=4, claim=0, **about):
        """Send the heartbeat of an allocation's worker, which claims jobs."""
        name = "n1-%s%d-77" % (system, number)
        jobs = self.client.get(0, n=claim, lease=60, worker=name) \
            if claim else []
        self.client.heartbeat(name, 60, [], slots=slots, stages=[0], **about)
        return jobs

    def test_it_counts_the_cores_that_jobs_need(self):
        self.client.stages({0: {"cores": 4}})
        self.add(1, 10)
        self.start("--max", "2", "--worker", "--slots 4")
        self.said("0 running, 1 queued: --backlog is reached (10 jobs"
                  " waiting, room for 1)\n")
        self.runs(1)
        self.said("submitted 2 (10 jobs waiting, room for 1)\n")

    def test_it_submits_no_more_for_a_stage_that_is_too_large(self):
        self.add(1, 2)
        self.start("--max", "9", "--worker", "--slots 4")
        self.said("submitted 1")
        self.client.stages({0: {"cores": 64}})
        self.runs(1)
        self.beat(1, memory=2**30)
        self.said("1 running, 0 queued: enough for now (0 jobs waiting, room"
                  " for 4, stages too large for its nodes: 0)\n")
        self.client.heartbeat("n1-slurm1-77", 60, [], ended=True)
        self.put("queue", "")
        self.said("0 running, 0 queued: enough for now (0 jobs waiting, room"
                  " for 0, stages too large for its nodes: 0)\n")
        self.assertEqual(1, self.lines("submitted"))

    def test_it_submits_while_more_jobs_wait_than_there_is_room_for(self):
        self.add(1, 10)
        self.start("--max", "3", "--worker", "--slots 4", "--", "-p", "long")
        self.said("0 running, 0 queued: submitted 1 (10 jobs waiting, room"
                  " for 0)\n")
        self.said("0 running, 1 queued: --backlog is reached (10 jobs"
                  " waiting, room for 4)\n")
        self.runs(1)
        self.said("1 running, 0 queued: submitted 2 (10 jobs waiting, room"
                  " for 4)\n")
        self.beat(1, claim=4)
        self.runs(2)
        self.said("2 running, 0 queued: submitted 3 (6 jobs waiting, room"
                  " for 4)\n")
        self.runs(3)
        self.said("3 running, 0 queued: enough for now (6 jobs waiting,"
                  " room for 8)\n")
        self.add(11, 13)
        self.said("3 running, 0 queued: --max is reached (9 jobs waiting,"
                  " room for 8)\n")
        name = self.has("queue").split()[1]
        self.assertRegex(name, r"\Ajobman-[0-9a-f]{8}\Z")
        self.assertIn("sbatch --parsable -J %s\n" % name, self.has("calls"))
        status, script, _ = self.command(
            JOBMAN, "sbatch", "--time", "1h", "--worker",
            "--idle-timeout 300 --slots 4", "--", "-p", "long")
        self.assertEqual((0, script), (status, self.has("script-1")))
        self.assertEqual(6, len(read(self.path("said")).splitlines()))

    def test_room_is_that_of_idle_slots_and_of_the_largest_so_far(self):
        self.add(1, 20)
        self.client.stages({0: {"name": "fetch"}})
        self.start("--max", "9", "--backlog", "2", "--worker",
                   "--stage align,fetch")
        self.said("0 running, 2 queued: --backlog is reached (20 jobs"
                  " waiting, room for 2)\n")
        jobs = self.beat(1, slots=16, claim=12)
        self.runs(1)
        self.said("1 running, 1 queued: enough for now (8 jobs waiting,"
                  " room for 20)\n")
        self.beat(1, slots=16, quarantine="three jobs in a row failed")
        self.client.pause(0)
        self.runs(2)
        self.said("2 running, 0 queued: enough for now (0 jobs waiting,"
                  " room for 16)\n")
        self.client.resume(0)
        self.add(21, 30)
        self.said("submitted 3 (18 jobs waiting, room for 16)\n")
        self.assertEqual(12, len(jobs))

    def test_it_ends_with_the_jobs_and_leaves_none_queued(self):
        self.add(1, 9)
        process = self.start("--max", "2", "--backlog", "2")
        self.said("2 queued")
        self.runs(1)
        jobs = self.beat(1, claim=9)
        self.said("1 running, 1 queued: enough for now")
        for job in jobs:
            self.client.update_job(job["jobid"], 2, job["claim"])
        self.said("1 running, 1 queued: cancelled 2 (all jobs have ended)\n")
        self.said("1 running, 0 queued: waiting for the end (all jobs have"
                  " ended)\n")
        self.beat(1, ended=True)
        self.put("queue", "")
        self.assertEqual((0, b""), (
            process.wait(PATIENCE), process.stderr.read()))
        self.said("\nAll jobs have ended, and no allocation is left.\n")
        self.assertEqual(0, self.lines("before its worker"))

    def test_a_signal_leaves_allocations_alone_unless_told_to_cancel(self):
        self.add(1, 9)
        process = self.start("--max", "2")
        self.said("1 queued: --backlog")
        process.terminate()
        self.assertEqual(128 + signal.SIGTERM, process.wait(PATIENCE))
        self.assertEqual(
            b"Interrupted; allocations go on: scancel 1 cancels them.\n",
            process.stderr.read())
        other = self.start("--max", "2", "--dry-run", "--worker", "--stage 2")
        self.assertEqual(0, other.wait(PATIENCE))
        self.said("0 running, 0 queued: enough for now (0 jobs waiting")
        again = self.start("--max", "2", "--cancel")
        self.said("0 running, 1 queued: --backlog is reached")
        again.send_signal(signal.SIGINT)
        self.assertEqual((128 + signal.SIGINT, b"Cancelled 1.\n"), (
            again.wait(PATIENCE), again.stderr.read()))
        self.assertEqual("", self.has("queue"))

    def test_it_gives_up_after_three_without_a_worker(self):
        self.add(1, 9)
        self.put("refused", "")
        process = self.start("--max", "2")
        self.said("Allocation 2 ended before its worker was heard of: look"
                  " into slurm-2.out. (trying again)\n")
        self.assertEqual(1, process.wait(PATIENCE))
        self.assertEqual(
            b"jobman.py: Allocation 3 ended before its worker was heard of:"
            b" look into slurm-3.out. After three in a row no more are"
            b" submitted.\n", process.stderr.read())
        self.assertEqual("3\n", self.has("last"))

    def test_a_worker_in_between_ends_the_row(self):
        self.add(1, 9)
        self.put("refused", "")
        self.beat(2)
        process = self.start("--max", "9", "--worker", "--slots 2")
        self.said("Allocation 1 ended")
        self.said("submitted 5")
        self.assertNotIn("Allocation 2", read(self.path("said")).decode())
        self.assertEqual(1, process.wait(PATIENCE))
        self.assertEqual("5\n", self.has("last"))

    def test_a_dry_run_says_what_it_would_do(self):
        self.add(1, 1)
        mark = "%s [0]" % worker.namespace(self.client.jobix)
        name = "jobman-" + hashlib.sha256(mark.encode()).hexdigest()[:8]
        for queue, ended, would in (
                ("", False, "0 queued: would submit one (1 job waiting, "),
                ("7 %s root 0:00 PD\n" % name, False,
                 "1 queued: enough for now (1 job waiting, room for 1)"),
                ("7 %s root 0:00 PD\n8 other root 0:00 PD\n" % name, True,
                 "1 queued: would cancel 7 (all jobs have ended)")):
            self.put("queue", queue)
            if ended:
                self.client.update_job(1, 2)
            process = self.start("--max", "1", "--dry-run")
            self.assertEqual(0, process.wait(PATIENCE))
            self.said("0 running, " + would)
        self.assertNotRegex(self.has("calls"), "(?m)^(sbatch|scancel)")

    def test_pbs(self):
        self.add(1, 9)
        process = self.start("--max", "2", "--pbs", "--", "-q", "long")
        self.said("0 running, 0 queued: submitted 1 ")
        self.said("0 running, 1 queued: --backlog")
        jobs = self.beat(1, "pbs", slots=8, claim=8)
        self.runs(1)
        self.said("1 running, 0 queued: submitted 2 (1 job waiting, room for"
                  " 0)\n")
        self.said("1 running, 1 queued: enough for now (1 job waiting,"
                  " room for 8)\n")
        for jobid in range(1, 10):
            self.client.update_job(jobid, 2)
        self.said("cancelled 2 (all jobs have ended)\n")
        self.put("queue", "")
        self.assertEqual(0, process.wait(PATIENCE))
        name = re.search("qsub -N (.*)\n", self.has("calls")).group(1)
        self.assertEqual((8, 15), (len(jobs), len(name)))
        self.assertIn("\n#PBS -q long\n", self.has("script-1"))

    def test_what_fails_at_first_is_said_in_a_sentence(self):
        self.add(1, 9)
        for name, text, said in (
                ("sbatch.fails", "sbatch: error: Batch job submission failed:"
                 " Invalid account\n", "sbatch failed: sbatch: error: Batch"
                 " job submission failed: Invalid account."),
                ("squeue.fails", "", "squeue failed: exit status 1."),
                ("", "", "There is no squeue here: run alloc where you submit"
                 " to the batch system.")):
            if name:
                self.put(name, text)
            else:
                self.environment["PATH"] = self.folder
            process = self.start("--max", "2")
            self.assertEqual((1, "jobman.py: %s\n" % said), (
                process.wait(PATIENCE), process.stderr.read().decode()))

    def test_what_fails_later_is_waited_out(self):
        self.add(1, 1)
        process = self.start("--max", "2")
        fine = "0 running, 1 queued: enough for now"
        self.said(fine)
        self.put("squeue.fails", "slurm_load_jobs error: Unable to contact"
                 " slurm controller (connect failure)\n")
        self.said("squeue failed: slurm_load_jobs error: Unable to contact"
                  " slurm controller (connect failure). (trying again)\n")
        os.unlink(os.path.join(self.batch, "squeue.fails"))
        wait_for(lambda: self.lines(fine) == 2, "squeue again")
        self.put("squeue.slow", "")
        self.server.kill()
        self.server.wait()
        self.said("can't be reached")
        self.serve(port=self.port)
        wait_for(lambda: self.lines(fine) == 3, "the server again")
        self.add(2, 9)
        self.put("sbatch.fails", "sbatch: error: Socket timed out\n")
        self.runs(1)
        self.said("sbatch failed: sbatch: error: Socket timed out. (trying")
        process.terminate()
        process.wait(PATIENCE)
        self.assertEqual(
            b"Waiting for squeue.\nInterrupted; allocations go on: scancel 1"
            b" cancels them.\n", process.stderr.read())

    def test_wrong_usage(self):
        for words, named in (
                ([], "--max"), (["--max", "0"], "--max"),
                (["--max", "1", "--backlog", "x"], "--backlog"),
                (["--max", "1", "--idle", "soon"], "--idle"),
                (["--max", "1", "--worker", "--slots 0"], "--slots"),
                (["--max", "1", "--", "long"], "'long'")):
            status, out, err = self.command(
                JOBMAN, "alloc", "--time", "1h", *words)
            self.assertEqual((2, ""), (status, out))
            self.assertIn(named, err)


@long
class AllocSlurmTest(ClusterCase):
    """Allocations that come by themselves under a real Slurm."""

    ONE_CORE = "--", "--cpus-per-task=1", "--mem=100M"

    def setUp(self):
        super().setUp()
        self.environment["SLURM_CONF"] = \
            self.cluster.environment["SLURM_CONF"]

    def alloc(self, jobs, *argv):
        """Add jobs and start alloc; yield what squeue shows until it ends."""
        self.client.set({
            i: {"jobstage": 0, "laststage": 2, "jobcmd": "sleep 0.2"}
            for i in range(1, jobs + 1)})
        process = self.spawn(JOBMAN, "alloc", "--time", "5m", *argv)
        end = time.monotonic() + 4 * PATIENCE
        while process.poll() is None and time.monotonic() < end:
            yield self.cluster.query("squeue", "-h", "-o", "%i %T").split()
            time.sleep(0.1)
        status, out, err = self.finish(process)
        self.assertEqual((0, ""), (status, err), out)
        self.assertEqual("", self.cluster.query("squeue", "-h"), out)
        states = self.client.status()["totals"]["states"]
        self.assertEqual(jobs, states["done"], out)

    def test_there_are_no_more_than_asked_for_and_none_in_the_end(self):
        seen = [len(row) // 2 for row in self.alloc(
            100, "--max", "2", "--backlog", "2", "--idle", "2",
            *self.ONE_CORE)]
        self.assertEqual(2, max(seen))

    def test_what_is_queued_is_cancelled_when_all_is_done(self):
        """All want the same node, so the second one never starts."""
        started = {number for row in self.alloc(
            40, "--max", "2", "--idle", "20", "--", "-w", "n1")
            for number, state in zip(row[::2], row[1::2])
            if state != "PENDING"}
        self.assertEqual(1, len(started))

    def test_jobs_of_an_allocation_that_is_cancelled_are_done_by_others(self):
        cancelled = None
        for row in self.alloc(60, "--max", "1", "--worker", "--lease 4",
                              "--idle", "2", *self.ONE_CORE):
            done = self.client.status()["totals"]["states"]["done"]
            if done > 10 and not cancelled:
                cancelled = row[0]
                self.cluster.query("scancel", cancelled)
        self.assertTrue(cancelled)


# -------------------------------------------------- Apache with mod_wsgi ---


class FileClock(Clock):
    """A clock that other processes find in a file."""

    def __init__(self, path):
        super().__init__()
        self.path = path
        self.advance(0)

    def advance(self, seconds):
        super().advance(seconds)
        with open(self.path + ".new", "w") as file:
            file.write(repr(self.now))
        os.rename(self.path + ".new", self.path)


class Apache:
    """Apache with mod_wsgi at a loopback port, by the two files in README.

    All that it needs is in `site`, but what the processes write: that is in
    `data`. Each of them has a file there with its number of long polls, and
    another one when it is up.
    """

    MODULES = "/usr/lib/apache2/modules"
    PATH = "/usr/local/sbin:/usr/sbin:/sbin:/usr/bin:/bin"
    CONFIGURATION = """\
ServerRoot %(site)s
ServerName localhost
DefaultRuntimeDir %(site)s
PidFile %(site)s/pid
Mutex file:%(site)s default
ErrorLog %(site)s/error.log
User %(user)s
Group %(group)s
LoadModule mpm_event_module %(modules)s/mod_mpm_event.so
LoadModule authz_core_module %(modules)s/mod_authz_core.so
LoadModule wsgi_module %(modules)s/mod_wsgi.so
%(more)sInclude %(site)s/jobman.conf
"""
    BEFORE = """
import functools, jobman

def clock():
    with open(%(site)r + "/clock") as file:
        return float(file.read())

class WaitQueue(jobman.WaitQueue):
    waiting = property(lambda self: self.number)

    @waiting.setter
    def waiting(self, number):
        self.number = number
        with open("%(data)s/%%d.polls" %% os.getpid(), "w") as file:
            file.write(str(number))

jobman.WaitQueue = WaitQueue
jobman.Store = functools.partial(jobman.Store, clock=clock)
jobman.OUTAGE = float("inf")  # that clock leaps
os.environ["JOBMAN_OPEN"] = "%(open)d"
from jobman import application
"""
    AFTER = """
import json
answer = application

def application(environ, start_response):
    def start(status, headers):
        start_response(status, headers + [("Process", str(os.getpid()))])
    with open(%(site)r + "/constants") as file:
        vars(jobman).update(json.load(file))
    return answer(environ, start)

open("%(data)s/%%d.up" %% os.getpid(), "w").close()
"""

    def __init__(self, site, data, database, *, open_to_all, more):
        root = os.geteuid() == 0
        user = pwd.getpwnam("www-data") if root else \
            pwd.getpwuid(os.geteuid())
        self.site, self.data = site, data
        self.values = {
            "site": site, "data": data, "database": database,
            "user": user.pw_name, "group": grp.getgrgid(user.pw_gid).gr_name,
            "modules": self.MODULES, "open": open_to_all, "more": more,
        }
        for folder in (data, os.path.dirname(database)):
            os.chown(folder, user.pw_uid, user.pw_gid)
        os.chmod(site, 0o755)
        for name in ("jobman.py", "dashboard.html"):
            shutil.copy(os.path.join(HERE, name), site)

    @classmethod
    def missing(cls):
        """Return what this host lacks for it, nothing if it has all."""
        if not shutil.which("apache2", path=cls.PATH):
            return "Debian's apache2"
        if not os.path.exists(cls.MODULES + "/mod_wsgi.so"):
            return "Debian's libapache2-mod-wsgi-py3"

    def configure(self):
        """Write its files, for a port that is free now."""
        with contextlib.closing(socket.socket()) as free:
            free.bind(("127.0.0.1", 0))
            self.address = free.getsockname()
        port, values = self.address[1], self.values
        site = replaced(
            recipe("WSGIDaemonProcess"), ("/srv/jobman", self.site),
            ("Listen ", "Listen 127.0.0.1:"), ("8642", "%d" % port),
            ("user=jobman group=jobman",
             "user=%(user)s group=%(group)s" % values),
        )
        script = replaced(
            recipe("from jobman import application"),
            ("/srv/jobman/data/jobman.db", values["database"]),
            ("/srv/jobman/data", self.data), ("/srv/jobman", self.site),
            ("http://jobs.example:8642", "http://127.0.0.1:%d" % port),
            ("from jobman import application\n", self.BEFORE % values),
        ) + self.AFTER % values
        for name, text in (("jobman.conf", site), ("jobman.wsgi", script),
                           ("apache.conf", self.CONFIGURATION % values),
                           ("constants", "{}")):
            with open(os.path.join(self.site, name), "w") as file:
                file.write(text)

    def start(self):
        """Start it; return when its two processes are up."""
        self.configure()
        with open(self.site + "/error.log", "ab") as log:
            self.process = subprocess.Popen(
                ["apache2", "-DFOREGROUND", "-f", self.site + "/apache.conf"],
                env={"LANG": "C", "PATH": self.PATH, "TMPDIR": self.site},
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )
        try:
            wait_for(lambda: self.process.poll() or len(self.up()) == 2,
                     "two processes of Apache")
            assert self.process.poll() is None
        except BaseException as error:
            self.stop()
            error.args += (read(self.site + "/error.log").decode(),)
            raise

    def stop(self):
        """End it, and what it has left."""
        self.process.terminate()
        self.process.wait(PATIENCE)
        for name in os.listdir(self.data):
            os.unlink(os.path.join(self.data, name))

    def up(self):
        """Return the numbers of its processes."""
        names = [os.path.splitext(name) for name in os.listdir(self.data)]
        return [
            int(number) for number, kind in names
            if kind == ".up" and os.path.exists("/proc/" + number)
        ]

    def polls(self):
        """Return how many long polls its processes have, by number."""
        found = {}
        for number in self.up():
            path = "%s/%d.polls" % (self.data, number)
            found[number] = int(
                wait_for(functools.partial(read, path), "a number"))
        return found


class ApacheStore:
    """A Store in two processes of Apache, which are asked by HTTP alone."""

    options = {"open_to_all": True, "more": ""}

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        missing = Apache.missing()
        if missing:
            raise unittest.SkipTest("Apache needs " + missing)

    def setUp(self):
        self.site = self.make_folder()
        self.data = self.make_folder()
        super().setUp()

    def make_clock(self):
        return FileClock(os.path.join(self.site, "clock"))

    def open(self):
        self.door = Apache(
            self.site, self.data, self.path("jobs.db"), **self.options)
        self.door.start()
        self.address = self.door.address
        self.closing = contextlib.ExitStack()
        self.closing.callback(self.door.stop)
        self.addCleanup(self.closing.close)
        access = json.loads(read(self.data + "/access.json").decode())
        self.store = types.SimpleNamespace(
            tick=self.tick, jobix=access["jobix"],
            reading_jobix=access["reading_jobix"])

    def reopen(self, **options):
        """Start it anew, with other options."""
        self.options = dict(self.options, **options)
        self.restart()

    def replace(self, name, value):
        """Give a constant another value there; `beside` finds no page then.
        """
        if name == "beside":
            os.unlink(os.path.join(self.site, "dashboard.html"))
            return
        with open(os.path.join(self.site, "constants"), "w") as file:
            json.dump({name: value}, file)

    def tick(self):
        """Return when all that is due has been done."""
        wait_for(self.caught_up, "a tick")

    def caught_up(self):
        """Return whether nothing is due, by what the database has."""
        now = self.clock()
        with contextlib.closing(self.look()) as db:
            return not any(
                db.execute(sql, {
                    "namespace": None, "now": now, "limit": 1}).fetchone()
                for sql in (jobman.SQL.OVERDUE, jobman.SQL.MISMARKED))


@long
class ApacheContractTest(ApacheStore, ContractTest):
    """What existing clients send and expect, of two processes of Apache."""

    test_no_number_at_all_is_400 = None  # Apache makes one slash of two


@long
class ApacheClaimTest(ApacheStore, ClaimTest):
    """Claims and leases there."""

    # no call limits attempts
    test_a_limit_of_attempts_is_one_jobs_alone = None
    test_an_attempt_to_be_made_later_is_not_counted_as_a_failure = None


@long
class ApacheTest(ApacheStore, StoreCase):
    """What it is to be two processes with five threads each."""

    def ask(self, path="/get/0?wait=60&lease=60"):
        """Make a call in the background; return its future Reply."""
        future = concurrent.futures.Future()

        def wait():
            try:
                future.set_result(self.call(path))
            except OSError as error:
                future.set_exception(error)

        threading.Thread(target=wait, daemon=True).start()
        return future

    def polling(self, n):
        """Return the numbers of long polls, by process, when they are `n`."""
        return wait_for(
            lambda: sum(self.door.polls().values()) == n and self.door.polls(),
            "%d long polls" % n)

    def fill(self):
        """Make long polls until there can't be more; return those that wait.
        """
        asked, most = [], 2 * 2
        while sum(self.door.polls().values()) < most:
            asked.append(self.ask())
            wait_for(lambda: asked[-1].done() or
                     sum(self.door.polls().values()) == len(asked),
                     "a long poll or its end")
            if asked[-1].done():  # of the process that had enough
                self.assertEqual("nada", asked.pop().result().json())
        self.assertEqual([2, 2], list(self.door.polls().values()))
        return asked

    def test_a_lease_lapses_though_nobody_calls(self):
        self.set_jobs([1])
        first = self.get(0, lease=60)
        poll = self.ask()
        self.polling(1)
        self.clock.advance(61)
        second = poll.result(PATIENCE).json()
        self.assertEqual((1, 2), (second["jobid"], second["attempt"]))
        self.assertReply(409, self.update(first, 2))
        self.assertReply(200, self.update(second, 2))

    def test_long_polls_take_four_threads_and_leave_others(self):
        polls = self.fill()
        self.assertEqual("nada", self.get(0, wait=60))
        self.set_jobs([1, 2, 3, 4])
        jobs = [poll.result(PATIENCE).json() for poll in polls]
        self.assertEqual([1, 2, 3, 4], sorted(job["jobid"] for job in jobs))
        self.polling(0)

    def test_a_job_set_in_one_process_wakes_a_poll_in_the_other(self):
        across = 0
        for i in range(100):
            poll = self.ask()
            polls = self.polling(1)
            reply = self.post("/set", {i: {"jobstage": 0}})
            self.assertEqual(i, poll.result(PATIENCE).json()["jobid"])
            across += not polls[int(reply.headers["process"])]
            self.polling(0)
            if across == 3:
                return
        self.fail("never across")

    def test_ten_clients_at_once_get_no_job_twice(self):
        self.set_jobs(range(300))
        claimed, processes = [], set()

        def work():
            while True:
                reply = self.call("/get/0?lease=60")
                job = reply.json()
                if job == "nada":
                    return
                claimed.append(job["jobid"])
                processes.add(reply.headers["process"])
                self.assertReply(200, self.update(job, 2))

        with concurrent.futures.ThreadPoolExecutor(10) as clients:
            for client in [clients.submit(work) for _ in range(10)]:
                client.result(PATIENCE)
        self.assertEqual(list(range(300)), sorted(claimed))
        self.assertEqual(2, len(processes))
        self.assertEqual({(2, "waiting"): 300}, self.states())

    def test_a_job_for_a_worker_that_has_hung_up_comes_back(self):
        with socket.create_connection(self.address) as client:
            client.sendall(b"GET /get/0?wait=60&lease=60 HTTP/1.1\r\n"
                           b"Host: localhost\r\njobix: 4711\r\n\r\n")
            self.polling(1)
        self.set_jobs([1])
        self.polling(0)
        self.assertEqual("nada", self.get(0))
        self.clock.advance(61)
        self.assertEqual(2, self.get(0)["attempt"])

    def test_a_reload_answers_the_long_polls_and_loses_nothing(self):
        self.set_jobs([1])
        job = self.get(0, lease=60)
        polls, before = self.fill(), set(self.door.up())
        self.door.process.send_signal(signal.SIGUSR1)
        for poll in polls:
            self.assertEqual("nada", poll.result(PATIENCE).json())
        wait_for(lambda: len(set(self.door.up()) - before) == 2, "a new pair")
        self.assertReply(200, self.update(job, 2))
        self.assertEqual({(2, "waiting"): 1}, self.states())

    def test_nothing_but_the_database_is_left_at_the_end(self):
        self.ask()
        self.polling(1)
        self.closing.close()
        self.assertEqual(["jobs.db"], os.listdir(self.folder))

    def test_a_long_poll_may_last_longer_than_apache_waits_by_itself(self):
        longest = re.search(r"socket-timeout=(\d+)", recipe("socket-timeout"))
        self.assertGreater(int(longest[1]), 2 * jobman.MAX_WAIT)
        self.reopen(more="Timeout 1\n")
        reply = self.call("/get/0?wait=3")
        self.assertEqual("nada", self.assertReply(200, reply).json())

    def test_a_workers_name_may_have_slashes(self):
        name = "a/b %"
        self.assertReply(200, self.post(
            "/heartbeat", {"worker": name, "claims": [], "lease": 60}))
        quoted = urllib.parse.quote(name, safe="")
        self.assertReply(200, self.call("/drain/" + quoted, b"{}"))
        found, = self.ok("/workers")["workers"]
        self.assertEqual((name, True), (found["name"], found["drain"]))

    def test_a_worker_finds_it_by_its_access_file(self):
        access = os.path.join(self.data, "access.json")
        with contextlib.closing(worker.Client(access)) as client:
            client.set({i: {"jobstage": 0, "laststage": 2, "jobcmd": "true"}
                        for i in range(20)})
            self.assertEqual(0, self.command(
                WORKER, "--access", access, "--idle-timeout", "1")[0])
            states = client.status()["totals"]["states"]
        self.assertEqual(20, states["done"])

    def test_strangers_leave_threads_for_others(self):
        self.reopen(open_to_all=False)
        self.jobix = self.store.jobix
        self.fill()
        over, refused, served = threading.Event(), [], []

        def took(jobix):
            """Return the seconds that a call takes, and its status."""
            began = time.monotonic()
            status = self.call("/status", jobix=jobix).status
            return time.monotonic() - began, status

        def try_numbers():
            while not over.is_set():
                refused.append(took(1))

        with concurrent.futures.ThreadPoolExecutor(12) as strangers:
            self.addCleanup(over.set)
            for _ in range(12):
                strangers.submit(try_numbers)
            wait_for(lambda: len(refused) > 12, "refusals")
            served += [took(self.jobix) for _ in range(20)]
            over.set()
        self.assertEqual({403}, {status for _, status in refused})
        self.assertEqual({200}, {status for _, status in served})
        self.assertLess(sorted(served)[10], sorted(refused)[len(refused) // 2])


# ------------------------------------------------- the page in a browser ---


class Browser:
    """Chromium, driven over the WebDriver protocol (w3.org/TR/webdriver2)."""

    PROGRAMS = "chromium", "chromedriver"
    ARGUMENTS = (
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
        "--no-first-run", "--disable-background-networking",
        "--disable-component-update", "--disable-sync",
        "--disable-dev-shm-usage", "--lang=en-GB",
    )
    KEYS = {"Tab": "\ue004", "Enter": "\ue007", "Escape": "\ue00c"}
    ELEMENT = "element-6066-11e4-a52e-4f735466cecf"

    def __init__(self, folder):
        self.home = "HOME=" + folder
        self.opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}))
        environment = dict(os.environ, HOME=folder, TMPDIR=folder, TZ="UTC",
                           LANG="en_GB")
        self.process = subprocess.Popen(
            ["chromedriver", "--port=0"], stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            env=environment,
        )
        with contextlib.ExitStack() as ending:
            ending.callback(self.kill)
            self.url = "http://127.0.0.1:%d" % self.driver_port()
            self.url += "/session/" + self.begin(folder)
            ending.callback(self.quit)
            self.close = ending.pop_all().close
        atexit.register(self.close)  # also where a test run is interrupted

    def driver_port(self):
        """Return the port that the driver says it listens at."""
        for line in self.process.stdout:
            found = re.search(br"successfully on port (\d+)", line)
            if found:
                return int(found.group(1))
        raise AssertionError("chromedriver didn't start")

    def begin(self, folder):
        """Start the browser; return the session's id."""
        options = {
            "args": [*self.ARGUMENTS, "--user-data-dir=" + folder],
            "binary": shutil.which("chromium"),
        }
        return self.call("POST", "/session", capabilities={"alwaysMatch": {
            "goog:chromeOptions": options,
            "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
        }})["sessionId"]

    def quit(self):
        """Let the browser end."""
        with contextlib.suppress(AssertionError, OSError):
            self.call("DELETE", "")

    def kill(self):
        """End the driver, and what there still is of the browser."""
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def processes(self):
        """Return the ids of all processes of driver and browser."""
        pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]
        return [pid for pid in pids
                if os.fsencode(self.home) in environment_of(pid)]

    def call(self, method, path, **values):
        """Make a call of the protocol; return its value."""
        body = json.dumps(values).encode() if method == "POST" else None
        request = urllib.request.Request(
            self.url + path, body, {"Content-Type": "application/json"},
            method=method,
        )
        try:
            with self.opener.open(request, timeout=PATIENCE) as reply:
                return json.loads(reply.read().decode("utf-8"))["value"]
        except urllib.error.HTTPError as error:
            with error:
                message = json.loads(error.read().decode("utf-8"))["value"]
            raise AssertionError(message["message"]) from None

    def open(self, url):
        """Go to an address, also one that differs in its fragment alone."""
        self.call("POST", "/url", url="about:blank")
        self.call("POST", "/url", url=url)

    def script(self, code, *args):
        """Return what a piece of script returns."""
        return self.call("POST", "/execute/sync", script=code, args=args)

    def text(self, css):
        """Return what is to be seen of an element, "" where there is none."""
        return self.script(
            "const node = document.querySelector(arguments[0]);"
            "return node && node.checkVisibility() ? node.innerText : ''",
            css)

    def rows(self, css):
        """Return the texts in the cells of a table's body."""
        return self.script(
            "return [...document.querySelectorAll(arguments[0] + ' tbody tr')]"
            ".map(row => [...row.children].map(cell => cell.innerText))", css)

    def find(self, css, text=""):
        """Wait for an element that is like `css` and begins with a text.

        Returns its id.
        """
        found = wait_for(lambda: self.script(
            "return [...document.querySelectorAll(arguments[0])].find(node =>"
            " (node.innerText.trim() + ' ').startsWith(arguments[1])) || null",
            css, text and text + " "), "%s %s" % (css, text))
        return found[self.ELEMENT]

    def click(self, css, text=""):
        """Click an element, as a person would."""
        self.call("POST", "/element/%s/click" % self.find(css, text))

    def middle_click(self, css):
        """Click an element with the middle button: it opens a tab."""
        move = {"type": "pointerMove", "x": 0, "y": 0,
                "origin": {self.ELEMENT: self.find(css)}}
        self.call("POST", "/actions", actions=[{
            "type": "pointer", "id": "mouse", "actions": [
                move, {"type": "pointerDown", "button": 1},
                {"type": "pointerUp", "button": 1}]}])

    def type(self, css, text):
        """Type into an element."""
        self.call("POST", "/element/%s/value" % self.find(css), text=text)

    def choose(self, css, value):
        """Choose one of the options of a select element."""
        self.click("%s option[value='%s']" % (css, value))

    def press(self, *names):
        """Press keys one after another."""
        self.call("POST", "/actions", actions=[{
            "type": "key", "id": "keyboard", "actions": [
                {"type": kind, "value": self.KEYS[name]}
                for name in names for kind in ("keyDown", "keyUp")]}])

    def resize(self, width, height):
        """Give the window's inside a size in pixels."""
        self.devtools(
            "Emulation.setDeviceMetricsOverride", width=width, height=height,
            deviceScaleFactor=1, mobile=False)

    def scheme(self, name):
        """Let the system be `dark` or `light`."""
        feature = {"name": "prefers-color-scheme", "value": name}
        self.devtools("Emulation.setEmulatedMedia", features=[feature])

    def devtools(self, command, **values):
        """Give a command of Chromium's own protocol."""
        return self.call(
            "POST", "/goog/cdp/execute", cmd=command, params=values)

    def log(self, kind):
        """Return what a log (`browser`, `performance`) has new."""
        return self.call("POST", "/se/log", type=kind)

    def requests(self):
        """Return the addresses asked for since the last call."""
        events = (
            json.loads(entry["message"])["message"]
            for entry in self.log("performance")
        )
        return [
            event["params"]["request"]["url"] for event in events
            if event["method"] == "Network.requestWillBeSent"
        ]

    def watch(self, css):
        """Begin to note which elements within `css` change."""
        self.script("""
            window.changed = new Set();
            new MutationObserver(records => records.forEach(record => {
              const name = record.attributeName;
              const node = name ? record.target : record.target.parentElement;
              if (name && node.getAttribute(name) === record.oldValue) return;
              changed.add((node.closest("[id]") || node).id);
            })).observe(document.querySelector(arguments[0]), {
              attributeOldValue: true, characterData: true, childList: true,
              subtree: true});
            """, css)

    def changed(self):
        """Return the ids of the elements that changed since `watch`."""
        return set(self.script("return [...changed]"))

    def names(self):
        """Return (role, name) of all that a screen reader is told of."""
        tree = self.devtools("Accessibility.getFullAXTree")["nodes"]
        return [
            (node["role"]["value"], node.get("name", {}).get("value", ""))
            for node in tree if not node["ignored"]
        ]

    def picture(self):
        """Return a PNG of what is in the window."""
        return base64.b64decode(self.call("GET", "/screenshot"))


MISSING = [name for name in Browser.PROGRAMS if shutil.which(name) is None]
HOSTILE = (
    "<img src=x onerror=\"window.hit=1\"></script><script>window.hit=2"
    "</script><!--<script>&lt;"
)


@long
@unittest.skipIf(MISSING, "needs Debian's " + " and ".join(MISSING))
class BrowserTest(StoreCase):
    """dashboard.html as people see it, on a clock moved by hand."""

    long = True

    @classmethod
    def setUpClass(cls):
        cls.browser_folder = tempfile.mkdtemp(prefix="jobman-test-")
        try:
            cls.browser = Browser(cls.browser_folder)
        except BaseException:
            shutil.rmtree(cls.browser_folder, ignore_errors=True)
            raise

    @classmethod
    def tearDownClass(cls):
        cls.browser.close()
        wait_for(lambda: not cls.browser.processes(), "no process left")
        shutil.rmtree(cls.browser_folder, ignore_errors=True)

    def setUp(self):
        super().setUp()
        self.browser.resize(1280, 900)
        self.browser.scheme("light")
        self.browser.requests(), self.browser.log("browser")
        self.faults = ["/output/"]  # what the console may say, as patterns
        self.origin = "http://%s:%d/" % self.address

    def tearDown(self):
        """Assert that the console is empty, and no other host was asked."""
        for entry in self.browser.log("browser"):
            if not any(re.search(f, entry["message"]) for f in self.faults):
                self.fail(entry["message"])
        for url in self.browser.requests():
            self.assertTrue(
                url.startswith((self.origin, "data:", "about:")), url)
        self.assertIsNone(self.script("window.hit || null"))
        self.browser.call("POST", "/url", url="about:blank")
        super().tearDown()

    def script(self, expression, *args):
        """Return the value of a script's expression."""
        return self.browser.script("return " + expression, *args)

    def show(self, fragment="", jobix=None):
        """Open the page, and wait until it shows figures.

        It looks for what is new ten times as often as elsewhere.
        """
        fragment = "jobix=%d&%s" % (jobix or self.jobix, fragment)
        self.browser.open(self.origin + "get#" + fragment)
        self.browser.script(
            "for (const part of Object.values(PARTS)) part.every /= 10")
        self.see("#as-of", "as of")

    def see(self, css, *texts):
        """Wait until an element shows texts; return what it shows."""
        def shown():
            text = self.browser.text(css)
            return text if all(part in text for part in texts) else None

        try:
            return wait_for(shown, "%r in %s" % (texts, css))
        except AssertionError as error:
            self.fail("%s; it shows %r" % (error, self.browser.text(css)))

    def see_nothing(self, css):
        """Wait until an element isn't shown, or is empty."""
        wait_for(lambda: not self.browser.text(css), "nothing in " + css)

    def see_jobs(self, *ids):
        """Wait until the table has the jobs with these ids, in this order."""
        wanted = [str(jobid) for jobid in ids]
        wait_for(lambda: wanted == [
            row[0] for row in self.browser.rows("#jobs")], wanted)

    def act(self, css, button, value=None):
        """Click a button within an element, and say yes to its question.

        Returns the question.
        """
        if css == "#steps" and not self.browser.text("#steps .menu > div"):
            self.browser.click("#steps summary")
        self.browser.click(css + " button", button)
        question = self.see("#confirm", "Keep as it is")
        if value is not None:
            self.browser.script("arguments[0].value = ''", {
                Browser.ELEMENT: self.browser.find("#confirm-value")})
            self.browser.type("#confirm-value", str(value))
        self.browser.click("#confirm-yes")
        return question

    def assertNoActions(self):
        """Assert that no button changes anything."""
        texts = self.script(
            "[...document.querySelectorAll('button')].map(node =>"
            " node.textContent)")
        self.assertIn("Close", texts)
        self.assertEqual([], [text for text in texts if re.match(
            "Retry|Cancel .|Release|Move|Pause|Life|Drain|Undo", text)])

    def follow(self, css, text):
        """Click the link with a text within an element."""
        self.browser.click(css + " a", text)

    def open_job(self, jobid):
        """Open a job of the table."""
        self.follow("#jobs", str(jobid))
        self.see("#job-state", " for ")

    def expire(self):
        """Let the lifetime of a minute pass."""
        self.clock.advance(61)
        self.store.tick()

    def beat(self, name, **about):
        """Send the heartbeat of a worker; return its answer."""
        return self.ok("/heartbeat", dict(
            {"worker": name, "lease": 60, "claims": []}, **about))

    def pipeline(self):
        """Bring about a bit of all there is to see."""
        self.ok("/init/1/0/60/0/0")
        self.ok("/stages", {"0": {"name": "align"}, "4": {"name": "end"}})
        self.set_jobs({i: "align sample%03d.fq" % i for i in range(1, 101)},
                      max_attempts=1, filename="out/x.bam")
        for name in ("node7-1", "node8-2"):
            self.beat(name, host=name[:5], stages=[0, 2], slots=16, done=90,
                      failed=2)
        first = self.get(0, n=60, worker="node7-1", lease=900)
        for job in first[:40]:
            self.update(job, 2, body=packed({"seconds": job["jobid"] % 8}))
        for job in first[40:50]:
            self.fail(job, exit_code=3, stderr="reading\nno space left",
                      error="exit status 3")
        for job in self.get(2, n=20, worker="node8-2", lease=900):
            self.update(job, 4, body=packed({"files": made("b%d.bam" % 7)}))

    def history(self):
        """Let 40 minutes go by in which jobs are done."""
        self.set_jobs(range(1001, 2001), stage=6, laststage=8)
        for minute in range(40):
            self.ok("/update_jobs", [
                {"jobid": job["jobid"], "jobstage": 8, "claim": job["claim"]}
                for job in self.get(6, n=10 + minute * 7 % 13)])
            self.clock.advance(60)
        self.store.tick()

    # What it shows

    def test_a_run_with_failures_at_a_glance(self):
        self.pipeline()
        self.clock.advance(7)
        self.show()
        self.see("#jobs caption", "1 to 100 of 100 jobs")
        self.see("#pace", "up to 70 a minute")
        self.see("#overall", "20 of 100 jobs done \u00b7 ", " a minute",
                 " \u00b7 about ", " left (")
        self.see("#counts", "100 jobs", "20 done", "10 working",
                 "60 waiting", "10 failed")
        self.see("#attention", "10 failed in align, exit status 3 on node7: "
                               "no space left")
        steps = self.see("#steps", "Stage 2")
        self.assertRegex(steps, r"(?s)align \(0\).*40 waiting.*10 failed"
                         r".*10 working.*40 % through.*median"
                         r".*expires after 1 min.*Stage 2.*20 waiting"
                         r".*expires after 1 h.*end \(4\).*20 done")
        self.assertNotIn("Stage 1", steps)
        rows = self.browser.rows("#workers")
        self.assertEqual(["node7-1", "node7", "align, 2", "10 of 16"],
                         rows[0][:4])
        self.assertRegex(rows[0][4], r"51\s7 s\s+52\s7 s.*and 4 more")
        self.assertEqual(["90", "2", "7 s"], rows[0][5:8])
        self.assertEqual("20 % \u26a0 10 \u2013 jobman",
                         self.script("document.title"))
        shares = self.browser.script(
            "const wide = css => document.querySelector('#steps .bar' + css)"
            ".getBoundingClientRect().width;"
            "return [' .past', ' .waiting'].map(css => wide(css) / wide(''))")
        for share in shares:
            self.assertAlmostEqual(0.4, share, delta=0.03)
        self.assertEqual(["image", (
            "40 attempts took 0.001 s to 8.2 s, most often about"
            " 0.001 s")], list(next(
                pair for pair in self.browser.names() if "took" in pair[1])))
        looks = self.script(
            "['waiting', 'working', 'done', 'failed'].map(name => {"
            " const style = getComputedStyle(document.querySelector("
            "  '#counts .key.' + name));"
            " return style.backgroundColor + style.backgroundImage })")
        self.assertEqual(4, len(set(looks)), looks)
        tops = self.script(
            "['attention', 'workers', 'jobs'].map("
            "id => document.getElementById(id).getBoundingClientRect().top)")
        for top, most in zip(tops, (250, 700, 900)):
            self.assertLess(top, most, tops)
        self.assertOnlyNewIsDrawn()

    def polls(self):
        """Return how often the page has asked for the figures."""
        return self.script(
            "performance.getEntriesByType('resource').filter("
            "one => one.name.endsWith('/status')).length")

    def assertOnlyNewIsDrawn(self):
        """Assert that a page stays as it is until there is news to tell."""
        self.browser.watch("main")
        n = self.polls()
        wait_for(lambda: self.polls() >= n + 3, "three more polls")
        self.assertLessEqual(
            self.browser.changed(), {"overall", "workers", "jobs"})
        self.assertEqual("", self.browser.text("#live"))
        self.browser.script("window.same = true")
        for job in self.get(2, n=20):
            self.update(job, 4)
        self.see("#percent", "40 %")
        self.see("#counts", "40 done")
        self.assertEqual("40", self.script(
            "document.querySelector('#overall-bar').ariaValueNow"))
        self.fail(self.get(0), exit_code=3)
        self.see("#live", "1 job failed.")
        self.assertTrue(self.script("window.same"))

    def test_nothing_yet_says_what_to_do_and_then_what_holds_it_up(self):
        self.show()
        shown = self.see("#main", "No jobs yet", "python3 jobman.py submit",
                         "python3 worker.py")
        self.assertNotIn("Throughput", shown)
        self.assertNotIn("Find", shown)
        self.set_jobs(range(4), laststage=2)
        self.see("#overall", "nothing finished in the last 2 minutes \u00b7 "
                             "no worker serves stage 0, 4 waiting in it")
        self.ok("/stages", {"0": {"cores": 4}})
        self.beat("w", stages=[0], slots=2, memory=2**30)
        self.see("#overall", "no worker has room for a job of stage 0")
        self.ok("/stages", {"0": {"cores": None}})
        self.beat("w", ended=True)
        self.ok("/pause/0", {})
        self.see("#overall", "stage 0 is paused, 4 waiting in it")
        self.ok("/resume/0", {})
        jobs = self.get(0, n=4)
        self.see("#overall", "minutes \u00b7 4 still running")
        self.fail(jobs[0])
        self.see("#overall", "3 still running \u00b7 1 delayed")
        for job in jobs[1:]:
            self.update(job, 2)
        self.ok("/cancel", {"ids": [jobs[0]["jobid"]]})
        self.see("#overall", "3 of 4 jobs done \u00b7 the others won't run")

    def test_what_needs_a_person_comes_first(self):
        self.pipeline()
        self.beat("bad", quarantine="the disk is full")
        self.beat("idle", stages=[2])
        self.ok("/drain/idle", {})
        self.ok("/pause/2", {})
        self.expire()
        self.clock.advance(100)
        self.beat("node8-2", stages=[2], slots=16)
        self.show("all=attention")
        self.see("#attention", "silent")
        items = self.script(
            "[...document.querySelectorAll('#attention li')].map("
            "item => [item.children[0].innerText,"
            " item.querySelector('a')?.hash || ''])")
        ids = "%2C".join(map(str, range(50, 40, -1)))
        for (text, link), wanted in zip(items, (
            ("10 failed in align, exit status 3 on node7: no space left",
             "#state=failed&ids=" + ids),
            ("Stage 2 is paused, 20 waiting in it", "#state=waiting&stage=2"),
            ("50 expired in align, there for over 1 min",
             "#state=expired&stage=0&order=time"),
            ("1 worker quarantined: bad: the disk is full", ""),
            ("2 workers silent: idle for 2 min 41 s, node7-1 for", ""),
        )):
            self.assertEqual(wanted, (text[:len(wanted[0])], link))
        rows = self.browser.rows("#workers")
        self.assertEqual(["bad", "idle", "node7-1", "node8-2"],
                         [row[0] for row in rows])
        self.assertEqual("quarantined: the disk is full", rows[0][4].strip())
        self.assertIn("silent", rows[1][4])
        self.assertEqual(6, self.script(  # above twice 8 s and a minute
            "document.querySelectorAll('#workers .slow').length"))
        for job in self.get(0, n=50):
            self.fail(job, stderr="bad" + "x" * job["jobid"], exit_code=3)
        self.follow("#attention", "Show 5")
        wait_for(lambda: self.script(
            "document.querySelectorAll('#attention li').length") == 5, "five")

    def test_it_draws_throughput_from_the_first_minute_on(self):
        self.set_jobs(range(90), laststage=2)
        for n in (30, 10, 20):
            for job in self.get(0, n=n):
                self.update(job, 2)
            self.fail(self.get(0))
            self.clock.advance(60)
        self.show()
        self.see("#pace-text", "20 attempts", "20 jobs done", "1 failed")
        self.see("#pace", "up to 31 a minute")
        bars = ("document.querySelector('#pace path.done')"
                ".getAttribute('d').split('M').length - 1")
        self.assertEqual(4, self.script(bars))
        self.browser.script(
            "const svg = document.querySelector('#pace svg');"
            "const {left, top, width} = svg.getBoundingClientRect();"
            "svg.dispatchEvent(new PointerEvent('pointermove', {"
            " clientX: left + width * 0.5 / 15, clientY: top + 5 }))")
        self.see("#pace-text", "30 attempts")
        self.follow("#pace", "whole run")
        self.see("#pace", "last hour")
        wait_for(lambda: self.script(bars) == 4, "four minutes")

    def test_300_failures_for_3_reasons_are_3_rows(self):
        self.set_jobs(range(400), max_attempts=1)
        for n, message in ((150, "no file '/a/%d'"), (100, "out of %d MB"),
                           (50, "bad input")):
            for job in self.get(0, n=n, worker="w"):
                text = message % job["jobid"] if "%" in message else message
                self.fail(job, exit_code=1, stderr="...\n" + text)
        self.show()
        shown = self.see("#attention", "150 failed in stage 0, exit status 1",
                         "100 failed", "50 failed", "bad input")
        self.assertEqual(3, shown.count("failed"), shown)
        self.browser.click("#attention li:nth-child(2) a")
        self.see("#jobs caption", "1 to 100 of 100 jobs")
        self.see("#jobs thead", "Why")
        self.assertEqual("150", self.browser.rows("#jobs")[0][0])
        self.assertIn("Retry 100 jobs?", self.act("#jobs-actions", "Retry"))
        self.see("#message", "100 jobs retried.")
        self.see("#jobs caption", "No jobs match.")
        self.assertIn("Retry 50 jobs?",
                      self.act("#attention li:nth-child(2)", "Retry"))
        self.see("#message", "50 jobs retried.")
        self.assertEqual({(0, "waiting"): 250, (0, "failed"): 150},
                         self.states())

    def test_one_job_opens_to_its_attempts(self):
        self.set_jobs({7: {"run": ["a", "b"]}, 8: ["gzip", "a b.txt"]},
                      max_attempts=2, cwd="/work")
        self.fail(self.get(0, worker="w1"), exit_code=9, error="exit 9",
                  stderr="one\ntwo")
        self.ok("/pause/0", {})
        self.clock.advance(90)
        self.ok("/resume/0", {})
        job = self.get(0, worker="w2")
        self.clock.advance(75)
        files = made("out.bam")
        self.update(job, 2, body=packed({"files": files,
                                         "filename": "out.bam"}))
        self.show()
        self.open_job(7)
        shown = self.see(
            "#job", "Job 7", "waiting in stage 2 for ", '"run"', "/work",
            "out.bam (", files[0]["sha256"], "python3 jobman.py logs 7",
            "attempt 1 in stage 0 failed, exit status 9 \u00b7 w1",
            "attempt 2 in stage 0 done \u00b7 w2", "1 min 15 s")
        self.assertLess(shown.index("w2"), shown.index("w1"))
        self.assertNotIn("two", shown)
        self.browser.click("#job-attempts details:last-child summary")
        self.see("#job-attempts", "one\ntwo")
        self.assertNotIn("exit 9", self.browser.text("#job-attempts"))
        self.browser.click("#job-close")
        self.see_nothing("#job")
        self.open_job(8)
        self.see("#job", "gzip 'a b.txt'", "no worker serves stage 0")

    def test_what_is_read_in_an_open_job_stays(self):
        self.set_jobs([1])
        self.fail(self.get(0), stderr="line\n" * 400 + "the reason")
        self.clock.advance(9)
        claim = self.get(0, lease=60, worker="w")
        self.show("job=1")
        self.see("#job", "working", "line")
        self.assertTrue(self.browser.script("""
            window.text = document.querySelector("#job-attempts pre");
            const range = document.createRange(), [line] = text.childNodes;
            range.setStart(line, line.length - 1);
            range.setEnd(line, line.length);
            const end = range.getBoundingClientRect();
            const box = text.getBoundingClientRect();
            return end.top > box.top && end.bottom < box.bottom &&
              text.scrollHeight > 2 * text.clientHeight"""), "its end")
        self.browser.script(
            "text.scrollTo(0, -99); text.focus();"
            "getSelection().selectAllChildren(text);")
        self.clock.advance(30)
        self.beat("w", lease=600, claims=[[1, claim["claim"]]])
        self.see("#job-state", "for 3")
        self.assertEqual([-99, True, 2010], self.script(
            "[text.scrollTop, document.activeElement === text,"
            " getSelection().toString().length]"))

    def test_a_job_shows_its_output_while_it_runs(self):
        self.set_jobs({1: "run"})
        job = self.get(0, worker="w")
        self.store.logs = self.folder
        log = self.path("w.%s.1." % worker.namespace(self.jobix))

        def prints(index, text):
            for name, more in (("out", text), ("index", index + "\n")):
                with open(log + name, "a") as file:
                    file.write(more)

        prints("1 0 1 5 1 0 4", "one\n")
        self.show("job=1")
        self.see("#job-output", "Standard output \u00b7 running", "one")
        self.browser.script(
            "const text = document.querySelector('#job-output pre')"
            ".firstChild;"
            "getSelection().setBaseAndExtent(text, 0, text, 3)")
        prints("1 0 1 5 1 4 4", "two\n")
        self.see("#job-output", "one\ntwo")
        self.assertEqual("one", self.script("getSelection() + ''"))
        prints("1 0 1 5 2 8 5", "over\n")
        self.update(job, 2)
        self.see("#job-output", "Standard error", "over")

    def test_a_long_command_is_cut_in_the_table_alone(self):
        self.set_jobs({1: "a" * 10**5 + "z"})
        self.show()
        self.see("#jobs", "aaa \u2026 aaa", "az")
        self.assertLess(len(self.browser.text("#jobs")), 1000)
        self.open_job(1)
        self.see("#job", "a" * 10**5 + "z")

    def test_without_a_script_there_is_a_plain_page(self):
        self.pipeline()
        self.expire()
        self.browser.devtools(
            "Emulation.setScriptExecutionDisabled", value=True)
        try:
            self.browser.open(self.origin + "get")
            self.assertIn("needs JavaScript", self.browser.text("noscript"))
            plain = self.script("document.querySelector('noscript a').href")
            self.browser.resize(360, 740)
            self.browser.open(plain.replace("//", "//any:4711@"))
            shown = self.browser.text("body")
            self.assertTrue(self.script(
                "document.querySelector('meta[http-equiv=refresh]') &&"
                " document.documentElement.scrollWidth <= innerWidth"))
        finally:
            self.browser.devtools(
                "Emulation.setScriptExecutionDisabled", value=False)
        for text in ("20 %", "no space left", "node7-1", "Expired jobs"):
            self.assertIn(text, shown)
        for url in self.browser.requests():
            self.assertIn("%s:%d/get" % self.address, url)

    # The table of jobs, and its address

    def test_jobs_are_found_by_links_number_text_and_order(self):
        self.pipeline()
        self.expire()
        self.show()
        for css, text, title, caption in (
            ("#counts", "10 failed", "Failed jobs", "1 to 10 of 10 jobs"),
            ("#counts", "50 expired", "Expired jobs", "1 to 50 of 50 jobs"),
            ("#steps", "20 waiting", "Waiting jobs in stage 2",
             "1 to 20 of 20 jobs"),
            ("#counts", "100 jobs", "Jobs", "1 to 100 of 100 jobs"),
            ("#steps", "align (0)", "Jobs in align", "1 to 50 of 50 jobs"),
        ):
            self.follow(css, text)
            self.see("#jobs caption", caption)
            self.assertEqual(title, self.browser.text("#jobs-title"))
        self.call("/update_job/70/0")
        for order, ends in (("time", ["41", "70"]), ("-time", ["70", "41"]),
                            ("-id", ["100", "41"]), ("", ["41", "100"])):
            self.browser.choose("#by-order", order)
            wait_for(lambda ends=ends: ends == [
                self.browser.rows("#jobs")[i][0] for i in (0, -1)], order)
        for text, said in (("SAMPLE07", "1 to 10 of 10"), ("-1", "No jobs"),
                           ("9" * 22, "No jobs"), ("007", "No jobs")):
            self.browser.script("$('find-text').value = ''")
            self.browser.type("#find-text", text)
            self.browser.press("Enter")
            self.see("#jobs-title", text)
            self.see("#jobs caption", said)
        self.faults.append("404")
        for text, said in (("7", "sample007.fq"), ("900", "no job 900.")):
            self.browser.script("find(arguments[0])", text)
            self.see("#job", said)
            self.browser.click("#job-close")
        self.assertEqual("", self.browser.text("#stale"))

    def test_jobs_are_paged_by_the_server(self):
        self.replace("PAGE_TEXT", 20000)
        self.set_jobs(dict.fromkeys(range(50), "x" * 1000))
        self.show()
        self.see("#jobs caption", "1 to 20 of 50")
        for caption in ("21 to 40 of 50", "41 to 50 of 50"):
            self.follow("#pages", "Next")
            self.see("#jobs caption", caption)
        self.assertEqual("First", self.browser.text("#pages"))
        self.browser.call("POST", "/back")
        self.see("#jobs caption", "21 to 40")
        self.follow("#pages", "First")
        self.see("#jobs caption", "1 to 20 of")
        self.assertEqual("Next", self.browser.text("#pages"))

    def test_the_address_says_what_is_shown(self):
        self.pipeline()
        self.show("state=waiting&stage=align")
        self.see("#jobs caption", "1 to 40 of 40 jobs")
        self.assertEqual(self.origin + "get#state=waiting&stage=align",
                         self.script("location.href"))
        self.open_job(61)
        self.browser.call("POST", "/refresh")
        self.see("#job", "Job 61", "waiting in align")
        self.browser.call("POST", "/back")
        self.see("#jobs caption", "1 to 40 of 40 jobs")
        self.see_nothing("#job")
        self.browser.middle_click("#jobs tbody tr:nth-child(2) a")
        mine, = {self.browser.call("GET", "/window")}
        other, = wait_for(lambda: set(
            self.browser.call("GET", "/window/handles")) - {mine}, "a tab")
        self.browser.call("POST", "/window", handle=other)
        self.see("#job", "Job 62")
        self.browser.call("DELETE", "/window")
        self.browser.call("POST", "/window", handle=mine)
        self.assertEqual("", self.browser.text("#job"))

    def test_a_job_links_to_those_it_waits_for(self):
        self.set_jobs([1, 2], laststage=2)
        self.set_jobs([5], after=[1, 2])
        self.show("job=5")
        self.assertRegex(self.see("#job", "Waits for"), r"Waits for\s+1, 2\s")
        self.ok("/cancel", {"ids": [2]})
        self.see("#job", "the end of job 2")
        self.follow("#job-facts", "job 2")
        self.see("#job", "Job 2", "cancelled")

    # What it can do

    def test_an_open_job_is_retried_and_cancelled(self):
        self.set_jobs([5], max_attempts=1, laststage=2)
        self.fail(self.get(0))
        self.show("state=failed")
        self.open_job(5)
        self.browser.click("#job button", "Retry")
        self.assertIn("Retry job 5?", self.see("#confirm", "Keep as it is"))
        self.browser.click("#confirm-no")
        self.assertEqual({(0, "failed"): 1}, self.states())
        self.act("#job", "Retry")
        self.see("#job #message", "1 job retried.")
        self.see("#job", "waiting in stage 0")
        self.assertEqual({(0, "waiting"): 1}, self.states())
        self.browser.click("#job button", "Cancel")
        self.see("#confirm", "Cancel job 5?")
        self.update(self.get(0), 2)
        self.ok("/forget", {"ids": [5]})
        self.faults.append("404")
        self.browser.click("#confirm-yes")
        self.see("#job #note.bad #message", "There is no job 5.")
        self.browser.click("#job-close")
        self.see("#notes-place #message", "There is no job 5.")
        self.browser.click("#dismiss")
        self.assertEqual("", self.browser.text("#note"))

    def test_actions_reach_the_jobs_of_the_filter(self):
        self.set_jobs({i: "a%d" % i for i in range(160)}, max_attempts=1,
                      laststage=8)
        self.set_jobs({i: "b%d" % i for i in range(160, 170)}, stage=2)
        for job in self.get(0, n=5):
            self.fail(job)
        for job in self.get(0, n=3):
            self.update(job, 8)
        self.get(0, n=142, worker="w", lease=600)
        self.show()
        for fragment, button, n, said in (
            ("state=working", "Release 142 running \u2026", 142, "released"),
            ("none", "Retry 5 failed \u2026", 5, "retried"),
            ("match=b16", "Cancel \u2026", 10, "cancelled"),
            ("match=a1", "Cancel \u2026", 71, "cancelled"),
            ("stage=2", "", 0, ""),
            ("stage=2&state=cancelled", "Retry 10 \u2026", 10, "retried"),
            ("none", "Cancel 96 \u2026", 96, "cancelled"),
            ("state=done", "Retry 3 \u2026", 3, "retried"),
        ):
            with self.subTest(fragment=fragment, button=button):
                self.browser.script("location.hash = arguments[0]", fragment)
                self.browser.script("say('')")
                if not button:
                    self.see("#jobs-title", "in stage 2")
                    self.see_nothing("#jobs-actions")
                    continue
                self.see("#jobs-actions", button)
                question = self.act("#jobs-actions", button[:-2])
                self.assertIn("%s %d jobs?" % (button.split()[0], n), question)
                self.see("#message", "%d jobs %s." % (n, said))

    def test_stages_and_workers_are_acted_on(self):
        self.set_jobs([1])
        self.beat("a/b <c>", stages=[0])
        self.show()
        self.see("#workers", "a/b <c>")
        for css, button, value, said, shown in (
            ("#steps", "Lifetime of stage 0", 90,
             "Lifetime of stage 0: 90 minutes.", "expires after 1 h 30 min"),
            ("#steps", "Pause", None, "Stage 0 is paused.", "paused"),
            ("#attention", "Resume", None, "Stage 0 resumed.", ""),
            ("#workers", "Drain", None, "a/b <c> takes no more jobs.",
             "drained"),
            ("#attention", "Undo drain", None, "a/b <c> takes jobs again.",
             ""),
        ):
            with self.subTest(button=button):
                self.act(css, button, value)
                self.see("#message", said)
                if shown:
                    self.see(css, shown)
                stage, = self.ok("/status")["stages"]
                self.assertEqual(90, stage["lifetime"])
                self.assertEqual(button == "Pause", stage["paused"])
                self.assertEqual(button == "Drain",
                                 self.beat("a/b <c>", stages=[0])["drain"])

    def test_jobs_that_expire_are_shown_and_moved_back(self):
        self.ok("/init/0/1/0/0")
        self.set_jobs(range(3))
        self.get(0, n=2)
        self.show("state=expired")
        self.see("#jobs caption", "No jobs match.")
        self.expire()
        self.see("#jobs caption", "1 to 2 of 2")
        self.assertIn("Move 2 expired jobs of stage 1?",
                      self.act("#attention", "Move"))
        self.see("#message", "2 jobs moved to stage 0.")
        wait_for(lambda: self.focus() == "message", "what was said")
        self.assertEqual({(0, "waiting"): 3}, self.states())

    # Who gets in

    def test_the_jobix_is_kept_for_the_session_and_nowhere_else(self):
        self.set_jobs([1])
        self.show()
        self.assertNotRegex(self.script("location.href"), r"\b4711\b")
        kept = self.script(
            "[{...sessionStorage}, localStorage.length,"
            " document.cookie, document.documentElement.outerHTML]")
        self.assertEqual([{"jobix": "4711"}, 0, ""], kept[:3])
        self.assertNotRegex(kept[3], r"\b4711\b")
        self.browser.call("POST", "/refresh")
        self.see("#overall", "0 of 1 job done")
        self.assertFalse([u for u in self.browser.requests() if "4711" in
                          u.partition("#")[0]])

    def test_it_asks_for_a_jobix_that_is_missing_or_wrong(self):
        self.set_jobs([1])
        self.show("job=1")
        self.see("#job", "Job 1")
        self.store.open_to_all = False
        self.faults.append("403")
        self.see("#login", "This server accepts only the jobix in")
        self.see_nothing("#job")
        self.jobix = self.store.jobix
        self.set_jobs([1, 2])
        self.browser.open(self.origin + "get")
        self.see("#login", "Your jobix", "access.json")
        self.see_nothing("#progress")
        for wrong, said in (("77", "This server accepts only the jobix in"),
                            ("x", "A jobix is a number"),
                            ("1" * 30, "A jobix is a number")):
            self.browser.type("#login-jobix", wrong)
            self.browser.press("Enter")
            self.see("#login", said)
            self.assertEqual("", self.browser.text("#stale"))
        self.browser.type("#login-jobix", str(self.jobix))
        self.browser.press("Enter")
        self.see("#overall", "0 of 2 jobs done")
        for odd in ("-1", "\u00e9", "\u4e2d", "1 2", "77"):
            self.browser.open(self.origin + "get#jobix=" + odd)
            self.see("#login", "Your jobix")
            self.see_nothing("#progress")

    def test_to_act_it_asks_for_the_other_jobix(self):
        self.store.open_to_all = False
        self.jobix = self.store.jobix
        self.pipeline()
        self.expire()
        self.show(jobix=self.store.reading_jobix)
        self.see("header", "read only", "Sign in to act")
        self.see("#attention", "10 failed")
        self.open_job(50)
        self.assertNoActions()
        self.browser.click("#job-close")
        self.browser.click("#sign-in")
        self.browser.click("#login-cancel")
        self.see("#overall", "of 100 jobs done")
        self.browser.click("#sign-in")
        self.browser.type("#login-jobix", str(self.jobix))
        self.browser.press("Enter")
        self.see("#jobs-actions", "Retry 10 failed")
        self.assertNotIn("read only", self.browser.text("header"))

    def test_nothing_of_another_jobix_stays(self):
        self.pipeline()
        large = jobman.MAX_JOBIX  # a script's numbers can't hold it
        self.post("/set", {1: {"jobstage": 0}}, jobix=large)
        self.post("/set", {1: {"jobstage": 2}}, jobix=large - 1)
        self.show()
        self.see("#workers", "node7-1")
        self.see("#attention", "10 failed")
        self.browser.click("#jobs-actions button", "Cancel")
        self.see("#confirm", "Cancel 80 jobs?")
        self.browser.script("location.hash = '#jobix=%d'" % large)
        self.see("#overall", "0 of 1 job done")
        self.see("#steps", "Stage 0")
        self.assertEqual("", self.browser.text("#confirm"))
        self.see_jobs(1)
        self.assertEqual([], self.browser.rows("#workers"))
        self.assertNotIn("failed", self.browser.text("#attention"))
        self.assertEqual({(0, "waiting"): 1}, self.states(jobix=large))

    # How it asks

    def answers(self, change=lambda path: None):
        """Note each answer of the server, as (path, status, time).

        `change` is called with a path before, and may give another answer.
        """
        noted, respond = [], jobman.respond

        def respond_and_note(store, request):
            response = change(request.path) or respond(store, request)
            noted.append((request.path, response.status, time.monotonic()))
            return response

        self.replace("respond", respond_and_note)
        return lambda path: [each for each in noted if each[0] == path]

    def test_it_asks_once_a_second_and_takes_304_for_an_answer(self):
        self.set_jobs([1])
        self.show()
        self.see("#jobs caption", "1 to 1")
        seen = self.answers()
        wait_for(lambda: len(seen("/status")) >= 4, "four polls")
        self.assertEqual({304}, {s[1] for s in seen("/status")[1:]})
        times = [s[2] for s in seen("/status")]
        pauses = sorted(b - a for a, b in zip(times, times[1:]))
        self.assertGreater(pauses[0], 0.9)
        self.assertLess(pauses[len(pauses) // 2], 3)
        self.assertLess(len(seen("/jobs")), 3)
        other = self.browser.call("POST", "/window/new", type="tab")
        mine = self.browser.call("GET", "/window")
        self.browser.call("POST", "/window", handle=other["handle"])
        wait_for(lambda: self.script("document.visibilityState")
                 == "visible", "a tab")
        n = len(seen("/status"))
        self.clock.advance(1)
        end = time.monotonic() + 3
        wait_for(lambda: time.monotonic() > end, "three seconds")
        self.assertLessEqual(len(seen("/status")), n + 1)
        self.browser.call("DELETE", "/window")
        self.browser.call("POST", "/window", handle=mine)
        wait_for(lambda: len(seen("/status")) > n + 1, "it is seen again")

    def test_it_asks_less_often_where_the_server_is_slow(self):
        self.show()
        seen = self.answers(
            lambda path: path == "/status" and time.sleep(0.3))
        wait_for(lambda: len(seen("/status")) >= 3, "three polls")
        times = [s[2] for s in seen("/status")]
        self.assertGreater(times[2] - times[1], 3)

    def test_times_are_in_the_viewers_zone(self):
        self.set_jobs([1])
        self.browser.devtools(
            "Emulation.setTimezoneOverride", timezoneId="Asia/Tokyo")
        try:
            self.show()
            self.see("#jobs", "waiting")
            title = self.script(
                "document.querySelector('#jobs td.short[title*=M]').title")
        finally:
            self.browser.devtools(
                "Emulation.setTimezoneOverride", timezoneId="UTC")
        self.assertIn("9:26:40", title)

    def test_what_is_refused_of_one_part_keeps_no_other_away(self):
        self.set_jobs([1])
        self.faults.append("503")
        refused = {"/pace": "it is tired"}

        def change(path):
            why = refused.get(path)
            return why and jobman.error_response(jobman.Unavailable(why))

        self.answers(change)
        self.show()
        self.see("#message", "The server can't do that now (it is tired)")
        self.see_jobs(1)
        self.assertEqual("", self.browser.text("#stale"))
        refused["/status"] = "it is full"
        self.see("#stale", "(it is full)", " since ", "Retrying")
        self.assertEqual([], self.browser.script("""
            say("message");
            scrollTo(0, 3000);
            return [$("stale"), $("message")].filter(node => {
              const {x, y, width, height} = node.getBoundingClientRect();
              return document.elementFromPoint(
                x + width / 2, y + height / 2) !== node;
            }).map(node => node.id);"""), "one covers the other")

    def test_a_server_that_hangs_or_is_gone_and_comes_back(self):
        self.closing.close()
        process, address = self.serve("--db", self.path("jobs.db"))
        self.address = address
        self.origin = "http://%s:%d/" % address
        self.pipeline()
        self.show()
        self.see("#attention", "10 failed")
        self.reap(process)  # kill -9
        self.see("#stale", "No answer from the server since", "Retrying")
        self.faults.append("ERR_CONNECTION_REFUSED|ERR_EMPTY_RESPONSE"
                           "|ERR_CONNECTION_RESET|Failed to load resource")
        process, _ = self.serve("--db", self.path("jobs.db"), port=address[1])
        self.see_nothing("#stale")
        self.see("#message", "The server is back.")
        self.addCleanup(process.send_signal, signal.SIGCONT)
        process.send_signal(signal.SIGSTOP)
        self.see("#stale", "No answer from the server since")
        process.send_signal(signal.SIGCONT)
        self.see_nothing("#stale")

    # For every person

    def test_hostile_texts_are_only_texts(self):
        self.set_jobs({1: HOSTILE, 2: [HOSTILE]}, filename=HOSTILE,
                      max_attempts=1)
        self.beat(HOSTILE, host=HOSTILE, quarantine=HOSTILE)
        job = self.get(0)
        self.fail(job, error=HOSTILE, stderr=HOSTILE, exit_code=1)
        self.show("match=" + urllib.parse.quote(HOSTILE))
        for css in ("#workers", "#attention", "#jobs-title"):
            self.see(css, HOSTILE)
        self.browser.script("location.hash = ''")
        self.see("#jobs", HOSTILE)
        self.open_job(1)
        self.see("#job", HOSTILE)
        markup = "document.querySelectorAll('img, main script').length"
        self.assertEqual(0, self.script(markup))
        self.assertNotIn("innerHTML", read("dashboard.html").decode())
        self.snapshot()
        for css in ("#workers", "#attention", "#jobs"):
            self.see(css, HOSTILE)
        self.assertEqual(0, self.script(markup))

    def test_what_its_policy_forbids_is_not_done(self):
        self.show()
        self.browser.script("""
            const script = document.createElement("script");
            script.textContent = "window.hit = 1";
            document.body.append(script);
            document.body.setAttribute("onclick", "window.hit = 2");
            document.body.click();
            return fetch("http://127.0.0.2:1/").catch(() => {});""")
        self.faults.append("Content Security Policy")
        said = [entry["message"] for entry in self.browser.log("browser")]
        self.assertEqual(3, len([
            text for text in said if "violates the following" in text]), said)
        self.assertIsNone(self.script("window.hit || null"))

    def focus(self):
        """Return what has the focus: its id, else its text."""
        return self.script("document.activeElement.id ||"
                           " document.activeElement.innerText")

    def test_the_keyboard_alone_is_enough(self):
        self.set_jobs(range(3))
        self.show()
        self.see_jobs(0, 1, 2)
        self.browser.press("Tab")
        self.assertEqual("skip", self.focus())
        self.browser.press("Enter")
        self.assertEqual("jobs", self.focus())
        while self.focus() != "1":
            self.browser.press("Tab")
        self.assertEqual("solid", self.script(
            "getComputedStyle(document.activeElement).outlineStyle"))
        self.browser.press("Enter")
        self.see("#job", "Job 1")
        self.browser.press("Escape")
        self.see_nothing("#job")
        self.assertEqual("1", self.focus())
        self.browser.script("document.querySelector('summary').focus()")
        self.browser.press("Enter", "Tab", "Enter")
        self.see("#confirm", "Pause stage 0?")
        self.assertEqual("confirm-no", self.focus())
        seen = set()
        for _ in range(6):
            self.browser.press("Tab")
            seen.add(self.script("document.activeElement.id"))
        self.assertEqual({"confirm-yes", "confirm-no", ""}, seen)
        self.browser.press("Escape")
        self.see_nothing("#confirm")
        self.assertEqual("Pause", self.focus())
        self.assertFalse(self.ok("/status")["stages"][0]["paused"])
        self.browser.press("Enter")
        self.see("#confirm", "Pause stage 0?")
        while self.focus() != "confirm-yes":
            self.browser.press("Tab")
        self.browser.press("Enter")
        self.see("#message", "Stage 0 is paused.")
        wait_for(lambda: self.focus() == "Resume", "the other action")

    def test_the_focus_stays_while_figures_change(self):
        self.ok("/init/1/0/0")
        self.set_jobs(range(9), max_attempts=1)
        self.fail(self.get(0), error="bad")
        self.expire()
        self.show()
        self.see("#attention", "1 failed", "9 expired")
        self.see("#jobs caption", "1 to 9")
        for n, css in enumerate((
            "#jobs tbody tr:nth-child(9) a", "#steps summary",
            "#jobs-actions button:last-child", "#attention li button",
            "#attention li:last-child button", "#by-order", "#counts a",
        ), 2):
            self.browser.script(
                "window.kept = document.querySelector(arguments[0]);"
                "kept.focus()", css)
            self.fail(self.get(0), error="bad")
            self.see("#counts", "%d failed" % n)
            self.see("#attention", "%d failed" % n)
            self.assertTrue(
                self.script("kept === document.activeElement"), css)
        self.browser.script("location.hash = '#state=failed'")
        self.see("#jobs caption", "1 to 8 of 8")
        self.browser.script(
            "document.querySelectorAll('#jobs tbody a')[2].focus()")
        self.ok("/retry", {"ids": [0]})
        self.see("#jobs caption", "1 to 7 of 7")
        self.assertEqual("2", self.focus())

    CONTRASTS = """
        function rgb(text) { return text.match(/[\\d.]+/g).map(Number) }
        function light(text) {
          const [r, g, b] = rgb(text).slice(0, 3).map(c => c / 255).map(
            c => c <= .03928 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4);
          return .2126 * r + .7152 * g + .0722 * b;
        }
        function under(node) {
          for (; node; node = node.parentElement) {
            const colour = getComputedStyle(node).backgroundColor;
            if (rgb(colour)[3] !== 0) return colour;
          }
          return getComputedStyle(document.body).backgroundColor;
        }
        return [...document.querySelectorAll('body *')].filter(node =>
          [...node.childNodes].some(child => child.nodeType === 3 &&
            child.data.trim()) && node.checkVisibility() &&
          !node.closest('script') && !node.disabled).map(node => {
          const [a, b] = [light(getComputedStyle(node).color),
                          light(under(node))].sort((x, y) => y - x);
          return [(a + .05) / (b + .05), node.outerHTML.slice(0, 80)];
        }).filter(([ratio]) => ratio < 4.5)"""

    def assertContrast(self):
        """Assert that all text can be read, by day and by night."""
        for scheme in ("light", "dark"):
            self.browser.scheme(scheme)
            self.assertEqual([], self.browser.script(self.CONTRASTS), scheme)

    def assertNames(self, *dialogs):
        """Assert that all that can be used has a name, and buttons their own.

        `dialogs` are names of open ones.
        """
        names = self.browser.names()
        usable = {"button", "checkbox", "combobox", "dialog", "link",
                  "progressbar", "radio", "region", "searchbox", "spinbutton",
                  "table", "textbox", "image", "DisclosureTriangle"}
        self.assertEqual([], [
            role for role, name in names if role in usable and not name])
        buttons = [name for role, name in names if role == "button"]
        self.assertTrue(buttons)
        self.assertEqual(len(set(buttons)), len(buttons), buttons)
        for name in dialogs:
            self.assertIn(("dialog", name), names)

    def test_all_can_be_read_and_heard(self):
        self.pipeline()
        self.expire()
        self.clock.advance(200)  # until a job takes long
        self.show()
        self.see("#attention", "50 expired")
        self.see("#workers", "silent")
        self.see("#jobs caption", "1 to 100")
        for css, n in (
            ("h1", 1), ("main h2", 6), ("[aria-live=polite]", 2),
            ("table:not(:has(caption))", 0), ("thead th:not([scope=col])", 0),
            ("tbody th:not([scope=row])", 0), ("html[lang=en]", 1),
            ("main section:not([aria-labelledby])", 0),
        ):
            self.assertEqual(n, self.script(
                "document.querySelectorAll(arguments[0]).length", css), css)
        self.assertNames()
        self.browser.click("#steps summary")
        self.assertContrast()
        self.open_job(41)
        self.assertNames("Job 41")
        self.assertContrast()
        self.browser.click("#job button", "Retry")
        self.see("#confirm", "Retry job 41?")
        self.assertNames("Retry job 41?")
        self.assertContrast()
        self.browser.click("#confirm-yes")
        self.see("#message", "1 job retried.")
        self.browser.click("#job-close")
        self.browser.script("document.querySelector('#stale').hidden = false;"
                            "document.querySelector('#sign-in').click()")
        self.see("#login", "jobix")
        self.assertContrast()
        self.assertEqual("rgb(15, 19, 24)", self.script(
            "getComputedStyle(document.body).backgroundColor"))

    def test_it_fits_every_width_and_uses_it(self):
        self.pipeline()
        self.history()
        self.set_jobs({0: "x" * 500}, stage=5, filename="y" * 500)
        for jobid in (3001, 3002):
            name = "node%d-" % jobid + "n" * 200
            self.set_jobs([jobid], stage=50)
            self.beat(name, host=name, stages=[50])
            self.get(50, worker=name)
        self.get(0, n=9, worker="node7-1")
        self.expire()
        self.show()
        self.see("#jobs caption", "1 to 100")
        self.see("#attention", "10 failed")
        for width, height, scheme in (
            (320, 700, "light"), (360, 740, "dark"), (700, 900, "light"),
            (1030, 900, "light"), (1280, 900, "light"), (1280, 900, "dark"),
            (1600, 900, "light"), (1920, 1080, "light"),
            (2560, 1440, "light"),
        ):
            with self.subTest(width=width):
                self.browser.resize(width, height)
                self.browser.scheme(scheme)
                self.browser.script("render()")
                self.assertFits(width)
                if width in (320, 1280):
                    self.browser.script("location.hash = '#job=0'")
                    self.see("#job", "yyy")
                    self.assertFits(width)
                    self.browser.click("#job button", "Retry")
                    self.see("#confirm", "Retry job 0?")
                    self.assertFits(width)
                    self.browser.click("#confirm-no")
                    self.browser.click("#job-close")
        edges = self.script(
            "['steps', 'pace'].map(id => document.getElementById("
            "id).getBoundingClientRect()).map(box => [box.top, box.right])")
        self.assertEqual(edges[0][0], edges[1][0])  # side by side
        self.assertGreater(edges[1][1], 2300)

    def assertFits(self, width):
        """Assert that nothing is wider than a window of that width."""
        self.assertEqual((width, []), tuple(self.script(
            "[innerWidth, [document.documentElement,"
            " ...document.querySelectorAll('dialog, section, table')].filter("
            "node => node.scrollWidth > innerWidth || (node.checkVisibility()"
            " && node.scrollWidth > node.clientWidth + 1)).map("
            "node => [node.id, node.scrollWidth])]")))

    def multiply(self, n, wanted):
        """Make `wanted` jobs of jobs 0 to `n` - 1, quickly."""
        with contextlib.closing(sqlite3.connect(self.path("jobs.db"))) as db:
            db.execute("pragma wal_autocheckpoint = 0")
            copy = (
                "insert into job (namespace, jobid, stage, state, free,"
                " priority, entered_at, jobcmd) select namespace, jobid + ?,"
                " stage, state, free, priority, entered_at, jobcmd from job"
                " order by jobid limit ?")
            with db:
                db.execute("update tally set jobs = jobs * ?", (wanted // n,))
                while n < wanted:
                    db.execute(copy, (n, wanted - n))
                    n *= 2

    def test_many_jobs_are_shown_at_once(self):
        for stage in range(5):
            self.set_jobs({stage: "run"}, stage=2 * stage)
        self.multiply(5, 2 * 10**5)
        self.assertCounts()
        began = time.monotonic()
        self.show()
        self.see("#overall", "0 of 200,000 jobs done")
        self.see("#jobs caption", "1 to 100 of 200,000")
        self.follow("#steps", "Stage 8")
        self.see("#jobs caption", "1 to 100 of 40,000")
        self.browser.choose("#by-order", "time")
        self.see_jobs(*(4 + 5 * i for i in range(100)))
        self.assertLess(time.monotonic() - began, 15)

    # A snapshot

    def snapshot(self):
        """Open a snapshot of the jobs."""
        path = jobman.write_snapshot(
            self.folder, jobman.overview(self.store, self.namespace))
        self.browser.call("POST", "/url", url="about:blank")
        self.assertTrue(all(url.startswith((self.origin, "about:"))
                            for url in self.browser.requests()))
        self.origin = "file://" + self.folder
        self.browser.open("file://" + path)

    def test_a_snapshot_works_without_a_server_and_says_how_old_it_is(self):
        self.clock.advance(time.time() - 26 * 60 - self.clock())
        self.pipeline()
        self.expire()
        self.snapshot()
        self.see("#as-of", "snapshot of", "2", " min old")
        self.see("#percent", "20 %")
        self.see("#attention", "10 failed in align", "no space left")
        self.see("#workers", "node7-1")
        self.see("#jobs caption", "1 to 50 of")
        self.follow("#counts", "10 failed")
        self.see("#jobs caption", "1 to 10 of 10 jobs")
        self.browser.script("find('SAMPLE042')")
        self.see_jobs(42)
        self.open_job(42)
        self.see("#job", "failed in align", "align sample042.fq")
        self.assertNoActions()


# ----------------------------------------------------------- comparisons ---


class HelpTest(StoreCase):
    """The program explains its calls, tables and files by itself."""

    def text(self, *words, status=0):
        """Return what `jobman.py help` prints."""
        with contextlib.redirect_stdout(io.StringIO()) as out, \
                contextlib.redirect_stderr(out):
            try:
                found = jobman.main(["help", *words])
            except SystemExit as exit:
                found = exit.code
        self.assertEqual(status, found, out.getvalue())
        return out.getvalue()

    def calls(self):
        """Return {"GET /status": its text} for all calls."""
        found = {}
        for part in re.split(r"\n\n(?=[A-Z]+ /)", self.text("http"))[1:]:
            for line in part.splitlines():
                if line and line[0] != " ":
                    found[line.partition(" (")[0]] = part
        return found

    def assertNames(self, names, text):
        """Assert that a text has names as words."""
        words = set(re.findall(r"-?[\w-]+", text))
        self.assertLessEqual(set(names), words)

    def assertDefined(self, names, text):
        """Assert that a list in a text says what each of some names means."""
        for name in names:
            self.assertRegex(text, r"(?m)^  %s  +\S" % name)

    def test_the_server_gives_the_text_of_the_command(self):
        for topic in ([], *([name] for name in jobman.TOPICS)):
            path = "/".join(["/help", *topic])
            reply = exchange(self.address, "GET", path)
            self.assertEqual(200, reply.status)
            self.assertEqual(
                "text/plain; charset=utf-8", reply.headers["content-type"])
            self.assertEqual(self.text(*topic), reply.body.decode("ascii"))
            self.assertLess(max(map(len, reply.text.splitlines())), 80)
            self.assertLessEqual(
                set(re.findall(r"(?<!-)\bhelp ([a-z]+)", reply.text)),
                set(jobman.TOPICS))
            head = exchange(self.address, "HEAD", path)
            self.assertEqual(b"", head.body)
            self.assertEqual(
                str(len(reply.body)), head.headers["content-length"])
        self.assertDefined(jobman.TOPICS, self.text())

    def test_what_is_no_topic(self):
        for word, status, said in (
            ("run", 0, "usage: jobman.py run "),
            ("help", 0, "usage: jobman.py help "),
            ("htp", 2, "no topic or command 'htp'; did you mean http?\n"),
            ("sumbit", 2, "did you mean submit?\n"),
        ):
            self.assertIn(said, self.text(word, status=status))
        reply = self.assertReply(
            404, exchange(self.address, "GET", "/help/htp"))
        self.assertIn("only http, job, states", reply.json()["error"])
        reply = self.assertReply(404, self.call("/nothing"))
        self.assertIn("see /help/http.", reply.json()["error"])

    def test_every_call_is_explained_with_its_options(self):
        calls, optional = self.calls(), set()
        self.assertEqual(len(jobman.ROUTES), len(calls))
        for method, path, _ in jobman.ROUTES:
            call = "%s %s" % (method, path.replace("…>", ">/..."))
            self.assertIn(call, calls)
            reply = self.call(
                re.sub("<.*?>", "1", path) + "?nonsense=1",
                b"{}" if method == "POST" else None, method=method)
            if "option 'nonsense'" in reply.text:
                optional.add(path.split("/")[1])
                names = re.search(r"only (.*)\.", reply.json()["error"])[1]
                self.assertNames(names.split(", "), calls[call])
        self.assertEqual({
            "failures", "fail_job", "get", "jobs", "output", "pace",
            "reject_job", "release_job", "status", "submissions",
            "update_job"}, optional)

    def test_every_key_of_a_body_is_explained(self):
        calls = self.calls()
        for call, keys in (
            ("POST /stages", jobman.STAGE_VALUES),
            ("POST /submit", ("key", "jobs", "part")),
            ("POST /update_job/<jobid>/<stage>",
             {**jobman.RESULTS, **jobman.REPORTS}),
            ("POST /update_jobs", ("jobid", "jobstage", "claim")),
            ("POST /fail_job/<jobid>", {"note": 0, **jobman.REPORTS}),
            ("POST /release_job/<jobid>", ("note",)),
            ("POST /reject_job/<jobid>", {"files": 0, **jobman.REPORTS}),
            ("POST /heartbeat", {
                "worker": 0, "lease": 0, "claims": 0, **jobman.NEWS,
                **jobman.ABOUT_WORKER}),
            ("POST /retry", ("ids", "submission", "stage", "state", "all")),
        ):
            self.assertNames(keys, calls[call])
        self.assertDefined(jobman.CARRIES, self.text("job"))

    def keys(self, value):
        """Return the keys of an object, and of objects in it."""
        if isinstance(value, list):
            value = value[0] if value else None
        if not isinstance(value, dict):
            return set()
        return set(value).union(*map(self.keys, value.values()))

    def test_every_key_of_an_answer_is_explained(self):
        self.ok("/submit", {"key": "x", "jobs": [
            {"jobstage": 0, "max_attempts": 1}] * 2})
        self.ok("/heartbeat", {"worker": "w", "lease": 9, "claims": []})
        job = self.get(0, worker="w", lease=9)
        calls, states = self.calls(), set(jobman.STATES)
        self.assertNames(
            set(job) - set(jobman.ALSO_CLAIMED), calls["GET /get/<stages>"])
        self.assertReply(200, self.fail(job, exit_code=1))
        self.assertReply(200, self.update(self.get(0, lease=9), 2))
        for path in ("/status", "/pace", "/workers", "/failures", "/stats",
                     "/submissions", "/jobs"):
            keys = self.keys(self.ok(path)) - states
            if path == "/jobs":
                self.assertNames(("jobs", "after"), calls["GET /jobs"])
                self.assertDefined(keys - {"jobs"}, self.text("job"))
            else:
                self.assertNames(keys, calls["GET " + path])
        self.assertDefined(self.keys(self.ok("/job/1")), self.text("job"))

    def test_every_name_in_a_table_is_explained(self):
        sources = [read(path).decode() for path in (JOBMAN, WORKER)]
        metrics = exchange(self.address, "GET", "/metrics").text
        for topic, names in (
            ("states", jobman.STATES),
            ("states", (*jobman.CUT_OFF, "done", "failed", "deferred",
                        "rejected")),
            ("errors", re.findall(r"Error\(\s*(\d+)", sources[0])),
            ("metrics", re.findall(r"# TYPE (\w+)", metrics)),
            ("export", jobman.JOB_COLUMNS),
            ("export", jobman.ATTEMPT_COLUMNS),
            ("environment", re.findall(r"JOBMAN_[A-Z]+", "".join(sources))),
        ):
            self.assertGreater(len(names), 5)
            self.assertDefined(names, self.text(topic))
        self.assertNames(jobman.NETWORK_FILE_SYSTEMS, self.text("network"))


class WsgiHelpTest(HelpTest):
    """The same through WSGI."""

    front = WsgiFront


class PydocTest(TemporaryFolder):
    """`pydoc3 worker` begins with a program that works."""

    def test_the_first_example(self):
        example = re.search(
            r"\n    import worker\n.*?\n(?=\S)", worker.__doc__, re.S)[0]
        with open(self.path("squares.py"), "w") as file:
            file.write(textwrap.dedent(example))
        self.environment["PYTHONPATH"] = HERE
        self.serve()
        self.assertEqual((0, "0\n1\n4\n9\n16\n", ""),
                         self.command("squares.py"))


@slow
class CompareTest(TemporaryFolder):
    """bench/run.py measures what is there, and leaves nothing behind."""

    def rows(self, text):
        """Return {first cell: [other cells]} of the tables in a text."""
        lines = [line for line in text.splitlines() if line[:1] == "|"]
        cells = [
            [cell.strip() for cell in line[1:-1].split("|")] for line in lines
        ]
        return {found[0]: found[1:] for found in cells}

    def test_it_shows_jobman_beside_bare_sqlite(self):
        status, out, err = self.command(
            BENCH, "--quick", "--jobs", "60", "--only", "jobman", "sqlite")
        self.assertEqual(0, status, err)
        table, _, quotients = out.partition("\n\n")
        rows = self.rows(table)
        for name in ("jobman, 1 client", "jobman, 16 clients",
                     "jobman, 16, new conn.", "jobman, n=1000, 1 client",
                     "jobman, /set", "SQLite FULL", "SQLite NORMAL"):
            jobs, rate, _, sqlite, beanstalkd = rows[name]
            self.assertEqual(("60", "-"), (jobs, beanstalkd), name)
            self.assertGreater(int(rate), 0, name)
            self.assertRegex(sqlite, r"^\d+\.\d\d$", name)
            self.assertIn(name, err)
        self.assertEqual("1.00", rows["SQLite FULL"][3])
        self.assertEqual(
            ["SQLite FULL", rows["jobman, 1 client"][3], "0.4 (0.5)"],
            self.rows(quotients)["jobman, 1 client"])
        self.assertRegex(out, r"\n20.*; \d+ cores, Linux .*\nfsync of 4 KiB")
        self.assertEqual([], os.listdir(self.environment["TMPDIR"]))

    def test_it_names_what_is_not_installed(self):
        os.symlink(shutil.which("df"), self.path("df"))
        self.environment["PATH"] = self.folder
        status, out, err = self.command(
            BENCH, "--quick", "--only", "beanstalkd", "redis", "rq", "original"
        )
        self.assertEqual(0, status, err)
        self.assertIn("left out, not installed or given: --original,"
                      " beanstalkd, redis-server\n", out)

    def check_end(self, number):
        """Check what a signal leaves of a measurement with a server."""
        process = self.spawn(
            BENCH, "--only", "jobman", "--jobs", "100000",
            start_new_session=True)
        wait_for(lambda: len(self.session(process)) > 2, "server and clients")
        process.send_signal(number)
        status, _, err = self.finish(process)
        self.assertEqual(128 + number, status, err)
        wait_for(lambda: not self.session(process), "the end of the rest")
        self.assertEqual([], os.listdir(self.environment["TMPDIR"]))

    def test_all_that_it_starts_ends_with_it(self):
        self.check_end(signal.SIGINT)
        self.check_end(signal.SIGTERM)

    def session(self, process):
        """Return the processes in the session of one that leads it."""
        found = []
        for name in os.listdir("/proc"):
            if name.isdigit():
                with contextlib.suppress(OSError):
                    if os.getsid(int(name)) == process.pid:
                        found.append(int(name))
        return found


# ----------------------------------------------------------------- house ---


@slow
class ReadmeTest(TemporaryFolder):
    """What README says to type is typed, and what it shows is printed."""

    BY_OTHERS = "A server in a batch job", "Apache"  # SlurmTest, ApacheTest

    # What differs from one host or run to the next.
    VARIES = (
        (r"127\.0\.0\.1:\d+", "127.0.0.1:PORT"),
        (r"laptop-4711|%s-\d+" % re.escape(socket.gethostname()), "NAME"),
        (r"on (laptop|%s)\b" % re.escape(socket.gethostname()), "on HOST"),
        (r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d \S+", "DATE"),
        (r"\b\d+:\d\d\b", "TIME"), (r"\d+ slots?", "N slots"), (r" +", " "),
    )

    def setUp(self):
        super().setUp()
        for name in ("jobman.py", "worker.py", "dashboard.html"):
            shutil.copy(os.path.join(HERE, name), self.folder)
        bin_folder = self.make_folder()
        os.symlink(sys.executable, os.path.join(bin_folder, "python3"))
        self.environment.update(
            LC_ALL="C", PATH="%s:%s" % (bin_folder, os.environ["PATH"]))
        self.readme = read(os.path.join(HERE, "README.md")).decode("utf-8")

    def blocks(self):
        """Yield (section, language, block) for each block of the manual."""
        section = "top"
        parts = re.split(r"^```", self.readme, flags=re.M)
        for text, block in zip(parts[::2], parts[1::2]):
            section = ([section] + re.findall("^##+ (.*)$", text, re.M))[-1]
            language, _, block = block.partition("\n")
            yield section, language, block

    def typed(self, block):
        """Type a block of commands; return what is printed."""
        done = subprocess.run(
            ["/bin/sh", "-e"], input=block.encode(), cwd=self.folder,
            env=self.environment, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, timeout=2 * PATIENCE)
        said = done.stdout.decode("utf-8", "replace")
        self.assertEqual(0, done.returncode, said)
        return said

    def served(self):
        """Start a server as README does, at any port; return what it says."""
        server = self.spawn("jobman.py", "serve", "--port", "0")
        lines = jobman.ANNOUNCEMENT.splitlines()
        said = "".join(server.stdout.readline().decode() for _ in lines)
        return said.replace(self.folder, "/home/me")

    def general(self, text):
        """Return `text` with general words for what differs between runs."""
        for pattern, word in self.VARIES:
            text = re.sub(pattern, word, text)
        return text

    def test_all_that_is_typed_works_and_prints_what_is_shown(self):
        said = None
        for section, language, block in self.blocks():
            if section in self.BY_OTHERS or "test_jobman.py" in block:
                continue
            if language == "text":
                shown, more, _ = self.general(block).partition("\u2026\n")
                said = self.general(said)
                self.assertEqual(shown, said[: len(shown)] if more else said)
            elif language == "python":
                with open(self.path("program.py"), "w") as file:
                    file.write(block)
                said = self.typed("python3 program.py")
                self.assertTrue(said)
            elif block.startswith("nohup "):
                self.parsed(block[len("nohup "):].rstrip("&\n"))
            elif block.startswith("python3 jobman.py serve"):
                said = self.served()
            else:
                said = self.typed(re.sub(r"\| (sbatch|qsub)\n", "\n", block))
                if section in ("Slurm", "PBS"):
                    self.assertTrue(said.startswith("#!/bin/bash\n"), said)

    def test_every_link_leads_to_a_section_or_a_file(self):
        sections = {
            re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
            for heading in re.findall("^##+ (.*)$", self.readme, re.M)}
        for target in re.findall(r"\]\(([^)]*)\)", self.readme):
            if target.startswith("#"):
                self.assertIn(target[1:], sections)
            else:
                self.assertTrue(os.path.exists(os.path.join(HERE, target)))

    def parsed(self, line):
        """Assert that jobman takes a command line as it stands."""
        pieces = [piece for piece in line.split(" | ")
                  if piece.startswith("python3")]
        words = shlex.split(pieces[0])
        self.assertEqual(["python3", "jobman.py"], words[:2], line)
        for end in ("&&", ">", "2>/dev/null"):
            if end in words:
                words = words[: words.index(end)]
        with contextlib.redirect_stderr(io.StringIO()) as err:
            try:
                jobman.parse(words[2:])
            except SystemExit as exit:
                self.assertEqual(0, exit.code, (line, err.getvalue()))

    def test_what_comes_in_place_of_others_is_understood(self):
        cells = re.findall(
            r"`(python3 jobman\.py [a-z]+[^`]*)`",
            "".join(line for line in self.readme.splitlines(True)
                    if line.startswith("| `")))
        self.assertGreater(len(cells), 15)
        for cell in cells:
            self.parsed(cell)

    def test_every_example_of_help_is_understood(self):
        for name, _, _, text in jobman.COMMANDS:
            lines = [line.strip() for line in text.splitlines()
                     if line.startswith("  ")]
            self.assertTrue(lines, name)
            for line in lines:
                self.parsed(line)


@slow
class HouseTest(TemporaryFolder):
    """The files keep to what the project promises of them."""

    def source(self, name):
        with open(os.path.join(HERE, name), encoding="utf-8") as file:
            return file.read()

    def test_both_files_have_one_version(self):
        self.assertEqual(jobman.__version__, worker.__version__)

    def test_no_name_of_a_module_means_two_things(self):
        for name in ("jobman.py", "worker.py", "test_jobman.py"):
            names = []
            for node in ast.parse(self.source(name)).body:
                if isinstance(node, ast.Assign):
                    names += [target.id for target in node.targets
                              if isinstance(target, ast.Name)]
                elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                    names.append(node.name)
            self.assertEqual([], [
                name for name in set(names) if names.count(name) > 1])

    def test_the_clients_verbs_are_the_route_tables(self):
        verbs = {path.split("/")[1] for _, path, _ in jobman.ROUTES}
        methods = {
            name for name, method in vars(worker.Client).items()
            if callable(method) and not name.startswith("_")
        }
        machinery = {"locate", "call", "sweep", "persist", "exchange",
                     "connect", "identify", "close", "abort", "has_input",
                     "tell_once", "end_claim"}
        self.assertEqual(verbs - {"", "help"}, methods - machinery)

    def test_importing_does_nothing_and_needs_no_packages(self):
        code = ("import sys; sys.path.insert(0, %r); import jobman, worker;"
                "import threading; print(threading.active_count())" % HERE)
        done = self.command("-SB", "-c", code)
        self.assertEqual((0, "1\n", ""), done)
        self.assertEqual([], os.listdir(self.folder))

    def test_each_file_works_when_copied_alone(self):
        for name in ("jobman.py", "worker.py"):
            shutil.copy(os.path.join(HERE, name), self.folder)
            status, _, err = self.command(self.path(name), "--help")
            self.assertEqual((0, ""), (status, err))
            os.unlink(self.path(name))

    def test_code_calls_upward_only(self):
        for name in ("jobman.py", "worker.py"):
            tree = ast.parse(self.source(name))
            defined = {
                node.name: node.lineno for node in tree.body
                if isinstance(node, (ast.FunctionDef, ast.ClassDef))
            }
            functions = [
                node for node in ast.walk(tree)
                if isinstance(node, ast.FunctionDef)
            ]
            for function in functions:
                names = [
                    node for node in ast.walk(function)
                    if isinstance(node, ast.Name)
                ]
                own = {arg.arg for arg in function.args.args}
                own |= {arg.arg for arg in function.args.kwonlyargs}
                own |= {node.id for node in names
                        if isinstance(node.ctx, ast.Store)}
                own |= {node.name for node in ast.walk(function)
                        if isinstance(node, ast.FunctionDef)}
                down = {node.id for node in names if node.id not in own
                        and defined.get(node.id, 0) > function.lineno}
                self.assertEqual(set(), down, (name, function.name))

    def test_the_sources_parse_as_python_3_6(self):
        newer = sys.version_info >= (3, 8)
        as_3_6 = {"feature_version": (3, 6)} if newer else {}
        for name in ("jobman.py", "worker.py", "test_jobman.py"):
            ast.parse(self.source(name), **as_3_6)

    def test_the_readme_names_every_call_command_variable_and_state(self):
        readme = self.source("README.md")
        for method, path, _ in jobman.ROUTES:
            shown = path.replace("<stages>", "<stage>")
            shown = shown.replace("<minutes…>", "<m0>/<m1>/…/<mn>")
            shown = shown.replace("<worker…>", "<worker>")
            self.assertIn("`%s %s`" % (method, shown), readme)
        for name, *_ in jobman.COMMANDS:
            self.assertRegex(readme, r"(?m)^\| .*`%s[ `]" % name)
        for state in jobman.STATES:
            self.assertIn("| `%s` |" % state, readme)
        for name in ("jobman.py", "worker.py"):
            for variable in re.findall(r"JOBMAN_[A-Z]+", self.source(name)):
                self.assertIn("`%s`" % variable, readme)

    def test_the_readme_names_no_option_that_is_missing(self):
        _, _, text = self.source("README.md").partition("\n## Words\n")
        named = re.findall(r"(?<![\w-])--[a-z][a-z-]*", text)
        known = ["--help", "--system"]  # argparse's, and useradd's
        for name in ("jobman.py", "worker.py"):
            known += re.findall(r'"(--[a-z-]+)"', self.source(name))
        self.assertEqual(set(), set(named).difference(known))

    def test_no_sql_uses_what_sqlite_3_7_17_lacks(self):
        sql = jobman.SCHEMA + " ".join(
            text for name, text in vars(jobman.SQL).items()
            if name.isupper() and type(text) is str
        ) + jobman.WRONG_COUNTS
        for word in ("returning", "on conflict", "over (", "with ", "filter",
                     "without rowid", "strict", "iif(", "json_"):
            self.assertNotIn(word, sql)
        self.assertNotRegex(sql, r"create index[^;]* where ")


# -------------------------------------------------------------- running ---


def test_classes(speeds):
    """Return the names of the classes that are so fast, the slow ones first.
    """
    names = {speed: [] for speed in speeds}
    for name, case in globals().items():
        if isinstance(case, type) and issubclass(case, unittest.TestCase) \
                and unittest.defaultTestLoader.getTestCaseNames(case):
            names.get(getattr(case, "speed", "quick"), []).append(name)
    return [name for speed in speeds for name in names[speed]]


class ClassRun:
    """The tests of a class, run in a process of their own."""

    def __init__(self, name):
        self.name = name
        self.began = time.monotonic()
        self.log, self.report = [tempfile.TemporaryFile("w+") for _ in "12"]
        sys.stdout.flush()
        self.pid = os.fork()
        if not self.pid:
            self.run()

    def run(self):
        """Run the tests; report how many were run, failed and skipped."""
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for fd in 1, 2:
            os.dup2(self.log.fileno(), fd)
        argv = [sys.argv[0], self.name]
        result = unittest.main(argv=argv, exit=False, verbosity=2).result
        bad = len(result.failures + result.errors + result.unexpectedSuccesses)
        json.dump([result.testsRun, bad, len(result.skipped)], self.report)
        self.report.flush()
        sys.exit()

    def counts(self):
        """Return what was reported; a process that was killed failed."""
        self.report.seek(0)
        return json.loads(self.report.read() or "[0, 1, 0]")

    def line(self):
        """Return how it went, with all that was printed unless all is well.
        """
        ran, bad, skipped = self.counts()
        line = "%s: %d tests in %.1f s" % (
            self.name, ran, time.monotonic() - self.began)
        if not (bad or skipped):
            return line
        self.log.seek(0)
        return "%s, %d failed, %d skipped\n%s" % (
            line, bad, skipped, self.log.read())

    def close(self):
        self.log.close()
        self.report.close()


def run_side_by_side(names, jobs):
    """Run classes, `jobs` at a time, a line for each; return the status."""
    began, totals, waiting, running = time.monotonic(), [], names[:], {}
    while waiting or running:
        while waiting and len(running) < jobs:
            case = ClassRun(waiting.pop(0))
            running[case.pid] = case
        with contextlib.closing(running.pop(os.wait()[0])) as case:
            totals.append(case.counts())
            print("%d of %d: %s" % (len(totals), len(names), case.line()))
    ran, bad, skipped = map(sum, zip(*totals))
    print("\nRan %d tests in %.1fs\n\n%s (failures=%d, skipped=%d)" % (
        ran, time.monotonic() - began, "FAILED" if bad else "OK", bad,
        skipped))
    return int(bad > 0)


def main():
    parser = argparse.ArgumentParser(
        description="Run the tests of jobman.py and worker.py.")
    parser.add_argument("--quick", action="store_true",
                        help="only what needs few processes")
    parser.add_argument("--long", action="store_true",
                        help="also what takes minutes")
    parser.add_argument("--jobs", type=int, metavar="N",
                        default=2 * (os.cpu_count() or 1),
                        help="classes at a time (default: 2 for each core)")
    parser.add_argument("names", nargs="*", metavar="CLASS[.TEST]",
                        help="run these")
    options, others = parser.parse_known_args()
    if len(options.names) == 1 or others:
        unittest.main(argv=[sys.argv[0], *others, *options.names],
                      verbosity=2 if "CI" in os.environ else 1)
    speeds = ["slow", "quick"]
    if options.quick:
        speeds.remove("slow")
    if options.long:
        speeds.insert(0, "long")
    names = options.names or test_classes(speeds)
    sys.exit(run_side_by_side(names, options.jobs))


if __name__ == "__main__":
    main()
