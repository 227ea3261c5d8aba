#!/usr/bin/env bash
# Runs one Apache Kafka broker in the foreground, for trying evrepl by hand: scripts/kafka-run.sh [PORT]
# Its data is under target/kafka/data-PORT and stays there. Needs `make kafka` once.
set -euo pipefail
cd "$(dirname "$0")/.."
port=${1:-9092}
libs=target/kafka/libs
data=target/kafka/data-$port
[ -n "$(ls "$libs"/kafka_*.jar 2>/dev/null)" ] || { echo "kafka-run: no jars in $libs; run 'make kafka' first" >&2; exit 1; }
mkdir -p "$data"
cat > "$data.properties" <<PROPERTIES
process.roles=broker,controller
node.id=1
controller.quorum.voters=1@127.0.0.1:$((port + 1))
listeners=PLAINTEXT://127.0.0.1:$port,CONTROLLER://127.0.0.1:$((port + 1))
advertised.listeners=PLAINTEXT://127.0.0.1:$port
controller.listener.names=CONTROLLER
listener.security.protocol.map=CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT
log.dirs=$data
offsets.topic.replication.factor=1
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
share.coordinator.state.topic.replication.factor=1
share.coordinator.state.topic.min.isr=1
group.initial.rebalance.delay.ms=0
PROPERTIES
if [ ! -f "$data/meta.properties" ]; then
    # A uuid that begins with '-' is refused by the tool that made it.
    while id=$(java -cp "$libs/*" kafka.tools.StorageTool random-uuid 2>/dev/null) && [[ $id == -* ]]; do :; done
    java -cp "$libs/*" kafka.tools.StorageTool format -t "$id" -c "$data.properties" > /dev/null 2>&1
fi
exec java -Xmx512m -XX:TieredStopAtLevel=1 -cp "$libs/*" kafka.Kafka "$data.properties"
