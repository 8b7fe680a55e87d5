#!/usr/bin/env python3
"""Test jobman: real servers, real sockets, real workers, real databases.

    python3 test_jobman.py                 all tests
    python3 test_jobman.py ContractTest    one class

Only the clock is passed in, so that leases and lifetimes need no sleep.
"""

import ast
import base64
import contextlib
import gzip
import http.client
import json
import os
import random
import re
import shutil
import signal
import socket
import socketserver
import sqlite3
import stat
import subprocess
import sys
import tempfile
import threading
import time
import unittest
import wsgiref.simple_server
import wsgiref.validate
import zlib

import jobman
import worker

HERE = os.path.dirname(os.path.abspath(__file__))
JOBMAN = os.path.join(HERE, "jobman.py")
WORKER = os.path.join(HERE, "worker.py")
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


def exchange(address, method, path, body=None, headers=()):
    """Make one request on a connection of its own; return the Reply."""
    connection = http.client.HTTPConnection(*address, timeout=PATIENCE)
    with contextlib.closing(connection):
        connection.request(method, path, body, dict(headers))
        return Reply(connection.getresponse())


def packed(value):
    """Return `value` as existing clients send it: zlib of JSON."""
    return zlib.compress(json.dumps(value).encode("utf-8"))


LEGACY = {"Content-Type": "application/json", "content-encoding": "gzip"}


class TemporaryFolder(unittest.TestCase):
    """A test with a folder of its own and processes that end with it."""

    def setUp(self):
        self.folder = tempfile.mkdtemp(prefix="jobman-test-")
        self.addCleanup(shutil.rmtree, self.folder, ignore_errors=True)
        self.environment = dict(os.environ, HOME=self.folder)
        for name in list(self.environment):
            if name.startswith("JOBMAN_"):
                del self.environment[name]

    def path(self, *names):
        return os.path.join(self.folder, *names)

    def spawn(self, *argv, **options):
        """Start a process that is killed when the test ends."""
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

    def command(self, *argv, given=None, **options):
        """Run a command to its end; return (exit status, stdout, stderr)."""
        if given is not None:
            options["stdin"] = subprocess.PIPE
        return self.finish(self.spawn(*argv, **options), given)

    def serve(self, *argv, port=0):
        """Start `jobman.py serve`; return (process, address) when it's up."""
        process = self.spawn(JOBMAN, "serve", "--port", str(port), *argv)
        line = process.stdout.readline().decode()
        found = re.search(r"http://([\d.]+):(\d+)", line)
        if not found:
            self.fail("no server: %r %r" % (line, process.stderr.read()))
        return process, (found.group(1), int(found.group(2)))


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


class ThreadedWsgiServer(
    socketserver.ThreadingMixIn, wsgiref.simple_server.WSGIServer
):
    """The standard library's WSGI server, a thread for each request."""

    daemon_threads = True
    request_queue_size = 100

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
            ThreadedWsgiServer, QuietWsgiHandler,
        )
        self.address = self.server.server_address
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()
        self.store.close()


class StoreCase(TemporaryFolder):
    """A Store behind a front door, on a clock moved by hand."""

    front = SocketFront
    jobix = 4711

    def setUp(self):
        super().setUp()
        self.clock = Clock()
        self.open()

    def open(self):
        self.store = jobman.Store(self.path("jobs.db"), clock=self.clock)
        self.door = self.front(self.store)
        self.address = self.door.address
        self.closing = contextlib.ExitStack()
        self.closing.callback(self.door.close)
        self.addCleanup(self.closing.close)

    def restart(self):
        self.closing.close()
        self.open()

    def call(self, path, body=None, *, method=None, jobix=None, **headers):
        method = method or ("GET" if body is None else "POST")
        headers["jobix"] = str(self.jobix if jobix is None else jobix)
        return exchange(self.address, method, path, body, headers)

    def post(self, path, value, **options):
        return self.call(path, packed(value), **options)

    def ok(self, path, value=None, **options):
        """Return the JSON value of a call that succeeds."""
        if value is None:
            reply = self.call(path, **options)
        else:
            reply = self.post(path, value, **options)
        self.assertEqual(200, reply.status, reply.text)
        return reply.json()

    def assertReply(self, status, reply):
        self.assertEqual(status, reply.status, reply.text)
        if status >= 400:
            self.assertEqual(["error"], list(reply.json()))
        return reply

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

    def fail(self, job_or_message, **report):
        if not isinstance(job_or_message, dict):
            super().fail(job_or_message)
        path = "/fail_job/%(jobid)d?claim=%(claim)s" % job_or_message
        return self.post(path, report)

    def release(self, job):
        path = "/release_job/%(jobid)d?claim=%(claim)s" % job
        return self.post(path, {})

    def states(self, jobix=None):
        """Return {(stage, state): jobs}, as /status counts them, having

        checked that the counts are those of the table.
        """
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

    def assertCounts(self):
        """Assert that the kept counts are those of the table."""
        with contextlib.closing(sqlite3.connect(self.path("jobs.db"))) as db:
            kept = db.execute(
                "select jobix, stage, state, jobs, expired from tally"
                " where jobs or expired order by 1, 2, 3"
            ).fetchall()
            real = db.execute(
                "select jobix, stage, state, count(*), sum(expired) from job"
                " group by 1, 2, 3 order by 1, 2, 3"
            ).fetchall()
            free = db.execute(
                "select count(*) from job where free != (state in"
                " ('waiting', 'done') or (state = 'working' and"
                " lease is null))"
            ).fetchone()
        self.assertEqual(real, kept)
        self.assertEqual((0,), free)

    def attempts(self, *columns):
        """Return the rows of the table of attempts, in order."""
        with contextlib.closing(sqlite3.connect(self.path("jobs.db"))) as db:
            chosen = ", ".join(columns)
            return db.execute(
                "select %s from attempt order by row" % chosen
            ).fetchall()


class ContractTest(StoreCase):
    """Part 1: what existing clients send and expect."""

    def test_greeting_names_the_program_and_its_version(self):
        reply = exchange(self.address, "GET", "/")
        self.assertEqual(200, reply.status)
        self.assertIn("jobman " + jobman.__version__, reply.text)
        self.assertTrue(reply.headers["content-type"].startswith("text/plain"))

    def test_a_browser_gets_the_dashboard_at_the_root(self):
        reply = exchange(
            self.address, "GET", "/", headers={"Accept": "text/html,*/*"}
        )
        self.assertIn("<html", reply.text)

    def test_every_call_but_the_public_ones_needs_a_jobix(self):
        for method, pattern, endpoint in jobman.ROUTES:
            path = re.sub("<[^>]*>", "1", pattern)
            body = b"{}" if method == "POST" else None
            status = 200 if endpoint in jobman.PUBLIC else 403
            for headers in ({}, {"jobix": "x"}, {"jobix": ""}):
                reply = exchange(self.address, method, path, body, headers)
                self.assertEqual(status, reply.status, path)

    def test_jobix_is_an_integer_of_63_bits(self):
        for good in ("0", "00", " 7 ", str(2**63 - 1)):
            reply = exchange(
                self.address, "GET", "/init", headers={"jobix": good}
            )
            self.assertReply(200, reply)
        bad = ("-1", "1.0", "1e3", str(2**63), "9" * 30, "٣", "1 2", "1,1")
        for text in bad:
            reply = exchange(
                self.address, "GET", "/init",
                headers={"jobix": text.encode("utf-8")},
            )
            self.assertReply(403, reply)

    def test_header_names_come_in_any_case(self):
        for name in ("jobix", "Jobix", "JOBIX"):
            reply = exchange(self.address, "GET", "/init", headers={name: "7"})
            self.assertReply(200, reply)

    def test_init_sets_lifetimes_only_where_there_are_none(self):
        self.assertEqual({}, self.ok("/init"))
        self.assertEqual({"0": 5, "1": 0}, self.ok("/init/5/0"))
        self.assertEqual({"0": 5, "1": 0}, self.ok("/init/9/9/9"))
        self.assertEqual({"0": 5, "1": 0}, self.ok("/init"))
        self.assertEqual({}, self.ok("/init", jobix=1))

    def test_init_sets_nothing_where_one_lifetime_is_set(self):
        self.ok("/lifetime/3/7")
        self.assertEqual({"3": 7}, self.ok("/init/1/2"))

    def test_set_accepts_every_habit_of_encoding(self):
        entry = {"jobstage": 0, "jobcmd": "é"}
        text = json.dumps({"1": entry}, ensure_ascii=False).encode("utf-8")
        for body in (text, zlib.compress(text), gzip.compress(text)):
            for headers in ({}, LEGACY):
                jobix = random.randrange(2**62)
                reply = self.call("/set", body, jobix=jobix, **headers)
                self.assertReply(200, reply)
                self.assertEqual("Accepted to %d!" % jobix, reply.text)
                job = self.ok("/get/0", jobix=jobix)
                self.assertEqual("é", job["jobcmd"])

    def test_set_leaves_existing_jobs_as_they_are(self):
        self.set_jobs({1: "first"})
        self.set_jobs({1: "second", 2: "new"}, stage=5)
        self.assertEqual("first", self.get(0)["jobcmd"])
        self.assertEqual(2, self.get(5)["jobid"])
        self.assertEqual({(1, "working"): 1, (6, "working"): 1}, self.states())

    def test_set_is_all_or_nothing(self):
        bad = (
            {"2": {}}, {"2": {"jobstage": "0"}}, {"2": {"jobstage": -1}},
            {"2": {"jobstage": 1.0}}, {"2": {"jobstage": True}},
            {"2": {"jobstage": 10**6 + 1}}, {"2": []}, {"2": None},
            {"x": {"jobstage": 0}}, {"-1": {"jobstage": 0}},
            {"": {"jobstage": 0}}, {str(2**53): {"jobstage": 0}},
            {"1.0": {"jobstage": 0}}, {"01": {"jobstage": 0}},
            {"2": {"jobstage": 0, "laststage": "9"}},
            {"2": {"jobstage": 0, "priority": 2**31}},
            {"2": {"jobstage": 0, "max_attempts": 0}},
            {"2": {"jobstage": 0, "timeout": 0}},
            {"2": {"jobstage": 0, "timeout": "1"}},
            {"2": {"jobstage": 0, "outputs": "a"}},
            {"2": {"jobstage": 0, "outputs": ["a", 1]}},
            {"2": {"jobstage": 0, "cwd": 1}},
            {"2": {"jobstage": 0, "filename": 1}},
        )
        for entries in bad:
            jobs = dict({"1": {"jobstage": 0}}, **entries)
            self.assertReply(400, self.post("/set", jobs))
        self.assertEqual({}, self.states())

    def test_set_names_a_key_that_a_job_cannot_carry(self):
        reply = self.post("/set", {"1": {"jobstage": 0, "colour": 1}})
        self.assertIn("colour", self.assertReply(400, reply).text)

    def test_a_broken_body_is_refused_and_changes_nothing(self):
        whole = packed({"1": {"jobstage": 0}})
        bad = (
            b"", b"{", b"[]", b"7", b"null", b'"x"', whole[:-1], whole + b"x",
            whole[:5], b"\x1f\x8b", b"\xff\xfe", b'{"1": {"jobstage": NaN}}',
            b'{"1": {"jobstage": 0, "jobcmd": 1e999}}', b"[" * 100000,
            b'{"1": {"jobstage": 0, "jobcmd": "\xff"}}',
        )
        for body in bad[1:]:
            self.assertReply(400, self.call("/set", body))
        self.assertEqual({}, self.states())

    def test_a_body_that_inflates_beyond_the_bound_is_refused(self):
        bomb = zlib.compress(b" " * (jobman.MAX_BODY + 1))
        self.assertReply(413, self.call("/set", bomb))

    def test_a_jobcmd_is_any_json_and_may_be_missing(self):
        values = (
            "text", ["a", 1, None], {"k": {"l": []}}, 3.5, 0, True, None, "",
            "\ud800 \udcff \x00 é 😀", 2**70,
        )
        self.set_jobs(dict(enumerate(values)))
        self.post("/set", {"100": {"jobstage": 0}})
        for value in values:
            self.assertEqual(value, self.get(0)["jobcmd"])
        self.assertIsNone(self.get(0)["jobcmd"])

    def test_a_claim_moves_the_job_one_stage_up(self):
        self.set_jobs({17: "align"})
        job = self.get(0)
        self.assertEqual(
            {"jobid": 17, "jobcmd": "align", "jobstage": 0, "jobix": 4711,
             "filename": None, "attempt": 1, "claim": job["claim"]}, job,
        )
        self.assertRegex(job["claim"], r"\A[A-Za-z0-9_-]+\Z")
        self.assertEqual("nada", self.get(0))
        self.assertEqual({(1, "working"): 1}, self.states())

    def test_a_claim_can_name_the_stage_that_it_moves_to(self):
        self.set_jobs([1])
        self.assertEqual(1, self.get("0/7")["jobid"])
        self.assertEqual({(7, "working"): 1}, self.states())

    def test_a_claim_without_lease_is_free_in_its_new_stage(self):
        self.set_jobs([1])
        first = self.get("0/7")
        second = self.get(7)
        self.assertEqual(first["jobid"], second["jobid"])
        self.assertEqual((7, 1), (second["jobstage"], second["attempt"]))
        self.assertReply(409, self.update(first, 9))
        self.assertReply(200, self.update(second, 9))

    def test_stages_have_no_parity(self):
        self.set_jobs([1], stage=1)
        self.assertEqual(1, self.get(1)["jobid"])
        self.assertEqual({(2, "working"): 1}, self.states())

    def test_done_jobs_are_free_as_in_the_original(self):
        self.set_jobs([1], stage=2, laststage=2)
        self.assertEqual({(2, "done"): 1}, self.states())
        self.assertEqual(1, self.get(2)["jobid"])

    def test_higher_priority_goes_first_then_the_lower_id(self):
        self.set_jobs([5, 4])
        self.set_jobs([7, 6], priority=1)
        self.set_jobs([3], priority=-1)
        order = [self.get(0)["jobid"] for _ in range(5)]
        self.assertEqual([6, 7, 4, 5, 3], order)

    def test_update_sets_the_stage(self):
        self.set_jobs([8])
        self.get(0)
        reply = self.call("/update_job/8/2")
        self.assertReply(200, reply)
        self.assertEqual(
            "Success, job 8 was updated to stage 2!", reply.text
        )
        self.assertEqual({(2, "waiting"): 1}, self.states())

    def test_update_takes_a_job_that_nobody_claimed(self):
        self.set_jobs([8])
        self.assertReply(200, self.call("/update_job/8/0"))
        self.assertReply(200, self.call("/update_job/8/4"))
        self.assertEqual({(4, "waiting"): 1}, self.states())

    def test_update_brings_filename_and_jobcmd(self):
        self.set_jobs({1: "old"})
        steps = (
            ({"filename": "a.dat"}, "a.dat", "old"),
            ({}, "a.dat", "old"),
            ({"filename": None, "jobcmd": None}, "a.dat", "old"),
            ({"jobcmd": ["new"]}, "a.dat", ["new"]),
            ({"filename": "", "jobcmd": 0}, "", 0),
            ({"filename": "\udcff/\ud800"}, "\udcff/\ud800", 0),
        )
        for given, filename, jobcmd in steps:
            reply = self.post("/update_job/1/2", given, **LEGACY)
            self.assertReply(200, reply)
            job = self.get(2)
            self.assertEqual(filename, job["filename"])
            self.assertEqual(jobcmd, job["jobcmd"])

    def test_update_of_a_job_that_does_not_exist_is_404(self):
        self.set_jobs([1])
        self.assertReply(404, self.call("/update_job/2/2"))
        self.assertReply(404, self.post("/update_job/2/2", {}))
        self.assertReply(404, self.call("/update_job/1/2", jobix=1))
        self.assertEqual({(0, "waiting"): 1}, self.states())

    def test_a_bad_update_changes_nothing(self):
        self.set_jobs([1])
        for given in ([], 7, {"filename": 7}, {"filename": ["x"]}):
            self.assertReply(400, self.post("/update_job/1/2", given))
        self.assertEqual({(0, "waiting"): 1}, self.states())

    FINE = "Are all simulations within time frame?"
    MOVED = "n_bad_jobs were degraded:"

    def test_check_stages_flags_what_is_too_long_in_its_stage(self):
        self.ok("/init/10/5")
        self.set_jobs([1, 2])
        self.get(0)
        self.assertEqual({self.FINE: 1}, self.ok("/check_stages"))
        self.clock.advance(5 * 60)
        self.assertEqual({self.FINE: 1}, self.ok("/check_stages"))
        self.clock.advance(1)
        self.assertEqual({self.FINE: 0}, self.ok("/check_stages"))
        self.assertEqual(1, self.ok("/status")["totals"]["expired"])
        self.assertEqual({self.FINE: 1}, self.ok("/check_stages", jobix=1))

    def test_a_job_without_lifetime_does_not_make_the_answer_true(self):
        self.ok("/lifetime/0/1")
        self.set_jobs([1])
        self.set_jobs([2], stage=8)
        self.clock.advance(61)
        self.assertEqual({self.FINE: 0}, self.ok("/check_stages"))

    def test_a_lifetime_of_0_is_no_limit(self):
        self.ok("/init/0/0")
        self.set_jobs([1])
        self.clock.advance(10**9)
        self.assertEqual({self.FINE: 1}, self.ok("/check_stages"))

    def test_check_stages_moves_the_flagged_jobs_of_one_stage(self):
        self.ok("/init/1/1/1/1")
        self.set_jobs([1, 2])
        self.set_jobs([3], stage=2)
        self.clock.advance(50)
        self.get(0)
        self.clock.advance(11)
        answer = self.ok("/check_stages/2/0")
        self.assertEqual({self.FINE: 0, self.MOVED: 1}, answer)
        self.assertEqual(
            {(0, "waiting"): 2, (1, "working"): 1}, self.states()
        )
        self.assertEqual(
            {self.FINE: 1, self.MOVED: 0}, self.ok("/check_stages/2/0")
        )
        answer = self.ok("/check_stages/0/5")  # stage 0 is like any other
        self.assertEqual({self.FINE: 0, self.MOVED: 1}, answer)
        self.assertEqual(0, self.ok("/status")["totals"]["expired"])
        self.assertEqual({self.FINE: 1}, self.ok("/check_stages"))

    def test_a_job_moved_by_check_stages_is_fenced_and_fresh(self):
        self.ok("/init/0/1/0")
        self.set_jobs([1])
        job = self.get(0, lease=1000)
        self.clock.advance(61)
        self.assertEqual(
            {self.FINE: 0, self.MOVED: 1}, self.ok("/check_stages/1/0")
        )
        self.assertReply(409, self.update(job, 2))
        self.assertEqual(1, self.get(0)["attempt"])
        self.assertEqual([("expired",)], self.attempts("outcome"))

    def test_check_stages_does_not_bring_back_what_has_failed(self):
        self.ok("/lifetime/0/1")
        self.set_jobs([1], max_attempts=1)
        self.fail(self.get(0))
        self.clock.advance(61)
        answer = self.ok("/check_stages/0/2")
        self.assertEqual({self.FINE: 0, self.MOVED: 0}, answer)
        self.assertEqual({(0, "failed"): 1}, self.states())

    def test_every_move_clears_the_flag(self):
        self.ok("/lifetime/0/1")
        self.set_jobs([1, 2])
        self.clock.advance(61)
        self.ok("/check_stages")
        self.get(0)
        self.call("/update_job/2/0")
        self.assertEqual({self.FINE: 1}, self.ok("/check_stages"))
        self.assertCounts()

    def test_a_longer_lifetime_clears_the_flags_that_it_covers(self):
        self.ok("/lifetime/0/1")
        self.set_jobs([1])
        self.clock.advance(61)
        self.assertEqual({self.FINE: 0}, self.ok("/check_stages"))
        self.ok("/lifetime/0/2")
        self.assertEqual({self.FINE: 1}, self.ok("/check_stages"))
        self.clock.advance(60)
        self.assertEqual({self.FINE: 0}, self.ok("/check_stages"))
        self.ok("/lifetime/0/0")
        self.assertEqual({self.FINE: 1}, self.ok("/check_stages"))
        self.assertCounts()

    def test_the_page_shows_nothing_of_a_job_without_a_jobix(self):
        self.set_jobs({1: "secret-command"}, stage=77)
        for path in ("/get", "/get?plain=0", "/lifetime", "/"):
            reply = exchange(
                self.address, "GET", path, headers={"Accept": "text/html"}
            )
            self.assertEqual(200, reply.status)
            self.assertNotIn("77", reply.text)
        reply = self.call("/get")
        self.assertEqual(200, reply.status)
        self.assertIn("<td>77</td>", reply.text)

    def test_the_plain_page_takes_the_jobix_as_password(self):
        self.set_jobs([1], stage=77)
        reply = exchange(self.address, "GET", "/get?plain=1")
        self.assertEqual(401, reply.status)
        login = base64.b64encode(b"anybody:4711").decode()
        headers = {"Authorization": "Basic " + login}
        reply = exchange(self.address, "GET", "/get?plain=1", headers=headers)
        self.assertIn("<td>77</td>", reply.text)
        for path in ("/status", "/get/77", "/check_stages"):
            reply = exchange(self.address, "GET", path, headers=headers)
            self.assertReply(403, reply)

    def test_lifetimes_are_numbers_and_a_page(self):
        self.assertEqual(0, self.ok("/lifetime/3"))
        self.assertEqual(15, self.ok("/lifetime/3/15"))
        self.assertEqual(16, self.ok("/lifetime/3/16"))
        self.assertEqual(16, self.ok("/lifetime/3"))
        self.assertEqual(0, self.ok("/lifetime/3", jobix=1))
        self.assertIn("<td>16</td>", self.call("/lifetime").text)

    def test_numbers_out_of_range_are_400(self):
        paths = (
            "/get/1000001", "/get/-1", "/get/x", "/get/1.0", "/get/%D9%A3",
            "/get/0/1000001", "/update_job/-1/0", "/update_job/x/0",
            "/update_job/9007199254740992/0", "/update_job/1/1000001",
            "/check_stages/0/1000001", "/check_stages/x/0",
            "/lifetime/1000001", "/lifetime/0/1000000001", "/lifetime/0/-1",
            "/init/1000000001", "/init/1/x", "/init/1//2",
            "/get/0?n=0", "/get/0?n=x", "/get/0?wait=-1", "/get/0?wait=nan",
            "/get/0?lease=0", "/get/0?lease=x", "/get/0?colour=1",
            "/get/0?n=1&n=1", "/get/0?worker=", "/update_job/1/0?claim=",
            "/update_job/1/0?claim=a%20b", "/get/0?worker=" + "x" * 256,
        )
        for path in paths:
            self.assertReply(400, self.call(path))

    def test_the_ends_of_the_ranges_work(self):
        self.set_jobs([0, 2**53 - 1], stage=10**6 - 1)
        self.assertEqual(0, self.get(10**6 - 1)["jobid"])
        self.assertEqual(2**53 - 1, self.get(10**6 - 1)["jobid"])
        self.assertReply(200, self.call("/update_job/0/1000000"))
        self.assertEqual(10**9, self.ok("/lifetime/1000000/1000000000"))
        self.assertEqual("nada", self.ok("/get/0", jobix=2**63 - 1))
        self.assertReply(400, self.call("/get/1000000"))

    def test_one_id_serves_any_number_of_jobix(self):
        for jobix in (0, 1, 2**63 - 1):
            self.post("/set", {"5": {"jobstage": 0, "jobcmd": jobix}},
                      jobix=jobix)
        for jobix in (0, 1, 2**63 - 1):
            job = self.ok("/get/0", jobix=jobix)
            self.assertEqual((jobix, jobix), (job["jobcmd"], job["jobix"]))
            self.assertEqual("nada", self.ok("/get/0", jobix=jobix))

    def test_unknown_addresses_and_methods(self):
        for path in ("/x", "/get/0/1/2", "/set/1", "/update_job/1", "/get/",
                     "/init/"):
            status = 400 if path in ("/get/", "/init/") else 404
            self.assertReply(status, self.call(path))
        reply = self.assertReply(405, self.call("/set"))
        self.assertEqual("POST", reply.headers["allow"])
        reply = self.assertReply(405, self.call("/get/0", b"", method="POST"))
        self.assertEqual("GET", reply.headers["allow"])
        reply = self.call("/update_job/1/1", b"", method="PUT")
        self.assertEqual("GET, POST", reply.headers["allow"])
        self.assertEqual(405, self.call("/get/0", method="HEAD").status)

    def test_a_client_of_part_1_drives_a_pipeline_of_two_stages(self):
        self.ok("/init/10/10/10/10/0")
        self.assertReply(200, self.call(
            "/set", packed({str(i): {"jobstage": 0, "jobcmd": "sim %d" % i}
                            for i in range(20)}), **LEGACY))
        for stage in (0, 2):
            while True:
                job = self.ok("/get/%d" % stage)
                if job == "nada":
                    break
                result = {"filename": "%d-%d.out" % (job["jobid"], stage)}
                reply = self.call(
                    "/update_job/%d/%d" % (job["jobid"], stage + 2),
                    packed(result), **LEGACY)
                self.assertIn("Success", reply.text)
                if stage == 2:
                    name = "%d-0.out" % job["jobid"]
                    self.assertEqual(name, job["filename"])
        self.assertEqual({(4, "done"): 20}, self.states())


class WsgiContractTest(ContractTest):
    """The same through the WSGI door, its conduct validated."""

    front = WsgiFront


if __name__ == "__main__":
    unittest.main(verbosity=2 if "CI" in os.environ else 1)
