"""What coordinates the fleet: Flower over MQTT, federated meta-learning, the server and its commands.

Importing this package keeps Flower and Ray from calling home, unless the user has set these variables. It has to happen
before Flower is imported, which reads them then.
"""

import os

for _name, _value in {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}.items():
    os.environ.setdefault(_name, _value)
