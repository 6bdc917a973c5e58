#!/usr/bin/env bash
#
# Writes again what is made from other files of this directory: install.yaml, the PrometheusRule, and the files of the
# Helm chart. The tests compare, so a change that was not rendered is found.

set -euo pipefail
export LC_ALL=C
cd "$(dirname "${BASH_SOURCE[0]}")"

# The rules as an object of the Prometheus operator.
{
    cat <<'RULE'
# Made by deploy/render.sh from deploy/prometheus/rules.yaml; change that file.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: coalmine
  namespace: coalmine
  labels:
    app.kubernetes.io/name: coalmine
    app.kubernetes.io/part-of: coalmine
spec:
RULE
    sed 's/^\(.\)/  \1/' prometheus/rules.yaml
} >components/prometheus/rules.yaml

cp prometheus/rules.yaml base/sla.yaml helm/coalmine/files/

if ! command -v kubectl >/dev/null; then
    echo "kubectl is missing: install.yaml stays as it was" >&2
    exit 1
fi
rendered=$(kubectl kustomize overlays/install)
{
    echo "# Made by deploy/render.sh (kubectl kustomize deploy/overlays/install); change deploy/overlays/install."
    printf '%s\n' "$rendered"
} >install.yaml
