"""Checks a Coalmine decision log with nothing but hashes: python3 verify.py DATA

Recomputes the chain and the Merkle root (RFC 6962) of the segments in DATA, holds them against DATA/checkpoint, and looks
for the evidence that each record names. It does not check the checkpoint's signature: `coalmine audit verify --key KEY`
does, and so does any program that reads C2SP signed notes.
"""
import base64, glob, hashlib, os, re, sys


def sha256(data):
    return hashlib.sha256(data).digest()


data = sys.argv[1]
origin, size, root = open(os.path.join(data, "checkpoint"), encoding="utf-8").read().split("\n")[:3]
segments = sorted(glob.glob(os.path.join(data, "decisions-*.jsonl"))) + [os.path.join(data, "decisions.jsonl")]
lines = (line for segment in segments for line in open(segment, "rb"))
peaks, previous, count = [], bytes(32), 0  # peaks: (leaves, hash) of the full subtrees so far
for count, line in enumerate(lines, 1):
    if not line.endswith(b"\n"):
        sys.exit(f"record {count - 1}: is cut")
    # The last match of a line is the record's own.
    links = re.findall(rb'"prev":"([0-9a-f]{64})","seq":([0-9]+),', line)
    if not links or links[-1] != (previous.hex().encode(), str(count - 1).encode()):
        sys.exit(f"record {count - 1}: does not follow the one before it")
    for digest in re.findall(rb'"(?:evidence|manifest|snapshot|policy|history)":"([0-9a-f]{64})"', line):
        name = digest.decode()
        if hashlib.sha256(open(os.path.join(data, "evidence", name[:2], name), "rb").read()).hexdigest() != name:
            sys.exit(f"record {count - 1}: its blob {name} was changed")
    previous = sha256(b"\0" + line[:-1])
    peaks.append((1, previous))
    while len(peaks) > 1 and peaks[-2][0] == peaks[-1][0]:
        (leaves, left), (_, right) = peaks[-2:]
        peaks[-2:] = [(2 * leaves, sha256(b"\1" + left + right))]
    if count == int(size):
        head = peaks[-1][1]
        for _, left in reversed(peaks[:-1]):
            head = sha256(b"\1" + left + head)
        if base64.b64encode(head).decode() != root:
            sys.exit(f"the first {size} records have another root than the checkpoint says")
if count < int(size):
    sys.exit(f"{count} records, but the checkpoint covers {size}: the log was cut")
print(f"{origin}: {count} records, {size} of them under the root {root}")
