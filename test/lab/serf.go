package lab

import (
	"encoding/json"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
)

// A SerfAgent is an unmodified serf agent on a host.
type SerfAgent struct {
	*Process
	Name      string
	Advertise netip.Addr
	host      *Host
	program   string
	rpc       string
}

// StartSerf starts an agent that listens on bind and advertises another
// address, as the operator of a captured server does. More is JSON that is
// merged into its configuration; "" adds nothing.
func (h *Host) StartSerf(name string, bind, advertise netip.Addr, more string) *SerfAgent {
	h.t.Helper()
	a := &SerfAgent{Name: name, Advertise: advertise, host: h, program: Serf(h.t), rpc: "127.0.0.1:7373"}
	config := map[string]any{
		"node_name": name,
		"bind":      net.JoinHostPort(bind.String(), "7946"),
		"advertise": net.JoinHostPort(advertise.String(), "7946"),
		"rpc_addr":  a.rpc,
		// What a query's handler prints is its answer.
		"event_handlers": []string{"query:who=echo " + name},
		"log_level":      "debug",
	}
	if more != "" {
		var extra map[string]any
		if err := json.Unmarshal([]byte(more), &extra); err != nil {
			h.t.Fatal(err)
		}
		maps.Copy(config, extra)
	}
	text, err := json.Marshal(config)
	if err != nil {
		h.t.Fatal(err)
	}
	file := h.WriteFile(name+".json", string(text))
	a.Process = h.Start("serf-"+name, a.program, "agent", "-config-file="+file)
	a.AwaitUp()
	return a
}

// StartUncaptured starts an agent that listens on all addresses, as one does that
// knows nothing of Culvert. Of IPv6 memberlist finds no address to advertise by
// itself.
func (h *Host) StartUncaptured(name string, more ...string) *SerfAgent {
	h.t.Helper()
	a := &SerfAgent{Name: name, Advertise: h.Addr, host: h, program: Serf(h.t), rpc: "127.0.0.1:7373"}
	bind := []string{"-bind=0.0.0.0:7946"}
	if h.Addr.Is6() {
		bind = []string{"-bind=[::]:7946", "-advertise=" + net.JoinHostPort(h.Addr.String(), "7946")}
	}
	a.Process = h.Start("serf-"+name, a.program, append(append([]string{"agent", "-node=" + name, "-rpc-addr=" + a.rpc}, bind...), append([]string{
		"-event-handler=query:who=echo $SERF_SELF_NAME", "-event-handler=user:told=cat > told", "-log-level=debug",
	}, more...)...)...)
	a.AwaitUp()
	return a
}

// CommandLine is that of the running agent, as the kernel knows it.
func (a *SerfAgent) CommandLine() string {
	a.host.t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", a.PID()))
	if err != nil {
		a.host.t.Fatal(err)
	}
	return strings.ReplaceAll(strings.TrimRight(string(b), "\x00"), "\x00", " ")
}

// AwaitUp waits until the agent answers its control address.
func (a *SerfAgent) AwaitUp() {
	a.host.t.Helper()
	Eventually(a.host.t, startTimeout, func() error {
		if a.Ended() {
			return fmt.Errorf("serf %s has ended:\n%s", a.Name, a.Tail(2000))
		}
		_, err := a.Do("info")
		return err
	})
}

// Do runs a serf command against the agent.
func (a *SerfAgent) Do(command string, args ...string) (string, error) {
	return a.host.Run(a.program, append([]string{command, "-rpc-addr=" + a.rpc}, args...)...)
}

// Members returns the status of each member that the agent knows.
func (a *SerfAgent) Members() (map[string]string, error) {
	out, err := a.Do("members", "-format=json")
	if err != nil {
		return nil, err
	}
	var answer struct {
		Members []struct{ Name, Status string }
	}
	if err := json.Unmarshal([]byte(out), &answer); err != nil {
		return nil, fmt.Errorf("members of %s: %w: %s", a.Name, err, out)
	}
	status := make(map[string]string)
	for _, m := range answer.Members {
		status[m.Name] = m.Status
	}
	return status, nil
}

// Sees returns an error unless these members, and no others, have the status.
func (a *SerfAgent) Sees(status string, names ...string) error {
	got, err := a.Members()
	if err != nil {
		return err
	}
	for _, name := range names {
		if got[name] != status {
			return fmt.Errorf("%s sees %v, want %s %s", a.Name, got, name, status)
		}
	}
	for name, s := range got {
		if s == status && !slices.Contains(names, name) {
			return fmt.Errorf("%s sees %v, want %s %v alone", a.Name, got, status, names)
		}
	}
	return nil
}

// Query asks all agents who they are and returns who answered.
func (a *SerfAgent) Query(name string) (map[string]string, error) {
	out, err := a.Do("query", "-format=json", "-timeout=3s", name)
	if err != nil {
		return nil, err
	}
	var answer struct{ Responses map[string]string }
	if err := json.Unmarshal([]byte(out), &answer); err != nil {
		return nil, fmt.Errorf("query of %s: %w: %s", a.Name, err, out)
	}
	for k, v := range answer.Responses {
		answer.Responses[k] = strings.TrimSpace(v)
	}
	return answer.Responses, nil
}

// Acks runs serf reachability and returns the names of those that acknowledged.
func (a *SerfAgent) Acks() ([]string, error) {
	out, err := a.Do("reachability", "-verbose")
	if err != nil && !strings.Contains(out, "Query time") {
		return nil, err
	}
	var names []string
	for line := range strings.Lines(out) {
		if name, ok := strings.CutPrefix(strings.TrimSpace(line), "Ack from "); ok {
			names = append(names, strings.Trim(name, "'"))
		}
	}
	slices.Sort(names)
	return slices.Compact(names), nil
}
