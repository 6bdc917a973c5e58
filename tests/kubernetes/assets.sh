#!/usr/bin/env bash
# Finds or builds the programs of a cluster without nodes: kube-apiserver, etcd, kubectl and helm. Prints their directory
# on standard output, and everything else on the other. Exit code 2: something is missing, and it says what.
#
# The programs are Go modules, built once and kept outside the repository: in $KUBEBUILDER_ASSETS if it is set, and
# otherwise in the user's cache. What is there already is taken as it is; `clean` as an argument builds all anew. A kubectl
# or helm that is installed is not taken: it is of some other version than the server.
# The build is niced and takes one core (GO_JOBS=2 for two).
#
# The directory's folder crds is not made here. What Argo Rollouts and Flagger call their custom resources is no Go module:
#   crds/argo-rollouts.yaml   manifests/crds/rollout-crd.yaml of the repository argoproj/argo-rollouts (v1.9 or later)
#   crds/flagger.yaml         artifacts/flagger/crd.yaml of the repository fluxcd/flagger (v1.44 or later)
set -euo pipefail

# MutatingAdmissionPolicy is admissionregistration.k8s.io/v1 from 1.36 on; the replacements follow from this version.
KUBERNETES=1.36.3
HELM=3.22.0

assets=${KUBEBUILDER_ASSETS:-${XDG_CACHE_HOME:-$HOME/.cache}/coalmine/kubernetes}
mkdir -p "$assets"
assets=$(cd "$assets" && pwd)
# One build at a time: whoever comes second finds everything there.
exec 9>"$assets/.lock"
flock 9
programs=(kube-apiserver etcd kubectl helm)
if [ "${1:-}" = clean ]; then
    rm -f "${programs[@]/#/$assets/}"
fi

say() { echo "$*" >&2; }
missing() {
    say "the tests against a real API server need $1"
    exit 2
}

build=()
for program in "${programs[@]}"; do
    [ -x "$assets/$program" ] || build+=("$program")
done

if [ ${#build[@]} -gt 0 ]; then
    command -v go >/dev/null ||
        missing "${build[*]}, which are built with Go; install Go 1.26 or later, or set KUBEBUILDER_ASSETS to where they are"
    work=$(mktemp -d "$assets/build.XXXXXX")
    trap 'rm -rf "$work"' EXIT
    # Those of a build that was killed.
    find "$assets" -maxdepth 1 -name 'build.*' ! -path "$work" -exec rm -rf {} +
    export GOFLAGS="-mod=mod -trimpath -buildvcs=false -p=${GO_JOBS:-1}" CGO_ENABLED=0 GOWORK=off
    go=(nice -n 19 go)
    cd "$work"

    # The published go.mod of Kubernetes names its parts at v0.0.0, so that nobody can build it but by a module that says
    # which versions are meant: v0.X.Y for v1.X.Y.
    {
        echo "module coalmine.dev/kubernetes-for-tests"
        echo "go $(go env GOVERSION | sed 's/^go//; s/[^0-9.].*//')"
        echo "require k8s.io/kubernetes v$KUBERNETES"
    } >go.mod
    published=$("${go[@]}" mod download -json "k8s.io/kubernetes@v$KUBERNETES" |
        sed -n 's/^[[:space:]]*"GoMod": "\(.*\)",*$/\1/p') || missing "the Go module k8s.io/kubernetes v$KUBERNETES"
    sed -n "s|^[[:space:]]*\(k8s.io/[a-z0-9-]*\) v0\.0\.0\([[:space:]].*\)*\$|replace \1 => \1 v0.${KUBERNETES#1.}|p" \
        "$published" | sort -u >>go.mod

    version=k8s.io/component-base/version
    flags="-s -w -X $version.gitVersion=v$KUBERNETES -X $version.gitMajor=1 -X $version.gitMinor=$(cut -d. -f2 <<<"$KUBERNETES")"
    for program in "${build[@]}"; do
        say "building $program; the first time this takes minutes"
        started=$SECONDS
        case $program in
        kube-apiserver | kubectl) package=k8s.io/kubernetes/cmd/$program ;;
        # The version that this Kubernetes is tested with.
        etcd) package=go.etcd.io/etcd/server/v3 ;;
        helm)
            mkdir -p helm
            cd helm
            printf 'module coalmine.dev/helm-for-tests\ngo %s\nrequire helm.sh/helm/v3 v%s\n' \
                "$(go env GOVERSION | sed 's/^go//; s/[^0-9.].*//')" "$HELM" >go.mod
            package=helm.sh/helm/v3/cmd/helm
            # Without a cluster it renders for a server of the tests' version.
            flags="-s -w -X helm.sh/helm/v3/internal/version.version=v$HELM"
            for part in pkg/lint/rules pkg/chartutil; do
                flags+=" -X helm.sh/helm/v3/$part.k8sVersionMajor=1"
                flags+=" -X helm.sh/helm/v3/$part.k8sVersionMinor=$(cut -d. -f2 <<<"$KUBERNETES")"
            done
            ;;
        esac
        "${go[@]}" build -ldflags "$flags" -o "$work/built" "$package" >&2 || missing "$program, which does not build"
        # Never half a program, whenever this is stopped.
        mv "$work/built" "$assets/$program"
        cd "$work"
        say "built $program in $((SECONDS - started)) s, $(($(stat -c %s "$assets/$program") >> 20)) MB"
    done
fi

for file in argo-rollouts flagger; do
    [ -f "$assets/crds/$file.yaml" ] || say "$assets/crds/$file.yaml is missing: the halts of its tool cannot be tested"
done
echo "$assets"
