"""What is wrong, on this machine and on every machine of the cluster, one line a thing, each with its cure.

The cluster is asked by a job, as any other work: a client that reaches the job server alone sees every node. The job
carries this project's code and no secret; what nodes need they have in their own environment, and that is tried, too.
"""

from __future__ import annotations

import importlib.metadata
import json
import secrets
import time
from collections.abc import Iterator
from dataclasses import asdict

from jobs.cluster.checks import Finding, Question, checked, examined, question
from jobs.cluster.jobs import Client, connect, ended, send, translated
from jobs.cluster.submission import pack, refuse_password
from jobs.cluster.visit import ASKED
from pipeline.errors import ConfigError, PipelineError, RemoteError
from pipeline.scratch import scratch

ENTRYPOINT = "exec python -m jobs.cluster.visit"
SECONDS = 180.0
"""How long the cluster may take for the whole visit."""


def findings(address: str, storage: str, uri: str, here: bool) -> Iterator[Finding]:
    """Check this machine, then through the job server all others; whatever was found before."""
    for name, where in (("storage", storage), ("uri", uri)):
        refuse_password(name, where)
    asked = question(storage, uri)
    yield from examined("client", asked)
    if here:
        return
    yield (found := checked("client", "ray", lambda: ray(address)))
    if found.code:
        yield Finding(place="nodes", name="visit", text="not checked: no way in", made=False)
        return
    try:
        yield from visited(connect(address), asked)
    except (PipelineError, OSError) as error:
        code = error.exit_code if isinstance(error, PipelineError) else 1
        yield Finding(place="nodes", name="visit", text=str(error), code=code)


def ray(address: str) -> str:
    """The job server: reached, with our token, of our version."""
    client = connect(address)
    theirs, ours = client.version(), importlib.metadata.version("ray")
    if theirs != ours:
        raise ConfigError(f"the cluster runs Ray {theirs}, this is {ours}", where=client.address,
                          cure=f"pip install 'ray[default,train]=={theirs}'")  # fmt: skip
    return f"{client.address} runs Ray {theirs} and lets us in"


def visited(client: Client, asked: Question) -> list[Finding]:
    """What a job finds on the head and on every node; the job is forgotten afterwards."""
    job = f"doctor-{secrets.token_hex(4)}"
    with scratch() as folder:
        pack(folder)
        (folder / ASKED).write_text(json.dumps(asdict(asked)), encoding="utf-8")
        send(client, job, entrypoint=ENTRYPOINT, runtime_env={"working_dir": str(folder)})
    deadline = time.monotonic() + SECONDS
    while not ended(client, job):
        if time.monotonic() > deadline:
            raise RemoteError(f"the cluster has not run it within {SECONDS:.0f} s", where=job,
                              cure="python -m jobs cluster logs says how far it came")  # fmt: skip
        time.sleep(0.3)
    said = client.logs(job).splitlines()
    found = [Finding(**json.loads(line)) for line in said if line.startswith('{"place"')]
    if not found:
        last = (said or [client.info(job).message or "it said nothing"])[-1]
        raise RemoteError(f"the doctor's job failed: {last.strip()[:300]}", where=job,
                          cure=f"python -m jobs cluster logs {job}")  # fmt: skip
    with translated(client.address):
        client.ray.delete_job(job)
    return found
