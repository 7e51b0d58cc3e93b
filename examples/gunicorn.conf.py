"""Settings of gunicorn for service/app.py, which gunicorn reads in the folder where it starts.

    cd examples && WEB_CONCURRENCY=2 ../.venv/bin/gunicorn service.app:app

Give the number of workers here or in WEB_CONCURRENCY, not with `-w`: this file computes the number of threads from it.
SERVICE_PIN=1 pins each worker to its share of the CPUs.
"""

import os

cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
workers = int(os.environ.get("WEB_CONCURRENCY", "1"))  # one worker with all threads forms the largest batches
worker_class = "uvicorn_worker.UvicornWorker"
threads_each = max(len(cpus) // workers, 1)

# Before NumPy is imported: OpenBLAS and OpenMP read them once.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", str(threads_each))


def post_fork(server, worker):
    """Pin the new worker, if requested. `age` counts workers, including workers that replace others."""
    if os.environ.get("SERVICE_PIN") == "1" and hasattr(os, "sched_setaffinity"):
        first = (worker.age - 1) % workers * threads_each % len(cpus)
        os.sched_setaffinity(0, cpus[first : first + threads_each])
