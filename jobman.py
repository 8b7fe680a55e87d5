#!/usr/bin/env python3
"""Hand out jobs to any number of workers, each job to one worker at a time.

jobman is a job manager for machines where nothing can be installed: this
file is the server and the command line, worker.py beside it runs the jobs.

    python3 jobman.py serve                       the server
    python3 jobman.py run 'COMMAND {}' ::: ITEM ...  a whole run in one command
    python3 jobman.py sbatch --nodes 4 --time 8h     workers for Slurm; or pbs

The server's page, dashboard.html, is at /get.

It needs Python 3.6 or later and SQLite 3.7.17 or later, nothing else.
A request passes Handler, respond(), an endpoint, Store and Writer.
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
import difflib
import email.utils
import errno
import fcntl
import functools
import glob
import gc
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
import os
import queue
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
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import traceback
import warnings
import zlib
from array import array
from collections import Counter, OrderedDict, defaultdict, deque
from urllib.parse import quote, unquote, unquote_plus, urlencode

__version__ = "0.1.0"

MAX_JOBIX = 2**63 - 1
MAX_JOBID = 2**53 - 1
MAX_STAGE = 1000000
MAX_STAGES = 1000  # different ones in a namespace
MAX_MINUTES = 10**9
MAX_SECONDS = 10**9
MAX_WAIT = 60  # seconds that a long poll may last
MAX_CLAIMS = 10000  # jobs in one claim; more are clipped
CLAIMS_AT_ONCE = 1000  # of these, in one transaction
MAX_PAGE = 1000  # jobs in one answer of /jobs; more are clipped
MAX_HEAD = 2**16  # bytes of a request's line and headers
MAX_HEADERS = 100
MAX_BODY = 64 * 2**20  # bytes of a request's body, before and after inflating
MAX_VALUES = 4000000  # brackets and commas in a body: they take memory
MAX_JOBS = 250000  # in one request
MAX_DEPTH = 200  # of nested lists and objects in a jobcmd
MAX_CONNECTIONS = 20000
LEAST_CONNECTIONS = 8  # a worker needs two, a page some more
FILES_KEPT = 100  # descriptors that connections leave to everything else
LARGE_BODY = 2**14  # bytes from which a body counts as large
LARGE_BODIES = 4  # large bodies that are parsed at a time
RECEIVED_FIRST = 2**20  # bytes of a body that are received before its turn
WRONG_JOBIX_PAUSE = 0.2  # seconds until a wrong jobix is refused
MAX_NAME = 255  # characters of a worker's name or a submission's key
BEAT = 5  # seconds between a worker's heartbeats, while workers are few
BEATS = 60  # heartbeats a second, at most, of many workers
ALIVE = 120  # seconds since its last heartbeat in which a worker counts
MAX_WORD = 100  # characters kept of how far an attempt is
MAX_NOTE = 4096  # characters of an attempt's note for the next one
MAX_REPORT = 4096  # characters kept of an attempt's error and stderr
MAX_LOG = 2**20  # bytes of a job's output in one answer
MAX_ATTEMPTS = 3  # failures in a stage before a job is failed
MAX_LAPSES = 5  # lapsed leases in a stage before a job is failed
OUTAGE = 10  # seconds without a commit after which leases are renewed


# ---------------------------------------------------------------- errors ---


class Error(Exception):
    """Refuse a request with an HTTP status and one sentence."""

    def __init__(self, status, message, **headers):
        super().__init__(message)
        self.status = status
        self.headers = {
            name.replace("_", "-"): value for name, value in headers.items()
        }


class CommandError(Exception):
    """End a command with one sentence to its user and exit status 1."""


class Unavailable(Error):
    """Say that the server can't answer now but may soon: status 503."""

    def __init__(self, reason):
        message = "The server can't do that now (%s); try again." % reason
        super().__init__(503, message, Retry_After="1")
        self.reason = reason


def cause(error):
    """Return an error's strerror if it has one, else the error itself."""
    return getattr(error, "strerror", None) or error


def printable(text):
    """Return `text` with control characters as escapes."""
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
    """Refuse NaN and Infinity, which Python accepts but JSON doesn't."""
    raise ValueError("%s is not JSON" % name)


def read_integer(text):
    """Read an integer of JSON, with a bound on its length.

    Long integers take quadratic time; the bound is that of Python 3.11.
    """
    if len(text) > 4300:
        raise ValueError("an integer is too long")
    return int(text)


def unique(pairs):
    """Return the object of a JSON text, in which no key occurs twice."""
    value = dict(pairs)
    if len(value) != len(pairs):
        raise Error(400, "An object has the same key twice.")
    return value


DECODER = json.JSONDecoder(
    parse_int=None if hasattr(sys, "get_int_max_str_digits") else read_integer,
    parse_constant=refuse_constant, object_pairs_hook=unique,
)


def from_json(text):
    """Return the value of JSON `text`; raise Error 400 for invalid text."""
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
    """Return whether `body` is zlib data or gzip data, as no JSON text is.

    The bytes decide, not the headers: existing clients send zlib data and
    call it gzip. RFC 1950 and RFC 1952 give the first byte of each.
    """
    return body[:1] in (b"\x78", b"\x1f")


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

# jobcmd, filename, files, cwd and outputs are kept as JSON text, so that every
# string survives as it came. Times are seconds since 1970.
SCHEMA = """
create table setting (name text primary key, value);  -- of this database

create table namespace (
    id integer primary key,
    jobix integer not null unique,
    reading integer unique,            -- the jobix that may only read
    laststage integer,                 -- the last stage that /init named
    last_jobid integer not null default 0);  -- the highest one forgotten

create table stage (                   -- all in use, and some that were
    namespace integer not null, stage integer not null,
    minutes integer,                   -- lifetime, 0: no limit, null: not set
    paused integer not null default 0,
    name text,
    cores integer, memory integer,     -- what each job needs, in bytes
    primary key (namespace, stage));

create table job (
    id integer primary key,
    namespace integer not null,
    jobid integer not null,
    stage integer not null,
    state text not null,
    free integer not null,             -- 1: a claim may take it, see is_free()
    priority integer not null,
    expired integer not null default 0,  -- 1: over its stage's lifetime
    entered_at real not null,          -- when it came into its stage
    expires_at real,                   -- when its lease or its delay ends
    lease real,                        -- seconds; null: claimed without one
    claimed_from integer,              -- stage of the latest claim
    claimed_to integer,                -- stage that this claim moved it to
    claim text,                        -- token that may still end an attempt
    worker text,
    attempt integer not null default 0,   -- these three since it came into
    failures integer not null default 0,  -- the stage that it is claimed from
    lapses integer not null default 0,
    rejects integer not null default 0,   -- since it was added or retried
    jobcmd text,
    filename text,
    files text,
    files_stage integer,               -- stage whose attempt made the files
    laststage integer,
    max_attempts integer,
    timeout real,
    cwd text,
    outputs text,
    progress text,                     -- of its attempt, as its worker told it
    note text,                         -- of an attempt for the next one
    unmet integer not null default 0,  -- dependencies not yet met
    unique (namespace, jobid));
create index job_queue on job (namespace, stage, free, priority desc, jobid);
create index job_expiry on job (expires_at);
create index job_age on job (
    namespace, stage, state, expired, entered_at, jobid);

create table attempt (                 -- those that have ended
    id integer primary key,
    job integer not null,              -- job.id
    claim text not null,
    attempt integer not null,
    stage integer not null,            -- claimed from
    target integer,                    -- stage that its update moved it to
    worker text,
    host text,                         -- unless it is done
    started real not null,
    ended real not null,
    outcome text not null,
    exit_code integer,
    error text,
    stderr text,
    given text);                       -- what its update replaced in the job,
                                       -- a JSON object; null: nothing
create index attempt_job on attempt (job);

create table dependency (              -- the child waits for the parent
    child integer not null, parent integer not null,  -- job.id
    met integer not null,              -- 1: the parent has been done
    primary key (child, parent));
create index dependency_parent on dependency (parent, met, child);

create table tally (                   -- how many jobs there are
    namespace integer not null, stage integer not null, state text not null,
    jobs integer not null, expired integer not null,
    primary key (namespace, stage, state));

create table pace (                    -- what ended in each minute
    namespace integer not null, minute integer not null,
    done integer not null,             -- jobs
    updates integer not null,          -- attempts, of any stage
    failed integer not null,           -- attempts that failed
    primary key (namespace, minute));

create table spent (                   -- sums of time
    namespace integer not null, stage integer not null,
    kind text not null,                -- an attempt's outcome; 'claimed' and
                                       -- 'again': how long claimed jobs waited
    bucket integer not null,           -- see time_bucket()
    n integer not null, seconds real not null,
    primary key (namespace, stage, kind, bucket));

create table worker (
    namespace integer not null, name text not null, host text, stages text,
    slots integer, memory integer, busy integer, done integer, failed integer,
    heard real not null,               -- when its last heartbeat came
    quarantine text,                   -- why it takes no more work
    drain integer not null default 0,  -- 1: it should claim no more
    primary key (namespace, name));

create table submission (              -- in parts, one after another
    id integer primary key,
    namespace integer not null,
    key text not null,                 -- its name, as JSON
    part integer not null,             -- the jobs that came before
    first integer not null, jobs integer not null,
    added real not null,
    unique (namespace, key, part));
"""


class SQL:
    """The statements of the Store and the Writer."""

    SETTING = "select value from setting where name = :name"
    SET_SETTING = "insert into setting values (:name, :value)"

    NAMESPACE = "select * from namespace where id = :id"
    NAMESPACE_OF = "select id from namespace where jobix = :jobix"
    ADD_NAMESPACE = "insert or ignore into namespace (jobix) values (:jobix)"
    SET_READING = """
        update namespace set reading = :reading
        where id = :id and reading is null"""
    RENEW_JOBIX = """
        update namespace set jobix = :jobix, reading = :reading
        where id = :id"""
    SET_LASTSTAGE = """
        update namespace set laststage = :laststage where id = :namespace"""
    LAST_JOBID = """
        select max(last_jobid, coalesce(
            (select max(jobid) from job where namespace = :namespace), 0))
        from namespace where id = :namespace"""
    SET_LAST_JOBID = """
        update namespace set last_jobid = :jobid
        where id = :namespace and last_jobid < :jobid"""

    # the columns that a move needs; `final` is the last stage
    STATE = """
        select id, namespace, jobid, stage, state, expired, entered_at,
            expires_at, lease, claimed_from, claimed_to, claim, worker,
            attempt, failures, lapses, rejects, unmet, max_attempts, note,
            coalesce(laststage, (select namespace.laststage from namespace
                where namespace.id = job.namespace)) as final"""
    ANY_JOB = STATE + " from job "
    JOB = ANY_JOB + "where namespace = :namespace and jobid = :jobid"
    JOB_BY_ID = ANY_JOB + "where id = :id"
    # … and the rest of it
    WHOLE_JOB = STATE + """, free, priority, laststage, timeout, jobcmd,
        filename, files, files_stage, cwd, outputs, progress from job """
    SHOWN_JOB = """
        select *, (select name from stage where namespace = :namespace
            and stage.stage = shown.stage) as stage_name from (""" + \
        WHOLE_JOB + """
            where namespace = :namespace and jobid = :jobid) as shown"""
    CONTENT = """
        select jobcmd, filename, files, files_stage from job where id = :id"""
    # one look-up in job_queue, however many jobs there are
    FREE = WHOLE_JOB + """
        where namespace = :namespace and stage = :stage and free = 1
        and not exists (select 1 from stage where stage.namespace = :namespace
            and stage.stage = :stage
            and (paused or cores > :cores or memory > :memory))
        order by priority desc, jobid limit :limit"""
    COUNT_FREE = """
        select count(*) from (
            select 1 from job where namespace = :namespace and stage = :stage
            and free = 1 and not exists (select 1 from stage
                where stage.namespace = :namespace and stage.stage = :stage
                and paused)
            limit 20000)"""
    # one range of job_expiry; SQLite 3.7.17 would walk over the nulls, too
    OVERDUE = ANY_JOB + """
        where expires_at > 0 and expires_at <= :now
        order by expires_at limit :limit"""

    # an existing job is left as it is; ADD_JOBS ends in rows of values
    ADD_JOBS = """
        insert or ignore into job (namespace, stage, laststage, state, free,
            entered_at, jobid, priority, jobcmd, filename, max_attempts,
            timeout, cwd, outputs) values """
    NEW_JOB = "(?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
    # every move of a job: only if the job is as it was read
    MOVE = """
        update job set stage = :stage, state = :state, free = :free,
            expired = 0, entered_at = :entered_at, expires_at = :expires_at,
            lease = :lease, claimed_from = :claimed_from,
            claimed_to = :claimed_to, claim = :claim, worker = :worker,
            attempt = :attempt, failures = :failures, lapses = :lapses,
            rejects = :rejects, note = :note, progress = null
        where id = :id and stage = :old_stage and state = :old_state
            and claim is :old_claim"""
    REPLACE = """
        update job set jobcmd = :jobcmd, filename = :filename,
            files = :files, files_stage = :files_stage
        where id = :id"""
    RENEW = """
        update job set expires_at = :expires_at, lease = :lease, free = 0
        where namespace = :namespace and jobid = :jobid and claim = :claim
        and state = 'working'"""
    TELL = """
        update job set progress = coalesce(:progress, progress),
            note = nullif(coalesce(:note, note), '')
        where namespace = :namespace and jobid = :jobid"""
    # at a server's start and after a pause, so that an outage costs no lease
    RENEW_ALL = """
        update job set expires_at = :now + lease
        where expires_at > 0 and state = 'working'"""
    FORGET = "delete from job where id = :id"
    FORGET_ATTEMPTS = "delete from attempt where job = :id"
    FORGET_PARENTS = "delete from dependency where child = :id"
    FORGET_CHILDREN = "delete from dependency where parent = :id"

    SUBMISSION = """
        select first, jobs from submission
        where namespace = :namespace and key = :key and part = :part"""
    ADD_SUBMISSION = """
        insert into submission (namespace, key, part, first, jobs, added)
        values (:namespace, :key, :part, :first, :jobs, :now)"""
    PARTS = """
        select first, jobs, added from submission
        where namespace = :namespace and key = :key order by part"""
    LATEST_KEYS = """
        select key from submission where namespace = :namespace
        group by key order by max(id) desc limit :limit"""

    ADD_DEPENDENCY = """
        insert into dependency select :child, id, state = 'done' from job
        where namespace = :namespace and jobid = :parent"""
    SET_UNMET = """
        update job set unmet = (select count(*) from dependency
            where child = job.id and met = 0) where id = :id"""
    # one range of dependency_parent
    CHILDREN = """
        select child from dependency
        where parent = :parent and met = 0 and child > :after
        order by child limit :limit"""
    MEET = """
        update dependency set met = 1
        where child = :child and parent = :parent"""
    MEET_ONE = "update job set unmet = unmet - 1 where id = :child"
    WAITED_FOR = """
        select jobid from dependency cross join job on job.id = parent
        where child = :id and met = 0 limit :limit"""
    ABORTED_BY = """
        select jobid from dependency cross join job on job.id = parent
        where child = :id and met = 0
            and state in ('failed', 'cancelled', 'aborted') limit 1"""
    # at a start: parents whose end a killed server told only to some children
    UNFINISHED_PARENTS = """
        select distinct parent, job.state from dependency
        cross join job on job.id = parent
        cross join job as follower on follower.id = child
        where met = 0 and (job.state = 'done' or follower.state = case
            when job.state in ('failed', 'cancelled', 'aborted')
                then 'blocked' else 'aborted' end)"""

    # written once, when an attempt ends …
    ADD_ATTEMPT = """
        insert into attempt (job, claim, attempt, stage, target, worker, host,
            started, ended, outcome, exit_code, error, stderr, given)
        values (:id, :claim, :attempt, :claimed_from, :target, :worker,
            case when :outcome != 'done' then (select host from worker
                where namespace = :namespace and name = :worker) end,
            :started, :now, :outcome, :exit_code, :error, :stderr, :given)"""
    # … and again when it had lapsed and ended after all
    MEND_ATTEMPT = """
        update attempt set target = :target, ended = :now, outcome = :outcome,
            exit_code = :exit_code, error = :error, stderr = :stderr,
            given = :given
        where job = :id and claim = :claim"""
    TAKE_BACK_LAPSE = """
        delete from attempt
        where job = :id and claim = :claim and outcome = 'lapsed'"""
    ATTEMPT = """
        select outcome, target, started from attempt
        where job = :id and claim = :claim"""
    ATTEMPTS = """
        select attempt, stage, target, worker, host, started, ended, outcome,
            exit_code, error, stderr
        from attempt where job = :id order by id desc limit :limit"""
    # since the newest attempt in which that stage was done
    GIVEN_SINCE = """
        select given, id > first as later
        from (select max(id) as first from attempt
            where job = :id and stage = :stage and outcome = 'done')
        cross join attempt
        where job = :id and id >= first and given is not null
        order by id desc"""
    LAST_ATTEMPT_ID = "select max(id) from attempt"
    # those of jobs that ended long ago, except those for Store.restore()
    PRUNE = """
        delete from attempt where id > :after and id <= :last
        and exists (select 1 from job where job.id = attempt.job
            and state in ('done', 'cancelled') and entered_at < :before)
        and (outcome != 'done' or not exists (select 1 from attempt as other
            where other.job = attempt.job and given is not null))"""

    # one row for each name, the newest it said
    HEARD = """
        insert or replace into worker
        values (:namespace, :name, :host, :stages, :slots, :memory, :busy,
            :done, :failed, :now, :quarantine, coalesce((
                select drain from worker
                where namespace = :namespace and name = :name), 0))"""
    # workers in quarantine stay, for a person to see
    FORGET_WORKER = """
        delete from worker where namespace = :namespace and name = :name
        and quarantine is null"""
    WORKERS = """
        select name, host, stages, slots, memory, busy, done, failed, heard,
            quarantine, drain
        from worker where namespace = :namespace and heard >= :since
        order by heard desc, name"""
    ALIVE = "select count(*) from worker where heard >= ?"
    DRAIN = """
        update worker set drain = :drain
        where namespace = :namespace and name = :name"""
    DRAINED = """
        select 1 from worker
        where namespace = :namespace and name = :name and drain = 1"""

    STAGES = """
        select stage, minutes, paused, name, cores, memory from stage
        where namespace = :namespace order by stage"""
    TOO_LARGE = """
        select 1 from stage where namespace = :namespace and stage = :stage
        and (cores > :cores or memory > :memory)"""
    # a row also where another server has forgotten the stage
    NEEDS = """
        select max(cores) as cores, max(memory) as memory from stage
        where namespace = :namespace and stage = :stage"""
    ADD_STAGE = "insert into stage (namespace, stage) values (?, ?)"
    UNUSED_STAGES = """
        select stage from stage where namespace = :namespace
        and minutes is null and name is null and not paused
        and cores is null and memory is null
        and not exists (select 1 from tally where jobs > 0
            and tally.namespace = :namespace and tally.stage = stage.stage)"""
    FORGET_STAGE = "delete from stage where namespace = ? and stage = ?"
    SET_STAGE = """
        update stage set minutes = :minutes, paused = :paused, name = :name,
            cores = :cores, memory = :memory
        where namespace = :namespace and stage = :stage"""
    # jobs that are done now that there is a last stage
    NEWLY_DONE = """
        select jobid from job
        where namespace = :namespace and laststage is null
        and stage >= (select laststage from namespace where id = :namespace)
        and state in ('waiting', 'delayed', 'blocked')"""

    # jobs whose mark isn't what their stage's lifetime makes it: ranges of
    # job_age, two for each state
    STAGES_JOBS = """
        select job.id, job.namespace, job.stage, state, expired
        from stage cross join job indexed by job_age
        where stage.namespace = coalesce(:namespace, stage.namespace)
            and job.namespace = stage.namespace and job.stage = stage.stage
            and state in ('waiting', 'delayed', 'blocked', 'working', 'done',
                'failed', 'cancelled', 'aborted')"""
    MISMARKED = STAGES_JOBS + """
            and expired = 0 and minutes > 0
            and entered_at < :now - 60 * minutes
        union all""" + STAGES_JOBS + """
            and expired = 1 and entered_at >= case
                when minutes > 0 then :now - 60 * minutes else 0 end
        limit :limit"""
    MARK = "update job set expired = 1 - expired where id = ?"

    # a group of jobs, with one stage, state and mark, is a range of job_age
    GROUP = """ from job indexed by job_age
        where namespace = :namespace and stage = :stage and state = :state
            and expired = :expired and jobid >= :first and jobid <= :last"""
    GROUP_IDS = "select jobid" + GROUP + " order by jobid"
    HELD = "select jobid, worker, entered_at" + GROUP
    # a page of jobs: what its places are, those after a place, the order
    PLACES = {
        "id": ("jobid", "", "jobid"),
        "-id": ("jobid", "", "jobid desc"),
        "time": (
            "entered_at, jobid",
            " and entered_at >= :since"
            " and (entered_at > :since or jobid > :after)",
            "entered_at, jobid"),
        "-time": (
            "entered_at, jobid",
            " and entered_at <= :since"
            " and (entered_at < :since or jobid < :after)",
            "entered_at desc, jobid desc"),
    }
    WHOLE = """ from job
        where namespace = :namespace and jobid >= :first and jobid <= :last
            and (:stage is null or stage = :stage)
            and (:state is null or state = :state
                or (:state = 'expired' and expired = 1))"""
    FITS = """
            and (:worker is null or worker = :worker and state = 'working')
            and (:match is null or instr(lower(jobcmd), :match)
                or instr(lower(filename), :match))"""
    # the latest of a group, with their last attempts
    LATEST = """
        select entered_at, jobid, job.stage, exit_code,
            substr(error, -1000) as error, substr(stderr, -1000) as stderr,
            attempt.worker, host
        from job left join attempt on attempt.id = (
            select max(id) from attempt where job = job.id)
        where namespace = :namespace and job.stage = :stage
            and state = :state and expired = :expired
            and jobid >= :first and jobid <= :last
        order by entered_at desc, jobid desc limit :limit"""

    COUNT = """
        update tally set jobs = jobs + ?, expired = expired + ?
        where namespace = ? and stage = ? and state = ?"""
    COUNT_FIRST = """
        insert into tally (jobs, expired, namespace, stage, state)
        values (?, ?, ?, ?, ?)"""
    TALLY = """
        select stage, state, jobs, expired from tally
        where namespace = :namespace and jobs > 0 order by stage, state"""
    COUNT_JOBS = """
        select stage, state, count(*) as jobs, sum(expired) as expired
        from job where namespace = :namespace
            and jobid >= :first and jobid <= :last
        group by +stage, +state"""
    PACE = """
        update pace set done = done + ?, updates = updates + ?,
            failed = failed + ?
        where namespace = ? and minute = ?"""
    PACE_FIRST = """
        insert into pace (done, updates, failed, namespace, minute)
        values (?, ?, ?, ?, ?)"""
    PACES = """
        select minute / :step as point, sum(done) as done,
            sum(updates) as updates, sum(failed) as failed
        from pace where namespace = :namespace and minute >= :minute
        group by 1"""
    FIRST_MINUTE = "select min(minute) from pace where namespace = :namespace"
    SPEND = """
        update spent set n = n + ?, seconds = seconds + ?
        where namespace = ? and stage = ? and kind = ? and bucket = ?"""
    SPEND_FIRST = """
        insert into spent (n, seconds, namespace, stage, kind, bucket)
        values (?, ?, ?, ?, ?, ?)"""
    # at most 161 rows for each stage and kind
    SPENT = """
        select stage, kind, bucket, n, seconds from spent
        where namespace = :namespace order by stage, kind, bucket"""

    # figures of all namespaces, whose groups are few
    ALL_JOBS = """
        select stage, state, sum(jobs) as jobs, sum(expired) as expired
        from tally group by stage, state having sum(jobs) > 0"""
    ALL_SPENT = """
        select stage, kind, bucket, sum(n) as n, sum(seconds) as seconds
        from spent group by stage, kind, bucket order by stage, kind, bucket"""
    ALL_WORKERS = """
        select count(*) as workers, coalesce(sum(slots), 0) as slots,
            coalesce(sum(busy), 0) as busy from worker where heard >= :since"""


def page_sql(source, order):
    """Return the statement for the places of a page, of all jobs or a group.
    """
    columns, following, ordered = SQL.PLACES[order]
    return "select " + columns + source + following + SQL.FITS + \
        " order by " + ordered + " limit :limit"


# ------------------------------------------------ where the database lies ---

MOUNTINFO = "/proc/self/mountinfo"  # described in proc(5)
# File systems that other hosts may write to, or where a lock may hold on one
# host only. All FUSE file systems ("fuse.sshfs") count as such.
NETWORK_FILE_SYSTEMS = {
    "9p", "afs", "beegfs", "ceph", "cifs", "fhgfs", "fuse", "glusterfs",
    "gpfs", "lustre", "nfs", "nfs4", "orangefs", "panfs", "pvfs2", "smb3",
    "smbfs", "virtiofs", "wekafs",
}
OPEN_FOLDER = "The folder %s %s: keep jobman's files in a folder of your" \
    " own (mkdir -m 700 FOLDER)."


def home_file(name):
    """Return the path of one of our files in the home folder."""
    return os.path.join(os.path.expanduser("~"), ".jobman", name)


def remove(path):
    """Remove a file if it exists."""
    with contextlib.suppress(OSError):
        os.unlink(path)


def open_private(path, more_flags=0):
    """Return a descriptor of a file, created with mode 0600."""
    return os.open(path, os.O_RDWR | os.O_CREAT | more_flags, 0o600)


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


def check_folder(folder, *, warn=False):
    """Raise CommandError if others can write in a folder of jobman's files.

    SQLite would use a journal that they put there, so they could run commands
    as us. With `warn`, a folder that its group can write to is only reported
    on standard error.
    """
    status = os.stat(folder)
    if not is_ours(status.st_uid, folder):
        fault = "belongs to another user"
    elif status.st_mode & stat.S_IWOTH:
        fault = "can be written by anyone"
    elif status.st_mode & stat.S_IWGRP:
        fault = "can be written by its group"
        if warn:
            return say("jobman.py: " + OPEN_FOLDER % (folder, fault))
    else:
        return
    raise CommandError(OPEN_FOLDER % (folder, fault))


def make_folder(path, *, warn=False):
    """Create the folder of a file with mode 0700 if it is missing; check it.
    """
    folder = os.path.dirname(os.path.realpath(path))
    try:
        with contextlib.suppress(FileExistsError):
            os.mkdir(folder, 0o700)
    except OSError as error:
        raise CommandError("The folder %s can't be made: %s." % (
            folder, error.strerror)) from None
    check_folder(folder, warn=warn)


def unescape(field):
    """Decode the octal escapes in a field of mountinfo."""
    return re.sub(r"\\([0-7]{3})", lambda m: chr(int(m.group(1), 8)), field)


def find_mount(folder):
    """Return the type and the source of the file system of a folder.

    The longest mount point above the folder counts, and the last of several
    mounts on it. Both are empty if mountinfo can't be read.
    """
    folder = os.path.realpath(folder)
    text, nearest, found = "", "", ("", "")
    with contextlib.suppress(OSError), open(MOUNTINFO, "rb") as file:
        text = os.fsdecode(file.read())
    for line in text.split("\n"):
        mount, _, file_system = line.partition(" - ")
        if file_system:
            point = unescape(mount.split(" ")[4])
            above = os.path.commonpath([point, folder]) == point
            if above and len(point) >= len(nearest):
                nearest = point
                found = tuple(map(unescape, file_system.split(" ")[:2]))
    return found


def try_locks(file):
    """Return whether a POSIX lock on a file is granted, to one process only.

    A process is always granted a lock that it holds, so a child tries it.
    """
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    with warnings.catch_warnings():  # of threads: the child needs none
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitpid(child, 0)[1] != 0


class DatabaseLocation:
    """The location of a database, and how it can be used there.

    `kind` and `source` describe the file system. `locks_work` is whether
    POSIX locks, which SQLite uses, can be trusted there. If
    `exclusive`, only one server, with one connection, can use the database.
    """

    def __init__(self, path):
        self.path = path
        self.file = os.path.realpath(path)  # so that links share a lock file
        self.kind, self.source = find_mount(os.path.dirname(self.file))
        self.locks_work = True
        probe = "%s.locks.%s" % (self.file, secrets.token_hex(4))
        with contextlib.suppress(OSError):  # then no server can start either
            file = open_private(probe, os.O_EXCL)
            try:
                self.locks_work = try_locks(file)
            finally:
                os.close(file)
                remove(probe)
        self.exclusive = self.kind in NETWORK_FILE_SYSTEMS or \
            self.kind.startswith("fuse.") or not self.locks_work
        self.vfs = "unix" if self.locks_work else "unix-none"

    def describe(self):
        """Return a clause such as "x.db is on nfs4 (host:/export)"."""
        text = "%s is on %s" % (self.path, self.kind or "a file system")
        if self.source:
            text += " (%s)" % self.source
        if not self.locks_work:
            text += ", where locks don't work"
        return text


# --------------------------------------- opening and copying the database ---


# Bytes of the WAL that aren't truncated. It grows to some 9 MiB between two
# checkpoints, and truncating it each time would cost a tenth of all claims.
WAL_KEPT = 32 * 2**20


def file_uri(path, *, readonly, vfs="unix"):
    """Return the URI by which SQLite opens the database at `path`.

    It names the VFS: an attached database would use that of the main one.
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
    """Turn an error of SQLite or the system into CommandError about `path`."""
    try:
        yield
    except (Unavailable, sqlite3.Error, OSError) as error:
        reason = getattr(error, "reason", None) or cause(error)
        raise CommandError(
            "The database %s can't be used: %s." % (path, reason)) from None


def inspect(path):
    """Return the schema version of the database at `path`, 0 for a new one.

    Only the file's header is read (https://sqlite.org/fileformat.html,
    section 1.3), which changes nothing. Raise CommandError if the file isn't a
    jobman database, or was made by a newer version.
    """
    head = b""
    if os.path.exists(path):
        with translate_errors(path), open(path, "rb") as file:
            head = file.read(100)
    if not head:
        return 0
    if head[:16] != b"SQLite format 3\0":
        raise CommandError("%s is not a database." % path)
    if int.from_bytes(head[68:72], "big") != APPLICATION_ID:
        raise CommandError("%s is the database of another program." % path)
    version = int.from_bytes(head[60:64], "big")
    if version > SCHEMA_VERSION:
        raise CommandError(
            "%s was made by a newer jobman (schema %d, this one knows %d);"
            " use that one." % (path, version, SCHEMA_VERSION)
        )
    return version


def refuse_leftovers(*paths):
    """Raise CommandError if SQLite would use a leftover file as ours."""
    for path in filter(os.path.lexists, paths):
        raise CommandError(
            "%s exists already; move it away, or name a new file."
            % path)


def recover(location):
    """Bring a database that no other process uses into a single file.

    A WAL that a killed server left is written into it, a rollback journal is
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


def open_writer(location):
    """Return the connection that changes a database; create it if needed.

    Raise CommandError, and leave the file untouched, if it can't be used. One
    transaction creates the tables and sets the version: a file without a
    version is new, or a server was killed in that transaction.
    """
    path = location.path
    with translate_errors(path), contextlib.ExitStack() as undo:
        inspect(path)
        if not os.path.exists(path):
            refuse_leftovers(
                location.file + "-wal", location.file + "-journal")
            os.close(open_private(location.file))
            undo.callback(remove, location.file)
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
            connection.executescript(
                "pragma journal_mode = wal; pragma journal_size_limit = %d"
                % WAL_KEPT)
        undo.pop_all()
    return connection


# ----------------------------------------------------------- server lock ---

LOCK_LENGTH = 512  # bytes of a lock file, which is never truncated


def identity(path):
    """Return the device and inode of a file, None if there is no file."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


def read_holder(location):
    """Return the record in the lock file of a database, a dict.

    It is empty if there is no such file, or no valid record in it. The file
    is opened again each time, as NFS looks for changes only then.
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

    A later process with the same number is mistaken for it.
    """
    if holder.get("host") != socket.gethostname():
        return None
    try:
        os.kill(holder["pid"], 0)
    except (OSError, OverflowError, LookupError, TypeError):
        return False
    return True


class ServerLock:
    """Keep a second server off a database, unless both share it.

    On a local file system an flock on the file `<database>.lock` decides; it
    ends with the process. On a network file system an flock may hold on one
    host only, or fail. There the file also has a heartbeat: a counter that
    the holder increments. A server that sees no change for STALE seconds
    takes the file over. A holder that couldn't confirm for LIMIT seconds that
    the file is its own changes nothing until it can.

    `clock` returns seconds and is never set back. `pause` waits for so many
    seconds, or raises CommandError to give up.
    """

    LOOK = 1  # seconds between two looks at the files
    BEAT = 4  # seconds between two heartbeats
    # A transaction may begin up to LIMIT after the last heartbeat, and has
    # the time until STALE to end.
    LIMIT = 12
    STALE = 20

    def __init__(
        self, location, *, shared, clock=time.monotonic, pause=time.sleep
    ):
        if shared and location.exclusive:
            raise CommandError(
                "%s, so servers can't share it: put it on a local file system"
                " (a disk of this host, or a folder of your own in /dev/shm),"
                " or run only one server, without --shared."
                % location.describe()
            )
        self.location = location
        self.path = location.file + ".lock"
        self.shared = shared
        self.clock, self.pause = clock, pause
        self.key = secrets.token_hex(8)
        self.beats = 0
        self.lost = None  # the reason, once the database isn't ours any more
        self.database_id = None  # of the file to be watched, once it is open
        self.file = self.file_id = None  # the id once the file is taken
        self.ending = threading.Event()
        self.watcher = threading.Thread(target=self.watch, daemon=True)
        try:
            while self.file_id is None:
                self.take()
        except BaseException:
            self.close()
            raise
        self.watcher.start()

    # Taking it

    def take(self):
        """Take the lock file, unless its last holder removes it meanwhile.

        Raise CommandError if another server has it.
        """
        try:
            self.file, found = open_private(self.path, os.O_EXCL), False
        except FileExistsError:
            self.file, found = open_private(self.path), True
        self.lock_file()
        waits = found and self.location.exclusive
        if waits:
            self.await_silence()
        file_id = identity(self.file)
        if identity(self.path) != file_id:
            self.file = os.close(self.file)
            return
        self.file_id, self.confirmed_at = file_id, self.clock()
        self.write()
        if waits:
            self.pause(self.LOOK)  # another waiting server may take it, too
            if not self.holds_file():
                raise self.refusal()

    def lock_file(self):
        """Get the flock; on a network file system there may be none."""
        kind = fcntl.LOCK_SH if self.shared else fcntl.LOCK_EX
        try:
            fcntl.flock(self.file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            raise self.refusal() from None
        except OSError:
            if not self.location.exclusive:
                raise

    def refusal(self):
        """Return the CommandError that another server has the database."""
        advice = "." if self.location.exclusive else \
            ", or use another --db, or serve it twice with --shared."
        return CommandError(
            "Another server has the database %s (%s): end that one first%s" % (
                self.location.path, name_holder(read_holder(self.location)),
                advice))

    def await_silence(self):
        """Wait until the last holder is known to have ended.

        Raise CommandError if it shows a sign of life within STALE seconds.
        """
        holder = later = read_holder(self.location)
        if is_running(holder) is False:
            return
        say("jobman.py: %s may still have the database %s: waiting %d s for a"
            " sign of life." % (
                name_holder(holder), self.location.path, self.STALE))
        end = self.clock() + self.STALE
        while later == holder and self.clock() < end:
            self.pause(self.LOOK)
            later = read_holder(self.location)
        if later and later != holder:
            raise self.refusal()

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

    def holds_file(self):
        """Return True if the lock file is still ours."""
        if self.location.exclusive:
            return read_holder(self.location).get("key") == self.key
        return identity(self.path) == self.file_id

    def look(self):
        """Record if the database isn't ours any more, and why."""
        ours = self.holds_file()
        here = self.database_id in (None, identity(self.location.file))
        if self.lost or (ours and here):
            return
        holder = {} if ours else read_holder(self.location)
        self.lost = name_holder(holder) + " has taken it over" if holder \
            else "its files were moved or removed"

    def watch(self):
        """Confirm the lock at intervals, until it is lost or given up."""
        interval = self.BEAT if self.location.exclusive else self.LOOK
        while not (self.lost or self.ending.wait(interval)):
            with contextlib.suppress(OSError):  # check() notices a long one
                self.confirm()

    def confirm(self):
        """Check that the database is still ours; if so, send a heartbeat.
        """
        began = self.clock()
        self.look()
        if self.location.exclusive and not self.lost:
            self.write()
        self.confirmed_at = began

    def check(self):
        """Raise Unavailable unless the database is known to be ours."""
        if self.location.exclusive:
            try:
                self.look()
            except OSError as error:
                raise Unavailable(error.strerror) from None
        if self.lost:
            raise Unavailable("it has lost its database: " + self.lost)
        age = self.clock() - self.confirmed_at
        if self.location.exclusive and age > self.LIMIT:
            raise Unavailable("another server may have its database")

    def require(self):
        """Raise CommandError if the database is lost."""
        if self.lost:
            raise CommandError(
                "This server has lost the database %s, and ends: %s."
                % (self.location.path, self.lost))

    # Giving it up

    def close(self):
        """Give up the lock; the last holder removes the files."""
        self.ending.set()
        if self.watcher.ident:
            self.watcher.join(self.BEAT)
        if self.file is None:
            return
        with contextlib.suppress(OSError):  # raised if others share it
            if self.shared:
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if self.file_id and self.holds_file():
                for suffix in (".gate", ".turn", ".lock"):
                    remove(self.location.file + suffix)
        self.file = os.close(self.file)


class FairLock:
    """Make the processes that share a database take turns.

    SQLite's own lock is unfair: it may starve a process for minutes. Here a
    process holds the gate while it waits for its turn. A process that wants
    another turn finds the gate closed, and queues behind it.
    """

    def __init__(self, path):
        self.gate = open_private(path + ".gate")
        self.turn = open_private(path + ".turn")

    def __enter__(self):
        fcntl.flock(self.gate, fcntl.LOCK_EX)
        try:
            fcntl.flock(self.turn, fcntl.LOCK_EX)
        finally:
            fcntl.flock(self.gate, fcntl.LOCK_UN)

    def __exit__(self, *_):
        fcntl.flock(self.turn, fcntl.LOCK_UN)

    def close(self):
        """Close the files."""
        os.close(self.gate)
        os.close(self.turn)


# ------------------------------------------------------- states and moves ---

UNENDED = ("waiting", "delayed", "blocked", "working")
PUT_ASIDE = ("failed", "cancelled", "aborted")  # until a retry
STATES = (*UNENDED, "done", *PUT_ASIDE)
SWEEPS = {  # of many jobs: the key in the answer, and the states of the jobs
    "retry": ("retried", ("done", *PUT_ASIDE)),
    "cancel": ("cancelled", (*UNENDED, "failed", "aborted")),
    "release": ("released", ("working",)),
    "forget": ("forgotten", ("done",)),
}
REJECTABLE = ("waiting", "delayed", "done", "failed")  # without a token


def is_free(state, lease):
    """Return whether a claim may take a job: the contract's *free*."""
    return state in ("waiting", "done") or (
        state == "working" and lease is None
    )


def dependency_end(state):
    """Return how a parent's state affects its children.

    "met": it is done; "unmet": it won't be, until a retry; None: not yet.
    """
    if state == "done":
        return "met"
    return "unmet" if state in PUT_ASIDE else None


def stage_state(stage, final):
    """Return the state of a job that is put into `stage`."""
    return "done" if final is not None and stage >= final else "waiting"


def as_dict(row):
    """Return a row as a dict; dict(row) would search for every name."""
    return dict(zip(row.keys(), row))


def after_move(job, now, **after):
    """Return the values that SQL.MOVE writes, and those of the job before.

    Unless `after` says otherwise, the claim, the lease and the expiry of
    `job` (a dict of SQL.ANY_JOB) end, and its time in the stage begins now.
    """
    values = dict(
        job, entered_at=now, expires_at=None, lease=None, claim=None,
        old_stage=job["stage"], old_state=job["state"], old_claim=job["claim"],
    )
    values.update(after)
    values["free"] = int(is_free(values["state"], values["lease"]))
    return values


def next_note(job, note):
    """Return a job's note after an attempt that left one: "" clears it."""
    return job["note"] if note is None else note or None


def time_bucket(seconds):
    """Return the number of the bucket that a time is counted in.

    There are four to a doubling, and bucket 0 ends at a millisecond.
    """
    return max(0, math.ceil(4 * math.log2(max(seconds, 0.001) * 1000)))


def bucket_end(bucket):
    """Return the longest time that a bucket counts, in seconds."""
    return 0.001 * 2 ** (bucket / 4)


# ---------------------------------------------------------------- writer ---

SUMS = {  # tables of sums: how to add to both of a row, and its first ones
    "tally": (SQL.COUNT, SQL.COUNT_FIRST),
    "pace": (SQL.PACE, SQL.PACE_FIRST),
    "spent": (SQL.SPEND, SQL.SPEND_FIRST),
}

class Transaction:
    """The connection, the time and the sums of one commit.

    `now` is in seconds since 1970. The counts of the operations are summed up
    here and written once, just before the commit. `left` is how many jobs the
    steps of this commit may still take: see Store.in_steps().
    """

    def __init__(self, connection, now):
        self.connection = connection
        self.execute = connection.execute
        self.executemany = connection.executemany
        self.now = now
        self.left = 0
        self.late = False  # more leases and delays are over
        self.sums = {}  # sums to add to two columns, by (table, *key)
        self.freed = Counter()  # jobs set free, by (namespace, stage)
        self.stages = {}  # sets of those in their table, by namespace
        self.unused = {}  # sets of those without jobs, by namespace
        self.ended = OrderedDict()  # (end, last child told) by parent

    def add(self, key, *values):
        """Add values to the sums of a row.

        `key` is its table in SUMS, and its primary key.
        """
        sums = self.sums.get(key)
        self.sums[key] = values if sums is None else [
            a + b for a, b in zip(sums, values)]

    def count(self, jobs, expired, *group):
        """Count jobs that join a group, or leave it.

        A group is a namespace, stage and state.
        """
        self.add(("tally", *group), jobs, expired)

    def count_ends(self, namespace, *, jobs=0, updates=0, failed=0):
        """Count jobs and attempts that are done, and failed attempts."""
        key = "pace", namespace, int(self.now // 60)
        self.add(key, jobs, updates, failed)

    def add_time(self, job, stage, kind, seconds):
        """Add the seconds of an attempt, or of the wait for a claim."""
        key = "spent", job["namespace"], stage, kind, time_bucket(seconds)
        self.add(key, 1, seconds)

    def move(self, moves):
        """Write and count moves of jobs, as after_move() returns them."""
        written = self.executemany(SQL.MOVE, moves)
        if written.rowcount != len(moves):
            raise sqlite3.IntegrityError("a job has moved meanwhile")
        for job in moves:
            namespace, stage = job["namespace"], job["stage"]
            self.count(-1, -job["expired"],
                       namespace, job["old_stage"], job["old_state"])
            self.count(1, 0, namespace, stage, job["state"])
            if job["free"]:
                self.freed[namespace, stage] += 1
            end = dependency_end(job["state"])
            if end != dependency_end(job["old_state"]):
                self.announce(job["id"], end)

    def announce(self, parent, end, after=-1):
        """Have Store.propagate() tell a job's children that follow `after`.

        Once a parent was done its edges are met, whatever happens to it then.
        """
        if self.ended.get(parent, (None,))[0] != "met":
            self.ended[parent] = end, after

    def write_sums(self):
        """Add the sums to their rows; insert those that aren't there yet."""
        for (table, *key), added in self.sums.items():
            if any(added):
                update, insert = SUMS[table]
                values = (*added, *key)
                if self.execute(update, values).rowcount == 0:
                    self.execute(insert, values)


class Operation:
    """A change on its way through the Writer, and its result or error.

    `ready` is released when it is over, or when its thread becomes the leader.
    """

    __slots__ = ("act", "error", "over", "partial", "ready", "result")

    def __init__(self, act):
        self.act = act
        self.ready = threading.Lock()
        self.ready.acquire()
        self.over = self.partial = False
        self.result = self.error = None

    def run(self, transaction):
        """Run the operation, perhaps again, and keep its result or refusal.

        It is `partial` when it was refused after it had written something.
        """
        self.error = None
        changes = transaction.connection.total_changes
        try:
            self.result = self.act(transaction)
        except sqlite3.Error:
            raise
        except Exception as error:
            self.error = error
            self.partial = transaction.connection.total_changes != changes


class Writer:
    """Make all changes: one transaction, many operations, one commit.

    Operations that arrive during a commit wait and share the next one. The
    thread of the first one leads: it runs all of them and wakes the others
    when they are on disk. `mutex` guards queue, leading and closed; the
    connection belongs to the leader.
    """

    CHECKPOINT_AFTER = 1000  # changed rows

    def __init__(
        self, connection, fair_lock, lock, clock, *, prepare, finish, committed
    ):
        self.connection = connection
        self.fair_lock = fair_lock
        self.lock = lock
        self.clock = clock
        self.prepare = prepare  # called first in every transaction
        self.finish = finish  # called last in every transaction
        self.committed = committed  # called with each Transaction, on disk
        self.mutex = threading.Lock()
        self.idle = threading.Condition(self.mutex)  # no thread leads
        self.queue = []
        self.leading = False
        self.closed = False
        self.checkpointed = 0

    def run(self, act):
        """Return `act(transaction)` once it is on disk, or raise its error."""
        operation = Operation(act)
        with self.mutex:
            if self.closed:
                raise Unavailable("it is ending")
            self.queue.append(operation)
            leads, self.leading = not self.leading, True
        if not leads:
            operation.ready.acquire()
        if not operation.over:
            self.lead()
        if operation.error is not None:
            raise operation.error
        return operation.result

    def lead(self):
        """Commit the whole queue, then wake the next leader and the others.

        If the commit fails, so do all its operations.
        """
        with self.mutex:
            batch, self.queue = self.queue, []
        try:
            left = batch
            while not self.commit(left):
                left = [each for each in left if not each.partial]
        except BaseException as error:
            failure = error
            if isinstance(error, (sqlite3.Error, OSError)):
                failure = Unavailable(cause(error))
            for operation in batch:
                operation.error = failure
            if not isinstance(error, Exception):
                raise
        finally:
            with self.mutex:
                leader = self.queue[0] if self.queue else None
                self.leading = leader is not None
                self.idle.notify_all()
            if leader:
                leader.ready.release()
            for operation in batch:
                operation.over = True
                operation.ready.release()

    def commit(self, operations):
        """Run operations and commit; roll back on any error.

        Operations raise before they write. When one has written and raises
        all the same, everything is rolled back and the answer is False: the
        others run again without it. That is rare, and cheaper than a
        savepoint for each. The server lock is checked once more before the
        commit, because until then the database is unchanged.
        """
        with self.fair_lock:
            self.lock.check()
            execute = self.connection.execute
            execute("begin immediate")
            try:
                transaction = Transaction(self.connection, self.clock())
                self.prepare(transaction)
                for operation in operations:
                    operation.run(transaction)
                if any(operation.partial for operation in operations):
                    execute("rollback")
                    return False
                self.finish(transaction)
                transaction.write_sums()
                self.lock.check()
                execute("commit")
            except BaseException:
                if self.connection.in_transaction:
                    execute("rollback")
                raise
            self.checkpoint()
        self.committed(transaction)
        return True

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
        """Finish the current commits, refuse all others, close."""
        with self.idle:
            self.closed = True
            self.idle.wait_for(lambda: not self.leading)
        with self.fair_lock:
            with contextlib.suppress(Unavailable, sqlite3.Error, OSError):
                self.lock.look()
                if self.lock.lost and self.lock.holds_file():
                    # the database was moved, its WAL was not
                    self.connection.execute("pragma wal_checkpoint(passive)")
                self.lock.check()
                if self.lock.location.exclusive:
                    self.connection.executescript(
                        "pragma locking_mode = normal;"
                        " pragma journal_mode = delete")
            self.connection.close()
        self.fair_lock.close()


# --------------------------------------------------------------- waiting ---


class Waiter:
    """A long poll that waits for a job."""

    __slots__ = ("lock", "used", "woken")

    def __init__(self):
        self.woken = False
        self.used = False  # its wake-up isn't passed on
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

    A key is (namespace, stage). At most `limit` long polls wait at a time.
    """

    AT_ONCE = 100  # waiters that are woken at once

    def __init__(self, limit):
        self.mutex = threading.Lock()  # guards everything below
        self.waiters = {}  # {key: {Waiter: None}}, oldest first
        self.more = {}  # {key: how many are still to be woken}
        self.waiting = 0
        self.limit = limit
        self.closed = False

    @contextlib.contextmanager
    def join(self, keys):
        """Add a Waiter for `keys` and yield it; yield None beyond the limit.

        If it was woken but took no job, the next waiter is woken.
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
                waiters = self.waiters.get(key, {})
                waiters.pop(waiter, None)
                if not waiters:
                    self.waiters.pop(key, None)
                    self.more.pop(key, None)
                elif waiter.woken and self.more.get(key):
                    self.more[key] -= 1
                    self.wake_oldest(key, 1)
        if waiter.woken and not waiter.used:
            for key in keys:
                self.wake(key)

    def wake(self, key, n=1):
        """Wake up to `n` waiters of `key`, oldest first.

        Of many, each one that leaves wakes the next: thousands of threads
        at once would spend their time in contention for Python's lock.
        """
        with self.mutex:
            if key in self.waiters:
                n = min(n, len(self.waiters[key]))
                now = min(n, self.AT_ONCE)
                self.more[key] = n - now
                self.wake_oldest(key, now)

    def wake_oldest(self, key, n):
        """Wake up to `n` waiters of `key`; called with the mutex held."""
        for waiter in self.waiters[key]:
            if n <= 0:
                break
            n -= waiter.wake()

    def keys(self):
        """Return the keys that long polls wait for."""
        with self.mutex:
            return list(self.waiters)

    def close(self):
        """Wake all waiters, and refuse new ones."""
        with self.mutex:
            self.closed = True
            waiters = set().union(*self.waiters.values())
            self.waiters.clear()
        for waiter in waiters:
            waiter.wake()
            time.sleep(0.0001)  # waking all at once causes GIL contention


# ----------------------------------------------------------------- store ---

DAMAGED = (
    "jobman.py: The database %s is damaged (%s): end the server, see what is"
    " wrong by the command check, and go on from a backup.")
BLANK_REPORT = dict.fromkeys(("exit_code", "error", "stderr", "seconds"))
LAPSES_SPENT = (
    "%d leases lapsed in this stage: its workers were not heard of in time."
)
PACE_POINTS = 360  # at most, in the line that /pace draws
FAILURES_READ = 1000  # failed jobs that /failures groups, the latest
PAGE_TEXT = 8 * 2**20  # characters of text after which a page ends
ATTEMPTS_SHOWN = 100  # of one job, the last
SUBMISSIONS_SHOWN = 100  # the latest
JSON_COLUMNS = (
    "jobcmd", "filename", "files", "cwd", "outputs", "progress", "note")
ROWS_AT_ONCE = 70  # 999 variables: SQLite's limit before 3.32
CHUNK = 250  # jobs in a step: about 15 ms, and another claim waits for two
PRUNED = 1000  # attempts that one transaction looks at
PRUNE_EVERY = 3600  # seconds
AWAY_AFTER = 300  # seconds without a heartbeat until a worker doesn't count


EVERY_JOB = (range(MAX_JOBID + 1),)


def ids_text(ranges):
    """Return ranges of jobids as text: 1,3,5-8."""
    return ",".join("%d" % ids[0] if len(ids) == 1
                    else "%d-%d" % (ids[0], ids[-1]) for ids in ranges)


def joined(ranges):
    """Return ranges of jobids in order and apart."""
    apart = []
    for ids in sorted(ranges, key=lambda ids: ids.start):
        if apart and ids.start <= apart[-1].stop:
            stop = max(ids.stop, apart[-1].stop)
            apart[-1] = range(apart[-1].start, stop)
        else:
            apart.append(ids)
    return apart


def delay_after(failures):
    """Return the seconds that a job waits after so many failures."""
    return min(600, 2 * 4 ** (min(failures, 10) - 1))


def never():
    """Return False, for a caller that can't hang up."""
    return False


def change(operation):
    """Make a Store method one operation of the Writer's next commit."""

    @functools.wraps(operation)
    def run(self, *args, **named):
        return self.writer.run(lambda tx: operation(self, tx, *args, **named))

    return run


def query(reading):
    """Make a Store method read from a snapshot, without waiting for a commit.

    With an exclusive database it is an operation of the next commit instead,
    on the only connection; so no such method calls another.
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
        self.free = threading.BoundedSemaphore(self.KEPT)
        self.idle = []

    @contextlib.contextmanager
    def reading(self):
        """Yield a connection with a snapshot of the database."""
        with self.free:
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
            self.idle.append(connection)

    def close(self):
        """Close the idle connections."""
        with contextlib.suppress(IndexError):
            while True:
                self.idle.pop().close()


def random_jobix():
    """Return a random number that can't be guessed."""
    return secrets.randbelow(MAX_JOBIX) + 1


def new_figures():
    """Return the figures of a stage without jobs."""
    return {"jobs": 0, "expired": 0, "states": dict.fromkeys(STATES, 0)}


def percentile(buckets, part):
    """Return the seconds within which a `part` (0 to 1) of attempts ran.

    `buckets` is a list of (bucket, n), in order. The answer is the upper end
    of a bucket, so up to a fifth too high.
    """
    left = part * sum(n for _, n in buckets)
    for bucket, n in buckets:
        left -= n
        if left <= 0:
            return bucket_end(bucket)


PARTS = {"median": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99}


def quantiles(buckets, counted, *names):
    """Return the sum of a list of (bucket, n), and its percentiles."""
    found = {counted: sum(n for _, n in buckets)}
    found.update((name, percentile(buckets, PARTS[name])) for name in names)
    return found


class Spent:
    """The times of the jobs of one stage: rows of SQL.SPENT summed up.

    `attempts` and `seconds` are sums by kind, `buckets` lists of (bucket, n)
    by kind.
    """

    def __init__(self):
        self.attempts, self.seconds = Counter(), Counter()
        self.buckets = defaultdict(list)

    @classmethod
    def by_stage(cls, rows):
        """Return {stage: Spent} of rows in order of stage and bucket."""
        stages = defaultdict(cls)
        for stage, kind, bucket, n, seconds in rows:
            spent = stages[stage]
            spent.attempts[kind] += n
            spent.seconds[kind] += seconds
            spent.buckets[kind].append((bucket, n))
        return stages


def group_jobs(ids, jobs):
    """Return new jobs in groups, and the parents of those with parents.

    A group is (jobstage, laststage, whether its jobs have parents); its rows
    are the last columns of ADD_JOBS.
    """
    groups, parents = defaultdict(list), {}
    for jobid, job in zip(ids, jobs):
        if job["after"]:
            parents[jobid] = job["after"]
        group = job["jobstage"], job["laststage"], jobid in parents
        groups[group].append((
            jobid, job["priority"], job["jobcmd"], job["filename"],
            job["max_attempts"], job["timeout"], job["cwd"], job["outputs"]))
    return groups, parents


class Store:
    """The jobs, and all operations on them.

    Methods are named by the contract's words; `namespace` is the id that
    admit() returns for a jobix. Methods marked `change` go through the Writer,
    are on disk when they return, and raise Error when refused; methods marked
    `query` only read. `clock` returns seconds since 1970. `jobix` is the
    server's own, or None for the database's; `new_jobix` replaces that, and
    the reading jobix. A job is failed after `max_attempts` failures, unless
    it has its own number, or after `max_lapses`. Attempts of jobs that ended
    `keep_days` ago are pruned; None: never. If a ticking Store has no commit
    for `outage` seconds, the server was paused, or the clock set. `pause` is
    that of ServerLock. `logs` is the folder of the workers' logs, if it is
    known, and `shares_output` whether the reading jobix sees them.
    """

    TICK = {False: 1, True: 0.2}  # seconds between ticks, by `shared`

    def __init__(
        self, path, *, clock=time.time, shared=False, waiters=20000,
        jobix=None, new_jobix=False, open_to_all=False,
        max_attempts=MAX_ATTEMPTS, max_lapses=MAX_LAPSES, keep_days=None,
        outage=math.inf, pause=time.sleep
    ):
        self.clock = clock
        self.max_attempts = max_attempts
        self.max_lapses = max_lapses
        self.keep_days = keep_days
        self.pruned_at = -math.inf  # when prune() was run
        self.outage = outage
        self.outage_ended = -math.inf  # the last one
        self.committed_at = clock()
        self.shared = shared
        self.open_to_all = open_to_all
        self.namespaces = {}  # ids of those in use, by jobix
        self.unfinished = {}  # ends that propagate() left for the next commit
        self.alive = -math.inf, 0  # when workers were counted, how many
        self.known_stages = {}  # sets of those in their table, by namespace
        self.late = False  # the last commit left some overdue leases
        self.wait_queue = WaitQueue(waiters)
        self.large_bodies = threading.BoundedSemaphore(LARGE_BODIES)
        self.ending = threading.Event()
        self.ticker = None
        self.damaged = False  # and it was reported
        self.logs, self.shares_output = None, False
        inspect(path)  # before a lock file is made beside it
        with translate_errors(path), contextlib.ExitStack() as undo:
            self.location = DatabaseLocation(path)
            self.readers = Readers(self.location.file)
            self.lock = ServerLock(self.location, shared=shared, pause=pause)
            undo.callback(self.lock.close)
            fair_lock = contextlib.ExitStack()  # no turns to take
            if shared:
                fair_lock = FairLock(self.location.file)
            with fair_lock:
                connection = open_writer(self.location)
                self.lock.database_id = identity(self.location.file)
                self.writer = Writer(
                    connection, fair_lock, self.lock, clock,
                    prepare=self.begin, finish=self.propagate,
                    committed=self.after_commit,
                )
                undo.callback(self.writer.close)
                self.resume(connection.execute)
            own = self.writer.run(
                lambda tx: self.own_namespace(tx, jobix, renew=new_jobix))
            self.namespace = own["id"]
            self.jobix, self.reading_jobix = own["jobix"], own["reading"]
            undo.pop_all()

    def wake_all(self):
        """Answer all long polls at once, present and future."""
        self.ending.set()
        self.wait_queue.close()

    def close(self):
        """Answer the long polls, end the last commit, close the database."""
        self.wake_all()
        if self.ticker:
            self.ticker.join()
        self.readers.close()
        self.writer.close()
        self.lock.close()

    def resume(self, execute):
        """Resume where the last server ended.

        Every live lease gets its full time again. Propagation goes on for
        parents whose end a killed server hadn't told to all children.
        """
        execute(SQL.RENEW_ALL, {"now": self.clock()})
        for parent, state in execute(SQL.UNFINISHED_PARENTS).fetchall():
            self.unfinished[parent] = dependency_end(state), -1

    def after_commit(self, tx):
        """Keep the unfinished ends, wake long polls for freed jobs."""
        self.unfinished, self.late = tx.ended, tx.late
        self.committed_at = tx.now
        self.known_stages.update(tx.stages)
        for key, n in tx.freed.items():
            self.wait_queue.wake(key, n)

    def was_paused(self):
        """Return whether an outage ended a moment ago, or is about to."""
        now = self.clock()
        return (now - self.outage_ended < self.outage
                or abs(now - self.committed_at) > self.outage)

    def explain(self, error):
        """Return the Error to answer a request that failed by `error`.

        A damaged database is reported once on standard error.
        """
        reason = getattr(error, "reason", error)
        if type(reason) is sqlite3.DatabaseError and not self.damaged:
            self.damaged = True
            say(DAMAGED % (self.location.path, reason))
        return error if isinstance(error, Error) else Unavailable(error)

    # Namespaces

    def own_namespace(self, tx, jobix, *, renew):
        """Return the server's own namespace, a row; make it if needed.

        `renew` replaces both of its numbers.
        """
        key = {"name": "namespace"}
        made = tx.execute(SQL.SETTING, key).fetchone()
        if jobix is not None:
            own = self.add_namespace(tx, jobix)
        elif made:
            own = made["value"]
        else:
            own = self.add_namespace(tx, random_jobix())
            tx.execute(SQL.SET_SETTING, dict(key, value=own))
        tx.execute(SQL.RENEW_JOBIX if renew else SQL.SET_READING, {
            "id": own, "jobix": random_jobix(), "reading": random_jobix()})
        return tx.execute(SQL.NAMESPACE, {"id": own}).fetchone()

    def add_namespace(self, tx, jobix):
        """Return the id of a jobix's namespace; make it if needed."""
        tx.execute(SQL.ADD_NAMESPACE, {"jobix": jobix})
        return tx.execute(SQL.NAMESPACE_OF, {"jobix": jobix}).fetchone()["id"]

    make_namespace = change(add_namespace)

    def admit(self, jobix):
        """Return the namespace of a caller's jobix, and whether it may only
        read; raise Error 403.

        The server accepts its own numbers, or any. The namespace is None when
        there is nothing in it yet.
        """
        given = str(jobix)
        if secrets.compare_digest(given, str(self.reading_jobix)):
            return self.namespace, True
        if secrets.compare_digest(given, str(self.jobix)):
            return self.namespace, False
        if not self.open_to_all:
            raise Error(403, "This server accepts only the jobix in its access"
                        " file: start it with yours by --jobix-file or"
                        " JOBMAN_JOBIX, or with --open to accept any.")
        if jobix not in self.namespaces:
            found = self.find_namespace(jobix)
            if found is None:
                return None, False
            self.namespaces[jobix] = found
        return self.namespaces[jobix], False

    @query
    def find_namespace(self, execute, jobix):
        """Return the id of the namespace of a jobix, None without one."""
        found = execute(SQL.NAMESPACE_OF, {"jobix": jobix}).fetchone()
        return found and found["id"]

    # How a job moves

    def move(self, tx, job, **after):
        """Move one job: see after_move()."""
        tx.move([after_move(job, tx.now, **after)])

    def settled_state(self, tx, job, stage):
        """Return the state of a job in `stage` that nobody works on."""
        state = stage_state(stage, job["final"])
        if state == "waiting" and job["unmet"]:
            aborted = tx.execute(SQL.ABORTED_BY, job).fetchone()
            state = "aborted" if aborted else "blocked"
        return state

    def find(self, tx, namespace, jobid):
        """Return a job, a dict of SQL.ANY_JOB; raise Error 404."""
        key = {"namespace": namespace, "jobid": jobid}
        job = tx.execute(SQL.JOB, key).fetchone()
        if job is None:
            raise Error(404, "There is no job %d." % jobid)
        return as_dict(job)

    def end_attempt(
        self, tx, job, outcome, *, target=None, report=None, given=None
    ):
        """Write how the attempt under the job's claim ended.

        `given` has the values that its update replaces: see replace().
        """
        if job["claim"] is None:
            return
        values = dict(job, now=tx.now, outcome=outcome, target=target,
                      given=given, started=job["entered_at"])
        values.update(BLANK_REPORT)
        values.update(report or {})
        lapsed = job["lapses"] and tx.execute(SQL.ATTEMPT, job).fetchone()
        if lapsed:
            values["started"] = lapsed["started"]
        tx.execute(SQL.MEND_ATTEMPT if lapsed else SQL.ADD_ATTEMPT, values)
        seconds = values["seconds"]
        if seconds is None:
            seconds = max(0, tx.now - values["started"])
        tx.add_time(job, job["claimed_from"], outcome, seconds)
        tx.count_ends(job["namespace"], updates=int(outcome == "done"),
                      failed=int(outcome == "failed"))

    def interrupt(self, tx, job, outcome):
        """End the attempt of a job that is taken from its worker."""
        if job["state"] == "working":
            self.end_attempt(tx, job, outcome)

    def begin(self, tx):
        """Begin a commit: lapse overdue leases, end delays that are over.

        After an outage every live lease gets its full time first. Unfinished
        work of propagate() goes on. Steps take fewer jobs then, so that it
        doesn't pile up.
        """
        if abs(tx.now - self.committed_at) > self.outage:
            tx.execute(SQL.RENEW_ALL, {"now": tx.now})
            self.outage_ended = tx.now
        tx.ended.update(self.unfinished)
        tx.left = max(CHUNK // 4, CHUNK - len(tx.ended))
        values = {"now": tx.now, "limit": CHUNK}
        overdue = tx.execute(SQL.OVERDUE, values).fetchall()
        tx.late = len(overdue) == CHUNK
        for job in map(as_dict, overdue):
            if job["state"] == "working":
                self.lapse(tx, job)
            else:
                state = self.settled_state(tx, job, job["stage"])
                self.move(tx, job, state=state, entered_at=job["entered_at"])

    def lapse(self, tx, job):
        """Take a job back from a worker that was silent for too long.

        The claim stays: until the job is claimed again, a late result is
        taken.
        """
        lapses, claim, report = job["lapses"] + 1, job["claim"], {}
        stage = job["claimed_from"]
        state = self.settled_state(tx, job, stage)
        if lapses >= self.max_lapses:
            state = "failed"
            report["error"] = LAPSES_SPENT % lapses
        if state in PUT_ASIDE:
            claim = None
        self.end_attempt(tx, job, "lapsed", report=report)
        self.move(tx, job, stage=stage, state=state, claim=claim,
                  lapses=lapses)

    # Dependencies

    def propagate(self, tx):
        """Propagate the ends of the parents in `tx.ended` to their children.

        When a parent is done, the edge is met forever. When it has failed or
        was cancelled, its blocked children are aborted, and theirs, too.
        After CHUNK children the rest stays in `tx.ended`, for the next commit.
        """
        left = CHUNK
        while tx.ended and left > 0:
            told = OrderedDict()  # the ends of parents, by child
            while tx.ended and left > 0:
                parent, (end, after) = tx.ended.popitem(last=False)
                key = {"parent": parent, "after": after, "limit": left}
                children = [
                    child for child, in tx.execute(SQL.CHILDREN, key)]
                if end == "met":
                    edges = [dict(key, child=child) for child in children]
                    tx.executemany(SQL.MEET, edges)
                    tx.executemany(SQL.MEET_ONE, edges)
                if len(children) == left:
                    tx.announce(parent, end, children[-1])
                for child in children:
                    told.setdefault(child, set()).add(end)
                left -= 1 + len(children)
            for child, ends in told.items():
                self.settle(tx, child, ends)

    def settle(self, tx, child, ends=()):
        """Block, abort or free a job, as the jobs that it waits for are now.

        `ends` are the new ends of parents. If they make no difference, the
        other parents are not read: there may be thousands.
        """
        job = as_dict(tx.execute(SQL.JOB_BY_ID, {"id": child}).fetchone())
        stays = (
            ends == {"met"} and job["unmet"] if job["state"] == "blocked"
            else ends == {"unmet"} or job["state"] != "aborted")
        if not stays:
            state = self.settled_state(tx, job, job["stage"])
            if state != job["state"]:
                self.move(tx, job, state=state)

    def follow(self, tx, namespace, jobid, parents):
        """Make a new job depend on others; raise Error 400 if one is missing.
        """
        job = self.find(tx, namespace, jobid)
        edges = [{"namespace": namespace, "child": job["id"], "parent": parent}
                 for parent in parents]
        if tx.executemany(SQL.ADD_DEPENDENCY, edges).rowcount < len(edges):
            missing = next(
                parent for edge, parent in zip(edges, parents) if not
                tx.execute(SQL.JOB, dict(edge, jobid=parent)).fetchone())
            raise Error(400, "Job %d waits for job %d, which isn't there."
                        % (jobid, missing))
        tx.execute(SQL.SET_UNMET, job)
        self.settle(tx, job["id"])

    # Adding jobs

    def insert_jobs(self, tx, namespace, groups, parents):
        """Add jobs as group_jobs() returns them; leave existing ones.

        Raises Error 400 when one waits for a job that isn't there.
        """
        final = tx.execute(
            SQL.NAMESPACE, {"id": namespace}).fetchone()["laststage"]
        children = [
            jobid for jobid in parents if not tx.execute(
                SQL.JOB, {"namespace": namespace, "jobid": jobid}).fetchone()]
        self.add_stages(tx, namespace, {stage for stage, _, _ in groups})
        for (stage, last, depends), rows in groups.items():
            state = stage_state(stage, final if last is None else last)
            if depends and state == "waiting":
                state = "blocked"
            free = is_free(state, None)
            new = self.insert_rows(
                tx, (namespace, stage, last, state, int(free), tx.now), rows)
            tx.count(new, 0, namespace, stage, state)
            if free:
                tx.freed[namespace, stage] += new
        for jobid in children:
            self.follow(tx, namespace, jobid, parents[jobid])

    add_jobs = change(insert_jobs)

    def insert_rows(self, tx, shared, rows):
        """Insert jobs, many in each statement; return how many are new."""
        new = 0
        for i in range(0, len(rows), ROWS_AT_ONCE):
            some, values = rows[i : i + ROWS_AT_ONCE], []
            for row in some:
                values += shared
                values += row
            sql = SQL.ADD_JOBS + ", ".join([SQL.NEW_JOB] * len(some))
            new += tx.execute(sql, values).rowcount
        return new

    @change
    def submit(self, tx, namespace, submissions, jobs):
        """Add jobs under ids that the server gives.

        `submissions` is a list of (key, part, number of jobs). Returns a
        range of ids for each. A part that was added before keeps its ids, and
        its jobs are not added again.
        """
        key = {"namespace": namespace}
        last = tx.execute(SQL.LAST_JOBID, key).fetchone()[0]
        latest = max((max(job["after"] or [0]) for job in jobs), default=0)
        if latest > last:
            raise Error(400, "A job can't wait for job %d: there is none."
                        % latest)
        given, new, first = [], [], last + 1
        jobs = iter(jobs)
        for name, part, n in submissions:
            some = list(itertools.islice(jobs, n))
            key.update(key=name, part=part, now=tx.now)
            known = tx.execute(SQL.SUBMISSION, key).fetchone()
            if known:
                ids = range(known["first"], known["first"] + known["jobs"])
            else:
                ids = range(first, first + n)
                tx.execute(SQL.ADD_SUBMISSION, dict(key, first=first, jobs=n))
                first += n
                new += some
            given.append(ids)
        if first - 1 > MAX_JOBID:
            raise Error(409, "There are no jobids left.")
        groups = group_jobs(range(last + 1, first), new)
        self.insert_jobs(tx, namespace, *groups)
        return given

    @query
    def submissions(self, execute, namespace, name=None):
        """Return the latest submissions, or the one of a name.

        Dicts of `key`, `ids` (a list of ranges), `jobs` and `time`, the
        latest first. Raises Error 404 for an unknown name; `last` is the
        latest.
        """
        keys = [to_json(name)]
        if name in (None, "last"):
            limit = SUBMISSIONS_SHOWN if name is None else 1
            keys = [key for key, in execute(SQL.LATEST_KEYS, {
                "namespace": namespace, "limit": limit})]
        found = []
        for key in keys:
            parts = execute(SQL.PARTS, {
                "namespace": namespace, "key": key}).fetchall()
            if parts:
                ids = joined(range(part["first"], part["first"] + part["jobs"])
                             for part in parts if part["jobs"])
                found.append({
                    "key": from_json(key), "ids": ids,
                    "jobs": sum(map(len, ids)), "time": parts[0]["added"]})
        if name is not None and not found:
            raise Error(404, "There is no submission %s." % name)
        return found

    # Claiming jobs

    @change
    def claim(
        self, tx, namespace, stages, *, target=None, n=1, worker, lease,
        cores=None, memory=None
    ):
        """Claim up to `n` free jobs, from the first of `stages` first.

        A job moves to the stage `target`, or one up without it. `worker` is
        a name or None, `lease` is in seconds or None. It has `cores` and
        `memory`, in bytes: a stage that needs more is left out. Returns the
        jobs as they are in the claim, dicts of SQL.WHOLE_JOB and SQL.NEEDS.
        """
        jobs = []
        for stage in dict.fromkeys(stages):
            key = {"namespace": namespace, "stage": stage,
                   "limit": n - len(jobs), "cores": cores, "memory": memory}
            found = tx.execute(SQL.FREE, key).fetchall()
            if found:
                needs = as_dict(tx.execute(SQL.NEEDS, key).fetchone())
                jobs += [dict(as_dict(job), **needs) for job in found]
        self.add_stages(tx, namespace, {
            job["stage"] + 1 if target is None else target for job in jobs})
        tokens = secrets.token_urlsafe(9 * len(jobs))  # 12 characters each
        moves = [
            self.claim_one(
                tx, job, claim=tokens[12 * i : 12 * i + 12],
                target=job["stage"] + 1 if target is None else target,
                worker=worker, lease=lease,
            )
            for i, job in enumerate(jobs)
        ]
        if moves:
            tx.move(moves)
        return moves

    @query
    def fitting(self, execute, namespace, stages, cores, memory):
        """Return those of `stages` whose jobs need no more than this.

        None is any number.
        """
        return [stage for stage in stages if not execute(SQL.TOO_LARGE, {
            "namespace": namespace, "stage": stage, "cores": cores,
            "memory": memory}).fetchone()]

    def claim_one(self, tx, job, *, target, claim, worker, lease):
        """Return the move of one free job to the holder of a new claim."""
        self.interrupt(tx, job, "superseded")  # was claimed without a lease
        fresh = (
            job["state"] == "working" and job["stage"] != job["claimed_from"])
        waited = max(0, tx.now - job["entered_at"])
        tx.add_time(job, job["stage"], "claimed", waited)
        if job["attempt"] and not fresh:
            tx.add_time(job, job["stage"], "again", waited)
        return after_move(
            job, tx.now,
            stage=target,
            state="working",
            expires_at=None if lease is None else tx.now + lease,
            lease=lease,
            claimed_from=job["stage"],
            claimed_to=target,
            claim=claim,
            worker=worker,
            attempt=1 if fresh else job["attempt"] + 1,
            failures=0 if fresh else job["failures"],
            lapses=0 if fresh else job["lapses"],
            note=None if fresh else job["note"],
        )

    # Ending attempts

    @change
    def update_jobs(self, tx, namespace, updates):
        """Put jobs into stages: their attempts, if any, are done.

        An update is a dict of `jobid`, `stage`, and perhaps `claim`, `report`,
        and `jobcmd`, `filename` and `files`, which replace the job's. Returns
        a list with None for each, or the Error by which it was refused and
        changed nothing: 404 where there is no such job, 409 where the claim
        isn't the job's any more.
        """
        errors = []
        for update in updates:
            try:
                errors.append(self.update_one(tx, namespace, **update))
            except Error as error:
                errors.append(error)
        return errors

    def update_one(
        self, tx, namespace, jobid, stage, *, claim=None, report=None, **new
    ):
        """Put one job into a stage; raise Error."""
        job = self.find(tx, namespace, jobid)
        if self.already_ended(tx, job, claim, "done", stage):
            return
        self.add_stages(tx, namespace, {stage})
        given = self.replace(tx, job, new) if new else None
        self.end_attempt(
            tx, job, "done", target=stage, report=report, given=given)
        state = self.settled_state(tx, job, stage)
        self.move(tx, job, stage=stage, state=state, attempt=0, failures=0,
                  lapses=0, note=None)
        if state == "done" != job["state"]:
            tx.count_ends(namespace, jobs=1)

    def replace(self, tx, job, new):
        """Give a job new content; return the old content, in JSON."""
        if "files" in new:
            new["files_stage"] = job["claimed_from"]
        old = as_dict(tx.execute(SQL.CONTENT, job).fetchone())
        tx.execute(SQL.REPLACE, dict(old, id=job["id"], **new))
        return to_json({name: old[name] for name in new})

    def already_ended(self, tx, job, claim, outcome, target=None):
        """Return whether the attempt of `claim` has ended this way before.

        Then the call is a repetition, whose first reply was lost. Raises
        Error 409 when the claim is no longer the job's. None means the
        current claim.
        """
        if claim is None or claim == job["claim"]:
            return False
        key = {"id": job["id"], "claim": claim}
        ended = tx.execute(SQL.ATTEMPT, key).fetchone()
        if ended and (ended["outcome"], ended["target"]) == (outcome, target):
            return True
        raise Error(409, "Job %d is no longer yours." % job["jobid"])

    @change
    def fail_job(
        self, tx, namespace, jobid, *, claim=None, report=None, note=None
    ):
        """Put a job back where it was claimed, delayed or failed.

        Exit status 75 asks to try later: that isn't counted as a failure.
        `note` is for the next attempt.
        Returns the job's state, failures and delay in seconds. Raises the
        errors of update_jobs(); 409 too when nobody has claimed the job.
        """
        job = self.find(tx, namespace, jobid)
        later = (report or {}).get("exit_code") == os.EX_TEMPFAIL
        outcome = "deferred" if later else "failed"
        if not self.already_ended(tx, job, claim, outcome):
            self.require_claim(job)
            self.end_attempt(tx, job, outcome, report=report)
            failures = job["failures"] + (not later)
            self.delay_or_fail(
                tx, job, job["attempt"] if later else failures,
                counted=not later, stage=job["claimed_from"],
                failures=failures, note=next_note(job, note))
        return self.outcome(tx, job, "state", "failures", "delay")

    def outcome(self, tx, job, *names):
        """Return the answer on a job after its attempt ended.

        That is its jobid, and the columns `names`; `delay` is in seconds.
        """
        job = as_dict(tx.execute(SQL.JOB_BY_ID, job).fetchone())
        delayed = job["state"] == "delayed"
        job["delay"] = max(0, job["expires_at"] - tx.now) if delayed else 0
        return {name: job[name] for name in ("jobid", *names)}

    def delay_or_fail(self, tx, job, tries, *, counted=True, **after):
        """Delay a job, longer after more `tries`; fail it after the last.

        Tries that aren't `counted` have no last.
        """
        if counted and tries >= (job["max_attempts"] or self.max_attempts):
            self.move(tx, job, state="failed", **after)
        else:
            self.move(tx, job, state="delayed",
                      expires_at=tx.now + delay_after(tries), **after)

    @change
    def reject_job(
        self, tx, namespace, jobid, *, claim=None, files=None, report=None
    ):
        """Send a job back to the stage that made its damaged files.

        Without `claim` nobody may be working on the job; `files`, as JSON
        text, are the files that the caller checked. Returns the job's state,
        stage, rejections and delay in seconds. Raises the errors of
        fail_job(); 409 too when the job has no files, or others.
        """
        job = self.find(tx, namespace, jobid)
        if not self.already_ended(tx, job, claim, "rejected"):
            content = tx.execute(SQL.CONTENT, job).fetchone()
            self.require_files(job, content, claim, files)
            if claim is not None:
                self.end_attempt(tx, job, "rejected", report=report)
            stage, rejects = content["files_stage"], job["rejects"] + 1
            self.restore(tx, job, stage)
            self.delay_or_fail(tx, job, rejects, rejects=rejects, stage=stage,
                               attempt=0, failures=0, lapses=0, note=None)
        return self.outcome(tx, job, "state", "stage", "rejects", "delay")

    def require_files(self, job, content, claim, files):
        """Raise Error 409 when `job` can't be sent back for its files."""
        if claim is None and job["state"] not in REJECTABLE:
            message = "Job %d is %s; only its worker can reject its files."
            raise Error(409, message % (job["jobid"], job["state"]))
        if content["files"] in (None, "[]") or content["files_stage"] is None:
            message = "Job %d has no files that a stage could make again."
            raise Error(409, message % job["jobid"])
        if files not in (None, content["files"]):
            raise Error(409, "Job %d has other files now." % job["jobid"])

    def restore(self, tx, job, stage):
        """Restore a job's content as it was in `stage`, to return there.

        That is the content which the stage's own update replaced, or the
        first update after it. Files that were made in the stage were not
        given to it.
        """
        before = as_dict(tx.execute(SQL.CONTENT, job).fetchone())
        if before["files_stage"] == stage:
            before.update(files=None, files_stage=None)
        for row in tx.execute(SQL.GIVEN_SINCE, dict(job, stage=stage)):
            given = from_json(row["given"])
            if row["later"]:  # its files were not given to this stage
                given.pop("files", None)
                given.pop("files_stage", None)
            before.update(given)
        tx.execute(SQL.REPLACE, dict(before, id=job["id"]))

    @change
    def release_job(self, tx, namespace, jobid, *, claim=None, note=None):
        """Give a claim back, uncounted, with a note for the next attempt.

        Raises the errors of fail_job().
        """
        job = self.find(tx, namespace, jobid)
        if not self.already_ended(tx, job, claim, "released"):
            self.require_claim(job)
            self.release_one(tx, job, note)
        return self.outcome(tx, job, "state")

    def release_one(self, tx, job, note=None):
        """Take a claim back, uncounted; return 1."""
        self.end_attempt(tx, job, "released")
        stage = job["claimed_from"]
        state = self.settled_state(tx, job, stage)
        self.move(tx, job, stage=stage, state=state,
                  attempt=job["attempt"] - 1, note=next_note(job, note))
        return 1

    def require_claim(self, job):
        """Raise Error 409 when nobody has claimed `job`."""
        if job["claim"] is None:
            raise Error(409, "Nobody has claimed job %d." % job["jobid"])

    # Heartbeats

    @change
    def heartbeat(self, tx, namespace, *, claims, lease, worker):
        """Renew `claims`, a list of (jobid, token), for `lease` seconds.

        A third item is news of the attempt: `progress` and `note`, or None.
        `worker` is its report on itself: the columns of its table, and whether
        it has `ended`. A worker in quarantine stays listed, for a person to
        see. Returns a list of the jobids whose claim is lost, whether the
        worker should drain, and the seconds until its next heartbeat.
        """
        worker = dict(worker, namespace=namespace, now=tx.now)
        if worker["ended"] and worker["quarantine"] is None:
            tx.execute(SQL.FORGET_WORKER, worker)
        else:
            tx.execute(SQL.HEARD, worker)
        drained = tx.execute(SQL.DRAINED, worker).fetchone()
        lost = []
        for jobid, claim, *news in claims:
            if not self.renew(tx, namespace, jobid, claim, lease):
                lost.append(jobid)
            elif news:
                tx.execute(SQL.TELL, dict(
                    *news, namespace=namespace, jobid=jobid))
        return lost, drained is not None, min(
            lease / 3, max(BEAT, self.count_alive(tx) / BEATS))

    def count_alive(self, tx):
        """Return how many workers are alive, as counted every BEAT seconds.
        """
        counted, alive = self.alive
        if not counted <= tx.now < counted + BEAT:
            alive = tx.execute(SQL.ALIVE, (tx.now - ALIVE,)).fetchone()[0]
            self.alive = tx.now, alive
        return alive

    def renew(self, tx, namespace, jobid, claim, lease):
        """Renew a claim, also a lapsed one if the job wasn't claimed again.

        That takes back the lapse. Returns False when the claim is lost.
        """
        values = {"namespace": namespace, "jobid": jobid, "claim": claim,
                  "lease": lease, "expires_at": tx.now + lease}
        if tx.execute(SQL.RENEW, values).rowcount:
            return True
        job = tx.execute(SQL.JOB, values).fetchone()
        if job is None or job["claim"] != claim:
            return False
        job = as_dict(job)
        lapsed = tx.execute(SQL.ATTEMPT, job).fetchone()
        tx.execute(SQL.TAKE_BACK_LAPSE, job)
        self.move(
            tx, job, stage=job["claimed_to"], state="working",
            claim=claim, expires_at=values["expires_at"], lease=lease,
            entered_at=lapsed["started"] if lapsed else tx.now,
            lapses=max(0, job["lapses"] - 1),
        )
        return True

    @change
    def drain(self, tx, namespace, name, *, drain):
        """Tell a worker at its next heartbeat to claim no more, or again.

        Raises Error 404 when there is no worker of that name.
        """
        values = {"namespace": namespace, "name": name, "drain": int(drain)}
        if not tx.execute(SQL.DRAIN, values).rowcount:
            raise Error(404, "There is no worker %s." % name)

    # Stages

    def add_stages(self, tx, namespace, stages):
        """Add stages to their table, unless they are there.

        Raises Error 400, before anything is written, for too many stages.
        """
        if stages <= self.known_stages.get(namespace, set()):
            return
        if namespace not in tx.stages:
            rows = tx.execute(SQL.STAGES, {"namespace": namespace})
            tx.stages[namespace] = {row["stage"] for row in rows}
        known = tx.stages[namespace]
        new = stages - known
        if len(known) + len(new) > MAX_STAGES:
            if namespace not in tx.unused:
                rows = tx.execute(SQL.UNUSED_STAGES, {"namespace": namespace})
                tx.unused[namespace] = {row["stage"] for row in rows}
            unused = (tx.unused[namespace] & known) - stages
            if len(known) + len(new) - len(unused) > MAX_STAGES:
                raise Error(400, "A jobix can't have over %d different stages."
                            % MAX_STAGES)
            tx.executemany(SQL.FORGET_STAGE, [
                (namespace, stage) for stage in unused])
            known -= unused
        tx.executemany(SQL.ADD_STAGE, [(namespace, stage) for stage in new])
        known |= new

    def change_stages(self, tx, namespace, changes):
        """Write the columns in `changes`, a dict by stage of dicts."""
        self.add_stages(tx, namespace, set(changes))
        key = {"namespace": namespace}
        for row in tx.execute(SQL.STAGES, key).fetchall():
            if row["stage"] in changes:
                values = dict(as_dict(row), **changes[row["stage"]])
                tx.execute(SQL.SET_STAGE, dict(key, **values))

    @change
    def pause(self, tx, namespace, stage, *, paused):
        """Hand out no more jobs of a stage, or go on with it."""
        self.change_stages(tx, namespace, {stage: {"paused": int(paused)}})
        key = {"namespace": namespace, "stage": stage}
        tx.freed[namespace, stage] += \
            tx.execute(SQL.COUNT_FREE, key).fetchone()[0]

    def stage_values(self, execute, namespace):
        """Return {stage: {"name", "minutes", "cores", "memory"}}.

        What isn't set is left out, also a stage that has none of these.
        """
        rows = execute(SQL.STAGES, {"namespace": namespace})
        names = "name", "minutes", "cores", "memory"
        found = {
            row["stage"]: {name: row[name] for name in names
                           if row[name] is not None}
            for row in rows}
        return {stage: values for stage, values in found.items() if values}

    stages = query(stage_values)

    def minutes(self, execute, namespace):
        """Return the lifetimes of a namespace: {stage: minutes}."""
        stages = self.stage_values(execute, namespace)
        return {stage: values["minutes"] for stage, values in stages.items()
                if "minutes" in values}

    lifetimes = query(minutes)

    def init(self, namespace, minutes):
        """Set the lifetimes of stages 0 … n, and n as the last stage.

        Only if the namespace has no lifetime yet. Then jobs in their last
        stage are done, also those that a killed server left.
        """
        self.set_up(namespace, minutes)
        self.in_steps(namespace, self.finish_one, self.newly_done(namespace),
                      ("waiting", "delayed", "blocked"))

    @change
    def set_up(self, tx, namespace, minutes):
        """Set lifetimes and the last stage, unless there are lifetimes."""
        if not self.minutes(tx.execute, namespace):
            self.change_stages(tx, namespace, {
                stage: {"minutes": value}
                for stage, value in enumerate(minutes)})
            tx.execute(SQL.SET_LASTSTAGE, {
                "namespace": namespace, "laststage": len(minutes) - 1})

    @query
    def newly_done(self, execute, namespace):
        """Return the ids of jobs that a new last stage makes done."""
        rows = execute(SQL.NEWLY_DONE, {"namespace": namespace})
        return array("q", (jobid for jobid, in rows))

    def finish_one(self, tx, job):
        """End a job that is in its last stage; return 1, or 0 if it isn't."""
        if stage_state(job["stage"], job["final"]) != "done":
            return 0
        self.move(tx, job, state="done", entered_at=job["entered_at"])
        return 1

    @change
    def put_stages(self, tx, namespace, changes):
        """Change names, lifetimes and needs: see set_stages()."""
        stages = self.stage_values(tx.execute, namespace)
        for stage, values in changes.items():
            stages[stage] = dict(stages.get(stage, {}), **values)
        names = [values["name"] for values in stages.values()
                 if values.get("name")]
        if len(set(names)) < len(names):
            raise Error(409, "Two stages can't have the name %s."
                        % max(names, key=names.count))
        self.change_stages(tx, namespace, changes)
        return self.stage_values(tx.execute, namespace)

    def set_stages(self, namespace, changes, gone=never):
        """Change what stages have; mark jobs by their new lifetimes.

        `changes` is what stage_values() returns: None removes a value, a
        missing one stays. Raises Error 400 for too many stages, 409 for a
        name that two would have. Returns stage_values().
        """
        stages = self.put_stages(namespace, changes)
        if any("minutes" in values for values in changes.values()):
            self.mark_expired(namespace, gone)
        return stages

    def mark_expired(self, namespace, gone=never):
        """Mark the jobs of a namespace that are over their lifetime.

        Other jobs lose the mark. It goes in steps, and stops when `gone()`:
        the tick does the rest.
        """
        while self.mark_some(namespace) and not gone():
            pass

    @change
    def mark_some(self, tx, namespace=None):
        """Mark the expired jobs of a namespace, None for all, in one step.

        Returns whether there may be more.
        """
        values = {"namespace": namespace, "now": tx.now, "limit": tx.left}
        jobs = tx.execute(SQL.MISMARKED, values).fetchall()
        tx.executemany(SQL.MARK, [(job["id"],) for job in jobs])
        for job in jobs:
            tx.count(0, 1 - 2 * job["expired"],
                     job["namespace"], job["stage"], job["state"])
        tx.left -= len(jobs)
        return tx.left == 0

    def check_stages(self, namespace, gone=never):
        """Mark the expired jobs; return True if no job is marked."""
        self.mark_expired(namespace, gone)
        return not self.marked_stages(namespace) & set(
            self.lifetimes(namespace))

    @query
    def marked_stages(self, execute, namespace):
        """Return the set of the stages with jobs that are marked."""
        rows = execute(SQL.TALLY, {"namespace": namespace})
        return {row["stage"] for row in rows if row["expired"]}

    def move_expired(self, namespace, old, new, gone=never):
        """Mark the expired jobs, then move those of stage `old`.

        Failed, cancelled and aborted jobs stay: only a retry brings them
        back. Returns whether nothing was marked in `old`, and how many jobs
        moved.
        """
        self.put_stages(namespace, {new: {}})  # or it is refused
        self.mark_expired(namespace, gone)
        ids = self.ids_in(namespace, STATES, old, EVERY_JOB, marks=(1,))
        move = functools.partial(self.expire_one, new)
        return not ids, self.in_steps(
            namespace, move, ids, (*UNENDED, "done"), old, gone)

    def expire_one(self, new, tx, job):
        """Move a job to stage `new`; return 1, or 0 if it isn't marked."""
        if not job["expired"]:
            return 0
        self.interrupt(tx, job, "expired")
        state = self.settled_state(tx, job, new)
        self.move(tx, job, stage=new, state=state, attempt=0, failures=0,
                  lapses=0, note=None)
        return 1

    # Retrying, cancelling, releasing, forgetting

    def sweep(
        self, namespace, action, *, ids=None, stage=None, state=None,
        ranges=EVERY_JOB, gone=never
    ):
        """Do an action of SWEEPS to the selected jobs; return how many.

        retry: put ended jobs back where they were claimed, budgets fresh;
        cancel: end whatever isn't done; release: give claims back unharmed;
        forget: delete done jobs. The selector has `ids` (Error 404 when one
        doesn't exist), or `stage` and `state`, None for any, and `ranges` of
        jobids. See in_steps().
        """
        act = {
            "retry": self.retry_one, "cancel": self.cancel_one,
            "release": self.release_one, "forget": self.forget_one,
        }[action]
        _, states = SWEEPS[action]
        states = [known for known in states if state in (None, known)]
        if ids is None:
            ids = self.ids_in(namespace, states, stage, ranges)
        else:
            self.require_jobs(namespace, ids)
        return self.in_steps(namespace, act, ids, states, stage, gone)

    @query
    def ids_in(self, execute, namespace, states, stage, ranges, **marks):
        """Return the ids of all jobs in `states`, a stage and `ranges`.

        They are of one snapshot, so that no job is missed because it moves
        during a sweep.
        """
        found = self.in_groups(execute, SQL.GROUP_IDS, namespace, states,
                               stage, ranges, **marks)
        return array("q", (jobid for jobid, in found))

    @query
    def require_jobs(self, execute, namespace, ids):
        """Raise Error 404 when one of some jobs doesn't exist."""
        for jobid in ids:
            key = {"namespace": namespace, "jobid": jobid}
            if not execute(SQL.JOB, key).fetchone():
                raise Error(404, "There is no job %d." % jobid)

    def in_steps(self, namespace, act, ids, states, stage=None, gone=never):
        """Do `act` to those of the jobs `ids` that fit; return the sum.

        A step is a commit of its own, of up to CHUNK jobs, and other requests
        come between two steps. Raises Error 503 when it is `gone()` by then.
        """
        done = start = 0
        while start < len(ids):
            if start and gone():
                raise Error(503, "The caller hung up; the rest is not done.")
            more, start = self.step(namespace, act, ids, start, states, stage)
            done += more
        return done

    @change
    def step(self, tx, namespace, act, ids, start, states, stage=None):
        """Do `act` to some of the jobs that fit, from ids[start] on.

        Returns the sum, and where to go on.
        """
        some, done = ids[start : start + tx.left], 0
        tx.left -= len(some)
        for jobid in some:
            key = {"namespace": namespace, "jobid": jobid}
            job = tx.execute(SQL.JOB, key).fetchone()
            if job and job["state"] in states \
                    and stage in (None, job["stage"]):
                done += act(tx, as_dict(job))
        return done, start + len(some)

    def in_groups(
        self, execute, sql, namespace, states, stage, ranges=EVERY_JOB,
        marks=(0, 1), **values
    ):
        """Yield the rows that a statement finds in groups of jobs.

        A group has one stage, state and mark `expired`: each of `states` and
        `marks`, and `stage`, None for any. Jobs are those in `ranges`.
        """
        for group in execute(SQL.TALLY, {"namespace": namespace}):
            if group["state"] in states and stage in (None, group["stage"]):
                for mark, ids in itertools.product(marks, ranges):
                    yield from execute(sql, dict(
                        values, namespace=namespace, stage=group["stage"],
                        state=group["state"], expired=mark, first=ids[0],
                        last=ids[-1]))

    def retry_one(self, tx, job):
        """Retry an ended job; return 1, or 0 if it can't be."""
        done = job["state"] == "done"
        stage = job["claimed_from"] if done else job["stage"]
        if stage is None:  # nobody ever claimed it
            return 0
        state = self.settled_state(tx, job, stage)
        if state == "aborted" == job["state"]:
            return 0  # it comes back with the job that it waits for
        if done:
            self.restore(tx, job, stage)
        self.move(tx, job, stage=stage, state=state, attempt=0, failures=0,
                  lapses=0, rejects=0)
        return 1

    def cancel_one(self, tx, job):
        """Cancel a job, in the stage that it was claimed from; return 1."""
        working = job["state"] == "working"
        self.interrupt(tx, job, "cancelled")
        stage = job["claimed_from"] if working else job["stage"]
        self.move(tx, job, stage=stage, state="cancelled")
        return 1

    def forget_one(self, tx, job):
        """Delete a done job; return 0 if a child doesn't know its end yet."""
        key = {"parent": job["id"], "after": -1, "limit": 1}
        if tx.execute(SQL.CHILDREN, key).fetchone():
            return 0
        for statement in (SQL.FORGET_ATTEMPTS, SQL.FORGET_PARENTS,
                          SQL.FORGET_CHILDREN, SQL.SET_LAST_JOBID, SQL.FORGET):
            tx.execute(statement, job)
        tx.count(-1, -job["expired"],
                 job["namespace"], job["stage"], job["state"])
        return 1

    # Figures and pages

    def count_jobs(self, execute, namespace, ranges):
        """Return rows of stage, state, jobs, expired; `ranges` None: of all.

        Raises Error 404 for a range without a job.
        """
        if ranges is None:
            return execute(SQL.TALLY, {"namespace": namespace}).fetchall()
        rows = []
        for ids in ranges:
            some = execute(SQL.COUNT_JOBS, {
                "namespace": namespace, "first": ids[0], "last": ids[-1]})
            before = len(rows)
            rows += some.fetchall()
            if len(rows) == before:
                raise Error(404, "There is no job %s." % ids_text([ids]))
        return rows

    @query
    def states(self, execute, namespace):
        """Return how many jobs are in each state, a Counter."""
        states = Counter()
        for row in execute(SQL.TALLY, {"namespace": namespace}):
            states[row["state"]] += row["jobs"]
        return states

    @query
    def status(self, execute, namespace, ranges=None):
        """Return the figures of a namespace, or of `ranges` of its jobs.

        See get_status().
        """
        key = {"namespace": namespace}
        stages = defaultdict(lambda: dict(
            new_figures(), lifetime=0, paused=False, name=None, runtime=None))
        totals = new_figures()
        for row in self.count_jobs(execute, namespace, ranges):
            for figures in (stages[row["stage"]], totals):
                figures["jobs"] += row["jobs"]
                figures["expired"] += row["expired"]
                figures["states"][row["state"]] += row["jobs"]
        for row in execute(SQL.STAGES, key):
            needs = {name: row[name] for name in ("cores", "memory")
                     if row[name] is not None}
            if (row["minutes"] is not None or row["paused"] or row["name"]
                    or needs):
                stages[row["stage"]].update(
                    needs, lifetime=row["minutes"] or 0, name=row["name"],
                    paused=bool(row["paused"]))
        for stage, spent in Spent.by_stage(execute(SQL.SPENT, key)).items():
            buckets = spent.buckets["done"]
            if buckets:
                stages[stage]["runtime"] = dict(
                    quantiles(buckets, "attempts", "median", "p90"),
                    buckets=[[float("%.3g" % bucket_end(bucket)), n]
                             for bucket, n in buckets])
        rate = self.rate(execute, namespace) if ranges is None else None
        left = sum(totals["states"][state] for state in UNENDED)
        return {
            "version": __version__,
            "time": self.clock(),
            "stages": [dict(figures, stage=stage)
                       for stage, figures in sorted(stages.items())
                       if figures["jobs"] or ranges is None],
            "totals": totals,
            "rate": rate,
            "seconds_left": left / rate if rate else None,
        }

    def rate(self, execute, namespace):
        """Return how many jobs became done a second in the last two minutes.
        """
        now = self.clock()
        minute = int(now // 60) - 1
        key = {"namespace": namespace, "minute": minute, "step": 1}
        done = sum(row["done"] for row in execute(SQL.PACES, key))
        return done / (now - minute * 60)

    @query
    def stats(self, execute, namespace):
        """Return the time, and {stage: Spent}."""
        rows = execute(SQL.SPENT, {"namespace": namespace})
        return self.clock(), Spent.by_stage(rows)

    @query
    def metrics(self, execute):
        """Return the figures of all namespaces together.

        Rows of ALL_JOBS, one of ALL_WORKERS, and {stage: Spent}.
        """
        key = {"since": self.clock() - AWAY_AFTER}
        return (
            execute(SQL.ALL_JOBS).fetchall(),
            execute(SQL.ALL_WORKERS, key).fetchone(),
            Spent.by_stage(execute(SQL.ALL_SPENT)),
        )

    @query
    def throughput(self, execute, namespace, minutes):
        """Return how many attempts and jobs ended over time.

        Of the last `minutes`, None: of all time. Returns a dict: the `time`,
        `start` and `step` (seconds) of the points, and the counts for each
        point: attempts done (`updates`), jobs `done`, attempts `failed`.
        """
        now = self.clock()
        this = int(now // 60)
        key = {"namespace": namespace}
        if minutes is None:
            first = execute(SQL.FIRST_MINUTE, key).fetchone()[0]
            minutes = 1 if first is None else max(1, this - first + 1)
        step = -(-minutes // PACE_POINTS)
        points = range((this - minutes + 1) // step, this // step + 1)
        start = points[0] * step
        rows = execute(SQL.PACES, dict(key, minute=start, step=step))
        found = {row["point"]: as_dict(row) for row in rows}
        pace = {"time": now, "start": start * 60, "step": step * 60}
        for name in ("updates", "done", "failed"):
            pace[name] = [found.get(point, {}).get(name, 0)
                          for point in points]
        return pace

    @query
    def job(self, execute, namespace, jobid):
        """Return a job, the ids of some that it waits for, and its attempts.

        Jobs and attempts are dicts in the columns of their tables, the job
        with `aborted_by`, the attempts the last ones, oldest first. None
        where there is no such job.
        """
        job = self.shown_job(execute, namespace, jobid)
        if job is None:
            return None
        key = {"id": job["id"], "limit": ATTEMPTS_SHOWN}
        waits_for = [jobid for jobid, in execute(SQL.WAITED_FOR, key)]
        return job, waits_for, self.attempts(execute, **key)

    def shown_job(self, execute, namespace, jobid):
        """Return a job as a dict with `aborted_by`, None without one."""
        key = {"namespace": namespace, "jobid": jobid}
        job = execute(SQL.SHOWN_JOB, key).fetchone()
        if job is None:
            return None
        job, aborted_by = as_dict(job), None
        if job["state"] == "aborted":
            aborted_by = execute(SQL.ABORTED_BY, job).fetchone()
        return dict(job, aborted_by=aborted_by and aborted_by["jobid"])

    def attempts(self, execute, id, limit):
        """Return a list of a job's last attempts, the oldest first."""
        if not limit:
            return []
        rows = execute(SQL.ATTEMPTS, {"id": id, "limit": limit})
        return [dict(row) for row in rows][::-1]

    @query
    def jobs(
        self, execute, namespace, *, order, after, limit, attempts=0, **which
    ):
        """Return a page of jobs and the place to go on from, None at the end.

        `order` is by `id` or `time` in their stage, the longest first, with a
        minus the other way round; a place, None at first, is an id or a tuple
        (time, id). `which` are those of places(). A page has up to `limit`
        pairs of a job and a list of its last `attempts`, fewer when they are
        large.
        """
        places = self.places(
            execute, namespace, order, after, limit + 1, **which)
        jobs, size = [], 0
        for place in places[:limit]:
            job = self.shown_job(execute, namespace, place[-1])
            last = self.attempts(execute, job["id"], attempts)
            jobs.append((job, last))
            size += sum(len(row.get(name) or "") for row in (job, *last)
                        for name in (*JSON_COLUMNS, "error", "stderr"))
            if size > PAGE_TEXT:
                break
        if len(jobs) == len(places):
            return jobs, None
        return jobs, place if len(place) > 1 else place[0]

    def places(
        self, execute, namespace, order, after, limit, *, stage=None,
        state=None, worker=None, match=None, ranges=EVERY_JOB
    ):
        """Return up to `limit` tuples, (id,) or (time, id), after a place.

        The jobs are those of a stage, a state (`expired` for the marked) and
        a worker that holds them, with `match` in their command or filename,
        in `ranges` of jobids; None for any.
        """
        back, by_id = order.startswith("-"), order.endswith("id")
        values = {"limit": limit, "worker": worker, "match": None}
        if match is not None:
            values["match"] = to_json(match)[1:-1].lower()
        if not by_id:
            values["since"], values["after"] = after or (
                (math.inf, MAX_JOBID + 1) if back else (-1, -1))
        elif after is not None:
            ranges = [
                range(ids.start, min(ids.stop, after)) if back
                else range(max(ids.start, after + 1), ids.stop)
                for ids in ranges]
        ranges = list(filter(None, ranges))
        if by_id and (match or not (stage is not None or state or worker)):
            values.update(namespace=namespace, stage=stage, state=state)
            rows = itertools.chain.from_iterable(
                execute(page_sql(SQL.WHOLE, order), dict(
                    values, first=ids[0], last=ids[-1])) for ids in ranges)
        else:
            states, marks = [*STATES], (0, 1)
            if worker is not None:
                states = ["working"]
            if state == "expired":
                marks = (1,)
            elif state is not None:
                states = [known for known in states if known == state]
            rows = self.in_groups(
                execute, page_sql(SQL.GROUP, order), namespace, states, stage,
                ranges, marks=marks, **values)
        return sorted(map(tuple, rows), reverse=back)[:limit]

    @query
    def workers(self, execute, namespace, *, within):
        """Return the time, and the workers heard `within` so many seconds.

        They are dicts in the columns of the table, the latest first, with the
        `stage_names` of their stages and what each `holds` by its claims: a
        list of [jobid, seconds], the longest first.
        """
        now = self.clock()
        values = self.stage_values(execute, namespace)
        held = defaultdict(list)
        for row in self.in_groups(
                execute, SQL.HELD, namespace, ("working",), None):
            held[row["worker"]].append(
                [row["jobid"], max(0, now - row["entered_at"])])
        workers = []
        key = {"namespace": namespace, "since": now - within}
        for row in execute(SQL.WORKERS, key):
            stages = from_json(row["stages"] or "null")
            names = stages and [
                values.get(stage, {}).get("name") for stage in stages]
            holds = sorted(held[row["name"]], key=lambda job: -job[1])
            workers.append(dict(
                row, stages=stages, stage_names=names, holds=holds,
                drain=bool(row["drain"])))
        return now, workers

    @query
    def failures(self, execute, namespace, ranges=None):
        """Return how many jobs are failed, and the latest of them.

        The latter are rows with jobid, stage, exit_code, error, stderr,
        worker and host, at most FAILURES_READ. `ranges` of jobids: only of
        those.
        """
        rows = self.count_jobs(execute, namespace, ranges)
        failed = sum(row["jobs"] for row in rows if row["state"] == "failed")
        rows = self.in_groups(
            execute, SQL.LATEST, namespace, ("failed",), None,
            EVERY_JOB if ranges is None else ranges, limit=FAILURES_READ)
        latest = sorted(rows, key=lambda row: row[:2], reverse=True)
        return failed, latest[:FAILURES_READ]

    @query
    def health(self, execute):
        """Raise Unavailable or sqlite3.Error if the database can't be read."""
        self.lock.check()
        execute(SQL.NAMESPACE, {"id": self.namespace}).fetchone()

    # Periodic work

    def keep_ticking(self):
        """Start a thread that ticks about once a second."""
        self.ticker = threading.Thread(target=self.tick_on, daemon=True)
        self.ticker.start()

    def tick_on(self):
        """Tick until the Store is closed."""
        while not self.ending.wait(self.TICK[self.shared]):
            try:
                self.tick()
            except (Error, sqlite3.Error) as error:
                self.explain(error)  # a full disk: once more at the next tick
            except Exception:
                traceback.print_exc()

    def tick(self):
        """Do the work that time brings: lapses, expiry, pruning.

        A commit marks some of the expired and, as any does, lapses overdue
        leases and goes on with what propagate() left: one at least, and more
        as long as there is more to do. Then wake long polls for jobs that
        other processes freed, and prune.
        """
        more = True
        while more:
            more = self.mark_some() or self.late or self.unfinished
            more = more and not self.ending.is_set()
        if self.shared:
            self.wake_for_others(self.wait_queue.keys())
        if self.keep_days is not None:
            self.prune()

    @query
    def wake_for_others(self, execute, keys):
        """Wake long polls for jobs that another process has set free."""
        for namespace, stage in keys:
            key = {"namespace": namespace, "stage": stage}
            free = execute(SQL.COUNT_FREE, key).fetchone()[0]
            self.wait_queue.wake((namespace, stage), free)

    def prune(self):
        """Delete the spent attempts of jobs that ended long ago, every hour.
        """
        now, after = self.clock(), 0
        if not 0 <= now - self.pruned_at < PRUNE_EVERY:
            before = now - self.keep_days * 86400
            while after is not None and not self.ending.is_set():
                after = self.prune_some(after, before)
            self.pruned_at = now  # not if a full disk has ended it before

    @change
    def prune_some(self, tx, after, before):
        """Delete spent attempts of jobs that ended `before`.

        Of the PRUNED attempts that follow the id `after`; returns the id to
        go on from, None at the end.
        """
        last = after + PRUNED
        tx.execute(
            SQL.PRUNE, {"after": after, "last": last, "before": before})
        newest = tx.execute(SQL.LAST_ATTEMPT_ID).fetchone()[0]
        return last if newest is not None and newest > last else None


# -------------------------------------------------------------- requests ---


WHOLE_NUMBER = re.compile(r"-?[0-9]{1,25}")
DECIMAL = re.compile(r"[0-9]{1,10}\.[0-9]+")
CLAIM_TOKEN = re.compile(r"[\w-]{1,64}", re.A)
STAGE_NAME = re.compile(r"(?!(all|last)\Z)[A-Za-z][A-Za-z0-9_.-]{0,63}")


def number(text):
    """Return the integer or decimal number that `text` is, else `text`."""
    if WHOLE_NUMBER.fullmatch(text):
        return int(text)
    return float(text) if DECIMAL.fullmatch(text) else text


def read_jobix(text):
    """Return the jobix that a text is, None where it is none."""
    jobix = number(text.strip())
    return jobix if type(jobix) is int and 0 <= jobix <= MAX_JOBIX else None


class Request:
    """A call, as both front doors pass it on.

    `path` is percent-decoded, and its leading slashes count as one; `headers`
    have lower-case names. `receive()` returns the body of `length` bytes, or
    raises OSError or Error; None: there is no body. `gone()` tells whether
    the caller has hung up. authorize() sets `jobix`, its `namespace`, whether
    it is `readonly`, and `stage`, a reader of its stages.
    """

    def __init__(
        self, method, path, query, headers, receive, gone, length=0
    ):
        self.method = method
        self.path = "/" + path.lstrip("/") if path.startswith("//") else path
        self.query = query
        self.headers = headers
        self.receive = receive
        self.loaded = not receive
        self.body = b""
        self.length = length
        self.gone = gone
        self.jobix = self.namespace = self.stage = None
        self.readonly = False
        self.has_turn = False  # one of the few large bodies

    def identify(self, store):
        """Read `jobix`, the caller's namespace and secret; or raise Error 403.

        A reading jobix is for the namespace that it may read. A wrong
        one is refused after a pause, which slows down guessing.
        """
        jobix = read_jobix(self.headers.get("jobix", ""))
        if jobix is None:
            raise Error(403, "The header jobix must contain your number.")
        try:
            self.namespace, self.readonly = store.admit(jobix)
        except Error:
            time.sleep(WRONG_JOBIX_PAUSE)
            raise
        self.jobix = jobix

    def load(self):
        """Receive the body, if there is one; raise Error."""
        if not self.loaded:
            try:
                self.body = self.receive()
            except OSError:  # the connection broke
                raise Error(400, "The body ended too early.") from None
            self.loaded = True

    def options(self, **readers):
        """Return the query's values, read by `readers`; None where missing.

        Raises Error 400 for an unknown option, one given twice, or a
        bad value.
        """
        values = dict.fromkeys(readers)
        for option in filter(None, self.query.split("&")):
            name, _, text = map(unquote_plus, option.partition("="))
            if name not in readers:
                raise Error(400, "There is no option %.80r here, only %s." % (
                    name, ", ".join(readers)))
            if values[name] is not None:
                raise Error(400, "The option %s is given twice." % name)
            values[name] = readers[name](text, name)
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
        """Answer with a JSON value that is already text."""
        return cls(status, text.encode("ascii"), "application/json", headers)

    @classmethod
    def text(cls, text):
        """Answer with a line of plain text."""
        return cls(200, text.encode(), "text/plain; charset=utf-8")


def from_query(reader):
    """Return `reader`, of JSON numbers, as one of numbers in a text."""
    return lambda text, name: reader(number(text), name)


def reader(is_valid, needed, convert=None):
    """Return a function that reads a value, named for its error.

    It raises Error 400, which names the `needed` form, unless the value
    `is_valid`. `convert`, if given, converts the value.
    """

    def read(value, name):
        if not is_valid(value):
            raise Error(400, "%s must be %s." % (name, needed))
        return convert(value) if convert else value

    return read


def clean(text):
    """Return `text` with what SQLite can't hold written as escapes."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def is_text(value):
    """Return whether a value is a string."""
    return type(value) is str


def is_name(value):
    """Return whether a value is a short string."""
    return is_text(value) and 0 < len(value) <= MAX_NAME


def is_seconds(value):
    """Return whether a value is a number of seconds."""
    return type(value) in (int, float) and 0 <= value <= MAX_SECONDS


def integer(low, high):
    """Return a reader of integers from `low` to `high`."""
    return reader(
        lambda value: type(value) is int and low <= value <= high,
        "an integer from %d to %d" % (low, high))


def one_of(*words):
    """Return a reader of one of some words."""
    return reader(
        lambda value: value in words, "one of %s" % ", ".join(words))


seconds = reader(
    is_seconds, "a number of seconds from 0 to %d" % MAX_SECONDS)
period = reader(
    lambda value: is_seconds(value) and value > 0,
    "a number of seconds above 0, up to %d" % MAX_SECONDS)
truth = reader(lambda value: type(value) is bool, "true or false")
token = reader(
    lambda value: is_text(value) and CLAIM_TOKEN.fullmatch(value),
    "a token of a claim")
NAME = "a text of 1 to %d characters" % MAX_NAME
word = reader(is_name, NAME)
label = reader(is_name, NAME, clean)  # as SQLite can hold it
remark = reader(
    is_text, "a string", lambda text: clean(text[:MAX_REPORT]) or None)
# kept as JSON text
string = reader(is_text, "a string", to_json)
strings = reader(
    lambda value: type(value) is list and all(map(is_text, value)),
    "a list of strings", to_json)


def anything(value, name):
    """Read any JSON value; return it as JSON text.

    Its depth is bounded: what this Python reads every other must read too.
    """
    text = to_json(value)
    if len(text) > MAX_DEPTH \
            and text.count("[") + text.count("{") > MAX_DEPTH:
        depth = 0
        for bracket in re.findall(r'"(?:[^"\\]|\\.)*"|[][{}]', text):
            depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(bracket, 0)
            if depth > MAX_DEPTH:
                raise Error(400, "%s is nested too deeply." % name)
    return text


SIZE = integer(0, 2**63 - 1)
CORES = integer(1, 10000)
STAGE = integer(0, MAX_STAGE)
JOBID = integer(0, MAX_JOBID)
MINUTES = integer(0, MAX_MINUTES)
COUNT = integer(0, 2**53)


def memory_size(value, name):
    """Read bytes, or a text such as 4G or 500M; return the bytes."""
    found = is_text(value) and re.fullmatch(
        r"([0-9]{1,18}(?:\.[0-9]{1,9})?)([KMGT]?)", value.upper())
    if found:
        value = int(float(found[1]) * 1024 ** " KMGT".index(found[2] or " "))
    if type(value) is not int or not 0 <= value < 2**63:
        raise Error(400, "%s must be a number of bytes, or a size such as 4G"
                    " or 500M." % name)
    return value


def is_stage_name(value):
    """Return whether a value can be the name of a stage."""
    return is_text(value) and STAGE_NAME.fullmatch(value)


stage_name = reader(
    is_stage_name,
    "a letter and up to 63 of A-Z a-z 0-9 _ . -, and neither all nor last")


def stage_reader(store, request):
    """Return a reader of stages, by their numbers or their names.

    It raises Error 404 for a name that no stage has. The names are looked up
    for the first one.
    """
    numbers = {}  # by name

    def read(value, name):
        if not is_stage_name(value):
            return STAGE(value, name)
        if not numbers:
            stages = store.stages(request.namespace)
            numbers.update((values.get("name"), stage)
                           for stage, values in stages.items())
        if value not in numbers:
            raise Error(404, "No stage has the name %s." % value)
        return numbers[value]

    return read


def read_files(value, name):
    """Read a list of files, with size and SHA-256; return it as JSON text."""
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


def bounded(items):
    """Return `items`, of a request; raise Error 413 for too many."""
    if len(items) > MAX_JOBS:
        raise Error(413, "A request can have up to %d jobs." % MAX_JOBS)
    return items


def read_ranges(text, name):
    """Read ids such as 1,3,5-8; return ranges, in order and apart."""
    ranges = []
    for part in text.split(","):
        ends = re.fullmatch("([0-9]{1,20})(?:-([0-9]{1,20}))?", part.strip())
        first, last = 1, 0
        if ends:
            first, last = int(ends[1]), int(ends[2] or ends[1])
        if not first <= last <= MAX_JOBID:
            raise Error(400, "%.80r names no jobs; write ids such as 1,3,5-8,"
                        " up to %d." % (part, MAX_JOBID))
        ranges.append(range(first, last + 1))
    return joined(ranges)


def progress(value, name):
    """Read how far an attempt is: [a part of 1, a word]; return JSON text."""
    known = type(value) is list and len(value) == 2
    if not (known and type(value[0]) in (int, float)
            and 0 <= value[0] <= 1 and is_text(value[1])):
        raise Error(400, "%s must be a list of a number from 0 to 1 and a"
                    " string." % name)
    return to_json({"part": value[0], "word": value[1][:MAX_WORD]})


def note_text(value, name):
    """Read an attempt's note for the next one; return JSON text."""
    if not is_text(value) or len(value) > MAX_NOTE:
        raise Error(400, "%s must be a string of up to %d characters."
                    % (name, MAX_NOTE))
    return value and to_json(value)


def jobid_list(value, name):
    """Read a list of jobids; return it with each one once."""
    if type(value) is not list:
        raise Error(400, "%s must be a list of jobids." % name)
    return list(dict.fromkeys(JOBID(jobid, name) for jobid in bounded(value)))


# Fields of a job in /set, each with its reader.
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
    "after": jobid_list,
}
BLANK = dict(dict.fromkeys(CARRIES), priority=0)

# Fields of an attempt in a heartbeat, each with its reader.
NEWS = {"progress": progress, "note": note_text}

# Fields of a heartbeat, each with its reader.
ABOUT_WORKER = {
    "host": label,
    "stages": reader(lambda value: type(value) is list, "a list of stages"),
    "slots": COUNT,
    "memory": SIZE,
    "busy": COUNT,
    "done": COUNT,
    "failed": COUNT,
    "quarantine": remark,
    "ended": truth,
}


def read_job(entry, readers):
    """Return a job of /set as a dict with all of CARRIES; or Error 400."""
    if type(entry) is not dict:
        raise Error(400, "A job must be an object with its jobstage.")
    job = BLANK.copy()
    for name, value in entry.items():
        if name not in CARRIES:
            raise Error(400, "A job can't carry %.80r, only %s." % (
                name, ", ".join(CARRIES)))
        if value is not None:
            job[name] = readers[name](value, name)
    if job["jobstage"] is None:
        raise Error(400, "A job's jobstage is missing.")
    return job


def read_jobs(entries, stage=STAGE):
    """Return jobs of a request, dicts with all of CARRIES; raise Error.

    `stage` reads their stages.
    """
    readers = dict(CARRIES, jobstage=stage, laststage=stage)
    jobs = [read_job(entry, readers) for entry in entries]
    if sum(len(job["after"]) for job in jobs if job["after"]) > MAX_JOBS:
        raise Error(413, "The jobs of a request can wait for %d jobs in all."
                    % MAX_JOBS)
    return jobs


def read_entries(request):
    """Return the JSON object in a request's body; raise Error 400."""
    given = request.json()
    if type(given) is not dict:
        raise Error(400, "The body must be a JSON object.")
    return given


def read_object(request, *required):
    """Return the JSON object in a request's body.

    An empty body is {}, unless keys are `required`. Raises Error 400.
    """
    given = read_entries(request) if request.body or required else {}
    for name in required:
        if name not in given:
            raise Error(400, "%s is missing." % name)
    return given


def read_optional(given, name, reader):
    """Return `given[name]`, read; None when it is missing or null."""
    value = given.get(name)
    return None if value is None else reader(value, name)


def read_fields(given, readers):
    """Return some fields of a JSON object, read; null counts as missing."""
    return {
        name: read(given[name], name)
        for name, read in readers.items() if given.get(name) is not None
    }


def read_news(value):
    """Return the news of an attempt in a heartbeat's claim."""
    if type(value) is not dict or set(value) - set(NEWS):
        raise Error(400, "A claim can have only %s." % ", ".join(NEWS))
    return {name: read_optional(value, name, reader)
            for name, reader in NEWS.items()}


def if_valid(is_valid, convert):
    """Return a reader that takes None for what isn't valid.

    An attempt has ended, whatever its report is like.
    """
    return lambda value, name: convert(value) if is_valid(value) else None


TAIL = if_valid(is_text, lambda text: clean(text[-MAX_REPORT:]))
# Fields of the report on an ended attempt, each with its reader.
REPORTS = {
    "exit_code": if_valid(
        lambda value: type(value) is int,
        lambda value: max(-(2**31), min(value, 2**31))),
    "error": TAIL,
    "stderr": TAIL,
    "seconds": if_valid(is_seconds, float),
}
# Fields of an update, each with its reader.
RESULTS = {"filename": string, "jobcmd": anything, "files": read_files}


def read_result(given):
    """Return the fields of an update except its stage."""
    result = read_fields(given, RESULTS)
    result["report"] = read_fields(given, REPORTS)
    return result


# --------------------------------------------------------- jobs in words ---


SILENT = 120  # seconds without a heartbeat until a worker counts as silent


def span(period):
    """Return a number of seconds as a clock shows it: 4:05, 1:00:00."""
    minutes, rest = divmod(int(period + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return "%d:%02d:%02d" % (hours, minutes, rest)
    return "%d:%02d" % (minutes, rest)


def clock_time(moment):
    """Return a moment as local date, time and zone."""
    return time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(moment))


def shorten(text, width):
    """Return `text`, cut to a width, with dots where it was cut."""
    return text if len(text) <= width else text[: max(0, width - 3)] + "..."


def number_of(n, thing):
    """Return a number and its noun: 1 job, 2 jobs."""
    return "%d %s%s" % (n, thing, "" if n == 1 else "s")


def moment(then, now):
    """Return a moment near now as a time of day, another with its date."""
    if abs(then - now) < 43200:
        return time.strftime("%H:%M:%S", time.localtime(then))
    return clock_time(then)


def last_line(text):
    """Return the last line of `text` that isn't empty, None without one."""
    return ((text or "").strip().splitlines() or [None])[-1]


def fault(worker, now):
    """Return why a worker takes no jobs, a word, or None if it does."""
    if worker["quarantine"]:
        return "quarantined"
    if worker["drain"]:
        return "drained"
    return "silent" if now - worker["heard"] > SILENT else None


def note(worker, now):
    """Return the fault of a worker, None if it has none."""
    words = fault(worker, now), worker["quarantine"]
    return ": ".join(filter(None, words)) or None


def slots_and_jobs(workers):
    """Return how many slots some workers have, and how many jobs they hold."""
    return (sum(worker["slots"] or 0 for worker in workers),
            sum(len(worker["holds"]) for worker in workers))


def room_text(cores, memory):
    """Return cores and bytes of memory as a person says it, None: nothing."""
    words = [number_of(cores, "core")] if cores else []
    if memory:
        power = min(4, (memory.bit_length() - 1) // 10)
        units = "bytes", "KiB", "MiB", "GiB", "TiB"
        words.append("%.4g %s" % (memory / 1024**power, units[power]))
    return " and ".join(words)


def is_too_small(worker, stage):
    """Return whether a worker has no room for a job of a stage of /status.

    A program that claims jobs by itself says no memory: it may have room.
    """
    return worker["memory"] is not None and (
        stage.get("cores", 1) > (worker["slots"] or 0)
        or stage.get("memory", 0) > worker["memory"])


def label_of(job):
    """Return the name of a job's stage, its number if it has none."""
    return job["stage_name"] or job["stage"]


def steps_of(jobcmd):
    """Return {stage: command} of a jobcmd that has one for each stage."""
    steps = jobcmd.get("steps") if type(jobcmd) is dict else None
    if type(steps) is not dict:
        return {}
    return {int(stage): command for stage, command in steps.items()
            if stage.isdecimal()}


def item_of(job):
    """Return the item of a job, None without one."""
    jobcmd = job["jobcmd"]
    item = jobcmd.get("item") if type(jobcmd) is dict else None
    return item if type(item) is str else None


def command_text(job):
    """Return a job's command as a person wrote it, the item filled in.

    Of one for each stage that of the stage, or of the last one before.
    """
    command, item = job["jobcmd"], None
    steps = steps_of(command)
    before = [stage for stage in steps if stage <= job["stage"]]
    if before:
        command, item = steps[max(before)], item_of(job)
    if type(command) is str and item is not None:
        item = shlex.quote(item)
        return command.replace('"${JOBMAN_ITEM}"', item).replace(
            "${JOBMAN_ITEM}", item)
    if command is None or type(command) is str:
        return command
    if type(command) is list and {type(word) for word in command} == {str}:
        return " ".join(map(shlex.quote, command))
    return to_json(command)


def last_attempt(job):
    """Return the last attempt at a job, {} if there is none."""
    return job["attempts"][-1] if job["attempts"] else {}


def last_words(attempt):
    """Return the last line that an attempt wrote to stderr, else its error.
    """
    return last_line(attempt.get("stderr")) or last_line(attempt.get("error"))


def reason(job):
    """Return why a job's last attempt ended: `exit 1: no such file`."""
    attempt = last_attempt(job)
    if not attempt:
        return "no attempt of it is known"
    code, error = attempt["exit_code"], last_line(attempt["error"])
    if code is not None and error in (None, "exit status %d" % code):
        error = "exit %d" % code
    words = [error or attempt["outcome"], last_line(attempt["stderr"])]
    return ": ".join(shorten(word, 200) for word in words[
        : 1 if words[0] == words[1] else 2] if word)


def why_waiting(job, figures, heard):
    """Return why a job that could be claimed isn't.

    `figures` and `heard` are what /status and /workers say.
    """
    now, label = heard["time"], label_of(job)
    stage = next((each for each in figures["stages"]
                  if each["stage"] == job["stage"]), {"paused": False})
    if stage["paused"]:
        return "stage %s is paused" % label
    serving = [worker for worker in heard["workers"]
               if job["stage"] in (worker["stages"] or ())]
    if not serving:
        return "no worker serves stage %s" % label
    able = [worker for worker in serving if fault(worker, now) is None]
    if not able:
        return "no worker of stage %s takes jobs: %s%s" % (
            label, ", ".join("%s is %s" % (worker["name"], note(worker, now))
                             for worker in serving[:3]),
            ", ..." * (len(serving) > 3))
    large = [worker for worker in able if not is_too_small(worker, stage)]
    if not large:
        most = max((worker["slots"] or 0, worker["memory"])
                   for worker in able)
        return "stage %s needs %s for each job; its largest worker has %s" % (
            label, room_text(stage.get("cores"), stage.get("memory")),
            room_text(*most))
    slots, jobs = slots_and_jobs(large)
    return "%s with %s serve%s stage %s, and work%s on %s%s" % (
        number_of(len(large), "worker"), number_of(slots, "slot"),
        "s" * (len(large) == 1), label, "s" * (len(large) == 1),
        number_of(jobs, "job"), ": its turn should come soon" * (
            jobs * stage.get("cores", 1) < slots))


def why_delayed(job, now):
    """Return until when a job is delayed, and why."""
    after = "failure %d" % job["failures"]
    last = last_attempt(job).get("outcome")
    if last == "deferred":
        after = "it was deferred"
    elif last == "rejected" or not job["failures"]:
        after = "its files were rejected"
    elif job["max_attempts"]:
        after += " of %d" % job["max_attempts"]
    return "delayed until %s after %s: %s" % (
        moment(job["due"], now), after, reason(job))


def why_blocked(job):
    """Return which jobs a job waits for."""
    named = [str(jobid) for jobid in job["waits_for"][:2]]
    more = job["waits"] - len(named)
    if more > 0:
        named.append(number_of(more, "other"))
    rest, last = named[:-1], named[-1:]
    return "waits for " + " and ".join(filter(None, [", ".join(rest), *last]))


def why_working(job, now):
    """Return the worker of a job, its start, progress and lease."""
    end = "has no lease"
    if job["due"] is not None:
        end = "has a lease until " + moment(job["due"], now)
    far = ""
    if job["progress"]:
        far = ", has done %d%% of it" % (100 * job["progress"]["part"])
        if job["progress"]["word"]:
            far += " (%s)" % job["progress"]["word"]
    return "%s has worked on it since %s%s and %s" % (
        job["worker"] or "somebody", moment(job["since"], now), far, end)


def why(job, now, around):
    """Return in one sentence why a job isn't running, or which worker has it.

    `job` is as /job shows it; `around()` returns what /status and /workers
    say.
    """
    state = job["state"]
    if state == "waiting":
        line = why_waiting(job, *around())
    elif state == "delayed":
        line = why_delayed(job, now)
    elif state == "blocked":
        line = why_blocked(job)
    elif state == "working":
        line = why_working(job, now)
    elif state == "aborted":
        line = "aborted, because job %s, which it waits for, failed, was " \
            "cancelled or aborted" % job["aborted_by"]
    elif state == "failed":
        line = "failed: " + reason(job)
    else:
        line = "%s since %s" % (state, clock_time(job["since"]))
    return printable(line)


# -------------------------------------------------------- output of jobs ---

# Workers keep what commands print in a file, with an index beside it.


def open_own(path):
    """Open a regular file of ours for reading; raise OSError for any other."""
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW
    file = open(os.open(path, flags), "rb")
    status = os.fstat(file.fileno())
    ours = is_ours(status.st_uid, os.path.dirname(path))
    if ours and stat.S_ISREG(status.st_mode):
        return file
    file.close()
    raise PermissionError(errno.EPERM, "not a regular file of yours", path)


# A line of a log's index: job, stage, attempt, began, stream, offset, length.
INDEX_LINE = re.compile(
    rb"^(\d+) (\d+) (\d+) (\d+) ([12]) (\d{1,18}) (\d{1,18})$", re.M)


def index_lines(path, start=0):
    """Return the lines of an index from a place on, and the place after them.

    Each is a tuple of the numbers in INDEX_LINE. A file of another user has
    none.
    """
    with contextlib.suppress(OSError), open_own(path) as file:
        file.seek(start)
        text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        lines = [tuple(map(int, match.groups()))
                 for match in INDEX_LINE.finditer(whole)]
        return lines, start + len(whole)
    return [], start


def logs_of(folder, jobix, worker):
    """Return the paths of the indexes of a worker's logs.

    Their names are made by file_name() of worker.py.
    """
    space = hashlib.sha256(b"jobman %d" % jobix).hexdigest()[:12]
    plain = re.sub(r"[^\w.-]", "_", worker, flags=re.A)[:100]
    pattern = "%s.%s.*.index" % (glob.escape(plain), space)
    return glob.glob(os.path.join(glob.escape(folder), pattern))


def read_output(folder, jobix, worker, attempt, size):
    """Return the last `size` bytes of an attempt's output, or None.

    `attempt` are its first columns in an index: job, stage and number. A dict
    of `stdout`, `stderr`, and whether they are `truncated`.
    """
    found = []
    for path in logs_of(folder, jobix, worker):
        lines = [line for line in index_lines(path)[0] if line[:3] == attempt]
        if lines:
            found.append((lines[-1][3], lines, path[: -len("index")] + "out"))
    if not found:
        return None
    began, lines, path = max(found)
    printed, truncated = {1: b"", 2: b""}, False
    with open_own(path) as file:
        for *_, start, stream, offset, length in lines:
            if start == began:
                file.seek(offset)
                text = printed[stream] + file.read(min(length, MAX_LOG))
                printed[stream] = text[-size:]
                truncated = truncated or len(text) > size
    return {"stdout": printed[1].decode("utf-8", "replace"),
            "stderr": printed[2].decode("utf-8", "replace"),
            "truncated": truncated}


# ------------------------------------------------------------- endpoints ---


def get_lifetimes(store, request):
    """Show the lifetimes in force, in minutes.

    Answer: {"<stage>": <minutes>, …}, or {} if there are none.
    """
    return Response.json(store.lifetimes(request.namespace))


def get_init(store, request, *minutes):
    """Set the lifetimes of stages 0 … n, in minutes, where none are set yet.

    Stage n becomes the last stage of all jobs that have no laststage of their
    own: jobs that wait there or beyond are done. If there is a lifetime
    already, nothing changes. Answer: the lifetimes in force, as GET /init.
    """
    store.init(request.namespace, minutes)
    return get_lifetimes(store, request)


def get_lifetime(store, request, stage):
    """Show the lifetime of a stage in minutes, 0 when it has none.

    Answer: <minutes>, a number.
    """
    return Response.json(store.lifetimes(request.namespace).get(stage, 0))


def get_set_lifetime(store, request, stage, minutes):
    """Set the lifetime of a stage; 0 is no limit.

    Expired jobs that are within the new lifetime lose their mark.
    Answer: <minutes>, a number.
    """
    store.set_stages(
        request.namespace, {stage: {"minutes": minutes}}, request.gone)
    return Response.json(minutes)


def get_stages(store, request):
    """Show the names of stages, their lifetimes and what their jobs need.

    Answer: {"0": {"name": "align", "minutes": 60, "cores": 4, "memory":
    4294967296}, …}, each with what it has been given.
    """
    return Response.json(store.stages(request.namespace))


# Fields of a stage, each with its reader.
STAGE_VALUES = {"name": stage_name, "minutes": MINUTES, "cores": CORES,
                "memory": memory_size}


def read_stage_values(given):
    """Return a stage's values in /stages, null as None; raise Error 400."""
    if type(given) is not dict:
        raise Error(400, "A stage must be an object with name, minutes, cores"
                    " or memory.")
    for name in given:
        if name not in STAGE_VALUES:
            raise Error(400, "A stage can't have %.80r." % name)
    return {name: read_optional(given, name, STAGE_VALUES[name])
            for name in given}


def post_stages(store, request):
    """Give stages names and lifetimes, and say what their jobs need.

    Body: {"0": {"name": "align", "minutes": 60, "cores": 4, "memory": "4G"},
    …}. A stage or key that is missing stays unchanged; null removes a value.
    cores, 1 to 10000, and memory, in bytes or as 500M or 4G (powers of 1024),
    are what each job needs; without them that is 1 core.
    Answer: as GET /stages. 400: a stage is given twice. 409: two stages would
    have the same name.
    """
    given = read_entries(request)
    stages = [request.stage(number(stage), "stage") for stage in given]
    if len(set(stages)) != len(stages):
        raise Error(400, "A stage is given twice.")
    changes = dict(zip(stages, map(read_stage_values, given.values())))
    return Response.json(store.set_stages(request.namespace, changes))


def require_order(ids, jobs):
    """Raise Error 400 where jobs wait for each other in a circle."""
    parents = {i: job["after"] for i, job in zip(ids, jobs) if job["after"]}
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


def post_set(store, request):
    """Add jobs, all or none.

    Body: {"<jobid>": {"jobstage": 0, "jobcmd": "gzip a.txt"}, …}; help job
    lists what a job may carry. A job that exists already is left unchanged,
    so the call can be repeated.
    Answer, text: Accepted to <jobix>!
    400: an unknown key, a jobid that is given twice, or a job that waits for
    itself or for a job that does not exist.
    """
    given = read_entries(request)
    jobs = read_jobs(bounded(given).values(), request.stage)
    ids = [JOBID(number(jobid), "jobid") for jobid in given]
    if len(set(ids)) != len(ids):
        raise Error(400, "A jobid is given twice.")
    require_order(ids, jobs)
    store.add_jobs(request.namespace, *group_jobs(ids, jobs))
    return Response.text("Accepted to %d!" % request.jobix)


def new_key():
    """Return a name for a submission that was given none."""
    return "s" + secrets.token_hex(6)


def post_submit(store, request):
    """Add jobs under ids that the server gives.

    Body: {"key": "run3", "jobs": [{"jobstage": 0, "jobcmd": "gzip a.txt"},
    …]}. The key is the name of the submission; without a key the server
    makes one, and returns it, too. To add more jobs under the same key, give
    part, the number of jobs that it has already.
    Answer: {"ids": [1, …]}, in the order of jobs, above all ids that this
    jobix ever had. The same key and part give the same ids and add nothing.
    400: as /set; a job can only wait for jobs that exist already. 409: there
    are no ids left.
    """
    given = read_object(request, "jobs")
    if type(given["jobs"]) is not list:
        raise Error(400, "jobs must be a list.")
    jobs = read_jobs(bounded(given["jobs"]), request.stage)
    key = read_optional(given, "key", word)
    named = {"key": key or new_key()}
    part = read_optional(given, "part", JOBID) or 0
    ids, = store.submit(
        request.namespace, [(to_json(named["key"]), part, len(jobs))], jobs)
    return Response.json(dict({} if key else named, ids=list(ids)))


def get_submissions(store, request):
    """Show the latest 100 submissions, the latest first.

    Option: submission, to show only the submission of this name; last is the
    latest.
    Answer: [{"key": "run3", "ids": "1-1000", "jobs": 1000, "time": …}, …];
    time is when its first jobs were added. 404: no submission has that name.
    """
    name = request.options(submission=word)["submission"]
    return Response.json([
        dict(found, ids=ids_text(found["ids"]))
        for found in store.submissions(request.namespace, name)])


def read_selected(store, request, **readers):
    """Return a request's options, with `ranges` where it names some jobs.

    That is by `ids`, or by the name of a `submission`.
    """
    given = request.options(ids=read_ranges, submission=word, **readers)
    name, ranges = given.pop("submission"), given.pop("ids")
    if name is not None:
        ranges = store.submissions(request.namespace, name)[0]["ids"]
    if ranges is not None:
        given["ranges"] = ranges
    return given


def claim_in_time(store, request, stages, claim, wait, cores, memory):
    """Return the result of `claim()`; wait up to `wait` seconds for a job.

    It joins the queue of the stages whose jobs need no more than `cores` and
    `memory`, and looks once more then, so that no job is missed.
    """
    end = time.monotonic() + wait
    jobs = claim()
    if jobs:
        return jobs
    keys = {(request.namespace, stage) for stage in store.fitting(
        request.namespace, stages, cores, memory)}
    while True:
        with store.wait_queue.join(keys) as waiter:
            jobs = claim()
            if jobs or waiter is None:
                return jobs
            woken = waiter.wait(end - time.monotonic())
            if not woken or request.gone():
                return []
            if store.wait_queue.closed:  # thousands would claim once more
                return []
            jobs = claim()
            if jobs:
                waiter.used = len(keys) == 1
                return jobs
            waiter.used = True  # somebody else has claimed the job


def claim_in_steps(claim, n, step):
    """Return up to `n` jobs that `claim(n=…)` gives, `step` in each commit.

    When a later one is refused, as at the server's end, the jobs claimed
    before it are the answer.
    """
    jobs = some = claim(n=min(n, step))
    with contextlib.suppress(Error):
        while len(some) == step and len(jobs) < n:
            some = claim(n=min(n - len(jobs), step))
            jobs = jobs + some
    return jobs


def splice(values, texts):
    """Return, in JSON, an object of `values` and of `texts`, JSON already."""
    kept = "".join(', "%s": %s' % pair for pair in texts.items())
    return to_json(values)[:-1] + kept + "}"


# Optional keys of a claim's reply: a name, its column.
ALSO_CLAIMED = {
    "laststage": "laststage", "max_attempts": "max_attempts",
    "timeout": "timeout", "made": "files_stage", "cwd": "cwd",
    "outputs": "outputs", "files": "files", "note": "note",
    "cores": "cores", "memory": "memory",
}


def claim_json(jobix, job):
    """Return a claimed job as the contract shows it, in JSON.

    All its columns are numbers or JSON text, but the token.
    """
    fields = [
        '"jobid": %d, "jobstage": %d, "jobix": %d, "claim": "%s",'
        ' "attempt": %d, "jobcmd": %s, "filename": %s' % (
            job["jobid"], job["claimed_from"], jobix, job["claim"],
            job["attempt"], job["jobcmd"] or "null", job["filename"] or "null",
        )]
    if job["priority"]:
        fields.append('"priority": %d' % job["priority"])
    for name, column in ALSO_CLAIMED.items():
        if job[column] is not None and (name, job[column]) != ("files", "[]"):
            fields.append('"%s": %s' % (name, job[column]))
    return "{%s}" % ", ".join(fields)


CLAIM_OPTIONS = {
    "worker": label,
    "wait": from_query(seconds),
    "lease": from_query(period),
    "n": from_query(integer(1, 10**25)),
    "cores": from_query(COUNT),
    "memory": from_query(SIZE),
}


def get_job_claim(store, request, stages, nextstage=None):
    """Claim a job, or several; wait for one if asked to.

    The job moves to <nextstage>, or else one stage up, and is working there.
    Of several stages, as in /get/2,0, the first that has a job is used. Jobs
    with a higher priority go first, then jobs with a lower jobid. Options:

      worker  the name of the caller
      lease   seconds until the claim lapses, unless it is renewed
      wait    seconds to wait for a job, at most 60; less if too many wait
      n       how many jobs to claim, at most 10000; the answer is a list
      cores, memory
              what the worker has in all, memory in bytes: a stage that needs
              more for each job gives none

    Without a lease the job is not reserved: the next claim of the stage that
    it moved to gets it.
    Answer: {"jobid": 1, "jobcmd": "gzip a.txt", "jobstage": 0, "jobix": 7,
    "claim": "gKyHzpdDUDr1", "attempt": 1, "filename": null}, or "nada" if
    there is no job. jobstage is the stage before the claim, and claim is the
    token. The other keys in help job are there if the job has them, cores and
    memory if its stage has them.
    """
    given = request.options(**CLAIM_OPTIONS)
    stages = [request.stage(number(stage), "stage") for stage in stages]
    if nextstage is None:
        STAGE(max(stages) + 1, "the stage that a claim leads to")
    n, wait = given.pop("n"), given.pop("wait") or 0
    # without a lease a job is free at once, and the next step would take it
    step = MAX_CLAIMS if given["lease"] is None else CLAIMS_AT_ONCE
    claim = functools.partial(
        claim_in_steps, functools.partial(
            store.claim, request.namespace, stages, target=nextstage,
            **given),
        min(n or 1, MAX_CLAIMS), step)
    jobs = claim() if not wait else claim_in_time(
        store, request, stages, claim, min(wait, MAX_WAIT), given["cores"],
        given["memory"])
    replies = [claim_json(request.jobix, job) for job in jobs]
    if n is not None:
        return Response.json_text("[%s]" % ", ".join(replies))
    return Response.json_text(replies[0] if replies else '"nada"')


def get_update_job(store, request, jobid, stage):
    """Put a job into a stage, where it waits or is done; its attempt is done.

    Option: claim, the token. Without it a job in any state is moved.
    Body of a POST, all optional:

      filename, jobcmd, files     replace those of the job; files lists files
                                  that were made, as help job has them
      exit_code, error, stderr    kept with the attempt; only the last 4096
                                  characters of a text
      seconds                     how long the command ran (default: the time
                                  since the claim)

    Other keys are ignored, and so are wrong types in the last four.
    Answer, text: Success, job <jobid> was updated to stage <stage>!
    An update that is repeated with its token changes nothing.
    404: there is no such job. 409: the token is no longer valid: the job was
    claimed again, updated, released, failed, rejected, cancelled or moved
    since. A lapse alone doesn't make it invalid.
    """
    update = request.options(claim=token)
    update.update(jobid=jobid, stage=stage)
    if request.method == "POST":
        update.update(read_result(read_object(request)))
    error, = store.update_jobs(request.namespace, [update])
    if error:
        raise error
    message = "Success, job %d was updated to stage %d!"
    return Response.text(message % (jobid, stage))


def read_update(entry, stage):
    """Return an entry of /update_jobs, read, its stage by `stage`."""
    if type(entry) is not dict:
        raise Error(400, "An update must be an object.")
    return dict(
        read_result(entry),
        jobid=JOBID(entry.get("jobid"), "jobid"),
        stage=stage(entry.get("jobstage"), "jobstage"),
        claim=read_optional(entry, "claim", token),
    )


def post_update_jobs(store, request):
    """Put many jobs into stages, in one transaction.

    Body: [{"jobid": 1, "jobstage": 2, "claim": "gKyHzpdDUDr1"}, …]; claim is
    optional, and so are the keys in the body of /update_job.
    Answer: [{"jobid": 1, "status": 200}, …], in the same order. A refused
    update has the status 400, 404 or 409, and does not affect the others.
    400: an entry is malformed. 404: no stage has a given name. Then no job is
    updated.
    """
    given = request.json()
    if type(given) is not list:
        raise Error(400, "The body must be a JSON list.")
    updates = [read_update(entry, request.stage) for entry in bounded(given)]
    ids = [update["jobid"] for update in updates]
    errors = store.update_jobs(request.namespace, updates)
    return Response.json([
        {"jobid": jobid, "status": error.status if error else 200}
        for jobid, error in zip(ids, errors)
    ])


def post_fail_job(store, request, jobid):
    """Record a failed attempt: the job is delayed, or failed after too many.

    It goes back to the stage that it was claimed from. Option: claim, the
    token; without it the current claim is meant. Body, all optional:
    exit_code, error, stderr and seconds, as in /update_job, and a note for
    the next attempt, as in /heartbeat. An exit_code of 75 defers the job: it
    is tried again, and no failure is counted.
    Answer: {"jobid": 1, "state": "delayed", "failures": 1, "delay": 2}: it
    waits again after delay seconds. After max_attempts failures in a stage
    the state is failed, and delay is 0. A repetition with the token changes
    nothing. 404, 409: as /update_job; also 409 if the job isn't claimed.
    """
    given = request.options(claim=token)
    body = read_object(request)
    given["report"] = read_fields(body, REPORTS)
    given["note"] = read_optional(body, "note", note_text)
    return Response.json(store.fail_job(request.namespace, jobid, **given))


def post_reject_job(store, request, jobid):
    """Send a job back because its files are missing or have changed.

    It goes to the stage that made them, and gets back the jobcmd and filename
    that it had there. Option: claim, the token; without it the job must be
    waiting, delayed, done or failed. Body, all optional: files, the list that
    was checked, as in the claim; exit_code, error, stderr and seconds, as in
    /update_job.
    Answer: {"jobid": 1, "state": "delayed", "stage": 0, "rejects": 1,
    "delay": 2}, as /fail_job; the state is failed after max_attempts
    rejections. 404, 409: as /update_job; also 409 if the job has no files, or
    other files than those in the body.
    """
    given = request.options(claim=token)
    body = read_object(request)
    given["files"] = read_optional(body, "files", read_files)
    given["report"] = read_fields(body, REPORTS)
    return Response.json(store.reject_job(request.namespace, jobid, **given))


def post_release_job(store, request, jobid):
    """Give a claim back: the job waits again, and no failure is counted.

    Option: claim, the token; without it the current claim is meant. Body,
    optional: a note for the next attempt, as in /heartbeat.
    Answer: {"jobid": 1, "state": "waiting"}. 404, 409: as /fail_job.
    """
    given = request.options(claim=token)
    given["note"] = read_optional(read_object(request), "note", note_text)
    return Response.json(store.release_job(request.namespace, jobid, **given))


def read_worker(given, stage=STAGE):
    """Return a worker's report on itself, as columns, and if it `ended`.

    `stage` reads its stages.
    """
    about = dict(
        dict.fromkeys(ABOUT_WORKER), **read_fields(given, ABOUT_WORKER),
        name=label(given["worker"], "worker"))
    if about["stages"] is not None:
        about["stages"] = to_json([
            stage(each, "stages") for each in about["stages"]])
    return about


def post_heartbeat(store, request):
    """Renew the claims of a worker, and report that it is alive.

    Body: {"worker": "node7-4711", "lease": 120, "claims":
    [[1, "gKyHzpdDUDr1"], …]}; claims may be empty. Each claim lasts lease
    seconds from now; a lapsed claim is renewed, too, if the job wasn't claimed
    again. A claim may also report on its attempt: [1, "gKyHzpdDUDr1",
    {"progress": [0.4, "epoch 3"], "note": "saved/3"}], with a number from 0
    to 1 and a word, and up to 4096 characters for the next attempt; a missing
    key stays unchanged.
    These keys are optional, and shown by GET /workers:

      host                 the name of the host
      stages               list of the stages that it claims from
      slots, busy          how many jobs it can run, and is running
      memory               the bytes that it has for them
      done, failed         how many jobs it has done, and attempts failed
      quarantine           why it takes no more work
      ended                true: the worker has ended and is forgotten

    Answer: {"lost": [<jobid>, …], "drain": false, "beat": 5}. lost lists
    jobs that the worker no longer has: end their commands. If drain is true,
    it should claim no more. beat is the seconds until its next heartbeat.
    """
    given = read_object(request, "worker", "lease", "claims")
    claims = given["claims"]
    right = type(claims) is list and all(
        type(claim) is list and len(claim) in (2, 3)
        for claim in bounded(claims)
    )
    if not right:
        raise Error(400, "claims must be a list of lists [jobid, token], or"
                    " [jobid, token, news].")
    lost, drain, beat = store.heartbeat(
        request.namespace,
        claims=[
            (JOBID(jobid, "jobid"), token(text, "claim"),
             *map(read_news, news))
            for jobid, text, *news in claims],
        lease=period(given["lease"], "lease"),
        worker=read_worker(given, request.stage),
    )
    return Response.json({"lost": lost, "drain": drain, "beat": beat})


def post_drain(store, request, *name):
    """Tell a worker to claim no more, or, as /undrain, to go on.

    The answer to its next heartbeat tells the worker. A name with slashes is
    several parts of the path. Answer: {"worker": "node7-4711", "drain": true}.
    404: there is no worker of that name.
    """
    name, drained = "/".join(name), request.path.startswith("/drain/")
    store.drain(request.namespace, name, drain=drained)
    return Response.json({"worker": name, "drain": drained})


def post_pause(store, request, stage):
    """Hand out no more jobs of a stage, or, as /resume, go on.

    Running jobs go on. Answer: {"stage": 0, "paused": true}.
    """
    paused = request.path.startswith("/pause/")
    store.pause(request.namespace, stage, paused=paused)
    return Response.json({"stage": stage, "paused": paused})


def get_check_stages(store, request, old=None, new=None):
    """Mark the expired jobs; move those of one stage to another.

    Answer: {"Are all simulations within time frame?": 1}, or 0 if a job of
    stage <old>, or of any stage, was marked; with stages also
    "n_bad_jobs were degraded:", the number of moved jobs. Their claims are
    lost. Failed and cancelled jobs stay. The server marks expired jobs by
    itself every second.
    """
    name = "Are all simulations within time frame?"
    if old is None:
        fine = store.check_stages(request.namespace, request.gone)
        return Response.json({name: int(fine)})
    fine, moved = store.move_expired(
        request.namespace, old, new, request.gone)
    return Response.json({name: int(fine), "n_bad_jobs were degraded:": moved})


def read_selector(store, request):
    """Return which jobs a request names: ids, or stage and state."""
    given = read_object(request)
    unknown = set(given) - {"ids", "stage", "state", "all", "submission"}
    if unknown:
        raise Error(400, "Jobs can't be selected by %.80r." % min(unknown))
    selector = {
        "stage": read_optional(given, "stage", request.stage),
        "state": read_optional(given, "state", one_of(*STATES)),
        "ids": read_optional(given, "ids", jobid_list),
    }
    if given.get("all", True) is not True:
        raise Error(400, "all must be true.")
    name = read_optional(given, "submission", word)
    if name is not None:
        if selector["ids"] is not None:
            raise Error(400, "Name jobs by ids or by a submission, not both.")
        found, = store.submissions(request.namespace, name)
        selector["ranges"] = found["ids"]
    named = any(value is not None for value in selector.values())
    if named == ("all" in given):
        raise Error(400, "Select jobs by ids, submission, stage and state, or"
                    " by all.")
    return selector


def post_sweep(store, request):
    """Retry, cancel, release or forget jobs, as the path says.

      /retry    runs done, failed, cancelled and aborted jobs again, in the
                stage that they were claimed from, with its jobcmd and filename
      /cancel   cancels all jobs that are not done
      /release  takes working jobs from their workers; no failure is counted
      /forget   deletes done jobs and their attempts; /submit never gives
                their ids to other jobs

    Body: ids (a list) or submission (a name), stage and state, which select
    the jobs that match all of them; or only {"all": true}.
    Answer: {"retried": 5}, or cancelled, released, forgotten; jobs in other
    states are not counted. The call goes in steps, ends when the caller hangs
    up, and can be repeated. 400: no jobs are selected. 404: one of ids does
    not exist; nothing was changed.
    """
    action = request.path[1:]
    n = store.sweep(request.namespace, action, gone=request.gone,
                    **read_selector(store, request))
    return Response.json({SWEEPS[action][0]: n})


def tagged(request, text, now=None):
    """Answer with JSON text, or with 304 when the caller has it already.

    The time `now`, if given, is added to it. The tag leaves that out, so it
    is weak. RFC 9110 has the headers.
    """
    tag = 'W/"%s"' % hashlib.sha256(text.encode("ascii")).hexdigest()[:24]
    if tag in request.headers.get("if-none-match", ""):
        return Response(304, b"", None, [("ETag", tag)])
    if now is not None:
        text = '{"time": %s, %s' % (to_json(now), text[1:])
    return Response.json_text(text, headers=[("ETag", tag)])


# The keys of a job in /job and /jobs, each with its column.
SHOWN = {
    "jobid": "jobid", "stage": "stage", "stage_name": "stage_name",
    "state": "state", "since": "entered_at", "due": "expires_at",
    "worker": "worker", "attempt": "attempt", "failures": "failures",
    "lapses": "lapses", "rejects": "rejects", "made": "files_stage",
    "laststage": "laststage", "priority": "priority",
    "max_attempts": "max_attempts",
    "timeout": "timeout", "waits": "unmet", "aborted_by": "aborted_by",
}


class Describer:
    """Describes jobs of a namespace, in JSON, with a command and a reason.

    The reasons of waiting jobs depend on all stages and workers, which are
    looked up for the first waiting job.
    """

    def __init__(self, store, namespace):
        self.store, self.namespace = store, namespace
        self.found, self.waiting = None, {}

    def around(self):
        """Return the answers of /status and /workers, asked for once."""
        if self.found is None:
            now, workers = self.store.workers(self.namespace, within=86400)
            self.found = self.store.status(self.namespace), {
                "time": now, "workers": workers}
        return self.found

    def reason_of(self, job):
        """Return why() of a job; all that wait in a stage have one reason."""
        stage = job["stage"] if job["state"] == "waiting" else None
        reason = self.waiting.get(stage)
        if reason is None:
            reason = why(job, self.store.clock(), self.around)
            if stage is not None:
                self.waiting[stage] = reason
        return reason

    def describe(self, job, known_attempts, parents=(), **more):
        """Return a job but its token, and `more`, JSON already.

        Of the attempts the last one at least must be known; `parents` are
        ids of jobs that it waits for.
        """
        shown = {name: job[column] for name, column in SHOWN.items()}
        shown["expired"] = bool(job["expired"])
        known = dict(shown, jobcmd=from_json(job["jobcmd"] or "null"),
                     progress=from_json(job["progress"] or "null"),
                     attempts=known_attempts, waits_for=parents)
        shown["command"] = command_text(known)
        shown["why"] = self.reason_of(known)
        texts = {name: job[name] or "null" for name in JSON_COLUMNS}
        return splice(shown, dict(texts, **more))


def get_job(store, request, jobid):
    """Show a job and its attempts.

    Answer: an object with the keys that help job lists. 404: there is no
    such job.
    """
    found = store.job(request.namespace, jobid)
    if found is None:
        raise Error(404, "There is no job %d." % jobid)
    job, waits_for, attempts = found
    return tagged(request, Describer(store, request.namespace).describe(
        job, attempts, waits_for, waits_for=to_json(waits_for),
        attempts=to_json(attempts)))


def get_output(store, request, jobid):
    """Show the end of the output of the last attempt at a job.

    Option: bytes, how many of each stream, at most 1048576 (default 65536).
    Answer: {"stdout": "…", "stderr": "…", "truncated": false, "running":
    true}. 403: the reading jobix needs serve --share-output.
    404: there is no such job, or its worker's logs are not in the folder logs
    beside the access file.
    """
    size = request.options(bytes=from_query(integer(1, MAX_LOG)))["bytes"]
    if request.readonly and not store.shares_output:
        raise Error(403, "The reading jobix can't see output: start the server"
                         " with --share-output.")
    found = store.job(request.namespace, jobid)
    if found is None:
        raise Error(404, "There is no job %d." % jobid)
    job, _, attempts = found
    running, shown = job["state"] == "working", None
    last = attempts[-1] if attempts else {}
    if running:
        last = dict(job, stage=job["claimed_from"])
    if store.logs and last and last["worker"]:
        jobix = store.jobix if request.readonly else request.jobix
        with contextlib.suppress(OSError):
            shown = read_output(
                store.logs, jobix, last["worker"],
                (jobid, last["stage"], last["attempt"]), size or 2**16)
    if shown is None:
        raise Error(404, "The server can't see its output; on a host that can,"
                         " type python3 jobman.py logs %d" % jobid)
    return Response.json(dict(shown, running=running), 200,
                         [("X-Content-Type-Options", "nosniff")])


def read_place(text, order):
    """Return the place of a page from the `after` of an earlier answer."""
    if order.endswith("id"):
        return JOBID(number(text), "after")
    since, _, jobid = text.partition(",")
    try:
        return float(since), JOBID(number(jobid), "after")
    except ValueError:
        raise Error(400, "after must come from an earlier answer.") from None


def get_jobs(store, request):
    """Show a page of jobs. Options:

      ids, submission  only these jobs: 1,3,5-8, or the name of a submission
      stage, state     only jobs in this stage or state, or expired ones
      match            only jobs with this text in jobcmd or filename
      worker           only jobs that this worker has claimed
      order            id, time (the longest in their stage first), -id, -time
      limit            how many, at most 1000 (default 100)
      after            where to go on: after in the previous answer
      attempts         how many attempts of each job to show, at most 100

    Answer: {"jobs": [{…}, …], "after": …}; the jobs are as in GET /job,
    without waits_for. after is null on the last page. Other pages may be
    short, too.
    """
    given = read_selected(
        store, request,
        stage=from_query(request.stage),
        state=one_of(*STATES, "expired"),
        order=one_of("id", "-id", "time", "-time"),
        after=word,
        match=word,
        worker=label,
        limit=from_query(integer(1, 10**25)),
        attempts=from_query(integer(0, ATTEMPTS_SHOWN)),
    )
    n = given["attempts"]
    given["attempts"] = max(1, n or 0)  # the last one says why it failed
    given["limit"] = min(given["limit"] or 100, MAX_PAGE)
    given["order"] = given["order"] or "id"
    if given["after"] is not None:
        given["after"] = read_place(given["after"], given["order"])
    page, after = store.jobs(request.namespace, **given)
    if type(after) is tuple:
        after = "%r,%d" % after
    text = '{"jobs": [%s], "after": %s}'
    describe = Describer(store, request.namespace).describe
    listed = [
        describe(job, attempts) if n is None
        else describe(job, attempts, attempts=to_json(attempts[:n]))
        for job, attempts in page]
    return tagged(request, text % (", ".join(listed), to_json(after)))


def get_workers(store, request):
    """Show the workers that sent a heartbeat in the last day.

    Answer: {"time": …, "workers": [{"name": "node7-4711", "host": "node7",
    "stages": [0], "stage_names": ["align"], "slots": 16, "memory":
    68719476736, "busy": 2, "holds": [[35, 12.5]], "done": 90, "failed": 1,
    "heard": …, "quarantine": null, "drain": false}, …]}, the latest first.
    memory is in bytes. holds lists its jobs, each with the seconds since the
    claim. heard is the time of its last heartbeat, which gave the other
    values; null means not given.
    """
    now, heard = store.workers(request.namespace, within=86400)
    return tagged(request, to_json({"workers": heard}), now)


# Parts that differ in messages of the same fault: quotes, paths, numbers.
DIFFERS = re.compile(r"""'[^']*'|"[^"]*"|\S*/\S*|[0-9]+""")


def get_failures(store, request):
    """Show the latest failed jobs, grouped by reason.

    Options: ids, such as 1,3,5-8, or submission, a name: only these jobs.
    Answer: {"failed": 300, "looked_at": 300, "groups": [{"stage": 0,
    "exit_code": 1, "message": "no such file", "host": "node7", "hosts": 12,
    "jobs": 290, "ids": [4, …]}, …]}, the largest group first. Messages of
    a group may differ in numbers, quoted parts and paths. message and host
    are those of the latest job; hosts counts the hosts. Only the latest 1000
    failed jobs are looked at.
    """
    failed, rows = store.failures(
        request.namespace, **read_selected(store, request))
    groups = OrderedDict()
    for row in rows:
        message = last_line(row["stderr"]) or last_line(row["error"])
        host = row["host"] or row["worker"]
        group = groups.setdefault(
            (row["stage"], row["exit_code"], DIFFERS.sub("", message or "")),
            {"stage": row["stage"], "exit_code": row["exit_code"],
             "message": message, "host": host, "hosts": set(), "ids": []})
        group["hosts"].add(host)
        group["ids"].append(row["jobid"])
    listed = [
        dict(group, hosts=len(group["hosts"]), jobs=len(group["ids"]))
        for group in sorted(
            groups.values(), key=lambda group: -len(group["ids"]))]
    return tagged(request, to_json({
        "failed": failed, "looked_at": len(rows), "groups": listed}))


def get_pace(store, request):
    """Show how many jobs were done over time.

    Option: minutes, how far to look back (default: to the start).
    Answer: {"time": …, "start": …, "step": 60, "updates": [12, 3], "done":
    [10, 3], "failed": [0, 1]}: for each step of so many seconds from
    start, how many attempts were done, jobs were done, and attempts failed.
    The last step is not over yet.
    """
    given = request.options(minutes=from_query(integer(1, 10**7)))
    pace = store.throughput(request.namespace, given["minutes"])
    now = pace.pop("time")
    return tagged(request, to_json(pace), now)


def get_status(store, request):
    """Show how many jobs are in each stage and state.

    Options: ids, such as 1,3,5-8, or submission, a name: only these jobs.
    Answer: {"version": "0.1.0", "time": …, "stages": [{"stage": 0, "name":
    "align", "lifetime": 10, "paused": false, "jobs": 3, "expired": 0,
    "states": {"waiting": 2, …}, "runtime": {"attempts": 9, "median": 1.2,
    "p90": 4.8, "buckets": [[1.2, 7], [4.8, 2]]}}, …], "totals": {"jobs": 3,
    "expired": 0, "states": {…}}, "rate": 0.5, "seconds_left": 6.0,
    "readonly": false}.
    A stage also has the cores and memory that its jobs need, if it was given
    any. runtime is how long done attempts took, in seconds, up to a fifth too
    high, or null; each of its buckets has the longest time and how many took
    it, four buckets to a doubling. rate is how many jobs were done per second
    in the last two minutes, null with options. seconds_left is the number of
    unfinished jobs divided by rate, or null. readonly is true with the reading
    jobix.
    """
    figures = store.status(
        request.namespace, **read_selected(store, request))
    figures["readonly"], now = request.readonly, figures.pop("time")
    return tagged(request, to_json(figures), now)


# Kinds of `spent` that aren't outcomes of attempts, and the outcomes by which
# an attempt's time is lost.
WAITS = "claimed", "again"
CUT_OFF = "released", "lapsed", "cancelled", "expired", "superseded"


def stage_stats(stage, spent):
    """Return the times of jobs claimed from a stage: see GET /stats."""
    ran, waited = spent.buckets["done"], spent.buckets["claimed"]
    run = quantiles(ran, "attempts", *PARTS) if ran else None
    return {
        "stage": stage,
        "claims": spent.attempts["claimed"],
        "retries": spent.attempts["again"],
        "run": run,
        "wait": quantiles(waited, "claims", *PARTS) if waited else None,
        "outcomes": {
            kind: {"attempts": n, "seconds": spent.seconds[kind]}
            for kind, n in spent.attempts.items() if kind not in WAITS
        },
        "useful": spent.seconds["done"],
        "lost": sum(spent.seconds[kind] for kind in CUT_OFF),
        "advised": run and max(1, math.ceil(2 * run["p95"] / 60)),
    }


def get_stats(store, request):
    """Show how much time the attempts took, and how much was lost.

    Answer: {"time": …, "stages": [{"stage": 0, "claims": 100, "retries": 3,
    "run": {"attempts": 97, "median": 1.2, "p90": …, "p95": …, "p99": …},
    "wait": {"claims": 100, "median": 0.5, …}, "outcomes": {"done":
    {"attempts": 97, "seconds": 150.2}, …}, "useful": 150.2, "lost": 0,
    "advised": 1}, …], "totals": {"claims": 100, "retries": 3,
    "useful": 150.2, "lost": 0}}, by the stage that jobs were claimed from.
    retries are claims that were not the first in the stage. run is how long
    done attempts took, wait how long jobs waited for a claim, in seconds, up
    to a fifth too high. useful is the seconds of done attempts, lost that of
    attempts that were cut off. An attempt that lapsed and was done later
    counts as both. advised is a lifetime in minutes for the stage one up:
    twice the p95 of run.
    """
    now, stages = store.stats(request.namespace)
    stages = [stage_stats(*pair) for pair in sorted(stages.items())]
    names = "claims", "retries", "useful", "lost"
    totals = {name: sum(stage[name] for stage in stages) for name in names}
    return tagged(
        request, to_json({"stages": stages, "totals": totals}), now)


METRICS = (
    ("info", "gauge", "This server's version."),
    ("jobs", "gauge", "Jobs by stage and state."),
    ("expired_jobs", "gauge", "Jobs over their lifetime, by stage and state."),
    ("workers", "gauge", "Workers heard from in the last five minutes."),
    ("slots", "gauge", "Slots of those workers."),
    ("busy", "gauge", "Slots of those workers that have a job."),
    ("claims_total", "counter", "Claims of jobs, by stage."),
    ("retries_total", "counter",
     "Claims that were not the first in the stage, by stage."),
    ("attempts_total", "counter",
     "Attempts that ended, by stage and outcome."),
    ("spent_seconds_total", "counter",
     "Time of attempts that ended, by stage and outcome."),
    ("attempt_seconds", "histogram",
     "Time of attempts that became done, by stage."),
    ("wait_seconds", "histogram", "Time from free to claimed, by stage."),
)
HISTOGRAMS = {"attempt_seconds": "done", "wait_seconds": "claimed"}


def samples(groups, workers, stages):
    """Yield samples of METRICS: a name, what follows it, the value."""
    yield "info", '{version="%s"}' % __version__, 1
    for name in ("workers", "slots", "busy"):
        yield name, "", workers[name]
    for group in groups:
        labels = '{stage="%(stage)d",state="%(state)s"}' % group
        yield "jobs", labels, group["jobs"]
        yield "expired_jobs", labels, group["expired"]
    for stage, spent in stages.items():
        labels = '{stage="%d"}' % stage
        yield "claims_total", labels, spent.attempts["claimed"]
        yield "retries_total", labels, spent.attempts["again"]
        for kind in sorted(spent.attempts.keys() - WAITS):
            ended = '{stage="%d",outcome="%s"}' % (stage, kind)
            yield "attempts_total", ended, spent.attempts[kind]
            yield "spent_seconds_total", ended, spent.seconds[kind]
        for name, kind in HISTOGRAMS.items():
            for power in range(14):  # from 1 ms up, 4 times the one before
                bucket = '_bucket{stage="%d",le="%g"}' % (
                    stage, 0.001 * 4**power)
                yield name, bucket, sum(
                    n for i, n in spent.buckets[kind] if i <= 8 * power)
            n = spent.attempts[kind]
            yield name, '_bucket{stage="%d",le="+Inf"}' % stage, n
            yield name, "_sum" + labels, spent.seconds[kind]
            yield name, "_count" + labels, n


def get_metrics(store, request):
    """Show figures of all jobix together, as text for Prometheus.

    help metrics lists them. The format is version 0.0.4 of
    https://prometheus.io/docs/instrumenting/exposition_formats/
    """
    lines = {name: ["# HELP jobman_%s %s\n# TYPE jobman_%s %s\n" % (
        name, meaning, name, kind)] for name, kind, meaning in METRICS}
    for name, more, value in samples(*store.metrics()):
        lines[name].append("jobman_%s%s %r\n" % (name, more, value))
    text = "".join(itertools.chain.from_iterable(lines.values()))
    kind = "text/plain; version=0.0.4; charset=utf-8"
    return Response(200, text.encode(), kind)


def get_health(store, request):
    """Report whether the database can be read.

    Answer: {"status": "ok", "version": "0.1.0"}. 503: it can't be read.
    """
    store.health()
    return Response.json({"status": "ok", "version": __version__})


# ----------------------------------------------------------------- pages ---

# A page may run only its own script and style, named by their hashes.
POLICY = (
    "default-src 'none'; script-src %s; style-src %s; "
    "img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'"
)
PLAIN = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>jobman</title>
<style>
th, td { text-align: left; vertical-align: top; padding-right: 1em }
td { overflow-wrap: anywhere }
@media (max-width: 50em) {  /* each row by itself, each value labelled */
  th, td:empty { display: none }
  td { display: inline-block }
  td::before { content: attr(title) ": " }
  tr { display: block; margin-bottom: .5em }
}
</style>
%s
</html>
"""
LOGIN = """<p><a href="%s?plain=1">Log in</a> (the password is your jobix, the
user name any)."""


def beside(name):
    """Return the path of a file that is copied beside this one."""
    return os.path.join(os.path.dirname(os.path.abspath(__file__)), name)


def policy(page):
    """Return the Content-Security-Policy of a page, a text."""

    def sources(kind):
        texts = re.findall("<%s>(.*?)</%s>" % (kind, kind), page, re.S)
        hashes = (hashlib.sha256(text.encode()).digest() for text in texts)
        return " ".join("'sha256-%s'" % base64.b64encode(digest).decode()
                        for digest in hashes) or "'none'"

    return POLICY % (sources("script"), sources("style"))


def page_response(page, status=200, headers=()):
    """Answer with a page."""
    guards = [
        ("Content-Security-Policy", policy(page) + "; frame-ancestors 'none'"),
        ("Referrer-Policy", "no-referrer"),
        ("X-Content-Type-Options", "nosniff"),
    ]
    kind = "text/html; charset=utf-8"
    return Response(status, page.encode(), kind, [*guards, *headers])


# The parts of an overview: a name, the call that returns it, its options.
OVERVIEW = (
    ("status", get_status, {}),
    ("hour", get_pace, {"minutes": 60}),
    ("all", get_pace, {}),
    ("workers", get_workers, {}),
    ("failures", get_failures, {}),
    ("expired", get_jobs,
     {"state": "expired", "order": "time", "attempts": 1}),
    ("failed", get_jobs,
     {"state": "failed", "order": "-time", "attempts": 1}),
)


def overview(store, namespace):
    """Return the parts of OVERVIEW for the jobs of a namespace."""
    seen = {}
    for name, endpoint, options in OVERVIEW:
        request = Request("GET", "", urlencode(options), {}, None, None)
        request.namespace = namespace
        seen[name] = from_json(endpoint(store, request).body.decode())
    return seen


def rate_text(rate):
    """Return a number of jobs per second in words: 2 per minute."""
    unit, seconds = next((pair for pair in (("second", 1), ("minute", 60))
                          if rate * pair[1] >= 1), ("hour", 3600))
    n = rate * seconds
    return ("%d per %s" if n >= 10 else "%.2g per %s") % (n, unit)


def progress_line(figures):
    """Return a sentence on the progress of all jobs."""
    totals = figures["totals"]
    jobs, done = totals["jobs"], totals["states"]["done"]
    line = "%d of %d jobs done" % (done, jobs)
    if jobs:
        line = "%d %%: %s" % (100 * done // jobs, line)
    left = figures["seconds_left"]
    if left is not None:
        line += ", %s over the last two minutes" % rate_text(figures["rate"])
    if left:
        line += ", so %s left, until %s" % (
            span(left), clock_time(figures["time"] + left))
    return line + "."


# The tables of a page without a script: a heading, the part of OVERVIEW and
# its list that the rows come from, and the columns.
JOB_CELLS = "jobid", "stage", "state", "since", "command", "why", "filename"
PLAIN_TABLES = (
    ("Failures", "failures", "groups", (
        "jobs", "stage", "exit_code", "message", "host")),
    ("Stages", "status", "stages", (
        "stage", "name", "paused", "states", "expired", "lifetime",
        "runtime")),
    ("Workers", "workers", "workers", (
        "name", "host", "stages", "slots", "holds", "done", "failed", "drain",
        "quarantine", "heard")),
    ("Failed jobs", "failed", "jobs", JOB_CELLS),
    ("Expired jobs", "expired", "jobs", JOB_CELLS),
)


def cell(name, row):
    """Return the text of a row, a dict, in a column of a table."""
    value = row.get(name)
    if name == "command" and value is None:
        value = row["jobcmd"]
    if value is None or value is False:
        return ""
    if name in ("since", "heard"):
        return clock_time(value)
    if name == "states":
        return ", ".join("%d %s" % (n, state)
                         for state, n in value.items() if n)
    if name == "runtime":
        return "median %g s, 90 %% within %g s" % (
            round(value["median"], 3), round(value["p90"], 3))
    if name == "holds":
        return ", ".join(str(jobid) for jobid, _ in value)
    return clean(value if type(value) is str else to_json(value))[:200]


def html_table(heading, names, rows):
    """Return the markup of dicts as a table, without its empty columns."""
    if not rows:
        return "<h2>%s</h2>\n<p>None." % heading
    columns = [[name, *(cell(name, row) for row in rows)] for name in names]
    columns = [
        ['<th scope="col">%s</th>' % name]
        + ['<td title="%s">%s</td>' % (name, html.escape(text))
           for text in texts]
        for name, *texts in columns if any(texts)]
    return "<h2>%s</h2>\n<table>\n<tr>%s</tr>\n</table>" % (
        heading, "</tr>\n<tr>".join(map("".join, zip(*columns))))


def plain_view(seen):
    """Return an overview as the content of a page without a script."""
    figures = seen["status"]
    return "\n".join((
        "<h1>jobman %s</h1>" % figures["version"],
        "<p>%s" % progress_line(figures),
        "<p>As of %s." % clock_time(figures["time"]),
        *(html_table(heading, names, seen[part][rows])
          for heading, part, rows, names in PLAIN_TABLES),
    ))


def login_page(store, request, name):
    """Return the page that asks a caller for a jobix, None if there is one.

    Without a script it comes by HTTP Basic, as the password. `name` is that
    of the page that was called.
    """
    scheme, _, login = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "basic":
        with contextlib.suppress(ValueError):
            _, _, password = base64.b64decode(login).partition(b":")
            request.headers["jobix"] = password.decode("ascii")
    with contextlib.suppress(Error):
        request.identify(store)
        return None
    if request.query != "plain=1":
        return page_response(PLAIN % (LOGIN % name))
    challenge = ("WWW-Authenticate", 'Basic realm="jobix as password"')
    refused = "<p>The password is your jobix."
    return page_response(PLAIN % refused, 401, [challenge])


def dashboard_file():
    """Return the text of dashboard.html, None where it isn't beside us."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        with open(beside("dashboard.html"), encoding="utf-8") as file:
            return file.read()


def get_dashboard(store, request):
    """Show the page; it asks for a jobix by itself.

    A plain page is shown where dashboard.html is missing, and without a script
    at /get?plain=1, which takes the jobix as the password of HTTP Basic.
    401: there is no jobix, or a wrong one.
    """
    page = None if request.query == "plain=1" else dashboard_file()
    if page is not None:
        return page_response(page)
    return login_page(store, request, "get") or page_response(
        PLAIN % ('<meta http-equiv="refresh" content="10">\n'
                 + plain_view(overview(store, request.namespace))))


def get_greeting(store, request):
    """Show name and version, as text; show the page to a browser."""
    if "text/html" in request.headers.get("accept", ""):
        return get_dashboard(store, request)
    return Response.text("This is jobman %s, a job manager." % __version__)


def get_lifetime_page(store, request):
    """Show a page with the lifetimes of the caller's stages, in minutes.

    A browser logs in at /lifetime?plain=1, as at /get?plain=1.
    """
    return login_page(store, request, "lifetime") or page_response(
        PLAIN % html_table("Lifetimes", ("stage", "minutes"), [
            {"stage": stage, "minutes": minutes} for stage, minutes
            in store.lifetimes(request.namespace).items()]))


# ------------------------------------------------------------------ help ---

# The meanings of the keys of a job and of an attempt, in calls and in CSV.
JOB_FIELDS = {
    "jobstage": "the stage where it waits, a number or a name; required",
    "jobcmd": "its command, or any other JSON, at most 200 levels deep",
    "filename": "the name of a file, for the command of the next stage",
    "laststage": "it is done in this stage and beyond (default: the last stage"
    " of /init; without that it is never done)",
    "priority": "a number from -2^31 to 2^31-1; jobs with a higher one are"
    " claimed first (default 0)",
    "max_attempts": "after so many failures in a stage it is failed (default"
    " 3; see serve --retries)",
    "timeout": "how many seconds its command may take (default: no limit)",
    "cwd": "the folder to run its command in (default: the worker's)",
    "outputs": "a list of paths of files that its command makes; a worker"
    " checks them before the next stage",
    "after": "ids of jobs that must be done before it can be claimed",
    "jobid": "its number",
    "stage": "the stage that it is in",
    "stage_name": "the name of that stage",
    "state": "see help states",
    "expired": "whether it has been in its stage for longer than the lifetime"
    " of the stage",
    "since": "when it came into its stage",
    "due": "when its lease or its delay ends",
    "worker": "the worker that claimed it last",
    "attempt": "the number of its latest attempt in the stage it was claimed"
    " from",
    "failures": "how many attempts failed in that stage",
    "lapses": "how many leases lapsed in that stage",
    "rejects": "how often its files were rejected, since it was added or"
    " retried",
    "files": "the files that were made for it, a list of"
    ' {"path": "a.gz", "size": 9, "sha256": "<64 hex digits>"}',
    "made": "the stage that made them",
    "waits": "how many jobs it waits for",
    "waits_for": "the ids of the first 100 of them",
    "aborted_by": "the job whose end aborted it",
    "progress": "the progress that its command reports, such as"
    ' {"part": 0.4, "word": "epoch 3"}',
    "note": "the note of an attempt for the next attempt",
    "command": "the command of its stage, as a person would write it",
    "item": "the item of that command, in CSV only",
    "why": "a sentence: why it is not running, or how it ended",
    "attempts": "its last 100 ended attempts, the oldest first",
}
ATTEMPT_FIELDS = {
    "attempt": "its number in the stage, from 1",
    "stage": "the stage that the job was claimed from",
    "target": "the stage that its update named",
    "worker": "the worker that claimed the job",
    "host": "the host of the worker, unless the attempt was done",
    "started": "when the job was claimed",
    "ended": "when the attempt ended",
    "seconds": "the time between them, in CSV only",
    "outcome": "see help states",
    "exit_code": "the exit status of the command",
    "error": "what went wrong, in a sentence",
    "stderr": "the end of standard error, at most 4096 characters",
}
# The columns of CSV: of a job, and of its last attempt that has ended.
JOB_COLUMNS = (
    "jobid", "stage", "state", "expired", "since", "priority", "laststage",
    "worker", "attempt", "failures", "lapses", "waits", "aborted_by",
    "filename", "jobcmd", "command", "item",
)
ATTEMPT_COLUMNS = (
    "host", "started", "ended", "seconds", "outcome", "exit_code", "error",
    "stderr")


def only(names, meanings):
    """Return the meanings of some names, a dict."""
    return {name: meanings[name] for name in names}


# Each topic of help: its line in the list, then paragraphs, and dicts of
# names and their meanings.
TOPICS = {
    "http": (
        "the HTTP calls: options, bodies, answers and errors", """\
A call is HTTP/1.1 or 1.0 and has the header jobix: <number>. Calls marked
(no jobix) need none; calls marked (reading) accept the reading jobix, too.
Answers are JSON, unless a call says text or page. A call that fails changes
nothing; its answer is {"error": "<one sentence>"}: see help errors.""", """\
A body is JSON, plain or as zlib or gzip data; its first bytes decide, not its
headers. It may have up to 64 MiB, also when inflated. NaN and Infinity are
not JSON. An optional key may be null. If all keys are optional, the body may
be empty.""", """\
Options are in the query: /get/0?wait=20&n=5. A call with options refuses
unknown ones; a call without options ignores the query. Slashes at the start
of a path count as one. HEAD works where GET changes nothing.""", """\
Times are seconds since 1970, by the server's clock. Answers that show jobs,
workers or figures have an ETag. If it is in the header If-None-Match and only
the time has changed, the answer is 304.""", """\
A connection is closed after 20 seconds without a first request, after 300
seconds without another request, and after a 401 or 403. TLS is version 1.2 or
later.""", {
            "jobix": "0 to 2^63-1",
            "jobid": "0 to 2^53-1",
            "stage": "0 to 1000000, or the name of a stage: a letter and up to"
            " 63 of A-Z a-z 0-9 _ . -, but not all or last; a jobix may have"
            " 1000 different stages",
            "minutes": "0 to 10^9; 0 is no limit",
            "seconds": "0 to 10^9, with or without a fraction",
            "claim": "a token, 1 to 64 of A-Z a-z 0-9 _ -; each claim of a job"
            " has a new one",
            "worker, key": "1 to 255 characters",
        }),
    "job": (
        "what a job carries, and what is shown of it", """\
A job in /set, /submit and the file of submit --from-json may have:""",
        only(CARRIES, JOB_FIELDS), """\
worker.py runs a jobcmd that is a string by /bin/sh, and a list of strings
as argv. Of {"steps": {"0": "fetch", "2": ["align", "-v"]}, "item": "a"} it
runs the command for the job's stage, with "a" in $JOBMAN_ITEM.""", """\
GET /job and GET /jobs show all of these but jobstage and after. They also
show the following; null means that there is none.""",
        only([name for name in JOB_FIELDS if name not in CARRIES], JOB_FIELDS),
        "An attempt has:", ATTEMPT_FIELDS),
    "states": (
        "the states of a job, and the outcomes of its attempts", {
            "waiting": "the next claim of its stage may take it",
            "delayed": "an attempt failed or was deferred, or its files were"
            " rejected: it waits again after 2, 8, 32, 128, 512, and then"
            " always 600 seconds",
            "blocked": "it waits for other jobs (after) that are not done",
            "working": "a worker has claimed it; it is in the stage that the"
            " claim moved it to",
            "done": "it has reached its laststage",
            "failed": "in one stage max_attempts attempts failed or 5 leases"
            " lapsed (see serve --lapses), or its files were rejected"
            " max_attempts times",
            "cancelled": "/cancel was called",
            "aborted": "a job that it waits for is failed, cancelled or"
            " aborted; when that one is retried, it is blocked again",
        }, """\
A job that failed, lapsed or was released goes back to the stage that it
was claimed from, a rejected one to the stage that made its files. Done,
failed, cancelled and aborted jobs stay as they are until /retry. Attempts,
failures and lapses are counted from zero when an update, a rejection, /retry
or /check_stages puts a job into a stage. Once a job is done, it never again
blocks the jobs that wait for it. A job over its stage's lifetime is marked as
expired, whatever its state is, until it moves.""", """\
A claim without a lease reserves nothing: the job can be claimed again in the
stage that the claim moved it to. A done job can be claimed from the stage
that it is in.""", "The outcome of an attempt says what ended it:", {
            "done": "an update",
            "failed": "/fail_job",
            "deferred": "/fail_job with exit_code 75; not counted",
            "rejected": "/reject_job",
            "released": "/release_job or /release; not counted",
            "lapsed": "its lease was not renewed, and no result came later",
            "cancelled": "/cancel",
            "expired": "/check_stages/<old>/<new>",
            "superseded": "it had no lease, and the job was claimed again",
        }),
    "errors": (
        "the HTTP statuses of errors, and what to do", {
            400: "something is malformed, unknown, missing, given twice or out"
            " of range in the path, query or body, or in the HTTP itself",
            401: "a page needs the jobix as the password",
            403: "the header jobix is missing or malformed; or this server"
            " doesn't accept that jobix: the right one is in its access file;"
            " or it is the reading jobix, and the call is not for reading",
            404: "there is no such call, or this jobix has no such job, stage,"
            " worker or submission",
            405: "use a method that the header Allow names",
            408: "the head of the request took over 20 seconds, or the body"
            " over a minute at less than 64 KiB a second",
            409: "the job has another claim now, or none, so drop the result;"
            " or a reason that the call names",
            411: "send a Content-Length, and no Transfer-Encoding",
            413: "the body has over 64 MiB, before or after inflating, over"
            " 250000 jobs or over 4000000 values: send it in parts",
            414: "the request line has over 64 KiB",
            421: "with serve --open: the name in the header Host is not this"
            " server's; give it as --url, or use its address",
            431: "the headers have over 64 KiB, or there are over 100",
            500: "jobman has a fault: see the server's standard error",
            503: "the server can't do that now: its disk is full, it is"
            " ending, or it has too many connections; repeat the call after"
            " the seconds in the header Retry-After",
            505: "use HTTP/1.1 or HTTP/1.0",
        }, """\
The checks come in this order: the head of the request, path and method (404,
405), the jobix (403), values in the path, the query and the body, the job."""
    ),
    "metrics": (
        "what GET /metrics shows", "The figures are of all jobix together:",
        {"jobman_" + name: "%s: %s" % (kind, meaning)
         for name, kind, meaning in METRICS}),
    "export": (
        "the columns of jobs --output csv, and joblog", """\
The CSV follows RFC 4180, in UTF-8, with a line of column names. Times are
seconds since 1970. Null is empty. A jobcmd that is not a string is JSON.
File names that are not UTF-8 are written unchanged, byte by byte.""",
        only(JOB_COLUMNS, JOB_FIELDS),
        "These columns describe the last attempt that has ended:",
        only(ATTEMPT_COLUMNS, ATTEMPT_FIELDS), """\
joblog is the format of GNU parallel's --joblog, with a line for each job that
has an ended attempt. Seq is the jobid, Host the host or the worker,
JobRuntime the time from the claim to the end. Exitval is 0 for a done
attempt and -1 for one without an exit status; for 128+n it is 0, and Signal
is n. A newline in a command is a NUL, as parallel --retry-failed wants."""),
    "files": (
        "the files beside a database, and in ~/.jobman", """\
These files are beside a database FILE while a server uses it. Copy it with
python3 jobman.py backup, not with cp.""", {
            "FILE-wal, FILE-shm": "SQLite's log, a part of the database",
            "FILE-journal": "SQLite's log on a network file system",
            "FILE.lock": "names the server that has the database; do not"
            " remove it",
            "FILE.gate, FILE.turn": "locks with which servers take turns, with"
            " serve --shared",
            "FILE.crt, FILE.key": "the certificate for HTTPS and its key;"
            " if you remove both, the next start makes new ones",
        }, "In ~/.jobman, unless an option names another place:", {
            "jobman.db": "the database of serve",
            "access.json": "the url, fingerprint, jobix, reading_jobix, host"
            " and pid of the server, by which clients find it",
            "logs/": "the output of commands, a file for each worker, with at"
            " most 1 MiB of each attempt; python3 jobman.py logs reads it",
            "spool/": "results that a worker could not deliver; the next"
            " worker delivers them, or worker.py --send-spool",
        }, """\
Use folders that only you can write to, as mkdir -m 700 makes them; other
folders are refused. An access file that others can read is refused, too."""),
    "environment": (
        "the environment variables JOBMAN_...", """\
These variables are read; options and arguments take precedence. Clients are
worker.py, its Client, and the commands that ask a server.""", {
            "JOBMAN_ACCESS": "the access file",
            "JOBMAN_URL": "clients: the server's address, instead of an access"
            " file; WSGI: its own address, for the access file",
            "JOBMAN_JOBIX": "clients: the jobix, with JOBMAN_URL or instead of"
            " the access file's; serve, WSGI: the jobix to accept",
            "JOBMAN_FINGERPRINT": "clients, with JOBMAN_URL: the SHA-256 of"
            " the server's certificate, in hex",
            "JOBMAN_OPEN": "serve, WSGI: 1 to accept any jobix",
            "JOBMAN_DB": "WSGI: the database",
            "JOBMAN_WAITERS": "WSGI: how many calls may wait for jobs in a"
            " process at a time (default 2)",
        }, "worker.py sets these variables for each command:", {
            "JOBMAN_JOBID": "the job's number",
            "JOBMAN_STAGE": "the stage that it was claimed from",
            "JOBMAN_ATTEMPT": "the number of this attempt, from 1",
            "JOBMAN_FILENAME": "the job's filename, or empty",
            "JOBMAN_ITEM": "the job's item, if it has one",
            "JOBMAN_CORES": "how many cores it has: what its stage needs, or"
            " 1; where the stage says so it is in OMP_NUM_THREADS too, unless"
            " that is set already",
            "JOBMAN_MEMORY": "how much memory its stage needs, in bytes, or"
            " empty",
            "JOBMAN_RESULT": "a file to which the command may write a JSON"
            " object with filename, jobcmd or outputs, for the next stage",
            "JOBMAN_PROGRESS": "a file to which it may write its progress: a"
            " number from 0 to 1, and a word",
            "JOBMAN_NOTE": "a file for a note of up to 4096 bytes to the next"
            " attempt, such as the path of a checkpoint; the next attempt"
            " finds the note in its own file, until an attempt is done",
        }),
    "network": (
        "databases on network file systems", """\
When a server starts, it looks up the file system of its database, and tries
locks there. If locks don't work, on any FUSE file system, and on the following
kinds, it must be the only server, and says so on standard error:""",
        textwrap.fill(
            ", ".join(sorted(NETWORK_FILE_SYSTEMS)), 79,
            initial_indent="  ", subsequent_indent="  "), """\
Then --shared and WSGI are refused, and backup and check work only when the
server has ended. Reads wait for writes, and SQLite keeps a rollback journal
instead of a WAL. Changes are on disk before they are answered, as on any file
system.""", """\
The FILE.lock beside the database has a heartbeat, written every %d seconds.
A server that finds the FILE.lock of another host watches it for %d seconds:
it ends if there is a heartbeat, otherwise it takes over. So end a server
before you start one on another host. If a server could not write its
heartbeat for %d seconds, or was paused for that long, it answers 503 until
it has written one. If it has lost its database, it ends with status 1.""" % (
            ServerLock.BEAT, ServerLock.STALE, ServerLock.LIMIT), """\
A host that crashes may leave locks on its NFS server: for about 90 seconds
with NFSv4, or until it is up again with NFSv3. Meanwhile no other host can use
the database. A local file system is faster: use a folder of your own in /tmp,
or in /dev/shm, which is empty after a reboot."""),
}


def definitions(meanings):
    """Return the text of names and their meanings, in two columns."""
    width = max(len(str(name)) for name in meanings) + 4
    return "\n".join(
        textwrap.fill(
            meaning, 79, initial_indent=("  %s" % name).ljust(width),
            subsequent_indent=" " * width)
        for name, meaning in meanings.items())


def describe_calls():
    """Yield the text of each endpoint: its calls, and its docstring."""
    for endpoint, routes in itertools.groupby(ROUTES, lambda route: route[2]):
        mark = " (no jobix)" if endpoint in PUBLIC else \
            " (reading)" if endpoint in READING else ""
        lines = ["%s %s%s" % (method, path.replace("…>", ">/…"), mark)
                 for method, path, _ in routes]
        first, _, more = endpoint.__doc__.partition("\n")
        text = first + "\n" + textwrap.dedent(more)
        yield "\n".join([*lines, textwrap.indent(text.strip(), "    ")])


def help_text(topic=None):
    """Return the text of a topic, or the list of topics, in ASCII."""
    if topic is None:
        parts = [
            "python3 jobman.py help TOPIC explains one of these:",
            {name: line for name, (line, *_) in TOPICS.items()},
            "python3 jobman.py COMMAND --help explains a command.\n"
            "python3 -m pydoc worker explains the library for Python.",
        ]
    else:
        _, *parts = TOPICS[topic]
    if topic == "http":
        parts += describe_calls()
    return "\n\n".join(
        part if type(part) is str else definitions(part)
        for part in parts).replace("…", "...")


def get_help(store, request, topic=None):
    """Show a topic of jobman.py help, or the list of topics, as text.

    404: there is no such topic.
    """
    if topic not in (None, *TOPICS):
        raise Error(404, "There is no topic %.80r, only %s." % (
            topic, ", ".join(TOPICS)))
    return Response.text(help_text(topic) + "\n")


def show_help(options):
    """Print a topic, or the list of topics."""
    print(help_text(options.topic))
    return 0


# ---------------------------------------------------------------- routes ---


# Parameters of a path, each with its reader; all others are stages.
PARAMETERS = {
    "jobid": from_query(JOBID),
    "minutes": from_query(MINUTES),
    "stages": lambda text, name: text.split(","),
    "worker": lambda text, name: text,
}

# Method, path and endpoint. A path's last parameter may end in "…": then
# there may be more of it. Pages, and calls that show no job, need no jobix.
ROUTES = (
    ("GET", "/", get_greeting),
    ("GET", "/health", get_health),
    ("GET", "/metrics", get_metrics),
    ("GET", "/get", get_dashboard),
    ("GET", "/lifetime", get_lifetime_page),
    ("GET", "/help", get_help),
    ("GET", "/help/<topic>", get_help),
    ("GET", "/init", get_lifetimes),
    ("GET", "/init/<minutes…>", get_init),
    ("GET", "/lifetime/<stage>", get_lifetime),
    ("GET", "/lifetime/<stage>/<minutes>", get_set_lifetime),
    ("GET", "/stages", get_stages),
    ("POST", "/stages", post_stages),
    ("POST", "/set", post_set),
    ("POST", "/submit", post_submit),
    ("GET", "/submissions", get_submissions),
    ("GET", "/get/<stages>", get_job_claim),
    ("GET", "/get/<stages>/<nextstage>", get_job_claim),
    ("GET", "/update_job/<jobid>/<stage>", get_update_job),
    ("POST", "/update_job/<jobid>/<stage>", get_update_job),
    ("POST", "/update_jobs", post_update_jobs),
    ("POST", "/fail_job/<jobid>", post_fail_job),
    ("POST", "/reject_job/<jobid>", post_reject_job),
    ("POST", "/release_job/<jobid>", post_release_job),
    ("POST", "/heartbeat", post_heartbeat),
    ("GET", "/check_stages", get_check_stages),
    ("GET", "/check_stages/<old>/<new>", get_check_stages),
    ("POST", "/retry", post_sweep),
    ("POST", "/cancel", post_sweep),
    ("POST", "/release", post_sweep),
    ("POST", "/forget", post_sweep),
    ("POST", "/pause/<stage>", post_pause),
    ("POST", "/resume/<stage>", post_pause),
    ("POST", "/drain/<worker…>", post_drain),
    ("POST", "/undrain/<worker…>", post_drain),
    ("GET", "/status", get_status),
    ("GET", "/pace", get_pace),
    ("GET", "/workers", get_workers),
    ("GET", "/failures", get_failures),
    ("GET", "/stats", get_stats),
    ("GET", "/jobs", get_jobs),
    ("GET", "/job/<jobid>", get_job),
    ("GET", "/output/<jobid>", get_output),
)
PUBLIC = frozenset((
    get_greeting, get_health, get_metrics, get_dashboard, get_lifetime_page,
    get_help,
))
READING = frozenset((
    get_lifetimes, get_lifetime, get_stages, get_submissions, get_status,
    get_pace, get_workers, get_failures, get_stats, get_jobs, get_job,
    get_output, *PUBLIC
))


def routes_by_first_part():
    """Return (method, parameters, endless, endpoint) by a path's first part.
    """
    found = defaultdict(list)
    for method, path, endpoint in ROUTES:
        first, *parameters = path[1:].split("/")
        names = [parameter.strip("<…>") for parameter in parameters]
        for each in (method, "HEAD") if endpoint in READING else (method,):
            found[first].append((each, names, "…" in path, endpoint))
    return dict(found)


ROUTES_BY_FIRST = routes_by_first_part()


def find_route(request):
    """Return the endpoint of a request and (parameter, text) from its path.

    Raises Error 404 for an unknown path, 405 for a wrong method.
    """
    if not request.path.startswith("/"):
        raise Error(400, "An address must begin with a slash.")
    first, *texts = request.path[1:].split("/")
    allowed = []
    for method, names, endless, endpoint in ROUTES_BY_FIRST.get(first, ()):
        more = len(texts) - len(names)
        if more == 0 or (endless and more > 0):
            if method == request.method:
                names = names + names[-1:] * more
                return endpoint, list(zip(names, texts))
            allowed.append(method)
    if not allowed:
        raise Error(
            404, "There is nothing at this address; see /help/http.")
    allowed = ", ".join(allowed)
    raise Error(405, "Use %s for this address." % allowed, Allow=allowed)


def read_parameter(request, name, text):
    """Return the value of a path's parameter; raise Error 400 or 404."""
    read = PARAMETERS.get(name) or from_query(request.stage)
    return read(text, name)


def error_response(error):
    """Convert an Error into a Response."""
    headers = list(error.headers.items())
    return Response.json({"error": str(error)}, error.status, headers)


def authorize(store, request, endpoint):
    """Check that the caller may use an endpoint; raise Error 403.

    A jobix that is new to an open server gets its namespace here.
    """
    request.identify(store)
    request.stage = stage_reader(store, request)
    if endpoint not in READING:
        if request.readonly:
            raise Error(403, "This jobix is only for reading.")
        if request.namespace is None:
            request.namespace = store.make_namespace(request.jobix)


def receive_body(store, request):
    """Receive a request's body; of large ones respond() ends the turn.

    Only a few large ones at a time: inflated and parsed, each can take
    hundreds of MiB. Raises Error 503 if none of them ends in time.
    """
    if request.length <= RECEIVED_FIRST:  # a slow sender holds up nobody
        request.load()
    if request.length >= LARGE_BODY:
        if not store.large_bodies.acquire(timeout=MAX_WAIT):
            raise Unavailable("it has too many large requests")
        request.has_turn = True
    request.load()


def respond(store, request):
    """Return the Response to a Request: the one place where errors become one.

    The order of the checks is: path, jobix, parameters of the path, and then
    the body. After an outage, calls of callers that hung up are not carried
    out: a caller that is still there asks again.
    """
    try:
        endpoint, given = find_route(request)
        if endpoint in PUBLIC:
            return endpoint(store, request, *(text for _, text in given))
        authorize(store, request, endpoint)
        arguments = [read_parameter(request, *each) for each in given]
        receive_body(store, request)
        if store.was_paused() and request.gone():
            raise Unavailable("its caller has gone")
        return endpoint(store, request, *arguments)
    except (Error, sqlite3.Error) as error:
        return error_response(store.explain(error))
    except Exception:
        traceback.print_exc()
        return error_response(
            Error(500, "jobman has a fault here; see its log."))
    finally:
        if request.has_turn:
            store.large_bodies.release()


# ----------------------------------------------------------- access file ---


def access_path():
    """Return where the access file is, unless an option says otherwise."""
    return os.environ.get("JOBMAN_ACCESS") or home_file("access.json")


def replace_file(what, path, data, mode):
    """Write a file in one step: a reader sees the old or the new one.

    Makes its folder. Raises CommandError; no draft is left then.
    """
    folder = os.path.dirname(os.path.abspath(path))
    draft = "%s.new.%s" % (path, secrets.token_hex(4))
    try:
        os.makedirs(folder, mode | (mode & 0o444) >> 2, exist_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        with open(os.open(draft, flags, mode), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except OSError as error:
        raise CommandError("The %s %s can't be written: %s." % (
            what, path, error.strerror)) from None
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
    text = to_json(access) + "\n"
    replace_file("access file", path, text.encode(), 0o600)
    return access


def remove_access(path, access):
    """Remove the access file if it is still this server's own."""
    with contextlib.suppress(OSError, ValueError):
        with open(path) as file:
            own = json.load(file) == access
        if own:
            os.unlink(path)


# ------------------------------------------------------------------- TLS ---


def own_certificate(path):
    """Return the name of the file `path`.key, made if it isn't there.

    It has a key and its certificate. The latter alone is in `path`.crt.
    """
    key = path + ".key"
    if os.path.exists(key):
        return key
    if shutil.which("openssl") is None:
        raise CommandError(
            "TLS needs the program openssl, which isn't installed: give a"
            " certificate with --certfile, or use plain HTTP with --plain.")
    try:
        pem = subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-sha256",
             "-nodes", "-days", "3650", "-subj", "/CN=jobman",
             "-keyout", "/dev/stdout", "-out", "/dev/stdout"],
            cwd=os.path.dirname(os.path.abspath(key)), check=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        ).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", b"").decode("utf-8", "replace")
        raise CommandError("The certificate %s.crt can't be made: %s." % (
            path, last_line(said) or cause(error))) from None
    certificate = re.search(b"-----BEGIN CERT.*?-----END.*?\n", pem, re.S)
    replace_file("certificate", path + ".crt", certificate.group(), 0o600)
    replace_file("key", key, pem, 0o600)
    return key


def read_fingerprint(certfile):
    """Return the SHA-256 of the first certificate in a file, in hex."""
    with open(certfile, "rb") as file:
        found = re.search(
            b"-----BEGIN CERTIFICATE-----(.*?)-----END", file.read(), re.S)
    if not found:
        raise ValueError("it doesn't begin with BEGIN CERTIFICATE")
    return hashlib.sha256(base64.b64decode(found.group(1))).hexdigest()


def tls_context(certfile, keyfile):
    """Return an SSLContext for a server with a certificate.

    The key is in `keyfile`, or with the certificate where that is None.
    Python may have been built without ssl, so nothing but TLS needs it.
    Raises CommandError, OSError, ValueError.
    """
    try:
        import ssl
    except ImportError:
        raise CommandError(
            "This Python has no ssl module, so it can't speak TLS: use plain"
            " HTTP with --plain, or another Python.") from None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    if hasattr(context, "minimum_version"):
        context.minimum_version = ssl.TLSVersion.TLSv1_2
    else:  # Python 3.6
        context.options |= ssl.OP_NO_TLSv1 | ssl.OP_NO_TLSv1_1
    if ssl.OPENSSL_VERSION_INFO >= (3,):  # clients hang up without goodbye
        context.options |= 0x80  # SSL_OP_IGNORE_UNEXPECTED_EOF, named in 3.10
    with open(keyfile or certfile, "rb") as file:
        if b"ENCRYPTED" in file.read():  # OpenSSL would ask, and wait
            raise ValueError("its key has a password")
    context.load_cert_chain(certfile, keyfile)
    return context


def credentials(options, *, local):
    """Return (SSLContext, fingerprint), each None without TLS.

    A server that isn't `local` speaks TLS unless --plain says otherwise.
    """
    if (local or options.plain) and not (options.tls or options.certfile):
        return None, None
    if options.url and not options.url.lower().startswith("https://"):
        raise CommandError(
            "With TLS, --url must begin with https://; for plain HTTP use"
            " --plain.")
    certfile = options.certfile or own_certificate(options.db)
    try:
        context = tls_context(certfile, options.keyfile)
        return context, read_fingerprint(certfile)
    except (OSError, ValueError) as error:
        raise CommandError("The certificate %s can't be used: %s." % (
            certfile, cause(error))) from None


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
        raise Error(400, "The Content-Length isn't a number of bytes.")
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
REQUEST_LINE = re.compile(
    "(" + TOKEN + r") ([!-~]+) HTTP/([0-9]\.[0-9])\r\n", re.A)
HEADER_LINE = re.compile(
    "^(" + TOKEN + "):([\t -~\x80-\xff]*)\r\n", re.A | re.M)
BARE_NEWLINE = re.compile(b"(?<!\r)\n")
HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[\w.-]+)(:[0-9]{1,5})?", re.A)
PORT = re.compile(r":[0-9]*\Z")
NUMERIC_OR_LOCAL = re.compile(
    r"(\[.*\]|[0-9]+(\.[0-9]+){3}|(.*\.)?localhost)?")
SITE = re.compile("https?://([^/?]*)", re.I)


TIMED_OUT = socket.timeout, BlockingIOError  # of TLS, and of plain sockets


def limit_calls(connection, seconds):
    """Let no call on a socket last longer than so many seconds.

    A plain socket gets its timeout from the kernel, once: settimeout() would
    cost two more system calls for each one.
    """
    if hasattr(connection, "unwrap"):  # TLS would call again for ever
        return connection.settimeout(seconds)
    whole, part = divmod(seconds, 1)
    timeval = struct.pack("ll", int(whole), int(part * 1e6))
    for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
        connection.setsockopt(socket.SOL_SOCKET, option, timeval)


class SocketInput:
    """The input from a client until `end`, a moment of time.monotonic().

    The timeout of a socket restarts with every byte: a client that sends
    a byte now and then could keep its thread forever. `data` has been
    received and isn't used yet.
    """

    def __init__(self, connection):
        self.connection = connection
        self.data = bytearray()
        self.end = 0

    def receive(self):
        """Receive more; return False at the end of the stream.

        Raises OSError, Error 408 after `end`.
        """
        while time.monotonic() < self.end:
            try:
                more = self.connection.recv(65536)
            except TIMED_OUT:
                continue
            self.data += more
            return bool(more)
        raise Error(408, "The request came too slowly.")

    def take(self, length):
        """Return so many bytes of `data`, which loses them."""
        taken = bytes(self.data[:length])
        del self.data[:length]
        return taken

    def head(self):
        """Receive a request's line and headers, as text; or raise Error."""
        data = self.data
        while True:
            while data.startswith(b"\r\n"):  # RFC 9112, section 2.2
                self.take(2)
            end = data.find(b"\r\n\r\n")
            if end >= 0 or len(data) > MAX_HEAD:
                break
            if BARE_NEWLINE.search(data):
                raise Error(400, "A line must end in CR and LF.")
            if not self.receive():
                raise Error(400, "The request ended too early.")
        if not 0 <= end <= MAX_HEAD - 4:
            raise Error(431 if b"\r\n" in data[:MAX_HEAD] else 414,
                        "The request line or the headers are too long.")
        return self.take(end + 4)[:-2].decode("latin-1")

    def body(self, length):
        """Receive so many bytes; raise OSError, or Error for too few."""
        while len(self.data) < length and self.receive():
            pass
        return require_length(self.take(length), length)


def read_head(head):
    """Return method, target, version and headers; or raise Error.

    It is strict: input that others may read in another way is refused (RFC
    9112, section 11.2).
    """
    found = REQUEST_LINE.match(head)
    if not found:
        raise Error(400, "This isn't HTTP.")
    method, target, version = found.groups()
    if version[0] != "1":
        raise Error(505, "Use HTTP/1.1.")
    lines = HEADER_LINE.findall(head, found.end())
    if len(lines) != head.count("\n") - 1:
        raise Error(400, "A header line is malformed.")
    if len(lines) > MAX_HEADERS:
        raise Error(431, "There are over %d headers." % MAX_HEADERS)
    headers = {}
    for name, value in lines:
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


def own_names(url):
    """Return the names by which we may be called: our host's, the URL's."""
    name = socket.gethostname().lower()
    named = map(name_of, SITE.findall(url.lower()))
    return frozenset((name, name.partition(".")[0], *named))


def check_host(host, names):
    """Raise Error 421 for a name that isn't among `names`, our own.

    Another site's name can be led to our address (DNS rebinding): then a
    browser takes us for that site, and its pages may call us. A numeric
    address needs no check, nor does `localhost` (RFC 6761).
    """
    name = name_of(host)
    if not NUMERIC_OR_LOCAL.fullmatch(name) and name not in names:
        raise Error(421, "%s isn't a name of this server: start it with that"
                    " name in --url, or use another name." % name)


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
    PATIENCE = 60  # seconds for a body or a response, and for its size …
    SLOWEST = 2**16  # … a second for so many bytes
    CALL = 5  # seconds until a call on a socket looks at its deadline

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
        limit_calls(self.connection, min(
            self.CALL, self.FIRST, self.IDLE, self.HEAD, self.PATIENCE))
        self.input = SocketInput(self.connection)
        self.rfile = self.wfile = io.BytesIO()  # finish() closes them
        self.patience = self.FIRST

    def handle_one_request(self):
        """Answer a request; handle() repeats this until close_connection."""
        self.close_connection = self.unread = True
        self.input.end = time.monotonic() + self.patience
        try:
            if not (self.input.data or self.input.receive()):
                return
        except Error:  # no request, so no response
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
            refused = response.status in (401, 403)  # one try a connection
            self.unread = refused or not request.loaded
        self.send(response)

    def read_request(self):
        """Return the Request of the next head, to read its body later."""
        self.command = None
        self.input.end = time.monotonic() + self.HEAD
        self.command, target, version, headers = read_head(self.input.head())
        self.old = version == "1.0"
        said = headers.get("connection", "").lower()
        self.close_connection = (
            "keep-alive" not in said if self.old else "close" in said)
        host, path, query = read_target(target, version, headers)
        if self.server.store.open_to_all:
            check_host(host, self.server.names)
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
        return self.input.body(length)

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

        SSLSocket.sendall() restarts its timeout with every record.
        """
        end = time.monotonic() + self.PATIENCE + len(data) / self.SLOWEST
        left = memoryview(data)
        while left:
            try:
                left = left[self.connection.send(left) :]
            except TIMED_OUT:
                pass
            if left and time.monotonic() >= end:
                raise socket.timeout("timed out")

    def linger(self):
        """Read on for a moment after a refusal.

        Closing a socket with unread input resets the connection, and the
        client's kernel may drop the response.
        """
        end = time.monotonic() + self.LINGER
        end_tls(self.connection)
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            while time.monotonic() < end:
                self.connection.settimeout(max(0.01, end - time.monotonic()))
                if not self.connection.recv(65536):
                    break

    def gone(self):
        """Return whether the client has closed the connection."""
        poll = select.poll()  # select() fails beyond 1,024 files
        poll.register(self.connection, select.POLLRDHUP)  # also below TLS
        return bool(poll.poll(0))


OWN_CGROUPS = "/proc/self/cgroup"
CGROUPS = {  # where cgroups are, by their controllers: see cgroups(7)
    "": "/sys/fs/cgroup",  # version 2
    "pids": "/sys/fs/cgroup/pids",  # version 1
}


def thread_limits():
    """Yield the limits on our threads: the user's, and those of our cgroups.
    """
    threads, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    if threads >= 0 and os.geteuid():  # root isn't bound by it
        yield threads
    with contextlib.suppress(OSError), open(OWN_CGROUPS) as file:
        for line in file.read().splitlines():
            _, controllers, path = line.split(":", 2)
            folder = CGROUPS.get(controllers)
            for name in path.split("/") if folder else ():
                folder = os.path.join(folder, name)
                with contextlib.suppress(OSError, ValueError):  # "max"
                    with open(os.path.join(folder, "pids.max")) as limit:
                        yield int(limit.read())


def connections_bound():
    """Return how many connections we can have, each with a file and a thread.

    Login nodes often limit a user to some thousand threads, or a hundred:
    half of them are left to other programs.
    """
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    bounds = [MAX_CONNECTIONS, *(limit // 2 for limit in thread_limits())]
    if files >= 0:
        bounds.append(files - FILES_KEPT)
    return max(1, min(bounds))


class Server(ThreadingHTTPServer):
    """Serve a Store, each connection by a thread.

    `names` are the host names by which it may be called. `open` and `busy`
    are the connections, and those of them that are inside a request.
    """

    daemon_threads = True  # stop() waits for them, and not for ever
    request_queue_size = 4096  # a thousand workers may start at once
    PARKED = 32  # threads kept for the next connections
    SWITCH = 2e-5  # seconds of the switch interval, for each connection
    REJECTED = 50  # connections kept open for a while after a 503
    GRACE = 0.5  # seconds for one more request, as it stops
    END = 4.5  # seconds until it stops in any case

    def __init__(self, address, store=None):
        self.store = store
        self.tls = None  # the SSLContext, if it speaks TLS
        self.names = own_names("")
        self.limit = connections_bound()
        self.open, self.busy = set(), set()
        self.changes = threading.Condition()  # guards open and parked
        self.parked = 0  # threads that have no connection
        self.handed = getattr(queue, "SimpleQueue", queue.Queue)()  # to them
        self.rejected = deque()  # connections that were answered with 503
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
        """Give a connection to a parked or a new thread, or answer 503.

        Threads that want Python's lock wake once each switch interval. With
        5 ms, 6,000 that had a request at one time did nothing else.
        """
        with self.changes:
            self.open.add(request)
            sys.setswitchinterval(
                min(0.05, max(0.005, len(self.open) * self.SWITCH)))
            full = len(self.open) > self.limit
            park = self.parked > 0 and not full
            self.parked -= park
        if park:
            return self.handed.put((request, client_address))
        try:
            if full:
                raise RuntimeError("too many connections")
            super().process_request(request, client_address)
        except RuntimeError:  # also of a thread that can't be started
            self.reject(request)

    def process_request_thread(self, request, client_address):
        """Serve a connection, and then those that this thread is given.

        Starting a thread costs as much as all the rest of a short connection.
        """
        while request:
            super().process_request_thread(request, client_address)
            with self.changes:
                if self.ending or self.parked >= self.PARKED:
                    break
                self.parked += 1
            request, client_address = self.handed.get()

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

        Busy clients get a last answer that says "close"; then
        idle connections are closed.
        """
        self.ending, end = True, time.monotonic() + self.END
        self.close_listener(end)
        self.store.wake_all()
        with self.changes:
            self.changes.wait_for(lambda: not self.open, self.GRACE)
        for connection in self.open - self.busy:
            with contextlib.suppress(OSError):  # below TLS, which goes on
                socket.socket.shutdown(connection, socket.SHUT_RD)
        with self.changes:
            self.changes.wait_for(
                lambda: not self.open, max(0, end - time.monotonic()))
        self.store.close()

    def close_listener(self, end):
        """Accept the connections of the backlog, and none after them."""
        self.socket.setblocking(False)
        with contextlib.suppress(OSError):
            while time.monotonic() < end:
                self.process_request(*self.get_request())
        self.socket.shutdown(socket.SHUT_RDWR)  # wakes serve_forever()
        self.shutdown()
        self.server_close()
        with self.changes:
            for _ in range(self.parked):
                self.handed.put((None, None))
        for connection in self.rejected:
            self.shutdown_request(connection)


# ------------------------------------------------------------------ WSGI ---


def given_jobix(path=None):
    """Return the jobix in a file or the environment, None without either.

    Raises CommandError if it is none, or if others can read the file.
    """
    source, text = "JOBMAN_JOBIX", os.environ.get("JOBMAN_JOBIX")
    if path is not None:
        try:
            with open(path, errors="replace") as file:
                source, text = path, file.read(100)
                exposed = os.fstat(file.fileno()).st_mode & 0o077
        except OSError as error:
            raise CommandError("%s: %s." % (path, error.strerror)) from None
        if exposed:
            raise CommandError(
                "Other users can read %s: chmod 600 it, and replace the number"
                " if somebody may have read it." % path)
    if text is None:
        return None
    jobix = read_jobix(text)
    if jobix is None:
        raise CommandError(
            "%s must contain a number from 0 to 2^63-1." % source)
    return jobix


class Application:
    """The WSGI front door: `application`, made at its first call.

    The environment (of the process, set by the .wsgi file) has JOBMAN_DB,
    the database, JOBMAN_JOBIX, the jobix that is admitted instead of the
    database's own, JOBMAN_OPEN=1 to admit any, JOBMAN_URL, for an access
    file that leads here, and JOBMAN_WAITERS, how many of a process' threads
    long polls may take (default 2).
    """

    def __init__(self):
        self.mutex = threading.RLock()
        self.store = None

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
                self.close()
            if self.store is None:
                try:
                    self.store = store = self.make()
                except (CommandError, Error) as error:
                    say(error)
                    raise Unavailable("it can't start, see its log") from None
                store.keep_ticking()
                atexit.register(self.close)
                mod_wsgi = sys.modules.get("mod_wsgi")
                if hasattr(mod_wsgi, "subscribe_shutdown"):  # from 4.8 on
                    # it kills a process that still has calls 5 s later
                    mod_wsgi.subscribe_shutdown(
                        lambda *_, **__: store.wake_all())
            return self.store

    def close(self):
        """Close the Store; the next call makes another."""
        with self.mutex:
            if self.store:
                self.store.close()
            self.store = None

    def make(self):
        """Return a Store as the environment describes it.

        Raises Error, CommandError.
        """
        get = os.environ.get
        waiters = from_query(COUNT)(
            get("JOBMAN_WAITERS", "2"), "JOBMAN_WAITERS")
        path = get("JOBMAN_DB") or home_file("jobman.db")
        url = get("JOBMAN_URL")
        make_folder(path)
        store = Store(
            path, shared=True, waiters=waiters, jobix=given_jobix(),
            open_to_all=get("JOBMAN_OPEN") == "1", outage=OUTAGE)
        if url is not None:
            make_folder(access_path())
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
        length = body_length(method, headers)
        path = environ.get("PATH_INFO", "").encode("latin-1")
        return Request(
            method,
            path.decode("utf-8", "replace") or "/",
            environ.get("QUERY_STRING", ""),
            headers,
            lambda: require_length(environ["wsgi.input"].read(length), length),
            never,
            length,
        )


application = Application()


# -------------------------------------------------------------- snapshot ---

SLOT = '<script type="application/json" id="snapshot">'
SNAPSHOT_EVERY = 60  # seconds
SNAPSHOT_HEAD = """<meta charset="utf-8">
<meta http-equiv="refresh" content="%d">
<meta http-equiv="Content-Security-Policy" content="%s">"""


def snapshot_page(seen):
    """Return an overview as a page that needs no server."""
    page = dashboard_file()
    if page is None:
        page = PLAIN % plain_view(seen)
    else:
        data = to_json(seen).replace("<", "\\u003c")
        page = page.replace(SLOT, SLOT + data, 1)
    head = SNAPSHOT_HEAD % (SNAPSHOT_EVERY, policy(page))
    return page.replace('<meta charset="utf-8">', head, 1)


def write_snapshot(folder, seen):
    """Write status.html, an overview as it was `seen`; return its path.

    The umask decides who may read it.
    """
    path = os.path.join(folder, "status.html")
    replace_file("snapshot", path, snapshot_page(seen).encode(), 0o666)
    return path


def keep_snapshots(store, folder, ending):
    """Write a snapshot of the own jobs every minute, and one at the end."""
    told, over = None, False
    while not over:
        over = ending.wait(SNAPSHOT_EVERY)
        try:
            write_snapshot(folder, overview(store, store.namespace))
            told = None
        except (CommandError, Error, sqlite3.Error) as error:
            if str(error) != told:  # the disk may be full for hours
                told = str(error)
                say("jobman.py: %s" % told)


# ----------------------------------------------------------------- serve ---


def listen(host, port):
    """Return a Server that is bound to an address, without a Store yet."""
    try:
        return Server((host, port))
    except (OSError, OverflowError) as error:
        raise CommandError(
            "Can't listen on port %d of %s: %s. Give another --host or --port;"
            " port 0 is any free port." % (port, host, cause(error))
        ) from None


def is_local(server):
    """Return whether a server can be reached from this host alone."""
    return ipaddress.ip_address(server.server_address[0]).is_loopback


@contextlib.contextmanager
def serving(options, access_file, ending, jobix=None):
    """Serve `options.db` at `options.host` and port while the body runs.

    `jobix` is the own one, if not that of the database. Hands out the Server
    and the content of its access file. Raises CommandError when `ending`, an
    Event, is set while another server may have the database.
    """
    def pause(seconds):
        if ending.wait(seconds):
            raise CommandError(
                "A signal ended the server before it had the database.")

    if connections_bound() < LEAST_CONNECTIONS:
        raise CommandError(
            "The limits on open files (ulimit -n) or processes (ulimit -u)"
            " are too low for a server; raise them.")
    server = listen(options.host, options.port)
    server.tls, fingerprint = credentials(options, local=is_local(server))
    server.store = Store(
        options.db, shared=options.shared, waiters=server.limit * 4 // 5,
        jobix=jobix, new_jobix=options.new_jobix, open_to_all=options.open,
        max_attempts=options.retries + 1, max_lapses=options.lapses,
        keep_days=options.keep_days, outage=OUTAGE, pause=pause,
    )
    if server.store.location.exclusive:
        say("jobman.py: %s: so no other server can use it (see python3"
            " jobman.py help network)." % server.store.location.describe())
    host = options.host
    if host in ("", "0.0.0.0"):
        host = socket.gethostname()
    url = options.url or "%s://%s:%d" % (
        "https" if server.tls else "http", host, server.server_port)
    server.names = own_names(url)
    server.store.logs = os.path.join(os.path.dirname(access_file), "logs")
    server.store.shares_output = options.share_output
    server.start()
    try:
        access = write_access(access_file, url, server.store, fingerprint)
        try:
            yield server, access
        finally:
            remove_access(access_file, access)
    finally:
        server.stop()


def until_signal():
    """Return an Event that a signal to end sets; it keeps the `number`."""
    ending = threading.Event()
    ending.number = None

    def end(number, _):
        ending.number = number
        # in a thread: the one interrupted here may hold the Event's lock
        with contextlib.suppress(RuntimeError):  # there can be no more
            threading.Thread(target=ending.set).start()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
            signal.signal(number, end)
    return ending


def raise_file_limit(enough=math.inf):
    """Raise the soft limit on open files, so on connections, if possible."""
    soft, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(
            resource.RLIMIT_NOFILE, (max(soft, min(enough, most)), most))


ANNOUNCEMENT = """\
jobman %s listens at %s
  database     %s
  access file  %s
  page         %s
Add a job, then run it, here or on any node that sees this home folder:
  python3 jobman.py submit%s hostname
  python3 worker.py --stage 0%s"""


def page_address(access, access_file, stream):
    """Return the address of the page, to be shown on `stream`.

    On a terminal it has the reading jobix, after #, which browsers send to no
    server; but browsers and terminals keep such links.
    """
    page = access["url"] + "/get"
    if stream.isatty():
        page += "#jobix=%d" % access["reading_jobix"]
    return "%s (to change jobs, sign in with the jobix in %s)" % (
        page, access_file)


def announcement(options, access_file, access):
    """Return the lines that serve prints when it is ready."""
    path, option = os.path.abspath(access_file), ""
    if access_file != access_path():
        option = " --access " + shlex.quote(path)
    return ANNOUNCEMENT % (
        __version__, access["url"], os.path.abspath(options.db), path,
        page_address(access, "the access file", sys.stdout), option, option)


def serve(options):
    """Serve a database until a signal ends it."""
    raise_file_limit()
    gc.set_threshold(50000)  # a large body of JSON is no garbage
    ending = until_signal()
    access_file = options.access or access_path()
    for path in (options.db, access_file):
        make_folder(path)
    with contextlib.ExitStack() as stack:
        server, access = stack.enter_context(serving(
            options, access_file, ending, given_jobix(options.jobix_file)))
        if options.snapshot is not None:
            store = server.store
            write_snapshot(options.snapshot, overview(store, store.namespace))
            keeper = threading.Thread(
                target=keep_snapshots, args=(store, options.snapshot, ending))
            keeper.start()
            stack.callback(keeper.join)
            stack.callback(ending.set)
        print(announcement(options, access_file, access), flush=True)
        if not server.tls and not is_local(server):
            say("jobman.py: This is plain HTTP: anyone who can read the"
                " network's traffic can read the jobix, and use it.")
        while not (ending.wait(1) or ending.number):
            server.store.lock.require()
    return 0


# --------------------------------------------------------------- clients ---


def worker_script():
    """Return the path of worker.py; raise CommandError where it is missing."""
    script = beside("worker.py")
    if not os.path.exists(script):
        raise CommandError("%s is needed; copy it there." % script)
    return script


@contextlib.contextmanager
def using_worker():
    """Yield worker.py as a module; turn its errors into CommandError."""
    sys.path.insert(0, os.path.dirname(worker_script()))
    worker = importlib.import_module("worker")
    del sys.path[0]
    try:
        yield worker
    except worker.Trouble as trouble:
        raise CommandError(printable(str(trouble))) from None


def draw(text):
    """Write a line to a terminal that the next line replaces."""
    if sys.stderr.isatty():
        sys.stderr.write("\r%s\033[K" % text)
        sys.stderr.flush()


PATIENCE = 60  # seconds to try to reach a server, to change something
LOOKING_PATIENCE = 5  # and to look


@contextlib.contextmanager
def speaking(options, patience=LOOKING_PATIENCE):
    """Yield a Client of the server that a command's options name.

    It gives up on the server after `patience` seconds.
    """
    def tell(line):
        draw("")  # over a bar
        say("jobman.py: %s" % printable(line))

    with using_worker() as worker:
        client = worker.Client(options.access, patience=patience)
        client.tell = tell
        with contextlib.closing(client):
            yield client


DURATION_FORMS = (  # days, hours, minutes, seconds
    r"()()()(\d+(?:\.\d+)?)",
    r"(?:(\d+)-)?(\d+):([0-5]\d):([0-5]\d)",
    r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?",
)


def duration(text):
    """Return the seconds in `90`, `90s`, `2h30m`, `1:00:00` or `1-12:00:00`.

    Raises ArgumentTypeError, for argparse.
    """
    matches = (re.fullmatch(form, text[:40], re.ASCII)
               for form in DURATION_FORMS)
    found = next(filter(None, matches), None)
    value = math.inf
    if found and text:
        days, hours, minutes, rest = (
            float(part or 0) for part in found.groups())
        value = ((days * 24 + hours) * 60 + minutes) * 60 + rest
    if value > MAX_SECONDS:
        raise argparse.ArgumentTypeError(
            "%.80r isn't a duration; write 90 (seconds), 90s, 2h30m or 1:00:00"
            % text)
    return int(value) if value == int(value) else value


def read_stage(text):
    """Return the number of a stage, or its name; ArgumentTypeError for others.
    """
    try:
        return text if is_stage_name(text) else STAGE(number(text), "it")
    except Error:
        raise argparse.ArgumentTypeError(
            "%.80r isn't a stage; write its number, 0 to %d, or its name"
            % (text, MAX_STAGE)) from None


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
                "%.80r isn't numbers; write 1-1000 or 1-9:2,12" % part)
        found.append(range(first, last + 1, step))
    return found


def read_ids(text):
    """Return the jobs that IDS names: a list of ranges, or a str, a name.

    `1,3,5-8`, the name of a submission, or `last`. Raises ArgumentTypeError,
    for argparse.
    """
    if is_stage_name(text) or text == "last":
        return text
    try:
        return read_ranges(text, "ids")
    except Error as error:
        raise argparse.ArgumentTypeError(
            "%s, or the name of a submission" % str(error).rstrip(".")
        ) from None


def selector_of(client, named):
    """Return the options that name jobs to the server: those of IDS.

    `named` is what read_ids() returns, or None for all. A submission named
    `last` stays the same one.
    """
    if named is None:
        return {}
    if type(named) is str:
        found, = client.submissions(named)
        return {"submission": found["key"]}
    return {"ids": ids_text(named)}


def screen_size(stream):
    """Return the columns and lines of the terminal that a stream goes to."""
    try:
        size = tuple(os.get_terminal_size(stream.fileno()))
    except (OSError, ValueError):
        size = 0, 0
    return size if all(size) else (80, 24)


def table(columns, rows, widths=None):
    """Yield the lines of a table for standard output, numbers to the right.

    Each column is a head, and a key of a row or a function of it; a value may
    be None. The pages of one table share a list of `widths`, and only the
    first has heads. On a terminal lines are cut to its width.
    """
    heads, readers = zip(*columns)
    values = [[read(row) if callable(read) else row[read] for read in readers]
              for row in rows]
    right = [{type(value) for value in column} <= {int, float, type(None)}
             for column in zip(*values)] or [False] * len(heads)
    texts = [["" if value is None else printable(str(value)) for value in row]
             for row in values]
    if not widths:
        texts.insert(0, heads)
    widths = [] if widths is None else widths
    found = [max(map(len, column)) for column in zip(*texts)]
    widths[:] = map(max, found, widths or found)
    most = screen_size(sys.stdout)[0] if sys.stdout.isatty() else None
    for row in texts:
        line = "  ".join(
            text.rjust(width) if to_right else text.ljust(width)
            for text, width, to_right in zip(row, widths, right)).rstrip()
        yield shorten(line, most) if most else line


def report(options, value, lines, names=()):
    """Print a command's answer in the form that --output names.

    That is `value` as JSON, the `lines` for people, or, when quiet, the
    `names` of jobs or workers, one a line.
    """
    if options.output == "json":
        lines = [to_json(value)]
    elif options.output == "quiet":
        lines = (printable(str(name)) for name in names)
    for line in lines:
        print(line)


def report_findings(options, findings):
    """Print findings as they come; return the exit status.

    Each is a name, whether it is all right, and a sentence.
    """
    found = []
    for name, ok, said in findings:
        found.append({"name": name, "ok": ok, "said": said})
        if options.output == "table":
            word = "ok" if ok else "wrong"
            print(printable("%-12s %-6s %s" % (name, word, said)).rstrip(),
                  flush=True)
    wrong = [one["name"] for one in found if not one["ok"]]
    report(options, found, (), wrong)
    return int(bool(wrong))


def took(period):
    """Return a duration in words: 41 ms, 3.2 s, 4:05."""
    if period < 0.9995:
        return "%d ms" % round(1000 * period)
    return "%.3g s" % period if period < 59.95 else span(period)


def bar(part, width=20):
    """Return a bar of which `part` (0 to 1) is full, and its percentage."""
    full = int(part * width)
    return "[%s%s] %3d%%" % ("#" * full, "." * (width - full), part * 100)


class Progress:
    """Show progress: a bar on a terminal, else a line now and then."""

    def __init__(self, period=10):
        self.period = period  # seconds between two lines
        self.bar = sys.stderr.isatty()
        self.mutex = threading.Lock()  # one writes to the terminal at a time
        self.began = self.said = time.monotonic()
        self.line = ""
        self.midway = False  # whether the output is in mid-line

    def show(self, items, done, failed, fresh):
        """Show the figures, if it is time to; `fresh`: ended in this run."""
        now = time.monotonic()
        over, left = done + failed, items - done - failed
        rate = fresh / max(now - self.began, 0.001)
        text = "%d of %d done, %d failed" % (done, items, failed)
        if rate:
            text += ", %.1f/s, %s left" % (rate, span(left / rate))
        if self.bar:
            width = screen_size(sys.stderr)[0] - 1
            self.draw(("%s %s" % (bar(over / max(items, 1)), text))[:width])
        elif now - self.said >= self.period:
            self.said = now
            say(text)

    def draw(self, line):
        """Write the bar, on a line of its own."""
        with self.mutex:
            self.line = line
            if self.midway:
                say("")
                self.midway = False
            draw(line)

    def relay(self, source):
        """Copy output to the terminal, the bar kept below it."""
        for block in iter(lambda: source.read1(65536), b""):
            with self.mutex:
                if not self.midway:
                    draw("")
                sys.stderr.buffer.write(block)
                sys.stderr.flush()
                self.midway = not block.endswith(b"\n")
                if not self.midway:
                    draw(self.line)

    def end(self):
        """Remove the bar."""
        if self.bar:
            self.draw("")


# --------------------------------------------------------------- looking ---


# A job of each state in the bar of a stage, in order.
SIGNS = {
    "done": "#", "working": "=", "waiting": ".", "delayed": "-",
    "blocked": ":", "failed": "!", "aborted": "!", "cancelled": "x",
}


def stage_bar(stage, width=20):
    """Return a bar that shows which part of a stage's jobs is in each state.
    """
    states, jobs, drawn, n = stage["states"], stage["jobs"], "", 0
    for state, sign in SIGNS.items():
        n += states[state]
        drawn = drawn.ljust(n * width // max(jobs, 1), sign)
    return "[%s]" % drawn.ljust(width)


def names_of_stages(client):
    """Return {stage: its name} of the stages that have one."""
    return {stage: values["name"] for stage, values
            in client.stages().items() if "name" in values}


def workers_line(heard):
    """Return a sentence on the workers."""
    now, workers = heard["time"], heard["workers"]
    faults = Counter(fault(worker, now) for worker in workers)
    able = [worker for worker in workers if fault(worker, now) is None]
    line = "No worker takes jobs" if workers else "There are no workers"
    if able:
        slots, jobs = slots_and_jobs(able)
        line = "%s with %s, working on %s" % (
            number_of(len(able), "worker"), number_of(slots, "slot"),
            number_of(jobs, "job"))
    for word in ("drained", "quarantined", "silent"):
        line += ", %d %s" % (faults[word], word) if faults[word] else ""
    return line + "."


def why_nothing_moves(figures, heard):
    """Return why jobs wait that could be claimed, a sentence for each reason.

    Of what /status and /workers say. Stages with a worker that can take their
    jobs are left out.
    """
    reasons = {}  # [jobs, names of stages], by a reason for one and for more
    for figure in figures["stages"]:
        waiting = figure["states"]["waiting"]
        serving = [worker for worker in heard["workers"]
                   if figure["stage"] in (worker["stages"] or ())]
        faults = sorted({
            fault(worker, heard["time"]) or "" for worker in serving})
        if figure["paused"]:
            why = "it is paused", "they are paused"
        elif not serving:
            why = "no worker serves it", "no worker serves them"
        elif "" not in faults:
            which = "workers are " + " or ".join(faults)
            why = "its " + which, "their " + which
        elif all(is_too_small(worker, figure) for worker in serving
                 if fault(worker, heard["time"]) is None):
            needs = room_text(figure.get("cores"), figure.get("memory"))
            why = ("each job needs %s, more than its workers have" % needs,
                   "each job needs %s, more than their workers have" % needs)
        else:
            continue
        if waiting:
            found = reasons.setdefault(why, [0, []])
            found[0] += waiting
            found[1].append(figure["name"] or "stage %d" % figure["stage"])
    return ["%s wait%s in %s: %s." % (
        number_of(jobs, "job"), "s" * (jobs == 1),
        shorten(", ".join(names), 60), why[len(names) > 1])
        for why, (jobs, names) in reasons.items()]


def status_lines(figures, heard, *, bars=False):
    """Yield the lines of a table of the stages, and how far all is."""
    totals = dict(figures["totals"], stage="all", name=None, paused=False)
    columns = [
        ("stage", lambda stage: (stage["name"] or str(stage["stage"]))
            + ", paused" * stage["paused"]),
        ("jobs", "jobs")]
    if bars:
        columns.append(("", stage_bar))
    columns += [
        (state, lambda stage, state=state: stage["states"][state] or None)
        for state in STATES if totals["states"][state]]
    if totals["expired"]:
        columns.append(("expired", lambda stage: stage["expired"] or None))
    columns.append(("median", lambda stage: stage.get("runtime") and took(
        stage["runtime"]["median"])))
    yield from table(columns, [*figures["stages"], totals])
    yield progress_line(figures)
    yield workers_line(heard)
    reasons = why_nothing_moves(figures, heard)
    yield from reasons[:3]
    if len(reasons) > 3:
        yield "... and %s." % number_of(len(reasons) - 3, "more reason")


def watch_lines(figures, heard, height):
    """Return the lines of `status`, with bars, cut to a terminal's height."""
    lines = list(status_lines(figures, heard, bars=True))
    below = len(lines) - 1 - len(figures["stages"])
    more = len(lines) - height
    if more > 0:
        lines[-more - below - 1:-below] = [
            "... and %s" % number_of(more + 1, "more line")]
    return lines


def watch(options):
    """Show the status again every 2 seconds, until a signal.

    If standard output isn't a terminal, print a line when there is news, at
    most every 10 seconds.
    """
    live = sys.stdout.isatty()
    lines, news, said = [], None, -math.inf
    with using_worker() as worker, speaking(options, 0) as client:
        selector = selector_of(client, options.ids)
        while True:
            trouble = None
            try:
                figures = client.status(**selector)
                heard = client.workers()
            except worker.Unreachable as lost:
                trouble = "Trying again: " + printable(str(lost))
            if live:
                width, height = screen_size(sys.stdout)
                if not trouble:
                    lines = watch_lines(figures, heard, height - 3)
                shown = [clock_time(time.time()), *lines, trouble or ""]
                sys.stdout.write("\033[H%s\033[J" % "".join(
                    shorten(line, width - 1) + "\033[K\n" for line in shown))
            else:
                line = trouble or " ".join([
                    progress_line(figures),
                    *why_nothing_moves(figures, heard)])
                if line != news and time.monotonic() > said + 10:
                    news, said = line, time.monotonic()
                    print(clock_time(time.time()), line)
            sys.stdout.flush()
            time.sleep(2)


def pages(client, *, most=math.inf, after=None, **options):
    """Yield lists of jobs until there are no more, or were `most`."""
    while most > 0:
        limit = min(most, MAX_PAGE)
        page = client.jobs(after=after, limit=limit, **options)
        yield page["jobs"]
        after, most = page["after"], most - len(page["jobs"])
        if after is None:
            return


# What `jobs` shows of each, and what of those that have failed.
JOB_TABLE = (
    ("job", "jobid"), ("stage", label_of),
    ("state", lambda job: job["state"] + ", expired" * job["expired"]),
    ("since", lambda job: clock_time(job["since"])[:19]), ("worker", "worker"),
    ("attempt", lambda job: job["attempt"] or None),
    ("command", "command"),
)
FAILED_TABLE = (
    ("job", "jobid"), ("stage", label_of),
    ("since", lambda job: clock_time(job["since"])[:19]), ("worker", "worker"),
    ("exit", lambda job: last_attempt(job).get("exit_code")),
    ("said", lambda job: shorten(last_words(last_attempt(job)) or "", 60)),
    ("command", "command"),
)


def table_of_jobs(pages, columns=JOB_TABLE):
    """Yield a table of the jobs in `pages`, in parts, as they come."""
    widths = []
    for page in pages:
        yield "".join(line + "\n" for line in table(columns, page, widths))


def json_array(pages):
    """Yield the parts of a JSON array of what is in `pages`, one a line."""
    before = "[\n"
    for page in pages:
        if page:
            yield before + ",\n".join(map(to_json, page))
            before = ",\n"
    yield "[]\n" if before == "[\n" else "\n]\n"


def id_lines(pages):
    """Yield the ids of jobs, one a line."""
    for page in pages:
        yield "".join("%d\n" % job["jobid"] for job in page)


def csv_line(cells):
    """Return a line of a CSV file, by the rules of RFC 4180.

    Text stays as it is; other values are written as JSON.
    """
    file = io.StringIO(newline="")
    csv.writer(file).writerow([
        cell if type(cell) is str else "" if cell is None else to_json(cell)
        for cell in cells])
    return file.getvalue()


def csv_lines(pages):
    """Yield a line for each job, with its last attempt."""
    yield csv_line([*JOB_COLUMNS, *ATTEMPT_COLUMNS])
    for job in itertools.chain.from_iterable(pages):
        attempt = dict(last_attempt(job))
        if attempt:
            attempt["seconds"] = round(
                attempt["ended"] - attempt["started"], 3)
        job["item"] = item_of(job)
        yield csv_line([job[name] for name in JOB_COLUMNS]
                       + [attempt.get(name) for name in ATTEMPT_COLUMNS])


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
        (job["command"] or "").replace("\n", "\0"),
    )) + "\n"


def joblog_lines(pages):
    """Yield a line for each job of which an attempt has ended."""
    yield "Seq\tHost\tStarttime\tJobRuntime\tSend\tReceive\tExitval" \
        "\tSignal\tCommand\n"
    for job in itertools.chain.from_iterable(pages):
        if job["attempts"]:
            yield joblog_line(job)


def to_bytes(text):
    """Return `text` as bytes, names of files that aren't UTF-8 as they are.
    """
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return clean(text).encode()


# The forms in which jobs are printed.
FORMATS = {
    "table": table_of_jobs, "json": json_array, "quiet": id_lines,
    "csv": csv_lines, "joblog": joblog_lines,
}


def print_jobs(options):
    """List jobs, a page at a time, each with its last attempt."""
    form, output = FORMATS[options.output], sys.stdout.buffer
    if options.output == "table" and options.state == "failed":
        form = functools.partial(table_of_jobs, columns=FAILED_TABLE)
    with speaking(options) as client:
        found = pages(
            client, most=options.limit, order=options.order,
            stage=options.stage, state=options.state,
            attempts=None if form in (table_of_jobs, id_lines) else 1,
            **selector_of(client, options.ids))
        for text in form(found):
            output.write(to_bytes(text))
    output.flush()
    return 0


def poll_status(client, selector, patience=30):
    """Yield the status of jobs until they have ended, and once then.

    When nothing can run for `patience` seconds, print why, and again when
    the reasons change.
    """
    since, reasons, told, pause = time.monotonic(), [], [], 0.05
    while True:
        figures = client.status(**selector)
        yield figures
        states = figures["totals"]["states"]
        if not any(states[state] for state in UNENDED):
            return
        lines = why_nothing_moves(figures, client.workers())
        found = [line.partition(" in ")[2] for line in lines]
        if found != reasons:
            since, reasons = time.monotonic(), found
        elif reasons != told and time.monotonic() - since >= patience:
            told = reasons
            for line in lines:
                client.tell(line)
        time.sleep(pause)
        pause = min(1, 1.3 * pause)


ATTEMPT_TABLE = (
    ("attempt", "attempt"), ("stage", "stage"),
    ("worker", lambda attempt: attempt["worker"] or attempt["host"]),
    ("started", lambda attempt: clock_time(attempt["started"])),
    ("took", lambda attempt: took(attempt["ended"] - attempt["started"])),
    ("outcome", "outcome"), ("exit", "exit_code"), ("said", last_words),
)
DETAILS_ELSEWHERE = {  # of a job, shown in words, or not to people
    "jobid", "stage_name", "attempts", "why", "command", "jobcmd", "expired",
    "since", "due", "files", "progress"}


def details(job, names):
    """Yield the lines that show a job and its attempts to a person.

    `names` are those of stages.
    """
    rows = [("job", job["jobid"]), ("why", job["why"]),
            ("command", job["command"] or ""),
            ("since", clock_time(job["since"]))]
    if job["expired"]:
        rows.append(("expired", "its stage's lifetime is over"))
    if job["files"]:
        rows.append(("files", ", ".join(
            "%(path)s (%(size)d bytes)" % file for file in job["files"])))
    for name, value in dict(job, stage=label_of(job)).items():
        shown = value or (
            value == 0 and name in ("stage", "laststage", "made"))
        if shown and name not in DETAILS_ELSEWHERE:
            rows.append((name, value))
    for name, value in rows:
        text = value if type(value) is str else to_json(value)
        yield printable("%-12s  %s" % (name, text)).rstrip()
    if job["attempts"]:
        yield ""
        yield from table(ATTEMPT_TABLE, [
            dict(attempt, stage=names.get(attempt["stage"], attempt["stage"]))
            for attempt in job["attempts"]])
        said = (job["attempts"][-1]["stderr"] or "").splitlines()
        if len(said) > 1:
            yield "\nThe end of its standard error:"
            yield from ("  " + printable(line) for line in said)


def worker_lines(heard):
    """Return the lines of a table of the workers."""
    now = heard["time"]
    if not heard["workers"]:
        return ["There are no workers; those that have ended, or send no"
                " heartbeats, aren't shown."]
    return table((
        ("worker", "name"), ("host", "host"),
        ("stages", lambda worker: ",".join(
            name or str(stage) for stage, name in zip(
                worker["stages"] or (), worker["stage_names"] or ()))),
        ("slots", "slots"), ("busy", lambda worker: len(worker["holds"])),
        ("done", "done"), ("failed", "failed"),
        ("heard", lambda worker: span(max(0, now - worker["heard"])) + " ago"),
        ("", lambda worker: note(worker, now)),
    ), heard["workers"])


def failure_lines(found, names):
    """Yield two lines for each group of failures: the reason and a remedy."""
    for group in found["groups"]:
        how = "" if group["exit_code"] is None \
            else ", exit status %d" % group["exit_code"]
        where = " on %s" % group["host"] if group["host"] else ""
        if group.get("hosts", 1) > 1:
            where = " on %d hosts" % group["hosts"]
        yield printable("%s of stage %s%s%s: %s" % (
            number_of(group["jobs"], "job"),
            names.get(group["stage"], group["stage"]), how, where,
            group["message"] or "no message"))
        yield "    python3 jobman.py retry " + ids_text(joined(
            range(jobid, jobid + 1) for jobid in group["ids"]))
    left = found["failed"] - found["looked_at"]
    if left:
        yield "%s failed before these." % number_of(left, "job")
    elif not found["failed"]:
        yield "No job has failed."


def stats_lines(figures, names):
    """Return the lines of a table of the time that the jobs took."""
    def part(name, at):
        return lambda stage: took(stage[name][at]) if stage.get(name) else None

    ends = sorted({kind for stage in figures["stages"]
                   for kind in stage["outcomes"]})
    return table([
        ("stage", lambda s: str(names.get(s["stage"], s["stage"]))),
        ("claims", "claims"), ("retries", "retries"),
        *((kind, lambda s, kind=kind: s.get("outcomes", {}).get(
            kind, {}).get("attempts")) for kind in ends),
        ("run median", part("run", "median")), ("p95", part("run", "p95")),
        ("wait median", part("wait", "median")), ("p95", part("wait", "p95")),
        ("useful", lambda s: span(s["useful"])),
        ("lost", lambda s: span(s["lost"])),
        ("lifetime advised", lambda s: s.get("advised") and number_of(
            s["advised"], "minute")),
    ], [*figures["stages"], dict(figures["totals"], stage="all")])


def snapshot(options):
    """Write a status page that needs no server."""
    with speaking(options) as client:
        paths = {endpoint: path for _, path, endpoint in ROUTES}
        seen = {
            name: client.call("GET", paths[endpoint], options=asked)
            for name, endpoint, asked in OVERVIEW
        }
    path = write_snapshot(options.folder, seen)
    report(options, {"file": path}, [path], [path])
    return 0


def verify(options):
    """Check the files of all done jobs; send back the damaged ones."""
    checked, damaged, never = 0, [], threading.Event()
    with using_worker() as worker, speaking(options, PATIENCE) as client:
        for job in itertools.chain.from_iterable(pages(client, state="done")):
            checked += bool(job["files"])
            bad = worker.await_files(job["files"] or (), 0, never)
            late = job["since"] + options.lag - time.time()
            if bad and late > 0:  # a shared file system may show them late
                say("job %d: waiting for its files for up to %s" % (
                    job["jobid"], took(late)))
                bad = worker.await_files(bad, late, never)
            if not bad:
                continue
            names = [file["path"] for file in bad]
            damaged.append({"jobid": job["jobid"], "files": names})
            line = "missing or changed: " + printable(", ".join(names))
            if not options.dry_run:
                with contextlib.suppress(worker.Refused):  # it has moved since
                    line += " (now %(state)s in stage %(stage)d)" % \
                        client.reject_job(job["jobid"], error=line,
                                          files=job["files"])
            say("job %d: %s" % (job["jobid"], line))
    say("The files of %s checked: %d damaged." % (
        number_of(checked, "done job"), len(damaged)))
    report(options, {"checked": checked, "damaged": damaged}, (),
           [one["jobid"] for one in damaged])
    return 1 if damaged else 0


def wait_for_end(client, selector, end, progress):
    """Return how many jobs are in each state when all have ended.

    Returns None at `end`, a moment of the monotonic clock.
    """
    ended_before = None
    for figures in poll_status(client, selector):
        jobs, states = figures["totals"]["jobs"], figures["totals"]["states"]
        ended = jobs - sum(states[state] for state in UNENDED)
        if ended == jobs:
            return states
        left = end - time.monotonic()
        if left <= 0:
            return None
        client.patience = None if left == math.inf else left
        if ended_before is None:
            ended_before = ended
        progress.show(jobs, states["done"], ended - states["done"],
                      ended - ended_before)


def wait(options):
    """Return when jobs have ended; exit status 1 if some ended badly."""
    end = time.monotonic() + (
        math.inf if options.timeout is None else options.timeout)
    progress = Progress(math.inf)
    try:
        with speaking(options) as client:
            states = wait_for_end(
                client, selector_of(client, options.ids), end, progress)
    except CommandError:
        if time.monotonic() < end:
            raise
        states = None  # the server is away
    finally:
        progress.end()
    if states is None:
        say("jobman.py: Timed out: some jobs haven't ended.")
        return 124  # as timeout(1) does
    states = {state: states[state] for state in STATES if states[state]}
    ended = sum(states.values())
    line = ", ".join("%d %s" % (n, state) for state, n in states.items())
    report(options, {"jobs": ended, "states": states},
           ["%s ended%s." % (number_of(ended, "job"), line and ": " + line)])
    return int(options.exit_code and ended > states.get("done", 0))


def indexes(folder, space):
    """Return the paths of the indexes of a namespace's logs."""
    if not os.path.isdir(folder):
        return []
    return [os.path.join(folder, name) for name in sorted(os.listdir(folder))
            if name.split(".")[-3::2] == [space, "index"]]


def new_pieces(folder, space, wanted, places):
    """Return new output of the jobs `wanted`, from the logs.

    A list of (line of the index, path of the output), by job and in order.
    `places` has how far each index was read, and is brought up to date.
    """
    found = []
    for path in indexes(folder, space):
        lines, places[path] = index_lines(path, places.get(path, 0))
        output = path[: -len("index")] + "out"
        found += [(line, output) for line in lines if wanted(line[0])]
    return sorted(found, key=lambda piece: (piece[0][0], piece[0][3],
                                            *piece[0][1:3]))


def print_pieces(pieces, shown):
    """Print pieces of output, a line before each attempt; return the last.

    `shown` is the attempt that was printed last.
    """
    for (*attempt, stream, offset, length), path in pieces:
        if shown != attempt:
            shown = attempt
            jobid, stage, number, began = attempt
            say("--- job %d, stage %d, attempt %d, %s, %s" % (
                jobid, stage, number,
                os.path.basename(path).rsplit(".", 3)[0],
                clock_time(began / 1000)))
        target = sys.stdout if stream == 1 else sys.stderr
        try:
            with open_own(path) as file:
                file.seek(offset)
                text = file.read(min(length, MAX_LOG))
        except OSError as error:
            raise CommandError("The output in %s can't be read: %s." % (
                path, error.strerror)) from None
        target.buffer.write(text)
        target.flush()
    return shown


def ids_selected(client, options):
    """Return a function that tells whether a jobid is one of those named."""
    if type(options.ids) is list and options.stage is options.state is None:
        return lambda jobid: any(jobid in ids for ids in options.ids)
    named = selector_of(client, options.ids)
    found = pages(client, stage=options.stage, state=options.state, **named)
    return {job["jobid"] for page in found for job in page}.__contains__


def prune_logs(client, worker, folder=None):
    """Remove logs that have only output of deleted jobs.

    Those of workers that may still write to them are left alone. Returns how
    many bytes that freed.
    """
    folder = folder or worker.beside(client.access, "logs")
    found = indexes(folder, worker.namespace(client.jobix))
    if not found:
        return 0
    heard, freed = client.workers(), 0
    alive = {worker.file_name(each["name"], client.jobix).rsplit(".", 2)[0]
             for each in heard["workers"]
             if heard["time"] - each["heard"] < 2 * SILENT}
    there = {job["jobid"] for page in pages(client) for job in page}
    for index in found:
        jobs = {line[0] for line in index_lines(index)[0]}
        name = os.path.basename(index).rsplit(".", 3)[0]
        if jobs and name not in alive and not jobs & there:
            for path in (index, index[: -len("index")] + "out"):
                freed += os.stat(path).st_size
                os.unlink(path)
    return freed


def freed_text(size):
    """Return a sentence on how many bytes of output were removed."""
    text = "%d bytes" % size if size < 10**4 else "%.3g MB" % (size / 1e6)
    return "Freed %s: the output of deleted jobs." % text


def follow_logs(client, options, folder, space, wanted):
    """Print the output of jobs as it comes, until they have ended."""
    places, shown = {}, None
    for _ in poll_status(client, selector_of(client, options.ids), patience=5):
        shown = print_pieces(new_pieces(folder, space, wanted, places), shown)


def logs(options):
    """Print the output of jobs, attempt by attempt."""
    with using_worker() as worker, speaking(options) as client:
        if options.prune:
            print(freed_text(prune_logs(client, worker, options.logs)))
            return 0
        folder = options.logs or worker.beside(client.access, "logs")
        space = worker.namespace(client.jobix)
        wanted = ids_selected(client, options)
        if options.follow:
            follow_logs(client, options, folder, space, wanted)
            return 0
    pieces = new_pieces(folder, space, wanted, {})
    if not pieces:
        raise CommandError("There is no output of these jobs in %s." % folder)
    print_pieces(pieces, None)
    return 0


# ------------------------------------------------------------------- run ---


PART = 2000  # jobs that are added in a call
PART_SIZE = 2**20  # characters of them
QUOTED_ITEM = {"'": "'\"${JOBMAN_ITEM}\"'", '"': "${JOBMAN_ITEM}"}
SHELL_PIECE = re.compile(
    r"""(?P<item> \{\} ) | (?P<number> \{\#\} ) | \\. | \$\( | \$\{
    | (?P<foreign> \{ (?: [0-9]+ | //? | /?\. ) \} )  # as parallel has it
    | (?<![^\s;&|(`])\#[^\n]*  # a comment
    | .""",
    re.DOTALL | re.VERBOSE,
)


ARITHMETIC_ITEM = re.compile(r"\$\(\((?:(?!\)\)).)*\{\}", re.DOTALL)


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

    It takes the item from a variable, so that nothing in an item is ever
    executed. `{}` becomes one word, in quotes or not; `{#}`
    becomes `number`. Raises ValueError for `{.}`, `{/}`, `{1}` and the like
    outside of single quotes.
    """
    if ARITHMETIC_ITEM.search(command):
        raise ValueError("{} can't be in $((...)): write n={}; echo $((n+1))")
    script, quotes, i = [], [""], 0
    while i < len(command):
        match = SHELL_PIECE.match(command, i)
        piece, inside = match.group(), quotes[-1]
        if match.lastgroup == "item":
            script.append(QUOTED_ITEM.get(inside, '"${JOBMAN_ITEM}"'))
        elif match.lastgroup == "number":
            script.append(str(number))
        elif match.lastgroup == "foreign" and inside != "'":
            raise ValueError(
                "%s isn't supported, only {} and {#} are: let the shell do it,"
                " as in f={}; echo ${f%%.*}, or quote it as '%s' if you mean"
                " just that" % (piece, piece))
        else:
            if inside == "'" or (inside == '"' and piece[0] == "#"):
                piece = piece[0]  # means nothing special in there
            script.append(piece)
            turn_quotes(quotes, piece)
        i += len(piece)
    return "".join(script)


# First words that mean something to a shell: those are run by one.
SHELL_WORDS = frozenset((
    "alias", "bg", "break", "builtin", "case", "cd", "command", "continue",
    "coproc", "declare", "do", "done", "echo", "elif", "else", "enable",
    "esac", "eval", "exec", "exit", "export", "false", "fc", "fg", "fi",
    "for", "function", "getopts", "hash", "history", "if", "in", "jobs",
    "kill", "let", "local", "printf", "pwd", "read", "readonly", "return",
    "select", "set", "shift", "source", "test", "then", "time", "times",
    "trap", "true", "type", "typeset", "ulimit", "umask", "unalias", "unset",
    "until", "wait", "while", ".", ":",
))
PLAIN_WORD = re.compile(r"(?:[\w./,:+%@=-]|\{\})+", re.A)


def plain_words(command):
    """Return the words of a command that needs no shell, None for any other.

    Starting a shell takes as long as a short command does.
    """
    words = command.split(" ")
    program = words[0]
    if program in SHELL_WORDS or "=" in program or "{}" in program \
            or not all(map(PLAIN_WORD.fullmatch, words)):
        return None
    return words


def jobs_of(commands, items, common, start=1):
    """Yield a job for each item: the commands of its stages, and the item.

    `common` is what all jobs carry, their first stage with that. Stages of
    commands are two apart. Items are numbered from `start` on.
    """
    stages = itertools.count(common["jobstage"], 2)
    parsed = [(str(stage), command, plain_words(command),
               shell_script(command, start))
              for stage, command in zip(stages, commands)]
    for number, item in enumerate(items, start):
        steps = {}
        for stage, command, words, step in parsed:
            if words:
                step = [word.replace("{}", item) for word in words]
            elif "{#}" in command:
                step = shell_script(command, number)
            steps[stage] = step
        yield dict(common, jobcmd={"steps": steps, "item": item})


def print_commands(jobs):
    """Print the commands that jobs would run, a line each; return 0."""
    for job in jobs:
        jobcmd = job.get("jobcmd")
        for stage in steps_of(jobcmd) or [0]:
            command = command_text({"jobcmd": jobcmd, "stage": stage})
            print(printable(command or "null"))
    return 0


def from_utf8(text):
    """Return bytes as a string, those that aren't UTF-8 preserved."""
    return text.decode("utf-8", "surrogateescape")


def has_items(options):
    """Return whether there is a job for each of some items."""
    return bool(options.items is not None or options.arg_file or options.array)


# A command without any of these gets the item at its end.
ITEM_NAMES = "{}", "{#}", "JOBMAN_ITEM"


def steps_in(options):
    """Return the commands of a command line, one for each stage.

    With items each has the item in it, at the end if not before.
    """
    steps = [from_utf8(os.fsencode(step)) for step in options.steps]
    if not has_items(options):
        return steps
    return [step if any(name in step for name in ITEM_NAMES) else step + " {}"
            for step in steps]


def open_items(options):
    """Return the file that items come from, None without one."""
    if options.items is not None or options.array:
        return None
    name = options.arg_file
    source = 0 if name in (None, "-") else name  # 0 is standard input
    try:
        return open(source, "rb", buffering=0, closefd=source != 0)
    except OSError as error:
        raise CommandError(
            "Can't read %s: %s." % (name, error.strerror)) from None


def read_items(options, source):
    """Yield lists of items, of those that come in time as soon as they do."""
    if source is None:
        items = map(from_utf8, map(os.fsencode, options.items or ()))
        if options.array:
            items = map(str, itertools.chain.from_iterable(options.array))
        yield from iter(lambda: list(itertools.islice(items, PART)), [])
        return
    mark = b"\0" if options.null else b"\n"
    rest = []  # of an item that hasn't ended yet
    with source:
        for block in iter(lambda: source.read(16384), b""):
            *ended, end = block.split(mark)
            if ended:
                ended[0] = b"".join([*rest, ended[0]])
                yield list(map(from_utf8, ended))
                rest.clear()
            rest.append(end)
    if any(rest):
        yield [from_utf8(b"".join(rest))]


def run_carries(options):
    """Return what all jobs of a run have in common, except commands."""
    return {"jobstage": 0, "laststage": 2 * len(options.steps),
            "timeout": options.timeout or None}


# Options of `serve` that `run` sets by itself.
SERVED = {
    "host": "127.0.0.1", "port": 0, "url": None, "shared": False,
    "lapses": MAX_LAPSES, "keep_days": None, "open": False, "tls": False,
    "plain": False, "certfile": None, "keyfile": None, "new_jobix": False,
    "share_output": False,
}


class Run:
    """Commands for many items: their jobs, and their progress.

    A job is known by its commands, its item and how often that item came
    before: the same run, started again, finds its jobs.
    """

    NAMED = 10  # failures told one by one at the end

    def __init__(self, store, options):
        """Cancel the unfinished jobs of other runs and earlier starts.

        Jobs of this run are retried when they are added.
        """
        self.store, self.namespace = store, store.namespace
        self.steps = steps_in(options)
        self.common = run_carries(options)
        self.items = 0  # that have become jobs
        self.loaded = False
        self.error = None
        store.sweep(self.namespace, "cancel")
        before = store.states(self.namespace)
        self.done_before, self.is_new = before["done"], not before

    def load(self, lists):
        """Add the jobs of lists of items; the done ones stay so."""
        seen = Counter()
        try:
            for items in lists:
                self.add(items, seen)
        except (Error, OSError, sqlite3.Error) as error:
            self.error = error
        self.loaded = True

    def add(self, items, seen):
        """Add the jobs of some items, or bring them back."""
        keys, named = [], self.steps if len(self.steps) > 1 else self.steps[0]
        for item in items:
            seen[item] += 1
            known = to_json([named, item, seen[item]]).encode("ascii")
            keys.append((hashlib.sha256(known).hexdigest()[:32], 0, 1))
        jobs = jobs_of(self.steps, items, self.common, self.items + 1)
        given = self.store.submit(self.namespace, keys, read_jobs(jobs))
        if not self.is_new:
            self.store.sweep(self.namespace, "retry", state="cancelled",
                             ids=[ids[0] for ids in given])
        self.items += len(items)

    def figures(self):
        """Return whether it is over, and some numbers of jobs.

        How many there are, are done, have failed, and have come to either
        end since the start.
        """
        items, loaded = self.items, self.loaded
        states = self.store.states(self.namespace)
        left = sum(states[state] for state in UNENDED)
        failed = states["failed"]
        done = max(0, items - left - failed)
        fresh = states["done"] - self.done_before + failed
        return loaded and not left, items, done, failed, fresh

    def failures(self):
        """Return a line on each of the first few jobs that failed."""
        page, _ = self.store.jobs(
            self.namespace, order="id", after=None, limit=self.NAMED,
            stage=None, state="failed", attempts=1)
        for job, (attempt,) in page:
            line = "failed: " + str(from_json(job["jobcmd"])["item"])
            if len(self.steps) > 1:
                line += " in stage %s" % (job["stage_name"] or job["stage"])
            line += " (%s)" % attempt["error"]
            said = last_line(attempt["stderr"])
            yield printable(line + " " + said if said else line)


@contextlib.contextmanager
def worker_of_run(access_file, options, progress):
    """Run worker.py in a process of its own while the body runs; yield it.

    It ends when our end of the pipe to it closes, so also when we are
    killed. Its output to a terminal comes through us, above the bar.
    """
    stages = (str(2 * i) for i in range(len(options.steps)))
    command = [sys.executable, worker_script(), "--access", access_file]
    command += ["--print", "--spool", access_file + ".spool"]
    command += ["--until-eof", "--idle-timeout", "1000000000"]
    command += ["--stage", ",".join(stages)]
    command += ["--slots", str(options.slots)] if options.slots else []
    out = err = None
    if progress.bar and sys.stdout.isatty():
        out, err = subprocess.PIPE, subprocess.STDOUT
    elif progress.bar:
        err = subprocess.PIPE
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=out, stderr=err)
    with contextlib.ExitStack() as stack:
        stack.callback(progress.end)
        if err:
            source = process.stdout or process.stderr
            relay = threading.Thread(target=progress.relay, args=(source,))
            relay.start()
            stack.callback(relay.join)
        stack.callback(process.wait)
        try:
            yield process
        finally:
            process.stdin.close()  # it gives its jobs back
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
            process.kill()


def follow(batch, worker, progress, ending):
    """Show progress until a Run is over; return its last figures.

    And the number of the signal that ended it before, None without one; a
    closed pipe counts as SIGPIPE.
    """
    over = False
    while not over:
        ending.wait(0.05)
        over, *figures = batch.figures()
        batch.store.lock.require()
        if batch.error:
            raise CommandError("The jobs can't be added: %s" % batch.error)
        status = worker.poll()
        unread = status == 128 + signal.SIGPIPE
        if ending.number or unread:
            progress.end()
            say("%s; run the same command again to continue." % (
                "Nobody reads the output" if unread else "Interrupted"))
            return figures, signal.SIGPIPE if unread else ending.number
        if status is not None and not over:
            raise CommandError(
                "The worker has ended; run the same command again.")
        progress.show(*figures)
    return figures, None


def sum_up(batch, figures, progress, database):
    """Print the result of a run; return its exit status."""
    items, done, failed, fresh = figures
    for failure in batch.failures():
        say(failure)
    if failed > batch.NAMED:
        say("... and %d more. To see them all: python3 jobman.py serve --db"
            " %s, then python3 jobman.py failures" % (
                failed - batch.NAMED, shlex.quote(database)))
    before = done + failed - fresh
    if before > 0:
        say("%s done before and not run again; to run everything, use another"
            " --db, or remove the old one."
            % ("1 was" if before == 1 else "%d were" % before))
    say("%d of %d done, %d failed, in %s." % (
        done, items, failed, span(time.monotonic() - progress.began)))
    return 1 if failed else 0


def send_results(access_file):
    """Deliver the results that the worker of a killed run left on disk."""
    spool = access_file + ".spool"
    if os.path.isdir(spool):
        subprocess.call(
            [sys.executable, worker_script(), "--access", access_file,
             "--send-spool", "--spool", spool], stdout=subprocess.DEVNULL)


def run(options):
    """Run commands for each item; exit status 1 when a job failed."""
    source = open_items(options)
    items = read_items(options, source)
    if options.dry_run:
        return print_commands(jobs_of(
            steps_in(options), itertools.chain.from_iterable(items),
            run_carries(options)))
    worker_script()
    raise_file_limit(1024)  # the usual limit, which the commands inherit
    ending = until_signal()
    access_file = options.db + ".access"
    make_folder(options.db, warn=True)
    progress = Progress()
    served = argparse.Namespace(**dict(vars(options), **SERVED))
    with serving(served, access_file, ending) as (server, access):
        say("Watch it at " + page_address(access, access_file, sys.stderr))
        send_results(access_file)
        batch = Run(server.store, options)
        if options.names:
            server.store.set_stages(batch.namespace, {
                2 * i: {"name": name} for i, name in enumerate(options.names)})
        threading.Thread(target=batch.load, args=(items,), daemon=True).start()
        with worker_of_run(access_file, options, progress) as worker:
            try:
                figures, number = follow(batch, worker, progress, ending)
            finally:
                server.store.wait_queue.close()  # ends its long poll
        if number:
            return 128 + number
        return sum_up(batch, figures, progress, options.db)


# ---------------------------------------------------------------- acting ---

ASKED_FROM = 100  # confirm a change of more jobs or workers
IDS_AT_ONCE = 100000  # in one call


def confirm(options, n, things):
    """Ask before changing many things; raise CommandError for a no."""
    if n <= ASKED_FROM or options.yes:
        return
    what = "%s %d %s" % (options.command, n, things)
    if not (sys.stdin and sys.stdin.isatty() and sys.stderr.isatty()):
        raise CommandError("That would %s; add --yes to do it." % what)
    sys.stderr.write("%s? [y/N] " % (what[0].upper() + what[1:]))
    sys.stderr.flush()
    if sys.stdin.buffer.readline().strip().lower() not in (b"y", b"yes"):
        raise CommandError("Nothing was changed.")


def read_selection(text):
    """Return the jobs that IDS names: "all", or as read_ids()."""
    if text in STATES:
        raise argparse.ArgumentTypeError(
            "%r is a state: write --state %s" % (text, text))
    return text if text == "all" else read_ids(text)


def count_selected(client, options, states):
    """Return how many jobs a selection may change."""
    if type(options.ids) is list:
        return sum(map(len, options.ids))
    named = None if options.ids == "all" else options.ids
    return sum(
        stage["states"][state]
        for stage in client.status(**selector_of(client, named))["stages"]
        if options.stage in (None, stage["stage"], stage["name"])
        for state in states if options.state in (None, state)
    )


def selections(options):
    """Yield the selector of each call; ids go in parts."""
    narrowed = {"stage": options.stage, "state": options.state}
    if type(options.ids) is str and options.ids != "all":
        yield dict(narrowed, submission=options.ids)
    elif type(options.ids) is list:
        ids = itertools.chain.from_iterable(options.ids)
        for some in iter(lambda: list(itertools.islice(ids, IDS_AT_ONCE)), []):
            yield dict(narrowed, ids=some)
    elif options.stage is options.state is None:
        yield {"all": True}
    else:
        yield narrowed


def change_jobs(options):
    """Retry, cancel, release or forget the selected jobs."""
    if options.ids is options.stage is options.state is None:
        options.error("name jobs: 1,3,5-8, a submission, last or all, or by"
                      " --state or --stage")
    outcome, states = SWEEPS[options.command]
    changed = 0
    with speaking(options, PATIENCE) as client:
        confirm(options, count_selected(client, options, states), "jobs")
        try:
            for selector in selections(options):
                changed += getattr(client, options.command)(**selector)
        except BaseException:
            if changed:
                say("%s %s before that." % (
                    number_of(changed, "job"), outcome))
            raise
        freed = 0
        if options.command == "forget" and changed:
            with using_worker() as worker:
                freed = prune_logs(client, worker)
    line = "%s %s" % (number_of(changed, "job"), outcome)
    report(options, {outcome: changed}, [line])
    if freed:
        say(freed_text(freed))
    return 0


def change_workers(options):
    """Drain or undrain a worker, or all."""
    every, answers = options.worker == "all", []
    with speaking(options, PATIENCE) as client:
        names = [clean(from_utf8(os.fsencode(options.worker)))]
        if every:
            names = [worker["name"] for worker in client.workers()["workers"]]
            confirm(options, len(names), "workers")
        for name in names:
            try:
                answers.append(getattr(client, options.command)(name))
            except Exception as error:  # one of all may have ended meanwhile
                if not every or getattr(error, "status", None) != 404:
                    raise
    goes = "claims no more" if options.command == "drain" else "goes on"
    lines = ("%s %s" % (printable(answer["worker"]), goes)
             for answer in answers)
    report(options, answers, lines, [each["worker"] for each in answers])
    return 0


def move_jobs(options):
    """Move the expired jobs of a stage to another."""
    with speaking(options, PATIENCE) as client:
        confirm(options, sum(
            stage["expired"] for stage in client.status()["stages"]
            if options.old in (stage["stage"], stage["name"])), "jobs")
        answer = client.check_stages(options.old, options.new)
    moved = number_of(answer["n_bad_jobs were degraded:"], "expired job")
    report(options, answer, ["%s moved" % moved])
    return 0


def stage_lines(stages):
    """Return a table of what stages were given, {stage: values}."""
    return table((
        ("stage", "stage"),
        *((name, lambda values, name=name: values.get(name))
          for name in ("name", "minutes", "cores")),
        ("memory", lambda values: room_text(None, values.get("memory"))),
    ), [dict(values, stage=stage) for stage, values in stages.items()])


def lifetime_lines(minutes):
    """Return a table of {stage: minutes}, or the one lifetime asked for."""
    if type(minutes) is dict:
        return table((("stage", 0), ("minutes", 1)), minutes.items())
    return [str(minutes)]


def read_naming(text):
    """Return the stage and what STAGE or STAGE=NAME gives it."""
    stage, equals, name = text.partition("=")
    return read_stage(stage), {"name": name or None} if equals else {}


# The commands that only ask the server: the calls, the lines of their answers,
# and for how long to try. The first answer is what --output json prints.
CALLS = {
    "status": (
        lambda client, given: (
            client.status(**selector_of(client, given.ids)),
            client.workers()),
        status_lines, LOOKING_PATIENCE),
    "job": (
        lambda client, given: (
            client.job(given.jobid), names_of_stages(client)),
        details, LOOKING_PATIENCE),
    "workers": (
        lambda client, given: (client.workers(),),
        worker_lines, LOOKING_PATIENCE),
    "failures": (
        lambda client, given: (
            client.failures(**selector_of(client, given.ids)),
            names_of_stages(client)),
        failure_lines, LOOKING_PATIENCE),
    "stats": (
        lambda client, given: (client.stats(), names_of_stages(client)),
        stats_lines, LOOKING_PATIENCE),
    "stages": (
        lambda client, given: (client.stages(dict(given.names) or None),),
        stage_lines, PATIENCE),
    "lifetime": (
        lambda client, given: (
            client.init() if given.stage is None
            else client.lifetime(given.stage, given.minutes),),
        lifetime_lines, PATIENCE),
    "pause": (
        lambda client, given: (client.pause(given.stage), given.stage),
        lambda answer, stage: ["stage %s is paused" % stage], PATIENCE),
    "resume": (
        lambda client, given: (client.resume(given.stage), given.stage),
        lambda answer, stage: ["stage %s is resumed" % stage], PATIENCE),
}
# The part of the first answer that --output quiet prints.
QUIET = {
    "job": lambda job: [job["jobid"]],
    "workers": lambda heard: [worker["name"] for worker in heard["workers"]],
    "failures": lambda found: [
        jobid for group in found["groups"] for jobid in group["ids"]],
}


def make_calls(options):
    """Make the calls of a command in CALLS, and print their answers."""
    call, lines, patience = CALLS[options.command]
    with speaking(options, patience) as client:
        answers = call(client, options)
    names = QUIET.get(options.command, lambda answer: ())
    report(options, answers[0], lines(*answers), names(answers[0]))
    return 0


def set_lifetimes(options):
    """Set the lifetimes of the first stages, where there are none yet."""
    with speaking(options, PATIENCE) as client:
        found = client.init(*options.minutes)
    report(options, found, lifetime_lines(found))
    if options.minutes and found != dict(enumerate(options.minutes)):
        raise CommandError(
            "There are lifetimes already, and they are unchanged: change one"
            " with `lifetime STAGE MINUTES`.")
    return 0


def submit_carries(options, stage=None, laststage=None):
    """Return the fields of submitted jobs that options give."""
    entry = {
        "jobstage": stage, "laststage": laststage,
        "priority": options.priority, "max_attempts": options.max_attempts,
        "timeout": options.timeout, "after": options.after or None,
        "cwd": options.cwd and from_utf8(
            os.fsencode(os.path.abspath(options.cwd)))}
    return {name: value for name, value in entry.items() if value is not None}


def jobs_to_submit(options, stage, laststage):
    """Return the jobs of commands and items, or of lines that are commands."""
    stage, steps = stage or 0, steps_in(options)
    if laststage is None:
        laststage = stage + 2 * max(1, len(steps))
    try:
        options.cwd = options.cwd or os.getcwd()
    except FileNotFoundError:
        raise CommandError(
            "The current folder is gone; use --cwd DIR.") from None
    common = submit_carries(options, stage, laststage)
    if has_items(options):
        lists = read_items(options, open_items(options))
        items = itertools.chain.from_iterable(lists)
        if options.commands:
            return (dict(common, jobcmd=line) for line in items
                    if line.strip() and not line.startswith("#"))
        return jobs_of(steps, items, common)
    if len(steps) == 1:
        return [dict(common, jobcmd=steps[0])]
    stages = (str(stage + 2 * i) for i in range(len(steps)))
    return [dict(common, jobcmd={"steps": dict(zip(stages, steps))})]


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


def read_json(name):
    """Return the JSON object or list in a file, `-`: on standard input."""
    try:
        with open(0 if name == "-" else name, "rb") as file:
            jobs = DECODER.decode(file.read().decode("utf-8-sig"))
        if type(jobs) not in (dict, list):
            raise ValueError("it must be an object or a list.")
        return jobs
    except (OSError, ValueError, RecursionError, Error) as error:
        raise CommandError("Can't read jobs in %s: %s" % (
            name, cause(error))) from None


def jobs_from_json(jobs, common):
    """Return jobs of JSON; `common` has defaults for their fields.

    A job in a list without laststage is done two stages above its last
    command.
    """
    def complete(job):
        if type(job) is not dict:
            return job
        job = {"jobstage": 0, **common, **job}
        first = job.get("jobstage")
        if type(jobs) is list and job.get("laststage") is None \
                and type(first) is int:
            job["laststage"] = 2 + max([first, *steps_of(job.get("jobcmd"))])
        return job

    if type(jobs) is list:
        return list(map(complete, jobs))
    return {jobid: complete(job) for jobid, job in jobs.items()}


def set_from_json(client, jobs):
    """Add jobs under their own ids, if they don't exist yet.

    In one call where they wait for each other, unless they are too many.
    Returns ranges of their ids.
    """
    if not all(re.match("[0-9]{1,16}$", jobid) for jobid in jobs):
        raise CommandError("The keys of a JSON object of jobs must be jobids.")
    waits = any(type(job) is dict and job.get("after")
                for job in jobs.values())
    if waits and len(jobs) <= MAX_JOBS:
        client.call("POST", "/set", jobs)
    else:
        client.set(jobs)
    return joined(range(jobid, jobid + 1) for jobid in map(int, jobs))


def submit_parts(client, name, jobs):
    """Submit jobs in parts; return ranges of the ids that they are given.

    Each part of a submission is added once. If an earlier call broke off in
    a part, its first jobs exist already.
    """
    ranges, done = [], 0
    try:
        for part in in_parts(jobs):
            while part:
                ids = client.submit(name, part, part=done)
                if not 0 < len(ids) <= len(part):
                    raise CommandError("The name %s was used for other jobs;"
                                       " use another name." % name)
                ranges = joined([*ranges, range(ids[0], ids[-1] + 1)])
                done += len(ids)
                part = part[len(ids) :]
            draw(number_of(done, "job"))
    except BaseException as error:
        refused = isinstance(error, CommandError) or hasattr(error, "status")
        if done or not refused:  # if not, it may be in
            say("%s known to be added; the same command with --name %s adds"
                " the rest, and nothing twice." % (
                    "1 job is" if done == 1 else "%d jobs are" % done, name))
        raise
    finally:
        draw("")
    return ranges


def name_stages(client, known, stage, names):
    """Name the stages of commands; refuse to rename a stage."""
    changes = {}
    for number, name in zip(itertools.count(stage, 2), names):
        before = known.get(number, {}).get("name", name)
        if before != name:
            raise CommandError(
                "Stage %d has the name %s already: use that name, or other"
                " stages with --stage." % (number, before))
        changes[str(number)] = {"name": name}
    client.stages(changes)


def number_of_stage(known, stage):
    """Return the number of a stage that is given by its number or name."""
    numbers = {values.get("name"): each for each, values in known.items()}
    if type(stage) is str and stage not in numbers:
        raise CommandError("No stage has the name %s." % stage)
    return numbers.get(stage, stage)


def parents_named(client, named):
    """Return the jobids that --after names, None for none."""
    ranges = []
    for ids in named:
        if type(ids) is str:
            found, = client.submissions(ids)
            ids = read_ranges(found["ids"], "ids") if found["ids"] else []
        ranges += ids
    if sum(map(len, ranges)) > IDS_AT_ONCE:
        raise CommandError("--after can name up to %d jobs." % IDS_AT_ONCE)
    return list(itertools.chain.from_iterable(joined(ranges)))


def dry_run(options):
    """Print the commands that would be submitted; needs no server."""
    if options.from_json:
        jobs = jobs_from_json(read_json(options.from_json), {})
        return print_commands(jobs.values() if type(jobs) is dict else jobs)
    options.after, stage = None, options.stage
    return print_commands(jobs_to_submit(
        options, 0 if type(stage) is str else stage, 0))


def submit_jobs(options):
    """Add jobs: of commands and items, of lines, or described in JSON."""
    if options.dry_run:
        return dry_run(options)
    name = options.name or new_key()
    with speaking(options, PATIENCE) as client:
        known = client.stages()
        stage = number_of_stage(known, options.stage)
        laststage = number_of_stage(known, options.laststage)
        options.after = parents_named(client, options.after)
        if options.from_json:
            jobs = jobs_from_json(
                read_json(options.from_json),
                submit_carries(options, stage, laststage))
        else:
            jobs = jobs_to_submit(options, stage, laststage)
        if options.names:
            name_stages(client, known, stage or 0, options.names)
        if options.name and name in (
                found["key"] for found in client.submissions()):
            say("jobman.py: The submission %s exists already: only missing"
                " jobs are added." % name)
        if type(jobs) is dict:
            name, ranges = None, set_from_json(client, jobs)
        else:
            ranges = submit_parts(client, name, jobs)
    n, ids = sum(map(len, ranges)), ids_text(ranges)
    line = number_of(n, "job") + (": " + ids if ids else "")
    report(options, {"jobs": n, "ids": ids, "name": name}, [line],
           [ids] if ids else [])
    return 0


# ------------------------------------------------------------- data care ---


@contextlib.contextmanager
def exclusive_access(path):
    """Yield the DatabaseLocation of an existing database, ready to be read.

    On a network file system it is locked against servers meanwhile. The
    journal of a server that was killed in a commit is rolled back, which a
    read-only connection can't do.
    """
    with translate_errors(path), contextlib.ExitStack() as stack:
        location = DatabaseLocation(path)
        if inspect(path):
            check_folder(os.path.dirname(location.file), warn=True)
            if location.exclusive:
                stack.callback(ServerLock(location, shared=False).close)
                recover(location)
            elif os.path.exists(location.file + "-journal"):
                connection = connect(path, readonly=False)
                with contextlib.closing(connection):
                    connection.execute("select * from sqlite_master")
        if not inspect(path):  # killed as it created it
            raise CommandError("There is no database %s." % path)
        yield location


@contextlib.contextmanager
def open_snapshot(path):
    """Yield the `execute` of a connection to a snapshot of a database."""
    with exclusive_access(path) as location:
        connection = connect(path, readonly=True, vfs=location.vfs)
        with contextlib.closing(connection):
            connection.execute("begin")
            # the snapshot is that of the first read
            connection.execute("pragma user_version").fetchone()
            yield connection.execute


# No earlier token is accepted, and leases lapse at the next start.
END_CLAIMS = """
    update job set lease = 0 * lease, lapses = 0,
        claim = case state when 'working' then hex(randomblob(16)) end
    where claim is not null"""


def copy_tables(copy):
    """Copy all of the attached database `source`, in one transaction.

    The copy has no live claims: their workers go on with the source.
    """
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
    execute(END_CLAIMS)
    execute("commit")


def copy_database(location, target, show=lambda size: None):
    """Copy a database, even while it is served, to the new file `target`.

    The copy is a snapshot in one file of mode 0600. It gets its name when it
    is complete, so a full disk leaves nothing behind. `show` is called from
    time to time with the bytes written. Return the number of jobs. Raise
    CommandError if the copy can't be made.
    """
    refuse_leftovers(target, target + "-wal", target + "-journal")
    draft = "%s.new.%s" % (target, secrets.token_hex(4))
    source = file_uri(location.path, readonly=True, vfs=location.vfs)
    try:
        os.close(open_private(draft))
        # only this process knows the draft, so it needs no locks
        copy = connect(draft, readonly=False, vfs="unix-none")
        with contextlib.closing(copy):
            copy.execute("attach :source as source", {"source": source})
            copy.set_progress_handler(
                lambda: show(os.path.getsize(draft)), 10**5)
            copy_tables(copy)
            jobs = copy.execute("select count(*) from job").fetchone()[0]
        os.replace(draft, target)
    except (sqlite3.Error, OSError) as error:
        raise CommandError("The database %s can't be copied to %s: %s." % (
            location.path, target, cause(error)
        )) from None
    finally:
        remove(draft)
    return jobs


def backup(options):
    """Copy a database into a new file, also while a server uses it."""
    with exclusive_access(options.db) as location:
        total = os.path.getsize(location.file)
        try:
            jobs = copy_database(location, options.file, lambda size: draw(
                bar(min(1, size / total))))
        finally:
            draw("")
    size = os.path.getsize(options.file)
    report(options, {"file": options.file, "jobs": jobs, "bytes": size},
           ["%s: %s, %d bytes" % (
               printable(options.file), number_of(jobs, "job"), size)],
           [options.file])
    return 0


# The counts of `tally` that aren't those of the jobs.
WRONG_COUNTS = """
    select stage, state, sum(kept), sum(there), sum(kept_expired),
        sum(expired)
    from (select namespace, stage, state, jobs as kept, 0 as there,
            expired as kept_expired, 0 as expired from tally
        union all select namespace, stage, state, 0, count(*), 0,
            sum(expired) from job group by namespace, stage, state)
    group by namespace, stage, state
    having sum(kept) != sum(there) or sum(kept_expired) != sum(expired)"""


def check_pages(execute):
    """Yield the faults that SQLite finds."""
    for found, in execute("pragma integrity_check(5)"):
        if found != "ok":
            yield found


def check_schema(execute):
    """Yield the tables and indexes that are missing."""
    there = {name for name, in execute("select name from sqlite_master")}
    for kind, name in re.findall(r"create (table|index) (\w+)", SCHEMA):
        if name not in there:
            yield "there is no %s %s" % (kind, name)


def check_counts(execute):
    """Yield the stored counts that don't match the jobs."""
    for row in execute(WRONG_COUNTS):
        yield ("stage %s, %s: counted %s, there %s; expired %s, there %s"
               % tuple(row))


def check_all(path):
    """Yield the result of each check: its name, whether ok, a line."""
    with open_snapshot(path) as execute:
        for name, look in (("integrity", check_pages),
                           ("schema", check_schema), ("counts", check_counts)):
            found = []
            try:
                found.extend(look(execute))
            except sqlite3.Error as error:
                found.append("it can't be read: %s" % error)
            yield name, not found, "; ".join(found)
            if found:
                break  # the others need it


def check(options):
    """Check whether a database is intact, also while a server uses it."""
    return report_findings(options, check_all(options.db))


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

# pbsdsh starts programs with a bare environment, in the home folder.
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


def option_lines(prefix, words):
    """Return a script's lines for a batch system: each option on its own.

    A word that isn't an option goes on the line of the option before it.
    """
    lines = []
    for word in words:
        if word.startswith("-"):
            lines.append(prefix)
        lines[-1] += " " + shlex.quote(word)
    return "".join(line + "\n" for line in lines)


def batch_script(template, options, lines, *more):
    """Return a script that starts a worker, with options, on each node."""
    access = os.path.abspath(options.access or access_path())
    words = [sys.executable, worker_script(), "--access", access]
    words += [*more, *options.worker]
    return template % {
        "nodes": options.nodes,
        "time": span(options.time),
        "notice": min(LONGEST_NOTICE, max(1, options.time // 10)),
        "lines": lines,
        "worker": " ".join(map(shlex.quote, words)),
    }


def slurm_script(options):
    """Return a script for Slurm that starts a worker on each node."""
    lines = option_lines("#SBATCH", options.more)
    if not any(map(SHARED_NODES.match, options.more)):
        lines = "#SBATCH --exclusive\n" + lines
    return batch_script(SBATCH, options, lines)


def pbs_script(options):
    """Return a script for PBS that starts a worker on each node."""
    lines = option_lines("#PBS", options.more)
    for name, ours in (
        ("place", "scatter:exclhost"), ("select", str(options.nodes))
    ):
        if not re.search(r"-l ?'?(\S*,)?%s=" % name, lines):  # only once
            lines = "#PBS -l %s=%s\n%s" % (name, ours, lines)
    limit = "--time-limit", "%ds" % options.time  # pbsdsh hides it
    return batch_script(PBS, options, lines, *limit)


def print_script(options):
    """Print a script for a batch system."""
    write = slurm_script if options.command == "sbatch" else pbs_script
    sys.stdout.buffer.write(os.fsencode(write(options)))
    return 0


# How allocations are listed (number, name, user, time, state), submitted under
# a name and cancelled, and the file with the errors of one.
SLURM = {
    "in_names": "-slurm%s-", "script": slurm_script,
    "list": "squeue -ahu %d -o '%%i %%j %%u %%M %%t'" % os.getuid(),
    "submit": "sbatch --parsable -J", "cancel": "scancel",
    "errors": "slurm-%(number)s.out",
}
OPENPBS = {
    "in_names": "-pbs%s-", "script": pbs_script,
    "list": "qstat", "submit": "qsub -N", "cancel": "qdel",
    "errors": "%(name)s.e%(number)s",
}
QUEUED = frozenset(("PD", "Q", "H", "W", "T"))  # states, of both systems
PAUSES = 1, 15  # seconds between two looks at the queue, at least and at most


class BatchFailure(CommandError):
    """Say in one sentence what a batch system couldn't do."""


def ask_batch(command, *words, given=""):
    """Return what a batch system's command prints; BatchFailure if it fails.
    """
    command = [*shlex.split(command), *words]
    waiting = threading.Timer(5, say, ["Waiting for %s." % command[0]])
    waiting.start()
    try:
        done = subprocess.run(
            command, input=os.fsencode(given), stdout=subprocess.PIPE,
            stderr=subprocess.PIPE)
    except FileNotFoundError:
        raise CommandError(
            "There is no %s here: run alloc where you submit to the batch"
            " system." % command[0]) from None
    finally:
        waiting.cancel()
    if done.returncode:
        said = last_line(done.stderr.decode("utf-8", "replace"))
        raise BatchFailure("%s failed: %s." % (command[0], printable(
            said or "exit status %d" % done.returncode).rstrip(".")))
    return done.stdout.decode("utf-8", "replace")


class Allocator:
    """Submit allocations as the jobs of some stages need them.

    Its allocations have a name of their own, by which it finds them again.
    """

    def __init__(self, options, client, namespace):
        self.options, self.client = options, client
        self.system = OPENPBS if options.pbs else SLURM
        what = "%s %s" % (namespace, options.stages)
        digest = hashlib.sha256(os.fsencode(what)).hexdigest()
        self.name = "jobman-" + digest[:8]  # qstat shows 16 characters
        self.found = {}  # number of an allocation: whether it is queued
        self.heard = set()  # numbers of those whose workers were heard of
        self.fruitless = 0  # allocations in a row without a worker
        self.slots = options.slots * options.nodes  # of an allocation
        self.workers = []  # those that take jobs
        self.coming = 0  # allocations whose workers weren't heard of yet
        self.too_large = set()  # stages that need more than all of them have

    def list(self):
        """Return {number: whether it is queued} of our allocations."""
        rows = map(str.split, ask_batch(self.system["list"]).splitlines())
        return {row[0].partition(".")[0]: row[4] in QUEUED for row in rows
                if row[1:2] == [self.name]}

    def look(self):
        """Find our allocations, and their workers.

        Raises BatchFailure when one ended before its worker was heard of,
        CommandError for the third in a row.
        """
        found, told = self.list(), self.client.workers()
        workers = {number: [
            worker for worker in told["workers"]
            if self.system["in_names"] % number in worker["name"]
        ] for number in {*self.found, *found}}
        heard = {number for number in workers if any(
            worker["quarantine"] is None for worker in workers[number])}
        if heard - self.heard:
            self.fruitless = 0
        self.heard |= heard
        self.slots = max([self.slots] + [
            slots_and_jobs(workers[number])[0] for number in heard])
        self.workers = [
            worker for number in found for worker in workers[number]
            if not fault(worker, told["time"])]
        self.coming = len(found.keys() - self.heard)
        lost = sorted(self.found.keys() - found - self.heard)
        self.found = found
        self.fruitless += len(lost)
        if lost:
            said = "Allocation %s ended before its worker was heard of: look" \
                " into %s." % (lost[-1], self.system["errors"] % {
                    "name": self.name, "number": lost[-1]})
            if self.fruitless < 3:
                raise BatchFailure(said)
            raise CommandError(
                said + " After three in a row no more are submitted.")

    def decide(self):
        """Submit, cancel or wait; return what was done, and why.

        Returns None when all jobs have ended and no allocation is left.
        """
        self.look()
        figures = self.client.status()
        stages = self.fitting([
            stage for stage in figures["stages"]
            if not stage["paused"] and not {
                stage["stage"], stage["name"]}.isdisjoint(self.options.stages)
            and stage["states"]["waiting"]])
        waiting = sum(stage["states"]["waiting"] for stage in stages)
        cores = max([stage.get("cores", 1) for stage in stages], default=1)
        room = self.slots // cores * self.coming + sum(
            max(0, (worker["slots"] or 0) // cores - len(worker["holds"]))
            for worker in self.workers)
        queued = [number for number in self.found if self.found[number]]
        there = "%d running, %d queued: " % (
            len(self.found) - len(queued), len(queued))
        why = "%s waiting, room for %d" % (
            number_of(waiting, "job"), room)
        if self.too_large:
            why += ", stages too large for its nodes: " + ", ".join(
                map(str, sorted(self.too_large)))
        if not any(figures["totals"]["states"][state] for state in UNENDED):
            if not self.found:
                return None
            what = self.cancel(queued) if queued else "waiting for the end"
            return there + what, "all jobs have ended"
        if waiting <= room:
            what = "enough for now"
        elif len(self.found) >= self.options.max:
            what = "--max is reached"
        elif len(queued) >= self.options.backlog:
            what = "--backlog is reached"
        else:
            what = self.submit()
        return there + what, why

    def fitting(self, stages):
        """Return those stages whose jobs some worker of ours had room for.

        Without a worker that is any stage that wasn't too large before.
        """
        for stage in stages if self.workers else ():
            if all(is_too_small(worker, stage) for worker in self.workers):
                self.too_large.add(stage["stage"])
            else:
                self.too_large.discard(stage["stage"])
        return [stage for stage in stages
                if stage["stage"] not in self.too_large]

    def submit(self):
        """Submit an allocation; return what was done."""
        if self.options.dry_run:
            return "would submit one"
        script = self.system["script"](self.options)
        said = ask_batch(self.system["submit"], self.name, given=script)
        last = said.strip().rpartition("\n")[2]  # sites may print more
        number = re.split("[.;]", last)[0]  # without the server's name
        self.found[number] = True
        return "submitted " + number

    def cancel(self, numbers):
        """Cancel allocations; return what was done."""
        said = ", ".join(numbers)
        if self.options.dry_run:
            return "would cancel " + said
        ask_batch(self.system["cancel"], *numbers)
        self.heard.update(numbers)  # they haven't failed
        return "cancelled " + said


def alloc(options):
    """Submit allocations while jobs wait for them, until all have ended."""
    options.worker[:0] = ["--idle-timeout", str(options.idle)]
    ending, (pause, longest), told = until_signal(), PAUSES, None
    with using_worker() as worker, speaking(options) as client:
        allocator = Allocator(
            options, client, worker.namespace(client.jobix))
        while not ending.number:
            try:
                decision = allocator.decide()
            except (BatchFailure, worker.Unreachable) as failure:
                if told is None:  # it hasn't worked yet
                    raise
                decision = printable(str(failure)), "trying again"
            if decision is None:
                print("All jobs have ended, and no allocation is left.")
                return 0
            what, why = decision
            pause = min(1.5 * pause, longest) if what == told else PAUSES[0]
            if what != told and not ending.number:
                print("%s %s (%s)" % (clock_time(time.time()), what, why))
            if options.dry_run:
                return 0
            told = what
            ending.wait(pause)
        if allocator.found and options.cancel:
            say(allocator.cancel(allocator.found).capitalize() + ".")
        elif allocator.found:
            say("Interrupted; allocations go on: %s cancels them." % " ".join(
                [allocator.system["cancel"], *allocator.found]))
    return 128 + ending.number


# ---------------------------------------------------------------- doctor ---

def check_program(found):
    """Return the versions of Python, SQLite and jobman."""
    if found.worker.__version__ != __version__:
        raise CommandError(
            "worker.py is version %s and jobman.py %s; copy both files of the"
            " same version"
            % (found.worker.__version__, __version__))
    return "jobman.py and worker.py %s, Python %s, SQLite %s" % (
        __version__, sys.version.split()[0], sqlite3.sqlite_version)


def check_access(found):
    """Return the path, mode and age of the access file."""
    client = found.client = found.worker.Client(found.access, patience=0)
    client.CONNECT_TIMEOUT = 4
    if client.fixed:
        return "none is read, JOBMAN_URL names the server"
    path = os.path.abspath(client.access)
    with open(path, encoding="utf-8") as file:
        found.about = json.load(file)
        written = os.fstat(file.fileno()).st_mtime
    return "%s, for its owner only, written %s ago" % (
        path, took(max(0, time.time() - written)))


def check_address(found):
    """Return the server's address, unless it is one of another host only."""
    host, port = found.client.address
    home = found.about.get("host")
    if host in ("127.0.0.1", "::1", "localhost") and home not in (
            None, socket.gethostname()):
        raise CommandError(
            "The server listens only on its own host %s; start it with --host"
            " 0.0.0.0" % home)
    return "%s, port %d" % (host, port)


def check_connection(found):
    """Return how the server is known, if its port takes connections."""
    client = found.client
    try:
        client.connect(4)
    except found.worker.Impostor as error:
        raise CommandError("It is not the server of the access file (%s); end"
                           " it, or use its access file" % error) from None
    except (OSError, http.client.InvalidURL) as error:
        advice = "look for a firewall, or start serve with another --url"
        if isinstance(error, ConnectionRefusedError):
            advice = "no server listens there: start it"
        raise CommandError("It can't be reached (%s); %s" % (
            cause(error), advice)) from None
    if client.tls is None:
        return "it takes connections, plain HTTP"
    return "it takes connections, with %s" % (
        "the right fingerprint" if client.fingerprint
        else "a certificate from a trusted authority")


def check_server(found):
    """Return a line if the server and its database answer."""
    client = found.client
    try:
        version = client.call("GET", "/health", timeout=4)["version"]
    except found.worker.Unreachable as error:
        raise CommandError("%s Look at its standard error" % error) from None
    except (LookupError, TypeError, ValueError):
        raise CommandError(
            "The program at %s:%d is not a jobman server; look at the address"
            " in the access file" % client.address) from None
    if version != __version__:
        raise CommandError(
            "The server is jobman %s, this is %s; use the same version on both"
            " sides" % (version, __version__))
    return "it answers, and so does its database"


def check_jobix(found):
    """Return a line if the server accepts our jobix."""
    try:
        figures = found.client.call("GET", "/status", timeout=4)
    except found.worker.Refused as refused:
        if refused.status != 403:
            raise
        raise CommandError("The server doesn't accept our jobix; use the"
                           " access file that it wrote") from None
    return "it is accepted" + ", for reading only" * figures["readonly"]


def check_database(found):
    """Return the database and its schema, None if there is none."""
    path = found.db or home_file("jobman.db")
    if not (found.db or os.path.lexists(path)):
        return None
    version = inspect(path)
    found.location = DatabaseLocation(path)
    folder = os.path.dirname(found.location.file)
    if os.path.isdir(folder):
        check_folder(folder)
    if version == 0:
        return "%s isn't there yet; serve makes it" % path
    if not os.access(path, os.W_OK):
        raise CommandError("%s isn't writable; chmod u+w it" % path)
    return "%s, schema %d" % (path, version)


def check_locks(found):
    """Return what file system the database is on."""
    location = found.location
    if not location.locks_work:
        raise CommandError("%s; use a disk of this host" % location.describe())
    only = " (a network file system, so only one server can use it)"
    return "%s, where locks work%s" % (
        location.describe(), only if location.exclusive else "")


def check_holder(found):
    """Return which server uses the database."""
    location = found.location
    holder = read_holder(location)
    if not holder:
        return "no server uses %s" % location.path
    name, running = name_holder(holder), is_running(holder)
    if running is False:
        return "%s had %s and has ended; serve would take it" % (
            name, location.path)
    ours = [found.about.get(key) for key in ("host", "pid")]
    shared = os.path.exists(location.file + ".gate")
    if not shared and None not in ours and ours != [
            holder.get("host"), holder.get("pid")]:
        raise CommandError(
            "%s serves %s, but the access file is of process %s on %s; name"
            " the access file of that server" % (
                name, location.path, ours[1], ours[0]))
    return "%s serves %s%s" % (
        name, location.path, "" if running else ", if it is still alive there")


# The lines of doctor, in two rows. A check that fails, or finds nothing to
# check, ends its row, since those after it depend on it.
DOCTOR_CHECKS = (
    (("program", check_program), ("access", check_access),
     ("address", check_address), ("connection", check_connection),
     ("server", check_server), ("jobix", check_jobix)),
    (("database", check_database), ("locks", check_locks),
     ("holder", check_holder)),
)


def examine(options):
    """Yield the result of each check: a name, whether ok, and a line."""
    with using_worker() as worker:
        found = argparse.Namespace(
            worker=worker, access=options.access, db=options.db, client=None,
            about={}, location=None)
        failures = CommandError, OSError, ValueError, worker.Trouble
        for checks in DOCTOR_CHECKS:
            for name, check in checks:
                try:
                    ok, said = True, check(found)
                except failures as error:
                    ok, said = False, str(error)
                if said:
                    yield name, ok, said.rstrip(".")
                if not (ok and said):
                    break
        if found.client:
            found.client.close()


def doctor(options):
    """Check Python, the access file, the server and the database."""
    return report_findings(options, examine(options))


# ------------------------------------------------------------------ main ---


def argument(reader):
    """Return `reader`, of a request's values, as one of arguments."""

    def read(text):
        try:
            return reader(number(text), "it")
        except Error as error:
            raise argparse.ArgumentTypeError(
                "%.80r: %s" % (text, error)) from None

    return read


def did_you_mean(word, words):
    """Return a question that names the word that was meant, "" without one.
    """
    close = difflib.get_close_matches(word, words, 1)
    return "; did you mean %s?" % close[0] if close else ""


def one_of_words(*words):
    """Return a reader of one of some words, for argparse."""
    def read(text):
        if text not in words:
            raise argparse.ArgumentTypeError("%.80r isn't one of %s%s" % (
                text, ", ".join(words), did_you_mean(text, words)))
        return text

    return read


def option(*names, **settings):
    """Return an option, or argument, of a command, as argparse describes it.
    """
    return names, settings


def read_name(text):
    """Return a name, of jobs or a stage; ArgumentTypeError for none."""
    if not is_stage_name(text):
        raise argparse.ArgumentTypeError(
            "%.80r can't be a name: a name is a letter and up to 63 of A-Z a-z"
            " 0-9 _ . -, but not all or last" % text)
    return text


def read_names(text):
    """Return the names of stages in A,B,C; ArgumentTypeError for others."""
    names = list(map(read_name, text.split(",")))
    if len(set(names)) < len(names):
        raise argparse.ArgumentTypeError("%.80r has a name twice" % text)
    return names


def state_option(*states):
    """Return the option that narrows a selection to one of some states."""
    return option("--state", type=one_of_words(*states), metavar="STATE",
                  help="only jobs in this state: " + ", ".join(states))


ACCESS = option(
    "--access", metavar="FILE",
    help="the server's access file (default ~/.jobman/access.json)")
OUTPUT = option(
    "--output", choices=("table", "json", "quiet"), default="table",
    help="how to print the result (default table)")
CLIENT = ACCESS, OUTPUT
STATE_OPTION = state_option(*STATES)
STAGE_OPTION = option(
    "--stage", type=read_stage, metavar="STAGE",
    help="only jobs in this stage: its number or name")
YES = option(
    "--yes", action="store_true",
    help="change more than %d jobs or workers without asking" % ASKED_FROM)
DATABASE = option(
    "--db", default=home_file("jobman.db"), metavar="FILE",
    help="the database (default ~/.jobman/jobman.db)")
ANY_DATABASE = option(
    "--db", metavar="FILE",
    help="the database (default: ~/.jobman/jobman.db, if it exists)")
A_STAGE = option("stage", type=read_stage, metavar="STAGE")
A_JOB = option("jobid", type=argument(JOBID), metavar="JOBID")
A_WORKER = option("worker", metavar="WORKER",
                  help="the name of a worker, or all")
SELECTION = (
    option("ids", nargs="?", type=read_selection, metavar="IDS",
           help="jobids such as 1,3,5-8, the name of a submission, last, or"
           " all"),
    STATE_OPTION, STAGE_OPTION, *CLIENT, YES)
IDS = option(
    "ids", nargs="?", type=read_ids, metavar="IDS",
    help="only these jobs: jobids such as 1,3,5-8, the name of a submission,"
    " or last")
JOBS = (
    IDS, state_option(*STATES, "expired"), STAGE_OPTION, ACCESS,
    option("--order", choices=("id", "time"), default="id",
           help="sort by id (default), or longest in their stage first"),
    option("--limit", type=argument(integer(1, MAX_JOBID)), default=math.inf,
           metavar="N", help="show at most N jobs (default: all)"))
NAMES = option(
    "names", nargs="*", type=read_naming, metavar="STAGE[=NAME]",
    help="a stage, or a name for it, as in 0=fetch; 0= removes the name")
NEEDS = (
    option("--cores", type=argument(CORES), metavar="N",
           help="cores that each job of these stages needs (at first 1)"),
    option("--memory", type=argument(memory_size), metavar="SIZE",
           help="memory that each job needs, as 500M or 4G; 0: none"))
MINUTES_OF_STAGES = option(
    "minutes", nargs="*", type=argument(MINUTES), metavar="MINUTES",
    help="lifetimes of stage 0, stage 1, and so on; 0: no limit")
LIFETIME = (
    option("stage", nargs="?", type=read_stage, metavar="STAGE"),
    option("minutes", nargs="?", type=argument(MINUTES), metavar="MINUTES",
           help="0: no limit"))
FOLDER = option("folder", metavar="DIR",
                help="the folder to write status.html to")
COPY = option("file", metavar="FILE", help="the file to copy to")
MOVE = (option("old", type=read_stage, metavar="OLD"),
        option("new", type=read_stage, metavar="NEW"))
VERIFY = (
    option("--lag", type=duration, default=10, metavar="TIME",
           help="how long to wait for files of other nodes to appear here"
           " (default 10s)"),
    option("--dry-run", action="store_true",
           help="only print which files are damaged"))


RETRIES = argument(integer(0, 999999))
SERVE = (
    DATABASE,
    option("--host", default="127.0.0.1",
           help="the address to listen on (default 127.0.0.1)"),
    option("--port", type=argument(integer(0, 65535)), default=8642,
           metavar="N", help="the port (default 8642; 0: any free port)"),
    option("--access", metavar="FILE",
           help="the access file to write, by which workers find the server"
           " (default ~/.jobman/access.json)"),
    option("--url", help="the server's address for clients, if they can't use"
           " its host name and port"),
    option("--jobix-file", metavar="FILE",
           help="accept the jobix in FILE (default: a random number)"),
    option("--new-jobix", action="store_true",
           help="replace both jobix and keep the jobs; the old ones are"
           " refused from now on"),
    option("--open", action="store_true",
           default=os.environ.get("JOBMAN_OPEN") == "1",
           help="accept any jobix"),
    option("--share-output", action="store_true",
           help="show the output of jobs to the reading jobix, too"),
    option("--shared", action="store_true",
           help="allow other servers on this host to use the same database"),
    option("--tls", action="store_true",
           help="speak HTTPS at 127.0.0.1, too"),
    option("--plain", action="store_true",
           help="speak plain HTTP at any --host"),
    option("--certfile", metavar="FILE",
           help="speak HTTPS, with the certificate in FILE (PEM; default: one"
           " that openssl makes)"),
    option("--keyfile", metavar="FILE",
           help="the certificate's key, if it isn't in the same file"),
    option("--snapshot", metavar="DIR",
           help="write DIR/status.html, a page for colleagues, every minute"),
    option("--retries", type=RETRIES, default=MAX_ATTEMPTS - 1, metavar="N",
           help="how often to try a failed job again in a stage, unless the"
           " job has its own number (default %d)" % (MAX_ATTEMPTS - 1)),
    option("--lapses", type=argument(integer(1, 1000000)), default=MAX_LAPSES,
           metavar="N", help="how many leases may lapse in a stage before a"
           " job is failed (default %d)" % MAX_LAPSES),
    option("--keep-days", type=argument(integer(1, 100000)), metavar="N",
           help="delete old attempts of jobs that were done or cancelled N"
           " days ago (default: keep all)"),
)


STEPS = (
    option("words", nargs=argparse.REMAINDER, metavar="COMMAND",
           help="the command; {} is the item; without {} the item is added at"
           " the end"),
    option("--then", action="append", default=[], metavar="COMMAND",
           help="a command for the next stage, run when the command before it"
           " has succeeded; repeat it for more stages"),
    option("--names", type=read_names, metavar="NAME,...",
           help="names for the stages, one for each command"),
    option("-a", "--each-line", "--arg-file", dest="arg_file", metavar="FILE",
           help="read items from FILE, one on each line; -: standard input"),
    option("-0", "--null", action="store_true",
           help="items end in a zero byte, as find -print0 writes them"),
    option("--array", type=read_array, metavar="NUMBERS",
           help="use numbers as items: 1-1000, 1-9:2,12"),
    option("--timeout", type=duration, metavar="TIME",
           help="how long a command may take: 90, 90s, 2h30m (default: no"
           " limit)"),
    option("--dry-run", action="store_true",
           help="only print the commands"))
RUN = (
    *STEPS,
    option("--db", default="jobman-run.db", metavar="FILE",
           help="the database of the run (default jobman-run.db)"),
    option("--slots", type=argument(integer(1, 100000)), metavar="N",
           help="how many commands to run at a time (default: one for each"
           " core)"),
    option("--retries", type=RETRIES, default=0, metavar="N",
           help="how often to try a failed command again (default 0)"))
SUBMIT = (
    *STEPS,
    option("--commands", metavar="FILE",
           help="add a job for each line of FILE, a command; -: standard"
           " input"),
    option("--from-json", metavar="FILE",
           help="add the jobs in FILE, in the JSON of /set or /submit; other"
           " options are defaults for them; -: standard input"),
    option("--stage", type=read_stage, metavar="STAGE",
           help="the stage of the first command, a number or a name (default"
           " 0)"),
    option("--laststage", type=read_stage, metavar="STAGE",
           help="the stage in which jobs are done (default: two above the"
           " last command)"),
    option("--priority", type=argument(CARRIES["priority"]), metavar="N",
           help="jobs with a higher number go first (default 0)"),
    option("--retries", type=RETRIES, metavar="N",
           help="how often to try a failed command again (default: that"
           " of serve --retries)"),
    option("--max-attempts", type=argument(CARRIES["max_attempts"]),
           help=argparse.SUPPRESS),  # one more
    option("--cwd", metavar="DIR",
           help="the folder to run commands in (default: this folder)"),
    option("--after", type=read_ids, action="append", default=[],
           metavar="IDS", help="wait until these jobs are done: 1,3,5-8, or"
           " the name of a submission"),
    option("--name", "--key", type=read_name, metavar="NAME",
           help="the name of this submission in other commands; the same"
           " command with the same name adds no job twice"),
    *CLIENT)
WAIT = (
    IDS,
    option("--exit-code", action="store_true",
           help="exit with status 1 if a job failed, was aborted or was"
           " cancelled"),
    option("--timeout", type=duration, metavar="TIME",
           help="give up after this time (90, 90s, 2h30m), with exit status"
           " 124"),
    *CLIENT)
LOGS = (
    IDS, STATE_OPTION, STAGE_OPTION, ACCESS,
    option("-f", "--follow", action="store_true",
           help="go on printing new output until the jobs have ended"),
    option("--prune", action="store_true",
           help="remove the output of forgotten jobs"),
    option("--logs", metavar="DIR", help="the folder where workers keep output"
           " (default: logs, next to the access file)"))
TOPIC = option("topic", nargs="?", metavar="TOPIC")
BATCH = (
    option("--nodes", type=argument(integer(1, 100000)), default=1,
           metavar="N", help="how many nodes, with a worker on each (default"
           " 1)"),
    option("--time", required=True, metavar="TIME",
           help="the time limit: 1:00:00, 1-12:00:00, 90m, 2h30m"),
    option("--worker", default="", metavar="'OPTIONS'",
           help="options for worker.py, quoted as one word"),
    ACCESS)
ALLOC = (
    *BATCH,
    option("--max", type=argument(integer(1, 100000)), required=True,
           metavar="N", help="how many allocations at most, queued ones"
           " included"),
    option("--backlog", type=argument(integer(1, 100000)), default=1,
           metavar="N", help="how many may be queued at a time (default 1)"),
    option("--idle", type=duration, default=300, metavar="TIME",
           help="a worker without jobs ends after 90, 90s, 2h30m or so"
           " (default 5m)"),
    option("--dry-run", action="store_true",
           help="print what it would do now, and why, and end"),
    option("--cancel", action="store_true",
           help="when Ctrl-C or a signal ends it, cancel its allocations"),
    option("--pbs", action="store_true", help="submit to PBS, by qsub"))


def jobs_output(default):
    """Return the option by which jobs are printed."""
    return option(
        "--output", "--format", choices=tuple(FORMATS), default=default,
        help="how to print them: %s (default %s)" % (
            ", ".join(FORMATS), default), metavar="FORM")


def check_serve(parser, options):
    """End with exit status 2 for bad options of serve."""
    if options.tls + options.plain + bool(options.certfile) > 1:
        parser.error("choose one of --tls, --plain and --certfile")
    if options.keyfile and not options.certfile:
        parser.error("--keyfile needs --certfile")
    given = options.jobix_file or "JOBMAN_JOBIX" in os.environ
    if options.new_jobix and (given or options.shared or options.open):
        parser.error("--new-jobix can't be combined with --jobix-file,"
                     " JOBMAN_JOBIX, --shared or --open")


def check_steps(parser, options):
    """Split commands into stages; end with exit status 2 for bad ones."""
    meant = options.words[:1] == ["--"]
    words = options.words[meant:]
    steps = [[]]
    for word in words:
        if word == "--then":
            steps.append([])
        elif meant or len(steps[-1]) == 0 or not (
                word.startswith("--")
                and word.partition("=")[0] in parser._option_string_actions):
            steps[-1].append(word)
        else:
            parser.error("%s comes after the command: put it before, or write"
                         " -- before the command if it belongs to it" % word)
    steps = [" ".join(step) for step in steps]
    options.steps = steps[:1] + options.then + steps[1:]
    if len(options.steps) > 1 and not all(map(str.strip, options.steps)):
        parser.error("--then needs a command before and after it")
    if options.names and len(options.names) != len(options.steps):
        parser.error("give --names a name for each command, %d in all"
                     % len(options.steps))
    for word in (*words, *(options.items or ())):
        if re.fullmatch(":::+[+]?", word):
            parser.error("a second ::: isn't supported: give one list of"
                         " items")
    if has_items(options):
        try:
            for step in options.steps:
                shell_script(step, 1)
        except ValueError as error:
            parser.error(str(error))


def check_sources(parser, options):
    """Return the options that give jobs; end with status 2 for several."""
    found = ["items after :::"] if options.items is not None else []
    found += [name for name, value in (
        ("--each-line", options.arg_file), ("--array", options.array),
        ("--commands", vars(options).get("commands")),
        ("--from-json", vars(options).get("from_json"))) if value]
    if len(found) > 1:
        parser.error("give %s, not both" % " or ".join(found[:2]))
    return found


def check_run(parser, options):
    """End with exit status 2 for bad options of run."""
    if not check_sources(parser, options):
        if sys.stdin is None or sys.stdin.isatty():
            parser.error("give items after :::, by -a FILE, or on standard"
                         " input")
        options.arg_file = "-"
    check_steps(parser, options)
    if not "".join(options.steps).strip():
        parser.error("run needs a command")


def check_submit(parser, options):
    """End with exit status 2 for bad options of submit."""
    check_steps(parser, options)
    sources = check_sources(parser, options)
    has_command = bool("".join(options.steps).strip())
    whole = options.commands or options.from_json
    if has_command == bool(whole):  # an empty variable is none
        parser.error("%s has the commands: give no other" % sources[0]
                     if whole else "submit needs a command")
    if options.retries is not None:
        options.max_attempts = options.retries + 1
    options.arg_file = options.arg_file or options.commands


def check_stages(parser, options):
    """Give stages what they need; end with exit status 2 if none is given."""
    needs = {name: vars(options)[name] or None for name in ("cores", "memory")
             if vars(options)[name] is not None}
    if needs and not options.names:
        parser.error("name the stages whose jobs need that")
    for stage, values in options.names:
        values.update(needs)
        if not values:
            parser.error("give stage %s a name, --cores or --memory" % stage)


def check_logs(parser, options):
    """End with exit status 2 when no jobs are named."""
    named = not (options.ids is options.stage is options.state is None)
    if named == options.prune:
        parser.error("name jobs by ids such as 1,3,5-8, by a submission, by"
                     " --state or by --stage; with --prune name none")


def check_batch(parser, options):
    """End with exit status 2 for bad options of sbatch or pbs."""
    options.more = options.items or []
    if options.more and not options.more[0].startswith("-"):
        parser.error("after -- come options, not %r" % options.more[0])
    for word in options.more:
        if UNQUOTABLE.search(word):
            parser.error("%r can't be a batch system's option: it has a quote,"
                         " a backslash or a control character" % word)
    with using_worker() as worker:
        for name, read in (("time", worker.read_span),
                           ("worker", shlex.split)):
            try:
                setattr(options, name, read(vars(options)[name]))
            except ValueError as error:
                parser.error("--%s: %s" % (name, error))
        # as the scripts do; ends with exit status 2 if they're bad
        meant = worker.parse(["--slots", "1", *options.worker])
        options.slots, options.stages = meant.slots, meant.stage
        if options.command == "alloc" and meant.name:
            parser.error("--worker can't have a --name here: alloc finds its"
                         " workers by their own names")


# Each command: its name, its function, its options, and its help: one line,
# then examples.
COMMANDS = (
    ("serve", serve, SERVE, """run a server, until Ctrl-C or a signal
  python3 jobman.py serve
  python3 jobman.py serve --db jobs.db --host 0.0.0.0"""),
    ("run", run, RUN, """run a command for each item, on this machine
  python3 jobman.py run 'gzip -k {}' ::: *.txt
  find . -name '*.png' -print0 | python3 jobman.py run -0 'optipng {}'
  python3 jobman.py run 'gzip -k {}' --then 'gzip -t {}.gz' ::: *.txt
{} is the item as one shell word, {#} its number. Items come after :::, from a
file, or from standard input, one on each line. Options come before the
command."""),
    ("submit", submit_jobs, SUBMIT, """add jobs to the server
  python3 jobman.py submit 'gzip -k {}' ::: *.txt
  find . -name '*.png' | python3 jobman.py submit --each-line - 'optipng {}'
  python3 jobman.py submit --array 1-1000 ./simulate.sh --seed {}
  python3 jobman.py submit --commands todo.txt --priority 5
  python3 jobman.py submit --name run3 --array 1-9 'get {}' --then 'sum {}'
  python3 jobman.py submit --after run3 ./summarize.sh
{} is the item as one shell word, {#} its number. Options come before the
command."""),
    ("status", make_calls, (IDS, *CLIENT), """show the progress of the jobs
  python3 jobman.py status
  python3 jobman.py status run3
  python3 jobman.py status --output json"""),
    ("jobs", print_jobs, (*JOBS, jobs_output("table")), """list jobs
  python3 jobman.py jobs --state failed --stage align
  python3 jobman.py jobs --order time --limit 20
  python3 jobman.py jobs --state waiting --output quiet
  python3 jobman.py jobs --output csv > jobs.csv"""),
    ("job", make_calls, (A_JOB, *CLIENT),
     """show a job, its attempts, and why it isn't running
  python3 jobman.py job 17
  python3 jobman.py job 17 --output json"""),
    ("workers", make_calls, CLIENT, """show the workers
  python3 jobman.py workers"""),
    ("watch", watch, (IDS, ACCESS), """show the progress of the jobs, live
  python3 jobman.py watch
  python3 jobman.py watch run3
Ctrl-C ends it. If its output isn't a terminal, it prints a line when something
has changed, at most every 10 seconds."""),
    ("wait", wait, WAIT, """wait until jobs have ended
  python3 jobman.py wait --exit-code && echo all is well
  python3 jobman.py wait 1,3,5-8 --timeout 2h30m
  python3 jobman.py wait run3
Exit status 124: it timed out."""),
    ("logs", logs, LOGS, """print the output of jobs
  python3 jobman.py logs 17
  python3 jobman.py logs 17 2>/dev/null > 17.txt
  python3 jobman.py logs last --state failed
  python3 jobman.py logs -f run3
  python3 jobman.py logs --prune"""),
    ("export", print_jobs, (*JOBS, jobs_output("csv")), """list jobs as CSV
  python3 jobman.py export > jobs.csv
  python3 jobman.py export --format joblog > joblog.tsv"""),
    ("failures", make_calls, (IDS, *CLIENT), """group failed jobs by reason
  python3 jobman.py failures
Below each group is the command that retries its jobs."""),
    ("stats", make_calls, CLIENT, """show run times and waiting times
  python3 jobman.py stats"""),
    ("retry", change_jobs, SELECTION, """run ended jobs again
  python3 jobman.py retry 17
  python3 jobman.py retry --state failed --stage align"""),
    ("cancel", change_jobs, SELECTION, """cancel jobs that aren't done
  python3 jobman.py cancel 1,3,5-8
  python3 jobman.py cancel --state working
  python3 jobman.py cancel all --yes"""),
    ("release", change_jobs, SELECTION, """take jobs from their workers
  python3 jobman.py release 17
  python3 jobman.py release --stage 1"""),
    ("forget", change_jobs, SELECTION, """delete done jobs
  python3 jobman.py forget 1-1000
  python3 jobman.py forget all --yes"""),
    ("pause", make_calls, (A_STAGE, *CLIENT),
     """stop handing out the jobs of a stage
  python3 jobman.py pause align"""),
    ("resume", make_calls, (A_STAGE, *CLIENT), """end the pause of a stage
  python3 jobman.py resume align"""),
    ("drain", change_workers, (A_WORKER, *CLIENT, YES),
     """tell workers to claim no more jobs
  python3 jobman.py drain node7-4711
  python3 jobman.py drain all"""),
    ("undrain", change_workers, (A_WORKER, *CLIENT, YES),
     """let drained workers claim again
  python3 jobman.py undrain all"""),
    ("stages", make_calls, (NAMES, *NEEDS, *CLIENT),
     """show or name stages, or say what their jobs need
  python3 jobman.py stages
  python3 jobman.py stages 0=fetch 2=align 4=merge
  python3 jobman.py stages align --cores 16 --memory 64G"""),
    ("move", move_jobs, (*MOVE, *CLIENT, YES),
     """move expired jobs to another stage
  python3 jobman.py move 1 0"""),
    ("lifetime", make_calls, (*LIFETIME, *CLIENT), """show or set lifetimes
  python3 jobman.py lifetime
  python3 jobman.py lifetime 1 90"""),
    ("init", set_lifetimes, (MINUTES_OF_STAGES, *CLIENT),
     """set the first lifetimes
  python3 jobman.py init 0 60 0 90 0"""),
    ("snapshot", snapshot, (FOLDER, *CLIENT),
     """write a status page that needs no server
  python3 jobman.py snapshot /shared/www"""),
    ("verify", verify, (*VERIFY, *CLIENT), """check the files of all done jobs
  python3 jobman.py verify --dry-run"""),
    ("backup", backup, (COPY, DATABASE, OUTPUT),
     """copy a database, even while its server runs
  python3 jobman.py backup --db jobs.db copy.db"""),
    ("check", check, (DATABASE, OUTPUT),
     """check that a database is intact
  python3 jobman.py check --db jobs.db"""),
    ("help", show_help, (TOPIC,), """explain a topic, or list all topics
  python3 jobman.py help
  python3 jobman.py help http"""),
    ("doctor", doctor, (ANY_DATABASE, *CLIENT),
     """check Python, the access file, the server and the database
  python3 jobman.py doctor
  python3 jobman.py doctor --db /scratch/me/jobs.db
It changes nothing. Without a server it checks the rest."""),
    ("sbatch", print_script, BATCH, """print a script for Slurm
  python3 jobman.py sbatch --nodes 4 --time 8h -- --partition=long | sbatch
Options after -- become #SBATCH lines."""),
    ("pbs", print_script, BATCH, """print a script for PBS
  python3 jobman.py pbs --time 8h -- -l select=4:ncpus=64 | qsub
Options after -- become #PBS lines."""),
    ("alloc", alloc, ALLOC, """submit workers while jobs wait for them
  python3 jobman.py alloc --time 8h --max 10 -- --partition=long
  python3 jobman.py alloc --time 8h --max 10 --worker '--slots 4 --stage 2,0'
  python3 jobman.py alloc --pbs --time 8h --max 3 -- -l select=1:ncpus=64
It submits the script of sbatch or pbs while more jobs wait than its
allocations have room for: the idle slots of its workers and, for allocations
that haven't started, the slots that --worker names, or else those of the
largest so far, at first one a node. It ends when all jobs have ended and its
allocations are gone; started again, it finds them."""),
)
# The usage of commands whose arguments end in items or options.
USAGES = {
    "run": "[options] 'COMMAND {}' [--then COMMAND] [::: ITEM ...]",
    "submit": "[options] ['COMMAND {}' [--then COMMAND] [::: ITEM ...]]",
    "sbatch": "[options] [-- OPTION ...]", "pbs": "[options] [-- OPTION ...]",
    "alloc": "[options] [-- OPTION ...]",
}
# The checks of options that argparse can't make.
CHECKS = {
    "serve": check_serve, "run": check_run, "submit": check_submit,
    "stages": check_stages, "logs": check_logs, "sbatch": check_batch,
    "pbs": check_batch, "alloc": check_batch,
}


def split_off(arguments):
    """Return the arguments, and those after `:::`, None without it.

    With sbatch, pbs and alloc the latter are those after `--`. What follows
    --worker is its value, even if it looks like an option.
    """
    batch = arguments[:1] in (["sbatch"], ["pbs"], ["alloc"])
    mark = "--" if batch else ":::"
    rest = None
    if mark in arguments:
        at = arguments.index(mark)
        arguments, rest = arguments[:at], arguments[at + 1 :]
    if mark == "--" and "--worker" in arguments[:-1]:
        at = arguments.index("--worker")
        joined = "=".join(arguments[at : at + 2])
        arguments = [*arguments[:at], joined, *arguments[at + 2 :]]
    return arguments, rest


def ask_command(words, commands):
    """Return `help COMMAND` as `COMMAND --help`, other words as they are.

    End with exit status 2 if neither a topic nor a command is named.
    """
    name = words[1] if words[:1] == ["help"] and words[1:] else "-"
    if name.startswith("-") or name in TOPICS:
        return words
    if name not in commands:
        commands["help"].error("there is no topic or command %.80r%s" % (
            name, did_you_mean(name, [*TOPICS, *commands])))
    return [name, "-h"]


def parse(arguments):
    """Return the command line's options; end with exit status 2 or 0."""
    parser = argparse.ArgumentParser(
        prog="jobman.py",
        description="Run many commands, here or by workers on other nodes.",
        epilog="python3 jobman.py COMMAND --help shows options and examples."
        "\npython3 jobman.py help lists the topics of the manual.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    version = "jobman %s" % __version__
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, act, added, text in COMMANDS:
        line, _, examples = text.partition("\n")
        command = commands.add_parser(
            name, help=line, description=line,
            epilog="examples:\n" + examples,
            formatter_class=argparse.RawDescriptionHelpFormatter)
        command.set_defaults(act=act, error=command.error)
        for names, settings in added:
            command.add_argument(*names, **settings)
        if name in USAGES:
            command.usage = "%(prog)s " + USAGES[name]
        del command._has_negative_number_optionals[:]  # -5 is no option
    words, rest = split_off(arguments)
    if words and words[0][:1] != "-" and words[0] not in commands.choices:
        parser.error("there is no command %.80r%s" % (
            words[0], did_you_mean(words[0], commands.choices)))
    words = ask_command(words, commands.choices)
    options, unknown = parser.parse_known_args(words)
    if options.command is None:
        parser.error("name a command: %s" % ", ".join(commands.choices))
    command = commands.choices[options.command]
    if unknown:
        there = re.findall("--[a-z-]+", command.format_help())
        command.error("unrecognized arguments: %s%s" % (
            " ".join(unknown), did_you_mean(unknown[0], there)))
    if rest is not None and options.command not in USAGES:
        command.error("::: belongs to run and submit")
    options.items = rest
    if options.command in CHECKS:
        CHECKS[options.command](command, options)
    return options


def tolerate(stream):
    """Return `stream`, with escapes for characters that it can't encode."""
    if stream is None:  # closed by our parent process
        return open(os.devnull, "w")
    return io.TextIOWrapper(
        stream.detach(), stream.encoding, "backslashreplace",
        line_buffering=True,
    )


def give_up_output():
    """Drop output that can't be printed, so that exit doesn't retry it."""
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
    except (CommandError, Error, sqlite3.Error, OSError) as trouble:
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
