"""Who may do what over HTTP: bearer tokens with a scope for programs, a session cookie for the page in a browser.

Scopes include each other: read < write < operate < admin. A browser sends its cookie along with whatever a page of
another origin asks for, so cookies count only for requests of this server's own pages (Sec-Fetch-Site, Origin), and
for anything but reading only with the session's CSRF token in a header, which other origins cannot read.
"""

from __future__ import annotations

import hmac
import secrets
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Send
from starlette.types import Scope as Connection

from tinyfleet.ontology.http.request_handling import HttpError, problem

Scope = Literal["read", "write", "operate", "admin"]
SCOPES: tuple[Scope, ...] = get_args(Scope)

COOKIE = "tinyfleet_session_{port}"
"""A browser sends a cookie to all ports of a host: each server has a name of its own for its cookie."""
CSRF_HEADER = "X-CSRF-Token"
LOGIN_LIFE = 600.0
"""Seconds that a one-time address for logging in can be used."""
SESSION_LIFE = 12 * 3600.0
"""Seconds until a page has to log in again."""
MAX_SESSIONS = 1000
_READING = ("GET", "HEAD", "OPTIONS")

Handler = Callable[[Request], Awaitable[Response]]


class Served(NamedTuple):
    """A route, and what a client needs for it: None if anyone may use it."""

    method: str
    path: str
    needed: Scope | None
    handler: Handler


class Client(NamedTuple):
    """Who sends a request.

    Attributes
    ----------
    name
        Of the token's owner.
    scope
        What they may do.
    known
        Whether they have shown who they are.
    """

    name: str
    scope: Scope
    known: bool = True

    def may(self, needed: Scope) -> bool:
        """Whether they may do what needs this scope."""
        return SCOPES.index(self.scope) >= SCOPES.index(needed)


@dataclass(frozen=True)
class _Session:
    client: Client
    csrf: str
    ends: float


class Access:
    """Decides who a request is from.

    Parameters
    ----------
    token_owner
        The name and scope of a bearer token's owner; None if it is unknown.
    anonymous
        What may be done without a token: nothing by default.
    clock
        Seconds that only go forwards.
    """

    def __init__(
        self,
        token_owner: Callable[[str], tuple[str, Scope] | None],
        anonymous: Scope | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._token_owner = token_owner
        self._anonymous = None if anonymous is None else Client("anyone", anonymous, known=False)
        self._clock = clock
        self._lock = threading.Lock()
        self._logins: dict[str, tuple[Client, float]] = {}
        self._sessions: dict[str, _Session] = {}

    @classmethod
    def of_token(cls, token: str, anonymous: Scope | None = None) -> Access:
        """Access for one token, which may do everything."""
        return cls(lambda given: ("owner", "admin") if _same(given, token) else None, anonymous)

    @classmethod
    def open(cls) -> Access:
        """Access for everyone to everything."""
        return cls(lambda given: None, "admin")

    def identify(self, request: Request) -> Client | None:
        """Who sends the request; None if nobody is known.

        Raises
        ------
        HttpError
            If a token is wrong, or a cookie comes from another origin's page or without the CSRF token.
        """
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme:
            owner = self._token_owner(given.strip()) if scheme.lower() == "bearer" else None
            if owner is None:
                raise HttpError(401, "the server does not know this token", {"WWW-Authenticate": "Bearer"})
            return Client(*owner)
        session = self._session(request.cookies.get(_cookie_name(request)))
        if session is None:
            return self._anonymous
        if not _own_page(request):
            raise HttpError(403, "a page of another origin may not use this session")
        if request.method not in _READING and not _same(request.headers.get(CSRF_HEADER, ""), session.csrf):
            raise HttpError(403, f"the header {CSRF_HEADER} must have the session's token")
        return session.client

    # The page's session

    def new_login(self, client: Client) -> str:
        """A code that logs a browser in once, in this client's name."""
        code = secrets.token_urlsafe(24)
        with self._lock:
            now = self._clock()
            self._logins = {each: login for each, login in self._logins.items() if login[1] > now}
            self._logins[code] = client, now + LOGIN_LIFE
        return code

    def log_in(self, code: str) -> str | None:
        """Take the code; the session's cookie, or None if the code is unknown, used or too old."""
        with self._lock:
            client, ends = self._logins.pop(code, (None, 0.0))
            now = self._clock()
            if client is None or ends < now:
                return None
            self._sessions = {each: session for each, session in self._sessions.items() if session.ends > now}
            while len(self._sessions) >= MAX_SESSIONS:
                self._sessions.pop(next(iter(self._sessions)))
            cookie = secrets.token_urlsafe(32)
            self._sessions[cookie] = _Session(client, secrets.token_urlsafe(24), now + SESSION_LIFE)
            return cookie

    def log_out(self, cookie: str | None) -> None:
        """End a session."""
        with self._lock:
            self._sessions.pop(cookie or "", None)

    def csrf(self, request: Request) -> str | None:
        """The CSRF token of the request's session, if it has one."""
        session = self._session(request.cookies.get(_cookie_name(request)))
        return None if session is None else session.csrf

    def _session(self, cookie: str | None) -> _Session | None:
        with self._lock:
            session = self._sessions.get(cookie or "")
        return session if session is not None and session.ends > self._clock() else None


def guarded(access: Access, needed: Scope, handler: Handler) -> Handler:
    """Wrap a handler: it is called only for clients that may do what needs this scope."""

    async def answer(request: Request) -> Response:
        try:
            request.state.client = authorised(access.identify(request), needed)
        except HttpError as error:
            return problem(error)
        return await handler(request)

    return answer


def authorised(client: Client | None, needed: Scope) -> Client:
    """The client, if it may do what needs this scope.

    Raises
    ------
    HttpError
        401 if nobody is known, 403 if the scope is too small.
    """
    if client is None or not (client.known or client.may(needed)):
        raise HttpError(401, f"this needs a token with the scope '{needed}'", {"WWW-Authenticate": "Bearer"})
    if not client.may(needed):
        raise HttpError(403, f"this needs the scope '{needed}'; this token has '{client.scope}'")
    return client


def require(request: Request, needed: Scope) -> None:
    """Within a guarded handler: raise HttpError unless the client may also do what needs this scope."""
    authorised(request.state.client, needed)


def login_routes(access: Access, *, secure: bool) -> list[Route]:
    """GET /login?code= sets the cookie and goes to the page; POST /logout ends the session.

    Parameters
    ----------
    access
        Whose sessions.
    secure
        Whether the server is reached by TLS, and the cookie must be, too.
    """

    async def log_in(request: Request) -> Response:
        cookie = access.log_in(request.query_params.get("code", ""))
        if cookie is None:
            return problem(
                HttpError(403, "this address was used before or is too old; get a new one: tinyfleet server login")
            )
        # A page, not a redirect: a browser that came here from elsewhere would not send the cookie along with that.
        answer = HTMLResponse('<!doctype html><meta charset="utf-8"><meta http-equiv="refresh" content="0; url=/">')
        answer.set_cookie(
            _cookie_name(request), cookie, int(SESSION_LIFE), httponly=True, samesite="strict", secure=secure, path="/"
        )
        return answer

    async def log_out(request: Request) -> Response:
        access.log_out(request.cookies.get(_cookie_name(request)))
        answer = Response(status_code=204)
        answer.delete_cookie(_cookie_name(request), httponly=True, samesite="strict", secure=secure)
        return answer

    return [
        Route("/login", log_in, methods=["GET"]),
        Route("/logout", guarded(access, "read", log_out), methods=["POST"]),
    ]


def _cookie_name(request: Request) -> str:
    return COOKIE.format(port=(request.scope.get("server") or ("", 0))[1])


def _same(given: str, expected: str) -> bool:
    return hmac.compare_digest(given.encode(), expected.encode())


def _own_page(request: Request) -> bool:
    """Whether a browser says that the request is of one of this server's own pages, or of its user."""
    site = request.headers.get("sec-fetch-site")
    if site is not None and site not in ("same-origin", "none"):
        return False
    origin = request.headers.get("origin")
    return origin is None or origin == f"{request.url.scheme}://{request.headers.get('host')}"


class Boundary:
    """ASGI middleware: requests under this server's own names only, headers that protect pages, and the origins whose
    pages may use a token.

    Parameters
    ----------
    app
        The application.
    hosts
        Host names and addresses of this server: a page must not reach it by giving this machine another name.
    origins
        Origins whose pages may send requests with a token, never with a cookie.
    answers
        Counts the answers by their status.
    """

    def __init__(self, app: ASGIApp, hosts: frozenset[str], origins: frozenset[str], answers: Counter[int]) -> None:
        self._answers = answers
        self._app = app
        self._hosts = hosts
        self._origins = origins

    async def __call__(self, scope: Connection, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        origin = headers.get("origin")
        added = [(b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer")]
        if origin in self._origins and origin is not None:
            added += [(b"access-control-allow-origin", origin.encode()), (b"vary", b"Origin")]
        if not self._known_host(headers.get("host", "")):
            await problem(HttpError(400, "this server does not have that host name"))(scope, receive, send)
            self._answers[400] += 1
            return
        if scope["method"] == "OPTIONS" and origin in self._origins and "access-control-request-method" in headers:
            added += [
                (b"access-control-allow-methods", b"GET, POST, PUT, PATCH, DELETE"),
                (b"access-control-allow-headers", b"Authorization, Content-Type, Accept, Last-Event-ID"),
                (b"access-control-max-age", b"600"),
            ]
            await Response(status_code=204, headers={k.decode(): v.decode() for k, v in added})(scope, receive, send)
            return

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._answers[message["status"]] += 1
                present = {name.lower() for name, _ in message["headers"]}
                message["headers"] = [*message["headers"], *(each for each in added if each[0] not in present)]
                if b"cache-control" not in present and not scope["path"].startswith("/page/"):
                    message["headers"].append((b"cache-control", b"no-store"))
            await send(message)

        await self._app(scope, receive, answer)

    def _known_host(self, host: str) -> bool:
        try:
            return urlsplit(f"//{host}").hostname in self._hosts
        except ValueError:
            return False
