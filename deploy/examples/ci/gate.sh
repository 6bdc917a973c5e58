#!/bin/sh
# Begins a rollout, waits for its verdict, and ends it. Needs the program `coalmine`, and these variables:
#
#   COALMINE_SERVER        where the aggregator is, as in http://coalmine.coalmine:8080
#   COALMINE_TOKEN         a token with the scopes gate and rollout
#   GATE_SERVICE           the service, as in the policy
#   GATE_VERSION           the version on trial, as its agents report it
#   GATE_KEY               names this run, as the number of a pipeline does: asking again is then no second rollout
#   GATE_BASELINE_VERSION  the version to compare with (all of the baseline)
#   GATE_WORKLOAD          KIND/NAMESPACE/NAME, so that it can be halted (none)
#   GATE_TIMEOUT           how long to wait for a verdict; longer than hold_deadline in the policy (40m)
#   GATE_PATIENCE          seconds to wait for an aggregator that is away when the rollout begins (60)
#
# The last line on standard output is the verdict and its reason; what changes meanwhile goes to the other.
#
#   0   APPROVE
#   1   ROLLBACK
#   2   still HOLD at the timeout
#   3   no answer: the aggregator is away, or answers with an error of its own
#   64  the question makes no sense: no such service or policy, another rollout of the service is open, no right to ask, a
#       wrong variable
#   143 the pipeline was cancelled (HUP, INT or TERM)
#
# Everything but 0 has to stop a deployment. An aggregator that is away, restarts or answers 5xx never counts as approved.

set -u

complain() { echo "gate: $*" >&2; }

wrong() {
    complain "$*"
    exit 64
}

[ -n "${GATE_SERVICE:-}" ] || wrong "set GATE_SERVICE to the service, as the policy names it"
[ -n "${GATE_VERSION:-}" ] || wrong "set GATE_VERSION to the version on trial, as its agents report it"
[ -n "${GATE_KEY:-}" ] || wrong "set GATE_KEY to what names this run, such as the number of the pipeline"
patience=${GATE_PATIENCE:-60}
case $patience in
*[!0-9]* | 0?* | ???????*) wrong "GATE_PATIENCE is $patience, and has to be a number of seconds, as in 60" ;;
esac
command -v coalmine >/dev/null || wrong "the program coalmine is not there; README.md says where it comes from"

set -- --service "$GATE_SERVICE" --canary-version "$GATE_VERSION" --key "$GATE_KEY"
[ -z "${GATE_BASELINE_VERSION:-}" ] || set -- "$@" --baseline-version "$GATE_BASELINE_VERSION"
[ -z "${GATE_WORKLOAD:-}" ] || set -- "$@" --workload "$GATE_WORKLOAD"

finish() {
    coalmine rollout end "$rollout" --reason "$1" >/dev/null ||
        complain "rollout $rollout is still open; end it before the next one: coalmine rollout end $rollout"
}

# Nobody waits for the verdict of a pipeline that was cancelled, and the next version needs the place.
rollout=
waiting=
answer=
trap '
    trap "" HUP INT TERM
    complain "cancelled"
    [ -z "$waiting" ] || kill "$waiting" 2>/dev/null
    [ -z "$rollout" ] || finish "the pipeline was cancelled"
    exit 143
' HUP INT TERM
trap '[ -z "$answer" ] || rm -f "$answer"' EXIT

# A restart of the aggregator takes less than 30 s.
until=$(($(date +%s) + patience))
while :; do
    code=0
    rollout=$(coalmine rollout start "$@") || code=$?
    [ "$code" -ne 0 ] || break
    [ "$code" -eq 3 ] || exit "$code"
    [ "$(date +%s)" -lt "$until" ] || exit 3
    sleep 2
done
complain "asking about rollout $rollout"

# Waits through an aggregator that is away, too. In the background, since a shell hears of a signal only once what runs in
# front has ended.
answer=$(mktemp) || exit 3
coalmine gate "$rollout" --wait --timeout "${GATE_TIMEOUT:-40m}" >"$answer" &
waiting=$!
code=0
wait "$waiting" || code=$?
# What is left is quick, and has to be done.
trap '' HUP INT TERM
said=$(cat "$answer")
case $code:$said in
0:APPROVE*) ;;
# Whatever this is, it is no approval.
0:*) code=3 ;;
1:* | 2:* | 64:*) ;;
*) code=3 ;;
esac

# Nobody asks any more: what was approved must not be held or halted later, and the next version needs the place. A halt is
# given up when its rollout ends, so that one is left to whoever looks into it.
if [ "$code" -eq 1 ] && [ -n "${GATE_WORKLOAD:-}" ]; then
    complain "rollout $rollout stays open until $GATE_WORKLOAD is rolled back; then: coalmine rollout end $rollout"
else
    finish "the pipeline is through"
fi

[ -z "$said" ] || printf '%s\n' "$said"
exit "$code"
