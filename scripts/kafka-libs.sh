#!/usr/bin/env bash
# Fetches Apache Kafka's jars into target/kafka/libs through Maven (43 MB, once). Does nothing when they are there.
# The jars that belong there are those of scripts/kafka/pom.xml; a changed pom fetches them anew.
set -euo pipefail
cd "$(dirname "$0")/.."

pom=scripts/kafka/pom.xml
libs=target/kafka/libs
wanted=$(sha256sum <"$pom")

if [ -f "$libs/.complete" ] && [ "$(cat "$libs/.complete")" = "$wanted" ]; then
    exit 0
fi

command -v mvn >/dev/null || { echo "kafka-libs: maven is missing, run 'make setup'" >&2; exit 1; }

# Copied beside and moved into place, so that an interrupted run never leaves a half-filled folder.
rm -rf "$libs" "$libs.part"
mkdir -p "$libs.part"
echo "kafka-libs: fetching Apache Kafka's jars (43 MB, about a minute the first time)"
for attempt in 1 2 3; do
    if mvn --batch-mode --quiet --no-transfer-progress -f "$pom" dependency:copy-dependencies \
        -DincludeScope=runtime -DoutputDirectory="$PWD/$libs.part"; then
        break
    fi
    # A registry that hiccups is asked twice more; Maven keeps what it has in ~/.m2.
    [ "$attempt" -lt 3 ] || { echo "kafka-libs: maven failed three times, see above" >&2; exit 1; }
    sleep 5
done
echo "$wanted" >"$libs.part/.complete"
mv "$libs.part" "$libs"
echo "kafka-libs: $(find "$libs" -name '*.jar' | wc -l) jars in $libs"
