"""What stands between the network and the dashboard: hosts, the token, headers, compression."""

from __future__ import annotations

import gzip
import hmac
import ipaddress
import os
import traceback
from collections.abc import Iterable

from dash.exceptions import DependencyException
from flask import Flask, Request, Response, request
from werkzeug.exceptions import HTTPException

COOKIE = "mendel-dashboard"
_POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; style-src 'self' 'unsafe-inline'; "
    # Dash starts from an inline script, and plotly makes functions for 3-D plots.
    "script-src 'self' 'unsafe-inline' 'unsafe-eval'; connect-src 'self'; object-src 'none'; "
    "base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Resource-Policy": "same-origin",
}
_LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
_COMPRESSED = ("text/", "application/json", "application/javascript", "image/svg+xml")
_LEAST = 1024
_METHODS = ("GET", "HEAD", "POST")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def protect(server: Flask, hosts: Iterable[str], token: str | None, wide: bool = False) -> None:
    """Refuse foreign hosts, and whoever lacks the token where there is one.

    `hosts` are names that the Host header may hold beside those of the loopback; without a check a
    web page elsewhere could read the dashboard through a name that it points at this machine.
    `wide`: it may be reached by any address in numbers too, which nobody can point elsewhere."""
    allowed = {*_LOOPBACK_NAMES, *(h.strip("[]").lower() for h in hosts)}
    packed: dict[str, bytes] = {}

    @server.before_request
    def _check() -> Response | None:
        if request.method not in _METHODS:
            return _refused(405, "Only reading is possible here.")
        name = _host(request.host)
        if name not in allowed and not (wide and _is_address(name)):
            return _refused(
                403, "This dashboard does not answer under that name; see mendel dashboard --host."
            )
        origin = request.headers.get("Origin")
        if origin and origin.partition("://")[2] != request.host:
            return _refused(403, "This request comes from another site.")
        if token is None:
            return None
        if _same(request.args.get("token"), token):
            if request.method != "GET" or request.path != "/":
                return None
            answer = Response(status=303, headers={"Location": "/"})
            answer.set_cookie(COOKIE, token, httponly=True, samesite="Strict")
            return answer
        if _same(request.cookies.get(COOKIE), token):
            return None
        return _refused(
            403, "A token is needed: open the address that mendel dashboard printed, whole."
        )

    @server.errorhandler(DependencyException)
    def _no_such_file(error: Exception) -> Response:
        return _refused(404, "There is no such file.")

    @server.errorhandler(Exception)
    def _fault(error: Exception) -> Response | HTTPException:
        if isinstance(error, HTTPException):
            return error
        if os.environ.get("MENDEL_DEBUG", "") not in ("", "0"):
            traceback.print_exception(error)
        words = " ".join(str(error).split())[:300]
        return _refused(500, f"{type(error).__name__}: {words} (a fault of mendel)")

    @server.after_request
    def _finish(answer: Response) -> Response:
        for name, value in _HEADERS.items():
            answer.headers[name] = value
        _compress(request, answer, packed)
        return answer


def _host(text: str) -> str:
    """The name in a Host header, without its port."""
    name = text.rpartition("]")[0].lstrip("[") if text.startswith("[") else text.partition(":")[0]
    return name.lower().rstrip(".")


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _same(given: str | None, token: str) -> bool:
    return given is not None and hmac.compare_digest(given.encode(), token.encode())


def _refused(status: int, text: str) -> Response:
    return Response(text + "\n", status=status, mimetype="text/plain")


def _compress(asked: Request, answer: Response, packed: dict[str, bytes]) -> None:
    """Gzip; a file of Dash's own is packed once, because its address names its version."""
    fits = answer.status_code == 200 and (answer.mimetype or "").startswith(_COMPRESSED)
    if not fits or "gzip" not in asked.headers.get("Accept-Encoding", ""):
        return
    fixed = asked.path.startswith("/_dash-component-suites/")
    data = packed.get(asked.full_path) if fixed else None
    if data is None:
        answer.direct_passthrough = False
        content = answer.get_data()
        if len(content) < _LEAST:
            return
        data = gzip.compress(content, compresslevel=6 if fixed else 4, mtime=0)
        if fixed:
            packed[asked.full_path] = data
    answer.direct_passthrough = False
    answer.set_data(data)
    answer.headers["Content-Encoding"] = "gzip"
    answer.headers["Vary"] = "Accept-Encoding"
    answer.headers.pop("ETag", None)
