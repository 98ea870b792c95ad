"""Writes THIRD_PARTY_NOTICES: the licences of others' work that the wheel carries.

Run it after `make page`, whenever the page's or zcbor's version changes:

    python tools/third_party_notices.py
"""

from __future__ import annotations

import json
from collections import defaultdict
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MODULES = ROOT / "ontology" / "http" / "page" / "node_modules"
HEAD = """\
Third-party notices

The wheel of TinyFleet carries work of others under their own licences:

- The query page (tinyfleet/ontology/http/page/dist) has YASGUI and the packages that are bundled with it.
- The C extension (tinyfleet/edge/_mote) has zcbor's run-time library and the code that zcbor generates.

"""


def npm_packages() -> list[tuple[str, str]]:
    """(Name, version and licence; licence text) of all packages that YASGUI needs."""
    found = []
    for file in sorted([*MODULES.glob("*/package.json"), *MODULES.glob("@*/*/package.json")]):
        about = json.loads(file.read_text(encoding="utf-8"))
        texts = [path for path in sorted(file.parent.iterdir()) if path.stem.lower().startswith("licen")]
        text = "\n\n".join(path.read_text(encoding="utf-8").strip() for path in texts)
        found.append((f"{about['name']} {about['version']} ({about.get('license', 'see below')})", text))
    return found


def zcbor() -> tuple[str, str]:
    """The same of zcbor."""
    package = metadata.distribution("zcbor")
    text = package.read_text("LICENSE")
    assert text is not None, "zcbor comes with its licence"
    return f"zcbor {package.version} (Apache-2.0), Copyright (c) 2020 Nordic Semiconductor ASA", text.strip()


def notices(packages: list[tuple[str, str]]) -> str:
    """The file's text: packages with the same licence text together."""
    by_text: dict[str, list[str]] = defaultdict(list)
    for name, text in packages:
        by_text[text].append(name)
    without = by_text.pop("", [])
    parts = ["\n".join([*names, "", text]) for text, names in by_text.items()]
    if without:
        parts.append("\n".join(["These packages name their licence and come without a copy of it:", "", *without]))
    rule = "\n\n" + "-" * 80 + "\n\n"
    lines = (HEAD + rule.join(["", *parts])).splitlines()
    return "\n".join(line.rstrip() for line in lines).strip() + "\n"


def main() -> None:
    if not MODULES.is_dir():
        raise SystemExit(f"{MODULES} is missing; run `make page` first")
    out = ROOT / "THIRD_PARTY_NOTICES"
    out.write_text(notices([zcbor(), *npm_packages()]), encoding="utf-8")
    print(f"{out}: {len(npm_packages()) + 1} packages")


if __name__ == "__main__":
    main()
