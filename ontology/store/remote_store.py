"""The graph of a server that speaks the SPARQL 1.1 Protocol."""

import json
import ssl
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyoxigraph as ox

from tinyfleet.ontology.store.store import (
    Binding,
    Dataset,
    QueryResult,
    Store,
    StoreError,
    Unreachable,
    bind,
    short_message,
)


class RemoteStore(Store):
    """A server of the SPARQL 1.1 Protocol.

    Parameters
    ----------
    url
        Address for queries.
    token
        Sent with every request as a bearer token.
    ca
        PEM file with the authority of the server's certificate. Default: the system's authorities.
    update_url
        Address for updates, if it is another one (as with Fuseki, oxigraph and GraphDB).
    timeout
        Seconds to wait for an answer.
    """

    def __init__(
        self,
        url: str,
        token: str | None = None,
        *,
        ca: Path | None = None,
        update_url: str | None = None,
        timeout: float = 30.0,
    ) -> None:
        if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
            raise StoreError(f"{url!r} is not the address of a SPARQL endpoint; it must begin with http:// or https://")
        self._url = url
        self._update_url = update_url or url
        self._token = token
        self._timeout = timeout
        host = urllib.parse.urlsplit(url).hostname or ""
        # A proxy from the environment is not meant for a server on this machine.
        proxies: dict[str, str] | None = {} if host in ("localhost", "::1") or host.startswith("127.") else None
        tls = urllib.request.HTTPSHandler(context=ssl.create_default_context(cafile=ca))
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler(proxies), tls)

    def _post(self, url: str, form: Mapping[str, str | Sequence[str]], accept: str) -> tuple[str, bytes]:
        try:
            body = urllib.parse.urlencode(form, doseq=True).encode()
        except UnicodeEncodeError as error:
            raise StoreError(f"the text cannot be sent: {error}") from None
        request = urllib.request.Request(url, data=body, headers={"Accept": accept})
        if self._token:
            request.add_header("Authorization", f"Bearer {self._token}")
        try:
            with self._opener.open(request, timeout=self._timeout) as response:
                return response.headers.get_content_type(), response.read()
        except urllib.error.HTTPError as error:
            with error:
                detail = error.read(2000).decode(errors="replace").strip() or error.reason
            raise StoreError(f"{url} did not accept the request ({error.code}): {short_message(detail)}") from None
        except (OSError, urllib.error.URLError) as error:
            reason = getattr(error, "reason", error)
            raise Unreachable(f"no answer from {url} ({reason}); is the server running?") from None

    def evaluate(self, sparql: str, dataset: Dataset | None = None, /, **bindings: Binding) -> QueryResult:
        form: dict[str, str | Sequence[str]] = {"query": bind(sparql, bindings)}
        if dataset is not None:
            form |= {"default-graph-uri": dataset.default, "named-graph-uri": dataset.named}
        kind, body = self._post(self._url, form, "application/sparql-results+json, application/n-triples;q=0.9")
        try:
            if kind == "application/sparql-results+json":
                return ox.parse_query_results(body, ox.QueryResultsFormat.JSON)
            # Oxigraph has no public constructor for QueryTriples, so let it query a graph of them.
            own = ox.Store()
            own.load(body, ox.RdfFormat.N_TRIPLES)
            return own.query("CONSTRUCT { ?s ?p ?o } WHERE { ?s ?p ?o }")
        except (SyntaxError, ValueError, json.JSONDecodeError) as error:
            raise StoreError(
                f"{self._url} answered with something other than a SPARQL result ({kind}): {error}"
            ) from None

    def update(self, sparql: str) -> None:
        self._post(self._update_url, {"update": sparql}, "*/*")

    def close(self) -> None:
        """Nothing is held between requests."""
