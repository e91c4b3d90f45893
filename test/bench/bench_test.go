package main

import (
	"bytes"
	"context"
	"errors"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"culvert/sniff"
)

// What the load sends in place of a hello must be one: HAProxy and nginx look
// for the server name in it.
func TestHello(t *testing.T) {
	hello, err := newHello()
	if err != nil {
		t.Fatal(err)
	}
	one, another := hello(), hello()
	got, n, err := sniff.ParseHello(one)
	if err != nil || n != len(one) {
		t.Fatalf("ParseHello of %d bytes: %d, %v", len(one), n, err)
	}
	if got.ServerName != opaqueName || len(got.Protocols) != 1 || got.Protocols[0] != protocol {
		t.Errorf("hello says %+v", got)
	}
	if bytes.Equal(one, another) {
		t.Error("two connections have one random")
	}
}

// The whole load, through nothing.
func TestLoad(t *testing.T) {
	server, err := newLocal(afterHello)
	if err != nil {
		t.Fatal(err)
	}
	defer server.close()
	hello, err := newHello()
	if err != nil {
		t.Fatal(err)
	}
	open := opaque(server.address(), hello)
	if err := bulk(t.Context(), open, 4<<20); err != nil {
		t.Errorf("bulk: %v", err)
	}
	if err := short(t.Context(), open, 20, 4); err != nil {
		t.Errorf("short: %v", err)
	}
	drop, err := hold(t.Context(), open, 10)
	if err != nil {
		t.Fatalf("hold: %v", err)
	}
	drop()
}

// A load that does not get through must say so.
func TestLoadFails(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			c.Close()
		}
	}()
	hello, err := newHello()
	if err != nil {
		t.Fatal(err)
	}
	open := opaque(ln.Addr().String(), hello)
	if bulk(t.Context(), open, 4<<20) == nil || short(t.Context(), open, 20, 4) == nil {
		t.Error("connections that were closed at once count")
	}
	if _, err := hold(t.Context(), open, 10); err == nil {
		t.Error("connections that were closed at once are held")
	}
}

// The figures of a process group are those of its processes, and of no others.
func TestGroup(t *testing.T) {
	const script = `i=0; while [ $i -lt 100000 ]; do i=$((i+1)); done & wait; sleep 60 & sleep 60`
	g, err := startGroup("sh", t.TempDir(), 0, "/bin/sh", "-c", script)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		for _, pid := range must(t, g.pids) {
			p, _ := os.FindProcess(pid)
			_ = p.Kill()
		}
		<-g.done
	}()
	deadline := time.Now().Add(20 * time.Second)
	for len(must(t, g.pids)) != 3 { // the shell and two that sleep
		if time.Now().After(deadline) {
			t.Fatalf("%d processes, want 3", len(must(t, g.pids)))
		}
		time.Sleep(10 * time.Millisecond)
	}
	before := must(t, g.cpu)
	time.Sleep(50 * time.Millisecond)
	if used := must(t, g.cpu) - before; used > 20*time.Millisecond {
		t.Errorf("processes that sleep have used %v", used)
	}
	if pss := must(t, g.pss); pss < 50 || pss > 100<<10 {
		t.Errorf("three small processes have %v KiB", pss)
	}
	if n := must(t, g.descriptors); n < 9 {
		t.Errorf("three processes have %v descriptors", n)
	}
	if _, err := slab(); err != nil {
		t.Error(err)
	}
}

func must[T any](t *testing.T, f func() (T, error)) T {
	t.Helper()
	v, err := f()
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func TestReport(t *testing.T) {
	measured := func(name string, values ...float64) *row {
		return &row{name: name, measure: func(context.Context) ([]float64, error) {
			v := values[0]
			values = values[1:]
			return []float64{v}, nil
		}}
	}
	top := &topic{
		name: "topic", title: "title", columns: []string{"CPU"},
		rows: []*row{
			measured("ours", 3, 1, 2), measured("theirs", 4, 4, 9),
			{name: "broken", measure: func(context.Context) ([]float64, error) { return nil, errors.New("no such program") }},
		},
		bounds: []bound{
			{row: "ours", beside: "theirs", most: 0.5}, {row: "ours", most: 1.5, aim: 1}, {row: "ours", beside: "broken", most: 1},
		},
		known: map[string]float64{"theirs": 2, "broken": 1},
	}
	top.run(t.Context(), 3)
	text, err := top.report()
	if err == nil || !strings.Contains(err.Error(), "broken: no such program") {
		t.Errorf("report: %v", err)
	}
	for _, want := range []string{
		"FAILED  broken: no such program", "holds   ours / theirs: 0.500 (at most 0.500)",
		"MISSED  ours, CPU: 2.00 (at most 1.50, aim 1.00)", "NOT SHOWN  ours / broken",
	} {
		if !strings.Contains(text, want) {
			t.Errorf("report lacks %q:\n%s", want, text)
		}
	}
	if peers := top.peers(); len(peers) != 1 || peers[0].value != 4 {
		t.Errorf("peers %+v", peers)
	}
}

func TestCompare(t *testing.T) {
	text := compare([]peer{
		{topic: "a", name: "one", value: 20, known: 10},
		{topic: "a", name: "two", value: 22, known: 10},
		{topic: "a", name: "bad", value: 40, known: 10},
		{topic: "b", name: "one", value: 11, known: 10, memory: true},
		{topic: "b", name: "bad", value: 20, known: 10, memory: true},
	})
	for _, line := range strings.Split(strings.TrimSpace(text), "\n")[1:] {
		if out := strings.Contains(line, "DOES NOT COUNT"); out != strings.Contains(line, "bad") {
			t.Errorf("%s", line)
		}
	}
	if !strings.Contains(text, "2.20 times") {
		t.Errorf("the machine's factor is missing:\n%s", text)
	}
}
