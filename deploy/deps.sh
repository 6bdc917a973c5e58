#!/usr/bin/env bash
# Installs what is missing: each argument is PROGRAM=PACKAGE. Says what it installs, and where it may not,
# which command to run.
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin

if ! command -v cargo >/dev/null; then
    echo "Rust is missing; install it from https://rustup.rs and run this again" >&2
    exit 1
fi

packages=()
for pair in "$@"; do
    command -v "${pair%%=*}" >/dev/null || packages+=("${pair#*=}")
done
if [ ${#packages[@]} -eq 0 ]; then
    exit 0
fi

mapfile -t packages < <(printf '%s\n' "${packages[@]}" | sort -u)
install=(apt-get install -y --no-install-recommends "${packages[@]}")
if ! command -v apt-get >/dev/null || [ "$(id -u)" -ne 0 ]; then
    echo "missing: ${packages[*]}; run: sudo apt-get update && sudo ${install[*]}" >&2
    exit 1
fi
echo "installing through apt: ${packages[*]}"
export DEBIAN_FRONTEND=noninteractive
# A service that a package starts by itself is not wanted here: the tests start their own.
if [[ " ${packages[*]} " == *" postgresql"* ]]; then
    mkdir -p /etc/postgresql-common/createcluster.d
    echo "create_main_cluster = false" >/etc/postgresql-common/createcluster.d/no-main-cluster.conf
fi
apt-get update -qq
if ! "${install[@]}" >/dev/null; then
    echo "cannot install ${packages[*]}; run: ${install[*]}" >&2
    exit 1
fi
