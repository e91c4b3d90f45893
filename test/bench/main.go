// Command bench measures Culvert beside what an operator would use instead:
// HAProxy, nginx and stunnel, with their own defaults and the configurations in
// conf. Each topic is a table. Its rows are measured in turns, for several rounds,
// and shown by their medians.
//
//	make bench-peers                          # all topics
//	make bench-peers TOPIC=gateway-bulk,storm ROUNDS=7
//
// CPU time is that of a proxy's processes alone, so the load generator, which is
// this program, does not count. Proxies run as ordinary users, each as one of its
// own, as far as this program is root.
package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"time"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop)
	os.Exit(run(ctx, os.Args[1:], os.Stdout, os.Stderr))
}

func run(ctx context.Context, args []string, out, errOut io.Writer) int {
	flags := flag.NewFlagSet("bench", flag.ContinueOnError)
	flags.SetOutput(errOut)
	culvert := flags.String("culvert", "bin/culvert", "culvert's `PROGRAM`")
	rounds := flags.Int("rounds", 5, "measure each row `N` times")
	only := flags.String("topic", "", "measure these `TOPICS` alone, comma-separated: "+strings.Join(names(), ", "))
	stormOn := flags.String("storm", "", "used by the program itself: make handshakes with `ADDRESS` until the input ends")
	if err := flags.Parse(args); err != nil {
		return 2
	}
	if *stormOn != "" {
		return report(errOut, storm(ctx, *stormOn, flags.Arg(0), os.Stdin, out))
	}
	wanted := names()
	if *only != "" {
		wanted = strings.Split(*only, ",")
	}
	for _, name := range wanted {
		if !slices.Contains(names(), name) {
			_, _ = fmt.Fprintf(errOut, "bench: error: no topic %q\nbench: hint: one of %s\n", name, strings.Join(names(), ", "))
			return 2
		}
	}
	if *rounds < 1 {
		_, _ = fmt.Fprintln(errOut, "bench: error: --rounds must be 1 or more")
		return 2
	}
	return report(errOut, measure(ctx, *culvert, wanted, *rounds, out))
}

func report(errOut io.Writer, err error) int {
	if err != nil {
		_, _ = fmt.Fprintf(errOut, "bench: error: %v\n", err)
		return 1
	}
	return 0
}

// measure measures topics one after the other and prints each. The error is the
// first of what failed.
func measure(ctx context.Context, culvert string, wanted []string, rounds int, out io.Writer) (err error) {
	began := time.Now()
	b, err := newBench(ctx, culvert)
	if err != nil {
		return err
	}
	defer func() {
		if closeErr := b.close(); err == nil {
			err = closeErr
		}
	}()
	_, _ = fmt.Fprintf(out, "%s; medians of %d rounds\n", b.describe(ctx), rounds)
	for _, name := range wanted {
		failed := b.topic(ctx, name, rounds, out)
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if err == nil {
			err = failed
		}
	}
	_, _ = io.WriteString(out, compare(b.peers))
	_, _ = fmt.Fprintf(out, "\nmeasured in %v\n", time.Since(began).Round(time.Second))
	return err
}

// topic measures one topic and prints it.
func (b *bench) topic(ctx context.Context, name string, rounds int, out io.Writer) error {
	t, err := topics()[name](ctx, b)
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	t.name = name
	t.run(ctx, rounds)
	if err := t.close(); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	b.peers = append(b.peers, t.peers()...)
	text, failed := t.report()
	if _, err := io.WriteString(out, text); err != nil {
		return err
	}
	return failed
}
