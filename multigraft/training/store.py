"""What fine-tuning keeps on disk: one SQLite database and plain folders. Every change survives a kill at any moment.

    lock                        held by the process that owns the folder
    training.db                 files, jobs, events, checkpoints
    uploads/                    files still on their way in
    files/<file id>             contents of files
    jobs/<job id>/checkpoints/<step>/
        adapter/                PEFT folder, served under the checkpoint's name
        state/                  what goes on from here; only the job's newest checkpoint has it
    jobs/<job id>/start/        PEFT folder that the job goes on from, until it is over
    jobs/<job id>/tensorboard/  logs, when tensorboard is installed

A folder or file appears under its name complete, by a rename, and its row is written after it; what has no row is
removed at the next start.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import secrets
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError

from multigraft.core.errors import InvalidRequest, NotFound, StorageFull, TooLarge
from multigraft.core.training import MAX_FILE_BYTES, JobStatus, Page

SCHEMA = """
CREATE TABLE IF NOT EXISTS files (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, created INTEGER NOT NULL,
    filename TEXT NOT NULL, purpose TEXT NOT NULL, num_bytes INTEGER NOT NULL
);
CREATE TABLE IF NOT EXISTS jobs (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, created INTEGER NOT NULL,
    request TEXT NOT NULL, status TEXT NOT NULL, finished INTEGER, step INTEGER NOT NULL, total_steps INTEGER,
    trained_tokens INTEGER NOT NULL, fine_tuned_model TEXT, result_file TEXT, error TEXT
);
CREATE TABLE IF NOT EXISTS events (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, created INTEGER NOT NULL,
    job_id TEXT NOT NULL, level TEXT NOT NULL, message TEXT NOT NULL, data TEXT
);
CREATE INDEX IF NOT EXISTS events_of_job ON events (job_id, seq);
CREATE TABLE IF NOT EXISTS checkpoints (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, created INTEGER NOT NULL,
    job_id TEXT NOT NULL, step INTEGER NOT NULL, model TEXT NOT NULL, metrics TEXT NOT NULL,
    trained_tokens INTEGER NOT NULL
);
CREATE INDEX IF NOT EXISTS checkpoints_of_job ON checkpoints (job_id, seq);
PRAGMA user_version = 1;
"""


# Rows, as the tables above have them. Columns that hold JSON are text here.


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRow:
    id: str
    created: int
    filename: str
    purpose: str
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRow:
    id: str
    created: int
    request: str
    status: str
    finished: int | None = None
    step: int = 0
    total_steps: int | None = None
    trained_tokens: int = 0
    fine_tuned_model: str | None = None
    result_file: str | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EventRow:
    id: str
    created: int
    job_id: str
    level: str
    message: str
    data: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointRow:
    id: str
    created: int
    job_id: str
    step: int
    model: str
    metrics: str
    trained_tokens: int


TABLES: dict[type, str] = {FileRow: "files", JobRow: "jobs", EventRow: "events", CheckpointRow: "checkpoints"}
Row = TypeVar("Row", FileRow, JobRow, EventRow, CheckpointRow)


def new_id(prefix: str) -> str:
    return f"{prefix}-{secrets.token_hex(12)}"


class TrainingStore:
    """Owns its folder: InvalidRequest when another process does. Thread-safe; methods wait for the disk."""

    def __init__(self, folder: Path):
        self.folder = folder
        for name in ("uploads", "files", "jobs"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        self._owner = _own(folder / "lock")
        self._lock = threading.Lock()
        self._db = sqlite3.connect(folder / "training.db", check_same_thread=False, isolation_level=None)
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = FULL")  # what was answered survives a loss of power too
        self._db.executescript(SCHEMA)
        self._sweep()

    def close(self) -> None:
        with self._lock:
            self._db.close()
        self._owner.close()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock, _full_disk():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            finally:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")

    def _insert(self, db: sqlite3.Connection, row: FileRow | JobRow | EventRow | CheckpointRow) -> None:
        names = [f.name for f in fields(row)]
        marks = ", ".join("?" * len(names))
        values = [getattr(row, name) for name in names]
        db.execute(f"INSERT INTO {TABLES[type(row)]} ({', '.join(names)}) VALUES ({marks})", values)

    def _select(self, kind: type[Row], rest: str = "", values: Iterable[Any] = ()) -> list[Row]:
        names = ", ".join(f.name for f in fields(kind))
        with self._lock:
            found = self._db.execute(f"SELECT {names} FROM {TABLES[kind]} {rest}", tuple(values)).fetchall()
        return [kind(**dict(zip((f.name for f in fields(kind)), row, strict=True))) for row in found]

    def page(
        self,
        kind: type[Row],
        *,
        after: str | None = None,
        limit: int,
        ascending: bool = False,
        where: str = "1",
        values: Iterable[Any] = (),
    ) -> Page[Row]:
        """Rows in the order they were added, the newest first unless `ascending`, behind the one of id `after`."""
        table, values = TABLES[kind], list(values)
        if after is not None:
            if not self._select(kind, f"WHERE id = ? AND {where}", [after, *values]):
                raise InvalidRequest(f"after is {after!r}, which is not in the list.", param="after")
            where += f" AND seq {'>' if ascending else '<'} (SELECT seq FROM {table} WHERE id = ?)"
            values.append(after)
        order = "ASC" if ascending else "DESC"
        rows = self._select(kind, f"WHERE {where} ORDER BY seq {order} LIMIT ?", [*values, limit + 1])
        return Page(data=rows[:limit], has_more=len(rows) > limit)

    # Files -----------------------------------------------------------------------------------------------------

    def upload(self) -> Upload:
        return Upload(self, self.folder / "uploads" / secrets.token_hex(12))

    def file(self, file_id: str) -> FileRow:
        return _only(self._select(FileRow, "WHERE id = ?", [file_id]), f"There is no file {file_id!r}.")

    def file_path(self, file_id: str) -> Path:
        """The content of a file; NotFound when there is none, whatever the table says."""
        path = self.folder / "files" / self.file(file_id).id
        if not path.is_file():
            raise NotFound(f"The content of file {file_id!r} has been removed from the disk.")
        return path

    def place(self, upload: Upload, filename: str, purpose: str) -> FileRow:
        """Move an upload to where files are. It is one once the row is stored."""
        upload.close()
        row = FileRow(
            id=new_id("file"), created=int(time.time()), filename=filename, purpose=purpose, num_bytes=upload.size
        )
        move(upload.path, self.folder / "files" / row.id)
        return row

    def add_file(self, upload: Upload, filename: str, purpose: str) -> FileRow:
        row = self.place(upload, filename, purpose)
        with self._transaction() as db:
            self._insert(db, row)
        return row

    def delete_file(self, file_id: str) -> None:
        self.file(file_id)
        with self._transaction() as db:
            db.execute("DELETE FROM files WHERE id = ?", [file_id])
        (self.folder / "files" / file_id).unlink(missing_ok=True)

    # Jobs ------------------------------------------------------------------------------------------------------

    def add_job(self, row: JobRow, events: Iterable[EventRow], start: Path | None = None) -> None:
        """start: folder of the adapter that it goes on from, of which it gets a copy: the original may be removed."""
        if start is not None:
            with self._new_folder(self.start_folder(row.id)) as folder:
                shutil.copytree(start, folder, dirs_exist_ok=True)
        with self._transaction() as db:
            for new in (row, *events):
                self._insert(db, new)

    def job(self, job_id: str) -> JobRow:
        return _only(self._select(JobRow, "WHERE id = ?", [job_id]), f"There is no fine-tuning job {job_id!r}.")

    def unfinished_jobs(self) -> list[JobRow]:
        """The oldest first."""
        final = [s.value for s in JobStatus if s.final]
        return self._select(JobRow, f"WHERE status NOT IN ({', '.join('?' * len(final))}) ORDER BY seq", final)

    def succeeded_jobs(self) -> list[JobRow]:
        return self._select(JobRow, "WHERE status = ? ORDER BY seq", [JobStatus.SUCCEEDED.value])

    def count_jobs(self) -> dict[JobStatus, int]:
        with self._lock:
            rows = self._db.execute("SELECT status, COUNT(*) FROM jobs GROUP BY status").fetchall()
        return {JobStatus(status): count for status, count in rows}

    def update_job(self, job_id: str, rows: Iterable[EventRow | FileRow] = (), **columns: Any) -> None:
        """Change columns and add rows, all or none."""
        with self._transaction() as db:
            for row in rows:
                self._insert(db, row)
            if columns:
                assignments = ", ".join(f"{name} = ?" for name in columns)
                db.execute(f"UPDATE jobs SET {assignments} WHERE id = ?", [*columns.values(), job_id])

    def metrics(self, job_id: str) -> list[dict[str, Any]]:
        """All metrics of each step, in the order of steps; of a step that was done again, the last."""
        rows = self._select(EventRow, "WHERE job_id = ? AND data IS NOT NULL ORDER BY seq", [job_id])
        by_step: dict[int, dict[str, Any]] = {}
        for row in rows:
            data = json.loads(row.data or "")
            by_step.setdefault(data["step"], {}).update(data)
        return [by_step[step] for step in sorted(by_step)]

    def job_folder(self, job_id: str) -> Path:
        return self.folder / "jobs" / job_id

    def start_folder(self, job_id: str) -> Path:
        return self.job_folder(job_id) / "start"

    # Checkpoints -----------------------------------------------------------------------------------------------

    def checkpoint_folder(self, row: CheckpointRow) -> Path:
        return self.job_folder(row.job_id) / "checkpoints" / str(row.step)

    def add_checkpoint(self, row: CheckpointRow, write: Callable[[Path], None], events: Iterable[EventRow]) -> None:
        """A checkpoint with what `write` puts into the folder that it is given; the job goes on from here.

        Nothing of it is left when this fails.
        """
        target = self.checkpoint_folder(row)
        with self._new_folder(target) as folder:
            write(folder)
        with self._transaction() as db:
            self._insert(db, row)
            for event in events:
                self._insert(db, event)
            db.execute(
                "UPDATE jobs SET step = ?, trained_tokens = ? WHERE id = ?", [row.step, row.trained_tokens, row.job_id]
            )
        self._drop_states(row)

    def last_checkpoint(self, job_id: str) -> CheckpointRow | None:
        rows = self._select(CheckpointRow, "WHERE job_id = ? ORDER BY seq DESC LIMIT 1", [job_id])
        return rows[0] if rows else None

    def trained(self, model: str) -> CheckpointRow | None:
        """What is served under a name."""
        where = "WHERE model = ? OR job_id IN (SELECT id FROM jobs WHERE fine_tuned_model = ?)"
        rows = self._select(CheckpointRow, f"{where} ORDER BY seq DESC LIMIT 1", [model, model])
        return rows[0] if rows else None

    def checkpoint(self, job_id: str, checkpoint_id: str) -> CheckpointRow:
        rows = self._select(CheckpointRow, "WHERE job_id = ? AND id = ?", [job_id, checkpoint_id])
        return _only(rows, f"Job {job_id!r} has no checkpoint {checkpoint_id!r}.")

    def checkpoints(self, job_id: str | None = None) -> list[CheckpointRow]:
        """Of a job or of all, the oldest first."""
        if job_id is None:
            return self._select(CheckpointRow, "ORDER BY seq")
        return self._select(CheckpointRow, "WHERE job_id = ? ORDER BY seq", [job_id])

    def drop_checkpoint(self, row: CheckpointRow, event: EventRow) -> None:
        """The event says so. Killed in between, the next start removes what is left."""
        with self._transaction() as db:
            db.execute("DELETE FROM checkpoints WHERE id = ?", [row.id])
            self._insert(db, event)
        shutil.rmtree(self.checkpoint_folder(row), ignore_errors=True)

    def drop_state(self, job_id: str) -> None:
        """Of a job that will never go on: what it would go on from."""
        folder = self.job_folder(job_id)
        for path in (*folder.glob("start*"), *folder.glob("checkpoints/*/state")):
            shutil.rmtree(path, ignore_errors=True)

    def _drop_states(self, newest: CheckpointRow) -> None:
        for state in (self.job_folder(newest.job_id) / "checkpoints").glob("*/state"):
            if state.parent.name != str(newest.step):
                shutil.rmtree(state, ignore_errors=True)

    @contextmanager
    def _new_folder(self, target: Path) -> Iterator[Path]:
        """A folder to fill, which appears as `target` when the block ends well and not at all otherwise."""
        partial = target.with_name(f"{target.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            with _full_disk():
                yield partial
                for path in sorted(partial.rglob("*"), reverse=True):
                    sync(path)
                sync(partial)
                shutil.rmtree(target, ignore_errors=True)  # of a step done before, that got no row
                move(partial, target)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise

    def _sweep(self) -> None:
        """Remove what a killed process left behind: content without a row, states of jobs that have ended."""
        for path in (self.folder / "uploads").iterdir():
            path.unlink()
        files = {row.id for row in self._select(FileRow)}
        for path in (self.folder / "files").iterdir():
            if path.name not in files:
                path.unlink()
        kept = {self.checkpoint_folder(row) for row in self.checkpoints()}
        for path in self.folder.glob("jobs/*/checkpoints/*"):
            if path not in kept:
                shutil.rmtree(path)
        unfinished = {row.id for row in self.unfinished_jobs()}
        for path in (self.folder / "jobs").iterdir():
            if path.name not in unfinished:
                self.drop_state(path.name)


class Upload:
    """A file on its way in."""

    def __init__(self, store: TrainingStore, path: Path):
        self.store = store
        self.path = path
        self.size = 0
        self._file = path.open("wb")

    def write(self, data: bytes) -> None:
        """TooLarge once there are more than MAX_FILE_BYTES."""
        self.size += len(data)
        if self.size > MAX_FILE_BYTES:
            raise TooLarge(f"The file is larger than the limit of {MAX_FILE_BYTES} bytes (1 GiB).", param="file")
        with _full_disk():
            self._file.write(data)

    def close(self) -> None:
        """Everything written is on the disk, or StorageFull."""
        with _full_disk():
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()

    def discard(self) -> None:
        """Harmless once it is a file."""
        self._file.close()
        self.path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def move(source: Path, target: Path) -> None:
    """Rename, for good."""
    os.replace(source, target)
    sync(target.parent)


def _own(path: Path) -> Any:
    lock = path.open("a")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        raise InvalidRequest(
            f"Another process fine-tunes with {path.parent}; give this one a --data-dir of its own, or send the jobs "
            "to the other.",
            param="data_dir",
        ) from None
    return lock


def _only(rows: list[Row], message: str) -> Row:
    if not rows:
        raise NotFound(message)
    return rows[0]


@contextmanager
def _full_disk() -> Iterator[None]:
    full = (errno.ENOSPC, errno.EDQUOT)
    try:
        yield
    except OSError as error:
        if error.errno not in full:
            raise
        raise StorageFull(f"The disk of the data folder is full: {error.strerror}.") from error
    except SafetensorError as error:  # it has the number in its text alone
        if not any(f"(os error {number})" in str(error) for number in full):
            raise
        raise StorageFull(f"The disk of the data folder is full: {error}.") from error
    except sqlite3.OperationalError as error:
        if "full" not in str(error):
            raise
        raise StorageFull(f"The disk of the data folder is full: {error}.") from error
