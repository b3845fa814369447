"""What the node relies on in Flower's private modules. When Flower is upgraded, read what fails here first."""

from __future__ import annotations

import inspect
from pathlib import Path

import httpx
import pytest
from certified import create_consortium
from flwr.app import ArrayRecord, ConfigRecord, Context, RecordDict
from flwr.common.constant import HEARTBEAT_MIN_INTERVAL, HEARTBEAT_PATIENCE, ErrorCode
from flwr.supercore.protobuf.client import ProtobufClient
from flwr.supernode.fleet_http_client import FleetHttpClient

from medfl.client.fleet import HEARTBEAT_S, Fleet, FleetSettings, read_state, state_bytes
from medfl.client.states import SeriesStates
from medfl.client.transport import TransportSettings
from medfl.shared.errors import DataError


def test_flowers_client_takes_what_we_give_and_holds_an_httpx_client() -> None:
    parameters = inspect.signature(ProtobufClient.__init__).parameters
    assert {"interceptors", "verify", "timeout"} <= set(parameters)
    assert isinstance(FleetHttpClient("https://c")._client, httpx.Client)


def test_the_heartbeat_is_the_least_that_flower_accepts() -> None:
    assert HEARTBEAT_S == HEARTBEAT_MIN_INTERVAL
    assert HEARTBEAT_PATIENCE == 2
    assert (ErrorCode.CLIENT_APP_RAISED_EXCEPTION, ErrorCode.MOD_FAILED_PRECONDITION) == (2, 6)


def test_our_client_is_confined_to_the_coordinator(tmp_path: Path) -> None:
    files = create_consortium(tmp_path, sites=["north"], hosts=["localhost"]).sites["north"]
    transport = TransportSettings("localhost:1", files.authority, files.certificate, files.key)
    fleet = Fleet(FleetSettings(transport, files.node_key))
    client = fleet._connection.client._client
    assert not client.follow_redirects
    assert client.event_hooks["response"]
    assert client.headers["prefer"] == "wait=2"
    fleet.close()


def context(series_id: int, text: str) -> Context:
    state = RecordDict({"config": ConfigRecord({"text": text}), "empty": ArrayRecord()})
    return Context(1, 2, {}, state, {}, series_id=series_id)


def test_a_state_is_the_same_after_the_disk(tmp_path: Path) -> None:
    assert read_state(state_bytes(context(3, "kept")))["config"] == ConfigRecord({"text": "kept"})
    states = SeriesStates(tmp_path / "state")
    assert len(states.load(3)) == 0
    states.save(context(3, "kept"))
    states.save(context(4, "other"))
    assert states.load(3)["config"] == ConfigRecord({"text": "kept"})
    assert SeriesStates(tmp_path / "state").load(4)["config"] == ConfigRecord({"text": "other"})
    assert {p.stat().st_mode & 0o777 for p in (tmp_path / "state").iterdir()} == {0o600}


def test_an_unchanged_state_is_not_written_again(tmp_path: Path) -> None:
    states = SeriesStates(tmp_path)
    states.save(context(3, "kept"))
    (tmp_path / "series-3.state").unlink()
    states.save(context(3, "kept"))
    assert not (tmp_path / "series-3.state").exists()
    states.save(context(3, "new"))
    assert (tmp_path / "series-3.state").exists()


def test_a_damaged_state_is_an_error_and_not_a_fresh_start(tmp_path: Path) -> None:
    (tmp_path / "series-3.state").write_bytes(b"\xff\xff\xff")
    with pytest.raises(DataError, match="damaged"):
        SeriesStates(tmp_path).load(3)
