"""The clients, and the small servers, that run.py measures with.

Each runs in a process of its own, started by run.py as

    python3 bench/load.py FILE

where FILE is JSON: the name of one of PARTS and what it takes. A part that
measures prints its seconds, last of all. Those for RQ and huey need a Python
that has these packages; the others need nothing. Linux.
"""

import http.server
import itertools
import json
import os
import re
import select
import signal
import socket
import socketserver
import sqlite3
import sys
import threading
import time
import zlib

PATIENCE = 60  # seconds without any answer
BATCH = 1000  # jobs in one claim, and in one /update_jobs
CHUNK = 50000  # jobs in one /set, and in one transaction
PIPELINED = 100  # puts that are sent at once
COMMAND = "./simulate --seed %d"  # what a job carries

JOBID = re.compile(rb'"jobid": ?(\d+)')
CLAIM = re.compile(rb'"claim": ?"([^"]+)"')
LENGTH = re.compile(rb"content-length: *(\d+)", re.I)


class Failed(Exception):
    """Say what answer was not the one to expect."""


# --------------------------------------------------------------- clients ---
# A talk is a generator: it yields a request and is sent the answer. All
# talks of a part run in one thread, so that clients cost little.


class Line:
    """Carry a talk over a connection that is kept, or over many."""

    def __init__(self, address, talk, whole, fresh):
        self.address = address
        self.talk = talk
        self.whole = whole  # tells whether an answer is complete
        self.fresh = fresh  # a new connection for each request
        self.socket = None
        self.answer = b""

    def connect(self):
        """Open the connection, unless it is there."""
        if self.socket is None:
            self.socket = socket.create_connection(self.address, PATIENCE)
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def close(self):
        """Close the connection, if there is one."""
        if self.socket is not None:
            self.socket.close()
            self.socket = None

    def ask(self, answer=None):
        """Send the next request; return False when the talk is over."""
        try:
            request = self.talk.send(answer)
        except StopIteration:
            self.close()
            return False
        self.connect()
        self.socket.sendall(request)
        return True

    def receive(self):
        """Read what is there; return the answer once it is complete."""
        data = self.socket.recv(2**18)
        answer = self.answer = self.answer + data if self.answer else data
        if not data and not (answer and self.fresh):
            raise Failed("the server closed a connection")
        if data and not self.whole(answer):
            return None
        self.answer = b""
        if self.fresh:
            self.close()
        return answer


def drive(address, talks, whole, fresh=False):
    """Lead all talks to their end; return the seconds that they took."""
    return carry([Line(address, talk, whole, fresh) for talk in talks], fresh)


def carry(lines, fresh=False):
    """Lead the talks of all lines to their end; return what drive does."""
    if not fresh:
        for line in lines:
            line.connect()
    poll, waiting = select.epoll(), {}

    def watch(line):
        waiting[line.socket.fileno()] = line
        poll.register(line.socket, select.EPOLLIN)

    began = time.monotonic()
    for line in lines:
        if line.ask():
            watch(line)
    while waiting:
        ready = poll.poll(PATIENCE)
        if not ready:
            raise Failed("no answer for %d s" % PATIENCE)
        for number, _ in ready:
            line = waiting[number]
            answer = line.receive()
            if answer is None:
                continue
            going_on = line.ask(answer)
            if fresh or not going_on:
                del waiting[number]
            if fresh and going_on:
                watch(line)
    return time.monotonic() - began


# ------------------------------------------------------------------ HTTP ---


def whole_http(answer):
    """Tell whether an HTTP answer is complete."""
    end = answer.find(b"\r\n\r\n")
    if end < 0:
        return False
    length = LENGTH.search(answer, 0, end)
    return bool(length) and len(answer) >= end + 4 + int(length.group(1))


def call(method, path, jobix=0, body=None, host="127.0.0.1", fresh=False):
    """Return the bytes of a request."""
    head = "%s %s HTTP/1.1\r\nHost: %s\r\njobix: %d\r\n" % (
        method, path, host, jobix
    )
    if fresh:
        head += "Connection: close\r\n"
    if body is not None:
        head += "Content-Length: %d\r\n" % len(body)
    return head.encode("ascii") + b"\r\n" + (body or b"")


def accepted(answer):
    """Return the answer to an HTTP request, if it is 200."""
    if answer[9:12] != b"200":
        raise Failed(answer[:1000].decode("utf-8", "replace"))
    return answer


def chunks(first, jobs, entry):
    """Yield bodies of /set for `jobs` jobs with the ids from `first` on."""
    for start in range(first, first + jobs, CHUNK):
        ids = range(start, min(start + CHUNK, first + jobs))
        found = {
            str(jobid): dict(entry, jobcmd=COMMAND % jobid) for jobid in ids
        }
        yield zlib.compress(json.dumps(found).encode("ascii"), 1)


def set_talk(host, path, jobix, bodies, fresh):
    """Add jobs by /set, a chunk after the other."""
    for body in bodies:
        accepted((yield call("POST", path, jobix, body, host, fresh)))


def set_jobs(address, jobix, jobs, path="/set", first=1, laststage=2,
             fresh=False):
    """Add jobs; return the seconds from compressed bytes to the answer."""
    entry = {"jobstage": 0}
    if laststage is not None:
        entry["laststage"] = laststage
    bodies = list(chunks(first, jobs, entry))
    talk = set_talk(address[0], path, jobix, bodies, fresh)
    return drive(address, [talk], whole_http, fresh)


def cycle_talk(jobix, left, done, fresh):
    """Claim a job and update it, over and over."""
    claim = call("GET", "/get/0?lease=600", jobix, fresh=fresh)
    update = "/update_job/%s/2?claim=%s"
    for _ in left:
        answer = accepted((yield claim))
        found = JOBID.search(answer)
        if found is None:
            raise Failed("no job left")
        done.append(found.group(1))
        names = (found.group(1), CLAIM.search(answer).group(1))
        path = update % tuple(name.decode("ascii") for name in names)
        accepted((yield call("GET", path, jobix, fresh=fresh)))


def cycles(address, jobix, jobs, clients, fresh=False):
    """Take `jobs` jobs through claim and update, one at a time."""
    left, done = iter(range(jobs)), []
    talks = [cycle_talk(jobix, left, done, fresh) for _ in range(clients)]
    taken = drive(address, talks, whole_http, fresh)
    if len(set(done)) != jobs:
        raise Failed("%d hand-outs of %d jobs" % (jobs, len(set(done))))
    return taken


def batch_talk(jobix, left):
    """Claim many jobs and update them, over and over."""
    for n in left:
        path = "/get/0?lease=600&n=%d" % n
        answer = accepted((yield call("GET", path, jobix)))
        claimed = json.loads(answer[answer.index(b"\r\n\r\n"):])
        if len(claimed) != n:
            raise Failed("%d jobs instead of %d" % (len(claimed), n))
        updates = [
            {"jobid": job["jobid"], "jobstage": 2, "claim": job["claim"]}
            for job in claimed
        ]
        body = zlib.compress(json.dumps(updates).encode("ascii"), 1)
        answer = accepted((yield call("POST", "/update_jobs", jobix, body)))
        if answer.count(b'"status": 200') + answer.count(b'"status":200') != n:
            raise Failed("an update was refused")


def batches(address, jobix, jobs, clients):
    """Take `jobs` jobs through claim and update, many at a time."""
    left = iter([
        min(BATCH, jobs - start) for start in range(0, jobs, BATCH)
    ])
    talks = [batch_talk(jobix, left) for _ in range(clients)]
    return drive(address, talks, whole_http)


def original_talk(host, path, jobix, done):
    """Claim and update by the original's protocol until nothing is left."""
    claim = call("GET", path + "/get/0", jobix, None, host, fresh=True)
    while True:
        answer = accepted((yield claim))
        found = JOBID.search(answer)
        if found is None:
            return
        done.append(found.group(1))
        update = "%s/update_job/%d/2" % (path, int(found.group(1)))
        accepted((yield call("GET", update, jobix, None, host, fresh=True)))


def original(address, path, jobix, jobs, clients):
    """Add jobs by the original's protocol, and empty its queue."""
    first, done = int(time.time() * 1000), []
    set_jobs(address, jobix, jobs, path + "/set", first, None, fresh=True)
    talks = [
        original_talk(address[0], path, jobix, done) for _ in range(clients)
    ]
    taken = drive(address, talks, whole_http, fresh=True)
    if len(done) != jobs:
        print("%d hand-outs of %d jobs" % (len(done), jobs), file=sys.stderr)
    return taken


def request_talk(request, left):
    """Send the same request twice, over and over."""
    for _ in left:
        accepted((yield request))
        accepted((yield request))


def requests(address, jobs, clients, fresh=False):
    """Send two requests for each of `jobs`."""
    left = iter(range(jobs))
    request = call("GET", "/", fresh=fresh)
    talks = [request_talk(request, left) for _ in range(clients)]
    return drive(address, talks, whole_http, fresh)


class Stock(http.server.BaseHTTPRequestHandler):
    """Answer each request with two bytes, and do nothing else."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1  # one write for each answer

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"ok")

    def log_message(self, *_):
        """Write nothing: a log would cost more than the answer."""


class StockServer(socketserver.ThreadingMixIn, http.server.HTTPServer):
    """The standard library's server, with room for new connections."""

    daemon_threads = True
    request_queue_size = 1024


def serve_http(address):
    """Serve until a signal comes."""
    StockServer(tuple(address), Stock).serve_forever()


# ---------------------------------------------------------------- SQLite ---

TABLE = """
create table job (
    jobid integer primary key, stage integer not null, since real, jobcmd text
);
create index queue on job (stage, jobid);
"""
FIRST = "select jobid from job where stage = 0 order by jobid limit 1"
MOVE = "update job set stage = :stage, since = :now where jobid = :jobid"
ADD = "insert into job values (:jobid, 0, :now, :jobcmd)"


def lean(database, synchronous):
    """Return a connection to a new database with one table."""
    connection = sqlite3.connect(database, isolation_level=None)
    connection.execute("pragma journal_mode = wal")
    connection.execute("pragma synchronous = %s" % synchronous)
    connection.executescript(TABLE)
    return connection


def insert(connection, jobs):
    """Add jobs, a transaction for each chunk; return the seconds."""
    rows = [
        {"jobid": jobid, "now": time.time(), "jobcmd": COMMAND % jobid}
        for jobid in range(jobs)
    ]
    began = time.monotonic()
    for start in range(0, jobs, CHUNK):
        connection.execute("begin immediate")
        connection.executemany(ADD, rows[start:start + CHUNK])
        connection.execute("commit")
    return time.monotonic() - began


def sqlite_insert(database, synchronous, jobs):
    """Add rows that are ready in memory."""
    return insert(lean(database, synchronous), jobs)


def sqlite_cycles(database, synchronous, jobs, waiting=0):
    """Move jobs by two transactions each, as a claim and an update."""
    connection = lean(database, synchronous)
    insert(connection, max(jobs, waiting))
    connection.execute("pragma wal_checkpoint(truncate)")
    os.sync()
    run = connection.execute
    began = time.monotonic()
    for _ in range(jobs):
        run("begin immediate")
        jobid = run(FIRST).fetchone()[0]
        run(MOVE, {"jobid": jobid, "stage": 1, "now": time.time()})
        run("commit")
        run("begin immediate")
        run(MOVE, {"jobid": jobid, "stage": 2, "now": time.time()})
        run("commit")
    return time.monotonic() - began


# ------------------------------------------------------------ beanstalkd ---


def whole_beanstalkd(answer):
    """Tell whether an answer of beanstalkd is complete."""
    lines = 2 if answer.startswith(b"RESERVED") else 1
    return answer.endswith(b"\n") and answer.count(b"\r\n") == lines


def whole_puts(answer):
    """Tell whether so many puts are answered as are sent at once."""
    return answer.endswith(b"\n") and answer.count(b"\r\n") == PIPELINED


def put_talk(left, at_once):
    """Put jobs, `at_once` before the answers are read."""
    body = b"%s" % (COMMAND % 1).encode("ascii")
    request = b"put 0 0 600 %d\r\n%s\r\n" % (len(body), body)
    for _ in left:
        answer = yield request * at_once
        if answer.count(b"INSERTED") != at_once:
            raise Failed(answer.decode("ascii", "replace"))


def beanstalkd_puts(address, jobs, clients=1, at_once=1):
    """Put jobs; return the seconds."""
    left = iter(range(-(-jobs // at_once)))
    talks = [put_talk(left, at_once) for _ in range(clients)]
    whole = whole_beanstalkd if at_once == 1 else whole_puts
    return drive(address, talks, whole)


def reserve_talk(left):
    """Reserve a job and delete it, over and over."""
    for _ in left:
        answer = yield b"reserve\r\n"
        if not answer.startswith(b"RESERVED"):
            raise Failed(answer.decode("ascii", "replace"))
        answer = yield b"delete %s\r\n" % answer.split()[1]
        if answer != b"DELETED\r\n":
            raise Failed(answer.decode("ascii", "replace"))


def beanstalkd_cycles(address, jobs, clients):
    """Put jobs, then reserve and delete each of them."""
    beanstalkd_puts(address, jobs, at_once=PIPELINED)
    os.sync()
    left = iter(range(jobs))
    talks = [reserve_talk(left) for _ in range(clients)]
    return drive(address, talks, whole_beanstalkd)


# ----------------------------------------------------------------- redis ---


def whole_redis(answer):
    """Tell whether an answer of redis is complete."""
    lines = 2 if answer[:1] == b"$" and answer[:2] != b"$-" else 1
    return answer.endswith(b"\n") and answer.count(b"\r\n") == lines


def resp(*words):
    """Return a command as redis takes it."""
    parts = [b"*%d\r\n" % len(words)]
    parts += [b"$%d\r\n%s\r\n" % (len(word), word) for word in words]
    return b"".join(parts)


def push_talk(jobs):
    """Push jobs, many with one command."""
    for start in range(0, jobs, BATCH):
        ids = range(start, min(start + BATCH, jobs))
        words = [(COMMAND % number).encode("ascii") for number in ids]
        yield resp(b"LPUSH", b"waiting", *words)


def list_talk(left):
    """Move a job to another list and take it out there, over and over."""
    claim = resp(b"RPOPLPUSH", b"waiting", b"working")
    for _ in left:
        answer = yield claim
        if answer[:1] != b"$" or answer[:2] == b"$-":
            raise Failed(answer.decode("ascii", "replace"))
        job = answer.split(b"\r\n")[1]
        answer = yield resp(b"LREM", b"working", b"1", job)
        if answer != b":1\r\n":
            raise Failed(answer.decode("ascii", "replace"))


def redis_cycles(address, jobs, clients):
    """Push jobs, then move each of them twice."""
    drive(address, [push_talk(jobs)], whole_redis)
    os.sync()
    left = iter(range(jobs))
    talks = [list_talk(left) for _ in range(clients)]
    return drive(address, talks, whole_redis)


def rq_worker(address, jobs, forks):
    """Enqueue jobs; run one RQ worker until the queue is empty."""
    import redis
    import rq

    connection = redis.Redis(address[0], address[1])
    queue = rq.Queue("bench", connection=connection)
    for start in range(0, jobs, BATCH):
        count = min(BATCH, jobs - start)
        queue.enqueue_many([rq.Queue.prepare_data("time.time")] * count)
    kind = rq.Worker if forks else rq.SimpleWorker
    worker = kind([queue], connection=connection)
    began = time.monotonic()
    worker.work(burst=True, logging_level="ERROR")
    taken = time.monotonic() - began
    if queue.finished_job_registry.count != jobs:
        raise Failed("RQ: not all jobs are finished")
    return taken


# ------------------------------------------------------------------ huey ---


def huey_consumer(database, jobs, fsync):
    """Enqueue jobs; run a consumer with one thread until all have run."""
    import huey

    queue = huey.SqliteHuey(filename=database, fsync=fsync)
    numbers, ended = itertools.count(1), threading.Event()

    @queue.task()
    def work(_):
        if next(numbers) == jobs:
            ended.set()

    for number in range(jobs):
        work(COMMAND % number)
    os.sync()
    consumer = queue.create_consumer(workers=1, periodic=False)
    began = time.monotonic()
    consumer.start()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)  # it only takes note of them
    if not ended.wait(10 * PATIENCE):
        raise Failed("huey: not all jobs have run")
    taken = time.monotonic() - began
    consumer.stop(graceful=True)
    return taken


# ------------------------------------------------------------------ main ---

PARTS = {
    part.__name__: part for part in (
        set_jobs, cycles, batches, original, requests, serve_http,
        sqlite_insert, sqlite_cycles, beanstalkd_puts, beanstalkd_cycles,
        redis_cycles, rq_worker, huey_consumer,
    )
}


def main(path):
    """Run the part that a file names; print its seconds, if any."""
    with open(path) as file:
        given = json.load(file)
    if "address" in given:
        given["address"] = tuple(given["address"])
    taken = PARTS[given.pop("part")](**given)
    if taken is not None:
        print("\n%f" % taken, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
