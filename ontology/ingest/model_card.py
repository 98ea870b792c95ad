"""Reads a model card: what a model's file cannot know, from the YAML at the head of a Markdown file beside it.

The card is that of Hugging Face (`pipeline_tag`, `license`, `datasets`, `metrics` with values under `model-index`), and
a block of our own:

    tinyfleet:
      observes: [acceleration, angular-velocity]   # what the input is, by the names of catalogue.ttl
      input: 128 samples of three axes at 25 Hz    # more about the input, as text
      labels: [wing, ring, slope, negative]        # what each output means, in their order
      description, creator, citation, created      # texts

What it does not say stays unknown: nothing is 0 or empty because the card is missing.
"""

import math
import re
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import yaml

from tinyfleet.edge.errors import UserError
from tinyfleet.ontology.vocabulary.namespaces import property_iri

_MAX_BYTES = 1_000_000
_MAX_HEAD = 16_000  # YAML's parser is slow
_MAX_ITEMS = 2_000


class ModelCardError(UserError):
    """The card cannot be read, or says what cannot be; the message names the entry."""


@dataclass(frozen=True)
class MetricValue:
    """A value of a metric, such as accuracy, on a data set if the card says on which."""

    metric: str
    value: float
    dataset: str | None = None


@dataclass(frozen=True)
class ModelCard:
    """What a model card says; None or empty where it says nothing."""

    pipeline_tag: str | None = None
    license: str | None = None
    description: str | None = None
    creator: str | None = None
    citation: str | None = None
    created: str | None = None
    datasets: tuple[str, ...] = ()
    """Names, or addresses."""
    scores: tuple[MetricValue, ...] = ()
    labels: tuple[str, ...] = ()
    input_properties: tuple[str, ...] = ()
    """Names of observable properties."""
    input_info: str | None = None


def find_model_card(model: Path) -> ModelCard | None:
    """The card beside a model's file: {name}.md, or else README.md in its folder if it has YAML at its head. None if
    there is none. Raises ModelCardError."""
    for path in (model.with_suffix(".md"), model.with_name("README.md")):
        try:
            with path.open("rb") as file:
                data = file.read(_MAX_BYTES + 1)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise ModelCardError(f"{path} cannot be read: {error.strerror}") from None
        try:
            if len(data) > _MAX_BYTES:
                raise ModelCardError(f"it is longer than {_MAX_BYTES:,} bytes")
            card = parse_model_card(data.decode("utf-8"))
        except UnicodeDecodeError:
            raise ModelCardError(f"{path} is not UTF-8 text; write the model card as such") from None
        except ModelCardError as error:
            raise ModelCardError(f"{path}: {error}") from None
        if card is not None:
            return card
    return None


def parse_model_card(text: str) -> ModelCard | None:
    """The card of a Markdown text; None if there is no YAML at its head. Raises ModelCardError."""
    found = re.match(r"---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", text, re.DOTALL)
    if found is None:
        return None
    if len(found[1]) > _MAX_HEAD:
        raise ModelCardError(f"its head is longer than {_MAX_HEAD:,} characters")
    try:
        said = yaml.load(found[1], _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ModelCardError(f"its head is not YAML: {' '.join(str(error).split())[:200]}") from None
    if said is None:
        return None
    if not isinstance(said, dict):
        raise ModelCardError("its head must be a mapping, such as 'license: mit'")
    own = said.get("tinyfleet") or {}
    if not isinstance(own, dict):
        raise ModelCardError("'tinyfleet' must be a mapping, such as 'observes: [sound]'")
    properties = _texts(own, "observes")
    for name in properties:
        try:
            property_iri(name)
        except UserError as error:
            raise ModelCardError(f"'observes': {error}") from None
    return ModelCard(
        pipeline_tag=_text(said, "pipeline_tag"),
        license=_text(said, "license"),
        description=_text(own, "description") or _text(said, "model_summary"),
        creator=_text(own, "creator"),
        citation=_text(own, "citation"),
        created=_text(own, "created"),
        datasets=_texts(said, "datasets"),
        scores=_scores(said),
        labels=_texts(own, "labels"),
        input_properties=properties,
        input_info=_text(own, "input"),
    )


class _Loader(yaml.SafeLoader):
    """Without aliases: a card of a few bytes could otherwise stand for gigabytes."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not taken")
        return super().compose_node(parent, index)


def _text(said: dict[str, Any], key: str) -> str | None:
    value = said.get(key)
    if value is None or value == "":
        return None
    if isinstance(value, list | dict):
        raise ModelCardError(f"'{key}' must be one text, not a {type(value).__name__}")
    return value.isoformat() if isinstance(value, date) else str(value)


def _texts(said: dict[str, Any], key: str) -> tuple[str, ...]:
    value = said.get(key)
    if value is None:
        return ()
    items = value if isinstance(value, list) else [value]
    if len(items) > _MAX_ITEMS or any(isinstance(item, list | dict) or item in (None, "") for item in items):
        raise ModelCardError(f"'{key}' must be a list of texts, at most {_MAX_ITEMS}")
    # YAML reads yes and no as booleans, which as labels they never are.
    return tuple({True: "yes", False: "no"}[item] if isinstance(item, bool) else str(item) for item in items)


def _scores(said: dict[str, Any]) -> tuple[MetricValue, ...]:
    """The values under model-index: its results' metrics. Those without a number (a range, a '-') are left out."""
    scores = []
    try:
        for model in said.get("model-index") or ():
            for result in model.get("results") or ():
                dataset = (result.get("dataset") or {}).get("name")
                for metric in result.get("metrics") or ():
                    value = metric.get("value")
                    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
                        name = metric.get("type") or metric.get("name")
                        scores.append(MetricValue(str(name), float(value), None if dataset is None else str(dataset)))
    except (AttributeError, TypeError):
        raise ModelCardError("'model-index' must be a list of models with results with metrics") from None
    if len(scores) > _MAX_ITEMS:
        raise ModelCardError(f"'model-index' holds more than {_MAX_ITEMS} values")
    return tuple(scores)
