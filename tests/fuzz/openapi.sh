#!/usr/bin/env bash
# Asks the real aggregator for all that its OpenAPI document offers, with data that fits the document and data that does
# not: twice so many examples of each operation (20, or the first argument). The first time names are those of a rollout that
# runs, the second time they are made up. In between people open and close its gates. Then another aggregator is asked that
# wants a token: by whoever has one for everything, and by whoever has none. Whatever is answered must be in the document, in
# the form that it has there, and no fault of the server. Streams are left out, since they do not end.
set -euo pipefail
cd "$(dirname "$0")/../.."
examples=${1:-20}
version=4.32.5
target=${CARGO_TARGET_DIR:-$PWD/target}
case $target in
/*) ;;
*) target=$PWD/$target ;;
esac
tool=$target/schemathesis-$version

if [ ! -x "$tool/bin/schemathesis" ]; then
    if ! python3 -m venv "$tool"; then
        rm -rf "$tool"
        echo "Python cannot make an environment; run: sudo apt-get install -y python3-venv" >&2
        exit 1
    fi
    "$tool/bin/pip" install --quiet --disable-pip-version-check "schemathesis==$version"
fi

cargo build --quiet --locked -p coalmine-aggregator --bins
work=$(mktemp -d)
servers=()
# Ends what was started here, and nothing else.
clean() {
    for one in "${servers[@]}"; do
        kill "$one" 2>/dev/null || true
        wait "$one" 2>/dev/null || true
    done
    rm -rf "$work"
}
trap clean EXIT

cat >"$work/sla.yaml" <<'POLICY'
apiVersion: coalmine.dev/v1
kind: SlaBaseline
service: checkout
defaults: { errors: { max_rate: 1% }, judge_window: 1s, hold_deadline: 1h, required: [errors] }
POLICY

coalmine() {
    "$target/debug/coalmine" --server "$url" "$@"
}
# Waits for what is printed, and not for ever.
eventually() {
    local deadline=$((SECONDS + 60))
    until "$@" 2>/dev/null; do
        if [ "$SECONDS" -ge "$deadline" ] || ! kill -0 "$server" 2>/dev/null; then
            echo "not within a minute: $*" >&2
            tail -n 20 "$log" >&2
            exit 1
        fi
        sleep 0.2
    done
}
is_judged() {
    decision=$(coalmine --output json gate "$rollout" | sed -n 's/.*"decision_id":"\([^"]*\)".*/\1/p')
    [ -n "$decision" ]
}

# Starts an aggregator under a name, with more options, and has a rollout judged there.
begin() {
    local name=$1 ports
    shift
    mapfile -t ports < <(python3 - <<'PORTS'
import socket
sockets = [socket.socket() for _ in range(3)]
for one in sockets:
    one.bind(("127.0.0.1", 0))
    print(one.getsockname()[1])
PORTS
    )
    url=http://127.0.0.1:${ports[0]}
    log=$work/$name.log
    "$target/debug/coalmine-aggregator" serve --data "$work/$name" --policy "$work/sla.yaml" --rate-limit 1000000 \
        --listen-http "127.0.0.1:${ports[0]}" --listen-grpc "127.0.0.1:${ports[1]}" \
        --listen-admin "127.0.0.1:${ports[2]}" "$@" >"$log" 2>&1 &
    server=$!
    servers+=("$server")
    eventually coalmine rollout list >/dev/null
    if ! rollout=$(coalmine rollout start --service checkout --canary-version v2 --workload Canary/shop/checkout \
        2>"$work/started"); then
        cat "$work/started" >&2
        exit 1
    fi
    eventually is_judged
}
# Takes the names of the rollout that runs.
take_names() {
    cat - "$work/made-up.toml" >"$work/$1.toml" <<CONFIG
[parameters]
"path.rollout" = "$rollout"
"path.decision" = "$decision"
"path.service" = "checkout"
"path.act" = "check"
"path.hook" = "rollout"
"path.name" = "service"

[[operations]]
include-name = ["POST /kayenta/canary/{id}", "POST /kayenta/standalone_canary_analysis/{id}",
                "GET /kayenta/canaryConfig/{id}"]
parameters = { "path.id" = "checkout" }

[[operations]]
include-name = ["GET /kayenta/canary/{id}", "GET /kayenta/standalone_canary_analysis/{id}",
                "PUT /kayenta/pipelines/{id}/cancel"]
parameters = { "path.id" = "$rollout.95.75" }

CONFIG
}

# That nothing is known of a Canary is 503 for Flagger alone: to it anything else would be a verdict. What Kayenta has and
# Coalmine has not is 501.
cat >"$work/made-up.toml" <<'CONFIG'
[[operations]]
include-tag = "flagger"
checks = { not_a_server_error = { expected-statuses = ["2xx", "3xx", "4xx", 503] } }

[[operations]]
include-tag = "kayenta"
checks = { not_a_server_error = { expected-statuses = ["2xx", "3xx", "4xx", 501] } }
CONFIG

checks=not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance
# Asks everything but some paths, with the configuration of this name, and more options.
fuzz() {
    local names=$1 without=$2
    shift 2
    # What the tool keeps of a run goes to where it is started.
    if ! (cd "$work" && "$tool/bin/schemathesis" --config-file "$work/$names.toml" --no-color run "$url/openapi.json" \
        --checks "$checks" --max-examples "$examples" --phases examples,coverage,fuzzing \
        --exclude-path-regex "$without" --request-timeout 20 --generation-deterministic "$@") >"$work/$names" 2>&1; then
        cat "$work/$names" >&2
        echo "in the run $names, something is answered that the document does not say" >&2
        exit 1
    fi
    grep -E 'passed|Test cases' "$work/$names" || tail -n 3 "$work/$names"
}

# `gate` exits with 2 on HOLD, which is what it is asked for here.
set +o pipefail
begin open-to-all
take_names known
# The rollout goes on until everything was asked about it.
fuzz known '/(watch|end)$'
for act in open close; do
    cat - "$work/made-up.toml" >"$work/$act.toml" <<CONFIG
[parameters]
"path.act" = "$act"
"body.name" = { dictionary = "name" }
"body.namespace" = { dictionary = "namespace" }

[dictionaries]
name = { values = ["checkout"] }
namespace = { values = ["shop"] }

CONFIG
    fuzz "$act" '/watch$' --include-path-regex '^/(gate|rollback)/'
done
fuzz made-up '/watch$'

COALMINE_TOKEN=$("$target/debug/coalmine" token create --name fuzz --scope gate,rollout,override,audit \
    --service '*' --file "$work/tokens" 2>/dev/null)
export COALMINE_TOKEN
begin with-tokens --tokens "$work/tokens"
take_names token
fuzz token '/(watch|end)$' --header "Authorization: Bearer $COALMINE_TOKEN"
# Whoever has no token is answered nothing but that somebody is there.
take_names nobody
cat >>"$work/nobody.toml" <<'CONFIG'

[checks]
positive_data_acceptance = { expected-statuses = ["4xx"] }
CONFIG
checks=$checks,positive_data_acceptance
fuzz nobody '/(watch|end|health)$'

for name in open-to-all with-tokens; do
    if grep -q panicked "$work/$name.log"; then
        grep -A 5 panicked "$work/$name.log" >&2
        exit 1
    fi
done
coalmine rollout list >/dev/null
