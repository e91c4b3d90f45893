package sidecar

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"time"

	"culvert/alpn"
	"culvert/catalog"
	"culvert/certs"
	"culvert/config"
	"culvert/locator"
)

// An Explanation is how what the local server sends to a peer gets there.
type Explanation struct {
	Peer      string `json:"peer"` // datacenter/node
	Advertise string `json:"advertise"`
	Source    string `json:"source"` // configuration or federation: who says that the peer is there
	Critical  bool   `json:"critical"`
	Capture   string `json:"capture"`  // how the server's packets and connections come to the sidecar
	Endpoint  string `json:"endpoint"` // with redirect: the address that stands for the peer on this host
	// Path is absent where the peer is reached plainly.
	Path *locator.Explanation `json:"path,omitempty"`
	// ServerName is what the sidecar asks for: gateways route by it, and the
	// peer's certificate must carry it.
	ServerName  string             `json:"server_name"`
	Certificate string             `json:"certificate"`
	Services    []ExplainedService `json:"services"`
	// Probe is a real connection, where one was asked for.
	Probe []ProbeStep `json:"probe,omitempty"`
}

// An ExplainedService is one port of the peer.
type ExplainedService struct {
	Name string `json:"name"`
	Kind string `json:"kind"`
	Port uint16 `json:"port"`
	// ALPN are the protocols that are offered, the preferred one first. Where
	// connections begin with a type byte, it is the first one and that of the
	// type.
	ALPN []string `json:"alpn"`
}

// A ProbeStep is one step of a connection.
type ProbeStep struct {
	Step   string `json:"step"` // connect, handshake, accepted
	OK     bool   `json:"ok"`
	TookUS int64  `json:"took_us"` // microseconds
	Detail string `json:"detail"`
}

// errNoPeer is for a peer that is not in the catalog.
var errNoPeer = errors.New("no such peer is known")

// Explain tells how a peer is reached now. With probe it makes one connection and
// tells how each step of that went.
func (s *Sidecar) Explain(ctx context.Context, to catalog.Key, probe bool) (Explanation, error) {
	p, ok := s.catalog.Load().Peer(to)
	if !ok {
		return Explanation{}, fmt.Errorf("explain %s: %w", to, errNoPeer)
	}
	cfg := s.cfg.Load()
	name := certs.ServerName(to.Node, to.Datacenter, cfg.Domain)
	e := Explanation{
		Peer: to.String(), Advertise: p.Advertise.String(), Source: "federation", Critical: p.Critical, ServerName: name,
		Certificate: fmt.Sprintf("of role server, for %s, of the CA in %s", name, cfg.TLS.CAFile),
	}
	for _, c := range cfg.Peers {
		if c.Datacenter == to.Datacenter && c.Node == to.Node {
			e.Source = "configuration"
		}
	}
	if s.isPlain(to) {
		e.Capture = "none: with redirect, servers of one datacenter reach each other as they are"
		return e, nil
	}
	e.Capture = fmt.Sprintf("bind: the sidecar has %s itself", p.Advertise)
	if cfg.Capture == config.CaptureRedirect {
		captured, endpoints := s.captureStatus()
		e.Endpoint = endpoints[to].String()
		e.Capture = fmt.Sprintf("redirect: table %s turns what is for %s to %s", captured.Table, p.Advertise, e.Endpoint)
	}
	for _, sv := range cfg.Services {
		offer := s.table.Offer(sv.Name)
		if sv.Types {
			for _, t := range alpn.ConsulTypes() {
				offer = append(offer, t.ALPN)
			}
		}
		e.Services = append(e.Services, ExplainedService{sv.Name, sv.Kind, sv.Port, offer})
	}
	path, err := s.locator.Explain(to) //nolint:contextcheck // pools run for as long as the locator does
	if err != nil {
		return Explanation{}, err
	}
	e.Path = &path
	if probe {
		e.Probe = s.probe(ctx, to, name, cfg)
	}
	return e, nil
}

// probe makes one connection to a peer, and gives it up at once.
func (s *Sidecar) probe(ctx context.Context, to catalog.Key, name string, cfg *config.Sidecar) []ProbeStep {
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	service := cfg.Services[0].Name
	for _, sv := range cfg.Services { // one of packets bothers no server
		if sv.Kind == kindPacket {
			service = sv.Name
			break
		}
	}
	began := time.Now()
	raw, path, err := s.locator.Dial(ctx, to)
	first := step("connect", began, err, func() string { return describe(path) })
	if err != nil {
		return []ProbeStep{first}
	}
	began = time.Now()
	c, err := s.dialer.Dial(ctx, raw, name, service)
	s.locator.Report(to, path, err)
	second := step("handshake", began, err, func() string {
		return fmt.Sprintf("%s, %s, the certificate is of %s", c.Version(), c.Route().Protocol, c.Peer())
	})
	if err != nil {
		return []ProbeStep{first, second}
	}
	defer func() { _ = c.Close() }()
	return []ProbeStep{first, second, accepted(c, time.Since(began))}
}

const (
	probeTimeout = 15 * time.Second
	leastAnswer  = 250 * time.Millisecond
)

// accepted tells whether the far side takes this one's certificate. In TLS 1.3
// that is known by reading alone: an alert, or nothing for longer than one would
// take.
func accepted(c *alpn.Conn, handshake time.Duration) ProbeStep {
	began := time.Now()
	_ = c.SetReadDeadline(began.Add(max(leastAnswer, 2*handshake))) // the connection is given up next
	_, err := c.Read(make([]byte, 1))
	if errors.Is(err, os.ErrDeadlineExceeded) {
		err = nil
	}
	return step("accepted", began, err, func() string { return "the far side has not refused this sidecar's certificate" })
}

func step(name string, began time.Time, err error, detail func() string) ProbeStep {
	s := ProbeStep{Step: name, OK: err == nil, TookUS: time.Since(began).Microseconds()}
	if err != nil {
		s.Detail = err.Error()
	} else {
		s.Detail = detail()
	}
	return s
}

func describe(p locator.Path) string {
	if p.Kind == locator.KindDirect {
		return "directly, " + p.Address
	}
	return fmt.Sprintf("by a %s gateway, %s, at %s", p.Kind, p.Gateway, p.Address)
}

// explainHandler answers GET /v1/explain/{dc}/{node}; ?probe makes a connection.
func (s *Sidecar) explainHandler(w http.ResponseWriter, r *http.Request) {
	to := catalog.Key{Datacenter: r.PathValue("dc"), Node: r.PathValue("node")}
	e, err := s.Explain(r.Context(), to, r.URL.Query().Has("probe"))
	w.Header().Set("Content-Type", "application/json")
	if err != nil {
		code := http.StatusInternalServerError
		if errors.Is(err, errNoPeer) {
			code = http.StatusNotFound
		}
		w.WriteHeader(code)
		_ = json.NewEncoder(w).Encode(map[string]string{"error": err.Error()}) // the client has gone: nothing to do
		return
	}
	out := json.NewEncoder(w)
	out.SetIndent("", "  ")
	_ = out.Encode(e) // the client has gone: nothing to do
}
