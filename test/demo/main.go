// Command demo shows the main job on one machine, without privileges: two
// datacenters on the loopback interface, each with an unmodified serf agent, a
// sidecar and a gateway. It joins the agents, sends a query and an event
// across, and reads from the metrics of all four what was carried.
//
//	make demo                       # ends 0 only if every step was verified
//	make demo STAY=1                # keeps running and prints what to try
//	make demo BREAK=gateway         # or sidecar, cert: spoils one part before the join
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"syscall"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop)
	os.Exit(run(ctx))
}

func run(ctx context.Context) int {
	var o options
	flag.StringVar(&o.culvert, "culvert", "", "culvert's `PROGRAM` (required)")
	flag.StringVar(&o.serf, "serf", "", "serf's `PROGRAM` (required)")
	flag.StringVar(&o.spoil, "break", "", "spoil a `PART` before the join: gateway, sidecar or cert")
	flag.BoolVar(&o.stay, "stay", false, "keep running and print what to try")
	flag.Parse()
	if err := o.check(); err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		return 2
	}
	d, err := newDemo(o, os.Stdout)
	if err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		return 1
	}
	err = d.play(ctx)
	if closeErr := d.close(); err == nil {
		err = closeErr
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "\ndemo: FAILED: %v\n", err)
		return 1
	}
	fmt.Println("\ndemo: every step was verified")
	return 0
}
