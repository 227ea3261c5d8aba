#!/usr/bin/env bash
# Makes target/venv with the Python clients that the tests speak to evrepl through: pylibmc is libmemcached, whose
# hash rings evrepl must reproduce; confluent-kafka and msgpack write events as an application would.
# Does nothing when it is there with these versions.
set -euo pipefail
cd "$(dirname "$0")/.."

packages=(pylibmc==1.6.3 confluent-kafka==2.12.2 msgpack==1.1.2 pymemcache==4.0.0)
venv=target/venv
wanted="${packages[*]}"

if [ -f "$venv/.complete" ] && [ "$(cat "$venv/.complete")" = "$wanted" ] && "$venv/bin/python" -c '' 2>/dev/null; then
    exit 0
fi

mkdir -p target
rm -rf "$venv"
python3 -m venv "$venv"
"$venv/bin/pip" install --quiet --disable-pip-version-check --retries 5 "${packages[@]}"
"$venv/bin/python" -c 'import confluent_kafka, msgpack, pylibmc, pymemcache'
echo "$wanted" >"$venv/.complete"
echo "python-env: $venv has $wanted"
