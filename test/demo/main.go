// Command demo shows the main job on one machine, without privileges: two
// datacenters on the loopback interface, each with an unmodified serf agent, a
// sidecar and a gateway. It joins the agents, sends a query and an event
// across, and reads from the metrics of all four what was carried.
//
// With --federation it shows how datacenters find each other: three of them, in
// network namespaces of their own, none told of a peer. A server comes and goes,
// and the primary datacenter's sidecar stops.
//
//	make demo                       # ends 0 only if every step was verified
//	make demo FEDERATION=1          # the form in which datacenters find each other
//	make demo STAY=1                # keeps running and prints what to try
//	make demo BREAK=gateway         # or sidecar, cert: spoils one part before the join
//	make demo FEDERATION=1 BREAK=record  # dave claims bob's address
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"syscall"
)

// A form of the demo is played once.
type form interface {
	play(ctx context.Context) error
	close() error // safe after play in any case
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop)
	os.Exit(run(ctx))
}

func run(ctx context.Context) int {
	var o options
	flag.StringVar(&o.culvert, "culvert", "", "culvert's `PROGRAM` (required)")
	flag.StringVar(&o.serf, "serf", "", "serf's `PROGRAM` (required)")
	flag.StringVar(&o.spoil, "break", "", "spoil a `PART`: gateway, sidecar or cert; with --federation also record")
	flag.BoolVar(&o.federation, "federation", false, "show how datacenters find each other, in network namespaces")
	flag.BoolVar(&o.stay, "stay", false, "keep running and print what to try")
	flag.Parse()
	if err := o.check(); err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		return 2
	}
	if o.federation && inside() == "" {
		code, err := enter(ctx)
		if err != nil {
			fmt.Fprintln(os.Stderr, "demo:", err)
			return 1
		}
		return code
	}
	f, err := newForm(o)
	if err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		return 1
	}
	err = f.play(ctx)
	if closeErr := f.close(); err == nil {
		err = closeErr
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "\ndemo: FAILED: %v\n", err)
		return 1
	}
	fmt.Println("\ndemo: every step was verified")
	return 0
}

func newForm(o options) (form, error) {
	if o.federation {
		return newFederation(o, os.Stdout)
	}
	return newDemo(o, os.Stdout)
}
