"""The store: the same queries, values and updates in memory, on disk and over HTTP."""

import math
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ontology_fixtures import everything, open_store

from tinyfleet.ontology.store.remote_store import RemoteStore
from tinyfleet.ontology.store.store import EmbeddedStore, Store, StoreError, Value, bind, parameters
from tinyfleet.ontology.vocabulary.namespaces import Iri

S, P, Q = Iri("urn:s"), Iri("urn:p"), Iri("urn:q")
ALL = "SELECT ?o WHERE { VALUES ?p { UNDEF } ?s ?p ?o }"


@pytest.fixture(params=["memory", "disk", "indexed", "remote", "oxigraph"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    with open_store(request.param, tmp_path) as opened:
        yield opened


def test_values_come_back_as_they_went_in(store: Store) -> None:
    values: list[Value] = [
        Iri("https://example.org/é"), "text", 'a "quoted"\n\\ text', "", True, False, 7, -1, 10**30, 0.5, 1e-300,
        datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
    ]  # fmt: skip
    for value in values:
        store.write({S: {P: value}})
        (row,) = store.query("SELECT ?o WHERE { ?s ?p ?o }")
        assert row["o"] == value
        assert type(row["o"]) is type(value)


def test_an_unbound_variable_is_absent_from_its_row(store: Store) -> None:
    store.add([(S, P, 1)])
    rows = store.query("SELECT ?o ?none WHERE { ?s ?p ?o OPTIONAL { ?o ?p ?none } }")
    assert rows.variables == ("o", "none")
    assert list(rows) == [{"o": 1}]
    assert rows.column("none") == []


def test_the_forms_of_query(store: Store) -> None:
    store.add([(S, P, 1)])
    assert store.ask("ASK { ?s ?p 1 }") is True
    assert store.ask("ASK { ?s ?p 2 }") is False
    assert [str(t) for t in store.construct("CONSTRUCT { ?s ?p 2 } WHERE { ?s ?p 1 }")] == [
        '<urn:s> <urn:p> "2"^^<http://www.w3.org/2001/XMLSchema#integer>'
    ]
    for wrong in (lambda: store.ask(ALL), lambda: store.query("ASK { }"), lambda: store.construct(ALL)):
        with pytest.raises(StoreError, match="not a"):
            wrong()


def test_a_parameter_is_free_or_bound_to_one_value_or_to_several(store: Store) -> None:
    store.add([(S, P, 1), (S, Q, 2), (S, Iri("urn:r"), 3)])
    ask = "SELECT ?o WHERE { VALUES ?p { UNDEF } ?s ?p ?o } ORDER BY ?o"
    assert store.query(ask).column("o") == [1, 2, 3]
    assert store.query(ask, p=Q).column("o") == [2]
    assert store.query(ask, p=[P, Q]).column("o") == [1, 2]
    assert store.query(ask, p=[]).column("o") == []


def test_binding_finds_no_parameters_in_texts_comments_and_iris() -> None:
    query = """# VALUES ?a { UNDEF }
    SELECT ?o WHERE { # VALUES ?a { UNDEF }
      VALUES ?o { "VALUES ?a { UNDEF }" 'it\\'s VALUES ?a { UNDEF }' '''VALUES ?a { UNDEF }' '''
                  \"\"\"VALUES ?a { UNDEF }" \"\"\" <http://x/#VALUES> }
      values $b { undef } VALUES ?c {UNDEF}
    }"""
    assert parameters(query) == ["b", "c"]
    bound = bind(query, {"b": 1, "c": "x"})
    assert bound.count("VALUES ?a { UNDEF }") == 6
    assert 'VALUES ?c { "x" }' in bound
    with pytest.raises(StoreError, match=r"no parameter 'a' \(it has b, c\)"):
        bind(query, {"a": 1})
    with pytest.raises(StoreError, match="it has none"):
        bind("ASK { }", {"a": 1})


text = st.text(st.characters(exclude_categories=["Cs"]))
sharp = st.lists(st.sampled_from(['"', "'", "\\", "\n", "\r", "}", "{", "<", ">", "#", "u0022", "?x", "ü", "\0"])).map(
    "".join
)
values = st.one_of(text, sharp, st.booleans(), st.integers(), st.floats(allow_nan=False))


@pytest.fixture(scope="module", params=["memory", "remote", "oxigraph"])
def shared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    with open_store(request.param, tmp_path_factory.mktemp("store")) as opened:
        opened.add([(S, P, "kept")])
        yield opened


@settings(max_examples=150, deadline=None)
@given(value=values)
def test_any_value_can_be_bound_and_is_only_a_value(shared: Store, value: Value) -> None:
    rows = shared.query("SELECT ?v WHERE { VALUES ?v { UNDEF } }", v=value)
    assert len(rows) == 1
    back = rows[0]["v"]
    if isinstance(value, float) and math.isinf(value):
        assert back == value
    else:
        assert back == value and type(back) is type(value)
    assert shared.ask("ASK { VALUES ?s { <urn:s> } ?s <urn:p> 'kept' }")


@settings(max_examples=50, deadline=None)
@given(value=st.one_of(text, sharp))
def test_any_text_can_be_written(shared: Store, value: str) -> None:
    shared.write({Iri("urn:w"): {Q: value}})
    assert shared.query("SELECT ?o WHERE { <urn:w> <urn:q> ?o }").column("o") == [value]


@settings(max_examples=100, deadline=None)
@given(iri=st.one_of(text, sharp, sharp.map("urn:x".__add__)))
def test_what_is_no_iri_cannot_be_bound_as_one(shared: Store, iri: str) -> None:
    try:
        rows = shared.query("SELECT ?v WHERE { VALUES ?v { UNDEF } }", v=Iri(iri))
    except StoreError as error:
        assert "cannot be a term" in str(error)
    else:
        assert rows.column("v") == [iri]


@pytest.mark.parametrize("bad", ["\ud800", None, object(), b"bytes"])
def test_what_no_term_can_hold_is_refused(bad: Value) -> None:
    with pytest.raises(StoreError, match="cannot be a term"):
        bind("SELECT ?v WHERE { VALUES ?v { UNDEF } }", {"v": [bad]})


def test_writing_replaces_the_predicates_it_names_and_no_others(store: Store) -> None:
    store.add([(S, P, 1), (S, P, 2), (S, Q, 3), (Q, P, 4)])
    store.write({S: {P: [5, 6]}})
    assert sorted(store.query(ALL, p=P).column("o")) == [4, 5, 6]
    store.write({S: {P: None, Q: 3}})
    assert everything(store) == [("urn:q", "urn:p", "4"), ("urn:s", "urn:q", "3")]
    before = everything(store)
    store.write({S: {Q: 3}})
    assert everything(store) == before
    store.write({})
    store.remove(S)
    assert everything(store) == [("urn:q", "urn:p", "4")]


def test_an_update_is_done_whole_or_not_at_all(store: Store) -> None:
    store.add([(S, P, 1)])
    with pytest.raises(StoreError, match=r"not valid SPARQL|did not accept the request \(400\): error at 1:"):
        store.update("INSERT DATA { <urn:a> <urn:b> 1 } ; DELETE WHERE { ?s ?p }")
    with pytest.raises(StoreError):
        store.write({S: {P: 9}, Q: {P: Iri("no iri")}})
    with pytest.raises(StoreError):
        store.add([(Q, P, 1), (Q, P, Iri("no iri"))])
    with pytest.raises(StoreError, match="is text"):
        store.add([("urn:a", P, 1)])  # type: ignore[list-item]
    assert everything(store) == [("urn:s", "urn:p", "1")]


def test_a_wrong_query_is_one_clear_line(store: Store) -> None:
    with pytest.raises(StoreError) as error:
        store.query("SELECT ?s WHERE { ?s ?p ")
    assert re.search(
        r"(the query is not valid SPARQL|did not accept the request \(400\)): error at 1:", str(error.value)
    )
    assert len(str(error.value)) < 200
    assert "\n" not in str(error.value)


def test_a_store_on_disk_keeps_what_was_written(tmp_path: Path) -> None:
    with EmbeddedStore(tmp_path / "deep" / "graph") as store:
        store.write({S: {P: "kept", Q: 1}})
        store.write({S: {Q: 2}})
        before = everything(store)
    with EmbeddedStore(tmp_path / "deep" / "graph") as store:
        assert everything(store) == before
        assert len(store) == 2


def test_a_store_on_disk_is_one_processs_own(tmp_path: Path) -> None:
    with EmbeddedStore(tmp_path), pytest.raises(StoreError, match="in use by another process"):
        EmbeddedStore(tmp_path)


def test_a_folder_that_cannot_hold_a_store_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreError, match="choose another folder"):
        EmbeddedStore(tmp_path / "file")


def test_a_closed_store_says_so() -> None:
    store = EmbeddedStore()
    store.close()
    store.close()
    with pytest.raises(StoreError, match="closed"):
        store.query("ASK { }")


def test_a_server_that_is_not_there_or_is_none_is_said(free_port_number: int) -> None:
    with pytest.raises(StoreError, match="is the server running"):
        RemoteStore(f"http://127.0.0.1:{free_port_number}/sparql").ask("ASK { }")
    with pytest.raises(StoreError, match="must begin with http"):
        RemoteStore("file:///etc/passwd")


@pytest.fixture
def free_port_number() -> int:
    from conftest import free_port

    return free_port()
