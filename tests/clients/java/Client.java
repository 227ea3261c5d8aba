import java.net.InetSocketAddress;
import java.nio.charset.StandardCharsets;
import java.util.Base64;
import java.util.List;
import java.util.Scanner;
import java.util.concurrent.TimeUnit;
import net.spy.memcached.ConnectionFactoryBuilder;
import net.spy.memcached.ConnectionFactoryBuilder.Protocol;
import net.spy.memcached.MemcachedClient;

/**
 * An application in Java, told what to do line by line: {@code PROTOCOL HOST PORT}, then {@code set KEY VALUE},
 * {@code add KEY VALUE}, {@code append KEY VALUE}, {@code incr KEY BY}, {@code touch KEY SECONDS}, {@code delete KEY},
 * {@code get KEY}. Values are in base64; each answer is a line.
 */
public final class Client {
  public static void main(String[] arguments) throws Exception {
    Scanner in = new Scanner(System.in, StandardCharsets.UTF_8);
    String[] where = in.nextLine().split(" ");
    MemcachedClient client =
        new MemcachedClient(
            new ConnectionFactoryBuilder()
                .setProtocol(where[0].equals("binary") ? Protocol.BINARY : Protocol.TEXT)
                .setOpTimeout(30_000)
                .build(),
            List.of(new InetSocketAddress(where[1], Integer.parseInt(where[2]))));
    try {
      while (in.hasNextLine()) {
        String[] words = in.nextLine().split(" ");
        System.out.println(run(client, words));
        System.out.flush();
      }
    } finally {
      client.shutdown(10, TimeUnit.SECONDS);
    }
  }

  private static String run(MemcachedClient client, String[] words) throws Exception {
    String key = words[1];
    switch (words[0]) {
      case "set":
        return client.set(key, 0, value(words)).get().toString();
      case "add":
        return client.add(key, 0, value(words)).get().toString();
      case "append":
        return client.append(key, value(words)).get().toString();
      case "incr":
        return Long.toString(client.incr(key, Long.parseLong(words[2])));
      case "touch":
        return client.touch(key, Integer.parseInt(words[2])).get().toString();
      case "delete":
        return client.delete(key).get().toString();
      case "get":
        Object found = client.get(key);
        return found == null
            ? "-"
            : Base64.getEncoder().encodeToString(found.toString().getBytes(StandardCharsets.UTF_8));
      default:
        throw new IllegalArgumentException(words[0]);
    }
  }

  private static String value(String[] words) {
    return new String(Base64.getDecoder().decode(words[2]), StandardCharsets.UTF_8);
  }
}
