"""Writes what a binary is made of, as CycloneDX JSON: cargo tree … | python3 sbom.py Cargo.lock > NAME.cdx.json

Reads the lines of `cargo tree --prefix depth --format '{p}|{l}'`, of which the first is the package itself, and the
checksums of Cargo.lock. Nothing in it depends on the time or the machine, so the same source gives the same bytes.
"""
import json, re, sys, tomllib

LINE = re.compile(r"(\d+)(\S+) v(\S+?)(?: \([^|]*\))?\|(.*?)( \(\*\))?")


def component(name, version, license, checksum):
    purl = f"pkg:cargo/{name}@{version}"
    found = {"type": "library", "bom-ref": purl, "name": name, "version": version, "purl": purl}
    if license:
        # Older packages write MIT/Apache-2.0, which is no expression.
        found["licenses"] = [{"expression": license.replace("/", " OR ")}]
    if checksum:
        found["hashes"] = [{"alg": "SHA-256", "content": checksum}]
    return found


with open(sys.argv[1], "rb") as lock:
    packages = tomllib.load(lock)["package"]
known = {(package["name"], package["version"]): package.get("checksum") for package in packages}

components, edges, path = {}, {}, []
for line in sys.stdin:
    match = LINE.fullmatch(line.rstrip("\n"))
    if not match:
        sys.exit(f"sbom: not a line of cargo tree: {line!r}")
    depth, name, version, license, _ = match.groups()
    if (name, version) not in known:
        sys.exit(f"sbom: {name} {version} is not in {sys.argv[1]}")
    found = component(name, version, license, known[name, version])
    reference = found["bom-ref"]
    components.setdefault(reference, found)
    edges.setdefault(reference, set())
    del path[int(depth):]
    if path:
        edges[path[-1]].add(reference)
    path.append(reference)
if not components:
    sys.exit("sbom: cargo tree says nothing")

root, *libraries = components.values()
root["type"] = "application"
json.dump(
    {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "version": 1,
        "metadata": {"component": root},
        "components": sorted(libraries, key=lambda library: library["bom-ref"]),
        "dependencies": [{"ref": ref, "dependsOn": sorted(on)} for ref, on in sorted(edges.items())],
    },
    sys.stdout,
    indent=1,
)
print()
