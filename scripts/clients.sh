#!/usr/bin/env bash
# Fetches and builds the clients of other languages that the tests speak to the front door through, into target/clients:
# spymemcached through Maven, gomemcache through Go; and the programs of docs/writing-events.md. Python's are scripts/python-env.sh's. Does nothing when they are there.
set -euo pipefail
cd "$(dirname "$0")/.."

out=target/clients
wanted=$(cat tests/clients/java/* tests/clients/go/* tests/clients/events-go/* docs/writing-events.md scripts/clients.sh | sha256sum)

if [ -f "$out/.complete" ] && [ "$(cat "$out/.complete")" = "$wanted" ]; then
    exit 0
fi
rm -rf "$out" "$out.part"
mkdir -p "$out.part/java"
part=$PWD/$out.part

try() { # try COMMAND...: a registry that hiccups is asked twice more
    for attempt in 1 2 3; do
        "$@" && return 0
        sleep 5
    done
    echo "clients: failed three times: $*" >&2
    return 1
}

try mvn --batch-mode --quiet --no-transfer-progress -f tests/clients/java/pom.xml dependency:copy-dependencies \
    -DincludeScope=runtime -DoutputDirectory="$part/java"
javac -cp "$part/java/*" -d "$part/java" tests/clients/java/Client.java
(cd tests/clients/go && try go build -o "$part/gomemcache" .)

# The programs of docs/writing-events.md, as they stand there.
block() { awk -v "fence=\`\`\`$1" '$0 == fence { inside = 1; next } /^```$/ { inside = 0 } inside' docs/writing-events.md; }
mkdir -p "$part/events/go" "$part/events/java"
block bash >"$part/events/write.sh"
block python >"$part/events/write.py"
block java >"$part/events/java/WriteEvent.java"
cp tests/clients/events-go/* "$part/events/go"
block go >"$part/events/go/main.go"
javac -cp "$part/java/*:target/kafka/libs/*" -d "$part/events/java" "$part/events/java/WriteEvent.java"
(cd "$part/events/go" && try go build -o "$part/events/write-go" .)
echo "$wanted" >"$out.part/.complete"
mv "$out.part" "$out"
echo "clients: spymemcached and gomemcache in $out"
