"""A proxy in front of an HTTP server that makes it fail to order: `python faults.py PORT BACKEND`.

POST /__faults {"rules": [{"match": "GET .*tar", "kind": "status", "status": 503, "times": 2}]} replaces the rules and
answers what the old ones did: {"hits": [how often each struck], "requests": n}. The first rule whose `match` (a regular
expression) finds itself in "METHOD path?query" strikes, if it has `times` left, at each `every`th such request:

  status    answer `status` with an S3 error body instead of asking the server
  reset     pass `after` bytes of the body, then reset the connection (0: before any answer)
  stall     pass `after` bytes, then nothing for `seconds`
  slow      pass the body at `rate` bytes a second
  short     pass `after` bytes as if they were the whole body
"""

from __future__ import annotations

import asyncio
import json
import re
import socket
import struct
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass

from aiohttp import ClientError, ClientResponse, ClientSession, ClientTimeout, TCPConnector, web

KINDS = ("status", "reset", "stall", "slow", "short")
HOP = {"transfer-encoding", "connection", "keep-alive", "server", "date"}
CODES = {429: "SlowDown", 500: "InternalError", 503: "SlowDown"}
PIECE = 1 << 16


@dataclass(kw_only=True)
class Rule:
    """What is to go wrong, where and how often."""

    match: str
    kind: str
    times: int = 1
    every: int = 1
    status: int = 503
    after: int = 0
    seconds: float = 3600.0
    rate: float = 1e6
    hits: int = 0
    matches: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"no kind {self.kind!r}; there are {', '.join(KINDS)}")
        re.compile(self.match)

    def strikes(self, line: str) -> bool:
        """Whether this request is hit; counts it."""
        if not re.search(self.match, line):
            return False
        self.matches += 1
        struck = self.hits < self.times and self.matches % self.every == 0
        self.hits += struck
        return struck


class Proxy:
    """Passes requests on, except where a rule strikes."""

    def __init__(self, backend: str, session: ClientSession) -> None:
        self._backend, self._session = backend.rstrip("/"), session
        self._rules: list[Rule] = []
        self._requests = 0

    async def control(self, request: web.Request) -> web.Response:
        """Take new rules, tell what the old ones did."""
        try:
            rules = [Rule(**rule) for rule in (await request.json())["rules"]]
        except (KeyError, TypeError, ValueError, re.error) as error:
            return web.Response(status=400, text=f"{error}\n")
        told = {"hits": [rule.hits for rule in self._rules], "requests": self._requests}
        self._rules, self._requests = rules, 0
        return web.json_response(told)

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Answer one request."""
        self._requests += 1
        line = f"{request.method} {request.path_qs}"
        rule = next((rule for rule in self._rules if rule.strikes(line)), None)
        if rule and rule.kind == "status":
            return _refusal(rule.status)
        if rule and rule.kind == "reset" and not rule.after:
            return _reset(request)
        if rule and rule.kind == "stall" and not rule.after:
            await asyncio.sleep(rule.seconds)
        headers = {name: value for name, value in request.headers.items() if name.lower() != "transfer-encoding"}
        address = self._backend + request.raw_path
        asked = self._session.request(
            request.method, address, headers=headers, data=await request.read(), allow_redirects=False
        )
        try:
            answer = await asked
        except ClientError as error:  # Ceph gives some HEADs a body
            return web.Response(status=502, text=f"{error}\n")
        async with answer:
            return await _passed_on(request, answer, rule)


async def _passed_on(request: web.Request, answer: ClientResponse, rule: Rule | None) -> web.StreamResponse:
    headers = {name: value for name, value in answer.headers.items() if name.lower() not in HOP}
    out = web.StreamResponse(status=answer.status, reason=answer.reason, headers=headers)
    if rule and rule.kind == "short":
        data = (await answer.read())[: rule.after]
        out.headers["Content-Length"] = str(len(data))
        await out.prepare(request)
        await out.write(data)
        return out
    await out.prepare(request)
    cut = rule.after if rule and rule.kind in ("reset", "stall") and rule.after else None
    async for piece in _pieces(answer, cut):
        await out.write(piece)
        if rule and rule.kind == "slow":
            await asyncio.sleep(len(piece) / rule.rate)
    if cut is not None and rule is not None:
        await asyncio.sleep(0.05 if rule.kind == "reset" else rule.seconds)
        return _reset(request, out)
    await out.write_eof()
    return out


async def _pieces(answer: ClientResponse, cut: int | None) -> AsyncIterator[bytes]:
    left = cut
    async for piece in answer.content.iter_chunked(PIECE):
        yield piece if left is None else piece[:left]
        if left is not None:
            left -= len(piece)
            if left <= 0:
                return


def _refusal(status: int) -> web.Response:
    code = CODES.get(status, "Fault")
    body = f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>ordered</Message></Error>'
    return web.Response(status=status, text=body, content_type="application/xml")


def _reset(request: web.Request, out: web.StreamResponse | None = None) -> web.StreamResponse:
    """Close the connection with RST: a linger of zero seconds."""
    transport = request.transport
    if transport is not None:
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        transport.abort()
    return out or web.Response()


async def serve(port: int, backend: str) -> None:
    """Listen on the loopback until this process ends."""
    limits = TCPConnector(limit=0)
    async with ClientSession(auto_decompress=False, connector=limits, timeout=ClientTimeout(total=None)) as session:
        proxy = Proxy(backend, session)
        app = web.Application(client_max_size=1 << 31)
        app.router.add_post("/__faults", proxy.control)
        app.router.add_route("*", "/{path:.*}", proxy.handle)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        print(json.dumps({"port": port, "backend": backend}), flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(serve(int(sys.argv[1]), sys.argv[2]))
