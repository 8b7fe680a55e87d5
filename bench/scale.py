#!/usr/bin/env python3
"""Measure what many waiting workers, many jobs and two servers cost.

    python3 bench/scale.py

prints four tables: how much memory waiting workers take and how soon one of
them has a new job, how long answers take with a million jobs, how two server
processes share one database, and how long claims take while another client
adds a million jobs. It needs Linux, Python 3.8 or later, and as many open
files as there are waiting workers (`ulimit -n`).
"""

import argparse
import contextlib
import json
import os
import re
import resource
import select
import socket
import subprocess
import sys
import tempfile
import time

sys.dont_write_bytecode = True  # leave nothing beside the sources
HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(HERE), HERE]

import load  # noqa: E402

JOBIX = 4711
JOBMAN = os.path.join(os.path.dirname(HERE), "jobman.py")
HEARTBEAT = {"lease": 60, "claims": []}
STOCK = 100000  # jobs that are there before more are added
ADDING = """
import sys
sys.path.insert(0, %r)
import worker
url, jobix, jobs = sys.argv[1:]
worker.Client(url=url, jobix=jobix).set(
    (jobid, {"jobstage": 0, "jobcmd": %r %% jobid, "laststage": 2})
    for jobid in range(10**7, 10**7 + int(jobs)))
""" % (os.path.dirname(HERE), load.COMMAND)


def memory(pid):
    """Return the memory that a process has, in bytes."""
    with open("/proc/%d/statm" % pid) as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def row(*cells):
    """Print a row of a table."""
    print("| %-36s | %s |" % (cells[0], " | ".join(cells[1:])), flush=True)


def head(*cells):
    """Print the head of a table."""
    print()
    row(*cells)
    row("---", *["--:"] * (len(cells) - 1))


def milliseconds(times, part):
    """Return the time within which a part (0 to 1) of `times` was."""
    found = sorted(times)[min(int(part * len(times)), len(times) - 1)]
    return "%.2f ms" % (1000 * found)


class Line:
    """A connection that is kept, for one request after another."""

    def __init__(self, address):
        self.socket = socket.create_connection(address, load.PATIENCE)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def answer(self):
        """Return the answer to what was asked."""
        answer = b""
        while not load.whole_http(answer):
            answer += self.socket.recv(2**18)
        return load.accepted(answer)

    def ask(self, method, path, value=None):
        """Return an answer, and the seconds that it took."""
        body = None if value is None else json.dumps(value).encode("ascii")
        request = load.call(method, path, JOBIX, body)
        began = time.perf_counter()
        self.socket.sendall(request)
        answer = self.answer()
        return answer, time.perf_counter() - began


def timed_talk(going_on, times):
    """Claim a job and update it, over and over; note how long claims take."""
    talk = load.cycle_talk(JOBIX, iter(going_on, False), [], False)
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


class Bench:
    """Servers in a folder of their own, and their clients."""

    def __init__(self, options, folder):
        self.options, self.folder = options, folder

    def path(self, name):
        return os.path.join(self.folder, name)

    def server(self, *options):
        """Start a server; return its process and its address."""
        process = subprocess.Popen(
            [sys.executable, JOBMAN, "serve", "--open", "--port", "0", "--db",
             self.path("jobman.db"), *options],
            env=dict(os.environ, HOME=self.folder), stdout=subprocess.PIPE)
        first = process.stdout.readline().decode()
        host, port = re.search("http://(.*):([0-9]+)", first).groups()
        return process, (host, int(port))

    def end(self, process):
        """End a server, and remove its database."""
        process.terminate()
        process.communicate()
        for name in os.listdir(self.folder):
            if name.startswith("jobman.db"):
                os.remove(self.path(name))

    def measure_polls(self, n):
        """Print what `n` waiting workers cost, and how soon one is woken."""
        process, address = self.server()
        before = memory(process.pid)
        poll, lines = select.epoll(), {}
        request = load.call("GET", "/get/0?wait=60&lease=60", JOBIX)
        for _ in range(n):
            line = Line(address)
            line.socket.sendall(request)
            lines[line.socket.fileno()] = line
            poll.register(line.socket, select.EPOLLIN)
        giver = Line(address)
        giver.ask("GET", "/health")
        time.sleep(2)
        more = memory(process.pid) - before
        times = []
        for jobid in range(self.options.wakes):
            began = time.perf_counter()
            giver.ask("POST", "/set", {jobid: {"jobstage": 0}})
            ready = poll.poll(load.PATIENCE)
            lines[ready[0][0]].answer()
            times.append(time.perf_counter() - began)
            assert not poll.poll(0.002), "one job for two"
            poll.unregister(ready[0][0])
        head("%d workers in long polls" % n, "")
        row("memory for each", "%.1f KiB" % (more / n / 1024))
        row("memory of the server", "%.0f MiB" % ((before + more) / 2**20))
        row("from /set to one of them, median", milliseconds(times, 0.5))
        row("99 of 100", milliseconds(times, 0.99))
        self.end(process)

    def measure_answers(self, n):
        """Print how long answers take with `n` jobs."""
        process, address = self.server()
        load.set_jobs(address, JOBIX, n)
        line = Line(address)
        for i in range(1000):
            about = dict(HEARTBEAT, worker="node%d" % i, slots=4, busy=2)
            line.ask("POST", "/heartbeat", about)
        load.cycles(address, JOBIX, 2000, 16)
        head("%d jobs, 1,000 workers" % n, "median", "99 of 100", "bytes")
        middle = n // 2
        for path in (
            "/status", "/workers", "/jobs?limit=100",
            "/jobs?limit=100&after=%d" % middle,
            "/jobs?limit=100&stage=0&state=waiting&after=%d" % middle,
            "/jobs?limit=100&order=time&stage=0", "/get/1?lease=60",
        ):
            asked = [line.ask("GET", path) for _ in range(200)]
            times = [taken for _, taken in asked]
            row(path, milliseconds(times, 0.5), milliseconds(times, 0.99),
                "%d" % len(asked[0][0]))
        row("memory of the server", "", "",
            "%.0f MiB" % (memory(process.pid) / 2**20))
        size = sum(os.path.getsize(self.path(name))
                   for name in os.listdir(self.folder)
                   if name.startswith("jobman.db"))
        row("on disk, for each job", "", "", "%.0f" % (size / n))
        self.end(process)

    def measure_sharing(self, jobs):
        """Print how fast one server is, and two on one database."""
        head("%d jobs, 16 clients" % jobs, "a second", "shares")
        process, address = self.server()
        load.set_jobs(address, JOBIX, jobs)
        alone = jobs / load.cycles(address, JOBIX, jobs, 16)
        row("one server", "%.0f" % alone, "")
        self.end(process)
        servers = [
            self.server("--shared", "--access", self.path("%d.json" % i))
            for i in range(2)
        ]
        load.set_jobs(servers[0][1], JOBIX, jobs)
        left, done = iter(range(jobs)), ([], [])
        taken = load.carry([
            load.Line(address, load.cycle_talk(JOBIX, left, mine, False),
                      load.whole_http, False)
            for (_, address), mine in zip(servers * 8, done * 8)
        ])
        shares = sorted(map(len, done))
        assert sum(shares) == jobs == len(set(done[0] + done[1]))
        row("two servers, 8 clients each", "%.0f" % (jobs / taken),
            "1 : %.2f" % (shares[1] / max(1, shares[0])))
        row("two by one", "%.2f" % (jobs / taken / alone), "")
        for process, _ in servers:
            self.end(process)

    def measure_adding(self, jobs):
        """Print how long claims take, alone and while jobs are added."""
        process, address = self.server()
        load.set_jobs(address, JOBIX, STOCK)
        head("claims of 8 clients", "a second", "median", "99 of 100",
             "longest")
        end = time.monotonic() + 5
        self.measure_claims("alone", address, lambda: time.monotonic() < end)
        began = time.monotonic()
        adding = subprocess.Popen([
            sys.executable, "-c", ADDING, "http://%s:%d" % address,
            str(JOBIX), str(jobs)])
        self.measure_claims("while jobs are added", address,
                            lambda: adding.poll() is None)
        taken = time.monotonic() - began
        assert adding.returncode == 0
        head("%d jobs in one call" % jobs, "")
        row("added a second", "%.0f" % (jobs / taken))
        row("memory of the server", "%.0f MiB" % (
            memory(process.pid) / 2**20))
        self.end(process)

    def measure_claims(self, what, address, going_on):
        """Print how long claims take."""
        times = []
        taken = load.carry([
            load.Line(address, timed_talk(going_on, times), load.whole_http,
                      False) for _ in range(8)])
        row(what, "%.0f" % (len(times) / taken), *(
            milliseconds(times, part) for part in (0.5, 0.99, 1)))


def main():
    """Run the measurement."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--polls", type=int, default=10000)
    add("--wakes", type=int, default=500, help="jobs for waiting workers")
    add("--jobs", type=int, default=10**6)
    add("--cycles", type=int, default=6000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="jobman-scale-") as folder, \
            contextlib.suppress(KeyboardInterrupt):
        bench = Bench(options, folder)
        bench.measure_polls(options.polls)
        bench.measure_answers(options.jobs)
        bench.measure_sharing(options.cycles)
        bench.measure_adding(options.jobs)


if __name__ == "__main__":
    main()
