"""Enrolment over HTTP: a token becomes an identity. The fleet's owner makes tokens, lists and revokes identities."""

from __future__ import annotations

import base64
import time
from collections.abc import Awaitable, Callable, Mapping
from datetime import timedelta
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from tinyfleet.edge.errors import UserError
from tinyfleet.edge.wire.json_text import parse_json
from tinyfleet.ontology.http import request_handling
from tinyfleet.ontology.http.access import Served
from tinyfleet.ontology.http.request_handling import HttpError, in_thread
from tinyfleet.server.authority.authority import TOKEN_LIFE, Authority
from tinyfleet.server.authority.identities import ROLES, Role

MAX_REQUEST = 16_384
MAX_COUNT = 10_000
"""Names in one token at most."""
MAX_LIFE = timedelta(days=366)


class EnrolmentApi:
    """The handlers.

    Parameters
    ----------
    authority
        The fleet's authority.
    about
        What a new identity is told of the fleet: its name, and the addresses of the broker for its role.
    on_new_keys
        Called when the fleet's keys have changed.
    """

    def __init__(
        self,
        authority: Authority,
        about: Callable[[Role], Mapping[str, str]],
        on_new_keys: Callable[[], None] = lambda: None,
    ) -> None:
        self._on_new_keys = on_new_keys
        self._authority = authority
        self._about = about
        self.served = [
            Served("GET", "/ca.pem", None, self._ca),
            Served("POST", "/enrol", None, _answering(self._enrol)),
            Served("POST", "/renew", None, _answering(self._renew)),
            Served("GET", "/identities", "admin", _answering(self._list)),
            Served("POST", "/identities/tokens", "admin", _answering(self._open_token)),
            Served("DELETE", "/identities/{name}", "admin", _answering(self._revoke)),
            Served("GET", "/fleet-keys/proposed", "admin", _answering(self._propose_keys)),
            Served("POST", "/fleet-keys", "admin", _answering(self._change_keys)),
        ]

    async def _ca(self, request: Request) -> Response:
        return PlainTextResponse(self._authority.ca_file.read_text(), media_type="application/x-pem-file")

    async def _enrol(self, request: Request) -> Response:
        given = await _object(request)
        secret, name, csr = (_string(given, field) for field in ("secret", "name", "request"))
        done = await in_thread(lambda: self._authority.enrol(secret, name, csr))
        content: dict[str, Any] = {**self._about(done.role), "role": done.role, "certificate": done.certificate}
        content |= {"issued": done.issued, "expires": done.expires}
        if done.command_key is not None:
            change = done.keys.change
            content["command_key"] = done.command_key.hex()
            content["fleet_keys"] = [change.current.hex(), change.next.hex()]
            content |= {"keys_version": change.version, "root_key": done.keys.root.hex()}
        if done.api_token is not None:
            content["api_token"] = done.api_token
        return JSONResponse(content, 201)

    async def _renew(self, request: Request) -> Response:
        given = await _object(request)
        name, csr, signed = (_string(given, field) for field in ("name", "request", "signature"))
        try:
            signature = base64.b64decode(signed, validate=True)
        except ValueError:
            raise HttpError(400, "the signature must be in base64") from None
        issued = await in_thread(lambda: self._authority.renew(name, csr, signature))
        return JSONResponse({"certificate": issued.pem, "issued": int(time.time()), "expires": issued.not_after})

    async def _open_token(self, request: Request) -> Response:
        given = await _object(request)
        names, role = given.get("names"), given.get("role", "device")
        url = _string(given, "url") if "url" in given else self._about("device")["http"]
        life, replace = given.get("life", TOKEN_LIFE.total_seconds()), given.get("replace", False)
        if not isinstance(names, list) or not 1 <= len(names) <= MAX_COUNT or len(set(map(str, names))) < len(names):
            raise HttpError(400, f"names must be an array of 1 to {MAX_COUNT} different names")
        if not all(isinstance(name, str) for name in names) or role not in ROLES or not isinstance(replace, bool):
            raise HttpError(400, f"a name must be text, the role {' or '.join(ROLES)}, replace true or false")
        if not isinstance(life, (int, float)) or not 1 <= life <= MAX_LIFE.total_seconds():
            raise HttpError(400, f"a token's life must be 1 to {MAX_LIFE.total_seconds():.0f} seconds")
        token = await in_thread(
            lambda: self._authority.open_token(names, role, url, timedelta(seconds=life), replace=replace)
        )
        return JSONResponse({"token": token.text}, 201)

    async def _list(self, request: Request) -> Response:
        records = await in_thread(self._authority.records)
        rows = [
            {
                "name": each.name,
                "role": each.role,
                "created": each.created.isoformat(),
                "expires": each.expires.isoformat(),
                "revoked": None if each.revoked is None else each.revoked.isoformat(),
            }
            for each in records
        ]
        return JSONResponse(rows)

    async def _propose_keys(self, request: Request) -> Response:
        change = await in_thread(self._authority.propose_keys)
        return JSONResponse({"version": change.version, "current": change.current.hex(), "next": change.next.hex()})

    async def _change_keys(self, request: Request) -> Response:
        text = _string(await _object(request), "sealed")
        try:
            sealed = bytes.fromhex(text)
        except ValueError:
            raise HttpError(400, "sealed must be hexadecimal digits") from None
        await in_thread(lambda: self._authority.change_keys(sealed, self._about("device")["fleet"]))
        await in_thread(self._on_new_keys)
        return JSONResponse({"version": self._authority.fleet_keys.version})

    async def _revoke(self, request: Request) -> Response:
        role = await in_thread(lambda: self._authority.revoke(request.path_params["name"]))
        return JSONResponse({"role": role})


def _answering(handler: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
    """Wrap a handler so that its errors become Problem Details."""

    async def answer(request: Request) -> Response:
        try:
            return await handler(request)
        except HttpError as error:
            return request_handling.problem(error)
        except UserError as error:
            return request_handling.problem(HttpError(403, str(error)))

    return answer


async def _object(request: Request) -> dict[str, Any]:
    content = await request_handling.body(request, MAX_REQUEST + 40 * MAX_COUNT)
    try:
        given = parse_json(content, max_values=MAX_COUNT + 10, max_depth=2)
    except ValueError as error:
        raise HttpError(400, str(error)) from None
    if not isinstance(given, dict):
        raise HttpError(400, "the content must be a JSON object")
    return given


def _string(given: Mapping[str, Any], field: str) -> str:
    value = given.get(field)
    if not isinstance(value, str) or not 1 <= len(value) <= MAX_REQUEST:
        raise HttpError(400, f"{field} must be text of at most {MAX_REQUEST} characters")
    return value
