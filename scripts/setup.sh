#!/usr/bin/env bash
# Installs from Debian what is missing on this machine, and runs apt-get only when something is.
#   scripts/setup.sh demo      what building evrepl and running the demo need
#   scripts/setup.sh browser   that, and Chromium, to look at the demo's Jaeger page
#   scripts/setup.sh profile   that of the demo, and valgrind, to count instructions; with --flame: perf, to take samples
#   scripts/setup.sh           what the demo and the tests need: Java and Maven for a real Apache Kafka, Python for other clients
# Written for Debian 12; on other systems install what it names by hand, and it has nothing left to do.
set -euo pipefail

what=${1:-all}
missing=()

need() { # need PACKAGE TEST...: the package is missing when the test fails
    local package=$1
    shift
    "$@" >/dev/null 2>&1 || missing+=("$package")
}

# rustup's cargo is often not on the PATH of a non-login shell.
[ -f "$HOME/.cargo/env" ] && . "$HOME/.cargo/env"
if ! command -v cargo >/dev/null; then
    cat >&2 <<'TEXT'
setup: cargo is missing, and Debian's own is too old for evrepl. Install Rust with rustup (https://rustup.rs):
  curl --proto '=https' --tlsv1.2 -sSf https://sh.rustup.rs | sh
then open a new shell and run this again.
TEXT
    exit 1
fi

java_17() {
    local version
    version=$(java -version 2>&1 | sed -n 's/.*version "\([0-9]*\).*/\1/p' | head -1)
    [ -n "$version" ] && [ "$version" -ge 17 ]
}

header() { echo "#include <$1>" | cc -E -; }

python_header() {
    python3 -c 'import os, sysconfig; assert os.path.exists(sysconfig.get_path("include") + "/Python.h")'
}

need memcached command -v memcached
need cmake command -v cmake
need make command -v make
need g++ command -v g++
need pkg-config command -v pkg-config
need libssl-dev header openssl/ssl.h
need zlib1g-dev header zlib.h
# librdkafka 2.12 includes curl's header even where nothing of curl is linked.
need libcurl4-openssl-dev header curl/curl.h
# The demo's Jaeger (otlp-embedded) generates code from OTLP's protocol files.
need protobuf-compiler command -v protoc
if [ "$what" = browser ]; then
    need chromium command -v chromium
    # Without any font its pictures have boxes for letters.
    need fonts-dejavu-core ls /usr/share/fonts/truetype/dejavu/DejaVuSans.ttf
fi
if [ "$what" = profile ]; then
    need valgrind command -v valgrind
    case " $* " in *" --flame "*) need linux-perf command -v perf ;; esac
fi
if [ "$what" = all ]; then
    need openjdk-17-jre-headless java_17
    need maven command -v mvn
    # Applications in Java and in Go write at the front door.
    need openjdk-17-jdk-headless command -v javac
    need golang-go command -v go
    # The shell's way to write events, in docs/writing-events.md.
    need kcat command -v kcat
    # The fault lab sets processes' clocks with it.
    need libfaketime ls /usr/lib/*/faketime/libfaketimeMT.so.1
    # Debian splits venv from python3; without ensurepip a venv has no pip.
    need python3-venv python3 -c 'import venv, ensurepip'
    # pylibmc has wheels for common Pythons; where none fits, pip builds it against these.
    need libmemcached-dev header libmemcached/memcached.h
    need python3-dev python_header
    # promtool, and a Prometheus for the test of the dashboard.
    need prometheus command -v promtool
fi

[ ${#missing[@]} -eq 0 ] && exit 0

echo "setup: missing: ${missing[*]}"
if ! command -v apt-get >/dev/null; then
    echo "setup: this is not a Debian: install the packages above (Debian's names) by hand and run this again" >&2
    exit 1
fi
root=()
if [ "$(id -u)" -ne 0 ]; then
    command -v sudo >/dev/null || { echo "setup: not root and no sudo: as root, run: apt-get install ${missing[*]}" >&2; exit 1; }
    root=(sudo)
fi
"${root[@]}" apt-get update -q
if [[ " ${missing[*]} " == *" prometheus "* ]] && command -v systemctl >/dev/null; then
    # Only its programs are wanted: masked, Debian's service neither starts now nor at the next boot.
    "${root[@]}" systemctl mask prometheus.service >/dev/null 2>&1 || true
fi
if ! "${root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "${missing[@]}"; then
    echo "setup: apt-get could not install all of: ${missing[*]}" >&2
    exit 1
fi
