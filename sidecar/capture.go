package sidecar

import (
	"context"
	"net"
	"net/netip"
	"syscall"

	"go.uber.org/zap"

	"culvert/capture"
	"culvert/catalog"
	"culvert/config"
	"culvert/internal/sockopt"
	"culvert/packet"
)

// A capturer is the local server's side: it takes what the server sends to its
// peers, and hands it what they send.
type capturer interface {
	Set(peers []catalog.Peer) error
	Deliver(from catalog.Key, service string, packets [][]byte) (int, error)
	DialServer(ctx context.Context, from catalog.Key, service string) (*net.TCPConn, error)
	Drain(ctx context.Context) int
	Run(ctx context.Context) error
	Close()
}

// newCapture begins to take what the server sends: binds its endpoints, or
// installs the rules that turn it here.
func (s *Sidecar) newCapture(cfg *config.Sidecar, peers []catalog.Peer, log *zap.Logger, m *capture.Metrics) (capturer, error) {
	if cfg.Capture != config.CaptureRedirect {
		b, err := capture.NewBind(peers, capture.BindOptions{
			Self: s.self(), Server: cfg.Server.Address, Advertise: cfg.Server.Advertise, Hairpin: cfg.Server.Hairpin,
			Services: endpoints(cfg.Services), Handler: handler{s},
			WrongSource: func() { s.packets.DroppedOut(packet.ReasonWrongSource) },
			Log:         log, Metrics: m,
		})
		if err != nil {
			return nil, err // not b: a nil *Bind is no nil capturer
		}
		return b, nil
	}
	listen := s.Addr().(*net.TCPAddr).AddrPort() //nolint:errcheck,forcetypeassert // of a TCP listener
	r, err := capture.NewRedirect(peers, capture.RedirectOptions{
		Self: s.self(), Server: cfg.Server.Address, Listen: listen.Port(), Services: endpoints(cfg.Services),
		Open: cfg.OnExit == config.OnExitOpen, Handler: handler{s}, Log: log, Metrics: m,
	})
	if err != nil {
		return nil, err
	}
	return r, nil
}

// control prepares the sockets of dials to other sidecars and gateways. With
// redirect they are marked, since one may lead to an address that is captured.
func control(cfg *config.Sidecar) func(network, address string, c syscall.RawConn) error {
	if cfg.Capture != config.CaptureRedirect {
		return sockopt.StreamControl
	}
	return func(network, address string, c syscall.RawConn) error {
		if err := capture.MarkOwn(c); err != nil {
			return err
		}
		return sockopt.StreamControl(network, address, c)
	}
}

// carried are the peers whose traffic comes here. With redirect the servers of
// the same datacenter reach each other as they are.
func (s *Sidecar) carried(peers []catalog.Peer) []catalog.Peer {
	var out []catalog.Peer
	for _, p := range peers {
		if !s.isPlain(p.Key) {
			out = append(out, p)
		}
	}
	return out
}

func (s *Sidecar) isPlain(peer catalog.Key) bool {
	cfg := s.cfg.Load()
	return cfg.Capture == config.CaptureRedirect && peer.Datacenter == cfg.Datacenter
}

// CaptureStatus tells what becomes of what the server sends.
type CaptureStatus struct {
	Mode    string       `json:"mode"`    // bind or redirect
	Table   string       `json:"table"`   // of nftables, "" with bind
	Lost    []LostStatus `json:"lost"`    // addresses that are refused, their peers being gone
	Blocked string       `json:"blocked"` // how the host's own firewall is in the way, "" if it is not
}

// LostStatus is one address that is refused.
type LostStatus struct {
	Address string `json:"address"`
	Name    string `json:"name"` // datacenter/node of who had it last
}

// captureStatus returns the status of the capture, and the endpoints of peers.
func (s *Sidecar) captureStatus() (CaptureStatus, map[catalog.Key]netip.Addr) {
	r, ok := s.capture.(*capture.Redirect)
	if !ok {
		return CaptureStatus{Mode: config.CaptureBind, Lost: []LostStatus{}}, nil
	}
	from := r.Status()
	st := CaptureStatus{Mode: config.CaptureRedirect, Table: from.Table, Lost: []LostStatus{}, Blocked: from.Blocked}
	for _, at := range from.LostAddrs() {
		st.Lost = append(st.Lost, LostStatus{at.String(), from.Lost[at]})
	}
	return st, from.Endpoints
}
