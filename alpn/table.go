package alpn

import (
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
)

// A Kind says how the bytes after the handshake are to be read.
type Kind int

// The kinds of service.
const (
	KindPacket Kind = iota + 1 // frames, each one datagram
	KindStream                 // the bytes of one TCP connection
)

// String returns "packet" or "stream".
func (k Kind) String() string {
	switch k {
	case KindPacket:
		return "packet"
	case KindStream:
		return "stream"
	}
	return fmt.Sprintf("kind %d", int(k))
}

// prefix is Culvert's own protocol name up to the service.
func (k Kind) prefix() string { return "culvert/" + k.String() + "/1/" }

// A Service is one entry of a [Table].
type Service struct {
	Name string // [a-z0-9-]{1,63}
	Kind Kind
	ALPN string // a name known outside Culvert that means the same, such as consul/wan-gossip/packet; optional
}

// A Route is what a negotiated protocol means.
type Route struct {
	Protocol string // as negotiated
	Service  string // Service.Name
	Kind     Kind
	Native   bool // not Culvert's own: one frame is one TLS record, and frames go one way
}

// A Table maps protocol names to services and back. It is immutable and may be
// used from any goroutine.
type Table struct {
	protocols []string
	routes    map[string]Route
	offers    map[string][]string
}

// maxProtocol is the length limit of RFC 7301 section 3.1, in bytes.
const maxProtocol = 255

// NewTable builds a Table. Two services of one name, or of one ALPN name, are an
// error, and so is an ALPN name that is Culvert's own.
func NewTable(services []Service) (*Table, error) {
	t := &Table{routes: make(map[string]Route), offers: make(map[string][]string)}
	valid := regexp.MustCompile(`^[a-z0-9-]{1,63}$`)
	var native []string
	for _, s := range services {
		if !valid.MatchString(s.Name) {
			return nil, fmt.Errorf("service name %q: want 1 to 63 of a-z, 0-9 and -", s.Name)
		}
		if s.Kind != KindPacket && s.Kind != KindStream {
			return nil, fmt.Errorf("service %q: %v is neither packet nor stream", s.Name, s.Kind)
		}
		if _, taken := t.offers[s.Name]; taken {
			return nil, fmt.Errorf("service %q: given twice", s.Name)
		}
		own := s.Kind.prefix() + s.Name
		t.routes[own] = Route{Protocol: own, Service: s.Name, Kind: s.Kind}
		t.protocols = append(t.protocols, own)
		t.offers[s.Name] = []string{own}
		if s.ALPN == "" {
			continue
		}
		if err := t.addNative(s); err != nil {
			return nil, fmt.Errorf("service %q: %w", s.Name, err)
		}
		native = append(native, s.ALPN)
	}
	if len(t.protocols) == 0 {
		// An empty list would make crypto/tls negotiate nothing and accept it.
		return nil, errors.New("no service")
	}
	t.protocols = append(t.protocols, native...)
	return t, nil
}

func (t *Table) addNative(s Service) error {
	switch r, taken := t.routes[s.ALPN]; {
	case len(s.ALPN) > maxProtocol:
		return fmt.Errorf("alpn name of %d bytes: at most %d", len(s.ALPN), maxProtocol)
	case strings.HasPrefix(s.ALPN, "culvert/"):
		return fmt.Errorf("alpn name %q: culvert/ names are Culvert's own", s.ALPN)
	case s.ALPN == "h2", strings.HasPrefix(s.ALPN, "http/"):
		// With h2 in the list crypto/tls lets an http/1.1 client in without
		// any protocol.
		return fmt.Errorf("alpn name %q: HTTP is no service", s.ALPN)
	case taken:
		return fmt.Errorf("alpn name %q: taken by service %q", s.ALPN, r.Service)
	}
	t.routes[s.ALPN] = Route{Protocol: s.ALPN, Service: s.Name, Kind: s.Kind, Native: true}
	t.offers[s.Name] = append(t.offers[s.Name], s.ALPN)
	return nil
}

// Protocols returns every name, in the order in which an acceptor prefers them:
// Culvert's own first. The slice is the caller's.
func (t *Table) Protocols() []string { return slices.Clone(t.protocols) }

// Lookup returns the route of a protocol name. The empty name has none.
func (t *Table) Lookup(protocol string) (Route, bool) {
	r, ok := t.routes[protocol]
	return r, ok
}

// Offer returns what to offer when dialling a service, Culvert's own name first,
// and nil for a service that the table lacks. The slice is the caller's.
func (t *Table) Offer(service string) []string { return slices.Clone(t.offers[service]) }
