// An application in Go, told what to do as the one in ../java is.
package main

import (
	"bufio"
	"encoding/base64"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/bradfitz/gomemcache/memcache"
)

func main() {
	in := bufio.NewScanner(os.Stdin)
	in.Buffer(make([]byte, 1<<20), 4<<20)
	in.Scan()
	where := strings.Fields(in.Text())
	client := memcache.New(where[1] + ":" + where[2])
	client.Timeout = 30 * time.Second
	for in.Scan() {
		fmt.Println(run(client, strings.Fields(in.Text())))
	}
}

func run(client *memcache.Client, words []string) string {
	key := words[1]
	item := func() *memcache.Item {
		value, err := base64.StdEncoding.DecodeString(words[2])
		if err != nil {
			panic(err)
		}
		return &memcache.Item{Key: key, Value: value}
	}
	number := func() int64 {
		number, err := strconv.ParseInt(words[2], 10, 64)
		if err != nil {
			panic(err)
		}
		return number
	}
	switch words[0] {
	case "set":
		return done(client.Set(item()))
	case "add":
		return done(client.Add(item()))
	case "append":
		return done(client.Append(item()))
	case "incr":
		value, err := client.Increment(key, uint64(number()))
		if err != nil {
			return done(err)
		}
		return strconv.FormatUint(value, 10)
	case "touch":
		return done(client.Touch(key, int32(number())))
	case "delete":
		return done(client.Delete(key))
	case "get":
		item, err := client.Get(key)
		if err == memcache.ErrCacheMiss {
			return "-"
		}
		if err != nil {
			return done(err)
		}
		return base64.StdEncoding.EncodeToString(item.Value)
	}
	panic(words[0])
}

func done(err error) string {
	switch err {
	case nil:
		return "true"
	case memcache.ErrNotStored, memcache.ErrCacheMiss:
		return "false"
	}
	return err.Error()
}
