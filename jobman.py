#!/usr/bin/env python3
"""Hand out jobs to any number of workers, each job to one worker at a time.

jobman is a job manager for machines where nothing can be installed: this
file is the server and the command line, worker.py beside it runs the jobs.

    python3 jobman.py serve                       the server
    python3 jobman.py run 'COMMAND {}' ::: ITEM ...  a whole run in one command
    python3 jobman.py sbatch --nodes 4 --time 8h     workers for Slurm; or pbs

What there is to see is at the server's /get, a page that is dashboard.html.

It needs Python 3.6 or later and SQLite 3.7.17 or later, nothing else.
A request goes this way: front door, answer, endpoint, Store, Writer.
The manual is README.md.
"""

import signal

if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # no import's traceback

import argparse
import atexit
import base64
import contextlib
import csv
import email.utils
import errno
import fcntl
import functools
import gc
import glob
import hashlib
import html
import http.client
import http.server
import importlib
import io
import ipaddress
import itertools
import json
import math
import operator
import os
import re
import resource
import secrets
import select
import shlex
import shutil
import socket
import socketserver
import sqlite3
import stat
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import traceback
import types
import warnings
import zlib
from collections import Counter, OrderedDict, defaultdict, deque
from concurrent.futures import Future, ThreadPoolExecutor
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

__version__ = "0.1.0"

MAX_JOBIX = 2**63 - 1
MAX_JOBID = 2**53 - 1
MAX_STAGE = 1000000
MAX_MINUTES = 10**9
MAX_SECONDS = 10**9
MAX_WAIT = 60  # seconds that a long poll may last
MAX_CLAIMS = 10000  # jobs in one claim; more are clipped
MAX_PAGE = 1000  # jobs in one answer of /jobs; more are clipped
MAX_HEAD = 2**16  # bytes of a request's line and headers
MAX_HEADERS = 100
MAX_BODY = 64 * 2**20  # bytes of a request's body, before and after inflating
MAX_VALUES = 4000000  # brackets and commas in a body: they take memory
MAX_JOBS = 250000  # in one request
MAX_DEPTH = 200  # of nested lists and objects in a jobcmd
MAX_CONNECTIONS = 20000
FILES_KEPT = 100  # of those that a process may open, not for connections
THREADS_KEPT = 50  # of those that it may start, not for connections
LARGE_BODY = 2**14  # bytes from which a body counts as large
LARGE_BODIES = 4  # requests with one that are handled at a time
WRONG_JOBIX_PAUSE = 0.2  # seconds until a wrong jobix is refused
MAX_NAME = 255  # characters of a worker's name or a submission's key
MAX_REPORT = 4096  # characters kept of an attempt's error and stderr
MAX_ATTEMPTS = 3  # failures in a stage before a job is failed
MAX_LAPSES = 5  # lapsed leases in a stage before a job is failed


# ---------------------------------------------------------------- errors ---


class Error(Exception):
    """Refuse a request with an HTTP status and one sentence."""

    def __init__(self, status, message, **headers):
        super().__init__(message)
        self.status = status
        self.headers = {
            name.replace("_", "-"): value for name, value in headers.items()
        }


class Trouble(Exception):
    """End a command with one sentence to its user and exit status 1."""


class Unavailable(Error):
    """Say that the server can't answer now but may soon: status 503."""

    def __init__(self, reason):
        message = "The server can't do that now (%s); try again." % reason
        super().__init__(503, message, Retry_After="1")
        self.reason = reason


def cause(error):
    """Return what went wrong: the system's words alone, where it has some."""
    return getattr(error, "strerror", None) or error


def printable(text):
    """Return `text` with what could draw on a terminal as escapes."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def say(line):
    """Write a line for a person, on standard error."""
    print(line, file=sys.stderr, flush=True)


# ---------------------------------------------------------- JSON and zlib ---


ENCODER = json.JSONEncoder(allow_nan=False)


def to_json(value):
    """Return `value` as ASCII JSON text; lone surrogates stay as escapes.

    Raises Error 400 for an infinite number.
    """
    try:
        return ENCODER.encode(value)
    except (ValueError, RecursionError):
        raise Error(400, "A number or a nesting is too large.") from None


def refuse_constant(name):
    """Refuse NaN and Infinity, which Python reads but JSON doesn't have."""
    raise ValueError("%s is not JSON" % name)


def read_integer(text):
    """Read an integer of JSON, where Python has no bound of its own.

    Long ones would take quadratic time; the bound is that of Python 3.11.
    """
    if len(text) > 4300:
        raise ValueError("an integer is too long")
    return int(text)


def unique(pairs):
    """Return the object of a JSON text, whose keys stand there once each."""
    value = dict(pairs)
    if len(value) != len(pairs):
        raise Error(400, "A key stands twice in an object.")
    return value


DECODER = json.JSONDecoder(
    parse_int=None if hasattr(sys, "get_int_max_str_digits") else read_integer,
    parse_constant=refuse_constant, object_pairs_hook=unique,
)


def from_json(text):
    """Return the value of JSON `text`; raise Error 400 when it has none."""
    try:
        return DECODER.decode(text)
    except (ValueError, RecursionError):
        raise Error(400, "The body is not JSON.") from None


def inflate(body):
    """Return `body` inflated; raise Error 413 before it grows too large."""
    inflater = zlib.decompressobj(wbits=47)  # zlib or gzip, by its header
    try:
        plain = inflater.decompress(body, MAX_BODY)
    except zlib.error:
        raise Error(400, "The body is not intact zlib data.") from None
    if inflater.unconsumed_tail:
        raise Error(413, "The body inflates to over %d bytes." % MAX_BODY)
    if not inflater.eof or inflater.unused_data.strip(b"\0"):
        raise Error(400, "The body is not intact zlib data.")
    return plain


def is_zipped(body):
    """Return whether `body` is zlib data or gzip data.

    The bytes decide, not the headers: existing clients send zlib data and
    call it gzip. RFC 1950 and RFC 1952 give the first bytes of each.
    """
    return body[:2] == b"\x1f\x8b" or (
        len(body) > 1
        and body[0] & 15 == 8
        and (body[0] * 256 + body[1]) % 31 == 0
    )


def unpack(body):
    """Return the JSON value in `body`: zlib data, gzip data or plain text."""
    if is_zipped(body):
        body = inflate(body)
    if sum(map(body.count, b",[{")) > MAX_VALUES:
        raise Error(413, "The body has over %d values." % MAX_VALUES)
    try:
        return from_json(body.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise Error(400, "The body is not UTF-8.") from None


# ------------------------------------------------------- schema and SQL ---

APPLICATION_ID = 0x6A6F626D  # "jobm", in the database's header
SCHEMA_VERSION = 1

# All text that came as JSON and isn't computed with (jobcmd, filename, files,
# cwd, outputs) is kept as JSON text: so every string survives as it came.
SCHEMA = """
create table setting (name text primary key, value);

create table pipeline (jobix integer primary key, laststage integer not null);

create table lifetime (
    jobix integer not null, stage integer not null, minutes integer not null,
    primary key (jobix, stage));

create table job (
    row integer primary key,
    jobix integer not null,
    jobid integer not null,
    stage integer not null,
    state text not null,
    free integer not null,             -- 1: the next claim may have it,
                                       -- else by its state: see lane()
    priority integer not null,
    expired integer not null default 0,  -- 1: over its stage's lifetime
    since real not null,               -- when it came into its stage
    due real,                          -- when its lease or delay ends
    lease real,                        -- seconds; null: claimed without
    origin integer,                    -- stage of its latest claim
    held integer,                      -- stage that this claim moved it to
    claim text,                        -- token that may still end an attempt
    worker text,
    attempt integer not null default 0,   -- these three since the job came
    failures integer not null default 0,  -- into the stage that it is
    lapses integer not null default 0,    -- claimed from
    rejects integer not null default 0,   -- since it was added or retried
    made integer,                      -- stage whose claim made its files
    jobcmd text,
    filename text,
    files text,
    laststage integer,
    max_attempts integer,
    timeout real,
    cwd text,
    outputs text,
    missing integer not null default 0,   -- of those it waits for, not done
    followed integer not null default 0,  -- 1: others wait for it
    blame integer,                     -- jobid by whose end it is aborted
    unique (jobix, jobid));
create index job_queue on job (jobix, stage, free, priority desc, jobid);
create index job_due on job (due);

create table attempt (
    row integer primary key,
    job integer not null,              -- job.row
    claim text not null,
    attempt integer not null,
    stage integer not null,            -- claimed from
    target integer,                    -- stage that its update moved it to
    worker text,
    host text,                         -- where it ended badly
    started real not null,
    ended real not null,
    outcome text not null,
    exit_code integer,
    error text,
    stderr text,
    jobcmd text,                       -- these four: what the job had,
    filename text,                     -- where the attempt's update
    files text,                        -- replaced it; null: it didn't
    made integer);
create index attempt_job on attempt (job);

create table tally (
    jobix integer not null, stage integer not null, state text not null,
    jobs integer not null, expired integer not null,
    primary key (jobix, stage, state));

create table pace (
    jobix integer not null, minute integer not null,
    done integer not null,             -- jobs that became done
    updates integer not null default 0,  -- attempts that did, of any stage
    primary key (jobix, minute));

create table submission (
    jobix integer not null, key text not null,
    first integer not null, jobs integer not null,
    primary key (jobix, key));

create table runtime (                 -- of attempts that ended as done
    jobix integer not null, stage integer not null, bucket integer not null,
    attempts integer not null,
    primary key (jobix, stage, bucket));

create table worker (
    jobix integer not null, name text not null, host text, stages text,
    slots integer, busy integer, done integer, failed integer,
    heard real not null,               -- when its last heartbeat came
    quarantine text,                   -- why it takes no more work
    drain integer not null default 0,  -- 1: it should claim no more
    primary key (jobix, name));
create index worker_heard on worker (jobix, heard);

create table paused (
    jobix integer not null, stage integer not null,
    primary key (jobix, stage));

create table dependency (              -- job.row of two: the child waits
    parent integer not null, child integer not null,
    known integer not null);           -- to the child: see known_end()
create index dependency_parent on dependency (parent, known);
create index dependency_child on dependency (child, known);

create table unsettled (               -- job.row whose children don't know yet
    parent integer primary key);

create table effort (                  -- sums of attempts by their outcome,
    jobix integer not null, stage integer not null,
    kind text not null,                -- of claims, their waits, and idle time
    attempts integer not null, seconds real not null,
    primary key (jobix, stage, kind));

create table waited (                  -- of claims: how long their jobs waited
    jobix integer not null, stage integer not null, bucket integer not null,
    claims integer not null,
    primary key (jobix, stage, bucket));

create table forgotten (               -- the highest jobid that was forgotten
    jobix integer primary key, jobid integer not null);

-- beside each group of jobs in one state, those longest in their stage first
create index job_age on job (jobix, stage, state, expired, since, jobid);
"""


TOGETHER = ["jobid%d" % i for i in range(20)]  # jobs read by one statement


class SQL:
    """Every statement that runs on an open database, a line on each."""

    # the jobix that this database's server made, and one to read with
    SETTING = "select value from setting where name = :name"
    KEEP_SETTING = "insert or ignore into setting values (:name, :value)"

    # what a move needs to know of a job; `final` is its last stage
    MOVABLE = """
        select row, jobix, jobid, stage, state, expired, since, due, lease,
            origin, held, claim, worker, attempt, failures, lapses, rejects,
            missing, followed, blame, max_attempts, coalesce(laststage, (
                select laststage from pipeline
                where pipeline.jobix = job.jobix)) as final
        from job """
    JOB = MOVABLE + "where jobix = :jobix and jobid = :jobid"
    # as many at once; SQLite would look through a whole jobix in job_age
    THESE = """indexed by sqlite_autoindex_job_1
        where jobix = :jobix and jobid in (:%s)""" % ", :".join(TOGETHER)
    JOBS = MOVABLE + THESE
    BY_ROW = MOVABLE + "where row = :row"
    # one range of the index job_due; SQLite 3.7.17 walks over the nulls
    DUE = """
        select jobix, jobid from job
        where due > 0 and due <= :now order by due limit :limit"""
    NEXT_DUE = "select min(due) from job where due > 0"
    # what a stage has: a few ranges of job_age, one for each state
    IN_STAGE = """
        where jobix = :jobix and stage = :stage and state in ('waiting',
            'delayed', 'blocked', 'working', 'done', 'failed', 'cancelled',
            'aborted') """
    # SQLite 3.7.17 would walk over the whole stage instead
    EXPIRED = MOVABLE + "indexed by job_age" + IN_STAGE + "and expired = 1"
    # one range of job_age
    GROUP = """
        select jobid from job where jobix = :jobix and stage = :stage
        and state = :state"""
    # one look-up in job_queue at any number of jobs
    FREE = """
        select row, jobix, jobid, stage, state, expired, since, origin, claim,
            worker, attempt, failures, lapses, rejects, missing, followed,
            priority, laststage, max_attempts, timeout, made, jobcmd,
            filename, files, cwd, outputs
        from job
        where jobix = :jobix and stage = :stage and free = 1
        and not exists (select 1 from paused
            where jobix = :jobix and stage = :stage)
        order by priority desc, jobid limit :limit"""
    ANY_FREE = """
        select 1 from job where jobix = :jobix and stage = :stage
        and free = 1 and not exists (select 1 from paused
            where jobix = :jobix and stage = :stage) limit 1000"""

    # the one way in which a job moves: nobody else has moved it meanwhile
    MOVE = """
        update job set stage = :stage, state = :state, free = :free,
            expired = 0, since = :since, due = :due, lease = :lease,
            origin = :origin, held = :held, claim = :claim,
            worker = :worker, attempt = :attempt, failures = :failures,
            lapses = :lapses, rejects = :rejects, blame = :blame
        where row = :row and stage = :old_stage and state = :old_state
            and claim is :old_claim"""
    LIMIT_ATTEMPTS = """
        update job set max_attempts = :attempts
        where jobix = :jobix and jobid = :jobid"""
    # the claim is still the one that is being renewed
    RENEW = """
        update job set due = :due, lease = :lease, free = :free
        where row = :row and claim = :claim and state = 'working'"""
    # at a server's start: an outage costs no lease
    RENEW_ALL = """
        update job set due = :now + lease
        where due > 0 and state = 'working'"""

    LAST_JOBID = """
        select max(
            coalesce((select max(jobid) from job where jobix = :jobix), 0),
            coalesce((select jobid from forgotten where jobix = :jobix), 0))
        """
    # an existing job is left as it is; what comes after: see for_rows()
    ADD = """
        insert or ignore into job (jobix, jobid, stage, state, free,
            priority, since, jobcmd, filename, laststage, max_attempts,
            timeout, cwd, outputs)
        select jobix, jobid, jobstage, state, free, priority, since, jobcmd,
            filename, laststage, max_attempts, timeout, cwd, outputs from"""
    # a child waits for those that there are
    FOLLOW = """
        insert into dependency
        select row, :child, case when state = 'done' then 1
            when state in ('failed', 'cancelled', 'aborted') then 2 else 0 end
        from job """ + THESE
    FOLLOWED = """
        update job set followed = 1 where followed = 0 and row in (
            select row from job """ + THESE + ")"
    # one range of dependency_child for each
    MISSING = """
        update job set missing = (select count(*) from dependency
            where child = job.row and known in (0, 2))
        where row = :row"""
    CULPRIT = """
        select jobid from job where row = (
            select parent from dependency
            where child = :row and known = 2 limit 1)"""
    UNSETTLE = "insert or ignore into unsettled values (:row)"
    UNSETTLED = "select parent as row from unsettled limit 1"
    SETTLED = "delete from unsettled where parent = :row"
    # those that know otherwise: two ranges of dependency_parent
    CHILDREN = """
        select rowid as place, child as row, known from dependency
        where parent = :parent and known in (:other, :another)
        limit :limit"""
    KNOW = "update dependency set known = :known where rowid = :place"
    MISS = "update job set missing = missing + :more where row = :row"
    WAITED_FOR = """
        select jobid from dependency cross join job on job.row = parent
        where child = :row and known in (0, 2) limit :limit"""

    # a job is forgotten, once all who waited for it know that it is done
    FORGET = "delete from job where row = :row"
    FORGET_ATTEMPTS = "delete from attempt where job = :row"
    FORGET_PARENTS = "delete from dependency where child = :row"
    FORGET_CHILDREN = "delete from dependency where parent = :row"
    WAITED_ON = """
        select 1 from dependency where parent = :row and known in (0, 2)
        limit 1"""
    FORGOTTEN = """
        insert or replace into forgotten select :jobix, max(:jobid, coalesce(
            (select jobid from forgotten where jobix = :jobix), 0))"""

    SUBMISSION = """
        select first, jobs from submission
        where jobix = :jobix and key = :key"""
    KEEP_SUBMISSION = """
        insert into submission values (:jobix, :key, :first, :jobs)"""

    # written once, when an attempt ends and before its job moves …
    END_ATTEMPT = """
        insert into attempt (job, claim, attempt, stage, target, worker,
            host, started, ended, outcome, exit_code, error, stderr)
        values (:row, :claim, :attempt, :origin, :target, :worker,
            case when :outcome != 'done' then (select host from worker
                where jobix = :jobix and name = :worker) end,
            :since, :now, :outcome, :exit_code, :error, :stderr)"""
    # … and once more when it had lapsed and ended after all
    MEND_ATTEMPT = """
        update attempt set target = :target, ended = :now,
            outcome = :outcome, exit_code = :exit_code, error = :error,
            stderr = :stderr
        where job = :row and claim = :claim"""
    # what its update is about to replace is kept, an empty one as text, for
    # null says that it stays …
    KEEP = """
        update attempt set
            jobcmd = case when :new_jobcmd then (
                select coalesce(jobcmd, 'null') from job
                where row = :row) end,
            filename = case when :new_filename then (
                select coalesce(filename, 'null') from job
                where row = :row) end,
            files = case when :new_files then (
                select coalesce(files, '[]') from job where row = :row) end,
            made = case when :new_files then (
                select made from job where row = :row) end
        where job = :row and claim = :claim"""
    # … and replaced, where it isn't null
    REPLACE = """
        update job set jobcmd = coalesce(:jobcmd, jobcmd),
            filename = coalesce(:filename, filename),
            made = case when :files is null then made else origin end,
            files = coalesce(:files, files)
        where row = :row"""
    LAPSED = """
        select ended - started as seconds from attempt
        where job = :row and claim = :claim and outcome = 'lapsed'"""
    ATTEMPT = """
        select outcome, target from attempt
        where job = :row and claim = :claim"""

    # what a job that goes back has of an earlier stage
    FILES = "select files, made from job where row = :row"
    # the newest attempt in which that stage was done
    DONE_ATTEMPT = """
        select max(row) from attempt
        where job = :row and stage = :stage and outcome = 'done'"""
    # what it was given is what it, or the next one that did, replaced; files
    # that were made in its stage were not given to it
    RESTORE = """
        update job set
            jobcmd = nullif(coalesce((
                select jobcmd from attempt where job = :row
                and row >= :first and jobcmd is not null
                order by row limit 1), jobcmd), 'null'),
            filename = nullif(coalesce((
                select filename from attempt where job = :row
                and row >= :first and filename is not null
                order by row limit 1), filename), 'null'),
            files = nullif(coalesce(
                (select files from attempt where row = :first),
                case when made = :stage then null else files end), '[]'),
            made = coalesce(
                (select made from attempt where row = :first),
                case when made = :stage then null else made end)
        where row = :row"""

    WORKER = """
        select heard, slots, busy, stages from worker
        where jobix = :jobix and name = :name"""
    # one row for each name, the newest it said
    HEARD = """
        update worker set host = :host, stages = :stages, slots = :slots,
            busy = :busy, done = :done, failed = :failed, heard = :heard,
            quarantine = :quarantine
        where jobix = :jobix and name = :name"""
    HEARD_FIRST = """
        insert into worker (jobix, name, host, stages, slots, busy,
            done, failed, heard, quarantine)
        values (:jobix, :name, :host, :stages, :slots, :busy, :done, :failed,
            :heard, :quarantine)"""
    # one that takes no more work stays, for somebody to look at it
    ENDED = """
        delete from worker where jobix = :jobix and name = :name
        and quarantine is null"""
    # one range of worker_heard
    WORKERS = """
        select name, host, stages, slots, busy, done, failed, heard,
            quarantine, drain
        from worker where jobix = :jobix and heard >= :since
        order by heard desc, name"""
    DRAIN = """
        update worker set drain = :drain
        where jobix = :jobix and name = :name"""
    DRAINED = """
        select 1 from worker
        where jobix = :jobix and name = :name and drain = 1"""

    PAUSE = "insert or ignore into paused values (:jobix, :stage)"
    RESUME = "delete from paused where jobix = :jobix and stage = :stage"
    PAUSED = "select stage from paused where jobix = :jobix order by stage"

    # what is shown of a job
    SHOWN_JOB = """
        select row, jobid, stage, state, expired, since, due, worker, attempt,
            failures, lapses, rejects, jobcmd, filename, files, made,
            laststage, priority, max_attempts, timeout, cwd, outputs,
            missing as waits, blame as aborted_by
        from job where jobix = :jobix and jobid = :jobid"""
    ATTEMPTS = """
        select attempt, stage, target, worker, host, started, ended, outcome,
            exit_code, error, stderr
        from attempt where job = :row order by row desc limit :limit"""

    # the ids of a page of jobs: of all …
    PAGE = """
        select jobid from job where jobix = :jobix and jobid > :after
        order by jobid limit :limit"""
    # … of a group, in a lane, of one priority: one range of job_queue …
    NEXT_PRIORITY = """
        select max(priority) from job where jobix = :jobix
        and stage = :stage and free = :lane and priority < :priority"""
    GROUP_PAGE = """
        select jobid from job where jobix = :jobix and stage = :stage
        and free = :lane and priority = :priority and jobid > :after
        and state = :state order by jobid limit :limit"""
    # … of the rest, where there are too many priorities: they are sorted …
    REST_PAGE = """
        select jobid from job indexed by job_queue where jobix = :jobix
        and stage = :stage and free = :lane and priority <= :priority
        and jobid > :after and state = :state order by jobid limit :limit"""
    # … of the expired of a group, which are sorted …
    EXPIRED_PAGE = """
        select jobid from job indexed by job_age where jobix = :jobix
        and stage = :stage and state = :state and expired = 1
        and jobid > :after order by jobid limit :limit"""
    # … and by time in their stage: one range of job_age, then another
    SAME_AGE = """
        select since, jobid from job where jobix = :jobix
        and stage = :stage and state = :state and expired = :expired
        and since = :since and jobid > :after
        order by jobid limit :limit"""
    YOUNGER = """
        select since, jobid from job where jobix = :jobix
        and stage = :stage and state = :state and expired = :expired
        and since > :since order by since, jobid limit :limit"""

    # those of a group that came into their state of late: one range of job_age
    LATEST = """
        select since, jobid from job where jobix = :jobix
        and stage = :stage and state = :state and expired = :expired
        order by since desc, jobid desc limit :limit"""
    # the end of a job's last attempt
    LAST_END = """
        select jobid, job.stage, exit_code, substr(error, -1000) as error,
            substr(stderr, -1000) as stderr, attempt.worker, host
        from job left join attempt on attempt.row = (
            select max(row) from attempt where job = job.row)
        where jobix = :jobix and jobid = :jobid"""

    # a job with its last attempt
    LAST_ATTEMPT = """
        select jobid, job.jobcmd, error, stderr
        from job left join attempt on attempt.job = job.row
        where jobix = :jobix and jobid = :jobid
        order by attempt.row desc limit 1"""

    COUNT = """
        update tally set jobs = jobs + :jobs, expired = expired + :expired
        where jobix = :jobix and stage = :stage and state = :state"""
    COUNT_FIRST = """
        insert into tally values (:jobix, :stage, :state, :jobs, :expired)"""
    TALLY = """
        select stage, state, jobs, expired from tally
        where jobix = :jobix and jobs > 0 order by stage, state"""
    PACE = """
        update pace set done = done + :done, updates = updates + :updates
        where jobix = :jobix and minute = :minute"""
    PACE_FIRST = "insert into pace values (:jobix, :minute, :done, :updates)"
    # one range of the primary key
    PACES = """
        select minute / :step as point, sum(done) as done,
            sum(updates) as updates
        from pace where jobix = :jobix and minute >= :minute group by 1"""
    FIRST_MINUTE = "select min(minute) from pace where jobix = :jobix"
    TIMED = """
        update runtime set attempts = attempts + :n
        where jobix = :jobix and stage = :stage and bucket = :bucket"""
    TIMED_FIRST = """
        insert into runtime values (:jobix, :stage, :bucket, :n)"""
    # one range of the primary key, at most 161 rows for each stage
    RUN_TIMES = """
        select stage, bucket, attempts from runtime where jobix = :jobix
        order by stage, bucket"""
    WAITED = """
        update waited set claims = claims + :n
        where jobix = :jobix and stage = :stage and bucket = :bucket"""
    WAITED_FIRST = """
        insert into waited values (:jobix, :stage, :bucket, :n)"""
    WAIT_TIMES = """
        select stage, bucket, claims from waited where jobix = :jobix
        order by stage, bucket"""
    SPENT = """
        update effort set attempts = attempts + :attempts,
            seconds = seconds + :seconds
        where jobix = :jobix and stage = :stage and kind = :kind"""
    SPENT_FIRST = """
        insert into effort
        values (:jobix, :stage, :kind, :attempts, :seconds)"""
    EFFORTS = """
        select stage, kind, attempts, seconds from effort
        where jobix = :jobix"""
    # of all jobix, whose groups are few
    ALL_JOBS = """
        select stage, state, sum(jobs) as jobs, sum(expired) as expired
        from tally group by stage, state having sum(jobs) > 0"""
    ALL_EFFORTS = """
        select stage, kind, sum(attempts) as attempts, sum(seconds) as seconds
        from effort group by stage, kind"""
    ALL_RUN_TIMES = """
        select stage, bucket, sum(attempts) from runtime
        group by stage, bucket order by stage, bucket"""
    ALL_WAIT_TIMES = """
        select stage, bucket, sum(claims) from waited
        group by stage, bucket order by stage, bucket"""
    ALL_WORKERS = """
        select count(*) as workers, coalesce(sum(slots), 0) as slots,
            coalesce(sum(busy), 0) as busy from worker where heard >= :since"""
    DONE_SINCE = """
        select coalesce(sum(done), 0) from pace
        where jobix = :jobix and minute >= :minute"""

    LIFETIMES = """
        select stage, minutes from lifetime where jobix = :jobix
        order by stage"""
    LIFETIME = """
        select minutes from lifetime
        where jobix = :jobix and stage = :stage"""
    SET_LIFETIME = """
        insert or replace into lifetime values (:jobix, :stage, :minutes)"""
    ALL_LIFETIMES = "select jobix, stage, minutes from lifetime " \
        "where minutes > 0"
    LASTSTAGE = "select laststage from pipeline where jobix = :jobix"
    SET_LASTSTAGE = """
        insert or replace into pipeline values (:jobix, :laststage)"""
    # jobs that are done now that the pipeline has a last stage
    NEWLY_DONE = MOVABLE + """
        where jobix = :jobix and stage >= :laststage
        and laststage is null and state in ('waiting', 'delayed', 'blocked')"""
    ANY_EXPIRED = EXPIRED + " limit 1"
    # the newly expired of a stage, per state, and their marks
    OVERDUE = "select state, count(*) as jobs from job" + IN_STAGE + """
        and expired = 0 and since < :before group by state"""
    FLAG = "update job set expired = 1" + IN_STAGE + """
        and expired = 0 and since < :before"""
    ANY_OVERDUE = "select 1 from job" + IN_STAGE + """
        and expired = 0 and since < :before limit 1"""
    # those whose lifetime was made longer
    OUT_OF_DATE = "select state, count(*) as jobs from job" + IN_STAGE + """
        and expired = 1 and since >= :before group by state"""
    UNFLAG = "update job set expired = 0" + IN_STAGE + """
        and expired = 1 and since >= :before"""

    # the groups of jobs that are done with, one row each
    ENDED_GROUPS = """
        select jobix, stage, state from tally
        where state in ('done', 'cancelled') and jobs > 0"""
    # of one job, what RESTORE has no use for: all, where nothing was
    # replaced, else those that aren't done
    PRUNE = """
        delete from attempt where job = (
            select row from job where jobix = :jobix and jobid = :jobid)
        and (outcome != 'done' or not exists (
            select 1 from attempt as other where other.job = attempt.job
            and (other.jobcmd is not null or other.filename is not null
                or other.files is not null)))"""

    # for a copy or a check of the whole database: these do walk over all
    WHOLE_JOBS = "select count(*) from job"
    WHOLE_NAMES = "select name from sqlite_master where sql is not null"
    WHOLE_TALLY = """
        select stage, state, sum(kept), sum(there), sum(kept_expired),
            sum(expired)
        from (select jobix, stage, state, jobs as kept, 0 as there,
                expired as kept_expired, 0 as expired from tally
            union all select jobix, stage, state, 0, count(*), 0,
                sum(expired) from job group by jobix, stage, state)
        group by jobix, stage, state
        having sum(kept) != sum(there) or sum(kept_expired) != sum(expired)"""
    WHOLE_LANES = """
        select state, case when lease is null then null else 0 end as lease,
            free, count(*) as jobs, min(jobid) as jobid
        from job group by 1, 2, 3"""
    # how often a child counts otherwise than its dependencies say
    WHOLE_MISSING = """
        select count(*), min(jobid) from job where missing != (
            select count(*) from dependency
            where child = job.row and known in (0, 2))"""
    # … and those that say otherwise than the parents, all of whom are told
    WHOLE_DEPENDENCIES = """
        select count(*), min(child) from dependency
        left join job on job.row = parent
        where parent not in (select parent from unsettled) and (
            jobid is null or not followed or known != case
                when state = 'done' then 1
                when state in ('failed', 'cancelled', 'aborted') then 2
                else 0 end or not exists (
                    select 1 from job as other where other.row = child))"""
    WHOLE_ORPHANS = """
        select count(*), min(row) from attempt where not exists (
            select 1 from job where job.row = attempt.job)"""
    # a claim that lapsed may stay; `final` is as in MOVABLE
    WHOLE_ODD = """
        select case
            when state = 'working' and claim is null
                then 'working without a claim'
            when state = 'working' and (origin is null or held is null)
                then 'working, claimed from nowhere'
            when state = 'working' and (due is null) != (lease is null)
                then 'working on half a lease'
            when state = 'delayed' and due is null
                then 'delayed for ever'
            when state not in ('working', 'delayed') and due is not null
                then 'due for nothing'
            when state != 'working' and lease is not null
                then 'on lease to nobody'
            when state not in ('working', 'waiting', 'done', 'blocked')
                and claim is not null then 'claimed and put aside'
            when state = 'done' and (final is null or stage < final)
                then 'done before the last stage'
            when state = 'waiting' and stage >= final
                then 'waiting in the last stage'
            when expired not in (0, 1) then 'expired by half'
            when state = 'waiting' and missing > 0
                then 'waiting, and for others too'
            when state = 'blocked' and missing = 0 then 'blocked by nothing'
            when (state = 'aborted') != (blame is not null)
                then 'aborted and nobody to blame, or to blame and not'
            end as odd, count(*), min(jobid)
        from (select job.*, coalesce(job.laststage, (
                select pipeline.laststage from pipeline
                where pipeline.jobix = job.jobix)) as final from job)
        group by 1 having odd is not null"""


# ------------------------------------------------ where the database lies ---

MOUNTINFO = "/proc/self/mountinfo"  # described in proc(5)
# File systems that other hosts may write to, or where a lock may hold on one
# host only. All FUSE file systems ("fuse.sshfs") are taken for such, too.
NETWORK_FILE_SYSTEMS = {
    "9p", "afs", "beegfs", "ceph", "cifs", "fhgfs", "fuse", "glusterfs",
    "gpfs", "lustre", "nfs", "nfs4", "orangefs", "panfs", "pvfs2", "smb3",
    "smbfs", "virtiofs", "wekafs",
}


def remove(path):
    """Remove a file if it exists."""
    with contextlib.suppress(OSError):
        os.unlink(path)


def open_private(path, more_flags=0):
    """Open a file for reading and writing, created with mode 0600.

    Return its descriptor. A symbolic link, which another user may have put
    there, is refused.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | more_flags
    return os.open(path, flags, 0o600)


def unescape(field):
    """Decode the octal escapes in a field of mountinfo."""
    return re.sub(r"\\([0-7]{3})", lambda m: chr(int(m.group(1), 8)), field)


def find_mount(folder):
    """Return the type and the source of the file system of a folder.

    The longest mount point above the folder counts, and the last of several
    mounts on it. Both are empty if mountinfo can't be read.
    """
    parts = os.path.realpath(folder).split("/")
    text, longest, found = "", 0, ("", "")
    with contextlib.suppress(OSError), open(MOUNTINFO, "rb") as file:
        text = os.fsdecode(file.read())
    for line in text.split("\n"):
        mount, _, file_system = line.partition(" - ")
        if file_system:
            point = unescape(mount.split(" ")[4]).rstrip("/").split("/")
            if len(point) >= longest and point == parts[: len(point)]:
                longest = len(point)
                found = tuple(map(unescape, file_system.split(" ")[:2]))
    return found


def try_locks(file):
    """Return whether POSIX locks on a file "work", "fail" or "lie".

    A process isn't refused a lock that it has, so a child asks for it, too.
    """
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return "fail"
    child = os.fork()
    if child == 0:
        status = 1
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            status = 0
        finally:
            os._exit(status)
    return "lie" if os.waitpid(child, 0)[1] == 0 else "work"


class DatabaseLocation:
    """Where a database lies, and how it can be used there.

    `kind` and `source` are those of the file system. `locks` is how POSIX
    locks behave there, which SQLite uses. If `exclusive`, only one server,
    with one connection, can use the database.
    """

    def __init__(self, path):
        self.path = path
        self.file = os.path.realpath(path)  # so that links share a lock file
        self.kind, self.source = find_mount(os.path.dirname(self.file))
        self.owner, self.locks = os.geteuid(), "work"
        probe = "%s.locks.%s" % (self.file, secrets.token_hex(4))
        with contextlib.suppress(OSError):  # then no server can start either
            file = open_private(probe, os.O_EXCL)
            try:
                self.owner = os.fstat(file).st_uid  # ids may be mapped
                self.locks = try_locks(file)
            finally:
                os.close(file)
                remove(probe)
        self.exclusive = self.kind in NETWORK_FILE_SYSTEMS or \
            self.kind.startswith("fuse.") or self.locks != "work"
        self.vfs = "unix-none" if self.locks == "fail" else "unix"

    def describe(self):
        """Return a clause such as "x.db is on nfs4 (host:/export)"."""
        text = "%s is on %s" % (self.path, self.kind or "a file system")
        if self.source:
            text += " (%s)" % self.source
        if self.locks != "work":
            text += ", where locks " + (
                "fail" if self.locks == "fail" else "exclude nobody")
        return text


# --------------------------------------- opening and copying the database ---


def file_uri(path, *, readonly, vfs="unix"):
    """Return the URI by which SQLite opens the database at `path`.

    It names the VFS, as an attached database would use that of the main one.
    """
    mode = "ro" if readonly else "rw"
    name = quote(os.fsencode(os.path.realpath(path)))
    return "file:%s?mode=%s&vfs=%s" % (name, mode, vfs)


def connect(path, *, readonly, vfs="unix"):
    """Return a connection to the database at `path`, in autocommit mode.

    No connection ever checkpoints by itself: SQLite 3.7.0 to 3.51.2 can lose
    commits when one does while another commits (https://sqlite.org/wal.html,
    "The WAL-reset bug").
    """
    connection = sqlite3.connect(
        file_uri(path, readonly=readonly, vfs=vfs),
        uri=True,
        timeout=30,
        isolation_level=None,
        check_same_thread=False,
    )
    # binds None as it is: the search for an adapter takes a microsecond
    sqlite3.register_adapter(type(None), {}.get)
    connection.row_factory = sqlite3.Row
    connection.execute("pragma wal_autocheckpoint = 0")
    return connection


@contextlib.contextmanager
def translate_errors(path):
    """Turn an error of SQLite or the system into Trouble about `path`."""
    try:
        yield
    except Unavailable as error:
        reason = error.reason
    except (sqlite3.Error, OSError) as error:
        reason = cause(error)
    else:
        return
    raise Trouble("The database %s can't be used: %s." % (path, reason))


def inspect(path):
    """Return the schema version of the database at `path`, 0 for a new one.

    Only the file's header is read (https://sqlite.org/fileformat.html,
    section 1.3), which changes nothing. Raise Trouble if the file isn't a
    jobman database, or was made by a newer version.
    """
    head = b""
    if os.path.exists(path):
        with translate_errors(path), open(path, "rb") as file:
            head = file.read(100)
    if not head:
        return 0
    if head[:16] != b"SQLite format 3\0" or len(head) < 100:
        raise Trouble("%s is not a database." % path)
    if int.from_bytes(head[68:72], "big") != APPLICATION_ID:
        raise Trouble("%s is a database of another program." % path)
    version = int.from_bytes(head[60:64], "big")
    if version > SCHEMA_VERSION:
        raise Trouble(
            "%s was made by a newer jobman (schema %d, this one knows %d);"
            " use that one." % (path, version, SCHEMA_VERSION)
        )
    return version


def refuse_leftovers(*paths):
    """Raise Trouble if there is a file that SQLite would take for ours."""
    for path in filter(os.path.lexists, paths):
        raise Trouble("%s is there already; move it away, or name a new file."
                      % path)


def need_owner(path, owner):
    """Raise Trouble if a file belongs to another user.

    The owner of a database can read its jobix, and so run commands as us.
    """
    if os.stat(path).st_uid not in (owner, os.geteuid(), 0):
        raise Trouble("%s belongs to another user; name another file." % path)


def need_own(path, owner):
    """Raise Trouble if a file isn't ours; make it private to us."""
    need_owner(path, owner)
    status = os.stat(path)
    if status.st_mode & 0o077 and status.st_uid == os.geteuid():
        os.chmod(path, 0o600)


def recover(location):
    """Bring a database that no other process uses into a single file.

    What a killed server left in a WAL or a rollback journal is applied or
    rolled back. With exclusive locking a WAL needs no shared memory.
    """
    connection = connect(location.path, readonly=False, vfs=location.vfs)
    with contextlib.closing(connection):
        connection.execute("pragma locking_mode = exclusive")
        connection.execute("pragma journal_mode = delete")
    # The next journal must be another file than that of a server which has
    # lost the database but not closed it yet.
    remove(location.file + "-journal")
    remove(location.file + "-shm")


def clear_journal(connection):
    """Delete the rollback journal of open_writer(), if it has one."""
    if connection.execute("pragma journal_mode").fetchone()[0] == "persist":
        connection.execute("pragma locking_mode = normal")
        connection.execute("pragma journal_mode = delete")


def open_writer(location):
    """Return the connection that changes a database; create it if needed.

    Raise Trouble if it can't be used, and leave the file untouched then. The
    tables are created by one transaction, so a file without a version has
    none: it is new, or a server was killed in that transaction.
    """
    path = location.path
    with translate_errors(path), contextlib.ExitStack() as undo:
        inspect(path)
        if not os.path.exists(path):
            refuse_leftovers(
                location.file + "-wal", location.file + "-journal")
            os.close(open_private(location.file))
            undo.callback(remove, location.file)
        need_own(path, location.owner)
        if location.exclusive:
            recover(location)
        connection = connect(path, readonly=False, vfs=location.vfs)
        undo.callback(connection.close)
        connection.execute("pragma synchronous = full")
        if connection.execute("pragma user_version").fetchone()[0] == 0:
            connection.executescript(
                "begin immediate; %s pragma application_id = %d;"
                " pragma user_version = %d; commit;"
                % (SCHEMA, APPLICATION_ID, SCHEMA_VERSION)
            )
        if location.exclusive:
            # The journal is never deleted, so a server that has lost the
            # database doesn't delete its successor's when it ends. With
            # cache_spill off nothing is written before the commit.
            connection.executescript(
                "pragma locking_mode = exclusive;"
                " pragma journal_mode = persist; pragma cache_spill = off;"
                " begin exclusive; commit"  # keeps other programs off
            )
        else:
            connection.execute("pragma journal_mode = wal")
        undo.pop_all()
    return connection


def copy_tables(copy):
    """Copy all of the attached database `source`, in one transaction."""
    execute = copy.execute
    execute("begin")
    for kind in ("table", "index"):
        for name, sql in execute(
            "select name, sql from source.sqlite_master"
            " where type = :kind and sql is not null", {"kind": kind}
        ).fetchall():
            execute(sql)
            if kind == "table":
                execute("insert into %s select * from source.%s"
                        % (name, name))
    for mark in ("application_id", "user_version"):
        value = execute("pragma source.%s" % mark).fetchone()[0]
        execute("pragma main.%s = %d" % (mark, value))
    execute("commit")


def copy_database(location, target, show=lambda size: None):
    """Copy a database, even while it is served, to the new file `target`.

    The copy is a snapshot in one file of mode 0600. It gets its name when it
    is complete, so a full disk leaves nothing behind. `show` is called from
    time to time with the bytes written. Return the number of jobs. Raise
    Trouble if the copy can't be made.
    """
    refuse_leftovers(target, target + "-wal", target + "-journal")
    draft = "%s.new.%s" % (target, secrets.token_hex(4))
    source = file_uri(location.path, readonly=True, vfs=location.vfs)
    try:
        os.close(open_private(draft, os.O_EXCL))
        # only this process knows the draft, so it needs no locks
        copy = connect(draft, readonly=False, vfs="unix-none")
        with contextlib.closing(copy):
            copy.execute("pragma journal_mode = off")
            copy.execute("pragma synchronous = full")
            copy.execute("attach :source as source", {"source": source})
            copy.set_progress_handler(
                lambda: show(os.path.getsize(draft)), 10**5)
            copy_tables(copy)
            jobs = copy.execute(SQL.WHOLE_JOBS).fetchone()[0]
        os.replace(draft, target)
    except (sqlite3.Error, OSError) as error:
        raise Trouble("The database %s can't be copied to %s: %s." % (
            location.path, target, cause(error)
        )) from None
    finally:
        remove(draft)
    return jobs


# ----------------------------------------------------------- server lock ---

LOCK_LENGTH = 512  # bytes of a lock file, which is never truncated


def identity(path):
    """Return what tells a file from all others, None if there is no file."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


def read_holder(location):
    """Return what the lock file of a database says of its holder, a dict.

    It is empty if there is no such file, or nothing sensible in it. The file
    is opened anew each time, as NFS looks for changes only then.
    """
    try:
        with open(location.file + ".lock", "rb") as file:
            holder = from_json(file.read(LOCK_LENGTH).decode("ascii"))
    except (FileNotFoundError, UnicodeDecodeError, Error):
        return {}
    return holder if isinstance(holder, dict) else {}


def name_holder(holder):
    """Return a holder's name for messages."""
    pid, host = (str(holder.get(name, "?")) for name in ("pid", "host"))
    return printable("process %s on %s" % (pid, host))


def is_running(holder):
    """Return whether a holder's process is running; None on another host.

    A process that was given its number since is taken for it.
    """
    if holder.get("host") != socket.gethostname():
        return None
    try:
        os.kill(holder["pid"], 0)
    except PermissionError:
        return True
    except (OSError, OverflowError, LookupError, TypeError):
        return False
    return True


class ServerLock:
    """Keep a second server off a database, unless both share it.

    On a local file system an flock on the file `<database>.lock` decides; it
    ends with the process. On a network file system an flock may hold on one
    host only, or fail. There the file also has a heartbeat: a counter that
    the holder increments. A server that sees it stand still for STALE seconds
    takes the file over. A holder that couldn't confirm for LIMIT seconds that
    the file is its own changes nothing until it can.

    `clock` returns seconds and is never set back.
    """

    LOOK = 1  # seconds between two looks at the files
    BEAT = 4  # seconds between two heartbeats
    # A transaction may begin up to LIMIT after the last heartbeat, and has
    # the time until STALE to end.
    LIMIT = 12
    STALE = 20

    def __init__(self, location, *, shared, clock=time.monotonic):
        if shared and location.exclusive:
            raise Trouble(
                "%s, so servers can't share it: put it on a local file system"
                " (such as /tmp or /dev/shm, or a disk of this host), or run"
                " only one server, without --shared." % location.describe()
            )
        self.location = location
        self.path = location.file + ".lock"
        self.shared = shared
        self.clock = clock
        self.key = secrets.token_hex(8)
        self.beats = 0
        self.confirmed_at = None
        self.lost = None  # why, once the database isn't ours any more
        self.file = self.file_id = self.database_id = None
        self.taken = False
        self.ending = threading.Event()
        self.watcher = threading.Thread(target=self.watch, daemon=True)
        try:
            while not self.taken:
                self.take()
        except BaseException:
            self.close()
            raise
        self.watcher.start()

    # Taking it

    def take(self):
        """Take the file, unless its last holder removes it meanwhile.

        Raise Trouble if another server has it.
        """
        new = not os.path.lexists(self.path)
        try:
            self.file = open_private(self.path, os.O_EXCL if new else 0)
        except FileExistsError:
            return
        self.file_id = identity(self.file)
        self.lock_file()
        if self.location.exclusive and not new:
            self.await_silence()
        if identity(self.path) != self.file_id:
            self.file = os.close(self.file)
            return
        self.taken = True
        self.confirmed_at = self.clock()
        self.write()
        if self.location.exclusive and not new:
            time.sleep(self.LOOK)  # another server may take it over, too
            if not self.holds_file():
                raise self.refusal(read_holder(self.location))

    def lock_file(self):
        """Get the flock, if there is such a thing."""
        kind = fcntl.LOCK_SH if self.shared else fcntl.LOCK_EX
        try:
            fcntl.flock(self.file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            raise self.refusal(read_holder(self.location)) from None
        except OSError:
            if not self.location.exclusive:
                raise

    def refusal(self, holder):
        """Return the Trouble that another server has the database."""
        advice = "." if self.location.exclusive else \
            ", or use another --db, or serve it twice with --shared."
        return Trouble(
            "Another server has the database %s (%s): end that one first%s"
            % (self.location.path, name_holder(holder), advice)
        )

    def await_silence(self):
        """Return when the last holder is known to have ended.

        Raise Trouble if it shows a sign of life within STALE seconds.
        """
        holder = read_holder(self.location)
        running = is_running(holder)
        if running is False:
            return
        if running is None:
            say("jobman.py: %s may still have the database %s: waiting %d s"
                " for a sign of life." % (
                    name_holder(holder), self.location.path, self.STALE))
        end = self.clock() + self.STALE
        while self.clock() < end and identity(self.path) == self.file_id:
            time.sleep(self.LOOK)
            later = read_holder(self.location)
            if later not in (holder, {}):
                raise self.refusal(later)

    # Keeping it

    def write(self):
        """Write the record of this holder, and one more heartbeat."""
        self.beats += 1
        record = {"host": socket.gethostname(), "pid": os.getpid(),
                  "key": self.key, "beat": self.beats}
        line = to_json(record).encode("ascii").ljust(LOCK_LENGTH - 1) + b"\n"
        os.pwrite(self.file, line, 0)
        if self.location.exclusive:
            os.fsync(self.file)

    def watch_database(self):
        """Watch the database's own file as well, from now on."""
        self.database_id = identity(self.location.file)

    def holds_file(self):
        """Return True if the lock file is still ours."""
        if self.location.exclusive:
            return read_holder(self.location).get("key") == self.key
        return identity(self.path) == self.file_id

    def database_moved(self):
        """Return True if the database was moved, but not the lock file."""
        here = self.database_id in (None, identity(self.location.file))
        return not here and self.holds_file()

    def watch(self):
        """Confirm the lock at intervals, until it is lost or given up."""
        interval = self.BEAT if self.location.exclusive else self.LOOK
        while not (self.lost or self.ending.wait(interval)):
            with contextlib.suppress(OSError):  # check() notices a long one
                self.confirm()

    def confirm(self):
        """Note whether the database is still ours; if so, send a heartbeat.
        """
        began = self.clock()
        if not self.holds_file() or self.database_moved():
            self.lose()
            return
        if self.location.exclusive:
            self.write()
        self.confirmed_at = began

    def lose(self):
        """Note why the database isn't ours any more."""
        holder = {} if self.holds_file() else read_holder(self.location)
        self.lost = name_holder(holder) + " has taken it over" if holder \
            else "its files were moved or removed"

    def check(self):
        """Raise Unavailable unless the database is known to be ours."""
        try:
            if self.location.exclusive and not (
                    self.lost or self.holds_file()):
                self.lose()
        except OSError as error:
            raise Unavailable(error.strerror) from None
        if self.lost:
            raise Unavailable("it has lost its database: " + self.lost)
        age = self.clock() - self.confirmed_at
        if self.location.exclusive and age > self.LIMIT:
            raise Unavailable("another server may have its database")

    def need(self):
        """Raise Trouble if the database is lost."""
        if self.lost:
            raise Trouble("This server has lost the database %s, and ends: %s."
                          % (self.location.path, self.lost))

    # Giving it up

    def close(self):
        """Give up the lock; the last holder removes the files."""
        self.ending.set()
        if self.watcher.ident:
            self.watcher.join(self.BEAT)
        if self.file is None:
            return
        with contextlib.suppress(OSError):
            if self.is_last():
                for suffix in (".gate", ".turn", ".lock"):
                    remove(self.location.file + suffix)
        self.file = os.close(self.file)

    def is_last(self):
        """Return True if the lock is ours alone, or raise OSError."""
        if not self.taken or self.lost or not self.holds_file():
            return False
        if self.shared:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True


class FairLock:
    """Make the processes that share a database take turns.

    SQLite's own lock is unfair: it may starve a process for minutes. Here a
    process holds the gate while it waits for its turn. The one whose turn
    ends finds the gate closed if it wants another, and so comes after it.
    """

    def __init__(self, path, *, shared):
        suffixes = (".gate", ".turn") if shared else ()
        self.files = [open_private(path + suffix) for suffix in suffixes]

    def __enter__(self):
        for file in self.files:
            fcntl.flock(file, fcntl.LOCK_EX)
        for gate in self.files[:1]:
            fcntl.flock(gate, fcntl.LOCK_UN)

    def __exit__(self, *_):
        for turn in self.files[1:]:
            fcntl.flock(turn, fcntl.LOCK_UN)

    def close(self):
        """Close the files."""
        for file in self.files:
            os.close(file)


# ---------------------------------------------------------------- writer ---


VARIABLES = 999  # that a statement of any SQLite may have
ROWS_AT_ONCE = 100  # before SQLite 3.8.8 it could be 500


@functools.lru_cache(maxsize=100)
def for_rows(sql, common, own, n):
    """Return `sql` to insert `n` rows: what it selects from comes after it.

    That are the names that all rows have in `common`, and those of their own.
    """
    shared, first = (
        ", ".join("? as " + name for name in names) for names in (common, own)
    )
    more = " union all select " + ", ".join("?" * len(own))
    return "%s (select %s) cross join (select %s%s)" % (
        sql, shared, first, more * (n - 1)
    )


class Statement:
    """A statement with ? for its :names, and what takes their values.

    SQLite would look every name up at every call. `columns` are those of its
    result, once there was one.
    """

    __slots__ = ("bind", "columns", "text")

    def __init__(self, sql):
        names = re.findall(r":(\w+)", sql)
        self.text = re.sub(r":\w+", "?", sql)
        self.columns = None
        if len(names) > 1:
            self.bind = operator.itemgetter(*names)
        elif names:
            self.bind = lambda values: (values[names[0]],)
        else:
            self.bind = tuple  # it has none: values in order, if any


prepared = functools.lru_cache(maxsize=300)(Statement)


# What a move says to the counts.
WAY = operator.itemgetter(
    "jobix", "old_stage", "old_state", "expired", "stage", "state", "free")


new_sums = functools.partial(defaultdict, int)
# How long attempts ran, and jobs waited.
SPREAD = {
    "done": (SQL.TIMED, SQL.TIMED_FIRST),
    "claimed": (SQL.WAITED, SQL.WAITED_FIRST),
}


class Transaction:
    """What the operations of one commit share.

    `now` is the commit's time in seconds since 1970, `turns` how many
    operations there are. What they count is summed up here. Moves of jobs
    gather and are written many at once: before any other statement, and
    before their jobs are read again.
    """

    # what can wait: by kind, in this order, each to change one row
    LATER = SQL.END_ATTEMPT, SQL.KEEP, SQL.REPLACE, SQL.MOVE
    MOST_LATER = 1000  # of a kind
    MOST_AHEAD = 64  # jobs that are read for claims to come

    def __init__(self, connection, now, turns=1):
        self.connection = connection
        self.now = now
        self.ahead = min(turns // 2, self.MOST_AHEAD)
        self.later = {sql: [] for sql in self.LATER}
        self.counted, self.spent = [], []
        self.logs = [self.counted, self.spent, *self.later.values()]
        self.waiting = False  # whether there may be anything in `later`
        self.unsettled = False  # whether jobs have children yet to be told
        self.moving = set()  # the jobs that may have a move in `later`
        self.found = {}  # jobs that were looked up, by jobix and jobid
        self.free = {}  # of some stages the next free jobs, by their row
        self.sums = defaultdict(new_sums)
        self.begin()

    def begin(self):
        """Begin an operation, which can be taken back up to here."""
        self.begun = self.extent()

    def extent(self):
        """Return how much was written, and how much is to be."""
        return [self.connection.total_changes, *map(len, self.logs)]

    def take_back(self):
        """Undo the operation that began last.

        Return whether that could be done, for it has written nothing.
        """
        changes, *lengths = self.begun
        if self.connection.total_changes != changes:
            return False
        for log, length in zip(self.logs, lengths):
            del log[length:]
        self.forget()
        return True

    def forget(self):
        """Forget what was read of jobs."""
        self.found.clear()
        self.free.clear()

    def select(self, sql, values):
        """Return rows as dicts; nothing in `later` may be about them."""
        statement = prepared(sql)
        rows = self.connection.execute(statement.text, statement.bind(values))
        if statement.columns is None:
            statement.columns = [column[0] for column in rows.description]
        return [dict(zip(statement.columns, row)) for row in rows]

    def execute(self, sql, values=()):
        """Execute any statement, after all that was to come before it."""
        self.write()
        self.forget()
        statement = prepared(sql)
        return self.connection.execute(
            statement.text, statement.bind(values))

    def write(self):
        """Write all that is to be written."""
        if not self.waiting:
            return
        untouched = self.begun == self.extent()
        for sql, rows in self.later.items():
            if rows:
                statement = prepared(sql)
                done = self.connection.executemany(
                    statement.text, map(statement.bind, rows))
                if done.rowcount != len(rows):
                    raise sqlite3.IntegrityError("a job was just moved")
        self.sum_up()
        for log in self.logs:
            log.clear()
        self.moving.clear()
        self.waiting = False
        if untouched:
            self.begin()

    def put_off(self, sql, values):
        """Have a statement, of LATER, executed later."""
        rows = self.later[sql]
        rows.append(values)
        self.waiting = True
        if len(rows) >= self.MOST_LATER:
            self.write()

    def move(self, job, values):
        """Have `job` moved by SQL.MOVE; forget what was read of it."""
        key = job["jobix"], job["jobid"]
        self.moving.add(key)
        self.found.pop(key, None)
        self.free.get((job["jobix"], job["stage"]), {}).pop(job["row"], None)
        if values["free"] > 0:
            self.free.pop((job["jobix"], values["stage"]), None)
        self.put_off(SQL.MOVE, values)

    def look_up(self, jobix, ids):
        """Read jobs that will be asked for, if they are just TOGETHER."""
        if len(ids) == len(TOGETHER) and self.moving.isdisjoint(
                (jobix, jobid) for jobid in ids):
            values = dict(zip(TOGETHER, ids), jobix=jobix)
            for job in self.select(SQL.JOBS, values):
                self.found[jobix, job["jobid"]] = job

    def find(self, jobix, jobid):
        """Return a job as it is now, a dict of MOVABLE, or None."""
        key = jobix, jobid
        if key in self.moving:
            self.write()
        if key not in self.found:
            jobs = self.select(SQL.JOB, {"jobix": jobix, "jobid": jobid})
            self.found[key] = jobs[0] if jobs else None
        return self.found[key]

    def next_free(self, jobix, stage, n):
        """Return the next `n` free jobs of a stage, in order, if it has them.

        More are read where the operations to come may want them.
        """
        jobs = self.free.get((jobix, stage), {})
        if len(jobs) < n:
            self.write()
            values = {"jobix": jobix, "stage": stage}
            values["limit"] = max(n, self.ahead)
            jobs = {job["row"]: job for job in self.select(SQL.FREE, values)}
            self.free[jobix, stage] = jobs
        return list(itertools.islice(jobs.values(), n))

    def insert(self, sql, columns):
        """Insert rows, given as columns: each by its name in `sql`.

        A column is a list, or a value that all rows have; at least one is a
        list. Many rows are inserted by one statement, and what all have is
        bound but once: that is most of what a row costs. Returns how many
        rows are new.
        """
        own = tuple(
            name for name, column in columns.items() if type(column) is list
        )
        common = tuple(name for name in columns if name not in own)
        shared = [columns[name] for name in common]
        rows = list(zip(*(columns[name] for name in own)))
        most = min(ROWS_AT_ONCE, (VARIABLES - len(common)) // len(own))
        done = new = 0
        while done < len(rows):
            n = next(n for n in (most, 10, 1) if done + n <= len(rows))
            some = itertools.chain.from_iterable(rows[done : done + n])
            new += self.execute(
                for_rows(sql, common, own, n), [*shared, *some]
            ).rowcount
            done += n
        return new

    def count(self, kind, key, n=1):
        """Add `n` to the sum of `kind` (jobs, expired, free, …) for `key`."""
        self.counted.append((kind, key, n))

    def spend(self, key, seconds, n=1, bucket=None):
        """Add to what was spent: `key` is of (jobix, stage, kind).

        Of time to be spread, in /stats, the `bucket` is that of run_bucket().
        """
        self.spent.append((key, seconds, n, bucket))

    def sum_up(self):
        """Add what was counted, and the moves, to the sums."""
        sums = self.sums
        for kind, key, n in self.counted:
            sums[kind][key] += n
        spent, spread, took = sums["spent"], sums["spread"], sums["seconds"]
        for key, seconds, n, bucket in self.spent:
            spent[key] += n
            took[key] += seconds
            if bucket is not None:
                spread[key, bucket] += n
        ways = new_sums()
        for way in map(WAY, self.later[SQL.MOVE]):
            ways[way] += 1
        for way, n in ways.items():
            jobix, old_stage, old_state, expired, stage, state, free = way
            sums["jobs"][jobix, old_stage, old_state] -= n
            sums["jobs"][jobix, stage, state] += n
            if expired:
                sums["expired"][jobix, old_stage, old_state] -= n
            if free > 0:
                sums["free"][jobix, stage] += n

    def settle(self):
        """Write all, and the sums: an update for each group that changed."""
        self.write()
        self.sum_up()
        self.settle_jobs(self.sums["jobs"], self.sums["expired"])
        self.settle_spent(self.sums["spent"], self.sums["seconds"])
        for ((jobix, stage, kind), bucket), n in self.sums["spread"].items():
            values = {"jobix": jobix, "stage": stage, "bucket": bucket, "n": n}
            self.add(*SPREAD[kind], values)

    def settle_jobs(self, jobs, expired):
        """Write how many jobs there are more, and expired ones."""
        for key in {**jobs, **expired}:
            jobix, stage, state = key
            values = {"jobix": jobix, "stage": stage, "state": state}
            values["jobs"], values["expired"] = jobs[key], expired[key]
            if jobs[key] or expired[key]:
                self.add(SQL.COUNT, SQL.COUNT_FIRST, values)

    def settle_spent(self, spent, seconds):
        """Write what was spent, and what of it became done in this minute."""
        updates, done = new_sums(), self.sums["done"]
        for key, n in spent.items():
            jobix, stage, kind = key
            values = {"jobix": jobix, "stage": stage, "kind": kind}
            values["attempts"], values["seconds"] = n, seconds[key]
            self.add(SQL.SPENT, SQL.SPENT_FIRST, values)
            if kind == "done":
                updates[jobix] += n
        for jobix in {**done, **updates}:
            values = {"jobix": jobix, "minute": int(self.now // 60)}
            values["done"], values["updates"] = done[jobix], updates[jobix]
            self.add(SQL.PACE, SQL.PACE_FIRST, values)

    def add(self, update, insert, values):
        """Add `values` to a row of sums, which may be its first."""
        if self.execute(update, values).rowcount == 0:
            self.execute(insert, values)


class HalfDone(Exception):
    """Take a transaction back, for one of its operations is half done."""


class Turn:
    """One operation on its way through the Writer, and what came of it."""

    __slots__ = ("error", "half", "operation", "over", "ready", "result")

    def __init__(self, operation):
        self.operation = operation
        self.half = self.over = False
        self.result = self.error = None
        self.ready = threading.Lock()  # released when it is over, or leads
        self.ready.acquire()

    def run(self, transaction):
        """Run the operation and keep its result or its refusal.

        Return whether it did all or nothing. It may run again.
        """
        self.error = None
        transaction.begin()
        try:
            self.result = self.operation(transaction)
        except sqlite3.Error:
            raise
        except Exception as error:
            self.error = error
            self.half = not transaction.take_back()
        return not self.half

    def outcome(self):
        """Return the operation's result or raise its error."""
        if self.error is not None:
            raise self.error
        return self.result


def refuse(turns, error):
    """Let `turns` end with `error`."""
    for turn in turns:
        turn.error = error


class Writer:
    """Make all changes: one transaction, many operations, one commit.

    Requests that arrive while a commit is on its way wait and share the
    next. One of them leads: it runs the operations of all in its own thread
    and wakes the others when all are on disk. `mutex` guards queue, leading
    and closed; the connection belongs to the leader.
    """

    CHECKPOINT_AFTER = 1000  # changed rows

    def __init__(
        self, connection, turns, lock, clock, *, prepare, finish, committed
    ):
        self.connection = connection
        self.lock = lock
        self.turns = turns
        self.clock = clock
        self.prepare = prepare  # called first in every transaction
        self.finish = finish  # called last in one that leaves jobs unsettled
        self.committed = committed  # called with the jobs that a commit freed
        self.mutex = threading.Lock()
        self.rest = threading.Condition(self.mutex)  # nobody leads
        self.queue = []
        self.leading = False
        self.closed = False
        self.checkpointed = 0

    def run(self, operation):
        """Return `operation(transaction)`, once it is on disk."""
        turn = Turn(operation)
        with self.mutex:
            if self.closed:
                raise Unavailable("it is ending")
            self.queue.append(turn)
            leads, self.leading = not self.leading, True
        if not leads:
            turn.ready.acquire()
        if not turn.over:
            self.lead()
        return turn.outcome()

    def lead(self):
        """Commit all that waits, then wake the next leader and the others."""
        with self.mutex:
            batch, self.queue = self.queue, []
        try:
            self.commit(batch)
        finally:
            with self.mutex:
                heir = self.queue[0] if self.queue else None
                self.leading = heir is not None
                self.rest.notify_all()
            if heir:
                heir.ready.release()
            for turn in batch:
                turn.over = True
                turn.ready.release()

    def commit(self, batch):
        """Run the operations of `batch` in one transaction.

        One that is refused when it has changed something takes all back: the
        others run again without it. That is rare, and cheaper than a
        savepoint for each.
        """
        left = batch
        try:
            while left and not self.all_whole(left):
                left = [turn for turn in left if not turn.half]
        except sqlite3.Error as error:
            refuse(batch, Unavailable(error))
        except Exception as error:
            refuse(batch, error)

    def all_whole(self, batch):
        """Commit the operations of `batch` unless one was half done."""
        with contextlib.suppress(HalfDone):
            with self.transaction(self.prepare, len(batch)) as transaction:
                for turn in batch:
                    if not turn.run(transaction):
                        raise HalfDone
            return True
        return False

    @contextlib.contextmanager
    def transaction(self, prepare, turns=1):
        """Begin, do `prepare`, hand out a Transaction, commit.

        Rolls back on any error. Before the commit the lock is looked at once
        more: until then nothing of this is in the database.
        """
        with self.turns:
            self.lock.check()
            execute = self.connection.execute
            execute("begin immediate")
            try:
                transaction = Transaction(
                    self.connection, self.clock(), turns)
                prepare(transaction)
                yield transaction
                if transaction.unsettled:
                    self.finish(transaction)
                transaction.settle()
                self.lock.check()
                execute("commit")
            except BaseException:
                if self.connection.in_transaction:
                    execute("rollback")
                raise
            self.checkpoint()
        self.committed(transaction.sums["free"])

    def checkpoint(self):
        """Copy the WAL into the database when it has grown.

        Called between two commits, in this process' turn: see connect().
        """
        changes = self.connection.total_changes
        if changes - self.checkpointed >= self.CHECKPOINT_AFTER:
            self.checkpointed = changes
            with contextlib.suppress(sqlite3.Error):  # the WAL keeps it all
                self.connection.execute("pragma wal_checkpoint(passive)")

    def close(self):
        """Let the commits on their way end, refuse all others."""
        with self.rest:
            self.closed = True
            self.rest.wait_for(lambda: not self.leading)
        with self.turns:
            with contextlib.suppress(Unavailable, sqlite3.Error, OSError):
                if self.lock.database_moved():  # its WAL was not
                    self.connection.execute("pragma wal_checkpoint(passive)")
                self.lock.check()
                clear_journal(self.connection)
            self.connection.close()
        self.turns.close()


# --------------------------------------------------------------- waiting ---


class Waiter:
    """A long poll that waits for a job."""

    __slots__ = ("lock", "used", "woken")

    def __init__(self):
        self.woken = False
        self.used = False  # its wake-up need not be passed on
        self.lock = threading.Lock()  # released by the wake-up
        self.lock.acquire()

    def wake(self):
        """Wake the waiter. Return False if it had been woken already."""
        if self.woken:
            return False
        self.woken = True
        self.lock.release()
        return True

    def wait(self, seconds):
        """Wait at most `seconds` for the wake-up; return whether it came."""
        self.lock.acquire(timeout=max(0, seconds))
        return self.woken


class WaitQueue:
    """Wake one long poll for each job that becomes free in its stage.

    A key is (jobix, stage). At most `limit` long polls wait at a time.
    """

    def __init__(self, limit):
        self.mutex = threading.Lock()  # guards everything below
        self.waiters = {}  # {key: {Waiter: None}}, oldest first
        self.limit = limit
        self.waiting = 0
        self.closed = False

    @contextlib.contextmanager
    def join(self, keys):
        """Add a Waiter for `keys` and yield it; yield None beyond the limit.

        A wake-up that it hasn't used goes to the next waiter.
        """
        with self.mutex:
            full = self.closed or self.waiting >= self.limit
            waiter = None if full else Waiter()
            if waiter:
                self.waiting += 1
                for key in keys:
                    self.waiters.setdefault(key, {})[waiter] = None
        try:
            yield waiter
        finally:
            if waiter:
                self.leave(waiter, keys)

    def leave(self, waiter, keys):
        """Remove a Waiter; pass its wake-up on unless it was used."""
        with self.mutex:
            self.waiting -= 1
            for key in keys:
                del self.waiters[key][waiter]
                if not self.waiters[key]:
                    del self.waiters[key]
        if waiter.woken and not waiter.used:
            for key in keys:
                self.wake(key)

    def wake(self, key, n=1):
        """Wake up to `n` waiters of `key`, oldest first."""
        with self.mutex:
            for waiter in self.waiters.get(key, ()):
                if n <= 0:
                    break
                n -= waiter.wake()

    def keys(self):
        """Return the keys that long polls wait for."""
        with self.mutex:
            return list(self.waiters)

    def close(self):
        """Wake all waiters; nobody waits from now on."""
        with self.mutex:
            self.closed = True
            for waiters in self.waiters.values():
                for waiter in waiters:
                    waiter.wake()


# ----------------------------------------------------------------- store ---

UNENDED = ("waiting", "delayed", "blocked", "working")
PUT_ASIDE = ("failed", "cancelled", "aborted")  # until a retry
STATES = (*UNENDED, "done", *PUT_ASIDE)  # lane() gives their order meaning
RETRIABLE = ("done", *PUT_ASIDE)
CANCELLABLE = (*UNENDED, "failed", "aborted")
REJECTABLE = ("waiting", "delayed", "done", "failed")  # without a token
# What the end of an attempt may say of itself.
REPLACED = "jobcmd", "filename", "files"  # by what an update brings
BLANK_REPORT = dict.fromkeys(("exit_code", "error", "stderr", "seconds"))
LAPSES_SPENT = (
    "%d leases lapsed in this stage: its workers were not heard of in time."
)
PRIORITIES_MERGED = 20  # of a group, for a page in order of ids
PACE_POINTS = 360  # at most, of the line that /pace draws
FAILURES_READ = 1000  # failed jobs that are grouped, the latest
PAGE_TEXT = 8 * 2**20  # characters of text after which a page ends
ATTEMPTS_SHOWN = 100  # of one job, the last
JSON_COLUMNS = "jobcmd", "filename", "files", "cwd", "outputs"
CHUNK = 5000  # jobs that one transaction of a sweeping change moves
PRUNED = 1000  # jobs whose attempts one transaction looks at, one a tick
PRUNE_EVERY = 3600  # seconds
AWAY_AFTER = 300  # seconds after which a worker isn't there any more
CUT_OFF = "released", "lapsed", "cancelled", "expired", "superseded"


def delay_after(failures):
    """Return the seconds that a job waits after so many failures."""
    return min(600, 2 * 4 ** (min(failures, 10) - 1))


def delay_left(job, now):
    """Return the seconds until a job is due, 0 when it is not delayed."""
    return max(0, job["due"] - now) if job["state"] == "delayed" else 0


def is_free(state, lease):
    """Return whether a claim may have a job: the contract's *free*."""
    return state in ("waiting", "done") or (
        state == "working" and lease is None
    )


def known_end(state):
    """Return what a state means for jobs that wait for one that has it.

    1: it is done, 2: it won't be, 0: neither.
    """
    return 1 if state == "done" else 2 * (state in PUT_ASIDE)


def lane(state, lease):
    """Return what leads a job's place in the index job_queue.

    It is 1 for all that are free, so that a claim finds them in one range,
    and less than 0 for all others: a range for each state.
    """
    return 1 if is_free(state, lease) else -STATES.index(state)


def lanes(state):
    """Return the lanes in which jobs of a state can be."""
    return sorted({lane(state, None), lane(state, 0)})


def stage_state(stage, final):
    """Return the state of a job that is put into `stage`."""
    return "done" if final is not None and stage >= final else "waiting"


def pick(columns, places):
    """Return of columns, lists or one value for all, the rows at `places`."""
    return {
        name: [column[place] for place in places]
        if type(column) is list else column
        for name, column in columns.items()
    }


def split(columns, *names):
    """Yield (values, columns) for the rows that have the same under `names`.
    """
    values = [columns[name] for name in names]
    if list not in map(type, values):
        yield values, columns
        return
    lists = [v if type(v) is list else itertools.repeat(v) for v in values]
    places = {}
    for place, key in enumerate(zip(*lists)):
        places.setdefault(key, []).append(place)
    for key, found in places.items():
        yield key, dict(pick(columns, found), **dict(zip(names, key)))


def change(operation):
    """Make a Store method one operation of the Writer's next commit."""

    @functools.wraps(operation)
    def run(self, *args, **named):
        return self.writer.run(lambda tx: operation(self, tx, *args, **named))

    return run


def query(reading):
    """Make a Store method read from a snapshot, waiting for no commit.

    But where the one connection has the database alone it is an operation of
    the next commit. So no such method calls another.
    """

    @functools.wraps(reading)
    def run(self, *args, **named):
        if self.location.exclusive:
            return self.writer.run(
                lambda tx: reading(self, tx.execute, *args, **named))
        with self.readers.reading() as connection:
            return reading(self, connection.execute, *args, **named)

    return run


class Readers:
    """A few read-only connections, each used by one thread at a time."""

    KEPT = 8

    def __init__(self, path):
        self.path = path
        self.idle = deque()

    @contextlib.contextmanager
    def reading(self):
        """Hand out a connection with a snapshot of the database."""
        try:
            connection = self.idle.pop()
        except IndexError:
            connection = connect(self.path, readonly=True)
        try:
            connection.execute("begin")
            yield connection
            connection.execute("rollback")
        except BaseException:
            connection.close()
            raise
        if len(self.idle) < self.KEPT:
            self.idle.append(connection)
        else:
            connection.close()

    def close(self):
        """Close the idle connections."""
        while self.idle:
            self.idle.pop().close()


def new_figures():
    """Return the figures of a stage without jobs."""
    return {"jobs": 0, "expired": 0, "states": dict.fromkeys(STATES, 0)}


def run_bucket(seconds):
    """Return the number of the bucket that a run time is counted in.

    There are four to a doubling, and bucket 0 ends at a millisecond.
    """
    return max(0, math.ceil(4 * math.log2(max(seconds, 0.001) * 1000)))


def percentile(buckets, part):
    """Return the seconds within which a `part` (0 to 1) of attempts ran.

    `buckets` is a list of (bucket, attempts), in order. The answer is the
    upper end of a bucket, so up to a fifth too high.
    """
    left = part * sum(attempts for _, attempts in buckets)
    for bucket, attempts in buckets:
        left -= attempts
        if left <= 0:
            return 0.001 * 2 ** (bucket / 4)


def by_stage(rows):
    """Return {stage: [(bucket, n), …]} of rows (stage, bucket, n)."""
    stages = {}
    for stage, *bucket in rows:
        stages.setdefault(stage, []).append(bucket)
    return stages


PARTS = {"median": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99}


def quantiles(buckets, counted, *names):
    """Return how many a list of (bucket, n) has, and some of its PARTS."""
    found = {counted: sum(n for _, n in buckets)}
    found.update((name, percentile(buckets, PARTS[name])) for name in names)
    return found


class Store:
    """The jobs and everything that can happen to them.

    Methods speak the contract's words. Those marked `change` go through the
    Writer, are on disk when they return, and raise Error when refused; those
    marked `query` only read. `clock` gives seconds since 1970. `jobix` is the
    own one, if not that which the database has made. A job fails at its
    `max_attempts`, where it says nothing else, or at `max_lapses`.
    Attempts of jobs that ended `keep_days` ago are pruned; None: never.
    """

    TICK = {False: 1, True: 0.2}  # seconds between two ticks, if it is shared

    def __init__(
        self, path, *, clock=time.time, shared=False, waiters=20000,
        jobix=None, open_to_all=True, max_attempts=MAX_ATTEMPTS,
        max_lapses=MAX_LAPSES, keep_days=None
    ):
        self.clock = clock
        self.max_attempts = max_attempts
        self.max_lapses = max_lapses
        self.keep_days = keep_days
        self.ranges = []  # what a round of pruning has still to see
        self.looked, self.pruned = -math.inf, -1  # when, up to when
        self.shared = shared
        self.open_to_all = open_to_all
        self.wait_queue = WaitQueue(waiters)
        self.large_bodies = threading.BoundedSemaphore(LARGE_BODIES)
        self.ending = threading.Event()
        self.ticker = None
        self.readers = Readers(path)
        inspect(path)  # before a lock file is made beside it
        with translate_errors(path), contextlib.ExitStack() as undo:
            self.location = DatabaseLocation(path)
            lock = self.lock = ServerLock(self.location, shared=shared)
            undo.callback(lock.close)
            turns = FairLock(self.location.file, shared=shared)
            with turns:
                connection = open_writer(self.location)
            lock.watch_database()
            self.writer = Writer(
                connection, turns, lock, clock, prepare=self.do_due,
                finish=self.tell_children, committed=self.committed,
            )
            undo.callback(self.writer.close)
            with self.writer.transaction(self.renew_all) as tx:
                made = self.own_number(tx, "jobix")
                self.jobix = made if jobix is None else jobix
                self.reading_jobix = self.own_number(tx, "reading jobix")
            undo.pop_all()

    def wake_all(self):
        """Answer the long polls, now and from now on."""
        self.ending.set()
        self.wait_queue.close()

    def close(self):
        """Answer who waits, end the last commit, close the database."""
        self.wake_all()
        if self.ticker:
            self.ticker.join()
        self.readers.close()
        self.writer.close()
        self.lock.close()

    def admit(self, jobix):
        """Return the jobix that a caller's stands for, and if it only reads.

        Any may come in, or the own ones alone: else Error 403.
        """
        given = str(jobix)
        if secrets.compare_digest(given, str(self.reading_jobix)):
            return self.jobix, True
        own = secrets.compare_digest(given, str(self.jobix))
        if not (own or self.open_to_all):
            raise Error(403, "This server doesn't take that jobix.")
        return jobix, False

    def committed(self, freed):
        """Wake long polls for the jobs that a commit has set free."""
        for key, n in freed.items():
            self.wait_queue.wake(key, n)

    def renew_all(self, tx):
        """Give every live lease its full time again, as a server starts."""
        tx.execute(SQL.RENEW_ALL, {"now": tx.now})

    def own_number(self, tx, name):
        """Return a jobix that belongs to this database; make it at first.

        It is kept as text: what is secret is no number to compute with.
        """
        made = str(secrets.randbelow(MAX_JOBIX) + 1)
        tx.execute(SQL.KEEP_SETTING, {"name": name, "value": made})
        kept = tx.execute(SQL.SETTING, {"name": name}).fetchone()
        return int(kept["value"])

    # How a job moves

    def move(self, tx, job, **after):
        """Move `job` (a row of MOVABLE) to what `after` says of it.

        Unless it says otherwise the job's claim, lease and time to come end
        and its time in the stage begins now. Returns the job as it is then.
        Those that wait for it are told before the commit.
        """
        values = dict(
            job, since=tx.now, due=None, lease=None, claim=None, blame=None,
            old_stage=job["stage"], old_state=job["state"],
            old_claim=job["claim"],
        )
        values.update(after)
        values["free"] = lane(values["state"], values["lease"])
        tx.move(job, values)
        if job["followed"]:
            if known_end(job["state"]) != known_end(values["state"]):
                tx.execute(SQL.UNSETTLE, job)
                tx.unsettled = True
        return values

    def resting(self, tx, job, stage):
        """Return what becomes of a job that comes to rest in `stage`.

        A dict of its stage, state and whom to blame for that.
        """
        state, blame = stage_state(stage, job["final"]), None
        if job["missing"] and state == "waiting":
            culprit = tx.execute(SQL.CULPRIT, job).fetchone()
            blame = culprit and culprit["jobid"]
            state = "blocked" if blame is None else "aborted"
        return {"stage": stage, "state": state, "blame": blame}

    # Jobs wait for others

    def tell_children(self, tx):
        """Let those who wait for a job know that it is done, or won't be.

        Of up to CHUNK jobs; the rest when a tick comes to it.
        """
        left = CHUNK
        while left > 0:
            unsettled = tx.execute(SQL.UNSETTLED).fetchone()
            if unsettled is None:
                break
            parent = tx.execute(SQL.BY_ROW, unsettled).fetchone()
            known = known_end(parent["state"])
            other, another = {0, 1, 2} - {known}
            children = tx.execute(SQL.CHILDREN, {
                "parent": parent["row"], "other": other, "another": another,
                "limit": left,
            }).fetchall()
            for child in children:
                self.tell(tx, child, known)
            if len(children) < left:
                tx.execute(SQL.SETTLED, unsettled)
            left -= 1 + len(children)

    def tell(self, tx, child, known):
        """Let one child know of the end of one parent, see known_end()."""
        tx.execute(SQL.KNOW, {"place": child["place"], "known": known})
        more = (child["known"] == 1) - (known == 1)
        if more:
            tx.execute(SQL.MISS, {"row": child["row"], "more": more})
        job = tx.execute(SQL.BY_ROW, {"row": child["row"]}).fetchone()
        if job["state"] in ("waiting", "blocked", "aborted"):
            self.move_to_rest(tx, job)

    def move_to_rest(self, tx, job):
        """Move a job to how it should be where it stands, if it isn't so."""
        after = self.resting(tx, job, job["stage"])
        if any(after[name] != job[name] for name in after):
            self.move(tx, job, **after)

    def follow(self, tx, jobix, jobid, parents):
        """Let a new job wait for others; or Error 400 without one of them."""
        child = tx.find(jobix, jobid)["row"]
        for i in range(0, len(parents), len(TOGETHER)):
            some = parents[i : i + len(TOGETHER)]
            padded = some + some[-1:] * (len(TOGETHER) - len(some))
            values = dict(zip(TOGETHER, padded), jobix=jobix, child=child)
            if tx.execute(SQL.FOLLOW, values).rowcount != len(some):
                lost = next(i for i in some if tx.find(jobix, i) is None)
                raise Error(400, "Job %d waits for job %d, which isn't there."
                            % (jobid, lost))
            tx.execute(SQL.FOLLOWED, values)
        tx.execute(SQL.MISSING, {"row": child})
        self.move_to_rest(tx, tx.find(jobix, jobid))

    def end_attempt(self, tx, job, outcome, *, target=None, report=None):
        """Write down how the attempt ended that `job`'s claim stands for."""
        if job["claim"] is None:
            return
        values = dict(job, now=tx.now, outcome=outcome, target=target)
        values.update(BLANK_REPORT)
        values.update(report or {})
        took = values["seconds"]
        if not (job["lapses"] and self.mend_attempt(tx, values)):
            tx.put_off(SQL.END_ATTEMPT, values)
            took = tx.now - job["since"] if took is None else took
        bucket = None
        if outcome == "done" and took is not None:
            bucket = run_bucket(took)
        key = job["jobix"], job["origin"], outcome
        tx.spend(key, took or 0, bucket=bucket)

    def mend_attempt(self, tx, ending):
        """Let an attempt that had lapsed end otherwise; return if it had."""
        lapsed = tx.execute(SQL.LAPSED, ending).fetchone()
        if lapsed:
            tx.execute(SQL.MEND_ATTEMPT, ending)
            key = ending["jobix"], ending["origin"], "mended"
            tx.spend(key, lapsed["seconds"])
        return lapsed is not None

    def replace(self, tx, job, given):
        """Give `job` the columns `given`; its attempt keeps the old ones."""
        new = {"new_" + name: name in given for name in REPLACED}
        if job["claim"] is not None:
            tx.put_off(SQL.KEEP, dict(job, **new))
        values = dict(dict.fromkeys(REPLACED), row=job["row"])
        tx.put_off(SQL.REPLACE, dict(values, **given))

    def cut_off(self, tx, job, outcome):
        """Write down that `job`, if somebody works on it, is taken away."""
        if job["state"] == "working":
            self.end_attempt(tx, job, outcome)

    def find(self, tx, jobix, jobid):
        """Return the job's row; raise Error 404 when there is none."""
        job = tx.find(jobix, jobid)
        if job is None:
            raise Error(404, "There is no job %d." % jobid)
        return job

    def do_due(self, tx):
        """Let lapse the leases, and end the delays, whose time has come."""
        for due in tx.select(SQL.DUE, {"now": tx.now, "limit": CHUNK}):
            job = self.find(tx, **due)
            if job["state"] == "working":
                self.lapse(tx, job)
            else:
                after = self.resting(tx, job, job["stage"])
                self.move(tx, job, since=job["since"], **after)

    def lapse(self, tx, job):
        """Take a job back from a worker that was not heard of in time.

        The claim stays: until somebody else has the job its late result is
        taken.
        """
        lapses, claim, report = job["lapses"] + 1, job["claim"], {}
        after = self.resting(tx, job, job["origin"])
        if lapses >= self.max_lapses:
            after.update(state="failed", blame=None)
            report["error"] = LAPSES_SPENT % lapses
        if after["state"] in PUT_ASIDE:
            claim = None
        self.end_attempt(tx, job, "lapsed", report=report)
        self.move(tx, job, claim=claim, lapses=lapses, **after)

    # Jobs come in

    @change
    def set(self, tx, jobix, ids, jobs):
        """Add jobs with these ids; leave existing ones. See read_jobs."""
        self.add(tx, jobix, ids, jobs)

    def add(self, tx, jobix, ids, jobs):
        """Insert jobs and count those that are new."""
        if not ids:
            return
        final = self.final_stage(tx, jobix)
        jobs = dict(jobs, jobix=jobix, jobid=ids, since=tx.now)
        after = jobs.pop("after")
        following = {
            jobid: parents for jobid, parents in zip(ids, after or ())
            if parents and tx.find(jobix, jobid) is None
        }
        jobs["blocked"] = bool(following) and [i in following for i in ids]
        keys = "jobstage", "laststage", "blocked"
        for (stage, last, blocked), some in split(jobs, *keys):
            state = stage_state(stage, final if last is None else last)
            if blocked and state == "waiting":
                state = "blocked"
            free = lane(state, None)
            n = tx.insert(SQL.ADD, dict(some, state=state, free=free))
            tx.count("jobs", (jobix, stage, state), n)
            if free > 0:
                tx.count("free", (jobix, stage), n)
        for jobid, parents in following.items():
            self.follow(tx, jobix, jobid, parents)

    def final_stage(self, tx, jobix):
        """Return the last stage that /init named, or None."""
        row = tx.execute(SQL.LASTSTAGE, {"jobix": jobix}).fetchone()
        return row and row["laststage"]

    @change
    def submit(self, tx, jobix, submissions, jobs):
        """Add jobs under ids that the server gives.

        `submissions` is a list of (key, number of jobs). Returns a range of
        ids for each; a key that was there before has its ids from then and
        adds nothing.
        """
        last = tx.execute(SQL.LAST_JOBID, {"jobix": jobix}).fetchone()[0]
        first = start = last + 1
        if any(max(parents or [0]) > last for parents in jobs["after"] or ()):
            raise Error(400, "A job can't wait for jobs that aren't there.")
        given, new, place = [], [], 0
        for key, n in submissions:
            ids = self.known_ids(tx, jobix, key)
            if ids is None:
                ids = self.new_ids(tx, jobix, key, first, n)
                first = ids.stop
                new += range(place, place + n)
            place += n
            given.append(ids)
        self.add(tx, jobix, list(range(start, first)), pick(jobs, new))
        return given

    def known_ids(self, tx, jobix, key):
        """Return the range of ids that `key` had before, None if it's new."""
        values = {"jobix": jobix, "key": key}
        known = tx.execute(SQL.SUBMISSION, values).fetchone()
        if known is None:
            return None
        return range(known["first"], known["first"] + known["jobs"])

    def new_ids(self, tx, jobix, key, first, jobs):
        """Give `key` a range of ids, from `first` on; or Error 409."""
        if first + jobs - 1 > MAX_JOBID:
            raise Error(409, "The numbers of jobs are used up.")
        values = {"jobix": jobix, "key": key, "first": first, "jobs": jobs}
        tx.execute(SQL.KEEP_SUBMISSION, values)
        return range(first, first + jobs)

    # Jobs are claimed, and what becomes of the claim

    @change
    def claim(self, tx, jobix, stages, *, target=None, n=1, **lent):
        """Claim up to `n` free jobs, of the first of `stages` first.

        A job moves to the stage `target`, else one up. `lent` has `worker`
        (a name or None) and `lease` (seconds or None). Returns the jobs as
        they are in the claim, dicts with the columns of SQL.FREE.
        """
        free = []
        for stage in dict.fromkeys(stages):
            free += tx.next_free(jobix, stage, n - len(free))
        tokens = secrets.token_urlsafe(9 * len(free))  # 12 characters each
        return [
            self.hand_out(
                tx, job, job["stage"] + 1 if target is None else target,
                tokens[12 * i : 12 * i + 12], **lent
            )
            for i, job in enumerate(free)
        ]

    def hand_out(self, tx, job, target, claim, *, worker, lease):
        """Move one free job into the hands of a new `claim`; return it so."""
        self.cut_off(tx, job, "superseded")  # claimed without a lease
        fresh = job["state"] == "working" and job["stage"] != job["origin"]
        waited = max(0, tx.now - job["since"])
        key = job["jobix"], job["stage"], "claimed"
        tx.spend(key, waited, bucket=run_bucket(waited))
        if not fresh and job["attempt"]:
            tx.spend((*key[:2], "again"), waited)
        return self.move(
            tx, job,
            stage=target,
            state="working",
            due=None if lease is None else tx.now + lease,
            lease=lease,
            origin=job["stage"],
            held=target,
            claim=claim,
            worker=worker,
            attempt=1 if fresh else job["attempt"] + 1,
            failures=0 if fresh else job["failures"],
            lapses=0 if fresh else job["lapses"],
        )

    @change
    def update_job(self, tx, jobix, jobid, stage, **given):
        """Put a job into `stage`: its attempt, if any, is done.

        `given` may have `claim` (then Error 409 and no change when it isn't
        the job's any more), `report`, and `filename`, `jobcmd` and `files`,
        which replace the job's where they aren't None. Raises Error 404 when
        there is no such job.
        """
        self.update(tx, jobix, jobid, stage, **given)

    def update(
        self, tx, jobix, jobid, stage, *, claim=None, report=None, **given
    ):
        """Do what update_job says, as a part of an operation."""
        job = self.find(tx, jobix, jobid)
        if self.settled(tx, job, claim, "done", stage):
            return
        self.end_attempt(tx, job, "done", target=stage, report=report)
        given = {k: text for k, text in given.items() if text is not None}
        if given:
            self.replace(tx, job, given)
        after = self.resting(tx, job, stage)
        self.move(tx, job, attempt=0, failures=0, lapses=0, **after)
        if after["state"] == "done" != job["state"]:
            tx.count("done", jobix)

    def settled(self, tx, job, claim, outcome, target=None):
        """Return whether the attempt of `claim` has ended this way before.

        Then the call is a repetition, whose first reply was lost. Raises
        Error 409 when the claim is no longer the job's. None stands for
        whatever claim is current.
        """
        if claim is None or claim == job["claim"]:
            return False
        key = {"row": job["row"], "claim": claim}
        ended = {"outcome": outcome, "target": target}
        if ended in tx.select(SQL.ATTEMPT, key):
            return True
        raise Error(409, "Job %d is no longer yours." % job["jobid"])

    @change
    def update_jobs(self, tx, jobix, updates):
        """Do many updates; return their statuses, 200, 404 or 409 each.

        `updates` is a list of dicts of what update_job takes.
        """
        statuses = []
        for i in range(0, len(updates), len(TOGETHER)):
            part = updates[i : i + len(TOGETHER)]
            tx.look_up(jobix, [update["jobid"] for update in part])
            statuses += [self.status_of(tx, jobix, each) for each in part]
        return statuses

    def status_of(self, tx, jobix, update):
        """Do one of many updates; return its status."""
        try:
            self.update(tx, jobix, **update)
        except Error as error:
            return error.status
        return 200

    @change
    def fail_job(self, tx, jobix, jobid, *, claim=None, report=None):
        """Put a job back where it was claimed: delayed, at last failed.

        Exit status 75 says that it should be tried later: that isn't counted
        as a failure. Returns the job's state, failures and delay in seconds.
        Errors as update_job's; 409 too when nobody has claimed the job.
        """
        job = self.find(tx, jobix, jobid)
        later = (report or {}).get("exit_code") == os.EX_TEMPFAIL
        outcome = "deferred" if later else "failed"
        if self.settled(tx, job, claim, outcome):
            return {
                "jobid": jobid, "state": job["state"],
                "failures": job["failures"], "delay": delay_left(job, tx.now),
            }
        self.need_claim(job)
        self.end_attempt(tx, job, outcome, report=report)
        failures = job["failures"] + (not later)
        limit = job["max_attempts"] or self.max_attempts
        state, delay = self.put_off(
            tx, job, stage=job["origin"], failures=failures,
            tries=job["attempt"] if later else failures,
            spent=not later and failures >= limit,
        )
        return {
            "jobid": jobid, "state": state, "failures": failures,
            "delay": delay,
        }

    def put_off(self, tx, job, *, tries, spent, **after):
        """Let a job wait, longer after more `tries`, or fail it when spent.

        Returns its state and the delay in seconds.
        """
        state, delay, due = "failed", 0, None
        if not spent:
            state, delay = "delayed", delay_after(tries)
            due = tx.now + delay
        self.move(tx, job, state=state, due=due, **after)
        return state, delay

    @change
    def reject_job(
        self, tx, jobix, jobid, *, claim=None, files=None, report=None
    ):
        """Send a job back to the stage that made its files: they are gone.

        Without `claim` it is for jobs that nobody works on; `files`, as JSON
        text, are those that the caller looked for. Returns the job's state,
        stage, rejections and delay in seconds. Errors as fail_job's; 409 too
        when the job has no files, or others.
        """
        job = self.find(tx, jobix, jobid)
        had = tx.execute(SQL.FILES, {"row": job["row"]}).fetchone()
        if self.settled(tx, job, claim, "rejected"):
            return {
                "jobid": jobid, "state": job["state"], "stage": job["stage"],
                "rejects": job["rejects"], "delay": delay_left(job, tx.now),
            }
        self.need_files(job, had, claim, files)
        if claim is not None:
            self.end_attempt(tx, job, "rejected", report=report)
        self.restore(tx, job, had["made"])
        rejects = job["rejects"] + 1
        state, delay = self.put_off(
            tx, job, stage=had["made"], rejects=rejects, tries=rejects,
            spent=rejects >= (job["max_attempts"] or self.max_attempts),
            attempt=0, failures=0, lapses=0,
        )
        return {
            "jobid": jobid, "state": state, "stage": had["made"],
            "rejects": rejects, "delay": delay,
        }

    def need_files(self, job, had, claim, files):
        """Raise Error 409 when `job` can't be sent back for its files."""
        if claim is None and job["state"] not in REJECTABLE:
            message = "Job %d is %s; only its worker can reject its files."
            raise Error(409, message % (job["jobid"], job["state"]))
        if had["files"] in (None, "[]") or had["made"] is None:
            message = "Job %d has no files that a stage could make again."
            raise Error(409, message % job["jobid"])
        if files not in (None, had["files"]):
            raise Error(409, "Job %d has other files now." % job["jobid"])

    def restore(self, tx, job, stage):
        """Give a job back what `stage` was given, as it returns there."""
        values = {"row": job["row"], "stage": stage}
        first = tx.execute(SQL.DONE_ATTEMPT, values).fetchone()[0]
        tx.execute(SQL.RESTORE, dict(values, first=first))

    @change
    def release_job(self, tx, jobix, jobid, *, claim=None):
        """Give a claim back unharmed; errors as fail_job's."""
        job = self.find(tx, jobix, jobid)
        if self.settled(tx, job, claim, "released"):
            return {"jobid": jobid, "state": job["state"]}
        self.need_claim(job)
        return {"jobid": jobid, "state": self.give_back(tx, job)}

    def give_back(self, tx, job):
        """Undo a claim; return the state that its job has then."""
        self.end_attempt(tx, job, "released")
        after = self.resting(tx, job, job["origin"])
        self.move(tx, job, attempt=job["attempt"] - 1, **after)
        return after["state"]

    def need_claim(self, job):
        """Raise Error 409 when nobody has claimed `job`."""
        if job["claim"] is None:
            raise Error(409, "Nobody has claimed job %d." % job["jobid"])

    @change
    def heartbeat(self, tx, jobix, *, claims, lease, worker):
        """Renew `claims`, a list of (jobid, token), for `lease` seconds.

        `worker` is what it says of itself: the columns of its table, and
        whether it has `ended`. Returns a list of the jobids whose claim is
        lost, and whether it should drain.
        """
        worker = dict(worker, jobix=jobix, heard=tx.now)
        self.count_idle(tx, worker)
        if worker["ended"] and worker["quarantine"] is None:
            tx.execute(SQL.ENDED, worker)
        else:
            tx.add(SQL.HEARD, SQL.HEARD_FIRST, worker)
        drained = tx.execute(SQL.DRAINED, worker).fetchone()
        lost = []
        for jobid, claim in claims:
            job = tx.find(jobix, jobid)
            if job is None or job["claim"] != claim:
                lost.append(jobid)
            else:
                self.renew(tx, job, lease)
        return lost, drained is not None

    def count_idle(self, tx, worker):
        """Count how long a worker's slots were idle since it was heard of.

        That goes to the first of its stages. One that was silent for long
        was not there.
        """
        before = tx.execute(SQL.WORKER, worker).fetchone()
        if before and None not in tuple(before):
            stages, silent = from_json(before["stages"]), \
                worker["heard"] - before["heard"]
            idle = (before["slots"] - before["busy"]) * silent
            if stages and 0 <= silent <= AWAY_AFTER and idle > 0:
                tx.spend((worker["jobix"], stages[0], "idle"), idle, 0)

    def renew(self, tx, job, lease):
        """Give a claim more time, also one that lapsed and nobody took."""
        due = tx.now + lease
        if job["state"] == "working":
            values = dict(job, due=due, lease=lease)
            values["free"] = lane("working", lease)
            tx.execute(SQL.RENEW, values)
        else:
            self.move(
                tx, job, stage=job["held"], state="working",
                claim=job["claim"], due=due, lease=lease,
            )

    # Workers are drained, stages paused

    @change
    def drain(self, tx, jobix, name, *, drain):
        """Tell a worker at its next heartbeat to claim no more, or again.

        Raises Error 404 when no worker of that name was heard of.
        """
        values = {"jobix": jobix, "name": name, "drain": int(drain)}
        if not tx.execute(SQL.DRAIN, values).rowcount:
            raise Error(404, "There is no worker %s." % name)

    @change
    def pause(self, tx, jobix, stage, *, paused):
        """Hand out nothing of a stage any more, or again."""
        key = {"jobix": jobix, "stage": stage}
        tx.execute(SQL.PAUSE if paused else SQL.RESUME, key)
        if not paused:  # wake as many as there can be jobs for
            free = tx.execute(SQL.ANY_FREE, key).fetchall()
            tx.count("free", (jobix, stage), len(free))

    # Lifetimes

    @query
    def lifetimes(self, execute, jobix):
        """Return {stage: minutes} of a jobix."""
        return dict(execute(SQL.LIFETIMES, {"jobix": jobix}).fetchall())

    @change
    def init(self, tx, jobix, minutes):
        """Set the lifetimes of stages 0 … n, and n as the last stage.

        Only if the jobix has no lifetime yet. Returns {stage: minutes} as
        they are in force.
        """
        key = {"jobix": jobix}
        if tx.execute(SQL.LIFETIMES, key).fetchone() is None:
            for stage, value in enumerate(minutes):
                values = dict(key, stage=stage, minutes=value)
                tx.execute(SQL.SET_LIFETIME, values)
            key["laststage"] = len(minutes) - 1
            tx.execute(SQL.SET_LASTSTAGE, key)
            for job in tx.execute(SQL.NEWLY_DONE, key).fetchall():
                self.move(tx, job, state="done", since=job["since"])
        return dict(tx.execute(SQL.LIFETIMES, key).fetchall())

    @query
    def lifetime(self, execute, jobix, stage):
        """Return the lifetime of a stage in minutes, 0 when it has none."""
        key = {"jobix": jobix, "stage": stage}
        row = execute(SQL.LIFETIME, key).fetchone()
        return row["minutes"] if row else 0

    @change
    def set_lifetime(self, tx, jobix, stage, minutes):
        """Set the lifetime of a stage; unmark the jobs that it now covers."""
        values = {"jobix": jobix, "stage": stage, "minutes": minutes}
        tx.execute(SQL.SET_LIFETIME, values)
        values["before"] = tx.now - minutes * 60 if minutes else 0
        self.mark(tx, SQL.OUT_OF_DATE, SQL.UNFLAG, values, -1)

    def mark(self, tx, affected, update, values, sign):
        """Set or clear the mark `expired` of a range of jobs; count them."""
        for row in tx.execute(affected, values).fetchall():
            key = values["jobix"], values["stage"], row["state"]
            tx.count("expired", key, sign * row["jobs"])
        tx.execute(update, values)

    def flag(self, tx, jobix, stage, minutes):
        """Flag every job of a stage that is over its lifetime."""
        before = tx.now - minutes * 60
        values = {"jobix": jobix, "stage": stage, "before": before}
        self.mark(tx, SQL.OVERDUE, SQL.FLAG, values, 1)

    def flag_all(self, tx, jobix):
        """Flag every job that is over its lifetime; return the stages."""
        rows = tx.execute(SQL.LIFETIMES, {"jobix": jobix}).fetchall()
        for row in rows:
            if row["minutes"]:
                self.flag(tx, jobix, row["stage"], row["minutes"])
        return [row["stage"] for row in rows if row["minutes"]]

    @change
    def check_stages(self, tx, jobix):
        """Flag what has expired; return whether nothing is flagged."""
        keys = [
            {"jobix": jobix, "stage": stage}
            for stage in self.flag_all(tx, jobix)
        ]
        return not any(
            tx.execute(SQL.ANY_EXPIRED, key).fetchone() for key in keys
        )

    @change
    def move_expired(self, tx, jobix, old, new):
        """Flag what has expired, then move the flagged of stage `old`.

        Failed, cancelled and aborted jobs stay: only a retry brings them
        back. Returns whether nothing was flagged in `old`, and how many
        jobs moved.
        """
        self.flag_all(tx, jobix)
        key = {"jobix": jobix, "stage": old}
        flagged = tx.execute(SQL.EXPIRED, key).fetchall()
        moving = [job for job in flagged if job["state"] not in PUT_ASIDE]
        for job in moving:
            self.cut_off(tx, job, "expired")
            after = self.resting(tx, job, new)
            self.move(tx, job, attempt=0, failures=0, lapses=0, **after)
        return not flagged, len(moving)

    # Jobs are retried, cancelled, released, forgotten

    def retry(self, jobix, **selector):
        """Put ended jobs back where they were claimed, budgets fresh.

        `selector` has `ids`, or `stage` and `state`, None for any. Returns
        how many; raises Error 404 when one of `ids` doesn't exist.
        """
        return self.sweep(jobix, self.put_back, RETRIABLE, **selector)

    def cancel(self, jobix, **selector):
        """Cancel whatever isn't done; selector and result as retry's."""
        return self.sweep(jobix, self.call_off, CANCELLABLE, **selector)

    def release(self, jobix, **selector):
        """Give claims back unharmed; selector and result as retry's."""
        return self.sweep(jobix, self.let_go, ("working",), **selector)

    def forget(self, jobix, **selector):
        """Delete done jobs; selector and result as retry's."""
        return self.sweep(jobix, self.delete, ("done",), **selector)

    def sweep(self, jobix, act, states, *, ids=None, stage=None, state=None):
        """Do `act` to the selected jobs in one of `states`; count them.

        A few thousand in a commit, so that nobody else waits long.
        """
        if state is not None:
            states = [known for known in states if known == state]
        wanted = {"states": states, "stage": stage}
        if ids is not None:
            return self.sweep_ids(jobix, act, ids, **wanted)
        found = self.ids_in(jobix, **wanted)
        return sum(
            self.sweep_ids(jobix, act, found[i : i + CHUNK], **wanted)
            for i in range(0, len(found), CHUNK)
        )

    @query
    def ids_in(self, execute, jobix, *, states, stage):
        """Return the ids of all jobs in `states` and a stage, None: any."""
        return self.ids(execute, jobix, states, stage)

    def ids(self, execute, jobix, states, stage):
        """Return what ids_in does, within an operation."""
        return [
            row["jobid"]
            for group in self.groups(execute, jobix, states, stage)
            for row in execute(SQL.GROUP, group)
        ]

    def groups(self, execute, jobix, states, stage):
        """Return the groups of jobs in `states` and a stage, None: any.

        They are dicts of jobix, stage, state, and how many `jobs` and
        `expired`.
        """
        rows = execute(SQL.TALLY, {"jobix": jobix}).fetchall()
        return [
            dict(row, jobix=jobix)
            for row in rows
            if row["state"] in states and stage in (None, row["stage"])
        ]

    @change
    def sweep_ids(self, tx, jobix, act, ids, *, states, stage):
        """Do `act` to those of the jobs `ids` that fit; count them."""
        jobs = [self.find(tx, jobix, jobid) for jobid in ids]
        return sum(
            act(tx, job)
            for job in jobs
            if job["state"] in states and stage in (None, job["stage"])
        )

    @change
    def limit_attempts(self, tx, jobix, ids, attempts):
        """Give jobs another number of failures that they may have."""
        for jobid in ids:
            key = {"jobix": jobix, "jobid": jobid, "attempts": attempts}
            tx.execute(SQL.LIMIT_ATTEMPTS, key)

    def put_back(self, tx, job):
        """Let an ended job run again; return how many did: 1 or 0."""
        stage = job["origin"] if job["state"] == "done" else job["stage"]
        if stage is None:  # nobody ever claimed it
            return 0
        after = self.resting(tx, job, stage)
        if after["state"] == "aborted" == job["state"]:
            return 0  # it comes back with the job that it waits for
        if job["state"] == "done":
            self.restore(tx, job, stage)
        self.move(
            tx, job, attempt=0, failures=0, lapses=0, rejects=0, **after)
        return 1

    def call_off(self, tx, job):
        """Cancel a job, in the stage that it was claimed from; return 1."""
        working = job["state"] == "working"
        self.cut_off(tx, job, "cancelled")
        stage = job["origin"] if working else job["stage"]
        self.move(tx, job, stage=stage, state="cancelled")
        return 1

    def let_go(self, tx, job):
        """Take a job from who works on it; return 1."""
        self.give_back(tx, job)
        return 1

    def delete(self, tx, job):
        """Delete a done job; return 0 if another doesn't know of its end yet.
        """
        if job["followed"] and tx.execute(SQL.WAITED_ON, job).fetchone():
            return 0
        for statement in (SQL.FORGET_ATTEMPTS, SQL.FORGET_PARENTS,
                          SQL.FORGET_CHILDREN, SQL.SETTLED, SQL.FORGOTTEN,
                          SQL.FORGET):
            tx.execute(statement, job)
        group = job["jobix"], job["stage"], job["state"]
        tx.count("jobs", group, -1)
        tx.count("expired", group, -job["expired"])
        return 1

    # What there is

    @query
    def status(self, execute, jobix):
        """Return the figures of a jobix: see GET /status in README."""
        key = {"jobix": jobix}
        lifetimes = dict(execute(SQL.LIFETIMES, key).fetchall())
        stages = {}
        for row in execute(SQL.TALLY, key):
            stage = stages.setdefault(row["stage"], new_figures())
            for figures in (stage, stages.setdefault(None, new_figures())):
                figures["jobs"] += row["jobs"]
                figures["expired"] += row["expired"]
                figures["states"][row["state"]] += row["jobs"]
        totals = stages.pop(None, new_figures())
        runtimes = self.runtimes(execute, jobix)
        paused = {row["stage"] for row in execute(SQL.PAUSED, key)}
        for stage in paused.union(runtimes):
            stages.setdefault(stage, new_figures())
        rate = self.rate(execute, jobix)
        left = sum(totals["states"][state] for state in UNENDED)
        return {
            "version": __version__,
            "time": self.clock(),
            "stages": [
                dict(
                    figures, stage=stage, lifetime=lifetimes.get(stage, 0),
                    runtime=runtimes.get(stage), paused=stage in paused,
                )
                for stage, figures in sorted(stages.items())
            ],
            "totals": totals,
            "rate": rate,
            "seconds_left": left / rate if rate else None,
        }

    def runtimes(self, execute, jobix):
        """Return {stage: how long the commands of its attempts ran}."""
        stages = by_stage(execute(SQL.RUN_TIMES, {"jobix": jobix}))
        return {
            stage: quantiles(buckets, "attempts", "median", "p90")
            for stage, buckets in stages.items()
        }

    @query
    def stats(self, execute, jobix):
        """Return the time, and rows of EFFORTS, RUN_TIMES and WAIT_TIMES."""
        statements = SQL.EFFORTS, SQL.RUN_TIMES, SQL.WAIT_TIMES
        key = {"jobix": jobix}
        return (self.clock(), *(
            execute(sql, key).fetchall() for sql in statements))

    @query
    def metrics(self, execute):
        """Return the figures of all jobix together.

        Rows of ALL_JOBS, one of ALL_WORKERS, and then as stats().
        """
        key = {"since": self.clock() - AWAY_AFTER}
        return (
            execute(SQL.ALL_JOBS).fetchall(),
            execute(SQL.ALL_WORKERS, key).fetchone(),
            *(execute(sql).fetchall() for sql in (
                SQL.ALL_EFFORTS, SQL.ALL_RUN_TIMES, SQL.ALL_WAIT_TIMES)),
        )

    def rate(self, execute, jobix):
        """Return the jobs that became done a second, of late."""
        now = self.clock()
        minute = int(now // 60) - 1
        key = {"jobix": jobix, "minute": minute}
        done = execute(SQL.DONE_SINCE, key).fetchone()[0]
        return done / (now - minute * 60)

    @query
    def pace(self, execute, jobix, minutes):
        """Return how many attempts and jobs became done, as time went.

        Of the last `minutes`, None: of all. A dict: the `time`, `start` and
        `step` (seconds) of the points, and `updates` and `done` in each.
        """
        now = self.clock()
        this = int(now // 60)
        if minutes is None:
            key = {"jobix": jobix}
            first = execute(SQL.FIRST_MINUTE, key).fetchone()[0]
            minutes = 1 if first is None else max(1, this - first + 1)
        step = -(-minutes // PACE_POINTS)
        start = (this - minutes + 1) // step
        key = {"jobix": jobix, "minute": start * step, "step": step}
        points = this // step - start + 1
        pace = {"updates": [0] * points, "done": [0] * points}
        for row in execute(SQL.PACES, key):
            if row["point"] - start < points:  # the clock may go back
                pace["updates"][row["point"] - start] = row["updates"]
                pace["done"][row["point"] - start] = row["done"]
        return dict(pace, time=now, start=start * step * 60, step=step * 60)

    @query
    def job(self, execute, jobix, jobid):
        """Return a job, whom it waits for, and a list of its last attempts.

        Jobs and attempts are dicts in the columns of their tables, whom it
        waits for is a list of some ids. None where there is no such job.
        """
        key = {"jobix": jobix, "jobid": jobid}
        job = execute(SQL.SHOWN_JOB, key).fetchone()
        if job is None:
            return None
        key = {"row": job["row"], "limit": ATTEMPTS_SHOWN}
        waits_for = [jobid for jobid, in execute(SQL.WAITED_FOR, key)]
        return dict(job), waits_for, self.attempts(execute, **key)

    def attempts(self, execute, row, limit):
        """Return a list of a job's last attempts, the oldest first."""
        if not limit:
            return []
        key = {"row": row, "limit": limit}
        return [dict(row) for row in execute(SQL.ATTEMPTS, key)][::-1]

    @query
    def jobs(
        self, execute, jobix, *, order, after, limit, stage, state, attempts=0
    ):
        """Return a page of jobs and the place to go on from, None at the end.

        `order` is by `id` or `time` in their stage, the longest first; a
        place, None at first, is an id or a tuple (since, id). Jobs are those
        of a stage and a state (`expired` for the marked), None for any. A
        page has up to `limit` pairs of a job and a list of its last
        `attempts`, fewer when they are large.
        """
        find = self.places_by_id if order == "id" else self.places_by_time
        places = find(execute, jobix, stage, state, after, limit + 1)
        jobs, size = [], 0
        for place in places[:limit]:
            jobid = place if order == "id" else place[1]
            key = {"jobix": jobix, "jobid": jobid}
            job = dict(execute(SQL.SHOWN_JOB, key).fetchone())
            last = self.attempts(execute, job["row"], attempts)
            jobs.append((job, last))
            size += sum(len(job[name] or "") for name in JSON_COLUMNS)
            size += sum(
                len(attempt[name] or "")
                for attempt in last for name in ("error", "stderr"))
            if size > PAGE_TEXT:
                break
        return jobs, place if len(jobs) < len(places) else None

    def places_by_id(self, execute, jobix, stage, state, after, limit):
        """Return up to `limit` ids that follow `after`, in order."""
        key = {"jobix": jobix, "after": after, "limit": limit}
        if after is None:
            key["after"] = -1
        if stage is None and state is None:
            return [row["jobid"] for row in execute(SQL.PAGE, key)]
        if state == "expired":
            pages = self.expired_pages(execute, stage, key)
        else:
            pages = self.group_pages(execute, stage, state, key)
        return sorted(jobid for page in pages for jobid, in page)[:limit]

    def expired_pages(self, execute, stage, key):
        """Yield a page of the expired jobs of each group."""
        for group in self.groups(execute, key["jobix"], STATES, stage):
            if group["expired"]:
                yield execute(SQL.EXPIRED_PAGE, dict(group, **key))

    def group_pages(self, execute, stage, state, key):
        """Yield a page of each group of jobs, lane and priority there is."""
        states = STATES if state is None else (state,)
        for group in self.groups(execute, key["jobix"], states, stage):
            for lane in lanes(group["state"]):
                part = dict(group, lane=lane, priority=2**31, **key)
                for _ in range(PRIORITIES_MERGED):
                    found = execute(SQL.NEXT_PRIORITY, part).fetchone()
                    part["priority"] = found[0]
                    if found[0] is None:
                        break
                    yield execute(SQL.GROUP_PAGE, part)
                else:
                    part["priority"] -= 1
                    yield execute(SQL.REST_PAGE, part)

    def places_by_time(self, execute, jobix, stage, state, after, limit):
        """Return up to `limit` pairs (since, id) that follow `after`."""
        marked = state == "expired"
        states = STATES if marked or state is None else (state,)
        since, jobid = after or (-1, -1)
        places = []
        for group in self.groups(execute, jobix, states, stage):
            for expired in range(int(marked), 1 + bool(group["expired"])):
                key = dict(group, expired=expired, since=since, after=jobid)
                places += self.places_after(execute, key, limit)
        return sorted(places)[:limit]

    def places_after(self, execute, key, limit):
        """Return up to `limit` pairs (since, id) of one range of job_age."""
        found = execute(SQL.SAME_AGE, dict(key, limit=limit)).fetchall()
        rest = dict(key, limit=limit - len(found))
        found += execute(SQL.YOUNGER, rest).fetchall()
        return [tuple(place) for place in found]

    @query
    def workers(self, execute, jobix, *, within):
        """Return the time, and the workers heard `within` so many seconds.

        They are dicts in the columns of the table, the latest first.
        """
        now = self.clock()
        key = {"jobix": jobix, "since": now - within}
        rows = execute(SQL.WORKERS, key).fetchall()
        texts = ", ".join(row["stages"] or "null" for row in rows)
        return now, [
            dict(row, stages=stages, drain=bool(row["drain"]))
            for row, stages in zip(rows, from_json("[%s]" % texts))
        ]

    @query
    def failures(self, execute, jobix):
        """Return how many jobs are failed, and those failed of late.

        The latter are rows with jobid, stage, exit_code, error, stderr,
        worker and host, at most FAILURES_READ.
        """
        failed, places = 0, []
        for group in self.groups(execute, jobix, ("failed",), None):
            failed += group["jobs"]
            for expired in (0, 1):
                key = dict(group, expired=expired, limit=FAILURES_READ)
                places += map(tuple, execute(SQL.LATEST, key))
        keys = (
            {"jobix": jobix, "jobid": jobid}
            for _, jobid in sorted(places, reverse=True)[:FAILURES_READ]
        )
        return failed, [execute(SQL.LAST_END, key).fetchone() for key in keys]

    @query
    def some_failed(self, execute, jobix, *, limit):
        """Return some failed jobs: jobid, jobcmd, and how they ended."""
        ids = self.ids(execute, jobix, ("failed",), None)
        keys = [{"jobix": jobix, "jobid": i} for i in sorted(ids)[:limit]]
        return [execute(SQL.LAST_ATTEMPT, key).fetchone() for key in keys]

    @query
    def health(self, execute):
        """Read one row; raise sqlite3.Error when the database is ill."""
        execute(SQL.SETTING, {"name": "jobix"}).fetchone()

    # What happens by itself

    def keep_ticking(self):
        """Start a thread that does what is due, about once a second."""
        self.ticker = threading.Thread(target=self.tick_on, daemon=True)
        self.ticker.start()

    def tick_on(self):
        """Tick until the Store is closed."""
        while not self.ending.wait(self.TICK[self.shared]):
            with contextlib.suppress(Error, sqlite3.Error):
                self.tick()  # a full disk: once more at the next tick

    def tick(self):
        """Lapse leases, end delays, flag the expired, ring for others' jobs.

        Requests do the first two for themselves: a tick only wakes the long
        polls that wait for them, and keeps the figures true.
        """
        due, overdue = self.behind()
        while due or overdue:
            self.catch_up(overdue)
            due, overdue = self.behind()
        if self.shared:
            self.wake_for_others(self.wait_queue.keys())
        if self.keep_days is not None:
            self.prune_on()

    @query
    def behind(self, execute):
        """Return whether a job is due, and what stages have overdue jobs.

        Due is also one whose children don't know of its end.
        """
        now = self.clock()
        due = execute(SQL.NEXT_DUE).fetchone()[0]
        if execute(SQL.UNSETTLED).fetchone():
            due = now
        overdue = []
        for row in execute(SQL.ALL_LIFETIMES).fetchall():
            values = dict(row, before=now - row["minutes"] * 60)
            if execute(SQL.ANY_OVERDUE, values).fetchone():
                overdue.append(tuple(row))
        return due is not None and due <= now, overdue

    @change
    def catch_up(self, tx, overdue):
        """Flag in `overdue` stages; what is due was done as this began.

        And jobs that were left unsettled are settled as it ends.
        """
        tx.unsettled = True
        for jobix, stage, minutes in overdue:
            self.flag(tx, jobix, stage, minutes)

    @query
    def wake_for_others(self, execute, keys):
        """Wake long polls for jobs that another process has set free."""
        for jobix, stage in keys:
            key = {"jobix": jobix, "stage": stage}
            free = execute(SQL.ANY_FREE, key).fetchall()
            self.wait_queue.wake((jobix, stage), len(free))

    def prune_on(self):
        """Prune some more; once an hour look for whose time has come.

        A full disk raises, and the next call goes on from there.
        """
        now = self.clock()
        if not (self.ranges or 0 <= now - self.looked < PRUNE_EVERY):
            place = self.pruned, -1
            self.ranges = [(key, place) for key in self.ended_groups()]
            self.looked, self.pruned = now, now - self.keep_days * 86400
        while self.ranges:
            key, place = self.ranges[-1]
            place = self.prune(key, place, self.pruned)
            self.ranges.pop()
            if place:
                self.ranges.append((key, place))
                break  # until the next tick

    @query
    def ended_groups(self, execute):
        """Return the ranges of job_age of the jobs that are done with."""
        return [
            dict(group, expired=expired)
            for group in execute(SQL.ENDED_GROUPS).fetchall()
            for expired in (0, 1)
        ]

    @change
    def prune(self, tx, key, place, before):
        """Delete the spent attempts of jobs that came to their end `before`.

        Of some, after `place`; returns the place to go on from, or None.
        """
        since, jobid = place
        key = dict(key, since=since, after=jobid)
        places = [
            place for place in self.places_after(tx.execute, key, PRUNED)
            if place[0] < before
        ]
        for _, jobid in places:
            tx.execute(SQL.PRUNE, {"jobix": key["jobix"], "jobid": jobid})
        return places[-1] if len(places) == PRUNED else None


# -------------------------------------------------------------- requests ---


WHOLE_NUMBER = re.compile(r"-?[0-9]{1,25}")
DECIMAL = re.compile(r"[0-9]{1,10}\.[0-9]+")
CLAIM_TOKEN = re.compile(r"[\w-]{1,64}", re.A)


def number(text):
    """Return the integer or decimal number that `text` is, else `text`."""
    if WHOLE_NUMBER.fullmatch(text):
        return int(text)
    return float(text) if DECIMAL.fullmatch(text) else text


class Request:
    """What a front door makes of a call, whatever its protocol.

    `path` is percent-decoded, and its leading slashes count as one; `headers`
    have lower-case names. `receive()` returns the body, as bytes, which has
    `length` of them; without it there is none. `gone()` tells whether the
    caller has hung up.
    """

    def __init__(
        self, method, path, query, headers, receive, gone, length=0
    ):
        self.method = method
        self.path = re.sub("^/+", "/", path)
        self.query = query
        self.headers = headers
        self.receive = receive
        self.loaded = not receive
        self.body = b""
        self.length = length
        self.gone = gone
        self.jobix = None
        self.readonly = False

    def identify(self, store):
        """Read `jobix`, the caller's namespace and secret; or Error 403.

        One that is only for reading stands for the jobix that it shows. A
        wrong one is refused after a pause, which slows down guessing.
        """
        jobix = number(self.headers.get("jobix", "").strip())
        if type(jobix) is not int or not 0 <= jobix <= MAX_JOBIX:
            raise Error(403, "The header jobix must hold your number.")
        try:
            self.jobix, self.readonly = store.admit(jobix)
        except Error:
            time.sleep(WRONG_JOBIX_PAUSE)
            raise

    def load(self):
        """Receive the body, if it is still to come; or Error."""
        if not self.loaded:
            try:
                self.body = self.receive()
            except OSError:  # the connection broke
                raise Error(400, "The body ended too early.") from None
            self.loaded = True

    def options(self, **kinds):
        """Return the query's values, read by `kinds`; None where missing.

        Raises Error 400 for one that isn't in `kinds`, stands twice or has
        a bad value.
        """
        given = parse_qsl(self.query, keep_blank_values=True)
        values = dict.fromkeys(kinds)
        for name, text in given:
            if name not in kinds:
                raise Error(400, "There is no option %.80r here." % name)
            if values[name] is not None:
                raise Error(400, "The option %s stands twice." % name)
            values[name] = kinds[name](text, name)
        return values

    def json(self):
        """Return the body's value; raise Error 400 when it has none."""
        return unpack(self.body)


class Response:
    """The answer to a Request: status, bytes, content type, headers."""

    def __init__(self, status, body, kind, headers=()):
        self.status = status
        self.body = body
        self.kind = kind
        self.more = [("Cache-Control", "no-store"), *headers]

    @property
    def headers(self):
        """The header lines, pairs of name and value."""
        if self.status == 304:  # says nothing of a body
            return self.more
        length = str(len(self.body))
        return [
            ("Content-Type", self.kind), ("Content-Length", length), *self.more
        ]

    @classmethod
    def json(cls, value, status=200, headers=()):
        """Answer with a JSON value."""
        return cls.json_text(to_json(value), status, headers)

    @classmethod
    def json_text(cls, text, status=200, headers=()):
        """Answer with a JSON value that is a text already."""
        return cls(status, text.encode("ascii"), "application/json", headers)

    @classmethod
    def text(cls, text):
        """Answer with a line of plain text."""
        return cls(200, text.encode(), "text/plain; charset=utf-8")


def in_text(reader):
    """Return `reader`, of JSON numbers, as one of numbers in a text."""
    return lambda text, name: reader(number(text), name)


def integer(low, high):
    """Return a reader of integers from `low` to `high`."""

    def read(value, name):
        if type(value) is not int or not low <= value <= high:
            message = "%s must be an integer from %d to %d."
            raise Error(400, message % (name, low, high))
        return value

    return read


def seconds(value, name):
    """Read a number of seconds, 0 to MAX_SECONDS, from JSON or a query."""
    if type(value) not in (int, float) or not 0 <= value <= MAX_SECONDS:
        message = "%s must be a number of seconds from 0 to %d."
        raise Error(400, message % (name, MAX_SECONDS))
    return value


def period(value, name):
    """Read a number of seconds that is more than 0."""
    if not seconds(value, name):
        raise Error(400, "%s must be more than 0 seconds." % name)
    return seconds(value, name)


def word(value, name):
    """Read a short name."""
    if type(value) is not str or not 0 < len(value) <= MAX_NAME:
        message = "%s must be a text of 1 to %d characters."
        raise Error(400, message % (name, MAX_NAME))
    return value


def clean(text):
    """Return `text` with what SQLite can't hold written as escapes."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def label(value, name):
    """Read a short name as SQLite can hold it."""
    return clean(word(value, name))


def remark(value, name):
    """Read a text of any length as SQLite can hold it, None when empty."""
    if type(value) is not str:
        raise Error(400, "%s must be a string." % name)
    return clean(value[:MAX_REPORT]) or None


def truth(value, name):
    """Read true or false."""
    if type(value) is not bool:
        raise Error(400, "%s must be true or false." % name)
    return value


def token(value, name):
    """Read a claim token."""
    if type(value) is not str or not CLAIM_TOKEN.fullmatch(value):
        raise Error(400, "%s must be a token of a claim." % name)
    return value


def string(value, name):
    """Read a string; return it as JSON text."""
    if type(value) is not str:
        raise Error(400, "%s must be a string." % name)
    return to_json(value)


def strings(value, name):
    """Read a list of strings; return it as JSON text."""
    if type(value) is not list or {type(item) for item in value} - {str}:
        raise Error(400, "%s must be a list of strings." % name)
    return to_json(value)


def anything(value, name):
    """Read any JSON value; return it as JSON text.

    Its depth is bounded: what this Python reads every other must read too.
    """
    text = to_json(value)
    long = len(text) > MAX_DEPTH
    if long and text.count("[") + text.count("{") > MAX_DEPTH:
        depth = 0
        for bracket in re.findall(r'"(?:[^"\\]|\\.)*"|[][{}]', text):
            depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(bracket, 0)
            if depth > MAX_DEPTH:
                raise Error(400, "%s is nested too deeply." % name)
    return text


SIZE = integer(0, 2**63 - 1)
STAGE = integer(0, MAX_STAGE)
JOBID = integer(0, MAX_JOBID)
MINUTES = integer(0, MAX_MINUTES)


def read_state(value, name):
    """Read the name of a state."""
    if value not in STATES:
        raise Error(400, "%s must be one of %s." % (name, ", ".join(STATES)))
    return value


def read_mark(value, name):
    """Read the name of a state, or that of the mark `expired`."""
    return value if value == "expired" else read_state(value, name)


def read_order(value, name):
    """Read what jobs are in order of."""
    if value not in ("id", "time"):
        raise Error(400, "%s must be id or time." % name)
    return value


def read_stages(text, name):
    """Read one stage or several with commas between."""
    return [STAGE(number(part), name) for part in text.split(",")]


def stages_served(value, name):
    """Read a list of stages; return it as JSON text."""
    if type(value) is not list:
        raise Error(400, "%s must be a list of stages." % name)
    return to_json([STAGE(stage, name) for stage in value])


def read_files(value, name):
    """Read a list of files as they were made; return it as JSON text."""
    keys = "path", "size", "sha256"
    if type(value) is not list or any(
        type(file) is not dict or set(file) != set(keys) for file in value
    ):
        message = "%s must be a list of objects with path, size and sha256."
        raise Error(400, message % name)
    for file in value:
        string(file["path"], "path")
        SIZE(file["size"], "size")
        digest = file["sha256"]
        if type(digest) is not str or not re.match("[0-9a-f]{64}\\Z", digest):
            raise Error(400, "sha256 must be 64 of 0-9 and a-f.")
    return to_json([{key: file[key] for key in keys} for file in value])


def parents(value, name):
    """Read a list of the jobids that a job waits for; None when empty."""
    if type(value) is not list:
        raise Error(400, "%s must be a list of jobids." % name)
    return list(dict.fromkeys(JOBID(jobid, name) for jobid in value)) or None


# What a job may carry in /set: each key with its reader.
CARRIES = {
    "jobstage": STAGE,
    "jobcmd": anything,
    "filename": string,
    "laststage": STAGE,
    "priority": integer(-(2**31), 2**31 - 1),
    "max_attempts": integer(1, 1000000),
    "timeout": period,
    "cwd": string,
    "outputs": strings,
    "after": parents,
}
BLANK = dict(dict.fromkeys(CARRIES), priority=0)
SIMPLE = {int, str, type(None)}  # of equals of one kind each is as the other

COUNT = integer(0, 2**53)
# What a worker may say of itself, each key with its reader.
ABOUT_WORKER = {
    "host": label,
    "stages": stages_served,
    "slots": COUNT,
    "busy": COUNT,
    "done": COUNT,
    "failed": COUNT,
    "quarantine": remark,
    "ended": truth,
}


def read_column(name, values):
    """Return what jobs have under a name, read: a list, or one for all."""
    reader, blank = CARRIES[name], BLANK[name]
    alike = set(map(type, values)) <= SIMPLE and values[1:] == values[:-1]
    read = [
        blank if value is None else reader(value, name)
        for value in (values[:1] if alike else values)
    ]
    return read[0] if alike else read


def read_jobs(entries):
    """Return jobs of /set as columns; raise Error 400 for a bad one.

    They are by their names, each a list, or a value that all jobs have.
    """
    if set(map(type, entries)) - {dict}:
        raise Error(400, "A job must be an object with its jobstage.")
    names = set().union(*entries)
    for name in sorted(names.difference(CARRIES)):
        raise Error(400, "A job can't carry %.80r." % name)
    given = {
        name: [entry.get(name) for entry in entries]
        for name in CARRIES if name in names
    }
    if entries and None in given.get("jobstage", [None]):
        raise Error(400, "A job's jobstage is missing.")
    jobs = dict(BLANK, **{
        name: read_column(name, values) for name, values in given.items()})
    if sum(map(len, filter(None, jobs["after"] or ()))) > MAX_JOBS:
        raise Error(413, "The jobs of a request may wait for %d others in all."
                    % MAX_JOBS)
    return jobs


def read_object(request, *required):
    """Return the JSON object in a request's body, {} when it is empty."""
    given = request.json() if request.body else {}
    if type(given) is not dict:
        raise Error(400, "The body must be a JSON object.")
    for name in required:
        if name not in given:
            raise Error(400, "%s is missing." % name)
    return given


def bounded(items):
    """Return `items`, of a request; raise Error 413 for too many."""
    if len(items) > MAX_JOBS:
        raise Error(413, "A request may have %d jobs." % MAX_JOBS)
    return items


def read_optional(given, name, reader):
    """Return `given[name]`, read; None when it is missing or null."""
    value = given.get(name)
    return None if value is None else reader(value, name)


def read_tail(value):
    """Return the end of a text as SQLite can hold it, None if it is none."""
    return clean(value[-MAX_REPORT:]) if type(value) is str else None


def read_status(value):
    """Return an exit status, None if it is none."""
    if type(value) is int:
        return max(-(2**31), min(value, 2**31))


def read_time(value):
    """Return a number of seconds, None if it is none."""
    with contextlib.suppress(Error):
        return seconds(value, "seconds")


# What an attempt's end may say of itself, each key with its reader.
REPORTS = {
    "exit_code": read_status,
    "error": read_tail,
    "stderr": read_tail,
    "seconds": read_time,
}
# What an update may bring, each key with its reader.
RESULTS = {"filename": string, "jobcmd": anything, "files": read_files}


def read_report(given):
    """Return what an attempt's end says of itself, as columns."""
    return {
        name: read(given[name])
        for name, read in REPORTS.items() if name in given
    }


def read_result(given):
    """Return what an update brings beside its stage."""
    result = {
        name: read(given[name], name)
        for name, read in RESULTS.items() if given.get(name) is not None
    }
    result["report"] = read_report(given)
    return result


# ------------------------------------------------------------- endpoints ---


def lifetimes(store, request):
    """Show the lifetimes in force."""
    return Response.json(store.lifetimes(request.jobix))


def init(store, request, *minutes):
    """Set the lifetimes of stages 0 … n where there are none yet."""
    return Response.json(store.init(request.jobix, minutes))


def need_order(ids, after):
    """Raise Error 400 where jobs wait for each other in a circle.

    `after` has for each of `ids` a list of those that it waits for, or None.
    """
    parents = {i: waited for i, waited in zip(ids, after) if waited}
    children, left = defaultdict(list), Counter()
    for child, waited in parents.items():
        for parent in waited:
            if parent in parents:
                children[parent].append(child)
                left[child] += 1
    ready = [jobid for jobid in parents if not left[jobid]]
    for jobid in ready:  # grows meanwhile
        for child in children[jobid]:
            left[child] -= 1
            if not left[child]:
                ready.append(child)
    if len(ready) < len(parents):
        jobid = min(set(parents).difference(ready))
        raise Error(400, "Job %d would wait for itself, or for one that does."
                    % jobid)


def set_jobs(store, request):
    """Add jobs, all or none."""
    given = bounded(read_object(request))
    jobs = read_jobs(list(given.values()))
    ids = [JOBID(number(jobid), "jobid") for jobid in given]
    if len(set(ids)) != len(ids):
        raise Error(400, "A jobid stands twice.")
    need_order(ids, jobs["after"] or ())
    store.set(request.jobix, ids, jobs)
    return Response.text("Accepted to %d!" % request.jobix)


def submit(store, request):
    """Add jobs under ids that the server gives."""
    given = read_object(request, "key", "jobs")
    if type(given["jobs"]) is not list:
        raise Error(400, "jobs must be a list.")
    jobs = read_jobs(bounded(given["jobs"]))
    key = to_json(word(given["key"], "key"))
    keys = [(key, len(given["jobs"]))]
    ids = store.submit(request.jobix, keys, jobs)[0]
    return Response.json({"ids": list(ids)})


def claim_in_time(store, request, stages, claim, wait):
    """Return what `claim()` gives; wait up to `wait` seconds for a job.

    Each round joins the queue before it looks, so that no job is missed.
    """
    queue, end = store.wait_queue, time.monotonic() + wait
    keys = {(request.jobix, stage) for stage in stages}
    jobs = claim()
    while not jobs and time.monotonic() < end:
        with queue.join(keys) as waiter:
            if waiter is None:  # too many wait, or the server stops
                break
            jobs = claim()
            if jobs or not waiter.wait(end - time.monotonic()):
                break
            if queue.closed or request.gone():
                break
            jobs = claim()
            waiter.used = not jobs or len(keys) == 1
    return jobs


def splice(values, texts):
    """Return, in JSON, an object of `values` and of `texts`, JSON already."""
    kept = "".join(', "%s": %s' % pair for pair in texts.items())
    return to_json(values)[:-1] + kept + "}"


CLAIMED = (
    '"jobid": %(jobid)d, "jobstage": %(origin)d, "jobix": %(jobix)d, '
    '"claim": "%(claim)s", "attempt": %(attempt)d'
)


def claim_reply(job):
    """Return a claimed job as the contract shows it, in JSON.

    What is kept as JSON goes in as it is: the claim is made, so nothing may
    fail any more.
    """
    parts = [CLAIMED % job]
    if job["priority"]:
        parts.append('"priority": %d' % job["priority"])
    for name in ("laststage", "max_attempts", "timeout", "made"):
        if job[name] is not None:
            parts.append('"%s": %r' % (name, job[name]))
    parts.append('"jobcmd": %s' % (job["jobcmd"] or "null"))
    parts.append('"filename": %s' % (job["filename"] or "null"))
    for name in ("cwd", "outputs"):
        if job[name] is not None:
            parts.append('"%s": %s' % (name, job[name]))
    if job["files"] not in (None, "[]"):
        parts.append('"files": %s' % job["files"])
    return "{%s}" % ", ".join(parts)


def get_job(store, request, stages, nextstage=None):
    """Claim a job, or several; wait for one if asked to."""
    given = request.options(
        worker=label,
        wait=in_text(seconds),
        lease=in_text(period),
        n=in_text(integer(1, 10**25)),
    )
    if nextstage is None:
        STAGE(max(stages) + 1, "the stage that a claim leads to")
    n, wait = given.pop("n"), given.pop("wait") or 0
    claim = functools.partial(
        store.claim, request.jobix, stages,
        target=nextstage, n=min(n or 1, MAX_CLAIMS), **given
    )
    jobs = claim_in_time(
        store, request, stages, claim, min(wait, MAX_WAIT))
    replies = [claim_reply(job) for job in jobs]
    if n is not None:
        return Response.json_text("[%s]" % ", ".join(replies))
    return Response.json_text(replies[0] if replies else '"nada"')


def update_job(store, request, jobid, stage):
    """Put a job into a stage."""
    given = request.options(claim=token)
    if request.method == "POST":
        given.update(read_result(read_object(request)))
    store.update_job(request.jobix, jobid, stage, **given)
    message = "Success, job %d was updated to stage %d!"
    return Response.text(message % (jobid, stage))


def read_update(entry):
    """Return an entry of /update_jobs, read."""
    if type(entry) is not dict:
        raise Error(400, "An update must be an object.")
    return dict(
        read_result(entry),
        jobid=JOBID(entry.get("jobid"), "jobid"),
        stage=STAGE(entry.get("jobstage"), "jobstage"),
        claim=read_optional(entry, "claim", token),
    )


def update_jobs(store, request):
    """Put many jobs into stages."""
    given = request.json()
    if type(given) is not list:
        raise Error(400, "The body must be a JSON list.")
    updates = [read_update(entry) for entry in bounded(given)]
    ids = [update["jobid"] for update in updates]
    statuses = store.update_jobs(request.jobix, updates)
    return Response.json(
        [{"jobid": i, "status": status} for i, status in zip(ids, statuses)]
    )


def fail_job(store, request, jobid):
    """Take note that an attempt failed."""
    given = request.options(claim=token)
    report = read_report(read_object(request))
    return Response.json(store.fail_job(request.jobix, jobid, report=report, **given))


def reject_job(store, request, jobid):
    """Send a job back for files that aren't there as they were made."""
    given = request.options(claim=token)
    body = read_object(request)
    given["files"] = read_optional(body, "files", read_files)
    given["report"] = read_report(body)
    return Response.json(store.reject_job(request.jobix, jobid, **given))


def release_job(store, request, jobid):
    """Take a claim back unharmed."""
    given = request.options(claim=token)
    return Response.json(store.release_job(request.jobix, jobid, **given))


def read_worker(given):
    """Return what a worker says of itself, as columns, and if it `ended`."""
    worker = {"name": label(given["worker"], "worker")}
    for name, reader in ABOUT_WORKER.items():
        worker[name] = read_optional(given, name, reader)
    return worker


def heartbeat(store, request):
    """Renew the leases of a worker."""
    given = read_object(request, "worker", "lease", "claims")
    claims = given["claims"]
    pairs = type(claims) is list and all(
        type(pair) is list and len(pair) == 2 for pair in bounded(claims)
    )
    if not pairs:
        raise Error(400, "claims must be a list of pairs [jobid, token].")
    lost, drain = store.heartbeat(request.jobix,
        claims=[(JOBID(i, "jobid"), token(t, "claim")) for i, t in claims],
        lease=period(given["lease"], "lease"),
        worker=read_worker(given),
    )
    return Response.json({"lost": lost, "drain": drain})


def drain(store, request, *name):
    """Tell a worker to claim no more, or, as /undrain, to go on.

    A name with slashes in it comes as several parts.
    """
    name, drained = "/".join(name), request.path.startswith("/drain/")
    store.drain(request.jobix, name, drain=drained)
    return Response.json({"worker": name, "drain": drained})


def pause(store, request, stage):
    """Hand out nothing of a stage, or, as /resume, go on."""
    paused = request.path.startswith("/pause/")
    store.pause(request.jobix, stage, paused=paused)
    return Response.json({"stage": stage, "paused": paused})


def check_stages(store, request, old=None, new=None):
    """Flag the expired jobs; move those of one stage to another."""
    answer = {}
    if old is None:
        fine = store.check_stages(request.jobix)
    else:
        fine, moved = store.move_expired(request.jobix, old, new)
        answer["n_bad_jobs were degraded:"] = moved
    answer["Are all simulations within time frame?"] = int(fine)
    return Response.json(answer)


def lifetime(store, request, stage):
    """Show the lifetime of a stage."""
    return Response.json(store.lifetime(request.jobix, stage))


def set_lifetime(store, request, stage, minutes):
    """Set the lifetime of a stage."""
    store.set_lifetime(request.jobix, stage, minutes)
    return Response.json(minutes)


def read_selector(request):
    """Return which jobs a request names: ids, or stage and state."""
    given = read_object(request)
    unknown = set(given) - {"ids", "stage", "state", "all"}
    if unknown:
        raise Error(400, "Jobs can't be named by %.80r." % min(unknown))
    selector = {"stage": read_optional(given, "stage", STAGE)}
    selector["state"] = read_optional(given, "state", read_state)
    ids = given.get("ids")
    if ids is not None:
        if type(ids) is not list:
            raise Error(400, "ids must be a list of jobids.")
        selector["ids"] = list(dict.fromkeys(
            JOBID(i, "ids") for i in bounded(ids)))
    if given.get("all", True) is not True:
        raise Error(400, "all must be true.")
    named = any(value is not None for value in selector.values())
    if named == ("all" in given):
        raise Error(400, "Name jobs by ids, stage and state, or by all.")
    return selector


def retry(store, request):
    """Let ended jobs run again."""
    selector = read_selector(request)
    return Response.json({"retried": store.retry(request.jobix, **selector)})


def cancel(store, request):
    """Cancel jobs that aren't done."""
    selector = read_selector(request)
    cancelled = store.cancel(request.jobix, **selector)
    return Response.json({"cancelled": cancelled})


def release(store, request):
    """Take jobs from who works on them, unharmed."""
    selector = read_selector(request)
    released = store.release(request.jobix, **selector)
    return Response.json({"released": released})


def forget(store, request):
    """Delete done jobs."""
    selector = read_selector(request)
    forgotten = store.forget(request.jobix, **selector)
    return Response.json({"forgotten": forgotten})


def tagged(request, text, same=None):
    """Answer with JSON text, or with 304 when the caller has it already.

    `same` is what has to be the same for that, if not all of it. RFC 9110
    has the headers; the tag is weak, for `same` may leave something out.
    """
    same = text if same is None else same
    tag = 'W/"%s"' % hashlib.sha256(same.encode("ascii")).hexdigest()[:24]
    if tag in request.headers.get("if-none-match", ""):
        return Response(304, b"", None, [("ETag", tag)])
    return Response.json_text(text, headers=[("ETag", tag)])


def timed(request, now, value):
    """Answer as `tagged` with `value` and the time, which alone isn't news."""
    text = to_json(value)
    return tagged(request, '{"time": %s, %s' % (to_json(now), text[1:]), text)


def shown(job, **more):
    """Return, in JSON, a job but its token, and `more`, JSON already."""
    job["expired"] = bool(job["expired"])
    del job["row"]
    texts = {name: job.pop(name) or "null" for name in JSON_COLUMNS}
    return splice(job, dict(texts, **more))


def job(store, request, jobid):
    """Show a job and its attempts."""
    found = store.job(request.jobix, jobid)
    if found is None:
        raise Error(404, "There is no job %d." % jobid)
    job, waits_for, attempts = found
    return tagged(request, shown(
        job, waits_for=to_json(waits_for), attempts=to_json(attempts)))


def read_place(text, order):
    """Return where a page goes on, as an earlier answer's `after` says."""
    if order == "id":
        return JOBID(number(text), "after")
    since, _, jobid = text.partition(",")
    try:
        return float(since), JOBID(number(jobid), "after")
    except ValueError:
        raise Error(400, "after must be that of an earlier answer.") from None


def jobs(store, request):
    """Show a page of jobs."""
    given = request.options(
        stage=in_text(STAGE),
        state=read_mark,
        order=read_order,
        after=word,
        limit=in_text(integer(1, 10**25)),
        attempts=in_text(integer(0, ATTEMPTS_SHOWN)),
    )
    more = given["attempts"] is not None
    given["attempts"] = given["attempts"] or 0
    given["limit"] = min(given["limit"] or 100, MAX_PAGE)
    given["order"] = given["order"] or "id"
    if given["after"] is not None:
        given["after"] = read_place(given["after"], given["order"])
    page, after = store.jobs(request.jobix, **given)
    if type(after) is tuple:
        after = "%r,%d" % after
    text = '{"jobs": [%s], "after": %s}'
    listed = ", ".join(
        shown(job, attempts=to_json(attempts)) if more else shown(job)
        for job, attempts in page)
    return tagged(request, text % (listed, to_json(after)))


def workers(store, request):
    """Show the workers that were heard of in the last day."""
    now, heard = store.workers(request.jobix, within=86400)
    return timed(request, now, {"workers": heard})


def last_line(text):
    """Return the last line of `text` that isn't empty, None without one."""
    return ((text or "").strip().splitlines() or [None])[-1]


def failures(store, request):
    """Show the failed jobs of late in groups of one reason each."""
    failed, rows = store.failures(request.jobix)
    groups = {}
    for row in rows:
        message = last_line(row["stderr"]) or last_line(row["error"])
        host = row["host"] or row["worker"]
        key = row["stage"], row["exit_code"], message, host
        groups.setdefault(key, []).append(row["jobid"])
    names = "stage", "exit_code", "message", "host"
    listed = [
        dict(zip(names, key), jobs=len(ids), ids=ids)
        for key, ids in groups.items()
    ]
    listed.sort(key=lambda group: -group["jobs"])
    counts = {"failed": failed, "looked_at": len(rows)}
    return tagged(request, to_json(dict(counts, groups=listed)))


def pace(store, request):
    """Show how fast jobs became done, as time went."""
    given = request.options(minutes=in_text(integer(1, 10**7)))
    pace = store.pace(request.jobix, given["minutes"])
    return timed(request, pace.pop("time"), pace)


def status(store, request):
    """Show the figures."""
    figures = store.status(request.jobix)
    figures["readonly"] = request.readonly
    return timed(request, figures.pop("time"), figures)


def spent_in(stage, spent, ran, waited):
    """Return what was spent on jobs claimed from a stage: see GET /stats."""
    lapsed, mended = spent.get("lapsed"), spent.get("mended")
    if mended:  # late results, taken after all
        lapsed = {name: lapsed[name] - mended[name] for name in lapsed}
    outcomes = {
        kind: sums for kind, sums in dict(spent, lapsed=lapsed).items()
        if kind not in ("claimed", "again", "idle", "mended") and sums
    }
    run = quantiles(ran, "attempts", *PARTS) if ran else None
    nothing = {"attempts": 0, "seconds": 0}
    return {
        "stage": stage,
        "claims": spent.get("claimed", nothing)["attempts"],
        "retries": spent.get("again", nothing)["attempts"],
        "run": run,
        "wait": quantiles(waited, "claims", *PARTS) if waited else None,
        "outcomes": outcomes,
        "useful": outcomes.get("done", nothing)["seconds"],
        "lost": sum(outcomes.get(kind, nothing)["seconds"]
                    for kind in CUT_OFF),
        "idle": spent.get("idle", nothing)["seconds"],
        "advised": run and max(1, math.ceil(2 * run["p95"] / 60)),
    }


def stats(store, request):
    """Show what time the attempts have taken, and what was lost."""
    now, efforts, ran, waited = store.stats(request.jobix)
    spent = defaultdict(dict)
    for stage, kind, attempts, seconds in efforts:
        spent[stage][kind] = {"attempts": attempts, "seconds": seconds}
    ran, waited = by_stage(ran), by_stage(waited)
    stages = [
        spent_in(stage, sums, ran.get(stage), waited.get(stage))
        for stage, sums in sorted(spent.items())
    ]
    names = "claims", "retries", "useful", "lost", "idle"
    totals = {name: sum(stage[name] for stage in stages) for name in names}
    return timed(request, now, {"stages": stages, "totals": totals})


def metric(name, kind, meaning, samples):
    """Return a metric in Prometheus' text format, version 0.0.4.

    `samples` are (what is added to the name, labels, value). See
    https://prometheus.io/docs/instrumenting/exposition_formats/
    """
    lines = ["# HELP %s %s" % (name, meaning), "# TYPE %s %s" % (name, kind)]
    for more, labels, value in samples:
        pairs = ",".join('%s="%s"' % pair for pair in labels.items())
        named = "{%s}" % pairs if pairs else ""
        lines.append("%s%s%s %r" % (name, more, named, value))
    return "\n".join(lines) + "\n"


def histogram(stages, seconds):
    """Yield samples of run times: `stages` as by_stage() has them.

    `seconds` is the sum of each stage. The bounds are 1 ms, and 4 times the
    one before.
    """
    for stage, buckets in stages.items():
        labels = {"stage": stage}
        for power in range(14):
            within = sum(n for bucket, n in buckets if bucket <= 8 * power)
            bound = "%g" % (0.001 * 4**power)
            yield "_bucket", dict(labels, le=bound), within
        count = sum(n for _, n in buckets)
        yield "_bucket", dict(labels, le="+Inf"), count
        yield "_sum", labels, seconds.get(stage, 0)
        yield "_count", labels, count


# Of effort: what /metrics calls a kind that is no outcome of an attempt.
KINDS = {
    "claimed": ("jobman_claims_total", "Jobs that were claimed."),
    "again": ("jobman_retries_total", "Claims that were not a job's first."),
    "mended": ("jobman_mended_total", "Lapsed attempts that ended after all."),
}


def metrics(store, request):
    """Show the figures of all jobix together, for Prometheus."""
    groups, workers, efforts, ran, waited = store.metrics()
    spent = defaultdict(list)
    for row in efforts:
        spent[row["kind"]].append(row)
    seconds = {kind: {row["stage"]: row["seconds"] for row in rows}
               for kind, rows in spent.items()}
    outcomes = [row for row in efforts if row["kind"] not in (*KINDS, "idle")]
    labels = [{"stage": row["stage"], "outcome": row["kind"]}
              for row in outcomes]
    places = [{"stage": g["stage"], "state": g["state"]} for g in groups]
    parts = [
        metric("jobman_info", "gauge", "This server's version.",
               [("", {"version": __version__}, 1)]),
        metric("jobman_jobs", "gauge", "Jobs by stage and state.", [
            ("", p, g["jobs"]) for p, g in zip(places, groups)]),
        metric("jobman_expired_jobs", "gauge", "Jobs over their lifetime.", [
            ("", p, g["expired"]) for p, g in zip(places, groups)]),
        *(metric("jobman_" + name, "gauge", "Of workers heard of lately.",
                 [("", {}, workers[name])])
          for name in ("workers", "slots", "busy")),
        *(metric(name, "counter", meaning, [
            ("", {"stage": row["stage"]}, row["attempts"])
            for row in spent[kind]])
          for kind, (name, meaning) in KINDS.items()),
        metric("jobman_attempts_total", "counter", "Attempts that ended.", [
            ("", p, row["attempts"]) for p, row in zip(labels, outcomes)]),
        metric("jobman_spent_seconds_total", "counter", "Their time.", [
            ("", p, row["seconds"]) for p, row in zip(labels, outcomes)]),
        metric("jobman_idle_seconds_total", "counter", "Time of idle slots.", [
            ("", {"stage": row["stage"]}, row["seconds"])
            for row in spent["idle"]]),
        metric("jobman_attempt_seconds", "histogram", "Attempts, when done.",
               histogram(by_stage(ran), seconds.get("done", {}))),
        metric("jobman_wait_seconds", "histogram", "From free to claimed.",
               histogram(by_stage(waited), seconds.get("claimed", {}))),
    ]
    kind = "text/plain; version=0.0.4; charset=utf-8"
    return Response(200, "".join(parts).encode(), kind)


def health(store, request):
    """Say that the database answers."""
    store.health()
    return Response.json({"status": "ok", "version": __version__})


# ----------------------------------------------------------------- pages ---

# What a page may do: only what is in itself, named by its hash.
POLICY = (
    "default-src 'none'; script-src %(script)s; style-src %(style)s; "
    "img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'"
)
PLAIN = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>%(title)s</title>
<meta name="viewport" content="width=device-width">
<style>
:root { color-scheme: light dark }
body { font-family: sans-serif; margin: 2em }
th, td { text-align: left; padding: .2em .8em .2em 0; vertical-align: top }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
</style>
%(content)s
</html>
"""


def beside(name):
    """Return the path of a file that is copied beside this one."""
    return os.path.join(os.path.dirname(os.path.abspath(__file__)), name)


def utf8(text):
    """Return `text` as bytes, what UTF-8 lacks as escapes."""
    return text.encode("utf-8", "backslashreplace")


def policy(page):
    """Return the Content-Security-Policy of a page, a text."""
    sources = {}
    for kind in ("script", "style"):
        texts = re.findall("<%s>(.*?)</%s>" % (kind, kind), page, re.S)
        hashes = (hashlib.sha256(utf8(text)).digest() for text in texts)
        names = (base64.b64encode(digest).decode() for digest in hashes)
        named = " ".join("'sha256-%s'" % name for name in names)
        sources[kind] = named or "'none'"
    return POLICY % sources


def show(page, status=200, headers=()):
    """Answer with a page."""
    guards = [
        ("Content-Security-Policy", policy(page) + "; frame-ancestors 'none'"),
        ("Referrer-Policy", "no-referrer"),
        ("X-Content-Type-Options", "nosniff"),
    ]
    kind = "text/html; charset=utf-8"
    return Response(status, utf8(page), kind, [*guards, *headers])


def plain(content, title="jobman"):
    """Return a page around the markup `content`."""
    return PLAIN % {"content": content, "title": html.escape(title)}


def renewed(page, seconds, *more):
    """Return a page that loads itself again; `more` is for its head."""
    meta = '<meta charset="utf-8">'
    renew = '<meta http-equiv="refresh" content="%d">' % seconds
    return page.replace(meta, "\n".join((meta, renew, *more)), 1)


def row(cell, values):
    """Return the markup of a row of a table; `cell` is that of each value."""
    texts = ("" if value is None else str(value) for value in values)
    return "<tr>%s</tr>" % "".join(cell % html.escape(t) for t in texts)


def table(name, heads, rows):
    """Return the markup of a heading and a table, none without rows."""
    if not rows:
        return ""
    head = row('<th scope="col">%s</th>', heads)
    lines = [row("<td>%s</td>", values) for values in rows]
    parts = "<h2>%s</h2>" % name, "<table>", head, *lines, "</table>"
    return "\n".join(parts)


def span(period):
    """Return a number of seconds as a person says it: 4:05, 1:00:00."""
    minutes, rest = divmod(int(period + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return "%d:%02d:%02d" % (hours, minutes, rest)
    return "%d:%02d" % (minutes, rest)


def clock_time(moment):
    """Return a moment as date, time and zone where this runs."""
    return time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(moment))


# What is seen of jobs at a glance: a name, the call that gives it, options.
GLANCE = (
    ("status", status, {}),
    ("hour", pace, {"minutes": 60}),
    ("all", pace, {}),
    ("workers", workers, {}),
    ("failures", failures, {}),
    ("expired", jobs, {"state": "expired", "order": "time"}),
    ("failed", jobs, {"state": "failed", "order": "time"}),
)


def glance(store, jobix):
    """Return what GLANCE names of the jobs of a jobix."""
    seen = {}
    for name, endpoint, options in GLANCE:
        query = urlencode(options)
        request = Request("GET", "", query, {}, None, lambda: False)
        request.jobix = jobix
        seen[name] = from_json(endpoint(store, request).body.decode())
    return seen


def progress_line(figures):
    """Return a sentence on how far all jobs are."""
    totals = figures["totals"]
    jobs, done = totals["jobs"], totals["states"]["done"]
    line = "%d of %d jobs done" % (done, jobs)
    if jobs:
        line = "%d %%: %s" % (100 * done // jobs, line)
    left = figures["seconds_left"]
    if left is not None:
        line += ", %.3g a second over the last two minutes" % figures["rate"]
    if left:
        line += ", so %s left, until %s" % (
            span(left), clock_time(figures["time"] + left))
    return line + "."


def stages_table(figures):
    """Return the markup of the stages' figures."""
    rows = []
    for stage in [*figures["stages"], dict(figures["totals"], stage="all")]:
        name = "%s%s" % (stage["stage"], ", paused" * stage.get("paused", 0))
        counts = [stage["states"][state] for state in STATES]
        took = stage.get("runtime") or {"median": None, "p90": None}
        rows.append([
            name, stage["jobs"], stage["expired"], *counts,
            stage.get("lifetime") or "",
            *("%.3g" % s if s else "" for s in (took["median"], took["p90"])),
        ])
    heads = "lifetime in minutes", "median of seconds", "nine in ten within"
    return table("Stages", ("stage", "jobs", "expired", *STATES, *heads), rows)


def pace_line(pace):
    """Return a sentence on what became done in the last hour."""
    return (
        "In the last hour %d attempts and %d jobs became done, of these %d"
        " and %d in the last full minute." % (
            sum(pace["updates"]), sum(pace["done"]),
            pace["updates"][-2], pace["done"][-2])
    )


def workers_table(heard):
    """Return the markup of the workers there are, or that are quarantined."""
    columns = "name", "host", "slots", "busy", "done", "failed", "quarantine"
    rows = []
    for worker in heard["workers"]:
        ago = heard["time"] - worker["heard"]
        if worker["quarantine"] or ago <= 600:
            stages = ", ".join(map(str, worker["stages"] or ()))
            drain = "yes" if worker["drain"] else ""
            rows.append([worker[name] for name in columns]
                        + [drain, stages, span(ago) + " ago"])
    heads = "worker", *columns[1:], "drained", "stages", "heard"
    return table("Workers", heads, rows)


def jobs_table(name, page):
    """Return the markup of a page of jobs."""
    rows = []
    for job in page["jobs"]:
        command = job["jobcmd"]
        command = command if type(command) is str else to_json(command)
        rows.append((
            job["jobid"], job["stage"], job["state"],
            clock_time(job["since"]), command[:200], job["filename"],
        ))
    heads = "job", "stage", "state", "there since", "command", "file"
    return table(name, heads, rows)


def plain_view(seen):
    """Return what `glance` has seen as a page without a script."""
    figures, failures = seen["status"], seen["failures"]
    groups = [
        [group[name] for name in ("jobs", "stage", "exit_code", "message",
                                  "host")]
        for group in failures["groups"]
    ]
    heads = "jobs", "stage", "exit code", "message", "host"
    line = progress_line(figures)
    return plain("\n".join((
        "<h1>jobman %s</h1>" % figures["version"],
        "<p>%s<p>%s" % (line, pace_line(seen["hour"])),
        "<p>As of %s." % clock_time(figures["time"]),
        stages_table(figures),
        workers_table(seen["workers"]),
        jobs_table("Expired jobs", seen["expired"]),
        table("Failures", heads, groups),
        jobs_table("Failed jobs", seen["failed"]),
    )), "jobman: " + line)


def caller(store, request):
    """Return a page's jobix, by the header or, without a script, HTTP Basic.

    None when there is none, or a bad one: a page is for everybody.
    """
    scheme, _, login = request.headers.get("authorization", "").partition(" ")
    basic = request.path == "/get" and request.query == "plain=1"
    if basic and scheme.lower() == "basic":
        with contextlib.suppress(ValueError):
            _, _, password = base64.b64decode(login).partition(b":")
            request.headers["jobix"] = password.decode("ascii")
    with contextlib.suppress(Error):
        request.identify(store)
    return request.jobix


def dashboard_file():
    """Return the text of dashboard.html, None where it isn't beside us."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        with open(beside("dashboard.html"), encoding="utf-8") as file:
            return file.read()


LINK = """<p><a href="get?plain=1">Show my jobs</a> (the password is your
jobix, the user name any).</p>"""


def dashboard(store, request):
    """Show the page; what it shows it asks for itself, with a jobix.

    Where there is no script, or no dashboard.html, a plain page does it.
    """
    wanted = request.query == "plain=1"
    page = None if wanted else dashboard_file()
    if page is not None:
        return show(page)
    jobix = caller(store, request)
    if jobix is not None:
        return show(renewed(plain_view(glance(store, jobix)), 10))
    if not wanted:
        return show(plain(LINK))
    challenge = ("WWW-Authenticate", 'Basic realm="jobix as password"')
    refused = "<p>The password is your jobix.</p>"
    return show(plain(refused), 401, [challenge])


def greet(store, request):
    """Say who is here; a browser gets the dashboard."""
    if "text/html" in request.headers.get("accept", ""):
        return dashboard(store, request)
    return Response.text("This is jobman %s, a job manager." % __version__)


def lifetime_page(store, request):
    """Show the lifetimes of the caller's stages in minutes."""
    jobix = caller(store, request)
    rows = store.lifetimes(jobix).items() if jobix is not None else ()
    heads = "stage", "lifetime in minutes"
    return show(plain(table("Lifetimes", heads, rows) or "<p>None.</p>"))


# ---------------------------------------------------------------- routes ---


def any_part(text, name):
    """Read a part of a path as it is."""
    return text


PARAMETERS = {
    "stage": in_text(STAGE),
    "stages": read_stages,
    "nextstage": in_text(STAGE),
    "old": in_text(STAGE),
    "new": in_text(STAGE),
    "jobid": in_text(JOBID),
    "minutes": in_text(MINUTES),
    "worker": any_part,
}

# Method, path and endpoint. A path's last parameter may end in "…": then
# there may be more of it. Pages, and calls that show no job, need no jobix.
ROUTES = (
    ("GET", "/", greet),
    ("GET", "/health", health),
    ("GET", "/metrics", metrics),
    ("GET", "/get", dashboard),
    ("GET", "/lifetime", lifetime_page),
    ("GET", "/init", lifetimes),
    ("GET", "/init/<minutes…>", init),
    ("GET", "/lifetime/<stage>", lifetime),
    ("GET", "/lifetime/<stage>/<minutes>", set_lifetime),
    ("POST", "/set", set_jobs),
    ("POST", "/submit", submit),
    ("GET", "/get/<stages>", get_job),
    ("GET", "/get/<stages>/<nextstage>", get_job),
    ("GET", "/update_job/<jobid>/<stage>", update_job),
    ("POST", "/update_job/<jobid>/<stage>", update_job),
    ("POST", "/update_jobs", update_jobs),
    ("POST", "/fail_job/<jobid>", fail_job),
    ("POST", "/reject_job/<jobid>", reject_job),
    ("POST", "/release_job/<jobid>", release_job),
    ("POST", "/heartbeat", heartbeat),
    ("GET", "/check_stages", check_stages),
    ("GET", "/check_stages/<old>/<new>", check_stages),
    ("POST", "/retry", retry),
    ("POST", "/cancel", cancel),
    ("POST", "/release", release),
    ("POST", "/forget", forget),
    ("POST", "/pause/<stage>", pause),
    ("POST", "/resume/<stage>", pause),
    ("POST", "/drain/<worker…>", drain),
    ("POST", "/undrain/<worker…>", drain),
    ("GET", "/status", status),
    ("GET", "/pace", pace),
    ("GET", "/workers", workers),
    ("GET", "/failures", failures),
    ("GET", "/stats", stats),
    ("GET", "/jobs", jobs),
    ("GET", "/job/<jobid>", job),
)
PUBLIC = frozenset((greet, health, metrics, dashboard, lifetime_page))
READING = frozenset((
    lifetimes, lifetime, status, pace, workers, failures, stats, jobs, job,
    *PUBLIC
))


def by_first_part(routes):
    """Return (method, parameters, endpoint) of routes by their first part."""
    found = {}
    for method, path, endpoint in routes:
        first, *names = path[1:].split("/")
        found.setdefault(first, []).append((method, names, endpoint))
        if method == "GET" and endpoint in READING:
            found[first].append(("HEAD", names, endpoint))
    return found


ROUTES_BY_FIRST = by_first_part(ROUTES)


def fits(names, texts):
    """Return whether a path's parameters are as many as its texts."""
    many = bool(names) and names[-1].endswith("…>")
    return len(texts) == len(names) or (many and len(texts) > len(names))


def read_arguments(names, texts):
    """Return the parameters of a path, read."""
    arguments = []
    for i, text in enumerate(texts):
        name = names[min(i, len(names) - 1)].strip("<…>")
        arguments.append(PARAMETERS[name](text, name))
    return arguments


def find_route(request):
    """Return the endpoint of a request and its arguments.

    Raises Error 404 for an unknown path, 405 for a wrong method, 400 for a
    bad argument.
    """
    if not request.path.startswith("/"):
        raise Error(400, "An address begins with a slash.")
    first, *texts = request.path[1:].split("/")
    allowed = []
    for method, names, endpoint in ROUTES_BY_FIRST.get(first, ()):
        if fits(names, texts):
            if method == request.method:
                return endpoint, read_arguments(names, texts)
            allowed.append(method)
    if not allowed:
        raise Error(404, "There is nothing at this address.")
    allowed = ", ".join(allowed)
    raise Error(405, "Use %s for this address." % allowed, Allow=allowed)


def error_response(error):
    """Return an Error as a Response."""
    headers = list(error.headers.items())
    return Response.json({"error": str(error)}, error.status, headers)


def authorize(store, request, endpoint):
    """Check that a request's jobix may use an endpoint; or Error 403."""
    request.identify(store)
    if request.readonly and endpoint not in READING:
        raise Error(403, "This jobix is only for reading.")


@contextlib.contextmanager
def body_in_memory(store, request):
    """Receive a request's body and hold it while the `with` block runs.

    Only a few large ones at a time: inflated and parsed, each can take
    hundreds of MiB. Raises Error 503 if none of them ends in time.
    """
    large = request.length >= LARGE_BODY
    if large and not store.large_bodies.acquire(timeout=MAX_WAIT):
        raise Unavailable("it has too many large requests")
    try:
        request.load()
        yield
    finally:
        if large:
            store.large_bodies.release()


def respond(store, request):
    """Return the Response to a Request; every Error becomes one here.

    The path is checked first, then the jobix; only then is the body read.
    """
    try:
        endpoint, arguments = find_route(request)
        if endpoint in PUBLIC:
            return endpoint(store, request, *arguments)
        authorize(store, request, endpoint)
        with body_in_memory(store, request):
            return endpoint(store, request, *arguments)
    except Error as error:
        return error_response(error)
    except sqlite3.Error as error:
        return error_response(Unavailable(error))
    except Exception:
        traceback.print_exc()
        return error_response(
            Error(500, "jobman has a fault here; see its log."))


# ----------------------------------------------------------- access file ---


def access_path():
    """Return where the access file is, unless an option says otherwise."""
    default = os.path.join(os.path.expanduser("~"), ".jobman", "access.json")
    return os.environ.get("JOBMAN_ACCESS") or default


def replace_file(path, data, mode):
    """Write a file in one step: a reader sees the old or the new one.

    Makes its folder. Raises OSError; no draft is left then.
    """
    folder = os.path.dirname(os.path.abspath(path))
    os.makedirs(folder, mode | (mode & 0o444) >> 2, exist_ok=True)
    draft = "%s.%d" % (path, os.getpid())
    try:
        remove(draft)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        with open(os.open(draft, flags, mode), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    finally:
        remove(draft)


def write_access(path, url, store, fingerprint=None):
    """Write the file by which workers find a server; return its content."""
    access = {
        "url": url,
        "fingerprint": fingerprint,
        "jobix": store.jobix,
        "reading_jobix": store.reading_jobix,
        "host": socket.gethostname(),
        "pid": os.getpid(),
    }
    try:
        replace_file(path, utf8(to_json(access) + "\n"), 0o600)
    except OSError as error:
        raise Trouble(
            "The access file %s can't be written: %s." % (path, error.strerror)
        ) from None
    return access


def remove_access(path, access):
    """Remove the access file if it is still this server's own."""
    with contextlib.suppress(OSError, ValueError):
        with open(path) as file:
            own = json.load(file) == access
        if own:
            os.unlink(path)


# ------------------------------------------------------------------- TLS ---


def make_certificate(path):
    """Make a key and a certificate for it, `path`.key and `path`.crt.

    The first has both: made in a draft and moved, they always go together.
    Raises Trouble where that can't be done.
    """
    drafts = ["%s.new.%s" % (path, secrets.token_hex(4)) for _ in "12"]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-sha256",
               "-nodes", "-days", "3650", "-subj", "/CN=jobman",
               "-keyout", drafts[0], "-out", drafts[1]]
    try:
        for draft in drafts:
            flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY
            os.close(os.open(draft, flags, 0o600))
        subprocess.run(
            command, check=True, stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )
        with open(drafts[0], "ab") as key, open(drafts[1], "rb") as file:
            key.write(file.read())
            key.flush()
            os.fsync(key.fileno())
        os.replace(drafts[1], path + ".crt")
        os.replace(drafts[0], path + ".key")
    finally:
        for draft in drafts:
            remove(draft)


def own_certificate(path):
    """Return the name of the file `path`.key, made if it isn't there."""
    if os.path.exists(path + ".key"):
        need_own(path + ".key", os.geteuid())
        return path + ".key"
    if shutil.which("openssl") is None:
        raise Trouble(
            "--tls needs the program openssl, which isn't here; a certificate"
            " that was made elsewhere can be given by --certfile."
        )
    try:
        make_certificate(os.path.abspath(path))
    except subprocess.CalledProcessError as error:
        said = error.stderr.decode("utf-8", "replace").split("\n")
        reason = " ".join(said).strip()[-300:]
    except OSError as error:
        reason = error.strerror
    else:
        return path + ".key"
    raise Trouble("The certificate %s.crt can't be made: %s." % (path, reason))


def read_fingerprint(certfile):
    """Return the SHA-256 of the first certificate in a file, in hex."""
    with open(certfile, "rb") as file:
        found = re.search(
            b"-----BEGIN CERTIFICATE-----(.*?)-----END CERTIFICATE-----",
            file.read(), re.S,
        )
    if not found:
        raise ValueError("there is none in it")
    return hashlib.sha256(base64.b64decode(found.group(1))).hexdigest()


def load_certificate(context, certfile, keyfile):
    """Give an SSLContext its certificate; raise OSError, ValueError.

    A key that needs a password is no good: nobody may be there to ask.
    """
    asked = []
    try:
        context.load_cert_chain(
            certfile, keyfile, lambda: asked.append(True) or "")
    except OSError:
        if asked:
            raise ValueError("its key has a password") from None
        raise


def tls_context(certfile, keyfile):
    """Return an SSLContext for a server with a certificate, or Trouble.

    The key is in `keyfile`, or with the certificate where that is None.
    Python may have been built without ssl, so nothing but TLS needs it.
    """
    try:
        import ssl
    except ImportError:
        raise Trouble(
            "This Python has no ssl module, so it can't speak TLS."
        ) from None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    if hasattr(context, "minimum_version"):
        context.minimum_version = ssl.TLSVersion.TLSv1_2
    else:  # Python 3.6
        context.options |= ssl.OP_NO_TLSv1 | ssl.OP_NO_TLSv1_1
    if ssl.OPENSSL_VERSION_INFO >= (3,):  # clients hang up without goodbye
        context.options |= 0x80  # SSL_OP_IGNORE_UNEXPECTED_EOF, named in 3.10
    load_certificate(context, certfile, keyfile)
    return context


def credentials(options):
    """Return (SSLContext, fingerprint), each None without TLS; or Trouble."""
    certfile = options.certfile
    if options.tls:
        certfile = own_certificate(options.db)
    if certfile is None:
        return None, None
    try:
        context = tls_context(certfile, options.keyfile)
        return context, read_fingerprint(certfile)
    except (OSError, ValueError) as error:
        reason = cause(error)
        raise Trouble(
            "The certificate %s can't be used: %s." % (certfile, reason)
        ) from None


# ----------------------------------------------------------- HTTP server ---

if hasattr(http.server, "ThreadingHTTPServer"):
    ThreadingHTTPServer = http.server.ThreadingHTTPServer
else:  # Python 3.6

    class ThreadingHTTPServer(
        socketserver.ThreadingMixIn, http.server.HTTPServer
    ):
        """Serve HTTP, with a thread for each connection."""



def body_length(method, headers):
    """Return the bytes of a body, as its headers say, or an Error.

    411 when a POST doesn't say, 400 for no number, 413 for too many.
    """
    if "transfer-encoding" in headers:
        raise Error(411, "Send a Content-Length, not chunks.")
    text = headers.get("content-length", "")
    if not text:
        if method == "POST":
            raise Error(411, "Send a Content-Length.")
        return 0
    if not re.fullmatch("[0-9]{1,25}", text):
        raise Error(400, "The Content-Length is no number of bytes.")
    length = int(text)
    if length > MAX_BODY:
        raise Error(413, "The body is over %d bytes." % MAX_BODY)
    return length


def require_length(body, length):
    """Return `body` if it has `length` bytes; else raise Error 400."""
    if len(body) < length:
        raise Error(400, "The body ended too early.")
    return body


TOKEN = r"[\w!#$%&'*+.^`|~-]+"
REQUEST_LINE = re.compile(TOKEN.join("()") + r" ([!-~]+) HTTP/([0-9]\.[0-9])",
                          re.A)
HEADER_NAME = re.compile(TOKEN, re.A)
CONTROL = re.compile("[^\t\r\n -~\x80-\xff]|\r(?!\n)")
HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[\w.-]+)(:[0-9]{1,5})?", re.A)
PORT = re.compile(r":[0-9]*\Z")
FIGURES = re.compile(r"\[.*\]|[0-9]+(\.[0-9]+){3}|")
SITE = re.compile("https?://([^/?]*)", re.I)


def set_timeout(connection, end):
    """Make the next call on a socket raise socket.timeout at `end`.

    That is a moment of time.monotonic(). Raises it now if that is over.
    """
    left = end - time.monotonic()
    if left <= 0:
        raise socket.timeout("timed out")
    connection.settimeout(left)


class SocketInput(io.RawIOBase):
    """What a client sends until `end`, a moment of time.monotonic().

    The timeout of a socket starts anew with every byte: a client that sends
    one now and then could keep its thread for ever.
    """

    end = 0

    def __init__(self, connection):
        self.connection = connection

    def readable(self):
        return True

    def readinto(self, buffer):
        set_timeout(self.connection, self.end)
        return self.connection.recv_into(buffer)


def receive_head(file):
    """Read a request's line and headers, up to the empty line; or Error."""
    head = bytearray()
    try:
        while not head.endswith(b"\r\n\r\n"):
            line = file.readline(MAX_HEAD + 1 - len(head))
            if line == b"\r\n" and not head:  # RFC 9112, section 2.2
                continue
            head += line
            if len(head) > MAX_HEAD:
                raise Error(431 if b"\r\n" in head else 414,
                            "The request line or the headers are too long.")
            if not line.endswith(b"\n"):
                raise Error(400, "The request ended too early.")
            if not line.endswith(b"\r\n"):
                raise Error(400, "A line must end in CR and LF.")
    except socket.timeout:
        raise Error(408, "The request came too slowly.") from None
    return head[:-4].decode("latin-1")


def read_head(head):
    """Return method, target, version and headers; or raise Error.

    It is strict: what others may read in another way is refused (RFC 9112,
    section 11.2).
    """
    line, *lines = head.split("\r\n")
    found = REQUEST_LINE.fullmatch(line)
    if not found or CONTROL.search(head):
        raise Error(400, "This is no HTTP.")
    method, target, version = found.groups()
    if version[0] != "1":
        raise Error(505, "Speak HTTP/1.1.")
    if len(lines) > MAX_HEADERS:
        raise Error(431, "There are over %d headers." % MAX_HEADERS)
    headers = {}
    for line in lines:
        name, colon, value = line.partition(":")
        if not colon or not HEADER_NAME.fullmatch(name):
            raise Error(400, "A header line is malformed.")
        name, value = name.lower(), value.strip(" \t")
        known = name in headers
        headers[name] = headers[name] + ", " + value if known else value
    return method, target, version, headers


def read_target(target, version, headers):
    """Return the host that a request is for, its path and its query.

    The host is "" where an old client names none; Error 400 elsewhere.
    """
    found = SITE.match(target)
    hosts = [found.group(1)] if found else []
    if version != "1.0" or headers.get("host"):
        hosts.append(headers.get("host", ""))
    if not all(map(HOST.fullmatch, hosts)):
        raise Error(400, "The header Host must name one host.")
    path, _, query = target[found.end() if found else 0 :].partition("?")
    return "".join(hosts[:1]).lower(), unquote(path) or "/", query


def name_of(host):
    """Return the name in `host`, without a port."""
    return PORT.sub("", host)


def check_host(host, names):
    """Raise Error 421 for a name that isn't among `names`, our own.

    Another site's name can be led to our address (DNS rebinding): then a
    browser takes us for that site, and its pages may call us. No address in
    figures is a name, and `localhost` is nobody else's (RFC 6761).
    """
    name = name_of(host)
    if not FIGURES.fullmatch(name) and name not in names:
        if not re.fullmatch(r"(.*\.)?localhost", name):
            raise Error(421, "This server doesn't know itself as %s: start it"
                        " with that name in --url, or use another." % name)


def check_origin(headers, host, names):
    """Raise Error 403 for a call by a page of another site."""
    origin = headers.get("origin")
    if origin is not None:
        site = origin.lower().partition("://")[2]
        if site != host.lower() and name_of(site) not in names:
            raise Error(403, "Pages of other sites can't call this server.")


@functools.lru_cache(maxsize=99)
def status_line_and_date(status, second):
    """Return the first lines of a response, at a second since 1970."""
    return "HTTP/1.1 %d %s\r\nServer: jobman/%s\r\nDate: %s\r\n" % (
        status, http.client.responses.get(status, "Refused"), __version__,
        email.utils.formatdate(second, usegmt=True),
    )


def serialize(response, connection, *, head_only):
    """Return a response as bytes, with the header Connection if not empty."""
    head = status_line_and_date(response.status, int(time.time()))
    for header in response.headers:
        head += "%s: %s\r\n" % header
    if connection:
        head += "Connection: %s\r\n" % connection
    head = (head + "\r\n").encode("ascii")
    return head if head_only else head + response.body


def end_tls(connection):
    """Send TLS's end-of-data alert, if it is TLS; don't wait for the peer's.
    """
    if hasattr(connection, "unwrap"):
        with contextlib.suppress(OSError, ValueError):
            connection.settimeout(0)
            connection.unwrap()


class Handler(http.server.BaseHTTPRequestHandler):
    """Answer the requests of a connection, in a thread of its own."""

    HANDSHAKE = 10  # seconds for the TLS handshake
    FIRST = 20  # seconds until the first request
    IDLE = 300  # seconds until another request
    HEAD = 20  # seconds for a request line and its headers
    LINGER = 2  # seconds to read on after a refusal
    PATIENCE = 60  # seconds for a body or a response, beside
    SLOWEST = 2**16  # bytes a second

    def setup(self):
        """Prepare the connection; called first in its thread."""
        self.connection = self.request
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self.server.tls:  # here, so that a slow client delays no other
            self.connection.settimeout(self.HANDSHAKE)
            try:
                self.connection.do_handshake()
            except OSError:
                self.linger()  # so that the client sees the alert
                raise
        self.input = SocketInput(self.connection)
        self.rfile = io.BufferedReader(self.input, 4096)
        self.wfile = io.BytesIO()  # unused, but http.server closes it
        self.patience = self.FIRST

    def handle_one_request(self):
        """Answer a request; handle() repeats this until close_connection."""
        self.close_connection = self.unread = True
        self.input.end = time.monotonic() + self.patience
        try:
            if not self.rfile.peek(1):
                return
        except socket.timeout:  # no request, so no response
            return
        self.patience = self.IDLE
        self.server.busy.add(self.connection)
        try:
            self.do_GET()
        finally:
            self.server.busy.discard(self.connection)
        if self.unread:
            self.linger()

    def do_GET(self):
        """Answer a request of any method: find_route() knows which it has."""
        try:
            request = self.read_request()
        except Error as error:
            response = error_response(error)
        else:
            response = respond(self.server.store, request)
            self.unread = not request.loaded
        self.send(response)

    def read_request(self):
        """Return the Request of the next head, to read its body later."""
        self.command = None
        self.input.end = time.monotonic() + self.HEAD
        self.command, target, version, headers = read_head(
            receive_head(self.rfile))
        self.old = version == "1.0"
        said = headers.get("connection", "").lower()
        self.close_connection = (
            "keep-alive" not in said if self.old else "close" in said)
        host, path, query = read_target(target, version, headers)
        if self.server.store.open_to_all:
            check_host(host, self.server.names)
        check_origin(headers, host, self.server.names)
        length = body_length(self.command, headers)
        receive = functools.partial(self.read_body, headers, length)
        return Request(
            self.command, path, query, headers, receive if length else None,
            self.gone, length)

    def read_body(self, headers, length):
        """Return the body of a request whose jobix was accepted; or Error."""
        if not self.old and "100-continue" in headers.get("expect", ""):
            self.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        self.input.end = (
            time.monotonic() + self.PATIENCE + length / self.SLOWEST)
        try:
            return require_length(self.rfile.read(length), length)
        except socket.timeout:
            raise Error(408, "The request came too slowly.") from None

    def send(self, response):
        """Send a response, and say whether the connection goes on."""
        if self.unread or self.server.ending:
            self.close_connection = True
        fate = "close"
        if not self.close_connection:
            fate = "keep-alive" if self.old else ""
        self.write(serialize(
            response, fate, head_only=self.command == "HEAD"))

    def write(self, data):
        """Send bytes, all of them within their time; raise OSError.

        SSLSocket.sendall() starts its timeout anew with every record.
        """
        end = time.monotonic() + self.PATIENCE + len(data) / self.SLOWEST
        left = memoryview(data)
        while left:
            set_timeout(self.connection, end)
            left = left[self.connection.send(left) :]

    def linger(self):
        """Read on for a moment after a refusal.

        Closing a socket with unread input resets the connection, and the
        client's kernel may drop the response.
        """
        end = time.monotonic() + self.LINGER
        end_tls(self.connection)
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            while True:
                set_timeout(self.connection, end)
                if not self.connection.recv(65536):
                    break

    def gone(self):
        """Return whether the client has closed the connection."""
        poll = select.poll()  # select() fails beyond 1,024 files
        poll.register(self.connection, select.POLLRDHUP)  # also below TLS
        return bool(poll.poll(0))


def own_names():
    """Return by what names this host may be called, as far as it knows."""
    name = socket.gethostname().lower()
    return frozenset((name, name.partition(".")[0]))


def names_in(url):
    """Return the names of the host in a URL, one or none."""
    try:
        return frozenset((urlsplit(url).hostname,)) - {None}
    except ValueError:
        return frozenset()


def threads_of(user):
    """Return how many threads a user has, as far as /proc tells."""
    threads = 0
    for folder in glob.iglob("/proc/[0-9]*/task"):
        with contextlib.suppress(OSError):  # it has ended
            if os.stat(folder).st_uid == user:
                threads += len(os.listdir(folder))
    return threads


OWN_CGROUPS = "/proc/self/cgroup"
CGROUPS = {  # where cgroups are, by their controllers: see cgroups(7)
    "": "/sys/fs/cgroup",  # version 2
    "pids": "/sys/fs/cgroup/pids",  # version 1
}


def read_number(path):
    """Return the number in a file, None if there is none."""
    with contextlib.suppress(OSError, ValueError):
        with open(path) as file:
            return int(file.read())
    return None


def cgroup_room():
    """Yield how many more threads each limited cgroup of ours may have."""
    with contextlib.suppress(OSError):
        with open(OWN_CGROUPS) as file:
            lines = file.read().splitlines()
        for _, controllers, path in (line.split(":", 2) for line in lines):
            if controllers not in CGROUPS:
                continue
            names = path.strip("/").split("/")
            for n in range(len(names) + 1):
                folder = os.path.join(CGROUPS[controllers], *names[:n])
                most = read_number(os.path.join(folder, "pids.max"))
                if most is not None:
                    yield most - read_number(
                        os.path.join(folder, "pids.current"))


def connections_bound():
    """Return how many connections we can have, each with a file and a thread.

    Login nodes often limit a user to some thousand threads, or a hundred.
    """
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    threads, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    bounds = [MAX_CONNECTIONS]
    if files >= 0:
        bounds.append(files - FILES_KEPT)
    if threads >= 0 and os.geteuid():  # root isn't bound by it
        bounds.append(threads - threads_of(os.getuid()) - THREADS_KEPT)
    bounds += (room - THREADS_KEPT for room in cgroup_room())
    return max(1, min(bounds))


class Server(ThreadingHTTPServer):
    """Serve a Store, each connection by a thread.

    `names` are the host names by which it may be called. `open` and `busy`
    are the connections, and those of them that are inside a request.
    """

    daemon_threads = True
    block_on_close = False  # stop() waits, and not for ever
    request_queue_size = 4096  # a thousand workers may start at once
    REJECTED = 50  # connections kept open for a while after a 503
    GRACE = 0.5  # seconds for one more request, as it stops
    END = 4  # seconds to answer the last ones

    def __init__(self, address, store=None):
        self.store = store
        self.tls = None  # the SSLContext, if it speaks TLS
        self.names = own_names()
        self.limit = connections_bound()
        self.open, self.busy = set(), set()
        self.changes = threading.Condition()  # notified when none is open
        self.rejected = deque()  # connections without a thread
        self.ending = False
        super().__init__(address, Handler)

    def server_bind(self):
        """Bind; HTTPServer would ask DNS for our name, for half a minute."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address

    def start(self):
        """Serve in a thread of its own."""
        self.store.keep_ticking()
        threading.Thread(
            target=self.serve_forever, args=(None,), daemon=True).start()

    def get_request(self):
        """Accept a connection; return its socket and the client's address."""
        try:
            connection, address = self.socket.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                time.sleep(0.01)  # the socket stays ready: don't spin
            raise
        if self.tls:
            connection = self.tls.wrap_socket(
                connection, server_side=True, do_handshake_on_connect=False)
        return connection, address

    def process_request(self, request, client_address):
        """Start the thread of a connection, or answer it with 503."""
        self.open.add(request)
        try:
            if len(self.open) > self.limit:
                raise RuntimeError("too many connections")
            super().process_request(request, client_address)
        except RuntimeError:  # also of a thread that can't be started
            self.reject(request)

    def reject(self, request):
        """Answer a connection with 503, without waiting for its request.

        It is closed later: a client that is still sending would otherwise
        see a reset instead of the response.
        """
        response = error_response(Unavailable("it has too many connections"))
        with contextlib.suppress(OSError):
            request.setblocking(False)
            if not self.tls:
                request.send(serialize(response, "close", head_only=False))
            request.shutdown(socket.SHUT_WR)
        self.open.discard(request)
        self.rejected.append(request)
        if len(self.rejected) > self.REJECTED:
            self.shutdown_request(self.rejected.popleft())

    def shutdown_request(self, request):
        """Close a connection; called last in its thread."""
        end_tls(request)
        super().shutdown_request(request)
        with self.changes:
            self.open.discard(request)
            if not self.open:
                self.changes.notify_all()

    def handle_error(self, request, client_address):
        """Print a fault of ours; clients that hang up or are slow are none."""
        if not isinstance(sys.exc_info()[1], OSError):
            traceback.print_exc()

    def stop(self):
        """Answer the requests that have come, and close the Store.

        Clients that go on asking are told that an answer is the last; then
        idle connections are closed. It takes less than 5 seconds.
        """
        self.ending = True
        self.close_door()
        self.store.wake_all()
        with self.changes:
            self.changes.wait_for(lambda: not self.open, self.GRACE)
        for connection in self.open - self.busy:
            with contextlib.suppress(OSError):  # below TLS, which goes on
                socket.socket.shutdown(connection, socket.SHUT_RD)
        with self.changes:
            self.changes.wait_for(lambda: not self.open, self.END)
        self.store.close()

    def close_door(self):
        """Accept the connections of the backlog, and none after them."""
        self.socket.setblocking(False)
        with contextlib.suppress(OSError):
            while True:
                self.process_request(*self.get_request())
        self.socket.shutdown(socket.SHUT_RDWR)  # wakes serve_forever()
        self.shutdown()
        self.server_close()
        for connection in self.rejected:
            self.shutdown_request(connection)


# ------------------------------------------------------------------ WSGI ---


def read_jobix(text, source):
    """Return the jobix that a text is; raise Trouble where it is none."""
    jobix = number(text.strip())
    if type(jobix) is not int or not 0 <= jobix <= MAX_JOBIX:
        raise Trouble("%s holds no number from 0 to 2^63-1." % source)
    return jobix


def given_jobix():
    """Return the jobix in the environment, None where there is none."""
    text = os.environ.get("JOBMAN_JOBIX")
    return None if text is None else read_jobix(text, "JOBMAN_JOBIX")


class Application:
    """The WSGI front door: `application`, made at its first call.

    The environment (of the process, set by the .wsgi file) has JOBMAN_DB,
    the database, JOBMAN_JOBIX, the one that is admitted if not that which
    the database makes, JOBMAN_OPEN=1 to admit any, JOBMAN_URL, for an access
    file that leads here, and JOBMAN_WAITERS, how many of a process' threads
    long polls may take (default 2).
    """

    def __init__(self):
        self.mutex = threading.Lock()
        self.store = None
        self.names = frozenset()

    def __call__(self, environ, start_response):
        try:
            response = respond(self.open(), self.read(environ))
        except Error as error:
            response = error_response(error)
        reason = http.client.responses[response.status]
        start_response(
            "%d %s" % (response.status, reason), list(response.headers)
        )
        return [b"" if environ["REQUEST_METHOD"] == "HEAD" else response.body]

    def open(self):
        """Return the Store of this process; raise Error 503 without one."""
        with self.mutex:
            if self.store and self.store.lock.lost:
                self.store.close()
                self.store = None
            if self.store is None:
                try:
                    self.store = self.make()
                except Trouble as trouble:
                    print(trouble, file=sys.stderr)
                    raise Unavailable("it can't start, see its log") from None
                self.store.keep_ticking()
                atexit.register(self.close)
                subscribe = getattr(
                    sys.modules.get("mod_wsgi"), "subscribe_shutdown", None)
                if subscribe:  # from 4.8 on
                    subscribe(self.wake)
            return self.store

    def wake(self, *_, **__):
        """Answer the long polls: mod_wsgi is about to kill this process."""
        store = self.store
        if store:
            store.wake_all()

    def close(self):
        """Close the Store; the next call makes another."""
        atexit.unregister(self.close)
        with self.mutex:
            store, self.store = self.store, None
        if store:
            store.close()

    def make(self):
        """Return a Store as the environment describes it, or Trouble."""
        waiters = number(os.environ.get("JOBMAN_WAITERS", "2"))
        if type(waiters) is not int:
            raise Trouble("JOBMAN_WAITERS must be a number of long polls.")
        store = Store(
            os.environ.get("JOBMAN_DB", "jobman.db"), shared=True,
            waiters=waiters, jobix=given_jobix(),
            open_to_all=os.environ.get("JOBMAN_OPEN") == "1",
        )
        if "JOBMAN_URL" in os.environ:
            url = os.environ["JOBMAN_URL"]
            self.names = names_in(url)
            write_access(access_path(), url, store)
        return store

    def read(self, environ):
        """Return the Request in a WSGI environment."""
        headers = {
            name[5:].replace("_", "-").lower(): value
            for name, value in environ.items()
            if name.startswith("HTTP_")
        }
        headers["content-length"] = environ.get("CONTENT_LENGTH", "")
        method = environ["REQUEST_METHOD"]
        check_origin(headers, headers.get("host", ""), self.names)
        length = body_length(method, headers)
        path = environ.get("PATH_INFO", "").encode("latin-1")
        return Request(
            method,
            path.decode("utf-8", "replace") or "/",
            environ.get("QUERY_STRING", ""),
            headers,
            lambda: require_length(environ["wsgi.input"].read(length), length),
            lambda: False,
            length,
        )


application = Application()


# -------------------------------------------------------------- snapshot ---

SLOT = '<script type="application/json" id="snapshot">'
SNAPSHOT_EVERY = 60  # seconds


def snapshot_page(seen):
    """Return what was seen at a glance as a page that needs no server."""
    page = dashboard_file()
    if page is None or SLOT not in page:
        page = plain_view(seen)
    else:
        data = to_json(seen).replace("<", "\\u003c")
        page = page.replace(SLOT, SLOT + data, 1)
    guard = '<meta http-equiv="Content-Security-Policy" content="%s">'
    return renewed(page, SNAPSHOT_EVERY, guard % policy(page))


def write_snapshot(folder, seen):
    """Write status.html, as `seen` at a glance; return its path, or Trouble.

    The umask decides who may read it.
    """
    path = os.path.join(folder, "status.html")
    try:
        replace_file(path, utf8(snapshot_page(seen)), 0o666)
    except OSError as error:
        raise Trouble(
            "The snapshot %s can't be written: %s." % (path, error.strerror)
        ) from None
    return path


def keep_snapshots(store, folder, ending):
    """Write a snapshot of the own jobs every minute, and one at the end."""
    told, over = None, False
    while not over:
        over = ending.wait(SNAPSHOT_EVERY)
        try:
            write_snapshot(folder, glance(store, store.jobix))
            told = None
        except (Trouble, Error, sqlite3.Error) as trouble:
            if str(trouble) != told:  # the disk may be full for hours
                told = str(trouble)
                say("jobman.py: %s" % told)


# ----------------------------------------------------------------- serve ---


def listen(host, port):
    """Return a Server that is bound to an address, without a Store yet."""
    try:
        return Server((host, port))
    except (OSError, OverflowError) as error:
        line = "Can't listen on port %d of %s: %s." % (
            port, host, cause(error))
        if getattr(error, "errno", None) == errno.EADDRINUSE:
            line += " Give another --port; 0 is any that is free."
        raise Trouble(line) from None


def is_local(server):
    """Return whether a server can be reached from this host alone."""
    return ipaddress.ip_address(server.server_address[0]).is_loopback


ALONE = (
    "jobman.py: %s: so only this server may have it, its reads wait for"
    " writes, and it keeps a rollback journal instead of a WAL."
)


@contextlib.contextmanager
def serving(options, access_file, jobix=None):
    """Serve `options.db` at `options.host` and port while the body runs.

    `jobix` is the own one, if not that of the database. Hands out the Server
    and the content of its access file.
    """
    tls, fingerprint = credentials(options)
    server = listen(options.host, options.port)
    server.tls = tls
    try:
        server.store = Store(
            options.db, shared=options.shared, waiters=server.limit * 4 // 5,
            jobix=jobix, open_to_all=options.open or is_local(server),
            max_attempts=options.retries + 1, max_lapses=options.lapses,
            keep_days=options.keep_days,
        )
    except BaseException:
        server.socket.close()
        raise
    location = server.store.location
    if location.exclusive:
        say(ALONE % location.describe())
    url = options.url or "%s://%s:%d" % (
        "https" if tls else "http",
        socket.gethostname() if options.host in ("", "0.0.0.0")
        else options.host,
        server.server_port,
    )
    server.names |= names_in(url)
    server.start()
    try:
        access = write_access(
            access_file, url, server.store, fingerprint
        )
        try:
            yield server, access
        finally:
            remove_access(access_file, access)
    finally:
        server.stop()


def until_signal():
    """Return an Event that a signal to end sets; it keeps the `number`."""
    ending = threading.Event()

    def end(number, _):
        ending.number = number
        # in a thread, for we may have interrupted who holds its lock
        threading.Thread(target=ending.set).start()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
            signal.signal(number, end)
    return ending


def raise_file_limit():
    """Let the process open as many files, so connections, as it may."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


ANNOUNCEMENT = """\
jobman %(version)s listens at %(url)s
  database     %(db)s
  access file  %(access)s
  page         %(page)s
  to look only %(reading)s
Add a job, then run what waits, here or on any node that sees this home:
  python3 jobman.py submit%(option)s hostname
  python3 worker.py --stage 0%(option)s"""


PLAIN_HTTP = (
    "jobman.py: This is plain HTTP: who can read the network's traffic can"
    " read the jobix, and use it (see --tls)."
)


def page_address(access, key, stream):
    """Return where the page is, to be shown on `stream`.

    `key` is that of a jobix in the access file. What comes after # is seen
    by no server; it is shown on a terminal alone.
    """
    page = access["url"] + "/get"
    if stream.isatty():
        return "%s#jobix=%d" % (page, access[key])
    return "%s (it asks for the %s in the access file)" % (page, key)


def announcement(options, access_file, access):
    """Return what serve says when it is ready."""
    usual = access_file == access_path()
    access_file = os.path.abspath(access_file)
    return ANNOUNCEMENT % {
        "version": __version__,
        "url": access["url"],
        "db": os.path.abspath(options.db),
        "access": access_file,
        "page": page_address(access, "jobix", sys.stdout),
        "reading": page_address(access, "reading_jobix", sys.stdout),
        "option": "" if usual else " --access " + shlex.quote(access_file),
    }


def own_jobix(options):
    """Return the jobix that serve is given, None where there is none."""
    path = options.jobix_file
    if path is None:
        return given_jobix()
    try:
        with open(path) as file:
            if os.fstat(file.fileno()).st_mode & 0o077:
                raise Trouble(
                    "Others can read %s: chmod 600 it, and put a new number"
                    " there if somebody may have." % path)
            return read_jobix(file.read(100), path)
    except OSError as error:
        raise Trouble("%s: %s." % (path, error.strerror)) from None
    except UnicodeDecodeError:
        return read_jobix("", path)


def serve(options):
    """Serve a database until a signal ends it."""
    jobix = own_jobix(options)
    raise_file_limit()
    gc.set_threshold(50000)  # a large body of JSON is no garbage
    ending = until_signal()
    access_file = options.access or access_path()
    with contextlib.ExitStack() as stack:
        server, access = stack.enter_context(
            serving(options, access_file, jobix))
        if options.snapshot is not None:
            store = server.store
            write_snapshot(options.snapshot, glance(store, store.jobix))
            keeper = threading.Thread(
                target=keep_snapshots, args=(store, options.snapshot, ending)
            )
            keeper.start()
            stack.callback(keeper.join)
            stack.callback(ending.set)
        print(announcement(options, access_file, access), flush=True)
        if not server.tls and not is_local(server):
            say(PLAIN_HTTP)
        while not ending.wait(1):  # a signal just before it goes unheard
            server.store.lock.need()
    return 0


# --------------------------------------------------------------- clients ---


def worker_script():
    """Return the path of worker.py; raise Trouble where it is missing."""
    script = beside("worker.py")
    if not os.path.exists(script):
        raise Trouble("%s is needed; copy it there." % script)
    return script


@contextlib.contextmanager
def using_worker():
    """Hand out worker.py as a module; its Trouble becomes ours."""
    sys.path.insert(0, os.path.dirname(worker_script()))
    worker = importlib.import_module("worker")
    del sys.path[0]
    try:
        yield worker
    except worker.Trouble as trouble:
        raise Trouble(printable(str(trouble))) from None


@contextlib.contextmanager
def speaking(options, patience=5):
    """Hand out a Client of the server that a command's options name.

    It gives the server up after `patience` seconds.
    """
    def tell(line):
        clear = "\r\033[K" if sys.stderr.isatty() else ""  # a bar's line
        say("%sjobman.py: %s" % (clear, printable(line)))

    with using_worker() as worker:
        client = worker.Client(options.access, patience=patience)
        client.tell = tell
        with contextlib.closing(client):
            yield client


PATIENCE = 60  # seconds for a server to answer who changes something


def read_array(text):
    """Return the numbers that --array names, a list of ranges.

    `1-9:2,12`, as Slurm reads it. Raises ArgumentTypeError, for argparse.
    """
    found = []
    for part in text.split(","):
        ends = re.fullmatch("([0-9]{1,9})(?:-([0-9]{1,9})(?::([0-9]{1,9}))?)?",
                            part.strip())
        first, last, step = 1, 0, 1
        if ends:
            first, last = int(ends[1]), int(ends[2] or ends[1])
            step = int(ends[3] or 1)
        if last < first or not step:
            raise argparse.ArgumentTypeError(
                "%.80r names no numbers; write 1-1000, 1-9:2,12" % part)
        found.append(range(first, last + 1, step))
    return found


def read_ids(text):
    """Return the jobids that `1,3,5-8` names: ranges, in order and apart.

    Raises ArgumentTypeError, for argparse.
    """
    ranges = []
    for part in text.split(","):
        ends = re.fullmatch("([0-9]{1,20})(?:-([0-9]{1,20}))?", part.strip())
        first, last = 1, 0
        if ends:
            first, last = int(ends[1]), int(ends[2] or ends[1])
        if not first <= last <= MAX_JOBID:
            raise argparse.ArgumentTypeError(
                "%.80r names no jobs; write ids as 1,3,5-8, up to %d" % (
                    part, MAX_JOBID))
        ranges.append((first, last + 1))
    apart = []
    for start, stop in sorted(ranges):
        if apart and start <= apart[-1].stop:
            apart[-1] = range(apart[-1].start, max(stop, apart[-1].stop))
        else:
            apart.append(range(start, stop))
    return apart


# What a word looks like on a terminal: numbers of ECMA-48's SGR.
COLOURS = {
    "working": 36, "done": 32, "failed": 31, "aborted": 31, "expired": 33,
    "blocked": 35, "delayed": 33, "cancelled": 90, "ok": 32, "wrong": 31,
}


def is_coloured(stream):
    """Return whether colours may go to a stream: see no-color.org."""
    return stream.isatty() and not os.environ.get("NO_COLOR")


def screen_size(stream):
    """Return the columns and lines of the terminal that a stream goes to."""
    try:
        size = tuple(os.get_terminal_size(stream.fileno()))
    except (OSError, ValueError):
        size = 0, 0
    return size if all(size) else (80, 24)


def shorten(text, width):
    """Return `text`, cut to a width, with dots where it was cut."""
    return text if len(text) <= width else text[: max(0, width - 3)] + "..."


def in_line(texts, widths, right, colours):
    """Return a table's line: a text for each width, to the `right` or not."""
    cells = []
    for text, width, to_right in zip(texts, widths, right):
        cell = text.rjust(width) if to_right else text.ljust(width)
        colour = colours.get(text.rpartition(", ")[2])
        cells.append("\033[%dm%s\033[0m" % (colour, cell) if colour else cell)
    return "  ".join(cells).rstrip()


def columns(heads, rows, widths=None, most=math.inf):
    """Yield the lines of a table for standard output, numbers to the right.

    A value may be None; a word that is a state has its colour. Of a table in
    pages only the first has `heads`, and all have a list of `widths`, which
    grow. A line has `most` characters, if its last column can be cut to that.
    """
    rows = list(rows)
    shown = [["" if v is None else printable(str(v)) for v in row]
             for row in [heads, *rows] if row]
    right = [{type(v) for v in column} <= {int, float, type(None)}
             for column in zip(*rows)] or [False] * len(heads or ())
    found = [max(map(len, column)) for column in zip(*shown)]
    if right and not right[-1]:
        found[-1] = 0  # nothing stands beyond it
    widths = [] if widths is None else widths
    widths[:] = map(max, itertools.zip_longest(found, widths, fillvalue=0))
    room = max(10, most - sum(widths[:-1]) - 2 * len(widths[1:]))
    colours = COLOURS if is_coloured(sys.stdout) else {}
    for texts in shown:
        texts[-1] = shorten(texts[-1], room)
        yield in_line(texts, widths, right, colours)


def number_of(n, thing):
    """Return how many there are of a thing: 1 job, 2 jobs."""
    return "%d %s%s" % (n, thing, "" if n == 1 else "s")


def report(options, value, lines, names=()):
    """Print what a command has found, in the form that --output names.

    `value` is printed as JSON, `lines` to be read, `names` (of jobs or of
    workers), where quiet, one a line.
    """
    if options.output == "json":
        lines = [to_json(value)]
    elif options.output == "quiet":
        lines = (printable(str(name)) for name in names)
    for line in lines:
        print(line)


def finding_lines(findings, names, seen):
    """Yield a line for each finding, and add it to those `seen`."""
    widths = [max(map(len, names)), len("wrong"), 0]
    for one in findings:
        seen.append(one)
        row = one["name"], "ok" if one["ok"] else "wrong", one["said"]
        yield from columns(None, [row], widths)


def report_findings(options, names, findings):
    """Print findings, of these names, as they come; return the exit status.

    Each is a dict of its name, whether it is ok, and what is said of it.
    """
    seen = []
    if options.output != "table":  # those come one by one
        seen.extend(findings)
    wrong = (one["name"] for one in seen if not one["ok"])
    report(options, seen, finding_lines(findings, names, seen), wrong)
    return int(not all(one["ok"] for one in seen))


def took(period):
    """Return how long something took, in seconds when they are few."""
    return "%.3g s" % period if period < 59.95 else span(period)


def bar(part, width=20):
    """Return a bar of which `part` (0 to 1) is full, and its percentage."""
    full = int(part * width)
    return "[%s%s] %3d%%" % ("#" * full, "." * (width - full), part * 100)


class Progress:
    """Show how far a run is: a bar on a terminal, else a line at times."""

    PERIOD = 10  # seconds between two lines

    def __init__(self, stream):
        self.stream = stream
        self.bar = stream.isatty()
        self.mutex = threading.Lock()  # one writes to the terminal at a time
        self.began = time.monotonic()
        self.said = self.began
        self.line = ""
        self.midway = False  # whether the output stands in mid-line

    def show(self, items, done, failed, fresh):
        """Show the figures, if it is time to; `fresh`: ended in this run."""
        now = time.monotonic()
        over, left = done + failed, items - done - failed
        rate = fresh / max(now - self.began, 0.001)
        text = "%d of %d done, %d failed, %.1f/s, %s left" % (
            done, items, failed, rate, span(left / rate) if rate else "?"
        )
        if self.bar:
            width = screen_size(self.stream)[0] - 1
            line = "%s %s" % (bar(over / max(items, 1)), text)
            with self.mutex:
                self.line = line[:width]
                self.draw()
        elif now - self.said >= self.PERIOD:
            self.said = now
            print(text, file=self.stream, flush=True)

    def draw(self):
        """Write the bar on a line of its own; the mutex is held."""
        if self.midway:
            self.stream.write("\n")
            self.midway = False
        self.stream.write("\r%s\033[K" % self.line)
        self.stream.flush()

    def relay(self, source, target):
        """Copy a command's output to the terminal, the bar kept below it."""
        for block in iter(lambda: source.read1(65536), b""):
            with self.mutex:
                if not self.midway:
                    self.stream.write("\r\033[K")
                    self.stream.flush()
                target.write(block)
                target.flush()
                self.midway = not block.endswith(b"\n")
                if not self.midway:
                    self.draw()

    def end(self):
        """Take the bar away."""
        if self.bar:
            with self.mutex:
                self.line = ""
                self.draw()


# --------------------------------------------------------------- looking ---


SILENT = 120  # seconds without a heartbeat, after which a worker is in doubt


def status_lines(figures):
    """Yield the lines of a table of the stages, and how far all is."""
    totals = figures["totals"]
    states = [state for state in STATES if totals["states"][state]]
    rows = []
    for stage in [*figures["stages"], dict(totals, stage="all")]:
        ran = stage.get("runtime") or {"median": None}
        rows.append((
            str(stage["stage"]), stage["jobs"],
            *(stage["states"][state] or None for state in states),
            stage["expired"] or None, ran["median"] and took(ran["median"]),
            "paused" if stage.get("paused") else None,
        ))
    heads = "stage", "jobs", *states, "expired", "median", ""
    yield from columns(heads, rows)
    yield progress_line(figures)


def print_status(options):
    """Show how far the jobs are."""
    with speaking(options) as client:
        figures = client.status()
    report(options, figures, status_lines(figures))
    return 0


def pages(client, *, most=math.inf, after=None, **options):
    """Yield lists of jobs until there are no more, or were `most`."""
    while most > 0:
        limit = min(most, MAX_PAGE)
        page = client.jobs(after=after, limit=limit, **options)
        yield page["jobs"]
        after, most = page["after"], most - len(page["jobs"])
        if after is None:
            return


def json_array(pages):
    """Yield the parts of a JSON array of what is in `pages`, one a line."""
    before = "[\n"
    for page in pages:
        if page:
            yield before + ",\n".join(map(to_json, page))
            before = ",\n"
    yield "[]\n" if before == "[\n" else "\n]\n"


def command_of(job):
    """Return a job's command as one would write it in a shell."""
    command = job["jobcmd"]
    if command is None or type(command) is str:
        return command
    if type(command) is list and {type(word) for word in command} == {str}:
        return " ".join(map(shlex.quote, command))
    return to_json(command)


ITEM_FIRST = 'export JOBMAN_ITEM="$1"; '  # of what shell_script() makes


def told_command(job):
    """Return a job's command as a person wrote it, the item filled in."""
    command = job["jobcmd"]
    if type(command) is list and len(command) == 5 and type(
            command[2]) is str and command[2].startswith(ITEM_FIRST):
        item = shlex.quote(str(command[4]))
        return command[2][len(ITEM_FIRST):].replace(
            '"${JOBMAN_ITEM}"', item).replace("${JOBMAN_ITEM}", item)
    return command_of(job)


def job_row(job):
    """Return what a table of jobs shows of one."""
    state = job["state"] + ", expired" * job["expired"]
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(job["since"]))
    return (job["jobid"], job["stage"], state, since, job["worker"],
            job["attempt"] or None, told_command(job))


def job_lines(pages):
    """Yield the lines of a table of the jobs in `pages`, a page at a time."""
    heads = "job", "stage", "state", "since", "worker", "attempt", "command"
    stdout, widths = sys.stdout, []
    most = screen_size(stdout)[0] if stdout.isatty() else math.inf
    for page in pages:
        lines = columns(heads, map(job_row, page), widths, most)
        yield "".join(line + "\n" for line in lines)
        heads = None


def print_jobs(options):
    """List jobs, a page at a time."""
    asked = {"stage": options.stage, "state": options.state}
    with speaking(options) as client:
        found = pages(client, most=options.limit, order=options.order, **asked)
        if options.output == "json":
            parts = json_array(found)
        elif options.output == "quiet":
            parts = ("".join("%d\n" % job["jobid"] for job in page)
                     for page in found)
        else:
            parts = job_lines(found)
        for part in parts:
            sys.stdout.write(part)
            sys.stdout.flush()
    return 0


def moment(then, now):
    """Return a moment near now as a time of day, another with its date."""
    if abs(then - now) < 43200:
        return time.strftime("%H:%M:%S", time.localtime(then))
    return clock_time(then)


def reason(job):
    """Return why a job's last attempt ended: `exit 1: no such file`."""
    attempt = job["attempts"][-1] if job["attempts"] else None
    if attempt is None:
        return "no attempt of it is known"
    code, error = attempt["exit_code"], last_line(attempt["error"])
    if code is not None and error in (None, "exit status %d" % code):
        error = "exit %d" % code
    words = error or attempt["outcome"], last_line(attempt["stderr"])
    return ": ".join(shorten(word, 200) for word in words if word)


def fault(worker, now):
    """Return why a worker takes no jobs, a word, or None if it does."""
    if worker["quarantine"]:
        return "quarantined"
    if worker["drain"]:
        return "drained"
    return "silent" if now - worker["heard"] > SILENT else None


def why_none(stage, serving, now):
    """Return why no worker of those serving a stage takes its jobs."""
    faults = Counter(fault(worker, now) for worker in serving)
    which, = faults if len(faults) == 1 else (None,)
    if which == "silent":
        which += " for " + span(now - max(w["heard"] for w in serving))
    elif which is None:
        which = ", ".join("%s (%d)" % pair for pair in sorted(faults.items()))
    if len(serving) > 1:
        return "all %d workers of stage %d are %s" % (
            len(serving), stage, which)
    only, = serving
    line = "the only worker of stage %d, %s, is %s" % (
        stage, only["name"], which)
    return line + ": %s" % only["quarantine"] if only["quarantine"] else line


def why_waiting(job, figures, heard):
    """Return why a job that could be claimed isn't."""
    now, stage = heard["time"], job["stage"]
    if any(s["paused"] for s in figures["stages"] if s["stage"] == stage):
        return "stage %d is paused" % stage
    serving = [w for w in heard["workers"] if stage in (w["stages"] or ())]
    if not serving:
        return "no worker serves stage %d" % stage
    able = [worker for worker in serving if fault(worker, now) is None]
    if not able:
        return why_none(stage, serving, now)
    line = "%s serve%s stage %d" % (
        number_of(len(able), "worker"), "s" * (len(able) == 1), stage)
    slots = sum(worker["slots"] or 0 for worker in able)
    free = slots - sum(worker["busy"] or 0 for worker in able)
    if free > 0:
        return "%s, and of %s %d free: its turn should come soon" % (
            line, number_of(slots, "slot"), free)
    if slots > 1:
        return "%s and all %s %d slots are busy" % (
            line, "their" if len(able) > 1 else "its", slots)
    return line + ", which is busy"


def why_delayed(job, figures, heard):
    """Return until when a job is delayed, and what for."""
    now, due = figures["time"], job["due"]
    last = job["attempts"][-1]["outcome"] if job["attempts"] else None
    after = "failure %d" % job["failures"]
    if last == "deferred":
        after = "it was deferred"
    elif last == "rejected" or not job["failures"]:
        after = "its files were rejected"
    elif job["max_attempts"]:
        after += " of %d" % job["max_attempts"]
    return "delayed until %s (in %s) after %s: %s" % (
        moment(due, now), span(max(0, due - now)), after, reason(job))


def why_blocked(job, figures, heard):
    """Return which jobs a job waits for."""
    named = [str(jobid) for jobid in job["waits_for"][:2]]
    more = job["waits"] - len(named)
    if more > 0:
        named.append(number_of(more, "other"))
    rest, last = named[:-1], named[-1:]
    return "waits for " + " and ".join(filter(None, [", ".join(rest), *last]))


def why_working(job, figures, heard):
    """Return who works on a job, since when and until when."""
    now, since, due = figures["time"], job["since"], job["due"]
    end = "has no lease"
    if due is not None:
        end = "has a lease until " + moment(due, now)
    return "%s has worked on it since %s (for %s) and %s" % (
        job["worker"] or "somebody", moment(since, now),
        span(max(0, now - since)), end)


def why_aborted(job, figures, heard):
    """Return by which job a job was aborted."""
    return "aborted, because job %s, which it waits for, failed, was " \
        "cancelled or aborted" % job["aborted_by"]


def why_ended(job, figures, heard):
    """Return since when a job has been in its state."""
    return "%s since %s" % (job["state"], clock_time(job["since"]))


def why_failed(job, figures, heard):
    """Return what a job has failed of."""
    return "failed: " + reason(job)


WHY = {
    "waiting": why_waiting, "delayed": why_delayed, "blocked": why_blocked,
    "working": why_working, "done": why_ended, "failed": why_failed,
    "cancelled": why_ended, "aborted": why_aborted,
}


def why(job, figures, heard):
    """Return in one sentence why a job isn't running, or who works on it.

    Of what /job, /status and /workers say, and nothing else.
    """
    return printable(WHY[job["state"]](job, figures, heard))


def attempt_row(attempt):
    """Return what a table of attempts shows of one."""
    return (
        attempt["attempt"], attempt["stage"],
        attempt["host"] or attempt["worker"], clock_time(attempt["started"]),
        took(attempt["ended"] - attempt["started"]), attempt["outcome"],
        attempt["exit_code"],
        last_line(attempt["stderr"]) or last_line(attempt["error"]),
    )


def details(job):
    """Yield the lines that show a job and its attempts to a person."""
    told = "jobid", "attempts", "why", "jobcmd", "expired", "since", "due"
    stages = "stage", "laststage", "made"  # that may be 0
    rows = [("why", job["why"]), ("command", told_command(job)),
            ("since", clock_time(job["since"]))]
    rows += [("expired", "its stage's lifetime is over")] * job["expired"]
    rows += [
        (name, value if type(value) is str else to_json(value))
        for name, value in job.items()
        if name not in told and (value or name in stages)
        and value is not None
    ]
    yield from columns(("job", str(job["jobid"])), rows)
    if job["attempts"]:
        yield ""
        heads = ("attempt", "stage", "where", "started", "took", "outcome",
                 "exit", "said")
        yield from columns(heads, map(attempt_row, job["attempts"]))
        said = (job["attempts"][-1]["stderr"] or "").splitlines()
        if len(said) > 1:
            yield "\nThe end of what the last one said:"
            yield from ("  " + printable(line) for line in said)


def print_job(options):
    """Show all that is known of a job, and why it isn't running."""
    with speaking(options) as client:
        job = client.job(options.jobid)
        job["why"] = why(job, client.status(), client.workers())
    report(options, job, details(job), [job["jobid"]])
    return 0


def worker_row(worker, now):
    """Return what a table of workers shows of one."""
    note = fault(worker, now)
    if worker["quarantine"]:
        note += ": " + worker["quarantine"]
    return (
        worker["name"], worker["host"],
        ",".join(map(str, worker["stages"] or ())), worker["slots"],
        worker["busy"], worker["done"], worker["failed"],
        span(max(0, now - worker["heard"])) + " ago", note,
    )


def worker_lines(heard):
    """Yield the lines of a table of the workers."""
    heads = ("worker", "host", "stages", "slots", "busy", "done", "failed",
             "heard", "")
    now = heard["time"]
    if heard["workers"]:
        rows = [worker_row(worker, now) for worker in heard["workers"]]
        yield from columns(heads, rows)
    else:
        yield ("No worker is there; those that have ended, or send no"
               " heartbeats, aren't shown.")


def print_workers(options):
    """Show the workers that were heard of in the last day."""
    with speaking(options) as client:
        heard = client.workers()
    names = [worker["name"] for worker in heard["workers"]]
    report(options, heard, worker_lines(heard), names)
    return 0


# What stands for a job in each state in the bar of a stage, in order.
SIGNS = {
    "done": "#", "working": "=", "waiting": ".", "delayed": "-",
    "blocked": ":", "failed": "!", "aborted": "!", "cancelled": "x",
}


def parts_of(states, width):
    """Return how many of a bar's characters each state has, in order.

    Whatever there is has one at least; the largest part makes up for that.
    """
    jobs = sum(states.values())
    parts = {
        state: max(1, int(width * states[state] / jobs))
        for state in SIGNS if states[state]
    }
    if parts:
        most = max(parts, key=lambda state: states[state])
        parts[most] += width - sum(parts.values())
    return parts


def stage_line(name, states, width, coloured):
    """Return a line of a `width` on a stage: a bar, and its figures."""
    def shown(state, text):
        colour = COLOURS.get(state) if coloured else None
        return "\033[%dm%s\033[0m" % (colour, text) if colour else text

    line, room = "%9s [" % name, max(10, min(40, width // 3))
    parts = parts_of(states, room)
    line += "".join(shown(s, SIGNS[s] * n) for s, n in parts.items())
    line += ("" if parts else " " * room) + "]"
    left = width - 12 - room
    for state in parts:
        text = " %s %d %s" % (SIGNS[state], states[state], state)
        if len(text) > left:
            break
        line += shown(state, text)
        left -= len(text)
    return line


def workers_line(heard):
    """Return a sentence on the workers."""
    now, workers = heard["time"], heard["workers"]
    faults = Counter(fault(worker, now) for worker in workers)
    able = [worker for worker in workers if fault(worker, now) is None]
    line = "No worker takes jobs"
    if able:
        line = "%s, %d of %s busy" % (
            number_of(len(able), "worker"),
            sum(worker["busy"] or 0 for worker in able),
            number_of(sum(worker["slots"] or 0 for worker in able), "slot"))
    for word in ("drained", "quarantined", "silent"):
        line += ", %d %s" % (faults[word], word) if faults[word] else ""
    return line + "."


def frame(figures, heard, size, coloured):
    """Return the lines of a live view that fits into a terminal."""
    width, height = size
    stages = [
        stage_line("stage %d%s" % (s["stage"], "*" * s["paused"]),
                   s["states"], width - 1, coloured)
        for s in figures["stages"]
    ]
    paused = any(s["paused"] for s in figures["stages"])
    said = [
        line for text in (
            progress_line(figures),
            workers_line(heard) + " (*: paused)" * paused)
        for line in textwrap.wrap(text, width - 1)
    ]
    room = max(0, height - len(said) - 4)  # and 4 lines that aren't stages
    if len(stages) > room:
        more = number_of(len(stages) - room, "more stage")
        stages[room:] = ["    ... and " + more]
    all_states = figures["totals"]["states"]
    return [
        *stages, stage_line("all", all_states, width - 1, coloured), *said]


def away(seen, trouble):
    """Return a line that says that the server can't be asked."""
    line = printable(str(trouble)) + " Still asking."
    if seen:
        line += " Figures of %s." % clock_time(seen[0]["time"])
    return line


class Screen:
    """A live view on a terminal, drawn again in its place.

    A view is one write that leaves the terminal as it found it, so that we
    may be ended at any moment. Lines don't wrap, and after a change of the
    terminal's size, which may have moved them, it begins at the top.
    """

    def __init__(self, stream):
        self.stream = stream
        self.size = screen_size(stream)
        self.drawn = 0  # lines above the cursor that are ours

    def show(self, seen, trouble):
        """Draw what was `seen` last, and what `trouble` there is now."""
        size, up = screen_size(self.stream), "\033[%dA" % self.drawn
        if size != self.size:
            self.size, up = size, "\033[H\033[2J"
        elif not self.drawn:
            up = ""
        lines = []
        if trouble:
            lines.append(shorten(away(seen, trouble), size[0] - 1))
        if seen:
            lines += frame(*seen, size, is_coloured(self.stream))
        del lines[size[1] - 1:]
        self.drawn = len(lines)
        self.stream.write("%s\033[?7l%s\033[J\033[?7h" % (
            up, "".join(line + "\033[K\n" for line in lines)))
        self.stream.flush()

    def end(self):
        """Leave what is drawn, and begin a new line."""
        self.stream.write("\n")


class Ticker:
    """A live view where there is no terminal: a line when there is news."""

    PERIOD = 10  # seconds between two lines at least

    def __init__(self, stream):
        self.stream = stream
        self.said = -math.inf
        self.states = self.trouble = None
        self.reader = select.poll()
        self.reader.register(stream, 0)

    def show(self, seen, trouble):
        """Say what is new; raise BrokenPipeError when nobody reads us."""
        if any(event & select.POLLERR for _, event in self.reader.poll(0)):
            raise BrokenPipeError
        if trouble and not self.trouble:
            say(away(seen, trouble))
        self.trouble = trouble
        states = seen and seen[0]["totals"]["states"]
        now = time.monotonic()
        if states != self.states and now >= self.said + self.PERIOD:
            self.states, self.said = states, now
            line = "%s %s" % (
                clock_time(seen[0]["time"]), progress_line(seen[0]))
            self.stream.write(line + "\n")
            self.stream.flush()

    def end(self):
        """Leave it at that."""


def watch(options):
    """Show live how the jobs stand, until a signal."""
    view = (Screen if sys.stdout.isatty() else Ticker)(sys.stdout)
    seen = None
    with using_worker() as worker, speaking(options, 0) as client:
        try:
            while True:
                began, trouble = time.monotonic(), None
                try:
                    seen = client.status(), client.workers()
                except worker.Unreachable as lost:
                    trouble = lost
                view.show(seen, trouble)
                time.sleep(max(1, time.monotonic() - began))
        except KeyboardInterrupt:
            view.end()
            raise


def first_open(client, ids, seen):
    """Return the first job of a range that hasn't ended, or None.

    The states of those before it are counted in `seen`.
    """
    after = ids.start - 1 if ids.start else None
    for page in pages(client, most=len(ids), after=after):
        for job in page:
            if job["jobid"] not in ids:
                return None
            if job["state"] in UNENDED:
                return job["jobid"]
            seen[job["state"]] += 1
    return None


def standing_of(client, ranges):
    """Yield how jobs stand: how many haven't ended, and states of the rest.

    Only the first that hasn't ended is looked at, again and again; those
    after it count as such. At last none is left. Raises Trouble when there
    is no job in one of the ranges.
    """
    seen, jobs = Counter(), sum(map(len, ranges))
    for ids in ranges:
        before, place = sum(seen.values()), first_open(client, ids, seen)
        if place is None and sum(seen.values()) == before:
            raise Trouble("There is no job %s." % (
                ids[0] if len(ids) == 1
                else "from %d to %d" % (ids[0], ids[-1])))
        while place is not None:
            one, rest = range(place, place + 1), range(place + 1, ids.stop)
            while first_open(client, one, seen) is not None:
                yield max(1, jobs - sum(seen.values())), seen
            place = first_open(client, rest, seen)
    yield 0, seen


def standing_of_all(client):
    """Yield, again and again, how all jobs stand; as standing_of()."""
    while True:
        states = client.status()["totals"]["states"]
        yield sum(states[state] for state in UNENDED), Counter({
            state: states[state] for state in STATES if state not in UNENDED})


def await_end(client, standing, end, progress):
    """Wait until no job is left; return the states. Raises Trouble at `end`.

    `end` and all of our pauses are by the monotonic clock.
    """
    pause, ended_before = 0.05, None
    for left, seen in standing:
        if not left:
            return seen
        ended = sum(seen.values())
        if ended_before is None:
            ended_before = ended
        if progress:
            bad = ended - seen["done"]
            progress.show(left + ended, seen["done"], bad,
                          ended - ended_before)
        now = time.monotonic()
        if now >= end:
            raise Trouble("The time is over, and not all jobs have ended.")
        client.patience = None if end == math.inf else end - now
        pause = min(2, 1.3 * pause)
        time.sleep(min(pause, end - now))


def wait(options):
    """Return when jobs have ended; exit status 1 if some ended badly."""
    end = time.monotonic() + (
        math.inf if options.timeout is None else options.timeout)
    progress = Progress(sys.stderr) if sys.stderr.isatty() else None
    with speaking(options) as client:
        try:
            seen = await_end(client, standing_of(client, options.ids)
                             if options.ids else standing_of_all(client),
                             end, progress)
        finally:
            if progress:
                progress.end()
    states = {state: seen[state] for state in STATES if seen[state]}
    ended = sum(states.values())
    line = ", ".join("%d %s" % (n, state) for state, n in states.items())
    report(options, {"jobs": ended, "states": states},
           ["%s ended%s." % (number_of(ended, "job"), line and ": " + line)])
    return 1 if options.exit_code and ended > seen["done"] else 0


JOB_COLUMNS = (
    "jobid", "stage", "state", "expired", "since", "priority", "laststage",
    "worker", "attempt", "failures", "lapses", "waits", "aborted_by",
    "filename", "jobcmd",
)
ATTEMPT_COLUMNS = (
    "host", "started", "ended", "outcome", "exit_code", "error", "stderr")
JOBLOG_COLUMNS = (
    "Seq", "Host", "Starttime", "JobRuntime", "Send", "Receive", "Exitval",
    "Signal", "Command",
)


def csv_cell(value):
    """Return a value for a cell of a CSV file: text as it is, else JSON."""
    return value if type(value) is str else \
        "" if value is None else to_json(value)


def as_csv(pages, write):
    """Write jobs, each with its last attempt, by the rules of RFC 4180."""
    line = csv.writer(types.SimpleNamespace(write=write)).writerow
    line([*JOB_COLUMNS, *ATTEMPT_COLUMNS])
    for job in itertools.chain.from_iterable(pages):
        attempt = job["attempts"][-1] if job["attempts"] else {}
        line([csv_cell(job[name]) for name in JOB_COLUMNS]
             + [csv_cell(attempt.get(name)) for name in ATTEMPT_COLUMNS])


def as_json(pages, write):
    """Write jobs, each with its last attempt, as a JSON array."""
    for part in json_array(pages):
        write(part)


def joblog_line(job):
    """Return a job's line in a log as GNU parallel's --joblog writes it.

    It says 0 and a signal where that ended the command, and has a NUL for
    each end of a line in the command; so it can read the line again.
    """
    attempt = job["attempts"][-1]
    code, number = attempt["exit_code"] or -1, 0
    if attempt["outcome"] == "done":
        code = 0
    elif 128 < code <= 192:
        code, number = 0, code - 128
    where = attempt["host"] or attempt["worker"] or ":"
    return "\t".join((
        str(job["jobid"]), re.sub(r"\s", "_", where),
        "%.3f" % attempt["started"],
        "%10.3f" % max(0, attempt["ended"] - attempt["started"]),
        "0", "0", str(code), str(number),
        (command_of(job) or "").replace("\n", "\0"),
    )) + "\n"


def as_joblog(pages, write):
    """Write a line for each job of which an attempt has ended."""
    write("\t".join(JOBLOG_COLUMNS) + "\n")
    for job in itertools.chain.from_iterable(pages):
        if job["attempts"]:
            write(joblog_line(job))


def to_bytes(text):
    """Return `text` as bytes, names of files that aren't UTF-8 as they are.
    """
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return utf8(text)


FORMATS = {"csv": as_csv, "json": as_json, "joblog": as_joblog}


def export(options):
    """Print all jobs, or some, each with its last attempt."""
    output = sys.stdout.buffer
    with speaking(options) as client:
        found = pages(client, attempts=1, stage=options.stage,
                      state=options.state)
        FORMATS[options.format](
            found, lambda text: output.write(to_bytes(text)))
    output.flush()
    return 0


def stats_lines(figures):
    """Yield the lines of a table of what time the jobs took."""
    rows = []
    for stage in [*figures["stages"], dict(figures["totals"], stage="all")]:
        row = [str(stage["stage"]), stage["claims"], stage["retries"]]
        for name in ("run", "wait"):
            parts = stage.get(name) or {"median": None, "p95": None}
            row += [None if parts[part] is None else took(parts[part])
                    for part in ("median", "p95")]
        row += ["%.2f" % (stage[name] / 3600)
                for name in ("useful", "idle", "lost")]
        advised = stage.get("advised")
        rows.append([*row, advised and "%d min" % advised])
    yield from columns((
        "stage", "claims", "retries", "run median", "p95", "wait median",
        "p95", "useful h", "idle h", "lost h", "lifetime advised"), rows)


def print_stats(options):
    """Show what time the jobs of each stage took."""
    with speaking(options) as client:
        figures = client.stats()
    report(options, figures, stats_lines(figures))
    return 0


def snapshot(options):
    """Write a page of how the jobs stand that needs no server."""
    with speaking(options) as client:
        seen = {
            name: client.call("GET", "/" + endpoint.__name__, options=asked)
            for name, endpoint, asked in GLANCE
        }
    path = write_snapshot(options.folder, seen)
    report(options, {"file": path}, [path], [path])
    return 0


def damaged(worker, jobs, lag):
    """Yield those of `jobs` whose files aren't as they were made, and these.

    A shared file system may show files late: the wait for that is `lag`
    seconds, once for all.
    """
    end = time.monotonic() + lag
    for job in jobs:
        left = max(0, end - time.monotonic())
        bad = worker.await_files(job["files"] or (), left, threading.Event())
        if bad:
            yield job, bad


def send_back(worker, client, job, bad, options):
    """Say what is wrong with a job's files, and reject them if that is so."""
    names = ", ".join(printable(file["path"]) for file in bad)
    line = "job %d: not as it was made: %s" % (job["jobid"], names)
    if not options.dry_run:
        error = "not as it was made: " + names
        try:
            answer = client.reject_job(
                job["jobid"], error=error, files=job["files"]
            )
            line += " (now %(state)s in stage %(stage)d)" % answer
        except worker.Refused as refused:
            line += " (%s)" % refused
    say(line)


def verify(options):
    """Check the files of all done jobs; send back the damaged ones."""
    checked, doubtful = 0, []
    with using_worker() as worker:
        client = worker.Client(options.access)
        for jobs in pages(client, state="done"):
            doubtful += [job for job, _ in damaged(worker, jobs, 0)]
            checked += len(jobs)
            if sys.stderr.isatty():
                sys.stderr.write("\r%d jobs checked\033[K\r" % checked)
        found = list(damaged(worker, doubtful, options.lag))
        for job, bad in found:
            send_back(worker, client, job, bad, options)
        client.close()
    say("%d done jobs checked, %d of them damaged." % (checked, len(found)))
    listed = [
        {"jobid": job["jobid"], "files": [file["path"] for file in bad]}
        for job, bad in found]
    report(options, {"checked": checked, "damaged": listed}, (),
           [job["jobid"] for job, _ in found])
    return 1 if found else 0


def printed_by(jobid, folder, space):
    """Return what the attempts at a job have printed, as the logs have it.

    A list of (began, stage, attempt, stream, offset, length, path) in order.
    """
    line = re.compile(rb"^%d (\d+) (\d+) (\d+) ([12]) (\d+) (\d+)$" % jobid,
                      re.M)
    found = []
    for name in sorted(os.listdir(folder)):
        if name.endswith(".index") and name.split(".")[-3:-2] == [space]:
            path = os.path.join(folder, name)
            with open(path, "rb") as file:
                for match in line.finditer(file.read()):
                    stage, attempt, began, *piece = map(int, match.groups())
                    output = path[: -len("index")] + "out"
                    found.append((began, stage, attempt, *piece, output))
    return sorted(found, key=lambda piece: piece[:3])


def logs(options):
    """Print what the commands of a job have printed, attempt by attempt."""
    with using_worker() as worker:
        client = worker.Client(options.access)  # which asks nothing
        folder = options.logs or worker.beside(client.access, "logs")
        space = worker.namespace(client.jobix)
    try:
        pieces = printed_by(options.jobid, folder, space)
    except FileNotFoundError:
        pieces = []
    if not pieces:
        raise Trouble("Nothing that job %d has printed is in %s." % (
            options.jobid, folder))
    shown = None
    for began, stage, attempt, stream, offset, length, path in pieces:
        if shown != (began, stage, attempt):
            shown = began, stage, attempt
            say("--- stage %d, attempt %d, %s, %s" % (
                stage, attempt, os.path.basename(path).rsplit(".", 3)[0],
                clock_time(began / 1000)))
        with open(path, "rb") as file:
            file.seek(offset)
            target = sys.stdout if stream == 1 else sys.stderr
            target.buffer.write(file.read(length))
            target.flush()
    return 0


# ------------------------------------------------------------------- run ---


QUOTED_ITEM = {"'": "'\"${JOBMAN_ITEM}\"'", '"': "${JOBMAN_ITEM}"}
SHELL_PIECE = re.compile(
    r"""(?P<item> \{\} ) | (?P<number> \{\#\} ) | \\. | \$\(
    | (?<![^\s;&|(`])\#[^\n]*  # a comment
    | .""",
    re.DOTALL | re.VERBOSE,
)


def turn_quotes(quotes, piece):
    """Follow, on the stack `quotes`, what quotes `piece` opens or closes."""
    inside = quotes[-1]
    if piece == inside or (piece == ")" and inside == "("):
        quotes.pop()
    elif inside != "'":
        if piece == "$(" or (piece == "(" and inside == "("):
            quotes.append("(")
        elif piece in ('"', "`") or (piece == "'" and inside != '"'):
            quotes.append(piece)


def shell_script(command, number):
    """Return `command` as a script in which the shell fills in the item.

    The script is run with the item as its first argument and takes it from
    a variable, so that nothing in an item is ever executed. `{}` becomes
    one word in any quotes that it stands in; `{#}` becomes `number`. What the
    script starts has the item in its environment.
    """
    script, quotes, i = [ITEM_FIRST], [""], 0
    while i < len(command):
        match = SHELL_PIECE.match(command, i)
        piece, inside = match.group(), quotes[-1]
        if match.lastgroup == "item":
            script.append(QUOTED_ITEM.get(inside, '"${JOBMAN_ITEM}"'))
        elif match.lastgroup == "number":
            script.append(str(number))
        else:
            if inside == "'" or (inside == '"' and piece[0] == "#"):
                piece = piece[0]  # means nothing special in there
            script.append(piece)
            turn_quotes(quotes, piece)
        i += len(piece)
    return "".join(script)


def with_item(command):
    """Return a command in which the item stands, at the end if not before."""
    named = "{}" in command or "{#}" in command
    return command if named else command + " {}"


def argv_of(command, item, number):
    """Return what is executed for an item of a command; see shell_script."""
    return ["/bin/sh", "-c", shell_script(command, number), "sh", item]


def from_utf8(text):
    """Return bytes as a string, those that aren't UTF-8 preserved."""
    return text.decode("utf-8", "surrogateescape")


def command_in(options):
    """Return the command in a command line's words."""
    return from_utf8(os.fsencode(" ".join(options.words)))


def open_items(options):
    """Return the file that a run's items come from, None for arguments."""
    if options.items is not None:
        return None
    name = options.arg_file
    source = 0 if name in (None, "-") else name  # 0 is standard input
    try:
        return open(source, "rb", buffering=0, closefd=source != 0)
    except OSError as error:
        raise Trouble("Can't read %s: %s." % (name, error.strerror)) from None


def read_items(options, source):
    """Yield lists of items, of those that come in time as soon as they do."""
    if source is None:
        items = [from_utf8(os.fsencode(item)) for item in options.items]
        for i in range(0, len(items), 1000):
            yield items[i : i + 1000]
        return
    rest = []  # of a line that hasn't ended yet
    with source:
        for block in iter(lambda: source.read(8192), b""):
            *lines, end = block.split(b"\n")
            if lines:
                lines[0] = b"".join([*rest, lines[0]])
                yield [from_utf8(line) for line in lines]
                rest.clear()
            rest.append(end)
    if any(rest):
        yield [from_utf8(b"".join(rest))]


class Run:
    """One command over many items: its jobs, and how far they are.

    A job is known by its command, its item and how often that item came
    before: the same run, started again, finds its jobs.
    """

    NAMED = 10  # failures told one by one at the end

    def __init__(self, store, command, retries):
        self.store = store
        self.command = with_item(command)
        self.max_attempts = retries + 1
        self.items = 0  # that have become jobs
        self.loaded = False
        self.error = None

    def put_others_aside(self):
        """Cancel what isn't done of other runs and earlier starts.

        What belongs to this one is brought back as it is loaded.
        """
        self.store.cancel(self.store.jobix)
        self.done_before = self.states()["done"]

    def states(self):
        """Return how many jobs are in each state."""
        return self.store.status(self.store.jobix)["totals"]["states"]

    def load(self, items):
        """Add the jobs of `items`, lists of them; the done ones stay so.

        put_others_aside() comes first.
        """
        try:
            seen = Counter()
            for some in items:
                self.add(some, seen)
        except (Error, OSError, sqlite3.Error) as error:
            self.error = error
        self.loaded = True

    def add(self, items, seen):
        """Add the jobs of some items, or bring them back."""
        keys, jobs = [], []
        for place, item in enumerate(items, self.items + 1):
            seen[item] += 1
            known = to_json([self.command, item, seen[item]]).encode("ascii")
            keys.append((hashlib.sha256(known).hexdigest()[:32], 1))
            argv = argv_of(self.command, item, place)
            jobs.append({"jobstage": 0, "jobcmd": argv, "laststage": 2})
        given = self.store.submit(self.store.jobix, keys, read_jobs(jobs))
        ids = [ids[0] for ids in given]
        self.store.limit_attempts(self.store.jobix, ids, self.max_attempts)
        self.store.retry(self.store.jobix, ids=ids, state="cancelled")
        self.items += len(items)

    def figures(self):
        """Return whether it is over, and some numbers of jobs.

        How many there are, are done, have failed, and have come to either
        end since the start.
        """
        items, loaded = self.items, self.loaded
        states = self.states()
        left = sum(states[state] for state in UNENDED)
        failed = states["failed"]
        done = max(0, items - left - failed)
        fresh = states["done"] - self.done_before + failed
        return loaded and not left, items, done, failed, fresh


    def failures(self):
        """Return a line on each of the first few jobs that failed."""
        jobix = self.store.jobix
        for job in self.store.some_failed(jobix, limit=self.NAMED):
            last = (job["stderr"] or "").strip().rpartition("\n")[2]
            item = from_json(job["jobcmd"])[-1]
            line = "failed: %s (%s) %s" % (item, job["error"], last)
            yield printable(line)


class WorkerProcess:
    """The worker of a run: worker.py in a process of its own.

    It ends when our end of the pipe to it closes, so also when we are
    killed. On a terminal its output comes through us, around the bar.
    """

    PATIENCE = 20  # seconds for its commands to end

    def __init__(self, access_file, slots, progress):
        command = [sys.executable, worker_script(), "--access", access_file]
        command += ["--print", "--spool", access_file + ".spool"]
        command += ["--until-eof", "--idle-timeout", "1000000000"]
        command += ["--slots", str(slots)] if slots else []
        relayed = [
            stream.buffer if progress.bar and stream.isatty() else None
            for stream in (sys.stdout, sys.stderr)
        ]
        out, err = (target and subprocess.PIPE for target in relayed)
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=out, stderr=err
        )
        sources = self.process.stdout, self.process.stderr
        self.relays = [
            threading.Thread(target=progress.relay, args=pair, daemon=True)
            for pair in zip(sources, relayed)
            if pair[0]
        ]
        for relay in self.relays:
            relay.start()

    def end(self):
        """Let it give back what it has, and wait for it."""
        self.process.stdin.close()
        try:
            self.process.wait(self.PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        for thread in self.relays:
            thread.join()


class Interrupted(Exception):
    """End a run before it is over: the reason, and a signal's number."""


def follow(this, worker, progress, ending):
    """Show progress until a Run is over; return its last figures.

    Raises Interrupted when a signal, or a closed pipe, ends it before.
    """
    over = False
    while not over:
        if ending.wait(0.05):
            raise Interrupted("Interrupted", ending.number)
        over, *figures = this.figures()
        this.store.lock.need()
        if this.error:
            raise Trouble("The jobs can't be added: %s" % this.error)
        status = worker.process.poll()
        if status == 128 + signal.SIGPIPE:
            raise Interrupted("Nobody reads the output", signal.SIGPIPE)
        if status is not None and not over:
            raise Trouble("The worker has ended; start the run once more.")
        progress.show(*figures)
    return figures


def sum_up(this, figures, progress):
    """Say what came of a run; return its exit status."""
    items, done, failed, fresh = figures
    for failure in this.failures():
        say(failure)
    if failed > this.NAMED:
        say("... and %d more." % (failed - this.NAMED))
    before = done + failed - fresh
    if before > 0:
        say(
            "%d were done before and not run again; for that use another --db,"
            " or remove the old one." % before
        )
    say("%d of %d done, %d failed, in %s." % (
        done, items, failed, span(time.monotonic() - progress.began)
    ))
    return 1 if failed else 0


def run(options):
    """Run a command for each item; exit status 1 when a job failed."""
    worker_script()
    source = open_items(options)
    ending = until_signal()
    access_file = options.db + ".access"
    progress = Progress(sys.stderr)
    with serving(options, access_file) as (server, access):
        say("Watch it at " + page_address(access, "jobix", sys.stderr))
        this = Run(server.store, command_in(options), options.retries)
        this.put_others_aside()
        worker = WorkerProcess(access_file, options.slots, progress)
        items = read_items(options, source)
        threading.Thread(target=this.load, args=(items,), daemon=True).start()
        try:
            figures = follow(this, worker, progress, ending)
        except Interrupted as interrupted:
            reason, number = interrupted.args
            progress.end()
            say(reason + "; the same command goes on where it was.")
            return 128 + number
        finally:
            server.store.wait_queue.close()  # its long poll needn't be broken off
            worker.end()
            progress.end()
        return sum_up(this, figures, progress)


# ---------------------------------------------------------------- acting ---

ASKED_FROM = 100  # of more than so many one is asked
IDS_AT_ONCE = 100000  # in a call
PART = 2000  # jobs that are submitted in a call
PART_SIZE = 2**20  # characters of them


def agree(options, what):
    """Ask whether to do `what`; raise Trouble where that isn't wanted."""
    if options.yes:
        return
    if not (sys.stdin and sys.stdin.isatty() and sys.stderr.isatty()):
        raise Trouble("That would %s; say --yes to do it." % what)
    sys.stderr.write("%s? [y/N] " % (what[0].upper() + what[1:]))
    sys.stderr.flush()
    if sys.stdin.buffer.readline().strip().lower() not in (b"y", b"yes"):
        raise Trouble("Nothing was changed.")


def read_selection(text):
    """Return what IDS names: "all", or a list of ranges of jobids."""
    return text if text == "all" else read_ids(text)


def count_selected(client, options, states):
    """Return how many jobs a selection may be about."""
    if type(options.ids) is list:
        return sum(map(len, options.ids))
    return sum(
        stage["states"][state]
        for stage in client.status()["stages"]
        if options.stage in (None, stage["stage"])
        for state in states if options.state in (None, state)
    )


def selections(options):
    """Yield what a selection is in calls, ids in parts."""
    narrowed = {"stage": options.stage, "state": options.state}
    if type(options.ids) is list:
        ids = itertools.chain.from_iterable(options.ids)
        for some in iter(lambda: list(itertools.islice(ids, IDS_AT_ONCE)), []):
            yield dict(narrowed, ids=some)
    elif options.stage is options.state is None:
        yield {"all": True}
    else:
        yield narrowed


# What is done to jobs, and in what states they must be for that.
DEEDS = {
    "retry": ("retried", RETRIABLE),
    "cancel": ("cancelled", CANCELLABLE),
    "release": ("released", ("working",)),
    "forget": ("forgotten", ("done",)),
}


def change_jobs(options):
    """Do to the selected jobs what the command is called."""
    deed, states = DEEDS[options.command]
    changed = 0
    with speaking(options, PATIENCE) as client:
        n = count_selected(client, options, states)
        if n > ASKED_FROM:
            agree(options, "%s %d jobs" % (options.command, n))
        try:
            for selector in selections(options):
                changed += getattr(client, options.command)(**selector)
        except BaseException:
            if changed:
                say("%s %s before that." % (number_of(changed, "job"), deed))
            raise
    line = "%s %s" % (number_of(changed, "job"), deed)
    report(options, {deed: changed}, [line])
    return 0


def change_stage(options):
    """Pause or resume a stage."""
    with speaking(options, PATIENCE) as client:
        answer = getattr(client, options.command)(options.stage)
    goes = "is paused" if answer["paused"] else "goes on"
    report(options, answer, ["stage %d %s" % (answer["stage"], goes)])
    return 0


def if_there(act, name):
    """Return what a call about a worker gives, None if it has just ended."""
    try:
        return act(name)
    except Exception as error:
        if getattr(error, "status", None) != 404:
            raise


def change_workers(options):
    """Drain or undrain a worker, or all."""
    with speaking(options, PATIENCE) as client:
        act = getattr(client, options.command)
        names = [clean(from_utf8(os.fsencode(options.worker)))]
        if options.worker != "all":
            answers = [act(name) for name in names]
        else:
            names = [worker["name"] for worker in client.workers()["workers"]]
            if len(names) > ASKED_FROM:
                agree(options, "%s %d workers" % (options.command, len(names)))
            answers = list(filter(None, (
                if_there(act, name) for name in names)))
    goes = "claims no more" if options.command == "drain" else "goes on"
    lines = ("%s %s" % (printable(answer["worker"]), goes)
             for answer in answers)
    report(options, answers, lines, [each["worker"] for each in answers])
    return 0


def move_jobs(options):
    """Move the expired jobs of a stage to another."""
    with speaking(options, PATIENCE) as client:
        n = sum(stage["expired"] for stage in client.status()["stages"]
                if stage["stage"] == options.old)
        if n > ASKED_FROM:
            agree(options, "move %d jobs" % n)
        answer = client.check_stages(options.old, options.new)
    moved = number_of(answer["n_bad_jobs were degraded:"], "expired job")
    report(options, answer, ["%s moved" % moved])
    return 0


def lifetime_lines(minutes):
    """Return the lines of a table of {stage: minutes}."""
    return columns(("stage", "minutes"), sorted(minutes.items()))


def change_lifetime(options):
    """Show the lifetimes, or that of a stage, or set it."""
    with speaking(options, PATIENCE) as client:
        if options.stage is None:
            found = client.init()
            report(options, found, lifetime_lines(found))
        else:
            found = client.lifetime(options.stage, options.minutes)
            report(options, found, [str(found)])
    return 0


def set_lifetimes(options):
    """Set the lifetimes of the first stages, where there are none yet."""
    with speaking(options, PATIENCE) as client:
        found = client.init(*options.minutes)
    report(options, found, lifetime_lines(found))
    if options.minutes and found != dict(enumerate(options.minutes)):
        raise Trouble("There were lifetimes already, and they stay: change one"
                      " with `lifetime STAGE MINUTES`.")
    return 0


def ids_text(ranges):
    """Return ranges of jobids as read_ids() reads them."""
    return ",".join("%d" % ids[0] if len(ids) == 1
                    else "%d-%d" % (ids[0], ids[-1]) for ids in ranges)


def add_ids(ranges, ids):
    """Add jobids to a list of ranges."""
    for jobid in ids:
        if ranges and ranges[-1].stop == jobid:
            ranges[-1] = range(ranges[-1].start, jobid + 1)
        else:
            ranges.append(range(jobid, jobid + 1))


def count_lines(source):
    """Return how many lines a file has, None where it is no regular file."""
    if not stat.S_ISREG(os.fstat(source.fileno()).st_mode):
        return None
    start = source.tell()  # others may have read what is before
    blocks = iter(lambda: source.read(2**20), b"")
    lines = sum(block.count(b"\n") for block in blocks)
    source.seek(start)
    return lines


def carried(options):
    """Return what each job that is submitted carries, but its command."""
    entry = {name: getattr(options, name) for name in (
        "laststage", "priority", "max_attempts", "timeout")}
    if entry["laststage"] is None:
        entry["laststage"] = options.stage + 2
    try:
        folder = os.path.abspath(options.cwd or ".")
    except FileNotFoundError:
        raise Trouble("This folder is gone; say --cwd DIR.") from None
    entry["cwd"] = from_utf8(os.fsencode(folder))
    entry["after"] = list(itertools.chain.from_iterable(options.after)) or None
    return dict(
        {name: value for name, value in entry.items() if value is not None},
        jobstage=options.stage,
    )


def entries(options, lists):
    """Yield the jobs of lists of items, or of commands."""
    common, command = carried(options), with_item(command_in(options))
    for place, item in enumerate(itertools.chain.from_iterable(lists), 1):
        if not options.commands:
            yield dict(common, jobcmd=argv_of(command, item, place))
        elif item.strip() and not item.startswith("#"):
            yield dict(common, jobcmd=item)


def in_parts(jobs):
    """Yield lists of jobs, each for one call."""
    part, size = [], 0
    for job in jobs:
        length = len(to_json(job))
        if part and (len(part) >= PART or size + length > PART_SIZE):
            yield part
            part, size = [], 0
        part.append(job)
        size += length
    if part:
        yield part


def jobs_to_submit(options):
    """Return an iterator of jobs, and how many, None where nobody knows."""
    if options.array:
        items = (map(str, numbers) for numbers in options.array)
        return entries(options, items), sum(map(len, options.array))
    if options.items is not None or options.arg_file:
        source = open_items(options)
        n = len(options.items) if source is None else count_lines(source)
        return entries(options, read_items(options, source)), n
    return [dict(carried(options), jobcmd=command_in(options))], 1


def read_json(name):
    """Return the JSON value in a file, `-`: on standard input, or Trouble."""
    try:
        with open(0 if name == "-" else name, "rb") as file:
            jobs = from_json(file.read().decode("utf-8-sig"))
        if type(jobs) not in (dict, list):
            raise Error(400, "It must be an object or a list.")
        return jobs
    except (OSError, UnicodeDecodeError, Error) as error:
        raise Trouble("Can't read jobs in %s: %s" % (name, cause(error))) \
            from None


def parents_of(job):
    """Return whom a job waits for, of what may be none."""
    after = job.get("after") if type(job) is dict else None
    return after if type(after) is list else ()


def parents_first(jobs):
    """Return {jobid: job} in an order in which they can be added in parts."""
    names, met, ordered = {int(name): name for name in jobs}, set(), {}
    for name in jobs:
        stack = [name]
        while stack:
            name, before = stack[-1], []
            if name not in met:
                met.add(name)
                before = [names[parent] for parent in parents_of(jobs[name])
                          if type(parent) is int and parent in names]
            stack += [parent for parent in before if parent not in met]
            if stack[-1] == name:
                ordered.setdefault(stack.pop(), jobs[name])
    return ordered


def set_from_json(client, jobs):
    """Add jobs under their own ids, those that there aren't yet; or Trouble.

    Returns ranges of their ids.
    """
    if not all(re.match("[0-9]{1,16}$", jobid) for jobid in jobs):
        raise Trouble("Jobs in a JSON object need numbers for names.")
    client.set(parents_first(jobs))
    ranges = []
    add_ids(ranges, sorted(map(int, jobs)))
    return ranges


def submit_parts(client, options, jobs, total):
    """Submit jobs in parts; return ranges of the ids that they are given.

    Each part has a key, so that none is added twice. Where input had broken
    off in a part, under its key are the first of its jobs.
    """
    key, ranges, done = options.key or secrets.token_hex(8), [], 0
    try:
        for part in in_parts(jobs):
            while part:
                ids = client.submit("%s/%d" % (key, done), part)
                if not 0 < len(ids) <= len(part):
                    raise Trouble("--key %s was used for other jobs; take"
                                  " another one." % shlex.quote(key))
                add_ids(ranges, ids)
                done += len(ids)
                part = part[len(ids) :]
            if sys.stderr.isatty():
                shown = bar(min(1, done / total)) if total else ""
                sys.stderr.write("\r%s %d jobs\033[K\r" % (shown, done))
    except BaseException as error:
        refused = isinstance(error, Trouble) or hasattr(error, "status")
        if done or not refused:  # if not, it may be in
            say("%s added; the same command with --key %s adds the rest, and"
                " none twice." % (number_of(done, "job"), shlex.quote(key)))
        raise
    if sys.stderr.isatty():
        sys.stderr.write("\033[K")
    return ranges


def submit_jobs(options):
    """Add jobs: of a command and items, of commands, or described in JSON."""
    with speaking(options, PATIENCE) as client:
        if options.from_json:
            jobs = read_json(options.from_json)
            total = len(jobs)
        else:
            jobs, total = jobs_to_submit(options)
        if type(jobs) is dict:
            ranges = set_from_json(client, jobs)
        else:
            ranges = submit_parts(client, options, jobs, total)
    n, ids = sum(map(len, ranges)), ids_text(ranges)
    line = number_of(n, "job") + (": " + ids if ids else "")
    report(options, {"jobs": n, "ids": ids}, [line], [ids] if ids else [])
    return 0


# ------------------------------------------------------------- data care ---


@contextlib.contextmanager
def exclusive_access(path):
    """Yield the DatabaseLocation of an existing database, ready to be read.

    On a network file system no server may have it, nor get it meanwhile. A
    rollback journal that a killed server left is rolled back: a read-only
    connection can't do that.
    """
    with translate_errors(path), contextlib.ExitStack() as stack:
        location = DatabaseLocation(path)
        if inspect(path):
            if location.exclusive:
                lock = ServerLock(location, shared=False)
                stack.callback(lock.close)
                recover(location)
            elif os.path.exists(location.file + "-journal"):
                connection = connect(path, readonly=False)
                with contextlib.closing(connection):
                    connection.execute("select * from sqlite_master")
        if not inspect(path):  # it may have been killed as it created it
            raise Trouble("There is no database %s." % path)
        yield location


@contextlib.contextmanager
def open_snapshot(path):
    """Yield the `execute` of a connection to a snapshot of a database."""
    with exclusive_access(path) as location:
        connection = connect(path, readonly=True, vfs=location.vfs)
        with contextlib.closing(connection):
            connection.execute("begin")
            connection.execute("pragma user_version").fetchone()  # take it
            yield connection.execute


def backup(options):
    """Copy a database into a new file, also while a server has it."""
    with exclusive_access(options.db) as location:
        total = os.path.getsize(location.file)

        def show(size):
            sys.stderr.write("\r%s\033[K\r" % bar(min(1, size / total)))

        more = [show] if sys.stderr.isatty() else []
        jobs = copy_database(location, options.file, *more)
    if more:
        sys.stderr.write("\033[K")
    size = os.path.getsize(options.file)
    report(options, {"file": options.file, "jobs": jobs, "bytes": size},
           ["%s: %d jobs, %d bytes" % (printable(options.file), jobs, size)],
           [options.file])
    return 0


def check_pages(execute):
    """Yield what SQLite finds wrong."""
    for found, in execute("pragma integrity_check"):
        if found != "ok":
            yield found


def check_schema(execute):
    """Yield the tables and indexes that are missing."""
    there = {name for name, in execute(SQL.WHOLE_NAMES)}
    for kind, name in re.findall(r"create (table|index) (\w+)", SCHEMA):
        if name not in there:
            yield "there is no %s %s" % (kind, name)


def check_counts(execute):
    """Yield where the kept counts aren't those of the jobs."""
    for stage, state, *counts in execute(SQL.WHOLE_TALLY):
        yield ("stage %s, %s: counted %s, there %s; expired %s, there %s"
               % (stage, state, *counts))


def check_lanes(execute):
    """Yield the jobs that claims find and shouldn't, or don't and should."""
    for row in execute(SQL.WHOLE_LANES):
        known = row["state"] in STATES
        if not known or row["free"] != lane(row["state"], row["lease"]):
            yield "%(jobs)s jobs are %(state)s and have %(free)s (job " \
                "%(jobid)s)" % dict(row)


def check_attempts(execute):
    """Yield how many attempts are of no job."""
    orphans, row = execute(SQL.WHOLE_ORPHANS).fetchone()
    if orphans:
        yield "%d attempts are of no job (row %d)" % (orphans, row)


def check_dependencies(execute):
    """Yield the jobs that wait for others by mistake, or don't."""
    jobs, jobid = execute(SQL.WHOLE_MISSING).fetchone()
    if jobs:
        yield "%d jobs wait for more or fewer than they know (job %d)" % (
            jobs, jobid)
    wrong, row = execute(SQL.WHOLE_DEPENDENCIES).fetchone()
    if wrong:
        yield "%d jobs are waited for in another state (row %d)" % (wrong, row)


def check_jobs(execute):
    """Yield the jobs whose state contradicts what else they have."""
    for odd, jobs, jobid in execute(SQL.WHOLE_ODD):
        yield "%d jobs are %s (job %d)" % (jobs, odd, jobid)


CHECKS = (
    ("integrity", check_pages),
    ("schema", check_schema),
    ("counts", check_counts),
    ("free", check_lanes),
    ("attempts", check_attempts),
    ("dependencies", check_dependencies),
    ("jobs", check_jobs),
)
FINDINGS_SHOWN = 5  # of one check


def findings(look, execute):
    """Return what a check finds, as a list of sentences."""
    found = []
    try:
        found.extend(look(execute))
    except sqlite3.Error as error:
        found.append("it can't be read: %s" % error)
    left = len(found) - FINDINGS_SHOWN
    if left > 0:
        found[FINDINGS_SHOWN:] = ["and %d more" % left]
    return found


def check_all(path):
    """Yield what each check says of a database: a dict of name, ok, said."""
    with open_snapshot(path) as execute:
        for name, look in CHECKS:
            found = findings(look, execute)
            yield {"name": name, "ok": not found, "said": "; ".join(found)}
            if found and look is check_schema:
                break  # the others need it


def check(options):
    """Look whether a database is whole, also while a server has it."""
    names = [name for name, _ in CHECKS]
    return report_findings(options, names, check_all(options.db))


# ----------------------------------------------------------------- bench ---

BENCH_JOBS = 200000  # at most: on a disk they take 50 MB
BENCH_CLIENTS = 16
BATCH = 1000  # jobs claimed, and updated, at once
LENGTHS = {"1 s": 1, "10 s": 10, "1 min": 60, "10 min": 600, "1 h": 3600}
USED = 0.5  # of what was measured, by the workers that we think it good for
CONTENT_LENGTH = re.compile(rb"\r\nContent-Length: ([0-9]+)\r\n")


class BenchClient:
    """A connection that carries a talk: requests and what is answered.

    A talk is a generator: it yields (method, path, JSON value or None), and
    is sent the JSON value, or text, of the answer.
    """

    def __init__(self, access, talk):
        parts = urlsplit(access["url"])
        self.head = " HTTP/1.1\r\nHost: %s\r\njobix: %d\r\n" % (
            parts.netloc, access["jobix"])
        self.talk = talk
        self.answer = b""
        self.socket = socket.create_connection((parts.hostname, parts.port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def ask(self, value=None):
        """Send the next request; return False at the end of the talk."""
        try:
            method, path, body = self.talk.send(value)
        except StopIteration:
            self.socket.close()
            return False
        head = "%s %s%s" % (method, path, self.head)
        data = b"" if body is None else zlib.compress(utf8(to_json(body)), 1)
        head += "Content-Length: %d\r\n\r\n" % len(data)
        self.socket.sendall(head.encode("ascii") + data)
        return True

    def go_on(self):
        """Read what has come; return False at the end of the talk."""
        more = self.socket.recv(2**18)
        if not more:
            raise Trouble("The server of the bench has hung up.")
        self.answer += more
        head, end, body = self.answer.partition(b"\r\n\r\n")
        length = CONTENT_LENGTH.search(head + b"\r\n") if end else None
        if not length or len(body) < int(length.group(1)):
            return True
        self.answer = b""
        if head[9:12] != b"200":
            raise Trouble("The server of the bench said: %s"
                          % printable(body.decode("utf-8", "replace")))
        text = body.decode("ascii")
        return self.ask(text if b"\r\nContent-Type: text" in head
                        else json.loads(text))


def converse(access, talks):
    """Carry talks to their end, side by side; return the seconds taken."""

    def carry(talk):
        client = BenchClient(access, talk)
        going = client.ask()
        while going:
            going = client.go_on()

    began = time.monotonic()
    pool = ThreadPoolExecutor(len(talks))
    try:
        list(pool.map(carry, talks))
    finally:
        pool.shutdown(wait=False)  # a signal must not wait for the talks
    return time.monotonic() - began


def adding(counted, end):
    """Add jobs until they are many enough, or it is `end`: a talk."""
    for first in range(0, BENCH_JOBS, CHUNK):
        if time.monotonic() >= end:
            break
        ids = range(first, first + CHUNK)
        yield "POST", "/set", {i: {
            "jobstage": 0, "jobcmd": "simulate --seed %d" % i, "laststage": 2,
        } for i in ids}
        counted.append(CHUNK)


def moving(counted, end):
    """Claim a job and update it, over and over: a talk."""
    while time.monotonic() < end:
        job = yield "GET", "/get/0?lease=600", None
        if job == "nada":
            break
        path = "/update_job/%(jobid)d/2?claim=%(claim)s" % job
        yield "GET", path, None
        counted.append(1)


def moving_many(counted, end):
    """Claim and update many jobs at once, over and over: a talk."""
    jobs = True
    while jobs and time.monotonic() < end:
        jobs = yield "GET", "/get/0?lease=600&n=%d" % BATCH, None
        yield "POST", "/update_jobs", [
            {"jobid": job["jobid"], "jobstage": 2, "claim": job["claim"]}
            for job in jobs
        ]
        counted.append(len(jobs))


def rate(access, talk, clients, seconds):
    """Return how many jobs a second such talks of some clients do."""
    counted, end = [], time.monotonic() + seconds
    taken = converse(access, [talk(counted, end) for _ in range(clients)])
    return sum(counted) / taken


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


@contextlib.contextmanager
def bench_server(folder):
    """Serve a database in a folder by a process of its own.

    Hands out the content of its access file.
    """
    access = os.path.join(folder, "access.json")
    command = [sys.executable, os.path.abspath(__file__), "serve"]
    command += ["--db", os.path.join(folder, "jobs.db"), "--port", "0"]
    process = subprocess.Popen(
        [*command, "--access", access], stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE)
    try:
        if not process.stdout.readline():
            raise Trouble("The server of the bench didn't start.")
        with open(access) as file:
            yield json.load(file)
    finally:
        process.terminate()
        process.stdout.close()
        process.wait()


def measure(folder, seconds):
    """Yield names and figures of a place for a database, as they come."""
    times = fsync_times(folder, min(seconds, 2))
    yield "fsync", times[len(times) // 2]
    yield "fsync_p95", times[int(0.95 * len(times))]
    with bench_server(folder) as access:
        yield "added", rate(access, adding, 1, seconds)
        yield "cycles_1", rate(access, moving, 1, seconds)
        yield "cycles_16", rate(access, moving, BENCH_CLIENTS, seconds)
        yield "batches", rate(access, moving_many, 1, seconds)


MEASURED = {  # by measure(), each as it is shown
    "fsync": "%.2f ms until 4 KiB are on the disk, at the median",
    "fsync_p95": "%.2f ms for 95 of 100",
    "added": "%d jobs a second are added",
    "cycles_1": "%d jobs a second are claimed and updated by one client",
    "cycles_16": "%d jobs a second by 16 clients",
    "batches": "%d jobs a second, a thousand at a time",
}
GOOD_FOR = """\
If nobody is to wait long, at half of the rate of 16 clients, that is enough
for so many commands side by side:"""


def good_for(cycles):
    """Return how many slots so many jobs a second keep busy, by length."""
    return {name: int(cycles * USED * LENGTHS[name]) for name in LENGTHS}


def bench(options):
    """Measure what jobman does on this machine and file system."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    try:
        scratch = tempfile.mkdtemp(prefix=".jobman-", dir=options.folder)
    except OSError as error:
        raise Trouble("Can't make a folder in %s: %s." % (
            options.folder, error.strerror)) from None
    found = {}
    with contextlib.ExitStack() as undo:
        undo.callback(shutil.rmtree, scratch, ignore_errors=True)
        location = DatabaseLocation(os.path.join(scratch, "jobs.db"))
        location.path = os.path.abspath(options.folder)  # for describe()
        found["place"] = location.describe()
        found["network"] = location.exclusive
        found["python"] = "%d.%d.%d" % sys.version_info[:3]
        found["sqlite"] = sqlite3.sqlite_version
        if options.output == "table":
            print("%(place)s; Python %(python)s, SQLite %(sqlite)s" % found)
            if location.exclusive:
                print("That is no good place: see Assumptions in README.")
            if location.kind in ("tmpfs", "ramfs"):
                print("That is memory: nothing in it outlives the machine.")
        for name, figure in measure(scratch, options.seconds):
            found[name] = figure
            if options.output == "table":
                shown = 1000 * figure if "fsync" in name else figure
                print("  " + MEASURED[name] % shown, flush=True)
    found["slots"] = good_for(found["cycles_16"])
    if options.output == "json":
        print(to_json(found))
        return 0
    print(GOOD_FOR)
    for length, slots in found["slots"].items():
        print("  %9d if a job takes %s" % (slots, length))
    return 0


# --------------------------------------------------------- batch systems ---

# A node that fails doesn't end the job (--no-kill), a worker that fails or
# ends doesn't end the others (--kill-on-bad-exit, --wait). Without
# --cpus-per-task a step has all cores that the job has on each node.
SBATCH = """\
#!/bin/bash
#SBATCH --job-name=jobman
#SBATCH --nodes=%(nodes)d
#SBATCH --ntasks-per-node=1
#SBATCH --time=%(time)s
#SBATCH --signal=USR1@%(notice)d
#SBATCH --no-kill
%(lines)s
exec srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" \\
    --ntasks-per-node=1 --cpu-bind=none --export=ALL \\
    --no-kill --kill-on-bad-exit=0 --wait=0 \\
    /bin/sh -c 'worker=$1; shift
        exec "$0" "$worker" --slots "$SLURM_CPUS_ON_NODE" "$@"' \\
    %(worker)s
"""

# What pbsdsh starts has a bare environment and stands in the home folder.
PBS = """\
#!/bin/bash
#PBS -N jobman
#PBS -S /bin/bash
#PBS -l walltime=%(time)s
%(lines)s
exec pbsdsh -- /bin/bash -lc 'cd "$1" && shift && exec "$@"' bash \\
    "$PBS_O_WORKDIR" \\
    %(worker)s
"""

LONGEST_NOTICE = 60  # seconds from the signal to the end of an allocation
SHARED_NODES = re.compile("-[cs]|--(cpus-per-task|exclusive|oversubscribe)")
UNQUOTABLE = re.compile(r"""[\0-\x1f\x7f'"\\]""")


def shell_words(text):
    """Read --worker: return the words that a shell would make of it."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def option_lines(prefix, words):
    """Return a script's lines for a batch system: each option on its own.

    A word that is no option stands beside the option before it.
    """
    lines = []
    for word in words:
        if word.startswith("-"):
            lines.append(prefix)
        lines[-1] += " " + shlex.quote(word)
    return "".join(line + "\n" for line in lines)


def print_script(template, options, lines, *more):
    """Print a script that starts a worker, with options, on each node."""
    access = os.path.abspath(options.access or access_path())
    words = [sys.executable, worker_script(), "--access", access]
    words += [*more, *options.worker]
    script = template % {
        "nodes": options.nodes,
        "time": span(options.time),
        "notice": min(LONGEST_NOTICE, max(1, options.time // 10)),
        "lines": lines,
        "worker": " ".join(map(shlex.quote, words)),
    }
    sys.stdout.buffer.write(os.fsencode(script))
    return 0


def sbatch(options):
    """Print a script for Slurm that starts a worker on each node."""
    lines = option_lines("#SBATCH", options.more)
    if not any(map(SHARED_NODES.match, options.more)):
        lines = "#SBATCH --exclusive\n" + lines
    return print_script(SBATCH, options, lines)


def pbs(options):
    """Print a script for PBS that starts a worker on each node."""
    lines = option_lines("#PBS", options.more)
    for name, ours in (
        ("place", "scatter:exclhost"), ("select", str(options.nodes))
    ):
        if not re.search(r"-l ?'?(\S*,)?%s=" % name, lines):  # only once
            lines = "#PBS -l %s=%s\n%s" % (name, ours, lines)
    limit = "--time-limit", "%ds" % options.time  # pbsdsh hides it
    return print_script(PBS, options, lines, *limit)


# ---------------------------------------------------------------- doctor ---

OLDEST_PYTHON = 3, 6
OLDEST_SQLITE = 3, 7, 17
LEAST_FREE = 100 * 2**20  # bytes on a disk
LONGEST_LOOK = 5  # seconds for one look: the system may never let it go
LOOKS_TIME = 9  # seconds for all, but a look has SHORTEST_LOOK at least
SHORTEST_LOOK = 0.5
LEAST_LEFT = 60  # seconds of a batch job, for a worker to be of use
CLOCKS_APART = 5  # seconds
PROXIES = "http_proxy", "https_proxy", "all_proxy"


class Patient:
    """What has been found out so far; None where it isn't known.

    `worker` is the module, `client` a Client, `access` the path of the access
    file and `about` its content. `here` is whether the server's address is
    this host's own, `met` whether somebody answers there, `known` whether
    with the right certificate, `version` and `clock` what they say. `location`
    is the database's.
    """

    def __init__(self, options):
        self.options = options
        self.access = os.path.abspath(options.access or access_path())
        self.worker = self.client = self.location = None
        self.here = self.met = self.known = self.version = self.clock = None
        self.about = {}
        self.troubles = (Trouble, OSError, ValueError)

    def at(self):
        """Return where the server should be, as HOST:PORT."""
        return "%s:%d" % self.client.address

    def ask(self, path, *names):
        """Return values of the object that the server answers, or Trouble."""
        try:
            value = self.client.call("GET", path, timeout=LONGEST_LOOK - 1)
            return [value[name] for name in names]
        except (LookupError, TypeError, ValueError):
            raise Trouble(
                "What answers at %s is no jobman; look at the address in %s"
                % (self.at(), self.source())) from None

    def source(self):
        """Return what says where the server is."""
        return "JOBMAN_URL" if self.client.fixed else self.access


def within(seconds, act, *arguments):
    """Return what a function returns; raise Trouble when that takes long.

    Its thread is left alone then.
    """
    end = Future()

    def run():
        try:
            end.set_result(act(*arguments))
        except Exception as error:
            end.set_exception(error)

    thread = threading.Thread(target=run, daemon=True)
    try:
        thread.start()
        thread.join(seconds)
    except RuntimeError:  # there can be no more threads
        run()
    if not end.done():
        raise Trouble("It takes more than %.3g s to find out; ask who runs"
                      " this host" % seconds)
    return end.result()


def look_at_python(patient):
    """Return which Python this is."""
    version, found = sys.version.split()[0], sys.version_info[:2]
    if found < OLDEST_PYTHON:
        raise Trouble("This is %s; run it by Python %d.%d or later" % (
            version, *OLDEST_PYTHON))
    return "%s, %s" % (version, sys.executable)


def look_at_sqlite(patient):
    """Return which SQLite that has."""
    if sqlite3.sqlite_version_info < OLDEST_SQLITE:
        raise Trouble("This is %s; use a Python with SQLite %d.%d.%d or later"
                      % (sqlite3.sqlite_version, *OLDEST_SQLITE))
    return sqlite3.sqlite_version


def look_at_programs(patient):
    """Return which versions jobman.py and worker.py have."""
    with using_worker() as worker:
        patient.worker = worker
        patient.troubles += worker.Trouble,
    if worker.__version__ != __version__:
        raise Trouble(
            "worker.py is %s and jobman.py %s; copy both of one version here"
            % (worker.__version__, __version__))
    return "jobman.py and worker.py %s" % __version__


def slots_here():
    """Return how many slots a worker has here by default."""
    return len(os.sched_getaffinity(0))


def look_at_files(patient):
    """Return how many files a process may open."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    slots = slots_here()
    needed = patient.worker.files_needed(slots) if patient.worker else 0
    if 0 <= most < needed:
        raise Trouble(
            "A process may open %d, and a worker of %s needs %d; raise the"
            " hard limit (ulimit -Hn) or use fewer --slots" % (
                most, number_of(slots, "slot"), needed))
    if most < 0:
        return "a process may open any number"
    bound = max(1, min(MAX_CONNECTIONS, most - FILES_KEPT))
    return "a process may open %d, so a server has up to %s" % (
        most, number_of(bound, "connection"))


def look_at_processes(patient):
    """Return how many processes and threads a user may have."""
    most, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    if most < 0:
        return "any number"
    there, slots = threads_of(os.getuid()), slots_here()
    needed = 20 + 4 * slots  # a worker and its threads; a command has some
    if most - there < needed:
        raise Trouble(
            "You may have %d with their threads, and have %d; a worker of %s"
            " needs about %d: raise the limit (ulimit -u) or use fewer --slots"
            % (most, there, number_of(slots, "slot"), needed))
    return "you may have %d with their threads, and have %d" % (most, there)


def room(folder, advice):
    """Return how much is free on a folder's disk; Trouble: too little.

    A folder that isn't there is to be made in the one above it.
    """
    while not os.path.lexists(folder):
        folder = os.path.dirname(folder)
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK | os.X_OK):
        raise Trouble("Nothing can be written in %s; %s" % (folder, advice))
    disk = os.statvfs(folder)
    free = disk.f_bavail * disk.f_frsize
    if free < LEAST_FREE:
        raise Trouble("Only %.1f MB are free at %s; make space, or %s" % (
            free / 1e6, folder, advice))
    if disk.f_files and not disk.f_favail:
        raise Trouble("There can be no more files at %s; remove some, or %s"
                      % (folder, advice))
    return "%.1f GB are free at %s" % (free / 1e9, folder)


def look_at_temporary(patient):
    """Return how much is free for temporary files."""
    return room(tempfile.gettempdir(), "set TMPDIR to another folder")


def look_at_spool(patient):
    """Return how much is free for the results and the output of workers."""
    return room(os.path.dirname(patient.access),
                "give worker.py other folders by --spool and --logs")


def look_at_allocation(patient):
    """Return how long the batch job that we are in still has."""
    kinds = ("SLURM_JOB_ID", "Slurm"), ("PBS_JOBID", "PBS")
    kind = next((k for name, k in kinds if name in os.environ), None)
    if kind is None:
        return None
    left = None
    with contextlib.suppress(ValueError):  # it says what nobody understands
        left = patient.worker.allocation_left(os.environ)
    if left is None:
        raise Trouble("%s doesn't say how long this batch job has; give"
                      " worker.py a --time-limit" % kind)
    if left < LEAST_LEFT:
        raise Trouble("This batch job has %d s left, too few for a worker;"
                      " ask %s for more time" % (left, kind))
    return "%s leaves this batch job %s" % (kind, span(left))


def look_at_access(patient):
    """Return what the access file is like."""
    client = patient.worker.Client(patient.options.access, patience=0)
    if client.fixed:
        patient.client = client
        return "none is read, JOBMAN_URL names the server"
    with open(patient.access, encoding="utf-8") as file:
        written = os.fstat(file.fileno()).st_mtime
        patient.about = json.load(file)
    patient.client = client
    return "%s, for its owner only, written %s ago" % (
        patient.access, took(max(0, time.time() - written)))


def look_at_address(patient):
    """Return what the server's name stands for."""
    host, port = patient.client.address
    try:
        found = socket.getaddrinfo(host, port, 0, socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise Trouble(
            "%s is no name that this host knows (%s); have serve name another"
            " by --url" % (host, cause(error))) from None
    address = found[0][4][0]
    home = patient.about.get("host")
    is_loopback = ipaddress.ip_address(address.partition("%")[0]).is_loopback
    if is_loopback and home not in (None, socket.gethostname()):
        raise Trouble(
            "The server listens to its own host %s alone; start it with --host"
            " 0.0.0.0 --tls" % home)
    patient.met = False
    patient.here = is_loopback
    return "%s, by the name of %s" % (address, host) if host != address \
        else address


def look_at_connection(patient):
    """Return that the server's port takes connections."""
    try:
        socket.create_connection(patient.client.address, 4).close()
    except ConnectionRefusedError:
        raise Trouble("No server listens at %s; start it there, with the same"
                      " access file" % patient.at()) from None
    except OSError as error:
        raise Trouble(
            "%s isn't reached (%s); look for a firewall, or have serve name"
            " another address by --url" % (patient.at(), cause(error))
        ) from None
    patient.met = True
    return "%s takes connections" % patient.at()


def look_at_certificate(patient):
    """Return by what the server is known."""
    if not patient.met:
        return None
    try:
        patient.client.connect(4)
    except patient.worker.Impostor as error:
        raise Trouble(
            "At %s is another server than ours (%s); end it, or use its access"
            " file" % (patient.at(), error)) from None
    except OSError as error:
        raise Trouble(
            "At %s nobody speaks TLS (%s); start serve with --tls, or give"
            " it an --url with http:" % (patient.at(), error)) from None
    patient.known = True
    if patient.client.tls is None:
        return "none, it is plain HTTP, which stays on this host" \
            if patient.here else \
            "none, it is plain HTTP; serve --tls would hide the jobix"
    if patient.client.fingerprint:
        return "it has the fingerprint that it should have"
    return "certificate authorities vouch for it"


def look_at_server(patient):
    """Return that the server and its database are well."""
    try:
        patient.version, = patient.ask("/health", "version")
    except patient.worker.Unreachable as error:
        raise Trouble("%s Look at its standard error, and at the address in %s"
                      % (error, patient.source())) from None
    return "it answers, and so does its database"


def look_at_jobix(patient):
    """Return whether the server takes our jobix."""
    began = time.time()
    try:
        there, readonly = patient.ask("/status", "time", "readonly")
    except patient.worker.Refused as refused:
        if refused.status != 403:
            raise
        raise Trouble("The server takes another jobix than ours; use the"
                      " access file that it wrote") from None
    ended = time.time()
    patient.clock = (began + ended) / 2 - there, (ended - began) / 2
    return "it is taken, but only to look" if readonly else "it is taken"


def look_at_version(patient):
    """Return which version the server has."""
    if patient.version != __version__:
        raise Trouble(
            "The server is jobman %s, this is %s; run the same files on both"
            " sides" % (patient.version, __version__))
    return "the server is jobman %s, too" % __version__


def look_at_clock(patient):
    """Return how far this host's clock is from the server's."""
    ahead, doubt = patient.clock
    if abs(ahead) - doubt > CLOCKS_APART:
        raise Trouble(
            "This host's clock is %s %s the server's; leases don't mind, but"
            " have it set right, for times in logs and of files" % (
                took(abs(ahead)), "ahead of" if ahead > 0 else "behind"))
    return "at most %.1f s from the server's" % (abs(ahead) + doubt + 0.05)


def look_at_proxies(patient):
    """Return what proxies are set; their addresses may have passwords."""
    there = [name for name in sorted(os.environ)
             if name.lower() in PROXIES and os.environ[name]]
    if there and patient.met is False:
        raise Trouble("%s is set, but jobman uses no proxy; run it where the"
                      " server is reached without one" % ", ".join(there))
    return "%s is set; jobman doesn't use it" % ", ".join(there) if there \
        else "none is set"


def look_at_database(patient):
    """Return which database there is, None where none is named."""
    path = patient.options.db
    if path is None and os.path.lexists("jobman.db"):
        path = "jobman.db"
    if path is None:
        return None
    folder = os.path.dirname(os.path.realpath(path))
    if os.path.isdir(path) or not os.path.isdir(folder):
        raise Trouble("%s can't be a database; name a file in a folder that"
                      " is there" % path)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise Trouble("Nothing can be written in %s, and a database has files"
                      " beside it; name another" % folder)
    version = inspect(path)
    with warnings.catch_warnings():  # of a fork in a thread
        warnings.simplefilter("ignore")
        patient.location = DatabaseLocation(path)
    if version == 0:
        return "%s isn't there yet; serve makes it" % path
    need_owner(path, patient.location.owner)
    if not os.access(path, os.W_OK):
        raise Trouble("%s can't be written; chmod u+w it" % path)
    if os.stat(path).st_mode & 0o077:
        raise Trouble("Others can read %s, and its jobix; chmod 600 it" % path)
    return "%s, schema %d" % (path, version)


def look_at_locks(patient):
    """Return what file system the database is on."""
    location = patient.location
    if location.locks != "work":
        raise Trouble("%s; use a disk of this host" % location.describe())
    note = " (a network file system, so only one server may have it)"
    return "%s, where locks work%s" % (
        location.describe(), note if location.exclusive else "")


def look_at_disk(patient):
    """Return how much is free for the database."""
    folder = os.path.dirname(patient.location.file)
    return room(folder, "use another disk")


def is_serving(location, holder):
    """Return whether the holder named in a lock file is alive.

    On another host only a heartbeat shows that.
    """
    running = is_running(holder)
    end = time.monotonic() + ServerLock.BEAT + 0.5
    while running is None and time.monotonic() < end:
        time.sleep(0.2)
        if read_holder(location) not in (holder, {}):
            running = True
    return bool(running)


def look_at_holder(patient):
    """Return which server has the database."""
    location, about = patient.location, patient.about
    holder = read_holder(location)
    if not holder:
        return "no server has %s" % location.path
    name = name_holder(holder)
    if not is_serving(location, holder):
        return "%s had %s and gives no sign of life; serve would take it" % (
            name, location.path)
    ours = [about.get(key) for key in ("host", "pid")]
    shared = os.path.exists(location.file + ".gate")
    if not shared and None not in ours and ours != [
            holder.get("host"), holder.get("pid")]:
        raise Trouble(
            "%s serves %s, but %s is of process %s on %s; name the access file"
            " that goes with it" % (
                name, location.path, patient.access, ours[1], ours[0]))
    return "%s serves %s" % (name, location.path)


# Each line of doctor: its name, what returns what is said there, None to leave
# it out, or raises what is wrong, and what of a Patient must be known for it.
# What has failed isn't built upon.
LOOKS = (
    ("python", look_at_python, None),
    ("sqlite", look_at_sqlite, None),
    ("programs", look_at_programs, None),
    ("files", look_at_files, None),
    ("processes", look_at_processes, None),
    ("temporary", look_at_temporary, None),
    ("allocation", look_at_allocation, "worker"),
    ("access", look_at_access, "worker"),
    ("spool", look_at_spool, None),
    ("address", look_at_address, "client"),
    ("connection", look_at_connection, "here"),
    ("proxies", look_at_proxies, None),
    ("certificate", look_at_certificate, None),
    ("server", look_at_server, "known"),
    ("jobix", look_at_jobix, "version"),
    ("version", look_at_version, "version"),
    ("clock", look_at_clock, "clock"),
    ("database", look_at_database, None),
    ("locks", look_at_locks, "location"),
    ("disk", look_at_disk, "location"),
    ("holder", look_at_holder, "location"),
)


def examine(patient):
    """Yield what is found, each a dict with name, ok and said."""
    end = time.monotonic() + LOOKS_TIME
    for name, look, needed in LOOKS:
        if needed and getattr(patient, needed) is None:
            continue
        left = max(SHORTEST_LOOK, min(LONGEST_LOOK, end - time.monotonic()))
        try:
            ok, said = True, within(left, look, patient)
        except patient.troubles as error:
            ok, said = False, str(error)
        if said:
            yield {"name": name, "ok": ok, "said": said.rstrip(".")}


def doctor(options):
    """Look whether all that jobman needs is there, here and now."""
    names = [name for name, _, _ in LOOKS]
    return report_findings(options, names, examine(Patient(options)))


# ------------------------------------------------------------------ main ---

def check_serve(parser, options):
    """End with exit status 2 when a server isn't described well."""
    if options.retries < 0:
        parser.error("--retries can't be negative")
    if options.lapses < 1:
        parser.error("--lapses must be at least 1")
    if options.keyfile and not options.certfile:
        parser.error("--keyfile goes with --certfile")
    if options.tls and options.certfile:
        parser.error("give --tls or --certfile, not both")
    if options.tls or options.certfile:
        if options.url and not options.url.lower().startswith("https://"):
            parser.error("with TLS the --url begins with https://")
    if options.keep_days is not None and options.keep_days < 1:
        parser.error("--keep-days must be at least 1")


def add_serve(command):
    """Describe serve."""
    command.set_defaults(check=check_serve)
    add = command.add_argument
    add("--db", default="jobman.db", metavar="FILE",
        help="the database (default jobman.db)")
    add("--host", default="127.0.0.1",
        help="address to listen at (default 127.0.0.1)")
    add("--port", type=int, default=8642, help="default 8642; 0: any free")
    add("--access", metavar="FILE",
        help="where workers find the server (~/.jobman/access.json)")
    add("--url", help="the address for the access file, if not our guess")
    add("--jobix-file", metavar="FILE",
        help="the jobix that is admitted, if not one that we make")
    add("--open", action="store_true",
        help="admit any jobix, as on loopback, wherever it listens")
    add("--shared", action="store_true",
        help="other servers of this host may serve the same database")
    add("--tls", action="store_true",
        help="speak HTTPS, with a certificate that openssl makes once")
    add("--certfile", metavar="FILE",
        help="speak HTTPS, with the certificate in FILE (PEM)")
    add("--keyfile", metavar="FILE",
        help="the certificate's key, if it isn't in the same file")
    add("--snapshot", metavar="DIR",
        help="write DIR/status.html, a page for colleagues, every minute")
    add("--retries", type=int, default=MAX_ATTEMPTS - 1, metavar="N",
        help="how often a job that fails is tried again in a stage, if it"
        " doesn't say itself (default %d)" % (MAX_ATTEMPTS - 1))
    add("--lapses", type=int, default=MAX_LAPSES, metavar="N",
        help="lapsed leases in a stage until a job is failed (default %d)"
        % MAX_LAPSES)
    add("--keep-days", type=int, metavar="N",
        help="delete old attempts of jobs that were done or cancelled N days"
        " ago (default: keep all)")


def check_run(parser, options):
    """End with exit status 2 when a run isn't described well."""
    if options.words[:1] == ["--"]:
        del options.words[0]
    if not options.words:
        parser.error("run needs a command")
    if options.retries < 0:
        parser.error("--retries can't be negative")
    if options.slots is not None and options.slots < 1:
        parser.error("--slots must be at least 1")
    if options.items is not None and options.arg_file is not None:
        parser.error("give items after ::: or in a file, not both")
    if options.items is None and options.arg_file is None:
        if sys.stdin is None or sys.stdin.isatty():
            parser.error("give items after :::, in a file, or on stdin")


def add_run(command):
    """Describe run."""
    command.usage = "%(prog)s [options] 'COMMAND {}' [::: ITEM ...]"
    command.set_defaults(
        check=check_run, host="127.0.0.1", port=0, url=None, shared=False,
        lapses=MAX_LAPSES, keep_days=None, open=False, tls=False,
        certfile=None, keyfile=None,
    )
    add = command.add_argument
    add("words", nargs=argparse.REMAINDER, metavar="COMMAND",
        help="the command; {} is the item, at its end if not said")
    add("-a", "--arg-file", metavar="FILE", help="read items from FILE")
    add("--db", default="jobman-run.db", metavar="FILE",
        help="where the run is kept (default jobman-run.db)")
    add("--slots", type=int, metavar="N",
        help="commands side by side (default: the cores we may use)")
    add("--retries", type=int, default=0, metavar="N",
        help="how often a job that fails is tried again (default 0)")


def add_access(command):
    """Add the option by which a client finds the server."""
    command.add_argument(
        "--access", metavar="FILE",
        help="the server's access file (default ~/.jobman/access.json)")


def argument(reader):
    """Return `reader`, of a request's values, as one of arguments."""

    def read(text):
        try:
            return reader(number(text), "it")
        except Error as error:
            raise argparse.ArgumentTypeError(
                "%.80r: %s" % (text, error)) from None

    return read


stage_number = argument(STAGE)


def add_output(command):
    """Add the option by which a command prints its answer."""
    command.add_argument(
        "--output", choices=("table", "json", "quiet"), default="table",
        help="how the answer is printed (default table)")


def add_client(command):
    """Add what every command has that asks the server."""
    add_access(command)
    add_output(command)


def add_some(command, *more):
    """Add the options that name some jobs."""
    command.add_argument(
        "--state", choices=(*STATES, *more), metavar="STATE",
        help="only jobs in this state: " + ", ".join((*STATES, *more)))
    command.add_argument(
        "--stage", type=stage_number, metavar="N",
        help="only jobs in this stage")


def add_yes(command):
    """Add what every command has that may be about many."""
    add_client(command)
    command.add_argument(
        "--yes", action="store_true",
        help="do it to more than %d without asking" % ASKED_FROM)


def check_selector(parser, options):
    """End with exit status 2 when no jobs are named."""
    if options.ids is options.stage is options.state is None:
        parser.error("name jobs: 1,3,5-8, or all, or by --state or --stage")


def add_selector(command):
    """Describe retry, cancel, release or forget."""
    command.set_defaults(check=check_selector)
    command.add_argument(
        "ids", nargs="?", type=read_selection, metavar="IDS",
        help="jobids, as 1,3,5-8, or all")
    add_some(command)
    add_yes(command)


def add_stage(command):
    """Describe pause or resume."""
    command.add_argument("stage", type=stage_number, metavar="STAGE")
    add_client(command)


def add_worker(command):
    """Describe drain or undrain."""
    command.add_argument("worker", metavar="WORKER", help="its name, or all")
    add_yes(command)


def add_move(command):
    """Describe move."""
    command.add_argument("old", type=stage_number, metavar="OLD")
    command.add_argument("new", type=stage_number, metavar="NEW")
    add_yes(command)


def add_lifetime(command):
    """Describe lifetime."""
    add = command.add_argument
    add("stage", nargs="?", type=stage_number, metavar="STAGE")
    add("minutes", nargs="?", type=argument(MINUTES), metavar="MINUTES",
        help="0: no limit")
    add_client(command)


def add_init(command):
    """Describe init."""
    command.add_argument(
        "minutes", nargs="*", type=argument(MINUTES), metavar="MINUTES",
        help="of stage 0, of stage 1, and so on; 0: no limit")
    add_client(command)


def check_submit(parser, options):
    """End with exit status 2 when jobs aren't described well."""
    if options.words[:1] == ["--"]:
        del options.words[0]
    sources = [name for name, given in (
        ("items after :::", options.items is not None),
        ("--each-line", options.each_line), ("--array", options.array),
        ("--commands", options.commands), ("--from-json", options.from_json),
    ) if given]
    if len(sources) > 1:
        parser.error("give %s, not both" % " or ".join(sources[:2]))
    if not "".join(options.words).strip():  # as of an empty variable
        options.words = []
    whole = options.commands or options.from_json
    if bool(options.words) == bool(whole):
        parser.error("%s brings the commands: give no other" % sources[0]
                     if whole else "submit needs a command")
    if sum(map(len, options.after)) > IDS_AT_ONCE:
        parser.error("--after can name up to %d jobs" % IDS_AT_ONCE)
    options.arg_file = options.each_line or options.commands


def read_key(text):
    """Return the key of a submission, or ArgumentTypeError."""
    if not 0 < len(text) <= MAX_NAME - 20:  # its parts' places follow it
        raise argparse.ArgumentTypeError(
            "a key must be a text of 1 to %d characters" % (MAX_NAME - 20))
    return from_utf8(os.fsencode(text))


def add_submit(command):
    """Describe submit."""
    command.usage = "%(prog)s [options] ['COMMAND {}' [::: ITEM ...]]"
    command.set_defaults(check=check_submit)
    add = command.add_argument
    add("words", nargs=argparse.REMAINDER, metavar="COMMAND",
        help="the command; {} is the item, at its end if not said")
    add("--each-line", metavar="FILE",
        help="a job for each line, as an item; -: standard input")
    add("--array", type=read_array, metavar="NUMBERS",
        help="a job for each number, as an item: 1-1000, 1-9:2,12")
    add("--commands", metavar="FILE",
        help="a job for each line, as a command; -: standard input")
    add("--from-json", metavar="FILE",
        help="jobs as /set or /submit take them; -: standard input")
    add("--stage", type=stage_number, default=0, metavar="N",
        help="where they wait (default 0)")
    add("--laststage", type=stage_number, metavar="N",
        help="where they are done (default: two above)")
    add("--priority", type=argument(CARRIES["priority"]), metavar="N",
        help="higher goes first (default 0)")
    add("--max-attempts", type=argument(CARRIES["max_attempts"]), metavar="N",
        help="how many failures until a job has failed (default: the"
        " server's)")
    add("--timeout", type=argument(period), metavar="SECONDS",
        help="how long a command may take (default: no limit)")
    add("--cwd", metavar="DIR", help="where they run (default: here)")
    add("--after", type=read_ids, default=[], metavar="IDS",
        help="jobs that they wait for, as 1,3,5-8")
    add("--key", type=read_key, metavar="KEY",
        help="a name for this submission: what it names is added once")
    add_client(command)


def add_snapshot(command):
    """Describe snapshot."""
    command.add_argument(
        "folder", metavar="DIR", help="where status.html is written")
    add_client(command)


def add_verify(command):
    """Describe verify."""
    add_client(command)
    add = command.add_argument
    add("--lag", type=float, default=10, metavar="SECONDS",
        help="how late files of other nodes may be seen here (default 10)")
    add("--dry-run", action="store_true", help="only say what is damaged")


def add_jobs(command):
    """Describe jobs."""
    add_some(command, "expired")
    add = command.add_argument
    add("--order", choices=("id", "time"), default="id",
        help="by their ids (default), or longest in their stage first")
    add("--limit", type=argument(integer(1, MAX_JOBID)),
        default=math.inf, metavar="N", help="how many at most (default: all)")
    add_client(command)


def add_jobid(command):
    """Add the argument that names a job."""
    command.add_argument(
        "jobid", type=argument(JOBID), metavar="JOBID")


def add_job(command):
    """Describe job."""
    add_jobid(command)
    add_client(command)


def add_wait(command):
    """Describe wait."""
    add = command.add_argument
    add("ids", nargs="?", type=read_ids, metavar="IDS",
        help="only these jobs, as 1,3,5-8 (default: all)")
    add("--exit-code", action="store_true",
        help="exit status 1 if one failed, was aborted or cancelled")
    add("--timeout", type=argument(seconds), metavar="SECONDS",
        help="give up after so long, with exit status 1")
    add_client(command)


def add_export(command):
    """Describe export."""
    command.add_argument(
        "--format", choices=tuple(FORMATS), default="csv",
        help="what is printed (default csv)")
    add_some(command, "expired")
    add_access(command)


def add_logs(command):
    """Describe logs."""
    add_jobid(command)
    add = command.add_argument
    add_access(command)
    add("--logs", metavar="DIR",
        help="where workers keep output (default: next to the access file)")


def add_check(command):
    """Describe check."""
    add_output(command)
    command.add_argument(
        "--db", default="jobman.db", metavar="FILE",
        help="the database (default jobman.db)")


def add_doctor(command):
    """Describe doctor."""
    command.add_argument(
        "--db", metavar="FILE",
        help="the database (default: jobman.db, if it is here)")
    add_client(command)


def add_backup(command):
    """Describe backup."""
    add_check(command)
    command.add_argument("file", metavar="FILE", help="where the copy goes")


def check_bench(parser, options):
    """End with exit status 2 when a measurement isn't described well."""
    if not options.seconds > 0:
        parser.error("--seconds must be more than 0")


def add_bench(command):
    """Describe bench."""
    command.set_defaults(check=check_bench)
    add = command.add_argument
    add("folder", nargs="?", default=".", metavar="DIR",
        help="where the database would be (default: here)")
    add("--seconds", type=float, default=5, metavar="S",
        help="how long each figure is measured (default 5)")
    add("--output", choices=("table", "json"), default="table",
        help="how the figures are printed (default table)")


def check_batch(parser, options):
    """End with exit status 2 when a script's options aren't good."""
    options.more = options.items or []
    if options.nodes < 1:
        parser.error("--nodes must be at least 1")
    if options.more and not options.more[0].startswith("-"):
        parser.error("-- is followed by options, not by %r" % options.more[0])
    for word in options.more:
        if UNQUOTABLE.search(word):
            parser.error("%r can't stand in a batch system's option" % word)
    with using_worker() as worker:
        try:
            options.time = worker.read_span(options.time)
        except ValueError as error:
            parser.error("--time: %s" % error)
        worker.parse(options.worker)  # ends with exit status 2 if it's bad


def add_batch(command):
    """Describe sbatch or pbs."""
    command.usage = "%(prog)s [options] [-- OPTION ...]"
    command.set_defaults(check=check_batch)
    add = command.add_argument
    add("--nodes", type=int, default=1, metavar="N",
        help="how many nodes, so workers (default 1)")
    add("--time", required=True, metavar="TIME",
        help="how long at most: 1:00:00, 1-12:00:00, 90m, 2h30m")
    add("--worker", type=shell_words, default=[], metavar="'OPTIONS'",
        help="options for worker.py, in one word")
    add_access(command)


# Each command: its name, what it does, what describes its options, and a text:
# a line that says what it is for, and examples.
COMMANDS = (
    ("serve", serve, add_serve, """serve a database until a signal ends it
  python3 jobman.py serve
  python3 jobman.py serve --db jobs.db --host 0.0.0.0 --tls"""),
    ("run", run, add_run, """run a command for each item, and end
  python3 jobman.py run 'gzip -k {}' ::: *.txt
  find . -name '*.png' | python3 jobman.py run 'optipng {}'
{} is the item as one shell word, {#} its number. Items come after :::, from a
file, or from standard input, one a line."""),
    ("submit", submit_jobs, add_submit, """add jobs
  python3 jobman.py submit 'gzip -k {}' ::: *.txt
  find . -name '*.png' | python3 jobman.py submit --each-line - 'optipng {}'
  python3 jobman.py submit --array 1-1000 ./simulate.sh --seed {}
  python3 jobman.py submit --commands todo.txt --priority 5
  python3 jobman.py submit --after 1-1000 ./summarize.sh
{} is the item as one shell word, {#} its number, as with run. Options stand
before the command."""),
    ("status", print_status, add_client, """show how far the jobs are
  python3 jobman.py status
  python3 jobman.py status --output json"""),
    ("jobs", print_jobs, add_jobs, """list jobs
  python3 jobman.py jobs --state failed --stage 2
  python3 jobman.py jobs --order time --limit 20
  python3 jobman.py jobs --state waiting --output quiet"""),
    ("job", print_job, add_job, """show a job and why it isn't running
  python3 jobman.py job 17
  python3 jobman.py job 17 --output json"""),
    ("workers", print_workers, add_client, """show the workers
  python3 jobman.py workers"""),
    ("watch", watch, add_access, """show live how the jobs stand
  python3 jobman.py watch
Ctrl-C ends it. Where its output is no terminal it prints a line when there is
news, every 10 seconds at most."""),
    ("wait", wait, add_wait, """return when jobs have ended
  python3 jobman.py wait --exit-code && echo all is well
  python3 jobman.py wait 1,3,5-8 --timeout 3600"""),
    ("logs", logs, add_logs, """print what a job's commands have printed
  python3 jobman.py logs 17
  python3 jobman.py logs 17 2>/dev/null > 17.txt"""),
    ("export", export, add_export, """print all jobs for other programs
  python3 jobman.py export > jobs.csv
  python3 jobman.py export --format json --state failed
  python3 jobman.py export --format joblog > joblog.tsv"""),
    ("stats", print_stats, add_client, """show what time the jobs took
  python3 jobman.py stats"""),
    ("retry", change_jobs, add_selector, """let ended jobs run again
  python3 jobman.py retry 17
  python3 jobman.py retry --state failed --stage 2"""),
    ("cancel", change_jobs, add_selector, """cancel jobs that aren't done
  python3 jobman.py cancel 1,3,5-8
  python3 jobman.py cancel --state working
  python3 jobman.py cancel all --yes"""),
    ("release", change_jobs, add_selector, """take jobs from their workers
  python3 jobman.py release 17
  python3 jobman.py release --stage 1"""),
    ("forget", change_jobs, add_selector, """delete done jobs
  python3 jobman.py forget 1-1000
  python3 jobman.py forget all --yes"""),
    ("pause", change_stage, add_stage, """hand out nothing of a stage
  python3 jobman.py pause 2"""),
    ("resume", change_stage, add_stage, """end a pause
  python3 jobman.py resume 2"""),
    ("drain", change_workers, add_worker, """let workers claim no more
  python3 jobman.py drain node7-4711
  python3 jobman.py drain all"""),
    ("undrain", change_workers, add_worker, """let them claim again
  python3 jobman.py undrain all"""),
    ("move", move_jobs, add_move, """move expired jobs to another stage
  python3 jobman.py move 1 0"""),
    ("lifetime", change_lifetime, add_lifetime, """show or set lifetimes
  python3 jobman.py lifetime
  python3 jobman.py lifetime 1 90"""),
    ("init", set_lifetimes, add_init, """set the first lifetimes
  python3 jobman.py init 0 60 0 90 0"""),
    ("snapshot", snapshot, add_snapshot, """write a page that needs no server
  python3 jobman.py snapshot /shared/www"""),
    ("verify", verify, add_verify, """check the files of all done jobs
  python3 jobman.py verify --dry-run"""),
    ("backup", backup, add_backup, """copy a database, also a served one
  python3 jobman.py backup --db jobs.db copy.db"""),
    ("check", check, add_check, """look whether a database is whole
  python3 jobman.py check --db jobs.db"""),
    ("doctor", doctor, add_doctor, """look whether all is there that is needed
  python3 jobman.py doctor
  python3 jobman.py doctor --db /scratch/me/jobs.db
It needs no server for what it can see without one, and changes nothing."""),
    ("bench", bench, add_bench, """measure what a place is good for
  python3 jobman.py bench /scratch"""),
    ("sbatch", sbatch, add_batch, """print a script for Slurm
  python3 jobman.py sbatch --nodes 4 --time 8h -- --partition=long | sbatch
What follows -- becomes #SBATCH lines."""),
    ("pbs", pbs, add_batch, """print a script for PBS
  python3 jobman.py pbs --time 8h -- -l select=4:ncpus=64 | qsub
What follows -- becomes #PBS lines."""),
)
# What parts the arguments of some; see split_off.
MARKS = {"run": ":::", "submit": ":::", "sbatch": "--", "pbs": "--"}
EPILOG = """\
python3 jobman.py COMMAND --help has the options and examples of each.
"""


def split_off(arguments):
    """Return the arguments, and those after `:::`, None without it.

    With sbatch and pbs the latter are those after `--`. What follows
    --worker is its value, even if it looks like an option.
    """
    mark, rest = MARKS.get("".join(arguments[:1]), ":::"), None
    if mark in arguments:
        at = arguments.index(mark)
        arguments, rest = arguments[:at], arguments[at + 1 :]
    if mark == "--" and "--worker" in arguments[:-1]:
        at = arguments.index("--worker")
        joined = "=".join(arguments[at : at + 2])
        arguments = [*arguments[:at], joined, *arguments[at + 2 :]]
    return arguments, rest


def parse(arguments):
    """Return the command line's options; end with exit status 2 or 0."""
    parser = argparse.ArgumentParser(
        prog="jobman.py", epilog=EPILOG,
        description="Hand out jobs to any number of workers.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    version = "jobman %s" % __version__
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, act, add, text in COMMANDS:
        line, _, examples = text.partition("\n")
        command = commands.add_parser(
            name, help=line, description=line,
            epilog="examples:\n" + examples,
            formatter_class=argparse.RawDescriptionHelpFormatter)
        command.set_defaults(act=act, check=None)
        add(command)
    words, rest = split_off(arguments)
    options = parser.parse_args(words)
    if options.command is None:
        parser.error("name a command: %s" % ", ".join(commands.choices))
    if rest is not None and options.command not in MARKS:
        parser.error("::: belongs to run and submit")
    options.items = rest
    if options.check:
        options.check(commands.choices[options.command], options)
    return options


def tolerate(stream):
    """Return `stream` so that what its encoding lacks becomes escapes."""
    if stream is None:  # closed by who started us
        return open(os.devnull, "w")
    return io.TextIOWrapper(
        stream.detach(), stream.encoding, "backslashreplace",
        line_buffering=True,
    )


def give_up_output():
    """Let go of what can't be printed, so that our exit doesn't try again."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main(arguments=None):
    """Run the command line; return its exit status."""
    try:
        options = parse(sys.argv[1:] if arguments is None else arguments)
        return options.act(options)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:  # as by `| head`: no error
        give_up_output()
        return 0
    except (Trouble, Error, sqlite3.Error, OSError) as trouble:
        say("jobman.py: %s" % trouble)
        give_up_output()
        return 1


if __name__ == "__main__":
    sys.stdout, sys.stderr = tolerate(sys.stdout), tolerate(sys.stderr)
    heeds = signal.getsignal(signal.SIGINT) == signal.SIG_DFL
    if heeds:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    status = main()
    if heeds:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.exit(status)
