"""Model cards: what they say goes into the graph, what they do not say stays unknown, and a bad one is refused."""

import contextlib
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyfleet.edge.model.graph import Layer
from tinyfleet.ontology.ingest import describe, model_card
from tinyfleet.ontology.ingest.describe import ModelDescription
from tinyfleet.ontology.ingest.model_card import MetricValue, ModelCard, ModelCardError
from tinyfleet.ontology.store.store import EmbeddedStore

FULL = """---
language: en
license: apache-2.0
pipeline_tag: audio-classification
datasets:
- speech_commands
- https://example.org/more
metrics: [accuracy]
model-index:
- name: words
  results:
  - task: {type: audio-classification}
    dataset: {type: speech_commands, name: Speech Commands v2}
    metrics:
    - {type: accuracy, value: 0.92}
    - {type: f1, value: unknown}
tinyfleet:
  description: Hears ten words
  creator: A lab
  created: 2024-05-01
  observes: sound
  input: one second at 16 kHz
  labels: [no, yes, 3, "up"]
---
# Words

A model of ten words.
"""


def test_a_card_is_read() -> None:
    assert model_card.parse_model_card(FULL) == ModelCard(
        pipeline_tag="audio-classification",
        license="apache-2.0",
        description="Hears ten words",
        creator="A lab",
        created="2024-05-01",
        datasets=("speech_commands", "https://example.org/more"),
        scores=(MetricValue("accuracy", 0.92, "Speech Commands v2"),),
        labels=("no", "yes", "3", "up"),
        input_properties=("sound",),
        input_info="one second at 16 kHz",
    )


@pytest.mark.parametrize("text", ["", "# Only Markdown\n", "--- no head\n", "---\n---\n", "---\n# nothing\n---\n"])
def test_without_a_head_there_is_no_card(text: str) -> None:
    assert model_card.parse_model_card(text) is None


def test_what_a_card_does_not_say_is_unknown() -> None:
    assert model_card.parse_model_card("---\nlicense: mit\n---\n") == ModelCard(license="mit")
    assert model_card.parse_model_card("---\nlicense:\ndatasets:\nmodel-index:\ntinyfleet:\n---\n") == ModelCard()


@pytest.mark.parametrize(
    ("head", "reason"),
    [
        ("- a\n- b", "mapping"),
        ("license: [mit", "not YAML"),
        ("license: [mit]", "'license' must be one text"),
        ("license: !!python/object/apply:os.system [ls]", "not YAML"),
        ("datasets: {a: b}", "'datasets' must be a list of texts"),
        ("model-index: 5", "'model-index'"),
        ("model-index: [5]", "'model-index'"),
        ("tinyfleet: sound", "'tinyfleet' must be a mapping"),
        ("tinyfleet: {observes: [the sea]}", "'observes': 'the sea'"),
        ("tinyfleet: {labels: [[a]]}", "'labels' must be a list of texts"),
        ("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]", "aliases"),
        ("a: " + "[" * 5000, "not YAML"),
    ],
)
def test_a_bad_card_is_refused(head: str, reason: str) -> None:
    with pytest.raises(ModelCardError, match=reason.replace("(", r"\(")) as error:
        model_card.parse_model_card(f"---\n{head}\n---\n")
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


@given(st.text(max_size=200))
def test_no_text_breaks_the_reader(text: str) -> None:
    with contextlib.suppress(ModelCardError):
        model_card.parse_model_card(f"---\n{text}\n---\n")


def test_the_card_beside_a_model(tmp_path: Path) -> None:
    model = tmp_path / "words.tflite"
    assert model_card.find_model_card(model) is None
    (tmp_path / "README.md").write_text(FULL, encoding="utf-8")
    assert (found := model_card.find_model_card(model)) is not None and found.license == "apache-2.0"
    (tmp_path / "words.md").write_text("---\nlicense: mit\n---\n", encoding="utf-8")
    assert model_card.find_model_card(model) == ModelCard(license="mit")
    (tmp_path / "words.md").write_bytes(b"---\nlicense: \xff\n---\n")
    with pytest.raises(ModelCardError, match=r"words\.md is not UTF-8"):
        model_card.find_model_card(model)
    (tmp_path / "words.md").write_bytes(b" " * 2_000_000)
    with pytest.raises(ModelCardError, match="longer than"):
        model_card.find_model_card(model)
    shutil.rmtree(tmp_path)
    assert model_card.find_model_card(model) is None


def test_a_card_becomes_facts_and_goes_with_a_new_description() -> None:
    layers = (Layer("l", "CONV_2D", (4,), (4,), 8, 10, "int8 per-channel", activation="relu"),)
    model = ModelDescription("words", "tflite", "ab" * 32, 10, layers, card=model_card.parse_model_card(FULL))
    prefixes = """PREFIX nnet: <https://w3id.org/tinyml-schema/neural-network-schema#>
    PREFIX rdf: <http://www.w3.org/1999/02/22-rdf-syntax-ns#>
    PREFIX schema: <https://schema.org/> PREFIX tf: <https://w3id.org/tinyfleet#>"""
    with EmbeddedStore() as store:
        describe.put_model(store, model)
        row = store.query(
            f"""{prefixes} SELECT * {{
              ?m tf:pipelineTag ?tag ; nnet:hasCategory nnet:Classification ; schema:license ?license .
              ?m tf:inputProperty <https://w3id.org/tinyfleet/property/sound> .
              ?m tf:metric [ a nnet:Top_1_accuracy ; tf:metricName ?metric ; tf:metricValue ?value ] .
              ?m tf:classLabels/rdf:rest/rdf:first ?second .
              ?m tf:dataset <urn:tinyfleet:dataset:speech_commands>, <https://example.org/more> .
              ?m tf:layer [ nnet:hasActivation nnet:Relu ] .
            }}"""
        )
        assert [(r["tag"], r["license"], r["metric"], r["value"], r["second"]) for r in row] == [
            ("audio-classification", "apache-2.0", "accuracy", 0.92, "yes")
        ]
        describe.put_model(store, describe.replace(model, card=None))
        for term in ("tf:pipelineTag", "tf:metricValue", "tf:classLabels", "tf:dataset", "nnet:hasCategory"):
            assert not store.ask(f"{prefixes} ASK {{ ?s {term} ?o }}"), term
        assert not store.ask(f'{prefixes} ASK {{ ?s rdf:first "yes" }}')
