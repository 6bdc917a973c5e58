#!/usr/bin/env bash
#
# Builds the images localhost/coalmine-agent:dev and localhost/coalmine-aggregator:dev, runs each
# once, fails if one has grown over its limit, and writes what each binary is made of to
# target/sbom (CycloneDX). Needs no container daemon.
#
# With --twice it builds both from nothing, two times, in two places and in another order, says whether the digests are the
# same, and leaves nothing behind. Takes as long as four builds without a cache, and some GB in /var/tmp.
#
# Where the base image of the Dockerfiles can be neither found nor pulled, an equal one is made
# from Debian packages and the Rust toolchain of this machine, and tagged with the same name.

set -euo pipefail
export LC_ALL=C
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly AGENT_LIMIT_MB=8
readonly AGGREGATOR_LIMIT_MB=30
readonly TARGET=x86_64-unknown-linux-musl
readonly USER_IDS=65532:65532

# The Dockerfiles name the base, for example docker.io/library/rust:1.95-bookworm.
base=$(sed -n 's/^FROM \(.*\) AS build$/\1/p' Dockerfile.agent)
tag=${base##*:}
readonly base rust_version=${tag%%-*} suite=${tag#*-}

work=$(mktemp -d)
rounds=
containers=()

clean_up() {
    if ((${#containers[@]})); then
        buildah rm "${containers[@]}" >/dev/null || true
    fi
    rm -rf "$work" ${rounds:+"$rounds"}
}
trap clean_up EXIT

say() { printf '==> %s\n' "$*"; }
die() { printf 'image: %s\n' "$*" >&2; exit 1; }

# Installs the packages of the commands that are missing, or says how to.
need() {
    local package missing=()
    for package in "$@"; do
        command -v "$package" >/dev/null || missing+=("$package")
    done
    ((${#missing[@]})) || return 0

    local install=(apt-get install -y --no-install-recommends "${missing[@]}")
    command -v apt-get >/dev/null || die "install these first: ${missing[*]}"
    if ((EUID != 0)); then
        sudo -n true 2>/dev/null || die "missing ${missing[*]}; run: sudo ${install[*]}"
        install=(sudo -n "${install[@]}")
    fi
    say "installing ${missing[*]}"
    "${install[@]}" >"$work/apt.log" 2>&1 || {
        tail -n 5 "$work/apt.log" >&2
        die "could not install ${missing[*]}; run: apt-get update, then: ${install[*]}"
    }
}

# Starts a working container of an image; its name is left in $container.
start() {
    container=$(buildah from --pull-never "$1")
    containers+=("$container")
}

have_base() {
    buildah images --quiet "$base" >/dev/null 2>&1
}

pull_base() {
    say "pulling $base"
    buildah pull --quiet "$base" >"$work/pull.log" 2>&1
}

# Prints this machine's own apt sources if they are of the wanted suite: a mirror that works here
# will work in the image. Without any, mmdebstrap takes Debian's own.
apt_sources() {
    local file
    for file in /etc/apt/sources.list /etc/apt/sources.list.d/*.list /etc/apt/sources.list.d/*.sources; do
        if [[ -s $file ]] && grep -qE '^(deb |URIs:).*/debian' "$file" && grep -qw "$suite" "$file"; then
            printf '%s\n' "$file"
        fi
    done
}

build_base() {
    need mmdebstrap
    command -v rustup >/dev/null || die "$base cannot be pulled, and without rustup it cannot be made"

    local release host sysroot
    release=$(rustc --version --verbose | sed -n 's/^release: //p')
    host=$(rustc --version --verbose | sed -n 's/^host: //p')
    [[ $release == "$rust_version".* ]] ||
        die "$base cannot be pulled; to make it, rustc must be $rust_version, and is $release"
    rustup target add "$TARGET"
    sysroot=$(rustc --print sysroot)

    say "making $base from Debian packages and rustc $release (some minutes, once)"
    local sources=()
    mapfile -t sources < <(apt_sources)
    mmdebstrap --quiet --variant=minbase --include=gcc,libc6-dev,ca-certificates \
        "$suite" "$work/debian.tar" "${sources[@]}"

    local root=$work/root toolchain=$release-$host command part
    mkdir -p "$root"/usr/local/{cargo/bin,rustup}
    cp -L "$(command -v rustup)" "$root/usr/local/cargo/bin/rustup"
    for command in cargo rustc rustdoc; do
        ln -s rustup "$root/usr/local/cargo/bin/$command"
    done
    printf 'version = "12"\nprofile = "minimal"\ndefault_toolchain = "%s"\n' "$toolchain" \
        >"$root/usr/local/rustup/settings.toml"

    local settings=(
        --env RUSTUP_HOME=/usr/local/rustup
        --env CARGO_HOME=/usr/local/cargo
        --env PATH=/usr/local/cargo/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
    )
    # Builds trust what this machine trusts. The bundle stays beside Debian's own, so that none of
    # it reaches the aggregator's image.
    local bundle=${SSL_CERT_FILE:-/etc/ssl/certs/ca-certificates.crt} inside=/usr/local/share/build-ca.crt
    if [[ -f $bundle ]]; then
        mkdir -p "$root/usr/local/share" "$root/etc/apt/apt.conf.d"
        cp -L "$bundle" "$root$inside"
        printf 'Acquire::https::CAInfo "%s";\n' "$inside" >"$root/etc/apt/apt.conf.d/90build-ca"
        settings+=(--env "SSL_CERT_FILE=$inside" --env "CARGO_HTTP_CAINFO=$inside")
    fi

    start scratch
    buildah add --quiet "$container" "$work/debian.tar" / >/dev/null
    buildah copy --quiet "$container" "$root" / >/dev/null
    for part in bin lib; do
        buildah copy --quiet "$container" "$sysroot/$part" \
            "/usr/local/rustup/toolchains/$toolchain/$part" >/dev/null
    done
    buildah config "${settings[@]}" "$container"
    buildah commit --quiet "$container" "$base" >/dev/null
}

# build NAME TAG CONTEXT [OPTION...]: builds Dockerfile.NAME of a context. What is in the image depends on the source and
# on the base image: no time is in it, and no version of buildah.
build() {
    local name=$1 tag=$2 context=$3
    shift 3
    say "building $tag"
    buildah build --isolation chroot --layers --pull-never --format oci --timestamp 0 --identity-label=false \
        --file "$context/Dockerfile.$name" --tag "$tag" "$@" "$context"
}

# smoke IMAGE BINARY...: each binary starts on the image's empty root, as the image's user.
smoke() {
    local image=$1 binary version
    shift
    start "$image"
    for binary in "$@"; do
        version=$(buildah run --isolation chroot --user "$USER_IDS" "$container" -- "/$binary" --version) ||
            die "/$binary does not run in $image"
        say "$image: $version"
    done
}

# check_size IMAGE LIMIT_MB
check_size() {
    local size
    size=$(buildah images --format '{{.Size}}' "$1")
    say "$1: $size, limit $2 MB"
    awk -v limit="$2" '
        { unit["B"] = 1e-6; unit["KB"] = 1e-3; unit["MB"] = 1; unit["GB"] = 1e3
          exit !(toupper($2) in unit && $1 * unit[toupper($2)] <= limit) }' <<<"$size" ||
        die "$1 is over its limit: $size, and at most $2 MB are allowed"
}

# sbom NAME: writes what the package coalmine-NAME has in its binaries, by cargo's own resolution for the
# images' target. Build scripts and macros are not in the binaries.
sbom() {
    local file=target/sbom/coalmine-$1.cdx.json
    mkdir -p target/sbom
    cargo tree --locked --package "coalmine-$1" --target "$TARGET" --edges normal,no-proc-macro \
        --prefix depth --format '{p}|{l}' | python3 deploy/sbom.py Cargo.lock >"$work/sbom" ||
        die "cannot say what coalmine-$1 is made of"
    mv "$work/sbom" "$file"
    say "$file: $(grep -c '"bom-ref"' "$file") packages"
}

# digest IMAGE: prints it. The same source on the same base image gives the same one.
digest() {
    buildah images --no-trunc --format '{{.Digest}}' "$1"
}

# Prints the images that there are, each once.
all_images() {
    buildah images --all --quiet | sort -u
}

# Removes all images that are not in a file. One goes only after those that were made of it.
remove_others() {
    local left count=0
    while left=$(comm -13 "$1" <(all_images)) && [[ -n $left ]] && (($(wc -l <<<"$left") != count)); do
        count=$(wc -l <<<"$left")
        xargs buildah rmi --force <<<"$left" >/dev/null 2>&1 || true
    done
}

# round NUMBER CONTEXT SOURCE_DIR TARGET_DIR NAME...: builds from the copy of the source, without anything of an earlier build.
# Below TMPDIR buildah keeps what the build mounts as a cache.
round() {
    local number=$1 context=$2 source=$3 target=$4 cache=$rounds/cache-$1 name
    shift 4
    mkdir -p "$context" "$cache"
    (umask 027 && tar --no-same-permissions -xf "$rounds/source.tar" -C "$context")
    for name in "$@"; do
        TMPDIR=$cache build "$name" "localhost/coalmine-$name:twice-$number" "$context" --no-cache \
            --build-arg "SOURCE_DIR=$source" --build-arg "TARGET_DIR=$target"
    done
    compgen -G "$cache/buildah-cache*" >/dev/null ||
        die "buildah keeps its cache elsewhere than in $cache, so the builds may have shared it and prove nothing"
    rm -rf "$context" "$cache"
}

# Builds twice and compares.
twice() {
    rounds=$(mktemp -d -p /var/tmp coalmine-twice.XXXXXX)
    all_images >"$rounds/before"
    tar --exclude=./target --exclude=./.git -cf "$rounds/source.tar" .
    round 1 "$rounds/one" /src /target agent aggregator
    round 2 "$rounds/some/other/place" /home/builder/coalmine /target/elsewhere aggregator agent

    local name first second other=()
    for name in agent aggregator; do
        first=$(digest "localhost/coalmine-$name:twice-1")
        second=$(digest "localhost/coalmine-$name:twice-2")
        say "coalmine-$name: $first"
        [[ -n $first && $first == "$second" ]] || {
            say "coalmine-$name: $second, the second time"
            other+=("localhost/coalmine-$name:twice-1" "localhost/coalmine-$name:twice-2")
        }
    done
    ((${#other[@]} == 0)) || die "two builds of one source differ; they are left to be looked at: ${other[*]}"
    remove_others "$rounds/before"
    say "two builds of one source are the same"
}

# The images that are used.
images() {
    command -v cargo >/dev/null || die "cargo is missing, which says what the binaries are made of"
    build agent localhost/coalmine-agent:dev .
    build aggregator localhost/coalmine-aggregator:dev .
    smoke localhost/coalmine-agent:dev coalmine-agent
    smoke localhost/coalmine-aggregator:dev coalmine-aggregator coalmine
    check_size localhost/coalmine-agent:dev "$AGENT_LIMIT_MB"
    check_size localhost/coalmine-aggregator:dev "$AGGREGATOR_LIMIT_MB"
    say "localhost/coalmine-agent:dev: $(digest localhost/coalmine-agent:dev)"
    say "localhost/coalmine-aggregator:dev: $(digest localhost/coalmine-aggregator:dev)"
    sbom agent
    sbom aggregator
}

main() {
    local what=images
    case ${1:-} in
    '') ;;
    --twice) what=twice ;;
    *) die "$1 is no option; there is --twice" ;;
    esac
    [[ $(uname -m) == x86_64 ]] || die "the images are built on x86_64 only, and this is $(uname -m)"
    need buildah python3
    have_base || pull_base || build_base
    "$what"
}

main "$@"
