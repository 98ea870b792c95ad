"""A device that is not ours: registers its W3C Thing Description with a server, and finds it by what it can do.

    python examples/describe_a_third_party_device.py

starts a server, puts a lamp's description into its directory over HTTP, searches it with SPARQL, and prints

    201 Created
    Desk lamp (urn:example:desk-lamp) has the property brightness
"""

import json
import tempfile
import urllib.parse
import urllib.request
from pathlib import Path

from tinyfleet.server.fleet_server import FleetServer

LAMP = {
    "@context": "https://www.w3.org/2022/wot/td/v1.1",
    "id": "urn:example:desk-lamp",
    "title": "Desk lamp",
    "securityDefinitions": {"none": {"scheme": "nosec"}},
    "security": "none",
    "properties": {"brightness": {"type": "integer", "forms": [{"href": "http://lamp.example/brightness"}]}},
}
QUESTION = "SELECT ?thing ?title WHERE { ?thing a td:Thing ; td:title ?title }"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, FleetServer(Path(folder), "home", port=0, operator_port=0) as server:
        token = json.loads(Path(folder, "server.json").read_text())["token"]
        put = urllib.request.Request(
            f"{server.address}/things/{LAMP['id']}",
            data=json.dumps(LAMP).encode(),
            headers={"Content-Type": "application/td+json", "Authorization": f"Bearer {token}"},
            method="PUT",
        )
        with urllib.request.urlopen(put) as answer:
            print(answer.status, answer.reason)
        for row in server.store.query(f"PREFIX td: <https://www.w3.org/2019/wot/td#> {QUESTION}"):
            address = f"{server.address}/things/{urllib.parse.quote(row['thing'], '')}"
            get = urllib.request.Request(address, headers={"Authorization": f"Bearer {token}"})
            with urllib.request.urlopen(get) as answer:
                names = ", ".join(json.load(answer)["properties"])
            print(f"{row['title']} ({row['thing']}) has the property {names}")


if __name__ == "__main__":
    main()
