package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"strings"

	"culvert/test/scrape"
)

const (
	eventName  = "deploy"
	queryName  = "uptime"
	eventBytes = 1200
)

const agentConfig = `{
  "node_name": %q,
  "bind": "%s:7946",
  "advertise": "%s:7946",
  "rpc_addr": %q,
  "user_event_size_limit": 2048,
  "event_handlers": ["user:%s=cat > %s", "query:%s=echo pong from %s"]
}
`

// An agent is where a serf agent takes commands.
type agent struct {
	on  *host
	rpc string
}

func (s *stage) serf(ctx context.Context, at agent, command1 string, args ...string) (string, error) {
	return command(ctx, at.on, s.dir, s.o.serf, append([]string{command1, "-rpc-addr=" + at.rpc}, args...)...)
}

// alive returns the names of the members that an agent believes alive.
func (s *stage) alive(ctx context.Context, at agent) ([]string, error) {
	out, err := s.serf(ctx, at, "members", "-format=json", "-status=alive")
	if err != nil {
		return nil, err
	}
	var answer struct{ Members []struct{ Name string } }
	if err := json.Unmarshal([]byte(out), &answer); err != nil {
		return nil, fmt.Errorf("read the members: %w", err)
	}
	var names []string
	for _, m := range answer.Members {
		names = append(names, m.Name)
	}
	return names, nil
}

// sendEvent sends an event and waits until another agent's handler has put all of
// it into a file.
func (s *stage) sendEvent(ctx context.Context, from agent, to, received string) error {
	payload := strings.Repeat("0123456789", eventBytes/10)
	if _, err := s.serf(ctx, from, "event", eventName, payload); err != nil {
		return err
	}
	return eventually(ctx, startTimeout, func() error {
		got, err := os.ReadFile(received)
		if errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("%s's handler was not called", to)
		}
		// The agent ends a payload with a line feed.
		if err == nil && strings.TrimSuffix(string(got), "\n") != payload {
			err = fmt.Errorf("%s's handler got %d bytes, want the %d that were sent", to, len(got), len(payload))
		}
		return err
	})
}

// awaitReady waits until a sidecar or a gateway says that it is ready.
func awaitReady(ctx context.Context, client *http.Client, p *process, admin string) error {
	return eventually(ctx, startTimeout, func() error {
		if p.ended() {
			return fmt.Errorf("%s ended:\n%s", p.name, p.tail())
		}
		code, body, err := scrape.Get(ctx, client, admin, "/readyz")
		if err == nil && code != http.StatusOK {
			err = fmt.Errorf("%s is not ready: %s", p.name, body)
		}
		return err
	})
}
