#!/usr/bin/env bash
# Finds or builds the programs of a cluster without nodes: kube-apiserver, kube-controller-manager, etcd, kubectl and helm,
# and the controllers that run there: Flagger, and that of Argo Rollouts. Prints their directory on standard output, and
# everything else on the other. Exit code 2: something is missing, and it says what.
#
# The programs are Go modules, built once and kept outside the repository: in $KUBEBUILDER_ASSETS if it is set, and
# otherwise in the user's cache. What is there already is taken as it is; `clean` as an argument builds all anew. A kubectl
# or helm that is installed is not taken: it is of some other version than the server.
# The build is niced and takes one core (GO_JOBS=2 for two).
#
# The directory's folder crds has the definitions of custom resources, which come with the same modules:
#   crds/argo-rollouts.yaml   all that the controller of Argo Rollouts wants to find, in one file
#   crds/flagger.yaml         those of Flagger
#   crds/gateway.yaml         the HTTPRoute of the Gateway API, by which Flagger moves traffic
set -euo pipefail

# MutatingAdmissionPolicy is admissionregistration.k8s.io/v1 from 1.36 on; the replacements follow from this version.
KUBERNETES=1.36.3
HELM=3.22.0
FLAGGER=1.44.0
ROLLOUTS=1.9.1
GATEWAY=1.3.0

assets=${KUBEBUILDER_ASSETS:-${XDG_CACHE_HOME:-$HOME/.cache}/coalmine/kubernetes}
mkdir -p "$assets"
assets=$(cd "$assets" && pwd)
# One build at a time: whoever comes second finds everything there.
exec 9>"$assets/.lock"
flock 9
programs=(kube-apiserver kube-controller-manager etcd kubectl helm flagger rollouts-controller)
definitions=(argo-rollouts flagger gateway)
if [ "${1:-}" = clean ]; then
    rm -f "${programs[@]/#/$assets/}"
    rm -rf "$assets/crds"
fi

say() { echo "$*" >&2; }
missing() {
    say "the tests against a real API server need $*"
    exit 2
}

version_of() {
    case $1 in
    argo-rollouts) echo "$ROLLOUTS" ;;
    flagger) echo "$FLAGGER" ;;
    gateway) echo "$GATEWAY" ;;
    esac
}

build=()
for program in "${programs[@]}"; do
    [ -x "$assets/$program" ] || build+=("$program")
done
copy=()
for definition in "${definitions[@]}"; do
    # The first line says of which version they are: another one's may lack some.
    grep -qs "^# $definition $(version_of "$definition")\$" "$assets/crds/$definition.yaml" || copy+=("$definition")
done
if [ ${#build[@]} -eq 0 ] && [ ${#copy[@]} -eq 0 ]; then
    echo "$assets"
    exit
fi

command -v go >/dev/null ||
    missing "${build[*]} ${copy[*]/#/crds/}, which come with Go modules; install Go 1.26 or later, or set KUBEBUILDER_ASSETS" \
        "to where they are"
work=$(mktemp -d "$assets/build.XXXXXX")
trap 'rm -rf "$work"' EXIT
# Those of a build that was killed.
find "$assets" -maxdepth 1 -name 'build.*' ! -path "$work" -exec rm -rf {} +
export GOFLAGS="-mod=mod -trimpath -buildvcs=false -p=${GO_JOBS:-1}" CGO_ENABLED=0 GOWORK=off
go=(nice -n 19 go)

# published MODULE VERSION FIELD: where a module is on this machine, downloaded if need be: its Dir, or its GoMod.
published() {
    "${go[@]}" mod download -json "$1@v$2" | sed -n "s/^[[:space:]]*\"$3\": \"\(.*\)\",*\$/\1/p" ||
        missing "the Go module $1 v$2"
}

# wrap NAME MODULE VERSION: begins a module of ours that needs this one, and goes there.
wrap() {
    mkdir -p "$work/$1"
    cd "$work/$1"
    printf 'module coalmine.dev/%s-for-tests\ngo %s\nrequire %s v%s\n' \
        "$1" "$(go env GOVERSION | sed 's/^go//; s/[^0-9.].*//')" "$2" "$3" >go.mod
}

for program in ${build[@]+"${build[@]}"}; do
    say "building $program; the first time this takes minutes"
    started=$SECONDS
    flags="-s -w"
    case $program in
    kube-apiserver | kube-controller-manager | kubectl | etcd)
        # The published go.mod of Kubernetes names its parts at v0.0.0, so that nobody can build it but by a module that
        # says which versions are meant: v0.X.Y for v1.X.Y.
        module=$(published k8s.io/kubernetes "$KUBERNETES" GoMod)
        wrap kubernetes k8s.io/kubernetes "$KUBERNETES"
        sed -n "s|^[[:space:]]*\(k8s.io/[a-z0-9-]*\) v0\.0\.0\([[:space:]].*\)*\$|replace \1 => \1 v0.${KUBERNETES#1.}|p" \
            "$module" | sort -u >>go.mod
        version=k8s.io/component-base/version
        flags+=" -X $version.gitVersion=v$KUBERNETES -X $version.gitMajor=1 -X $version.gitMinor=$(cut -d. -f2 <<<"$KUBERNETES")"
        package=k8s.io/kubernetes/cmd/$program
        # The version that this Kubernetes is tested with.
        [ "$program" != etcd ] || package=go.etcd.io/etcd/server/v3
        ;;
    helm)
        wrap helm helm.sh/helm/v3 "$HELM"
        package=helm.sh/helm/v3/cmd/helm
        # Without a cluster it renders for a server of the tests' version.
        flags+=" -X helm.sh/helm/v3/internal/version.version=v$HELM"
        for part in pkg/lint/rules pkg/chartutil; do
            flags+=" -X helm.sh/helm/v3/$part.k8sVersionMajor=1"
            flags+=" -X helm.sh/helm/v3/$part.k8sVersionMinor=$(cut -d. -f2 <<<"$KUBERNETES")"
        done
        ;;
    flagger)
        wrap flagger github.com/fluxcd/flagger "$FLAGGER"
        package=github.com/fluxcd/flagger/cmd/flagger
        ;;
    rollouts-controller)
        # A module's replacements hold for itself alone; ours needs the same ones.
        module=$(published github.com/argoproj/argo-rollouts "$ROLLOUTS" GoMod)
        wrap rollouts github.com/argoproj/argo-rollouts "$ROLLOUTS"
        sed -n 's|^\(replace\)\{0,1\}[[:space:]]*\([^ (]* => [^ ]* v.*\)$|replace \2|p' "$module" >>go.mod
        package=github.com/argoproj/argo-rollouts/cmd/rollouts-controller
        ;;
    esac
    "${go[@]}" build -ldflags "$flags" -o "$work/built" "$package" >&2 || missing "$program, which does not build"
    # Never half a program, whenever this is stopped.
    mv "$work/built" "$assets/$program"
    say "built $program in $((SECONDS - started)) s, $(($(stat -c %s "$assets/$program") >> 20)) MB"
done

mkdir -p "$assets/crds"
for definition in ${copy[@]+"${copy[@]}"}; do
    version=$(version_of "$definition")
    case $definition in
    argo-rollouts)
        module=$(published github.com/argoproj/argo-rollouts "$version" Dir)
        files=(manifests/crds/{rollout,analysis-run,analysis-template,cluster-analysis-template,experiment}-crd.yaml)
        ;;
    flagger)
        module=$(published github.com/fluxcd/flagger "$version" Dir)
        files=(artifacts/flagger/crd.yaml)
        ;;
    gateway)
        module=$(published sigs.k8s.io/gateway-api "$version" Dir)
        files=(config/crd/standard/gateway.networking.k8s.io_httproutes.yaml)
        ;;
    esac
    echo "# $definition $version" >"$work/definition"
    for file in "${files[@]}"; do
        { echo "---" && cat "$module/$file"; } >>"$work/definition" || missing "$file of the Go module in $module"
    done
    mv "$work/definition" "$assets/crds/$definition.yaml"
done
echo "$assets"
