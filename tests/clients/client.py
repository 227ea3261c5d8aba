"""An application in Python, told what to do as the one in java/ is: with pymemcache, or with pylibmc in text or binary."""

import base64
import sys


def main():
    protocol, host, port = sys.stdin.readline().split()
    if protocol == "pymemcache":
        from pymemcache.client.base import Client

        client = Client((host, int(port)), default_noreply=False, timeout=30)
    else:
        import pylibmc

        client = pylibmc.Client([f"{host}:{port}"], binary=protocol == "pylibmc-binary")
    for line in sys.stdin:
        print(run(client, protocol, line.split()), flush=True)


def run(client, protocol, words):
    what, key = words[0], words[1]
    value = base64.b64decode(words[2]) if what in ("set", "add", "append") else None
    if what == "get":
        found = client.get(key)
        if isinstance(found, str):
            found = found.encode()
        elif isinstance(found, int):
            found = str(found).encode()
        return "-" if found is None else base64.b64encode(found).decode()
    if what == "incr":
        return client.incr(key, int(words[2]))
    if what == "touch":
        done = client.touch(key, int(words[2]))
    elif what == "delete":
        done = client.delete(key)
    else:
        done = getattr(client, what)(key, value)
    return "true" if done else "false"


main()
