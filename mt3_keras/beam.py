"""Work on Apache Beam: on the cores of this machine or on a cluster, an item at a time.

Preparing data sets and transcribing archives have one shape: an item is a shard, a worker writes
the files of that shard whole, and a shard that is there is not made again. So a run that was
stopped is resumed by the same command, on any runner, and no result passes through Beam.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from mt3_keras.cores import count_cores, limit_thread_pools

MAX_DEATHS = 20  # of the processes that worked on one item
_failures: list[Exception] = []  # of the local runner

# Counts (int) and samples of distributions (list of int) that an item gave rise to, by name.
Report = Mapping[str, int | list[int]]


class BeamError(RuntimeError):
    """Beam or the work failed; one line."""


def run(
    items: Sequence[Any],
    work: Callable[[Any], Report | None],
    *,
    num_workers: int = 0,
    beam_args: Sequence[str] = (),
    isolated: bool = False,
) -> None:
    """Calls `work` for every item, in any order, and waits for all.

    On this machine every worker is a process: reading notes holds Python's lock. One that is
    killed is replaced and its item begun anew.

    Args:
      items: pickled to reach the workers; an item may be worked on more than once.
      work: a function of a module. What it reports is added to Beam's metrics (where the runner
        has any), under the namespace "mt3".
      num_workers: processes of the local runner; 0 is one for each core.
      beam_args: flags of Beam; if `--runner` is among them, that runner is used.
      isolated: a single local worker is a process too.

    Raises:
      BeamError: `work` raised an error, or the runner failed.
    """
    if not items:
        return
    import apache_beam
    from apache_beam.options.pipeline_options import PipelineOptions

    args = list(beam_args)
    write: Any = apache_beam.Map(_work_and_count, work)
    _failures.clear()
    if not any(arg.startswith("--runner") for arg in args):
        # Not DirectRunner, which first looks for a runner to download.
        args.append("--runner=FnApiRunner")
        num_threads = min(num_workers or count_cores(), len(items))
        if num_threads > 1:
            args.append("--direct_running_mode=multi_threading")
            args.append(f"--direct_num_workers={num_threads}")
        in_process = num_threads > 1 or isolated
        write = apache_beam.ParDo(_in_process(work)) if in_process else apache_beam.Map(_try, work)
    elif "--runner=DaskRunner" in args:
        args.append("--runner=apache_beam.runners.dask.dask_runner.DaskRunner")  # the last counts
        args.append(f"--dask_npartitions={len(items)}")  # else 128 items are one task
    pipeline = apache_beam.Pipeline(options=PipelineOptions(args))
    _ = (
        pipeline
        | "Shards" >> apache_beam.Create(items)
        | "Spread" >> apache_beam.Reshuffle()
        | "Write" >> write
    )
    result = None
    try:
        result = pipeline.run()
        result.wait_until_finish()
        if _failures:
            raise _failures[0]
    except Exception as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise BeamError(lines[-1].strip() if lines else type(error).__name__) from error
    finally:
        if client := getattr(result, "client", None):  # Dask's, which Beam leaves open
            client.close()


def _in_process(work: Callable[[Any], Report | None]) -> Any:
    """A DoFn that has a process of its own, for each thread of the local runner.

    Beam's multi_processing mode takes ten times as long to start and prints warnings.
    """
    import apache_beam

    class WorkInProcess(apache_beam.DoFn):
        def setup(self) -> None:
            self.is_over = False
            self.pool = concurrent.futures.ProcessPoolExecutor(
                1, multiprocessing.get_context("spawn"), _begin_worker
            )
            self.worker = self.pool.submit(os.getpid)

        def process(self, item: Any) -> None:
            _try(item, self.call)

        def call(self, item: Any) -> Report | None:
            for _ in range(MAX_DEATHS):
                try:
                    return self.pool.submit(work, item).result()
                except RuntimeError as error:
                    if self.is_over:  # Ctrl-C; whatever this daemon thread did, Beam would print
                        threading.Event().wait()
                    if not isinstance(error, BrokenProcessPool):
                        raise
                    self.pool.shutdown()
                    self.setup()
            raise BeamError(f"{MAX_DEATHS} worker processes were killed; is memory short?")

        def teardown(self) -> None:
            self.is_over = True
            with contextlib.suppress(RuntimeError, OSError):  # it has ended
                os.kill(self.worker.result(), signal.SIGTERM)
            self.pool.shutdown()

    return WorkInProcess()


def _begin_worker() -> None:
    """Keeps a worker to one core, and ends it when the process that started it is killed."""
    limit_thread_pools(1)  # every core has a worker; BLAS's threads wait busily for each other
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the process that started it
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _try(item: Any, work: Callable[[Any], Report | None]) -> None:
    """Notes what `work` raised, which Beam would print; the items after it are left."""
    if _failures:
        return
    try:
        _work_and_count(item, work)
    except Exception as error:
        _failures.append(error)


def _work_and_count(item: Any, work: Callable[[Any], Report | None]) -> None:
    _count(work(item))


def _count(report: Report | None) -> None:
    from apache_beam.metrics.metric import Metrics

    for name, value in (report or {}).items():
        if isinstance(value, int):
            Metrics.counter("mt3", name).inc(value)
            continue
        for sample in value:
            Metrics.distribution("mt3", name).update(sample)


@contextlib.contextmanager
def progress(label: str, unit: str, count: Callable[[], int]) -> Iterator[None]:
    """Shows how many files have appeared, whatever machine writes them.

    Meanwhile nothing is logged: what Beam logs comes as an error too.

    Args:
      label: what is shown before the bar.
      unit: what is counted.
      count: how many there are.
    """
    from tqdm import tqdm

    def watch() -> None:
        while not done.wait(1.0):
            bar.update(count() - bar.n)

    done = threading.Event()
    log = logging.getLogger()
    level = log.level
    with tqdm(desc=label, initial=count(), unit=f" {unit}", disable=None) as bar:
        watcher = threading.Thread(target=watch, daemon=True)
        if not bar.disable:
            watcher.start()
        log.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            log.setLevel(level)
            done.set()
            if not bar.disable:
                watcher.join()
                bar.update(count() - bar.n)
