"""What runs now and what waits to run, as all pages show it."""

from __future__ import annotations

from dataclasses import dataclass

from segqc.loop.requests import KINDS, request_of, title
from segqc.server.routers.dependencies import open_store
from segqc.store import jobs
from segqc.store.records import JobRecord


@dataclass(frozen=True, slots=True)
class ShownJob:
    """A job that runs or waits, and what it is called."""

    job: JobRecord
    title: str

    @property
    def share(self) -> float | None:
        """How much of it is done; None where nobody knows."""
        return self.job.done_steps / self.job.all_steps if self.job.all_steps else None


def now_shown() -> list[ShownJob]:
    """The jobs that run or wait; those that run come first."""
    with open_store().read() as transaction:
        found = [job for kind in KINDS for job in jobs.open_jobs(transaction, kind)]
    return [ShownJob(job, title(request_of(job))) for job in sorted(found, key=lambda j: (j.state != "running", j.id))]
