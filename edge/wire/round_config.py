"""What one round asks of every device, as Flower's ConfigRecords carry it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from tinyfleet.edge.wire.cbor import uint32
from tinyfleet.edge.wire.commands import ALL_LAYERS, MAX_PHASES, Kind, Phase, UpdateFormat
from tinyfleet.edge.wire.errors import ProtocolError

_FLOAT32_MAX = (2.0 - 2.0**-23) * 2.0**127


class RoundConfig(NamedTuple):
    """What one round asks of every device: see TrainTask for the fields."""

    phases: tuple[Phase, ...]
    query: int
    update: UpdateFormat | None
    seed: int


def parse_round_config(config: Mapping[str, Any], kind: Kind = "train", node: int = 0) -> RoundConfig:
    """Read what a round asks of one node from a Flower ConfigRecord, which any strategy may have filled.

    Parameters
    ----------
    config
        Keys that are absent have a default: "phase-steps" is [32] to train and [] to evaluate; "phase-layers" all
        layers; "phase-rates" the value of "lr" (as Flower's own examples call it), else 0.05; "query" 0 to train, 32 to
        evaluate; "shared-layers" all, "density" 1, "half" false, "since" 0; "seed" another for every round and node.
        Two keys are those that Flower's strategies set: "proximal-mu" (FedProx), of every phase, and "clipping_norm"
        (differential privacy with clipping on the device).
    kind
        Whether the round trains or evaluates. An evaluation sends no update.
    node
        The node's number, for its seed.

    Raises
    ------
    ProtocolError
        If a value does not fit the wire, or if values contradict each other.
    """
    config = dict(config.items())  # a ConfigRecord takes its time over each key
    phases = _phases(config, kind)
    update = _update_format(config, phases) if kind == "train" else None
    query = uint32(int(config.get("query", 0 if kind == "train" else 32)), "query")
    seed = config["seed"] if "seed" in config else config.get("server-round", 0) + node * 0x9E3779B1
    return RoundConfig(phases, query, update, int(seed) & 0xFFFFFFFF)


def _phases(config: Mapping[str, Any], kind: Kind) -> tuple[Phase, ...]:
    steps = _sequence(config, "phase-steps", [32] if kind == "train" else [])
    layers = _sequence(config, "phase-layers", [ALL_LAYERS] * len(steps))
    rates = _sequence(config, "phase-rates", [config.get("lr", 0.05)] * len(steps))
    if not len(steps) == len(layers) == len(rates) <= MAX_PHASES:
        raise ProtocolError(
            f"phase-steps, phase-layers and phase-rates must have the same length, at most {MAX_PHASES}: "
            f"{len(steps)}, {len(layers)}, {len(rates)}"
        )
    mu = _finite(config.get("proximal-mu", 0.0), "proximal-mu")
    phases = tuple(
        Phase(uint32(int(layer), "phase-layers"), uint32(int(step), "phase-steps"), _finite(rate, "phase-rates"), mu)
        for layer, step, rate in zip(layers, steps, rates, strict=True)
    )
    if phases and (mu < 0 or any(mu > 0 and phase.rate * mu >= 1 for phase in phases)):
        raise ProtocolError(f"proximal-mu times the rate must be less than 1, and not negative; mu is {mu:g}")
    return phases


def _update_format(config: Mapping[str, Any], phases: tuple[Phase, ...]) -> UpdateFormat:
    update = UpdateFormat(
        shared=uint32(int(config.get("shared-layers", ALL_LAYERS)), "shared-layers"),
        half=bool(config.get("half", False)),
        density=_finite(config.get("density", 1.0), "density"),
        since=uint32(int(config.get("since", 0)), "since"),
        clip=_finite(config.get("clipping_norm", 0.0), "clipping_norm"),
    )
    if not 0 < update.density <= 1:
        raise ProtocolError(f"density is the share of the changes to send, in (0, 1], not {update.density:g}")
    if update.since and (update.since >= len(phases) or any(phase.proximal_mu for phase in phases)):
        raise ProtocolError("since is the number of a phase, and can't be combined with proximal-mu")
    if update.clip < 0:
        raise ProtocolError(f"clipping_norm is the largest norm of an update, not {update.clip:g}")
    return update


def format_round_config(round_config: RoundConfig) -> dict[str, int | float | bool | list[int] | list[float]]:
    """The inverse of `parse_round_config`, for a strategy to put into its ConfigRecord."""
    config: dict[str, int | float | bool | list[int] | list[float]] = {
        "phase-layers": [phase.layers for phase in round_config.phases],
        "phase-steps": [phase.steps for phase in round_config.phases],
        "phase-rates": [phase.rate for phase in round_config.phases],
        "query": round_config.query,
        "seed": round_config.seed,
    }
    if round_config.update is not None:
        config |= {
            "shared-layers": round_config.update.shared,
            "density": round_config.update.density,
            "half": round_config.update.half,
        }
        config |= {"since": round_config.update.since} if round_config.update.since else {}
        config |= {"clipping_norm": round_config.update.clip} if round_config.update.clip else {}
    if round_config.phases and round_config.phases[0].proximal_mu:
        config["proximal-mu"] = round_config.phases[0].proximal_mu
    return config


def _sequence(config: Mapping[str, Any], key: str, default: list[Any]) -> Sequence[Any]:
    value = config.get(key, default)
    return value if isinstance(value, Sequence) else [value]


def _finite(value: Any, name: str) -> float:
    number = float(value)
    if not abs(number) <= _FLOAT32_MAX:
        raise ProtocolError(f"{name} must be a finite float32, not {value}")
    return number
